"""A stage's log: everything is in the file, and a user's error has no traceback."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from dbdiffusion.runtime.errors import UserError, nearest
from dbdiffusion.runtime.log import stage_log

REPO = Path(__file__).resolve().parents[3]


def run(body: str, log: Path) -> subprocess.CompletedProcess[str]:
    """A script with one stage, as a rule runs it."""
    code = (
        "import logging, warnings\nfrom dbdiffusion.runtime.errors import UserError\nfrom dbdiffusion.runtime.log import stage_log\n"
        f"with stage_log({str(log)!r}) as logger:\n    {body}\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPO / "workflow_scripts")}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_a_user_error_ends_with_its_message_alone(tmp_path):
    log = tmp_path / "logs" / "stage.log"
    done = run("raise UserError('no column guide', where='screen.h5ad', fix='name it')", log)
    assert done.returncode == 1
    for text in (done.stderr, log.read_text()):
        assert "screen.h5ad: no column guide" in text
        assert "Fix: name it" in text
        assert "Traceback" not in text


def test_any_other_error_keeps_its_traceback(tmp_path):
    log = tmp_path / "stage.log"
    done = run("1 / 0", log)
    assert done.returncode == 1
    for text in (done.stderr, log.read_text()):
        assert "Traceback" in text
        assert "ZeroDivisionError" in text


def test_warnings_and_records_are_in_the_file(tmp_path):
    log = tmp_path / "stage.log"
    done = run("logging.getLogger('dbdiffusion.x').info('kept 3 cells'); warnings.warn('odd counts')", log)
    assert done.returncode == 0
    for text in (done.stderr, log.read_text()):
        assert "INFO dbdiffusion.x: kept 3 cells" in text
        assert "odd counts" in text


def test_an_older_log_is_replaced(tmp_path):
    log = tmp_path / "stage.log"
    log.write_text("old")
    run("logger.info('new')", log)
    assert "old" not in log.read_text()
    assert "new" in log.read_text()


def test_handlers_and_warnings_are_put_back(tmp_path):
    root = logging.getLogger()
    before = (list(root.handlers), root.level, list(warnings.filters), warnings.showwarning)
    with stage_log(tmp_path / "stage.log"):
        pass
    with pytest.raises(SystemExit), stage_log(tmp_path / "stage.log"):
        raise UserError("x", where="y", fix="z")
    assert before == (list(root.handlers), root.level, list(warnings.filters), warnings.showwarning)


def test_nearest_choice():
    assert nearest("latnt", ["latent", "hidden"]) == "did you mean 'latent'?"
    assert nearest("zzz", ["latent", "hidden"]) == "choose one of: latent, hidden"
    assert nearest("zzz", [f"g{i}" for i in range(100)]).endswith("g11, ...")
    assert nearest("zzz", []) == "there is no valid choice"
