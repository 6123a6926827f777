"""A screen as it comes, in any of the usual formats, made into the workflow's cell file (before quality control)."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from dbdiffusion.config.datasets import CatalogueDataset, Columns, FileDataset
from dbdiffusion.data.catalogue import TABLE, Entry, find, with_entry
from dbdiffusion.data.guides import ASSIGNED, MULTI, assign_guides, guide_targets
from dbdiffusion.data.labels import KEPT, LabelResult, canonical_labels, is_missing, require_column
from dbdiffusion.data.readers import Screen, check_ids, read_screen, read_table
from dbdiffusion.data.sets import CONTROL
from dbdiffusion.runtime.errors import UserError, nearest
from dbdiffusion.runtime.files import atomic_path
from dbdiffusion.runtime.provenance import versions

logger = logging.getLogger(__name__)

BLOCK = 1 << 23
"""Values of a sparse matrix that are checked at a time."""
LARGEST = 1 << 24
"""Larger whole numbers are not exact in float32."""
_SYMBOL_COLUMNS = (
    "gene_symbol",
    "gene_symbols",
    "gene_name",
    "gene_names",
    "symbol",
    "feature_name",
    "gene_short_name",
    "features",
    "name",
)
_ENSEMBL = re.compile(r"ENS[A-Z]{0,4}G\d{11}(\.\d+)?(_PAR_Y)?")
_NUMBER = re.compile(r"[-+]?\d+(\.\d+)?([eE][-+]?\d+)?")


# --- checks --------------------------------------------------------------------------------------------------------------------


def _blocks(values: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(values), BLOCK):
        yield values[start : start + BLOCK]


def _check_counts(screen: Screen) -> None:
    """Counts must be finite whole numbers, not negative, not all zero; they are made exact float32."""
    if 0 in screen.counts.shape:
        raise UserError(
            f"empty matrix ({screen.counts.shape[0]} cells x {screen.counts.shape[1]} genes)", where=screen.where, fix="check the file"
        )
    for values in _blocks(screen.counts.data):
        values = np.asarray(values, dtype=float)
        if not np.isfinite(values).all():
            raise UserError(
                f"{int((~np.isfinite(values)).sum())} counts are NaN or infinite", where=screen.where, fix="give raw UMI counts"
            )
        if (values < 0).any():
            raise UserError(
                f"negative values, e.g. {values[values < 0][0]:.6g}: these are not counts", where=screen.where, fix=_advice(screen)
            )
        off = np.abs(values - np.rint(values)) > 1e-3
        if off.any():
            raise UserError(
                f"values are not whole numbers, e.g. {values[off][0]:.6g}: raw counts are needed, not normalised ones",
                where=screen.where,
                fix=_advice(screen),
            )
        if values.size and values.max() > LARGEST:
            raise UserError(f"count of {values.max():.6g} is beyond {LARGEST}", where=screen.where, fix="check the file")
    exact = screen.counts.data.astype(np.float32, copy=False)
    np.rint(exact, out=exact)
    counts = sp.csr_matrix((exact, screen.counts.indices, screen.counts.indptr), screen.counts.shape)
    counts.sum_duplicates()
    counts.eliminate_zeros()
    if counts.nnz == 0:
        raise UserError("all counts are zero", where=screen.where, fix="check the file")
    screen.counts = counts


def _advice(screen: Screen) -> str:
    layers = screen.integer_layers()
    if layers:
        return f"raw counts seem to be in {', '.join(map(repr, layers))}: set layer: {layers[0]}"
    return (
        "give raw UMI counts (no matrix of this file holds whole numbers)" if screen.integer_layers is not list else "give raw UMI counts"
    )


# --- genes -----------------------------------------------------------------------------------------------------------------------


def _most(names: Iterable[str], pattern: re.Pattern[str]) -> bool:
    fits = [bool(pattern.fullmatch(name)) for name in names]
    return sum(fits) > 0.5 * len(fits)


def _gene_table(screen: Screen) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Gene symbols as index, unique; `mito` flag and gene ids where there are any."""
    var, report = screen.var, {}
    names = pd.Index(var.index.astype(str))
    ids = None
    if _most(names, _ENSEMBL) or _most(names, _NUMBER):
        ids, kind = names, "Ensembl ids" if _most(names, _ENSEMBL) else "numbers"
        column = next((c for c in _SYMBOL_COLUMNS if c in var.columns and not _most(var[c].astype(str), _NUMBER)), None)
        if column is None:
            raise UserError(
                f"gene names are {kind} ({', '.join(names[:3])}) and var has no column of symbols; columns: {list(map(str, var.columns))}",
                where=screen.where,
                fix=f"use gene symbols as var_names, or add a var column {_SYMBOL_COLUMNS[0]!r}",
            )
        report["gene_symbols_from"] = column
        names = pd.Index([i if is_missing(s) else str(s).strip() for s, i in zip(var[column], names, strict=True)])
    elif "gene_ids" in var.columns:
        ids = pd.Index(var["gene_ids"].astype(str))
    if empty := int((names.str.strip() == "").sum()):
        raise UserError(f"{empty} genes have an empty name", where=screen.where, fix="name every gene")
    names, report["duplicate_gene_symbols"] = _unique(names, np.asarray(screen.counts.sum(axis=0)).ravel())
    table = pd.DataFrame(index=pd.Index(names, name=None))
    if ids is not None:
        table["gene_id"] = ids.to_numpy(dtype=object)
    if (flag := next((c for c in ("mito", "mt") if c in var.columns), None)) is not None:
        table["mito"] = np.isin(var[flag].astype(str).str.casefold(), ("true", "1", "1.0"))
    return table, report


