"""Fine-tuning: the objectives as formulas, overfitting four pictures, what is logged and written, refusals in one line."""

import json
import os
import subprocess
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import CAPTIONS, assert_same_run, log_of, metadata_of, run_script, seeded, state_of, steps_of
from PIL import Image
from safetensors.torch import load_file

import train
from checkpoint import save
from mmdit import MMDiT
from text import SD3Text
from train import objective
from training import batches, run
from training.cache import Embeddings
from vae import VAE

EQUAL = (1.0, 1.0, 1.0, 1.0)


def refusal_of(settings, **changed: object) -> str:
    """The one line that the script ends with."""
    with pytest.raises(SystemExit) as end:
        train.main(settings.flags(**changed))
    assert str(end.value).startswith("error: ") and "\n" not in str(end.value)
    return str(end.value)


# ---- the objective

def drawn(batch: int = 3) -> tuple[torch.Tensor, ...]:
    generator = seeded(0)
    velocity, latent, noise = (torch.randn(batch, 16, 6, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    sigma, weight = (torch.rand(batch, generator=generator, dtype=torch.float64) for _ in range(2))
    return velocity, latent, noise, sigma, weight


def test_paper_objective_with_equal_bands_is_the_weighted_velocity_loss():
    velocity, latent, noise, sigma, weight = drawn()
    plain = (weight * (velocity - (noise - latent)).square().mean((1, 2, 3))).mean()
    assert abs(objective("paper", velocity, latent, noise, sigma, weight, EQUAL, 0.0) - plain) < 1e-12


def test_release_objective_with_equal_bands_is_sigma_squared_times_it():
    velocity, latent, noise, sigma, weight = drawn()
    plain = (weight * sigma**2 * (velocity - (noise - latent)).square().mean((1, 2, 3))).mean()
    assert abs(objective("release", velocity, latent, noise, sigma, weight, EQUAL, 0.0) - plain) < 1e-12


def test_velocity_and_noise_objectives_are_what_the_header_says():
    velocity, latent, noise, sigma, weight = drawn()
    error = (velocity - (noise - latent)).square().mean((1, 2, 3))
    assert abs(objective("velocity", velocity, latent, noise, sigma, weight, EQUAL, 0.0) - (weight * error).mean()) < 1e-6  # it is in fp32
    plain = (weight * (1 - sigma)**2 * error).mean()
    assert abs(objective("noise", velocity, latent, noise, sigma, weight, EQUAL, 0.0) - plain) < 1e-12


@pytest.mark.parametrize("name", ["paper", "release"])
def test_gradients_differ_only_with_bands_or_huber(name):
    _, latent, noise, sigma, weight = drawn()

    def gradient(bands: tuple[float, ...] | None, huber: float) -> torch.Tensor:
        velocity = drawn()[0].requires_grad_()
        if bands is None:
            error = (velocity - (noise - latent)).square().mean((1, 2, 3))
            loss = (weight * error * (sigma**2 if name == "release" else 1)).mean()
        else:
            loss = objective(name, velocity, latent, noise, sigma, weight, bands, huber)
        return torch.autograd.grad(loss, velocity)[0]

    plain = gradient(None, 0.0)
    assert (gradient(EQUAL, 0.0) - plain).abs().max() < 1e-12
    for bands, huber in (((1.0, 2.0, 2.0, 4.0), 0.0), (EQUAL, 0.1)):
        other = gradient(bands, huber)
        assert 1 - F.cosine_similarity(other.flatten(), plain.flatten(), dim=0) > 0.01


def test_only_the_weighted_band_is_seen():
    velocity, latent, noise, sigma, weight = drawn()
    velocity = noise - latent + 0.5  # an error that is LL alone: 0.5 everywhere is 1 in LL
    assert abs(objective("paper", velocity, latent, noise, sigma, torch.ones_like(sigma), (1, 0, 0, 0), 0.0) - 0.25) < 1e-12
    assert objective("paper", velocity, latent, noise, sigma, weight, (0, 1, 1, 1), 0.0) < 1e-24


def test_release_latents_are_not_shifted_and_paper_ones_are(settings, model, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "objective", lambda *inputs: seen.append(inputs[2]) or objective(*inputs))
    for recipe in ("paper", "release"):
        train.train(settings(steps=1, recipe=recipe, dilation=2, out=tmp_path / recipe))
    vae = VAE.load(model / "sd3.safetensors")
    assert torch.allclose(seen[1] - seen[0], torch.tensor(vae.shift_factor * vae.scale_factor), atol=1e-5)


# ---- learning, logging, what is written

def test_one_batch_is_learnt_by_heart(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "read_batch", lambda step, **rest: batches.read_batch(0, **rest))
    train.train(settings(steps=80, lr=4e-3, save_every=80, cache_latents=True))
    loss = [row["loss"] for row in log_of(tmp_path / "out")]
    assert loss[0] > 1.5 and max(loss[-5:]) < 0.02  # the posterior is drawn anew


def test_four_pictures_are_learnt_whatever_the_noise(settings, tmp_path):
    train.train(settings(steps=400, lr=4e-3, warmup=20, cache_latents=True, drop_caption=0, save_every=400))
    loss = [row["loss"] for row in log_of(tmp_path / "out")]
    # 1.58 is the mean of 1 / ((1 - sigma)^2 + sigma^2), the least that can be reached on latents of which only mean and deviation are known
    assert sum(loss[:10]) / 10 > 1.9 and sum(loss[-50:]) / 50 < 1.0


def test_log_has_the_bands_and_their_mean_is_the_loss(settings, tmp_path):
    train.train(settings(steps=2))
    for row in log_of(tmp_path / "out"):
        assert row.keys() == {"step", "loss", "v_ll", "v_lh", "v_hl", "v_hh", "v_by_sigma", "grad_norm", "lr", "peak_gib", "images_per_s",
                              "matmul_share", "eta_s"}
        assert row["loss"] == pytest.approx(sum(row[f"v_{band}"] for band in ("ll", "lh", "hl", "hh")) / 4, abs=2e-5)
    train.train(settings(steps=2, objective="release", out=tmp_path / "release"))
    assert [row["v_ll"] for row in log_of(tmp_path / "release")][0] == log_of(tmp_path / "out")[0]["v_ll"]  # the same draws
    assert log_of(tmp_path / "release")[0]["loss"] < log_of(tmp_path / "out")[0]["loss"]


def test_learning_rate_warms_up(settings, tmp_path):
    train.train(settings(steps=5, warmup=4))
    assert [row["lr"] for row in log_of(tmp_path / "out")] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3])


