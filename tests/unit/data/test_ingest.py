"""Every format a screen may come in, and every reason to refuse one."""

import gzip
import json
import warnings

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp

from dbdiffusion.config.datasets import CatalogueDataset, FileDataset
from dbdiffusion.data import readers
from dbdiffusion.data.catalogue import TABLE
from dbdiffusion.data.ingest import ingest, write_ingested
from dbdiffusion.runtime.errors import UserError

REPO = TABLE.parents[1]
SHARED = REPO.parent / "shared" / "data"
GENES = ["STAT1", "STAT2", "JAK2", "HLA-A", "MT-CO1", "ACTB"]
LABELS = ["control", "STAT1", "ctrl+STAT2", "STAT2+STAT1", "NT", "doublet", None, "JAK2"]


def counts():
    values = np.random.default_rng(3).poisson(1.5, (len(LABELS), len(GENES))).astype(np.float32)
    values[:, 0] += 1
    return values


def screen(x=None, **obs):
    x = sp.csr_matrix(counts()) if x is None else x
    table = pd.DataFrame({"perturbation": LABELS, "guide": [f"g{i}" for i in range(8)], "batch": list("aabbaabb"), **obs})
    table.index = [f"cell{i}" for i in range(8)]
    return ad.AnnData(X=x, obs=table, var=pd.DataFrame(index=GENES))


def read(path, kind="h5ad", **config):
    config = {"labels": {"drop": ["doublet"]}} | config
    return ingest(FileDataset(kind=kind, path=str(path), **config), source=path)


