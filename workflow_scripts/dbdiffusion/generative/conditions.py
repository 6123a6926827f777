"""What the denoiser is told of a perturbation, as sharp as for measured ones or as uncertain as for others.

The place of an unmeasured perturbation is an average over neighbours. A denoiser that has only seen the places of measured ones, sharp and
far apart, has learned them by heart and answers between them at random. So it is trained on uncertain places too. With m the mean and s
the standard deviation of places, by coordinate, place e becomes

    m + a (e - m) + sqrt(a (1 - a)) s epsilon,    a uniform between 0 and 1, epsilon standard normal:

of a share a of the variance, and such that the best linear guess of the place given the uncertain one is the uncertain one, as it is
where a location is an unbiased guess. The certainty a is a condition of its own; for an unmeasured perturbation it is the share of the
spread that its place has (part `certainty` of contract `embedding`). Gene features, which identify a training perturbation as its place
does, get noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dbdiffusion.config.generator import DiffusionConfig
from dbdiffusion.data.sets import CONTROL
from dbdiffusion.generative import kernels
from dbdiffusion.generative.kernels import array, fused
from dbdiffusion.runtime import contracts
from dbdiffusion.runtime.errors import UserError

PARTS_OF = {"embedding": ("effects",), "features": ("features",), "both": ("effects", "features")}
"""Parts of contract `embedding` by config key diffusion.condition."""
CERTAIN = 0.5
"""Share of conditions that are left as they are in a training step."""
FEATURE_NOISE = 0.5
"""Standard deviation of what uncertain features get; over training perturbations they have a mean square of 1."""


@dataclass(frozen=True)
class Conditions:
    """What stands for perturbations: names and roles (R,), values (R, dimensions), the first `placed` of which are of the embedding; with
    `graded`, the last one is the certainty."""

    names: pd.Index
    roles: np.ndarray
    values: np.ndarray
    placed: int
    graded: bool = False

    @classmethod
    def read(cls, path: str | Path, config: DiffusionConfig) -> Conditions:
        """From contract `embedding` what the config names, rows in order of name."""
        parts = PARTS_OF[config.condition] + ("certainty",) * config.uncertain_conditions
        frame = contracts.EMBEDDING.read(path)
        if absent := sorted(set(parts) - set(frame["part"].astype(str))):
            raise UserError(f"no part {absent[0]}: written by an earlier version", where=str(path), fix="remove it and run again")
        frame = frame[frame["part"].isin(parts)].astype({"part": str, "perturbation": str, "role": str})
        wide = frame.pivot(index="perturbation", columns=["part", "dimension"], values="value").sort_index().sort_index(axis=1)
        roles = frame.drop_duplicates("perturbation").set_index("perturbation")["role"].loc[wide.index]
        if wide.isna().to_numpy().any():
            raise UserError("rows of differing dimensions", where=str(path), fix="run the rule that makes it again")
        width = {part: int((wide.columns.get_level_values("part") == part).sum()) for part in parts}
        if width.get("features") == 1 and config.condition == "features":
            raise UserError(
                "no gene features to condition the generator on",
                where="config key diffusion.condition",
                fix="set it to embedding, or name feature sources (datasets.*.features) that know the genes",
            )
        values = np.hstack([wide[part].to_numpy(float) for part in parts])
        return cls(pd.Index(wide.index), roles.to_numpy(), values, width.get("effects", 0), config.uncertain_conditions)

    def select(self, roles: tuple[str, ...]) -> Conditions:
        return self._rows(np.flatnonzero(np.isin(self.roles, roles)))

    def take(self, names: list[str]) -> Conditions:
        at = self.names.get_indexer(names)
        if (at < 0).any():
            raise KeyError(f"perturbations without embedding: {[n for n, i in zip(names, at, strict=True) if i < 0][:5]}")
        return self._rows(at)

    def _rows(self, at: np.ndarray) -> Conditions:
        return Conditions(self.names[at], self.roles[at], self.values[at], self.placed, self.graded)

    def doubt(self, device: torch.device) -> Doubt | None:
        """How these, of training perturbations and the control, become uncertain; None where certainty is not among them."""
        if not self.graded:
            return None
        own, control = torch.from_numpy(self.values).float().to(device), torch.from_numpy(self.names == CONTROL).to(device)
        places, features, _ = own[~control].tensor_split((self.placed, own.shape[1] - 1), dim=1)
        if not len(places):
            raise ValueError("no perturbation but the control")
        mean = places.mean(0)
        # One in which no two perturbations differ, such as what marks the control, says nothing that noise could hide.
        noise = FEATURE_NOISE * (features != features[:1]).any(0)
        return Doubt(mean, (places - mean).square().mean(0).sqrt(), noise, control)


@dataclass(frozen=True)
class Doubt:
    """Uncertain conditions, of a table of them: mean and deviation (placed,) of places; noise, its deviation (features,); control (u,),
    true for the one that always is as it is: what is not known of a perturbation is not a chance of its being the control, whose cells
    outnumber those of any other."""

    mean: Tensor
    deviation: Tensor
    noise: Tensor
    control: Tensor

    def __call__(self, conditions: Tensor, rows: Tensor, stream: torch.Generator) -> Tensor:
        """Of the table (u, dimensions), some rows (r,): places, features, certainty."""
        width, device = conditions.shape[1], conditions.device
        uniform = torch.rand((2, len(rows)), generator=stream, device=device)
        noise = torch.randn((len(rows), width - 1), generator=stream, device=device)
        if fused(conditions, noise):
            out = torch.empty((len(rows), width))
            own = (array(x) for x in (self.mean, self.deviation, self.noise, self.control, out))
            kernels.uncertain(*map(array, (conditions, rows, uniform, noise)), np.float32(CERTAIN), *own)
            return out
        values, placed, (chance, drawn) = conditions.index_select(0, rows), len(self.mean), uniform[:, :, None]
        place, features, _ = values.tensor_split((placed, width - 1), dim=1)
        spread = (drawn * (1 - drawn)).sqrt() * self.deviation
        place = self.mean + drawn * (place - self.mean) + spread * noise[:, :placed]
        features = features + self.noise * noise[:, placed:]
        certain = (chance < CERTAIN) | self.control.index_select(0, rows)[:, None]
        return torch.where(certain, values, torch.cat([place, features, drawn], dim=1))


def taken(label: Tensor, conditions: int) -> tuple[Tensor, Tensor]:
    """Which of so many conditions a batch of labels (n,) takes, at most n, and where each label stands among them.

    The label after the last is the null label and stands after the last of those taken.
    """
    n = len(label)
    if conditions <= n:
        return torch.arange(conditions, device=label.device), label
    # Those that are taken, at most n, and the first one again to make n: as many whatever the batch.
    which, at = label.unique(return_inverse=True)
    which = which[which < conditions]
    return torch.cat([which, which.new_zeros(n - len(which))]), at.masked_fill(label == conditions, n)
