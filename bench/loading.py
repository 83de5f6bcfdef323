"""From a file of several GB to the first velocity, beside diffusers, on the same random weights.

Sides    ours         MMDiT.load: the file is mapped, tensors are used where they lie
         streamed     as sample.py --memory draws: modulations first, then no block resident
         diffusers    SD3Transformer2DModel.from_pretrained, of its own layout
Each     in a fresh process, in turn; the clock runs from before loading to the end of a pass at --res, imports excluded
Files    4.2 GB each, just written, so in the page cache if the memory holds both; in a temporary folder of --folder
Run      python bench/loading.py --threads 2
Check    python -m pytest tests/test_speed.py
"""

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bench.speed import (  # noqa: E402
    CASES,
    OFFICIAL,
    Build,
    Case,
    Step,
    diffusers_transformer,
    fresh,
    inputs_of,
    largest_difference,
    our_transformer,
    peak_mib,
    report,
    where,
    write_transformer,
)
from checkpoint import DTYPES, open_weights  # noqa: E402
from drawing.streaming import hoist, streamed  # noqa: E402
from mmdit import MMDiT, read_config  # noqa: E402

ROUNDS, SD3_DEPTH = 3, 24


def streamed_transformer(case: Case, folder: str, device: str) -> Step:
    weights = open_weights(Path(folder) / OFFICIAL)
    config = read_config(weights)
    model = streamed(lambda: MMDiT(config), weights, device, DTYPES[case.dtype], resident=0)
    latent, sigma, context, pooled = inputs_of(case, device)
    numbers = hoist(model, sigma, pooled, None)
    return lambda: model(latent, sigma, context, numbers)


@torch.inference_mode()
def first_velocity(build: Build, threads: int) -> tuple[float, float, Tensor]:
    """Milliseconds from the file to the first velocity, the process's peak in MiB, the velocity; call it by `fresh`."""
    from diffusers import SD3Transformer2DModel  # noqa: F401  imported by every side, before the clock

    torch.set_num_threads(threads)
    torch.mm(*torch.zeros(2, 64, 64))  # starts the threads
    start = time.perf_counter()
    velocity = build()()
    return (time.perf_counter() - start) * 1000, peak_mib("cpu"), velocity


def bench(case: Case, parent: str | None, threads: int, rounds: int) -> None:
    """Print a row per side: time from the file to the first velocity, peak memory."""
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        fresh(write_transformer, case, folder)
        gb = (Path(folder) / OFFICIAL).stat().st_size / 1e9
        sides = {side: partial(build, case, folder, "cpu") for side, build in (
            ("ours", our_transformer), ("streamed", streamed_transformer), ("diffusers", diffusers_transformer))}
        runs = [{side: fresh(first_velocity, build, threads) for side, build in sides.items()} for _ in range(rounds)]
    torch.set_num_threads(threads)
    worst = largest_difference({side: lambda velocity=run[2]: velocity for side, run in runs[0].items()})
    report(f"SD3: {case.depth} blocks of width {case.width}, a file of {gb:.2f} GB, {case.dtype}, "
           f"{(case.side // 2)**2} tokens, {where('cpu')}", {side: [run[side][0] for run in runs] for side in sides},
           {"peak MiB": {side: f"{max(run[side][1] for run in runs):.0f}" for side in sides}},
           f"largest difference of the velocities: {worst:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    add("--res", type=int, default=256, help="of the pass, px, a multiple of 32 (default: %(default)s)")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: %(default)s)")
    add("--rounds", type=int, default=ROUNDS, help="processes per side (default: %(default)s)")
    add("--folder", metavar="DIR", help="with 9 GB to spare (default: the system's for temporary files)")
    args = parser.parse_args()
    if args.res % 32 or args.res < 32 or args.rounds < 1:
        parser.error(f"--res {args.res} --rounds {args.rounds}: give a multiple of 32, and at least 1 round")
    case = replace(CASES["mmdit"], depth=SD3_DEPTH, side=args.res // 16, dtype="bf16")
    bench(case, args.folder, args.threads, args.rounds)


if __name__ == "__main__":
    main()
