"""The cross-fit models of a fold as one generator: out-of-fold rows from the model that did not see them, the others averaged."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from dbdiffusion.data.sets import MeanSet
from dbdiffusion.generative.cell_file import write_cells
from dbdiffusion.runtime.errors import UserError

AVERAGED = ("target", "control")


def merged_means(sets: list[MeanSet]) -> MeanSet:
    """Means of the models' rows: targets and control averaged, with Monte-Carlo variance sum / Q^2 over the Q models that hold them
    (models share no noise that their means could have in common but the sampler's, which is counted as independent); a pseudo-target from
    its own model; a seen perturbation from the first model that holds it, unless a model has it as pseudo-target.

    Models differ by an offset that all their rows share. It averages out of the difference of a target and the control; rows of one
    model are moved by the difference of the averaged control and that model's own, so that it drops out of theirs too.
    """
    names, roles, mean, variance = [], [], [], []
    everyone = holders_by_name(sets)
    control = {q: sets[q].mean[i] for _, role, holders in everyone if role == "control" for q, i in holders}
    centre = np.mean(list(control.values()), axis=0) if control else None
    for name, role, holders in everyone:
        rows = [(sets[q].mean[i], sets[q].mc_variance[i]) for q, i in holders]
        names.append(name)
        roles.append(role)
        offset = 0.0
        if role not in AVERAGED and centre is not None:
            own = [control[q] for q, _ in holders if q in control]
            offset = centre - np.mean(own, axis=0) if own else 0.0
        mean.append(np.mean([m for m, _ in rows], axis=0) + offset)
        variance.append(np.sum([v for _, v in rows], axis=0) / len(rows) ** 2)
    return MeanSet(pd.Index(names), np.array(roles, dtype=object), sets[0].genes, np.array(mean), np.array(variance))


def holders_by_name(sets: list[MeanSet]) -> list[tuple[str, str, list[tuple[int, int]]]]:
    """For every perturbation, in order of name: its merged role and the (model, row) pairs that make it."""
    found: dict[str, dict[str, list[tuple[int, int]]]] = {}
    for q, one in enumerate(sets):
        for i, (name, role) in enumerate(zip(one.perturbations, one.roles, strict=True)):
            found.setdefault(str(name), {}).setdefault(str(role), []).append((q, i))
    out = []
    for name in sorted(found):
        role = next(r for r in ("control", "target", "pseudo", "train") if r in found[name])
        holders = found[name][role]
        out.append((name, role, holders if role in AVERAGED else holders[:1]))
    return out


def interleaved(blocks: list[np.ndarray], total: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the blocks in turn, `total` at most, and the block that each comes from."""
    shortest = min(len(block) for block in blocks)
    at = np.arange(min(total, shortest * len(blocks)))
    model, row = at % len(blocks), at // len(blocks)
    return np.stack([blocks[q][i] for q, i in zip(model, row, strict=True)]), model


def write_merged(*, generated: list[str | Path], means: list[str | Path], out_generated: str | Path, out_means: str | Path) -> None:
    """Merge the cells and means of all cross-fit models of a fold.

    As many cells per perturbation as one model kept; those of averaged rows alternate between the models. Raises UserError when the
    models list different genes.
    """
    sets = [MeanSet.read(path) for path in means]
    for path, one in zip(means, sets, strict=True):
        if not one.genes.equals(sets[0].genes):
            raise UserError("genes differ between cross-fit models", where=str(path), fix="make the models of this fold again")
    merged_means(sets).write(out_means)
    files = [ad.read_h5ad(path) for path in generated]
    where = [one.obs.groupby("perturbation", observed=True).indices for one in files]
    blocks, models, names, roles = [], [], [], []
    for name, role, holders in holders_by_name(sets):
        parts = [np.asarray(files[q].X[np.sort(where[q][name])]) for q, _ in holders]
        cells, model = interleaved(parts, len(parts[0]))
        labels = np.array([str(files[q].obs["crossfit"].iloc[0]) for q, _ in holders], dtype=object)
        names.append(name)
        roles.append(role)
        blocks.append(cells)
        models.append(labels[model])
    write_cells(blocks, pd.Index(names), np.array(roles, dtype=object), models, sets[0].genes, out_generated)
