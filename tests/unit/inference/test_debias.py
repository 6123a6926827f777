from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from dbdiffusion.data.sets import CONTROL
from dbdiffusion.inference import debias, published, ttest
from dbdiffusion.inference.debias import Predictor, Queries, Screen, Variate


def test_estimate_is_the_formula_of_the_method_written_out(toy):
    effects, random = toy.effect_set(), np.random.default_rng(1)
    g = {name: random.normal(size=5) for name in [*effects.perturbations, "t1", "t2"]}
    weights = random.dirichlet(np.ones(6), 2)
    screen = Screen.of(effects, 0.05)
    queries = Queries.of(screen, toy.location_set(effects, weights, ["t1", "t2"]))
    variate = Variate(Predictor.of("g", toy.means_of(effects, g, mc=0.01), effects), "debiased")
    lam, d0 = 0.3, 4.0
    found = debias.estimate(toy.fixed_model([variate], [lam]), screen, queries, "target")
    for r, target in enumerate(("t1", "t2")):
        w = weights[r]
        for j in range(5):
            theta = lam * g[target][j] + sum(w[k] * (effects.effect[k, j] - lam * g[f"k{k}"][j]) for k in range(6))
            assert found.effect[r, j] == pytest.approx(theta)
            residual = [effects.effect[k, j] - lam * g[f"k{k}"][j] for k in range(6)]
            centre = sum(w[k] * residual[k] for k in range(6))
            local = sum(w[k] * (residual[k] - centre) ** 2 for k in range(6)) / (1 - (w**2).sum())
            df = 1 / (w**2).sum() - 1
            tau2 = (1.0 - 0.1) * (d0 * 1.0 + df * local) / (d0 + df)  # a tenth of the prior is noise
            noise = lam**2 * (0.01 + sum(w[k] ** 2 * 0.01 for k in range(6)))
            sampling = sum(w[k] ** 2 * screen.sampling[k, j] for k in range(6))
            assert found.variance[r, j] == pytest.approx(tau2 * (1 + (w**2).sum()) + sampling + noise)
            assert found.df[r] == pytest.approx(4.0 + df)


def test_weight_one_and_uniform_neighbours_is_the_published_estimator(toy):
    effects, random = toy.effect_set(), np.random.default_rng(2)
    g = {name: random.normal(size=5) for name in [*effects.perturbations, "t1"]}
    screen = Screen.of(effects, 0.05)
    queries = Queries.of(screen, toy.location_set(effects, [[1 / 3, 1 / 3, 1 / 3, 0, 0, 0]], ["t1"]))
    variate = Variate(Predictor.of("g", toy.means_of(effects, g), effects), "debiased")
    found = debias.estimate(toy.fixed_model([variate], [1.0]), screen, queries, "target")
    want = g["t1"] + np.mean([effects.effect[k] - g[f"k{k}"] for k in range(3)], axis=0)
    assert np.allclose(found.effect[0], want)


def test_neighbours_without_a_prediction_are_left_out_of_the_difference_only(toy):
    effects, random = toy.effect_set(), np.random.default_rng(3)
    g = {name: random.normal(size=5) for name in ["k0", "k1", "t1", "t2"]}
    screen = Screen.of(effects, 0.05)
    weights = [[0.5, 0.3, 0.2, 0, 0, 0], [0.1, 0.1, 0.8, 0, 0, 0]]
    queries = Queries.of(screen, toy.location_set(effects, weights, ["t1", "t2"]))
    shift, _, known = Variate(Predictor.of("g", toy.means_of(effects, g), effects), "debiased").shift(queries, "target")
    assert np.allclose(shift[0], g["t1"] - (0.5 * g["k0"] + 0.3 * g["k1"]) / 0.8)
    assert known.tolist() == [True, False]
    assert not shift[1].any()


def test_control_is_a_neighbour_with_effect_zero_in_additive_locations(toy):
    effects, random = toy.effect_set(), np.random.default_rng(4)
    g = {name: random.normal(size=5) for name in [*effects.perturbations, "tA+tB"]}
    screen = Screen.of(effects, 0.05)
    queries = Queries.of(screen, toy.location_set(effects, [[1, 1, 0, 0, 0, 0, -1]], ["tA+tB"], kind="additive"))
    variate = Variate(Predictor.of("g", toy.means_of(effects, g), effects), "debiased")
    found = debias.estimate(toy.fixed_model([variate], [1.0]), screen, queries, "target")
    want = g["tA+tB"] + effects.effect[0] - g["k0"] + effects.effect[1] - g["k1"]
    assert np.allclose(found.effect[0], want)
    assert queries.local_df[0] == 0
    assert queries.sum_sq[0] == 2
    missing = {name: value for name, value in g.items() if name != "k0"}
    assert not Variate(Predictor.of("g", toy.means_of(effects, missing), effects), "debiased").shift(queries, "target")[2][0]


