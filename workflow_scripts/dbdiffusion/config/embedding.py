"""config blocks `embedding`, `clusters` and `location`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from dbdiffusion.config.base import Block


class EmbeddingConfig(Block):
    """Low-dimensional embedding of perturbations, learned from their effects."""

    dimensions: int = Field(64, ge=2)
    """Principal components of the effect matrix (fewer where perturbations are few)."""
    scale: Literal["standard_error", "gene_sd"] = "standard_error"
    """Divide effects by their standard error's scale, or z-score genes over perturbations (published)."""
    feature_dimensions: int = Field(32, ge=1)
    """Principal components of the gene features that the generator may be conditioned on (`diffusion.condition`)."""


class ClustersConfig(Block):
    """Clusters of perturbations and of genes (the published location rule uses both)."""

    perturbation_neighbours: int = Field(5, ge=2)
    """kNN graph of perturbations."""
    perturbation_resolution: float = Field(2.0, gt=0)
    """Leiden resolution for perturbations."""
    gene_components: int = Field(50, ge=2)
    """Principal components of cells whose loadings describe genes."""
    gene_neighbours: int = Field(20, ge=2)
    """kNN graph of genes."""
    gene_resolution: float = Field(0.4, gt=0)
    """Leiden resolution for genes."""


class LocationConfig(Block):
    """Where an unmeasured perturbation stands among the measured ones."""

    locator: Literal["auto", "stack", "cluster", "kernel", "ridge"] = "auto"
    """cluster: published rule; kernel: softmax of gene-feature similarity; ridge: regression on gene features;
    stack: their mixture, with the training mean, that has the smallest cross-fitted error on the measured perturbations;
    auto: of the best of these, the stack and the training mean alone, the one with the smallest cross-fitted error."""
    neighbours: int = Field(15, ge=1)
    """kernel: nearest perturbed genes that get weight."""
    temperatures: list[float] = Field([0.05, 0.1, 0.2, 0.5], min_length=1)
    """kernel: softmax temperatures on cosine similarity, chosen by cross-fitted error."""
    ridge_penalties: list[float] = Field([0.1, 1.0, 10.0, 100.0], min_length=1)
    """ridge: penalties, chosen by cross-fitted error."""
    min_confidence: Literal["auto"] | float = 0.0
    """Targets located with less confidence are not locatable. auto: the smallest confidence above which the training perturbations, located
    as if unmeasured, lie in the intervals of their located neighbours as often as `coverage` says (singles; sums have no neighbours)."""
    coverage: float = Field(0.9, gt=0.5, lt=1)
    """Nominal coverage of the intervals by which min_confidence: auto is found."""
    max_cells: int = Field(20000, ge=100)
    """Cells used for co-expression (a seeded subset of the training cells)."""

    @field_validator("min_confidence")
    @classmethod
    def _is_a_share(cls, value: str | float) -> str | float:
        if value != "auto" and not 0 <= value <= 1:
            raise ValueError("write auto, or a confidence from 0 to 1")
        return value
