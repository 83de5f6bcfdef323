"""Fine-tuning: overfitting four pictures, the log, the written files, options that change no number, refusals."""

import json
import math
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import (
    CAPTIONS,
    ROOT,
    assert_same_run,
    broken_folder,
    copy_of,
    flux_tensors,
    log_of,
    metadata_of,
    refusal_of,
    run_script,
    seeded,
    state_of,
    steps_of,
)
from PIL import Image
from safetensors.torch import load_file

import sample
import train
from checkpoint import open_weights, save
from data import Pictures, read_folder
from flow import flux_mu
from flux import Flux, FluxConfig, new_flux
from mmdit import MMDiT
from text import FluxText, SD3Text
from training import batches, run
from training.cache import Embeddings
from training.resume import newest
from vae import VAE

# ---- learning, logging, written files

def test_latents_are_shifted_by_the_paper_recipe_and_not_by_the_release(settings, model, tmp_path, monkeypatch):
    latents, formula = [], train.objective
    monkeypatch.setattr(train, "objective", lambda *inputs: latents.append(inputs[2]) or formula(*inputs))
    for recipe in ("paper", "release"):
        train.train(settings(steps=1, recipe=recipe, dilation=2, resize="lanczos", no_flip=True, out=tmp_path / recipe))
    vae = VAE.load(model / "sd3.safetensors")
    assert torch.allclose(latents[1] - latents[0], torch.tensor(vae.shift_factor * vae.scale_factor), atol=1e-5)


def test_one_batch_is_overfitted(settings, tmp_path, monkeypatch, device):
    monkeypatch.setattr(train, "read_batch", lambda step, **rest: batches.read_batch(0, **rest))
    train.train(settings(device=device, steps=80, lr=4e-3, save_every=80, cache_latents=True))
    loss = [row["loss"] for row in log_of(tmp_path / "out")]
    assert loss[0] > 1.5 and max(loss[-5:]) < 0.02  # not 0: each step draws from the posterior


def test_four_pictures_are_overfitted_at_any_noise(settings, tmp_path):
    train.train(settings(steps=400, lr=4e-3, warmup=20, cache_latents=True, drop_caption=0, save_every=400))
    loss = [row["loss"] for row in log_of(tmp_path / "out")]
    # from mean and deviation of the latents alone the least loss is the mean of 1 / ((1 - sigma)^2 + sigma^2), 1.58
    assert sum(loss[:10]) / 10 > 1.9 and sum(loss[-50:]) / 50 < 1.0


def test_log_has_the_bands_and_their_mean_is_the_loss(settings, tmp_path):
    train.train(settings(steps=2))
    for row in log_of(tmp_path / "out"):
        assert row.keys() == {"step", "loss", "v_ll", "v_lh", "v_hl", "v_hh", "v_by_sigma", "grad_norm", "lr",
                              "peak_gib", "images_per_s", "matmul_share", "eta_s"}
        bands = [row[f"v_{band}"] for band in ("ll", "lh", "hl", "hh")]
        assert row["loss"] == pytest.approx(sum(bands) / 4, abs=2e-5)


def test_logged_bands_are_those_of_the_velocity_with_any_objective(settings, tmp_path):
    for name in ("paper", "release"):
        train.train(settings(steps=1, objective=name, out=tmp_path / name))
    (paper,), (release,) = log_of(tmp_path / "paper"), log_of(tmp_path / "release")
    assert release["v_ll"] == paper["v_ll"] and release["loss"] < paper["loss"]


def test_learning_rate_warms_up(settings, tmp_path):
    train.train(settings(steps=5, warmup=4))
    assert [row["lr"] for row in log_of(tmp_path / "out")] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3])


def test_written_model_loads_with_the_trained_transformer_and_the_vae_of_before(settings, model, tmp_path):
    train.train(settings(steps=2, save_dtype="fp16"))
    file, state = tmp_path / "out" / "sd3.safetensors", state_of(tmp_path / "out")
    transformer, vae, before = MMDiT.load(file), VAE.load(file), VAE.load(model / "sd3.safetensors")
    for name, t in transformer.state_dict().items():
        assert torch.equal(t, state[f"model.{name}"].half().float())
    for name, t in vae.state_dict().items():
        assert torch.equal(t, before.state_dict()[name].half().float())
    assert (vae.scale_factor, vae.shift_factor, vae.config) == (before.scale_factor, before.shift_factor, before.config)
    assert vae.scale_factor != 1.0


