"""Several processes: every division of the work gives the same run; gradient buckets; ranks fail and stop together."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import CAPTIONS, ROOT, broken_folder, copy_of, log_of, run_script, seeded
from safetensors.torch import load_file
from torch import nn

import train
from checkpoint import open_weights, save
from family import describe
from flux import FluxConfig, new_flux
from mmdit import MMDiTConfig, new_mmdit
from training.plan import memory
from training.ranks import stop_on_signals
from training.resume import newest, step_of
from training.settings import Machine, settle


@pytest.fixture(scope="module")
def small(folders, tmp_path_factory) -> Path:
    """The model folders with transformers of two heads, in which every part has a gradient."""
    folder = Path(shutil.copytree(folders, tmp_path_factory.mktemp("ranks") / "models", symlinks=True))
    sd3 = MMDiTConfig(128, 2, context_dim=192, pooled_dim=192, table_side=16, mlp_hidden=128, qk_norm=True)
    flux = FluxConfig(64, 1, 2, 32, context_dim=192, pooled_dim=64, mlp_hidden=128, axes_dim=(4, 14, 14))
    for file, prefix, transformer in (("tiny-sd3/sd3.safetensors", "model.diffusion_model.", new_mmdit(sd3, seeded(0))),
                                      ("tiny-flux/flux.safetensors", "", new_flux(flux, seeded(0)))):
        before, generator = open_weights(folder / file), seeded(1)
        tensors = {name: t.read() for name, t in before.items() if name.startswith("first_stage_model.")}
        for name, t in transformer.state_dict().items():
            noise = 0 if name == "pos_embed" else 0.05 * torch.randn(t.shape, generator=generator)
            tensors[prefix + name] = t + noise
        save(folder / file, tensors, before.metadata | {"axes_dim": "4, 14, 14"})
    return folder


def on_ranks(count: int, cases: list[dict], folder: Path, restarts: int = 0) -> str:
    """Run the cases of tests/on_ranks.py on `count` gloo ranks; returns what they printed. Asserts that they finish."""
    file = folder / "cases.json"
    file.write_text(json.dumps(cases))
    done = run_script("tests/on_ranks.py", file, ranks=count, restarts=restarts, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def seen(out: Path, rank: int = 0) -> dict:
    """The losses and the error of one rank."""
    return json.loads((out / f"seen-{rank}.json").read_text())


def losses_of(out: Path) -> list[float]:
    return [row["loss"] for row in log_of(out)]


def exported(out: Path) -> dict[str, torch.Tensor]:
    """The transformer in the file that a run wrote."""
    (file,) = out.glob("*.safetensors")
    return {name: t for name, t in load_file(file).items() if not name.startswith("first_stage_model.")}


def difference(one: Path, other: Path) -> tuple[float, float]:
    """The largest relative difference of the losses, and that of the exported tensors."""
    assert [row["step"] for row in log_of(one)] == [row["step"] for row in log_of(other)]
    x, y = exported(one), exported(other)
    assert x.keys() == y.keys()
    return (max(abs(a - b) / a for a, b in zip(losses_of(one), losses_of(other), strict=True)),
            max(((x[name] - y[name]).norm() / x[name].norm()).item() for name in x))


# ---- the same run, however it is divided

@pytest.mark.slow
def test_every_division_of_the_work_gives_the_same_five_steps(settings, small, tmp_path):
    def flags(name: str, kind: str, n: int, **more: object) -> list[str]:
        shard = kind if kind.startswith("zero") else None
        return settings.flags(weights=small / name, batch=8, steps=5, save_every=5, lr=1e-4, accumulate=n,
                              out=tmp_path / f"{name}-{kind}-{n}", **{"shard": shard} | more)

    names, kinds = ("tiny-sd3", "tiny-flux"), ("ours", "torch", "zero2", "zero3")
    for name in names:
        for n in (1, 2):
            train.main(flags(name, "one", n))
    on_ranks(2, [{"flags": flags(name, kind, n), "ddp": kind} for name in names for kind in kinds for n in (1, 2)]
             + [{"flags": flags(name, "tokens", 1, sequence=2)} for name in names], tmp_path)
    shared = {"sequence": 2, "shard": "zero3", "activations": "recompute"}
    on_ranks(4, [{"flags": flags(name, "four", n)} for name in names for n in (1, 2)]
             + [{"flags": flags(name, "tokens", 2, **shared)} for name in names], tmp_path)
    for name in names:
        for out in ("one-2", *(f"{kind}-{n}" for kind in ("tokens", "four", *kinds) for n in (1, 2))):
            losses, weights = difference(tmp_path / f"{name}-one-1", tmp_path / f"{name}-{out}")
            most = 1e-5 if out.startswith("tokens") else 1e-6  # parts of a picture are added in another order
            assert losses <= most and weights <= most, (name, out)


def test_resumed_run_on_two_ranks_equals_the_uninterrupted_one_bit_for_bit(settings, small, tmp_path):
    cases, kinds = [], {"none": {}, "zero2": {"shard": "zero2"},
                        "zero3": {"shard": "zero3", "state": "bf16", "ema_on_host": True}}
    for kind, changed in kinds.items():
        usual = dict(steps=6, ema=0.9, save_every=10, weights=small / "tiny-sd3") | changed
        cases += [{"flags": settings.flags(**usual, out=tmp_path / f"{kind}-one")},
                  {"flags": settings.flags(**usual, out=tmp_path / f"{kind}-parts"), "stop": 3},
                  {"flags": settings.flags(**usual, out=tmp_path / f"{kind}-parts")}]
    printed = on_ranks(2, cases, tmp_path)
    assert printed.count("stopped after step 3; the same command resumes there") == 3
    for kind in kinds:
        one, parts = tmp_path / f"{kind}-one", tmp_path / f"{kind}-parts"
        files = sorted(file.name for file in newest(one).glob("*.safetensors"))
        assert len(files) == 2 and files == sorted(file.name for file in newest(parts).glob("*.safetensors"))
        for file in files:
            a, b = load_file(newest(one) / file), load_file(newest(parts) / file)
            assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        assert losses_of(one) == losses_of(parts)


def test_run_resumes_with_another_number_of_ranks(settings, small, tmp_path):
    usual = dict(weights=small / "tiny-sd3", ema=0.9, save_every=2, lr=1e-4, out=tmp_path / "parts")
    train.train(settings(**usual | {"out": tmp_path / "one"}, steps=8))
    train.train(settings(**usual, steps=2))
    on_ranks(4, [{"flags": settings.flags(**usual, steps=4, shard="zero3")}], tmp_path)
    on_ranks(2, [{"flags": settings.flags(**usual, steps=6, shard="zero2")},
                 {"flags": settings.flags(**usual, steps=7, sequence=2)}], tmp_path)
    train.train(settings(**usual, steps=8))
    losses, weights = difference(tmp_path / "one", tmp_path / "parts")
    assert losses < 1e-5 and weights < 1e-5


def test_run_with_a_killed_rank_restarts_and_ends_with_the_same_weights(settings, small, tmp_path):
    usual = dict(weights=small / "tiny-sd3", steps=6, save_every=2, lr=1e-4)
    train.train(settings(**usual, out=tmp_path / "one"))
    on_ranks(2, [{"flags": settings.flags(**usual, out=tmp_path / "out"), "die": [1, 5]}], tmp_path, restarts=3)
    assert len(seen(tmp_path / "out")["losses"]) == 2  # of steps 5 and 6, after the checkpoint of step 4
    losses, weights = difference(tmp_path / "one", tmp_path / "out")
    assert losses < 1e-5 and weights < 1e-5


def test_torchrun_restarts_the_command_when_a_rank_is_killed(settings, small, tmp_path):
    """train.py itself, killed from outside at any place of a step."""
    usual = dict(weights=small / "tiny-sd3", steps=12, save_every=3, lr=1e-4)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3", "train.py"]
    process = subprocess.Popen([sys.executable, *command, *settings.flags(**usual, out=tmp_path / "out")], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not newest(tmp_path / "out") and process.poll() is None:
            time.sleep(0.02)
        ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(ranks[1]), signal.SIGKILL)
        _, errors = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 0, errors[-3000:]
    train.train(settings(**usual, out=tmp_path / "one"))
    losses, weights = difference(tmp_path / "one", tmp_path / "out")
    assert losses < 1e-5 and weights < 1e-5


def test_plan_of_offloaded_state_equals_what_two_ranks_take_with_emulated_pinning(settings, folders, tmp_path):
    flags = settings.flags(weights=folders / "tiny-sd3", shard="zero2")
    printed = on_ranks(2, [{"flags": flags, "pinned": True}], tmp_path)
    family, config, vae_config = describe(None, str(folders / "tiny-sd3"), None)
    s = replace(settle(settings(weights=folders / "tiny-sd3", shard="zero2"), family), offload=True)
    _, host = memory(s, family, config, vae_config, Machine(2, 0))
    planned = host["offloaded state"] + host["rounded up by pinning"]
    assert host["rounded up by pinning"] > 0.05 * host["offloaded state"]
    assert planned == pytest.approx(int(re.search(r"bytes (\d+)", printed)[1]), rel=0.02)


@pytest.mark.parametrize("patience_s, step", [(60, 2), (1, None)])
def test_sigterm_during_a_slow_step_is_saved_where_torchrun_waits_and_the_run_resumes_bit_for_bit(
        settings, tmp_path, patience_s, step):
    """torchrun kills its ranks after --shutdown-timeout; a step of 4K Flux takes longer than its default of 30 s."""
    usual = dict(steps=4, save_every=100)
    cases = tmp_path / "cases.json"
    cases.write_text(json.dumps([{"flags": settings.flags(**usual), "slow": [1, 4]}]))
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--monitor-interval=0.1",
         f"--shutdown-timeout={patience_s}", "tests/on_ranks.py", str(cases)], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not (tmp_path / "out" / "slow").exists() and process.poll() is None:
            time.sleep(0.02)
        process.terminate()
        _, errors = process.communicate(timeout=100)
    finally:
        process.kill()
    folder = newest(tmp_path / "out")
    assert (folder and step_of(folder)) == step, errors[-3000:]
    if step:
        on_ranks(2, [{"flags": settings.flags(**usual)}, {"flags": settings.flags(**usual, out=tmp_path / "one")}],
                 tmp_path)
        for file in newest(tmp_path / "one").glob("*.safetensors"):
            a, b = load_file(file), load_file(newest(tmp_path / "out") / file.name)
            assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_ranks_end_by_themselves_after_their_work(settings, tmp_path):
    """tests/on_ranks.py too leaves as train.py does: no exit code but 0, no hang, nothing on stderr from gloo."""
    cases = [{"flags": settings.flags(steps=1, out=tmp_path / kind, **changed)}
             for kind, changed in (("ddp", {}), ("fsdp", {"shard": "zero3", "ema": 0.9}))]
    file = tmp_path / "cases.json"
    file.write_text(json.dumps(cases))
    done = run_script("tests/on_ranks.py", file, ranks=2, timeout=200)
    assert done.returncode == 0 and not re.search("terminate called|Fatal|SIGABRT", done.stderr), done.stderr[-3000:]


def test_second_interrupt_ends_the_process_and_an_ignored_signal_stays_ignored(monkeypatch):
    ended, hangup = [], signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    monkeypatch.setattr(os, "_exit", ended.append)
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.is_set()
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        assert stop.is_set() and stop.number == signal.SIGTERM and not ended
        os.kill(os.getpid(), signal.SIGINT)
        assert ended == [130]
    signal.signal(signal.SIGHUP, hangup)


def errors_in(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("error: ")]


def test_error_of_one_rank_stops_all_with_its_message(settings, photos, tmp_path):
    folder = broken_folder(photos, tmp_path / "data", "truncated")
    cases = [{"flags": settings.flags(data=folder, steps=3, res=res, save_every=1, out=tmp_path / f"out-{res}")}
             for res in (96, 64)]
    on_ranks(2, cases, tmp_path)
    for rank in (0, 1):
        assert ": its short side is 64 px, below --res 96" in seen(tmp_path / "out-96", rank)["error"]
        assert "2.png: not a complete picture" in seen(tmp_path / "out-64", rank)["error"]


@pytest.mark.parametrize("changed, reason", [
    ({}, "2.png: not a complete picture"),
    ({"batch": 3}, "--batch 3: give a multiple of 2, 2 ranks times --accumulate")])
def test_error_is_printed_once_for_all_ranks(settings, photos, tmp_path, changed, reason):
    folder = broken_folder(photos, tmp_path / "data", "truncated")
    done = run_script("train.py", *settings.flags(data=folder, steps=3, save_every=1, **changed), ranks=2, timeout=200)
    (line,) = errors_in(done.stderr)
    assert done.returncode != 0 and reason in line


def test_port_in_use_is_refused_in_one_line(settings):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        where = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = run_script("train.py", *settings.flags(), timeout=120, **where)
    (line,) = errors_in(done.stderr)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert line.startswith(f"error: ranks meet at 127.0.0.1:{port}: another run uses this port; give torchrun")


def test_losses_in_bf16_are_close_to_fp32_however_the_work_is_divided(settings, small, tmp_path):
    kinds = {"none": {}, "zero2": {"shard": "zero2"},
             "zero3": {"shard": "zero3", "state": "bf16", "activations": "recompute", "ema": 0.9}}
    runs = {name: dict(steps=3, lr=1e-4, save_every=10, weights=small / name) for name in ("tiny-sd3", "tiny-flux")}
    on_ranks(2, [{"flags": settings.flags(**usual, **changed, dtype="bf16", out=tmp_path / name / kind)}
                 for name, usual in runs.items() for kind, changed in kinds.items()], tmp_path)
    for name, usual in runs.items():
        train.train(settings(**usual, out=tmp_path / name / "fp32"))
        for kind in kinds:
            assert losses_of(tmp_path / name / kind) == pytest.approx(losses_of(tmp_path / name / "fp32"), rel=0.01)


generated = (pytest.mark.slow, pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs g++ on CPUs"))


@pytest.mark.parametrize("compiler, name", [
    ("aot_eager", "tiny-flux"),  # records the same graphs, but generates no code
    *(pytest.param("inductor", name, marks=generated) for name in ("tiny-sd3", "tiny-flux"))])
def test_compiled_blocks_train_on_ranks_as_others_do(settings, small, tmp_path, compiler, name):
    kinds = {"none": {}, "zero2": {"shard": "zero2", "accumulate": 2},
             "zero3": {"shard": "zero3", "activations": "recompute", "ema": 0.9}, "tokens": {"sequence": 2}}
    on_ranks(2, [{"flags": settings.flags(weights=small / name, steps=2, lr=1e-4, out=tmp_path / f"{kind}-{c}",
                                          compile=c, **changed), "compiler": compiler}
                 for kind, changed in kinds.items() for c in (None, True)], tmp_path)
    for kind in kinds:
        losses, weights = difference(tmp_path / f"{kind}-None", tmp_path / f"{kind}-True")
        assert losses < 1e-5 and weights < 1e-5, kind


@pytest.mark.slow
def test_two_ranks_encode_and_train_and_a_picture_is_drawn_with_the_result(settings, small, photos, tmp_path):
    """A minute or two: every step by its command."""
    def run(*command: object, ranks: int = 1) -> str:
        done = run_script(*command, ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    data, out, weights = copy_of(photos, tmp_path / "data"), tmp_path / "out", small / "tiny-sd3"
    printed = run("data.py", "encode", data, "--weights", weights, "--device", "cpu", "--latents", "--res", 64, ranks=2)
    for line in ("rank 0 of 2: 3 captions encoded, 5 in", "rank 1 of 2: 2 captions encoded, 5 in"):
        assert line in printed
    flags = settings.flags(weights=weights, data=data, out=out, batch=8, lr=2e-3, warmup=10, ema=0.98, steps=200,
                           cache_latents=True, drop_caption=0, save_every=50, sample_every=100, save_dtype="fp16")
    assert run("train.py", *flags, ranks=2).endswith(f"wrote {out}/sd3.safetensors\n")
    loss = losses_of(out)
    assert sum(loss[-20:]) < 0.5 * sum(loss[:20])
    assert (out / "samples" / "step-00000200.png").exists() and newest(out).name == "step-00000200"
    run("train.py", "--export", "--out", out, "--save-dtype", "bf16")
    run("sample.py", "--weights", weights, "--transformer", out / "sd3.safetensors", "--res", 64, "--steps", 4,
        "--device", "cpu", "--prompt", CAPTIONS[0], "--out", tmp_path / "boat.png")
    assert (tmp_path / "boat.png").stat().st_size > 1000


# ---- the hand-written DDP

@pytest.fixture
def group_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Chain(nn.Module):
    """Six layers, one of which is never used."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(5))
        self.idle = nn.Linear(32, 32)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def test_buckets_are_sent_during_backward(group_of_one, monkeypatch):
    monkeypatch.setattr(train, "BUCKET_BYTES", 2 * 33 * 32 * 4)
    model, events, all_reduce = Chain(), [], dist.all_reduce
    model.idle.requires_grad_(False)

    def watched(*inputs, **options):
        events.append("launch")
        return all_reduce(*inputs, **options)

    monkeypatch.setattr(dist, "all_reduce", watched)
    ddp = train.DDP(model)
    assert len(ddp.buckets) == 3 and sum(len(bucket.parameters) for bucket in ddp.buckets) == 10
    model.layers[0].weight.register_post_accumulate_grad_hook(lambda _: events.append("first layer"))
    model.layers[2].weight.register_post_accumulate_grad_hook(lambda _: events.append("third layer"))
    ddp.zero()
    model(torch.randn(3, 32)).sum().backward()
    assert events.index("launch") < events.index("third layer") < events.index("first layer")
    assert events.count("launch") >= 2
    ddp.wait()
    assert events.count("launch") == 3


def test_parameter_that_some_ranks_do_not_use_has_the_gradient_of_a_single_process(tmp_path):
    printed = on_ranks(2, [{"unused": True}], tmp_path)
    assert printed.splitlines() == ["everywhere 1.5, first rank 0.5, nowhere None"]


def test_nothing_is_sent_before_the_last_pass_of_an_accumulated_step(group_of_one, monkeypatch):
    model, calls, all_reduce = Chain(), [], dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda *inputs, **more: calls.append(1) or all_reduce(*inputs, **more))
    ddp, x = train.DDP(model), torch.randn(2, 3, 32)
    ddp.zero()
    ddp.last_backward = False
    model(x[0]).sum().backward()
    assert not calls
    ddp.last_backward = True
    model(x[1]).sum().backward()
    ddp.wait()
    assert calls and all(p.grad is None for p in model.idle.parameters())
    accumulated = [p.grad.clone() for p in model.layers.parameters()]
    grads = torch.autograd.grad(model(x).sum(), list(model.layers.parameters()))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(accumulated, grads, strict=True))
