"""Public annotations as published, in small, to gene sets and pairs that feature sources read."""

from __future__ import annotations

import gzip
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from dbdiffusion.config.datasets import FeatureSource
from dbdiffusion.perturbations.annotations import (
    TABLE,
    ancestors,
    files_of,
    gmt_sets,
    go_sets,
    read_annotations,
    read_gaf,
    read_obo,
    string_pairs,
    write_annotation,
)
from dbdiffusion.perturbations.features import load_features, pairs_matrix, read_gmt
from dbdiffusion.runtime.errors import UserError

OBO = """format-version: 1.2
data-version: releases/2024-01-01

[Term]
id: GO:0008150
name: biological_process
namespace: biological_process

[Term]
id: GO:0000001
name: signalling ! loud
namespace: biological_process
alt_id: GO:0000091
is_a: GO:0008150 ! biological_process

[Term]
id: GO:0000002
name: kinase cascade
namespace: biological_process
is_a: GO:0008150 ! biological_process
relationship: part_of GO:0000001 {source="x"} ! signalling
relationship: regulates GO:0000004 ! something

[Term]
id: GO:0000003
name: kinase activity
namespace: molecular_function
relationship: part_of GO:0000002 ! kinase cascade

[Term]
id: GO:0000004
name: something
namespace: biological_process
is_a: GO:0008150

[Term]
id: GO:0000005
name: old
namespace: biological_process
is_a: GO:0000004
is_obsolete: true

[Typedef]
id: part_of
name: part of
is_transitive: true
"""


def gaf(*rows: tuple[str, str, str], database: str = "UniProtKB", evidence: str = "IDA") -> list[str]:
    """Lines of a GAF 2.2 file: (symbol, relation, term)."""
    out = []
    for symbol, relation, term in rows:
        fields = [database, f"P_{symbol}", symbol, relation, term, "PMID:1", evidence, "", "P", "name", "", "protein", "taxon:9606"]
        out.append("\t".join([*fields, "20240101", "UniProt", "", ""]) + "\n")
    return out


GAF = [
    "!gaf-version: 2.2\n",
    *gaf(
        ("JAK2", "enables", "GO:0000003"),
        ("STAT1", "involved_in", "GO:0000002"),
        ("IFNGR1", "involved_in", "GO:0000091"),
        ("MYC", "NOT|involved_in", "GO:0000002"),
        ("MYC", "involved_in", "GO:0000004"),
        ("JAK2", "involved_in", "GO:0000002"),
    ),
    *gaf(("ACTB", "involved_in", "GO:0008150"), evidence="ND"),
    *gaf(("complex I", "involved_in", "GO:0000004"), database="ComplexPortal"),
]


def test_go_sets_hold_the_genes_of_all_terms_below():
    found = {term: (name, genes) for term, name, genes in go_sets(GAF, OBO.splitlines(), "P")}
    assert found == {
        "GO:0008150": ("biological_process", ["IFNGR1", "JAK2", "MYC", "STAT1"]),
        "GO:0000001": ("signalling", ["IFNGR1", "JAK2", "STAT1"]),
        "GO:0000002": ("kinase cascade", ["JAK2", "STAT1"]),
        "GO:0000004": ("something", ["MYC"]),
    }
    assert go_sets(GAF, OBO.splitlines(), "F") == [("GO:0000003", "kinase activity", ["JAK2"])]


def test_ancestors_match_a_recursive_walk():
    terms, _ = read_obo(OBO.splitlines())

    def walk(term: str) -> set[str]:
        return {term}.union(*(walk(parent) for parent in terms[term].parents if parent in terms))

    assert {term: set(above) for term, above in ancestors(terms).items()} == {term: walk(term) for term in terms}
    assert "GO:0000005" not in terms
    circle = {**terms, "GO:0008150": replace(terms["GO:0008150"], parents=("GO:0000002",))}
    with pytest.raises(UserError, match="is above itself"):
        ancestors(circle)


def test_go_files_that_do_not_belong_together():
    with pytest.raises(UserError, match="1 of 1 annotations are to terms that the ontology does not have"):
        go_sets(gaf(("JAK2", "involved_in", "GO:0099999")), OBO.splitlines(), "P")
    with pytest.raises(UserError, match=r"no \[Term\]"):
        read_obo(["<html>"])
    with pytest.raises(UserError, match="line 1 has 2 tab-separated fields"):
        list(read_gaf(["a\tb\n"]))


def test_reactome_lines_are_turned_round():
    lines = ["Signalling by JAK\tR-HSA-2\tJAK2\tSTAT1\tSTAT1\n", "Apoptosis\tR-HSA-1\tCASP3\t\n", "\n"]
    assert gmt_sets(lines) == [("R-HSA-1", "Apoptosis", ["CASP3"]), ("R-HSA-2", "Signalling by JAK", ["JAK2", "STAT1"])]
    with pytest.raises(UserError, match="no gene set"):
        gmt_sets([])


