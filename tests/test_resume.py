"""Checkpoints: resumed bit for bit, complete or absent after kill -9 or a full disk, refused if of another run."""

import errno
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    assert_same_run,
    copy_of,
    log_of,
    metadata_of,
    refusal_of,
    seeded,
    state_of,
    steps_of,
)
from golden import diffusers_names, distance, shapes_of
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import checkpoint
import train
from checkpoint import open_weights
from data import read_folder
from flux import Flux
from mmdit import MMDiT
from training.batches import batch_of_step
from training.cache import Latents
from training.resume import load_checkpoint, newest, save_checkpoint, saved_shapes, weights_of
from training.run import export_newest


def start(flags: list[str]) -> subprocess.Popen:
    """train.py in its own process, to be stopped."""
    return subprocess.Popen([sys.executable, "train.py", *flags], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_checkpoint(out: Path, process: subprocess.Popen) -> None:
    """Return when there is a checkpoint, when the process has ended, or after 100 seconds."""
    until = time.monotonic() + 100
    while not newest(out) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)


# ---- writing and reading

def test_saved_tensors_are_read_in_any_dtype_and_other_names_or_shapes_are_refused(tmp_path):
    tensors = {f"model.{k}": torch.randn(5 + k, 3, generator=seeded(k)) for k in range(3)}
    tensors["ema.1"] = tensors["model.1"] + 1
    save_checkpoint(tmp_path, 7, tensors, {"settings": {}}, keep=1)
    folder = newest(tmp_path)
    assert folder.name == "step-00000007" and json.loads((folder / "run.json").read_text())["step"] == 7
    assert saved_shapes(folder) == {name: tuple(t.shape) for name, t in tensors.items()}
    into = {name: torch.empty(t.shape, dtype=torch.bfloat16) for name, t in tensors.items()}
    load_checkpoint(folder, into)
    assert all(torch.equal(into[name], t.bfloat16()) for name, t in tensors.items())
    averaged = weights_of(folder, torch.float32)
    assert torch.equal(averaged["1"], tensors["ema.1"]) and torch.equal(averaged["0"], tensors["model.0"])
    assert len(averaged) == 3
    for name, shape in (("model.0", (4, 3)), ("model.9", (5, 3))):
        with pytest.raises(ValueError, match=f"1 tensors are missing or of another shape, the first is {name}"):
            load_checkpoint(folder, {name: torch.empty(shape)})


def test_damaged_checkpoint_does_not_count_among_those_to_keep(tmp_path):
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
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(settings, tmp_path, monkeypatch, changed):
    train.train(settings(out=tmp_path / "one", **changed))
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
    assert_same_run(tmp_path / "one", tmp_path / "parts")
    names = {name.partition(".")[0] for name in state_of(tmp_path / "parts")}
    assert names == {"model", "exp_avg", "exp_avg_sq"} | ({"ema"} if "ema" in changed else set())
    one, parts = ([[row[key] for key in ("step", "loss", "lr", "v_hh")] for row in log_of(tmp_path / name)]
                  for name in ("one", "parts"))
    assert one == parts and [row[0] for row in one] == list(range(1, 7))  # lines after the checkpoint were dropped


def test_finished_run_resumes_with_more_steps_bit_for_bit(settings, tmp_path):
    train.train(settings(out=tmp_path / "one", steps=5))
    train.train(settings(out=tmp_path / "parts", steps=2))
    train.train(settings(out=tmp_path / "parts", steps=5))
    assert_same_run(tmp_path / "one", tmp_path / "parts")


def test_killed_process_resumes_bit_for_bit(settings, tmp_path):
    out = tmp_path / "killed"
    process = start(settings.flags(out=out, steps=100_000, ema=0.9))
    wait_for_checkpoint(out, process)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    step = steps_of(out)
    assert step >= 3 and step % 3 == 0
    train.train(settings(out=out, steps=step + 2, ema=0.9))
    train.train(settings(out=tmp_path / "one", steps=step + 2, ema=0.9))
    assert_same_run(tmp_path / "one", out)


