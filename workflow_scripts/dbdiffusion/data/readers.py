"""Readers of the formats a screen comes in: .h5ad, .h5mu, Cell Ranger .h5 and .mtx folders, with cell tables and guide counts."""

from __future__ import annotations

import gzip
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse as sp
from anndata.io import read_elem, sparse_dataset

from dbdiffusion.config.datasets import CatalogueDataset, FileDataset
from dbdiffusion.data.labels import require_column
from dbdiffusion.runtime.errors import UserError, nearest
from dbdiffusion.runtime.progress import Progress

logger = logging.getLogger(__name__)

BLOCK = 1 << 26
"""Bytes of a dense matrix that are read at a time."""
MODALITY = "rna"
"""Modality of an .h5mu file that holds the counts."""


@dataclass
class Screen:
    """A screen as it stands in its file.

    counts: (n_cells, n_genes) CSR; obs: cell table, index cell ids; var: gene table, index gene names as they stand;
    where: the file, for messages; integer_layers: names of other matrices of the file that hold counts;
    guides: (n_cells, n_guides) CSR and guide names, where guides were counted; report: what was left out on reading.
    """

    counts: sp.csr_matrix
    obs: pd.DataFrame
    var: pd.DataFrame
    where: str
    integer_layers: Callable[[], list[str]] = list
    guides: tuple[sp.csr_matrix, list[str]] | None = None
    report: dict[str, Any] = field(default_factory=dict)

    def take(self, cells: np.ndarray) -> None:
        """Keep some cells, given as a mask or as row numbers."""
        self.counts, self.obs = self.counts[cells], self.obs.iloc[cells if cells.dtype != bool else np.flatnonzero(cells)]
        if self.guides is not None:
            self.guides = self.guides[0][cells], self.guides[1]


def check_ids(screen: Screen) -> None:
    ids = screen.obs.index = pd.Index(screen.obs.index.astype(str), name=None)
    if ids.has_duplicates:
        twice = ids[ids.duplicated()]
        raise UserError(
            f"{twice.nunique()} cell ids stand more than once, e.g. {twice[0]!r}",
            where=screen.where,
            fix="make them unique (obs_names_make_unique, or the batch as a suffix)",
        )


def read_screen(config: FileDataset | CatalogueDataset, source: str | Path) -> Screen:
    """Read a screen by what `source` is: an .h5ad, .h5mu (modality rna) or Cell Ranger .h5 file, or a folder with a matrix.

    A folder with `cells.tsv` brings its own cell table (what `convert_seurat.R` writes).
    Raises UserError for files that are missing, cut off, or not in the format that the config states.
    """
    source = Path(source)
    if not source.exists():
        raise UserError(
            "file or folder not found", where=str(source), fix="check the path of the dataset (relative to the working directory)"
        )
    kind = config.kind if isinstance(config, FileDataset) else _kind_of(source)
    if kind in ("h5ad", "h5mu"):
        if isinstance(config, FileDataset) and (config.cell_table or config.guide_counts):
            raise UserError(
                "cell_table and guide_counts belong to 10x data",
                where=str(source),
                fix="leave them out, or put the columns into obs of the .h5ad",
            )
        return _read_hdf5(source, config.layer, modality=MODALITY if kind == "h5mu" else None)
    screen = _read_10x_h5(source) if kind == "10x_h5" else _read_mtx(source)
    return _with_cells(screen, config, source)


def _kind_of(source: Path) -> str:
    if source.is_dir():
        return "10x_mtx"
    kinds = {".h5ad": "h5ad", ".h5mu": "h5mu", ".h5": "10x_h5"}
    if source.suffix not in kinds:
        raise UserError(
            f"unknown format {source.suffix!r}", where=str(source), fix="expected .h5ad, .h5mu, .h5 or a folder with matrix.mtx.gz"
        )
    return kinds[source.suffix]


def _read_hdf5(path: Path, layer: str | None, *, modality: str | None) -> Screen:
    """An .h5ad file, or one modality of an .h5mu file, without loading more than one matrix."""
    try:
        with h5py.File(path, "r") as handle:
            group = handle
            if modality is not None:
                found = list(handle["mod"]) if "mod" in handle else []
                if modality not in found:
                    raise UserError(
                        f"no modality {modality!r}; found {found}", where=str(path), fix="use a file with a modality of that name"
                    )
                group = handle["mod"][modality]
            return _read_group(handle, group, layer, str(path))
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot be read ({type(error).__name__}: {error})",
            where=str(path),
            fix="the file is cut off, damaged or no HDF5 file: fetch or write it again (anndata 0.8 or newer)",
        ) from error


