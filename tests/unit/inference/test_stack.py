import numpy as np
import pytest
from scipy.optimize import minimize

from dbdiffusion.inference import stack


def slow_projection(x):
    bounds, limit = [(0, None)] * len(x), {"type": "ineq", "fun": lambda v: 1 - v.sum()}
    return minimize(lambda v: ((v - x) ** 2).sum(), np.full(len(x), 0.1), bounds=bounds, constraints=limit).x


def test_projection_against_a_general_solver():
    points = np.random.default_rng(0).normal(0.3, 0.7, (40, 4))
    found = stack.project(points)
    assert np.allclose(found, [slow_projection(p) for p in points], atol=2e-3)


@pytest.mark.parametrize("n_variates", [1, 2, 5])
def test_solve_against_a_general_solver(n_variates):
    random = np.random.default_rng(n_variates)
    z = random.normal(size=(6, 30, n_variates))
    gram = np.einsum("bki,bkj->bij", z, z)
    cross = np.einsum("bki,bk->bi", z, z @ np.full(n_variates, 0.4) @ np.eye(30) + random.normal(size=(6, 30)))
    found = stack.solve(gram, cross)
    for a, b, x in zip(gram, cross, found, strict=True):
        limit = {"type": "ineq", "fun": lambda v: 1 - v.sum()}
        start = np.full(n_variates, 0.1)
        want = minimize(lambda v, a=a, b=b: v @ a @ v / 2 - b @ v, start, bounds=[(0, None)] * n_variates, constraints=limit).x
        assert np.allclose(x, want, atol=2e-3)


def data(weights, seed=0, k=60, genes=80, noise=0.5):
    random = np.random.default_rng(seed)
    z = random.normal(size=(len(weights), k, genes))
    u = np.einsum("v,vkg->kg", weights, z) + noise * random.normal(size=(k, genes))
    return u, z, np.arange(k) % 6


def test_tuning_finds_the_weights():
    u, z, folds = data(np.array([0.6, 0.0, 0.3]))
    found = stack.tune(u, z, folds)
    assert np.allclose(found.all.mean(0), [0.6, 0.0, 0.3], atol=0.05)
    assert (found.all >= 0).all()
    assert (found.all.sum(1) <= 1 + 1e-9).all()


def test_tuning_follows_genes_that_differ_and_shares_among_genes_that_do_not():
    random = np.random.default_rng(2)
    z = random.normal(size=(1, 80, 60))
    truth = np.where(np.arange(60) < 30, 0.9, 0.1)
    folds = np.arange(80) % 8
    differ = stack.tune(truth * z[0] + 0.5 * random.normal(size=(80, 60)), z, folds)
    assert np.corrcoef(differ.all[:, 0], truth)[0, 1] > 0.95
    same = stack.tune(0.5 * z[0] + 3 * random.normal(size=(80, 60)), z, folds)
    assert same.all.std() < 0.05


def test_useless_predictor_gets_no_weight_and_the_sum_is_bound():
    u, z, folds = data(np.array([0.0]), noise=1.0)
    assert stack.tune(u, z, folds).all.mean() < 0.03
    u, z, folds = data(np.array([0.9, 0.8]))
    assert np.allclose(stack.tune(u, z, folds).all.sum(1), 1, atol=1e-6)


def test_own_error_never_enters_the_weights_of_a_pseudo_target(monkeypatch):
    # The amount of shrinkage is one number for all; everything else is left out.
    monkeypatch.setattr(stack, "SHRINKAGE", (1.0,))
    u, z, folds = data(np.array([0.5, 0.2]))
    changed = u.copy()
    changed[folds == 3] *= -50
    first, second = stack.tune(u, z, folds), stack.tune(changed, z, folds)
    assert np.allclose(first.left_out[3], second.left_out[3], rtol=1e-6)
    assert not np.allclose(first.left_out[2], second.left_out[2], atol=1e-3)


def test_a_gene_without_variation_is_given_finite_weights():
    u, z, folds = data(np.array([0.5, 0.2]))
    u[:, 0] = 0
    z[:, :, 0] = 0
    assert np.isfinite(stack.tune(u, z, folds).all).all()
