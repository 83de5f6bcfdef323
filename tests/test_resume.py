"""Checkpoints of a run: resumed bit for bit, complete or absent under kill -9 and full disks, refused if they belong to another run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_same_run, log_of, state_of, steps_of
from golden import diffusers_names
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from test_train import broken_folder, refusal_of

import checkpoint
import train
from checkpoint import open_weights
from data import read_folder
from flux import Flux
from mmdit import MMDiT
from training.batches import batch_of_step
from training.resume import load_checkpoint, newest, save_checkpoint, saved_shapes, weights_of


def start(flags: list[str]) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def wait_for_checkpoint(out: Path, process: subprocess.Popen) -> None:
    until = time.monotonic() + 100
    while not newest(out) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)


# ---- what is written is read

def test_tensors_come_back_in_any_dtype_and_wrong_ones_are_refused(tmp_path):
    tensors = {f"model.{k}": torch.randn(5 + k, 3, generator=torch.Generator().manual_seed(k)) for k in range(3)}
    tensors["ema.1"] = tensors["model.1"] + 1
    save_checkpoint(tmp_path, 7, tensors, {"settings": {}}, keep=1)
    folder = newest(tmp_path)
    assert folder.name == "step-00000007" and json.loads((folder / "run.json").read_text())["step"] == 7
    assert saved_shapes(folder) == {name: tuple(t.shape) for name, t in tensors.items()}
    into = {name: torch.empty(t.shape, dtype=torch.bfloat16) for name, t in tensors.items()}
    load_checkpoint(folder, into)
    assert all(torch.equal(into[name], t.bfloat16()) for name, t in tensors.items())
    judged = weights_of(folder, torch.float32)
    assert torch.equal(judged["1"], tensors["ema.1"]) and torch.equal(judged["0"], tensors["model.0"]) and len(judged) == 3
    for name, shape in (("model.0", (4, 3)), ("model.9", (5, 3))):
        with pytest.raises(ValueError, match=f"1 tensors are missing or of another shape, the first is {name}"):
            load_checkpoint(folder, {name: torch.empty(shape)})


def test_damaged_checkpoint_does_not_push_out_the_whole_ones(tmp_path):
    tensors = {"model.a": torch.ones(2, 2)}
    for step in (400, 500):
        save_checkpoint(tmp_path, step, tensors, {"settings": {}}, keep=2)
    (tmp_path / "checkpoints" / "step-00000500" / "run.json").unlink()
    save_checkpoint(tmp_path, 450, tensors, {"settings": {}}, keep=1)
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step-00000450"] and newest(tmp_path)


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path):
    save_checkpoint(tmp_path, 1, {"model.a": torch.ones(2, 2)}, {"settings": {}}, keep=1)
    for file in newest(tmp_path).iterdir():
        content = file.read_bytes()
        assert file.suffix in (".json", ".safetensors") and not content.startswith((b"\x80", b"PK"))


# ---- resuming

@pytest.mark.parametrize("changed", [{"ema": 0.9}, {"cache_latents": True, "warmup": 5, "bands": "1,2,2,4"}])
def test_interrupted_and_resumed_run_equals_an_uninterrupted_one(settings, tmp_path, monkeypatch, changed):
    train.train(settings(out=tmp_path / "whole", **changed))
    calls, formula = [], train.objective

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 5:  # two steps after the last saved state
            raise KeyboardInterrupt
        return formula(*arguments)

    monkeypatch.setattr(train, "objective", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.train(settings(out=tmp_path / "parts", **changed))
    assert steps_of(tmp_path / "parts") == 3
    calls.clear()
    torch.manual_seed(1)
    train.train(settings(out=tmp_path / "parts", **changed))
    assert len(calls) == 3
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    names = {name.partition(".")[0] for name in state_of(tmp_path / "parts")}
    assert names == {"model", "exp_avg", "exp_avg_sq"} | ({"ema"} if "ema" in changed else set())
    whole, parts = ([(row["step"], row["loss"], row["lr"], row["v_hh"]) for row in log_of(tmp_path / run)] for run in ("whole", "parts"))
    assert whole == parts and [row[0] for row in whole] == list(range(1, 7))  # lines after the checkpoint were cut


def test_longer_run_resumes_from_a_finished_one(settings, tmp_path):
    train.train(settings(out=tmp_path / "whole", steps=5))
    train.train(settings(out=tmp_path / "parts", steps=2))
    train.train(settings(out=tmp_path / "parts", steps=5))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_killed_process_is_continued_bit_for_bit(settings, tmp_path):
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *settings.flags(out=out, steps=100_000, ema=0.9)], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    until = time.monotonic() + 100
    while not newest(out) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    _, said = process.communicate()
    assert process.returncode == -signal.SIGKILL, said.decode()
    step = steps_of(out)
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


def test_checkpoint_is_exported_in_the_dtype_asked_for(settings, model, tmp_path, capsys):
    train.train(settings(steps=4, save_every=2))
    whole = load_file(tmp_path / "out" / "sd3.safetensors")
    (tmp_path / "out" / "sd3.safetensors").unlink()
    train.main(["--export", f"--out={tmp_path}/out", "--save-dtype=bf16"])
    assert capsys.readouterr().out.endswith(f"wrote {tmp_path}/out/sd3.safetensors, step 4\n")
    written, began_with = load_file(tmp_path / "out" / "sd3.safetensors"), load_file(model / "sd3.safetensors")
    assert {name: t.shape for name, t in written.items()} == {name: t.shape for name, t in began_with.items()}
    assert all(t.dtype == torch.bfloat16 and torch.equal(t, whole[name].bfloat16()) for name, t in written.items())
    with pytest.raises(SystemExit, match="nowhere/checkpoints: no complete checkpoint"):
        train.main(["--export", f"--out={tmp_path}/nowhere"])


def test_only_the_newest_checkpoints_stay(settings, tmp_path):
    train.train(settings(steps=5, save_every=1, keep=3))
    assert sorted(f.name for f in (tmp_path / "out" / "checkpoints").iterdir()) == [f"step-0000000{k}" for k in (3, 4, 5)]


@pytest.mark.parametrize("harm", ["shard", "run.json", "cut"])
def test_damaged_checkpoint_is_skipped(settings, tmp_path, capsys, harm):
    train.train(settings(steps=6, out=tmp_path / "whole"))
    train.train(settings(steps=6))
    last = newest(tmp_path / "out")
    (file,) = last.glob("*.safetensors") if harm != "run.json" else [last / harm]
    file.write_bytes(file.read_bytes()[:-9]) if harm == "cut" else file.unlink()
    train.train(settings(steps=6))
    assert f"{last}: " in capsys.readouterr().out
    assert_same_run(tmp_path / "whole", tmp_path / "out")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_finishes_the_step_and_saves(settings, tmp_path, monkeypatch, number):
    formula, handlers = train.objective, [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    train.train(settings(steps=6, out=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(train, "objective", lambda *inputs: [formula(*inputs), os.kill(os.getpid(), number)][0])
        train.train(settings(steps=6))
    assert steps_of(tmp_path / "out") == 1 and not (tmp_path / "out" / "sd3.safetensors").exists()
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    train.train(settings(steps=6))
    assert_same_run(tmp_path / "whole", tmp_path / "out")


def test_unreadable_picture_keeps_the_state_and_the_repaired_folder_resumes(settings, photos, tmp_path):
    """A JPEG, whose header is whole: that its pixels are not is seen when its turn comes."""
    folder = broken_folder(photos, tmp_path / "data", "none")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        Image.open(folder / row["file_name"]).save(folder / f"{row['file_name']}.jpg", quality=95)
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row | {"file_name": f"{row['file_name']}.jpg"}) for row in rows))
    usual = dict(steps=4, batch=1, save_every=100, data=folder)
    train.train(settings(**usual, out=tmp_path / "whole"))
    items = read_folder(folder)
    third = items[batch_of_step([(64, 64)] * len(items), 1, 0, 2)[0]].path
    good = third.read_bytes()
    third.write_bytes(good[:len(good) // 2])
    assert f"{third.name}: " in refusal_of(settings, **usual)
    assert steps_of(tmp_path / "out") == 2
    third.write_bytes(good)
    train.train(settings(**usual))
    assert_same_run(tmp_path / "whole", tmp_path / "out")



def test_changed_data_is_refused_on_resume(settings, photos, tmp_path):
    folder = broken_folder(photos, tmp_path / "data", "none")
    train.train(settings(steps=1, data=folder))
    rows = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "metadata.jsonl").write_text("\n".join(rows[:3]))
    message = refusal_of(settings, steps=2, data=folder)
    assert f"{folder} has changed since that run began (4 pictures, now 3;" in message and steps_of(tmp_path / "out") == 1


def test_checkpoint_of_another_model_is_refused(settings, folders, tmp_path):
    train.train(settings(steps=1))
    message = refusal_of(settings, steps=2, weights=folders / "tiny-flux")
    assert "is of another model, {'family': 'SD3'" in message and "'family': 'Flux-dev'" in message


@pytest.mark.parametrize("changed, named", [({"lr": 2e-3}, "lr 0.001 -> 0.002"), ({"seed": 1}, "seed 0 -> 1"),
                                            ({"bands": "1,1,1,2"}, "bands [1.0, 1.0, 1.0, 1.0] -> [1.0, 1.0, 1.0, 2.0]"),
                                            ({"objective": "release"}, "objective paper -> release"), ({"res": 32}, "res 64 -> 32"),
                                            ({"ema": 0.9}, "ema 0.0 -> 0.9"), ({"batch": 2}, "batch 4 -> 2")])
def test_other_settings_are_refused_on_resume(settings, tmp_path, changed, named):
    train.train(settings(steps=1))
    before = {f: f.read_bytes() for f in (tmp_path / "out").rglob("*.*") if f.is_file()}
    message = refusal_of(settings, steps=2, **changed)
    assert f"other settings ({named})" in message and "--out" in message
    assert before == {f: f.read_bytes() for f in (tmp_path / "out").rglob("*.*") if f.is_file()}


@pytest.mark.parametrize("broken", ["shard", "commit", "export"])
def test_save_that_fails_leaves_the_previous_checkpoint(settings, tmp_path, monkeypatch, broken):
    train.train(settings(steps=3))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    def half_a_file(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise SafetensorError("No space left on device")

    with monkeypatch.context() as patch:
        if broken == "shard":
            patch.setattr("torch.distributed.checkpoint.filesystem._write_item", full)
        elif broken == "commit":
            patch.setattr(os, "rename", full)
        else:
            patch.setattr(checkpoint, "save_file", half_a_file)
        assert "No space left on device" in refusal_of(settings, steps=6)
    assert steps_of(tmp_path / "out") == (6 if broken == "export" else 3)
    assert not list((tmp_path / "out" / "checkpoints").glob(".*")) and MMDiT.load(tmp_path / "out" / "sd3.safetensors")
    train.train(settings(steps=6))
    train.train(settings(steps=6, out=tmp_path / "whole"))
    assert_same_run(tmp_path / "whole", tmp_path / "out")


def test_what_a_killed_save_left_is_no_checkpoint_and_is_cleared_away(settings, tmp_path):
    train.train(settings(steps=3))
    left = tmp_path / "out" / "checkpoints" / ".step-00000004.tmp"
    left.mkdir()
    (left / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    train.train(settings(steps=6))
    train.train(settings(steps=6, out=tmp_path / "whole"))
    assert not left.exists()
    assert_same_run(tmp_path / "whole", tmp_path / "out")


# ---- killed, asked to stop

def test_sigterm_finishes_the_step_saves_and_exits_with_0(settings, tmp_path):
    process = start(settings.flags(steps=100_000, save_every=2))
    wait_for_checkpoint(tmp_path / "out", process)
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=100)
    step = json.loads((newest(tmp_path / "out") / "run.json").read_text())["step"]
    assert process.returncode == 0, errors
    assert said.endswith(f"stopped after step {step}; the same command resumes there\n")
    assert json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[-1])["step"] == step


@pytest.mark.slow
def test_twenty_kills_at_random_moments_lose_nothing_before_the_last_checkpoint(settings, tmp_path):
    out, moments, steps, inside = tmp_path / "out", random.Random(0), [0], 0
    for _ in range(20):
        process, before = start(settings.flags(steps=100_000, save_every=1, keep=2)), newest(out)
        until = time.monotonic() + 60
        while newest(out) == before and time.monotonic() < until:
            time.sleep(0.005)
        time.sleep(moments.random() / 10)
        process.kill()
        process.communicate()
        inside += bool(list((out / "checkpoints").glob(".step-*.tmp")))
        steps.append(json.loads((newest(out) / "run.json").read_text())["step"])
        assert steps[-1] > steps[-2]
        folders = [f for f in (out / "checkpoints").iterdir() if f.name.startswith("step-")]
        for folder in folders:
            files = json.loads((folder / "run.json").read_text())["files"]
            assert all(len(load_file(folder / name)) > 0 for name in files)
    assert inside  # some of them fell into a save
    train.train(settings(steps=steps[-1] + 1, save_every=1))
    train.train(settings(steps=steps[-1] + 1, save_every=1000, out=tmp_path / "whole"))
    a, b = load_file(out / "sd3.safetensors"), load_file(tmp_path / "whole" / "sd3.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a)


# ---- the exported file

@pytest.mark.parametrize("name", ["tiny-sd3", "tiny-flux"])
def test_exported_file_is_official_and_its_diffusers_conversion_draws_the_same(settings, folders, tmp_path, name):
    diffusers = pytest.importorskip("diffusers")
    train.train(settings(weights=folders / name, steps=1, save_dtype="bf16"))
    (file,), (began_with,) = (tmp_path / "out").glob("*.safetensors"), (folders / name).glob("*3.safetensors" if "sd3" in name else "flux*")
    written, official = open_weights(file), open_weights(began_with)
    assert {key: t.shape for key, t in written.items()} == {key: t.shape for key, t in official.items()}
    assert {t.dtype for t in load_file(file).values()} == {torch.bfloat16}

    ours = (MMDiT if "sd3" in name else Flux).load(file)
    config, generator = ours.config, torch.Generator().manual_seed(0)
    latent, context = torch.randn(2, 16, 8, 8, generator=generator), torch.randn(2, 5, config.context_dim, generator=generator)
    pooled, sigma = torch.randn(2, config.pooled_dim, generator=generator), torch.tensor([0.3, 0.8])
    converted = diffusers_names(ours.state_dict())
    if "sd3" in name:
        theirs = diffusers.SD3Transformer2DModel(
            num_layers=config.depth, attention_head_dim=64, num_attention_heads=config.hidden_size // 64, qk_norm="rms_norm",
            caption_projection_dim=config.hidden_size, joint_attention_dim=config.context_dim, pooled_projection_dim=config.pooled_dim,
            pos_embed_max_size=config.table_side, out_channels=16)
        theirs.load_state_dict(converted, strict=True)
        expected = theirs(latent, context, pooled, 1000 * sigma).sample
        result = ours(latent, sigma, context, pooled)
    else:
        theirs = diffusers.FluxTransformer2DModel(
            in_channels=64, num_layers=config.depth, num_single_layers=config.depth_single, attention_head_dim=config.head_dim,
            num_attention_heads=config.hidden_size // config.head_dim, joint_attention_dim=config.context_dim,
            pooled_projection_dim=config.pooled_dim, guidance_embeds=True, axes_dims_rope=config.axes_dim)
        theirs.load_state_dict(converted, strict=True)
        packed = latent.unflatten(-1, (4, 2)).unflatten(-3, (4, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        ids = torch.cartesian_prod(torch.arange(1.0), torch.arange(4.0), torch.arange(4.0))
        out = theirs(packed, context, pooled, sigma, ids, torch.zeros(5, 3), torch.full((2,), 3.5)).sample
        expected = out.unflatten(1, (4, 4)).unflatten(-1, (16, 2, 2)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
        result = ours(latent, sigma, context, pooled, torch.full((2,), 3.5))
    assert (result - expected).abs().max() < 1e-4 * expected.abs().max()
