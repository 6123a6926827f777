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


def test_smallest_mean_error_wins() -> None:
    assert best_strength([errors(0.3)]) == 0.3
    # Means are over pseudo-targets, whatever their model.
    assert best_strength([errors(0.0, 3), errors(0.5, 30)]) == 0.5
    # Differences that are none, and too few rows to know.
    assert best_strength([{name: (1 - 1e-5 * np.arange(len(STRENGTHS))).tolist() for name in "PQ"}]) == 0.0
    assert best_strength([errors(0.3, 1)]) == best_strength([{}]) == best_strength([]) == 0.0


def test_no_guidance_is_left_on_evidence_only() -> None:
    """Noise leaves it seldom and one outlier never; a gain of the size of the noise is found with pseudo-targets enough."""
    # The mean error is smallest at 0.5, by one row of four.
    assert best_strength([errors(0.0, 3), errors(0.5, 1, scale=100)]) == 0.0
    random = np.random.default_rng(0)

    def chosen(gain: float) -> np.ndarray:
        rows = 5 + random.normal(0, 1, (400, 40, len(STRENGTHS))) - gain * (np.array(STRENGTHS) == 0.3)
        return np.array([best_strength([{str(i): row.tolist() for i, row in enumerate(one)}]) for one in rows])

    assert (chosen(0.0) == 0).mean() > 0.85
    assert (chosen(1.5) == 0.3).mean() > 0.95


def test_a_models_own_errors_do_not_choose_for_its_pseudo_targets(tmp_path: Path) -> None:
    for q, (best, rows) in enumerate(((0.1, 1), (0.5, 9), (0.3, 4))):
        Trial(str(q), errors(best, rows), errors(0.2)).write(tmp_path / f"{q}.json")
    files = [tmp_path / f"{q}.json" for q in range(3)]
    write_guidance(files, tmp_path / "guidance.json")
    chosen = read_json(tmp_path / "guidance.json")
    assert chosen["models"] == {"0": 0.5, "1": 0.3, "2": 0.5} and chosen["targets"] == 0.5 and chosen["seen"] == 0.2
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
