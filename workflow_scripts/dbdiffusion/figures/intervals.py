"""Predicted changes of genes with their intervals: of one held-out target beside what was observed, and of targets nobody measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from scipy.stats import norm

from dbdiffusion.figures import style
from dbdiffusion.figures.observed import observe, predicted
from dbdiffusion.figures.predicted_observed import top_genes

UNMEASURED_COLUMNS = 3
"""Targets side by side."""


def choose_genes(rows: pd.DataFrame, n: int) -> pd.DataFrame:
    """The n genes of largest |lfc| / se, called genes first; never chosen by the observation. Sorted by lfc."""
    lfc, se = rows["lfc"].to_numpy(), rows["se"].to_numpy()
    ratio = np.divide(np.abs(lfc), se, out=np.full(len(rows), np.nan), where=np.isfinite(se) & (se > 0))
    ratio = np.where(np.isnan(ratio), np.abs(lfc) * 1e-6, ratio)
    called = rows["call"].isin(["up", "down"]).to_numpy()
    span = np.nanmax(ratio) if np.isfinite(ratio).any() else 0.0
    chosen = rows.iloc[top_genes(ratio + called * (span + 1), n)]
    return chosen.sort_values("lfc", kind="stable")


def observed_share(rows: pd.DataFrame, truth: pd.DataFrame, level: float) -> tuple[float, int]:
    """Share of genes whose observed change is consistent with the interval, and their number.

    The observation has an error of its own, so the interval's half width h and the observation's z s are added in
    quadrature: |observed - lfc| <= sqrt(h^2 + (z s)^2).
    """
    truth = truth.reindex(rows.index)
    half = (rows["ci_high"] - rows["ci_low"]).to_numpy() / 2
    reach = np.hypot(half, norm.ppf(0.5 + level / 2) * truth["se"].to_numpy())
    miss = np.abs(truth["effect"].to_numpy() - (rows["ci_high"] + rows["ci_low"]).to_numpy() / 2)
    good = np.isfinite(reach) & np.isfinite(miss)
    return (float((miss[good] <= reach[good]).mean()) if good.any() else float("nan")), int(good.sum())


def _draw_rows(ax: Axes, part: pd.DataFrame, truth: pd.DataFrame | None, z: float) -> None:
    y = np.arange(len(part))
    ax.axvline(0, color=style.GREY, lw=0.6, zorder=0)
    for i in y[::2]:
        ax.axhspan(i - 0.5, i + 0.5, color="#F5F5F5", lw=0, zorder=-1)
    low, high = part["ci_low"].to_numpy(), part["ci_high"].to_numpy()
    shift = 0.16 if truth is not None else 0.0
    ax.hlines(y + shift, low, high, color=style.PREDICTED, lw=1.5, zorder=2)
    called = part["call"].isin(["up", "down"]).to_numpy()
    lfc = part["lfc"].to_numpy()
    ax.scatter(lfc[called], y[called] + shift, s=13, c=style.PREDICTED, linewidths=0.7, edgecolors=style.PREDICTED, zorder=3)
    ax.scatter(lfc[~called], y[~called] + shift, s=13, c="white", linewidths=0.7, edgecolors=style.PREDICTED, zorder=3)
    if truth is not None:
        seen = truth.reindex(part.index)
        ax.errorbar(
            seen["effect"],
            y - shift,
            xerr=z * seen["se"],
            fmt="D",
            ms=2.6,
            mew=0,
            color=style.OBSERVED,
            elinewidth=0.7,
            capsize=0,
            zorder=2,
        )
    ax.set_yticks(y, [style.short(str(g), 16) for g in part.index])
    ax.set_ylim(-0.6, len(part) - 0.4)
    ax.tick_params(axis="y", length=0)


def _mark_calls(ax: Axes, part: pd.DataFrame) -> None:
    """Arrows at the right edge: the call that was made."""
    for i, call in enumerate(part["call"]):
        if call in ("up", "down"):
            ax.annotate(
                "▲" if call == "up" else "▼",
                (1.0, i),
                xycoords=("axes fraction", "data"),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=5.5,
                color=style.CALL_COLOURS[call],
            )


def _abstained(rows: pd.DataFrame) -> str:
    """Why no gene has a call or an estimate, "" where some have."""
    if not (rows["call"] == "no_call").all():
        return ""
    reasons = [r for r in rows["reason"].unique() if r]
    return "abstained" + (f": {reasons[0]}" if reasons else "")


def _legend(ax: Axes, level: float, observed: bool, called: np.ndarray) -> None:
    look = {"color": style.PREDICTED, "ms": 3.6, "lw": 1.5}
    handles = []
    if called.any():
        handles += ax.plot([], [], "-o", label=f"predicted with {level:.0%} interval, called", **look)
    if not called.all():
        handles += ax.plot([], [], "-o", mfc="white", label=f"predicted with {level:.0%} interval, not called", **look)
    if observed:
        handles += ax.plot(
            [], [], "-D", color=style.OBSERVED, ms=2.6, lw=0.7, label=f"observed in half B, {level:.0%} interval of its own error"
        )
    ax.figure.legend(handles=handles, loc="outside lower center", alignment="left")


def draw_intervals(
    *,
    de: str | Path,
    moments: str | Path | None,
    target: str | list[str],
    png: str | Path,
    pdf: str | Path,
    method: str = "dbdiffusion",
    level: float = 0.95,
    genes: int = 30,
) -> None:
    """The `genes` genes of `target` with the largest |predicted change| / error: estimate, interval, call and observation.

    de: contract `de` (its intervals have coverage `level`); moments: moments.h5ad of the same seed, or None. Genes are chosen
    from the prediction alone. target: of several, the first that has an estimate is drawn.
    Filled points are called. Raises UserError when the method is not in the table.
    """
    found = predicted(de, method, [target] if isinstance(target, str) else target)
    if not isinstance(target, str):
        target = next((t for t in target if t in found and found[t]["lfc"].notna().any()), target[0])
    rows = found.get(target)
    part = choose_genes(rows, genes) if rows is not None else pd.DataFrame()
    truth = observe(moments, [target], list(rows.index)).get(target) if rows is not None else None
    with style.sheet(style.COLUMN, 34 + 3.6 * max(len(part), 4), png=png, pdf=pdf) as page:
        ax = page.fig.subplots()
        if part.empty:
            style.empty(ax, f"{target}: no estimate\n{_abstained(rows) if rows is not None else ''}".rstrip())
            return
        _draw_rows(ax, part, truth, float(norm.ppf(0.5 + level / 2)))
        _mark_calls(ax, part)
        ax.set_xlabel(f"change against control, {style.LFC}")
        called = int(rows["call"].isin(["up", "down"]).sum())
        title = f"{style.short(target, 24)}: {len(part)} of {style.count(len(rows), 'gene')}, {called} called"
        if truth is not None:
            share, n = observed_share(rows, truth, level)
            title += f"\nobserved within the interval: {share:.0%} of {style.count(n, 'gene')}"
        ax.set_title(f"{title}\n{_abstained(rows)}".rstrip())
        _legend(ax, level, truth is not None, part["call"].isin(["up", "down"]).to_numpy())


def draw_targets(
    *, de: str | Path, targets: list[str], png: str | Path, pdf: str | Path, method: str, level: float, genes: int = 12, most: int = 12
) -> None:
    """The first `most` targets that nobody measured, each with its `genes` genes of largest |predicted change| / error.

    de: contract `de`. Titles give calls, genes, confidence of the location and, but for combinations, its effective number of neighbours;
    targets without a panel are named or counted. Raises UserError when the method is not in the table.
    """
    found = predicted(de, method, targets)
    located = [target for target in targets if target in found and found[target]["lfc"].notna().any()]
    shown, more = located[:most], len(located[most:])
    lost = [target for target in targets if target in found and found[target]["lfc"].isna().all()]
    rows, columns = style.grid(len(shown), UNMEASURED_COLUMNS)
    width = {1: style.COLUMN, 2: 130.0}.get(columns, style.PAGE)
    with style.sheet(width, rows * (24 + 3.3 * genes) + 22, png=png, pdf=pdf) as page:
        if not shown:
            why = [f"{style.short(target, 24)}: {_abstained(found[target])}" for target in lost[:6]]
            style.empty(page.fig.subplots(), "\n".join(["No target was predicted.", *why]))
            return
        axes = page.fig.subplots(rows, columns, squeeze=False).ravel()
        called = []
        for ax, target in zip(axes, shown, strict=False):
            part = choose_genes(found[target], genes)
            _draw_rows(ax, part, None, 0.0)
            _mark_calls(ax, part)
            first, calls = found[target].iloc[0], found[target]["call"].isin(["up", "down"])
            called += part["call"].isin(["up", "down"]).tolist()
            # K_eff of a sum of located parts says nothing.
            near = "" if "+" in target else f", K_eff {first['k_eff']:.1f}"
            state = _abstained(found[target]).replace(": ", ":\n") or f"confidence {first['confidence']:.2f}{near}"
            ax.set_title(f"{style.short(target, 24)}\n{int(calls.sum()):,}/{len(calls):,} called\n{state}")
        for ax in axes[len(shown) :]:
            ax.set_visible(False)
        for ax in axes[max(0, len(shown) - columns) : len(shown)]:
            ax.set_xlabel(f"change against control,\n{style.LFC}")
        style.letter_panels(list(axes[: len(shown)]))
        _legend(axes[0], level, False, np.array(called))
        notes = [style.as_many_as_fit(page.fig, "no estimate (see the table of calls) of ", lost, width - 6, 6.5)] if lost else []
        notes += [f"{style.count(more, 'further target')} in the table of calls"] if more else []
        if notes:
            page.fig.suptitle("\n".join(notes), fontsize=6.5)
