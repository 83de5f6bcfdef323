"""Training an autoencoder: its start, batches by step, overfitting, resuming bit for bit, refusals in one line."""

import json
import os
import shutil
import signal
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import copy_of, log_of, metadata_of, run_script, seeded
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import train_vae
from data import Pictures
from train_vae import (
    Settings,
    batch_of,
    equalize,
    latent_statistics,
    main,
    new_vae,
    reconstruction_psnr,
    resume_state,
    save_state,
    train,
    vae_loss,
)
from vae import VAE, VAEConfig, to_image

TINY = VAEConfig((8, 8, 16, 36), (8, 8, 16, 36), 1, 2, 16, 1)
DEFAULT = VAEConfig((16, 24, 48, 64), (16, 24, 48, 64), 1, 2, 16, 1)


def smooth(height: int, width: int, seed: int) -> torch.Tensor:
    """A soft random picture, (3, H, W) in [-1, 1]."""
    coarse = torch.randn(1, 3, 5, 5, generator=seeded(seed))
    return F.interpolate(coarse, (height, width), mode="bicubic")[0].clamp(-2, 2) / 2


@pytest.fixture
def pictures(photos) -> Pictures:
    return Pictures(sorted(photos.glob("*.png")))


def central(pictures: Pictures, side: int) -> torch.Tensor:
    """(B, 3, side, side): the middle of every picture."""
    return torch.stack([to_image(pictures.central_crop(k, side, side)) for k in range(len(pictures))])


@pytest.fixture
def small_crops(monkeypatch):
    monkeypatch.setattr(train_vae, "CROPS", ((64, 32), (64, 64), (32, 32)))


def settings(photos: Path, out: Path, **changed) -> Settings:
    usual = dict(data=str(photos), out=str(out), widths="8,8,16,36", blocks=1, norm_groups=1, steps=6, pixels=4096,
                 lr=2e-3, warmup=2, clip=1.0, holdout=0, save_every=3, seed=0, threads=1)
    return Settings(**usual | changed)


def refusal_of(monkeypatch, photos: Path, out: Path, **changed) -> str:
    """The one line that the script ends with."""
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    with pytest.raises(SystemExit) as end:
        main([f"--{k.replace('_', '-')}={v}" for k, v in asdict(settings(photos, out, **changed)).items()
              if v is not None and v is not False])
    assert str(end.value).startswith("error: ") and "\n" not in str(end.value)
    return str(end.value)


@pytest.mark.parametrize("number, holdout", [(12, 6), (12, 7), (12, 8), (24, 6), (46, 6), (7, 6), (5, 1)])
def test_as_many_pictures_are_held_out_as_were_asked_for(tmp_path, number, holdout):
    names = [f"{k:02}.png" for k in range(number)]
    for name in names:
        Image.new("RGB", (32, 32)).save(tmp_path / name)
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": n, "text": "x"}) for n in names))
    trained, held_out = train_vae.split_pictures(settings(tmp_path, tmp_path, holdout=holdout))
    assert len(held_out) == holdout and len(trained) == number - holdout
    assert not {*trained.paths} & {*held_out.paths}


# ---- the start

@pytest.mark.parametrize("config", [TINY, DEFAULT, VAEConfig((8, 16, 16, 36), (8, 8, 16, 48), 2, 3, 16, 1)])
def test_fresh_weights_turn_gray_into_gray(config):
    vae, gray = new_vae(config, seed=0).requires_grad_(False), torch.zeros(1, 3, 64, 64)
    mean, logvar = vae.moments(gray, factor=8)
    assert mean.abs().max() < 1e-6 and (logvar - train_vae.FIRST_LOGVAR).abs().max() < 1e-6
    for factor in (8, 16):
        again = vae.decode(vae.encode(gray, factor), factor)
        assert again.shape == gray.shape and again.abs().max() < 1e-6


def test_fresh_features_come_twice_with_both_signs_and_pins_are_constant():
    vae, image = new_vae(DEFAULT, seed=0).requires_grad_(False), smooth(32, 48, 0)[None]
    branches = [m for name, m in vae.named_modules() if name.endswith((".conv2", ".proj_out"))]
    assert len(branches) == 2 * 4 + 4 * 2 - 4 + 2 * 2 + 2 and not any(m.weight.any() or m.bias.any() for m in branches)
    features = vae.encoder.conv_in(image)                                                # (1, 16, 32, 48)
    for _ in range(2):
        plus, minus = features.chunk(2, dim=1)
        assert torch.allclose(plus, -minus, atol=1e-6) and plus[:, 0].std() > 0.1
        assert (plus[:, -1] == train_vae.PIN).all() and (minus[:, -1] == -train_vae.PIN).all()
        features = vae.encoder.down[0](features)                                # the resnet, the step to the next level


