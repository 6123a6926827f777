"""Classifier-free guidance (Ho and Salimans 2022)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Epsilon = Callable[[Tensor, int], Tensor]
"""(noised latents, trained timestep) -> predicted noise of the same shape."""


def guided(conditional: Epsilon, null: Epsilon, strength: Tensor) -> Epsilon:
    """(1 + w) conditional - w null, w broadcasting against the latents; `null` is not called where all w are 0."""
    if not strength.any():
        return conditional

    def epsilon(y: Tensor, t: int) -> Tensor:
        return (1 + strength) * conditional(y, t) - strength * null(y, t)

    return epsilon
