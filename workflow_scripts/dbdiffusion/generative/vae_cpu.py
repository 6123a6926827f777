"""The variational autoencoder on a CPU, forward and backward by hand.

The same mathematics as `vae.CellVae` with LayerNorm and SiLU, which is the definition: products by torch, all between two products in one
loop each (here and in `kernels`), from the rows of the data to the likelihood, and no graph in between. Under autocast products are of
bfloat16, and so is what goes into and comes out of them; what is in between is in single precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.autograd.function import FunctionCtx

from dbdiffusion.generative.kernels import (
    EXACT,
    SUMS,
    F,
    array,
    exp,
    log1p,
    log_gamma_and_digamma,
    narrow,
    norm_silu,
    norm_silu_backward,
    total,
    wide,
)
from dbdiffusion.generative.linear_cpu import Linear


@njit(**SUMS)
def _scaled(values, rows, factor, offset, out):
    """values[rows] factor + offset, by column, into out (n, d), which can be bfloat16."""
    for i in range(rows.size):
        row = values[rows[i]]
        for j in range(row.size):
            x = row[j] * factor[j] + offset[j]
            out[i, j] = narrow(out, x)


@njit(**SUMS)
def _normalised(x, table, index, gain, bias, epsilon, hat, inverse, out):
    """SiLU(LayerNorm(x + table[index])) into out (n, d), and for the backward pass `hat` (n, d) and `inverse` (n,) of `norm_silu`.

    x (n, d); table (u, d), of which each row takes one by index (n,); gain, bias (d,). x and out can be bfloat16.
    """
    for i in range(len(x)):
        row = table[index[i]]
        for j in range(row.size):
            hat[i, j] = wide(x[i, j]) + row[j]
        inverse[i] = norm_silu(hat[i], gain, bias, epsilon, out[i])


@njit(**SUMS)
def _normalised_backward(grad, index, gain, bias, hat, inverse, by_x, by_table, by_gain, by_bias):
    """Backward pass of `_normalised`: grad (n, d) of its output into by_x (n, d), by_table (u, d), by_gain and by_bias (d,). grad and by_x
    can be bfloat16."""
    by_row = np.empty(gain.size, dtype=np.float32)
    by_table[:], by_gain[:], by_bias[:] = F(0.0), F(0.0), F(0.0)
    for i in range(len(hat)):
        of_table = by_table[index[i]]
        norm_silu_backward(grad[i], hat[i], inverse[i], gain, bias, by_row, by_gain, by_bias)
        for j in range(by_row.size):
            by_x[i, j] = narrow(by_x, by_row[j])
            of_table[j] += by_row[j]


@njit(**SUMS)
def _posterior(encoded, offset, noise, low, high, moments, latent, divergence):
    """Mean and unlimited log variance, encoded + offset, into moments (n, 2 k); a draw with noise (n, k) into latent (n, k); and the KL
    divergence from N(0, 1), mean over rows, into divergence (k,). encoded (n, 2 k) and latent can be bfloat16."""
    n, k = noise.shape
    divergence[:] = F(0.0)
    for i in range(n):
        for j in range(k):
            mean, given = wide(encoded[i, j]) + offset[j], wide(encoded[i, k + j]) + offset[k + j]
            moments[i, j] = mean
            moments[i, k + j] = given
            log_variance = min(max(given, low), high)
            deviation = exp(F(0.5) * log_variance)
            drawn = mean + noise[i, j] * deviation
            latent[i, j] = narrow(latent, drawn)
            divergence[j] += F(0.5) * (mean * mean + deviation * deviation - F(1.0) - log_variance)
    for j in range(k):
        divergence[j] /= F(n)


@njit(**SUMS)
def _posterior_backward(grad, moments, noise, low, high, weight, by_encoded, by_offset):
    """Backward pass of `_posterior`: grad (n, k) of latent and weight (k,), the gradient of each row's divergence, into by_encoded (n, 2 k)
    and by_offset (2 k,). grad and by_encoded can be bfloat16."""
    n, k = noise.shape
    by_offset[:] = F(0.0)
    for i in range(n):
        for j in range(k):
            mean, given, by_latent = moments[i, j], moments[i, k + j], wide(grad[i, j])
            deviation = exp(F(0.5) * given)
            by_mean = by_latent + weight[j] * mean
            by_variance = F(0.5) * (by_latent * noise[i, j] * deviation + weight[j] * (deviation * deviation - F(1.0)))
            if given < low or given > high:
                by_variance = F(0.0)
            by_encoded[i, j] = narrow(by_encoded, by_mean)
            by_encoded[i, k + j] = narrow(by_encoded, by_variance)
            by_offset[j] += by_mean
            by_offset[k + j] += by_variance


@njit(**EXACT)
def negative_binomial(counts, rows, log_rate, table, index, log_size, log_r, largest_gap, weight, by_rate, by_table, by_r):
    """`weight` times the sum over rows and genes of -ln NB(counts[rows]; mean exp(log_rate + table[index] + log_size), r), without
    ln(counts!), and its gradients: into by_rate (n, G), by_table (u, G) and by_r (G,), the last by ln r.

    counts (N, G); rows, index, log_size (n,); log_rate (n, G); table (u, G); log_r (G,). log_rate and by_rate can be bfloat16. Formulas:
    `likelihood._NegativeBinomial`.
    """
    genes = log_r.size
    r, at_r, slope_r, each = np.empty_like(log_r), np.empty_like(log_r), np.empty_like(log_r), np.empty_like(log_r)
    by_table[:], by_r[:] = F(0.0), F(0.0)
    for j in range(genes):
        r[j] = exp(log_r[j])
        at_r[j], slope_r[j] = log_gamma_and_digamma(r[j])
    value = 0.0
    for i in range(rows.size):
        seen, given, out = counts[rows[i]], log_rate[i], by_rate[i]
        row, of_table = table[index[i]], by_table[index[i]]
        for j in range(genes):
            c = seen[j]
            every = c + r[j]
            gap = min(wide(given[j]) + row[j] + (log_size[i] - log_r[j]), largest_gap)
            u = exp(gap)
            excess = log1p(u)
            at_every, slope = log_gamma_and_digamma(every)
            each[j] = at_r[j] - at_every + every * excess - c * gap
            slope_mean = u / (u + F(1.0)) * every - c
            by_mean = weight * slope_mean
            out[j] = narrow(out, by_mean)
            of_table[j] += by_mean
            by_r[j] += weight * ((excess + slope_r[j] - slope) * r[j] - slope_mean)
        value += total(each)
    return value * weight


@njit(**SUMS)
def gaussian(observed, rows, mean, table, index, log_variance, weight, by_mean, by_table, by_log_variance):
    """`weight` times the sum over rows and genes of -ln N(observed[rows]; mean + table[index], variance), without its constant, and its
    gradients: into by_mean (n, G), by_table (u, G) and by_log_variance (G,).

    observed (N, G); rows, index (n,); mean (n, G); table (u, G); log_variance (G,). mean and by_mean can be bfloat16.
    """
    precision, each, value = np.empty_like(log_variance), np.empty_like(log_variance), 0.0
    by_table[:], by_log_variance[:] = F(0.0), F(0.0)
    for j in range(precision.size):
        precision[j] = exp(-log_variance[j])
    for i in range(rows.size):
        seen, given, out = observed[rows[i]], mean[i], by_mean[i]
        row, of_table = table[index[i]], by_table[index[i]]
        for j in range(precision.size):
            error = wide(given[j]) + row[j] - seen[j]
            slope = error * precision[j]
            each[j] = F(0.5) * (error * slope + log_variance[j])
            by_row = weight * slope
            out[j] = narrow(out, by_row)
            of_table[j] += by_row
            by_log_variance[j] += F(0.5) * weight * (F(1.0) - error * slope)
        value += total(each)
    return value * weight


def _table(bias: Tensor, of_batch: Tensor | None) -> Tensor:
    """Intercepts by batch, (1, d) where there are none of their own."""
    return bias[None] if of_batch is None else bias + of_batch


def _intercepts(by_table: Tensor, of_batch: Tensor | None) -> list[Tensor | None]:
    """Gradients of bias and of_batch."""
    return [by_table.sum(0), None if of_batch is None else by_table]


class _Layer:
    """Linear layer with intercepts by batch, LayerNorm, SiLU."""

    def __init__(self, given: Iterator[Tensor | None], half: bool, epsilon: float) -> None:
        weight, bias, self.of_batch, self.gain, self.bias = (next(given) for _ in range(5))
        self.linear, self.table, self.epsilon = Linear(weight, None, half), _table(bias, self.of_batch), np.float32(epsilon)

    def __call__(self, x: Tensor, batch: Tensor) -> Tensor:
        x = self.linear(x)
        self.index = torch.zeros_like(batch) if self.of_batch is None else batch
        self.hat, self.inverse, out = torch.empty_like(x, dtype=torch.float32), self.table.new_empty(len(x)), torch.empty_like(x)
        known, made = (x, self.table, self.index, self.gain, self.bias), (self.hat, self.inverse, out)
        _normalised(*map(array, known), self.epsilon, *map(array, made))
        return out

    def backward(self, grad: Tensor, wanted: bool) -> tuple[Tensor | None, list[Tensor | None]]:
        """Gradients of x (None unless wanted) and of what was given."""
        by_x, by_table, by_gain, by_bias = map(torch.empty_like, (grad, self.table, self.gain, self.bias))
        known = grad, self.index, self.gain, self.bias, self.hat, self.inverse
        _normalised_backward(*map(array, (*known, by_x, by_table, by_gain, by_bias)))
        by_input, by_weight = self.linear.backward(by_x, wanted)
        return by_input, [by_weight, *_intercepts(by_table, self.of_batch), by_gain, by_bias]


class _Trunk:
    """Hidden layers, the first of which knows the batch."""

    def __init__(self, given: Iterator[Tensor | None], layers: int, half: bool, epsilon: float) -> None:
        self.layers = [_Layer(given, half, epsilon) for _ in range(layers)]

    def __call__(self, x: Tensor, batch: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, batch)
        return x

    def backward(self, grad: Tensor | None, wanted: bool) -> tuple[Tensor | None, list[Tensor | None]]:
        out: list[Tensor | None] = []
        for i in reversed(range(len(self.layers))):
            grad, of_layer = self.layers[i].backward(grad, wanted or i > 0)
            out[:0] = of_layer
        return grad, out


@dataclass(frozen=True)
class Seen:
    """What the loss sees of some cells: rows (n,) of expression and observed (N, G); log_size and batch (n,), of these rows."""

    rows: Tensor
    expression: Tensor
    observed: Tensor
    log_size: Tensor
    batch: Tensor


@dataclass(frozen=True)
class Shape:
    """layers: of encoder and of decoder each; limits: of the posterior's log variance; largest_gap: of the negative binomial, None for the
    gaussian; half: products of bfloat16; epsilon: of LayerNorm."""

    layers: int
    limits: tuple[float, float]
    largest_gap: float | None
    half: bool
    epsilon: float


class Pass(torch.autograd.Function):
    """Mean over cells of the negative log-likelihood and of the weighted KL term, per gene.

    noise: (n, latent); factor, offset: (G,), of the encoder's input; kl_weight, free_bits: as `vae.vae_loss` takes them; spread: (G,),
    ln r or ln variance; given: weight, bias and intercepts by batch (None but where the layer knows the batch) of each linear layer, gain
    and bias of its norm. Gradients of spread and of these.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        seen: Seen,
        noise: Tensor,
        factor: Tensor,
        offset: Tensor,
        kl_weight: float,
        free_bits: float,
        shape: Shape,
        spread: Tensor,
        *given: Tensor | None,
    ) -> Tensor:
        values, half = iter(given), shape.half
        encoder = _Trunk(values, shape.layers, half, shape.epsilon)
        to_latent, of_latent, _ = Linear(next(values), None, half), next(values), next(values)
        decoder = _Trunk(values, shape.layers, half, shape.epsilon)
        to_genes, bias, of_batch = Linear(next(values), None, half), next(values), next(values)
        n, genes = len(seen.rows), len(factor)
        low = torch.bfloat16 if half else torch.float32

        scaled = factor.new_empty(n, genes, dtype=low)
        _scaled(*map(array, (seen.expression, seen.rows, factor, offset, scaled)))
        encoded = to_latent(encoder(scaled, seen.batch))
        moments, latent, divergence = torch.empty_like(encoded, dtype=torch.float32), torch.empty_like(noise, dtype=low), noise[0].clone()
        limits = [np.float32(limit) for limit in shape.limits]
        _posterior(*map(array, (encoded, of_latent, noise)), *limits, *map(array, (moments, latent, divergence)))
        made = to_genes(decoder(latent, seen.batch))
        table = _table(bias, of_batch)
        index = seen.batch if len(table) > 1 else torch.zeros_like(seen.batch)
        grads, weight = tuple(map(torch.empty_like, (made, table, spread))), np.float32(1 / (n * genes))
        known = [array(x) for x in (seen.observed, seen.rows, made, table, index)]
        if shape.largest_gap is None:
            misfit = gaussian(*known, array(spread), weight, *map(array, grads))
        else:
            gap = np.float32(shape.largest_gap)
            misfit = negative_binomial(*known, *map(array, (seen.log_size, spread)), gap, weight, *map(array, grads))
        if free_bits > 0:
            over = divergence - free_bits
            kl, counted = over.clamp_min(0).sum(), over >= 0
        else:
            kl, counted = divergence.sum(), torch.ones_like(divergence)
        ctx.networks, ctx.grads, ctx.of_batch = (encoder, to_latent, decoder, to_genes), grads, of_batch
        ctx.posterior, ctx.limits, ctx.weight = (moments, noise), limits, counted * (kl_weight / (n * genes))
        return kl * (kl_weight / genes) + misfit

    @staticmethod
    def backward(ctx: FunctionCtx, scale: Tensor) -> tuple[Tensor | None, ...]:
        encoder, to_latent, decoder, to_genes = ctx.networks
        grad, by_table, by_spread = ctx.grads
        grad, by_genes = to_genes.backward(grad)
        grad, of_decoder = decoder.backward(grad, True)
        moments, noise = ctx.posterior
        by_encoded, by_offset = torch.empty_like(moments, dtype=grad.dtype), moments.new_empty(moments.shape[1])
        _posterior_backward(*map(array, (grad, moments, noise)), *ctx.limits, *map(array, (ctx.weight, by_encoded, by_offset)))
        grad, by_latent = to_latent.backward(by_encoded)
        _, of_encoder = encoder.backward(grad, False)
        out = [by_spread, *of_encoder, by_latent, by_offset, None, *of_decoder, by_genes, *_intercepts(by_table, ctx.of_batch)]
        if float(scale) != 1:
            out = [x if x is None else x * scale for x in out]
        return *(None,) * 7, *out
