"""Where values come from: the user, then the preset, then the models' defaults."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import yaml
from snakemake.utils import update_config

from dbdiffusion.config.datasets import Dataset, SimulateDataset
from dbdiffusion.config.generator import VaeConfig
from dbdiffusion.config.load import METHOD_BLOCKS, PRESET_BLOCKS, config_slice, load_config, read_preset
from dbdiffusion.config.parse import parse
from dbdiffusion.config.root import Config
from dbdiffusion.runtime.errors import UserError
from dbdiffusion.runtime.provenance import library_files

REPO = Path(__file__).resolve().parents[3]


def default_raw() -> dict:
    return yaml.safe_load((REPO / "config.yaml").read_text())


def merged(text: str) -> Config:
    """The config as Snakemake hands it over for `--configfile`: merged over config.yaml."""
    raw = default_raw()
    update_config(raw, yaml.safe_load(text))
    return load_config(raw, root=REPO)


def test_config_yaml_as_shipped_is_the_models_defaults():
    assert load_config(default_raw(), root=REPO) == Config()


def test_an_empty_config_is_the_default_too():
    assert load_config({}, root=REPO) == Config()


def test_preset_over_defaults():
    config = merged("protocol: reference\nsplits: {held_out: [STAT1]}")
    assert config.vae.kind == "autoencoder"
    assert config.vae.hidden == [1024, 1024, 1024]
    assert config.vae.norm == "batch"
    assert config.splits.scheme == "leave_one_out"
    assert config.splits.crossfit_folds == 0
    assert config.generation.steps == 1000
    assert config.inference.weight == "one"
    # the benchmark belongs to no protocol
    assert config.benchmark == Config().benchmark


def test_user_over_preset_even_where_the_user_writes_the_crossfit_value():
    config = merged("protocol: reference\nsplits: {held_out: [STAT1]}\nvae: {latent: 64}\ngeneration:\n  steps: 50")
    assert config.vae.latent == 64
    assert config.generation.steps == 50
    assert config.vae.kind == "autoencoder"
    assert config.generation.cells == 30000


def test_configfile_on_top_of_an_edited_config_yaml():
    text = (REPO / "config.yaml").read_text()
    text = text.replace("  #patience: ", "  patience: 1 #", 1).replace("  #free_bits: 0.0", "  free_bits: 0.5")
    raw = yaml.safe_load(text)
    assert raw["vae"] == {"patience": 1, "free_bits": 0.5}
    update_config(raw, {"vae": {"latent": 8}})
    config = load_config(raw, root=REPO)
    assert (config.vae.latent, config.vae.free_bits, config.vae.patience) == (8, 0.5, 1)


@pytest.mark.parametrize("name", METHOD_BLOCKS)
def test_every_commented_key_can_be_uncommented(name):
    """Removing the # in front of a key gives valid YAML with the value of crossfit."""
    text = (REPO / "config.yaml").read_text()
    start = text.index(f"\n{name}:\n") + 1
    block = text[start:].split("\n\n")[0]
    keys = yaml.safe_load(
        "\n".join(line.replace("  #", "  ") if line.startswith("  #") and line[3] != " " else line for line in block.splitlines())
    )
    assert keys[name] == getattr(Config(), name).model_dump(mode="json")


def test_another_dataset_beside_the_default(tmp_path):
    (tmp_path / "screen.h5ad").touch()
    config = merged(
        f"run: {{datasets: [mine]}}\ndatasets:\n  mine:\n    kind: h5ad\n    path: {tmp_path}/screen.h5ad\n    columns: {{guide: grna}}"
    )
    assert sorted(config.datasets) == ["mine", "simulated"]
    assert config.datasets["mine"].columns.guide == "grna"
    assert config.datasets["mine"].columns.perturbation == "perturbation"


