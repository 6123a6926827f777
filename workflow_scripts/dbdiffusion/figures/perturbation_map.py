"""Map of the training perturbations."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dbdiffusion.figures import maps, style


def draw_perturbation_map(*, clusters: str | Path, png: str | Path, pdf: str | Path) -> None:
    """Perturbations in the UMAP of their embedding, coloured by Leiden cluster and named.

    clusters: contract `clusters` (rows of kind perturbation: training perturbations of the fold; held-out targets are not in it).
    """
    frame = maps.read(clusters, "perturbation")
    groups = style.natural_order(frame["cluster"])
    with style.sheet(style.PAGE, 120, png=png, pdf=pdf) as page:
        ax = page.fig.subplots()
        if frame.empty:
            style.empty(ax, "No perturbation was clustered.")
            return
        looks = style.group_style(groups)
        maps.scatter(ax, frame, looks, size=float(np.clip(4000 / len(frame), 6, 26)))
        style.bare_map(ax)
        named = frame.iloc[maps.pick_labels(frame, maps.MAX_LABELS)]
        page.label(ax, named["x"].to_numpy(), named["y"].to_numpy(), [style.short(n) for n in named["name"]], avoid=maps.near(frame, named))
        maps.legend(ax, frame, looks)
        note = "" if len(named) == len(frame) else f"; {len(named)} named"
        ax.set_title(f"{style.count(len(frame), 'training perturbation')} in {style.count(len(groups), 'cluster')}{note}")
