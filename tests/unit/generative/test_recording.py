"""Steps recorded as CUDA graphs, on a GPU that is pretended."""

from __future__ import annotations

import contextlib
import gc
import logging
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from pretended_gpu import DEVICES, RECORDED, USUAL, Graph, pretended_gpu
from torch import Tensor, nn

from dbdiffusion.config.generator import DiffusionConfig, VaeConfig
from dbdiffusion.generative.cells import DENSE_LIMIT, Cells, Matrix
from dbdiffusion.generative.diffusion import fit_denoiser
from dbdiffusion.generative.fitting import Fitted, fit_all
from dbdiffusion.generative.latents import Latents
from dbdiffusion.generative.recording import EAGER, Recorded
from dbdiffusion.generative.training import Plan, Trainer, Training
from dbdiffusion.generative.vae import fit_vae

GPU = torch.device("cuda:0")


@pytest.fixture
def replays(monkeypatch) -> list[Graph]:
    """The graph of each replay."""
    found: list[Graph] = []
    replay = Graph.replay
    monkeypatch.setattr(Graph, "replay", lambda self: (found.append(self), replay(self)))
    return found


def test_a_recorded_step_does_what_the_step_does(replays: list[Graph]) -> None:
    with pretended_gpu():
        state, given = {way: torch.zeros(3, device=GPU) for way in ("plain", "recorded")}, []

        def step(name: str):
            def change(x: Tensor, factor: float | Tensor) -> None:
                state[name].mul_(0.5).add_((factor * x).square())

            return change

        recorded = Recorded(step("recorded"), GPU)
        for i in range(8):
            x = torch.arange(3.0, device=GPU) + i
            given.append(x)
            recorded(x, 0.1 * i)
            step("plain")(x, 0.1 * i)
            torch.testing.assert_close(state["recorded"].cpu(), state["plain"].cpu())
        # They are the caller's.
        assert [x.cpu()[0] for x in given] == list(range(8))
    assert len(replays) == 8 - EAGER


def test_what_is_no_input_stays_as_it_was_recorded(replays: list[Graph]) -> None:
    """What the pretended GPU is for: a step that must not be recorded does not seem right."""
    with pretended_gpu():
        for now in ([0.0], torch.zeros(1)):
            total = torch.zeros((), device=GPU)
            recorded = Recorded(lambda x, now=now, total=total: total.add_(now[0] * x.sum()), GPU)
            for i in range(6):
                now[0] = float(i)
                recorded(torch.ones(1, device=GPU))
            assert float(total) == 0 + 1 + 2 + 3 * 3


def test_calls_before_a_recording_are_on_its_stream() -> None:
    with pretended_gpu():
        seen, devices = [], []
        recorded = Recorded(lambda x: (seen.append(torch.cuda.current_stream(GPU)), devices.append(DEVICES[-1])), GPU)
        for _ in range(EAGER + 2):
            recorded(torch.ones(1, device=GPU))
    assert seen == [recorded.stream] * (EAGER + 1)
    assert {*devices, recorded.stream.device} == {GPU}
    assert recorded.stream.waited == [USUAL] * EAGER
    assert USUAL.waited[-EAGER:] == [recorded.stream] * EAGER


CANNOT = {
    "a look": lambda x: float(x.sum()),
    "a decision": lambda x: 1.0 if x[0] > -1 else 2.0,
    "a copy to the CPU": lambda x: x.cpu().sum().to(GPU),
    "Python's numbers": lambda x: torch.tensor([1.0, 0.0], device=GPU) * x,
    "the CPU's memory": lambda x: torch.zeros(2, device=GPU).copy_(torch.ones(2)) * x,
    "a mask": lambda x: x[x > 0],
    "what is there": lambda x: x.unique(),
    "a random stream": lambda x: x * torch.rand(2, generator=torch.Generator(GPU), device=GPU),
    "a comparison": lambda x: float(torch.equal(x, x)),
    "a count": lambda x: x.long().bincount(minlength=9),
    "a number of the CPU": lambda x: torch.zeros((), device=GPU).copy_(torch.tensor(1.0)) * x,
    "random numbers": lambda x: x * torch.rand_like(x),
}


