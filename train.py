"""Fine-tune the transformer of a model folder on a folder of captioned pictures, on one process or many.

Paper      Diffusion-4K sections 3.2 and 9: AdamW, constant lr 1e-6, weight decay 1e-4; VAE and text encoders are frozen
Objective  z = (1 - sigma)·latent + sigma·noise;  v = noise - latent
           equation 4: w(sigma)·|haar(model(z)) - haar(v)|²; wavelet.objective has it and its alternatives
Run        python train.py --data examples --res 256 --steps 10 --batch 4 --lr 1e-4      CPU, half a minute
           torchrun --nproc-per-node 8 --shutdown-timeout 900 train.py --weights flux --data DIR --res 4096 …
           python train.py ... --plan 8x80      the memory it takes, without weights or a GPU
Check      python -m pytest tests/test_train.py tests/test_ranks.py
"""

if __name__ == "__main__":
    import os

    import files
    files.end_on_interrupt()  # Ctrl-C during the import of torch ends in one line
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # torch reads it; fewer holes in GPU memory

import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from checkpoint import DTYPES, Weights, model_folder
from data import Item, Pictures, read_folder, sizes_of
from family import Family, check_widths, find, positioned
from files import INTERRUPTED, run_command, writable
from flow import interpolate, loss_weight
from flux import Flux, FluxConfig
from layers import blocks_of, check_ranks, reach
from machine.memory import check_device, device_of, return_freed_memory
from machine.ranks import join, leave
from mmdit import MMDiT, MMDiTConfig
from text import check_t5_length
from training.adapter import trained
from training.batches import batches, read_batch, uneven
from training.cache import Embeddings, Latents, encoders_key
from training.heldout import HeldOut, default_interval, first_shared
from training.logs import Tally, what_diverged
from training.model import EMA, autocast, build, encode, new_optimizer
from training.plan import check_memory, plan_of, this_machine
from training.ranks import SharedError, described, on_all, rank, stop_on_signals, world
from training.resume import digests_of, identity_of
from training.run import Run, check_out, export_newest, only_run
from training.samples import SHOWN, sample_settings_of
from training.settings import Settings, check, parse, settle
from vae import VAE
from wavelet import detail_mask, objective

BUCKET_BYTES = 25 << 20
ALIGNMENT = 64             # elements: gradients begin at multiples of it in their bucket


@dataclass(frozen=True)
class Job:
    """What a run works on, opened and checked."""

    settings: Settings
    device: torch.device
    family: Family
    transformer: Weights
    config: MMDiTConfig | FluxConfig
    folder: Path                    # of the text encoders
    vae_path: Path
    items: Sequence[Item]
    pictures: Pictures              # of the items
    sizes: Sequence[tuple[int, int]]    # (height, width) of each item's crop, pixels
    held_out: tuple[Sequence[Item], Pictures, Sequence[tuple[int, int]]] | None   # the same three of --validate

    def identity(self) -> dict[str, object]:
        """What must be equal for a checkpoint to be resumed."""
        weights = digests_of(self.family, self.transformer, self.vae_path)
        weights["text encoders"] = encoders_key(self.folder)
        listing = [(str(item.path.relative_to(self.settings.data)), item.captions, size)
                   for item, size in zip(self.items, self.sizes, strict=True)]
        return identity_of(self.settings, self.family, self.config, weights, listing)

    def described(self) -> str:
        """The machine, then as JSON the settings and what is read from where."""
        sizes = [f"{width}x{height}" for height, width in sorted(set(self.sizes))]
        read = {"family": self.family.name, "transformer": self.transformer.source, "vae": str(self.vae_path),
                "text_encoders": str(self.folder), "pictures": len(self.items), "crops": sizes}
        return f"{described(self.device)}\n{json.dumps(asdict(self.settings) | {'read': read}, indent=1)}"


