"""Calibration over many simulated screens: how rates depend on difficulty, number of perturbations and error model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dbdiffusion.figures import style
from dbdiffusion.runtime.errors import UserError

COLUMNS = (
    "difficulty",
    "perturbations",
    "generator",
    "error_model",
    "level",
    "coverage",
    "width",
    "q",
    "fdr",
    "power",
    "power_replicate",
    "screens",
)
LINES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1, 1, 1)))
ERROR = "estimate:"
"""Prefix of the rows whose mse_ratio is a predictor's mean squared error over that of the neighbour mean."""


def _read(study: str | Path) -> pd.DataFrame:
    frame = pd.read_parquet(study)
    absent = [c for c in COLUMNS if c not in frame.columns]
    if absent:
        raise UserError(f"column(s) {absent} missing; found {list(frame.columns)}", where=str(study), fix="run the calibration study again")
    frame = frame.astype({"difficulty": str, "generator": str, "error_model": str})
    return frame


def _at(frame: pd.DataFrame, column: str, wanted: float) -> float:
    """The value of `column` nearest to the wanted one."""
    values = np.sort(frame[column].dropna().unique())
    return float(values[np.argmin(np.abs(values - wanted))]) if len(values) else wanted


def _series(ax: Axes, part: pd.DataFrame, rate: str, looks: dict, lines: dict) -> None:
    """One line per error model (colour) and generator (dash) over the number of perturbations, dodged on the log axis."""
    there = set(part.loc[part[rate].notna(), "error_model"])
    keys = [(m, g) for m in looks if m in there for g in lines]
    for i, (model, generator) in enumerate(keys):
        rows = part[(part["error_model"] == model) & (part["generator"] == generator)].dropna(subset=[rate])
        if rows.empty:
            continue
        rows = rows.groupby("perturbations", as_index=False)[[c for c in (rate, f"{rate}_low", f"{rate}_high") if c in rows]].mean()
        x = rows["perturbations"].to_numpy(dtype=float) * 1.02 ** (i - (len(keys) - 1) / 2)
        colour, marker = looks[model]
        ax.plot(x, rows[rate], color=colour, ls=lines[generator], marker=marker, ms=3, mew=0, lw=0.9, zorder=3)
        if f"{rate}_low" in rows:
            ax.vlines(x, rows[f"{rate}_low"], rows[f"{rate}_high"], color=colour, lw=0.7, zorder=2)


def rows_of(frame: pd.DataFrame, level: float, q: float) -> list[tuple[str, str, pd.DataFrame]]:
    """Rows of panels as (column, label, rows of the study): coverage of all genes and of those of strongest prediction, FDR of all calls
    and by target, power, and error if known."""
    at_q = frame[frame["q"] == q]
    at_level = frame[frame["level"] == level]
    rows = [("coverage", f"coverage at {level:.0%},\nall genes", at_level)]
    if "coverage_strongest" in frame and at_level["coverage_strongest"].notna().any():
        rows.append(("coverage_strongest", f"coverage at {level:.0%},\nstrongest predictions", at_level))
    rows.append(("fdr", f"FDR at q = {q:g},\nall calls", at_q))
    if "fdr_target" in frame and frame["fdr_target"].notna().any():
        rows.append(("fdr_target", f"FDR at q = {q:g},\nmean over targets", at_q))
    rows.append(("power", f"power at q = {q:g}", at_q))
    errors = frame[frame["error_model"].str.startswith(ERROR)]
    errors = errors.assign(error_model=errors["error_model"].str.removeprefix(ERROR))
    if "mse_ratio" in frame and errors["mse_ratio"].notna().any():
        rows.append(("mse_ratio", "squared error over that\nof the neighbour mean", errors[errors["error_model"] != "neighbour_mean"]))
    return rows


def _looks(rows: list[tuple[str, str, pd.DataFrame]]) -> dict[str, tuple[str, str]]:
    """Colours and markers: those of error models and tests as in all figures, predictors in black and greys."""
    shown = {column: sorted(part.loc[part[column].notna(), "error_model"].unique()) for column, _, part in rows}
    predictors = style.method_order(shown.pop("mse_ratio", []))
    looks = style.error_looks([name for names in shown.values() for name in names])
    greys = (style.BLACK, style.GREY, style.DARK)
    return looks | {name: (greys[i % 3], style.MARKERS[i % len(style.MARKERS)]) for i, name in enumerate(predictors)}


