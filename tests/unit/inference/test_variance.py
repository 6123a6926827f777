import numpy as np
import pytest
from scipy import optimize, stats
from scipy.special import digamma, polygamma

from dbdiffusion.inference import variance


@pytest.mark.parametrize("x", [1e-8, 1e-3, 0.1, 1.0, 10.0, 1e4, 1e9])
def test_trigamma_inverse(x):
    assert polygamma(1, float(variance.trigamma_inverse(x))) == pytest.approx(x, rel=1e-5)


def test_fit_f_solves_the_moment_equations_of_smyth_2004():
    values = np.random.default_rng(0).chisquare(7, 300) * np.random.default_rng(1).uniform(0.2, 4, 300)
    df = 7.0
    scale, d0 = variance.fit_f(values, df)
    # An independent numerical solution of the two equations, by root finding.
    e = np.log(values) - digamma(df / 2) + np.log(df / 2)
    want = optimize.brentq(lambda d: polygamma(1, d / 2) - (e.var(ddof=1) - polygamma(1, df / 2)), 1e-3, 1e4)
    assert d0 == pytest.approx(want, rel=1e-6)
    assert np.log(scale) == pytest.approx(e.mean() + digamma(want / 2) - np.log(want / 2), rel=1e-6)


def test_fit_f_finds_the_parameters_of_a_scaled_f():
    random = np.random.default_rng(3)
    df = random.uniform(3, 12, 20000)
    s2 = 2.5 * random.f(df, 6.0)
    scale, d0 = variance.fit_f(s2, df)
    assert scale == pytest.approx(2.5, rel=0.04)
    assert d0 == pytest.approx(6.0, rel=0.1)


def test_fit_f_agrees_with_maximum_likelihood():
    s2 = 0.7 * np.random.default_rng(5).f(8, 10, 4000)
    start = [np.log(0.7), np.log(10)]
    found = optimize.minimize(lambda t: -stats.f.logpdf(s2 / np.exp(t[0]), 8, np.exp(t[1])).sum() + len(s2) * t[0], start).x
    scale, d0 = variance.fit_f(s2, 8.0)
    assert scale == pytest.approx(np.exp(found[0]), rel=0.05)
    assert d0 == pytest.approx(np.exp(found[1]), rel=0.2)


def test_equal_variances_are_pooled_and_empty_input_is_no_prior():
    scale, d0 = variance.fit_f(np.full(50, 3.0), 5.0)
    assert d0 == variance.MAX_DF
    assert scale > 0
    assert variance.fit_f(np.zeros(5), 4.0) == (0.0, variance.MAX_DF)


def test_squeeze_weighs_by_degrees_of_freedom():
    assert variance.squeeze(np.array([4.0]), 3.0, 1.0, 1.0)[0] == pytest.approx((1 * 1 + 3 * 4) / 4)


def test_cell_variance_of_two_cells_leans_on_the_other_perturbations():
    values = variance.cell_variance(np.array([[0.0], [2.0], [np.nan]]), np.array([2, 101, 1]))
    pooled = (1 * 0.0 + 100 * 2.0) / 101
    assert values[0, 0] == pytest.approx((10 * pooled + 0) / 11)
    assert values[2, 0] == pytest.approx(pooled)
    assert np.isfinite(values).all()
