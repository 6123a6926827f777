from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dbdiffusion.config.generator import VaeConfig
from dbdiffusion.generative.cells import Matrix
from dbdiffusion.generative.networks import seeded
from dbdiffusion.generative.vae import (
    CellTensors,
    CellVae,
    VaeLoss,
    encode_all,
    fit_vae,
    kl_to_standard_normal,
)

CPU = torch.device("cpu")
KINDS = [
    {"likelihood": "gaussian"},
    {"likelihood": "nb"},
    {"kind": "autoencoder", "norm": "batch", "activation": "prelu"},
    {"likelihood": "nb", "norm": "batch", "activation": "relu"},
    {"likelihood": "gaussian", "norm": "none"},
]


def small(**values) -> VaeConfig:
    return VaeConfig(**{"hidden": [24], "latent": 4, "max_epochs": 8, "batch_size": 64, "validation_share": 0.2, **values})


def test_kl_against_torch_distributions_and_free_bits() -> None:
    mean, log_variance = torch.randn(7, 3, generator=torch.Generator().manual_seed(1)), torch.linspace(-2, 1, 21).reshape(7, 3)
    pair = torch.distributions.Normal(mean, torch.exp(0.5 * log_variance)), torch.distributions.Normal(0.0, 1.0)
    each = torch.distributions.kl_divergence(*pair).mean(0)
    assert float(kl_to_standard_normal(mean, log_variance)) == pytest.approx(float(each.sum()), rel=1e-5)
    free = float(each.sort().values[1])
    assert float(kl_to_standard_normal(mean, log_variance, free)) == pytest.approx(float((each - free).clamp_min(0).sum()), rel=1e-4)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_a_perturbation_alone_decodes_as_among_others(toy, options: dict) -> None:
    """What batch statistics at decoding would destroy: the mean shift of a perturbation."""
    network, _ = fit_vae(toy, small(**options, max_steps=20), device=CPU, seed=1)
    data = CellTensors.make(toy, network.counts, CPU)
    latent, _ = encode_all(network, data)
    with torch.no_grad():
        together = network.decode(latent, data.batch)
        for name in ("UP", "DOWN"):
            rows = torch.from_numpy(np.flatnonzero(toy.perturbation == name))
            alone = network.decode(latent[rows], data.batch[rows])
            torch.testing.assert_close(alone, together[rows], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(network.decode(latent[rows[:1]], data.batch[rows[:1]]), together[rows[:1]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("likelihood", ["gaussian", "nb"])
def test_reconstructed_cells_have_the_data_s_means_and_zeros(toy, likelihood: str) -> None:
    network, fitted = fit_vae(toy, small(likelihood=likelihood, max_epochs=60, learning_rate=5e-3), device=CPU, seed=2)
    assert fitted.history[-1]["validation"] < fitted.history[0]["validation"]
    data = CellTensors.make(toy, network.counts, CPU)
    mean, deviation = encode_all(network, data)
    stream = torch.Generator().manual_seed(0)
    latent = mean + deviation * torch.randn(mean.shape, generator=stream)
    with torch.no_grad():
        decoded = network.decode(latent, data.batch)
        drawn, expected = network.draw(decoded, data.log_library, stream)
    real = toy.expression.toarray()
    got = (drawn if network.counts else decoded).numpy()
    for name in ("control", "UP", "DOWN"):
        at = toy.perturbation == name
        error = np.sqrt(real[at].var(0) / at.sum())
        assert np.abs(got[at].mean(0) - real[at].mean(0)).mean() < 3 * error.mean()
    assert (drawn >= 0).all()
    if network.counts:
        # What is expected of the draws is their mean, with less noise.
        error = np.sqrt(drawn.numpy().var(0) / len(toy))
        assert (np.abs(drawn.numpy().mean(0) - expected.numpy().mean(0)) < 4 * error).all()
        assert np.median(expected.numpy().var(0) / drawn.numpy().var(0)) < 0.9
        assert np.abs((got == 0).mean(0) - (real == 0).mean(0)).max() < 0.12
        assert np.median(got.var(0) / real.var(0)) == pytest.approx(1.0, abs=0.15)


def test_drawn_counts_have_the_negative_binomial_s_moments() -> None:
    network = CellVae(2, 1, small(likelihood="nb", latent=2))
    with torch.no_grad():
        network.spread.copy_(torch.log(torch.tensor([0.5, 4.0])))
    rate, library, n = torch.log(torch.tensor([20.0, 3.0])), math.log(5000.0), 40000
    drawn = network.draw(rate.expand(n, 2), torch.full((n,), library), torch.Generator().manual_seed(3))[0].detach()
    counts = torch.expm1(drawn) * 0.5
    for j, (mean, r) in enumerate(((10.0, 0.5), (1.5, 4.0))):
        assert float(counts[:, j].mean()) == pytest.approx(mean, rel=0.03)
        assert float(counts[:, j].var()) == pytest.approx(mean + mean**2 / r, rel=0.06)
        assert float((counts[:, j] < 0.5).double().mean()) == pytest.approx((r / (r + mean)) ** r, abs=0.01)


def test_coordinates_go_there_and_back(toy) -> None:
    network, _ = fit_vae(toy, small(likelihood="nb", max_steps=10), device=CPU, seed=1)
    data = CellTensors.make(toy, True, CPU)
    latent, deviation = encode_all(network, data)
    coordinates = network.standardised(latent, data.log_library, data.batch)
    assert coordinates.shape[1] == network.coordinates == network.latent + 1
    back, library = network.restored(coordinates, data.batch)
    torch.testing.assert_close(back, latent, rtol=1e-4, atol=1e-4)
    inside = coordinates[:, -1].abs() < 4
    torch.testing.assert_close(library[inside], data.log_library[inside], rtol=1e-4, atol=1e-4)
    spread = coordinates[:, :-1].var(0) + (deviation / network.latent_sd).square().mean(0)
    torch.testing.assert_close(spread, torch.ones_like(spread), rtol=0.02, atol=0.0)


def test_autoencoder_has_unit_norm_latents_and_no_noise(toy) -> None:
    network, _ = fit_vae(toy, small(kind="autoencoder", max_steps=10), device=CPU, seed=1)
    data = CellTensors.make(toy, network.counts, CPU)
    latent, deviation = encode_all(network, data)
    torch.testing.assert_close(latent.norm(dim=1), torch.ones(len(toy)))
    assert not deviation.any()
    decoded = network.decode(latent, data.batch)
    drawn, _ = network.draw(decoded, data.log_library, torch.Generator())
    assert torch.equal(drawn, decoded.clamp_min(0))


def test_kl_weight_warms_up(toy) -> None:
    config = small(kl_weight=1.0, kl_warmup_share=0.5)
    network = seeded(lambda: CellVae(len(toy.genes), 2, config), 0)
    data, rows = CellTensors.make(toy, False, CPU), torch.arange(50)
    loss = VaeLoss(data, config)
    with torch.no_grad():
        values = [float(loss(network, rows, torch.Generator().manual_seed(0), share)) for share in (0.0, 0.25, 0.5, 1.0)]
    assert values[1] - values[0] == pytest.approx((values[2] - values[0]) / 2, rel=1e-3)
    assert values[3] == pytest.approx(values[2])


def test_matrix_made_batch_by_batch_is_the_dense_one(toy) -> None:
    rows = torch.tensor([5, 2, 2, 100])
    dense, sparse = Matrix(toy.counts, CPU), Matrix(toy.counts, CPU, dense_limit=0)
    assert torch.equal(dense[rows], sparse[rows])
    assert torch.equal(dense[rows], torch.from_numpy(toy.counts.toarray())[rows])


def test_a_latent_has_no_more_dimensions_than_there_are_genes(toy) -> None:
    network, fitted = fit_vae(toy, small(latent=64, max_steps=2), device=CPU, seed=0)
    assert network.latent == len(toy.genes) == 30
    assert math.isfinite(fitted.history[-1]["train"])
