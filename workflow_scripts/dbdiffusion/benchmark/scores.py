"""Scores of every method on the held-out perturbations of a fold, and their summary over perturbations.

Methods are scored as they predict (`debiased` False) and after debiasing (True, the estimate of the DE table). Beside each score
stand the replicate ceiling (half A as a predictor of half B) and the training mean's score. Rows of method `replicate` repeat the
ceiling as a method. Predicted effects are differences to the control mean of all control cells, which is what predictors were given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from dbdiffusion.benchmark import distribution, metrics
from dbdiffusion.benchmark.ceilings import Truth, held_out
from dbdiffusion.config.benchmark import BenchmarkConfig
from dbdiffusion.data.moments import Moments
from dbdiffusion.data.normalise import load_expression
from dbdiffusion.data.sets import CONTROL, EffectSet, LocationSet, MeanSet
from dbdiffusion.data.splits import Splits
from dbdiffusion.runtime import contracts
from dbdiffusion.runtime.errors import UserError
from dbdiffusion.runtime.seeds import derive_seed, rng
from dbdiffusion.runtime.tables import Table

GENERATOR = "dbdiffusion"
REPLICATE = "replicate"
POOL_CELLS = 30000
"""Training cells that stand in for a target's cells (`training_mean`, `neighbour_mean`)."""
TARGET_CELLS = 60000
"""Held-out cells of a fold that are read for distribution scores."""
AXES_CELLS = 5000
"""Training cells, and control cells, that the fixed PCA is fitted on."""
SAMPLE_CELLS = 300
"""Cells of a sample in distribution scores: distances between cells grow with its square."""
BLOCK_CELLS = 4096
"""Generated cells that are read at once."""

Scores = dict[tuple[str, str], np.ndarray]
"""(metric, genes) -> (T,) values."""


@dataclass(frozen=True)
class Fold:
    """What all methods of a fold share."""

    truth: Truth
    effects: EffectSet
    config: BenchmarkConfig
    name: str
    seed: int

    @property
    def reference(self) -> np.ndarray:
        """(G,) mean effect of the training perturbations: the training mean, and the origin of the Systema metric."""
        return self.effects.effect.mean(axis=0)


def score_effects(predicted: np.ndarray, fold: Fold) -> Scores:
    """Per-gene metrics of predicted effects (T, G; NaN where nothing is predicted) on every gene set, and the spread."""
    truth, out = fold.truth, {}
    for label, where in fold.truth.gene_sets(fold.config.top_genes).items():
        values = metrics.effect_scores(
            predicted=predicted, observed=truth.observed, where=where, reference=fold.reference, weights=np.abs(truth.replicate)
        )
        out |= {(metric, label): value for metric, value in values.items()}
    out["spread", "all"] = metrics.spread(predicted=predicted, observed=truth.observed, replicate=truth.replicate)
    out["de_average_precision", "all"] = metrics.de_average_precision(
        predicted=predicted, true=truth.observed_calls, where=np.isfinite(predicted)
    )
    return out


def _predicted(means: MeanSet, fold: Fold) -> np.ndarray:
    """(T, G) predicted effects of the targets on the panel; NaN where a target or gene is not predicted."""
    truth = fold.truth
    rows, columns = means.rows(truth.targets), means.genes.get_indexer(truth.genes)
    values = means.mean[rows][:, columns] - fold.effects.control_mean
    return np.where((rows >= 0)[:, None] & (columns >= 0), values, np.nan)


def _wide(table: pd.DataFrame, column: str, truth: Truth) -> np.ndarray:
    """A column of the DE table of one method as (T, G); NaN where there is no row."""
    rows, columns = truth.targets.get_indexer(table["target"].astype(str)), truth.genes.get_indexer(table["gene"].astype(str))
    keep = (rows >= 0) & (columns >= 0)
    out = np.full(truth.observed.shape, np.nan)
    out[rows[keep], columns[keep]] = table[column].to_numpy(dtype=float)[keep]
    return out


def score_table(table: pd.DataFrame, fold: Fold) -> Scores:
    """Scores of one method's debiased estimates and of its calls; `no_call` counts as not called, so abstaining costs recall."""
    out = score_effects(_wide(table, "estimate", fold.truth) - fold.effects.control_mean, fold)
    signs = table.assign(sign=table["call"].astype(str).map({"up": 1.0, "down": -1.0}))
    return out | _call_scores(np.nan_to_num(_wide(signs, "sign", fold.truth)).astype(int), fold)


