import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from dbdiffusion.config.inference import InferenceConfig
from dbdiffusion.inference import selection, table
from dbdiffusion.inference.debias import Queries
from dbdiffusion.inference.ttest import benjamini_hochberg
from dbdiffusion.runtime.seeds import rng


def pairs(seed=0, k=12, genes=30):
    random = np.random.default_rng(seed)
    labels = random.random((k, genes)) < 0.2
    return np.round(random.normal(size=labels.shape) + 1.5 * labels, 1), labels


def test_pooled_curve_written_out():
    scores, labels = pairs()
    grid, rates = selection.pooled_curve(scores, labels, np.ones(len(scores)))
    assert np.array_equal(grid, np.unique(scores))
    slow = []
    for cut in grid:
        called = scores >= cut
        pooled = (1 + (called & ~labels).sum()) / called.sum()
        share = [(c & ~y).sum() / max(c.sum(), 1) for c, y in zip(called, labels, strict=True)]
        slow.append(min(1.0, max(pooled, (1 + sum(share)) / (1 + len(scores)))))
    # A threshold may be used where a looser one may.
    assert np.allclose(rates, [min(slow[: i + 1]) for i in range(len(slow))])


def test_directions_count_twice():
    """Every wrong direction that is seen stands for two false ones, the further error of a new target too."""
    scores, agrees = pairs(2)
    selector = selection.Scored(np.zeros(1), scores, agrees, np.ones(len(scores)), agrees).calibrated("target", 0.1)
    for cut in (0.5, 1.0, 1.5):
        slow = []
        for looser in np.unique(scores[scores <= cut]):
            called = scores >= looser
            share = [2 * (c & ~y).sum() / max(c.sum(), 1) for c, y in zip(called, agrees, strict=True)]
            slow.append(max((2 + 2 * (called & ~agrees).sum()) / called.sum(), (2 + sum(share)) / (1 + len(scores))))
        assert selector.q_directions(np.array([cut]))[0] == pytest.approx(min(1.0, *slow))


def test_the_control_mean_is_not_taken_for_an_effect():
    """Nothing changes: predictions and observations share the error of the control mean, and agree by chance alone."""
    random = np.random.default_rng(0)
    control, own, seen = (random.normal(scale=s, size=(1 if s == 1 else 20, 3000)) for s in (1, 0.5, 0.7))
    effect, observed = own - control, seen - control
    agrees = selection.same_direction(effect, observed, np.full(effect.shape, 1.25), np.ones(3000))
    assert abs(agrees.mean() - 0.5) < 0.03
    assert (effect * observed > 0).mean() > 0.75
    # A control of many cells takes nothing off, a prediction of nothing agrees with nothing, a sign is as good as the other.
    assert np.array_equal(selection.same_direction(effect, observed, effect**2 + 1, np.zeros(3000)), effect * observed > 0)
    assert not selection.same_direction(np.zeros((2, 3000)), observed[:2], np.ones((2, 3000)), np.zeros(3000)).any()
    assert np.array_equal(selection.same_direction(-effect, -observed, np.full(effect.shape, 1.25), np.ones(3000)), agrees)
    # Where the control is all there is of an error, or no error is known, an effect must be larger than the predicted one.
    for total in (1.0, 0.5, 0.0):
        found = selection.same_direction(np.array([[1.0, 1.0]]), np.array([[0.9, 1.1]]), np.full((1, 2), total), np.ones(2))
        assert found.tolist() == [[False, True]]


def test_target_curve_written_out():
    scores, labels = pairs(1)
    levels, rates = selection.target_curve(scores, labels, np.ones(len(scores)))
    adjusted = []
    for k in range(len(scores)):
        others = np.delete(np.arange(len(scores)), k)
        null = scores[others][~labels[others]]
        p = [(1 + (null >= s).sum()) / (1 + scores[others].size) for s in scores[k]]
        adjusted.append(benjamini_hochberg(np.array(p)))
    for i in (40, 120, 180, 199):
        want = 0.0
        for level in levels[: i + 1]:
            called = np.array(adjusted) <= level
            share = (called & ~labels).sum(1) / np.maximum(called.sum(1), 1)
            want = max(want, (1 + share.sum()) / (1 + len(scores)))
        assert rates[i] == pytest.approx(min(want, 1.0))


