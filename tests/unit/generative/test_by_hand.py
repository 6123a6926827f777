"""Steps by hand from batch to batch: what they keep must not show."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dbdiffusion.config.generator import VaeConfig
from dbdiffusion.generative import denoiser, vae
from dbdiffusion.generative.by_hand import ByHand, value_and_gradients
from dbdiffusion.generative.cells import Cells
from dbdiffusion.generative.denoiser import Denoiser
from dbdiffusion.generative.networks import seeded
from dbdiffusion.generative.optimiser import AdamW
from dbdiffusion.generative.vae import CellTensors, CellVae

CPU = torch.device("cpu")
Loss = Callable[[ByHand, int, int], Tensor]
"""(network, seed of the batch, its rows) -> loss."""


def autoencoder(cells: Cells, **options) -> tuple[CellVae, Loss]:
    config = VaeConfig(hidden=[16, 12], latent=3, **options)
    network = seeded(lambda: CellVae(len(cells.genes), len(cells.batches), config), 0)
    network.start_from(cells)
    data = CellTensors.make(cells, network.counts, CPU)

    def loss(network: CellVae, seed: int, n: int) -> Tensor:
        stream = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(cells), generator=stream)[:n]
        return network.negative_bound(data, rows, torch.randn(n, 3, generator=stream), 0.2 + 0.1 * seed)

    return network, loss


def diffusion(null_token: str, conditions: int) -> tuple[Denoiser, Loss]:
    network = seeded(lambda: Denoiser(5, 4, [24, 16, 8], null_token), 0)
    nn.init.normal_(network.out.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    table = torch.randn(conditions, 4, generator=torch.Generator().manual_seed(1))

    def loss(network: Denoiser, seed: int, n: int) -> Tensor:
        stream = torch.Generator().manual_seed(seed)
        index = torch.randint(0, conditions + 1, (n,), generator=stream)
        y, target = torch.randn(2, n, 5, generator=stream)
        return network.misfit(y, torch.randint(0, 1000, (n,), generator=stream), table, index, target, torch.rand(n, generator=stream))

    return network, loss


@pytest.fixture(
    params=["nb", "gaussian", "one batch", "few conditions", "as many conditions as rows", "many conditions", "zero null"], scope="session"
)
def case(request, toy_of) -> tuple[ByHand, Loss]:
    name = request.param
    if name in ("nb", "gaussian"):
        return autoencoder(toy_of(3), likelihood=name)
    if name == "one batch":
        return autoencoder(toy_of(1), free_bits=0.1)
    few = {"as many conditions as rows": 40, "many conditions": 90}.get(name, 6)
    return diffusion("zero" if name == "zero null" else "learned", few)


def single(value: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    return list(torch.autograd.grad(value, parameters, materialize_grads=True))


@pytest.mark.parametrize("half", [False, True])
def test_every_batch_as_autograd_has_it(monkeypatch, case: tuple[ByHand, Loss], half: bool) -> None:
    network, loss = copy.deepcopy(case[0]), case[1]
    precision = (lambda: torch.autocast("cpu", torch.bfloat16)) if half else contextlib.nullcontext

    def both(seed: int, n: int) -> tuple[Tensor, Tensor]:
        values = []
        for by_hand in (False, True):
            for module in (denoiser, vae):
                monkeypatch.setattr(module, "fused", lambda *tensors, by_hand=by_hand: by_hand)
            values.append(loss(network, seed, n))
        return values[0], values[1]

    for part in range(2):
        optimiser = AdamW(list(network.parameters()), 0.01, 1.0)  # The second one moves all parameters.
        for seed in range(3 * part, 3 * part + 3):
            with precision():
                slow, fast = both(seed, 40)
            torch.testing.assert_close(fast, slow, rtol=2e-2 if half else 1e-4, atol=0)
            expected = single(slow, optimiser.parameters)
            if seed % 2:  # Without a graph.
                with precision():
                    value, found = value_and_gradients(network, lambda seed=seed: loss(network, seed, 40), optimiser.parameters)
                assert torch.equal(value, fast)
                assert value.grad_fn is None
            else:
                found = single(fast, optimiser.parameters)
            assert all(g.data_ptr() == place.data_ptr() for g, place in zip(found, optimiser.places, strict=True))
            for mine, theirs in zip(found, expected, strict=True):
                assert (mine - theirs).norm() <= (0.15 if half else 1e-4) * theirs.norm() + 1e-6
            optimiser.step(found, *optimiser.settings(0.02))
            if seed % 3 != 1:
                continue  # The step goes on, to another batch or to moved parameters.
            # Held-out cells in single precision, of another number.
            network.eval()
            with torch.no_grad():
                slow, fast = both(100 + seed, 17)
            torch.testing.assert_close(fast, slow, rtol=1e-4, atol=0)
            network.train()


def test_precision_follows_autocast_from_call_to_call(case: tuple[ByHand, Loss]) -> None:
    network, loss = case
    with torch.no_grad():
        plain = loss(network, 1, 20)
        with torch.autocast("cpu", torch.bfloat16):
            assert loss(network, 1, 20) != plain
        assert loss(network, 1, 20) == plain


def test_gradients_of_an_earlier_loss_are_refused(case: tuple[ByHand, Loss]) -> None:
    network, loss = case
    parameters = list(network.parameters())
    for rows in (20, 30):
        first = loss(network, 1, 20)
        with torch.no_grad():
            loss(network, 2, rows)
        with pytest.raises(RuntimeError, match="latest loss"):
            single(first, parameters)
    last = loss(network, 1, 20)
    torch.autograd.grad(last, parameters, retain_graph=True)
    with pytest.raises(RuntimeError, match="latest loss"):
        single(last, parameters)
    last = loss(network, 1, 20)
    value_and_gradients(network, lambda: loss(network, 1, 20), parameters)
    with pytest.raises(RuntimeError, match="latest loss"):
        single(last, parameters)


def test_a_multiple_of_the_loss_has_multiples_of_its_gradients(case: tuple[ByHand, Loss]) -> None:
    network, loss = case
    parameters = list(network.parameters())
    once, thrice = ([g.clone() for g in single(factor * loss(network, 1, 20), parameters)] for factor in (1, 3))
    for one, three in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * one, three)
    assert any(g.any() for g in once)


def test_without_a_graph_a_loss_by_hand_is_all_of_the_loss_or_none(case: tuple[ByHand, Loss]) -> None:
    network, loss = case
    parameters = list(network.parameters())

    def penalty() -> Tensor:
        return sum(p.square().sum() for p in parameters)

    def twice() -> Tensor:
        loss(network, 1, 20)
        return loss(network, 2, 20)

    def first_of_two() -> Tensor:
        value = loss(network, 1, 20)
        loss(network, 2, 20)
        return value

    for wrong in (first_of_two, lambda: 2 * loss(network, 1, 20), lambda: loss(network, 1, 20) + penalty(), twice):
        with pytest.raises(RuntimeError, match="a part of another"):
            value_and_gradients(network, wrong, parameters)
    # What torch differentiates still has its graph, afterwards too.
    value, found = value_and_gradients(network, penalty, parameters)
    assert value.grad_fn is None
    for p, g in zip(parameters, found, strict=True):
        torch.testing.assert_close(g, 2 * p.detach())
    assert loss(network, 1, 20).grad_fn is not None


def test_other_networks_are_left_to_torch() -> None:
    network = nn.Linear(3, 1)
    value, (weight, bias) = value_and_gradients(network, lambda: network(torch.ones(2, 3)).sum(), [network.weight, network.bias])
    assert value.grad_fn is None
    assert weight.tolist() == [[2, 2, 2]]
    assert bias.tolist() == [2]


def test_parameters_that_moved_are_followed(case: tuple[ByHand, Loss]) -> None:
    network, loss = copy.deepcopy(case[0]), case[1]
    before = loss(network, 1, 20)
    for parameter in network.parameters():
        parameter.data = 1.5 * parameter.data
    after = loss(network, 1, 20)
    assert after != before
    assert after == loss(copy.deepcopy(network), 1, 20)


def test_places_of_gradients_that_moved_are_followed(case: tuple[ByHand, Loss]) -> None:
    network, loss = copy.deepcopy(case[0]), case[1]
    optimiser = AdamW(list(network.parameters()), 0.0, 1.0)
    first = value_and_gradients(network, lambda: loss(network, 1, 20), optimiser.parameters)[1]
    for p in optimiser.parameters:
        p.gradient_place = torch.full_like(p, 7.0)
    second = value_and_gradients(network, lambda: loss(network, 1, 20), optimiser.parameters)[1]
    for p, one, other in zip(optimiser.parameters, first, second, strict=True):
        assert other.data_ptr() == p.gradient_place.data_ptr()
        assert torch.equal(one, other)


def test_the_step_is_let_go_with_training(case: tuple[ByHand, Loss]) -> None:
    network, loss = case
    loss(network, 1, 20)
    assert network._step is not None
    network.eval()
    assert network._step is None
    network.train()


def test_batch_codes_without_a_batch_are_refused(toy: Cells) -> None:
    wrong = copy.copy(toy.batch)
    wrong[3] = 2
    cells = Cells(toy.expression, toy.counts, toy.log_library, wrong, toy.batches, toy.perturbation, toy.genes)
    with pytest.raises(ValueError, match="batch codes must be 0 to 1, found 0 to 2"):
        CellTensors.make(cells, True, CPU)
