"""Two-sample scores against loops, and what they say of samples that are equal, shifted or collapsed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dbdiffusion.benchmark import distribution


def slow_pairs(x, y, measure, same):
    values = [measure(a, b) for (i, a), (j, b) in itertools.product(enumerate(x), enumerate(y)) if not (same and i == j)]
    return sum(values) / len(values)


@pytest.fixture
def samples():
    random = np.random.default_rng(0)
    return random.normal(0, 1, (15, 3)), random.normal(0.5, 1.5, (12, 3))


def test_energy_distance_matches_loops(samples):
    x, y = samples

    def norm(a, b):
        return np.sqrt(((a - b) ** 2).sum())

    expected = 2 * slow_pairs(x, y, norm, False) - slow_pairs(x, x, norm, True) - slow_pairs(y, y, norm, True)
    assert distribution.energy_distance(x, y) == pytest.approx(expected)


def test_mmd_matches_loops(samples):
    x, y = samples

    def kernel(a, b):
        return np.exp(-((a - b) ** 2).sum() / 4.0)

    expected = slow_pairs(x, x, kernel, True) + slow_pairs(y, y, kernel, True) - 2 * slow_pairs(x, y, kernel, False)
    assert distribution.mmd(x, y, bandwidth=4.0) == pytest.approx(expected)


def test_median_bandwidth_matches_pairs(samples):
    x = samples[0]
    assert distribution.median_bandwidth(x) == pytest.approx(np.median([((a - b) ** 2).sum() for a, b in itertools.combinations(x, 2)]))


def test_distances_of_one_distribution_are_zero_on_average():
    random = np.random.default_rng(1)
    pairs = [(random.normal(size=(20, 4)), random.normal(size=(40, 4))) for _ in range(200)]
    for measure in (distribution.energy_distance, lambda x, y: distribution.mmd(x, y, bandwidth=8.0)):
        values = np.array([measure(x, y) for x, y in pairs])
        assert abs(values.mean()) < 3 * values.std() / np.sqrt(len(values))
        assert measure(pairs[0][0], pairs[0][1] + 1.0) > values.max()


def test_auc_knows_equal_shifted_and_collapsed_samples():
    random = np.random.default_rng(2)
    x, y = random.normal(size=(150, 5)), random.normal(size=(150, 5))
    assert abs(distribution.two_sample_auc(x, y, seed=1) - 0.5) < 0.12
    assert distribution.two_sample_auc(x, y + 3, seed=1) > 0.99
    # Same mean, a third of the spread: only the squares tell.
    assert distribution.two_sample_auc(x, y / 3, seed=1) > 0.9
    assert distribution.two_sample_auc(x, y, seed=1) == distribution.two_sample_auc(x, y, seed=1)


def test_concordance_is_one_only_for_equality():
    a = np.random.default_rng(3).random(50)
    assert distribution.concordance(a, a) == pytest.approx(1)
    assert distribution.concordance(a, a + 0.5) < 0.7
    assert distribution.concordance(a, 2 * a) < 0.9
    assert np.isnan(distribution.concordance(np.zeros(5), np.zeros(5)))


def test_correlations_agree_whatever_the_number_of_cells():
    random = np.random.default_rng(0)
    loadings = random.normal(scale=0.35, size=(2, 6, 60))

    def draw(n, structure=loadings[0], noise=1.0, sparse=False):
        cells = random.normal(size=(n, 6)) @ structure
        return random.poisson(np.exp(cells - 1.5)).astype(float) if sparse else cells + noise * random.normal(size=(n, 60))

    def agreement(pairs):
        options = {"axes": axes, "bandwidth": 1.0, "seed": 1}
        return np.mean(
            [row["correlation_agreement"] for row in distribution.pooled([distribution.compare(*pair, **options) for pair in pairs])]
        )

    axes = distribution.fit_axes(draw(2000), 20)
    assert [agreement([(draw(n), draw(n)) for _ in range(40)]) for n in (20, 60, 300)] == pytest.approx([1.0] * 3, abs=0.05)
    assert agreement([(draw(20, sparse=True), draw(20, sparse=True)) for _ in range(80)]) == pytest.approx(1.0, abs=0.2)
    # Cells of half the noise have correlations that are too large, with less sampling error: they are no better than real cells.
    assert agreement([(draw(60, noise=0.5), draw(60)) for _ in range(40)]) < 0.93
    assert abs(agreement([(draw(60, loadings[1]), draw(60)) for _ in range(40)])) < 0.1
    flat = distribution.pooled([distribution.compare(np.ones((40, 60)), np.ones((40, 60)), axes=axes, bandwidth=1.0, seed=1)])[0]
    assert np.isnan(flat["correlation_agreement"])
    assert not {"below", "noisy"} & set(flat)


def test_gene_correlations_are_those_of_the_leading_genes():
    random = np.random.default_rng(6)
    shared = random.normal(size=(400, 1))
    cells = np.hstack([shared + random.normal(size=(400, 30)), random.normal(0, 0.1, (400, 60))])
    axes = distribution.fit_axes(cells, 1)
    found = distribution.gene_correlations(cells, axes)
    leading = np.argsort(-(axes.axes[:, 0] ** 2))[: distribution.CORRELATED_GENES]
    expected = np.corrcoef(cells[:, leading].T)[np.triu_indices(len(leading), 1)]
    np.testing.assert_allclose(found, expected, atol=1e-10)
    assert set(range(30)) <= set(leading.tolist())
    cells[:, leading[0]] = 1.0
    assert np.isfinite(distribution.gene_correlations(cells, axes)).all()


def test_effect_slope_is_free_of_the_noise_of_what_was_observed():
    """Predictions that are 0.8 of the truth have slope 0.8, however noisy the halves; plain regression is attenuated."""
    random = np.random.default_rng(7)
    true = random.normal(0, 0.3, (40, 200))
    a, b = (true + random.normal(0, 0.6, true.shape) for _ in range(2))
    predicted = 0.8 * true + random.normal(0, 0.1, true.shape)
    slope = distribution.effect_slope(predicted, observed=b, replicate=a)
    assert slope.mean() == pytest.approx(0.8, abs=0.08)
    assert (predicted * b).sum() / (b * b).sum() < 0.3
    assert distribution.effect_slope(a, observed=b, replicate=a).mean() == pytest.approx(1.0)
    predicted[3] = np.nan
    assert np.isnan(distribution.effect_slope(predicted, observed=b, replicate=a)).tolist() == [i == 3 for i in range(40)]
    assert np.isnan(distribution.effect_slope(predicted, observed=-a, replicate=a)).all()
    # One perturbation alone has no slope.
    assert np.isnan(distribution.effect_slope(predicted[:1], observed=b[:1], replicate=a[:1])).all()
    assert np.isnan(distribution.effect_slope(predicted[3:5], observed=b[3:5], replicate=a[3:5])).all()


def test_effect_slope_is_lifted_by_learned_noise():
    """The mean of both halves, which a model of seen perturbations may repeat, scores above the replicate's 1."""
    random = np.random.default_rng(8)
    true = random.normal(0, 0.3, (40, 200))
    a, b = (true + random.normal(0, 0.6, true.shape) for _ in range(2))
    # <(a + b) / 2, b> / <a, b> = 1 + noise / (2 truth), here 1 + 0.36 / 0.18.
    assert distribution.effect_slope((a + b) / 2, observed=b, replicate=a).mean() == pytest.approx(3.0, abs=0.3)


