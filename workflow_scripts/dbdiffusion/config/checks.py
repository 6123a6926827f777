"""Checks across keys: what no single key can tell, and what must exist on disk before the first job."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from dbdiffusion.config.datasets import CatalogueDataset, FileDataset, SimulateDataset
from dbdiffusion.config.embedding import LocationConfig
from dbdiffusion.config.generator import DiffusionConfig, GenerationConfig
from dbdiffusion.config.inference import InferenceConfig
from dbdiffusion.config.problems import Problem, key_path
from dbdiffusion.config.run import RunConfig
from dbdiffusion.config.splits import SplitsConfig
from dbdiffusion.runtime.errors import nearest

MADE_UNDER = "results"
_PSEUDO = "pseudo-targets (splits.crossfit_folds >= 2)"


RESERVED = ("annotations", "bench", "benchmarks", "calibration", "downloads", "logs", "report")
"""Folders under results/ that belong to no dataset."""
PERMUTED = "_permuted"
"""Ending of the folder with a dataset's labels permuted."""


def cross_checks(blocks: dict[str, Any], root: Path) -> list[Problem]:
    """Problems between blocks. Blocks that did not parse are absent from `blocks`, and checks on them are left out."""
    problems: list[Problem] = []
    for needs, check in _CHECKS:
        if all(name in blocks for name in needs):
            problems += check(*(blocks[name] for name in needs))
    if "run" in blocks and "datasets" in blocks:
        for name in dict.fromkeys(blocks["run"].datasets):
            if name in blocks["datasets"]:
                problems += _sources(name, blocks["datasets"][name], root)
    return problems


def _run(run: RunConfig, datasets: dict[str, Any]) -> Iterator[Problem]:
    for name in run.datasets:
        if name not in datasets:
            yield Problem("run.datasets", name, "is not defined under datasets", nearest(name, datasets))
    for key in ("datasets", "seeds", "targets"):
        values = getattr(run, key)
        if len(set(values)) < len(values):
            yield Problem(f"run.{key}", values, "names something twice", "name each once")
    for seed in run.seeds:
        if seed < 0:
            yield Problem("run.seeds", seed, "is negative", "seeds name folders: write 0 or more")
    for name in datasets:
        if name in RESERVED:
            yield Problem(
                key_path("datasets", name), name, "is a folder of the workflow's own under results/", "call the dataset otherwise"
            )
        if name.endswith(PERMUTED):
            what = f"names ending in {PERMUTED!r} are those of permuted copies"
            yield Problem(key_path("datasets", name), name, what, f"call the dataset {name.removesuffix(PERMUTED)!r}, or otherwise")
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
            yield Problem(
                key_path("datasets", name), name, "cannot be a folder name", "use letters, digits, '_', '-' and '.' in dataset names"
            )


def _names(run: RunConfig, splits: SplitsConfig, datasets: dict[str, Any]) -> Iterator[Problem]:
    """Names of perturbations that the user wrote."""
    controls = {"control"} | {label.lower() for d in datasets.values() for label in d.labels.control}
    for key, names in (("run.targets", run.targets), ("splits.held_out", splits.held_out)):
        for name in names:
            parts = name.split("+")
            if not all(parts) or re.search(r"[\s,;]", name):
                yield Problem(key, name, "is no perturbation", "write a gene symbol such as STAT1, or a combination such as IRF1+STAT1")
            elif controls & {part.lower() for part in parts}:
                yield Problem(key, name, "names the control", "name perturbed genes only, without the control")
            elif parts != sorted(set(parts)):
                yield Problem(key, name, "parts of a combination are sorted, each named once", f"write {'+'.join(sorted(set(parts)))!r}")


def _splits(splits: SplitsConfig) -> Iterator[Problem]:
    if splits.scheme == "leave_one_out" and not splits.held_out:
        yield Problem(
            "splits.held_out",
            splits.held_out,
            "scheme leave_one_out does not know what to hold out",
            "name measured perturbations, e.g. held_out: [STAT1, IRF1] (one fold, and one set of models, for each)",
        )
    if splits.scheme != "leave_one_out" and splits.held_out:
        remedy = "write splits.scheme: leave_one_out, or remove held_out"
        yield Problem("splits.held_out", splits.held_out, f"has no meaning with scheme {splits.scheme}", remedy)
    if len(set(splits.held_out)) < len(splits.held_out):
        yield Problem("splits.held_out", splits.held_out, "names something twice", "name each once")
    if splits.crossfit_folds == 1:
        remedy = "write 2 or more (3 is usual), or 0 for the published design without cross-fitting"
        yield Problem("splits.crossfit_folds", 1, "one cross-fit fold leaves nothing to train on", remedy)


