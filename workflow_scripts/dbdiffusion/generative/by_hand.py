"""What networks share that are differentiated by hand on a CPU.

A step of a small network is dozens of operations of some ten microseconds each; making a tensor, or numpy's view of one for a loop, would
take one or two more every time. So a step is an object that is made once for a number of rows and keeps its tensors from batch to batch:
activations, gradients, and in bfloat16 its weights. To torch it is one node of a graph (`differentiable`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from dbdiffusion.generative.kernels import array


class Both:
    """A tensor for torch and the same memory for loops."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.array = tensor, array(tensor)


def empty(*shape: int, half: bool = False) -> Both:
    """Unset, in single precision or bfloat16."""
    return Both(torch.empty(shape, dtype=torch.bfloat16 if half else torch.float32))


def low(x: Tensor, half: bool) -> Both:
    """What goes into a product."""
    return Both(x.bfloat16() if half else x)


class Value(Both):
    """A parameter, and its gradient: in `.grad`, where the optimiser may have put it."""

    def __init__(self, parameter: nn.Parameter) -> None:
        super().__init__(parameter.detach())
        self.source = parameter
        self.grad = Both(torch.empty_like(self.tensor) if parameter.grad is None else parameter.grad)


class Linear:
    """y = x W' for n rows; intercepts are added by the loop that comes next. half: products of bfloat16."""

    def __init__(self, weight: Value, n: int, half: bool) -> None:
        after, before = weight.tensor.shape
        self.weight, self.half = weight, half
        self.used = torch.empty_like(weight.tensor, dtype=torch.bfloat16) if half else weight.tensor
        self.turned, self.out, self.by_x = self.used.t(), empty(n, after, half=half), empty(n, before, half=half)
        self.by_weight = torch.empty_like(self.used) if half else weight.grad.tensor

    def __call__(self, x: Both) -> Both:
        if self.half:
            self.used.copy_(self.weight.tensor)
        self.x = x.tensor
        torch.mm(self.x, self.turned, out=self.out.tensor)
        return self.out

    def backward(self, grad: Both, wanted: bool = True) -> Both:
        """Gradient of x (unset unless wanted); the weight's is left in its place."""
        if wanted:
            torch.mm(grad.tensor, self.used, out=self.by_x.tensor)
        torch.mm(grad.tensor.t(), self.x, out=self.by_weight)
        if self.half:
            self.weight.grad.tensor.copy_(self.by_weight)
        return self.by_x


class Step(ABC):
    """A loss of a batch and its gradients; one object for all batches of as many rows."""

    values: Sequence[Value]
    """All parameters."""
    turn = 0
    """Counts losses and gradients taken."""

    @abstractmethod
    def forward(self, *inputs: Any) -> float:
        """The loss."""

    @abstractmethod
    def backward(self) -> None:
        """Leave the gradients of the latest loss in those of `values`."""


class Kept:
    """A network's latest step: made anew for another `key`, and where parameters or their gradients have moved."""

    def __init__(self) -> None:
        self._key: Hashable = None

    def step(self, make: Callable[[list[Value | None]], Step], parameters: Sequence[nn.Parameter | None], *key: Hashable) -> Step:
        """make: the step of these parameters, None where there is none."""
        every = key, *((p.data_ptr(), p.grad is None or p.grad.data_ptr()) for p in parameters if p is not None)
        if self._key != every:
            self._key, self._step = every, make([None if p is None else Value(p) for p in parameters])
        return self._step


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, step: Step, inputs: tuple, *parameters: Tensor) -> Tensor:
        value = parameters[0].new_tensor(step.forward(*inputs))
        step.turn += 1
        ctx.step, ctx.turn = step, step.turn
        return value

    @staticmethod
    def backward(ctx: FunctionCtx, scale: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.step.turn != ctx.turn:
            raise RuntimeError("the step has gone on to another batch: gradients are those of its latest loss, taken once")
        ctx.step.turn += 1
        ctx.step.backward()
        grads = [value.grad.tensor for value in ctx.step.values]
        return None, None, *(grads if float(scale) == 1 else [grad * scale for grad in grads])


def differentiable(step: Step, *inputs: Any) -> Tensor:
    """The loss, whose gradients by the parameters torch can ask for once, before the next one."""
    return _Node.apply(step, inputs, *(value.source for value in step.values))
