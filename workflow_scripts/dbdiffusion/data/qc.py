"""Quality control: which cells and perturbations go on, with what was dropped and why.

Cells are judged one by one against fixed thresholds, so that no held-out cell decides about another. Genes are not selected here (only
mitochondrial and duplicate ones go): the selection belongs to each fold's panel, which sees training cells alone.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from dbdiffusion.config.qc import QcConfig
from dbdiffusion.data.normalise import OBS_COLUMNS, TARGET_SUM
from dbdiffusion.data.sets import CONTROL
from dbdiffusion.runtime.errors import UserError
from dbdiffusion.runtime.files import atomic_path, write_json
from dbdiffusion.runtime.provenance import versions
from dbdiffusion.runtime.seeds import rng
from dbdiffusion.runtime.tables import Column, Table

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)

CONTROL_FACTOR = 10
"""The control may keep this many times max_cells_per_perturbation."""

ON_TARGET = Table(
    "on_target",
    "Expression of each perturbation's own gene against control, one row per measured gene of the perturbation. "
    "A report only: nothing is selected by it.",
    [
        Column("perturbation", "str", "", "perturbation"),
        Column("gene", "str", "", "its gene (each measured gene of a combination)"),
        Column("n_cells", "int", "cells", "cells of the perturbation"),
        Column("control_mean", "float", "counts per 10,000", "mean of control cells"),
        Column("mean", "float", "counts per 10,000", "mean of the perturbation's cells"),
        Column("log2_fold_change", "float", "log2", "of the means; missing where one of them is 0", missing=True),
        Column("share_of_control", "float", "", "mean / control_mean; missing where the control has none", missing=True),
        Column("p", "float", "", "two-sided Mann-Whitney test of counts per 10,000 against control cells"),
    ],
    ("perturbation", "gene"),
)


def write_qc(*, counts: str | Path, config: QcConfig, cells: str | Path, summary: str | Path, on_target: str | Path) -> None:
    """Filter the cells and perturbations of a screen.

    counts: raw counts in the layout of cells.h5ad. Writes cells.h5ad, what was kept and dropped (summary, JSON), and table `on_target`.

    Raises UserError when X holds no raw counts, and when too few control cells or perturbations are left.
    """
    import anndata

    table = anndata.read_h5ad(counts)
    _check(table, str(counts))
    metrics = cell_metrics(table)
    reason = _cell_reasons(metrics, config)
    labels = table.obs["perturbation"].to_numpy(dtype=object)
    reason, dropped = _perturbation_reasons(labels, reason, config)
    reason = _subset(labels, reason, config)
    keep = reason == ""
    _enough(labels, reason, dropped, config, str(counts))
    genes, gene_counts = _genes(table, config)
    kept = _layout(table[keep, genes], config)
    with atomic_path(cells) as temporary:
        kept.write_h5ad(temporary, compression="gzip")
    ON_TARGET.write(on_target_effects(kept), on_target)
    record = _summary(labels, table.obs["guide"].to_numpy(dtype=object), reason, dropped, metrics, gene_counts, config)
    write_json(summary, record)
    logger.info("kept %d of %d cells, %d perturbations, %d genes", keep.sum(), len(keep), len(record["perturbations"]["kept"]), kept.n_vars)


def _check(table: AnnData, where: str) -> None:
    """Raw counts, CSR, and the columns of the layout."""
    absent = [column for column in OBS_COLUMNS if column not in table.obs]
    if absent:
        raise UserError(f"obs column(s) {absent} missing", where=where, fix="name the columns under datasets.<name>.columns")
    table.X = sparse.csr_matrix(table.X)
    table.obs = table.obs[list(OBS_COLUMNS)].astype(dict.fromkeys(OBS_COLUMNS[:3], str))
    data = table.X.data
    if len(data) and ((data < 0).any() or (data != np.rint(data)).any()):
        raise UserError(
            "X holds values that are no raw counts", where=where, fix="give raw counts, or name their layer under datasets.<name>.layer"
        )


def mito_genes(table: AnnData) -> np.ndarray:
    """(G,) which genes are mitochondrial: var column `mito` where there is one, else symbols MT-*."""
    if "mito" in table.var:
        return table.var["mito"].to_numpy(dtype=bool)
    return table.var_names.str.upper().str.startswith("MT-").astype(bool)


def cell_metrics(table: AnnData) -> pd.DataFrame:
    """Per cell: total_counts (library over the whole transcriptome), genes detected, mito_share of that library."""
    import scanpy as sc

    bare = sc.AnnData(
        table.X, obs=pd.DataFrame(index=table.obs_names), var=pd.DataFrame({"mito": mito_genes(table)}, index=table.var_names)
    )
    found, _ = sc.pp.calculate_qc_metrics(bare, qc_vars=["mito"], percent_top=None, log1p=False, inplace=False)
    total = table.obs["total_counts"].to_numpy(dtype=float)
    # Measured genes may be a few of all: shares are of the whole library, not of the file's counts.
    mito = found["total_counts_mito"].to_numpy(dtype=float)
    share = np.divide(mito, total, out=np.zeros_like(total), where=total > 0)
    return pd.DataFrame({"total_counts": total, "genes": found["n_genes_by_counts"].to_numpy(), "mito_share": share}, index=table.obs_names)


def _cell_reasons(metrics: pd.DataFrame, config: QcConfig) -> np.ndarray:
    """(cells,) the first filter that a cell fails, else ""."""
    total = metrics["total_counts"].to_numpy()
    checks = {
        "no_counts": ~(total > 0) | ~np.isfinite(total),
        "few_counts": total < config.min_counts_per_cell,
        "few_genes": metrics["genes"].to_numpy() < config.min_genes_per_cell,
        "mito_share": metrics["mito_share"].to_numpy() > config.max_mito_share,
    }
    return np.select(list(checks.values()), list(checks), default="").astype(object)


def _perturbation_reasons(labels: np.ndarray, reason: np.ndarray, config: QcConfig) -> tuple[np.ndarray, dict[str, int]]:
    """Drop perturbations with too few good cells; the numbers of good cells that they had."""
    left = pd.Series(labels[reason == ""]).value_counts()
    everyone = sorted(set(labels) - {CONTROL})
    dropped = {name: int(left.get(name, 0)) for name in everyone if left.get(name, 0) < config.min_cells_per_perturbation}
    few = np.isin(labels.astype(str), np.array(list(dropped), dtype=str))
    return np.where((reason == "") & few, "few_cells_of_perturbation", reason).astype(object), dropped


def _subset(labels: np.ndarray, reason: np.ndarray, config: QcConfig) -> np.ndarray:
    """Drop cells of large perturbations beyond the maximum, at random; seeded by label, so that one label's subset is its own."""
    limit = config.max_cells_per_perturbation
    if limit is None:
        return reason
    reason = reason.copy()
    for name, rows in sorted(pd.Series(np.flatnonzero(reason == "")).groupby(labels[reason == ""])):
        most = limit * (CONTROL_FACTOR if name == CONTROL else 1)
        if len(rows) > most:
            surplus = rng(0, "qc subset", name).permutation(len(rows))[most:]
            reason[rows.to_numpy()[surplus]] = "subset"
    return reason


