"""Does the simulated screen have the properties that its docstring promises?"""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from dbdiffusion.config.datasets import SimulateDataset
from dbdiffusion.data import simulate
from dbdiffusion.data.normalise import TARGET_SUM
from dbdiffusion.data.simulate import MITO, TRUTH, write_screen
from dbdiffusion.runtime.errors import UserError

CONFIG = SimulateDataset(perturbations=24, doubles=4, genes=200, programmes=4, cells_per_perturbation=60, cells_per_control_guide=120)


def make(folder: Path, config: SimulateDataset) -> Path:
    write_screen(config, counts=folder / "counts.h5ad", annotations=folder / "sets.gmt", truth=folder / "truth.parquet")
    return folder


@pytest.fixture(scope="module")
def screen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("screen"), CONFIG)


@pytest.fixture(scope="module")
def table(screen: Path) -> anndata.AnnData:
    return anndata.read_h5ad(screen / "counts.h5ad")


@pytest.fixture(scope="module")
def truth(screen: Path) -> pd.DataFrame:
    frame = TRUTH.read(screen / "truth.parquet")
    return frame.astype(dict.fromkeys(("perturbation", "gene", "programme", "kind"), str))


def info(truth: pd.DataFrame) -> pd.DataFrame:
    return truth.drop_duplicates("perturbation").set_index("perturbation")


def lfc(truth: pd.DataFrame, column: str = "lfc") -> pd.DataFrame:
    return truth.pivot(index="perturbation", columns="gene", values=column)


def test_layout(table: anndata.AnnData) -> None:
    assert table.var_names.is_unique
    assert table.obs_names.is_unique
    assert table.n_vars == CONFIG.genes + len(MITO)
    assert {"perturbation", "guide", "batch", "total_counts"} == set(table.obs)
    assert np.array_equal(table.X.data, np.rint(table.X.data))
    assert table.X.data.min() > 0
    # Unmeasured genes hold most of the library.
    share = np.asarray(table.X.sum(axis=1)).ravel() / table.obs["total_counts"].to_numpy()
    assert (share < 0.95).all()
    assert 0.1 < np.median(share) < 0.6
    controls = table.obs[table.obs["perturbation"] == "control"]["guide"].astype(str).value_counts()
    assert len(controls) == CONFIG.control_guides
    assert (controls == CONFIG.cells_per_control_guide).all()
    guides = table.obs[table.obs["perturbation"] != "control"].groupby("perturbation", observed=True)["guide"].nunique()
    assert (guides == 2).all()
    assert all(label == "+".join(sorted(label.split("+"))) for label in table.obs["perturbation"].unique())


def test_kinds(table: anndata.AnnData, truth: pd.DataFrame) -> None:
    kinds = info(truth)["kind"].value_counts()
    assert kinds["outside"] == 1
    assert kinds["unmeasured"] == 1
    assert kinds["double"] == CONFIG.doubles
    assert kinds["null"] == round(CONFIG.null_share * CONFIG.perturbations)
    assert kinds.drop("double").sum() == CONFIG.perturbations
    singles = info(truth).query("kind != 'double'")
    unmeasured = singles.index[singles["kind"] == "unmeasured"]
    assert not set(unmeasured) & set(table.var_names)
    assert set(singles.index) - set(unmeasured) <= set(table.var_names)
    effects = lfc(truth)
    assert (effects.loc[info(truth)["kind"] == "null"] == 0).all().all()
    assert (effects.loc[info(truth)["kind"] != "null"] != 0).sum(axis=1).min() > 0
    assert (effects[list(MITO)] == 0).all().all()


def test_negative_binomial_mean_and_variance(table: anndata.AnnData) -> None:
    """Variance exceeds the mean as a negative binomial's does: Poisson in low genes, quadratic in high ones."""
    control = table[table.obs["perturbation"] == "control", ~table.var["mito"]]
    counts = control.X.toarray().astype(float)
    size = control.obs["total_counts"].to_numpy()
    size = size / size.mean()
    mean = counts.mean(axis=0)
    expected = np.outer(size, counts.sum(axis=0) / size.sum())
    dispersion = ((counts - expected) ** 2 - expected).sum(axis=0) / (expected**2).sum(axis=0).clip(1e-9)
    assert (dispersion[mean > 1] > 0.05).mean() > 0.95
    assert 0.15 < np.median(dispersion[mean > 1]) < 0.6
    low = mean < 0.1
    assert low.mean() > 0.05
    assert abs(np.median(counts[:, low].var(axis=0) / mean[low].clip(1e-9)) - 1) < 0.3
    # Zeros as a negative binomial with these moments would have them.
    some = (mean > 0.2) & (mean < 5)
    zeros = (1 + dispersion[some] * expected[:, some]) ** (-1 / dispersion[some])
    assert np.abs((counts[:, some] == 0).mean(axis=0) - zeros.mean(axis=0)).mean() < 0.03