def test_ridge_logistic_against_sklearn():
    random = np.random.default_rng(6)
    x = random.normal(size=(800, 5))
    y = random.random(800) < 1 / (1 + np.exp(-(x @ [1.0, -2.0, 0.0, 0.5, 0.0] - 1)))
    want = LogisticRegression(C=1 / 10.0, tol=1e-10, max_iter=1000).fit(x, y)
    assert np.allclose(selection.ridge_logistic(x, y, np.full(5, 10.0)), [*want.intercept_, *want.coef_[0]], atol=1e-4)
    separated = selection.ridge_logistic(np.arange(10.0)[:, None], np.arange(10) > 4, np.full(1, 0.1))
    assert np.isfinite(separated).all()


def test_scores_of_few_targets_shrink_to_the_predicted_effect():
    """Labels follow the predicted effect, and a trait of the target that with few targets is chance alone."""
    random = np.random.default_rng(3)
    n_pair, n_target = len(selection.PAIR_FEATURES), len(selection.TARGET_FEATURES)

    def draw(k: int) -> tuple[selection.Features, np.ndarray]:
        x = selection.Features(
            random.normal(size=(k, 200, n_pair)).astype(np.float32), random.normal(size=(k, n_target)).astype(np.float32)
        )
        return x, random.random((k, 200)) < 1 / (1 + np.exp(-x.pair[..., selection.PLAIN] + 1 - random.normal(size=(k, 1))))

    x, labels = draw(6)
    new, _ = draw(50)
    terms = x.expanded().reshape(-1, len(selection._log_odds(x, labels)) - 1)
    free = selection.ridge_logistic(terms, labels.ravel(), np.full(terms.shape[1], 10.0))
    plain = new.pair[..., selection.PLAIN]

    def agreement(beta: np.ndarray) -> float:
        return float(np.corrcoef(selection.score(beta, new).ravel(), plain.ravel())[0, 1])

    assert agreement(selection._log_odds(x, labels)) > agreement(free) + 0.02


def test_score_is_linear_in_the_expanded_terms():
    random = np.random.default_rng(2)
    n_pair, n_target = len(selection.PAIR_FEATURES), len(selection.TARGET_FEATURES)
    x = selection.Features(random.normal(size=(4, 6, n_pair)).astype(np.float32), random.normal(size=(4, n_target)).astype(np.float32))
    beta = random.normal(size=1 + n_pair + n_target + selection.EVIDENCE * n_target)
    assert np.allclose(selection.score(beta, x), x.expanded() @ beta[1:] + beta[0], atol=1e-4)


@pytest.mark.parametrize("unit", ["pooled", "target"])
def test_better_scores_have_smaller_p_and_q(unit):
    scores, labels = pairs(3, 40, 50)
    selector = selection.Scored(np.zeros(1), scores, labels, np.ones(40), labels).calibrated(unit, 0.1)
    found = np.sort(np.random.default_rng(0).normal(size=(3, 80)), axis=1)
    assert (np.diff(selector.p_values(found), axis=1) <= 0).all()
    assert (np.diff(selector.q_values(found), axis=1) <= 0).all()
    assert selector.p_values(np.array([[1e9]]))[0, 0] == pytest.approx(1 / (1 + labels.size))
    assert ((selector.q_values(found) >= 0) & (selector.q_values(found) <= 1)).all()


