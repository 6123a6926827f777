"""The stage as a whole: what may be read where, and what its tables hold."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from dbdiffusion.benchmark.baselines import BASELINES, join_features, predict_fold
from dbdiffusion.config.datasets import FeatureSource
from dbdiffusion.config.embedding import ClustersConfig, EmbeddingConfig, LocationConfig
from dbdiffusion.config.qc import PanelConfig
from dbdiffusion.config.splits import SplitsConfig
from dbdiffusion.data.moments import write_moments
from dbdiffusion.data.sets import EffectSet, LocationSet
from dbdiffusion.data.splits import Splits, write_splits
from dbdiffusion.perturbations.conditions import certainty, feature_coordinates, write_embedding
from dbdiffusion.perturbations.effects import write_effects
from dbdiffusion.perturbations.features import GeneFeatures
from dbdiffusion.perturbations.locate import Plan, choose, combination_trials, learning_groups, make_learner, singles, write_locations
from dbdiffusion.perturbations.locators import Confidence, Known, Located, Ranked, candidates
from dbdiffusion.runtime import contracts

OUTPUTS = ("effects.parquet", "panel.json", "locations.parquet", "clusters.parquet", "gene_features.parquet", "gene_names.parquet")


def run(
    data: Path,
    out: Path,
    fold: str = "0",
    cells: Path | None = None,
    features: list[FeatureSource] | None = None,
    aliases: Path | None = None,
    **location,
) -> Path:
    """Effects, locations and embeddings of one fold; moments are made again when other cells are given."""
    out.mkdir(exist_ok=True)
    moments, splits = data / "moments.h5ad", data / "splits.json"
    if cells is not None:
        moments = out / "moments.h5ad"
        write_moments(cells, splits, moments)
    sources = features or [
        FeatureSource(kind="coexpression"),
        FeatureSource(kind="gene_sets", path=str(data / "annotations.gmt"), min_size=2),
    ]
    write_effects(
        moments=moments, splits=splits, fold=fold, config=PanelConfig(n_genes=60), effects=out / OUTPUTS[0], panel=out / OUTPUTS[1]
    )
    write_locations(
        cells=cells or data / "cells.h5ad",
        splits=splits,
        effects=out / OUTPUTS[0],
        fold=fold,
        features=sources,
        location=LocationConfig(**{"max_cells": 400, **location}),
        clusters=ClustersConfig(),
        seed=1,
        locations=out / OUTPUTS[2],
        out_clusters=out / OUTPUTS[3],
        gene_features=out / OUTPUTS[4],
        gene_names=out / OUTPUTS[5],
        aliases=aliases,
    )
    for q in Splits.read(splits).crossfit_names(fold):
        write_embedding(
            effects=out / OUTPUTS[0],
            splits=splits,
            locations=out / OUTPUTS[2],
            gene_features=out / OUTPUTS[4],
            fold=fold,
            crossfit=q,
            config=EmbeddingConfig(dimensions=8),
            out=out / f"embedding{q}.parquet",
        )
    return out


def garbage(data: Path, out: Path, names: set[str]) -> Path:
    """cells.h5ad with random counts and library sizes in the cells of `names`."""
    cells = anndata.read_h5ad(data / "cells.h5ad")
    rows = np.flatnonzero(cells.obs["perturbation"].isin(names))
    assert len(rows)
    rng = np.random.default_rng(0)
    counts = cells.X.tolil()
    counts[rows] = rng.poisson(5, (len(rows), cells.n_vars)).astype(np.float32)
    cells.X = sparse.csr_matrix(counts)
    cells.obs.iloc[rows, cells.obs.columns.get_loc("total_counts")] = rng.uniform(5e3, 1e4, len(rows))
    out.mkdir(exist_ok=True)
    cells.write_h5ad(out / "cells.h5ad", compression="gzip")
    return out / "cells.h5ad"


@pytest.fixture(scope="module")
def done(tiny_screen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tiny_screen, tmp_path_factory.mktemp("fold0"))


def test_held_out_cells_change_no_byte(tiny_screen: Path, done: Path, tmp_path: Path) -> None:
    splits = Splits.read(tiny_screen / "splits.json")
    held = set(splits.measured) - set(splits.training("0"))
    assert held >= set(splits.targets("0"))
    again = run(tiny_screen, tmp_path / "garbage", cells=garbage(tiny_screen, tmp_path, held))
    for name in (*OUTPUTS, "embedding0.parquet", "embedding1.parquet"):
        assert (again / name).read_bytes() == (done / name).read_bytes(), name


@pytest.fixture(scope="module")
def garbled(tiny_screen: Path, done: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of fold 0 with garbage in the cells of cross-fit fold 0."""
    out = tmp_path_factory.mktemp("garbled")
    splits = Splits.read(tiny_screen / "splits.json")
    hidden = set(splits.training("0")) - set(splits.fit_perturbations("0", "0"))
    # Effects (and with them the panel) belong to the whole fold: they are kept, so that only the location is under test.
    cells = garbage(tiny_screen, out, hidden)
    effects = EffectSet.read(done / "effects.parquet")
    rows = effects.perturbations.isin(hidden)
    rng = np.random.default_rng(1)
    for value in (effects.effect, effects.mean):
        value[rows] += rng.normal(size=(rows.sum(), value.shape[1]))
    effects.write(out / "effects.parquet")
    write_locations(
        cells=cells,
        splits=tiny_screen / "splits.json",
        effects=out / "effects.parquet",
        fold="0",
        features=[
            FeatureSource(kind="coexpression"),
            FeatureSource(kind="gene_sets", path=str(tiny_screen / "annotations.gmt"), min_size=2),
        ],
        location=LocationConfig(max_cells=400),
        clusters=ClustersConfig(),
        seed=1,
        locations=out / "locations.parquet",
        out_clusters=out / "clusters.parquet",
        gene_features=out / "gene_features.parquet",
        gene_names=out / "gene_names.parquet",
    )
    return out


