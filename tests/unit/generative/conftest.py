"""A small screen with splits, effects and an embedding, as the earlier stages leave them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from dbdiffusion.config.generator import DiffusionConfig, GenerationConfig, VaeConfig
from dbdiffusion.config.qc import PanelConfig
from dbdiffusion.config.root import SIMULATED
from dbdiffusion.config.splits import SplitsConfig
from dbdiffusion.data.moments import write_moments
from dbdiffusion.data.sets import EffectSet
from dbdiffusion.data.simulate import write_screen
from dbdiffusion.data.splits import Splits, write_splits
from dbdiffusion.generative.cells import Cells
from dbdiffusion.perturbations.effects import write_effects
from dbdiffusion.runtime import contracts

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent))

VAE = VaeConfig(hidden=[32], latent=6, max_epochs=3, batch_size=64, likelihood="nb")
DIFFUSION = DiffusionConfig(widths=[32, 16], max_epochs=3, batch_size=64)
GENERATION = GenerationConfig(steps=20, guidance=0.0, cells=40, cells_kept=15)


@dataclass(frozen=True)
class Screen:
    folder: Path
    cells: Path
    splits: Path
    effects: Path
    vae: VaeConfig = VAE
    diffusion: DiffusionConfig = DIFFUSION
    generation: GenerationConfig = GENERATION

    def embedding(self, fold: str, crossfit: str) -> Path:
        return self.folder / f"embedding{fold}-{crossfit}.parquet"


def write_embedding(screen: Screen, fold: str, crossfit: str) -> None:
    """Own effects of the first genes for the training perturbations, means of two of them for the others."""
    splits, effects = Splits.read(screen.splits), EffectSet.read(screen.effects)
    kept = [p for p in splits.fit_perturbations(fold, crossfit) if p in set(effects.perturbations)]
    own = effects.subset(kept).effect[:, :5] * 10
    rows = [("control", "control", np.zeros(5)), *((p, "train", v) for p, v in zip(kept, own, strict=True))]
    for role, names in (("pseudo", splits.inner(fold, crossfit)), ("target", splits.targets(fold))):
        rows += [(name, role, own[i % len(own)] / 2) for i, name in enumerate(names)]
    random = np.random.default_rng(int(crossfit))
    parts = {"effects": rows, "features": [(name, role, random.normal(size=3)) for name, role, _ in rows]}
    parts["certainty"] = [(name, role, [0.25 if role in ("pseudo", "target") else 1.0]) for name, role, _ in rows]
    frame = pd.DataFrame(
        [
            (part, name, role, d, float(value))
            for part, some in parts.items()
            for name, role, values in some
            for d, value in enumerate(values)
        ],
        columns=["part", "perturbation", "role", "dimension", "value"],
    )
    contracts.EMBEDDING.write(frame, screen.embedding(fold, crossfit))


@pytest.fixture(scope="session")
def screen(tmp_path_factory: pytest.TempPathFactory) -> Screen:
    folder = tmp_path_factory.mktemp("screen")
    made = Screen(folder, folder / "cells.h5ad", folder / "splits.json", folder / "effects.parquet")
    config = SIMULATED.model_copy(
        update={
            "perturbations": 12,
            "doubles": 0,
            "cells_per_perturbation": 25,
            "cells_per_control_guide": 20,
            "genes": 80,
            "programmes": 3,
            "batches": 2,
        }
    )
    write_screen(config, counts=made.cells, annotations=folder / "sets.gmt", truth=folder / "truth.parquet")
    write_splits(made.cells, SplitsConfig(folds=2, crossfit_folds=2), [], 1, made.splits)
    write_moments(made.cells, made.splits, folder / "moments.h5ad")
    write_effects(
        moments=folder / "moments.h5ad",
        splits=made.splits,
        fold="0",
        config=PanelConfig(),
        effects=made.effects,
        panel=folder / "panel.json",
    )
    for crossfit in ("0", "1"):
        write_embedding(made, "0", crossfit)
    return made


def make_cells(n: int = 300, genes: int = 30, batches: int = 2, seed: int = 0) -> Cells:
    """Counts of a control and two perturbations with opposite effects on the first genes."""
    random = np.random.default_rng(seed)
    label = np.array(["control", "UP", "DOWN"], dtype=object)[np.arange(n) % 3]
    shift = np.select([label == "UP", label == "DOWN"], [1.0, -1.0], 0.0)[:, None] * (np.arange(genes) < 5)
    library = np.exp(random.normal(8.0, 0.3, n)).round()
    rate = np.exp(shift + np.linspace(0.5, 3, genes)) / 1e4 * library[:, None]
    counts = sparse.csr_matrix(random.poisson(rate * random.gamma(3, 1 / 3, (n, genes))).astype(np.float32))
    values = counts.multiply(1e4 / library[:, None]).tocsr().log1p().astype(np.float32)
    batch = random.integers(0, batches, n).astype(str)
    return Cells.make(values, counts, library, batch, label, [f"G{i}" for i in range(genes)])


@pytest.fixture(scope="session")
def toy() -> Cells:
    return make_cells()


@pytest.fixture(scope="session")
def toy_of() -> Callable[[int], Cells]:
    """The same with a given number of batches."""
    return lambda batches: make_cells(batches=batches)
