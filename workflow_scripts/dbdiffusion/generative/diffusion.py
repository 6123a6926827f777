"""The diffusion model of latents, conditioned on the perturbation: loss, training, and what predicts the noise when sampling."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dbdiffusion.config.generator import DiffusionConfig
from dbdiffusion.data.sets import CONTROL, EffectSet
from dbdiffusion.generative import checkpoint, kernels
from dbdiffusion.generative.cells import load_cells
from dbdiffusion.generative.conditions import Conditions, Doubt, taken
from dbdiffusion.generative.denoiser import Denoiser
from dbdiffusion.generative.fitting import Fitted, each_or_all, fit_all, training_record
from dbdiffusion.generative.guidance import Epsilon, guided
from dbdiffusion.generative.kernels import array, fused
from dbdiffusion.generative.latents import Latents, latents_of
from dbdiffusion.generative.networks import seeded
from dbdiffusion.generative.offsets import MeanOffsets, fit_offsets
from dbdiffusion.generative.recording import InParts
from dbdiffusion.generative.samplers import SPACING
from dbdiffusion.generative.schedule import NoiseSchedule, noise_schedule
from dbdiffusion.generative.training import Plan, Training, split_rows
from dbdiffusion.generative.vae import CellTensors, load_vae
from dbdiffusion.runtime.device import resolve_device
from dbdiffusion.runtime.errors import UserError
from dbdiffusion.runtime.files import read_json, write_json
from dbdiffusion.runtime.provenance import code_hash
from dbdiffusion.runtime.seeds import derive_seed


class Noised(NamedTuple):
    """Cells of a batch: y, noised, and target, what the network is to predict, each (n, coordinates); t, timesteps, and weight, that of
    the squared error, (n,); label (n,)."""

    y: Tensor
    target: Tensor
    t: Tensor
    weight: Tensor
    label: Tensor


@dataclass(frozen=True)
class Objective:
    """What is predicted at each timestep. alpha_bar: (T,); factors: (T, 4) of x and noise in the noised x, and of x and noise in the
    prediction's target; weights: (T,) of the squared error. All on the device."""

    alpha_bar: Tensor
    factors: Tensor
    weights: Tensor
    prediction: str

    @classmethod
    def make(cls, config: DiffusionConfig, device: torch.device) -> Objective:
        """Targets are epsilon, x0 or v = sqrt(abar) eps - sqrt(1 - abar) x. Weights are min-SNR weights (Hang et al. 2023), min(SNR, gamma)
        in units of the x0 loss, translated to the prediction; 1 without."""
        level = noise_schedule(config.schedule, config.timesteps).alpha_bar
        signal, spread, none = np.sqrt(level), np.sqrt(1 - level), np.zeros_like(level)
        target = {"epsilon": (none, none + 1), "x0": (none + 1, none), "v": (-spread, signal)}[config.prediction]
        snr = level / (1 - level)
        kept = np.minimum(snr, config.min_snr_gamma or np.inf)
        weights = {"epsilon": kept / snr, "x0": kept, "v": kept / (snr + 1)}[config.prediction]
        tables = level, np.stack([signal, spread, *target], axis=1), weights if config.min_snr_gamma else none + 1
        return cls(*(torch.from_numpy(x).float().to(device) for x in tables), config.prediction)

    def noised(self, latents: Latents, rows: Tensor, stream: torch.Generator, dropout: float) -> Noised:
        """Draws x from the posteriors of rows (n,), noised; the null label replaces a share `dropout` of their labels."""
        n, d, device, (steps, null) = len(rows), latents.mean.shape[1], rows.device, (len(self.alpha_bar), len(latents.conditions))
        noise = torch.randn((2, n, d), generator=stream, device=device)
        # Stratified timesteps: one in each n-th of the range, in an order independent of the cells.
        order = torch.randperm(n, generator=stream, device=device)
        uniform = torch.rand((2, n), generator=stream, device=device)
        if fused(latents.mean, noise):
            y, target, weight, t, label = (torch.empty_like(x) for x in (noise[0], noise[0], uniform[0], order, order))
            known = latents.mean, latents.deviation, latents.label, rows, noise, order, uniform
            kernels.noised(
                *map(array, known), np.float32(dropout), null, *map(array, (self.factors, self.weights, y, target, t, weight, label))
            )
            return Noised(y, target, t, weight, label)
        t = ((order + uniform[0]) * (steps / n)).long().clamp_max(steps - 1)
        label = torch.where(uniform[1] < dropout, null, latents.label.index_select(0, rows))
        x, (of_x, of_noise, x_aimed, noise_aimed) = latents.draw(rows, noise[0]), self.factors.index_select(0, t).split(1, dim=1)
        y, target = of_x * x + of_noise * noise[1], x_aimed * x + noise_aimed * noise[1]
        return Noised(y, target, t, self.weights.index_select(0, t), label)

    def epsilon(self, predicted: Tensor, y: Tensor, t: int) -> Tensor:
        """The noise that a prediction at timestep t implies."""
        if self.prediction == "epsilon":
            return predicted
        level = self.alpha_bar[t]
        if self.prediction == "x0":
            return (y - level.sqrt() * predicted) / (1 - level).sqrt()
        return level.sqrt() * predicted + (1 - level).sqrt() * y