def test_a_models_pseudo_targets_change_nothing_of_it(tiny_screen: Path, done: Path, garbled: Path) -> None:
    """Garbage in fold q's cells: the model's locations stay, and so does where its pseudo-targets stand for debiasing."""
    splits = Splits.read(tiny_screen / "splits.json")
    before, after = (contracts.LOCATIONS.read(folder / "locations.parquet") for folder in (done, garbled))
    pseudo = set(splits.inner("0", "0"))
    for fit, keep in (("0", None), ("all", pseudo)):
        one, two = (
            frame[(frame["fit"] == fit) & (True if keep is None else frame["query"].isin(keep))]
            .reset_index(drop=True)
            .astype({"query": str})
            for frame in (before, after)
        )
        assert len(one)
        pd.testing.assert_frame_equal(one, two, check_categorical=False)
    # The garbage was there to be seen: targets over all training perturbations did move.
    assert not before[before["fit"] == "all"].reset_index(drop=True).equals(after[after["fit"] == "all"].reset_index(drop=True))


def test_a_models_features_do_not_see_its_pseudo_targets(tiny_screen: Path, done: Path, garbled: Path) -> None:
    before, after = (contracts.GENE_FEATURES.read(folder / "gene_features.parquet").astype({"fit": str}) for folder in (done, garbled))
    assert set(before["fit"]) == {"all", "0", "1"}
    assert set(before.loc[before["fit"] != "all", "source"]) == {"coexpression"}
    same = {
        fit: before[before["fit"] == fit]["value"].tolist() == after[after["fit"] == fit]["value"].tolist() for fit in ("all", "0", "1")
    }
    assert same == {"all": False, "0": True, "1": False}


