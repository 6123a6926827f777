"""Networks of one shape that take each step together, their weights as one tensor for each layer.

A step of a small network is hundreds of operations, which take a GPU less time than it takes to ask for them. Of several networks side by
side each operation of loss, gradients and optimiser is one; what goes into a loss is drawn for each in its turn. What is computed for each
is what it would be alone, but for rounding: its own cells, random streams, learning rate and norm of the gradient.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from dbdiffusion.generative.optimiser import update
from dbdiffusion.generative.recording import InParts, Input, Recorded
from dbdiffusion.generative.training import Trainer, Training


def alike(trainings: Sequence[Training]) -> list[list[int]]:
    """Those that can go side by side, by their places; one whose network has statistics of batches, or whose loss is not in parts, goes
    alone."""
    groups: dict[Hashable, list[int]] = {}
    for i, training in enumerate(trainings):
        network, plan, loss = training.network, training.plan, training.loss
        alone = any(isinstance(part, nn.BatchNorm1d) for part in network.modules()) or not isinstance(loss, InParts)
        shapes = tuple((name, tuple(value.shape)) for name, value in network.state_dict().items())
        same = shapes, plan.batch, plan.autocast, plan.weight_decay, plan.cuda_graphs, None if alone else loss.shape(plan.batch)
        groups.setdefault((same, i if alone else None), []).append(i)
    return list(groups.values())


class _Loss(nn.Module):
    """A loss in parts as a module's output, for torch to put other values in the place of the network's own."""

    def __init__(self, network: nn.Module, loss: InParts) -> None:
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.loss.value(self.network, *inputs)


class SideBySide:
    """M trainers whose networks and losses are `alike`: their parameters become rows of one tensor (M, n)."""

    def __init__(self, trainers: Sequence[Trainer], losses: Sequence[InParts]) -> None:
        first, many = trainers[0], len(trainers)
        self.trainers, self.losses, self.one = trainers, losses, _Loss(first.network, losses[0])
        self.memory = [values.new_empty(many, len(values)) for values in first.optimiser.memory]
        self.running = torch.stack([trainer.running for trainer in trainers])
        for row, trainer in enumerate(trainers):
            trainer.optimiser.move(*(values[row] for values in self.memory))
            trainer.running = self.running[row]
        names = {parameter: f"network.{name}" for name, parameter in first.network.named_parameters()}
        parts = self.memory[0].split(first.optimiser.sizes, dim=1)
        self.parameters = {
            names[own]: part.view(many, *own.shape).detach().requires_grad_()
            for own, part in zip(first.optimiser.parameters, parts, strict=True)
        }
        states = [trainer.network.state_dict() for trainer in trainers]
        others = [name for name in states[0] if f"network.{name}" not in self.parameters]
        self.constants = {f"network.{name}": torch.stack([state[name] for state in states]) for name in others}
        graphs = first.device.type == "cuda" and first.plan.cuda_graphs
        self.recorded = Recorded(self._descend, first.device) if graphs else None

    def advance(self) -> None:
        """One step of all."""
        settings = self._numbers([trainer.settings() for trainer in self.trainers]).t()[:, :, None]
        pairs = zip(self.trainers, self.losses, strict=True)
        inputs = zip(*(loss.inputs(*trainer.batch()) for trainer, loss in pairs), strict=True)
        given = [torch.stack(x) if isinstance(x[0], Tensor) else self._numbers(x) for x in inputs]
        (self.recorded or self._descend)(*settings, *given)
        for trainer in self.trainers:
            trainer.replayed |= self.recorded is not None and self.recorded.graph is not None
            trainer.count()

    def _numbers(self, values: Sequence) -> Tensor:
        """On the device, without waiting for what it has to do before."""
        return torch.tensor(values).to(self.trainers[0].device, non_blocking=True)

    def _descend(self, rate: Input, correct: Input, kept: Input, *inputs: Tensor) -> None:
        """One update; settings of the optimiser (M, 1)."""
        plan, optimiser = self.trainers[0].plan, self.trainers[0].optimiser

        def loss_of(parameters: dict[str, Tensor], constants: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
            return functional_call(self.one, (parameters, constants), inputs)

        with torch.autocast(self.running.device.type, dtype=plan.autocast, enabled=plan.autocast is not None):
            found = vmap(loss_of)(self.parameters, self.constants, inputs)
        gradients = torch.autograd.grad(found.sum(), list(self.parameters.values()))
        torch.cat([gradient.flatten(1) for gradient in gradients], dim=1, out=self.memory[1])
        update(*self.memory, optimiser.decayed, optimiser.clip, rate, correct, kept)
        self.running += found.detach()
