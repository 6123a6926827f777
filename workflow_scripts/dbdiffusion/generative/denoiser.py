"""The denoiser: an MLP U-Net on the latent, conditioned on the perturbation and the timestep."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from dbdiffusion.generative import denoiser_cpu
from dbdiffusion.generative.by_hand import ByHand, Value
from dbdiffusion.generative.kernels import fused
from dbdiffusion.generative.networks import timestep_embedding

EMBEDDING_WIDTH = 128
"""Width of the label and time embeddings."""


class Block(nn.Module):
    """Linear, multiplied by the label's projection, plus the time's, LayerNorm, SiLU."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.linear = nn.Linear(before, after)
        self.norm = nn.LayerNorm(after)

    def forward(self, x: Tensor, label: Tensor, time: Tensor) -> Tensor:
        x = self.linear(x)
        if not torch.is_grad_enabled() and time.numel() == x.shape[-1] and fused(x, label, time):
            return denoiser_cpu.modulated(x, label, time, self.norm)
        return nn.functional.silu(self.norm(torch.addcmul(time, x, label)))


class Denoiser(ByHand):
    """Widths descend level by level and come back, the levels of equal width joined by additive skips.

    coordinates: width of the latent; condition: dimensions of a perturbation's condition; null_token: `learned`, an embedding of its
    own for the unconditional model, or `zero`, the zero condition (published: then null, control and zero are one); timesteps: of the
    schedule.
    """

    def __init__(self, coordinates: int, condition: int, widths: Sequence[int], null_token: str = "learned", timesteps: int = 1000) -> None:
        super().__init__()
        self.coordinates, self.condition = coordinates, condition
        self.register_buffer("waves", timestep_embedding(torch.arange(timesteps), EMBEDDING_WIDTH), persistent=False)
        width = EMBEDDING_WIDTH
        self.label = nn.Sequential(nn.Linear(condition, width), nn.SiLU(), nn.Linear(width, width))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.null = nn.Parameter(0.5 * torch.randn(width)) if null_token == "learned" else None
        levels = [coordinates, *widths]
        self.down = nn.ModuleList(Block(a, b) for a, b in zip(levels[:-1], levels[1:], strict=True))
        self.up = nn.ModuleList(Block(a, b) for a, b in zip(reversed(widths[1:]), reversed(widths[:-1]), strict=True))
        self.sizes = [*widths, *reversed(widths[:-1])]
        # The projections of all blocks as one product each.
        self.label_out, self.time_out = (nn.Linear(width, sum(self.sizes)) for _ in range(2))
        nn.init.ones_(self.label_out.bias)  # The product starts near the identity.
        self.out = nn.Linear(widths[0], coordinates)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def embed(self, condition: Tensor) -> Tensor:
        """Conditions (u, condition) to label embeddings (u, width)."""
        return self.label(condition)

    def null_label(self) -> Tensor:
        """Label embedding of the unconditional model, (1, width)."""
        if self.null is not None:
            return self.null[None]
        return self.label(torch.zeros(1, self.condition, device=self.out.weight.device))

    def forward(self, y: Tensor, t: Tensor, label: Tensor, index: Tensor | None = None) -> Tensor:
        """Noised latents (..., coordinates) at timesteps t to the prediction of the same shape.

        label: embeddings that broadcast against y, or with `index` (n,) a table (u, width) of which each row takes one:
        a projection per condition is much cheaper than one per cell.
        """
        labels = self.label_out(label)
        labels = (labels if index is None else nn.functional.embedding(index, labels)).split(self.sizes, dim=-1)
        times = self.time_out(self.time(self.waves[t])).split(self.sizes, dim=-1)
        projections = list(zip(labels, times, strict=True))
        kept = []
        for block, projected in zip(self.down, projections, strict=False):
            y = block(y, *projected)
            kept.append(y)
        for block, skip, projected in zip(self.up, reversed(kept[:-1]), projections[len(kept) :], strict=True):
            y = block(y, *projected) + skip
        return self.out(y).float()

    def misfit(self, y: Tensor, t: Tensor, conditions: Tensor, index: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """Mean squared error of `forward` against target (n, coordinates), rows weighted by (n,), as it is trained: each row takes one of
        the conditions (u, condition) by index (n,), the null label where that is u. Scalar; only parameters have gradients.
        """
        by_hand = fused(y, conditions, target, weight)
        return (self._misfit_by_hand if by_hand else self.misfit_of)(y, t, conditions, index, target, weight)

    def misfit_of(self, y: Tensor, t: Tensor, conditions: Tensor, index: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """`misfit` by torch's own operations."""
        table = torch.cat([self.embed(conditions), self.null_label()])
        predicted = self(y, t, table, index)
        return (weight * (predicted - target).square().mean(1)).mean()

    def _misfit_by_hand(self, y: Tensor, t: Tensor, conditions: Tensor, index: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """`misfit` without a graph in between."""
        if self.null is None:
            conditions = torch.cat([conditions, torch.zeros_like(conditions[:1])])
        shape, half = (len(self.down), self.sizes, self.null is not None), torch.is_autocast_enabled("cpu")
        size = len(y), len(conditions)

        def made(values: list[Value | None]) -> denoiser_cpu.Misfit:
            return denoiser_cpu.Misfit(values, *size, *shape, half, self.down[0].norm.eps)

        inputs = y, self.waves.index_select(0, t), conditions, index, target, weight
        return self.loss_by_hand(made, self._in_order, (*size, half), inputs)

    @cached_property
    def _in_order(self) -> list[nn.Parameter]:
        """Parameters as the pass by hand takes them; what they are never changes, where their values lie may."""
        linears = [self.time[0], self.time[2], self.time_out, self.label[0], self.label[2], self.label_out]
        pairs = [*linears, *(part for block in (*self.down, *self.up) for part in (block.linear, block.norm)), self.out]
        return [value for part in pairs for value in (part.weight, part.bias)] + ([] if self.null is None else [self.null])
