"""How much memory a training run takes, before there is a weight or a GPU: train.py --plan RANKSxGB.

Exact      parameters, gradients, optimizer: from shapes and how they are split over the ranks
Measured   activations, VAE encoding, sample decoding: the code runs once on tensors without storage (torch's
           FakeTensorMode) while live bytes are counted
Counted    gathered weights and reduction buffers, as FSDP2 holds them: weights of the current block, of the next one
           and of its gathering; gradients of two blocks in flight
Host       pinned memory comes in powers of two, one block per tensor: FSDP's shards and gradients under --offload, the
           inputs of blocks under --activations host
Assumed    RESERVE for the CUDA context, NCCL and fragmentation; PROCESS for Python, torch and pictures being decoded;
           a convolution copies its input and output into the layout of its kernel
Units      bytes inside, GiB printed; a card of 80 GB is taken as 80 GiB less RESERVE
Check      python -m pytest tests/test_plan.py
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from checkpoint import DTYPES
from family import FLUX_DEV, SD3, Family, describe
from files import from_torchrun
from flow import interpolate, loss_weight
from flux import Flux, FluxConfig
from layers import blocks_of
from machine.memory import (
    GIB,
    SMALL_MODEL,
    T5_WIDTH,
    UNKNOWN,
    decoding_bytes,
    encoding_bytes,
    host_memory,
    peak_bytes,
    vae_parameters,
)
from mmdit import MMDiT, MMDiTConfig
from training.adapter import attach, state_of, trained
from training.model import make
from training.resume import FILE_BYTES
from training.settings import Machine, Settings, check, settle
from vae import VAEConfig
from wavelet import objective

RESERVE, PROCESS = 2 * GIB, 2 * GIB
PICTURES = GIB  # resized pictures that a rank keeps: data.CACHE_BYTES
PHASES = "activations", "VAE encoding", "sample decoding"  # never two at a time
AT_FIRST = "parameters", "averaged weights", "buffers", "VAE weights", "text encoders", "reserve"  # before step 1
TEXT_PARAMETERS = {SD3.text: 5_581_000_000, FLUX_DEV.text: 4_885_000_000}  # T5-XXL and the family's CLIPs


def flop_of_image(model_class: type[MMDiT] | type[Flux], config: MMDiTConfig | FluxConfig, side: int,
                  context_tokens: int, adapter: bool = False) -> int:
    """Floating-point operations of one image in one training step, counted on the meta device, without weights.

    These are the matrix products of forward, three times: backward has two for each of them.

    side     of the latent
    adapter  only one is trained: backward has one product for each of them
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        guided = torch.empty(1) if getattr(config, "guidance", False) else None
        context = torch.empty(1, context_tokens, config.context_dim)
        latent, pooled = torch.empty(1, config.in_channels, side, side), torch.empty(1, config.pooled_dim)
        model_class(config)(latent, torch.empty(1), context, pooled, guided)
    return (2 if adapter else 3) * counter.get_total_flops()


# ---- what is planned for

def this_machine(device: torch.device, ranks: int) -> Machine:
    host, per_host = host_memory(), from_torchrun("LOCAL_WORLD_SIZE", 1)
    card = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else host // per_host
    return Machine(ranks, card, host, per_host)


# ---- the sum

