"""Combinations as sums of parts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from dbdiffusion.perturbations.combine import PENALTIES, Rule, Sums, Trial, groups_of, kind_of, learn_rule, locate_all, spared
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


SURE = Confidence(np.array([0.0, 1.0]), np.array([0.5, 0.8]))
STRENGTH = {"A": 3.0, "B": 2.0, "C": 4.0, "D": 1.0}
PLAIN = Sums({"measured": Rule((1.0, 1.0), SURE), "mixed": Rule((1.0, 1.0), None), "located": Rule((1.0,), SURE)}, STRENGTH)


def locate(parts, queries, measured=SINGLES, sums=PLAIN):
    return locate_all(queries, ["target"] * len(queries), *parts, measured, sums, TRAINING)


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


def test_factors_scale_the_parts(parts) -> None:
    rules = {"measured": Rule((0.9, 0.5), SURE), "mixed": Rule((0.8, 1.1), SURE), "located": Rule((0.7,), SURE)}
    found = locate(parts, ["A+C", "A+X", "X+Y", "A+C+D", "X"], sums=Sums(rules, STRENGTH))
    np.testing.assert_allclose(found.weights.sum(axis=1), 1)
    effect = np.vstack([np.random.default_rng(1).normal(size=(5, 8)), np.zeros(8)])
    total, of = found.weights @ effect, dict(zip(TRAINING, effect, strict=False))
    # C is the stronger of A and C; of three measured parts all others are weaker.
    np.testing.assert_allclose(total[0], 0.9 * of["C"] + 0.5 * of["A"])
    np.testing.assert_allclose(total[1], 0.8 * of["A"] + 1.1 * total[4])
    y = locate(parts, ["Y"]).weights[0] @ effect
    np.testing.assert_allclose(total[2], 0.7 * (total[4] + y))
    np.testing.assert_allclose(total[3], 0.9 * of["C"] + 0.5 * (of["A"] + of["D"]))
    assert found.info["locator"].iloc[0] == "additive(0.90 stronger + 0.50 weaker)"
    assert found.info["locator"].iloc[1].startswith("additive(0.80 measured + 1.10 located); kernel")
    assert found.weights[4, -1] == 0


def test_confidence_of_a_sum(parts) -> None:
    """That of measured combinations of the same kind; without any, an even chance times the part's."""
    found = locate(parts, ["X", "A+X", "A+C", "X+Y"]).info["confidence"]
    assert list(found) == pytest.approx([0.6, 0.5 * 0.6, 0.8, 0.68])


def test_unlocatable_part(parts) -> None:
    found = locate(parts, ["A+NOBODY", "NOBODY", "A+C"])
    assert list(found.info["status"]) == ["not_locatable", "not_locatable", "located"]
    assert found.info["reason"].iloc[0].startswith("part NOBODY")
    assert (found.weights[:2] == 0).all()
    assert (found.info["confidence"].iloc[:2] == 0).all()
    frame = found.to_frame("all")
    assert list(frame.loc[frame["query"] == "NOBODY", "neighbour"]) == [""]


def test_located_parts_are_no_neighbours_of_each_other(parts) -> None:
    """A pseudo-target A+B is located as if neither part had been measured; parts that are measured may be neighbours."""
    found = locate(parts, ["A", "B", "A+B", "A+C"], measured=["C", "D"])
    a, b, both, mixed = found.weights
    at = [TRAINING.get_loc(name) for name in "ABCD"]
    assert min(a[at[1]], b[at[0]]) > 1e-4
    assert both[at[0]] == both[at[1]] == 0
    expected = np.zeros(4)
    for weights, other in ((a[at], 1), (b[at], 0)):
        weights[other] = 0
        expected += weights / weights.sum()
    np.testing.assert_allclose(both[at], expected)
    np.testing.assert_allclose(both.sum(), 1)
    np.testing.assert_allclose(mixed[at], found.weights[0, at] + [0, 0, 1, 0])
    assert mixed[at[1]] > 1e-4


def test_a_part_that_is_like_nothing_but_another_part_is_not_locatable() -> None:
    values = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.0, 1.0]])
    known = Known(SINGLES, SINGLES, {"f": GeneFeatures("f", pd.Index(SINGLES), values)}, lambda: None)
    ranking = [Ranked(KernelLocator(("f",), 1, 0.1), 0.5, SURE)]
    info = locate((known, ranking), ["A+B", "A"], measured=["C", "D"]).info
    assert list(info["status"]) == ["not_locatable", "located"]
    assert info["reason"].iloc[0] == "part A: nothing but another part of the combination is like it"
    assert info["confidence"].iloc[0] == info["k_eff"].iloc[0] == 0


