"""Aesthetic-4K folders: pictures with captions, read, cropped, and turned into training batches.

Paper     Diffusion-4K section 9 "Training Details": short side resized, random crop, normalised to [-1, 1];
          text embeddings computed once
Layout    DIR/metadata.jsonl   one JSON object a line: "file_name", "text" and, if you like, "alt": [more captions]
          DIR/<file_name>      jpg, png, webp …; shown upright, converted to 8-bit RGB
Crop      scaled until it covers the wanted size (Lanczos), cut at a random place, mirrored with probability 1/2
Aspect    pictures of one batch have one size: all res x res, or each picture goes to that of ASPECTS which is nearest its own, at
          about res x res pixels
Order     every epoch shuffles each size's pictures, cuts them into batches and shuffles these: a function of (seed, step) alone
Caches    DIR/.embeddings of captions, DIR/.latents of central crops; a file's name is the hash of all that decides its content
Run       python data.py check DIR                     stops at a broken line, then lists every broken picture
          python data.py encode DIR --model tiny-sd3   text embeddings of all captions; --latents --res 1024: latents too
          torchrun --nproc-per-node 8 data.py encode DIR --weights flux     each rank a share; the same command goes on where it was
Check     python -m pytest tests/test_data.py

Every draw is a function of a generator that the caller seeds.
"""

import argparse
import hashlib
import json
import math
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
from family import SD3, Family, find
from text import FluxText, SD3Text, check_t5_length
from vae import VAE, to_image

MOST_PIXELS = 400_000_000        # 20,000 x 20,000: more is refused before it is decoded
CACHE_BYTES = 1 << 30            # resized pictures kept in memory; latents likewise
ASPECTS = (1 / 2, 9 / 16, 2 / 3, 3 / 4, 4 / 5, 1, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2)  # width / height
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


def upright_size(path: str | os.PathLike) -> tuple[int, int]:
    """(width, height) as read_picture gives it, from the header alone: what stands before the pixels."""
    width, height = picture_size(path)
    with _errors_name(path), Image.open(path) as picture:
        turned = Image.Image.getexif(picture).get(0x0112, 1) > 4  # PNG's own getexif decodes the pixels first
    return (height, width) if turned else (width, height)


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


def resize_to_cover(picture: Image.Image, height: int, width: int) -> Image.Image:
    """Scale so that one side is as wanted and the other no shorter (Lanczos)."""
    scale = max(height / picture.height, width / picture.width)
    return picture.resize((max(width, round(picture.width * scale)), max(height, round(picture.height * scale))), Image.Resampling.LANCZOS)


def resize_short_side(picture: Image.Image, res: int) -> Image.Image:
    """Scale so that the shorter side is `res` pixels (Lanczos)."""
    return resize_to_cover(picture, res, res)


class Pictures:
    """Crops of a list of pictures; resized pictures stay in memory up to CACHE_BYTES."""

    def __init__(self, paths: list[Path]):
        self.paths = paths
        self._kept: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self.paths)

    def resized(self, index: int, height: int, width: int | None = None) -> np.ndarray:
        """(H, W, 3) uint8 of picture `index`, scaled until it covers height x width (a square without a width)."""
        key = (index, height, width or height)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        pixels = np.array(resize_to_cover(read_picture(self.paths[index]), *key[1:]))
        self._kept[key] = pixels
        self._bytes += pixels.nbytes
        while self._bytes > CACHE_BYTES and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return pixels

    def crop(self, index: int, height: int, width: int, generator: torch.Generator, flip: bool = True) -> Tensor:
        """(3, height, width) in [-1, 1]: a random place of picture `index`, scaled until it covers the crop."""
        return _random_cut(self.resized(index, height, width), height, width, generator, flip)

    def square(self, index: int, res: int, side: int, generator: torch.Generator, flip: bool = True) -> Tensor:
        """A random square of picture `index`.

        res      short side the picture is resized to, pixels
        side     side of the square, pixels, at most `res`
        flip     mirror with probability 1/2
        returns  (3, side, side) in [-1, 1]
        """
        return _random_cut(self.resized(index, res), side, side, generator, flip)

    def central_crop(self, index: int, height: int, width: int) -> Tensor:
        """(3, height, width) in [-1, 1]: the middle of picture `index`, scaled until it covers the crop."""
        pixels = self.resized(index, height, width)
        top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
        return to_image(pixels[top : top + height, left : left + width])

    def central_square(self, index: int, res: int) -> Tensor:
        """(3, res, res) in [-1, 1]: the middle of picture `index` at short side `res`."""
        return self.central_crop(index, res, res)


def _random_cut(pixels: np.ndarray, height: int, width: int, generator: torch.Generator, flip: bool) -> Tensor:
    top, left, mirror = (int(torch.randint(n, (1,), generator=generator))
                         for n in (pixels.shape[0] - height + 1, pixels.shape[1] - width + 1, 2))
    crop = pixels[top : top + height, left : left + width]
    return to_image(crop[:, ::-1] if flip and mirror else crop)


