"""Are calls right, and how many of the right ones are made? Every predictor and test beside what a replicate would call."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain

import numpy as np

from dbdiffusion.config.inference import InferenceConfig
from dbdiffusion.data.sets import EffectSet, MeanSet
from dbdiffusion.inference import table
from dbdiffusion.inference.bands import Rows, fdr_rows, per_target, ratio_row, share_row
from dbdiffusion.inference.held_out import GENERATOR, RATES, Fold, labels
from dbdiffusion.inference.selection import FALSE_PER_WRONG
from dbdiffusion.inference.table import Inference, Result
from dbdiffusion.runtime import contracts

TESTS = contracts.TESTS
FIXED_WEIGHTS = {"lambda_0": "zero", "lambda_1": "one"}
"""The generator with its weight fixed: no generator at all (neighbour mean), and the published estimator."""
EQUIVALENT = 0.1
"""Genes count as equivalent to control when their effect lies within this (natural log), shown by two one-sided tests at 5 %."""


@dataclass(frozen=True)
class Called:
    """q of one test (T, G), 1 where a target has no calls, predicted effects (T, G), 0 where there are none, and whether the held-out
    cells show their direction (T, G)."""

    q: np.ndarray
    effect: np.ndarray
    agrees: np.ndarray


def called_in_table(fold: Fold, methods: Sequence[str] | None = None) -> Iterator[tuple[str, Called]]:
    """What `de.parquet` says, test by test: TEST of the default prediction, TEST:METHOD of the other predictors.

    methods: those wanted (none: all). One at a time, since all of them together are large.
    """
    shape = fold.whole.effect.shape
    for method, frame in fold.de.groupby(fold.de["method"].astype(str), sort=True):
        if methods is not None and method not in methods:
            continue
        at = (fold.targets.get_indexer(frame["target"].astype(str)), fold.whole.genes.get_indexer(frame["gene"].astype(str)))
        effect = np.zeros(shape)
        effect[at] = frame["lfc"].fillna(0.0)
        # Directions were called for the default prediction and the generator alone: no other needs to be predicted again.
        directed = frame[TESTS["direction"]].notna().any()
        agrees = _agreeing(fold, table.results(fold.inference, method, fold.targets) if directed else ())
        for test, column in TESTS.items():
            if frame[column].notna().any():
                q = np.ones(shape)
                q[at] = frame[column].where(frame["call"].astype(str) != "no_call").fillna(1.0)
                yield test if method == fold.default else f"{test}:{method}", Called(q, effect, agrees)


def _agreeing(fold: Fold, results: Iterable[Result]) -> np.ndarray:
    """Whether the held-out cells show the predicted directions (T, G), as calibration asks pseudo-targets."""
    agrees = np.zeros(fold.whole.effect.shape, dtype=bool)
    for result in results:
        if result.found is not None:
            at = fold.targets.get_indexer(result.targets)
            agrees[at] = table.seen_directions(fold.inference.screen, result.found, fold.whole.effect[at])
    return agrees


def called_by_default(fold: Fold) -> dict[str, Called]:
    """The calls that `de.parquet` makes for the default prediction, by test."""
    return dict(called_in_table(fold, [fold.default]))


def called_again(fold: Fold, config: InferenceConfig, seed: int) -> Iterator[tuple[str, Called]]:
    """What `de.parquet` does not hold: the generator with weight 0 and 1, and calibrated calls of the predictors called by t."""
    inference = fold.inference
    for label in FIXED_WEIGHTS if GENERATOR in inference.predictors else ():
        again = generator_at(fold, inference.predictors[GENERATOR].means, label, config, seed)
        yield from ((f"{test}:{label}", found) for test, found in called_from(fold, again, GENERATOR).items())
    for method in inference.methods:
        if method not in inference.selectors and config.calls != "t":
            found = called_from(fold, with_selector(inference, method, seed), method)
            yield from ((f"{test}:{method}", found[test]) for test in found if test != "t")


def generator_at(fold: Fold, means: MeanSet, label: str, config: InferenceConfig, seed: int) -> Inference:
    """Inference from the generator alone at one of the fixed weights, with calibrated calls where the config asks for them."""
    fixed = config.model_copy(update={"weight": FIXED_WEIGHTS[label]})
    inference = table.infer(fold.inference.screen.effects, fold.inference.locations, {GENERATOR: means}, fixed, seed, select=False)
    return with_selector(inference, GENERATOR, seed)


def with_selector(inference: Inference, method: str, seed: int) -> Inference:
    """The same inference with calibrated calls of a method that is called by t, where the config asks for them at all."""
    if inference.config.calls == "t":
        return inference
    return replace(inference, selectors={**inference.selectors, method: table.fit_selectors(inference, method, seed)})


def called_from(fold: Fold, inference: Inference, method: str) -> dict[str, Called]:
    """Calls on the fold's targets by test, from an inference of its own."""
    shape = fold.whole.effect.shape
    effect, q = np.zeros(shape), {test: np.ones(shape) for test in TESTS}
    made = dict.fromkeys(TESTS, False)
    results = list(table.results(inference, method, fold.targets))
    for result in results:
        at = fold.targets.get_indexer(result.targets)
        effect[at] = np.nan_to_num(result.columns["lfc"])
        silent = (result.reason != "")[:, None]
        for test, column in TESTS.items():
            values = result.columns[column]
            q[test][at] = np.where(silent | np.isnan(values), 1.0, values)
            made[test] |= bool(np.isfinite(values).any())
    agrees = _agreeing(fold, results)
    return {test: Called(q[test], effect, agrees) for test in TESTS if made[test]}