def test_metadata_of_the_written_model_has_what_shapes_do_not_tell(settings, model, tmp_path):
    train.train(settings(steps=2))
    metadata, before = (metadata_of(folder / "sd3.safetensors") for folder in (tmp_path / "out", model))
    assert (metadata["norm_groups"], metadata["res"], metadata["factor"]) == ("1", "64", "16")
    for key in ("scale_factor", "steps", "cfg", "time_shift"):
        assert metadata[key] == before[key]
    recorded = json.loads(metadata["training"])
    assert recorded["lr"] == 1e-3 and recorded["steps"] == 2 and recorded["bands"] == [1, 1, 1, 1]


def test_run_writes_checkpoints_log_model_and_settings_and_nothing_else(settings, tmp_path):
    out = tmp_path / "out"
    train.train(settings(steps=2, save_dtype="fp16"))
    assert json.loads((out / "settings.json").read_text())["save_dtype"] == "fp16"
    plotted = ["loss.png"] if find_spec("matplotlib") else []
    assert sorted(f.name for f in out.iterdir()) == [".lock", "checkpoints", "log.jsonl", *plotted, "sd3.safetensors",
                                                     "settings.json"]


def test_t5_length_of_a_run_is_recorded_and_the_next_run_and_the_pictures_take_it(settings, model, tmp_path):
    train.train(settings(steps=1, t5_length=5, factor=8))
    file = tmp_path / "out" / "sd3.safetensors"
    records = metadata_of(file)
    assert (records["t5_length"], records["factor"]) == ("5", "8")
    sampling = train.find(model, file)[0].sampling(open_weights(file))
    assert (sampling.t5_length, sampling.factor) == (5, 8)
    train.train(settings(steps=1, transformer=file, out=tmp_path / "next"))
    assert json.loads((tmp_path / "next" / "settings.json").read_text())["t5_length"] == 5
    train.main(["--export", f"--out={tmp_path}/next"])
    assert metadata_of(tmp_path / "next" / "sd3.safetensors")["t5_length"] == "5"


@pytest.mark.parametrize("on_host", [None, True])
def test_written_weights_are_the_averaged_ones(settings, tmp_path, monkeypatch, on_host):
    steps, save_checkpoint = [], run.save_checkpoint

    def watched(out, step, tensors, *rest):
        steps.append({name: t.clone() for name, t in tensors.items()})
        save_checkpoint(out, step, tensors, *rest)

    monkeypatch.setattr(run, "save_checkpoint", watched)
    start = MMDiT.load(settings().weights + "/sd3.safetensors").state_dict()
    train.train(settings(steps=3, ema=0.2, save_every=1, ema_on_host=on_host))
    written = load_file(tmp_path / "out" / "sd3.safetensors")
    for name, by_hand in start.items():
        for step, weights in enumerate(steps):
            rate = min(0.2, (step + 1) / (step + 10))
            by_hand = rate * by_hand + (1 - rate) * weights[f"model.{name}"]
        assert torch.allclose(written[f"model.diffusion_model.{name}"], by_hand, atol=1e-6)


def test_training_starts_from_the_given_transformer(settings, model, tmp_path):
    transformer, file = MMDiT.load(model / "sd3.safetensors"), tmp_path / "out" / "sd3.safetensors"
    with torch.no_grad():
        transformer.final_layer.linear.bias.fill_(3.0)
    save(tmp_path / "other.safetensors", transformer.state_dict(), {"steps": 4})
    train.train(settings(steps=1, lr=0, transformer=tmp_path / "other.safetensors"))
    assert (MMDiT.load(file).final_layer.linear.bias == 3).all() and metadata_of(file)["steps"] == "4"


def test_checkpoint_is_saved_before_pictures_are_drawn(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "draw_samples", None)
    with pytest.raises(TypeError):
        train.train(settings(steps=3, sample_every=3))
    assert steps_of(tmp_path / "out") == 3


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, OSError])
def test_finished_step_is_saved_if_what_follows_it_fails(settings, tmp_path, monkeypatch, error):
    monkeypatch.setattr(run, "draw_samples", Mock(side_effect=error("of the test")))
    with pytest.raises(error):
        train.train(settings(steps=9, save_every=9, sample_every=2))
    assert steps_of(tmp_path / "out") == 2


