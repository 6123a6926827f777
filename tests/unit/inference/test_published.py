import numpy as np
import pytest
from ppi_py import ppi_mean_ci
from scipy.stats import norm

from dbdiffusion.inference import published
from dbdiffusion.inference.debias import Predictor, Queries, Screen, Variate


def setup(toy, lam):
    effects, random = toy.effect_set(8), np.random.default_rng(7)
    g = {name: random.normal(size=5) for name in [*effects.perturbations, "t1"]}
    screen = Screen.of(effects, 0.05)
    queries = Queries.of(screen, toy.location_set(effects, [[0.2] * 5 + [0] * 3], ["t1"]))
    variate = Variate(Predictor.of("g", toy.means_of(effects, g), effects), "debiased")
    return effects, g, screen, queries, toy.fixed_model([variate], [lam])


@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0])
def test_ppi_z_against_ppi_py(toy, lam):
    effects, g, screen, queries, model = setup(toy, lam)
    random = np.random.default_rng(0)
    # 400 generated cells of the target for one gene; the neighbours are the labelled data.
    generated = random.normal(g["t1"][0], 0.8, 400)
    mc = np.zeros((1, 5))
    mc[0, 0] = lam**2 * generated.var() / 400
    found = published.standard_errors("ppi_z", screen, queries, model, mc)[0, 0]
    y = effects.effect[:5, 0]
    yhat = np.array([g[f"k{k}"][0] for k in range(5)])
    low, high = ppi_mean_ci(y, yhat, generated, alpha=0.1, lam=lam)
    assert 2 * norm.ppf(0.95) * found == pytest.approx(float((high - low).item()), rel=1e-6)


def test_conservative_and_cells_only_written_out(toy):
    effects, _, screen, queries, model = setup(toy, 1.0)
    cells = published.standard_errors("cells_only", screen, queries, model, np.zeros((1, 5)))
    conservative = published.standard_errors("conservative", screen, queries, model, np.zeros((1, 5)))
    for j in range(5):
        n = effects.n_cells[:5]
        s2 = sum((n[k] - 1) * effects.variance[k, j] for k in range(5)) / sum(n - 1)
        t2 = np.var(effects.mean[:5, j], ddof=1)
        assert cells[0, j] == pytest.approx(np.sqrt(sum(s2 / n)) / 5)
        assert conservative[0, j] == pytest.approx(np.sqrt(sum(s2 / n + t2)) / 5)
