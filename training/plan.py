"""How much memory a training run takes, before there is a weight or a GPU: train.py --plan RANKSxGB.

Exact      parameters, gradients, optimizer: from the shapes and how they are cut among the ranks
Measured   activations and VAE encoding: the code that trains runs once on tensors without storage (torch's FakeTensorMode) while the
           bytes alive are counted; what an operator takes for itself and gives back is not seen
Counted    gathered weights and reduction buffers, as FSDP2 holds them: weights of the block at work, of the next one and of its
           gathering; gradients of two blocks on their way
Assumed    RESERVE for the CUDA context, NCCL and fragmentation; PROCESS for Python and torch on the host
Units      bytes inside, GiB printed; a card of 80 GB is taken as 80 GiB less RESERVE
Check      python -m pytest tests/test_plan.py
"""

import argparse
import copy
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from checkpoint import LazyTensor, Weights, model_folder, open_weights, read_json
from data import CACHE_BYTES
from family import FLUX_DEV, FLUX_SCHNELL, SD3, Family, family_of, find
from flux import Flux, FluxConfig
from mmdit import MMDiT, MMDiTConfig
from training.resume import FILE_BYTES
from vae import NORM_GROUPS, VAE, VAEConfig

GIB = 1 << 30
RESERVE, PROCESS = 2 * GIB, 2 * GIB
RANKS_A_HOST = 8
OFFICIAL_VAE = VAEConfig((128, 256, 512, 512), (128, 256, 512, 512), 2, 3, 16)
PUBLISHED = {  # --model NAME without its folder: family and configuration
    "sd3": (SD3, MMDiTConfig()),
    "sd3.5-medium": (SD3, MMDiTConfig(table_side=384, qk_norm=True, dual_attention=tuple(range(13)))),
    "sd3.5-large": (SD3, MMDiTConfig(hidden_size=2432, depth=38, mlp_hidden=9728, qk_norm=True)),
    "flux": (FLUX_DEV, FluxConfig()),
    "flux-schnell": (FLUX_SCHNELL, FluxConfig(guidance=False))}
CLIP_TOKENS, SD3_T5_TOKENS, FLUX_T5_TOKENS = 77, 77, 512


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages alive, parameters and gradients left out; `peak` is the most there were at once."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            self.note(tensor.untyped_storage(), 0)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(self.forget)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.note(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        return result

    def note(self, storage: torch.UntypedStorage, size: int) -> None:
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


def peak_bytes(build: Callable[[], nn.Module], run: Callable[[nn.Module], object], dtype: torch.dtype = torch.float32) -> int:
    """Most bytes alive at once, beside parameters and gradients, while run(build()) works on tensors without storage.

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


def flop_of_image(model_class: type[MMDiT] | type[Flux], config: MMDiTConfig | FluxConfig, side: int, context_tokens: int) -> int:
    """Floating-point operations of one image in one training step: the matrix products of forward, three times, since backward has two
    for each of them. Counted on the meta device, without weights.

    side   of the latent
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        guided = torch.empty(1) if getattr(config, "guidance", False) else None
        model_class(config)(torch.empty(1, config.in_channels, side, side), torch.empty(1),
                            torch.empty(1, context_tokens, config.context_dim), torch.empty(1, config.pooled_dim), guided)
    return 3 * counter.get_total_flops()


# ---- what is planned for