def test_commit_is_unknown_without_git(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run.commit() == "unknown"


# ---- memory options

@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_sharded_weights_and_moments_are_bf16_too_and_the_losses_close(settings, tmp_path, kind):
    done = run_script("train.py", *settings.flags(steps=2, state="bf16", shard=kind, ema=0.5))
    assert done.returncode == 0, done.stderr
    state = state_of(tmp_path / "out")
    assert {t.dtype for name, t in state.items() if not name.startswith("ema.")} == {torch.bfloat16}
    assert {t.dtype for name, t in state.items() if name.startswith("ema.")} == {torch.float32}
    train.train(settings(steps=2, state="bf16", ema=0.5, out=tmp_path / "one"))
    sharded, alone = ([row["loss"] for row in log_of(tmp_path / name)] for name in ("out", "one"))
    assert sharded == pytest.approx(alone, rel=0.01)


def test_bf16_weights_and_moments_train_and_resume_bit_for_bit(settings, tmp_path):
    usual = dict(state="bf16", lr=4e-3, save_every=30)
    train.train(settings(**usual, steps=60, out=tmp_path / "one"))
    loss = [row["loss"] for row in log_of(tmp_path / "one")]
    assert sum(loss[-20:]) < 0.9 * sum(loss[:20])
    assert {t.dtype for name, t in state_of(tmp_path / "one").items() if "pos_embed" not in name} == {torch.bfloat16}
    train.train(settings(**usual, steps=30))
    train.train(settings(**usual, steps=60))
    assert_same_run(tmp_path / "one", tmp_path / "out")


@pytest.mark.parametrize("activations", ["keep", "recompute"])
@pytest.mark.parametrize("name", ["tiny-sd3", "tiny-flux"])
def test_run_with_compiled_blocks_is_the_same_to_rounding(settings, folders, tmp_path, monkeypatch, name, activations):
    compiled, compiles = [], torch.compile

    def quickly(forward):  # without generating code
        compiled.append(forward)
        return compiles(forward, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", quickly)
    for out, changed in (("eager", {}), ("compiled", {"compile": True})):
        train.train(settings(weights=folders / name, steps=2, activations=activations, out=tmp_path / out, **changed))
    eager, other = log_of(tmp_path / "eager"), log_of(tmp_path / "compiled")
    assert len(compiled) > 1
    for row, twin in zip(eager, other, strict=True):
        assert twin["loss"] == pytest.approx(row["loss"], rel=1e-5)
        assert twin["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("cache_latents", [None, True])
def test_latents_encoded_in_bf16_are_close_and_identify_the_run(settings, tmp_path, monkeypatch, cache_latents):
    latents, formula = [], train.objective
    monkeypatch.setattr(train, "objective", lambda *inputs: latents.append(inputs[2]) or formula(*inputs))
    for dtype in ("fp32", "bf16"):
        train.train(settings(steps=1, vae_dtype=dtype, sample_every=1, out=tmp_path / dtype, cache=tmp_path / "cache",
                             cache_latents=cache_latents))
    exact, rounded = latents
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() < 0.02 * exact.norm()
    assert "vae_dtype bf16 -> fp32" in refusal_of(settings, steps=2, out=tmp_path / "bf16", cache=tmp_path / "cache",
                                                  cache_latents=cache_latents)


@pytest.mark.parametrize("activations", ["recompute", "host"])
def test_run_with_recomputed_activations_is_the_same_bit_for_bit(settings, tmp_path, activations):
    for choice in ("keep", activations):
        train.train(settings(steps=2, activations=choice, out=tmp_path / choice))
    assert_same_run(tmp_path / "keep", tmp_path / activations)


# ---- caches, shapes, pictures

def test_run_that_reads_the_latent_cache_equals_the_one_that_filled_it(settings, photos, tmp_path):
    folder, written = copy_of(photos, tmp_path / "data"), {}
    for out in ("filled", "read"):
        train.train(settings(steps=2, data=folder, out=tmp_path / out, cache_latents=True))
        written[out] = {file: file.stat().st_mtime_ns for file in folder.glob(".latents/*/*")}
    assert len(written["filled"]) == 4 and written["filled"] == written["read"]
    assert_same_run(tmp_path / "filled", tmp_path / "read")


def test_caches_may_lie_elsewhere(settings, photos, tmp_path):
    folder = copy_of(photos, tmp_path / "data")
    train.train(settings(steps=1, data=folder, cache=tmp_path / "cache", cache_latents=True))
    assert sorted(f.name for f in (tmp_path / "cache").iterdir()) == [".embeddings", ".latents"]
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("small, pictures", [("skip", 3), ("enlarge", 4)])
def test_small_pictures_are_skipped_or_enlarged(settings, photos, tmp_path, small, pictures):
    folder = broken_folder(photos, tmp_path / "data", "small")
    train.train(settings(steps=1, data=folder, small=small))
    run_json = json.loads((newest(tmp_path / "out") / "run.json").read_text())
    assert run_json["data"]["pictures"] == pictures


def test_resizing_of_the_release_is_pillows_bilinear(settings, photos, tmp_path, monkeypatch):
    folder = copy_of(photos, tmp_path / "data")
    for k in range(4):
        Image.open(folder / f"{k}.png").resize((100, 100), Image.Resampling.NEAREST).save(folder / f"{k}.png")
    seen, crop = [], batches.random_crop

    def watched(*arguments: object) -> torch.Tensor:
        seen.append(crop(*arguments).numpy())
        return torch.from_numpy(seen[-1])
    monkeypatch.setattr(batches, "random_crop", watched)
    train.train(settings(steps=1, data=folder, flip=None, recipe="release", dilation=2))
    expected = [Image.open(folder / f"{k}.png").resize((64, 64), Image.Resampling.BILINEAR) for k in range(4)]
    for pixels in seen[:4]:
        assert any((pixels == np.asarray(image)).all() or (pixels[:, ::-1] == np.asarray(image)).all()
                   for image in expected)


def test_run_whose_captions_are_cached_loads_no_text_encoder(settings, photos, model, tmp_path, monkeypatch):
    Embeddings(photos / ".embeddings", model).fill(["", *CAPTIONS])
    monkeypatch.setattr(SD3Text, "load", None)  # a call would raise
    train.train(settings(steps=1))
    assert steps_of(tmp_path / "out") == 1


def test_aspect_buckets_train_on_pictures_of_several_shapes(settings, photos, tmp_path, monkeypatch):
    folder = copy_of(photos, tmp_path / "data")
    for k, size in enumerate(((96, 48), (48, 96), (97, 50), (50, 50))):
        Image.new("RGB", size, "teal").save(folder / f"{k}.png")
    shapes, formula = set(), train.objective
    monkeypatch.setattr(train, "objective", lambda *inputs: shapes.add(tuple(inputs[1].shape[-2:])) or formula(*inputs))
    train.train(settings(steps=3, factor=8, res=48, aspect=True, batch=2, data=folder))
    assert shapes == {(4, 8), (8, 4), (6, 6)}


def test_sample_pictures_are_written_as_a_grid(settings, tmp_path):
    train.train(settings(steps=2, sample_every=2))
    assert Image.open(tmp_path / "out" / "samples" / "step-00000002.png").size == (128, 128)


# ---- refusals and failures

@pytest.mark.parametrize("changed, holds", [
    ({"out": "{model}"}, "{model}"), ({"out": "{model}/run"}, "{model}"), ({"out": "{photos}/a/b"}, "{photos}"),
    ({"out": "{photos}/../{name}/x"}, "{photos}"),
    ({"out": "{tmp_path}", "transformer": "{tmp_path}/sd3.safetensors"}, "{tmp_path}/sd3.safetensors")])
def test_out_that_would_change_what_is_read_is_refused(settings, photos, model, tmp_path, changed, holds):
    shutil.copy(model / "sd3.safetensors", tmp_path)
    names = {"photos": photos, "model": model, "tmp_path": tmp_path, "name": photos.name}
    changed = {key: value.format(**names) for key, value in changed.items()}
    before = sorted(model.iterdir()), sorted(photos.iterdir())
    message = refusal_of(settings, **changed)
    assert message.startswith(f"error: --out {changed['out']}: give a folder outside of {holds.format(**names)}")
    assert before == (sorted(model.iterdir()), sorted(photos.iterdir()))


def test_loss_that_is_nan_ends_the_run_and_leaves_the_last_checkpoint(settings, tmp_path, monkeypatch):
    factors, formula = iter([1, 1, 1, 1, float("nan"), float("nan")]), train.objective
    monkeypatch.setattr(train, "objective", lambda *arguments: formula(*arguments) * next(factors))
    message = refusal_of(settings)
    assert "step 4: gradient norm nan" in message and all(f"{k}.png 0." in message for k in range(4))
    assert f"the last good checkpoint is in {tmp_path}/out" in message
    assert steps_of(tmp_path / "out") == 3 and all(t.isfinite().all() for t in state_of(tmp_path / "out").values())
    assert "the last good checkpoint" not in refusal_of(settings, out=tmp_path / "first")


@pytest.mark.parametrize("steps, save_dtype, reasons", [
    (6, "fp32", ("step 1: gradient norm",)), (1, "fp16", ("NaN or Inf in fp16", "--save-dtype"))])
def test_diverged_run_writes_no_weights_that_are_not_finite(settings, tmp_path, steps, save_dtype, reasons):
    message = refusal_of(settings, lr=1e30, save_every=1, steps=steps, save_dtype=save_dtype)
    assert all(reason in message for reason in reasons)
    assert not (tmp_path / "out" / "sd3.safetensors").exists()
    assert all(t.isfinite().all() for t in state_of(tmp_path / "out").values())


def test_dry_run_prints_the_settings_and_what_is_read_and_writes_nothing(settings, photos, model, tmp_path, monkeypatch,
                                                                        capsys):
    monkeypatch.setattr(MMDiT, "load", None)  # a call would raise
    before = sorted(photos.rglob("*"))
    train.train(settings(dry_run=True, bands="1,2,2,4"))
    machine, printed = capsys.readouterr().out.split("\n", 1)
    assert machine.startswith("cpu: ") and "torch" in machine
    printed = json.loads(printed)
    assert printed["bands"] == [1, 2, 2, 4] and printed["steps"] == 6 and printed["objective"] == "paper"
    assert printed["read"] | {"vae": 0, "transformer": 0} == {
        "family": "SD3", "transformer": 0, "vae": 0, "text_encoders": str(model), "pictures": 4, "crops": ["64x64"]}
    assert printed["read"]["transformer"] == printed["read"]["vae"] == f"{model}/sd3.safetensors"
    assert not (tmp_path / "out").exists() and sorted(photos.rglob("*")) == before


@pytest.mark.parametrize("kind, reason", [
    ("small", "2.png: its short side is 63 px, below --res 64"), ("text", "2.png: not a complete picture"),
    ("missing", "metadata.jsonl:3: no picture '2.png'"), ("line", "metadata.jsonl:5: not JSON")])
@pytest.mark.parametrize("dry", [True, None])
def test_errors_in_the_data_are_refused_before_any_work(settings, photos, tmp_path, monkeypatch, kind, reason, dry):
    monkeypatch.setattr(MMDiT, "load", None)  # a call would raise
    monkeypatch.setattr(SD3Text, "load", None)
    assert reason in refusal_of(settings, data=broken_folder(photos, tmp_path / "data", kind), dry_run=dry)
    assert not (tmp_path / "out").exists()


def test_truncated_picture_is_named_when_it_is_read(settings, photos, tmp_path):
    folder = broken_folder(photos, tmp_path / "data", "truncated")
    assert "2.png: not a complete picture" in refusal_of(settings, data=folder, steps=50)


@pytest.mark.parametrize("changed, reason", [
    ({"data": "nowhere"}, "nowhere/metadata.jsonl: not found"), ({"data": None}, "--data DIR: a folder of pictures"),
    ({"weights": "nowhere"}, "nowhere: no such folder; accept the model's licence"),
    ({"weights": None, "model": "tiny-sd4"}, "tiny-sd4: no such folder"),
    ({"transformer": "nowhere.safetensors"}, "nowhere.safetensors: no such file"),
    ({"transformer": "nowhere.safetensors", "dry_run": True}, "nowhere.safetensors: no such file")])
def test_missing_file_is_named(settings, tmp_path, changed, reason):
    assert reason in refusal_of(settings, **changed)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changed, reason", [
    ({"res": 100}, "--res 100: give a multiple of 32 at --factor 16"), ({"res": 0}, "--res 0: give a multiple"),
    ({"res": 24, "factor": 8}, "--res 24: give a multiple of 16 at --factor 8"),
    ({"steps": 0}, "--steps 0: give 1 or more"), ({"batch": 0}, "1 or more"), ({"save_every": 0}, "1 or more"),
    ({"log_every": 0}, "1 or more"), ({"threads": 0}, "1 or more"), ({"keep": 0}, "1 or more"),
    ({"clip": 0.0}, "a number above 0"), ({"time_shift": 0.0}, "0.001 to 1,000"), ({"huber": -1.0}, "0 or more"),
    ({"ema": 1.5}, "a decay below 1"), ({"drop_caption": 2.0}, "a probability"),
    ({"accumulate": 0}, "--accumulate 0: give 1 or more"), ({"batch": 10**12}, "1 or more, at most 65,536"),
    ({"lr": math.inf}, "--lr inf: give 0 or more"), ({"seed": 2**32 + 7}, "--seed 4294967303: give 0 to 2^32 - 1"),
    ({"steps": 10**10}, "at most 1,000,000,000"), ({"res": 2**20}, "at most 65,536"),
    ({"batch": 3, "accumulate": 2}, "--batch 3: give a multiple of 2, 1 ranks times --accumulate 2"),
    ({"offload": True}, "it with --shard"),
    ({"offload": True, "shard": "zero2", "state": "bf16"}, "--offload --state bf16: random rounding takes a CPU"),
    ({"state": "bf16", "dtype": "fp32"}, "--dtype fp32 --state bf16: bf16 weights compute in bf16"),
    ({"t5_length": 0}, "T5 length 0: give 1 to 512"),
    ({"objective": "velocity", "bands": "1,1,1,2"}, "--objective velocity has no bands"),
    ({"bands": "0,0,0,0"}, "--bands 0,0,0,0: give weights of at most 1,000,000"),
    ({"device": "foo"}, "--device foo: this machine has cpu")])
def test_settings_out_of_range_are_refused(settings, tmp_path, changed, reason):
    assert reason in refusal_of(settings, **changed)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changed, reason", [
    ({"factor": 4}, "invalid choice: 4"), ({"bands": "1,1,1"}, "four numbers from 0"),
    ({"bands": "1,1,1,-1"}, "four numbers from 0"), ({"bands": "a,b,c,d"}, "--bands"),
    ({"objective": "mine"}, "invalid choice: 'mine'")])
