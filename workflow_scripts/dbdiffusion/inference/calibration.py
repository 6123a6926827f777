"""Do the error rates hold on this dataset? Checks against held-out cells, control guides and permuted labels."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from dbdiffusion.config.inference import InferenceConfig
from dbdiffusion.data.moments import Moments
from dbdiffusion.data.sets import CONTROL, EffectSet, LocationSet, MeanSet
from dbdiffusion.data.splits import Splits
from dbdiffusion.inference import debias, table, ttest
from dbdiffusion.inference.debias import Queries
from dbdiffusion.inference.table import Inference
from dbdiffusion.perturbations.effects import control_weights, estimate_effects
from dbdiffusion.runtime import contracts
from dbdiffusion.runtime.errors import UserError
from dbdiffusion.runtime.seeds import derive_seed, rng

logger = logging.getLogger(__name__)

LEVELS = (0.5, 0.8, 0.9, 0.95)
RATES = (0.05, 0.1, 0.2)
ERROR_MODELS = ("t", "conformal", "cells_only", "conservative", "ppi_z")
MIN_GUIDES = 7
"""Control guides below which none is held out: three as neighbours, three as control, one held out."""
THIN = 25
"""Control-guide p are thinned to every so many genes, ordered by expression, for the test of uniformity."""
EQUIVALENT = 0.1
"""Genes count as equivalent to control when their effect lies within this (natural log), shown by two one-sided tests at 5 %."""

Rows = list[dict[str, object]]


@dataclass(frozen=True)
class Fold:
    """One outer fold: what inference saw and gave, and the truth of its measured targets.

    whole, half_a, half_b: effects of the measured targets from all their cells and from halves, on the panel.
    """

    name: str
    inference: Inference
    targets: pd.Index
    whole: EffectSet
    half_a: EffectSet | None
    half_b: EffectSet | None
    de: pd.DataFrame


def row(check: str, method: str, level: float, stratum: str, units: np.ndarray, n: int | None = None) -> dict[str, object]:
    """One row of the table from a rate per unit (target): their mean with a 95 % t band over units, within [0, inf)."""
    units = np.asarray(units, dtype=float)
    units = units[np.isfinite(units)]
    if not len(units):
        return _row(check, method, level, stratum, np.nan, 0, np.nan, np.nan)
    mean = float(units.mean())
    if len(units) < 2:
        return _row(check, method, level, stratum, mean, n or len(units), np.nan, np.nan)
    half = stats.t.ppf(0.975, len(units) - 1) * units.std(ddof=1) / np.sqrt(len(units))
    return _row(check, method, level, stratum, mean, n or len(units), max(mean - half, 0.0), mean + half)


def _row(check: str, method: str, level: float, stratum: str, value: float, n: int, low: float, high: float) -> dict[str, object]:
    return {"check": check, "method": method, "level": level, "stratum": stratum, "value": value, "n": int(n), "low": low, "high": high}


def binomial_band(successes: int, n: int) -> tuple[float, float]:
    """95 % Clopper-Pearson band of a rate."""
    low = stats.beta.ppf(0.025, successes, n - successes + 1) if successes else 0.0
    high = stats.beta.ppf(0.975, successes + 1, n - successes) if successes < n else 1.0
    return float(low), float(high)


# -- coverage and width -------------------------------------------------------------------------------------------------------


def _located(fold: Fold, kind: str) -> pd.Index:
    info = fold.inference.locations.info.loc[list(fold.targets)]
    return fold.targets[((info["status"] == "located") & (info["kind"] == kind)).to_numpy()]


def coverage(folds: Sequence[Fold]) -> Rows:
    """Share of genes whose interval covers the observed effect of the held-out cells, by error model; and mean width.

    The interval is that of the effect, widened by the sampling variance s^2/n of the observation. Prediction and observation
    share their control cells, so the control's error cancels and is left out. A unit is a target; strata are thirds of
    expression (by control mean) and of effect (observed), and few or many neighbours.
    """
    method = _default(folds)
    parts = [p for fold in folds for p in _standardised(fold, method)]
    if not parts:
        return []
    rows: Rows = []
    k_eff = np.concatenate([p["k_eff"] for p in parts])
    cut = float(np.median(k_eff))
    for model in ERROR_MODELS:
        for level in LEVELS:
            inside = [np.abs(p["error"]) <= p[model](level, True) for p in parts]
            width = np.concatenate([2 * p[model](level, False).mean(1) for p in parts])
            unit = np.concatenate([i.mean(1) for i in inside])
            rows += [row("coverage", model, level, "all", unit), row("width", model, level, "all", width)]
            for name in ("expression", "effect"):
                for g, word in enumerate(("low", "mid", "high")):
                    values = [np.where(p[name] == g, i, np.nan) for p, i in zip(parts, inside, strict=True)]
                    rows.append(row("coverage", model, level, f"{name} {word}", np.concatenate([_nanmean(v) for v in values])))
            for word, keep in (("few", k_eff <= cut), ("many", k_eff > cut)):
                if keep.any():
                    rows.append(row("coverage", model, level, f"k_eff {word}", unit[keep]))
    return rows


def _nanmean(values: np.ndarray) -> np.ndarray:
    count = np.isfinite(values).sum(1)
    return np.where(count > 0, np.nansum(values, axis=1) / np.maximum(count, 1), np.nan)


def _thirds(values: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.quantile(values, [1 / 3, 2 / 3]), values, side="right")


def _standardised(fold: Fold, method: str) -> list[dict]:
    """Errors of the measured targets of a fold by kind, half widths as functions of level, and strata."""
    out = []
    for kind in sorted(fold.inference.models[method], reverse=True):
        names = _located(fold, kind)
        if not len(names):
            continue
        inference = fold.inference
        queries = Queries.of(inference.screen, inference.locations.select(names))
        found = debias.estimate(inference.models[method][kind], inference.screen, queries, "target")
        whole = fold.whole.subset(names)
        own = debias.sampling_variance(whole)
        part: dict = {"error": whole.effect - found.effect, "k_eff": queries.info["k_eff"].to_numpy(dtype=float)}
        for model in ERROR_MODELS:
            part[model] = _half_widths(inference, method, kind, found, queries, model, own)
        part["expression"] = np.broadcast_to(_thirds(whole.control_mean), whole.effect.shape)
        part["effect"] = np.stack([_thirds(np.abs(e)) for e in whole.effect])
        out.append(part)
    return out


def _half_widths(inference: Inference, method: str, kind: str, found: debias.Estimate, queries: Queries, model: str, own: np.ndarray):
    """Half width by level, with the observation's variance (for coverage) or that of lfc as it is reported (for width)."""
    shipped = 0.0 if model in table.PUBLISHED else inference.screen.control_sampling
    observed = table.intervals(inference, method, kind, found, queries, model, own)[2]
    reported = table.intervals(inference, method, kind, found, queries, model, shipped)[2]
    return lambda level, widened: (observed if widened else reported)(level)


