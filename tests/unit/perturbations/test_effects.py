"""Effects against a loop over cells, and the panel against what it promises."""

from __future__ import annotations

import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from dbdiffusion.config.qc import PanelConfig
from dbdiffusion.data.moments import Moments, write_moments
from dbdiffusion.data.sets import EffectSet
from dbdiffusion.data.splits import Splits
from dbdiffusion.perturbations.effects import control_weights, estimate_effects, gene_scale, select_genes, write_effects
from dbdiffusion.runtime.errors import UserError


@pytest.fixture(scope="module")
def dense(tiny_screen: Path) -> tuple[pd.DataFrame, np.ndarray]:
    """Cells' table with halves, and ln(1 + CP10k), dense."""
    cells = anndata.read_h5ad(tiny_screen / "cells.h5ad")
    obs = cells.obs.assign(half=Splits.read(tiny_screen / "splits.json").halves)
    return obs, np.log1p(cells.X.toarray().astype(float) / obs["total_counts"].to_numpy()[:, None] * 1e4)


@pytest.fixture(scope="module")
def moments(tiny_screen: Path) -> Moments:
    return Moments.read(tiny_screen / "moments.h5ad")


@pytest.mark.parametrize(("half", "control_half"), [(None, None), ("B", "A")])
def test_effects_equal_a_loop_over_cells(dense, moments, half, control_half) -> None:
    obs, values = dense
    names = moments.perturbations[:4]
    found = estimate_effects(moments, names, half=half, control_half=control_half)
    is_control = (obs["perturbation"] == "control").to_numpy() & ((obs["half"] == control_half).to_numpy() | (control_half is None))
    for row, name in enumerate(names):
        mine = (obs["perturbation"] == name).to_numpy() & ((obs["half"] == half).to_numpy() | (half is None))
        matched, error = np.zeros(values.shape[1]), np.zeros(values.shape[1])
        for batch in sorted(obs["batch"].unique()):
            control = is_control & (obs["batch"] == batch).to_numpy()
            share = (mine & (obs["batch"] == batch).to_numpy()).sum() / mine.sum()
            matched += share * values[control].mean(axis=0)
            error += share**2 * values[control].var(axis=0, ddof=1) / control.sum()
        effect = values[mine].mean(axis=0) - matched
        np.testing.assert_allclose(found.effect[row], effect, atol=1e-6)
        np.testing.assert_allclose(found.se[row], np.sqrt(values[mine].var(axis=0, ddof=1) / mine.sum() + error), atol=1e-6)
        np.testing.assert_allclose(found.mean[row], values[is_control].mean(axis=0) + effect, atol=1e-6)
        assert found.n_cells[row] == mine.sum()


def test_control_weights_pool_small_batches() -> None:
    composition, control = np.array([30, 10, 60]), np.array([50, 4, 46])
    weights = control_weights(composition, control)
    # Written out: batch 1 has too few controls, its tenth goes to all control cells alike.
    np.testing.assert_allclose(weights, [0.3 + 0.1 * 0.5, 0.1 * 0.04, 0.6 + 0.1 * 0.46])
    assert weights.sum() == pytest.approx(1)


def _simulated(rng: np.random.Generator, n_batches: int = 3, genes: int = 400) -> tuple[Moments, np.ndarray]:
    """Moments of a null perturbation that sits in other batches than the control does, batches far apart."""
    shift = rng.normal(0, 2, (n_batches, genes))
    composition = {"control": np.array([60, 60, 60]), "A": np.array([80, 15, 5])}
    rows, sums, squares, cells = [], [], [], []
    for name, counts in composition.items():
        for batch, n in enumerate(counts):
            x = 5 + shift[batch] + rng.normal(0, 1, (n, genes))
            rows.append((name, "A", str(batch) if name == "control" else "", "", n))
            sums.append(x.sum(axis=0))
            squares.append((x**2).sum(axis=0))
            cells.append(np.eye(n_batches, dtype=int)[batch] * n)
    groups = pd.DataFrame(rows, columns=["perturbation", "half", "batch", "guide", "n_cells"])
    names = pd.Index([f"G{j}" for j in range(genes)])
    moments = Moments(groups, names, ["0", "1", "2"], np.array(cells), np.array(sums), np.array(squares), np.array(sums))
    return moments, shift


