"""The score table of a fold, and its summary over perturbations."""

from __future__ import annotations

from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sklearn.metrics import average_precision_score

from dbdiffusion.benchmark import scores
from dbdiffusion.benchmark.baselines import write_baselines
from dbdiffusion.benchmark.ceilings import Truth
from dbdiffusion.config.benchmark import BenchmarkConfig
from dbdiffusion.data.moments import Moments
from dbdiffusion.data.normalise import load_expression
from dbdiffusion.data.sets import EffectSet, LocationSet, MeanSet
from dbdiffusion.data.splits import Splits
from dbdiffusion.runtime import contracts
from dbdiffusion.runtime.errors import UserError

CONFIG = BenchmarkConfig(top_genes=[5, 300], distribution_components=5)


def de_rows(method, targets, genes, estimate, calls, control_mean):
    """Contract DE with what scores read, the rest filled."""
    frame = pd.DataFrame({"target": np.repeat(targets, len(genes)), "gene": np.tile(genes, len(targets))})
    frame = frame.assign(seed=1, fold="0", method=method, estimate=estimate.ravel(), call=calls.ravel(), reason="")
    frame["control_mean"] = np.tile(control_mean, len(targets))
    return frame.assign(**{c.name: np.nan for c in contracts.DE.columns if c.kind == "float" and c.name not in frame})


@pytest.fixture(scope="module")
def scored(screen):
    """A fold scored with baselines, a perfect predictor, one that knows nothing, and generated cells that are half A's."""
    splits, effects = Splits.read(screen.splits), EffectSet.read(screen.effects)
    truth = Truth.measure(Moments.read(screen.moments), splits.targets("0"), effects.genes)
    targets, genes, folder = list(truth.targets), list(truth.genes), screen.folder / "scored"
    names = ["control", "training_mean", "ridge"]
    means = {name: folder / name / "means.parquet" for name in names}
    options = {key: getattr(screen, key) for key in ("effects", "locations", "splits", "gene_features", "fold", "seed")}
    write_baselines(**options, names=names, outputs=means)
    perfect = effects.control_mean + truth.observed
    means |= {"perfect": folder / "perfect.parquet", "partial": folder / "partial.parquet"}
    roles = np.array(["target"] * len(targets))
    MeanSet(pd.Index(targets), roles, effects.genes, perfect, 0 * perfect).write(means["perfect"])
    MeanSet(pd.Index(targets[:1]), roles[:1], effects.genes, perfect[:1], 0 * perfect[:1]).write(means["partial"])
    words = np.array(["none", "up", "down"], dtype=object)
    right, nothing = words[truth.observed_calls], np.full(perfect.shape, "no_call", dtype=object)
    estimate = perfect.copy()
    estimate[0] = np.nan
    rows = [
        de_rows("perfect", targets, genes, perfect, right, effects.control_mean),
        de_rows("partial", targets, genes, estimate, nothing, effects.control_mean),
        # Debiased it is another prediction, whose calls alone are a baseline.
        de_rows("training_mean", targets, genes, perfect, right, effects.control_mean),
    ]
    contracts.DE.write(pd.concat(rows, ignore_index=True), folder / "de.parquet")
    cells = load_expression(screen.cells, perturbations=targets, genes=genes, halves=splits.halves, half="A")
    generated = anndata.AnnData(cells.values, obs=cells.obs[["perturbation"]].assign(role="target"), var=pd.DataFrame(index=genes))
    generated[:, ::-1].copy().write_h5ad(folder / "generated.h5ad")
    arguments = {key: getattr(screen, key) for key in ("splits", "moments", "cells", "effects", "locations", "fold", "seed")}
    arguments |= {"means": means, "de": folder / "de.parquet", "generated": folder / "generated.h5ad", "config": CONFIG}
    scores.write_scores(**arguments, out=folder / "scores.parquet")
    table = contracts.SCORES.read(folder / "scores.parquet").astype({"target": str, "method": str, "metric": str, "genes": str})
    return SimpleNamespace(table=table, truth=truth, effects=effects, folder=folder, arguments=arguments)


def pick(table, **where):
    for column, value in where.items():
        table = table[table[column] == value]
    return table.set_index("target")