def _read_group(handle: h5py.File, group: h5py.Group, layer: str | None, where: str) -> Screen:
    for name in ("obs", "var"):
        if not isinstance(group.get(name), h5py.Group):
            raise UserError(
                f"there is no table {name!r}; found {sorted(group)}", where=where, fix="use an .h5ad written by anndata 0.8 or newer"
            )
    matrices = _matrices(group)
    name = layer or "X"
    if name not in matrices:
        raise UserError(
            f"there is no matrix {name!r} (config key layer); found {list(matrices) or 'none'}",
            where=where,
            fix=nearest(name, matrices) + ("; leave `layer` out for X" if "X" in matrices else ""),
        )
    key, var_key = matrices[name]
    obs, var = read_elem(group["obs"]), read_elem(group[var_key])
    if group is not handle:
        obs = _with_global_columns(obs, handle)
    counts = _to_csr(group[key], f"{where}, {name}")
    if counts.shape != (len(obs), len(var)):
        raise UserError(f"matrix of {counts.shape} with {len(obs)} cells and {len(var)} genes", where=where, fix="write the file again")
    others = {other: keys[0] for other, keys in matrices.items() if other != name}
    file, prefix = handle.filename, group.name
    return Screen(counts, obs, var, where, lambda: _integer_matrices(file, prefix, others))


def _matrices(group: h5py.Group) -> dict[str, tuple[str, str]]:
    """Name for `layer` -> where the matrix and its gene table lie: X, every layer, and raw (unless a layer has that name)."""
    found = {"X": ("X", "var")} if "X" in group else {}
    found |= {name: (f"layers/{name}", "var") for name in group.get("layers", ())}
    if "raw" in group and "raw" not in found and "X" in group["raw"]:
        found["raw"] = ("raw/X", "raw/var")
    return found


def _with_global_columns(obs: pd.DataFrame, handle: h5py.File) -> pd.DataFrame:
    """Columns that an .h5mu file keeps for all modalities together (`name` or `rna:name`), where the modality lacks them."""
    if not isinstance(handle.get("obs"), h5py.Group):
        return obs
    whole = read_elem(handle["obs"]).reindex(obs.index)
    for column in whole.columns:
        name = str(column).removeprefix(MODALITY + ":")
        if ":" not in name and name not in obs.columns:
            obs[name] = whole[column].to_numpy()
    return obs


