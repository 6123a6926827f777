"""The denoiser on a CPU, forward and backward by hand.

The same mathematics as `denoiser.Denoiser`, which is the definition: products by torch, all between two products in one loop each
(`kernels`), and no graph in between, which costs as much as a small network's products. Under autocast products are of bfloat16, and so is
what goes into and comes out of them, sums with skips included; what is in between is in single precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dbdiffusion.generative import kernels
from dbdiffusion.generative.by_hand import Both, Linear, Step, Value, empty, low
from dbdiffusion.generative.kernels import array


def modulated(x: Tensor, label: Tensor, time: Tensor, norm: nn.LayerNorm) -> Tensor:
    """SiLU(LayerNorm(x label + time)) without gradient: x (..., d), label (..., d) that broadcasts against it, time (1, d)."""
    d = x.shape[-1]
    index = torch.arange(label[..., 0].numel()).view(label.shape[:-1]).broadcast_to(x.shape[:-1]).reshape(-1)
    rows, table, none = x.reshape(-1, d).contiguous(), label.reshape(-1, d).contiguous(), x.new_zeros(d)
    known = [array(value) for value in (rows, none, table, none, index, time.contiguous(), none)]
    out, made = torch.empty_like(rows), (torch.empty_like(rows), x.new_empty(len(rows)))
    kernels.modulated(*known, 0, array(norm.weight), array(norm.bias), np.float32(norm.eps), *map(array, made), array(out))
    return out.view(x.shape)


class _Chain:
    """Linear layers with SiLU in between; what the last one adds is left to what comes next."""

    def __init__(self, values: Iterator[Value], layers: int, n: int, half: bool) -> None:
        pairs = [(next(values), next(values)) for _ in range(layers)]
        self.linears, self.offsets = [Linear(weight, n, half) for weight, _ in pairs], [offset for _, offset in pairs]
        widths = [len(offset.array) for offset in self.offsets[:-1]]
        self.out = [empty(n, width, half=half) for width in widths]

    def __call__(self, x: Both) -> Both:
        for linear, offset, out in zip(self.linears, self.offsets, self.out, strict=False):
            kernels.silu(linear(x).array, offset.array, out.array)
            x = out
        return self.linears[-1](x)

    def backward(self, grad: Both) -> None:
        """Gradients of all but the last intercept, from that of the output."""
        for i in reversed(range(len(self.linears))):
            by_hidden = self.linears[i].backward(grad, i > 0)
            if i:
                # Where the output was, which no one needs any more.
                hidden, offset, grad = self.linears[i - 1].out, self.offsets[i - 1], self.out[i - 1]
                kernels.silu_backward(by_hidden.array, hidden.array, offset.array, grad.array, offset.grad.array)


class _Block:
    """What lies at columns `at` of the projections: linear layer, modulation, LayerNorm, SiLU."""

    def __init__(self, values: Iterator[Value], n: int, at: int, half: bool, epsilon: float) -> None:
        weight, self.offset, self.gain, self.bias = (next(values) for _ in range(4))
        d = len(self.offset.array)
        self.linear, self.at, self.epsilon = Linear(weight, n, half), at, np.float32(epsilon)
        self.hat, self.inverse, self.out = empty(n, d), empty(n), empty(n, d, half=half)

    def __call__(self, y: Both, label: Both, label_offset: Value, index: np.ndarray, time: Both, time_offset: Value) -> Both:
        self.x, self.index = self.linear(y), index
        known = (label.array, label_offset.array, index, time.array, time_offset.array, self.at, self.gain.array, self.bias.array)
        kernels.modulated(self.x.array, self.offset.array, *known, self.epsilon, self.hat.array, self.inverse.array, self.out.array)
        return self.out

    def backward(
        self, grad: Both, label: Both, label_offset: Value, by_label: Both, by_time: Both, time_offset: Value, wanted: bool
    ) -> Both | None:
        """Gradient of y (None unless wanted); those of label, time and time_offset are left in their columns."""
        known = self.x, self.offset, label, label_offset
        norm = self.gain, self.bias, self.hat, self.inverse
        by_projections = by_label, by_time, time_offset.grad
        # The gradient before the next product lies where the output was, which no one needs any more.
        made = self.out, self.offset.grad, *by_projections, self.gain.grad, self.bias.grad
        some = (x.array for x in (*norm, *made))
        kernels.modulated_backward(grad.array, *(x.array for x in known), self.index, self.at, *some)
        return self.linear.backward(self.out, wanted)


class Misfit(Step):
    """Weighted mean squared error of the prediction for n rows, which take their labels from a table of so many conditions and the null.

    values: weight and bias of each linear layer of time, time_out, label and label_out; those and the norm's of each block; those of out;
    and the null label unless that is the last condition's. levels: number of blocks on the way down; sizes: widths of all blocks; half:
    products of bfloat16.
    """

    def __init__(
        self, values: Sequence[Value], n: int, conditions: int, levels: int, sizes: Sequence[int], null: bool, half: bool, epsilon: float
    ) -> None:
        self.values, self.levels, self.half, rest = values, levels, half, iter(values)
        self.time, self.embed = _Chain(rest, 3, n, half), _Chain(rest, 2, conditions, half)
        labels = conditions + null
        self.label_out, self.label_offset = Linear(next(rest), labels, half), next(rest)
        starts = np.cumsum([0, *sizes[:-1]]).tolist()
        self.blocks = [_Block(rest, n, at, half, epsilon) for at in starts]
        self.out, self.out_offset = Linear(next(rest), n, half), next(rest)
        self.null = next(rest) if null else None
        (width, coordinates), every = (len(x.array) for x in (self.embed.offsets[-1], self.out_offset)), sum(sizes)
        self.table, self.by_out = empty(labels, width, half=half), empty(n, coordinates, half=half)
        self.by_labels = empty(labels, every)
        self.by_labels_low = empty(labels, every, half=True) if half else self.by_labels

    def forward(self, y: Tensor, waves: Tensor, conditions: Tensor, index: Tensor, target: Tensor, weight: Tensor) -> float:
        """y, target (n, coordinates); waves (n, width), sines of the timesteps; conditions (u, condition); index, weight (n,)."""
        self.times, embedded = self.time(low(waves, self.half)), self.embed(low(conditions, self.half))
        torch.add(embedded.tensor, self.embed.offsets[-1].tensor, out=self.table.tensor[: len(conditions)])
        if self.null is not None:
            self.table.tensor[-1] = self.null.tensor
        self.labels, levels, x = self.label_out(self.table), self.levels, low(y, self.half)
        projections = self.labels, self.label_offset, array(index), self.times, self.time.offsets[-1]
        for i, block in enumerate(self.blocks):
            x = block(x, *projections)
            if i >= levels:
                x.tensor.add_(self.blocks[2 * levels - 2 - i].out.tensor)
        predicted, made = self.out(x).array, (self.by_out.array, self.out_offset.grad.array)
        return kernels.squared_error(predicted, self.out_offset.array, array(target), array(weight), *made)

    def backward(self) -> None:
        skips: dict[int, Both] = {}
        self.by_labels.tensor.zero_()
        # Gradients by the times lie where the times were: the backward pass does not need them.
        projections = self.labels, self.label_offset, self.by_labels, self.times, self.time.offsets[-1]
        grad, levels = self.out.backward(self.by_out), self.levels
        for i in reversed(range(len(self.blocks))):
            if i in skips:
                grad.tensor.add_(skips.pop(i).tensor)
            if i >= levels:
                skips[2 * levels - 2 - i] = grad
            grad = self.blocks[i].backward(grad, *projections, wanted=i > 0)
        if self.half:
            self.by_labels_low.tensor.copy_(self.by_labels.tensor)
        by_table = self.label_out.backward(self.by_labels_low).tensor
        torch.sum(self.by_labels.tensor, 0, out=self.label_offset.grad.tensor)
        if self.null is not None:
            self.null.grad.tensor.copy_(by_table[-1])
            by_table = by_table[:-1]
        self.embed.backward(Both(by_table))
        torch.sum(by_table, 0, dtype=torch.float32, out=self.embed.offsets[-1].grad.tensor)
        self.time.backward(self.times)
