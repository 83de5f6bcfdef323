"""Draw pictures from prompts.

Paper     Diffusion-4K section 9: Euler on the flow ODE, factor 16; SD3 28 steps with cfg 7.0, Flux 50 with guidance 3.5
Method    prompt -> text encoders -> context, pooled
          noise  -> Euler over the shifted schedule -> latent
                    SD3:  velocity = v_negative + cfg * (v_prompt - v_negative), two passes
                    Flux: velocity = v(prompt, guidance), one pass; the guidance is an input of the model
          latent -> partitioned VAE -> picture
Run       python sample.py --prompt "a dandelion at sunset"                    tiny-sd3, 1024 px; 2 cores: 8 s, 0.5 GiB
          python sample.py --prompt "a dandelion at sunset" --res 4096 --steps 8                    3 minutes, 2.2 GiB
          python sample.py --prompt "a dandelion at sunset" --model tiny-flux                       the embedded Flux
          python sample.py --prompt "a red panda" --weights sd3 --res 4096      SD3-medium as downloaded, one GPU
Seeds     picture k = 0, 1 … of a prompt has the seed SEED + k and its own noise, independent of all other pictures
Check     python -m pytest tests/test_sample.py
"""

import argparse
import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from checkpoint import DTYPES, Weights, check_device, model_folder, open_weights, peak_memory_gib
from family import Family, check_widths, find
from files import need, replacing, writable
from flow import draw_noise, euler, flux_mu, velocity_with_cfg
from flux import Flux
from mmdit import MMDiT
from vae import VAE, to_pixels

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MOST_SIDE = {".jpg": 65_535, ".jpeg": 65_535, ".webp": 16_383}  # pixels that the format can hold


@dataclass(frozen=True)
class Settings:
    """What is drawn and how: the command line. None means not given; settle() fills it in."""

    prompt: list[str]
    prompts: str | None
    negative: str
    res: str | None           # pixels: side, or WIDTHxHEIGHT
    seed: int                 # of the first picture of each prompt
    count: int                # pictures per prompt
    out: str                  # folder, or the name of one picture
    model: str                # folder in models/
    weights: str | None       # another model folder, as downloaded
    transformer: str | None   # instead of that folder's
    steps: int | None
    cfg: float | None
    guidance: float | None    # None after settle(): the model has no such input
    time_shift: float | None
    mu: float | None
    factor: int
    device: str | None
    dtype: str | None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        match = re.fullmatch(r"(\d+)(?:[xX](\d+))?", self.res)
        if not match or int(match[1]) < 1 or int(match[2] or 1) < 1:
            raise ValueError(f"--res {self.res!r}: give pixels, as 1024 or, width x height, 3072x4096")
        return int(match[1]), int(match[2] or match[1])


@dataclass(frozen=True)
class Picture:
    prompt: str
    seed: int
    path: Path


def run(settings: Settings) -> None:
    """Prompt -> text -> noise -> Euler with cfg -> decode -> file. Arguments and files are checked first."""
    folder = model_folder(settings.model, settings.weights)
    family, transformer, vae_path = find(folder, settings.transformer)
    settings = settle(settings, family, transformer)
    open_weights(vae_path)  # a missing or broken file is named before the text encoders are read
    pictures = name_pictures(read_prompts(settings), settings)

    encoded = encode([settings.negative, *(picture.prompt for picture in pictures)], settings, folder, family)
    dtype = DTYPES[settings.dtype]
    model = family.model.load(transformer.source, settings.device, dtype)
    vae = VAE.load(vae_path, settings.device, dtype)
    check_widths(model.config, *encoded[settings.negative], vae.config.latent_channels)
    sigmas = family.sigmas(settings.steps, settings.time_shift)
    for picture in pictures:
        image, s_per_step = draw(picture, settings, encoded, model, vae, sigmas)
        write_picture(picture, image, settings, transformer.source)
        print(f"{picture.path}  {s_per_step:.2f} s/step  peak {peak_memory_gib(settings.device):.1f} GiB")


