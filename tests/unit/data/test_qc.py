"""Quality control on a table small enough to count by hand, and on real counts."""

from __future__ import annotations

import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.stats import mannwhitneyu

from dbdiffusion.config.qc import QcConfig
from dbdiffusion.data.qc import ON_TARGET, cell_metrics, write_qc
from dbdiffusion.runtime.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:Variable names are not unique")

PAPALEXI = Path(__file__).resolve().parents[4] / "shared" / "data" / "papalexi2021-thp1-303g.h5ad"
GENES = [f"G{number}" for number in range(12)] + ["MT-CO1", "G3"]
CONFIG = QcConfig(min_genes_per_cell=3, min_counts_per_cell=50, min_cells_per_perturbation=5, max_mito_share=0.2)


def make_table(**extra: int) -> anndata.AnnData:
    """20 controls, 10 cells each of G0, G1, G0+G1 and 4 of G2; library 100, every gene but G11 with counts, G3 twice."""
    numbers = {"control": 20, "G0": 10, "G1": 10, "G0+G1": 10, "G2": 4, **extra}
    labels = np.repeat(list(numbers), list(numbers.values()))
    counts = np.random.default_rng(0).poisson(3, (len(labels), len(GENES))) + 1
    counts[:, GENES.index("G11")] = 0
    obs = pd.DataFrame(
        {"perturbation": labels, "guide": [f"{label}g{at % 2}" for at, label in enumerate(labels)], "batch": "0", "total_counts": 100.0},
        index=[f"c{at}" for at in range(len(labels))],
    )
    table = anndata.AnnData(sparse.csr_matrix(counts.astype(np.float32)), obs=obs, var=pd.DataFrame(index=GENES))
    table.uns["provenance"] = {"source": "made up"}
    return table


def run(table: anndata.AnnData, folder: Path, config: QcConfig = CONFIG) -> tuple[anndata.AnnData, dict, pd.DataFrame]:
    table.write_h5ad(folder / "counts.h5ad")
    write_qc(
        counts=folder / "counts.h5ad",
        config=config,
        cells=folder / "cells.h5ad",
        summary=folder / "summary.json",
        on_target=folder / "on_target.parquet",
    )
    summary = json.loads((folder / "summary.json").read_text())
    return anndata.read_h5ad(folder / "cells.h5ad"), summary, ON_TARGET.read(folder / "on_target.parquet")


def test_counts_of_what_is_dropped(tmp_path: Path) -> None:
    table = make_table()
    counts = table.X.toarray()
    counts[0, 3:] = 0  # a control with 3 genes stays, one with 2 goes
    counts[1, 2:] = 0
    counts[2, GENES.index("MT-CO1")] = 21
    counts[3, GENES.index("MT-CO1")] = 20
    counts[20, GENES.index("MT-CO1")] = 90
    table.X = sparse.csr_matrix(counts)
    total = table.obs["total_counts"].to_numpy().copy()
    total[[4, 21]] = 49.0
    total[5] = 0.0
    table.obs["total_counts"] = total
    cells, summary, _ = run(table, tmp_path)
    assert summary["cells"] == {
        "input": 54,
        "kept": 44,
        "dropped": {"few_genes": 1, "mito_share": 2, "few_counts": 2, "no_counts": 1, "few_cells_of_perturbation": 4},
    }
    gone = {"c1", "c2", "c20", "c4", "c21", "c5", "c50", "c51", "c52", "c53"}
    assert list(cells.obs_names) == [name for name in table.obs_names if name not in gone]
    assert summary["perturbations"]["kept"] == ["G0", "G0+G1", "G1"]
    assert (summary["perturbations"]["singles"], summary["perturbations"]["combinations"], summary["perturbations"]["input"]) == (2, 1, 4)
    assert summary["perturbations"]["dropped"]["G2"]["cells_passed"] == summary["perturbations"]["dropped"]["G2"]["cells_input"] == 4
    assert "fewer than 5" in summary["perturbations"]["dropped"]["G2"]["reason"]
    assert summary["genes"] == {"input": 14, "kept": 12, "dropped_mito": 1, "dropped_duplicate": 1}
    assert list(cells.var_names) == GENES[:12]  # genes without a count stay: a filter would look at held-out cells
    assert summary["control"]["input"] == 20
    assert summary["control"]["kept"] == 16
    assert sum(summary["control"]["guides"].values()) == 16
    assert summary["cells_per_perturbation"] == {"min": 8.0, "q25": 9.0, "median": 10.0, "q75": 10.0, "max": 10.0}
    assert summary["before"]["median_total_counts"] == 100.0
    assert summary["thresholds"]["max_mito_share"] == 0.2


def test_layout(tmp_path: Path) -> None:
    table = make_table()
    cells, _, _ = run(table, tmp_path)
    assert sparse.isspmatrix_csr(cells.X)
    assert cells.X.dtype == np.float32
    assert list(cells.obs) == ["perturbation", "guide", "batch", "total_counts"]
    assert (cells.obs["total_counts"] == 100.0).all()
    kept = table.obs_names.get_indexer(cells.obs_names)
    np.testing.assert_array_equal(cells.X.toarray(), table.X.toarray()[kept][:, :12])
    provenance = cells.uns["provenance"]
    assert provenance["source"] == "made up"
    assert json.loads(provenance["qc"])["min_cells_per_perturbation"] == 5
    before = (tmp_path / "cells.h5ad").read_bytes(), (tmp_path / "summary.json").read_bytes(), (tmp_path / "on_target.parquet").read_bytes()
    run(table, tmp_path)
    after = (tmp_path / "cells.h5ad").read_bytes(), (tmp_path / "summary.json").read_bytes(), (tmp_path / "on_target.parquet").read_bytes()
    assert before == after


