"""The evaluation of Aesthetic-4K: the detail of pictures, the similarity of two, the distance of two sets.

Paper     Diffusion-4K section 3.1 "Comprehensive Evaluation Metrics", tables 1 to 4
Mirrors   the released eval.py and generate_and_eval_fid.py; tested by tests/test_metrics.py and those of scores/
Scores    GLCM Score: scores/glcm.py; compression ratio (lower is better; of a set, the ratio of sums): jpeg.py;
          grid of a decoder or transformer: grid.py; PSNR, SSIM, NMSE, SRCC, PLCC: compare.py; FID: sets.py;
          CLIPScore: clip.py; Aesthetics, LPIPS: perceptual.py
Inputs    the prompts of pictures: pairing.py; ratings by people: ratings.py; official weights: official.py
Run       python metrics.py detail PICTURES… [--maps DIR]
          python metrics.py pair REFERENCE PICTURE
          python metrics.py vae DIR --model tiny-sd3 --factor 16
          python metrics.py set GENERATED --reference DIR --prompts DIR/metadata.jsonl --weights DIR
          python metrics.py correlate RATINGS.csv
"""

if __name__ == "__main__":  # Ctrl-C while the modules are loaded ends in one line
    import files
    files.end_on_interrupt()

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from files import need, printable, replacing, run_command, writable
from reading.pictures import FORMATS, MOST_PIXELS, read_picture, upright_size
from scores.compare import frechet_distance, nmse, plcc, psnr, srcc, ssim
from scores.glcm import DEFINITIONS, cores, glcm_score
from scores.grid import grid_note, grid_scores, spread_of
from scores.jpeg import compression_ratio, jpeg_size
from scores.pairing import pair_captions
from scores.ratings import correlate
from scores.results import Results, each, identity
from scores.sheet import detail_sheet

__all__ = ["compression_ratio", "frechet_distance", "glcm_score", "jpeg_size", "nmse", "plcc", "psnr", "srcc", "ssim"]
NOTHING = "no picture could be scored"
MOST_NAME = 230  # bytes; file systems end at 255, and a file that is being written has a longer name
BESIDE = (".jsonl", ".json", ".csv", ".txt")  # listings and captions, which stand beside pictures


# ---- pictures in, tables out

def find_pictures(paths: Sequence[str | os.PathLike]) -> list[Path]:
    """The files, and of folders the pictures in them sorted by name; what is left out is named on stderr.

    raises  FileNotFoundError; ValueError if a folder has no picture
    """
    pictures: dict[str, Path] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        found = _pictures_in(path) if path.is_dir() else [path]
        pictures |= {os.path.abspath(file): file for file in found if os.path.abspath(file) not in pictures}
    return list(pictures.values())


