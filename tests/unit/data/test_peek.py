"""Impossible configs are refused from the file's cell table alone."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from dbdiffusion.config.datasets import Columns, FileDataset
from dbdiffusion.config.splits import SplitsConfig
from dbdiffusion.data.peek import check_h5ad
from dbdiffusion.runtime.errors import UserError


@pytest.fixture
def path(tmp_path):
    obs = pd.DataFrame({"gene_target": pd.Categorical(["A", "B", "NT", "nt"]), "lane": ["1", "1", "2", "2"]}, index=list("wxyz"))
    file = tmp_path / "screen.h5ad"
    ad.AnnData(np.ones((4, 3), dtype=np.float32), obs=obs).write_h5ad(file)
    return str(file)


def dataset(path, **columns):
    return FileDataset(kind="h5ad", path=path, columns=Columns(**columns))


def test_a_fitting_config_passes(path):
    check_h5ad("mine", dataset(path, perturbation="gene_target", batch="lane"), SplitsConfig(folds=2))


@pytest.mark.parametrize("columns", [{"perturbation": "gene_targt"}, {"perturbation": "gene_target", "batch": "lanes"}])
def test_a_missing_column_names_the_nearest(path, columns):
    with pytest.raises(UserError) as error:
        check_h5ad("mine", dataset(path, **columns), SplitsConfig(folds=2))
    assert "datasets.mine.columns" in str(error.value)
    assert "did you mean" in str(error.value)


def test_more_folds_than_perturbations(path):
    with pytest.raises(UserError, match="3 folds, but .* has 2 perturbation"):
        check_h5ad("mine", dataset(path, perturbation="gene_target"), SplitsConfig(folds=3))


def test_truncated_file(path):
    with open(path, "r+b") as handle:
        handle.truncate(200)
    with pytest.raises(UserError, match="truncated"):
        check_h5ad("mine", dataset(path, perturbation="gene_target"), SplitsConfig(folds=2))
