"""How much memory a training run takes, before there is a weight or a GPU: train.py --plan RANKSxGB.

Exact      parameters, gradients, optimizer: from shapes and how they are split over the ranks
Measured   activations and VAE encoding: the training code runs once on tensors without storage (torch's FakeTensorMode)
           while live bytes are counted; an operator's internal workspace is not seen
Counted    gathered weights and reduction buffers, as FSDP2 holds them: weights of the current block, of the next one
           and of its gathering; gradients of two blocks in flight
Assumed    RESERVE for the CUDA context, NCCL and fragmentation; PROCESS for Python and torch on the host
Units      bytes inside, GiB printed; a card of 80 GB is taken as 80 GiB less RESERVE
Check      python -m pytest tests/test_plan.py
"""

import os
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from checkpoint import LazyTensor, Weights, model_folder, open_weights
from family import FLUX_DEV, FLUX_SCHNELL, SD3, Family, family_of, find
from files import read_json
from flow import interpolate, loss_weight
from flux import Flux, FluxConfig
from mmdit import MMDiT, MMDiTConfig
from training.model import blocks_of, make
from training.ranks import from_torchrun
from training.resume import FILE_BYTES
from training.settings import GIB, Machine, Settings, check, settle
from vae import VAE, VAEConfig, read_config
from wavelet import objective

RESERVE, PROCESS = 2 * GIB, 2 * GIB
PICTURES = GIB  # resized pictures that a rank keeps: data.CACHE_BYTES
RANKS_PER_HOST = 8
UNKNOWN = 1 << 60       # bytes of a machine that does not tell
SMALL_MODEL = 100_000_000  # parameters: below this, CPU runs skip the memory check
OFFICIAL_VAE = VAEConfig((128, 256, 512, 512), (128, 256, 512, 512), 2, 3, 16)
PUBLISHED = {  # --model NAME without its folder: family and configuration
    "sd3": (SD3, MMDiTConfig()),
    "sd3.5-medium": (SD3, MMDiTConfig(table_side=384, qk_norm=True, dual_attention=tuple(range(13)))),
    "sd3.5-large": (SD3, MMDiTConfig(hidden_size=2432, depth=38, mlp_hidden=9728, qk_norm=True)),
    "flux": (FLUX_DEV, FluxConfig()),
    "flux-schnell": (FLUX_SCHNELL, FluxConfig(guidance=False))}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live storages other than parameters and gradients; `peak` is the most at one time."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            self.add(tensor.untyped_storage(), 0)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(self.forget)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        return result

    def add(self, storage: torch.UntypedStorage, size: int) -> None:
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.gone, storage._cdata)

    def gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def forget(self, parameter: nn.Parameter) -> None:
        key = parameter.grad.untyped_storage()._cdata
        self.now -= self.sizes[key]
        self.sizes[key] = 0


def peak_bytes(build: Callable[[], nn.Module], run: Callable[[nn.Module], object],
               dtype: torch.dtype = torch.float32) -> int:
    """Most live bytes, beside parameters and gradients, while run(build()) works on tensors without storage.

    dtype   of the parameters
    """
    before = torch.get_default_dtype()
    with FakeTensorMode():
        try:
            torch.set_default_dtype(dtype)
            model = build()
        finally:
            torch.set_default_dtype(before)
        with LiveBytes(model) as live:
            run(model)
    return live.peak


