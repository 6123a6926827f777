"""Every figure is drawn from valid inputs, without text that leaves the page, and the same inputs give the same bytes."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest
from figure_inputs import FOLD, write_calibration, write_clusters, write_compute, write_record, write_scores
from PIL import Image

from dbdiffusion.config.embedding import EmbeddingConfig
from dbdiffusion.data.moments import Moments
from dbdiffusion.data.sets import EffectSet
from dbdiffusion.data.splits import Splits
from dbdiffusion.figures import (
    calibration,
    cells,
    compute,
    gene_map,
    intervals,
    location,
    maps,
    observed,
    perturbation_map,
    predicted_observed,
    qc,
    scores,
    study,
    style,
    training,
)
from dbdiffusion.perturbations.effects import estimate_effects
from dbdiffusion.perturbations.embedding import embed
from dbdiffusion.runtime import contracts
from dbdiffusion.runtime.errors import UserError

DPI = 60


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Coarse pictures: what is tested is what they show, not how finely."""
    for key in ("figure.dpi", "savefig.dpi"):
        monkeypatch.setitem(style.STYLE, key, DPI)


def good(out, caplog, *, width: float | None = None, ink: float = 0.003) -> np.ndarray:
    """The picture, after checking that both files are real, that there is something on it, and that no text was cut."""
    assert out["pdf"].read_bytes().startswith(b"%PDF")
    image = np.asarray(Image.open(out["png"]).convert("L"))
    assert (image < 200).mean() > ink
    # A page has a clean margin: nothing runs over its edge.
    assert image[[0, -1]].min() > 240
    assert image[:, [0, -1]].min() > 240
    if width is not None:
        assert abs(image.shape[1] - width / 25.4 * DPI) <= 1
    assert not [r.message for r in caplog.records if r.levelno >= logging.WARNING]
    return image


def test_qc(made, out, caplog):
    qc.draw_qc(cells=made.cells, summary=made.summary, on_target=made.on_target, **out)
    good(out, caplog, width=style.PAGE)


def test_cells_of_the_file_are_counted(made):
    table = qc.read_cells(made.cells)
    assert len(table) == len(Splits.read(made.splits).halves)
    assert table["genes"].between(1, 80).all()


@pytest.mark.parametrize("n", [4, 300])
def test_maps(n, tmp_path, out, caplog, monkeypatch):
    monkeypatch.setattr(maps, "MAX_LABELS", 15)
    write_clusters(tmp_path / "clusters.parquet", n, 2 * n, seed=1, clusters=min(n, 24))
    perturbation_map.draw_perturbation_map(clusters=tmp_path / "clusters.parquet", **out)
    good(out, caplog, width=style.PAGE, ink=0.0008)
    gene_map.draw_gene_map(clusters=tmp_path / "clusters.parquet", perturbed=["G000", "G003", "ABSENT"], **out)
    good(out, caplog, width=style.PAGE, ink=0.0008)


def test_labels_are_capped_and_come_from_every_cluster():
    random = np.random.default_rng(0)
    frame = pd.DataFrame({"cluster": np.repeat(list("abc"), [500, 30, 2]), "x": random.normal(size=532), "y": random.normal(size=532)})
    picked = maps.pick_labels(frame, 12)
    assert len(picked) == 12
    assert frame["cluster"].iloc[picked].value_counts().to_dict() == {"a": 5, "b": 5, "c": 2}


def test_a_clusters_number_stands_on_its_points_but_not_on_a_ring():
    part = np.array([[0.0, 0.0], [1.0, 0.0], [10.0, 0.0], [11.0, 0.0]])
    size = np.array([11.0, 1.0])
    # The median, 5.5, is empty.
    assert maps.number_place(part, np.zeros((0, 2)), size).tolist() == [1, 0]
    assert maps.number_place(part, np.array([[1.0, 0.0], [10.0, 0.0]]), size).tolist() == [0, 0]
    # A free point of the other part is too far away.
    assert maps.number_place(part, part[:3], size).tolist() == [1, 0]


