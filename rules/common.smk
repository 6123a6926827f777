# Config, names and resources that all rules share. Nothing here reads data.
import re
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

SCRIPTS = Path(workflow.basedir) / "workflow_scripts"
sys.path.insert(0, str(SCRIPTS))

from dbdiffusion.config.checks import PERMUTED
from dbdiffusion.config.load import config_slice, load_config
from dbdiffusion.data.catalogue import find
from dbdiffusion.data.peek import check_h5ad
from dbdiffusion.runtime.errors import UserError
from dbdiffusion.runtime.provenance import code_hash

try:
    CONFIG = load_config(config, root=Path(workflow.basedir))
    if workflow.is_main_process:
        for name in CONFIG.run.datasets:
            check_h5ad(name, CONFIG.datasets[name], CONFIG.splits)
except UserError as error:
    raise WorkflowError(str(error)) from None

CATALOGUE = Path(workflow.basedir) / "resources" / "datasets.tsv"
TORCH_ENV = "../envs/torch-cuda.yaml" if CONFIG.run.device.startswith("cuda") else "../envs/torch.yaml"
SEEDS = CONFIG.run.seeds
FOLDS = CONFIG.splits.fold_names(CONFIG.run.targets)  # `all`: nothing held out, run.targets are predicted
HELD_OUT_FOLDS = [fold for fold in FOLDS if fold != "all"]
CROSSFIT = CONFIG.splits.crossfit_names
GENERATOR = "dbdiffusion"
BASELINES = list(CONFIG.benchmark.baselines)
METHODS = [GENERATOR, *BASELINES]
# The prediction that figures show: all predictors stacked where pseudo-targets can tune them, else the generator.
SHOWN = "stacked" if CONFIG.splits.crossfit_folds and CONFIG.inference.weight == "tuned" else GENERATOR
# A GPU is asked of the scheduler unless the config keeps the run on the CPU.
GPUS = 0 if CONFIG.run.device == "cpu" else 1


def names_or_none(names):
    """A wildcard constraint that matches these names, or nothing."""
    return "|".join(map(re.escape, names)) if names else "(?!)"


DATASETS = list(CONFIG.datasets)
SIMULATED = [name for name, block in CONFIG.datasets.items() if block.kind == "simulate"]
# A dataset with its labels permuted goes through the same rules, from its cells on, under a name of its own.
PERMUTED_DATASETS = [f"{name}{PERMUTED}" for name in DATASETS] if CONFIG.calibration.permuted_labels else []


wildcard_constraints:
    dataset=names_or_none([*DATASETS, *PERMUTED_DATASETS]),
    seed=r"\d+",
    fold=r"\d+|all",
    crossfit=r"\d+|all",
    baseline=names_or_none(BASELINES),


def block(*names):
    """Config blocks as a plain dict: what a rule depends on, no more."""
    return config_slice(CONFIG, *names)


def dataset_of(wildcards):
    """The config of a dataset, also of its copy with permuted labels."""
    return CONFIG.datasets[wildcards.dataset.removesuffix(PERMUTED)]


def dataset_block(wildcards):
    return dataset_of(wildcards).model_dump(mode="json")


def counts_block(wildcards):
    """What the counts of a dataset depend on: neither gene features nor how effects are pooled."""
    return {k: v for k, v in dataset_block(wildcards).items() if k not in ("features", "aliases", "contexts")}


def panel_block(wildcards):
    """Block `panel`. Perturbations of permuted labels have no effect: none of them would reach a minimal one."""
    out = block("panel")
    return {"panel": {**out["panel"], "min_effect": 0.0}} if wildcards.dataset.endswith(PERMUTED) else out


def twice_the_cells():
    """Block `generation` with twice the cells; of the cells themselves none but the first is needed."""
    generation = block("generation")["generation"]
    return {"generation": {**generation, "cells": 2 * generation["cells"], "cells_kept": 1}}


def code(script):
    """Digest of a script and the library modules it uses: an edit re-runs exactly what depends on it."""
    return code_hash(SCRIPTS / script)


def feature_files(wildcards):
    """Files of the dataset's gene-feature sources, and its table of aliases."""
    dataset = dataset_of(wildcards)
    return [path for path in (*(source.path for source in dataset.features), dataset.aliases) if path]