def test_scores_of_a_perfect_predictor(scored):
    for debiased in (False, True):
        for genes in ("all", "5"):
            rows = pick(scored.table, method="perfect", debiased=debiased, genes=genes)
            for metric in ("pearson_delta", "pearson_delta_perturbed", "spearman_delta", "discrimination", "sign_accuracy", "slope"):
                np.testing.assert_allclose(rows.loc[rows["metric"] == metric, "value"], 1, err_msg=metric)
            np.testing.assert_allclose(rows.loc[rows["metric"].isin(["mse", "weighted_mse"]), "value"], 0, atol=1e-20)
    for metric in ("de_precision", "de_recall", "de_jaccard", "de_sign"):
        np.testing.assert_array_equal(pick(scored.table, method="perfect", debiased=True, metric=metric)["value"], 1)
    # One of effects: for predictions and for what is debiased, with that of half A beside it.
    truth, true = scored.truth, scored.truth.observed_calls != 0
    for debiased in (False, True):
        rows = pick(scored.table, method="perfect", debiased=debiased, metric="de_average_precision", genes="all").loc[truth.targets]
        for column, effect in (("value", truth.observed), ("ceiling", truth.replicate)):
            expected = [average_precision_score(t, np.abs(e)) for t, e in zip(true, effect, strict=True)]
            np.testing.assert_allclose(rows[column], expected)
    assert set(scored.table["genes"]) == {"all", "5"}


def test_ceiling_is_half_a_and_stands_as_a_method(scored):
    truth = scored.truth
    rows = pick(scored.table, method="perfect", debiased=False, metric="pearson_delta", genes="5")
    for row, target in enumerate(truth.targets):
        top = np.argsort(-np.abs(truth.replicate[row]))[:5]
        expected = np.corrcoef(truth.replicate[row, top], truth.observed[row, top])[0, 1]
        assert rows.loc[target, "ceiling"] == pytest.approx(expected)
    replicate = scored.table[scored.table["method"] == "replicate"]
    pd.testing.assert_series_equal(replicate["value"], replicate["ceiling"], check_names=False)
    assert not replicate["debiased"].any()
    called, true = truth.replicate_calls[0] != 0, truth.observed_calls[0] != 0
    jaccard = pick(replicate, metric="de_jaccard").loc[truth.targets[0], "value"]
    assert jaccard == pytest.approx((called & true).sum() / (called | true).sum())


def test_baseline_of_calls_alone_is_debiased(scored):
    own = pick(scored.table, method="training_mean", debiased=False, metric="de_average_precision")["value"]
    for method in ("perfect", "replicate"):
        for debiased in (True, False) if method == "perfect" else (False,):
            rows = pick(scored.table, method=method, debiased=debiased, metric="de_average_precision")
            np.testing.assert_array_equal(rows.loc[own.index, "baseline"], own)
    assert (own < 1).any()
    np.testing.assert_array_equal(pick(scored.table, method="perfect", debiased=True, metric="de_recall")["baseline"], 1)


def test_baseline_is_the_training_mean(scored):
    own = pick(scored.table, method="training_mean", debiased=False)
    effects = own[~own["metric"].str.contains("energy|mmd|auc|agreement")]
    np.testing.assert_allclose(effects["value"], effects["baseline"], rtol=1e-9, atol=1e-20)
    expected = ((scored.effects.effect.mean(axis=0) - scored.truth.observed) ** 2).mean(axis=1)
    np.testing.assert_allclose(pick(scored.table, method="ridge", metric="mse", genes="all")["baseline"], expected)
    assert own.loc[own["metric"] == "pearson_delta_perturbed", "value"].isna().all()


def test_missing_predictions_have_missing_scores(scored):
    first, *others = scored.truth.targets
    raw = pick(scored.table, method="partial", debiased=False, genes="all", metric="mse")
    assert np.isfinite(raw.loc[first, "value"])
    assert raw.loc[others, "value"].isna().all()
    debiased = pick(scored.table, method="partial", debiased=True, genes="all")
    assert np.isnan(debiased.loc[debiased["metric"] == "mse", "value"].loc[first])
    assert debiased.loc[debiased["metric"] == "de_precision", "value"].isna().all()
    # Abstaining costs recall.
    assert (debiased.loc[debiased["metric"] == "de_recall", "value"].dropna() == 0).all()
    control = pick(scored.table, method="control", debiased=False, metric="pearson_delta", genes="all")
    assert control["value"].isna().all()
    assert control["ceiling"].notna().all()