def _unique(names: pd.Index, totals: np.ndarray) -> tuple[pd.Index, list[str]]:
    """Repeated symbols get -1, -2, ...; the one with most counts keeps the plain name, since the others are often empty."""
    if not names.has_duplicates:
        return names, []
    out, taken = np.array(names, dtype=object), set(names)
    repeated = sorted(set(names[names.duplicated()]))
    for name in repeated:
        at = np.flatnonzero(names == name)
        number = 0
        for i in at[np.argsort(-totals[at], kind="stable")][1:]:
            number += 1
            while f"{name}-{number}" in taken:
                number += 1
            out[i] = f"{name}-{number}"
            taken.add(out[i])
    return pd.Index(out), repeated


# --- cells -----------------------------------------------------------------------------------------------------------------------


def _text(values: pd.Series) -> np.ndarray:
    """Text of a column; empty where a value is missing; 1.0 as 1, as a reader of .csv would have it."""
    if pd.api.types.is_float_dtype(values) and (values.dropna() % 1 == 0).all():
        values = values.astype("Int64")
    return np.array(["" if is_missing(value) else str(value).strip() for value in values.astype(object)], dtype=object)


def _label_cells(screen: Screen, config: FileDataset | CatalogueDataset, genes: pd.Index) -> tuple[LabelResult, np.ndarray | None]:
    """Canonical labels, and the guides where they were counted."""
    columns = config.columns
    if screen.guides is None:
        raw = require_column(screen.obs, columns.perturbation, where=screen.where, key="columns.perturbation")
        return canonical_labels(raw, config.labels, genes=set(genes), where=f"{screen.where}, column {columns.perturbation!r}"), None
    counts, names = screen.guides
    if config.guide_table is None:
        raise UserError(
            "guides were counted, but nothing says what they target",
            where=screen.where,
            fix="give guide_table (columns guide, perturbation)",
        )
    table = read_table(config.guide_table, index="guide", keep_default_na=False)
    meaning = require_column(table, "perturbation", where=config.guide_table, key="guide_table")
    targets = guide_targets(names, meaning.to_dict(), config.labels, genes=set(genes), where=config.guide_table)
    cells, report = assign_guides(counts, names, targets, config.guide_assignment)
    screen.report["guide_assignment"] = report
    if not (cells["perturbation"] == CONTROL).any() or not (cells.loc[cells["status"] == ASSIGNED, "perturbation"] != CONTROL).any():
        raise UserError(
            f"of {len(cells)} cells, {report['assigned']} were assigned, {report['multi']} carry several guides; "
            f"there must be both control and perturbed cells",
            where=screen.where,
            fix="check labels.control against the guide table, and guide_assignment.min_counts and min_share",
        )
    status = cells["status"].map({ASSIGNED: KEPT, MULTI: "multi_guide"}).fillna("unassigned").to_numpy(dtype=object)
    names_of_cells = cells["perturbation"].to_numpy(dtype=object)
    summary = {f"cells_{key}": int((status == key).sum()) for key in ("kept", "unassigned", "multi_guide")}
    summary |= {"cells": len(cells), "cells_control": int((names_of_cells == CONTROL).sum())}
    return LabelResult(names_of_cells, status, summary), cells["guide"].to_numpy(dtype=object)


