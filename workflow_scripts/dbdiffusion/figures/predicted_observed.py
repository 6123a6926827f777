"""Predicted against observed change of held-out targets, gene by gene."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dbdiffusion.figures import style
from dbdiffusion.figures.observed import observe, pearson, predicted

LABELS = 6
"""Genes named in a panel."""
TITLE = 24
"""Characters of a target's name over a panel."""


def _limits(*values: np.ndarray) -> tuple[float, float]:
    """Limits that hold all values and zero, with a margin."""
    both = np.concatenate([v[np.isfinite(v)] for v in values] + [np.zeros(1)])
    low, high = float(both.min()), float(both.max())
    pad = 0.08 * (high - low or 1.0)
    return low - pad, high + pad


def top_genes(score: np.ndarray, n: int) -> np.ndarray:
    """Positions of the n largest finite scores above zero, largest first; ties in the order of the genes."""
    usable = np.where(np.isfinite(score), score, -np.inf)
    order = np.argsort(-usable, kind="stable")[:n]
    return order[usable[order] > 0]


def _points(ax: Axes, x: np.ndarray, y: np.ndarray, call: np.ndarray) -> None:
    raster = len(x) > style.RASTER_FROM
    for name in ("no_call", "none", "down", "up"):
        at, front = call == name, name in ("up", "down")
        look = {"s": 7 if front else 4, "alpha": 0.9 if front else 0.45, "zorder": 3 if front else 2}
        ax.scatter(x[at], y[at], rasterized=raster, **look, **_face(name))


def _face(call: str) -> dict[str, object]:
    """Abstained genes are hollow, others filled."""
    if call == "no_call":
        return {"facecolors": "none", "edgecolors": style.GREY, "linewidths": 0.5}
    return {"c": style.CALL_COLOURS[call], "linewidths": 0}


def _panel(page: style.Sheet, ax: Axes, target: str, rows: pd.DataFrame, truth: pd.DataFrame) -> None:
    """Observed (x) against predicted (y), with the 1:1 line, Pearson and the replicate's Pearson."""
    truth = truth.reindex(rows.index)
    x, y = truth["effect"].to_numpy(), rows["lfc"].to_numpy()
    good = np.isfinite(x) & np.isfinite(y)
    if not good.any():
        style.empty(ax, f"{target}\n{_reason(rows)}")
        return
    lower, upper = _limits(x, y)
    ax.plot([lower, upper], [lower, upper], color=style.GREY, lw=0.6, ls=(0, (4, 2)), zorder=1)
    ax.axhline(0, color=style.LIGHT, lw=0.5, zorder=0)
    ax.axvline(0, color=style.LIGHT, lw=0.5, zorder=0)
    _points(ax, x[good], y[good], rows["call"].to_numpy()[good])
    ax.set_xlim(lower, upper)
    ax.set_ylim(lower, upper)
    ax.set_aspect("equal")
    ceiling = pearson(truth["replicate"].to_numpy(), truth["effect"].to_numpy())
    ax.set_title(f"{style.short(target, TITLE)}\nr = {pearson(x, y):.2f} (replicate {ceiling:.2f})".replace("-", "−"))
    ax.set_xlabel(f"observed ({style.count(int(truth['n_cells'].max()), 'cell')})")
    ax.set_ylabel(f"predicted ({_called(rows[good])})")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(4))
    named = top_genes(np.where(good, np.maximum(np.abs(x), np.abs(y)), np.nan), LABELS)
    crowd = top_genes(np.where(good, np.maximum(np.abs(x), np.abs(y)), np.nan), 60)
    page.label(ax, x[named], y[named], rows.index[named], avoid=(x[crowd], y[crowd]))


def _called(rows: pd.DataFrame) -> str:
    return f"{int(rows['call'].isin(['up', 'down']).sum()):,}/{len(rows):,} called"


def _reason(rows: pd.DataFrame) -> str:
    reasons = [r for r in rows["reason"].unique() if r]
    return "not predicted: " + (reasons[0] if reasons else "no estimate")


def draw_predicted_observed(
    *,
    de: str | Path,
    moments: str | Path,
    targets: list[str],
    png: str | Path,
    pdf: str | Path,
    method: str = "dbdiffusion",
    most: int = 12,
) -> None:
    """One panel per target: predicted change of `method` against the change observed in half B of its cells.

    de: contract `de`; moments: moments.h5ad of the same seed; targets: held-out ones, of which the first `most` that were predicted are
    drawn, and those that were not are named.
    Units ln(1 + CP10k). Raises UserError when the method is not in the table.
    """
    found = predicted(de, method, targets)
    shown = [t for t in targets if t in found and found[t]["lfc"].notna().any()][:most]
    passed = targets[: targets.index(shown[-1]) + 1] if len(shown) == most else targets
    absent = [t for t in passed if t in found and t not in shown]
    genes = list(dict.fromkeys(g for t in shown for g in found[t].index))
    truth = observe(moments, shown, genes)
    rows, columns = style.grid(len(shown), 4 if len(shown) != 3 else 3)
    width = style.PAGE if columns > 2 else max(style.COLUMN, 61.0 * columns + 8)
    side = (width - 4) / columns
    with style.sheet(width, rows * (side + 4) + 16, png=png, pdf=pdf) as page:
        if not shown:
            style.empty(page.fig.subplots(), "\n".join(["No target was predicted.", *(f"{t}: {_reason(found[t])}" for t in absent[:3])]))
            return
        axes = page.fig.subplots(rows, columns, squeeze=False).ravel()
        for ax, target in zip(axes, shown, strict=False):
            _panel(page, ax, target, found[target], truth[target])
        for ax in axes[len(shown) :]:
            ax.set_visible(False)
        style.letter_panels(axes[: len(shown)])
        calls = sorted({c for t in shown for c in found[t]["call"].unique()}, key=list(style.CALL_NAMES).index)
        title = f"{style.method_name(method)}; changes in {style.LFC}"
        if absent:
            title += "\n" + style.as_many_as_fit(page.fig, "no estimate (see the table of calls) of ", absent, width - 6, 6.5)
        call_legend(page.fig, axes[0], calls, title)


def call_legend(fig: Figure, ax: Axes, calls: list[str], title: str) -> None:
    """A legend of call colours under the figure."""
    for call in calls:
        ax.scatter([], [], s=9, label=style.CALL_NAMES[call], **_face(call))
    handles, names = ax.get_legend_handles_labels()
    fig.legend(handles, names, loc="outside lower center", ncols=len(calls), title=title, title_fontsize=6.5)