def test_a_generated_control_takes_the_generators_own_offset_out(toy):
    effects = toy.effect_set()
    g = {name: np.full(5, 2.0) for name in [*effects.perturbations, "t1", CONTROL]}
    predictor = Predictor.of("g", toy.means_of(effects, g, {CONTROL: "control"}), effects)
    assert np.allclose(predictor.effects_of(pd.Index(["t1"]), "target")[0], 0)


def test_roles_of_neighbours(toy):
    effects = toy.effect_set()
    g = {name: np.zeros(5) for name in [*effects.perturbations, "t1"]}
    trained = Predictor.of("g", toy.means_of(effects, g, dict.fromkeys(effects.perturbations, "train")), effects)
    assert not trained.out_of_fold
    assert trained.known.all()
    mixed = Predictor.of("g", toy.means_of(effects, g, {"k0": "train"}), effects)
    assert mixed.out_of_fold
    assert mixed.known.tolist() == [False, True, True, True, True, True]


def test_what_was_learned_for_a_fold_does_not_know_its_pseudo_targets(make_screen):
    """Changing a pseudo-target's effects leaves what predicts it unchanged but for what it is as a neighbour."""
    screen = make_screen(perturbations=20)
    one = Screen.of(screen.effects, 0.05)
    pseudo = debias.pseudo_targets(one, screen.locations, "single", 1)
    out = pseudo.folds == 0
    observed = pseudo.observed.copy()
    observed[out] += 5.0
    variates = (Variate(Predictor.of("g", screen.means["dbdiffusion"], screen.effects), "debiased"),)
    before = debias.fit(one, pseudo, variates, 0.5, 0.95)
    after = debias.fit(one, replace(pseudo, observed=observed), variates, 0.5, 0.95)
    assert np.allclose(before.prior_left[0], after.prior_left[0])
    assert not np.allclose(before.prior_left[1], after.prior_left[1])


def test_degenerate_screens_give_finite_estimates(toy):
    effects = toy.effect_set(4, n_cells=[2, 2, 60, 60])
    effects.effect[:, 2] = effects.variance[:, 2] = effects.se[:, 2] = 0
    screen = Screen.of(effects, 0.05)
    one_neighbour = toy.location_set(effects, [[1, 0, 0, 0]], ["t1"])
    pseudo = {"single": debias.pseudo_targets(screen, one_neighbour, "single", 1)}
    model = debias.fit_uncalibrated(screen, Queries.of(screen, one_neighbour), (), 0.0)
    found = debias.estimate(model, screen, Queries.of(screen, one_neighbour), "target")
    assert len(pseudo["single"].queries) == 0
    assert np.isfinite(found.variance).all()
    assert found.df[0] > 0
    assert (found.variance[0, [0, 1, 3, 4]] > 0).all()


def test_a_slope_multiplies_the_estimate_and_what_is_known_of_its_error(toy):
    effects, random = toy.effect_set(), np.random.default_rng(5)
    screen = Screen.of(effects, 0.05)
    queries = Queries.of(screen, toy.location_set(effects, random.dirichlet(np.ones(6), 2), ["t1", "t2"]))
    g = {name: random.normal(size=5) for name in [*effects.perturbations, "t1", "t2"]}
    model = toy.fixed_model([Variate(Predictor.of("g", toy.means_of(effects, g, mc=0.01), effects), "raw")], [0.4])
    plain = debias.estimate(model, screen, queries, "target")
    # Sizes on either side of two points, and between them.
    size = np.log(plain.effect**2 / 0.1)
    points = tuple(np.quantile(size, [0.3, 0.7]))
    found = debias.estimate(replace(model, slopes=debias.Slopes(points, np.array([0.2, 1.5]))), screen, queries, "target")
    slope = 0.2 + 1.3 * np.clip((size - points[0]) / (points[1] - points[0]), 0, 1)
    assert np.allclose(found.effect, slope * plain.effect)
    assert np.allclose(found.known, slope**2 * plain.known)
    assert np.allclose(found.variance - found.known, plain.variance - plain.known)
    assert np.ptp(slope) == pytest.approx(1.3)
    cells = [published.standard_errors("cells_only", screen, queries, model, found.noise, s) for s in (1.0, found.slope)]
    assert np.allclose(cells[1], slope * cells[0])


