"""A copy of a screen in which no perturbation has any effect: labels permuted over the cells of a batch."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from dbdiffusion.data.normalise import OBS_COLUMNS
from dbdiffusion.runtime.files import atomic_path
from dbdiffusion.runtime.seeds import rng

logger = logging.getLogger(__name__)

LABELS = ["perturbation", "guide"]


def permutation_within(batch: np.ndarray, seed: int) -> np.ndarray:
    """(cells,) for each cell the cell of the same batch whose labels it gets; a permutation, the same whatever order batches have."""
    batch = np.asarray(batch, dtype=str)
    order = np.arange(len(batch))
    for name in np.unique(batch):
        rows = np.flatnonzero(batch == name)
        order[rows] = rng(seed, "permute_labels", name).permutation(rows)
    return order


def write_permuted(cells: str | Path, seed: int, out: str | Path) -> None:
    """Write cells.h5ad with perturbation and guide of every cell, control cells included, permuted together within batch.

    Every label keeps its number of cells in every batch, and every cell its counts, library size and batch. What a perturbation
    of this screen seems to do is noise of its cells.
    """
    import anndata

    table = anndata.read_h5ad(cells)
    obs = table.obs[list(OBS_COLUMNS)].astype(dict.fromkeys(OBS_COLUMNS[:3], str))
    order = permutation_within(obs["batch"].to_numpy(), seed)
    for column in LABELS:
        obs[column] = obs[column].to_numpy()[order]
    provenance = {**dict(table.uns.get("provenance", {})), "labels": f"permuted within batch, seed {seed}"}
    made = anndata.AnnData(table.X, obs=obs, var=table.var, uns={"provenance": provenance})
    with atomic_path(out) as temporary:
        made.write_h5ad(temporary, compression="gzip")
    moved = float((obs["perturbation"].to_numpy() != table.obs["perturbation"].astype(str).to_numpy()).mean())
    logger.info("%d cells in %d batch(es), %.1f %% have another perturbation", len(obs), obs["batch"].nunique(), 100 * moved)
