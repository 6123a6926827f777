"""How confident a location must be: the threshold above which intervals from located neighbours cover what they promise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy import stats

from dbdiffusion.data.sets import LocationSet

MIN_QUERIES = 5  # located pseudo-targets below which a share of them says nothing


def coverage(weights: np.ndarray, values: np.ndarray, truth: np.ndarray, level: float) -> np.ndarray:
    """(R,) share of genes whose observed effect lies in the interval that the located neighbours alone give.

    weights (R, P), rows sum to 1; values (P, G) effects of the neighbours; truth (R, G) of the queries. The interval is
    sum_k w_k x_k ± t sqrt(s² (1 + sum_k w²_k)): s² the neighbours' weighted variance (weights |w|, unbiased), t the quantile with
    K_eff - 1 degrees of freedom, at least 1. It covers at its level where the query is one of its neighbours' kind. NaN without weights.
    """
    size = np.abs(weights)
    total = size.sum(axis=1, keepdims=True)
    there = total[:, 0] > 0
    local = np.divide(size, total, out=np.zeros_like(size), where=total > 0)
    square = (local**2).sum(axis=1)
    k_eff = 1 / np.where(there, square, 1.0)
    mean = local @ values
    spread = np.maximum(local @ values**2 - mean**2, 0.0) / np.maximum(1 - square, 1e-12)[:, None]
    t = stats.t.ppf(0.5 + level / 2, np.maximum(k_eff - 1, 1.0))
    half = (t * np.sqrt(1 + (weights**2).sum(axis=1)))[:, None] * np.sqrt(spread)
    share = (np.abs(truth - weights @ values) <= half).mean(axis=1)
    return np.where(there, share, np.nan)


def threshold(confidence: Sequence[float], covered: Sequence[float], level: float) -> float:
    """The smallest confidence at and above which the mean coverage is nominal: not below `level` by more than its standard error.

    confidence, covered: (R,) of located pseudo-targets. 0 where all of them are covered as promised, so that nobody is turned away;
    infinite where no group of MIN_QUERIES or more is.
    """
    confidence, covered = np.asarray(confidence, dtype=float), np.asarray(covered, dtype=float)
    for candidate in (0.0, *np.unique(confidence)):
        above = covered[confidence >= candidate]
        if len(above) < MIN_QUERIES:
            return np.inf
        if above.mean() + above.std(ddof=1) / np.sqrt(len(above)) >= level:
            return float(candidate)
    return np.inf


def abstain(located: LocationSet, minimum: float, kinds: Sequence[str] = ("single", "additive")) -> LocationSet:
    """Targets of these kinds that are less confident than `minimum` become not locatable; pseudo-targets, by which the minimum is
    found, stay."""
    info = located.info.copy()
    lost = (
        (info["role"] == "target") & (info["status"] == "located") & info["kind"].isin(kinds) & (info["confidence"] < minimum)
    ).to_numpy()
    asked = f"the {minimum:.2f} asked for" if np.isfinite(minimum) else "any that makes coverage nominal"
    info.loc[lost, "reason"] = [f"confidence {value:.2f} is below {asked}" for value in info.loc[lost, "confidence"]]
    info.loc[lost, "status"] = "not_locatable"
    info.loc[lost, "k_eff"] = 0.0
    return replace(located, weights=np.where(lost[:, None], 0.0, located.weights), info=info)
