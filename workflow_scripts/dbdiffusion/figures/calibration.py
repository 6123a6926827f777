"""Do intervals and calls keep what they promise?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from dbdiffusion.figures import style
from dbdiffusion.inference.bands import PER_TARGET, POOLED
from dbdiffusion.runtime import contracts

CHECK_NAMES = {
    "control_guides_fdr": "control guides with a call",
    "permuted_labels_targets": "targets with a call,\nlabels permuted",
    "permuted_labels_calls": "genes called,\nlabels permuted",
    "shuffled_effects_calls": "genes called,\neffects dealt out",
    "shuffled_effects_fdr": "false calls,\neffects dealt out",
    "equivalence": "equivalent genes called",
    "sign_error": "calls of wrong sign",
    "sign_error_truth": "calls of wrong true sign",
    "doubling_calls": "calls changed by\ntwice the cells",
}
"""Checks drawn as one row each; the level is their limit."""
ONE_RATE = {"control_guides_fdr": "per guide", "permuted_labels_targets": "per target"}
"""Stratum in which a check's rate is drawn, where it is not `pooled`."""
PREDICTOR_NAMES = {"": "default", "lambda_0": "λ = 0", "lambda_1": "λ = 1"}
TRUTH_STRATA = {
    "per target": "true effect, all genes",
    "affected genes": "true effect, affected",
    "unaffected genes": "true effect, unaffected",
}
UNDRAWN = ("power_replicate", "fdr_replicate", "control_guides_ks", "permuted_labels_ks")
"""Checks whose methods have no entry of their own in the legend."""
RATE = 0.1
"""Nominal FDR of the panels that show one rate."""
DASHED = {"color": style.GREY, "lw": 0.6, "ls": (0, (4, 2)), "zorder": 1}
MAX_STRATA = 16
Looks = dict[str, tuple[str, str]]


def rows_of(table: pd.DataFrame, check: str, stratum: str | None) -> pd.DataFrame:
    """The rows of a check that have a value, of one stratum or of every one (None)."""
    part = table[(table["check"] == check) & table["value"].notna()]
    return part if stratum is None else part[part["stratum"] == stratum]


def _line(ax: Axes, part: pd.DataFrame, x: np.ndarray, colour: str, marker: str, ls: str | tuple = "-") -> None:
    """Values joined by a line, with their bands as bars."""
    known = (part["low"].notna() & part["high"].notna()).to_numpy()
    ax.plot(x, part["value"], color=colour, marker=marker, ms=3.2, lw=0.9, ls=ls, mew=0, zorder=3)
    ax.vlines(x[known], part["low"].to_numpy()[known], part["high"].to_numpy()[known], color=colour, lw=0.8, zorder=2)


def _lines(ax: Axes, part: pd.DataFrame, looks: Looks) -> None:
    """Value against level, one line per method, dodged by a little so that bands can be told apart."""
    levels = np.sort(part["level"].unique())
    shift = 0.012 * float(np.ptp(levels)) if len(levels) > 1 else 0.004
    methods = [m for m in looks if m in set(part["method"])]
    for i, method in enumerate(methods):
        rows = part[part["method"] == method].sort_values("level")
        _line(ax, rows, rows["level"].to_numpy() + shift * (i - (len(methods) - 1) / 2), *looks[method])


def _trials(part: pd.DataFrame, noun: str) -> str:
    """The number of trials, or its range over rows, and what they are."""
    low, high = int(part["n"].min()), int(part["n"].max())
    return style.count(low, noun) if low == high else f"{low:,}–{style.count(high, noun)}"


def _coverage(ax: Axes, table: pd.DataFrame, looks: Looks) -> None:
    part = rows_of(table, "coverage", PER_TARGET)
    _lines(ax, part, looks)
    ax.plot([0, 1], [0, 1], **DASHED)
    low = float(part[["value", "low", "level"]].min().min())
    ax.set_xlim(max(0.0, float(part["level"].min()) - 0.06), 1.01)
    ax.set_ylim(max(0.0, low - 0.04), 1.01)
    ax.set_xlabel("nominal coverage")
    ax.set_ylabel("observed coverage")
    ax.set_title(f"Coverage ({_trials(part, 'target')})")


