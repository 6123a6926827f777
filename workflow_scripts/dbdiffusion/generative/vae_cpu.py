"""The variational autoencoder on a CPU, forward and backward by hand.

The same mathematics as `vae.CellVae` with LayerNorm and SiLU, which is the definition: products by torch, all between two products in one
loop each (here and in `kernels`), from the rows of the data to the likelihood, and no graph in between. Under autocast products are of
bfloat16, and so is what goes into and comes out of them; what is in between is in single precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numba import njit
from torch import Tensor

from dbdiffusion.generative.by_hand import Both, Linear, Step, Value, empty
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
def negative_binomial(counts, rows, log_rate, table, index, log_size, log_r, largest_log_r, largest_gap, weight, by_rate, by_table, by_r):
    """`weight` times the sum over rows and genes of -ln NB(counts[rows]; mean exp(log_rate + table[index] + log_size), r), without
    ln(counts!), and its gradients: into by_rate (n, G), by_table (u, G) and by_r (G,), the last by ln r.

    counts (N, G); rows, index, log_size (n,); log_rate (n, G); table (u, G); log_r (G,), cut at largest_log_r, as ln(mean / r) is at
    largest_gap. log_rate and by_rate can be bfloat16. Formulas: `likelihood._NegativeBinomial`.
    """
    genes, given_log_r = log_r.size, log_r
    log_r = np.minimum(given_log_r, largest_log_r)
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
    for j in range(genes):
        if given_log_r[j] > largest_log_r:
            by_r[j] = F(0.0)
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


class _Intercepts:
    """One for each column, and of each batch where the layer knows it."""

    def __init__(self, bias: Value, of_batch: Value | None, n: int) -> None:
        self.bias, self.of_batch = bias, of_batch
        self.table = Both(bias.tensor[None]) if of_batch is None else empty(*of_batch.tensor.shape)
        self.by_table = Both(bias.grad.tensor[None]) if of_batch is None else of_batch.grad
        self.none = np.zeros(n, dtype=np.int64)

    def rows(self, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The table and where each row takes its intercepts."""
        if self.of_batch is None:
            return self.table.array, self.none
        torch.add(self.of_batch.tensor, self.bias.tensor, out=self.table.tensor)
        return self.table.array, batch

    def backward(self) -> None:
        """After the table's gradients: those of the common intercepts."""
        if self.of_batch is not None:
            torch.sum(self.by_table.tensor, 0, out=self.bias.grad.tensor)


class _Layer:
    """Linear layer, LayerNorm, SiLU."""

    def __init__(self, values: Iterator[Value | None], n: int, half: bool, epsilon: float) -> None:
        weight, bias, of_batch, self.gain, self.bias = (next(values) for _ in range(5))
        d = len(bias.array)
        self.linear, self.intercepts, self.epsilon = Linear(weight, n, half), _Intercepts(bias, of_batch, n), np.float32(epsilon)
        self.hat, self.inverse, self.out = empty(n, d), empty(n), empty(n, d, half=half)

    def __call__(self, x: Both, batch: np.ndarray) -> Both:
        (table, self.index), norm = self.intercepts.rows(batch), (self.gain.array, self.bias.array, self.epsilon)
        _normalised(self.linear(x).array, table, self.index, *norm, self.hat.array, self.inverse.array, self.out.array)
        return self.out

    def backward(self, grad: Both, wanted: bool) -> Both:
        """Gradient of x (unset unless wanted)."""
        # The gradient before the product lies where the output was, which no one needs any more.
        known, made = (self.gain, self.bias, self.hat, self.inverse), (self.intercepts.by_table, self.gain.grad, self.bias.grad)
        _normalised_backward(grad.array, self.index, *(x.array for x in (*known, self.out, *made)))
        self.intercepts.backward()
        return self.linear.backward(self.out, wanted)


@dataclass(frozen=True)
class Seen:
    """What the loss sees of some cells: rows (n,) of expression and observed (N, G); log_size and batch (n,), of these rows."""

    rows: Tensor
    expression: Tensor
    observed: Tensor
    log_size: Tensor
    batch: Tensor


