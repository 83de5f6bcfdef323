"""Runs the commands of the last section of docs/paper.md and prints their figures in the columns of the paper's tables.

Embedded models and their own photographs: the numbers show that the commands work, not what the paper claims.
Raters    nobody rated anything: the middle of each photograph and blurred copies are rated by how little they are
          blurred, in the place of table 1's ratings by people
GPT-4o    a local server in its place: it describes a picture by the length of its JPEG, and prefers the longer one
Networks  of FID, CLIPScore, Aesthetics and LPIPS are taken from --weights; "–" where one is missing
Run       python bench/paper.py --photos photos --out runs/paper
Check     python -m pytest tests/test_paper.py
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from PIL import ImageFilter

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bench.ablation import apart  # noqa: E402
from reading.pictures import read_picture  # noqa: E402
from scores.folder import find_pictures  # noqa: E402
from scores.preference import ASKED  # noqa: E402

SECTION = "## At laptop size"
ENDPOINT = "http://localhost:8000/v1"  # of the section
PATCH = 512                            # pixels
BLUR = {10: 0, 7: 1, 4: 2, 1: 4}       # rating from 1 to 10 -> radius, pixels
RATED = {"GLCM Score": "glcm", "Compression Ratio": "1/ratio"}  # column -> key
VAE = {"rFID": "rfid", "NMSE": "nmse", "PSNR": "psnr", "SSIM": "ssim", "LPIPS": "lpips"}
SET = {"FID": "fid", "CLIPScore": "clip_score", "Aesthetics": "aesthetics", "GLCM Score": "glcm_release",
       "Compression Ratio": "ratio"}


def commands(page: str, places: dict[str, object], weights: Path) -> list[tuple[str, list[str]]]:
    """(table or figure, words) of each command of the section; places: what stands there -> what takes its place."""
    block = re.search(rf"^{SECTION}$.*?^```\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[1]
    lines, title = [], ""
    for line in block.splitlines():
        if line.startswith("# "):
            title = line[2:]
            continue
        words = shlex.split(line)[1:]
        for name, place in places.items():
            words = [re.sub(rf"^{name}(?=/|$)", lambda _, place=place: str(place), word) for word in words]
        words += ["--weights", str(weights)] if words[1] in ("vae", "set", "compare") else []
        lines.append((title, words))
    return lines


# ---- in the place of people and of GPT-4o

def cut_patches(photos: Path, folder: Path) -> None:
    """Write the middle of each photograph, and its blurred copies, as NUMBER_RATING.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, photo in enumerate(find_pictures([photos])):
        picture = read_picture(photo)
        left, top = ((side - PATCH) // 2 for side in picture.size)
        patch = picture.crop((left, top, left + PATCH, top + PATCH))
        for rating, radius in BLUR.items():
            if not (file := folder / f"{k:02}_{rating}.png").exists():
                patch.filter(ImageFilter.GaussianBlur(radius)).save(file)


def write_ratings(report: dict, file: Path) -> None:
    """The CSV that `metrics.py correlate` reads, of the report of `metrics.py detail`."""
    lines = [f"{Path(row['picture']).stem.split('_')[1]},{row['glcm_release']},{row['ratio']}"
             for row in report["pictures"]]
    file.write_text("\n".join(["rating,glcm,ratio", *lines]))


class StandIn(BaseHTTPRequestHandler):
    """Answers questions about one picture with a caption, and those about two with a preference."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        first, *others = (len(part["image_url"]["url"]) for part in body["messages"][-1]["content"]
                          if part["type"] == "image_url")
        text = f"Detail of {first // 1000} thousand letters"
        if others:
            choice = "first" if first >= others[0] else "second"
            text = "\n".join(f"{k}. {name}: the {choice} image is better." for k, name in enumerate(ASKED, 1))
        reply = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_: object) -> None:
        pass


# ---- the tables

def cells(name: str, columns: dict[str, str], figures: dict, intervals: dict) -> list[str]:
    """A row of a table: each column's figure and its 95 % interval."""
    row = [name]
    for key in columns.values():
        low, high = intervals.get(key) or (None, None)
        interval = "" if None in (low, high) else f" [{low:.4g}, {high:.4g}]"
        row.append("–" if figures.get(key) is None else f"{figures[key]:.4g}{interval}")
    return row


def by_metric(rows: list[dict], value: str, low: str, high: str) -> tuple[dict, dict]:
    """Figures and intervals of a report with a row per metric."""
    return ({row["metric"]: row[value] for row in rows}, {row["metric"]: (row[low], row[high]) for row in rows})


def table(words: list[str], printed: str) -> list[list[str]]:
    """The columns of the paper's table and this command's rows; none if the command has no figures for a table."""
    script, command = words[:2]
    report, after = json.loads(printed) if "--json" in words else {}, dict(zip(words, words[1:], strict=False))
    name = Path(after.get("--out", words[2])).name
    if command == "correlate":
        return [["", *RATED], *(cells(kind.upper(), RATED, *by_metric(report["metrics"], kind, f"{kind}_low",
                                                                      f"{kind}_high")) for kind in ("srcc", "plcc"))]
    if command == "vae":
        name = f"{after['--model']}-F{after['--factor']}"
        return [["", *VAE], cells(name, VAE, report["mean"], report["intervals"])]
    if command == "set":
        return [["", *SET], cells(name, SET, report, report["intervals"])]
    if command == "compare":
        return [["", *SET], cells("b - a", SET, *by_metric(report["metrics"], "b_minus_a", "low", "high")),
                cells("b wins", SET, *by_metric(report["metrics"], "rate", "rate_low", "rate_high"))]
    if command == "prefer":
        columns = {"a": "a_wins", "b": "b_wins", "undecided": "undecided", "b wins": "rate"}
        return [["", *columns], *(cells(row["question"], columns, row, {"rate": (row["rate_low"], row["rate_high"])})
                                  for row in report["questions"])]
    if script == "train.py":
        log = json.loads((Path(after["--out"]) / "log.jsonl").read_text().splitlines()[-1])
        return [["", "steps", "batch", "images/s"],
                [name, after["--steps"], after["--batch"], str(log["images_per_s"])]]
    if drawn := re.findall(r"(\S+) s/step  peak (\S+) GiB", printed) if "--from" not in words else []:
        return [["", "memory, GiB", "s per step"], [name, *drawn[-1][::-1]]]
    return []


# ---- the run

def run(words: list[str]) -> str:
    """What a command prints; its notes and progress pass through."""
    print(f"$ python {shlex.join(words)}", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, ROOT / words[0], *words[1:]], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                          env=os.environ | {"no_proxy": "127.0.0.1"})
    if done.returncode:
        raise SystemExit(f"error: {words[0]} ended with {done.returncode}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--photos", type=Path, default=Path("photos"), help="fetched if absent (default: photos)")
    parser.add_argument("--out", type=Path, default=Path("runs/paper"), help="default: runs/paper")
    parser.add_argument("--weights", type=Path, default=Path("weights"), help="networks of the metrics")
    args = parser.parse_args()
    photos, out, weights = (path.resolve() for path in (args.photos, args.out, args.weights))
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    Thread(target=server.serve_forever, daemon=True).start()
    places = {"photos": photos, "runs/paper": out, ENDPOINT: f"http://127.0.0.1:{server.server_port}/v1"}
    (_, fetch), *lines = commands((ROOT / "docs" / "paper.md").read_text(), places, weights)
    if not photos.is_dir():
        run(fetch)
    cut_patches(photos, out / "patches")
    shown, header = "", []
    for title, words in lines:
        printed = run(words)
        if title != shown:
            print(f"\n## {title}\n", flush=True)
            shown, header = title, []
        columns, *rows = table(words, printed) or [[]]
        if columns and columns != header:
            rows, header = [columns, ["---"] * len(columns), *rows], columns
        for row in rows:
            print(f"| {' | '.join(row)} |", flush=True)
        if words[:2] == ["metrics.py", "detail"] and "--json" in words:
            write_ratings(json.loads(printed), out / "ratings.csv")
        elif not rows:
            print(f"{printed.strip()}\n", flush=True)
    runs = [out / name / "sd3.safetensors" for name in ("wlf", "finetune")]
    print(f"\nweights of wlf and finetune: {apart(*runs)['share']:.2g} of what training changed lies between them")


if __name__ == "__main__":
    main()
