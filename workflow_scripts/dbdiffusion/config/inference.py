"""config block `inference`: estimator, errors, tests and calls."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dbdiffusion.config.base import Block


class InferenceConfig(Block):
    """Debiasing, standard errors, tests and calls."""

    weight: Literal["tuned", "one", "zero"] = "tuned"
    """Weight lambda of the predictor: tuned per gene on pseudo-targets; one (published); zero (neighbour mean)."""
    error_model: Literal["t", "conformal", "cells_only", "conservative", "ppi_z"] = "conformal"
    """Interval: t (perturbation as unit, moderated); conformal, the same with quantiles of the standardised errors of measured
    perturbations (from 20 of them on, else t); or one of the published errors, for comparison."""
    level: float = Field(0.95, gt=0.5, lt=1)
    """Nominal coverage of intervals."""
    calls: Literal["direction", "selection", "t"] = "direction"
    """Which test makes the call: direction, the gene changes in the predicted direction; conformal selection, an experiment of the
    screen's size would call it (fewer calls); or the t test."""
    q: float = Field(0.1, gt=0, lt=1)
    """Nominal false discovery rate of calls."""
    fdr: Literal["pooled", "target"] = "pooled"
    """What conformal selection aims to hold at q: pooled, the share of false calls among all calls, and its mean over targets; or only the
    mean over targets (more calls, but where few targets have calls, most of them may be false). Calls of direction hold both."""
    min_k_eff: float = Field(3.0, ge=1)
    """Fewer effective neighbours: no call."""
    min_confidence: float = Field(0.0, ge=0, le=1)
    """Targets located with less confidence get no call (beside those that calibration itself finds hopeless)."""
    max_calibration_pairs: int = Field(200000, ge=1000)
    """Pseudo-target x gene pairs that calibrate calls."""
    de_fdr: float = Field(0.05, gt=0, lt=1)
    """FDR at which a measured perturbation's own test calls a gene: the label that the score of calls is fitted to, and that conformal
    selection predicts."""
