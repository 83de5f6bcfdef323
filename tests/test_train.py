"""Fine-tuning: the objectives as formulas, overfitting four pictures, resuming bit for bit, broken saves, refusals in one line."""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

import checkpoint
import train
from checkpoint import save
from data import Embeddings, Pictures, to_pixels
from mmdit import MMDiT, MMDiTConfig, new_mmdit
from models import make_tiny
from text import SD3Text
from train import latents_of, objective
from train_vae import latent_statistics, new_vae
from vae import VAE, VAEConfig

ROOT = Path(__file__).parents[1]
CAPTIONS = ["a red boat on a quiet lake at dawn", "two old oak trees in the fog", "a street in the rain, seen from above",
            "snow on the roofs of a small town"]
EQUAL = (1.0, 1.0, 1.0, 1.0)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Four soft pictures, short side 64, with captions."""
    folder, rows = tmp_path_factory.mktemp("photos"), []
    for k, caption in enumerate(CAPTIONS):
        coarse = torch.randn(1, 3, 6, 6, generator=seeded(k))
        image = F.interpolate(coarse, ((64, 80), (80, 64))[k % 2], mode="bicubic")[0].clamp(-2, 2) / 2
        Image.fromarray(to_pixels(image)).save(folder / f"{k}.png")
        rows.append(json.dumps({"file_name": f"{k}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def model(photos, tmp_path_factory):
    """A model folder as models/make_tiny.py makes it, with a transformer of one block in it."""
    folder = tmp_path_factory.mktemp("model")
    vae = new_vae(VAEConfig((8, 8, 16, 36), (8, 8, 16, 36), 1, 2, 16, 1), seed=0)
    with torch.no_grad():
        scale, shift = latent_statistics(vae, Pictures(sorted(photos.glob("*.png"))), res=64)
    said = {"norm_groups": 1, "scale_factor": scale, "shift_factor": shift}
    save(folder / "vae.safetensors", vae.state_dict(), said)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_tiny.py", f"--data={photos}", f"--vae={folder}/vae.safetensors", f"--out={folder}/tiny"])
        make_tiny.main()
    transformer = new_mmdit(MMDiTConfig(64, 1, context_dim=192, pooled_dim=192, table_side=16, mlp_hidden=128), seeded(0))
    tensors = {f"model.diffusion_model.{name}": t for name, t in transformer.state_dict().items()}
    tensors |= {f"first_stage_model.{name}": t for name, t in vae.state_dict().items()}
    save(folder / "tiny" / "sd3.safetensors", tensors, said | {"steps": 28, "cfg": 3.0, "time_shift": 3.0, "res": 1024})
    return folder / "tiny"


@pytest.fixture
def settings(photos, model, tmp_path):
    """settings(lr=1e-3, ...): what the script would hand to train(), all defaults included."""
    def of(**changed: object) -> Namespace:
        caught = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "train", caught.append)
            patch.setattr(sys, "argv", ["train.py", *flags(**changed)])
            train.main()
        return caught[0]

    def flags(**changed: object) -> list[str]:
        usual = dict(weights=model, data=photos, out=tmp_path / "out", res=64, batch=4, steps=6, lr=1e-3, save_every=3, log_every=1,
                     threads=1, device="cpu", dtype="fp32", save_dtype="fp32")
        given = [(f"--{key.replace('_', '-')}", value) for key, value in (usual | changed).items() if value is not None]
        return [flag if value is True else f"{flag}={value}" for flag, value in given]

    of.flags = flags
    return of


def refusal_of(settings, monkeypatch, **changed: object) -> str:
    """The one line that the script ends with."""
    monkeypatch.setattr(sys, "argv", ["train.py", *settings.flags(**changed)])
    with pytest.raises(SystemExit) as end:
        train.main()
    assert str(end.value).startswith("error: ") and "\n" not in str(end.value)
    return str(end.value)


def metadata_of(file: Path) -> dict:
    with safe_open(file, framework="pt") as handle:
        return handle.metadata()


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_run(one: Path, other: Path) -> None:
    for file in ("state.safetensors", "sd3.safetensors"):
        a, b = load_file(one / file), load_file(other / file)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        assert metadata_of(one / file) == metadata_of(other / file)


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


# ---- latents

def test_central_squares_are_encoded_once_and_drawn_anew(settings, photos, model, monkeypatch):
    args, vae, pictures = settings(center_crop=True), VAE.load(model / "sd3.safetensors"), Pictures(sorted(photos.glob("*.png")))
    calls, moments = [], vae.moments
    monkeypatch.setattr(vae, "moments", lambda *arguments: calls.append(1) or moments(*arguments))
    known: dict = {}
    with torch.no_grad():
        first, again, other = (latents_of([2, 0, 2], args, pictures, vae, known, seeded(seed)) for seed in (0, 0, 1))
        mean, logvar = moments(torch.stack([pictures.central_square(k, 64) for k in (2, 0, 2)]), 16)
        by_hand = vae.draw(mean, logvar, seeded(0))
    assert len(calls) == 2 and known.keys() == {0, 2} and first.shape == (3, 16, 4, 4)
    assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(first[0], first[2])
    assert torch.allclose(first, by_hand, atol=1e-5)  # batched convolutions round differently
    assert (mean.mean() - vae.shift_factor) * vae.scale_factor == pytest.approx(float(vae.draw(mean, logvar, None).mean()), abs=1e-5)


def test_random_squares_are_encoded_every_time(settings, photos, model):
    args, vae, pictures = settings(factor=8), VAE.load(model / "sd3.safetensors"), Pictures(sorted(photos.glob("*.png")))
    known: dict = {}
    with torch.no_grad():
        first, again, other = (latents_of([1, 1], args, pictures, vae, known, seeded(seed)) for seed in (0, 0, 1))
    assert not known and first.shape == (2, 16, 8, 8) and torch.equal(first, again) and not torch.equal(first, other)


# ---- learning, logging, what is written

def test_one_batch_is_learnt_by_heart(settings, tmp_path, monkeypatch):
    class SameDraws(torch.Generator):
        def manual_seed(self, seed: int) -> torch.Generator:
            return super().manual_seed(3)  # draws all four pictures

    monkeypatch.setattr(torch, "Generator", SameDraws)
    train.train(settings(steps=80, lr=4e-3, save_every=80))
    loss = [row["loss"] for row in log_of(tmp_path / "out")]
    assert loss[0] > 1.5 and max(loss[-5:]) < 0.01


def test_four_pictures_are_learnt_whatever_the_noise(settings, tmp_path):
    train.train(settings(steps=400, lr=4e-3, warmup=20, center_crop=True, drop_caption=0, save_every=400))
    loss = [row["loss"] for row in log_of(tmp_path / "out")]
    # 1.58 is the mean of 1 / ((1 - sigma)^2 + sigma^2), the least that can be reached on latents of which only mean and deviation are known
    assert sum(loss[:10]) / 10 > 1.9 and sum(loss[-50:]) / 50 < 1.0


def test_log_has_the_bands_and_their_mean_is_the_loss(settings, tmp_path):
    train.train(settings(steps=2))
    for row in log_of(tmp_path / "out"):
        assert row.keys() == {"step", "loss", "v_ll", "v_lh", "v_hl", "v_hh", "grad_norm", "lr", "peak_gib", "images_per_s"}
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
    said, state = metadata_of(file), load_file(tmp_path / "out" / "state.safetensors")
    transformer, vae, before = MMDiT.load(file), VAE.load(file), VAE.load(model / "sd3.safetensors")
    assert all(torch.equal(t, state[f"model.{name}"].half().float()) for name, t in transformer.state_dict().items())
    assert all(torch.equal(t, before.state_dict()[name].half().float()) for name, t in vae.state_dict().items())
    assert (vae.scale_factor, vae.shift_factor, vae.config) == (before.scale_factor, before.shift_factor, before.config)
    assert said["norm_groups"] == "1" and float(said["scale_factor"]) == vae.scale_factor != 1.0
    assert {key: said[key] for key in ("res", "factor", "steps", "cfg", "time_shift")} == {
        "res": "64", "factor": "16", "steps": "28", "cfg": "3.0", "time_shift": "3.0"}
    training = json.loads(said["training"])
    assert training["lr"] == 1e-3 and training["steps"] == 2 and training["bands"] == [1, 1, 1, 1]
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["save_dtype"] == "fp16"
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["log.jsonl", "sd3.safetensors", "settings.json", "state.safetensors"]


def test_averaged_weights_are_the_ones_written_and_keep_no_graph(settings, tmp_path, monkeypatch):
    steps, kept = [], {}
    monkeypatch.setattr(train, "save_run", lambda path, modules, *rest: kept.update(modules) or steps.append(
        {name: t.clone() for name, t in modules["model"].state_dict().items()}))
    start = MMDiT.load(settings().weights + "/sd3.safetensors").state_dict()
    train.train(settings(steps=3, ema=0.2, save_every=1))
    assert all(p.grad_fn is None and not p.requires_grad for p in kept["ema"].parameters())
    written = load_file(tmp_path / "out" / "sd3.safetensors")
    for name, by_hand in start.items():
        for step, weights in enumerate(steps):
            rate = min(0.2, (step + 1) / (step + 10))
            by_hand = rate * by_hand + (1 - rate) * weights[name]
        assert torch.allclose(written[f"model.diffusion_model.{name}"], by_hand, atol=1e-6)


def test_other_transformer_is_where_training_begins(settings, model, tmp_path):
    transformer = MMDiT.load(model / "sd3.safetensors")
    with torch.no_grad():
        transformer.final_layer.linear.bias.fill_(3.0)
    save(tmp_path / "other.safetensors", transformer.state_dict(), {"steps": 4})
    train.train(settings(steps=1, lr=0, transformer=tmp_path / "other.safetensors"))
    written = MMDiT.load(tmp_path / "out" / "sd3.safetensors")
    assert (written.final_layer.linear.bias == 3).all() and metadata_of(tmp_path / "out" / "sd3.safetensors")["steps"] == "4"


# ---- resuming

@pytest.mark.parametrize("changed", [{"ema": 0.9}, {"center_crop": True, "drop_words": 0.4, "warmup": 5, "bands": "1,2,2,4"}])
def test_run_broken_off_and_resumed_equals_an_uninterrupted_one(settings, tmp_path, monkeypatch, changed):
    train.train(settings(out=tmp_path / "whole", **changed))
    calls, formula = [], train.objective

    def broken_off(*arguments):
        calls.append(1)
        if len(calls) == 5:  # two steps after the last saved state
            raise KeyboardInterrupt
        return formula(*arguments)

    monkeypatch.setattr(train, "objective", broken_off)
    with pytest.raises(KeyboardInterrupt):
        train.train(settings(out=tmp_path / "parts", **changed))
    assert metadata_of(tmp_path / "parts" / "state.safetensors")["step"] == "3"
    calls.clear()
    torch.manual_seed(1)
    train.train(settings(out=tmp_path / "parts", **changed))
    assert len(calls) == 3
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    names = {name.partition(".")[0] for name in load_file(tmp_path / "parts" / "state.safetensors")}
    assert names == {"model", "exp_avg", "exp_avg_sq"} | ({"ema"} if "ema" in changed else set())
    whole, parts = ({row["step"]: (row["loss"], row["lr"], row["v_hh"]) for row in log_of(tmp_path / run)} for run in ("whole", "parts"))
    assert whole == parts and whole.keys() == set(range(1, 7))


def test_longer_run_goes_on_from_a_finished_one(settings, tmp_path):
    train.train(settings(out=tmp_path / "whole", steps=5))
    train.train(settings(out=tmp_path / "parts", steps=2))
    train.train(settings(out=tmp_path / "parts", steps=5))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_killed_process_is_continued_bit_for_bit(settings, tmp_path):
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *settings.flags(out=out, steps=100_000, ema=0.9)], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    until = time.monotonic() + 100
    while not (out / "state.safetensors").exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    _, said = process.communicate()
    assert process.returncode == -signal.SIGKILL, said.decode()
    step = int(metadata_of(out / "state.safetensors")["step"])
    assert step >= 3 and step % 3 == 0
    train.train(settings(out=out, steps=step + 2, ema=0.9))
    train.train(settings(out=tmp_path / "whole", steps=step + 2, ema=0.9))
    assert_same_run(tmp_path / "whole", out)


def test_finished_run_trains_no_more_and_writes_a_lost_model_again(settings, tmp_path, monkeypatch):
    train.train(settings(steps=2))
    file = tmp_path / "out" / "sd3.safetensors"
    before = load_file(file)
    file.unlink()
    monkeypatch.setattr(train, "objective", None)
    train.train(settings(steps=2))
    assert all(torch.equal(t, before[name]) for name, t in load_file(file).items())


@pytest.mark.parametrize("changed, named", [({"lr": 2e-3}, "lr 0.001 -> 0.002"), ({"seed": 1}, "seed 0 -> 1"),
                                            ({"bands": "1,1,1,2"}, "bands [1.0, 1.0, 1.0, 1.0] -> [1.0, 1.0, 1.0, 2.0]"),
                                            ({"objective": "release"}, "objective paper -> release"), ({"res": 32}, "res 64 -> 32"),
                                            ({"ema": 0.9}, "ema 0.0 -> 0.9"), ({"batch": 2}, "batch 4 -> 2")])
def test_other_settings_are_refused_on_resume(settings, tmp_path, monkeypatch, changed, named):
    train.train(settings(steps=1))
    before = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}
    message = refusal_of(settings, monkeypatch, steps=2, **changed)
    assert f"other settings ({named})" in message and "--out" in message
    assert before == {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}


# ---- what goes wrong

@pytest.mark.parametrize("file", ["state.safetensors", "sd3.safetensors"])
@pytest.mark.parametrize("broken", ["rename", "write"])
def test_save_that_fails_leaves_the_previous_state(settings, tmp_path, monkeypatch, file, broken):
    train.train(settings(steps=3))
    replace, save_file = os.replace, checkpoint.save_file

    def no_rename(source, target):
        if Path(target).name == file:
            raise OSError(28, "No space left on device")
        replace(source, target)

    def half_a_file(tensors, path, metadata):
        if file not in str(path):
            return save_file(tensors, path, metadata)
        Path(path).write_bytes(b"half")
        raise SafetensorError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", no_rename if broken == "rename" else replace)
        patch.setattr(checkpoint, "save_file", half_a_file if broken == "write" else save_file)
        assert "No space left on device" in refusal_of(settings, patch, steps=6)
    assert metadata_of(tmp_path / "out" / "state.safetensors")["step"] == "3"
    assert MMDiT.load(tmp_path / "out" / "sd3.safetensors")
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["log.jsonl", "sd3.safetensors", "settings.json", "state.safetensors"]
    train.train(settings(steps=6))
    train.train(settings(steps=6, out=tmp_path / "whole"))
    assert_same_run(tmp_path / "whole", tmp_path / "out")


def test_loss_that_is_no_number_ends_the_run_and_keeps_the_last_state(settings, tmp_path, monkeypatch):
    factors, formula = iter([1, 1, 1, 1, float("nan")]), train.objective
    monkeypatch.setattr(train, "objective", lambda *arguments: formula(*arguments) * next(factors))
    message = refusal_of(settings, monkeypatch)
    assert "step 4: gradient norm nan, loss nan, sigma [" in message and f"the last good state is in {tmp_path}/out" in message
    state = load_file(tmp_path / "out" / "state.safetensors")
    assert metadata_of(tmp_path / "out" / "state.safetensors")["step"] == "3" and all(t.isfinite().all() for t in state.values())


@pytest.mark.parametrize("save_dtype", ["fp16", "fp32"])
def test_diverged_run_never_leaves_weights_that_are_no_numbers(settings, tmp_path, monkeypatch, save_dtype):
    message = refusal_of(settings, monkeypatch, lr=1e30, save_every=1, save_dtype=save_dtype)
    assert ("step 1: gradient norm" in message) if save_dtype == "fp32" else ("NaN or Inf in fp16" in message and "--save-dtype" in message)
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert all(t.isfinite().all() for t in load_file(file).values())


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


@pytest.mark.parametrize("kind, says", [("small", "2.png: its short side is 63 px, below --res 64"), ("text", "2.png: not a whole picture"),
                                        ("missing", "metadata.jsonl:3: no picture '2.png'"), ("line", "metadata.jsonl:5: each line is")])
@pytest.mark.parametrize("dry", [True, None])
def test_errors_in_the_data_come_before_any_work(settings, photos, tmp_path, monkeypatch, kind, says, dry):
    monkeypatch.setattr(MMDiT, "load", None)
    monkeypatch.setattr(SD3Text, "load", None)
    assert says in refusal_of(settings, monkeypatch, data=broken_folder(photos, tmp_path / "data", kind), dry_run=dry)
    assert not (tmp_path / "out").exists()


def test_picture_that_turns_out_truncated_is_named(settings, photos, tmp_path, monkeypatch):
    folder = broken_folder(photos, tmp_path / "data", "none")
    (folder / "1.png").write_bytes((photos / "1.png").read_bytes()[:-400])
    assert "1.png: not a whole picture" in refusal_of(settings, monkeypatch, data=folder, steps=50)


def test_cached_text_is_used_and_encoded_before_the_first_step(settings, photos, model, monkeypatch):
    Embeddings(photos / ".embeddings", model).fill(["", *CAPTIONS])
    monkeypatch.setattr(SD3Text, "load", None)
    train.train(settings(steps=1))


@pytest.mark.parametrize("changed, says", [
    ({"data": "nowhere"}, "nowhere/metadata.jsonl: not found"),
    ({"weights": "nowhere"}, "nowhere: no such folder; to get SD3"),
    ({"weights": None, "model": "tiny-sd4"}, "tiny-sd4: no such folder"),
    ({"transformer": "nowhere.safetensors"}, "nowhere.safetensors: no such file"),
    ({"transformer": "nowhere.safetensors", "dry_run": True}, "nowhere.safetensors: no such file")])
def test_what_is_not_there_is_named(settings, tmp_path, monkeypatch, changed, says):
    assert says in refusal_of(settings, monkeypatch, **changed)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changed, says", [
    ({"res": 100}, "--res 100: give a multiple of 32 at --factor 16"), ({"res": 0}, "--res 0: give a multiple"),
    ({"res": 24, "factor": 8}, "--res 24: give a multiple of 16 at --factor 8"), ({"steps": 0}, "--steps 0: give 1 or more"),
    ({"batch": 0}, "1 or more"), ({"save_every": 0}, "1 or more"), ({"log_every": 0}, "1 or more"), ({"threads": 0}, "1 or more"),
    ({"clip": 0.0}, "a number above 0"), ({"ema": 1.5}, "a decay below 1"), ({"drop_words": 2.0}, "a probability"),
    ({"time_shift": 0.0}, "a number above 0"), ({"huber": -1.0}, "0 or more"), ({"device": "foo"}, "--device foo: this machine has cpu")])
def test_settings_out_of_range_are_refused(settings, tmp_path, monkeypatch, changed, says):
    assert says in refusal_of(settings, monkeypatch, **changed)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changed, says", [
    ({"factor": 4}, "invalid choice: 4"), ({"data": None}, "--data"), ({"bands": "1,1,1"}, "four numbers >= 0"),
    ({"bands": "1,1,1,-1"}, "four numbers >= 0"), ({"bands": "a,b,c,d"}, "--bands"), ({"objective": "mine"}, "invalid choice: 'mine'")])
def test_wrong_flags_are_refused(settings, tmp_path, monkeypatch, capsys, changed, says):
    monkeypatch.setattr(sys, "argv", ["train.py", *settings.flags(**changed)])
    with pytest.raises(SystemExit) as end:
        train.main()
    line = capsys.readouterr().err.splitlines()[-1]  # after argparse's usage
    assert end.value.code == 2 and line.startswith("train.py: error: ") and says in line
    assert not (tmp_path / "out").exists()


# ---- the script

def run_script(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / "train.py"), *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_script_explains_itself():
    done = run_script("--help")
    assert done.returncode == 0 and done.stderr == ""
    flags = OrderedDict.fromkeys(word.rstrip(",") for word in done.stdout.split() if word.startswith("--"))
    assert {"--data", "--res", "--objective", "--bands", "--huber", "--ema", "--dry-run"} <= flags.keys()


def test_script_trains_and_writes(settings, tmp_path):
    done = run_script(*settings.flags(steps=2))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('{\n "model"') and done.stdout.endswith(f"wrote {tmp_path}/out/sd3.safetensors\n")
    assert [row["step"] for row in log_of(tmp_path / "out")] == [1, 2]
    assert MMDiT.load(tmp_path / "out" / "sd3.safetensors").config.hidden_size == 64


def test_script_ends_with_one_line_where_there_is_no_model(settings, tmp_path):
    done = run_script(*settings.flags(weights=tmp_path / "nowhere"))
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and done.stdout == "" and line.startswith(f"error: {tmp_path}/nowhere: no such folder")
    assert not (tmp_path / "out").exists()
