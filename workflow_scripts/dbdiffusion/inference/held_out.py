"""What calibration knows of one outer fold: what inference saw and gave, and the truth of the targets that were held out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from dbdiffusion.config.inference import InferenceConfig
from dbdiffusion.data.moments import Moments
from dbdiffusion.data.sets import EffectSet, LocationSet, MeanSet
from dbdiffusion.data.splits import Splits
from dbdiffusion.inference import table, ttest
from dbdiffusion.inference.table import Inference
from dbdiffusion.perturbations.effects import MIN_CELLS, estimate_effects
from dbdiffusion.runtime import contracts
from dbdiffusion.runtime.errors import UserError

logger = logging.getLogger(__name__)

LEVELS = (0.5, 0.8, 0.9, 0.95)
RATES = (0.05, 0.1, 0.2)
ERROR_MODELS = ("t", "conformal", "cells_only", "conservative", "ppi_z")
GENERATOR = "dbdiffusion"
"""Name of the generator among the predictors."""


@dataclass(frozen=True)
class Fold:
    """One outer fold.

    targets: its measured targets; whole: their effects from all of their cells, on the panel; halved: those of them with two
    cells in either half; half_a, half_b: effects of `halved` in a half (None: there are none, or too few control cells);
    de: the fold's rows of contract `de`, of these targets.
    """

    name: str
    inference: Inference
    targets: pd.Index
    whole: EffectSet
    halved: pd.Index
    half_a: EffectSet | None
    half_b: EffectSet | None
    de: pd.DataFrame

    @property
    def default(self) -> str:
        """The prediction that is judged: the stack where there is one, else the generator."""
        return default_method(self.inference.methods)

    @property
    def rows_halved(self) -> np.ndarray:
        """Rows of `halved` among the targets."""
        return self.targets.get_indexer(self.halved)

    def located(self, kind: str) -> pd.Index:
        """Targets of a kind that have a location."""
        info = self.inference.locations.info.loc[list(self.targets)]
        return self.targets[((info["status"] == "located") & (info["kind"] == kind)).to_numpy()]


def default_method(methods: Sequence[str]) -> str:
    """The stack where there is one, else the generator, else the first method."""
    return next((name for name in (table.STACKED, GENERATOR) if name in methods), methods[0])


def labels(effects: EffectSet, fdr: float) -> np.ndarray:
    """Genes (T, G) that the cells' own test calls."""
    return ttest.de_labels(effects.effect, effects.se, effects.n_cells, fdr)


def load_fold(
    *,
    name: str,
    effects: str | Path,
    locations: str | Path,
    means: Mapping[str, str | Path],
    de: str | Path,
    moments: Moments,
    split: Splits,
    config: InferenceConfig,
    seed: int,
) -> Fold:
    """Read a fold's tables (means: by method), repeat its inference and add the truth from `moments`.

    Targets with fewer than 2 cells have no truth and are left out; those with fewer than 2 in a half are left out of the checks
    that compare halves.
    """
    measured = EffectSet.read(effects)
    located = LocationSet.read(locations, "all", measured.perturbations)
    predicted = {method: MeanSet.read(path) for method, path in means.items()}
    inference = table.infer(measured, located, predicted, config, seed)
    known = set(split.measured)
    targets = [t for t in split.targets(name) if t in known and t in located.queries and moments.mean_var(t)[0] >= MIN_CELLS]
    frame = contracts.DE.read(de)
    halved = [t for t in targets if all(_cells(moments, t, half) >= MIN_CELLS for half in "AB")]
    if len(halved) < len(targets):
        logger.info("fold %s: %d target(s) have too few cells to be halved", name, len(targets) - len(halved))
    halves = [_half(moments, halved, measured.genes, half) for half in "AB"]
    if halves[0] is None or halves[1] is None:
        halved, halves = [], [None, None]
    return Fold(
        name,
        inference,
        pd.Index(targets),
        estimate_effects(moments, targets, measured.genes),
        pd.Index(halved),
        *halves,
        frame[frame["target"].astype(str).isin(targets)],
    )


def _cells(moments: Moments, name: str, half: str) -> int:
    groups = moments.groups
    return int(groups.loc[(groups["perturbation"] == name) & (groups["half"] == half), "n_cells"].sum())


def _half(moments: Moments, targets: list[str], genes: pd.Index, half: str) -> EffectSet | None:
    if not targets:
        return None
    try:
        return estimate_effects(moments, targets, genes, half=half, control_half=half)
    except UserError as error:
        logger.info("no replicate check: %s", error)
        return None