@pytest.mark.parametrize(("width", "expected"), [(60, "near AAA, BBB, CCC"), (16, "near AAA, …"), (9.5, "near A…")])
def test_names_are_left_out_where_they_do_not_fit(width, expected, out):
    with style.sheet(style.COLUMN, 40, **out) as page:
        text = style.as_many_as_fit(page.fig, "near ", ["AAA", "BBB", "CCC"], width, 6)
        assert text == expected
        assert page.fig.text(0, 0, text, fontsize=6).get_window_extent().width <= width / 25.4 * DPI


def test_cells(made, out, caplog):
    cells.draw_cells(cells=made.cells, generated=made.generated, locations=made.locations, targets=made.targets, **out)
    good(out, caplog, width=style.PAGE)


def test_cells_of_one_target_and_of_none(made, out, caplog):
    keys = {"cells": made.cells, "generated": made.generated, "locations": made.locations}
    cells.draw_cells(targets=[made.targets[0]], **keys, **out)
    good(out, caplog)
    cells.draw_cells(targets=["NOBODY"], **keys, **out)
    good(out, caplog, ink=0)


def test_cells_on_the_map_are_what_they_are_called(made):
    target = made.targets[0]
    near = cells.neighbours_of(made.locations, target)
    sets = cells.gather(made.cells, made.generated, [target], {target: near}, seed=0)
    assert near
    assert target not in near
    assert len(sets.of("generated", [target])) == 60
    expression = estimate_effects(Moments.read(made.moments), [target], EffectSet.read(made.effects).genes)
    rows = sets.of("real", [target])
    assert len(rows) == expression.n_cells[0]
    assert sets.expression[rows].mean(axis=0) == pytest.approx(
        expression.effect[0] + sets.expression[sets.of("control", ["control"])].mean(axis=0), abs=0.2
    )


def test_generated_cells_of_neighbours_are_drawn_too(made):
    target, other = made.targets[:2]
    sets = cells.gather(made.cells, made.generated, [target], {target: [other]}, seed=0)
    assert set(sets.perturbation[sets.kind == "generated"]) == {target, other}
    assert set(sets.perturbation[sets.kind == "neighbour"]) == {other}


def test_predicted_observed(made, out, caplog):
    de = made.root / "de.parquet"
    predicted_observed.draw_predicted_observed(de=de, moments=made.moments, targets=[*made.targets[:3], made.targets[-1]], **out)
    good(out, caplog, width=style.PAGE)


def test_targets_without_an_estimate_take_no_panel(made, out, caplog, monkeypatch):
    drawn, notes = [], []
    panel, legend = predicted_observed._panel, predicted_observed.call_legend
    monkeypatch.setattr(predicted_observed, "_panel", lambda *a: drawn.append(a[2]) or panel(*a))
    monkeypatch.setattr(predicted_observed, "call_legend", lambda *a: notes.append(a[3]) or legend(*a))
    keys = {"de": made.root / "de.parquet", "moments": made.moments, "most": 2}
    predicted_observed.draw_predicted_observed(targets=[made.targets[-1], *made.targets[:4]], **keys, **out)
    assert drawn == made.targets[:2]
    assert notes[0].endswith(f"of {made.targets[-1]}")
    good(out, caplog)
    predicted_observed.draw_predicted_observed(targets=[made.targets[-1]], **keys, **out)
    assert len(drawn) == 2
    good(out, caplog, ink=0)


@pytest.mark.parametrize("count", [0, 1, 6])
def test_predicted_observed_with_any_number_of_targets(count, made, out, caplog):
    predicted_observed.draw_predicted_observed(de=made.root / "de.parquet", moments=made.moments, targets=made.targets[:count], **out)
    good(out, caplog, ink=0 if count == 0 else 0.003)