def test_weights_of_barred_neighbours_go_to_the_others_within_reason() -> None:
    np.testing.assert_allclose(spared(np.array([0.5, 0.3, 0.2]), SINGLES[:3], {"A"}), [0, 0.6, 0.4])
    mixed = np.array([0.95, 1.0, -0.95])
    assert spared(mixed, SINGLES[:3], {"A"}) is None
    assert spared(np.array([1.0, 0.0]), SINGLES[:2], {"A"}) is None
    # Where nobody is barred weights stay as they are, however large.
    np.testing.assert_array_equal(spared(2 * mixed - 0.5, SINGLES[:3], {"D"}), 2 * mixed - 0.5)


def trials(factors, n=8, noise=0.3, kind="measured", seed=0, genes=60) -> list[Trial]:
    rng = np.random.default_rng(seed)
    out = []
    for number in range(n):
        terms = rng.normal(size=(len(factors), genes)) * np.array([2.0, 1.0])[: len(factors), None]
        truth = np.array(factors) @ terms + noise * rng.normal(size=genes)
        out.append(Trial(f"D{number}", kind, terms, truth, float(((truth - 0.1) ** 2).sum()), 1.0))
    return out


def test_factors_are_the_ridge_fit_written_out() -> None:
    data = trials((0.7, 0.4))
    found = np.array(learn_rule(data, 2).factors)
    x = np.hstack([t.terms for t in data]).T
    y = np.concatenate([t.truth for t in data])
    s = (x**2).sum() / (len(data) * 2)
    fits = [np.linalg.solve(x.T @ x + k * s * np.eye(2), x.T @ y + k * s) for k in PENALTIES]
    assert min(np.abs(found - fit).max() for fit in fits) < 1e-9
    assert 0.7 <= found[0] < 1
    assert 0.4 <= found[1] < found[0]


def test_plain_sums_stay_plain() -> None:
    """Where sums hold the correction is (nearly) never taken; where there are few combinations it is not even tried."""
    kept = [learn_rule(trials((1.0, 1.0), noise=1.0, seed=seed), 2).factors == (1.0, 1.0) for seed in range(40)]
    assert np.mean(kept) > 0.7
    assert learn_rule(trials((0.5, 0.5), n=3), 2).factors == (1.0, 1.0)
    assert learn_rule([], 2) == Rule((1.0, 1.0), None)


@pytest.mark.parametrize("factors", [(0.8, 0.5), (0.7, 0.7), (1.0, 1.0), (1.3, 0.9)])
def test_learned_sums_are_not_worse_on_new_combinations(factors) -> None:
    learned, plain = 0.0, 0.0
    for seed in range(10):
        rule = learn_rule(trials(factors, n=6, noise=0.8, seed=seed), 2)
        for trial in trials(factors, n=20, noise=0.8, seed=100 + seed):
            learned += trial.error(np.array(rule.factors))
            plain += trial.error(np.ones(2))
    assert learned <= plain * 1.01
    if factors != (1.0, 1.0):
        assert learned < 0.97 * plain


def test_confidence_is_the_share_that_beats_the_training_mean() -> None:
    data = trials((1.0, 1.0), n=6, noise=0.1)
    rule = learn_rule(data, 2)
    assert rule.believed(1.0) == pytest.approx(7 / 8)
    lost = [Trial(t.name, t.kind, t.terms, -t.truth, t.base, t.score) for t in trials((1.0, 1.0), n=3, noise=0.1)]
    assert learn_rule(lost, 2).believed(1.0) == pytest.approx(1 / 5)


def test_kinds_and_groups() -> None:
    assert [kind_of(2, 0), kind_of(1, 1), kind_of(0, 2)] == ["measured", "mixed", "located"]
    assert groups_of(["A", "C"], [], STRENGTH) == [["C"], ["A"]]
    assert groups_of(["A"], ["X", "Y"], STRENGTH) == [["A"], ["X", "Y"]]
    assert groups_of([], ["X", "Y"], STRENGTH) == [["X", "Y"]]
    rules = Sums.learn([*trials((0.5, 0.5)), *trials((1.0,), kind="located")], STRENGTH).rules
    assert rules["measured"].factors != (1.0, 1.0)
    assert rules["mixed"] == Rule((1.0, 1.0), None)
    assert rules["located"].factors == (1.0,)
