"""The workflow under a real Slurm on this machine: GPU jobs ask for a GPU, and everything arrives.

Run by hand with `bash tests/cluster/slurm_local.sh up && .venv/bin/python -m pytest tests/cluster` (root, Debian).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "workflow"))
from conftest import copy_project

pytestmark = pytest.mark.skipif(
    shutil.which("sinfo") is None or subprocess.run(["sinfo"], capture_output=True).returncode != 0,
    reason="no Slurm here: start one with tests/cluster/slurm_local.sh up",
)


def test_gpu_jobs_get_a_gpu_and_the_fold_is_made(tmp_path: Path):
    project = copy_project(tmp_path)
    target = "results/tiny/seed1/fold0/crossfit0/generated.h5ad"
    # `auto` asks Slurm for a GPU and falls back to the CPU where torch sees none: the machine's GPUs are pretended.
    done = project.snakemake(target, "--workflow-profile", "tests/cluster/profile", "--verbose")
    assert (project.path / target).exists()
    submitted = [line for line in (done.stdout + done.stderr).splitlines() if "sbatch" in line and "train_vae" in line]
    assert submitted
    assert any("--gpus" in line or "--gres" in line for line in submitted)
    logs = list((project.path / ".snakemake/slurm_logs").rglob("*.log"))
    states = subprocess.run(["scontrol", "show", "jobs"], capture_output=True, text=True).stdout
    assert logs or "COMPLETED" in states