def test_conformal_p_of_null_pairs_is_valid():
    """P(p <= a and Y = 0) <= a for a random pair, in expectation over screens."""
    random = np.random.default_rng(4)
    hits = []
    for _ in range(400):
        labels = random.random((21, 20)) < 0.3
        scores = random.normal(size=labels.shape) + labels
        selector = selection.Scored(np.zeros(1), scores[:-1], labels[:-1], np.ones(20), labels[:-1]).calibrated("pooled", 0.1)
        hits.append(((selector.p_values(scores[-1:]) <= 0.1) & ~labels[-1:]).mean())
    mean, se = np.mean(hits), np.std(hits) / np.sqrt(len(hits))
    assert mean <= 0.1 + 3 * se
    assert mean >= 0.1 - 3 * se - 0.01


def test_weighted_curves_are_those_of_repeated_pseudo_targets():
    scores, labels = pairs(7, 10, 15)
    count = np.array([1, 2, 1, 3, 1, 1, 2, 1, 1, 1])
    repeated = np.repeat(scores, count, axis=0), np.repeat(labels, count, axis=0)
    grid, rates = selection.pooled_curve(scores, labels, count.astype(float), 3.0)
    called = repeated[0] >= grid[:, None, None]
    false = called & ~repeated[1]
    share = (false.sum(2) / np.maximum(called.sum(2), 1)).sum(1)
    pooled = (3 + false.sum((1, 2))) / called.sum((1, 2))
    slow = np.minimum(np.maximum(pooled, (3 + share) / (3 + count.sum())), 1)
    assert np.allclose(rates, np.minimum.accumulate(slow))
    null = selection._Null.of(scores, labels, count.astype(float))
    assert np.allclose(null.above(scores[0]), [(repeated[0][~repeated[1]] >= s).sum() for s in scores[0]])


def test_weights_hold_the_rate_for_targets_that_are_located_worse_than_pseudo_targets():
    """Calls are true with the chance that a perturbation is well located: targets of low confidence need the weights."""
    random = np.random.default_rng(8)
    rates = {False: [], True: []}

    def draw(confidence):
        signal = random.random((len(confidence), 60)) < 0.3
        labels = signal & (random.random((len(confidence), 1)) < confidence[:, None])
        return labels, signal + random.normal(scale=0.2, size=signal.shape)

    for _ in range(60):
        pseudo, targets = random.choice([0.5, 0.99], 150, p=[0.1, 0.9]), random.choice([0.5, 0.99], 40, p=[0.6, 0.4])
        labels, scores = draw(pseudo)
        truth, found = draw(targets)
        for weighted, into in rates.items():
            selector = selection.Scored(np.zeros(1), scores, labels, pseudo, labels).calibrated(
                "pooled", 0.2, targets if weighted else None
            )
            # With the same weights, since labels and directions are one here.
            assert np.allclose(selector.directions[1], np.minimum(2 * selector.curve[1], 1))
            called = (selector.q_values(found) <= 0.2) & (targets >= selector.min_confidence)[:, None]
            into.append((called & ~truth).sum() / max(called.sum(), 1))
    assert np.mean(rates[False]) > 0.25
    assert np.mean(rates[True]) <= 0.2 + 2 * np.std(rates[True]) / np.sqrt(60)


def test_weights_are_one_where_confidence_is_the_same_and_bounded_where_it_is_not():
    random = np.random.default_rng(9)
    same, one = selection.confidence_weights(np.full(5, 0.3), np.full(3, 0.3))
    assert np.array_equal(same, np.ones(5))
    assert one == 1
    weights, most = selection.confidence_weights(random.random(200), 0.2 * random.random(50))
    assert weights.mean() == pytest.approx(1)
    assert weights.max() / weights.min() <= selection.MAX_WEIGHT**2
    assert most >= weights.max()


