"""The device is the one that was asked for, or an error with a remedy."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from dbdiffusion.runtime import device
from dbdiffusion.runtime.device import resolve_device, set_threads
from dbdiffusion.runtime.errors import UserError


@pytest.fixture(autouse=True)
def own_locks(tmp_path, monkeypatch):
    """Locks in a folder of this test, and none held from before."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(device, "_HELD", [])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    device._free_gpu.cache_clear()
    yield
    device._free_gpu.cache_clear()
    for handle in device._HELD:
        device.os.close(handle)


def gpus(monkeypatch, count: int) -> None:
    """Pretend that so many GPUs are visible."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_auto(monkeypatch):
    gpus(monkeypatch, 0)
    assert resolve_device("auto") == torch.device("cpu")
    gpus(monkeypatch, 2)
    assert resolve_device("auto") == torch.device("cuda:0")


def test_cpu_is_the_cpu_even_beside_a_gpu(monkeypatch):
    gpus(monkeypatch, 1)
    assert resolve_device("cpu") == torch.device("cpu")


def test_cuda(monkeypatch):
    gpus(monkeypatch, 2)
    assert resolve_device("cuda") == torch.device("cuda:0")
    assert resolve_device("cuda:1") == torch.device("cuda:1")


def test_a_process_stays_on_its_gpu(monkeypatch):
    gpus(monkeypatch, 2)
    assert resolve_device("cuda") == resolve_device("auto") == resolve_device("cuda")


def test_jobs_side_by_side_take_different_gpus(monkeypatch, tmp_path):
    """Another process holds GPU 0 (here: its lock) for as long as it lives."""
    gpus(monkeypatch, 2)
    lock = tmp_path / f"dbdiffusion-{device.os.getuid()}-gpu0.lock"
    code = f"import fcntl, sys; f = open({str(lock)!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    assert resolve_device("auto") == torch.device("cuda:1")
    other.communicate()
    device._free_gpu.cache_clear()
    assert resolve_device("auto") == torch.device("cuda:0")


def test_locks_are_named_by_the_devices_that_the_scheduler_shows(monkeypatch, tmp_path):
    gpus(monkeypatch, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-GPU-1/7/0,3")
    assert resolve_device("cuda") == torch.device("cuda:0")
    assert [Path(p).name.partition("-gpu")[2] for p in sorted(tmp_path.iterdir())] == ["MIG-GPU-1-7-0.lock"]


@pytest.mark.parametrize(("asked", "count"), [("cuda", 0), ("cuda:0", 0), ("cuda:2", 2)])
def test_a_gpu_that_is_not_there(monkeypatch, asked, count):
    gpus(monkeypatch, count)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(UserError) as caught:
        resolve_device(asked)
    message = str(caught.value)
    assert repr(asked) in message
    assert "run.device" in message
    assert "CUDA_VISIBLE_DEVICES='7'" in message
    assert "set run.device: auto or cpu" in message
    assert "envs/torch-cuda.yaml" in message


@pytest.mark.parametrize("asked", ["gpu", "cuda:x", "cuda:-1", ""])
def test_an_unknown_device(asked):
    with pytest.raises(UserError, match=r"run\.device"):
        resolve_device(asked)


def test_threads():
    before = torch.get_num_threads()
    try:
        set_threads(1)
        assert torch.get_num_threads() == 1
        set_threads(0)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
