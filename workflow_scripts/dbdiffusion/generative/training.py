"""The training loop: batches of rows of tensors that already lie on the device, resumable at any step.

Nothing random is carried from step to step. The order of an epoch derives from (seed, epoch), the noise of a step from (seed, step) and the
learning rate from the step, so a state of weights, optimiser and counters is all that a killed run needs to end with the same bits.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dbdiffusion.config.generator import DiffusionConfig, VaeConfig
from dbdiffusion.generative import checkpoint
from dbdiffusion.generative.by_hand import value_and_gradients
from dbdiffusion.generative.optimiser import AdamW
from dbdiffusion.generative.recording import InParts, Recorded
from dbdiffusion.runtime.errors import UserError
from dbdiffusion.runtime.seeds import derive_seed, rng

logger = logging.getLogger(__name__)

EMA_EVERY = 5
"""Steps between updates of the averaged weights: an update each step costs as much as a third of the optimiser's."""
STEPS_AN_EPOCH, LEAST_BATCH = 6, 128
"""Epochs are counted, and few cells would have too few steps in them: batches of so many are halved."""
CLIP = 1.0
"""Largest norm of the gradient."""

CPU_BF16 = ("avx512_bf16", "amx_bf16")
"""Instructions that multiply bfloat16 on a CPU; without them it is slower than single precision."""

Loss = Callable[[nn.Module, Tensor, torch.Generator, float], Tensor]
"""(network, rows (b,), random stream, share of the training done) -> mean loss of the batch."""


@dataclass(frozen=True)
class Plan:
    """What one training run does; all randomness derives from `seed` and `what`."""

    what: str
    seed: int
    rows: np.ndarray
    """Training rows of the data (validation rows left out)."""
    batch_size: int
    max_epochs: int
    max_steps: int
    learning_rate: float
    weight_decay: float
    ema: float = 0.0
    """Decay of averaged weights; 0: the last weights."""
    patience: int = 0
    """Validations without improvement before stopping; 0: never stop."""
    grace: float = 0.0
    """Share of the steps before which nothing counts as best (the objective still changes)."""
    validations: int = 1000
    """At most so many validations, evenly over the epochs."""
    checkpoint_seconds: float = 60.0
    cuda_graphs: bool = False
    """Record the step on a GPU, where the loss is in parts."""
    autocast: torch.dtype | None = None

    @classmethod
    def of(cls, config: VaeConfig | DiffusionConfig, what: str, seed: int, rows: np.ndarray, device: torch.device, **more: Any) -> Plan:
        """As the config says; more: further fields."""
        same = ("batch_size", "max_epochs", "max_steps", "learning_rate", "weight_decay", "patience", "checkpoint_seconds", "cuda_graphs")
        stated = {name: getattr(config, name) for name in same}
        return cls(what=what, seed=seed, rows=rows, autocast=autocast_type(config.precision, device), **stated, **more)

    @property
    def batch(self) -> int:
        """`batch_size`, halved, but not below LEAST_BATCH, until an epoch has STEPS_AN_EPOCH steps; at most all rows."""
        batch = self.batch_size
        while batch >= 2 * LEAST_BATCH and STEPS_AN_EPOCH * batch > len(self.rows):
            batch //= 2
        return min(batch, len(self.rows))

    @property
    def steps_per_epoch(self) -> int:
        return max(1, len(self.rows) // self.batch)

    @property
    def total_steps(self) -> int:
        return max(1, min(self.max_epochs * self.steps_per_epoch, self.max_steps))

    @property
    def validate_every(self) -> int:
        """Epochs between validations."""
        return max(1, math.ceil(self.total_steps / self.steps_per_epoch / self.validations))


@dataclass(frozen=True)
class Training:
    """What `fitting.fit_all` is told of one network.

    loss: see `Loss`; validate: mean held-out loss of a network in evaluation mode, the same noise at every call; path: file of the
    training state, written every plan.checkpoint_seconds and at the end, and left to the caller to remove; on_step: called after each step
    with its number.
    """

    network: nn.Module
    loss: Loss
    plan: Plan
    validate: Callable[[nn.Module], float] | None = None
    path: Path | None = None
    on_step: Callable[[int], None] | None = None
    name: str = ""
    """What messages call it; else the plan's `what`."""


@dataclass
class _State:
    """Everything that changes while training."""

    step: int = 0
    seconds: float = 0.0
    bad: int = 0
    best: float = math.inf
    best_epoch: int = 0
    stopped: bool = False
    history: list[dict[str, float]] = field(default_factory=list)


def autocast_type(precision: str, device: torch.device) -> torch.dtype | None:
    """bfloat16 where asked for, or with `auto` on GPUs and CPUs that multiply it; None is float32."""
    if precision == "auto":
        able = torch.cuda.is_bf16_supported() if device.type == "cuda" else any(torch.cpu.get_capabilities().get(name) for name in CPU_BF16)
        precision = "bf16" if able else "fp32"
    return torch.bfloat16 if precision == "bf16" else None


def learning_rate(step: int, total: int, peak: float, warm_up: int = 50) -> float:
    """Linear warm-up over `warm_up` steps (at most a tenth of all), then a cosine to 0."""
    warm_up = min(warm_up, max(1, total // 10))
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, total - warm_up)))


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic kernels within the block; an operation that has none warns."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Not torch.use_deterministic_algorithms, which takes a second to load the compiler.
    before, fill = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("warn")
    # Filling new tensors guards against reading them unset, which nothing here does, and costs 5 % of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill


