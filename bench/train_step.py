"""A training step beside the same step on diffusers' model, and the hand-written DDP beside torch's, each in one run.

Mirrors   step: the released trainer's step on diffusers.SD3Transformer2DModel: wavelet bands by pytorch_wavelets,
                torch autograd, clip_grad_norm_, torch.optim.AdamW with its defaults
          ddp:  torch.nn.parallel.DistributedDataParallel on two gloo ranks, the same model and step on both sides
Memory    of step: the peak of three steps in a fresh process, loading included, MiB. Ours tells the allocator to return
          freed blocks, as train.py does; while times are taken that holds for both sides
Run       python bench/train_step.py step --threads 2    needs requirements-dev.txt and 12 GB of memory
          python bench/train_step.py ddp
Check     python -m pytest tests/test_train_step.py      loss and gradient norm agree before anything is timed
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import speed  # noqa: E402
from bench.speed import Case, Step  # noqa: E402
from flow import interpolate  # noqa: E402
from machine.memory import return_freed_memory  # noqa: E402
from machine.ranks import leave  # noqa: E402
from mmdit import MMDiT, MMDiTConfig, new_mmdit  # noqa: E402
from train import DDP  # noqa: E402
from wavelet import objective  # noqa: E402

CASES = {"tiny": Case(width=256, heads=4, context_tokens=72, context_width=192, pooled_width=192, table_side=128),
         "wide": Case()}  # 4 blocks, 1,024 image tokens
LR, WEIGHT_DECAY, CLIP = 1e-6, 1e-4, 1.0
ROUNDS = 5
AGREEMENT = "largest relative difference of loss and gradient norm"


def batch_of(case: Case, batch: int) -> tuple[Tensor, ...]:
    """latent, noise, sigma, context, pooled."""
    generator = torch.Generator().manual_seed(1)
    latent, noise = torch.randn(2, batch, 16, case.side, case.side, generator=generator)
    sigma = torch.rand(batch, generator=generator)
    context = torch.randn(batch, case.context_tokens, case.context_width, generator=generator)
    return latent, noise, sigma, context, torch.randn(batch, case.pooled_width, generator=generator)


def our_loss(name: str, model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    latent, noise, sigma, context, pooled = inputs
    velocity = model(interpolate(latent, noise, sigma), sigma, context, pooled)
    return objective(name, velocity, latent, noise, sigma, torch.ones_like(sigma), (1, 1, 1, 1), 0.0)


def step_of(model: nn.Module, loss_of: Callable[[], Tensor], ddp: DDP | None = None, fused: bool | None = True) -> Step:
    """A training step that returns (loss, gradient norm)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=fused)

    def step() -> Tensor:
        (ddp.zero if ddp else model.zero_grad)()
        loss = loss_of()
        loss.backward()
        if ddp:
            ddp.wait()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return torch.stack((loss.detach(), norm))

    return step


def our_step(case: Case, folder: str, batch: int) -> Step:
    return_freed_memory()  # as train.py does
    model, inputs = MMDiT.load(Path(folder) / speed.OFFICIAL), batch_of(case, batch)
    return step_of(model, lambda: our_loss("release", model, inputs))


def diffusers_step(case: Case, folder: str, batch: int) -> Step:
    """The same step as the release writes it."""
    from diffusers import SD3Transformer2DModel
    from pytorch_wavelets import DWTForward

    model, wavelet = SD3Transformer2DModel.from_pretrained(folder).train(), DWTForward(J=1, mode="zero", wave="haar")
    latent, noise, sigma, context, pooled = batch_of(case, batch)

    def bands(z: Tensor) -> Tensor:
        low, (high,) = wavelet(z)
        return torch.cat((low, *high.unbind(2)), dim=1)

    def loss_of() -> Tensor:
        level = sigma[:, None, None, None]
        z = (1 - level) * latent + level * noise
        prediction = model(z, context, pooled, 1000 * sigma, return_dict=False)[0]
        return F.mse_loss(bands(prediction * -level + z), bands(latent))

    return step_of(model, loss_of, fused=None)


