"""Cost and quality of the generator: this project's protocol against the published design, in one run on one machine.

Run by hand: PYTHONPATH=workflow_scripts python tests/benchmarks/bench_generative.py [threads [device [graphs]]]; one thread of the CPU by
default: on CPUs the workflow trains and samples its models side by side, each on one. device: as config key run.device;
graphs: with CUDA graphs.
Writes results/bench/summary.json and results/bench/growth.png. Seconds per target of the published design are its measured step times x its
step counts (one autoencoder and one diffusion model per target; 30,000 cells of the target and of each of 5 neighbours at 1000 guided
steps). Its quality is measured at equal budget: trained for as long as the default protocol took. Quality is that of the ten strongest
perturbations seen in training, against cells held out of training (three of four cells), equally many of all samples (means over samples
of the held-out ones, since a single one's score is noisy); guidance as tuned.
Seconds per target of this project are those of a fold: training, trials of guidance and sampling of all its models. Targets and
pseudo-targets are taken as guided, which they are where guidance is found to help: each cell is two passes of the network a step then.
Shares of the matrix-multiply rate: operations of a training step over its time, against the rate of products of the batch and the widest
layer, measured in turns with the steps; in single precision, and in the precision that the steps' products have.
`side_by_side_gain`: training steps a second of the models of a fold side by side, over those of one after another.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import resource
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import torch
from matplotlib.ticker import LogLocator, NullLocator
from torch.utils.flop_counter import FlopCounterMode

from dbdiffusion.benchmark import distribution
from dbdiffusion.config.datasets import SimulateDataset
from dbdiffusion.config.generator import DiffusionConfig, GenerationConfig, VaeConfig
from dbdiffusion.data.normalise import log_normalise
from dbdiffusion.data.sets import CONTROL, EffectSet
from dbdiffusion.data.simulate import write_screen
from dbdiffusion.figures import style
from dbdiffusion.generative.cells import Cells
from dbdiffusion.generative.conditions import Conditions
from dbdiffusion.generative.diffusion import DiffusionLoss, Objective, denoiser_training, fit_denoiser, sampling_schedule
from dbdiffusion.generative.generate import SEEN, Generator
from dbdiffusion.generative.latents import latents_of
from dbdiffusion.generative.offsets import MeanOffsets, fit_offsets
from dbdiffusion.generative.side_by_side import SideBySide
from dbdiffusion.generative.training import Plan, Trainer, Training, deterministic
from dbdiffusion.generative.tuning import CELLS, STRENGTHS, best_strength, trial_errors
from dbdiffusion.generative.vae import CellTensors, VaeLoss, fit_vae, vae_training
from dbdiffusion.runtime.device import resolve_device
from dbdiffusion.runtime.files import write_json

MODELS, TARGETS, PSEUDO_TARGETS = 3, 20, 40
"""Cross-fit models, targets and pseudo-targets (of all models together) of an outer fold: 60 perturbations in the default 3 folds."""
REFERENCE_STEPS = {"vae": 200_000, "diffusion": 800_000}
REFERENCE_CELLS = 6 * 30_000
ROUNDS = 7
"""Of measuring training steps and products in turns."""
STEPS, SAMPLE_SEEDS = (25, 50, 100, 1000), (1, 2, 3)
SIZES = {
    "cells": [{"cells_per_perturbation": n, "cells_per_control_guide": n} for n in (140, 280, 560, 1120)],
    "genes": [{"genes": n} for n in (300, 600, 1200, 2400)],
    "perturbations": [{"perturbations": n} for n in (30, 60, 120, 240)],
}
"""Of the screen; a quarter of its cells are trained on."""
GROWTH_EPOCHS = 10
REFERENCE = (
    VaeConfig(
        kind="autoencoder", hidden=[1024] * 3, latent=128, activation="prelu", norm="batch", batch_size=128, learning_rate=5e-4, patience=0,
        max_epochs=10**7, validation_share=0.0,
    ),
    DiffusionConfig(
        uncertain_conditions=False,
        widths=[512, 512, 256, 128], prediction="epsilon", null_token="zero", standardise_latent=False, mean_offsets=False, batch_size=128,
        learning_rate=1e-4, ema=0.9999, patience=0, max_epochs=10**7, validation_share=0.0,
    ),
    GenerationConfig(steps=1000, guidance=1.5, cells=100),
)  # fmt: skip


@dataclass
class Rate:
    """Training steps a second, their share of the matrix-multiply rate in single precision and in their own, and which that is."""

    steps_per_second: float
    share: float
    own_share: float
    precision: str


@dataclass
class Result:
    """Seconds of training, training rates of both models, cells sampled a second (as the protocol guides, and without guidance) and
    quality."""

    vae_seconds: float
    diffusion_seconds: float
    vae: Rate
    diffusion: Rate
    cells_per_second: float
    unguided_cells_per_second: float
    quality: dict[str, float]
    steps: dict[str, list[float]]


def screen(folder: Path, **sizes: int) -> tuple[Cells, Cells]:
    """A simulated screen with four times the cells of the default one, of which a quarter is for training."""
    config = SimulateDataset.model_validate({"kind": "simulate", "cells_per_perturbation": 280, "cells_per_control_guide": 280, **sizes})
    write_screen(config, counts=folder / "c.h5ad", annotations=folder / "a", truth=folder / "t.parquet")
    read = ad.read_h5ad(folder / "c.h5ad")
    kept = np.asarray((read.X > 0).mean(axis=0)).ravel() > 0.01
    counts, total = read.X[:, kept].tocsr(), read.obs["total_counts"].to_numpy(float)
    values, held = log_normalise(counts, total), np.random.default_rng(0).random(len(total)) < 0.75

    def part(at: np.ndarray) -> Cells:
        columns = (read.obs[name].astype(str).to_numpy()[at] for name in ("batch", "perturbation"))
        return Cells.make(values[at], counts[at], total[at], *columns, list(read.var_names[kept]))

    return part(~held), part(held)


def means(cells: Cells, names: list[str]) -> np.ndarray:
    return np.array([np.asarray(cells.expression[cells.perturbation == name].mean(axis=0)).ravel() for name in names])


def now(device: torch.device) -> float:
    """Seconds, when all that was asked for is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def matmul_rate(batch: int, width: int, device: torch.device, kind: torch.dtype = torch.float32) -> float:
    """Floating-point operations a second of (batch, width) x (width, width)."""
    a, b = torch.randn(batch, width).to(kind).to(device), torch.randn(width, width).to(kind).to(device)
    for _ in range(20):
        a @ b
    began, n = now(device), 100
    for _ in range(n):
        a @ b
    return 2 * batch * width**2 * n / (now(device) - began)