def test_batches_do_not_bias_effects_and_errors_are_not_too_short() -> None:
    moments, _ = _simulated(np.random.default_rng(3))
    found = estimate_effects(moments, ["A"])
    crude = moments.mean_var("A")[1] - moments.control()[1]
    assert np.abs(crude).mean() > 0.5
    z = found.effect[0] / found.se[0]
    assert abs(found.effect.mean()) < 4 * found.se.mean() / np.sqrt(400)
    # The perturbation's variance holds the batches' too, so its error is on the long side, never short.
    assert 0.3 < z.std() < 1.1


def test_errors_are_clear(moments: Moments) -> None:
    with pytest.raises(UserError, match="not measured"):
        estimate_effects(moments, moments.perturbations[:1], ["NOGENE"])
    groups = moments.groups.copy()
    groups.loc[groups["perturbation"] == moments.perturbations[0], "n_cells"] = 0
    few = Moments(groups, moments.genes, moments.batches, moments.batch_cell_counts, moments.sum, moments.sum_sq, moments.detected)
    with pytest.raises(UserError, match="at least 2"):
        estimate_effects(few, moments.perturbations[:1])


def test_gene_scale_is_floored() -> None:
    se = np.array([[1.0, 2.0, 1e-9], [3.0, 2.0, 0.0]])
    scale = gene_scale(se)
    np.testing.assert_allclose(scale[:2], [np.sqrt(5), 2])
    assert scale[2] == pytest.approx(0.1 * 2)


def _write(tiny_screen: Path, out: Path, fold: str = "0", moments: Path | None = None, **panel) -> tuple[EffectSet, dict]:
    config = PanelConfig(**{"n_genes": 30, **panel})
    write_effects(
        moments=moments or tiny_screen / "moments.h5ad",
        splits=tiny_screen / "splits.json",
        fold=fold,
        config=config,
        effects=out / "effects.parquet",
        panel=out / "panel.json",
    )
    return EffectSet.read(out / "effects.parquet"), json.loads((out / "panel.json").read_text())


def test_panel_keeps_perturbed_genes_by_name_and_file_order(tiny_screen: Path, moments: Moments, tmp_path: Path) -> None:
    effects, panel = _write(tiny_screen, tmp_path)
    splits = Splits.read(tiny_screen / "splits.json")
    perturbed = {gene for name in splits.measured for gene in name.split("+")} & set(moments.genes)
    kept = [g for name in [*splits.training("0"), *splits.targets("0")] for g in name.split("+") if g in perturbed]
    assert set(kept) <= set(effects.genes)
    assert list(effects.genes) == panel["genes"] == [g for g in moments.genes if g in set(panel["genes"])]
    assert list(effects.perturbations) == splits.training("0")
    assert set(panel["measured_targets"]) == set(splits.targets("0"))
    everything = estimate_effects(moments, splits.training("0"))
    score = (np.abs(everything.effect) / gene_scale(everything.se)).sum(axis=0)
    # The best gene of all is there, whatever the filter on detection.
    assert moments.genes[score.argmax()] in effects.genes


def test_selection_takes_the_largest_effects() -> None:
    effect = np.array([[0.0, 3.0, -1.0, 0.5], [0.0, -3.0, 1.0, 0.5]])
    one = np.ones_like(effect)
    effects = EffectSet(pd.Index(["P", "Q"]), pd.Index(list("bacd")), effect, effect, one, one, np.array([9, 9]), one[0], one[0], 9)
    assert list(select_genes(effects, pd.Index(list("bacdz")), ["z", "nowhere"], 2)) == ["a", "c", "z"]


