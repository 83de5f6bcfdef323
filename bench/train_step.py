"""A training step beside the same step with diffusers' model, and the hand-written DDP beside torch's, each in one run.

Mirrors   step: the released trainer's step, on diffusers.SD3Transformer2DModel: wavelet bands by pytorch_wavelets, torch autograd,
                clip_grad_norm_, torch.optim.AdamW as it comes. Loss and gradient norm of both sides must agree before anything is timed
          ddp:  torch.nn.parallel.DistributedDataParallel
Cases     step  one optimizer step, fp32: the tiny SD3 (width 256, 4 blocks) and the width of SD3-medium cut to 4 blocks, 1,024 image tokens
          ddp   two ranks (gloo), the same model and step on both sides, taking turns
Time      sides take turns (A B A B ...); the median ratio of neighbours counts
Memory    step: each side alone in a fresh process, the peak resident set of three steps, everything included. In MiB. Ours has told
          the allocator to return freed blocks, as train.py does; while times are taken that holds for both
Run       python bench_train.py step --threads 2 --batch 1        needs requirements-dev.txt and 12 GB of memory
          python bench_train.py ddp
Check     python -m pytest tests/test_bench_train.py              tiny sizes; asserts agreement, never a time
"""

import argparse
import os
import socket
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.speed import OFFICIAL, MMDiTCase, forget_peak, fresh, peak_mib, take_turns, where, write_mmdit  # noqa: E402
from flow import interpolate  # noqa: E402
from mmdit import MMDiT, MMDiTConfig, new_mmdit  # noqa: E402
from train import DDP, objective, return_freed_memory  # noqa: E402

CASES = {"tiny": MMDiTCase(width=256, context_tokens=72, context_width=192, pooled_width=192, table_side=128), "wide": MMDiTCase()}
LR, WEIGHT_DECAY, CLIP = 1e-6, 1e-4, 1.0
TOLERANCE = 1e-4
ROUNDS = 5


def batch_of(case: MMDiTCase, batch: int) -> tuple[Tensor, ...]:
    """latent, noise, sigma, context, pooled."""
    generator = torch.Generator().manual_seed(1)
    latent, noise = torch.randn(2, batch, 16, case.side, case.side, generator=generator)
    sigma = torch.rand(batch, generator=generator)
    context = torch.randn(batch, case.context_tokens, case.context_width, generator=generator)
    return latent, noise, sigma, context, torch.randn(batch, case.pooled_width, generator=generator)


