"""The evaluation of Aesthetic-4K: the detail of pictures, the similarity of two, the distance of two sets.

Paper     Diffusion-4K section 3.1 "Comprehensive Evaluation Metrics", tables 1 to 4
Mirrors   the released eval.py and generate_and_eval_fid.py; tested by tests/test_metrics.py and those of scores/
Scores    scores/: GLCM Score glcm.py; compression ratio jpeg.py; grid grid.py; PSNR, SSIM, NMSE, SRCC, PLCC compare.py;
          FID sets.py; CLIPScore clip.py; Aesthetics, LPIPS perceptual.py; how each is measured: protocol.py
Run       python metrics.py detail PICTURES… [--maps DIR]
          python metrics.py pair REFERENCE PICTURE
          python metrics.py vae DIR --model tiny-sd3 --factor 16
          python metrics.py set GENERATED --reference DIR --prompts DIR/metadata.jsonl --weights DIR
          python metrics.py compare A B
          python metrics.py prefer A B --endpoint URL --out answers.jsonl
          python metrics.py correlate RATINGS.csv
"""

if __name__ == "__main__":  # Ctrl-C while the modules are loaded ends in one line
    import files
    files.end_on_interrupt()

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from files import need, printable, run_command
from reading.endpoint import add_flags, open_endpoint
from reading.pictures import MOST_PIXELS, upright_size
from scores.compare import check_same_shape, frechet_distance, nmse, plcc, psnr, srcc, ssim
from scores.detail import check_maps, details, intervals_of, mean_of
from scores.folder import find_pictures, pair_names, read_pixels
from scores.glcm import cores, glcm_score
from scores.grid import grid_note, grid_scores
from scores.intervals import bootstrap_rows, of_halves
from scores.jpeg import compression_ratio, jpeg_size
from scores.pairing import pair_captions
from scores.preference import PREFER_COLUMNS, can_be_read, captions_of, preference
from scores.protocol import protocol_lines, protocol_of
from scores.ratings import correlate
from scores.results import Results, each, identity, results_folder
from scores.versus import VERSUS_COLUMNS, versus, versus_details

__all__ = ["compression_ratio", "frechet_distance", "glcm_score", "jpeg_size", "nmse", "plcc", "psnr", "srcc", "ssim"]
NOTHING = "no picture could be scored"
SIMILARITY = {"psnr": psnr, "ssim": ssim, "nmse": nmse}


# ---- tables out

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
    print("\n".join(map(printable, text.split("\n"))), flush=True)
    for error in errors:
        print(f"error: {printable(error)}", file=sys.stderr)
    raise SystemExit(1 if errors else 0)


# ---- detail

DETAIL_COLUMNS = {"picture": "", "width": "d", "height": "d", "glcm_release": ".4f", "glcm_entropy": ".4f",
                  "glcm_symmetric": ".4f", "jpeg_bytes": ",d", "ratio": ".3f", "grid_16": ".1f", "grid_32": ".1f"}


def run_detail(pictures: list[Path], maps: Path | None, cache: Path, workers: int, as_json: bool) -> None:
    """GLCM Scores, compression ratio and grid scores of pictures, with heat maps if `maps` names a folder."""
    paths, errors = find_pictures(pictures), []
    if maps:
        check_maps(paths, maps)
    rows = [*details(paths, Results(cache, read_pixels), workers, errors, maps).values()]
    means, protocol = mean_of(rows) if rows else {}, protocol_of(DETAIL_COLUMNS)
    last = [{"picture": f"all {len(rows)}: means, ratio of sums", **means}] if rows else []
    lines = [table(rows + last, DETAIL_COLUMNS), grid_note(), *protocol_lines(protocol)] if rows else [NOTHING]
    conclude(as_json, {"pictures": rows, "all": means, "protocol": protocol}, "\n".join(lines), errors)


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


