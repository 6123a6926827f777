import numpy as np
import pytest

from dbdiffusion.data.log_means import expected_log, expected_log_cp10k


@pytest.mark.parametrize(
    ("mean", "dispersion", "scale"), [(0.02, 0.5, 2.5), (1.0, 0.3, 2.5), (1.0, 3.0, 0.5), (40.0, 0.2, 2.5), (5000.0, 0.1, 2.5)]
)
def test_expected_log_of_negative_binomial_counts(mean: float, dispersion: float, scale: float):
    random = np.random.default_rng(0)
    values = np.log1p(scale * random.poisson(random.gamma(1 / dispersion, dispersion * mean, 200_000)))
    found = float(expected_log(np.array(mean), np.array(dispersion), np.array(scale)))
    assert abs(found - values.mean()) < 4 * values.std() / np.sqrt(len(values))


def test_nothing_is_expected_of_nothing():
    assert expected_log(np.zeros(2), np.ones(2), np.ones(2)) == pytest.approx([0.0, 0.0], abs=1e-12)


def test_depth_and_gene_spread_are_averaged_over():
    random = np.random.default_rng(1)
    share, dispersion, gene_sd = np.array([1e-4, 2e-3]), np.array([0.3, 0.1]), np.array([0.4, 0.1])
    depth = 4000 * np.exp(random.normal(0, 0.4, 300_000))[:, None]
    mean = depth * share * np.exp(random.normal(size=(len(depth), 2)) * gene_sd)
    counts = random.poisson(random.gamma(1 / dispersion, dispersion * mean))
    values = np.log1p(counts * 1e4 / depth)
    found = expected_log_cp10k(share, dispersion, gene_sd, library=4000.0, depth_sd=0.4)
    assert (np.abs(found - values.mean(0)) < 4 * values.std(0) / np.sqrt(len(depth)) + 5e-4).all()
