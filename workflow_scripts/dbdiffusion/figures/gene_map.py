"""Map of the genes, with the perturbed genes named."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dbdiffusion.figures import maps, style


def draw_gene_map(*, clusters: str | Path, perturbed: list[str], png: str | Path, pdf: str | Path) -> None:
    """Genes in the UMAP of their co-expression loadings, coloured by Leiden cluster; perturbed genes are ringed and named.

    clusters: contract `clusters` (rows of kind gene); perturbed: perturbed genes, held-out ones included (names only).
    """
    frame = maps.read(clusters, "gene")
    groups = style.natural_order(frame["cluster"])
    with style.sheet(style.PAGE, 120, png=png, pdf=pdf) as page:
        ax = page.fig.subplots()
        if frame.empty:
            style.empty(ax, "No gene was clustered.")
            return
        looks = style.group_style(groups)
        maps.scatter(ax, frame, looks, size=float(np.clip(5000 / len(frame), 2.5, 14)))
        style.bare_map(ax)
        hit = frame[frame["name"].isin(set(perturbed))].reset_index(drop=True)
        named = hit.iloc[maps.pick_labels(hit, maps.MAX_LABELS)]
        ring = {"facecolors": "none", "edgecolors": style.BLACK, "zorder": 3}
        ax.scatter(named["x"], named["y"], s=16, linewidths=0.7, **ring)
        if len(named) < len(hit):
            ax.scatter(hit["x"], hit["y"], s=6, linewidths=0.3, **ring)
        numbers = maps.number_clusters(ax, frame, looks, hit) if len(groups) <= 40 else []
        page.label(
            ax, named["x"].to_numpy(), named["y"].to_numpy(), [style.short(n) for n in named["name"]], color=style.BLACK, around=numbers
        )
        total = len(set(perturbed))
        ax.set_title(
            f"{style.count(len(frame), 'gene')} in {style.count(len(groups), 'cluster')}; "
            f"{len(hit)} of {style.count(total, 'perturbed gene')} measured (ringed"
            + (", named)" if len(named) == len(hit) else f", {len(named)} named)")
        )