def run_pair(reference: Path, picture: Path, weights: Path, device: str | None, as_json: bool) -> None:
    """How close a picture is to its reference."""
    from machine.memory import check_device
    from scores.sets import load_lpips

    device, notes, errors = check_device(device), [], []
    pixels = [read_pixels(path) for path in (reference, picture)]
    try:
        check_same_shape(*pixels)  # before a network is loaded
    except ValueError as error:
        raise ValueError(f"{reference}, {picture}: {error}") from None
    measures = SIMILARITY | {"lpips": lambda *pixels: load_lpips(weights, device)(*pixels)}
    scores = {name: score for name, measure in measures.items()
              if (score := or_left_out(name.upper(), notes, errors, partial(measure, *pixels))) is not None}
    protocol = protocol_of(scores)
    text = "\n".join([table([scores], dict.fromkeys(scores, ".4f")), *notes, *protocol_lines(protocol)])
    conclude(as_json, scores | {"notes": notes, "protocol": protocol}, text, errors)


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
        row = {"width": pixels.shape[1], "height": pixels.shape[0]}
        row |= {name: score(pixels, again) for name, score in SIMILARITY.items()}
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
    intervals = {name: bootstrap_rows(np.mean, [row[name] for row in rows]) for name in means}
    last = [{"picture": f"mean of {len(rows)}, factor {factor}", **means}]
    last += [{"picture": "its 95 % interval, " + side} | {name: intervals[name][k] for name in means}
             for k, side in enumerate(("from", "to"))] if len(rows) > 1 else []
    lines = [table([*rows, *last], {"picture": "", "width": "d", "height": "d"} | columns) if rows else NOTHING]
    if features:
        rfid = or_left_out("rFID", notes, errors, lambda: frechet_distance(*np.stack(features, axis=1)))
        if rfid is not None:
            means["rfid"] = rfid
            if len(features) > 3:
                reach = of_halves(sets.paired_frechet, [np.stack(features)], rfid).reach
                intervals["rfid"] = max(0.0, rfid - reach), rfid + reach
            lines.append(f"rFID {rfid:.4f}{interval_text(intervals.get('rfid'))}")
            notes.append(sets.number_note("rfid", len(rows)))
    protocol = protocol_of(means, "bootstrap", *(["halves"] if "rfid" in intervals else []))
    report = {"pictures": rows, "mean": means, "intervals": intervals, "factor": factor, "notes": notes}
    conclude(as_json, report | {"protocol": protocol}, "\n".join(lines + notes + protocol_lines(protocol)), errors)


def run_set(generated: Path, reference: Path | None, prompts: Path | None, res: int, cache: Path, workers: int,
            weights: Path, device: str | None, as_json: bool) -> None:
    """Tables 1, 3 and 4 of the paper: the scores of a folder of generated pictures."""
    from machine.memory import check_device
    from scores import sets

    need(not res or reference is not None, "res", res, "it with --reference, for FID")
    device, results, notes, errors = check_device(device), Results(cache, read_pixels), [], []
    scores, intervals = {}, {}
    pictures, originals = find_pictures([generated]), find_pictures([reference]) if reference else []
    captions = pair_captions(prompts, pictures, notes) if prompts else {}
    rows = details(pictures, results, workers, errors)
    if not rows:
        return conclude(as_json, {"notes": notes}, NOTHING, errors)
    pictures = list(rows)
    res = res or min(min(row["width"], row["height"]) for row in rows.values())
    left_out = partial(or_left_out, notes=notes, errors=errors)

    def fids() -> tuple[dict, dict]:
        sides = [sets.set_features(side, res, results, inception, errors) for side in (pictures, originals)]
        return sets.fid_scores(*sides, res, results, notes)

    if not originals:
        notes.append("note: FID left out: give --reference DIR")
    elif inception := left_out("FID", compute=partial(sets.Extractor, weights, device)):
        note_enlarged(pictures, "generated pictures", res, notes)
        note_enlarged(originals, "reference pictures", res, notes)
        scores, intervals = left_out("FID", compute=fids) or ({}, {})
    if not prompts:
        notes.append("note: CLIPScore left out: give --prompts metadata.jsonl")
    of_pictures = sets.picture_scores(pictures, captions, weights, device, results, notes, left_out)
    scores |= {name: float(np.mean(values)) for name, values in of_pictures.items()}
    scores |= {name: value for name, value in mean_of(rows.values()).items() if not name.endswith("_bytes")}
    intervals |= {name: bootstrap_rows(np.mean, values) for name, values in of_pictures.items()}
    intervals |= intervals_of(rows.values())
    grids = each(lambda path: results.of_picture(("grid", 1), path, grid_scores), originals, "reference", broken := [])
    errors += [error for error in broken if error not in errors]  # FID has named them already
    notes.append(grid_note(grids.values()))
    protocol = protocol_of(scores, "bootstrap", *(["halves"] if "fid" in scores else []),
                           *(["unbiased"] if "fid_unbiased" in scores else []))
    lines = [f"{len(pictures)} generated, {len(originals)} reference pictures",
             *(f"{name:18} {value:10.4f}{interval_text(intervals.get(name))}" for name, value in scores.items())]
    report = {"generated": len(pictures), "reference": len(originals), **scores, "intervals": intervals,
              "notes": notes, "protocol": protocol}
    conclude(as_json, report, "\n".join(lines + notes + protocol_lines(protocol)), errors)


