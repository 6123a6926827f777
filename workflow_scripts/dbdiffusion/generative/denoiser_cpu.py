"""The denoiser on a CPU, forward and backward by hand.

The same mathematics as `denoiser.Denoiser`, which is the definition: products by torch, all between two products in one loop each
(`kernels`), and no graph in between, which costs as much as a small network's products. Under autocast products are of bfloat16, the
rest is in single precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from dbdiffusion.generative import kernels
from dbdiffusion.generative.kernels import array


def modulated(x: Tensor, label: Tensor, time: Tensor, norm: nn.LayerNorm) -> Tensor:
    """SiLU(LayerNorm(x label + time)) without gradient: x (..., d), label (..., d) that broadcasts against it, time (1, d)."""
    d = x.shape[-1]
    index = torch.arange(label[..., 0].numel()).view(label.shape[:-1]).broadcast_to(x.shape[:-1]).reshape(-1)
    rows, table = x.reshape(-1, d).contiguous(), label.reshape(-1, d).contiguous()
    return _block(rows, table, index, time.contiguous(), 0, norm.weight, norm.bias, norm.eps)[0].view(x.shape)


def _block(
    x: Tensor, label: Tensor, index: Tensor, time: Tensor, at: int, gain: Tensor, bias: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, normalised rows and inverse standard deviations of `kernels.modulated`."""
    made = torch.empty_like(x), torch.empty_like(x), x.new_empty(len(x))
    out, hat, inverse = map(array, made)
    kernels.modulated(*map(array, (x, label, index, time)), at, array(gain), array(bias), np.float32(epsilon), hat, inverse, out)
    return made


def _silu(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    kernels.silu(array(x), array(out))
    return out


@dataclass
class _Linear:
    """y = x W' + b, and what its backward pass needs. half: products of bfloat16."""

    weight: Tensor
    bias: Tensor
    half: bool

    def low(self, x: Tensor) -> Tensor:
        return x.bfloat16() if self.half else x

    def __call__(self, x: Tensor) -> Tensor:
        self.x, self.w = self.low(x), self.low(self.weight)
        return torch.addmm(self.low(self.bias), self.x, self.w.t()).float()

    def backward(self, grad: Tensor, wanted: bool = True) -> tuple[Tensor | None, Tensor]:
        """Gradients of x (None unless wanted) and of the weight; that of the bias is the sum of grad's rows."""
        grad = self.low(grad)
        return torch.mm(grad, self.w).float() if wanted else None, torch.mm(grad.t(), self.x).float()


class Pass(torch.autograd.Function):
    """Prediction (n, coordinates) from y (n, coordinates), sines of the timesteps (n, width), a table of label embeddings (u, width) of
    which each row takes one, and weight and bias of: both layers of the time, time_out, label_out, linear and norm of each block, out. No
    gradient of y.

    levels: number of blocks on the way down; sizes: widths of all blocks; half: products of bfloat16.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        y: Tensor,
        waves: Tensor,
        table: Tensor,
        index: Tensor,
        levels: int,
        sizes: Sequence[int],
        half: bool,
        epsilon: float,
        *given: Tensor,
    ) -> Tensor:
        values = iter(given)
        time, time_more, time_out, label_out = (_Linear(next(values), next(values), half) for _ in range(4))
        first = time(waves)
        second = time_more(_silu(first))
        times, labels = time_out(_silu(second)), label_out(table.float())
        blocks, outputs, at = [], [], 0
        for i, size in enumerate(sizes):
            linear, gain, bias = _Linear(next(values), next(values), half), next(values), next(values)
            x = linear(outputs[-1] if outputs else y)
            out, hat, inverse = _block(x, labels, index, times, at, gain, bias, epsilon)
            if i >= levels:
                out += outputs[2 * levels - 2 - i]
            outputs.append(out)
            blocks.append((linear, x, gain, bias, hat, inverse))
            at += size
        out = _Linear(next(values), next(values), half)
        ctx.linears, ctx.blocks, ctx.hidden = (time, time_more, time_out, label_out, out), blocks, (first, second)
        ctx.labels, ctx.index, ctx.levels, ctx.sizes = labels, index, levels, sizes
        return out(outputs[-1])

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        time, time_more, time_out, label_out, out = ctx.linears
        levels, sizes = ctx.levels, ctx.sizes
        by_labels, by_times = torch.zeros_like(ctx.labels), grad.new_empty(len(grad), sum(sizes))
        by_times_offset, by_out, at = grad.new_empty(sum(sizes)), grad.sum(0), sum(sizes)
        skips: dict[int, Tensor] = {}
        of_blocks: list[Tensor] = []
        grad, by_out_weight = out.backward(grad.contiguous())
        for i in reversed(range(len(sizes))):
            linear, x, gain, bias, hat, inverse = ctx.blocks[i]
            if i in skips:
                grad += skips.pop(i)
            if i >= levels:
                skips[2 * levels - 2 - i] = grad
            at -= sizes[i]
            by_x, (by_gain, by_bias, by_offset) = torch.empty_like(x), (torch.empty_like(gain) for _ in range(3))
            known, wanted = (gain, bias, hat, inverse), (by_x, by_labels, by_times, by_gain, by_bias, by_offset)
            kernels.modulated_backward(*map(array, (grad, x, ctx.labels, ctx.index)), at, *map(array, (*known, *wanted)))
            grad, by_weight = linear.backward(by_x, i > 0)
            of_blocks[:0] = [by_weight, by_offset, by_gain, by_bias]
        torch.sum(by_times, 0, out=by_times_offset)
        by_table, by_label_weight = label_out.backward(by_labels)
        by_hidden, by_time_weight = time_out.backward(by_times)
        of_times = [by_time_weight, by_times_offset]
        for linear, hidden in ((time_more, ctx.hidden[1]), (time, ctx.hidden[0])):
            by_x, by_offset = torch.empty_like(hidden), hidden.new_empty(hidden.shape[1])
            kernels.silu_backward(*map(array, (by_hidden, hidden, by_x, by_offset)))
            by_hidden, by_weight = linear.backward(by_x, linear is not time)
            of_times[:0] = [by_weight, by_offset]
        of_labels = [by_label_weight, by_labels.sum(0)]
        return None, None, by_table, None, None, None, None, None, *of_times, *of_labels, *of_blocks, by_out_weight, by_out
