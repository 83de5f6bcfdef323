"""Fine-tune the transformer of a model folder on a folder of captioned pictures, on one process or many.

Paper      Diffusion-4K sections 4.1 and 9: AdamW, constant lr 1e-6, weight decay 1e-4; VAE and text encoders stay frozen;
           Flux-dev is fed the guidance 3.5
Objective  z = (1 - sigma) * latent + sigma * noise;  v = noise - latent;  haar() gives the bands LL, LH, HL, HH
             --objective paper     w(sigma) * |haar(v_hat) - haar(v)|^2                             equation 4
             --objective release   w(sigma) * |haar(z - sigma * v_hat) - haar(latent)|^2            the released trainer
             --objective velocity  w(sigma) * |v_hat - v|^2                                         plain flow matching
             --objective noise     w(sigma) * |haar(z + (1 - sigma) * v_hat) - haar(noise)|^2       noise prediction
           With --bands 1,1,1,1 the first is exactly the third, the second sigma^2 and the fourth (1 - sigma)^2 times it
           (tests/test_wavelet.py): the wavelet changes the gradient only with other band weights, or with --huber.
Run        python train.py --data examples --res 256 --steps 10 --batch 4 --lr 1e-4                  CPU, half a minute
           python train.py --model tiny-flux --data examples --res 256 --steps 10 --batch 4 --lr 1e-4
           python train.py --weights sd3 --data aesthetic-4k --res 1024 --batch 4                    one GPU
           torchrun --standalone --nproc-per-node 8 train.py --weights flux --data aesthetic-4k --res 4096 --shard zero2 --offload
           python train.py ... --plan 8x80                             what it would take of memory, without weights or a GPU
Ranks      --batch is the batch of a step whatever the ranks and --accumulate: sample k of step s draws crop, caption, noise and sigma
           from a generator of its own, so that any division of the batch gives the same losses. Without --shard the gradients are
           averaged by the DDP below; with it FSDP2 cuts weights, gradients and moments into rows, one part a rank
Precision  --dtype bf16: products in bf16, by autocast where every rank holds the model, by bf16 copies of the fp32 weights under
           FSDP; gradients are reduced in fp32. --state bf16 keeps weights and moments in bf16, rounded at random, and
           computes in it; without --shard its gradients are reduced in bf16 too
Restart    the same command: a run goes on from its newest checkpoint, bit for bit on a CPU with as many ranks, with the same losses to
           1e-5 on any other number. SIGTERM or Ctrl-C
           finish the step, save and exit 0; before the first step there is nothing to save, and they end the process at once
Writes     OUT/sd3.safetensors   official names, transformer and VAE in one file: sample.py --transformer OUT/sd3.safetensors
           OUT/flux.safetensors  official names, the transformer alone, as in flux1-dev.safetensors: the VAE is a file of its own
           (at the end; before it, train.py --export --out OUT) and OUT/checkpoints, log.jsonl, settings.json, loss.png, samples
Check      python -m pytest tests/test_train.py tests/test_ranks.py
"""

import argparse
import ctypes
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from checkpoint import Weights, check_device, fill, model_folder, writable
from data import Embeddings, Item, Latents, Pictures, batch_of_step, read_folder, sizes_of, vary_caption
from family import Family, find
from flow import DENSITIES, SCHEMES, denoised, flux_mu, interpolate, loss_weight, sample_sigma
from flux import Flux, FluxConfig
from mmdit import MMDiT, MMDiTConfig, check_set, stretched
from text import check_t5_length
from training.adamw import RoundedAdamW
from training.logs import Log, draw_samples, matmul_rate, peak_memory_gib, sampling_of, write_grid
from training.plan import Machine, blocks_of, context_tokens, describe, flop_of_image, peak_bytes, verdict
from training.ranks import Agreed, by_first, join, rank, together, world
from training.resume import about_run, export, export_run, load_run, newest, save_checkpoint, step_of, tensors_of
from vae import VAE
from wavelet import BANDS, haar_split, wlf_loss

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BUCKET_BYTES = 25 << 20
ALIGNMENT = 64               # elements: where a gradient begins in its bucket
RECOMPUTE_TOKENS = 16_384    # 4096 px at factor 16: from here on activations are recomputed unless told otherwise
SMALL_MODEL = 100_000_000    # parameters: a smaller one is not weighed before it trains on a CPU
SIGMA_BINS = 8
SHOWN = 4                    # captions that sample pictures are drawn from
RECIPES = {  # what facts of paper and release differ in; None: what the family says
    "paper": {"objective": "paper", "dilation": 2, "latent_shift": True, "weighting": "none", "t5_length": None, "flip": False},
    "release": {"objective": "release", "dilation": 1, "latent_shift": False, "weighting": "none", "t5_length": 77, "flip": False}}