def _pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder by suffix. Hidden files are none: systems and killed processes leave them."""
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in (*FORMATS, "MPO")}
    shown = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    others = [path for path in shown if not path.is_dir() and path.suffix.lower() not in suffixes]
    pictures = [path for path in shown if not path.is_dir() and path.suffix.lower() in suffixes]
    if not pictures:
        folders = ", ".join([path.name for path in shown if path.is_dir()][:4])
        has = f"; it has {len(others)} other files" if others else ""
        has += f"; it has the folders {folders}" if folders else ""
        raise ValueError(f"{folder}: no picture in this folder ({', '.join(FORMATS)}){has}")
    if skipped := [path for path in others if path.suffix.lower() not in BESIDE]:
        kinds = Counter(path.suffix or "no suffix" for path in skipped)
        kinds = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common(8))
        note = f"note: {folder}: {len(skipped)} files are no pictures by name and left out ({kinds}): {skipped[0].name}"
        print(printable(note + (", …" if len(skipped) > 1 else "")), file=sys.stderr)
    return pictures


def read_pixels(path: str | os.PathLike) -> np.ndarray:
    """(H, W, 3) uint8, upright sRGB."""
    picture = read_picture(path)
    if picture.info.get("frames"):
        print(printable(f"note: {path}: an animation, of which the first frame is scored"), file=sys.stderr)
    return np.array(picture)


def table(rows: Sequence[dict], columns: dict[str, str]) -> str:
    """Rows under their column names; columns: key -> format."""
    lines = [list(columns)]
    lines += [["" if row.get(key) is None else printable(f"{row[key]:{form}}") for key, form in columns.items()]
              for row in rows]
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
    print(text, flush=True)
    for error in errors:
        print(f"error: {printable(error)}", file=sys.stderr)
    raise SystemExit(1 if errors else 0)


# ---- detail

DETAIL_COLUMNS = {"picture": "", "width": "d", "height": "d", "glcm_release": ".4f", "glcm_entropy": ".4f",
                  "jpeg_bytes": ",d", "ratio": ".3f", "grid_16": ".1f", "grid_32": ".1f"}


def detail_of(path: Path, results: Results, maps: Path | None, threads: int) -> dict:
    """The row of a picture; a sheet of heat maps is written into `maps`."""
    def measure(pixels: np.ndarray) -> dict:
        jpeg_bytes = jpeg_size(pixels)
        return {"width": pixels.shape[1], "height": pixels.shape[0],
                **{f"glcm_{name}": glcm_score(pixels, name, threads=threads) for name in DEFINITIONS},
                **grid_scores(pixels),
                "jpeg_bytes": jpeg_bytes, "raw_bytes": pixels.nbytes, "ratio": pixels.nbytes / jpeg_bytes}

    row = {"picture": str(path)} | results.of_picture(("detail", 2), path, measure)
    if maps:
        try:
            with replacing(sheet_path(path, maps)) as temporary:
                detail_sheet(read_pixels(path), path.name).save(temporary, quality=95, subsampling=0)
        except OSError as error:
            raise OSError(f"--maps {maps}: a sheet can't be written there ({error.strerror or error})") from None
    return row


def sheet_path(picture: Path, maps: Path) -> Path:
    return maps / f"{picture.stem}_{picture.suffix[1:]}.jpg"


def details(paths: Sequence[Path], results: Results, workers: int, errors: list[str],
            maps: Path | None = None) -> dict[Path, dict]:
    """`detail_of` all pictures, in processes if there are many; `errors` gets a line per picture without scores."""
    workers = min(workers, cores())
    processes = min(workers, max(1, len(paths) // 8))  # a process takes a second to start
    score = partial(detail_of, results=results, maps=maps, threads=workers if processes == 1 else 1)
    return each(score, paths, "pictures", errors, processes)


def mean_of(rows: Collection[dict]) -> dict[str, float]:
    """Means of the GLCM Scores of a set, its ratio of sums, medians of its grid scores."""
    means = {name: float(np.mean([row[name] for row in rows])) for name in ("glcm_release", "glcm_entropy")}
    sums = {name: sum(row[name] for row in rows) for name in ("raw_bytes", "jpeg_bytes")}
    grid = {name: median for name, (median, _) in spread_of(rows).items()}
    return means | sums | {"ratio": sums["raw_bytes"] / sums["jpeg_bytes"]} | grid


def run_detail(pictures: list[Path], maps: Path | None, cache: Path, workers: int, as_json: bool) -> None:
    """GLCM Scores, compression ratio and grid scores of pictures, with heat maps if `maps` names a folder."""
    paths, errors = find_pictures(pictures), []
    if maps:
        check_maps(paths, maps)
    rows = [*details(paths, Results(cache, read_pixels), workers, errors, maps).values()]
    means = mean_of(rows) if rows else {}
    last = [{"picture": f"all {len(rows)}: means, ratio of sums", **means}] if rows else []
    text = f"{table(rows + last, DETAIL_COLUMNS)}\n{grid_note()}" if rows else NOTHING
    conclude(as_json, {"pictures": rows, "all": means}, text, errors)


def check_maps(paths: Sequence[Path], maps: Path) -> None:
    """Make the folder of the sheets; ValueError if two would have one name, or it holds pictures that are scored."""
    sheets: dict[str, Path] = {}
    for path in paths:
        name = sheet_path(path, maps).name.lower()  # some file systems ignore case
        if (other := sheets.setdefault(name, path)) is not path:
            raise ValueError(f"--maps {maps}: the sheets of {other} and {path} would have the same name; "
                             "give one folder at a time")
        if len(os.fsencode(name)) > MOST_NAME:
            raise ValueError(f"--maps {maps}: the sheet of {path} would have a name of over {MOST_NAME} bytes; "
                             "rename the picture")
    if maps.resolve() in {path.parent.resolve() for path in paths}:
        raise ValueError(f"--maps {maps}: holds pictures that are scored, and sheets look like them; name another")
    writable(maps, "--maps")


# ---- pair, vae, set: modules that import torch are imported inside

def or_left_out(what: str, notes: list[str], errors: list[str], compute: Callable):
    """compute(), or None with a note where weights are missing, with an error where they or the pictures are wrong."""
    try:
        return compute()
    except FileNotFoundError as error:
        notes.append(f"note: {what} left out: {error}")
    except ValueError as error:
        errors.append(f"{what} left out: {error}")
    return None


def note_enlarged(paths: Sequence[Path], what: str, res: int, notes: list[str]) -> None:
    """A note if pictures are smaller than the squares of `res` px that are compared."""
    sides = []
    for path in paths:
        try:
            sides.append(min(upright_size(path)))
        except (ValueError, OSError):  # named where it is scored
            continue
    if small := [side for side in sides if side < res]:
        notes.append(f"note: {len(small)} of {len(paths)} {what} are enlarged to {res} px, from {min(small)} px on: "
                     f"enlarging adds no detail; give --res {min(small)} or less, or larger pictures")


def pair_scores(reference: np.ndarray, image: np.ndarray) -> dict[str, float]:
    return {"psnr": psnr(reference, image), "ssim": ssim(reference, image), "nmse": nmse(reference, image)}


def run_pair(reference: Path, picture: Path, weights: Path, device: str | None, as_json: bool) -> None:
    """How close a picture is to its reference."""
    from machine.memory import check_device
    from scores.sets import load_lpips

    device, notes, errors = check_device(device), [], []
    pixels = [read_pixels(path) for path in (reference, picture)]
    try:
        scores = pair_scores(*pixels)  # before a network is loaded
    except ValueError as error:
        raise ValueError(f"{reference}, {picture}: {error}") from None
    lpips = or_left_out("LPIPS", notes, errors, lambda: load_lpips(weights, device)(*pixels))
    scores |= {} if lpips is None else {"lpips": lpips}
    text = "\n".join([table([scores], dict.fromkeys(scores, ".4f")), *notes])
    conclude(as_json, scores | {"notes": notes}, text, errors)


def run_vae(folder: Path, model: Path, factor: int, res: int, cache: Path, weights: Path, device: str | None,
            as_json: bool) -> None:
    """Table 2 of the paper: what an autoencoder loses of photographs."""
    from checkpoint import model_folder
    from family import find, vae_for
    from machine.memory import check_device
    from scores import sets
    from vae import VAE

    device, results, notes, errors = check_device(device), Results(cache, read_pixels), [], []
    file, fallback = model, None
    if not model.is_file():
        folder_of = model if model.is_dir() else model_folder(str(model))
        family, _, file = find(folder_of)
        file, fallback = vae_for(folder_of, file, factor), family.latent_scale
    vae = VAE.load(file, device, fallback=fallback)
    if res % (step := sets.side_step(vae, factor)):
        raise ValueError(f"--res {res}: must be a multiple of {step} at factor {factor}")
    pictures = find_pictures([folder])
    note_enlarged(pictures, "pictures", res, notes)
    inception = or_left_out("rFID", notes, errors, partial(sets.Extractor, weights, device))
    lpips = or_left_out("LPIPS", notes, errors, partial(sets.load_lpips, weights, device))

    def measure(pixels: np.ndarray) -> dict:
        pixels, again = sets.round_trip(vae, pixels, factor, res)
        row = {"width": pixels.shape[1], "height": pixels.shape[0], **pair_scores(pixels, again)}
        if lpips:
            row["lpips"] = lpips(pixels, again)
        if inception:
            row["features"] = np.concatenate([inception(side[None]) for side in (pixels, again)])
        return row

    files = [identity(path) for path in ([file, weights] if inception or lpips else [file])]
    key = ("vae", 3, factor, res, vae.scale_factor, vae.shift_factor, vae.offset, bool(inception), bool(lpips), files)
    measured = each(lambda path: results.of_picture(key, path, measure), pictures, "pictures", errors)
    features = [row.pop("features") for row in measured.values()] if inception else []
    rows = [{"picture": str(path)} | row for path, row in measured.items()]
    columns = {"psnr": ".3f", "ssim": ".4f", "nmse": ".5f"} | ({"lpips": ".4f"} if lpips else {})
    means = {name: float(np.mean([row[name] for row in rows])) for name in columns} if rows else {}
    last = {"picture": f"mean of {len(rows)}, factor {factor}", **means}
    lines = [table([*rows, last], {"picture": "", "width": "d", "height": "d"} | columns) if rows else NOTHING]
    if features:
        rfid = or_left_out("rFID", notes, errors, lambda: frechet_distance(*np.stack(features, axis=1)))
        if rfid is not None:
            means["rfid"] = rfid
            lines.append(f"rFID {rfid:.4f}")
            notes.append(sets.number_note("rfid", len(rows)))
    report = {"pictures": rows, "mean": means, "factor": factor, "notes": notes}
    conclude(as_json, report, "\n".join(lines + notes), errors)


def run_set(generated: Path, reference: Path | None, prompts: Path | None, res: int, cache: Path, workers: int,
            weights: Path, device: str | None, as_json: bool) -> None:
    """Tables 1, 3 and 4 of the paper: the scores of a folder of generated pictures."""
    from machine.memory import check_device
    from scores import sets

    device, results, notes, errors, scores = check_device(device), Results(cache, read_pixels), [], [], {}
    pictures, originals = find_pictures([generated]), find_pictures([reference]) if reference else []
    captions = pair_captions(prompts, pictures, notes) if prompts else {}
    rows = details(pictures, results, workers, errors)
    if not rows:
        return conclude(as_json, {"notes": notes}, NOTHING, errors)
    pictures = list(rows)
    res = res or min(min(row["width"], row["height"]) for row in rows.values())
    left_out = partial(or_left_out, notes=notes, errors=errors)
    if not originals:
        notes.append("note: FID left out: give --reference DIR")
    elif inception := left_out("FID", compute=partial(sets.Extractor, weights, device)):
        note_enlarged(pictures, "generated pictures", res, notes)
        note_enlarged(originals, "reference pictures", res, notes)
        fids = partial(sets.fid_scores, pictures, originals, res, results, inception, notes, errors)
        scores |= left_out("FID", compute=fids) or {}
    if prompts:
        captions = {path: captions[path] for path in pictures}
        clip = left_out("CLIPScore", compute=partial(sets.clip_scores, captions, weights, device, results, notes))
        scores |= {"clip_score": float(np.mean(clip))} if clip else {}
    else:
        notes.append("note: CLIPScore left out: give --prompts metadata.jsonl")
    aesthetics = left_out("Aesthetics", compute=partial(sets.aesthetics_scores, pictures, weights, device, results))
    scores |= {"aesthetics": float(np.mean(aesthetics))} if aesthetics else {}
    scores |= {name: value for name, value in mean_of(rows.values()).items() if not name.endswith("_bytes")}
    grids = each(lambda path: results.of_picture(("grid", 1), path, grid_scores), originals, "reference", broken := [])
    errors += [error for error in broken if error not in errors]  # FID has named them already
    notes.append(grid_note(grids.values()))
    lines = [f"{len(pictures)} generated, {len(originals)} reference pictures",
             *(f"{name:13} {value:10.4f}" for name, value in scores.items())]
    report = {"generated": len(pictures), "reference": len(originals), **scores, "notes": notes}
    conclude(as_json, report, "\n".join(lines + notes), errors)


# ---- correlate

def run_correlate(ratings: Path, as_json: bool) -> None:
    """How well metrics rank pictures as people do."""
    number, rows, notes, errors = correlate(ratings)
    lines = [table(rows, {"metric": ""} | dict.fromkeys(list(rows[0])[1:], ".4f")),
             f"{number} ratings; low and high: 95 % bootstrap intervals", *map(printable, notes)]
    conclude(as_json, {"n": number, "metrics": rows, "notes": notes}, "\n".join(lines), errors)


# ---- the command line

def named(text: str) -> Path:
    """A path on the command line; refused if it is empty, which pathlib would take for the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path, as of a shell variable that is not set")
    return Path(text)