def _width(ax: Axes, table: pd.DataFrame, looks: Looks) -> None:
    both = rows_of(table, "coverage", PER_TARGET).merge(
        rows_of(table, "width", PER_TARGET), on=["method", "level"], suffixes=("", "_width")
    )
    for method in [m for m in looks if m in set(both["method"])]:
        rows = both[both["method"] == method].sort_values("level")
        colour, marker = looks[method]
        ax.plot(rows["value"], rows["value_width"], color=colour, lw=0.8, marker=marker, ms=3.2, mew=0, zorder=2)
        ax.plot(rows["value"].iloc[-1], rows["value_width"].iloc[-1], marker="o", ms=6, mfc="none", mec=colour, mew=0.7, zorder=3)
    top = float(both["level"].max())
    ax.axvline(top, **DASHED)
    if both["value_width"].min() > 0 and both["value_width"].max() / both["value_width"].min() > 20:
        ax.set_yscale("log")
        style.log_ticks(ax.yaxis)
    else:
        ax.set_ylim(bottom=0)
    ax.set_xlabel(f"observed coverage (ring: nominal {top:.0%})")
    ax.set_ylabel(f"mean width, {style.LFC}")
    ax.set_title("Width against coverage")


def _quantiles(ax: Axes, table: pd.DataFrame, looks: Looks, check: str, title: str) -> None:
    """Quantiles of p against those of uniform p, with the band of uniform p."""
    part = rows_of(table, check, POOLED)
    ax.plot([0, 1], [0, 1], **DASHED)
    for i, method in enumerate(m for m in looks if m in set(part["method"])):
        rows = part[part["method"] == method].sort_values("level")
        ax.plot(rows["level"], rows["value"], color=looks[method][0], lw=1.0, zorder=3)
        if i == 0:
            # The band is that of uniform p, about the diagonal: the same for all methods but for their number of trials.
            ax.fill_between(rows["level"], rows["low"], rows["high"], color=style.LIGHT, alpha=0.7, lw=0, zorder=0)
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    ax.set_xlabel("expected quantile of p")
    ax.set_ylabel("observed p")
    ax.set_title(f"{title} ({_trials(part, 'p value')})")


def _guides(ax: Axes, table: pd.DataFrame, looks: Looks) -> None:
    _quantiles(ax, table, looks, "control_guides_p", "Control guides")


def _permuted(ax: Axes, table: pd.DataFrame, looks: Looks) -> None:
    _quantiles(ax, table, looks, "permuted_labels_p", "Permuted labels")
    ax.annotate("above: cautious", (0.04, 0.93), xycoords="axes fraction", fontsize=6, color=style.DARK)
    ax.annotate("below: false calls", (0.96, 0.04), xycoords="axes fraction", fontsize=6, color=style.DARK, ha="right")


def _doubled(ax: Axes, table: pd.DataFrame, _: Looks) -> None:
    """Quantiles over pairs of the change of log10 p with twice the cells, of the default prediction and of the generator."""
    part = rows_of(table, "doubling_log10_p", POOLED)
    levels = np.sort(part["level"].unique())
    for method, colour, marker, name in (
        ("t:lambda_1", style.SKY, "D", "dbDiffusion, λ = 1"),
        ("t:dbdiffusion", style.OURS["dbdiffusion"], "s", "dbDiffusion, λ tuned"),
        ("t", style.OURS["stacked"], "o", "default"),
    ):
        rows = part[part["method"] == method].sort_values("level")
        if len(rows):
            at = np.searchsorted(levels, rows["level"].to_numpy())
            ax.plot(at, rows["value"], color=colour, marker=marker, ms=3.2, lw=0.9, mew=0, label=name)
            top, text = float(rows["value"].iloc[-1]), {"fontsize": 6, "color": colour, "ha": "right"}
            ax.annotate(f"{top:.2g}", (at[-1], top), xytext=(-4, 2), textcoords="offset points", **text)
    ax.set_xticks(range(len(levels)), ["median" if q == 0.5 else "largest" if q == 1 else f"{q:.0%}" for q in levels])
    ax.set_xlim(-0.4, len(levels) - 0.6)
    ax.set_ylim(0, max(1.2 * float(part["value"].max()), 0.02))
    ax.legend(loc="upper left")
    ax.set_xlabel("quantile over targets and genes")
    ax.set_ylabel("change of log10 p (t)")
    ax.set_title("Twice the generated cells")


