"""Where nothing is to be found: control guides as perturbations, effects dealt out anew, and permuted labels of cells."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from scipy import stats

from dbdiffusion.config.inference import InferenceConfig
from dbdiffusion.data.guides import GUIDE_JOIN
from dbdiffusion.data.moments import Moments
from dbdiffusion.data.sets import CONTROL, EffectSet, LocationSet
from dbdiffusion.inference import debias, table, ttest
from dbdiffusion.inference.bands import (
    PER_TARGET,
    POOLED,
    Rows,
    binomial_band,
    fdr_rows,
    quantile_rows,
    ratio_row,
    row,
    thinned,
)
from dbdiffusion.inference.checks_calls import TESTS, called_from, right_calls
from dbdiffusion.inference.debias import Queries
from dbdiffusion.inference.held_out import RATES, Fold, default_method, labels
from dbdiffusion.perturbations.effects import MIN_CELLS, control_weights
from dbdiffusion.runtime.seeds import rng

logger = logging.getLogger(__name__)

MIN_GUIDES = 7
"""Control guides below which none is held out: three as neighbours, three as control, one held out."""
THIN = 25
"""For tests of uniformity, p are thinned to every so many genes, ordered by expression."""
PER_GUIDE = "per guide"


# -- control guides -----------------------------------------------------------------------------------------------------------


def control_guides(moments: Moments, genes: pd.Index, config: InferenceConfig, seed: int) -> Rows:
    """Non-targeting guides as perturbations that do nothing, each held out and predicted from half of the others.

    The other half of the guides is the control. p of the predicted effect should be uniform (value: quantile of p, level:
    quantile expected), also the p of the held-out guide's observed effect under its prediction (`prediction_error`), and
    the t test should call nothing: `control_guides_fdr` is the share of guides with any call. Cells that carry several control
    guides would tell of a guide that is held out: they are left out.
    """
    guides = [g for g in moments.control_guides if g and GUIDE_JOIN not in g and moments.control(guides=[g])[0] >= MIN_CELLS]
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
    model = debias.fit(screen, pseudo, (), 0.0, config.level)
    found = debias.estimate(model, screen, Queries.of(screen, locations.select([held])), "target")
    extra = screen.control_sampling
    null = found.without_strength()
    p = ttest.p_values(found.effect, np.sqrt(null.variance + extra), null.total_df(extra, config.level))
    observed = measured.subset([held])
    error, own = observed.effect - found.effect, debias.sampling_variance(observed)
    return p[0], ttest.p_values(error, np.sqrt(found.variance + own), found.total_df(own, config.level))[0]


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
    thin, varied = thinned(expressed, THIN), expressed > 0
    # Both halvings of the other guides concern the same held-out guide: one of them is a trial.
    trials = p[::2]
    n = trials[:, thin].size
    if not n:
        return []
    rows = quantile_rows("control_guides_p", method, p[:, varied], n)
    rows.append(row("control_guides_ks", method, 0.01, POOLED, float(stats.kstest(trials[:, thin].ravel(), "uniform").pvalue), n))
    for q in RATES:
        any_call = (ttest.benjamini_hochberg(trials[:, varied]) <= q).any(1)
        band = binomial_band(int(any_call.sum()), len(any_call))
        rows.append(row("control_guides_fdr", method, q, PER_GUIDE, float(any_call.mean()), len(any_call), *band))
    return rows


# -- effects dealt out anew ---------------------------------------------------------------------------------------------------


def shuffled_effects(folds: Sequence[Fold], config: InferenceConfig, seed: int) -> Rows:
    """Inference run again with the training perturbations' effects dealt out to other perturbations.

    Location and predictors then say nothing about any effect, while effects, their distribution and the calibration set stay as
    they are. The calls made on the targets are judged by the targets' own cells as in `fdr`, those of `direction` by twice the
    wrong signs: a valid procedure makes (almost) none, and keeps its rate if it does.
    """
    made: dict[str, list] = {test: [] for test in TESTS}
    for fold in folds:
        effects = fold.inference.screen.effects
        order = rng(seed, "permutation", fold.name).permutation(len(effects.perturbations))
        values = {name: getattr(effects, name)[order] for name in ("mean", "effect", "se", "variance", "n_cells")}
        means = {name: p.means for name, p in fold.inference.predictors.items()}
        again = table.infer(replace(effects, **values), fold.inference.locations, means, config, seed)
        truth = labels(fold.whole, config.de_fdr)
        for test, found in called_from(fold, again, fold.default).items():
            made[test].append((found, truth))
    rows: Rows = []
    for q in RATES:
        for test, parts in made.items():
            if parts:
                called = [found.q <= q for found, _ in parts]
                right = [right_calls(test, found, q, truth) for found, truth in parts]
                calls = np.concatenate([c.sum(1) for c in called])
                rows += fdr_rows("shuffled_effects_fdr", test, q, calls, np.concatenate(right))
                rows.append(share_called("shuffled_effects_calls", test, q, called))
    return rows


def share_called(check: str, method: str, q: float, called: Sequence[np.ndarray]) -> dict:
    """Share of pairs (T, G) of all folds that are called."""
    calls, genes = (np.concatenate(part) for part in zip(*((c.sum(1), np.full(len(c), c.shape[1])) for c in called), strict=True))
    return ratio_row(check, method, q, calls, genes)


# -- permuted labels ----------------------------------------------------------------------------------------------------------


def permuted_labels(de: pd.DataFrame) -> Rows:
    """Calls and p of a whole chain that was run on permuted labels, where no perturbation has an effect.

    de: contract `de` of that chain. `permuted_labels_calls`: share of pairs called; `permuted_labels_targets`: share of targets
    with any call; `permuted_labels_p`: quantiles of the t test's p; `permuted_labels_ks`: p of the Kolmogorov-Smirnov test
    against p that are smaller than uniform, one target a gene and thinned over genes, since targets share their control and most
    of their prediction. Larger p are no fault: the standard error of a prediction is that of its distance to the target's own
    effect, and predictions of no effect are shrunk.
    """
    text = {name: de[name].astype(str) for name in ("method", "target", "gene", "call")}
    own = (text["method"] == default_method(sorted(set(text["method"])))).to_numpy()
    part = de[own].assign(**{name: values[own] for name, values in text.items()})
    part = part[part["lfc"].notna()]
    if part.empty:
        logger.info("permuted labels: no target could be located, check left out")
        return []
    wide = {c: part.pivot(index="target", columns="gene", values=c) for c in ("p_t", "call", "control_mean", *TESTS.values())}
    silent = (wide["call"] == "no_call").to_numpy()
    rows: Rows = []
    for test, column in TESTS.items():
        values = wide[column].to_numpy(dtype=float)
        for q in RATES if np.isfinite(values).any() else ():
            called = ~silent & (values <= q)
            rows.append(share_called("permuted_labels_calls", test, q, [called]))
            some = called.any(1)
            band = binomial_band(int(some.sum()), len(some))
            rows.append(row("permuted_labels_targets", test, q, PER_TARGET, float(some.mean()), len(some), *band))
    p, expression = wide["p_t"].to_numpy(dtype=float), wide["control_mean"].iloc[0].to_numpy(dtype=float)
    genes = thinned(expression, THIN)
    alone = p[np.arange(len(genes)) % len(p), genes]
    if alone.size:
        rows += quantile_rows("permuted_labels_p", "t", p[:, expression > 0], alone.size)
        value = float(stats.kstest(alone, "uniform", alternative="greater").pvalue)
        rows.append(row("permuted_labels_ks", "t", 0.01, "smaller than uniform", value, alone.size))
    return rows
