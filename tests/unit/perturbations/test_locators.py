"""Locators against refitted oracles, the choice among them, and confidence."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest

from dbdiffusion.config.embedding import LocationConfig
from dbdiffusion.perturbations.features import GeneFeatures, design
from dbdiffusion.perturbations.locators import (
    Clustering,
    ClusterLocator,
    Confidence,
    Fold,
    KernelLocator,
    Known,
    Ranked,
    RidgeLocator,
    StackLocator,
    _error_of_choice,
    _simplex,
    candidates,
    place,
    rank,
)

NAMES = [f"P{i:02d}" for i in range(12)]


def known_of(
    features: list[GeneFeatures], measured: list[str], learned: list[str] | None = None, clustering: Clustering | None = None
) -> Known:
    return Known(measured, learned or measured, {f.source: f for f in features}, lambda: clustering)


@pytest.fixture
def features() -> GeneFeatures:
    values = np.random.default_rng(0).normal(size=(15, 4))
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    return GeneFeatures("table:x", pd.Index([*NAMES, "T1", "T2", "T3"]), values)


def test_kernel_is_a_softmax_over_nearest_neighbours(features: GeneFeatures) -> None:
    locator = KernelLocator(("table:x",), 3, 0.2)
    found = locator.locate(["T1", "P03"], known_of([features], NAMES))
    values = dict(zip(features.genes, features.values, strict=True))
    for row, query in enumerate(["T1", "P03"]):
        cosine = {name: values[query] @ values[name] for name in NAMES if name != query}
        best = sorted((n for n in cosine if cosine[n] > 0), key=lambda n: -cosine[n])[:3]
        raw = np.exp([cosine[n] / 0.2 for n in best])
        expected = dict(zip(best, raw / raw.sum(), strict=True))
        np.testing.assert_allclose(found.weights[row], [expected.get(n, 0) for n in NAMES], atol=1e-5)
        assert found.score[row] == pytest.approx(sum(expected[n] * cosine[n] for n in best), abs=1e-5)


def test_ridge_weights_are_those_of_a_refitted_regression(features: GeneFeatures) -> None:
    """Prediction by weights equals ridge with an unpenalised intercept, fitted anew for each query without it."""
    rng = np.random.default_rng(1)
    other = GeneFeatures("b", pd.Index(NAMES[3:] + ["T2"]), rng.normal(size=(10, 3)))
    outcome = rng.normal(size=(12, 7))
    penalty = 0.7
    locator = RidgeLocator(("table:x", "b"), penalty)
    known = known_of([features, other], NAMES)
    queries = ["T1", "T2", *NAMES]
    found = locator.locate(queries, known)
    np.testing.assert_allclose(found.weights.sum(axis=1), 1)
    left, right = design([features, other], queries, NAMES)
    for row, query in enumerate(queries):
        rest = [i for i, name in enumerate(NAMES) if name != query]
        x, y = right[rest], outcome[rest]
        slope = np.linalg.solve((x - x.mean(0)).T @ (x - x.mean(0)) + penalty * np.eye(x.shape[1]), (x - x.mean(0)).T @ (y - y.mean(0)))
        expected = y.mean(0) + (left[row] - x.mean(0)) @ slope
        np.testing.assert_allclose(found.weights[row] @ outcome, expected, atol=1e-10)
        if query in NAMES:
            assert found.weights[row, NAMES.index(query)] == 0


def test_large_penalty_is_the_training_mean(features: GeneFeatures) -> None:
    found = RidgeLocator(("table:x",), 1e12).locate(["T1"], known_of([features], NAMES))
    np.testing.assert_allclose(found.weights, 1 / 12, atol=1e-9)
    assert found.score[0] == pytest.approx(0, abs=1e-6)


def test_measured_without_features_get_no_weight(features: GeneFeatures) -> None:
    known = known_of([features], [*NAMES, "UNKNOWN"])
    for locator in (KernelLocator(("table:x",), 20, 0.5), RidgeLocator(("table:x",), 1.0)):
        found = locator.locate(["T1"], known)
        assert found.weights[0, -1] == 0
        assert found.weights[0].sum() == pytest.approx(1)


@pytest.mark.parametrize("locator", [KernelLocator(("table:x",), 5, 0.1), RidgeLocator(("table:x",), 1.0)])
def test_unknown_gene_is_not_locatable(features: GeneFeatures, locator) -> None:
    found = locator.locate(["NOBODY", "T1"], known_of([features], NAMES))
    assert "NOBODY" in found.reasons[0]
    assert found.reasons[1] == ""
    assert (found.weights[0] == 0).all()
    lonely = locator.locate(["T1"], known_of([features], ["ELSEWHERE"]))
    assert lonely.reasons[0]


def test_gene_unlike_all_others_is_not_locatable() -> None:
    features = GeneFeatures("a", pd.Index(["A", "B", "T"]), np.array([[1.0, 0], [1, 0], [-1, 0]]))
    found = KernelLocator(("a",), 2, 0.1).locate(["T"], known_of([features], ["A", "B"]))
    assert "shared" in found.reasons[0]
    assert (found.weights == 0).all()


def _cluster_oracle(query: str, perturbation: dict[str, str], gene: dict[str, str]) -> set[str]:
    """The published rule, written the obvious way."""
    g = {name for name in gene if gene[name] == gene[query] and name != query}
    best, winner = 0.0, set()
    for label in sorted(set(perturbation.values()), key=lambda c: min(p for p in perturbation if perturbation[p] == c)):
        c = {p for p in perturbation if perturbation[p] == label and p != query}
        if c and len(c & g) ** 2 / len(c) > best:
            best, winner = len(c & g) ** 2 / len(c), c
    return winner


def test_cluster_rule() -> None:
    rng = np.random.default_rng(2)
    for _ in range(30):
        perturbation = {name: str(rng.integers(4)) for name in NAMES}
        gene = {name: str(rng.integers(3)) for name in [*NAMES[:9], "T1", "X1", "X2"]}
        found = ClusterLocator().locate(["T1", "P04", "P11"], known_of([], NAMES, clustering=Clustering(perturbation, gene)))
        for row, query in enumerate(["T1", "P04"]):
            winner = _cluster_oracle(query, perturbation, gene)
            assert {NAMES[i] for i in np.flatnonzero(found.weights[row])} == winner
            assert (found.reasons[row] == "") == bool(winner)
            if winner:
                np.testing.assert_allclose(found.weights[row][found.weights[row] > 0], 1 / len(winner))
        assert "not measured" in found.reasons[2]


def test_cluster_uses_only_what_was_learned() -> None:
    clustering = Clustering(dict.fromkeys(NAMES[:6], "0"), dict.fromkeys([*NAMES, "T1"], "0"))
    found = ClusterLocator().locate(["T1"], known_of([], NAMES, NAMES[:6], clustering))
    np.testing.assert_allclose(found.weights[0], [1 / 6] * 6 + [0] * 6)


def test_candidates_run_from_simple_to_complex() -> None:
    found = candidates(LocationConfig(), ["a", "b"])
    assert isinstance(found[0], KernelLocator)
    assert isinstance(found[-1], ClusterLocator)
    assert found[0].sources == ("a",)
    assert found[0].temperature == 0.5
    assert candidates(LocationConfig(locator="cluster"), []) == [ClusterLocator()]
    assert {type(c) for c in candidates(LocationConfig(locator="ridge"), ["a"])} == {RidgeLocator}
    assert len({c.label for c in found}) == len(found)


# --- choice


def _folds(effect: dict[str, np.ndarray], features: list[GeneFeatures], names: list[str], k: int = 5) -> list[Fold]:
    out = []
    for i in range(k):
        queries = names[i::k]
        measured = [n for n in names if n not in queries]
        truth, rest = (np.array([effect[n] for n in group]) for group in (queries, measured))
        out.append(Fold(queries, known_of(features, measured), truth, rest))
    return out


@pytest.fixture
def groups() -> tuple[dict[str, np.ndarray], GeneFeatures, GeneFeatures, list[str]]:
    """Perturbations in 4 groups of like effects; features that tell the group, and features that tell nothing."""
    rng = np.random.default_rng(3)
    names = [f"P{i:02d}" for i in range(40)]
    centre = rng.normal(size=(4, 30))
    effect = {name: centre[i % 4] + 0.3 * rng.normal(size=30) for i, name in enumerate(names)}
    good = np.eye(4)[np.arange(40) % 4] + 0.1 * rng.normal(size=(40, 4))
    bad = rng.normal(size=(40, 4))
    index = pd.Index(names)
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (good, bad)]
    return effect, GeneFeatures("good", index, unit[0]), GeneFeatures("bad", index, unit[1]), names


def test_error_is_that_of_the_located_mean_and_the_informative_source_wins(groups) -> None:
    effect, good, bad, names = groups
    folds = _folds(effect, [good, bad], names)
    locators = candidates(LocationConfig(locator="kernel", neighbours=5), ["bad", "good"])
    ranking = rank(locators, folds)
    assert ranking[0].locator.sources == ("good",)
    assert ranking[0].error < 0.3 < ranking[-1].error
    # One error written out.
    best, total, mean = ranking[0], 0.0, 0.0
    for fold in folds:
        weights = best.locator.locate(fold.queries, fold.known).weights
        total += ((weights @ fold.measured - fold.truth) ** 2).sum()
        mean += ((fold.measured.mean(axis=0) - fold.truth) ** 2).sum()
    assert best.error == pytest.approx(total / mean)


def test_ties_go_to_the_simpler(groups) -> None:
    effect, good, _, names = groups
    copy = GeneFeatures("copy", good.genes, good.values)
    locators = [RidgeLocator(("copy",), 1.0), RidgeLocator(("good",), 1.0), KernelLocator(("good",), 39, 1e9)]
    ranking = rank(locators, _folds(effect, [good, copy], names))
    assert ranking[0].locator is locators[0]
    assert rank(locators[::-1], _folds(effect, [good, copy], names))[0].locator is locators[1]


def test_queries_that_cannot_be_located_cost_the_training_mean(groups) -> None:
    effect, good, _, names = groups
    half = GeneFeatures("half", good.genes[:20], good.values[:20])
    ranking = rank([KernelLocator(("half",), 5, 0.1), KernelLocator(("good",), 5, 0.1)], _folds(effect, [good, half], names))
    assert ranking[0].locator.sources == ("good",)
    assert ranking[1].error < 1


def test_next_best_locator_takes_over(groups) -> None:
    effect, good, bad, names = groups
    extra = GeneFeatures("bad", pd.Index([*names, "ONLY"]), np.vstack([bad.values, bad.values[:1]]))
    folds = _folds(effect, [good, extra], names)
    ranking = rank([KernelLocator(("good",), 5, 0.1), KernelLocator(("bad",), 5, 0.1)], folds)
    found = place(["ONLY", "NEVER", names[0]], known_of([good, extra], names), ranking)
    assert "bad" in found.labels[0]
    assert "good" in found.labels[2]
    assert found.reasons[0] == found.reasons[2] == ""
    assert "NEVER" in found.reasons[1]
    assert found.confidence[0] < found.confidence[2]
    nothing = place(["ONLY"], known_of([], names), [])
    assert nothing.reasons[0]


# --- confidence


def test_confidence_is_monotone_and_never_certain() -> None:
    rng = np.random.default_rng(0)
    score = rng.uniform(size=200)
    confidence = Confidence.fit(score, rng.uniform(size=200) < score)
    grid = confidence(np.linspace(-1, 2, 300))
    assert (np.diff(grid) >= -1e-12).all()
    assert grid.min() > 0
    assert grid.max() < 1
    assert confidence(np.array([0.9]))[0] > 0.7 > 0.3 > confidence(np.array([0.1]))[0]
    assert Confidence.fit(np.zeros(0), np.zeros(0, dtype=bool))(np.array([3.0]))[0] == 0.5
    few = Confidence.fit(np.array([1.0, 2.0]), np.array([True, True]))
    assert few(np.array([2.0]))[0] == pytest.approx(0.75)


def test_confidence_is_calibrated() -> None:
    """Among new queries, those of confidence c are better than the training mean in about c of cases."""
    rng = np.random.default_rng(1)
    truth = lambda s: 0.2 + 0.7 * s  # noqa: E731
    fit, new = rng.uniform(size=600), rng.uniform(size=4000)
    confidence = Confidence.fit(fit, rng.uniform(size=600) < truth(fit))(new)
    better = rng.uniform(size=4000) < truth(new)
    for low in (0.2, 0.4, 0.6):
        inside = (confidence >= low) & (confidence < low + 0.2)
        if inside.sum() > 200:
            assert abs(better[inside].mean() - confidence[inside].mean()) < 0.12


def test_informative_features_give_confidence_and_noise_does_not(groups) -> None:
    effect, good, bad, names = groups
    by_source = {}
    for source in ("good", "bad"):
        ranked = rank([KernelLocator((source,), 5, 0.1)], _folds(effect, [good, bad], names))[0]
        located = ranked.locator.locate(names, known_of([good, bad], names))
        by_source[source] = ranked.confidence(located.score).mean()
    assert by_source["good"] > 0.9
    assert by_source["bad"] < 0.5


# --- mixtures


def test_mixture_shares_are_the_constrained_optimum() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        effects, truth = rng.normal(size=(3, 200)), rng.normal(size=200)
        truth += rng.uniform(-0.5, 0.9, 3) @ effects
        shares = _simplex(effects @ effects.T, effects @ truth)
        assert shares.min() >= 0
        assert shares.sum() <= 1 + 1e-6
        grid = np.array([(a, b, c) for a, b, c in itertools.product(np.linspace(0, 1, 41), repeat=3) if a + b + c <= 1])
        errors = ((truth - grid @ effects) ** 2).sum(axis=1)
        assert ((truth - shares @ effects) ** 2).sum() <= errors.min() * (1 + 1e-5)
    assert (_simplex(np.zeros((2, 2)), np.zeros(2)) == 0).all()


def test_mixture_is_judged_with_shares_from_other_folds(groups) -> None:
    """On noise, an honest error is not below the training mean's by more than chance, and the mean is chosen."""
    effect, _, bad, names = groups
    rng = np.random.default_rng(7)
    noise = {name: rng.normal(size=200) for name in names}
    locators = candidates(LocationConfig(), ["bad"])[:-1]
    ranking = rank(locators, _folds(noise, [bad], names), "compare")
    assert ranking[0].locator.label == "training mean"
    assert ranking[0].error == pytest.approx(1)
    assert len(ranking) == len(locators) + 2
    assert isinstance(rank(locators, _folds(effect, [bad], names), "first")[0].locator, StackLocator)
    assert len(rank(locators, _folds(noise, [bad], names))) == len(locators)


