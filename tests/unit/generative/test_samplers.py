"""Samplers against exact scores: Gaussians by exact propagation of the linear maps, a mixture by sampling."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dbdiffusion.generative.guidance import guided
from dbdiffusion.generative.samplers import SAMPLERS, SPACING
from dbdiffusion.generative.schedule import NoiseSchedule, noise_schedule


def exact_variance(name: str, variance: float, steps: int, kind: str = "linear") -> float:
    """Variance of the samples for N(0, variance) data and its exact score, without sampling.

    Every quantity is a linear combination of independent noises, held as its vector of coefficients: the squared length is the variance.
    """
    schedule = noise_schedule(kind, 1000).respaced(steps, SPACING[name])
    level = dict(zip(schedule.timesteps.tolist(), schedule.alpha_bar.tolist(), strict=True))
    basis = torch.eye(2 * steps + 1, dtype=torch.float64)

    def epsilon(y: Tensor, t: int) -> Tensor:
        total = level[t] * variance + 1 - level[t]
        return math.sqrt(1 - level[t]) * y / total

    sample = SAMPLERS[name](epsilon, schedule, basis[-1], lambda number: basis[number])
    return float(sample.square().sum())


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_accelerated_keeps_unit_variance_within_one_percent_at_100_steps(kind: str) -> None:
    assert exact_variance("accelerated", 1.0, 100, kind) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_variance_of_gaussians_converges(name: str) -> None:
    """Errors fall with the steps, at first order for ddpm and ddim and at second for the others."""
    at_100, at_400 = {"ddpm": (0.1, 0.03), "ddim": (0.05, 0.015)}.get(name, (0.01, 0.001))
    for variance in (0.5, 1.0, 1.5):
        errors = [abs(exact_variance(name, variance, steps) / variance - 1) for steps in (25, 100, 400)]
        assert errors[1] < at_100
        assert errors[2] < at_400
        assert errors[2] < errors[1] < errors[0]


def test_unstandardised_latents_need_more_steps() -> None:
    """Why latents are standardised: at the published scale (sd 0.09) the same steps err twenty times as much."""
    assert abs(exact_variance("accelerated", 0.0081, 50) / 0.0081 - 1) > 20 * abs(exact_variance("accelerated", 1.0, 50) - 1)


def test_accelerated_step_is_the_formula() -> None:
    schedule = noise_schedule("linear", 1000).respaced(4)
    random = np.random.default_rng(0)
    draws = random.normal(size=(8, 3))

    def epsilon(y: Tensor, t: int) -> Tensor:
        return torch.sin(y) + t / 1000

    start = torch.tensor(random.normal(size=3))
    got = SAMPLERS["accelerated"](epsilon, schedule, start, lambda number: torch.tensor(draws[number]))
    y = start.numpy()
    for i in (3, 2, 1, 0):
        abar = schedule.alpha_bar[i]
        a = abar / (schedule.alpha_bar[i - 1] if i else 1.0)
        plus = y + math.sqrt((1 - a) / 2) * draws[2 * i]
        s = -(np.sin(plus) + schedule.timesteps[i] / 1000) / math.sqrt(1 - abar)
        y = (plus + (1 - a) * s + math.sqrt((1 - a) / 2) * draws[2 * i + 1]) / math.sqrt(a)
    np.testing.assert_allclose(got.numpy(), y, rtol=1e-10)


def mixture_epsilon(schedule: NoiseSchedule, centres: tuple[float, float], weights: tuple[float, float], sd: float):
    """Exact noise prediction for a mixture of two normals: -sqrt(1 - abar) x d/dy ln p_t(y)."""
    level = dict(zip(schedule.timesteps.tolist(), schedule.alpha_bar.tolist(), strict=True))

    def epsilon(y: Tensor, t: int) -> Tensor:
        a = level[t]
        variance = a * sd**2 + 1 - a
        gap = torch.stack([y - math.sqrt(a) * c for c in centres])
        log_p = -gap.square() / (2 * variance) + torch.log(torch.tensor(weights, dtype=y.dtype)).reshape(-1, *[1] * y.ndim)
        score = -(torch.softmax(log_p, 0) * gap).sum(0) / variance
        return -math.sqrt(1 - a) * score

    return epsilon


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_mixture_is_recovered(name: str) -> None:
    schedule = noise_schedule("linear", 1000).respaced(200, SPACING[name])
    epsilon = mixture_epsilon(schedule, (-1.6, 0.7), (0.3, 0.7), 0.4)
    n = 20000

    def draw(number: int) -> Tensor:
        return torch.randn(n, generator=torch.Generator().manual_seed(number), dtype=torch.float64)

    x = SAMPLERS[name](epsilon, schedule, draw(10_000), draw)
    low = x < -0.45
    # 5 sd of a binomial, and 0.01 for the discretisation.
    assert float(low.double().mean()) == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / n) + 0.01)
    assert float(x[low].mean()) == pytest.approx(-1.6, abs=0.04)
    assert float(x[~low].mean()) == pytest.approx(0.7, abs=0.03)
    assert float(x[~low].std()) == pytest.approx(0.4, rel=0.06)


def test_guidance_is_extrapolation_and_spares_the_null_call_at_zero() -> None:
    def null(y: Tensor, t: int) -> Tensor:
        raise AssertionError("not needed")

    y = torch.ones(2)
    assert torch.equal(guided(lambda y, t: 3 * y, null, torch.zeros(1))(y, 1), 3 * y)
    assert torch.allclose(guided(lambda y, t: 3 * y, lambda y, t: y, torch.tensor([0.5]))(y, 1), 1.5 * 3 * y - 0.5 * y)
