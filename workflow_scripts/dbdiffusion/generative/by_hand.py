"""What networks share that are differentiated by hand on a CPU.

A step of a small network is dozens of operations of some ten microseconds each; making a tensor, or numpy's view of one for a loop, would
take one or two more every time. So a step is an object that is made once for a number of rows and keeps its tensors from batch to batch:
activations, gradients, and in bfloat16 its weights. To torch it is one node of a graph, without which `value_and_gradients` does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
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
    """A parameter, and where its gradient is left: at `gradient_place`, where an optimiser has given it one."""

    def __init__(self, parameter: nn.Parameter) -> None:
        super().__init__(parameter.detach())
        self.source = parameter
        place = getattr(parameter, "gradient_place", None)
        self.grad = Both(torch.empty_like(self.tensor) if place is None else place)


class Linear:
    """y = x W' for n rows; intercepts are added by the loop that comes next. half: products of bfloat16."""

    def __init__(self, weight: Value, n: int, half: bool) -> None:
        after, before = weight.tensor.shape
        self.weight, self.half = weight, half
        self.used = torch.empty_like(weight.tensor, dtype=torch.bfloat16) if half else weight.tensor
        self.turned, self.out, self._shape = self.used.t(), empty(n, after, half=half), (n, before)
        self.by_weight = torch.empty_like(self.used) if half else weight.grad.tensor

    def __call__(self, x: Both) -> Both:
        if self.half:
            self.used.copy_(self.weight.tensor)
        self.x = x.tensor
        torch.mm(self.x, self.turned, out=self.out.tensor)
        return self.out

    @cached_property
    def by_x(self) -> Both:
        return empty(*self._shape, half=self.half)

    def backward(self, grad: Both, wanted: bool = True) -> Both | None:
        """Gradient of x (None unless wanted); the weight's is left in its place."""
        if wanted:
            torch.mm(grad.tensor, self.used, out=self.by_x.tensor)
        torch.mm(grad.tensor.t(), self.x, out=self.by_weight)
        if self.half:
            self.weight.grad.tensor.copy_(self.by_weight)
        return self.by_x if wanted else None


class Step(ABC):
    """A loss of a batch and its gradients; one object for all batches of as many rows."""

    values: Sequence[Value]
    """All parameters."""

    @cached_property
    def sources(self) -> list[nn.Parameter]:
        """All parameters as torch knows them."""
        return [value.source for value in self.values]

    @cached_property
    def grads(self) -> dict[nn.Parameter, Tensor]:
        """Where the gradients of the parameters are left."""
        return {value.source: value.grad.tensor for value in self.values}

    @abstractmethod
    def forward(self, *inputs: Any) -> float:
        """The loss."""

    @abstractmethod
    def backward(self) -> None:
        """Leave the gradients of the latest loss in those of `values`."""


class ByHand(nn.Module):
    """A network that keeps the step of its latest loss.

    torch.autograd.grad gives the gradients of the latest loss alone, once; they lie in memory that the next loss uses again. The step is
    made anew where parameters or their gradients have moved, and let go where the network goes over to evaluation or back.
    """

    def __init__(self) -> None:
        super().__init__()
        self._step: Step | None = None
        self._key: Hashable = None
        self._memory: list[int] = []
        self.losses = 0
        self.bare: list[Tensor] | None = None
        """The losses made without a graph, while these are wanted."""

    def train(self, mode: bool = True) -> ByHand:
        self._step = self._key = None
        return super().train(mode)

    def loss_by_hand(
        self,
        make: Callable[[list[Value | None]], Step],
        parameters: Sequence[nn.Parameter | None],
        key: Hashable,
        inputs: Sequence[Any],
    ) -> Tensor:
        """The loss that the step of `parameters` (None where there is none) has for the inputs; key: what `make` depends on besides."""
        memory = [x.data_ptr() for p in parameters if p is not None for x in (p, getattr(p, "gradient_place", p))]
        if self._key != key or self._memory != memory:
            self._step = self._key = None  # Let go before the next one is made.
            self._step, self._key, self._memory = make([None if p is None else Value(p) for p in parameters]), key, memory
        if self.bare is None:
            return _Node.apply(self, self._step, inputs, *self._step.sources)
        self.losses += 1
        self.bare.append(torch.tensor(self._step.forward(*inputs)))
        return self.bare[-1]


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, network: ByHand, step: Step, inputs: Sequence[Any], *parameters: Tensor) -> Tensor:
        network.losses += 1
        ctx.network, ctx.step, ctx.turn = network, step, network.losses
        return parameters[0].new_tensor(step.forward(*inputs))

    @staticmethod
    def backward(ctx: FunctionCtx, scale: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.network.losses != ctx.turn:
            raise RuntimeError("gradients are there for the network's latest loss alone, and once")
        ctx.network.losses += 1
        ctx.step.backward()
        grads = ctx.step.grads.values()
        return None, None, None, *(grads if float(scale) == 1 else (grad * scale for grad in grads))


def value_and_gradients(
    network: nn.Module, loss: Callable[[], Tensor], parameters: Sequence[nn.Parameter]
) -> tuple[Tensor, Sequence[Tensor]]:
    """A loss of the network and its gradients with regard to parameters, as torch.autograd.grad has them.

    Of a loss by hand they come straight from its step: with a graph the same takes some 5 % of a training step longer. It has to be all of
    the loss: raises RuntimeError where it is a part.
    """
    if not isinstance(network, ByHand):
        value = loss()
        return value.detach(), torch.autograd.grad(value, parameters)
    network.bare = []
    try:
        value, bare = loss(), network.bare
    finally:
        network.bare = None
    if not bare:
        return value.detach(), torch.autograd.grad(value, parameters)
    if len(bare) > 1 or value is not bare[0]:
        raise RuntimeError("a loss by hand was made a part of another, whose gradients it does not know")
    network._step.backward()
    return value, [network._step.grads[parameter] for parameter in parameters]