def default_only(part: pd.DataFrame) -> pd.DataFrame:
    """Rows of the default prediction: methods written TEST:PREDICTOR belong to other predictors."""
    return part[~part["method"].str.contains(":", regex=False)]


def _replicate(ax: Axes, part: pd.DataFrame) -> pd.DataFrame:
    """The replicate's rate by level, as a black dashed line; returns what was drawn."""
    part = part.sort_values("level")
    if len(part):
        _line(ax, part, part["level"].to_numpy(), style.BLACK, "_", (0, (4, 2)))
    return part


def _rates(ax: Axes, table: pd.DataFrame, looks: Looks, check: str, replicate: pd.DataFrame) -> None:
    """False among all calls against the nominal rate; thin and hollow: its mean over targets."""
    pooled, mean = (default_only(rows_of(table, check, stratum)) for stratum in (POOLED, PER_TARGET))
    for method in [m for m in looks if m in set(mean["method"])]:
        rows = mean[mean["method"] == method].sort_values("level")
        colour, marker = looks[method]
        ax.plot(rows["level"], rows["value"], color=colour, lw=0.6, ls=(0, (1, 1.5)), marker=marker, ms=3, mfc="white", mew=0.6, zorder=2)
    if len(pooled):
        _lines(ax, pooled[pooled["method"].isin(looks)], looks)
    drawn = _replicate(ax, replicate)
    ax.plot([0, 1], [0, 1], **DASHED)
    ax.fill_between([0, 1], [0, 1], [0, 0], color=style.GREEN, alpha=0.08, lw=0, zorder=0)
    right = max(float(mean["level"].max()) * 1.15, 0.02)
    ax.set_xlim(0, right)
    ax.set_ylim(0, min(1.03, max(right, 1.05 * float(pd.concat([mean, pooled, drawn])[["value", "high"]].max().max()))))
    ax.set_xlabel("nominal FDR q")
    ax.set_ylabel("observed FDR")


def _discoveries(ax: Axes, table: pd.DataFrame, looks: Looks) -> None:
    _rates(ax, table, looks, "fdr", rows_of(table, "fdr_replicate", POOLED))
    ax.set_title(f"False discoveries ({_trials(rows_of(table, 'fdr', PER_TARGET), 'target')})")


def _truth(ax: Axes, table: pd.DataFrame, looks: Looks) -> None:
    own = rows_of(table, "fdr_truth", POOLED)
    _rates(ax, table, looks, "fdr_truth", own[own["method"] == "replicate"])
    ax.set_ylabel("false calls in truth")
    ax.set_title("Against the simulated truth")


def _power(ax: Axes, table: pd.DataFrame, looks: Looks) -> None:
    part = default_only(rows_of(table, "power", POOLED))
    _lines(ax, part, looks)
    replicate = _replicate(ax, rows_of(table, "power_replicate", POOLED))
    high = float(pd.concat([part, replicate])[["value", "high"]].max().max())
    ax.set_xlim(0, max(float(part["level"].max()) * 1.15, 0.02))
    ax.set_ylim(0, min(1.02, 1.15 * high + 0.02))
    ax.set_xlabel("nominal FDR q")
    ax.set_ylabel("share of DE genes called")
    ax.set_title(f"Power ({_trials(part, 'DE gene')})")


