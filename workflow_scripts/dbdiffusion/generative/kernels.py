"""Fused loops for training on a CPU, compiled when first called (numba; kept on disk for later processes).

A small network on a CPU spends more time between its products than in them: torch passes over the batch once for each elementwise
operation, and takes its logarithms and exponentials two to four times slower than a vector unit can. Here a row stays in the cache while
everything is done to it. Single precision, C-contiguous numpy arrays, no threads; the callers hold the same mathematics in torch, which
serves GPUs and other precisions and is what the tests compare with.

exp and ln are the polynomials of the Cephes library (S. Moshier; single precision, relative error about 1e-7): plain arithmetic, which the
compiler turns into vector instructions, as it does not with calls of the C library.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

F = np.float32


def _can_be_kept() -> bool:
    """Whether compiled loops can be kept: beside this file, or in the user's cache folder."""
    try:
        njit(cache=True)(fused)
    except RuntimeError:
        return False
    return True


def fused(*tensors: Tensor) -> bool:
    """Whether these can go through the loops here: single precision on the CPU."""
    return all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)


def array(tensor: Tensor) -> np.ndarray:
    """The memory of a contiguous tensor."""
    return tensor.detach().numpy()


EXACT = {"error_model": "numpy", "fastmath": {"contract"}, "cache": _can_be_kept()}
"""Multiplications and additions may join; nothing else is reordered."""
SUMS = {**EXACT, "fastmath": {"contract", "reassoc"}}
"""Sums in the order that vectors give them."""


