"""Aesthetic-4K folders: pictures with captions, read, cropped, and turned into training batches.

Paper     Diffusion-4K section 9 "Training Details": short side resized, random crop, normalised to [-1, 1];
          text embeddings computed once
Layout    DIR/metadata.jsonl   one JSON object a line: "file_name", "text" and, if you like, "alt": [more captions]
          DIR/<file_name>      jpg, png, webp …; shown upright, converted to 8-bit RGB
Crop      short side resized to `res` (Lanczos), a random square of res x res, mirrored with probability 1/2
Run       python data.py check DIR                   stops at a broken line, then lists every broken picture
          python data.py encode DIR --model tiny-sd3   text embeddings of all captions, cached in DIR/.embeddings
Check     python -m pytest tests/test_data.py

Every draw is a function of a generator that the caller seeds.
"""

import argparse
import hashlib
import json
import os
import struct
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from checkpoint import check_device, model_folder, open_weights, save
from text import T5_LENGTH, SD3Text

MOST_PIXELS = 400_000_000        # 20,000 x 20,000: more is refused before it is decoded
CACHE_BYTES = 1 << 30            # resized pictures kept in memory
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error)  # what Pillow's formats raise on broken files


@dataclass(frozen=True)
class Item:
    """One picture and its captions: `captions[0]` is "text", the others are "alt"."""

    path: Path
    captions: tuple[str, ...]


def read_folder(folder: str | os.PathLike) -> list[Item]:
    """Read and check DIR/metadata.jsonl; pictures are not opened.

    folder   see Layout above
    returns  one Item a line, in the file's order
    raises   FileNotFoundError without metadata.jsonl; ValueError that names the line: broken JSON, no file_name, no text,
             an empty caption, "alt" that is no list, a path out of the folder, a picture that is not there or comes twice
    """
    folder = Path(folder)
    listing = folder / "metadata.jsonl"
    if not listing.is_file():
        raise FileNotFoundError(f"{listing}: not found; a data folder holds pictures and a metadata.jsonl with file_name and text")
    try:
        lines = listing.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would also cut captions at U+2028 and the like
    except UnicodeDecodeError as error:
        raise ValueError(f"{listing}: not UTF-8 ({error})") from None
    items: dict[Path, Item] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{listing}:{number}"
        try:
            row = json.loads(line)
            name, text, alt = row["file_name"], row["text"], row.get("alt", [])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f'{where}: each line is a JSON object with "file_name" and "text" ({type(error).__name__}: {error})') from None
        if not isinstance(alt, list) or not all(isinstance(s, str) and s.strip() for s in (name, text, *alt)):
            raise ValueError(f'{where}: file_name, text and every entry of the list "alt" must be text that is not empty')
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{where}: {name!r} leads out of the folder")
        if folder / name in items:
            raise ValueError(f"{where}: {name!r} stands twice")
        if not (folder / name).is_file():
            raise ValueError(f"{where}: no picture {name!r} in {folder}")
        items[folder / name] = Item(folder / name, (text, *alt))
    if not items:
        raise ValueError(f"{listing}: empty")
    return list(items.values())


@contextmanager
def _errors_name(path: str | os.PathLike) -> Iterator[None]:
    """Pillow's errors become one ValueError with the file's name; its own size limit, a global, is off meanwhile."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    except UNREADABLE as error:
        size = os.path.getsize(path) if os.path.exists(path) else 0
        raise ValueError(f"{path}: not a whole picture ({size} bytes; {error})") from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def picture_size(path: str | os.PathLike) -> tuple[int, int]:
    """(width, height) in pixels, before any turning, from the header alone.

    raises   ValueError that names the file if it is no picture, or over MOST_PIXELS
    """
    with _errors_name(path), Image.open(path) as picture:
        width, height = picture.size
    if width * height > MOST_PIXELS:
        raise ValueError(f"{path}: {width}x{height} pixels; at most {MOST_PIXELS:,} are read, scale it down first")
    return width, height


def read_picture(path: str | os.PathLike) -> Image.Image:
    """Decode a picture, upright, as 8-bit RGB.

    path     any format Pillow reads; gray, palette, CMYK and 16-bit are converted, transparency is laid over white
    returns  PIL image, mode RGB
    raises   ValueError that names the file if it is no picture, truncated, over MOST_PIXELS, or gray in floating point
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