def _call_scores(calls: np.ndarray, fold: Fold) -> Scores:
    values = metrics.de_scores(called=calls, true=fold.truth.observed_calls)
    return {(metric, "all"): value for metric, value in values.items()}


@dataclass(frozen=True)
class Pool:
    """Cells (n x G genes, sparse, ln(1 + CP10k)) with their perturbation and half, in the order of the file."""

    values: sparse.csr_matrix
    perturbation: np.ndarray
    half: np.ndarray

    @classmethod
    def load(cls, cells: str | Path, names: list[str], genes: pd.Index, splits: Splits, *, limit: int, seed: int) -> Pool:
        found = load_expression(cells, perturbations=names, genes=genes, halves=splits.halves, max_cells=limit, seed=seed)
        return cls(found.values, found.obs["perturbation"].to_numpy(), found.obs["half"].to_numpy())

    def draw(self, rows: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
        """(m, G) at most `count` of the cells `rows`, without replacement."""
        chosen = np.sort(random.choice(rows, count, replace=False)) if len(rows) > count else rows
        return self.values[chosen].toarray().astype(float)

    def draw_weighted(self, weights: pd.Series, count: int, random: np.random.Generator) -> np.ndarray:
        """(m, G) cells drawn with replacement, perturbations in proportion to `weights`; of all cells alike where none has weight."""
        share = weights / pd.Series(self.perturbation).value_counts().reindex(weights.index)
        chance = share.reindex(self.perturbation).fillna(0.0).to_numpy()
        chance = chance if chance.sum() > 0 else np.ones(len(chance))
        return self.values[np.sort(random.choice(len(chance), count, p=chance / chance.sum()))].toarray().astype(float)


def read_generated(path: str | Path, genes: pd.Index | None = None, perturbations: Iterable[str] | None = None) -> Pool:
    """Generated cells of these perturbations on these genes (default: all, in the order of the file).

    Raises UserError when a gene is absent.
    """
    import anndata

    table = anndata.read_h5ad(path, backed="r")
    with closing(table.file):
        found = pd.Index(table.var_names.astype(str))
        genes = found if genes is None else genes
        columns = found.get_indexer(genes)
        if (columns < 0).any():
            raise UserError(
                f"gene {genes[columns < 0][0]!r} of the panel is absent", where=str(path), fix="generate from the same effects table"
            )
        label = table.obs["perturbation"].astype(str).to_numpy()
        keep = np.ones(len(label), bool) if perturbations is None else np.isin(label, list(perturbations))
        # In blocks: the cells of all perturbations, dense as they are stored, need not fit in memory.
        blocks = [slice(first, first + BLOCK_CELLS) for first in range(0, len(label), BLOCK_CELLS)]
        values = sparse.vstack([sparse.csr_matrix(table.X[at][keep[at]][:, columns]) for at in blocks], format="csr")
    return Pool(values, label[keep], np.full(keep.sum(), ""))


def _neighbour_weights(locations: LocationSet, target: str) -> pd.Series:
    """Positive location weights of a target over training perturbations; the control of additive locations has no cells to lend."""
    at = locations.queries.get_indexer([target])[0]
    weights = np.clip(locations.weights[at], 0.0, None) if at >= 0 else np.zeros(len(locations.neighbours))
    return pd.Series(weights, index=locations.neighbours).drop(CONTROL)


def score_cells(*, cells: str | Path, splits: Splits, generated: str | Path, locations: LocationSet, fold: Fold) -> dict[str, Scores]:
    """Distribution scores by method against half B, in one PCA fitted on training and control cells.

    Methods: the generator; measured cells as they are, of the control (`control`), of all training perturbations
    (`training_mean`) and of the target's neighbours by weight (`neighbour_mean`); `replicate`, half A. Samples of a target have
    equally many cells where there are enough.
    """
    targets, genes, seed = fold.truth.targets, fold.truth.genes, fold.seed

    def load(names: list[str], limit: int) -> Pool:
        return Pool.load(cells, names, genes, splits, limit=limit, seed=derive_seed(seed, "benchmark", "cells", *names[:1]))

    pool, controls, held = load(splits.training(fold.name), POOL_CELLS), load([CONTROL], AXES_CELLS), load(list(targets), TARGET_CELLS)
    synthetic = read_generated(generated, genes, targets)
    random = rng(seed, "benchmark", "axes", fold.name)
    anywhere, base = (source.draw(random.permutation(len(source.half)), AXES_CELLS, random) for source in (pool, controls))
    axes = distribution.fit_axes(np.vstack([anywhere, base]), fold.config.distribution_components)
    # Shuffled: the bandwidth is taken from the first cells, and cells lie by batch in many files.
    bandwidth = distribution.median_bandwidth(axes.project(random.permutation(base)))
    found: dict[str, list[dict[str, float]]] = {}
    for target in targets:
        draws = rng(seed, "benchmark", "distribution", fold.name, target)
        half_a, half_b = (np.flatnonzero((held.perturbation == target) & (held.half == half)) for half in ("A", "B"))
        own = np.flatnonzero(synthetic.perturbation == target)
        # A target that could not be located has no generated cells: the other methods are compared without it.
        count = min(len(half_a), len(half_b), len(own) or SAMPLE_CELLS, SAMPLE_CELLS)
        observed = held.draw(half_b, count, draws)
        samples = {
            GENERATOR: synthetic.draw(own, count, draws),
            "control": controls.draw(np.arange(len(controls.half)), count, draws),
            "training_mean": pool.draw(np.arange(len(pool.half)), count, draws),
            "neighbour_mean": pool.draw_weighted(_neighbour_weights(locations, target), count, draws),
            REPLICATE: held.draw(half_a, count, draws),
        }
        for name, sample in samples.items():
            scores = distribution.compare(sample, observed, axes=axes, bandwidth=bandwidth, seed=derive_seed(seed, "auc", name, target))
            found.setdefault(name, []).append(scores)
    whole = {name: distribution.pooled(rows) for name, rows in found.items()}
    return {name: {(metric, "all"): np.array([row[metric] for row in rows]) for metric in rows[0]} for name, rows in whole.items()}


def _rows(scores: Scores, method: str, debiased: bool, fold: Fold, ceiling: Scores, baseline: Scores) -> list[pd.DataFrame]:
    missing = np.full(len(fold.truth.targets), np.nan)
    return [
        pd.DataFrame(
            {
                "seed": fold.seed,
                "fold": fold.name,
                "method": method,
                "debiased": debiased,
                "target": fold.truth.targets.to_numpy(dtype=object),
                "metric": metric,
                "genes": label,
                "value": value,
                "ceiling": ceiling.get((metric, label), missing),
                "baseline": baseline.get((metric, label), missing),
            }
        )
        for (metric, label), value in sorted(scores.items())
    ]


def _empty(table: Table) -> pd.DataFrame:
    kinds = {"str": object, "int": "int64", "float": float, "bool": bool}
    return pd.DataFrame({column.name: pd.Series(dtype=kinds[column.kind]) for column in table.columns})


def score_fold(
    fold: Fold,
    *,
    means: Mapping[str, MeanSet],
    de: pd.DataFrame,
    cells: str | Path,
    splits: Splits,
    locations: LocationSet,
    generated: str | Path | None,
) -> pd.DataFrame:
    """Rows of contract `scores` for one fold."""
    truth = fold.truth
    if truth.targets.empty:
        return _empty(contracts.SCORES)
    raw = {name: score_effects(_predicted(table, fold), fold) for name, table in means.items()}
    debiased = {str(name): score_table(table, fold) for name, table in de.groupby("method", observed=True, sort=True)}
    ceiling = score_effects(truth.replicate, fold) | _call_scores(truth.replicate_calls, fold)
    # From the effects, not from a method's file: the paired baseline is there whichever baselines are configured.
    baseline = score_effects(np.tile(fold.reference, (len(truth.targets), 1)), fold)
    # Only calls need the debiased one: all other scores are against what the training mean predicts.
    calls = {key: value for key, value in debiased.get("training_mean", {}).items() if key not in baseline and key[0].startswith("de_")}
    if generated is not None:
        by_cells = score_cells(cells=cells, splits=splits, generated=generated, locations=locations, fold=fold)
        ceiling |= by_cells.pop(REPLICATE)
        baseline |= by_cells["training_mean"]
        for name, values in by_cells.items():
            raw[name] = raw.get(name, {}) | values
    rows = _rows(ceiling, REPLICATE, False, fold, ceiling, baseline | calls)
    for name in sorted(raw):
        rows += _rows(raw[name], name, False, fold, ceiling, baseline)
    for name in sorted(debiased):
        rows += _rows(debiased[name], name, True, fold, ceiling, baseline | calls)
    return pd.concat(rows, ignore_index=True)


def write_scores(
    *,
    splits: str | Path,
    moments: str | Path,
    cells: str | Path,
    effects: str | Path,
    locations: str | Path,
    means: Mapping[str, str | Path],
    de: str | Path,
    generated: str | Path | None,
    fold: str,
    seed: int,
    config: BenchmarkConfig,
    out: str | Path,
) -> None:
    """Write contract `scores` of one fold; an empty table where no target is measured (predictions of what nobody measured).

    means: method -> means.parquet; de: the fold's DE table of all methods; generated: the generator's cells, or none without.
    locations: whose cells stand in for a target in the distribution scores of `neighbour_mean`.
    """
    measured, structure, sums = EffectSet.read(effects), Splits.read(splits), Moments.read(moments)
    truth = Truth.measure(sums, held_out(structure, sums, fold), measured.genes)
    table = score_fold(
        Fold(truth, measured, config, fold, seed),
        means={name: MeanSet.read(path) for name, path in means.items()},
        de=contracts.DE.read(de),
        cells=cells,
        splits=structure,
        locations=LocationSet.read(locations, "all", measured.perturbations),
        generated=generated,
    )
    contracts.SCORES.write(table, out)


def _bootstrap(values: np.ndarray, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """2.5 and 97.5 % points of resampled means of each column of values (T, C; NaN left out), shares (R, T) of each resample."""
    present = np.isfinite(values)
    weight = shares @ present
    means = np.divide(shares @ np.where(present, values, 0.0), weight, out=np.full(weight.shape, np.nan), where=weight > 0)
    low, high = np.full((2, values.shape[1]), np.nan)
    drawn = np.flatnonzero(present.any(axis=0))
    if len(drawn):
        low[drawn], high[drawn] = np.nanquantile(means[:, drawn], [0.025, 0.975], axis=0)
    return low, high


def summarise(scores: pd.DataFrame, *, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Mean over targets of each method, metric and gene set, with 95 % percentile intervals from a bootstrap over perturbations.

    Columns: method, debiased, metric, genes, n (targets with a score), mean, low, high, ceiling and baseline (their means over the same
    targets), difference (mean of score - training mean's score, paired by target), difference_low, difference_high.
    A target that was scored under several seeds counts once, with its mean. The same resamples serve all rows. Missing scores are left out.
    """
    group = ["method", "debiased", "metric", "genes"]
    columns = [*group, "n", "mean", "low", "high", "ceiling", "baseline", "difference", "difference_low", "difference_high"]
    if scores.empty:
        return pd.DataFrame(columns=columns)
    text = dict.fromkeys(("method", "metric", "genes", "target"), str)
    known = scores[scores["value"].notna()].astype(text).assign(difference=lambda table: table["value"] - table["baseline"])
    per_target = known.groupby([*group, "target"], sort=True)[["value", "ceiling", "baseline", "difference"]].mean()
    groups = per_target.groupby(level=group, sort=True)
    out = groups["value"].agg(n="size", mean="mean").join(groups[["ceiling", "baseline", "difference"]].mean())
    targets = sorted(known["target"].unique())
    draws = rng(seed, "benchmark", "bootstrap").integers(len(targets), size=(resamples, len(targets)))
    shares = np.stack([np.bincount(draw, minlength=len(targets)) for draw in draws]).astype(float)
    for column, low, high in (("value", "low", "high"), ("difference", "difference_low", "difference_high")):
        wide = per_target[column].unstack("target").reindex(index=out.index, columns=targets)
        out[low], out[high] = _bootstrap(wide.to_numpy(dtype=float).T, shares)
    return out.reset_index()[columns]