@pytest.mark.parametrize("name", BASELINES)
def test_no_baseline_sees_the_pseudo_targets_it_predicts(tiny_screen: Path, done: Path, garbled: Path, name: str) -> None:
    """Garbage in fold q's cells: what is learned stays. Means of neighbours may use the others of the fold, but never the one predicted."""
    splits = Splits.read(tiny_screen / "splits.json")
    pseudo = splits.inner("0", "0")
    effects, loud = (EffectSet.read(folder / "effects.parquet") for folder in (done, garbled))

    def rows(effects: EffectSet, folder: Path, query: str) -> np.ndarray:
        table = contracts.GENE_FEATURES.read(folder / "gene_features.parquet")
        found = predict_fold(
            BASELINES[name],
            effects=effects,
            locations=LocationSet.read(folder / "locations.parquet", "all", effects.perturbations),
            splits=splits,
            features={fit: join_features(table, fit) for fit in ("all", "0", "1")},
            fold="0",
            seed=1,
        )
        return found.mean[found.rows([query])[0]]

    everyone = name not in ("neighbour_mean", "permuted")
    for query in pseudo:
        own = np.array([everyone or set(query.split("+")) <= set(other.split("+")) for other in effects.perturbations])
        mixed = replace(effects, **{key: np.where(own[:, None], getattr(loud, key), getattr(effects, key)) for key in ("effect", "mean")})
        np.testing.assert_array_equal(rows(mixed, garbled, query), rows(effects, done, query))
    if name != "control":
        # The garbage was there to be seen: a target, which may use all training perturbations, did move.
        target = splits.targets("0")[0]
        assert not np.array_equal(rows(loud, garbled, target), rows(effects, done, target))


def test_same_input_same_bytes(tiny_screen: Path, done: Path, tmp_path: Path) -> None:
    again = run(tiny_screen, tmp_path / "again")
    for name in OUTPUTS:
        assert (again / name).read_bytes() == (done / name).read_bytes(), name


def test_every_query_is_there_and_nobody_is_its_own_neighbour(tiny_screen: Path, done: Path) -> None:
    splits = Splits.read(tiny_screen / "splits.json")
    training, targets = splits.training("0"), splits.targets("0")
    frame = contracts.LOCATIONS.read(done / "locations.parquet").astype({"query": str, "neighbour": str, "fit": str})
    assert set(frame["fit"]) == {"all", "0", "1"}
    whole = frame[frame["fit"] == "all"]
    assert set(whole["query"]) == set(training) | set(targets)
    assert set(whole.loc[whole["role"] == "target", "query"]) == set(targets)
    for q in ("0", "1"):
        fit = frame[frame["fit"] == q]
        assert set(fit["query"]) == set(splits.inner("0", q)) | set(targets)
        assert set(fit["neighbour"]) <= set(splits.fit_perturbations("0", q)) | {"", "control"}
    assert (frame["query"] != frame["neighbour"]).all()
    # Combinations never vouch for their own genes, nor for other singles.
    assert not frame["neighbour"].str.contains("+", regex=False).any()
    total = frame.groupby(["fit", "query"])["weight"].sum()
    located = frame[frame["status"] == "located"].set_index(["fit", "query"]).index.unique()
    np.testing.assert_allclose(total[located], 1, atol=1e-9)
    lost = frame[frame["status"] == "not_locatable"]
    assert (lost["reason"].astype(str) != "").all()
    assert (lost["weight"] == 0).all()
    assert frame["confidence"].between(0, 1).all()
    # As the later stages read it.
    read = LocationSet.read(done / "locations.parquet", "all", pd.Index(training))
    assert read.weights.shape == (len(whole["query"].unique()), len(training) + 1)


