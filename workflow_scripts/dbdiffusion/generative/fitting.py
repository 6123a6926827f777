"""Trainings from their first or stored step to the last, of one network or of several side by side."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from dbdiffusion.generative.side_by_side import SideBySide, alike
from dbdiffusion.generative.training import Trainer, Training, deterministic
from dbdiffusion.runtime.progress import Progress
from dbdiffusion.runtime.provenance import versions

logger = logging.getLogger(__name__)

Model = TypeVar("Model")


@dataclass
class Fitted:
    """weights: the state to keep (CPU); history: one row per validated epoch (epoch, step, train, validation loss); precision: that of
    products, fp32 or bf16; recorded: steps were replayed as a CUDA graph."""

    weights: dict[str, Tensor]
    history: list[dict[str, float]]
    seconds: float
    steps: int
    best_epoch: int
    precision: str
    recorded: bool

    @property
    def steps_per_second(self) -> float:
        return self.steps / max(self.seconds, 1e-9)


class _Course:
    """A training under way."""

    def __init__(self, training: Training, device: torch.device) -> None:
        self.of, self.trainer = training, Trainer(training.network, training.plan, device, training.path, training.name)
        self.trainer.resume()
        training.network.train()
        self.saved = time.monotonic()
        self.progress = Progress(training.plan.total_steps, self.trainer.name, start=self.trainer.state.step)

    @property
    def going(self) -> bool:
        return self.trainer.going

    def after_step(self, seconds: float) -> None:
        """seconds: since the last one, for each of those side by side."""
        trainer, training = self.trainer, self.of
        state = trainer.state
        state.seconds += seconds
        self.progress.update(1, **{k: v for k, v in (state.history[-1] if state.history else {}).items() if k in ("train", "validation")})
        if training.path is not None and (not self.going or time.monotonic() - self.saved >= training.plan.checkpoint_seconds):
            trainer.save()
            self.saved = time.monotonic()
        if training.on_step is not None:
            training.on_step(state.step)

    def ended(self) -> Fitted:
        trainer, state = self.trainer, self.trainer.state
        weights = {name: value.cpu().contiguous() for name, value in trainer.best.items()}
        precision = "fp32" if self.of.plan.autocast is None else "bf16"
        trainer.recorded = None  # It knows the trainer and all its data, which would stay until somebody looks for such circles.
        return Fitted(weights, state.history, state.seconds, state.step, state.best_epoch, precision, trainer.replayed)


def each_or_all(models: Sequence[Model], device: torch.device, learn: Callable[[Sequence[Model]], None]) -> None:
    """Call `learn` with the models that are trained at the same time.

    On a GPU, which one alone leaves idle most of the time, all of them, where its memory allows. On a CPU each has its turn: there it has
    loops of its own, which are faster than side by side.
    """
    if device.type == "cuda" and len(models) > 1:
        try:
            learn(models)
            return
        except torch.cuda.OutOfMemoryError:
            logger.warning("%s: one after another, for all at once do not fit into its memory", device)
        torch.cuda.empty_cache()
    for model in models:
        learn([model])


def fit_all(trainings: Sequence[Training], *, device: torch.device) -> list[Fitted]:
    """Train networks, side by side those of one shape (`side_by_side.alike`); the weights of each are those of its best validated epoch (of
    the last one without validation). Nothing but rounding depends on what is trained beside it."""
    fitted: dict[int, Fitted] = {}
    with deterministic():
        for group in alike(trainings):
            courses = [_Course(trainings[i], device) for i in group]
            _run(courses)
            fitted.update((i, course.ended()) for i, course in zip(group, courses, strict=True))
    return [fitted[i] for i in range(len(trainings))]


def _run(courses: Sequence[_Course]) -> None:
    with contextlib.ExitStack() as stack:
        for course in courses:
            stack.enter_context(course.progress)
        before = time.monotonic()
        while going := [course for course in courses if course.going]:
            # Anew where one has ended: fewer are trained from there on.
            several = SideBySide([course.trainer for course in going], [course.of.loss for course in going]) if len(going) > 1 else None
            while all(course.going for course in going):
                if several:
                    several.advance()
                else:
                    going[0].trainer.advance(going[0].of.loss)
                for course in going:
                    course.trainer.close_epoch(course.of.validate)
                now = time.monotonic()
                for course in going:
                    course.after_step((now - before) / len(going))
                before = now
            if several:
                several.recorded = None  # As a trainer's.


def training_record(fitted: Fitted, device: torch.device, network: nn.Module) -> dict:
    """What every record says of its training."""
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "history": fitted.history,
        "best_epoch": fitted.best_epoch,
        "steps": fitted.steps,
        "precision": fitted.precision,
        "seconds": round(fitted.seconds, 3),
        "steps_per_second": round(fitted.steps_per_second, 3),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        **(_gpu_record(fitted, device) if device.type == "cuda" else {}),
        "threads": torch.get_num_threads(),
        "versions": versions("torch", "numpy", "safetensors"),
    }


def _gpu_record(fitted: Fitted, device: torch.device) -> dict:
    """Memory is that of the process, of all that it has trained."""
    return {"gpu_memory_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 3), "cuda_graph": fitted.recorded}