def resize_short_side(picture: Image.Image, res: int) -> Image.Image:
    """Scale so that the shorter side is `res` pixels (Lanczos)."""
    width, height = picture.size
    scale = res / min(width, height)
    return picture.resize((max(res, round(width * scale)), max(res, round(height * scale))), Image.Resampling.LANCZOS)


def to_image(pixels: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 to (3, H, W) float in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float() / 127.5 - 1


def to_pixels(image: Tensor) -> np.ndarray:
    """(3, H, W) in [-1, 1] to (H, W, 3) uint8, rounded."""
    return ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()


class Pictures:
    """Random squares of a list of pictures; resized pictures stay in memory up to CACHE_BYTES."""

    def __init__(self, paths: list[Path]):
        self.paths = paths
        self._kept: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self.paths)

    def resized(self, index: int, res: int) -> np.ndarray:
        """(H, W, 3) uint8 of picture `index` with its short side at `res` pixels."""
        key = (index, res)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        pixels = np.array(resize_short_side(read_picture(self.paths[index]), res))
        self._kept[key] = pixels
        self._bytes += pixels.nbytes
        while self._bytes > CACHE_BYTES and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return pixels

    def square(self, index: int, res: int, side: int, generator: torch.Generator, flip: bool = True) -> Tensor:
        """A random square of picture `index`.

        res      short side the picture is resized to, pixels
        side     side of the square, pixels, at most `res`
        flip     mirror with probability 1/2
        returns  (3, side, side) in [-1, 1]
        """
        pixels = self.resized(index, res)
        top, left, mirror = (int(torch.randint(n, (1,), generator=generator))
                             for n in (pixels.shape[0] - side + 1, pixels.shape[1] - side + 1, 2))
        crop = pixels[top : top + side, left : left + side]
        return to_image(crop[:, ::-1] if flip and mirror else crop)

    def central_square(self, index: int, res: int) -> Tensor:
        """(3, res, res) in [-1, 1]: the middle of picture `index` at short side `res`."""
        pixels = self.resized(index, res)
        top, left = (pixels.shape[0] - res) // 2, (pixels.shape[1] - res) // 2
        return to_image(pixels[top : top + res, left : left + res])


def vary_caption(captions: Sequence[str], generator: torch.Generator, drop_words: float = 0.0, drop_caption: float = 0.0) -> str:
    """The caption of one training example.

    captions      of one picture, any of them with the same probability
    drop_words    probability of each word to be left out, applied to every second caption; one word always stays
    drop_caption  probability of the empty caption, which classifier-free guidance needs
    returns       text
    """
    caption = captions[int(torch.randint(len(captions), (1,), generator=generator))]
    empty, thinned = torch.rand(2, generator=generator).tolist()
    if empty < drop_caption:
        return ""
    if not drop_words or thinned < 0.5:
        return caption
    words = caption.split()
    stay = torch.rand(len(words), generator=generator)
    kept = [word for word, draw in zip(words, stay.tolist(), strict=True) if draw >= drop_words]
    return " ".join(kept or [words[int(stay.argmax())]])


