"""The truth, its gene choices and its own calls."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
from scipy import stats

from dbdiffusion.benchmark.ceilings import Truth, held_out, signed_calls
from dbdiffusion.data.moments import Moments
from dbdiffusion.data.sets import EffectSet
from dbdiffusion.data.splits import Splits


def test_halves_are_scored_against_their_own_control(screen):
    moments, splits = Moments.read(screen.moments), Splits.read(screen.splits)
    targets, genes = splits.targets("0"), moments.genes[:10]
    truth = Truth.measure(moments, targets, genes)
    for row, name in enumerate(targets):
        for half, effect in (("A", truth.replicate), ("B", truth.observed)):
            expected = moments.mean_var(name, half)[1][:10] - moments.control(half)[1][:10]
            np.testing.assert_allclose(effect[row], expected)


def test_top_genes_come_from_half_a_and_sizes_beyond_the_panel_are_left_out():
    random = np.random.default_rng(0)
    a, b = random.normal(size=(4, 15)), random.normal(size=(4, 15))
    truth = Truth(pd.Index(list("wxyz")), pd.Index(range(15)), a, b, np.sign(a).astype(int), np.sign(b).astype(int))
    sets = truth.gene_sets([300, 5, 15])
    assert list(sets) == ["all", "5"]
    for row in range(4):
        assert set(np.flatnonzero(sets["5"][row])) == set(np.argsort(-np.abs(a[row]))[:5])
    ties = replace(truth, replicate=np.zeros((4, 15)))
    np.testing.assert_array_equal(ties.top(5), np.arange(15) < 5 * np.ones((4, 1)))


def test_signed_calls_match_scipy_and_skip_genes_without_variance():
    random = np.random.default_rng(1)
    effect, se = random.normal(0, 2, (3, 50)), np.full((3, 50), 0.8)
    se[:, 0] = 0
    n = np.array([20, 30, 40])
    ones = np.ones_like(effect)
    calls = signed_calls(EffectSet(pd.Index(list("abc")), pd.Index(range(50)), ones, effect, se, ones, n, ones[0], ones[0], 100))
    for row in range(3):
        p = np.append(1.0, 2 * stats.t.sf(np.abs(effect[row, 1:]) / se[row, 1:], n[row] - 1))
        np.testing.assert_array_equal(calls[row] != 0, stats.false_discovery_control(p) <= 0.05)
    assert not calls[:, 0].any()
    assert (calls != 0).any()
    assert (calls[calls != 0] == np.sign(effect)[calls != 0]).all()


def test_only_unseen_measured_targets_are_held_out(screen):
    moments, splits = Moments.read(screen.moments), Splits.read(screen.splits)
    assert held_out(splits, moments, "0") == splits.targets("0")
    name = splits.targets("0")[0]
    lone = moments.groups.assign(n_cells=moments.groups["n_cells"].where(moments.groups["perturbation"] != name, 1))
    assert held_out(splits, replace(moments, groups=lone), "0") == splits.targets("0")[1:]
    unmeasured = replace(splits, folds={"all": {"targets": ["NOBODY"], "inner": {}}})
    assert held_out(unmeasured, moments, "all") == []
    assert Truth.measure(moments, [], moments.genes).observed.shape == (0, len(moments.genes))
