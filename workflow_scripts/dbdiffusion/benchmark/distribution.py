"""Are generated cells distributed like measured cells? Two-sample distances in a fixed PCA, and moments of genes.

All functions take samples as (cells x coordinates) arrays. Distances are U-statistics: their expectation is 0 for two samples of one
distribution whatever the numbers of cells, so a small sample is not penalised (and a value can fall below 0).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import cdist

from dbdiffusion.runtime.seeds import rng

MIN_CELLS = 10
"""Fewer cells in a sample have no score."""
MEDIAN_CELLS = 500
"""Cells for the median heuristic."""
FOLDS = 5
ABOVE = "correlation_agreement"
CORRELATED_GENES = 50
"""Genes whose correlations are compared: those of largest loading in the fixed PCA."""
MIN_STRUCTURE = 0.05
"""Share of the variance of correlations that must be more than sampling error, for correlations to be compared."""


@dataclass(frozen=True)
class Axes:
    """A fixed PCA: centre (G,) and axes (G, K), orthonormal; ln(1 + CP10k)."""

    centre: np.ndarray
    axes: np.ndarray

    def project(self, cells: np.ndarray) -> np.ndarray:
        """(n, K) scores of (n, G) expression."""
        return (cells - self.centre) @ self.axes


def fit_axes(cells: np.ndarray, components: int) -> Axes:
    """Principal axes of (n, G) expression; at most min(n - 1, G) components, signs fixed by the largest loading."""
    centre = cells.mean(axis=0)
    values, vectors = np.linalg.eigh((cells - centre).T @ (cells - centre))
    order = np.argsort(values)[::-1][: max(1, min(components, len(cells) - 1, cells.shape[1]))]
    vectors = vectors[:, order]
    largest = vectors[np.abs(vectors).argmax(axis=0), np.arange(vectors.shape[1])]
    return Axes(centre, vectors * np.sign(largest))


def _off_diagonal_mean(square: np.ndarray) -> float:
    n = len(square)
    return float((square.sum() - np.trace(square)) / (n * (n - 1)))


def energy_distance(x: np.ndarray, y: np.ndarray) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| with Euclidean norms (Szekely and Rizzo 2013), in units of the coordinates."""
    return float(2 * cdist(x, y).mean() - _off_diagonal_mean(cdist(x, x)) - _off_diagonal_mean(cdist(y, y)))


def median_bandwidth(cells: np.ndarray) -> float:
    """Median squared distance between different cells: the kernel width, taken from control and fixed for all comparisons."""
    squared = cdist(cells[:MEDIAN_CELLS], cells[:MEDIAN_CELLS], "sqeuclidean")
    return float(np.median(squared[~np.eye(len(squared), dtype=bool)]))


def mmd(x: np.ndarray, y: np.ndarray, *, bandwidth: float) -> float:
    """Squared maximum mean discrepancy (Gretton et al. 2012), kernel exp(-|a - b|^2 / bandwidth), unbiased."""

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.exp(-cdist(a, b, "sqeuclidean") / bandwidth)

    return float(_off_diagonal_mean(kernel(x, x)) + _off_diagonal_mean(kernel(y, y)) - 2 * kernel(x, y).mean())


