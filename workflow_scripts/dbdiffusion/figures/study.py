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
RATES = (("coverage", "coverage"), ("fdr", "false discovery rate"), ("power", "power"))


def _read(study: str | Path) -> pd.DataFrame:
    frame = pd.read_parquet(study)
    absent = [c for c in COLUMNS if c not in frame.columns]
    if absent:
        raise UserError(f"column(s) {absent} missing; found {list(frame.columns)}", where=str(study), fix="run the calibration study again")
    frame = frame.astype({"difficulty": str, "generator": str, "error_model": str})
    return frame[frame[[rate for rate, _ in RATES]].notna().any(axis=1)]


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


def _replicate(ax: Axes, part: pd.DataFrame) -> None:
    rows = part.dropna(subset=["power_replicate"]).groupby("perturbations", as_index=False)["power_replicate"].mean()
    if len(rows):
        ax.plot(rows["perturbations"], rows["power_replicate"], color=style.BLACK, lw=0.8, ls=(0, (4, 2)), zorder=1, label="replicate")


def draw_study(*, study: str | Path, png: str | Path, pdf: str | Path, level: float = 0.95, q: float = 0.1) -> None:
    """Coverage at `level`, FDR and power at nominal `q` by difficulty (columns) and number of training perturbations (x).

    study: parquet with columns COLUMNS, each rate with _low and _high; colours are error models, dashes are generators.
    Grey dashes are nominal rates, the black dashed line the replicate's power. Raises UserError when a column is missing.
    """
    frame = _read(study)
    level, q = _at(frame, "level", level), _at(frame, "q", q)
    difficulties = list(dict.fromkeys(frame["difficulty"]))
    looks = style.error_looks(frame["error_model"].unique())
    lines = {g: LINES[i % len(LINES)] for i, g in enumerate(sorted(frame["generator"].unique()))}
    with style.sheet(style.PAGE, 140, png=png, pdf=pdf) as page:
        if frame.empty:
            style.empty(page.fig.subplots(), "The study holds no screen.")
            return
        axes = page.fig.subplots(3, len(difficulties), squeeze=False, sharex=True, sharey="row")
        ticks = np.sort(frame["perturbations"].unique())
        for column, difficulty in enumerate(difficulties):
            for row, (rate, name) in enumerate(RATES):
                ax = axes[row, column]
                part = frame[frame["difficulty"] == difficulty]
                part = part[part["level"] == level] if rate == "coverage" else part[part["q"] == q]
                _series(ax, part, rate, looks, lines)
                if rate == "power":
                    _replicate(ax, part)
                else:
                    ax.axhline(level if rate == "coverage" else q, color=style.GREY, lw=0.6, ls=(0, (4, 2)), zorder=1)
                ax.set_xscale("log")
                ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
                ax.minorticks_off()
                ax.grid(axis="y", color=style.LIGHT, lw=0.4)
                if column == 0:
                    ax.set_ylabel(f"{name} at {level:.0%}" if rate == "coverage" else f"{name} at q = {q:g}")
            axes[0, column].set_title(f"{difficulty} ({_screens(frame, difficulty)})")
            axes[2, column].set_xlabel("training perturbations")
        for row in (1, 2):
            axes[row, 0].set_ylim(bottom=0)
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
    handles += ax.plot([], [], color=style.BLACK, lw=0.8, ls=(0, (4, 2)), label="replicate (power)")
    fig.legend(handles=handles, loc="outside lower center", ncols=4)
