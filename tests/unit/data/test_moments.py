"""Moments against loops over cells."""

from __future__ import annotations

import time
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from dbdiffusion.data.moments import Moments, _mean_var, write_moments
from dbdiffusion.data.normalise import load_expression
from dbdiffusion.data.splits import Splits, cells_digest
from dbdiffusion.runtime.errors import UserError


@pytest.fixture(scope="module")
def moments(tiny_screen: Path) -> Moments:
    return Moments.read(tiny_screen / "moments.h5ad")


@pytest.fixture(scope="module")
def cells(tiny_screen: Path) -> tuple[np.ndarray, pd.DataFrame]:
    found = load_expression(tiny_screen / "cells.h5ad", halves=Splits.read(tiny_screen / "splits.json").halves)
    return found.values.toarray().astype(np.float64), found.obs  # noqa: PD011


def check(summary: tuple[int, np.ndarray, np.ndarray], own: np.ndarray) -> None:
    n, mean, variance = summary
    assert n == len(own) > 1
    np.testing.assert_allclose(mean, own.mean(axis=0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(variance, own.var(axis=0, ddof=1), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("half", [None, "A", "B"])
def test_every_group(moments: Moments, cells: tuple[np.ndarray, pd.DataFrame], half: str | None) -> None:
    values, obs = cells
    assert moments.perturbations == sorted(set(obs["perturbation"]) - {"control"})
    in_half = np.ones(len(obs), dtype=bool) if half is None else (obs["half"] == half).to_numpy()
    for name in [*moments.perturbations, "control"]:
        own = (obs["perturbation"] == name).to_numpy() & in_half
        check(moments.mean_var(name, half), values[own])
        np.testing.assert_array_equal(moments.detected_cells(name, half), (values[own] > 0).sum(axis=0))
        assert moments.batch_cells(name, half).tolist() == [int((obs["batch"][own] == b).sum()) for b in moments.batches]


def test_control_by_guide_and_batch(moments: Moments, cells: tuple[np.ndarray, pd.DataFrame]) -> None:
    values, obs = cells
    control = (obs["perturbation"] == "control").to_numpy()
    guides = moments.control_guides
    assert guides == sorted(obs["guide"][control].unique())
    assert len(guides) == 8
    one = control & (obs["guide"] == guides[3]).to_numpy()
    check(moments.control(guides=[guides[3]]), values[one])
    check(moments.control("A", guides=[g for g in guides if g != guides[3]]), values[control & ~one & (obs["half"] == "A").to_numpy()])
    for extra in ({}, {"guides": guides[:2]}):
        keep = control.copy()
        if "guides" in extra:
            keep &= obs["guide"].isin(extra["guides"]).to_numpy()
        n, mean, variance = moments.control_by_batch(**extra)
        assert n.tolist() == moments.batch_cells("control", **extra).tolist()
        for at, batch in enumerate(moments.batches):
            check((n[at], mean[at], variance[at]), values[keep & (obs["batch"] == batch).to_numpy()])


def test_a_perturbation_depends_on_its_own_cells(tiny_screen: Path, moments: Moments, tmp_path: Path) -> None:
    table = anndata.read_h5ad(tiny_screen / "cells.h5ad")
    labels = table.obs["perturbation"].astype(str)
    victim = moments.perturbations[3]
    at = np.flatnonzero(labels == victim)
    counts = table.X.tolil()
    counts[at] = np.random.default_rng(0).poisson(9, (len(at), table.n_vars))
    table.X = counts.tocsr().astype(np.float32)
    table.write_h5ad(tmp_path / "cells.h5ad")
    write_moments(tmp_path / "cells.h5ad", tiny_screen / "splits.json", tmp_path / "moments.h5ad")
    changed = Moments.read(tmp_path / "moments.h5ad")
    same = (changed.groups["perturbation"] != victim).to_numpy()
    for layer in ("sum", "sum_sq", "detected"):
        assert np.array_equal(getattr(changed, layer)[same], getattr(moments, layer)[same])
        assert not np.array_equal(getattr(changed, layer)[~same], getattr(moments, layer)[~same])


def test_genes_without_variance_have_none(tmp_path: Path) -> None:
    """Cancellation must not leave a variance where all cells are alike, nor NaN where there is one cell."""
    labels = np.array(["control"] * 300 + ["G1"])
    counts = np.tile([7.0, 0.0, 1.0], (301, 1)).astype(np.float32)
    obs = pd.DataFrame({"perturbation": labels, "guide": "", "batch": "0", "total_counts": 12345.0}, index=[f"c{i}" for i in range(301)])
    anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=list("xyz"))).write_h5ad(tmp_path / "cells.h5ad")
    halves = np.array(["A"] * 301)
    Splits("none", ["G1"], {"all": {"targets": ["T"], "inner": {}}}, halves, cells_digest(obs.index)).write(tmp_path / "splits.json")
    write_moments(tmp_path / "cells.h5ad", tmp_path / "splits.json", tmp_path / "moments.h5ad")
    found = Moments.read(tmp_path / "moments.h5ad")
    assert (found.control()[2] == 0).all()
    n, mean, variance = found.mean_var("G1")
    assert n == 1
    assert (variance == 0).all()
    assert mean[0] > 0
    with pytest.raises(UserError, match="half 'B'"):
        found.mean_var("G1", "B")


@pytest.mark.parametrize("n", [30, 2000, 20_000])
def test_rounding_is_no_variance(n: int) -> None:
    """Sums over cells that are all alike leave a residue of rounding, which must not pass for variance; a real one stays."""
    levels = np.linspace(0.1, 7.3, 50)
    total, squares = np.cumsum(np.tile(levels, (n, 1)), axis=0)[-1], np.cumsum(np.tile(levels**2, (n, 1)), axis=0)[-1]
    assert (np.abs(squares - total**2 / n) > 0).any()
    assert (_mean_var(np.array(float(n)), total, squares)[1] == 0).all()
    one_cell_differs = squares + (levels + 0.01) ** 2 - levels**2
    assert (_mean_var(np.array(float(n)), total + 0.01, one_cell_differs)[1] > 0).all()


def test_errors(tiny_screen: Path, moments: Moments, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean"):
        moments.mean_var("GENE0000")
    with pytest.raises(UserError, match="with guides"):
        moments.control(guides=["NT99"])
    table = anndata.read_h5ad(tiny_screen / "cells.h5ad")
    table[::-1].copy().write_h5ad(tmp_path / "reversed.h5ad")
    with pytest.raises(UserError, match="splits were made for"):
        write_moments(tmp_path / "reversed.h5ad", tiny_screen / "splits.json", tmp_path / "moments.h5ad")
    assert not (tmp_path / "moments.h5ad").exists()


def test_same_input_same_bytes(tiny_screen: Path, tmp_path: Path) -> None:
    write_moments(tiny_screen / "cells.h5ad", tiny_screen / "splits.json", tmp_path / "moments.h5ad")
    assert (tmp_path / "moments.h5ad").read_bytes() == (tiny_screen / "moments.h5ad").read_bytes()


def test_speed(tmp_path: Path) -> None:
    """20,000 cells x 300 genes take about a second of CPU time."""
    random = np.random.default_rng(0)
    n = 20_000
    counts = sparse.random(n, 300, 0.23, format="csr", random_state=0, dtype=np.float32)
    counts.data = np.ceil(counts.data * 4).astype(np.float32)
    labels = np.array(["control"] + [f"G{i:03d}" for i in range(199)])[random.integers(200, size=n)]
    obs = pd.DataFrame(
        {"perturbation": labels, "guide": "g", "batch": random.integers(3, size=n).astype(str), "total_counts": 5000.0},
        index=[f"c{i}" for i in range(n)],
    )
    anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"x{i}" for i in range(300)])).write_h5ad(tmp_path / "cells.h5ad")
    halves = np.array(["A", "B"])[random.integers(2, size=n)]
    splits = Splits("none", sorted(set(labels) - {"control"}), {}, halves, cells_digest(obs.index))
    splits.write(tmp_path / "splits.json")
    began = time.process_time()
    write_moments(tmp_path / "cells.h5ad", tmp_path / "splits.json", tmp_path / "moments.h5ad")
    assert time.process_time() - began < 5