def test_targets_far_from_all_pseudo_targets_make_calls_more_cautious():
    random = np.random.default_rng(10)
    labels = np.repeat(np.arange(10) < 5, 20)[None, :].repeat(40, 0)
    scores = labels + 0.1 * random.normal(size=labels.shape)
    scored = selection.Scored(np.zeros(1), scores, labels, random.uniform(0.4, 0.9, 40), labels)
    near, far = (scored.calibrated("pooled", 0.1, np.full(20, c)).curve[1].min() for c in (0.65, 0.1))
    assert far > 2 * near


def test_uninformative_screens_get_no_calls_and_one_class_gives_a_rate():
    x = selection.Features(np.zeros((30, 10, len(selection.PAIR_FEATURES)), np.float32), np.zeros((30, 6), np.float32))
    for labels in (np.zeros((30, 10), bool), np.random.default_rng(0).random((30, 10)) < 0.3):
        selector = selection.fit_scores(x, labels, labels, np.arange(30) % 5, 10**6, rng(1, "t")).calibrated("pooled", 0.1)
        assert (selector.q_values(selector.score(x)) > 0.1).all()


def test_a_sample_of_genes_keeps_labels_and_directions_together():
    random = np.random.default_rng(11)
    labels = random.random((20, 60)) < 0.3
    x = selection.Features(random.normal(size=(20, 60, len(selection.PAIR_FEATURES))), random.normal(size=(20, 6)))
    scored = selection.fit_scores(x, labels, ~labels, np.arange(20) % 5, 200, rng(1, "sample"))
    assert scored.labels.shape == (20, 10)
    assert np.array_equal(scored.agrees, ~scored.labels)


def test_pseudo_targets_of_no_confidence_are_left_out():
    random = np.random.default_rng(5)
    confidence = np.repeat([0.1, 0.9], [10, 40])
    labels = (random.random((50, 40)) < 0.3) & (confidence > 0.5)[:, None]
    scores = labels + random.normal(scale=0.4, size=labels.shape)
    kept = selection._confident(scores, labels, confidence + 0.01 * random.random(50), 0.1)
    assert kept[10:].all()
    assert kept[:10].sum() <= 2
    everyone = selection._confident(np.roll(scores, 1, axis=0)[::-1], np.roll(labels, 1, axis=0)[::-1], random.random(50), 0.1)
    assert everyone.mean() > 0.9


def test_features_of_a_pseudo_target_do_not_see_its_own_labels(screen):
    inference = table.infer(screen.effects, screen.locations, screen.means, InferenceConfig(), 1, select=False)
    pseudo = inference.pseudo["single"]
    found = table.cross_predictions(inference, "stacked").estimate
    first = selection.features(inference.screen, pseudo.queries, found, [pseudo.queries.base], pseudo.at)
    labels = inference.screen.labels.copy()
    labels[pseudo.at[0]] ^= True
    changed = type(inference.screen)(inference.screen.effects, inference.screen.sampling, labels, inference.screen.control_sampling)
    second = selection.features(changed, pseudo.queries, found, [pseudo.queries.base], pseudo.at)
    assert np.array_equal(first.pair[0], second.pair[0])
    assert np.array_equal(first.target[0], second.target[0])
    assert not np.array_equal(first.pair[1:], second.pair[1:])
    assert np.isfinite(first.pair).all()


def test_coherence_written_out(screen):
    inference = table.infer(screen.effects, screen.locations, screen.means, InferenceConfig(), 1, select=False)
    queries = Queries.of(inference.screen, screen.locations.select(screen.targets[:2]))
    found = selection.coherence(inference.screen, queries)
    z = np.clip(screen.effects.effect / screen.effects.se, -20, 20)
    for r in range(2):
        a, top, bottom = queries.local[r], 0.0, 0.0
        for k in np.flatnonzero(a):
            for m in np.flatnonzero(a):
                if k != m:
                    top += a[k] * a[m] * z[k] @ z[m] / np.linalg.norm(z[k]) / np.linalg.norm(z[m])
                    bottom += a[k] * a[m]
        assert found[r] == pytest.approx(top / bottom)
