"""The pictures of files and folders, and their pixels.

Names    of pictures by suffix; what is left out is named on stderr. Hidden files are none: systems and killed
         processes leave them
Pairs    two folders hold the same prompts under the same names, whatever the suffix
"""

import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from files import printable
from reading.pictures import FORMATS, own_prompt, read_picture, suffixes

BESIDE = (".jsonl", ".json", ".csv", ".txt")  # listings and captions, which stand beside pictures


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
    """The pictures of a folder by suffix."""
    shown = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    others = [path for path in shown if not path.is_dir() and path.suffix.lower() not in suffixes()]
    pictures = [path for path in shown if not path.is_dir() and path.suffix.lower() in suffixes()]
    if not pictures:
        folders = ", ".join([path.name for path in shown if path.is_dir()][:4])
        has = f"; it has {len(others)} other files" if others else ""
        has += f"; it has the folders {folders}" if folders else ""
        raise ValueError(f"{folder}: no picture in this folder ({', '.join(FORMATS)}){has}")
    if folders := [path.name for path in shown if path.is_dir() and _has_pictures(path)]:
        print(printable(f"note: {folder}: pictures of folders in it are left out ({', '.join(folders[:4])}); "
                        "name these folders"), file=sys.stderr)
    if skipped := [path for path in others if path.suffix.lower() not in BESIDE]:
        kinds = Counter(path.suffix or "no suffix" for path in skipped)
        kinds = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common(8))
        note = f"note: {folder}: {len(skipped)} files are no pictures by name and left out ({kinds}): {skipped[0].name}"
        print(printable(note + (", …" if len(skipped) > 1 else "")), file=sys.stderr)
    return pictures


def _has_pictures(folder: Path) -> bool:
    """Whether a folder has a picture by suffix; False if it cannot be read."""
    try:
        with os.scandir(folder) as files:
            return any(Path(file.name).suffix.lower() in suffixes() for file in files)
    except OSError:
        return False


def read_pixels(path: str | os.PathLike) -> np.ndarray:
    """(H, W, 3) uint8, upright sRGB."""
    picture = read_picture(path)
    if picture.info.get("frames"):
        print(printable(f"note: {path}: an animation, of which the first frame is scored"), file=sys.stderr)
    return np.array(picture)


def pair_names(a: Path, b: Path, notes: list[str]) -> dict[Path, Path]:
    """Picture of folder `a` -> the one of the same name in `b`; `notes` gets those without a partner.

    raises  ValueError if no name is in both, one is twice in a folder, or a pair records two prompts
    """
    sides = []
    for folder in (a, b):
        names: dict[str, Path] = {}
        for path in find_pictures([folder]):
            name = unicodedata.normalize("NFC", path.stem)  # some systems write names in NFD
            if (other := names.setdefault(name, path)) is not path:
                raise ValueError(f"{other} and {path}: the same name but for the suffix; leave one of them out")
        sides.append(names)
    both = sides[0].keys() & sides[1].keys()
    if not both:
        first, second = (next(iter(names.values())).name for names in sides)
        raise ValueError(f"{a} and {b}: no picture has the same name in both, as {first} and {second}; "
                         "draw the same prompts with the same --seed, or rename them")
    for folder, names in zip((a, b), sides, strict=True):
        if alone := [path.name for name, path in names.items() if name not in both]:
            notes.append(f"note: {folder}: {len(alone)} pictures without a partner are left out: {alone[0]}"
                         + (", …" if len(alone) > 1 else ""))
    pairs = {path: sides[1][name] for name, path in sides[0].items() if name in both}
    for pair in pairs.items():
        first, second = map(own_prompt, pair)
        if first and second and first != second:
            raise ValueError(f"{pair[0]} and {pair[1]}: the same name, but not of one prompt: {first[:60]!r}, "
                             f"{second[:60]!r}")
    return pairs
