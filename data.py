"""Aesthetic-4K folders: pictures with captions, checked, read and cropped. Imports no model and no torch.

Paper     Diffusion-4K section 9 "Training Details": short side resized, then cropped
Layout    DIR/metadata.jsonl or metadata.csv    file names and captions: collecting/listings.py
          DIR/<file_name>      jpg, png, webp …; turned upright, converted to 8-bit sRGB: docs/formats.md
Crop      a picture is scaled until it covers the crop (Lanczos); training/batches.py draws the place and mirrors
Aspect    the pictures of a batch share one size: res x res, or the nearest of ASPECTS with about res x res pixels
Caches    DIR/.embeddings of captions, DIR/.latents of central crops, or below --cache: training/cache.py
Run       python data.py check DIR                     stops at a broken line, then lists every broken picture
          python data.py encode DIR --model tiny-sd3   text embeddings of all captions; --latents: latents too
          torchrun --nproc-per-node 8 data.py encode DIR --weights flux    each rank its share; run it again to resume
          python data.py unpack, caption, stats, select    make and examine data folders: docs/data.md
Check     python -m pytest tests/test_data.py tests/test_colours.py
"""

if __name__ == "__main__":  # Ctrl-C during an import ends in one line
    import files
    files.end_on_interrupt()

import argparse
import math
import os
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from threading import Lock

import numpy as np
from PIL import Image
from tqdm import tqdm

from collecting.captions import captions, to_ask
from collecting.listings import LISTINGS, Item, read_folder
from collecting.selection import DISTANCE, LEAST, MOST, SMALLEST, measure, verdicts, write_selection
from collecting.shards import unpack as unpack_shards
from collecting.statistics import plot, report, statistics
from files import check_path, need, printable, replacing, run_command, writable
from reading.endpoint import add_flags, open_endpoint
from reading.pictures import MOST_PIXELS, read_picture, upright_size

CACHE_BYTES = 1 << 30            # of resized pictures in memory
ASPECTS = (1 / 2, 9 / 16, 2 / 3, 3 / 4, 4 / 5, 1, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2)  # width / height
NOTES = {"converted": "converted to sRGB from other colours", "broken": "with a broken colour profile, read as sRGB",
         "frames": "animations, of which the first frame is read",
         "unscored": "too small or too large for metrics.py, which takes sides of 64 to 65,500 px"}


# ---- pictures

def resize_to_cover(picture: Image.Image, height: int, width: int, resample: str = "lanczos") -> Image.Image:
    """Scale so that one side fits exactly and the other is no shorter; resample: lanczos or bilinear."""
    return picture.resize(covering(picture.size, height, width), Image.Resampling[resample.upper()])


def covering(size: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """(width, height) of a picture once it covers height x width; size: its own (width, height)."""
    scale = max(height / size[1], width / size[0])
    return max(width, round(size[0] * scale)), max(height, round(size[1] * scale))


def check_covering(path: str | os.PathLike, size: tuple[int, int], height: int, width: int) -> None:
    """ValueError if a picture is so narrow that it has more than MOST_PIXELS once it covers height x width."""
    if (pixels := math.prod(covering(size, height, width))) > MOST_PIXELS:
        raise ValueError(f"{path}: {size[0]}x{size[1]} px become {pixels:,} pixels that cover {width}x{height}; at "
                         f"most {MOST_PIXELS:,} are read: cut it into pieces, or leave it out")


class Pictures:
    """A list of pictures, resized when needed; up to CACHE_BYTES of resized pixels stay in memory; threads share it."""

    def __init__(self, paths: Sequence[Path], resample: str = "lanczos"):
        self.paths, self.resample = list(paths), resample
        self._recent: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self.paths)

    def resized(self, index: int, height: int, width: int) -> np.ndarray:
        """(H, W, 3) uint8 of picture `index`, scaled until it covers height x width."""
        key = (index, height, width)
        pixels = self._recent.get(key)
        if pixels is None:  # two threads may read one picture at the same time; the second result is kept
            picture = read_picture(self.paths[index])
            check_covering(self.paths[index], picture.size, height, width)
            pixels = np.array(resize_to_cover(picture, height, width, self.resample))
        with self._lock:
            self._recent.pop(key, None)
            self._recent[key] = pixels  # the newest is last
            while sum(kept.nbytes for kept in self._recent.values()) > CACHE_BYTES and len(self._recent) > 1:
                self._recent.popitem(last=False)
        return pixels

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