@pytest.mark.parametrize("what", CANNOT)
def test_a_step_that_cannot_be_recorded_is_done_as_it_is(caplog, replays: list[Graph], what: str) -> None:
    with pretended_gpu(), caplog.at_level(logging.WARNING):
        calls = []
        total = torch.zeros((), device=GPU)

        def step(x: Tensor) -> None:
            total.add_(0 * torch.as_tensor(CANNOT[what](x)).sum() + x.sum())
            calls.append(1)

        recorded = Recorded(step, GPU)
        for i in range(6):
            recorded(torch.full((2,), float(i), device=GPU))
            assert torch.cuda.current_stream(GPU) is USUAL
        assert float(total) == 30
    assert len(calls) == 6
    assert not replays
    assert [record.message for record in caplog.records] == [
        "training goes on without a CUDA graph (set cuda_graphs to false to be rid of this): "
        "operation not permitted when stream is capturing"
    ]


@pytest.mark.parametrize(("error", "goes_on"), [(RuntimeError(""), True), (KeyboardInterrupt(), False)])
def test_errors_without_words_and_interrupts(caplog, error: BaseException, goes_on: bool) -> None:
    def step(x: Tensor) -> None:
        if RECORDED:
            raise error

    with pretended_gpu():
        recorded = Recorded(step, GPU)
        with contextlib.nullcontext() if goes_on else pytest.raises(KeyboardInterrupt):
            for _ in range(EAGER + 2):
                recorded(torch.ones(1, device=GPU))
    assert [record.message.rsplit(": ", 1)[1] for record in caplog.records] == ["RuntimeError"] * goes_on


def test_inputs_of_other_shapes_are_refused() -> None:
    with pretended_gpu():
        recorded = Recorded(lambda x: None, GPU)
        recorded(torch.ones(3, device=GPU))
        with pytest.raises(ValueError, match=r"shape \(1,\), \(3,\) before"):
            recorded(torch.ones(1, device=GPU))


def test_nothing_is_kept_after_a_training(monkeypatch, toy: Cells) -> None:
    trainers: list[weakref.ref] = []
    rows = Trainer.rows
    monkeypatch.setattr(Trainer, "rows", lambda self, step: (trainers.append(weakref.ref(self)), rows(self, step))[1])
    gc.disable()
    try:
        with pretended_gpu():
            assert autoencoder(toy, precision="fp32", cuda_graphs=True).recorded
        assert trainers[0]() is None
    finally:
        gc.enable()


def autoencoder(cells: Cells, scratch: Path | None = None, on_step=None, **config) -> Fitted:
    return fit_vae(
        cells, VaeConfig(hidden=[16], latent=4, batch_size=64, max_steps=12, **config), device=GPU, seed=1, scratch=scratch, on_step=on_step
    )[1]


def denoiser(cells: Cells, scratch: Path | None = None, on_step=None, **config) -> Fitted:
    stream = torch.Generator().manual_seed(0)
    latents = [torch.randn(300, 4), torch.rand(300, 4), torch.randint(0, 90, (300,)), torch.randn(90, 5, generator=stream)]
    # More conditions than cells in a batch: those of a batch are taken before.
    config = DiffusionConfig(widths=[16, 8], batch_size=64, max_steps=12, **config)
    return fit_denoiser(Latents(*(x.to(GPU) for x in latents)), config, device=GPU, seed=1, scratch=scratch, on_step=on_step)[1]


def assert_same(one: Fitted, other: Fitted) -> None:
    assert one.history == other.history
    assert one.weights.keys() == other.weights.keys()
    for name, value in one.weights.items():
        assert torch.equal(value, other.weights[name]), name