@dataclass(frozen=True)
class DiffusionLoss(InParts):
    """Weighted mean squared error of the prediction over cells and coordinates; the null label replaces a share of the labels, and `doubt`
    makes conditions uncertain. filled: rows at least that the inputs have for conditions, beyond those there are without meaning."""

    latents: Latents
    objective: Objective
    label_dropout: float
    doubt: Doubt | None = None
    filled: int = 0

    def inputs(self, rows: Tensor, stream: torch.Generator, share: float) -> tuple[Tensor, ...]:
        table = self.latents.conditions
        y, target, t, weight, label = self.objective.noised(self.latents, rows, stream, self.label_dropout)
        which, label = taken(label, len(table))
        conditions = self.doubt(table, which, stream) if self.doubt else table.index_select(0, which)
        if (missing := self.filled - len(which)) > 0:  # The null label stays the one after the last.
            label = label.masked_fill(label == len(which), self.filled)
            conditions = torch.nn.functional.pad(conditions, (0, 0, 0, missing))
        return y, t, conditions, label, target, weight

    def value(self, network: Denoiser, *inputs: Tensor) -> Tensor:
        return network.misfit_of(*inputs)

    def shape(self, rows: int) -> Hashable:
        known, width = self.latents.conditions.shape
        return max(self.filled, min(known, rows)), width

    def __call__(self, network: Denoiser, rows: Tensor, stream: torch.Generator, share: float = 1.0) -> Tensor:
        return network.misfit(*self.inputs(rows, stream, share))


def diffusion_validation(latents: Latents, objective: Objective, rows: np.ndarray, seed: int, repeats: int = 4):
    """Held-out loss of the conditional model with the same noise at every call; None without held-out cells."""
    if not len(rows):
        return None
    loss = DiffusionLoss(latents, objective, 0.0)
    held = torch.from_numpy(np.tile(rows, repeats)).to(latents.mean.device)

    def validate(network: Denoiser) -> float:
        stream = torch.Generator(latents.mean.device).manual_seed(derive_seed(seed, "validation noise"))
        parts = [(loss(network, part, stream), len(part)) for part in held.split(2048)]
        return float(sum(float(value) * n for value, n in parts) / len(held))

    return validate