@njit(inline="always", **EXACT)
def exp(x):
    """e^x; 0 below -87, and the largest power of two there is above 88."""
    x = min(max(x, F(-87.3)), F(88.3))
    k = np.floor(x * F(1.44269504) + F(0.5))
    r = x - k * F(0.693359375)
    r = r + k * F(2.12194440e-4)
    p = F(1.9875691500e-4)
    p = p * r + F(1.3981999507e-3)
    p = p * r + F(8.3334519073e-3)
    p = p * r + F(4.1665795894e-2)
    p = p * r + F(1.6666665459e-1)
    p = p * r + F(5.0000001201e-1)
    p = p * (r * r) + r + F(1.0)
    return p * np.int32((np.int32(k) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(inline="always", **EXACT)
def log(x):
    """ln x for x > 0, subnormal numbers apart."""
    bits = F(x).view(np.int32)
    k = (bits - np.int32(0x3F3504F3)) >> np.int32(23)
    r = np.int32(bits - (k << np.int32(23))).view(np.float32) - F(1.0)
    square = r * r
    p = F(7.0376836292e-2)
    p = p * r + F(-1.1514610310e-1)
    p = p * r + F(1.1676998740e-1)
    p = p * r + F(-1.2420140846e-1)
    p = p * r + F(1.4249322787e-1)
    p = p * r + F(-1.6668057665e-1)
    p = p * r + F(2.0000714765e-1)
    p = p * r + F(-2.4999993993e-1)
    p = p * r + F(3.3333331174e-1)
    y = p * r * square + F(k) * F(-2.12194440e-4) - F(0.5) * square
    return r + y + F(k) * F(0.693359375)


@njit(inline="always", **EXACT)
def log1p(x):
    """ln(1 + x) for x >= 0: what the rounding of 1 + x loses is given back (Goldberg 1991, theorem 4)."""
    y = F(1.0) + x
    return log(y) * x / (y - F(1.0)) if y != F(1.0) else x


@njit(inline="always", **EXACT)
def log_gamma_and_digamma(x):
    """ln Gamma(x) and its derivative for x > 0: Stirling's series at x + 3, brought back by ln x(x + 1)(x + 2)."""
    y = x + F(3.0)
    inverse = F(1.0) / y
    square = inverse * inverse
    product = ((x + F(3.0)) * x + F(2.0)) * x
    ln = log(y)
    series = ((square * F(1 / 1260) + F(-1 / 360)) * square + F(1 / 12)) * inverse
    value = (y - F(0.5)) * ln - y + F(0.918938533) + series - log(product)
    series = (((square * F(-1 / 252) + F(1 / 120)) * square + F(-1 / 12)) * inverse + F(-0.5)) * inverse
    return value, ln + series - ((F(3.0) * x + F(6.0)) * x + F(2.0)) / product


@njit(inline="always", **EXACT)
def silu_gradient(grad, x):
    """Derivative of SiLU at x, times grad."""
    s = F(1.0) / (F(1.0) + exp(-x))
    return grad * s * (F(1.0) + x * (F(1.0) - s))


@njit(**SUMS)
def total(x):
    """Sum of (n,)."""
    out = F(0.0)
    for j in range(x.size):
        out += x[j]
    return out


@njit(**SUMS)
def sum_of_squares(x):
    """Of (n,), in blocks, so that single precision does."""
    out = 0.0
    for start in range(0, x.size, 4096):
        part = F(0.0)
        for j in range(start, min(start + 4096, x.size)):
            part += x[j] * x[j]
        out += part
    return out


@njit(**EXACT)
def adam(values, gradient, first, second, scale, rate, beta, beta_square, correct, epsilon):
    """Adam's update of (n,) values with moments `first` and `second`, of the gradient times scale.

    rate: learning rate over 1 - beta^steps; correct: 1 / sqrt(1 - beta_square^steps).
    """
    for j in range(values.size):
        g = gradient[j] * scale
        first[j] = beta * first[j] + (F(1.0) - beta) * g
        second[j] = beta_square * second[j] + (F(1.0) - beta_square) * g * g
        values[j] -= rate * first[j] / (np.sqrt(second[j]) * correct + epsilon)


@njit(**EXACT)
def negative_binomial(counts, log_rate, log_size, log_r, largest_gap, value, by_mean, by_r):
    """-ln NB of each cell (n,) into `value`, and its derivatives by ln mean and ln r (n, G) into `by_mean` and `by_r`.

    counts, log_rate (n, G); log_size (n,); log_r (G,). Formulas: `likelihood._NegativeBinomial`.
    """
    n, genes = counts.shape
    r, at_r, slope_r, each = np.empty_like(log_r), np.empty_like(log_r), np.empty_like(log_r), np.empty_like(log_r)
    for j in range(genes):
        r[j] = exp(log_r[j])
        at_r[j], slope_r[j] = log_gamma_and_digamma(r[j])
    for i in range(n):
        for j in range(genes):
            c = counts[i, j]
            every = c + r[j]
            gap = min(log_rate[i, j] + (log_size[i] - log_r[j]), largest_gap)
            u = exp(gap)
            excess = log1p(u)
            at_every, slope = log_gamma_and_digamma(every)
            each[j] = at_r[j] - at_every + every * excess - c * gap
            slope_mean = u / (u + F(1.0)) * every - c
            by_mean[i, j] = slope_mean
            by_r[i, j] = (excess + slope_r[j] - slope) * r[j] - slope_mean
        value[i] = total(each)


@njit(**EXACT)
def weighted(by_mean, by_r, weight, grad_mean, grad_r):
    """Chain rule of `negative_binomial`: weight (n,) times by_mean into grad_mean (n, G), and weight @ by_r into grad_r (G,)."""
    n, genes = by_mean.shape
    grad_r[:] = F(0.0)
    for i in range(n):
        w = weight[i]
        for j in range(genes):
            grad_mean[i, j] = w * by_mean[i, j]
            grad_r[j] += w * by_r[i, j]


@njit(**SUMS)
def modulated(x, label, index, time, at, gain, bias, epsilon, hat, inverse, out):
    """SiLU(LayerNorm(x label[index] + time)), label and time being columns `at` to at + d of wider arrays.

    x (n, d); label (u, S) with rows index (n,); time (n, S) or (1, S); gain, bias (d,). Into out (n, d), and for the backward pass the
    normalised rows `hat` (n, d) and one over their standard deviation `inverse` (n,).
    """
    n, d = x.shape
    own = len(time) > 1
    for i in range(n):
        row, moved = label[index[i], at : at + d], time[i if own else 0, at : at + d]
        mean = F(0.0)
        for j in range(d):
            z = x[i, j] * row[j] + moved[j]
            hat[i, j] = z
            mean += z
        mean /= F(d)
        square = F(0.0)
        for j in range(d):
            z = hat[i, j] - mean
            hat[i, j] = z
            square += z * z
        scale = F(1.0) / np.sqrt(square / F(d) + epsilon)
        inverse[i] = scale
        for j in range(d):
            z = hat[i, j] * scale
            hat[i, j] = z
            z = z * gain[j] + bias[j]
            out[i, j] = z / (F(1.0) + exp(-z))


@njit(**SUMS)
def modulated_backward(grad, x, label, index, at, gain, bias, hat, inverse, by_x, by_label, by_time, by_gain, by_bias, by_offset):
    """Backward pass of `modulated`, each row with a time of its own: grad (n, d) of its output into gradients of its inputs.

    by_x (n, d); by_time (n, S), its columns; by_label (u, S), its columns, to which is added; by_gain, by_bias (d,); by_offset (d,): of
    what is added to every row of x.
    """
    n, d = x.shape
    by_hat = np.empty(d, dtype=np.float32)
    by_gain[:] = F(0.0)
    by_bias[:] = F(0.0)
    by_offset[:] = F(0.0)
    for i in range(n):
        k = index[i]
        row, of_label, of_time = label[k, at : at + d], by_label[k, at : at + d], by_time[i, at : at + d]
        first, second = F(0.0), F(0.0)
        for j in range(d):
            h = hat[i, j]
            by_z = silu_gradient(grad[i, j], h * gain[j] + bias[j])
            by_gain[j] += by_z * h
            by_bias[j] += by_z
            by_z *= gain[j]
            by_hat[j] = by_z
            first += by_z
            second += by_z * h
        first /= F(d)
        second /= F(d)
        for j in range(d):
            by_sum = inverse[i] * (by_hat[j] - first - hat[i, j] * second)
            of_time[j] = by_sum
            of_label[j] += by_sum * x[i, j]
            by_row = by_sum * row[j]
            by_x[i, j] = by_row
            by_offset[j] += by_row


@njit(**SUMS)
def silu(x, out):
    """x / (1 + e^-x) of (n, d)."""
    for i in range(len(x)):
        for j in range(x.shape[1]):
            out[i, j] = x[i, j] / (F(1.0) + exp(-x[i, j]))


@njit(**SUMS)
def silu_backward(grad, x, by_x, by_offset):
    """Backward pass of `silu`: grad (n, d) into by_x (n, d), and its sum over rows into by_offset (d,)."""
    by_offset[:] = F(0.0)
    for i in range(len(x)):
        for j in range(x.shape[1]):
            by_x[i, j] = silu_gradient(grad[i, j], x[i, j])
            by_offset[j] += by_x[i, j]