def _to_csr(element: h5py.Group | h5py.Dataset, what: str) -> sp.csr_matrix:
    """A stored matrix as CSR; a dense one block by block, so that it never lies in memory whole."""
    if isinstance(element, h5py.Group):
        return sp.csr_matrix(sparse_dataset(element).to_memory())
    if element.ndim != 2:
        raise UserError(f"matrix has {element.ndim} dimensions, expected 2", where=what, fix="store cells x genes")
    step = max(1, BLOCK // max(1, element.shape[1] * element.dtype.itemsize))
    blocks = []
    with Progress(element.shape[0], f"reading dense {what} (cells)") as bar:
        for start in range(0, element.shape[0], step):
            block = element[start : start + step]
            blocks.append(sp.csr_matrix(block))
            bar.update(len(block))
    return sp.vstack(blocks, format="csr") if blocks else sp.csr_matrix(element.shape)


def _integer_matrices(path: str, prefix: str, keys: dict[str, str]) -> list[str]:
    """Which other matrices of the file look like counts, judged by the beginning of each."""
    found = []
    with h5py.File(path, "r") as handle:
        for name, key in keys.items():
            element = handle[prefix][key]
            values = element["data"][:200_000] if isinstance(element, h5py.Group) else element[:200]
            values = np.asarray(values, dtype=float).ravel()
            if values.size and np.isfinite(values).all() and (values >= 0).all() and (values == np.rint(values)).all():
                found.append(name)
    return found


def _read_10x_h5(path: Path) -> Screen:
    import scanpy as sc  # costs seconds to import, and only this format needs it

    try:
        data = sc.read_10x_h5(path, gex_only=False)
    except Exception as error:  # scanpy and h5py raise many kinds for files of another format
        raise UserError(
            f"not a Cell Ranger .h5 file, or damaged ({type(error).__name__}: {error})",
            where=str(path),
            fix="give filtered_feature_bc_matrix.h5 of Cell Ranger, or use kind: h5ad",
        ) from error
    return Screen(sp.csr_matrix(data.X), data.obs, data.var, str(path))


def _beside(folder: Path, *names: str) -> Path:
    """The first of the files that is there, compressed or not."""
    for name in names:
        for candidate in (folder / f"{name}.gz", folder / name):
            if candidate.exists():
                return candidate
    raise UserError(
        f"there is no {names[0]}(.gz); found {sorted(p.name for p in folder.iterdir())[:10]}",
        where=str(folder),
        fix="a 10x folder has matrix.mtx, features.tsv (or genes.tsv) and barcodes.tsv, each also as .gz",
    )


def _read_mtx(folder: Path) -> Screen:
    """A folder in the layout of Cell Ranger: matrix.mtx (genes x cells), features.tsv or genes.tsv, barcodes.tsv."""
    if not folder.is_dir():
        raise UserError("not a folder", where=str(folder), fix="give the folder with matrix.mtx.gz, or another kind")
    matrix, features, barcodes = (
        _beside(folder, "matrix.mtx"),
        _beside(folder, "features.tsv", "genes.tsv"),
        _beside(folder, "barcodes.tsv"),
    )
    try:
        with gzip.open(matrix, "rb") if matrix.suffix == ".gz" else open(matrix, "rb") as handle:
            counts = sp.csr_matrix(scipy.io.mmread(handle).T)
    except (OSError, EOFError, ValueError) as error:
        raise UserError(
            f"cannot be read ({type(error).__name__}: {error})", where=str(matrix), fix="fetch or write the file again"
        ) from error
    table = {"sep": "\t", "header": None, "dtype": str, "keep_default_na": False, "quoting": 3}
    var, cells = pd.read_csv(features, **table), pd.read_csv(barcodes, **table)[0]
    if counts.shape != (len(cells), len(var)):
        raise UserError(
            f"matrix of {counts.shape[1]} features x {counts.shape[0]} cells, but {len(var)} features and {len(cells)} barcodes are named",
            where=str(folder),
            fix="matrix, features and barcodes must come from the same run",
        )
    columns = ["gene_ids", "symbol", "feature_types"][: var.shape[1]]
    var = var.iloc[:, : len(columns)].set_axis(columns, axis=1)
    var.index = pd.Index(var.pop("symbol") if "symbol" in var else var["gene_ids"])
    return Screen(counts, pd.DataFrame(index=pd.Index(cells.to_numpy())), var, str(folder))


# --- cell tables and guides of 10x data --------------------------------------------------------------------------------------


def read_table(path: str | Path, *, index: str | None = None, **options: Any) -> pd.DataFrame:
    """A .csv or .tsv table (also .gz) as text, with `index` as its index."""
    path = Path(path)
    if not path.exists():
        raise UserError("file not found", where=str(path), fix="check the path (relative to the working directory)")
    separator = "," if ".csv" in path.suffixes else "\t"
    try:
        table = pd.read_csv(path, sep=separator, dtype=str, **options)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"cannot be read as a table ({error})", where=str(path), fix="give .csv (comma) or .tsv (tab), also .gz") from error
    if index is None:
        return table
    table.index = pd.Index(require_column(table, index, where=str(path), key="-").astype(str))
    if table.index.has_duplicates:
        twice = table.index[table.index.duplicated()][0]
        raise UserError(f"{index} {twice!r} stands twice", where=str(path), fix=f"give every {index} one row")
    return table


def _with_cells(screen: Screen, config: FileDataset | CatalogueDataset, source: Path) -> Screen:
    """Join the cell table and the guide counts to a 10x matrix; what is no gene leaves the matrix."""
    check_ids(screen)
    table = config.cell_table if isinstance(config, FileDataset) else str(source / "cells.tsv")
    guide_counts = config.guide_counts if isinstance(config, FileDataset) else None
    if table is None and guide_counts is None:
        raise UserError(
            "10x data say nothing about perturbations",
            where=str(source),
            fix="give cell_table (columns cell and perturbation), or guide_counts and guide_table",
        )
    kinds = screen.var["feature_types"].astype(str) if "feature_types" in screen.var else pd.Series("Gene Expression", screen.var.index)
    is_guide = kinds.str.contains("CRISPR", case=False).to_numpy()
    is_gene = (kinds == "Gene Expression").to_numpy()
    if guide_counts == "features":
        if not is_guide.any():
            raise UserError(
                f"no CRISPR Guide Capture features; feature types: {sorted(set(kinds))}",
                where=str(source),
                fix="give the guide counts as a table under guide_counts",
            )
        screen.guides = screen.counts[:, is_guide], _guide_names(screen.var[is_guide], config.guide_table)
    if not is_gene.any():
        raise UserError(f"no Gene Expression features; feature types: {sorted(set(kinds))}", where=str(source), fix="check the file")
    screen.report["features_not_genes"] = int((~is_gene).sum())
    screen.counts, screen.var = screen.counts[:, is_gene], screen.var[is_gene]
    if table is not None:
        _join_cell_table(screen, table)
    if guide_counts not in (None, "features"):
        screen.guides = _read_guide_counts(guide_counts, screen)
    return screen


