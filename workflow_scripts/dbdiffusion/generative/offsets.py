"""What the latent loses of a perturbation's mean, given back as a linear function of its embedding.

An autoencoder keeps what many cells share. What one perturbation does alone (the knock-down of its own gene, say) is too small a part of
the likelihood to earn a latent coordinate, so decoded means are attenuated. The loss is measured on the training cells: decoded from their
own posterior, a perturbation's cells should have its observed mean. The differences delta_kj, most of them noise and few of them large, are
shrunk and regressed on the perturbation embedding; the decoder of a perturbation with condition e adds intercept + e W to its means
(gaussian) or log rates (nb). Gene features among the conditions have no part in it: places of unmeasured perturbations are averages and
keep offsets small, features are not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dbdiffusion.generative.latents import Latents
from dbdiffusion.generative.vae import CellTensors, CellVae
from dbdiffusion.runtime.seeds import derive_seed

RIDGE = 1.0e-3
"""Penalty per perturbation; embeddings have a mean square of 1. Enough to invert, too little to shrink: delta is shrunk already."""
ALIKE = 1.0e-3
"""Log ratios below this have the deviance's limit, whose rounding they would divide by."""
SCALES = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
"""Standard deviations of what a mean may have lost, in the decoder's units (natural logarithms)."""
POOLED = 50.0
"""What all conditions have in common counts as so many genes of a condition's own."""
ROUNDS = 200
"""Of EM."""
LEAST_SHARE = 1e-8
"""No component's share falls below, lest none explain a value."""
ENTRIES = 100_000
"""So many entries of the matrix, at most, tell what conditions have in common."""


@dataclass(frozen=True)
class MeanOffsets:
    """intercept (G,), weight (D, G): what is added to the decoder's output at condition e is intercept + e weight."""

    intercept: Tensor
    weight: Tensor

    def __call__(self, conditions: Tensor) -> Tensor:
        """Conditions (R, D) to offsets (R, G)."""
        return self.intercept + conditions @ self.weight

    @classmethod
    def none(cls, dimensions: int, genes: int) -> MeanOffsets:
        """No correction."""
        return cls(torch.zeros(genes), torch.zeros(dimensions, genes))


@torch.no_grad()
def residual_means(network: CellVae, data: CellTensors, latents: Latents, seed: int, chunk: int = 4096) -> tuple[Tensor, Tensor]:
    """delta (U, G) of each condition and its sampling variance (U, G), from all training cells and one draw of each posterior.

    nb: ln((observed + 1/2) / (expected + 1/2)) of total counts, see `_log_ratio`; gaussian: observed - decoded mean, variance v / n.
    """
    groups, device = len(latents.conditions), latents.mean.device
    observed = torch.zeros(groups, network.genes, dtype=torch.float64, device=device)
    expected, n = torch.zeros_like(observed), torch.zeros(groups, 1, dtype=torch.float64, device=device)
    stream = torch.Generator(device).manual_seed(derive_seed(seed, "mean offsets"))
    for rows in torch.arange(len(latents.mean), device=device).split(chunk):
        noise = torch.randn((len(rows), latents.mean.shape[1]), generator=stream, device=device)
        _, seen, log_library, batch = data.rows(rows)
        latent, _ = network.restored(latents.draw(rows, noise), batch)
        decoded = network.mean_of(network.decode(latent, batch), log_library)
        label = latents.label[rows]
        observed.index_add_(0, label, seen.double())
        expected.index_add_(0, label, decoded.double())
        n.index_add_(0, label, torch.ones(len(rows), 1, dtype=torch.float64, device=device))
    n = n.clamp_min(1)
    if network.counts:
        return _log_ratio(observed + 0.5, expected + 0.5, torch.exp(network.log_r.double()) * n)
    return (observed - expected) / n, (network.spread.double().exp() / n).expand_as(observed)


def _log_ratio(observed: Tensor, expected: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """ln(observed / expected) of negative binomial counts with shape r, and its variance: the square over the deviance.

    So the value in standard deviations is the signed root of the deviance, which is near a standard normal where no count has changed, few
    counts too. The usual 1 / expected + 1 / r, its limit without a difference, takes three counts of which none came for a rare event.
    """
    delta = torch.log(observed / expected)
    deviance = 2 * (observed * delta - (observed + r) * torch.log1p((observed - expected) / (expected + r)))
    alike = delta.abs() < ALIKE
    return delta, torch.where(alike, 1 / expected + 1 / r, delta.square() / torch.where(alike, 1.0, deviance))


def shrunk(delta: Tensor, variance: Tensor) -> Tensor:
    """Posterior means of delta (U, G), known up to normal noise of variance (U, G), by adaptive shrinkage.

    Stephens 2017, Biostatistics 18:275. Values are drawn from a mixture of normals around 0 of fixed deviations `SCALES`: of most genes the
    latent loses nothing, of a few (such as the perturbed one) much. Shares of the mixture are found by EM, in every condition from its
    genes and `POOLED` more that are shared as all conditions' are: perturbations differ in how many genes they change.
    """
    prior = torch.tensor(SCALES, dtype=delta.dtype, device=delta.device).square()
    values, noises = delta.flatten(), variance.flatten()
    if len(values) > ENTRIES:
        some = torch.randint(len(values), (ENTRIES,), generator=torch.Generator().manual_seed(0)).to(delta.device)
        values, noises = values[some], noises[some]
    pooled = _shares(_likelihoods(values, noises, prior), torch.full_like(prior, 1 / len(prior)), 0.0)
    out = torch.empty_like(delta)
    for row, own, noise in zip(out, delta, variance, strict=True):
        likelihoods = _likelihoods(own, noise, prior)
        joint = likelihoods * _shares(likelihoods, pooled, POOLED)
        row.copy_(own * (joint * prior / (prior + noise[:, None])).sum(1) / joint.sum(1))
    return out


def _likelihoods(delta: Tensor, variance: Tensor, prior: Tensor) -> Tensor:
    """(n, components) of values (n,), each relative to that of the likeliest component."""
    total = variance[:, None] + prior
    log = -0.5 * (total.log() + delta.square()[:, None] / total)
    return torch.exp(log - log.amax(1, keepdim=True))


def _shares(likelihoods: Tensor, start: Tensor, weight: float) -> Tensor:
    """Shares (components,) of a mixture by EM, `weight` values more being shared as `start` is; likelihoods: (n, components)."""
    share = start
    for _ in range(ROUNDS):
        expected = share * (likelihoods.T @ (likelihoods @ share).reciprocal())
        share = ((expected + weight * start) / (len(likelihoods) + weight)).clamp_min(LEAST_SHARE)
    return share / share.sum()


def fit_offsets(network: CellVae, data: CellTensors, latents: Latents, seed: int, placed: int) -> MeanOffsets:
    """Ridge regression of the shrunk residual means on the embeddings, which are the first `placed` conditions; the intercept is free."""
    delta = shrunk(*residual_means(network, data, latents, seed))
    x = latents.conditions[:, :placed].double()
    centre, level = x.mean(0), delta.mean(0)
    x = x - centre
    # The dual form: there are seldom more conditions than a few hundred.
    gram = x @ x.T + RIDGE * len(x) * torch.eye(len(x), dtype=x.dtype, device=x.device)
    weight = x.T @ torch.linalg.solve(gram, delta - level)
    rest = torch.zeros(latents.conditions.shape[1] - placed, weight.shape[1], device=weight.device)
    return MeanOffsets((level - centre @ weight).float(), torch.cat([weight.float(), rest]))
