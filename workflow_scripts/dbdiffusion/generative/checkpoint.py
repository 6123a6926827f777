"""Weights and training states as safetensors: no pickles, whole or absent, keyed by what they were made from."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dbdiffusion.runtime.errors import UserError
from dbdiffusion.runtime.files import atomic_path

logger = logging.getLogger(__name__)


def digest(*parts: Any) -> str:
    """A digest of settings (anything JSON) and arrays (numpy or tensors: shape, type and content)."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            part = part.detach().cpu().numpy()
        if isinstance(part, np.ndarray):
            total.update(f"{part.shape}{part.dtype}".encode())
            total.update(np.ascontiguousarray(part).data)
        else:
            total.update(json.dumps(part, sort_keys=True, default=str).encode())
        total.update(b"\x1f")
    return total.hexdigest()[:24]


def save(path: str | Path, tensors: dict[str, Tensor], state: dict[str, Any] | None = None) -> None:
    """Write tensors, and `state` as JSON in the header, in one atomic file."""
    cpu = {name: value.detach().cpu().contiguous() for name, value in sorted(tensors.items())}
    # One metadata key only: the header's order of several keys is not fixed.
    metadata = {"state": json.dumps(state, sort_keys=True)} if state is not None else None
    with atomic_path(path) as temporary:
        save_file(cpu, str(temporary), metadata=metadata)


def load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and state of `save`.

    Raises UserError when the file is absent or damaged.
    """
    try:
        with safe_open(str(path), framework="pt") as stored:
            metadata = stored.metadata() or {}
            return {name: stored.get_tensor(name) for name in stored.keys()}, json.loads(metadata.get("state", "{}"))  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot be read as safetensors: {error}", where=str(path), fix="delete it and run the rule that makes it"
        ) from None


def load_if_whole(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """A training state to resume from, or None; a damaged one is reported and ignored."""
    if not path.exists():
        return None
    try:
        return load(path)
    except UserError as error:
        logger.warning("starting from the beginning: %s", error)
        return None


def scratch_file(scratch: str | Path | None, what: str, key: str) -> Path | None:
    """Where the training state of `what` with digest `key` lives."""
    return None if scratch is None else Path(scratch) / f"{what}-{key}.safetensors"


def discard_all(scratch: str | Path, what: str) -> None:
    """Remove the training states of `what` (those of older settings too), and the folder when nothing else is in it."""
    folder = Path(scratch)
    if not folder.is_dir():
        return
    for path in folder.glob(f"{what}-*.safetensors"):
        path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def unprefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    start = prefix + "."
    return {name[len(start) :]: value for name, value in tensors.items() if name.startswith(start)}


def same_dtype_copy(target: Tensor, source: Tensor) -> None:
    """Copy into an existing tensor, refusing a silent change of type."""
    if target.dtype != source.dtype:
        raise TypeError(f"stored {source.dtype}, expected {target.dtype}")
    with torch.no_grad():
        target.copy_(source)
