"""Costs from Snakemake's benchmark files."""

from __future__ import annotations

import numpy as np
import pytest

from dbdiffusion.benchmark.compute import write_compute
from dbdiffusion.runtime import contracts
from dbdiffusion.runtime.errors import UserError
from dbdiffusion.runtime.files import write_json

HEAD = "s\th:m:s\tmax_rss\tmax_vms\tmax_uss\tmax_pss\tio_in\tio_out\tmean_load\tcpu_time\n"


def test_write_compute(tmp_path):
    for name, row in {"a": "10.5\t0:00:10\t2048.00", "b": "20.0\t0:00:20\t1024.00", "c": "0.1\t0:00:00\t-"}.items():
        (tmp_path / f"{name}.tsv").write_text(HEAD + row + "\t1\t1\t1\t0\t0\t0\t0\n")
    write_json(tmp_path / "gpu.json", {"device": "NVIDIA X", "gpu_memory_gib": 3.5})
    write_json(tmp_path / "more.json", {"device": "NVIDIA X", "gpu_memory_gib": 4.5})
    write_compute(
        benchmarks={
            "train_vae": [tmp_path / "a.tsv", tmp_path / "b.tsv"],
            "generate": [tmp_path / "b.tsv"],
            "quick": [tmp_path / "c.tsv"],
            "never": [],
        },
        records={"train_vae": [tmp_path / "gpu.json", tmp_path / "more.json"], "generate": [tmp_path / "gpu.json"]},
        measured=("train_vae",),
        out=tmp_path / "compute.parquet",
    )
    table = contracts.COMPUTE.read(tmp_path / "compute.parquet").set_index("rule")
    assert list(table.index) == ["generate", "quick", "train_vae"]
    assert table.loc["train_vae"].to_dict() == {"jobs": 2, "seconds": 30.5, "peak_memory": 2.0, "gpu_memory": 4.5, "device": "NVIDIA X"}
    # Where generation ran is known from the training's record, what it took of the GPU is not.
    assert table.loc["generate", "device"] == "NVIDIA X" and np.isnan(table.loc["generate", "gpu_memory"])
    assert table.loc["quick", "device"] == "cpu"
    assert table.loc["quick", "peak_memory"] == 0
    assert np.isnan(table.loc["quick", "gpu_memory"])


def test_no_jobs_and_a_foreign_file(tmp_path):
    write_compute(benchmarks={}, records={}, measured=(), out=tmp_path / "compute.parquet")
    assert contracts.COMPUTE.read(tmp_path / "compute.parquet").empty
    (tmp_path / "x.tsv").write_text("time\n1\n")
    with pytest.raises(UserError, match="max_rss"):
        write_compute(benchmarks={"r": [tmp_path / "x.tsv"]}, records={}, measured=(), out=tmp_path / "compute.parquet")
