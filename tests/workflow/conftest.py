"""Runs of the real workflow on a tiny simulated screen, in copies of the project."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]
PARTS = ("Snakefile", "config.yaml", "rules", "workflow_scripts", "envs", "profiles", "resources", "tests/workflow", "tests/cluster")


@dataclass(frozen=True)
class Project:
    """A copy of the project with a configfile to run."""

    path: Path
    configfiles: tuple[str, ...] = ("tests/workflow/tiny.yaml",)

    def snakemake(
        self, *arguments: str, config: dict | None = None, check: bool = True, cores: int = 2
    ) -> subprocess.CompletedProcess[str]:
        """Run Snakemake in the copy, with `config` merged over the configfiles; with check, a failure shows its output."""
        command = [sys.executable, "-m", "snakemake", "--cores", str(cores), *arguments]
        configfiles = list(self.configfiles)
        if config:
            # A file, since --config reads every nested value as text.
            over = self.path / "override.yaml"
            over.write_text(yaml.safe_dump(config))
            configfiles.append(over.name)
        # `--configfile` last: it takes every word that follows.
        done = subprocess.run([*command, "--configfile", *configfiles], cwd=self.path, text=True, capture_output=True)
        if check and done.returncode:
            raise AssertionError(f"snakemake {arguments} failed\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
        return done


def copy_project(path: Path) -> Project:
    """The files that a run needs, copied to `path`, without results."""
    for part in PARTS:
        source = REPO / part
        target = path / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy2(source, target)
    return Project(path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The whole chain, run once for all tests that only look."""
    project = copy_project(tmp_path_factory.mktemp("finished"))
    project.snakemake()
    return project


@pytest.fixture
def fresh(tmp_path: Path) -> Project:
    """A copy of the project in which nothing was run."""
    return copy_project(tmp_path)
