from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from dbdiffusion.config.inference import InferenceConfig
from dbdiffusion.data.moments import Moments
from dbdiffusion.data.sets import CONTROL, LocationSet
from dbdiffusion.data.splits import Splits
from dbdiffusion.inference import calibration, table
from dbdiffusion.perturbations.effects import estimate_effects
from dbdiffusion.runtime import contracts

GUIDES = [f"nt{i}" for i in range(9)]


def write_moments(path, names, truth, genes, cells, seed=0, guides=GUIDES):
    """Moments of normal cells (sd 0.5): perturbations x halves, and control guides x halves in one batch."""
    random = np.random.default_rng(seed)
    rows, total, square = [], [], []
    groups = [(n, half, "", "", cells, t) for n, t in zip(names, truth, strict=True) for half in "AB"]
    groups += [(CONTROL, half, "0", guide, 120, np.zeros(len(genes))) for guide in guides for half in "AB"]
    for name, half, batch, guide, n, mean in groups:
        values = 2.0 + mean + random.normal(0, 0.5, (n, len(genes)))
        rows.append((name, half, batch, guide, n))
        total.append(values.sum(0))
        square.append((values**2).sum(0))
    obs = pd.DataFrame(rows, columns=["perturbation", "half", "batch", "guide", "n_cells"])
    obs.index = obs[["perturbation", "half", "batch", "guide"]].agg("|".join, axis=1)
    anndata.AnnData(
        obs=obs,
        var=pd.DataFrame(index=genes),
        layers={"sum": np.array(total), "sum_sq": np.array(square), "detected": np.ones((len(rows), len(genes)))},
        obsm={"batch_cells": obs[["n_cells"]].to_numpy()},
        uns={"batches": np.array(["0"], dtype=object)},
    ).write_h5ad(path)


@pytest.fixture(scope="module")
def written(make_screen, make_fold, tmp_path_factory):
    """Two folds of one simulated screen, its moments, DE tables and calibration."""
    folder, config = tmp_path_factory.mktemp("calibration"), InferenceConfig()
    screen = make_screen(seed=3, perturbations=40, targets=10, genes=60)
    genes, targets = screen.effects.genes, list(screen.targets)
    names = [*screen.effects.perturbations, *targets]
    truth = np.vstack([screen.effects.effect, screen.truth])
    write_moments(folder / "moments.h5ad", names, truth, genes, 60)
    inner = {str(q): list(screen.effects.perturbations[q::2]) for q in range(2)}
    folds = {f: {"targets": sorted(targets[i::2]), "inner": inner} for i, f in enumerate(("0", "1"))}
    Splits("kfold", sorted(names), folds, np.array(["A", "B"] * 5), "x").write(folder / "splits.json")
    files = []
    for fold in folds:
        keep = [*screen.effects.perturbations, *folds[fold]["targets"]]
        paths = make_fold(folder / fold, replace(screen, locations=screen.locations.select(keep)))
        table.write_de(effects=paths.effects, locations=paths.locations, means=paths.means, config=config, fold=fold, seed=1, out=paths.de)
        files.append(paths)
    calibration.write_calibration(
        effects=[p.effects for p in files],
        locations=[p.locations for p in files],
        means=[p.means for p in files],
        splits=folder / "splits.json",
        moments=folder / "moments.h5ad",
        de=[p.de for p in files],
        config=config,
        folds=list(folds),
        seed=1,
        out=folder / "calibration.parquet",
    )
    return folder, contracts.CALIBRATION.read(folder / "calibration.parquet").astype({"check": str, "method": str, "stratum": str})


def test_all_checks_are_there(written):
    _, frame = written
    wanted = {"coverage", "width", "control_guides_p", "control_guides_ks", "control_guides_fdr", "permutation_fdr", "fdr", "power"}
    assert wanted | {"power_replicate", "sign_error", "doubling", "equivalence"} <= set(frame["check"])
    cover = frame[(frame["check"] == "coverage") & (frame["stratum"] == "all")]
    assert set(cover["method"]) == set(calibration.ERROR_MODELS)
    assert set(cover["level"]) == set(calibration.LEVELS)
    assert {"expression low", "effect high", "k_eff few"} <= set(frame["stratum"])