OURS = RECIPES["paper"] | {"flip": True}


@dataclass
class Bucket:
    gradients: Tensor             # flat; every p.grad is a view of it
    used: Tensor                  # its end: above 0 for each parameter that had a gradient on some rank
    parameters: list[nn.Parameter]
    came: set[int]                # which parameters had one here
    waiting: int = 0              # how many have not had one in the last backward


class DDP:
    """Gradients averaged over the ranks while backward is still under way.

    Buckets  parameters in reverse order, as backward reaches them, about BUCKET_BYTES each
    Launch   when the last gradient of a bucket has come, and those before it have been launched: the order is the same on all ranks
    Unused   a parameter without a gradient here counts as 0; one that no rank used keeps None, as on a single process. Which those
             are travels at the end of each bucket
    """

    def __init__(self, model: nn.Module):
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), 0)
        self.last_backward, self.buckets, self.launched, self.works = True, [], 0, []
        group: list[nn.Parameter] = []
        for parameter in reversed([p for p in model.parameters() if p.requires_grad]):
            if group and sum(p.nbytes for p in group) + parameter.nbytes > BUCKET_BYTES:
                self.buckets.append(self.bucket(group))
                group = []
            group.append(parameter)
        self.buckets.append(self.bucket(group))

    def bucket(self, parameters: list[nn.Parameter]) -> Bucket:
        length = sum(-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in parameters)
        flat = parameters[0].new_zeros(length + len(parameters))
        bucket = Bucket(flat, flat[length:], parameters, set())
        for k, parameter in enumerate(parameters):
            parameter.register_post_accumulate_grad_hook(partial(self.arrived, bucket, k))
        return bucket

    def zero(self) -> None:
        """Before the first backward of a step."""
        self.launched = 0
        for bucket in self.buckets:
            bucket.gradients.zero_()
            bucket.came.clear()
            bucket.waiting, start = len(bucket.parameters), 0
            for parameter in bucket.parameters:
                parameter.grad = bucket.gradients[start:start + parameter.numel()].view_as(parameter)
                start += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT

    def arrived(self, bucket: Bucket, k: int, parameter: nn.Parameter) -> None:
        bucket.came.add(k)
        if self.last_backward:  # of a step with accumulation
            bucket.waiting -= 1
            self.launch()

    def launch(self, incomplete: bool = False) -> None:
        while self.launched < len(self.buckets) and (incomplete or not self.buckets[self.launched].waiting):
            bucket = self.buckets[self.launched]
            for k in bucket.came if len(bucket.came) < len(bucket.parameters) else (slice(None),):
                bucket.used[k] = 1
            self.works.append(dist.all_reduce(bucket.gradients.div_(world()), async_op=True))
            self.launched += 1

    def wait(self) -> None:
        """After the last backward of a step: from here on every p.grad is the average."""
        self.launch(incomplete=True)
        while self.works:
            self.works.pop(0).wait()
        for bucket in self.buckets:
            if len(bucket.came) < len(bucket.parameters):
                for parameter, used in zip(bucket.parameters, bucket.used.tolist(), strict=True):
                    if not used:
                        parameter.grad = None


def shard(model: nn.Module, args: argparse.Namespace, mesh: DeviceMesh) -> None:
    """Cut every block, then the rest, into rows, one part a rank: FSDP2; parameters and moments as in --state, reduction fp32."""
    compute = torch.bfloat16 if args.state == "bf16" else DTYPES[args.dtype]
    policy = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy() if args.offload and args.device != "cpu" else OffloadPolicy()}
    for block in blocks_of(model):
        fully_shard(block, reshard_after_forward=args.shard == "zero3", **policy)
    fully_shard(model, reshard_after_forward=False, **policy)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# ---- the model under training

def recomputed(forward: Callable[..., Tensor], on_host: bool, *inputs: Tensor) -> Tensor:
    """A block whose activations are computed a second time in backward; its inputs stay, here or on the host."""
    with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()) if on_host else nullcontext():
        return checkpoint(forward, *inputs, use_reentrant=False)


def make(args: argparse.Namespace, family: Family, config: MMDiTConfig | FluxConfig) -> MMDiT | Flux:
    model = family.model(config)
    if args.activations != "keep":
        for block in blocks_of(model):
            block.forward = partial(recomputed, block.forward, args.activations == "host")
    return model


