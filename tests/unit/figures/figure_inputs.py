"""Small valid inputs for figures: a screen with programmes, its stage outputs, and contract tables around it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse, stats

from dbdiffusion.config.embedding import EmbeddingConfig
from dbdiffusion.config.qc import PanelConfig, QcConfig
from dbdiffusion.config.splits import SplitsConfig
from dbdiffusion.data.moments import Moments, write_moments
from dbdiffusion.data.normalise import load_expression
from dbdiffusion.data.qc import write_qc
from dbdiffusion.data.sets import CONTROL, EffectSet, LocationSet
from dbdiffusion.data.splits import Splits, write_splits
from dbdiffusion.perturbations.conditions import write_embedding
from dbdiffusion.perturbations.effects import estimate_effects, write_effects
from dbdiffusion.perturbations.features import GeneFeatures
from dbdiffusion.runtime import contracts
from dbdiffusion.runtime.files import write_json

METHODS = ("stacked", "dbdiffusion", "control", "training_mean", "neighbour_mean", "knn", "ridge", "linear", "permuted")
FOLD = "0"


@dataclass(frozen=True)
class Inputs:
    """Paths of every file that a figure reads, and the held-out targets of fold 0."""

    root: Path
    targets: list[str]

    def __getattr__(self, name: str) -> Path:
        files = {
            "cells": "cells.h5ad",
            "summary": "summary.json",
            "splits": "splits.json",
            "moments": "moments.h5ad",
            "generated": "generated.h5ad",
        }
        return self.root / files.get(name, f"{name}.parquet")


def write_counts(path: Path, *, perturbations: int, cells: int, genes: int, seed: int = 0) -> None:
    """Poisson counts: perturbations share four programmes; some genes of the perturbations are measured."""
    random = np.random.default_rng(seed)
    names = [f"G{i:03d}" for i in range(genes)]
    base = np.exp(random.normal(0.2, 0.9, genes))
    programmes = random.normal(0, 0.9, (4, genes)) * (random.random((4, genes)) < 0.3)
    labels, rates = [], []
    for k in range(perturbations + 1):
        n = 4 * cells if k == 0 else max(20, int(cells * random.uniform(0.5, 1.6)))
        effect = np.zeros(genes) if k == 0 else programmes[k % 4] * random.uniform(0.3, 1.3) + random.normal(0, 0.05, genes)
        if k:
            effect[(k * 3) % genes] = -1.4
        labels += [CONTROL if k == 0 else f"G{(k * 3) % genes:03d}"] * n
        rates.append(np.exp(random.normal(0, 0.35, (n, 1))) * base * np.exp(effect))
    counts = random.poisson(np.vstack(rates)).astype(np.float32)
    counts[: max(3, cells // 10), 3:] = 0
    labels_array = np.array(labels, dtype=object)
    obs = pd.DataFrame(
        {
            "perturbation": labels_array,
            "guide": [f"{p}_{i % 3}" for i, p in enumerate(labels)],
            "batch": random.choice(["1", "2"], len(labels)),
            "total_counts": counts.sum(axis=1) * 3.0 + 5,
        },
        index=[f"cell{i}" for i in range(len(labels))],
    )
    anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=names)).write_h5ad(path, compression="gzip")


def write_inputs(root: Path, *, perturbations: int = 14, cells: int = 45, genes: int = 80, seed: int = 0) -> Inputs:
    """All inputs in one folder."""
    root.mkdir(parents=True, exist_ok=True)
    raw = root / "counts.h5ad"
    write_counts(raw, perturbations=perturbations, cells=cells, genes=genes, seed=seed)
    made = Inputs(root, [])
    write_qc(counts=raw, config=QcConfig(), cells=made.cells, summary=made.summary, on_target=made.on_target)
    write_splits(made.cells, SplitsConfig(folds=2, crossfit_folds=2), [], seed, made.splits)
    write_moments(made.cells, made.splits, made.moments)
    write_effects(
        moments=made.moments, splits=made.splits, fold=FOLD, config=PanelConfig(), effects=made.effects, panel=root / "panel.json"
    )
    targets = Splits.read(made.splits).targets(FOLD)
    made = Inputs(root, targets)
    _write_locations(made)
    crossfit = "0"
    features = GeneFeatures(
        "gene_sets",
        EffectSet.read(made.effects).perturbations,
        np.random.default_rng(seed).normal(size=(len(EffectSet.read(made.effects).perturbations), 4)),
    )
    contracts.GENE_FEATURES.write(features.to_frame("all"), root / "gene_features.parquet")
    write_embedding(
        effects=made.effects,
        splits=made.splits,
        locations=made.locations,
        gene_features=root / "gene_features.parquet",
        fold=FOLD,
        crossfit=crossfit,
        config=EmbeddingConfig(),
        out=made.embedding,
    )
    _write_generated(made, seed)
    write_de(made.root / "de.parquet", made, seed)
    write_clusters(made.clusters, perturbations, 30 * perturbations, seed)
    write_scores(made.scores, targets, seed)
    write_calibration(made.calibration, seed)
    write_compute(made.compute)
    write_study(made.study, seed)
    return made


def _write_locations(made: Inputs) -> None:
    """Targets and pseudo-targets at three neighbours each; the last target is not locatable."""
    effects, split = EffectSet.read(made.effects), Splits.read(made.splits)
    fits = {}
    for fit, names in (("all", split.training(FOLD)), ("0", split.fit_perturbations(FOLD, "0"))):
        names = [n for n in effects.perturbations if n in set(names)]
        neighbours = pd.Index(names).append(pd.Index([CONTROL]))
        queries = [*made.targets, *(split.inner(FOLD, "0") if fit == "0" else names)]
        weights = np.zeros((len(queries), len(neighbours)))
        for row, query in enumerate(queries):
            free = [i for i, n in enumerate(names) if n != query]
            near = [i for i in free if int(names[i][1:]) // 3 % 4 == int(query[1:]) // 3 % 4] or free
            weights[row, near[:3]] = np.array([0.5, 0.3, 0.2])[: len(near[:3])] / np.sum([0.5, 0.3, 0.2][: len(near[:3])])
        lost = made.targets[-1]
        weights[queries.index(lost)] = 0
        status = ["not_locatable" if q == lost else "located" for q in queries]
        info = pd.DataFrame(
            {
                "role": ["target" if q in made.targets else "pseudo" for q in queries],
                "k_eff": 1 / np.maximum((weights**2).sum(axis=1), 1 / 3),
                "confidence": 0.6,
                "kind": "single",
                "parts_measured": 0,
                "status": status,
                "reason": ["its gene is not measured" if s == "not_locatable" else "" for s in status],
                "locator": "kernel",
            },
            index=pd.Index(queries),
        )
        fits[fit] = LocationSet(pd.Index(queries), neighbours, weights, info)
    LocationSet.write(fits, made.locations)


def _write_generated(made: Inputs, seed: int) -> None:
    """Generated cells of the located targets: control cells, half-way to the target's mean, with noise."""
    random = np.random.default_rng(seed)
    genes = list(EffectSet.read(made.effects).genes)
    real = load_expression(made.cells, genes=genes)
    label, values = real.obs["perturbation"].to_numpy(), real.values.toarray()  # noqa: PD011
    control = values[label == CONTROL]
    blocks, names = [], []
    for target in made.targets[:-1]:
        shift = 0.7 * (values[label == target].mean(axis=0) - control.mean(axis=0))
        blocks.append(np.maximum(control[random.integers(len(control), size=60)] + shift + random.normal(0, 0.1, (60, len(genes))), 0))
        names += [target] * 60
    obs = pd.DataFrame({"perturbation": names, "role": "target"}, index=[f"g{i}" for i in range(len(names))])
    anndata.AnnData(np.vstack(blocks).astype(np.float32), obs=obs, var=pd.DataFrame(index=genes)).write_h5ad(
        made.generated, compression="gzip"
    )