def _enough(labels: np.ndarray, reason: np.ndarray, dropped: dict[str, int], config: QcConfig, where: str) -> None:
    """Raise UserError unless there are control cells and at least two perturbations to learn from."""
    before, kept = int((labels == CONTROL).sum()), labels[reason == ""]
    controls, perturbations = int((kept == CONTROL).sum()), len(set(kept) - {CONTROL})
    if controls < config.min_cells_per_perturbation:
        lost = pd.Series(reason[(labels == CONTROL) & (reason != "")]).value_counts().to_dict()
        least = config.min_cells_per_perturbation
        raise UserError(
            f"{controls} of {before} control cells pass the filters (dropped: {lost or 'none'}), at least {least} are needed",
            where=where,
            fix="name the control labels under datasets.<name>.labels.control" + (", or loosen the filters under qc" if before else ""),
        )
    if perturbations < 2:
        most = sorted(dropped.items(), key=lambda item: (-item[1], item[0]))[:5]
        raise UserError(
            f"{perturbations} perturbation(s) left, at least 2 are needed; dropped for too few cells: {len(dropped)} (largest: {most})",
            where=where,
            fix=f"lower qc.min_cells_per_perturbation (now {config.min_cells_per_perturbation}) or loosen the cell filters",
        )


def _genes(table: AnnData, config: QcConfig) -> tuple[np.ndarray, dict[str, int]]:
    """(G,) genes kept, and how many were dropped why. Of genes with the same symbol the first stays."""
    duplicate = table.var_names.duplicated()
    mito = mito_genes(table) & ~duplicate if config.drop_mito_genes else np.zeros(table.n_vars, dtype=bool)
    keep = ~duplicate & ~mito
    return keep, {
        "input": table.n_vars,
        "kept": int(keep.sum()),
        "dropped_mito": int(mito.sum()),
        "dropped_duplicate": int(duplicate.sum()),
    }


