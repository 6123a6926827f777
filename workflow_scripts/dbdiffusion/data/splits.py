"""What is held out from what: the one place where outer folds, cross-fit folds and cell halves are decided.

A combination `A+B` goes with its genes. Its home fold is the fold of one of them (`combinations: with_genes`) or any fold
(`any`). Wherever a single perturbation is held out or is a pseudo-target, combinations that contain its gene are left out of
what is learned, so that a held-out gene's effect is never seen inside a combination.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from dbdiffusion.config.splits import ALL, SplitsConfig
from dbdiffusion.data.normalise import CellsFile, group_sums, open_cells
from dbdiffusion.data.sets import CONTROL
from dbdiffusion.runtime.errors import UserError, nearest
from dbdiffusion.runtime.files import read_json, write_json
from dbdiffusion.runtime.seeds import rng

FORMAT = 1
EFFECT_BINS = 4


def parts(perturbation: str) -> list[str]:
    """Genes of a perturbation: one of a single, two or more of a combination."""
    return perturbation.split("+")


def fold_names(config: SplitsConfig, targets: list[str]) -> list[str]:
    """Outer folds, known before the data are: "0", "1", ... and "all" where unmeasured targets are predicted."""
    return config.fold_names(targets)


def crossfit_names(config: SplitsConfig) -> list[str]:
    """Cross-fit models of every outer fold: "0", "1", ... or "all"."""
    return config.crossfit_names


def cells_digest(names: Iterable[str]) -> str:
    """Digest of cell names in their order."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Splits:
    """Outer folds, cross-fit folds and halves.

    measured: sorted perturbations with cells, without the control; folds: name -> {targets, inner: {q: pseudo-targets}};
    halves: (cells of cells.h5ad,) "A" or "B"; digest: of those cells' names.
    """

    scheme: str
    measured: list[str]
    folds: dict[str, dict]
    halves: np.ndarray
    digest: str

    @property
    def fold_names(self) -> list[str]:
        """Names of the outer folds."""
        return list(self.folds)

    @cached_property
    def _measured(self) -> frozenset[str]:
        return frozenset(self.measured)

    def _fold(self, fold: str) -> dict:
        if str(fold) not in self.folds:
            raise UserError(f"there is no fold {fold!r}", where="splits", fix=nearest(fold, self.folds))
        return self.folds[str(fold)]

    def targets(self, fold: str) -> list[str]:
        """Perturbations held out in a fold, or never measured (fold "all"); sorted."""
        return list(self._fold(fold)["targets"])

    def training(self, fold: str) -> list[str]:
        """Perturbations whose cells a fold may see: all but its targets and the combinations with a held-out gene; sorted."""
        return without(self.measured, [target for target in self.targets(fold) if target in self._measured])

    def crossfit_names(self, fold: str) -> list[str]:
        """Cross-fit models of a fold: ["0", "1", ...], or ["all"] where one model sees all training perturbations."""
        return list(self._fold(fold)["inner"]) or [ALL]

    def inner(self, fold: str, q: str) -> list[str]:
        """Pseudo-targets of cross-fit model q: training perturbations it never sees; none for model "all"; sorted."""
        if str(q) not in self.crossfit_names(fold):
            raise UserError(f"fold {fold!r} has no cross-fit model {q!r}", where="splits", fix=nearest(q, self.crossfit_names(fold)))
        return list(self._fold(fold)["inner"].get(str(q), []))

    def fit_perturbations(self, fold: str, q: str) -> list[str]:
        """Perturbations that cross-fit model q learns from: training without its pseudo-targets and without the
        combinations that contain the gene of one of them; sorted."""
        return without(self.training(fold), self.inner(fold, q))

    def check_cells(self, names: Iterable[str]) -> None:
        """Raise UserError unless the halves belong to these cells, in this order."""
        names = list(names)
        if len(names) != len(self.halves) or cells_digest(names) != self.digest:
            raise UserError(
                f"the splits were made for {len(self.halves)} other cells than these {len(names)}",
                where="splits.json",
                fix="make the splits again from this cells.h5ad",
            )

    def write(self, path: str | Path) -> None:
        """Write as JSON; the same splits, the same bytes."""
        record = {"scheme": self.scheme, "measured": self.measured, "folds": self.folds, "cells_digest": self.digest}
        write_json(path, {"format": FORMAT, "halves": "".join(self.halves), **record})

    @classmethod
    def read(cls, path: str | Path) -> Splits:
        """Read what `write` wrote."""
        path = Path(path)
        if not path.exists():
            raise UserError("file not found", where=str(path), fix="run the rule that makes it")
        record = read_json(path)
        if record.get("format") != FORMAT:
            raise UserError(f"format {record.get('format')!r}, expected {FORMAT}", where=str(path), fix="make the splits again")
        folds = {name: record["folds"][name] for name in sorted(record["folds"], key=_fold_order)}
        for fold in folds.values():
            fold["inner"] = {q: fold["inner"][q] for q in sorted(fold["inner"], key=_fold_order)}
        return cls(record["scheme"], record["measured"], folds, np.array(list(record["halves"]), dtype="U1"), record["cells_digest"])