def sparse_predictions(random, truth_of=lambda effect: effect):
    """Predicted and observed effects of 40 x 200 pairs, one in ten not 0; folds."""
    effect = random.normal(size=(40, 200)) * (random.random((40, 200)) < 0.1)
    return effect, truth_of(effect) + random.normal(scale=0.1, size=effect.shape), np.arange(40) % 10


def test_slopes_shrink_what_is_noise_and_stretch_what_is_shrunk():
    random = np.random.default_rng(0)
    truth, observed, folds = sparse_predictions(random)
    effect = 0.7 * truth + random.normal(scale=0.1, size=truth.shape)
    own = np.full(200, 0.01)
    slopes = debias.fit_slopes(observed, effect, own, folds)
    assert slopes.all[0] < 0.7
    assert slopes.all[1] == pytest.approx(1 / 0.7, abs=0.1)
    new, again, _ = sparse_predictions(random)
    raw = 0.7 * new + random.normal(scale=0.1, size=new.shape)
    assert ((again - slopes.of(raw, own) * raw) ** 2).mean() < 0.85 * ((again - raw) ** 2).mean()
    # A pseudo-target's own effects do not enter its slopes.
    assert np.allclose(debias.fit_slopes(observed + 0.01 * (folds == 0)[:, None], effect, own, folds).left_out[0], slopes.left_out[0])


def test_slopes_are_one_where_nothing_is_gained():
    effect, observed, folds = sparse_predictions(np.random.default_rng(1))
    slopes = debias.fit_slopes(observed, effect, np.full(200, 0.01), folds)
    assert slopes.of(effect, np.full(200, 0.01)) == pytest.approx(1.0)
    assert (debias.fit_slopes(observed, 0 * effect, np.zeros(200), folds).all == 1).all()


@pytest.mark.parametrize("count", [4, 60])
@pytest.mark.parametrize("strength", [0.0, 0.7])
def test_strongest_predictions_are_held_where_targets_differ_in_strength(count, strength):
    inside, fitted = [], []
    for seed in range(10 if count > 20 else 40):
        random = np.random.default_rng(seed)

        def drawn(random=random):
            effect = random.normal(size=(count, 300)) * np.where(random.random((count, 300)) < 0.1, 1.0, 0.05)
            off = strength * random.normal(size=(count, 1)) + 0.2 * strength * random.normal(size=effect.shape)
            return effect, off * effect + random.normal(scale=0.2, size=effect.shape)

        effect, error = drawn()
        tau = np.full(effect.shape, 0.04)
        found = debias.Estimate(effect, tau, 0 * tau, 0 * tau, np.full(count, 50.0), tau)
        stretch, df = debias.fit_tails(error, found, 0 * tau + 0.04, 0 * tau, 0.95)
        effect, error = drawn()
        variance = tau * stretch.factor(tau, np.full(300, 0.04)) + stretch.strength * effect**2
        half = ttest.quantile(0.95, np.minimum(np.full(count, 50.0), df))[:, None] * np.sqrt(variance)
        inside.append((np.abs(error) <= half)[debias.strongest(effect)].mean())
        fitted.append(stretch.strength)
    assert np.mean(inside) >= 0.9
    assert np.mean(np.sqrt(fitted)) < 0.2 if strength == 0 else np.mean(np.sqrt(fitted)) > 0.4


def test_strength_widens_the_interval_and_leaves_the_test_of_no_effect():
    tau = np.array([[1.0, 2.0]])
    found = debias.Estimate(3 * tau, tau + 0.5, 0 * tau + 0.1, 0 * tau, np.array([9.0]), tau, 0.4 * tau)
    null = found.without_strength()
    assert np.allclose(null.variance, 0.6 * tau + 0.5)
    assert np.allclose(null.without_strength().variance, null.variance)
    assert (null.total_df(0.0, 0.95) > found.total_df(0.0, 0.95)).all()


