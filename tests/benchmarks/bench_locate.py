"""Time and memory of locating 10,000 targets among 5,000 measured perturbations by features of 20,000 genes.

Run by hand: PYTHONPATH=workflow_scripts python tests/benchmarks/bench_locate.py [targets] [measured] [genes]
Aim: under 60 s and 4 GB on two cores.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from dbdiffusion.config.datasets import FeatureSource
from dbdiffusion.perturbations.features import load_features
from dbdiffusion.perturbations.locators import KernelLocator, Known, RidgeLocator


def gene_sets(path: Path, genes: list[str], sets: int, rng: np.random.Generator) -> None:
    """A .gmt file the size of GO: sets of 5 to 500 genes."""
    with path.open("w") as handle:
        for number in range(sets):
            size = int(np.exp(rng.uniform(np.log(5), np.log(500))))
            handle.write("\t".join([f"SET{number}", "x", *rng.choice(genes, size, replace=False)]) + "\n")


def main(targets: int = 10_000, measured: int = 5_000, n_genes: int = 20_000) -> None:
    rng = np.random.default_rng(0)
    genes = [f"GENE{i:05d}" for i in range(n_genes)]
    order = rng.permutation(genes).tolist()
    anchors, others = order[:measured], order[measured : measured + targets]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sets.gmt"
        gene_sets(path, genes, 9000, rng)
        start = time.perf_counter()
        features = load_features(FeatureSource(kind="gene_sets", path=str(path)), anchors, others)
    print(f"features of {len(features.genes)} genes: {time.perf_counter() - start:.1f} s")
    known = Known(anchors, anchors, {features.source: features}, lambda: None)
    for locator in (KernelLocator((features.source,), 15, 0.1), RidgeLocator((features.source,), 1.0)):
        begin = time.perf_counter()
        located = locator.locate(others, known)
        assert located.weights.shape == (targets, measured)
        print(f"{locator.label}: {time.perf_counter() - begin:.1f} s, {(located.reasons == '').mean():.1%} located")
        del located
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    print(f"in all {time.perf_counter() - start:.1f} s, peak {peak:.2f} GiB")


if __name__ == "__main__":
    main(*(int(value) for value in sys.argv[1:]))