def write_de(path: Path, made: Inputs, seed: int, extra: tuple[str, ...] = ("NOBODY",)) -> None:
    """DE rows: the truth shrunk, with noise; `extra` targets were never measured; the last measured one is not predicted."""
    random = np.random.default_rng(seed)
    genes = EffectSet.read(made.effects).genes
    truth = estimate_effects(Moments.read(made.moments), made.targets, genes)
    frames = []
    for method in ("stacked", "dbdiffusion", "training_mean"):
        for row, target in enumerate([*made.targets, *extra]):
            true = truth.effect[row] if row < len(made.targets) else truth.effect[0]
            lost = target == made.targets[-1]
            noise = {"stacked": 0.05, "dbdiffusion": 0.08}.get(method, 0.15)
            lfc = 0.7 * true + random.normal(0, noise, len(genes))
            se = noise * random.uniform(0.8, 1.6, len(genes))
            p = 2 * stats.t.sf(np.abs(lfc / se), 6)
            q = stats.false_discovery_control(p)
            call = np.where(q < 0.1, np.where(lfc > 0, "up", "down"), "none")
            missing = np.nan if lost else 1.0
            frames.append(
                pd.DataFrame(
                    {
                        "seed": 1,
                        "fold": FOLD,
                        "method": method,
                        "target": target,
                        "gene": list(genes),
                        "estimate": (truth.control_mean + lfc) * missing,
                        "control_mean": truth.control_mean,
                        "lfc": lfc * missing,
                        "se": se * missing,
                        "df": 6.0,
                        "ci_low": (lfc - 2.45 * se) * missing,
                        "ci_high": (lfc + 2.45 * se) * missing,
                        "p_t": p * missing,
                        "q_t": q * missing,
                        "q_direction": q * missing,
                        "p_selection": p * missing,
                        "q_selection": q * missing,
                        "call": np.full(len(genes), "no_call") if lost else call,
                        "reason": "its gene is not measured" if lost else "",
                        "lambda": 0.5,
                        "k_eff": 3.2,
                        "confidence": 0.6,
                    }
                )
            )
    contracts.DE.write(pd.concat(frames, ignore_index=True), path)


