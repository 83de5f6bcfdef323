"""Draw pictures from prompts.

Paper     Diffusion-4K section 9: Euler on the flow ODE, factor 16; SD3 28 steps with cfg 7.0, Flux 50 with guidance 3.5
Method    prompt -> text encoders -> context, pooled
          noise  -> Euler over the shifted schedule -> latent
                    SD3:  velocity = v_negative + cfg * (v_prompt - v_negative), two passes
                    Flux: velocity = v(prompt, guidance), one pass; the guidance is an input of the model
          latent -> partitioned VAE -> picture
Run       python sample.py --prompt "a dandelion at sunset"                    tiny-sd3, 1024 px; 2 cores: 8 s, 0.5 GiB
          python sample.py --prompt "a dandelion at dawn" --res 4096 --steps 8                      3 minutes, 2.2 GiB
          python sample.py --prompt "a dandelion at noon" --model tiny-flux                         the embedded Flux
          python sample.py --prompt "a red panda" --weights sd3 --res 4096      SD3-medium as downloaded, one GPU
          python sample.py --prompts aesthetic-4k/metadata.jsonl --weights sd3  one picture per line, named as there
Seeds     picture k = 0, 1 … of a prompt has the seed SEED + k and its own noise, independent of all other pictures
Says      what is drawn from which files and settings, before it begins
Keeps     pictures of another prompt or other settings; the latent of a picture whose decode fails
Check     python -m pytest tests/test_sample.py
"""

if __name__ == "__main__":  # Ctrl-C during the import of torch ends in one line
    import files
    files.end_on_interrupt()

import argparse
import hashlib
import json
import math
import re
import sys
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from checkpoint import DTYPES, Weights, check_device, model_folder, open_weights, peak_memory_gib, save
from family import MOST_SIDE, Family, check_size, check_widths, find, fingerprint, size_of
from files import (
    check_path,
    entry,
    memory_error,
    need,
    parse_json,
    printable,
    read_text,
    recorded,
    replacing,
    run_command,
    writable,
)
from flow import SEEDS, draw_noise, euler, velocity_with_cfg
from flux import Flux
from mmdit import MMDiT
from vae import VAE, to_pixels

SUFFIXES = {".png": MOST_SIDE, ".jpg": 65_500, ".jpeg": 65_500, ".webp": 16_383}  # longest side, in pixels
MOST_EXIF = 65_533                                     # bytes of JPEG's metadata
MOST_PICTURES, MOST_LETTERS = 100_000, 100_000         # letters of one prompt
MOST_SLUG, MOST_NAME, MOST_BYTES = 48, 180, 64 << 20   # letters; bytes of a file_name, and of --prompts
TABLES = (".csv", ".tsv", ".json", ".parquet", ".arrow", ".xlsx", ".yaml", ".yml")
TABLE_HEAD = re.compile(r"(?=.*\b(?:text|prompts?|captions?|file_name)\b)\w+(?:[,;\t]\w+)+", re.I)
INFOTEXT = re.compile(r"Negative prompt:|Steps: \d+, \w+")  # of pictures that AUTOMATIC1111 and Forge draw
WIDER = {"fp16": ("fp16", "bf16", "fp32"), "bf16": ("bf16", "fp32"), "fp32": ("fp32",)}  # dtypes to decode in


@dataclass(frozen=True)
class Settings:
    """What is drawn and how: the command line. None means not given; settle() fills it in."""

    prompt: list[str]
    prompts: str | None
    negative: str
    res: str | None           # pixels, as family.RES
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
    factor: int | None
    t5_length: int | None
    device: str | None
    dtype: str | None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return size_of(self.res)


@dataclass(frozen=True)
class Picture:
    prompt: str
    seed: int
    path: Path