def test_the_example_dataset_of_config_yaml_works_when_uncommented(tmp_path, monkeypatch):
    lines = (REPO / "config.yaml").read_text().splitlines()
    first = lines.index("  #mydata:")
    example = []
    for line in lines[first:]:
        if not line.startswith("  #"):
            break
        example.append(line.replace("  #", "  ", 1))
    (tmp_path / "path/to").mkdir(parents=True)
    for name in ("counts.h5ad", "gene_sets.gmt"):
        (tmp_path / "path/to" / name).touch()
    monkeypatch.chdir(tmp_path)
    config = merged("run: {datasets: [mydata]}\ndatasets:\n" + "\n".join(example))
    mine = config.datasets["mydata"]
    assert mine.kind == "h5ad"
    assert mine.labels.combination_separator == "+"
    assert [f.kind for f in mine.features] == ["coexpression", "gene_sets"]


@pytest.mark.parametrize("protocol", ["crossfit", "reference"])
def test_presets_state_every_key_they_own(protocol):
    preset = read_preset(REPO, protocol)
    assert list(preset) == list(PRESET_BLOCKS)
    for name in PRESET_BLOCKS:
        assert set(preset[name]) == set(Config.model_fields[name].annotation.model_fields), name


def test_crossfit_preset_is_the_models_defaults():
    preset = read_preset(REPO, "crossfit")
    assert preset == {name: getattr(Config(), name).model_dump(mode="json") for name in PRESET_BLOCKS}


def test_in_the_reference_preset_the_steps_end_the_training():
    preset = read_preset(REPO, "reference")
    for name in ("vae", "diffusion"):
        # even with one batch per epoch
        assert preset[name]["max_epochs"] >= preset[name]["max_steps"]
    assert preset["vae"]["patience"] == 0
    assert preset["vae"]["validation_share"] == 0


def test_mappings_of_other_types_are_read():
    raw = OrderedDict(vae=OrderedDict(latent=8), run=OrderedDict(seeds=(1, 2)))
    config = load_config(raw, root=REPO)
    assert config.vae.latent == 8
    assert config.run.seeds == [1, 2]


def test_slices_are_plain_deterministic_and_read_back():
    config = merged("vae: {latent: 12}")
    part = config_slice(config, "vae", "datasets.simulated")
    assert json.loads(json.dumps(part, allow_nan=False)) == part
    assert json.dumps(part) == json.dumps(config_slice(config, "datasets.simulated", "vae"))
    assert parse(VaeConfig, part["vae"]) == config.vae
    dataset = parse(Dataset, part["datasets.simulated"])
    assert isinstance(dataset, SimulateDataset)
    assert dataset == config.datasets["simulated"]


def test_parse_refuses_what_no_slice_holds():
    with pytest.raises(UserError, match="latnt"):
        parse(VaeConfig, {"latnt": 3})


def test_a_script_depends_on_the_blocks_it_names_only(tmp_path):
    """A new key of the diffusion must not re-run the data stages."""
    script = tmp_path / "script.py"
    script.write_text("from dbdiffusion.config.parse import parse\nfrom dbdiffusion.config.qc import QcConfig\n")
    used = {path.name for path in library_files(script) if path.parent.name == "config"}
    assert {"parse.py", "qc.py"} <= used <= {"parse.py", "qc.py", "base.py", "__init__.py"}


def test_a_config_cannot_be_changed_after_it_was_checked():
    config = load_config({}, root=REPO)
    with pytest.raises(Exception, match="frozen"):
        config.vae.latent = 3


def test_loading_needs_no_heavy_package():
    """The config is read each time the workflow is started, before the DAG is built."""
    code = (
        "import sys; from pathlib import Path; from dbdiffusion.config.load import load_config;"
        f"load_config({{}}, root=Path({str(REPO)!r}));"
        "print([m for m in ('torch', 'scanpy', 'pandas', 'numpy', 'anndata') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": str(REPO / "workflow_scripts")}
    )
    assert done.stdout.strip() == "[]"