# -- calls --------------------------------------------------------------------------------------------------------------------


def calls(folds: Sequence[Fold], config: InferenceConfig) -> Rows:
    """FDR, power and sign errors of the calls of `de.parquet` at several nominal rates, beside the replicate.

    Truth is the held-out cells' own test (BH at config.de_fdr): all of them for `fdr` (what is claimed is what such an
    experiment would call), half B for power and the replicate, where half A's own calls stand for the prediction. `fdr`
    all: mean false discovery proportion over targets (0 without calls); `pooled`: false among all calls of all targets.
    Methods: `selection` and `t` for the default prediction, `t:METHOD` for the other predictors.
    """
    rows: Rows = []
    parts = [_call_matrices(fold, config) for fold in folds if len(fold.targets)]
    tests = sorted({name for part in parts for name in part["q"]})
    for q in RATES:
        for test in tests:
            taken = [(p["q"][test] <= q, p) for p in parts if test in p["q"]]
            rows += _fdr_rows("fdr", test, q, [(c, p["whole"]) for c, p in taken])
            wrong = [(c & p["wrong_sign"][test]).sum(1) / np.where(c.any(1), c.sum(1), np.nan) for c, p in taken]
            rows.append(row("sign_error", test, q, "all", np.concatenate(wrong)))
            if all(p["b"] is not None for _, p in taken):
                rows.append(_power_row("power", test, q, [(c, p["b"]) for c, p in taken]))
        if parts and all(p["b"] is not None for p in parts):
            replicate = [(p["a"](q), p["b"]) for p in parts]
            rows.append(_power_row("power_replicate", "replicate", q, replicate))
            rows += _fdr_rows("fdr_replicate", "replicate", q, replicate)
    return rows