def denoiser_training(
    latents: Latents,
    config: DiffusionConfig,
    *,
    device: torch.device,
    seed: int,
    doubt: Doubt | None = None,
    filled: int = 0,
    scratch: str | Path | None = None,
    on_step=None,
    name: str = "",
) -> Training:
    """Of a denoiser of these latents, their conditions as certain as `doubt` leaves them, or sharp without. The held-out loss is that of
    sharp conditions. filled: see `DiffusionLoss`; name: for messages.

    Raises ValueError for labels without a condition.
    """
    if not bool(((latents.label >= 0) & (latents.label < len(latents.conditions))).all()):
        raise ValueError(f"every label must be one of the {len(latents.conditions)} conditions")
    coordinates, condition = latents.mean.shape[1], latents.conditions.shape[1]
    shape = (coordinates, condition, config.widths, config.null_token, config.timesteps)
    network = seeded(lambda: Denoiser(*shape), derive_seed(seed, "diffusion", "weights"))
    objective = Objective.make(config, device)
    train, held = split_rows(len(latents.mean), config.validation_share, derive_seed(seed, "diffusion"))
    plan = Plan.of(config, "diffusion", seed, train, device, ema=config.ema, validations=40)
    settings = code_hash(__file__), config.model_dump(exclude={"cuda_graphs"}), str(plan.autocast), seed
    seen = latents.mean, latents.deviation, latents.label, latents.conditions, *(vars(doubt).values() if doubt else ())
    key = checkpoint.digest(*settings, *seen)
    loss = DiffusionLoss(latents, objective, config.label_dropout, doubt, filled)
    path = checkpoint.scratch_file(scratch, "diffusion", key)
    return Training(network, loss, plan, diffusion_validation(latents, objective, held, seed), path, on_step, name)


def trained_denoiser(training: Training, fitted: Fitted) -> Denoiser:
    """With its best averaged weights, in evaluation mode."""
    training.network.load_state_dict(fitted.weights)
    return training.network.eval()


def fit_denoiser(latents: Latents, config: DiffusionConfig, *, device: torch.device, **options) -> tuple[Denoiser, Fitted]:
    """Train on the latents; the network comes back on the device in evaluation mode; options: of `denoiser_training`."""
    training = denoiser_training(latents, config, device=device, **options)
    fitted = fit_all([training], device=device)[0]
    return trained_denoiser(training, fitted), fitted


def epsilon_of(network: Denoiser, objective: Objective, conditions: Tensor, guidance: Tensor) -> Epsilon:
    """Guided noise prediction for latents (R, n, coordinates) of R conditions (R, dimensions) at once, with strengths (R,)."""
    label, null = network.embed(conditions)[:, None], network.null_label()[:, None]

    def predict(label: Tensor) -> Epsilon:
        def epsilon(y: Tensor, t: int) -> Tensor:
            return objective.epsilon(network(y, torch.tensor([t], device=y.device), label), y, t)

        return epsilon

    return guided(predict(label), predict(null), guidance[:, None, None])


def sampling_schedule(config: DiffusionConfig, sampler: str, steps: int) -> NoiseSchedule:
    """The trained schedule respaced to `steps` levels for a sampler."""
    return noise_schedule(config.schedule, config.timesteps).respaced(steps, SPACING[sampler])


@dataclass(frozen=True)
class _Begun:
    """What the denoiser of one cross-fit model is learned from, and where it is left; seed: of the model."""

    name: str
    known: Conditions
    latents: Latents
    offsets: MeanOffsets
    cells: int
    seed: int
    weights: str | Path
    record: str | Path


