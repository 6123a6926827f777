"""What the maps of perturbations and of genes share: contract `clusters` as coloured, named points."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.text import Text

from dbdiffusion.figures import style
from dbdiffusion.runtime import contracts

MAX_LABELS = 60
"""Names drawn on a map; more would cover the points."""


def pick_labels(frame: pd.DataFrame, cap: int) -> np.ndarray:
    """Row numbers of the points to name: all, or in turn from each cluster the point nearest to its centre.

    frame: columns cluster, x, y. Returns at most `cap` row numbers, the same for the same frame.
    """
    if len(frame) <= cap:
        return np.arange(len(frame))
    place = frame[["x", "y"]].to_numpy(dtype=float)
    centre = frame.groupby("cluster", observed=True)[["x", "y"]].transform("median").to_numpy(dtype=float)
    distance = np.hypot(*(place - centre).T)
    ranks = pd.Series(distance).groupby(frame["cluster"].to_numpy()).rank(method="first").to_numpy()
    order = np.lexsort((distance, ranks))
    return np.sort(order[:cap])


def scatter(ax: Axes, frame: pd.DataFrame, clusters: dict[str, tuple[str, str]], size: float) -> None:
    raster = len(frame) > style.RASTER_FROM
    for cluster, (colour, marker) in clusters.items():
        part = frame[frame["cluster"] == cluster]
        ax.scatter(part["x"], part["y"], s=size, c=colour, marker=marker, linewidths=0.2, edgecolors="white", rasterized=raster, zorder=2)


def number_place(part: np.ndarray, ringed: np.ndarray, size: np.ndarray) -> np.ndarray:
    """The point (2,) of a cluster for its number: the one nearest to its median, or one close by that has no ringed point under it.

    part: (n, 2) points of the cluster; ringed: (m, 2); size: (2,) extent of the map. A cluster may have parts: its median can be empty.
    """
    centre = part[np.argmin(np.hypot(*((part - np.median(part, axis=0)) / size).T))]
    away = np.hypot(*((part - centre) / size).T)
    for i in np.argsort(away, kind="stable"):
        if away[i] < 0.1 and (not len(ringed) or np.hypot(*((ringed - part[i]) / size).T).min() > 0.02):
            return part[i]
    return centre


def number_clusters(ax: Axes, frame: pd.DataFrame, clusters: dict[str, tuple[str, str]], ringed: pd.DataFrame) -> list[Text]:
    """The cluster's name on one of its points, on a white disc so that points behind it do not disturb; returns the texts."""
    texts = []
    size = np.maximum(np.ptp(frame[["x", "y"]].to_numpy(dtype=float), axis=0), 1e-12)
    for cluster, (colour, _) in clusters.items():
        part = frame.loc[frame["cluster"] == cluster, ["x", "y"]].to_numpy(dtype=float)
        text = ax.text(
            *number_place(part, ringed[["x", "y"]].to_numpy(dtype=float), size),
            cluster,
            color=colour,
            fontsize=6.5,
            fontweight="bold",
            ha="center",
            va="center",
            zorder=4,
            bbox={"boxstyle": "circle,pad=0.12", "fc": "white", "ec": colour, "lw": 0.6, "alpha": 0.85},
        )
        texts.append(text)
    return texts


def read(clusters: str | Path, kind: str) -> pd.DataFrame:
    frame = contracts.CLUSTERS.read(clusters)
    frame = frame[frame["kind"].astype(str) == kind].reset_index(drop=True)
    return frame.assign(name=frame["name"].astype(str), cluster=frame["cluster"].astype(str))


def near(frame: pd.DataFrame, named: pd.DataFrame, cap: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """Points that labels should not cover: all of them, or an even subset where there are many (the placement is quadratic)."""
    some = frame.iloc[style.spread(len(frame), cap)]
    both = pd.concat([named, some]).drop_duplicates("name")
    return both["x"].to_numpy(dtype=float), both["y"].to_numpy(dtype=float)


def legend(ax: Axes, frame: pd.DataFrame, clusters: dict[str, tuple[str, str]], cap: int = 30) -> None:
    sizes = frame["cluster"].value_counts()
    shown = list(clusters)[:cap]
    for cluster in shown:
        colour, marker = clusters[cluster]
        ax.scatter([], [], c=colour, marker=marker, s=14, label=f"{cluster} (n = {sizes[cluster]})")
    if len(clusters) > cap:
        ax.scatter([], [], c="none", s=14, label=f"... {len(clusters) - cap} more")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), title="cluster", ncols=1 if len(shown) <= 24 else 2, alignment="left")
