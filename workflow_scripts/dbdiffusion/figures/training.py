"""Training curves of autoencoders and denoisers over all cross-fit models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dbdiffusion.figures import style
from dbdiffusion.runtime.files import read_json

LOSSES = {"Autoencoder": "loss per gene,\nminus that of the kept weights", "Denoiser": "loss per coordinate"}
RELATIVE = ("Autoencoder",)
"""Losses that are shown as differences: their level is set by the counts of a model's cells, not by the model."""
DETAILED = 7
"""Up to so many models each have a colour of their own; more are thin, with a colour for each fold (grey where folds, too, are more)."""


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


def running_mean(values: np.ndarray, rows: int = 5) -> np.ndarray:
    """Mean of each value and its neighbours, `rows` together (fewer at the ends): training losses are those of a few batches."""
    part = np.lib.stride_tricks.sliding_window_view(np.pad(values, rows // 2, constant_values=np.nan), rows)
    known = np.isfinite(part)
    return np.divide(np.where(known, part, 0).sum(1), known.sum(1), out=np.full(len(values), np.nan), where=known.any(1))


def relative(record: dict, train: np.ndarray, held: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation losses minus those of the kept weights."""
    at = kept_row(record, held)
    return train - np.nan_to_num(train[at]), held - np.nan_to_num(held[at])


def colours(records: list[dict], names: list[str]) -> list[str]:
    """A colour for each model where there are few, for each fold where there are more, or grey."""
    folds = style.natural_order([r.get("fold", "") for r in records])
    if len(names) <= DETAILED:
        return [style.group_style(names)[n][0] for n in names]
    if len(folds) <= DETAILED:
        return [style.group_style(folds)[str(r.get("fold", ""))][0] for r in records]
    return [style.GREY] * len(names)


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
    usable = [(curve(r), r, c) for r, c in zip(records, colours(records, names), strict=True) if r.get("history")]
    if not usable:
        style.empty(ax, f"{title}: no training history")
        return
    width = 0.6 if len(usable) > DETAILED else 0.9
    values = []
    for (step, train, held), record, colour in usable:
        train = running_mean(train)
        if title in RELATIVE:
            train, held = relative(record, train, held)
        values += [train, held]
        ax.plot(step, train, color=colour, lw=width * 0.7, ls=(0, (1.5, 1.2)), zorder=2, alpha=0.9)
        if np.isfinite(held).any():
            ax.plot(step, held, color=colour, lw=width, zorder=3)
            best = kept_row(record, held)
            ax.plot(step[best], held[best], "o", ms=2.8, mfc="white", mec=colour, mew=0.7, zorder=4)
    limits = _ylim(values)
    if limits:
        ax.set_ylim(*limits)
    steps = [c[0][-1] for c, _, _ in usable]
    ax.set_xlabel("training steps")
    ax.set_ylabel(ylabel)
    span = f"{min(steps):,.0f}" if min(steps) == max(steps) else f"{min(steps):,.0f}–{max(steps):,.0f}"
    ax.set_title(f"{title} ({style.count(len(usable), 'model')}, {span} steps)")


def _legend(fig: Figure, ax: Axes, looks: dict[str, str]) -> None:
    handles = ax.plot([], [], color=style.DARK, lw=0.7, ls=(0, (1.5, 1.2)), label="training cells (running mean)")
    handles += ax.plot(
        [], [], color=style.DARK, lw=0.9, marker="o", ms=3.4, mfc="white", mew=0.7, label="validation cells (ring: weights kept)"
    )
    if 1 < len(looks) <= DETAILED:
        handles += [ax.plot([], [], color=colour, label=name)[0] for name, colour in looks.items()]
    fig.legend(handles=handles, loc="outside lower center", ncols=5 if len(handles) <= 5 else 4)


def kept_row(record: dict, held: np.ndarray) -> int:
    """The history row of the kept weights; where the record does not say, the smallest validation loss, or the last row."""
    if "best_epoch" in record:
        return best_row(record)
    return int(np.nanargmin(held)) if np.isfinite(held).any() else len(held) - 1


def best_row(record: dict) -> int:
    """The history row nearest to the epoch of the kept weights."""
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
        looks: dict[str, str] = {}
        for ax, (title, found) in zip(axes, records.items(), strict=True):
            mine = [model_name(record, path) for record, path in found]
            kept = [record for record, _ in found]
            few = len(mine) <= DETAILED
            looks |= dict(zip(mine if few else [f"fold {r.get('fold', '')}" for r in kept], colours(kept, mine), strict=True))
            _panel(ax, kept, mine, title, LOSSES[title])
        style.letter_panels(list(axes))
        _legend(page.fig, axes[0], looks)
