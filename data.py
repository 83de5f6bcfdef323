"""Aesthetic-4K folders: pictures with captions, checked, read and cropped. Imports no model and no torch.

Paper     Diffusion-4K section 9 "Training Details": short side resized, then cropped
Layout    DIR/metadata.jsonl   one JSON object per line: "file_name", "text" and, optionally, "alt": [more captions]
          DIR/<file_name>      jpg, png, webp …; turned upright, converted to 8-bit RGB
Crop      a picture is scaled until it covers the crop (Lanczos); training/batches.py draws the place and mirrors
Aspect    the pictures of a batch share one size: res x res, or the nearest of ASPECTS with about res x res pixels
Caches    DIR/.embeddings of captions, DIR/.latents of central crops: training/cache.py
Run       python data.py check DIR                     stops at a broken line, then lists every broken picture
          python data.py encode DIR --model tiny-sd3   text embeddings of all captions; --latents: latents too
          torchrun --nproc-per-node 8 data.py encode DIR --weights flux    each rank its share; run it again to resume
Check     python -m pytest tests/test_data.py
"""

import argparse
import json
import math
import os
import struct
import sys
from collections import OrderedDict
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

MOST_PIXELS = 400_000_000        # 20,000 x 20,000: a larger picture is refused before it is decoded
CACHE_BYTES = 1 << 30            # of resized pictures in memory
ASPECTS = (1 / 2, 9 / 16, 2 / 3, 3 / 4, 4 / 5, 1, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2)  # width / height
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error)  # Pillow's on broken files


@dataclass(frozen=True)
class Item:
    """One picture and its captions: `captions[0]` is "text", the others are "alt"."""

    path: Path
    captions: tuple[str, ...]


def read_folder(folder: str | os.PathLike) -> list[Item]:
    """Read and check DIR/metadata.jsonl; pictures are not opened.

    folder   see Layout above
    returns  one Item per line, in the file's order
    raises   FileNotFoundError without metadata.jsonl; ValueError that names the line: broken JSON, no file_name or
             text, an empty caption, "alt" that is no list, a path outside the folder, a picture missing or listed twice
    """
    folder = Path(folder)
    listing = folder / "metadata.jsonl"
    if not listing.is_file():
        raise FileNotFoundError(
            f"{listing}: not found; a data folder holds pictures and a metadata.jsonl with file_name and text")
    try:
        # splitlines() would also cut captions at U+2028 and the like
        lines = listing.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{listing}: not UTF-8 ({error})") from None
    items: dict[Path, Item] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            item = _read_line(folder, line, f"{listing}:{number}", items)
            items[item.path] = item
    if not items:
        raise ValueError(f"{listing}: empty")
    return list(items.values())


def _read_line(folder: Path, line: str, where: str, before: Container[Path]) -> Item:
    try:
        row = json.loads(line)
        name, text, alt = row["file_name"], row["text"], row.get("alt", [])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f'{where}: each line is a JSON object with "file_name" and "text" '
                         f"({type(error).__name__}: {error})") from None
    if not isinstance(alt, list) or not all(isinstance(s, str) and s.strip() for s in (name, text, *alt)):
        raise ValueError(f'{where}: file_name, text and every entry of the list "alt" must be non-empty text')
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{where}: {name!r} leads out of the folder")
    if folder / name in before:
        raise ValueError(f"{where}: {name!r} is listed twice")
    if not (folder / name).is_file():
        raise ValueError(f"{where}: no picture {name!r} in {folder}")
    return Item(folder / name, (text, *alt))


# ---- pictures