def test_finished_run_takes_no_step_and_writes_its_lost_model_again(settings, tmp_path, monkeypatch):
    train.train(settings(steps=2))
    file = tmp_path / "out" / "sd3.safetensors"
    before = load_file(file)
    file.unlink()
    monkeypatch.setattr(train, "objective", None)
    train.train(settings(steps=2))
    assert all(torch.equal(t, before[name]) for name, t in load_file(file).items())


def test_checkpoint_is_exported_in_the_given_dtype(settings, model, tmp_path, capsys):
    train.train(settings(steps=4, save_every=2))
    file = tmp_path / "out" / "sd3.safetensors"
    fp32 = load_file(file)
    file.unlink()
    train.main(["--export", f"--out={tmp_path}/out", "--save-dtype=bf16"])
    assert capsys.readouterr().out.endswith(f"wrote {file}, step 4\n")
    written = load_file(file)
    assert shapes_of(written) == shapes_of(load_file(model / "sd3.safetensors"))
    assert all(t.dtype == torch.bfloat16 and torch.equal(t, fp32[name].bfloat16()) for name, t in written.items())


def test_export_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="nowhere/checkpoints: no complete checkpoint"):
        train.main(["--export", f"--out={tmp_path}/nowhere"])


def test_only_the_newest_checkpoints_remain(settings, tmp_path):
    train.train(settings(steps=5, save_every=1, keep=3))
    names = sorted(f.name for f in (tmp_path / "out" / "checkpoints").iterdir())
    assert names == ["step-00000003", "step-00000004", "step-00000005"]


