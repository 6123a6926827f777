"""Conditions of the denoiser: what they are read from, and how they are made uncertain."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from dbdiffusion.config.generator import DiffusionConfig
from dbdiffusion.data.sets import CONTROL
from dbdiffusion.generative import conditions
from dbdiffusion.generative.conditions import CERTAIN, FEATURE_NOISE, Conditions, taken
from dbdiffusion.runtime import contracts
from dbdiffusion.runtime.errors import UserError

CPU = torch.device("cpu")


def config(condition: str, uncertain: bool = False) -> DiffusionConfig:
    return DiffusionConfig(condition=condition, uncertain_conditions=uncertain)


def test_conditions_are_the_parts_asked_for_in_a_fixed_order(screen, tmp_path) -> None:
    path = screen.embedding("0", "0")
    effects, features, both = (Conditions.read(path, config(name)) for name in ("embedding", "features", "both"))
    assert (effects.values.shape[1], features.values.shape[1]) == (5, 3)
    assert (effects.placed, features.placed, both.placed) == (5, 0, 5)
    np.testing.assert_array_equal(both.values, np.hstack([effects.values, features.values]))
    assert both.roles.tolist() == effects.roles.tolist()
    for sharp in (effects, features, both):
        assert sharp.doubt(CPU) is None
    # Certainty comes last, whatever the name of the part sorts to.
    graded = Conditions.read(path, config("both", True))
    np.testing.assert_array_equal(graded.values[:, :-1], both.values)
    own = np.isin(graded.roles, ("train", "control"))
    assert (graded.values[:, -1] == np.where(own, 1.0, 0.25)).all()
    assert graded.select(("train",)).graded
    assert graded.take([CONTROL]).graded
    frame = contracts.EMBEDDING.read(path)
    shuffled = frame.sample(frac=1, random_state=1)
    contracts.EMBEDDING.write(shuffled, tmp_path / "shuffled.parquet")
    np.testing.assert_array_equal(Conditions.read(tmp_path / "shuffled.parquet", config("both", True)).values, graded.values)
    # A dataset without feature sources has the control's coordinate alone.
    bare = frame[(frame["part"] != "features") | (frame["dimension"] == 0)]
    contracts.EMBEDDING.write(pd.DataFrame(bare), tmp_path / "bare.parquet")
    assert Conditions.read(tmp_path / "bare.parquet", config("both")).values.shape[1] == 6
    for uncertain in (False, True):
        with pytest.raises(UserError, match="no gene features"):
            Conditions.read(tmp_path / "bare.parquet", config("features", uncertain))


def graded(perturbations: int, placed: int, features: int) -> Conditions:
    """Places that differ along their coordinates in level and spread, beside a control far off."""
    random = np.random.default_rng(0)
    places = random.normal(size=(perturbations, placed)) * np.linspace(2, 0.5, placed) + np.linspace(-1, 1, placed)
    values = np.column_stack([places, random.normal(size=(perturbations, features)), np.ones(perturbations)])
    control = np.concatenate([np.full(placed, 30.0), np.full(features, 7.0), [1.0]])
    names = pd.Index([CONTROL, *(f"G{i:04d}" for i in range(perturbations))])
    return Conditions(names, np.array(["control"] + ["train"] * perturbations), np.vstack([control, values]), placed, True)


def test_uncertain_places_are_unbiased_guesses_of_the_stated_certainty() -> None:
    known = graded(4000, 3, 2)
    table = torch.from_numpy(known.values).float()
    doubt, stream, rows = known.doubt(CPU), torch.Generator().manual_seed(0), torch.arange(len(table))
    made = torch.cat([doubt(table, rows, stream)[1:] for _ in range(40)]).double()
    own = table[1:].double().repeat(40, 1)
    sharp = made[:, -1] == 1
    assert float(sharp.double().mean()) == pytest.approx(CERTAIN, abs=0.01)
    # Certain ones are as they are.
    assert torch.equal(made[sharp], own[sharp])
    unsure, truth = made[~sharp], own[~sharp]
    certainty = unsure[:, -1]
    assert float(certainty.mean()) == pytest.approx(0.5, abs=0.01)
    mean, spread = own[:, :3].mean(0), own[:, :3].std(0)
    for low in (0.0, 0.3, 0.6, 0.9):
        part = (certainty >= low) & (certainty < low + 0.1)
        guess, place = (x[part, :3] - mean for x in (unsure, truth))
        # The regression of the place on the guess is the guess, and it tells a share of the variance that is the certainty.
        slope = (guess * place).sum(0) / guess.square().sum(0)
        told = guess.square().mean(0) / spread**2
        torch.testing.assert_close(slope, torch.ones(3).double(), rtol=0, atol=0.1 if low else 0.5)
        torch.testing.assert_close(told, torch.full((3,), low + 0.05).double(), rtol=0, atol=0.05)
    # Coordinates have noise of their own.
    amount = (certainty * (1 - certainty)).sqrt().clamp_min(1e-3)
    rest = (unsure[:, :3] - mean - certainty[:, None] * (truth[:, :3] - mean)) / amount[:, None]
    noise = unsure[:, 3:-1] - truth[:, 3:-1]
    torch.testing.assert_close(torch.corrcoef(torch.cat([rest, noise], 1).T), torch.eye(5).double(), rtol=0, atol=0.03)
    torch.testing.assert_close(noise.std(0), torch.full((2,), FEATURE_NOISE).double(), rtol=0.03, atol=0)
    assert noise.mean(0).abs().max() < 0.02


@pytest.mark.parametrize(("placed", "features"), [(3, 2), (0, 2), (3, 0)])
def test_the_loop_is_what_torch_does(monkeypatch, placed: int, features: int) -> None:
    known = graded(60, placed, features)
    table, doubt, rows, made = torch.from_numpy(known.values).float(), known.doubt(CPU), torch.tensor([4, 0, 9, 9, *range(20, 61)]), []
    for loop in (True, False):
        monkeypatch.setattr(conditions, "fused", lambda *tensors, loop=loop: loop)
        made.append(doubt(table, rows, torch.Generator().manual_seed(3)))
    torch.testing.assert_close(made[0], made[1])
    unsure = made[0][:, -1] < 1
    assert 5 < int(unsure.sum()) < 40
    assert not unsure[1]


def test_uncertainty_is_of_the_stream_alone_and_leaves_what_marks_the_control() -> None:
    known = graded(50, 3, 2)
    values = np.insert(known.values, 5, known.names == CONTROL, axis=1)
    known = Conditions(known.names, known.roles, values, 3, True)
    table, doubt = torch.from_numpy(values).float(), known.doubt(CPU)
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made.append(doubt(table, torch.arange(51), torch.Generator().manual_seed(0)))
    assert torch.equal(*made)
    assert torch.equal(made[0][:, 5], table[:, 5])
    assert (made[0][:, :5] != table[:, :5]).any(1).any()


def test_an_embedding_without_certainty_is_refused(screen, tmp_path) -> None:
    frame = contracts.EMBEDDING.read(screen.embedding("0", "0"))
    contracts.EMBEDDING.write(frame[frame["part"] != "certainty"], tmp_path / "old.parquet")
    assert len(Conditions.read(tmp_path / "old.parquet", config("both")).names)
    with pytest.raises(UserError, match="no part certainty"):
        Conditions.read(tmp_path / "old.parquet", config("both", True))


def test_the_control_is_never_uncertain_and_no_part_of_the_spread() -> None:
    known = graded(50, 3, 2)
    table, doubt = torch.from_numpy(known.values).float(), known.doubt(CPU)
    assert doubt.mean.abs().max() < 3  # Far from the control.
    for seed in range(20):
        # Wherever it stands among those taken.
        made = doubt(table, torch.tensor([4, 0, 9]), torch.Generator().manual_seed(seed))
        torch.testing.assert_close(made[1], table[0])


def test_uncertainty_needs_perturbations() -> None:
    with pytest.raises(ValueError, match="no perturbation"):
        graded(5, 3, 2).take([CONTROL]).doubt(CPU)


@pytest.mark.parametrize("condition", ["embedding", "features"])
def test_either_part_alone_can_be_uncertain(screen, condition: str) -> None:
    known = Conditions.read(screen.embedding("0", "0"), config(condition, True)).select(("train", "control"))
    table = torch.from_numpy(known.values).float()
    made = known.doubt(CPU)(table, torch.arange(len(table)), torch.Generator().manual_seed(1))
    unsure = made[:, -1] < 1
    assert made.shape == table.shape
    assert unsure.any()
    assert (made[unsure] != table[unsure]).all()


@pytest.mark.parametrize("known", [5, 40, 41, 3000])
def test_a_batch_takes_its_own_conditions(known: int) -> None:
    label = torch.randint(0, known + 1, (40,), generator=torch.Generator().manual_seed(0))
    label[:2] = known  # The null label.
    which, at = taken(label, known)
    assert len(which) == min(known, 40)
    null = label == known
    assert (at[null] == len(which)).all()
    assert torch.equal(which[at[~null]], label[~null])
    assert len(taken(torch.full((40,), known), known)[0]) == min(known, 40)