@dataclass(frozen=True)
class Design:
    """What a network is beside its parameters. layers: of encoder and of decoder each; counts: whether its likelihood is the negative
    binomial (else the gaussian), with the largest ln r and ln(mean / r); limits: of the posterior's log variance; free_bits: of the KL
    term; half: products of bfloat16; epsilon: of LayerNorm."""

    layers: int
    counts: bool
    largest_log_r: float
    largest_gap: float
    limits: tuple[float, float]
    free_bits: float
    half: bool
    epsilon: float


class NegativeBound(Step):
    """Mean over n cells of the negative log-likelihood and of the weighted KL term, per gene.

    values: weight, bias and intercepts by batch (None but where the layer knows the batch) of each linear layer, gain and bias of its norm;
    and of each gene ln r or the log variance.
    """

    def __init__(self, values: Sequence[Value | None], n: int, design: Design) -> None:
        self.values, self.design, rest, half = [value for value in values if value is not None], design, iter(values), design.half
        self.encoder = [_Layer(rest, n, half, design.epsilon) for _ in range(design.layers)]
        self.to_latent, self.of_latent, _ = Linear(next(rest), n, half), next(rest), next(rest)
        self.decoder = [_Layer(rest, n, half, design.epsilon) for _ in range(design.layers)]
        self.to_genes, self.intercepts, self.spread = Linear(next(rest), n, half), _Intercepts(next(rest), next(rest), n), next(rest)
        genes, latent = len(self.spread.array), len(self.of_latent.array) // 2
        self.limits, self.weight = [np.float32(limit) for limit in design.limits], np.float32(1 / (n * genes))
        self.scaled, self.by_decoded = (empty(n, genes, half=half) for _ in range(2))
        self.moments, self.divergence, self.latent = empty(n, 2 * latent), empty(latent), empty(n, latent, half=half)
        self.by_divergence, self.by_encoded = empty(latent), empty(n, 2 * latent, half=half)

    def forward(self, seen: Seen, noise: Tensor, factor: Tensor, offset: Tensor, kl_weight: float) -> float:
        """noise (n, latent); factor, offset (G,): of the encoder's input."""
        rows, batch, self.noise = array(seen.rows), array(seen.batch), array(noise)
        _scaled(array(seen.expression), rows, array(factor), array(offset), self.scaled.array)
        x = self.scaled
        for layer in self.encoder:
            x = layer(x, batch)
        made = self.moments, self.latent, self.divergence
        _posterior(self.to_latent(x).array, self.of_latent.array, self.noise, *self.limits, *(value.array for value in made))
        x = self.latent
        for layer in self.decoder:
            x = layer(x, batch)
        known = array(seen.observed), rows, self.to_genes(x).array, *self.intercepts.rows(batch)
        made = [value.array for value in (self.by_decoded, self.intercepts.by_table, self.spread.grad)]
        if self.design.counts:
            largest = np.float32(self.design.largest_log_r), np.float32(self.design.largest_gap)
            misfit = negative_binomial(*known, array(seen.log_size), self.spread.array, *largest, self.weight, *made)
        else:
            misfit = gaussian(*known, self.spread.array, self.weight, *made)
        self.intercepts.backward()
        over = self.divergence.array - F(self.design.free_bits)
        counted = over >= 0 if self.design.free_bits > 0 else np.ones_like(over)
        np.multiply(counted, F(kl_weight) * self.weight, out=self.by_divergence.array)
        return misfit + kl_weight * float((over * counted).sum()) / len(self.spread.array)

    def backward(self) -> None:
        grad = self.to_genes.backward(self.by_decoded)
        for layer in reversed(self.decoder):
            grad = layer.backward(grad, True)
        known, made = (self.by_divergence.array, self.by_encoded.array), self.of_latent.grad.array
        _posterior_backward(grad.array, self.moments.array, self.noise, *self.limits, *known, made)
        grad = self.to_latent.backward(self.by_encoded)
        for layer in reversed(self.encoder):
            grad = layer.backward(grad, layer is not self.encoder[0])