def training_rate(
    network: torch.nn.Module, loss, config: VaeConfig | DiffusionConfig, width: int, cells: int, rounds: int, device: torch.device
) -> Rate:
    """Steps of a training on `cells` cells, validation apart, and products in turns: medians over rounds."""
    more = {"ema": config.ema} if isinstance(config, DiffusionConfig) else {}
    plan = Plan.of(config, "bench", 1, np.arange(cells), device, **more)
    trainer, network = Trainer(network, plan, device, None), network.train()
    flops, found = step_flops(loss, network, plan.batch, device), []
    with deterministic():
        for turn in range(rounds + 1):
            began, n = now(device), 40
            for _ in range(n):
                trainer.advance(loss)
            steps = n / (now(device) - began)
            rates = [matmul_rate(plan.batch, width, device, kind) for kind in (torch.float32, plan.autocast or torch.float32)]
            if turn:  # The first one warms up.
                found.append((steps, *(flops * steps / rate for rate in rates)))
    return Rate(*np.median(found, axis=0).tolist(), "fp32" if plan.autocast is None else "bf16")


def side_by_side_gain(trainings: list[Training], rounds: int, device: torch.device) -> float:
    """Steps a second of networks side by side against as many one after another, as one alone takes them; in turns, the median over rounds.

    trainings: one more than go side by side.
    """
    alone, *several = (Trainer(one.network.train(), one.plan, device, None) for one in trainings)
    together, found = SideBySide(several, [one.loss for one in trainings[1:]]), []
    with deterministic():
        for turn in range(rounds + 1):
            seconds = []
            for step in (together.advance, partial(alone.advance, trainings[0].loss)):
                began = now(device)
                for _ in range(40):
                    step()
                seconds.append(now(device) - began)
            if turn:  # The first one warms up.
                found.append(len(several) * seconds[1] / seconds[0])
    return float(np.median(found))


