"""Coverage of located neighbours, and the confidence that is asked for."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from dbdiffusion.data.sets import CONTROL, LocationSet
from dbdiffusion.perturbations.abstention import MIN_QUERIES, abstain, coverage, threshold


def test_coverage_matches_a_loop() -> None:
    rng = np.random.default_rng(0)
    weights = rng.uniform(-0.2, 1, (3, 6))
    weights /= weights.sum(axis=1, keepdims=True)
    values, truth = rng.normal(size=(6, 40)), rng.normal(size=(3, 40))
    found = coverage(weights, values, truth, 0.8)
    for row in range(3):
        w = np.abs(weights[row]) / np.abs(weights[row]).sum()
        hits = 0
        for gene in range(40):
            mean = sum(w[k] * values[k, gene] for k in range(6))
            variance = sum(w[k] * (values[k, gene] - mean) ** 2 for k in range(6)) / (1 - (w**2).sum())
            t = stats.t.ppf(0.9, 1 / (w**2).sum() - 1)
            half = t * np.sqrt(variance * (1 + (weights[row] ** 2).sum()))
            hits += abs(truth[row, gene] - weights[row] @ values[:, gene]) <= half
        assert found[row] == pytest.approx(hits / 40)
    assert np.isnan(coverage(np.zeros((1, 6)), values, truth[:1], 0.8))[0]


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_coverage_is_nominal_among_ones_kind_and_lower_elsewhere(level: float) -> None:
    rng = np.random.default_rng(1)
    weights = np.full((300, 12), 1 / 12)
    values, kin = rng.normal(size=(12, 200)), rng.normal(size=(300, 200))
    assert coverage(weights, values, kin, level).mean() == pytest.approx(level, abs=0.02)
    assert coverage(weights, values, 3 * kin, level).mean() < level - 0.2


def test_threshold_is_the_smallest_that_holds() -> None:
    confidence = np.repeat([0.1, 0.5, 0.9], 20)
    noise = 0.02 * np.random.default_rng(0).normal(size=60)
    assert threshold(confidence, np.repeat([0.5, 0.7, 0.95], 20) + noise, 0.9) == 0.9
    assert threshold(confidence, np.repeat([0.5, 0.95, 0.95], 20) + noise, 0.9) == 0.5
    assert threshold(confidence, np.repeat([0.95, 0.95, 0.95], 20) + noise, 0.9) == 0
    assert threshold(confidence, np.repeat([0.5, 0.6, 0.7], 20) + noise, 0.9) == np.inf
    assert threshold(np.ones(MIN_QUERIES - 1), np.ones(MIN_QUERIES - 1), 0.9) == np.inf
    assert threshold([], [], 0.9) == np.inf


def test_targets_abstain_and_pseudo_targets_stay() -> None:
    queries = pd.Index(["T", "U", "A+B", "P"])
    info = pd.DataFrame(
        {
            "role": ["target", "target", "target", "pseudo"],
            "k_eff": 2.0,
            "confidence": [0.2, 0.8, 0.3, 0.1],
            "kind": ["single", "single", "additive", "single"],
            "parts_measured": 0,
            "status": "located",
            "reason": "",
            "locator": "x",
        },
        index=queries,
    )
    located = LocationSet(queries, pd.Index(["A", "B", CONTROL]), np.tile([0.5, 0.5, 0.0], (4, 1)), info)
    found = abstain(located, 0.5)
    assert list(found.info["status"]) == ["not_locatable", "located", "not_locatable", "located"]
    assert found.info.loc["T", "reason"] == "confidence 0.20 is below the 0.50 asked for"
    assert list(found.weights.sum(axis=1)) == [0, 1, 0, 1]
    assert list(abstain(located, 0.5, ("single",)).info["status"]) == ["not_locatable", "located", "located", "located"]
    assert "any that" in abstain(located, np.inf).info.loc["U", "reason"]
    unchanged = abstain(located, 0.0)
    pd.testing.assert_frame_equal(unchanged.info, info)
    assert located.info.loc["T", "status"] == "located"
