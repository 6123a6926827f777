from __future__ import annotations

import mpmath
import numpy as np
import pytest
import torch
from scipy.stats import norm

from dbdiffusion.config.generator import VaeConfig
from dbdiffusion.generative import offsets
from dbdiffusion.generative.latents import Latents
from dbdiffusion.generative.offsets import SCALES, MeanOffsets, fit_offsets, residual_means, shrunk
from dbdiffusion.generative.vae import CellTensors, CellVae

CPU = torch.device("cpu")


def blind(toy, likelihood: str) -> tuple[CellVae, CellTensors, Latents]:
    """An autoencoder that knows the overall means alone: every perturbation is decoded to the same mean."""
    network = CellVae(len(toy.genes), len(toy.batches), VaeConfig(hidden=[8], latent=3, likelihood=likelihood)).eval()
    network.start_from(toy)
    torch.nn.init.zeros_(network.to_genes.weight)
    torch.nn.init.zeros_(network.to_genes.of_batch)
    data = CellTensors.make(toy, network.counts, CPU)
    order = {"control": 0, "UP": 1, "DOWN": 2}
    label = torch.tensor([order[p] for p in toy.perturbation])
    zero = torch.zeros(len(toy), network.coordinates)
    if network.counts:
        zero[:, -1] = network.standardised(zero[:, :-1], data.log_library, data.batch)[:, -1]
    return network, data, Latents(zero, torch.zeros_like(zero), label, torch.tensor([[0.0], [1.0], [-1.0]]))


@pytest.mark.parametrize("likelihood", ["gaussian", "nb"])
def test_offsets_restore_the_means_of_a_blind_decoder(toy, likelihood: str) -> None:
    network, data, latents = blind(toy, likelihood)
    found = fit_offsets(network, data, latents, 0, latents.conditions.shape[1])(latents.conditions).numpy()
    effect = found - found[:1]
    if likelihood == "nb":
        # Simulated at +1 and -1 in the first five genes.
        np.testing.assert_allclose(effect[1, :5], 1.0, atol=0.3)
        np.testing.assert_allclose(effect[2, :5], -1.0, atol=0.3)
    else:
        real = {p: np.asarray(toy.expression[toy.perturbation == p].mean(0)).ravel() for p in ("control", "UP", "DOWN")}
        np.testing.assert_allclose(effect[1, :5], (real["UP"] - real["control"])[:5], atol=0.25)
    assert np.abs(effect[:, 5:]).mean() < 0.1


def test_features_have_no_part_in_offsets(toy) -> None:
    network, data, latents = blind(toy, "nb")
    alone = fit_offsets(network, data, latents, 0, 1)
    features = torch.tensor([[0.0, 2.0], [3.0, 1.0], [-1.0, 0.5]])
    joined = Latents(latents.mean, latents.deviation, latents.label, torch.cat([latents.conditions, features], dim=1))
    found = fit_offsets(network, data, joined, 0, 1)
    torch.testing.assert_close(found.weight[:1], alone.weight)
    assert found.weight.shape[0] == 3 and not found.weight[1:].any()


def test_residual_means_against_the_obvious(toy) -> None:
    network, data, latents = blind(toy, "nb")
    delta, variance = residual_means(network, data, latents, 0, chunk=70)
    rows = np.flatnonzero(toy.perturbation == "UP")
    expected = np.exp(network.to_genes.bias.detach().numpy()[None] + toy.log_library[rows, None]) / 1e4
    observed = toy.counts[rows].toarray().sum(0)
    np.testing.assert_allclose(delta[1], np.log((observed + 0.5) / (expected.sum(0) + 0.5)), rtol=1e-3, atol=1e-3)
    assert (variance > 0).all()


def posterior_mean(delta: float, sd: float, shares: np.ndarray) -> float:
    """By numerical integration over the mixture of normals."""
    grid = np.linspace(-15, 15, 300_001)
    narrow = np.array([norm.pdf(grid, 0, scale) for scale in SCALES[1:]])
    prior = shares[1:] @ narrow
    likelihood = norm.pdf(delta, grid, sd)
    # The share at 0 adds to the evidence alone.
    evidence = np.trapezoid(prior * likelihood, grid) + shares[0] * norm.pdf(delta, 0, sd)
    return float(np.trapezoid(grid * prior * likelihood, grid) / evidence)


