"""Draw pictures from prompts.

Paper     Diffusion-4K section 9: Euler on the flow ODE, factor 16; SD3 28 steps with cfg 7.0, Flux 50 with guidance 3.5
Method    prompt -> text encoders -> context, pooled
          noise  -> Euler over the shifted schedule -> latent
                    SD3:  velocity = v_negative + cfg * (v_prompt - v_negative), two passes
                    Flux: velocity = v(prompt, guidance), one pass; the guidance is an input of the model
          latent -> partitioned VAE -> picture
Run       python sample.py --prompt "a dandelion at sunset"                    tiny-sd3, 1024 px; 2 cores: 8 s, 0.5 GiB
          python sample.py --prompt "a dandelion at dawn" --res 4096                                3 minutes, 2.6 GiB
          python sample.py --prompt "a dandelion at noon" --model tiny-flux                         the embedded Flux
          python sample.py --prompt "a red panda" --weights sd3 --res 4096      SD3-medium as downloaded, one GPU
          python sample.py --prompt "snow" --from photo.jpg --res 2048          redraws a picture larger
          python sample.py --prompts aesthetic-4k/metadata.jsonl --weights sd3  one picture per line, named as there
          torchrun --nproc-per-node 8 sample.py --prompts …                     each card draws its share
Seeds     picture k = 0, 1 … of a prompt has the seed SEED + k and its own noise, independent of all other pictures
Stages    beyond the size that the file was trained at: small first, then enlarged and redrawn (drawing/stages.py)
Says      what is drawn from which files and settings, before it begins
Keeps     pictures of other prompts and settings: a new one gets a free name; the latent of one whose decode fails
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
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from checkpoint import DTYPES, model_folder, open_weights, save
from drawing.pictures import (
    Picture,
    check_records,
    in_the_way,
    name_pictures,
    read_prompts,
    records_of,
    write_picture,
)
from drawing.settings import Settings, parse, settle, summary
from drawing.stages import Stage, resized, stages_of
from family import Family, check_widths, find, fingerprint, positioned, vae_for
from files import check_path, launched, memory_error, printable, run_command
from flow import SOLVERS, draw_noise, interpolate, velocity_with_cfg
from flux import Flux
from layers import blocks_of
from machine.memory import free_memory, peak_memory_gib
from machine.ranks import first_failure, join, leave
from mmdit import MMDiT
from reading.pictures import read_picture, upright_size
from vae import VAE, to_image

WIDER = {"fp16": ("fp16", "bf16", "fp32"), "bf16": ("bf16", "fp32"), "fp32": ("fp32",)}  # dtypes to decode in


def run(given: Settings) -> None:
    """Prompt -> text -> noise -> Euler with cfg -> decode -> file. Arguments and files are checked first."""
    for name in ("model", "weights", "transformer", "vae", "prompts", "redraw", "out"):
        if (value := getattr(given, name)) is not None:
            check_path("from" if name == "redraw" else name, value)
    folder = model_folder(given.model, given.weights)
    family, transformer, vae_path = find(folder, given.transformer)
    settings = settle(given, family, transformer)
    vae_path = Path(given.vae) if given.vae else vae_for(folder, vae_path, settings.factor)
    open_weights(vae_path)  # a missing or broken file is named before the text encoders are read
    redrawn = to_image(np.array(read_picture(settings.redraw))) if settings.redraw else None
    files = {"weights": transformer.source, "vae": vae_path, "from": settings.redraw}
    about = partial(records_of, settings, Path(transformer.source),
                    {name: fingerprint(file) for name, file in files.items() if file})
    pictures = check_records(name_pictures(read_prompts(settings), settings), about)
    rank, ranks = launched()
    if rank == 0:
        print(summary(given, settings, family, transformer, vae_path), flush=True)
    if settings.together:
        join(torch.device(settings.device), sharded=False)
    elif not (pictures := pictures[rank::ranks]):
        return

    encoded = encode([settings.negative, *(picture.prompt for picture in pictures)], settings, folder, family)
    free_memory()  # of the text encoders
    model = family.model.load(transformer.source, settings.device, DTYPES[settings.dtype])
    model.config = positioned(model.config, settings.positions, settings.trained_side)
    model.sequence = dist.group.WORLD  # None without --together
    if settings.compile:
        for block in blocks_of(model):
            block.compile()
    vae_in = cache(lambda dtype: VAE.load(vae_path, settings.device, DTYPES[dtype], fallback=family.latent_scale,
                                          offset=settings.offset))
    check_widths(model.config, *encoded[settings.negative], vae_in(settings.vae_dtype).config)
    stages, failures = plan_stages(settings, family), []
    for picture in pictures:
        latent, image, failure, s_per_step = draw(picture, settings, encoded, model, vae_in, stages, redrawn)
        if settings.together and rank:  # the first rank writes
            continue
        if failure := failure or in_the_way(picture.path, about(picture)):  # another run may have drawn there since
            failures.append(failed(picture, latent, failure, about(picture), settings))
            continue
        write_picture(picture.path, image, about(picture))
        print(f"{picture.path}  {s_per_step:.2f} s/step  peak {peak_memory_gib(settings.device):.1f} GiB")
    leave()
    for failure in failures[:-1]:
        print(f"error: {printable(failure)}", file=sys.stderr)
    if failures:
        raise ValueError(failures[-1])


def plan_stages(settings: Settings, family: Family) -> list[Stage]:
    """The stages of every picture; a time shift by tokens is that of each stage."""
    step = 2 * settings.factor
    by_tokens = settings.time_shift == family.by_tokens(math.prod(settings.size) // step**2)

    def schedule(tokens: int) -> Tensor:
        return family.sigmas(settings.steps, family.by_tokens(tokens) if by_tokens else settings.time_shift)

    first = None if settings.first == "none" else int(settings.first)
    if settings.redraw:
        first = math.sqrt(math.prod(upright_size(settings.redraw)))
    return stages_of(settings.size, first, settings.start, step, schedule, bool(settings.redraw))


def encode(prompts: list[str], settings: Settings, folder: Path, family: Family) -> dict[str, tuple[Tensor, Tensor]]:
    """Prompt -> context (1, L, C), pooled (1, P). The encoders are freed on return: T5-XXL is large."""
    dtype = torch.bfloat16 if settings.dtype == "fp16" else DTYPES[settings.dtype]  # T5 overflows in fp16
    text = family.text.load(folder, settings.device, dtype, settings.t5_length)
    # one at a time: batching changes rounding, and a picture must not depend on the other prompts
    return {prompt: tuple(part.cpu() for part in text.encode([prompt])) for prompt in dict.fromkeys(prompts)}


@torch.inference_mode()
def draw(picture: Picture, settings: Settings, encoded: dict[str, tuple[Tensor, Tensor]], model: MMDiT | Flux,
         vae_in: Callable[[str], VAE], stages: list[Stage], image: Tensor | None,
         ) -> tuple[Tensor, Tensor | None, str, float]:
    """The last latent (1, C, h, w), fp32; its image, or None and why there is none; the seconds per step.

    image  (3, H, W) in [-1, 1], which the first stage redraws; None: that stage draws from noise
    """
    factor, seconds = settings.factor, 0.0
    weight = next(model.parameters())       # for its device and dtype
    pairs = zip(encoded[picture.prompt], encoded[settings.negative], strict=True)
    context, pooled = (torch.cat(pair).to(weight) for pair in pairs)                              # (2, L, C), (2, P)
    velocity = velocity_with_cfg(model, context, pooled, settings.cfg, settings.guidance)
    for stage in stages:
        shape = model.config.in_channels, stage.height // factor, stage.width // factor
        latent = draw_noise([picture.seed], shape).to(weight.device)
        if image is not None:               # redrawn from the picture of the stage before, or from the given one
            vae, start = vae_in(settings.vae_dtype), stage.sigmas[:1].to(weight.device)
            before = resized(image[None], stage).to(weight.device, DTYPES[settings.vae_dtype])
            before = vae.encode(before, factor).float()
            latent = interpolate(before, latent, start)
        began = time.perf_counter()
        if len(stage.sigmas) > 1:
            # fp32 around a bf16 model
            latent = SOLVERS[settings.solver](velocity, latent, stage.sigmas, progress=not launched()[0])
        latent = latent.cpu()               # waits for the device
        seconds += time.perf_counter() - began
        image, failure = decode(latent, settings, vae_in)
        failure = first_failure(failure)
        if failure:
            break
    return latent, image, failure, seconds / max(1, sum(len(stage.sigmas) - 1 for stage in stages))


@torch.inference_mode()
def decode(latent: Tensor, settings: Settings, vae_in: Callable[[str], VAE]) -> tuple[Tensor | None, str]:
    """An image (3, H, W) in [-1, 1], or None and why there is none. Where a VAE overflows, a wider dtype is tried."""
    if not latent.isfinite().all():
        return None, "overflow"
    for dtype in WIDER[settings.vae_dtype]:
        try:
            image = vae_in(dtype).decode(latent.to(settings.device, DTYPES[dtype]), settings.factor)[0].float().cpu()
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not memory_error(error):
                raise
            return None, "the VAE ran out of memory, give a smaller --res"
        if image.isfinite().all():
            if dtype != settings.vae_dtype:
                print(f"note: the VAE overflowed in {settings.vae_dtype}: decoded in {dtype}", file=sys.stderr)
            return image, ""
    return None, f"the VAE overflowed in {', '.join(WIDER[settings.vae_dtype])}"


def failed(picture: Picture, latent: Tensor, reason: str, records: dict[str, object], settings: Settings) -> str:
    """The line about a picture that could not be drawn. If only its decode failed, the latent is written beside it."""
    if reason == "overflow":
        return (f"seed {picture.seed} of {picture.prompt[:200]!r} became NaN or Inf: --cfg {settings.cfg} is too large,"
                f" {settings.dtype} too narrow or a file damaged; give a smaller --cfg, or --dtype bf16 or fp32")
    save(file := picture.path.with_suffix(".latent.safetensors"), {"latent": latent}, records)
    return f"{picture.path}: {reason}; the finished latent is kept in {file}, for VAE.decode of vae.py"


def main(argv: Sequence[str] | None = None) -> None:
    run_command(lambda: run(parse(argv)))


if __name__ == "__main__":
    main()
