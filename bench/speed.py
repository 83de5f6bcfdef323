"""Speed and memory beside diffusers, on the same weights, in one run.

Mirrors   diffusers.SD3Transformer2DModel, FluxTransformer2DModel; the outputs of both sides must agree before anything is timed
Cases     mmdit  the SD3 transformer at its real width, a few blocks deep, against diffusers
          flux   the Flux transformer at its real width, one double and two single blocks, against diffusers
          vae    the last convolution of the factor-16 decoder: sub-pixel phases, the paper's partition, the whole map
          glcm   GLCM Score of a 4096x4096 photograph beside the release's loop over scikit-image's functions
          jpeg   the size of its JPEG at quality 95 beside Pillow
Time      sides take turns (A B A B ...), so a machine that slows down slows both; the median ratio of neighbours counts
Share     floating-point operations of the matrix products / time / the rate of one large matmul measured in between
Memory    each side alone in a fresh process. Peak: everything, loading and Python included. Forward: what a
          forward pass adds to what was held before it. CPU: resident set (Linux), GPU: torch's allocator. In MiB
Run       python bench.py mmdit --threads 2          two minutes on two cores; needs requirements-dev.txt
          python bench.py flux --threads 2           needs 8 GB of memory
          python bench.py vae
          python bench.py glcm --picture PHOTO.jpg
Check     python -m pytest tests/test_bench.py       tiny sizes; asserts agreement, never a time
"""

import argparse
import ctypes
import gc
import io
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from checkpoint import save  # noqa: E402
from data import read_picture  # noqa: E402
from flux import Flux  # noqa: E402
from mmdit import MMDiT  # noqa: E402
from scores.glcm import LEVELS, PATCH, RADII, glcm_score, gray_levels  # noqa: E402
from scores.jpeg import jpeg_size  # noqa: E402
from vae import enlarged_conv, partitioned_conv  # noqa: E402

MIB = 2**20
TOLERANCE = 1e-4  # fp32 on both sides: only the order of summation differs
ROUNDS, WARM_UP = 7, 2
OFFICIAL = "official.safetensors"


