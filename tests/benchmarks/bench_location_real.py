"""Locations on real screens, without any network: each locator on held-out perturbations, kin that find each other, and doubles.

Run by hand: PYTHONPATH=workflow_scripts python tests/benchmarks/bench_location_real.py FOLDER [seeds]
FOLDER holds norman2019-k562-500g.h5ad, papalexi2021-thp1-303g.h5ad and annotations/.

Every stage is the workflow's own (ingest, quality control, splits, moments, effects, locations), with three folds and three
cross-fit models. A target that is not located counts as the training mean. Squared errors are in units of gene noise, divided by
the training mean's; intervals are 95 % from 1000 bootstrap resamples of targets, a target under several seeds counting once.
`cross-fitted` is the error of the choice itself, from training perturbations alone: what a locator may be chosen by.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from dbdiffusion.config.datasets import Columns, FeatureSource, FileDataset
from dbdiffusion.config.embedding import ClustersConfig, LocationConfig
from dbdiffusion.config.qc import PanelConfig, QcConfig
from dbdiffusion.config.splits import SplitsConfig
from dbdiffusion.data.ingest import write_ingested
from dbdiffusion.data.moments import Moments, write_moments
from dbdiffusion.data.qc import write_qc
from dbdiffusion.data.sets import EffectSet, LocationSet
from dbdiffusion.data.splits import Splits, parts, write_splits
from dbdiffusion.perturbations.effects import estimate_effects, gene_scale, write_effects
from dbdiffusion.perturbations.features import permute_features
from dbdiffusion.perturbations.locate import MIXTURE, Learner, Plan, choose, known_sources, learn_sums, locate_fold, make_learner
from dbdiffusion.perturbations.locators import ClusterLocator, Known, candidates

LOCATORS = ("auto", "stack", "ridge", "kernel", "cluster")
INTERFERON = ["IFNGR1", "IFNGR2", "JAK2", "STAT1"]


class Permuted(Learner):
    """A learner whose features are given to other genes at random."""

    def known(self, learned: Sequence[str], measured: Sequence[str] | None = None) -> Known:
        found = super().known(learned, measured)
        features = permute_features(list(found.features.values()), self.seed)
        return Known(found.measured, found.learned, {one.source: one for one in features}, found.cluster)


def sources(folder: Path, coexpression: bool, more: Sequence[str] = ()) -> list[FeatureSource]:
    names = ("go_bp_human.gmt.gz", "pairs_StringDB.csv.gz", "pairs_Reactome.csv.gz", *more)
    files = [FeatureSource(kind="gene_sets" if "gmt" in n else "pairs", path=str(folder / "annotations" / n)) for n in names]
    return [FeatureSource(kind="coexpression"), *files] if coexpression else files


def screens(folder: Path) -> dict[str, tuple[FileDataset, QcConfig]]:
    norman = FileDataset(
        kind="h5ad",
        path=str(folder / "norman2019-k562-500g.h5ad"),
        columns=Columns(library_size="total_counts_full"),
        features=sources(folder, False),
    )
    columns = Columns(guide="guide", batch="batch", library_size="total_counts_full")
    papalexi = FileDataset(kind="h5ad", path=str(folder / "papalexi2021-thp1-303g.h5ad"), columns=columns, features=sources(folder, True))
    more = norman.model_copy(update={"features": sources(folder, False, ("go_mf_human.gmt.gz", "pairs_HuMAP.csv.gz"))})
    return {
        "norman": (norman, QcConfig()),
        "norman, and go_mf and HuMAP": (more, QcConfig()),
        "papalexi": (papalexi, QcConfig(max_cells_per_perturbation=400)),
    }


def prepare(config: FileDataset, qc: QcConfig, out: Path) -> Path:
    out.mkdir(parents=True)
    write_ingested(config, source=config.path, out=out / "counts.h5ad")
    write_qc(counts=out / "counts.h5ad", config=qc, cells=out / "cells.h5ad", summary=out / "qc.json", on_target=out / "on_target.parquet")
    return out / "cells.h5ad"


def learners(cells: Path, config: FileDataset, splits: SplitsConfig, seed: int) -> Iterator[tuple[Learner, list[str], EffectSet, Moments]]:
    """What each fold may know, its targets, its training effects, and the moments with the targets' truth."""
    out = cells.parent
    write_splits(cells, splits, [], seed, out / "splits.json")
    write_moments(cells, out / "splits.json", out / "moments.h5ad")
    split, moments = Splits.read(out / "splits.json"), Moments.read(out / "moments.h5ad")
    for fold in split.fold_names:
        files = {"effects": out / "effects.parquet", "panel": out / "panel.json"}
        write_effects(moments=out / "moments.h5ad", splits=out / "splits.json", fold=fold, config=PanelConfig(), **files)
        effects = EffectSet.read(out / "effects.parquet")
        plan = Plan.make(effects, split, fold, seed)
        learner = make_learner(cells, effects, plan, split.targets(fold), config.features, LocationConfig(), ClustersConfig(), seed)
        yield learner, split.targets(fold), effects, moments


