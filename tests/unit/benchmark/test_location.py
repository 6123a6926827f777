"""How well perturbations are located: against slow versions, and on a screen whose features are its programmes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from dbdiffusion.benchmark.location import (
    COMBINATIONS,
    IN_USE,
    Group,
    compare,
    coverage_above,
    families,
    reliability,
    summarise,
    true_clusters,
    write_location_quality,
)
from dbdiffusion.config.datasets import FeatureSource
from dbdiffusion.config.embedding import ClustersConfig, LocationConfig
from dbdiffusion.config.qc import PanelConfig
from dbdiffusion.data.moments import Moments
from dbdiffusion.data.sets import EffectSet
from dbdiffusion.data.splits import Splits
from dbdiffusion.perturbations.effects import estimate_effects, gene_scale, write_effects
from dbdiffusion.perturbations.features import GeneFeatures
from dbdiffusion.perturbations.locate import write_locations
from dbdiffusion.perturbations.locators import Clustering
from dbdiffusion.runtime import contracts

CLUSTERS = ClustersConfig(perturbation_neighbours=3, perturbation_resolution=1.0)


@pytest.fixture
def group():
    random = np.random.default_rng(0)
    names = ["A", "B", "C", "A+B", "D"]
    values, truth = random.normal(size=(5, 7)), random.normal(size=(2, 7))
    truth[0] = values[0]
    made = Group.make("pseudo", ["A", "X"], truth, names, values, {"A": "0", "B": "0", "C": "1", "D": "0", "X": "1"})
    return made, truth, values


def test_distances_and_purity_match_a_loop(group):
    made, truth, values = group
    weights = np.array([[0.0, 0.5, 0.4, 0.0, 0.3], [0.2, -0.4, 1.2, 0.0, 0.0]])
    found = made.judge(weights, np.array([True, True]))
    for row in range(2):
        assert found[row, 1] == pytest.approx(((truth[row] - weights[row] @ values) ** 2).sum())
    # Positive weights alone count: A has B and D in its cluster, X has C.
    np.testing.assert_allclose(found[:, 2], [(0.5 + 0.3) / 1.2, 1.2 / 1.4])
    # Neither the query nor a combination with it is in the mean that stands for no location.
    np.testing.assert_allclose(
        made.baseline, [((truth[0] - values[[1, 2, 4]].mean(axis=0)) ** 2).sum(), ((truth[1] - values.mean(axis=0)) ** 2).sum()]
    )
    lost = made.judge(np.zeros((2, 5)), np.array([False, False]))
    np.testing.assert_allclose(lost[:, 1], made.baseline)
    assert np.isnan(lost[:, 2]).all()
    rows = made.rows("x", "given", found)
    np.testing.assert_allclose(rows["purity_random"], [2 / 3, 1 / 5])


def write(screen: SimpleNamespace, out: Path, at: SimpleNamespace) -> pd.DataFrame:
    write_location_quality(
        moments=screen.moments,
        splits=screen.splits,
        effects=at.effects,
        locations=at.locations,
        clusters=at.clusters,
        gene_features=at.gene_features,
        fold="0",
        seed=1,
        location=LocationConfig(max_cells=400),
        config=CLUSTERS,
        out=out,
    )
    text = dict.fromkeys(("role", "query", "locator", "features"), str)
    return contracts.LOCATION_QUALITY.read(out).astype(text)


@pytest.fixture(scope="module")
def located(screen, tmp_path_factory):
    """The screen of this room located by a table of its programmes and by co-expression."""
    folder = tmp_path_factory.mktemp("located")
    at = SimpleNamespace(
        **{name: folder / f"{name}.parquet" for name in ("effects", "locations", "clusters", "gene_features")}, folder=folder
    )
    screen.features.rename_axis("gene").to_csv(folder / "programmes.tsv", sep="\t")
    write_effects(
        moments=screen.moments, splits=screen.splits, fold="0", config=PanelConfig(n_genes=25), effects=at.effects, panel=folder / "p.json"
    )
    write_locations(
        cells=screen.cells,
        splits=screen.splits,
        effects=at.effects,
        fold="0",
        features=[FeatureSource(kind="coexpression"), FeatureSource(kind="table", path=str(folder / "programmes.tsv"))],
        location=LocationConfig(max_cells=400),
        clusters=CLUSTERS,
        seed=1,
        locations=at.locations,
        out_clusters=at.clusters,
        gene_features=at.gene_features,
        gene_names=folder / "gene_names.parquet",
    )
    at.table = write(screen, folder / "quality.parquet", at)
    return at


def test_every_locator_and_query_is_there(screen, located):
    table, splits = located.table, Splits.read(screen.splits)
    sets = {"coexpression", "table:programmes", "all sources"}
    expected = {IN_USE, "cluster rule"} | {f"{kind}: {name}" for kind in ("kernel", "ridge") for name in sets}
    assert set(table["locator"]) == expected
    assert set(families(LocationConfig(locator="cluster"), ["a"])) == {"kernel: a", "ridge: a", "cluster rule"}
    part = table[(table["locator"] == "ridge: table:programmes") & (table["features"] == "given")]
    assert sorted(part.loc[part["role"] == "target", "query"]) == splits.targets("0")
    assert sorted(part.loc[part["role"] == "pseudo", "query"]) == splits.training("0")
    # Clusters were learned with the pseudo-targets' cells: the cluster rule is not tried on them.
    assert set(table.loc[table["locator"] == "cluster rule", "role"]) == {"target"}
    assert table.loc[table["locator"] != IN_USE, "confidence"].isna().all()


def test_errors_are_those_of_the_weights(screen, located):
    effects = EffectSet.read(located.effects)
    target = Splits.read(screen.splits).targets("0")[0]
    unit = gene_scale(effects.se)
    truth = estimate_effects(Moments.read(screen.moments), [target], effects.genes).effect[0]
    frame = contracts.LOCATIONS.read(located.locations).astype({"fit": str, "query": str, "neighbour": str})
    weights = frame[(frame["fit"] == "all") & (frame["query"] == target)].set_index("neighbour")["weight"]
    guess = weights.to_numpy() @ effects.effect[effects.perturbations.get_indexer(weights.index)]
    table = located.table
    row = table[(table["query"] == target) & (table["locator"] == IN_USE) & (table["features"] == "given")].iloc[0]
    assert row["error"] == pytest.approx((((truth - guess) / unit) ** 2).sum())
    assert row["baseline"] == pytest.approx((((truth - effects.effect.mean(axis=0)) / unit) ** 2).sum())


def test_informative_features_find_the_cluster_and_permuted_ones_do_not(located):
    summary = summarise(located.table, resamples=200).set_index(["role", "locator", "features"])
    good = summary.loc[("pseudo", "kernel: table:programmes", "given")]
    noise = summary.loc[("pseudo", "kernel: table:programmes", "permuted")]
    assert good["purity"] > 0.8
    assert good["error"] < 0.6
    assert noise["error"] > 0.9
    assert abs(noise["purity"] - noise["purity_random"]) < 0.15
    assert good["error_low"] <= good["error"] <= good["error_high"]


def test_the_choice_of_a_setting_does_not_see_the_query():
    """Noise for the effects of one group's queries: the other groups choose its setting, so its weights and with them its purity stay."""
    random = np.random.default_rng(5)
    names = [f"G{i:02d}" for i in range(24)]
    points = random.normal(size=(24, 3))
    features = [GeneFeatures("a", pd.Index(names), points)]
    values = points @ random.normal(size=(3, 10))
    cluster = {name: str(int(point > 0)) for name, point in zip(names, points[:, 0], strict=True)}

    def purity(first: np.ndarray, others: np.ndarray) -> tuple[pd.Series, pd.Series]:
        truths = [first, *np.split(others, 2)]
        groups = [Group.make("pseudo", names[8 * i : 8 * i + 8], truth, names, values, cluster) for i, truth in enumerate(truths)]
        frames = compare([(group, features) for group in groups], LocationConfig(), Clustering({}, {}), 1)
        table = pd.concat(frames).query("features == 'given'").set_index(["locator", "query"])["purity"]
        return table[table.index.isin(names[:8], level=1)], table[table.index.isin(names[8:], level=1)]

    noise = random.normal(0, 5, (24, 10))
    before = purity(values[:8], values[8:])
    same, others = purity(noise[:8], values[8:])
    pd.testing.assert_series_equal(same, before[0])
    # The choice is there to be seen: with noise in the other groups another setting is taken.
    assert not purity(values[:8], noise[8:])[0].equals(before[0])