class Trainer:
    """One run of training with checkpoints; use `fitting.fit_all`."""

    def __init__(self, network: nn.Module, plan: Plan, device: torch.device, path: Path | None, name: str = "") -> None:
        self.name = name or plan.what
        self.network, self.plan, self.device, self.path = network.to(device), plan, device, path
        self.optimiser = AdamW([p for p in network.parameters() if p.requires_grad], plan.weight_decay, CLIP)
        self.averaged = self.values.clone() if plan.ema else None
        self.running = torch.zeros((), device=device)
        self.best: dict[str, Tensor] = {}
        self.state = _State()
        self.noise = torch.Generator(device)
        self.recorded: Recorded | None = None
        self.replayed = False
        """Whether steps were those of a CUDA graph."""
        self._order: tuple[int, Tensor] | None = None

    @property
    def values(self) -> Tensor:
        """All parameters (n,)."""
        return self.optimiser.values

    @property
    def going(self) -> bool:
        """Whether there are steps to do."""
        return self.state.step < self.plan.total_steps and not self.state.stopped

    def rows(self, step: int) -> Tensor:
        """The batch of a step."""
        epoch, at = divmod(step, self.plan.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            order = rng(self.plan.seed, self.plan.what, "order", epoch).permutation(self.plan.rows)
            self._order = epoch, torch.from_numpy(order).to(self.device)
        return self._order[1][at * self.plan.batch : (at + 1) * self.plan.batch]

    def batch(self) -> tuple[Tensor, torch.Generator, float]:
        """What the loss of the next step takes."""
        plan, step = self.plan, self.state.step
        self.noise.manual_seed(derive_seed(plan.seed, plan.what, "noise", step))
        return self.rows(step), self.noise, step / plan.total_steps

    def settings(self) -> tuple[float, float, float]:
        """What the optimiser's next step takes."""
        return self.optimiser.settings(learning_rate(self.state.step, self.plan.total_steps, self.plan.learning_rate))

    def advance(self, loss: Loss) -> None:
        """One step of gradient descent; the loss of the first one is that of all."""
        plan, batch, settings = self.plan, self.batch(), self.settings()
        if self.device.type == "cuda" and plan.cuda_graphs and isinstance(loss, InParts):
            if self.recorded is None:

                def descend(*given: float | Tensor) -> None:
                    self._descend(lambda: loss.value(self.network, *given[3:]), given[:3])

                self.recorded = Recorded(descend, self.device)
            self.recorded(*settings, *loss.inputs(*batch))
            self.replayed |= self.recorded.graph is not None
        else:
            self._descend(lambda: loss(self.network, *batch), settings)
        self.count()

    def count(self) -> None:
        """After a step: its number, and the averaged weights."""
        plan = self.plan
        self.state.step += 1
        if self.averaged is not None and self.state.step % EMA_EVERY == 0:
            updates = self.state.step // EMA_EVERY
            self.averaged.lerp_(self.values, 1 - min(plan.ema**EMA_EVERY, updates / (updates + 10)))

    def _descend(self, value: Callable[[], Tensor], settings: Sequence[float | Tensor]) -> None:
        """One update by the gradients of a loss; settings: the optimiser's."""

        def value_of_batch() -> Tensor:
            with torch.autocast(self.device.type, dtype=self.plan.autocast, enabled=self.plan.autocast is not None):
                return value()

        found, gradients = value_and_gradients(self.network, value_of_batch, self.optimiser.parameters)
        self.optimiser.step(gradients, *settings)
        self.running += found

    @contextlib.contextmanager
    def evaluated(self) -> Iterator[nn.Module]:
        """The network in evaluation mode, with the averaged weights in place where there are any."""
        current = self.values.clone()
        if self.averaged is not None:
            self.values.copy_(self.averaged)
        self.network.eval()
        try:
            with torch.no_grad():
                yield self.network
        finally:
            self.values.copy_(current)
            self.network.train()

    def close_epoch(self, validate: Callable[[nn.Module], float] | None) -> None:
        """At the end of an epoch: held-out loss, best weights, stopping."""
        plan, state = self.plan, self.state
        epoch, rest = divmod(state.step, plan.steps_per_epoch)
        last = state.step == plan.total_steps
        if rest and not last:
            return
        if not last and epoch % plan.validate_every:
            return
        span = state.step - (int(state.history[-1]["step"]) if state.history else 0)
        row = {"epoch": epoch, "step": state.step, "train": float(self.running) / max(1, span)}
        self.running.zero_()
        with self.evaluated() as network:
            if validate is not None:
                row["validation"] = validate(network)
            score = row.get("validation", row["train"])
            if not math.isfinite(score):
                raise UserError(
                    f"training of {self.name} diverged at step {state.step} (loss {score})",
                    where="config key learning_rate",
                    fix=f"lower it (now {plan.learning_rate:g}) or look for cells with extreme counts",
                )
            counts = state.step >= plan.grace * plan.total_steps
            if counts and (score < state.best or validate is None):
                state.best, state.best_epoch, state.bad = score, epoch, 0
                self.best = {name: value.detach().clone() for name, value in network.state_dict().items()}
            elif counts:
                state.bad += 1
        state.history.append(row)
        state.stopped = bool(plan.patience) and state.bad >= plan.patience

    def save(self) -> None:
        """Write the training state."""
        tensors = {
            **checkpoint.prefixed("network", self.network.state_dict()),
            **checkpoint.prefixed("best", self.best),
            **({} if self.averaged is None else {"averaged": self.averaged}),
            **checkpoint.prefixed("optimiser", self.optimiser.state()),
            "running": self.running,
        }
        checkpoint.save(self.path, tensors, vars(self.state))

    def resume(self) -> bool:
        """Continue from a stored training state, if there is a whole one."""
        stored = checkpoint.load_if_whole(self.path) if self.path is not None else None
        if stored is None:
            return False
        tensors, state = stored
        weights, own = checkpoint.unprefixed("network", tensors), self.network.state_dict()
        fits = {name: value.shape for name, value in weights.items()} == {name: value.shape for name, value in own.items()}
        if not fits or not self.optimiser.load(checkpoint.unprefixed("optimiser", tensors)):
            logger.warning("starting from the beginning: %s is a training state of another version", self.path)
            return False
        self.network.load_state_dict(weights)
        self.best = {k: v.to(self.device) for k, v in checkpoint.unprefixed("best", tensors).items()}
        if self.averaged is not None:
            checkpoint.same_dtype_copy(self.averaged, tensors["averaged"])
        checkpoint.same_dtype_copy(self.running, tensors["running"])
        self.state = _State(**state)
        logger.info("%s resumes at step %d of %d", self.name, self.state.step, self.plan.total_steps)
        return True


def split_rows(n: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows for training and for validation (both sorted); validation may be empty."""
    held = int(round(share * n)) if n >= 20 else 0
    order = rng(seed, "validation").permutation(n)
    return np.sort(order[held:]), np.sort(order[:held])