def new_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="The evaluation of Aesthetic-4K.", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    shared = {
        "cache": dict(metavar="DIR", type=named, help="where results are stored (default: ~/.cache/diffusion-4k)"),
        "workers": dict(metavar="N", type=int, default=cores(),
                        help="processes, at most one per core (default: %(default)s)"),
        "weights": dict(metavar="DIR", type=named, default=Path("weights"),
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
    add("pictures", nargs="+", type=named, metavar="PICTURE", help="files and folders")
    add("--maps", metavar="DIR", type=named, help="write a sheet of heat maps per picture")
    add = command(run_pair, "PSNR, SSIM, NMSE and LPIPS of two pictures", "weights", "device")
    add("reference", type=named, metavar="REFERENCE")
    add("picture", type=named, metavar="PICTURE")
    about = "rFID, NMSE, PSNR, SSIM and LPIPS of an autoencoder, without tiles"
    add = command(run_vae, about, "cache", "weights", "device")
    add("folder", type=named, metavar="DIR", help="pictures; sides are cut to the multiple that the factor needs")
    add("--model", type=named, default=Path("tiny-sd3"),
        help="folder in models/, another model folder, or a file (default: %(default)s)")
    add("--factor", type=int, default=16, choices=(8, 16), help="of the autoencoder (default: %(default)s)")
    add("--res", type=int, default=0, metavar="PX", help="resize and crop to a square first (default: 0, no)")
    about = "FID, patch-FID, CLIPScore, Aesthetics, GLCM Scores and compression ratio of a set"
    add = command(run_set, about, "cache", "workers", "weights", "device")
    add("generated", type=named, metavar="GENERATED", help="folder of pictures")
    add("--reference", type=named, metavar="DIR", help="folder of real pictures, for FID")
    add("--prompts", type=named, metavar="FILE", help='JSON lines with "text" and "file_name", for CLIPScore')
    add("--res", type=int, default=0, metavar="PX", help="squares for FID (default: the smallest generated side)")
    add = command(run_correlate, "SRCC and PLCC of every column of a CSV with its column rating")
    add("ratings", type=named, metavar="RATINGS.csv",
        help="of ratio and compression_ratio the reciprocal is used, as in the paper")
    return parser


def run(argv: Sequence[str] | None) -> None:
    args = vars(new_parser().parse_args(argv))
    command = args.pop("run")
    if "workers" in args:
        need(args["workers"] >= 1, "workers", args["workers"], "1 or more")
    if "res" in args:
        most = int(MOST_PIXELS**0.5)
        need(0 <= args["res"] <= most, "res", args["res"], f"0 to {most} pixels")
    if "cache" in args:
        try:
            args["cache"] = args["cache"] or Path.home() / ".cache" / "diffusion-4k"
        except RuntimeError:  # a user without a name and without HOME
            raise ValueError("no home folder for the results; name a folder with --cache") from None
        writable(args["cache"], "--cache")
    command(**args)


def main(argv: Sequence[str] | None = None) -> None:
    run_command(lambda: run(argv))


if __name__ == "__main__":
    main()
