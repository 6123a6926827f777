"""The calibration table of small screens: every check, what it should say, and data that do not allow a check."""

from dataclasses import replace
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from dbdiffusion.config.inference import InferenceConfig
from dbdiffusion.data.moments import Moments
from dbdiffusion.data.sets import CONTROL, EffectSet, LocationSet, MeanSet
from dbdiffusion.data.simulate import TRUTH
from dbdiffusion.data.splits import Splits
from dbdiffusion.inference import bands, calibration, checks_calls, checks_cells, checks_null, held_out, table
from dbdiffusion.perturbations.effects import estimate_effects
from dbdiffusion.runtime import contracts

GUIDES = [f"nt{i}" for i in range(9)]
CONFIG = InferenceConfig()


def write_moments(path, names, truth, genes, cells, seed=0, guides=GUIDES, few=None, guide_cells=None):
    """Moments of normal cells (sd 0.5): perturbations x halves, and control guides x halves in one batch.

    few: cells in halves A and B by perturbation, guide_cells: by control guide, where they differ from the rest.
    """
    random = np.random.default_rng(seed)
    rows, total, square = [], [], []
    zero = np.zeros(len(genes))
    sizes = {**dict.fromkeys(names, (cells, cells)), **(few or {})}
    groups = [(n, half, "", "", sizes[n][i], t) for n, t in zip(names, truth, strict=True) for i, half in enumerate("AB")]
    sizes = {**dict.fromkeys(guides, (120, 120)), **(guide_cells or {})}
    groups += [(CONTROL, half, "0", guide, sizes[guide][i], zero) for guide in guides for i, half in enumerate("AB")]
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


def write_truth(path, names, genes, truth):
    """Table `truth` of a screen whose effects are known."""
    frame = pd.DataFrame({"perturbation": np.repeat(names, len(genes)), "gene": np.tile(genes, len(names)), "effect": truth.ravel()})
    frame = frame.assign(lfc=frame["effect"], lfc_mixed=frame["effect"], programme="", kind="programme", escapers=0.0)
    TRUTH.write(frame, path)


def write_screen(folder, screen, make_fold, *, folds=2, **moments):
    """A screen's folds, moments, splits, truth and DE tables as files; keyword arguments of write_calibration."""
    genes, targets = screen.effects.genes, list(screen.targets)
    names = [*screen.effects.perturbations, *targets]
    truth = np.vstack([screen.effects.effect, screen.truth])
    write_moments(folder / "moments.h5ad", names, truth, genes, 60, **moments)
    write_truth(folder / "truth.parquet", names, list(genes), truth)
    inner = {str(q): list(screen.effects.perturbations[q::2]) for q in range(2)}
    split = {str(f): {"targets": sorted(targets[f::folds]), "inner": inner} for f in range(folds)}
    Splits("kfold", sorted(names), split, np.array(["A", "B"] * 5), "x").write(folder / "splits.json")
    files = []
    for fold, record in split.items():
        keep = [*screen.effects.perturbations, *record["targets"]]
        paths = make_fold(folder / fold, replace(screen, locations=screen.locations.select(keep)))
        table.write_de(effects=paths.effects, locations=paths.locations, means=paths.means, config=CONFIG, fold=fold, seed=1, out=paths.de)
        files.append(paths)
    return {
        "effects": [p.effects for p in files],
        "locations": [p.locations for p in files],
        "means": [p.means for p in files],
        "de": [p.de for p in files],
        "splits": folder / "splits.json",
        "moments": folder / "moments.h5ad",
        "truth": folder / "truth.parquet",
        "config": CONFIG,
        "folds": list(split),
        "seed": 1,
        "out": folder / "calibration.parquet",
    }


def read(path):
    return contracts.CALIBRATION.read(path).astype({"check": str, "method": str, "stratum": str})


def value_of(frame, check, method, level, stratum):
    rows = frame[(frame["check"] == check) & (frame["method"] == method) & (frame["level"] == level) & (frame["stratum"] == stratum)]
    return rows["value"].item()


def fold_of(arguments, name="0"):
    """The loaded fold of written files."""
    at = arguments["folds"].index(name)
    parts = {key: arguments[key][at] for key in ("effects", "locations", "means", "de")}
    moments, split = Moments.read(arguments["moments"]), Splits.read(arguments["splits"])
    return held_out.load_fold(name=name, **parts, moments=moments, split=split, config=CONFIG, seed=1)


