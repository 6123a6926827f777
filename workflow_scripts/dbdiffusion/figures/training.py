"""Training curves of autoencoders and denoisers over all cross-fit models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dbdiffusion.figures import style
from dbdiffusion.runtime.files import read_json

LOSSES = {"Autoencoder": "loss per gene", "Denoiser": "loss per coordinate"}
DETAILED = 7
"""Up to so many models each has a colour of its own; more are drawn thin, with their median."""


def curve(record: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, training losses and validation losses (NaN where none was measured) of a training record.

    record["history"]: rows with step (or epoch), train and, where there was a validation set, validation.
    """
    rows = record.get("history", [])
    step = np.array([row.get("step", row.get("epoch", i)) for i, row in enumerate(rows)], dtype=float)
    train = np.array([row.get("train", np.nan) for row in rows], dtype=float)
    held = np.array([row.get("validation", np.nan) for row in rows], dtype=float)
    return step, train, held


def model_name(record: dict, path: str | Path) -> str:
    """'fold 0, model 2' of a training record; the file's name where the record does not say."""
    parts = [f"{word} {record[key]}" for key, word in (("fold", "fold"), ("crossfit", "model")) if key in record]
    return ", ".join(parts) or Path(path).stem


def _ylim(values: list[np.ndarray]) -> tuple[float, float] | None:
    """Limits that show the converged part: the first tenth of each curve may leave the axes at the top."""
    late = [v[max(1, len(v) // 20) :] for v in values if len(v) > 3]
    late = [v[np.isfinite(v)] for v in late]
    if not any(len(v) for v in late):
        return None
    both = np.concatenate(late)
    low, high = float(both.min()), float(both.max())
    pad = 0.06 * (high - low or abs(high) or 1.0)
    return low - pad, high + pad


def _panel(ax: Axes, records: list[dict], names: list[str], title: str, ylabel: str) -> None:
    curves = [curve(r) for r in records]
    usable = [(c, r, n) for c, r, n in zip(curves, records, names, strict=True) if len(c[0])]
    if not usable:
        style.empty(ax, f"{title}: no training history")
        return
    many = len(usable) > DETAILED
    looks = style.group_style([n for _, _, n in usable])
    for (step, train, held), record, name in usable:
        colour = style.GREY if many else looks[name][0]
        width = 0.5 if many else 0.9
        ax.plot(step, train, color=colour, lw=width * 0.7, ls=(0, (1.5, 1.2)), zorder=2, alpha=0.9)
        if np.isfinite(held).any():
            ax.plot(step, held, color=colour, lw=width, zorder=3)
            best = int(np.nanargmin(held)) if "best_epoch" not in record else best_row(record)
            ax.plot(step[best], held[best], "o", ms=2.6 if many else 3.4, mfc="white", mec=colour, mew=0.7, zorder=4)
    values = [v for c, _, _ in usable for v in c[1:]]
    limits = _ylim(values)
    if limits:
        ax.set_ylim(*limits)
    steps = [c[0][-1] for c, _, _ in usable]
    ax.set_xlabel("training steps")
    ax.set_ylabel(ylabel)
    span = f"{min(steps):,.0f}" if min(steps) == max(steps) else f"{min(steps):,.0f}–{max(steps):,.0f}"
    ax.set_title(f"{title} ({style.count(len(usable), 'model')}, {span} steps)")


def _legend(fig: Figure, ax: Axes, names: list[str]) -> None:
    handles = ax.plot([], [], color=style.DARK, lw=0.7, ls=(0, (1.5, 1.2)), label="training cells")
    handles += ax.plot(
        [], [], color=style.DARK, lw=0.9, marker="o", ms=3.4, mfc="white", mew=0.7, label="validation cells (ring: weights kept)"
    )
    if 1 < len(names) <= DETAILED:
        handles += [ax.plot([], [], color=colour, label=name)[0] for name, (colour, _) in style.group_style(names).items()]
    fig.legend(handles=handles, loc="outside lower center", ncols=3 if len(handles) > 4 else 4)


def best_row(record: dict) -> int:
    """The history row of the kept weights."""
    rows = record["history"]
    epochs = np.array([row.get("epoch", i) for i, row in enumerate(rows)])
    return int(np.argmin(np.abs(epochs - record["best_epoch"])))


def draw_training(*, vae: list[str | Path], diffusion: list[str | Path], png: str | Path, pdf: str | Path) -> None:
    """Loss against training step of every autoencoder (left) and denoiser (right); dotted: training cells, solid: validation cells.

    vae, diffusion: JSON training records with a `history`. Rings mark the weights that were kept.
    """
    records = {"Autoencoder": [(read_json(p), p) for p in vae], "Denoiser": [(read_json(p), p) for p in diffusion]}
    with style.sheet(style.PAGE, 66, png=png, pdf=pdf) as page:
        axes = page.fig.subplots(1, 2)
        names: dict[str, None] = {}
        for ax, (title, found) in zip(axes, records.items(), strict=True):
            mine = [model_name(record, path) for record, path in found]
            names |= dict.fromkeys(mine)
            _panel(ax, [record for record, _ in found], mine, title, LOSSES[title])
        style.letter_panels(list(axes))
        _legend(page.fig, axes[0], list(names))
