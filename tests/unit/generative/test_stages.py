"""The stage functions on files, and what they promise to the stages after them."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch
from pretended_gpu import pretended_gpu

from dbdiffusion.data.sets import EffectSet, MeanSet
from dbdiffusion.data.splits import Splits
from dbdiffusion.generative import checkpoint
from dbdiffusion.generative.conditions import Conditions
from dbdiffusion.generative.diffusion import write_diffusions
from dbdiffusion.generative.generate import write_generated
from dbdiffusion.generative.merge import write_merged
from dbdiffusion.generative.side_by_side import SideBySide
from dbdiffusion.generative.training import Trainer
from dbdiffusion.generative.tuning import STRENGTHS, Trial, write_trial
from dbdiffusion.generative.vae import write_vaes
from dbdiffusion.runtime.errors import UserError
from dbdiffusion.runtime.files import read_json, write_json


def listed(**files: Path) -> dict[str, list[Path]]:
    """For one model."""
    return {name: [path] for name, path in files.items()}


def chain(screen, crossfit: str, folder: Path, cells: Path | None = None, device: str = "cpu") -> dict[str, Path]:
    """Train and generate one cross-fit model of fold 0."""
    names = ("vae.safetensors", "vae.json", "diffusion.safetensors", "diffusion.json", "generated.h5ad", "means.parquet")
    out = {name: folder / name for name in names}
    common = {"cells": cells or screen.cells, "splits": screen.splits, "effects": screen.effects, "fold": "0", "crossfit": [crossfit]}
    run = {"device": device, "seed": 3, "scratch": folder / "scratch"}
    write_vaes(**common, **run, config=screen.vae, weights=[out["vae.safetensors"]], record=[out["vae.json"]])
    pair = {"vae": out["vae.safetensors"], "vae_record": out["vae.json"], "embedding": screen.embedding("0", crossfit)}
    files = {"weights": out["diffusion.safetensors"], "record": out["diffusion.json"]}
    write_diffusions(**common, **run, **listed(**pair, **files), config=screen.diffusion)
    write_generated(
        **pair,
        effects=screen.effects,
        diffusion=out["diffusion.safetensors"],
        diffusion_record=out["diffusion.json"],
        config=screen.generation,
        device=device,
        seed=3,
        generated=out["generated.h5ad"],
        means=out["means.parquet"],
    )
    return out


@pytest.fixture(scope="module")
def models(screen, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Path]]:
    return [chain(screen, q, tmp_path_factory.mktemp(f"crossfit{q}")) for q in ("0", "1")]


def test_rows_and_units(screen, models: list[dict[str, Path]]) -> None:
    splits, effects = Splits.read(screen.splits), EffectSet.read(screen.effects)
    means, cells = MeanSet.read(models[0]["means.parquet"]), ad.read_h5ad(models[0]["generated.h5ad"])
    roles = dict(zip(means.perturbations, means.roles, strict=True))
    assert {p for p, r in roles.items() if r == "target"} == set(splits.targets("0"))
    assert {p for p, r in roles.items() if r == "pseudo"} == set(splits.inner("0", "0"))
    assert roles["control"] == "control"
    assert 0 < sum(r == "train" for r in roles.values()) <= 6
    assert list(means.genes) == list(effects.genes) == list(cells.var_names)
    assert cells.X.dtype == np.float32 and (np.asarray(cells.X) >= 0).all()
    assert cells.obs_names.is_unique and cells.uns["units"] == "ln(1 + counts per 10,000)"
    assert (cells.obs.groupby("perturbation", observed=True).size() == screen.generation.cells_kept).all()
    assert set(cells.obs["crossfit"]) == {"0"}
    assert (means.mc_variance >= 0).all() and means.mc_variance.max() > 0


def test_record_tells_what_was_done(screen, models: list[dict[str, Path]]) -> None:
    for name, batch in (("vae.json", screen.vae.batch_size), ("diffusion.json", screen.diffusion.batch_size)):
        record = read_json(models[0][name])
        assert record["config"]["batch_size"] == batch
        assert record["history"][-1]["step"] == record["steps"]
        assert {"train", "validation", "epoch", "step"} <= set(record["history"][0])
        assert record["steps_per_second"] > 0 and record["device"] == "cpu"
        assert record["crossfit"] == "0" and record["versions"]["torch"] != "absent"
    assert not (models[0]["vae.json"].parent / "scratch").exists()


def test_conditions_are_those_of_the_config(screen, models: list[dict[str, Path]], tmp_path: Path) -> None:
    """From training to sampling, and uncertain unless told otherwise."""
    pair = {"vae": models[0]["vae.safetensors"], "vae_record": models[0]["vae.json"], "embedding": screen.embedding("0", "0")}
    common = {"cells": screen.cells, "splits": screen.splits, "effects": screen.effects, "fold": "0", "crossfit": ["0"]}
    weights = [checkpoint.load(models[0]["diffusion.safetensors"])[0]]
    for number, keys in enumerate(({"uncertain_conditions": False}, {"uncertain_conditions": False, "condition": "embedding"})):
        made = {name: tmp_path / f"{name}{number}" for name in ("weights", "record")}
        config = screen.diffusion.model_copy(update=keys)
        write_diffusions(**common, **listed(**pair, **made), device="cpu", seed=3, scratch=None, config=config)
        weights.append(checkpoint.load(made["weights"])[0])
        files = {"diffusion": made["weights"], "diffusion_record": made["record"], "effects": screen.effects}
        rest = {"config": screen.generation, "device": "cpu", "seed": 3}
        write_generated(**pair, **files, **rest, generated=tmp_path / f"{number}.h5ad", means=tmp_path / f"{number}.parquet")
        write_trial(**pair, **files, **rest, out=tmp_path / f"{number}.json")
    # Places, features and certainty; the former two; places.
    assert [part["denoiser.label.0.weight"].shape[1] for part in weights] == [9, 8, 5]
    assert len(MeanSet.read(tmp_path / "0.parquet").perturbations) == len(MeanSet.read(models[0]["means.parquet"]).perturbations)


def test_uncertain_conditions_are_learned_from(screen, models: list[dict[str, Path]], tmp_path: Path, monkeypatch) -> None:
    pair = {"vae": models[0]["vae.safetensors"], "vae_record": models[0]["vae.json"], "embedding": screen.embedding("0", "0")}
    common = {"cells": screen.cells, "splits": screen.splits, "effects": screen.effects, "fold": "0", "crossfit": ["0"]}
    config, weights = screen.diffusion.model_copy(update={"ema": 0.0}), []
    for doubt in (Conditions.doubt, lambda self, device: None):
        monkeypatch.setattr(Conditions, "doubt", doubt)
        made = {"weights": tmp_path / "w.safetensors", "record": tmp_path / "r.json"}
        write_diffusions(**common, **listed(**pair, **made), device="cpu", seed=3, scratch=None, config=config)
        weights.append(checkpoint.load(made["weights"])[0]["denoiser.out.weight"])
    assert weights[0].any()
    assert not torch.equal(*weights)


def test_held_out_cells_change_nothing(screen, models: list[dict[str, Path]], tmp_path: Path) -> None:
    """Counts of targets and of the model's own pseudo-targets replaced by random ones: the same bytes."""
    splits = Splits.read(screen.splits)
    hidden = {*splits.targets("0"), *splits.inner("0", "0")}
    cells = ad.read_h5ad(screen.cells)
    rows = cells.obs["perturbation"].isin(hidden).to_numpy()
    dense = cells.X.toarray()
    dense[rows] = np.random.default_rng(0).poisson(5.0, dense[rows].shape)
    cells.X = type(cells.X)(dense)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    again = chain(screen, "0", tmp_path, cells=tmp_path / "cells.h5ad")
    for name in ("vae.safetensors", "diffusion.safetensors", "means.parquet"):
        assert again[name].read_bytes() == models[0][name].read_bytes(), name
    assert (ad.read_h5ad(again["generated.h5ad"]).X == ad.read_h5ad(models[0]["generated.h5ad"]).X).all()