@pytest.fixture(scope="module")
def written(make_screen, make_fold, tmp_path_factory):
    """Two folds of one simulated screen with all further inputs, and their calibration."""
    folder = tmp_path_factory.mktemp("calibration")
    screen = make_screen(seed=3, perturbations=40, targets=10, genes=60)
    arguments = write_screen(folder, screen, make_fold)
    random, generated = np.random.default_rng(1), screen.means["dbdiffusion"]
    # Twice the cells: another draw with half the Monte-Carlo variance.
    again = generated.mean + random.normal(size=generated.mean.shape) * np.sqrt(generated.mc_variance / 2)
    replace(generated, mean=again, mc_variance=generated.mc_variance / 2).write(folder / "doubled.parquet")
    (folder / "null").mkdir()
    null = write_screen(folder / "null", make_screen(seed=4, perturbations=40, targets=10, genes=60, null=True), make_fold, folds=1)
    calibration.write_calibration(**arguments, doubled=folder / "doubled.parquet", permuted=null["de"][0])
    return SimpleNamespace(folder=folder, arguments=arguments, screen=screen, frame=read(arguments["out"]), null=null["de"][0])


@pytest.fixture(scope="module")
def fold(written):
    """The first fold of the written screen."""
    return fold_of(written.arguments)


def test_all_checks_are_there(written):
    frame = written.frame
    assert {
        "coverage", "width", "fdr", "power", "sign_error", "equivalence", "fdr_replicate", "power_replicate",
        "control_guides_p", "control_guides_ks", "control_guides_fdr", "shuffled_effects_fdr", "shuffled_effects_calls",
        "permuted_labels_calls", "permuted_labels_targets", "permuted_labels_p", "permuted_labels_ks",
        "doubling_calls", "doubling_log10_p", "fdr_truth", "sign_error_truth", "coverage_truth",
    } == set(frame["check"])  # fmt: skip
    for check in ("coverage", "coverage_truth"):
        rows = frame[(frame["check"] == check) & (frame["stratum"] == "per target")]
        assert set(rows["method"]) == set(held_out.ERROR_MODELS)
        assert set(rows["level"]) == set(held_out.LEVELS)
    assert {"prediction strongest 5 %", "expression low", "effect high", "k_eff few", "confidence low", "affected genes"} <= set(
        frame["stratum"]
    )
    # Strata say what was averaged: no row is just `all`.
    assert "all" not in set(frame["stratum"])
    predictors = {"dbdiffusion", "neighbour_mean", "lambda_0", "lambda_1"}
    for check in ("fdr", "power"):
        methods = set(frame.loc[frame["check"] == check, "method"])
        assert methods == {*contracts.TESTS, *(f"{test}:{p}" for test in contracts.TESTS for p in predictors)}


def test_rates_are_plausible_on_a_screen_that_is_what_the_model_thinks(written):
    frame = written.frame
    assert 0.88 <= value_of(frame, "coverage", "t", 0.95, "per target") <= 1
    for check in ("coverage", "width", "coverage_truth"):
        assert value_of(frame, check, "cells_only", 0.95, "per target") < value_of(frame, check, "t", 0.95, "per target")
    assert value_of(frame, "control_guides_ks", "t", 0.01, "pooled") > 0.01
    assert value_of(frame, "control_guides_ks", "prediction_error", 0.01, "pooled") > 0.01
    assert value_of(frame, "doubling_calls", "selection", 0.0, "pooled") < 0.005
    assert 0.3 < value_of(frame, "power_replicate", "replicate", 0.2, "pooled") < 1
    assert value_of(frame, "power", "selection", 0.2, "pooled") > 0.3
    # What the cells of half A call is right more often than the strict judge, half B, says.
    assert value_of(frame, "fdr_truth", "replicate", 0.1, "pooled") < value_of(frame, "fdr_replicate", "replicate", 0.1, "pooled")