def _layout(view: AnnData, config: QcConfig) -> AnnData:
    """The layout of cells.h5ad, with the settings of this stage added to the provenance."""
    import anndata

    provenance = {str(key): str(value) for key, value in dict(view.uns.get("provenance", {})).items()}
    provenance["qc"] = config.model_dump_json()
    provenance["version_scanpy"] = versions("scanpy")["scanpy"]
    obs = view.obs.astype({"total_counts": float})
    matrix = sparse.csr_matrix(view.X, dtype=np.float32)
    matrix.sort_indices()
    return anndata.AnnData(matrix, obs=obs, var=pd.DataFrame(index=view.var_names.astype(str)), uns={"provenance": provenance})


def on_target_effects(table: AnnData) -> pd.DataFrame:
    """Rows of table `on_target` for cells in the layout of cells.h5ad."""
    from scipy.stats import mannwhitneyu

    labels = table.obs["perturbation"].to_numpy(dtype=object)
    scale = TARGET_SUM / table.obs["total_counts"].to_numpy(dtype=float)
    genes = sorted({gene for name in set(labels) - {CONTROL} for gene in name.split("+") if gene in table.var_names})
    columns = sparse.csc_matrix(table.X[:, table.var_names.get_indexer(genes)])
    rows_of = pd.Series(np.arange(len(labels))).groupby(labels).indices
    records = []
    for at, gene in enumerate(genes):
        values = columns[:, [at]].toarray().ravel() * scale
        control = values[rows_of[CONTROL]]
        for name in sorted(name for name in rows_of if gene in name.split("+")):
            own = values[rows_of[name]]
            # With all cells alike (as in a gene without counts) there is nothing to rank.
            constant = own.min() == own.max() == control.min() == control.max()
            p = 1.0 if constant else float(mannwhitneyu(own, control, method="asymptotic").pvalue)
            records.append((name, gene, len(own), control.mean(), own.mean(), p))
    frame = pd.DataFrame(records, columns=["perturbation", "gene", "n_cells", "control_mean", "mean", "p"])
    frame = frame.astype({"perturbation": object, "gene": object, "n_cells": np.int64, "control_mean": float, "mean": float, "p": float})
    control_mean, mean = frame["control_mean"].where(frame["control_mean"] > 0), frame["mean"].where(frame["mean"] > 0)
    frame["share_of_control"] = frame["mean"] / control_mean
    frame["log2_fold_change"] = np.log2(mean / control_mean)
    return frame.sort_values(["perturbation", "gene"], ignore_index=True)


def _summary(
    labels: np.ndarray,
    guides: np.ndarray,
    reason: np.ndarray,
    dropped: dict[str, int],
    metrics: pd.DataFrame,
    genes: dict[str, int],
    config: QcConfig,
) -> dict[str, Any]:
    """What was kept and dropped, as it goes to summary.json."""
    keep = reason == ""
    per = pd.Series(labels[keep & (labels != CONTROL)]).value_counts()
    kept = sorted(per.index)
    controls = pd.Series(guides[keep & (labels == CONTROL)]).value_counts()
    before = pd.Series(labels).value_counts()
    quantiles = {"min": 0, "q25": 0.25, "median": 0.5, "q75": 0.75, "max": 1}
    return {
        "cells": {
            "input": len(labels),
            "kept": int(keep.sum()),
            "dropped": {name: int(n) for name, n in pd.Series(reason[~keep]).value_counts().items()},
        },
        "genes": genes,
        "perturbations": {
            "input": len(set(labels) - {CONTROL}),
            "kept": kept,
            "singles": sum("+" not in name for name in kept),
            "combinations": sum("+" in name for name in kept),
            "dropped": {
                name: {
                    "cells_input": int(before[name]),
                    "cells_passed": n,
                    "reason": f"fewer than {config.min_cells_per_perturbation} cells pass the filters",
                }
                for name, n in dropped.items()
            },
        },
        "cells_per_perturbation": {name: float(per.quantile(q)) for name, q in quantiles.items()},
        "control": {"input": int(before.get(CONTROL, 0)), "kept": int(controls.sum()), "guides": {g: int(n) for g, n in controls.items()}},
        "before": _medians(metrics),
        "after": _medians(metrics[keep]),
        "thresholds": json.loads(config.model_dump_json()),
    }


def _medians(metrics: pd.DataFrame) -> dict[str, float]:
    return {f"median_{column}": float(metrics[column].median()) for column in metrics}
