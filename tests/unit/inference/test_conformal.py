import numpy as np
import pytest

from dbdiffusion.inference import conformal


def test_quantiles_written_out_and_covering():
    random = np.random.default_rng(0)
    effect = random.normal(size=(40, 200))
    sd = np.full(effect.shape, 0.5)
    error = random.normal(scale=0.5 + 0.5 * (np.abs(effect) > 1), size=effect.shape)
    found = conformal.fit_quantiles(error, sd, effect, sd)
    half = found.half_width(effect, sd, sd, 0.9)
    groups = np.searchsorted(found.edges, np.abs(effect) / 0.5, side="right")
    for g in range(len(found.edges) + 1):
        inside = np.abs(error)[groups == g] <= half[groups == g] + 1e-12
        n = inside.sum()
        assert n == min(np.ceil(0.9 * (inside.size + 1)), inside.size)
    fresh = random.normal(scale=0.5 + 0.5 * (np.abs(effect) > 1), size=effect.shape)
    assert (np.abs(fresh) <= half).mean() == pytest.approx(0.9, abs=0.015)


def test_few_pairs_share_a_group_and_nothing_is_zero_width():
    found = conformal.fit_quantiles(np.ones((2, 5)), np.ones((2, 5)), np.ones((2, 5)), np.ones((2, 5)))
    assert len(found.sorted_errors) == 1
    empty = conformal.fit_quantiles(np.zeros((2, 5)), np.zeros((2, 5)), np.zeros((2, 5)), np.zeros((2, 5)))
    assert np.isfinite(empty.half_width(*(np.zeros((1, 5)) for _ in range(3)), 0.95)).all()