def aspect_sizes(res: int, step: int, most: float = math.inf) -> list[tuple[int, int]]:
    """(height, width) of every aspect: multiples of `step` of about res x res pixels, no side above `most`."""
    sizes = [(round(res / aspect**0.5 / step) * step, round(res * aspect**0.5 / step) * step) for aspect in ASPECTS]
    return [size for size in dict.fromkeys(sizes) if step <= min(size) and max(size) <= most]


def nearest_size(sizes: Sequence[tuple[int, int]], width: int, height: int) -> tuple[int, int]:
    """The (height, width) whose aspect is nearest that of a picture."""
    return min(sizes, key=lambda size: abs(math.log(size[1] / size[0]) - math.log(width / height)))


def batch_of_step(sizes: Sequence[object], batch: int, seed: int, step: int) -> list[int]:
    """Which pictures a training step sees, a function of its arguments alone.

    sizes    of every picture; a batch has one. Where the batch does not divide a size's pictures, the epoch's last batch of that size
             takes its first pictures again
    batch    pictures a step, over all ranks
    returns  batch indices; epoch = step // (batches an epoch), in which every picture comes at least once
    """
    members: dict[object, list[int]] = {}
    for index, size in enumerate(sizes):
        members.setdefault(size, []).append(index)
    count = sum(-(-len(each) // batch) for each in members.values())
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step // count) % 2**32)
    batches = []
    for each in members.values():
        shuffled = [each[k] for k in torch.randperm(len(each), generator=generator).tolist()]
        batches += [[shuffled[k % len(each)] for k in range(start, start + batch)] for start in range(0, len(each), batch)]
    return batches[int(torch.randperm(count, generator=generator)[step % count])]


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

    The key is what decides the numbers: the caption, the encoders' files (name, size, first and last bytes; their metadata
    may say a T5 length), the T5 length that was asked for, the dtype (fp32 on CPU, bf16 on a GPU).
    A cache made with other encoders is therefore never read.
    """

    def __init__(self, folder: str | os.PathLike, model: str | os.PathLike, device: str | torch.device = "cpu", family: Family = SD3,
                 t5_length: int | None = None):
        """
        folder     where the cache lives
        model      folder with the text encoders and tokenizers
        family     whose text conditioning it is
        t5_length  tokens of T5; None: the family's
        """
        self.model, self.device, self.family, self.t5_length = Path(model), device, family, t5_length or family.t5_length
        self.dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        self.cache = Path(folder) / f"{_fingerprint(self.model)}-{self.t5_length or 'usual'}-{str(self.dtype).removeprefix('torch.')}"
        self._encoders: SD3Text | FluxText | None = None

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(B, L, W) context and (B, P) pooled of captions that are not worth keeping, straight from the encoders."""
        if self._encoders is None:
            self._encoders = self.family.text.load(self.model, self.device, self.dtype, self.t5_length)
        return self._encoders.encode(captions)

    def fill(self, captions: Sequence[str], batch: int = 16, rank: int = 0, world: int = 1) -> int:
        """Encode the captions that the cache lacks, with a progress bar, and let go of the encoders.

        rank, world  this process encodes every world-th caption, from the rank-th
        returns      how many were encoded
        """
        lacking = [caption for caption in list(dict.fromkeys(captions))[rank::world] if not self._file(caption).is_file()]
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


class Latents:
    """Moments of central crops, which never change: computed once, kept in memory up to CACHE_BYTES and, if asked, on disk.

    The key is what decides the numbers: the picture (size, first and last bytes), the crop, the autoencoder's weights, factor and
    dilation. What another autoencoder made is therefore never read.
    """

    def __init__(self, pictures: Pictures, vae: VAE, factor: int, dilation: int, folder: Path | None = None):
        self.pictures, self.vae, self.factor, self.dilation, self.folder = pictures, vae, factor, dilation, folder
        self._kept: OrderedDict[tuple[int, int, int], tuple[Tensor, Tensor]] = OrderedDict()
        self._bytes = 0
        if folder:
            digest = hashlib.sha256(f"{factor} {dilation}".encode())
            for name, tensor in vae.encoder.state_dict().items():
                digest.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
            self.folder = folder / digest.hexdigest()[:16]

    @torch.no_grad()
    def moments(self, index: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """(mean, logvar) of a picture's central crop of height x width, (1, 16, h, w) each, on the device of the autoencoder."""
        key, weight = (index, height, width), next(self.vae.parameters())
        if key not in self._kept:
            file = self.folder and self.folder / f"{_digest([self.pictures.paths[index]], f'{height} {width}')[:32]}.safetensors"
            if file and file.is_file():
                saved = open_weights(file)
                found = saved["mean"].read(), saved["logvar"].read()
            else:
                found = self.vae.moments(self.pictures.central_crop(*key)[None].to(weight), self.factor, self.dilation)
                found = found[0].cpu(), found[1].cpu()
                if file:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    save(file, dict(zip(("mean", "logvar"), found, strict=True)), {"picture": self.pictures.paths[index].name})
            self._kept[key] = found
            self._bytes += 2 * found[0].nbytes
            while self._bytes > CACHE_BYTES and len(self._kept) > 1:
                self._bytes -= 2 * self._kept.popitem(last=False)[1][0].nbytes
        self._kept.move_to_end(key)
        return self._kept[key][0].to(weight), self._kept[key][1].to(weight)


def _digest(files: Sequence[Path], more: str = "") -> str:
    """A hash of the sizes, first and last bytes of files: their content as far as a change can be told without reading it all."""
    digest = hashlib.sha256(more.encode())
    for file in files:
        digest.update(f" {file.stat().st_size}".encode())
        with open(file, "rb") as f:
            digest.update(f.read(1 << 16))
            f.seek(-min(1 << 20, file.stat().st_size), os.SEEK_END)
            digest.update(f.read())
    return digest.hexdigest()


def _fingerprint(model: Path) -> str:
    files = sorted(f for f in model.glob("t[eo]*/*") if f.is_file())  # text_encoder*/, text_encoders/, tokenizer*/
    return _digest(files, " ".join(str(f.relative_to(model)) for f in files))[:16]


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


def encode(args: argparse.Namespace) -> None:
    """This rank's share of the embeddings and latents that the caches lack. Ranks need not meet: every file is written by one of them."""
    check_device(args.device)
    check_t5_length(args.t5_length)
    step = 2 * args.factor
    if args.batch < 1:
        raise ValueError(f"--batch {args.batch}: give 1 or more")
    if args.res < step or args.res % step:
        raise ValueError(f"--res {args.res}: give a multiple of {step} at --factor {args.factor}")
    rank, world, local = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = f"cuda:{local}" if args.device == "cuda" else args.device
    items, folder = read_folder(args.folder), model_folder(args.model, args.weights)
    family, transformer, vae_path = find(folder)
    captions = ["", *(caption for item in items for caption in item.captions)]
    embeddings = Embeddings(Path(args.folder) / ".embeddings", folder, device, family, args.t5_length)
    encoded, of = embeddings.fill(captions, args.batch, rank, world), f"rank {rank} of {world}: " if world > 1 else ""
    print(f"{of}{encoded} captions encoded, {len(set(captions))} in {embeddings.cache}")
    if args.latents:
        pictures = Pictures([item.path for item in items])
        most = family.config(transformer.part("model.diffusion_model.")).table_side * step
        sizes = sizes_of(items, args.res, step, most, args.aspect)
        latents = Latents(pictures, VAE.load(vae_path, device), args.factor, args.dilation, Path(args.folder) / ".latents")
        for index in tqdm(range(rank, len(items), world), desc="latents", file=sys.stderr):
            latents.moments(index, *sizes[index])
        print(f"{of}{len(range(rank, len(items), world))} latents in {latents.folder}")


def sizes_of(items: Sequence[Item], res: int, step: int, most: float, aspect: bool) -> list[tuple[int, int]]:
    """(height, width) of every picture's crop; ValueError that names a picture which would have to be enlarged.

    step    sides are multiples of it
    most    longest side, pixels, that the transformer's position table allows
    aspect  False: all are res x res
    """
    choice, sizes = aspect_sizes(res, step, most) if aspect else [(res, res)], []
    for item in items:
        width, height = upright_size(item.path)
        size = nearest_size(choice, width, height)
        if height < size[0] or width < size[1]:
            if not aspect:
                raise ValueError(f"{item.path}: its short side is {min(width, height)} px, below --res {res}: "
                                 "enlarging adds no detail; leave it out")
            raise ValueError(f"{item.path}: {width}x{height} px do not cover {size[1]}x{size[0]}, the nearest aspect at --res {res}: "
                             "enlarging adds no detail; leave it out")
        sizes.append(size)
    return sizes


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
    encodes.add_argument("--t5-length", type=int, help="tokens of T5, as training will be told (SD3: 77, Flux-dev: 512)")
    encodes.add_argument("--batch", type=int, default=16, help="captions at a time")
    encodes.add_argument("--latents", action="store_true", help="latents of central crops too, for train.py --cache-latents")
    encodes.add_argument("--res", type=int, default=1024, help="of the latents: side of the squares, pixels")
    encodes.add_argument("--aspect", action="store_true", help="of the latents: aspect buckets instead of squares")
    encodes.add_argument("--factor", type=int, default=16, choices=(8, 16), help="of the latents: down-sampling of the VAE")
    encodes.add_argument("--dilation", type=int, default=2, choices=(1, 2), help="of the latents: of the first convolution at factor 16")
    encodes.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = parser.parse_args()
    try:
        if args.command == "check":
            return check(args.folder)
        encode(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
