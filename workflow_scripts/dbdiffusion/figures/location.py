"""Where held-out targets were located in the embedding, and where their own effects put them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dbdiffusion.data.moments import Moments
from dbdiffusion.data.sets import CONTROL, EffectSet
from dbdiffusion.figures import maps, style
from dbdiffusion.figures.cells import neighbours_of
from dbdiffusion.perturbations.effects import estimate_effects, gene_scale
from dbdiffusion.runtime import contracts

MAX_ROWS = 40
MAX_NAMES = 10
MAX_TRAINING_NAMES = 6
"""Targets and training perturbations that are named in the map: those of largest effect."""


def wide(embedding: str | Path) -> tuple[pd.DataFrame, pd.Series]:
    """Coordinates (perturbation x dimension) and roles of contract `embedding`, part effects."""
    frame = contracts.EMBEDDING.read(embedding).astype({"part": str, "perturbation": str, "role": str})
    frame = frame[frame["part"] == "effects"]
    place = frame.pivot(index="perturbation", columns="dimension", values="value")
    return place, frame.drop_duplicates("perturbation").set_index("perturbation")["role"]


def true_places(place: pd.DataFrame, roles: pd.Series, effects: EffectSet, measured: EffectSet, scale: str) -> np.ndarray:
    """Coordinates (T, D) of measured effects in an embedding that was learned without them.

    Coordinates are linear in scaled effects, so the map is the least-squares solution of smallest norm over the
    perturbations the embedding was learned from: it equals the embedding's own loadings.
    """
    learned = effects.subset([p for p in effects.perturbations if roles.get(p) == "train"])
    unit = gene_scale(learned.se) if scale == "standard_error" else learned.effect.std(axis=0)
    unit = np.where(unit > 1e-12, unit, np.inf)
    origin = place.loc[CONTROL].to_numpy()
    loadings = np.linalg.pinv(learned.effect / unit, rcond=1e-10) @ (place.loc[learned.perturbations].to_numpy() - origin)
    return origin + (measured.effect / unit) @ loadings


def _ranks(place: np.ndarray, truth: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per target: distance located to true, distance of the training mean to true, share of training perturbations nearer to the truth."""
    own = np.linalg.norm(place - truth, axis=1)
    mean = np.linalg.norm(others.mean(axis=0) - truth, axis=1)
    each = np.linalg.norm(others[None] - truth[:, None], axis=2)
    return own, mean, (each < own[:, None]).mean(axis=1)


def draw_location(
    *,
    embedding: str | Path,
    effects: str | Path,
    moments: str | Path,
    locations: str | Path,
    clusters: str | Path,
    targets: list[str],
    png: str | Path,
    pdf: str | Path,
    scale: str = "standard_error",
) -> None:
    """Located against true place of each target: a map of the first two coordinates, and distances beside the training mean's.

    embedding: contract `embedding` of one cross-fit model; effects: the fold's effects (training); moments: of the same seed,
    read for the targets' truth; clusters: of the fold, for those of the training perturbations; targets: held-out perturbations of the
    fold; scale: config embedding.scale.
    Targets that were not located or not measured are listed without a distance.
    """
    place, roles = wide(embedding)
    training = EffectSet.read(effects)
    table = Moments.read(moments)
    located = [t for t in targets if roles.get(t) == "target"]
    both = [t for t in located if t in set(table.perturbations)]
    truth = (
        true_places(place, roles, training, estimate_effects(table, both, training.genes), scale) if both else np.zeros((0, place.shape[1]))
    )
    training_places = place.loc[roles.index[roles == "train"]]
    others = training_places.to_numpy()
    cluster = maps.read(clusters, "perturbation").set_index("name")["cluster"]
    rows = min(max(len(both), 4), MAX_ROWS)
    with style.sheet(style.PAGE, max(78.0, 26 + 4.2 * rows), png=png, pdf=pdf) as page:
        map_axes, bar_axes = page.fig.subplots(1, 2, width_ratios=(1.0, 1.1))
        _map(page, map_axes, training_places, cluster, place, both, located, truth)
        if both:
            _distances(bar_axes, place, both, truth, others, locations)
        else:
            style.empty(bar_axes, "No located target was measured.")
        style.letter_panels([map_axes, bar_axes])
        missing = len(targets) - len(located)
        _legend(page.fig, map_axes, f"{missing} of {style.count(len(targets), 'target')} not locatable" if missing else "")


