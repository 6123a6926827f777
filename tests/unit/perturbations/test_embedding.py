"""The embedding against a plain singular value decomposition, and its conventions."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from dbdiffusion.config.embedding import EmbeddingConfig
from dbdiffusion.data.sets import CONTROL, EffectSet, LocationSet
from dbdiffusion.perturbations.embedding import Embedding, embed, principal_axes, scaled_effects, top_eigen
from dbdiffusion.runtime.errors import UserError


def effect_set(effect: np.ndarray, se: np.ndarray | float = 0.1, names: list[str] | None = None) -> EffectSet:
    p, g = effect.shape
    se = np.broadcast_to(np.asarray(se, dtype=float), effect.shape)
    names = names or [f"P{k:03d}" for k in range(p)]
    one = np.ones(g)
    return EffectSet(
        pd.Index(names), pd.Index([f"G{j}" for j in range(g)]), effect + 1, effect, se, se**2 * 50, np.full(p, 50), one, one, 100
    )


@pytest.fixture
def effects() -> EffectSet:
    rng = np.random.default_rng(1)
    return effect_set(rng.normal(size=(12, 4)) @ rng.normal(size=(4, 60)), se=rng.uniform(0.05, 0.4, 60))


def test_scores_are_principal_components(effects: EffectSet) -> None:
    found = embed(effects, EmbeddingConfig(dimensions=5))
    z = effects.effect / effects.se[0]
    left, values, _ = np.linalg.svd(z - z.mean(axis=0), full_matrices=False)
    expected = (left * values)[:, :5]
    expected *= np.sqrt(1 / (expected**2).mean())
    np.testing.assert_allclose(np.abs(found.scores[:, :4]), np.abs(expected[:, :4]), atol=1e-6)
    assert (found.scores**2).mean() == pytest.approx(1)


def test_proportions_and_differences_are_kept(effects: EffectSet) -> None:
    """Distances in the full embedding are distances of scaled effects times one factor, the control among them."""
    found = embed(effects, EmbeddingConfig(dimensions=64))
    z = np.vstack([effects.effect / effects.se[0], np.zeros(60)])
    points = np.vstack([found.scores, found.control])
    mine = np.linalg.norm(points[:, None] - points[None], axis=2)[:12, :12]
    theirs = np.linalg.norm(z[:, None] - z[None], axis=2)[:12, :12]
    ratio = mine[np.triu_indices(12, 1)] / theirs[np.triu_indices(12, 1)]
    assert ratio.std() < 1e-6 * ratio.mean()


def test_control_is_the_zero_effect() -> None:
    rng = np.random.default_rng(2)
    effect = np.vstack([rng.normal(size=(8, 30)), np.zeros(30)])
    found = embed(effect_set(effect), EmbeddingConfig(dimensions=6))
    np.testing.assert_allclose(found.scores[-1], found.control, atol=1e-9)


def test_genes_noise_is_made_equal(effects: EffectSet) -> None:
    z, weights = scaled_effects(
        effect_set(np.random.default_rng(0).normal(size=(500, 3)) * [1, 5, 0.2], se=np.array([1, 5, 0.2])), "standard_error"
    )
    assert np.allclose(z.std(axis=0), 1, atol=0.1)
    assert np.allclose(weights, weights[0])


def test_noisy_perturbation_does_not_make_a_component() -> None:
    rng = np.random.default_rng(5)
    signal = np.outer(rng.normal(size=30), rng.normal(size=200))
    se = np.full((30, 200), 0.2)
    se[0] = 3.0
    effects = effect_set(signal + rng.normal(size=signal.shape) * se, se)
    axis = signal[1] / np.sqrt((se**2).mean(axis=0))
    z, weights = scaled_effects(effects, "standard_error")
    found = principal_axes((z - weights @ z / weights.sum()) * weights[:, None], 1)[:, 0]
    plain = principal_axes(z - z.mean(axis=0), 1)[:, 0]
    unit = axis / np.linalg.norm(axis)
    assert abs(found @ unit) > abs(plain @ unit)


def test_signs_and_sizes(effects: EffectSet) -> None:
    found = embed(effects, EmbeddingConfig(dimensions=64))
    assert found.scores.shape == (12, 11)
    again = embed(effects, EmbeddingConfig(dimensions=64))
    np.testing.assert_array_equal(found.scores, again.scores)
    axes = principal_axes(effects.effect, 4)
    assert (axes[np.abs(axes).argmax(axis=0), np.arange(4)] > 0).all()
    with pytest.raises(UserError):
        embed(effects.subset(effects.perturbations[:1]), EmbeddingConfig())


def test_published_scale_has_unit_genes(effects: EffectSet) -> None:
    z, weights = scaled_effects(effects, "gene_sd")
    np.testing.assert_allclose(z.std(axis=0), 1)
    assert (weights == 1).all()


@pytest.mark.parametrize("size", [50, 700])
def test_top_eigen(size: int) -> None:
    half = np.random.default_rng(0).normal(size=(size, 30))
    matrix = half @ half.T
    values, vectors = top_eigen(matrix, 5)
    np.testing.assert_allclose(values, np.sort(np.linalg.eigvalsh(matrix))[::-1][:5], rtol=1e-8)
    np.testing.assert_allclose(matrix @ vectors, vectors * values, atol=1e-5 * values[0])


def test_located_is_the_weighted_sum_and_refuses_strangers() -> None:
    names = pd.Index(["A", "B"])
    embedding = Embedding(names, np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([-1.0, -1.0]))
    columns = pd.Index(["A", "B", CONTROL])
    info = pd.DataFrame(index=["X"])
    # A + B as a sum: both, less the control once.
    found = embedding.located(LocationSet(pd.Index(["X"]), columns, np.array([[1.0, 1.0, -1.0]]), info))
    np.testing.assert_allclose(found, [[2.0, 3.0]])
    strange = LocationSet(pd.Index(["X"]), pd.Index(["A", "B", "C", CONTROL]), np.array([[0.5, 0.0, 0.5, 0.0]]), info)
    with pytest.raises(ValueError, match="not learned"):
        embedding.located(strange)
