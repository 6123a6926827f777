"""Screens of simulated means with known truth, for the calibration study: no cells, no networks, any number of screens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from dbdiffusion.data.sets import CONTROL, EffectSet, LocationSet, MeanSet

DIFFICULTIES = {"informative": 1.0, "weak": 0.35, "wrong": 0.0}
"""How much of a perturbation's position in feature space is its programme; the rest is noise."""
EFFECT_SD, PROGRAMME_GENES, OWN_GENES = 0.25, 0.10, 0.01
"""Size of effects (natural log) and shares of genes in a programme and outside it."""
STRENGTH_SD, GENE_SD, INERT = 0.3, 0.25, 0.03
"""Spread (log scale) of a perturbation's strength and of single genes about their programme; share of members that do nothing."""
NEIGHBOURS = 15
CONTROL_CELLS = 2000


@dataclass(frozen=True)
class Simulated:
    """A screen: what inference may see (effects, locations, means), and of the targets (T, G) the true effects and two
    experiments (A, B) of the same size; shared: (T, G) the typical effects of their programmes, which is all that other
    perturbations can tell of them (0 outside); outside: (T,) targets with a programme of their own (so is one training
    perturbation in ten)."""

    effects: EffectSet
    locations: LocationSet
    means: dict[str, MeanSet]
    targets: pd.Index
    truth: np.ndarray
    shared: np.ndarray
    experiments: tuple[EffectSet, EffectSet]
    outside: np.ndarray


def _programmes(random: np.random.Generator, count: int, genes: int) -> np.ndarray:
    """Programmes x genes: sparse effects; the last quarter of the programmes has none."""
    effects = random.normal(0, EFFECT_SD, (count, genes)) * (random.random((count, genes)) < PROGRAMME_GENES)
    effects[count - max(1, count // 4) :] = 0
    return effects


def _true_effects(random: np.random.Generator, programmes: np.ndarray, member: np.ndarray) -> np.ndarray:
    """Effects of perturbations: their programme's with a strength of their own, gene by gene deviations and
    own genes."""
    n, genes = len(member), programmes.shape[1]
    strength = random.lognormal(0, STRENGTH_SD, n) * (random.random(n) > INERT)
    shared = programmes[member] * random.lognormal(0, GENE_SD, (n, genes))
    own = random.normal(0, EFFECT_SD, (n, genes)) * (random.random((n, genes)) < OWN_GENES)
    return strength[:, None] * (shared + own)


def _experiment(
    random: np.random.Generator, names: pd.Index, genes: pd.Index, truth: np.ndarray, n_cells: np.ndarray, sd: np.ndarray, base: np.ndarray
) -> EffectSet:
    """Observed effects of n_cells cells against a control sample of the experiment's own, which all of its perturbations share."""
    control_error = random.normal(0, sd / np.sqrt(CONTROL_CELLS))
    raw = truth + random.normal(size=truth.shape) * sd / np.sqrt(n_cells)[:, None]
    variance = sd**2 * random.chisquare(np.maximum(n_cells - 1, 1)[:, None], truth.shape) / np.maximum(n_cells - 1, 1)[:, None]
    effect = raw - control_error
    control_mean = base + control_error
    se = np.sqrt(variance / n_cells[:, None] + sd**2 / CONTROL_CELLS)
    return EffectSet(names, genes, control_mean + effect, effect, se, variance, n_cells, control_mean, sd**2, CONTROL_CELLS)


def _locate(random: np.random.Generator, member: np.ndarray, lost: np.ndarray, n_train: int, informed: float, count: int):
    """Weights (n, n_train) and confidence (n,) of every perturbation over the training ones, itself excluded, from features
    that hold the programme with weight `informed`; `lost` ones have noise alone."""
    n, width = len(member), 24
    centres = random.normal(size=(count, width))
    share = np.where(lost, 0.0, informed)[:, None]
    x = share * centres[member] * 1.2 + random.normal(size=(n, width))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    cosine = x @ x[:n_train].T
    cosine[np.arange(n_train), np.arange(n_train)] = -np.inf
    k = min(NEIGHBOURS, n_train - 1)
    cut = -np.sort(-cosine, axis=1)[:, k - 1 : k]
    raw = np.where(cosine >= cut, np.exp((cosine - cosine.max(1, keepdims=True)) / 0.1), 0.0)
    weights = raw / raw.sum(1, keepdims=True)
    confidence = np.clip((weights * np.where(weights > 0, cosine, 0.0)).sum(1), 0, 1)
    return weights, confidence


def _generated(random: np.random.Generator, kind: str, truth: np.ndarray) -> np.ndarray:
    """Predicted effects of a generator: informative holds part of the truth, useless another perturbation's."""
    spread = truth.std() + 1e-9
    noise = random.normal(0, 0.4 * spread, truth.shape)
    if kind == "informative":
        return 0.7 * truth + noise
    return 0.7 * truth[random.permutation(len(truth))] + noise


def simulate(
    random: np.random.Generator,
    *,
    difficulty: str,
    perturbations: int,
    generator: str,
    targets: int = 40,
    genes: int = 300,
    null: bool = False,
) -> Simulated:
    """One screen. difficulty: informative, weak or wrong location; generator: informative or useless; null: no effects at all."""
    count = int(np.clip(perturbations // 8, 4, 24))
    n = perturbations + targets
    outside = np.arange(n) % 10 == 9
    programmes = np.vstack([_programmes(random, count, genes), _programmes(random, 2 * outside.sum(), genes)[: outside.sum()]])
    member = random.integers(0, count, n)
    member[outside] = np.arange(count, len(programmes))
    truth = _true_effects(random, programmes, member) * (0.0 if null else 1.0)
    sd = random.lognormal(-0.6, 0.4, genes)
    base = random.gamma(2, 0.5, genes)
    names = pd.Index([f"P{i:04d}" for i in range(n)])
    gene_names = pd.Index([f"G{j:04d}" for j in range(genes)])
    n_cells = np.clip(random.lognormal(np.log(150), 0.5, n), 30, 1000).astype(np.int64)
    weights, confidence = _locate(random, member, outside, perturbations, DIFFICULTIES[difficulty], len(programmes))
    training, held = slice(0, perturbations), slice(perturbations, n)
    effects = _experiment(random, names[training], gene_names, truth[training], n_cells[training], sd, base)
    halves = tuple(_experiment(random, names[held], gene_names, truth[held], n_cells[held], sd, base) for _ in range(2))
    roles = np.array(["pseudo"] * perturbations + ["target"] * targets)
    info = pd.DataFrame(
        {
            "role": roles,
            "k_eff": 1 / (weights**2).sum(1),
            "confidence": confidence,
            "kind": "single",
            "parts_measured": 0,
            "status": "located",
            "reason": "",
            "locator": "simulated",
        },
        index=names,
    )
    neighbours = names[training].append(pd.Index([CONTROL]))
    locations = LocationSet(names, neighbours, np.hstack([weights, np.zeros((n, 1))]), info)
    generated = effects.control_mean + _generated(random, generator, truth)
    mean_of = effects.control_mean + weights @ effects.effect
    zero = np.zeros_like(generated)
    means = {
        "dbdiffusion": MeanSet(names, roles, gene_names, generated, zero + 1e-6),
        "neighbour_mean": MeanSet(names, roles, gene_names, mean_of, zero),
    }
    shared = np.where(outside[held, None], 0.0, programmes[member[held]]) * (0.0 if null else 1.0)
    return Simulated(effects, locations, means, names[held], truth[held], shared, halves, outside[held])
