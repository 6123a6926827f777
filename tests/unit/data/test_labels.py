"""Every dialect of perturbation labels, and what is refused."""

import numpy as np
import pandas as pd
import pytest

from dbdiffusion.config.datasets import Labels
from dbdiffusion.data.labels import DROPPED, KEPT, MULTI, UNASSIGNED, LabelParser, canonical_labels, require_column
from dbdiffusion.runtime.errors import UserError


def parse(label, genes=(), **config):
    parsed = LabelParser(Labels(**config), genes).parse(label)
    return parsed.name if parsed.status == KEPT else f"<{parsed.status}>"


@pytest.mark.parametrize("label", ["control", "Control", "ctrl", "CTRL", "non-targeting", "Non-Targeting", "NT", "nt", " control "])
def test_control_labels_in_any_case(label):
    assert parse(label) == "control"


@pytest.mark.parametrize("label", ["NT_1", "sgNT", "NegCtrl10", "controls", "ctrl1"])
def test_guide_like_controls_only_when_listed(label):
    assert parse(label) == label
    assert parse(label, control=["control", label.lower()]) == "control"


@pytest.mark.parametrize(
    ("label", "separator", "expected"),
    [
        ("STAT1", "+", "STAT1"),
        ("A+ctrl", "+", "A"),
        ("ctrl+A", "+", "A"),
        ("A+control", "+", "A"),
        ("ctrl+ctrl", "+", "control"),
        ("A_control", "_", "A"),
        ("NT_A", "_", "A"),
        ("B+A", "+", "A+B"),
        ("B_A", "_", "A+B"),
        ("B,A", ",", "A+B"),
        ("B, A", ",", "A+B"),
        ("B--A", "--", "A+B"),
        ("A+A", "+", "A"),
        ("C_A_B", "_", "A+B+C"),
        ("A_non-targeting", "_", "A"),
        ("A-non-targeting", "-", "A"),
        ("A+", "+", "A"),
        ("non-targeting", "-", "control"),
        ("A_B", None, "A_B"),
    ],
)
def test_combinations(label, separator, expected):
    assert parse(label, combination_separator=separator) == expected


@pytest.mark.parametrize(
    ("label", "separator", "expected"),
    [
        ("HLA-A", "-", "HLA-A"),
        ("HLA-A-STAT1", "-", "HLA-A+STAT1"),
        ("STAT1-HLA-A", "-", "HLA-A+STAT1"),
        ("HLA-A-HLA-B", "-", "HLA-A+HLA-B"),
        ("HLA-A-ctrl", "-", "HLA-A"),
        ("Y_RNA", "_", "Y_RNA"),
        ("Y_RNA_STAT1", "_", "STAT1+Y_RNA"),
        ("UNKNOWN_STAT1", "_", "STAT1+UNKNOWN"),
    ],
)
def test_separator_inside_a_known_gene(label, separator, expected):
    assert parse(label, genes={"HLA-A", "HLA-B", "Y_RNA", "STAT1"}, combination_separator=separator) == expected


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("A--B", "<multi_guide>"),
        ("A--A", "A"),
        ("A--non-targeting", "A"),
        ("non-targeting--non-targeting", "control"),
        ("A--B--non-targeting", "<multi_guide>"),
        ("A+B", "A+B"),
        ("A+B--A+B", "<multi_guide>"),
        ("A", "A"),
    ],
)
def test_multi_guide_separator(label, expected):
    # A declared combination that stands in several guides of one cell names several genes: it cannot be told from two guides.
    assert parse(label, multi_guide_separator="--") == expected


def test_same_separator_for_both_makes_combinations():
    assert parse("B_A", combination_separator="_", multi_guide_separator="_") == "A+B"


@pytest.mark.parametrize("label", [None, np.nan, pd.NA, "", "  ", "nan", "NaN", "None", "NA", "<NA>", "+"])
def test_missing_labels_are_unassigned(label):
    assert parse(label) == "<unassigned>"


def test_missing_word_may_be_a_control():
    assert parse("NA", control=["NA"]) == "control"


def test_dropped_labels_also_inside_combinations():
    config = {"drop": ["*", "Doublet"]}
    assert parse("*", **config) == parse("doublet", **config) == parse("A+doublet", **config) == "<dropped_label>"


