"""Everything a user can get wrong in the config: each message names key, value and remedy, and all are shown together."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dbdiffusion.config.load import load_config
from dbdiffusion.runtime.errors import UserError

REPO = Path(__file__).resolve().parents[3]
REFERENCE = "protocol: reference\nsplits: {held_out: [STAT1]}\n"


def refusal(text: str, root: Path = REPO) -> str:
    with pytest.raises(UserError) as caught:
        load_config(yaml.safe_load(text), root=root)
    return str(caught.value)


ACCEPTED = [
    REFERENCE,
    "diffusion: {timesteps: 50}",
    "generation: {cells: 200}",
    "splits: {folds: 60}",
    "splits: {crossfit_folds: 2}",
    "splits: {scheme: none}\nrun: {targets: [HLA-A, AC012345.1, IRF1+STAT1]}",
    "run: {device: 'cuda:1', seeds: [0, 1]}",
    "datasets: {simulated: {kind: simulate, effect_sd: 1}}",
]


@pytest.mark.parametrize("text", ACCEPTED)
def test_what_is_just_possible_is_accepted(text):
    load_config(yaml.safe_load(text), root=REPO)


# text of the config; key; value as shown; words of the remedy
KEYS = [
    (
        "location: {min_confidence: auto}\nsplits: {crossfit_folds: 0}\ninference: {weight: one, error_model: conservative, calls: t}",
        "location.min_confidence",
        "'auto'",
        "set splits.crossfit_folds to 2 or more",
    ),
    ("vae: {latnt: 5}", "vae.latnt", "5", "did you mean 'latent'?"),
    ("vea: {latent: 5}", "vea", "{'latent': 5}", "did you mean 'vae'?"),
    ("latent: 5", "latent", "5", "it belongs into block 'vae'"),
    ("datasets: {simulated: {kind: simulate, gens: 3}}", "datasets.simulated.gens", "3", "did you mean 'genes'?"),
    ("datasets: {simulated: {kind: simulate, columns: {guid: g}}}", "datasets.simulated.columns.guid", "'g'", "did you mean 'guide'?"),
    (
        "datasets: {simulated: {kind: simulate, features: [{kind: coexpression, dims: 3}]}}",
        "datasets.simulated.features[0].dims",
        "3",
        "did you mean 'dimensions'?",
    ),
    ("vae: {latent: many}", "vae.latent", "'many'", "write a whole number"),
    ("vae: {latent: '64'}", "vae.latent", "'64'", "write 64"),
    ("vae: {latent: 64.0}", "vae.latent", "64.0", "write 64"),
    ("vae: {latent: 64.6}", "vae.latent", "64.6", "round it: write 65"),
    ("vae: {latent: true}", "vae.latent", "True", "write"),
    ("vae: {latent: }", "vae.latent", "(nothing)", "comment the key out"),
    ("vae: {max_steps: 1e5}", "vae.max_steps", "'1e5'", "write 100000"),
    ("vae: {learning_rate: 1e-3}", "vae.learning_rate", "'1e-3'", "write 1.0e-3 "),
    ("vae: {learning_rate: 1.5e3}", "vae.learning_rate", "'1.5e3'", "write 1.5e+3 "),
    ("vae: {hidden: 512}", "vae.hidden", "512", "[512]"),
    ("vae: {hidden: [512, wide]}", "vae.hidden[1]", "'wide'", "write a whole number"),
    ("vae: 64", "vae", "64", "indent its keys"),
    ("qc: {drop_mito_genes: 1}", "qc.drop_mito_genes", "1", "write true or false"),
    ("run: {targets: [NO]}", "run.targets[0]", "False", '"NO"'),
    ("run: {device: gpu}", "run.device", "'gpu'", "cuda:N"),
    ("run: {datasets: []}", "run.datasets", "[]", "at least 1"),
    ("vae: {latent: 1}", "vae.latent", "1", "at least 2"),
    ("vae: {validation_share: 0.5}", "vae.validation_share", "0.5", "less than 0.5"),
    ("inference: {q: 0.0}", "inference.q", "0.0", "greater than 0"),
    ("qc: {max_mito_share: 1.5}", "qc.max_mito_share", "1.5", "at most 1"),
    ("vae: {norm: lyer}", "vae.norm", "'lyer'", "did you mean 'layer'?"),
    ("protocol: crosfit", "protocol", "'crosfit'", "did you mean 'crossfit'?"),
    ("run: {datasets: [simulatd]}", "run.datasets", "'simulatd'", "did you mean 'simulated'?"),
    ("run: {seeds: [1, 1]}", "run.seeds", "[1, 1]", "name each once"),
    ("run: {seeds: [1, -2]}", "run.seeds", "-2", "0 or more"),
    ("datasets: ", "datasets", "(nothing)", "one block per dataset"),
    ("datasets: {mine: {path: x}}\nrun: {datasets: [mine]}", "datasets.mine.kind", "(nothing)", "choose one of: simulate"),
    ("datasets: {mine: {kind: h5da}}\nrun: {datasets: [mine]}", "datasets.mine.kind", "'h5da'", "did you mean 'h5ad'?"),
    ("datasets: {mine: {kind: h5ad}}\nrun: {datasets: [mine]}", "datasets.mine.path", "(nothing)", "add the key 'path'"),
    ("datasets: {mine: counts.h5ad}\nrun: {datasets: [mine]}", "datasets.mine", "'counts.h5ad'", "indent its keys"),
    ("datasets: {a/b: {kind: simulate}}\nrun: {datasets: [a/b]}", "datasets.a/b", "'a/b'", "use letters"),
    ("datasets: {a_permuted: {kind: simulate}}\nrun: {datasets: [a_permuted]}", "datasets.a_permuted", "'a_permuted'", "dataset 'a'"),
    ("splits: {scheme: leave_one_out}", "splits.held_out", "[]", "held_out: [STAT1, IRF1]"),
    ("protocol: reference", "splits.held_out", "[] (from protocol reference)", "held_out: [STAT1, IRF1]"),
    ("splits: {held_out: [A]}", "splits.held_out", "['A']", "splits.scheme: leave_one_out"),
    ("splits: {scheme: leave_one_out, held_out: [A, A]}", "splits.held_out", "['A', 'A']", "name each once"),
    ("splits: {scheme: none}", "run.targets", "[]", "targets: [STAT1]"),
    ("splits: {crossfit_folds: 1}", "splits.crossfit_folds", "1", "write 2 or more"),
    ("splits: {folds: 61}", "splits.folds", "61", "at most 60"),
    ("run: {targets: [A B]}", "run.targets", "'A B'", "gene symbol"),
    ("run: {targets: [A+]}", "run.targets", "'A+'", "gene symbol"),
    ("run: {targets: [Control]}", "run.targets", "'Control'", "without the control"),
    ("run: {targets: [A+ctrl]}", "run.targets", "'A+ctrl'", "without the control"),
    ("run: {targets: [B+A]}", "run.targets", "'B+A'", "'A+B'"),
    ("run: {targets: [A]}\nsplits: {scheme: leave_one_out, held_out: [A]}", "run.targets", "'A'", "name it once"),
    ("diffusion: {timesteps: 49}", "generation.steps", "50 (from protocol crossfit)", "at most 49"),
    ("diffusion: {null_token: zero}", "diffusion.null_token", "'zero'", "uncertain_conditions: false"),
    ("generation: {cells: 199}", "generation.cells_kept", "200 (from protocol crossfit)", "at most 199"),
    ("splits: {crossfit_folds: 0}", "inference.calls", "'direction' (from protocol crossfit)", "inference.calls: t"),
    ("splits: {crossfit_folds: 0}", "inference.error_model", "'conformal' (from protocol crossfit)", "conservative"),
    ("splits: {crossfit_folds: 0}", "inference.weight", "'tuned' (from protocol crossfit)", "inference.weight: one"),
    (REFERENCE + "inference: {calls: selection}", "inference.calls", "'selection'", "splits.crossfit_folds to 2 or more"),
    (REFERENCE + "inference: {error_model: conformal}", "inference.error_model", "'conformal'", "splits.crossfit_folds to 2 or more"),
    (REFERENCE + "generation: {guidance: tuned}", "generation.guidance", "'tuned'", "splits.crossfit_folds to 2 or more"),
    (REFERENCE + "inference: {weight: tuned}", "inference.weight", "'tuned'", "splits.crossfit_folds to 2 or more"),
]


@pytest.mark.parametrize(("text", "key", "value", "remedy"), KEYS, ids=[f"{case[1]}-{i}" for i, case in enumerate(KEYS)])
def test_message_names_key_value_and_remedy(text, key, value, remedy):
    lines = refusal(text).splitlines()
    at = [i for i, line in enumerate(lines) if f". {key} = {value}" in line]
    assert len(at) == 1, "\n".join(lines)
    assert remedy in lines[at[0] + 1], "\n".join(lines)


@pytest.mark.parametrize("value", [1.5, -0.1])
def test_a_least_confidence_is_a_share(value):
    assert f"location.min_confidence = {value}: write auto, or a confidence from 0 to 1" in refusal(
        f"location: {{min_confidence: {value}}}"
    )


def test_all_problems_are_shown_together_in_the_order_of_the_config():
    message = refusal(
        "vae: {latnt: 5, learning_rate: 1e-3}\nrun: {datasets: [x]}\nqc: {min_genes_per_cell: -1}\nsplits: {crossfit_folds: 1}"
    )
    keys = ["run.datasets", "qc.min_genes_per_cell", "splits.crossfit_folds", "vae.learning_rate", "vae.latnt"]
    assert "5 problems" in message
    assert [line.split()[1] for line in message.splitlines() if " = " in line] == keys


def test_one_cause_is_one_problem():
    assert "1 problem\n" in refusal("splits: {crossfit_folds: 1}")
    assert "1 problem\n" in refusal("splits: {scheme: leave_one_out}")


def test_long_values_are_cut():
    assert max(map(len, refusal(f"run: {{targets: [{', '.join('G' + str(i % 60) for i in range(200))}]}}").splitlines())) < 200


# --- files ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a screen in it, that is not the workflow's own folder."""
    for name in ("screen.h5ad", "cells.tsv", "guides.csv", "sets.gmt"):
        (tmp_path / name).touch()
    (tmp_path / "10x").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def dataset(text: str) -> str:
    return f"run: {{datasets: [mine]}}\ndatasets: {{mine: {text}}}"


