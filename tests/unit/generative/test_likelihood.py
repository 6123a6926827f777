from __future__ import annotations

import math

import numpy as np
import torch
from scipy import special, stats

from dbdiffusion.generative.likelihood import expected_log1p, log_gamma_and_digamma, nb_negative_log_likelihood


def split(log_mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ln rate and ln size, whose sum it is."""
    size = torch.linspace(-1, 1, len(log_mean), dtype=log_mean.dtype)
    return log_mean - size[:, None], size


def test_log_gamma_and_digamma_against_scipy() -> None:
    x = np.concatenate([np.logspace(-4, 4, 400), np.arange(1, 50)])
    value, slope = log_gamma_and_digamma(torch.tensor(x))
    np.testing.assert_allclose(value.numpy(), special.gammaln(x), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(slope.numpy(), special.digamma(x), rtol=1e-6, atol=1e-5)


def test_negative_binomial_against_scipy() -> None:
    random = np.random.default_rng(0)
    counts, mean, r = random.poisson(3, (50, 4)), random.gamma(2, 2, (50, 4)), np.array([0.3, 1.0, 5.0, 200.0])
    expected = -stats.nbinom.logpmf(counts, r, r / (r + mean)).sum(1)
    got = nb_negative_log_likelihood(torch.tensor(counts, dtype=torch.float64), *split(torch.tensor(np.log(mean))), torch.tensor(np.log(r)))
    constant = np.vectorize(math.lgamma)(counts + 1.0).sum(1)
    np.testing.assert_allclose(got.numpy() + constant, expected, rtol=1e-6)


def test_gradient_against_torch_lgamma() -> None:
    stream = torch.Generator().manual_seed(0)
    counts = torch.poisson(3 * torch.rand(20, 6, generator=stream, dtype=torch.float64), generator=stream)

    def inputs() -> tuple[torch.Tensor, torch.Tensor]:
        start = torch.Generator().manual_seed(1)
        log_mean = torch.randn(20, 6, generator=start, dtype=torch.float64).requires_grad_()
        return log_mean, torch.linspace(-3, 3, 6, dtype=torch.float64).requires_grad_()

    weight = torch.rand(20, generator=stream, dtype=torch.float64)
    log_mean, log_r = inputs()
    (weight * nb_negative_log_likelihood(counts, *split(log_mean), log_r)).sum().backward()
    slow_mean, slow_r = inputs()
    r = slow_r.exp()
    p = torch.log(slow_mean.exp() + r)
    slow = torch.lgamma(r) - torch.lgamma(counts + r) + (counts + r) * p - r * slow_r - counts * slow_mean
    (weight[:, None] * slow).sum().backward()
    torch.testing.assert_close(log_mean.grad, slow_mean.grad, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(log_r.grad, slow_r.grad, rtol=1e-4, atol=1e-4)


def test_finite_at_extremes() -> None:
    log_mean = torch.tensor([[-20.0, 12.0]], requires_grad=True)
    value = nb_negative_log_likelihood(torch.tensor([[30.0, 0.0]]), *split(log_mean), torch.tensor([8.0, -8.0])).sum()
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(log_mean.grad).all()


def test_expected_log1p_against_sums_over_counts() -> None:
    rates, scales = np.geomspace(1e-4, 2e5, 30), np.geomspace(0.01, 50, 12)
    got = expected_log1p(torch.tensor(np.tile(rates, (12, 1))).float(), torch.tensor(scales).float()).numpy()
    for j, rate in enumerate(rates):
        low, high = stats.poisson.ppf([1e-12, 1 - 1e-12], rate)
        counts = np.arange(int(low), int(high) + 2)
        expected = stats.poisson.pmf(counts, rate) @ np.log1p(counts[:, None] * scales)
        np.testing.assert_allclose(got[:, j], expected, rtol=3e-3, atol=1e-6)


def test_gradient_is_stable_where_the_distribution_is_poisson() -> None:
    counts, start = torch.tensor([[0.0, 3.0]]), torch.log(torch.tensor([[0.5, 2.0]]))
    found = []
    for kind in (torch.float32, torch.float64):
        log_mean = start.detach().clone().to(kind).requires_grad_()
        nb_negative_log_likelihood(counts.to(kind), *split(log_mean), torch.full((2,), 10.0, dtype=kind)).sum().backward()
        found.append(log_mean.grad)
    np.testing.assert_allclose(found[0].numpy(), found[1].numpy(), rtol=1e-4)