@pytest.mark.parametrize("heavy", [0.0, 0.05])
def test_tails_hold_at_the_level_and_far_beyond(heavy):
    random = np.random.default_rng(0)
    error = random.normal(size=(300, 100)) * np.where(random.random((300, 100)) < heavy, 2.5, 1.0)
    variance = np.full(error.shape, float((error**2).mean()))
    found = debias.Estimate(0 * error, variance, 0 * error, 0 * error, np.full(300, 50.0), 0 * error)
    stretch, df = debias.fit_tails(error, found, variance, 0 * error, 0.95)
    new = random.normal(size=error.shape) * np.where(random.random(error.shape) < heavy, 2.5, 1.0)
    p = ttest.p_values(new, np.sqrt(stretch.factor(variance, np.ones(100)) * variance), min(df, 50.0))
    assert (p > 0.05).mean() == pytest.approx(0.95, abs=0.01)
    assert (p < 0.005).mean() <= 0.005 + 0.0015
    assert (df < 10) == (heavy > 0)


def test_what_is_least_sure_is_held_as_often_as_the_rest():
    random = np.random.default_rng(0)
    tau = np.broadcast_to(np.geomspace(0.01, 10, 200), (400, 200))
    truly = tau * np.where(tau > np.quantile(tau, 0.88), 2.0, 0.6)
    own, known = np.full(tau.shape, 0.05), np.full(tau.shape, 0.2)

    def drawn(variance):
        return random.normal(size=tau.shape) * np.sqrt(variance)

    found = debias.Estimate(0 * tau, tau + known, known, 0 * tau, np.full(400, 30.0), 0 * tau)
    stretch, df = debias.fit_tails(drawn(truly + known + own), found, own, own, 0.95)
    tau = tau * stretch.factor(tau, own[0])
    found = replace(found, variance=tau + known, df=np.minimum(found.df, df))
    half = ttest.quantile(0.95, found.total_df(0.0, 0.95)) * np.sqrt(found.variance)
    inside = np.abs(drawn(truly + known)) <= half
    assert inside[:, -10:].mean() == pytest.approx(0.95, abs=0.02)
    assert inside[:, 80:160].mean() == pytest.approx(0.95, abs=0.02)


def test_few_pseudo_targets_do_not_promise_more_than_they_tell():
    random = np.random.default_rng(0)
    tau, inside = np.broadcast_to(np.geomspace(0.1, 10, 200), (4, 200)), []
    for _ in range(150):
        error, new = (random.normal(size=(4, 200)) * np.sqrt(tau) * np.exp(random.normal(scale=0.7, size=(4, 1))) for _ in range(2))
        stretch, df = debias.fit_tails(
            error, debias.Estimate(0 * tau, tau, 0 * tau, 0 * tau, np.full(4, 30.0), tau), 0 * tau + 1, 0 * tau, 0.95
        )
        assert stretch.log_factor[0] == stretch.log_factor[1]
        half = ttest.quantile(0.95, np.array([min(df, 30.0)])) * np.sqrt(tau * stretch.factor(tau, np.ones(200)))
        inside.append((np.abs(new) <= half).mean())
    assert 0.945 <= np.mean(inside) <= 0.975


@pytest.mark.parametrize("size", [0.05, 4.0])
def test_factors_stay_in_their_range(size):
    random = np.random.default_rng(0)
    error = size * random.standard_t(2.2, (100, 100))
    tau = np.broadcast_to(np.geomspace(0.5, 2, 100), error.shape)
    found = debias.Estimate(error, tau, 0 * error, 0 * error, np.full(100, 30.0), 0 * error)
    stretch, _ = debias.fit_tails(error, found, np.ones(error.shape), 0 * error, 0.95)
    factors = np.exp(stretch.log_factor)
    assert (factors >= debias.FACTORS[0] * (1 - 1e-9)).all() and (factors <= debias.FACTORS[1] * (1 + 1e-9)).all()


def test_interval_of_a_sum_of_an_estimated_and_a_known_variance():
    tau, known, extra = np.array([[1.0, 0.0, 2.0]]), np.array([[0.0, 1.0, 3.0]]), np.array([0.0, 0.5, 1.0])
    found = debias.Estimate(0 * tau, tau + known, known, 0 * tau, np.array([5.0]), 0 * tau)
    df = found.total_df(extra, 0.95)
    assert df[0, :2] == pytest.approx([5.0, 1e4], rel=1e-3)
    half = stats.t.ppf(0.975, df) * np.sqrt(found.variance + extra)
    assert half[0, 2] == pytest.approx(np.sqrt(2.0 * stats.t.ppf(0.975, 5) ** 2 + 4.0 * 1.96**2), rel=1e-3)


def test_mix_is_the_same_sparse_and_dense():
    random = np.random.default_rng(0)
    weights = random.random((30, 40)) * (random.random((30, 40)) < 0.05)
    values = random.normal(size=(40, 7))
    assert np.allclose(debias.mix(weights, values), weights @ values)
