"""The truth that predictions are scored against, and how well a replicate of the experiment predicts it.

The cells of a held-out perturbation and of the control lie in two halves. Effects of half A (its cells against the control's
half A) choose the genes that are scored; effects of half B (its cells against the control's half B) are the truth. The halves
share no cell, control cells included, so half A as a predictor of half B, the replicate ceiling, is what an independent
experiment of half the size would reach. The halves are balanced over guides and batches, which makes them a little more alike
than two random samples: an unbiased distance between them can be slightly negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from dbdiffusion.data.moments import Moments
from dbdiffusion.data.sets import EffectSet
from dbdiffusion.data.splits import Splits
from dbdiffusion.inference.ttest import de_labels
from dbdiffusion.perturbations.effects import estimate_effects

DE_FDR = 0.05
"""FDR (Benjamini-Hochberg within a perturbation) of a half's own test for differential expression."""
MIN_CELLS = 2
"""Fewer cells in a half have no standard error."""


def signed_calls(effects: EffectSet, *, fdr: float = DE_FDR) -> np.ndarray:
    """Calls -1, 0, 1 (T, G) of the perturbations' own cells, by the test whose outcome conformal selection predicts."""
    called = de_labels(effects.effect, effects.se, effects.n_cells, fdr)
    return np.where(called, np.sign(effects.effect), 0).astype(int)


@dataclass(frozen=True)
class Truth:
    """Held-out perturbations (T) x genes (G): effects and own calls of half A (`replicate`) and half B (`observed`)."""

    targets: pd.Index
    genes: pd.Index
    replicate: np.ndarray
    observed: np.ndarray
    replicate_calls: np.ndarray
    observed_calls: np.ndarray

    @classmethod
    def measure(cls, moments: Moments, targets: Sequence[str], genes: pd.Index) -> Truth:
        """Effects of both halves, each against its own half of the control, batch-matched."""
        if not len(targets):
            empty = np.zeros((0, len(genes)))
            return cls(pd.Index([], dtype=object), genes, empty, empty, empty.astype(int), empty.astype(int))
        a, b = (estimate_effects(moments, list(targets), genes, half=half, control_half=half) for half in ("A", "B"))
        return cls(pd.Index(targets), genes, a.effect, b.effect, signed_calls(a), signed_calls(b))

    def top(self, count: int) -> np.ndarray:
        """(T, G) True for the `count` genes of largest absolute effect in half A, ties by gene order."""
        rank = np.argsort(np.argsort(-np.abs(self.replicate), axis=1, kind="stable"), axis=1)
        return rank < count

    def gene_sets(self, sizes: Sequence[int]) -> dict[str, np.ndarray]:
        """Scored genes by label: all, and each size that is smaller than the panel (a larger one would be `all` again)."""
        everything = {"all": np.ones(self.replicate.shape, dtype=bool)}
        return everything | {str(size): self.top(size) for size in sorted(set(sizes)) if size < len(self.genes)}


def held_out(splits: Splits, moments: Moments, fold: str) -> list[str]:
    """Targets of the fold that can be scored: with cells that no model of the fold has seen, at least MIN_CELLS in each half."""
    training = set(splits.training(fold))
    cells = moments.groups.groupby(["perturbation", "half"], observed=True)["n_cells"].sum().unstack(fill_value=0)
    enough = set(cells.index[(cells.reindex(columns=["A", "B"], fill_value=0) >= MIN_CELLS).all(axis=1)])
    return [name for name in splits.targets(fold) if name in enough and name not in training]
