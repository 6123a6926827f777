"""The figure of cell quality is drawn from any table, a perturbation counts once, and the same table gives the same bytes."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dbdiffusion.figures import cell_quality
from dbdiffusion.runtime import contracts


def table(roles: tuple[str, ...] = ("seen", "unseen"), n: int = 6, fold: str = "0") -> pd.DataFrame:
    random = np.random.default_rng(0)
    rows = [
        (1, fold, role, f"P{i}", sample, metric, random.normal(best, 0.1))
        for role in roles
        for i in range(n)
        for sample in cell_quality.SAMPLES
        for metric, (_, best) in cell_quality.PANELS.items()
    ]
    return pd.DataFrame(rows, columns=[column.name for column in contracts.CELL_QUALITY.columns]).astype({"seed": int, "value": float})


@pytest.mark.parametrize(("roles", "n"), [(("seen", "unseen"), 6), (("unseen",), 1), ((), 0)])
def test_drawn_whole_and_the_same_again(tmp_path, out, caplog, roles, n):
    contracts.CELL_QUALITY.write(table(roles, n), tmp_path / "t.parquet")
    with caplog.at_level(logging.WARNING):
        cell_quality.draw_cell_quality(quality=tmp_path / "t.parquet", **out)
    assert not caplog.records
    with Image.open(out["png"]) as picture:
        assert picture.size[0] > 1500 and len(picture.convert("L").getcolors()) > 10
    first = out["pdf"].read_bytes()
    cell_quality.draw_cell_quality(quality=tmp_path / "t.parquet", **out)
    assert out["pdf"].read_bytes() == first


def test_a_perturbation_of_two_folds_counts_once():
    both = pd.concat([table(("seen",)), table(("seen",), fold="1").assign(value=3.0)])
    found = cell_quality.summarise(both).set_index(["metric", "sample"])
    assert (found["n"] == 6).all()
    one = cell_quality.summarise(table(("seen",))).set_index(["metric", "sample"])
    np.testing.assert_allclose(found["mean"], (one["mean"] + 3.0) / 2)