def peak_of(build: speed.Build, threads: int) -> float:
    """Peak of three steps in MiB, loading included; call it through `fresh`."""
    torch.set_num_threads(threads)
    step, loading = build(), speed.peak_mib("cpu")
    speed.forget_peak("cpu")
    for _ in range(3):
        step()
    return max(loading, speed.peak_mib("cpu"))


def bench_step(name: str, case: Case, batch: int, threads: int, rounds: int) -> None:
    """A training step of `batch` pictures beside the release's: time and memory."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        speed.fresh(speed.write_transformer, case, folder)
        sides = {"ours": partial(our_step, case, folder, batch),
                 "diffusers": partial(diffusers_step, case, folder, batch)}
        peaks = {side: speed.fresh(peak_of, build, threads) for side, build in sides.items()}
        steps = {side: build() for side, build in sides.items()}
        worst = speed.largest_difference(steps, relative=True)
        times = speed.take_turns(steps, "cpu", rounds)
    speed.report(f"{name}: training step, {case.depth} blocks of width {case.width}, {(case.side // 2) ** 2} + "
                 f"{case.context_tokens} tokens, fp32, batch {batch}, {speed.where('cpu')}",
                 times, {"peak MiB": {side: f"{peak:.0f}" for side, peak in peaks.items()}},
                 f"peak ours / diffusers: {peaks['ours'] / peaks['diffusers']:.3f}", f"{AGREEMENT}: {worst:.1e}")


def ddp_rank(rank: int, ranks: int, meet: str, *sizes: object) -> None:
    """One rank of bench_ddp."""
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=ranks)
    both_ddp(rank, ranks, *sizes)
    leave()


def both_ddp(rank: int, ranks: int, case: Case, batch: int, threads: int, rounds: int) -> None:
    """Take turns between the two, `batch` pictures per step and rank; rank 0 reports."""
    torch.set_num_threads(threads)
    config = MMDiTConfig(hidden_size=case.width, depth=case.depth, context_dim=case.context_width,
                         pooled_dim=case.pooled_width, table_side=case.table_side, mlp_hidden=4 * case.width)
    inputs = tuple(x[rank::ranks] for x in batch_of(case, batch * ranks))
    ours, theirs = (new_mmdit(config, torch.Generator().manual_seed(0)) for _ in range(2))
    ddp, wrapped = DDP(ours), DistributedDataParallel(theirs)
    steps = {"ours": step_of(ours, lambda: our_loss("paper", ours, inputs), ddp),
             "torch's": step_of(theirs, lambda: our_loss("paper", wrapped, inputs))}
    worst = speed.largest_difference(steps, relative=True)
    times = speed.take_turns(steps, "cpu", rounds)
    if not rank:
        speed.report(f"DDP: {case.depth} blocks of width {case.width}, {(case.side // 2) ** 2} tokens, batch {batch} "
                     f"per rank, {ranks} gloo ranks, {threads} threads each, {len(ddp.buckets)} buckets",
                     times, {}, f"{AGREEMENT}: {worst:.1e}")


def bench_ddp(case: Case, batch: int, threads: int, rounds: int, ranks: int = 2) -> None:
    """A training step under the hand-written DDP beside torch's."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(ddp_rank, (ranks, f"{folder}/meet", case, batch, threads, rounds), nprocs=ranks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    add("case", choices=("step", "ddp"))
    add("--model", choices=tuple(CASES), help="(default: both for step, tiny for ddp)")
    add("--batch", type=int, default=1, help="pictures per step; ddp: per rank (default: %(default)s)")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of step (default: %(default)s)")
    add("--rounds", type=int, default=ROUNDS, help="timed steps per side (default: %(default)s)")
    args = parser.parse_args()
    if args.case == "ddp":
        return bench_ddp(CASES[args.model or "tiny"], args.batch, max(1, (os.cpu_count() or 2) // 2), args.rounds)
    for name in [args.model] if args.model else CASES:
        bench_step(name, CASES[name], args.batch, args.threads, args.rounds)


if __name__ == "__main__":
    main()