def locators_of(learner: Learner, locator: str) -> list:
    found = candidates(LocationConfig(locator=locator), known_sources(learner))
    # The cluster rule takes clusters of genes, which are not permuted.
    return [one for one in found if not (isinstance(learner, Permuted) and isinstance(one, ClusterLocator))]


def locate(learner: Learner, locator: str, targets: list[str]) -> LocationSet:
    """Locations of the targets over all training perturbations."""
    return locate_fold(learner, locators_of(learner, locator), targets, MIXTURE.get(locator, "no"))["all"].select(targets)


def judge(located: LocationSet, targets: list[str], effects: EffectSet, moments: Moments) -> pd.DataFrame:
    """Squared error, training mean's squared error and Pearson delta of each target."""
    truth = estimate_effects(moments, targets, effects.genes).effect
    mean, unit = effects.effect.mean(axis=0), gene_scale(effects.se)
    there = (located.info["status"] == "located").to_numpy()
    guess = np.where(there[:, None], located.weights[:, :-1] @ effects.effect, mean)
    rows = {"target": targets, "located": there, "error": (((guess - truth) / unit) ** 2).sum(axis=1)}
    rows["baseline"] = (((mean - truth) / unit) ** 2).sum(axis=1)
    rows["pearson"] = [np.corrcoef(g, t)[0, 1] if g.std() > 0 else np.nan for g, t in zip(guess, truth, strict=True)]
    return pd.DataFrame(rows)


def compare(name: str, config: FileDataset, cells: Path, seeds: int) -> pd.DataFrame:
    """Rows of every locator, target and seed."""
    frames = []
    for seed in range(1, seeds + 1):
        for learner, targets, effects, moments in learners(cells, config, SplitsConfig(combinations="any"), seed):
            tried = [(locator, learner) for locator in LOCATORS] + [
                ("auto, permuted features", Permuted(**{**vars(learner), "_known": {}}))
            ]
            found = {}
            for label, one in tried:
                locator = label.split(",")[0]
                inside = choose(one, locators_of(one, locator), None, MIXTURE.get(locator, "no"))
                found[label] = judge(locate(one, locator, targets), targets, effects, moments).assign(inside=inside[0].error)
            mean = found["auto"].assign(error=found["auto"]["baseline"], located=True, inside=1.0)
            truth = estimate_effects(moments, targets, effects.genes).effect
            mean["pearson"] = [np.corrcoef(effects.effect.mean(axis=0), row)[0, 1] for row in truth]
            found["training mean"] = mean
            frames += [frame.assign(locator=label, seed=seed) for label, frame in found.items()]
    return pd.concat(frames, ignore_index=True)


def interval(values: np.ndarray, weights: np.ndarray | None = None, draws: int = 1000) -> str:
    """Mean of values, or sum of values over sum of weights, with its bootstrap interval."""
    values, weights = values[~np.isnan(values)], np.ones(len(values)) if weights is None else weights[~np.isnan(values)]
    if not len(values):
        return "-"
    at = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(values[at].sum(axis=1) / weights[at].sum(axis=1), [0.025, 0.975])
    return f"{values.sum() / weights.sum():6.3f} [{low:6.3f}, {high:6.3f}]"


