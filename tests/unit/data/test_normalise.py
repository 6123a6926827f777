"""Expression values and the reading of rows, against the same written the obvious way."""

from __future__ import annotations

from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest
from scipy import sparse

from dbdiffusion.data import normalise
from dbdiffusion.data.normalise import group_sums, load_expression, log_normalise, open_cells
from dbdiffusion.data.splits import Splits
from dbdiffusion.runtime.errors import UserError


def dense(cells: Path) -> tuple[anndata.AnnData, np.ndarray]:
    """The table and ln(1 + CP10k), cell by cell."""
    table = anndata.read_h5ad(cells)
    values = np.zeros(table.shape)
    for row, (counts, total) in enumerate(zip(table.X.toarray(), table.obs["total_counts"], strict=True)):
        values[row] = [np.log(1 + 10000 * count / total) for count in counts]
    return table, values


@pytest.fixture(scope="module")
def oracle(tiny_screen: Path) -> tuple[anndata.AnnData, np.ndarray]:
    return dense(tiny_screen / "cells.h5ad")


def test_values(oracle: tuple[anndata.AnnData, np.ndarray]) -> None:
    table, values = oracle
    found = log_normalise(table.X, table.obs["total_counts"].to_numpy())
    assert found.dtype == np.float32
    assert sparse.isspmatrix_csr(found)
    np.testing.assert_allclose(found.toarray(), values, rtol=1e-6)


def test_agrees_with_scanpy_where_all_genes_are_measured() -> None:
    """Without unmeasured genes this is normalize_total to 1e4 and log1p."""
    import scanpy as sc

    counts = sparse.random(50, 30, 0.3, format="csr", random_state=1)
    counts.data = np.ceil(counts.data * 5)
    table = anndata.AnnData(counts.copy())
    sc.pp.normalize_total(table, target_sum=1e4)
    sc.pp.log1p(table)
    found = log_normalise(counts, np.asarray(counts.sum(axis=1)).ravel())
    np.testing.assert_allclose(found.toarray(), table.X.toarray(), rtol=1e-5)


@pytest.mark.parametrize("total", [0.0, -1.0, np.nan, np.inf])
def test_cells_without_library(total: float) -> None:
    counts = sparse.csr_matrix(np.array([[1.0, 0.0], [0.0, 0.0]]))
    assert log_normalise(counts, np.array([1.0, total]))[1].nnz == 0
    with pytest.raises(UserError, match="library size"):
        log_normalise(counts, np.array([total, 1.0]))


@pytest.mark.parametrize("chunk", [7, 64, 100_000])
def test_rows_and_genes(tiny_screen: Path, oracle: tuple[anndata.AnnData, np.ndarray], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normalise, "CHUNK_ROWS", chunk)
    table, values = oracle
    halves = Splits.read(tiny_screen / "splits.json").halves
    labels = table.obs["perturbation"].astype(str).to_numpy()
    some = [sorted(set(labels))[2], "control"]
    genes = [table.var_names[at] for at in (17, 3, 90)]
    found = load_expression(tiny_screen / "cells.h5ad", perturbations=some, genes=genes, halves=halves, half="B")
    keep = np.isin(labels, some) & (halves == "B")
    np.testing.assert_allclose(found.values.toarray(), values[keep][:, [17, 3, 90]], rtol=1e-6)
    np.testing.assert_array_equal(found.counts.toarray(), table.X.toarray()[keep][:, [17, 3, 90]])
    assert list(found.genes) == genes
    assert list(found.obs.index) == list(table.obs_names[keep])
    assert (found.obs["half"] == "B").all()
    assert found.obs["total_counts"].dtype == float
    everything = load_expression(tiny_screen / "cells.h5ad")
    np.testing.assert_allclose(everything.values.toarray(), values, rtol=1e-6)


def test_no_rows(tiny_screen: Path) -> None:
    found = load_expression(tiny_screen / "cells.h5ad", perturbations=[], genes=None)
    assert found.values.shape == (0, 120)
    assert len(found.obs) == 0


