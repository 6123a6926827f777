"""Feature sources against definitions written out, and files that are not what they should be."""

from __future__ import annotations

import gzip
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from dbdiffusion.config.datasets import FeatureSource
from dbdiffusion.perturbations.features import (
    CellSums,
    GeneFeatures,
    cell_sums,
    coexpression,
    design,
    known,
    load_features,
    match_symbols,
    names_frame,
    permute_features,
    project,
    read_aliases,
    read_gmt,
    similarity,
)
from dbdiffusion.runtime.errors import UserError

GMT = "S1\tx\tA\tB\tC\nS2\tx\tB\tC\tD\nS3\tx\tA\tD\tE\nS4\tx\tE\tF\tG\nBIG\tx\t" + "\t".join(f"X{i}" for i in range(40)) + "\tA\tB\n"


def gmt(folder: Path, text: str = GMT, name: str = "sets.gmt") -> FeatureSource:
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return FeatureSource(kind="gene_sets", path=str(path), min_size=2, max_size=30)


@pytest.mark.parametrize("name", ["sets.gmt", "sets.gmt.gz"])
def test_gene_sets_give_weighted_cosines(tmp_path: Path, name: str) -> None:
    found = load_features(gmt(tmp_path, name=name), anchors=["A", "B", "C", "E"], others=["D", "F", "NOWHERE"])
    universe = 7  # A to G: the set beyond max_size does not count
    idf = np.log((universe + 1) / 3)
    rows = {g: np.array([g in s for s in ("ABC", "BCD", "ADE", "EFG")]) * idf for g in "ABCDEFG"}
    cosine = {(a, b): rows[a] @ rows[b] / np.linalg.norm(rows[a]) / np.linalg.norm(rows[b]) for a in "ABCDEF" for b in "ABCE"}
    alike = similarity([found], list("ABCDEF"), list("ABCE"))
    expected = np.array([[cosine[a, b] for b in "ABCE"] for a in "ABCDEF"])
    np.testing.assert_allclose(alike, expected, atol=1e-5)
    assert list(known([found], ["A", "NOWHERE"])) == [True, False]


def test_other_targets_do_not_change_a_target(tmp_path: Path) -> None:
    source = gmt(tmp_path)
    few = load_features(source, ["A", "B", "C"], ["D"])
    many = load_features(source, ["A", "B", "C"], ["D", "E", "F", "G"])
    np.testing.assert_array_equal(few.rows(list("ABCD"))[0], many.rows(list("ABCD"))[0])


def test_gene_that_shares_nothing_with_anchors_is_unknown(tmp_path: Path) -> None:
    found = load_features(gmt(tmp_path), ["A", "B"], ["G"])
    assert list(known([found], ["G", "A"])) == [False, True]


def test_projection_keeps_inner_products_and_truncation_keeps_size() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(30, 50))
    anchor = np.arange(30) < 20
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    full = project(rows, anchor, 64)
    np.testing.assert_allclose(full @ full[anchor].T, unit @ unit[anchor].T, atol=1e-8)
    thin = project(sparse.csr_matrix(rows), anchor, 64)
    np.testing.assert_allclose(thin @ thin[anchor].T, full @ full[anchor].T, atol=1e-8)
    short = project(rows, anchor, 5)
    assert short.shape == (30, 5)
    assert np.sqrt((short[anchor] ** 2).sum(axis=1).mean()) == pytest.approx(1)
    left, values, right = np.linalg.svd(unit[anchor], full_matrices=False)
    plain = unit @ right[:5].T
    ratio = np.linalg.norm(short) / np.linalg.norm(plain)
    np.testing.assert_allclose(short @ short.T, ratio**2 * plain @ plain.T, atol=1e-8)


def test_pairs_find_partners_and_shared_partners(tmp_path: Path) -> None:
    path = tmp_path / "pairs_test.csv"
    # A and B interact; C and D share the partner P; H is a hub that tells little; E and F have nothing in common but the hub.
    edges = [("A", "B"), ("C", "P"), ("D", "P"), ("H", "E"), ("H", "F"), *[("H", f"Y{i}") for i in range(40)]]
    path.write_text("entity1,entity2\n" + "".join(f"{a},{b}\n" for a, b in edges))
    found = load_features(FeatureSource(kind="pairs", path=str(path)), list("ABCDEF"))
    alike = pd.DataFrame(similarity([found], list("ABCDEF"), list("ABCDEF")), list("ABCDEF"), list("ABCDEF"))
    assert alike.loc["A", "B"] > 0.9
    assert alike.loc["C", "D"] > 0.5
    assert alike.loc["E", "F"] < alike.loc["C", "D"]
    assert abs(alike.loc["A", "C"]) < 1e-6
    assert "entity1" not in found.genes
    # Without a header, the first edge counts.
    path.write_text("".join(f"{a},{b}\n" for a, b in [*edges, ("B", "A")]))
    again = load_features(FeatureSource(kind="pairs", path=str(path)), list("ABCDEF"))
    np.testing.assert_allclose(similarity([again], list("ABCDEF"), list("ABCDEF")), alike, atol=1e-6)


