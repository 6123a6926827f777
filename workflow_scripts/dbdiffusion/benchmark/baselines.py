"""Simple predictors that every run is compared with.

A baseline is a pure function of the training effects and of what is known about the queries; it returns effects
(Q queries x G genes) in ln(1 + CP10k). Targets are predicted from all training perturbations of the fold, and each training
perturbation out of fold ("pseudo"), from the perturbations that its cross-fit model may see, so that baselines pass through the
same debiasing as the generator. What gene features learn from cells they learn in the same way: without the targets' cells, and for a
pseudo-target without the cells of its cross-fit fold.

Where a baseline cannot say anything about a query (it is not locatable, or its gene has no features), it predicts the training mean.
Feature models learn from single perturbations and predict a combination as the sum of its parts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from dbdiffusion.config.splits import ALL
from dbdiffusion.data.sets import CONTROL, EffectSet, LocationSet, MeanSet
from dbdiffusion.data.splits import Splits, parts
from dbdiffusion.perturbations.features import of_fit
from dbdiffusion.runtime import contracts
from dbdiffusion.runtime.errors import UserError, nearest
from dbdiffusion.runtime.seeds import rng

logger = logging.getLogger(__name__)

NEIGHBOURS = 10
"""knn: training perturbations that are averaged."""
COMPONENTS = 10
"""linear: principal components of the training effects."""
MIN_FIT = 3
"""Feature models fitted on fewer single perturbations than this fall back to the training mean."""
PENALTIES = np.logspace(-4, 3, 29)
"""Ridge penalties tried, as multiples of the largest squared singular value of the features."""


@dataclass(frozen=True)
class Known:
    """What a baseline may use.

    train: effects of the perturbations it is fitted on; all: effects of every training perturbation of the fold (the neighbours of
    `locations`); locations: fit `all`, in which no query has weight on itself; features: genes x dimensions, of the fit that the queries
    belong to; seed: of the permutation.
    """

    train: EffectSet
    all: EffectSet
    locations: LocationSet
    features: pd.DataFrame
    seed: int

    @property
    def mean_effect(self) -> np.ndarray:
        """(G,) mean effect over the training perturbations; no change where there are none."""
        return self.train.effect.mean(axis=0) if len(self.train.perturbations) else np.zeros(len(self.train.genes))


Predictor = Callable[[list[str], Known], np.ndarray]


def join_features(frame: pd.DataFrame, fit: str) -> pd.DataFrame:
    """One row per gene from contract GENE_FEATURES: sources side by side, scaled to the same mean squared norm per gene.

    fit: `all`, or a cross-fit model (`features.of_fit`). A coordinate that is absent is 0, so that a gene which one source does not know
    is compared by the others.
    """
    joined = []
    for source, features in of_fit(frame, fit).items():
        norm = np.sqrt((features.values**2).sum(axis=1).mean())
        columns = [f"{source}:{dimension}" for dimension in range(features.values.shape[1])]
        joined.append(pd.DataFrame(features.values / (norm if norm > 0 else 1.0), index=features.genes, columns=columns))
    return pd.concat(joined, axis=1).sort_index().fillna(0.0) if joined else pd.DataFrame(dtype=float)


def control(queries: list[str], known: Known) -> np.ndarray:
    """No change."""
    return np.zeros((len(queries), len(known.train.genes)))


def training_mean(queries: list[str], known: Known) -> np.ndarray:
    """The mean effect over training perturbations, for every query."""
    return np.tile(known.mean_effect, (len(queries), 1))


def _weights(queries: Sequence[str], known: Known) -> np.ndarray:
    """(Q, P) location weights over training perturbations (the control's column has effect 0 and drops out); 0 if not located."""
    at = known.locations.queries.get_indexer(queries)
    return np.where((at >= 0)[:, None], known.locations.weights[at, : len(known.all.perturbations)], 0.0)


def _mix(weights: np.ndarray, known: Known) -> np.ndarray:
    """Weighted sums of training effects; the training mean for rows without weight."""
    lost = ~weights.any(axis=1)
    return np.where(lost[:, None], known.mean_effect, weights @ known.all.effect)


def _containing(queries: Sequence[str], known: Known) -> np.ndarray:
    """(Q, P) training perturbations that are the query or a combination with all of it."""
    genes = [set(parts(name)) for name in known.all.perturbations]
    return np.array([[own.issuperset(parts(query)) for own in genes] for query in queries], dtype=bool).reshape(-1, len(genes))


def _without(weights: np.ndarray, barred: np.ndarray) -> np.ndarray:
    """Weights (Q, P) with those barred (Q, P) set to 0 and the row's sum kept; 0 throughout where nothing is left to carry it."""
    rows = np.flatnonzero(((weights != 0) & barred).any(axis=1))
    total = weights.sum(axis=1)
    out = np.where(barred, 0.0, weights)
    left = out.sum(axis=1)
    carried = np.abs(left) > 1e-9
    out[rows] *= np.where(carried, total / np.where(carried, left, 1.0), 0.0)[rows, None]
    return out


def neighbour_mean(queries: list[str], known: Known) -> np.ndarray:
    """sum_k w_qk effect_k with the location weights that debiasing uses: the estimator at lambda = 0."""
    return _mix(_weights(queries, known), known)


def permuted(queries: list[str], known: Known) -> np.ndarray:
    """Neighbour mean with the identities of the training perturbations shuffled: what location knows is lost, a negative control.

    Weight that the shuffle puts on the query itself, or on a combination with it, goes to its other neighbours, or its own effect
    would predict it.
    """
    names = known.all.perturbations
    order = rng(known.seed, "benchmark", "permuted").permutation(len(names))
    weights = np.zeros((len(queries), len(names)))
    weights[:, order] = _weights(queries, known)
    return _mix(_without(weights, _containing(queries, known)), known)


def additive(queries: list[str], known: Known) -> np.ndarray:
    """Combinations: plain sum of the parts' effects, of measured singles, and the mean over singles for a part that is not one.

    It knows no location: what a part's place, or a learned correction of sums, adds is the difference of `neighbour_mean` to it.
    Where all parts are measured and the location is the plain sum the two are the same. It has nothing to say about singles, and about
    combinations without a measured part: there it predicts the training mean.
    """
    out = training_mean(queries, known)
    effect = {name: row for name, row in zip(known.train.perturbations, known.train.effect, strict=True) if len(parts(name)) == 1}
    typical = np.mean(list(effect.values()), axis=0) if effect else known.mean_effect
    for row, query in enumerate(queries):
        genes = parts(query)
        if len(genes) > 1 and not effect.keys().isdisjoint(genes):
            out[row] = np.sum([effect.get(gene, typical) for gene in genes], axis=0)
    return out


def _singles(known: Known, space: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (n, d) and effects (n, G) of the single training perturbations that have a row in `space`."""
    at = space.index.get_indexer(known.train.perturbations)
    return space.to_numpy(dtype=float)[at[at >= 0]], known.train.effect[at >= 0]


def _by_parts(queries: list[str], known: Known, space: pd.DataFrame, predict: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Sum of `predict(coordinates of each part)`; the training mean where a part has no row in `space`."""
    genes = sorted({gene for query in queries for gene in parts(query)} & set(space.index))
    effect = pd.DataFrame(predict(space.loc[genes].to_numpy(dtype=float)), index=genes) if genes else pd.DataFrame()
    out = training_mean(queries, known)
    for row, query in enumerate(queries):
        if set(parts(query)).issubset(genes):
            out[row] = effect.loc[parts(query)].to_numpy().sum(axis=0)
    return out


def knn(queries: list[str], known: Known) -> np.ndarray:
    """Mean effect of the NEIGHBOURS training perturbations whose genes have the most similar features (cosine; ties by order)."""
    x, y = _singles(known, known.features)
    if len(x) < MIN_FIT:
        return training_mean(queries, known)

    def unit(rows: np.ndarray) -> np.ndarray:
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        return rows / np.where(length > 0, length, 1.0)

    def predict(points: np.ndarray) -> np.ndarray:
        near = np.argsort(-(unit(points) @ unit(x).T), axis=1, kind="stable")[:, :NEIGHBOURS]
        return y[near].mean(axis=1)

    return _by_parts(queries, known, known.features, predict)


def fit_ridge(x: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Ridge regression of y (n, m) on x (n, d) with intercept, one penalty for all outputs by generalised cross-validation.

    GCV(a) = n |y - H_a y|^2 / (n - tr H_a)^2 (Golub, Heath and Wahba 1979), H_a including the intercept. Returns the prediction function.
    """
    x_mean, y_mean = x.mean(axis=0), y.mean(axis=0)
    u, s, vt = np.linalg.svd(x - x_mean, full_matrices=False)
    if not len(s) or s[0] <= 1e-12:
        return lambda points: np.tile(y_mean, (len(points), 1))
    projected = u.T @ (y - y_mean)
    power = (projected**2).sum(axis=1)
    rest = max(((y - y_mean) ** 2).sum() - power.sum(), 0.0)
    penalties = PENALTIES * s[0] ** 2
    kept = s**2 / (s**2 + penalties[:, None])
    gcv = (rest + ((1 - kept) ** 2 * power).sum(axis=1)) / (len(x) - 1 - kept.sum(axis=1)) ** 2
    best = penalties[np.argmin(gcv)]
    coefficients = vt.T @ ((s / (s**2 + best))[:, None] * projected)
    return lambda points: y_mean + (points - x_mean) @ coefficients


def ridge(queries: list[str], known: Known) -> np.ndarray:
    """Ridge regression of effects on gene features, penalty by generalised cross-validation."""
    x, y = _singles(known, known.features)
    if len(x) < MIN_FIT:
        return training_mean(queries, known)
    return _by_parts(queries, known, known.features, fit_ridge(x, y))


def linear(queries: list[str], known: Known) -> np.ndarray:
    """Y = G W P' + b (Ahlmann-Eltze, Huber and Anders 2025), G the top principal axes of the training effects, b the mean effect.

    P are the perturbed genes' own rows of G, or the top principal components of the gene features, whichever covers more of the
    single training perturbations and query genes. G is orthonormal, so W is the ridge regression (penalty by generalised
    cross-validation) of the scores on P.
    """
    singles = np.array([len(parts(name)) == 1 for name in known.train.perturbations], dtype=bool)
    if singles.sum() < MIN_FIT:
        return training_mean(queries, known)
    y = known.train.effect[singles]
    axes = np.linalg.svd(y - y.mean(axis=0), full_matrices=False)[2][: min(COMPONENTS, len(y) - 1)]
    space = _gene_space(queries, known, axes)
    x, effects = _singles(known, space)
    if len(x) < MIN_FIT:
        return training_mean(queries, known)
    centre = effects.mean(axis=0)
    scores = fit_ridge(x, (effects - centre) @ axes.T)
    return _by_parts(queries, known, space, lambda points: centre + scores(points) @ axes)


def _gene_space(queries: list[str], known: Known, axes: np.ndarray) -> pd.DataFrame:
    """Coordinates of perturbed genes for the linear model: their rows of `axes` transposed, or components of their features."""
    own = pd.DataFrame(axes.T, index=known.train.genes)
    wanted = pd.Index([*known.train.perturbations, *(gene for query in queries for gene in parts(query))])
    if known.features.empty or wanted.isin(own.index).sum() >= wanted.isin(known.features.index).sum():
        return own
    values = known.features.to_numpy(dtype=float)
    values = values - values.mean(axis=0)
    u, s, _ = np.linalg.svd(values, full_matrices=False)
    return pd.DataFrame((u * s)[:, : axes.shape[0]], index=known.features.index)


BASELINES: dict[str, Predictor] = {
    "control": control,
    "training_mean": training_mean,
    "neighbour_mean": neighbour_mean,
    "knn": knn,
    "ridge": ridge,
    "linear": linear,
    "additive": additive,
    "permuted": permuted,
}


def predict_fold(
    predictor: Predictor,
    *,
    effects: EffectSet,
    locations: LocationSet,
    splits: Splits,
    features: Mapping[str, pd.DataFrame],
    fold: str,
    seed: int,
) -> MeanSet:
    """One baseline's means for a fold: targets, pseudo-targets (none without cross-fitting) and the control's own mean.

    features: fit -> joined gene features, of `all` for the targets and of every cross-fit model for its pseudo-targets.
    """
    measured = set(effects.perturbations)
    groups = [("target", ALL, list(splits.targets(fold)), list(effects.perturbations))]
    for q in splits.crossfit_names(fold):
        fit = [name for name in splits.fit_perturbations(fold, q) if name in measured]
        groups.append(("pseudo", q, [name for name in splits.inner(fold, q) if name in measured], fit))
    names, roles, predicted = [], [], []
    for role, q, queries, fit in groups:
        if queries:
            known = Known(effects.subset(fit), effects, locations, features[q], seed)
            names += queries
            roles += [role] * len(queries)
            predicted.append(predictor(queries, known))
    effect = np.vstack([*predicted, np.zeros((1, len(effects.genes)))])
    mean = effects.control_mean + effect
    return MeanSet(pd.Index([*names, CONTROL]), np.array([*roles, "control"], dtype=object), effects.genes, mean, np.zeros_like(mean))


def write_baselines(
    *,
    effects: str | Path,
    locations: str | Path,
    splits: str | Path,
    gene_features: str | Path,
    fold: str,
    names: Sequence[str],
    seed: int,
    outputs: Mapping[str, str | Path],
) -> None:
    """Write contract `means` of each named baseline for one fold (mc_variance 0: these predictors are exact).

    Raises UserError for a name that is no baseline or has no output.
    """
    for name in names:
        if name not in BASELINES or name not in outputs:
            raise UserError(f"baseline {name!r} is unknown or has no output", where="benchmark.baselines", fix=nearest(name, BASELINES))
    measured = EffectSet.read(effects)
    located = LocationSet.read(locations, "all", measured.perturbations)
    structure = Splits.read(splits)
    table = contracts.GENE_FEATURES.read(gene_features)
    features = {fit: join_features(table, fit) for fit in dict.fromkeys([ALL, *structure.crossfit_names(fold)])}
    inputs = {"effects": measured, "locations": located, "splits": structure, "features": features, "fold": fold, "seed": seed}
    found = {name: predict_fold(BASELINES[name], **inputs) for name in names}
    for name, means in found.items():
        means.write(outputs[name])
    if {"additive", "neighbour_mean"} <= found.keys():
        doubles = [name for name in structure.targets(fold) if len(parts(name)) > 1]
        one, two = (found[name].mean[found[name].rows(doubles)] for name in ("additive", "neighbour_mean"))
        same = int(np.isclose(one, two, atol=1e-9).all(axis=1).sum())
        logger.info("additive is the neighbour mean for %d of %d target combinations: plain sums of measured parts", same, len(doubles))