Pairs = Sequence[tuple[np.ndarray, np.ndarray]]
"""Called and true, each (T, G), by fold: panels differ from fold to fold."""


def _per_target(pairs: Pairs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Calls, true calls and true genes of each target."""
    counts = [(c.sum(1), (c & y).sum(1), y.sum(1)) for c, y in pairs]
    return tuple(np.concatenate(part).astype(float) for part in zip(*counts, strict=True))  # type: ignore[return-value]


def _fdr_rows(check: str, method: str, q: float, pairs: Pairs) -> Rows:
    count, right, _ = _per_target(pairs)
    total, wrong = int(count.sum()), int((count - right).sum())
    low, high = binomial_band(wrong, total) if total else (np.nan, np.nan)
    pooled = _row(check, method, q, "pooled", wrong / total if total else np.nan, total, low, high)
    return [row(check, method, q, "all", (count - right) / np.maximum(count, 1)), pooled]


def _power_row(check: str, method: str, q: float, pairs: Pairs) -> dict[str, object]:
    """Share of the targets' DE genes that are called, pooled over targets; band by jackknife over targets."""
    _, found, total = _per_target(pairs)
    if not total.sum():
        return _row(check, method, q, "all", np.nan, 0, np.nan, np.nan)
    value = found.sum() / total.sum()
    left = (found.sum() - found) / np.maximum(total.sum() - total, 1e-12)
    half = 1.96 * np.sqrt((len(left) - 1) / len(left) * ((left - left.mean()) ** 2).sum()) if len(left) > 1 else np.nan
    return _row(check, method, q, "all", value, int(total.sum()), max(value - half, 0.0), min(value + half, 1.0))


def _call_matrices(fold: Fold, config: InferenceConfig) -> dict:
    """q by test (T, G) with 1 where a target has no calls, labels, and whether the predicted sign is the observed one's opposite."""
    genes, targets = fold.whole.genes, fold.targets
    default = _default([fold])
    q: dict[str, np.ndarray] = {}
    wrong: dict[str, np.ndarray] = {}
    shape = (len(targets), len(genes))
    for method, frame in fold.de.groupby("method", observed=True, sort=True):
        at = (targets.get_indexer(frame["target"].astype(str)), genes.get_indexer(frame["gene"].astype(str)))
        lfc = np.zeros(shape)
        lfc[at] = frame["lfc"].fillna(0.0)
        for column, test in (("q_selection", "selection"), ("q_t", "t")):
            if frame[column].notna().any():
                name = test if str(method) == default else f"{test}:{method}"
                q[name] = np.ones(shape)
                q[name][at] = frame[column].where(frame["call"].astype(str) != "no_call").fillna(1.0)
                wrong[name] = np.sign(lfc) * np.sign(fold.whole.effect) < 0
    whole = _labels(fold.whole, config.de_fdr)
    b = None if fold.half_b is None else _labels(fold.half_b, config.de_fdr)
    return {"q": q, "wrong_sign": wrong, "whole": whole, "b": b, "a": lambda rate: _labels(fold.half_a, rate)}


def _labels(effects: EffectSet, fdr: float) -> np.ndarray:
    return ttest.de_labels(effects.effect, effects.se, effects.n_cells, fdr)


def _default(folds: Sequence[Fold]) -> str:
    """The default prediction: the stack where there is one, else the first method."""
    methods = folds[0].inference.methods
    return table.STACKED if table.STACKED in methods else ("dbdiffusion" if "dbdiffusion" in methods else methods[0])


def equivalence(folds: Sequence[Fold]) -> Rows:
    """Calls among genes that are equivalent to control in the held-out cells (two one-sided tests at 5 %, +- 0.1)."""
    rows: Rows = []
    for q in RATES:
        for column, test in (("q_selection", "selection"), ("q_t", "t")):
            rates = []
            for fold in folds:
                frame = fold.de[fold.de["method"].astype(str) == _default([fold])]
                if frame[column].isna().all():
                    continue
                at = (fold.targets.get_indexer(frame["target"].astype(str)), fold.whole.genes.get_indexer(frame["gene"].astype(str)))
                called = np.zeros(fold.whole.effect.shape, dtype=bool)
                called[at] = ((frame[column] <= q) & (frame["call"].astype(str) != "no_call")).to_numpy()
                same = np.abs(fold.whole.effect) + 1.645 * fold.whole.se <= EQUIVALENT
                rates.append((called & same).sum(1) / np.where(same.any(1), same.sum(1), np.nan))
            if rates:
                rows.append(row("equivalence", test, q, "all", np.concatenate(rates)))
    return rows


# -- control guides -----------------------------------------------------------------------------------------------------------


def control_guides(moments: Moments, genes: pd.Index, config: InferenceConfig, seed: int) -> Rows:
    """Non-targeting guides as perturbations that do nothing, each held out and predicted from half of the others.

    The other half of the guides is the control. p of the predicted effect should be uniform (value: quantile of p, level:
    quantile expected), also the p of the held-out guide's observed effect under its prediction (`prediction_error`), and
    the t test should call nothing: `control_guides_fdr` is the share of guides with any call.
    """
    guides = [g for g in moments.control_guides if g and moments.control(guides=[g])[0] >= 2]
    if len(guides) < MIN_GUIDES:
        logger.info("%d control guides: too few to hold one out (%d), check left out", len(guides), MIN_GUIDES)
        return []
    p, error_p = [], []
    for held in guides:
        for swap in (0, 1):
            pair = _held_out_guide(moments, genes, guides, held, swap, config, seed)
            p.append(pair[0])
            error_p.append(pair[1])
    return _guide_rows("t", np.array(p), genes, moments) + _guide_rows("prediction_error", np.array(error_p), genes, moments)


def _held_out_guide(
    moments: Moments, genes: pd.Index, guides: list[str], held: str, swap: int, config: InferenceConfig, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """p (G,) of a held-out control guide's predicted effect, and of its observed effect under the prediction."""
    others = [g for g in guides if g != held]
    others = [others[i] for i in rng(seed, "control_guides", held).permutation(len(others))]
    neighbours, control = sorted(others[swap::2]), sorted(others[1 - swap :: 2])
    measured = guide_effects(moments, [*neighbours, held], control, genes)
    train = measured.subset(neighbours)
    names = pd.Index([*neighbours, held])
    weights = 1.0 - np.eye(len(names))[:, : len(neighbours)]
    weights /= weights.sum(1, keepdims=True)
    info = pd.DataFrame(
        {"role": ["pseudo"] * len(neighbours) + ["target"], "k_eff": 1 / (weights**2).sum(1), "confidence": 1.0, "kind": "single"},
        index=names,
    ).assign(parts_measured=0, status="located", reason="", locator="control guides")
    locations = LocationSet(names, pd.Index([*neighbours, CONTROL]), np.hstack([weights, np.zeros((len(names), 1))]), info)
    screen = debias.Screen.of(train, config.de_fdr)
    pseudo = debias.pseudo_targets(screen, locations, "single", seed)
    model = debias.fit(screen, pseudo, (), 0.0)
    found = debias.estimate(model, screen, Queries.of(screen, locations.select([held])), "target")
    df = found.df[:, None]
    p = ttest.p_values(found.effect, np.sqrt(found.variance + screen.control_sampling), df)
    observed = measured.subset([held])
    error = observed.effect - found.effect
    return p[0], ttest.p_values(error, np.sqrt(found.variance + debias.sampling_variance(observed)), df)[0]


def guide_effects(moments: Moments, guides: list[str], control: list[str], genes: pd.Index) -> EffectSet:
    """Effects of control guides against other control guides, on their batch composition."""
    at = moments.genes.get_indexer(genes)
    n_control, mean, variance = moments.control(guides=control)
    cells, batch_means, batch_variances = moments.control_by_batch(guides=control)
    effect, se, within, n_cells = [], [], [], []
    for guide in guides:
        n, own_mean, own_variance = moments.control(guides=[guide])
        weights = control_weights(moments.batch_cells(CONTROL, guides=[guide]), cells)
        noise = np.divide(batch_variances, cells[:, None], out=np.zeros_like(batch_variances), where=cells[:, None] > 0)
        effect.append(own_mean[at] - (weights @ batch_means)[at])
        se.append(np.sqrt(own_variance[at] / n + (weights**2 @ noise)[at]))
        within.append(own_variance[at])
        n_cells.append(n)
    effects = np.array(effect)
    counts = np.array(n_cells, dtype=np.int64)
    return EffectSet(
        pd.Index(guides), genes, mean[at] + effects, effects, np.array(se), np.array(within), counts, mean[at], variance[at], n_control
    )


def _guide_rows(method: str, p: np.ndarray, genes: pd.Index, moments: Moments) -> Rows:
    expressed = moments.control()[1][moments.genes.get_indexer(genes)]
    order = np.argsort(-expressed, kind="stable")
    varied = order[expressed[order] > 0]
    thin = varied[:: min(THIN, max(1, len(varied) // 12))]
    values = np.sort(p[:, varied].ravel())
    # Both halvings of the other guides concern the same held-out guide: one of them is a trial.
    p = p[::2]
    n = p[:, thin].size
    rows: Rows = []
    for level in np.linspace(0.05, 0.95, 19).round(2):
        low, high = stats.beta.ppf([0.025, 0.975], level * (n + 1), (1 - level) * (n + 1))
        rows.append(_row("control_guides_p", method, float(level), "all", float(np.quantile(values, level)), n, float(low), float(high)))
    test = stats.kstest(p[:, thin].ravel(), "uniform")
    rows.append(_row("control_guides_ks", method, 0.01, "all", float(test.pvalue), n, np.nan, np.nan))
    for q in RATES:
        any_call = (ttest.benjamini_hochberg(p[:, varied]) <= q).any(1)
        low, high = binomial_band(int(any_call.sum()), len(any_call))
        rows.append(_row("control_guides_fdr", method, q, "all", float(any_call.mean()), len(any_call), low, high))
    return rows


# -- permutation and doubling -------------------------------------------------------------------------------------------------


def permutation(folds: Sequence[Fold], config: InferenceConfig, seed: int) -> Rows:
    """Inference run again with the training perturbations' effects dealt out to other perturbations.

    Location and predictors then say nothing about any effect, while effects, their distribution and the calibration set stay as
    they are. The calls made on the targets are judged by the targets' own cells as in `fdr`: a valid procedure makes
    (almost) none, and keeps its rate if it does. (A permutation of cells' labels would leave no effect anywhere.)
    """
    called, labels = {"selection": [], "t": []}, []
    for fold in folds:
        effects = fold.inference.screen.effects
        order = rng(seed, "permutation", fold.name).permutation(len(effects.perturbations))
        values = {name: getattr(effects, name)[order] for name in ("mean", "effect", "se", "variance", "n_cells")}
        means = {name: p.means for name, p in fold.inference.predictors.items()}
        shuffled = table.infer(replace(effects, **values), fold.inference.locations, means, config, seed)
        method = _default([fold])
        names = [r for r in table.results(shuffled, method, fold.targets) if not np.isnan(r.columns["lfc"]).all()]
        for result in names:
            labels.append(_labels(fold.whole.subset(result.targets), config.de_fdr))
            silent = (result.reason != "")[:, None]
            for test, column in (("selection", "q_selection"), ("t", "q_t")):
                called[test].append(np.where(silent | np.isnan(result.columns[column]), 1.0, result.columns[column]))
    rows: Rows = []
    for q in RATES if labels else ():
        for test, found in called.items():
            pairs = [(values <= q, y) for values, y in zip(found, labels, strict=True)]
            rows += _fdr_rows("permutation_fdr", test, q, pairs)
            rows.append(row("permutation_calls", test, q, "all", np.concatenate([c.mean(1) for c, _ in pairs])))
    return rows


def doubling(folds: Sequence[Fold], config: InferenceConfig, seed: int) -> Rows:
    """Share of calls that change with twice the generated cells.

    The mean of twice the cells is drawn about that of the first ones with half their Monte-Carlo variance, which is then
    the variance that is left: what is seen beyond 0 are calls at the very edge of q.
    """
    changed = []
    for fold in folds:
        means = {name: twice_as_many(p.means, seed, fold.name, name) for name, p in fold.inference.predictors.items()}
        twice = table.infer(fold.inference.screen.effects, fold.inference.locations, means, config, seed)
        method = _default([fold])
        pairs = zip(table.results(fold.inference, method, fold.targets), table.results(twice, method, fold.targets), strict=True)
        changed += [(before.call != after.call).mean(1) for before, after in pairs]
    return [row("doubling", "selection" if config.calls == "selection" else "t", 0.0, "all", np.concatenate(changed))] if changed else []


def twice_as_many(means: MeanSet, seed: int, *labels: object) -> MeanSet:
    """Means as they could be with twice the generated cells."""
    half = means.mc_variance / 2
    noise = rng(seed, "doubling", *labels).normal(size=half.shape) * np.sqrt(half)
    return replace(means, mean=means.mean + noise, mc_variance=half)


# -- stage --------------------------------------------------------------------------------------------------------------------


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
) -> None:
    """All checks of one dataset over its outer folds, as contract `calibration`.

    effects, locations, means, de: one per fold, in the order of `folds` (means: tables by method); splits: which targets were
    held out; moments: of all perturbations, whose held-out cells are the truth. Checks that cannot be run (no control
    guides, no measured target, a half with fewer than 2 cells) are left out with a line in the log.
    """
    sums, split = Moments.read(moments), Splits.read(splits)
    loaded = [
        _load(name, e, location, m, d, sums, split, config, seed)
        for name, e, location, m, d in zip(folds, effects, locations, means, de, strict=True)
    ]
    loaded = [fold for fold in loaded if len(fold.targets)]
    rows: Rows = []
    if loaded:
        rows += coverage(loaded) + calls(loaded, config) + equivalence(loaded)
        rows += permutation(loaded, config, derive_seed(seed, "calibration")) + doubling(loaded, config, seed)
    else:
        logger.info("no measured target was held out: checks against held-out cells are left out")
    genes = EffectSet.read(effects[0]).genes if effects else sums.genes
    rows += control_guides(sums, genes, config, seed)
    frame = pd.DataFrame(rows, columns=contracts.CALIBRATION.names)
    contracts.CALIBRATION.write(frame.astype({"n": np.int64, "level": float, "value": float, "low": float, "high": float}), out)


def _load(
    name: str, effects: str | Path, locations: str | Path, means: Mapping[str, str | Path], de: str | Path, moments: Moments,
    split: Splits, config: InferenceConfig, seed: int,
) -> Fold:  # fmt: skip
    measured = EffectSet.read(effects)
    located = LocationSet.read(locations, "all", measured.perturbations)
    predicted = {method: MeanSet.read(path) for method, path in means.items()}
    inference = table.infer(measured, located, predicted, config, seed)
    known = set(split.measured)
    targets = [t for t in split.targets(name) if t in known and t in located.queries and moments.mean_var(t)[0] >= 2]
    frame = contracts.DE.read(de)
    whole = estimate_effects(moments, targets, measured.genes)
    halves = [_half(moments, targets, measured.genes, half) for half in ("A", "B")]
    return Fold(name, inference, pd.Index(targets), whole, halves[0], halves[1], frame[frame["target"].astype(str).isin(targets)])


def _half(moments: Moments, targets: list[str], genes: pd.Index, half: str) -> EffectSet | None:
    try:
        return estimate_effects(moments, targets, genes, half=half, control_half=half)
    except UserError as error:
        logger.info("no replicate check: %s", error)
        return None