def encode(prompts: list[str], settings: Settings, folder: Path, family: Family) -> dict[str, tuple[Tensor, Tensor]]:
    """Prompt -> context (1, L, C), pooled (1, P). The encoders are freed on return: T5-XXL is large."""
    dtype = torch.bfloat16 if settings.dtype == "fp16" else DTYPES[settings.dtype]  # T5 overflows in fp16
    text = family.text.load(folder, settings.device, dtype, family.t5_length)
    # one at a time: batching changes rounding, and a picture must not depend on the other prompts
    return {prompt: text.encode([prompt]) for prompt in dict.fromkeys(prompts)}


@torch.inference_mode()
def draw(picture: Picture, settings: Settings, encoded: dict[str, tuple[Tensor, Tensor]], model: MMDiT | Flux, vae: VAE,
         sigmas: Tensor) -> tuple[Tensor, float]:
    """An image (3, H, W) in [-1, 1], and the seconds per step."""
    (width, height), factor = settings.size, settings.factor
    weight = next(model.parameters())       # for its device and dtype
    pairs = zip(encoded[picture.prompt], encoded[settings.negative], strict=True)
    context, pooled = (torch.cat(pair).to(weight) for pair in pairs)                              # (2, L, C), (2, P)
    velocity = velocity_with_cfg(model, context, pooled, settings.cfg, settings.guidance)
    noise = draw_noise([picture.seed], (model.config.in_channels, height // factor, width // factor)).to(weight.device)
    began = time.time()
    latent = euler(velocity, noise, sigmas, progress=True)                 # (1, 16, h, w), fp32 around a bf16 model
    finite = bool(latent.isfinite().all())  # waits for the device, so that the clock counts its work
    s_per_step = (time.time() - began) / settings.steps
    image = vae.decode(latent.to(weight.dtype), factor)[0].float().cpu()
    if not (finite and image.isfinite().all()):
        raise ValueError(
            f"seed {picture.seed} of {picture.prompt!r} became NaN or Inf: --dtype {settings.dtype} overflowed or "
            f"--cfg {settings.cfg} is too large; give --dtype bf16 or fp32, or a smaller --cfg")
    return image, s_per_step


def write_picture(picture: Picture, image: Tensor, settings: Settings, model: str) -> None:
    """Write an image (3, H, W) in [-1, 1] under a temporary name and rename it.

    Its metadata record how it was drawn: a PNG as text entries, JPEG and WebP as JSON in the EXIF image description.
    OSError that names the picture if the disk is full or the folder not writable; nothing is left behind.
    """
    width, height = settings.size
    about = {"prompt": picture.prompt, "negative": settings.negative, "seed": picture.seed, "model": model,
             "res": f"{width}x{height}", "factor": settings.factor, "steps": settings.steps, "cfg": settings.cfg,
             "guidance": settings.guidance, "time_shift": settings.time_shift, "dtype": settings.dtype,
             "software": "diffusion-4k"}
    about = {name: value for name, value in about.items() if value is not None}
    entries, exif = PngImagePlugin.PngInfo(), Image.Exif()
    for name, value in about.items():
        entries.add_itxt(name, str(value))
    exif[0x010E] = json.dumps(about)
    options = {"pnginfo": entries} if picture.path.suffix.lower() == ".png" else {"quality": 95, "exif": exif}
    try:
        with replacing(picture.path) as temporary:
            Image.fromarray(to_pixels(image)).save(temporary, **options)
    except (OSError, ValueError) as error:  # ValueError: more than JPEG's metadata holds
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"{picture.path}: could not be written ({reason})") from None


def settle(settings: Settings, family: Family, transformer: Weights) -> Settings:
    """Fill in what was not given: from the file's metadata, then the family; ValueError if it cannot be drawn."""
    mu, shift = settings.mu, settings.time_shift
    family.check_guidance(settings.guidance)
    if mu is not None:
        if not -700 < mu < 700:
            raise ValueError(f"--mu {mu:g}: give the logarithm of a time shift; Flux-dev takes 0.5 to 3")
        if shift is not None:
            raise ValueError(f"--mu {mu:g} --time-shift {shift:g}: mu is the logarithm of the time shift; give one")
        shift = math.exp(mu)
    sampling = family.sampling(transformer, settings.steps, settings.cfg, settings.guidance, shift, settings.res)
    device = check_device(settings.device)
    dtype = settings.dtype or ("fp32" if device == "cpu" else "bf16")
    settings = replace(settings, device=device, dtype=dtype, **asdict(sampling))
    if settings.time_shift is None:
        tokens = math.prod(settings.size) // (2 * settings.factor) ** 2
        settings = replace(settings, time_shift=math.exp(flux_mu(tokens)))
    check_ranges(settings)
    if not (family.sigmas(settings.steps, settings.time_shift).diff() < 0).all():
        flag, near = (f"--time-shift {settings.time_shift:g}", 1) if mu is None else (f"--mu {mu:g}", 0)
        raise ValueError(f"{flag}: some of the {settings.steps} noise levels coincide; give a value nearer to {near}")
    check_size(settings, family.config(transformer.part("model.diffusion_model.")).table_side)
    return settings


def check_ranges(s: Settings) -> None:
    """Refuse a setting out of range: ValueError that names the flag, its value and what is accepted."""
    need(s.steps >= 1, "steps", s.steps, "1 or more")
    need(s.count >= 1, "count", s.count, "1 or more")
    need(0 <= s.seed <= 2**63 - s.count, "seed", s.seed, "0 to 2^63 - count")
    need(math.isfinite(s.cfg), "cfg", s.cfg, "a finite number")
    need(s.guidance is None or 0 <= s.guidance < math.inf, "guidance", s.guidance, "a number from 0")
    need(0 < s.time_shift < math.inf, "time-shift", s.time_shift, "a number above 0")


def check_size(settings: Settings, table_side: float) -> None:
    """Refuse a side that is no multiple of a patch, or exceeds the position table of `table_side` patches."""
    (width, height), factor, step = settings.size, settings.factor, 2 * settings.factor
    if width % step or height % step:
        raise ValueError(f"--res {width}x{height}: both sides must be multiples of {step} at --factor {factor}")
    if max(width, height) > table_side * step:
        raise ValueError(f"--res {width}x{height}: this model's position table ends at {table_side * step} px per side "
                         f"at --factor {factor}" + ("; --factor 16 reaches twice as far" if factor == 8 else ""))


def read_prompts(settings: Settings) -> list[str]:
    """--prompt, then the lines of --prompts; ValueError or OSError if there is nothing to draw or to read."""
    prompts, file = list(settings.prompt), settings.prompts
    if file:
        try:
            lines = [line.strip() for line in Path(file).read_text(encoding="utf-8-sig").split("\n") if line.strip()]
        except OSError as error:
            raise OSError(f"--prompts {file}: {error.strerror}; give a text file with one prompt per line") from None
        except UnicodeDecodeError:
            raise ValueError(f"--prompts {file}: not UTF-8 text; give a text file with one prompt per line") from None
        if not lines:
            raise ValueError(f"--prompts {file}: no prompt in it; give a text file with one prompt per line")
        prompts += lines
    if not prompts:
        raise ValueError('nothing to draw: give --prompt "TEXT" or --prompts FILE')
    if settings.negative and settings.cfg == 1:
        raise ValueError("--negative needs --cfg above 1, and --cfg is 1: give a larger --cfg, or leave --negative out")
    # surrogates: how Python passes on bytes that are not in the terminal's encoding
    if any(re.search("[\ud800-\udfff]", prompt) for prompt in (*prompts, settings.negative)):
        raise ValueError("a prompt is not UTF-8 text; set the terminal to UTF-8, or give --prompts FILE")
    return prompts


def name_pictures(prompts: list[str], settings: Settings) -> list[Picture]:
    """One Picture per prompt and seed. Creates their folder and checks that it is writable, before any long work."""
    out, suffix, number = Path(settings.out), Path(settings.out).suffix.lower(), len(prompts) * settings.count
    if out.is_dir() or suffix not in Image.registered_extensions():  # a folder
        slugs = [re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:48].strip("-") or "empty" for prompt in prompts]
        pictures = [Picture(prompt, seed, out / f"{i:03d}-{slugs[i]}-{seed}.png") for i, prompt in enumerate(prompts)
                    for seed in range(settings.seed, settings.seed + settings.count)]
    elif suffix not in SUFFIXES:
        raise ValueError(f"--out {out}: the formats are {', '.join(SUFFIXES)}; name one of these, or a folder")
    elif number > 1:
        raise ValueError(f"--out {out} names one file, but there are {number} pictures to draw: name a folder")
    elif max(settings.size) > (most := MOST_SIDE.get(suffix, math.inf)):
        raise ValueError(f"--out {out}: this format ends at {most} px per side, --res is {settings.res}; name a .png")
    else:
        pictures = [Picture(prompts[0], settings.seed, out)]
    writable(pictures[0].path.parent, f"--out {out}")
    return pictures


