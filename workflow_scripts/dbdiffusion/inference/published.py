"""The published standard errors and that of prediction-powered inference, for comparison. None of them is calibrated for an
unseen perturbation: they ignore how far the target itself lies from its neighbours."""

from __future__ import annotations

import numpy as np

from dbdiffusion.inference.debias import Model, Queries, Screen, mix


def residuals(screen: Screen, model: Model) -> np.ndarray:
    """Observed effects of the training perturbations less lambda times the predictors' (P, G)."""
    out = screen.effects.effect
    for v, variate in enumerate(model.variates):
        if variate.form == "debiased":
            out = out - model.weights.all[:, v] * variate.predictor.neighbours
    return out


def standard_errors(
    name: str, screen: Screen, queries: Queries, model: Model, mc_variance: np.ndarray, slope: np.ndarray | float = 1.0
) -> np.ndarray:
    """Standard errors (R, G) of the estimate, z-based; slope: what the estimate was multiplied with (mc_variance is that of the product).

    With pooled within-neighbour cell variance s^2_j and t^2_j the variance of the neighbours' observed means (ddof 1):
    cells_only: sqrt(sum w^2 s^2_j / n_k); conservative: sqrt(sum w^2 (s^2_j / n_k + t^2_j)), which for uniform weights is
    the published (1/K) sqrt(sum(s^2_j / n_k + t^2_j)); ppi_z: sqrt(lambda^2 mc + sum w^2 v^2_j) with v^2 the variance of
    the neighbours' residuals (ddof 0), which for uniform weights is the PPI++ mean's error with neighbours as labelled
    data (Angelopoulos et al. 2023) and mc the Monte-Carlo variance of the target's generated mean.
    """
    members = queries.local > 0
    n = screen.effects.n_cells.astype(float)
    if name == "ppi_z":
        values = residuals(screen, model)
        spread = mix(queries.local, values**2) - mix(queries.local, values) ** 2
        return np.sqrt(mc_variance + slope**2 * queries.sum_sq[:, None] * np.maximum(spread, 0.0))
    freedom = np.maximum(n - 1, 0.0)
    pooled = mix(members * freedom, np.nan_to_num(screen.effects.variance)) / np.maximum(members @ freedom, 1.0)[:, None]
    within = pooled * (queries.weights**2 @ (1.0 / np.maximum(n, 1.0)))[:, None]
    if name == "cells_only":
        return slope * np.sqrt(within)
    count = members.sum(1)
    flat = members / np.maximum(count, 1)[:, None]
    spread = mix(flat, screen.effects.effect**2) - mix(flat, screen.effects.effect) ** 2
    spread = np.maximum(spread, 0.0) * (count / np.maximum(count - 1, 1))[:, None]
    return slope * np.sqrt(within + queries.sum_sq[:, None] * spread)
