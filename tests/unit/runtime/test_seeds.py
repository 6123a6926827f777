"""Random streams depend on names, and on nothing else."""

from __future__ import annotations

import itertools

import numpy as np

from dbdiffusion.runtime.seeds import derive_seed, rng


def test_seeds_never_change():
    """Written down once: another value would change every result."""
    assert derive_seed(1, "splits", "fold", 0) == 4610730814128802574
    assert rng(1, "x").integers(0, 1_000_000, 3).tolist() == [732689, 90730, 512592]


def test_seeds_are_distinct_and_fit_63_bits():
    labels = list(itertools.product([0, 1, 12], ["vae", "diffusion"], ["0", "1", "12"], range(20)))
    seeds = [derive_seed(*label) for label in labels]
    assert len(set(seeds)) == len(labels)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_neighbouring_labels_do_not_run_together():
    assert derive_seed(1, "a", "b") != derive_seed(1, "ab") != derive_seed(1, "a", "b", "")
    assert derive_seed(1, "1") != derive_seed(11) != derive_seed(1, 1, "")


def test_streams_do_not_depend_on_each_other():
    alone = rng(3, "noise", "STAT1").normal(size=5)
    rng(3, "noise", "IRF1").normal(size=100)
    assert np.array_equal(alone, rng(3, "noise", "STAT1").normal(size=5))


def test_streams_of_neighbouring_names_are_uncorrelated():
    streams = np.array([rng(1, "cells", i).normal(size=4000) for i in range(20)])
    off = np.corrcoef(streams)[np.triu_indices(20, 1)]
    # 190 correlations of sd 1/sqrt(4000) = 0.0158: beyond 5 sd is a 1 in 10^4 event
    assert np.abs(off).max() < 5 / np.sqrt(4000)