def test_fresh_network_is_odd_and_nearly_linear():
    vae, image = new_vae(DEFAULT, seed=0).requires_grad_(False), smooth(64, 64, 0)[None]
    once, negated, half = (vae.decode(vae.encode(x, factor=8), factor=8) for x in (image, -image, 0.5 * image))
    assert (once + negated).abs().max() < 1e-5
    assert (2 * half - once).abs().mean() < 0.03 * once.abs().mean()  # what is left is the norms' share in the contrast


def test_fresh_weights_already_show_a_smooth_picture():
    vae = new_vae(DEFAULT, seed=0).requires_grad_(False)
    image = torch.stack([smooth(64, 64, k) for k in range(2)])
    error = (vae.decode(vae.encode(image, factor=8), factor=8).clamp(-1, 1) - image).square().mean()
    psnr, flat = (10 * torch.log10(4 / e) for e in (error, image.var()))  # dB; flat is the score of their mean colour
    assert psnr > 18 and psnr > flat + 4


def test_fresh_weights_are_a_function_of_the_seed():
    first, again, other = (new_vae(TINY, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["encoder.conv_in.weight"], other["encoder.conv_in.weight"])


def test_first_loss_is_finite_and_reaches_every_weight():
    vae = new_vae(TINY, seed=0)
    with torch.no_grad():  # a branch that ends in zeros hides what comes before it, until its end has moved
        for name, module in vae.named_modules():
            if name.endswith((".conv2", ".proj_out")):
                module.weight.fill_(0.01)
    vae_loss(vae, smooth(32, 32, 0)[None], torch.randn(1, 16, 4, 4)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())
    assert all(p.grad.any() for name, p in vae.named_parameters() if name.endswith("weight"))


# ---- batches, loss, learning

def at(seed: int, step: int) -> torch.Generator:
    return seeded(seed * 1_000_003 + step)


def test_batch_is_a_function_of_seed_and_step_alone(photos, small_crops):
    paths = sorted(photos.glob("*.png"))
    used, fresh = Pictures(paths), Pictures(paths)
    forward = {step: batch_of(used, 4096, at(5, step)) for step in range(16)}
    for step in reversed(range(16)):
        torch.manual_seed(step)
        assert torch.equal(batch_of(fresh, 4096, at(5, step)), forward[step])
    batches = list(forward.values())
    assert all(batch.numel() == 3 * 4096 and batch.shape[1] == 3 and batch.abs().max() <= 1 for batch in batches)
    assert len({batch.shape for batch in batches}) == 2 and len({float(batch.sum()) for batch in batches}) == 16
    assert not torch.equal(batch_of(used, 4096, at(5, 0)).flatten(), batch_of(used, 4096, at(6, 0)).flatten())


def test_a_crop_larger_than_the_budget_still_gives_one_picture(photos, monkeypatch):
    monkeypatch.setattr(train_vae, "CROPS", ((64, 64),))
    assert batch_of(Pictures(sorted(photos.glob("*.png"))), 100, at(0, 0)).shape == (1, 3, 64, 64)


def test_loss_is_reconstruction_plus_weighted_divergence():
    vae, image, draw = new_vae(TINY, seed=0).requires_grad_(False), smooth(32, 32, 0)[None], torch.randn(1, 16, 4, 4)
    mean, logvar = vae.moments(image, factor=8)
    posterior = torch.distributions.Normal(mean, torch.exp(0.5 * logvar))
    divergence = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    error = (vae.decode(mean + torch.exp(0.5 * logvar) * draw, factor=8) - image).abs().mean()
    assert abs(vae_loss(vae, image, draw) - (error + train_vae.KL_WEIGHT * divergence)) < 1e-6


def test_one_crop_is_overfitted():
    vae, image = new_vae(TINY, seed=0), smooth(32, 32, 1)[None]
    draw = torch.randn(1, 16, 4, 4, generator=seeded(0))
    optimizer, losses = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0), []
    for _ in range(40):
        loss = vae_loss(vae, image, draw)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.25 and sum(losses[-5:]) / 5 < 0.13


