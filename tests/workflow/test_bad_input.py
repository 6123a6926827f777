"""Bad config and bad data stop with one clear message: what, where, and the remedy."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ({"vae": {"latnet": 8}}, ["vae.latnet", "latent"]),
        ({"vae": {"learning_rate": "high"}}, ["vae.learning_rate", "high"]),
        ({"run": {"datasets": ["tinny"]}}, ["run.datasets", "tinny", "tiny"]),
        ({"splits": {"folds": 1}}, ["splits.folds", "at least 2"]),
        ({"protocol": "refrence"}, ["protocol", "refrence", "reference"]),
    ],
)
def test_config_errors_stop_before_the_dag(fresh, override: dict, expected: list[str]):
    done = fresh.snakemake("--dry-run", config=override, check=False)
    assert done.returncode != 0
    message = done.stdout + done.stderr
    assert "Traceback" not in message
    assert all(word in message for word in expected), message
    assert "Building DAG" not in message


def test_more_folds_than_perturbations(fresh):
    done = fresh.snakemake("--dry-run", config={"splits": {"folds": 99}}, check=False)
    assert done.returncode != 0
    message = done.stdout + done.stderr
    assert "splits.folds" in message
    assert "folds" in message
    assert "20" in message
    assert "Traceback" not in message


def test_a_failed_stage_leaves_nothing_half_written(fresh):
    # Every perturbation has fewer cells than asked for: QC finds it out, and says so in its log.
    done = fresh.snakemake("results/tiny/qc/cells.h5ad", config={"qc": {"min_cells_per_perturbation": 5000}}, check=False)
    assert done.returncode != 0
    log = (fresh.path / "results/logs/tiny/qc.log").read_text()
    assert "Fix:" in log
    assert "Traceback" not in log
    assert not list((fresh.path / "results/tiny/qc").glob("*"))


def test_gpu_asked_for_but_absent(fresh):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    target = "results/tiny/seed1/fold0/crossfit0/vae.safetensors"
    done = fresh.snakemake(target, config={"run": {"device": "cuda"}}, check=False)
    assert done.returncode != 0
    log = (fresh.path / "results/logs/tiny/seed1/fold0/crossfit0/train_vae.log").read_text()
    assert "run.device" in log
    assert "Traceback" not in log