def sizes_of(items: Sequence[Item], res: int, step: int, most: float, aspect: bool,
             small: str = "refuse") -> list[tuple[int, int] | None]:
    """(height, width) of every picture's crop, in pixels.

    step    sides are multiples of it
    most    longest side that the transformer's position table allows
    aspect  False: all are res x res
    small   a picture that does not cover its crop: refuse; skip, its size is None; enlarge
    raises  ValueError if `most` is too little; that names the smallest picture, if they are refused, or if none is
            left; or one so narrow that it has more than MOST_PIXELS once it is enlarged
    """
    choice, sizes, below = aspect_sizes(res, step, most) if aspect else [(res, res)], [], []
    if not choice or max(map(max, choice)) > most:
        raise ValueError(f"--res {res}: the model's position table ends at {most:g} px per side at this --factor; give "
                         "less")
    for item in items:
        width, height = upright_size(item.path)
        lack = too_small(width, height, res, choice)
        if lack:
            below.append((width * height, f"{item.path}: {lack}"))
        if lack and small == "enlarge":
            check_covering(item.path, (width, height), *nearest_size(choice, width, height))
        sizes.append(None if lack and small == "skip" else nearest_size(choice, width, height))
    if below and (small == "refuse" or small == "skip" and len(below) == len(items)):
        raise ValueError(f"{min(below)[1]}; so are {len(below)} of {len(items)} pictures: list them with data.py check "
                         f"DIR --res {res}{' --aspect' * aspect}, leave them out with --small skip, or --small enlarge")
    return sizes


def too_small(width: int, height: int, res: int, choice: Sequence[tuple[int, int]]) -> str:
    """Why a picture does not cover its crop, "" if it does; choice: the sizes of crops."""
    size = nearest_size(choice, width, height)
    if height >= size[0] and width >= size[1]:
        return ""
    if len(choice) == 1:
        return f"its short side is {min(width, height)} px, below --res {res}"
    return f"{width}x{height} px do not cover {size[1]}x{size[0]}, the nearest aspect at --res {res}"


# ---- the commands

def check(folder: str, res: int | None = None, aspect: bool = False) -> int:
    """Open every picture and every line and print sizes; returns 1 if anything is wrong, else 0.

    res, aspect  of the training to come, at factor 16: pictures that are too small are errors
    """
    items, errors, sides, notes = read_folder(folder), [], [], Counter()
    need(res is None or res >= 32 and res % 32 == 0, "res", res, "a multiple of 32")
    if aspect and not res:
        raise ValueError("--aspect: sizes depend on --res; give it too")
    choice = (aspect_sizes(res, 32) if aspect else [(res, res)]) if res else []
    for item in tqdm(items, desc="pictures", file=sys.stderr):
        try:
            picture = read_picture(item.path)
            sides.append(picture.size)
            notes.update({picture.info.get("profile", ""), "frames" * picture.info.get("frames", False),
                          "unscored" * (min(picture.size) < 64 or max(picture.size) > 65_500)})
            if choice and (lack := too_small(*picture.size, res, choice)):
                errors.append(f"{item.path}: {lack}")
        except ValueError as error:
            errors.append(str(error))
    _named(errors)
    if sides:
        width, height = (int(np.median(side)) for side in zip(*sides, strict=True))
        print(f"{len(sides)} pictures, {sum(len(item.captions) for item in items)} captions; "
              f"median {width}x{height} px, short sides from {min(map(min, sides))} px")
    for note, text in NOTES.items():
        if notes[note]:
            print(f"{notes[note]} {text}")
    for other in ("metadata.csv", "metadata.parquet"):
        if (Path(folder) / other).exists() and (Path(folder) / LISTINGS[0]).exists():
            print(f"note: {other} is not read, {LISTINGS[0]} is")
    return 1 if errors else 0


