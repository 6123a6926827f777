"""The published design against this project's on held-out targets of one dataset, at a budget that is given in training steps.

Run by hand, after a run of the workflow with the default protocol, for a dataset that config.yaml alone describes:
PYTHONPATH=workflow_scripts python tests/benchmarks/bench_protocols.py results/NAME VAE_STEPS DIFFUSION_STEPS [targets]
In a copy of the project, `protocol: reference` trains an autoencoder and a diffusion model of so many steps for each of the targets,
which are every n-th held-out one in order of name (all other perturbations are trained on), and generates 100 cells of every
perturbation in 100 guided steps (published: 30,000 in 1000, which would take hours on a CPU). Printed are the seconds of the jobs that
each protocol took per held-out target, and the scores of the generator's cells (`raw`), of its debiased effects and of the default
prediction for the same targets: the difference to the reference with its standard error over targets, and whether it is worse by more
than two of them. Recall, precision and overlap are of calls, whose number each protocol sets by its own rule: they are printed once more
for as many genes of each target, those of largest predicted change, as the published design calls.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import yaml

from dbdiffusion.benchmark.ceilings import Truth, held_out
from dbdiffusion.benchmark.metrics import HIGHER_IS_BETTER, de_scores
from dbdiffusion.data.moments import Moments
from dbdiffusion.data.sets import EffectSet
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
    tables = [f"results/{name}/tables/{table}.parquet" for table in ("scores", "de", "compute")]
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


def wide(tables: Path, targets: list[str], method: str) -> dict[str, pd.DataFrame]:
    """Sizes of predicted changes (of mean ln(1 + CP10k)) and whether a gene is called, targets x genes, of the first seed."""
    table = contracts.DE.read(tables / "de.parquet").astype({"method": str, "target": str, "gene": str, "call": str})
    table = table[(table["seed"] == table["seed"].min()) & (table["method"] == method) & table["target"].isin(targets)]
    table = table.assign(size=table["lfc"].abs(), called=table["call"].isin(["up", "down"]))
    return {name: table.pivot(index="target", columns="gene", values=name) for name in ("size", "called")}


def at_equal_calls(place: Path, tables: Path, targets: list[str], method: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores of calls, targets x metrics, on genes that both predict: of as many genes of largest predicted change as the published design
    calls, and of those that it calls. place: folder of a seed's results."""
    split, sums = Splits.read(place / "splits.json"), Moments.read(place / "moments.h5ad")
    ours, theirs, rows = wide(place.parent / "tables", targets, method), wide(tables, targets, "dbdiffusion"), {}
    for fold in split.folds:
        truth = Truth.measure(sums, held_out(split, sums, fold), EffectSet.read(place / f"fold{fold}" / "effects.parquet").genes)
        for target, observed in zip(truth.targets, truth.observed_calls, strict=True):
            if target in targets:
                size, called = ours["size"].loc[target], theirs["called"].loc[target]
                genes = truth.genes.intersection(size.dropna().index).intersection(called.dropna().index)
                published = called[genes].to_numpy(bool)
                largest = size[genes].rank(method="first", ascending=False).to_numpy() <= published.sum()
                true = observed[truth.genes.get_indexer(genes)][None]
                rows[target] = [de_scores(called=calls[None], true=true) for calls in (largest, published)]
    both = [pd.DataFrame({target: {k: v[0] for k, v in found[i].items()} for target, found in rows.items()}).T for i in range(2)]
    return both[0].drop(columns="de_sign"), both[1].drop(columns="de_sign")


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
    measured = sorted(name for fold in split.folds for name in split.targets(fold))
    targets = measured[:: max(1, len(measured) // int(count))][: int(count)]
    with tempfile.TemporaryDirectory() as folder:
        tables = run_reference(Path(folder), base.name, targets, int(vae_steps), int(diffusion_steps))
        cost = seconds(base / "tables", len(seeds) * len(measured)), seconds(tables, len(targets))
        print(f"seconds per held-out target: crossfit {cost[0]:.1f}, reference {cost[1]:.1f}")
        for form, (method, debiased) in FORMS.items():
            published = scores(tables, targets, "dbdiffusion", debiased)
            print(f"\n{form}:\n{compared(scores(base / 'tables', targets, method, debiased), published).round(4).to_string()}")
            if debiased:
                table = compared(*at_equal_calls(seeds[0], tables, targets, method))
                print(f"\n{form}, as many genes as the published design calls:\n{table.round(4).to_string()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
