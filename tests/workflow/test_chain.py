"""The whole chain on a tiny screen: what comes out, and what makes it run again."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import zipfile
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from dbdiffusion.runtime import contracts

RESULTS = "results/tiny"


def digests(folder: Path, names: list[str]) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def planned(output: str) -> set[str]:
    """Rules of a dry run's job table."""
    table = output.split("Job stats:")[1].split("total")[0]
    return set(re.findall(r"^(\w+)\s+\d+\s*$", table, flags=re.M)) - {"all"}


def test_every_contract_is_written_and_valid(finished):
    folder = finished.path / RESULTS
    for name in ("de", "scores", "calibration", "compute"):
        assert len(contracts.CONTRACTS[name].read(folder / f"tables/{name}.parquet")) > 0
    de = contracts.DE.read(folder / "tables/de.parquet")
    panel = set(de["gene"])
    assert {"dbdiffusion", "neighbour_mean", "training_mean", "stacked"} <= set(de["method"])
    # Every held-out perturbation is tested in one fold, on every gene of its panel.
    assert de.groupby(["target", "gene"], observed=True)["fold"].nunique().max() == 1
    assert len(panel) > 100
    generated = ad.read_h5ad(folder / "seed1/fold0/dbdiffusion/generated.h5ad")
    assert np.isfinite(generated.X).all()
    assert set(generated.obs["role"]) >= {"target", "pseudo", "control"}


def test_every_check_of_the_error_rates_is_made(finished):
    table = contracts.CALIBRATION.read(finished.path / RESULTS / "tables/calibration.parquet")
    checks = set(table["check"])
    assert {"coverage", "fdr", "power", "equivalence", "control_guides_p", "shuffled_effects_calls", "doubling_calls"} <= checks
    assert {"permuted_labels_calls", "permuted_labels_ks", "fdr_truth", "coverage_truth"} <= checks
    # The copy with permuted labels has the same cells under other labels, and goes as far as the tests of one fold.
    copy = finished.path / f"{RESULTS}_permuted"
    assert {p.name for p in copy.iterdir()} - {"scratch"} == {"qc", "seed1"}
    assert {p.name for p in (copy / "seed1").glob("fold*")} == {"fold0"}
    counts = [ad.read_h5ad(folder / "qc/cells.h5ad").obs["perturbation"].value_counts() for folder in (finished.path / RESULTS, copy)]
    assert counts[0].sort_index().equals(counts[1].sort_index())
    # Of the doubled cells only the means stay.
    assert not list((finished.path / RESULTS).rglob("doubled/generated.h5ad"))


def test_costly_checks_can_be_switched_off(fresh):
    off = {"calibration": {"permuted_labels": False, "doubled_cells": False}}
    assert {"permute_labels", "generate_doubled", "merge_doubled"} <= planned(fresh.snakemake("--dry-run").stdout)
    rules = planned(fresh.snakemake("--dry-run", config=off).stdout)
    assert "calibration" in rules
    assert not rules & {"permute_labels", "generate_doubled", "merge_doubled"}


def test_targets_that_cannot_be_located_say_so(finished):
    de = contracts.DE.read(finished.path / RESULTS / "tables/de.parquet")
    absent = de[de["call"] == "no_call"]
    assert len(absent)
    assert (absent["reason"].astype(str) != "").all()
    assert (de.loc[de["call"] != "no_call", "reason"].astype(str) == "").all()


def test_nothing_to_be_done_twice(finished):
    assert "Nothing to be done" in finished.snakemake("--dry-run").stdout


def test_scratch_is_gone(finished):
    scratch = finished.path / RESULTS / "scratch"
    assert not [p for p in scratch.rglob("*") if p.is_file()]


def test_library_edit_reruns_what_depends_on_it(finished):
    module = finished.path / "workflow_scripts/dbdiffusion/generative/vae.py"
    before = module.read_text()
    try:
        module.write_text(before + "\n\n_EDITED = True\n")
        rules = planned(finished.snakemake("--dry-run").stdout)
    finally:
        module.write_text(before)
    assert {"train_vae", "train_diffusion", "generate", "merge_generated", "test_de", "score"} <= rules
    assert not rules & {"simulate_screen", "qc", "splits", "moments", "effects", "locate", "embedding", "baselines"}


def test_comment_in_the_library_reruns_nothing(finished):
    module = finished.path / "workflow_scripts/dbdiffusion/data/qc.py"
    before = module.read_text()
    try:
        module.write_text(before + "\n# a comment\n")
        assert "Nothing to be done" in finished.snakemake("--dry-run").stdout
    finally:
        module.write_text(before)


