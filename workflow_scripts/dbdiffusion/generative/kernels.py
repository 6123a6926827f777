"""Fused loops for training on a CPU, compiled when first called (numba; kept on disk for later processes).

A small network on a CPU spends more time between its products than in them: torch passes over the batch once for each elementwise
operation, and takes its logarithms and exponentials two to four times slower than a vector unit can. Here a row stays in the cache while
everything is done to it. Single precision, C-contiguous numpy arrays, no threads; the callers hold the same mathematics in torch, which
serves GPUs and other precisions and is what the tests compare with. What enters or leaves a product can be bfloat16 (`wide`, `narrow`):
its conversion costs next to nothing within a loop, and a pass over the batch outside.

exp and ln are the polynomials of the Cephes library (S. Moshier; single precision, relative error about 1e-7): plain arithmetic, which the
compiler turns into vector instructions, as it does not with calls of the C library.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, types
from numba.extending import overload
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
    """The memory of a contiguous tensor; bfloat16 as the bits that it has."""
    tensor = tensor.detach() if tensor.requires_grad else tensor
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


EXACT = {"error_model": "numpy", "fastmath": {"contract"}, "cache": _can_be_kept()}
"""Multiplications and additions may join; nothing else is reordered."""
SUMS = {**EXACT, "fastmath": {"contract", "reassoc"}}
"""Sums in the order that vectors give them."""


def wide(x):
    """An element in single precision; bfloat16 is given by its bits."""


def narrow(values, x):
    """x as an element of `values`: where that is bfloat16 its bits, rounded to nearest even."""


@overload(wide, inline="always")
def _(x):
    if x == types.uint16:
        return lambda x: np.int32(np.int32(x) << np.int32(16)).view(np.float32)
    return lambda x: x


@overload(narrow, inline="always")
def _(values, x):
    if values.dtype != types.uint16:
        return lambda values, x: x

    def rounded(values, x):
        bits = F(x).view(np.int32)
        return np.uint16(np.int32(bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))) >> np.int32(16))

    return rounded


@njit(inline="always", **EXACT)
def exp(x):
    """e^x, of x between -87.3 and 88.3: beyond, that of the limit."""
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
def square(x):
    """Sum of squares of (n,)."""
    out = F(0.0)
    for j in range(x.size):
        out += x[j] * x[j]
    return out


@njit(**SUMS)
def sum_of_squares(x):
    """Of (n,), in blocks, so that single precision does."""
    out = 0.0
    for start in range(0, x.size, 4096):
        out += square(x[start : start + 4096])
    return out


@njit(**EXACT)
def adam(values, gradient, first, second, kept, scale, rate, beta, beta_square, correct, epsilon):
    """Adam's update of (n,) values, `kept` of which decay leaves, with moments `first` and `second`, of the gradient times scale.

    rate: learning rate over 1 - beta^steps; correct: 1 / sqrt(1 - beta_square^steps).
    """
    for j in range(values.size):
        g = gradient[j] * scale
        first[j] = beta * first[j] + (F(1.0) - beta) * g
        second[j] = beta_square * second[j] + (F(1.0) - beta_square) * g * g
        values[j] = kept * values[j] - rate * first[j] / (np.sqrt(second[j]) * correct + epsilon)


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
def noised(mean, deviation, rows, noise, t, factors, y, target):
    """Draws x of rows of N(mean, deviation^2), noised, into y, and what is to be predicted into target, each (n, d).

    mean, deviation (N, d); rows, t (n,); noise (2, n, d), of the draw and of the diffusion; factors (T, 4): of x and noise in y, and of x
    and noise in target.
    """
    for i in range(rows.size):
        of_x, of_noise, x_aimed, noise_aimed = factors[t[i]]
        centre, spread, own, other = mean[rows[i]], deviation[rows[i]], noise[0, i], noise[1, i]
        for j in range(mean.shape[1]):
            x = centre[j] + spread[j] * own[j]
            y[i, j] = of_x * x + of_noise * other[j]
            target[i, j] = x_aimed * x + noise_aimed * other[j]


@njit(**SUMS)
def squared_error(predicted, target, weight, grad, by_offset):
    """Mean over rows and columns of weight (n,) times the squared error of predicted (n, d); its gradient into grad (n, d), and the sum of
    that over rows into by_offset (d,). predicted and grad can be bfloat16."""
    n, d = predicted.shape
    by_offset[:] = F(0.0)
    errors, value = np.empty(d, dtype=np.float32), 0.0
    for i in range(n):
        scale = F(2.0) * weight[i] / F(n * d)
        for j in range(d):
            error = wide(predicted[i, j]) - target[i, j]
            errors[j] = error
            by_row = scale * error
            grad[i, j] = narrow(grad, by_row)
            by_offset[j] += by_row
        value += weight[i] * square(errors)
    return value / (n * d)


@njit(**SUMS)
def modulated(x, label, index, time, at, gain, bias, epsilon, hat, inverse, out):
    """SiLU(LayerNorm(x label[index] + time)), label and time being columns `at` to at + d of wider arrays.

    x (n, d); label (u, S) with rows index (n,); time (n, S) or (1, S); gain, bias (d,). Into out (n, d), and for the backward pass the
    normalised rows `hat` (n, d) and one over their standard deviation `inverse` (n,). x, label, time and out can be bfloat16.
    """
    n, d = x.shape
    own = len(time) > 1
    for i in range(n):
        row, moved = label[index[i], at : at + d], time[i if own else 0, at : at + d]
        mean = F(0.0)
        for j in range(d):
            z = wide(x[i, j]) * wide(row[j]) + wide(moved[j])
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
            out[i, j] = narrow(out, z / (F(1.0) + exp(-z)))


@njit(**SUMS)
def modulated_backward(grad, x, label, index, at, gain, bias, hat, inverse, by_x, by_label, by_time, by_gain, by_bias, by_offset, by_moved):
    """Backward pass of `modulated`, each row with a time of its own: grad (n, d) of its output into gradients of its inputs.

    by_x (n, d); by_time (n, S), its columns; by_label (u, S), its columns, to which is added; by_gain, by_bias (d,); by_offset (d,): of
    what is added to every row of x; by_moved (S,), its columns: of what is added to every row of time. grad, x, label, by_x and by_time
    can be bfloat16.
    """
    n, d = x.shape
    by_hat = np.empty(d, dtype=np.float32)
    of_moved = by_moved[at : at + d]
    for sums in (by_gain, by_bias, by_offset, of_moved):
        sums[:] = F(0.0)
    for i in range(n):
        k = index[i]
        row, of_label, of_time = label[k, at : at + d], by_label[k, at : at + d], by_time[i, at : at + d]
        first, second = F(0.0), F(0.0)
        for j in range(d):
            h = hat[i, j]
            by_z = silu_gradient(wide(grad[i, j]), h * gain[j] + bias[j])
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
            of_time[j] = narrow(of_time, by_sum)
            of_moved[j] += by_sum
            of_label[j] += by_sum * wide(x[i, j])
            by_row = by_sum * wide(row[j])
            by_x[i, j] = narrow(by_x, by_row)
            by_offset[j] += by_row


@njit(**SUMS)
def silu(x, out):
    """x / (1 + e^-x) of (n, d); both can be bfloat16."""
    for i in range(len(x)):
        for j in range(x.shape[1]):
            z = wide(x[i, j])
            out[i, j] = narrow(out, z / (F(1.0) + exp(-z)))


@njit(**SUMS)
def silu_backward(grad, x, by_x, by_offset):
    """Backward pass of `silu`: grad (n, d) into by_x (n, d), and its sum over rows into by_offset (d,); all but that can be bfloat16."""
    by_offset[:] = F(0.0)
    for i in range(len(x)):
        for j in range(x.shape[1]):
            by_row = silu_gradient(wide(grad[i, j]), wide(x[i, j]))
            by_x[i, j] = narrow(by_x, by_row)
            by_offset[j] += by_row