def write_diffusions(
    *,
    cells: str | Path,
    splits: str | Path,
    effects: str | Path,
    embedding: Sequence[str | Path],
    vae: Sequence[str | Path],
    vae_record: Sequence[str | Path],
    fold: str,
    crossfit: Sequence[str],
    config: DiffusionConfig,
    device: str,
    seed: int,
    scratch: str | Path | None,
    weights: Sequence[str | Path],
    record: Sequence[str | Path],
) -> None:
    """Learn the denoisers of cross-fit models of `fold`, each on the latents of its own perturbations' cells and the control's; on a
    GPU side by side.

    Training perturbations are conditioned on their own embedding (role train), on features, or both, sharp or uncertain. weights:
    safetensors; record: JSON; as embedding, vae and vae_record one for each of `crossfit`. Killed trainings resume from `scratch`, ended
    ones among them.
    """
    on, panel = resolve_device(device), EffectSet.read(effects)

    def begun(name: str, embedding: str | Path, vae: str | Path, vae_record: str | Path, weights: str | Path, record: str | Path) -> _Begun:
        network = load_vae(vae, vae_record, on)
        data = load_cells(cells, splits, panel, fold=fold, crossfit=name)
        if read_json(vae_record)["genes_digest"] != checkpoint.digest(data.genes):
            fix = "make it again from these effects"
            raise UserError("the autoencoder was learned on another panel of genes", where=str(vae_record), fix=fix)
        known = Conditions.read(embedding, config).select(("train", "control"))
        label = known.names.get_indexer(data.perturbation)
        if (label < 0).any():
            absent, fix = sorted(set(data.perturbation[label < 0])), "make it again for this fold and cross-fit model"
            raise UserError(f"no own embedding for {absent[:5]}", where=str(embedding), fix=fix)
        tensors = CellTensors.make(data, network.counts, on)
        latents = latents_of(network, tensors, label, known.values, config.standardise_latent)
        own_seed = derive_seed(seed, "diffusion", fold, name)
        offsets = MeanOffsets.none(known.values.shape[1], network.genes)
        if config.mean_offsets and known.placed:
            offsets = fit_offsets(network, tensors, latents, own_seed, known.placed)
        return _Begun(name, known, latents, offsets, len(data), own_seed, weights, record)

    def learn(models: Sequence[tuple]) -> None:
        made = [begun(*model) for model in models]
        # As many conditions for all, for those side by side have inputs of one shape.
        filled = max(min(len(one.latents.conditions), config.batch_size) for one in made)
        trainings = [
            denoiser_training(
                one.latents,
                config,
                device=on,
                seed=one.seed,
                doubt=one.known.doubt(on),
                filled=filled,
                scratch=scratch,
                name=f"diffusion of model {one.name}",
            )
            for one in made
        ]
        for one, training, fitted in zip(made, trainings, fit_all(trainings, device=on), strict=True):
            denoiser = trained_denoiser(training, fitted)
            offsets = {"offsets.intercept": one.offsets.intercept, "offsets.weight": one.offsets.weight}
            checkpoint.save(one.weights, {**checkpoint.prefixed("denoiser", denoiser.state_dict()), **offsets})
            about = {
                "fold": fold,
                "crossfit": one.name,
                "config": config.model_dump(),
                "architecture": {"coordinates": denoiser.coordinates, "condition": denoiser.condition},
                "cells": one.cells,
                "perturbations": [name for name in one.known.names if name != CONTROL],
            }
            write_json(one.record, {**about, **training_record(fitted, on, denoiser)})

    each_or_all(list(zip(crossfit, embedding, vae, vae_record, weights, record, strict=True)), on, learn)
    if scratch is not None:
        checkpoint.discard_all(scratch, "diffusion")


def load_diffusion(weights: str | Path, record: str | Path, device: torch.device) -> tuple[Denoiser, MeanOffsets, DiffusionConfig]:
    """The trained denoiser in evaluation mode, the decoder's mean offsets, and the config.

    Raises UserError when weights and record do not belong together.
    """
    about, stored = read_json(record), checkpoint.load(weights)[0]
    config = DiffusionConfig.model_validate(about["config"])
    shape = about["architecture"]
    network = Denoiser(shape["coordinates"], shape["condition"], config.widths, config.null_token, config.timesteps)
    try:
        network.load_state_dict(checkpoint.unprefixed("denoiser", stored))
        offsets = MeanOffsets(stored["offsets.intercept"].to(device), stored["offsets.weight"].to(device))
    except (RuntimeError, KeyError) as error:
        raise UserError(f"weights do not fit the record: {error}", where=str(weights), fix=f"make both again with {record}") from None
    return network.to(device).eval(), offsets, config
