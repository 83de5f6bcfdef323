"""Training of Flux, and what train.py refuses of either family; cases of tests/test_train.py with another model."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import metadata_of, seeded
from PIL import Image
from safetensors.torch import load_file
from test_sample import flux_tensors

import data
import sample
import train
from checkpoint import save
from data import read_folder
from family import FLUX_DEV, FLUX_SCHNELL, SD3
from flow import flux_mu
from flux import Flux, FluxConfig, new_flux
from models import make_tiny
from text import FluxText
from training.cache import Embeddings

CONFIG = FluxConfig(hidden_size=64, depth=1, depth_single=1, head_dim=32, context_dim=192, pooled_dim=64,
                    mlp_hidden=128, axes_dim=(4, 14, 14))


@pytest.fixture(scope="module")
def folder(folders, tmp_path_factory) -> Path:
    """tiny-flux as models/make_tiny.py makes it, with a smaller transformer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-flux"
    shutil.copytree(folders / "tiny-flux", folder)
    save(folder / "flux.safetensors", flux_tensors(CONFIG), {"steps": 2, "res": 64})
    return folder


@pytest.fixture(scope="module")
def schnell(folder, tmp_path_factory) -> Path:
    """A transformer without guidance_in, for the same folder."""
    file = tmp_path_factory.mktemp("schnell") / "flux1-schnell.safetensors"
    save(file, {name: t for name, t in flux_tensors(CONFIG).items() if not name.startswith("guidance_in")}, {})
    return file


@pytest.fixture
def training(settings, folder, tmp_path):
    """training("run", steps=2, ...): run train.py on the four pictures; the folder it wrote."""
    def training(out="run", **changed) -> Path:
        train.main(settings.flags(**dict(weights=folder, out=tmp_path / out, steps=4, save_every=2) | changed))
        return tmp_path / out

    return training


def test_written_file_has_official_names_alone_and_records_how_to_draw(training, folder):
    run = training(steps=2)
    written, before = run / "flux.safetensors", load_file(folder / "flux.safetensors")
    assert {name: t.shape for name, t in load_file(written).items()} == {name: t.shape for name, t in before.items()}
    records = metadata_of(written)
    assert {key: records[key] for key in ("steps", "res", "factor", "axes_dim")} == {
        "steps": "2", "res": "64", "factor": "16", "axes_dim": "4, 14, 14"}
    assert "scale_factor" not in records
    settings = json.loads(records["training"])
    assert (settings["density"], settings["time_shift"], settings["guidance"]) == ("uniform", 1.0, 3.5)


def test_written_file_draws(training, folder, tmp_path):
    run = training(steps=2)
    sample.run(sample.parse([f"--weights={folder}", "--prompt=a hill", "--device=cpu", f"--out={tmp_path}/a.png",
                             "--steps=1", f"--transformer={run}/flux.safetensors"]))
    assert Image.open(tmp_path / "a.png").size == (64, 64)


def test_sigma_in_training_may_be_drawn_otherwise(training):
    run = training(steps=1, density="logit_normal", time_shift="tokens")
    settings = json.loads((run / "settings.json").read_text())
    assert settings["density"] == "logit_normal" and settings["time_shift"] == math.exp(flux_mu(4))
    assert json.loads((training("b", steps=1, time_shift=6) / "settings.json").read_text())["time_shift"] == 6


def test_guidance_is_fed_as_a_number_per_image_and_not_to_schnell(training, schnell, monkeypatch):
    fed, forward = [], Flux.forward

    def heard(self, *inputs):
        if not inputs[0].is_meta:  # train.py counts its operations on meta
            fed.append(inputs[4])
        return forward(self, *inputs)

    monkeypatch.setattr(Flux, "forward", heard)
    training(steps=1)
    training("five", steps=1, guidance=5)
    training("none", steps=1, transformer=schnell)
    assert fed[0].tolist() == [3.5] * 4 and fed[1].tolist() == [5] * 4 and fed[2] is None


def test_run_broken_off_and_resumed_equals_an_uninterrupted_one(training, monkeypatch):
    complete, calls, formula = training("complete", ema=0.9), [], train.objective

    def broken_off(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError
        return formula(*arguments)

    monkeypatch.setattr(train, "objective", broken_off)
    with pytest.raises(RuntimeError):
        training("parts", ema=0.9)
    parts = training("parts", ema=0.9)
    a, b = load_file(complete / "flux.safetensors"), load_file(parts / "flux.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert metadata_of(complete / "flux.safetensors") == metadata_of(parts / "flux.safetensors")


def test_one_batch_of_four_pictures_is_learnt_by_heart(training, tmp_path, monkeypatch):
    class SameDraws(torch.Generator):
        def manual_seed(self, seed: int) -> torch.Generator:
            return super().manual_seed(3)  # draws all four pictures

    save(tmp_path / "new.safetensors", new_flux(CONFIG, seeded(0)).state_dict(), {})
    monkeypatch.setattr(torch, "Generator", SameDraws)
    run = training(steps=80, lr=4e-3, save_every=80, transformer=tmp_path / "new.safetensors", bands="1,2,2,4")
    loss = [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]
    print(f"loss {loss[0]:.2f} -> {loss[-1]:.4f}")
    assert loss[0] > 1.5 and max(loss[-5:]) < 0.02


def test_guidance_is_refused_where_there_is_no_input_for_it(training, schnell):
    with pytest.raises(SystemExit, match="--guidance 3.5: this is Flux-schnell"):
        training(transformer=schnell, guidance=3.5)


def test_a_transformer_of_the_other_family_is_refused(training, folders):
    with pytest.raises(SystemExit, match="is a transformer of SD3"):
        training(transformer=folders / "tiny-sd3" / "sd3.safetensors")


@pytest.mark.parametrize("model, repository", [("flux", "FLUX.1-dev"), ("flux-schnell", "FLUX.1-schnell")])
def test_flux_without_weights_is_refused_with_the_download_and_its_size(monkeypatch, model, repository):
    for network in (Flux, FluxText):
        monkeypatch.setattr(network, "load", None)
    with pytest.raises(SystemExit) as end:
        train.main(["--data", "nowhere", "--model", model, "--device", "cpu"])
    assert f"hf download black-forest-labs/{repository} --exclude" in end.value.code and "\n" not in end.value.code
    assert f"models/{model} (34 GB: " in end.value.code


def test_data_encodes_with_the_encoders_of_flux(photos, folder, folders, monkeypatch, capsys, tmp_path):
    shutil.copytree(photos, tmp_path / "photos", ignore=shutil.ignore_patterns(".embeddings"))
    monkeypatch.setattr("sys.argv", ["data.py", "encode", str(tmp_path / "photos"), "--weights", str(folder),
                                     "--device", "cpu"])
    data.main()
    assert capsys.readouterr().out.startswith("5 captions encoded")
    monkeypatch.setattr(FluxText, "load", None)
    embeddings = Embeddings(tmp_path / "photos" / ".embeddings", folder, family=FLUX_DEV)
    context, pooled = embeddings.read([item.captions[0] for item in read_folder(photos)])
    assert context.shape == (4, make_tiny.T5_LENGTH, 192) and pooled.shape == (4, 64)
    caches = {Embeddings(tmp_path, model, family=family).cache
              for model, family in ((folder, FLUX_DEV), (folder, FLUX_SCHNELL), (folders / "tiny-sd3", SD3))}
    assert len(caches) == 3
