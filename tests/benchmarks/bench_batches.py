"""Held-out loss and seconds of training by cells in a training step, and peak learning rate, on screens of few and of more cells.

Run by hand: PYTHONPATH=workflow_scripts python tests/benchmarks/bench_batches.py [seeds]
Losses are what early stopping sees: of the autoencoder the negative evidence bound per gene, of the denoiser the error per coordinate, both
of a tenth of the cells. The denoisers of a screen and seed have the same latents, those of the default autoencoder. Batches of few cells
are smaller than asked for (`training.Plan.batch`): printed is what they were. One thread.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pandas as pd
import torch
from bench_generative import known_conditions, screen

from dbdiffusion.config.generator import DiffusionConfig, VaeConfig
from dbdiffusion.generative.cells import Cells
from dbdiffusion.generative.diffusion import denoiser_training
from dbdiffusion.generative.fitting import fit_all
from dbdiffusion.generative.latents import latents_of
from dbdiffusion.generative.training import Training
from dbdiffusion.generative.vae import CellTensors, fit_vae, vae_training

CPU = torch.device("cpu")
PER_PERTURBATION = (70, 140, 280)
"""Cells of the screen, of which a quarter is trained on."""
TRIED = {"vae": [(256, 2.0e-3), (512, 2.0e-3), (512, 4.0e-3)], "diffusion": [(256, 2.0e-3), (512, 2.0e-3), (512, 3.0e-3)]}


def measured(training: Training) -> dict[str, float]:
    (fitted,) = fit_all([training], device=CPU)
    best = min(row["validation"] for row in fitted.history)
    return {"batch": training.plan.batch, "steps": fitted.steps, "loss": best, "seconds": fitted.seconds}


def of_screen(cells: Cells, seed: int) -> list[dict[str, float | str]]:
    known = known_conditions(cells, DiffusionConfig().uncertain_conditions)
    network, _ = fit_vae(cells, VaeConfig(), device=CPU, seed=seed)  # Compiles the loops, too.
    data = CellTensors.make(cells, network.counts, CPU)
    latents = latents_of(network, data, known.names.get_indexer(cells.perturbation), known.values, True)
    options, rows = {"device": CPU, "seed": seed}, []
    for asked, rate in TRIED["vae"]:
        made = vae_training(cells, VaeConfig(batch_size=asked, learning_rate=rate), **options)
        rows.append({"model": "vae", "asked": asked, "rate": rate, **measured(made)})
    for asked, rate in TRIED["diffusion"]:
        config = DiffusionConfig(batch_size=asked, learning_rate=rate)
        made = denoiser_training(latents, config, doubt=known.doubt(CPU), **options)
        rows.append({"model": "diffusion", "asked": asked, "rate": rate, **measured(made)})
    return [{"cells": len(cells), "seed": seed, **row} for row in rows]


def main(seeds: str = "3") -> None:
    torch.set_num_threads(1)
    rows = []
    for per in PER_PERTURBATION:
        with tempfile.TemporaryDirectory() as folder:
            cells, _ = screen(Path(folder), cells_per_perturbation=per, cells_per_control_guide=per)
        for seed in range(1, int(seeds) + 1):
            rows += of_screen(cells, seed)
    table = pd.DataFrame(rows)
    first = table.groupby(["cells", "model", "seed"], sort=False)["loss"].transform("first")
    table["difference"] = table["loss"] - first
    groups = table.groupby(["cells", "model", "asked", "rate"], sort=False)
    found = groups.agg(batch=("batch", "first"), steps=("steps", "mean"), seconds=("seconds", "mean"), loss=("loss", "mean"))
    # Paired by seed, to the first of those tried: seeds differ in what they hold out by more than batches do.
    found["difference"], found["se"] = groups["difference"].mean(), groups["difference"].std() / int(seeds) ** 0.5
    print(found.round({"steps": 0, "seconds": 2, "loss": 4, "difference": 5, "se": 5}).to_string())


if __name__ == "__main__":
    main(*sys.argv[1:])