def test_embedding_holds_training_pseudo_and_targets(tiny_screen: Path, done: Path) -> None:
    splits = Splits.read(tiny_screen / "splits.json")
    whole = contracts.EMBEDDING.read(done / "embedding0.parquet").astype({"part": str, "perturbation": str, "role": str})
    frame, features = (whole[whole["part"] == part] for part in ("effects", "features"))
    by_role = frame.groupby("role")["perturbation"].unique()
    assert set(by_role["train"]) == set(splits.fit_perturbations("0", "0"))
    located = LocationSet.read(done / "locations.parquet", "0", pd.Index(splits.fit_perturbations("0", "0")))
    found = set(located.queries[(located.info["status"] == "located").to_numpy()])
    assert set(by_role["pseudo"]) | set(by_role["target"]) == found
    wide = frame.pivot_table(index="perturbation", columns="dimension", values="value")
    single = located.select([q for q in sorted(found) if "+" not in q])
    for query, weights in zip(single.queries, single.weights, strict=True):
        np.testing.assert_allclose(wide.loc[query], weights[:-1] @ wide.loc[single.neighbours[:-1]].to_numpy(), atol=1e-9)
    # What is known of genes is there for all of them, and for the control, which has none, its own coordinate.
    assert set(features["perturbation"]) == set(frame["perturbation"])
    known = features.pivot_table(index="perturbation", columns="dimension", values="value")
    assert (known.iloc[:, -1] == (known.index == "control")).all()
    assert not known.loc["control"].iloc[:-1].any()
    train = known.loc[sorted(by_role["train"])].iloc[:, :-1].to_numpy()
    assert (train**2).mean() == pytest.approx(1)
    # Own places are certain; located ones as far as they are from the middle.
    certain = whole[whole["part"] == "certainty"].set_index("perturbation")["value"]
    own, asked = wide.loc[sorted(by_role["train"])].to_numpy(), wide.loc[sorted(found)].to_numpy()
    share = ((asked - own.mean(0)) ** 2).sum(1) / ((own - own.mean(0)) ** 2).sum(1).mean()
    assert 0 < share.min() < 1
    assert set(certain.index) == set(frame["perturbation"])
    np.testing.assert_allclose(certain[sorted(found)], np.minimum(share, 1))
    assert (certain[[*by_role["train"], "control"]] == 1).all()


@pytest.mark.parametrize(("located", "expected"), [([[5.0, 0.0], [3.0, 0.0]], [1.0, 0.25]), ([], [])])
def test_certainty_is_a_share_of_the_spread(located: list, expected: list) -> None:
    own = np.array([[4.0, 0.0], [0.0, 0.0]])
    np.testing.assert_allclose(certainty(own, np.array(located).reshape(-1, 2)), expected)
    assert not certainty(np.ones((3, 2)), own).any()


def test_features_of_combinations_are_sums_and_unknown_genes_are_at_the_mean() -> None:
    random = np.random.default_rng(0)
    names = [f"g{i}" for i in range(12)]
    known = GeneFeatures("a", pd.Index(names), random.normal(size=(12, 30)))
    other = GeneFeatures("b", pd.Index(names[:6]), random.normal(size=(6, 4)))
    learned, queries = [*names[:8], "g0+g9"], ["g10", "g10+g11", "g11", "nobody", "nobody+g10"]
    one, two = feature_coordinates({"a": known, "b": other}, learned, queries, 5)
    assert one.shape == (9, 5)
    assert (one**2).mean() == pytest.approx(1)
    np.testing.assert_allclose(two[1], two[0] + two[2])
    assert not two[3].any()
    np.testing.assert_allclose(two[4], two[0])
    assert feature_coordinates({}, learned, queries, 5)[1].shape == (5, 0)
    # A source that knows few training genes: no axis is left on which they do not differ, whatever the queries do on it.
    few = GeneFeatures("c", pd.Index([*names[:3], "g11"]), random.normal(size=(4, 9)))
    one, two = feature_coordinates({"c": few}, learned, queries, 5)
    assert one.shape[1] == two.shape[1] == 2
    assert np.sqrt((one**2).mean(axis=0)).min() > 1e-2