def _library_size(screen: Screen, columns: Columns) -> np.ndarray:
    """Total counts of each cell: the named column, or the sum over the file's genes."""
    sums = np.asarray(screen.counts.sum(axis=1, dtype=np.float64)).ravel()
    if columns.library_size is None:
        return sums
    where = f"{screen.where}, column {columns.library_size!r}"
    raw = require_column(screen.obs, columns.library_size, where=screen.where, key="columns.library_size")
    total = pd.to_numeric(raw.astype(object), errors="coerce").to_numpy(dtype=float)
    fix = "choose another column for columns.library_size, or leave it out to sum over the file's genes"
    if not np.isfinite(total).all():
        raise UserError(
            f"{int((~np.isfinite(total)).sum())} of {len(total)} library sizes are missing or not numbers", where=where, fix=fix
        )
    less = total < sums - 0.5
    if less.any():
        first = np.flatnonzero(less)[0]
        raise UserError(
            f"{int(less.sum())} of {len(total)} library sizes are smaller than the cell's counts in this file, e.g. cell "
            f"{screen.obs.index[first]!r}: {total[first]:.6g} < {sums[first]:.6g}",
            where=where,
            fix=fix,
        )
    return total


def _batch(screen: Screen, columns: Columns) -> np.ndarray:
    if columns.batch is None:
        return np.full(len(screen.obs), "0", dtype=object)
    batch = _text(require_column(screen.obs, columns.batch, where=screen.where, key="columns.batch"))
    if (missing := int((batch == "").sum())) > 0:
        raise UserError(
            f"{missing} cells have no batch",
            where=f"{screen.where}, column {columns.batch!r}",
            fix="fill the column, or leave columns.batch out",
        )
    return batch


def _of_modality(screen: Screen, config: FileDataset | CatalogueDataset, labelled: LabelResult) -> tuple[np.ndarray, dict[str, Any]]:
    """Cells of the modality that is analysed, and how many cells each has. Control cells without a modality belong to every one."""
    column = config.columns.modality
    if column is None:
        if config.modality is not None:
            fix = "name the column with the modality under columns.modality, or remove modality"
            raise UserError(f"modality {config.modality!r}, but no column says which cells have it", where=screen.where, fix=fix)
        return np.ones(len(screen.obs), dtype=bool), {}
    where = f"{screen.where}, column {column!r}"
    values = _text(require_column(screen.obs, column, where=screen.where, key="columns.modality"))
    labelled_cells, control = labelled.status == KEPT, labelled.names == CONTROL
    perturbed = labelled_cells & ~control
    if (missing := int((perturbed & (values == "")).sum())) > 0:
        raise UserError(f"{missing} perturbed cells have no modality", where=where, fix="fill the column, or leave columns.modality out")
    found = sorted(set(values[perturbed]))
    if config.modality is None and len(found) > 1:
        fix = f"add modality: {found[0]} to the dataset, and a block of its own for each of the others"
        raise UserError(f"several modalities ({', '.join(found)}), which must not be averaged", where=where, fix=fix)
    wanted = config.modality or (found[0] if found else "")
    if wanted not in found:
        raise UserError(f"no perturbed cell has modality {wanted!r}", where=where, fix=nearest(wanted, found))
    cells = {value or "none": int((labelled_cells & (values == value)).sum()) for value in sorted(set(values[labelled_cells]))}
    return (values == wanted) | (control & (values == "")), {"modality": wanted, "cells_by_modality": cells}


def _declared_numbers(screen: Screen, names: np.ndarray) -> dict[str, int]:
    """Compare with the number of perturbations that scPerturb files state for each cell (`nperts`)."""
    if "nperts" not in screen.obs.columns:
        return {}
    stated = pd.to_numeric(screen.obs["nperts"].astype(object), errors="coerce").to_numpy(dtype=float)
    found = np.array([np.nan if not name else 0 if name == CONTROL else name.count("+") + 1 for name in names])
    both = np.isfinite(stated) & np.isfinite(found)
    differ = int((stated[both] != found[both]).sum())
    if differ:
        logger.warning("%s: column nperts disagrees with the label in %d of %d cells", screen.where, differ, int(both.sum()))
    return {"cells_nperts_disagrees": differ}


# --- the stage -------------------------------------------------------------------------------------------------------------------