def interval_text(interval: tuple[float, float] | None) -> str:
    return f"  [{interval[0]:.4f}, {interval[1]:.4f}]" if interval and np.isfinite(interval).all() else ""


# ---- compare, prefer

def run_compare(a: Path, b: Path, reference: Path | None, prompts: Path | None, res: int, cache: Path, workers: int,
                weights: Path, device: str | None, as_json: bool) -> None:
    """Two sets of pictures of the same prompts: paired differences and win rates."""
    from machine.memory import check_device
    from scores import sets

    need(not res or reference is not None, "res", res, "it with --reference, for FID")
    device, results, notes, errors = check_device(device), Results(cache, read_pixels), [], []
    pairs, originals = pair_names(a, b, notes), find_pictures([reference]) if reference else []
    captions = pair_captions(prompts, list(pairs), notes) if prompts else {}
    rows = details([*pairs, *pairs.values()], results, workers, errors)
    pairs = {x: y for x, y in pairs.items() if x in rows and y in rows}
    if not pairs:
        return conclude(as_json, {"notes": notes}, NOTHING, errors)
    size_of = {path: (row["width"], row["height"]) for path, row in rows.items()}
    if differ := [x.name for x, y in pairs.items() if size_of[x] != size_of[y]]:
        notes.append(f"note: {len(differ)} pairs are not of one size, which changes every score: {differ[0]}")
    compared, sides = versus_details([(rows[x], rows[y]) for x, y in pairs.items()]), (list(pairs), [*pairs.values()])
    left_out = partial(or_left_out, notes=notes, errors=errors)
    captions = {x: text for x, text in captions.items() if x in pairs}
    texts = [captions, {pairs[x]: text for x, text in captions.items()}]
    scored = [sets.picture_scores(side, text, weights, device, results, notes, left_out)
              for side, text in zip(sides, texts, strict=True)]
    compared += [versus(name, "higher", *(side[name] for side in scored)) for name in scored[0] if name in scored[1]]
    if originals and (inception := left_out("FID", compute=partial(sets.Extractor, weights, device))):
        res = res or min(map(min, size_of.values()))
        for side, what in (sides[0], "pictures of a"), (sides[1], "pictures of b"), (originals, "reference pictures"):
            note_enlarged(side, what, res, notes)
        notes.append(sets.number_note("fid", min(len(pairs), len(originals))))
        features = partial(sets.set_features, res=res, results=results, inception=inception, errors=errors)
        compared += left_out("FID", compute=lambda: sets.fid_differences(
            *map(features, (*sides, originals)), results)) or []
    names = [row["metric"] for row in compared]
    protocol = protocol_of(names, "bootstrap", *(["halves"] if "fid" in names else []), "wilson")
    lines = [f"{len(pairs)} pairs; a: {a}, b: {b}", table(compared, VERSUS_COLUMNS), *dict.fromkeys(notes)]
    report = {"pairs": len(pairs), "metrics": compared, "notes": list(dict.fromkeys(notes)), "protocol": protocol}
    conclude(as_json, report, "\n".join(lines + protocol_lines(protocol)), list(dict.fromkeys(errors)))