def open_job(settings: Settings) -> Job:
    """Open everything a run needs and refuse what cannot work, before anything is loaded or written."""
    device, folder = device_of(settings.device), model_folder(settings.model, settings.weights)
    family, transformer, vae_path = find(folder, settings.transformer)
    if settings.offload and device.type == "cpu" and not rank():
        print("--offload: without a GPU everything is in host memory already; nothing is moved", flush=True)
    check_out(settings.out, folder, settings.transformer, settings.data, settings.validate)
    settings = settle(settings, family)
    if not settings.t5_length:  # a run that this one begins from may have recorded it
        settings = replace(settings, t5_length=transformer.number("t5_length", integer=True))
        check_t5_length(settings.t5_length)
    config = family.config(transformer.part("model.diffusion_model."))
    config = positioned(config, settings.positions, settings.trained_side)
    check_ranks(settings.sequence, config.num_heads, family.text_tokens(settings.t5_length), settings.tokens)
    most = 2 * settings.factor * reach(config.table_side, config.positions)
    items, pictures, sizes = open_folder(settings.data, settings, most)
    held_out = open_folder(settings.validate, settings, most) if settings.validate else None
    if held_out and (both := first_shared(pictures.paths, held_out[1].paths)):
        raise ValueError(f"--validate {settings.validate}: {both} is in --data too; take it out of one")
    if held_out and not settings.validate_every:
        settings = replace(settings, validate_every=default_interval(len(held_out[0]), settings.batch))
    if not rank():
        check_memory(settings, this_machine(device, world()))
        if repeated := uneven(sizes, settings.batch):
            print(repeated, flush=True)
    if not settings.dry_run:
        writable(Path(settings.out), f"--out {settings.out}")
        if settings.cache:
            writable(Path(settings.cache), f"--cache {settings.cache}")
    return Job(settings, device, family, transformer, config, folder, vae_path, items, pictures, sizes, held_out)


def open_folder(folder: str, settings: Settings, most: int) -> tuple[
        Sequence[Item], Pictures, Sequence[tuple[int, int]]]:
    """Items, their pictures, and (height, width) of their crops; most: the longest side that the model allows."""
    items = read_folder(folder)
    sizes = sizes_of(items, settings.res, 2**settings.levels * settings.factor, most, settings.aspect, settings.small)
    items, sizes = zip(*(pair for pair in zip(items, sizes, strict=True) if pair[1]), strict=True)
    return items, Pictures([item.path for item in items], settings.resize), sizes