def test_coverage_written_out(written):
    """The t row at 95 % from the DE table, the moments and the formula, one target at a time."""
    want, true = [], []
    for fold in ("0", "1"):
        effects, locations, means = _inputs(written.folder / fold)
        inference = table.infer(effects, locations, means, CONFIG, 1)
        moments = Moments.read(written.folder / "moments.h5ad")
        for target in Splits.read(written.folder / "splits.json").targets(fold):
            queries = table.Queries.of(inference.screen, locations.select([target]))
            found = table.debias.estimate(inference.models["stacked"]["single"], inference.screen, queries, "target")
            n, mean, variance = moments.mean_var(target)
            seen = mean - moments.control()[1]
            between, within = found.variance[0] - found.known[0], found.known[0] + variance / n
            half = np.sqrt(stats.t.ppf(0.975, found.df[0]) ** 2 * between + stats.norm.ppf(0.975) ** 2 * within)
            want.append((np.abs(seen - found.effect[0]) <= half).mean())
            effect = written.screen.truth[list(written.screen.targets).index(target)]
            de = contracts.DE.read(written.folder / fold / "de.parquet").astype({"method": str, "target": str, "gene": str})
            rows = de[(de["method"] == "stacked") & (de["target"] == target)].set_index("gene").loc[effects.genes]
            true.append(((rows["ci_low"] <= effect) & (effect <= rows["ci_high"])).mean())
    frame = written.frame
    assert len(want) == 10
    assert value_of(frame, "coverage", "t", 0.95, "per target") == pytest.approx(np.mean(want), abs=0.01)
    # Of the true effect, the interval as the table gives it.
    assert value_of(frame, "coverage_truth", CONFIG.error_model, 0.95, "per target") == pytest.approx(np.mean(true), abs=1e-9)


def _inputs(folder):
    effects = EffectSet.read(folder / "effects.parquet")
    locations = LocationSet.read(folder / "locations.parquet", "all", effects.perturbations)
    return effects, locations, {n: MeanSet.read(folder / f"{n}.parquet") for n in ("dbdiffusion", "neighbour_mean")}


def test_calls_against_the_truth_written_out(written):
    de = pd.concat([contracts.DE.read(path) for path in written.arguments["de"]]).astype({"method": str, "target": str, "gene": str})
    truth = TRUTH.read(written.arguments["truth"]).astype({"perturbation": str, "gene": str})
    truth = truth.rename(columns={"perturbation": "target"})[["target", "gene", "effect"]]
    joined = de[(de["method"] == "stacked") & (de["call"] != "no_call")].merge(truth, on=["target", "gene"])
    for test, column in contracts.TESTS.items():
        called = joined[joined[column] <= 0.2]
        assert len(called)
        null = called["effect"] == 0
        # What is claimed by `direction` is the sign too.
        wrong = called["effect"] * called["lfc"] <= 0 if test == "direction" else null
        assert value_of(written.frame, "fdr_truth", test, 0.2, "pooled") == pytest.approx(wrong.mean())
        right = called[~null]
        turned = np.sign(right["lfc"]) != np.sign(right["effect"])
        assert value_of(written.frame, "sign_error_truth", test, 0.2, "pooled") == pytest.approx(turned.mean())


def test_directions_are_judged_by_what_the_held_out_cells_show(written):
    """Rows `fdr` of direction from the DE table and the moments, one target at a time."""
    moments, wrong, calls = Moments.read(written.arguments["moments"]), [], []
    for name, path in zip(written.arguments["folds"], written.arguments["de"], strict=True):
        fold = fold_of(written.arguments, name)
        de = contracts.DE.read(path).astype({"method": str, "target": str, "gene": str})
        for target in fold.targets:
            rows = de[(de["method"] == "stacked") & (de["target"] == target)].set_index("gene").loc[fold.whole.genes]
            seen = moments.mean_var(target)[1] - moments.control()[1]
            control = fold.inference.screen.control_sampling
            seen = seen - control / np.maximum(rows["se"] ** 2, control) * rows["lfc"]
            called = (rows["q_direction"] <= 0.2) & (rows["call"] != "no_call")
            calls.append(called.sum())
            wrong.append((called & (np.sign(seen) != np.sign(rows["lfc"]))).sum())
    assert sum(wrong) > 0
    frame = written.frame
    assert value_of(frame, "fdr", "direction", 0.2, "pooled") == pytest.approx(2 * sum(wrong) / sum(calls))
    assert value_of(frame, "fdr", "direction", 0.2, "per target") == pytest.approx(np.mean(2 * np.array(wrong) / np.maximum(calls, 1)))
    assert value_of(frame, "power", "direction", 0.2, "pooled") > 0.3


