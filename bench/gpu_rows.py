"""What bench/gpu.py measures: each function takes Sizes and returns {figure: value}, or raises.

Weights   random: times and memory do not depend on their values
Seconds   until the device has finished, after one call that loads kernels
Share     FLOP of the matrix products, attention counted in full, per second and per matmul_rate in bf16. Of a training
          step they are those of forward and backward; recomputed activations are not counted
GB        1e9 bytes; allocated and reserved are peaks of torch's allocator
Check     python bench/gpu.py --small
"""

import gc
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from golden import distance, lazy_tensors  # noqa: E402

from checkpoint import LazyTensor, Weights, filled  # noqa: E402
from drawing.streaming import hoist, streamed  # noqa: E402
from family import FLUX_DEV, OFFICIAL_VAE, SD3, Family  # noqa: E402
from flow import euler, even_sigmas, interpolate, loss_weight, velocity_with_cfg  # noqa: E402
from flux import Flux, FluxConfig  # noqa: E402
from layers import blocks_of  # noqa: E402
from machine.memory import device_of, host_memory  # noqa: E402
from machine.ranks import join  # noqa: E402
from mmdit import MMDiT, MMDiTConfig  # noqa: E402
from text import T5Encoder  # noqa: E402
from train import clip, shard  # noqa: E402
from training.logs import matmul_rate  # noqa: E402
from training.model import autocast, build, new_optimizer  # noqa: E402
from training.plan import flop_of_image  # noqa: E402
from training.settings import Settings, parse, settle  # noqa: E402
from vae import VAE, VAEConfig  # noqa: E402
from wavelet import objective  # noqa: E402

BF16, FP32 = torch.bfloat16, torch.float32
GB = 1e9
KERNEL_ERROR = 0.05     # of bf16 attention and its gradients from fp32, as a part of the largest value
TIMED = 3               # calls of which the mean is taken
OFFLOADED_BYTES = 32    # of host memory per parameter: 19 of fp32 state, partly pinned, and room to spare

Figures = dict[str, object]


@dataclass(frozen=True)
class Sizes:
    """What the rows work on: by default the published models at 4096 px."""

    device: str = "cuda"
    sd3: MMDiTConfig = MMDiTConfig()
    flux: FluxConfig = FluxConfig()
    vae: VAEConfig = OFFICIAL_VAE
    t5: tuple = (32128, 4096, 4096, 10240, 24, (32, 64))  # vocabulary, width, inner, MLP, depth, table
    captions: int = 16
    side: int = 256                                       # of the latent, factor 16
    heads: int = 24
    drawn_px: int = 4096                                  # by sample.py, with the embedded model
    trained_px: int = 256                                 # by train.py
    compiler: str = "inductor"


SMALL = Sizes("cpu", MMDiTConfig(128, 2, context_dim=64, pooled_dim=64, table_side=16, mlp_hidden=512),
              FluxConfig(128, 1, 2, 64, context_dim=64, pooled_dim=64, mlp_hidden=512, axes_dim=(8, 28, 28)),
              VAEConfig((32,) * 4, (32,) * 4, 1, 2, 16), (64, 64, 64, 128, 2, (32, 4)), 2, 8, 2, 256, 64, "aot_eager")


@dataclass(frozen=True)
class Published:
    """One of the paper's two models: how it is drawn and trained there."""

    family: Family
    config: str       # its name in Sizes
    tokens: int       # of text
    cfg: float
    guidance: float | None

    @property
    def passes(self) -> int:
        return 1 if self.cfg == 1 else 2

    def of(self, sizes: Sizes) -> MMDiTConfig | FluxConfig:
        return getattr(sizes, self.config)


SD3_2B, FLUX_12B = Published(SD3, "sd3", 154, 7.0, None), Published(FLUX_DEV, "flux", 512, 1.0, 3.5)


# ---- measuring

def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(function: Callable[[], object], device: str, times: int = TIMED) -> float:
    """Mean over `times` calls."""
    wait(device)
    start = time.perf_counter()
    for _ in range(times):
        function()
    wait(device)
    return (time.perf_counter() - start) / times


def forget_peaks(device: str) -> None:
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peaks(device: str, of: str = "") -> Figures:
    if device != "cuda":
        return {}
    return {f"{of}allocated_GB": torch.cuda.max_memory_allocated() / GB,
            f"{of}reserved_GB": torch.cuda.max_memory_reserved() / GB}


def once(name: str, call: Callable[[], object], sizes: Sizes) -> Figures:
    """Seconds of the second call, peaks of both."""
    forget_peaks(sizes.device)
    call()
    return {f"{name}s": seconds_of(call, sizes.device, 1)} | peaks(sizes.device, name)


@cache
def rate(device: str) -> float:
    return matmul_rate(torch.device(device), BF16)