@pytest.mark.parametrize(
    ("label", "pattern", "expected"),
    [
        ("CARS_pDS460", r"^(.+)_p[A-Za-z]+[0-9]+$", "CARS"),
        ("HLA-A_pBA12", r"(.+)_p[A-Za-z]+[0-9]+", "HLA-A"),
        ("CARS", r"^(.+)_p[A-Za-z]+[0-9]+$", "CARS"),
        ("STAT1g2", r"(.+)g[0-9]+", "STAT1"),
        ("NTg5", r"(.+)g[0-9]+", "control"),
    ],
)
def test_pattern_takes_the_gene_out_of_a_label(label, pattern, expected):
    assert parse(label, pattern=pattern) == expected


@pytest.mark.parametrize("pattern", ["(", "no group"])
def test_bad_pattern_is_refused(pattern):
    with pytest.raises(ValueError, match="pattern"):
        Labels(pattern=pattern)


def test_cells_and_report():
    raw = pd.Series(["control", "A", "B+A", "ctrl+A", np.nan, "doublet", "A|B", "A|A", "A+A"])
    config = Labels(drop=["doublet"], multi_guide_separator="|")
    result = canonical_labels(raw, config, where="f")
    assert list(result.names) == ["control", "A", "A+B", "A", "", "", "", "A", "A"]
    assert list(result.status) == [KEPT, KEPT, KEPT, KEPT, UNASSIGNED, DROPPED, MULTI, KEPT, KEPT]
    expected = {"cells": 9, "cells_kept": 6, "cells_control": 1, "cells_unassigned": 1, "cells_dropped_label": 1, "cells_multi_guide": 1}
    assert expected.items() <= result.report.items()
    assert (result.report["singles"], result.report["combinations"], result.report["cells_collapsed"]) == (1, 1, 3)
    assert result.report["dropped_labels"] == {"unassigned": {"nan": 1}, "dropped_label": {"doublet": 1}, "multi_guide": {"A|B": 1}}


def test_categories_and_order_do_not_matter():
    raw = pd.Series(["A", "control", "B+A", None, "A"])
    plain = canonical_labels(raw, Labels(), where="f")
    category = canonical_labels(raw.astype("category"), Labels(), where="f")
    assert list(plain.names) == list(category.names) == ["A", "control", "A+B", "", "A"]


def test_no_control_names_frequent_and_nearest_labels():
    with pytest.raises(UserError) as error:
        canonical_labels(pd.Series(["A"] * 3 + ["controls"] * 2), Labels(), where="cells.h5ad, column 'p'")
    assert "'A' (3 cells)" in str(error.value)
    assert "did you mean 'controls'" in str(error.value)
    assert "cells.h5ad" in str(error.value)


def test_control_is_a_reserved_name():
    with pytest.raises(UserError, match="not listed under labels.control"):
        canonical_labels(pd.Series(["NT", "A", "Control"]), Labels(control=["NT"]), where="f")


def test_only_controls_is_refused():
    with pytest.raises(UserError, match="no perturbed cell"):
        canonical_labels(pd.Series(["control", "NT"]), Labels(), where="f")


@pytest.mark.parametrize("label", ["A_B", "A_ctrl", "A,B", "A--B"])
def test_labels_joined_by_another_separator_are_refused(label):
    with pytest.raises(UserError) as error:
        canonical_labels(pd.Series(["control", "A", "B", label]), Labels(), where="f")
    assert repr(label) in str(error.value)
    assert "combination_separator" in error.value.fix


def test_joined_labels_are_names_when_there_are_no_combinations_or_a_gene_is_called_so():
    raw = pd.Series(["control", "A", "B", "A_B"])
    assert canonical_labels(raw, Labels(combination_separator=None), where="f").names[3] == "A_B"
    assert canonical_labels(raw, Labels(), genes={"A_B"}, where="f").names[3] == "A_B"


def test_plus_is_reserved():
    with pytest.raises(UserError, match="stands for combinations"):
        canonical_labels(pd.Series(["control", "A+B"]), Labels(combination_separator="_"), where="f")


def test_a_label_both_control_and_dropped_is_refused():
    with pytest.raises(UserError, match="both"):
        LabelParser(Labels(drop=["nt"]))


def test_missing_column_names_the_nearest():
    with pytest.raises(UserError) as error:
        require_column(pd.DataFrame({"perturbation": ["a"]}), "pertubation", where="f", key="columns.perturbation")
    assert "did you mean 'perturbation'" in str(error.value)