@dataclass(frozen=True)
class MMDiTCase:
    """SD3-medium's transformer at 1024 px and factor 16, cut to a few blocks; batch 1."""

    depth: int = 4
    width: int = 1536  # heads of 64, as in every published model
    side: int = 64  # of the latent; a token is 2x2
    context_tokens: int = 154  # 77 CLIP + 77 T5
    context_width: int = 4096
    pooled_width: int = 2048
    table_side: int = 192  # of the position table, in patches

    @property
    def image_tokens(self) -> int:
        return (self.side // 2) ** 2

    @property
    def flop(self) -> int:
        """Of all products over tokens: a multiply and an add are two. Conditioning vectors are left out.

        A block and token: qkv 3D² + projection D² + mlp 8D²; attention: scores and mix, N²D each. The last block's
        context has only its qkv.
        """
        width, image, context = self.width, self.image_tokens, self.context_tokens
        blocks = 12 * self.depth * image + (12 * (self.depth - 1) + 3) * context
        attention = 2 * self.depth * (image + context) ** 2 * width
        ends = 2 * image * 64 * width + context * self.context_width * width  # a patch is 2·2·16 numbers, in and out
        return 2 * (blocks * width**2 + attention + ends)


@dataclass(frozen=True)
class FluxCase:
    """Flux-dev's transformer at 1024 px and factor 16, cut to a few blocks; batch 1."""

    depth: int = 1
    depth_single: int = 2
    width: int = 3072  # heads of 128, as in every published model
    side: int = 64  # of the latent; a token is 2x2
    context_tokens: int = 512  # of T5
    context_width: int = 4096
    pooled_width: int = 768

    @property
    def image_tokens(self) -> int:
        return (self.side // 2) ** 2

    @property
    def flop(self) -> int:
        """As above: 12D² a token in both kinds of block, a double one's in each stream; attention over all tokens."""
        width, tokens, blocks = self.width, self.image_tokens + self.context_tokens, self.depth + self.depth_single
        ends = 2 * self.image_tokens * 64 * width + self.context_tokens * self.context_width * width
        return 2 * (12 * blocks * tokens * width**2 + 2 * blocks * tokens**2 * width + ends)


@dataclass(frozen=True)
class VAECase:
    """The map before the last convolution of the SD3 and Flux decoders, for an image of 2·side pixels; batch 1."""

    channels: int = 128
    side: int = 512


# --- measuring


def fresh(function: Callable, *arguments):
    """Call in a process of its own, so that no side inherits the other's memory."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_mib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (MIB if sys.platform == "darwin" else 1024)


def forget_peak(device: str) -> None:
    """Lower the peak to what is in use now. Where the system is not Linux, the forward increment is a lower bound."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc keeps freed blocks: the forward would hide in them
            trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def memory(build: Callable[..., Callable[[], Tensor]], arguments: tuple, device: str, threads: int) -> tuple[float, float]:
    """(peak, forward) in MiB; `build(*arguments)` loads one side and returns its step. To be called through `fresh`.

    Weights are mapped from their file and read when first used: the first step belongs to loading, the second is the forward.
    """
    torch.set_num_threads(threads)
    with torch.inference_mode():
        step = build(*arguments)
        step()
        loading = peak_mib(device)
        forget_peak(device)
        before = peak_mib(device)
        step()
        return max(loading, peak_mib(device)), peak_mib(device) - before


def milliseconds(step: Callable[[], Tensor], device: str) -> float:
    """Of one call, until the device has done its work."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1000


def take_turns(steps: dict[str, Callable[[], Tensor]], device: str, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every step, one list a side, after warming up."""
    for _ in range(WARM_UP):
        for step in steps.values():
            step()
    times = {side: [] for side in steps}
    for _ in range(rounds):
        for side, step in steps.items():
            times[side].append(milliseconds(step, device))
    return times


def worst_difference(steps: dict[str, Callable[[], Tensor]]) -> float:
    """Largest difference of any side from the first; an error if the sides do not compute the same."""
    first, *others = (step().float() for step in steps.values())
    worst = torch.stack([(first - other).abs().max() for other in others]).max().item()
    if not worst <= TOLERANCE:  # NaN too
        raise RuntimeError(f"{' and '.join(steps)} differ by {worst:.1e}, more than {TOLERANCE:.0e}: their times can't be compared")
    return worst


def report(title: str, times: dict[str, list[float]], memories: dict[str, tuple[float, float]], work: dict[str, str], worst: float) -> None:
    """One row a side. `work` is a column of the case; ratios are the first side's time over the others'."""
    print(f"\n{title}\n{'':12}{'ms/step':>10}{work['']:>16}{'peak MiB':>12}{'forward MiB':>14}")
    for side, values in times.items():
        peak, forward = memories[side]
        print(f"{side:12}{statistics.median(values):10.1f}{work[side]:>16}{peak:12.0f}{forward:14.0f}")
    first, *others = times
    for other in others:
        ratio = statistics.median(a / b for a, b in zip(times[first], times[other], strict=True))
        print(f"time {first} / {other}: {ratio:.3f}, median of {len(times[first])} neighbouring pairs")
    print(f"largest difference of the outputs: {worst:.1e}")


# --- the transformers


def inputs_of(case: MMDiTCase | FluxCase, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(1, 16, case.side, case.side, generator=generator)
    context = torch.randn(1, case.context_tokens, case.context_width, generator=generator)
    pooled = torch.randn(1, case.pooled_width, generator=generator)
    return tuple(x.to(device) for x in (latent, torch.tensor([0.6]), context, pooled))


def write_mmdit(case: MMDiTCase, folder: str) -> None:
    """The same random weights in both layouts, so that neither side rearranges tensors while loading."""
    from diffusers import SD3Transformer2DModel  # a package of requirements-dev.txt

    torch.manual_seed(0)
    SD3Transformer2DModel(
        num_layers=case.depth,
        attention_head_dim=64,
        num_attention_heads=case.width // 64,
        caption_projection_dim=case.width,
        joint_attention_dim=case.context_width,
        pooled_projection_dim=case.pooled_width,
        pos_embed_max_size=case.table_side,
        out_channels=16,
    ).save_pretrained(folder)
    save(Path(folder) / OFFICIAL, MMDiT.load(folder).state_dict(), {})


def our_mmdit(case: MMDiTCase, folder: str, device: str) -> Callable[[], Tensor]:
    model = MMDiT.load(Path(folder) / OFFICIAL, device=device)
    inputs = inputs_of(case, device)
    return lambda: model(*inputs)


def diffusers_mmdit(case: MMDiTCase, folder: str, device: str) -> Callable[[], Tensor]:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel.from_pretrained(folder).to(device)
    latent, sigma, context, pooled = inputs_of(case, device)
    return lambda: model(latent, context, pooled, 1000 * sigma).sample


def write_flux(case: FluxCase, folder: str) -> None:
    """As write_mmdit."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    FluxTransformer2DModel(
        num_layers=case.depth,
        num_single_layers=case.depth_single,
        attention_head_dim=128,
        num_attention_heads=case.width // 128,
        joint_attention_dim=case.context_width,
        pooled_projection_dim=case.pooled_width,
        guidance_embeds=True,
    ).save_pretrained(folder)
    save(Path(folder) / OFFICIAL, Flux.load(folder).state_dict(), {})


def our_flux(case: FluxCase, folder: str, device: str) -> Callable[[], Tensor]:
    model = Flux.load(Path(folder) / OFFICIAL, device=device)
    inputs, guidance = inputs_of(case, device), torch.tensor([3.5], device=device)
    return lambda: model(*inputs, guidance)


def diffusers_flux(case: FluxCase, folder: str, device: str) -> Callable[[], Tensor]:
    """Packing and position ids are made beforehand; only the way back to the latent is in the step."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel.from_pretrained(folder).to(device)
    latent, sigma, context, pooled = inputs_of(case, device)
    packed = rearrange(latent, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
    text_ids, side = torch.zeros(case.context_tokens, 3, device=device), torch.arange(case.side // 2.0, device=device)
    image_ids = torch.cartesian_prod(torch.zeros(1, device=device), side, side)
    guidance = torch.tensor([3.5], device=device)

    def step() -> Tensor:
        velocity = model(packed, context, pooled, sigma, image_ids, text_ids, guidance).sample
        return rearrange(velocity, "b (h w) (c p q) -> b c (h p) (w q)", h=case.side // 2, p=2, q=2)

    return step


@torch.inference_mode()
def bench_transformer(case: MMDiTCase | FluxCase, device: str = "cpu", threads: int = 1, rounds: int = ROUNDS,
                      matmul_side: int = 2048) -> None:
    """Time, matmul share and memory of a transformer beside diffusers'; the matmul is of matmul_side², in turn with the steps."""
    torch.set_num_threads(threads)
    name, blocks, write, builders = "MMDiT", f"{case.depth} blocks", write_mmdit, {"ours": our_mmdit, "diffusers": diffusers_mmdit}
    if isinstance(case, FluxCase):
        name, blocks = "Flux", f"{case.depth} double and {case.depth_single} single blocks"
        write, builders = write_flux, {"ours": our_flux, "diffusers": diffusers_flux}
    with tempfile.TemporaryDirectory() as folder:
        arguments = (case, folder, device)
        fresh(write, case, folder)
        memories = {side: fresh(memory, build, arguments, device, threads) for side, build in builders.items()}
        steps = {side: build(*arguments) for side, build in builders.items()}
        worst = worst_difference(steps)
        a, b = torch.randn(2, matmul_side, matmul_side, device=device)
        times = take_turns(steps | {"matmul": lambda: torch.mm(a, b)}, device, rounds)
    rate = 2 * matmul_side**3 / statistics.median(times.pop("matmul"))  # FLOP per ms
    share = {side: f"{case.flop / statistics.median(values) / rate:.0%}" for side, values in times.items()}
    title = (
        f"{name}: {blocks} of width {case.width}, {case.image_tokens} + {case.context_tokens} tokens, "
        f"{case.flop / 1e9:.1f} GFLOP a step, fp32, batch 1, {where(device)}\n"
        f"this machine's matmul ({matmul_side} square, fp32): {rate / 1e6:.1f} GFLOP/s"
    )
    report(title, times, memories, share | {"": "of matmul rate"}, worst)


# --- the last convolution of the decoder


def whole_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What both others stand for: enlarge the whole map, then convolve."""
    return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)


CONVOLUTIONS = {"sub-pixel": enlarged_conv, "partition": partitioned_conv, "whole map": whole_conv}


def conv_step(side: str, case: VAECase, device: str) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, case.channels, case.side, case.side, generator=generator).to(device)
    weight = torch.randn(3, case.channels, 3, 3, generator=generator).to(device) / (3 * case.channels**0.5)
    bias = torch.randn(3, generator=generator).to(device)
    return lambda: CONVOLUTIONS[side](x, weight, bias)


@torch.inference_mode()
def bench_vae(case: VAECase, device: str = "cpu", threads: int = 1, rounds: int = ROUNDS) -> None:
    """Time and memory of the three forms of the decoder's last convolution."""
    torch.set_num_threads(threads)
    memories = {side: fresh(memory, conv_step, (side, case, device), device, threads) for side in CONVOLUTIONS}
    steps = {side: conv_step(side, case, device) for side in CONVOLUTIONS}
    worst = worst_difference(steps)
    times = take_turns(steps, device, rounds)
    rate = {side: f"{(2 * case.side) ** 2 / 1e3 / statistics.median(values):.1f}" for side, values in times.items()}
    title = (
        f"last convolution at factor 16: {case.channels} x {case.side} x {case.side} -> 3 x {2 * case.side} x {2 * case.side}, "
        f"fp32, batch 1, {where(device)}"
    )
    report(title, times, memories, rate | {"": "Mpixel/s"}, worst)


# --- the detail metrics, on one photograph

def photograph(path: str, side: int) -> np.ndarray:
    """(side, side, 3) uint8: the middle of a picture, scaled where it must be."""
    return np.asarray(ImageOps.fit(read_picture(path), (side, side), Image.Resampling.LANCZOS))


def release_glcm(rgb: np.ndarray) -> float:
    """The released eval.py's loop, patch by patch; the gray levels are ours."""
    from skimage.feature import graycomatrix  # a package of requirements-dev.txt
    from skimage.measure import shannon_entropy

    gray, found = gray_levels(rgb, LEVELS).astype(np.uint8), []
    for top in range(0, gray.shape[0] - PATCH + 1, PATCH):
        for left in range(0, gray.shape[1] - PATCH + 1, PATCH):
            patch = gray[top : top + PATCH, left : left + PATCH]
            found.append(shannon_entropy(graycomatrix(patch, RADII, np.arange(4) * np.pi / 4, levels=LEVELS, normed=True)))
    return np.mean(found)


def pillow_size(rgb: np.ndarray) -> int:
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, "JPEG", quality=95)
    return file.tell()


DETAIL = {
    "glcm": {"ours": lambda rgb, threads: glcm_score(rgb, threads=threads), "release": lambda rgb, threads: release_glcm(rgb)},
    "jpeg": {"ours": lambda rgb, threads: jpeg_size(rgb), "Pillow": lambda rgb, threads: pillow_size(rgb)},
}


def detail_step(case: str, side: str, path: str, pixels: int, threads: int) -> Callable[[], Tensor]:
    rgb, measure = photograph(path, pixels), DETAIL[case][side]
    return lambda: torch.tensor(measure(rgb, threads), dtype=torch.float64)


def bench_detail(case: str, path: str, threads: int = 1, rounds: int = ROUNDS, pixels: int = 4096) -> None:
    """Time and memory of a metric of one photograph, scaled to a square of `pixels`, beside what a user would take instead."""
    arguments = {side: (case, side, path, pixels, threads) for side in DETAIL[case]}
    memories = {side: fresh(memory, detail_step, of, "cpu", threads) for side, of in arguments.items()}
    steps = {side: detail_step(*of) for side, of in arguments.items()}
    worst = worst_difference(steps)
    times = take_turns(steps, "cpu", rounds)
    rate = {side: f"{pixels**2 / 1e3 / statistics.median(values):.1f}" for side, values in times.items()}
    title = f"{case}: {Path(path).name} at {pixels} x {pixels} px, {next(iter(steps.values()))().item():.10g}, CPU, {threads} threads"
    report(title, times, memories, rate | {"": "Mpixel/s"}, worst)


def where(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=("mmdit", "flux", "vae", *DETAIL))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed steps a side (default: %(default)s)")
    parser.add_argument("--picture", default=str(Path(__file__).parent / "examples" / "dandelion_meadow.jpg"),
                        help="of glcm and jpeg (default: the example)")
    args = parser.parse_args()
    if args.case in DETAIL:
        bench_detail(args.case, args.picture, args.threads, args.rounds)
    elif args.case == "vae":
        bench_vae(VAECase(), args.device, args.threads, args.rounds)
    else:
        bench_transformer(MMDiTCase() if args.case == "mmdit" else FluxCase(), args.device, args.threads, args.rounds)


if __name__ == "__main__":
    main()
