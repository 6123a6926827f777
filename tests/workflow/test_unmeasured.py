"""Perturbations that are not in the data: no outer fold, cells, means and a DE table."""

from __future__ import annotations

import anndata as ad

from dbdiffusion.runtime import contracts


def test_targets_nobody_measured(fresh):
    fresh.snakemake("results/tiny/raw/counts.h5ad")
    counts = ad.read_h5ad(fresh.path / "results/tiny/raw/counts.h5ad")
    perturbed = {part for label in counts.obs["perturbation"].astype(str).unique() for part in label.split("+")}
    gene = next(g for g in counts.var_names if g not in perturbed and not g.startswith("MT-"))
    fresh.snakemake(config={"run": {"targets": [gene, "NOSUCHGENE"]}, "splits": {"scheme": "none"}})

    folder = fresh.path / "results/tiny"
    de = contracts.DE.read(folder / "tables/de.parquet")
    assert set(de["fold"]) == {"all"}
    assert set(de["target"]) == {gene, "NOSUCHGENE"}
    lost = de[de["target"] == "NOSUCHGENE"]
    assert (lost["call"] == "no_call").all()
    assert (lost["reason"].astype(str).str.contains("not_locatable")).all()
    found = de[(de["target"] == gene) & (de["method"] == "dbdiffusion")]
    assert found["estimate"].notna().all()
    assert (folder / "figures/targets.png").exists()
    generated = ad.read_h5ad(folder / "seed1/foldall/dbdiffusion/generated.h5ad")
    assert gene in set(generated.obs["perturbation"])