def memory(s: Settings, family: Family, config: MMDiTConfig | FluxConfig, vae_config: VAEConfig,
           machine: Machine) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of each kind on one card, and on one host with its ranks."""
    ranks, local = machine.ranks, min(machine.ranks, machine.ranks_per_host)
    with torch.device("meta"):
        model = family.model(config)
    parameters = list(model.parameters())
    blocks = [sum(p.numel() for p in block.parameters()) for block in blocks_of(model)]
    total_count, largest = sum(p.numel() for p in parameters), max(p.numel() for p in parameters)
    shares = [-(-len(p) // ranks) * p[0].numel() if s.sharded else p.numel() for p in parameters]  # of the first rank
    own = learned = sum(shares)
    size, state, adapter = s.weight_dtype.itemsize, s.state_dtype.itemsize, 0
    buffers = size * sum(b.numel() for b in model.buffers())
    if s.lora:                                                         # every rank holds the complete adapter
        attach(model, s.lora, s.lora_init == "minor", "meta", s.state_dtype)
        learned, largest = (of(p.numel() for p in trained(model).values()) for of in (sum, max))
        adapter = sum(t.nbytes for t in state_of(model).values())
    compute = 2 if s.dtype == "bf16" else size
    batch = s.batch * s.sequence // (ranks * s.accumulate)
    stored_in_bf16 = s.dtype == "bf16" and (s.sharded or s.weight_dtype == torch.bfloat16)
    width = batch * config.hidden_size * (2 if stored_in_bf16 else 4)
    tokens = s.tokens, family.text_tokens(s.t5_length)                 # of image and text, shared with --sequence
    inputs = [-(-n // s.sequence) * width for n in tokens] * len(blocks)
    gathered = total_count + max(blocks)
    if s.shard == "zero3":                                             # this block, the next, its gathering
        gathered = total_count - sum(blocks) + 3 * max(blocks)
    reduced = 0 if s.lora else max(blocks) * (compute + 8)             # a block's gradients, two of them in fp32
    vae_dtype = DTYPES[s.vae_dtype]
    encoding = vae_config, vae_dtype, s.res, s.res, s.factor
    text_encoders = TEXT_PARAMETERS[family.text] if config.context_dim == T5_WIDTH else 0
    text_encoders *= 4 if s.device == "cpu" else 2
    rounded = 24 * largest // (ranks if s.sharded and not s.lora else 1)  # fp32 copies of one parameter at a time

    card = {"parameters": own * size, "adapter": adapter, "gradients": learned * state,
            "optimizer": 2 * learned * state, "averaged weights": 4 * learned if s.ema else 0,
            "activations": activation_bytes(s, family, config, ranks) - (sum(inputs) if s.activations == "host" else 0),
            "gathered weights": gathered * compute if s.sharded else 0,
            "buffers": buffers + (reduced if s.sharded else 0) + (rounded if s.state == "bf16" else 0),
            "VAE weights": vae_dtype.itemsize * vae_parameters(vae_config),
            "VAE encoding": encoding_bytes(*encoding, s.dilation),  # of cached latents too, before the first step
            "sample decoding": decoding_bytes(*encoding) if s.sample_every else 0,
            "text encoders": text_encoders,
            "reserve": 0 if s.device == "cpu" else RESERVE}
    offloaded = ("parameters",) if s.lora else ("parameters", "gradients", "optimizer")
    moved = {"offloaded state": offloaded if s.offload else (),
             "averaged weights": ("averaged weights",) if s.ema_on_host or s.offload and not s.lora else ()}
    host = {name: sum(card[row] for row in rows) for name, rows in moved.items()}
    for row in sum(moved.values(), ()):
        card[row] = 0
    if s.offload:  # weights and gradients are pinned, moments are not
        host["rounded up by pinning"] = (1 if s.lora else 2) * (pinned(size * n for n in shares) - own * size)
    crops = 0 if s.cache_latents else 2 * 3 * s.res**2 * batch * s.accumulate  # bytes, of two steps
    host |= {"activations": pinned(inputs) if s.activations == "host" else 0,
             "a checkpoint being written": 2 * min(FILE_BYTES, adapter or own * size),
             "pictures": PICTURES * (1 + bool(s.validate)) + crops,
             "processes": PROCESS, "the ranks' work, as above": total(card) if s.device == "cpu" else 0}
    return card, {name: local * value for name, value in host.items()}


def pinned(sizes: Iterable[int]) -> int:
    """Bytes of tensors in pinned memory: its allocator rounds each up to a power of two."""
    return sum(1 << (size - 1).bit_length() for size in sizes if size)


def total(card: dict[str, int]) -> int:
    """The most at one time: in training, or before it, while the text encoders live."""
    phases = [card[row] for row in PHASES]
    training = sum(card.values()) - card["text encoders"] - sum(phases) + max(phases)
    return max(training, sum(card[row] for row in AT_FIRST))


def activation_bytes(s: Settings, family: Family, config: MMDiTConfig | FluxConfig, ranks: int) -> int:
    """Peak activation bytes of one forward and backward pass on one rank, measured on fake tensors."""
    batch, side = s.batch * s.sequence // (ranks * s.accumulate), s.res // s.factor
    shape, tokens = (side, 2 * -(-side // (2 * s.sequence))), -(-family.text_tokens(s.t5_length) // s.sequence)
    loss, in_bf16 = (s.objective, s.weighting, s.bands, s.huber), s.dtype == "bf16"
    stored = torch.bfloat16 if s.sharded and in_bf16 else s.weight_dtype
    autocast = in_bf16 and not s.sharded and s.weight_dtype == torch.float32
    adapter = s.lora and (s.lora, s.lora_init == "minor", "cpu", s.state_dtype)
    return _rehearse(family, config, batch, shape, tokens, s.guidance, loss, s.activations, stored, autocast, adapter)


@cache  # most changes that smallest_change() tries leave the activations as they are
def _rehearse(family: Family, config: MMDiTConfig | FluxConfig, batch: int, shape: tuple[int, int], tokens: int,
              guidance: float | None, loss: tuple, activations: str, stored: torch.dtype, autocast: bool,
              adapter: tuple | None) -> int:
    def built() -> MMDiT | Flux:
        model = make(family, config, activations)
        if adapter:
            attach(model, *adapter)
        return model

    def run(model: MMDiT | Flux) -> None:
        name, weighting, bands, huber = loss
        latent, noise = torch.empty(2, batch, config.in_channels, *shape)
        sigma, pooled = torch.empty(batch), torch.empty(batch, config.pooled_dim)
        guidances = None if guidance is None else torch.ones_like(sigma)
        z, context = interpolate(latent, noise, sigma), torch.empty(batch, tokens, config.context_dim)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            velocity = model(z, sigma, context, pooled, guidances)
        objective(name, velocity, latent, noise, sigma, loss_weight(sigma, weighting), bands, huber).backward()

    return peak_bytes(built, run, stored)


# ---- the verdict

def changes(s: Settings, ranks: int) -> list[tuple[str, dict[str, object]]]:
    """Memory-saving changes, cheapest in speed first: flag and settings."""
    options = []
    if s.activations == "keep":
        options.append(("--activations recompute", {"activations": "recompute"}))
    if s.ema and not s.ema_on_host:
        options.append(("--ema-on-host", {"ema_on_host": True}))
    groups = ranks // s.sequence
    for accumulate in range(s.accumulate + 1, s.batch // groups + 1):
        if s.batch % (groups * accumulate) == 0:
            options.append((f"--accumulate {accumulate}", {"accumulate": accumulate}))
    if ranks > 1 and not s.sharded:
        options.append(("--shard zero2", {"shard": "zero2"}))
    if ranks > 1 and s.shard != "zero3":
        options.append(("--shard zero3", {"shard": "zero3"}))
    if s.device != "cpu":
        if not s.offload:
            mode = s.shard if s.sharded else "zero3" if ranks > 1 else "zero2"
            options.append((f"--shard {mode} --offload" if mode != s.shard else "--offload",
                            {"offload": True, "shard": mode}))
        if s.activations != "host":
            options.append(("--activations host", {"activations": "host"}))
    if s.offload:  # the host may lack what a card has
        options.append(("no --offload", {"offload": False}))
    if s.activations == "host":
        options.append(("--activations recompute", {"activations": "recompute"}))
    if s.state == "fp32":
        options.append(("--state bf16" + " without --offload" * s.offload, {"state": "bf16", "offload": False}))
    return options


def smallest_change(s: Settings, ranks: int, fits: Callable[[Settings], bool]) -> str:
    """The first single change that fits, else the changes taken together until they fit, else the remaining advice."""
    options = changes(s, ranks)
    for flag, change in options:
        if fits(replace(s, **change)):
            return f"{flag} makes it fit"
    flags: dict[str, str] = {}  # by its name, so that a later --accumulate replaces the earlier one
    for flag, change in options:
        s, flags = replace(s, **change), flags | {flag.split()[0]: flag}
        if not s.offload:
            flags = {name: flag.replace(" --offload", "") for name, flag in flags.items() if name != "--offload"}
        if fits(s):
            return f"{' '.join(flags.values())} make it fit"
    return "no flag makes it fit: a smaller --res, or more or larger cards and hosts"


def verdict(s: Settings, family: Family, config: MMDiTConfig | FluxConfig, vae_config: VAEConfig,
            machine: Machine) -> tuple[str, str]:
    """The table of a run's memory on a machine, and the smallest change that makes it fit: empty if it fits."""
    def sums(changed: Settings) -> tuple[dict[str, int], dict[str, int]]:
        return memory(changed, family, config, vae_config, machine)

    def fits(changed: Settings) -> bool:
        card, host = sums(changed)
        return total(card) <= machine.card and sum(host.values()) <= machine.host

    def lines(parts: dict[str, int], title: str, last: str) -> list[str]:
        rows = [f"{name:28}{value / GIB:10.2f} GiB" for name, value in parts.items() if value]
        return [*rows, f"{title:28}{last}", ""]

    card, host = sums(s)
    on_host = f"on a host, {min(machine.ranks, machine.ranks_per_host)} ranks"
    of_host = "" if machine.host == UNKNOWN else f" of {machine.host / GIB:.0f}"
    table = lines(card, "on one card", f"{total(card) / GIB:10.2f} GiB of {machine.card / GIB:.0f}")
    table += lines(host, on_host, f"{sum(host.values()) / GIB:10.2f} GiB{of_host}")
    advice = "" if fits(s) else smallest_change(s, machine.ranks, fits)
    return "\n".join([*table, f"it does not fit: {advice}" if advice else "it fits"]), advice


def plan_of(settings: Settings) -> str:
    """train.py --plan RANKSxGB[:HOSTGB]: the table."""
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