@contextmanager
def _errors_name(path: str | os.PathLike) -> Iterator[None]:
    """Turn Pillow's errors into one ValueError with the file's name; meanwhile lift its own size limit, a global."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    except UNREADABLE as error:
        size = os.path.getsize(path) if os.path.exists(path) else 0
        raise ValueError(f"{path}: not a complete picture ({size} bytes; {error})") from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def picture_size(path: str | os.PathLike) -> tuple[int, int]:
    """(width, height) in pixels as stored, from the header alone.

    raises   ValueError that names the file if it is no picture or has more than MOST_PIXELS
    """
    with _errors_name(path), Image.open(path) as picture:
        width, height = picture.size
    if width * height > MOST_PIXELS:
        raise ValueError(f"{path}: {width}x{height} pixels; at most {MOST_PIXELS:,} are read, scale it down first")
    return width, height


def upright_size(path: str | os.PathLike) -> tuple[int, int]:
    """(width, height) as read_picture returns them, from the header alone: the bytes before the pixels."""
    width, height = picture_size(path)
    with _errors_name(path), Image.open(path) as picture:
        turned = Image.Image.getexif(picture).get(0x0112, 1) > 4  # PNG's own getexif decodes the pixels first
    return (height, width) if turned else (width, height)


def read_picture(path: str | os.PathLike) -> Image.Image:
    """Decode a picture, upright, as 8-bit RGB.

    path     any format Pillow reads; gray, palette, CMYK and 16-bit are converted, transparency is laid over white
    returns  PIL image, mode RGB
    raises   ValueError that names the file if it is no picture, truncated, over MOST_PIXELS, or floating-point gray
    """
    picture_size(path)
    with _errors_name(path), Image.open(path) as picture:
        picture = ImageOps.exif_transpose(picture)
        if picture.mode == "F":
            raise ValueError("floating-point gray has no agreed white; save it as 8 or 16 bit")
        if picture.mode.startswith("I"):
            levels = np.asarray(picture, dtype=np.float64)
            return Image.fromarray((levels / 257).round().clip(0, 255).astype(np.uint8)).convert("RGB")
        if "A" in picture.getbands() or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
        return picture.convert("RGB")


def resize_to_cover(picture: Image.Image, height: int, width: int) -> Image.Image:
    """Scale so that one side fits exactly and the other is no shorter (Lanczos)."""
    scale = max(height / picture.height, width / picture.width)
    size = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS)


class Pictures:
    """A list of pictures, resized when needed; up to CACHE_BYTES of resized pixels stay in memory."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = list(paths)
        self._recent: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self.paths)

    def resized(self, index: int, height: int, width: int) -> np.ndarray:
        """(H, W, 3) uint8 of picture `index`, scaled until it covers height x width."""
        key = (index, height, width)
        if key not in self._recent:
            pixels = np.array(resize_to_cover(read_picture(self.paths[index]), height, width))
            self._recent[key] = pixels
            self._bytes += pixels.nbytes
            while self._bytes > CACHE_BYTES and len(self._recent) > 1:
                self._bytes -= self._recent.popitem(last=False)[1].nbytes
        self._recent.move_to_end(key)
        return self._recent[key]

    def central_crop(self, index: int, height: int, width: int) -> np.ndarray:
        """(height, width, 3) uint8: the middle of picture `index`, scaled until it covers the crop."""
        pixels = self.resized(index, height, width)
        top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
        return pixels[top:top + height, left:left + width]


# ---- sizes

def aspect_sizes(res: int, step: int, most: float = math.inf) -> list[tuple[int, int]]:
    """(height, width) of every aspect: multiples of `step`, about res x res pixels, no side above `most`."""
    sizes = [(round(res / aspect**0.5 / step) * step, round(res * aspect**0.5 / step) * step) for aspect in ASPECTS]
    return [size for size in dict.fromkeys(sizes) if step <= min(size) and max(size) <= most]


def nearest_size(sizes: Sequence[tuple[int, int]], width: int, height: int) -> tuple[int, int]:
    """The (height, width) whose aspect is nearest that of a picture."""
    return min(sizes, key=lambda size: abs(math.log(size[1] / size[0]) - math.log(width / height)))


def sizes_of(items: Sequence[Item], res: int, step: int, most: float, aspect: bool) -> list[tuple[int, int]]:
    """(height, width) of every picture's crop, in pixels.

    step    sides are multiples of it
    most    longest side that the transformer's position table allows
    aspect  False: all are res x res
    raises  ValueError that names a picture which would have to be enlarged
    """
    choice, sizes = aspect_sizes(res, step, most) if aspect else [(res, res)], []
    for item in items:
        width, height = upright_size(item.path)
        size = nearest_size(choice, width, height)
        if height < size[0] or width < size[1]:
            small = f"its short side is {min(width, height)} px, below --res {res}"
            if aspect:
                small = f"{width}x{height} px do not cover {size[1]}x{size[0]}, the nearest aspect at --res {res}"
            raise ValueError(f"{item.path}: {small}: enlarging adds no detail; leave it out")
        sizes.append(size)
    return sizes


