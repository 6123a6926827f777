from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from dbdiffusion.config.inference import InferenceConfig
from dbdiffusion.data.sets import MeanSet
from dbdiffusion.inference import debias, table
from dbdiffusion.runtime import contracts
from dbdiffusion.runtime.errors import UserError

NUMBERS = ("estimate", "lfc", "se", "df", "ci_low", "ci_high", "p_t", "q_t", "lambda", "k_eff", "confidence")


def run(paths, **changes):
    table.write_de(
        effects=paths.effects,
        locations=paths.locations,
        means=paths.means,
        config=InferenceConfig(**changes),
        fold="0",
        seed=1,
        out=paths.de,
    )
    return contracts.DE.read(paths.de).astype({"call": str, "reason": str, "method": str, "target": str})


def with_info(screen, targets, **values):
    info = screen.locations.info.copy()
    for column, value in values.items():
        info.loc[targets, column] = value
    return replace(screen, locations=replace(screen.locations, info=info))


@pytest.fixture(scope="module")
def written(screen, make_fold, tmp_path_factory):
    paths = make_fold(tmp_path_factory.mktemp("fold"), screen)
    return paths, run(paths)


def test_every_method_target_and_gene_has_a_row_without_missing_numbers(written, screen):
    _, frame = written
    assert set(frame["method"]) == {"stacked", "dbdiffusion", "neighbour_mean"}
    assert len(frame) == 3 * len(screen.targets) * len(screen.effects.genes)
    assert np.isfinite(frame[list(NUMBERS)].to_numpy()).all()
    assert frame.loc[frame["method"] != "neighbour_mean", "q_selection"].notna().all()
    assert frame.loc[frame["method"] == "neighbour_mean", "p_selection"].isna().all()


def test_the_default_prediction_comes_first(written):
    _, frame = written
    assert frame["method"].unique().tolist() == ["stacked", "dbdiffusion", "neighbour_mean"]
    assert all(part.equals(part.sort_values(["target", "gene"])) for _, part in frame.groupby("method"))


def test_columns_agree_with_each_other(written):
    _, frame = written
    assert np.allclose(frame["estimate"] - frame["control_mean"], frame["lfc"])
    assert ((frame["ci_low"] <= frame["lfc"]) & (frame["lfc"] <= frame["ci_high"])).all()
    called = frame[frame["call"].isin(["up", "down"])]
    assert len(called)
    assert (np.sign(called["lfc"]) == np.where(called["call"] == "up", 1, -1)).all()
    decides = called["q_direction"].fillna(called["q_t"])
    assert (decides <= 0.1).all()
    assert frame["lambda"].between(0, 1).all()


@pytest.mark.parametrize("test", contracts.TESTS)
def test_the_chosen_test_makes_the_call(screen, make_fold, tmp_path, test):
    frame = run(make_fold(tmp_path, screen), calls=test)
    own = frame[(frame["method"] == "stacked") & (frame["call"] != "no_call")]
    calibrated = test != "t"
    assert own["q_direction"].notna().all() == own["q_selection"].notna().all() == calibrated
    called = own["call"].isin(["up", "down"])
    assert called.any()
    assert np.array_equal(called, (own[contracts.TESTS[test]] <= 0.1) & (own["lfc"] != 0))


def test_pseudo_targets_show_directions_beyond_the_error_of_the_control(screen):
    inference = table.infer(screen.effects, screen.locations, screen.means, InferenceConfig(), 1, select=False)
    cross = table.cross_predictions(inference, "stacked")
    control = inference.screen.control_sampling
    off = control / (cross.estimate.variance + control) * cross.estimate.effect
    want = np.sign(cross.observed - off) == np.sign(cross.estimate.effect)
    assert np.array_equal(table.score_pseudo_targets(inference, "stacked", 1)["single"].agrees, want)


def test_a_control_smaller_than_a_perturbation_tells_no_direction(screen, make_fold, tmp_path, caplog):
    few = replace(screen, effects=replace(screen.effects, control_n=int(np.median(screen.effects.n_cells)) - 1))
    frame = run(make_fold(tmp_path / "direction", few))
    assert "fewer than the typical perturbation" in caplog.text
    own = frame[frame["method"] == "stacked"]
    assert (own["q_direction"] == 1).all()
    assert not own["call"].isin(["up", "down"]).any()
    caplog.clear()
    frame = run(make_fold(tmp_path / "selection", few), calls="selection")
    assert not caplog.text
    assert frame.loc[frame["method"] == "stacked", "call"].isin(["up", "down"]).any()


def test_same_input_same_bytes(written, screen, make_fold, tmp_path):
    paths, _ = written
    again = make_fold(tmp_path, screen)
    run(again)
    assert again.de.read_bytes() == paths.de.read_bytes()


def test_doubling_the_generated_cells_changes_no_call(written, screen, make_fold, tmp_path):
    _, before = written
    means = {name: replace(m, mc_variance=m.mc_variance / 2) for name, m in screen.means.items()}
    after = run(make_fold(tmp_path, replace(screen, means=means)))
    assert (after["call"] == before["call"]).all()
    assert np.allclose(after["p_t"], before["p_t"], atol=0.01)


