"""config block `splits`: what is held out from what."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from dbdiffusion.config.base import Block

ALL = "all"
"""The fold in which nothing is held out, and the cross-fit model that sees all training perturbations."""


class SplitsConfig(Block):
    """What is held out from what."""

    scheme: Literal["kfold", "leave_one_out", "none"] = "kfold"
    """kfold: perturbations in `folds` outer folds; leave_one_out: one fold for each perturbation of `held_out`; none: nothing held out,
    predict run.targets."""
    folds: int = Field(3, ge=2)
    """Outer folds of perturbations."""
    crossfit_folds: int = Field(3, ge=0)
    """Inner cross-fit folds, each with models of its own; 0: one model that sees all training perturbations (published design),
    no pseudo-targets."""
    held_out: list[str] = Field([])
    """With leave_one_out: the perturbations to hold out, one fold each."""
    stratify: list[Literal["effect", "cells"]] = Field(["cells"])
    """Balance folds by number of cells, and by effect strength if named. `effect` spreads strong perturbations over the folds, but lets a
    held-out perturbation's own cells decide with whom it is held out; without it, folds do not depend on counts."""
    combinations: Literal["with_genes", "any"] = "with_genes"
    """Home fold of a combination: one of its genes' folds, or any fold (then its parts may be measured). Either way it is left out of
    training wherever one of its genes is held out."""

    @model_validator(mode="after")
    def _possible(self) -> SplitsConfig:
        if self.scheme == "leave_one_out" and not self.held_out:
            raise ValueError("scheme leave_one_out needs held_out: the number of folds must be known before the data are")
        if len(set(self.held_out)) < len(self.held_out):
            raise ValueError("held_out names a perturbation twice")
        if self.crossfit_folds == 1:
            raise ValueError("crossfit_folds: 1 leaves nothing to learn from; choose 0 (no cross-fitting) or at least 2")
        return self

    def has_all(self, targets: list[str]) -> bool:
        """Whether there is a fold "all": nothing held out, unmeasured targets predicted from all of the data."""
        return self.scheme == "none" or bool(targets)

    def fold_names(self, targets: list[str]) -> list[str]:
        """Names of the outer folds, known before the data are: "0", "1", ..., and "all" (see has_all)."""
        count = {"kfold": self.folds, "leave_one_out": len(self.held_out), "none": 0}[self.scheme]
        return [*map(str, range(count)), *([ALL] if self.has_all(targets) else [])]

    @property
    def crossfit_names(self) -> list[str]:
        """Names of the cross-fit models of every outer fold: "0", "1", ..., or "all" without cross-fitting."""
        return [str(q) for q in range(self.crossfit_folds)] or [ALL]
