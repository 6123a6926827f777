"""Perturbation embedding: principal components of the scaled effects of the perturbations a cross-fit model may see."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import linalg
from scipy.sparse.linalg import LinearOperator, eigsh

from dbdiffusion.config.embedding import EmbeddingConfig
from dbdiffusion.data.sets import CONTROL, EffectSet, LocationSet
from dbdiffusion.data.splits import Splits
from dbdiffusion.perturbations.effects import gene_scale
from dbdiffusion.runtime.errors import UserError

DENSE_EIGEN = 600  # largest matrix that is decomposed whole


@dataclass(frozen=True)
class Embedding:
    """Coordinates of measured perturbations and of the control (the zero effect).

    perturbations: (P,); scores: (P, D); control: (D,); unit: one standard deviation is the root mean square over
    coordinates of the coordinates' standard deviations.
    """

    perturbations: pd.Index
    scores: np.ndarray
    control: np.ndarray

    def located(self, locations: LocationSet) -> np.ndarray:
        """(R, D) coordinates of located queries: sum of weight x coordinates over perturbations and control."""
        at = locations.neighbours.get_indexer(self.perturbations)
        away = np.delete(locations.weights, np.append(at, locations.neighbours.get_loc(CONTROL)), axis=1)
        if away.any():
            raise ValueError("a location uses perturbations that the embedding was not learned from")
        control = locations.weights[:, locations.neighbours.get_loc(CONTROL)]
        return locations.weights[:, at] @ self.scores + np.outer(control, self.control)


def scaled_effects(effects: EffectSet, scale: str) -> tuple[np.ndarray, np.ndarray]:
    """Effects (P, G) in units in which genes compare, and the weight (P,) of each perturbation in the components.

    `standard_error`: z_kj = effect_kj / s_j, s_j the gene's root-mean-square standard error (`effects.gene_scale`), so that
    noise has about the same size in all genes; a perturbation weighs 1 / a_k, a_k its root-mean-square noise in these
    units (never below the median perturbation's half), so that those with few cells do not make components of their noise.
    `gene_sd`: z_kj = effect_kj / sd over perturbations of gene j, all weights 1 (published).
    """
    if scale == "gene_sd":
        spread = effects.effect.std(axis=0)
        return np.divide(effects.effect, spread, out=np.zeros_like(effects.effect), where=spread > 1e-12), np.ones(len(effects.effect))
    unit = gene_scale(effects.se)
    noise = np.sqrt(((effects.se / unit) ** 2).mean(axis=1))
    return effects.effect / unit, 1.0 / np.maximum(noise, 0.5 * np.median(noise) + 1e-12)


def embed(effects: EffectSet, config: EmbeddingConfig) -> Embedding:
    """Principal components of scaled effects: D = min(config.dimensions, P - 1, G).

    Centred on the weighted mean of the perturbations; the control is where the zero effect falls. All coordinates share one
    scale factor, which gives them a mean square of 1 over perturbations: leading structure keeps its proportions to minor
    components, which are mostly noise and would be blown up by whitening. The largest loading of a component is positive.
    """
    if len(effects.perturbations) < 2:
        where = "effects of the training perturbations"
        raise UserError(
            f"an embedding of {len(effects.perturbations)} perturbation(s)", where=where, fix="use fewer folds or more perturbations"
        )
    values, weights = scaled_effects(effects, config.scale)
    centre = weights @ values / weights.sum()
    centred = values - centre
    rank = min(config.dimensions, len(values) - 1, values.shape[1])
    loadings = principal_axes(centred * weights[:, None], rank)
    scores = centred @ loadings
    size = np.sqrt((scores**2).mean())
    factor = 1.0 / size if size > 1e-12 else 1.0
    return Embedding(effects.perturbations, scores * factor, -(centre @ loadings) * factor)


def principal_axes(values: np.ndarray, rank: int) -> np.ndarray:
    """(G, rank) leading right singular vectors of values (P, G), each with its largest entry positive."""
    if values.shape[0] > values.shape[1]:
        return top_eigen(values.T @ values, rank)[1]
    # The Gram matrix of the shorter side: P is far below G.
    _, left = top_eigen(values @ values.T, rank)
    axes = np.linalg.qr(values.T @ left)[0]
    return axes * _signs(axes)


def top_eigen(matrix: np.ndarray | LinearOperator, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Largest eigenvalues (rank,), descending, and eigenvectors (n, rank) of a symmetric matrix; signs and start are fixed."""
    size = matrix.shape[0]
    if size <= DENSE_EIGEN or rank > size // 3:
        matrix = matrix if isinstance(matrix, np.ndarray) else matrix @ np.eye(size)
        values, vectors = linalg.eigh(matrix, subset_by_index=[size - rank, size - 1])
    else:
        values, vectors = eigsh(matrix, k=rank, v0=np.cos(np.arange(size)), tol=1e-9)
    order = np.argsort(-values, kind="stable")
    return values[order], vectors[:, order] * _signs(vectors[:, order])


def _signs(axes: np.ndarray) -> np.ndarray:
    """Signs that make the largest entry of each column positive."""
    top = np.abs(axes).argmax(axis=0)
    return np.where(axes[top, np.arange(axes.shape[1])] < 0, -1.0, 1.0)


def training_of(effects: EffectSet, splits: Splits, fold: str, crossfit: str) -> list[str]:
    """Perturbations that a cross-fit model learns from and that the fold's panel kept, in the order of the effects."""
    allowed = set(splits.fit_perturbations(fold, crossfit))
    return [name for name in effects.perturbations if name in allowed]