def _fold_order(name: str) -> tuple[int, int]:
    return (1, 0) if name == ALL else (0, int(name))


def without(perturbations: list[str], held_out: list[str]) -> list[str]:
    """Perturbations that are not held out and have no held-out single among their parts."""
    held = set(held_out)
    return [p for p in perturbations if p not in held and not held.intersection(parts(p))]


def write_splits(cells: str | Path, config: SplitsConfig, targets: list[str], seed: int, out: str | Path) -> None:
    """Decide all splits of one dataset and seed.

    cells: cells.h5ad; targets: run.targets, perturbations nobody measured; out: splits.json.

    Raises UserError for a target that is measured, a held-out perturbation that is not, and for more folds than perturbations.
    """
    with open_cells(cells) as file:
        measured = sorted(set(file.obs["perturbation"]) - {CONTROL})
        targets = _unmeasured(targets, measured, config)
        # Counts are read only where the stratification asks for them.
        table = pd.DataFrame({"cells": file.obs["perturbation"].value_counts().reindex(measured)})
        table["effect"] = _effect_strength(file, measured) if "effect" in config.stratify else 0.0
        splits = Splits(
            config.scheme,
            measured,
            _folds(table, config, targets, seed),
            _halves(file.obs, seed),
            cells_digest(file.obs.index),
        )
    splits.write(out)


def _unmeasured(targets: list[str], measured: list[str], config: SplitsConfig) -> list[str]:
    """Targets with the parts of combinations sorted, as labels of the data are."""
    known, canonical = set(measured), sorted({"+".join(sorted(parts(target))) for target in targets})
    for target in canonical:
        if target in known or target == CONTROL:
            raise UserError(
                f"{target!r} is measured in this dataset",
                where="config key run.targets",
                fix="name only perturbations without cells; measured ones are predicted by the benchmark folds",
            )
    if config.scheme == "none" and not canonical:
        raise UserError(
            "nothing is held out and there are no targets, so there is nothing to predict",
            where="config keys splits.scheme, run.targets",
            fix="name run.targets, or choose splits.scheme kfold or leave_one_out",
        )
    return canonical


def _folds(table: pd.DataFrame, config: SplitsConfig, targets: list[str], seed: int) -> dict[str, dict]:
    """Outer folds with their inner ones."""
    measured = list(table.index)
    if config.scheme == "kfold":
        held_out = assign_folds(table, config.folds, config, seed, "outer")
    elif config.scheme == "leave_one_out":
        held_out = [[_measured_label(name, measured)] for name in config.held_out]
    else:
        held_out = []
    folds = {str(number): {"targets": names} for number, names in enumerate(held_out)}
    if config.has_all(targets):
        folds[ALL] = {"targets": targets}
    for name, fold in folds.items():
        training = without(measured, [] if name == ALL else fold["targets"])
        fold["inner"] = {}
        if config.crossfit_folds:
            inner = assign_folds(table.loc[training], config.crossfit_folds, config, seed, "inner", name)
            fold["inner"] = {str(q): names for q, names in enumerate(inner)}
    return folds


def _measured_label(name: str, measured: list[str]) -> str:
    label = "+".join(sorted(parts(name)))
    if label not in measured:
        raise UserError(
            f"{name!r} is not a measured perturbation, or quality control dropped it",
            where="config key splits.held_out",
            fix=nearest(name, measured),
        )
    return label