def test_merge(screen, models: list[dict[str, Path]], tmp_path: Path) -> None:
    write_merged(
        generated=[m["generated.h5ad"] for m in models],
        means=[m["means.parquet"] for m in models],
        out_generated=tmp_path / "generated.h5ad",
        out_means=tmp_path / "means.parquet",
    )
    splits, sets = Splits.read(screen.splits), [MeanSet.read(m["means.parquet"]) for m in models]
    merged, cells = MeanSet.read(tmp_path / "means.parquet"), ad.read_h5ad(tmp_path / "generated.h5ad")
    for q in (0, 1):
        for name in splits.inner("0", str(q)):
            at, own = merged.rows([name])[0], sets[q].rows([name])[0]
            assert merged.roles[at] == "pseudo"
            # Against the merged control it has the effect that its own model gave it against its own.
            control, own_control = merged.rows(["control"])[0], sets[q].rows(["control"])[0]
            effect = sets[q].mean[own] - sets[q].mean[own_control]
            np.testing.assert_allclose(merged.mean[at] - merged.mean[control], effect, atol=1e-12)
            assert set(cells.obs.loc[cells.obs["perturbation"] == name, "crossfit"]) == {str(q)}
    for name in [*splits.targets("0"), "control"]:
        at, rows = merged.rows([name])[0], [s.rows([name])[0] for s in sets]
        np.testing.assert_allclose(merged.mean[at], (sets[0].mean[rows[0]] + sets[1].mean[rows[1]]) / 2, rtol=1e-12)
        np.testing.assert_allclose(merged.mc_variance[at], (sets[0].mc_variance[rows[0]] + sets[1].mc_variance[rows[1]]) / 4, rtol=1e-12)
        mine = cells.obs["perturbation"] == name
        assert mine.sum() == screen.generation.cells_kept
        assert abs((cells.obs.loc[mine, "crossfit"] == "0").sum() - mine.sum() / 2) <= 1
    assert cells.obs_names.is_unique


