"""The numbers of Aesthetic-4K: how much detail a picture has, how close two pictures are, how alike two sets.

Paper     Diffusion-4K section 3.1 "Comprehensive Evaluation Metrics", tables 1 to 4
Mirrors   the released eval.py and generate_and_eval_fid.py; held by tests/test_metrics.py
Metrics   name               range              better  definition
          GLCM Score         0 to 16 bits       higher  two definitions, the release's and the formula's: see glcm.py
          compression ratio  above 0            lower   raw RGB bytes / bytes of the JPEG at quality 95; of a set, the ratio of sums
          FID, patch-FID     above 0            lower   Fréchet distance of Inception features of pictures, or of their 299 px patches
          PSNR, SSIM, NMSE, Fréchet distance, SRCC, PLCC: see compare.py; CLIPScore, Aesthetics, LPIPS: see perceptual.py
Shapes    H and W pixels, N pictures or patches; pictures are uint8
Run       python metrics.py detail PICTURES… [--maps DIR]
          python metrics.py pair REFERENCE PICTURE
          python metrics.py vae DIR --model tiny-sd3 --factor 16
          python metrics.py set GENERATED --reference DIR --prompts DIR/metadata.jsonl --weights DIR
          python metrics.py correlate RATINGS.csv
Cache     what was found for a picture is kept under its path, size and time of change; the same command goes on where it stopped
Check     python -m pytest tests/test_metrics.py
"""

import argparse
import csv
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from checkpoint import check_device, locate, model_folder
from data import read_picture
from scores.compare import (
    FID_PATCH,
    Statistics,
    bootstrap,
    check_same_shape,
    frechet,
    frechet_distance,
    nmse,
    patches_of,
    plcc,
    psnr,
    srcc,
    ssim,
    statistics,
)
from scores.glcm import DEFINITIONS, PATCH, glcm_map, glcm_score
from scores.jpeg import jpeg_bits, jpeg_size
from vae import to_image, to_pixels

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
FEATURES = 2048       # of Inception
CACHE = Path.home() / ".cache" / "diffusion-4k"


def compression_ratio(rgb: np.ndarray, quality: int = 95) -> float:
    """Bytes of the raw pixels over bytes of their JPEG, Pillow's defaults."""
    return rgb.nbytes / jpeg_size(rgb, quality)


# ---- maps over a picture

RAMP = np.array([[10, 8, 60], [110, 20, 130], [215, 60, 80], [250, 150, 40], [255, 250, 190]], dtype=np.float64)  # low to high
PANELS = (("GLCM, release", 0.0, 3.0, "bits"), ("GLCM, entropy", 0.0, 12.0, "bits"), ("JPEG, quality 95", 0.0, 6.0, "bits/px"))


