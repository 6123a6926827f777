"""Real and generated cells of held-out targets on one map."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dbdiffusion.benchmark.distribution import energy_distance, fit_axes
from dbdiffusion.benchmark.scores import read_generated
from dbdiffusion.data.normalise import load_expression, open_cells
from dbdiffusion.data.sets import CONTROL
from dbdiffusion.figures import style
from dbdiffusion.perturbations.clusters import map_coordinates
from dbdiffusion.runtime import contracts
from dbdiffusion.runtime.errors import UserError
from dbdiffusion.runtime.seeds import rng

COMPONENTS = 20
NEIGHBOURS = 15
"""Of the kNN graph behind the map."""
MAX_TARGETS = 6
CAP = {"control": 500, "neighbour": 300, "real": 300, "generated": 300}
"""Cells drawn of each kind (neighbours: of all neighbours of a target together)."""
MIN_COMPARED = 10
"""Fewer cells of a target have no distance."""


@dataclass(frozen=True)
class CellSets:
    """Cells x genes in ln(1 + CP10k) and what each cell is: kind (control, neighbour, real, generated) and its perturbation."""

    expression: np.ndarray
    kind: np.ndarray
    perturbation: np.ndarray

    def of(self, kind: str, perturbations: list[str]) -> np.ndarray:
        """Row numbers of the cells of a kind and of some perturbations."""
        return np.flatnonzero((self.kind == kind) & np.isin(self.perturbation, perturbations))


def neighbours_of(locations: str | Path, target: str, cap: int = 5) -> list[str]:
    """The neighbours of largest weight of a target (fit `all`), at most `cap`; empty where it is not located."""
    frame = contracts.LOCATIONS.read(locations)
    frame = frame.astype({"fit": str, "query": str, "neighbour": str})
    rows = frame[(frame["fit"] == "all") & (frame["query"] == target) & ~frame["neighbour"].isin(["", CONTROL])]
    rows = rows.sort_values(["weight", "neighbour"], ascending=[False, True], kind="stable")
    return rows["neighbour"].head(cap).tolist()


def generated_perturbations(path: str | Path) -> set[str]:
    """Perturbations with generated cells. Raises UserError when the file is not there."""
    if not Path(path).exists():
        raise UserError("file not found", where=str(path), fix="run the rule that makes it")
    with h5py.File(path, "r") as handle:
        return set(read_elem(handle["obs"])["perturbation"].astype(str))


def _pick(rows: np.ndarray, cap: int, seed: int, *labels: object) -> np.ndarray:
    """At most `cap` of some rows, in their order."""
    if len(rows) <= cap:
        return rows
    return np.sort(rng(seed, "figure cells", *labels).choice(rows, cap, replace=False))


def gather(cells: str | Path, generated: str | Path, targets: list[str], neighbours: dict[str, list[str]], seed: int) -> CellSets:
    """Real control, target and neighbour cells and generated target and neighbour cells on the genes of the generator."""
    near = sorted({name for target in targets for name in neighbours[target]} - set(targets))
    with h5py.File(generated, "r") as handle:
        genes = pd.Index(read_elem(handle["var"]).index.astype(str))
    made = read_generated(generated, perturbations=[*targets, *near])
    made_of = made.perturbation
    with open_cells(cells) as file:
        measured, shared = set(file.obs["perturbation"]), genes.isin(file.genes)
    names = [name for name in (CONTROL, *targets, *near) if name in measured]
    real = load_expression(cells, perturbations=names, genes=list(genes[shared]))
    label = real.obs["perturbation"].to_numpy()
    share = CAP["neighbour"] // max(1, *(len(found) for found in neighbours.values()))
    caps = (
        {CONTROL: ("control", CAP["control"])} | dict.fromkeys(targets, ("real", CAP["real"])) | dict.fromkeys(near, ("neighbour", share))
    )
    rows, kinds = [], []
    for name in names:
        kind, cap = caps[name]
        rows.append(_pick(np.flatnonzero(label == name), cap, seed, kind, name))
        kinds.append(np.full(len(rows[-1]), kind, dtype=object))
    at = np.concatenate(rows)
    made_at = np.concatenate([_pick(np.flatnonzero(made_of == t), CAP["generated"], seed, "generated", t) for t in targets])
    near_at = [_pick(np.flatnonzero(made_of == name), share, seed, "generated", name) for name in near]
    made_at = np.concatenate([made_at, *near_at])
    shown = real.values[at]  # noqa: PD011 (a sparse matrix, no pandas object)
    return CellSets(
        np.vstack([shown.toarray().astype(np.float64), made.values[made_at].toarray().astype(np.float64)[:, shared]]),
        np.concatenate([*kinds, np.full(len(made_at), "generated", dtype=object)]),
        np.concatenate([label[at], made_of[made_at]]),
    )


def place(sets: CellSets, components: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Map (n, 2) and PCA scores (n, components) of all cells; the PCA is learned from real cells alone."""
    scores = fit_axes(sets.expression[sets.kind != "generated"], components).project(sets.expression)
    return map_coordinates(scores, min(NEIGHBOURS, len(scores) - 1), seed), scores


def _distance(scores: np.ndarray, a: np.ndarray, b: np.ndarray) -> str:
    if min(len(a), len(b)) < MIN_COMPARED:
        return "–"
    return f"{energy_distance(scores[a], scores[b]):.2f}"


