"""The evaluation of Aesthetic-4K: the detail of pictures, the similarity of two, the distance of two sets.

Paper     Diffusion-4K section 3.1 "Comprehensive Evaluation Metrics", tables 1 to 4
Mirrors   the released eval.py and generate_and_eval_fid.py; tested by tests/test_metrics.py and those of scores/
Scores    GLCM Score: scores/glcm.py; compression ratio (lower is better; of a set, the ratio of sums): jpeg.py;
          PSNR, SSIM, NMSE, SRCC, PLCC: compare.py; FID: sets.py; CLIPScore: clip.py; Aesthetics, LPIPS: perceptual.py
Run       python metrics.py detail PICTURES… [--maps DIR]
          python metrics.py pair REFERENCE PICTURE
          python metrics.py vae DIR --model tiny-sd3 --factor 16
          python metrics.py set GENERATED --reference DIR --prompts DIR/metadata.jsonl --weights DIR
          python metrics.py correlate RATINGS.csv
"""

import argparse
import csv
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import numpy as np

from data import read_picture
from scores.compare import bootstrap, frechet_distance, nmse, plcc, psnr, srcc, ssim
from scores.glcm import DEFINITIONS, cores, glcm_score
from scores.jpeg import compression_ratio, jpeg_size
from scores.results import Results, each, identity
from scores.sheet import detail_sheet

__all__ = ["compression_ratio", "frechet_distance", "glcm_score", "jpeg_size", "nmse", "plcc", "psnr", "srcc", "ssim"]
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")


# ---- pictures in, tables out

def find_pictures(paths: Sequence[str]) -> list[Path]:
    """The files, and of folders the pictures in them sorted by name; ValueError if a folder has none."""
    pictures: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        if not files:
            raise ValueError(f"{path}: no picture in this folder ({', '.join(SUFFIXES)})")
        pictures += files
    return list(dict.fromkeys(pictures))


def read_pixels(path: str | os.PathLike) -> np.ndarray:
    """(H, W, 3) uint8, upright RGB."""
    return np.array(read_picture(path))


def table(rows: Sequence[dict], columns: dict[str, str]) -> str:
    """Rows under their column names; columns: key -> format."""
    lines = [list(columns)]
    lines += [["" if row.get(key) is None else f"{row[key]:{form}}" for key, form in columns.items()] for row in rows]
    for k, column in enumerate(zip(*lines, strict=True)):
        width = max(map(len, column))
        for line in lines:
            line[k] = line[k].rjust(width) if k else line[k].ljust(width)
    return "\n".join(map("  ".join, lines))


def conclude(as_json: bool, report: dict, text: str, errors: Sequence[str] = ()) -> None:
    """Print the report as text or JSON, the errors on stderr, and exit with 1 if there are any."""
    if as_json:  # which has no infinity or NaN: these become null
        finite = json.loads(json.dumps(report | {"errors": list(errors)}), parse_constant=lambda _: None)
        text = json.dumps(finite, indent=1)
    print(text)
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    raise SystemExit(1 if errors else 0)


# ---- detail

DETAIL_COLUMNS = {"picture": "", "width": "d", "height": "d", "glcm_release": ".4f", "glcm_entropy": ".4f",
                  "jpeg_bytes": ",d", "ratio": ".3f"}


def detail_of(path: Path, results: Results, maps: Path | None, threads: int) -> dict:
    """The row of a picture; a sheet of heat maps is written into `maps`."""
    def measure(pixels: np.ndarray) -> dict:
        jpeg_bytes = jpeg_size(pixels)
        return {"width": pixels.shape[1], "height": pixels.shape[0],
                **{f"glcm_{name}": glcm_score(pixels, name, threads=threads) for name in DEFINITIONS},
                "jpeg_bytes": jpeg_bytes, "raw_bytes": pixels.nbytes, "ratio": pixels.nbytes / jpeg_bytes}

    row = {"picture": str(path)} | results.of_picture(("detail", 1), path, measure)
    if maps:
        detail_sheet(read_pixels(path), path.name).save(maps / f"{path.stem}_{path.suffix[1:]}.jpg", quality=90)
    return row