def test_a_method_without_rows_is_named(made, out):
    with pytest.raises(UserError, match="did you mean 'stacked'"):
        predicted_observed.draw_predicted_observed(
            de=made.root / "de.parquet", moments=made.moments, targets=made.targets, method="staked", **out
        )


def test_observed_halves_share_no_cell(made):
    target = made.targets[0]
    genes = list(EffectSet.read(made.effects).genes)
    found = observed.observe(made.moments, [target, "NOBODY"], genes)
    assert list(found) == [target]
    moments = Moments.read(made.moments)
    by_hand = {}
    for half in "AB":
        by_hand[half] = estimate_effects(moments, [target], genes, half=half, control_half=half)
    assert found[target]["effect"].to_numpy() == pytest.approx(by_hand["B"].effect[0])
    assert found[target]["replicate"].to_numpy() == pytest.approx(by_hand["A"].effect[0])
    assert found[target]["n_cells"].iloc[0] == by_hand["B"].n_cells[0]


def test_intervals(made, out, caplog):
    intervals.draw_intervals(de=made.root / "de.parquet", moments=made.moments, target=made.targets[0], method="stacked", **out)
    good(out, caplog, width=style.COLUMN)


def test_intervals_of_the_first_target_that_has_an_estimate(made, tmp_path):
    def draw(name: str, target) -> bytes:
        png = tmp_path / f"{name}.png"
        intervals.draw_intervals(de=made.root / "de.parquet", moments=made.moments, target=target, png=png, pdf=tmp_path / "figure.pdf")
        return png.read_bytes()

    assert draw("several", [made.targets[-1], *made.targets]) == draw("one", made.targets[0])


@pytest.mark.parametrize("count", [1, 2, 7])
def test_targets_nobody_measured(count, made, out, caplog, monkeypatch):
    drawn, rows = [], intervals._draw_rows
    monkeypatch.setattr(intervals, "_draw_rows", lambda ax, part, *a: drawn.append(part["target"].iloc[0]) or rows(ax, part, *a))
    lost = made.targets[-1]
    intervals.draw_targets(
        de=made.root / "de.parquet", targets=[lost, "NOBODY", *made.targets[: count - 1]], method="stacked", level=0.95, **out
    )
    assert drawn == ["NOBODY", *made.targets[: count - 1]]
    good(out, caplog)


def test_long_names_and_reasons_stay_in_their_panels(made, out, caplog, tmp_path):
    table = pd.read_parquet(made.root / "de.parquet")
    long = {name: f"HLA-DRB{i}+LONGGENENAME-AS{i}" for i, name in enumerate(made.targets)}
    table["target"] = table["target"].astype(str).replace(long)
    silent = table["target"] == long[made.targets[2]]
    table["call"] = table["call"].astype(str).where(~silent, "no_call")
    table["reason"] = table["reason"].astype(str).where(~silent, "too_few_measured_combinations")
    contracts.DE.write(table, tmp_path / "de.parquet")
    intervals.draw_targets(de=tmp_path / "de.parquet", targets=list(long.values()), method="stacked", level=0.95, most=3, **out)
    good(out, caplog, width=style.PAGE)


def test_no_target_that_nobody_measured_has_an_estimate(made, out, caplog):
    intervals.draw_targets(de=made.root / "de.parquet", targets=made.targets[-1:], method="stacked", level=0.95, **out)
    good(out, caplog, ink=0.001)


@pytest.mark.parametrize("target", ["NOBODY", "not in the table", -1])
def test_intervals_without_observation_or_estimate(target, made, out, caplog):
    target = made.targets[-1] if target == -1 else target
    intervals.draw_intervals(de=made.root / "de.parquet", moments=made.moments, target=target, **out)
    good(out, caplog, ink=0.001)