def write(tmp_path, data, name="screen.h5ad"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data.write_h5ad(tmp_path / name)
    return tmp_path / name


def report(data):
    return json.loads(data.uns["ingest"])


def fails(path, kind="h5ad", **config):
    with pytest.raises(UserError) as error:
        read(path, kind, **config)
    assert str(path) in str(error.value) or "." in error.value.where
    return str(error.value)


# --- modality ----------------------------------------------------------------------------------------------------------

MODALITY = ["", "CRISPRi", "CRISPRi", "CRISPRi", "CRISPRa", "", "CRISPRa", "CRISPRa"]


def test_cells_of_one_modality_and_the_controls_of_all(tmp_path):
    path = write(tmp_path, screen(modality=MODALITY))
    columns = {"modality": "modality"}
    low, high = (read(path, columns=columns, modality=m) for m in ("CRISPRi", "CRISPRa"))
    # Control cell0 has no modality and belongs to both; control cell4 was infected for CRISPRa alone.
    assert list(low.obs["perturbation"]) == ["control", "STAT1", "STAT2", "STAT1+STAT2"]
    assert list(high.obs["perturbation"]) == ["control", "control", "JAK2"]
    assert report(low)["modality"] == "CRISPRi"
    assert report(low)["cells_by_modality"] == {"none": 1, "CRISPRi": 3, "CRISPRa": 2}
    assert "modality" not in report(read(path))


def test_opposite_modalities_are_not_averaged(tmp_path):
    path = write(tmp_path, screen(modality=MODALITY))
    columns = {"modality": "modality"}
    assert "several modalities (CRISPRa, CRISPRi)" in fails(path, columns=columns)
    assert "did you mean" in fails(path, columns=columns, modality="CRISPRj")
    assert "no column" in fails(path, modality="CRISPRi")
    assert "have no modality" in fails(write(tmp_path, screen(modality=["a", *[""] * 7]), "gaps.h5ad"), columns=columns)
    one = read(write(tmp_path, screen(modality="knockout"), "one.h5ad"), columns=columns)
    assert report(one)["modality"] == "knockout"


# --- layout ------------------------------------------------------------------------------------------------------------


def test_layout(tmp_path):
    data = read(write(tmp_path, screen()), columns={"guide": "guide", "batch": "batch"})
    assert list(data.obs_names) == ["cell0", "cell1", "cell2", "cell3", "cell4", "cell7"]
    assert list(data.obs["perturbation"]) == ["control", "STAT1", "STAT2", "STAT1+STAT2", "control", "JAK2"]
    assert list(data.obs.columns) == ["perturbation", "guide", "batch", "total_counts"]
    assert list(data.var_names) == GENES
    assert isinstance(data.X, sp.csr_matrix)
    assert data.X.dtype == np.float32
    assert data.X.has_sorted_indices
    kept = [0, 1, 2, 3, 4, 7]
    assert np.array_equal(data.X.toarray(), counts()[kept])
    assert data.obs["total_counts"].dtype == np.float64
    assert np.array_equal(data.obs["total_counts"], counts()[kept].sum(axis=1))
    assert list(data.obs["batch"]) == list("aabbab")
    assert list(data.obs["guide"]) == ["g0", "g1", "g2", "g3", "g4", "g7"]
    got = report(data)
    assert (got["cells_read"], got["cells"], got["genes"]) == (8, 6, 6)
    assert got["labels"]["dropped_labels"] == {"dropped_label": {"doublet": 1}, "unassigned": {"nan": 1}}
    assert got["perturbed_genes"] == {"all": 3, "measured": 3}
    assert all(isinstance(value, str) for value in data.uns["provenance"].values())


def test_defaults_without_guide_and_batch(tmp_path):
    data = read(write(tmp_path, screen()))
    assert set(data.obs["guide"]) == {""}
    assert set(data.obs["batch"]) == {"0"}


def test_same_input_same_bytes(tmp_path):
    source = write(tmp_path, screen())
    config = FileDataset(kind="h5ad", path=str(source), labels={"drop": ["doublet"]})
    for name in ("a.h5ad", "b.h5ad"):
        write_ingested(config, source=source, out=tmp_path / "deep" / name)
    assert (tmp_path / "deep/a.h5ad").read_bytes() == (tmp_path / "deep/b.h5ad").read_bytes()
    again = ad.read_h5ad(tmp_path / "deep/a.h5ad")
    assert np.array_equal(again.X.toarray(), read(source).X.toarray())
    assert again.uns["ingest"] == read(source).uns["ingest"]
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["a.h5ad", "b.h5ad"]


@pytest.mark.parametrize(
    "form", [sp.csr_matrix, sp.csc_matrix, np.asarray, lambda x: x.astype(np.int64), lambda x: sp.csr_matrix(x.astype(np.int32))]
)
def test_storage_forms_give_the_same(tmp_path, form, monkeypatch):
    monkeypatch.setattr(readers, "BLOCK", 3 * len(GENES) * 4)
    data = read(write(tmp_path, screen(form(counts()))))
    assert np.array_equal(data.X.toarray(), counts()[[0, 1, 2, 3, 4, 7]])


def test_layer_and_raw(tmp_path):
    data = screen(sp.csr_matrix(np.log1p(counts())))
    data.layers["counts"] = sp.csr_matrix(counts())
    data.layers["scaled"] = counts() - 1.5
    data.raw = ad.AnnData(X=sp.csr_matrix(np.hstack([counts(), counts()[:, :1]])), var=pd.DataFrame(index=[*GENES, "EXTRA"]), obs=data.obs)
    path = write(tmp_path, data)
    assert np.array_equal(read(path, layer="counts").X.toarray(), counts()[[0, 1, 2, 3, 4, 7]])
    assert list(read(path, layer="raw").var_names) == [*GENES, "EXTRA"]
    message = fails(path)
    assert "not whole numbers, e.g. 0.69" in message
    assert "'counts', 'raw'" in message
    assert "set layer: counts" in message
    assert "negative" in fails(path, layer="scaled")
    assert "did you mean 'counts'" in fails(path, layer="count")


def test_nearly_whole_numbers_are_made_exact(tmp_path):
    data = read(write(tmp_path, screen(sp.csr_matrix(counts().astype(np.float64) + 1e-5 * (counts() > 0)))))
    assert np.array_equal(data.X.toarray(), counts()[[0, 1, 2, 3, 4, 7]])


# --- refused counts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [(0.5, "not whole numbers, e.g. 0.5"), (-1, "negative values, e.g. -1"), (np.nan, "NaN"), (np.inf, "NaN or infinite"), (1e8, "beyond")],
)
def test_values_that_are_no_counts(tmp_path, value, message):
    x = counts()
    x[2, 1] = value
    assert message in fails(write(tmp_path, screen(sp.csr_matrix(x))))


