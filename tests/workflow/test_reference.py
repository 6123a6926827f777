"""The published design as a preset: one model per held-out target, no cross-fitting, its own error and test."""

from __future__ import annotations

import anndata as ad

from dbdiffusion.runtime import contracts

# The preset as it is, but for sizes and steps that fit a test.
SMALL = {
    "vae": {"hidden": [64, 64], "latent": 16, "max_steps": 60},
    "diffusion": {"widths": [64, 64, 32], "max_steps": 60},
    "generation": {"steps": 20, "cells": 60, "cells_kept": 30},
}


def test_reference_preset_runs(fresh):
    fresh.snakemake("results/tiny/qc/cells.h5ad")
    counts = ad.read_h5ad(fresh.path / "results/tiny/qc/cells.h5ad", backed="r")
    labels = counts.obs["perturbation"].astype(str)
    target = next(label for label in sorted(labels.unique()) if label in counts.var_names)
    # tiny.yaml sets keys of its own, which win over a preset: say the preset's again.
    splits = {"scheme": "leave_one_out", "held_out": [target], "crossfit_folds": 0}
    config = {"protocol": "reference", "splits": splits, **SMALL}
    fresh.snakemake("results/tiny/tables/de.parquet", "results/tiny/tables/scores.parquet", config=config)

    de = contracts.DE.read(fresh.path / "results/tiny/tables/de.parquet")
    assert set(de["fold"]) == {"0"}
    assert set(de["target"]) == {target}
    assert "stacked" not in set(de["method"])
    mine = de[de["method"] == "dbdiffusion"]
    located = mine[mine["estimate"].notna()]
    assert (located["lambda"] == 1).all()
    assert located["p_selection"].isna().all()
    assert (fresh.path / "results/tiny/seed1/fold0/crossfitall/diffusion.safetensors").exists()
