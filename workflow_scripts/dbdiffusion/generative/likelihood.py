"""The negative binomial: its likelihood with the gradient by hand, and expectations of ln(1 + CP10k) under it.

By torch's own functions the likelihood would cost more than the network. ln Gamma and its derivative come from Stirling's series at x + 3,
brought back by ln x(x + 1)(x + 2): errors below 1e-6 for x > 0. Both need the same logarithm and reciprocal, so value and gradient are made
in one pass. (The default autoencoder on a CPU has a loop of its own, `kernels.negative_binomial`.)
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from scipy.special import gammaln, xlogy
from torch import Tensor
from torch.autograd.function import FunctionCtx

LARGEST_LOG_R = 10.0
"""ln r of a distribution that is Poisson for all purposes; beyond, single precision would lose the difference."""
LARGEST_GAP = 60.0
"""ln(mean / r) is cut here: its exponential stays finite."""
LOG_RATES, LOG_SCALES = (-10.0, 14.0), (-7.0, 7.0)
"""Range of the table of expectations: ln Poisson rate and ln CP10k of a single count."""
BLOCK = 4_000_000
"""Expectations that are made at once."""
EXACT_BELOW = 300.0
"""Poisson rates up to which expectations are summed; above, they are expanded about the rate."""


def log_gamma_and_digamma(x: Tensor, digamma: bool = True) -> tuple[Tensor, Tensor | None]:
    """ln Gamma(x) and its derivative (None unless wanted), elementwise for x > 0."""
    y = x + 3
    log, inverse = y.log(), y.reciprocal()
    square = inverse * inverse
    product = (x + 3).mul_(x).add_(2).mul_(x)  # x (x + 1)(x + 2)
    series = (square * (1 / 1260)).add_(-1 / 360).mul_(square).add_(1 / 12).mul_(inverse)
    value = (y - 0.5).mul_(log).sub_(y).add_(0.5 * math.log(2 * math.pi)).add_(series).sub_(product.log())
    if not digamma:
        return value, None
    series = square.mul_(-1 / 252).add_(1 / 120).mul_(inverse).mul_(inverse).add_(-1 / 12).mul_(inverse).add_(-0.5).mul_(inverse)
    slope = (3 * x).add_(6).mul_(x).add_(2)
    return value, log.add_(series).sub_(slope.div_(product))


class _NegativeBinomial(torch.autograd.Function):
    """With u = mean / r: -ln NB = ln Gamma(r) - ln Gamma(c + r) + (c + r) ln(1 + u) - c ln u, summed over genes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        counts: Tensor, log_rate: Tensor, log_size: Tensor, log_r: Tensor, wanted: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The value (n,), and where wanted its derivatives by ln mean and ln r."""
        r = torch.exp(log_r)
        total, gap = counts + r, (log_rate + (log_size[:, None] - log_r)).clamp(max=LARGEST_GAP)
        u = torch.exp(gap)
        excess = torch.log1p(u)
        at_total, slope = log_gamma_and_digamma(total, wanted)
        at_r, slope_r = log_gamma_and_digamma(r, wanted)
        value = torch.addcmul(torch.addcmul(at_r - at_total, total, excess), counts, gap, value=-1).sum(1)
        if not wanted:
            return value, None, None
        # By ln mean (c + r) u / (1 + u) - c.
        by_mean = (u / (u + 1)).mul_(total).sub_(counts)
        return value, by_mean, excess.add_(slope_r).sub_(slope).mul_(r).sub_(by_mean)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor | None, Tensor | None]) -> None:
        if inputs[-1]:
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*output[1:])
            ctx.save_for_backward(*output[1:])

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor, *_: Tensor) -> tuple[None, Tensor, None, Tensor, None]:
        by_mean, by_r = ctx.saved_tensors
        return None, by_mean * grad[:, None], None, grad @ by_r, None


def nb_negative_log_likelihood(counts: Tensor, log_rate: Tensor, log_size: Tensor, log_r: Tensor) -> Tensor:
    """-ln NB(counts; mean, inverse dispersion r) of each cell, summed over genes, without ln(counts!) which no parameter changes.

    counts, log_rate: (n, G); log_size: (n,), of the cells, without gradient: ln mean is log_rate + log_size; log_r: (G,), at most
    LARGEST_LOG_R; variance mean + mean^2 / r. Returns (n,).
    """
    return _NegativeBinomial.apply(counts, log_rate, log_size, log_r, torch.is_grad_enabled())[0]


def expected_log1p(rate: Tensor, scale: Tensor) -> Tensor:
    """E ln(1 + c scale) for c ~ Poisson(rate), elementwise, to about 1e-3: rate (n, G), scale (n,).

    By bilinear interpolation of its ratio to ln(1 + rate scale), which is smooth and lies between 0 and 1. Beyond the table's range the
    ratio is that of its edge.
    """
    table, out = _ratios(rate.device)[None, None], []
    at_once = max(1, BLOCK // rate.shape[1])
    for r, s in zip(rate.split(at_once), scale.split(at_once), strict=True):
        columns = _place(torch.log(s), LOG_SCALES)[:, None].expand_as(r)
        grid = torch.stack([columns, _place(torch.log(r.clamp_min(1e-30)), LOG_RATES)], dim=-1)[None]
        ratio = torch.nn.functional.grid_sample(table, grid, padding_mode="border", align_corners=True)[0, 0]
        out.append(ratio * torch.log1p(r * s[:, None]))
    return torch.cat(out)


def _place(values: Tensor, limits: tuple[float, float]) -> Tensor:
    low, high = limits
    return (values - low) * (2 / (high - low)) - 1


@cache
def _ratios(device: torch.device) -> Tensor:
    """(rates, scales) table of E ln(1 + c scale) / ln(1 + rate scale)."""
    rates, scales = np.exp(np.linspace(*LOG_RATES, 241)), np.exp(np.linspace(*LOG_SCALES, 141))
    small = rates <= EXACT_BELOW
    counts = np.arange(int(EXACT_BELOW + 12 * math.sqrt(EXACT_BELOW)))
    chance = np.exp(xlogy(counts, rates[small, None]) - rates[small, None] - gammaln(counts + 1))
    exact = chance @ np.log1p(counts[:, None] * scales)
    # Fourth-order expansion in the central moments rate, rate and 3 rate^2 + rate.
    rate, slope = rates[~small, None], scales / (1 + rates[~small, None] * scales)
    series = np.log1p(rate * scales) - rate * slope**2 / 2 + rate * slope**3 / 3 - (3 * rate**2 + rate) * slope**4 / 4
    table = np.vstack([exact, series]) / np.log1p(rates[:, None] * scales)
    return torch.from_numpy(table).float().to(device)