def test_mixture_is_judged_with_members_from_other_folds(groups) -> None:
    """Its error in a fold is that of the stack made without the fold: which setting stands for a source is learned there, too."""
    _, good, bad, names = groups
    few, rng = names[:20], np.random.default_rng(4)
    locators = candidates(LocationConfig(), ["bad", "good"])[:-1]
    moved = 0
    for _ in range(4):
        folds = _folds({name: rng.normal(size=3) for name in few}, [good, bad], few)
        mixed, without = rank(locators, folds, "first")[0], []
        for out in range(len(folds)):
            without.append(rank(locators, folds[:out] + folds[out + 1 :], "first")[0].locator)
        base = sum(((fold.measured.mean(axis=0) - fold.truth) ** 2).sum() for fold in folds)
        expected = [_error(one, fold) / base for one, fold in zip(without, folds, strict=True)]
        np.testing.assert_allclose(mixed.by_fold, expected, rtol=1e-6)
        assert mixed.error == pytest.approx(sum(expected))
        # The settings do change from fold to fold, or this would prove nothing.
        settings = [{member.locator.label for member in one.members} for one in without]
        moved += any(one != settings[0] for one in settings)
    assert moved


def test_mixture_weights_are_the_mixed_weights(groups) -> None:
    effect, good, bad, names = groups
    known = known_of([good, bad], names[5:])
    members = rank(candidates(LocationConfig(locator="kernel"), ["good", "bad"]), _folds(effect, [good, bad], names))[:2]
    mixed = StackLocator(tuple(members), (0.5, 0.2))
    queries = [names[0], names[7], "NOBODY"]
    found = mixed.locate(queries, known)
    one, two = (member.locator.locate(queries, known).weights for member in members)
    uniform = np.full((3, 35), 1 / 35)
    uniform[1] = 1 / 34
    uniform[1, 2] = 0
    np.testing.assert_allclose(found.weights[:2], (0.5 * one + 0.2 * two + 0.3 * uniform)[:2])
    assert found.weights[1, 2] == 0
    assert "NOBODY" in found.reasons[2]
    assert (found.weights[2] == 0).all()
    assert mixed.label.startswith("stack(0.50 kernel")
    assert mixed.label.endswith("0.30 training mean)")


