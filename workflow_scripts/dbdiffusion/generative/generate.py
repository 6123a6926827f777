"""Cells and means of perturbations, measured or not, from one cross-fit model.

All perturbations are sampled with common random numbers: the initial noise, the noise of every step, the batches and the stream of the
decoder's draws are the same for each, so that Monte-Carlo error largely cancels in differences between perturbations. `mc_variance` is that
of one mean alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dbdiffusion.config.generator import DiffusionConfig, GenerationConfig
from dbdiffusion.data.sets import EffectSet, MeanSet
from dbdiffusion.generative import checkpoint
from dbdiffusion.generative.cell_file import write_cells
from dbdiffusion.generative.conditions import Conditions
from dbdiffusion.generative.denoiser import Denoiser
from dbdiffusion.generative.diffusion import Objective, epsilon_of, load_diffusion, sampling_schedule
from dbdiffusion.generative.offsets import MeanOffsets
from dbdiffusion.generative.samplers import SAMPLERS
from dbdiffusion.generative.schedule import NoiseSchedule
from dbdiffusion.generative.vae import CellVae, load_vae
from dbdiffusion.runtime.device import resolve_device
from dbdiffusion.runtime.errors import UserError
from dbdiffusion.runtime.files import read_json
from dbdiffusion.runtime.progress import Progress
from dbdiffusion.runtime.seeds import derive_seed, rng

SEEN = 6
"""Training perturbations of strongest effect that are generated beside the unseen ones."""
CHUNK_CELLS = {"cpu": 4096, "cuda": 262144}
"""Cells that pass through the networks at once."""


@dataclass(frozen=True)
class Sample:
    """Cells of one perturbation, ln(1 + CP10k): drawn (kept, G), and expected (cells, G) given all noise but that of the last draw."""

    drawn: Tensor
    expected: Tensor

    @property
    def mean(self) -> np.ndarray:
        """(G,)"""
        return self.expected.double().mean(0).cpu().numpy()

    @property
    def mc_variance(self) -> np.ndarray:
        """Monte-Carlo variance (G,) of the mean, cells counted as independent."""
        return (self.expected.double().var(0) / len(self.expected)).cpu().numpy()


@dataclass(frozen=True)
class Generator:
    """A trained pair of networks and how to sample from it."""

    vae: CellVae
    denoiser: Denoiser
    offsets: MeanOffsets
    objective: Objective
    schedule: NoiseSchedule
    config: GenerationConfig
    seed: int

    @property
    def device(self) -> torch.device:
        return self.objective.alpha_bar.device

    def stream(self, *labels: object) -> torch.Generator:
        """A random stream of one use, the same for every perturbation."""
        return torch.Generator(self.device).manual_seed(derive_seed(self.seed, *labels))

    @torch.no_grad()
    def coordinates(self, conditions: np.ndarray, guidance: np.ndarray | float) -> Tensor:
        """Sampled latents (R, cells, coordinates) of conditions (R, dimensions), guided with one strength or (R,) strengths."""
        shape = (self.config.cells, self.denoiser.coordinates)
        values = torch.from_numpy(conditions).float().to(self.device)

        def draw(number: int | str) -> Tensor:
            return torch.randn(shape, generator=self.stream("noise", number), device=self.device)

        start = draw("start").expand(len(values), *shape)
        strength = torch.as_tensor(guidance, dtype=torch.float32, device=self.device).expand(len(values))
        epsilon = epsilon_of(self.denoiser, self.objective, values, strength)
        return SAMPLERS[self.config.sampler](epsilon, self.schedule, start, draw)

    def batches(self) -> Tensor:
        """Batch (cells,) of each generated cell: the control's composition, in random order."""
        share = self.vae.batch_share.cpu().numpy().astype(float)
        # Exact quotas instead of draws: a composition that varies by chance would be noise in every mean.
        edges = np.round(np.cumsum(share / share.sum()) * self.config.cells).astype(int)
        codes = np.repeat(np.arange(len(share)), np.diff(edges, prepend=0))
        return torch.from_numpy(rng(self.seed, "batches").permutation(codes)).to(self.device)

    @torch.no_grad()
    def expression(self, coordinates: Tensor, condition: np.ndarray) -> Sample:
        """Cells of coordinates (cells, c) of the perturbation with `condition` (dimensions,)."""
        batch = self.batches()
        latent, log_library = self.vae.restored(coordinates, batch)
        decoded = self.vae.decode(latent, batch) + self.offsets(torch.from_numpy(condition).float().to(self.device))
        return Sample(*self.vae.draw(decoded, log_library, self.stream("decoder"), self.config.cells_kept))

    def sampled(self, conditions: np.ndarray, guidance: np.ndarray | float) -> Iterator[Sample]:
        """`expression` of each of the conditions (R, dimensions), as many at once as the device takes."""
        strength = np.full(len(conditions), guidance, dtype=np.float32)
        at_once = max(1, CHUNK_CELLS[self.device.type] // self.config.cells)
        for first in range(0, len(conditions), at_once):
            part = slice(first, first + at_once)
            for coordinates, condition in zip(self.coordinates(conditions[part], strength[part]), conditions[part], strict=True):
                yield self.expression(coordinates, condition)


def load_generator(
    vae: str | Path,
    vae_record: str | Path,
    diffusion: str | Path,
    diffusion_record: str | Path,
    config: GenerationConfig,
    device: str,
    seed: int,
    genes: pd.Index,
) -> Generator:
    """The trained networks of one cross-fit model, ready to sample.

    Raises UserError when autoencoder and diffusion model are not of the same fold and cross-fit model, or not of these genes.
    """
    on = resolve_device(device)
    first, second = read_json(vae_record), read_json(diffusion_record)
    if first["genes_digest"] != checkpoint.digest(list(genes)):
        raise UserError(
            "the autoencoder was learned on another panel of genes", where=str(vae_record), fix="make it again from these effects"
        )
    if (first["fold"], first["crossfit"]) != (second["fold"], second["crossfit"]):
        raise UserError("autoencoder and diffusion model of different folds", where=str(diffusion_record), fix="make it again")
    cells = load_vae(vae, vae_record, on)
    denoiser, offsets, trained = load_diffusion(diffusion, diffusion_record, on)
    if not trained.standardise_latent:
        cells.keep_latent_scale()
    seed = derive_seed(seed, "generate", first["fold"])
    return Generator(
        cells, denoiser, offsets, Objective.make(trained, on), sampling_schedule(trained, config.sampler, config.steps), config, seed
    )


def trained_as(diffusion_record: str | Path) -> DiffusionConfig:
    """The config of a diffusion model."""
    return DiffusionConfig.model_validate(read_json(diffusion_record)["config"])


def rows_to_generate(known: Conditions, effects: EffectSet, crossfit: str) -> list[str]:
    """Unseen perturbations, the control and the strongest seen ones (all of them for cross-fit model `all`), in order of name."""
    seen = [name for name, role in zip(known.names, known.roles, strict=True) if role == "train"]
    if crossfit != "all":
        strength = np.square(effects.subset(seen).effect).sum(axis=1)
        seen = [seen[i] for i in np.argsort(-strength, kind="stable")[:SEEN]]
    unseen = known.select(("pseudo", "target", "control")).names
    return sorted([*unseen, *seen])


def strengths(known: Conditions, config: GenerationConfig, guidance: str | Path | None) -> np.ndarray:
    """(R,) guidance of rows by role: as configured, or as tuned (each pseudo-target without its own error). The control is never guided:
    effects are differences to cells as they are.

    Raises UserError when guidance is to be tuned and no file of tuned strengths is given.
    """
    if config.guidance != "tuned":
        return np.where(known.roles == "control", 0.0, config.guidance)
    if guidance is None:
        raise UserError(
            "no tuned strengths were given", where="config key generation.guidance", fix="name a number, or run rule tune_guidance"
        )
    tuned = read_json(guidance)
    of_role = {"control": 0.0, "train": tuned["seen"]}
    # A pseudo-target too small to have an effect of its own has no error to leave out.
    named = zip(known.names, known.roles, strict=True)
    return np.array([of_role.get(role, tuned["pseudo"].get(name, tuned["targets"])) for name, role in named])


def write_generated(
    *,
    embedding: str | Path,
    effects: str | Path,
    vae: str | Path,
    vae_record: str | Path,
    diffusion: str | Path,
    diffusion_record: str | Path,
    config: GenerationConfig,
    device: str,
    seed: int,
    generated: str | Path,
    means: str | Path,
    guidance: str | Path | None = None,
) -> None:
    """Generate config.cells cells of every unseen perturbation, the control and the strongest seen ones.

    guidance: the fold's tuned strengths (`tuning.write_guidance`), where config.guidance is `tuned`.
    generated: h5ad, X float32 ln(1 + CP10k), the first config.cells_kept cells of each; means: contract `means`. A perturbation without
    embedding (not locatable) is absent from both.
    """
    panel, about = EffectSet.read(effects), read_json(vae_record)
    generator = load_generator(vae, vae_record, diffusion, diffusion_record, config, device, seed, panel.genes)
    known = Conditions.read(embedding, trained_as(diffusion_record))
    known = known.take(rows_to_generate(known, panel, about["crossfit"]))
    strength = strengths(known, config, guidance)
    kept, mean, variance = [], [], []
    with Progress(len(known.names), "generate") as progress:
        for sample in generator.sampled(known.values, strength):
            kept.append(sample.drawn.cpu().numpy())
            mean.append(sample.mean)
            variance.append(sample.mc_variance)
            progress.update(1)
    MeanSet(known.names, known.roles, panel.genes, np.array(mean), np.array(variance)).write(means)
    write_cells(kept, known.names, known.roles, [about["crossfit"]] * len(kept), panel.genes, generated)
