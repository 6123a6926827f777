"""config block `run`: which datasets, seeds and targets, on what device."""

from __future__ import annotations

from pydantic import Field

from dbdiffusion.config.base import Block


class RunConfig(Block):
    """What is run: datasets, seeds, targets and device."""

    datasets: list[str] = Field(["simulated"], min_length=1)
    """Names of blocks under `datasets` to analyse."""
    seeds: list[int] = Field([1], min_length=1)
    """Every stochastic stage is repeated for each seed."""
    targets: list[str] = Field([])
    """Perturbations nobody measured, to be predicted from all of the data. Empty: only held-out ones. They are predicted with
    `splits.scheme: none`, or beside the benchmark under fold `all`."""
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """auto (a GPU where there is one), cpu, cuda or cuda:N (an error where there is none)."""
    side_by_side: bool = False
    """Train the cross-fit models of a fold in one job: on a GPU that can hold the cells of all side by side, with batched weights, else one
    after another. Not yet tried on a GPU."""