def test_confidence_of_scores_that_differ_in_their_last_bits_is_a_number() -> None:
    score = np.array([0.1, 0.2, 0.3, 0.84386997, np.nextafter(0.84386997, 1), np.nextafter(0.84386997, 0)])
    found = Confidence.fit(score, np.array([False, True, True, True, False, True]))
    assert np.isfinite(found.values).all() and np.isfinite(found(score)).all()


def test_the_choice_of_a_single_locator_is_judged_by_folds_it_was_not_chosen_on(groups) -> None:
    """Forty useless locators: the smallest of their errors is below 1 by luck; the error of choosing, written out here, is not."""
    _, _, bad, names = groups
    rng = np.random.default_rng(11)
    sources = [GeneFeatures(f"n{i}", bad.genes, rng.normal(size=(40, 4))) for i in range(20)]
    locators = [KernelLocator((source.source,), 5, t) for source in sources for t in (0.2, 0.5)]
    lucky = []
    for _ in range(8):
        # Few effective genes, so that errors vary as they do with few perturbations.
        folds = _folds({name: rng.normal(size=2) for name in names[:16]}, sources, names[:16])
        errors = np.array([[_error(locator, fold) for fold in folds] for locator in locators])
        base = sum(((fold.measured.mean(axis=0) - fold.truth) ** 2).sum() for fold in folds)
        picks = [errors[:, [i for i in range(5) if i != number]].sum(axis=1).argmin() for number in range(5)]
        honest = sum(errors[pick, number] for number, pick in enumerate(picks)) / base
        by_name = {one.locator: one for one in rank(locators, folds)}
        assert _error_of_choice([by_name[locator] for locator in locators]) == pytest.approx(honest)
        first = rank(locators, folds, "compare")[0]
        assert first.error == pytest.approx(min(1, honest, first.error))
        lucky.append((min(one.error for one in by_name.values()), honest, isinstance(first.locator, KernelLocator)))
    smallest, honest, single = np.array(lucky).T
    assert smallest.mean() < 1 < honest.mean()
    # By the smallest error a single locator would be taken as often as luck is below 1.
    assert single.sum() < (smallest < 1).sum()


