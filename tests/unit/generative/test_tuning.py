"""Guidance strengths are chosen by the errors of pseudo-targets, and reach the rows they were chosen for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dbdiffusion.config.generator import GenerationConfig
from dbdiffusion.generative.conditions import Conditions
from dbdiffusion.generative.generate import strengths
from dbdiffusion.generative.tuning import STRENGTHS, Trial, best_strength, write_guidance
from dbdiffusion.runtime.errors import UserError
from dbdiffusion.runtime.files import read_json, write_json


def errors(best: float, rows: int = 3, scale: float = 1.0) -> np.ndarray:
    """(rows, S), smallest at one strength."""
    return scale * np.square(np.array(STRENGTHS) - best) + np.arange(rows)[:, None]


def spread(best: float, sd: float, rows: int, random: np.random.Generator) -> np.ndarray:
    """(rows, S), errors of perturbations whose own best strengths vary around one."""
    own = best + random.normal(0, sd, (rows, 1))
    return np.square(np.array(STRENGTHS) - own) + 2 + random.gamma(1, 1, (rows, 1))


def test_smallest_mean_error_wins() -> None:
    assert best_strength(errors(0.3)) == 0.3
    # Between the strengths tried, but not beyond.
    assert best_strength(errors(0.17)) == 0.17 and best_strength(errors(0.8)) == STRENGTHS[-1] and best_strength(errors(-0.2)) == 0.0
    # Errors that bend down are smallest at an end.
    bent = -np.square(np.tile(STRENGTHS, (3, 1)))
    assert best_strength(bent) == STRENGTHS[-1] and best_strength(bent + np.array(STRENGTHS)) == 0.0
    # 3 that want 0 and 30 that want 0.5.
    expected = 0.5 * 30 / 33
    assert 0.9 * expected < best_strength(np.vstack([errors(0.0, 3), errors(0.5, 30)])) < expected
    # Gains that are none, and too few rows to know.
    assert best_strength(np.tile(1 - 1e-5 * np.arange(len(STRENGTHS)), (3, 1))) == 0.0
    assert best_strength(errors(0.3, 2)) == best_strength(errors(0.3, 0)) == 0.0


@pytest.mark.parametrize(("best", "sd", "n"), [(0.25, 0.3, 12), (0.1, 0.9, 1500), (0.8, 0.6, 6)])
def test_shrinkage_is_by_the_jackknife(best: float, sd: float, n: int) -> None:
    """Against the textbook: parabola by its normal equations, every perturbation left out once."""
    rows = spread(best, sd, n, np.random.default_rng(3))
    design = np.vander(STRENGTHS, 3)

    def vertex(some: np.ndarray) -> float:
        a, b, _ = np.linalg.solve(design.T @ design, design.T @ some.mean(axis=0))
        return float(-b / (2 * a))

    others = np.array([vertex(np.delete(rows, i, axis=0)) for i in range(n)])
    whole, variance = vertex(rows), (n - 1) / n * np.square(others - others.mean()).sum()
    assert 0.3 < 1 - variance / whole**2 < 0.97
    assert best_strength(rows) == pytest.approx(min(STRENGTHS[-1], whole * (1 - variance / whole**2)), abs=1e-4)


def test_guidance_is_shrunk_so_far_as_it_is_uncertain() -> None:
    """What is noise seldom guides, and then little; so does one outlier; perturbations enough find what helps."""
    # The mean error is smallest near 0.45, by one row of twelve.
    assert best_strength(np.vstack([errors(0.0, 11), errors(0.5, 1, scale=100)])) < 0.1
    random = np.random.default_rng(0)

    def chosen(best: float, rows: int) -> np.ndarray:
        return np.array([best_strength(spread(best, 0.3, rows, random)) for _ in range(200)])

    none, some, many = chosen(0.0, 40), chosen(0.2, 10), chosen(0.2, 160)
    assert (none == 0).mean() > 0.8 and none.mean() < 0.02
    assert 0.1 < some.mean() < 0.19 < many.mean() < 0.21
    assert chosen(-0.2, 40).max() == 0


def test_its_own_error_does_not_choose_for_a_pseudo_target(tmp_path: Path) -> None:
    own, seen = spread(0.25, 0.2, 14, np.random.default_rng(1)), errors(0.2)
    files = [tmp_path / f"{q}.json" for q in range(3)]

    def chosen() -> dict:
        for q, (file, rows) in enumerate(zip(files, np.split(np.arange(14), [4, 9]), strict=True)):
            Trial({f"P{i}": own[i].tolist() for i in rows}, {f"S{q}": seen[q].tolist()}).write(file)
        write_guidance(files, tmp_path / "guidance.json")
        return read_json(tmp_path / "guidance.json")

    before = chosen()
    assert before["targets"] == best_strength(own) and before["seen"] == 0.2
    assert before["pseudo"] == {f"P{i}": best_strength(np.delete(own, i, axis=0)) for i in range(14)}
    assert before["pseudo_targets"] == 14 and before["difference_error"][0] == 0
    own[5] = errors(0.5, 1, scale=100)[0]
    after = chosen()
    assert after["pseudo"]["P5"] == before["pseudo"]["P5"]
    assert all(after[key] != before[key] for key in ("targets", "error")) and after["pseudo"]["P6"] != before["pseudo"]["P6"]


def test_a_perturbation_counts_once_however_many_models_have_seen_it(tmp_path: Path) -> None:
    seen = spread(0.2, 0.2, 6, np.random.default_rng(5))
    for q in range(3):  # The first four in all models, another draw of Monte-Carlo error in each.
        Trial({}, {f"S{i}": (seen[i] + 0.01 * (q - 1)).tolist() for i in (0, 1, 2, 3, *(4, 5)[:q])}).write(tmp_path / f"{q}.json")
    write_guidance([tmp_path / f"{q}.json" for q in range(3)], tmp_path / "guidance.json")
    once = np.vstack([seen[:4], seen[4] + 0.005, seen[5] + 0.01])
    assert 0 < read_json(tmp_path / "guidance.json")["seen"] == best_strength(once) < best_strength(np.vstack([seen] * 3))


@pytest.mark.parametrize("n", [3, 4])
def test_targets_are_guided_where_pseudo_targets_can_be(n: int, tmp_path: Path) -> None:
    Trial({f"P{i}": row for i, row in enumerate(errors(0.3, n).tolist())}, {}).write(tmp_path / "0.json")
    write_guidance([tmp_path / "0.json"], tmp_path / "guidance.json")
    chosen = read_json(tmp_path / "guidance.json")
    assert {chosen["targets"], *chosen["pseudo"].values()} == {0.3 if n > 3 else 0.0}


def test_strengths_follow_roles(tmp_path: Path) -> None:
    names, roles = ["control", "A", "B", "C", "D"], ["control", "pseudo", "pseudo", "target", "train"]
    known = Conditions(pd.Index(names), np.array(roles, dtype=object), np.zeros((5, 2)), 2)
    write_json(tmp_path / "g.json", {"targets": 0.5, "pseudo": {"A": 0.2}, "seen": 0.1})
    tuned = GenerationConfig(guidance="tuned")
    assert strengths(known, tuned, tmp_path / "g.json").tolist() == [0.0, 0.2, 0.5, 0.5, 0.1]
    assert strengths(known, GenerationConfig(guidance=1.5), None).tolist() == [0.0, 1.5, 1.5, 1.5, 1.5]
    with pytest.raises(UserError, match="no tuned strengths"):
        strengths(known, tuned, None)