def test_same_input_same_bytes(screen, located, tmp_path):
    write(screen, tmp_path / "again.parquet", located)
    assert (tmp_path / "again.parquet").read_bytes() == (located.folder / "quality.parquet").read_bytes()


def test_true_clusters_know_the_held_out(screen, located):
    splits, effects = Splits.read(screen.splits), EffectSet.read(located.effects)
    held_out = estimate_effects(Moments.read(screen.moments), splits.targets("0"), effects.genes)
    found = true_clusters(effects, held_out, CLUSTERS, 1)
    assert set(found) == set(splits.measured)
    # Perturbations k, k + 3, ... share a programme.
    programme = {name: int(name[1:]) % 3 for name in found}
    together = [(found[a] == found[b], programme[a] == programme[b]) for a in found for b in found if a < b]
    assert np.mean([one == other for one, other in together]) > 0.85


def quality(n: int, **columns) -> pd.DataFrame:
    base = {"seed": 1, "fold": "0", "role": "pseudo", "query": [f"G{i}" for i in range(n)], "locator": IN_USE, "features": "given"}
    values = {"located": 1.0, "error": 1.0, "baseline": 2.0, "purity": 0.5, "purity_random": 0.1, "confidence": 0.5, "coverage": 0.9}
    return pd.DataFrame({**base, **values, **columns}, index=range(n))


