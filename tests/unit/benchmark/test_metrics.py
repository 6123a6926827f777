"""Metrics against slow versions of their formulas, and their behaviour on the cases that have no score."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score

from dbdiffusion.benchmark import metrics

T, G = 7, 40


@pytest.fixture
def data():
    random = np.random.default_rng(0)
    observed = random.normal(0, 0.3, (T, G))
    predicted = 0.5 * observed + random.normal(0, 0.2, (T, G)) + 0.1
    where = random.random((T, G)) < 0.6
    return {"predicted": predicted, "observed": observed, "where": where}


def each(data):
    for t in range(T):
        yield data["predicted"][t][data["where"][t]], data["observed"][t][data["where"][t]]


def cosine(a, b):
    return a @ b / np.sqrt(a @ a) / np.sqrt(b @ b)


SLOW = {
    "pearson_delta": lambda p, o: stats.pearsonr(p, o).statistic,
    "spearman_delta": lambda p, o: stats.spearmanr(p, o).statistic,
    "mse": lambda p, o: sum((a - b) ** 2 for a, b in zip(p, o, strict=True)) / len(p),
    "sign_accuracy": lambda p, o: sum((a > 0) == (b > 0) for a, b in zip(p, o, strict=True)) / len(p),
    "slope": lambda p, o: stats.linregress(o, p).slope,
}


@pytest.mark.parametrize("name", SLOW)
def test_row_metrics_match_slow_versions(data, name):
    expected = [SLOW[name](p, o) for p, o in each(data)]
    np.testing.assert_allclose(getattr(metrics, name)(**data), expected, rtol=1e-10)


def test_perturbed_reference_removes_what_all_share(data):
    reference = np.random.default_rng(1).normal(0, 1, G)
    expected = [
        stats.pearsonr((data["predicted"][t] - reference)[w], (data["observed"][t] - reference)[w]).statistic
        for t, w in enumerate(data["where"])
    ]
    np.testing.assert_allclose(metrics.pearson_delta_perturbed(**data, reference=reference), expected)
    shared = data | {"predicted": np.tile(reference, (T, 1))}
    assert np.isnan(metrics.pearson_delta_perturbed(**shared, reference=reference)).all()
    assert np.isfinite(metrics.pearson_delta(**shared)).all()


def test_weighted_mse_matches_numpy_average(data):
    weights = np.random.default_rng(2).random((T, G))
    expected = [
        np.average((data["predicted"][t] - data["observed"][t])[w] ** 2, weights=weights[t][w]) for t, w in enumerate(data["where"])
    ]
    np.testing.assert_allclose(metrics.weighted_mse(**data, weights=weights), expected)
    np.testing.assert_allclose(metrics.weighted_mse(**data, weights=np.full((T, G), 3.0)), metrics.mse(**data))


def test_discrimination_matches_ranks(data):
    expected = []
    for t, w in enumerate(data["where"]):
        similarity = [cosine(data["predicted"][t][w], data["observed"][s][w]) for s in range(T)]
        expected.append((stats.rankdata(similarity)[t] - 1) / (T - 1))
    np.testing.assert_allclose(metrics.discrimination(**data), expected)


def test_discrimination_limits():
    observed = np.random.default_rng(3).normal(size=(T, G))
    where = np.ones((T, G), dtype=bool)
    np.testing.assert_array_equal(metrics.discrimination(predicted=2 * observed, observed=observed, where=where), 1)
    same = np.tile(observed.mean(axis=0), (T, 1))
    # One prediction for all targets ranks them by chance: the mean over targets is exactly one half.
    assert metrics.discrimination(predicted=same, observed=observed, where=where).mean() == pytest.approx(0.5)
    one = {"predicted": observed[:1], "observed": observed[:1], "where": where[:1]}
    assert np.isnan(metrics.discrimination(**one)).all()
    copies = np.tile(observed[:1], (T, 1))
    np.testing.assert_array_equal(metrics.discrimination(predicted=observed, observed=copies, where=where), 0.5)


def test_constant_prediction_has_no_correlation_but_an_error(data):
    scores = metrics.effect_scores(**data | {"predicted": np.zeros((T, G))}, reference=np.zeros(G), weights=np.abs(data["observed"]))
    for name in ("pearson_delta", "spearman_delta", "pearson_delta_perturbed", "discrimination", "sign_accuracy"):
        assert np.isnan(scores[name]).all(), name
    assert (scores["mse"] > 0).all()
    np.testing.assert_array_equal(scores["slope"], 0)


def test_missing_predictions_do_not_count(data):
    predicted = data["predicted"].copy()
    predicted[0] = np.nan
    predicted[1, :10] = np.nan
    options = {"reference": np.zeros(G), "weights": np.abs(data["observed"])}
    scores = metrics.effect_scores(**data | {"predicted": predicted}, **options)
    where = data["where"].copy()
    where[1, :10] = False
    fewer = metrics.effect_scores(**data | {"where": where}, **options)
    for name, values in scores.items():
        assert np.isnan(values[0]), name
        np.testing.assert_allclose(values[1], fewer[name][1], err_msg=name)


def test_no_targets_and_no_genes_give_empty_and_missing_scores(data):
    empty = {key: value[:0] for key, value in data.items()}
    nothing = data | {"where": np.zeros((T, G), dtype=bool)}
    options = {"reference": np.zeros(G)}
    assert all(v.shape == (0,) for v in metrics.effect_scores(**empty, **options, weights=empty["observed"]).values())
    assert all(np.isnan(v).all() for v in metrics.effect_scores(**nothing, **options, weights=np.ones((T, G))).values())


def test_average_precision_is_that_of_scikit_learn():
    random = np.random.default_rng(6)
    predicted, true, where = (
        random.normal(size=(T, G)),
        random.integers(-1, 2, (T, G)) * (random.random((T, G)) < 0.5),
        random.random((T, G)) < 0.8,
    )
    predicted[1] = np.round(predicted[1])  # Ties.
    predicted[2] = 0.0
    true[3] = 0
    predicted = np.where(where, predicted, np.nan)
    scores = metrics.de_average_precision(predicted=predicted, true=true, where=where)
    for t in range(T):
        at = where[t]
        expected = average_precision_score(true[t, at] != 0, np.abs(predicted[t, at])) if t != 3 else np.nan
        np.testing.assert_allclose(scores[t], expected, err_msg=str(t))
    assert scores[2] == pytest.approx((true[2, where[2]] != 0).mean())
    assert np.isnan(metrics.de_average_precision(predicted=predicted, true=0 * true, where=where)).all()
    assert metrics.de_average_precision(predicted=predicted[:0], true=true[:0], where=where[:0]).shape == (0,)


def test_de_scores_match_sets():
    random = np.random.default_rng(4)
    called, true = random.integers(-1, 2, (T, G)), random.integers(-1, 2, (T, G))
    scores = metrics.de_scores(called=called, true=true)
    for t in range(T):
        c, d = set(np.flatnonzero(called[t])), set(np.flatnonzero(true[t]))
        assert scores["de_precision"][t] == pytest.approx(len(c & d) / len(c))
        assert scores["de_recall"][t] == pytest.approx(len(c & d) / len(d))
        assert scores["de_jaccard"][t] == pytest.approx(len(c & d) / len(c | d))
        assert scores["de_sign"][t] == pytest.approx(np.mean([called[t, j] == true[t, j] for j in c & d]))


def test_de_scores_without_calls():
    called, true = np.zeros((2, 5), dtype=int), np.array([[1, -1, 0, 0, 0], [0, 0, 0, 0, 0]])
    scores = metrics.de_scores(called=called, true=true)
    np.testing.assert_array_equal(scores["de_precision"], [np.nan, np.nan])
    np.testing.assert_array_equal(scores["de_recall"], [0, np.nan])
    np.testing.assert_array_equal(scores["de_jaccard"], [0, np.nan])


def test_spread_is_the_trace_ratio_and_free_of_noise():
    random = np.random.default_rng(5)
    truth = random.normal(0, 0.2, (200, 50))
    a, b = (truth + random.normal(0, 0.5, truth.shape) for _ in range(2))
    assert metrics.spread(predicted=truth, observed=b, replicate=a).mean() == pytest.approx(1, abs=0.1)
    assert metrics.spread(predicted=0.5 * truth, observed=b, replicate=a).mean() == pytest.approx(0.25, abs=0.03)
    exact = metrics.spread(predicted=a, observed=truth, replicate=truth)
    assert exact.mean() == pytest.approx(np.trace(np.cov(a.T)) / np.trace(np.cov(truth.T)))
    assert np.isnan(metrics.spread(predicted=truth[:1], observed=b[:1], replicate=a[:1])).all()
    collapsed = np.tile(truth[0], (200, 1))
    collapsed[3] = np.nan
    scores = metrics.spread(predicted=collapsed, observed=b, replicate=a)
    assert np.isnan(scores[3])
    assert np.nansum(scores) < 1e-12


def test_every_metric_has_a_direction(data):
    scores = metrics.effect_scores(**data, reference=np.zeros(G), weights=np.abs(data["observed"]))
    calls = metrics.de_scores(called=np.zeros((1, 1)), true=np.zeros((1, 1)))
    assert metrics.HIGHER_IS_BETTER["de_average_precision"]
    assert set(scores) | set(calls) <= set(metrics.HIGHER_IS_BETTER) | {"slope", "spread"}
