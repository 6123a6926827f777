"""The calibration study: coverage, false discovery rate and power over many simulated screens.

python -m dbdiffusion.inference.study OUT.parquet [--screens 50] [--workers 2] [--scratch FOLDER]
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

from dbdiffusion.config.inference import InferenceConfig
from dbdiffusion.inference import debias, table, ttest
from dbdiffusion.inference.debias import Queries
from dbdiffusion.inference.simulate import DIFFICULTIES, Simulated, simulate
from dbdiffusion.runtime.files import atomic_path
from dbdiffusion.runtime.progress import Progress
from dbdiffusion.runtime.seeds import rng

logger = logging.getLogger(__name__)

PERTURBATIONS = (30, 100, 300)
GENERATORS = ("informative", "useless")
LEVELS = (0.5, 0.8, 0.9, 0.95)
RATES = (0.05, 0.1, 0.2)
ERROR_MODELS = ("t", "conformal", "cells_only", "conservative", "ppi_z")
CELL = ["difficulty", "perturbations", "generator"]
CHUNK = 5
"""Screens of one cell that are run, and saved, together."""
MEASURES = (
    "coverage",
    "coverage_outside",
    "coverage_strongest",
    "coverage_observed",
    "width",
    "fdr",
    "fdr_target",
    "fdr_outside",
    "power",
    "power_replicate",
    "power_ceiling",
    "calls",
    "mse_ratio",
)


@dataclass(frozen=True)
class Chunk:
    """Some screens of one cell of the study."""

    difficulty: str
    perturbations: int
    generator: str
    first: int
    count: int
    seed: int

    def path(self, scratch: Path) -> Path:
        name = f"{self.difficulty}-{self.perturbations}-{self.generator}-seed{self.seed}-{self.first}-{self.count}.parquet"
        return scratch / name


def screen_rows(screen: Simulated, config: InferenceConfig, seed: int) -> list[dict]:
    """Measures of one screen: intervals of the default prediction by error model and level, calls by test and rate.

    coverage: share of (target, gene) pairs whose interval of lfc holds the true effect, coverage_outside: the same of targets outside
    every programme, coverage_strongest: of each target's genes of strongest predicted effect; width: its mean width. Nine genes in ten
    do not change at all and are hardly ever missed, so that coverage says little of the others; coverage_observed is what can be seen
    on real data, the share of experiment B's effects that lie in an interval widened by their sampling error. Calls are judged by
    experiment B of each target (same size as the screen's others), those of `direction` by the sign of the true effect, but for power.
    fdr: false among all calls on the screen's targets (0 without calls), fdr_target: mean over targets of the false share of their
    calls, fdr_outside: fdr_target of targets outside every programme; power: share of B's calls found, power_replicate: by experiment A
    at the same rate; power_ceiling: by the typical effects of the targets' programmes, if they were known, cut where the false share is
    q in truth: what no location can exceed where the generator knows nothing. mse_ratio (method rows): mean squared error over that of
    the neighbour mean.
    """
    inference = table.infer(screen.effects, screen.locations, screen.means, config, seed, select=False)
    queries = Queries.of(inference.screen, screen.locations.select(screen.targets))
    return [
        *_interval_rows(screen, inference, queries),
        *_call_rows(screen, inference, queries, seed),
        *_error_rows(screen, inference, queries),
    ]


def _interval_rows(screen: Simulated, inference: table.Inference, queries: Queries) -> Iterable[dict]:
    found = debias.estimate(inference.models[table.STACKED]["single"], inference.screen, queries, "target")
    error, strongest = np.abs(found.effect - screen.truth), debias.strongest(found.effect)
    seen = screen.experiments[1]
    gap, seen_error = np.abs(found.effect - seen.effect), debias.sampling_variance(seen) + seen.control_variance / seen.control_n
    for model in ERROR_MODELS:
        extra = 0.0 if model in table.PUBLISHED else inference.screen.control_sampling
        half_width, wider = (
            table.intervals(inference, table.STACKED, "single", found, queries, model, more)[2] for more in (extra, extra + seen_error)
        )
        for level in LEVELS:
            half = half_width(level)
            inside = error <= half
            yield {
                "error_model": model,
                "level": level,
                "coverage": inside.mean(),
                "coverage_outside": inside[screen.outside].mean(),
                "coverage_strongest": inside[strongest].mean(),
                "coverage_observed": (gap <= wider(level)).mean(),
                "width": 2 * half.mean(),
            }


def _call_rows(screen: Simulated, inference: table.Inference, queries: Queries, seed: int) -> Iterable[dict]:
    fdr = inference.config.de_fdr
    one, two = screen.experiments
    truth = ttest.de_labels(two.effect, two.se, two.n_cells, fdr)
    by_test = {}
    scored = table.score_pseudo_targets(inference, table.STACKED, seed)
    ideal = np.abs(screen.shared) / np.median(inference.screen.effects.se, axis=0)
    for unit, name in (("pooled", "selection"), ("target", "selection_target")):
        selectors = {kind: s.calibrated(unit, inference.config.q) for kind, s in scored.items()}
        variant = replace(inference, selectors={table.STACKED: selectors})
        result = table.predict(variant, table.STACKED, queries, "single")
        silent = (result.reason != "")[:, None]
        by_test[name] = np.where(silent, 1.0, result.columns["q_selection"])
    # Neither depends on what selection aims to hold.
    by_test |= {test: np.where(silent, 1.0, result.columns[f"q_{test}"]) for test in ("t", "direction")}
    turned = result.columns["lfc"] * screen.truth <= 0
    for q in RATES:
        replicate = ttest.de_labels(one.effect, one.se, one.n_cells, q)
        for test, values in by_test.items():
            powers = {"power_replicate": _power(replicate, truth), "power_ceiling": _power(best_calls(ideal, truth, q), truth)}
            called = values <= q
            false = called & (turned if test == "direction" else ~truth)
            yield {"error_model": test, "q": q, **_judged(called, false, truth, screen.outside), **powers}


def best_calls(score: np.ndarray, truth: np.ndarray, q: float) -> np.ndarray:
    """The most calls (R, G) in the order of a score whose false share is at most q; nothing is called where the score is 0."""
    order = np.argsort(-score, axis=None, kind="stable")
    order = order[score.ravel()[order] > 0]
    share = np.cumsum(~truth.ravel()[order]) / np.arange(1, len(order) + 1)
    allowed = np.flatnonzero(share <= q)
    called = np.zeros(truth.shape, dtype=bool)
    called.ravel()[order[: allowed[-1] + 1 if len(allowed) else 0]] = True
    return called


def _power(called: np.ndarray, truth: np.ndarray) -> float:
    return float((called & truth).sum() / truth.sum()) if truth.any() else np.nan


def _judged(called: np.ndarray, false: np.ndarray, truth: np.ndarray, outside: np.ndarray) -> dict[str, float]:
    count = called.sum(1)
    share = false.sum(1) / np.maximum(count, 1)
    return {
        "fdr": float(false.sum() / max(count.sum(), 1)),
        "fdr_target": float(share.mean()),
        "fdr_outside": float(share[outside].mean()),
        "power": _power(called, truth),
        "calls": float(count.mean()),
    }


def _error_rows(screen: Simulated, inference: table.Inference, queries: Queries) -> Iterable[dict]:
    base = ((queries.base - screen.truth) ** 2).mean()
    for method in inference.methods:
        found = debias.estimate(inference.models[method]["single"], inference.screen, queries, "target")
        yield {"error_model": f"estimate:{method}", "mse_ratio": float(((found.effect - screen.truth) ** 2).mean() / base)}


def run_chunk(chunk: Chunk, scratch: str, config: InferenceConfig) -> str:
    """Run the screens of a chunk unless its file is there; returns the file."""
    path = chunk.path(Path(scratch))
    if path.exists():
        return str(path)
    rows = []
    with threadpool_limits(1):
        for index in range(chunk.first, chunk.first + chunk.count):
            random = rng(chunk.seed, "study", chunk.difficulty, chunk.perturbations, chunk.generator, index)
            sizes = {"difficulty": chunk.difficulty, "perturbations": chunk.perturbations, "generator": chunk.generator}
            screen = simulate(random, **sizes)
            rows += [{**sizes, "screen": index, **row} for row in screen_rows(screen, config, chunk.seed)]
    with atomic_path(path) as temporary:
        pd.DataFrame(rows).to_parquet(temporary, index=False)
    return str(path)


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over screens with 95 % bands (screens are the unit): one row per cell, error model or test, and level or rate."""
    keys = [*CELL, "error_model", "level", "q"]
    rows = rows.reindex(columns=[*keys, "screen", *MEASURES])
    grouped = rows.groupby(keys, dropna=False, sort=True)
    out = grouped[list(MEASURES)].mean()
    out["screens"] = grouped["screen"].nunique()
    half = 1.96 * grouped[list(MEASURES)].std(ddof=1).div(np.sqrt(grouped[list(MEASURES)].count()))
    for name in MEASURES:
        if name in ("calls", "mse_ratio", "width"):
            low, high = out[name] - half[name], out[name] + half[name]
        else:
            low, high = (out[name] - half[name]).clip(lower=0), (out[name] + half[name]).clip(upper=1)
        out[f"{name}_low"], out[f"{name}_high"] = low, high
    return out.reset_index()


def run_study(
    out: str | Path,
    *,
    screens: int = 50,
    workers: int = 1,
    scratch: str | Path = "results/calibration/scratch",
    perturbations: Iterable[int] = PERTURBATIONS,
    difficulties: Iterable[str] = tuple(DIFFICULTIES),
    generators: Iterable[str] = GENERATORS,
    config: InferenceConfig | None = None,
    seed: int = 1,
) -> pd.DataFrame:
    """Run `screens` screens in every cell and write their summary to `out` (parquet).

    Chunks of screens are saved in `scratch` as they finish and not run again; delete the folder to start afresh. Returns
    the summary.
    """
    config = config or InferenceConfig()
    scratch = Path(scratch)
    scratch.mkdir(parents=True, exist_ok=True)
    chunks = [
        Chunk(d, p, g, first, min(CHUNK, screens - first), seed)
        for p, d, g in product(perturbations, difficulties, generators)
        for first in range(0, screens, CHUNK)
    ]
    files = []
    with Progress(len(chunks), "calibration study") as progress:
        # A spawned process would run the calling script, which is no module to import, once more; forks are safe on Linux only.
        if workers <= 1 or sys.platform != "linux":
            for chunk in chunks:
                files.append(run_chunk(chunk, str(scratch), config))
                progress.update()
        else:
            with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
                for path in pool.map(run_chunk, chunks, [str(scratch)] * len(chunks), [config] * len(chunks)):
                    files.append(path)
                    progress.update()
    summary = summarise(pd.concat([pd.read_parquet(path) for path in files], ignore_index=True))
    with atomic_path(out) as temporary:
        summary.to_parquet(temporary, index=False)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", default="results/calibration/study.parquet")
    parser.add_argument("--screens", type=int, default=50)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--scratch", default="results/calibration/scratch")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    run_study(arguments.out, screens=arguments.screens, workers=arguments.workers, scratch=arguments.scratch)


if __name__ == "__main__":
    main()
