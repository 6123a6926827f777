"""Error rates of the chain on simulated screens of cells, without networks: python tests/benchmarks/bench_screens.py [--screens 10]

Every screen is the default simulated dataset with a seed of its own, taken from counts through QC, splits, effects, location and
baselines to calls, for every fold; only the generator is left out.

Per test: fdr: mean over folds (families of targets) of the false share of all their calls, 0 without calls (`direction`: no true effect
of that direction; `selection`: not called by the held-out cells' own test); given calls: the same over the folds that have any; power:
share of the genes called by half B; null: share of the calls whose true effect is 0; coverage: of the observed effects by the t interval
at 95 %.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from threadpoolctl import threadpool_limits

from dbdiffusion.benchmark.baselines import write_baselines
from dbdiffusion.config.load import load_config
from dbdiffusion.config.root import Config
from dbdiffusion.data.moments import Moments, write_moments
from dbdiffusion.data.qc import write_qc
from dbdiffusion.data.sets import EffectSet, LocationSet, MeanSet
from dbdiffusion.data.simulate import write_screen
from dbdiffusion.data.splits import Splits, write_splits
from dbdiffusion.inference import debias, table, ttest
from dbdiffusion.inference.debias import Queries
from dbdiffusion.perturbations.effects import estimate_effects, write_effects
from dbdiffusion.perturbations.locate import write_locations
from dbdiffusion.runtime import contracts
from dbdiffusion.runtime.progress import Progress

REPO = Path(__file__).resolve().parents[2]
RATES = (0.05, 0.1, 0.2)
TESTS = ("direction", "selection")
SEED = 1


def config_of(screen: int, folder: Path) -> Config:
    raw = yaml.safe_load((REPO / "config.yaml").read_text())
    annotations = folder / "annotations.gmt"
    annotations.touch()
    raw["datasets"]["simulated"]["seed"] = screen
    raw["datasets"]["simulated"]["features"][1]["path"] = str(annotations)
    return load_config(raw, root=REPO)


def make_screen(config: Config, folder: Path) -> None:
    """Counts to splits and moments."""
    counts, cells = folder / "counts.h5ad", folder / "cells.h5ad"
    write_screen(config.datasets["simulated"], counts=counts, annotations=folder / "annotations.gmt", truth=folder / "truth.parquet")
    write_qc(counts=counts, config=config.qc, cells=cells, summary=folder / "qc.json", on_target=folder / "on_target.parquet")
    write_splits(cells, config.splits, [], SEED, folder / "splits.json")
    write_moments(cells, folder / "splits.json", folder / "moments.h5ad")


def infer_fold(config: Config, folder: Path, fold: str) -> table.Inference:
    shared = {"splits": folder / "splits.json", "fold": fold}
    effects, locations = folder / f"effects{fold}.parquet", folder / f"locations{fold}.parquet"
    features = folder / f"features{fold}.parquet"
    write_effects(moments=folder / "moments.h5ad", **shared, config=config.panel, effects=effects, panel=folder / "panel.json")
    write_locations(
        cells=folder / "cells.h5ad",
        **shared,
        effects=effects,
        features=config.datasets["simulated"].features,
        location=config.location,
        clusters=config.clusters,
        seed=SEED,
        locations=locations,
        out_clusters=folder / "clusters.parquet",
        gene_features=features,
        gene_names=folder / "gene_names.parquet",
    )
    outputs = {name: folder / f"{name}{fold}.parquet" for name in config.benchmark.baselines}
    write_baselines(effects=effects, locations=locations, gene_features=features, names=list(outputs), seed=SEED, outputs=outputs, **shared)
    measured = EffectSet.read(effects)
    located = LocationSet.read(locations, "all", measured.perturbations)
    return table.infer(measured, located, {name: MeanSet.read(path) for name, path in outputs.items()}, config.inference, SEED)


def judge(inference: table.Inference, folder: Path, fold: str) -> list[dict]:
    """One row per target, test and rate."""
    moments, truth = Moments.read(folder / "moments.h5ad"), pd.read_parquet(folder / "truth.parquet")
    truth = truth.pivot(index="perturbation", columns="gene", values="lfc")
    genes, fdr = inference.screen.effects.genes, inference.config.de_fdr
    targets = [t for t in Splits.read(folder / "splits.json").targets(fold) if t in inference.locations.queries]
    rows = []
    for result in table.results(inference, table.STACKED, pd.Index(targets)):
        names = list(result.targets)
        whole = estimate_effects(moments, names, genes)
        half = estimate_effects(moments, names, genes, half="B", control_half="B")
        real = ttest.de_labels(whole.effect, whole.se, whole.n_cells, fdr)
        again = ttest.de_labels(half.effect, half.se, half.n_cells, fdr)
        effect = truth.reindex(index=names, columns=genes).to_numpy()
        inside = _inside(inference, result, whole)
        for test in TESTS:
            values = result.columns[contracts.TESTS[test]]
            q = np.where((result.reason != "")[:, None] | np.isnan(values), 1.0, values)
            wrong = result.columns["lfc"] * effect <= 0 if test == "direction" else ~real
            for i, rate in product(range(len(names)), RATES):
                called = q[i] <= rate
                counts = {"calls": called, "false": called & wrong[i], "null": called & (effect[i] == 0), "found": called & again[i]}
                counts = {name: int(v.sum()) for name, v in counts.items()}
                rows.append({"fold": fold, "test": test, "q": rate, "inside": inside[i], **counts, "de": int(again[i].sum())})
    return rows


def _inside(inference: table.Inference, result: table.Result, whole: EffectSet) -> np.ndarray:
    """Share of genes (R,) whose observed effect lies in the t interval, its own sampling error counted; NaN where not located."""
    kind = str(result.info["kind"].iloc[0])
    if np.isnan(result.columns["lfc"]).all():
        return np.full(len(result.targets), np.nan)
    queries = Queries.of(inference.screen, inference.locations.select(result.targets))
    found = debias.estimate(inference.models[table.STACKED][kind], inference.screen, queries, "target")
    own = debias.sampling_variance(whole)
    half = ttest.quantile(0.95, found.total_df(own, 0.95)) * np.sqrt(found.variance + own)
    return (np.abs(whole.effect - found.effect) <= half).mean(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--screens", type=int, default=10)
    parser.add_argument("--first", type=int, default=101, help="seed of the first screen")
    arguments = parser.parse_args()
    rows = []
    with threadpool_limits(1), Progress(arguments.screens, "screens") as progress:
        for screen in range(arguments.first, arguments.first + arguments.screens):
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                config = config_of(screen, folder)
                make_screen(config, folder)
                for fold in config.splits.fold_names([]):
                    rows += [{"screen": screen, **row} for row in judge(infer_fold(config, folder, fold), folder, fold)]
            progress.update()
    frame = pd.DataFrame(rows)
    families = frame.groupby(["test", "q", "screen", "fold"])[["calls", "false", "null", "found", "de"]].sum()
    families["share"] = families["false"] / families["calls"].clip(lower=1)
    by = ["test", "q"]
    out = families.groupby(by)[["calls", "false", "null", "found", "de"]].sum()
    out["fdr"], out["fdr_se"] = families["share"].groupby(by).mean(), families["share"].groupby(by).sem()
    out["fdr_given_calls"] = families[families["calls"] > 0]["share"].groupby(by).mean()
    out["folds_with_calls"] = (families["calls"] > 0).groupby(by).mean()
    out["false_share_of_all"], out["null_share_of_all"] = out["false"] / out["calls"], out["null"] / out["calls"]
    out["power"] = out["found"] / out["de"]
    print(f"{arguments.screens} screens, {len(families) // len(RATES) // len(TESTS)} folds; coverage at 95 %: {frame['inside'].mean():.3f}")
    print(out.drop(columns=["false", "null", "found", "de"]).round(3).to_string())


if __name__ == "__main__":
    main()
