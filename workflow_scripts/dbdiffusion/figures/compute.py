"""What the run cost, per rule."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dbdiffusion.figures import style
from dbdiffusion.runtime import contracts


def time_unit(longest: float) -> tuple[float, str]:
    """Seconds per unit and the unit's name in which `longest` seconds read well."""
    if longest >= 2 * 3600:
        return 3600.0, "h"
    return (60.0, "min") if longest >= 120 else (1.0, "s")


def _short(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"


def _bars(ax: Axes, values: np.ndarray, colours: list[str], text: list[str]) -> None:
    y = np.arange(len(values))
    ax.barh(y, values, height=0.66, color=colours, lw=0)
    for i, (value, label) in enumerate(zip(values, text, strict=True)):
        ax.annotate(label, (value, i), xytext=(2.5, 0), textcoords="offset points", va="center", fontsize=6, color=style.DARK)
    ax.set_xlim(0, max(float(values.max()), 1e-9) * 1.28)
    ax.tick_params(axis="y", length=0)


def draw_compute(*, compute: str | Path, png: str | Path, pdf: str | Path, cap: int = 40) -> None:
    """Wall time summed over jobs and peak memory of each rule (contract `compute`), the `cap` dearest rules."""
    table = contracts.COMPUTE.read(compute).astype({"rule": str, "device": str})
    everything, jobs = float(table["seconds"].sum()), int(table["jobs"].sum())
    dropped = max(0, len(table) - cap)
    table = table.sort_values(["seconds", "rule", "device"], ascending=[False, True, True], ignore_index=True).head(cap)
    with style.sheet(style.PAGE, 26 + 4.6 * max(len(table), 3), png=png, pdf=pdf) as page:
        if table.empty:
            style.empty(page.fig.subplots(), "No job was recorded.")
            return
        gpu = bool(table["gpu_memory"].notna().any())
        axes = page.fig.subplots(1, 3 if gpu else 2, sharey=True)
        unit, name = time_unit(float(table["seconds"].max()))
        accelerated = ~table["device"].str.startswith("cpu") & (table["device"] != "")
        colours = [style.VERMILLION if a else style.BLUE for a in accelerated]
        time = table["seconds"].to_numpy() / unit
        _bars(axes[0], time, colours, [f"{_short(t)} ({style.count(j, 'job')})" for t, j in zip(time, table["jobs"], strict=True)])
        axes[0].set_xlabel(f"wall time, summed over jobs ({name})")
        total_unit, total_name = time_unit(everything)
        more = f"; {dropped} cheaper rules not shown" if dropped else ""
        axes[0].set_title(f"Time: {everything / total_unit:.3g} {total_name} in {style.count(jobs, 'job')}{more}")
        memory = table["peak_memory"].to_numpy()
        _bars(axes[1], memory, colours, [_short(m) for m in memory])
        axes[1].set_xlabel("largest resident memory of a job (GiB)")
        axes[1].set_title("Memory")
        if gpu:
            values = table["gpu_memory"].to_numpy()
            _bars(axes[2], np.nan_to_num(values), colours, [_short(v) if np.isfinite(v) else "" for v in values])
            axes[2].set_xlabel("largest GPU memory of a job (GiB)")
            axes[2].set_title("GPU memory")
        several = table["device"].nunique() > 1
        axes[0].set_yticks(range(len(table)), _row_names(table, several))
        axes[0].set_ylim(len(table) - 0.4, -0.6)
        style.letter_panels(list(axes))
        if accelerated.any() and not accelerated.all():
            _legend(page.fig)


def _row_names(table: pd.DataFrame, several: bool) -> list[str]:
    twice = table["rule"].duplicated(keep=False)
    return [style.short(f"{r} [{d}]" if several and t else r, 34) for r, d, t in zip(table["rule"], table["device"], twice, strict=True)]


def _legend(fig: Figure) -> None:
    handles = [Patch(color=c, lw=0, label=t) for c, t in ((style.BLUE, "CPU"), (style.VERMILLION, "GPU"))]
    fig.legend(handles=handles, loc="outside lower center", ncols=2)
