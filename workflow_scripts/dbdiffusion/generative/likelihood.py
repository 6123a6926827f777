"""The negative binomial's likelihood with its gradient by hand: torch's digamma alone would cost as much as the network."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn.functional import softplus


def digamma_shifted(x: Tensor) -> Tensor:
    """The derivative of ln Gamma at x > 0: asymptotic series at x + 3, less 1/x + 1/(x + 1) + 1/(x + 2)."""
    y = x + 3
    inverse = y.reciprocal()
    square = inverse * inverse
    series = inverse * 0.5 + square * (1 / 12 - square * (1 / 120 - square * (1 / 252)))
    return y.log_().sub_(series).sub_((3 * x * x).add_(6 * x).add_(2).div_((x + 1).mul_(x + 2).mul_(x)))


class _NegativeBinomial(torch.autograd.Function):
    """With D = ln mean - ln r: -ln NB = ln Gamma(r) - ln Gamma(c + r) + (c + r) softplus(D) - c D, summed over genes."""

    @staticmethod
    def forward(ctx: FunctionCtx, counts: Tensor, log_mean: Tensor, log_r: Tensor) -> Tensor:
        r = torch.exp(log_r)
        total, gap = counts + r, log_mean - log_r
        excess = softplus(gap)
        ctx.save_for_backward(counts, gap, r, excess)
        value = torch.lgamma(total).neg_().add_(torch.lgamma(r)).addcmul_(total, excess)
        return value.addcmul_(counts, gap, value=-1).sum(1)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[None, Tensor, Tensor]:
        counts, gap, r, excess = ctx.saved_tensors
        total = counts + r
        by_mean = torch.sigmoid(gap).mul_(total).sub_(counts)
        by_r = (excess + digamma_shifted(r)).sub_(digamma_shifted(total)).mul_(r).sub_(by_mean)
        grad = grad[:, None]
        return None, by_mean.mul_(grad), by_r.mul_(grad).sum(0)


def nb_negative_log_likelihood(counts: Tensor, log_mean: Tensor, log_r: Tensor) -> Tensor:
    """-ln NB(counts; mean, inverse dispersion r) of each cell, summed over genes, without ln(counts!) which no parameter changes.

    counts, log_mean: (n, G); log_r: (G,); variance mean + mean^2 / r. Returns (n,).
    """
    return _NegativeBinomial.apply(counts, log_mean, log_r)