def test_names_are_reported_and_aliases_found(tiny_screen: Path, done: Path, tmp_path: Path) -> None:
    """A gene under another name in the annotations is found by the user's table."""
    names = contracts.GENE_NAMES.read(done / "gene_names.parquet").astype(
        {"source": str, "gene": str, "rule": str, "role": str, "name": str}
    )
    splits = Splits.read(tiny_screen / "splits.json")
    everyone = {gene for name in [*splits.training("0"), *splits.targets("0")] for gene in name.split("+")}
    assert set(names["gene"]) == everyone
    assert set(names["source"]) == {"coexpression", "gene_sets:annotations"}
    sets = names[names["source"] == "gene_sets:annotations"].set_index("gene")
    gene = sets.index[sets["used"] & (sets["role"] == "training")][0]
    (tmp_path / "annotations.gmt").write_text(
        "\n".join(
            "\t".join("OLDNAME" if field == gene else field for field in line.split("\t"))
            for line in (tiny_screen / "annotations.gmt").read_text().splitlines()
        )
    )
    source = [FeatureSource(kind="gene_sets", path=str(tmp_path / "annotations.gmt"), min_size=2)]
    (tmp_path / "aliases.tsv").write_text(f"symbol\talias\n{gene}\tOLDNAME\n")
    out = run(tiny_screen, tmp_path / "out", features=source, aliases=tmp_path / "aliases.tsv")
    found = contracts.GENE_NAMES.read(out / "gene_names.parquet").astype({"gene": str, "rule": str, "name": str}).set_index("gene")
    assert tuple(found.loc[gene, ["name", "rule", "used"]]) == ("OLDNAME", "alias", True)


def test_gene_of_a_target_that_is_not_measured(tiny_screen: Path, tmp_path: Path) -> None:
    """Fold `all` predicts GENE9999, which no source knows; co-expression alone knows no unmeasured gene."""
    out = run(tiny_screen, tmp_path / "all", fold="all")
    frame = contracts.LOCATIONS.read(out / "locations.parquet")
    row = frame[(frame["query"] == "GENE9999") & (frame["fit"] == "all")].iloc[0]
    assert row["status"] == "not_locatable"
    assert "GENE9999" in row["reason"]
    assert "GENE9999" not in set(contracts.EMBEDDING.read(out / "embedding0.parquet")["perturbation"])


@pytest.mark.parametrize("locator", ["cluster", "kernel", "ridge"])
def test_each_locator_alone(tiny_screen: Path, tmp_path: Path, locator: str) -> None:
    out = run(tiny_screen, tmp_path / locator, locator=locator, features=[FeatureSource(kind="coexpression")])
    frame = contracts.LOCATIONS.read(out / "locations.parquet")
    used = frame.loc[(frame["kind"] == "single") & (frame["status"] == "located"), "locator"].astype(str)
    assert len(used)
    assert used.str.startswith(locator).all()


