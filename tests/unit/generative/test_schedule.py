from __future__ import annotations

import numpy as np
import pytest

from dbdiffusion.generative.schedule import LEAST_SIGNAL, noise_schedule


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("timesteps", [50, 1000])
def test_levels_fall_from_signal_to_noise(kind: str, timesteps: int) -> None:
    schedule = noise_schedule(kind, timesteps)
    assert len(schedule) == timesteps
    assert (np.diff(schedule.alpha_bar) < 0).all()
    assert schedule.alpha_bar[0] > 0.99
    assert 0 < schedule.alpha_bar[-1] < 1e-3


def test_linear_schedule_is_the_published_one() -> None:
    level, product = noise_schedule("linear", 1000).alpha_bar, 1.0
    for t in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
        assert level[t] == pytest.approx(product, rel=1e-9)


@pytest.mark.parametrize("steps", [2, 7, 50, 1000, 5000])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_respaced_keeps_the_ends_and_the_product(steps: int, power: float) -> None:
    whole = noise_schedule("linear", 1000)
    some = whole.respaced(steps, power)
    assert len(some) <= min(steps, 1000)
    assert some.timesteps[0] == 0
    assert some.timesteps[-1] == 999
    assert np.prod(some.alpha) == pytest.approx(whole.alpha_bar[-1])
    assert (some.alpha_bar == whole.alpha_bar[some.timesteps]).all()


def test_respaced_cosine_leaves_out_levels_without_signal() -> None:
    some = noise_schedule("cosine", 1000).respaced(50)
    assert len(some) == 50
    assert some.alpha_bar[-1] >= LEAST_SIGNAL