def test_equalized_latents_have_closer_deviations_and_decode_to_the_same_pictures(pictures):
    vae = new_vae(TINY, seed=0).requires_grad_(False)
    image = central(pictures, 64)
    before, decoded = vae.moments(image, 16)[0], vae.decoder(vae.moments(image, 16)[0], 16, 2)
    equalize(vae, pictures, res=64)
    after, again = vae.moments(image, 16)[0], vae.decoder(vae.moments(image, 16)[0], 16, 2)
    assert (decoded - again).abs().max() < 1e-4
    principal = torch.linalg.eigvalsh(before.transpose(0, 1).flatten(1).double().cov()).sqrt()
    deviations = after.transpose(0, 1).flatten(1).double().std(1).sort().values
    assert torch.allclose(deviations[4:], principal.sqrt()[4:], rtol=1e-2)  # the smallest are lost in fp32


def test_latent_statistics_normalise_the_latents(pictures):
    vae = new_vae(TINY, seed=0).requires_grad_(False)
    vae.scale_factor, vae.shift_factor = latent_statistics(vae, pictures, res=64)
    latents = vae.encode(central(pictures, 64))
    assert abs(latents.mean()) < 1e-5 and abs(latents.std() - 1) < 1e-4


def test_reconstruction_psnr_by_hand(pictures):
    vae = new_vae(TINY, seed=0).requires_grad_(False)
    values = reconstruction_psnr(vae, pictures, factor=16, res=64, side=32)
    image = central(pictures, 64)[2:3, :, 16:48, 16:48]
    again = vae.decode(vae.encode(image)).clamp(-1, 1)
    error = ((again + 1) * 127.5 - (image + 1) * 127.5).square().mean()
    assert len(values) == 4 and abs(values[2] - 10 * torch.log10(255**2 / error)) < 1e-3


def train_linear(linear: nn.Linear, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 5, generator=seeded(step))
        optimizer.zero_grad()
        linear(x).square().mean().backward()
        optimizer.step()


def test_resumed_state_equals_the_uninterrupted_one(tmp_path):
    def start():
        torch.manual_seed(0)
        linear = nn.Linear(5, 3)
        return linear, torch.optim.AdamW(linear.parameters(), lr=0.1)

    unbroken, optimizer = start()
    train_linear(unbroken, optimizer, range(6))
    first, optimizer = start()
    train_linear(first, optimizer, range(3))
    save_state(tmp_path / "run.safetensors", first, optimizer, 3, {"lr": 0.1})
    second, optimizer = start()
    assert resume_state(tmp_path / "none.safetensors", second, optimizer, {"lr": 0.1}) == 0
    step = resume_state(tmp_path / "run.safetensors", second, optimizer, {"lr": 0.1})
    train_linear(second, optimizer, range(step, 6))
    assert step == 3 and torch.equal(second.weight, unbroken.weight) and torch.equal(second.bias, unbroken.bias)
    with pytest.raises(ValueError, match="lr 0.1 -> 0.2"):
        resume_state(tmp_path / "run.safetensors", second, optimizer, {"lr": 0.2})


# ---- runs

def test_run_broken_off_and_resumed_equals_an_uninterrupted_one(photos, small_crops, tmp_path, monkeypatch):
    train(settings(photos, tmp_path / "unbroken"))
    calls, loss = [], train_vae.vae_loss

    def broken_off(*arguments):
        calls.append(1)
        if len(calls) == 5:  # two steps after the last saved state
            raise KeyboardInterrupt
        return loss(*arguments)

    monkeypatch.setattr(train_vae, "vae_loss", broken_off)
    with pytest.raises(KeyboardInterrupt):
        train(settings(photos, tmp_path / "parts"))
    assert not (tmp_path / "parts" / "vae.safetensors").exists()
    assert metadata_of(tmp_path / "parts" / "state.safetensors")["step"] == "3"
    calls.clear()
    train(settings(photos, tmp_path / "parts"))
    assert len(calls) == 3
    for file in ("state.safetensors", "vae.safetensors"):
        unbroken, parts = load_file(tmp_path / "unbroken" / file), load_file(tmp_path / "parts" / file)
        assert unbroken.keys() == parts.keys() and all(torch.equal(unbroken[name], parts[name]) for name in unbroken)
        assert metadata_of(tmp_path / "unbroken" / file) == metadata_of(tmp_path / "parts" / file)
    logs = [[(row["step"], row["loss"], row["lr"]) for row in log_of(tmp_path / run)] for run in ("unbroken", "parts")]
    assert logs[0] == logs[1] and [step for step, *_ in logs[0]] == [3, 6]
    files = sorted(file.name for file in (tmp_path / "parts").iterdir())
    assert files == [".lock", "log.jsonl", "state.safetensors", "vae.safetensors"]