def test_effects_dealt_out_are_judged_by_the_claim_of_each_test(fold, monkeypatch):
    random = np.random.default_rng(2)
    shape = fold.whole.effect.shape
    agrees = random.random(shape) < 0.8
    found = checks_calls.Called(np.zeros(shape), np.ones(shape), agrees)
    monkeypatch.setattr(checks_null, "called_from", lambda *_: {"direction": found, "selection": found})
    rows = pd.DataFrame(checks_null.shuffled_effects([fold], CONFIG, 1))
    truth = held_out.labels(fold.whole, CONFIG.de_fdr)
    assert value_of(rows, "shuffled_effects_fdr", "direction", 0.1, "pooled") == pytest.approx(2 * (~agrees).mean())
    assert value_of(rows, "shuffled_effects_fdr", "selection", 0.1, "pooled") == pytest.approx((~truth).mean())


def test_false_shares_that_are_estimated_end_at_one():
    pooled, mean = bands.fdr_rows("fdr", "direction", 0.1, np.array([10, 8, 6, 0]), np.array([-6, -4, 0, 0]))
    assert pooled["value"] == mean["high"] == 1
    assert pooled["low"] < pooled["high"] == 1
    # Half of the directions wrong is no extreme: the band has the width of the targets' differences.
    half, _ = bands.fdr_rows("fdr", "direction", 0.1, np.array([10, 10, 10, 10]), np.array([1, -1, 0, 0]))
    assert half["value"] == 1
    assert 0.8 < half["low"] < 1


def test_weight_zero_is_the_neighbour_mean_and_one_the_published_estimate(fold):
    found = dict(checks_calls.called_again(fold, CONFIG, 1))
    effects, predictor = fold.inference.screen.effects, fold.inference.predictors["dbdiffusion"]
    weights = fold.inference.locations.select(fold.targets).weights[:, :-1]
    assert np.allclose(found["t:lambda_0"].effect, weights @ effects.effect)
    generated = predictor.effects_of(fold.targets, "target")[0]
    assert np.allclose(found["t:lambda_1"].effect, generated + weights @ (effects.effect - predictor.neighbours))
    # A predictor that de.parquet calls by t alone is called by selection too.
    in_table = dict(checks_calls.called_in_table(fold))
    assert "t:neighbour_mean" in in_table
    assert ("selection:neighbour_mean" in in_table) != ("selection:neighbour_mean" in found)


def test_doubling_sees_what_a_change_of_means_does(fold):
    means = fold.inference.predictors["dbdiffusion"].means
    same = pd.DataFrame(checks_cells.doubling(fold, means, CONFIG, 1))
    assert (same["value"] == 0).all()
    # Means that depend on the number of cells, as in a generator whose sampling is broken.
    moved = replace(means, mean=means.mean + np.random.default_rng(0).normal(0, 1.0, means.mean.shape))
    changed = pd.DataFrame(checks_cells.doubling(fold, moved, CONFIG, 1))
    assert set(changed["method"]) == {f"{test}{p}" for test in contracts.TESTS for p in ("", ":dbdiffusion", ":lambda_1")}
    largest = changed[(changed["check"] == "doubling_log10_p") & (changed["level"] == 1.0)]
    assert (largest["value"] > 0.5).all()
    assert changed.loc[changed["check"] == "doubling_calls", "value"].max() > 0


