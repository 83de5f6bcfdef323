"""Several processes: every division of the work gives the same run, buckets overlap with backward, ranks fail and stop together."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

import train
from training.resume import newest

ROOT = Path(__file__).parents[1]


def on_ranks(count: int, cases: list[dict], folder: Path, restarts: int = 0) -> subprocess.CompletedProcess:
    """Run the cases of tests/on_ranks.py on that many gloo ranks."""
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", f"--max-restarts={restarts}",
               "--monitor-interval=0.1", str(ROOT / "tests" / "on_ranks.py"), str(folder / "cases.json")]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})


def seen(out: Path, rank: int = 0) -> dict:
    return json.loads((out / f"seen-{rank}.json").read_text())


def log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    (file,) = out.glob("*.safetensors")
    return {name: t for name, t in load_file(file).items() if not name.startswith("first_stage_model.")}


def difference(one: Path, other: Path) -> tuple[float, float]:
    """Largest relative difference of the losses; of the weights, tensor by tensor."""
    a, b = log_of(one), log_of(other)
    assert [row["step"] for row in a] == [row["step"] for row in b]
    x, y = weights_of(one), weights_of(other)
    assert x.keys() == y.keys()
    return (max(abs(m["loss"] - n["loss"]) / m["loss"] for m, n in zip(a, b, strict=True)),
            max(((x[name] - y[name]).norm() / x[name].norm()).item() for name in x))


# ---- the same run, whoever computes it

@pytest.mark.parametrize("name", ["tiny-sd3", "tiny-flux"])
def test_every_division_of_the_work_gives_the_same_five_steps(settings, folders, tmp_path, name):
    usual = dict(weights=folders / name, batch=8, steps=5, save_every=5, lr=1e-4)
    train.train(settings(**usual, out=tmp_path / "one"))
    train.train(settings(**usual, out=tmp_path / "one-2", accumulate=2))

    def case(kind: str, accumulate: int, **more: object) -> dict:
        changed = {"shard": kind} if kind.startswith("zero") else {}
        return {"flags": settings.flags(**usual, accumulate=accumulate, out=tmp_path / f"{kind}-{accumulate}", **changed)} | more

    two = [case(kind, accumulate, ddp=kind) for kind in ("ours", "torch", "zero2", "zero3") for accumulate in (1, 2)]
    four = [{"flags": settings.flags(**usual, accumulate=n, out=tmp_path / f"four-{n}")} for n in (1, 2)]
    for count, cases in ((2, two), (4, four)):
        done = on_ranks(count, cases, tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    for out in ("one-2", *(f"{kind}-{n}" for kind in ("four", "ours", "torch", "zero2", "zero3") for n in (1, 2))):
        losses, weights = difference(tmp_path / "one", tmp_path / out)
        assert losses <= 1e-6 and weights <= 1e-6, out


def test_interrupted_and_resumed_is_the_uninterrupted_run_bit_for_bit(settings, folders, tmp_path):
    cases = []
    for kind, changed in (("none", {}), ("zero2", {"shard": "zero2"}), ("zero3", {"shard": "zero3", "state": "bf16", "ema_on_host": True})):
        usual = dict(steps=6, ema=0.9, save_every=10, weights=folders / "tiny-sd3") | changed
        cases += [{"flags": settings.flags(**usual, out=tmp_path / f"{kind}-whole")},
                  {"flags": settings.flags(**usual, out=tmp_path / f"{kind}-parts"), "stop": 3},
                  {"flags": settings.flags(**usual, out=tmp_path / f"{kind}-parts")}]
    done = on_ranks(2, cases, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("stopped after step 3; the same command resumes there") == 3
    for kind in ("none", "zero2", "zero3"):
        whole, parts = newest(tmp_path / f"{kind}-whole"), newest(tmp_path / f"{kind}-parts")
        files = sorted(file.name for file in whole.glob("*.safetensors"))
        assert len(files) == 2 and files == sorted(file.name for file in parts.glob("*.safetensors"))
        for file in files:
            a, b = load_file(whole / file), load_file(parts / file)
            assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        assert [row["loss"] for row in log_of(whole.parents[1])] == [row["loss"] for row in log_of(parts.parents[1])]


def test_run_resumes_with_another_number_of_ranks(settings, folders, tmp_path):
    usual = dict(weights=folders / "tiny-sd3", ema=0.9, save_every=2, lr=1e-4)
    train.train(settings(**usual, out=tmp_path / "one", steps=8))
    for count, steps, changed in ((2, 2, {"shard": "zero2"}), (1, 4, {}), (4, 6, {"shard": "zero3"}), (2, 8, {})):
        if count == 1:
            train.train(settings(**usual, out=tmp_path / "parts", steps=steps, **changed))
        else:
            done = on_ranks(count, [{"flags": settings.flags(**usual, out=tmp_path / "parts", steps=steps, **changed)}], tmp_path)
            assert done.returncode == 0, done.stderr[-3000:]
    losses, weights = difference(tmp_path / "one", tmp_path / "parts")
    assert losses < 1e-5 and weights < 1e-5


def test_killed_rank_is_started_again_and_the_weights_are_right(settings, folders, tmp_path):
    usual = dict(weights=folders / "tiny-sd3", steps=6, save_every=2, lr=1e-4)
    train.train(settings(**usual, out=tmp_path / "one"))
    done = on_ranks(2, [{"flags": settings.flags(**usual, out=tmp_path / "out"), "die": [1, 5]}], tmp_path, restarts=3)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(seen(tmp_path / "out")["losses"]) == 2  # of steps 5 and 6: the checkpoint of step 4 was found
    losses, weights = difference(tmp_path / "one", tmp_path / "out")
    assert losses < 1e-5 and weights < 1e-5


def test_what_goes_wrong_on_one_rank_is_said_once_and_stops_all(settings, photos, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for file in (*photos.glob("*.png"), photos / "metadata.jsonl"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "1.png").write_bytes((photos / "1.png").read_bytes()[:-400])
    cases = [{"flags": settings.flags(data=folder, steps=3, res=res, save_every=1, out=tmp_path / f"out-{res}")} for res in (96, 64)]
    done = on_ranks(2, cases, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        assert ": its short side is 64 px, below --res 96" in seen(tmp_path / "out-96", rank)["error"]
        assert "1.png: not a complete picture" in seen(tmp_path / "out-64", rank)["error"]
    command = ["--standalone", "--nproc-per-node=2", str(ROOT / "train.py"), *settings.flags(data=folder, steps=3, save_every=1)]
    for flags, says in (([], "1.png: not a complete picture"), (["--batch=3"], "--batch 3: give a multiple of 2, 2 ranks times --accumulate")):
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", *command, *flags], cwd=ROOT, capture_output=True, text=True,
                              timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"})
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode != 0 and len(lines) == 1 and says in lines[0], done.stderr[-2000:]


def test_port_in_use_is_said_in_one_line(settings):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        where = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = subprocess.run([sys.executable, str(ROOT / "train.py"), *settings.flags()], cwd=ROOT, capture_output=True, text=True,
                              timeout=120, env=os.environ | where)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert len(lines) == 1 and lines[0].startswith(f"error: ranks meet at 127.0.0.1:{port}: another run uses this port; give torchrun")


def test_bf16_is_close_to_fp32_however_it_is_divided(settings, folders, tmp_path):
    usual, cases = dict(steps=3, lr=1e-4, save_every=10, dtype="bf16"), []
    for name in ("tiny-sd3", "tiny-flux"):
        train.train(settings(**usual | {"dtype": "fp32"}, weights=folders / name, out=tmp_path / name / "fp32"))
        for kind, changed in (("none", {}), ("zero2", {"shard": "zero2"}),
                              ("zero3", {"shard": "zero3", "state": "bf16", "activations": "recompute", "ema": 0.9})):
            cases.append({"flags": settings.flags(**usual, **changed, weights=folders / name, out=tmp_path / name / kind)})
            (tmp_path / name).mkdir(exist_ok=True)
    done = on_ranks(2, cases, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("tiny-sd3", "tiny-flux"):
        exact = [row["loss"] for row in log_of(tmp_path / name / "fp32")]
        for kind in ("none", "zero2", "zero3"):
            assert [row["loss"] for row in log_of(tmp_path / name / kind)] == pytest.approx(exact, rel=0.01)


@pytest.mark.slow
def test_two_ranks_train_from_captions_to_a_picture(settings, folders, photos, tmp_path):
    """A minute or two: encode, train, export, draw, each by its command."""
    def run(*command: object, ranks: int = 1) -> str:
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        done = subprocess.run([sys.executable, *start, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=600,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    data, out, weights = tmp_path / "data", tmp_path / "out", folders / "tiny-sd3"
    data.mkdir()
    for file in (*photos.glob("*.png"), photos / "metadata.jsonl"):
        (data / file.name).write_bytes(file.read_bytes())
    said = run("data.py", "encode", data, "--weights", weights, "--device", "cpu", "--latents", "--res", 64, ranks=2)
    assert "rank 0 of 2: 3 captions encoded, 5 in" in said and "rank 1 of 2: 2 captions encoded, 5 in" in said
    flags = settings.flags(weights=weights, data=data, out=out, batch=8, lr=1e-3, warmup=10, ema=0.98, cache_latents=True, drop_caption=0,
                           save_every=50, sample_every=100, save_dtype="fp16")
    said = run("train.py", *flags, "--steps=200", ranks=2)
    assert said.endswith(f"wrote {out}/sd3.safetensors\n")
    loss = [row["loss"] for row in log_of(out)]
    assert sum(loss[-20:]) < 0.5 * sum(loss[:20])
    assert (out / "samples" / "step-00000200.png").exists() and newest(out).name == "step-00000200"
    run("train.py", "--export", "--out", out, "--save-dtype", "bf16")
    run("sample.py", "--weights", weights, "--transformer", out / "sd3.safetensors", "--res", 64, "--steps", 4, "--device", "cpu",
        "--prompt", "a red boat on a quiet lake at dawn", "--out", tmp_path / "boat.png")
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


def test_buckets_are_launched_while_backward_is_under_way(group_of_one, monkeypatch):
    monkeypatch.setattr(train, "BUCKET_BYTES", 2 * 33 * 32 * 4)
    model, events, all_reduce = Chain(), [], dist.all_reduce
    model.idle.requires_grad_(False)
    monkeypatch.setattr(dist, "all_reduce", lambda *args, **options: events.append("launch") or all_reduce(*args, **options))
    ddp = train.DDP(model)
    assert len(ddp.buckets) == 3 and sum(len(bucket.parameters) for bucket in ddp.buckets) == 10
    model.layers[0].weight.register_post_accumulate_grad_hook(lambda _: events.append("first layer"))
    model.layers[2].weight.register_post_accumulate_grad_hook(lambda _: events.append("third layer"))
    ddp.zero()
    model(torch.randn(3, 32)).sum().backward()
    assert events.index("launch") < events.index("third layer") < events.index("first layer") and events.count("launch") >= 2
    ddp.wait()
    assert events.count("launch") == 3


def test_parameter_that_one_rank_or_none_uses_has_the_gradient_of_a_single_process(tmp_path):
    done = on_ranks(2, [{"unused": True}], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == ["everywhere 1.5, first rank 0.5, nowhere None"]


def test_nothing_is_sent_before_the_last_pass_of_an_accumulated_step(group_of_one, monkeypatch):
    model, calls, all_reduce = Chain(), [], dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda *args, **options: calls.append(1) or all_reduce(*args, **options))
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