@pytest.mark.parametrize(
    ("train", "config"),
    [
        (autoencoder, {}),
        (autoencoder, {"likelihood": "gaussian", "kl_warmup_share": 0.8}),
        (autoencoder, {"kind": "autoencoder", "norm": "batch", "activation": "prelu"}),
        (denoiser, {}),
        (denoiser, {"null_token": "zero", "ema": 0.0, "prediction": "epsilon"}),
    ],
)
def test_recorded_trainings_end_with_the_same_weights(toy: Cells, caplog, replays: list[Graph], train, config: dict) -> None:
    made = []
    for graphs in (False, True):
        torch.manual_seed(0)
        with pretended_gpu():
            made.append(train(toy, **config, cuda_graphs=graphs, precision="fp32"))
        assert len(replays) == (12 - EAGER if graphs else 0)
    assert len({id(graph) for graph in replays}) == 1
    assert_same(*made)
    assert len(made[0].history) > 1
    assert [fitted.recorded for fitted in made] == [False, True]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_cells_that_are_not_held_on_the_gpu(monkeypatch, toy: Cells, replays: list[Graph]) -> None:
    made = []
    for limit in (DENSE_LIMIT, 0):
        monkeypatch.setattr(Matrix.__init__, "__defaults__", (limit,))
        assert (Matrix(toy.counts, torch.device("cpu"))._dense is None) == (limit == 0)
        with pretended_gpu():
            made.append(autoencoder(toy, precision="fp32", cuda_graphs=True))
    assert len(replays) == 2 * (12 - EAGER)
    assert_same(*made)


def test_a_loss_that_is_not_in_parts_is_not_recorded(replays: list[Graph]) -> None:
    with pretended_gpu():
        network = nn.Linear(2, 1)
        plan = Plan(
            "plain", 0, np.arange(40), batch_size=8, max_epochs=2, max_steps=10, learning_rate=0.1, weight_decay=0.0, cuda_graphs=True
        )
        loss = lambda net, rows, stream, share: net(torch.ones(8, 2, device=GPU)).square().mean()  # noqa: E731
        fitted = fit_all([Training(network, loss, plan)], device=GPU)[0]
    assert not fitted.recorded
    assert not replays
    assert fitted.history[-1]["train"] < fitted.history[0]["train"]


@pytest.mark.parametrize("graphs", [False, True])
def test_precision_is_that_of_the_gpu(monkeypatch, toy: Cells, graphs: bool) -> None:
    asked = []
    autocast = torch.autocast
    monkeypatch.setattr(
        torch, "autocast", lambda kind, **options: (asked.append((kind, *options.values())), autocast("cpu", enabled=False))[1]
    )
    with pretended_gpu():
        autoencoder(toy, precision="bf16", cuda_graphs=graphs)
    assert set(asked) == {("cuda", torch.bfloat16, True)}
    assert len(asked) == (EAGER + 1 if graphs else 12)


def test_a_training_goes_on_with_graphs_switched_off(toy: Cells, tmp_path: Path, replays: list[Graph]) -> None:
    class Stopped(Exception):
        pass

    def stop(step: int) -> None:
        if step == 7:
            raise Stopped

    for train in (autoencoder, denoiser):
        torch.manual_seed(0)
        options = {"precision": "fp32", "checkpoint_seconds": 1e-9}
        with pretended_gpu():
            whole = train(toy, **options)
        replays.clear()
        torch.manual_seed(0)
        with pretended_gpu(), pytest.raises(Stopped):
            train(toy, scratch=tmp_path, on_step=stop, **options, cuda_graphs=True)
        assert len(replays) == 7 - EAGER
        torch.manual_seed(0)
        seen = []
        with pretended_gpu():
            rest = train(toy, scratch=tmp_path, on_step=seen.append, **options)
        assert seen[0] == 8
        assert_same(whole, rest)