@dataclass(frozen=True)
class Tally:
    """Counts of one test at one rate in a fold, by target: calls and right ones (T,), as `right_calls` counts them; calls with
    a sign to compare, and wrong ones of these (T,); true genes of half B, and those that are called (H,)."""

    calls: np.ndarray
    right: np.ndarray
    signed: np.ndarray
    turned: np.ndarray
    true: np.ndarray
    found: np.ndarray


def right_calls(test: str, made: Called, q: float, whole: np.ndarray) -> np.ndarray:
    """How many calls of each target (T,) are right by the claim of their test, TEST or TEST:PREDICTOR, as its held-out cells tell.

    whole: genes (T, G) that the cells' own test calls, for the claim that they do. Calls of direction have two false ones for each
    with the wrong observed direction, so that their number of right ones may be below 0.
    """
    called = made.q <= q
    if not test.startswith("direction"):
        return (called & whole).sum(1)
    return called.sum(1) - FALSE_PER_WRONG * (called & ~made.agrees).sum(1)


def _tally(fold: Fold, test: str, made: Called, q: float, whole: np.ndarray, half_b: np.ndarray) -> Tally:
    called = made.q <= q
    signed, turned = signs(made, q, fold.whole.effect)
    found = called[fold.rows_halved] & half_b
    return Tally(called.sum(1), right_calls(test, made, q, whole), signed, turned, half_b.sum(1), found.sum(1))


def calls(folds: Sequence[Fold], config: InferenceConfig, seed: int) -> Rows:
    """FDR, power and sign errors of calls at several nominal rates, beside the replicate.

    Truth is the held-out cells' own test (BH at config.de_fdr): all of them for `fdr` (what is claimed is what such an
    experiment would call), half B for power and the replicate, where half A's own calls stand for the prediction; but `fdr` of
    `direction` is twice the share of calls whose observed direction is wrong. Methods: `direction`, `selection` and `t` for the
    default prediction, TEST:PREDICTOR for the others, with `lambda_0` and `lambda_1` the generator at a fixed weight.
    """
    tallies: dict[tuple[str, float], list[Tally]] = defaultdict(list)
    replicate: list[tuple[EffectSet, np.ndarray]] = []
    for fold in folds:
        whole, half_b = labels(fold.whole, config.de_fdr), np.zeros((0, len(fold.whole.genes)), dtype=bool)
        if fold.half_a is not None and fold.half_b is not None:
            half_b = labels(fold.half_b, config.de_fdr)
            replicate.append((fold.half_a, half_b))
        for test, made in chain(called_again(fold, config, seed), called_in_table(fold)):
            for q in RATES:
                tallies[test, q].append(_tally(fold, test, made, q, whole, half_b))
    rows: Rows = []
    for q in RATES:
        for test in sorted({name for name, _ in tallies}):
            count = {f.name: np.concatenate([getattr(t, f.name) for t in tallies[test, q]]) for f in fields(Tally)}
            rows += fdr_rows("fdr", test, q, count["calls"], count["right"])
            rows.append(ratio_row("sign_error", test, q, count["turned"], count["signed"]))
            if replicate:
                rows.append(ratio_row("power", test, q, count["found"], count["true"]))
        if replicate:
            pairs = [(labels(half_a, q), half_b) for half_a, half_b in replicate]
            rows.append(share_row("power_replicate", "replicate", q, pairs))
            rows += fdr_rows("fdr_replicate", "replicate", q, *per_target(pairs)[:2])
    return rows


def signs(made: Called, q: float, effect: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Calls of genes whose effect (T, G) is not 0, by target (T,), and those of them with the other sign (T,)."""
    called = (made.q <= q) & (effect != 0)
    return called.sum(1), (called & (np.sign(made.effect) * np.sign(effect) < 0)).sum(1)


def equivalence(folds: Sequence[Fold]) -> Rows:
    """Calls among genes that are equivalent to control in the held-out cells (two one-sided tests at 5 %, +- 0.1)."""
    called = [called_by_default(fold) for fold in folds]
    same = [np.abs(fold.whole.effect) + 1.645 * fold.whole.se <= EQUIVALENT for fold in folds]
    return [
        share_row("equivalence", test, q, [(found[test].q <= q, s) for found, s in zip(called, same, strict=True) if test in found])
        for q in RATES
        for test in TESTS
        if any(test in found for found in called)
    ]