def details(paths: Sequence[Path], results: Results, workers: int, errors: list[str],
            maps: Path | None = None) -> list[dict]:
    """`detail_of` all pictures, in processes if there are many; `errors` gets a line per picture without scores."""
    processes = min(workers, max(1, len(paths) // 8))  # a process takes a second to start
    score = partial(detail_of, results=results, maps=maps, threads=workers if processes == 1 else 1)
    return list(each(score, paths, "pictures", errors, processes).values())


def mean_of(rows: Sequence[dict]) -> dict[str, float]:
    """Means of the GLCM Scores of a set, and its ratio of sums."""
    means = {name: float(np.mean([row[name] for row in rows])) for name in ("glcm_release", "glcm_entropy")}
    sums = {name: sum(row[name] for row in rows) for name in ("raw_bytes", "jpeg_bytes")}
    return means | sums | {"ratio": sums["raw_bytes"] / sums["jpeg_bytes"]}


def run_detail(pictures: list[str], maps: Path | None, cache: Path, workers: int, as_json: bool) -> None:
    """Both GLCM Scores and the compression ratio of pictures, with heat maps if `maps` names a folder."""
    paths, errors = find_pictures(pictures), []
    if maps:
        if len({path.name for path in paths}) < len(paths):
            raise ValueError("--maps: two of the pictures have the same name; give one folder at a time")
        maps.mkdir(parents=True, exist_ok=True)
    rows = details(paths, Results(cache, read_pixels), workers, errors, maps)
    means = mean_of(rows) if rows else {}
    last = [{"picture": f"all {len(rows)}: means, ratio of sums", **means}] if rows else []
    conclude(as_json, {"pictures": rows, "all": means}, table(rows + last, DETAIL_COLUMNS), errors)


# ---- pair, vae, set: modules that import torch are imported inside

def load_or_note(notes: list[str], what: str, load: Callable):
    """load(), or None and a note that the metric is left out where its weights are missing."""
    try:
        return load()
    except FileNotFoundError as error:
        notes.append(f"note: {what} left out: {error}")
        return None


def pair_scores(reference: np.ndarray, image: np.ndarray) -> dict[str, float]:
    return {"psnr": psnr(reference, image), "ssim": ssim(reference, image), "nmse": nmse(reference, image)}


def run_pair(reference: str, picture: str, weights: Path, device: str | None, as_json: bool) -> None:
    """How close a picture is to its reference."""
    from checkpoint import check_device
    from scores.sets import load_lpips

    device, notes = check_device(device), []
    pixels = [read_pixels(path) for path in (reference, picture)]
    scores = pair_scores(*pixels)  # pictures of two sizes are refused before a network is loaded
    if lpips := load_or_note(notes, "LPIPS", partial(load_lpips, weights, device)):
        scores["lpips"] = lpips(*pixels)
    conclude(as_json, scores | {"notes": notes}, "\n".join([table([scores], dict.fromkeys(scores, ".4f")), *notes]))


def run_vae(folder: str, model: str, factor: int, res: int, cache: Path, weights: Path, device: str | None,
            as_json: bool) -> None:
    """Table 2 of the paper: what an autoencoder loses of photographs."""
    from checkpoint import check_device, locate, model_folder
    from scores import sets
    from vae import VAE

    device, path, results, notes, errors = check_device(device), Path(model), Results(cache, read_pixels), [], []
    file = path if path.is_file() else locate(path if path.is_dir() else model_folder(model))[1]
    vae = VAE.load(file, device)
    if res % (step := sets.side_step(vae, factor)):
        raise ValueError(f"--res {res}: must be a multiple of {step} at factor {factor}")
    inception = load_or_note(notes, "rFID", partial(sets.Extractor, weights, device))
    lpips = load_or_note(notes, "LPIPS", partial(sets.load_lpips, weights, device))

    def measure(pixels: np.ndarray) -> dict:
        pixels, again = sets.round_trip(vae, pixels, factor, res)
        row = {"width": pixels.shape[1], "height": pixels.shape[0], **pair_scores(pixels, again)}
        if lpips:
            row["lpips"] = lpips(pixels, again)
        if inception:
            row["features"] = np.concatenate([inception(side[None]) for side in (pixels, again)])
        return row

    files = [identity(path) for path in ([file, weights] if inception or lpips else [file])]
    key = ("vae", 1, factor, res, bool(inception), bool(lpips), files)
    measured = each(lambda path: results.of_picture(key, path, measure), find_pictures([folder]), "pictures", errors)
    features = [row.pop("features") for row in measured.values()] if inception else []
    rows = [{"picture": str(path)} | row for path, row in measured.items()]
    columns = {"psnr": ".3f", "ssim": ".4f", "nmse": ".5f"} | ({"lpips": ".4f"} if lpips else {})
    means = {name: float(np.mean([row[name] for row in rows])) for name in columns} if rows else {}
    last = {"picture": f"mean of {len(rows)}, factor {factor}", **means}
    lines = [table([*rows, last], {"picture": "", "width": "d", "height": "d"} | columns)]
    if features:
        try:
            means["rfid"] = frechet_distance(*np.stack(features, axis=1))
            lines.append(f"rFID {means['rfid']:.4f}")
            notes.append(sets.number_note("rfid", len(rows)))
        except ValueError as error:
            errors.append(f"rFID left out: {error}")
    report = {"pictures": rows, "mean": means, "factor": factor, "notes": notes}
    conclude(as_json, report, "\n".join(lines + notes), errors)


def pair_captions(listing: str, pictures: Sequence[Path], notes: list[str]) -> dict[Path, str]:
    """Picture -> caption: by file name where the listing has every picture, else in order if the numbers are equal.

    listing  lines of JSON with "text" and, as in a data folder, "file_name"; a ValueError names the line
    """
    prompts = []
    for number, line in enumerate(Path(listing).read_bytes().split(b"\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)  # UTF-8, with or without a byte order mark
                prompts.append((Path(row.get("file_name", "")).stem, str(row["text"])))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                why = f"{type(error).__name__}: {error}"
                raise ValueError(f'{listing}:{number}: each line is a JSON object with "text" ({why})') from None
    by_name, stems = dict(prompts), {picture.stem for picture in pictures}
    if stems <= by_name.keys():
        if unused := len(by_name.keys() - stems):
            notes.append(f"note: {unused} of {len(by_name)} prompts have no picture")
        return {picture: by_name[picture.stem] for picture in pictures}
    if len(prompts) != len(pictures):
        raise ValueError(f"{listing}: {len(prompts)} prompts for {len(pictures)} pictures; name the pictures as "
                         "file_name does, or give as many prompts, in the order of the names")
    notes.append("note: prompts and pictures paired in order, not by name")
    return dict(zip(pictures, (text for _, text in prompts), strict=True))


def run_set(generated: str, reference: str | None, prompts: str | None, res: int, cache: Path, workers: int,
            weights: Path, device: str | None, as_json: bool) -> None:
    """Tables 1, 3 and 4 of the paper: the scores of a folder of generated pictures."""
    from checkpoint import check_device
    from scores import sets

    device, results, notes, errors, scores = check_device(device), Results(cache, read_pixels), [], [], {}
    pictures, originals = find_pictures([generated]), find_pictures([reference]) if reference else []
    captions = pair_captions(prompts, pictures, notes) if prompts else {}
    rows = details(pictures, results, workers, errors)
    if not rows:
        return conclude(as_json, {"notes": notes}, "no picture could be scored", errors)
    pictures = [Path(row["picture"]) for row in rows]
    res = res or min(min(row["width"], row["height"]) for row in rows)
    if not originals:
        notes.append("note: FID left out: give --reference DIR")
    elif inception := load_or_note(notes, "FID", partial(sets.Extractor, weights, device)):
        try:
            scores |= sets.fid_scores(pictures, originals, res, results, inception, notes, errors)
        except ValueError as error:
            errors.append(f"FID left out: {error}")
    if captions:
        captions = {path: captions[path] for path in pictures}
        clip = load_or_note(notes, "CLIPScore", partial(sets.clip_scores, captions, weights, device, results))
        scores |= {"clip_score": float(np.mean(clip))} if clip else {}
    else:
        notes.append("note: CLIPScore left out: give --prompts metadata.jsonl")
    aesthetics = load_or_note(notes, "Aesthetics", partial(sets.aesthetics_scores, pictures, weights, device, results))
    scores |= {"aesthetics": float(np.mean(aesthetics))} if aesthetics else {}
    scores |= {name: mean_of(rows)[name] for name in ("glcm_release", "glcm_entropy", "ratio")}
    lines = [f"{len(pictures)} generated, {len(originals)} reference pictures",
             *(f"{name:13} {value:10.4f}" for name, value in scores.items())]
    report = {"generated": len(pictures), "reference": len(originals), **scores, "notes": notes}
    conclude(as_json, report, "\n".join(lines + notes), errors)


# ---- correlate

def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def read_ratings(path: str) -> dict[str, list[float]]:
    """The numeric columns of a CSV, "rating" among them; text columns are skipped, a gap in a column is an error."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            rows = list(csv.DictReader(f))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV in UTF-8 ({error})") from None
    if not rows or "rating" not in rows[0]:
        raise ValueError(f'{path}: needs a first line of column names, among them "rating", and lines below it')
    columns = {}
    for name in rows[0]:
        values = [math.nan if name is None else _number(row[name]) for row in rows]
        gaps = [line for line, value in enumerate(values, 2) if not math.isfinite(value)]
        if not gaps:
            columns[name] = values
        elif name is None or name == "rating" or len(gaps) < len(rows):
            raise ValueError(f"{path}:{gaps[0]}: column {name or 'without a name'} holds no number there")
    if len(columns) == 1:
        raise ValueError(f"{path}: no column of numbers beside rating")
    return columns


def run_correlate(ratings: str, as_json: bool) -> None:
    """How well metrics rank pictures as people do."""
    columns, rows = read_ratings(ratings), []
    rating = columns.pop("rating")
    for name, values in columns.items():
        try:
            if name in ("ratio", "compression_ratio"):  # the paper correlates its reciprocal: lower means more detail
                name = f"1/{name}"
                if not all(values):
                    raise ValueError("0 has no reciprocal")
                values = [1 / value for value in values]
            row = {"metric": name}
            for title, statistic in (("srcc", srcc), ("plcc", plcc)):
                row[title] = statistic(values, rating)
                row[f"{title}_low"], row[f"{title}_high"] = bootstrap(statistic, values, rating)
        except ValueError as error:
            raise ValueError(f"{ratings}: {name}: {error}") from None
        rows.append(row)
    lines = table(rows, {"metric": ""} | dict.fromkeys(list(rows[0])[1:], ".4f"))
    text = f"{lines}\n{len(rating)} ratings; low and high: 95 % bootstrap intervals"
    conclude(as_json, {"n": len(rating), "metrics": rows}, text)


def new_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    shared = {
        "cache": dict(metavar="DIR", type=Path, help="where results are stored (default: ~/.cache/diffusion-4k)"),
        "workers": dict(metavar="N", type=int, default=cores(), help="processes (default: one per core, %(default)s)"),
        "weights": dict(metavar="DIR", type=Path, default=Path("weights"),
                        help="folder with official weights, never downloaded (default: %(default)s)"),
        "device": dict(help="cpu or cuda (default: cuda if there is one)")}

    def command(run: Callable, about: str, *flags: str) -> Callable:
        sub = commands.add_parser(run.__name__.removeprefix("run_"), help=about, description=about, allow_abbrev=False)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", dest="as_json", help="print JSON; infinity and NaN become null")
        for flag in flags:
            sub.add_argument(f"--{flag}", **shared[flag])
        return sub.add_argument

    add = command(run_detail, "both GLCM Scores and the compression ratio of pictures", "cache", "workers")
    add("pictures", nargs="+", metavar="PICTURE", help="files and folders")
    add("--maps", metavar="DIR", type=Path, help="write a sheet of heat maps per picture")
    add = command(run_pair, "PSNR, SSIM, NMSE and LPIPS of two pictures", "weights", "device")
    add("reference", metavar="REFERENCE")
    add("picture", metavar="PICTURE")
    about = "rFID, NMSE, PSNR, SSIM and LPIPS of an autoencoder, without tiles"
    add = command(run_vae, about, "cache", "weights", "device")
    add("folder", metavar="DIR", help="pictures; sides are cut to the multiple that the factor needs")
    add("--model", default="tiny-sd3", help="folder in models/, another model folder, or a file (default: %(default)s)")
    add("--factor", type=int, default=16, choices=(8, 16), help="of the autoencoder (default: %(default)s)")
    add("--res", type=int, default=0, metavar="PX", help="resize and crop to a square first (default: 0, no)")
    about = "FID, patch-FID, CLIPScore, Aesthetics, GLCM Scores and compression ratio of a set"
    add = command(run_set, about, "cache", "workers", "weights", "device")
    add("generated", metavar="GENERATED", help="folder of pictures")
    add("--reference", metavar="DIR", help="folder of real pictures, for FID")
    add("--prompts", metavar="FILE", help='JSON lines with "text" and "file_name", for CLIPScore')
    add("--res", type=int, default=0, metavar="PX", help="squares for FID (default: the smallest generated side)")
    add = command(run_correlate, "SRCC and PLCC of every column of a CSV with its column rating")
    add("ratings", metavar="RATINGS.csv", help="of ratio and compression_ratio the reciprocal is used, as in the paper")
    return parser


def main() -> None:
    args = vars(new_parser().parse_args())
    run = args.pop("run")
    try:
        if args.get("cache", "") is None:
            args["cache"] = Path.home() / ".cache" / "diffusion-4k"
    except RuntimeError:
        raise SystemExit("error: no home folder for the results; name a folder with --cache") from None
    try:
        for flag, least in (("workers", 1), ("res", 0)):
            if args.get(flag, least) < least:
                raise ValueError(f"--{flag} {args[flag]}: give {least} or more")
        run(**args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except BrokenProcessPool:
        raise SystemExit("error: a worker process died, probably out of memory; give fewer --workers") from None


if __name__ == "__main__":
    main()
