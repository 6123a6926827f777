"""What the generator is conditioned on (config key diffusion.condition), compared by its error on pseudo-targets.

Run by hand, after a run of the workflow: PYTHONPATH=workflow_scripts python tests/benchmarks/bench_condition.py results/NAME [seed]
For every cross-fit model of every fold, a diffusion model is trained for each condition on the autoencoder that the run left, and
generates the model's pseudo-targets without guidance. Squared errors of effects are divided by the training mean's; differences to
`embedding` are paired, with their standard error over pseudo-targets. Pearson correlations are over genes, averaged.
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
from dbdiffusion.generative.diffusion import PARTS_OF, Conditions, write_diffusion
from dbdiffusion.generative.generate import load_generator
from dbdiffusion.runtime.files import read_json


def of_model(results: Path, seed: str, fold: str, crossfit: str) -> Iterator[dict]:
    """Errors of each predictor for each pseudo-target of a model."""
    place = results / f"seed{seed}" / f"fold{fold}"
    model = place / f"crossfit{crossfit}"
    effects = EffectSet.read(place / "effects.parquet")
    embedding, vae = model / "embedding.parquet", {"vae": model / "vae.safetensors", "vae_record": model / "vae.json"}
    trained = DiffusionConfig.model_validate(read_json(model / "diffusion.json")["config"])
    found = Conditions.read(embedding, "embedding")
    names = list(found.select(("pseudo",)).names)
    learned = effects.subset(list(found.select(("train",)).names))
    observed = effects.subset(names).effect
    located = LocationSet.read(place / "locations.parquet", crossfit, learned.perturbations).select(names)
    predicted = {
        "training mean": np.broadcast_to(learned.effect.mean(axis=0), observed.shape),
        "neighbour mean": located.weights[:, :-1] @ learned.effect,
    }
    for condition in PARTS_OF:
        with tempfile.TemporaryDirectory() as folder:
            made = {"weights": Path(folder) / "w.safetensors", "record": Path(folder) / "r.json"}
            write_diffusion(
                cells=results / "qc" / "cells.h5ad",
                splits=results / f"seed{seed}" / "splits.json",
                effects=place / "effects.parquet",
                embedding=embedding,
                **vae,
                fold=fold,
                crossfit=crossfit,
                config=trained.model_copy(update={"condition": condition}),
                device="cpu",
                seed=int(seed),
                scratch=None,
                **made,
            )
            files = (*vae.values(), *made.values())
            generator = load_generator(*files, config=GenerationConfig(cells_kept=1), device="cpu", seed=int(seed), genes=effects.genes)
        known = Conditions.read(embedding, condition).take([CONTROL, *names])
        means = np.array([sample.mean for sample in generator.sampled(known.values, 0.0)])
        predicted[condition] = means[1:] - means[0]
    for method, values in predicted.items():
        for name, one, truth in zip(names, values, observed, strict=True):
            r = np.corrcoef(one, truth)[0, 1] if one.std() > 0 else np.nan
            yield {"fold": fold, "target": name, "method": method, "error": np.square(one - truth).mean(), "r": r}


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
    gap = wide.sub(wide["embedding"], axis=0)
    table = pd.DataFrame(
        {
            "error": wide.mean() / base,
            "less embedding": gap.mean() / base,
            "se": gap.std(ddof=1) / np.sqrt(len(gap)) / base,
            "pearson": rows.groupby("method")["r"].mean(),
        }
    )
    print(f"{results.name}: {len(wide)} pseudo-targets")
    print(table.loc[["training mean", "neighbour mean", *PARTS_OF]].round(3).to_string())


if __name__ == "__main__":
    main()
