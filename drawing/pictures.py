"""The pictures of a run of sample.py: their prompts, names and records; written complete, never over another picture.

Lists     --prompts: a text file with one prompt per line, or JSON lines with "text" and "file_name"
Names     number-prompt-seed.png, or file_name; letters of every script stay, a hash stands for what does not
Records   prompt and settings, as text entries of a PNG, as JSON in the EXIF description of JPEG and WebP
Check     python -m pytest tests/test_sample.py
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, PngImagePlugin
from torch import Tensor

from checkpoint import Weights, open_weights, save
from drawing.settings import MOST_PICTURES, Settings
from family import MOST_SIDE, fingerprint, text_files
from files import SOFTWARE, blank, entry, parse_json, printable, read_text, replacing, writable
from lora import file_and_strength
from reading.pictures import recorded
from vae import to_pixels

SUFFIXES = {".png": MOST_SIDE, ".jpg": 65_500, ".jpeg": 65_500, ".webp": 16_383}  # longest side, in pixels
MOST_EXIF = 65_533                                     # bytes of JPEG's metadata
MOST_LETTERS = 100_000                                 # of one prompt
MOST_SLUG = 48                                         # letters of a prompt in a file name
MOST_NAME, MOST_BYTES = 180, 64 << 20                  # bytes of a file_name, and of --prompts
TABLES = (".csv", ".tsv", ".json", ".parquet", ".arrow", ".xlsx", ".yaml", ".yml")
TABLE_HEAD = re.compile(r'(?=.*\b(?:text|prompts?|captions?|file_name)\b)"?\w+"?(?:[,;\t]"?\w+"?)+', re.I)
NO_PROMPT = {  # lines of text files that are no prompts: what each is, what shows it
    "is a comment": r"^(#|//)(\s|$)",
    "holds a picture's settings": r"^(Negative prompt:|Steps: \d+, \w)",
    "has flags of another program": r"(^|\s)--([b-hj-z]|ar|no|niji|style|stylize|seed|steps|width|height|"
                                     r"cfg_scale|sampler_name|(negative_)?prompt)([\s=]|$)",
    "is HTML or RTF": r"^(<(!doctype|html|\?xml)\b|\{\\rtf)"}


@dataclass(frozen=True)
class Picture:
    prompt: str
    seed: int
    path: Path
    named: bool = False  # by --out or a file_name; else another number is added where its name is taken


# ---- prompts

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
    lines = [(number, line.strip()) for number, line in enumerate(re.split("\r\n?|\n", text), 1) if not blank(line)]
    if not lines or "\0" in text:
        raise ValueError(f"--prompts {file}: {'zero bytes, no text' if lines else 'no prompt in it'}; {accepted}")
    if any(is_json(line, dict) for _, line in lines):
        return [read_row(line, f"--prompts {file}:{number}") for number, line in lines]
    if Path(file).suffix.lower() in TABLES or TABLE_HEAD.fullmatch(lines[0][1]) or is_json(text, (dict, list)):
        raise ValueError(f"--prompts {file}: a table or JSON, whose lines are no prompts; {accepted}")
    for number, line in lines:
        for what, looks in NO_PROMPT.items():
            if re.search(looks, line, re.I):
                raise ValueError(f"--prompts {file}:{number}: {line[:40]!r} {what}; {accepted}")
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
    if blank(text) or name.startswith(".") or printable(name) != name or len(name.encode()) > MOST_NAME:
        raise ValueError(f"{where}: text must not be empty, file_name a file's name of at most {MOST_NAME} bytes")
    return text, name


# ---- names

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
            for seed in seeds:
                stem = start if name and settings.count == 1 else f"{start}-{seed:0{digits}d}"
                pictures.append(Picture(prompt, seed, out / f"{stem}.png", bool(name)))
        if len({str(picture.path).lower() for picture in pictures}) < number:
            raise ValueError(f"--prompts {settings.prompts}: two lines have one file_name, but for folder and suffix")
    elif suffix not in SUFFIXES:
        raise ValueError(f"--out {out}: the formats are {', '.join(SUFFIXES)}; name one of these, or a folder")
    elif number > 1:
        raise ValueError(f"--out {out} names one file, but there are {number} pictures to draw: name a folder")
    elif max(settings.size) > (most := SUFFIXES[suffix]):
        raise ValueError(f"--out {out}: this format ends at {most} px per side, --res is {settings.res}; name a .png")
    else:
        pictures = [Picture(prompts[0][0], settings.seed, out, named=True)]
    writable(pictures[0].path.parent, f"--out {out}")
    return pictures


# ---- records

def records_by(settings: Settings, folder: Path, transformer: Weights,
               vae: Path) -> Callable[[Picture], dict[str, object]]:
    """How pictures are drawn, for their metadata: enough to draw them again, without the folders of this machine.

    folder   of the text encoders
    returns  function of a Picture; None is compared with what is there, and not written
    """
    (width, height), source = settings.size, Path(transformer.source)
    read = {"weights": source, "vae": vae, "from": settings.redraw}
    adapters = [f"{Path(file).name}:{strength:g} {fingerprint(file)}"
                for file, strength in map(file_and_strength, settings.lora)]
    staged = settings.first != "none"
    about = {"model": f"{source.absolute().parent.name}/transformer" if source.name == "transformer" else source.name,
             **{name: file and fingerprint(file) for name, file in read.items()},
             "text_encoders": fingerprint(*text_files(folder)),
             "lora": ", ".join(adapters) or None, "res": f"{width}x{height}", "factor": settings.factor,
             "steps": settings.steps, "solver": settings.solver if settings.solver != "euler" else None,
             "cfg": settings.cfg, "guidance": settings.guidance, "time_shift": settings.time_shift,
             "offset": settings.offset, "t5_length": settings.t5_length, "positions": settings.positions,
             "trained_side": settings.trained_side, "dtype": settings.dtype,
             "vae_dtype": settings.vae_dtype if settings.vae_dtype != settings.dtype else None,
             "store": settings.store, "software": SOFTWARE, "first": settings.first if staged else None,
             "start": settings.start if staged or settings.redraw else None}
    return lambda picture: {"prompt": picture.prompt, "negative": settings.negative, "seed": picture.seed} | about


def written(records: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in records.items() if value is not None}


def exif_of(records: dict[str, object]) -> Image.Exif:
    """The metadata of JPEG and WebP: JSON in the image description."""
    exif = Image.Exif()
    exif[0x010E] = json.dumps(written(records))
    return exif


def with_free_names(pictures: Sequence[Picture], records_of: Callable[[Picture], dict[str, object]]) -> list[Picture]:
    """The pictures under names that replace no other picture: NAME-2.png where NAME.png is drawn with other settings.

    raises  ValueError, before drawing, that names what JPEG cannot record or what a given name would replace
    """
    free = []
    for picture in pictures:
        path, records, number = picture.path, records_of(picture), 1
        if path.suffix.lower() in (".jpg", ".jpeg") and (size := len(exif_of(records).tobytes())) > MOST_EXIF:
            raise ValueError(f"--out {path}: prompts and settings take {size:,} bytes, JPEG's metadata at most "
                             f"{MOST_EXIF:,}; name a .png, or shorten the prompt")
        while what := in_the_way(path, records):
            if picture.named:
                raise ValueError(f"{path}: {what}; give another --out, or move it away")
            path, number = picture.path.with_stem(f"{picture.path.stem}-{number + 1}"), number + 1
        free.append(replace(picture, path=path))
    return free


def in_the_way(path: Path, records: dict[str, object]) -> str:
    """Why a picture may not be written there: the one that is there, or its latent, records others; "" if it may."""
    if path.exists() and (other := differs(recorded(path), records)):
        return f"exists and {other}"
    if latent_file(path).exists() and (other := other_latent(path, records)):
        return f"{latent_file(path).name} exists and {other}"
    return ""


def differs(there: dict[str, str], records: dict[str, object]) -> str:
    """The first setting in which what a picture or latent records is not `records`, in words."""
    for name, value in records.items():
        was, given = there.get(name, ""), "" if value is None else str(value)
        if was != given and "software" not in there:
            return "records nothing of this program"
        if was != given:
            return f"was drawn with {name} {was[:80]!r}, not {given[:80]!r}"
    return ""


def not_drawn(pictures: list[Picture], records: Callable[[Picture], dict[str, object]],
              settings: Settings) -> list[Picture]:
    """The pictures still to draw: of --prompts, those not there yet with the same settings. Prints how many are there.
    """
    left = [picture for picture in pictures if not settings.prompts or not picture.path.exists()
            or in_the_way(picture.path, records(picture))]
    if len(left) < len(pictures) and not settings.follows:
        print(f"{len(pictures) - len(left)} of {len(pictures)} pictures are there already")
    return left


def groups(pictures: list[Picture], size: int) -> list[list[Picture]]:
    return [pictures[start:start + size] for start in range(0, len(pictures), size)]


# ---- finished latents, until their picture is written

def latent_file(path: Path) -> Path:
    return path.with_suffix(".latent.safetensors")


def keep_latent(path: Path, latent: Tensor, records: dict[str, object]) -> None:
    """Keep the latent of a picture, unless another run keeps one under its name."""
    file = latent_file(path)
    if not file.exists() or not other_latent(path, records):
        save(file, {"latent": latent}, written(records))


def other_latent(path: Path, records: dict[str, object]) -> str:
    """How the latent kept for a picture differs from the one that would be drawn; "" if it does not."""
    try:
        there = open_weights(latent_file(path)).metadata
    except (ValueError, OSError):  # another rank may have written its picture just now
        there = {}
    alone = records["start"] is None  # no stage redraws a picture: the VAE does not matter before it decodes
    return differs(there, {k: v for k, v in records.items() if not (alone and k in ("vae", "vae_dtype", "offset"))})


def kept_latent(path: Path, records: dict[str, object], channels: int) -> Tensor | None:
    """The latent of the picture that would be drawn, if an earlier run finished it and it is not damaged."""
    if not (file := latent_file(path)).exists() or in_the_way(path, records):
        return None
    latent = open_weights(file).get("latent")
    width, height = (int(side) // int(records["factor"]) for side in str(records["res"]).split("x"))
    whole = latent and latent.shape == (1, channels, height, width) and latent.read().isfinite().all()
    return latent.read().clone() if whole else None


def write_picture(path: Path, image: Tensor, records: dict[str, object]) -> None:
    """Write an image (3, H, W) in [-1, 1] and how it was drawn, complete or not at all; the OSError names it."""
    entries = PngImagePlugin.PngInfo()
    for name, value in written(records).items():
        entries.add_itxt(name, str(value))
    options = {"pnginfo": entries} if path.suffix.lower() == ".png" else {"quality": 95, "exif": exif_of(records)}
    try:
        with replacing(path) as temporary:
            Image.fromarray(to_pixels(image)).save(temporary, **options)
        if not other_latent(path, records):
            latent_file(path).unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"{path}: could not be written ({getattr(error, 'strerror', None) or error})") from None
