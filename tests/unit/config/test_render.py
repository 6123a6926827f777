"""Generated files are what the models say, and the models are documented."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from dbdiffusion.config import render
from dbdiffusion.config.datasets import CatalogueDataset, FileDataset, SimulateDataset
from dbdiffusion.config.problems import _models
from dbdiffusion.config.root import Config

REPO = Path(__file__).resolve().parents[3]


def test_nothing_has_drifted(capsys):
    assert render.main(["--check"]) == 0, f"run {render.COMMAND}; {capsys.readouterr().err}"


def test_drift_is_noticed(tmp_path):
    for name in render.RENDERED:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(render.RENDERED[name]())
    assert render.drifted(tmp_path) == []
    (tmp_path / "config.yaml").write_text((tmp_path / "config.yaml").read_text().replace("#free_bits: 0.0", "#free_bits: 0.1"))
    (tmp_path / "docs/tables.md").unlink()
    assert render.drifted(tmp_path) == ["config.yaml", "docs/tables.md"]


def _blocks(model: type, seen: dict) -> dict:
    seen[model.__name__] = model
    for info in model.model_fields.values():
        for inner in _models(info.annotation):
            if inner.__name__ not in seen:
                _blocks(inner, seen)
    return seen


BLOCKS = {name: model for top in (Config, SimulateDataset, FileDataset, CatalogueDataset) for name, model in _blocks(top, {}).items()}


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_every_block_and_key_is_documented(name):
    assert BLOCKS[name].__doc__
    undocumented = [key for key, info in BLOCKS[name].model_fields.items() if not info.description and not list(_models(info.annotation))]
    assert undocumented == []


@pytest.mark.parametrize(
    "value",
    [
        1e-3,
        1e-5,
        2.5e-07,
        1e20,
        0.0,
        1.0,
        3,
        True,
        None,
        "auto",
        "+",
        "NO",
        "1e-3",
        "cuda:0",
        "a b",
        "x: y",
        "",
        "#",
        [1.0e-6, 2],
        {"a": [None, "off"]},
    ],
)
def test_yaml_values_read_back_as_they_are(value):
    back = yaml.safe_load(render.yaml_value(value))
    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize("name", ["config.yaml", "resources/protocols/crossfit.yaml", "resources/protocols/reference.yaml"])
def test_shipped_yaml_fits_the_schema_and_the_page(name):
    schema = json.loads((REPO / "resources/config.schema.json").read_text())
    text = (REPO / name).read_text()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(yaml.safe_load(text), schema)
    assert max(map(len, text.splitlines())) <= 140
    assert text.isascii()


def test_schema_refuses_what_the_models_refuse():
    schema = json.loads((REPO / "resources/config.schema.json").read_text())
    for bad in (
        {"vae": {"latnt": 3}},
        {"vae": {"latent": 1}},
        {"run": {"device": "gpu"}},
        {"datasets": {"x": {"kind": "h5ad"}}},
        {"vea": {}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, schema)


def test_header_of_config_yaml_is_short():
    lines = (REPO / "config.yaml").read_text().splitlines()
    assert next(i for i, line in enumerate(lines) if not line.startswith("#")) <= 12


def test_references_name_every_key_and_column():
    config, tables = ((REPO / "docs" / name).read_text() for name in ("config.md", "tables.md"))
    for name, model in BLOCKS.items():
        if name != "Config":
            assert [key for key in model.model_fields if f"| `{key}` |" not in config] == []
    from dbdiffusion.runtime.contracts import CONTRACTS

    for table in CONTRACTS.values():
        assert [c.name for c in table.columns if f"| `{c.name}` |" not in tables] == []