def _targets(splits: SplitsConfig, run: RunConfig) -> Iterator[Problem]:
    if splits.scheme == "none" and not run.targets:
        remedy = "name the perturbations to predict, e.g. targets: [STAT1], or write splits.scheme: kfold"
        yield Problem("run.targets", run.targets, "scheme none holds nothing out, so there is nothing to predict", remedy)
    for name in sorted(set(run.targets) & set(splits.held_out)):
        yield Problem("run.targets", name, "is also in splits.held_out", "held-out perturbations are predicted anyway: name it once")


def _folds(splits: SplitsConfig, run: RunConfig, datasets: dict[str, Any]) -> Iterator[Problem]:
    """For simulated screens the number of perturbations is known; for others the splits stage checks it."""
    for name in run.datasets:
        dataset = datasets.get(name)
        if splits.scheme == "kfold" and isinstance(dataset, SimulateDataset) and splits.folds > dataset.perturbations:
            what = f"more folds than perturbations ({dataset.perturbations} in dataset {name!r})"
            yield Problem("splits.folds", splits.folds, what, f"write at most {dataset.perturbations}")


def _inference(inference: InferenceConfig, splits: SplitsConfig) -> Iterator[Problem]:
    """What is learned from pseudo-targets needs cross-fitting."""
    if splits.crossfit_folds > 0:
        return
    raise_folds = "set splits.crossfit_folds to 2 or more (3 is usual)"
    for key, bad, published in (
        ("calls", ("direction", "selection"), "t"),
        ("error_model", ("t", "conformal"), "conservative"),
        ("weight", ("tuned",), "one"),
    ):
        value = getattr(inference, key)
        if value in bad:
            what = f"needs {_PSEUDO}, found {splits.crossfit_folds}"
            yield Problem(f"inference.{key}", value, what, f"{raise_folds}, or write inference.{key}: {published} (published)")


def _generation(generation: GenerationConfig, diffusion: DiffusionConfig) -> Iterator[Problem]:
    if diffusion.uncertain_conditions and diffusion.null_token == "zero":
        what = "the zero condition cannot stand for no condition where conditions may be uncertain: it would be a most uncertain one"
        remedy = "write diffusion.uncertain_conditions: false (published), or diffusion.null_token: learned"
        yield Problem("diffusion.null_token", diffusion.null_token, what, remedy)
    if generation.steps > diffusion.timesteps:
        remedy = f"write at most {diffusion.timesteps}, or raise diffusion.timesteps"
        yield Problem("generation.steps", generation.steps, f"more steps than diffusion.timesteps ({diffusion.timesteps})", remedy)
    if generation.cells_kept > generation.cells:
        what = f"more cells kept than generated ({generation.cells})"
        yield Problem("generation.cells_kept", generation.cells_kept, what, f"write at most {generation.cells}, or raise generation.cells")


def _location(location: LocationConfig, splits: SplitsConfig) -> Iterator[Problem]:
    if location.min_confidence == "auto" and not splits.crossfit_folds:
        remedy = "set splits.crossfit_folds to 2 or more (3 is usual), or write a number"
        yield Problem("location.min_confidence", "auto", f"needs {_PSEUDO}, found {splits.crossfit_folds}", remedy)


def _guidance(generation: GenerationConfig, splits: SplitsConfig) -> Iterator[Problem]:
    if generation.guidance == "tuned" and not splits.crossfit_folds:
        remedy = "set splits.crossfit_folds to 2 or more (3 is usual), or write a number"
        yield Problem("generation.guidance", "tuned", f"needs {_PSEUDO}, found {splits.crossfit_folds}", remedy)


_CHECKS = (
    (("run", "datasets"), _run),
    (("run", "splits", "datasets"), _names),
    (("splits",), _splits),
    (("splits", "run"), _targets),
    (("splits", "run", "datasets"), _folds),
    (("inference", "splits"), _inference),
    (("location", "splits"), _location),
    (("generation", "diffusion"), _generation),
    (("generation", "splits"), _guidance),
)