def test_written_autoencoder_loads_and_records_what_shapes_do_not_determine(photos, small_crops, tmp_path):
    train(settings(photos, tmp_path, steps=2, norm_groups=2))
    vae = VAE.load(tmp_path / "vae.safetensors").requires_grad_(False)
    metadata = metadata_of(tmp_path / "vae.safetensors")
    assert vae.encoder.norm_out.num_groups == 2 == int(metadata["norm_groups"])
    constants = float(metadata["scale_factor"]), float(metadata["shift_factor"])
    assert (vae.scale_factor, vae.shift_factor) == constants != (1.0, 0.0)
    pictures = Pictures(sorted(photos.glob("*.png")))
    assert latent_statistics(vae, pictures) == pytest.approx((vae.scale_factor, vae.shift_factor), rel=1e-5)
    state = load_file(tmp_path / "state.safetensors")
    evened = ("encoder.conv_out.weight", "encoder.conv_out.bias", "decoder.conv_in.weight")
    assert all(torch.equal(t, state[f"model.{name}"]) for name, t in vae.state_dict().items() if name not in evened)
    training = json.loads(metadata["training"])
    assert training["lr"] == 2e-3 and training["steps"] == 2 and not training.keys() & {"data", "out", "threads"}


def test_finished_run_is_left_as_it_is(photos, small_crops, tmp_path, monkeypatch):
    train(settings(photos, tmp_path, steps=2))
    before = load_file(tmp_path / "vae.safetensors")
    monkeypatch.setattr(train_vae, "vae_loss", None)
    train(settings(photos, tmp_path, steps=2, threads=2, save_every=1))
    assert all(torch.equal(t, before[name]) for name, t in load_file(tmp_path / "vae.safetensors").items())


def test_diverged_gradient_ends_the_run_and_keeps_the_last_state(photos, small_crops, tmp_path, monkeypatch):
    factors, loss = iter([1, 1, 1, 1, float("nan")]), train_vae.vae_loss
    monkeypatch.setattr(train_vae, "vae_loss", lambda *arguments: loss(*arguments) * next(factors))
    with pytest.raises(ValueError, match="step 4: gradient is nan, .*state.safetensors holds the last good state"):
        train(settings(photos, tmp_path))
    state = load_file(tmp_path / "state.safetensors")
    assert metadata_of(tmp_path / "state.safetensors")["step"] == "3"
    assert all(t.isfinite().all() for t in state.values())


def test_signal_saves_the_state_and_the_run_resumes_to_the_same_autoencoder(photos, small_crops, tmp_path, monkeypatch):
    train(settings(photos, tmp_path / "unbroken", save_every=100))
    loss = train_vae.vae_loss
    with monkeypatch.context() as patch:
        patch.setattr(train_vae, "vae_loss", lambda *inputs: [loss(*inputs), os.kill(os.getpid(), signal.SIGUSR1)][0])
        assert train(settings(photos, tmp_path / "parts", save_every=100)) == signal.SIGUSR1
    assert metadata_of(tmp_path / "parts" / "state.safetensors")["step"] == "1"
    train(settings(photos, tmp_path / "parts", save_every=100))
    unbroken, parts = (load_file(tmp_path / run / "vae.safetensors") for run in ("unbroken", "parts"))
    assert all(torch.equal(unbroken[name], parts[name]) for name in unbroken)


def test_state_that_is_none_of_this_run_is_refused(photos, small_crops, tmp_path, monkeypatch):
    """Other tensors, or settings that are no JSON object."""
    train(settings(photos, tmp_path, steps=1))
    state, file = load_file(tmp_path / "state.safetensors"), tmp_path / "state.safetensors"
    metadata = metadata_of(file)
    name = next(name for name in state if name.startswith("exp_avg."))
    for tensors, records in ((state | {name: torch.ones(3)}, metadata), (state, metadata | {"settings": "[" * 200}),
                             (state, metadata | {"step": "one"})):
        save_file(tensors, file, records)
        assert str(file) in refusal_of(monkeypatch, photos, tmp_path, steps=2)


# ---- refusals

def test_a_picture_that_comes_later_may_not_move_trained_ones_into_the_held_out(photos, small_crops, tmp_path,
                                                                                monkeypatch):
    data = copy_of(photos, tmp_path / "data")
    train(settings(data, tmp_path / "run", steps=4, save_every=2, holdout=1))
    rows = (data / "metadata.jsonl").read_text()
    (data / "metadata.jsonl").write_text(rows.splitlines()[0].replace("0.png", "new.png") + "\n" + rows)
    shutil.copy(data / "0.png", data / "new.png")
    assert "(held_out ['" in refusal_of(monkeypatch, data, tmp_path / "run", steps=4, save_every=2, holdout=1)


