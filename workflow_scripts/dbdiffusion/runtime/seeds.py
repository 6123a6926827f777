"""Random streams that depend on names, not on the order of calls."""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(seed: int, *labels: object) -> int:
    """A 63-bit seed from the run's seed and the labels of a use (room, fold, perturbation, ...)."""
    text = "\x1f".join(str(part) for part in (seed, *labels))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def rng(seed: int, *labels: object) -> np.random.Generator:
    """A numpy generator for one named use of randomness."""
    return np.random.default_rng(derive_seed(seed, *labels))
