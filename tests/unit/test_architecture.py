"""The house rules that a reader relies on: imports run one way, the library knows no Snakemake, scripts are thin, nothing is pickled."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SCRIPTS = REPO / "workflow_scripts"
LIBRARY = SCRIPTS / "dbdiffusion"
# Lowest first. A room may import from itself and from rooms before it.
ROOMS = ["runtime", "config", "data", "perturbations", "generative", "inference", "benchmark", "figures"]
MODULES = sorted(LIBRARY.rglob("*.py"))


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(LIBRARY)))
def test_imports_run_one_way(path: Path):
    room = path.relative_to(LIBRARY).parts[0]
    if room not in ROOMS:
        return
    allowed = ROOMS[: ROOMS.index(room) + 1]
    # Config and runtime stand side by side: config renders the tables' reference, runtime never reads config.
    for name in imported(path):
        if name.startswith("dbdiffusion."):
            assert name.split(".")[1] in allowed, f"{path.name} imports upward: {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(LIBRARY)))
def test_library_knows_nothing_of_snakemake(path: Path):
    assert not any(name.split(".")[0] == "snakemake" for name in imported(path))


def test_library_has_no_import_circle():
    graph = {}
    for path in MODULES:
        name = ".".join(path.relative_to(SCRIPTS).with_suffix("").parts)
        graph[name] = {n for n in imported(path) if n.startswith("dbdiffusion.")}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name in done or name not in graph:
            return
        for other in sorted(graph[name]):
            visit(other, (*trail, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_scripts_are_thin():
    for path in sorted(SCRIPTS.glob("*.py")):
        assert len(path.read_text().splitlines()) <= 35, f"{path.name} is more than a call into the library"


def test_every_rule_has_environment_log_and_resources():
    for path in sorted((REPO / "rules").glob("*.smk")):
        for body in re.split(r"^rule ", path.read_text(), flags=re.M)[1:]:
            name = body.split(":")[0]
            for directive in ("log:", "conda:", "threads:", "mem_mb=", "runtime="):
                assert directive in body, f"{path.name}, rule {name}: no {directive}"
            if name in ("train_vae", "train_diffusion", "generate"):
                assert "gpu=" in body


def test_nothing_is_pickled():
    forbidden = re.compile(r"\b(pickle|joblib\.(dump|load)|torch\.(save|load)|allow_pickle=True)\b")
    for path in [*MODULES, *SCRIPTS.glob("*.py")]:
        assert not forbidden.search(path.read_text()), path


def test_compiled_loops_are_in_one_file():
    """numba keeps compiled loops until their own file changes: one that calls a function of another file would go stale."""
    assert [path.name for path in MODULES if "numba" in {name.split(".")[0] for name in imported(path)}] == ["kernels.py"]


def test_environments_are_pinned_from_the_lock():
    sys.path.insert(0, str(REPO / "envs"))
    import pin

    assert pin.main(["--check"]) == 0
    assert "torch==2.13.0" in (REPO / "requirements.lock").read_text().splitlines()
