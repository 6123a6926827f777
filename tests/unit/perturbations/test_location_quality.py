"""Do annotations place perturbations among their like: on the simulator, where the truth is known, and on real interferon genes."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from dbdiffusion.config.datasets import FeatureSource, SimulateDataset
from dbdiffusion.data.simulate import write_screen
from dbdiffusion.perturbations.features import GeneFeatures, load_features, permute_features, read_gmt
from dbdiffusion.perturbations.locators import KernelLocator, Known

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
INTERFERON = ("IFNGR1", "IFNGR2", "JAK2", "STAT1")


def located(
    features: list[GeneFeatures], queries: list[str], measured: list[str], temperature: float = 0.1
) -> tuple[np.ndarray, np.ndarray]:
    locator = KernelLocator(tuple(f.source for f in features), 15, 0.1)
    found = locator.locate(queries, Known(measured, measured, {f.source: f for f in features}, lambda: None))
    return found.weights, found.reasons == ""


@pytest.fixture(scope="module")
def screen(tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureSource, pd.DataFrame]:
    """Annotations and truth of a screen of few cells: the cells are not needed here."""
    folder = tmp_path_factory.mktemp("screen")
    config = SimulateDataset(cells_per_perturbation=5, control_guides=1, cells_per_control_guide=5)
    write_screen(config, counts=folder / "counts.h5ad", annotations=folder / "annotations.gmt", truth=folder / "truth.parquet")
    truth = (
        pd.read_parquet(folder / "truth.parquet")
        .drop_duplicates("perturbation")
        .astype({"perturbation": str, "programme": str, "kind": str})
    )
    return FeatureSource(kind="gene_sets", path=str(folder / "annotations.gmt")), truth.set_index("perturbation")


def purity(features: GeneFeatures, queries: list[str], measured: list[str], truth: pd.DataFrame) -> tuple[float, float]:
    """Weight on neighbours that share a programme with the query, on average, and what random neighbours would get."""
    programmes = {name: {p for p in truth.loc[name, "programme"].split(",") if p} for name in measured}
    weights, there = located([features], queries, measured)
    same = np.array([[bool(programmes[a] & programmes[b]) and a != b for b in measured] for a in queries])
    return float((weights * same).sum(axis=1)[there].mean()), float(same[there].sum(axis=1).mean() / (len(measured) - 1))


def test_neighbours_share_the_programme_and_do_not_when_annotations_are_permuted(screen: tuple[FeatureSource, pd.DataFrame]) -> None:
    source, truth = screen
    measured = sorted(truth.index[truth["kind"] != "unmeasured"])
    features = load_features(source, measured)
    sets = read_gmt(source.path)
    # Where the annotations say so: the gene is still among the regulators of a programme of its own, not replaced by noise.
    annotated = {
        name for name in measured for p in truth.loc[name, "programme"].split(",") if p and name in sets.get(f"{p}_REGULATORS", [])
    }
    queries = [name for name in measured if truth.loc[name, "kind"] == "programme" and name in annotated]
    assert len(queries) > 30
    found, chance = purity(features, queries, measured, truth)
    assert chance < 0.35
    assert found > 0.8
    permuted = [purity(permute_features([features], seed)[0], queries, measured, truth)[0] for seed in range(20)]
    assert abs(np.mean(permuted) - chance) < 0.06


@pytest.mark.skipif(not (SHARED / "annotations").is_dir(), reason="real annotations are not at hand")
def test_interferon_genes_find_each_other() -> None:
    obs = anndata.read_h5ad(SHARED / "papalexi2021-thp1-303g.h5ad", backed="r").obs
    measured = sorted(set(obs["perturbation"].astype(str)) - {"control"})
    folder = SHARED / "annotations"
    # GO alone is left out: by its processes STAT1 stands among transcription factors (STAT2, IRF7, MYC), before JAK2.
    for sources in (
        ("pairs_StringDB.csv.gz",),
        ("pairs_Reactome.csv.gz",),
        ("go_bp_human.gmt.gz", "pairs_StringDB.csv.gz", "pairs_Reactome.csv.gz"),
    ):
        kinds = [FeatureSource(kind="gene_sets" if "gmt" in name else "pairs", path=str(folder / name)) for name in sources]
        features = [load_features(kind, measured) for kind in kinds]
        weights, there = located(features, list(INTERFERON), measured)
        assert there.all()
        for row, query in enumerate(INTERFERON):
            # The kin that share its screen phenotype are among the three nearest of 24.
            nearest = {measured[i] for i in np.argsort(-weights[row])[:3]}
            assert nearest & (set(INTERFERON) - {query}), (sources, query, nearest)
