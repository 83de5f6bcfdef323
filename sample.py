"""Draw pictures from prompts.

Paper     Diffusion-4K section 9: Euler on the flow ODE, factor 16; SD3 with 28 steps and classifier-free guidance 7.0,
          Flux with 50 steps and its distilled guidance
Method    prompt -> text encoders -> context, pooled
          noise  -> Euler over the shifted schedule -> latent
                    SD3:  velocity = v_empty + cfg * (v_prompt - v_empty), two passes
                    Flux: velocity = v(prompt, guidance), one pass; the guidance is a number that the model is given
          latent -> partitioned VAE -> picture
Run       python sample.py --prompt "a dandelion at sunset"                    tiny-sd3, 1024 px; 2 cores: 8 seconds, 0.5 GiB
          python sample.py --prompt "a dandelion at sunset" --res 4096 --steps 8    2 cores: 3 minutes, 2.2 GiB
          python sample.py --prompt "a dandelion at sunset" --model tiny-flux        the embedded Flux
          python sample.py --prompt "a red panda" --weights sd3 --res 4096      SD3-medium as downloaded, one GPU
          python sample.py --prompt "a red panda" --weights flux --res 4096     Flux-dev as downloaded
Writes    OUT/000-a-dandelion-at-sunset-0.png; its metadata says prompt, seed, settings and model
Units     --res in pixels (width x height); time in s/step; peak memory in GiB
Check     python -m pytest tests/test_sample.py

Picture k of a prompt has the seed SEED + k and noise of its own, drawn on the CPU: it does not depend on what else is drawn.
"""

import argparse
import json
import math
import os
import re
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from checkpoint import DTYPES, Weights, check_device, model_folder, open_weights, writable
from family import Family, find
from flow import draw_noise, euler, flux_mu, velocity_with_cfg
from flux import Flux
from mmdit import MMDiT, check_set
from vae import VAE, to_pixels

SAID = {"steps": int, "cfg": float, "guidance": float, "time_shift": float, "res": str}  # what a model's file may say of sampling
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MOST_SIDE = {".jpg": 65_535, ".jpeg": 65_535, ".webp": 16_383}  # pixels that the format can hold


@dataclass(frozen=True)
class Picture:
    prompt: str
    seed: int
    path: Path


