"""Expression values, and the only readers of cells.h5ad: rows of chosen perturbations, and sums over groups of cells."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem
from scipy import sparse

from dbdiffusion.runtime.errors import UserError, nearest
from dbdiffusion.runtime.seeds import rng

TARGET_SUM = 1e4
CHUNK_ROWS = 4096
OBS_COLUMNS = ("perturbation", "guide", "batch", "total_counts")


def log_normalise(counts: sparse.csr_matrix, total_counts: np.ndarray) -> sparse.csr_matrix:
    """ln(1 + counts per 10,000) of n cells x G genes.

    counts: (n, G) CSR raw counts; total_counts: (n,) library over the whole transcriptome, so that a subset of the
    genes gets the values it would have among all genes. Returns float32 CSR with the same zeros.

    Raises UserError when a cell that has counts has no positive total.
    """
    counts = sparse.csr_matrix(counts)
    total = np.asarray(total_counts, dtype=np.float64)
    entries = np.diff(counts.indptr)
    if ((total <= 0) | ~np.isfinite(total))[entries > 0].any():
        raise UserError(
            "cells with counts but without a positive finite library size",
            where="column total_counts",
            fix="name the right column under columns.library_size, or leave it out to sum the counts of the file",
        )
    scale = np.divide(TARGET_SUM, total, out=np.zeros_like(total), where=total > 0)
    data = np.log1p(counts.data.astype(np.float64) * np.repeat(scale, entries)).astype(np.float32)
    return sparse.csr_matrix((data, counts.indices, counts.indptr), shape=counts.shape)


class CellsFile:
    """An open cells.h5ad: its tables in memory, its counts read by row.

    obs: one row per cell with perturbation, guide, batch (plain text) and total_counts; genes: symbols.
    """

    def __init__(self, path: Path, handle: h5py.File) -> None:
        self.path = path
        self.obs: pd.DataFrame = read_elem(handle["obs"])
        absent = [column for column in OBS_COLUMNS if column not in self.obs]
        if absent:
            raise UserError(
                f"obs column(s) {absent} missing; found {list(self.obs.columns)}", where=str(path), fix="run the data stage again"
            )
        self.obs = self.obs[list(OBS_COLUMNS)].astype({"perturbation": str, "guide": str, "batch": str, "total_counts": float})
        self.genes = pd.Index(read_elem(handle["var"]).index.astype(str))
        matrix = handle["X"]
        encoding = matrix.attrs.get("encoding-type", "array") if isinstance(matrix, h5py.Group) else "array"
        if encoding != "csr_matrix":
            raise UserError(f"X is stored as {encoding}, expected csr_matrix", where=str(path), fix="run the data stage again")
        self._indptr = matrix["indptr"][:]
        self._data, self._indices = matrix["data"], matrix["indices"]

    def counts(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Counts of cells `rows` (ascending positions) as float32 CSR; memory is bounded by these rows and one chunk."""
        rows = np.asarray(rows)
        parts = [self._block(rows[(rows >= start) & (rows < start + CHUNK_ROWS)]) for start in self._starts(rows)]
        if not parts:
            return sparse.csr_matrix((0, len(self.genes)), dtype=np.float32)
        return sparse.vstack(parts, format="csr", dtype=np.float32)

    def chunks(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, sparse.csr_matrix]]:
        """Cells `rows` (ascending positions) in chunks: the positions in `rows` and their counts."""
        rows = np.asarray(rows)
        for start in self._starts(rows):
            at = np.flatnonzero((rows >= start) & (rows < start + CHUNK_ROWS))
            yield at, self._block(rows[at])

    @staticmethod
    def _starts(rows: np.ndarray) -> np.ndarray:
        return np.unique(rows // CHUNK_ROWS) * CHUNK_ROWS

    def _block(self, rows: np.ndarray) -> sparse.csr_matrix:
        first, last = int(rows[0]), int(rows[-1]) + 1
        low, high = int(self._indptr[first]), int(self._indptr[last])
        pointers = self._indptr[first : last + 1] - low
        shape = (last - first, len(self.genes))
        block = sparse.csr_matrix((self._data[low:high].astype(np.float32), self._indices[low:high], pointers), shape=shape)
        return block if len(rows) == last - first else block[rows - first]


@contextmanager
def open_cells(path: str | Path) -> Iterator[CellsFile]:
    """Open cells.h5ad for reading by row."""
    path = Path(path)
    if not path.exists():
        raise UserError("file not found", where=str(path), fix="run the rule that makes it")
    with h5py.File(path, "r") as handle:
        yield CellsFile(path, handle)


@dataclass(frozen=True)
class Expression:
    """Some cells x some genes.

    values: (n, G) float32 CSR, ln(1 + CP10k); counts: (n, G) float32 CSR; obs: (n, ...) perturbation, guide, batch,
    total_counts, and half where halves were given; genes: (G,).
    """

    values: sparse.csr_matrix
    counts: sparse.csr_matrix
    obs: pd.DataFrame
    genes: pd.Index


def load_expression(
    path: str | Path,
    *,
    perturbations: list[str] | None = None,
    genes: list[str] | pd.Index | None = None,
    halves: np.ndarray | None = None,
    half: str | None = None,
    max_cells: int | None = None,
    seed: int = 0,
) -> Expression:
    """Expression of the cells of some perturbations, in the order of the file; counts of other cells are not used at all.

    perturbations: labels, `control` among them where wanted (none: all cells); genes: columns in the order given
    (none: all); halves: (cells of the file,) "A"/"B" as in Splits.halves, kept in obs["half"]; half: keep only that
    half; max_cells: a seeded subset of that many cells in all.

    Raises UserError for a perturbation or gene that is not in the file.
    """
    with open_cells(path) as cells:
        obs = cells.obs
        if halves is not None:
            obs = obs.assign(half=np.asarray(halves))
        keep = np.ones(len(obs), dtype=bool)
        if perturbations is not None:
            _require(perturbations, obs["perturbation"].unique(), "perturbation", path)
            keep &= obs["perturbation"].isin(list(perturbations)).to_numpy()
        if half is not None:
            if halves is None:
                raise ValueError("half needs halves")
            keep &= (obs["half"] == half).to_numpy()
        rows = np.flatnonzero(keep)
        if max_cells is not None and len(rows) > max_cells:
            rows = np.sort(rng(seed, "load_expression").choice(rows, max_cells, replace=False))
        counts = cells.counts(rows)
        found = cells.genes
        if genes is not None:
            _require(genes, found, "gene", path)
            counts = counts[:, found.get_indexer(list(genes))].sorted_indices()
            found = pd.Index(list(genes))
        obs = obs.iloc[rows]
        return Expression(log_normalise(counts, obs["total_counts"].to_numpy()), counts, obs, found)


def _require(wanted: list[str] | pd.Index, present: np.ndarray | pd.Index, what: str, path: str | Path) -> None:
    absent = sorted(set(wanted) - set(present))
    if absent:
        raise UserError(f"{what} {absent[0]!r} is not in the file ({len(absent)} absent)", where=str(path), fix=nearest(absent[0], present))


@dataclass(frozen=True)
class GroupSums:
    """Sums over K groups of cells, genes in columns: n (K,); sum, sum_sq of ln(1 + CP10k) and detected (cells > 0), each (K, G)."""

    n: np.ndarray
    sum: np.ndarray
    sum_sq: np.ndarray
    detected: np.ndarray


def group_sums(cells: CellsFile, codes: np.ndarray, groups: int) -> GroupSums:
    """Sums of ln(1 + CP10k), of its square and of detection over groups of cells, in one pass.

    codes: (cells of the file,) group of each cell, -1 for cells that belong to none (they are not read).
    A chunk's sums are the product of a sparse groups x cells indicator with the chunk, in float64.
    """
    rows = np.flatnonzero(codes >= 0)
    n_genes = len(cells.genes)
    out = GroupSums(np.bincount(codes[rows], minlength=groups), *(np.zeros((groups, n_genes)) for _ in range(3)))
    total = cells.obs["total_counts"].to_numpy()
    for at, counts in cells.chunks(rows):
        values = log_normalise(counts, total[rows[at]]).astype(np.float64)
        present, local = np.unique(codes[rows[at]], return_inverse=True)
        indicator = sparse.csr_matrix((np.ones(len(at)), (local, np.arange(len(at)))), shape=(len(present), len(at)))
        out.sum[present] += (indicator @ values).toarray()
        out.sum_sq[present] += (indicator @ values.power(2)).toarray()
        out.detected[present] += (indicator @ (values > 0)).toarray()
    return out