def peak_memory(device: torch.device) -> float:
    """GiB, of the GPU, or of the process. Where the system tells it, of this process alone: what getrusage says, a spawned process takes
    over from its parent."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def sampling_rate(generator: Generator, conditions: np.ndarray, guidance: float) -> float:
    """Cells sampled and decoded a second, of conditions (R, dimensions)."""
    began = now(generator.device)
    made = sum(len(sample.expected) for sample in generator.sampled(conditions, guidance))
    return made / (now(generator.device) - began)


def step_flops(loss, network, batch: int, device: torch.device) -> float:
    """Operations of one training step, counted by torch."""
    with FlopCounterMode(display=False) as counter:
        loss(network, torch.arange(batch, device=device), torch.Generator(device).manual_seed(0), 1.0).backward()
    return float(counter.get_total_flops())


@dataclass
class Judge:
    """Held-out cells of the ten strongest perturbations, and the fixed PCA, learned from held-out cells of the others."""

    names: list[str]
    train: Cells
    held: Cells

    def __post_init__(self) -> None:
        self.seen, truth = means(self.train, self.names), means(self.held, self.names)
        self.strongest = 1 + np.argsort(-np.square(self.seen[1:] - self.seen[0]).sum(1))[:10]
        self.observed, self.real = (x[self.strongest] - x[0] for x in (self.seen, truth))
        chosen = [self.names[row] for row in self.strongest]
        self.axes = distribution.fit_axes(self.held.expression[~np.isin(self.held.perturbation, chosen)].toarray().astype(float), 20)
        control = self.held.expression[self.held.perturbation == CONTROL].toarray()
        self.bandwidth = distribution.median_bandwidth(self.axes.project(control))

    def effects(self) -> EffectSet:
        """Effects of the training cells of the strongest, as guidance is tuned on."""
        genes, names = pd.Index(self.train.genes), pd.Index([self.names[row] for row in self.strongest])
        some = np.zeros_like(self.observed)
        return EffectSet(names, genes, some, self.observed, some, some, np.zeros(len(names)), self.seen[0], some[0], 1)

    def compared(self, cells: np.ndarray, real: np.ndarray, n: int) -> dict[str, float]:
        """Two-sample scores at n cells of both, the mean over disjoint samples of real ones, each against the next one of `cells`."""
        options = {"axes": self.axes, "bandwidth": self.bandwidth, "seed": 1}
        samples, others = ([x[at : at + n].astype(float) for at in range(0, len(x) - n + 1, n)] for x in (cells, real))
        rows = [distribution.compare(samples[i % len(samples)], other, **options) for i, other in enumerate(others)]
        return pd.DataFrame(rows).mean().to_dict()

    def scores(self, drawn: list[np.ndarray]) -> dict[str, float]:
        """Mean two-sample scores of cells of the strongest, and of their training cells, the replicate."""
        generated, replicates = [], []
        for cells, row in zip(drawn, self.strongest, strict=True):
            real, replicate = (part.expression[part.perturbation == self.names[row]].toarray() for part in (self.held, self.train))
            n = min(len(cells), len(replicate), len(real))
            generated.append(self.compared(cells, real, n))
            replicates.append(self.compared(replicate, real, n))
        means = pd.concat(
            [pd.DataFrame(distribution.pooled(rows)).mean().add_suffix(end) for rows, end in ((generated, ""), (replicates, "_replicate"))]
        )
        return {str(name): float(value) for name, value in means.items()}

    def draw(self, generator: Generator, embedding: np.ndarray, guidance: float) -> tuple[list[np.ndarray], np.ndarray]:
        """Cells of the strongest, and their effects against generated control cells."""
        level = next(iter(generator.sampled(embedding[:1], 0.0))).mean
        found = list(generator.sampled(embedding[self.strongest], guidance))
        return [sample.drawn.cpu().numpy() for sample in found], np.array([sample.mean for sample in found]) - level

    def quality(self, generator: Generator, known: Conditions, guidance: float | str) -> dict[str, float]:
        """Slope and correlation of generated on true effects, and the two-sample scores."""
        if guidance == "tuned":
            tried = known.take([CONTROL, *(self.names[row] for row in self.strongest)])
            guidance = best_strength(trial_errors(generator, tried, self.effects()))
        drawn, generated = self.draw(generator, known.values, guidance)
        # Held-out effects as the instrument of those of the training cells: the noise of neither attenuates the slope.
        slope = distribution.effect_slope(generated, observed=self.real, replicate=self.observed).mean()
        r = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(generated, self.real, strict=True)])
        return {"guidance": float(guidance), "slope": float(slope), "r": float(r), **self.scores(drawn)}

    def by_steps(self, generator: Generator, diffusion: DiffusionConfig, known: Conditions) -> dict[str, list[float]]:
        """Energy distance to held-out cells by the number of sampling steps, once for each of SAMPLE_SEEDS."""
        out: dict[str, list[float]] = {}
        for steps in STEPS:
            for seed in SAMPLE_SEEDS:
                config = generator.config.model_copy(update={"cells": 100})
                few = replace(generator, schedule=sampling_schedule(diffusion, config.sampler, steps), config=config, seed=seed)
                out.setdefault(str(steps), []).append(self.scores(self.draw(few, known.values, 0.0)[0])["energy_distance"])
        return out


def known_conditions(train: Cells, graded: bool) -> Conditions:
    """Places of the control and the perturbations in the principal components of their effects."""
    names = [CONTROL, *sorted(set(train.perturbation) - {CONTROL})]
    effects = means(train, names) - means(train, names)[0]
    scores = np.linalg.svd(effects, full_matrices=False)
    embedding = scores[0] * scores[1]
    embedding = embedding[:, : min(64, len(names) - 2)] / np.sqrt(np.mean(embedding**2))
    values = np.column_stack([embedding, np.ones(len(names))]) if graded else embedding
    return Conditions(pd.Index(names), np.array([""] * len(names)), values, embedding.shape[1], graded)


def run(
    vae: VaeConfig,
    diffusion: DiffusionConfig,
    generation: GenerationConfig,
    train: Cells,
    held: Cells | None,
    steps: bool,
    device: torch.device,
    rounds: int = ROUNDS,
) -> Result:
    """Train, generate and measure; quality where held-out cells are given, by sampling steps too where asked."""
    known = known_conditions(train, diffusion.uncertain_conditions)
    names, placed = list(known.names), known.placed
    doubt = known.doubt(device)
    # Loops are compiled, which a machine does once, before the clock starts.
    few = {"max_steps": 2, "patience": 0}
    fit_vae(train, vae.model_copy(update=few), device=device, seed=1)
    network, first = fit_vae(train, vae, device=device, seed=1)
    data = CellTensors.make(train, network.counts, device)
    label = pd.Index(names).get_indexer(train.perturbation)
    latents = latents_of(network, data, label, known.values, diffusion.standardise_latent)
    fit_denoiser(latents, diffusion.model_copy(update=few), device=device, seed=1, doubt=doubt)
    denoiser, second = fit_denoiser(latents, diffusion, device=device, seed=1, doubt=doubt)
    offsets = MeanOffsets.none(known.values.shape[1], network.genes)
    if diffusion.mean_offsets:
        offsets = fit_offsets(network, data, latents, 1, placed)
    objective = Objective.make(diffusion, device)
    schedule = sampling_schedule(diffusion, generation.sampler, generation.steps)
    generator = Generator(network, denoiser, offsets, objective, schedule, generation, 1)
    fifty = replace(generator, schedule=sampling_schedule(diffusion, generation.sampler, 50))
    guided, unguided = (
        sampling_rate(fifty, known.values[:8], strength) * 50 / generation.steps
        for strength in (STRENGTHS[-1] if generation.guidance == "tuned" else generation.guidance, 0.0)
    )
    judge = Judge(names, train, held) if held is not None else None
    quality = judge.quality(generator, known, generation.guidance) if judge else {}
    by_steps = judge.by_steps(generator, diffusion, known) if judge and steps else {}
    # Last, for it trains on.
    losses = VaeLoss(data, vae), DiffusionLoss(latents, objective, diffusion.label_dropout, doubt)
    rates = (
        training_rate(network, losses[0], vae, vae.hidden[0], len(train), rounds, device),
        training_rate(denoiser, losses[1], diffusion, diffusion.widths[0], len(train), rounds, device),
    )
    return Result(first.seconds, second.seconds, *rates, guided, unguided, quality, by_steps)


def fold_seconds(made: Result) -> float:
    """Seconds of the models of an outer fold: training, trials of guidance and sampling.

    A trial samples each pseudo-target and seen perturbation of a model at every strength: 2 len(STRENGTHS) - 1 passes of the network a
    step, for without guidance there is one; and the control without.
    """
    guided, unguided = 1 / made.cells_per_second, 1 / made.unguided_cells_per_second
    tried = PSEUDO_TARGETS + MODELS * SEEN
    trials = CELLS * (tried * (unguided + (len(STRENGTHS) - 1) * guided) + MODELS * unguided)
    sampled = GenerationConfig().cells * (MODELS * TARGETS + tried + MODELS) * guided
    return MODELS * (made.vae_seconds + made.diffusion_seconds) + trials + sampled


def grown(sizes: dict[str, int], device: torch.device) -> dict[str, float]:
    """Seconds of an epoch of both trainings and of sampling 1000 guided cells, and peak memory, of a screen of these sizes."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        train, _ = screen(Path(folder), **sizes)
    short = {"max_epochs": GROWTH_EPOCHS, "patience": 0}
    result = run(VaeConfig(**short), DiffusionConfig(**short), GenerationConfig(), train, None, False, device, rounds=1)
    return {
        "cells": len(train),
        "genes": len(train.genes),
        "perturbations": len(set(train.perturbation)) - 1,
        "vae_epoch_seconds": result.vae_seconds / GROWTH_EPOCHS,
        "diffusion_epoch_seconds": result.diffusion_seconds / GROWTH_EPOCHS,
        "thousand_cells_seconds": 1000 / result.cells_per_second,
        "peak_memory_gb": peak_memory(device),
    }


