"""What the generator is conditioned on: where a perturbation stands among the measured ones, and what is known of its genes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from dbdiffusion.config.embedding import EmbeddingConfig
from dbdiffusion.data.sets import CONTROL, EffectSet, LocationSet
from dbdiffusion.data.splits import Splits, parts
from dbdiffusion.perturbations.embedding import embed, principal_axes, training_of
from dbdiffusion.perturbations.features import GeneFeatures, design, of_fit
from dbdiffusion.runtime import contracts

TELLING = 1.0e-6
"""Axes of features are left out whose mean square over training perturbations is this small beside the largest."""


def feature_coordinates(
    sources: Mapping[str, GeneFeatures], learned: Sequence[str], queries: Sequence[str], dimensions: int
) -> tuple[np.ndarray, np.ndarray]:
    """(P, D) of the training perturbations and (R, D) of the queries: principal components of their genes' features.

    The features of a combination are the sum of its genes'; a gene that no source knows is at the mean, 0. Coordinates share one scale
    factor, which gives them a mean square of 1 over training perturbations. D is at most min(dimensions, P - 1, features) and 0 without
    sources.
    """
    genes = sorted({gene for name in [*learned, *queries] for gene in parts(name)})
    if not sources:
        return np.zeros((len(learned), 0)), np.zeros((len(queries), 0))
    of_gene, _ = design(list(sources.values()), genes, sorted({gene for name in learned for gene in parts(name)}))
    at = pd.Index(genes)
    known, asked = (
        np.array([of_gene[at.get_indexer(parts(name))].sum(axis=0) for name in names]).reshape(len(names), of_gene.shape[1])
        for names in (learned, queries)
    )
    axes = principal_axes(known, min(dimensions, len(known) - 1, known.shape[1]))
    spread = ((known @ axes) ** 2).mean(axis=0)
    # Along an axis on which training perturbations do not differ, nothing can be learned of the queries, which may.
    axes = axes[:, spread > TELLING * spread.max(initial=0.0)]
    size = np.sqrt(((known @ axes) ** 2).mean()) if axes.shape[1] else 0.0
    factor = 1.0 / size if size > 1e-12 else 1.0
    return known @ axes * factor, asked @ axes * factor


def certainty(own: np.ndarray, located: np.ndarray) -> np.ndarray:
    """(R,) of located places (R, D), which are averages over neighbours: the squared distance of each to the mean of training
    perturbations' own places (P, D) over the mean of theirs, at most 1; 0 where training perturbations do not differ."""
    centre = own.mean(axis=0)
    spread = np.square(own - centre).sum(axis=1).mean()
    distance = np.square(located - centre).sum(axis=1)
    return np.minimum(distance / spread, 1.0) if spread > 0 else np.zeros(len(located))


def write_embedding(
    *,
    effects: str | Path,
    splits: str | Path,
    locations: str | Path,
    gene_features: str | Path,
    fold: str,
    crossfit: str,
    config: EmbeddingConfig,
    out: str | Path,
) -> None:
    """The conditions of one cross-fit model, contract `embedding`.

    Part `effects`: its training perturbations and the control stand where their own effects put them, its pseudo-targets and the targets
    where the model's own locations do. Part `features`: coordinates of their genes' features, learned without the pseudo-targets' cells,
    and a last one that is 1 for the control, which has no gene. Part `certainty`: 1 where effects are own, else what the place says
    of itself (`certainty`). Queries that are not locatable are absent.
    """
    measured, split = EffectSet.read(effects), Splits.read(splits)
    learned = training_of(measured, split, fold, crossfit)
    embedding = embed(measured.subset(learned), config)
    located = LocationSet.read(locations, str(crossfit), pd.Index(learned))
    located = located.select(located.queries[(located.info["status"] == "located").to_numpy()])
    sources = of_fit(contracts.GENE_FEATURES.read(gene_features), str(crossfit))
    known, asked = feature_coordinates(sources, learned, list(located.queries), config.feature_dimensions)
    names = [*learned, CONTROL, *located.queries]
    roles = ["train"] * len(learned) + ["control"] + list(located.info["role"])
    places = embedding.located(located)
    of_part = {
        "effects": np.vstack([embedding.scores, embedding.control[None], places]),
        "features": np.column_stack([np.vstack([known, np.zeros((1, known.shape[1])), asked]), np.array(roles) == "control"]),
        "certainty": np.concatenate([np.ones(len(learned) + 1), certainty(embedding.scores, places)])[:, None],
    }
    frames = [
        pd.DataFrame(
            {
                "part": part,
                "perturbation": np.repeat(np.array(names, dtype=object), values.shape[1]),
                "role": np.repeat(np.array(roles, dtype=object), values.shape[1]),
                "dimension": np.tile(np.arange(values.shape[1]), len(names)),
                "value": values.ravel(),
            }
        )
        for part, values in of_part.items()
    ]
    contracts.EMBEDDING.write(pd.concat(frames, ignore_index=True), out)