def predictors(table: pd.DataFrame) -> pd.DataFrame:
    """FDR and power of every test of every predictor at the rate nearest to RATE: columns test, predictor, level, fdr, power.

    Both are pooled over targets; a predictor without calls has FDR 0.
    """
    rates = table[(table["check"] == "fdr") & (table["stratum"] == POOLED)]
    both = rates.merge(rows_of(table, "power", POOLED), on=["method", "level"], suffixes=("", "_power"))
    parts = [method.partition(":") for method in both["method"]]
    both = both.assign(
        test=[p[0] for p in parts], predictor=[p[2] for p in parts], fdr=both["value"].fillna(0.0), power=both["value_power"]
    )
    distance = (both["level"] - RATE).abs()
    both = both[distance == distance.min()] if len(both) else both
    return both.loc[both["test"].isin(style.ERROR_LOOKS), ["test", "predictor", "level", "fdr", "power"]].reset_index(drop=True)


def distinct(part: pd.DataFrame, width: float, height: float) -> pd.DataFrame:
    """Predictors that a test cannot tell apart on the page, as one row: columns test, fdr, power, default (bool), name.

    part: as `predictors` returns it; width, height: what two rows of a group may differ by in FDR and in power. The name
    is that of the predictor, of two predictors, or their number.
    """
    rows = []
    for test, found in part.groupby("test", sort=True):
        left = found.sort_values(["power", "fdr", "predictor"], ascending=[False, True, True])
        while len(left):
            first = left.iloc[0]
            near = ((left["fdr"] - first["fdr"]).abs() <= width) & ((left["power"] - first["power"]).abs() <= height)
            group, left = left[near], left[~near]
            names = [PREDICTOR_NAMES.get(p) or style.method_name(p) for p in style.method_order(group["predictor"])]
            others = [n for n in names if n != "default"]
            start = ["default"] * ("default" in names)
            end = others if len(others) <= 2 - len(start) else [f"{len(others)} others" if start else f"{len(others)} predictors"]
            rows.append(
                {
                    "test": test,
                    "fdr": group["fdr"].mean(),
                    "power": group["power"].mean(),
                    "default": bool(start),
                    "name": ",\n".join(start + end),
                }
            )
    return pd.DataFrame(rows, columns=["test", "fdr", "power", "default", "name"])


def _trade(page: style.Sheet, ax: Axes, table: pd.DataFrame, looks: Looks) -> None:
    """Power against FDR of all predictors, those that coincide as one marker; the default prediction has an outline."""
    part = predictors(table)
    level = float(part["level"].iloc[0])
    right, top = min(1.6 * max(float(part["fdr"].max()), 1.2 * level), 1.4), 1.25 * max(float(part["power"].max()), 0.02)
    groups = distinct(part, 0.06 * right, 0.06 * top)
    for row in groups.itertuples():
        colour, marker = looks.get(row.test, style.ERROR_LOOKS[row.test])
        edge = {"edgecolors": style.BLACK, "linewidths": 0.8} if row.default else {"linewidths": 0}
        ax.scatter(row.fdr, row.power, s=26, marker=marker, c=colour, zorder=3, clip_on=False, **edge)
    ax.axvspan(0, level, color=style.GREEN, alpha=0.08, lw=0, zorder=0)
    ax.axvline(level, **DASHED)
    ax.set_xlim(-0.04 * right, right)
    lowest = float(part["power"].min())
    ax.set_ylim(-0.05 * top if lowest < 0.3 * top else 0.7 * lowest, top)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    page.label(ax, groups["fdr"].to_numpy(), groups["power"].to_numpy(), groups["name"].tolist(), linespacing=1.0, fontsize=5.5)
    ax.set_xlabel("observed FDR")
    ax.set_ylabel("share of DE genes called")
    ax.set_title(f"Predictors at q = {level:g}")