def finish(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
    """Backward, clip, step; (loss, gradient norm)."""
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return torch.stack((loss.detach(), norm))


def our_step(case: MMDiTCase, folder: str, batch: int) -> Callable[[], Tensor]:
    """The released objective with this project's model and losses."""
    return_freed_memory()  # as train.py does
    model = MMDiT.load(Path(folder) / OFFICIAL)
    latent, noise, sigma, context, pooled = batch_of(case, batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True)

    def step() -> Tensor:
        velocity = model(interpolate(latent, noise, sigma), sigma, context, pooled)
        return finish(model, optimizer, objective("release", velocity, latent, noise, sigma, torch.ones(batch), (1, 1, 1, 1), 0.0))

    return step


def diffusers_step(case: MMDiTCase, folder: str, batch: int) -> Callable[[], Tensor]:
    """The same step as the release writes it."""
    from diffusers import SD3Transformer2DModel
    from pytorch_wavelets import DWTForward

    model, wavelet = SD3Transformer2DModel.from_pretrained(folder).train(), DWTForward(J=1, mode="zero", wave="haar")
    latent, noise, sigma, context, pooled = batch_of(case, batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)

    def bands(z: Tensor) -> Tensor:
        low, (high,) = wavelet(z)
        return torch.cat((low, *high.unbind(2)), dim=1)

    def step() -> Tensor:
        level = sigma[:, None, None, None]
        z = (1 - level) * latent + level * noise
        prediction = model(z, context, pooled, 1000 * sigma, return_dict=False)[0]
        prediction = prediction * -level + z
        return finish(model, optimizer, F.mse_loss(bands(prediction), bands(latent)))

    return step


SIDES = {"ours": our_step, "diffusers": diffusers_step}


def peak_of(build: Callable[..., Callable[[], Tensor]], arguments: tuple, threads: int) -> float:
    """Peak of three steps, loading included. To be called through `fresh`."""
    torch.set_num_threads(threads)
    step = build(*arguments)
    loading = peak_mib("cpu")
    forget_peak("cpu")
    for _ in range(3):
        step()
    return max(loading, peak_mib("cpu"))


def check_agreement(steps: dict[str, Callable[[], Tensor]]) -> float:
    """Largest relative difference of loss and gradient norm; an error if the sides do not compute the same."""
    first, other = (step() for step in steps.values())
    worst = ((first - other).abs() / other.abs()).max().item()
    if not worst <= TOLERANCE:
        raise RuntimeError(f"{' and '.join(steps)} differ by {worst:.1e}, more than {TOLERANCE:.0e}: their times can't be compared")
    return worst


def report(title: str, times: dict[str, list[float]], peaks: dict[str, float] | None, worst: float) -> None:
    """One row a side, then the first side's time and peak over the other's; `peaks` in MiB."""
    first, other = times
    print(f"\n{title}\n{'':12}{'ms/step':>10}" + (f"{'peak MiB':>12}" if peaks else ""))
    for side, values in times.items():
        print(f"{side:12}{statistics.median(values):10.1f}" + (f"{peaks[side]:12.0f}" if peaks else ""))
    ratio = statistics.median(a / b for a, b in zip(times[first], times[other], strict=True))
    print(f"time {first} / {other}: {ratio:.3f}, median of {len(times[first])} neighbouring pairs")
    if peaks:
        print(f"peak {first} / {other}: {peaks[first] / peaks[other]:.3f}")
    print(f"largest relative difference of loss and gradient norm: {worst:.1e}", flush=True)


def bench_step(name: str, case: MMDiTCase, batch: int, threads: int, rounds: int) -> None:
    """Time and memory of a training step on both sides, `batch` pictures each."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        fresh(write_mmdit, case, folder)
        peaks = {side: fresh(peak_of, build, (case, folder, batch), threads) for side, build in SIDES.items()}
        steps = {side: build(case, folder, batch) for side, build in SIDES.items()}
        worst = check_agreement(steps)
        times = take_turns(steps, "cpu", rounds)
    report(f"{name}: training step, {case.depth} blocks of width {case.width}, {case.image_tokens} + {case.context_tokens} tokens, fp32, "
           f"batch {batch}, {where('cpu')}", times, peaks, worst)


# --- two ranks


def ddp_rank(rank: int, ranks: int, port: int, case: MMDiTCase, batch: int, threads: int, rounds: int) -> None:
    """One rank of bench_ddp, `batch` pictures a step; the first one reports."""
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    config = MMDiTConfig(hidden_size=case.width, depth=case.depth, context_dim=case.context_width, pooled_dim=case.pooled_width,
                         table_side=case.table_side, mlp_hidden=4 * case.width)
    latent, noise, sigma, context, pooled = (x[rank::ranks] for x in batch_of(case, batch * ranks))
    ours, theirs = (new_mmdit(config, torch.Generator().manual_seed(0)) for _ in range(2))
    ddp, wrapped = DDP(ours), DistributedDataParallel(theirs)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True) for model in (ours, theirs)]

    def loss_of(model: nn.Module) -> Tensor:
        velocity = model(interpolate(latent, noise, sigma), sigma, context, pooled)
        return objective("paper", velocity, latent, noise, sigma, torch.ones(batch), (1, 1, 1, 1), 0.0)

    def end(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return torch.stack((loss.detach(), norm))

    def our_turn() -> Tensor:
        ddp.zero()
        loss = loss_of(ours)
        loss.backward()
        ddp.wait()
        return end(ours, optimizers[0], loss)

    def their_turn() -> Tensor:
        theirs.zero_grad(set_to_none=True)
        loss = loss_of(wrapped)
        loss.backward()
        return end(theirs, optimizers[1], loss)

    steps = {"ours": our_turn, "torch's": their_turn}
    worst = check_agreement(steps)
    times = take_turns(steps, "cpu", rounds)
    if not rank:
        report(f"DDP: {case.depth} blocks of width {case.width}, {case.image_tokens} tokens, batch {batch} a rank, {ranks} gloo ranks, "
               f"{threads} threads each, {len(ddp.buckets)} buckets", times, None, worst)
    dist.barrier()
    os._exit(0)  # gloo's threads and the interpreter's exit can wait for each other for ever


def bench_ddp(case: MMDiTCase, batch: int, threads: int, rounds: int, ranks: int = 2) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(ddp_rank, (ranks, port, case, batch, threads, rounds), nprocs=ranks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=("step", "ddp"))
    parser.add_argument("--model", choices=tuple(CASES), help="of step (default: both), of ddp (default: tiny)")
    parser.add_argument("--batch", type=int, default=1, help="pictures a step; of ddp a rank (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of step (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed steps a side (default: %(default)s)")
    args = parser.parse_args()
    if args.case == "ddp":
        return bench_ddp(CASES[args.model or "tiny"], args.batch, max(1, (os.cpu_count() or 2) // 2), args.rounds)
    for name in [args.model] if args.model else CASES:
        bench_step(name, CASES[name], args.batch, args.threads, args.rounds)


if __name__ == "__main__":
    sys.exit(main())