def memory(minimum_mb, times_input=4):
    """Memory request that follows the size of the input and grows with every attempt."""

    def request(wildcards, input, attempt):
        return int(max(minimum_mb, times_input * input.size_mb) * attempt)

    return request


def minutes(first):
    def request(wildcards, attempt):
        return first * attempt

    return request


def source_of(wildcards):
    """Files that a dataset is read from: the user's own, or the download of its row in resources/datasets.tsv."""
    block = CONFIG.datasets[wildcards.dataset]
    if block.kind != "catalogue":
        tables = [block.cell_table, block.guide_counts, block.guide_table]
        beside = [path for path in tables if path and path != "features"]
        return {"source": block.path, **({"beside": beside} if beside else {})}
    entry = find(CATALOGUE, block.name, block.version)
    file = f"results/downloads/{entry.name}_{entry.version}"
    return {"source": f"{file}_10x_mtx" if entry.needs_conversion else f"{file}{entry.suffix}"}


# A training job is of one cross-fit model, or of all of a fold.
MODELS_A_JOB = len(CROSSFIT) if CONFIG.run.side_by_side else 1
AT_ONCE, IN_TURN = (MODELS_A_JOB, 1) if GPUS else (1, MODELS_A_JOB)  # What memory and time of the job grow with.
OF_JOB = "" if CONFIG.run.side_by_side else "crossfit{crossfit}/"


def models_of(wildcards):
    """The cross-fit models of a training job."""
    return CROSSFIT if CONFIG.run.side_by_side else [wildcards.crossfit]


def for_models(pattern):
    """A file of each model of a training job."""
    return expand(pattern, crossfit=CROSSFIT if CONFIG.run.side_by_side else "{crossfit}", allow_missing=True)


def scratch(stage):
    """An undeclared folder for checkpoints: declared outputs would be deleted when a job is killed."""

    def path(wildcards):
        return f"results/{wildcards.dataset}/scratch/" + "_".join(
            [f"{name}{wildcards[name]}" for name in ("seed", "fold", "crossfit") if name in wildcards.keys()] + [stage]
        )

    return path


def tables():
    names = ["de"]
    if HELD_OUT_FOLDS:
        names += ["scores", "calibration", "compute", "location_quality", "cell_quality"]
    else:
        names += ["compute"]
    return expand("results/{dataset}/tables/{name}.parquet", dataset=CONFIG.run.datasets, name=names)


def figures():
    # Maps are drawn for the first fold: those of the other folds differ by the held-out perturbations only.
    out = expand(
        "results/{dataset}/figures/{name}.png", dataset=CONFIG.run.datasets, name=["qc", "training", "compute"]
    )
    out += expand(
        "results/{dataset}/figures/seed{seed}_fold{fold}_{name}.png",
        dataset=CONFIG.run.datasets,
        seed=SEEDS[0],
        fold=FOLDS[0],
        name=["perturbation_map", "gene_map"],
    )
    out += expand(
        "results/{dataset}/figures/seed{seed}_fold{fold}_enrichment.png",
        dataset=[
            name for name in CONFIG.run.datasets if any(s.kind == "gene_sets" for s in CONFIG.datasets[name].features)
        ],
        seed=SEEDS[0],
        fold=FOLDS[0],
    )
    out += expand("results/{dataset}/report/de.html", dataset=CONFIG.run.datasets)
    if CONFIG.run.targets:
        out += expand("results/{dataset}/figures/targets.png", dataset=CONFIG.run.datasets)
    if HELD_OUT_FOLDS:
        out += expand(
            "results/{dataset}/figures/{name}.png",
            dataset=CONFIG.run.datasets,
            name=["scores", "calibration", "predicted_observed", "intervals", "location_quality", "cell_quality"],
        )
        out += expand(
            "results/{dataset}/figures/seed{seed}_fold{fold}_{name}.png",
            dataset=CONFIG.run.datasets,
            seed=SEEDS[0],
            fold=HELD_OUT_FOLDS[0],
            name=["cells", "location"],
        )
        out += expand("results/{dataset}/report/scores.html", dataset=CONFIG.run.datasets)
    return out


def generated_cells():
    return expand(
        "results/{dataset}/seed{seed}/fold{fold}/{method}/generated.h5ad",
        dataset=CONFIG.run.datasets,
        seed=SEEDS,
        fold=FOLDS,
        method=GENERATOR,
    )


