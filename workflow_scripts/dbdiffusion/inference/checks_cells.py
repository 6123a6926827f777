"""Does anything depend on how many cells were generated?"""

from __future__ import annotations

import numpy as np

from dbdiffusion.config.inference import InferenceConfig
from dbdiffusion.data.sets import MeanSet
from dbdiffusion.inference import table
from dbdiffusion.inference.bands import POOLED, Rows, ratio_row, row
from dbdiffusion.inference.checks_calls import TESTS, generator_at
from dbdiffusion.inference.held_out import GENERATOR, Fold
from dbdiffusion.inference.table import Inference

QUANTILES = (0.5, 0.9, 0.99, 1.0)
SMALLEST = 1e-300
"""p are not taken to be smaller: the logarithm of 0 is no distance."""


def doubling(fold: Fold, doubled: MeanSet, config: InferenceConfig, seed: int) -> Rows:
    """What twice the generated cells change: share of the calls at config.q, and |log10 p_t| by quantile over pairs.

    doubled: the generator's means from twice the cells, with everything else as it was. Methods: TEST of the default
    prediction, TEST:dbdiffusion of the generator debiased alone, and TEST:lambda_1 of the generator at full weight, where nothing
    hides its Monte-Carlo error. `doubling_calls`: share of pairs whose call changes; `doubling_log10_p`: value at the quantile
    `level` (0.5 the median, 1 the largest).
    """
    means = {name: predictor.means for name, predictor in fold.inference.predictors.items()}
    twice = {**means, GENERATOR: doubled}
    after = table.infer(fold.inference.screen.effects, fold.inference.locations, twice, config, seed)
    rows: Rows = []
    for method in dict.fromkeys((fold.default, GENERATOR)):
        rows += _change(fold, fold.inference, after, method, "" if method == fold.default else f":{method}")
    if GENERATOR in means:
        full = [generator_at(fold, m[GENERATOR], "lambda_1", config, seed) for m in (means, twice)]
        rows += _change(fold, *full, GENERATOR, ":lambda_1")
    return rows


def _change(fold: Fold, before: Inference, after: Inference, method: str, suffix: str) -> Rows:
    """Rows of one method, from one inference to the other."""
    rows: Rows = []
    first, second = (list(table.results(one, method, fold.targets)) for one in (before, after))
    for test, column in TESTS.items():
        calls = [_called(results, column, before.config.q) for results in (first, second)]
        if calls[0] is not None and calls[1] is not None:
            changed = np.concatenate([(x != y).sum(1) for x, y in zip(*calls, strict=True)])
            size = np.concatenate([np.full(len(x), x.shape[1]) for x in calls[0]])
            rows.append(ratio_row("doubling_calls", test + suffix, 0.0, changed, size))
    change = np.concatenate([np.abs(_log10(y) - _log10(x)).ravel() for x, y in zip(first, second, strict=True)])
    change = change[np.isfinite(change)]
    for quantile in QUANTILES if len(change) else ():
        rows.append(row("doubling_log10_p", f"t{suffix}", quantile, POOLED, float(np.quantile(change, quantile)), len(change)))
    return rows


def _called(results: list[table.Result], column: str, q: float) -> list[np.ndarray] | None:
    """Signed calls (R, G) of a test, chunk by chunk; None where the test was not made."""
    if not any(np.isfinite(r.columns[column]).any() for r in results):
        return None
    return [np.where((r.reason == "")[:, None] & (r.columns[column] <= q), np.sign(r.columns["lfc"]), 0.0) for r in results]


def _log10(result: table.Result) -> np.ndarray:
    return np.log10(np.maximum(result.columns["p_t"], SMALLEST))
