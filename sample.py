"""Draw pictures from prompts.

Paper     Diffusion-4K section 9: Euler on the flow ODE, factor 16; SD3 28 steps with cfg 7.0, Flux 50 with guidance 3.5
Method    prompt -> text encoders -> context, pooled
          noise  -> Euler over the shifted schedule -> latent
                    SD3:  velocity = v_negative + cfg * (v_prompt - v_negative), two passes
                    Flux: velocity = v(prompt, guidance), one pass; the guidance is an input of the model
          latent -> partitioned VAE -> picture
Run       python sample.py --prompt "a dandelion at sunset"                    tiny-sd3, 1024 px; 2 cores: 8 s, 0.5 GiB
          python sample.py --prompt "a dandelion at dawn" --res 4096                                3 minutes, 1.3 GiB
          python sample.py --prompt "a dandelion at noon" --model tiny-flux                         the embedded Flux
          python sample.py --prompt "a red panda" --weights sd3 --res 4096      SD3-medium as downloaded, one GPU
          python sample.py --prompt "…" --weights flux --res 4096 --memory 8    what does not fit is read when needed
          python sample.py --plan --model flux --res 4096 --memory 8            what that takes; needs no files
          python sample.py --prompt "snow" --from photo.jpg --res 2048          redraws a picture larger
          python sample.py --prompts aesthetic-4k/metadata.jsonl --weights sd3  one picture per line, named as there
          torchrun --nproc-per-node 8 sample.py --prompts …                     each card draws its share
          torchrun --nproc-per-node 8 sample.py --together --prompt …           all cards draw one picture
Seeds     picture k = 0, 1 … of a prompt has the seed SEED + k and its own noise, independent of all other pictures
Stages    beyond the size that the file was trained at: small first, then enlarged and redrawn (drawing/stages.py)
Memory    modulations before the loop, blocks beyond the memory streamed (drawing/streaming.py, drawing/plan.py)
Says      what is drawn from which files and settings, before it begins
Keeps     pictures of other prompts and settings: a new one gets a free name; a latent until its picture is written
Check     python -m pytest tests/test_sample.py
"""

if __name__ == "__main__":
    import os

    import files
    files.end_on_interrupt()  # Ctrl-C during the import of torch ends in one line
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # torch reads it; fewer holes in GPU memory

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from checkpoint import DTYPES, Overflow, Weights, check_names, model_folder, open_weights
from drawing.pictures import (
    Picture,
    groups,
    in_the_way,
    keep_latent,
    kept_latent,
    latent_file,
    name_pictures,
    not_drawn,
    other_latent,
    read_prompts,
    records_by,
    with_free_names,
    write_picture,
)
from drawing.plan import MOST_AT_ONCE, Plan, choose
from drawing.settings import Settings, parse, settle, summary
from drawing.stages import Stage, resized, stages_of
from drawing.streaming import finish, hoist, streamed
from family import OFFICIAL_VAE, Family, check_widths, find, positioned, published, vae_for
from files import check_path, launched, memory_error, printable, run_command
from flow import SOLVERS, draw_noise, interpolate, velocity_with_cfg
from flux import Flux, FluxConfig
from layers import blocks_of
from lora import with_lora
from machine.memory import free_memory, peak_shown, return_freed_memory
from machine.ranks import gathered, join, leave
from mmdit import MMDiT, MMDiTConfig
from reading.pictures import read_picture, upright_size
from vae import VAE, VAEConfig, read_config, read_scale, to_image

WIDER = {"fp16": ("fp16", "bf16", "fp32"), "bf16": ("bf16", "fp32"), "fp32": ("fp32",)}  # dtypes of the VAE


@dataclass(frozen=True)
class Job:
    """What is drawn and with what, complete before long work begins."""

    settings: Settings
    family: Family
    folder: Path
    transformer: Weights
    config: MMDiTConfig | FluxConfig
    vae: Path | None              # None: as published, for --plan
    vae_config: VAEConfig
    stages: list[Stage]
    plan: Plan
    redrawn: Tensor | None        # (3, H, W) in [-1, 1], of --from