@pytest.mark.parametrize("ending", ["tsv", "csv", "parquet", "npz", "csv.gz"])
def test_tables_of_every_kind_agree(tmp_path: Path, ending: str) -> None:
    rng = np.random.default_rng(0)
    names = [f"G{i}" for i in range(12)]
    values = rng.normal(3, 2, (12, 5))
    path = tmp_path / f"llm.{ending}"
    frame = pd.DataFrame(values, index=names, columns=[f"d{i}" for i in range(5)])
    if ending == "npz":
        np.savez(path, genes=np.array(names), values=values)
    elif ending == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, sep="\t" if ending == "tsv" else ",")
    source = FeatureSource(kind="table", path=str(path))
    assert source.name == "table:llm"
    found = load_features(source, names[:8], names[8:10])
    z = (values - values.mean(axis=0)) / values.std(axis=0)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    np.testing.assert_allclose(similarity([found], names[:10], names[:8]), (z @ z.T)[:10, :8], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.gmt", b"one line without tabs\n", "tab-separated"),
        ("b.gmt", b"", "no gene set"),
        ("c.gmt.gz", b"this is not gzip", "cannot be read"),
        ("d.gmt", b"\x80\x81\xff\tx\ty\n", "cannot be read"),
        ("e.gmt", b"S1\tx\tQ1\tQ2\tQ3\n", "none of the"),
        ("f.gmt", b"S1\tx\tA\n", "none of its"),
    ],
)
def test_bad_gene_sets_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_features(FeatureSource(kind="gene_sets", path=str(tmp_path / name), min_size=2), ["A", "B"])
    assert name in str(caught.value)


def test_no_common_symbol_shows_both_sides(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_features(gmt(tmp_path), ["ENSG00000000003", "ENSG00000000005"])
    assert "ENSG00000000003" in str(caught.value)
    assert "A, B" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "gene,d1\nA,x\nB,y\n", "not numbers"),
        ("t.csv", "gene,d1\nA,1\nA,2\n", "several rows"),
        ("t.csv", "gene,d1\nA,1\nB,\n", "missing"),
        ("t.xlsx", "gene,d1\n", "unknown kind"),
        ("t.npz", "no archive", "cannot be read"),
        ("t.parquet", "no archive", "cannot be read"),
    ],
)
def test_bad_tables_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        load_features(FeatureSource(kind="table", path=str(tmp_path / name)), ["A", "B"])


def test_missing_file_and_repeated_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not found"):
        load_features(FeatureSource(kind="pairs", path=str(tmp_path / "no.csv")), ["A"])
    path = tmp_path / "r.gmt"
    path.write_text("S\tx\tA\tA\tB\n\n")
    assert read_gmt(path) == {"S": ["A", "B"]}


def test_symbols_are_reconciled() -> None:
    available = ["MARCHF8", "SEPTIN2", "HLA-A", "ENSG00000000003", "Tp53", "abc", "ABC", "NEW"]
    wanted = ["MARCH8", "SEPT2", "HLA.A", "ENSG00000000003.14", "TP53", "Abc", "OLD", "NONE", "abc"]
    match, missing = match_symbols(wanted, available, {"OLD": ["ELSEWHERE", "NEW"]})
    assert match == {
        "MARCH8": "MARCHF8",
        "SEPT2": "SEPTIN2",
        "HLA.A": "HLA-A",
        "ENSG00000000003.14": "ENSG00000000003",
        "TP53": "Tp53",
        "OLD": "NEW",
        "abc": "abc",
    }
    # Two names differ by case alone, so a third spelling is not guessed.
    assert missing == ["Abc", "NONE"]


# --- co-expression


def test_sums_add_up_and_equal_the_cells(tiny_screen: Path) -> None:
    cells = anndata.read_h5ad(tiny_screen / "cells.h5ad")
    genes = list(cells.var_names[:20])
    names = sorted(cells.obs["perturbation"].unique())[:4]
    parts = cell_sums(tiny_screen / "cells.h5ad", [names[:1], names[1:]], genes, 10**6, 1)
    whole = cell_sums(tiny_screen / "cells.h5ad", [names], genes, 10**6, 1)[0]
    both = parts[0] + parts[1]
    np.testing.assert_allclose(both.xx, whole.xx, rtol=1e-5)
    np.testing.assert_allclose(both.zx, whole.zx, rtol=1e-5, atol=1e-3)
    keep = cells.obs["perturbation"].isin(names).to_numpy()
    x = np.log1p(cells.X.toarray()[keep][:, :20] / cells.obs["total_counts"].to_numpy()[keep, None] * 1e4)
    assert whole.n == keep.sum()
    np.testing.assert_allclose(whole.xx, x.T @ x, rtol=1e-4)


def _sums(x: np.ndarray, z: np.ndarray) -> CellSums:
    return CellSums(len(x), z.T @ z, z.T @ x, x.T @ x)