def run_prefer(a: Path, b: Path, prompts: Path | None, out: Path, endpoint: str, model: str, key_variable: str,
               side: int, per_minute: float, at_once: int, timeout: float, price: list[float] | None, dry_run: bool,
               as_json: bool) -> None:
    """Figure 6 of the paper: which of two pictures of a prompt a vision model prefers."""
    need(side >= 64, "side", side, "64 pixels or more")
    need(1 <= at_once <= 256, "at-once", at_once, "1 to 256")
    need(not (dry_run and as_json), "json", "--dry-run", "one of them: a dry run has no report")
    asked, notes, errors = open_endpoint(endpoint, model, key_variable, per_minute, timeout), [], []
    pairs = {x: y for x, y in pair_names(a, b, notes).items() if can_be_read((x, y), errors)}
    if not pairs:
        return conclude(as_json, {"notes": notes}, NOTHING, errors)
    captions = captions_of(list(pairs), prompts, notes)
    rows = preference(pairs, captions, asked, out, side, at_once, price, dry_run, notes, errors,
                      partial(print, file=sys.stdout if dry_run else sys.stderr, flush=True))
    if dry_run:
        return conclude(False, {}, f"{len(pairs)} pairs", errors)
    protocol = protocol_of(["prefer"])
    lines = [f"{len(pairs)} pairs; a: {a}, b: {b}", table(rows, PREFER_COLUMNS), *notes, *protocol_lines(protocol)]
    report = {"pairs": len(pairs), "questions": rows, "notes": notes, "protocol": protocol}
    conclude(as_json, report, "\n".join(lines), errors)


# ---- correlate

def run_correlate(ratings: Path, as_json: bool) -> None:
    """How well metrics rank pictures as people do."""
    number, rows, notes, errors = correlate(ratings)
    lines = [table(rows, {"metric": ""} | dict.fromkeys(list(rows[0])[1:], ".4f")),
             f"{number} ratings; low and high: 95 % bootstrap intervals", *notes,
             *protocol_lines(protocol := protocol_of(rows[0]))]
    conclude(as_json, {"n": number, "metrics": rows, "notes": notes, "protocol": protocol}, "\n".join(lines), errors)


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
    about = "two sets of pictures of the same prompts: paired differences, win rates, their intervals"
    add = command(run_compare, about, "cache", "workers", "weights", "device")
    add("a", type=named, metavar="A", help="folder of pictures")
    add("b", type=named, metavar="B", help="folder of pictures with the same names")
    add("--reference", type=named, metavar="DIR", help="folder of real pictures, for FID")
    add("--prompts", type=named, metavar="FILE", help='JSON lines with "text" and "file_name", for CLIPScore')
    add("--res", type=int, default=0, metavar="PX", help="squares for FID (default: the smallest side)")
    add = command(run_prefer, "which of two pictures of a prompt a vision model prefers, asked in both orders")
    add("a", type=named, metavar="A", help="folder of pictures")
    add("b", type=named, metavar="B", help="folder of pictures with the same names")
    add("--prompts", type=named, metavar="FILE",
        help='JSON lines with "text" and "file_name" (default: the prompts that sample.py records)')
    add("--out", type=named, required=True, metavar="FILE", help="JSON lines of answers; the same command resumes")
    add_flags(add)
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
        args["cache"] = results_folder(args["cache"])
    command(**args)


def main(argv: Sequence[str] | None = None) -> None:
    run_command(lambda: run(argv), less="fewer --workers or a smaller --res")


if __name__ == "__main__":
    main()