def build(args: argparse.Namespace, family: Family, weights: Weights, device: torch.device, mesh: DeviceMesh | None) -> MMDiT | Flux:
    """The transformer with its weights, of which each rank reads what it holds."""
    dtype = torch.bfloat16 if args.state == "bf16" else torch.float32
    with torch.device("meta"):
        model = make(args, family, family.config(weights)).to(dtype)
    if mesh:
        shard(model, args, mesh)
        device = torch.device("cpu") if args.offload else device
        model.to_empty(device=device)
    fill(model, weights, device, dtype)
    if args.stretch_positions != 1:
        model.pos_embed.copy_(stretched(model.pos_embed, args.stretch_positions))
    for module in model.modules():  # of an offloaded model only the parameters stay on the host
        module._buffers.update({name: buffer.to(args.device) for name, buffer in module._buffers.items()})
    return model


def averaged(model: nn.Module, on_host: bool) -> dict[str, Tensor]:
    """fp32 copies of the weights, each rank of its own rows, to become their moving average."""
    mesh, copies = init_device_mesh("cpu", (world(),)) if on_host and dist.is_initialized() else None, {}
    for name, p in model.named_parameters():
        copy = p.detach().to(torch.float32, copy=True) if not on_host else local(p.detach()).to("cpu", torch.float32, copy=True)
        if on_host and isinstance(p, DTensor):
            copy = DTensor.from_local(copy, mesh, [Shard(0)], run_check=False, shape=p.shape, stride=p.stride())
        copies[name] = copy
    return copies


@torch.no_grad()
def average(ema: dict[str, Tensor], model: nn.Module, rate: float) -> None:
    for copy, p in zip(ema.values(), model.parameters(), strict=True):  # one by one: never a second copy of the model in fp32
        local(copy).lerp_(local(p).to(local(copy)), 1 - rate)


def objective(name: str, velocity: Tensor, latent: Tensor, noise: Tensor, sigma: Tensor, weight: Tensor,
              bands: tuple[float, ...], huber: float) -> Tensor:
    """Equation 4 of the paper, or what stands in its place.

    name      "paper", "release", "velocity" or "noise", see the header
    velocity  the network's, (B, 16, h, w), as are latent and noise
    sigma     (B,), as is weight
    returns   scalar
    """
    if name == "velocity":
        return (weight * (velocity - (noise - latent)).float().square().mean((1, 2, 3))).mean()
    if name == "paper":
        return wlf_loss(velocity, noise - latent, weight, bands, huber)
    z = interpolate(latent, noise, sigma)
    if name == "release":
        return wlf_loss(denoised(z, velocity, sigma), latent, weight, bands, huber)
    return wlf_loss(denoised(z, velocity, sigma - 1), noise, weight, bands, huber)  # z + (1 - sigma) * velocity


