"""Networks that take their steps together end as each of them alone."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pretended_gpu import Graph, pretended_gpu
from test_training import StopTraining, doubt, stop_at
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dbdiffusion.config.generator import DiffusionConfig, VaeConfig
from dbdiffusion.generative.cells import Cells
from dbdiffusion.generative.diffusion import DiffusionLoss, denoiser_training
from dbdiffusion.generative.fitting import Fitted, each_or_all, fit_all
from dbdiffusion.generative.latents import Latents
from dbdiffusion.generative.side_by_side import SideBySide, alike
from dbdiffusion.generative.training import Trainer, Training
from dbdiffusion.generative.vae import vae_training

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture
def together(monkeypatch) -> list[list[int]]:
    """The step that each network is at, at every step of several."""
    found: list[list[int]] = []
    advance = SideBySide.advance

    def noted(self: SideBySide) -> None:
        advance(self)
        found.append([trainer.state.step for trainer in self.trainers])

    monkeypatch.setattr(SideBySide, "advance", noted)
    return found


def some_latents(n: int, conditions: int, seed: int) -> Latents:
    stream = torch.Generator().manual_seed(seed)
    label = torch.arange(n) % conditions
    table = torch.randn(conditions, 3, generator=stream)
    return Latents(torch.randn(n, 4, generator=stream) + table[label].repeat(1, 2)[:, :4], torch.full((n, 4), 0.3), label, table)


def vaes(toy_cells: Sequence[Cells], device: torch.device = CPU, scratch: Path | None = None, on_step=None, **config) -> list[Training]:
    of_all = {"hidden": [16], "latent": 3, "batch_size": 64, "max_epochs": 4, "precision": "fp32", **config}
    options = {"device": device, "scratch": scratch, "on_step": on_step}
    return [vae_training(cells, VaeConfig(**of_all), seed=seed, **options) for seed, cells in enumerate(toy_cells)]


def denoisers(
    conditions: Sequence[int] = (3, 3, 3), device: torch.device = CPU, scratch: Path | None = None, on_step=None, uncertain=False, **config
) -> list[Training]:
    """Of 300, 400, ... cells."""
    of_all = {"widths": [16, 8], "batch_size": 64, "max_epochs": 4, "precision": "fp32", **config}
    options = {"device": device, "scratch": scratch, "on_step": on_step, "filled": max(min(u, 64) for u in conditions)}
    made = []
    for seed, u in enumerate(conditions):
        latents = some_latents(300 + 100 * seed, u, seed)
        given = [value.to(device) for value in (latents.mean, latents.deviation, latents.label, latents.conditions)]
        made.append(
            denoiser_training(Latents(*given), DiffusionConfig(**of_all), seed=seed, doubt=doubt() if uncertain else None, **options)
        )
    return made


def assert_close(ours: Sequence[Fitted], others: Sequence[Fitted], tolerance: float) -> None:
    for one, other in zip(ours, others, strict=True):
        assert one.steps == other.steps and one.best_epoch == other.best_epoch
        for row, same in zip(one.history, other.history, strict=True):
            assert row == pytest.approx(same, rel=tolerance, abs=tolerance / 10)
        assert one.weights.keys() == other.weights.keys()
        for name, value in one.weights.items():
            torch.testing.assert_close(value, other.weights[name], rtol=tolerance, atol=tolerance)


def apart(trainings: Sequence[Training], device: torch.device = CPU) -> list[Fitted]:
    return [fit_all([training], device=device)[0] for training in trainings]


@pytest.fixture(scope="module")
def three(toy_of: Callable[[int], Cells]) -> list[Cells]:
    """Of 300, 240 and 260 cells: not as many steps."""
    whole = toy_of(2)
    return [part(whole, n) for n in (300, 240, 260)]


def part(cells: Cells, n: int) -> Cells:
    rows = slice(0, n)
    of_cells = {name: getattr(cells, name)[rows] for name in ("expression", "counts", "log_library", "batch", "perturbation")}
    return replace(cells, **of_cells)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"likelihood": "gaussian", "kl_warmup_share": 0.8, "free_bits": 0.1},
        {"kind": "autoencoder", "norm": "none", "activation": "prelu"},
    ],
)
def test_autoencoders(three: list[Cells], together: list[list[int]], config: dict) -> None:
    alone = apart(vaes(three, **config))
    assert not together
    found = fit_all(vaes(three, **config), device=CPU)
    assert [fitted.steps for fitted in found] == [16, 12, 12]
    # Four more steps of the largest, on its own.
    assert together == [[step] * 3 for step in range(1, 13)]
    assert_close(found, alone, 2e-4)


@pytest.mark.parametrize(
    ("conditions", "config"),
    [
        ((3, 3, 3), {}),
        ((5, 3, 4), {"null_token": "zero", "ema": 0.0, "prediction": "epsilon", "min_snr_gamma": 5.0}),
        ((3, 3, 3), {"uncertain": True}),
        ((70, 100, 50), {}),
    ],
)
def test_denoisers(together: list[list[int]], conditions: tuple[int, ...], config: dict) -> None:
    """Of as many conditions and not, some more than cells in a batch."""
    alone = apart(denoisers(conditions, **config))
    found = fit_all(denoisers(conditions, **config), device=CPU)
    assert together[-1] == [20, 20] and len(together[0]) == 3
    assert_close(found, alone, 2e-4)


def test_one_that_stops_early_leaves_the_others(together: list[list[int]]) -> None:
    def make() -> list[Training]:
        made = denoisers(patience=2)
        worse = iter([1.0, 2.0, 3.0])
        return [made[0], replace(made[1], validate=lambda network: next(worse)), made[2]]

    found = fit_all(make(), device=CPU)
    assert make()[1].plan.total_steps == 20
    assert [fitted.steps for fitted in found] == [16, 15, 28]
    assert [len(step) for step in together] == [3] * 15 + [2]
    assert_close(found, apart(make()), 2e-4)


def test_each_gets_its_own_result() -> None:
    """Whoever went beside whom."""

    def make() -> list[Training]:
        wide, plain = denoisers(widths=[24, 8]), denoisers()
        return [wide[0], plain[0], wide[1], plain[1]]

    assert alike(make()) == [[0, 2], [1, 3]]
    assert_close(fit_all(make(), device=CPU), apart(make()), 2e-4)


def test_clocks(monkeypatch, tmp_path: Path) -> None:
    """All together take the time there was; states are written after the time that the plan says, and at the end."""
    now, saves = [0.0], []
    monkeypatch.setattr("dbdiffusion.generative.fitting.time.monotonic", lambda: now[0])
    save = Trainer.save
    monkeypatch.setattr(Trainer, "save", lambda self: (save(self), saves.append(self.state.step)))

    def tick(step: int) -> None:
        now[0] += 1.0

    fitted = fit_all(denoisers((3, 3), scratch=tmp_path, on_step=tick, checkpoint_seconds=10.0), device=CPU)
    assert [one.steps for one in fitted] == [16, 20]
    # A second for each step of each; what comes after the last one does not count.
    assert sum(one.seconds for one in fitted) == pytest.approx(16 * 2 + 4, abs=2)
    # Ten seconds are five steps of two, and ten of one.
    assert saves == [6, 6, 11, 11, 16, 16, 20]


def test_saved_at_the_end(tmp_path: Path) -> None:
    whole = fit_all(denoisers(scratch=tmp_path), device=CPU)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    steps: list[int] = []
    assert_close(fit_all(denoisers(scratch=tmp_path, on_step=steps.append), device=CPU), whole, 0.0)
    assert not steps


def test_killed_and_resumed(tmp_path: Path, together: list[list[int]]) -> None:
    """Killed between the saving of one and of the next: they go on from different steps."""
    config = {"checkpoint_seconds": 1e-9}
    whole = fit_all(denoisers(**config), device=CPU)
    for stop in (7, 14):
        trainings = denoisers(**config, scratch=tmp_path)
        trainings[1] = replace(trainings[1], on_step=stop_at(stop))
        with pytest.raises(StopTraining):
            fit_all(trainings, device=CPU)
    together.clear()
    found = fit_all(denoisers(**config, scratch=tmp_path), device=CPU)
    assert together[0] == [15, 15, 13]
    assert_close(found, whole, 2e-4)
    # Ended ones have nothing to do any more.
    steps: list[int] = []
    again = fit_all(denoisers(**config, scratch=tmp_path, on_step=steps.append), device=CPU)
    assert not steps
    assert_close(again, found, 0.0)


class Products(TorchDispatchMode):
    """Types of what is multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.types: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name == "aten::bmm" and args[0].shape[1] > 1:
            self.types.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("precision", "kind"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_products_have_the_precision_of_the_plan(precision: str, kind: torch.dtype) -> None:
    made = denoisers(precision=precision)
    both = SideBySide([Trainer(one.network.train(), one.plan, CPU, None) for one in made], [one.loss for one in made])
    with Products() as seen:
        both.advance()
    assert seen.types == {kind}


def test_half_precision(three: list[Cells], together: list[list[int]]) -> None:
    for make in (lambda: vaes(three, precision="bf16"), lambda: denoisers(precision="bf16")):
        found, alone = fit_all(make(), device=CPU), apart(make())
        for one, other in zip(found, alone, strict=True):
            assert one.precision == "bf16"
            assert one.history[-1]["validation"] == pytest.approx(other.history[-1]["validation"], rel=0.02)
    assert together


def test_who_goes_beside_whom(three: list[Cells]) -> None:
    assert alike(denoisers()) == [[0, 1, 2]]
    wider = denoisers(widths=[24, 8])
    assert alike([wider[0], *denoisers(), wider[1]]) == [[0, 4], [1, 2, 3]]
    some = denoisers()
    for plan in ({"batch_size": 32}, {"autocast": torch.bfloat16}, {"weight_decay": 1.0}, {"cuda_graphs": True}):
        assert alike([replace(some[0], plan=replace(some[0].plan, **plan)), some[1]]) == [[0], [1]]
    # Conditions that were not filled up to the same number.
    unfilled = [replace(one, loss=replace(one.loss, filled=0)) for one in denoisers((4, 3, 4))]
    assert alike(unfilled) == [[0, 2], [1]]
    # Statistics of batches, losses that are not in parts.
    assert alike(vaes(three)) == [[0, 1, 2]]
    assert alike([*vaes(three[:1]), *vaes(three[1:2], kl_weight=0.5)]) == [[0], [1]]
    assert alike(vaes(three, norm="batch")) == [[0], [1], [2]]
    assert alike([replace(one, loss=lambda *given: None) for one in some]) == [[0], [1], [2]]


def test_all_at_once_on_a_gpu_that_holds_them(caplog) -> None:
    def calls(device: torch.device, most: int = 9, models: tuple[int, ...] = (1, 2)) -> list[list[int]]:
        found: list[list[int]] = []

        def learn(some: Sequence[int]) -> None:
            if len(some) > most:
                raise torch.cuda.OutOfMemoryError
            found.append(list(some))

        each_or_all(models, device, learn)
        return found

    assert calls(GPU) == [[1, 2]]
    assert calls(CPU) == [[1], [2]]
    assert not caplog.records
    assert calls(GPU, 1) == [[1], [2]]
    assert "one after another" in caplog.text
    with pytest.raises(torch.cuda.OutOfMemoryError):
        calls(GPU, 0, (1,))


def test_filled_conditions_change_nothing() -> None:
    """Neither what rows are told nor what the network makes of it."""
    for u, uncertain in ((3, False), (3, True), (70, False)):
        (training,) = denoisers((u,), uncertain=uncertain)
        rows = torch.arange(64)
        nn.init.normal_(training.network.out.weight)  # It is 0 at first, whatever the labels are.
        values = []
        for filled in (0, 90):
            loss: DiffusionLoss = replace(training.loss, filled=filled)
            inputs = loss.inputs(rows, torch.Generator().manual_seed(0), 0.0)
            assert len(inputs[2]) == (filled or min(u, 64))
            values.append(loss.value(training.network, *inputs))
        torch.testing.assert_close(*values)


def test_gradients_are_clipped_for_each() -> None:
    """One whose loss is a thousand times as large does not slow the other down."""

    def make() -> list[Training]:
        plain, large, _ = denoisers()
        objective = replace(large.loss.objective, weights=1000 * large.loss.objective.weights)
        return [plain, replace(large, loss=replace(large.loss, objective=objective))]

    assert alike(make()) == [[0, 1]]
    assert_close(fit_all(make(), device=CPU), apart(make()), 2e-4)


@pytest.mark.parametrize("graphs", [False, True])
def test_on_a_gpu(monkeypatch, three: list[Cells], together: list[list[int]], graphs: bool) -> None:
    replayed = []
    replay = Graph.replay
    monkeypatch.setattr(Graph, "replay", lambda self: (replayed.append(self), replay(self)))
    for make in (lambda device, **config: vaes(three, device, **config), lambda device, **config: denoisers((5, 3, 4), device, **config)):
        alone = apart(make(CPU))
        replayed.clear()
        with pretended_gpu():
            found = fit_all(make(GPU, cuda_graphs=graphs), device=GPU)
        assert_close(found, alone, 2e-4)
        assert [fitted.recorded for fitted in found] == [graphs] * 3
        assert bool(replayed) == graphs
    assert together


def test_recorded_even_if_the_last_steps_are_not() -> None:
    with pretended_gpu():
        made = denoisers(device=GPU, cuda_graphs=True)
        made = [replace(one, plan=replace(one.plan, max_steps=steps)) for one, steps in zip(made, (14, 16, 16), strict=True)]
        assert all(fitted.recorded for fitted in fit_all(made, device=GPU))


def test_nothing_is_kept_after_trainings(monkeypatch) -> None:
    known: list[weakref.ref] = []
    advance = SideBySide.advance
    monkeypatch.setattr(SideBySide, "advance", lambda self: (known.append(weakref.ref(self)), advance(self)))
    gc.disable()
    try:
        with pretended_gpu():
            fit_all(denoisers(device=GPU, cuda_graphs=True), device=GPU)
        assert known and not any(one() for one in known)
    finally:
        gc.enable()


def test_constants_are_each_network_s_own(three: list[Cells]) -> None:
    """Such as input scales."""
    scaled = [replace(cells, expression=cells.expression * factor) for cells, factor in zip(three, (1.0, 3.0, 0.3), strict=True)]
    assert_close(fit_all(vaes(scaled, likelihood="gaussian"), device=CPU), apart(vaes(scaled, likelihood="gaussian")), 2e-4)
