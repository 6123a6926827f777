"""Conformal intervals from the standardised errors of pseudo-targets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

EDGES = (0.5, 0.8, 0.95, 0.99)
"""Quantiles of |predicted effect| / se that bound the groups: errors are larger where an effect is predicted."""
MIN_GROUP = 200
"""Groups with fewer calibration pairs are joined to the one below."""


@dataclass(frozen=True)
class Quantiles:
    """Sorted |errors| / se of calibration pairs, by group of |predicted effect| / se; edges (B - 1,)."""

    edges: np.ndarray
    sorted_errors: tuple[np.ndarray, ...]

    def half_width(self, effect: np.ndarray, own: np.ndarray, sd: np.ndarray, level: float) -> np.ndarray:
        """Half width (R, G) of the interval: the group's quantile of the standardised errors times sd. own: the standard error of the
        effect about the truth alone, by which groups were told.

        Cross-conformal (Vovk 2015; Barber et al. 2021), Mondrian in the groups: the quantile at rank
        ceil(level (n + 1)) of the n pairs of the group.
        """
        group = np.searchsorted(self.edges, ratio(effect, own), side="right")
        cut = []
        for values in self.sorted_errors:
            rank = int(np.ceil(level * (len(values) + 1)))
            cut.append(values[min(rank, len(values)) - 1])
        return np.array(cut)[group] * sd


def ratio(effect: np.ndarray, sd: np.ndarray) -> np.ndarray:
    """|effect| / sd, 0 where there is no error."""
    return np.divide(np.abs(effect), sd, out=np.zeros_like(effect), where=sd > 0)


def fit_quantiles(error: np.ndarray, sd: np.ndarray, effect: np.ndarray, predictive_sd: np.ndarray) -> Quantiles:
    """Calibrate on pseudo-targets (K, G): errors of the observed effects, which count the observation's own sampling error
    in `predictive_sd`; the interval of the true effect then uses `sd`, without it."""
    used = predictive_sd > 0
    scores = np.abs(error[used]) / predictive_sd[used]
    z = ratio(effect, sd)[used]
    if not scores.size:
        return Quantiles(np.zeros(0), (np.zeros(1),))
    edges = [float(e) for e in np.unique(np.quantile(z, EDGES))]
    while edges and min(np.bincount(np.searchsorted(edges, z, side="right"), minlength=len(edges) + 1)) < MIN_GROUP:
        edges.pop()
    group = np.searchsorted(edges, z, side="right")
    return Quantiles(np.array(edges), tuple(np.sort(scores[group == b]) for b in range(len(edges) + 1)))