def test_genes_of_the_interval_figure_are_chosen_by_the_prediction():
    rows = pd.DataFrame(
        {"lfc": [0.1, -2.0, 3.0, 0.5, np.nan], "se": [0.1, 4.0, 1.0, 0.1, np.nan], "call": ["up", "none", "none", "none", "no_call"]},
        index=["called", "unsure", "large", "small", "missing"],
    )
    # The called gene first, then by |lfc| / se; shown in order of lfc.
    assert list(intervals.choose_genes(rows, 3).index) == ["called", "small", "large"]
    assert list(intervals.choose_genes(rows, 9).index) == ["unsure", "called", "small", "large"]


def test_share_within_the_interval_counts_the_observations_error():
    rows = pd.DataFrame({"ci_low": [-1.0] * 3, "ci_high": [1.0] * 3}, index=list("abc"))
    truth = pd.DataFrame({"effect": [0.9, 1.3, 1.5], "se": [0.0, 0.5, 0.5]}, index=list("abc"))
    # Half widths: 1, hypot(1, 0.98) = 1.4, the same; so the third is out.
    assert intervals.observed_share(rows, truth, 0.95) == (pytest.approx(2 / 3), 3)


def test_scores(made, out, caplog):
    scores.draw_scores(scores=made.scores, bootstrap=200, **out)
    good(out, caplog, width=style.PAGE)


def test_scores_of_one_target_or_one_method_or_none(made, tmp_path, out, caplog):
    path = tmp_path / "scores.parquet"
    write_scores(path, ["A"], seed=0)
    scores.draw_scores(scores=path, bootstrap=200, **out)
    good(out, caplog, width=style.PAGE)
    write_scores(path, [f"T{i}" for i in range(300)], seed=0, methods=("dbdiffusion",))
    scores.draw_scores(scores=path, bootstrap=200, **out)
    good(out, caplog, width=style.PAGE)
    contracts.SCORES.write(contracts.SCORES.read(made.scores).iloc[:0], path)
    scores.draw_scores(scores=path, **out)
    good(out, caplog, ink=0)


def test_debiased_baselines_share_a_row():
    summary = pd.DataFrame(
        {"method": ["ridge", "dbdiffusion", "ridge", "replicate", "stacked"], "debiased": [False, True, True, False, True]}
    )
    assert scores.rows_of(summary) == ["stacked", "dbdiffusion", "ridge", scores.DEBIASED]
    assert scores.rows_of(summary[summary.index != 2]) == ["stacked", "dbdiffusion", "ridge"]


def test_score_panels_take_the_largest_gene_set():
    summary = pd.DataFrame({"metric": ["pearson_delta"] * 3 + ["mse"], "genes": ["all", "20", "300", "20"]})
    assert scores.choose_panels(summary) == [("pearson_delta", "all"), ("pearson_delta", "300")]
    assert scores.choose_panels(summary[summary["metric"] == "mse"]) == [("mse", "20")]


