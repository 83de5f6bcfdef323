"""Results per picture, stored in a folder: the same command resumes where it stopped.

Key   what was computed, and path, size and time of change of the files it depends on
"""

import hashlib
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

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

    def get(self, key: tuple, compute: Callable[[], dict]) -> dict[str, np.ndarray]:
        """The arrays stored under this key, computed if they are absent or damaged."""
        file = self.folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.npz"
        if file.is_file():
            try:
                with np.load(file, allow_pickle=False) as arrays:
                    return dict(arrays)
            except DAMAGED as error:
                print(f"{file}: damaged ({type(error).__name__}), computed again", file=sys.stderr)
        arrays = {name: np.asarray(value) for name, value in compute().items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            np.savez(file, **arrays)
        except OSError as error:
            raise OSError(f"{self.folder}: results can't be stored there ({error.strerror or error}); "
                          "name another folder with --cache") from None
        return arrays

    def of_picture(self, key: tuple, path: Path, measure: Callable[[np.ndarray], dict]) -> dict[str, np.ndarray]:
        """The stored or computed measure(pixels) of a picture; a ValueError names it."""
        def compute() -> dict:
            pixels = self.read(path)
            try:
                return measure(pixels)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        return self.get((*key, identity(path)), compute)