def test_flags_that_do_not_parse_are_refused(settings, tmp_path, capsys, changed, reason):
    with pytest.raises(SystemExit) as end:
        train.main(settings.flags(**changed))
    line = capsys.readouterr().err.splitlines()[-1]  # after argparse's usage
    assert end.value.code == 2 and ": error: " in line and reason in line
    assert not (tmp_path / "out").exists()


# ---- the script

def test_script_lists_its_flags_in_help():
    done = run_script("train.py", "--help")
    assert done.returncode == 0 and done.stderr == ""
    flags = {word.rstrip(",") for word in done.stdout.split() if word.startswith("--")}
    assert {"--data", "--res", "--objective", "--bands", "--huber", "--ema", "--dry-run"} <= flags


def test_script_trains_and_writes_a_model(settings, tmp_path):
    done = run_script("train.py", *settings.flags(steps=2))
    assert done.returncode == 0, done.stderr
    assert re.match(r'cpu: \d+ cores, 1 threads per rank; torch \S+\n{\n "model"', done.stdout)
    assert done.stdout.endswith(f"wrote {tmp_path}/out/sd3.safetensors\n")
    assert [row["step"] for row in log_of(tmp_path / "out")] == [1, 2]
    assert MMDiT.load(tmp_path / "out" / "sd3.safetensors").config.hidden_size == 64