def _panel(ax: Axes, spot: np.ndarray, layers: list[tuple[np.ndarray, str, float, float]]) -> None:
    """Layers of (rows, colour, size, alpha), the last one on top, over all cells in light grey."""
    ax.scatter(*spot.T, s=2, c="#E6E6E6", linewidths=0, rasterized=True, zorder=1)
    for z, (rows, colour, size, alpha) in enumerate(layers):
        ax.scatter(*spot[rows].T, s=size, c=colour, alpha=alpha, linewidths=0, rasterized=True, zorder=2 + z)
    ax.set_xticks([])
    ax.set_yticks([])
    for side in ax.spines.values():
        side.set_color(style.LIGHT)
        side.set_visible(True)


def _corner(ax: Axes, text: str, colour: str) -> None:
    ax.text(0.03, 0.97, text, transform=ax.transAxes, va="top", fontsize=6.5, color=colour, zorder=9, path_effects=style.outline())


def _limits(spot: np.ndarray) -> tuple[tuple[float, float], tuple[float, float]]:
    """A square frame that holds all but the farthest 0.5 % of the cells."""
    low, high = np.quantile(spot, 0.0025, axis=0), np.quantile(spot, 0.9975, axis=0)
    centre, half = (low + high) / 2, 0.6 * float((high - low).max() or 1.0)
    return (centre[0] - half, centre[0] + half), (centre[1] - half, centre[1] + half)


def draw_cells(
    *,
    cells: str | Path,
    generated: str | Path,
    locations: str | Path,
    targets: list[str],
    png: str | Path,
    pdf: str | Path,
    components: int = COMPONENTS,
    seed: int = 0,
    most: int = MAX_TARGETS,
) -> None:
    """Real (top) and generated (bottom) cells of each target and of its neighbours on one UMAP with control cells.

    cells: cells.h5ad; generated: generated.h5ad (ln(1 + CP10k)); locations: contract `locations`; targets: the first `most`
    (6 at the utmost) that were generated are drawn. Held-out cells are read for this picture only. The PCA is learned from real
    cells, the UMAP from the PCA scores of real and generated cells together, so that generated cells are free to fall apart
    from real ones. Energy distances in the PCA are printed: generated to real, and control to real as the yardstick.
    """
    present = generated_perturbations(generated)
    shown = [t for t in targets if t in present][: min(most, MAX_TARGETS)]
    columns = max(1, len(shown))
    width = style.PAGE if columns > 2 else 138.0
    # Of one target the two panels stand side by side.
    panels = (1, 2) if columns == 1 else (2, columns)
    side = (width - 6) / panels[1] - 3
    with style.sheet(width, panels[0] * (side + (12 if columns > 4 else 9)) + 14, png=png, pdf=pdf) as page:
        if not shown:
            style.empty(page.fig.subplots(), "No target was generated.")
            return
        neighbours = {t: neighbours_of(locations, t) for t in shown}
        sets = gather(cells, generated, shown, neighbours, seed)
        spot, scores = place(sets, components, seed)
        axes = page.fig.subplots(*panels, squeeze=False).reshape(2, columns)
        control = sets.of("control", [CONTROL])
        frame = _limits(spot)
        for column, target in enumerate(shown):
            near = np.concatenate([sets.of(k, neighbours[target]) for k in ("neighbour", "real")])
            real, made = sets.of("real", [target]), sets.of("generated", [target])
            near_made = sets.of("generated", neighbours[target])
            top, bottom = axes[:, column]
            _panel(top, spot, [(control, "#A6A6A6", 2.5, 0.7), (near, style.SKY, 3.5, 0.8), (real, style.OBSERVED, 4.5, 0.9)])
            behind = [(control, "#A6A6A6", 2.5, 0.7), (near_made, style.PURPLE, 3.0, 0.5), (real, style.OBSERVED, 3.0, 0.35)]
            _panel(bottom, spot, [*behind, (made, style.PREDICTED, 4.5, 0.8)])
            for ax in (top, bottom):
                ax.set_xlim(frame[0])
                ax.set_ylim(frame[1])
                ax.set_box_aspect(1)
            top.set_title(style.short(target, 22 if columns <= 4 else 16))
            _corner(top, f"n = {len(real)}", style.OBSERVED)
            _corner(bottom, f"n = {len(made)}", style.PREDICTED)
            between = ", " if columns <= 4 else "\n"
            distances = f"generated {_distance(scores, made, real)}{between}control {_distance(scores, control, real)}"
            bottom.set_title(f"energy distance:\n{distances}")
            names = style.as_many_as_fit(page.fig, "near ", neighbours[target], side - 2, fontsize=6)
            top.set_xlabel(names if neighbours[target] else "not located", fontsize=6)
        axes[0, 0].set_ylabel("real cells\n(UMAP 2)")
        axes[1, 0].set_ylabel("generated over real cells\n(UMAP 2)")
        for ax in axes[1]:
            ax.set_xlabel("(UMAP 1)", fontsize=6)
        style.letter_panels(list(axes[0]))
        _legend(page.fig, axes[0, 0], 3)


def _legend(fig: Figure, ax: Axes, columns: int) -> None:
    looks = (
        ("#A6A6A6", "real control"),
        (style.SKY, "real neighbours"),
        (style.OBSERVED, "real target (held out)"),
        (style.PREDICTED, "generated target"),
        (style.PURPLE, "generated neighbours"),
        ("#E6E6E6", "other cells"),
    )
    handles = [ax.scatter([], [], s=12, c=c, linewidths=0, label=t) for c, t in looks]
    fig.legend(handles=handles, loc="outside lower center", ncols=columns)
