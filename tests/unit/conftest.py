"""Small data shared by the rooms' tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from dbdiffusion.config.datasets import SimulateDataset
from dbdiffusion.config.qc import QcConfig
from dbdiffusion.config.splits import SplitsConfig
from dbdiffusion.data.moments import write_moments
from dbdiffusion.data.qc import write_qc
from dbdiffusion.data.simulate import write_screen
from dbdiffusion.data.splits import write_splits

TINY = SimulateDataset(
    perturbations=14,
    doubles=3,
    cells_per_perturbation=36,
    control_guides=8,
    cells_per_control_guide=15,
    genes=120,
    programmes=3,
    batches=2,
    null_share=0.15,
    escaper_share=0.1,
)
TINY_SPLITS = SplitsConfig(folds=3, crossfit_folds=2)


@pytest.fixture(scope="session")
def tiny_screen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data stage of a tiny simulated screen: counts.h5ad, annotations.gmt, truth.parquet, cells.h5ad, summary.json,
    on_target.parquet, splits.json (3 outer folds and fold `all` for target GENE9999, 2 cross-fit folds) and moments.h5ad. Read only."""
    folder = tmp_path_factory.mktemp("tiny_screen")
    write_screen(TINY, counts=folder / "counts.h5ad", annotations=folder / "annotations.gmt", truth=folder / "truth.parquet")
    write_qc(
        counts=folder / "counts.h5ad",
        config=QcConfig(min_cells_per_perturbation=10),
        cells=folder / "cells.h5ad",
        summary=folder / "summary.json",
        on_target=folder / "on_target.parquet",
    )
    write_splits(folder / "cells.h5ad", TINY_SPLITS, ["GENE9999"], 1, folder / "splits.json")
    write_moments(folder / "cells.h5ad", folder / "splits.json", folder / "moments.h5ad")
    return folder