def test_axes_match_svd_and_limit_components():
    cells = np.random.default_rng(4).normal(size=(30, 8)) @ np.diag(np.arange(1, 9))
    axes = distribution.fit_axes(cells, 3)
    _, s, vt = np.linalg.svd(cells - cells.mean(axis=0))
    np.testing.assert_allclose(np.abs(axes.axes.T @ vt[:3].T), np.eye(3), atol=1e-8)
    np.testing.assert_allclose((axes.project(cells) ** 2).sum(axis=0), s[:3] ** 2)
    assert distribution.fit_axes(cells, 99).axes.shape == (8, 8)
    assert distribution.fit_axes(cells[:4], 99).axes.shape == (8, 3)


def test_compare_needs_cells_and_rewards_the_right_zeros():
    random = np.random.default_rng(5)
    rate = random.uniform(0.05, 2, 30)
    observed, same = (np.log1p(random.poisson(rate, (200, 30))) for _ in range(2))
    smooth = same.mean(axis=0) + random.normal(0, 0.01, same.shape)
    axes = distribution.fit_axes(observed, 5)
    options = {"axes": axes, "bandwidth": 1.0, "seed": 0}
    good, bad = distribution.compare(same, observed, **options), distribution.compare(smooth, observed, **options)
    assert good["variance_agreement"] > 0.9 > 0.2 > bad["variance_agreement"]
    assert good["zero_fraction_agreement"] > 0.95 > bad["zero_fraction_agreement"]
    assert good["mean_agreement"] > 0.95 and bad["mean_agreement"] > 0.95
    assert good["energy_distance"] < bad["energy_distance"]
    assert good["two_sample_auc"] < bad["two_sample_auc"]
    assert all(np.isnan(v) for v in distribution.compare(same[:9], observed, **options).values())
