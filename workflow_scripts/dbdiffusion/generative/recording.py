"""Training steps on a GPU, recorded once and replayed.

A step of a small network is some hundreds of operations, most of which a GPU finishes faster than Python asks for the next one. Recorded as
a CUDA graph all of them are asked for at once. A recording repeats operations on the same memory: what changes from step to step has to
come in by tensors, and everything random is drawn before.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

EAGER = 3
"""Calls before a recording: libraries set themselves up when they are first used, which cannot be recorded."""

Input = Tensor | float


class InParts(ABC):
    """A loss (`training.Loss`) in two parts: what changes from batch to batch, and what is made of it."""

    @abstractmethod
    def inputs(self, rows: Tensor, stream: torch.Generator, share: float) -> tuple[Input, ...]:
        """All that the loss of these rows takes from data, random numbers and the progress of training, in the same shapes always."""

    @abstractmethod
    def value(self, network: nn.Module, *inputs: Input) -> Tensor:
        """The loss; no number of inputs is looked at by Python."""

    def __call__(self, network: nn.Module, rows: Tensor, stream: torch.Generator, share: float = 1.0) -> Tensor:
        return self.value(network, *self.inputs(rows, stream, share))


class Recorded:
    """`step`, which changes tensors of a GPU in place, recorded after some calls; as it is where that cannot be done.

    Its inputs are tensors of a GPU, always of the same shapes, and numbers, which a recorded step gets as tensors.
    """

    def __init__(self, step: Callable[..., None]) -> None:
        self.step, self.calls = step, 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.held: list[Tensor] = []

    def __call__(self, *inputs: Input) -> None:
        self.calls += 1
        if self.calls == EAGER + 1:
            self._record(inputs)
        if self.graph is None:
            self.step(*inputs)
            return
        for own, given in zip(self.held, inputs, strict=True):
            own.copy_(given) if isinstance(given, Tensor) else own.fill_(given)
        self.graph.replay()

    def _record(self, inputs: tuple[Input, ...]) -> None:
        """Nothing is computed yet."""
        device = next(x.device for x in inputs if isinstance(x, Tensor))
        self.held = [x.clone() if isinstance(x, Tensor) else torch.full((), x, device=device) for x in inputs]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.step(*self.held)
        except RuntimeError as error:
            logger.warning("training goes on without a CUDA graph, which may be slower: %s", error)
            return
        self.graph = graph