def test_tuned_rows_are_those_of_their_strength(screen, models: list[dict[str, Path]], tmp_path: Path) -> None:
    """From trial to cells: pseudo-targets as if their strength had been configured, the control as without guidance."""
    files = models[0]
    # So little training leaves conditions without effect: other weights make them matter.
    weights, _ = checkpoint.load(files["diffusion.safetensors"])
    weights["denoiser.out.weight"] = torch.randn(weights["denoiser.out.weight"].shape, generator=torch.Generator().manual_seed(0)) / 5
    checkpoint.save(tmp_path / "diffusion.safetensors", weights)
    model = {
        "embedding": screen.embedding("0", "0"),
        "effects": screen.effects,
        "vae": files["vae.safetensors"],
        "vae_record": files["vae.json"],
        "diffusion": tmp_path / "diffusion.safetensors",
        "diffusion_record": files["diffusion.json"],
        "device": "cpu",
        "seed": 3,
    }
    write_trial(**model, config=screen.generation, out=tmp_path / "trial.json")
    trial = Trial.read(tmp_path / "trial.json")
    kept = set(EffectSet.read(screen.effects).perturbations)
    assert set(trial.pseudo) == set(Splits.read(screen.splits).inner("0", "0")) & kept
    assert 0 < len(trial.seen) <= 6 and not set(trial.seen) & set(trial.pseudo)
    error = np.array([*trial.pseudo.values(), *trial.seen.values()])
    assert error.shape[1] == len(STRENGTHS) and (np.ptp(error, axis=1) > 1e-6).all()
    write_json(tmp_path / "guidance.json", {"targets": 0.0, "pseudo": dict.fromkeys(trial.pseudo, 0.75), "seen": 0.0})
    made = {}
    for name, guidance in (("tuned", "tuned"), ("fixed", 0.75), ("plain", 0.0)):
        config = screen.generation.model_copy(update={"guidance": guidance})
        paths = {"generated": tmp_path / f"{name}.h5ad", "means": tmp_path / f"{name}.parquet"}
        write_generated(**model, **paths, config=config, guidance=tmp_path / "guidance.json")
        made[name] = MeanSet.read(paths["means"])
    plain, tuned, fixed = made["plain"], made["tuned"], made["fixed"]
    pseudo, control = tuned.perturbations.isin(list(trial.pseudo)), tuned.roles == "control"
    np.testing.assert_allclose(tuned.mean[pseudo], fixed.mean[pseudo], rtol=1e-5)
    np.testing.assert_allclose(tuned.mean[~pseudo], plain.mean[~pseudo], rtol=1e-5)
    np.testing.assert_allclose(fixed.mean[control], plain.mean[control], rtol=1e-5)
    assert np.abs(fixed.mean[~control] - plain.mean[~control]).max() > 1e-3


