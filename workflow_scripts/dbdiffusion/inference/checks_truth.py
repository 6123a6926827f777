"""Intervals and calls against the true effects, where the screen was simulated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from dbdiffusion.data.sets import EffectSet
from dbdiffusion.data.simulate import TRUTH
from dbdiffusion.inference.bands import PER_TARGET, Rows, fdr_rows, mean_row, per_target, ratio_row
from dbdiffusion.inference.checks_calls import TESTS, Called, called_by_default, signs
from dbdiffusion.inference.checks_coverage import located_targets, share_within
from dbdiffusion.inference.held_out import ERROR_MODELS, LEVELS, RATES, Fold, labels


@dataclass(frozen=True)
class Truth:
    """Perturbations x genes: true effects in ln(1 + CP10k), and whether the gene's own counts change at all."""

    effect: pd.DataFrame
    affected: pd.DataFrame

    @classmethod
    def read(cls, path: str | Path) -> Truth:
        """From table `truth` of a simulated screen."""
        frame = TRUTH.read(path).astype({"perturbation": str, "gene": str})
        effect, lfc = (frame.pivot(index="perturbation", columns="gene", values=name) for name in ("effect", "lfc"))
        return cls(effect, lfc != 0)

    def of(self, fold: Fold) -> tuple[np.ndarray, np.ndarray]:
        """Effects and whether they are real (T, G) of a fold's targets on its panel."""
        at = list(fold.targets), list(fold.whole.genes)
        return self.effect.loc[at].to_numpy(), self.affected.loc[at].to_numpy()


def against_truth(folds: Sequence[Fold], truth: Truth) -> Rows:
    """Calls of genes that are not affected, wrong signs, and coverage of the true effect by the reported intervals of lfc.

    `fdr_truth`, `sign_error_truth`: methods `direction`, `selection` and `t` of the default prediction, and `replicate`, the calls of
    half A of the target's own cells; in `fdr_truth` a call of `direction` with the wrong sign is false too. `coverage_truth`: by error
    model and level, of all genes and of those that are affected or not.
    """
    effects, affected = zip(*(truth.of(fold) for fold in folds), strict=True)
    called = [called_by_default(fold) for fold in folds]
    real = [np.where(y, e, 0.0) for e, y in zip(effects, affected, strict=True)]
    rows: Rows = []
    for q in RATES:
        made = {test: [(f[test], e) for f, e in zip(called, real, strict=True) if test in f] for test in TESTS}
        made["replicate"] = [
            (_replicate(fold.half_a, q), e[fold.rows_halved]) for fold, e in zip(folds, real, strict=True) if fold.half_a is not None
        ]
        for test, pairs in made.items():
            if pairs:
                right = [(c.effect * e > 0) if test == "direction" else (e != 0) for c, e in pairs]
                judged = [(c.q <= q, y) for (c, _), y in zip(pairs, right, strict=True)]
                rows += fdr_rows("fdr_truth", test, q, *per_target(judged)[:2])
                signed, turned = (np.concatenate(part) for part in zip(*(signs(c, q, e) for c, e in pairs), strict=True))
                rows.append(ratio_row("sign_error_truth", test, q, turned, signed))
    return rows + _coverage(folds, effects, affected)


def _replicate(half: EffectSet, q: float) -> Called:
    """Calls of a half of the cells by its own test."""
    return Called(np.where(labels(half, q), 0.0, 1.0), half.effect, np.ones(half.effect.shape, dtype=bool))


def _coverage(folds: Sequence[Fold], effects: Sequence[np.ndarray], affected: Sequence[np.ndarray]) -> Rows:
    known = zip(folds, effects, affected, strict=True)
    parts = [(part, e[part.rows], y[part.rows]) for fold, e, y in known for part in located_targets([fold])]
    rows: Rows = []
    for model in ERROR_MODELS if parts else ():
        for level in LEVELS:
            inside = [(np.abs(e - part.predicted) <= part.reported[model](level), y) for part, e, y in parts]
            for stratum, keep in (
                (PER_TARGET, lambda some: np.ones_like(some)),
                ("unaffected genes", lambda some: ~some),
                ("affected genes", lambda some: some),
            ):
                values = np.concatenate([share_within(within, keep(some)) for within, some in inside])
                rows.append(mean_row("coverage_truth", model, level, stratum, values))
    return rows
