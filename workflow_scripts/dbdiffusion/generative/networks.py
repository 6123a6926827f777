"""Building blocks of the networks, and their seeded initialisation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"silu": nn.SiLU, "relu": nn.ReLU, "prelu": nn.PReLU}
Network = TypeVar("Network", bound=nn.Module)


def seeded(build: Callable[[], Network], seed: int) -> Network:
    """Build a network on the CPU with weights that depend on `seed` alone; the global stream is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def normalisation(kind: str, width: int) -> nn.Module:
    """`layer`, `batch` (running statistics in evaluation mode) or `none`."""
    if kind == "layer":
        return nn.LayerNorm(width)
    return nn.BatchNorm1d(width) if kind == "batch" else nn.Identity()


class BatchLinear(nn.Linear):
    """Linear, and an intercept of its own for each batch: what one-hot columns of the batch would add to the input, without widening it."""

    def __init__(self, before: int, after: int, batches: int = 0) -> None:
        super().__init__(before, after)
        self.of_batch = nn.Parameter(torch.empty(batches, after).uniform_(-1, 1) / math.sqrt(before)) if batches else None

    def forward(self, x: Tensor, batch: Tensor) -> Tensor:
        if self.of_batch is None:
            return super().forward(x)
        return torch.addmm(nn.functional.embedding(batch, self.of_batch + self.bias), x, self.weight.t())


def parameters_of(part: nn.Module) -> list[nn.Parameter | None]:
    """Weight and bias of a linear layer or a norm, the former followed by its intercepts by batch, None where there are none."""
    values = [part.weight, part.bias]
    return [*values, getattr(part, "of_batch", None)] if isinstance(part, nn.Linear) else values


class Trunk(nn.ModuleList):
    """Hidden layers one after another, the first of which knows the batch."""

    def forward(self, x: Tensor, batch: Tensor) -> Tensor:
        first, *others = self
        x = first(x, batch)
        for layer in others:
            x = layer(x)
        return x


def trunk(widths: Sequence[int], *, norm: str, activation: str, batches: int = 0) -> Trunk:
    """Hidden layers Linear, normalisation, activation from widths[0] to widths[-1]; batches: known to the first layer."""
    layers: list[nn.Module] = []
    for before, after in zip(widths[:-1], widths[1:], strict=True):
        linear = nn.Linear(before, after) if layers else BatchLinear(before, after, batches)
        layers += [linear, normalisation(norm, after), ACTIVATIONS[activation]()]
    return Trunk(layers)


def timestep_embedding(t: Tensor, width: int, period: float = 10000.0) -> Tensor:
    """Sinusoidal features of integer timesteps t (n,) as (n, width) (Vaswani et al. 2017, 3.5)."""
    half = width // 2
    frequency = torch.exp(-math.log(period) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)
