"""Results per picture, stored in a folder: the same command resumes where it stopped.

Key      what was computed, and path, size and times of change of the files it depends on
File     an .npz with a SHA-256 over its key and its arrays: a damaged or foreign file is computed again
Workers  end with the command, however it ends; Ctrl-C reaches the command alone
"""

import hashlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from files import plain_warnings, printable, replacing, writable

VERSION = 2  # of the file; others are not found


def results_folder(cache: Path | None) -> Path:
    """The folder that --cache names, or ~/.cache/diffusion-4k, once it can be written."""
    try:
        folder = cache or Path.home() / ".cache" / "diffusion-4k"
    except RuntimeError:  # a user without a name and without HOME
        raise ValueError("no home folder for the results; name a folder with --cache") from None
    writable(folder, "--cache")
    return folder


def identity(path: Path) -> tuple:
    """Path, size and times of change of a file, also the one that no program sets; of a folder, those of its files."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return tuple((str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
                 for file in files for stat in [file.stat()])


@dataclass(frozen=True)
class Results:
    """The folder, made when the first result is stored, and how pictures are read: path -> (H, W, 3) uint8."""

    folder: Path
    read: Callable[[Path], np.ndarray]

    def get(self, key: tuple, compute: Callable[[], dict]) -> dict:
        """The numbers and arrays stored under this key, computed if they are absent or damaged."""
        file = self.folder / f"{hashlib.sha256(repr((VERSION, key)).encode()).hexdigest()[:32]}.npz"
        arrays = _stored(file, key) if file.is_file() else None
        if arrays is None:
            arrays = {name: np.asarray(value) for name, value in compute().items()}
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with replacing(file) as temporary:
                    np.savez(temporary, **arrays, sha256=_sha256(key, arrays))
            except OSError as error:
                raise OSError(f"{self.folder}: results can't be stored there ({error.strerror or error}); "
                              "name another folder with --cache") from None
        return {name: array if array.ndim else array.item() for name, array in arrays.items()}

    def of_picture(self, key: tuple, path: Path, measure: Callable[[np.ndarray], dict]) -> dict:
        """The stored or computed measure(pixels) of a picture; a ValueError names it."""
        def compute() -> dict:
            pixels = _named(path, partial(self.read, path))
            try:
                return measure(pixels)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        return self.get((*key, _named(path, partial(identity, path))), compute)


def _named(path: Path, look: Callable[[], object]) -> object:
    """look(), with an OSError, as of a picture that is gone or may not be read, as a ValueError that names it."""
    try:
        return look()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None


def _stored(file: Path, key: tuple) -> dict[str, np.ndarray] | None:
    """The arrays of a file written under this key; None and a line on stderr if it holds anything else."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            arrays = dict(stored)
        if arrays.pop("sha256") == _sha256(key, arrays):
            return arrays
        why = "other content"
    except Exception as error:  # NumPy raises a dozen classes on foreign bytes
        why = type(error).__name__
    print(printable(f"{file}: damaged ({why}), computed again"), file=sys.stderr)
    return None


def _sha256(key: tuple, arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(repr(key).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()


# ---- all pictures, in processes

def each(function: Callable[[Path], dict], paths: Sequence[Path], what: str, errors: list[str],
         processes: int = 1) -> dict[Path, dict]:
    """function(path) of each path, in order, under a progress bar; `errors` gets the ValueErrors of the others."""
    bar = partial(tqdm, total=len(paths), desc=printable(what), file=sys.stderr, disable=len(paths) < 2)
    attempt = partial(_attempt, function)
    if processes == 1:
        outcomes = list(bar(map(attempt, paths)))
    else:
        outcomes = _in_processes(attempt, paths, processes, bar)
    errors += [outcome for outcome in outcomes if isinstance(outcome, str)]
    return {path: outcome for path, outcome in zip(paths, outcomes, strict=True) if not isinstance(outcome, str)}


def _in_processes(function: Callable, paths: Sequence[Path], processes: int, bar: Callable) -> list:
    """function(path) of each path, in order; on an error or Ctrl-C no process is left and nothing is waited for."""
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=spawn, initializer=_follow_parent)
    try:
        with _interrupts_held():  # the processes start within, and inherit it
            futures = [pool.submit(function, path) for path in paths]
        with bar(futures) as shown:
            return [future.result() for future in shown]
    except BrokenProcessPool:
        raise OSError("a worker process died, probably out of memory; give fewer --workers") from None
    finally:
        for process in multiprocessing.active_children():
            process.kill()
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C waits until the end of the block. Not on Windows, which has no such mask."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _follow_parent() -> None:
    """In a worker: end when the command has ended, even if it was killed."""
    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)
    plain_warnings()
    threading.Thread(target=wait, daemon=True).start()


def _attempt(function: Callable[[Path], dict], path: Path) -> dict | str:
    try:
        return function(path)
    except ValueError as error:
        return str(error)