def loss_of(model: MMDiT | Flux, latent: Tensor, noise: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor,
            args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """(velocity, loss) of a batch."""
    z, weight = interpolate(latent, noise, sigma), loss_weight(sigma, args.weighting)
    guidance = None if args.guidance is None else torch.full_like(sigma, args.guidance)
    with autocast(args):
        velocity = model(z, sigma, context, pooled, guidance)
    return velocity, objective(args.objective, velocity, latent, noise, sigma, weight, args.bands, args.huber)


def autocast(args: argparse.Namespace) -> torch.autocast:
    """bf16 products of fp32 weights; FSDP and --state bf16 have bf16 weights already."""
    return torch.autocast(args.device.partition(":")[0], torch.bfloat16, enabled=args.dtype == "bf16" and args.shard == "none")


def rehearse(args: argparse.Namespace, ranks: int, family: Family, config: MMDiTConfig | FluxConfig) -> int:
    """Bytes of activations of one backward pass of one rank: the loss of the loop, on tensors without storage."""
    batch, side = args.batch // (ranks * args.accumulate), args.res // args.factor
    on_cpu = argparse.Namespace(**vars(args) | {"device": "cpu"})

    def run(model: MMDiT | Flux) -> None:
        latent, noise = torch.empty(2, batch, config.in_channels, side, side)
        context = torch.empty(batch, context_tokens(family, args.t5_length), config.context_dim)
        loss_of(model, latent, noise, torch.empty(batch), context, torch.empty(batch, config.pooled_dim), on_cpu)[1].backward()

    sharded = args.shard != "none" and args.dtype == "bf16"
    return peak_bytes(lambda: make(args, family, config), run, torch.bfloat16 if sharded or args.state == "bf16" else torch.float32)


# ---- the batch

@dataclass
class Example:
    """One sample of a step: what it is, and the generator from which the rest of its draws come."""

    index: int
    text: str
    image: Tensor | None   # (3, H, W); None where the latent is cached
    noise: Tensor          # (16, h, w)
    sigma: Tensor          # (1,)
    generator: torch.Generator


def read_batch(step: int, args: argparse.Namespace, items: Sequence[Item], sizes: Sequence[tuple[int, int]], pictures: Pictures,
               channels: int) -> list[list[Example]]:
    """This rank's part of a step, one list a backward pass. Sample k draws from (seed, step, k), whoever computes it."""
    chosen = batch_of_step(sizes, args.batch, args.seed, step)
    each, passes = args.batch // (world() * args.accumulate), []
    for part in range(args.accumulate):
        first, examples = (part * world() + rank()) * each, []
        for k in range(first, first + each):
            generator = torch.Generator().manual_seed((args.seed * 2_654_435_761 + step * args.batch + k) % 2**32)
            index, (height, width) = chosen[k], sizes[chosen[k]]
            text = vary_caption(items[index].captions, generator, args.drop_words, args.drop_caption)
            image = None if args.center_crop else pictures.crop(index, height, width, generator, args.flip)
            noise = torch.randn(channels, height // args.factor, width // args.factor, generator=generator)
            sigma = sample_sigma(1, args.density, args.time_shift, generator=generator)
            examples.append(Example(index, text, image, noise, sigma, generator))
        passes.append(examples)
    return passes


@torch.no_grad()
def latents_of(examples: Sequence[Example], args: argparse.Namespace, vae: VAE, latents: Latents,
               sizes: Sequence[tuple[int, int]]) -> Tensor:
    """(B, 16, h, w), each drawn from its posterior; one picture at a time, so that none depends on the division of the batch."""
    weight, drawn = next(vae.parameters()), []
    for example in examples:
        if example.image is None:
            mean, logvar = latents.moments(example.index, *sizes[example.index])
        else:
            mean, logvar = vae.moments(example.image[None].to(weight), args.factor, args.dilation)
        drawn.append(vae.draw(mean, logvar, example.generator))
    return torch.cat(drawn)


# ---- the run

def commit() -> str:
    """The commit of this code, for settings.json; "unknown" outside a checkout, or without git."""
    try:
        git = subprocess.run(["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:
        return "unknown"
    return git.stdout.strip() or "unknown"


def check_settings(args: argparse.Namespace, ranks: int) -> None:
    """Refuse a flag out of range: ValueError that says what was given and what is accepted."""
    step, share = 2 * args.factor, ranks * args.accumulate
    check_t5_length(args.t5_length)
    for name, fits, accepted in (
            ("res", args.res > 0 and args.res % step == 0, f"a multiple of {step} at --factor {args.factor}"),
            *((name, getattr(args, name) >= 1, "1 or more") for name in ("steps", "batch", "accumulate", "save_every", "log_every", "keep",
                                                                         "threads")),
            *((name, 0 <= getattr(args, name) <= 1, "a probability") for name in ("drop_words", "drop_caption")),
            *((name, getattr(args, name) >= 0, "0 or more") for name in ("lr", "huber", "warmup", "weight_decay", "seed", "sample_every")),
            ("batch", share and args.batch % share == 0, f"a multiple of {share}, {ranks} ranks times --accumulate {args.accumulate}"),
            *((name, 0 < getattr(args, name) < math.inf, "a number above 0") for name in ("clip", "stretch_positions")),
            ("time_shift", args.time_shift in (None, "tokens") or 0 < args.time_shift < math.inf, 'a number above 0, or "tokens"'),
            ("guidance", args.guidance is None or 0 <= args.guidance < math.inf, "a number from 0"),
            ("offload", not args.offload or args.shard != "none", "it with --shard zero2 or zero3"),
            ("ema", 0 <= args.ema < 1, "0 for none, or a decay below 1")):
        if not fits:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: give {accepted}")


def settle(args: argparse.Namespace, family: Family) -> None:
    """Fill in what the command line left open and the recipe and the family decide."""
    family.check_guidance(args.guidance)
    if family.model is Flux and args.stretch_positions != 1:
        raise ValueError(f"--stretch-positions {args.stretch_positions:g}: Flux has no position table; leave it out")
    for name, value in (RECIPES[args.recipe] if args.recipe else OURS).items():
        if getattr(args, name) is None:  # the release leaves the shift out of SD3's latents only
            setattr(args, name, True if name == "latent_shift" and family.model is Flux else value)
    args.density = args.density or family.density
    args.guidance = family.guidance if args.guidance is None else args.guidance
    tokens = (args.res // (2 * args.factor)) ** 2
    if args.time_shift == "tokens":
        args.time_shift = math.exp(flux_mu(tokens))
    args.time_shift = args.time_shift or family.training_shift
    args.activations = args.activations or ("recompute" if tokens >= RECOMPUTE_TOKENS else "keep")
    args.center_crop = args.center_crop or args.cache_latents
    if args.objective == "velocity" and (args.huber or set(args.bands) != {1.0}):
        raise ValueError("--objective velocity has no bands: give --objective paper, which is the same with equal ones")
    if args.offload and args.device == "cpu":
        args.offload = False
        if not rank():
            print("--offload: on a machine without a GPU everything is in host memory already; nothing is moved", flush=True)


def row_of(tally: Tensor, passes: int) -> dict[str, object]:
    """What the log says of the losses summed since the line before; a sigma bin without a sample is null."""
    loss, bands, (in_bins, counts) = tally[0], tally[1:1 + len(BANDS)] / passes, tally[1 + len(BANDS):].view(2, -1).tolist()
    return {"loss": loss.item() / passes, **{f"v_{name}": round(band, 5) for name, band in zip(BANDS, bands.tolist(), strict=True)},
            "v_by_sigma": [round(total / count, 5) if count else None for total, count in zip(in_bins, counts, strict=True)]}


def what_diverged(step: int, norm: Tensor, passes: Sequence[Sequence[Example]], seen: Sequence[tuple[Tensor, Tensor]], pictures: Pictures,
                  out: Path) -> str:
    """The message of a gradient that is no number: which pictures at which sigma; all of the batch where each loss is still one."""
    mine = [(pictures.paths[example.index].name, level, loss) for examples, (sigma, error) in zip(passes, seen, strict=True)
            for example, level, loss in zip(examples, sigma.tolist(), error.mean(1).tolist(), strict=True)]
    everyone = [mine] * world()
    if dist.is_initialized():
        dist.all_gather_object(everyone, mine)
    batch = sum(everyone, [])
    bad = [row for row in batch if not math.isfinite(row[2])] or batch
    return (f"step {step}: gradient norm {norm.item()}, velocity loss {sum(row[2] for row in batch) / len(batch):.4g}; "
            f"picture, sigma, loss: {', '.join(f'{name} {sigma:.3f} {loss:.3g}' for name, sigma, loss in bad[:8])}; "
            f"the last good checkpoint is in {out}/checkpoints; try a smaller --lr")


def check_memory(args: argparse.Namespace, device: torch.device) -> None:
    """ValueError, with the table and the smallest change that helps, for a run that cannot fit."""
    family, config, vae_config = describe(args)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in family.model(config).parameters())
    if rank() or (device.type == "cpu" and parameters < SMALL_MODEL):
        return
    table, fits = verdict(args, family, config, vae_config, Machine.here(device, world()), partial(rehearse, family=family, config=config))
    if not fits:
        print(table, flush=True)
        raise ValueError(f"this run does not fit into memory: {table.splitlines()[-1].partition(': ')[2]}")


def plan(args: argparse.Namespace) -> None:
    """train.py --plan RANKSxGB: the table alone."""
    family, config, vae_config = describe(args)
    settle(args, family)
    check_settings(args, args.plan.ranks)
    print(verdict(args, family, config, vae_config, args.plan, partial(rehearse, family=family, config=config))[0])


def stop_on_signals() -> threading.Event:
    """An event that SIGTERM and Ctrl-C set, from here on."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


def train(args: argparse.Namespace, listen: Callable[[], threading.Event] = threading.Event) -> None:
    """The whole run, from checks to the written model; goes on from OUT/checkpoints where there are any.

    listen  called as the first step begins; the event that it gives, once set, ends the run after the step that is under way, with
            a checkpoint
    """
    device = torch.device("cuda", torch.cuda.current_device()) if args.device == "cuda" else torch.device(args.device)
    folder, out, first = model_folder(args.model, args.weights), Path(args.out), not rank()

    def look():
        family, transformer, vae_path = find(folder, args.transformer)
        settle(args, family)
        items, weights, step = read_folder(args.data), transformer.part("model.diffusion_model."), 2 * args.factor
        sizes = sizes_of(items, args.res, step, family.config(weights).table_side * step, args.aspect)
        if (out / "state.safetensors").exists() and not (out / "checkpoints").exists():
            raise ValueError(f"{out}/state.safetensors is of an earlier version, which this one cannot go on from: use another --out, "
                             "and --transformer with the model that it wrote")
        check_memory(args, device)
        if not args.dry_run:
            writable(out, f"--out {out}")
        return family, transformer, weights, vae_path, items, sizes

    (family, transformer, weights, vae_path, items, sizes), _ = together(look)
    about = about_run(args, family, weights, items, sizes)
    if first:
        print(json.dumps(vars(args), indent=1), flush=True)
    if args.dry_run:
        return

    # model, optimizer, checkpoint
    mesh = init_device_mesh(device.type, (world(),)) if args.shard != "none" else None
    (model, vae), _ = together(lambda: (build(args, family, weights, device, mesh), VAE.load(vae_path, device).requires_grad_(False)))
    for size in set(sizes):
        model.position(size[0] // args.factor, size[1] // args.factor)  # refuses what a position table cannot hold
    ddp = DDP(model) if dist.is_initialized() and not mesh else None
    ema = averaged(model, args.ema_on_host) if args.ema else {}
    if args.state == "bf16":
        optimizer = RoundedAdamW(model.parameters(), args.lr, (0.9, 0.999), args.weight_decay, args.seed + (rank() if mesh else 0))
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=args.weight_decay, fused=True)
    found = [newest(out) if first else None]
    if dist.is_initialized():
        dist.broadcast_object_list(found, 0)
    start, _ = together(lambda: load_run(found[0], about, tensors_of(model, ema, optimizer, step_of(found[0])), args) if found[0] else 0)

    # data
    embeddings = Embeddings(Path(args.data) / ".embeddings", folder, device, family, args.t5_length)
    captions = [""] if args.drop_words else ["", *(caption for item in items for caption in item.captions)]
    together(lambda: embeddings.fill(captions, rank=rank(), world=world()))
    check_set(model.config, *embeddings.read([""]), vae.config.latent_channels)
    if not args.latent_shift:
        vae.shift_factor = 0.0
    pictures = Pictures([item.path for item in items])
    latents = Latents(pictures, vae, args.factor, args.dilation, Path(args.data) / ".latents" if args.cache_latents else None)
    read = partial(read_batch, args=args, items=items, sizes=sizes, pictures=pictures, channels=vae.config.latent_channels)

    def begin_log() -> Log:
        (out / "settings.json").write_text(json.dumps({"commit": commit(), "ranks": world()} | vars(args), indent=1))
        return Log(out, start)

    def save() -> None:
        """The state before step `step`."""
        nonlocal saved
        if saved < step:
            save_checkpoint(out, step, tensors_of(model, ema, optimizer, step), about, args.keep)
            saved = step

    def get(work: Callable[[], object], stop: bool = False) -> tuple[object, bool]:
        """As together; where a picture can't be read, the state is kept, so that the run goes on when it is repaired."""
        try:
            return together(work, stop)
        except (ValueError, OSError):
            save()
            raise

    log = by_first(begin_log)
    if first:
        flop = flop_of_image(family.model, model.config, args.res // args.factor, embeddings.read([""])[0].shape[1])
        rate = matmul_rate(device, DTYPES[args.dtype])
    shown = ["", *(item.captions[0] for item in items[:SHOWN])]
    if args.sample_every:
        embeddings.fill(shown, rank=rank(), world=world())
        together(lambda: None)
        sampling = sampling_of(args, family, transformer, vae.config.latent_channels, device)
    tally = torch.zeros(1 + len(BANDS) + 2 * SIGMA_BINS, device=device)  # loss, bands, loss a sigma bin, samples a sigma bin
    began, since, saved, step = time.time(), start, start, start
    stop = listen()
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, file=sys.stderr, disable=not first)
    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(read, start)
        for step in bar:
            passes, asked_to_stop = get(coming.result, stop.is_set())
            if asked_to_stop:
                break
            coming = ahead.submit(read, min(step + 1, args.steps - 1))
            ddp.zero() if ddp else optimizer.zero_grad(set_to_none=True)
            seen = []
            for part, examples in enumerate(passes):
                # data
                encode = partial(latents_of, examples, args, vae, latents, sizes)
                latent = get(encode)[0] if args.center_crop else encode()  # central crops are not read ahead
                with torch.no_grad():
                    context, pooled = (embeddings.encode if args.drop_words else embeddings.read)([example.text for example in examples])
                # noise
                noise = torch.stack([example.noise for example in examples]).to(device)
                sigma = torch.cat([example.sigma for example in examples]).to(device)
                # predict, loss, backward
                if ddp:
                    ddp.last_backward = part + 1 == args.accumulate
                velocity, loss = loss_of(model, latent, noise, sigma, context, pooled, args)
                (loss / args.accumulate).backward()
                with torch.no_grad():  # what the log says
                    error = haar_split((velocity - (noise - latent)).float()).unflatten(1, (len(BANDS), -1)).square().mean((2, 3, 4))
                    seen.append((sigma, error))
                    bins = (sigma * SIGMA_BINS).long().clamp(max=SIGMA_BINS - 1)
                    tally[:1 + len(BANDS)] += torch.cat((loss.detach()[None], error.mean(0)))
                    tally[1 + len(BANDS):].view(2, -1).index_add_(1, bins, torch.stack((error.mean(1), torch.ones_like(sigma))))
            if ddp:
                ddp.wait()
            norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            if not torch.isfinite(norm):  # the same number on every rank; waits for the device
                raise Agreed(what_diverged(step, norm, passes, seen, pictures, out))
            # step
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(1.0, (step + 1) / max(1, args.warmup))
            optimizer.step()
            if ema:
                average(ema, model, min(args.ema, (step + 1) / (step + 10)))
            # log, save, draw
            last = step + 1 == args.steps
            if (step + 1) % args.log_every == 0 or last:
                if dist.is_initialized():
                    dist.all_reduce(tally)
                row = {}
                if first:
                    row = {"step": step + 1} | row_of(tally.cpu(), world() * args.accumulate * (step + 1 - since))
                    images_per_s = (step + 1 - since) * args.batch / (time.time() - began)
                    row |= {"grad_norm": norm.item(), "lr": optimizer.param_groups[0]["lr"],
                            "peak_gib": round(peak_memory_gib(device), 2), "images_per_s": round(images_per_s, 3),
                            "matmul_share": round(flop * images_per_s / world() / rate, 3),
                            "eta_s": round((args.steps - step - 1) * args.batch / images_per_s)}
                    bar.set_postfix_str(f"loss {row['loss']:.4f}")
                by_first(lambda row=row: log.write(row))
                tally.zero_()
                began, since = time.time(), step + 1
            step += 1
            if step % args.save_every == 0 or last:
                save()
                by_first(lambda: log.plot())
            if args.sample_every and step % args.sample_every == 0:
                with autocast(args):  # every rank draws, since each may hold a part of the model; the first one writes
                    images = draw_samples(model, vae, *embeddings.read(shown), **sampling)
                by_first(partial(write_grid, out / "samples" / f"step-{step:08d}.png", images))
    if start < args.steps and asked_to_stop:
        save()
        if first:
            print(f"stopped after step {step}; the same command goes on from there")
    elif first:
        print(f"wrote {export(newest(out), args, family, transformer, vae_path)}")


def four_numbers(text: str) -> tuple[float, ...]:
    values = tuple(float(v) for v in text.split(","))
    if len(values) != 4 or not all(0 <= value < math.inf for value in values):
        raise argparse.ArgumentTypeError(f"{text!r}: four numbers from 0 for LL,LH,HL,HH")
    return values


def shift_or_tokens(text: str) -> float | str:
    return text if text == "tokens" else float(text)


def return_freed_memory() -> None:
    """Have glibc give freed blocks of a MiB and more back to the system at once: it would keep a tenth of a CPU run's memory."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    cuda = torch.cuda.is_available() or any(word.startswith("--plan") for word in sys.argv)  # plans are made for cards, wherever
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    add = parser.add_argument_group("what").add_argument
    add("--model", help="name of a folder in models/ (tiny-sd3)")
    add("--weights", metavar="DIR", help="another model folder, as downloaded")
    add("--transformer", metavar="FILE", help="begin with this transformer instead of the folder's")
    add("--stretch-positions", type=float, default=1.0, metavar="S",
        help="begin with S times closer places in SD3's position table: 4 to go on at 1024 px from 256, with the layout it knows")
    add("--data", metavar="DIR", help="pictures and metadata.jsonl")
    add("--out", metavar="DIR", default="runs/train", help="folder of the run; an unfinished run there goes on")
    add("--export", action="store_true", help="write the newest checkpoint of --out as one official file, and stop")
    add = parser.add_argument_group("pictures").add_argument
    add("--res", type=int, default=1024, help="side of the training squares, pixels")
    add("--aspect", action="store_true", help="not squares: each picture at the nearest of eleven aspects, with about as many pixels")
    add("--factor", type=int, default=16, choices=(8, 16), help="down-sampling of the VAE")
    add("--dilation", type=int, choices=(1, 2), help="of the VAE's first convolution at factor 16; 1 is the release's (2)")
    add("--latent-shift", action=argparse.BooleanOptionalAction, help="latents are (raw - shift) * scale; without: raw * scale (with)")
    add("--flip", action=argparse.BooleanOptionalAction, help="mirror every second crop (yes)")
    add("--center-crop", action="store_true", help="central crops, not mirrored")
    add("--cache-latents", action="store_true", help="central crops, whose moments are kept in DATA/.latents (data.py encode --latents)")
    add("--drop-words", type=float, default=0.0,
        help="probability of each word, in every second caption; those are encoded as they come")
    add("--drop-caption", type=float, default=0.1, help="probability of the empty caption, for classifier-free guidance")
    add("--t5-length", type=int, help="tokens of T5 (SD3: 77, Flux-dev: 512, Flux-schnell: 256)")
    add = parser.add_argument_group("objective").add_argument
    add("--recipe", choices=tuple(RECIPES), help="what paper and released trainer do differently, all at once; other flags override it")
    add("--objective", choices=("paper", "release", "velocity", "noise"),
        help="bands of the velocity, of the denoised latent, none, of the noise (paper)")
    add("--bands", type=four_numbers, default=(1.0, 1.0, 1.0, 1.0), help="weights of LL,LH,HL,HH")
    add("--huber", type=float, default=0.0, help="0: squared; above: width of the pseudo-Huber penalty, in units of the latent")
    add("--density", choices=DENSITIES, help="how sigma is drawn (SD3: logit_normal, Flux: uniform)")
    add("--time-shift", type=shift_or_tokens, metavar="S",
        help='of the drawn sigma; above 1 is noisier; "tokens": as Flux-dev samples at --res (SD3: 3.0, Flux: 1.0)')
    add("--guidance", type=float, help="the number that Flux-dev is given (3.5); other models have no such input")
    add("--weighting", choices=SCHEMES, help="w(sigma) (none)")
    add = parser.add_argument_group("optimizer").add_argument
    add("--steps", type=int, default=20_000, help="of the whole run")
    add("--batch", type=int, default=32, help="pictures a step, over all ranks")
    add("--lr", type=float, default=1e-6, help="constant after the warm-up")
    add("--warmup", type=int, default=0, help="steps")
    add("--weight-decay", type=float, default=1e-4, help="of AdamW")
    add("--clip", type=float, default=1.0, help="gradient norm")
    add("--ema", type=float, default=0.0, help="0: none; else decay a step of the averaged weights, which are then the ones written")
    add("--state", default="fp32", choices=("fp32", "bf16"), help="of weights and moments: 12 bytes a parameter, or 6, rounded at random")
    add = parser.add_argument_group("memory").add_argument
    add("--shard", default="none", choices=("none", "zero2", "zero3"),
        help="cut weights, gradients and moments among the ranks; zero2 keeps the gathered weights from forward to backward")
    add("--offload", action="store_true", help="with --shard, on a GPU: weights, gradients and moments in host memory, AdamW on the CPU")
    add("--accumulate", type=int, default=1, metavar="N", help="backward passes a step: each sees batch / N / ranks pictures")
    add("--activations", choices=("keep", "recompute", "host"),
        help="recompute those inside a block in backward; host: its inputs wait in host memory (recompute from 4096 px at factor 16 on)")
    add("--ema-on-host", action="store_true", help="averaged weights in host memory")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="cuda" if cuda else "cpu", help="cpu or cuda")
    add("--dtype", default="bf16" if cuda else "fp32", choices=("fp32", "bf16"), help="of the arithmetic")
    add("--save-dtype", default="fp16", choices=tuple(DTYPES), help="of the written model")
    add("--save-every", type=int, default=500, help="steps between checkpoints")
    add("--keep", type=int, default=2, metavar="N", help="checkpoints that stay")
    add("--log-every", type=int, default=10, help="steps between log lines")
    add("--sample-every", type=int, default=0, help="steps between sample pictures; 0: none")
    add("--seed", type=int, default=0, help="of every draw")
    add("--threads", type=int, default=max(1, (os.cpu_count() or 1) // local_ranks), help="CPU threads of a rank")
    add("--plan", type=Machine.parse, metavar="RANKSxGB",
        help="say what the run would take of that many cards' memory, 8x80 for example, and stop; needs neither weights nor GPU")
    add("--dry-run", action="store_true", help="check settings, listing and the headers of all files, print the settings, stop")
    args = parser.parse_args()
    try:
        if args.export:
            return export_run(args)
        args.model = args.model or (None if args.weights else "tiny-sd3")
        if args.plan:
            return plan(args)
        if not args.data:
            parser.error("--data DIR: a folder of pictures and metadata.jsonl is needed")
        check_device(args.device)
        join(args)
        together(lambda: check_settings(args, world()))
        torch.set_num_threads(args.threads)
        return_freed_memory()
        train(args, stop_on_signals)
        if dist.is_initialized():
            dist.destroy_process_group()
    except (ValueError, OSError) as error:
        if rank():
            raise SystemExit(1 if isinstance(error, Agreed) else f"error: rank {rank()}: {error}") from None
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("error: interrupted before the first step") from None
    except torch.OutOfMemoryError:
        raise SystemExit("error: the GPU's memory is too small for this; --plan says what would fit") from None


if __name__ == "__main__":
    main()
