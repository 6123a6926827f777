"""Cost and quality of the generator: this project's protocol against the published design, in one run on one machine.

Run by hand: PYTHONPATH=workflow_scripts python tests/benchmarks/bench_generative.py [threads]
Writes results/bench/summary.json. Seconds per target of the published design are its measured step times x its step counts (one
autoencoder and one diffusion model per target; 30,000 cells of the target and of each of 5 neighbours at 1000 guided steps). Its quality is
measured at equal budget: trained for as long as the default protocol took. Quality is that of the ten strongest perturbations seen in
training, against cells held out.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from torch.utils.flop_counter import FlopCounterMode

from dbdiffusion.config.datasets import SimulateDataset
from dbdiffusion.config.generator import DiffusionConfig, GenerationConfig, VaeConfig
from dbdiffusion.data.normalise import log_normalise
from dbdiffusion.data.sets import CONTROL
from dbdiffusion.data.simulate import write_screen
from dbdiffusion.generative.cells import Cells
from dbdiffusion.generative.diffusion import Objective, diffusion_loss, fit_denoiser, sampling_schedule
from dbdiffusion.generative.generate import Generator
from dbdiffusion.generative.latents import latents_of
from dbdiffusion.generative.offsets import MeanOffsets, fit_offsets
from dbdiffusion.generative.vae import CellTensors, fit_vae, vae_loss
from dbdiffusion.runtime.files import write_json

CPU = torch.device("cpu")
MODELS, TARGETS = 3, 12
"""Cross-fit models and targets of an outer fold: 60 perturbations in 5 folds."""
REFERENCE_STEPS = {"vae": 200_000, "diffusion": 800_000}
REFERENCE_CELLS = 6 * 30_000
REFERENCE = (
    VaeConfig(
        kind="autoencoder", hidden=[1024] * 3, latent=128, activation="prelu", norm="batch", batch_size=128, learning_rate=5e-4, patience=0,
        max_epochs=10**7, validation_share=0.0,
    ),
    DiffusionConfig(
        widths=[512, 512, 256, 128], prediction="epsilon", null_token="zero", standardise_latent=False, mean_offsets=False, batch_size=128,
        learning_rate=1e-4, ema=0.9999, patience=0, max_epochs=10**7, validation_share=0.0,
    ),
    GenerationConfig(steps=1000, guidance=1.5, cells=100),
)  # fmt: skip


@dataclass
class Result:
    """Seconds of training, training rate of the diffusion model, its share of the matmul rate, cells sampled a second and quality."""

    vae_seconds: float
    diffusion_seconds: float
    vae_steps_per_second: float
    steps_per_second: float
    matmul_share: float
    vae_matmul_share: float
    cells_per_second: float
    quality: dict[str, float]


def screen(folder: Path) -> tuple[Cells, Cells]:
    """A simulated screen, cells split 70:30."""
    config = SimulateDataset.model_validate({"kind": "simulate"})
    write_screen(config, counts=folder / "c.h5ad", annotations=folder / "a", truth=folder / "t.parquet")
    read = ad.read_h5ad(folder / "c.h5ad")
    kept = np.asarray((read.X > 0).mean(axis=0)).ravel() > 0.01
    counts, total = read.X[:, kept].tocsr(), read.obs["total_counts"].to_numpy(float)
    values, held = log_normalise(counts, total), np.random.default_rng(0).random(len(total)) < 0.3

    def part(at: np.ndarray) -> Cells:
        columns = (read.obs[name].astype(str).to_numpy()[at] for name in ("batch", "perturbation"))
        return Cells.make(values[at], counts[at], total[at], *columns, list(read.var_names[kept]))

    return part(~held), part(held)


def means(cells: Cells, names: list[str]) -> np.ndarray:
    return np.array([np.asarray(cells.expression[cells.perturbation == name].mean(axis=0)).ravel() for name in names])


def matmul_rate(batch: int, width: int) -> float:
    """Floating-point operations a second of (batch, width) x (width, width)."""
    a, b = torch.randn(batch, width), torch.randn(width, width)
    for _ in range(20):
        a @ b
    began, n = time.perf_counter(), 300
    for _ in range(n):
        a @ b
    return 2 * batch * width**2 * n / (time.perf_counter() - began)


def step_flops(loss, network, batch: int) -> float:
    """Operations of one training step, counted by torch."""
    with FlopCounterMode(display=False) as counter:
        loss(network, torch.arange(batch), torch.Generator().manual_seed(0), 1.0).backward()
    return float(counter.get_total_flops())


def energy(a: np.ndarray, b: np.ndarray) -> float:
    """Energy distance of two samples, unbiased."""
    from scipy.spatial.distance import cdist

    own = [cdist(x, x).sum() / (len(x) * (len(x) - 1)) for x in (a, b)]
    return float(2 * cdist(a, b).mean() - sum(own))


def quality(generator: Generator, embedding: np.ndarray, names: list[str], train: Cells, held: Cells) -> dict[str, float]:
    """Slope and correlation of generated on observed effects, energy distance, two-sample AUC, zeros and variances of the strongest ten."""
    seen, truth = means(train, names), means(held, names)
    strongest = 1 + np.argsort(-np.square(seen[1:] - seen[0]).sum(1))[:10]
    values, drawn = [], []
    for row in (0, *strongest):
        cells, mean, _ = generator.expression(generator.coordinates(embedding[[row]])[0], embedding[row])
        drawn.append(cells.numpy())
        values.append(mean)
    generated, observed, real = np.array(values)[1:] - values[0], (seen - seen[0])[strongest], (truth - truth[0])[strongest]
    dense = held.expression.toarray()
    axes = np.linalg.svd(dense - dense.mean(0), full_matrices=False)[2][:20].T
    out: dict[str, list[float]] = {name: [] for name in ("r", "energy", "energy_replicate", "auc", "zeros", "variance")}
    for i, row in enumerate(strongest):
        a, b = drawn[i + 1], dense[held.perturbation == names[row]]
        c = train.expression[train.perturbation == names[row]].toarray()
        both = np.vstack([a, b, c])
        label = np.arange(len(both)) < len(a)
        forest = RandomForestClassifier(100, min_samples_leaf=5, random_state=0)
        guess = cross_val_predict(forest, both, label, cv=StratifiedKFold(3, shuffle=True, random_state=0), method="predict_proba")[:, 1]
        out["auc"].append(roc_auc_score(label, guess))
        out["r"].append(np.corrcoef(generated[i], real[i])[0, 1])
        out["energy"].append(energy(a @ axes, b @ axes))
        out["energy_replicate"].append(energy(c @ axes, b @ axes))
        out["zeros"].append(np.abs((a == 0).mean(0) - (c == 0).mean(0)).mean())
        out["variance"].append(np.median(a.var(0) / np.maximum(c.var(0), 1e-3)))
    # Cov(seen, held out) is free of sampling noise, unlike the variance of either.
    slope = (generated * real).sum() / (observed * real).sum()
    return {"slope": float(slope), **{name: float(np.mean(value)) for name, value in out.items()}}


def run(vae: VaeConfig, diffusion: DiffusionConfig, generation: GenerationConfig, train: Cells, held: Cells | None) -> Result:
    """Train, generate and measure; quality where held-out cells are given."""
    names = [CONTROL, *sorted(set(train.perturbation) - {CONTROL})]
    effects = means(train, names) - means(train, names)[0]
    scores = np.linalg.svd(effects, full_matrices=False)
    embedding = scores[0] * scores[1]
    embedding = embedding[:, : min(64, len(names) - 2)] / np.sqrt(np.mean(embedding**2))
    network, first = fit_vae(train, vae, device=CPU, seed=1)
    data = CellTensors.make(train, network.counts, CPU)
    label = pd.Index(names).get_indexer(train.perturbation)
    latents = latents_of(network, data, label, embedding, diffusion.standardise_latent)
    denoiser, second = fit_denoiser(latents, diffusion, device=CPU, seed=1)
    offsets = fit_offsets(network, data, latents, 1) if diffusion.mean_offsets else MeanOffsets.none(embedding.shape[1], network.genes)
    objective = Objective.make(diffusion, CPU)
    schedule = sampling_schedule(diffusion, generation.sampler, generation.steps)
    generator = Generator(network, denoiser, offsets, objective, schedule, generation, 1)
    few = replace(generator, schedule=sampling_schedule(diffusion, generation.sampler, 50))
    began = time.perf_counter()
    few.expression(few.coordinates(embedding[:8])[0], embedding[0])
    rate = 8 * generation.cells / (time.perf_counter() - began) * 50 / generation.steps
    flops = step_flops(diffusion_loss(latents, objective, diffusion.label_dropout), denoiser, diffusion.batch_size)
    vae_flops = step_flops(vae_loss(data, vae), network, vae.batch_size)
    return Result(
        first.seconds,
        second.seconds,
        first.steps_per_second,
        second.steps_per_second,
        flops * second.steps_per_second / matmul_rate(diffusion.batch_size, diffusion.widths[0]),
        vae_flops * first.steps_per_second / matmul_rate(vae.batch_size, vae.hidden[0]),
        rate,
        quality(generator, embedding, names, train, held) if held is not None else {},
    )


def main(threads: int = 1) -> None:
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        train, held = screen(Path(folder))
    ours = run(VaeConfig(), DiffusionConfig(), GenerationConfig(), train, held)
    vae, diffusion, generation = REFERENCE
    # Equal budget: as many steps as the default's seconds allow, at the published design's own speed.
    probe = run(vae.model_copy(update={"max_steps": 20}), diffusion.model_copy(update={"max_steps": 20}), generation, train, None)
    steps = max(20, int(ours.vae_seconds * probe.vae_steps_per_second)), max(20, int(ours.diffusion_seconds * probe.steps_per_second))
    vae, diffusion = vae.model_copy(update={"max_steps": steps[0]}), diffusion.model_copy(update={"max_steps": steps[1]})
    reference = run(vae, diffusion, generation, train, held)
    fold = MODELS * (ours.vae_seconds + ours.diffusion_seconds + 50 * GenerationConfig().cells / ours.cells_per_second)
    reference_seconds = (
        REFERENCE_STEPS["vae"] / reference.vae_steps_per_second
        + REFERENCE_STEPS["diffusion"] / reference.steps_per_second
        + REFERENCE_CELLS / reference.cells_per_second
    )
    summary = {
        "reference_seconds_per_target": reference_seconds,
        "crossfit_seconds_per_target": fold / TARGETS,
        "cost_ratio": reference_seconds / (fold / TARGETS),
        "train_matmul_share": ours.matmul_share,
        "vae_matmul_share": ours.vae_matmul_share,
        "train_steps_per_second": ours.steps_per_second,
        "sample_cells_per_second": ours.cells_per_second,
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "device": f"cpu, {threads} thread(s)",
        "quality_crossfit": ours.quality,
        "quality_reference_equal_budget": reference.quality,
        "vae_seconds": ours.vae_seconds,
        "diffusion_seconds": ours.diffusion_seconds,
        "cells": len(train),
        "genes": len(train.genes),
        "perturbations": len(set(train.perturbation)) - 1,
    }
    write_json(Path("results/bench/summary.json"), summary)
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
