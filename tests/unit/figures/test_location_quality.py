"""The location report is drawn from any tables, without text that leaves the page, and the same tables give the same bytes."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dbdiffusion.benchmark.location import COMBINATIONS, IN_USE, summarise
from dbdiffusion.figures import location_quality, style
from dbdiffusion.runtime import contracts


def write_table(
    path, *, fold="0", n=12, sources=("coexpression", "gene_sets:go_bp", "pairs:a_very_long_name_of_an_interaction_file"), roles=2
):
    """Random rows of every locator; combinations have no purity."""
    random = np.random.default_rng(int(fold))
    names = [IN_USE, COMBINATIONS, "cluster rule", *(f"{kind}: {source}" for kind in ("kernel", "ridge") for source in sources)]
    frames = []
    for role in ("target", "pseudo")[:roles]:
        for name in names:
            for features in ("given", "permuted"):
                frame = pd.DataFrame({"query": [f"{role}{i}" for i in range(n)], "baseline": random.gamma(4, 1, n)})
                frame["error"] = frame["baseline"] * (0.7 if features == "given" else 1.05) * random.gamma(9, 1 / 9, n)
                frame["purity"] = np.nan if name == COMBINATIONS else random.beta(2, 4, n)
                frame["confidence"] = random.random(n) if name in (IN_USE, COMBINATIONS) and features == "given" else np.nan
                frame["coverage"] = random.beta(12, 1.5, n) if name == IN_USE and features == "given" else np.nan
                frames.append(frame.assign(role=role, locator=name, features=features))
    columns = {
        "role": [],
        "query": [],
        "locator": [],
        "features": [],
        "baseline": [],
        "error": [],
        "purity": [],
        "confidence": [],
        "coverage": [],
    }
    table = pd.concat(frames) if frames else pd.DataFrame(columns)
    contracts.LOCATION_QUALITY.write(table.assign(seed=1, fold=fold, located=1.0, purity_random=0.2), path)
    return path


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for key in ("figure.dpi", "savefig.dpi"):
        monkeypatch.setitem(style.STYLE, key, 60)


@pytest.mark.parametrize(
    ("folds", "options"),
    [(3, {}), (1, {"n": 1}), (1, {"roles": 1}), (1, {"sources": ()}), (1, {"roles": 0})],
    ids=["three folds", "one query", "targets alone", "no source", "empty"],
)
def test_location_quality(folds, options, tmp_path, caplog):
    tables = [write_table(tmp_path / f"{fold}.parquet", fold=str(fold), **options) for fold in range(folds)]
    contracts.LOCATION_QUALITY.concatenate(tables, tmp_path / "whole.parquet")
    out = {"png": tmp_path / "a.png", "pdf": tmp_path / "a.pdf"}
    location_quality.draw_location_quality(table=tmp_path / "whole.parquet", bootstrap=50, **out)
    image = np.asarray(Image.open(out["png"]).convert("L"))
    assert image[[0, -1]].min() > 240
    assert image[:, [0, -1]].min() > 240
    assert (image < 200).mean() > 0.003
    assert out["pdf"].read_bytes().startswith(b"%PDF")
    assert not [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    before = out["png"].read_bytes(), out["pdf"].read_bytes()
    location_quality.draw_location_quality(table=tmp_path / "whole.parquet", bootstrap=50, **out)
    assert before == (out["png"].read_bytes(), out["pdf"].read_bytes())


def test_order_and_names(tmp_path):
    summary = summarise(contracts.LOCATION_QUALITY.read(write_table(tmp_path / "a.parquet")), resamples=20)
    order = location_quality.locator_order(summary)
    assert order[:2] == [IN_USE, COMBINATIONS]
    errors = summary[(summary["features"] == "given") & (summary["role"] == "pseudo")].set_index("locator")["error"]
    assert errors[order[2:]].is_monotonic_increasing
    assert location_quality.locator_name("kernel: gene_sets:go_bp") == "kernel, go bp"
    assert location_quality.locator_name("ridge: coexpression") == "ridge, coexpression"
    assert location_quality.locator_name("cluster rule") == "cluster rule"
