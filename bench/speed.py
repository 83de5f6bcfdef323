"""Speed and memory beside the usual implementation, on the same weights or the same picture, in one run.

Cases     mmdit, flux: diffusers.SD3Transformer2DModel, FluxTransformer2DModel at their real width, a few blocks deep
          vae   last convolution of the factor-16 decoder: sub-pixel phases, the paper's partition, the complete map
          glcm  GLCM Score of a 4096x4096 photograph against the release's loop over scikit-image's functions
          jpeg  its JPEG size at quality 95 against Pillow
Time      sides take turns (A B A B ...), so a slow machine slows all; ratio: median over neighbouring pairs
Share     FLOP of the matrix products / time / the rate of one large matmul measured in between
Memory    MiB, each side alone in a fresh process. Peak: everything, Python and loading included. Forward: what one more
          call adds to what was held before it. CPU: resident set (Linux), GPU: torch's allocator
Run       python bench/speed.py mmdit --threads 2   2 minutes on two cores (flux: 8 GB); needs requirements-dev.txt
          python bench/speed.py flux --res 4096 --dtype bf16                                              one GPU
Check     python -m pytest tests/test_speed.py      the outputs agree before anything is timed
"""

import argparse
import ctypes
import gc
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from checkpoint import DTYPES, save  # noqa: E402
from flux import Flux  # noqa: E402
from machine.memory import peak_memory_gib  # noqa: E402
from mmdit import MMDiT  # noqa: E402
from reading.pictures import read_picture  # noqa: E402
from scores.glcm import LEVELS, PATCH, RADII, glcm_score, gray_levels  # noqa: E402
from scores.jpeg import jpeg_size  # noqa: E402
from training.plan import flop_of_image  # noqa: E402
from vae import enlarged_conv, partitioned_conv  # noqa: E402

TOLERANCE = 1e-4       # of fp32 outputs, without TF32: only the order of summation differs
TOLERANCE_BF16 = 5e-2  # of outputs in bf16, as a part of the largest
ROUNDS, WARM_UP = 7, 2
OFFICIAL = "official.safetensors"

Step = Callable[[], Tensor]   # one call of a side
Build = Callable[[], Step]    # loads a side; pickles: a function of a module, or a partial of one


@dataclass(frozen=True)
class Case:
    """A published transformer at factor 16, cut to a few blocks; batch 1. The defaults are SD3-medium's at 1024 px."""

    model: type[MMDiT] | type[Flux] = MMDiT
    depth: int = 4             # joint blocks of SD3, double blocks of Flux
    depth_single: int = 0      # single blocks of Flux
    width: int = 1536
    heads: int = 24
    side: int = 64             # of the latent; a token is 2x2
    context_tokens: int = 154  # 77 CLIP + 77 T5
    context_width: int = 4096
    pooled_width: int = 2048
    table_side: int = 192      # of SD3's position table, in patches
    dtype: str = "fp32"        # of weights and inputs


CASES = {"mmdit": Case(),
         "flux": Case(Flux, depth=1, depth_single=2, width=3072, context_tokens=512, pooled_width=768)}


# ---- measuring

def fresh(function: Callable, *arguments: object) -> object:
    """Call in a new process, so that no side inherits the other's memory."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_mib(device: str) -> float:
    return 1024 * peak_memory_gib(device)


def forget_peak(device: str) -> None:
    """Lower the peak to what is in use now. Where the system is not Linux, the forward memory is a lower bound."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc keeps freed blocks
            trim(0)
        Path("/proc/self/clear_refs").write_text("5")


@torch.inference_mode()
def memory(build: Build, device: str, threads: int) -> tuple[float, float]:
    """Peak and forward memory of one side, MiB; call it through `fresh`."""
    torch.set_num_threads(threads)
    step = build()
    step()  # weights are mapped and read at first use: this call belongs to loading, the next one is the forward
    loading = peak_mib(device)
    forget_peak(device)
    before = peak_mib(device)
    step()
    return max(loading, peak_mib(device)), peak_mib(device) - before


