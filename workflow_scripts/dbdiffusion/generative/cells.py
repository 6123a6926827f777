"""Cells as tensors on the device: what the autoencoder learns from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from torch import Tensor

from dbdiffusion.data.sets import CONTROL, EffectSet
from dbdiffusion.data.splits import Splits
from dbdiffusion.runtime.errors import UserError

TARGET_SUM = 1.0e4
"""Counts per cell after normalisation."""
DENSE_LIMIT = 3 * 2**30
"""Bytes up to which a matrix is held dense on the device (counts and expression are two)."""


class Matrix:
    """Rows of a sparse matrix as dense float32 tensors: held dense on the device where that fits, else made batch by batch."""

    def __init__(self, values: sp.csr_matrix, device: torch.device, dense_limit: int = DENSE_LIMIT) -> None:
        self.shape, self.device = values.shape, device
        fits = values.shape[0] * values.shape[1] * 4 <= dense_limit
        self._sparse = None if fits else values.astype(np.float32)
        self._dense = torch.from_numpy(values.astype(np.float32).toarray()).to(device) if fits else None

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Rows (b,) as (b, genes)."""
        if self._dense is not None:
            return self._dense.index_select(0, rows)
        return torch.from_numpy(self._sparse[rows.cpu().numpy()].toarray()).to(self.device)

    def held(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """A dense matrix, and where rows (b,) are in it: without a copy where all is held dense."""
        if self._dense is not None:
            return self._dense, rows
        return self[rows], torch.arange(len(rows), device=self.device)


@dataclass(frozen=True)
class Cells:
    """Training cells of one cross-fit model (n cells x G genes of the fold's panel, file order).

    expression: ln(1 + CP10k); counts: raw counts or None where nothing needs them; log_library: (n,) ln of the full library size;
    batch: (n,) codes into `batches`; perturbation: (n,) labels.
    """

    expression: sp.csr_matrix
    counts: sp.csr_matrix | None
    log_library: np.ndarray
    batch: np.ndarray
    batches: list[str]
    perturbation: np.ndarray
    genes: list[str]

    def __len__(self) -> int:
        return self.expression.shape[0]

    @classmethod
    def make(
        cls,
        expression: sp.csr_matrix,
        counts: sp.csr_matrix | None,
        library: np.ndarray,
        batch: np.ndarray,
        perturbation: np.ndarray,
        genes: list[str],
    ) -> Cells:
        """From library sizes and batch labels."""
        batches = sorted({str(b) for b in batch})
        codes = pd.Index(batches).get_indexer(np.asarray(batch, dtype=str))
        log_library = np.log(np.maximum(np.asarray(library, dtype=float), 1.0))
        return cls(expression, counts, log_library, codes, batches, np.asarray(perturbation, dtype=object).astype(str), list(genes))

    def batch_share(self) -> np.ndarray:
        """Share of control cells in each batch (of all cells where there is no control): the composition that is generated."""
        control = self.perturbation == CONTROL
        codes = self.batch[control] if control.any() else self.batch
        return np.bincount(codes, minlength=len(self.batches)) / len(codes)


def fit_perturbations(splits: Splits, effects: EffectSet, fold: str, crossfit: str) -> list[str]:
    """Perturbations whose cells model `crossfit` of `fold` may read: not held out, not of inner fold `crossfit`, kept by the panel."""
    kept = set(effects.perturbations)
    return [p for p in splits.fit_perturbations(fold, crossfit) if p in kept]


def load_cells(cells: str | Path, splits: str | Path, effects: EffectSet, *, fold: str, crossfit: str) -> Cells:
    """The training cells of one cross-fit model and the control, on the fold's panel of genes.

    Raises UserError when fewer than 20 cells are left.
    """
    from dbdiffusion.data.normalise import load_expression

    names = fit_perturbations(Splits.read(splits), effects, fold, crossfit)
    read = load_expression(cells, perturbations=[*names, CONTROL], genes=list(effects.genes))
    if read.values.shape[0] < 20:
        raise UserError(
            f"{read.values.shape[0]} training cell(s) for fold {fold!r}, cross-fit model {crossfit!r}; at least 20 are needed",
            where=str(cells),
            fix="use fewer folds (splits.folds, splits.crossfit_folds) or loosen qc and panel thresholds",
        )
    obs = read.obs
    return Cells.make(
        read.values,
        read.counts,
        obs["total_counts"].to_numpy(float),
        obs["batch"].astype(str).to_numpy(),
        obs["perturbation"].astype(str).to_numpy(),
        list(read.genes),
    )
