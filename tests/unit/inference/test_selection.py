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
    grid, rates = selection.pooled_curve(scores, labels)
    assert np.array_equal(grid, np.unique(scores))
    slow = []
    for cut in grid:
        called = scores >= cut
        pooled = (1 + (called & ~labels).sum()) / called.sum()
        share = [(c & ~y).sum() / max(c.sum(), 1) for c, y in zip(called, labels, strict=True)]
        slow.append(min(1.0, max(pooled, (1 + sum(share)) / (1 + len(scores)))))
    # A threshold may be used where a looser one may.
    assert np.allclose(rates, [min(slow[: i + 1]) for i in range(len(slow))])


def test_target_curve_written_out():
    scores, labels = pairs(1)
    levels, rates = selection.target_curve(scores, labels)
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
    assert np.allclose(selection.ridge_logistic(x, y, 10.0), [*want.intercept_, *want.coef_[0]], atol=1e-4)
    separated = selection.ridge_logistic(np.arange(10.0)[:, None], np.arange(10) > 4, 0.1)
    assert np.isfinite(separated).all()


def test_score_is_linear_in_the_expanded_terms():
    random = np.random.default_rng(2)
    n_pair, n_target = len(selection.PAIR_FEATURES), len(selection.TARGET_FEATURES)
    x = selection.Features(random.normal(size=(4, 6, n_pair)).astype(np.float32), random.normal(size=(4, n_target)).astype(np.float32))
    beta = random.normal(size=1 + n_pair + n_target + selection.EVIDENCE * n_target)
    assert np.allclose(selection.score(beta, x), x.expanded() @ beta[1:] + beta[0], atol=1e-4)


@pytest.mark.parametrize("unit", ["pooled", "target"])
def test_better_scores_have_smaller_p_and_q(unit):
    scores, labels = pairs(3, 40, 50)
    curve = (selection.pooled_curve if unit == "pooled" else selection.target_curve)(scores, labels)
    selector = selection.Selector(np.zeros(1), -np.inf, np.sort(scores[~labels]), labels.size, unit, curve)
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
        null = np.sort(scores[:-1][~labels[:-1]])
        selector = selection.Selector(np.zeros(1), -np.inf, null, labels[:-1].size, "pooled", (np.zeros(1), np.ones(1)))
        hits.append(((selector.p_values(scores[-1:]) <= 0.1) & ~labels[-1:]).mean())
    mean, se = np.mean(hits), np.std(hits) / np.sqrt(len(hits))
    assert mean <= 0.1 + 3 * se
    assert mean >= 0.1 - 3 * se - 0.01


def test_uninformative_screens_get_no_calls_and_one_class_gives_a_rate():
    x = selection.Features(np.zeros((30, 10, len(selection.PAIR_FEATURES)), np.float32), np.zeros((30, 6), np.float32))
    for labels in (np.zeros((30, 10), bool), np.random.default_rng(0).random((30, 10)) < 0.3):
        selector = selection.fit_selector(x, labels, np.arange(30) % 5, "pooled", 0.1, 10**6, rng(1, "t"))
        assert (selector.q_values(selector.score(x)) > 0.1).all()


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