def test_shrinkage_removes_noise_and_spares_signal() -> None:
    stream = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(1, 5000, generator=stream, dtype=torch.float64)
    variance = torch.full((1, 5000), 0.01, dtype=torch.float64)
    assert float(shrunk(noise, variance).square().mean()) < 0.05 * 0.01
    signal = torch.randn(1, 5000, generator=stream, dtype=torch.float64)
    kept = shrunk(signal + noise, variance)
    assert float((kept * signal).sum() / signal.square().sum()) > 0.95


@pytest.mark.parametrize("entries", [offsets.ENTRIES, 3000])
def test_shrinkage_is_the_posterior_mean_under_the_prior_it_finds(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values drawn from the mixture itself: shrunk as by those who know its shares, which one normal is far from; some of the entries
    tell what conditions have in common as all do."""
    monkeypatch.setattr(offsets, "ENTRIES", entries)
    random, sd = np.random.default_rng(1), 0.3
    shares = np.array([0.9, 0, 0, 0, 0, 0.1, 0, 0])
    truth = np.where(random.random((4, 4000)) < shares[0], 0.0, random.normal(0, SCALES[5], (4, 4000)))
    delta = truth + random.normal(0, sd, truth.shape)
    found = shrunk(torch.from_numpy(delta), torch.full(delta.shape, sd**2, dtype=torch.float64)).numpy()
    some = random.choice(delta.size, 60, replace=False)
    known = np.array([posterior_mean(value, sd, shares) for value in delta.flat[some]])
    np.testing.assert_allclose(found.flat[some], known, atol=0.03, rtol=0.1)
    tau2 = np.var(truth)
    assert np.square(found - truth).mean() < 0.7 * np.square(delta * tau2 / (tau2 + sd**2) - truth).mean()


def counts(expected: float, changed: float, random: np.random.Generator) -> tuple[float, float, float]:
    """Squared errors of nothing, of shrinkage by the deviance, and by the usual variance: Poisson counts, 2 % of the genes changed."""
    truth = np.where(random.random((20, 1000)) < 0.02, changed, 0.0)
    observed = torch.from_numpy(random.poisson(expected * np.exp(truth)) + 0.5)
    many = torch.full(observed.shape, 1e9, dtype=torch.float64)
    delta, variance = offsets._log_ratio(observed, torch.full(observed.shape, expected + 0.5, dtype=torch.float64), many)
    usual = torch.full(observed.shape, 1 / expected, dtype=torch.float64)
    found = np.zeros_like(truth), shrunk(delta, variance).numpy(), shrunk(delta, usual).numpy()
    return tuple(float(np.square(x - truth).mean()) for x in found)


@pytest.mark.parametrize("expected", [1.0, 3.0, 10.0, 50.0])
def test_few_counts_are_not_taken_for_losses(expected: float) -> None:
    random = np.random.default_rng(4)
    found = np.array([counts(expected, changed, random) for changed in (0.0, -1.5, 1.0)])
    nothing, ours, usual = found.T
    assert ours[0] < 1e-3 and (ours[1:] < nothing[1:]).all()
    assert ours.sum() < usual.sum()


@pytest.mark.parametrize("r", [5.0, 1e6, 1e12])
def test_a_log_ratio_in_deviations_is_the_root_of_the_deviance(r: float) -> None:
    observed, expected = np.array([0.5, 4.0, 7.0001, 7.01, 60.0]), np.array([3.5, 4.5, 7.0, 7.0, 20.0])
    delta, variance = offsets._log_ratio(*(torch.from_numpy(x) for x in (observed, expected, np.full(5, r))))

    def deviance(x: float, mean: float) -> mpmath.mpf:
        with mpmath.workdps(40):
            x, mean = mpmath.mpf(x), mpmath.mpf(mean)
            return 2 * (x * mpmath.log(x / mean) - (x + r) * mpmath.log((x + r) / (mean + r)))

    exact = [float(deviance(x, mean)) for x, mean in zip(observed, expected, strict=True)]
    np.testing.assert_allclose(np.square(delta) / variance, exact, rtol=2e-3)
    np.testing.assert_allclose(delta, np.log(observed / expected))


def test_every_condition_has_a_mixture_of_its_own() -> None:
    """The same value is believed where many genes have changed and not where none has."""
    random = np.random.default_rng(2)
    delta = random.normal(0, 0.3, (2, 4000))
    delta[1, :2000] += random.normal(0, 1.0, 2000)
    delta[:, 0] = 0.9
    found = shrunk(torch.from_numpy(delta), torch.full((2, 4000), 0.09, dtype=torch.float64))
    assert float(found[0, 0]) < 0.3 and float(found[1, 0]) > 0.6


def test_none_is_zero() -> None:
    assert not MeanOffsets.none(3, 7)(torch.randn(2, 3)).any()
