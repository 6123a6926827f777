"""Rows of the calibration table: rates with 95 % bands whose unit is the target (or the control guide), not the pair."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

Rows = list[dict[str, object]]
Pairs = Sequence[tuple[np.ndarray, np.ndarray]]
"""Called and true (or allowed), each (T, G) bool, by fold: panels differ from fold to fold."""

POOLED = "pooled"
"""Stratum of rates over all pairs of target and gene together."""
PER_TARGET = "per target"
"""Stratum of rates that are taken in every target and then averaged over targets."""


def row(check: str, method: str, level: float, stratum: str, value: float, n: int, low: float = np.nan, high: float = np.nan) -> dict:
    """One row of contract `calibration`."""
    return {"check": check, "method": method, "level": level, "stratum": stratum, "value": value, "n": int(n), "low": low, "high": high}


def mean_row(check: str, method: str, level: float, stratum: str, units: np.ndarray) -> dict:
    """Mean of a rate per unit (U,), NaN where a unit has none; 95 % t band over units, not below 0; n: units."""
    units = np.asarray(units, dtype=float)
    units = units[np.isfinite(units)]
    if not len(units):
        return row(check, method, level, stratum, np.nan, 0)
    mean = float(units.mean())
    if len(units) < 2:
        return row(check, method, level, stratum, mean, len(units))
    half = stats.t.ppf(0.975, len(units) - 1) * units.std(ddof=1) / np.sqrt(len(units))
    return row(check, method, level, stratum, mean, len(units), max(mean - half, 0.0), mean + half)


def ratio_row(check: str, method: str, level: float, top: np.ndarray, bottom: np.ndarray, stratum: str = POOLED) -> dict:
    """Sum of `top` over sum of `bottom`, each (U,) counts by unit; n: the sum of `bottom`.

    95 % band by jackknife over units (Efron and Tibshirani 1993, ch. 11), with the t quantile of the units that count; pairs
    within a unit may depend on one another as they like. Where the rate is 0 or 1 the jackknife has no width, and those units
    are the trials of a binomial band. No band where fewer than 2 units count.
    """
    top, bottom = np.asarray(top, dtype=float), np.asarray(bottom, dtype=float)
    total, count = bottom.sum(), int((bottom > 0).sum())
    if total <= 0:
        return row(check, method, level, stratum, np.nan, 0)
    value = float(top.sum() / total)
    low = high = np.nan
    if count >= 2 and (value == 0 or np.array_equal(top, bottom)):
        low, high = binomial_band(round(value * count), count)
    elif count >= 2:
        left = (top.sum() - top) / (total - bottom)
        half = stats.t.ppf(0.975, count - 1) * np.sqrt((len(left) - 1) / len(left) * ((left - left.mean()) ** 2).sum())
        low, high = max(value - half, 0.0), min(value + half, 1.0)
    return row(check, method, level, stratum, value, round(total), low, high)


def binomial_band(successes: int, n: int) -> tuple[float, float]:
    """95 % Clopper-Pearson band of a rate of n independent trials."""
    low = stats.beta.ppf(0.025, successes, n - successes + 1) if successes else 0.0
    high = stats.beta.ppf(0.975, successes + 1, n - successes) if successes < n else 1.0
    return float(low), float(high)


def per_target(pairs: Pairs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Calls, true calls and true genes (T,) of each target of all folds."""
    counts = [(c.sum(1), (c & y).sum(1), y.sum(1)) for c, y in pairs]
    if not counts:
        return np.zeros(0), np.zeros(0), np.zeros(0)
    calls, right, true = (np.concatenate(part).astype(float) for part in zip(*counts, strict=True))
    return calls, right, true


def fdr_rows(check: str, method: str, q: float, calls: np.ndarray, right: np.ndarray) -> Rows:
    """False among all calls of all targets, and the mean over targets of the false discovery proportion (0 without calls).

    calls, right: (T,) calls of each target, and how many of them are right; where those are an estimate below 0, rates and their
    bands end at 1.
    """
    wrong = calls - right
    rows = [
        ratio_row(check, method, q, wrong, calls),
        mean_row(check, method, q, PER_TARGET, wrong / np.maximum(calls, 1)),
    ]
    return [r | {name: min(r[name], 1.0) for name in ("value", "low", "high") if r[name] > 1} for r in rows]


def share_row(check: str, method: str, q: float, pairs: Pairs) -> dict:
    """Share of the allowed genes of all targets that are called."""
    _, found, allowed = per_target(pairs)
    return ratio_row(check, method, q, found, allowed)


def quantile_rows(check: str, method: str, p: np.ndarray, n: int) -> Rows:
    """Quantiles of p values (any shape) at 0.05, 0.1, ..., 0.95, with the band that n independent uniform values would have."""
    rows: Rows = []
    for level in np.linspace(0.05, 0.95, 19).round(2):
        low, high = stats.beta.ppf([0.025, 0.975], level * (n + 1), (1 - level) * (n + 1))
        rows.append(row(check, method, float(level), POOLED, float(np.quantile(p, level)), n, float(low), float(high)))
    return rows


def thinned(expression: np.ndarray, every: int) -> np.ndarray:
    """Positions of expressed genes, ordered by expression (G,), every so many (fewer where that would leave less than 12)."""
    order = np.argsort(-expression, kind="stable")
    varied = order[expression[order] > 0]
    return varied[:: min(every, max(1, len(varied) // 12))]