def test_config_edit_reruns_its_block_alone(finished):
    rules = planned(finished.snakemake("--dry-run", config={"inference": {"q": 0.2}}).stdout)
    assert "test_de" in rules
    assert not rules & {"qc", "train_vae", "train_diffusion", "generate", "baselines"}


def test_report(finished):
    finished.snakemake("--report", "results/report.zip")
    with zipfile.ZipFile(finished.path / "results/report.zip") as archive:
        names = archive.namelist()
    assert "report/report.html" in names
    assert sum(name.endswith(".png") for name in names) >= 8


def test_same_bytes_from_the_same_seed(finished, fresh):
    """And whether a job trains one model or all of a fold."""
    wanted, one_job = [f"{RESULTS}/seed1/fold0/de.parquet"], {"run": {"side_by_side": True}}
    assert "rule compute:" in fresh.snakemake("--dry-run", config=one_job).stdout
    done = fresh.snakemake(*wanted, cores=1, config=one_job)
    assert (done.stderr + done.stdout).count("rule train_vae:") == 1
    assert "Nothing to be done" in fresh.snakemake(*wanted, "--dry-run", config=one_job).stdout
    assert not [path for path in (fresh.path / RESULTS / "scratch").rglob("*") if path.is_file()]
    names = [
        "seed1/splits.json",
        "seed1/fold0/effects.parquet",
        "seed1/fold0/locations.parquet",
        "seed1/fold0/crossfit0/vae.safetensors",
        "seed1/fold0/crossfit0/diffusion.safetensors",
        "seed1/fold0/dbdiffusion/means.parquet",
        "seed1/fold0/de.parquet",
    ]
    assert digests(fresh.path / RESULTS, names) == digests(finished.path / RESULTS, names)


def test_garbage_in_the_targets_counts_changes_nothing(finished, fresh):
    """The leak test: a held-out target's counts are replaced before QC; its prediction must not change by a bit."""
    de = contracts.DE.read(finished.path / RESULTS / "tables/de.parquet")
    first = de[(de["fold"] == "0") & (de["method"] == "dbdiffusion") & de["estimate"].notna()]
    target = sorted(t for t in first["target"].astype(str).unique() if "+" not in t)[0]

    raw = finished.path / RESULTS / "raw"
    shutil.copytree(raw, fresh.path / RESULTS / "raw")
    counts = ad.read_h5ad(raw / "counts.h5ad")
    rows = np.flatnonzero((counts.obs["perturbation"] == target).to_numpy())
    garbage = np.random.default_rng(0).poisson(3.0, size=(len(rows), counts.n_vars)).astype(np.float32)
    dense = counts.X.toarray()
    assert not np.array_equal(dense[rows], garbage)
    dense[rows] = garbage
    counts.X = type(counts.X)(dense)
    counts.obs["total_counts"] = counts.obs["total_counts"].where(
        counts.obs["perturbation"] != target, pd.Series(dense.sum(1) * 1.5, index=counts.obs_names)
    )
    counts.write_h5ad(fresh.path / RESULTS / "raw/counts.h5ad", compression="gzip")
    fresh.snakemake("--touch", f"{RESULTS}/raw/counts.h5ad")

    fresh.snakemake(f"{RESULTS}/seed1/fold0/de.parquet")
    altered = ad.read_h5ad(fresh.path / RESULTS / "qc/cells.h5ad")
    assert (altered.obs["perturbation"] == target).sum() == len(rows), "the garbage cells must reach the analysis"
    names = [
        "seed1/fold0/effects.parquet",
        "seed1/fold0/locations.parquet",
        "seed1/fold0/crossfit0/embedding.parquet",
        "seed1/fold0/crossfit1/vae.safetensors",
        "seed1/fold0/crossfit1/diffusion.safetensors",
        "seed1/fold0/dbdiffusion/means.parquet",
        "seed1/fold0/dbdiffusion/generated.h5ad",
        "seed1/fold0/de.parquet",
    ]
    assert digests(fresh.path / RESULTS, names) == digests(finished.path / RESULTS, names)
    # Halves and other folds may differ, since QC kept more of the target's cells; the target's own fold may not.
    folds = [json.loads((p / RESULTS / "seed1/splits.json").read_text())["folds"]["0"] for p in (finished.path, fresh.path)]
    assert folds[0] == folds[1]
    # The truth did change: the test would see a leak.
    truth = [ad.read_h5ad(p / RESULTS / "seed1/moments.h5ad") for p in (finished.path, fresh.path)]
    assert not np.array_equal(truth[0].layers["sum"], truth[1].layers["sum"])