def write_clusters(path: Path, perturbations: int, genes: int, seed: int, clusters: int = 6) -> None:
    """Round clouds on a map."""
    random = np.random.default_rng(seed)
    frames = []
    for kind, n in (("perturbation", perturbations), ("gene", genes)):
        cluster = random.integers(0, clusters, n)
        centre = random.normal(0, 5, (clusters, 2))
        at = centre[cluster] + random.normal(0, 1, (n, 2))
        names = [f"G{i * 3:03d}" if kind == "perturbation" else f"G{i:03d}" for i in range(n)]
        frames.append(
            pd.DataFrame({"kind": kind, "name": names, "cluster": cluster.astype(str).astype(object), "x": at[:, 0], "y": at[:, 1]})
        )
    contracts.CLUSTERS.write(pd.concat(frames, ignore_index=True), path)


def write_scores(path: Path, targets: list[str], seed: int, methods: tuple[str, ...] = METHODS) -> None:
    """Scores near a level of each method."""
    random = np.random.default_rng(seed)
    metrics = {
        ("pearson_delta", "all"): (0.5, 0.9),
        ("pearson_delta", "300"): (0.6, 0.95),
        ("pearson_perturbed", "all"): (0.3, 0.8),
        ("mse", "all"): (0.02, 0.004),
        ("discrimination", "all"): (0.7, 0.98),
        ("energy_distance", "all"): (0.8, 0.05),
        ("de_recall", "all"): (0.2, 0.6),
    }
    rows = []
    for (metric, genes), (level, ceiling) in metrics.items():
        for method in (*methods, "replicate"):
            for debiased in (False, True):
                if (method in ("control", "replicate") and debiased) or (method == "control" and metric.startswith("pearson")):
                    continue
                skill = {"stacked": 0.75, "dbdiffusion": 0.65, "replicate": 1.0, "permuted": -0.1}.get(method, 0.4) + 0.08 * debiased
                for target in targets:
                    value = level + skill * (ceiling - level) + random.normal(0, 0.12 * abs(ceiling - level))
                    rows.append((1, FOLD, method, debiased, target, metric, genes, value, ceiling, level))
    columns = ["seed", "fold", "method", "debiased", "target", "metric", "genes", "value", "ceiling", "baseline"]
    contracts.SCORES.write(pd.DataFrame(rows, columns=columns), path)


