"""The published design against this project's on held-out targets of one dataset, at a budget that is given in training steps.

Run by hand, after a run of the workflow with the default protocol, for a dataset that config.yaml alone describes:
PYTHONPATH=workflow_scripts python tests/benchmarks/bench_protocols.py results/NAME VAE_STEPS DIFFUSION_STEPS [targets]
In a copy of the project, `protocol: reference` trains an autoencoder and a diffusion model of so many steps for each of the targets,
which are every n-th of the first fold in order of name (all other perturbations are trained on), and generates 100 cells of every
perturbation in 100 guided steps (published: 30,000 in 1000, which would take hours on a CPU). Printed are the seconds of the jobs that
each protocol took per held-out target, and the scores of the generator's cells (`raw`), of its debiased effects and of the default
prediction for the same targets: the difference to the reference with its standard error over targets, and whether it is worse by more
than two of them.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import yaml

from dbdiffusion.benchmark.metrics import HIGHER_IS_BETTER
from dbdiffusion.data.splits import Splits
from dbdiffusion.runtime import contracts

PARTS = ("Snakefile", "config.yaml", "rules", "workflow_scripts", "envs", "profiles", "resources")
CELLS, STEPS = 100, 100
JOBS = ("train_vae", "train_diffusion", "try_guidance", "generate")
FORMS = {"raw": ("dbdiffusion", False), "debiased": ("dbdiffusion", True), "default prediction": ("stacked", True)}


def run_reference(folder: Path, name: str, targets: list[str], vae_steps: int, diffusion_steps: int) -> Path:
    """Tables of a run of the published design in a copy of the project."""
    for part in PARTS:
        source = Path(part)
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, folder / part)
    config = {
        "protocol": "reference",
        "run": {"datasets": [name]},
        "splits": {"held_out": targets},
        "vae": {"max_steps": vae_steps},
        "diffusion": {"max_steps": diffusion_steps},
        "generation": {"cells": CELLS, "cells_kept": CELLS, "steps": STEPS},
        "calibration": {"permuted_labels": False, "doubled_cells": False},
    }
    (folder / "override.yaml").write_text(yaml.safe_dump(config))
    tables = [f"results/{name}/tables/{table}.parquet" for table in ("scores", "compute")]
    command = [sys.executable, "-m", "snakemake", "--quiet", "--cores", "all", *tables, "--configfile", "override.yaml"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "results" / name / "tables"


def seconds(tables: Path, targets: int) -> float:
    """Of training and generating, per held-out target."""
    table = contracts.COMPUTE.read(tables / "compute.parquet")
    return float(table[table["rule"].isin(JOBS)]["seconds"].sum()) / targets


def scores(tables: Path, targets: list[str], method: str, debiased: bool) -> pd.DataFrame:
    """Targets x metrics, on all genes, of the first seed."""
    table = contracts.SCORES.read(tables / "scores.parquet").astype({"method": str, "target": str, "metric": str, "genes": str})
    table = table[table["seed"] == table["seed"].min()]
    table = table[(table["method"] == method) & (table["debiased"] == debiased) & (table["genes"] == "all") & table["target"].isin(targets)]
    return table.pivot(index="target", columns="metric", values="value").dropna(axis=1, how="all")


def compared(ours: pd.DataFrame, theirs: pd.DataFrame) -> pd.DataFrame:
    """Rows: metrics that both have."""
    metrics = [name for name in HIGHER_IS_BETTER if name in ours and name in theirs]
    gap = ours[metrics] - theirs[metrics]
    se = gap.std(ddof=1) / gap.count() ** 0.5
    better = gap.mean() * [1 if HIGHER_IS_BETTER[name] else -1 for name in metrics]
    both = [part[metrics].where(gap.notna()).mean() for part in (ours, theirs)]
    columns = {"crossfit": both[0], "reference": both[1], "difference": gap.mean(), "se": se}
    return pd.DataFrame({**columns, "n": gap.count(), "worse": better < -2 * se})


def main(results: str, vae_steps: str, diffusion_steps: str, count: str = "10") -> None:
    base = Path(results)
    seeds = sorted(base.glob("seed*"))
    split = Splits.read(seeds[0] / "splits.json")
    folds = list(split.folds)
    first = sorted(split.targets(folds[0]))
    targets = first[:: max(1, len(first) // int(count))][: int(count)]
    held_out = len(seeds) * sum(len(split.targets(fold)) for fold in folds)
    with tempfile.TemporaryDirectory() as folder:
        tables = run_reference(Path(folder), base.name, targets, int(vae_steps), int(diffusion_steps))
        print(
            f"seconds per held-out target: crossfit {seconds(base / 'tables', held_out):.1f}, reference {seconds(tables, len(targets)):.1f}"
        )
        for form, (method, debiased) in FORMS.items():
            published = scores(tables, targets, "dbdiffusion", debiased)
            print(f"\n{form}:\n{compared(scores(base / 'tables', targets, method, debiased), published).round(4).to_string()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
