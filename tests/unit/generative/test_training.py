"""Training that is interrupted ends with the bytes of one that is not."""

from __future__ import annotations

import multiprocessing
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dbdiffusion.config.generator import DiffusionConfig, VaeConfig
from dbdiffusion.generative import checkpoint, diffusion, vae
from dbdiffusion.generative.conditions import Doubt
from dbdiffusion.generative.diffusion import fit_denoiser
from dbdiffusion.generative.fitting import Fitted, fit_all
from dbdiffusion.generative.latents import Latents
from dbdiffusion.generative.training import Plan, Training, learning_rate, split_rows
from dbdiffusion.generative.vae import fit_vae
from dbdiffusion.runtime.errors import UserError

CPU = torch.device("cpu")


def latents(n: int = 400, d: int = 5) -> Latents:
    stream = torch.Generator().manual_seed(0)
    label = torch.arange(n) % 3
    conditions = torch.eye(3)
    mean = torch.randn(n, d, generator=stream) * 0.5 + conditions[label].repeat(1, 2)[:, :d]
    return Latents(mean, torch.full((n, d), 0.3), label, conditions)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class StopTraining(Exception):
    pass


def stop_at(*steps: int):
    """Raises at these steps, once each."""
    left = list(steps)

    def on_step(step: int) -> None:
        if left and step == left[0]:
            left.pop(0)
            raise StopTraining

    return on_step


def doubt(spread: float = 1.0) -> Doubt:
    """For the conditions of `latents`, the last coordinate as certainty."""
    known = latents().conditions
    u, d = known.shape
    return Doubt(torch.zeros(d - 1), torch.full((d - 1,), spread), torch.zeros(0), torch.arange(u) == 0)


@pytest.mark.parametrize("stops", [(7,), (3, 20, 33)])
def test_interrupted_diffusion_ends_with_the_same_bits(tmp_path: Path, stops: tuple[int, ...]) -> None:
    config = DiffusionConfig(widths=[16, 8], batch_size=32, max_steps=40, patience=0, checkpoint_seconds=1e-9)
    uncertain = {"device": CPU, "seed": 5, "doubt": doubt()}
    whole, fitted = fit_denoiser(latents(), config, **uncertain)
    on_step = stop_at(*stops)
    for _ in stops:
        with pytest.raises(StopTraining):
            fit_denoiser(latents(), config, **uncertain, scratch=tmp_path, on_step=on_step)
    assert len(list(tmp_path.glob("diffusion-*.safetensors"))) == 1
    again, resumed = fit_denoiser(latents(), config, **uncertain, scratch=tmp_path, on_step=on_step)
    assert same(whole.state_dict(), again.state_dict())
    assert resumed.history == fitted.history
    assert resumed.best_epoch == fitted.best_epoch
    # Neither sharp nor otherwise uncertain conditions are the same training.
    for other in (None, doubt(2.0)):
        assert not same(whole.state_dict(), fit_denoiser(latents(), config, device=CPU, seed=5, doubt=other)[0].state_dict())


def test_a_state_of_other_conditions_is_not_resumed(tmp_path: Path) -> None:
    config = DiffusionConfig(widths=[16, 8], batch_size=32, max_steps=40, patience=0, checkpoint_seconds=1e-9)
    for some in (None, doubt()):
        with pytest.raises(StopTraining):
            fit_denoiser(latents(), config, device=CPU, seed=5, doubt=some, scratch=tmp_path, on_step=stop_at(7))
    assert len(list(tmp_path.glob("diffusion-*.safetensors"))) == 2


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_interrupted_autoencoder_ends_with_the_same_bits(tmp_path: Path, toy, norm: str) -> None:
    config = VaeConfig(hidden=[16], latent=3, likelihood="nb", norm=norm, batch_size=32, max_steps=30, checkpoint_seconds=1e-9)
    whole, _ = fit_vae(toy, config, device=CPU, seed=5)
    with pytest.raises(StopTraining):
        fit_vae(toy, config, device=CPU, seed=5, scratch=tmp_path, on_step=stop_at(17))
    again, _ = fit_vae(toy, config, device=CPU, seed=5, scratch=tmp_path)
    assert same(whole.state_dict(), again.state_dict())


def test_state_of_other_data_or_settings_is_not_resumed(tmp_path: Path) -> None:
    config = DiffusionConfig(widths=[8], batch_size=32, max_steps=20, checkpoint_seconds=1e-9)
    with pytest.raises(StopTraining):
        fit_denoiser(latents(), config, device=CPU, seed=5, scratch=tmp_path, on_step=stop_at(10))
    other, _ = fit_denoiser(latents(300), config, device=CPU, seed=5, scratch=tmp_path)
    fresh, _ = fit_denoiser(latents(300), config, device=CPU, seed=5)
    assert same(other.state_dict(), fresh.state_dict())