@dataclass(frozen=True)
class Machine:
    """So many processes, each with a card of so many bytes (or its share of the host's memory, on CPUs)."""

    ranks: int
    card: int

    @classmethod
    def parse(cls, text: str) -> "Machine":
        ranks, _, gib = text.partition("x")
        if not ranks.isdigit() or not int(ranks) or not gib.replace(".", "", 1).isdigit():
            raise argparse.ArgumentTypeError(f"{text!r}: RANKSxGB, such as 8x80")
        return cls(int(ranks), round(float(gib) * GIB))

    @classmethod
    def here(cls, device: torch.device, ranks: int) -> "Machine":
        if device.type == "cuda":
            return cls(ranks, torch.cuda.get_device_properties(device).total_memory)
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return cls(ranks, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // local)


def describe(args: argparse.Namespace) -> tuple[Family, MMDiTConfig | FluxConfig, VAEConfig]:
    """Family and configurations of --model or --weights: a folder, a manifest ({"tensors": {name: shape}} as JSON), or a published name."""
    if args.weights and args.weights.endswith(".json"):
        shapes = read_json(Path(args.weights)).get("tensors")
        if not isinstance(shapes, dict):
            raise ValueError(f"{args.weights}: no manifest, which has \"tensors\": {{name: shape}}; give the folder or file of the weights")
        weights = Weights({name: LazyTensor(tuple(shape), lambda: None) for name, shape in shapes.items()}, {}, args.weights)
        family = family_of(weights)
        return family, family.config(weights.part("model.diffusion_model.")), OFFICIAL_VAE
    if not args.weights and args.model in PUBLISHED and not model_folder(args.model).is_dir():
        return *PUBLISHED[args.model], OFFICIAL_VAE
    family, transformer, vae_path = find(model_folder(args.model, args.weights), args.transformer)
    whole = open_weights(vae_path)
    groups = int(whole.metadata.get("norm_groups", whole.metadata.get("norm_num_groups", NORM_GROUPS)))
    return (family, family.config(transformer.part("model.diffusion_model.")),
            VAEConfig.of(whole.part("first_stage_model."), groups))


def context_tokens(family: Family, t5_length: int | None) -> int:
    length = t5_length or family.t5_length
    return CLIP_TOKENS + (length or SD3_T5_TOKENS) if family.model is MMDiT else length or FLUX_T5_TOKENS


# ---- the sum

Rehearsal = Callable[[argparse.Namespace, int], int]  # (settings, ranks) -> bytes of activations; train.py's


def memory(args: argparse.Namespace, family: Family, config: MMDiTConfig | FluxConfig, vae_config: VAEConfig, ranks: int,
           rehearse: Rehearsal) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of each kind on one card, and on one host with its ranks."""
    with torch.device("meta"):
        model = family.model(config)
    parameters, sharded = list(model.parameters()), args.shard != "none"
    blocks = [sum(p.numel() for p in block.parameters()) for block in blocks_of(model)]
    whole = sum(p.numel() for p in parameters)
    largest = max(p.numel() for p in parameters)
    own = sum(-(-len(p) // ranks) * p[0].numel() for p in parameters) if sharded else whole  # the first rank's rows, the most
    size = 2 if args.state == "bf16" else 4
    compute = 2 if args.dtype == "bf16" else size
    batch, local = args.batch // (ranks * args.accumulate), min(ranks, RANKS_A_HOST)
    inputs = block_input_bytes(args, config, context_tokens(family, args.t5_length), batch) * len(blocks)

    card = {"parameters": own * size, "gradients": own * size, "optimizer": 2 * own * size, "averaged weights": 4 * own if args.ema else 0}
    card["activations"] = rehearse(args, ranks) - (inputs if args.activations == "host" else 0)
    gathered = whole + max(blocks) if args.shard == "zero2" else whole - sum(blocks) + 3 * max(blocks)
    card["gathered weights"] = gathered * compute if sharded else 0
    reduced = max(blocks) * (compute + 8) if sharded else 0                                # a block's gradients, two of them in fp32
    rounded = 24 * largest // (ranks if sharded else 1) if args.state == "bf16" else 0     # fp32 copies of one parameter at a time
    card["buffers"] = size * sum(b.numel() for b in model.buffers()) + reduced + rounded
    card["VAE weights"] = 4 * vae_parameters(vae_config)
    card["VAE encoding"] = 0 if args.cache_latents else encoding_bytes(vae_config, args.res, args.factor, args.dilation)
    card["reserve"] = 0 if args.device == "cpu" else RESERVE

    moved = {"offloaded state": ("parameters", "gradients", "optimizer") if args.offload else (),
             "averaged weights": ("averaged weights",) if args.ema_on_host or args.offload else ()}
    host = {name: local * sum(card[row] for row in rows) for name, rows in moved.items()}
    for row in sum(moved.values(), ()):
        card[row] = 0
    host["activations"] = local * inputs if args.activations == "host" else 0
    host["a checkpoint being written"] = local * 2 * min(FILE_BYTES, own * size)
    host["pictures"] = local * 2 * CACHE_BYTES
    host["processes"] = local * PROCESS
    return card, host


def total(card: dict[str, int]) -> int:
    """Encoding is over when the activations begin."""
    return sum(card.values()) - min(card["activations"], card["VAE encoding"])


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [block for child in model.children() if isinstance(child, nn.ModuleList) for block in child]


def block_input_bytes(args: argparse.Namespace, config: MMDiTConfig | FluxConfig, tokens: int, batch: int) -> int:
    sharded_bf16 = args.dtype == "bf16" and (args.shard != "none" or args.state == "bf16")
    return batch * ((args.res // (2 * args.factor)) ** 2 + tokens) * config.hidden_size * (2 if sharded_bf16 else 4)


def vae_parameters(config: VAEConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in VAE(config).parameters())


@lru_cache
def encoding_bytes(config: VAEConfig, res: int, factor: int, dilation: int) -> int:
    """Of one picture, in fp32 and without gradients, as training encodes."""
    def run(vae: VAE) -> None:
        with torch.no_grad():
            vae.moments(torch.empty(1, 3, res, res), factor, dilation)

    return peak_bytes(lambda: VAE(config), run)


# ---- the verdict

def changes(args: argparse.Namespace, ranks: int) -> list[tuple[str, dict[str, object]]]:
    """What could make a run smaller, the least slowing first."""
    found = []
    if args.activations == "keep":
        found.append(("--activations recompute", {"activations": "recompute"}))
    if args.ema and not args.ema_on_host:
        found.append(("--ema-on-host", {"ema_on_host": True}))
    for accumulate in range(args.accumulate + 1, args.batch // ranks + 1):
        if args.batch % (ranks * accumulate) == 0:
            found.append((f"--accumulate {accumulate}", {"accumulate": accumulate}))
    if ranks > 1 and args.shard == "none":
        found.append(("--shard zero2", {"shard": "zero2"}))
    if ranks > 1 and args.shard != "zero3":
        found.append(("--shard zero3", {"shard": "zero3"}))
    if args.device != "cpu":
        if not args.offload:
            found.append(("--offload", {"offload": True} | ({"shard": "zero2"} if args.shard == "none" else {})))
        if args.activations != "host":
            found.append(("--activations host", {"activations": "host"}))
    if args.state == "fp32":
        found.append(("--state bf16", {"state": "bf16"}))
    return found


def smallest_change(args: argparse.Namespace, ranks: int, size: Callable[[argparse.Namespace], int], room: int) -> str:
    """The first single change that fits, else the changes taken together until they fit, else what is left to do."""
    every = changes(args, ranks)
    for flag, change in every:
        if size(with_changes(args, change)) <= room:
            return f"{flag} makes it fit"
    together, flags = args, {}
    for flag, change in every:
        together, flags = with_changes(together, change), flags | {flag.split()[0]: flag}
        if size(together) <= room:
            return f"{' '.join(flags.values())} make it fit"
    return "no flag makes it fit: a smaller --res, or more or larger cards"


def with_changes(args: argparse.Namespace, change: dict[str, object]) -> argparse.Namespace:
    changed = copy.copy(args)
    vars(changed).update(change)
    if changed.offload and changed.shard == "none":
        changed.shard = "zero2"
    return changed


def verdict(args: argparse.Namespace, family: Family, config: MMDiTConfig | FluxConfig, vae_config: VAEConfig, machine: Machine,
            rehearse: Rehearsal) -> tuple[str, bool]:
    """The table, ending with what fits, and whether it does."""
    done: dict[tuple, int] = {}

    def rehearsed(other: argparse.Namespace, ranks: int) -> int:
        key = other.accumulate, other.activations, other.state, other.shard != "none"
        if key not in done:
            done[key] = rehearse(other, ranks)
        return done[key]

    def size(other: argparse.Namespace) -> int:
        return total(memory(other, family, config, vae_config, machine.ranks, rehearsed)[0])

    card, host = memory(args, family, config, vae_config, machine.ranks, rehearsed)
    needed, fits = total(card), total(card) <= machine.card
    lines = [f"{name:28}{value / GIB:10.2f} GiB" for name, value in card.items() if value]
    lines += [f"{'on one card':28}{needed / GIB:10.2f} GiB of {machine.card / GIB:.0f}", ""]
    lines += [f"{name:28}{value / GIB:10.2f} GiB" for name, value in host.items() if value]
    lines += [f"{f'on a host, {min(machine.ranks, RANKS_A_HOST)} ranks':28}{sum(host.values()) / GIB:10.2f} GiB", ""]
    lines.append("it fits" if fits else f"it does not fit: {smallest_change(args, machine.ranks, size, machine.card)}")
    return "\n".join(lines), fits
