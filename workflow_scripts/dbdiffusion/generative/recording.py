"""Training steps on a GPU, recorded once and replayed.

A step of a small network is some hundreds of operations, most of which a GPU finishes faster than Python asks for the next one. Recorded as
a CUDA graph all of them are asked for at once. A recording repeats operations on the same memory: what changes from step to step has to
come in by tensors, and everything random is drawn before.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable

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
        """The loss by torch's own operations; no number of inputs is looked at by Python."""

    @abstractmethod
    def shape(self, rows: int) -> Hashable:
        """What losses have in common whose inputs for so many rows are of the same shapes, and whose `value` is the same for the same
        network."""

    def __call__(self, network: nn.Module, rows: Tensor, stream: torch.Generator, share: float = 1.0) -> Tensor:
        return self.value(network, *self.inputs(rows, stream, share))


class Recorded:
    """`step`, which changes tensors of a GPU in place, recorded after some calls; as it is where that cannot be done, in a process whose
    unused memory torch may not be able to free any more.

    Its inputs are tensors of the GPU, always of the same shapes, and numbers, which the step gets as tensors.
    """

    def __init__(self, step: Callable[..., None], device: torch.device) -> None:
        self.step, self.device, self.calls = step, device, 0
        # Of calls and recording alike: autograd remembers on which stream it saw a parameter first, and libraries prepare each stream.
        self.stream = torch.cuda.Stream(device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.held: list[Tensor] = []

    def __call__(self, *inputs: Input) -> None:
        self.calls += 1
        with torch.cuda.device(self.device):
            self._hold(inputs)
            if self.calls == EAGER + 1:
                self._record()
            if self.graph is None:
                self._aside()
            else:
                self.graph.replay()

    def _hold(self, inputs: tuple[Input, ...]) -> None:
        """Inputs in the memory that is recorded."""
        if not self.held:
            self.held = [x.clone() if isinstance(x, Tensor) else torch.full((), x, device=self.device) for x in inputs]
            return
        for own, given in zip(self.held, inputs, strict=True):
            if not isinstance(given, Tensor):
                own.fill_(given)
            elif own.shape == given.shape:
                own.copy_(given)
            else:
                raise ValueError(f"an input of shape {tuple(given.shape)}, {tuple(own.shape)} before")

    def _aside(self) -> None:
        """The step on the stream of its own, after all that was asked for before it."""
        usual = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(usual)
        with torch.cuda.stream(self.stream):
            self.step(*self.held)
        usual.wait_stream(self.stream)

    def _record(self) -> None:
        """Nothing is computed yet."""
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer one, for a recording that fails does not leave its stream.
            with torch.cuda.stream(torch.cuda.current_stream(self.device)), torch.cuda.graph(graph, stream=self.stream):
                self.step(*self.held)
        except RuntimeError as error:
            # What ends a recording fails too then, and says less.
            cause = error.__context__ or error
            if not isinstance(cause, Exception):
                raise cause from None  # Somebody stopped it.
            cause = (str(cause).splitlines() or [type(cause).__name__])[0]
            logger.warning("training goes on without a CUDA graph (set cuda_graphs to false to be rid of this): %s", cause)
            return
        self.graph = graph