@pytest.mark.parametrize(("edited", "first"), [(False, 11), (True, 1)])
@pytest.mark.parametrize("module", [diffusion, vae])
def test_state_of_other_code_is_not_resumed(tmp_path: Path, monkeypatch, toy, module, edited: bool, first: int) -> None:
    settings = {"batch_size": 32, "max_steps": 20, "checkpoint_seconds": 1e-9}

    def train(on_step) -> None:
        if module is diffusion:
            fit_denoiser(latents(), DiffusionConfig(widths=[8], **settings), device=CPU, seed=5, scratch=tmp_path, on_step=on_step)
        else:
            fit_vae(toy, VaeConfig(hidden=[8], latent=2, **settings), device=CPU, seed=5, scratch=tmp_path, on_step=on_step)

    with pytest.raises(StopTraining):
        train(stop_at(10))
    if edited:
        monkeypatch.setattr(module, "code_hash", lambda path: "another")
    steps: list[int] = []
    train(steps.append)
    assert steps[0] == first


def test_damaged_state_is_ignored(tmp_path: Path) -> None:
    config = DiffusionConfig(widths=[8], batch_size=32, max_steps=20, checkpoint_seconds=1e-9)
    whole, _ = fit_denoiser(latents(), config, device=CPU, seed=5)
    with pytest.raises(StopTraining):
        fit_denoiser(latents(), config, device=CPU, seed=5, scratch=tmp_path, on_step=stop_at(10))
    state = next(tmp_path.glob("*.safetensors"))
    state.write_bytes(state.read_bytes()[:-100])
    again, _ = fit_denoiser(latents(), config, device=CPU, seed=5, scratch=tmp_path)
    assert same(whole.state_dict(), again.state_dict())


def test_state_of_another_layout_is_ignored(tmp_path: Path, caplog) -> None:
    """Its moments belong to other parameters."""
    config = DiffusionConfig(widths=[8], batch_size=32, max_steps=20, checkpoint_seconds=1e-9)
    whole, _ = fit_denoiser(latents(), config, device=CPU, seed=5)
    with pytest.raises(StopTraining):
        fit_denoiser(latents(), config, device=CPU, seed=5, scratch=tmp_path, on_step=stop_at(10))
    path = next(tmp_path.glob("*.safetensors"))
    tensors, state = checkpoint.load(path)
    checkpoint.save(
        path,
        {name: value[:4] if name.startswith(("optimiser.first", "optimiser.second")) else value for name, value in tensors.items()},
        state,
    )
    again, _ = fit_denoiser(latents(), config, device=CPU, seed=5, scratch=tmp_path)
    assert "another version" in caplog.text
    assert same(whole.state_dict(), again.state_dict())


@pytest.mark.parametrize("likelihood", ["gaussian", "nb"])
def test_half_precision_reaches_the_loss_of_single_precision(toy, likelihood: str) -> None:
    config = VaeConfig(hidden=[32], latent=4, likelihood=likelihood, batch_size=64, max_epochs=20, validation_share=0.2)
    losses = []
    for precision in ("fp32", "bf16"):
        network, fitted = fit_vae(toy, config.model_copy(update={"precision": precision}), device=CPU, seed=5)
        assert all(value.dtype != torch.bfloat16 for value in network.state_dict().values())
        losses.append(min(row["validation"] for row in fitted.history))
    assert losses[1] == pytest.approx(losses[0], abs=0.02)