def test_permuted_labels_written_out(written):
    de = contracts.DE.read(written.null).astype({"method": str, "target": str, "gene": str})
    de = de[de["method"] == "stacked"]
    rows = pd.DataFrame(checks_null.permuted_labels(contracts.DE.read(written.null)))
    calls = rows[(rows["check"] == "permuted_labels_calls") & (rows["method"] == "t") & (rows["level"] == 0.2)]
    assert calls["value"].item() == pytest.approx(((de["q_t"] <= 0.2) & (de["call"] != "no_call")).mean())
    assert calls["n"].item() == len(de)
    median = rows[(rows["check"] == "permuted_labels_p") & (rows["level"] == 0.5)]
    assert median["value"].item() == pytest.approx(de["p_t"].median())
    # No effect anywhere: p are not smaller than uniform, and about nothing is called.
    assert rows.loc[rows["stratum"] == "smaller than uniform", "value"].item() > 0.01
    assert rows.loc[rows["check"] == "permuted_labels_calls", "value"].max() < 0.01
    # The same table with effects that are there after all is found out.
    small = contracts.DE.read(written.null)
    small["p_t"], small["q_t"] = small["p_t"] * 0.02, small["q_t"] * 0.02
    rows = pd.DataFrame(checks_null.permuted_labels(small))
    assert rows.loc[rows["stratum"] == "smaller than uniform", "value"].item() < 1e-6
    assert rows.loc[rows["check"] == "permuted_labels_targets", "value"].max() > 0.5


def test_effects_dealt_out_leave_few_calls(written, fold):
    in_table = dict(checks_calls.called_in_table(fold))
    for test in contracts.TESTS:
        calls = value_of(written.frame, "shuffled_effects_calls", test, 0.1, "pooled")
        # The screen's own calls, at the same rate, are many times more.
        assert calls < max(0.3 * (in_table[test].q <= 0.1).mean(), 0.005)


# -- data that do not allow a check -------------------------------------------------------------------------------------------


def test_a_target_with_too_few_cells_in_a_half_leaves_the_halved_checks_alone(make_screen, make_fold, tmp_path, caplog):
    screen = make_screen(seed=3, perturbations=24, targets=6, genes=30)
    poor = screen.targets[2]
    arguments = write_screen(tmp_path, screen, make_fold, folds=1, few={poor: (1, 2)})
    with caplog.at_level("INFO"):
        calibration.write_calibration(**arguments)
    assert "1 target(s) have too few cells to be halved" in caplog.text
    frame = read(arguments["out"])
    count = frame[(frame["level"] == 0.1) & (frame["stratum"] == "per target")].set_index(["check", "method"])["n"]
    assert count["fdr", "t"] == 6
    assert count["fdr_replicate", "replicate"] == 5
    fold = fold_of(arguments)
    assert poor not in fold.halved
    assert len(fold.halved) == len(fold.half_a.perturbations) == 5
    assert list(fold.targets[fold.rows_halved]) == list(fold.halved)


def test_no_target_can_be_halved(make_screen, make_fold, tmp_path):
    screen = make_screen(seed=3, perturbations=24, targets=4, genes=30)
    arguments = write_screen(tmp_path, screen, make_fold, folds=1, few=dict.fromkeys(screen.targets, (1, 3)))
    calibration.write_calibration(**arguments)
    checks = set(read(arguments["out"])["check"])
    assert {"fdr", "coverage", "fdr_truth"} <= checks
    assert not checks & {"power", "power_replicate", "fdr_replicate"}


@pytest.mark.filterwarnings("error")
def test_no_target_can_be_located(make_screen, make_fold, tmp_path):
    screen = make_screen(seed=3, perturbations=24, targets=6, genes=30)
    locations = screen.locations
    lost = (locations.info["role"] == "target").to_numpy()
    info = locations.info.assign(status=np.where(lost, "not_locatable", "located"), reason=np.where(lost, "unknown gene", ""))
    weights = np.where(lost[:, None], 0.0, locations.weights)
    screen = replace(screen, locations=replace(locations, weights=weights, info=info))
    arguments = write_screen(tmp_path, screen, make_fold, folds=1)
    screen.means["dbdiffusion"].write(tmp_path / "doubled.parquet")
    calibration.write_calibration(**arguments, doubled=tmp_path / "doubled.parquet", permuted=arguments["de"][0])
    frame = read(arguments["out"])
    assert "coverage" not in set(frame["check"])
    assert not frame["check"].str.startswith("permuted_labels").any()
    fdr = frame[(frame["check"] == "fdr") & (frame["stratum"] == "pooled")]
    assert (fdr["n"] == 0).all()
    assert (frame.loc[frame["check"] == "power", "value"] == 0).all()