def parse(argv: Sequence[str] | None = None) -> Settings:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument_group("input and output").add_argument
    add("--prompt", action="append", default=[], metavar="TEXT", help="text prompt; may be given several times")
    add("--prompts", metavar="FILE", help="text file with one prompt per line")
    add("--negative", default="", metavar="TEXT", help="negative prompt (default: the empty prompt)")
    add("--res", metavar="PX", help="side in pixels, or WIDTHxHEIGHT; multiples of 32 at factor 16 (default: "
        "the file's metadata, else 1024)")
    add("--seed", type=int, default=0, help="seed of the first picture of each prompt (default: 0)")
    add("--count", type=int, default=1, help="pictures per prompt, with seeds SEED, SEED+1 ... (default: 1)")
    add("--out", default="out", metavar="PATH", help="folder, or the name of one .png, .jpg or .webp; a picture of the "
        "same prompt and seed there is replaced (default: out)")
    add = parser.add_argument_group("model").add_argument
    add("--model", default="tiny-sd3", metavar="NAME", help="folder in models/ (default: tiny-sd3)")
    add("--weights", metavar="DIR", help="another model folder, as downloaded")
    add("--transformer", metavar="PATH", help="use this transformer: a file of train.py, or a diffusers folder")
    add = parser.add_argument_group("sampling (default: the file's metadata, else in brackets)").add_argument
    add("--steps", type=int, help="Euler steps (SD3: 28, Flux-dev: 50, Flux-schnell: 4)")
    add("--cfg", type=float, help="classifier-free guidance; 1 is none and twice as fast (SD3: 7.0, Flux: 1)")
    add("--guidance", type=float, help="the guidance input of Flux-dev (3.5); other models have no such input")
    add("--time-shift", type=float, help="time shift of the schedule; above 1 spends more steps on noise (SD3: 3.0, "
        "Flux-dev: by the number of tokens, Flux-schnell: 1)")
    add("--mu", type=float, help="logarithm of the time shift, Flux's name for it")
    add("--factor", type=int, default=16, choices=(8, 16),
        help="pixels per latent position: 8 as published, 16 by the partition trick (default: 16)")
    add = parser.add_argument_group("machine").add_argument
    add("--device", help="cpu, cuda or cuda:1 (default: cuda if there is one)")
    add("--dtype", choices=tuple(DTYPES), help="compute dtype (default: bf16 on cuda, fp32 on cpu)")
    return Settings(**vars(parser.parse_args(argv)))


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(argv)
    try:
        run(settings)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except torch.OutOfMemoryError:
        raise SystemExit("error: out of GPU memory; give a smaller --res, --dtype bf16, or --device cpu") from None


if __name__ == "__main__":
    main()