INFO = """#string_protein_id	preferred_name	protein_size	annotation
9606.E1	JAK2	1132	kinase
9606.E2	STAT1	750	x
9606.E3	MYC	1	x
"""
LINKS = """protein1 protein2 combined_score
9606.E1 9606.E2 999
9606.E2 9606.E1 999
9606.E1 9606.E3 699
9606.E3 9606.E2 700
9606.E1 9606.E1 900
"""


def test_string_pairs_are_strong_named_and_stand_once():
    assert string_pairs(LINKS.splitlines(), INFO.splitlines(), 700) == [("JAK2", "STAT1"), ("MYC", "STAT1")]
    assert len(string_pairs(LINKS.splitlines(), INFO.splitlines(), 0)) == 3
    with pytest.raises(UserError, match="links start with"):
        string_pairs(INFO.splitlines(), LINKS.splitlines(), 700)
    with pytest.raises(UserError, match="3 have a protein without a name"):
        string_pairs(LINKS.splitlines(), INFO.splitlines()[:2], 700)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Files as their publishers serve them, under their names in the project's table."""
    for name, text in (
        ("goa_human.gaf.gz", "".join(GAF)),
        ("9606.protein.links.v12.0.txt.gz", LINKS),
        ("9606.protein.info.v12.0.txt.gz", INFO),
    ):
        with gzip.open(tmp_path / name, "wt") as handle:
            handle.write(text)
    (tmp_path / "go-basic.obo").write_text(OBO)
    with zipfile.ZipFile(tmp_path / "ReactomePathways.gmt.zip", "w") as archive:
        archive.writestr("ReactomePathways.gmt", "Signalling\tR-HSA-2\tJAK2\tSTAT1\tMYC\n")
    return tmp_path


def test_every_row_of_the_table_becomes_a_feature_source(published: Path):
    entries = read_annotations()
    assert list(entries) == ["go_bp.gmt", "go_cc.gmt", "go_mf.gmt", "reactome.gmt", "string.csv"]
    assert all(url.startswith("https://") for url, _ in files_of(entries.values()).values())
    for name, entry in entries.items():
        out = published / name
        if entry.name == "go_cc":
            continue
        write_annotation(table=TABLE, name=name, files=[published / file for file in entry.files], out=out)
        source = FeatureSource(kind=entry.kind, path=str(out), min_size=1)
        features = load_features(source, ["JAK2", "STAT1"])
        assert features is not None
        assert "JAK2" in features.genes
        before = out.read_bytes()
        write_annotation(table=TABLE, name=name, files=[published / file for file in entry.files], out=out)
        assert out.read_bytes() == before
    assert read_gmt(published / "go_bp.gmt")["GO:0000002"] == ["JAK2", "STAT1"]
    assert pairs_matrix(published / "string.csv", source)[0] == ["JAK2", "MYC", "STAT1"]


def test_broken_files_leave_nothing(published: Path):
    whole = (published / "goa_human.gaf.gz").read_bytes()
    (published / "goa_human.gaf.gz").write_bytes(whole[: len(whole) // 2])
    (published / "ReactomePathways.gmt.zip").write_bytes(b"not a zip")
    for name in ("go_bp.gmt", "reactome.gmt"):
        files = [published / file for file in read_annotations()[name].files]
        with pytest.raises(UserError, match="cannot be read"):
            write_annotation(table=TABLE, name=name, files=files, out=published / name)
        assert not (published / name).exists()
    with pytest.raises(UserError, match=r"did you mean 'go_bp\.gmt'"):
        write_annotation(table=TABLE, name="go_pb.gmt", files=[], out=published / "x")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("\tgmt.zip\t", "\tgmt.tar\t", "unknown format 'gmt.tar'"),
        ("string\t12.0\tpairs", "string\t12.0\tgene_sets", "gives pairs"),
        ("https://reactome.org/download/current/ReactomePathways.gmt.zip", "reactome.org", "not the web address of a file"),
        ("go_cc\t", "go_bp\t", "stands twice"),
        (";https://current.geneontology.org/ontology/go-basic.obo", "", r"1 address\(es\)"),
        ("name\tversion", "name\trelease", "columns are"),
        ("reactome.org/download/current/ReactomePathways.gmt.zip\t", "reactome.org/a.gmt.zip\tabc", "not a SHA-256"),
        ("reactome.org/download/current/ReactomePathways.gmt.zip", "reactome.org/go-basic.obo", "two addresses"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path: Path, old: str, new: str, message: str):
    text = TABLE.read_text()
    assert old in text
    (tmp_path / "annotations.tsv").write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        read_annotations(tmp_path / "annotations.tsv")
