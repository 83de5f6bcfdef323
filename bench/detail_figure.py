"""The figure of the README: a photograph, the same blurred and sharpened, with the heat maps and scores of metrics.py.

Writes  OUT: three sheets of metrics.detail_sheet, one above the other; seconds
Run     python bench/detail_figure.py --out examples/detail.jpg
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from reading.pictures import read_picture  # noqa: E402
from scores.sheet import detail_sheet  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description="The figure of the README.", allow_abbrev=False)
    parser.add_argument("--picture", metavar="FILE", default=ROOT / "examples" / "dandelion_meadow.jpg",
                        help="(default: %(default)s)")
    parser.add_argument("--out", metavar="FILE", type=Path, default="out/detail.jpg", help="(default: %(default)s)")
    args = parser.parse_args()
    picture = read_picture(args.picture)
    versions = {"as it is": picture, "blurred, sigma 2 px": picture.filter(ImageFilter.GaussianBlur(2)),
                "sharpened, 2 px, 150 %": picture.filter(ImageFilter.UnsharpMask(2, 150, 0))}
    sheets = [np.asarray(detail_sheet(np.asarray(version), title)) for title, version in versions.items()]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(sheets)).save(args.out, quality=82)


if __name__ == "__main__":
    main()