def test_targets_that_cannot_be_located_keep_their_rows(screen, make_fold, tmp_path):
    lost = list(screen.targets[:2])
    weights = screen.locations.weights.copy()
    weights[screen.locations.queries.get_indexer(lost)] = 0
    changed = with_info(screen, lost, status="not_locatable", reason="no features", k_eff=0.0, confidence=0.0)
    changed = replace(changed, locations=replace(changed.locations, weights=weights))
    frame = run(make_fold(tmp_path, changed))
    rows = frame[frame["target"].isin(lost)]
    assert len(rows) == 3 * 2 * len(screen.effects.genes)
    assert set(rows["call"]) == {"no_call"}
    assert set(rows["reason"]) == {"not_locatable: no features"}
    assert rows[["lfc", "p_t", "q_selection"]].isna().all(axis=None)
    assert frame.loc[~frame["target"].isin(lost), "lfc"].notna().all()


def test_all_targets_not_locatable(screen, make_fold, tmp_path):
    changed = with_info(screen, list(screen.targets), status="not_locatable", reason="")
    frame = run(make_fold(tmp_path, changed))
    assert set(frame["reason"]) == {"not_locatable"}
    assert set(frame["call"]) == {"no_call"}


def test_few_neighbours_and_few_combinations_make_no_call(screen, make_fold, tmp_path):
    one, two = list(screen.targets[:1]), list(screen.targets[1:3])
    changed = with_info(with_info(screen, one, k_eff=1.5), two, kind="additive")
    frame = run(make_fold(tmp_path, changed)).set_index("target")
    assert set(frame.loc[one, "reason"]) == {"few_neighbours"}
    assert set(frame.loc[two, "reason"]) == {"too_few_measured_combinations"}
    assert frame["lfc"].notna().all()
    assert (frame.loc[one + two, "call"] == "no_call").all()


def test_published_design_without_pseudo_targets(screen, make_fold, tmp_path):
    """One model saw all training perturbations: no stack, no selection, calls by t."""
    roles = np.where(screen.means["dbdiffusion"].roles == "pseudo", "train", "target")
    changed = replace(screen, means={"dbdiffusion": replace(screen.means["dbdiffusion"], roles=roles)})
    frame = run(make_fold(tmp_path, changed), weight="one", calls="t")
    assert set(frame["method"]) == {"dbdiffusion"}
    assert (frame["lambda"] == 1).all()
    assert np.isfinite(frame[list(NUMBERS)].to_numpy()).all()
    without = run(make_fold(tmp_path, changed))
    assert (without["lambda"] == 0).all()


@pytest.mark.parametrize("model", ["conformal", "cells_only", "conservative", "ppi_z"])
def test_every_error_model_is_selectable(screen, make_fold, tmp_path, model):
    frame = run(make_fold(tmp_path, screen), error_model=model)
    assert np.isfinite(frame[list(NUMBERS)].to_numpy()).all()
    assert (frame["ci_high"] >= frame["ci_low"]).all()


@pytest.mark.parametrize("perturbations", [12, 40])
def test_conformal_intervals_need_enough_pseudo_targets(make_screen, make_fold, tmp_path, perturbations):
    few = make_fold(tmp_path, make_screen(perturbations=perturbations, targets=2))
    t, conformal = (run(few, error_model=model) for model in ("t", "conformal"))
    assert np.allclose(t["ci_high"], conformal["ci_high"]) == (perturbations < debias.MIN_BY_SIZE)
    np.testing.assert_array_equal(t["p_t"], conformal["p_t"])


def test_a_handful_of_perturbations_and_cells(make_screen, make_fold, tmp_path):
    small = make_screen(perturbations=4, targets=2)
    cells = small.effects.n_cells.copy()
    cells[0] = 2
    variance = small.effects.variance.copy()
    variance[:, 0] = variance[0] = 0
    effects = replace(small.effects, n_cells=cells, variance=variance)
    frame = run(make_fold(tmp_path, replace(small, effects=effects)), min_k_eff=1.0)
    assert np.isfinite(frame[list(NUMBERS)].to_numpy()).all()


def test_genes_that_a_predictor_lacks_are_named(screen, make_fold, tmp_path):
    paths = make_fold(tmp_path, screen)
    m = screen.means["dbdiffusion"]
    MeanSet(m.perturbations, m.roles, m.genes[1:], m.mean[:, 1:], m.mc_variance[:, 1:]).write(paths.means["dbdiffusion"])
    with pytest.raises(UserError, match="G0000"):
        run(paths)


def test_no_target_is_an_error(screen, make_fold, tmp_path):
    keep = screen.effects.perturbations
    paths = make_fold(tmp_path, replace(screen, locations=screen.locations.select(keep)))
    with pytest.raises(UserError, match="no target"):
        run(paths)


def test_gene_order_of_means_does_not_matter(written, screen, make_fold, tmp_path):
    _, before = written
    means = {n: MeanSet(m.perturbations, m.roles, m.genes[::-1], m.mean[:, ::-1], m.mc_variance[:, ::-1]) for n, m in screen.means.items()}
    after = run(make_fold(tmp_path, replace(screen, means=means)))
    pd.testing.assert_frame_equal(after, before)