GOOD_FILES = [
    "{kind: h5ad, path: screen.h5ad}",
    "{kind: h5ad, path: screen.h5ad, features: [{kind: gene_sets, path: sets.gmt}, {kind: table, path: results/mine/raw/loadings.tsv}]}",
    "{kind: 10x_mtx, path: 10x, cell_table: cells.tsv}",
    "{kind: 10x_mtx, path: 10x, guide_counts: features, guide_table: guides.csv}",
]


@pytest.mark.parametrize("text", GOOD_FILES)
def test_files_that_are_there_are_accepted(text, folder):
    load_config(yaml.safe_load(dataset(text)), root=REPO)


BAD_FILES = [
    ("{kind: h5ad, path: screen.h5ad, modality: CRISPRi}", "modality", "'CRISPRi'", "name the column with the modality"),
    ("{kind: h5ad, path: screen.h5ad, aliases: scren.h5ad}", "aliases", "'scren.h5ad'", "did you mean 'screen.h5ad'?"),
    ("{kind: h5ad, path: scren.h5ad}", "path", "'scren.h5ad'", "did you mean 'screen.h5ad'?"),
    ("{kind: h5ad, path: /nowhere/at/all.h5ad}", "path", "'/nowhere/at/all.h5ad'", "absolute path"),
    ("{kind: 10x_mtx, path: 10x, cell_table: cell.tsv}", "cell_table", "'cell.tsv'", "did you mean 'cells.tsv'?"),
    ("{kind: 10x_mtx, path: 10x}", "cell_table", "(nothing)", "add cell_table"),
    ("{kind: 10x_mtx, path: 10x, guide_counts: features}", "guide_table", "(nothing)", "add guide_table"),
    ("{kind: h5ad, path: screen.h5ad, cell_table: cells.tsv}", "cell_table", "'cells.tsv'", "remove the key"),
    (
        "{kind: h5ad, path: screen.h5ad, features: [{kind: gene_sets, path: set.gmt}]}",
        "features[0].path",
        "'set.gmt'",
        "did you mean 'sets.gmt'?",
    ),
    ("{kind: h5ad, path: screen.h5ad, features: [{kind: gene_sets}]}", "features[0]", "{'kind': 'gene_sets'}", "docs/config.md"),
    ("{kind: h5ad, path: screen.h5ad, features: []}", "features", "[]", "at least 1"),
    (
        "{kind: h5ad, path: screen.h5ad, features: [{kind: gene_sets, path: sets.gmt, min_size: 9, max_size: 5}]}",
        "features[0].min_size",
        "9",
        "raise max_size",
    ),
    (
        "{kind: h5ad, path: screen.h5ad, labels: {multi_guide_separator: '+'}}",
        "labels.multi_guide_separator",
        "'+'",
        "different separators",
    ),
]