def assign_folds(table: pd.DataFrame, folds: int, config: SplitsConfig, seed: int, *labels: object) -> list[list[str]]:
    """Perturbations in folds of equal size, balanced by effect strength and cell number as the config asks.

    table: indexed by perturbation, with columns effect and cells. Perturbations are ordered by bin of effect strength and
    within it by number of cells; of every `folds` neighbours in that order each goes to another fold at random.
    With `with_genes` a combination goes to a fold of one of its genes, the one with fewest combinations.

    Raises UserError when a fold would be empty.
    """
    random = rng(seed, "folds", *labels)
    singles = {p for p in table.index if len(parts(p)) == 1}
    follow = config.combinations == "with_genes"
    followers = [p for p in table.index if follow and len(parts(p)) > 1 and singles.intersection(parts(p))]
    leaders = table.drop(index=followers)
    if len(leaders) < folds:
        key = "splits.folds" if labels[0] == "outer" else "splits.crossfit_folds"
        raise UserError(
            f"{folds} folds of {len(leaders)} perturbations ({', '.join(map(str, labels))})",
            where=f"config key {key}",
            fix=f"choose at most {len(leaders)}",
        )
    order = _stratified_order(leaders, folds, config.stratify, random)
    fold_of: dict[str, int] = {}
    for start in range(0, len(order), folds):
        block = order[start : start + folds]
        fold_of.update(zip(block, random.permutation(folds)[: len(block)].tolist(), strict=True))
    load = np.zeros(folds, dtype=int)
    for name in random.permutation(np.array(followers, dtype=object)):
        choices = sorted({fold_of[gene] for gene in parts(name) if gene in singles})
        fold_of[name] = min(choices, key=lambda fold: load[fold])
        load[fold_of[name]] += 1
    return [sorted(name for name, home in fold_of.items() if home == fold) for fold in range(folds)]


def _stratified_order(table: pd.DataFrame, folds: int, stratify: list[str], random: np.random.Generator) -> list[str]:
    """Perturbations so that neighbours are alike: singles first, then by bin of effect strength, then by number of cells."""
    table = table.iloc[random.permutation(len(table))]
    keys = pd.DataFrame({"combination": [len(parts(p)) > 1 for p in table.index]}, index=table.index)
    if "effect" in stratify:
        # Bins hold at least one block of folds each, so that cells can be balanced inside them.
        bins = max(1, min(EFFECT_BINS, len(table) // folds)) if "cells" in stratify else len(table)
        keys["effect"] = table["effect"].rank(method="first").sub(1).mul(bins).floordiv(len(table))
    if "cells" in stratify:
        keys["cells"] = table["cells"]
    return list(keys.sort_values(list(keys), kind="stable").index)


def _effect_strength(file: CellsFile, measured: list[str]) -> np.ndarray:
    """Sum over genes of |mean - control mean| in units of the control cells' standard deviation, per perturbation.

    A perturbation's strength depends on its own cells and on control cells only, so that the inner folds of a fold
    never depend on a held-out cell.
    """
    everyone = pd.Index([*measured, CONTROL])
    sums = group_sums(file, everyone.get_indexer(file.obs["perturbation"]), len(everyone))
    if not sums.n[-1]:
        raise UserError("there are no control cells", where=str(file.path), fix="name the control label under labels.control")
    mean = sums.sum / sums.n[:, None]
    variance = sums.sum_sq[-1] / sums.n[-1] - mean[-1] ** 2
    used = (variance > 0) & (sums.detected[-1] >= 0.01 * sums.n[-1])
    return (np.abs(mean[:-1] - mean[-1])[:, used] / np.sqrt(variance[used])).sum(axis=1)


def _halves(obs: pd.DataFrame, seed: int) -> np.ndarray:
    """(cells,) "A" or "B": halves of each perturbation and of the control, balanced within guide and within guide and batch.

    The cells of a perturbation in random order, sorted by guide and batch, go to the halves in turn, so that numbers
    differ by at most one in the perturbation and in each guide.
    """
    halves = np.empty(len(obs), dtype="U1")
    strata = pd.DataFrame({"guide": obs["guide"].to_numpy(), "batch": obs["batch"].to_numpy()})
    for name, rows in sorted(strata.groupby(obs["perturbation"].to_numpy()).indices.items()):
        random = rng(seed, "halves", name)
        shuffled = random.permutation(np.sort(rows))
        order = strata.iloc[shuffled].sort_values(["guide", "batch"], kind="stable").index.to_numpy()
        first = int(random.integers(2))
        halves[order] = np.where((np.arange(len(order)) + first) % 2 == 0, "A", "B")
    return halves