def test_written_model_loads_and_carries_what_shapes_do_not_say(settings, model, tmp_path):
    train.train(settings(steps=2, save_dtype="fp16"))
    file = tmp_path / "out" / "sd3.safetensors"
    said, state = metadata_of(file), state_of(tmp_path / "out")
    transformer, vae, before = MMDiT.load(file), VAE.load(file), VAE.load(model / "sd3.safetensors")
    assert all(torch.equal(t, state[f"model.{name}"].half().float()) for name, t in transformer.state_dict().items())
    assert all(torch.equal(t, before.state_dict()[name].half().float()) for name, t in vae.state_dict().items())
    assert (vae.scale_factor, vae.shift_factor, vae.config) == (before.scale_factor, before.shift_factor, before.config)
    assert said["norm_groups"] == "1" and float(said["scale_factor"]) == vae.scale_factor != 1.0
    assert {key: said[key] for key in ("res", "factor", "steps", "cfg", "time_shift")} == {
        "res": "64", "factor": "16", **{key: metadata_of(model / "sd3.safetensors")[key] for key in ("steps", "cfg", "time_shift")}}
    training = json.loads(said["training"])
    assert training["lr"] == 1e-3 and training["steps"] == 2 and training["bands"] == [1, 1, 1, 1]
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["save_dtype"] == "fp16"
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["checkpoints", "log.jsonl", "sd3.safetensors", "settings.json"]


