"""The denoiser: an MLP U-Net on the latent, conditioned on the perturbation's embedding and the timestep."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dbdiffusion.generative.networks import timestep_embedding

EMBEDDING_WIDTH = 128
"""Width of the label and time embeddings."""


class Block(nn.Module):
    """Linear, multiplied by the label embedding, plus the time embedding, LayerNorm, SiLU."""

    def __init__(self, before: int, after: int, embedding: int = EMBEDDING_WIDTH) -> None:
        super().__init__()
        self.linear = nn.Linear(before, after)
        self.label = nn.Linear(embedding, after)
        self.time = nn.Linear(embedding, after)
        self.norm = nn.LayerNorm(after)
        nn.init.ones_(self.label.bias)  # The product starts near the identity.

    def forward(self, x: Tensor, label: Tensor, time: Tensor, index: Tensor | None) -> Tensor:
        scale = self.label(label)
        if index is not None:
            scale = scale[index]
        return nn.functional.silu(self.norm(self.linear(x) * scale + self.time(time)))


class Denoiser(nn.Module):
    """Widths descend level by level and come back, the levels of equal width joined by additive skips.

    coordinates: width of the latent; condition: dimensions of the perturbation embedding; null_token: `learned`, an embedding of its
    own for the unconditional model, or `zero`, the zero condition (published: then null, control and zero are one).
    """

    def __init__(self, coordinates: int, condition: int, widths: Sequence[int], null_token: str = "learned") -> None:
        super().__init__()
        self.coordinates, self.condition = coordinates, condition
        width = EMBEDDING_WIDTH
        self.label = nn.Sequential(nn.Linear(condition, width), nn.SiLU(), nn.Linear(width, width))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.null = nn.Parameter(0.5 * torch.randn(width)) if null_token == "learned" else None
        levels = [coordinates, *widths]
        self.down = nn.ModuleList(Block(a, b) for a, b in zip(levels[:-1], levels[1:], strict=True))
        self.up = nn.ModuleList(Block(a, b) for a, b in zip(reversed(widths[1:]), reversed(widths[:-1]), strict=True))
        self.out = nn.Linear(widths[0], coordinates)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def embed(self, condition: Tensor) -> Tensor:
        """Perturbation embeddings (u, condition) to label embeddings (u, width)."""
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
        time = self.time(timestep_embedding(t, EMBEDDING_WIDTH))
        kept = []
        for block in self.down:
            y = block(y, label, time, index)
            kept.append(y)
        for block, skip in zip(self.up, reversed(kept[:-1]), strict=True):
            y = block(y, label, time, index) + skip
        return self.out(y).float()