def test_picture_of_the_laptop_line_shows_the_photograph_that_its_prompt_describes(tmp_path):
    """The line of the README, then a picture: its error is below a fourth of that of the best flat picture."""
    command = ("--data examples --transformer models/tiny-sd3/base_256.safetensors --res 256 --steps 10 --batch 4 "
               f"--lr 1e-4 --out {tmp_path}/out --cache {tmp_path} --threads 2")
    done = run_script("train.py", *command.split())
    assert done.returncode == 0, done.stderr
    item = read_folder(ROOT / "examples")[0]
    done = run_script("sample.py", "--transformer", tmp_path / "out" / "sd3.safetensors", "--out", tmp_path / "a.png",
                      "--prompt", item.captions[0])
    assert done.returncode == 0, done.stderr
    photograph = Pictures([item.path]).central_crop(0, 256, 256).astype(float)
    error = np.square(np.asarray(Image.open(tmp_path / "a.png"), dtype=float) - photograph).mean()
    assert error < np.square(photograph - photograph.mean((0, 1))).mean() / 4


def test_script_without_a_model_ends_with_one_line(settings, tmp_path):
    done = run_script("train.py", *settings.flags(weights=tmp_path / "nowhere"))
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and done.stdout == "" and line.startswith(f"error: {tmp_path}/nowhere: no such folder")
    assert not (tmp_path / "out").exists()


