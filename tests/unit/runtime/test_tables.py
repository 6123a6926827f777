"""Tables hold what their contract says, on write and on read."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from dbdiffusion.runtime.contracts import CONTRACTS
from dbdiffusion.runtime.errors import UserError
from dbdiffusion.runtime.tables import Column, Table

TABLE = Table(
    "things",
    "Things.",
    [
        Column("name", "str", "", "name"),
        Column("n", "int", "cells", "count"),
        Column("value", "float", "ln", "value"),
        Column("maybe", "float", "ln", "value or missing", missing=True),
        Column("kind", "str", "", "kind", choices=("a", "b")),
        Column("flag", "bool", "", "flag"),
    ],
    ("name",),
)


def good() -> pd.DataFrame:
    return pd.DataFrame(
        {"name": ["x", "y"], "n": [1, 2], "value": [0.5, 1.5], "maybe": [np.nan, 1.0], "kind": ["a", "b"], "flag": [True, False]}
    )


def test_round_trip(tmp_path):
    TABLE.write(good(), tmp_path / "t.parquet")
    back = TABLE.read(tmp_path / "t.parquet")
    assert isinstance(back["name"].dtype, pd.CategoricalDtype)
    pd.testing.assert_frame_equal(back.astype({"name": object, "kind": object}), good())


def test_same_rows_same_bytes(tmp_path):
    for name in "ab":
        TABLE.write(good(), tmp_path / f"{name}.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_columns_come_back_in_the_order_of_the_contract(tmp_path):
    TABLE.write(good()[good().columns[::-1]], tmp_path / "t.parquet")
    assert list(TABLE.read(tmp_path / "t.parquet").columns) == TABLE.names


def test_columns_that_the_contract_does_not_name_are_left_out(tmp_path):
    TABLE.write(good().assign(more=1), tmp_path / "t.parquet")
    assert list(pd.read_parquet(tmp_path / "t.parquet").columns) == TABLE.names


def test_an_empty_table_is_allowed(tmp_path):
    TABLE.write(good().iloc[:0], tmp_path / "t.parquet")
    assert len(TABLE.read(tmp_path / "t.parquet")) == 0


BAD = {
    "missing column": (lambda f: f.drop(columns="n"), r"\['n'\] missing"),
    "NaN where none is allowed": (lambda f: f.assign(value=[np.nan, 1.0]), "'value' has 1 missing"),
    "missing text": (lambda f: f.assign(name=["x", None]), "'name' has 1 missing"),
    "infinite": (lambda f: f.assign(value=[np.inf, 1.0]), "'value' has infinite"),
    "infinite where missing is allowed": (lambda f: f.assign(maybe=[-np.inf, 1.0]), "'maybe' has infinite"),
    "undeclared choice": (lambda f: f.assign(kind=["a", "c"]), r"'kind' holds \['c'\]"),
    "float for int": (lambda f: f.assign(n=[1.0, 2.0]), "'n' has type float64, expected int"),
    "int for float": (lambda f: f.assign(value=[1, 2]), "'value' has type int64, expected float"),
    "number for text": (lambda f: f.assign(name=[1, 2]), "'name' has type int64, expected str"),
    "int for bool": (lambda f: f.assign(flag=[0, 1]), "'flag' has type int64, expected bool"),
    "duplicate key": (lambda f: f.assign(name=["x", "x"]), r"not unique by \['name'\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_on_write_and_nothing_is_left(case, tmp_path):
    spoil, message = BAD[case]
    with pytest.raises(UserError, match=message) as caught:
        TABLE.write(spoil(good()), tmp_path / "t.parquet")
    assert "t.parquet" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", BAD)
def test_refused_on_read(case, tmp_path):
    spoil, message = BAD[case]
    spoil(good()).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(UserError, match=message):
        TABLE.read(tmp_path / "t.parquet")


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.parquet"):
        TABLE.read(tmp_path / "nowhere.parquet")


@pytest.mark.parametrize("table", CONTRACTS.values(), ids=lambda table: table.name)
def test_contracts_are_well_formed(table):
    assert len(set(table.names)) == len(table.names)
    assert set(table.key) <= set(table.names)
    for column in table.columns:
        assert column.kind in ("str", "int", "float", "bool")
        assert column.meaning
        assert not (column.choices and column.kind != "str")
    assert all(f"| `{name}` |" in table.markdown() for name in table.names)
