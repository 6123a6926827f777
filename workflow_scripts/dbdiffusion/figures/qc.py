"""Quality of the cells that entered, and what was dropped."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from dbdiffusion.data.qc import ON_TARGET
from dbdiffusion.data.sets import CONTROL
from dbdiffusion.figures import style
from dbdiffusion.runtime.files import read_json

REASONS = {
    "no_counts": "no counts",
    "few_counts": "few counts",
    "few_genes": "few genes",
    "mito_share": "mitochondrial share",
    "few_cells_of_perturbation": "perturbation too small",
    "subset": "beyond maximum (random)",
    "multi_guide": "several guides",
    "unassigned": "no guide",
}
NAMED_BARS = 75
"""Up to so many perturbations are named on an axis."""
NAME = 19
"""Characters of such a name."""


def read_cells(cells: str | Path) -> pd.DataFrame:
    """One row per cell: perturbation, total_counts and genes (number detected). The counts themselves are not read."""
    with h5py.File(cells, "r") as handle:
        obs = read_elem(handle["obs"])
        detected = np.diff(handle["X/indptr"][:])
    return pd.DataFrame(
        {
            "perturbation": obs["perturbation"].astype(str).to_numpy(),
            "total_counts": obs["total_counts"].to_numpy(dtype=float),
            "genes": detected,
        }
    )


def _histograms(ax: Axes, values: np.ndarray, control: np.ndarray, label: str, *, log: bool) -> None:
    """Outlines of control and perturbed cells, each as a share of its own cells."""
    use = values[values > 0] if log else values
    low, high = float(use.min()), float(use.max())
    smaller = min(int(at.sum()) for at in (control, ~control) if at.any())
    bins = int(np.clip(2.5 * smaller ** (1 / 3), 12, 40))
    if log:
        edges = np.geomspace(low * 0.98, high * 1.02, bins + 1)
        ax.set_xscale("log")
    else:
        # Bins of whole numbers: others would hold now one value, now two.
        step = max(1, int(np.ceil((high - low + 1) / bins)))
        edges = np.arange(low - 0.5, high + step, step)
    for at, colour, name in ((~control, style.BLUE, "perturbed"), (control, style.DARK, "control")):
        if at.any():
            share = np.histogram(values[at], bins=edges)[0] / at.sum()
            ax.stairs(
                share,
                edges,
                fill=name == "perturbed",
                color=colour,
                alpha=0.35 if name == "perturbed" else 1.0,
                lw=0.9,
                label=f"{name} (median {np.median(values[at]):,.0f})",
            )
    if log:
        style.log_ticks(ax.xaxis)
    ax.set_ylim(0, ax.get_ylim()[1] * 1.32)
    ax.set_xlabel(label)
    ax.set_ylabel("share of cells")
    ax.legend(loc="upper left", fontsize=6)


def _cells_per_perturbation(ax: Axes, labels: pd.Series, minimum: int | None) -> None:
    control = int((labels == CONTROL).sum())
    sizes = labels[labels != CONTROL].value_counts().sort_index().sort_values(ascending=False, kind="stable")
    x = np.arange(len(sizes))
    ax.bar(x, sizes.to_numpy(), width=0.8 if len(sizes) <= NAMED_BARS else 1.0, color=style.BLUE, lw=0)
    ax.set_xlim(-0.7, len(sizes) - 0.3)
    if len(sizes) <= NAMED_BARS:
        ax.set_xticks(x, [style.short(n, NAME) for n in sizes.index], rotation=90, fontsize=5.5 if len(sizes) <= 45 else 5)
        ax.tick_params(axis="x", length=0)
    else:
        ax.set_xlabel("perturbations, by number of cells")
    if sizes.max() > 20 * max(sizes.min(), 1):
        ax.set_yscale("log")
        style.log_ticks(ax.yaxis)
    note = ""
    if minimum is not None:
        ax.axhline(minimum, color=style.VERMILLION, lw=0.7, ls=(0, (4, 2)))
        note = f"; at least {minimum} required (dashed)"
    ax.set_ylabel("cells")
    ax.set_title(f"{style.count(len(sizes), 'perturbation')} (median {sizes.median():,.0f} cells); {control:,} control cells{note}")


def _on_target(ax: Axes, frame: pd.DataFrame) -> None:
    """Share of control expression of each perturbation's own gene, sorted, on a log scale."""
    frame = frame.dropna(subset=["share_of_control"])
    if frame.empty:
        style.empty(ax, "No perturbed gene is among the measured genes.")
        return
    frame = frame.sort_values(["share_of_control", "perturbation", "gene"], kind="stable", ignore_index=True)
    combination = frame["perturbation"].astype(str).str.contains("+", regex=False)
    # Of a combination, the gene that is meant stands first.
    other = [p.replace(g, "", 1).strip("+") for p, g in zip(frame["perturbation"].astype(str), frame["gene"].astype(str), strict=True)]
    name = np.where(combination, frame["gene"].astype(str) + " +" + pd.Series(other, dtype=str), frame["perturbation"].astype(str))
    floor = (
        max(float(frame.loc[frame["share_of_control"] > 0, "share_of_control"].min()) / 2, 1e-3)
        if (frame["share_of_control"] > 0).any()
        else 1e-3
    )
    share = frame["share_of_control"].clip(lower=floor).to_numpy()
    x = np.arange(len(frame))
    sure = (frame["p"] < 0.05).to_numpy()
    ax.axhline(1, color=style.GREY, lw=0.6)
    ax.vlines(x, 1, share, color=style.LIGHT, lw=0.8, zorder=1)
    size = 9 if len(frame) <= NAMED_BARS else 4
    for at, face, label in ((sure, style.BLUE, "p < 0.05 (Mann–Whitney)"), (~sure, "white", "p ≥ 0.05 (Mann–Whitney)")):
        if at.any():
            ax.scatter(x[at], share[at], s=size, c=face, edgecolors=style.BLUE, linewidths=0.6, zorder=3, label=label)
    ax.set_yscale("log")
    style.log_ticks(ax.yaxis)
    if len(frame) <= NAMED_BARS:
        ax.set_xticks(x, [style.short(n, NAME) for n in name], rotation=90, fontsize=5.5 if len(frame) <= 45 else 5)
        ax.tick_params(axis="x", length=0)
    else:
        ax.set_xlabel("perturbations, by share")
    ax.set_xlim(-0.7, len(frame) - 0.3)
    ax.set_ylabel("own gene's expression,\nshare of control")
    ax.set_title(f"On-target change of {style.count(len(frame), 'measured gene')} (median {frame['share_of_control'].median():.2f})")
    ax.legend(loc="best" if len(frame) < 10 else "lower right", fontsize=6)


