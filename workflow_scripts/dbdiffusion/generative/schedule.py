"""Noise schedules of a variance-preserving diffusion, whole or respaced to fewer steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BETA_FIRST, BETA_LAST = 1.0e-4, 0.02
"""Linear betas of Ho et al. 2020 at 1000 timesteps; scaled by 1000 / T for other T so that the end is as noisy."""
COSINE_OFFSET = 0.008
LEAST_SIGNAL = 4.0e-5
"""alpha_bar at which sampling starts: the last level of the linear schedule."""


@dataclass(frozen=True)
class NoiseSchedule:
    """Noise levels from the least (first) to the most noisy (last).

    timesteps: (S,) the trained timesteps, ascending; alpha_bar: (S,) share of signal variance at each, descending.
    A noised x is sqrt(alpha_bar) x + sqrt(1 - alpha_bar) noise.
    """

    timesteps: np.ndarray
    alpha_bar: np.ndarray

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def alpha(self) -> np.ndarray:
        """(S,) ratio of alpha_bar to that of the level below (1 below the first)."""
        return self.alpha_bar / np.concatenate([[1.0], self.alpha_bar[:-1]])

    def respaced(self, steps: int, power: float = 1.0) -> NoiseSchedule:
        """`steps` levels at most, the first and the last of those above LEAST_SIGNAL included; timesteps grow as i^power.

        Where nearly no signal is left a large step is unstable (the cosine schedule ends at 1e-9) and changes nothing.
        """
        last = int((self.alpha_bar >= LEAST_SIGNAL).sum()) - 1
        at = np.unique(np.round(np.linspace(0, 1, min(steps, last + 1)) ** power * last).astype(int))
        return NoiseSchedule(self.timesteps[at], self.alpha_bar[at])


def noise_schedule(kind: str, timesteps: int) -> NoiseSchedule:
    """`linear` betas (Ho et al. 2020) or `cosine` alpha_bar (Nichol and Dhariwal 2021, eq. 17)."""
    if kind == "linear":
        scale = 1000.0 / timesteps
        beta = np.linspace(min(scale * BETA_FIRST, 0.5), min(scale * BETA_LAST, 0.999), timesteps)
    else:
        angle = (np.arange(timesteps + 1) / timesteps + COSINE_OFFSET) / (1 + COSINE_OFFSET) * np.pi / 2
        level = np.cos(angle) ** 2
        beta = np.minimum(1 - level[1:] / level[:-1], 0.999)
    return NoiseSchedule(np.arange(timesteps), np.cumprod(1 - beta))
