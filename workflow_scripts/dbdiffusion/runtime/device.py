"""The device that a stage computes on."""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
from functools import cache
from pathlib import Path

import torch

from dbdiffusion.runtime.errors import UserError, nearest

# Lock files of this process; the locks go when the process ends, however it ends.
_HELD: list[int] = []


@cache
def _free_gpu(count: int) -> int:
    """A GPU that no other job of this machine holds, or the first one when all are taken; the same at every call of a process.

    A scheduler hands a job its own device; on a workstation nothing does, so jobs agree by file locks.
    """
    if count == 1:
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    for index in range(count):
        name = re.sub(r"\W", "-", visible[index].strip()) if len(visible) == count else str(index)
        path = Path(tempfile.gettempdir()) / f"dbdiffusion-{os.getuid()}-gpu{name}.lock"
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            continue
        _HELD.append(handle)
        return index
    return 0


def resolve_device(requested: str) -> torch.device:
    """`auto` takes a free GPU that the job may see, else the CPU; `cuda` insists on a GPU, `cuda:N` on that one.

    Numbers count the visible devices: under Slurm and with CUDA_VISIBLE_DEVICES set, the job's own.

    Raises UserError when a GPU is asked for and none (or not that one) is visible.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if requested == "auto":
        return torch.device(f"cuda:{_free_gpu(count)}" if count else "cpu")
    if requested == "cpu":
        return torch.device("cpu")
    if match := re.fullmatch(r"cuda(?::(\d+))?", requested):
        if count and match[1] is None:
            return torch.device(f"cuda:{_free_gpu(count)}")
        if (index := int(match[1] or 0)) < count:
            return torch.device(f"cuda:{index}")
        build = "this torch has no CUDA support" if torch.version.cuda is None else f"{count} GPU(s) visible"
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise UserError(
            f"{requested!r} was asked for, but {build} (CUDA_VISIBLE_DEVICES={visible!r})",
            where="config key run.device",
            fix="set run.device: auto or cpu, install the CUDA build of torch (envs/torch-cuda.yaml), "
            "or ask the scheduler for a GPU (--profile profiles/slurm)",
        )
    raise UserError(f"unknown device {requested!r}", where="config key run.device", fix=nearest(requested, ["auto", "cpu", "cuda"]))


def set_threads(threads: int) -> None:
    """Use as many CPU threads as the job was given: more threads than cores slow torch down."""
    torch.set_num_threads(max(1, threads))