def test_another_panel_is_refused(screen, models: list[dict[str, Path]], tmp_path: Path) -> None:
    effects = EffectSet.read(screen.effects)
    shuffled = type(effects)(effects.perturbations, effects.genes[::-1], *(getattr(effects, n) for n in list(vars(effects))[2:]))
    shuffled.write(tmp_path / "effects.parquet")
    model = {
        "embedding": screen.embedding("0", "0"),
        "effects": tmp_path / "effects.parquet",
        "vae": models[0]["vae.safetensors"],
        "vae_record": models[0]["vae.json"],
        "diffusion": models[0]["diffusion.safetensors"],
        "diffusion_record": models[0]["diffusion.json"],
        "config": screen.generation,
        "device": "cpu",
        "seed": 3,
    }
    with pytest.raises(UserError, match="another panel"):
        write_generated(**model, generated=tmp_path / "g.h5ad", means=tmp_path / "m.parquet")
    with pytest.raises(UserError, match="another panel"):
        write_trial(**model, out=tmp_path / "trial.json")
    assert [path.name for path in tmp_path.iterdir()] == ["effects.parquet"]


GPU_WAYS = {
    "default": {"vae": {}, "diffusion": {}},
    "published": {
        "vae": {"kind": "autoencoder", "activation": "prelu", "norm": "batch"},
        "diffusion": {
            "null_token": "zero", "uncertain_conditions": False, "standardise_latent": False, "mean_offsets": False,
            "prediction": "epsilon",
        },
    },
    "gaussian": {
        "vae": {"likelihood": "gaussian", "free_bits": 0.1},
        "diffusion": {"condition": "features", "prediction": "x0", "min_snr_gamma": 5.0},
    },
}  # fmt: skip


@pytest.mark.parametrize("way", GPU_WAYS)
def test_a_gpu_is_gone_through_and_gives_what_the_cpu_does(screen, tmp_path: Path, monkeypatch, way: str) -> None:
    vae, diffusion = (
        getattr(screen, name).model_copy(update={"precision": "fp32", "cuda_graphs": True, **keys}) for name, keys in GPU_WAYS[way].items()
    )
    asked = replace(screen, vae=vae, diffusion=diffusion)
    for name in ("conditions", "denoiser", "diffusion", "optimiser", "vae"):
        monkeypatch.setattr(f"dbdiffusion.generative.{name}.fused", lambda *tensors: False)
    found = []
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        with pretended_gpu() if device == "cuda" else contextlib.nullcontext():
            made = chain(asked, "0", folder, device=device)
            pair = {"vae": made["vae.safetensors"], "vae_record": made["vae.json"], "embedding": screen.embedding("0", "0")}
            files = {"diffusion": made["diffusion.safetensors"], "diffusion_record": made["diffusion.json"], "effects": screen.effects}
            write_trial(**pair, **files, config=screen.generation, device=device, seed=3, out=folder / "trial.json")
        for name in ("vae.json", "diffusion.json"):
            record = read_json(made[name])
            assert (record["device"], record.get("cuda_graph")) == (("cpu", None) if device == "cpu" else ("pretended", True))
        found.append((MeanSet.read(made["means.parquet"]).mean, np.array(list(Trial.read(folder / "trial.json").pseudo.values()))))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9)


def whole_fold(screen, folder: Path, device: str = "cpu") -> dict[str, list[Path]]:
    """Train both cross-fit models of fold 0 in one job a stage."""
    folder.mkdir(exist_ok=True)
    names = ("vae.safetensors", "vae.json", "diffusion.safetensors", "diffusion.json")
    out = {name: [folder / f"{q}{name}" for q in ("0", "1")] for name in names}
    common = {"cells": screen.cells, "splits": screen.splits, "effects": screen.effects, "fold": "0", "crossfit": ["0", "1"]}
    run = {"device": device, "seed": 3, "scratch": folder / "scratch"}
    write_vaes(**common, **run, config=screen.vae, weights=out["vae.safetensors"], record=out["vae.json"])
    pairs = {"vae": out["vae.safetensors"], "vae_record": out["vae.json"], "embedding": [screen.embedding("0", q) for q in ("0", "1")]}
    write_diffusions(**common, **run, **pairs, config=screen.diffusion, weights=out["diffusion.safetensors"], record=out["diffusion.json"])
    assert not (folder / "scratch").exists()
    return out


def test_models_of_a_fold_in_one_job(screen, models: list[dict[str, Path]], tmp_path: Path) -> None:
    for name, paths in whole_fold(screen, tmp_path).items():
        for q, path in enumerate(paths):
            if path.suffix == ".json":
                timed = ("seconds", "steps_per_second")
                one, other = ({k: v for k, v in read_json(x).items() if k not in timed} for x in (path, models[q][name]))
                assert one == other
            else:
                assert path.read_bytes() == models[q][name].read_bytes()