@pytest.mark.parametrize("on_host", [None, True])
def test_averaged_weights_are_the_ones_written(settings, tmp_path, monkeypatch, on_host):
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


def test_other_transformer_is_where_training_begins(settings, model, tmp_path):
    transformer = MMDiT.load(model / "sd3.safetensors")
    with torch.no_grad():
        transformer.final_layer.linear.bias.fill_(3.0)
    save(tmp_path / "other.safetensors", transformer.state_dict(), {"steps": 4})
    train.train(settings(steps=1, lr=0, transformer=tmp_path / "other.safetensors"))
    written = MMDiT.load(tmp_path / "out" / "sd3.safetensors")
    assert (written.final_layer.linear.bias == 3).all() and metadata_of(tmp_path / "out" / "sd3.safetensors")["steps"] == "4"


def test_checkpoint_is_there_before_pictures_are_drawn(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "draw_samples", None)
    with pytest.raises(TypeError):
        train.train(settings(steps=3, sample_every=3))
    assert steps_of(tmp_path / "out") == 3


def test_runs_without_git(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run.commit() == "unknown"


@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_rounded_state_is_bf16_under_fsdp_too(settings, tmp_path, kind):
    done = run_script("train.py", *settings.flags(steps=2, state="bf16", shard=kind, ema=0.5))
    assert done.returncode == 0, done.stderr
    state = state_of(tmp_path / "out")
    assert {t.dtype for name, t in state.items() if not name.startswith("ema.")} == {torch.bfloat16}
    assert {t.dtype for name, t in state.items() if name.startswith("ema.")} == {torch.float32}
    train.train(settings(steps=2, state="bf16", ema=0.5, out=tmp_path / "whole"))
    together, alone = ([row["loss"] for row in log_of(tmp_path / name)] for name in ("out", "whole"))
    assert together == pytest.approx(alone, rel=0.01)


def test_rounded_state_trains_and_resumes(settings, tmp_path):
    train.train(settings(steps=60, state="bf16", lr=4e-3, save_every=30, out=tmp_path / "whole"))
    loss = [row["loss"] for row in log_of(tmp_path / "whole")]
    assert sum(loss[-20:]) < 0.9 * sum(loss[:20])
    assert {t.dtype for name, t in state_of(tmp_path / "whole").items() if "pos_embed" not in name} == {torch.bfloat16}
    train.train(settings(steps=30, state="bf16", lr=4e-3, save_every=30))
    train.train(settings(steps=60, state="bf16", lr=4e-3, save_every=30))
    assert_same_run(tmp_path / "whole", tmp_path / "out")


@pytest.mark.parametrize("kept", ["recompute", "host"])
def test_recomputed_activations_change_nothing(settings, tmp_path, kept):
    for activations in ("keep", kept):
        train.train(settings(steps=2, activations=activations, out=tmp_path / activations))
    assert_same_run(tmp_path / "keep", tmp_path / kept)


def test_cached_latents_change_nothing(settings, photos, tmp_path):
    folder = broken_folder(photos, tmp_path / "data", "none")
    made = {}
    for out in ("filled", "read"):
        train.train(settings(steps=2, data=folder, out=tmp_path / out, cache_latents=True))
        made[out] = {file: file.stat().st_mtime_ns for file in folder.glob(".latents/*/*")}
    assert len(made["filled"]) == 4 and made["filled"] == made["read"]
    assert_same_run(tmp_path / "filled", tmp_path / "read")


def test_aspect_buckets_train_on_pictures_of_several_shapes(settings, photos, tmp_path, monkeypatch):
    folder = broken_folder(photos, tmp_path / "data", "none")
    for k, size in enumerate(((96, 48), (48, 96), (97, 50), (50, 50))):
        Image.new("RGB", size, "teal").save(folder / f"{k}.png")
    shapes, formula = set(), train.objective
    monkeypatch.setattr(train, "objective", lambda *inputs: shapes.add(tuple(inputs[1].shape[-2:])) or formula(*inputs))
    train.train(settings(steps=3, factor=8, res=48, aspect=True, batch=2, data=folder))
    assert shapes == {(4, 8), (8, 4), (6, 6)}


def test_sample_pictures_come_in_a_grid(settings, tmp_path):
    train.train(settings(steps=2, sample_every=2))
    assert Image.open(tmp_path / "out" / "samples" / "step-00000002.png").size == (128, 128)


# ---- what goes wrong

def test_loss_that_is_no_number_ends_the_run_and_keeps_the_last_checkpoint(settings, tmp_path, monkeypatch):
    factors, formula = iter([1, 1, 1, 1, float("nan")]), train.objective
    monkeypatch.setattr(train, "objective", lambda *arguments: formula(*arguments) * next(factors))
    message = refusal_of(settings)
    assert "step 4: gradient norm nan" in message and all(f"{k}.png 0." in message for k in range(4))
    assert f"the last good checkpoint is in {tmp_path}/out" in message
    assert steps_of(tmp_path / "out") == 3 and all(t.isfinite().all() for t in state_of(tmp_path / "out").values())


@pytest.mark.parametrize("save_dtype", ["fp16", "fp32"])
def test_diverged_run_never_leaves_weights_that_are_no_numbers(settings, tmp_path, monkeypatch, save_dtype):
    message = refusal_of(settings, lr=1e30, save_every=1, steps=1 if save_dtype == "fp16" else 6, save_dtype=save_dtype)
    assert ("step 1: gradient norm" in message) if save_dtype == "fp32" else ("NaN or Inf in fp16" in message and "--save-dtype" in message)
    assert not (tmp_path / "out" / "sd3.safetensors").exists() and all(t.isfinite().all() for t in state_of(tmp_path / "out").values())


def test_dry_run_prints_the_settings_and_writes_nothing(settings, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(MMDiT, "load", None)
    before = sorted(photos.rglob("*"))
    train.train(settings(dry_run=True, bands="1,2,2,4"))
    said = json.loads(capsys.readouterr().out)
    assert said["bands"] == [1, 2, 2, 4] and said["steps"] == 6 and said["objective"] == "paper"
    assert not (tmp_path / "out").exists() and sorted(photos.rglob("*")) == before


def broken_folder(photos: Path, folder: Path, kind: str) -> Path:
    folder.mkdir()
    rows = [{"file_name": f"{k}.png", "text": caption} for k, caption in enumerate(CAPTIONS)]
    for row in rows:
        (folder / row["file_name"]).write_bytes((photos / row["file_name"]).read_bytes())
    if kind == "small":
        Image.new("RGB", (90, 63)).save(folder / "2.png")
    elif kind == "text":
        (folder / "2.png").write_text("no picture")
    elif kind == "missing":
        (folder / "2.png").unlink()
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + ("\n{" if kind == "line" else ""))
    return folder


@pytest.mark.parametrize("kind, says", [("small", "2.png: its short side is 63 px, below --res 64"), ("text", "2.png: not a complete picture"),
                                        ("missing", "metadata.jsonl:3: no picture '2.png'"), ("line", "metadata.jsonl:5: each line is")])
@pytest.mark.parametrize("dry", [True, None])
def test_errors_in_the_data_come_before_any_work(settings, photos, tmp_path, monkeypatch, kind, says, dry):
    monkeypatch.setattr(MMDiT, "load", None)
    monkeypatch.setattr(SD3Text, "load", None)
    assert says in refusal_of(settings, data=broken_folder(photos, tmp_path / "data", kind), dry_run=dry)
    assert not (tmp_path / "out").exists()


def test_picture_that_turns_out_truncated_is_named(settings, photos, tmp_path, monkeypatch):
    folder = broken_folder(photos, tmp_path / "data", "none")
    (folder / "1.png").write_bytes((photos / "1.png").read_bytes()[:-400])
    assert "1.png: not a complete picture" in refusal_of(settings, data=folder, steps=50)


def test_cached_text_is_used_and_encoded_before_the_first_step(settings, photos, model, monkeypatch):
    Embeddings(photos / ".embeddings", model).fill(["", *CAPTIONS])
    monkeypatch.setattr(SD3Text, "load", None)
    train.train(settings(steps=1))


@pytest.mark.parametrize("changed, says", [
    ({"data": "nowhere"}, "nowhere/metadata.jsonl: not found"), ({"data": None}, "--data DIR: a folder of pictures"),
    ({"weights": "nowhere"}, "nowhere: no such folder; accept the model's licence"),
    ({"weights": None, "model": "tiny-sd4"}, "tiny-sd4: no such folder"),
    ({"transformer": "nowhere.safetensors"}, "nowhere.safetensors: no such file"),
    ({"transformer": "nowhere.safetensors", "dry_run": True}, "nowhere.safetensors: no such file")])
def test_what_is_not_there_is_named(settings, tmp_path, monkeypatch, changed, says):
    assert says in refusal_of(settings, **changed)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changed, says", [
    ({"res": 100}, "--res 100: give a multiple of 32 at --factor 16"), ({"res": 0}, "--res 0: give a multiple"),
    ({"res": 24, "factor": 8}, "--res 24: give a multiple of 16 at --factor 8"), ({"steps": 0}, "--steps 0: give 1 or more"),
    ({"batch": 0}, "1 or more"), ({"save_every": 0}, "1 or more"), ({"log_every": 0}, "1 or more"), ({"threads": 0}, "1 or more"),
    ({"clip": 0.0}, "a number above 0"), ({"ema": 1.5}, "a decay below 1"), ({"drop_caption": 2.0}, "a probability"),
    ({"accumulate": 0}, "--accumulate 0: give 1 or more"),
    ({"batch": 3, "accumulate": 2}, "--batch 3: give a multiple of 2, 1 ranks times --accumulate 2"),
    ({"offload": True}, "it with --shard"), ({"keep": 0}, "1 or more"), ({"t5_length": 0}, "T5 length 0: give 1 to 512"),
    ({"objective": "velocity", "bands": "1,1,1,2"}, "--objective velocity has no bands"),
    ({"time_shift": 0.0}, "a number above 0"), ({"huber": -1.0}, "0 or more"), ({"device": "foo"}, "--device foo: this machine has cpu")])
