"""Gene sets in which the clusters of perturbations and of genes are enriched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from dbdiffusion.figures import style
from dbdiffusion.runtime import contracts

PER_CLUSTER = 3
MAX_ROWS = 16
LEVEL = 0.05
TITLES = {"perturbation": "Clusters of perturbations", "gene": "Clusters of genes"}


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """The sets that are drawn for one kind of clusters: the PER_CLUSTER of smallest p of each cluster, in all MAX_ROWS, by cluster.

    Of sets with the same members in a cluster the first is drawn.
    """
    best = table.sort_values(["p", "cluster", "set"]).drop_duplicates(["cluster", "members"])
    best = best.groupby("cluster", sort=False).head(PER_CLUSTER).head(MAX_ROWS)
    order = {name: number for number, name in enumerate(style.natural_order(best["cluster"]))}
    return best.sort_values(["cluster", "p", "set"], key=lambda column: column.map(order) if column.name == "cluster" else column)


def draw_enrichment(*, enrichment: str | Path, png: str | Path, pdf: str | Path) -> None:
    """Adjusted p of the most enriched sets of each cluster; enrichment: contract `enrichment` of a fold."""
    table = contracts.ENRICHMENT.read(enrichment)
    table = table.astype(dict.fromkeys(("kind", "cluster", "set", "description", "members"), str))
    parts = {kind: shown(table[table["kind"] == kind]) for kind in TITLES}
    heights = [max(len(part), 3) for part in parts.values()]
    with style.sheet(style.PAGE, 34 + 4.6 * sum(heights), png=png, pdf=pdf) as page:
        panels = page.fig.subplots(2, 1, height_ratios=heights)
        for ax, (kind, part) in zip(panels, parts.items(), strict=True):
            rows = table[table["kind"] == kind]
            _panel(ax, part, rows)
            ax.set_title(f"{TITLES[kind]}: {style.count(int((rows['q'] <= LEVEL).sum()), 'set')} at q ≤ {LEVEL:g}")
        style.letter_panels(list(panels))


def _panel(ax: Axes, part: pd.DataFrame, everything: pd.DataFrame) -> None:
    if part.empty:
        style.empty(ax, "No two genes of a cluster share a set.")
        return
    looks = style.group_style(style.natural_order(everything["cluster"].unique()))
    y, height = np.arange(len(part)), -np.log10(np.maximum(part["q"].to_numpy(dtype=float), 1e-300))
    ax.hlines(y, 0, height, color=style.LIGHT, lw=1.0, zorder=1)
    right = max(float(height.max()), -np.log10(LEVEL)) * 1.05
    for at, row in enumerate(part.itertuples()):
        colour, marker = looks[row.cluster]
        ax.scatter(height[at], at, s=14, c=colour, marker=marker, linewidths=0, zorder=3, clip_on=False)
        text = f"{row.overlap} of {row.set_size}: {style.short(row.members, 34)}"
        ax.text(right * 1.04, at, text, va="center", fontsize=5.5, color=style.DARK)
    ax.axvline(-np.log10(LEVEL), color=style.DARK, lw=0.7, ls=(0, (4, 2)), zorder=2)
    ax.set_xlim(0, right * 1.75)
    ax.set_xticks([tick for tick in MaxNLocator(5).tick_values(0, right) if 0 <= tick <= right])
    # The members stand beyond the axis.
    ax.spines["bottom"].set_bounds(0, right)
    # A file may say the same of all its sets.
    said = everything.groupby("description")["set"].nunique()
    names = [row.description if said[row.description] == 1 else row.set for row in part.itertuples()]
    ax.set_yticks(y, [f"{style.short(name, 44)}  [{cluster}]" for name, cluster in zip(names, part["cluster"], strict=True)])
    ax.set_ylim(len(part) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("$-\\log_{10}$ q", x=0.5 / 1.75)