def write_calibration(path: Path, seed: int, checks: tuple[str, ...] | None = None) -> None:
    """Rates of several error models: t holds, cells_only is far too short; all checks, of a simulated screen."""
    random = np.random.default_rng(seed)
    rows = []

    def rate(check: str, method: str, level: float, stratum: str, value: float, n: int) -> None:
        half = 1.96 * np.sqrt(max(value * (1 - value), 1e-4) / n)
        rows.append((check, method, level, stratum, value, n, max(value - half, 0.0), min(value + half, 1.0)))

    groups = [f"{name} {word}" for name in ("expression", "effect") for word in ("low", "mid", "high")]
    groups += ["k_eff few", "k_eff many", "confidence low", "confidence high"]
    for method, loss in (("t", 0.0), ("conformal", -0.01), ("cells_only", 0.55), ("conservative", 0.2)):
        for level in (0.5, 0.8, 0.9, 0.95):
            rate("coverage", method, level, "per target", min(1.0, level * (1 - loss)), 2400)
            width = stats.norm.ppf(0.5 + level / 2) * (0.4 - 0.6 * loss * 0.5)
            rows.append(("width", method, level, "per target", width, 2400, np.nan, np.nan))
            for check, names in (("coverage", groups), ("coverage_truth", ("per target", "affected genes", "unaffected genes"))):
                for group in names:
                    rate(check, method, level, group, min(1.0, level * (1 - loss) + random.normal(0, 0.02)), 800)
    for test, loss in (("direction", -0.1), ("selection", 0.0), ("t", 0.1)):
        for k, predictor in enumerate(("", ":knn", ":dbdiffusion", ":training_mean", ":lambda_0", ":lambda_1")):
            for q in (0.05, 0.1, 0.2):
                rate("fdr", test + predictor, q, "per target", min(1.0, q * (0.5 + 0.2 * k + 2 * loss)), 24)
                rate("fdr", test + predictor, q, "pooled", min(1.0, q * (0.7 + 0.2 * k + 3 * loss)), 150)
                rate("power", test + predictor, q, "pooled", min(1.0, 0.1 + q - 0.03 * k + loss * 0.5), 600)
                if not predictor:
                    rate("fdr_truth", test, q, "per target", 0.4 * q, 24)
                    rate("fdr_truth", test, q, "pooled", 0.6 * q, 150)
        for check in ("shuffled_effects_fdr", "shuffled_effects_calls", "permuted_labels_calls", "equivalence", "sign_error"):
            rate(check, test, 0.1, "pooled", 0.04 + loss * 0.3, 300)
        rate("permuted_labels_targets", test, 0.1, "per target", 0.0, 24)
        rate("doubling_calls", test, 0.0, "pooled", 0.002, 300)
    for method, scale in (("t", 1.0), ("t:dbdiffusion", 3.0), ("t:lambda_1", 5.0)):
        for level, change in ((0.5, 0.001), (0.9, 0.01), (0.99, 0.02), (1.0, 0.05)):
            rows.append(("doubling_log10_p", method, level, "pooled", scale * change, 3000, np.nan, np.nan))
    for check, method, power in (
        ("control_guides_p", "t", 1.0),
        ("control_guides_p", "prediction_error", 0.9),
        ("permuted_labels_p", "t", 0.5),
    ):
        for u in np.linspace(0.05, 0.95, 19).round(2):
            rows.append((check, method, float(u), "pooled", float(u**power), 640, float(max(u - 0.04, 0)), float(min(u + 0.04, 1))))
    for method in ("t", "prediction_error"):
        rate("control_guides_fdr", method, 0.1, "per guide", 0.1, 16)
        rows.append(("control_guides_ks", method, 0.01, "pooled", 0.3, 640, np.nan, np.nan))
    for q in (0.05, 0.1, 0.2):
        rate("power_replicate", "replicate", q, "pooled", 0.45 + q, 600)
        rate("fdr_replicate", "replicate", q, "pooled", 0.4 * q, 600)
        rate("fdr_truth", "replicate", q, "pooled", 0.9 * q, 600)
    columns = ["check", "method", "level", "stratum", "value", "n", "low", "high"]
    frame = pd.DataFrame(rows, columns=columns)
    contracts.CALIBRATION.write(frame if checks is None else frame[frame["check"].isin(checks)], path)


