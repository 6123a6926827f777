"""What the generator is conditioned on (config keys diffusion.condition, diffusion.uncertain_conditions), by its error on pseudo-targets.

Run by hand, after a run of the workflow: PYTHONPATH=workflow_scripts python tests/benchmarks/bench_condition.py results/NAME [seed]
For every cross-fit model of every fold, a diffusion model is trained for each condition on the autoencoder that the run left, and
generates the model's pseudo-targets without guidance (sharp: trained on certain conditions alone). Squared errors of effects are divided by
the training mean's; differences to the default, `both`, are paired, with their standard error over pseudo-targets. Pearson correlations are
over genes, averaged; so are slopes of predicted on measured effects. Slopes of seen perturbations are on what they were learned from.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dbdiffusion.config.generator import DiffusionConfig, GenerationConfig
from dbdiffusion.data.sets import CONTROL, EffectSet, LocationSet
from dbdiffusion.data.splits import Splits
from dbdiffusion.generative.conditions import PARTS_OF, Conditions
from dbdiffusion.generative.diffusion import write_diffusions
from dbdiffusion.generative.generate import load_generator
from dbdiffusion.runtime.files import read_json

VARIANTS = {name: {"condition": name, "uncertain_conditions": True} for name in PARTS_OF}
VARIANTS |= {f"{name}, sharp": {"condition": name, "uncertain_conditions": False} for name in PARTS_OF}


def of_model(results: Path, seed: str, fold: str, crossfit: str) -> Iterator[dict]:
    """Errors of each predictor for each pseudo-target of a model."""
    place = results / f"seed{seed}" / f"fold{fold}"
    model = place / f"crossfit{crossfit}"
    effects = EffectSet.read(place / "effects.parquet")
    embedding, vae = model / "embedding.parquet", {"vae": model / "vae.safetensors", "vae_record": model / "vae.json"}
    trained = DiffusionConfig.model_validate(read_json(model / "diffusion.json")["config"])
    found = Conditions.read(embedding, trained)
    names = list(found.select(("pseudo",)).names)
    learned = effects.subset(list(found.select(("train",)).names))
    observed = effects.subset(names).effect
    located = LocationSet.read(place / "locations.parquet", crossfit, learned.perturbations).select(names)
    predicted = {
        "training mean": np.broadcast_to(learned.effect.mean(axis=0), observed.shape),
        "neighbour mean": located.weights[:, :-1] @ learned.effect,
    }
    seen = {}
    for variant, keys in VARIANTS.items():
        config = trained.model_copy(update=keys)
        with tempfile.TemporaryDirectory() as folder:
            made = {"weights": Path(folder) / "w.safetensors", "record": Path(folder) / "r.json"}
            write_diffusions(
                cells=results / "qc" / "cells.h5ad",
                splits=results / f"seed{seed}" / "splits.json",
                effects=place / "effects.parquet",
                embedding=[embedding],
                fold=fold,
                crossfit=[crossfit],
                config=config,
                device="cpu",
                seed=int(seed),
                scratch=None,
                **{name: [path] for name, path in (vae | made).items()},
            )
            files = (*vae.values(), *made.values())
            generator = load_generator(*files, config=GenerationConfig(cells_kept=1), device="cpu", seed=int(seed), genes=effects.genes)
        known = Conditions.read(embedding, config).take([CONTROL, *names, *learned.perturbations])
        means = np.array([sample.mean for sample in generator.sampled(known.values, 0.0)])
        made_effects = means[1:] - means[0]
        predicted[variant], of_seen = np.split(made_effects, [len(names)])
        seen[variant] = slope(of_seen, learned.effect)
    for method, values in predicted.items():
        for name, one, truth in zip(names, values, observed, strict=True):
            r = np.corrcoef(one, truth)[0, 1] if one.std() > 0 else np.nan
            scores = {"error": np.square(one - truth).mean(), "r": r, "slope": slope(one, truth), "seen": seen.get(method, np.nan)}
            yield {"fold": fold, "target": name, "method": method, **scores}


def slope(one: np.ndarray, truth: np.ndarray) -> float:
    """Of `one` on `truth`, through 0."""
    return float((one * truth).sum() / np.square(truth).sum())


def main() -> None:
    results, seed = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "1"
    torch.set_num_threads(1)
    splits = Splits.read(results / f"seed{seed}" / "splits.json")
    rows = pd.DataFrame(
        [row for fold in splits.folds for crossfit in splits.crossfit_names(fold) for row in of_model(results, seed, fold, crossfit)]
    )
    wide = rows.pivot(index=["fold", "target"], columns="method", values="error")
    # A perturbation is a pseudo-target in several folds: it counts once.
    wide = wide.groupby("target").mean()
    base = wide["training mean"].mean()
    gap = wide.sub(wide["both"], axis=0)
    table = pd.DataFrame(
        {
            "error": wide.mean() / base,
            "less both": gap.mean() / base,
            "se": gap.std(ddof=1) / np.sqrt(len(gap)) / base,
            "pearson": rows.groupby("method")["r"].mean(),
            "slope": rows.groupby("method")["slope"].mean(),
            "slope of seen": rows.groupby("method")["seen"].mean(),
        }
    )
    print(f"{results.name}: {len(wide)} pseudo-targets")
    print(table.loc[["training mean", "neighbour mean", *VARIANTS]].round(3).to_string())


if __name__ == "__main__":
    main()
