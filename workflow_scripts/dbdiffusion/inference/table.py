"""The DE table of a fold: every method debiased, with interval, tests and calls."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from dbdiffusion.config.inference import InferenceConfig
from dbdiffusion.config.splits import ALL
from dbdiffusion.data.sets import EffectSet, LocationSet, MeanSet
from dbdiffusion.inference import conformal, debias, published, selection, ttest
from dbdiffusion.inference.debias import Estimate, Predictor, Pseudo, Queries, Screen, Variate
from dbdiffusion.runtime import contracts
from dbdiffusion.runtime.errors import UserError
from dbdiffusion.runtime.seeds import rng
from dbdiffusion.runtime.tables import Table

logger = logging.getLogger(__name__)

STACKED = "stacked"
NOT_STACKED = ("control", "permuted")
"""Baselines that say nothing of the target: the stack has `no change` of its own, and the permuted one is a negative control."""
SELECTED = (STACKED, "dbdiffusion")
"""Methods with calibrated calls (direction, selection); the others are called by the t test."""
NORMAL_DF = 1e4


@dataclass(frozen=True)
class Inference:
    """All that one fold's inference learned: the screen, pseudo-targets by kind, variates and models by method and kind,
    selectors by method and kind (absent: calls by t)."""

    screen: Screen
    locations: LocationSet
    pseudo: dict[str, Pseudo]
    predictors: dict[str, Predictor]
    variates: dict[str, tuple[Variate, ...]]
    models: dict[str, dict[str, debias.Model]]
    selectors: dict[str, dict[str, selection.Selector]]
    config: InferenceConfig
    calibrations: dict[tuple[str, str], conformal.Quantiles] = field(default_factory=dict)

    @property
    def methods(self) -> list[str]:
        return list(self.variates)

    def quantiles(self, method: str, kind: str) -> conformal.Quantiles:
        """Conformal calibration of a method, from its pseudo-targets of a kind."""
        if (method, kind) not in self.calibrations:
            cross = cross_predictions(self, method, kind)
            sd = np.sqrt(cross.estimate.variance)
            predictive = np.sqrt(cross.estimate.variance + cross.sampling)
            error = cross.observed - cross.estimate.effect
            self.calibrations[method, kind] = conformal.fit_quantiles(error, sd, cross.estimate.effect, predictive)
        return self.calibrations[method, kind]

    def views(self, method: str, queries: Queries, role: str) -> list[np.ndarray]:
        """Effects by each predictor of a method, for agreement; the neighbour mean stands where a predictor is silent."""
        used = {v.predictor.name: v.predictor for v in self.variates[method] if v.predictor is not None}
        out = []
        for predictor in used.values():
            effect, _, known = predictor.effects_of(queries.names, role)
            out.append(np.where(known[:, None], effect, queries.base))
        return out or [queries.base]


@dataclass(frozen=True)
class Crossfit:
    """Pseudo-targets predicted as if unmeasured (K, G): observed, effect, variance, sampling of the observation; df (K,)."""

    queries: Queries
    observed: np.ndarray
    sampling: np.ndarray
    estimate: Estimate
    at: np.ndarray
    folds: np.ndarray


def infer(
    effects: EffectSet,
    locations: LocationSet,
    means: Mapping[str, MeanSet],
    config: InferenceConfig,
    seed: int,
    *,
    select: bool = True,
    drawn: bool = True,
) -> Inference:
    """Learn weights, variances and scores from the pseudo-targets of a fold, for every method and for the stack.

    effects: training perturbations; locations: targets and pseudo-targets over them; means: predictions by method; select: whether to
    calibrate calls; drawn: whether the targets were drawn from the perturbations as the pseudo-targets were. If somebody
    chose them, pseudo-targets are weighted to be located with the targets' confidence.
    """
    screen = Screen.of(effects, config.de_fdr)
    kinds = sorted(set(locations.info["kind"]), reverse=True)
    pseudo = {kind: debias.pseudo_targets(screen, locations, kind, seed) for kind in kinds}
    predictors = {name: Predictor.of(name, m, effects) for name, m in means.items()}
    variates: dict[str, tuple[Variate, ...]] = {name: (Variate(p, "debiased"),) for name, p in predictors.items()}
    joined = [p for name, p in predictors.items() if name not in NOT_STACKED and p.out_of_fold]
    if joined and config.weight == "tuned" and any(len(p.queries) >= debias.MIN_PSEUDO for p in pseudo.values()):
        # Raw predictions alone: a pseudo-target's neighbours are predicted by models that saw its cells, so residuals of
        # neighbours would hold a part of its own effect, which a target's do not.
        forms = [Variate(p, "raw") for p in joined if p.name != "neighbour_mean"]
        variates = {STACKED: (*forms, Variate(None, "raw")), **variates}
    models = {name: debias.fit_kinds(screen, locations, pseudo, v, config) for name, v in variates.items()}
    inference = Inference(screen, locations, pseudo, predictors, variates, models, {}, config)
    if select and config.calls != "t":
        for method in [m for m in SELECTED if m in variates]:
            inference.selectors[method] = fit_selectors(inference, method, seed, drawn)
    return inference


def fit_selectors(inference: Inference, method: str, seed: int, drawn: bool = True) -> dict[str, selection.Selector]:
    """Calibrated calls for every kind of query that has pseudo-targets, by kind; drawn: as in `infer`."""
    config, info = inference.config, inference.locations.info
    out = {}
    for kind, scored in score_pseudo_targets(inference, method, seed).items():
        of_kind = (info["role"] == "target") & (info["status"] == "located") & (info["kind"] == kind)
        confidence = info.loc[of_kind, "confidence"].to_numpy(dtype=np.float32)
        out[kind] = scored.calibrated(config.fdr, config.q, None if drawn else confidence)
    return out


def score_pseudo_targets(inference: Inference, method: str, seed: int) -> dict[str, selection.Scored]:
    """Pseudo-targets scored out of fold, by kind of query."""
    out = {}
    for kind, model in inference.models[method].items():
        pseudo = inference.pseudo[kind]
        if not model.calibrated or int(pseudo.folds.max()) == 0:
            continue
        cross = cross_predictions(inference, method, kind)
        found = cross.estimate
        views = inference.views(method, pseudo.queries, "pseudo")
        x = selection.features(inference.screen, pseudo.queries, found, views, pseudo.at)
        random = rng(seed, "inference", "selection", method, kind)
        labels = inference.screen.labels[pseudo.at]
        agrees = seen_directions(inference.screen, found, cross.observed)
        out[kind] = selection.fit_scores(x, labels, agrees, pseudo.folds, inference.config.max_calibration_pairs, random)
    return out


def seen_directions(screen: Screen, found: Estimate, observed: np.ndarray) -> np.ndarray:
    """Whether observed effects (R, G) show the predicted direction; nothing does where the control is too small to tell.

    All observations share one error of the control mean, so that in a gene they are wrong together: with fewer control cells than
    a perturbation has, that error is as large as their own, and too few genes tell how often it agrees with predictions.
    """
    if control_is_small(screen.effects):
        return np.zeros(observed.shape, dtype=bool)
    return selection.same_direction(found.effect, observed, found.variance + screen.control_sampling, screen.control_sampling)


def control_is_small(effects: EffectSet) -> bool:
    """Whether the control has fewer cells than the typical perturbation."""
    return bool(effects.control_n < np.median(effects.n_cells))


def cross_predictions(inference: Inference, method: str, kind: str = "single") -> Crossfit:
    """Every pseudo-target of a kind predicted without its own cells, its own error or its fold's, but for what all of them tell together in
    a few numbers: the stretch, the tails, and whether there are slopes."""
    pseudo = inference.pseudo[kind]
    found = debias.estimate(inference.models[method][kind], inference.screen, pseudo.queries, "pseudo", pseudo.folds)
    return Crossfit(pseudo.queries, pseudo.observed, pseudo.sampling, found, pseudo.at, pseudo.folds)


@dataclass(frozen=True)
class Result:
    """Targets x genes (R, G) of one method: lfc, se, df, ci_low, ci_high, p_t, q_t, p_selection, q_selection, q_direction, lambda;
    found: the estimate itself; reason (R,): why a target has no calls."""

    targets: pd.Index
    info: pd.DataFrame
    columns: dict[str, np.ndarray]
    call: np.ndarray
    reason: np.ndarray
    found: Estimate | None


def predict(inference: Inference, method: str, queries: Queries, kind: str) -> Result:
    """Estimates, intervals, tests and calls of located targets of one kind."""
    config, screen = inference.config, inference.screen
    found = debias.estimate(inference.models[method][kind], screen, queries, "target")
    extra = 0.0 if config.error_model in PUBLISHED else screen.control_sampling
    se, df, half_width = intervals(inference, method, kind, found, queries, config.error_model, extra)
    half = half_width(config.level)
    p = ttest.p_values(found.effect, *intervals(inference, method, kind, found.without_strength(), queries, config.error_model, extra)[:2])
    values = {
        "lfc": found.effect,
        "se": se,
        "df": df,
        "ci_low": found.effect - half,
        "ci_high": found.effect + half,
        "p_t": p,
        "q_t": ttest.benjamini_hochberg(p),
        "p_selection": np.full(se.shape, np.nan),
        "q_selection": np.full(se.shape, np.nan),
        "q_direction": np.full(se.shape, np.nan),
        "lambda": np.clip(found.weight, 0.0, 1.0),
    }
    selector = inference.selectors.get(method, {}).get(kind)
    if selector is not None:
        x = selection.features(screen, queries, found, inference.views(method, queries, "target"))
        scores = selector.score(x)
        values["p_selection"], values["q_selection"] = selector.p_values(scores), selector.q_values(scores)
        values["q_direction"] = selector.q_directions(scores)
    reason = _reasons(inference, queries, kind, 0.0 if selector is None else selector.min_confidence)
    decides = values["q_t" if selector is None else contracts.TESTS[config.calls]]
    call = np.where(decides <= config.q, np.where(found.effect > 0, "up", "down"), "none")
    call = np.where((found.effect == 0) & (call != "none"), "none", call)
    call = np.where((reason != "")[:, None], "no_call", call)
    return Result(queries.names, queries.info, values, call, reason, found)


PUBLISHED = ("cells_only", "conservative", "ppi_z")


def intervals(
    inference: Inference, method: str, kind: str, found: Estimate, queries: Queries, error_model: str, extra: np.ndarray | float = 0.0
) -> tuple[np.ndarray, np.ndarray, Callable[[float], np.ndarray]]:
    """Standard error (R, G), degrees of freedom (R, G) and half width by level of one error model.

    The standard error is that of the effect about the truth; `extra`: further variance, of the control mean (for lfc) or of an
    observation that the interval is compared with. The published models leave the former out, and so add it only if it is given.
    """
    model, screen = inference.models[method][kind], inference.screen
    if error_model in PUBLISHED:
        base = published.standard_errors(error_model, screen, queries, model, found.noise, found.slope)
        se, df = np.sqrt(base**2 + extra), np.full(base.shape, NORMAL_DF)
    else:
        se, df = np.sqrt(found.variance + extra), found.total_df(extra, inference.config.level)
    # Few pseudo-targets say little of a quantile of their errors: the t has a margin for that.
    if error_model == "conformal" and model.calibrated and len(inference.pseudo[kind].queries) >= debias.MIN_BY_SIZE:
        quantiles = inference.quantiles(method, kind)
        return se, df, lambda level: quantiles.half_width(found.effect, np.sqrt(found.variance), se, level)
    return se, df, lambda level: ttest.quantile(level, df) * se


def _reasons(inference: Inference, queries: Queries, kind: str, min_confidence: float) -> np.ndarray:
    """Why a located target gets no calls, else "" (R,)."""
    reason = np.full(len(queries), "", dtype=object)
    needed = max(min_confidence, inference.config.min_confidence)
    reason[queries.info["confidence"].to_numpy(dtype=np.float32) < needed] = "low_confidence"
    if kind == "additive":
        # K_eff of a sum of located parts says nothing: what counts is how many measured combinations calibrate it.
        if len(inference.pseudo[kind].queries) < debias.MIN_PSEUDO:
            reason[:] = "too_few_measured_combinations"
    else:
        reason[queries.info["k_eff"].to_numpy(dtype=float) < inference.config.min_k_eff] = "few_neighbours"
    return reason


def results(inference: Inference, method: str, targets: pd.Index) -> Iterator[Result]:
    """Results of the targets, in chunks of rows; targets that are not located have empty estimates."""
    info = inference.locations.info.loc[list(targets)]
    located = (info["status"] == "located").to_numpy()
    size = max(1, debias.CHUNK // max(len(inference.screen.effects.genes), 1))
    for kind in sorted(set(info["kind"]), reverse=True):
        names = targets[located & (info["kind"] == kind).to_numpy()]
        for start in range(0, len(names), size):
            part = inference.locations.select(names[start : start + size])
            yield predict(inference, method, Queries.of(inference.screen, part), kind)
    lost = targets[~located]
    if len(lost):
        shape = (len(lost), len(inference.screen.effects.genes))
        empty = {
            name: np.full(shape, np.nan)
            for name in ("lfc", "se", "df", "ci_low", "ci_high", "p_t", "q_t", "p_selection", "q_selection", "q_direction", "lambda")
        }
        reasons = np.array([f"not_locatable: {r}".rstrip(": ") for r in info.loc[lost, "reason"]], dtype=object)
        yield Result(lost, info.loc[lost], empty, np.full(shape, "no_call", dtype=object), reasons, None)


def frame(inference: Inference, method: str, result: Result, fold: str, seed: int) -> pd.DataFrame:
    """Rows of contract `de`."""
    genes, n = inference.screen.effects.genes, len(result.targets)
    size = len(genes)
    control = np.tile(inference.screen.effects.control_mean, n)

    def per_target(column: str) -> np.ndarray:
        return np.repeat(result.info[column].to_numpy(dtype=float), size)

    long = {name: np.asarray(values, dtype=float).ravel() for name, values in result.columns.items()}
    k_eff = np.where(np.isfinite(long["lfc"]), per_target("k_eff"), np.nan)
    return pd.DataFrame(
        {
            "seed": seed,
            "fold": fold,
            "method": method,
            "target": np.repeat(result.targets.to_numpy(dtype=object), size),
            "gene": np.tile(genes.to_numpy(dtype=object), n),
            "estimate": control + long["lfc"],
            "control_mean": control,
            **long,
            "call": np.asarray(result.call, dtype=object).ravel(),
            "reason": np.repeat(result.reason, size),
            "k_eff": k_eff,
            "confidence": np.where(np.isfinite(k_eff), per_target("confidence"), np.nan),
        }
    )


def write_de(
    *,
    effects: str | Path,
    locations: str | Path,
    means: Mapping[str, str | Path],
    config: InferenceConfig,
    fold: str,
    seed: int,
    out: str | Path,
) -> None:
    """Debias every method of a fold and write contract `de`.

    effects, locations: the fold's tables; means: table of predicted means by method name; out: parquet.

    Methods are those given and, with weight `tuned` and pseudo-targets, `stacked`: all predictors but `control` and
    `permuted` as control variates. `stacked` and `dbdiffusion` are called by `config.calls`, the others by the t test
    (what is calibrated is missing for them). Targets that cannot be located keep a row per gene, with call `no_call`.

    Raises UserError when a predictor's genes are not the panel's, or when no target is there to predict.
    """
    measured = EffectSet.read(effects)
    located = LocationSet.read(locations, "all", measured.perturbations)
    predicted = {name: _read_means(name, path, measured) for name, path in means.items()}
    targets = located.queries[(located.info["role"] == "target").to_numpy()]
    if not len(targets):
        raise UserError(
            "no target among the queries", where=str(locations), fix="hold out perturbations (splits) or name some under run.targets"
        )
    if config.calls == "direction" and control_is_small(measured):
        logger.warning(
            "no gene is called: the control has %d cells, fewer than the typical perturbation (%d), too few to tell directions; "
            "take more control cells, or write inference.calls: selection",
            measured.control_n,
            np.median(measured.n_cells),
        )
    inference = infer(measured, located, predicted, config, seed, drawn=fold != ALL)
    tables = [
        frame(inference, method, result, fold, seed) for method in inference.methods for result in results(inference, method, targets)
    ]
    table: Table = contracts.DE
    # The default prediction first, then the generator alone: what a reader looks for.
    order = pd.Index([*SELECTED, *sorted(set(inference.methods) - set(SELECTED))])
    made = pd.concat(tables, ignore_index=True)
    made = made.sort_values(["method", "target", "gene"], key=lambda x: order.get_indexer(x) if x.name == "method" else x)
    table.write(made.reset_index(drop=True), out)
    logger.info("%d targets, %d genes, methods %s", len(targets), len(measured.genes), ", ".join(inference.methods))


def _read_means(name: str, path: str | Path, effects: EffectSet) -> MeanSet:
    means = MeanSet.read(path)
    missing = effects.genes.difference(means.genes)
    if len(missing):
        raise UserError(
            f"means of {name!r} lack {len(missing)} gene(s) of the panel, such as {list(missing[:3])}",
            where=str(path),
            fix="predict the genes of the fold's effects table",
        )
    return means
