"""Locators: the place of unmeasured single perturbations as weights over measured ones, and the choice among locators."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, Protocol

import numpy as np
import pandas as pd
from scipy.optimize import nnls
from sklearn.isotonic import IsotonicRegression

from dbdiffusion.config.embedding import LocationConfig
from dbdiffusion.perturbations.features import GeneFeatures, design, known, similarity

QUERY_BLOCK = 1024
TIE = 1e-3  # relative difference in error below which the simpler locator is taken
MIN_SHARE = 0.01  # members of a stack with less are left to the training mean


@dataclass(frozen=True)
class Clustering:
    """Clusters of perturbations and of genes, by name."""

    perturbations: dict[str, str]
    genes: dict[str, str]


@dataclass
class Known:
    """What may be used to locate queries: nothing in it comes from their cells, except a measured query's own row, which no
    locator uses for that query.

    measured: (P,) single perturbations that may be neighbours; learned: those of them whose cells features and clusters were
    learned from; features: by source name; cluster: makes the clusters when they are needed.
    """

    measured: list[str]
    learned: list[str]
    features: dict[str, GeneFeatures]
    cluster: Callable[[], Clustering] = field(repr=False)

    @cached_property
    def clusters(self) -> Clustering:
        return self.cluster()

    def of(self, sources: Sequence[str]) -> list[GeneFeatures]:
        """The features of some sources, without those that know no gene here."""
        return [self.features[name] for name in sources if name in self.features]


@dataclass(frozen=True)
class Located:
    """weights: (R, P) over Known.measured, rows sum to 1, or to 0 where reason is not empty; score: (R,) evidence for the place,
    larger is better, comparable within one locator; reasons: (R,) why a query is not locatable, else empty."""

    weights: np.ndarray
    score: np.ndarray
    reasons: np.ndarray


class Locator(Protocol):
    """Locates single perturbations (by gene name) among measured ones; a query that is measured itself is left out of its own weights."""

    @property
    def label(self) -> str: ...

    def locate(self, queries: Sequence[str], known: Known) -> Located: ...


def _nowhere(queries: Sequence[str], known: Known) -> Located:
    return Located(np.zeros((len(queries), len(known.measured))), np.zeros(len(queries)), np.full(len(queries), "", dtype=object))


@dataclass(frozen=True)
class ClusterLocator:
    """The published rule. G: genes in the target gene's gene cluster, itself excluded; the perturbation cluster C with the
    largest |C ∩ G|² / |C| wins (of equal ones the one with the first name), its members weigh the same."""

    label: str = "cluster"

    def locate(self, queries: Sequence[str], known: Known) -> Located:
        out = _nowhere(queries, known)
        column = {name: number for number, name in enumerate(known.measured)}
        members: dict[str, list[str]] = {}
        for name in sorted(known.learned):
            members.setdefault(known.clusters.perturbations[name], []).append(name)
        genes = known.clusters.genes
        for row, query in enumerate(queries):
            if query not in genes:
                out.reasons[row] = f"gene {query} is not measured, so it is in no gene cluster"
                continue
            best, score = self._best([[m for m in c if m != query] for c in members.values()], query, genes)
            if score == 0:
                out.reasons[row] = f"no perturbed gene shares the gene cluster of {query}"
                continue
            out.weights[row, [column[name] for name in best]] = 1.0 / len(best)
            out.score[row] = score
        return out

    @staticmethod
    def _best(clusters: list[list[str]], query: str, genes: dict[str, str]) -> tuple[list[str], float]:
        best: list[str] = []
        score = 0.0
        for names in clusters:
            shared = sum(genes.get(name) == genes[query] for name in names)
            if names and shared**2 / len(names) > score:
                best, score = names, shared**2 / len(names)
        return best, score


@dataclass(frozen=True)
class KernelLocator:
    """Softmax of similarity / temperature over the nearest measured genes. Genes without positive similarity get no weight:
    they share nothing with the target. Score: the weighted mean similarity."""

    sources: tuple[str, ...]
    neighbours: int
    temperature: float

    @property
    def label(self) -> str:
        return f"kernel({' + '.join(self.sources)}; temperature {self.temperature:g})"

    def locate(self, queries: Sequence[str], known_: Known) -> Located:
        out = _nowhere(queries, known_)
        features = known_.of(self.sources)
        out.reasons[:] = _unknown_reasons(features, queries, self.sources)
        if not features or not known_.measured:
            return out
        column = pd.Index(known_.measured)
        for start in range(0, len(queries), QUERY_BLOCK):
            names = queries[start : start + QUERY_BLOCK]
            alike = similarity(features, names, known_.measured)
            own = column.get_indexer(pd.Index(names, dtype=object))
            alike[np.flatnonzero(own >= 0), own[own >= 0]] = np.nan
            rows = slice(start, start + len(names))
            out.weights[rows], out.score[rows] = self._softmax(alike)
            lost = (out.weights[rows].sum(axis=1) == 0) & (out.reasons[rows] == "")
            out.reasons[rows][lost] = "nothing known of the gene is shared with a measured perturbation"
        return out

    def _softmax(self, alike: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        alike = np.where(np.isnan(alike) | (alike <= 1e-6), -np.inf, alike).astype(np.float64)
        k = min(self.neighbours, alike.shape[1])
        last = np.partition(alike, -k, axis=1)[:, [-k]]
        # Of genes as similar as the last one kept the first are kept, on every machine.
        even = alike == last
        room = k - (alike > last).sum(axis=1, keepdims=True)
        alike[(alike < last) | (even & (even.cumsum(axis=1) > room))] = -np.inf
        top = alike.max(axis=1, keepdims=True)
        there = np.isfinite(top[:, 0])
        weights = np.zeros_like(alike)
        weights[there] = np.exp((alike[there] - top[there]) / self.temperature)
        weights[there] /= weights[there].sum(axis=1, keepdims=True)
        return weights, (weights * np.where(np.isfinite(alike), alike, 0.0)).sum(axis=1)


@dataclass(frozen=True)
class RidgeLocator:
    """Weights of the prediction by ridge regression of effects (or embeddings) on joined gene features, intercept unpenalised:
    w = 1/P + f (F'F + penalty I)^-1 F' with features centred on the measured genes; they sum to 1 and may be negative.

    A query that is measured gets the weights of the fit without it, w_kj = h_kj / (1 - h_kk), exactly.
    Score: how far the weights leave those of the training mean, sqrt(P sum (w - 1/P)²).
    """

    sources: tuple[str, ...]
    penalty: float

    @property
    def label(self) -> str:
        return f"ridge({' + '.join(self.sources)}; penalty {self.penalty:g})"

    def locate(self, queries: Sequence[str], known_: Known) -> Located:
        out = _nowhere(queries, known_)
        features = known_.of(self.sources)
        out.reasons[:] = _unknown_reasons(features, queries, self.sources)
        used = np.flatnonzero(known(features, known_.measured))
        if len(used) < 2:
            out.reasons[out.reasons == ""] = "fewer than two measured perturbations have features"
            return out
        names = [known_.measured[i] for i in used]
        left, right = design(features, queries, names)
        weights = 1.0 / len(used) + left @ np.linalg.solve(right.T @ right + self.penalty * np.eye(right.shape[1]), right.T)
        own = pd.Index(names).get_indexer(pd.Index(queries, dtype=object))
        rows = np.flatnonzero(own >= 0)
        leverage = weights[rows, own[rows]]
        weights[rows, own[rows]] = 0.0
        weights[rows] /= (1.0 - leverage)[:, None]
        there = out.reasons == ""
        out.weights[np.ix_(there, used)] = weights[there]
        out.score[there] = np.sqrt(len(used) * ((weights[there] - 1.0 / len(used)) ** 2).sum(axis=1))
        return out


def _unknown_reasons(features: Sequence[GeneFeatures], queries: Sequence[str], sources: Sequence[str]) -> list[str]:
    there, listed = known(features, queries), ", ".join(sources)
    annotated = {name for source in features for name in source.names}

    def reason(query: str) -> str:
        if query in annotated:
            return f"nothing in {listed} about gene {query} is shared with a measured one"
        return f"gene {query} is not in {listed}"

    return ["" if found else reason(query) for query, found in zip(queries, there, strict=True)]


def candidates(config: LocationConfig, sources: Sequence[str]) -> list[Locator]:
    """The locators that a config allows, from simple to complex: kernel before ridge before the cluster rule, one source before all."""
    sets = [(name,) for name in sources] + ([tuple(sources)] if len(sources) > 1 else [])
    out: list[Locator] = []
    if config.locator in ("auto", "stack", "kernel"):
        out += [KernelLocator(s, config.neighbours, t) for s, t in itertools.product(sets, sorted(config.temperatures, reverse=True))]
    if config.locator in ("auto", "stack", "ridge"):
        out += [RidgeLocator(s, p) for s, p in itertools.product(sets, sorted(config.ridge_penalties, reverse=True))]
    if config.locator in ("auto", "stack", "cluster"):
        out.append(ClusterLocator())
    return out


# --- choice and confidence ---------------------------------------------------------------------------------------------


SCORE_DIGITS = 9
"""Digits of a locator's score that count."""


@dataclass(frozen=True)
class Confidence:
    """Chance, by cross-fitting, that the located neighbour mean is closer to a perturbation's effects than the training mean,
    as a non-decreasing function of a locator's score: isotonic regression whose steps are shrunk by one success and one
    failure, so that few perturbations never give certainty."""

    scores: np.ndarray
    values: np.ndarray

    @classmethod
    def fit(cls, score: np.ndarray, better: np.ndarray) -> Confidence:
        """score, better: (R,) of cross-fitted queries that were located."""
        if not len(score):
            return cls(np.zeros(1), np.full(1, 0.5))
        # Scores that differ in their last bits alone are equal: isotonic regression would divide by their difference.
        score = np.round(score, SCORE_DIGITS)
        raw = IsotonicRegression(y_min=0, y_max=1).fit(score, better.astype(float)).predict(score)
        _, step = np.unique(raw, return_inverse=True)
        wins, size = np.bincount(step, weights=better), np.bincount(step)
        smooth = ((wins + 1) / (size + 2))[step]
        # Small steps are shrunk more than large ones, which can break the order: restore it.
        smooth = IsotonicRegression(y_min=0, y_max=1).fit(score, smooth).predict(score)
        at = np.unique(score, return_index=True)[1]
        return cls(score[at], smooth[at])

    def __call__(self, score: np.ndarray) -> np.ndarray:
        return np.interp(score, self.scores, self.values)


@dataclass(frozen=True)
class Ranked:
    """A locator with its cross-fitted error (relative to the training mean's), in all and by fold, and confidence."""

    locator: Locator
    error: float
    confidence: Confidence
    by_fold: tuple[float, ...] = ()


@dataclass(frozen=True)
class Fold:
    """One fold of the choice: queries, what is known without them, and their scaled effects.

    known: neither measured nor learned holds a query; truth: (R, G); measured: (P, G) in the order of known.measured.
    """

    queries: list[str]
    known: Known
    truth: np.ndarray
    measured: np.ndarray


def rank(locators: Sequence[Locator], folds: Sequence[Fold], mixture: Literal["no", "compare", "first"] = "no") -> list[Ranked]:
    """Locators by cross-fitted squared error of the located neighbour mean, best first; of equal ones the earlier (simpler) first.

    Where a locator cannot locate a query it is charged the training mean's error, so that all are judged on the same queries.
    mixture: leave out the locators' stack; let it and the training mean compete; or put the stack before all of them.
    In the competition all are judged alike: the best single locator, too, by the error of the one that the other folds choose.
    The smallest of many errors promises too much: with few perturbations it beat the stack and the training mean where both were better.
    """
    trial = _Trial.of(folds)
    out = [trial.judge(locator) for locator in locators]
    if not out:
        return []
    ranking = _sorted(out)
    if mixture == "no":
        return ranking
    mixed = trial.mix(ranking)
    if mixture == "first":
        return [mixed, *ranking]
    # The training mean comes first, as the simplest: where no source helps, it is the honest place.
    mean, best = trial.judge(StackLocator((), ())), replace(ranking[0], error=_error_of_choice(out))
    first = _sorted([mean, best, mixed])[0]
    return [first, *(one for one in _sorted([mean, *out, mixed]) if one.locator is not first.locator)]


def _sorted(ranked: Sequence[Ranked]) -> list[Ranked]:
    best = min(one.error for one in ranked)
    # Stable sort: among those within TIE of the best the given order decides.
    return sorted(ranked, key=lambda one: best if one.error <= best * (1 + TIE) else one.error)


def _error_of_choice(ranked: Sequence[Ranked]) -> float:
    """Relative error of choosing the locator: on each fold that of the one with the smallest error on the others."""
    errors = np.array([one.by_fold for one in ranked])
    others = errors.sum(axis=1, keepdims=True) - errors
    return float(errors[others.argmin(axis=0), np.arange(errors.shape[1])].sum())


@dataclass(frozen=True)
class _Trial:
    """Folds with what errors need: per fold the inner products of effects - measured x measured, queries x measured, squares of
    queries - in place of a (R, G) prediction for each locator, and the training mean's squared error."""

    folds: Sequence[Fold]
    products: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
    baseline: list[np.ndarray]

    @classmethod
    def of(cls, folds: Sequence[Fold]) -> _Trial:
        products = [(f.measured @ f.measured.T, f.truth @ f.measured.T, (f.truth**2).sum(axis=1)) for f in folds]
        return cls(folds, products, [((f.truth - f.measured.mean(axis=0)) ** 2).sum(axis=1) for f in folds])

    def judge(self, locator: Locator, by_fold: Sequence[Locator] | None = None) -> Ranked:
        """Error and confidence of a locator; by_fold: what stands for it in each fold, where it learned something from the others."""
        errors, scores, better = [], [np.zeros(0)], [np.zeros(0, dtype=bool)]
        used = by_fold or [locator] * len(self.folds)
        for fold, one, (inner, cross, square), base in zip(self.folds, used, self.products, self.baseline, strict=True):
            located = one.locate(fold.queries, fold.known)
            w = located.weights
            distance = np.maximum(square - 2 * (w * cross).sum(axis=1) + ((w @ inner) * w).sum(axis=1), 0.0)
            there = located.reasons == ""
            errors.append(float(np.where(there, distance, base).sum()))
            scores.append(located.score[there])
            better.append((distance < base * (1 - 1e-9))[there])
        total = sum(float(base.sum()) for base in self.baseline) or 1.0
        confidence = Confidence.fit(np.concatenate(scores), np.concatenate(better))
        return Ranked(locator, sum(errors) / total, confidence, tuple(error / total for error in errors))

    def mix(self, ranking: Sequence[Ranked]) -> Ranked:
        """The stack of all locators, judged in each fold with the members and shares that the other folds give."""
        errors = np.array([one.by_fold for one in ranking])
        rest = errors.sum(axis=1, keepdims=True) - errors
        whole, *others = (_one_of_each(ranking, order) for order in (range(len(ranking)), *np.argsort(rest, axis=0, kind="stable").T))
        # Locating is what costs: the members of all stacks are located once in each fold.
        used = sorted({*whole, *itertools.chain(*others)})
        systems = [_normal_equations([ranking[number] for number in used], fold) for fold in self.folds]

        def fit(members: Sequence[int], folds: Sequence[tuple[np.ndarray, np.ndarray]]) -> StackLocator:
            at, size = np.searchsorted(used, members), len(members)
            quadratic = sum((both[np.ix_(at, at)] for both, _ in folds), np.zeros((size, size)))
            return stack([ranking[number] for number in members], quadratic, sum((each[at] for _, each in folds), np.zeros(size)))

        without = [fit(members, [*systems[:out], *systems[out + 1 :]]) for out, members in enumerate(others)]
        return self.judge(fit(whole, systems), without)


def _uniform(queries: Sequence[str], measured: Sequence[str]) -> np.ndarray:
    """(R, P) weights of the training mean; a query that is measured is left out of its own."""
    weights = np.ones((len(queries), len(measured)))
    own = pd.Index(measured).get_indexer(pd.Index(queries, dtype=object))
    weights[np.flatnonzero(own >= 0), own[own >= 0]] = 0.0
    return weights / np.maximum(weights.sum(axis=1, keepdims=True), 1.0)


@dataclass(frozen=True)
class StackLocator:
    """Mixture of locators and of the training mean, which has the share the members leave and stands in for a member that cannot
    locate a query. A gene that some source knows but no member locates, perhaps because what is known of it is shared
    with no measured gene, stands at the training mean, with the least score.
    Score: the members' confidences, weighted by their shares."""

    members: tuple[Ranked, ...]
    shares: tuple[float, ...]

    @property
    def label(self) -> str:
        if not self.members:
            return "training mean"
        parts = [f"{share:.2f} {member.locator.label}" for member, share in zip(self.members, self.shares, strict=True)]
        return f"stack({' + '.join([*parts, f'{1 - sum(self.shares):.2f} training mean'])})"

    def locate(self, queries: Sequence[str], known_: Known) -> Located:
        uniform = _uniform(queries, known_.measured)
        weights, score = (1 - sum(self.shares)) * uniform, np.zeros(len(queries))
        features = list(known_.features.values())
        annotated = {name for source in features for name in source.names}
        reasons = np.array(_unknown_reasons(features, queries, list(known_.features)), dtype=object)
        reasons[[query in annotated for query in queries]] = ""
        for member, share in zip(self.members, self.shares, strict=True):
            located = member.locator.locate(queries, known_)
            there = located.reasons == ""
            weights += share * np.where(there[:, None], located.weights, uniform)
            score += share * np.where(there, member.confidence(located.score), 0.0)
            reasons[there] = ""
        weights[reasons != ""] = 0.0
        return Located(weights, score, reasons)


def _one_of_each(ranking: Sequence[Ranked], order: Iterable[int]) -> list[int]:
    """Positions of the first setting, in an order, of each locator on each set of sources: other settings are too alike to be mixed."""
    first: dict[tuple[type, tuple[str, ...]], int] = {}
    for number in order:
        locator = ranking[number].locator
        first.setdefault((type(locator), getattr(locator, "sources", ())), int(number))
    return list(first.values())


def _normal_equations(ranking: Sequence[Ranked], fold: Fold) -> tuple[np.ndarray, np.ndarray]:
    """Inner products of the locators' predictions less the training mean, with each other (M, M) and with the truth's (M,)."""
    uniform = _uniform(fold.queries, fold.known.measured)
    located = [ranked.locator.locate(fold.queries, fold.known) for ranked in ranking]
    away = np.array([np.where((found.reasons == "")[:, None], found.weights - uniform, 0.0) for found in located])
    effects = (away @ fold.measured).reshape(len(ranking), -1)
    return effects @ effects.T, effects @ (fold.truth - uniform @ fold.measured).ravel()


def stack(ranking: Sequence[Ranked], quadratic: np.ndarray, linear: np.ndarray) -> StackLocator:
    """The mixture whose shares a >= 0, sum at most 1, minimise the cross-fitted squared error of the mixed neighbour means
    sum_k |y_k - ȳ - sum_m a_m (ŷ_mk - ȳ)|², ȳ the training mean (Breiman 1996, Stacked regressions).

    quadratic (M, M), linear (M,): sums of `_normal_equations` over folds.
    """
    shares = _simplex(quadratic, linear)
    keep = [m for m in range(len(shares)) if shares[m] >= MIN_SHARE]
    return StackLocator(tuple(ranking[m] for m in keep), tuple(float(shares[m]) for m in keep))


def _simplex(quadratic: np.ndarray, linear: np.ndarray) -> np.ndarray:
    """a >= 0 with sum at most 1 that minimises a'Qa - 2 b'a: non-negative least squares with one heavily weighted row for the
    sum and a slack for what is left of it."""
    values, vectors = np.linalg.eigh(quadratic)
    if values[-1] <= 0:
        return np.zeros(len(linear))
    used = values > 1e-10 * values[-1]
    root = np.sqrt(values[used])
    heavy = 1e3 * root[-1]
    rows = np.vstack([np.column_stack([root[:, None] * vectors[:, used].T, np.zeros(used.sum())]), np.full(len(linear) + 1, heavy)])
    return nnls(rows, np.append((vectors[:, used].T @ linear) / root, heavy))[0][:-1]


@dataclass(frozen=True)
class Placed:
    """Places of single queries: weights (R, P), confidence (R,), reasons and labels of the locators (R,)."""

    weights: np.ndarray
    confidence: np.ndarray
    reasons: np.ndarray
    labels: np.ndarray


def place(queries: Sequence[str], known_: Known, ranking: Sequence[Ranked]) -> Placed:
    """Locate each query by the best locator that can; a query that none can locate keeps the reason of the one with most sources."""
    weights = np.zeros((len(queries), len(known_.measured)))
    confidence = np.zeros(len(queries))
    reasons = np.full(len(queries), "there is no source of gene features", dtype=object)
    labels = np.full(len(queries), "", dtype=object)
    left, most = np.arange(len(queries)), -1
    for ranked in ranking:
        if not len(left):
            break
        located = ranked.locator.locate([queries[i] for i in left], known_)
        sources = len(getattr(ranked.locator, "sources", ()))
        if sources > most:
            reasons[left], most = located.reasons, sources
        there = located.reasons == ""
        rows = left[there]
        weights[rows], confidence[rows] = located.weights[there], ranked.confidence(located.score[there])
        labels[rows], reasons[rows] = ranked.locator.label, ""
        left = left[~there]
    return Placed(weights, confidence, reasons, labels)
