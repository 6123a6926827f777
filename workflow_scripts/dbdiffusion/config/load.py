"""Reading the config: the user's values over the protocol's preset over the models' defaults, all checked before any job."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from dbdiffusion.config.checks import cross_checks
from dbdiffusion.config.datasets import CatalogueDataset, FileDataset, SimulateDataset
from dbdiffusion.config.parse import plain
from dbdiffusion.config.problems import Problem, block_problems, key_path
from dbdiffusion.config.root import Config
from dbdiffusion.runtime.errors import UserError, nearest

PROTOCOLS = ("crossfit", "reference")
PRESET_BLOCKS = (
    "qc", "panel", "splits", "embedding", "clusters", "location", "vae", "diffusion", "generation", "inference", "calibration",
)  # fmt: skip
"""Blocks that belong to a protocol. The benchmark does not: both protocols are judged alike."""
METHOD_BLOCKS = (*PRESET_BLOCKS, "benchmark")
DATASET_KINDS: dict[str, type[BaseModel]] = {
    "simulate": SimulateDataset,
    **dict.fromkeys(("h5ad", "10x_h5", "10x_mtx"), FileDataset),
    "catalogue": CatalogueDataset,
}
__all__ = ["config_slice", "load_config", "read_preset"]


def load_config(raw: Mapping[str, Any], *, root: Path) -> Config:
    """The checked config of a run.

    raw: what config.yaml, --configfile and --config hold together; root: the workflow's folder, which has `resources/`.
    Paths of datasets are looked up from the working directory. Raises one UserError that lists every problem found.
    """
    user = plain(raw)
    user = {key: {} if value is None and key in METHOD_BLOCKS else value for key, value in user.items()}
    problems = list(_unknown_blocks(user))
    protocol = user.get("protocol", "crossfit")
    if protocol not in PROTOCOLS:
        problems.append(Problem("protocol", protocol, "unknown protocol", nearest(str(protocol), PROTOCOLS)))
        protocol = "crossfit"
    merged = _merge(read_preset(root, protocol), {k: v for k, v in user.items() if k in Config.model_fields})
    merged["protocol"] = protocol
    blocks = {name: value for name, value in Config() if name not in merged}
    for name, value in merged.items():
        if name == "datasets":
            problems += _parse_datasets(value, blocks)
        elif name != "protocol":
            problems += _parse_block(name, value, blocks)
    problems += cross_checks(blocks, root)
    # Where a cross check names the key, the complaint about the block as a whole adds nothing.
    problems = [p for p in problems if p.key not in PRESET_BLOCKS or not any(o.key.startswith(f"{p.key}.") for o in problems)]
    if problems:
        order = list(Config.model_fields)
        problems.sort(key=lambda p: order.index(block) if (block := p.key.partition(".")[0]) in order else -1)
        raise UserError(_listing(problems, user, protocol), where="config", fix="mend these keys; docs/config.md explains every key")
    return Config.model_validate({**blocks, "protocol": protocol})


def read_preset(root: Path, protocol: str) -> dict[str, Any]:
    """The values of resources/protocols/{protocol}.yaml."""
    path = root / "resources" / "protocols" / f"{protocol}.yaml"
    if not path.is_file():
        raise UserError("protocol preset not found", where=str(path), fix="restore the file from the project's repository")
    return yaml.safe_load(path.read_text())


def config_slice(config: Config, *blocks: str) -> dict[str, Any]:
    """Blocks of the config as plain JSON-able values for a rule's params; `datasets.NAME` picks one dataset."""
    values = config.model_dump(mode="json")
    out = {}
    for name in sorted(blocks):
        block, _, entry = name.partition(".")
        out[name] = values[block][entry] if entry else values[block]
    return out


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, block by block."""
    out = dict(base)
    for key, value in over.items():
        out[key] = _merge(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def _unknown_blocks(user: dict[str, Any]) -> Iterator[Problem]:
    for key, value in user.items():
        if key not in Config.model_fields:
            homes = [name for name in METHOD_BLOCKS if key in Config.model_fields[name].annotation.model_fields]
            remedy = f"it belongs into block {' or '.join(map(repr, homes))}" if homes else nearest(str(key), Config.model_fields)
            yield Problem(str(key), value, "unknown key", remedy)


def _parse_block(name: str, value: Any, blocks: dict[str, Any]) -> list[Problem]:
    """Put the parsed block into `blocks`, or say what is wrong with it."""
    model = Config.model_fields[name].annotation
    try:
        blocks[name] = model.model_validate(value)
        return []
    except ValidationError as error:
        if all(detail["type"] == "value_error" and not detail["loc"] for detail in error.errors()):
            # Every key is well formed and only the block's own validator complains: the cross checks can tell more.
            blocks[name] = model.model_construct(**value)
        return list(block_problems(error, model, (name,)))


def _parse_datasets(value: Any, blocks: dict[str, Any]) -> list[Problem]:
    """Parse each dataset on its own, by its kind."""
    if not isinstance(value, dict) or not value:
        return [Problem("datasets", value, "no dataset is defined", "define one block per dataset, as in config.yaml")]
    problems: list[Problem] = []
    parsed: dict[str, Any] = {}
    for name, block in value.items():
        kind = block.get("kind") if isinstance(block, dict) else None
        model = DATASET_KINDS.get(kind) if isinstance(kind, str) else None
        if not isinstance(block, dict):
            problems.append(Problem(key_path("datasets", name), block, "is no block of keys", "indent its keys (kind, path, ...) below it"))
        elif model is None:
            what = "unknown kind of dataset" if "kind" in block else "key is missing"
            problems.append(Problem(key_path("datasets", name, "kind"), kind, what, nearest(str(kind), DATASET_KINDS)))
        else:
            try:
                parsed[name] = model.model_validate(block)
            except ValidationError as error:
                problems += block_problems(error, model, ("datasets", name))
    if not problems:
        blocks["datasets"] = parsed
    return problems


def _listing(problems: list[Problem], user: dict[str, Any], protocol: str) -> str:
    """All problems as a numbered list."""
    lines = [f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"]
    for number, problem in enumerate(problems, 1):
        origin = "" if _is_users(problem.key, user) else f" (from protocol {protocol})"
        lines.append(f"  {number}. {problem.key} = {_shown(problem.value)}{origin}: {problem.what}")
        lines.append(f"     Remedy: {problem.remedy}")
    return "\n".join(lines)


def _is_users(key: str, user: dict[str, Any]) -> bool:
    """Whether the user, not the preset, wrote the value at `key`."""
    block, _, rest = key.partition(".")
    if block not in PRESET_BLOCKS:
        return True
    values = user.get(block, {})
    return not isinstance(values, dict) or rest.partition(".")[0].partition("[")[0] in values


def _shown(value: Any, width: int = 60) -> str:
    text = "(nothing)" if value is None else repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."
