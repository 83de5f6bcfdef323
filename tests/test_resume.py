"""The folder of a run: kill -9 at any moment, signals, a full disk; what is exported; rows of official files read lazily."""

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
from safetensors.torch import load_file

import train
from checkpoint import LazyTensor, diffusers_names, open_weights
from flux import Flux
from mmdit import MMDiT
from training.resume import load_checkpoint, newest, save_checkpoint, saved_shapes, weights_of

ROOT = Path(__file__).parents[1]


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


@pytest.mark.parametrize("first, last", [(0, 7), (2, 3), (3, 6), (0, 0), (6, 6)])
def test_rows_of_a_fused_tensor_are_those_of_the_whole_and_others_are_not_read(first, last):
    from checkpoint import _joined

    parts, read = [torch.randn(rows, 2) for rows in (2, 4)], []

    def lazy(k: int, part: torch.Tensor) -> LazyTensor:
        return LazyTensor(tuple(part.shape), lambda: read.append(k) or part)

    fused = _joined("", [lazy(k, part) for k, part in enumerate(parts)])
    assert torch.equal(fused.rows(first, last), torch.cat(parts)[first:last])
    assert set(read) <= ({0} if first < 2 or first == last else set()) | ({1} if last > 2 else set())
    swapped = _joined("swap", [lazy(0, parts[1])])
    assert torch.equal(swapped.rows(first, last), torch.cat(parts[1].chunk(2)[::-1])[first:last])
    assert torch.equal(swapped.read(), torch.cat(parts[1].chunk(2)[::-1]))


# ---- killed, asked to stop

def test_sigterm_finishes_the_step_saves_and_exits_with_0(settings, tmp_path):
    process = start(settings.flags(steps=100_000, save_every=2))
    wait_for_checkpoint(tmp_path / "out", process)
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=100)
    step = json.loads((newest(tmp_path / "out") / "run.json").read_text())["step"]
    assert process.returncode == 0, errors
    assert said.endswith(f"stopped after step {step}; the same command goes on from there\n")
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