def need_finite(tensor: Tensor) -> None:
    if not tensor.isfinite().all():
        raise RuntimeError("the result holds NaN or Inf")


@contextmanager
def tf32(convolutions: bool, matmuls: bool) -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, matmuls
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


# ---- random weights

def random_weights(make: Callable[[], nn.Module], device: str) -> Weights:
    """Weights of the model that `make` builds, drawn on the device as they are read: matrices keep the variance."""
    with torch.device("meta"):
        state = make().state_dict()

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, device=device)
        return torch.randn(shape, device=device) * (shape[0] / torch.Size(shape).numel()) ** 0.5

    return Weights({name: LazyTensor(tuple(t.shape), partial(draw, name, tuple(t.shape))) for name, t in state.items()},
                   {}, "random weights")


def random_model(make: Callable[[], nn.Module], device: str, dtype: torch.dtype = BF16) -> nn.Module:
    return filled(make, random_weights(make, device), device, dtype).eval().requires_grad_(False)


def transformer_of(which: Published, sizes: Sizes) -> MMDiT | Flux:
    return random_model(lambda: which.family.model(which.of(sizes)), sizes.device)


def conditions(which: Published, sizes: Sizes, batch: int, dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor]:
    """Random context (B, L, C) and pooled (B, P)."""
    config = which.of(sizes)
    return (torch.randn(batch, which.tokens, config.context_dim, device=sizes.device, dtype=dtype),
            torch.randn(batch, config.pooled_dim, device=sizes.device, dtype=dtype))


# ---- attention

KERNELS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
           "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}


