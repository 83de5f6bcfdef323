"""Runs the commands of the last section of docs/paper.md and prints their figures in the columns of the paper's tables.

Embedded models and their own photographs: the numbers show that the commands work, not what the paper claims.
Networks  of FID, CLIPScore, Aesthetics and LPIPS are taken from --weights; "–" where one is missing
Run       python bench/paper.py --photos photos --out runs/paper
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from checkpoint import open_weights  # noqa: E402

SECTION = "## At laptop size"
VAE = {"rFID": "rfid", "NMSE": "nmse", "PSNR": "psnr", "SSIM": "ssim", "LPIPS": "lpips"}  # column -> key
SET = {"FID": "fid", "CLIPScore": "clip_score", "Aesthetics": "aesthetics", "GLCM Score": "glcm_release",
       "Compression Ratio": "ratio"}


def commands(page: str, photos: Path, out: Path, weights: Path) -> list[list[str]]:
    """The words of each command of the section, on these folders."""
    block = re.search(rf"^{SECTION}$.*?^```\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[1]
    folders = {"photos": photos, "runs/paper": out}
    lines = []
    for line in block.splitlines():
        _, script, *words = shlex.split(line)
        for name, folder in folders.items():
            words = [re.sub(rf"^{name}(?=/|$)", lambda _, folder=folder: str(folder), word) for word in words]
        words += ["--weights", str(weights)] if script == "metrics.py" else []
        lines.append([script, *words])
    return lines


def figures(name: str, report: dict, columns: dict[str, str]) -> str:
    """A row of a table: each figure and, below a slash, its 95 % interval."""
    cells = [name]
    for key in columns.values():
        low, high = report.get("intervals", {}).get(key) or (None, None)
        interval = f" [{low:.4g}, {high:.4g}]" if low is not None and high is not None else ""
        cells.append("–" if report.get(key) is None else f"{report[key]:.4g}{interval}")
    return f"| {' | '.join(cells)} |"


def heading(title: str, columns: dict[str, str]) -> str:
    return f"\n{title}\n\n| | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}"


def shown(words: list[str], printed: str, seen: set[str]) -> list[str]:
    """What to print of a command's output; `seen` are the headings that have been printed."""
    script, command = words[0], words[1] if len(words) > 1 else ""
    if (script, command) == ("data.py", "stats"):
        return ["\nTable 9", "", printed.strip()]
    if script == "sample.py":
        return [f"table 5, {Path(words[-1]).name}: {printed.strip().splitlines()[-1]}"]
    if script != "metrics.py" or command not in ("vae", "set", "compare"):
        return []
    report = json.loads(printed)
    if command == "compare":
        return [f"\nTables 7 and 8, b - a: {words[2]} and {words[3]}", "",
                *(f"{row['metric']}: {row['b_minus_a']:.4g} [{row['low']:.4g}, {row['high']:.4g}], b better in "
                  f"{row['b_wins']} of {row['of']}" for row in report["metrics"])]
    title, columns = ("Table 2", VAE) if command == "vae" else ("Tables 3, 4, 6, 7 and 8", SET)
    name = "factor 16" if command == "vae" else Path(words[2]).name
    row = figures(name, report | report.get("mean", {}), columns)
    first = [] if title in seen else [heading(title, columns)]
    seen.add(title)
    return [*first, row]


def apart(a: Path, b: Path, base: Path) -> float:
    """How far the weights of two runs are from each other, over how far the first is from its start (L2)."""
    first, second, start = ({name: tensor.read().double() for name, tensor in open_weights(path).items()}
                            for path in (a, b, base))
    between, moved = (sum(float((first[name] - other[name]).square().sum()) for name in first if name in start)
                      for other in (second, start))
    return (between / moved) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--photos", type=Path, default=Path("photos"), help="fetched if absent (default: photos)")
    parser.add_argument("--out", type=Path, default=Path("runs/paper"), help="default: runs/paper")
    parser.add_argument("--weights", type=Path, default=Path("weights"), help="networks of the metrics")
    args = parser.parse_args()
    photos, out, weights = (path.resolve() for path in (args.photos, args.out, args.weights))
    seen: set[str] = set()
    for words in commands((ROOT / "docs" / "paper.md").read_text(), photos, out, weights):
        if "fetch_photos" in words[0] and photos.is_dir():
            continue
        print(f"$ python {shlex.join(words)}", file=sys.stderr, flush=True)
        command = [sys.executable, ROOT / words[0], *words[1:]]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"error: {words[0]} ended with {done.returncode}")
        for line in shown(words, done.stdout, seen):
            print(line, flush=True)
    runs = [out / name / "sd3.safetensors" for name in ("wlf", "finetune")]
    share = apart(*runs, ROOT / "models" / "tiny-sd3" / "base_256.safetensors")
    print(f"\nweights of wlf and finetune: {share:.2g} of what training changed lies between them")


if __name__ == "__main__":
    main()
