"""Cells that are right score like the replicate, collapsed ones like the control, in both roles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from dbdiffusion.benchmark import cell_quality
from dbdiffusion.benchmark.scores import Pool
from dbdiffusion.config.benchmark import BenchmarkConfig
from dbdiffusion.config.splits import SplitsConfig
from dbdiffusion.data.moments import write_moments
from dbdiffusion.data.sets import EffectSet, MeanSet
from dbdiffusion.data.splits import Splits, write_splits
from dbdiffusion.generative.cell_file import write_cells
from dbdiffusion.perturbations.effects import estimate_effects
from dbdiffusion.runtime import contracts

GENES, NAMES = 60, [f"P{i}" for i in range(9)]


def sample(random: np.random.Generator, name: str, cells: int) -> np.ndarray:
    """Counts of a perturbation with effects of its own on ten genes."""
    shift = np.zeros(GENES)
    if name in NAMES:
        at = np.random.default_rng(NAMES.index(name)).permutation(GENES)[:10]
        shift[at] = np.where(at % 2, 1.0, -1.0)
    return random.poisson(np.exp(shift + np.linspace(-1, 3, GENES)), (cells, GENES))


def logged(counts: np.ndarray) -> np.ndarray:
    return np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, random = tmp_path_factory.mktemp("quality"), np.random.default_rng(0)
    label = np.repeat(["control", *NAMES], [200] + [80] * len(NAMES))
    counts = np.vstack([sample(random, name, int((label == name).sum())) for name in ("control", *NAMES)])
    obs = pd.DataFrame({"perturbation": label, "guide": label, "batch": "b", "total_counts": counts.sum(axis=1).astype(float)})
    obs.index = [f"c{i}" for i in range(len(obs))]
    table = ad.AnnData(sparse.csr_matrix(counts.astype(np.float32)), obs=obs, var=pd.DataFrame(index=[f"G{i}" for i in range(GENES)]))
    table.write_h5ad(folder / "cells.h5ad")
    write_splits(folder / "cells.h5ad", SplitsConfig(folds=3, crossfit_folds=2), [], 1, folder / "splits.json")
    write_moments(folder / "cells.h5ad", folder / "splits.json", folder / "moments.h5ad")
    return {name: folder / f"{name}" for name in ("cells.h5ad", "splits.json", "moments.h5ad")} | {"folder": folder}


def generated(folder: Path, tag: str, roles: dict[str, str], good: bool) -> tuple[Path, Path]:
    """Cells of perturbations as they are (good) or all like the control."""
    random = np.random.default_rng(1)
    names, genes = sorted([*roles, "control"]), pd.Index([f"G{i}" for i in range(GENES)])
    blocks = [logged(sample(random, name if good else "control", 150)) for name in names]
    role = np.array([roles.get(name, "control") for name in names], dtype=object)
    paths = folder / f"{tag}.h5ad", folder / f"{tag}.parquet"
    write_cells(blocks, pd.Index(names), role, [tag] * len(names), genes, paths[0])
    means = np.array([block.mean(axis=0) for block in blocks])
    MeanSet(pd.Index(names), role, genes, means, np.zeros_like(means)).write(paths[1])
    return paths


@pytest.mark.parametrize("good", [True, False])
def test_good_cells_are_like_the_replicate_and_collapsed_ones_like_the_control(files: dict[str, Path], tmp_path: Path, good: bool) -> None:
    from dbdiffusion.data.moments import Moments

    split, moments = Splits.read(files["splits.json"]), Moments.read(files["moments.h5ad"])
    genes = pd.Index([f"G{i}" for i in range(GENES)])
    effects: EffectSet = estimate_effects(moments, split.training("0"), genes)
    effects.write(tmp_path / "effects.parquet")
    merged = generated(tmp_path, "merged", dict.fromkeys(split.targets("0"), "target"), good)
    first, *others = split.fit_perturbations("0", "0")
    models = [
        generated(tmp_path, "0", dict.fromkeys([first, *others[:1]], "train"), good),
        generated(tmp_path, "1", dict.fromkeys([first, *split.inner("0", "0")[:2]], "train"), good),
    ]
    cell_quality.write_cell_quality(
        cells=files["cells.h5ad"],
        splits=files["splits.json"],
        moments=files["moments.h5ad"],
        effects=tmp_path / "effects.parquet",
        generated=merged[0],
        means=merged[1],
        seen_generated=[model[0] for model in models],
        seen_means=[model[1] for model in models],
        fold="0",
        seed=1,
        config=BenchmarkConfig(distribution_components=5),
        out=tmp_path / "quality.parquet",
    )
    table = contracts.CELL_QUALITY.read(tmp_path / "quality.parquet").astype({"role": str, "sample": str, "metric": str})
    assert table[table["role"] == "unseen"]["perturbation"].nunique() == len(split.targets("0"))
    assert table[table["role"] == "seen"]["perturbation"].nunique() == 2 + len(set(split.inner("0", "0")[:2]) - {first, *others[:1]})
    means = table.groupby(["metric", "role", "sample"])["value"].mean().unstack("sample")
    like, unlike = ("replicate", "control") if good else ("control", "replicate")
    for role in ("seen", "unseen"):
        for metric in ("energy_distance", "mmd", "effect_slope"):
            row = means.loc[(metric, role)]
            assert abs(row["generated"] - row[like]) < 0.6 * abs(row["generated"] - row[unlike]), (metric, role, row.to_dict())
        assert means.loc[("effect_slope", role), "generated"] == pytest.approx(float(good), abs=0.15)
        assert means.loc[("spread", role), "generated"] == pytest.approx(float(good), abs=0.35)


def test_equally_many_cells_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    monkeypatch.setattr(
        cell_quality.distribution, "compare", lambda x, y, **_: sizes.append((len(x), len(y))) or {"below": 0.0, "noisy": 0.0}
    )
    held = Pool(sparse.csr_matrix(np.ones((30, 3))), np.array(["P"] * 30), np.repeat(["A", "B"], [18, 12]))
    many = Pool(sparse.csr_matrix(np.ones((50, 3))), np.array(["P"] * 50), np.array([""] * 50))
    made = cell_quality.Made("seen", ["P"], many, np.zeros((1, 3)))
    cell_quality.compared(made, held, replace(many, half=np.array(["B"] * 50)), None, 1.0, 0)
    assert sizes == [(12, 12)] * 3
    # Fewer generated cells were kept than there are measured ones.
    sizes.clear()
    few = replace(made, cells=Pool(sparse.csr_matrix(np.ones((7, 3))), np.array(["P"] * 5 + ["Q"] * 2), np.array([""] * 7)))
    cell_quality.compared(few, held, replace(many, half=np.array(["B"] * 50)), None, 1.0, 0)
    assert sizes == [(5, 5)] * 3