def write_compute(path: Path, *, gpu: bool = False) -> None:
    """Costs of the usual rules."""
    rules = [
        ("qc", 1, 8.0, 0.6),
        ("moments", 1, 3.5, 0.4),
        ("vae", 15, 1900.0, 1.8),
        ("diffusion", 15, 5200.0, 2.1),
        ("generate", 15, 640.0, 1.6),
    ]
    rules += [("effects", 5, 12.0, 0.5), ("locations", 5, 90.0, 0.9), ("inference", 5, 230.0, 1.2), ("scores", 5, 75.0, 0.8)]
    frame = pd.DataFrame(rules, columns=["rule", "jobs", "seconds", "peak_memory"]).astype({"jobs": "int64"})
    trained = frame["rule"].isin(["vae", "diffusion", "generate"]) & gpu
    frame["gpu_memory"] = np.where(trained, 3.4, np.nan)
    frame["device"] = np.where(trained, "NVIDIA H100", "cpu")
    contracts.COMPUTE.write(frame, path)


def write_study(path: Path, seed: int) -> None:
    """Rates over difficulty x perturbations x generator: intervals by error model and level, calls by test and rate, and other rows."""
    random = np.random.default_rng(seed)
    rows = []
    empty = dict.fromkeys(("level", "q", "coverage", "width", "fdr", "fdr_target", "power", "power_replicate", "mse_ratio"), np.nan)
    for difficulty, perturbations, generator in product(("easy", "sparse", "heterogeneous"), (30, 100, 300), ("informative", "useless")):
        cell = {"difficulty": difficulty, "perturbations": perturbations, "generator": generator, "screens": 60}

        def add(cell=cell, **values: object) -> None:
            row = {**empty, **cell, **values}
            for name in ("coverage", "fdr", "fdr_target", "power", "power_replicate", "mse_ratio"):
                value = float(np.clip(row[name] + random.normal(0, 0.01), 0, 1))
                row |= {name: value, f"{name}_low": max(value - 0.02, 0), f"{name}_high": min(value + 0.02, 1)}
            rows.append(row)

        for (model, loss), level in product((("t", 0.0), ("conformal", 0.01), ("cells_only", 0.5), ("conservative", 0.2)), (0.8, 0.95)):
            add(error_model=model, level=level, coverage=level * (1 - loss), width=0.4)
        for (test, loss), q in product((("direction", -0.02), ("selection", 0.0), ("selection_target", 0.02), ("t", 0.05)), (0.1, 0.2)):
            power = 0.1 + 0.0005 * perturbations - loss
            add(error_model=test, q=q, fdr=q * (0.8 + 4 * loss), fdr_target=0.7 * q, power=power, power_replicate=0.55 + q)
        for method, ratio in (("stacked", 0.4), ("dbdiffusion", 0.6), ("neighbour_mean", 1.0)):
            add(error_model=f"estimate:{method}", mse_ratio=ratio if generator == "informative" else 0.95)
    pd.DataFrame(rows).to_parquet(path)


def write_record(path: Path, *, fold: str, crossfit: str, level: float, steps: int = 3000, validation: bool = True) -> Path:
    """A training record with a falling loss."""
    random = np.random.default_rng(int(crossfit) + 10 * int(fold))
    history = []
    for epoch in range(1, 61):
        train = level + np.exp(-epoch / 8) + random.normal(0, 0.004)
        row = {"epoch": epoch, "step": epoch * steps // 60, "train": float(train)}
        history.append(row | ({"validation": float(train + 0.03 + 0.0005 * epoch)} if validation else {}))
    write_json(path, {"fold": fold, "crossfit": crossfit, "history": history, "best_epoch": 40, "steps": steps, "seconds": 12.0})
    return path
