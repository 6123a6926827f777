from __future__ import annotations

import numpy as np
import pytest
import torch

from dbdiffusion.config.generator import DiffusionConfig, GenerationConfig
from dbdiffusion.generative import diffusion
from dbdiffusion.generative.denoiser import Denoiser
from dbdiffusion.generative.diffusion import DiffusionLoss, Objective, epsilon_of, fit_denoiser, sampling_schedule
from dbdiffusion.generative.latents import Latents
from dbdiffusion.generative.networks import seeded
from dbdiffusion.generative.samplers import SAMPLERS
from dbdiffusion.generative.schedule import noise_schedule

CPU = torch.device("cpu")
STRENGTHS = torch.tensor([0.5, 0.0, 1.5])


def network(null_token: str = "learned") -> Denoiser:
    made = seeded(lambda: Denoiser(6, 4, [32, 16, 8], null_token), 0)
    torch.nn.init.normal_(made.out.weight, generator=torch.Generator().manual_seed(1))
    return made.eval()


def test_table_of_labels_is_the_same_as_a_label_per_cell() -> None:
    made, stream = network(), torch.Generator().manual_seed(0)
    y, t = torch.randn(20, 6, generator=stream), torch.randint(0, 1000, (20,), generator=stream)
    table, index = made.embed(torch.randn(5, 4, generator=stream)), torch.randint(0, 5, (20,), generator=stream)
    torch.testing.assert_close(made(y, t, table, index), made(y, t, table[index]))


def test_perturbations_at_once_are_the_same_as_one_by_one() -> None:
    made, stream = network(), torch.Generator().manual_seed(0)
    y, conditions = torch.randn(3, 10, 6, generator=stream), torch.randn(3, 4, generator=stream)
    objective = Objective.make(DiffusionConfig(), CPU)
    together = epsilon_of(made, objective, conditions, STRENGTHS)(y, 300)
    for i in range(3):
        torch.testing.assert_close(
            epsilon_of(made, objective, conditions[i : i + 1], STRENGTHS[i : i + 1])(y[i : i + 1], 300)[0], together[i]
        )


def test_null_token_is_its_own_or_the_zero_condition() -> None:
    zero, learned = network("zero"), network("learned")
    torch.testing.assert_close(zero.null_label(), zero.embed(torch.zeros(1, 4)))
    assert not torch.allclose(learned.null_label(), learned.embed(torch.zeros(1, 4)))
    assert learned.null.requires_grad


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("loop", [True, False])
def test_noised_cells_by_their_formula(monkeypatch, prediction: str, loop: bool) -> None:
    monkeypatch.setattr(diffusion, "fused", lambda *tensors: loop)
    objective, stream = Objective.make(DiffusionConfig(prediction=prediction, min_snr_gamma=5.0), CPU), torch.Generator().manual_seed(0)
    mean, deviation = torch.randn(900, 3, generator=stream), torch.rand(900, 3, generator=stream)
    latents = Latents(mean, deviation, torch.randint(0, 7, (900,), generator=stream), torch.zeros(7, 2))
    rows = torch.randint(0, 900, (400,), generator=stream)
    made = objective.noised(latents, rows, stream.manual_seed(5), 0.25)
    # The draws, in their order.
    noise, order = torch.randn((2, 400, 3), generator=stream.manual_seed(5)), torch.randperm(400, generator=stream)
    within, dropped = torch.rand((2, 400), generator=stream)
    assert torch.equal(made.t, ((order + within) * 2.5).long().clamp_max(999))
    assert torch.equal(made.label, torch.where(dropped < 0.25, 7, latents.label[rows]))
    assert 60 < int((made.label == 7).sum()) < 140
    assert torch.equal(made.weight, objective.weights[made.t])
    x, level = mean[rows] + deviation[rows] * noise[0], objective.alpha_bar[made.t][:, None]
    torch.testing.assert_close(made.y, level**0.5 * x + (1 - level) ** 0.5 * noise[1])
    for i, at in enumerate(made.t.tolist()):
        if at >= 5:  # Before, x0 tells next to nothing of the noise.
            torch.testing.assert_close(objective.epsilon(made.target[i], made.y[i], at), noise[1, i], rtol=1e-2, atol=3e-3)


@pytest.mark.parametrize("loop", [True, False])
def test_timesteps_are_one_in_each_stratum(monkeypatch, loop: bool) -> None:
    """Also where the batch is no part of the timesteps; without dropout no label is dropped."""
    monkeypatch.setattr(diffusion, "fused", lambda *tensors: loop)
    objective = Objective.make(DiffusionConfig(timesteps=70), CPU)
    for n in (1, 37, 70, 200):
        latents = Latents(torch.zeros(n, 2), torch.ones(n, 2), torch.arange(n) % 3, torch.zeros(3, 2))
        made = objective.noised(latents, torch.arange(n), torch.Generator().manual_seed(n), 0.0)
        assert torch.equal(made.label, latents.label)
        t = made.t.sort().values
        low = torch.arange(n) * 70 / n
        assert ((t >= low.floor()) & (t <= (low + 70 / n).ceil()) & (t < 70)).all()


@pytest.mark.parametrize("loop", [True, False])
def test_a_stratum_that_rounds_up_is_the_last_timestep(monkeypatch, loop: bool) -> None:
    """255 and the largest number below 1 are 256 in single precision."""
    monkeypatch.setattr(diffusion, "fused", lambda *tensors: loop)
    monkeypatch.setattr(torch, "rand", lambda size, **_: torch.full(size, 1 - 2.0**-24))
    objective = Objective.make(DiffusionConfig(), CPU)
    latents = Latents(torch.zeros(256, 2), torch.ones(256, 2), torch.zeros(256, dtype=torch.long), torch.zeros(3, 2))
    made = objective.noised(latents, torch.arange(256), torch.Generator().manual_seed(0), 0.0)
    assert int(made.t.max()) == 999
    assert torch.isfinite(made.y).all()