def test_subset_is_seeded(tiny_screen: Path) -> None:
    def names(seed: int) -> list[str]:
        return list(load_expression(tiny_screen / "cells.h5ad", perturbations=["control"], max_cells=20, seed=seed).obs.index)

    assert names(1) == names(1) != names(2)
    assert len(set(names(1))) == 20
    assert names(1) == sorted(names(1))


def test_other_cells_do_not_matter(tiny_screen: Path, tmp_path: Path) -> None:
    """Garbage in the counts of other perturbations, however large, leaves what is loaded as it was."""
    source = tiny_screen / "cells.h5ad"
    table = anndata.read_h5ad(source)
    labels = table.obs["perturbation"].astype(str)
    victim = sorted(set(labels))[1]
    at = np.flatnonzero(labels == victim)
    counts = table.X.tolil()
    counts[at] = np.random.default_rng(0).poisson(50, (len(at), table.n_vars))
    table.X = counts.tocsr().astype(np.float32)
    table.obs["total_counts"] = np.where(labels == victim, 1e6, table.obs["total_counts"])
    table.write_h5ad(tmp_path / "cells.h5ad")
    others = sorted(set(labels) - {victim})
    before, after = (load_expression(path, perturbations=others, max_cells=200, seed=3) for path in (source, tmp_path / "cells.h5ad"))
    assert (before.values != after.values).nnz == 0
    assert before.obs.equals(after.obs)


def test_errors_name_the_nearest(tiny_screen: Path, tmp_path: Path) -> None:
    cells = tiny_screen / "cells.h5ad"
    with pytest.raises(UserError, match="'contrl' is not in the file.*\n.*'control'"):
        load_expression(cells, perturbations=["contrl"])
    with pytest.raises(UserError, match="gene 'NOPE'"):
        load_expression(cells, genes=["NOPE"])
    with pytest.raises(UserError, match="file not found"):
        load_expression(tmp_path / "none.h5ad")
    table = anndata.read_h5ad(cells)
    table.X = table.X.toarray()
    table.write_h5ad(tmp_path / "dense.h5ad")
    with pytest.raises(UserError, match="expected csr_matrix"):
        load_expression(tmp_path / "dense.h5ad")
    del table.obs["batch"]
    table.write_h5ad(tmp_path / "columns.h5ad")
    with pytest.raises(UserError, match="batch"):
        load_expression(tmp_path / "columns.h5ad")


@pytest.mark.parametrize("chunk", [11, 100_000])
def test_group_sums(tiny_screen: Path, oracle: tuple[anndata.AnnData, np.ndarray], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normalise, "CHUNK_ROWS", chunk)
    _, values = oracle
    codes = np.random.default_rng(0).integers(-1, 4, len(values))
    codes[codes == 2] = 1  # a group without cells
    with open_cells(tiny_screen / "cells.h5ad") as cells:
        found = group_sums(cells, codes, 5)
    for group in range(5):
        own = values[codes == group]
        assert found.n[group] == len(own)
        np.testing.assert_allclose(found.sum[group], own.sum(axis=0), rtol=1e-6)
        np.testing.assert_allclose(found.sum_sq[group], (own**2).sum(axis=0), rtol=1e-6)
        np.testing.assert_array_equal(found.detected[group], (own > 0).sum(axis=0))


def test_reads_no_more_than_a_chunk_at_a_time(tiny_screen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read from the file in one go stays within a chunk of rows."""
    monkeypatch.setattr(normalise, "CHUNK_ROWS", 16)
    with h5py.File(tiny_screen / "cells.h5ad") as handle:
        largest = np.diff(handle["X/indptr"][::1]).max() * 16
    sizes = []
    block = normalise.CellsFile._block

    def watched(self: normalise.CellsFile, rows: np.ndarray) -> sparse.csr_matrix:
        sizes.append(int(self._indptr[rows[-1] + 1] - self._indptr[rows[0]]))
        return block(self, rows)

    monkeypatch.setattr(normalise.CellsFile, "_block", watched)
    load_expression(tiny_screen / "cells.h5ad")
    assert len(sizes) > 10
    assert max(sizes) <= largest
