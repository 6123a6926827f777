"""Time and memory of inference for many unseen targets, beside scanpy's test of the measured perturbations.

    PYTHONPATH=workflow_scripts python tests/benchmarks/bench_inference.py [--targets 2000] [--genes 8000] [--perturbations 300]

Prints one line per step. Bar: 2,000 targets x 8,000 genes in under 60 s and 4 GiB on 2 cores.
"""

from __future__ import annotations

import argparse
import resource
import time
import warnings

import numpy as np
import pandas as pd
from scipy import sparse

from dbdiffusion.config.inference import InferenceConfig
from dbdiffusion.inference import table
from dbdiffusion.inference.simulate import simulate
from dbdiffusion.runtime.seeds import rng


def peak() -> float:
    """Largest resident set so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def bench_inference(targets: int, genes: int, perturbations: int) -> None:
    screen = simulate(
        rng(1, "bench"), difficulty="informative", perturbations=perturbations, generator="informative", targets=targets, genes=genes
    )
    print(f"inputs: {targets} targets, {genes} genes, {perturbations} training perturbations, {peak():.2f} GiB with the simulation")
    means = {"dbdiffusion": screen.means["dbdiffusion"]}
    effects, locations, names = screen.effects, screen.locations, screen.targets
    del screen
    start, busy = time.perf_counter(), time.process_time()
    inference = table.infer(effects, locations, means, InferenceConfig(), 1)
    fitted = time.perf_counter()
    calls = sum(int(np.isin(result.call, ["up", "down"]).sum()) for result in table.results(inference, "stacked", names))
    done, busy = time.perf_counter(), time.process_time() - busy
    print(
        f"fit {fitted - start:.1f} s, predict {done - fitted:.1f} s, total {done - start:.1f} s ({busy:.0f} s of CPU), "
        f"peak {peak():.2f} GiB, {calls} calls"
    )


def bench_scanpy(cells: int, genes: int, perturbations: int) -> None:
    import anndata
    import scanpy

    random = rng(1, "bench cells")
    x = sparse.random(cells * (perturbations + 1), genes, density=0.1, format="csr", dtype=np.float32, random_state=random)
    label = np.repeat(["control", *(f"P{i}" for i in range(perturbations))], cells)
    data = anndata.AnnData(x, obs=pd.DataFrame({"perturbation": pd.Categorical(label)}, index=[str(i) for i in range(len(label))]))
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    scanpy.tl.rank_genes_groups(data, "perturbation", reference="control", method="t-test")
    print(f"scanpy rank_genes_groups (t-test), {perturbations} x {cells} cells x {genes} genes: {time.perf_counter() - start:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", type=int, default=2000)
    parser.add_argument("--genes", type=int, default=8000)
    parser.add_argument("--perturbations", type=int, default=300)
    parser.add_argument("--cells", type=int, default=50, help="cells per perturbation for scanpy; 0: without it")
    arguments = parser.parse_args()
    bench_inference(arguments.targets, arguments.genes, arguments.perturbations)
    if arguments.cells:
        bench_scanpy(arguments.cells, arguments.genes, arguments.perturbations)


if __name__ == "__main__":
    main()