def take_turns(steps: dict[str, Step], device: str, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every step in every round after the warm-up, each until the device has finished its work."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = {side: [] for side in steps}
    for _ in range(WARM_UP + rounds):
        for side, step in steps.items():
            wait()
            start = time.perf_counter()
            step()
            wait()
            times[side].append((time.perf_counter() - start) * 1000)
    return {side: values[WARM_UP:] for side, values in times.items()}


def largest_difference(steps: dict[str, Step], relative: bool = False) -> float:
    """Largest difference of any output from the first side's; RuntimeError if it is over the tolerance."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # True by default, and not in matrix products
        outputs = [step() for step in steps.values()]
    first, *others = (x.float() for x in outputs)
    worst = torch.stack([(first - x).abs() / (x.abs() if relative else 1) for x in others]).max().item()
    bound = TOLERANCE_BF16 * first.abs().max().item() if outputs[0].dtype == torch.bfloat16 else TOLERANCE
    if not worst <= bound:  # NaN too
        raise RuntimeError(f"{' and '.join(steps)} differ by {worst:.1e}, more than {bound:.0e}: "
                           "their times can't be compared")
    return worst


def report(title: str, times: dict[str, list[float]], columns: dict[str, dict[str, str]], *remarks: str) -> None:
    """Print one row per side, the first side's time over the others', remarks; columns: heading -> side -> cell."""
    print(f"\n{title}\n{'':12}{'ms/step':>10}" + "".join(f"{heading:>16}" for heading in columns))
    for side, values in times.items():
        cells = "".join(f"{column[side]:>16}" for column in columns.values())
        print(f"{side:12}{statistics.median(values):10.1f}{cells}")
    first, *others = times
    for other in others:
        ratio = statistics.median(a / b for a, b in zip(times[first], times[other], strict=True))
        print(f"time {first} / {other}: {ratio:.3f}, median of {len(times[first])} neighbouring pairs")
    print(*remarks, sep="\n", flush=True)


@torch.inference_mode()
def measure(sides: dict[str, Build], device: str, threads: int, rounds: int, beside: dict[str, Step] | None = None
            ) -> tuple[dict[str, list[float]], dict[str, dict[str, str]], str]:
    """Times, memory and agreement of every side, without gradients, as report() prints them; `beside` is timed only."""
    torch.set_num_threads(threads)
    memories = {side: fresh(memory, build, device, threads) for side, build in sides.items()}
    columns = {name: {side: f"{mib[k]:.0f}" for side, mib in memories.items()}
               for k, name in enumerate(("peak MiB", "forward MiB"))}
    steps = {side: build() for side, build in sides.items()}
    remark = f"largest difference of the outputs: {largest_difference(steps):.1e}"
    return take_turns(steps | (beside or {}), device, rounds), columns, remark


def where(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def bench_pixels(title: str, pixels: int, sides: dict[str, Build], device: str, threads: int, rounds: int) -> None:
    """Print time, megapixels per second and memory of every side."""
    times, memories, remark = measure(sides, device, threads, rounds)
    rates = {side: f"{pixels / 1e3 / statistics.median(values):.1f}" for side, values in times.items()}
    report(f"{title}, {where(device)}", times, {"Mpixel/s": rates} | memories, remark)


# ---- the transformers

def inputs_of(case: Case, device: str) -> tuple[Tensor, ...]:
    """latent, sigma, context, pooled; for Flux guidance too. diffusers rounds 1000·sigma and 1000·guidance to bf16:
    these are exact in it."""
    generator = torch.Generator().manual_seed(1)
    shapes = (16, case.side, case.side), (case.context_tokens, case.context_width), (case.pooled_width,)
    latent, context, pooled = (torch.randn(1, *shape, generator=generator) for shape in shapes)
    latent, context, pooled = (x.to(device, DTYPES[case.dtype]) for x in (latent, context, pooled))
    guidance = [torch.tensor([4.0], device=device)] if case.model is Flux else []
    return latent, torch.tensor([0.5], device=device), context, pooled, *guidance


def write_transformer(case: Case, folder: str) -> None:
    """Write the same random weights in both layouts, so that neither side rearranges tensors while loading."""
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel  # a package of requirements-dev.txt

    torch.manual_seed(0)
    shared = dict(num_layers=case.depth, attention_head_dim=case.width // case.heads, num_attention_heads=case.heads,
                  joint_attention_dim=case.context_width, pooled_projection_dim=case.pooled_width)
    if case.model is Flux:
        model = FluxTransformer2DModel(num_single_layers=case.depth_single, guidance_embeds=True, **shared)
    else:
        model = SD3Transformer2DModel(caption_projection_dim=case.width, pos_embed_max_size=case.table_side,
                                      out_channels=16, **shared)
    model.to(DTYPES[case.dtype]).save_pretrained(folder)
    save(Path(folder) / OFFICIAL, case.model.load(folder, dtype=DTYPES[case.dtype]).state_dict(), {})


def our_transformer(case: Case, folder: str, device: str) -> Step:
    model = case.model.load(Path(folder) / OFFICIAL, device, DTYPES[case.dtype])
    inputs = inputs_of(case, device)
    return lambda: model(*inputs)


def diffusers_transformer(case: Case, folder: str, device: str) -> Step:
    """Flux: packing and position ids are made beforehand; only the way back to the latent is in the step."""
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

    latent, sigma, context, pooled, *guidance = inputs_of(case, device)
    if not guidance:
        sd3 = SD3Transformer2DModel.from_pretrained(folder, torch_dtype=latent.dtype).to(device)
        return lambda: sd3(latent, context, pooled, 1000 * sigma).sample
    flux = FluxTransformer2DModel.from_pretrained(folder, torch_dtype=latent.dtype).to(device)
    packed = rearrange(latent, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
    text_ids, side = torch.zeros(case.context_tokens, 3, device=device), torch.arange(case.side // 2.0, device=device)
    image_ids = torch.cartesian_prod(torch.zeros(1, device=device), side, side)

    def step() -> Tensor:
        velocity = flux(packed, context, pooled, sigma, image_ids, text_ids, *guidance).sample
        return rearrange(velocity, "b (h w) (c p q) -> b c (h p) (w q)", h=case.side // 2, p=2, q=2)

    return step


def bench_transformer(case: Case, device: str = "cpu", threads: int = 1, rounds: int = ROUNDS,
                      matmul_side: int = 2048) -> None:
    """A transformer beside diffusers'; the share is of the rate of a square matmul."""
    blocks = f"{case.depth} double and {case.depth_single} single" if case.model is Flux else case.depth
    a, b = torch.randn(2, matmul_side, matmul_side, device=device, dtype=DTYPES[case.dtype])
    with tempfile.TemporaryDirectory() as folder:
        fresh(write_transformer, case, folder)
        config = case.model.load(Path(folder) / OFFICIAL).config
        flop = flop_of_image(case.model, config, case.side, case.context_tokens) / 3  # of the forward pass
        sides = {"ours": partial(our_transformer, case, folder, device),
                 "diffusers": partial(diffusers_transformer, case, folder, device)}
        times, memories, remark = measure(sides, device, threads, rounds, {"matmul": lambda: torch.mm(a, b)})
    rate = 2 * matmul_side**3 / statistics.median(times.pop("matmul"))  # FLOP per ms
    share = {side: f"{flop / statistics.median(values) / rate:.0%}" for side, values in times.items()}
    report(f"{case.model.__name__}: {blocks} blocks of width {case.width}, {(case.side // 2) ** 2} + "
           f"{case.context_tokens} tokens, {flop / 1e9:.1f} GFLOP per step, {case.dtype}, batch 1, {where(device)}\n"
           f"this machine's matmul ({matmul_side} square, {case.dtype}): {rate / 1e6:.1f} GFLOP/s",
           times, {"of matmul rate": share} | memories, remark)


# ---- the last convolution of the decoder

def complete_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)


