"""Results per picture, stored in a folder: the same command resumes where it stopped.

Key   what was computed, and path, size and time of change of the files it depends on
"""

import hashlib
import sys
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

DAMAGED = (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile)  # what NumPy raises on such an .npz


def identity(path: Path) -> tuple:
    """Path, size and time of change of a file; of a folder, those of its files."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return tuple((str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files)


@dataclass(frozen=True)
class Results:
    """The folder, made when the first result is stored, and how pictures are read: path -> (H, W, 3) uint8."""

    folder: Path
    read: Callable[[Path], np.ndarray]

    def get(self, key: tuple, compute: Callable[[], dict]) -> dict:
        """The numbers and arrays stored under this key, computed if they are absent or damaged."""
        file, arrays = self.folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.npz", None
        if file.is_file():
            try:
                with np.load(file, allow_pickle=False) as stored:
                    arrays = dict(stored)
            except DAMAGED as error:
                print(f"{file}: damaged ({type(error).__name__}), computed again", file=sys.stderr)
        if arrays is None:
            arrays = {name: np.asarray(value) for name, value in compute().items()}
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                np.savez(file, **arrays)
            except OSError as error:
                raise OSError(f"{self.folder}: results can't be stored there ({error.strerror or error}); "
                              "name another folder with --cache") from None
        return {name: array if array.ndim else array.item() for name, array in arrays.items()}

    def of_picture(self, key: tuple, path: Path, measure: Callable[[np.ndarray], dict]) -> dict:
        """The stored or computed measure(pixels) of a picture; a ValueError names it."""
        def compute() -> dict:
            pixels = self.read(path)
            try:
                return measure(pixels)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        return self.get((*key, identity(path)), compute)


def each(function: Callable[[Path], dict], paths: Sequence[Path], what: str, errors: list[str],
         processes: int = 1) -> dict[Path, dict]:
    """function(path) of each path, in order, under a progress bar; `errors` gets the ValueErrors of the others."""
    bar = partial(tqdm, total=len(paths), desc=what, file=sys.stderr, disable=len(paths) < 2)
    if processes == 1:
        outcomes = list(bar(map(partial(_attempt, function), paths)))
    else:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            outcomes = list(bar(pool.map(partial(_attempt, function), paths)))
    errors += [outcome for outcome in outcomes if isinstance(outcome, str)]
    return {path: outcome for path, outcome in zip(paths, outcomes, strict=True) if not isinstance(outcome, str)}


def _attempt(function: Callable[[Path], dict], path: Path) -> dict | str:
    try:
        return function(path)
    except ValueError as error:
        return str(error)