def show(table: pd.DataFrame, what: str) -> None:
    print(f"\n{what}, {table['target'].nunique()} targets")
    print(f"{'locator':26s} {'squared error / training mean':30s} {'Pearson delta':26s} {'located':8s} cross-fitted")
    for locator, rows in table.groupby("locator", sort=False):
        each = rows.groupby("target")[["error", "baseline", "pearson", "located", "inside"]].mean()
        error, pearson = interval(each["error"].to_numpy(), each["baseline"].to_numpy()), interval(each["pearson"].to_numpy())
        print(f"{locator:26s} {error:30s} {pearson:26s} {each['located'].mean():8.2f} {rows['inside'].mean():.3f}")


def interferon(cells: Path, config: FileDataset) -> None:
    """Whether kin are among the nearest when one is held out."""
    print("\npapalexi: nearest neighbours of an interferon gene that is held out (kernel; auto)")
    splits = SplitsConfig(scheme="leave_one_out", held_out=INTERFERON)
    for learner, targets, _, _ in learners(cells, config, splits, 1):
        line = []
        for locator in ("kernel", "auto"):
            found = locate(learner, locator, targets)
            order = np.argsort(-found.weights[0, :-1], kind="stable")[:4]
            line.append(
                ", ".join(f"{found.neighbours[i]} {found.weights[0, i]:.2f}" for i in order)
                + f" (confidence {found.info['confidence'].iloc[0]:.2f})"
            )
        print(f"  {targets[0]}: {'; '.join(line)}")


def doubles(cells: Path, config: FileDataset) -> None:
    """Each double with two measured singles held out alone: learned sum against the plain one."""
    rows = []
    measured = set(Splits.read(cells.parent / "splits.json").measured)
    names = [name for name in sorted(measured) if len(parts(name)) > 1 and measured.issuperset(parts(name))]
    for learner, targets, effects, moments in learners(cells, config, SplitsConfig(scheme="leave_one_out", held_out=names), 1):
        ranking = choose(learner, locators_of(learner, "ridge"), None, "no")
        sums = learn_sums(learner, ranking, None)
        truth = estimate_effects(moments, targets, effects.genes).effect[0]
        unit, of = gene_scale(effects.se), dict(zip(effects.perturbations, effects.effect, strict=True))
        strong, weak = sorted(parts(targets[0]), key=lambda gene: -sums.strength[gene])
        plain = of[strong] + of[weak]
        factors = sums.rules["measured"].factors
        learned = factors[0] * of[strong] + factors[1] * of[weak]
        errors = [float((((truth - guess) / unit) ** 2).sum()) for guess in (learned, plain, effects.effect.mean(axis=0))]
        rows.append((targets[0], *factors, *errors, *(np.corrcoef(g, truth)[0, 1] for g in (learned, plain))))
    table = pd.DataFrame(rows, columns=["double", "stronger", "weaker", "learned", "plain", "mean", "r learned", "r plain"])
    print("\nnorman: doubles of two measured singles, each held out alone (squared errors in gene noise)")
    print(table.round(3).to_string(index=False))
    for name in ("learned", "plain"):
        print(
            f"  {name} / training mean {interval(table[name].to_numpy(), table['mean'].to_numpy())}, "
            f"Pearson delta {interval(table['r ' + name].to_numpy())}"
        )
    print(f"  learned / plain {interval(table['learned'].to_numpy(), table['plain'].to_numpy())}")


def main(data: str, seeds: str = "3") -> None:
    with tempfile.TemporaryDirectory() as temporary:
        for name, (config, qc) in screens(Path(data)).items():
            cells = prepare(config, qc, Path(temporary) / name)
            table = compare(name, config, cells, int(seeds))
            double = table["target"].str.contains("+", regex=False)
            show(table[~double], f"{name}: single perturbations, {seeds} seeds")
            if double.any():
                show(table[double], f"{name}: combinations, {seeds} seeds")
                doubles(cells, config)
            else:
                interferon(cells, config)


if __name__ == "__main__":
    main(*sys.argv[1:])