@torch.inference_mode()
def draw(pictures: list[Picture], args: argparse.Namespace, encoded: dict[str, tuple[Tensor, Tensor]], model: MMDiT | Flux,
         vae: VAE, sigmas: Tensor) -> Iterator[tuple[Picture, Tensor, float]]:
    """Yield each picture with its image (3, H, W) in [-1, 1] and the seconds that one step took.

    encoded   prompt -> context (1, L, W), pooled (1, P); the negative prompt is among them
    """
    width, height = args.res
    weight = next(model.parameters())
    for picture in pictures:
        context, pooled = (torch.cat(pair).to(weight) for pair in zip(encoded[picture.prompt], encoded[args.negative], strict=True))
        velocity = velocity_with_cfg(model, context, pooled, args.cfg, args.guidance)
        noise = draw_noise([picture.seed], (model.config.in_channels, height // args.factor, width // args.factor)).to(weight.device)
        began = time.time()
        latent = euler(velocity, noise, sigmas, progress=True)
        finite = bool(latent.isfinite().all())  # waits for the device, so that the clock counts its work
        s_per_step = (time.time() - began) / args.steps
        image = vae.decode(latent.to(weight.dtype), args.factor)[0].float().cpu()
        if not (finite and image.isfinite().all()):
            raise ValueError(f"seed {picture.seed} of {picture.prompt!r} became NaN or Inf: --dtype {args.dtype} overflowed or --cfg "
                             f"{args.cfg} is too large; give --dtype bf16 or fp32, or a smaller --cfg")
        yield picture, image, s_per_step


def write_picture(path: Path, image: Tensor, about: dict[str, object]) -> None:
    """Write an image under a temporary name and rename it; what it is stands in its metadata.

    image   (3, H, W) in [-1, 1]
    about   a PNG keeps each entry as text, JPEG and WebP keep all as JSON in the EXIF image description
    raises  OSError that names the picture if the disk is full or the folder not writable; nothing is left behind
    """
    picture, temporary = Image.fromarray(to_pixels(image)), path.with_name(f".{os.getpid()}.tmp{path.suffix}")
    try:
        if path.suffix.lower() == ".png":
            entries = PngImagePlugin.PngInfo()
            for key, value in about.items():
                entries.add_itxt(key, str(value))
            picture.save(temporary, pnginfo=entries)
        else:
            exif = Image.Exif()
            exif[0x010E] = json.dumps(about)
            picture.save(temporary, quality=95, exif=exif)
        os.replace(temporary, path)
    except (OSError, ValueError) as error:  # ValueError: more than JPEG's metadata holds
        raise OSError(f"{path}: could not be written ({getattr(error, 'strerror', None) or error})") from None
    finally:
        temporary.unlink(missing_ok=True)


def resolution(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:[xX](\d+))?", text)
    if not match or int(match[1]) < 1 or int(match[2] or 1) < 1:
        raise ValueError(f"--res {text!r}: give pixels, as 1024 or, width x height, 3072x4096")
    return int(match[1]), int(match[2] or match[1])


def read_prompts(args: argparse.Namespace) -> list[str]:
    """--prompt, then the lines of --prompts; ValueError or OSError if there is nothing to draw or to read."""
    prompts = list(args.prompt or [])
    if args.prompts:
        try:
            lines = [line.strip() for line in Path(args.prompts).read_text(encoding="utf-8-sig").split("\n") if line.strip()]
        except OSError as error:
            raise OSError(f"--prompts {args.prompts}: {error.strerror}; give a text file with one prompt a line") from None
        except UnicodeDecodeError:
            raise ValueError(f"--prompts {args.prompts}: not UTF-8 text; give a text file with one prompt a line") from None
        if not lines:
            raise ValueError(f"--prompts {args.prompts}: no prompt in it; give a text file with one prompt a line")
        prompts += lines
    if not prompts:
        raise ValueError('nothing to draw: give --prompt "TEXT" or --prompts FILE')
    if args.negative and args.cfg == 1:
        raise ValueError("--negative is what --cfg leads away from, and --cfg 1 does not: give a larger --cfg, or leave it out")
    if any(re.search("[\ud800-\udfff]", prompt) for prompt in (*prompts, args.negative)):  # how Python passes on bytes of another encoding
        raise ValueError("a prompt is not UTF-8 text; set the terminal to UTF-8, or give --prompts FILE")
    return prompts


def name_pictures(prompts: list[str], args: argparse.Namespace) -> list[Picture]:
    """One Picture for every prompt and seed; the place they go to is made and tried here, before any long work."""
    out = Path(args.out)
    if out.suffix.lower() in Image.registered_extensions().keys() - SUFFIXES and not out.is_dir():
        raise ValueError(f"--out {out}: written are {', '.join(SUFFIXES)}; name one of these, or a folder")
    if out.suffix.lower() in SUFFIXES and not out.is_dir():
        if len(prompts) * args.count > 1:
            raise ValueError(f"--out {out} names one file, and {len(prompts) * args.count} pictures are asked for: name a folder")
        pictures, folder = [Picture(prompts[0], args.seed, out)], out.parent
    else:
        def slug(prompt: str) -> str:
            return re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:48].strip("-") or "empty"

        folder = out
        pictures = [Picture(prompt, args.seed + k, out / f"{i:03d}-{slug(prompt)}-{args.seed + k}.png")
                    for i, prompt in enumerate(prompts) for k in range(args.count)]
    most = MOST_SIDE.get(pictures[0].path.suffix.lower(), math.inf)
    if max(args.res) > most:
        raise ValueError(f"--out {out}: such a file ends at {most} px a side, --res is {args.res[0]}x{args.res[1]}; name a .png")
    writable(folder, f"--out {out}")
    return pictures


def settle(args: argparse.Namespace, family: Family, transformer: Weights) -> None:
    """Fill in what the command line left open, from the file's metadata or the family; refuse what cannot be drawn."""
    args.dtype = args.dtype or ("fp32" if args.device == "cpu" else "bf16")
    family.check_guidance(args.guidance)
    if args.mu is not None:
        if not -700 < args.mu < 700:
            raise ValueError(f"--mu {args.mu:g}: give the logarithm of a time shift; Flux-dev takes 0.5 to 3")
        if args.time_shift is not None:
            raise ValueError(f"--mu {args.mu:g} --time-shift {args.time_shift:g}: mu is the logarithm of the time shift; give one of them")
        args.time_shift = math.exp(args.mu)
    for name, kind in SAID.items():
        said = transformer.metadata.get(name, getattr(family, name))
        if getattr(args, name) is None and said is not None:
            try:
                setattr(args, name, kind(float(said)) if kind is not str else str(said))
            except (ValueError, OverflowError):
                raise ValueError(f"{transformer.source}: its metadata says {name} {said!r}; give --{name.replace('_', '-')}") from None
    args.res = resolution(args.res)
    step = 2 * args.factor
    if args.time_shift is None:
        args.time_shift = math.exp(flux_mu(math.prod(args.res) // step**2))
    check_settings(args)
    if not (family.sigmas(args.steps, args.time_shift).diff() < 0).all():
        given = f"--mu {args.mu:g}" if args.mu is not None else f"--time-shift {args.time_shift:g}"
        raise ValueError(f"{given}: leaves no {args.steps} falling levels of noise; give one nearer to {0 if args.mu is not None else 1}")
    if any(side % step for side in args.res):
        raise ValueError(f"--res {args.res[0]}x{args.res[1]}: both sides must be multiples of {step} at --factor {args.factor}")
    most = family.config(transformer.part("model.diffusion_model.")).table_side * step
    if max(args.res) > most:
        raise ValueError(f"--res {args.res[0]}x{args.res[1]}: this model's position table ends at {most} px a side "
                         f"at --factor {args.factor}" + ("; --factor 16 reaches twice as far" if args.factor == 8 else ""))


def check_settings(args: argparse.Namespace) -> None:
    """Refuse a flag out of range: ValueError that says what was given and what is accepted."""
    check_device(args.device)
    for name, fits, accepted in (("steps", args.steps >= 1, "1 or more"), ("count", args.count >= 1, "1 or more"),
                                 ("seed", 0 <= args.seed <= 2**63 - args.count, "0 to 2^63 - count"),
                                 ("cfg", math.isfinite(args.cfg), "a finite number"),
                                 ("guidance", args.guidance is None or 0 <= args.guidance < math.inf, "a number from 0"),
                                 ("time-shift", 0 < args.time_shift < math.inf, "a number above 0")):
        if not fits:
            raise ValueError(f"--{name} {getattr(args, name.replace('-', '_'))}: give {accepted}")


def run(args: argparse.Namespace) -> None:
    """Check, encode, draw, write: every refusal comes before the long work."""
    folder = model_folder(args.model, args.weights)
    family, transformer, vae_path = find(folder, args.transformer)
    settle(args, family, transformer)
    open_weights(vae_path)  # a missing or broken one is named before the text encoders are read
    pictures = name_pictures(read_prompts(args), args)

    dtype = DTYPES[args.dtype]
    text_dtype = torch.bfloat16 if dtype == torch.float16 else dtype  # T5 overflows in fp16
    text = family.text.load(folder, args.device, text_dtype, family.t5_length)
    # one at a time: rounding differs with the batch, and a picture must not
    encoded = {prompt: text.encode([prompt]) for prompt in dict.fromkeys([args.negative, *(p.prompt for p in pictures)])}
    del text  # T5-XXL is larger than what comes
    model, vae = family.model.load(transformer.source, args.device, dtype), VAE.load(vae_path, args.device, dtype)
    check_set(model.config, *encoded[args.negative], vae.config.latent_channels)
    for picture, image, s_per_step in draw(pictures, args, encoded, model, vae, family.sigmas(args.steps, args.time_shift)):
        write_picture(picture.path, image, {
            "prompt": picture.prompt, "negative": args.negative, "seed": picture.seed, "model": transformer.source,
            "res": f"{args.res[0]}x{args.res[1]}", "factor": args.factor, "steps": args.steps, "cfg": args.cfg,
            **({} if args.guidance is None else {"guidance": args.guidance}),
            "time_shift": args.time_shift, "dtype": args.dtype, "software": "diffusion-4k"})
        cpu = args.device == "cpu"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 if cpu else torch.cuda.max_memory_allocated(args.device) / 2**30
        print(f"{picture.path}  {s_per_step:.2f} s/step  peak {peak:.1f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument_group("what").add_argument
    add("--prompt", action="append", metavar="TEXT", help="may be given several times")
    add("--prompts", metavar="FILE", help="one prompt a line")
    add("--negative", default="", metavar="TEXT", help="what cfg leads away from (default: the empty prompt)")
    add("--res", metavar="PX", help="side in pixels, or WIDTHxHEIGHT; multiples of 32 at factor 16 (1024)")
    add("--seed", type=int, default=0, help="of the first picture of each prompt (default: 0)")
    add("--count", type=int, default=1, help="pictures a prompt, with seeds SEED, SEED+1 ... (default: 1)")
    add("--out", default="out", metavar="DIR",
        help="folder, or the name of one .png, .jpg or .webp; a picture of the same prompt and seed there is replaced (default: out)")
    add = parser.add_argument_group("model").add_argument
    add("--model", default="tiny-sd3", metavar="NAME", help="folder in models/ (default: tiny-sd3)")
    add("--weights", metavar="DIR", help="another model folder, as downloaded")
    add("--transformer", metavar="FILE", help="this transformer instead of the folder's, as train.py wrote it")
    add = parser.add_argument_group("sampling (left out: what the model's file says, else what SD3 or Flux wants)").add_argument
    add("--steps", type=int, help="Euler steps (SD3: 28, Flux-dev: 50, Flux-schnell: 4)")
    add("--cfg", type=float, help="classifier-free guidance; 1 is none and twice as fast (SD3: 7.0, Flux: 1)")
    add("--guidance", type=float, help="the number that Flux-dev is given (3.5); other models have no such input")
    add("--time-shift", type=float,
        help="of the schedule; above 1 spends more steps on noise (SD3: 3.0, Flux-dev: by the number of tokens, Flux-schnell: 1)")
    add("--mu", type=float, help="the logarithm of the time shift, as Flux counts it")
    add("--factor", type=int, default=16, choices=(8, 16), help="of the VAE: 8 as published, 16 partitioned (default: 16)")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:1 (default: cuda where there is one)")
    add("--dtype", choices=tuple(DTYPES), help="of the arithmetic (default: bf16 on cuda, fp32 on cpu)")
    args = parser.parse_args()
    try:
        run(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except torch.OutOfMemoryError:
        raise SystemExit("error: the GPU's memory is too small for this; give a smaller --res, --dtype bf16, or --device cpu") from None


if __name__ == "__main__":
    main()
