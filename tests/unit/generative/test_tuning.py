"""Guidance strengths are chosen by the errors of pseudo-targets, and reach the rows they were chosen for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dbdiffusion.config.generator import GenerationConfig
from dbdiffusion.generative.generate import strengths
from dbdiffusion.generative.tuning import STRENGTHS, Trial, best_strength, write_guidance
from dbdiffusion.runtime.errors import UserError
from dbdiffusion.runtime.files import read_json, write_json


def errors(best: float, rows: int = 3, scale: float = 1.0) -> dict[str, list[float]]:
    """Errors that are smallest at one strength."""
    return {f"P{i}": (scale * np.square(np.array(STRENGTHS) - best) + i).tolist() for i in range(rows)}


def spread(best: float, sd: float, rows: int, random: np.random.Generator) -> dict[str, list[float]]:
    """Errors of perturbations whose own best strengths vary around one."""
    own = best + random.normal(0, sd, rows)
    return {f"P{i}": (np.square(np.array(STRENGTHS) - w) + 2 + random.gamma(1, 1)).tolist() for i, w in enumerate(own)}


def test_smallest_mean_error_wins() -> None:
    assert best_strength([errors(0.3)]) == 0.3
    # Between the strengths tried, but not beyond.
    assert best_strength([errors(0.17)]) == 0.17 and best_strength([errors(0.8)]) == STRENGTHS[-1] and best_strength([errors(-0.2)]) == 0.0
    # Means are over pseudo-targets, whatever their model: 3 and 30 of them that want 0 and 0.5.
    expected = 0.5 * 30 / 33
    assert 0.9 * expected < best_strength([errors(0.0, 3), {f"Q{i}": row for i, row in enumerate(errors(0.5, 30).values())}]) < expected
    # Gains that are none, and too few rows to know.
    assert best_strength([{name: (1 - 1e-5 * np.arange(len(STRENGTHS))).tolist() for name in "PQR"}]) == 0.0
    assert best_strength([errors(0.3, 2)]) == best_strength([{}]) == best_strength([]) == 0.0


def test_shrinkage_is_by_the_jackknife() -> None:
    """Against the textbook: parabola by its normal equations, every perturbation left out once."""
    rows = spread(0.25, 0.3, 12, np.random.default_rng(3))
    design = np.vander(STRENGTHS, 3)

    def vertex(some: list[list[float]]) -> float:
        a, b, _ = np.linalg.solve(design.T @ design, design.T @ np.mean(some, axis=0))
        return float(np.clip(-b / (2 * a), 0, STRENGTHS[-1]))

    every = list(rows.values())
    others = np.array([vertex(every[:i] + every[i + 1 :]) for i in range(12)])
    whole, variance = vertex(every), 11 / 12 * np.square(others - others.mean()).sum()
    assert 0.5 < 1 - variance / whole**2 < 0.95
    assert best_strength([rows]) == pytest.approx(whole * (1 - variance / whole**2), abs=1e-3)


def test_guidance_is_shrunk_so_far_as_it_is_uncertain() -> None:
    """What is noise seldom guides, and then little; so does one outlier; perturbations enough find what helps."""
    # The mean error is smallest near 0.45, by one row of twelve.
    assert best_strength([errors(0.0, 11), {"outlier": errors(0.5, 1, scale=100)["P0"]}]) < 0.1
    random = np.random.default_rng(0)

    def chosen(best: float, rows: int) -> np.ndarray:
        return np.array([best_strength([spread(best, 0.3, rows, random)]) for _ in range(200)])

    none, some, many = chosen(0.0, 40), chosen(0.2, 10), chosen(0.2, 160)
    assert (none == 0).mean() > 0.8 and none.mean() < 0.02
    assert 0.1 < some.mean() < 0.19 < many.mean() < 0.21
    assert chosen(-0.2, 40).max() == 0


def test_a_models_own_errors_do_not_choose_for_its_pseudo_targets(tmp_path: Path) -> None:
    for q, (best, rows) in enumerate(((0.1, 1), (0.5, 9), (0.3, 4))):
        Trial(str(q), errors(best, rows), errors(0.2)).write(tmp_path / f"{q}.json")
    files = [tmp_path / f"{q}.json" for q in range(3)]
    write_guidance(files, tmp_path / "guidance.json")
    chosen = read_json(tmp_path / "guidance.json")
    several = {"0": (1, 2), "1": (0, 2), "2": (0, 1)}
    own = [Trial.read(file).pseudo for file in files]
    assert chosen["models"] == {q: best_strength([own[i] for i in others]) for q, others in several.items()}
    assert chosen["targets"] == best_strength(own) and chosen["seen"] == 0.2
    assert len({chosen["targets"], *chosen["models"].values()}) == 4
    assert chosen["pseudo_targets"] == 14 and chosen["difference_error"][0] == 0
    for replaced in (0.2, 0.0):
        Trial("2", errors(replaced, 20, scale=1e3), {}).write(files[2])
        write_guidance(files, tmp_path / "other.json")
        other = read_json(tmp_path / "other.json")
        assert other["models"]["2"] == chosen["models"]["2"]
        assert other["targets"] == other["models"]["0"] == replaced


def test_strengths_follow_roles(tmp_path: Path) -> None:
    roles = np.array(["control", "pseudo", "target", "train"], dtype=object)
    write_json(tmp_path / "g.json", {"targets": 0.5, "models": {"0": 0.2}, "seen": 0.1})
    tuned = GenerationConfig(guidance="tuned")
    assert strengths(roles, tuned, "0", tmp_path / "g.json").tolist() == [0.0, 0.2, 0.5, 0.1]
    assert strengths(roles, GenerationConfig(guidance=1.5), "0", None).tolist() == [0.0, 1.5, 1.5, 1.5]
    with pytest.raises(UserError, match="no tuned strengths"):
        strengths(roles, tuned, "0", None)
