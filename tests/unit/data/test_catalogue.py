"""The table of public screens."""

import pytest

from dbdiffusion.config.datasets import CatalogueDataset
from dbdiffusion.data.catalogue import SUFFIXES, TABLE, find, read_catalogue, with_entry
from dbdiffusion.runtime.errors import UserError


def config(**values):
    return CatalogueDataset(kind="catalogue", **values)


def test_the_projects_table():
    entries = read_catalogue(TABLE)
    names = {name for name, _ in entries}
    assert {"norman2019", "adamson2016", "replogle2022_k562_essential", "replogle2022_rpe1", "papalexi2021", "yao2023"} == names
    for entry in entries.values():
        assert "doi:10." in entry.citation
        assert entry.suffix in SUFFIXES.values()
        assert entry.urls[0] == entry.address
        assert with_entry(config(name=entry.name), entry, {entry.guide_column, entry.batch_column})[1] == []


def test_newest_version_is_the_last_row():
    assert find(TABLE, "norman2019").version == "zenodo-13350497"
    assert find(TABLE, "norman2019", "zenodo-7041849").version == "zenodo-7041849"


def test_yao_needs_conversion():
    entry = find(TABLE, "yao2023")
    assert entry.needs_conversion
    assert entry.suffix == ".rds"
    assert entry.multi_guide_separator == "--"
    assert entry.address.startswith("https://ftp.ncbi.nlm.nih.gov/geo/samples/GSM6858nnn/GSM6858447/")


def test_unknown_name_and_version_name_what_there_is():
    with pytest.raises(UserError, match="did you mean 'norman2019'"):
        find(TABLE, "norman_2019")
    with pytest.raises(UserError, match="versions: zenodo-7041849, zenodo-13350497"):
        find(TABLE, "norman2019", "zenodo-1")


def test_row_fills_defaults_only():
    entry = find(TABLE, "yao2023")
    filled, absent = with_entry(config(name="yao2023"), entry, {"Guides"})
    assert filled.columns.perturbation == "Guides_collapsed_by_gene"
    assert filled.labels.control == ["non-targeting", "safe-targeting"]
    assert filled.labels.multi_guide_separator == "--"
    assert filled.labels.combination_separator is None
    assert filled.columns.guide == "Guides"
    assert filled.columns.batch is None
    assert absent == ["10X_channel"]
    mine = config(name="yao2023", columns={"perturbation": "p", "batch": "b"}, labels={"control": ["x"], "multi_guide_separator": ";"})
    filled, absent = with_entry(mine, entry, {"Guides"})
    assert (filled.columns.perturbation, filled.columns.batch, filled.labels.control) == ("p", "b", ["x"])
    assert filled.labels.multi_guide_separator == ";"
    assert absent == []


def edited(tmp_path, change):
    lines = TABLE.read_text().splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("name\t"))
    table = [line.split("\t") for line in lines[head:]]
    change(table)
    path = tmp_path / "datasets.tsv"
    path.write_text("\n".join("\t".join(row) for row in table) + "\n")
    return path


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("format", "h5da", "did you mean 'h5ad'"),
        ("address", "ftp://x/y", "not a web address"),
        ("sha256", "abc", "not a SHA-256"),
        ("licence", "", "'licence' is empty"),
        ("label_pattern", "(", "no regular expression"),
        ("label_pattern", "x", "no group"),
    ],
)
def test_bad_values_name_row_and_remedy(tmp_path, column, value, message):
    def change(table):
        table[1][table[0].index(column)] = value

    with pytest.raises(UserError, match="row 1 .norman2019.") as error:
        read_catalogue(edited(tmp_path, change))
    assert message in str(error.value)


def test_bad_tables(tmp_path):
    with pytest.raises(UserError, match="stands twice"):
        read_catalogue(edited(tmp_path, lambda table: table.append(table[1])))
    with pytest.raises(UserError, match="fields, expected"):
        read_catalogue(edited(tmp_path, lambda table: table[1].pop()))
    with pytest.raises(UserError, match="'sha256' is missing"):
        read_catalogue(edited(tmp_path, lambda table: table[0].__setitem__(5, "sha")))
    with pytest.raises(UserError, match="file not found"):
        read_catalogue(tmp_path / "none.tsv")
