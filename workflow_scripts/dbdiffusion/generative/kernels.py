"""Fused loops for training on a CPU, compiled when first called (numba; kept on disk for later processes).

A small network on a CPU spends more time between its products than in them: torch passes over the batch once for each elementwise
operation, and takes its logarithms and exponentials two to four times slower than a vector unit can. Here a row stays in the cache while
everything is done to it. Single precision, C-contiguous numpy arrays, no threads; the callers hold the same mathematics in torch, which
serves GPUs and other precisions and is what the tests compare with. What enters or leaves a product can be bfloat16 (`wide`, `narrow`):
its conversion costs next to nothing within a loop, and a pass over the batch outside. All loops are in this file: numba keeps what it has
compiled until the loop's own file changes, and does not look at files of functions that the loop calls.

exp and ln are the polynomials of the Cephes library (S. Moshier; single precision, relative error about 1e-7): plain arithmetic, which the
compiler turns into vector instructions, as it does not with calls of the C library.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import config, njit, types
from numba.core.codegen import get_host_cpu_features
from numba.extending import overload
from torch import Tensor

F = np.float32


def whole_vectors(features: str) -> str:
    """The features of a CPU for which loops are compiled, with vectors of 512 bits where it has them.

    LLVM would halve them, since some older CPUs clock down for a loop here and there. A training step is full of them and of products,
    which use such vectors anyway.
    """
    return f"{features},-prefer-256-bit" if "+avx512f" in features.split(",") else features


# Before anything is compiled, or without effect; who has set it knows better.
if config.CPU_FEATURES is None:
    config.CPU_FEATURES = whole_vectors(get_host_cpu_features())


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


@njit(**SUMS)
def noised(mean, deviation, labels, rows, noise, order, uniform, dropout, null, factors, weights, y, target, t, weight, label):
    """Draws x of rows of N(mean, deviation^2), noised at stratified timesteps t, into y, what is to be predicted into target, each (n, d),
    and weights and labels into weight and label (n,), a share `dropout` of the latter `null`.

    mean, deviation (N, d); labels (N,); rows, order (n,), the latter the stratum of each; noise (2, n, d), of the draw and of the
    diffusion; uniform (2, n), within the strata and of dropout; factors (T, 4): of x and noise in y, and of x and noise in target;
    weights (T,).
    """
    n, timesteps = rows.size, len(factors)
    for i in range(n):
        k, time = rows[i], min(np.int64((F(order[i]) + uniform[0, i]) * F(timesteps / n)), timesteps - 1)
        of_x, of_noise, x_aimed, noise_aimed = factors[time]
        centre, spread, own, other = mean[k], deviation[k], noise[0, i], noise[1, i]
        for j in range(mean.shape[1]):
            x = centre[j] + spread[j] * own[j]
            y[i, j] = of_x * x + of_noise * other[j]
            target[i, j] = x_aimed * x + noise_aimed * other[j]
        t[i], weight[i], label[i] = time, weights[time], null if uniform[1, i] < dropout else labels[k]


@njit(**SUMS)
def uncertain(conditions, rows, uniform, noise, certain, mean, deviation, spread, control, out):
    """Rows of conditions (u, d), a share `certain` of them as they are, the others uncertain (`conditions.Doubt`), into out (r, d).

    rows (r,); uniform (2, r), of who is certain and how far the others are; noise (r, d - 1); mean, deviation (p,) of the first columns;
    spread (d - 1 - p,), the deviation of what the next ones get; control (u,), those who always are certain.
    """
    p, d = mean.size, conditions.shape[1]
    for i in range(rows.size):
        row, told = conditions[rows[i]], uniform[1, i]
        if uniform[0, i] < certain or control[rows[i]]:
            out[i] = row
            continue
        scale = np.sqrt(told * (F(1.0) - told))
        for j in range(p):
            out[i, j] = mean[j] + told * (row[j] - mean[j]) + scale * deviation[j] * noise[i, j]
        for j in range(p, d - 1):
            out[i, j] = row[j] + spread[j - p] * noise[i, j]
        out[i, d - 1] = told


@njit(**SUMS)
def squared_error(predicted, offset, target, weight, grad, by_offset):
    """Mean over rows and columns of weight (n,) times the squared error of predicted (n, d) + offset (d,); its gradient into grad (n, d),
    and the sum of that over rows into by_offset (d,). predicted and grad can be bfloat16."""
    n, d = predicted.shape
    by_offset[:] = F(0.0)
    errors, value = np.empty(d, dtype=np.float32), 0.0
    for i in range(n):
        scale = F(2.0) * weight[i] / F(n * d)
        for j in range(d):
            error = wide(predicted[i, j]) + offset[j] - target[i, j]
            errors[j] = error
            by_row = scale * error
            grad[i, j] = narrow(grad, by_row)
            by_offset[j] += by_row
        value += weight[i] * square(errors)
    return value / (n * d)


@njit(**SUMS)
def silu(x, offset, out):
    """SiLU, z / (1 + e^-z), of z = x + offset, (n, d) and (d,), into out; x and out can be bfloat16."""
    for i in range(len(x)):
        for j in range(x.shape[1]):
            z = wide(x[i, j]) + offset[j]
            out[i, j] = narrow(out, z / (F(1.0) + exp(-z)))


@njit(**SUMS)
def silu_backward(grad, x, offset, by_x, by_offset):
    """Backward pass of `silu`: grad (n, d) into by_x (n, d), and its sum over rows into by_offset (d,); grad, x, by_x can be bfloat16."""
    by_offset[:] = F(0.0)
    for i in range(len(x)):
        for j in range(x.shape[1]):
            by_row = silu_gradient(wide(grad[i, j]), wide(x[i, j]) + offset[j])
            by_x[i, j] = narrow(by_x, by_row)
            by_offset[j] += by_row


@njit(**SUMS)
def norm_silu(x, gain, bias, epsilon, out):
    """SiLU(LayerNorm(x)) of a row (d,) into out, which can be bfloat16; x becomes the normalised row. Returns one over x's standard
    deviation."""
    d = F(x.size)
    mean, square = total(x) / d, F(0.0)
    for j in range(x.size):
        z = x[j] - mean
        x[j] = z
        square += z * z
    scale = F(1.0) / np.sqrt(square / d + epsilon)
    for j in range(x.size):
        z = x[j] * scale
        x[j] = z
        z = z * gain[j] + bias[j]
        out[j] = narrow(out, z / (F(1.0) + exp(-z)))
    return scale


@njit(**SUMS)
def norm_silu_backward(grad, hat, inverse, gain, bias, by_x, by_gain, by_bias):
    """Backward pass of `norm_silu`: grad (d,), which can be bfloat16, of its output into by_x (d,); by_gain, by_bias (d,) are added to.

    hat, inverse: the normalised row and one over its standard deviation.
    """
    d, first, second = F(hat.size), F(0.0), F(0.0)
    for j in range(hat.size):
        h = hat[j]
        by_z = silu_gradient(wide(grad[j]), h * gain[j] + bias[j])
        by_gain[j] += by_z * h
        by_bias[j] += by_z
        by_z *= gain[j]
        by_x[j] = by_z
        first += by_z
        second += by_z * h
    first /= d
    second /= d
    for j in range(hat.size):
        by_x[j] = inverse * (by_x[j] - first - hat[j] * second)


@njit(**SUMS)
def modulated(x, offset, label, label_offset, index, time, time_offset, at, gain, bias, epsilon, hat, inverse, out):
    """SiLU(LayerNorm((x + offset) label[index] + time)), label and time being columns `at` to at + d of wider arrays.

    x (n, d); label (u, S) with rows index (n,); time (n, S) or (1, S); offset (d,), label_offset and time_offset (S,): added to every row
    of these; gain, bias (d,). Into out (n, d), and for the backward pass `hat` (n, d) and `inverse` (n,) of `norm_silu`. x, label, time
    and out can be bfloat16.
    """
    n, d = x.shape
    own, of_label, of_time = len(time) > 1, label_offset[at : at + d], time_offset[at : at + d]
    for i in range(n):
        row, moved = label[index[i], at : at + d], time[i if own else 0, at : at + d]
        for j in range(d):
            hat[i, j] = (wide(x[i, j]) + offset[j]) * (wide(row[j]) + of_label[j]) + (wide(moved[j]) + of_time[j])
        inverse[i] = norm_silu(hat[i], gain, bias, epsilon, out[i])


@njit(**SUMS)
def modulated_backward(
    grad, x, offset, label, label_offset, index, at, gain, bias, hat, inverse,
    by_x, by_offset, by_label, by_time, by_moved, by_gain, by_bias,
):  # fmt: skip
    """Backward pass of `modulated`, each row with a time of its own: grad (n, d) of its output into gradients of its inputs.

    by_x (n, d); by_label (u, S), its columns, to which is added; by_time (n, S), its columns; by_moved (S,), its columns: of time_offset;
    by_offset, by_gain, by_bias (d,). grad, x, label, by_x and by_time can be bfloat16.
    """
    n, d = x.shape
    by_sum = np.empty(d, dtype=np.float32)
    own_offset, of_moved = label_offset[at : at + d], by_moved[at : at + d]
    for sums in (by_gain, by_bias, by_offset, of_moved):
        sums[:] = F(0.0)
    for i in range(n):
        k = index[i]
        row, of_label, of_time = label[k, at : at + d], by_label[k, at : at + d], by_time[i, at : at + d]
        norm_silu_backward(grad[i], hat[i], inverse[i], gain, bias, by_sum, by_gain, by_bias)
        for j in range(d):
            of_time[j] = narrow(of_time, by_sum[j])
            of_moved[j] += by_sum[j]
            of_label[j] += by_sum[j] * (wide(x[i, j]) + offset[j])
            by_row = by_sum[j] * (wide(row[j]) + own_offset[j])
            by_x[i, j] = narrow(by_x, by_row)
            by_offset[j] += by_row


@njit(**SUMS)
def scaled(values, rows, factor, offset, out):
    """values[rows] factor + offset, by column, into out (n, d), which can be bfloat16."""
    for i in range(rows.size):
        row = values[rows[i]]
        for j in range(row.size):
            x = row[j] * factor[j] + offset[j]
            out[i, j] = narrow(out, x)


@njit(**SUMS)
def normalised(x, table, index, gain, bias, epsilon, hat, inverse, out):
    """SiLU(LayerNorm(x + table[index])) into out (n, d), and for the backward pass `hat` (n, d) and `inverse` (n,) of `norm_silu`.

    x (n, d); table (u, d), of which each row takes one by index (n,); gain, bias (d,). x and out can be bfloat16.
    """
    for i in range(len(x)):
        row = table[index[i]]
        for j in range(row.size):
            hat[i, j] = wide(x[i, j]) + row[j]
        inverse[i] = norm_silu(hat[i], gain, bias, epsilon, out[i])


@njit(**SUMS)
def normalised_backward(grad, index, gain, bias, hat, inverse, by_x, by_table, by_gain, by_bias):
    """Backward pass of `normalised`: grad (n, d) of its output into by_x (n, d), by_table (u, d), by_gain and by_bias (d,). grad and by_x
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
def posterior(encoded, offset, noise, low, high, moments, latent, divergence):
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
def posterior_backward(grad, moments, noise, low, high, weight, by_encoded, by_offset):
    """Backward pass of `posterior`: grad (n, k) of latent and weight (k,), the gradient of each row's divergence, into by_encoded (n, 2 k)
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
