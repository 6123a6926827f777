"""Generated cells against measured cells, for perturbations the generator has seen and for held-out ones, beside the replicate.

Held-out perturbations are compared with half B of cells that no model of the fold has read. Seen ones are compared with half B, too, but
their models were trained on the cells of both halves: the split holds out perturbations, not cells of a training perturbation, so values of
seen perturbations say how well the generator reproduces what it learned from. (tests/benchmarks holds out cells of seen perturbations.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from dbdiffusion.benchmark import distribution, metrics
from dbdiffusion.benchmark.ceilings import Truth, held_out
from dbdiffusion.benchmark.scores import AXES_CELLS, SAMPLE_CELLS, Pool, read_generated
from dbdiffusion.config.benchmark import BenchmarkConfig
from dbdiffusion.data.moments import Moments
from dbdiffusion.data.sets import CONTROL, EffectSet, MeanSet
from dbdiffusion.data.splits import Splits
from dbdiffusion.runtime import contracts
from dbdiffusion.runtime.seeds import derive_seed, rng

SAMPLES = ("generated", "control", "replicate")
READ_CELLS = 60000
"""Cells of the compared perturbations that are read at most."""


@dataclass(frozen=True)
class Made:
    """What one model made of some perturbations: its cells, and effects (P, G) against the control it made itself."""

    role: str
    names: list[str]
    cells: Pool
    effects: np.ndarray

    @classmethod
    def read(cls, generated: str | Path, means: str | Path, role: str, names: Sequence[str], genes: pd.Index) -> Made:
        made = MeanSet.read(means)
        kept = [name for name in names if name in made.perturbations]
        columns = made.genes.get_indexer(genes)
        control = made.mean[made.rows([CONTROL])[0], columns]
        return cls(role, kept, read_generated(generated, genes, kept), made.mean[made.rows(kept)][:, columns] - control)


def seen_by(means: Sequence[str | Path], among: set[str]) -> list[list[str]]:
    """For each model, the seen perturbations with cells of its own that no model before it has."""
    out, taken = [], set()
    for path in means:
        made = MeanSet.read(path)
        names = [str(n) for n, r in zip(made.perturbations, made.roles, strict=True) if r == "train" and n in among and n not in taken]
        taken |= set(names)
        out.append(names)
    return out


def compared(made: Made, held: Pool, controls: Pool, axes: distribution.Axes, bandwidth: float, seed: int) -> list[tuple]:
    """Rows (role, perturbation, sample, metric, value) of the two-sample scores against half B; equally many cells in all samples."""
    found: dict[str, list[dict[str, float]]] = {sample: [] for sample in SAMPLES}
    for name in made.names:
        draws = rng(seed, "benchmark", "cell quality", made.role, name)
        half_a, half_b = (np.flatnonzero((held.perturbation == name) & (held.half == half)) for half in ("A", "B"))
        own = np.flatnonzero(made.cells.perturbation == name)
        count = min(len(half_a), len(half_b), len(own), SAMPLE_CELLS)
        observed = held.draw(half_b, count, draws)
        samples = (
            made.cells.draw(own, count, draws),
            controls.draw(np.flatnonzero(controls.half == "B"), count, draws),
            held.draw(half_a, count, draws),
        )
        for sample, cells in zip(SAMPLES, samples, strict=True):
            one = derive_seed(seed, "cell quality auc", sample, name)
            found[sample].append(distribution.compare(cells, observed, axes=axes, bandwidth=bandwidth, seed=one))
    return [
        (made.role, name, sample, metric, value)
        for sample, rows in found.items()
        for name, scores in zip(made.names, distribution.pooled(rows), strict=True)
        for metric, value in scores.items()
    ]


def effect_rows(parts: list[Made], moments: Moments, genes: pd.Index) -> list[tuple]:
    """Rows of effect slope and spread of the perturbations of one role, over all models that made them."""
    names = [name for made in parts for name in made.names]
    if not names:
        return []
    truth, generated = Truth.measure(moments, names, genes), np.vstack([made.effects for made in parts])
    rows = []
    for sample, effects in zip(SAMPLES, (generated, np.zeros_like(generated), truth.replicate), strict=True):
        values = {
            "effect_slope": distribution.effect_slope(effects, observed=truth.observed, replicate=truth.replicate),
            "spread": metrics.spread(predicted=effects, observed=truth.observed, replicate=truth.replicate),
        }
        rows += [(parts[0].role, n, sample, metric, v) for metric, each in values.items() for n, v in zip(names, each, strict=True)]
    return rows


def write_cell_quality(
    *,
    cells: str | Path,
    splits: str | Path,
    moments: str | Path,
    effects: str | Path,
    generated: str | Path,
    means: str | Path,
    seen_generated: Sequence[str | Path],
    seen_means: Sequence[str | Path],
    fold: str,
    seed: int,
    config: BenchmarkConfig,
    out: str | Path,
) -> None:
    """Write contract `cell_quality` of one fold.

    generated, means: merged models, for held-out perturbations; seen_generated, seen_means: each model's own, for those it was trained on.
    The PCA is learned from half A of the control and the training cells of perturbations that are not compared: axes fit the cells they
    are learned from better than others, which would count as a difference.
    """
    genes, split, sums = EffectSet.read(effects).genes, Splits.read(splits), Moments.read(moments)
    cells_of = sums.groups.groupby(["perturbation", "half"], observed=True)["n_cells"].sum().unstack(fill_value=0)
    halved = set(cells_of.index[(cells_of.reindex(columns=["A", "B"], fill_value=0) >= 2).all(axis=1)])
    seen_names = seen_by(seen_means, halved)
    made = {
        "seen": [
            Made.read(g, m, "seen", names, genes) for g, m, names in zip(seen_generated, seen_means, seen_names, strict=True) if names
        ],
        "unseen": [Made.read(generated, means, "unseen", held_out(split, sums, fold), genes)],
    }
    names = sorted({name for parts in made.values() for part in parts for name in part.names})

    def load(which: list[str], limit: int) -> Pool:
        return Pool.load(cells, which, genes, split, limit=limit, seed=derive_seed(seed, "cell quality", *which[:1]))

    rest = [name for name in split.training(fold) if name not in set(names)]
    controls, held = load([CONTROL], AXES_CELLS), load(names or [CONTROL], READ_CELLS)
    base = controls.draw(np.flatnonzero(controls.half == "A"), AXES_CELLS, rng(seed, "benchmark", "cell quality", "axes"))
    axes = distribution.fit_axes(
        np.vstack([base, load(rest, AXES_CELLS).values.toarray()]) if rest else base, config.distribution_components
    )
    bandwidth = distribution.median_bandwidth(axes.project(rng(seed, "benchmark", "cell quality").permutation(base)))
    rows = []
    for parts in made.values():
        for part in parts:
            rows += compared(part, held, controls, axes, bandwidth, seed)
        rows += effect_rows(parts, sums, genes)
    table = pd.DataFrame(rows, columns=["role", "perturbation", "sample", "metric", "value"]).astype({"value": float})
    contracts.CELL_QUALITY.write(table.assign(seed=seed, fold=fold)[[c.name for c in contracts.CELL_QUALITY.columns]], out)