def _stratum_order(stratum: str) -> tuple[str, int, str]:
    """Groups stay together; within a group low before middle before high."""
    for i, word in enumerate(
        ("lowest", "low", "small", "near", "few", "middle", "medium", "mid", "high", "large", "far", "many", "highest")
    ):
        if stratum.endswith(word):
            return stratum[: -len(word)], i, ""
    return stratum, 0, stratum


def _dots(ax: Axes, part: pd.DataFrame, column: str, names: dict[str, str], looks: Looks, *, xlabel: str, title: str) -> None:
    """One row per entry of `names`, methods side by side in it; a grey tick marks each row's nominal level."""
    methods = [m for m in looks if m in set(part["method"])]
    step = 0.7 / max(len(methods), 1)
    for y, key in enumerate(names):
        for i, method in enumerate(methods):
            row = part[(part[column] == key) & (part["method"] == method)]
            if row.empty:
                continue
            row, at = row.iloc[0], y + step * (i - (len(methods) - 1) / 2)
            colour, marker = looks[method]
            if np.isfinite(row["low"]) and np.isfinite(row["high"]):
                ax.plot([row["low"], row["high"]], [at, at], color=colour, lw=0.8, zorder=2)
            ax.plot(row["value"], at, marker=marker, ms=3, mew=0, color=colour, zorder=3)
        ax.vlines(part.loc[part[column] == key, "level"].unique(), y - 0.42, y + 0.42, color=style.GREY, lw=1.0, zorder=1)
        if y % 2:
            ax.axhspan(y - 0.5, y + 0.5, color="#F5F5F5", lw=0, zorder=-1)
    ax.set_yticks(range(len(names)), list(names.values()))
    ax.set_ylim(len(names) - 0.45, -0.55)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel(xlabel)
    ax.set_title(title)


def _nearest_level(part: pd.DataFrame, wanted: float) -> pd.DataFrame:
    """Of each check and method, the rows at the level nearest to the wanted one."""
    distance = (part["level"] - wanted).abs()
    return part[distance == distance.groupby([part["check"], part["method"]]).transform("min")]


def _checks(ax: Axes, part: pd.DataFrame, looks: Looks) -> None:
    names = {check: label for check, label in CHECK_NAMES.items() if check in set(part["check"])}
    _dots(ax, part, "check", names, looks, xlabel="rate (grey: limit)", title=f"Null checks and sign (at q = {RATE:g})")
    right = 1.06 * float(np.nanmax(part[["value", "high", "level"]].to_numpy()))
    ax.set_xlim(min(-0.03 * right, 1.05 * float(part["value"].min())), right)


def _strata(ax: Axes, part: pd.DataFrame, looks: Looks) -> None:
    strata = sorted(part["stratum"].unique(), key=_stratum_order)[:MAX_STRATA]
    names = {s: style.short(s.replace("k_eff", "K_eff:"), 28) for s in strata}
    level = float(part["level"].iloc[0])
    _dots(ax, part, "stratum", names, looks, xlabel=f"observed coverage (grey: nominal {level:.0%})", title="Coverage by stratum")