def test_half_precision_diffusion() -> None:
    config = DiffusionConfig(widths=[32, 16], batch_size=64, max_steps=120)
    losses = [
        min(row["validation"] for row in fit_denoiser(latents(), config.model_copy(update={"precision": p}), device=CPU, seed=5)[1].history)
        for p in ("fp32", "bf16")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_seed_decides_and_global_stream_does_not() -> None:
    config = DiffusionConfig(widths=[8], batch_size=32, max_steps=5)
    torch.manual_seed(1)
    first, _ = fit_denoiser(latents(), config, device=CPU, seed=5)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second, _ = fit_denoiser(latents(), config, device=CPU, seed=5)
    other, _ = fit_denoiser(latents(), config, device=CPU, seed=6)
    assert torch.equal(before, torch.get_rng_state())
    assert same(first.state_dict(), second.state_dict())
    assert not same(first.state_dict(), other.state_dict())


def train_slowly(scratch: Path, out: Path, connection) -> None:
    """In a child process: train with 10 ms a step, telling each step's number."""
    torch.set_num_threads(1)

    def on_step(step: int) -> None:
        connection.send(step)
        time.sleep(0.01)

    network, _ = fit_denoiser(latents(), KILLED, device=CPU, seed=5, scratch=scratch, on_step=on_step)
    checkpoint.save(out, network.state_dict())


KILLED = DiffusionConfig(widths=[16, 8], batch_size=32, max_steps=120, patience=0, checkpoint_seconds=0.02)


def test_training_killed_three_times_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole, _ = fit_denoiser(latents(), KILLED, device=CPU, seed=5)
    checkpoint.save(tmp_path / "whole.safetensors", whole.state_dict())
    # Forked rather than started anew: importing torch four times would take most of the test's time.
    context, random, reached = multiprocessing.get_context("fork"), np.random.default_rng(0), []
    for _ in range(3):
        receiver, sender = context.Pipe(duplex=False)
        run = context.Process(target=train_slowly, args=(tmp_path / "scratch", tmp_path / "killed.safetensors", sender))
        run.start()
        sender.close()
        steps = [receiver.recv()]
        time.sleep(float(random.uniform(0.1, 0.3)))
        run.kill()
        run.join()
        assert run.exitcode == -signal.SIGKILL
        while receiver.poll():
            try:
                steps.append(receiver.recv())
            except EOFError:
                break
        reached.append((steps[0], steps[-1]))
    assert reached[0][0] == 1
    assert reached[1][0] > 1, "the second run started from the beginning"
    assert reached[2][1] < 120, "the third run ended before it was killed"
    again, _ = fit_denoiser(latents(), KILLED, device=CPU, seed=5, scratch=tmp_path / "scratch")
    checkpoint.save(tmp_path / "killed.safetensors", again.state_dict())
    assert (tmp_path / "killed.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(()))


def plan(**values) -> Plan:
    base = {"what": "line", "seed": 1, "rows": np.arange(64), "batch_size": 16, "max_epochs": 50, "max_steps": 1000}
    return Plan(**{**base, "learning_rate": 0.05, "weight_decay": 0.0, **values})


def fit(*training, **more) -> Fitted:
    return fit_all([Training(*training, **more)], device=CPU)[0]


def test_best_weights_and_early_stopping() -> None:
    """The held-out loss is smallest at slope 0.3, on the way to the training optimum at 1."""
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))

    def loss(network, rows, stream, share):
        return (network.slope * x[rows] - x[rows]).square().mean()

    fitted = fit(Line(), loss, plan(patience=4), validate=lambda network: abs(float(network.slope) - 0.3))
    assert abs(float(fitted.weights["slope"]) - 0.3) < 0.15
    assert fitted.steps < 200
    assert fitted.history[-1]["epoch"] - fitted.best_epoch == 4
    whole = fit(Line(), loss, plan())
    assert float(whole.weights["slope"]) == pytest.approx(1.0, abs=0.01)
    assert whole.steps == 200


def test_every_row_once_an_epoch_in_another_order() -> None:
    seen: list[torch.Tensor] = []

    def loss(network, rows, stream, share):
        seen.append(rows)
        return network.slope.square()

    fit(Line(), loss, plan(max_epochs=2))
    first, second = torch.cat(seen[:4]), torch.cat(seen[4:])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(64))
    assert first.tolist() != second.tolist()


def test_divergence_is_an_error() -> None:
    with pytest.raises(UserError, match="training of model 3 diverged"):
        fit(Line(), lambda network, rows, stream, share: network.slope * float("nan"), plan(), name="model 3")


def test_averaged_weights_follow_the_decay() -> None:
    """With a constant gradient direction the average lags behind the weights, and is what is returned."""

    def loss(network, rows, stream, share):
        return -network.slope

    last = fit(Line(), loss, plan(max_epochs=10)).weights["slope"]
    averaged = fit(Line(), loss, plan(max_epochs=10, ema=0.9)).weights["slope"]
    assert 0 < float(averaged) < float(last)


def test_learning_rate_warms_up_and_ends_near_zero() -> None:
    rates = [learning_rate(step, 1000, 1.0) for step in range(1000)]
    assert rates[0] < 0.05
    assert max(rates) == pytest.approx(1.0)
    assert int(np.argmax(rates)) == 49
    assert rates[-1] < 1e-4


@pytest.mark.parametrize(
    ("asked", "cells", "batch"),
    [
        (512, 10_000, 512),
        (512, 3072, 512),
        (512, 3071, 256),
        (512, 1535, 128),
        (512, 200, 128),
        (512, 100, 100),
        (64, 70, 64),
        (128, 200, 128),
        (300, 900, 150),
    ],
)
def test_few_cells_have_smaller_batches(asked: int, cells: int, batch: int) -> None:
    made = plan(batch_size=asked, rows=np.arange(cells))
    assert made.batch == batch
    assert made.steps_per_epoch == max(1, cells // batch)


def test_split_rows() -> None:
    train, held = split_rows(100, 0.1, 3)
    assert len(held) == 10
    assert sorted([*train, *held]) == list(range(100))
    assert len(split_rows(100, 0.0, 3)[1]) == 0


def test_saved_bytes_are_those_of_the_content(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(3.0), "a": torch.ones(2, 2)}
    checkpoint.save(tmp_path / "1.safetensors", tensors, {"z": 1, "a": [1.5]})
    checkpoint.save(tmp_path / "2.safetensors", dict(reversed(tensors.items())), {"a": [1.5], "z": 1})
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()
    stored, state = checkpoint.load(tmp_path / "1.safetensors")
    assert same(stored, tensors)
    assert state == {"z": 1, "a": [1.5]}
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load(tmp_path / "absent.safetensors")