def test_generated_cells_that_are_half_a_reach_the_ceiling(scored):
    for metric in ("energy_distance", "mmd", "variance_agreement", "zero_fraction_agreement"):
        rows = pick(scored.table, method="dbdiffusion", debiased=False, metric=metric)
        np.testing.assert_allclose(rows["value"], rows["ceiling"], rtol=1e-6, err_msg=metric)
    energy = scored.table[scored.table["metric"] == "energy_distance"].groupby("method")["value"].mean()
    assert set(energy.index) == {"dbdiffusion", "control", "training_mean", "neighbour_mean", "replicate"}
    assert energy["replicate"] < energy[["control", "training_mean"]].min()


def test_same_inputs_same_bytes_and_foreign_genes_are_refused(scored):
    again = scored.folder / "again.parquet"
    scores.write_scores(**scored.arguments, out=again)
    assert again.read_bytes() == (scored.folder / "scores.parquet").read_bytes()
    short = anndata.read_h5ad(scored.arguments["generated"])[:, :-1].copy()
    short.write_h5ad(scored.folder / "short.h5ad")
    with pytest.raises(UserError, match="panel is absent"):
        scores.write_scores(**scored.arguments | {"generated": scored.folder / "short.h5ad"}, out=again)


@pytest.mark.parametrize("wrap", [np.asarray, sparse.csr_matrix])
def test_generated_cells_are_read_in_blocks_and_as_asked(tmp_path, monkeypatch, wrap):
    random = np.random.default_rng(0)
    values = (random.random((23, 6)) * (random.random((23, 6)) < 0.5)).astype(np.float32)
    label, genes = np.array(["a", "b", "c"])[random.integers(3, size=23)], pd.Index(["g4", "g0", "g3"])
    obs = pd.DataFrame({"perturbation": pd.Categorical(label)}, index=[f"c{i}" for i in range(23)])
    anndata.AnnData(wrap(values), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(6)])).write_h5ad(tmp_path / "g.h5ad")
    monkeypatch.setattr(scores, "BLOCK_CELLS", 5)
    for asked, keep in ((None, label != ""), (["c", "a", "x"], label != "b"), (["x"], label == "x")):
        pool = scores.read_generated(tmp_path / "g.h5ad", genes, asked)
        np.testing.assert_array_equal(pool.values.toarray(), values[keep][:, [4, 0, 3]])
        assert pool.values.dtype == np.float32 and pool.perturbation.tolist() == label[keep].tolist() and len(pool.half) == keep.sum()


def test_all_samples_have_as_many_cells_as_were_generated(scored, monkeypatch):
    """Also where none were generated: the other methods are compared then."""
    made, first = anndata.read_h5ad(scored.arguments["generated"]), scored.truth.targets[0]
    own = np.flatnonzero(made.obs["perturbation"] == first)
    sizes = []
    monkeypatch.setattr(scores.distribution, "compare", lambda x, y, **_: sizes.append((len(x), len(y))) or {"below": 0.0, "noisy": 0.0})
    fold = scores.Fold(scored.truth, scored.effects, CONFIG, "0", 1)
    locations = LocationSet.read(scored.arguments["locations"], "all", scored.effects.perturbations)
    for kept, expected in ((11, {(11, 11)}), (0, {(0, 30), (30, 30)})):
        made[np.setdiff1d(np.arange(made.n_obs), own[kept:])].copy().write_h5ad(scored.folder / "few.h5ad")
        sizes.clear()
        options = {"cells": scored.arguments["cells"], "splits": Splits.read(scored.arguments["splits"])}
        scores.score_cells(**options, generated=scored.folder / "few.h5ad", locations=locations, fold=fold)
        assert set(sizes[:5]) == expected and set(sizes[5:]) == {(30, 30)}


