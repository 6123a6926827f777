"""config block `benchmark`: baselines, scores and figures."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dbdiffusion.config.base import Block

Baseline = Literal["control", "training_mean", "neighbour_mean", "knn", "ridge", "linear", "additive", "permuted"]


class BenchmarkConfig(Block):
    """Baselines, scores and figures."""

    baselines: list[Baseline] = Field(["control", "training_mean", "neighbour_mean", "knn", "ridge", "linear", "additive", "permuted"])
    """Simple predictors that every score is placed beside; permuted is the negative control."""
    top_genes: list[int] = Field([20, 100, 300])
    """Scores on the genes of largest effect in half A, beside all genes."""
    bootstrap: int = Field(1000, ge=100)
    """Bootstrap resamples of perturbations for intervals of mean scores."""
    distribution_components: int = Field(20, ge=2)
    """Components of the fixed PCA for energy distance and MMD."""
    figure_targets: int = Field(4, ge=1)
    """Held-out targets with figures of their own: those with the strongest measured effect."""
