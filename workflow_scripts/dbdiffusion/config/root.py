"""The whole config, and how presets and the user's values come together."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dbdiffusion.config.base import Block
from dbdiffusion.config.benchmark import BenchmarkConfig
from dbdiffusion.config.calibration import CalibrationConfig
from dbdiffusion.config.datasets import Dataset, FeatureSource, SimulateDataset
from dbdiffusion.config.embedding import ClustersConfig, EmbeddingConfig, LocationConfig
from dbdiffusion.config.generator import DiffusionConfig, GenerationConfig, VaeConfig
from dbdiffusion.config.inference import InferenceConfig
from dbdiffusion.config.qc import PanelConfig, QcConfig
from dbdiffusion.config.run import RunConfig
from dbdiffusion.config.splits import SplitsConfig

SIMULATED = SimulateDataset.model_validate(
    {
        "kind": "simulate",
        "columns": {"guide": "guide", "batch": "batch"},
        "features": [
            {"kind": "coexpression"},
            {"kind": "gene_sets", "path": "results/simulated/raw/annotations.gmt"},
        ],
    }
)


class Config(Block):
    """The workflow's config. Values come from the user first, then from the protocol preset, then from these defaults."""

    protocol: Literal["crossfit", "reference"] = "crossfit"
    """Preset of the method's blocks in resources/protocols/: crossfit (this project's) or reference (the published design)."""
    run: RunConfig = RunConfig()
    datasets: dict[str, Dataset] = Field({"simulated": SIMULATED}, min_length=1)
    qc: QcConfig = QcConfig()
    panel: PanelConfig = PanelConfig()
    splits: SplitsConfig = SplitsConfig()
    embedding: EmbeddingConfig = EmbeddingConfig()
    clusters: ClustersConfig = ClustersConfig()
    location: LocationConfig = LocationConfig()
    vae: VaeConfig = VaeConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    generation: GenerationConfig = GenerationConfig()
    inference: InferenceConfig = InferenceConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    benchmark: BenchmarkConfig = BenchmarkConfig()


__all__ = ["Config", "FeatureSource"]