def _map(
    page: style.Sheet,
    ax: Axes,
    training: pd.DataFrame,
    cluster: pd.Series,
    place: pd.DataFrame,
    both: list[str],
    located: list[str],
    truth: np.ndarray,
) -> None:
    second = min(1, place.shape[1] - 1)
    others = training.to_numpy()
    ax.scatter(others[:, 0], others[:, second], s=7, c=style.LIGHT, linewidths=0, zorder=1)
    if CONTROL in place.index:
        ax.plot(place.loc[CONTROL].iloc[0], place.loc[CONTROL].iloc[second], "+", color=style.BLACK, ms=6, mew=1, zorder=4)
    for target, true in zip(both, truth, strict=True):
        at = place.loc[target].to_numpy()
        ax.plot([at[0], true[0]], [at[second], true[second]], color=style.GREY, lw=0.5, zorder=2)
    at = place.loc[located].to_numpy() if located else np.zeros((0, second + 1))
    ax.scatter(at[:, 0], at[:, second], s=12, c=style.PREDICTED, linewidths=0, zorder=3)
    ax.scatter(truth[:, 0], truth[:, second], s=14, c=style.OBSERVED, marker="D", linewidths=0, zorder=3)
    far = np.argsort(-np.linalg.norm(truth, axis=1), kind="stable")[:MAX_NAMES]
    origin = place.loc[CONTROL].to_numpy() if CONTROL in place.index else np.zeros(others.shape[1])
    named = np.argsort(-np.linalg.norm((others - origin)[:, [0, second]], axis=1), kind="stable")[:MAX_TRAINING_NAMES]
    groups = cluster.reindex(training.index).fillna("-")
    x, y = (np.concatenate([truth[far, i], others[named, i]]) for i in (0, second))
    names = [style.short(both[i], 18) for i in far]
    names += [f"{style.short(training.index[i], 14)} [{groups.iloc[i]}]" for i in named]
    everything = tuple(np.concatenate([truth[:, i], at[:, i], others[named, i]]) for i in (0, second))
    page.label(ax, x, y, names, avoid=everything)
    ax.set_xlabel("embedding coordinate 1 (sd)")
    ax.set_ylabel("embedding coordinate 2 (sd)")
    ax.set_title(f"{style.count(len(located), 'located target')} among {style.count(len(others), 'training perturbation')}")
    ax.margins(0.08)


def _distances(ax: Axes, place: pd.DataFrame, both: list[str], truth: np.ndarray, others: np.ndarray, locations: str | Path) -> None:
    own, mean, nearer = _ranks(place.loc[both].to_numpy(), truth, others)
    ratio = own / np.maximum(mean, 1e-12)
    order = np.argsort(ratio, kind="stable")[:MAX_ROWS]
    y = np.arange(len(order))
    ax.hlines(y, own[order], mean[order], color=style.LIGHT, lw=1.2, zorder=1)
    ax.scatter(own[order], y, s=13, c=style.PREDICTED, linewidths=0, zorder=3)
    ax.scatter(mean[order], y, s=13, c=style.GREY, marker="|", linewidths=1.1, zorder=2)
    right = float(max(own.max(), mean.max()))
    for row, i in enumerate(order):
        names = style.short(", ".join(neighbours_of(locations, both[i], cap=3)), 28)
        ax.text(right * 1.04, row, names, va="center", fontsize=5.5, color=style.DARK)
    ax.set_xlim(0, right * 1.95)
    ax.set_xticks([t for t in MaxNLocator(4).tick_values(0, right) if 0 <= t <= right * 1.02])
    # The neighbours' names stand beyond the axis.
    ax.spines["bottom"].set_bounds(0, right * 1.02)
    ax.set_yticks(y, [style.short(both[i], 18) for i in order])
    ax.set_ylim(len(order) - 0.4, -1.2)
    ax.text(right * 1.04, -0.9, "nearest neighbours by weight", va="center", fontsize=6, color=style.DARK, style="italic")
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("distance to the true place\n(sd of the embedding)", x=0.5 * 1.02 / 1.95)
    more = f", {len(both) - len(order)} more not shown" if len(order) < len(both) else ""
    ax.set_title(f"{int((ratio < 1).sum())} of {style.count(len(both), 'target')} nearer than the training mean{more}")


def _legend(fig: Figure, ax: Axes, note: str) -> None:
    handles = [
        ax.scatter([], [], s=12, c=style.PREDICTED, linewidths=0, label="located, unseen"),
        ax.scatter([], [], s=14, c=style.OBSERVED, marker="D", linewidths=0, label="true place (its own cells)"),
        ax.scatter([], [], s=13, c=style.GREY, marker="|", linewidths=1.1, label="training mean"),
        ax.scatter([], [], s=7, c=style.LIGHT, linewidths=0, label="training perturbations"),
        ax.scatter([], [], s=22, c=style.BLACK, marker="+", linewidths=1, label="control"),
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=5, title=note or None, title_fontsize=6.5)
