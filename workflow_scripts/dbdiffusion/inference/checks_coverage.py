"""Do intervals hold the observed effect of held-out cells, and how wide are they? Every error model beside the default."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dbdiffusion.inference import debias, table
from dbdiffusion.inference.bands import PER_TARGET, Rows, mean_row
from dbdiffusion.inference.debias import Queries
from dbdiffusion.inference.held_out import ERROR_MODELS, LEVELS, Fold


@dataclass(frozen=True)
class Located:
    """The located targets of one kind of a fold: rows (R,) among the fold's targets, predicted effect and observed one (R, G),
    strata of expression and of observed effect (R, G) as thirds, genes of strongest prediction (R, G), kind, k_eff and confidence (R,),
    and half widths (R, G) by error model as functions of the level: `observed`, with the observation's own variance, and `reported`, of
    lfc as the table gives it."""

    rows: np.ndarray
    predicted: np.ndarray
    seen: np.ndarray
    expression: np.ndarray
    effect: np.ndarray
    strongest: np.ndarray
    kind: str
    k_eff: np.ndarray
    confidence: np.ndarray
    observed: dict[str, Callable[[float], np.ndarray]]
    reported: dict[str, Callable[[float], np.ndarray]]


def located_targets(folds: Sequence[Fold]) -> list[Located]:
    """What is needed of every fold and kind of query, for the default prediction."""
    return [_located(fold, kind) for fold in folds for kind in sorted(fold.inference.models[fold.default]) if len(fold.located(kind))]


def _located(fold: Fold, kind: str) -> Located:
    names, inference, method = fold.located(kind), fold.inference, fold.default
    queries = Queries.of(inference.screen, inference.locations.select(names))
    found = debias.estimate(inference.models[method][kind], inference.screen, queries, "target")
    whole = fold.whole.subset(names)
    own = debias.sampling_variance(whole)

    def widths(model: str, extra: np.ndarray | float) -> Callable[[float], np.ndarray]:
        return table.intervals(inference, method, kind, found, queries, model, extra)[2]

    shipped = {model: 0.0 if model in table.PUBLISHED else inference.screen.control_sampling for model in ERROR_MODELS}
    return Located(
        fold.targets.get_indexer(names),
        found.effect,
        whole.effect,
        np.broadcast_to(_thirds(whole.control_mean), whole.effect.shape),
        np.stack([_thirds(np.abs(e)) for e in whole.effect]),
        debias.strongest(found.effect),
        kind,
        queries.info["k_eff"].to_numpy(dtype=float),
        queries.info["confidence"].to_numpy(dtype=float),
        {model: widths(model, own) for model in ERROR_MODELS},
        {model: widths(model, shipped[model]) for model in ERROR_MODELS},
    )


def _thirds(values: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.quantile(values, [1 / 3, 2 / 3]), values, side="right")


def share_within(inside: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Share (R,) of the kept genes of each target that are inside; NaN where none is kept."""
    count = keep.sum(1)
    return np.where(count > 0, (inside & keep).sum(1) / np.maximum(count, 1), np.nan)


def coverage(folds: Sequence[Fold]) -> Rows:
    """Share of genes whose interval covers the observed effect of the held-out cells, by error model; and mean width.

    The interval is that of the effect, widened by the sampling variance s^2/n of the observation. Prediction and observation
    share their control cells, so the control's error cancels and is left out. A unit is a target; strata are thirds of
    expression (by control mean) and of effect (observed), the genes of strongest predicted effect, combinations (where singles are targets
    too), few or many neighbours, and low or high location confidence.
    """
    parts = located_targets(folds)
    if not parts:
        return []
    rows: Rows = []
    k_eff, confidence = (np.concatenate([getattr(p, name) for p in parts]) for name in ("k_eff", "confidence"))
    few, unsure = k_eff <= np.median(k_eff), confidence <= np.median(confidence)
    groups = {"k_eff few": few, "k_eff many": ~few, "confidence low": unsure, "confidence high": ~unsure}
    combined = np.concatenate([np.full(len(p.rows), p.kind == "additive") for p in parts])
    if combined.any() and not combined.all():
        groups["combinations"] = combined
    for model in ERROR_MODELS:
        for level in LEVELS:
            inside = [np.abs(p.seen - p.predicted) <= p.observed[model](level) for p in parts]
            width = np.concatenate([2 * p.reported[model](level).mean(1) for p in parts])
            unit = np.concatenate([i.mean(1) for i in inside])
            rows += [mean_row("coverage", model, level, PER_TARGET, unit), mean_row("width", model, level, PER_TARGET, width)]
            for name in ("expression", "effect"):
                for g, word in enumerate(("low", "mid", "high")):
                    values = [share_within(i, getattr(p, name) == g) for p, i in zip(parts, inside, strict=True)]
                    rows.append(mean_row("coverage", model, level, f"{name} {word}", np.concatenate(values)))
            values = np.concatenate([share_within(i, p.strongest) for p, i in zip(parts, inside, strict=True)])
            rows.append(mean_row("coverage", model, level, "prediction strongest 5 %", values))
            rows += [mean_row("coverage", model, level, name, unit[keep]) for name, keep in groups.items() if keep.any()]
    return rows