CONVOLUTIONS = {"sub-pixel": enlarged_conv, "partition": partitioned_conv, "complete map": complete_conv}


def conv_step(name: str, channels: int, side: int, device: str) -> Step:
    generator = torch.Generator().manual_seed(1)
    shapes = (1, channels, side, side), (3, channels, 3, 3), (3,)
    x, weight, bias = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    weight /= 3 * channels**0.5
    return lambda: CONVOLUTIONS[name](x, weight, bias)


def bench_vae(device: str, threads: int, rounds: int = ROUNDS, channels: int = 128, side: int = 512) -> None:
    """Three forms of the last convolution of a published decoder, for a picture of 2·side."""
    sides = {name: partial(conv_step, name, channels, side, device) for name in CONVOLUTIONS}
    bench_pixels(f"last convolution at factor 16: {channels} x {side} x {side} -> 3 x {2 * side} x {2 * side}, fp32, "
                 "batch 1", (2 * side) ** 2, sides, device, threads, rounds)


# ---- the detail metrics, on one photograph

def release_glcm(rgb: np.ndarray, _: int) -> float:
    """The released eval.py's loop, patch by patch; the gray levels are ours."""
    from skimage.feature import graycomatrix  # a package of requirements-dev.txt
    from skimage.measure import shannon_entropy

    gray, angles, entropies = gray_levels(rgb, LEVELS).astype(np.uint8), np.arange(4) * np.pi / 4, []
    for top in range(0, gray.shape[0] - PATCH + 1, PATCH):
        for left in range(0, gray.shape[1] - PATCH + 1, PATCH):
            patch = gray[top:top + PATCH, left:left + PATCH]
            entropies.append(shannon_entropy(graycomatrix(patch, RADII, angles, levels=LEVELS, normed=True)))
    return np.mean(entropies)