def test_min_snr_weights_are_one_weight_on_the_x0_loss() -> None:
    """The same error in x0, seen through any prediction, weighs min(SNR, gamma)."""
    t, gap, weighted = torch.tensor([1, 50, 300, 900]), 0.1, {}
    for prediction in ("epsilon", "v", "x0"):
        objective = Objective.make(DiffusionConfig(prediction=prediction, min_snr_gamma=5.0), CPU)
        level = torch.from_numpy(noise_schedule("linear", 1000).alpha_bar)[t]
        # An error d in x0 is sqrt(abar / (1 - abar)) d in epsilon and d / sqrt(1 - abar) in v.
        factor = {"epsilon": level / (1 - level), "v": 1 / (1 - level), "x0": torch.ones(4)}[prediction].double()
        weighted[prediction] = objective.weights[t] * factor * gap**2
    snr = level / (1 - level)
    for value in weighted.values():
        torch.testing.assert_close(value, snr.clamp_max(5.0) * gap**2, rtol=1e-4, atol=1e-6)


def test_loss_drops_labels_at_the_stated_rate_and_weighs_by_timestep() -> None:
    latents = Latents(torch.zeros(4000, 6), torch.ones(4000, 6), torch.zeros(4000, dtype=torch.long), torch.zeros(1, 4))
    seen = []

    class Spy(Denoiser):
        def misfit(self, y, t, conditions, index, target, weight):
            seen.append((index == 1).double().mean())
            assert set(t.tolist()) <= set(range(1000))
            assert torch.equal(weight, objective.weights[t])
            return super().misfit(y, t, conditions, index, target, weight)

    made = seeded(lambda: Spy(6, 4, [8]), 0)
    for share, gamma in ((0.0, None), (0.2, 5.0)):
        objective = Objective.make(DiffusionConfig(min_snr_gamma=gamma), CPU)
        assert (objective.weights == 1).all() == (gamma is None)
        DiffusionLoss(latents, objective, share)(made, torch.arange(4000), torch.Generator().manual_seed(0))
    assert seen[0] == 0
    assert float(seen[1]) == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize("conditions", [10, 300])
def test_conditions_of_a_batch_are_made_uncertain(conditions: int) -> None:
    """Also where there are more of them than cells in a batch: then the ones taken."""
    stream = torch.Generator().manual_seed(1)
    label = torch.randint(0, conditions, (500,), generator=stream)
    latents = Latents(torch.zeros(500, 6), torch.ones(500, 6), label, torch.randn(conditions, 4, generator=stream))
    calls, given = [], []

    class Spy(Denoiser):
        def misfit(self, y, t, conditions, index, target, weight):
            given.append((conditions, index))
            return super().misfit(y, t, conditions, index, target, weight)

    def doubt(table, rows, stream):
        calls.append(rows)
        return -table[rows]

    made, rows, objective = seeded(lambda: Spy(6, 4, [8]), 0), torch.arange(40), Objective.make(DiffusionConfig(), CPU)
    for some in (None, doubt):
        DiffusionLoss(latents, objective, 0.0, some)(made, rows, torch.Generator().manual_seed(0))
    assert len(calls) == 1
    for sign, (seen, index) in zip((1, -1), given, strict=True):
        assert len(seen) == min(conditions, 40)
        assert torch.equal(seen[index], sign * latents.conditions[label[rows]])


@pytest.mark.parametrize("label", [-1, 1])
def test_labels_without_condition_are_refused(label: int) -> None:
    latents = Latents(torch.zeros(30, 6), torch.ones(30, 6), torch.full((30,), label), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="label"):
        fit_denoiser(latents, DiffusionConfig(max_steps=1), device=CPU, seed=0)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_two_conditions_are_learned_and_generated(prediction: str) -> None:
    """Means and spreads of two conditions in two dimensions."""
    stream = torch.Generator().manual_seed(0)
    label = torch.arange(1000) % 2
    centre = torch.tensor([[1.0, 0.0], [-1.0, 0.5]])
    mean = centre[label] + 0.5 * torch.randn(1000, 2, generator=stream)
    latents = Latents(mean, torch.zeros(1000, 2), label, torch.tensor([[1.0], [-1.0]]))
    config = DiffusionConfig(
        prediction=prediction, widths=[48, 48], max_steps=400, batch_size=128, learning_rate=6e-3, ema=0.97, patience=0
    )
    made, fitted = fit_denoiser(latents, config, device=CPU, seed=1)
    assert fitted.history[-1]["validation"] < fitted.history[0]["validation"]
    start = torch.randn(800, 2, generator=stream).expand(2, 800, 2)

    def draw(number: int) -> torch.Tensor:
        return torch.randn(800, 2, generator=torch.Generator().manual_seed(number))

    with torch.no_grad():
        epsilon = epsilon_of(made, Objective.make(config, CPU), latents.conditions, torch.zeros(2))
        got = SAMPLERS["accelerated"](epsilon, sampling_schedule(config, "accelerated", 50), start, draw)
    for k in range(2):
        real = mean[label == k]
        assert np.abs((got[k].mean(0) - real.mean(0)).numpy()).max() < 0.15
        assert np.abs((got[k].std(0) / real.std(0)).numpy() - 1).max() < 0.25


def test_every_sampler_has_a_spacing() -> None:
    for name in SAMPLERS:
        schedule = sampling_schedule(DiffusionConfig(), name, GenerationConfig().steps)
        assert schedule.timesteps[0] == 0
        assert schedule.timesteps[-1] == 999
