"""The README's figure: a photograph, the same blurred and sharpened, with heat maps and scores of metrics.py beside them.

Writes  OUT: three sheets of `metrics.detail_sheet`, one above the other
Run     python tests/detail_figure.py --out examples/detail.jpg
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import read_picture  # noqa: E402
from metrics import detail_sheet  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--picture", default="examples/dandelion_meadow.jpg")
    parser.add_argument("--out", default="out/detail.jpg")
    args = parser.parse_args()
    picture = read_picture(args.picture)
    versions = {
        "as it is": picture,
        "blurred, sigma 2 px": picture.filter(ImageFilter.GaussianBlur(2)),
        "sharpened, 2 px, 150 %": picture.filter(ImageFilter.UnsharpMask(2, 150, 0)),
    }
    sheets = [np.asarray(detail_sheet(np.asarray(version), title)) for title, version in versions.items()]
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(sheets)).save(args.out, quality=82)


if __name__ == "__main__":
    main()