def test_truth_is_the_log_fold_change_of_the_mean(tmp_path: Path) -> None:
    """Over many cells the observed log fold change approaches lfc_mixed; without depth shift and batches nothing else is in it."""
    config = SimulateDataset(
        perturbations=8, doubles=1, genes=60, programmes=2, batches=1, cells_per_perturbation=3000, control_guides=8,
        cells_per_control_guide=1000, depth_confounding=0.0, escaper_share=0.3,
    )  # fmt: skip
    folder = make(tmp_path, config)
    table = anndata.read_h5ad(folder / "counts.h5ad")
    frame = TRUTH.read(folder / "truth.parquet").astype({"perturbation": str, "gene": str})
    expected = lfc(frame, "lfc_mixed")[list(table.var_names)]
    depth = table.obs["total_counts"].to_numpy()
    scaled = table.X.toarray() * (TARGET_SUM / depth.mean())
    control = scaled[table.obs["perturbation"] == "control"]
    high = (control.mean(axis=0) > 3) & ~table.var["mito"].to_numpy()
    for name in expected.index:
        mean = scaled[table.obs["perturbation"] == name].mean(axis=0)
        error = np.log(mean[high] / control.mean(axis=0)[high]) - expected.loc[name].to_numpy()[high]
        # Batches of one are a constant factor of all cells; the perturbation's own depth shift is off.
        assert np.abs(error).mean() < 0.06, name
    assert not np.allclose(expected, lfc(frame)[list(table.var_names)], atol=0.02)
    # On the scale of the estimates: differences in mean ln(1 + CP10k), sparse genes included.
    expected = lfc(frame, "effect")[list(table.var_names)]
    values = np.log1p(table.X.toarray() * (TARGET_SUM / depth[:, None]))
    base = values[table.obs["perturbation"] == "control"].mean(axis=0)
    found = np.array([values[table.obs["perturbation"] == name].mean(axis=0) - base for name in expected.index])
    # The observed differences have standard errors of 0.01 to 0.02.
    assert np.abs(found - expected.to_numpy()).mean() < 0.02
    large = np.abs(expected.to_numpy()) > 0.1
    assert large.sum() > 50
    slope = (found[large] * expected.to_numpy()[large]).sum() / (expected.to_numpy()[large] ** 2).sum()
    assert 0.95 < slope < 1.05
    # What is left is noise of the cells.
    spread = np.array([values[table.obs["perturbation"] == name].std(axis=0) for name in expected.index])
    z = (found - expected.to_numpy()) / (spread * np.sqrt(1 / 3000 + 1 / 8000))
    assert 0.8 < z.std() < 1.3


def test_escapers_shrink_effects(truth: pd.DataFrame) -> None:
    some = truth[(truth["lfc"].abs() > 0.1) & (truth["escapers"] > 0.01)]
    assert (some["lfc_mixed"].abs() < some["lfc"].abs()).all()
    assert 0.05 < info(truth)["escapers"].mean() < 0.3
    assert info(truth)["escapers"].std() > 0


def test_perturbed_genes_are_knocked_down(truth: pd.DataFrame) -> None:
    own = truth[(truth["perturbation"] == truth["gene"]) & (truth["kind"] != "null")]
    low, high = np.log(simulate.KNOCK_DOWN)
    assert len(own) > 10
    assert own["lfc"].between(low, high).all()


def test_doubles_are_nearly_additive(truth: pd.DataFrame) -> None:
    effects = lfc(truth)
    for name in info(truth).query("kind == 'double'").index:
        a, b = name.split("+")
        total = effects.loc[a] + effects.loc[b]
        left = effects.loc[name] - total
        assert 0 < left.std() < 0.5 * total.std()


def test_programmes_share_effects(truth: pd.DataFrame) -> None:
    """Perturbations of one programme resemble each other, in size; others do not."""
    table = info(truth).query("kind == 'programme'")
    similar = np.abs(np.corrcoef(lfc(truth).loc[table.index].to_numpy()))
    programmes = table["programme"].to_numpy()
    alone = np.array(["," not in label for label in programmes])
    same = (programmes[:, None] == programmes) & ~np.eye(len(table), dtype=bool) & np.outer(alone, alone)
    other = (programmes[:, None] != programmes) & np.outer(alone, alone)
    assert same.any()
    assert similar[same].mean() > 0.5
    assert similar[other].mean() < 0.25


@pytest.mark.parametrize("seed", range(4))
def test_the_outside_gene_belongs_to_no_programme(tmp_path: Path, seed: int) -> None:
    """Neither as a target nor in a set of regulators, or it could be located."""
    config = CONFIG.model_copy(update={"seed": seed, "own_effect_sd": 0.0, "annotation_noise": 0.0, "doubles": 0})
    folder = make(tmp_path, config)
    frame = TRUTH.read(folder / "truth.parquet").astype({"perturbation": str, "gene": str, "kind": str})
    (outside,) = info(frame).query("kind == 'outside'").index
    assert (lfc(frame)[outside] != 0).sum() == 1
    assert not any(outside in members for name, members in read_sets(folder / "sets.gmt").items() if not name.startswith("RANDOM"))