def test_coexpression_finds_modules_and_not_depth() -> None:
    rng = np.random.default_rng(0)
    n, depth = 3000, rng.normal(size=3000)
    module = rng.normal(size=(n, 2))
    x = rng.normal(size=(n, 40)) + 2 * np.outer(depth, np.ones(40))
    x[:, :10] += module[:, :1]
    x[:, 10:20] += module[:, 1:]
    loadings = coexpression(_sums(x, np.column_stack([np.ones(n), depth])), 10)
    assert loadings.shape[1] == 2  # noise does not pass the edge
    cosine = loadings @ loadings.T
    within, across = cosine[:10, :10][np.triu_indices(10, 1)], cosine[:10, 10:20]
    assert within.min() > 0.9
    assert np.abs(across).max() < 0.3
    # Genes outside the modules are short vectors: nothing is known of them.
    assert np.linalg.norm(loadings[20:], axis=1).mean() < 0.8 * np.linalg.norm(loadings[:20], axis=1).mean()
    # With depth left in, all genes look alike.
    naive = coexpression(_sums(x, np.ones((n, 1))), 10)
    assert np.abs(naive @ naive.T)[:10, 20:].mean() > 0.5


def test_constant_gene_and_single_batch_are_harmless() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 8))
    x[:, 3] = 5.0
    # A batch without cells makes a column of zeros.
    z = np.column_stack([np.ones(200), np.zeros(200), rng.normal(size=200)])
    loadings = coexpression(_sums(x, z), 5)
    assert np.isfinite(loadings).all()
    assert (loadings[3] == 0).all()


# --- joining


def test_similarity_is_the_mean_of_the_sources_that_know_both() -> None:
    a = GeneFeatures("a", pd.Index(["X", "Y"]), np.array([[1.0, 0.0], [0.6, 0.8]]))
    b = GeneFeatures("b", pd.Index(["X", "Y", "Z"]), np.array([[1.0], [1.0], [0.5]]))
    found = similarity([a, b], ["X", "Z", "W"], ["X", "Y"])
    np.testing.assert_allclose(found[0], [1.0, 0.8], atol=1e-6)
    np.testing.assert_allclose(found[1], [0.5, 0.5], atol=1e-6)
    assert np.isnan(found[2]).all()


def test_design_is_centred_on_measured_genes_and_zero_where_unknown() -> None:
    a = GeneFeatures("a", pd.Index(["X", "Y"]), np.array([[1.0, 0.0], [0.0, 3.0]]))
    b = GeneFeatures("b", pd.Index(["Y", "Z"]), np.array([[2.0], [4.0]]))
    left, right = design([a, b], ["Z", "W"], ["X", "Y", "Z"])
    np.testing.assert_allclose(right.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(right * np.sqrt(2), [[0.5, -1.5, 0], [-0.5, 1.5, -1], [0, 0, 1]])
    np.testing.assert_allclose(left * np.sqrt(2), [[0, 0, 1], [0, 0, 0]])


def test_permuted_features_are_the_same_values_elsewhere() -> None:
    features = [GeneFeatures("a", pd.Index([f"G{i}" for i in range(50)]), np.arange(100.0).reshape(50, 2))]
    one, two, other = (permute_features(features, seed)[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.values, two.values)
    assert not np.array_equal(one.values, other.values)
    np.testing.assert_array_equal(np.sort(one.values[:, 0]), features[0].values[:, 0])
    assert (one.values[:, 0] == features[0].values[:, 0]).mean() < 0.2


def test_aliases_are_read_in_both_directions(tmp_path: Path) -> None:
    (tmp_path / "aliases.tsv").write_text("symbol\talias\tnote\nKMT2A\tMLL\tx\nKMT2A\tHRX\t\nMLL\tMLL\t\nEMPTY\t\t\n")
    assert read_aliases(tmp_path / "aliases.tsv") == {"KMT2A": ["MLL", "HRX"], "MLL": ["KMT2A"], "HRX": ["KMT2A"]}
    (tmp_path / "one.csv").write_text("symbol\nA\n")
    with pytest.raises(UserError, match="expected two"):
        read_aliases(tmp_path / "one.csv")
    with pytest.raises(UserError, match="not found"):
        read_aliases(tmp_path / "none.csv")


def test_names_say_what_matched_and_what_is_of_use() -> None:
    features = GeneFeatures("f", pd.Index(["A", "B"]), np.ones((2, 1)), {"A": "A", "B": "b", "C": "SEE"})
    table = names_frame({"f": features, "nothing": None}, ["A", "B"], ["B", "C", "D"], {"C": ["SEE"]}).set_index(["source", "gene"])
    assert table.loc["f", "rule"].to_dict() == {"A": "same", "B": "variant", "C": "alias", "D": "missing"}
    assert table.loc["f", "used"].to_dict() == {"A": True, "B": True, "C": False, "D": False}
    assert table.loc["f", "role"].to_dict() == {"A": "training", "B": "training", "C": "target", "D": "target"}
    assert set(table.loc["nothing", "rule"]) == {"missing"}