def run(given: Settings) -> None:
    """Prompt -> text -> noise -> Euler with cfg -> decode -> file. Arguments and files are checked first."""
    job = prepared(given)
    settings = job.settings
    if job.plan.rows:  # a small model on a CPU has no plan: it would lose a quarter of its speed
        return_freed_memory()
    about = summary(given, settings, job.family, job.transformer, job.vae)
    if settings.plan:
        return print(f"{about}\n{job.plan.table()}")
    records = records_by(settings, job.folder, job.transformer, job.vae)
    pictures = with_free_names(name_pictures(read_prompts(settings), settings), records)
    rank, ranks = launched()
    if settings.together:  # ranks do the same: by the plan of the one with the least memory, on the first one's files
        join(torch.device(settings.device), sharded=False)
        job = replace(job, plan=min(gathered(job.plan), key=lambda plan: plan.memory))
    plan, own = job.plan, pictures if settings.together else pictures[rank::ranks]
    if rank == 0:
        print(f"{about}\n{plan.described()}" if plan.rows else about, flush=True)

    models, failures = models_of(job), []
    for some in groups(gathered(not_drawn(own, records, settings))[0], MOST_AT_ONCE):
        kept = finished(some, records, job.config.in_channels)
        left = [picture.prompt for picture in some if picture not in kept]
        models.drop()  # the text encoders take their place
        encoded = encode([settings.negative] * (settings.cfg != 1) + left, job) if left else {}
        begin = None, ""
        if left and settings.redraw:
            begin = enlarged(job.redrawn, "", job.stages[0], settings, models)
            models.release()
        for group in groups(some, 1 if plan.stays else MOST_AT_ONCE):
            for picture, image, failure, s_per_step in draw(group, job, encoded, kept, begin, models, records):
                if settings.follows:
                    continue
                if failure := failure or in_the_way(picture.path, records(picture)):  # another run may have drawn there
                    failures.append(failed(picture, failure, settings, records(picture)))
                    continue
                write_picture(picture.path, image, records(picture))
                pace = f"{s_per_step:.2f} s/step" if picture not in kept else "from its latent"
                print(f"{picture.path}  {pace}  {peak_shown(settings.device)}")
    leave()
    for failure in failures[:-1]:
        print(f"error: {printable(failure)}", file=sys.stderr)
    if failures:
        raise ValueError(failures[-1])


def prepared(given: Settings) -> Job:
    """Open the weights, unread, and settle what was not given; ValueError or OSError if that cannot be."""
    for name in ("model", "weights", "transformer", "vae", "prompts", "redraw", "out"):
        if (value := getattr(given, name)) is not None:
            check_path("from" if name == "redraw" else name, value)
    for adapter in given.lora:
        check_path("lora", adapter)
    folder, vae, vae_config = model_folder(given.model, given.weights), None, OFFICIAL_VAE
    own = given.transformer or given.vae or given.lora
    if given.plan and not own and (known := published(given.model, given.weights)):
        (family, config), transformer = known, Weights({}, {}, "as published")
    else:
        family, transformer, vae = find(folder, given.transformer)
        transformer = with_lora(transformer, given.lora)
        config = family.config(transformer.part("model.diffusion_model."))
    settings = settle(given, family, transformer, config)
    config, stages = positioned(config, settings.positions, settings.trained_side), stages_for(settings, family)
    if vae:  # a missing or broken file is named before the text encoders are read
        vae = Path(given.vae) if given.vae else vae_for(folder, vae, settings.factor)
        vae_config = checked_vae_config(family, config, transformer, open_weights(vae))
    plan = choose(settings, family, config, vae_config, stages)
    if settings.compile and (plan.resident is not None or settings.store):
        raise ValueError("--compile: needs all blocks in memory as --dtype; leave it out, or give more --memory and no "
                         "--store")
    redrawn = to_image(np.array(read_picture(settings.redraw))) if settings.redraw else None
    return Job(settings, family, folder, transformer, config, vae, vae_config, stages, plan, redrawn)


def checked_vae_config(family: Family, config: MMDiTConfig | FluxConfig, transformer: Weights,
                       vae: Weights) -> VAEConfig:
    """Check both files against their models; return the VAE's configuration."""
    part = vae.part("first_stage_model.")
    vae_config = read_config(part)
    with torch.device("meta"):
        check_names(family.model(config), transformer.part("model.diffusion_model."))
        check_names(VAE(vae_config), part)
    read_scale(vae, fallback=family.latent_scale)
    return vae_config


def stages_for(settings: Settings, family: Family) -> list[Stage]:
    """The stages of every picture; a time shift by tokens is that of each stage."""
    def schedule(tokens: int) -> Tensor:
        return family.sigmas(settings.steps, family.by_tokens(tokens) if settings.mu is None else settings.time_shift)

    first = None if settings.first == "none" else int(settings.first)
    if settings.redraw:
        first = math.sqrt(math.prod(upright_size(settings.redraw)))
    return stages_of(settings.size, first, settings.start, settings.token_px, schedule, bool(settings.redraw))