def damage_file(file: Path, damage: str) -> None:
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[:-9])
    elif damage == "one bit":
        file.write_bytes(content[:-400] + bytes([content[-400] ^ 1]) + content[-399:])
    elif damage == "zeros":
        file.write_bytes(content[:len(content) // 2] + bytes(len(content) - len(content) // 2))
    elif damage == "of another step":
        file.write_text(json.dumps(json.loads(content) | {"step": 1}))
    elif damage == "other entries":
        file.write_text(json.dumps(json.loads(content) | {"files": ["../settings.json"]}))
    else:
        file.write_text("[" * 9000)


@pytest.mark.parametrize("name, damage, reason", [
    ("*.safetensors", "missing", "safetensors is missing"), ("run.json", "missing", "run.json is missing"),
    ("*.safetensors", "truncated", " bytes instead of "), ("run.json", "truncated", "not JSON"),
    ("*.safetensors", "one bit", "not as it was written (SHA-256)"),
    ("*.safetensors", "zeros", "not as it was written (SHA-256)"),
    ("run.json", "nested", "nested"), ("run.json", "other entries", "files is "),
    ("run.json", "of another step", "is of step 1")])
def test_damaged_checkpoint_is_skipped_and_the_one_before_it_resumed(settings, tmp_path, capsys, name, damage, reason):
    train.train(settings(steps=4, save_every=2, out=tmp_path / "one"))
    train.train(settings(steps=4, save_every=2))
    last = newest(tmp_path / "out")
    damage_file(next(last.glob(name)), damage)
    capsys.readouterr()
    train.train(settings(steps=4, save_every=2))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{last}: ")]
    assert reason in line and line.endswith("; using the one before it, step-00000002")
    assert_same_run(tmp_path / "one", tmp_path / "out")


def test_run_without_an_undamaged_checkpoint_stops_and_changes_nothing(settings, tmp_path):
    train.train(settings(steps=2, save_every=1))
    for folder in (tmp_path / "out" / "checkpoints").iterdir():
        damage_file(next(folder.glob("*.safetensors")), "one bit")
    before = contents(tmp_path / "out")
    message = refusal_of(settings, steps=4)
    assert "step-00000001: shard" in message and "no checkpoint before it is left: restore it" in message
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("name", [".lock", "checkpoints"])
def test_what_stands_in_the_place_of_a_runs_files_is_named(settings, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").mkdir() if name == ".lock" else (tmp_path / "out" / name).touch()
    assert f"out/{name}: " in (message := refusal_of(settings)) and "move it away, or give another --out" in message


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.EIO])
@pytest.mark.parametrize("name", ["checkpoints", "run.json", "shard-00001-model-00001-of-00001.safetensors"])
def test_checkpoint_that_cannot_be_read_for_the_moment_stops_the_run_and_is_kept(settings, tmp_path, monkeypatch,
                                                                                 number, name):
    train.train(settings(steps=2, save_every=1))
    before, asked = contents(tmp_path / "out"), ("listdir" if name == "checkpoints" else "stat")
    ask, where = getattr(os, asked), name if name == "checkpoints" else f"step-00000002/{name}"

    def unreadable(path, *rest, **more):
        if str(path).endswith(where):
            raise OSError(number, os.strerror(number), str(path))
        return ask(path, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, asked, unreadable)
        message = refusal_of(settings, steps=4)
    assert os.strerror(number) in message and f"{tmp_path}/out/checkpoints" in message
    assert contents(tmp_path / "out") == before
    train.train(settings(steps=4))
    train.train(settings(steps=4, out=tmp_path / "one"))
    assert_same_run(tmp_path / "one", tmp_path / "out")


def test_file_that_is_not_the_runs_is_not_read(settings, tmp_path):
    train.train(settings(steps=3))
    state = state_of(tmp_path / "out")
    save_file({name: t + 1 for name, t in state.items()}, newest(tmp_path / "out") / "shard-00002-foreign.safetensors")
    train.train(settings(steps=5))
    train.train(settings(steps=5, out=tmp_path / "one"))
    assert_same_run(tmp_path / "one", tmp_path / "out")


def test_checkpoint_of_an_older_version_resumes(settings, tmp_path):
    """It has no checksums, no hash of the weights and no interpolation among its settings."""
    train.train(settings(steps=3))
    file = newest(tmp_path / "out") / "run.json"
    about = json.loads(file.read_text())
    del about["sha256"], about["weights"], about["settings"]["resize"]
    file.write_text(json.dumps(about))
    train.train(settings(steps=5))
    train.train(settings(steps=5, out=tmp_path / "one"))
    assert_same_run(tmp_path / "one", tmp_path / "out")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_signal_finishes_the_step_and_saves_a_checkpoint(settings, tmp_path, monkeypatch, number):
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("under nohup SIGHUP is ignored, by train.py too")
    formula, stops = train.objective, (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    handlers = [signal.getsignal(stop) for stop in stops]
    train.train(settings(steps=6, out=tmp_path / "one"))
    with monkeypatch.context() as patch:
        patch.setattr(train, "objective", lambda *inputs: [formula(*inputs), os.kill(os.getpid(), number)][0])
        assert train.train(settings(steps=6)) == number
    assert steps_of(tmp_path / "out") == 1 and not (tmp_path / "out" / "sd3.safetensors").exists()
    assert handlers == [signal.getsignal(stop) for stop in stops]
    train.train(settings(steps=6))
    assert_same_run(tmp_path / "one", tmp_path / "out")


def test_run_that_meets_an_unreadable_picture_saves_and_resumes_when_it_is_repaired(settings, photos, tmp_path):
    """A JPEG with an intact header: its truncated pixels are only noticed when it is read for a step."""
    folder = copy_of(photos, tmp_path / "data")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        file = folder / row["file_name"]
        row["file_name"] = f"{file.stem}.jpg"
        Image.open(file).save(folder / row["file_name"], quality=95)
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    usual = dict(steps=4, batch=1, save_every=100, data=folder)
    train.train(settings(**usual, out=tmp_path / "one"))
    items = read_folder(folder)
    third = items[batch_of_step([(64, 64)] * len(items), 1, 0, 2)[0]].path
    good = third.read_bytes()
    third.write_bytes(good[:len(good) // 2])
    assert f"{third.name}: " in refusal_of(settings, **usual)
    assert steps_of(tmp_path / "out") == 2
    third.write_bytes(good)
    train.train(settings(**usual))
    assert_same_run(tmp_path / "one", tmp_path / "out")


def test_run_that_meets_an_unreadable_latent_saves_and_resumes_when_it_is_encoded_again(settings, photos, tmp_path):
    folder = copy_of(photos, tmp_path / "data")
    usual = dict(steps=4, batch=1, save_every=100, data=folder, cache_latents=True)
    train.train(settings(**usual, out=tmp_path / "one"))
    third = batch_of_step([(64, 64)] * 4, 1, 0, 2)[0]
    (file,) = [file for file in folder.glob(".latents/*/*") if metadata_of(file)["picture"] == f"{third}.png"]
    fill = Latents.fill

    def filled_then_damaged(self, *rest):
        fill(self, *rest)
        file.write_bytes(file.read_bytes()[:100])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Latents, "fill", filled_then_damaged)
        assert file.name in refusal_of(settings, **usual)
    assert steps_of(tmp_path / "out") == 2
    file.unlink(missing_ok=True)
    train.train(settings(**usual))
    assert_same_run(tmp_path / "one", tmp_path / "out")


# ---- another place, another run

def test_run_resumes_with_its_weights_at_another_place_and_not_with_other_ones(settings, model, folders, tmp_path):
    train.train(settings(steps=3))
    moved = Path(shutil.copytree(model, tmp_path / "moved"))
    train.train(settings(steps=5, weights=moved))
    train.train(settings(steps=5, out=tmp_path / "one"))
    a, b = state_of(tmp_path / "one"), state_of(tmp_path / "out")
    assert all(torch.equal(a[name], b[name]) for name in a)
    weights = open_weights(moved / "sd3.safetensors")
    tensors = {name: t.read().clone() for name, t in weights.items()}
    for name, part in (("model.diffusion_model.x_embedder.proj.bias", "(transformer)"),
                       ("first_stage_model.encoder.conv_in.weight", "(VAE)")):
        changed = tensors | {name: tensors[name].index_fill(0, torch.tensor(0), 0.125)}
        checkpoint.save(moved / "sd3.safetensors", changed, weights.metadata)
        assert f"that run began from other weights {part}" in refusal_of(settings, steps=7, weights=moved)
        with pytest.raises(ValueError, match=re.escape(f"began from other weights {part}")):
            export_newest(settings(weights=moved))
    checkpoint.save(moved / "sd3.safetensors", tensors, weights.metadata | {"scale_factor": "0.75"})
    assert "(scale, shift and norm groups of the VAE)" in refusal_of(settings, steps=7, weights=moved)


def test_second_run_into_one_folder_is_refused_with_the_name_of_the_first(settings, tmp_path):
    process = start(settings.flags(steps=100_000))
    wait_for_checkpoint(tmp_path / "out", process)
    message = refusal_of(settings, steps=100_000)
    process.kill()
    process.communicate()
    words = f"another run writes there, process {process.pid} on {socket.gethostname()}, since 20"
    assert f"--out {tmp_path}/out: {words}" in message
    train.train(settings(steps=steps_of(tmp_path / "out")))  # the lock of a killed process is free


# ---- refusals, saves that fail

def test_changed_data_is_refused_on_resume(settings, photos, tmp_path):
    folder = copy_of(photos, tmp_path / "data")
    train.train(settings(steps=1, data=folder))
    rows = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "metadata.jsonl").write_text("\n".join(rows[:3]))
    message = refusal_of(settings, steps=2, data=folder)
    assert f"{folder} has changed since that run began (4 pictures, now 3;" in message
    assert steps_of(tmp_path / "out") == 1


def test_checkpoint_of_another_model_is_refused(settings, folders, tmp_path):
    train.train(settings(steps=1))
    message = refusal_of(settings, steps=2, weights=folders / "tiny-flux")
    assert "is of another model (family SD3 -> Flux-dev, " in message


@pytest.mark.parametrize("first, second", [("stock", "pi"), ("pi", "stock")])
def test_a_checkpoint_with_other_positions_is_refused(settings, tmp_path, first, second):
    flags = {"stock": {}, "pi": {"positions": "pi", "trained_side": 2}}
    train.train(settings(steps=1, **flags[first]))
    message = refusal_of(settings, steps=2, **flags[second])
    assert re.search(f"is of another model .positions .*{first}.* -> .*{second}", message)


@pytest.mark.parametrize("changed, difference", [
    ({"lr": 2e-3}, "lr 0.001 -> 0.002"), ({"seed": 1}, "seed 0 -> 1"),
    ({"bands": "1,1,1,2"}, "bands [1.0, 1.0, 1.0, 1.0] -> [1.0, 1.0, 1.0, 2.0]"),
    ({"objective": "release"}, "objective paper -> release"), ({"res": 32}, "res 64 -> 32"),
    ({"ema": 0.9}, "ema 0.0 -> 0.9"), ({"batch": 2}, "batch 4 -> 2")])
def test_other_settings_are_refused_on_resume_and_no_file_changes(settings, tmp_path, changed, difference):
    train.train(settings(steps=1))
    before = contents(tmp_path / "out")
    message = refusal_of(settings, steps=2, **changed)
    assert f"other settings ({difference})" in message and "--out" in message
    assert before == contents(tmp_path / "out")


@pytest.mark.parametrize("fails", ["shard", "commit", "export"])
def test_save_that_fails_leaves_the_previous_checkpoint_and_the_run_resumes(settings, tmp_path, monkeypatch, fails):
    train.train(settings(steps=3))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    def half_a_file(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise SafetensorError("No space left on device")

    with monkeypatch.context() as patch:
        if fails == "shard":
            patch.setattr("torch.distributed.checkpoint.filesystem._write_item", full)
        elif fails == "commit":
            patch.setattr(os, "rename", full)
        else:
            patch.setattr(checkpoint, "save_file", half_a_file)
        assert "No space left on device" in refusal_of(settings, steps=6)
    assert steps_of(tmp_path / "out") == (6 if fails == "export" else 3)
    assert not list((tmp_path / "out" / "checkpoints").glob(".*"))
    assert MMDiT.load(tmp_path / "out" / "sd3.safetensors")  # that of step 3 is still complete
    train.train(settings(steps=6))
    train.train(settings(steps=6, out=tmp_path / "one"))
    assert_same_run(tmp_path / "one", tmp_path / "out")


def test_remains_of_a_killed_save_are_ignored_and_removed(settings, tmp_path):
    train.train(settings(steps=3))
    left = tmp_path / "out" / "checkpoints" / ".step-00000004.tmp"
    left.mkdir()
    (left / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    train.train(settings(steps=6))
    train.train(settings(steps=6, out=tmp_path / "one"))
    assert not left.exists()
    assert_same_run(tmp_path / "one", tmp_path / "out")


# ---- stopped and killed

def test_sigterm_finishes_the_step_saves_and_exits_with_0(settings, tmp_path):
    process = start(settings.flags(steps=100_000, save_every=2))
    wait_for_checkpoint(tmp_path / "out", process)
    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate(timeout=100)
    step = steps_of(tmp_path / "out")
    assert process.returncode == 0, errors
    assert printed.endswith(f"stopped after step {step}; the same command resumes there\n")
    assert log_of(tmp_path / "out")[-1]["step"] == step


@pytest.mark.slow
def test_twenty_kills_at_random_moments_lose_nothing_before_the_last_checkpoint(settings, tmp_path):
    out, moments, steps, during_a_save = tmp_path / "out", random.Random(0), [0], 0
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "torch._dynamo"])  # imported once for all twenty
    for round_ in range(20):
        process = context.Process(target=train.main, args=(settings.flags(steps=100_000, save_every=1, keep=2),))
        before, until = newest(out), time.monotonic() + 100
        process.start()
        while newest(out) == before and process.is_alive() and time.monotonic() < until:
            time.sleep(0.005)
        time.sleep(moments.random() / 10)
        while round_ % 4 == 0 and not list((out / "checkpoints").glob(".step-*.tmp")) and time.monotonic() < until:
            time.sleep(0.0005)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        during_a_save += bool(list((out / "checkpoints").glob(".step-*.tmp")))
        steps.append(steps_of(out))
        assert steps[-1] > steps[-2]
        for folder in (out / "checkpoints").glob("step-*"):
            files = json.loads((folder / "run.json").read_text())["files"]
            assert all(len(load_file(folder / name)) > 0 for name in files)
    assert during_a_save
    train.train(settings(steps=steps[-1] + 1, save_every=1))
    train.train(settings(steps=steps[-1] + 1, save_every=1000, out=tmp_path / "one"))
    a, b = load_file(out / "sd3.safetensors"), load_file(tmp_path / "one" / "sd3.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a)


# ---- the exported file

def exported_model(kind: type, settings, official: Path, out: Path) -> MMDiT | Flux:
    """The model that one step of training writes in bf16; asserts that names and shapes are the official file's."""
    train.train(settings(weights=official.parent, steps=1, save_dtype="bf16", out=out))
    (file,) = out.glob("*.safetensors")
    assert shapes_of(open_weights(file)) == shapes_of(open_weights(official))
    assert {t.dtype for t in load_file(file).values()} == {torch.bfloat16}
    return kind.load(file)


def inputs_of(model: MMDiT | Flux) -> tuple[torch.Tensor, ...]:
    """Latent, context, pooled and sigma of two samples."""
    generator = seeded(0)
    return (torch.randn(2, 16, 8, 8, generator=generator),
            torch.randn(2, 5, model.config.context_dim, generator=generator),
            torch.randn(2, model.config.pooled_dim, generator=generator), torch.tensor([0.3, 0.8]))


def test_exported_sd3_file_is_official_and_its_diffusers_conversion_predicts_the_same(settings, folders, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    ours = exported_model(MMDiT, settings, folders / "tiny-sd3" / "sd3.safetensors", tmp_path / "out")
    config, (latent, context, pooled, sigma) = ours.config, inputs_of(ours)
    theirs = diffusers.SD3Transformer2DModel(
        num_layers=config.depth, attention_head_dim=64, num_attention_heads=config.hidden_size // 64,
        qk_norm="rms_norm", caption_projection_dim=config.hidden_size, joint_attention_dim=config.context_dim,
        pooled_projection_dim=config.pooled_dim, pos_embed_max_size=config.table_side, out_channels=16)
    theirs.load_state_dict(diffusers_names(ours.state_dict()), strict=True)
    expected = theirs(latent, context, pooled, 1000 * sigma).sample
    assert distance(ours(latent, sigma, context, pooled), expected) < 1e-4 * expected.abs().max()


def test_exported_flux_file_is_official_and_its_diffusers_conversion_predicts_the_same(settings, folders, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    ours = exported_model(Flux, settings, folders / "tiny-flux" / "flux.safetensors", tmp_path / "out")
    config, (latent, context, pooled, sigma), guidance = ours.config, inputs_of(ours), torch.full((2,), 3.5)
    theirs = diffusers.FluxTransformer2DModel(
        in_channels=64, num_layers=config.depth, num_single_layers=config.depth_single, guidance_embeds=True,
        attention_head_dim=config.head_dim, num_attention_heads=config.hidden_size // config.head_dim,
        joint_attention_dim=config.context_dim, pooled_projection_dim=config.pooled_dim, axes_dims_rope=config.axes_dim)
    theirs.load_state_dict(diffusers_names(ours.state_dict()), strict=True)
    packed = latent.unflatten(-1, (4, 2)).unflatten(-3, (4, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    ids = torch.cartesian_prod(torch.arange(1.0), torch.arange(4.0), torch.arange(4.0))
    out = theirs(packed, context, pooled, sigma, ids, torch.zeros(5, 3), guidance).sample
    expected = out.unflatten(1, (4, 4)).unflatten(-1, (16, 2, 2)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    assert distance(ours(latent, sigma, context, pooled, guidance), expected) < 1e-4 * expected.abs().max()
