"""Do the error rates hold on this dataset? All checks of one dataset as one table."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from dbdiffusion.config.inference import InferenceConfig
from dbdiffusion.data.moments import Moments
from dbdiffusion.data.sets import EffectSet, MeanSet
from dbdiffusion.data.splits import Splits
from dbdiffusion.inference.bands import Rows
from dbdiffusion.inference.checks_calls import calls, equivalence
from dbdiffusion.inference.checks_cells import doubling
from dbdiffusion.inference.checks_coverage import coverage
from dbdiffusion.inference.checks_null import control_guides, permuted_labels, shuffled_effects
from dbdiffusion.inference.checks_truth import Truth, against_truth
from dbdiffusion.inference.held_out import Fold, load_fold
from dbdiffusion.runtime import contracts
from dbdiffusion.runtime.seeds import derive_seed

logger = logging.getLogger(__name__)


def write_calibration(
    *,
    effects: Sequence[str | Path],
    locations: Sequence[str | Path],
    means: Sequence[Mapping[str, str | Path]],
    splits: str | Path,
    moments: str | Path,
    de: Sequence[str | Path],
    config: InferenceConfig,
    folds: Sequence[str],
    seed: int,
    out: str | Path,
    doubled: str | Path | None = None,
    permuted: str | Path | None = None,
    truth: str | Path | None = None,
) -> None:
    """All checks of one dataset over its outer folds, as contract `calibration`.

    effects, locations, means, de: one per fold, in the order of `folds` (means: tables by method); splits: which targets were
    held out; moments: of all perturbations, whose held-out cells are the truth. doubled: the generator's means of the first
    fold from twice the cells; permuted: contract `de` of the chain run on permuted labels; truth: table `truth` of a simulated
    screen. Checks that cannot be run (no control guides, no measured target, halves with fewer than 2 cells) are left out
    with a line in the log.
    """
    sums, split = Moments.read(moments), Splits.read(splits)
    loaded = [
        load_fold(name=name, effects=e, locations=location, means=m, de=d, moments=sums, split=split, config=config, seed=seed)
        for name, e, location, m, d in zip(folds, effects, locations, means, de, strict=True)
    ]
    rows = _held_out_checks([fold for fold in loaded if len(fold.targets)], config, seed, truth)
    if doubled is not None and loaded and len(loaded[0].targets):
        rows += doubling(loaded[0], MeanSet.read(doubled), config, seed)
    if permuted is not None:
        rows += permuted_labels(contracts.DE.read(permuted))
    genes = EffectSet.read(effects[0]).genes if effects else sums.genes
    rows += control_guides(sums, genes, config, seed)
    frame = pd.DataFrame(rows, columns=contracts.CALIBRATION.names)
    contracts.CALIBRATION.write(frame.astype({"n": np.int64, "level": float, "value": float, "low": float, "high": float}), out)


def _held_out_checks(folds: Sequence[Fold], config: InferenceConfig, seed: int, truth: str | Path | None) -> Rows:
    """The checks against held-out cells."""
    if not folds:
        logger.info("no measured target was held out: checks against held-out cells are left out")
        return []
    rows = coverage(folds) + calls(folds, config, seed) + equivalence(folds)
    rows += shuffled_effects(folds, config, derive_seed(seed, "calibration"))
    return rows + (against_truth(folds, Truth.read(truth)) if truth is not None else [])