@pytest.mark.parametrize("models", [0, 1, 3, 20])
def test_training(models, tmp_path, out, caplog):
    vae = [write_record(tmp_path / f"vae{i}.json", fold=str(i // 3), crossfit=str(i % 3), level=0.3) for i in range(models)]
    diffusion = [
        write_record(tmp_path / f"d{i}.json", fold=str(i // 3), crossfit=str(i % 3), level=0.1, validation=False) for i in range(models)
    ]
    training.draw_training(vae=vae, diffusion=diffusion, **out)
    good(out, caplog, width=style.PAGE, ink=0.0005)


def test_the_kept_weights_are_ringed():
    record = {"history": [{"epoch": e, "step": 10 * e, "train": 1.0, "validation": 1.0 / e} for e in (2, 4, 6)], "best_epoch": 4}
    step, _, held = training.curve(record)
    assert training.best_row(record) == 1
    assert step.tolist() == [20, 40, 60]
    assert held[1] == 0.25


def test_autoencoder_losses_are_differences_to_the_kept_weights():
    train, held = np.array([9.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]), np.array([5.0, 4.0, 3.0, 2.0, 2.5, 3.0, 4.0])
    record = {"history": [{"epoch": e} for e in range(7)], "best_epoch": 3}
    shown, validation = training.relative(record, train, held)
    assert validation[3] == 0
    assert validation[0] == 3
    assert shown.tolist() == [6, 2, 1, 0, -1, -2, -3]
    assert training.kept_row({"history": record["history"]}, held) == 3


def test_training_losses_are_running_means():
    values = np.array([9.0, 5.0, 4.0, np.nan, 2.0, 1.0, 0.0])
    expected = [np.nanmean(values[max(0, i - 2) : i + 3]) for i in range(len(values))]
    assert training.running_mean(values) == pytest.approx(expected)
    assert np.isnan(training.running_mean(np.full(3, np.nan))).all()
    assert training.running_mean(np.array([2.0])).tolist() == [2.0]


def test_many_models_are_coloured_by_fold():
    records = [{"fold": str(i // 4)} for i in range(8)]
    by_fold = training.colours(records, [str(i) for i in range(8)])
    assert len(set(by_fold)) == 2
    assert by_fold[0] == by_fold[3] != by_fold[4]
    assert len(set(training.colours(records[:5], list("abcde")))) == 5
    assert set(training.colours([{"fold": str(i)} for i in range(20)], [str(i) for i in range(20)])) == {style.GREY}


@pytest.mark.parametrize("gpu", [False, True])
def test_compute(gpu, tmp_path, out, caplog):
    write_compute(tmp_path / "compute.parquet", gpu=gpu)
    compute.draw_compute(compute=tmp_path / "compute.parquet", **out)
    good(out, caplog, width=style.PAGE)


@pytest.mark.parametrize(("seconds", "expected"), [(90.0, (1.0, "s")), (600.0, (60.0, "min")), (9000.0, (3600.0, "h"))])
def test_units_of_time(seconds, expected):
    assert compute.time_unit(seconds) == expected


@pytest.mark.parametrize(
    "checks",
    [
        None,
        ("coverage",),
        ("shuffled_effects_fdr", "control_guides_p"),
        ("permuted_labels_p", "doubling_log10_p"),
        ("fdr_truth", "coverage_truth"),
        ("power", "power_replicate", "fdr"),
        (),
    ],
)
def test_calibration(checks, tmp_path, out, caplog):
    write_calibration(tmp_path / "calibration.parquet", seed=0, checks=checks)
    calibration.draw_calibration(calibration=tmp_path / "calibration.parquet", **out)
    good(out, caplog, width=style.PAGE, ink=0 if checks == () else 0.002)


def test_predictors_are_compared_at_one_rate(tmp_path):
    write_calibration(tmp_path / "calibration.parquet", seed=0)
    table = contracts.CALIBRATION.read(tmp_path / "calibration.parquet").astype({"check": str, "method": str, "stratum": str})
    found = calibration.predictors(table).set_index(["test", "predictor"])
    assert set(found["level"]) == {0.1}
    assert found.loc[("selection", ""), "fdr"] == pytest.approx(0.07)
    assert found.loc[("selection", "knn"), "power"] == pytest.approx(0.17)
    assert set(calibration.default_only(table)["method"]) >= {"t", "selection"}
    assert not calibration.default_only(table)["method"].str.contains("knn").any()
    # Without a call there is no rate to speak of, and nothing false.
    silent = (table["check"] == "fdr") & (table["method"] == "t:knn")
    found = calibration.predictors(table.assign(value=table["value"].mask(silent))).set_index(["test", "predictor"])
    assert found.loc[("t", "knn"), "fdr"] == 0


def test_predictors_that_coincide_are_one_marker():
    names = ["", "ridge", "knn", "additive", "control"]
    part = pd.DataFrame(
        {"test": "t", "predictor": names, "fdr": [0.1, 0.101, 0.1, 0.3, 0.3], "power": [0.2, 0.2, 0.201, 0.2, 0.4]}, index=range(5)
    )
    found = calibration.distinct(part, 0.01, 0.01).set_index("name")
    assert list(found.index) == ["control (no change)", "default,\n2 others", "additive"]
    assert found["default"].tolist() == [False, True, False]
    assert found.loc["additive", ["fdr", "power"]].tolist() == [0.3, 0.2]
    assert calibration.distinct(part[1:3], 0.01, 0.01)["name"].tolist() == ["k nearest neighbours,\nridge"]
    assert len(calibration.distinct(part, 1, 1)) == 1


def test_location(made, out, caplog):
    keys = {"effects": made.effects, "moments": made.moments, "locations": made.locations, "clusters": made.clusters}
    location.draw_location(embedding=made.embedding, targets=made.targets, **keys, **out)
    good(out, caplog, width=style.PAGE)
    location.draw_location(embedding=made.embedding, targets=["NOBODY"], **keys, **out)
    good(out, caplog, width=style.PAGE, ink=0.001)


@pytest.mark.parametrize("scale", ["standard_error", "gene_sd"])
def test_training_perturbations_are_projected_on_themselves(made, scale):
    effects = EffectSet.read(made.effects)
    learned = effects.subset(effects.perturbations[:5])
    embedding = embed(learned, EmbeddingConfig(scale=scale))
    place = pd.DataFrame(np.vstack([embedding.scores, embedding.control]), index=[*learned.perturbations, "control"])
    roles = pd.Series(["train"] * 5 + ["control"], index=place.index)
    assert location.true_places(place, roles, effects, learned, scale) == pytest.approx(embedding.scores, abs=1e-8)


def test_study(made, out, caplog):
    study.draw_study(study=made.study, **out)
    good(out, caplog, width=style.PAGE)


def test_study_shows_what_the_table_holds(made):
    frame = study._read(made.study)
    shown = {column: part for column, _, part in study.rows_of(frame, 0.95, 0.1)}
    assert list(shown) == ["coverage", "fdr", "fdr_target", "power", "mse_ratio"]
    assert set(shown["mse_ratio"]["error_model"]) == {"stacked", "dbdiffusion"}
    assert set(shown["fdr_target"]["q"]) == {0.1}
    fewer = study.rows_of(frame.drop(columns=["fdr_target", "mse_ratio"]), 0.95, 0.1)
    assert [column for column, _, _ in fewer] == ["coverage", "fdr", "power"]


def test_study_names_a_missing_column(made, tmp_path, out):
    pd.read_parquet(made.study).drop(columns="fdr").to_parquet(tmp_path / "study.parquet")
    with pytest.raises(UserError, match="fdr"):
        study.draw_study(study=tmp_path / "study.parquet", **out)


def test_same_inputs_same_bytes(made, tmp_path):
    def draw(name: str) -> tuple[bytes, bytes]:
        out = {"png": tmp_path / f"{name}.png", "pdf": tmp_path / f"{name}.pdf"}
        predicted_observed.draw_predicted_observed(de=made.root / "de.parquet", moments=made.moments, targets=made.targets[:1], **out)
        return out["png"].read_bytes(), out["pdf"].read_bytes()

    assert draw("once") == draw("twice")


def test_text_that_leaves_the_page_is_reported(out, caplog):
    with style.sheet(style.COLUMN, 40, **out) as page:
        page.fig.subplots().set_title("a title much longer than the column is wide, which nobody could read to its end on paper or screen")
    assert "leaves the page" in caplog.text


def test_a_failed_drawing_leaves_no_file(out):
    def fail() -> None:
        with style.sheet(style.COLUMN, 40, **out):
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError):
        fail()
    assert not out["png"].exists()
    assert FOLD == "0"
