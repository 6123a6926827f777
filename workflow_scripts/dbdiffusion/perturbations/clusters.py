"""Clusters of perturbations and of genes: kNN graphs, Leiden, and maps for figures."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pandas as pd
from sklearn.neighbors import NearestNeighbors

from dbdiffusion.config.embedding import ClustersConfig
from dbdiffusion.runtime.seeds import derive_seed

LEIDEN_ITERATIONS = 2
MIN_MAP_POINTS = 15  # below this UMAP has no manifold to learn
MAP_SPREAD = 3.0  # standard deviation of the starting coordinates
MAP_EPOCHS = 100


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """igraph draws from a stream of its own, and from the global one again afterwards."""
    import igraph

    igraph.set_random_number_generator(random.Random(seed))
    try:
        yield
    finally:
        igraph.set_random_number_generator(random)


def leiden(points: np.ndarray, neighbours: int, resolution: float, seed: int) -> np.ndarray:
    """Cluster labels (n,) "0", "1", ... by size, of points (n, d).

    kNN graph by Euclidean distance (as many neighbours as there are points, if fewer), an edge where either point is among
    the other's neighbours; Leiden on modularity with `resolution`, two iterations. Seeded.
    """
    import igraph

    n = len(points)
    k = min(neighbours, n - 1)
    if k < 1:
        return np.array(["0"] * n, dtype=object)
    nearest = NearestNeighbors(n_neighbors=k).fit(points).kneighbors(return_distance=False)
    edges = np.sort(np.column_stack([np.repeat(np.arange(n), k), nearest.ravel()]), axis=1)
    graph = igraph.Graph(n=n, edges=np.unique(edges, axis=0).tolist())
    with _seeded(seed):
        found = graph.community_leiden(objective_function="modularity", resolution=resolution, n_iterations=LEIDEN_ITERATIONS).membership
    return _by_size(np.array(found))


def _by_size(membership: np.ndarray) -> np.ndarray:
    """Labels "0", "1", ... from the largest cluster on; of equal ones the one that appears first."""
    values, first, counts = np.unique(membership, return_index=True, return_counts=True)
    order = values[np.lexsort((first, -counts))]
    rank = {value: str(number) for number, value in enumerate(order)}
    return np.array([rank[value] for value in membership], dtype=object)


def similarity_components(loadings: np.ndarray, components: int) -> np.ndarray:
    """(G, <= components) principal component scores of the genes x genes matrix of cosine similarities of loadings (G, d).

    The matrix has rank d at most, so it is never made: with L = QR its centred rows are (L - mean) R' in the basis Q.
    """
    length = np.linalg.norm(loadings, axis=1, keepdims=True)
    unit = np.divide(loadings, length, out=np.zeros_like(loadings), where=length > 0)
    rows = (unit - unit.mean(axis=0)) @ np.linalg.qr(unit)[1].T
    left, values, _ = np.linalg.svd(rows, full_matrices=False)
    return (left * values)[:, :components]


def perturbation_clusters(scores: np.ndarray, config: ClustersConfig, seed: int) -> np.ndarray:
    """Clusters (P,) of perturbations by their embedding (P, D)."""
    return leiden(scores, config.perturbation_neighbours, config.perturbation_resolution, derive_seed(seed, "perturbation clusters"))


def gene_clusters(loadings: np.ndarray, config: ClustersConfig, seed: int) -> np.ndarray:
    """Clusters (G,) of genes by their co-expression loadings (G, d)."""
    points = similarity_components(loadings[:, : config.gene_components], config.gene_components)
    return leiden(points, config.gene_neighbours, config.gene_resolution, derive_seed(seed, "gene clusters"))


def map_coordinates(points: np.ndarray, neighbours: int, seed: int) -> np.ndarray:
    """(n, 2) UMAP of points (n, d), seeded, started from their first two principal components; these alone where points are few."""
    import igraph

    n = len(points)
    left, values, _ = np.linalg.svd(points - points.mean(axis=0), full_matrices=False)
    flat = (left * values)[:, :2]
    flat = np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))
    if n < max(MIN_MAP_POINTS, neighbours + 2) or flat.std() < 1e-12:
        return flat
    distance, nearest = NearestNeighbors(n_neighbors=neighbours).fit(points).kneighbors()
    graph = igraph.Graph(n=n, edges=np.column_stack([np.repeat(np.arange(n), neighbours), nearest.ravel()]).tolist(), directed=True)
    start = (flat * MAP_SPREAD / flat.std()).tolist()
    epochs = MAP_EPOCHS if n <= 1000 else MAP_EPOCHS // 2
    with _seeded(derive_seed(seed, "umap")):
        layout = graph.layout_umap(dist=distance.ravel().tolist(), dim=2, seed=start, min_dist=0.1, epochs=epochs)
    return np.array(layout.coords, dtype=float)


def clusters_frame(
    perturbations: pd.Index, scores: np.ndarray, genes: pd.Index, loadings: np.ndarray, config: ClustersConfig, seed: int
) -> pd.DataFrame:
    """Rows of contract `clusters`: clusters and map of perturbations by their embedding and of genes by co-expression."""
    points = similarity_components(loadings[:, : config.gene_components], config.gene_components)
    sides = (
        ("perturbation", perturbations, perturbation_clusters(scores, config, seed), scores, config.perturbation_neighbours),
        ("gene", genes, gene_clusters(loadings, config, seed), points, config.gene_neighbours),
    )
    frames = []
    for kind, names, labels, coordinates, neighbours in sides:
        x, y = map_coordinates(coordinates, neighbours, seed).T
        frames.append(pd.DataFrame({"kind": kind, "name": names.to_numpy(dtype=object), "cluster": labels, "x": x, "y": y}))
    return pd.concat(frames, ignore_index=True)
