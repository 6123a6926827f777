"""Classifier-free guidance (Ho and Salimans 2022)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Epsilon = Callable[[Tensor, int], Tensor]
"""(noised latents, trained timestep) -> predicted noise of the same shape."""


def guided(conditional: Epsilon, null: Epsilon, strength: float) -> Epsilon:
    """(1 + w) conditional - w null; `null` is not called at w = 0."""
    if strength == 0:
        return conditional

    def epsilon(y: Tensor, t: int) -> Tensor:
        return (1 + strength) * conditional(y, t) - strength * null(y, t)

    return epsilon
