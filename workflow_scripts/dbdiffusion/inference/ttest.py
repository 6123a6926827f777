"""The t test of a predicted effect, Benjamini-Hochberg, and the labels a measured perturbation gives."""

from __future__ import annotations

import numpy as np
from scipy import stats

DF_GRID = 1 / np.linspace(1, 1e-4, 10_000)
"""Degrees of freedom between which quantiles are interpolated, even in 1 / df: they are smooth in it."""


def p_values(effect: np.ndarray, se: np.ndarray, df: np.ndarray | float) -> np.ndarray:
    """Two-sided p of effect / se against t with df. Where the error is 0, p is 1 for no effect and 0 otherwise."""
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(se > 0, np.abs(effect) / se, np.where(effect == 0, 0.0, np.inf))
    return np.clip(2 * stats.t.sf(z, df), 0.0, 1.0)


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """Benjamini-Hochberg adjusted p along the last axis (rows: one family each). p without NaN."""
    n = p.shape[-1]
    order = np.argsort(p, axis=-1, kind="stable")
    ranked = np.take_along_axis(p, order, -1) * n / np.arange(1, n + 1)
    ranked = np.minimum(np.minimum.accumulate(ranked[..., ::-1], -1)[..., ::-1], 1.0)
    out = np.empty_like(ranked)
    np.put_along_axis(out, order, ranked, -1)
    return out


def de_labels(effect: np.ndarray, se: np.ndarray, n_cells: np.ndarray, fdr: float) -> np.ndarray:
    """What an experiment itself would call: t test of the observed effect (R, G), BH per perturbation at `fdr`.

    n_cells: (R,) cells of the perturbation; the test has n_cells - 1 degrees of freedom (at least 1).
    """
    df = np.maximum(np.asarray(n_cells, dtype=float) - 1, 1.0)[:, None]
    # A gene without any variation was not tested: it cannot be called.
    p = np.where(se > 0, p_values(effect, se, df), 1.0)
    return benjamini_hochberg(p) <= fdr


def quantile(level: float, df: np.ndarray | float) -> np.ndarray:
    """Two-sided t quantile of a central interval; many are interpolated, for ppf takes a microsecond each."""
    df = np.asarray(df, dtype=float)
    if df.size <= DF_GRID.size:
        return stats.t.ppf(0.5 + level / 2, df)
    return np.interp(-1 / df, -1 / DF_GRID, quantile(level, DF_GRID))


def df_of_quantile(level: float, cut: np.ndarray) -> np.ndarray:
    """Degrees of freedom (between the ends of DF_GRID) whose two-sided quantile at `level` is cut: the inverse of `quantile`."""
    known = quantile(level, DF_GRID)
    return -1 / np.interp(cut, known[::-1], -1 / DF_GRID[::-1])