def test_weak_perturbations_are_dropped_with_a_reason(tiny_screen: Path, tmp_path: Path) -> None:
    # Strength is the sum over all detected genes, so the panel is made large enough to hold them.
    effects, _ = _write(tiny_screen, tmp_path, n_genes=2000)
    limit = float(np.median(np.abs(effects.effect).sum(axis=1)))
    kept, panel = _write(tiny_screen, tmp_path, min_effect=limit)
    assert 2 <= len(kept.perturbations) < len(effects.perturbations)
    assert set(panel["dropped"]) == set(effects.perturbations) - set(kept.perturbations)
    assert all("panel.min_effect" in reason for reason in panel["dropped"].values())
    with pytest.raises(UserError, match="at least 2"):
        _write(tiny_screen, tmp_path, min_effect=1e9)


def test_held_out_counts_do_not_matter(tiny_screen: Path, moments: Moments, tmp_path: Path) -> None:
    splits = Splits.read(tiny_screen / "splits.json")
    table = anndata.read_h5ad(tiny_screen / "moments.h5ad")
    held = table.obs["perturbation"].astype(str).isin(set(splits.measured) - set(splits.training("0"))).to_numpy()
    assert held.any()
    for layer in ("sum", "sum_sq", "detected"):
        table.layers[layer][held] = np.random.default_rng(0).uniform(0, 1e4, (held.sum(), table.n_vars))
    table.write_h5ad(tmp_path / "garbage.h5ad")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    _write(tiny_screen, tmp_path / "a")
    _write(tiny_screen, tmp_path / "b", moments=tmp_path / "garbage.h5ad")
    for name in ("effects.parquet", "panel.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


# --- effects within contexts


def _contexts(rng, composition: dict[str, list[int]], effect, genes: int = 200, by_batch: bool = True) -> Moments:
    """Moments by batch; effect (B, G) of A in each batch; batches shift both alike, cells vary with sd 1."""
    n_batches = len(composition["control"])
    shift = rng.normal(0, 2, (n_batches, genes))
    rows, sums, squares, cells = [], [], [], []
    for name, counts in composition.items():
        for batch, n in enumerate(counts):
            x = 5 + shift[batch] + (effect[batch] if name == "A" else 0) + rng.normal(0, 1, (n, genes))
            rows.append((name, "A", str(batch), "", n))
            sums.append(x.sum(axis=0))
            squares.append((x**2).sum(axis=0))
            cells.append(np.eye(n_batches, dtype=int)[batch] * n)
    groups = pd.DataFrame(rows, columns=["perturbation", "half", "batch", "guide", "n_cells"])
    if not by_batch:
        groups.loc[groups["perturbation"] != "control", "batch"] = ""
    names = pd.Index([f"G{j}" for j in range(genes)])
    batches = [str(b) for b in range(n_batches)]
    return Moments(groups, names, batches, np.array(cells), np.array(sums), np.array(squares), np.array(sums))


def test_pooled_effect_is_the_inverse_variance_mean_written_out() -> None:
    composition = {"control": [40, 15, 4], "A": [10, 30, 8]}
    moments = _contexts(np.random.default_rng(0), composition, np.zeros((3, 5)), genes=5)
    found = estimate_effects(moments, ["A"])
    n, mean, var = moments.perturbation_by_batch("A")
    m, control, control_var = moments.control_by_batch()
    s = ((n - 1)[:, None] * var).sum(axis=0) / (n - 1).sum()
    # Batch 2 has too few control cells: its cells meet the pooled control; its control cells do not estimate a variance.
    sc = (m[:2, None] * control_var[:2]).sum(axis=0) / m[:2].sum()
    pooled = moments.control()[1]
    d = np.vstack([mean[:2] - control[:2], mean[2] - pooled])
    v = s / np.array([10, 30, 8])[:, None] + sc / np.array([40, 15, 59])[:, None]
    expected = (d / v).sum(axis=0) / (1 / v).sum(axis=0)
    np.testing.assert_allclose(found.effect[0], expected)
    q = ((d - expected) ** 2 / v).sum(axis=0).mean()
    np.testing.assert_allclose(found.se[0], np.sqrt(max(1, q / 2) / (1 / v).sum(axis=0)))


def test_errors_of_pooled_effects_hold_and_are_no_longer_than_needed() -> None:
    """Unbiased with batches far apart; z has unit scale; with uneven controls pooled effects are more precise than matched ones."""
    composition = {"control": [12, 200, 200], "A": [60, 30, 30]}
    z, errors = [], {True: [], False: []}
    for seed in range(12):
        for by_batch in (True, False):
            effects = estimate_effects(_contexts(np.random.default_rng(seed), composition, np.zeros((3, 200)), by_batch=by_batch), ["A"])
            errors[by_batch].append((effects.effect**2).mean())
            if by_batch:
                z.append(effects.effect[0] / effects.se[0])
    assert 0.9 < np.std(z) < 1.1
    assert np.mean(errors[True]) < 0.8 * np.mean(errors[False])


def test_contexts_that_disagree_widen_the_error() -> None:
    composition = {"control": [60, 60, 60], "A": [40, 40, 40]}
    same, apart = (
        estimate_effects(_contexts(np.random.default_rng(1), composition, effect), ["A"])
        for effect in (np.zeros((3, 200)), np.random.default_rng(2).normal(0, 1.0, (3, 200)))
    )
    assert apart.se.mean() > 3 * same.se.mean()
    assert apart.variance.mean() > 9 * same.variance.mean()
    assert same.variance.mean() == pytest.approx(1, abs=0.1)


def test_one_batch_is_the_plain_effect(tiny_screen: Path) -> None:
    composition = {"control": [50], "A": [20]}
    pooled, plain = (
        estimate_effects(_contexts(np.random.default_rng(3), composition, np.zeros((1, 200)), by_batch=by_batch), ["A"])
        for by_batch in (True, False)
    )
    for name in ("effect", "se", "variance", "mean"):
        np.testing.assert_allclose(getattr(pooled, name), getattr(plain, name), rtol=1e-10)


def test_moments_by_batch_add_up_to_the_plain_ones(tiny_screen: Path, moments: Moments, tmp_path: Path) -> None:
    write_moments(tiny_screen / "cells.h5ad", tiny_screen / "splits.json", tmp_path / "m.h5ad", by_batch=True)
    split = Moments.read(tmp_path / "m.h5ad")
    assert split.by_batch
    assert not moments.by_batch
    for name in moments.perturbations[:3]:
        for half in ("A", None):
            for one, two in zip(split.mean_var(name, half), moments.mean_var(name, half), strict=True):
                np.testing.assert_allclose(one, two, atol=1e-10)
            np.testing.assert_array_equal(split.batch_cells(name, half), moments.batch_cells(name, half))
    assert np.isfinite(estimate_effects(split, split.perturbations).effect).all()


def test_a_gene_seen_in_a_single_cell_is_not_certain() -> None:
    """Seen only in a context with one cell it does not vary within contexts: the variance over all cells stands in."""
    moments = _contexts(np.random.default_rng(4), {"control": [40, 40], "A": [30, 1]}, np.zeros((2, 5)), genes=5)
    # Rows: control in both batches, A in both batches.
    moments.sum[:, 0], moments.sum_sq[:, 0] = [0, 0, 0, 2.0], [0, 0, 0, 4.0]
    found = estimate_effects(moments, ["A"])
    total = np.var([0.0] * 30 + [2.0], ddof=1)
    assert found.effect[0, 0] == pytest.approx(2 / 31)
    assert found.se[0, 0] >= np.sqrt(total / 31) * (1 - 1e-9)
    assert found.effect[0, 0] / found.se[0, 0] < 3
    assert found.variance[0, 0] >= total * (1 - 1e-9)
    # A gene that nobody expresses keeps a standard error of next to nothing.
    moments.sum[:, 1] = moments.sum_sq[:, 1] = 0
    assert estimate_effects(moments, ["A"]).se[0, 1] < 1e-100