class Embeddings:
    """Text embeddings of captions, each computed once and kept on disk.

    The key is what decides the numbers: the caption, the encoders' files (name, size, first and last bytes), the
    T5 length, the dtype (fp32 on CPU, bf16 on a GPU).
    A cache made with other encoders is therefore never read.
    """

    def __init__(self, folder: str | os.PathLike, model: str | os.PathLike, device: str | torch.device = "cpu"):
        """
        folder  where the cache lives
        model   folder with the text encoders and tokenizers
        """
        self.model, self.device = Path(model), device
        self.dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        self.cache = Path(folder) / f"{_fingerprint(self.model)}-{T5_LENGTH}-{str(self.dtype).removeprefix('torch.')}"
        self._encoders: SD3Text | None = None

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(B, L, W) context and (B, P) pooled of captions that are not worth keeping, straight from the encoders."""
        if self._encoders is None:
            self._encoders = SD3Text.load(self.model, self.device, self.dtype, T5_LENGTH)
        return self._encoders.encode(captions)

    def fill(self, captions: Sequence[str], batch: int = 16) -> int:
        """Encode the captions that the cache lacks, with a progress bar, and let go of the encoders.

        returns  how many were encoded
        """
        lacking = [caption for caption in dict.fromkeys(captions) if not self._file(caption).is_file()]
        for start in tqdm(range(0, len(lacking), batch), desc="text embeddings", file=sys.stderr, disable=not lacking):
            chunk = lacking[start : start + batch]
            encoded = self.encode(chunk)
            self.cache.mkdir(parents=True, exist_ok=True)
            for caption, context, pooled in zip(chunk, *encoded, strict=True):
                save(self._file(caption), {"context": context, "pooled": pooled}, {"caption": caption})
        self._encoders = None
        return len(lacking)

    def read(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(B, L, W) context and (B, P) pooled from the cache; fill() must have seen the captions."""
        files = [open_weights(self._file(caption)) for caption in captions]
        context, pooled = (torch.stack([file[name].read().float() for file in files]) for name in ("context", "pooled"))
        return context.to(self.device), pooled.to(self.device)

    def _file(self, caption: str) -> Path:
        return self.cache / f"{hashlib.sha256(caption.encode()).hexdigest()[:32]}.safetensors"


def _fingerprint(model: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(f for f in model.glob("t[eo]*/*") if f.is_file()):  # text_encoder*/, text_encoders/, tokenizer*/
        digest.update(f"{file.relative_to(model)} {file.stat().st_size}".encode())
        with open(file, "rb") as f:
            digest.update(f.read(1 << 16))
            f.seek(-min(1 << 20, file.stat().st_size), os.SEEK_END)
            digest.update(f.read())
    return digest.hexdigest()[:16]


def check(folder: str) -> None:
    """Open every picture and every line; print sizes; exit with 1 if anything is wrong."""
    items, wrong, sides = read_folder(folder), [], []
    for item in tqdm(items, desc="pictures", file=sys.stderr):
        try:
            sides.append(read_picture(item.path).size)
        except ValueError as error:
            wrong.append(str(error))
    for line in wrong:
        print(f"error: {line}")
    if sides:
        widths, heights = zip(*sides, strict=True)
        print(f"{len(sides)} pictures, {sum(len(item.captions) for item in items)} captions; "
              f"median {int(np.median(widths))}x{int(np.median(heights))} px, short sides from {min(map(min, sides))} px")
    raise SystemExit(1 if wrong else 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    checks = commands.add_parser("check", help="open every picture and line, list what is wrong")
    checks.add_argument("folder", metavar="DIR", help="pictures and metadata.jsonl")
    encodes = commands.add_parser("encode", help="compute the text embeddings of all captions once",
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    encodes.add_argument("folder", metavar="DIR", help="pictures and metadata.jsonl")
    encodes.add_argument("--model", default="tiny-sd3", help="name of a folder in models/")
    encodes.add_argument("--weights", metavar="DIR", help="another model folder")
    encodes.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = parser.parse_args()
    try:
        if args.command == "check":
            return check(args.folder)
        check_device(args.device)
        captions = ["", *(caption for item in read_folder(args.folder) for caption in item.captions)]
        embeddings = Embeddings(Path(args.folder) / ".embeddings", model_folder(args.model, args.weights), args.device)
        print(f"{embeddings.fill(captions)} captions encoded, {len(set(captions))} in {embeddings.cache}")
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