def test_a_target_without_any_changed_gene(make_screen, make_fold, tmp_path):
    screen = make_screen(seed=3, perturbations=24, targets=4, genes=30)
    screen.truth[:] = 0.0
    arguments = write_screen(tmp_path, screen, make_fold, folds=1)
    calibration.write_calibration(**arguments)
    frame = read(arguments["out"])
    # Half B may call a gene by chance; where it calls none, power has no value and no trials.
    power = frame[frame["check"].isin(["power", "power_replicate"])]
    assert (power["value"].isna() == (power["n"] == 0)).all()
    unaffected = frame[(frame["check"] == "coverage_truth") & (frame["level"] == 0.95) & (frame["method"] == "t")].set_index("stratum")
    assert unaffected.loc["affected genes", "n"] == 0
    assert unaffected.loc["unaffected genes", "value"] == unaffected.loc["per target", "value"]


def test_no_target_is_measured(make_screen, make_fold, tmp_path):
    screen = make_screen(seed=3, perturbations=24, targets=4, genes=30)
    arguments = write_screen(tmp_path, screen, make_fold, folds=1)
    record = Splits.read(arguments["splits"])
    replace(record, measured=list(screen.effects.perturbations)).write(arguments["splits"])
    calibration.write_calibration(**arguments)
    assert set(read(arguments["out"])["check"]) == {"control_guides_p", "control_guides_ks", "control_guides_fdr"}


# -- control guides -----------------------------------------------------------------------------------------------------------


def guide_rows(path, genes):
    return pd.DataFrame(checks_null.control_guides(Moments.read(path), pd.Index(genes), CONFIG, 1))


def test_control_guides_are_uniform_over_many_genes(tmp_path):
    genes = [f"G{i}" for i in range(150)]
    write_moments(tmp_path / "m.h5ad", ["x"], [np.zeros(150)], genes, 30, seed=8)
    rows = guide_rows(tmp_path / "m.h5ad", genes)
    p = rows[(rows["check"] == "control_guides_p") & (rows["method"] == "t")]
    assert np.abs(p["value"] - p["level"]).max() < 0.12
    assert rows.loc[rows["check"] == "control_guides_fdr", "value"].max() <= 0.4


def test_guide_effects_are_those_of_estimate_effects(tmp_path):
    genes = ["a", "b", "c"]
    write_moments(tmp_path / "m.h5ad", ["x"], [np.zeros(3)], genes, 30)
    moments = Moments.read(tmp_path / "m.h5ad")
    found = checks_null.guide_effects(moments, ["nt0"], GUIDES[4:], pd.Index(genes))
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
        assert guide_rows(tmp_path / "m.h5ad", list("abcd")).empty


@pytest.mark.filterwarnings("error")
def test_guides_of_two_cells(tmp_path):
    genes = [f"G{i}" for i in range(40)]
    few = dict.fromkeys(GUIDES[:4], (1, 1))
    write_moments(tmp_path / "m.h5ad", ["x"], [np.zeros(40)], genes, 30, seed=8, guide_cells=few)
    rows = guide_rows(tmp_path / "m.h5ad", genes)
    assert rows["value"].notna().all()
    guides = rows[rows["check"] == "control_guides_fdr"]
    assert (guides["n"] == len(GUIDES)).all()
    # One cell has no variance: such a guide is left out.
    write_moments(tmp_path / "m.h5ad", ["x"], [np.zeros(40)], genes, 30, seed=8, guide_cells={"nt0": (1, 0)})
    rows = guide_rows(tmp_path / "m.h5ad", genes)
    assert (rows.loc[rows["check"] == "control_guides_fdr", "n"] == len(GUIDES) - 1).all()


def test_cells_with_two_control_guides_take_no_part(tmp_path):
    """A cell with nt0 and nt1 would tell of nt0 when that is held out."""
    genes = [f"G{i}" for i in range(40)]
    write_moments(tmp_path / "plain.h5ad", ["x"], [np.zeros(40)], genes, 30, seed=8)
    joined = [*GUIDES, "nt0;nt1"]
    write_moments(tmp_path / "joined.h5ad", ["x"], [np.zeros(40)], genes, 30, seed=8, guides=joined)
    plain, found = (guide_rows(tmp_path / f"{name}.h5ad", genes) for name in ("plain", "joined"))
    # Quantiles are over genes in the order of the panel; thinning goes by the mean of all control cells.
    same = found["check"].isin(["control_guides_p", "control_guides_fdr"])
    assert np.allclose(plain.loc[same, "value"], found.loc[same, "value"])