def test_summary_against_arithmetic():
    table = pd.concat([quality(3, error=[1.0, 2.0, 6.0], purity=[0.2, np.nan, 0.6]), quality(3, seed=2, error=[3.0, 2.0, 6.0])])
    row = summarise(table, resamples=500).iloc[0]
    assert row["n"] == 3
    assert row["error"] == pytest.approx((2 + 2 + 6) / 6)
    assert row["purity"] == pytest.approx(np.mean([0.35, 0.5, 0.55]))
    assert row["error_low"] < row["error"] < row["error_high"]
    assert summarise(table.iloc[:0]).empty


def test_bootstrap_interval_covers():
    """Of 200 samples of 60 queries, the 95 % interval holds the true ratio of sums in 90 % or more."""
    random, hits = np.random.default_rng(3), 0
    for number in range(200):
        baseline = random.gamma(2, 1, 60)
        row = summarise(quality(60, baseline=baseline, error=0.8 * baseline * random.gamma(4, 0.25, 60)), resamples=200, seed=number).iloc[
            0
        ]
        hits += row["error_low"] <= 0.8 <= row["error_high"]
    assert hits >= 180


def test_reliability_bins_are_half_open():
    confidence = [0.0, 0.1, 0.2, 0.79, 0.8, 1.0]
    table = quality(6, confidence=confidence, error=[1.0, 2.0, 1.0, 1.0, 3.0, 1.0])
    curve = reliability(pd.concat([table, quality(1, located=0.0), quality(1, locator="ridge: x"), quality(1, features="permuted")]))
    assert curve["n"].tolist() == [2, 1, 1, 2]
    np.testing.assert_allclose(curve["share"], [0.5, 1, 1, 0.5])
    interval = stats.binomtest(1, 2).proportion_ci(0.95, "exact")
    np.testing.assert_allclose(curve.loc[0, ["low", "high"]].astype(float), [interval.low, interval.high])
    assert reliability(quality(2, locator=COMBINATIONS, role=["target", "pseudo"]))["group"].tolist() == ["combinations"]
    assert reliability(table.iloc[:0]).empty


def test_coverage_above_a_threshold():
    table = pd.concat(
        [
            quality(30, confidence=np.repeat([0.1, 0.5, 0.9], 10), coverage=np.repeat([0.4, 0.9, 1.0], 10) + np.tile([-0.001, 0.001], 15)),
            quality(4, role="target", confidence=0.3, coverage=[0.8, 0.9, 1.0, np.nan]),
        ]
    )
    found, threshold = coverage_above(table, 0.9)
    pseudo = found[found["role"] == "pseudo"].set_index("confidence")
    np.testing.assert_allclose(pseudo["coverage"], [2.3 / 3, 0.95, 1.0])
    np.testing.assert_allclose(pseudo["share"], [1, 2 / 3, 1 / 3])
    assert threshold == 0.5
    target = found[found["role"] == "target"].iloc[0]
    assert (target["n"], target["coverage"]) == (3, pytest.approx(0.9))
    empty, nothing = coverage_above(table.iloc[:0], 0.9)
    assert empty.empty and np.isnan(nothing)


def test_reliability_shows_the_error_by_confidence():
    table = quality(4, confidence=[0.1, 0.15, 0.9, 0.95], error=[2.0, 4.0, 0.5, 1.5])
    np.testing.assert_allclose(reliability(table)["error"], [6 / 4, 2 / 4])


def test_coverage_is_that_of_the_located_neighbours(screen, located):
    table = located.table
    used = table[(table["locator"] == IN_USE) & (table["features"] == "given") & (table["located"] == 1)]
    assert used["coverage"].between(0, 1).all()
    assert table.loc[(table["locator"] != IN_USE) | (table["features"] != "given"), "coverage"].isna().all()