def finished(pictures: list[Picture], records: Callable[[Picture], dict],
             channels: int) -> dict[Picture, Tensor | None]:
    """The latents that an earlier run kept of these pictures; with --together, on all ranks those of the first one."""
    latents = {picture: kept_latent(picture.path, records(picture), channels) for picture in pictures}
    return {picture: latents[picture] for picture in gathered([p for p in pictures if latents[p] is not None])[0]}


def encode(prompts: list[str], job: Job) -> dict[str, tuple[Tensor, Tensor]]:
    """Prompt -> context (1, L, C), pooled (1, P). T5 is read block by block, for all prompts; nothing of it stays."""
    settings, prompts = job.settings, list(dict.fromkeys(prompts))
    dtype = torch.bfloat16 if settings.dtype == "fp16" else DTYPES[settings.dtype]  # T5 overflows in fp16
    text = job.family.text.load(job.folder, settings.device, dtype, settings.t5_length, partial(streamed, resident=1))
    context, pooled = (part.cpu() for part in text.encode(prompts))
    finish(text.t5)
    del text
    free_memory()
    check_widths(job.config, context, pooled, job.vae_config)
    return dict(zip(prompts, zip(context.split(1), pooled.split(1), strict=True), strict=True))


@dataclass(frozen=True)
class Models:
    """The transformer and the VAE, each read when it is first needed."""

    transformer: Callable[[], MMDiT | Flux]  # by functools.cache, as the next
    vae: Callable[[str], VAE]                # of a dtype
    stay: bool

    def release(self) -> None:
        """After a phase: let go of both, unless the memory holds them beside each other."""
        if not self.stay:
            self.drop()

    def drop(self) -> None:
        """Let go of both, once no block is being read ahead."""
        if self.transformer.cache_info().currsize:
            finish(self.transformer())
        self.transformer.cache_clear()
        self.vae.cache_clear()
        free_memory()


def models_of(job: Job) -> Models:
    """The models of a job, each read once until it is released."""
    settings = job.settings

    def transformer() -> MMDiT | Flux:
        weights = job.transformer.part("model.diffusion_model.")
        model = streamed(lambda: job.family.model(job.config), weights, settings.device, DTYPES[settings.dtype],
                         job.plan.resident, settings.store == "fp8")
        model.sequence = dist.group.WORLD  # None without --together
        for block in blocks_of(model) if settings.compile else ():
            block.compile()
        return model

    def vae(dtype: str) -> VAE:
        return VAE.load(job.vae, settings.device, DTYPES[dtype], fallback=job.family.latent_scale,
                        offset=settings.offset)

    return Models(cache(transformer), cache(vae), job.plan.stays)


class Drawn(NamedTuple):
    picture: Picture
    image: Tensor | None  # (3, H, W) in [-1, 1]
    failure: str          # why there is none
    s_per_step: float


def draw(pictures: list[Picture], job: Job, encoded: dict[str, tuple[Tensor, Tensor]], kept: dict[Picture, Tensor],
         begin: tuple[Tensor | None, str], models: Models, records: Callable[[Picture], dict]) -> Iterator[Drawn]:
    """Draw pictures stage by stage. A finished latent is kept in a file until its picture is written.

    kept   the latents of an earlier run: these pictures are only decoded
    begin  the latent that the first stage redraws, or why there is none; None and "": it draws from noise
    """
    settings, stages, seconds = job.settings, job.stages, dict.fromkeys(pictures, 0.0)
    steps = max(1, sum(len(stage.sigmas) - 1 for stage in stages))
    begins = {picture: begin for picture in pictures if picture not in kept}
    for stage, following in zip(stages, [*stages[1:], None], strict=True):
        drawn = {}
        for picture, (before, failure) in begins.items():
            if failure:
                yield Drawn(picture, None, failure, seconds[picture] / steps)
                continue
            models.transformer()  # read before the clock starts
            began = time.perf_counter()
            drawn[picture] = sample(picture, before, stage, encoded, job, models.transformer())
            seconds[picture] += time.perf_counter() - began
            if not following and not settings.follows and drawn[picture].isfinite().all():
                keep_latent(picture.path, drawn[picture], records(picture))
        models.release()
        if following:
            begins = {picture: enlarged(*decode(latent, settings, models), following, settings, models)
                      for picture, latent in drawn.items()}
            models.release()
    latents = {picture: kept[picture] for picture in pictures if picture in kept} | drawn
    for picture, latent in () if settings.follows else latents.items():
        yield Drawn(picture, *decode(latent, settings, models), seconds[picture] / steps)
    models.release()