def two_sample_auc(x: np.ndarray, y: np.ndarray, *, seed: int) -> float:
    """Cross-validated AUC of a classifier that tells x from y: 0.5 where it cannot, 1 where it always can.

    Logistic regression on standardised coordinates and their squares, so that means and spreads count; the AUC is the mean over folds.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    points = np.vstack([x, y])
    points = (points - points.mean(axis=0)) / np.maximum(points.std(axis=0), 1e-12)
    points = np.hstack([points, points**2])
    label = np.repeat([0, 1], [len(x), len(y)])
    order = rng(seed, "benchmark", "two_sample_auc").permutation(len(label))
    points, label = points[order], label[order]
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=200))
    scores = []
    for train, test in StratifiedKFold(FOLDS).split(points, label):
        scores.append(roc_auc_score(label[test], model.fit(points[train], label[train]).decision_function(points[test])))
    return float(np.mean(scores))


def concordance(a: np.ndarray, b: np.ndarray) -> float:
    """Lin's concordance correlation over genes, 2 cov(a, b) / (var a + var b + (mean a - mean b)^2): 1 only for equality.

    NaN where both are constant.
    """
    below = a.var() + b.var() + (a.mean() - b.mean()) ** 2
    return 2 * _covariance(a, b) / float(below) if below > 1e-18 else float("nan")


def gene_correlations(cells: np.ndarray, axes: Axes) -> np.ndarray:
    """Correlations of all pairs of the CORRELATED_GENES genes with the largest loadings; 0 with a gene that does not vary."""
    genes = np.argsort(-np.square(axes.axes).sum(axis=1), kind="stable")[:CORRELATED_GENES]
    centred = cells[:, genes] - cells[:, genes].mean(axis=0)
    norm = np.sqrt(np.square(centred).sum(axis=0))
    scaled = np.divide(centred, norm, out=np.zeros_like(centred), where=norm > 1e-12)
    return (scaled.T @ scaled)[np.triu_indices(len(genes), 1)]


def _correlation_parts(generated: np.ndarray, observed: np.ndarray, axes: Axes, seed: int) -> dict[str, float]:
    """Of the concordance of the correlations of genes: what stands above the line, below it, and the variances with sampling error.

    At 100 cells correlations have sampling errors as large as themselves. With these counted, cells that lack noise would score above real
    cells; so variances over pairs of genes are taken as covariances of the random halves of a sample, which are free of them.
    """
    order = rng(seed, "benchmark", "halves")
    samples = [sample[order.permutation(len(sample))] for sample in (generated, observed)]
    x, y = (gene_correlations(sample, axes) for sample in samples)
    (x1, x2), (y1, y2) = ([gene_correlations(sample[part::2], axes) for part in (0, 1)] for sample in samples)
    below = _covariance(x1, x2) + _covariance(y1, y2) + (x1.mean() - y1.mean()) * (x2.mean() - y2.mean())
    return {ABOVE: 2 * _covariance(x, y), "below": float(below), "noisy": float(x.var() + y.var())}


def pooled(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """Scores of `compare` of several perturbations, with the agreement of correlations as a share of the perturbations' mean, like the
    slope: the mean over perturbations is then a ratio of sums, 1 for samples of one distribution whatever the number of cells (a single
    value can exceed it). NaN where the halves share no structure."""
    kept = [row for row in rows if np.isfinite(row["below"])]
    below, noisy = (float(np.mean([row[name] for row in kept])) if kept else 0.0 for name in ("below", "noisy"))
    scale = below if below > MIN_STRUCTURE * noisy else np.nan
    return [{k: v / scale if k == ABOVE else v for k, v in row.items() if k not in ("below", "noisy")} for row in rows]


def _covariance(a: np.ndarray, b: np.ndarray) -> float:
    return float(((a - a.mean()) * (b - b.mean())).mean())


def effect_slope(predicted: np.ndarray, *, observed: np.ndarray, replicate: np.ndarray) -> np.ndarray:
    """(T,) whose mean is the slope of predicted on true effects (T, G).

    Regressed on observed effects, predictions are attenuated by the noise of the regressor. Regressed on half A (`replicate`) with half B
    (`observed`) as its instrument, the slope is sum <p_t, b_t> / sum <a_t, b_t>; value of t: <p_t, b_t> / mean_s <a_s, b_s>. That of half A
    is 1 by construction. The slope is free of the sampling error of measured effects where the prediction has not learned from half B: one
    that has (seen perturbations) repeats its noise, which lifts the slope, and would score above 1 by repeating the mean it was trained on.
    Rows with NaN are left out. NaN for fewer than two targets, or where the halves do not agree.
    """
    out, ok = np.full(len(predicted), np.nan), np.isfinite(predicted).all(axis=1)
    shared = (replicate[ok] * observed[ok]).sum(axis=1).mean() if ok.sum() > 1 else 0.0
    if shared > 1e-12:
        out[ok] = (predicted[ok] * observed[ok]).sum(axis=1) / shared
    return out


def compare(generated: np.ndarray, observed: np.ndarray, *, axes: Axes, bandwidth: float, seed: int) -> dict[str, float]:
    """All scores of one sample (n, G) against observed cells (m, G), for `pooled`; NaN with fewer than MIN_CELLS cells in either.

    mean_agreement, variance_agreement: concordance over genes of the means and of the standard deviations; zero_fraction_agreement: of the
    shares of cells with expression 0 (negative values of a Gaussian decoder count as 0: expression has no other meaning there);
    correlation_agreement, below, noisy: parts of that over pairs of genes of their correlations, which `pooled` makes one of.
    """
    names = (
        *("energy_distance", "mmd", "two_sample_auc"),
        *("mean_agreement", "variance_agreement", "zero_fraction_agreement", ABOVE, "below", "noisy"),
    )
    if min(len(generated), len(observed)) < MIN_CELLS:
        return dict.fromkeys(names, float("nan"))
    x, y = axes.project(generated), axes.project(observed)
    values = (
        energy_distance(x, y),
        mmd(x, y, bandwidth=bandwidth),
        two_sample_auc(x, y, seed=seed),
        concordance(generated.mean(axis=0), observed.mean(axis=0)),
        concordance(generated.std(axis=0), observed.std(axis=0)),
        concordance((generated <= 0).mean(axis=0), (observed <= 0).mean(axis=0)),
    )
    return {**dict(zip(names, values, strict=False)), **_correlation_parts(generated, observed, axes, seed)}