def pillow_size(rgb: np.ndarray, _: int) -> int:
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, "JPEG", quality=95)
    return file.tell()


DETAIL = {"glcm": {"ours": lambda rgb, threads: glcm_score(rgb, threads=threads), "release": release_glcm},
          "jpeg": {"ours": lambda rgb, threads: jpeg_size(rgb), "Pillow": pillow_size}}


def detail_step(case: str, side: str, path: str, pixels: int, threads: int) -> Step:
    rgb = np.asarray(ImageOps.fit(read_picture(path), (pixels, pixels), Image.Resampling.LANCZOS))
    return lambda: torch.tensor(DETAIL[case][side](rgb, threads), dtype=torch.float64)


def bench_detail(case: str, path: str, threads: int = 1, rounds: int = ROUNDS, pixels: int = 4096) -> None:
    """A metric beside the usual tool, on the middle of one photograph, scaled to a square of `pixels`."""
    sides = {side: partial(detail_step, case, side, path, pixels, threads) for side in DETAIL[case]}
    bench_pixels(f"{case}: {Path(path).name} at {pixels} x {pixels} px, {sides['ours']()().item():.10g}", pixels**2,
                 sides, "cpu", threads, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    add("case", choices=(*CASES, "vae", *DETAIL))
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu",
        help="of mmdit, flux and vae (default: %(default)s)")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: %(default)s)")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="of mmdit and flux (default: %(default)s)")
    add("--res", type=int, default=1024, help="side of the picture of mmdit and flux, px, a multiple of 32 up to 4096 "
                                              "(default: %(default)s)")
    add("--rounds", type=int, default=ROUNDS, help="timed steps per side (default: %(default)s)")
    add("--picture", metavar="FILE", default=str(ROOT / "examples" / "dandelion_meadow.jpg"),
        help="of glcm and jpeg (default: the example)")
    args = parser.parse_args()
    if args.case in DETAIL:
        bench_detail(args.case, args.picture, args.threads, args.rounds)
    elif args.case == "vae":
        bench_vae(args.device, args.threads, args.rounds)
    else:
        if args.res % 32 or not 32 <= args.res <= 4096:
            parser.error(f"--res {args.res}: give a multiple of 32 up to 4096")
        case = replace(CASES[args.case], dtype=args.dtype, side=args.res // 16)
        bench_transformer(case, args.device, args.threads, args.rounds, 8192 if args.device == "cuda" else 2048)


if __name__ == "__main__":
    main()