def encode(folder: str, model: str, weights: str | None, t5_length: int | None, batch: int, device: str | None,
           latents: bool, res: int, aspect: bool, small: str, factor: int, dilation: int, cache: str | None) -> None:
    """Write this rank's share of the embeddings and latents that the caches lack; every file is written by one rank."""
    from checkpoint import model_folder
    from family import find
    from files import launched
    from layers import reach
    from machine.memory import check_device, device_of
    from text import check_t5_length
    from training.cache import Embeddings, Latents
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
    caches = Path(cache or folder)
    captions = ["", *(caption for item in items for caption in item.captions)]
    if latents:
        config = family.config(transformer.part("model.diffusion_model."))
        most = reach(config.table_side, config.positions) * step
        sizes = sizes_of(items, res, step, most, aspect, small)
    t5_length = t5_length or transformer.number("t5_length", integer=True)  # as train.py will
    embeddings = Embeddings(caches / ".embeddings", source, device, family, t5_length)
    encoded = embeddings.fill(captions, batch, rank, world)
    print(f"{share}{encoded} captions encoded, {len(set(captions))} in {embeddings.cache}")
    if latents:
        pictures = Pictures([item.path for item, size in zip(items, sizes, strict=True) if size])
        sizes = [size for size in sizes if size]
        vae = VAE.load(vae_path, device, fallback=family.latent_scale)
        moments = Latents(pictures.paths, pictures.central_crop, vae, factor, dilation, caches / ".latents",
                          pictures.resample)
        print(f"{share}{moments.fill(sizes, rank, world)} latents encoded, {len(sizes)} in {moments.folder}")


def unpack(shards: list[str], out: str, text: str) -> int:
    """Write pictures and captions of Parquet shards into a data folder; returns 1 if a row has no picture, else 0."""
    check_path("out", out)
    errors: list[str] = []
    print(f"{unpack_shards(list(map(Path, shards)), Path(out), text, errors)} pictures in {out}")
    return _named(errors)


def stats(folders: list[str], plot_file: str | None) -> int:
    """Print table 9 of the paper for these folders; returns 1 if a picture cannot be read, else 0."""
    if plot_file:
        check_path("plot", plot_file)
        need(find_spec("matplotlib") is not None, "plot", plot_file, "it where matplotlib is installed")
        fits = Path(plot_file).suffix in (".png", ".svg", ".pdf")
        need(fits, "plot", plot_file, "a name that ends in .png, .svg, .pdf")
        writable(Path(plot_file).parent, "--plot")
    errors: list[str] = []
    listed = [(folder, read_folder(folder, complete=False)) for folder in folders]
    found = [statistics(folder, items, errors) for folder, items in listed]
    print(report(found))
    if plot_file:
        plot(found, Path(plot_file))
    return _named(errors)