# ---- Flux

FLUX = FluxConfig(hidden_size=64, depth=1, depth_single=1, head_dim=32, context_dim=192, pooled_dim=64,
                    mlp_hidden=128, axes_dim=(4, 14, 14))


@pytest.fixture(scope="module")
def flux(folders, tmp_path_factory) -> Path:
    """tiny-flux as models/make_tiny.py makes it, with a smaller transformer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-flux"
    shutil.copytree(folders / "tiny-flux", folder)
    save(folder / "flux.safetensors", flux_tensors(FLUX), {"steps": 2, "res": 64})
    return folder


@pytest.fixture(scope="module")
def schnell( tmp_path_factory) -> Path:
    """A transformer without guidance_in, for the same folder."""
    file = tmp_path_factory.mktemp("schnell") / "flux1-schnell.safetensors"
    save(file, {name: t for name, t in flux_tensors(FLUX).items() if not name.startswith("guidance_in")}, {})
    return file


@pytest.fixture
def training(settings, flux, tmp_path):
    """training("run", steps=2, ...): run train.py on the four pictures; the flux it wrote."""
    def training(out="run", **changed) -> Path:
        train.main(settings.flags(**dict(weights=flux, out=tmp_path / out, steps=4, save_every=2) | changed))
        return tmp_path / out

    return training


def test_written_file_has_official_names_alone_and_records_how_to_draw(training, flux):
    run = training(steps=2)
    written, before = run / "flux.safetensors", load_file(flux / "flux.safetensors")
    assert {name: t.shape for name, t in load_file(written).items()} == {name: t.shape for name, t in before.items()}
    records = metadata_of(written)
    assert {key: records[key] for key in ("steps", "res", "factor", "axes_dim")} == {
        "steps": "2", "res": "64", "factor": "16", "axes_dim": "4, 14, 14"}
    assert "scale_factor" not in records
    settings = json.loads(records["training"])
    assert (settings["density"], settings["time_shift"], settings["guidance"]) == ("uniform", 1.0, 3.5)


def test_written_file_draws(training, flux, tmp_path):
    run = training(steps=2)
    sample.run(sample.parse([f"--weights={flux}", "--prompt=a hill", "--device=cpu", f"--out={tmp_path}/a.png",
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


def test_one_batch_of_four_pictures_is_overfitted(training, tmp_path, monkeypatch):
    class SameDraws(torch.Generator):
        def manual_seed(self, seed: int) -> torch.Generator:
            return super().manual_seed(3)  # draws all four pictures

    save(tmp_path / "new.safetensors", new_flux(FLUX, seeded(0)).state_dict(), {})
    monkeypatch.setattr(torch, "Generator", SameDraws)
    run = training(steps=80, lr=4e-3, save_every=80, transformer=tmp_path / "new.safetensors", bands="1,2,2,4")
    loss = [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert loss[0] > 1.5 and max(loss[-5:]) < 0.02
