"""The loops for CPUs against torch, in double precision or by autograd."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from numba import njit
from scipy import special
from torch import nn

from dbdiffusion.config.generator import VaeConfig
from dbdiffusion.generative import denoiser, kernels, optimiser, training
from dbdiffusion.generative.denoiser import Denoiser
from dbdiffusion.generative.kernels import array
from dbdiffusion.generative.optimiser import AdamW


def over(function):
    """An inlined scalar function over an array."""

    @njit(error_model="numpy", fastmath={"contract"})
    def loop(x, out):
        for i in range(x.size):
            out[i] = function(x[i])

    def apply(x: np.ndarray) -> np.ndarray:
        out = np.empty_like(x)
        loop(x, out)
        return out.astype(float)

    return apply


@njit
def ln_gamma(x):
    return kernels.log_gamma_and_digamma(x)[0]


@njit
def digamma(x):
    return kernels.log_gamma_and_digamma(x)[1]


@pytest.mark.parametrize(
    ("function", "slow", "x"),
    [
        (kernels.exp, np.exp, np.linspace(-87, 88, 20_000)),
        (kernels.log, np.log, np.geomspace(1e-37, 1e37, 20_000)),
        (kernels.log1p, np.log1p, np.geomspace(1e-12, 1e12, 20_000)),
        (ln_gamma, special.gammaln, np.geomspace(1e-3, 1e4, 2_000)),
        (digamma, special.digamma, np.geomspace(1e-3, 1e4, 2_000)),
    ],
)
def test_functions_to_single_precision(function, slow, x: np.ndarray) -> None:
    x = x.astype(np.float32)
    np.testing.assert_allclose(over(function)(x), slow(x.astype(float)), rtol=1e-6, atol=3e-6)


def test_exponential_and_logarithms_at_their_edges() -> None:
    edges = np.array([-1e30, -200.0, 0.0, 200.0, 1e30], dtype=np.float32)
    found = over(kernels.exp)(edges)
    assert found[0] == found[1] < 1e-37
    assert found[2] == 1
    assert 1e38 < found[3] == found[4] < np.inf
    assert over(kernels.log1p)(np.zeros(1, dtype=np.float32))[0] == 0


def test_vectors_are_whole_where_the_cpu_has_them() -> None:
    assert kernels.whole_vectors("+sse2,+avx512f,-amx-tile") == "+sse2,+avx512f,-amx-tile,-prefer-256-bit"
    for other in ("", "+sse2,+avx2", "+avx2,-avx512f"):
        assert kernels.whole_vectors(other) == other
    features = kernels.negative_binomial.targetctx.codegen().magic_tuple()[2].split(",")
    assert ("-prefer-256-bit" in features) == ("+avx512f" in features)


def test_sum_of_squares_of_many() -> None:
    x = np.random.default_rng(0).normal(size=300_001).astype(np.float32)
    assert kernels.sum_of_squares(x) == pytest.approx(float((x.astype(float) ** 2).sum()), rel=1e-6)


@pytest.mark.parametrize("widths", [[16], [24, 16], [40, 32, 16, 8]])
@pytest.mark.parametrize("null_token", ["learned", "zero"])
@pytest.mark.parametrize("conditions", [4, 200])
@pytest.mark.parametrize(("n", "dropped"), [(60, 0), (60, 7), (1, 0), (2, 2)])
def test_denoiser_by_hand_against_autograd(monkeypatch, widths: list[int], null_token: str, conditions: int, n: int, dropped: int) -> None:
    stream = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    network = Denoiser(7, 5, widths, null_token)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3, generator=stream)
    y, target = torch.randn(n, 7, generator=stream), torch.randn(n, 7, generator=stream)
    t, weight = torch.randint(0, 1000, (n,), generator=stream), torch.rand(n, generator=stream)
    index = torch.randint(0, conditions, (n,), generator=stream)
    index[:dropped] = conditions  # The null label.
    values = torch.randn(conditions, 5, generator=stream)
    called = []
    monkeypatch.setattr(kernels, "modulated", lambda *a, loop=kernels.modulated: called.append(1) or loop(*a))

    def run(by_hand: bool, half: bool = False) -> list[torch.Tensor]:
        monkeypatch.setattr(denoiser, "fused", lambda *tensors: by_hand)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            value = network.misfit(y, t, values, index, target, weight)
        return [value, *torch.autograd.grad(3 * value, list(network.parameters()), materialize_grads=True)]

    plain = run(False)
    assert not called
    for slow, fast in zip(plain, run(True), strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    assert len(called) == 2 * len(widths) - 1
    # As near to single precision as autocast is, each parameter's gradient too.
    every = plain, run(False, True), run(True, True)
    for single, slow, fast in zip(*every, strict=True):
        assert fast.dtype == torch.float32
        assert (fast - single).norm() <= 3 * (slow - single).norm() + 0.03 * single.norm()
    single, slow, fast = (torch.cat([part.reshape(-1) for part in parts]) for parts in every)
    assert 0 < (fast - single).norm() <= (1.2 if n > 2 else 3) * (slow - single).norm()


def test_bfloat16_in_loops_as_torch_rounds_it() -> None:
    x = torch.cat(
        [
            torch.randn(5000, generator=torch.Generator().manual_seed(0)),
            torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, 3e38]),
        ]
    )

    @njit
    def loop(x, low, back):
        for i in range(x.size):
            low[i] = kernels.narrow(low, x[i])
            back[i] = kernels.wide(low[i])

    low, back = torch.empty_like(x, dtype=torch.bfloat16), torch.empty_like(x)
    loop(array(x), array(low), array(back))
    torch.testing.assert_close(low, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(back, x.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


def test_sampling_by_hand_against_torch(monkeypatch) -> None:
    torch.manual_seed(0)
    network = Denoiser(7, 5, [24, 16]).eval()
    nn.init.normal_(network.out.weight)
    y, label = torch.randn(3, 20, 7), network.embed(torch.randn(3, 5))[:, None]
    found = []
    with torch.no_grad():
        for by_hand in (False, True):
            monkeypatch.setattr(denoiser, "fused", lambda *tensors, by_hand=by_hand: by_hand)
            found.append(network(y, torch.tensor([300]), label))
    assert not torch.equal(*found)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("clip", [1e-2, 1e6])
@pytest.mark.parametrize("loop", [True, False])
def test_adamw_against_torch(monkeypatch, clip: float, loop: bool) -> None:
    monkeypatch.setattr(optimiser, "fused", lambda *tensors: loop)

    def network() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4))

    ours, theirs = network(), network()
    fast = AdamW(list(ours.parameters()), 0.1, clip)
    matrices, vectors = ([p for p in theirs.parameters() if (p.ndim > 1) is wide] for wide in (True, False))
    slow = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}])
    x = torch.randn(30, 6)
    for step in range(30):
        rate = 0.01 * (step + 1) / 30
        fast.step(torch.autograd.grad(ours(x).square().mean(), fast.parameters), *fast.settings(rate))
        for group in slow.param_groups:
            group["lr"] = rate
        slow.zero_grad()
        theirs(x).square().mean().backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), clip)
        slow.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("written", [[], [0], [0, 1]])
def test_gradients_count_wherever_they_lie(written: list[int]) -> None:
    """Some where the optimiser reads them, others not."""
    torch.manual_seed(0)
    start, gradients = nn.Linear(3, 2), [torch.randn(2, 3), torch.randn(2)]
    networks = [copy.deepcopy(start) for _ in range(2)]
    mine, theirs = (AdamW(list(network.parameters()), 0.1, 0.5) for network in networks)
    for _ in range(2):
        given = list(gradients)
        for i in written:
            mine.parameters[i].gradient_place.copy_(gradients[i])
            given[i] = mine.parameters[i].gradient_place
        mine.step(given, *mine.settings(0.1))
        theirs.step(gradients, *theirs.settings(0.1))
        assert torch.equal(mine.values, theirs.values)
        gradients = [2 * g - 1 for g in gradients]


def test_state_of_the_optimiser_is_taken_whole_or_not_at_all() -> None:
    one, other = (AdamW(list(nn.Linear(3, n).parameters()), 0.0, 1.0) for n in (2, 4))
    one.step([torch.ones(2, 3), torch.ones(2)], *one.settings(0.1))
    assert not other.load(one.state())
    assert other.steps == 0
    again = AdamW(list(nn.Linear(3, 2).parameters()), 0.0, 1.0)
    assert again.load(one.state())
    assert again.steps == 1
    assert torch.equal(again.first, one.first)


@pytest.mark.parametrize(("flags", "expected"), [({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16), ({}, None)])
def test_half_precision_where_the_cpu_multiplies_it(monkeypatch, flags: dict[str, bool], expected) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    assert training.autocast_type(VaeConfig().precision, torch.device("cpu")) is expected
    assert training.autocast_type("fp32", torch.device("cpu")) is None
    assert training.autocast_type("bf16", torch.device("cpu")) is torch.bfloat16


def test_arrays_share_the_memory_of_their_tensors() -> None:
    tensor = torch.zeros(3, requires_grad=True)
    array(tensor)[0] = 1
    assert tensor.tolist() == [1, 0, 0]


def test_loops_are_compiled_anew_where_no_folder_can_be_written(monkeypatch) -> None:
    def refuse(*arguments, **options):
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(kernels, "njit", refuse)
    assert not kernels._can_be_kept()
