"""Empirical-Bayes moderation of variances (Smyth 2004), as in limma."""

from __future__ import annotations

import numpy as np
from scipy.special import digamma, polygamma

MAX_DF = 1e4
"""Prior degrees of freedom are cut here: beyond it a t distribution is a normal one."""


def trigamma_inverse(x: np.ndarray | float) -> np.ndarray:
    """y with trigamma(y) = x, for x > 0, by Newton's method on 1 / trigamma (Smyth 2004, appendix)."""
    x = np.asarray(x, dtype=float)
    y = 0.5 + 1.0 / np.maximum(x, 1e-12)
    for _ in range(50):
        tri = polygamma(1, y)
        step = tri * (1.0 - tri / x) / polygamma(2, y)
        y = y + step
        if np.all(np.abs(step) < 1e-8 * y):
            break
    # Asymptotes: trigamma(y) ~ 1/y for large y and 1/y^2 for small y.
    return np.where(x > 1e7, 1.0 / np.sqrt(x), np.where(x < 1e-6, 1.0 / np.maximum(x, 1e-300), y))


def fit_f(variances: np.ndarray, df: np.ndarray | float) -> tuple[float, float]:
    """Scale s0^2 and degrees of freedom d0 of a scaled F distribution, from sample variances with `df` degrees of freedom.

    Moment estimators on log variances (Smyth 2004, section 6.2): with e = log s^2 - digamma(d/2) + log(d/2),
    trigamma(d0/2) = var(e) - mean(trigamma(d/2)), log s0^2 = mean(e) + digamma(d0/2) - log(d0/2).
    Values that are not positive are left out. d0 is at most MAX_DF; (0, MAX_DF) where nothing is left.
    """
    variances, df = np.broadcast_arrays(np.asarray(variances, dtype=float), np.asarray(df, dtype=float))
    good = np.isfinite(variances) & (variances > 0) & (df > 0.1)
    if not good.any():
        return 0.0, MAX_DF
    s2, d = variances[good], df[good]
    s2 = np.maximum(s2, 1e-5 * np.median(s2))
    e = np.log(s2) - digamma(d / 2) + np.log(d / 2)
    centre = e.mean()
    if len(e) < 3:
        return float(np.exp(centre)), MAX_DF
    excess = e.var(ddof=1) - polygamma(1, d / 2).mean()
    if excess <= 0:
        return float(np.exp(centre)), MAX_DF
    d0 = float(min(2 * trigamma_inverse(excess), MAX_DF))
    return float(np.exp(centre + digamma(d0 / 2) - np.log(d0 / 2))), d0


def squeeze(variances: np.ndarray, df: np.ndarray | float, prior: np.ndarray | float, d0: float) -> np.ndarray:
    """Posterior variances (d0 s0^2 + d s^2) / (d0 + d)."""
    return (d0 * prior + df * variances) / (d0 + df)


def moderate(variances: np.ndarray, df: float) -> tuple[np.ndarray, float]:
    """Variances (G,) of one quantity per gene, squeezed to their common prior; and d0."""
    prior, d0 = fit_f(variances, df)
    return (squeeze(variances, df, prior, d0) if prior > 0 else np.array(variances, dtype=float)), d0


def cell_variance(variance: np.ndarray, n_cells: np.ndarray, prior_df: float = 10.0) -> np.ndarray:
    """Within-group variances (P, G), squeezed to the gene's pooled variance with the weight of `prior_df` cells.

    A perturbation with two cells, or with no count of a gene, then has a usable sampling variance.
    """
    df = np.maximum(np.asarray(n_cells, dtype=float) - 1, 0)[:, None]
    known = np.where((df > 0) & np.isfinite(variance), variance, 0.0)
    pooled = (df * known).sum(0) / max(df.sum(), 1.0)
    return (prior_df * pooled + df * known) / (prior_df + df)
