"""The report's HTML tables: self-contained, escaped, complete."""

from __future__ import annotations

from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from dbdiffusion.figures import tables_html
from dbdiffusion.runtime import contracts
from dbdiffusion.runtime.errors import UserError


class Page(HTMLParser):
    """Rows of cells, attributes that reach out of the page, and tags that are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "input"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_a_page_holds_its_rows_and_nothing_from_outside(tmp_path):
    frame = pd.DataFrame({"gene": ["A<b>", 'C"&'], "lfc": [0.123456, np.nan], "cells": [1234, 7]})
    tables_html.write_table_page(frame, tmp_path / "page.html", title="T & <t>", note="note <i>")
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert page.rows == [["gene", "lfc", "cells"], ["A<b>", "0.123", "1,234"], ['C"&', "–", "7"]]
    assert not page.links
    assert not page.open
    assert "<b>" not in text
    assert "http" not in text


@pytest.mark.parametrize(
    ("values", "places", "shown"),
    [
        ([1.0, 20.0, np.nan], None, ["1", "20", "–"]),
        ([0.1234, -0.5, 0.0], 3, ["0.123", "−0.500", "0.000"]),
        ([0.5, 0.25, 3e-7, 2e-17], 4, ["0.5000", "0.2500", "3e-07", "0.0000"]),
        ([1234.5, 20.25], 1, ["1,234.5", "20.2"]),
    ],
)
def test_numbers_of_a_column_have_the_same_decimals(values, places, shown, tmp_path):
    frame = pd.DataFrame({"x": values})
    assert tables_html.decimals(frame["x"]) == places
    tables_html.write_table_page(frame, tmp_path / "page.html", title="T")
    text = (tmp_path / "page.html").read_text()
    assert [row[0] for row in Page(text).rows[1:]] == shown
    # Rows are sorted by the exact value.
    assert f'data-value="{values[0]!r}"' in text


def test_only_the_first_rows_are_shown(tmp_path):
    tables_html.write_table_page(pd.DataFrame({"x": range(50)}), tmp_path / "page.html", title="T", top=5)
    text = (tmp_path / "page.html").read_text()
    assert len(Page(text).rows) == 6
    assert "5 of 50 rows" in text


def test_called_genes_come_first_and_abstention_is_one_row(made):
    de = contracts.DE.read(made.root / "de.parquet")
    shown = tables_html.top_calls(de, "stacked", "direction", per_target=5)
    counts = shown["target"].value_counts()
    assert counts[made.targets[-1]] == 1
    assert counts[made.targets[0]] == 5
    first = shown[shown["target"] == made.targets[0]]
    assert first["call"].iloc[0] in ("up", "down")
    assert first["q (direction)"].is_monotonic_increasing
    assert shown.loc[shown["target"] == made.targets[-1], "reason"].item() == "its gene is not measured"
    calls = shown["call"].isin(["up", "down"]).groupby(shown["target"], sort=False).any()
    assert calls.is_monotonic_decreasing


def test_of_several_seeds_the_first_is_shown_and_the_calls_of_all_are_counted(made, tmp_path):
    de = contracts.DE.read(made.root / "de.parquet")
    own = de[(de["method"].astype(str) == "stacked") & (de["target"].astype(str) == made.targets[0])].head(4)
    calls = [["none", "up", "none", "none"], ["up", "none", "none", "up"], ["up", "none", "none", "none"]]
    many = pd.concat([own.assign(seed=seed, call=call, lfc=float(seed)) for seed, call in enumerate(calls, 1)])
    shown = tables_html.top_calls(many, "stacked", "direction", per_target=3)
    genes = own["gene"].astype(str).tolist()
    assert shown["seeds"].tolist() == [2, 1, 1]
    assert shown["gene"][0] == genes[0] and set(shown["gene"][1:]) == {genes[1], genes[3]}
    assert (shown["lfc"] == 1.0).all()
    assert "seeds" not in tables_html.top_calls(own, "stacked", "direction", per_target=3)
    contracts.DE.write(de[de["seed"] == de["seed"].min()], tmp_path / "one.parquet")
    contracts.DE.write(pd.concat([de, de.assign(seed=de["seed"] + 1)]), tmp_path / "two.parquet")
    for name, said in (("one", False), ("two", True)):
        tables_html.write_de_page(de=tmp_path / f"{name}.parquet", out_html=tmp_path / "de.html", method="stacked")
        assert ("Of 2 seeds the first one is shown" in (tmp_path / "de.html").read_text()) == said


def test_a_page_of_many_targets_has_fewer_genes_of_each(made, tmp_path):
    tables_html.write_de_page(de=made.root / "de.parquet", out_html=tmp_path / "de.html", method="stacked", most=20)
    rows = Page((tmp_path / "de.html").read_text()).rows
    assert len(rows) - 1 <= 20


def test_an_unknown_method_is_named(made):
    with pytest.raises(UserError, match="scgpt"):
        tables_html.top_calls(contracts.DE.read(made.root / "de.parquet"), "scgpt", "t", 5)


def test_the_score_page_holds_the_mean_over_targets(made, tmp_path):
    scores = contracts.SCORES.read(made.scores)
    tables_html.write_score_page(scores=made.scores, out_html=tmp_path / "scores.html")
    heads, *rows = Page((tmp_path / "scores.html").read_text()).rows
    row = next(r for r in rows if r[:4] == ["mse", "all", "stacked", "yes"])
    mine = scores[(scores["metric"] == "mse") & (scores["method"] == "stacked") & scores["debiased"]]
    assert float(row[heads.index("mean")]) == pytest.approx(mine["value"].mean(), rel=0.01)
    assert row[heads.index("targets")] == str(len(made.targets))
    order = list(dict.fromkeys(r[2] for r in rows if r[:2] == ["mse", "all"]))
    assert order[:2] == ["stacked", "dbDiffusion"]
    assert rows[0][0] == "pearson_delta"


def test_the_page_says_how_many_calls_there_are_and_what_would_be(made, tmp_path):
    de = contracts.DE.read(made.root / "de.parquet")
    own = de[de["method"].astype(str) == "stacked"]
    called = own["call"].isin(["up", "down"])
    tables_html.write_de_page(de=made.root / "de.parquet", out_html=tmp_path / "de.html", method="stacked")
    assert (
        f"{called.sum()} calls in {own.loc[called, 'target'].nunique()} of {own['target'].nunique()} targets."
        in (tmp_path / "de.html").read_text()
    )
    tested = own["call"] != "no_call"
    q = np.where(tested, np.linspace(0.5, 0.13, len(own)), np.nan)
    none = own.assign(q_direction=q, call=np.where(tested, "none", "no_call"))
    text = tables_html.calls_in_words(none, "stacked", "direction", 0.1)
    assert text == f"No gene is called: the smallest q is {np.nanmin(q):.1%}. {(q <= 0.2).sum()} have a q of at most 0.2."
    # Without calls, targets of the best evidence come first.
    shown = tables_html.top_calls(none, "stacked", "direction", per_target=1)
    assert shown["q (direction)"].dropna().is_monotonic_increasing
    # With seeds each gene of a target counts once; where the test did not judge, the t test has.
    twice = pd.concat([none, none.assign(seed=2)])
    assert tables_html.calls_in_words(twice, "stacked", "direction", 0.1) == text
    assert tables_html.calls_in_words(none.assign(q_direction=np.nan, q_t=q), "stacked", "direction", 0.1) == text
    assert tables_html.calls_in_words(none.assign(q_selection=q, q_direction=0.3), "stacked", "selection", 0.1) == text
    one = none.assign(call=np.where(np.arange(len(none)) == 0, "up", "none"))
    assert tables_html.calls_in_words(pd.concat([one, one.assign(seed=2)]), "stacked", "direction", 0.1).startswith("1 calls in 1 of")
    assert tables_html.calls_in_words(none, "stacked", "direction", 0.5) == f"No gene is called: the smallest q is {np.nanmin(q):.1%}."
    assert tables_html.calls_in_words(none.assign(call="no_call"), "stacked", "direction", 0.1) == "No target could be tested."


def test_targets_of_most_calls_come_before_those_of_better_ones(made):
    de = contracts.DE.read(made.root / "de.parquet")
    own = de[(de["method"].astype(str) == "stacked") & de["target"].astype(str).isin(made.targets[:2])].copy()
    first, second = (np.flatnonzero(own["target"].astype(str) == t) for t in made.targets[:2])
    calls, q = np.full(len(own), "none", dtype=object), np.full(len(own), 0.5)
    calls[[*first[:1], *second[:2]]], q[first[:1]], q[second[:2]] = "up", 0.01, 0.05
    shown = tables_html.top_calls(own.assign(call=calls, q_direction=q), "stacked", "direction", per_target=1)
    assert shown["target"].tolist() == [made.targets[1], made.targets[0]]
    # One that is not called comes last, however small its q.
    calls[:], calls[first] = "none", "no_call"
    shown = tables_html.top_calls(own.assign(call=calls, q_direction=q), "stacked", "direction", per_target=1)
    assert shown["target"].tolist() == [made.targets[1], made.targets[0]]
