"""Clusters find planted groups, are seeded, and bear few points."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import adjusted_rand_score

from dbdiffusion.config.embedding import ClustersConfig
from dbdiffusion.perturbations.clusters import clusters_frame, leiden, map_coordinates, similarity_components

GROUPS = np.repeat(np.arange(4), 25)


@pytest.fixture
def points() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(4, 10))[GROUPS] * 3 + rng.normal(size=(100, 10)) * 0.5


def test_leiden_finds_planted_groups(points: np.ndarray) -> None:
    labels = leiden(points, 15, 0.4, 1)
    assert adjusted_rand_score(GROUPS, labels) == 1
    np.testing.assert_array_equal(labels, leiden(points, 15, 0.4, 1))
    assert len(set(leiden(points, 5, 3.0, 1))) > 4
    sizes = pd.Series(leiden(points[:60], 10, 0.4, 1)).value_counts()
    assert list(sizes.sort_index()) == sorted(sizes, reverse=True)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_few_points(n: int) -> None:
    rng = np.random.default_rng(0)
    small = rng.normal(size=(n, 1 if n < 3 else 2))
    assert len(leiden(small, 5, 2.0, 1)) == n
    flat = map_coordinates(small, 5, 1)
    assert flat.shape == (n, 2)
    assert np.isfinite(flat).all()


def test_map_keeps_groups_together(points: np.ndarray) -> None:
    flat = map_coordinates(points, 10, 1)
    np.testing.assert_array_equal(flat, map_coordinates(points, 10, 1))
    nearest = np.linalg.norm(flat[:, None] - flat[None], axis=2) + np.eye(100) * 1e9
    assert (GROUPS[nearest.argmin(axis=1)] == GROUPS).mean() > 0.95


def test_similarity_components_equal_those_of_the_full_matrix() -> None:
    loadings = np.random.default_rng(0).normal(size=(40, 6))
    unit = loadings / np.linalg.norm(loadings, axis=1, keepdims=True)
    similarity = unit @ unit.T
    left, values, _ = np.linalg.svd(similarity - similarity.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs(similarity_components(loadings, 5)), np.abs((left * values)[:, :5]), atol=1e-8)


def test_frame_holds_both_kinds(points: np.ndarray) -> None:
    names, genes = pd.Index([f"P{i}" for i in range(6)]), pd.Index([f"G{i}" for i in range(100)])
    frame = clusters_frame(names, points[:6, :3], genes, points, ClustersConfig(), 1)
    assert frame["kind"].value_counts().to_dict() == {"gene": 100, "perturbation": 6}
    assert np.isfinite(frame[["x", "y"]].to_numpy()).all()
