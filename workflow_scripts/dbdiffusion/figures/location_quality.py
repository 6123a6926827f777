"""How well locators place perturbations, by locator and feature source, and whether confidence is earned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dbdiffusion.benchmark.location import COMBINATIONS, IN_USE, coverage_above, reliability, summarise
from dbdiffusion.figures import style
from dbdiffusion.runtime import contracts

LOOKS = {"target": (style.BLUE, "o"), "pseudo": (style.ORANGE, "s"), "combinations": (style.PURPLE, "D")}
NAMES = {"target": "held-out targets", "pseudo": "training perturbations, without their own cells"}
OFFSET = {"target": -0.16, "pseudo": 0.16}


def locator_order(summary: pd.DataFrame) -> list[str]:
    """The locations in use, then locators in order of their error on given features (of pseudo-targets where there are any)."""
    given = summary[summary["features"] == "given"]
    role = "pseudo" if (given["role"] == "pseudo").any() else "target"
    error = given[given["role"] == role].set_index("locator")["error"]
    first = [name for name in (IN_USE, COMBINATIONS) if name in set(given["locator"])]
    return first + sorted(set(given["locator"]) - set(first), key=lambda name: (error.get(name, np.inf), name))


def locator_name(name: str, width: int = 34) -> str:
    """A locator as it is written in the figure: without the kind of its feature source."""
    kind, _, source = name.partition(": ")
    return style.short(f"{kind}, {source.split(':')[-1].replace('_', ' ')}" if source else name, width)


def draw_location_quality(
    *, table: str | Path, png: str | Path, pdf: str | Path, bootstrap: int = 1000, level: float = 0.9, seed: int = 0
) -> None:
    """(a) Squared error of located neighbour means relative to the training mean's, (b) purity of located neighbours, by locator and
    feature source, each beside the same with permuted features; by the location confidence, (c) the share of locations that beat the
    training mean, (d) their error, (e) the coverage of intervals from located neighbours above a threshold.

    table: contract `location_quality` of all folds and seeds. Intervals are 95 %, from `bootstrap` resamples of perturbations in (a)
    and (b), binomial in (c), normal in (e), whose nominal coverage is `level`. Error intervals that reach far beyond all points are cut
    at the axes' edge.
    """
    text = dict.fromkeys((column.name for column in contracts.LOCATION_QUALITY.columns if column.kind == "str"), "str")
    rows = contracts.LOCATION_QUALITY.read(table).astype(text)
    summary = summarise(rows, resamples=bootstrap, seed=seed)
    order = locator_order(summary)
    top = max(40.0, 14 + 5.2 * len(order))
    with style.sheet(style.PAGE, top + 66.0, png=png, pdf=pdf) as page:
        if not order:
            style.empty(page.fig.subplots(), "No located perturbation was measured: there is nothing to compare with.")
            return
        grid = page.fig.add_gridspec(2, 6, height_ratios=(top, 48.0))
        error, purity = (page.fig.add_subplot(grid[0, at : at + 3]) for at in (0, 3))
        curve, size, covered = (page.fig.add_subplot(grid[1, at : at + 2]) for at in (0, 2, 4))
        _error(error, summary, order)
        _purity(purity, summary, order)
        bins = reliability(rows)
        _reliability(curve, bins)
        _errors_by_confidence(size, bins)
        _coverage(covered, *coverage_above(rows, level), level)
        style.letter_panels([error, purity, curve, size, covered])
        _legend(page.fig, error, summary, rows)


def _points(ax: Axes, summary: pd.DataFrame, order: list[str], value: str) -> None:
    """Rows are locators; given features filled with their interval, permuted ones hollow."""
    for row in summary.to_dict("records"):
        if row["locator"] not in order or np.isnan(row[value]):
            continue
        colour, marker = LOOKS[row["role"]]
        y, given = order.index(row["locator"]) + OFFSET[row["role"]], row["features"] == "given"
        if given and row["n"] > 1:
            ax.plot([row[f"{value}_low"], row[f"{value}_high"]], [y, y], color=colour, lw=0.9, solid_capstyle="butt", zorder=2)
        ax.plot(row[value], y, marker, ms=3.4, mfc=colour if given else "white", mec=colour, mew=0.8, zorder=4 if given else 3)
    ax.set_ylim(len(order) - 0.5, -0.5)
    ax.set_yticks(np.arange(len(order)))
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color=style.LIGHT, lw=0.4)
    ax.xaxis.set_major_locator(MaxNLocator(4))


def _error(ax: Axes, summary: pd.DataFrame, order: list[str]) -> None:
    _points(ax, summary, order, "error")
    ax.axvline(1, color=style.DARK, lw=0.7, ls=(0, (4, 2)), zorder=1)
    low, high = min(summary["error"].min(), 1.0), max(summary["error"].max(), 1.0)
    room = 0.12 * max(high - low, 0.1)
    ax.set_xlim(min(low - room, summary["error_low"].min() - room / 2), high + 2 * room)
    ax.set_yticklabels([locator_name(name) for name in order])
    for label, name in zip(ax.get_yticklabels(), order, strict=True):
        label.set_fontweight("bold" if name in (IN_USE, COMBINATIONS) else "normal")
    ax.set_title("Error of the location")
    ax.set_xlabel("squared error / training mean's\n(lower is better)")


def _purity(ax: Axes, summary: pd.DataFrame, order: list[str]) -> None:
    _points(ax, summary, order, "purity")
    for row in summary[(summary["features"] == "given") & summary["purity"].notna()].itertuples():
        y = order.index(row.locator) + OFFSET[row.role]
        ax.plot([row.purity_random] * 2, [y - 0.16, y + 0.16], color=style.DARK, lw=0.9, zorder=5)
    for name in set(order) - set(summary.loc[summary["purity"].notna(), "locator"]):
        ax.text(0.02, order.index(name), "–", transform=ax.get_yaxis_transform(), color=style.GREY, va="center")
    ax.set_yticklabels([])
    ax.set_xlim(left=0)
    ax.set_title("Purity of the neighbours")
    ax.set_xlabel("weight in the true cluster\n(higher is better)")


def _reliability(ax: Axes, curve: pd.DataFrame) -> None:
    ax.plot([0, 1], [0, 1], color=style.GREY, lw=0.7, ls=(0, (4, 2)), zorder=1)
    for shift, group in zip((-0.008, 0.008, 0.0), LOOKS, strict=True):
        part = curve[curve["group"] == group]
        colour, marker = LOOKS[group]
        x = part["confidence"] + shift
        ax.vlines(x, part["low"], part["high"], color=colour, lw=0.8, zorder=2)
        # Bins of few locations say little: the area of a marker is their number.
        ax.scatter(x, part["share"], s=6 + 40 * part["n"] / max(curve["n"].max(), 1), marker=marker, color=colour, linewidths=0, zorder=3)
    ax.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    ax.set_title(f"Confidence ({style.count(int(curve['n'].sum()), 'location')})")
    ax.set_xlabel("confidence of the location\n(mean of the bin)")
    ax.set_ylabel("share better than\nthe training mean")


def _errors_by_confidence(ax: Axes, curve: pd.DataFrame) -> None:
    ax.axhline(1, color=style.DARK, lw=0.7, ls=(0, (4, 2)), zorder=1)
    for group, (colour, marker) in LOOKS.items():
        part = curve[curve["group"] == group]
        ax.plot(part["confidence"], part["error"], color=colour, lw=0.8, zorder=2)
        ax.scatter(
            part["confidence"],
            part["error"],
            s=6 + 40 * part["n"] / max(curve["n"].max(), 1),
            marker=marker,
            color=colour,
            linewidths=0,
            zorder=3,
        )
    ax.set_xlim(-0.03, 1.03)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_locator(MaxNLocator(4))
    ax.set_title("Error by confidence")
    ax.set_xlabel("confidence of the location\n(mean of the bin)")
    ax.set_ylabel("squared error /\ntraining mean's")


def _coverage(ax: Axes, above: pd.DataFrame, found: float, level: float) -> None:
    ax.axhline(level, color=style.DARK, lw=0.7, ls=(0, (4, 2)), zorder=1)
    for role in ("target", "pseudo"):
        part = above[above["role"] == role]
        colour, _ = LOOKS[role]
        ax.step(part["confidence"], part["coverage"], where="pre", color=colour, lw=1.0, zorder=3)
        ax.fill_between(part["confidence"], part["low"], part["high"].clip(upper=1), step="pre", color=colour, alpha=0.15, lw=0, zorder=2)
    if np.isfinite(found):
        ax.axvline(found, color=style.ORANGE, lw=0.8, ls=":", zorder=1)
    ax.set_xlim(-0.03, 1.03)
    ax.set_ylim(min(0.5, above["coverage"].min() - 0.05) if len(above) else 0.5, 1.01)
    if not np.isnan(found):
        said = "at no confidence" if np.isinf(found) else f"from {found:.2f} on"
        ax.text(0.03, 0.03, f"nominal {said}", transform=ax.transAxes, fontsize=6, color=style.DARK)
    ax.set_title("Coverage")
    ax.set_xlabel("least confidence\nthat is accepted")
    ax.set_ylabel("genes in the\nneighbours' interval")


def _legend(fig: Figure, ax: Axes, summary: pd.DataFrame, table: pd.DataFrame) -> None:
    handles = []
    used = table[table["locator"] == IN_USE]
    for role in ("target", "pseudo"):
        if (summary["role"] == role).any():
            colour, marker = LOOKS[role]
            n = used.loc[used["role"] == role, "query"].nunique()
            handles += ax.plot([], [], marker, ms=3.4, color=colour, label=f"{NAMES[role]} (n = {n})")
    if COMBINATIONS in set(table["locator"]):
        colour, marker = LOOKS["combinations"]
        handles += ax.plot([], [], marker, ms=3.4, color=colour, label="combinations (c, d)")
    handles += ax.plot([], [], "o", ms=3.4, mfc="white", mec=style.DARK, mew=0.8, label="permuted features")
    handles += ax.plot([], [], "|", ms=6, color=style.DARK, mew=0.9, label="random neighbours (b)")
    fig.legend(handles=handles, loc="outside lower center", ncols=3)
