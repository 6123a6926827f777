"""The autoencoder's pass by hand against autograd and double precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dbdiffusion.config.generator import VaeConfig
from dbdiffusion.generative import kernels, vae
from dbdiffusion.generative.cells import Cells, Matrix
from dbdiffusion.generative.kernels import array
from dbdiffusion.generative.likelihood import LARGEST_GAP, LARGEST_LOG_R, nb_negative_log_likelihood
from dbdiffusion.generative.networks import seeded
from dbdiffusion.generative.vae import LOG_VARIANCE_LIMIT, CellTensors, CellVae

CPU = torch.device("cpu")


@pytest.mark.parametrize("log_r", [-3.0, 1.0, LARGEST_LOG_R])
def test_negative_binomial_against_torch(log_r: float) -> None:
    stream = torch.Generator().manual_seed(0)
    counts = torch.poisson(5 * torch.rand(50, 37, generator=stream), generator=stream)
    rows, batch = torch.randperm(50, generator=stream)[:30], torch.randint(0, 3, (30,), generator=stream)
    rate, table, size = (torch.randn(shape, generator=stream) for shape in ((30, 37), (3, 37), (30,)))
    r = torch.linspace(log_r - 1, log_r, 37)
    rate[0, 0] = 100  # Beyond what the exponential is taken of.

    def slow(kind: torch.dtype) -> list[torch.Tensor]:
        inputs = [x.to(kind).requires_grad_() for x in (rate, table, r)]
        value = 0.3 * nb_negative_log_likelihood(counts[rows].to(kind), inputs[0] + inputs[1][batch], size.to(kind), inputs[2]).sum()
        return [part.detach().double() for part in (value, *torch.autograd.grad(value, inputs))]

    grads = [torch.empty_like(x) for x in (rate, table, r)]
    known = map(array, (counts, rows, rate, table, batch, size, r))
    settings = [np.float32(x) for x in (LARGEST_LOG_R, LARGEST_GAP, 0.3)]
    value = kernels.negative_binomial(*known, *settings, *map(array, grads))
    # Of large r single precision tells little: ln Gamma of it is a large number, and nothing depends on it.
    for fast, single, exact in zip([torch.tensor(value), *grads], slow(torch.float32), slow(torch.float64), strict=True):
        assert (fast - exact).norm() <= 2 * (single - exact).norm() + 1e-5 * exact.norm()


def network_of(cells: Cells, config: VaeConfig) -> CellVae:
    """With parameters away from where training starts, and some log variances beyond their limits."""
    network = seeded(lambda: CellVae(len(cells.genes), len(cells.batches), config), 0)
    network.start_from(cells)
    stream = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=stream)
        network.to_latent.bias[-2:] += torch.tensor([7.0, -13.0])
        network.spread[0] = LARGEST_LOG_R + 1
    return network


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("likelihood", ["nb", "gaussian"])
@pytest.mark.parametrize("hidden", [[24], [24, 16], [16, 24, 8]])
@pytest.mark.parametrize("free_bits", [0.0, 0.5])
@pytest.mark.parametrize("n", [64, 1])
def test_pass_by_hand_against_autograd(monkeypatch, toy_of, batches: int, likelihood, hidden: list[int], free_bits: float, n: int) -> None:
    cells = toy_of(batches)
    network = network_of(cells, VaeConfig(hidden=hidden, latent=6, likelihood=likelihood, free_bits=free_bits))
    data, rows = CellTensors.make(cells, network.counts, CPU), torch.randperm(300, generator=torch.Generator().manual_seed(1))[:n]
    noise = torch.randn(n, 6, generator=torch.Generator().manual_seed(2))
    given = network.encode(data.rows(rows)[0], data.rows(rows)[3])[1]
    assert n == 1 or all((given == limit).any() for limit in LOG_VARIANCE_LIMIT)
    called = []
    monkeypatch.setattr(kernels, "posterior", lambda *a, loop=kernels.posterior: called.append(1) or loop(*a))

    def run(by_hand: bool, half: bool = False) -> list[torch.Tensor]:
        monkeypatch.setattr(vae, "fused", lambda *tensors: by_hand)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            value = network.negative_bound(data, rows, noise, 0.7)
        return [value.detach(), *torch.autograd.grad(3 * value, list(network.parameters()))]

    plain = run(False)
    assert not called
    for slow, fast in zip(plain, run(True), strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5 * float(slow.abs().max()))
    assert called == [1]
    # As near to single precision as autocast is, each parameter's gradient too.
    for single, slow, fast in zip(plain, run(False, True), run(True, True), strict=True):
        assert fast.dtype == torch.float32
        assert (fast - single).norm() <= 2 * (slow - single).norm() + 0.02 * single.norm()


@pytest.mark.parametrize("options", [{"norm": "none"}, {"norm": "batch"}, {"activation": "relu"}, {"kind": "autoencoder"}], ids=str)
def test_other_designs_are_left_to_autograd(monkeypatch, toy: Cells, options: dict[str, str]) -> None:
    monkeypatch.setattr(CellVae, "loss_by_hand", None)
    config = VaeConfig(hidden=[8], latent=2, **options)
    network = network_of(toy, config)
    loss = vae.VaeLoss(CellTensors.make(toy, network.counts, CPU), config)
    assert torch.isfinite(loss(network, torch.arange(20), torch.Generator().manual_seed(0), 1.0))


def test_rows_that_are_not_held_dense_give_the_same_bits(monkeypatch, toy: Cells) -> None:
    network, rows, noise = network_of(toy, VaeConfig(hidden=[8], latent=2)), torch.tensor([7, 3, 3, 100]), torch.randn(4, 2)
    values = []
    for limit in (2**30, 0):
        monkeypatch.setattr(vae, "Matrix", lambda values, device, limit=limit: Matrix(values, device, limit))
        values.append(network.negative_bound(CellTensors.make(toy, True, CPU), rows, noise, 1.0).detach())
    assert torch.equal(*values)


def test_values_that_are_not_finite_are_noticed(toy: Cells) -> None:
    network = network_of(toy, VaeConfig(hidden=[8], latent=2))
    data, rows, noise = CellTensors.make(toy, True, CPU), torch.arange(30), torch.zeros(30, 2)
    for part in (network.encoder[0], network.to_latent, network.decoder[0], network.to_genes):
        kept = part.weight.data.clone()
        part.weight.data[0, 0] = torch.nan
        assert not torch.isfinite(network.negative_bound(data, rows, noise, 1.0))
        part.weight.data.copy_(kept)