def test_settings_out_of_range_are_refused(settings, tmp_path, monkeypatch, changed, says):
    assert says in refusal_of(settings, **changed)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changed, says", [
    ({"factor": 4}, "invalid choice: 4"), ({"bands": "1,1,1"}, "four numbers from 0"),
    ({"bands": "1,1,1,-1"}, "four numbers from 0"), ({"bands": "a,b,c,d"}, "--bands"), ({"objective": "mine"}, "invalid choice: 'mine'")])
def test_wrong_flags_are_refused(settings, tmp_path, capsys, changed, says):
    with pytest.raises(SystemExit) as end:
        train.main(settings.flags(**changed))
    line = capsys.readouterr().err.splitlines()[-1]  # after argparse's usage
    assert end.value.code == 2 and ": error: " in line and says in line
    assert not (tmp_path / "out").exists()


# ---- the script

def test_script_explains_itself():
    done = run_script("train.py", "--help")
    assert done.returncode == 0 and done.stderr == ""
    flags = OrderedDict.fromkeys(word.rstrip(",") for word in done.stdout.split() if word.startswith("--"))
    assert {"--data", "--res", "--objective", "--bands", "--huber", "--ema", "--dry-run"} <= flags.keys()


def test_script_trains_and_writes(settings, tmp_path):
    done = run_script("train.py", *settings.flags(steps=2))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('{\n "model"') and done.stdout.endswith(f"wrote {tmp_path}/out/sd3.safetensors\n")
    assert [row["step"] for row in log_of(tmp_path / "out")] == [1, 2]
    assert MMDiT.load(tmp_path / "out" / "sd3.safetensors").config.hidden_size == 64


def test_script_ends_with_one_line_where_there_is_no_model(settings, tmp_path):
    done = run_script("train.py", *settings.flags(weights=tmp_path / "nowhere"))
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and done.stdout == "" and line.startswith(f"error: {tmp_path}/nowhere: no such folder")
    assert not (tmp_path / "out").exists()
