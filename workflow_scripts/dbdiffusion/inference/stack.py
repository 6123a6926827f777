"""Weights of predictors as control variates: non-negative, sum at most 1, tuned on pseudo-targets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SHRINKAGE = (np.inf, 10.0, 3.0, 1.0, 0.3)
"""Weights of the common vector against a gene's own data, in units of the gene's data; inf: the common vector alone."""
SAMPLED_GENES = 400
"""Genes on which the shrinkage is chosen."""


@dataclass(frozen=True)
class Weights:
    """all: (G, V) tuned on every pseudo-target; left_out: (H, G, V) without fold h; shrinkage: what was chosen."""

    all: np.ndarray
    left_out: np.ndarray
    shrinkage: float

    def of(self, folds: np.ndarray | None, row: int | None = None) -> np.ndarray:
        """Weights (G, V) for a target (no fold), or for the pseudo-target in `row`."""
        return self.all if folds is None else self.left_out[folds[row]]


def project(x: np.ndarray) -> np.ndarray:
    """Nearest points of {x >= 0, sum x <= 1} to the rows of x (Duchi et al. 2008 where the sum binds)."""
    clipped = np.maximum(x, 0.0)
    over = clipped.sum(-1) > 1.0
    if not over.any():
        return clipped
    part = x[over]
    ordered = -np.sort(-part, axis=-1)
    excess = np.cumsum(ordered, -1) - 1.0
    count = np.arange(1, x.shape[-1] + 1)
    last = (ordered - excess / count > 0).sum(-1)
    shift = np.take_along_axis(excess, last[:, None] - 1, -1) / last[:, None]
    clipped[over] = np.maximum(part - shift, 0.0)
    return clipped


def solve(gram: np.ndarray, cross: np.ndarray, start: np.ndarray | None = None, steps: int = 300) -> np.ndarray:
    """argmin x'Ax / 2 - b'x over {x >= 0, sum x <= 1}, for a batch: gram (B, V, V), cross (B, V).

    One variate has the closed form; several take accelerated projected gradient steps (FISTA). Variates are
    given as they are: directions in which A is flat do not change the objective, and stay near `start`.
    """
    if gram.shape[-1] == 1:
        return np.clip(cross / np.maximum(gram[..., 0], 1e-300), 0.0, 1.0)
    bound = np.abs(gram).sum(-1).max(-1)[:, None]
    step = 1.0 / np.maximum(bound, 1e-300)
    x = np.zeros_like(cross) if start is None else np.broadcast_to(start, cross.shape).copy()
    y, t = x, 1.0
    for _ in range(steps):
        new = project(y - step * (np.einsum("bij,bj->bi", gram, y) - cross))
        t_new = (1 + np.sqrt(1 + 4 * t * t)) / 2
        y, x, t = new + (t - 1) / t_new * (new - x), new, t_new
    return x


def _sums(u: np.ndarray, z: np.ndarray, folds: np.ndarray, n_folds: int) -> tuple[np.ndarray, np.ndarray]:
    """Gram (H, G, V, V) and cross products (H, G, V) of the variates z (V, K, G) with u (K, G), by fold."""
    n_variates, _, n_genes = z.shape
    gram = np.zeros((n_folds, n_genes, n_variates, n_variates))
    cross = np.zeros((n_folds, n_genes, n_variates))
    for h in range(n_folds):
        rows = folds == h
        for a in range(n_variates):
            za = z[a, rows]
            cross[h, :, a] = np.einsum("kg,kg->g", za, u[rows])
            for b in range(a + 1):
                gram[h, :, a, b] = gram[h, :, b, a] = np.einsum("kg,kg->g", za, z[b, rows])
    return gram, cross


def _per_gene(gram: np.ndarray, cross: np.ndarray, common: np.ndarray, metric: np.ndarray, kappa: float) -> np.ndarray:
    """Weights (G, V) of each gene, drawn to the common vector with the metric of the pooled Gram matrix."""
    if not np.isfinite(kappa):
        return np.broadcast_to(common, cross.shape)
    return solve(gram + kappa * metric, cross + kappa * (metric @ common), start=common, steps=80)


def _precision(square: np.ndarray) -> np.ndarray:
    """One over the mean square of each gene, bounded for genes that hardly vary, 0 for those that do not."""
    positive = square[square > 0]
    floor = 0.01 * float(np.median(positive)) if len(positive) else 1.0
    return np.where(square > 0, 1.0 / np.maximum(square, floor), 0.0)


def tune(u: np.ndarray, z: np.ndarray, folds: np.ndarray) -> Weights:
    """Weights of variates z (V, K, G) that predict u (K, G) best, for targets and left out by fold for pseudo-targets.

    u: observed effect less the neighbour mean, of K pseudo-targets; z: what each variate would add; folds: (K,) in
    0..H-1. Each gene's errors count relative to its own mean square. Per gene, the weights are shrunk to a common
    vector (normal prior with the pooled Gram matrix as precision); how much is chosen by cross-validated error over
    the folds. A pseudo-target's own error never enters the weights it is predicted with.
    """
    n_folds, n_variates, n_genes = int(folds.max()) + 1, z.shape[0], u.shape[1]
    gram, cross = _sums(u, z, folds, n_folds)
    square = np.array([(u[folds == h] ** 2).sum(0) for h in range(n_folds)])
    scale = _precision(square.sum(0))
    left_scale = np.array([_precision(square.sum(0) - part) for part in square])
    total_gram, total_cross = gram.sum(0) * scale[:, None, None], cross.sum(0) * scale[:, None]
    left_gram = (gram.sum(0) - gram) * left_scale[..., None, None]
    left_cross = (cross.sum(0) - cross) * left_scale[..., None]
    common = solve(left_gram.sum(1), left_cross.sum(1))
    common_all = solve(total_gram.sum(0)[None], total_cross.sum(0)[None])[0]
    metric = left_gram.mean(1)

    used = np.flatnonzero(scale > 0)
    sample = used[:: max(1, len(used) // SAMPLED_GENES)]
    errors = []
    for kappa in SHRINKAGE:
        loss = 0.0
        for h in range(n_folds):
            w = _per_gene(left_gram[h, sample], left_cross[h, sample], common[h], metric[h], kappa)
            found = np.einsum("gi,gij,gj->g", w, gram[h, sample], w) - 2 * np.einsum("gi,gi->g", w, cross[h, sample])
            loss += float(found @ scale[sample])
        errors.append(loss)
    kappa = float(SHRINKAGE[int(np.argmin(errors))])
    left = np.empty((n_folds, n_genes, n_variates))
    for h in range(n_folds):
        left[h] = _per_gene(left_gram[h], left_cross[h], common[h], metric[h], kappa)
    everything = np.array(_per_gene(total_gram, total_cross, common_all, total_gram.mean(0), kappa))
    return Weights(everything, left, kappa)


def fixed(value: float, n_genes: int, n_folds: int) -> Weights:
    """The same weight for every gene of one variate: 1 is the published estimator, 0 the neighbour mean."""
    return Weights(np.full((n_genes, 1), value), np.full((n_folds, n_genes, 1), value), np.inf)