def select(folder: str, out: str, cache: str | None, workers: int, distance: int, **limits: float) -> int:
    """Write a folder of links to the pictures that keep the limits; returns 1 if a picture cannot be read, else 0."""
    from collecting.page import page
    from scores.folder import read_pixels
    from scores.glcm import glcm_score
    from scores.results import Results, each, results_folder

    need(workers >= 1, "workers", workers, "1 or more")
    need(0 <= distance <= 64, "distance", distance, "0 to 64 bits")
    for name, limit in limits.items():
        need(math.isfinite(limit), name, limit, "a number")
    need(limits["short"] >= SMALLEST, "short", limits["short"], f"{SMALLEST} or more pixels")
    check_path("out", out)
    target, errors = Path(out), []
    need(not target.resolve().is_relative_to(Path(folder).resolve()), "out", out, f"a folder outside {folder}")
    need(not target.exists() or target.is_dir() and (not os.listdir(target) or (target / "select.jsonl").exists()),
         "out", out, "a new folder, or one that select wrote")
    items = {item.path.relative_to(folder).as_posix(): item for item in read_folder(folder, complete=False)}
    writable(target, "--out")
    results = Results(results_folder(cache and Path(cache)), read_pixels)
    processes = min(workers, max(1, len(items) // 8))  # a process takes a second to start
    glcm = partial(glcm_score, definition="entropy", threads=workers if processes == 1 else 1)
    measured = partial(_measured, results=results, glcm=glcm)
    found = each(measured, [item.path for item in items.values()], "pictures", errors, processes)
    rows = verdicts({name: found[item.path] | {"captioned": bool(item.captions)} for name, item in items.items()
                     if item.path in found}, limits, distance)
    kept = write_selection(target, items, rows)
    with replacing(target / "dropped.html") as temporary:
        temporary.write_text(page(f"Selection from {folder}", rows, errors, limits | {"duplicate": distance}), "utf-8")
    print(f"{kept} of {len(items)} pictures are kept, by links in {target}; the others: {target / 'dropped.html'}")
    return _named(errors)


def _measured(path: Path, results: object, glcm: Callable) -> dict:
    return results.of_picture(("select", 1), path, partial(measure, glcm=glcm))


def caption(folder: str, out: str | None, every: bool, endpoint: str, model: str, key_variable: str, side: int,
            per_minute: float, at_once: int, timeout: float, price: list[float] | None, dry_run: bool) -> int:
    """Ask an endpoint for the captions that a folder lacks; returns 1 if a picture has no answer, or cannot be read."""
    need(side >= 64, "side", side, "64 or more pixels")
    need(1 <= at_once <= 256, "at-once", at_once, "1 to 256")
    opened = open_endpoint(endpoint, model, key_variable, per_minute, timeout)
    check_path("out", out or folder)
    file, errors = Path(out or Path(folder) / "captions.jsonl"), []
    need(file.name not in LISTINGS, "out", file, "a new file; append its lines to the listing afterwards")
    items = read_folder(folder, complete=False)
    pictures = {item.path.relative_to(folder).as_posix(): item.path for item in items if every or not item.captions}
    if beside := sum(path.with_suffix(".txt").is_file() for path in pictures.values()):
        print(f"note: {beside} of these pictures have a .txt beside them, which is not read: write {LISTINGS[0]} from "
              "those")
    asked, line = to_ask(pictures, model, file, side, price, errors)
    answered = len(pictures) - len(asked) - len(errors)
    print(f"{len(pictures)} pictures, {answered} answered in {file}; {line}", flush=True)
    if asked and not dry_run:
        print(f"{len(captions(asked, opened, file, side, at_once, errors))} captions written to {file}")
    return _named(errors)


def _named(errors: Sequence[str]) -> int:
    """Print the errors; the exit code."""
    for error in errors:
        print(printable(f"error: {error}"))
    return 1 if errors else 0


def new_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Make, examine and encode folders of captioned pictures.",
                                     allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Callable[..., int | None], about: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(run.__name__, help=about, description=about, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    add = command(check, "open every picture and line, list what is wrong").add_argument
    add("folder", metavar="DIR", help="pictures and metadata.jsonl")
    add("--res", type=int, help="list the pictures that are too small for training at it, pixels")
    add("--aspect", action="store_true", help="as in training, with --res")
    encodes = command(encode, "compute the text embeddings of all captions once")
    add = encodes.add_argument
    add("folder", metavar="DIR", help="pictures and metadata.jsonl")
    add("--model", default="tiny-sd3", help="name of a folder in models/ (default: %(default)s)")
    add("--weights", metavar="DIR", help="another model folder")
    add("--t5-length", type=int, help="tokens of T5, the same as in training (default: SD3 77, Flux-dev 512)")
    add("--batch", type=int, default=16, help="captions encoded together (default: %(default)s)")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--cache", metavar="DIR", help="folder of .embeddings and .latents (default: the data folder)")
    add("--latents", action="store_true", help="encode central crops too, for train.py --cache-latents")
    add = encodes.add_argument_group("with --latents, the same as in training").add_argument
    add("--res", type=int, default=1024, help="side of the squares, pixels (default: %(default)s)")
    add("--aspect", action="store_true", help="aspect-ratio buckets instead of squares")
    add("--small", default="refuse", choices=("refuse", "skip", "enlarge"),
        help="pictures that do not cover their crop (default: %(default)s)")
    add("--factor", type=int, default=16, choices=(8, 16), help="pixels per latent position (default: %(default)s)")
    add("--dilation", type=int, default=2, choices=(1, 2),
        help="of the VAE's first convolution at factor 16; 1: as released (default: %(default)s)")
    add = command(unpack, "write the pictures and captions of Parquet shards into a data folder").add_argument
    add("shards", nargs="+", metavar="FILE", help="Parquet files, as of Hugging Face data sets")
    add("--out", metavar="DIR", required=True, help="the data folder; what is there is not written again")
    add("--text", metavar="NAME", default="text", help="column of the captions (default: %(default)s)")
    add = command(stats, "sizes of pictures, lengths and words of captions: table 9 of the paper").add_argument
    add("folders", nargs="+", metavar="DIR", help="pictures, with or without metadata.jsonl")
    add("--plot", metavar="FILE", dest="plot_file", help="draw histograms, where matplotlib is installed")
    _caption_flags(command(caption, "ask an OpenAI-compatible endpoint for the captions that are missing").add_argument)
    _select_flags(command(select, "leave out small, blurred, flat and repeated pictures; none is changed").add_argument)
    return parser


def _caption_flags(add: Callable) -> None:
    add("folder", metavar="DIR", help="pictures, with or without metadata.jsonl")
    add("--out", metavar="FILE", help="lines of JSON; the same command resumes (default: DIR/captions.jsonl)")
    add("--all", action="store_true", dest="every", help="ask about pictures with a caption too")
    add_flags(add)


def _select_flags(add: Callable) -> None:
    add("folder", metavar="DIR", help="pictures, with or without metadata.jsonl")
    add("--out", metavar="NEW", required=True, help="folder of links, metadata.jsonl, select.jsonl, dropped.html")
    for name, about in (("short", "pixels of the short side"), ("entropy", "bits of the histogram of gray levels"),
                        ("sharpness", "variance of the Laplacian in the sharpest patch"),
                        ("glcm", "bits of the co-occurrence matrices"), ("flat", "share of flat patches")):
        word, default = ("least", LEAST[name]) if name in LEAST else ("most", MOST[name])
        add(f"--{name}", type=float, default=default, help=f"{about}, at {word} (default: %(default)g)")
    add("--distance", type=int, default=DISTANCE,
        help="bits of 64 in which hashes of near-duplicates differ, at most (default: %(default)s)")
    add("--cache", metavar="DIR", help="where numbers are stored; the same command resumes "
                                       "(default: ~/.cache/diffusion-4k)")
    add("--workers", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")


def main(argv: Sequence[str] | None = None) -> None:
    parser = new_parser()
    options = vars(parser.parse_args(argv))
    if any(value == "" or isinstance(value, list) and "" in value for value in options.values()):
        parser.error("an empty folder or name, as of a shell variable that is not set")
    run = options.pop("run")
    run_command(lambda: run(**options) and sys.exit(1), less="fewer --workers, or a smaller --batch or --res")


if __name__ == "__main__":
    main()
