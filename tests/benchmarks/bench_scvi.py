"""Held-out likelihood of this project's autoencoder and of scvi-tools' SCVI on the same cells, with the same widths and latent size.

scvi-tools has an environment of its own (python -m venv scvi && scvi/bin/pip install scvi-tools); the project's Python runs this script:

    PYTHONPATH=workflow_scripts python tests/benchmarks/bench_scvi.py scvi/bin/python [seeds]

Both see counts of the same genes with their batch, have negative binomial decoders with the library size observed, one hidden layer of 128
and 32 latent dimensions, and stop early on a tenth of the training cells. Printed per held-out cell, in nats: -ln p(x | z) at a
draw z of the posterior, the KL term, and their sum (the negative evidence bound); and the seconds of training.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

EPOCHS, LATENT, HIDDEN = 400, 32, 128
"""SCVI's own default for a few thousand cells is 400 epochs; early stopping ends both sooner."""


def theirs(folder: str, seed: int) -> None:
    """In SCVI's environment: train on train.h5ad, print the scores of held.h5ad as JSON."""
    import time

    import anndata as ad
    import scvi

    scvi.settings.seed = seed
    train, held = (ad.read_h5ad(Path(folder) / f"{name}.h5ad") for name in ("train", "held"))
    scvi.model.SCVI.setup_anndata(train, batch_key="batch")
    model = scvi.model.SCVI(train, n_hidden=HIDDEN, n_latent=LATENT, n_layers=1, gene_likelihood="nb")
    began = time.perf_counter()
    model.train(
        max_epochs=EPOCHS, accelerator="cpu", early_stopping=True, train_size=0.9, enable_progress_bar=False, plan_kwargs={"lr": 1e-3}
    )
    seconds = time.perf_counter() - began

    def value(found) -> float:
        found = next(iter(found.values())) if isinstance(found, dict) else found
        return abs(float(found))

    reconstruction, bound = value(model.get_reconstruction_error(held)), value(model.get_elbo(held))
    print(json.dumps({"reconstruction": reconstruction, "kl": bound - reconstruction, "bound": bound, "seconds": seconds}))


def ours(train, held, seed: int) -> dict[str, float]:
    """The same scores of this project's autoencoder with its defaults."""
    import torch
    from scipy.special import gammaln

    from dbdiffusion.config.generator import VaeConfig
    from dbdiffusion.generative.vae import CellTensors, fit_vae, kl_to_standard_normal

    cpu = torch.device("cpu")
    fit_vae(train, VaeConfig(max_steps=2), device=cpu, seed=seed)  # Compiles the loops, which a machine does once.
    network, fitted = fit_vae(train, VaeConfig(), device=cpu, seed=seed)
    data, rows = CellTensors.make(held, True, cpu), torch.arange(len(held))
    with torch.no_grad():
        expression, counts, log_library, batch = data.rows(rows)
        mean, log_variance = network.encode(expression, batch)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed))
        decoded = network.decode(mean + noise * torch.exp(0.5 * log_variance), batch)
        misfit = float(network.negative_log_likelihood(decoded, counts, log_library).mean())
        kl = float(kl_to_standard_normal(mean, log_variance))
    # What no parameter changes is left out of the loss.
    misfit += float(gammaln(held.counts.data + 1).sum() / len(held))
    return {"reconstruction": misfit, "kl": kl, "bound": misfit + kl, "seconds": fitted.seconds}


def main(python: str, seeds: int = 1) -> None:
    import anndata as ad
    import pandas as pd
    import torch
    from bench_generative import screen

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        train, held = screen(Path(folder))
        for name, cells in (("train", train), ("held", held)):
            obs = pd.DataFrame({"batch": [cells.batches[code] for code in cells.batch]}, index=[f"{name}{i}" for i in range(len(cells))])
            ad.AnnData(cells.counts, obs=obs, var=pd.DataFrame(index=cells.genes)).write_h5ad(Path(folder) / f"{name}.h5ad")
        for seed in range(1, seeds + 1):
            print(f"seed {seed} ours ", json.dumps(ours(train, held, seed)), flush=True)
            done = subprocess.run([python, __file__, "--scvi", folder, str(seed)], capture_output=True, text=True, check=True)
            print(f"seed {seed} scvi ", done.stdout.strip().splitlines()[-1], flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--scvi":
        theirs(sys.argv[2], int(sys.argv[3]))
    else:
        main(sys.argv[1], *map(int, sys.argv[2:]))
