import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests

from dbdiffusion.inference import ttest


def test_benjamini_hochberg_against_statsmodels():
    p = np.random.default_rng(0).uniform(size=(5, 40)) ** 2
    p[0, :5] = p[0, 0]
    assert np.allclose(ttest.benjamini_hochberg(p), [multipletests(row, method="fdr_bh")[1] for row in p])


def test_p_values_against_scipy_and_without_error():
    assert np.isclose(ttest.p_values(np.array([1.2]), np.array([0.5]), 7)[0], 2 * stats.t.sf(2.4, 7))
    assert ttest.p_values(np.array([0.0, 0.3]), np.zeros(2), 5).tolist() == [1.0, 0.0]


def test_labels_of_two_cells_ask_more_and_unvaried_genes_are_not_called():
    effect, se = np.array([[0.5, 0.0, 1.0]] * 2), np.array([[0.1, 0.1, 0.0]] * 2)
    labels = ttest.de_labels(effect, se, np.array([2, 200]), 0.05)
    assert labels.tolist() == [[False, False, False], [True, False, False]]


def test_quantile():
    assert np.isclose(ttest.quantile(0.95, 1e6), 1.96, atol=1e-3)


def test_many_quantiles_are_interpolated_and_turned_back():
    df = np.geomspace(1, 1e4, 50_000)
    found = ttest.quantile(0.95, df)
    assert np.allclose(found[::500], stats.t.ppf(0.975, df[::500]), rtol=1e-4)
    assert np.allclose(ttest.df_of_quantile(0.95, found), df, rtol=1e-3)