def flop_of_image(model_class: type[MMDiT] | type[Flux], config: MMDiTConfig | FluxConfig, side: int,
                  context_tokens: int) -> int:
    """Floating-point operations of one image in one training step, counted on the meta device, without weights.

    These are the matrix products of forward, three times: backward has two for each of them.

    side   of the latent
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        guided = torch.empty(1) if getattr(config, "guidance", False) else None
        context = torch.empty(1, context_tokens, config.context_dim)
        latent, pooled = torch.empty(1, config.in_channels, side, side), torch.empty(1, config.pooled_dim)
        model_class(config)(latent, torch.empty(1), context, pooled, guided)
    return 3 * counter.get_total_flops()


# ---- what is planned for

def this_machine(device: torch.device, ranks: int) -> Machine:
    if device.type == "cuda":
        return Machine(ranks, torch.cuda.get_device_properties(device).total_memory)
    if not hasattr(os, "sysconf"):  # Windows
        return Machine(ranks, UNKNOWN)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Machine(ranks, memory // from_torchrun("LOCAL_WORLD_SIZE", 1))


def describe(model: str | None, weights: str | None, transformer: str | None) -> tuple[
        Family, MMDiTConfig | FluxConfig, VAEConfig]:
    """Family and configurations of --model or --weights.

    weights  a folder, or a manifest: {"tensors": {name: shape}} as JSON
    model    a folder of models/, or one of PUBLISHED
    """
    if weights and weights.endswith(".json"):
        shapes = read_json(Path(weights)).get("tensors")
        if not isinstance(shapes, dict):
            raise ValueError(f'{weights}: no manifest, which has "tensors": {{name: shape}}; '
                             "give the folder or file of the weights")
        tensors = {name: LazyTensor(tuple(shape), lambda: None) for name, shape in shapes.items()}
        manifest = Weights(tensors, {}, weights)
        family = family_of(manifest)
        return family, family.config(manifest.part("model.diffusion_model.")), OFFICIAL_VAE
    if not weights and model in PUBLISHED and not model_folder(model).is_dir():
        return *PUBLISHED[model], OFFICIAL_VAE
    family, source, vae_path = find(model_folder(model, weights), transformer)
    return (family, family.config(source.part("model.diffusion_model.")),
            read_config(open_weights(vae_path).part("first_stage_model.")))


# ---- the sum

def memory(s: Settings, family: Family, config: MMDiTConfig | FluxConfig, vae_config: VAEConfig,
           ranks: int) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of each kind on one card, and on one host with its ranks."""
    with torch.device("meta"):
        model = family.model(config)
    parameters = list(model.parameters())
    blocks = [sum(p.numel() for p in block.parameters()) for block in blocks_of(model)]
    total_count, largest = sum(p.numel() for p in parameters), max(p.numel() for p in parameters)
    first_rows = sum(-(-len(p) // ranks) * p[0].numel() for p in parameters)  # the first rank has the most
    own = first_rows if s.sharded else total_count
    size = s.state_dtype.itemsize
    compute = 2 if s.dtype == "bf16" else size
    batch, local = s.batch // (ranks * s.accumulate), min(ranks, RANKS_PER_HOST)
    tokens = s.tokens + family.text_tokens(s.t5_length)
    stored_in_bf16 = s.dtype == "bf16" and (s.sharded or s.state == "bf16")
    inputs = len(blocks) * batch * tokens * config.hidden_size * (2 if stored_in_bf16 else 4)  # of all blocks
    gathered = total_count + max(blocks) if s.shard == "zero2" else total_count - sum(blocks) + 3 * max(blocks)
    reduced = max(blocks) * (compute + 8)                              # a block's gradients, two of them in fp32
    rounded = 24 * largest // (ranks if s.sharded else 1)              # fp32 copies of one parameter at a time

    card = {"parameters": own * size, "gradients": own * size, "optimizer": 2 * own * size,
            "averaged weights": 4 * own if s.ema else 0,
            "activations": activation_bytes(s, family, config, ranks) - (inputs if s.activations == "host" else 0),
            "gathered weights": gathered * compute if s.sharded else 0,
            "buffers": (size * sum(b.numel() for b in model.buffers()) + (reduced if s.sharded else 0)
                        + (rounded if s.state == "bf16" else 0)),
            "VAE weights": 4 * vae_parameters(vae_config),
            "VAE encoding": 0 if s.cache_latents else encoding_bytes(vae_config, s.res, s.factor, s.dilation),
            "reserve": 0 if s.device == "cpu" else RESERVE}
    moved = {"offloaded state": ("parameters", "gradients", "optimizer") if s.offload else (),
             "averaged weights": ("averaged weights",) if s.ema_on_host or s.offload else ()}
    host = {name: local * sum(card[row] for row in rows) for name, rows in moved.items()}
    for row in sum(moved.values(), ()):
        card[row] = 0
    host |= {"activations": local * inputs if s.activations == "host" else 0,
             "a checkpoint being written": local * 2 * min(FILE_BYTES, own * size),
             "pictures": local * 2 * PICTURES, "processes": local * PROCESS}
    return card, host


def total(card: dict[str, int]) -> int:
    """Encoding is over when the activations begin."""
    return sum(card.values()) - min(card["activations"], card["VAE encoding"])


def activation_bytes(s: Settings, family: Family, config: MMDiTConfig | FluxConfig, ranks: int) -> int:
    """Peak activation bytes of one forward and backward pass on one rank, measured on fake tensors."""
    batch, side, tokens = s.batch // (ranks * s.accumulate), s.res // s.factor, family.text_tokens(s.t5_length)
    loss, in_bf16 = (s.objective, s.weighting, s.bands, s.huber), s.dtype == "bf16"
    stored = torch.bfloat16 if s.sharded and in_bf16 else s.state_dtype
    autocast = in_bf16 and not s.sharded
    return _rehearse(family, config, batch, side, tokens, s.guidance, loss, s.activations, stored, autocast)


@cache  # most changes that smallest_change() tries leave the activations as they are
def _rehearse(family: Family, config: MMDiTConfig | FluxConfig, batch: int, side: int, tokens: int,
              guidance: float | None, loss: tuple, activations: str, stored: torch.dtype, autocast: bool) -> int:
    def run(model: MMDiT | Flux) -> None:
        name, weighting, bands, huber = loss
        latent, noise = torch.empty(2, batch, config.in_channels, side, side)
        sigma, pooled = torch.empty(batch), torch.empty(batch, config.pooled_dim)
        guidances = None if guidance is None else torch.full_like(sigma, guidance)
        z, context = interpolate(latent, noise, sigma), torch.empty(batch, tokens, config.context_dim)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            velocity = model(z, sigma, context, pooled, guidances)
        objective(name, velocity, latent, noise, sigma, loss_weight(sigma, weighting), bands, huber).backward()

    return peak_bytes(lambda: make(family, config, activations), run, stored)


def vae_parameters(config: VAEConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in VAE(config).parameters())


@cache
def encoding_bytes(config: VAEConfig, res: int, factor: int, dilation: int) -> int:
    """Of one picture, in fp32 and without gradients, as training encodes."""
    def run(vae: VAE) -> None:
        with torch.no_grad():
            vae.moments(torch.empty(1, 3, res, res), factor, dilation)

    return peak_bytes(lambda: VAE(config), run)


# ---- the verdict

def changes(s: Settings, ranks: int) -> list[tuple[str, dict[str, object]]]:
    """Memory-saving changes, cheapest in speed first: flag and settings."""
    options = []
    if s.activations == "keep":
        options.append(("--activations recompute", {"activations": "recompute"}))
    if s.ema and not s.ema_on_host:
        options.append(("--ema-on-host", {"ema_on_host": True}))
    for accumulate in range(s.accumulate + 1, s.batch // ranks + 1):
        if s.batch % (ranks * accumulate) == 0:
            options.append((f"--accumulate {accumulate}", {"accumulate": accumulate}))
    if ranks > 1 and not s.sharded:
        options.append(("--shard zero2", {"shard": "zero2"}))
    if ranks > 1 and s.shard != "zero3":
        options.append(("--shard zero3", {"shard": "zero3"}))
    if s.device != "cpu":
        if not s.offload:
            options.append(("--offload", {"offload": True} | ({} if s.sharded else {"shard": "zero2"})))
        if s.activations != "host":
            options.append(("--activations host", {"activations": "host"}))
    if s.state == "fp32":
        options.append(("--state bf16", {"state": "bf16"}))
    return options


def smallest_change(s: Settings, ranks: int, size: Callable[[Settings], int], room: int) -> str:
    """The first single change that fits, else the changes taken together until they fit, else the remaining advice."""
    options = changes(s, ranks)
    for flag, change in options:
        if size(replace(s, **change)) <= room:
            return f"{flag} makes it fit"
    flags: dict[str, str] = {}  # by its name, so that a later --accumulate replaces the earlier one
    for flag, change in options:
        s, flags = replace(s, **change), flags | {flag.split()[0]: flag}
        if size(s) <= room:
            return f"{' '.join(flags.values())} make it fit"
    return "no flag makes it fit: a smaller --res, or more or larger cards"


def verdict(s: Settings, family: Family, config: MMDiTConfig | FluxConfig, vae_config: VAEConfig,
            machine: Machine) -> tuple[str, str]:
    """The table of a run's memory on a machine, and the smallest change that makes it fit: empty if it fits."""
    def sums(changed: Settings) -> tuple[dict[str, int], dict[str, int]]:
        return memory(changed, family, config, vae_config, machine.ranks)

    def lines(parts: dict[str, int], title: str, last: str) -> list[str]:
        rows = [f"{name:28}{value / GIB:10.2f} GiB" for name, value in parts.items() if value]
        return [*rows, f"{title:28}{last}", ""]

    card, host = sums(s)
    fits = total(card) <= machine.card
    on_host = f"on a host, {min(machine.ranks, RANKS_PER_HOST)} ranks"
    table = lines(card, "on one card", f"{total(card) / GIB:10.2f} GiB of {machine.card / GIB:.0f}")
    table += lines(host, on_host, f"{sum(host.values()) / GIB:10.2f} GiB")
    advice = "" if fits else smallest_change(s, machine.ranks, lambda changed: total(sums(changed)[0]), machine.card)
    return "\n".join([*table, f"it does not fit: {advice}" if advice else "it fits"]), advice


def plan_of(settings: Settings) -> str:
    """train.py --plan RANKSxGB: the table."""
    family, config, vae_config = describe(settings.model, settings.weights, settings.transformer)
    settings = settle(settings, family)
    check(settings, settings.plan.ranks)
    return verdict(settings, family, config, vae_config, settings.plan)[0]


def check_memory(settings: Settings, machine: Machine) -> None:
    """ValueError, after the table is printed, for a run that cannot fit; it names the smallest change that helps."""
    family, config, vae_config = describe(settings.model, settings.weights, settings.transformer)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in family.model(config).parameters())
    if settings.device == "cpu" and parameters < SMALL_MODEL:
        return
    table, advice = verdict(settings, family, config, vae_config, machine)
    if advice:
        print(table, flush=True)
        raise ValueError(f"this run does not fit into memory: {advice}")