def test_empty_matrices(tmp_path):
    assert "all counts are zero" in fails(write(tmp_path, screen(sp.csr_matrix((8, 6)))))
    assert "empty matrix" in fails(write(tmp_path, screen()[:, []].copy(), "none.h5ad"))


def test_cells_without_counts_are_dropped(tmp_path):
    x = counts()
    x[1] = 0
    data = read(write(tmp_path, screen(sp.csr_matrix(x))))
    assert "cell1" not in data.obs_names
    assert report(data)["cells_without_counts"] == 1


def test_duplicated_cells(tmp_path):
    data = screen()
    data.obs_names = ["same", "same", *data.obs_names[2:]]
    assert "'same'" in fails(write(tmp_path, data))


# --- columns --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["perturbation", "guide", "batch", "library_size"])
def test_missing_columns_name_the_nearest(tmp_path, key):
    wrong = {"perturbation": "perturbatoin", "guide": "guides", "batch": "bach", "library_size": "total_count"}
    message = fails(write(tmp_path, screen(total_counts=100.0)), columns={key: wrong[key]})
    assert f"columns.{key}" in message
    assert f"did you mean {('total_counts' if key == 'library_size' else key)!r}" in message


def test_library_size(tmp_path):
    path = write(tmp_path, screen(full=counts().sum(axis=1) + 10.0, few=3.0, gap=[np.nan] + [1e4] * 7, text=["x"] * 8))
    data = read(path, columns={"library_size": "full"})
    assert np.array_equal(data.obs["total_counts"], counts()[[0, 1, 2, 3, 4, 7]].sum(axis=1) + 10)
    assert "smaller than the cell's counts" in fails(path, columns={"library_size": "few"})
    assert "1 of 8 library sizes are missing" in fails(path, columns={"library_size": "gap"})
    assert "8 of 8 library sizes are missing or not numbers" in fails(path, columns={"library_size": "text"})


def test_batches_and_guides_as_text(tmp_path):
    path = write(tmp_path, screen(lane=[1.0, 2.0] * 4, gap=["x"] * 7 + [None], g=["NA", "a"] * 4))
    assert set(read(path, columns={"batch": "lane"}).obs["batch"]) == {"1", "2"}
    assert set(read(path, columns={"guide": "g"}).obs["guide"]) == {"", "a"}
    assert "1 cells have no batch" in fails(path, columns={"batch": "gap"})


def test_no_control_in_the_column(tmp_path):
    path = write(tmp_path, screen(perturbation=["STAT1", "STAT2"] * 4))
    assert "no cell has a control label" in fails(path, labels={"control": ["unperturbed"]})


def test_nperts_is_compared_with_the_label(tmp_path):
    path = write(tmp_path, screen(nperts=[0, 1, 1, 2, 0, 1, 0, 2]))
    assert report(read(path))["cells_nperts_disagrees"] == 1


# --- genes ----------------------------------------------------------------------------------------------------------------------


def test_ensembl_ids_give_way_to_symbols(tmp_path):
    data = screen()
    data.var_names = [f"ENSG{i:011d}" for i in range(6)]
    assert "Ensembl ids" in fails(write(tmp_path, data, "without.h5ad"))
    data.var["gene_symbols"] = [*GENES[:5], ""]
    got = read(write(tmp_path, data))
    assert list(got.var_names) == [*GENES[:5], "ENSG00000000005"]
    assert got.var["gene_id"].iloc[0] == "ENSG00000000000"
    assert report(got)["gene_symbols_from"] == "gene_symbols"