def test_models_of_a_fold_side_by_side(screen, tmp_path: Path, monkeypatch) -> None:
    single = {name: getattr(screen, name).model_copy(update={"precision": "fp32"}) for name in ("vae", "diffusion")}
    alone = whole_fold(replace(screen, **single), tmp_path / "alone")
    steps: list[int] = []
    advance = SideBySide.advance
    monkeypatch.setattr(SideBySide, "advance", lambda self: (steps.append(len(self.trainers)), advance(self)))
    with pretended_gpu():
        made = whole_fold(replace(screen, **single), tmp_path / "together", "cuda")
    assert set(steps) == {2}
    for name in ("vae", "diffusion"):
        for q, path in enumerate(made[f"{name}.safetensors"]):
            own, other = checkpoint.load(path)[0], checkpoint.load(alone[f"{name}.safetensors"][q])[0]
            assert own.keys() == other.keys()
            for key, value in own.items():
                torch.testing.assert_close(value, other[key], rtol=1e-3, atol=1e-3)
            records = [read_json(paths[f"{name}.json"][q]) for paths in (made, alone)]
            assert [record["device"] for record in records] == ["pretended", "cpu"]
            timed = {"device", "gpu_memory_gib", "cuda_graph", "seconds", "steps_per_second", "history"}
            assert all(records[0][key] == records[1][key] for key in records[1].keys() - timed)


def test_every_model_has_a_seed_of_its_own(screen, models: list[dict[str, Path]]) -> None:
    """Some of the same cells, all of the control's among them, in another order and with other first weights."""
    for name, part in (("vae.safetensors", "encoder.0.weight"), ("diffusion.safetensors", "denoiser.label.0.weight")):
        one, other = (checkpoint.load(made[name])[0][part] for made in models)
        assert abs(np.corrcoef(one.flatten(), other.flatten())[0, 1]) < 0.5


def test_an_ended_training_of_a_killed_job_is_not_made_again(screen, models: list[dict[str, Path]], tmp_path: Path, monkeypatch) -> None:
    advance, done = Trainer.advance, []

    def killed(self: Trainer, loss) -> None:
        if len(done) == 12:
            raise KeyboardInterrupt
        advance(self, loss)
        done.append(self.state.step)

    screen = replace(screen, vae=screen.vae.model_copy(update={"checkpoint_seconds": 1e-9}))
    monkeypatch.setattr(Trainer, "advance", killed)
    with pytest.raises(KeyboardInterrupt):
        whole_fold(screen, tmp_path)
    first = read_json(models[0]["vae.json"])["steps"]
    assert first < 12 and done[first:] == list(range(1, 13 - first))
    done.clear()
    monkeypatch.setattr(Trainer, "advance", lambda self, loss: (advance(self, loss), done.append(self.state.step)))
    made = whole_fold(screen, tmp_path)
    assert done[0] == 13 - first
    for q, path in enumerate(made["vae.safetensors"]):
        assert path.read_bytes() == models[q]["vae.safetensors"].read_bytes()


def test_a_training_on_a_gpu_resumes(screen, tmp_path: Path) -> None:
    common = {"cells": screen.cells, "splits": screen.splits, "effects": screen.effects, "fold": "0", "crossfit": ["0"]}
    config, made = screen.vae.model_copy(update={"checkpoint_seconds": 0.0, "cuda_graphs": True}), []
    save, saves = Trainer.save, []

    def killed(self: Trainer) -> None:
        save(self)
        saves.append(self.state.step)
        if len(saves) == 3:
            raise KeyboardInterrupt

    with pretended_gpu():
        for folder in ("whole", "killed"):
            run = {"device": "cuda", "seed": 3, "scratch": tmp_path / folder, "config": config}
            out = {"weights": tmp_path / f"{folder}.safetensors", "record": tmp_path / f"{folder}.json"}
            if folder == "killed":
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(Trainer, "save", killed)
                    with pytest.raises(KeyboardInterrupt):
                        write_vaes(**common, **run, **listed(**out))
                assert saves == [1, 2, 3]
            write_vaes(**common, **run, **listed(**out))
            made.append(out["weights"].read_bytes())
    assert made[0] == made[1]


def test_a_pretended_gpu_refuses_what_a_gpu_does() -> None:
    with pretended_gpu():
        x = torch.ones(3, device="cuda")
        assert x.device == torch.device("cuda:0")
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(3)
        with pytest.raises(TypeError, match="to numpy"):
            x.numpy()
        assert (2 * x).cpu().tolist() == [2, 2, 2]
