"""Combinations as sums of parts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from dbdiffusion.perturbations.combine import Additivity, locate_all
from dbdiffusion.perturbations.features import GeneFeatures
from dbdiffusion.perturbations.locators import Confidence, KernelLocator, Known, Ranked

SINGLES = ["A", "B", "C", "D"]
TRAINING = pd.Index(["A", "A+B", "B", "C", "D"])


@pytest.fixture
def parts() -> tuple[Known, list[Ranked]]:
    rng = np.random.default_rng(0)
    features = GeneFeatures("f", pd.Index([*SINGLES, "X", "Y"]), rng.uniform(0.1, 1, size=(6, 3)))
    known = Known(SINGLES, SINGLES, {"f": features}, lambda: None)
    confidence = Confidence(np.array([0.0, 1.0]), np.array([0.6, 0.6]))
    return known, [Ranked(KernelLocator(("f",), 3, 0.1), 0.5, confidence)]


def locate(parts, queries, measured=SINGLES, additivity=Additivity(3, 3)):  # noqa: B008
    return locate_all(queries, ["target"] * len(queries), *parts, measured, additivity, TRAINING)


def test_sum_of_parts(parts) -> None:
    found = locate(parts, ["X", "A+C", "A+X", "X+Y", "A+C+X", "A"])
    np.testing.assert_allclose(found.weights.sum(axis=1), 1)
    rng = np.random.default_rng(1)
    effect = rng.normal(size=(5, 8))
    total = found.weights @ np.vstack([effect, np.zeros(8)])
    of = dict(zip(TRAINING, effect, strict=True))
    x = total[0]
    np.testing.assert_allclose(total[1], of["A"] + of["C"])
    np.testing.assert_allclose(total[2], of["A"] + x)
    np.testing.assert_allclose(total[4], of["A"] + of["C"] + x)
    assert list(found.info["parts_measured"]) == [0, 2, 1, 0, 2, 0]
    assert list(found.info["kind"]) == ["single"] + ["additive"] * 4 + ["single"]
    assert list(found.weights[:, -1]) == pytest.approx([0, -1, -1, -1, -2, 0])
    # A measured combination is no neighbour of singles, and no query its own.
    assert (found.weights[:, TRAINING.get_loc("A+B")] == 0).all()
    assert found.weights[5, 0] == 0
    np.testing.assert_allclose(found.info["k_eff"], 1 / (found.weights**2).sum(axis=1))


def test_parts_that_may_not_be_used_are_located(parts) -> None:
    found = locate(parts, ["A+C"], measured=["B", "C", "D"])
    assert found.weights[0, TRAINING.get_loc("A")] == 0
    assert found.info["parts_measured"].iloc[0] == 1


def test_confidence_of_a_sum(parts) -> None:
    found = locate(parts, ["X", "A+X", "A+C"]).info["confidence"]
    assert list(found) == pytest.approx([0.6, 0.6 * 0.8, 0.8])


def test_unlocatable_part(parts) -> None:
    found = locate(parts, ["A+NOBODY", "NOBODY", "A+C"])
    assert list(found.info["status"]) == ["not_locatable", "not_locatable", "located"]
    assert found.info["reason"].iloc[0].startswith("part NOBODY")
    assert (found.weights[:2] == 0).all()
    assert (found.info["confidence"].iloc[:2] == 0).all()
    frame = found.to_frame("all")
    assert list(frame.loc[frame["query"] == "NOBODY", "neighbour"]) == [""]


def test_additivity_counts_measured_sums() -> None:
    rng = np.random.default_rng(0)
    effect = {name: rng.normal(size=50) for name in "ABCD"}
    effect["A+B"] = effect["A"] + effect["B"]
    effect["C+D"] = -effect["C"] - effect["D"]
    effect["A+Z"] = effect["A"]
    assert Additivity.measure(effect) == Additivity(1, 2)
    assert Additivity(1, 2).confidence == 0.5
    assert Additivity.measure({"A": effect["A"]}).confidence == 0.5
