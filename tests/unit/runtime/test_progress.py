"""Long loops: log lines now and then where there is no terminal, a bar where there is one."""

from __future__ import annotations

import io
import sys

import pytest

from dbdiffusion.runtime import progress
from dbdiffusion.runtime.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when the test says so."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def no_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())


def test_logs_now_and_then(clock, no_terminal, caplog):
    caplog.set_level("INFO")
    with Progress(100, "training", every_seconds=10) as shown:
        for _ in range(50):
            clock[0] += 1
            shown.update(loss=0.25)
    assert len(caplog.messages) == 5
    assert caplog.messages[0] == "training 10/100 1.0/s 90 s left loss=0.25"


def test_the_end_is_logged(clock, no_terminal, caplog):
    caplog.set_level("INFO")
    with Progress(3, "training") as shown:
        for _ in range(3):
            shown.update()
    assert [m.split(" ")[1] for m in caplog.messages] == ["3/3"]


def test_rate_counts_from_where_a_resumed_loop_starts(clock, no_terminal, caplog):
    caplog.set_level("INFO")
    with Progress(100, "training", start=50, every_seconds=10) as shown:
        clock[0] += 10
        shown.update(20)
    assert caplog.messages == ["training 70/100 2.0/s 15 s left "]


def test_a_bar_on_a_terminal(monkeypatch, caplog):
    caplog.set_level("INFO")
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(2, "training") as shown:
        shown.update(loss=1.0)
        shown.update(loss=0.5)
    assert "training: 100%" in terminal.getvalue()
    assert "loss=0.5" in terminal.getvalue()
    assert caplog.messages == []
