"""Scores of every predictor beside the replicate ceiling."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dbdiffusion.benchmark.metrics import HIGHER_IS_BETTER
from dbdiffusion.benchmark.scores import REPLICATE, summarise
from dbdiffusion.figures import style
from dbdiffusion.runtime import contracts

TITLES = {
    "pearson_delta": "Pearson",
    "pearson_delta_perturbed": "Pearson to mean",
    "spearman_delta": "Spearman",
    "mse": "Mean squared error",
    "weighted_mse": "Weighted squared error",
    "mmd": "MMD",
    "de_average_precision": "Average precision of changed genes",
    "de_precision": "Precision of calls",
    "de_recall": "Recall of calls",
    "de_jaccard": "Jaccard of calls",
    "de_sign": "Sign of calls",
    "two_sample_auc": "Two-sample AUC",
    "sign_accuracy": "Sign, all genes",
}
PANELS = (
    ("pearson_delta", "all"),
    ("pearson_delta", "top"),
    ("pearson_delta_perturbed", "all"),
    ("mse", "all"),
    ("discrimination", "all"),
    ("energy_distance", "all"),
)
"""Metric and genes of each panel; `top` is the largest number of top genes."""
DEBIASED = "baselines, debiased"
"""The row of all debiased baselines."""


def choose_panels(summary: pd.DataFrame, panels: tuple[tuple[str, str], ...] = PANELS) -> list[tuple[str, str]]:
    """The panels that the table can fill; where none can be, the metrics that it has (at most as many)."""
    there = set(zip(summary["metric"], summary["genes"], strict=True))
    found = []
    for metric, genes in panels:
        sizes = sorted((g for m, g in there if m == metric and g.isdigit()), key=int)
        label = (sizes[-1] if sizes else "") if genes == "top" else genes
        if (metric, label) in there:
            found.append((metric, label))
    return found or sorted(there)[: len(panels)]


def _title(metric: str, genes: str) -> str:
    name = TITLES.get(metric, metric.replace("_", " ").capitalize())
    return f"{name}, top {genes} genes" if genes != "all" else name + (", all genes" if metric == "pearson_delta" else "")


def rows_of(summary: pd.DataFrame) -> list[str]:
    """Rows of the panels: the methods, ours first, and DEBIASED where baselines were debiased, too."""
    methods = style.method_order([m for m in summary["method"] if m != REPLICATE])
    return methods + [DEBIASED] * bool(summary.loc[_is_baseline(summary), "debiased"].any())


def _is_baseline(part: pd.DataFrame) -> pd.Series:
    return ~part["method"].isin([REPLICATE, *style.OURS])


def _draw_panel(ax: Axes, part: pd.DataFrame, rows: list[str]) -> None:
    """Rows are methods; raw predictors are hollow, debiased ones filled; the ceiling is a dashed line with its band.

    Debiased baselines share one row: what they predict by themselves is their score, and debiased they lie close together.
    """
    pooled = _is_baseline(part) & part["debiased"]
    for row in part[(part["method"] != REPLICATE) & ~pooled].itertuples():
        colour = style.method_colour(row.method, others="#7A7A7A")
        both = part.loc[part["method"] == row.method, "debiased"].nunique() > 1 and row.method in style.OURS
        y = rows.index(row.method) + (0.2 if row.debiased else -0.2) * both
        if row.n > 1:
            ax.plot([row.low, row.high], [y, y], color=colour, lw=0.9, solid_capstyle="butt", zorder=2)
        ax.plot(row.mean, y, "o", ms=3.6, mfc=colour if row.debiased else "white", mec=colour, mew=0.9, zorder=3)
    if pooled.any():
        y, values = rows.index(DEBIASED), part.loc[pooled]
        ax.plot([values["low"].min(), values["high"].max()], [y, y], color="#7A7A7A", lw=0.9, solid_capstyle="butt", zorder=2)
        ax.plot(values["mean"], np.full(len(values), y), "|", ms=6, color="#7A7A7A", mew=0.9, zorder=3)
    for row in part[part["method"] == REPLICATE].itertuples():
        ax.axvline(row.mean, color=style.GREEN, lw=0.9, ls=(0, (4, 2)), zorder=1)
        if row.n > 1:
            ax.axvspan(row.low, row.high, color=style.GREEN, alpha=0.12, lw=0, zorder=0)


def _finish(ax: Axes, metric: str, genes: str, part: pd.DataFrame) -> None:
    n = int(part["n"].max())
    ax.set_title(f"{_title(metric, genes)} (n = {n})")
    better = HIGHER_IS_BETTER.get(metric)
    hint = "" if better is None else (", higher is better" if better else ", lower is better")
    # Few ticks: three panels share a page's width, and small errors have long numbers.
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.set_xlabel(f"mean over targets{hint}")
    ax.grid(axis="x", color=style.LIGHT, lw=0.4)
    ax.tick_params(axis="y", length=0)
    ax.margins(x=0.06)


def draw_scores(*, scores: str | Path, png: str | Path, pdf: str | Path, bootstrap: int = 1000, seed: int = 0) -> None:
    """Mean score of each method over the held-out targets with a 95 % bootstrap interval over targets, one panel per metric.

    scores: contract `scores`. Ours in colour, baselines and peers in grey; filled markers are debiased, hollow ones the
    predictor as it is; debiased baselines share the last row (a tick each, and the hull of their intervals); the green
    dashed line is the replicate ceiling (half A as a predictor of half B) with its interval.
    Methods without a value of a metric (a correlation of the constant prediction) have no marker there.
    """
    summary = summarise(contracts.SCORES.read(scores), resamples=bootstrap, seed=seed)
    panels = choose_panels(summary)
    methods = rows_of(summary)
    rows, columns = style.grid(len(panels), 3)
    with style.sheet(style.PAGE, max(48.0, rows * (15 + 5.0 * max(len(methods), 4)) + 8), png=png, pdf=pdf) as page:
        if not panels:
            style.empty(page.fig.subplots(), "No held-out target was measured: there is nothing to score against.")
            return
        axes = page.fig.subplots(rows, columns, squeeze=False, sharey=True).ravel()
        for ax, (metric, genes) in zip(axes, panels, strict=False):
            part = summary[(summary["metric"] == metric) & (summary["genes"] == genes)]
            _draw_panel(ax, part, methods)
            _finish(ax, metric, genes, part)
        for ax in axes[::columns]:
            _name_rows(ax, methods)
        axes[0].set_ylim(len(methods) - 0.5, -0.5)
        for ax in axes[len(panels) :]:
            ax.set_visible(False)
        style.letter_panels(axes[: len(panels)])
        _legend(page.fig, axes[0], summary)


def _name_rows(ax: Axes, methods: list[str]) -> None:
    ax.set_yticks(np.arange(len(methods)), [m if m == DEBIASED else style.method_name(m) for m in methods])
    for tick, method in zip(ax.get_yticklabels(), methods, strict=True):
        tick.set_color(style.method_colour(method, others=style.DARK))
        tick.set_fontweight("bold" if method in style.OURS else "normal")


def _legend(fig: Figure, ax: Axes, summary: pd.DataFrame) -> None:
    handles = []
    for debiased, name in ((False, "predictor as it is"), (True, "after debiasing")):
        if (summary.loc[summary["method"] != REPLICATE, "debiased"] == debiased).any():
            fill = style.DARK if debiased else "white"
            handles += ax.plot([], [], "o", ms=3.6, mfc=fill, mec=style.DARK, mew=0.9, label=name)
    if (summary["method"] == REPLICATE).any():
        handles += ax.plot([], [], color=style.GREEN, lw=0.9, ls=(0, (4, 2)), label="replicate ceiling (half A against half B)")
    if summary.loc[_is_baseline(summary), "debiased"].any():
        handles += ax.plot([], [], "|", ms=6, color="#7A7A7A", mew=0.9, label="each baseline after debiasing")
    fig.legend(handles=handles, loc="outside lower center", ncols=4)
