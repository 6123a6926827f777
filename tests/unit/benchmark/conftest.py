"""A small screen through the data stages, with locations and features written by hand."""

from __future__ import annotations

from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from dbdiffusion.config.qc import PanelConfig
from dbdiffusion.config.splits import SplitsConfig
from dbdiffusion.data.moments import write_moments
from dbdiffusion.data.sets import CONTROL, EffectSet, LocationSet
from dbdiffusion.data.splits import Splits, write_splits
from dbdiffusion.perturbations.effects import write_effects
from dbdiffusion.runtime import contracts

GENES = [f"G{i:02d}" for i in range(30)]
SINGLES = GENES[:12]


def locate(splits: Splits, fold: str, perturbations: pd.Index) -> LocationSet:
    """Uniform weights over three training perturbations that are not the query."""
    roles = dict.fromkeys(perturbations, "pseudo") | dict.fromkeys(splits.targets(fold), "target")
    queries = sorted(roles)
    neighbours = perturbations.append(pd.Index([CONTROL]))
    weights = np.zeros((len(queries), len(neighbours)))
    for row, query in enumerate(queries):
        others = [i for i, name in enumerate(perturbations) if name != query]
        weights[row, [others[(row + step) % len(others)] for step in (0, 2, 5)]] = 1 / 3
    info = pd.DataFrame({"role": [roles[q] for q in queries], "k_eff": 3.0, "confidence": 1.0}, index=queries)
    info["kind"], info["parts_measured"], info["status"], info["reason"], info["locator"] = "single", 0, "located", "", "hand"
    return LocationSet(pd.Index(queries), neighbours, weights, info)


def write_cells(path, effect, seed=0, cells=60):
    """Poisson counts of the control and of singles with log effects (12, 30)."""
    random = np.random.default_rng(seed)
    labels = np.repeat([CONTROL, *SINGLES], [3 * cells, *[cells] * len(SINGLES)])
    rate = np.exp(random.normal(1, 0.7, len(GENES)))
    shift = np.vstack([np.zeros(len(GENES)), effect])[pd.Index([CONTROL, *SINGLES]).get_indexer(labels)]
    counts = random.poisson(rate * np.exp(shift)).astype(np.float32)
    obs = pd.DataFrame({"perturbation": labels, "guide": "", "batch": "0"}, index=[f"c{i}" for i in range(len(labels))])
    obs["total_counts"] = counts.sum(axis=1).astype(float) + 200.0
    anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=GENES)).write_h5ad(path)


@pytest.fixture(scope="session")
def screen(tmp_path_factory):
    """Paths of a fold with 3 targets, 9 training perturbations and 3 cross-fit folds."""
    folder = tmp_path_factory.mktemp("screen")
    at = SimpleNamespace(folder=folder, fold="0", seed=1)
    for name in (
        "cells.h5ad",
        "splits.json",
        "moments.h5ad",
        "effects.parquet",
        "panel.json",
        "locations.parquet",
        "gene_features.parquet",
    ):
        setattr(at, name.split(".")[0], folder / name)
    random = np.random.default_rng(7)
    programmes = random.normal(0, 0.5, (3, len(GENES))) * (random.random((3, len(GENES))) < 0.5)
    membership = np.eye(3)[np.arange(12) % 3]
    at.features = pd.DataFrame(membership + random.normal(0, 0.1, membership.shape), index=SINGLES)
    write_cells(at.cells, membership @ programmes + random.normal(0, 0.05, (12, len(GENES))))
    write_splits(at.cells, SplitsConfig(folds=4, crossfit_folds=3), [], 1, at.splits)
    write_moments(at.cells, at.splits, at.moments)
    write_effects(moments=at.moments, splits=at.splits, fold="0", config=PanelConfig(n_genes=25), effects=at.effects, panel=at.panel)
    located = locate(Splits.read(at.splits), "0", EffectSet.read(at.effects).perturbations)
    LocationSet.write({"all": located}, at.locations)
    long = at.features.rename_axis("gene").reset_index().melt(id_vars="gene", var_name="dimension", value_name="value")
    contracts.GENE_FEATURES.write(long.assign(fit="all", source="hand", dimension=long["dimension"].astype(int)), at.gene_features)
    return at
