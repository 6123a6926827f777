"""The denoiser on a CPU, forward and backward by hand.

The same mathematics as `denoiser.Denoiser`, which is the definition: products by torch, all between two products in one loop each
(here and in `kernels`), and no graph in between, which costs as much as a small network's products. Under autocast products are of bfloat16, and so is
what goes into and comes out of them, sums with skips included; what is in between is in single precision.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba import njit
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from dbdiffusion.generative import kernels
from dbdiffusion.generative.kernels import SUMS, F, array, norm_silu, norm_silu_backward, narrow, wide
from dbdiffusion.generative.linear_cpu import Linear


@njit(**SUMS)
def _modulated(x, label, index, time, at, gain, bias, epsilon, hat, inverse, out):
    """SiLU(LayerNorm(x label[index] + time)), label and time being columns `at` to at + d of wider arrays.

    x (n, d); label (u, S) with rows index (n,); time (n, S) or (1, S); gain, bias (d,). Into out (n, d), and for the backward pass the
    normalised rows `hat` (n, d) and one over their standard deviation `inverse` (n,). x, label, time and out can be bfloat16.
    """
    n, d = x.shape
    own = len(time) > 1
    for i in range(n):
        row, moved = label[index[i], at : at + d], time[i if own else 0, at : at + d]
        for j in range(d):
            hat[i, j] = wide(x[i, j]) * wide(row[j]) + wide(moved[j])
        inverse[i] = norm_silu(hat[i], gain, bias, epsilon, out[i])


@njit(**SUMS)
def _modulated_backward(grad, x, label, index, at, gain, bias, hat, inverse, by_x, by_label, by_time, by_gain, by_bias, by_offset, by_moved):
    """Backward pass of `_modulated`, each row with a time of its own: grad (n, d) of its output into gradients of its inputs.

    by_x (n, d); by_time (n, S), its columns; by_label (u, S), its columns, to which is added; by_gain, by_bias (d,); by_offset (d,): of
    what is added to every row of x; by_moved (S,), its columns: of what is added to every row of time. grad, x, label, by_x and by_time
    can be bfloat16.
    """
    n, d = x.shape
    by_sum = np.empty(d, dtype=np.float32)
    of_moved = by_moved[at : at + d]
    for sums in (by_gain, by_bias, by_offset, of_moved):
        sums[:] = F(0.0)
    for i in range(n):
        k = index[i]
        row, of_label, of_time = label[k, at : at + d], by_label[k, at : at + d], by_time[i, at : at + d]
        norm_silu_backward(grad[i], hat[i], inverse[i], gain, bias, by_sum, by_gain, by_bias)
        for j in range(d):
            of_time[j] = narrow(of_time, by_sum[j])
            of_moved[j] += by_sum[j]
            of_label[j] += by_sum[j] * wide(x[i, j])
            by_row = by_sum[j] * wide(row[j])
            by_x[i, j] = narrow(by_x, by_row)
            by_offset[j] += by_row


def modulated(x: Tensor, label: Tensor, time: Tensor, norm: nn.LayerNorm) -> Tensor:
    """SiLU(LayerNorm(x label + time)) without gradient: x (..., d), label (..., d) that broadcasts against it, time (1, d)."""
    d = x.shape[-1]
    index = torch.arange(label[..., 0].numel()).view(label.shape[:-1]).broadcast_to(x.shape[:-1]).reshape(-1)
    rows, table = x.reshape(-1, d).contiguous(), label.reshape(-1, d).contiguous()
    return _block(rows, table, index, time.contiguous(), 0, norm.weight, norm.bias, norm.eps)[0].view(x.shape)


def _block(
    x: Tensor, label: Tensor, index: Tensor, time: Tensor, at: int, gain: Tensor, bias: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, normalised rows and inverse standard deviations of `_modulated`."""
    made = torch.empty_like(x), torch.empty_like(x, dtype=torch.float32), x.new_empty(len(x), dtype=torch.float32)
    out, hat, inverse = map(array, made)
    _modulated(*map(array, (x, label, index, time)), at, array(gain), array(bias), np.float32(epsilon), hat, inverse, out)
    return made


class _Chain:
    """Linear layers with SiLU in between."""

    def __init__(self, *linears: Linear) -> None:
        self.linears = linears

    def __call__(self, x: Tensor) -> Tensor:
        self.made = []
        for linear in self.linears:
            if self.made:
                x = torch.empty_like(self.made[-1])
                kernels.silu(array(self.made[-1]), array(x))
            self.made.append(linear(x))
        return self.made[-1]

    def backward(self, grad: Tensor, by_offset: Tensor) -> list[Tensor]:
        """Gradients of all weights and biases, `by_offset` being that of the last bias."""
        out: list[Tensor] = []
        for i in reversed(range(len(self.linears))):
            by_hidden, by_weight = self.linears[i].backward(grad, i > 0)
            out[:0] = [by_weight, by_offset]
            if i:
                hidden = self.made[i - 1]
                grad, by_offset = torch.empty_like(hidden), hidden.new_empty(hidden.shape[1], dtype=torch.float32)
                kernels.silu_backward(*map(array, (by_hidden, hidden, grad, by_offset)))
        return out


