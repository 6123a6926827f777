"""AdamW (Loshchilov and Hutter 2019) over all parameters at once, with clipping.

Parameters become views of one tensor: an update then costs a few operations instead of some for each parameter, on which small networks
would spend as much time as on their products; on a CPU it is one pass over the tensor (`kernels.adam`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from dbdiffusion.generative import kernels
from dbdiffusion.generative.kernels import array, fused

BETAS, EPSILON = (0.9, 0.999), 1e-8


def update(
    values: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    decayed: int,
    clip: float,
    rate: float | Tensor,
    correct: float | Tensor,
    kept: float | Tensor,
) -> None:
    """One update in place of values (..., n), the first `decayed` of which decay, by their gradient, whose norm over the last dimension is
    at most `clip`, and its moments, with the `AdamW.settings`, numbers or (..., 1)."""
    values[..., :decayed].mul_(kept)
    gradient.mul_((clip / (torch.linalg.vector_norm(gradient, dim=-1, keepdim=True) + 1e-6)).clamp(max=1.0))
    first.lerp_(gradient, 1 - BETAS[0])
    second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
    values.sub_(first.div(second.sqrt().mul_(correct).add_(EPSILON)).mul_(rate))


class AdamW:
    """parameters: become views of `values` (n,), and get a view of `gradient` as `gradient_place`, from where a gradient needs no copy;
    weight_decay: decoupled, of matrices (intercepts by batch among them) alone, since pulling common intercepts and variances to 0 would
    bias what they estimate; clip: largest norm of the gradient.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], weight_decay: float, clip: float) -> None:
        self.weight_decay, self.clip = weight_decay, clip
        self.parameters = sorted(parameters, key=lambda p: p.ndim <= 1)  # Matrices first, else in the order given.
        self.sizes = [p.numel() for p in self.parameters]
        self.decayed = sum(p.numel() for p in parameters if p.ndim > 1)
        self.steps = 0
        values = torch.cat([p.detach().reshape(-1) for p in self.parameters])
        self._lie_in(values, *(torch.zeros_like(values) for _ in range(3)))

    def _lie_in(self, values: Tensor, gradient: Tensor, first: Tensor, second: Tensor) -> None:
        """Parameters, their gradient and its moments, each (n,)."""
        self.values, self.gradient, self.first, self.second = values, gradient, first, second
        self.places = gradient.split(self.sizes)
        for p, part, place in zip(self.parameters, values.split(self.sizes), self.places, strict=True):
            p.data, p.gradient_place = part.view_as(p), place.view_as(p)
        self.__dict__.pop("_arrays", None)

    @property
    def memory(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Values, gradient and its moments, each (n,)."""
        return self.values, self.gradient, self.first, self.second

    def move(self, *memory: Tensor) -> None:
        """To other tensors in place of `memory`: parameters, which keep their values, are views of the first of them then."""
        for own, place in zip(self.memory, memory, strict=True):
            place.copy_(own)
        self._lie_in(*memory)

    def settings(self, rate: float) -> tuple[float, float, float]:
        """What changes from step to step, of the next one with this learning rate: the rate over the first moment's correction, what the
        second's root is multiplied with, and what decay leaves."""
        self.steps += 1
        first, second = (1 - beta**self.steps for beta in BETAS)
        return rate / first, 1 / math.sqrt(second), 1 - rate * self.weight_decay

    def step(self, gradients: Sequence[Tensor], rate: float | Tensor, correct: float | Tensor, kept: float | Tensor) -> None:
        """One update with the `settings`, which on a GPU can be tensors, of the gradients of `parameters`, in their order."""
        elsewhere = [(place, g) for place, g in zip(self.places, gradients, strict=True) if g.data_ptr() != place.data_ptr()]
        if len(elsewhere) == len(self.places):
            torch.cat([g.reshape(-1) for g in gradients], out=self.gradient)
        else:
            for place, g in elsewhere:
                place.copy_(g.reshape(-1))
        if fused(self.values):
            norm = math.sqrt(kernels.sum_of_squares(self._arrays[1]))
            # As torch's own clipping: a gradient that is not finite stays so, and is noticed by the loss.
            scale = 1.0 if norm <= self.clip else self.clip / (norm + 1e-6)
            settings = [np.float32(x) for x in (scale, rate, *BETAS, correct, EPSILON)]
            n = self.decayed
            kernels.adam(*(x[:n] for x in self._arrays), np.float32(kept), *settings)
            kernels.adam(*(x[n:] for x in self._arrays), np.float32(1), *settings)
            return
        update(*self.memory, self.decayed, self.clip, rate, correct, kept)

    @cached_property
    def _arrays(self) -> list[np.ndarray]:
        """Values, gradient and moments for loops."""
        return [array(x) for x in self.memory]

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs beside the parameters."""
        return {"first": self.first, "second": self.second, "steps": torch.tensor(self.steps)}

    def load(self, state: dict[str, Tensor]) -> bool:
        """Take a stored `state`; False, and nothing taken, where it is of another layout."""
        if state.keys() != self.state().keys() or any(state[name].shape != self.values.shape for name in ("first", "second")):
            return False
        self.first.copy_(state["first"])
        self.second.copy_(state["second"])
        self.steps = int(state["steps"])
        return True