def _match(mine: pd.Index, theirs: pd.Index, *, where: str, screen: str) -> np.ndarray:
    """Row of each of my cells in another table, -1 where absent. Raises UserError when no cell is found."""
    at = theirs.get_indexer(mine)
    if len(mine) and (at < 0).all():
        bare = mine.str.replace(r"-\d+$", "", regex=True)
        other = theirs.astype(str).str.replace(r"-\d+$", "", regex=True)
        hint = "; they match without the suffix -1" if bare.isin(other).any() else ""
        raise UserError(
            f"0 of {len(mine)} cells of {screen} found{hint}; cells there: {list(mine[:3])}, here: {list(theirs[:3])}",
            where=where,
            fix="write the cell ids as in the barcodes",
        )
    if (missing := int((at < 0).sum())) > 0:
        logger.warning("%s: %d of %d cells of %s found; not found e.g. %s", where, len(mine) - missing, len(mine), screen, mine[at < 0][0])
    return at


def _join_cell_table(screen: Screen, path: str) -> None:
    """Columns of the cell table; cells it does not name are dropped."""
    table = read_table(path, index="cell")
    at = _match(screen.obs.index, table.index, where=path, screen=screen.where)
    screen.report["cells_not_in_cell_table"] = int((at < 0).sum())
    screen.report["cell_table_rows_without_counts"] = int(len(table) - (at >= 0).sum())
    screen.take(at >= 0)
    screen.obs = table.iloc[at[at >= 0]].set_axis(screen.obs.index)


def _guide_names(var: pd.DataFrame, table: str | None) -> list[str]:
    """Names of guide features: by name, or by id where the guide table lists ids or names repeat."""
    names, ids = list(map(str, var.index)), list(map(str, var["gene_ids"])) if "gene_ids" in var else None
    if ids is None or table is None:
        return names
    listed = set(read_table(table, index="guide").index)
    by_name = len(set(names)) == len(names) and all(name in listed for name in names)
    return names if by_name or not all(i in listed for i in ids) else ids


def _read_guide_counts(path: str, screen: Screen) -> tuple[sp.csr_matrix, list[str]]:
    """A cells x guides table of UMI, in the order of the screen's cells; cells that it lacks get no guide."""
    table = read_table(path)
    cells, guides = pd.Index(table.iloc[:, 0].astype(str)), list(map(str, table.columns[1:]))
    if not cells.isin(screen.obs.index).any() and pd.Index(guides).isin(screen.obs.index).any():
        raise UserError("columns are cells", where=path, fix="transpose the table: one row per cell, one column per guide")
    if cells.has_duplicates:
        raise UserError(f"cell {cells[cells.duplicated()][0]!r} stands twice", where=path, fix="give every cell one row")
    at = _match(screen.obs.index, cells, where=path, screen=screen.where)
    try:
        values = sp.csr_matrix(table.iloc[:, 1:].fillna("0").to_numpy().astype(float))
    except ValueError as error:
        raise UserError(
            f"not all values are numbers ({error})", where=path, fix="first column cell, then one column of UMI per guide"
        ) from error
    if (values.data < 0).any() or not (values.data == np.rint(values.data)).all():
        raise UserError("guide counts must be whole numbers of 0 or more", where=path, fix="give raw UMI counts")
    screen.report["cells_without_guide_counts"] = int((at < 0).sum())
    picked = sp.csr_matrix((np.ones((at >= 0).sum()), (np.flatnonzero(at >= 0), at[at >= 0])), shape=(len(at), len(cells)))
    return sp.csr_matrix(picked @ values), guides