def test_regulators_are_coexpressed_with_their_programme_in_controls(table: anndata.AnnData, truth: pd.DataFrame) -> None:
    """In control cells alone, a regulator's correlation with the genes it moves has the sign its loss tells, above chance."""
    control = table[table.obs["perturbation"] == "control"]
    values = np.log1p(control.X.toarray() * (TARGET_SUM / control.obs["total_counts"].to_numpy())[:, None])
    column = {gene: at for at, gene in enumerate(control.var_names)}
    effects = lfc(truth)[list(control.var_names)].to_numpy()
    order = {name: at for at, name in enumerate(lfc(truth).index)}
    standard = (values - values.mean(axis=0)) / values.std(axis=0).clip(1e-9)

    def agreement(name: str) -> float:
        correlation = standard[:, column[name]] @ standard / len(standard)
        others = np.arange(len(column)) != column[name]
        return float(np.corrcoef(correlation[others], -effects[order[name]][others])[0, 1])

    table_ = info(truth)
    programme = [agreement(name) for name in table_.index[table_["kind"] == "programme"]]
    outside = [agreement(name) for name in table_.index[table_["kind"] == "outside"]]
    assert np.median(programme) > 0.3
    assert np.mean(np.array(programme) > 0) > 0.8
    assert abs(outside[0]) < 0.3


def read_sets(path: Path) -> dict[str, set[str]]:
    return {line.split("\t")[0]: set(line.split("\t")[2:]) for line in path.read_text().splitlines()}


def enrichment(folder: Path, truth: pd.DataFrame) -> float:
    """How much oftener two perturbations of one programme share a set than two of different programmes."""
    sets = read_sets(folder / "sets.gmt")
    table = info(truth).query("kind in ('programme', 'unmeasured')")
    share = {True: [], False: []}
    names = list(table.index)
    for at, a in enumerate(names):
        for b in names[at + 1 :]:
            same = bool(set(table.at[a, "programme"].split(",")) & set(table.at[b, "programme"].split(",")))
            share[same].append(any({a, b} <= members for members in sets.values()))
    return float(np.mean(share[True]) - np.mean(share[False]))


def test_annotations_tell_programmes(screen: Path, truth: pd.DataFrame, tmp_path: Path) -> None:
    assert enrichment(screen, truth) > 0.4
    sets = read_sets(screen / "sets.gmt")
    assert sum(name.startswith("RANDOM") for name in sets) == 2 * CONFIG.programmes
    unmeasured = info(truth).query("kind == 'unmeasured'")
    regulators = sets[f"{unmeasured['programme'].iloc[0]}_REGULATORS"]
    assert unmeasured.index[0] in regulators
    useless = make(tmp_path, CONFIG.model_copy(update={"annotation_noise": 1.0}))
    assert enrichment(useless, truth) < 0.2


def test_depth_is_confounded_with_perturbation(table: anndata.AnnData, tmp_path: Path) -> None:
    def spread(found: anndata.AnnData) -> float:
        log_depth = np.log(found.obs["total_counts"])
        return float(log_depth.groupby(found.obs["perturbation"].to_numpy()).mean().std())

    strong = make(tmp_path, CONFIG.model_copy(update={"depth_confounding": 0.5}))
    assert spread(anndata.read_h5ad(strong / "counts.h5ad")) > 2 * spread(table)


def test_some_cells_are_for_quality_control(table: anndata.AnnData) -> None:
    mito = np.asarray(table[:, list(MITO)].X.sum(axis=1)).ravel() / table.obs["total_counts"].to_numpy()
    assert 0.003 < (mito > 0.25).mean() < 0.05
    assert np.median(mito) < 0.1


def test_same_seed_same_bytes(screen: Path, tmp_path: Path) -> None:
    again = make(tmp_path, CONFIG)
    for name in ("counts.h5ad", "sets.gmt", "truth.parquet"):
        assert (again / name).read_bytes() == (screen / name).read_bytes(), name
    (tmp_path / "other").mkdir()
    other = make(tmp_path / "other", CONFIG.model_copy(update={"seed": 2}))
    assert (other / "truth.parquet").read_bytes() != (screen / "truth.parquet").read_bytes()


def test_more_perturbations_than_genes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="51 perturbations of 50 genes"):
        make(tmp_path, SimulateDataset(perturbations=51, genes=50))
    assert not list(tmp_path.iterdir())


def test_smallest_screen(tmp_path: Path) -> None:
    """The smallest values that the config accepts still make a screen of every kind."""
    config = SimulateDataset(
        perturbations=8, doubles=0, genes=50, programmes=1, batches=1, cells_per_perturbation=5, control_guides=1,
        cells_per_control_guide=5, null_share=0.99, escaper_share=0.0, depth_confounding=0.0, own_effect_sd=0.0,
    )  # fmt: skip
    folder = make(tmp_path, config)
    kinds = set(TRUTH.read(folder / "truth.parquet")["kind"].astype(str))
    assert kinds == set(simulate.KINDS) - {"double"}