def attention(which: Published, head_dim: int, kernel: str, sizes: Sizes) -> Figures:
    """One kernel at the tokens of 4096 px: its time, and the error of output and gradients, of one head, from fp32."""
    tokens = (sizes.side // 2) ** 2 + which.tokens
    heads = 1 if kernel == "math" else sizes.heads  # which writes matrices of tokens x tokens
    q, k, v, upstream = (torch.randn(1, tokens, heads, head_dim, device=sizes.device, dtype=BF16).transpose(1, 2)
                         for _ in range(4))

    def backward(heads: int, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x[:, :heads].to(dtype).detach().requires_grad_() for x in (q, k, v)]
        out = F.scaled_dot_product_attention(*leaves)
        out.backward(upstream[:, :heads].to(dtype))
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    with sdpa_kernel(KERNELS["math"]), tf32(False, False):
        exact = backward(1, FP32)
    with sdpa_kernel(KERNELS[kernel]):
        ours = [x[:, :1].float() for x in backward(heads, BF16)]
        error = max(distance(a, b) / b.abs().max().item() for a, b in zip(ours, exact, strict=True))
        with torch.no_grad():
            forward_s = seconds_of(lambda: F.scaled_dot_product_attention(q, k, v), sizes.device)
        both_s = seconds_of(lambda: backward(heads, BF16), sizes.device)
    if not error <= KERNEL_ERROR:
        raise RuntimeError(f"output or gradients are {error:.1e} of the largest value from fp32")
    return {"tokens": tokens, "heads": heads, "error": error, "forward_ms": 1000 * forward_s,
            "forward_and_backward_ms": 1000 * both_s,
            "forward_TFLOP/s": 4 * heads * tokens**2 * head_dim / forward_s / 1e12}


# ---- table 5: sampling

@torch.inference_mode()
def sampling(which: Published, sizes: Sizes) -> Figures:
    """Euler steps of the transformer in bf16, all weights on the card; then, without it, the decode."""
    model = transformer_of(which, sizes)
    row, latent = euler_steps(which, model, *conditions(which, sizes, 2), sizes)
    del model
    forget_peaks(sizes.device)
    vae = random_model(lambda: VAE(sizes.vae), sizes.device)
    return row | once("decode_", lambda: vae.decode(latent.to(BF16)), sizes)


@torch.inference_mode()
def lean_sampling(which: Published, resident: int | None, fp8: bool, sizes: Sizes) -> Figures:
    """The steps as sample.py makes them: modulations before the loop, blocks streamed from the host or kept in fp8."""
    def make() -> MMDiT | Flux:
        return which.family.model(which.of(sizes))

    shapes = {name: tensor.shape for name, tensor in random_weights(make, "cpu").items()}
    values = torch.randn(max(map(math.prod, shapes.values())), dtype=BF16) / 50  # of every tensor, on the host
    weights = Weights({name: LazyTensor(shape, lambda shape=shape: values[:math.prod(shape)].view(shape))
                       for name, shape in shapes.items()}, {}, "random weights")
    model = streamed(make, weights, sizes.device, BF16, resident, fp8)
    context, pooled = conditions(which, sizes, which.passes)
    guidance = None if which.guidance is None else torch.full((which.passes,), which.guidance, device=sizes.device)
    numbers = hoist(model, even_sigmas(TIMED)[:-1], pooled, guidance)
    return euler_steps(which, model, context, numbers, sizes)[0]


@torch.inference_mode()
def euler_steps(which: Published, model: MMDiT | Flux, context: Tensor, pooled: Tensor,
                sizes: Sizes) -> tuple[Figures, Tensor]:
    """Time and memory of a step, and a latent (1, 16, side, side)."""
    device, side = sizes.device, sizes.side
    velocity = velocity_with_cfg(model, context, pooled, which.cfg, which.guidance)
    noise = torch.randn(1, 16, side, side, device=device)
    forget_peaks(device)
    latent = euler(velocity, noise, even_sigmas(1))
    need_finite(latent)
    s_per_step = seconds_of(lambda: euler(velocity, noise, even_sigmas(TIMED)), device, 1) / TIMED
    flop = which.passes * flop_of_image(which.family.model, which.of(sizes), side, which.tokens) / 3
    return {"s_per_step": s_per_step, "share": flop / s_per_step / rate(device)} | peaks(device), latent


@torch.inference_mode()
def autoencoder(dtype: torch.dtype, sizes: Sizes) -> Figures:
    """Encoding and decoding of one picture at factor 16."""
    vae = random_model(lambda: VAE(sizes.vae), sizes.device, dtype)
    image = torch.randn(1, 3, 16 * sizes.side, 16 * sizes.side, device=sizes.device, dtype=dtype)
    latent = torch.randn(1, 16, sizes.side, sizes.side, device=sizes.device, dtype=dtype)
    return once("encode_", lambda: vae.moments(image), sizes) | once("decode_", lambda: vae.decode(latent), sizes)


@torch.inference_mode()
def t5(sizes: Sizes) -> Figures:
    """A batch of captions of 512 tokens through T5-XXL in bf16, as data.py encode does for Flux."""
    vocabulary, *_ = sizes.t5
    model = random_model(lambda: T5Encoder(*sizes.t5), sizes.device)
    tokens = torch.randint(vocabulary, (sizes.captions, 512), device=sizes.device)
    forget_peaks(sizes.device)
    need_finite(model(tokens))
    return {"captions_per_s": sizes.captions / seconds_of(lambda: model(tokens), sizes.device)} | peaks(sizes.device)


# ---- table 10: training

def blocks_that_fit(config: FluxConfig) -> FluxConfig:
    """As many blocks, two single ones per double one, as the host's memory takes under --offload."""
    with torch.device("meta"):
        one, two = (sum(p.numel() for p in Flux(replace(config, depth=n, depth_single=2 * n)).parameters())
                    for n in (1, 2))
    most = 1 + (host_memory() - OFFLOADED_BYTES * one) // (OFFLOADED_BYTES * (two - one))
    depth = max(1, min(config.depth, config.depth_single // 2, most))
    return replace(config, depth=depth, depth_single=2 * depth)


def training(which: Published, flags: str, sizes: Sizes) -> Figures:
    """A step of train.py with one picture per card: encoding, forward, backward, clipping, AdamW."""
    settings = settle(parse(["--batch=1", f"--res={16 * sizes.side}", f"--device={sizes.device}", "--dtype=bf16",
                             "--activations=recompute", *flags.split()]), which.family)
    device, config = device_of(sizes.device), blocks_that_fit(sizes.flux) if which is FLUX_12B else which.of(sizes)
    join(device, settings.sharded)
    try:
        mesh = init_device_mesh(device.type, (1,)) if settings.sharded else None
        weights = random_weights(lambda: which.family.model(config), sizes.device)
        model = build(settings, which.family, config, weights, device, partial(shard, settings=settings, mesh=mesh))
        row = timed_steps(settings, model, which, sizes)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    flop = flop_of_image(which.family.model, config, sizes.side, which.tokens)
    return {"blocks": len(blocks_of(model)), **row, "share": flop / row["step_s"] / rate(sizes.device)}


def timed_steps(settings: Settings, model: MMDiT | Flux, which: Published, sizes: Sizes) -> Figures:
    """Encoding and a training step, each timed after one that allocates."""
    optimizer, vae = new_optimizer(settings, model), random_model(lambda: VAE(sizes.vae), sizes.device, FP32)
    context, pooled = conditions(which, sizes, 1, FP32)
    noise, sigma = torch.randn(1, 16, sizes.side, sizes.side, device=sizes.device), torch.rand(1, device=sizes.device)
    guidance = None if settings.guidance is None else torch.full_like(sigma, settings.guidance)
    image = torch.rand(1, 3, settings.res, settings.res, device=sizes.device) * 2 - 1

    def step(latent: Tensor) -> None:
        model.zero_grad(set_to_none=True)
        with autocast(settings):
            velocity = model(interpolate(latent, noise, sigma), sigma, context, pooled, guidance)
        loss = objective(settings.objective, velocity, latent, noise, sigma, loss_weight(sigma, settings.weighting),
                         settings.bands, settings.huber)
        loss.backward()
        need_finite(clip(model, settings.clip))
        optimizer.step()

    with torch.no_grad():
        latent = vae.encode(image, settings.factor, settings.dilation)
        encode_s = seconds_of(lambda: vae.encode(image, settings.factor, settings.dilation), sizes.device, 1)
    forget_peaks(sizes.device)
    step(latent)  # allocates the moments
    step_s = seconds_of(lambda: step(latent), sizes.device, 2)
    row = {"images_per_s": 1 / (encode_s + step_s), "step_s": step_s, "encode_s": encode_s} | peaks(sizes.device)
    if settings.offload and sizes.device == "cuda":
        row["pinned_GB"] = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0) / GB
    return row


# ---- compiled blocks, and diffusers

@torch.inference_mode()
def compiled(which: Published, sizes: Sizes) -> Figures:
    """One velocity before and after torch.compile of the blocks."""
    model, inputs = transformer_of(which, sizes), velocity_inputs(which, sizes)
    eager, eager_s = model(*inputs), seconds_of(lambda: model(*inputs), sizes.device)
    for block in blocks_of(model):
        block.compile(backend=sizes.compiler)
    compile_s = seconds_of(lambda: model(*inputs), sizes.device, 1)
    error = distance(model(*inputs), eager) / eager.abs().max().item()
    compiled_s = seconds_of(lambda: model(*inputs), sizes.device)
    return {"eager_s": eager_s, "compiled_s": compiled_s, "compiling_s": compile_s, "difference": error}


def velocity_inputs(which: Published, sizes: Sizes) -> tuple[Tensor | None, ...]:
    """latent, sigma, context, pooled, guidance, as sampling has them."""
    latent = torch.randn(which.passes, 16, sizes.side, sizes.side, device=sizes.device)
    sigma = torch.full((which.passes,), 0.6, device=sizes.device)
    guidance = None if which.guidance is None else torch.full_like(sigma, which.guidance)
    return latent, sigma, *conditions(which, sizes, which.passes), guidance


def diffusers_model(which: Published, config: MMDiTConfig | FluxConfig) -> nn.Module:
    """The peer's transformer of the same sizes, with random weights."""
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel  # a package of requirements-dev.txt

    shared = dict(num_layers=config.depth, joint_attention_dim=config.context_dim,
                  pooled_projection_dim=config.pooled_dim)
    if which is FLUX_12B:
        return FluxTransformer2DModel(
            num_single_layers=config.depth_single, attention_head_dim=config.head_dim, guidance_embeds=True,
            num_attention_heads=config.hidden_size // config.head_dim, axes_dims_rope=config.axes_dim, **shared)
    return SD3Transformer2DModel(
        attention_head_dim=64, num_attention_heads=config.hidden_size // 64, caption_projection_dim=config.hidden_size,
        pos_embed_max_size=config.table_side, out_channels=16, **shared)


@torch.inference_mode()
def beside_diffusers(which: Published, sizes: Sizes) -> Figures:
    """One velocity in bf16 on the same weights: ours, theirs, ours."""
    if not find_spec("diffusers"):
        return {"left_out": "diffusers is not installed"}
    with torch.device(sizes.device):
        theirs = diffusers_model(which, which.of(sizes)).bfloat16().eval()
    weights = lazy_tensors(theirs.state_dict()).with_official_names()
    ours = filled(lambda: which.family.model(which.of(sizes)), weights, sizes.device, BF16)
    inputs = velocity_inputs(which, sizes)
    latent, sigma, context, pooled, guidance = inputs
    latent = latent.to(BF16)
    if which is FLUX_12B:
        rows = torch.arange(sizes.side // 2.0, device=sizes.device)
        image_ids = torch.cartesian_prod(rows[:1], rows, rows)
        packed = rearrange(latent, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
        text_ids = torch.zeros(which.tokens, 3, device=sizes.device)

    def of_theirs() -> Tensor:
        if which is SD3_2B:
            return theirs(latent, context, pooled, 1000 * sigma).sample
        velocity = theirs(packed, context, pooled, sigma, image_ids, text_ids, guidance).sample
        return rearrange(velocity, "b (h w) (c p q) -> b c (h p) (w q)", h=sizes.side // 2, p=2, q=2)

    a, b = ours(*inputs).float(), of_theirs().float()
    times = [seconds_of(side, sizes.device) for side in (lambda: ours(*inputs), of_theirs, lambda: ours(*inputs))]
    return {"ours_s": times[0], "theirs_s": times[1], "ours_again_s": times[2],
            "difference": distance(a, b) / b.abs().max().item()}