def run(given: Settings) -> None:
    """Prompt -> text -> noise -> Euler with cfg -> decode -> file. Arguments and files are checked first."""
    for name in ("model", "weights", "transformer", "prompts", "out"):
        if (value := getattr(given, name)) is not None:
            check_path(name, value)
    folder = model_folder(given.model, given.weights)
    family, transformer, vae_path = find(folder, given.transformer)
    settings = settle(given, family, transformer)
    open_weights(vae_path)  # a missing or broken file is named before the text encoders are read
    pictures = name_pictures(read_prompts(settings), settings)
    about = partial(records_of, settings, Path(transformer.source), fingerprint(transformer.source))
    check_records(pictures, about)
    print(summary(given, settings, family, transformer, vae_path), flush=True)

    encoded = encode([settings.negative, *(picture.prompt for picture in pictures)], settings, folder, family)
    model = family.model.load(transformer.source, settings.device, DTYPES[settings.dtype])
    vae_in = cache(lambda dtype: VAE.load(vae_path, settings.device, DTYPES[dtype], fallback=family.latent_scale))
    check_widths(model.config, *encoded[settings.negative], vae_in(settings.dtype).config)
    sigmas, failures = family.sigmas(settings.steps, settings.time_shift), []
    for picture in pictures:
        latent, s_per_step = draw(picture, settings, encoded, model, sigmas)
        image, failure = decode(latent, settings, vae_in)
        if failure := failure or in_the_way(picture.path, about(picture)):  # another run may have drawn there since
            failures.append(failed(picture, latent, failure, about(picture), settings))
            continue
        write_picture(picture.path, image, about(picture))
        print(f"{picture.path}  {s_per_step:.2f} s/step  peak {peak_memory_gib(settings.device):.1f} GiB")
    for failure in failures[:-1]:
        print(f"error: {printable(failure)}", file=sys.stderr)
    if failures:
        raise ValueError(failures[-1])


def encode(prompts: list[str], settings: Settings, folder: Path, family: Family) -> dict[str, tuple[Tensor, Tensor]]:
    """Prompt -> context (1, L, C), pooled (1, P). The encoders are freed on return: T5-XXL is large."""
    dtype = torch.bfloat16 if settings.dtype == "fp16" else DTYPES[settings.dtype]  # T5 overflows in fp16
    text = family.text.load(folder, settings.device, dtype, settings.t5_length)
    # one at a time: batching changes rounding, and a picture must not depend on the other prompts
    return {prompt: tuple(part.cpu() for part in text.encode([prompt])) for prompt in dict.fromkeys(prompts)}


