"""Which held-out targets get figures of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dbdiffusion.benchmark.ceilings import held_out
from dbdiffusion.data.moments import Moments
from dbdiffusion.data.splits import Splits
from dbdiffusion.perturbations.effects import estimate_effects


def strongest_targets(*, moments: str | Path, splits: str | Path, folds: Sequence[str]) -> list[str]:
    """The held-out targets of the folds by their standardised effect in half A, strongest first.

    Half A chooses, half B is what figures show: a target is not picked for its luck in the cells it is shown with.
    """
    measured, divided = Moments.read(moments), Splits.read(splits)
    names = sorted({name for fold in folds for name in held_out(divided, measured, fold)})
    if not names:
        return []
    half = estimate_effects(measured, names, half="A", control_half="A")
    z = np.divide(half.effect, half.se, out=np.zeros_like(half.effect), where=half.se > 0)
    strength = (z**2).mean(axis=1)
    return [names[i] for i in np.argsort(-strength, kind="stable")]