BOUNDS = {"power_replicate": ("replicate", (0, (4, 2))), "power_ceiling": ("programme's effects known", (0, (1, 1)))}
"""Lines that power is placed beside: column, name and dash."""


def _bounds(ax: Axes, part: pd.DataFrame) -> None:
    for column, (name, dash) in BOUNDS.items():
        if column in part:
            rows = part.dropna(subset=[column]).groupby("perturbations", as_index=False)[column].mean()
            ax.plot(rows["perturbations"], rows[column], color=style.BLACK, lw=0.8, ls=dash, zorder=1, label=name)


def draw_study(*, study: str | Path, png: str | Path, pdf: str | Path, level: float = 0.95, q: float = 0.1) -> None:
    """Coverage at `level`, FDR and power at nominal `q`, and error, by difficulty (columns) and number of training perturbations (x).

    study: parquet with columns COLUMNS and, where it has them, coverage_strongest, fdr_target and mse_ratio, each with _low and
    _high; colours are error models (black and greys: predictors), dashes are generators. Grey
    dashes are nominal rates, black ones the power of a replicate and of calls by the targets' programmes, were they known.
    Raises UserError when a column is missing.
    """
    frame = _read(study)
    level, q = _at(frame, "level", level), _at(frame, "q", q)
    difficulties = list(dict.fromkeys(frame["difficulty"]))
    rows = rows_of(frame, level, q)
    looks = _looks(rows)
    lines = {g: LINES[i % len(LINES)] for i, g in enumerate(sorted(frame["generator"].unique()))}
    with style.sheet(style.PAGE, 24 + 34 * len(rows), png=png, pdf=pdf) as page:
        if frame.empty:
            style.empty(page.fig.subplots(), "The study holds no screen.")
            return
        axes = page.fig.subplots(len(rows), len(difficulties), squeeze=False, sharex=True, sharey="row")
        ticks = np.sort(frame["perturbations"].unique())
        for column, difficulty in enumerate(difficulties):
            for row, (rate, name, part) in enumerate(rows):
                ax = axes[row, column]
                part = part[part["difficulty"] == difficulty]
                _series(ax, part, rate, looks, lines)
                if rate == "power":
                    _bounds(ax, part)
                else:
                    at = {"coverage": level, "coverage_strongest": level, "mse_ratio": 1.0}.get(rate, q)
                    ax.axhline(at, color=style.GREY, lw=0.6, ls=(0, (4, 2)), zorder=1)
                ax.set_xscale("log")
                ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
                ax.minorticks_off()
                ax.grid(axis="y", color=style.LIGHT, lw=0.4)
                if column == 0:
                    ax.set_ylabel(name)
            axes[0, column].set_title(f"{difficulty} features\n({_screens(frame, difficulty)})")
            axes[-1, column].set_xlabel("training perturbations")
        for row in (i for i, (rate, *_) in enumerate(rows) if not rate.startswith("coverage")):
            axes[row, 0].set_ylim(bottom=-0.02 * axes[row, 0].get_ylim()[1])
        style.letter_panels(list(axes[:, 0]))
        _legend(page.fig, axes[0, 0], looks, lines)


def _screens(frame: pd.DataFrame, difficulty: str) -> str:
    screens = frame.loc[frame["difficulty"] == difficulty, "screens"]
    low, high = int(screens.min()), int(screens.max())
    return style.count(low, "screen") + " a point" if low == high else f"{low:,}–{high:,} screens a point"


def _legend(fig: Figure, ax: Axes, looks: dict, lines: dict) -> None:
    handles = [ax.plot([], [], color=c, marker=m, ms=3, mew=0, label=style.error_name(k))[0] for k, (c, m) in looks.items()]
    if len(lines) > 1:
        handles += [ax.plot([], [], color=style.DARK, ls=ls, label=f"generator: {g}")[0] for g, ls in lines.items()]
    for name, dash in BOUNDS.values():
        handles += ax.plot([], [], color=style.BLACK, lw=0.8, ls=dash, label=f"{name} (power)")
    fig.legend(handles=handles, loc="outside lower center", ncols=4)
