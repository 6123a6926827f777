"""Small simulated screens and the files of a fold made from them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from dbdiffusion.data.sets import CONTROL, EffectSet, LocationSet, MeanSet
from dbdiffusion.inference import debias, stack
from dbdiffusion.inference.simulate import Simulated, simulate
from dbdiffusion.runtime.seeds import rng


def screen_of(seed: int = 1, **changes) -> Simulated:
    """A screen of 40 training perturbations, 8 targets and 60 genes unless told otherwise."""
    sizes = {"difficulty": "informative", "perturbations": 40, "generator": "informative", "targets": 8, "genes": 60}
    return simulate(rng(seed, "test"), **(sizes | changes))


def write_fold(folder: Path, screen: Simulated) -> SimpleNamespace:
    """effects, locations and means of a screen as files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = SimpleNamespace(effects=folder / "effects.parquet", locations=folder / "locations.parquet", means={}, de=folder / "de.parquet")
    screen.effects.write(paths.effects)
    LocationSet.write({"all": screen.locations}, paths.locations)
    for name, means in screen.means.items():
        paths.means[name] = folder / f"{name}.parquet"
        means.write(paths.means[name])
    return paths


GENES = pd.Index(["a", "b", "c", "d", "e"])


def effect_set(p=6, seed=0, n_cells=None):
    random = np.random.default_rng(seed)
    effect = random.normal(size=(p, 5))
    control = np.arange(5.0)
    cells = np.full(p, 50) if n_cells is None else np.array(n_cells)
    variance = random.uniform(0.5, 1.5, (p, 5))
    names = pd.Index([f"k{i}" for i in range(p)])
    return EffectSet(names, GENES, control + effect, effect, np.sqrt(variance / cells[:, None]), variance, cells, control, np.ones(5), 500)


def location_set(effects, weights, names, kind="single", role="target"):
    weights = np.asarray(weights, dtype=float)
    info = pd.DataFrame(
        {"role": role, "k_eff": 1 / np.maximum((weights**2).sum(1), 1e-9), "confidence": 0.5, "kind": kind}, index=pd.Index(names)
    )
    info = info.assign(parts_measured=0, status="located", reason="", locator="test")
    if weights.shape[1] == len(effects.perturbations):
        weights = np.hstack([weights, np.zeros((len(weights), 1))])
    return LocationSet(pd.Index(names), effects.perturbations.append(pd.Index([CONTROL])), weights, info)


def means_of(effects, effect_of: dict, role_of=None, mc=0.0):
    names = pd.Index(list(effect_of))
    roles = np.array([(role_of or {}).get(n, "target" if n.startswith("t") else "pseudo") for n in names])
    mean = effects.control_mean + np.array([effect_of[n] for n in names])
    return MeanSet(names, roles, GENES, mean, np.full(mean.shape, mc))


def fixed_model(variates, lam, n_genes=5):
    ones, flat = np.ones(n_genes), np.ones((1, n_genes))
    weights = stack.Weights(np.tile(lam, (n_genes, 1)), np.tile(lam, (1, n_genes, 1)), np.inf)
    return debias.Model(tuple(variates), weights, ones, flat, 1.0, 4.0, 20.0, ones, flat, 0.1 * ones, True)


@pytest.fixture(scope="session")
def toy() -> SimpleNamespace:
    """Makers of hand-sized inputs: 6 perturbations and 5 genes."""
    return SimpleNamespace(effect_set=effect_set, location_set=location_set, means_of=means_of, fixed_model=fixed_model)


@pytest.fixture(scope="session")
def screen() -> Simulated:
    return screen_of()


@pytest.fixture(scope="session")
def make_screen():
    return screen_of


@pytest.fixture(scope="session")
def make_fold():
    return write_fold