def test_mito_by_column_or_symbol_and_share_of_the_whole_library(tmp_path: Path) -> None:
    table = make_table()
    counts = table.X.toarray()
    np.testing.assert_allclose(cell_metrics(table)["mito_share"], counts[:, 12] / 100)
    np.testing.assert_array_equal(cell_metrics(table)["genes"], (counts > 0).sum(axis=1))
    table.var["mito"] = [name == "G5" for name in GENES]
    np.testing.assert_allclose(cell_metrics(table)["mito_share"], counts[:, 5] / 100)
    cells, _, _ = run(table, tmp_path)
    assert "G5" not in cells.var_names
    assert "MT-CO1" in cells.var_names
    cells, _, _ = run(table, tmp_path, CONFIG.model_copy(update={"drop_mito_genes": False}))
    assert "G5" in cells.var_names


def test_subset_of_large_perturbations(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"max_cells_per_perturbation": 10})
    cells, summary, _ = run(make_table(G0=40, control=130), tmp_path, config)
    numbers = cells.obs["perturbation"].value_counts()
    assert numbers["G0"] == 10
    assert numbers["G1"] == 10
    assert numbers["control"] == 100
    assert summary["cells"]["dropped"]["subset"] == 60
    # One perturbation's subset does not depend on another's size.
    other, _, _ = run(make_table(G0=40, control=130, G1=30), tmp_path, config)

    def own(found: anndata.AnnData) -> list[str]:
        return list(found.obs_names[(found.obs["perturbation"] == "G0").to_numpy()])

    assert own(cells) == own(other)


def test_on_target(tmp_path: Path) -> None:
    table = make_table()
    cells, _, found = run(table, tmp_path)
    rows = found.astype({"perturbation": str, "gene": str}).set_index(["perturbation", "gene"])
    assert list(rows.index) == [("G0", "G0"), ("G0+G1", "G0"), ("G0+G1", "G1"), ("G1", "G1")]
    labels = cells.obs["perturbation"].astype(str).to_numpy()
    for (name, gene), row in rows.iterrows():
        values = cells[:, gene].X.toarray().ravel() * 100
        own, control = values[labels == name], values[labels == "control"]
        assert row["n_cells"] == len(own)
        np.testing.assert_allclose([row["mean"], row["control_mean"]], [own.mean(), control.mean()], rtol=1e-6)
        np.testing.assert_allclose(row["log2_fold_change"], np.log2(own.mean() / control.mean()), rtol=1e-6)
        np.testing.assert_allclose(row["share_of_control"], own.mean() / control.mean(), rtol=1e-6)
        np.testing.assert_allclose(row["p"], mannwhitneyu(own, control, method="asymptotic").pvalue)


def test_on_target_of_a_silent_or_unmeasured_gene(tmp_path: Path) -> None:
    _, _, found = run(make_table(G11=8, XYZ=8), tmp_path)
    rows = found.astype({"gene": str}).set_index("gene")
    assert "XYZ" not in rows.index
    silent = rows.loc["G11"]
    assert silent["mean"] == silent["control_mean"] == 0
    assert silent["p"] == 1.0
    assert np.isnan(silent["log2_fold_change"])
    assert np.isnan(silent["share_of_control"])


@pytest.mark.parametrize(
    ("numbers", "changes", "message"),
    [
        ({"control": 0}, {}, "0 of 0 control cells.*\n.*labels.control"),
        ({"control": 4}, {}, "4 of 4 control cells"),
        ({}, {"min_counts_per_cell": 101}, "0 of 20 control cells pass the filters.*few_counts.*20"),
        ({"G0": 3, "G1": 3}, {}, r"1 perturbation\(s\) left.*\('G2', 4\).*\n.*now 5"),
    ],
)
def test_too_little_left(tmp_path: Path, numbers: dict[str, int], changes: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(make_table(**numbers), tmp_path, CONFIG.model_copy(update=changes))
    assert not (tmp_path / "cells.h5ad").exists()
    assert not (tmp_path / "summary.json").exists()


def test_not_counts(tmp_path: Path) -> None:
    table = make_table()
    table.X = table.X * 0.5
    with pytest.raises(UserError, match="no raw counts"):
        run(table, tmp_path)
    table = make_table()
    del table.obs["guide"]
    with pytest.raises(UserError, match="guide"):
        run(table, tmp_path)


def test_real_counts(tmp_path: Path) -> None:
    """CRISPR knock-outs lower their own gene's counts; shares are of the whole library, or every cell would fail."""
    if not PAPALEXI.exists():
        pytest.skip("real counts are not here")
    table = anndata.read_h5ad(PAPALEXI)
    table.obs = table.obs[["perturbation", "guide", "batch"]].assign(total_counts=table.obs["total_counts_full"].to_numpy())
    cells, summary, found = run(table, tmp_path, QcConfig())
    assert summary["cells"]["kept"] == cells.n_obs > 19_000
    assert len(summary["perturbations"]["kept"]) == 25
    assert summary["genes"]["dropped_mito"] == int(table.var["mito"].sum())
    assert len(summary["control"]["guides"]) == 9
    assert len(found) == 9
    assert (found["log2_fold_change"] < 0).all()
    assert (found["p"] < 1e-6).all()