def load_models(job: Job) -> tuple[MMDiT | Flux, VAE]:
    """The transformer, sharded if asked for, and the frozen VAE."""
    settings, weights = job.settings, job.transformer.part("model.diffusion_model.")
    mesh = init_device_mesh(job.device.type, (world(),)) if settings.sharded else None  # all ranks meet here
    split = partial(shard, settings=settings, mesh=mesh)
    model = on_all(lambda: build(settings, job.family, job.config, weights, job.device, split))
    if settings.sequence > 1:
        groups = init_device_mesh(job.device.type, (world() // settings.sequence, settings.sequence))
        model.sequence = groups.get_group(1)
    vae = on_all(lambda: VAE.load(job.vae_path, job.device, DTYPES[settings.vae_dtype],
                                  fallback=job.family.latent_scale).requires_grad_(False))
    if not settings.latent_shift:
        vae.shift_factor = 0.0
    for height, width in {*job.sizes, *(job.held_out[2] if job.held_out else ())}:
        model.position(height // settings.factor, width // settings.factor)  # refuses what a position table cannot hold
    return model, vae


def prepare_caches(job: Job, model: MMDiT | Flux, vae: VAE) -> tuple[Embeddings, Latents | None, HeldOut | None]:
    """Text embeddings, latents with --cache-latents, all of --validate; each rank encodes its share."""
    settings, cache = job.settings, Path(job.settings.cache or job.settings.data)
    items, pictures, sizes = job.held_out or ((), None, ())
    texts = Embeddings(cache / ".embeddings", job.folder, job.device, job.family, settings.t5_length)
    captions = ["", *(caption for item in job.items for caption in item.captions), *(i.captions[0] for i in items)]
    on_all(lambda: texts.fill(captions, rank=rank(), world=world()))  # frees the text encoders
    check_widths(model.config, *texts.read([""]), vae.config)

    def latents_of(pictures: Pictures, sizes: Sequence[tuple[int, int]], folder: str) -> Latents:
        latents = Latents(pictures.paths, pictures.central_crop, vae, settings.factor, settings.dilation,
                          Path(settings.cache or folder) / ".latents", pictures.resample)
        on_all(lambda: latents.fill(sizes, rank(), world()))
        return latents

    latents = latents_of(job.pictures, job.sizes, settings.data) if settings.cache_latents else None
    if not items:
        return texts, latents, None
    names, shown = [item.path.name for item in items], [item.captions[0] for item in items]
    return texts, latents, HeldOut(names, shown, sizes, texts, latents_of(pictures, sizes, settings.validate), vae)


def train(settings: Settings) -> int:
    """The complete run, from checks to the exported file; resumes from OUT/checkpoints.

    returns  the number of the signal that stopped it, 0 if none did
    """
    job = on_all(lambda: open_job(settings))               # arguments, files and memory are checked here
    settings, device = job.settings, job.device
    if not rank():
        print(job.described(), flush=True)
    if settings.dry_run:
        return 0

    with only_run(Path(settings.out)):                     # a second run with this --out is refused
        model, vae = load_models(job)                      # meta -> shard -> fill
        by_hooks = settings.sharded and not settings.lora  # FSDP averages gradients by itself
        ddp = DDP(model) if dist.is_initialized() and not by_hooks else None
        optimizer = new_optimizer(settings, model)
        ema = EMA(model, settings.ema, settings.ema_on_host)
        run = Run(settings, job.identity(), model, ema.copies, optimizer)
        start = done = run.resume()                        # complete steps
        texts, latents, held_out = prepare_caches(job, model, vae)  # the text encoders are freed here
        shown = ["", *(item.captions[0] for item in job.items[:SHOWN])]  # the empty prompt is for cfg
        empty, _ = texts.read([""])
        run.begin(start, device, settings.res // settings.factor, empty.shape[1])
        how = sample_settings_of(settings, job.family, job.transformer, vae.config.latent_channels)
        tally = Tally(device)
        if held_out and not start:
            run.validate(0, held_out)

        read = partial(read_batch, settings=settings, captions=[item.captions for item in job.items], sizes=job.sizes,
                       resized=job.pictures.resized, channels=vae.config.latent_channels, texts=texts, latents=latents)
        with stop_on_signals() as stop:
            # reads one step ahead; ends after --steps, or when any rank was asked to stop
            upcoming = batches(read, start, settings.steps, stop, on_error=run.save)
            bar = tqdm(upcoming, initial=start, total=settings.steps, file=sys.stderr, disable=bool(rank()))
            for step, parts in bar:
                if ddp:
                    ddp.zero()
                else:
                    model.zero_grad(set_to_none=True)
                losses = []                                # velocity loss of each sample, named if the step diverges
                for k, part in enumerate(parts):           # --accumulate passes of forward and backward
                    # data: a latent drawn from each posterior, the embedding of its caption
                    latent = encode(vae, part, settings)                            # (B, 16, h, w)
                    context, pooled = part.context, part.pooled                     # (B, L, C), (B, P)
                    # noise: from each sample's own generator, so that it does not depend on the split of the batch
                    noise, sigma = part.noise.to(device), part.sigma.to(device)     # (B, 16, h, w), (B,)
                    z = interpolate(latent, noise, sigma)                           # (1 - sigma)·latent + sigma·noise
                    # predict
                    guidance = None if part.guidance is None else part.guidance.to(device)      # (B,)
                    with autocast(settings):                                        # --dtype bf16 of fp32 weights
                        velocity = model(z, sigma, context, pooled, guidance)       # (B, 16, h, w)
                    # loss: equation 4, or another --objective; where --mask keeps it
                    weight, mask = loss_weight(sigma, settings.weighting), detail_mask(settings.mask, latent, z, sigma)
                    loss = objective(settings.objective, velocity, latent, noise, sigma, weight, settings.bands,
                                     settings.huber, settings.levels, settings.huber_snr, mask)
                    # backward; DDP reduces in the last pass only, FSDP in every one
                    if ddp:
                        ddp.last_backward = k + 1 == len(parts)
                    (loss / len(parts)).backward()
                    losses.append(tally.add(loss, velocity, noise - latent, sigma, mask))  # stays on the device
                if ddp:
                    ddp.wait()                             # from here every p.grad is the average over the ranks

                norm = clip(model, settings.clip)
                if not norm.isfinite():                    # the same on all ranks; the step waits for the device here
                    names = [item.path.name for item in job.items]
                    raise SharedError(what_diverged(step, norm, parts, losses, names, settings))
                lr = settings.lr * min(1.0, (step + 1) / max(1, settings.warmup))
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
                ema.update(step)

                done = step + 1
                with run.saved_on_error(done):
                    if run.due(settings.log_every, done):
                        bar.set_postfix_str(run.log(done, tally, norm, lr))
                    if run.due(settings.save_every, done):
                        run.save(done)
                    if held_out and run.due(settings.validate_every, done):
                        run.validate(done, held_out)
                    if run.due(settings.sample_every, done):
                        with autocast(settings):
                            run.draw(done, vae, *on_all(lambda: texts.read(shown)), how)
            run.finish(done, job.family, job.transformer, job.vae_path)  # exports, or saves the stopped run
    return stop.number


# ---- gradients over the ranks: by hand, or by FSDP2 where the model is sharded

@dataclass
class Bucket:
    gradients: Tensor             # flat; every p.grad is a view of it
    used: Tensor                  # its last len(parameters) entries; > 0 after all-reduce if any rank had a gradient
    parameters: list[nn.Parameter]
    arrived: set[int]             # parameters with a gradient on this rank
    waiting: int = 0              # parameters still without one in the last backward


class DDP:
    """Gradients averaged over the ranks while backward is still running.

    Buckets  parameters in reverse order, as backward reaches them, about BUCKET_BYTES each
    Launch   a bucket is reduced once its last gradient is ready, in bucket order: all ranks issue the same sequence
    Unused   a parameter without a gradient on this rank counts as 0; one unused on every rank keeps grad None, as on
             one process. The usage flags travel at the end of each bucket
    """

    def __init__(self, model: nn.Module):
        for tensor in (*trained(model).values(), *model.buffers()):
            dist.broadcast(tensor.detach(), 0)
        self.last_backward, self.buckets, self.launched, self.works = True, [], 0, []
        group: list[nn.Parameter] = []
        for parameter in reversed(trained(model).values()):
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
            parameter.register_post_accumulate_grad_hook(partial(self.arrive, bucket, k))
        return bucket

    def zero(self) -> None:
        """Before the first backward of a step."""
        self.launched = 0
        for bucket in self.buckets:
            bucket.gradients.zero_()
            bucket.arrived.clear()
            bucket.waiting, start = len(bucket.parameters), 0
            for parameter in bucket.parameters:
                parameter.grad = bucket.gradients[start:start + parameter.numel()].view_as(parameter)
                start += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT

    def arrive(self, bucket: Bucket, k: int, parameter: nn.Parameter) -> None:
        bucket.arrived.add(k)
        if self.last_backward:  # of a step with --accumulate
            bucket.waiting -= 1
            self.launch()

    def launch(self, incomplete: bool = False) -> None:
        """Send off the buckets that are next in order and ready; with `incomplete`, all that are left."""
        while self.launched < len(self.buckets) and (incomplete or not self.buckets[self.launched].waiting):
            bucket = self.buckets[self.launched]
            if len(bucket.arrived) == len(bucket.parameters):
                bucket.used.fill_(1)
            else:
                bucket.used[list(bucket.arrived)] = 1
            self.works.append(dist.all_reduce(bucket.gradients.div_(world()), async_op=True))
            self.launched += 1

    def wait(self) -> None:
        """After the last backward of a step: from here on every p.grad is the average."""
        self.launch(incomplete=True)
        while self.works:
            self.works.pop(0).wait()
        for bucket in self.buckets:
            if len(bucket.arrived) < len(bucket.parameters):
                for parameter, used in zip(bucket.parameters, bucket.used.tolist(), strict=True):
                    if not used:
                        parameter.grad = None


def shard(model: nn.Module, settings: Settings, mesh: DeviceMesh) -> None:
    """Split every block, then the rest, into rows, one part per rank: FSDP2. Gradients are reduced in fp32."""
    policy = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(DTYPES[settings.dtype], torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy() if settings.offload else OffloadPolicy()}
    for block in blocks_of(model):
        fully_shard(block, reshard_after_forward=settings.shard == "zero3", **policy)
    fully_shard(model, reshard_after_forward=False, **policy)


def clip(model: nn.Module, limit: float) -> Tensor:
    """Scale the gradients down to a norm of `limit`; returns their norm before that, over all ranks."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def command(settings: Settings) -> None:
    """What the command line asks for; of an error that all ranks know, the first rank alone prints a line."""
    if settings.export:
        return print(export_newest(settings))
    if settings.plan:
        return print(plan_of(settings))
    if not settings.data:
        raise ValueError("--data DIR: a folder of pictures and metadata.jsonl is needed")
    check_device(settings.device)
    join(device_of(settings.device), settings.sharded)
    try:
        on_all(lambda: check(settings, world()))
        torch.set_num_threads(settings.threads)
        return_freed_memory()
        stopped_by = train(settings)
    except SharedError:
        first = not rank()
        leave()
        if first:
            raise
        raise SystemExit(1) from None
    except (ValueError, OSError) as error:
        raise (ValueError(f"rank {rank()}: {error}") if rank() else error) from None
    leave()
    if stopped_by == signal.SIGINT:
        if rank():
            raise SystemExit(INTERRUPTED)
        raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> None:
    run_command(lambda: command(parse(argv)), less="a larger --accumulate, --activations recompute or a smaller --res")


if __name__ == "__main__":
    main()
