"""Inputs shared by the figure tests, made once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# Tests are imported one by one (import mode importlib), so the folder of their shared module has to be named.
sys.path.insert(0, str(Path(__file__).parent))

from figure_inputs import Inputs, write_inputs  # noqa: E402


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Inputs:
    return write_inputs(tmp_path_factory.mktemp("figures"))


@pytest.fixture
def out(tmp_path):
    """Keyword arguments png and pdf of a drawing function."""
    return {"png": tmp_path / "figure.png", "pdf": tmp_path / "figure.pdf"}