def _sources(name: str, dataset: Any, root: Path) -> Iterator[Problem]:
    """Files and table rows that a dataset needs. Only datasets that run are asked for theirs."""
    labels = dataset.labels
    if labels.combination_separator and labels.combination_separator == labels.multi_guide_separator:
        remedy = "combinations are kept and multi-guide cells dropped: give them different separators, or set one to null"
        key = key_path("datasets", name, "labels", "multi_guide_separator")
        yield Problem(key, labels.multi_guide_separator, "is also the combination_separator", remedy)
    names = [source.name for source in dataset.features]
    for number, source in enumerate(dataset.features):
        key = key_path("datasets", name, "features", number)
        if source.name in names[:number]:
            yield Problem(key, source.name, "is the name of two sources", "name each source once; give files of one kind different names")
        if source.min_size > source.max_size:
            yield Problem(f"{key}.min_size", source.min_size, f"larger than max_size ({source.max_size})", "lower it, or raise max_size")
        if source.path is not None and not _is_made(source.path):
            yield from _missing(f"{key}.path", source.path)
    if dataset.aliases is not None and not _is_made(dataset.aliases):
        yield from _missing(key_path("datasets", name, "aliases"), dataset.aliases)
    if dataset.modality is not None and dataset.columns.modality is None:
        remedy = "name the column with the modality under columns.modality, or remove modality"
        yield Problem(key_path("datasets", name, "modality"), dataset.modality, "no column says which cells have it", remedy)
    if isinstance(dataset, FileDataset):
        yield from _file_sources(name, dataset)
    elif isinstance(dataset, CatalogueDataset):
        yield from _catalogue_row(name, dataset, root / "resources" / "datasets.tsv")


def _file_sources(name: str, dataset: FileDataset) -> Iterator[Problem]:
    for key in ("path", "cell_table", "guide_counts", "guide_table"):
        value = getattr(dataset, key)
        if value is not None and (key, value) != ("guide_counts", "features") and not _is_made(value):
            yield from _missing(key_path("datasets", name, key), value)
    if dataset.kind == "h5ad":
        for key in ("cell_table", "guide_counts", "guide_table"):
            if getattr(dataset, key) is not None:
                remedy = "remove the key: an .h5ad holds its labels in obs"
                yield Problem(key_path("datasets", name, key), getattr(dataset, key), "is only for 10x data", remedy)
    elif dataset.cell_table is None and dataset.guide_counts is None:
        remedy = "add cell_table (a table cell, perturbation, ...), or guide_counts and guide_table"
        yield Problem(key_path("datasets", name, "cell_table"), None, "10x data do not say which cell carries which guide", remedy)
    if dataset.guide_counts is not None and dataset.guide_table is None:
        remedy = "add guide_table: a .csv or .tsv with columns guide and perturbation"
        yield Problem(key_path("datasets", name, "guide_table"), None, "guide_counts needs it", remedy)


def _catalogue_row(name: str, dataset: CatalogueDataset, table: Path) -> Iterator[Problem]:
    """The dataset's row in the table of public screens."""
    if not table.is_file():
        return
    with table.open(newline="") as handle:
        lines = (line for line in handle if not line.startswith("#"))
        rows = [(row.get("name", ""), row.get("version", "")) for row in csv.DictReader(lines, delimiter="\t")]
    names = sorted({row[0] for row in rows})
    versions = sorted(row[1] for row in rows if row[0] == dataset.name)
    if not versions:
        yield Problem(key_path("datasets", name, "name"), dataset.name, "is not in resources/datasets.tsv", nearest(dataset.name, names))
    elif dataset.version is not None and dataset.version not in versions:
        what = f"resources/datasets.tsv has no such version of {dataset.name}"
        yield Problem(key_path("datasets", name, "version"), dataset.version, what, nearest(dataset.version, versions))


def _missing(key: str, path: str) -> Iterator[Problem]:
    if not Path(path).exists():
        folder = Path(path).parent
        there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        hint = nearest(Path(path).name, there) if there else "give an absolute path"
        yield Problem(key, path, "file not found", f"paths are taken from the working directory {Path.cwd()}; {hint}")


def _is_made(path: str) -> bool:
    """Whether the workflow itself makes the file."""
    return PurePosixPath(path).parts[:1] == (MADE_UNDER,)