def heat(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """(h, w) numbers to (h, w, 3) uint8 colours, dark to light from `low` to `high`."""
    at = np.clip((values - low) / (high - low), 0, 1) * (len(RAMP) - 1)
    return np.stack([np.interp(at, np.arange(len(RAMP)), channel) for channel in RAMP.T], axis=-1).round().astype(np.uint8)


def detail_sheet(pixels: np.ndarray, title: str, width: int = 480) -> Image.Image:
    """The picture, and beside it three heat maps laid over its gray: both GLCM Scores and the bits of the JPEG, scores above.

    The colours mean the same in every sheet; the strip under a map is its scale.
    """
    scale, line, bar = width / pixels.shape[1], 24, 10
    height = round(pixels.shape[0] * scale)
    small = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
    maps = [(glcm_map(pixels, definition), PATCH) for definition in DEFINITIONS] + [(jpeg_bits(pixels) / 64, 8)]
    scores = [f"{values.mean():.3f}" for values, _ in maps[:2]] + [f"{jpeg_size(pixels) * 8 / pixels[..., 0].size:.3f}"]
    sheet = Image.new("RGB", (4 * width, height + line + bar), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    draw.text((4, 3), f"{title}: ratio {compression_ratio(pixels):.2f}", "black", font)
    sheet.paste(small, (0, line))
    for k, ((values, cell), score, (name, low, high, unit)) in enumerate(zip(maps, scores, PANELS, strict=True), 1):
        colours = Image.fromarray(heat(values, low, high))
        colours = colours.resize([max(1, round(side * cell * scale)) for side in values.shape[::-1]], Image.Resampling.BOX)
        panel = small.convert("L").convert("RGB")
        inside = colours.crop((0, 0, min(colours.width, width), min(colours.height, height)))
        panel.paste(Image.blend(panel.crop((0, 0, *inside.size)), inside, 0.7))
        sheet.paste(panel, (k * width, line))
        ramp = heat(np.linspace(low, high, width - 8)[None], low, high).repeat(bar - 2, axis=0)
        sheet.paste(Image.fromarray(ramp), (k * width + 4, line + height + 2))
        draw.text((k * width + 4, 3), f"{name}: {score} {unit}   (scale {low:g} to {high:g})", "black", font)
    return sheet


# ---- the command line: files, what is kept, workers

def find_pictures(paths: Sequence[str]) -> list[Path]:
    """Files as they are, of folders the pictures in it by name; ValueError if there is nothing at a path."""
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
            if not inside:
                raise ValueError(f"{path}: no picture in this folder ({', '.join(SUFFIXES)})")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise FileNotFoundError(f"{path}: no such file or folder")
    return list(dict.fromkeys(found))


def read_pixels(path: str | os.PathLike) -> np.ndarray:
    """(H, W, 3) uint8: transparency over white, 16 bit to 8, CMYK and gray to RGB, upright; see data.read_picture."""
    return np.array(read_picture(path))


def identity(path: Path) -> tuple:
    """What a file is known by: its path, size and time of change; of a folder, those of its files."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return tuple((str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files)


def kept(cache: Path, key: tuple, compute: Callable[[], dict]) -> dict[str, np.ndarray]:
    """The arrays that were computed under this key, from a file of the cache, or computed now and written whole."""
    file = cache / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.npz"
    if file.is_file():
        with np.load(file, allow_pickle=False) as saved:
            return dict(saved)
    values = {name: np.asarray(value) for name, value in compute().items()}
    temporary = file.with_suffix(f".{os.getpid()}.tmp.npz")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        np.savez(temporary, **values)
        os.replace(temporary, file)
    except OSError as error:
        raise OSError(f"{cache}: results can't be kept there ({error.strerror or error}); name another folder with --cache") from None
    finally:
        if cache.is_dir():
            temporary.unlink(missing_ok=True)
    return values


def detail_of(path: Path, cache: Path, maps: Path | None = None, threads: int | None = None) -> dict[str, float]:
    """Both GLCM Scores and the compression ratio of a file, and its sheet of maps if a folder for it is given."""
    def compute() -> dict:
        pixels = read_pixels(path)
        try:
            found = {"width": pixels.shape[1], "height": pixels.shape[0], 
                     "glcm_release": glcm_score(pixels, threads=threads), "glcm_entropy": glcm_score(pixels, "entropy", threads=threads),
                     "jpeg_bytes": jpeg_size(pixels)}
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return found | {"raw_bytes": pixels.nbytes, "ratio": pixels.nbytes / found["jpeg_bytes"]}

    row = {name: value.item() for name, value in kept(cache, ("detail", 1, identity(path)), compute).items()}
    if maps:
        detail_sheet(read_pixels(path), path.name).save(maps / f"{path.stem}_{path.suffix[1:]}.jpg", quality=90)
    return row


def details(paths: Sequence[Path], args: argparse.Namespace, maps: Path | None = None) -> tuple[list[dict], list[str]]:
    """`detail_of` of all pictures, spread over processes: rows in order, and a line for each picture that failed."""
    rows, errors = {}, {}
    workers = min(args.workers, max(1, len(paths) // 8))  # a process takes seconds to start

    def note(path: Path, result: Callable[[], dict]) -> None:
        try:
            rows[path] = {"picture": str(path), **result()}
        except ValueError as error:
            errors[path] = str(error)

    with tqdm(total=len(paths), desc="pictures", file=sys.stderr, disable=len(paths) < 2) as bar:
        if workers == 1:
            for path in paths:
                note(path, lambda path=path: detail_of(path, args.cache, maps, args.workers))
                bar.update()
        else:
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                jobs = {pool.submit(detail_of, path, args.cache, maps, 1): path for path in paths}
                for job in as_completed(jobs):
                    note(jobs[job], job.result)
                    bar.update()
    return [rows[path] for path in paths if path in rows], [errors[path] for path in paths if path in errors]


def table(rows: Sequence[dict], columns: dict[str, str]) -> str:
    """Rows under their column names; columns: key -> format."""
    cells = [list(columns)] + [["" if row.get(key) is None else f"{row[key]:{form}}" for key, form in columns.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(f"{cell:<{w}}" if k == 0 else f"{cell:>{w}}" for k, (cell, w) in enumerate(zip(line, widths, strict=True)))
                     for line in cells)


def conclude(args: argparse.Namespace, report: dict, text: str, errors: Sequence[str]) -> None:
    """Print the report for people or programs, name what failed on stderr, and exit with 1 if anything did."""
    if args.json:
        def plain(value):
            if isinstance(value, dict):
                return {key: plain(inner) for key, inner in value.items()}
            if isinstance(value, list | tuple):
                return [plain(inner) for inner in value]
            return None if isinstance(value, float) and not math.isfinite(value) else value
        print(json.dumps(plain(report | {"errors": list(errors)}), indent=1))
    else:
        print(text)
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    raise SystemExit(1 if errors else 0)


def mean_of(rows: Sequence[dict]) -> dict[str, float]:
    """Means of the scores of a set, and its ratio of sums."""
    found = {name: float(np.mean([row[name] for row in rows])) for name in ("glcm_release", "glcm_entropy")}
    totals = {name: sum(row[name] for row in rows) for name in ("raw_bytes", "jpeg_bytes")}
    return found | totals | {"ratio": totals["raw_bytes"] / totals["jpeg_bytes"]}


DETAIL_COLUMNS = {"picture": "", "width": "d", "height": "d", "glcm_release": ".4f", "glcm_entropy": ".4f", "jpeg_bytes": ",d",
                  "ratio": ".3f"}


def run_detail(args: argparse.Namespace) -> None:
    """metrics.py detail: GLCM Scores and compression ratio of pictures, their means, sheets of maps."""
    paths, maps = find_pictures(args.pictures), Path(args.maps) if args.maps else None
    if maps:
        if len({path.name for path in paths}) < len(paths):
            raise ValueError("--maps: two of the pictures have the same name; give one folder at a time")
        maps.mkdir(parents=True, exist_ok=True)
    rows, errors = details(paths, args, maps)
    whole = mean_of(rows) if rows else {}
    last = [{"picture": f"all {len(rows)}: means, ratio of sums", **whole}] if rows else []
    conclude(args, {"pictures": rows, "all": whole}, table(rows + last, DETAIL_COLUMNS), errors)


def run_pair(args: argparse.Namespace) -> None:
    reference, image = (read_pixels(path) for path in (args.reference, args.picture))
    found = {name: function(reference, image) for name, function in (("psnr", psnr), ("ssim", ssim), ("nmse", nmse))}
    notes: list[str] = []
    if lpips := load_or_note(notes, "LPIPS", lambda: lpips_of(args)):
        found["lpips"] = lpips(reference, image)
    lines = table([found], {name: ".4f" for name in found})
    conclude(args, found | {"notes": notes}, "\n".join([lines, *notes]), [])


# ---- the command line: what needs networks

def load_or_note(notes: list[str], what: str, load: Callable):
    """Load a network, or note in one line that its metric is left out, and why."""
    try:
        return load()
    except FileNotFoundError as error:
        notes.append(f"note: {what} left out: {error}")
        return None


def as_images(pictures: np.ndarray, device: str) -> Tensor:
    """(N, H, W, 3) uint8 to (N, 3, H, W), as the networks take them."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).to(device)


def lpips_of(args: argparse.Namespace) -> Callable[[np.ndarray, np.ndarray], float]:
    """The LPIPS distance of two pictures, (H, W, 3) uint8; FileNotFoundError without its weights."""
    from scores.perceptual import LPIPS, find_weights

    network = LPIPS.load("vgg", find_weights(args.weights, "vgg16-397923af.pth"), find_weights(args.weights, "vgg.pth"), args.device)

    @torch.inference_mode()
    def lpips(reference: np.ndarray, image: np.ndarray) -> float:
        check_same_shape(reference, image)
        return float(network(*(to_image(pixels)[None].to(args.device) for pixels in (reference, image))))
    return lpips


def inception_of(args: argparse.Namespace) -> tuple[Path, Callable[[np.ndarray], np.ndarray]]:
    """The file, and the features of pictures (N, H, W, 3) as (N, 2048) float32."""
    from scores.perceptual import Inception, find_weights

    path = find_weights(args.weights, "weights-inception-2015-12-05-6726825d.pth")
    network = Inception.load(path, args.device)

    def features(pictures: np.ndarray, batch: int = 16) -> np.ndarray:
        chunks = [network(as_images(pictures[k : k + batch], args.device)) for k in range(0, len(pictures), batch)]
        return torch.cat(chunks).float().cpu().numpy() if chunks else np.zeros((0, FEATURES), np.float32)
    return path, features


def features_of(paths: Sequence[Path], args: argparse.Namespace, inception: tuple, errors: list[str]) -> dict[str, Statistics]:
    """Statistics of whole pictures and of patches; each picture is first scaled to --res and cut square, as the release does."""
    from scores.perceptual import resize_crop

    file, features = inception

    def compute(path: Path) -> dict:
        pixels = resize_crop(as_images(read_pixels(path)[None], "cpu"), args.res)[0].permute(1, 2, 0).numpy()
        return {"whole": features(pixels[None]), "patches": features(patches_of(pixels))}

    key, found = (1, args.res, identity(file)), {}
    for path in tqdm(paths, desc=f"Inception, {paths[0].parent.name}", file=sys.stderr):
        try:
            found[path] = kept(args.cache, ("features", key, identity(path)), lambda path=path: compute(path))
        except ValueError as error:
            errors.append(str(error))
    made = {}
    for part in ("whole", "patches"):
        def gather(part: str = part) -> dict:
            rows = [row[part] for row in found.values()]
            return statistics(np.concatenate(rows) if rows else np.zeros((0, FEATURES)), f"{paths[0].parent}, {part}")._asdict()

        if part == "whole" or sum(len(row[part]) for row in found.values()) > 1:
            saved = kept(args.cache, ("statistics", part, key, tuple(map(identity, found))), gather)
            made[part] = Statistics(int(saved["n"]), saved["mean"], saved["covariance"])
    return made


def pair_captions(listing: str, pictures: Sequence[Path]) -> tuple[dict[Path, str], list[str]]:
    """The caption of each picture: by file name where the listing has all of them, else in order, which needs equal numbers.

    listing  JSON lines with "text" and, as in a data folder, "file_name"
    returns  picture -> caption; a note on how they were paired
    """
    rows = []
    try:
        lines = Path(listing).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{listing}: not UTF-8 ({error})") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
                rows.append((Path(row.get("file_name", "")).stem, str(row["text"])))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f'{listing}:{number}: each line is a JSON object with "text" ({type(error).__name__}: {error})') from None
    by_name = dict(rows)
    if all(picture.stem in by_name for picture in pictures):
        rest = len(by_name.keys() - {picture.stem for picture in pictures})
        return ({picture: by_name[picture.stem] for picture in pictures},
                [f"note: {rest} of {len(by_name)} prompts have no picture"] if rest else [])
    if len(rows) != len(pictures):
        raise ValueError(f"{listing}: {len(rows)} prompts for {len(pictures)} pictures; name the pictures as file_name does, "
                         "or give as many prompts, in the order of the names")
    return dict(zip(pictures, (text for _, text in rows), strict=True)), ["note: prompts and pictures paired in order, not by name"]


def clip_scores(paths: Sequence[Path], captions: dict[Path, str], args: argparse.Namespace) -> list[float]:
    """CLIPScore of each picture with its caption, by ViT-B/16."""
    from scores.perceptual import CLIP, find_weights

    file = find_weights(args.weights, "ViT-B-16.pt")
    tokenizer = args.weights / "tokenizer"
    clip = CLIP.load(file, tokenizer if tokenizer.is_dir() else None, args.device)

    def compute(path: Path) -> dict:
        return {"score": float(clip.score(as_images(read_pixels(path)[None], "cpu"), [captions[path]])[0])}
    return [float(kept(args.cache, ("clip", 1, identity(file), identity(path), captions[path]), lambda path=path: compute(path))["score"])
            for path in tqdm(paths, desc="CLIPScore", file=sys.stderr)]


def aesthetics_scores(paths: Sequence[Path], args: argparse.Namespace) -> list[float]:
    """Aesthetics of each picture, by ViT-L/14 and the linear head."""
    from scores.perceptual import Aesthetics, CLIPImage, find_weights

    files = [find_weights(args.weights, name) for name in ("ViT-L-14.pt", "sac+logos+ava1-l14-linearMSE.pth")]
    tower, head = CLIPImage.load(files[0], args.device), Aesthetics.load(files[1], args.device)

    def compute(path: Path) -> dict:
        return {"score": float(head(tower.embed(as_images(read_pixels(path)[None], "cpu"), "openai"))[0])}
    key = ("aesthetics", 1, *map(identity, files))
    return [float(kept(args.cache, (*key, identity(path)), lambda path=path: compute(path))["score"])
            for path in tqdm(paths, desc="Aesthetics", file=sys.stderr)]


def fid_of(generated: Sequence[Path], reference: Sequence[Path], args: argparse.Namespace, inception: tuple, notes: list[str],
           errors: list[str]) -> dict[str, float]:
    """FID and patch-FID, with notes on the numbers they rest on."""
    ours, theirs = (features_of(paths, args, inception, errors) for paths in (generated, reference))
    found = {}
    for name, part in (("fid", "whole"), ("patch_fid", "patches")):
        if part not in ours or part not in theirs:
            notes.append(f"note: {name} left out: pictures of {args.res} px hold no patch of {FID_PATCH}")
            continue
        a, b = ours[part], theirs[part]
        found[name] = frechet(a, b)
        notes.append(f"note: {name}: N = {a.n} generated, {b.n} reference, {args.res} px")
        if min(a.n, b.n) <= FEATURES:
            notes[-1] += f"; bias dominates it below {FEATURES + 1}, compare it at equal N only"
    return found


def run_set(args: argparse.Namespace) -> None:
    """metrics.py set: what the paper's tables say of a folder of generated pictures."""
    generated, notes = find_pictures([args.generated]), []
    reference = find_pictures([args.reference]) if args.reference else []
    captions, said = pair_captions(args.prompts, generated) if args.prompts else ({}, [])
    notes += said
    rows, errors = details(generated, args)
    whole = mean_of(rows) if rows else {}
    good = [Path(row["picture"]) for row in rows]
    if not good:
        return conclude(args, {"notes": notes}, "no picture could be scored", errors)
    args.res = args.res or min(min(row["width"], row["height"]) for row in rows)
    found: dict[str, float] = {}
    if not reference:
        notes.append("note: FID left out: give --reference DIR")
    elif inception := load_or_note(notes, "FID", lambda: inception_of(args)):
        try:
            found |= fid_of(good, reference, args, inception, notes, errors)
        except ValueError as error:
            errors.append(f"FID left out: {error}")
    if not captions:
        notes.append("note: CLIPScore left out: give --prompts metadata.jsonl")
    elif (scores := load_or_note(notes, "CLIPScore", lambda: clip_scores(good, captions, args))) is not None:
        found["clip_score"] = float(np.mean(scores))
    if (scores := load_or_note(notes, "Aesthetics", lambda: aesthetics_scores(good, args))) is not None:
        found["aesthetics"] = float(np.mean(scores))
    found |= {name: whole[name] for name in ("glcm_release", "glcm_entropy", "ratio")}
    lines = [f"{len(good)} generated, {len(reference)} reference pictures", *(f"{name:13} {value:10.4f}" for name, value in found.items())]
    conclude(args, {"generated": len(good), "reference": len(reference), **found, "notes": notes}, "\n".join(lines + notes), errors)


def run_vae(args: argparse.Namespace) -> None:
    """metrics.py vae: what an autoencoder loses of photographs, table 2 of the paper."""
    from scores.perceptual import resize_crop
    from vae import VAE

    model = Path(args.model)
    file = model if model.is_file() else locate(model if model.is_dir() else model_folder(args.model))[1]
    vae, notes, errors, rows = VAE.load(file, args.device), [], [], {}
    step = 2 ** (len(vae.config.encoder_widths) - 1) * (args.factor // 8)
    if args.res % step:
        raise ValueError(f"--res {args.res}: must be a multiple of {step} at factor {args.factor}")
    inception = load_or_note(notes, "rFID", lambda: inception_of(args))
    lpips = load_or_note(notes, "LPIPS", lambda: lpips_of(args))

    @torch.inference_mode()
    def compute(path: Path) -> dict:
        pixels = read_pixels(path)
        if args.res:
            pixels = resize_crop(as_images(pixels[None], "cpu"), args.res)[0].permute(1, 2, 0).numpy()
        height, width = (side // step * step for side in pixels.shape[:2])
        if not height * width:
            raise ValueError(f"{path}: {pixels.shape[1]}x{pixels.shape[0]} pixels: smaller than {step}, one latent of the coarsest map")
        top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
        pixels = np.ascontiguousarray(pixels[top : top + height, left : left + width])
        latent = vae.encode(to_image(pixels)[None].to(args.device), args.factor)
        again = to_pixels(vae.decode(latent, args.factor)[0])
        found = {"width": width, "height": height, "psnr": psnr(pixels, again), "ssim": ssim(pixels, again), "nmse": nmse(pixels, again)}
        found |= {"lpips": lpips(pixels, again)} if lpips else {}
        return found | ({"features": np.concatenate([inception[1](side[None]) for side in (pixels, again)])} if inception else {})

    networks = [identity(file)] + ([identity(args.weights)] if inception or lpips else [])
    paths = find_pictures([args.folder])
    for path in tqdm(paths, desc="pictures", file=sys.stderr):
        try:
            key = ("vae", 1, args.factor, args.res, bool(inception), bool(lpips), networks, identity(path))
            rows[path] = kept(args.cache, key, lambda path=path: compute(path))
        except ValueError as error:
            errors.append(str(error))
    plain = [{"picture": str(path), **{k: v.item() for k, v in row.items() if v.ndim == 0}} for path, row in rows.items()]
    columns = {"picture": "", "width": "d", "height": "d", "psnr": ".3f", "ssim": ".4f", "nmse": ".5f"}
    columns |= {"lpips": ".4f"} if lpips else {}
    means = {name: float(np.mean([row[name] for row in plain])) for name in list(columns)[3:]} if plain else {}
    if inception and rows:
        try:
            means["rfid"] = frechet_distance(*(np.stack([row["features"][k] for row in rows.values()]) for k in (0, 1)))
            notes.append(f"note: rfid: N = {len(rows)}" + ("" if len(rows) > FEATURES else f"; bias dominates it below {FEATURES + 1}"))
        except ValueError as error:
            errors.append(f"rFID left out: {error}")
    lines = [table(plain + [{"picture": f"mean of {len(plain)}, factor {args.factor}", **means}], columns)]
    lines += [f"rFID {value:.4f}" for name, value in means.items() if name == "rfid"] + notes
    conclude(args, {"pictures": plain, "mean": means, "factor": args.factor, "notes": notes}, "\n".join(lines), errors)


def read_ratings(path: str) -> dict[str, list[float]]:
    """The columns of numbers in a CSV, "rating" among them; columns of text are passed over, a gap in one of numbers is an error."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            rows = list(csv.DictReader(f))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV in UTF-8 ({error})") from None
    if not rows or "rating" not in rows[0]:
        raise ValueError(f'{path}: needs a first line of column names, among them "rating", and lines below it')
    columns = {}
    for name in rows[0]:
        wrong = [line for line, row in enumerate(rows, 2) if name is None or not _is_number(row[name])]
        if not wrong:
            columns[name] = [float(row[name]) for row in rows]
        elif name is None or name == "rating" or len(wrong) < len(rows):
            raise ValueError(f"{path}:{wrong[0]}: column {name or 'without a name'} holds no number there")
    if len(columns) == 1:
        raise ValueError(f"{path}: no column of numbers beside rating")
    return columns


def run_correlate(args: argparse.Namespace) -> None:
    """metrics.py correlate: how far metrics rank pictures as people do."""
    columns = read_ratings(args.ratings)
    ratings, found = columns.pop("rating"), []
    for name, values in columns.items():
        try:
            if name in ("ratio", "compression_ratio"):  # as the paper does: what is hard to compress has detail
                name = f"1/{name}"
                if not all(values):
                    raise ValueError("0 has no reciprocal")
                values = [1 / value for value in values]
            row = {"metric": name}
            for title, statistic in (("srcc", srcc), ("plcc", plcc)):
                row[title] = statistic(values, ratings)
                row[f"{title}_low"], row[f"{title}_high"] = bootstrap(statistic, values, ratings)
        except ValueError as error:
            raise ValueError(f"{args.ratings}: {name}: {error}") from None
        found.append(row)
    shown = table(found, {"metric": ""} | dict.fromkeys(list(found[0])[1:], ".4f"))
    conclude(args, {"n": len(ratings), "metrics": found}, f"{shown}\n{len(ratings)} ratings; low and high: 95 % bootstrap intervals", [])


def _is_number(text: str | None) -> bool:
    try:
        return math.isfinite(float(text or ""))
    except ValueError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def command(name: str, about: str, run: Callable, *flags: str) -> Callable:
        sub = commands.add_parser(name, help=about, description=about)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="for programs; what is infinite or not a number is null")
        if "cache" in flags:
            sub.add_argument("--cache", metavar="DIR", type=Path, default=CACHE, help="where results are kept (default: %(default)s)")
        if "workers" in flags:
            sub.add_argument("--workers", type=int, default=here, help="processes (default: the cores there are, %(default)s)")
        if "networks" in flags:
            sub.add_argument("--weights", metavar="DIR", type=Path, default=Path("weights"),
                             help="folder with the networks' official files (default: %(default)s); nothing is downloaded")
            sub.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (default: %(default)s)")
        return sub.add_argument

    add = command("detail", "GLCM Score both ways and compression ratio of pictures", run_detail, "cache", "workers")
    add("pictures", nargs="+", metavar="PICTURE", help="files and folders")
    add("--maps", metavar="DIR", help="write a sheet of heat maps for each picture")
    add = command("pair", "PSNR, SSIM, NMSE and LPIPS of two pictures", run_pair, "networks")
    add("reference", metavar="REFERENCE")
    add("picture", metavar="PICTURE")
    add = command("vae", "what an autoencoder loses: rFID, NMSE, PSNR, SSIM, LPIPS of encode and decode, without tiles", run_vae,
                  "cache", "networks")
    add("folder", metavar="DIR", help="pictures; sides are cut to the multiple that the factor needs")
    add("--model", default="tiny-sd3", help="folder in models/, another model folder, or a file (default: %(default)s)")
    add("--factor", type=int, default=16, choices=(8, 16), help="(default: %(default)s)")
    add("--res", type=int, default=0, metavar="PX", help="scale the short side and cut square first (default: as they are)")
    add = command("set", "FID, patch-FID, CLIPScore, Aesthetics, GLCM Score, ratio of a set", run_set, "cache", "workers", "networks")
    add("generated", metavar="GENERATED", help="folder of pictures")
    add("--reference", metavar="DIR", help="folder of real pictures, for FID")
    add("--prompts", metavar="FILE", help='JSON lines with "text" and "file_name", for CLIPScore')
    add("--res", type=int, default=0, metavar="PX", help="square that FID sees before 299 (default: the smallest generated side)")
    add = command("correlate", "SRCC and PLCC of every column of a CSV with its column rating", run_correlate)
    add("ratings", metavar="RATINGS.csv", help="the reciprocal of a column named ratio or compression_ratio is used, as in the paper")
    args = parser.parse_args()
    try:
        if "device" in args:
            check_device(args.device)
        if getattr(args, "workers", 1) < 1:
            raise ValueError(f"--workers {args.workers}: at least 1")
        if getattr(args, "res", 0) < 0:
            raise ValueError(f"--res {args.res}: pixels, 0 for as they are")
        args.run(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except BrokenProcessPool:
        raise SystemExit("error: a worker process died, most likely for want of memory; give fewer --workers") from None


if __name__ == "__main__":
    main()