def per_model(name):
    """A file of every cross-fit model of one dataset."""

    def paths(wildcards):
        return expand(
            "results/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/{name}",
            dataset=wildcards.dataset,
            seed=SEEDS,
            fold=FOLDS,
            crossfit=CROSSFIT,
            name=name,
        )

    return paths


def per_fold(pattern, folds=FOLDS):
    """The pattern's files over seeds and folds of one dataset."""

    def paths(wildcards):
        return expand(pattern, dataset=wildcards.dataset, seed=SEEDS, fold=folds, allow_missing=True)

    return paths


def method_means(wildcards):
    return {
        f"means_{method}": f"results/{wildcards.dataset}/seed{wildcards.seed}/fold{wildcards.fold}/{method}/means.parquet"
        for method in METHODS
    }


def further_checks(wildcards):
    """Inputs of the calibration that not every run has: the tested predictions made from permuted labels and the means from
    twice the cells, both of the first held-out fold of the first seed, and the truth of a simulated screen."""
    fold = f"seed{SEEDS[0]}/fold{HELD_OUT_FOLDS[0]}" if HELD_OUT_FOLDS else ""
    out = {}
    if fold and CONFIG.calibration.permuted_labels:
        out["permuted"] = f"results/{wildcards.dataset}{PERMUTED}/{fold}/de.parquet"
    if fold and CONFIG.calibration.doubled_cells:
        out["doubled"] = f"results/{wildcards.dataset}/{fold}/doubled/means.parquet"
    if wildcards.dataset in SIMULATED:
        out["truth"] = f"results/{wildcards.dataset}/raw/truth.parquet"
    return out


# Rules of a dataset whose cost is reported, with the benchmark files of their jobs.
COSTS = {
    "qc": "<benchmarks>/{dataset}/qc.tsv",
    "splits": "<benchmarks>/{dataset}/seed{seed}/splits.tsv",
    "moments": "<benchmarks>/{dataset}/seed{seed}/moments.tsv",
    "effects": "<benchmarks>/{dataset}/seed{seed}/fold{fold}/effects.tsv",
    "locate": "<benchmarks>/{dataset}/seed{seed}/fold{fold}/locate.tsv",
    "embedding": "<benchmarks>/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/embedding.tsv",
    "train_vae": f"<benchmarks>/{{dataset}}/seed{{seed}}/fold{{fold}}/{OF_JOB}train_vae.tsv",
    "train_diffusion": f"<benchmarks>/{{dataset}}/seed{{seed}}/fold{{fold}}/{OF_JOB}train_diffusion.tsv",
    "generate": "<benchmarks>/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/generate.tsv",
    "merge_generated": "<benchmarks>/{dataset}/seed{seed}/fold{fold}/merge_generated.tsv",
    "baselines": "<benchmarks>/{dataset}/seed{seed}/fold{fold}/baselines.tsv",
    "test_de": "<benchmarks>/{dataset}/seed{seed}/fold{fold}/test_de.tsv",
}
if CONFIG.generation.guidance == "tuned":
    COSTS["try_guidance"] = "<benchmarks>/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/try_guidance.tsv"
if HELD_OUT_FOLDS and CONFIG.calibration.permuted_labels:
    # The whole chain of one fold as one entry.
    COSTS["permuted_labels"] = ["<benchmarks>/{dataset}/permute_labels.tsv"] + [
        pattern.format(dataset=f"{{dataset}}{PERMUTED}", seed=SEEDS[0], fold=HELD_OUT_FOLDS[0], crossfit="{crossfit}")
        for name, pattern in COSTS.items()
        if name != "qc"
    ]
if HELD_OUT_FOLDS and CONFIG.calibration.doubled_cells:
    COSTS["doubled_cells"] = [
        f"<benchmarks>/{{dataset}}/seed{SEEDS[0]}/fold{HELD_OUT_FOLDS[0]}/{file}"
        for file in ("crossfit{crossfit}/generate_doubled.tsv", "merge_doubled.tsv")
    ]


def cost_files(wildcards):
    """Benchmark files as named inputs, one name a rule."""
    return {
        name: sorted(set(expand(pattern, dataset=wildcards.dataset, seed=SEEDS, fold=FOLDS, crossfit=CROSSFIT)))
        for name, pattern in COSTS.items()
    }