@torch.inference_mode()
def draw(picture: Picture, settings: Settings, encoded: dict[str, tuple[Tensor, Tensor]], model: MMDiT | Flux,
         sigmas: Tensor) -> tuple[Tensor, float]:
    """A latent (1, C, h, w), fp32, and the seconds per step."""
    (width, height), factor = settings.size, settings.factor
    weight = next(model.parameters())       # for its device and dtype
    pairs = zip(encoded[picture.prompt], encoded[settings.negative], strict=True)
    context, pooled = (torch.cat(pair).to(weight) for pair in pairs)                              # (2, L, C), (2, P)
    velocity = velocity_with_cfg(model, context, pooled, settings.cfg, settings.guidance)
    noise = draw_noise([picture.seed], (model.config.in_channels, height // factor, width // factor)).to(weight.device)
    began = time.time()
    latent = euler(velocity, noise, sigmas, progress=True).cpu()  # fp32 around a bf16 model; waits for the device
    return latent, (time.time() - began) / settings.steps


@torch.inference_mode()
def decode(latent: Tensor, settings: Settings, vae_in: Callable[[str], VAE]) -> tuple[Tensor | None, str]:
    """An image (3, H, W) in [-1, 1], or None and why there is none. Where a VAE overflows, a wider dtype is tried."""
    if not latent.isfinite().all():
        return None, "overflow"
    for dtype in WIDER[settings.dtype]:
        try:
            image = vae_in(dtype).decode(latent.to(settings.device, DTYPES[dtype]), settings.factor)[0].float().cpu()
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not memory_error(error):
                raise
            return None, "the VAE ran out of memory, give a smaller --res"
        if image.isfinite().all():
            if dtype != settings.dtype:
                print(f"note: the VAE overflowed in {settings.dtype}: decoded in {dtype}", file=sys.stderr)
            return image, ""
    return None, f"the VAE overflowed in {', '.join(WIDER[settings.dtype])}"


def failed(picture: Picture, latent: Tensor, reason: str, records: dict[str, object], settings: Settings) -> str:
    """The line about a picture that could not be drawn. If only its decode failed, the latent is written beside it."""
    if reason == "overflow":
        return (f"seed {picture.seed} of {picture.prompt[:200]!r} became NaN or Inf: --cfg {settings.cfg} is too large,"
                f" {settings.dtype} too narrow or a file damaged; give a smaller --cfg, or --dtype bf16 or fp32")
    save(file := picture.path.with_suffix(".latent.safetensors"), {"latent": latent}, records)
    return f"{picture.path}: {reason}; the finished latent is kept in {file}, for VAE.decode of vae.py"


def records_of(settings: Settings, source: Path, weights: str, picture: Picture) -> dict[str, object]:
    """How a picture is drawn, for its metadata: enough to draw it again, without the folders of this machine."""
    width, height = settings.size
    about = {"prompt": picture.prompt, "negative": settings.negative, "seed": picture.seed,
             "model": f"{source.absolute().parent.name}/transformer" if source.name == "transformer" else source.name,
             "weights": weights, "res": f"{width}x{height}", "factor": settings.factor, "steps": settings.steps,
             "cfg": settings.cfg, "guidance": settings.guidance, "time_shift": settings.time_shift,
             "t5_length": settings.t5_length, "dtype": settings.dtype, "software": "diffusion-4k"}
    return {name: value for name, value in about.items() if value is not None}


def exif_of(records: dict[str, object]) -> Image.Exif:
    """The metadata of JPEG and WebP: JSON in the image description."""
    exif = Image.Exif()
    exif[0x010E] = json.dumps(records)
    return exif


def check_records(pictures: Sequence[Picture], about: Callable[[Picture], dict[str, object]]) -> None:
    """Refuse, before drawing, what JPEG cannot record and what would replace another picture; ValueError names it."""
    for picture in pictures:
        path, records = picture.path, about(picture)
        if path.suffix.lower() in (".jpg", ".jpeg") and (size := len(exif_of(records).tobytes())) > MOST_EXIF:
            raise ValueError(f"--out {path}: prompts and settings take {size:,} bytes, JPEG's metadata at most "
                             f"{MOST_EXIF:,}; name a .png, or shorten the prompt")
        if what := in_the_way(path, records):
            raise ValueError(f"{path}: {what}; give another --out, or move it away")


def in_the_way(path: Path, records: dict[str, object]) -> str:
    """What a picture would replace, if it is not the same picture."""
    there = recorded(path) if path.exists() else {name: str(value) for name, value in records.items()}
    name = next((name for name, value in records.items() if there.get(name) != str(value)), "")
    if not name or "software" not in there:
        return "exists and records nothing of this program" if name else ""
    return f"exists and was drawn with {name} {there.get(name, '')[:80]!r}, not {str(records[name])[:80]!r}"


def write_picture(path: Path, image: Tensor, records: dict[str, object]) -> None:
    """Write an image (3, H, W) in [-1, 1] and how it was drawn, complete or not at all; the OSError names it."""
    entries = PngImagePlugin.PngInfo()
    for name, value in records.items():
        entries.add_itxt(name, str(value))
    options = {"pnginfo": entries} if path.suffix.lower() == ".png" else {"quality": 95, "exif": exif_of(records)}
    try:
        with replacing(path) as temporary:
            Image.fromarray(to_pixels(image)).save(temporary, **options)
    except OSError as error:
        raise OSError(f"{path}: could not be written ({getattr(error, 'strerror', None) or error})") from None


# ---- settings and names

def settle(given: Settings, family: Family, transformer: Weights) -> Settings:
    """Fill in what was not given: from the file's metadata, then the family; ValueError if it cannot be drawn."""
    mu, shift = given.mu, given.time_shift
    family.check_guidance(given.guidance)
    need(1 <= given.count <= MOST_PICTURES, "count", given.count, f"1 to {MOST_PICTURES:,}")
    need(0 <= given.seed <= SEEDS - given.count, "seed", given.seed, "0 to 2^32 - count")
    if mu is not None:
        need(-700 < mu < 700, "mu", f"{mu:g}", "the logarithm of a time shift; Flux-dev takes 0.5 to 3")
        if shift is not None:
            raise ValueError(f"--mu {mu:g} --time-shift {shift:g}: mu is the logarithm of the time shift; give one")
        shift = math.exp(mu)
    sampling = family.sampling(transformer, given.steps, given.cfg, given.guidance, shift, given.res, given.factor,
                               given.t5_length)
    device, by = check_device(given.device), f" (recorded by {transformer.source})"
    dtype = given.dtype or ("fp32" if device == "cpu" else "bf16")
    settings = replace(given, device=device, dtype=dtype, **asdict(sampling))
    config, by_res = family.config(transformer.part("model.diffusion_model.")), by if given.res is None else ""
    tokens = check_size(settings.size, settings.factor, config, by_res * ("res" in transformer.metadata))
    if settings.time_shift is None:
        settings = replace(settings, time_shift=family.by_tokens(tokens))
    by_shift = f"--time-shift {settings.time_shift:g}{by * (shift is None)}" if mu is None else f"--mu {mu:g}"
    flag = f"--res {settings.res}" if sampling.time_shift is None else by_shift
    if note := family.check_schedule(settings.steps, settings.time_shift, flag):
        print(note, file=sys.stderr)
    return settings


def summary(given: Settings, settings: Settings, family: Family, transformer: Weights, vae: Path) -> str:
    """One line: the family, its files, the device, and each setting with where it comes from, if not the family's."""
    scheduled = "scheduler" if family.scheduler else "by tokens" if family.time_shift is None else ""
    numbers = []
    for name in ("res", "factor", "steps", "cfg", "guidance", "time_shift", "t5_length"):
        value, where = getattr(settings, name), scheduled if name == "time_shift" else ""
        if getattr(given, name) is not None or (name == "time_shift" and given.mu is not None):
            where = "given"
        elif name in transformer.metadata:
            where = "recorded"
        shown = f"{value:.4g}" if isinstance(value, float) else value
        numbers += [f"{name.replace('_', ' ')} {shown}" + f" ({where})" * bool(where)] * (value is not None)
    kind = family.name + f" ({family.same_tensors})" * bool(family.same_tensors)
    sources = f"transformer {transformer.source}, VAE {vae}" + f", {family.scheduler}" * bool(family.scheduler)
    return printable(f"{kind}; {sources}; {settings.device}, {settings.dtype}; {', '.join(numbers)}")


def read_prompts(settings: Settings) -> list[tuple[str, str]]:
    """(prompt, name of its picture or ""): --prompt, then --prompts; ValueError or OSError if there are none."""
    prompts = [(prompt, "") for prompt in settings.prompt]
    prompts += [] if settings.prompts is None else read_list(settings.prompts)
    if not prompts:
        raise ValueError('nothing to draw: give --prompt "TEXT" or --prompts FILE')
    if (number := len(prompts) * settings.count) > MOST_PICTURES:
        raise ValueError(f"{number:,} pictures of {len(prompts):,} prompts: give at most {MOST_PICTURES:,}")
    if settings.negative and settings.cfg == 1:
        raise ValueError("--negative needs --cfg above 1, and --cfg is 1: give a larger --cfg, or leave --negative out")
    for text in (settings.negative, *(prompt for prompt, _ in prompts)):
        if re.search("[\ud800-\udfff]", text):  # how Python passes on bytes that are not in the terminal's encoding
            raise ValueError("a prompt is not UTF-8 text; set the terminal to UTF-8, or give --prompts FILE")
        if len(text) > MOST_LETTERS:
            raise ValueError(f"a prompt of {len(text):,} letters ({text[:40]!r} …): give at most {MOST_LETTERS:,}")
    return prompts


def read_list(file: str) -> list[tuple[str, str]]:
    """(prompt, name or "") of each line of a file, a prompt or a JSON object: the content decides, not the name."""
    accepted = 'give a text file with one prompt per line, or JSON lines with "text"'
    try:
        text = read_text(file, MOST_BYTES)
    except (OSError, ValueError) as error:
        why = f"{file}: {error.strerror}" if getattr(error, "strerror", "") else error
        raise ValueError(f"--prompts {why}; {accepted}") from None
    lines = [(number, line.strip()) for number, line in enumerate(re.split("\r\n?|\n", text), 1) if line.strip()]
    if not lines or "\0" in text:
        raise ValueError(f"--prompts {file}: {'zero bytes, no text' if lines else 'no prompt in it'}; {accepted}")
    if any(is_json(line, dict) for _, line in lines):
        return [read_row(line, f"--prompts {file}:{number}") for number, line in lines]
    if any((Path(file).suffix.lower() in TABLES, TABLE_HEAD.fullmatch(lines[0][1]), is_json(text, (dict, list)),
            *(INFOTEXT.match(line) for _, line in lines))):
        raise ValueError(f"--prompts {file}: a table or JSON, or settings, whose lines are no prompts; {accepted}")
    return [(line, "") for _, line in lines]


def is_json(text: str, kind: type | tuple[type, ...]) -> bool:
    """Whether a text is JSON of this kind; "{red, blue} cup" is a prompt."""
    try:
        return text.lstrip()[:1] in "[{" and isinstance(parse_json(text, ""), kind)
    except ValueError:
        return False


def read_row(line: str, where: str) -> tuple[str, str]:
    """(text, name of the picture without suffix, or "") of a JSON line; ValueError that begins with `where`."""
    row = parse_json(line, where)
    text = entry(row if isinstance(row, dict) else {}, "text", str, where).strip()
    name = Path(entry({"file_name": ""} | row, "file_name", str, where).replace("\\", "/")).stem
    if not text or name.startswith(".") or printable(name) != name or len(name.encode()) > MOST_NAME:
        raise ValueError(f"{where}: text must not be empty, file_name a file's name of at most {MOST_NAME} bytes")
    return text, name


def slug_of(prompt: str) -> str:
    """A prompt in a file name: its letters, of any script, and a hash where they do not stand for all of it."""
    kinds = [(letter, unicodedata.category(letter)[0]) for letter in unicodedata.normalize("NFC", prompt.lower())]
    words = re.sub("-+", "-", "".join(letter if kind in "LMN" else "-" for letter, kind in kinds)).strip("-")
    symbols = any(letter > "\x7f" and kind in "SC" for letter, kind in kinds)  # such as emoji
    slug = words[:MOST_SLUG].strip("-") or "empty"
    if symbols or len(words) > MOST_SLUG or (prompt and not words):
        slug += f"-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}"
    return slug


def name_pictures(prompts: list[tuple[str, str]], settings: Settings) -> list[Picture]:
    """One Picture per prompt and seed. Creates their folder and checks that it is writable, before any long work.

    prompts  (prompt, name); without a name, a picture is called after its number, prompt and seed
    """
    out, suffix, number = Path(settings.out), Path(settings.out).suffix.lower(), len(prompts) * settings.count
    seeds = range(settings.seed, settings.seed + settings.count)
    if out.is_dir() or suffix not in Image.registered_extensions():  # a folder
        digits, places = len(str(seeds[-1])), max(3, len(str(len(prompts) - 1)))  # sorted by name is sorted by number
        pictures = []
        for i, (prompt, name) in enumerate(prompts):
            start = name or f"{i:0{places}d}-{slug_of(prompt)}"
            names = [start if name and settings.count == 1 else f"{start}-{seed:0{digits}d}" for seed in seeds]
            pictures += [Picture(prompt, seed, out / f"{name}.png") for name, seed in zip(names, seeds, strict=True)]
        if len({str(picture.path).lower() for picture in pictures}) < number:
            raise ValueError(f"--prompts {settings.prompts}: two lines have one file_name, but for folder and suffix")
    elif suffix not in SUFFIXES:
        raise ValueError(f"--out {out}: the formats are {', '.join(SUFFIXES)}; name one of these, or a folder")
    elif number > 1:
        raise ValueError(f"--out {out} names one file, but there are {number} pictures to draw: name a folder")
    elif max(settings.size) > (most := SUFFIXES[suffix]):
        raise ValueError(f"--out {out}: this format ends at {most} px per side, --res is {settings.res}; name a .png")
    else:
        pictures = [Picture(prompts[0][0], settings.seed, out)]
    writable(pictures[0].path.parent, f"--out {out}")
    return pictures


def parse(argv: Sequence[str] | None = None) -> Settings:
    parser = argparse.ArgumentParser(description="Draw pictures from prompts.", allow_abbrev=False)
    add = parser.add_argument_group("input and output").add_argument
    add("--prompt", action="append", default=[], metavar="TEXT", help="text prompt; may be given several times")
    add("--prompts", metavar="FILE", help="text file with one prompt per line, or JSON lines with text, file_name")
    add("--negative", default="", metavar="TEXT", help="negative prompt (default: the empty prompt)")
    add("--res", metavar="PX", help="side in pixels, or WIDTHxHEIGHT; multiples of 32 (default: recorded, else 1024)")
    add("--seed", type=int, default=0, help="seed of the first picture of each prompt (default: 0)")
    add("--count", type=int, default=1, help="pictures per prompt, with seeds SEED, SEED+1 ... (default: 1)")
    add("--out", default="out", metavar="PATH", help="folder, or the name of one .png, .jpg or .webp; only a picture "
        "of the same prompt, seed and settings there is replaced (default: out)")
    group = parser.add_argument_group("model")
    either, add = group.add_mutually_exclusive_group().add_argument, group.add_argument
    either("--model", default="tiny-sd3", metavar="NAME", help="folder in models/ (default: tiny-sd3)")
    either("--weights", metavar="DIR", help="another model folder, as downloaded")
    add("--transformer", metavar="PATH", help="use this transformer: a file of train.py, or a diffusers folder")
    add = parser.add_argument_group("sampling (default: the file's metadata, else in brackets)").add_argument
    add("--steps", type=int, help="Euler steps (SD3: 28, SD3.5: 40 or 50, Flux-dev: 50, Flux-schnell: 4)")
    add("--cfg", type=float, help="classifier-free guidance; 1 is none, and fast (SD3: 7.0, SD3.5: 4.5 or 5, Flux: 1)")
    add("--guidance", type=float, help="the guidance input of Flux-dev (3.5); other models have no such input")
    add("--time-shift", type=float, help="time shift of the schedule; above 1 spends more steps on noise (the folder's "
        "scheduler/, else SD3: 3.0, Flux-dev: by the number of tokens, Flux-schnell: 1)")
    add("--mu", type=float, help="logarithm of the time shift, Flux's name for it")
    add("--factor", type=int, choices=(8, 16), help="pixels per latent position: 8 as published, 16 by the partition "
        "trick (16)")
    add("--t5-length", type=int, metavar="TOKENS", help="tokens of T5 (SD3: 77, Flux-dev: 512, Flux-schnell: 256)")
    add = parser.add_argument_group("machine").add_argument
    add("--device", help="cpu, cuda or cuda:1 (default: cuda if there is one)")
    add("--dtype", choices=tuple(DTYPES), help="compute dtype (default: bf16 on cuda, fp32 on cpu)")
    return Settings(**vars(parser.parse_args(argv)))


def main(argv: Sequence[str] | None = None) -> None:
    run_command(lambda: run(parse(argv)))


if __name__ == "__main__":
    main()
