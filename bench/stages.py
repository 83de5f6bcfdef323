"""What drawing in two stages costs and gives, by the noise level at which the second begins.

Draws   captions of the embedded models by sample.py at 2048 px: at once, then from 1024 px with every --start
Prints  time over that of drawing at once, loading included; how many pictures have their caption's photograph as the
        nearest, by 16 x 16 area averages; Laplacian over the photograph's, both scaled to 1024 px, median
Run     python bench/stages.py --data photos --out runs/stages
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bench.detail_gained import laplacian, resized  # noqa: E402
from bench.prompt_following import thumbnail  # noqa: E402
from data import Item, Pictures, read_folder  # noqa: E402
from scores.folder import read_pixels  # noqa: E402
from vae import to_image  # noqa: E402

RES, FIRST = 2048, 1024
STARTS = ("0.95", "0.8", "0.6", "0.4")


def scores(pictures: Sequence[Path], chosen: Sequence[int], photographs: Pictures) -> tuple[int, float]:
    """Pictures that are nearest to the photographs `chosen`; median ratio of their Laplacians."""
    side, right, ratios = FIRST // 4, 0, []
    known = torch.cat([thumbnail(to_image(photographs.central_crop(i, side, side))[None])
                       for i in range(len(photographs))])
    for path, index in zip(pictures, chosen, strict=True):
        pixels = read_pixels(path)
        right += int((known - thumbnail(to_image(pixels)[None])).square().mean(1).argmin()) == index
        ratios.append(laplacian(resized(pixels, FIRST)) / laplacian(photographs.central_crop(index, FIRST, FIRST)))
    return right, statistics.median(ratios)


def drawn(name: str, model: str, items: Sequence[Item], chosen: Sequence[int], out: Path,
          flags: Sequence[str]) -> tuple[float, int, float]:
    """Seconds and scores of one setting."""
    out.mkdir(parents=True, exist_ok=True)
    listing, folder = out / "prompts.jsonl", out / f"{model}-{name}"
    listing.write_text("".join(json.dumps({"file_name": f"{i}.png", "text": items[i].captions[0]}) + "\n"
                               for i in chosen))
    began = time.perf_counter()
    subprocess.run([sys.executable, ROOT / "sample.py", "--model", model, "--prompts", listing, "--res", str(RES),
                    "--out", folder, *flags], check=True, stdout=subprocess.DEVNULL)  # its error stands above
    seconds = time.perf_counter() - began
    return seconds, *scores([folder / f"{i}.png" for i in chosen], chosen, Pictures([item.path for item in items]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Two stages beside drawing at once.", allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", required=True, help="the photographs of the embedded models")
    parser.add_argument("--captions", type=int, default=4, help="how many, evenly spread")
    parser.add_argument("--out", default="runs/stages", type=Path, help="of pictures; give a new folder: what is there "
                        "is not drawn again, and its time is wrong")
    args = parser.parse_args()
    items = read_folder(args.data)
    chosen = range(0, len(items), max(1, len(items) // args.captions))[:args.captions]
    for model in ("tiny-sd3", "tiny-flux"):
        print(f"{model}, {len(chosen)} captions, {RES} px\n\n| | time | nearest | Laplacian |\n|---|---|---|---|")
        once, right, detail = drawn("once", model, items, chosen, args.out, ["--first", "none"])
        print(f"| at once | 1 | {right} | {detail:.2f} |", flush=True)
        for start in STARTS:
            seconds, right, detail = drawn(start, model, items, chosen, args.out, ["--start", start])
            print(f"| --start {start} | {seconds / once:.2f} | {right} | {detail:.2f} |", flush=True)


if __name__ == "__main__":
    main()