class Pass(torch.autograd.Function):
    """Weighted mean squared error against target (n, coordinates) of the prediction from y (n, coordinates), sines of the timesteps
    (n, width) and conditions (u, condition), of which each row takes one by index (n,).

    weight: (n,); levels: number of blocks on the way down; sizes: widths of all blocks; half: products of bfloat16; null: the embedding of
    index u, or None where the last condition stands for it; given: weight and bias of both layers of the time and time_out, both of the
    label and label_out, linear and norm of each block, out. Gradients of null and of these.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        y: Tensor,
        waves: Tensor,
        conditions: Tensor,
        index: Tensor,
        target: Tensor,
        weight: Tensor,
        levels: int,
        sizes: Sequence[int],
        half: bool,
        epsilon: float,
        null: Tensor | None,
        *given: Tensor,
    ) -> Tensor:
        values = iter(given)
        time, embed = (_Chain(*(Linear(next(values), next(values), half) for _ in range(n))) for n in (3, 2))
        label_out = Linear(next(values), next(values), half)
        times, table = time(waves), embed(conditions)
        labels = label_out(table if null is None else torch.cat([table, null[None].to(table.dtype)]))
        blocks, outputs, at = [], [], 0
        for i, size in enumerate(sizes):
            linear, gain, bias = Linear(next(values), next(values), half), next(values), next(values)
            x = linear(outputs[-1] if outputs else y)
            out, hat, inverse = _block(x, labels, index, times, at, gain, bias, epsilon)
            if i >= levels:
                out += outputs[2 * levels - 2 - i]
            outputs.append(out)
            blocks.append((linear, x, gain, bias, hat, inverse))
            at += size
        out = Linear(next(values), next(values), half)
        predicted = out(outputs[-1])
        ctx.grad, ctx.by_offset = torch.empty_like(predicted), target.new_empty(target.shape[1])
        value = kernels.squared_error(*map(array, (predicted, target, weight, ctx.grad, ctx.by_offset)))
        ctx.time, ctx.embed, ctx.label_out, ctx.blocks, ctx.out = time, embed, label_out, blocks, out
        ctx.null, ctx.labels, ctx.index, ctx.levels, ctx.sizes = null is not None, labels, index, levels, sizes
        return target.new_tensor(value)

    @staticmethod
    def backward(ctx: FunctionCtx, scale: Tensor) -> tuple[Tensor | None, ...]:
        levels, sizes, width = ctx.levels, ctx.sizes, sum(ctx.sizes)
        by_labels = torch.zeros_like(ctx.labels, dtype=torch.float32)
        grad, by_out, at = ctx.grad * scale, ctx.by_offset * scale, width
        by_times, by_moved = grad.new_empty(len(grad), width), by_out.new_empty(width)
        skips: dict[int, Tensor] = {}
        of_blocks: list[Tensor] = []
        grad, by_out_weight = ctx.out.backward(grad)
        for i in reversed(range(len(sizes))):
            linear, x, gain, bias, hat, inverse = ctx.blocks[i]
            if i in skips:
                grad += skips.pop(i)
            if i >= levels:
                skips[2 * levels - 2 - i] = grad
            at -= sizes[i]
            by_x, (by_gain, by_bias, by_offset) = torch.empty_like(x), (torch.empty_like(gain) for _ in range(3))
            known, wanted = (gain, bias, hat, inverse), (by_x, by_labels, by_times, by_gain, by_bias, by_offset, by_moved)
            _modulated_backward(*map(array, (grad, x, ctx.labels, ctx.index)), at, *map(array, (*known, *wanted)))
            grad, by_weight = linear.backward(by_x, i > 0)
            of_blocks[:0] = [by_weight, by_offset, by_gain, by_bias]
        by_table, by_label_weight = ctx.label_out.backward(by_labels)
        by_null = by_table[-1].float() if ctx.null else None
        by_table = by_table[:-1].contiguous() if ctx.null else by_table
        of_embed = ctx.embed.backward(by_table, by_table.sum(0, dtype=torch.float32))
        of_labels = [*of_embed, by_label_weight, by_labels.sum(0)]
        none = (None,) * 10
        return *none, by_null, *ctx.time.backward(by_times, by_moved), *of_labels, *of_blocks, by_out_weight, by_out
