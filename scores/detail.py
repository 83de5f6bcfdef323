"""The detail of pictures: GLCM Scores, compression ratio, grid scores, and their sheets of heat maps. No torch."""

import os
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from files import replacing, writable
from scores.folder import read_pixels
from scores.glcm import DEFINITIONS, cores, glcm_score
from scores.grid import grid_scores, spread_of
from scores.intervals import bootstrap_rows
from scores.jpeg import jpeg_size
from scores.results import Results, each
from scores.sheet import detail_sheet

GLCM = [f"glcm_{name}" for name in DEFINITIONS]
MOST_NAME = 230  # bytes; file systems end at 255, and a file that is being written has a longer name


def detail_of(path: Path, results: Results, maps: Path | None, threads: int) -> dict:
    """The row of a picture; a sheet of heat maps is written into `maps`."""
    def measure(pixels: np.ndarray) -> dict:
        jpeg_bytes = jpeg_size(pixels)
        return {"width": pixels.shape[1], "height": pixels.shape[0],
                **{f"glcm_{name}": glcm_score(pixels, name, threads=threads) for name in DEFINITIONS},
                **grid_scores(pixels),
                "jpeg_bytes": jpeg_bytes, "raw_bytes": pixels.nbytes, "ratio": pixels.nbytes / jpeg_bytes}

    row = {"picture": str(path)} | results.of_picture(("detail", 3), path, measure)
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
    means = {name: float(np.mean([row[name] for row in rows])) for name in GLCM}
    sums = {name: sum(row[name] for row in rows) for name in ("raw_bytes", "jpeg_bytes")}
    grid = {name: median for name, (median, _) in spread_of(rows).items()}
    return means | sums | {"ratio": sums["raw_bytes"] / sums["jpeg_bytes"]} | grid


def ratio_of_sums(sizes: np.ndarray) -> float:
    """The compression ratio of a set; (N, 2) raw and JPEG bytes."""
    return sizes[:, 0].sum() / sizes[:, 1].sum()


def intervals_of(rows: Collection[dict]) -> dict[str, tuple[float, float]]:
    """The 95 % bootstrap intervals of `mean_of`."""
    found = {name: bootstrap_rows(np.mean, [row[name] for row in rows]) for name in GLCM}
    found["ratio"] = bootstrap_rows(ratio_of_sums, [(row["raw_bytes"], row["jpeg_bytes"]) for row in rows])
    for name in spread_of(rows):
        found[name] = bootstrap_rows(np.median, [row[name] for row in rows if name in row])
    return found


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