def test_rates_are_plausible_on_a_screen_that_is_what_the_model_thinks(written):
    _, frame = written
    frame = frame[frame["stratum"] == "all"].set_index(["check", "method", "level"])["value"]
    assert 0.88 <= frame["coverage", "t", 0.95] <= 1
    assert frame["coverage", "cells_only", 0.95] < frame["coverage", "t", 0.95]
    assert frame["width", "cells_only", 0.95] < frame["width", "t", 0.95]
    assert frame["control_guides_ks", "t", 0.01] > 0.01
    assert frame["control_guides_ks", "prediction_error", 0.01] > 0.01
    assert frame["doubling", "selection", 0.0] < 0.005
    assert 0.3 < frame["power_replicate", "replicate", 0.2] < 1
    assert frame["power", "selection", 0.2] > 0.3


def test_coverage_written_out(written):
    """The t row at 95 % from the DE table, the moments and the formula, one target at a time."""
    folder, frame = written
    want = []
    for fold in ("0", "1"):
        effects, locations, means = _inputs(folder / fold)
        inference = table.infer(effects, locations, means, InferenceConfig(), 1)
        moments = Moments.read(folder / "moments.h5ad")
        for target in Splits.read(folder / "splits.json").targets(fold):
            queries = table.Queries.of(inference.screen, locations.select([target]))
            found = table.debias.estimate(inference.models["stacked"]["single"], inference.screen, queries, "target")
            n, mean, variance = moments.mean_var(target)
            seen = mean - moments.control()[1]
            half = stats.t.ppf(0.975, found.df[0]) * np.sqrt(found.variance[0] + variance / n)
            want.append((np.abs(seen - found.effect[0]) <= half).mean())
    row = frame[(frame["check"] == "coverage") & (frame["method"] == "t") & (frame["level"] == 0.95) & (frame["stratum"] == "all")]
    assert row["n"].item() == len(want) == 10
    assert row["value"].item() == pytest.approx(np.mean(want), abs=0.01)


def _inputs(folder):
    from dbdiffusion.data.sets import EffectSet, MeanSet

    effects = EffectSet.read(folder / "effects.parquet")
    locations = LocationSet.read(folder / "locations.parquet", "all", effects.perturbations)
    return effects, locations, {n: MeanSet.read(folder / f"{n}.parquet") for n in ("dbdiffusion", "neighbour_mean")}


def test_control_guides_are_uniform_over_many_genes(tmp_path):
    genes = [f"G{i}" for i in range(150)]
    write_moments(tmp_path / "m.h5ad", ["x"], [np.zeros(150)], genes, 30, seed=8)
    rows = pd.DataFrame(calibration.control_guides(Moments.read(tmp_path / "m.h5ad"), pd.Index(genes), InferenceConfig(), 1))
    p = rows[(rows["check"] == "control_guides_p") & (rows["method"] == "t")]
    assert np.abs(p["value"] - p["level"]).max() < 0.12
    assert rows.loc[rows["check"] == "control_guides_fdr", "value"].max() <= 0.4


def test_guide_effects_are_those_of_estimate_effects(tmp_path):
    genes = ["a", "b", "c"]
    write_moments(tmp_path / "m.h5ad", ["x"], [np.zeros(3)], genes, 30)
    moments = Moments.read(tmp_path / "m.h5ad")
    found = calibration.guide_effects(moments, ["nt0"], GUIDES[4:], pd.Index(genes))
    # The same cells under a perturbation's name.
    groups = moments.groups.copy()
    own = (groups["guide"] == "nt0").to_numpy()
    groups.loc[own, ["perturbation", "batch", "guide"]] = ["nt0", "", ""]
    want = estimate_effects(replace(moments, groups=groups), ["nt0"], control_guides=GUIDES[4:])
    assert np.allclose(found.effect, want.effect)
    assert np.allclose(found.se, want.se)
    assert np.allclose(found.mean, want.mean)


def test_few_guides_and_no_guides_leave_the_check_out(tmp_path):
    for guides in (GUIDES[:3], [""]):
        write_moments(tmp_path / "m.h5ad", ["x"], [np.zeros(4)], list("abcd"), 30, guides=guides)
        assert calibration.control_guides(Moments.read(tmp_path / "m.h5ad"), pd.Index(list("abcd")), InferenceConfig(), 1) == []


def test_bands():
    low, high = calibration.binomial_band(7, 50)
    exact = stats.binomtest(7, 50).proportion_ci(method="exact")
    assert (low, high) == pytest.approx((exact.low, exact.high))
    assert calibration.binomial_band(0, 10)[0] == 0
    one = calibration.row("coverage", "t", 0.95, "all", np.array([0.9, 1.0, 0.95, np.nan]))
    assert one["value"] == pytest.approx(0.95)
    assert one["n"] == 3
    assert one["low"] < 0.95 < one["high"]
    assert np.isnan(calibration.row("coverage", "t", 0.95, "all", np.array([np.nan]))["value"])