def ingest(config: FileDataset | CatalogueDataset, *, source: str | Path, catalogue: str | Path = TABLE) -> ad.AnnData:
    """Read and check a screen; returns it in the layout of the cell file.

    X: CSR float32 of whole numbers; obs (index cell ids): perturbation, guide, batch (categories), total_counts (float64,
    full library); var (index unique gene symbols): gene_id and mito where known; uns: provenance (dict of text) and ingest
    (JSON text: what was dropped, and why). Cells that are unassigned, dropped by label, multi-guide, of
    another modality or without any count are left out.

    Raises UserError, naming file and column, for whatever is not a screen of counts with labels.
    """
    screen = read_screen(config, source)
    check_ids(screen)
    _check_counts(screen)
    entry, absent = None, []
    if isinstance(config, CatalogueDataset):
        entry = find(catalogue, config.name, config.version)
        config, absent = with_entry(config, entry, set(map(str, screen.obs.columns)))
        if absent:
            logger.warning("%s: no column(s) %s, named by the datasets table; going on without", screen.where, absent)
    var, gene_report = _gene_table(screen)
    labelled, guide = _label_cells(screen, config, var.index)
    if guide is None:
        column = config.columns.guide
        guide = (
            _text(require_column(screen.obs, column, where=screen.where, key="columns.guide"))
            if column
            else np.full(len(screen.obs), "", dtype=object)
        )
    obs = pd.DataFrame(
        {
            "perturbation": labelled.names,
            "guide": guide,
            "batch": _batch(screen, config.columns),
            "total_counts": _library_size(screen, config.columns),
        },
        index=screen.obs.index,
    )
    empty = obs["total_counts"].to_numpy() <= 0
    of_modality, modality_report = _of_modality(screen, config, labelled)
    keep = (labelled.status == KEPT) & ~empty & of_modality
    report = {
        **screen.report,
        **gene_report,
        "labels": labelled.report,
        **modality_report,
        **_declared_numbers(screen, labelled.names),
        "cells_without_counts": int(((labelled.status == KEPT) & empty).sum()),
        "columns_not_found": absent,
        "cells_read": len(obs),
        "cells": int(keep.sum()),
        "genes": len(var),
        "perturbed_genes": _measured(obs.loc[keep, "perturbation"], var.index),
    }
    obs = obs[keep].copy()
    for name in ("perturbation", "guide", "batch"):
        obs[name] = pd.Categorical(obs[name], categories=sorted(set(obs[name])))
    counts = screen.counts if keep.all() else screen.counts[np.flatnonzero(keep)]
    counts.sort_indices()
    uns = {"provenance": _provenance(config, Path(source), entry), "ingest": json.dumps(report, sort_keys=True)}
    return ad.AnnData(X=counts, obs=obs, var=var, uns=uns)


def _measured(perturbations: pd.Series, genes: pd.Index) -> dict[str, int]:
    """How many perturbed genes are among the measured ones."""
    perturbed = sorted({gene for name in perturbations.unique() if name != CONTROL for gene in name.split("+")})
    return {"all": len(perturbed), "measured": int(pd.Index(perturbed).isin(genes).sum())}


def _provenance(config: FileDataset | CatalogueDataset, source: Path, entry: Entry | None) -> dict[str, str]:
    record = {
        "source": source.name,
        "config": config.model_dump_json(exclude={"features", "path"}),
        **{f"version_{name}": version for name, version in versions("anndata", "scanpy").items()},
    }
    if entry is not None:
        record |= {
            "dataset": entry.name,
            "dataset_version": entry.version,
            "address": entry.address,
            "licence": entry.licence,
            "citation": entry.citation,
        }
    return record


def write_ingested(config: FileDataset | CatalogueDataset, *, source: str | Path, out: str | Path, catalogue: str | Path = TABLE) -> None:
    """Ingest a screen and write it as .h5ad (gzip). source: the file or folder of a local dataset, or the downloaded
    (and, for a Seurat object, converted) one of a catalogue row. Raises UserError as `ingest` does."""
    data = ingest(config, source=source, catalogue=catalogue)
    report = json.loads(data.uns["ingest"])
    logger.info(
        "%s: %d of %d cells, %d genes; labels: %s", source, report["cells"], report["cells_read"], report["genes"], report["labels"]
    )
    with atomic_path(out) as temporary:
        data.write_h5ad(temporary, compression="gzip")
