from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats

from dbdiffusion.config.splits import SplitsConfig
from dbdiffusion.data.moments import Moments, write_moments
from dbdiffusion.data.permute import permutation_within, write_permuted
from dbdiffusion.data.splits import write_splits
from dbdiffusion.perturbations.effects import estimate_effects

GROUPS = 8


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 perturbations of 80 cells, 400 control cells, 60 genes, 2 batches with shifts; a perturbation changes a third of the genes."""
    random = np.random.default_rng(3)
    labels = np.array(["control"] * 400 + [f"GENE{k}" for k in range(GROUPS) for _ in range(80)], dtype=object)
    guide = np.array([f"{name}g{i % 2}" for i, name in enumerate(labels)], dtype=object)
    batch = random.choice(["0", "1"], len(labels), p=[0.3, 0.7])
    mean = np.tile(random.gamma(2, 2, 60), (len(labels), 1)) * np.where(batch == "0", 1.0, 1.3)[:, None]
    for k in range(GROUPS):
        mean[labels == f"GENE{k}"] *= np.where(random.random(60) < 1 / 3, 2.0, 1.0)
    counts = random.poisson(mean).astype(np.float32)
    obs = pd.DataFrame(
        {"perturbation": labels, "guide": guide, "batch": batch, "total_counts": counts.sum(1) + 2000.0},
        index=[f"c{i}" for i in range(len(labels))],
    )
    path = tmp_path_factory.mktemp("permute") / "cells.h5ad"
    var = pd.DataFrame(index=[f"X{j}" for j in range(60)])
    anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=var, uns={"provenance": {"source": "test"}}).write_h5ad(path)
    return path


def p_of_effects(cells: Path, folder: Path) -> np.ndarray:
    """p (perturbations, genes) of observed effects, through splits and moments as the workflow makes them."""
    write_splits(cells, SplitsConfig(folds=2, crossfit_folds=2), [], 1, folder / "splits.json")
    write_moments(cells, folder / "splits.json", folder / "moments.h5ad")
    moments = Moments.read(folder / "moments.h5ad")
    found = estimate_effects(moments, moments.perturbations)
    return 2 * stats.t.sf(np.abs(found.effect / found.se), found.n_cells[:, None] - 1)


def test_p_between_groups_is_uniform_after_permutation_and_not_before(cells: Path, tmp_path: Path):
    write_permuted(cells, 1, tmp_path / "cells.h5ad")
    before, after = p_of_effects(cells, tmp_path), p_of_effects(tmp_path / "cells.h5ad", tmp_path)
    assert stats.kstest(before.ravel(), "uniform").pvalue < 1e-10
    assert stats.kstest(after.ravel(), "uniform").pvalue > 0.01
    # Of 480 p, 5 % below 0.05 within the 99.9 % binomial band.
    low, high = stats.binom.ppf([0.0005, 0.9995], after.size, 0.05)
    assert low <= (after < 0.05).sum() <= high


def test_labels_move_together_within_batch_and_cells_stay(cells: Path, tmp_path: Path):
    write_permuted(cells, 1, tmp_path / "cells.h5ad")
    before, after = anndata.read_h5ad(cells), anndata.read_h5ad(tmp_path / "cells.h5ad")
    assert (before.X != after.X).nnz == 0
    for column in ("batch", "total_counts"):
        assert (before.obs[column].astype(str) == after.obs[column].astype(str)).all()
    columns = ["batch", "perturbation", "guide"]
    # Pairs of perturbation and guide keep their numbers in every batch; control cells take part.
    pd.testing.assert_series_equal(
        before.obs[columns].astype(str).value_counts().sort_index(), after.obs[columns].astype(str).value_counts().sort_index()
    )
    control = (before.obs["perturbation"] == "control").to_numpy()
    assert 0.2 < (after.obs["perturbation"].astype(str)[control] == "control").mean() < 0.6
    assert "permuted" in after.uns["provenance"]["labels"]


def test_permutation_follows_seed_and_batch_alone():
    batch = np.array(["a", "b", "a", "b", "a", "a"])
    order = permutation_within(batch, 1)
    assert sorted(order) == list(range(6))
    assert (batch[order] == batch).all()
    assert (permutation_within(batch, 1) == order).all()
    big = np.repeat(["a", "b"], 50)
    assert (permutation_within(big, 1) != permutation_within(big, 2)).any()
    # A batch is permuted alike whatever other batches there are.
    assert (permutation_within(big, 1)[:50] == permutation_within(big[:50], 1)).all()


def test_same_seed_same_bytes(cells: Path, tmp_path: Path):
    for name in ("a", "b"):
        write_permuted(cells, 5, tmp_path / f"{name}.h5ad")
    assert (tmp_path / "a.h5ad").read_bytes() == (tmp_path / "b.h5ad").read_bytes()


def test_without_batches_and_guides(tmp_path: Path):
    obs = pd.DataFrame({"perturbation": ["A", "control"] * 20, "guide": "", "batch": "", "total_counts": 9.0}, index=map(str, range(40)))
    anndata.AnnData(sparse.csr_matrix(np.ones((40, 2), np.float32)), obs=obs).write_h5ad(tmp_path / "cells.h5ad")
    write_permuted(tmp_path / "cells.h5ad", 1, tmp_path / "out.h5ad")
    made = anndata.read_h5ad(tmp_path / "out.h5ad").obs
    assert (made["perturbation"].astype(str) == "A").sum() == 20
    assert (made["guide"].astype(str) == "").all()
