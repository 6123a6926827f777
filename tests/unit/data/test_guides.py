"""Guide assignment by threshold and share."""

import numpy as np
import pytest
import scipy.sparse as sp

from dbdiffusion.config.datasets import GuideAssignment, Labels
from dbdiffusion.data.guides import assign_guides, guide_targets
from dbdiffusion.runtime.errors import UserError

TABLE = {"gA1": "A", "gA2": "A", "gB1": "B", "gC1": "C", "nt1": "non-targeting", "nt2": "NT", "gAB": "B+A"}
GUIDES = list(TABLE)
TARGETS = [("A",), ("A",), ("B",), ("C",), (), (), ("A", "B")]


def assign(cells, **config):
    counts = sp.csr_matrix(np.array([[cell.get(guide, 0) for guide in GUIDES] for cell in cells], dtype=float))
    return assign_guides(counts, GUIDES, TARGETS, GuideAssignment(**config))


def test_targets_from_the_table():
    assert guide_targets(GUIDES, TABLE, Labels(), where="t") == TARGETS


@pytest.mark.parametrize(
    ("cell", "perturbation", "guide", "status"),
    [
        ({"gA1": 5}, "A", "gA1", "assigned"),
        ({"gA1": 4}, "", "", "unassigned"),
        ({}, "", "", "unassigned"),
        ({"gA1": 16, "gB1": 4}, "A", "gA1", "assigned"),
        ({"gA1": 15, "gB1": 4}, "", "", "unassigned"),
        ({"gA1": 50, "gC1": 5}, "", "", "multi"),
        ({"gA1": 9, "gA2": 6}, "A", "gA1;gA2", "assigned"),
        ({"gA2": 9, "nt1": 6}, "A", "gA2;nt1", "assigned"),
        ({"nt1": 9, "nt2": 6}, "control", "nt1;nt2", "assigned"),
        ({"nt2": 9}, "control", "nt2", "assigned"),
        ({"gAB": 9}, "A+B", "gAB", "assigned"),
        ({"gA1": 9, "gB1": 7}, "A+B", "gA1;gB1", "assigned"),
        ({"gAB": 9, "gA1": 7}, "A+B", "gA1;gAB", "assigned"),
        ({"gA1": 9, "gB1": 7, "gC1": 8}, "", "", "multi"),
        ({"gB1": 9, "gC1": 7}, "", "", "multi"),
    ],
)
def test_one_cell(cell, perturbation, guide, status):
    table, _ = assign([cell])
    assert tuple(table.loc[0, ["perturbation", "guide", "status"]]) == (perturbation, guide, status)


def test_thresholds_are_used():
    assert assign([{"gA1": 4}], min_counts=4)[0].loc[0, "status"] == "assigned"
    assert assign([{"gA1": 15, "gB1": 4}], min_share=0.75)[0].loc[0, "status"] == "assigned"


def test_report_adds_up():
    table, report = assign([{"gA1": 5}, {}, {"gA1": 4, "gB1": 3}, {"gA1": 15, "gB1": 4}, {"gB1": 9, "gC1": 9}, {"gA1": 9, "gA2": 9}])
    assert report["assigned"] + report["no_guide_present"] + report["share_too_small"] + report["multi"] == report["cells"] == len(table)
    assert (report["assigned"], report["no_guide_present"], report["share_too_small"], report["multi"]) == (2, 2, 1, 1)
    assert report["assigned_with_several_guides"] == 1


def test_against_a_slow_oracle():
    counts = np.random.default_rng(0).poisson(2.5, (300, len(GUIDES)))
    table, _ = assign_guides(sp.csr_matrix(counts), GUIDES, TARGETS, GuideAssignment(min_counts=4, min_share=0.6))
    for row, got in zip(counts, table.itertuples(), strict=True):
        present = [i for i, n in enumerate(row) if n >= 4]
        genes = {gene for i in present for gene in TARGETS[i]}
        share = sum(row[i] for i in present) / max(row.sum(), 1)
        if not present:
            expected = ""
        elif len(genes) > 1 and genes != {"A", "B"}:
            expected = "multi"
        elif share >= 0.6:
            expected = "+".join(sorted(genes)) or "control"
        else:
            expected = ""
        assert (got.status if got.status == "multi" else got.perturbation) == expected
        assert got.share == pytest.approx(share)


def test_guide_without_target_names_the_nearest():
    with pytest.raises(UserError) as error:
        guide_targets(["gA1", "gB2"], TABLE, Labels(), where="guides.tsv")
    assert "gB2" in str(error.value)
    assert "did you mean" in str(error.value)
    assert "guides.tsv" in str(error.value)


def test_guide_with_an_empty_target_is_refused():
    with pytest.raises(UserError, match="unassigned"):
        guide_targets(["g"], {"g": ""}, Labels(), where="t")
