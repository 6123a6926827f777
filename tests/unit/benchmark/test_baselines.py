"""Baselines against slow versions, their fall-backs, and that no prediction uses the cells it stands for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from dbdiffusion.benchmark import baselines
from dbdiffusion.benchmark.baselines import BASELINES, Known, predict_fold, write_baselines
from dbdiffusion.data.sets import CONTROL, EffectSet, LocationSet, MeanSet
from dbdiffusion.data.splits import Splits
from dbdiffusion.runtime import contracts
from dbdiffusion.runtime.errors import UserError

GENES = [f"G{i:02d}" for i in range(20)]


def effect_set(names, effect, genes=GENES):
    shape = effect.shape
    base = np.linspace(0.5, 2, shape[1])
    ones = np.ones(shape)
    return EffectSet(
        pd.Index(names), pd.Index(genes), base + effect, effect, 0.1 * ones, ones, np.full(shape[0], 50), base, np.ones(shape[1]), 100
    )


def location_set(weights: dict[str, dict[str, float]], names, status=None):
    neighbours = pd.Index([*names, CONTROL])
    wide = pd.DataFrame(weights).T.reindex(columns=neighbours).fillna(0.0)
    status = dict.fromkeys(weights, "located") | (status or {})
    info = pd.DataFrame({"status": pd.Series(status)}, index=wide.index)
    return LocationSet(wide.index, neighbours, wide.to_numpy(), info)


@pytest.fixture
def known():
    """Ten singles and one combination; features predict effects linearly."""
    random = np.random.default_rng(0)
    names = [*GENES[:10], "G00+G01"]
    features = pd.DataFrame(random.normal(size=(14, 4)), index=GENES[:14])
    map_ = random.normal(0, 0.3, (4, 20))
    single = features.loc[GENES[:10]].to_numpy() @ map_ + random.normal(0, 0.02, (10, 20))
    effects = effect_set(names, np.vstack([single, single[0] + single[1] + 0.1]))
    uniform = dict.fromkeys(GENES[:10], 1 / 10)
    weights = {
        "G10": {"G02": 0.75, "G03": 0.25},
        "G11": {"G04": 1.0},
        "G12": {},
        "G01": {"G00+G01": 0.5, "G05": 0.25, "G06": 0.25},
        "G10+G11": {"G02": 0.75, "G03": 0.25, "G04": 1.0, CONTROL: -1.0},
        "G00+G10": uniform,
        "G00+G01": uniform,
        "G10+G12": {},
    }
    located = location_set(weights, names, {"G12": "not_locatable", "G10+G12": "not_locatable"})
    return Known(effects, effects, located, features, seed=3)


def test_control_and_training_mean(known):
    assert not baselines.control(["G10", "G11"], known).any()
    np.testing.assert_allclose(baselines.training_mean(["G10"], known)[0], known.train.effect.mean(axis=0))


def test_neighbour_mean_is_the_weighted_sum_and_falls_back(known):
    e = dict(zip(known.all.perturbations, known.all.effect, strict=True))
    found = baselines.neighbour_mean(["G10", "G12", "G10+G11", "unheard"], known)
    np.testing.assert_allclose(found[0], 0.75 * e["G02"] + 0.25 * e["G03"])
    np.testing.assert_allclose(found[2], 0.75 * e["G02"] + 0.25 * e["G03"] + e["G04"])
    for row in (1, 3):
        np.testing.assert_allclose(found[row], known.train.effect.mean(axis=0))


def test_additive_sums_measured_singles(known):
    e = dict(zip(known.train.perturbations, known.train.effect, strict=True))
    typical = np.mean([effect for name, effect in e.items() if "+" not in name], axis=0)
    np.testing.assert_allclose(baselines.additive(["G00+G02"], known)[0], e["G00"] + e["G02"])
    np.testing.assert_allclose(baselines.additive(["G00+G10"], known)[0], e["G00"] + typical)
    # Nothing to say: the training mean, as it is with every baseline, and no copy of the neighbour mean.
    for query in ("G10", "G10+G12"):
        np.testing.assert_allclose(baselines.additive([query], known)[0], known.train.effect.mean(axis=0))
    assert not np.allclose(baselines.additive(["G10"], known), baselines.neighbour_mean(["G10"], known))


def test_additive_learns_from_training_perturbations_alone(known):
    """A part that the model may not see is the mean of those it may."""
    few = replace(known, train=known.all.subset([n for n in known.all.perturbations if n not in ("G01", "G00+G01")]))
    singles = [n for n in few.train.perturbations if "+" not in n]
    e = dict(zip(few.train.perturbations, few.train.effect, strict=True))
    np.testing.assert_allclose(baselines.additive(["G00+G01"], few)[0], e["G00"] + np.mean([e[n] for n in singles], axis=0))


def test_knn_matches_sorting(known, monkeypatch):
    monkeypatch.setattr(baselines, "NEIGHBOURS", 3)
    few = replace(known, train=known.all.subset(GENES[:10]))
    x = few.features.loc[GENES[:10]].to_numpy()
    q = few.features.loc["G13"].to_numpy()
    order = sorted(range(10), key=lambda i: -(x[i] @ q) / np.linalg.norm(x[i]))
    found = baselines.knn(["G13"], few)[0]
    np.testing.assert_allclose(found, few.train.effect[order[:3]].mean(axis=0))


def slow_gcv(x, y, penalty):
    n = len(x)
    centred = x - x.mean(axis=0)
    hat = np.ones((n, n)) / n + centred @ np.linalg.solve(centred.T @ centred + penalty * np.eye(x.shape[1]), centred.T)
    return n * ((y - hat @ y) ** 2).sum() / (n - np.trace(hat)) ** 2


@pytest.mark.parametrize("shape", [(30, 5), (8, 12)])
def test_ridge_matches_scikit_at_the_best_gcv_penalty(shape):
    from sklearn.linear_model import Ridge

    random = np.random.default_rng(1)
    x = random.normal(size=shape)
    y = x @ random.normal(size=(shape[1], 6)) + random.normal(0, 1.5, (shape[0], 6))
    grid = baselines.PENALTIES * np.linalg.svd(x - x.mean(axis=0))[1][0] ** 2
    best = min(grid, key=lambda penalty: slow_gcv(x, y, penalty))
    points = random.normal(size=(4, shape[1]))
    np.testing.assert_allclose(baselines.fit_ridge(x, y)(points), Ridge(alpha=best).fit(x, y).predict(points), rtol=1e-8)


def test_ridge_of_constant_features_is_the_mean():
    y = np.random.default_rng(2).normal(size=(5, 3))
    np.testing.assert_allclose(baselines.fit_ridge(np.ones((5, 2)), y)(np.zeros((1, 2)))[0], y.mean(axis=0))


@pytest.mark.parametrize("name", ["ridge", "linear", "knn"])
def test_feature_models_sum_parts_and_fall_back(known, name):
    predict = BASELINES[name]
    parts = predict(["G10", "G11"], known)
    np.testing.assert_allclose(predict(["G10+G11"], known)[0], parts.sum(axis=0))
    # A part without a place in the space: the training mean, never a guess from half of the query.
    strangers = predict(["X1", "G10+X1"], known)
    np.testing.assert_allclose(strangers, np.tile(known.train.effect.mean(axis=0), (2, 1)))
    small = replace(known, train=known.all.subset(GENES[:2]))
    np.testing.assert_allclose(predict(["G10"], small)[0], small.train.effect.mean(axis=0))
    bare = replace(known, features=pd.DataFrame(dtype=float))
    assert np.isfinite(predict(["G10", "G12+G13"], bare)).all()


def test_feature_models_learn_what_features_tell(known):
    truth = known.features.loc["G13"].to_numpy() @ np.linalg.lstsq(known.features.loc[GENES[:10]], known.all.effect[:10], rcond=None)[0]
    for name in ("ridge", "linear"):
        # Features predict effects here; the perturbed genes' own rows of the effects do not.
        space = replace(known, all=known.all, train=replace(known.train, genes=pd.Index([f"M{i}" for i in range(20)])))
        assert np.corrcoef(BASELINES[name](["G13"], space)[0], truth)[0, 1] > 0.95, name


def test_linear_uses_rows_of_the_gene_embedding(known):
    singles = replace(known, train=known.all.subset(GENES[:10]), features=pd.DataFrame(dtype=float))
    y = singles.train.effect
    u, s, vt = np.linalg.svd(y - y.mean(axis=0), full_matrices=False)
    g = vt[:9].T
    expected = y.mean(axis=0) + baselines.fit_ridge(g[:10], (y - y.mean(axis=0)) @ g)(g[10:11])[0] @ g.T
    np.testing.assert_allclose(baselines.linear(["G10"], singles)[0], expected, atol=1e-10)


def test_permuted_never_uses_the_query(known):
    names = known.all.perturbations
    weights = {name: {other: 1 / 10 for other in names if other != name} for name in names}
    dense = replace(known, locations=location_set(weights, names))
    found = baselines.permuted(list(names), dense)
    for row in range(len(names)):
        effect = known.all.effect.copy()
        effect[row] += 1000
        loud = replace(dense, all=replace(known.all, effect=effect), train=replace(known.train, effect=effect))
        np.testing.assert_array_equal(baselines.permuted(list(names), loud)[row], found[row])
    only = replace(known, locations=location_set({"G11": {"G04": 1.0}}, names))
    assert not np.allclose(baselines.permuted(["G11"], only), baselines.neighbour_mean(["G11"], only))


def test_join_features_balances_sources():
    frame = pd.DataFrame(
        {"source": ["a", "a", "b", "b"], "gene": ["X", "Y", "X", "Z"], "dimension": [0, 1, 0, 0], "value": [3.0, 3.0, 10.0, -10.0]}
    ).assign(fit="all")
    joined = baselines.join_features(frame, "all")
    assert list(joined.index) == ["X", "Y", "Z"]
    np.testing.assert_allclose(joined.to_numpy(), [[1, 0, 1], [0, 1, 0], [0, 0, -1]])
    assert baselines.join_features(frame.iloc[:0], "all").empty


def test_join_features_takes_a_models_own_features():
    frame = pd.DataFrame(
        [["all", "cells", "X", 0, 5.0], ["all", "sets", "X", 0, 2.0], ["0", "cells", "Y", 0, 3.0]],
        columns=["fit", "source", "gene", "dimension", "value"],
    )
    assert list(baselines.join_features(frame, "all").index) == ["X"]
    own = baselines.join_features(frame, "0")
    assert own.loc["X"].tolist() == [0, 1]
    assert own.loc["Y"].tolist() == [1, 0]
    # A model of which nothing was learned has no features, rather than those that saw its pseudo-targets.
    assert list(baselines.join_features(frame, "1").columns) == ["sets:0"]


def test_write_baselines(screen):
    names = list(BASELINES)
    outputs = {name: screen.folder / name / "means.parquet" for name in names}
    options = {key: getattr(screen, key) for key in ("effects", "locations", "splits", "gene_features", "fold", "seed")}
    write_baselines(**options, names=names, outputs=outputs)
    splits, effects = Splits.read(screen.splits), EffectSet.read(screen.effects)
    expected = [*splits.targets("0"), *sorted(effects.perturbations), CONTROL]
    for name in names:
        means = MeanSet.read(outputs[name])
        assert sorted(means.perturbations) == sorted(expected)
        assert dict(zip(means.perturbations, means.roles, strict=True))[splits.targets("0")[0]] == "target"
        np.testing.assert_allclose(means.mean[means.rows([CONTROL])[0]], effects.control_mean)
        assert not means.mc_variance.any()
    pseudo = MeanSet.read(outputs["training_mean"])
    first = splits.inner("0", "1")
    fit = effects.subset(splits.fit_perturbations("0", "1"))
    np.testing.assert_allclose(pseudo.mean[pseudo.rows(first)], np.tile(effects.control_mean + fit.effect.mean(axis=0), (len(first), 1)))
    before = outputs["permuted"].read_bytes()
    write_baselines(**options, names=["permuted"], outputs=outputs)
    assert outputs["permuted"].read_bytes() == before
    with pytest.raises(UserError, match="did you mean 'ridge'"):
        write_baselines(**options, names=["rigde"], outputs=outputs)


@pytest.mark.parametrize("name", BASELINES)
def test_pseudo_predictions_do_not_use_the_cells_they_stand_for(screen, name):
    splits, effects = Splits.read(screen.splits), EffectSet.read(screen.effects)
    options = {"splits": splits, "features": dict.fromkeys(("all", "0", "1", "2"), screen.features), "fold": "0", "seed": 1}
    options["locations"] = LocationSet.read(screen.locations, "all", effects.perturbations)
    before = predict_fold(BASELINES[name], effects=effects, **options)
    for row, query in enumerate(effects.perturbations):
        effect = effects.effect.copy()
        effect[row] += 100
        after = predict_fold(BASELINES[name], effects=replace(effects, effect=effect), **options)
        at = before.rows([query])[0]
        assert before.roles[at] == "pseudo"
        np.testing.assert_array_equal(after.mean[at], before.mean[at])


def test_no_pseudo_rows_without_crossfitting(screen):
    splits, effects = Splits.read(screen.splits), EffectSet.read(screen.effects)
    folds = {"0": {"targets": splits.targets("0"), "inner": {}}}
    whole = predict_fold(
        BASELINES["ridge"],
        effects=effects,
        locations=LocationSet.read(screen.locations, "all", effects.perturbations),
        splits=replace(splits, folds=folds),
        features={"all": baselines.join_features(contracts.GENE_FEATURES.read(screen.gene_features), "all")},
        fold="0",
        seed=1,
    )
    assert set(whole.roles) == {"target", "control"}