def _error(locator: KernelLocator, fold: Fold) -> float:
    found = locator.locate(fold.queries, fold.known)
    mean = fold.measured.mean(axis=0)
    guess = np.where((found.reasons == "")[:, None], found.weights @ fold.measured, mean)
    return float(((guess - fold.truth) ** 2).sum())


def test_a_gene_that_is_annotated_but_like_no_other_stands_at_the_training_mean(features: GeneFeatures) -> None:
    """A single locator says why it cannot place it; the mixture, of which the training mean is a part, can."""
    named = GeneFeatures(features.source, features.genes, features.values, {**{gene: gene for gene in features.genes}, "LONELY": "LONELY"})
    known = known_of([named], NAMES)
    alone = RidgeLocator(("table:x",), 1.0).locate(["LONELY", "NOBODY"], known)
    assert "shared with a measured one" in alone.reasons[0]
    assert "NOBODY is not in table:x" in alone.reasons[1]
    member = Ranked(RidgeLocator(("table:x",), 1.0), 0.5, Confidence(np.zeros(1), np.ones(1)))
    found = StackLocator((member,), (0.6,)).locate(["LONELY", "NOBODY"], known)
    np.testing.assert_allclose(found.weights[0], 1 / 12)
    assert found.score[0] == 0
    assert (found.weights[1] == 0).all()