def test_gene_names_that_are_numbers(tmp_path):
    data = screen()
    data.var_names = [str(i) for i in range(6)]
    assert "gene names are numbers" in fails(write(tmp_path, data))


def test_duplicated_symbols_keep_the_name_where_the_counts_are(tmp_path):
    x = counts()
    x[:, 1], x[:, 2] = 0, 9
    data = screen(sp.csr_matrix(x))
    data.var_names = ["A", "B", "B", "C", "B-1", "D"]
    got = read(write(tmp_path, data))
    assert list(got.var_names) == ["A", "B-2", "B", "C", "B-1", "D"]
    assert report(got)["duplicate_gene_symbols"] == ["B"]


def test_mito_flag_is_kept(tmp_path):
    data = screen()
    data.var["mito"] = [name.startswith("MT-") for name in GENES]
    assert list(read(write(tmp_path, data)).var["mito"]) == [False] * 4 + [True, False]
    assert "mito" not in read(write(tmp_path, screen(), "b.h5ad")).var


def test_gene_with_the_separator_in_its_name(tmp_path):
    data = screen(perturbation=["control", "HLA-A", "HLA-A-STAT1", "STAT1", "NT", "JAK2-NT", "x", "y"])
    got = read(write(tmp_path, data), labels={"combination_separator": "-", "drop": ["x", "y"]})
    assert list(got.obs["perturbation"]) == ["control", "HLA-A", "HLA-A+STAT1", "STAT1", "control", "JAK2"]


# --- damaged files ----------------------------------------------------------------------------------------------------------------


