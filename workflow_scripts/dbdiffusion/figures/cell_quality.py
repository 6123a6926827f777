"""How good generated cells are: every score of seen and of held-out perturbations beside control cells and the replicate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from dbdiffusion.figures import style
from dbdiffusion.runtime import contracts

SAMPLES = {"generated": (style.PREDICTED, "o"), "control": (style.GREY, "s"), "replicate": (style.GREEN, "D")}
NAMES = {"generated": "generated cells", "control": "control cells", "replicate": "replicate (half A)"}
PANELS = {
    "energy_distance": ("Energy distance", 0.0),
    "mmd": ("MMD", 0.0),
    "two_sample_auc": ("Two-sample AUC", 0.5),
    "mean_agreement": ("Means of genes", 1.0),
    "variance_agreement": ("Standard deviations of genes", 1.0),
    "zero_fraction_agreement": ("Zero fractions of genes", 1.0),
    "correlation_agreement": ("Correlations of genes", 1.0),
    "effect_slope": ("Slope on true effects", 1.0),
    "spread": ("Spread over perturbations", 1.0),
}
"""Title and best value of each metric."""
ROLES = {"seen": "seen", "unseen": "held out"}


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Mean over perturbations and its standard error by metric, role and sample; a perturbation of several folds or seeds counts once."""
    keys = ["metric", "role", "sample"]
    one = table.astype(dict.fromkeys([*keys, "perturbation"], str)).groupby([*keys, "perturbation"])["value"].mean().dropna()
    groups = one.groupby(level=keys)
    out = groups.agg(mean="mean", sd="std", n="size").reset_index()
    return out.assign(error=(out["sd"] / np.sqrt(out["n"])).fillna(0.0))


def _panel(ax: Axes, part: pd.DataFrame, title: str, best: float) -> None:
    ax.axvline(best, color=style.LIGHT, lw=0.8, zorder=1)
    for row, role in enumerate(ROLES):
        for step, (sample, (colour, marker)) in enumerate(SAMPLES.items()):
            found = part[(part["role"] == role) & (part["sample"] == sample)]
            if found.empty:
                continue
            y, value = row + 0.22 * (step - 1), found.iloc[0]
            ax.errorbar(value["mean"], y, xerr=1.96 * value["error"], fmt=marker, ms=3.4, color=colour, elinewidth=0.8, mew=0, zorder=3)
    ax.set_ylim(1.55, -0.55)
    ax.margins(x=0.08)
    ax.set_title(title)


def draw_cell_quality(*, quality: str | Path, png: str | Path, pdf: str | Path) -> None:
    """One panel per metric of contract `cell_quality`: mean over perturbations with a 95 % interval, seen above held out.

    The grey line is the best value of the metric.
    """
    summary = summarise(contracts.CELL_QUALITY.read(quality))
    with style.sheet(style.PAGE, 98, png=png, pdf=pdf) as page:
        if summary.empty:
            style.empty(page.fig.subplots(), "No perturbation has enough cells in both halves.")
            return
        axes = page.fig.subplots(3, 3, sharey=True)
        for ax, (metric, (title, best)) in zip(axes.flat, PANELS.items(), strict=True):
            _panel(ax, summary[summary["metric"] == metric], title, best)
        counts = summary[(summary["sample"] == "generated") & (summary["metric"] == "energy_distance")].set_index("role")["n"]
        axes[0, 0].set_yticks(range(len(ROLES)), [f"{name}\n(n = {counts.get(role, 0)})" for role, name in ROLES.items()])
        handles = [
            axes[0, 0].plot([], [], marker, ms=3.4, color=colour, mew=0, label=NAMES[s])[0] for s, (colour, marker) in SAMPLES.items()
        ]
        page.fig.legend(handles=handles, loc="outside lower center", ncols=3)
        style.letter_panels(list(axes.flat))
