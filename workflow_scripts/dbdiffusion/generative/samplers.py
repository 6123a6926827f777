"""Samplers of a variance-preserving diffusion as pure functions of one signature.

epsilon: (y, trained timestep) -> predicted noise; schedule: the levels to visit; y: (..., d) start from N(0, I); draw: (number) ->
standard normal noise that broadcasts against y, the same for the same number. Each returns samples of the shape of y. The score of a level
is -epsilon / sqrt(1 - alpha_bar).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from dbdiffusion.generative.guidance import Epsilon
from dbdiffusion.generative.schedule import NoiseSchedule

Draw = Callable[[int], Tensor]
Sampler = Callable[[Epsilon, NoiseSchedule, Tensor, Draw], Tensor]


def accelerated(epsilon: Epsilon, schedule: NoiseSchedule, y: Tensor, draw: Draw) -> Tensor:
    """Accelerated stochastic sampler (Li et al. 2024, arXiv 2403.03852), one score call a step.

    Y+ = Y + sqrt((1 - a) / 2) Z;  Y' = (Y+ + (1 - a) s(Y+) + sqrt((1 - a) / 2) Z') / sqrt(a).
    """
    for i in reversed(range(len(schedule))):
        a, level = float(schedule.alpha[i]), float(schedule.alpha_bar[i])
        jitter = math.sqrt((1 - a) / 2)
        middle = y + jitter * draw(2 * i)
        score = epsilon(middle, int(schedule.timesteps[i])) / -math.sqrt(1 - level)
        y = (middle + (1 - a) * score + jitter * draw(2 * i + 1)) / math.sqrt(a)
    return y


def ddpm(epsilon: Epsilon, schedule: NoiseSchedule, y: Tensor, draw: Draw) -> Tensor:
    """Ancestral sampling with the posterior variance (Ho et al. 2020, algorithm 2 and eq. 7)."""
    for i in reversed(range(len(schedule))):
        a, level = float(schedule.alpha[i]), float(schedule.alpha_bar[i])
        below = float(schedule.alpha_bar[i - 1]) if i else 1.0
        y = (y - (1 - a) / math.sqrt(1 - level) * epsilon(y, int(schedule.timesteps[i]))) / math.sqrt(a)
        if i:
            y = y + math.sqrt((1 - below) / (1 - level) * (1 - a)) * draw(i)
    return y


def ddim(epsilon: Epsilon, schedule: NoiseSchedule, y: Tensor, draw: Draw) -> Tensor:
    """Deterministic implicit sampling (Song et al. 2021, eq. 12 with eta = 0)."""
    for i in reversed(range(len(schedule))):
        level = float(schedule.alpha_bar[i])
        below = float(schedule.alpha_bar[i - 1]) if i else 1.0
        noise = epsilon(y, int(schedule.timesteps[i]))
        clean = (y - math.sqrt(1 - level) * noise) / math.sqrt(level)
        y = math.sqrt(below) * clean + math.sqrt(1 - below) * noise
    return y


def dpmpp_2m(epsilon: Epsilon, schedule: NoiseSchedule, y: Tensor, draw: Draw) -> Tensor:
    """Second-order multistep solver of the data prediction (Lu et al. 2022, DPM-Solver++ algorithm 2), deterministic.

    With alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar), lambda = ln(alpha / sigma); the last step returns the data prediction itself.
    """
    last: tuple[Tensor, float] | None = None
    for i in reversed(range(len(schedule))):
        level = float(schedule.alpha_bar[i])
        alpha, sigma = math.sqrt(level), math.sqrt(1 - level)
        clean = (y - sigma * epsilon(y, int(schedule.timesteps[i]))) / alpha
        if i == 0:
            return clean
        below = float(schedule.alpha_bar[i - 1])
        h = 0.5 * (math.log(below / (1 - below)) - math.log(level / (1 - level)))
        combined = clean
        if last is not None:
            ratio = last[1] / h
            combined = (1 + 1 / (2 * ratio)) * clean - 1 / (2 * ratio) * last[0]
        y = math.sqrt((1 - below) / (1 - level)) * y - math.sqrt(below) * math.expm1(-h) * combined
        last = clean, h
    return y


SAMPLERS: dict[str, Sampler] = {"accelerated": accelerated, "ddpm": ddpm, "ddim": ddim, "dpmpp_2m": dpmpp_2m}
SPACING = {"accelerated": 1.0, "ddpm": 1.5, "ddim": 1.5, "dpmpp_2m": 2.0}
"""Power of the spacing of few steps, chosen by the exact variance of Gaussian samples at 25-100 steps: at 50 steps and unit variance it
errs by 0.8 % (accelerated), 6 % (ddim) and 0.2 % (dpmpp_2m; evenly spaced 3.7 %)."""