def test_without_crossfitting_there_are_targets_only(tiny_screen: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("cells.h5ad", "annotations.gmt"):
        (data / name).symlink_to(tiny_screen / name)
    write_splits(data / "cells.h5ad", SplitsConfig(folds=3, crossfit_folds=0), [], 1, data / "splits.json")
    write_moments(data / "cells.h5ad", data / "splits.json", data / "moments.h5ad")
    out = run(data, tmp_path / "out")
    frame = contracts.LOCATIONS.read(out / "locations.parquet")
    assert set(frame["fit"]) == {"all"}
    assert set(frame["role"]) == {"target"}
    roles = contracts.EMBEDDING.read(out / "embeddingall.parquet")["role"].astype(str)
    assert set(roles) == {"train", "control", "target"}


def test_plan_never_learns_from_what_it_locates(tiny_screen: Path, done: Path) -> None:
    splits = Splits.read(tiny_screen / "splits.json")
    plan = Plan.make(EffectSet.read(done / "effects.parquet"), splits, "0", 1)
    for model in (None, "0", "1"):
        hidden = set() if model is None else set(splits.inner("0", model))
        folds = plan.choice(model)
        assert folds
        for learned, queries in folds:
            genes = {gene for name in learned for gene in name.split("+")}
            assert not genes & set(queries)
            assert not hidden & (set(learned) | set(queries))
    asked = [q for _, queries in plan.choice(None) for q in queries]
    assert sorted(asked) == [p for p in plan.training if "+" not in p]
    # Groups are the atoms of every learned set: each set is a union of them.
    groups = learning_groups(plan)
    assert sorted(p for g in groups for p in g) == sorted([*plan.training, "control"])
    for learned in plan.learned_sets():
        assert set(learned) == {p for g in groups if g <= set(learned) for p in g}


@pytest.mark.parametrize(("folds", "crossfit"), [(4, 2), (2, 3), (4, 0)])
def test_eight_perturbations_are_enough(tiny_screen: Path, tmp_path: Path, folds: int, crossfit: int) -> None:
    cells = anndata.read_h5ad(tiny_screen / "cells.h5ad")
    labels = cells.obs["perturbation"].astype(str)
    few = [name for name in sorted(labels.unique()) if "+" not in name and name != "control"][:8]
    cells[labels.isin([*few, "control"])].copy().write_h5ad(tmp_path / "cells.h5ad")
    (tmp_path / "annotations.gmt").symlink_to(tiny_screen / "annotations.gmt")
    write_splits(tmp_path / "cells.h5ad", SplitsConfig(folds=folds, crossfit_folds=crossfit), [], 1, tmp_path / "splits.json")
    write_moments(tmp_path / "cells.h5ad", tmp_path / "splits.json", tmp_path / "moments.h5ad")
    frame = contracts.LOCATIONS.read(run(tmp_path, tmp_path / "out") / "locations.parquet")
    total = frame.groupby(["fit", "query"], observed=True)["weight"].sum()
    located = frame.drop_duplicates(["fit", "query"]).set_index(["fit", "query"])["status"] == "located"
    np.testing.assert_allclose(total, located.reindex(total.index).astype(float), atol=1e-9)
    assert frame["confidence"].max() < 0.95


def test_combinations_are_tried_without_the_cells_of_parts_that_are_taken_as_unmeasured(tiny_screen: Path, done: Path) -> None:
    """A located part is the same whatever its own effect is, and no other part is its neighbour; a measured part is its effect."""
    effects, split = EffectSet.read(done / "effects.parquet"), Splits.read(tiny_screen / "splits.json")
    plan = Plan.make(effects, split, "0", 1)
    source = FeatureSource(kind="gene_sets", path=str(tiny_screen / "annotations.gmt"), min_size=2)
    learner = make_learner(
        tiny_screen / "cells.h5ad", effects, plan, split.targets("0"), [source], LocationConfig(max_cells=400), ClustersConfig(), 1
    )
    ranking = choose(learner, candidates(LocationConfig(locator="ridge"), ["gene_sets:annotations"]), None, "no")[:1]
    values = dict(zip(effects.perturbations, effects.effect, strict=True))
    strength = {name: float(np.linalg.norm(values[name])) for name in singles(list(values))}
    # A double of two genes that the source knows, made up: the plan and what is learned for it do not depend on its effect.
    doubles = ["+".join([name for name in singles(list(values)) if name in set(learner.fixed["gene_sets:annotations"].genes)][:2])]
    values[doubles[0]] = np.random.default_rng(0).normal(size=len(effects.genes))
    trials = {(t.name, t.kind, n): t for n, t in enumerate(combination_trials(learner, ranking, None, values, strength))}
    one = doubles[0].split("+")[0]
    loud = {**values, one: values[one] + 100.0}
    again = {(t.name, t.kind, n): t for n, t in enumerate(combination_trials(learner, ranking, None, loud, strength))}
    kinds = [kind for name, kind, _ in trials if name == doubles[0]]
    assert sorted(kinds) == ["located", "measured", "mixed", "mixed"]
    changed = [not np.allclose(t.terms, again[key].terms) for key, t in trials.items() if key[0] == doubles[0]]
    # Taken as measured it counts (as measured, and as the measured part of the mixed sum); taken as unmeasured it does not.
    assert sum(changed) == 2
    for (name, kind, _), trial in trials.items():
        np.testing.assert_array_equal(trial.truth, values[name])
        if kind == "measured":
            np.testing.assert_allclose(trial.terms.sum(axis=0), np.sum([values[part] for part in name.split("+")], axis=0))


@dataclass(frozen=True)
class Given:
    """A locator whose weights are given: gene -> measured perturbation -> weight."""

    weights: dict[str, dict[str, float]]
    label: str = "given"

    def locate(self, queries: list[str], known: Known) -> Located:
        rows = np.array([[self.weights[query].get(name, 0.0) for name in known.measured] for query in queries])
        return Located(rows, np.ones(len(queries)), np.full(len(queries), "", dtype=object))


def tried(weights: dict[str, dict[str, float]]) -> tuple[dict[str, np.ndarray], list]:
    """Values of A, B, C, D and A+B, and the trials of A+B. A and B are located in one fold each; the other is measured there."""
    names = ["A", "A+B", "B", "C", "D"]
    values = dict(zip(names, np.random.default_rng(0).normal(size=(5, 6)), strict=True))
    plan = Plan(names, {"all": (names, [])}, [("all", ["A"]), ("all", ["B"])])
    learner = SimpleNamespace(plan=plan, known=lambda learned: Known(singles(learned), singles(learned), {}, lambda: None))
    ranking = [Ranked(Given(weights), 0.5, Confidence(np.zeros(1), np.full(1, 0.5)))]
    return values, list(combination_trials(learner, ranking, None, values, dict.fromkeys("ABCD", 1.0)))


def test_only_located_parts_are_barred_from_the_trials() -> None:
    values, found = tried({"A": {"B": 0.5, "C": 0.25, "D": 0.25}, "B": {"A": 0.6, "C": 0.4}})
    a, b, c, d = (values[name] for name in "ABCD")
    mixed = [trial.terms for trial in found if trial.kind == "mixed"]
    np.testing.assert_allclose(mixed[0], [a, 0.6 * a + 0.4 * c])
    np.testing.assert_allclose(mixed[1], [b, 0.5 * b + 0.25 * c + 0.25 * d])
    both = next(trial.terms for trial in found if trial.kind == "located")
    np.testing.assert_allclose(both, [0.5 * (c + d) + c])


@pytest.mark.parametrize("weights", [{"B": 1.0}, {"B": 0.95, "C": 1.0, "D": -0.95}])
def test_there_is_no_trial_where_barred_neighbours_leave_too_little(weights) -> None:
    """Neither the barred neighbour itself nor what is left blown up twenty-fold; with B taken as measured it is a neighbour."""
    _, found = tried({"A": weights, "B": {"C": 1.0}})
    assert sorted(trial.kind for trial in found) == ["measured", "mixed", "mixed"]


def test_trials_are_compared_with_the_mean_of_the_others() -> None:
    values, found = tried({"A": {"C": 1.0}, "B": {"C": 1.0}})
    others = np.mean([values[name] for name in "ABCD"], axis=0)
    assert [trial.base for trial in found] == pytest.approx([((values["A+B"] - others) ** 2).sum()] * 4)


def test_targets_below_the_least_confidence_are_turned_away(tiny_screen: Path, done: Path, tmp_path: Path) -> None:
    """Targets alone, and only where debiasing looks them up; the default turns nobody away."""
    strict = contracts.LOCATIONS.read(run(tiny_screen, tmp_path / "strict", min_confidence=1.0) / "locations.parquet").astype({"fit": str})
    plain = contracts.LOCATIONS.read(done / "locations.parquet").astype({"fit": str})
    away = (plain["fit"] == "all") & (plain["role"] == "target")
    pd.testing.assert_frame_equal(
        plain[~away].reset_index(drop=True).astype({"query": str}),
        strict[~((strict["fit"] == "all") & (strict["role"] == "target"))].reset_index(drop=True).astype({"query": str}),
        check_categorical=False,
    )
    turned = strict[(strict["fit"] == "all") & (strict["role"] == "target")]
    assert set(turned["query"]) == set(Splits.read(tiny_screen / "splits.json").targets("0"))
    assert set(turned["status"]) == {"not_locatable"}
    assert turned["reason"].astype(str).str.contains("below the 1.00 asked for").any()