@pytest.mark.parametrize(("text", "key", "value", "remedy"), BAD_FILES)
def test_files_that_are_missing_or_do_not_fit(text, key, value, remedy, folder):
    lines = refusal(dataset(text)).splitlines()
    at = [i for i, line in enumerate(lines) if f". datasets.mine.{key} = {value}" in line]
    assert len(at) == 1, "\n".join(lines)
    assert remedy in lines[at[0] + 1], "\n".join(lines)


def test_files_of_datasets_that_do_not_run_are_not_asked_for(folder):
    text = "datasets: {simulated: {kind: simulate}, later: {kind: h5ad, path: not-here-yet.h5ad}}"
    load_config(yaml.safe_load(text), root=REPO)


@pytest.fixture
def catalogue(tmp_path):
    """A workflow folder with presets and a table of public screens."""
    (tmp_path / "resources").mkdir()
    (tmp_path / "resources" / "protocols").symlink_to(REPO / "resources" / "protocols")
    (tmp_path / "resources" / "datasets.tsv").write_text(
        "# screens\nname\tversion\turl\nnorman2019\tv1\tu\nnorman2019\tv2\tu\nyao2023\tv1\tu\n"
    )
    return tmp_path


def test_public_screens_are_looked_up_in_the_table(catalogue):
    load_config(yaml.safe_load(dataset("{kind: catalogue, name: norman2019, version: v2}")), root=catalogue)
    name = refusal(dataset("{kind: catalogue, name: norman2018}"), catalogue)
    assert "datasets.mine.name = 'norman2018'" in name
    assert "did you mean 'norman2019'?" in name
    version = refusal(dataset("{kind: catalogue, name: norman2019, version: v3}"), catalogue)
    assert "datasets.mine.version = 'v3'" in version
    assert "did you mean" in version


def test_without_the_table_the_name_is_left_to_the_download(catalogue):
    (catalogue / "resources" / "datasets.tsv").unlink()
    load_config(yaml.safe_load(dataset("{kind: catalogue, name: anything}")), root=catalogue)


def test_a_missing_preset_is_named(tmp_path):
    assert "protocols/crossfit.yaml" in refusal("{}", tmp_path)
