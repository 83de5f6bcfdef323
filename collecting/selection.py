"""Which pictures to train on: numbers about each, limits of these numbers, near-duplicates.

Numbers   on gray levels 0 to 255 at full size, over patches of PATCH pixels; a border that fills no patch is left out
          short      pixels of the short side
          entropy    bits of the histogram of gray levels, 0 to 8
          sharpness  variance of the Laplacian in the sharpest patch: a background may be blurred
          glcm       bits, mean entropy of the co-occurrence matrices: scores/glcm.py, "entropy"
          flat       share of patches in which the magnitude of the Sobel gradient has a variance below FLAT
          hash       64 signs of the lowest frequencies of the picture at 32 x 32 pixels, against their median
Limits    short: the paper's of Aesthetic-Eval; flat, FLAT, entropy, PATCH: UltraFlux's; the others are our own
Check     python -m pytest tests/test_selection.py
"""

import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from collecting.listings import Item
from files import replacing

LEAST = {"short": 2048.0, "entropy": 7.0, "sharpness": 10.0, "glcm": 2.0}
MOST = {"flat": 0.5}
DISTANCE = 6         # bits in which the hashes of near-duplicates differ, at most
PATCH, FLAT = 240, 800.0
SMALLEST = 64        # px of the short side: smaller pictures have no other numbers, and no --short admits them
THUMBNAIL_PX = 160
_TURNS = (np.arange(8)[:, None] * (2 * np.arange(32) + 1)) * (np.pi / 64)


def measure(pixels: np.ndarray, glcm: Callable[[np.ndarray], float]) -> dict:
    """The numbers of a picture, its hash, and a thumbnail, the bytes of a JPEG.

    pixels  (H, W, 3), uint8
    glcm    pixels -> bits
    """
    height, width = pixels.shape[:2]
    picture = Image.fromarray(pixels)
    packed, scale = io.BytesIO(), THUMBNAIL_PX / max(height, width)
    picture.resize((max(1, round(width * scale)), max(1, round(height * scale)))).save(packed, "JPEG", quality=75)
    row = {"width": width, "height": height, "short": min(height, width), "hash": perceptual_hash(picture),
           "thumbnail": np.frombuffer(packed.getvalue(), np.uint8)}
    if min(height, width) < SMALLEST:
        return row | dict.fromkeys(("entropy", "sharpness", "glcm", "flat"), math.nan)
    gray = np.asarray(picture.convert("L"))
    gradients, laplacians = patch_variances(gray)
    share = np.bincount(gray.ravel(), minlength=256) / gray.size
    share = share[share > 0]
    return row | {"entropy": float(-(share * np.log2(share)).sum()), "sharpness": float(laplacians.max()),
                  "glcm": float(glcm(pixels)), "flat": float((gradients < FLAT).mean())}


def perceptual_hash(picture: Image.Image) -> int:
    """64 bits that change little when a picture is scaled, compressed or brightened; not when it is mirrored or cut."""
    gray = np.asarray(picture.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=np.float64)
    lowest = np.cos(_TURNS) @ gray @ np.cos(_TURNS).T  # (8, 8): of the discrete cosine transform, but for its scale
    return int.from_bytes(np.packbits(lowest > np.median(lowest)).tobytes())


def patch_variances(gray: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each patch, the variances of the Sobel gradient's magnitude and of the Laplacian; gray: (H, W), uint8."""
    side, gradients, laplacians = min(PATCH, *(length - 2 for length in gray.shape)), [], []
    for top in range(0, gray.shape[0] - side - 1, side):  # a row of patches at once: memory does not grow with height
        band = gray[top:top + side + 2].astype(np.float32)
        across, down = band[:, 2:] - band[:, :-2], band[2:] - band[:-2]
        gradient = np.hypot(across[:-2] + 2 * across[1:-1] + across[2:], down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:])
        middle = band[1:-1]
        laplacian = band[:-2, 1:-1] + band[2:, 1:-1] + middle[:, :-2] + middle[:, 2:] - 4 * middle[:, 1:-1]
        for values, variances in ((gradient, gradients), (laplacian, laplacians)):
            patches = values[:, :values.shape[1] // side * side].reshape(side, -1, side)
            variances.append(patches.var(axis=(0, 2), dtype=np.float64))
    return np.concatenate(gradients), np.concatenate(laplacians)


def verdicts(numbers: Mapping[str, Mapping], limits: Mapping[str, float], distance: int) -> list[dict]:
    """The numbers as rows with "file_name", "reasons" to leave the picture out and, for one of them, "duplicate_of".

    numbers   file_name -> what `measure` returned, and "captioned"
    limits    of the names in LEAST and MOST
    distance  bits in which the hashes of near-duplicates differ, at most; of those, the largest is kept
    """
    rows = [{"file_name": name, **row, "reasons": reasons(row, limits)} for name, row in numbers.items()]
    left = [row for row in rows if not row["reasons"]]
    for index, larger in duplicates(left, distance).items():
        left[index] |= {"reasons": ["duplicate"], "duplicate_of": left[larger]["file_name"]}
    return rows


def reasons(row: Mapping, limits: Mapping[str, float]) -> list[str]:
    """The limits that a picture does not keep, and "caption" if it has none."""
    return (["caption"] * (not row["captioned"]) + [name for name in LEAST if row[name] < limits[name]] +
            [name for name in MOST if row[name] > limits[name]])


def duplicates(rows: Sequence[Mapping], distance: int) -> dict[int, int]:
    """index -> index of the kept picture that it is a near-duplicate of: the larger, or else the earlier one."""
    hashes = np.array([row["hash"] for row in rows], dtype=np.uint64)
    kept, found = np.zeros(0, dtype=np.int64), {}
    for index in sorted(range(len(rows)), key=lambda k: -rows[k]["width"] * rows[k]["height"]):
        near = kept[np.bitwise_count(hashes[kept] ^ hashes[index]) <= distance]
        if len(near):
            found[index] = int(near[0])
        else:
            kept = np.append(kept, index)
    return found


def write_selection(out: Path, items: Mapping[str, Item], rows: Sequence[Mapping]) -> int:
    """Write links to the pictures without reasons, their metadata.jsonl, and all rows; returns how many are kept.

    raises  ValueError, before anything is changed, that names a file of others where a link is to be
    """
    kept = {row["file_name"]: items[row["file_name"]] for row in rows if not row["reasons"]}
    for name in kept:
        if (out / name).exists() and not (out / name).is_symlink():
            raise ValueError(f"{out / name}: a file, where a link of this selection is to be; move it, or give another "
                             "--out")
    numbers = ({name: None if value != value else value for name, value in row.items() if name != "thumbnail"}
               | {"hash": f"{row['hash']:016x}"} for row in rows)  # JSON has no NaN
    _write_lines(out / "select.jsonl", numbers)  # first: it marks the folder as one that may be written again
    for link in [path for path in out.rglob("*") if path.is_symlink()]:  # of an earlier selection; caches are hidden
        if not any(part.startswith(".") for part in link.relative_to(out).parts):
            link.unlink()
    for name, item in kept.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).symlink_to(item.path.resolve())
    listed = ({"file_name": name, "text": item.captions[0]} | ({"alt": item.captions[1:]} if item.captions[1:] else {})
              for name, item in kept.items())
    _write_lines(out / "metadata.jsonl", listed)
    return len(kept)


def _write_lines(file: Path, rows: Iterable[Mapping]) -> None:
    with replacing(file) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
