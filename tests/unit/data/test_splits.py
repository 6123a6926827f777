"""Folds, cross-fit folds and halves: what must hold for every seed and screen."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError
from scipy import sparse

from dbdiffusion.config.splits import SplitsConfig
from dbdiffusion.data.normalise import open_cells
from dbdiffusion.data.splits import Splits, _effect_strength, assign_folds, crossfit_names, fold_names, parts, write_splits
from dbdiffusion.runtime.errors import UserError


def make_cells(path: Path, seed: int = 0, *, singles: int = 14, doubles: int = 7, genes: int = 12) -> Path:
    """A screen of small perturbations with uneven numbers of cells, guides and batches; one double has no measured part."""
    random = np.random.default_rng(seed)
    names = [f"G{number:02d}" for number in range(singles)]
    pairs = [(a, b) for at, a in enumerate(names) for b in names[at + 1 :]]
    names += ["+".join(pairs[at]) for at in random.permutation(len(pairs))[:doubles]]
    names += ["X1+X2"] if doubles else []
    labels = np.concatenate([np.repeat(name, random.integers(2, 25)) for name in names] + [np.repeat("control", 61)])
    labels = random.permutation(labels)
    rate = {name: random.gamma(2, 1, genes) for name in [*names, "control"]}
    counts = np.array([random.poisson(rate[label]) for label in labels], dtype=np.float32)
    obs = pd.DataFrame(
        {
            "perturbation": labels,
            "guide": [f"{label}g{random.integers(3)}" for label in labels],
            "batch": random.integers(2, size=len(labels)).astype(str),
            "total_counts": counts.sum(axis=1).astype(float) + 5,
        },
        index=[f"c{at}" for at in range(len(labels))],
    )
    table = anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=[f"y{at}" for at in range(genes)]))
    table.write_h5ad(path)
    return path


def make(folder: Path, config: SplitsConfig, targets: list[str] | None = None, seed: int = 1, cells: Path | None = None) -> Splits:
    cells = cells or make_cells(folder / "cells.h5ad")
    write_splits(cells, config, targets or [], seed, folder / "splits.json")
    return Splits.read(folder / "splits.json")


def holds(name: str, held: set[str]) -> bool:
    return name in held or bool(held & set(parts(name)))


@pytest.mark.parametrize("combinations", ["with_genes", "any"])
@pytest.mark.parametrize("stratify", [["effect", "cells"], ["cells"], ["effect"], []])
def test_invariants(tmp_path: Path, combinations: str, stratify: list[str]) -> None:
    for seed in range(3):
        cells = make_cells(tmp_path / f"{seed}.h5ad", seed)
        config = SplitsConfig(folds=4, crossfit_folds=3, combinations=combinations, stratify=stratify)
        splits = make(tmp_path, config, ["NEW", "Z+A"], seed, cells)
        everyone = sorted(set(anndata.read_h5ad(cells).obs["perturbation"]) - {"control"})
        assert splits.measured == everyone
        assert splits.fold_names == ["0", "1", "2", "3", "all"] == fold_names(config, ["NEW"])
        assert splits.targets("all") == ["A+Z", "NEW"]
        assert splits.training("all") == everyone
        outer = [splits.targets(fold) for fold in splits.fold_names[:-1]]
        # Every measured perturbation is held out exactly once.
        assert sorted(sum(outer, [])) == everyone
        assert all(outer)
        for fold in splits.fold_names:
            targets, training = splits.targets(fold), splits.training(fold)
            if fold != "all":
                assert training == [name for name in everyone if not holds(name, set(targets))]
            inner = [splits.inner(fold, q) for q in splits.crossfit_names(fold)]
            assert splits.crossfit_names(fold) == ["0", "1", "2"] == crossfit_names(config)
            # Every training perturbation is a pseudo-target exactly once, and its model never sees it.
            assert sorted(sum(inner, [])) == training
            assert all(inner)
            for q, pseudo in enumerate(inner):
                fit = splits.fit_perturbations(fold, str(q))
                assert fit == [name for name in training if not holds(name, set(pseudo))]
                assert fit
        if combinations == "with_genes":
            for name in everyone:
                homes = [fold for fold in splits.fold_names[:-1] if name in splits.targets(fold)]
                genes = [gene for gene in parts(name) if gene in everyone]
                if len(parts(name)) > 1 and genes:
                    assert any(gene in splits.targets(homes[0]) for gene in genes)


def test_folds_have_equal_size(tmp_path: Path) -> None:
    splits = make(tmp_path, SplitsConfig(folds=4, crossfit_folds=0))
    singles = [sum(len(parts(name)) == 1 for name in splits.targets(fold)) for fold in splits.fold_names]
    assert max(singles) - min(singles) <= 1


def test_folds_are_balanced() -> None:
    """Strong and weak, large and small perturbations spread over the folds, more evenly than at random."""
    random = np.random.default_rng(0)
    names = [f"G{number:03d}" for number in range(60)]
    table = pd.DataFrame({"cells": random.integers(20, 500, 60), "effect": random.lognormal(3, 1, 60)}, index=names)

    def spread(stratify: list[str], column: str) -> float:
        config = SplitsConfig(stratify=stratify)
        found = [assign_folds(table, 5, config, seed, "outer") for seed in range(12)]
        values = np.log(table[column])
        return float(np.mean([np.std([values[names].mean() for names in folds]) for folds in found]))

    assert spread(["effect"], "effect") < 0.3 * spread([], "effect")
    assert spread(["cells"], "cells") < 0.3 * spread([], "cells")
    assert spread(["effect", "cells"], "effect") < 0.75 * spread([], "effect")
    assert spread(["effect", "cells"], "cells") < 0.6 * spread([], "cells")


def test_combinations_spread_over_folds() -> None:
    """A hub gene's combinations may go to their other gene's fold, so that no fold takes them all."""
    names = [f"G{number}" for number in range(10)] + [f"G0+G{number}" for number in range(1, 10)]
    table = pd.DataFrame({"cells": 50, "effect": 1.0}, index=names)
    folds = assign_folds(table, 5, SplitsConfig(), 3, "outer")
    assert max(sum("+" in name for name in fold) for fold in folds) <= 5


@pytest.mark.parametrize("seed", range(5))
def test_halves(tmp_path: Path, seed: int) -> None:
    cells = make_cells(tmp_path / "cells.h5ad", seed)
    splits = make(tmp_path, SplitsConfig(folds=3, crossfit_folds=2), seed=seed, cells=cells)
    obs = anndata.read_h5ad(cells).obs.astype(str)
    assert set(splits.halves) == {"A", "B"}
    assert len(splits.halves) == len(obs)
    sign = np.where(splits.halves == "A", 1, -1)
    for columns in (["perturbation"], ["perturbation", "guide"], ["perturbation", "guide", "batch"]):
        assert pd.Series(sign, index=obs.index).groupby([obs[column] for column in columns]).sum().abs().max() <= 1
    # The odd cell falls to either half.
    odd = pd.Series(sign, index=obs.index).groupby(obs["perturbation"]).sum()
    assert {1, -1} <= set(odd)
    other = make(tmp_path, SplitsConfig(folds=3, crossfit_folds=2), seed=seed + 100, cells=cells)
    assert 0.3 < (other.halves == splits.halves).mean() < 0.7


def replace_counts(cells: Path, out: Path, victim: str) -> Path:
    table = anndata.read_h5ad(cells)
    at = np.flatnonzero(table.obs["perturbation"].astype(str) == victim)
    counts = table.X.toarray()
    counts[at] = np.random.default_rng(5).poisson(40, counts[at].shape)
    table.X = sparse.csr_matrix(counts)
    table.write_h5ad(out)
    return out


def test_splits_by_cell_number_never_look_at_counts(tmp_path: Path) -> None:
    """A held-out target's counts can be replaced by garbage without a change of a byte."""
    cells = make_cells(tmp_path / "cells.h5ad")
    garbage = replace_counts(cells, tmp_path / "garbage.h5ad", "G03")
    for stratify in (["cells"], []):
        config = SplitsConfig(folds=4, crossfit_folds=3, stratify=stratify)
        write_splits(cells, config, [], 1, tmp_path / "a.json")
        write_splits(garbage, config, [], 1, tmp_path / "b.json")
        assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_inner_folds_never_look_at_held_out_counts(tmp_path: Path) -> None:
    """Stratified by effect, the inner folds are still the same whatever the held-out perturbation's counts are."""
    cells = make_cells(tmp_path / "cells.h5ad")
    config = SplitsConfig(scheme="leave_one_out", held_out=["G03"], crossfit_folds=3, stratify=["effect", "cells"])
    write_splits(cells, config, [], 1, tmp_path / "a.json")
    write_splits(replace_counts(cells, tmp_path / "g.h5ad", "G03"), config, [], 1, tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    # ... and they do look at training perturbations' counts.
    changed = [replace_counts(cells, tmp_path / f"{name}.h5ad", name) for name in ("G00", "G01", "G02", "G04", "G05", "G06")]
    found = set()
    for at, path in enumerate(changed):
        write_splits(path, config, [], 1, tmp_path / f"{at}.json")
        found.add((tmp_path / f"{at}.json").read_bytes())
    assert len(found | {(tmp_path / "a.json").read_bytes()}) > 1


def test_effect_strength(tmp_path: Path) -> None:
    """Against a loop over perturbations and genes; one perturbation's strength does not depend on another's cells."""
    cells = make_cells(tmp_path / "cells.h5ad")
    table = anndata.read_h5ad(cells)
    labels = table.obs["perturbation"].astype(str).to_numpy()
    names = sorted(set(labels) - {"control"})
    values = np.log1p(table.X.toarray() * 1e4 / table.obs["total_counts"].to_numpy()[:, None])
    control = values[labels == "control"]
    expected = []
    for name in names:
        own = values[labels == name]
        expected.append(sum(abs(own[:, j].mean() - control[:, j].mean()) / control[:, j].std() for j in range(table.n_vars)))
    with open_cells(cells) as file:
        found = _effect_strength(file, names)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    with open_cells(replace_counts(cells, tmp_path / "garbage.h5ad", "G03")) as file:
        changed = _effect_strength(file, names)
    others = np.array(names) != "G03"
    assert np.array_equal(changed[others], found[others])
    assert changed[~others] != found[~others]


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    cells = make_cells(tmp_path / "cells.h5ad")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_splits(cells, SplitsConfig(folds=4), ["NEW"], seed, tmp_path / f"{name}.json")
    a, b, c = ((tmp_path / f"{name}.json").read_bytes() for name in "abc")
    assert a == b != c
    Splits.read(tmp_path / "a.json").write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == a


def test_leave_one_out(tmp_path: Path) -> None:
    cells = make_cells(tmp_path / "cells.h5ad")
    config = SplitsConfig(scheme="leave_one_out", held_out=["G03", "G11"], crossfit_folds=0)
    splits = make(tmp_path, config, cells=cells)
    assert splits.fold_names == ["0", "1"] == config.fold_names([])
    assert splits.targets("0") == ["G03"]
    assert splits.targets("1") == ["G11"]
    assert all("G03" not in parts(name) for name in splits.training("0"))
    assert "G11" in splits.training("0")
    assert splits.crossfit_names("0") == ["all"]
    assert splits.inner("0", "all") == []
    assert splits.fit_perturbations("0", "all") == splits.training("0")


def test_no_outer_folds(tmp_path: Path) -> None:
    splits = make(tmp_path, SplitsConfig(scheme="none"), ["NEW"])
    assert splits.fold_names == ["all"]
    assert splits.training("all") == splits.measured
    assert len(splits.crossfit_names("all")) == 3
    # Combinations with an unmeasured target's gene are measured cells of other perturbations, and stay.
    assert make(tmp_path, SplitsConfig(scheme="none"), ["X1"]).training("all") == splits.measured


def test_many_folds_keep_their_order(tmp_path: Path) -> None:
    splits = make(tmp_path, SplitsConfig(folds=12, crossfit_folds=2), ["NEW"])
    assert splits.fold_names == [*map(str, range(12)), "all"]


@pytest.mark.parametrize(
    ("config", "targets", "message"),
    [
        (SplitsConfig(folds=30), [], "30 folds of 15 perturbations.*\n.*at most 15"),
        (SplitsConfig(folds=2, crossfit_folds=14), [], "splits.crossfit_folds.*14 folds"),
        (SplitsConfig(), ["G03"], "'G03' is measured"),
        (SplitsConfig(), ["control"], "'control' is measured"),
        (SplitsConfig(scheme="none"), [], "nothing to predict"),
        (SplitsConfig(scheme="leave_one_out", held_out=["G33"]), [], "'G33' is not a measured.*\n.*'G03'"),
    ],
)
def test_impossible(tmp_path: Path, config: SplitsConfig, targets: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(tmp_path, config, targets)
    assert not (tmp_path / "splits.json").exists()


def test_impossible_configs() -> None:
    for values in ({"scheme": "leave_one_out"}, {"crossfit_folds": 1}, {"held_out": ["A", "A"]}):
        with pytest.raises(ValidationError):
            SplitsConfig(**values)


def test_unknown_names(tmp_path: Path) -> None:
    splits = make(tmp_path, SplitsConfig(folds=3))
    with pytest.raises(UserError, match="no fold '7'"):
        splits.targets("7")
    with pytest.raises(UserError, match="no cross-fit model 'all'"):
        splits.inner("0", "all")
    with pytest.raises(UserError, match="other cells"):
        splits.check_cells(["a", "b"])
    with pytest.raises(UserError, match="file not found"):
        Splits.read(tmp_path / "none.json")
