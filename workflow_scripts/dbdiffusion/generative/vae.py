"""The autoencoder of cells: expression to latent and back.

`kind: vae` has a reparameterised latent and one of two decoders.

- `gaussian`: ln(1 + CP10k) of gene j ~ N(m_j(z, batch), v_j), v_j learned. Its mean is exact, but draws are clipped at 0, so zero
  fractions are only approximate.
- `nb`: counts of gene j ~ NB(mean L exp(m_j(z, batch)) / 1e4, inverse dispersion r_j), L the library size. L is generated with the
  cell: its logarithm, standardised within batch, is one more latent coordinate, since state and depth go together.

Batches enter as a covariate of encoder and decoder and are generated in the control's composition, as effects are batch-matched.
`kind: autoencoder` is the published design: unit-norm latent, squared error, no noise in the decoder.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbdiffusion.config.generator import VaeConfig
from dbdiffusion.data.sets import EffectSet
from dbdiffusion.generative import checkpoint, vae_cpu
from dbdiffusion.generative.by_hand import ByHand, Value
from dbdiffusion.generative.cells import TARGET_SUM, Cells, Matrix, load_cells
from dbdiffusion.generative.fitting import Fitted, each_or_all, fit_all, training_record
from dbdiffusion.generative.kernels import fused
from dbdiffusion.generative.likelihood import LARGEST_GAP, LARGEST_LOG_R, expected_log1p, nb_negative_log_likelihood
from dbdiffusion.generative.networks import BatchLinear, parameters_of, seeded, trunk
from dbdiffusion.generative.recording import InParts
from dbdiffusion.generative.training import Plan, Training, split_rows
from dbdiffusion.runtime.device import resolve_device
from dbdiffusion.runtime.errors import UserError
from dbdiffusion.runtime.files import read_json, write_json
from dbdiffusion.runtime.provenance import code_hash
from dbdiffusion.runtime.seeds import derive_seed

MIN_GENE_SD = 0.05
"""Genes that hardly vary are not blown up beyond this standard deviation at the encoder's input."""
LIBRARY_LIMIT = (-4.0, 4.0)
"""Range of generated library sizes, in standard deviations of their logarithm."""
LOG_RATE_LIMIT = (-12.0, 10.0)
"""Range of the decoder's ln CP10k: e^10 is 22,000 of 10,000 counts."""
LOG_VARIANCE_LIMIT = (-12.0, 6.0)
"""Range of the posterior's log variance."""


