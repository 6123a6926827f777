"""The calibration study as a rule."""

from __future__ import annotations

import pandas as pd


def test_study_runs_in_several_processes_and_has_its_figure(fresh):
    fresh.snakemake("calibration_study", config={"calibration": {"study_screens": 2}})
    found = pd.read_parquet(fresh.path / "results/calibration/study.parquet")
    assert found.groupby(["difficulty", "perturbations", "generator"]).ngroups == 18
    assert set(found["screens"]) == {2}
    assert (fresh.path / "results/calibration/study.png").stat().st_size > 10_000
    assert "Nothing to be done" in fresh.snakemake("calibration_study", "-n", config={"calibration": {"study_screens": 2}}).stdout