@torch.inference_mode()
def sample(picture: Picture, before: Tensor | None, stage: Stage, encoded: dict[str, tuple[Tensor, Tensor]], job: Job,
           model: MMDiT | Flux) -> Tensor:
    """A latent (1, C, h, w), fp32 on the CPU.

    before  (1, C, h, w), of the enlarged picture, which is redrawn; None: drawn from noise
    """
    settings, weight = job.settings, next(model.parameters())  # for its device and dtype
    prompts = [picture.prompt, settings.negative][:1 if settings.cfg == 1 else 2]
    texts = zip(*(encoded[prompt] for prompt in prompts), strict=True)
    context, pooled = (torch.cat(text).to(weight) for text in texts)                          # (2, L, C), (2, P)
    shape = job.config.in_channels, stage.height // settings.factor, stage.width // settings.factor
    latent, start = draw_noise([picture.seed], shape).to(weight.device), stage.sigmas[:1].to(weight.device)
    if before is not None:
        latent = interpolate(before.to(weight.device), latent, start)
    if len(stage.sigmas) > 1:
        guidance = None if settings.guidance is None else start.new_full((len(prompts),), settings.guidance)
        pooled = hoist(model, stage.sigmas[:-1], pooled, guidance)
        velocity = velocity_with_cfg(model, context, pooled, settings.cfg, settings.guidance, job.plan.batched)
        # latent and path are fp32 around a bf16 model
        latent = SOLVERS[settings.solver](velocity, latent, stage.sigmas, progress=not launched()[0])
    return latent.cpu()                                                                       # waits for the device


def enlarged(image: Tensor | None, failure: str, stage: Stage, settings: Settings,
             models: Models) -> tuple[Tensor | None, str]:
    """The latent (1, C, h, w) of an image (3, H, W) at the size of a stage, or None and why there is none.

    failure  why there is no image
    """
    latent = None
    if not failure:
        latent, failure = by_vae(VAE.encode, resized(image[None], stage), settings, models)
    return latent, next(filter(None, gathered(failure)), "")  # the first rank's that has one: all go the same way


def decode(latent: Tensor, settings: Settings, models: Models) -> tuple[Tensor | None, str]:
    """An image (3, H, W) in [-1, 1], or None and why there is none."""
    images, failure = by_vae(VAE.decode, latent, settings, models)
    return None if failure else images[0], failure


@torch.inference_mode()
def by_vae(work: Callable[[VAE, Tensor, int], Tensor], given: Tensor, settings: Settings,
           models: Models) -> tuple[Tensor | None, str]:
    """What VAE.encode or VAE.decode makes of a tensor, fp32 on the CPU, or None and why there is none.

    Where the weights or the result overflow, a wider dtype is tried.
    """
    if not given.isfinite().all():
        return None, "overflow"
    for dtype in WIDER[settings.vae_dtype]:
        try:
            result = work(models.vae(dtype), given.to(settings.device, DTYPES[dtype]), settings.factor).float().cpu()
        except Overflow:
            continue
        except (MemoryError, RuntimeError) as error:
            if not memory_error(error):
                raise
            return None, "the VAE ran out of memory, give a smaller --res"
        if result.isfinite().all():
            if dtype != settings.vae_dtype:
                print(f"note: the VAE overflowed in {settings.vae_dtype}; {dtype} was taken", file=sys.stderr)
            return result, ""
    return None, f"the VAE overflowed in {', '.join(WIDER[settings.vae_dtype])}"


def failed(picture: Picture, reason: str, settings: Settings, records: dict) -> str:
    """The line about a picture that could not be drawn."""
    if reason == "overflow":
        strong = f"--cfg {settings.cfg}" + " or the strength of --lora" * bool(settings.lora)
        return (f"seed {picture.seed} of {picture.prompt[:200]!r} became NaN or Inf: {strong} is too large, "
                f"{settings.dtype} too narrow or a file damaged; give a smaller --cfg, or --dtype bf16 or fp32")
    if not other_latent(picture.path, records):
        reason += f"; the finished latent is kept in {latent_file(picture.path)}"
        reason += "" if picture.path.exists() else ", from which the same command resumes"
    return f"{picture.path}: {reason}"


def main(argv: Sequence[str] | None = None) -> None:
    run_command(lambda: run(parse(argv)), less="a smaller --memory, --store fp8 or a smaller --res")


if __name__ == "__main__":
    main()