# ---- the commands

def check(folder: str) -> int:
    """Open every picture and every line and print sizes; returns 1 if anything is wrong, else 0."""
    items, errors, sides = read_folder(folder), [], []
    for item in tqdm(items, desc="pictures", file=sys.stderr):
        try:
            sides.append(read_picture(item.path).size)
        except ValueError as error:
            errors.append(str(error))
    for error in errors:
        print(f"error: {error}")
    if sides:
        width, height = (int(np.median(side)) for side in zip(*sides, strict=True))
        print(f"{len(sides)} pictures, {sum(len(item.captions) for item in items)} captions; "
              f"median {width}x{height} px, short sides from {min(map(min, sides))} px")
    return 1 if errors else 0


def encode(folder: str, model: str, weights: str | None, t5_length: int | None, batch: int, device: str | None,
           latents: bool, res: int, aspect: bool, factor: int, dilation: int) -> None:
    """Write this rank's share of the embeddings and latents that the caches lack; every file is written by one rank."""
    from checkpoint import check_device, model_folder
    from family import find
    from files import need
    from text import check_t5_length
    from training.cache import Embeddings, Latents
    from training.ranks import device_of, launched
    from vae import VAE

    device = check_device(device)
    check_t5_length(t5_length)
    step = 2 * factor
    need(batch >= 1, "batch", batch, "1 or more")
    need(res >= step and res % step == 0, "res", res, f"a multiple of {step} at --factor {factor}")
    rank, world = launched()
    device, share = device_of(device), f"rank {rank} of {world}: " if world > 1 else ""
    items, source = read_folder(folder), model_folder(model, weights)
    family, transformer, vae_path = find(source)
    captions = ["", *(caption for item in items for caption in item.captions)]
    embeddings = Embeddings(Path(folder) / ".embeddings", source, device, family, t5_length)
    encoded = embeddings.fill(captions, batch, rank, world)
    print(f"{share}{encoded} captions encoded, {len(set(captions))} in {embeddings.cache}")
    if latents:
        most = family.config(transformer.part("model.diffusion_model.")).table_side * step
        sizes = sizes_of(items, res, step, most, aspect)
        pictures = Pictures([item.path for item in items])
        moments = Latents(pictures.paths, pictures.central_crop, VAE.load(vae_path, device), factor, dilation,
                          Path(folder) / ".latents")
        print(f"{share}{moments.fill(sizes, rank, world)} latents in {moments.folder}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Check and encode folders of captioned pictures.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    about = "open every picture and line, list what is wrong"
    add = commands.add_parser("check", help=about, allow_abbrev=False).add_argument
    add("folder", metavar="DIR", help="pictures and metadata.jsonl")
    about = "compute the text embeddings of all captions once"
    encodes = commands.add_parser("encode", help=about, description=about, allow_abbrev=False)
    add = encodes.add_argument
    add("folder", metavar="DIR", help="pictures and metadata.jsonl")
    add("--model", default="tiny-sd3", help="name of a folder in models/ (default: %(default)s)")
    add("--weights", metavar="DIR", help="another model folder")
    add("--t5-length", type=int, help="tokens of T5, the same as in training (default: SD3 77, Flux-dev 512)")
    add("--batch", type=int, default=16, help="captions encoded together (default: %(default)s)")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--latents", action="store_true", help="encode central crops too, for train.py --cache-latents")
    add = encodes.add_argument_group("with --latents, the same as in training").add_argument
    add("--res", type=int, default=1024, help="side of the squares, pixels (default: %(default)s)")
    add("--aspect", action="store_true", help="aspect-ratio buckets instead of squares")
    add("--factor", type=int, default=16, choices=(8, 16), help="pixels per latent position (default: %(default)s)")
    add("--dilation", type=int, default=2, choices=(1, 2),
        help="of the VAE's first convolution at factor 16; 1: as released (default: %(default)s)")
    options = vars(parser.parse_args())
    try:
        if options.pop("command") == "check":
            raise SystemExit(check(options["folder"]))
        encode(**options)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
