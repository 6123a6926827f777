"""Each stage's environment holds what its scripts import: the pip section is installed into a fresh venv and tried."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import yaml

from dbdiffusion.runtime.provenance import library_files

REPO = Path(__file__).resolve().parents[2]
ENVIRONMENTS = ["data", "torch", "inference", "figures"]


def scripts_of(environment: str) -> list[Path]:
    """Scripts of the rules that name the environment."""
    found = []
    for path in sorted((REPO / "rules").glob("*.smk")):
        for body in re.split(r"^rule ", path.read_text(), flags=re.M)[1:]:
            conda = "torch" if "TORCH_ENV" in body else (re.search(r"envs/([\w-]+)\.yaml", body) or [None, ""])[1]
            script = re.search(r'"\.\./workflow_scripts/(\w+\.py)"', body)
            if conda == environment and script:
                found.append(REPO / "workflow_scripts" / script[1])
    return found


def third_party(paths: list[Path]) -> set[str]:
    """Names of packages that the files import, at the top or inside functions."""
    names = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split(".")[0])
    return {name for name in names if name not in sys.stdlib_module_names and name not in ("dbdiffusion", "__future__")}


def test_every_script_belongs_to_an_environment():
    assert {p for e in ENVIRONMENTS for p in scripts_of(e)} == set((REPO / "workflow_scripts").glob("*.py"))


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_environment_imports_its_stages(environment: str, tmp_path: Path):
    text = (REPO / "envs" / f"{environment}.yaml").read_text()
    (pip,) = [entry["pip"] for entry in yaml.safe_load(text)["dependencies"] if isinstance(entry, dict)]
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pip], check=True, capture_output=True, text=True
    )

    scripts = scripts_of(environment)
    files = {f for script in scripts for f in library_files(script)}
    names = sorted(third_party([*scripts, *files]))
    modules = sorted(".".join(f.relative_to(REPO / "workflow_scripts").with_suffix("").parts) for f in files)
    code = (
        f"import importlib, json, sys\nfor name in json.loads({json.dumps(json.dumps([*names, *modules]))}): importlib.import_module(name)"
    )
    done = subprocess.run([python, "-c", code], cwd=REPO / "workflow_scripts", capture_output=True, text=True)
    assert done.returncode == 0, f"{environment}: {done.stderr[-1500:]}"