def test_missing_truncated_and_foreign_files(tmp_path):
    assert "not found" in fails(tmp_path / "none.h5ad")
    whole = write(tmp_path, screen()).read_bytes()
    cut = tmp_path / "cut.h5ad"
    for size in (100, len(whole) // 2, len(whole) - 100):
        cut.write_bytes(whole[:size])
        assert "cannot be read" in fails(cut)
    cut.write_text("<html>")
    assert "cannot be read" in fails(cut)
    with h5py.File(tmp_path / "other.h5ad", "w") as handle:
        handle["x"] = [1]
    assert "no table 'obs'; found ['x']" in fails(tmp_path / "other.h5ad")


def test_damage_inside_the_matrix(tmp_path):
    path = write(tmp_path, screen())
    with h5py.File(path, "a") as handle:
        del handle["X/indptr"]
    assert "cannot be read" in fails(path)


def test_10x_keys_on_an_h5ad(tmp_path):
    assert "belong to 10x data" in fails(write(tmp_path, screen()), cell_table="x.tsv")


# --- 10x ------------------------------------------------------------------------------------------------------------------------

GUIDES = ["gS1", "gS2", "gN"]
GUIDE_UMI = np.array([[0, 0, 9], [9, 0, 0], [0, 9, 1], [9, 9, 0], [0, 1, 8], [0, 0, 0], [1, 1, 1], [9, 0, 8]], dtype=np.float32)
GUIDE_TABLE = "guide,perturbation\ngS1,STAT1\ngS2,STAT2\ngN,non-targeting\n"


def folder(tmp_path, guides=False, packed=True, features="features.tsv"):
    """A 10x folder of the same counts."""
    path = tmp_path / "mtx"
    path.mkdir(exist_ok=True)
    x, names, kinds = counts(), list(GENES), ["Gene Expression"] * 6
    if guides:
        x, names, kinds = np.hstack([x, GUIDE_UMI]), names + GUIDES, kinds + ["CRISPR Guide Capture"] * 3
    x, names, kinds = np.hstack([x, x[:, :1]]), [*names, "CD4"], [*kinds, "Antibody Capture"]
    scipy.io.mmwrite(path / "matrix.mtx", sp.coo_matrix(x.T.astype(int)))
    rows = [f"ENSG{i}\t{name}\t{kind}" for i, (name, kind) in enumerate(zip(names, kinds, strict=True))]
    if features == "genes.tsv":
        rows = [row.rsplit("\t", 1)[0] for row in rows]
    (path / features).write_text("\n".join(rows) + "\n")
    (path / "barcodes.tsv").write_text("".join(f"cell{i}\n" for i in range(8)))
    if packed:
        for file in list(path.iterdir()):
            (path / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
            file.unlink()
    return path


def table(tmp_path, name="cells.csv", order=range(8), prefix="cell", **columns):
    separator = "," if "csv" in name else "\t"
    frame = pd.DataFrame({"cell": [f"{prefix}{i}" for i in order], "perturbation": [LABELS[i] for i in order], **columns})
    frame.to_csv(tmp_path / name, sep=separator, index=False)
    return str(tmp_path / name)


def cellranger_h5(tmp_path, guides=False):
    x, names, kinds = counts(), list(GENES), ["Gene Expression"] * 6
    if guides:
        x, names, kinds = np.hstack([x, GUIDE_UMI]), names + GUIDES, kinds + ["CRISPR Guide Capture"] * 3
    matrix = sp.csr_matrix(x.astype(np.int32))
    path = tmp_path / "matrix.h5"
    with h5py.File(path, "w") as handle:
        group = handle.create_group("matrix")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(matrix, name)
        group["shape"] = np.array(x.shape[::-1], dtype=np.int32)
        group["barcodes"] = np.array([f"cell{i}" for i in range(8)], dtype="S")
        features = group.create_group("features")
        columns = {"id": [f"ENSG{i}" for i in range(len(names))], "name": names, "feature_type": kinds, "genome": ["x"] * len(names)}
        for name, values in columns.items():
            features[name] = np.array(values, dtype="S")
    return path


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["cells.csv", "cells.tsv", "cells.csv.gz"])
def test_mtx_folder_with_a_cell_table(tmp_path, packed, name):
    path = folder(tmp_path, packed=packed)
    data = read(path, "10x_mtx", cell_table=table(tmp_path, name, order=[7, 3, 1, 0, 2, 4, 6, 5]))
    assert list(data.obs_names) == ["cell0", "cell1", "cell2", "cell3", "cell4", "cell7"]
    assert list(data.var_names) == GENES
    assert list(data.obs["perturbation"]) == ["control", "STAT1", "STAT2", "STAT1+STAT2", "control", "JAK2"]
    assert np.array_equal(data.X.toarray(), counts()[[0, 1, 2, 3, 4, 7]])
    assert data.var["gene_id"].iloc[0] == "ENSG0"
    assert report(data)["features_not_genes"] == 1


def test_old_mtx_folder_with_genes_tsv(tmp_path):
    data = read(folder(tmp_path, packed=False, features="genes.tsv"), "10x_mtx", cell_table=table(tmp_path))
    assert list(data.var_names) == [*GENES, "CD4"]


def test_10x_h5(tmp_path):
    data = read(cellranger_h5(tmp_path), "10x_h5", cell_table=table(tmp_path, lane=list("aabbaabb")), columns={"batch": "lane"})
    assert np.array_equal(data.X.toarray(), counts()[[0, 1, 2, 3, 4, 7]])
    assert list(data.obs["batch"]) == list("aabbab")
    (tmp_path / "bad.h5").write_bytes((tmp_path / "matrix.h5").read_bytes()[:3000])
    assert "not a Cell Ranger .h5 file" in fails(tmp_path / "bad.h5", "10x_h5", cell_table=str(tmp_path / "cells.csv"))


def guide_config(tmp_path, **values):
    (tmp_path / "guides.csv").write_text(GUIDE_TABLE)
    return {"guide_table": str(tmp_path / "guides.csv"), **values}


@pytest.mark.parametrize("kind", ["10x_h5", "10x_mtx"])
def test_guide_capture_features(tmp_path, kind):
    path = cellranger_h5(tmp_path, guides=True) if kind == "10x_h5" else folder(tmp_path, guides=True)
    data = read(path, kind, **guide_config(tmp_path, guide_counts="features"))
    # cell3 carries guides of two genes, cell5 and cell6 none; cell7 a gene's beside a non-targeting one.
    assert dict(data.obs["perturbation"]) == {"cell0": "control", "cell1": "STAT1", "cell2": "STAT2", "cell4": "control", "cell7": "STAT1"}
    assert list(data.obs["guide"]) == ["gN", "gS1", "gS2", "gN", "gN;gS1"]
    assert list(data.var_names) == GENES
    assert np.array_equal(data.obs["total_counts"], counts()[[0, 1, 2, 4, 7]].sum(axis=1))
    got = report(data)
    assert (got["labels"]["cells_multi_guide"], got["labels"]["cells_unassigned"]) == (1, 2)
    assert got["guide_assignment"]["assigned"] == 5


def test_guide_features_by_id(tmp_path):
    (tmp_path / "guides.csv").write_text(GUIDE_TABLE.replace("gS1", "ENSG6").replace("gS2", "ENSG7").replace("gN", "ENSG8"))
    data = read(folder(tmp_path, guides=True), "10x_mtx", guide_counts="features", guide_table=str(tmp_path / "guides.csv"))
    assert list(data.obs["guide"])[:2] == ["ENSG8", "ENSG6"]


def guide_counts(tmp_path, order=range(8), transpose=False):
    frame = pd.DataFrame(GUIDE_UMI.astype(int), columns=GUIDES, index=pd.Index([f"cell{i}" for i in range(8)], name="cell")).iloc[
        list(order)
    ]
    (frame.T if transpose else frame).to_csv(tmp_path / "umi.csv")
    return str(tmp_path / "umi.csv")


def test_guide_count_table_beside_a_cell_table(tmp_path):
    config = guide_config(
        tmp_path, guide_counts=guide_counts(tmp_path, order=[7, 1, 0, 2, 3]), cell_table=table(tmp_path, lane=list("aabbaabb"))
    )
    data = read(folder(tmp_path), "10x_mtx", columns={"batch": "lane"}, **config)
    assert dict(data.obs["perturbation"]) == {"cell0": "control", "cell1": "STAT1", "cell2": "STAT2", "cell7": "STAT1"}
    assert list(data.obs["batch"]) == ["a", "a", "b", "b"]
    assert report(data)["cells_without_guide_counts"] == 3


def test_guide_errors(tmp_path):
    path = folder(tmp_path)
    assert "columns are cells" in fails(path, "10x_mtx", **guide_config(tmp_path, guide_counts=guide_counts(tmp_path, transpose=True)))
    assert "nothing says what they target" in fails(path, "10x_mtx", guide_counts=guide_counts(tmp_path))
    assert "no CRISPR Guide Capture" in fails(path, "10x_mtx", **guide_config(tmp_path, guide_counts="features"))
    assert "both control and perturbed" in fails(
        path, "10x_mtx", labels={"control": ["x"]}, **guide_config(tmp_path, guide_counts=guide_counts(tmp_path))
    )
    (tmp_path / "umi.csv").write_text("cell,gS1\ncell0,1.5\n")
    assert "whole numbers" in fails(path, "10x_mtx", **guide_config(tmp_path, guide_counts=str(tmp_path / "umi.csv")))
    (tmp_path / "umi.csv").write_text("cell,gS1\ncell0,many\n")
    assert "not all values are numbers" in fails(path, "10x_mtx", **guide_config(tmp_path, guide_counts=str(tmp_path / "umi.csv")))
    (tmp_path / "umi.csv").write_text("cell,gX\ncell0,1\n")
    assert "not in the guide table" in fails(path, "10x_mtx", **guide_config(tmp_path, guide_counts=str(tmp_path / "umi.csv")))


def test_cell_table_errors(tmp_path):
    path = folder(tmp_path)
    assert "say nothing about perturbations" in fails(path, "10x_mtx")
    message = fails(path, "10x_mtx", cell_table=table(tmp_path, prefix="other"))
    assert "0 of 8 cells" in message
    assert "'cell0'" in message
    assert "'other0'" in message
    (tmp_path / "twice.csv").write_text("cell,perturbation\ncell0,A\ncell0,B\n")
    assert "stands twice" in fails(path, "10x_mtx", cell_table=str(tmp_path / "twice.csv"))
    (tmp_path / "nocell.csv").write_text("cells,perturbation\ncell0,A\n")
    assert "did you mean 'cells'" in fails(path, "10x_mtx", cell_table=str(tmp_path / "nocell.csv"))
    assert "file not found" in fails(path, "10x_mtx", cell_table=str(tmp_path / "none.csv"))


def test_barcode_suffixes_are_pointed_out(tmp_path):
    frame = pd.DataFrame({"cell": [f"cell{i}-1" for i in range(8)], "perturbation": LABELS})
    frame.to_csv(tmp_path / "cells.csv", index=False)
    assert "without the suffix" in fails(folder(tmp_path), "10x_mtx", cell_table=str(tmp_path / "cells.csv"))


def test_cells_that_the_table_lacks_are_dropped(tmp_path):
    data = read(folder(tmp_path), "10x_mtx", cell_table=table(tmp_path, order=[0, 1, 2]))
    assert list(data.obs_names) == ["cell0", "cell1", "cell2"]
    assert report(data)["cells_not_in_cell_table"] == 5


def test_incomplete_folders(tmp_path):
    cells = table(tmp_path)
    path = folder(tmp_path, packed=False)
    (path / "barcodes.tsv").write_text("cell0\n")
    assert "1 barcodes are named" in fails(path, "10x_mtx", cell_table=cells)
    (path / "barcodes.tsv").unlink()
    assert "no barcodes.tsv" in fails(path, "10x_mtx", cell_table=cells)
    path = folder(tmp_path)
    (path / "matrix.mtx").unlink(missing_ok=True)
    (path / "matrix.mtx.gz").write_bytes((path / "matrix.mtx.gz").read_bytes()[:60])
    assert "cannot be read" in fails(path, "10x_mtx", cell_table=cells)
    assert "not a folder" in fails(write(tmp_path, screen()), "10x_mtx", cell_table=cells)


# --- rows of the datasets table -----------------------------------------------------------------------------------------------------


def catalogue(name, source, **values):
    return ingest(CatalogueDataset(kind="catalogue", name=name, **values), source=source)


def test_converted_seurat_object(tmp_path):
    path = folder(tmp_path)
    labels = ["non-targeting", "STAT1", "STAT2--STAT1", "STAT1--non-targeting", "safe-targeting", "JAK2--JAK2", "", "JAK2"]
    frame = pd.DataFrame({"cell": [f"cell{i}" for i in range(8)], "Guides_collapsed_by_gene": labels, "10X_channel": list("12121212")})
    frame.to_csv(path / "cells.tsv", sep="\t", index=False)
    data = catalogue("yao2023", path)
    assert list(data.obs["perturbation"]) == ["control", "STAT1", "STAT1", "control", "JAK2", "JAK2"]
    got = report(data)
    assert got["labels"]["cells_multi_guide"] == 1
    assert got["columns_not_found"] == ["Guides"]
    assert set(data.obs["batch"]) == {"1", "2"}
    assert data.uns["provenance"]["dataset"] == "yao2023"
    assert "GSE221321" in data.uns["provenance"]["citation"]


def h5mu(tmp_path, *, split_columns=False):
    rna, source = screen(gene_target=["NT", "STAT1", "STAT2", "STAT1", "NT", "NT", "JAK2", "JAK2"]), tmp_path / "rna.h5ad"
    rna.obs["perturbation"] = ["NT" if label == "NT" else "Perturbed" for label in rna.obs["gene_target"]]
    shared = rna.obs[["gene_target"]].rename(columns={"gene_target": "rna:gene_target"}).iloc[::-1]
    if split_columns:
        del rna.obs["gene_target"]
    write(tmp_path, rna, source.name)
    whole = ad.AnnData(obs=shared)
    write(tmp_path, whole, "whole.h5ad")
    path = tmp_path / "screen.h5mu"
    with h5py.File(path, "w") as handle, h5py.File(source) as part, h5py.File(tmp_path / "whole.h5ad") as top:
        handle.create_group("mod")
        part.copy(part["/"], handle["mod"], name="rna")
        top.copy("obs", handle)
    return path


@pytest.mark.parametrize("split_columns", [False, True])
def test_h5mu_modality(tmp_path, split_columns):
    data = catalogue("papalexi2021", h5mu(tmp_path, split_columns=split_columns))
    assert list(data.obs["perturbation"]) == ["control", "STAT1", "STAT2", "STAT1", "control", "control", "JAK2", "JAK2"]
    assert np.array_equal(data.X.toarray(), counts())


def test_h5mu_without_the_modality(tmp_path):
    with h5py.File(tmp_path / "x.h5mu", "w") as handle:
        handle.create_group("mod/adt")
    with pytest.raises(UserError, match=r"no modality 'rna'; found \['adt'\]"):
        catalogue("papalexi2021", tmp_path / "x.h5mu")


def test_scperturb_dialects(tmp_path):
    norman = screen(perturbation=["control", "STAT1", "STAT1_STAT2", "STAT2", "control", "JAK2", "JAK2", "STAT1"])
    data = catalogue("norman2019", write(tmp_path, norman))
    assert data.obs["perturbation"].iloc[2] == "STAT1+STAT2"
    adamson = ["63(mod)_pBA580", "STAT1_pDS12", "STAT1_pDS13", "*", "Gal4-4(mod)_pBA582", "<NA>", "HLA-A_pDS1", "JAK2_pBA5"]
    data = catalogue("adamson2016", write(tmp_path, screen(perturbation=adamson), "a.h5ad"))
    assert list(data.obs["perturbation"]) == ["control", "STAT1", "STAT1", "control", "HLA-A", "JAK2"]


def test_unknown_format_of_a_download(tmp_path):
    (tmp_path / "x.rds").write_text("")
    with pytest.raises(UserError, match="unknown format '.rds'"):
        catalogue("yao2023", tmp_path / "x.rds")


# --- real counts ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "columns", "cells", "genes", "controls", "singles", "combinations"),
    [
        ("papalexi2021-thp1-303g", {"guide": "guide", "batch": "batch", "library_size": "total_counts_full"}, 19619, 303, 2292, 25, 0),
        ("norman2019-k562-500g", {"library_size": "total_counts_full"}, 3375, 500, 100, 18, 15),
    ],
)
def test_real_screens(name, columns, cells, genes, controls, singles, combinations):
    path = SHARED / f"{name}.h5ad"
    if not path.exists():
        pytest.skip("real counts are not at hand")
    data = ingest(FileDataset(kind="h5ad", path=str(path), columns=columns), source=path)
    got = report(data)
    assert data.shape == (cells, genes)
    assert got["labels"]["cells_control"] == controls
    assert (got["labels"]["singles"], got["labels"]["combinations"]) == (singles, combinations)
    source = ad.read_h5ad(path)
    assert (data.X != source.X).nnz == 0
    assert np.array_equal(data.obs["total_counts"], source.obs["total_counts_full"])
    labels = [
        source.obs["perturbation"].astype(str).map(lambda label: "+".join(sorted(label.split("+")))),
        data.obs["perturbation"].astype(str),
    ]
    assert labels[0].tolist() == labels[1].tolist()