def gains(device: torch.device, options: dict[str, bool]) -> dict[str, float]:
    """`side_by_side_gain` of MODELS autoencoders and denoisers of the default screen; options: of both configs."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        train, _ = screen(Path(folder))
    vae, diffusion, many = VaeConfig(**options), DiffusionConfig(**options), range(MODELS + 1)
    of_vae = [vae_training(train, vae, device=device, seed=seed) for seed in many]
    known, data = known_conditions(train, diffusion.uncertain_conditions), of_vae[0].loss.data
    label = known.names.get_indexer(train.perturbation)
    latents = latents_of(of_vae[0].network.to(device), data, label, known.values, diffusion.standardise_latent)
    given = {"device": device, "doubt": known.doubt(device)}
    of_denoiser = [denoiser_training(latents, diffusion, seed=seed, **given) for seed in many]
    return {name: side_by_side_gain(made, ROUNDS, device) for name, made in (("vae", of_vae), ("diffusion", of_denoiser))}


def growth(device: torch.device) -> dict[str, list[dict[str, float]]]:
    """Cost by size, one size at a time, the others those of the default screen (`SIZES`)."""
    out = {}
    for name, sizes in SIZES.items():
        # A process for each size: the peak of memory never falls within one.
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            out[name] = pool.map(partial(grown, device=device), sizes, chunksize=1)
    return out


def draw_growth(found: dict[str, list[dict[str, float]]], folder: Path) -> None:
    """Seconds (top) and memory (bottom) against each size, on logarithmic axes."""
    lines = {
        "vae_epoch_seconds": ("autoencoder, an epoch", style.BLUE),
        "diffusion_epoch_seconds": ("denoiser, an epoch", style.VERMILLION),
        "thousand_cells_seconds": ("sampling 1000 cells", style.GREEN),
    }
    with style.sheet(style.PAGE, 90, png=folder / "growth.png", pdf=folder / "growth.pdf") as page:
        axes = page.fig.subplots(2, 3, sharex="col", sharey="row")
        for (top, bottom), (name, rows) in zip(axes.T, found.items(), strict=True):
            x = [row[name] for row in rows]
            for key, (label, colour) in lines.items():
                top.plot(x, [row[key] for row in rows], "o-", ms=3, color=colour, label=label)
            bottom.plot(x, [row["peak_memory_gb"] for row in rows], "o-", ms=3, color=style.DARK)
            top.set_xscale("log", base=2)
            top.set_yscale("log")
            top.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            top.yaxis.set_major_formatter("{x:g}")
            top.yaxis.set_minor_locator(NullLocator())
            bottom.set_xlabel(f"training {name}" if name == "cells" else name)
            bottom.set_xticks(x, [f"{value:,}" for value in x])
        axes[1, 0].set_ylim(0, 1.1 * max(row["peak_memory_gb"] for rows in found.values() for row in rows))
        axes[0, 0].set_ylabel("seconds")
        axes[1, 0].set_ylabel("peak memory (GiB)")
        page.fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        style.letter_panels(list(axes.flat))


def main(threads: str = "1", where: str = "cpu", graphs: str = "") -> None:
    torch.set_num_threads(int(threads))
    device = resolve_device(where)
    with tempfile.TemporaryDirectory() as folder:
        train, held = screen(Path(folder))
    options = {"cuda_graphs": graphs == "graphs"}
    ours = run(VaeConfig(**options), DiffusionConfig(**options), GenerationConfig(), train, held, True, device)
    # The same in single precision, where products are not, to compare.
    single = {"precision": "fp32", **options}
    plain = (
        ours
        if ours.vae.precision == "fp32"
        else run(VaeConfig(**single), DiffusionConfig(**single), GenerationConfig(), train, held, False, device)
    )
    vae, diffusion, generation = REFERENCE
    # Equal budget: as many steps as the default's seconds allow, at the published design's own speed.
    probe = run(
        vae.model_copy(update={"max_steps": 20}), diffusion.model_copy(update={"max_steps": 20}), generation, train, None, False, device
    )
    steps = (
        max(20, int(ours.vae_seconds * probe.vae.steps_per_second)),
        max(20, int(ours.diffusion_seconds * probe.diffusion.steps_per_second)),
    )
    vae, diffusion = vae.model_copy(update={"max_steps": steps[0]}), diffusion.model_copy(update={"max_steps": steps[1]})
    reference = run(vae, diffusion, generation, train, held, False, device)
    ours_seconds = fold_seconds(ours) / TARGETS
    reference_seconds = (
        REFERENCE_STEPS["vae"] / reference.vae.steps_per_second
        + REFERENCE_STEPS["diffusion"] / reference.diffusion.steps_per_second
        + REFERENCE_CELLS / reference.cells_per_second
    )
    summary = {
        "reference_seconds_per_target": reference_seconds,
        "crossfit_seconds_per_target": ours_seconds,
        "cost_ratio": reference_seconds / ours_seconds,
        "train_matmul_share": ours.diffusion.share,
        "train_matmul_share_own_precision": ours.diffusion.own_share,
        "train_precision": ours.diffusion.precision,
        "train_steps_per_second": ours.diffusion.steps_per_second,
        "vae_matmul_share": ours.vae.share,
        "vae_matmul_share_own_precision": ours.vae.own_share,
        "vae_steps_per_second": ours.vae.steps_per_second,
        "sample_cells_per_second": ours.cells_per_second,
        "sample_unguided_cells_per_second": ours.unguided_cells_per_second,
        "peak_memory_gb": peak_memory(device),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {threads} thread(s)",
        **options,
        "quality_crossfit": ours.quality,
        "quality_single_precision": plain.quality,
        "single_precision": {"vae": asdict(plain.vae), "diffusion": asdict(plain.diffusion)},
        "quality_reference_equal_budget": reference.quality,
        "energy_distance_by_steps": ours.steps,
        "vae_seconds": ours.vae_seconds,
        "diffusion_seconds": ours.diffusion_seconds,
        "cells": len(train),
        "genes": len(train.genes),
        "perturbations": len(set(train.perturbation)) - 1,
    }
    folder = Path("results/bench")
    # Written before the longest part, whose failure loses nothing then.
    write_json(folder / "summary.json", summary)
    # In a process of its own, as growth is.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        summary["side_by_side_gain"] = pool.apply(gains, (device, options))
    summary["growth"] = growth(device)
    write_json(folder / "summary.json", summary)
    draw_growth(summary["growth"], folder)
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
