"""Profiles know every rule that asks for a GPU."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

REPO = Path(__file__).parents[2]


def gpu_rules() -> set[str]:
    """Rules with `gpu=GPUS`, and those that inherit it."""
    text = "\n".join(path.read_text() for path in sorted((REPO / "rules").glob("*.smk")))
    parts = re.split(r"^(?:use )?rule ", text, flags=re.M)[1:]
    found = {re.match(r"\w+", part)[0] for part in parts if "gpu=GPUS" in part and " as " not in part.split("\n")[0]}
    inherited = re.findall(r"^use rule (\w+) as (\w+)", text, flags=re.M)
    return found | {name for parent, name in inherited if parent in found}


def profile(path: str) -> dict:
    return yaml.safe_load((REPO / path / "config.yaml").read_text())


def test_gpu_rules_go_to_the_gpu_partition():
    rules = gpu_rules()
    assert {"train_vae", "train_diffusion", "generate", "generate_doubled"} <= rules
    for path in ("profiles/slurm", "tests/cluster/profile"):
        stated = profile(path)["set-resources"]
        assert {name: stated.get(name, {}).get("slurm_partition") for name in rules} == dict.fromkeys(rules, "gpu"), path


def test_gpu_rules_have_threads():
    for path in ("profiles/slurm", "profiles/gpu"):
        assert {entry.split("=")[0] for entry in profile(path)["set-threads"]} == gpu_rules(), path