class CellVae(ByHand):
    """Encoder and decoder. genes, batches: numbers of genes and batches."""

    def __init__(self, genes: int, batches: int, config: VaeConfig) -> None:
        super().__init__()
        self.config, self.genes = config, genes
        self.latent = min(config.latent, genes)
        self.covariates = batches if batches > 1 else 0
        self.variational = config.kind == "vae"
        style = {"norm": config.norm, "activation": config.activation}
        self.encoder = trunk([genes, *config.hidden], **style, batches=self.covariates)
        self.to_latent = nn.Linear(config.hidden[-1], self.latent * (2 if self.variational else 1))
        self.decoder = trunk([self.latent, *reversed(config.hidden)], **style, batches=self.covariates)
        self.to_genes = BatchLinear(config.hidden[0], genes, self.covariates)
        # gaussian: ln v_j; nb: ln r_j; unused by the autoencoder.
        self.spread = nn.Parameter(torch.zeros(genes), requires_grad=self.variational)
        self.register_buffer("input_mean", torch.zeros(genes))
        self.register_buffer("input_sd", torch.ones(genes))
        self.register_buffer("library_mean", torch.zeros(batches))
        self.register_buffer("library_sd", torch.ones(()))
        self.register_buffer("batch_share", torch.full((batches,), 1.0 / batches))
        self.register_buffer("latent_mean", torch.zeros(self.latent))
        self.register_buffer("latent_sd", torch.ones(self.latent))

    @property
    def counts(self) -> bool:
        """Whether the decoder is a distribution of counts."""
        return self.variational and self.config.likelihood == "nb"

    @property
    def log_r(self) -> Tensor:
        """ln r (G,) of the negative binomial."""
        return self.spread.clamp(max=LARGEST_LOG_R)

    @property
    def coordinates(self) -> int:
        """Width of what the diffusion model learns: the latent, and the library size for counts."""
        return self.latent + int(self.counts)

    def start_from(self, cells: Cells) -> None:
        """Set input scaling, library moments and the decoder's intercepts from the training cells."""
        mean, sd = gene_moments(cells.expression)
        self.input_mean.copy_(torch.from_numpy(mean))
        self.input_sd.copy_(torch.from_numpy(np.maximum(sd, MIN_GENE_SD)))
        size = np.maximum(np.bincount(cells.batch, minlength=len(cells.batches)), 1)
        library = np.bincount(cells.batch, weights=cells.log_library, minlength=len(cells.batches)) / size
        self.library_mean.copy_(torch.from_numpy(library))
        self.library_sd.fill_(max(float(np.std(cells.log_library - library[cells.batch])), 1e-3))
        self.batch_share.copy_(torch.from_numpy(cells.batch_share()))
        with torch.no_grad():
            if self.counts:
                total = np.asarray(cells.counts.sum(axis=0)).ravel()
                rate = (total + 0.5) / np.exp(cells.log_library).sum() * TARGET_SUM
                self.to_genes.bias.copy_(torch.from_numpy(np.log(rate)))
                self.spread.fill_(1.0)
            else:
                self.to_genes.bias.copy_(torch.from_numpy(mean))
                self.spread.copy_(torch.from_numpy(2 * np.log(np.maximum(sd, MIN_GENE_SD))))

    def keep_latent_scale(self) -> None:
        """Diffuse the latent as it is (published design) instead of standardised."""
        self.latent_mean.zero_()
        self.latent_sd.fill_(1.0)

    def input_scale(self) -> tuple[Tensor, Tensor]:
        """Factor and offset (G,) of the encoder's input."""
        factor = self.input_sd.reciprocal()
        return factor, -self.input_mean * factor

    def encode(self, expression: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        """ln(1 + CP10k) (n, G) to the latent's mean and log variance, each (n, latent); the autoencoder's log variance is -inf."""
        factor, offset = self.input_scale()
        out = self.to_latent(self.encoder(torch.addcmul(offset, expression, factor), batch)).float()
        if self.variational:
            mean, log_variance = out.chunk(2, dim=1)
            return mean, log_variance.clamp(*LOG_VARIANCE_LIMIT)
        mean = F.normalize(out, dim=1)
        return mean, torch.full_like(mean, -math.inf)

    def decode(self, latent: Tensor, batch: Tensor) -> Tensor:
        """Latent (n, latent) to mean ln(1 + CP10k) (gaussian, autoencoder) or to ln of the rate per 10,000 counts (nb), (n, G)."""
        out = self._decoded(latent, batch)
        return out.clamp(*LOG_RATE_LIMIT) if self.counts else out

    def _decoded(self, latent: Tensor, batch: Tensor) -> Tensor:
        """Without the limits: the likelihood is finite beyond them."""
        return self.to_genes(self.decoder(latent, batch), batch).float()

    def negative_log_likelihood(self, decoded: Tensor, observed: Tensor, log_library: Tensor) -> Tensor:
        """Per cell, summed over genes, in nats up to a constant of the data; squared error for the autoencoder.

        observed: ln(1 + CP10k) or counts (n, G); log_library: (n,).
        """
        if not self.variational:
            return (decoded - observed).square().sum(1)
        if not self.counts:
            return 0.5 * ((decoded - observed).square() * torch.exp(-self.spread) + self.spread).sum(1)
        return nb_negative_log_likelihood(observed, decoded, log_library - math.log(TARGET_SUM), self.log_r)

    def negative_bound(self, data: CellTensors, rows: Tensor, noise: Tensor, kl_weight: float) -> Tensor:
        """Negative log-likelihood of rows (n,) of the data at draws of their posteriors with noise (n, latent), and kl_weight times the KL
        term: mean over cells, per gene; scalar."""
        if self.config.norm == "layer" and self.config.activation == "silu" and fused(noise, self.spread):
            return self._negative_bound_by_hand(data, rows, noise, kl_weight)
        return self.negative_bound_of(*data.rows(rows), noise, kl_weight)

    def negative_bound_of(
        self, expression: Tensor, observed: Tensor, log_library: Tensor, batch: Tensor, noise: Tensor, kl_weight: float | Tensor
    ) -> Tensor:
        """`negative_bound` of the cells of `CellTensors.rows`."""
        mean, log_variance = self.encode(expression, batch)
        decoded = self._decoded(mean + noise * torch.exp(0.5 * log_variance), batch)
        misfit = self.negative_log_likelihood(decoded, observed, log_library).mean()
        return (misfit + kl_weight * kl_to_standard_normal(mean, log_variance, self.config.free_bits)) / self.genes

    def reconstruction_error(self, expression: Tensor, observed: Tensor, log_library: Tensor, batch: Tensor) -> Tensor:
        """Squared error of the autoencoder, mean over cells, per gene; scalar."""
        mean, _ = self.encode(expression, batch)
        return self.negative_log_likelihood(self.decode(mean, batch), observed, log_library).mean() / self.genes

    def _negative_bound_by_hand(self, data: CellTensors, rows: Tensor, noise: Tensor, kl_weight: float) -> Tensor:
        """`negative_bound` without a graph in between."""
        half, limits = torch.is_autocast_enabled("cpu"), (LARGEST_LOG_R, LARGEST_GAP, LOG_VARIANCE_LIMIT)

        def made(values: list[Value | None]) -> vae_cpu.NegativeBound:
            design = vae_cpu.Design(len(self.config.hidden), self.counts, *limits, self.config.free_bits, half, self.encoder[1].eps)
            return vae_cpu.NegativeBound(values, len(rows), design)

        return self.loss_by_hand(made, self._in_order, (len(rows), half), (data.seen(rows), noise, *self.input_scale(), kl_weight))

    @cached_property
    def _in_order(self) -> list[nn.Parameter | None]:
        """Parameters as the pass by hand takes them; what they are never changes, where their values lie may."""
        parts = [part for part in (*self.encoder, self.to_latent, *self.decoder, self.to_genes) if not isinstance(part, nn.SiLU)]
        return [*(value for part in parts for value in parameters_of(part)), self.spread]

    def standardised(self, latent: Tensor, log_library: Tensor, batch: Tensor) -> Tensor:
        """Latent (n, latent) in units of its training standard deviation, with the library coordinate for counts: (n, coordinates)."""
        out = (latent - self.latent_mean) / self.latent_sd
        if not self.counts:
            return out
        return torch.cat([out, ((log_library - self.library_mean[batch]) / self.library_sd)[:, None]], dim=1)

    def restored(self, coordinates: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Inverse of `standardised`: latent (n, latent) and ln library size (n,) (the batch's mean where it is not generated)."""
        latent = coordinates[:, : self.latent] * self.latent_sd + self.latent_mean
        # A library size is exponentiated: one far outside those seen would be a cell of 10^9 counts.
        deviation = coordinates[:, self.latent].clamp(*LIBRARY_LIMIT) * self.library_sd if self.counts else 0.0
        return latent, self.library_mean[batch] + deviation

    def mean_of(self, decoded: Tensor, log_library: Tensor) -> Tensor:
        """The likelihood's mean of what it sees: ln(1 + CP10k) as decoded, or counts."""
        return torch.exp(decoded + (log_library - math.log(TARGET_SUM))[:, None]) if self.counts else decoded

    def draw(self, decoded: Tensor, log_library: Tensor, stream: torch.Generator, cells: int | None = None) -> tuple[Tensor, Tensor]:
        """One draw of ln(1 + CP10k) (cells, G), not below 0, of the first cells from the decoder's likelihood, and what is expected of all
        of them, (n, G), whose mean has less Monte-Carlo noise.

        The expectation is the decoder's mean (gaussian: without the clipping at 0); for counts that of the Poisson draw, given a gamma draw
        which is the same for all that are decoded with the same stream, and cancels in their differences.
        """
        some = slice(cells)
        if not self.variational:
            return decoded[some].clamp_min(0), decoded
        if not self.counts:
            noise = torch.randn(decoded.shape, generator=stream, device=decoded.device)[some]
            return (decoded[some] + noise * torch.exp(0.5 * self.spread)).clamp_min(0), decoded
        log_mean = decoded + (log_library - math.log(TARGET_SUM))[:, None]
        shape = torch.exp(self.log_r).expand_as(decoded)
        rate = torch._standard_gamma(shape, generator=stream) * torch.exp(log_mean - self.log_r)
        scale = TARGET_SUM * torch.exp(-log_library)
        drawn = torch.log1p(torch.poisson(rate[some], generator=stream) * scale[some, None])
        return drawn, expected_log1p(rate, scale)


def gene_moments(expression) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (G,) of the columns of a sparse matrix."""
    n = expression.shape[0]
    mean = np.asarray(expression.sum(axis=0), dtype=float).ravel() / n
    square = np.asarray(expression.multiply(expression).sum(axis=0), dtype=float).ravel() / n
    return mean, np.sqrt(np.maximum(square - mean**2, 0.0))


def kl_to_standard_normal(mean: Tensor, log_variance: Tensor, free_bits: float = 0.0) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)) in nats, batch mean per dimension, summed over dimensions; scalar.

    Of each dimension only what exceeds `free_bits` counts (Kingma et al. 2016).
    """
    each = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean(0)
    return (each - free_bits).clamp_min(0).sum() if free_bits > 0 else each.sum()


@dataclass
class CellTensors:
    """The training cells on the device."""

    expression: Matrix
    observed: Matrix
    """What the likelihood sees: counts for the negative binomial, else `expression`, ln(1 + CP10k)."""
    log_library: Tensor
    batch: Tensor

    @classmethod
    def make(cls, cells: Cells, counts: bool, device: torch.device) -> CellTensors:
        """Raises ValueError for a batch code without a batch: loops do not look."""
        if not np.isin(cells.batch, range(len(cells.batches))).all():
            raise ValueError(f"batch codes must be 0 to {len(cells.batches) - 1}, found {cells.batch.min()} to {cells.batch.max()}")
        expression = Matrix(cells.expression, device)
        return cls(
            expression,
            Matrix(cells.counts, device) if counts else expression,
            torch.from_numpy(cells.log_library).float().to(device),
            torch.from_numpy(cells.batch.astype(np.int64)).to(device),
        )

    def rows(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Expression, what the likelihood sees, ln library size and batch of some cells."""
        expression = self.expression[rows]
        observed = expression if self.observed is self.expression else self.observed[rows]
        return expression, observed, self.log_library[rows], self.batch[rows]

    def seen(self, rows: Tensor) -> vae_cpu.Seen:
        """The same without a copy of rows that are held dense."""
        expression = self.expression.held(rows)
        observed = expression if self.observed is self.expression else self.observed.held(rows)
        of_rows = self.log_library.index_select(0, rows) - math.log(TARGET_SUM), self.batch.index_select(0, rows)
        return vae_cpu.Seen(*expression, *observed, *of_rows)


@dataclass(frozen=True)
class VaeLoss(InParts):
    """The training loss per gene: negative log-likelihood + warmed-up weight x KL, or the autoencoder's squared error."""

    data: CellTensors
    config: VaeConfig

    def drawn(self, rows: Tensor, stream: torch.Generator | None, share: float) -> tuple[Tensor, float]:
        """Noise of the posterior's draws, and the weight of the KL term."""
        warm = min(1.0, share / self.config.kl_warmup_share) if self.config.kl_warmup_share > 0 else 1.0
        latent = min(self.config.latent, self.data.expression.shape[1])
        return torch.randn((len(rows), latent), generator=stream, device=rows.device), self.config.kl_weight * warm

    def inputs(self, rows: Tensor, stream: torch.Generator | None, share: float) -> tuple[Tensor | float, ...]:
        cells = self.data.rows(rows)
        return (*cells, *self.drawn(rows, stream, share)) if self.config.kind == "vae" else cells

    def value(self, network: CellVae, *inputs: Tensor | float) -> Tensor:
        return network.negative_bound_of(*inputs) if network.variational else network.reconstruction_error(*inputs)

    def shape(self, rows: int) -> Hashable:
        return self.config.model_dump_json(), self.data.expression.shape[1]

    def __call__(self, network: CellVae, rows: Tensor, stream: torch.Generator | None, share: float = 1.0) -> Tensor:
        if not network.variational:
            return super().__call__(network, rows, stream, share)
        # On a CPU rows need no copy.
        return network.negative_bound(self.data, rows, *self.drawn(rows, stream, share))


def vae_validation(data: CellTensors, config: VaeConfig, rows: np.ndarray, seed: int):
    """Held-out loss at the full KL weight, with the same noise at every call; None without held-out cells."""
    if not len(rows):
        return None
    loss, held = VaeLoss(data, config), torch.from_numpy(rows).to(data.batch.device)

    def validate(network: CellVae) -> float:
        stream = torch.Generator(data.batch.device).manual_seed(derive_seed(seed, "validation noise"))
        parts = [(loss(network, part, stream, 1.0), len(part)) for part in held.split(2048)]
        return float(sum(float(value) * n for value, n in parts) / len(held))

    return validate


@torch.no_grad()
def encode_all(network: CellVae, data: CellTensors, chunk: int = 4096) -> tuple[Tensor, Tensor]:
    """Posterior mean and standard deviation of every cell, each (n, latent); the autoencoder's deviation is 0."""
    rows = torch.arange(data.observed.shape[0], device=data.batch.device)
    means, deviations = [], []
    for part in rows.split(chunk):
        expression, _, _, batch = data.rows(part)
        mean, log_variance = network.encode(expression, batch)
        means.append(mean)
        deviations.append(torch.exp(0.5 * log_variance))
    return torch.cat(means), torch.cat(deviations)


def vae_training(
    cells: Cells, config: VaeConfig, *, device: torch.device, seed: int, scratch: str | Path | None = None, on_step=None, name: str = ""
) -> Training:
    """Of an autoencoder of these cells, which has the input scaling and intercepts of them; name: for messages."""
    network = seeded(lambda: CellVae(len(cells.genes), len(cells.batches), config), derive_seed(seed, "vae", "weights"))
    network.start_from(cells)
    train, held = split_rows(len(cells), config.validation_share, derive_seed(seed, "vae"))
    grace = config.kl_warmup_share if network.variational and config.kl_weight > 0 else 0.0
    plan = Plan.of(config, "vae", seed, train, device, grace=grace)
    key = checkpoint.digest(
        code_hash(__file__),
        config.model_dump(exclude={"cuda_graphs"}),
        str(plan.autocast),
        seed,
        cells.expression.data,
        cells.expression.indices,
        cells.log_library,
        cells.batch,
        cells.genes,
    )
    path = checkpoint.scratch_file(scratch, "vae", key)
    data = CellTensors.make(cells, network.counts, device)
    return Training(network, VaeLoss(data, config), plan, vae_validation(data, config, held, seed), path, on_step, name)


def trained_vae(training: Training, fitted: Fitted) -> CellVae:
    """With its best weights in evaluation mode, and the moments of its latents."""
    network, data = training.network, training.loss.data
    network.load_state_dict(fitted.weights)
    network.eval()
    mean, deviation = encode_all(network, data)
    network.latent_mean.copy_(mean.mean(0))
    # The spread of the aggregate posterior: what the diffusion model learns are draws from it.
    network.latent_sd.copy_((mean.var(0, unbiased=False) + deviation.square().mean(0)).sqrt().clamp_min(1e-6))
    return network


def fit_vae(cells: Cells, config: VaeConfig, *, device: torch.device, **options) -> tuple[CellVae, Fitted]:
    """Train on the cells; the network comes back on the device in evaluation mode; options: of `vae_training`."""
    training = vae_training(cells, config, device=device, **options)
    fitted = fit_all([training], device=device)[0]
    return trained_vae(training, fitted), fitted


def write_vaes(
    *,
    cells: str | Path,
    splits: str | Path,
    effects: str | Path,
    fold: str,
    crossfit: Sequence[str],
    config: VaeConfig,
    device: str,
    seed: int,
    scratch: str | Path | None,
    weights: Sequence[str | Path],
    record: Sequence[str | Path],
) -> None:
    """Learn the autoencoders of cross-fit models of `fold`, each from its own perturbations' cells and the control's; on a GPU side by
    side.

    weights: safetensors; record: JSON with config, architecture, loss history and cost; one for each of `crossfit`. Killed trainings resume
    from `scratch`, ended ones among them.
    """
    panel, on = EffectSet.read(effects), resolve_device(device)

    def begun(name: str) -> tuple[Cells, Training]:
        data = load_cells(cells, splits, panel, fold=fold, crossfit=name)
        own_seed = derive_seed(seed, "vae", fold, name)
        return data, vae_training(data, config, device=on, seed=own_seed, scratch=scratch, name=f"vae of model {name}")

    def learn(models: Sequence[tuple[str, str | Path, str | Path]]) -> None:
        started = [begun(name) for name, _, _ in models]
        fits = fit_all([training for _, training in started], device=on)
        for (name, to_weights, to_record), (data, training), fitted in zip(models, started, fits, strict=True):
            network = trained_vae(training, fitted)
            checkpoint.save(to_weights, network.state_dict())
            shape = {"genes": network.genes, "latent": network.latent, "coordinates": network.coordinates, "batches": data.batches}
            about = {
                "fold": fold,
                "crossfit": name,
                "config": config.model_dump(),
                "architecture": shape,
                "genes_digest": checkpoint.digest(data.genes),
                "cells": len(data),
                "perturbations": sorted(set(data.perturbation)),
            }
            write_json(to_record, {**about, **training_record(fitted, on, network)})

    each_or_all(list(zip(crossfit, weights, record, strict=True)), on, learn)
    if scratch is not None:
        checkpoint.discard_all(scratch, "vae")


def load_vae(weights: str | Path, record: str | Path, device: torch.device) -> CellVae:
    """The trained autoencoder in evaluation mode.

    Raises UserError when weights and record do not belong together.
    """
    about = read_json(record)
    shape = about["architecture"]
    network = CellVae(shape["genes"], len(shape["batches"]), VaeConfig.model_validate(about["config"]))
    try:
        network.load_state_dict(checkpoint.load(weights)[0])
    except RuntimeError as error:
        raise UserError(f"weights do not fit the record: {error}", where=str(weights), fix=f"make both again with {record}") from None
    return network.to(device).eval()
