"""config block `qc`: which cells, perturbations and genes are kept."""

from __future__ import annotations

from pydantic import Field

from dbdiffusion.config.base import Block


class QcConfig(Block):
    """Filters of cells, genes and perturbations."""

    min_genes_per_cell: int = Field(10, ge=0)
    """Cells with fewer detected genes are dropped."""
    min_counts_per_cell: int = Field(0, ge=0)
    """Cells with a smaller library are dropped."""
    max_mito_share: float = Field(0.25, gt=0, le=1)
    """Cells with a larger share of counts on mitochondrial genes are dropped (genes MT-*, or var column `mito`)."""
    drop_mito_genes: bool = True
    """Leave mitochondrial genes out of the analysis after the filter."""
    min_cells_per_perturbation: int = Field(20, ge=2)
    """Perturbations with fewer cells are dropped."""
    max_cells_per_perturbation: int | None = Field(None, ge=10)
    """Random subset of larger perturbations; null keeps all. The control may keep ten times as many."""


class PanelConfig(Block):
    """Selection of genes and training perturbations inside each fold; held-out cells are never looked at."""

    n_genes: int = Field(2000, ge=20)
    """Genes kept: those of largest total standardised effect over the training perturbations, plus the perturbed genes."""
    min_detected_share: float = Field(0.01, ge=0, lt=1)
    """A gene must be detected in this share of training cells."""
    min_effect: float = Field(0.0, ge=0)
    """Training perturbations with a smaller sum of absolute effects are left out (published: 650 on THP-1)."""