def _panels(table: pd.DataFrame) -> tuple[list[Callable], list[tuple[Callable, pd.DataFrame]]]:
    """The curve panels and the dot panels that the table can fill."""
    curves: list[Callable] = []
    for check, stratum, draw in (
        ("coverage", PER_TARGET, _coverage),
        ("width", PER_TARGET, _width),
        ("control_guides_p", POOLED, _guides),
        ("fdr", PER_TARGET, _discoveries),
        ("power", POOLED, _power),
    ):
        if len(default_only(rows_of(table, check, stratum))) and (check != "width" or len(rows_of(table, "coverage", PER_TARGET))):
            curves.append(draw)
    if (predictors(table)["predictor"] != "").any():
        curves.append(_trade)
    for check, stratum, draw in (
        ("permuted_labels_p", POOLED, _permuted),
        ("doubling_log10_p", POOLED, _doubled),
        ("fdr_truth", PER_TARGET, _truth),
    ):
        if len(rows_of(table, check, stratum)):
            curves.append(draw)
    checks = default_only(table[table["check"].isin(CHECK_NAMES) & table["value"].notna() & (table["method"] != "replicate")])
    checks = checks[checks["stratum"] == checks["check"].map(ONE_RATE).fillna(POOLED)]
    groups = rows_of(table, "coverage", None)
    true = rows_of(table, "coverage_truth", None)
    strata = pd.concat([groups[groups["stratum"] != PER_TARGET], true.assign(stratum=true["stratum"].map(TRUTH_STRATA), check="coverage")])
    dots = []
    if len(checks):
        dots.append((_checks, _nearest_level(checks, RATE)))
    if len(strata):
        dots.append((_strata, _nearest_level(strata, 0.95)))
    return curves, dots


def _dots_height(dots: list[tuple[Callable, pd.DataFrame]]) -> float:
    """Millimetres that the dot panels need."""
    rows = [len(part.groupby(["check", "stratum"])) * max(5.5, 1.3 * part["method"].nunique()) for _, part in dots]
    return min(120.0, 20 + max(rows, default=0)) if dots else 0.0


def draw_calibration(*, calibration: str | Path, png: str | Path, pdf: str | Path) -> None:
    """Coverage, width, null p, FDR, power, doubling, truth and further checks (contract `calibration`), one colour per error model or test.

    Panels without data in the table are left out. Bars and shades are the 95 % bands of the table; grey dashes are the nominal rates.
    """
    table = contracts.CALIBRATION.read(calibration).astype({"check": str, "method": str, "stratum": str})
    drawn = default_only(table.loc[~table["check"].isin(UNDRAWN) & (table["method"] != "replicate")])
    looks = style.error_looks(drawn["method"].unique())
    curves, dots = _panels(table)
    rows, columns = style.grid(len(curves), 3)
    above, below = 57.0 * rows if curves else 0.0, _dots_height(dots)
    with style.sheet(style.PAGE, max(above + below + 9, 40), png=png, pdf=pdf) as page:
        if not curves and not dots:
            style.empty(page.fig.subplots(), "No calibration check could be run.")
            return
        outer = page.fig.add_gridspec(2, 1, height_ratios=(max(above, 1e-3), max(below, 1e-3)))
        inner = outer[0].subgridspec(rows, columns)
        axes = [page.fig.add_subplot(inner[divmod(i, columns)]) for i in range(len(curves))]
        for ax, draw in zip(axes, curves, strict=True):
            draw(page, ax, table, looks) if draw is _trade else draw(ax, table, looks)
        inner = outer[1].subgridspec(1, max(1, len(dots)))
        more = [page.fig.add_subplot(inner[0, i]) for i in range(len(dots))]
        for ax, (draw, part) in zip(more, dots, strict=True):
            draw(ax, part, looks)
        style.letter_panels([*axes, *more])
        _legend(page, [*axes, *more][0], looks, table)


def _legend(page: style.Sheet, ax: Axes, looks: Looks, table: pd.DataFrame) -> None:
    handles = [ax.plot([], [], color=c, marker=m, ms=3.2, mew=0, label=style.error_name(k))[0] for k, (c, m) in looks.items()]
    if len(rows_of(table, "fdr", PER_TARGET)):
        thin = {"lw": 0.6, "ls": (0, (1, 1.5)), "marker": "o", "ms": 3, "mfc": "white", "mew": 0.6}
        handles += ax.plot([], [], color=style.DARK, label="FDR: mean over targets", **thin)
    if len(rows_of(table, "power_replicate", POOLED)):
        handles += ax.plot([], [], color=style.BLACK, lw=0.9, ls=(0, (4, 2)), label=style.ERROR_NAMES["replicate"])
    page.fig.legend(handles=handles, loc="outside lower center", ncols=5 if len(handles) <= 10 else 4)