@pytest.mark.parametrize("change, named", [
    ({"lr": 1e-3}, "lr 0.002 -> 0.001"), ({"seed": 1}, "seed 0 -> 1"), ({"steps": 9}, "steps 2 -> 9"),
    ({"widths": "8,8,16,40"}, "widths 8,8,16,36 -> 8,8,16,40")])
def test_other_settings_are_refused_on_resume(photos, small_crops, tmp_path, monkeypatch, change, named):
    train(settings(photos, tmp_path, steps=2))
    before = (tmp_path / "state.safetensors").read_bytes()
    message = refusal_of(monkeypatch, photos, tmp_path, **{"steps": 2} | change)
    assert f"other settings ({named})" in message and "--out" in message
    assert (tmp_path / "state.safetensors").read_bytes() == before


def test_damaged_picture_is_named(photos, small_crops, tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    (data / "0.png").write_bytes((photos / "0.png").read_bytes()[:200])
    (data / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": "half a picture"}))
    assert "0.png: not a complete picture" in refusal_of(monkeypatch, data, tmp_path / "out")
    assert "out: give a folder outside of" in refusal_of(monkeypatch, data, data / "out")


@pytest.mark.parametrize("change, message", [
    ({"norm_groups": 3}, "num_groups"), ({"norm_groups": 0}, "--norm-groups 0: give 1 or more"),
    ({"widths": "8,8,16,32"}, "--widths 8,8,16,32: give four even numbers, the last at least 34"),
    ({"widths": "8,7,16,36"}, "--widths 8,7,16,36: "), ({"widths": "0,8,16,36"}, "--widths 0,8,16,36: "),
    ({"widths": "8,8,36"}, "--widths 8,8,36: "), ({"widths": "8,8,wide,16,36"}, "--widths 8,8,wide,16,36: "),
    ({"holdout": 1}, "--holdout 1 leaves no picture"), ({"holdout": -1}, "--holdout -1: give 0 or more"),
    ({"save_every": 0}, "--save-every 0: give 1 or more"), ({"steps": 0}, "--steps 0: "),
    ({"pixels": 0}, "--pixels 0: "), ({"threads": 0}, "--threads 0: "),
    ({"lr": 0.0}, "--lr 0.0: give a number above 0"), ({"lr": float("nan")}, "--lr nan: "),
    ({"clip": float("inf")}, "--clip inf: give a number above 0"), ({"warmup": -1}, "--warmup -1: give 0 or more")])
def test_settings_that_cannot_work_are_refused(photos, small_crops, tmp_path, monkeypatch, change, message):
    if change == {"holdout": 1}:  # nothing would be left to train on
        (data := tmp_path / "data").mkdir()
        (data / "0.png").write_bytes((photos / "0.png").read_bytes())
        (data / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": "the only picture"}))
        photos = data
    assert message in refusal_of(monkeypatch, photos, tmp_path / "out", **change)


# ---- the script

def test_script_trains_and_writes(photos, tmp_path):
    done = run_script("train_vae.py", "--data", photos, "--out", tmp_path, "--widths", "8,8,16,36", "--norm-groups", 2,
                      "--steps", 1, "--pixels", 4096, "--holdout", 1, "--threads", 1)
    assert done.returncode == 0, done.stderr
    assert "3 pictures, held out: 0.png; step 0 of 1" in done.stdout
    assert f"wrote {tmp_path}/vae.safetensors" in done.stdout
    (row,) = log_of(tmp_path)
    assert row["step"] == 1 and row["loss"] > 0 and row.keys() >= {"lr", "s_per_step", "psnr_f8_db", "psnr_f16_db"}
    assert VAE.load(tmp_path / "vae.safetensors").encoder.norm_out.num_groups == 2


def test_script_ends_with_one_line_where_there_are_no_pictures(tmp_path):
    done = run_script("train_vae.py", "--data", tmp_path / "nowhere", "--out", tmp_path / "out", "--threads", 1)
    assert done.returncode != 0 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "nowhere/metadata.jsonl: not found" in line
    assert not (tmp_path / "out").exists()


def test_every_setting_is_one_flag_and_flags_are_not_abbreviated(photos, tmp_path, monkeypatch, capsys):
    runs = []
    monkeypatch.setattr(train_vae, "train", runs.append)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    main([f"--data={photos}", f"--out={tmp_path}", "--norm-groups=2"])
    assert runs[0].norm_groups == 2 and runs[0].widths == "16,24,48,64" and runs[0].out == str(tmp_path)
    with pytest.raises(SystemExit) as end:
        main([f"--data={photos}", "--norm=2"])
    assert end.value.code == 2 and "--norm=2" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--help"])
    help_text = capsys.readouterr().out
    assert all(f"--{field.name.replace('_', '-')} " in help_text for field in fields(Settings))