def test_one_target_and_no_target(scored, screen):
    splits = Splits.read(screen.splits)
    held = splits.targets("0")
    fold = scores.Fold(Truth.measure(Moments.read(screen.moments), held[:1], scored.effects.genes), scored.effects, CONFIG, "0", 1)
    options = {"de": contracts.DE.read(scored.arguments["de"]), "cells": screen.cells, "splits": splits}
    options |= {
        "locations": LocationSet.read(screen.locations, "all", scored.effects.perturbations),
        "generated": scored.arguments["generated"],
    }
    means = {"ridge": MeanSet.read(scored.arguments["means"]["ridge"])}
    one = scores.score_fold(fold, means=means, **options)
    contracts.SCORES.check(one, "one target")
    assert one.loc[one["metric"].isin(["discrimination", "spread"]), "value"].isna().all()
    # The one method that has an estimate of this target nowhere is `partial`, after debiasing.
    missing = one[(one["metric"] == "mse") & one["value"].isna()]
    assert set(missing["method"]) == {"partial"}
    assert missing["debiased"].all()
    empty = Truth.measure(Moments.read(screen.moments), [], scored.effects.genes)
    none = scores.score_fold(scores.Fold(empty, scored.effects, CONFIG, "all", 1), means=means, **options)
    contracts.SCORES.write(none, scored.folder / "none.parquet")
    assert contracts.SCORES.read(scored.folder / "none.parquet").empty


def test_weighted_draw_follows_the_weights():
    labels = np.repeat(["a", "b", "c"], [10, 1000, 50])
    values = sparse.csr_matrix(np.repeat([1.0, 2.0, 3.0], [10, 1000, 50])[:, None])
    pool = scores.Pool(values, labels, labels)
    drawn = pool.draw_weighted(pd.Series({"a": 0.75, "b": 0.25, "x": 0.0}), 4000, np.random.default_rng(0)).ravel()
    share = (drawn == 1).mean()
    assert abs(share - 0.75) < 4 * np.sqrt(0.75 * 0.25 / 4000)
    assert not (drawn == 3).any()
    fallback = pool.draw_weighted(pd.Series({"a": 0.0}), 4000, np.random.default_rng(0)).ravel()
    assert abs((fallback == 2).mean() - 1000 / 1060) < 0.02


def toy_scores(values: dict[str, np.ndarray], baseline: np.ndarray, seeds=(1,)) -> pd.DataFrame:
    rows = [
        {"seed": s, "fold": "0", "method": m, "debiased": False, "target": f"t{i}", "metric": "mse", "genes": "all", "value": v[i]}
        | {"ceiling": 0.1 * i, "baseline": baseline[i]}
        for s in seeds
        for m, v in values.items()
        for i in range(len(v))
    ]
    return pd.DataFrame(rows)


def test_summary_matches_a_plain_bootstrap():
    random = np.random.default_rng(0)
    values, baseline = random.normal(1, 1, 40), random.normal(1, 1, 40)
    values[3] = np.nan
    summary = scores.summarise(toy_scores({"m": values}, baseline), resamples=4000).iloc[0]
    known = np.isfinite(values)
    assert summary["n"] == 39
    assert summary["mean"] == pytest.approx(np.nanmean(values))
    assert summary["ceiling"] == pytest.approx(0.1 * np.flatnonzero(known).mean())
    assert summary["difference"] == pytest.approx((values - baseline)[known].mean())
    draws = random.choice(values[known], (4000, 39)).mean(axis=1)
    np.testing.assert_allclose(summary[["low", "high"]].astype(float), np.quantile(draws, [0.025, 0.975]), atol=0.05)


def test_summary_interval_covers():
    random = np.random.default_rng(1)
    table = toy_scores({f"m{i}": random.normal(0, 1, 30) for i in range(200)}, np.zeros(30))
    summary = scores.summarise(table, resamples=500)
    # Percentile intervals at n = 30 cover a little less than 95 %.
    assert 0.88 <= ((summary["low"] <= 0) & (summary["high"] >= 0)).mean() <= 0.99
    pd.testing.assert_series_equal(summary["low"], summary["difference_low"], check_names=False)


def test_summary_counts_a_target_once_and_survives_gaps():
    values = np.arange(6.0)
    one, two = (scores.summarise(toy_scores({"m": values}, 0 * values, seeds)) for seeds in ((1,), (1, 2)))
    pd.testing.assert_frame_equal(one, two)
    gaps = scores.summarise(toy_scores({"m": values, "gone": values * np.nan, "late": np.append([np.nan] * 5, 1.0)}, np.full(6, np.nan)))
    assert list(gaps["method"]) == ["late", "m"]
    assert gaps[["difference", "difference_low"]].isna().all(axis=None)
    assert list(scores.summarise(toy_scores({"m": values[:0]}, values)).columns) == list(one.columns)
