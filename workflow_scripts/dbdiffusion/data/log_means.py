"""Expected ln(1 + CP10k) of negative-binomial counts: the scale on which effects are estimated, from the parameters of a simulation."""

from __future__ import annotations

import numpy as np

from dbdiffusion.data.normalise import TARGET_SUM

# Nodes of the integral over u = ln t: the integrand is smooth, and nothing is left outside these limits.
LOG_T = np.linspace(-18.0, 4.0, 89)
DEPTH_NODES, GENE_NODES = 5, 5


def expected_log(mean: np.ndarray, dispersion: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """E ln(1 + scale C) of negative-binomial counts C with variance mean + dispersion mean²; the three broadcast.

    From Frullani's integral ln(1 + x) = int_0^inf e^-t (1 - e^-tx) / t dt and the Laplace transform of C,
    E e^-sC = (1 + dispersion mean (1 - e^-s))^(-1 / dispersion), by the trapezoid rule in ln t.
    """
    mean, dispersion, scale = np.broadcast_arrays(*(np.asarray(a, dtype=float) for a in (mean, dispersion, scale)))
    out = np.zeros(mean.shape)
    for u in LOG_T:
        t = np.exp(u)
        laplace = np.exp(-np.log1p(-dispersion * mean * np.expm1(-t * scale)) / dispersion)
        out += np.exp(-t) * (1.0 - laplace)
    return out * (LOG_T[1] - LOG_T[0])


def expected_log_cp10k(
    share: np.ndarray, dispersion: np.ndarray, gene_sd: np.ndarray, *, library: float, depth_sd: float, total: float = 1.0
) -> np.ndarray:
    """E ln(1 + CP10k) (...) of counts with mean depth x share x exp(N(0, gene_sd²)), depth log-normal about `library`.

    share: mean share of the depth (...); dispersion, gene_sd broadcast with it; total: a cell's total counts, by which counts are
    scaled, in units of its depth. Normal nodes by Gauss-Hermite quadrature.
    """
    out = np.zeros(np.broadcast_shapes(share.shape, dispersion.shape, gene_sd.shape))
    for depth, weight in zip(*_normal(DEPTH_NODES), strict=True):
        cells = library * np.exp(depth_sd * depth)
        for gene, other in zip(*_normal(GENE_NODES), strict=True):
            mean = cells * share * np.exp(gene_sd * gene)
            out += weight * other * expected_log(mean, dispersion, np.array(TARGET_SUM / (cells * total)))
    return out


def _normal(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights for expectations over a standard normal."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    return nodes, weights / weights.sum()