def _dropped(ax: Axes, summary: dict) -> None:
    cells = summary["cells"]
    dropped = {k: v for k, v in cells["dropped"].items() if v}
    ax.set_title(f"{cells['kept']:,} of {style.count(cells['input'], 'cell')} kept")
    if not dropped:
        ax.set_axis_off()
        ax.text(0.5, 0.5, "no cell was dropped", transform=ax.transAxes, ha="center", va="center", color=style.DARK)
        return
    order = sorted(dropped, key=lambda k: (-dropped[k], k))
    values = np.array([dropped[k] for k in order])
    ax.barh(np.arange(len(order)), values, height=0.5, color=style.GREY, lw=0)
    for row, (key, value) in enumerate(zip(order, values, strict=True)):
        text = f"{style.short(REASONS.get(key, key.replace('_', ' ')), 30)}: {value:,} ({value / cells['input']:.1%})"
        ax.annotate(text, (0, row - 0.27), xytext=(2, 0), textcoords="offset points", va="bottom", fontsize=6, color=style.DARK)
    ax.set_yticks([])
    ax.set_ylim(max(len(order), 3) - 0.5, -0.8)
    ax.set_xlim(0, float(values.max()) * 1.05)
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    ax.set_xlabel("cells dropped")


def draw_qc(*, cells: str | Path, summary: str | Path, on_target: str | Path, png: str | Path, pdf: str | Path) -> None:
    """Counts and genes per cell, cells dropped by reason, cells per perturbation, and on-target change.

    cells: cells.h5ad after quality control; summary: qc/summary.json; on_target: table `on_target`. Counts are of the whole
    library (column total_counts), genes those of the file.
    """
    table, record, own = read_cells(cells), read_json(summary), ON_TARGET.read(on_target)
    control = (table["perturbation"] == CONTROL).to_numpy()
    with style.sheet(style.PAGE, 160, png=png, pdf=pdf) as page:
        grid = page.fig.add_gridspec(3, 3, height_ratios=(0.85, 1, 1))
        axes = [*(page.fig.add_subplot(grid[0, i]) for i in range(3)), page.fig.add_subplot(grid[1, :]), page.fig.add_subplot(grid[2, :])]
        _histograms(axes[0], table["total_counts"].to_numpy(), control, "counts per cell (whole library)", log=True)
        axes[0].set_title(f"Counts (n = {len(table):,} cells)")
        _histograms(axes[1], table["genes"].to_numpy(), control, "genes detected per cell", log=False)
        axes[1].set_title("Genes")
        _dropped(axes[2], record)
        _cells_per_perturbation(axes[3], table["perturbation"], record.get("thresholds", {}).get("min_cells_per_perturbation"))
        _on_target(axes[4], own)
        style.letter_panels(axes)
