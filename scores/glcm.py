"""GLCM Score: how varied the texture of a picture is, by gray level co-occurrence matrices of its patches.

Paper     Diffusion-4K section 3.1: patches of 64 pixels, 64 gray levels, radii 1 to 4, angles 0°, 45°, 90°, 135°
Mirrors   the released eval.py: OpenCV's gray, skimage's graycomatrix (not symmetric, normalised), graycoprops and
          shannon_entropy; held by tests/test_metrics.py
Scores    release  0 to 16 bits, higher is better: entropy of the histogram of the distinct values in all 16 matrices of a patch,
                   mean over patches. This is what the release computes and the paper's tables print
          entropy  0 to 12 bits, higher is better: mean of -Σ p log2 p over matrices and patches. This is the paper's formula but
                   for its minus sign, with which higher could not be better
Shapes    H and W pixels, R and C patch rows and columns; a border that fills no patch is left out
Check     python -m pytest tests/test_metrics.py -k glcm ; python bench.py glcm

No matrix is made. A pair of levels is one 16-bit code; sorted, equal codes are neighbours, and the lengths of their runs are the
entries that are not zero. Both scores, energy and ASM depend on nothing else.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np

DEFINITIONS = ("release", "entropy")
PROPERTIES = ("contrast", "dissimilarity", "homogeneity", "energy", "correlation", "ASM")
PATCH, LEVELS, RADII = 64, 64, (1, 2, 3, 4)
RARE = 1 / 64  # values below it are counted in a table; at most 64 entries of a matrix lie above


def gray_levels(pixels: np.ndarray, levels: int = 256) -> np.ndarray:
    """(H, W, 3) or gray (H, W) uint8 to gray levels 0 … levels-1, (H, W) uint16. The gray is OpenCV's fixed point."""
    if pixels.ndim == 3:  # every sum is a whole number below 2^24, which float32 holds
        pixels = ((pixels.astype(np.float32) @ np.float32([9798, 19235, 3735]) + 16384) * np.float32(2**-15)).astype(np.uint8)
    return pixels.astype(np.uint16) * np.uint16(levels) >> 8


def _offsets(radii: Sequence[int]) -> Counter:
    """(down, across) -> how many of the radii and angles 0°, 45°, 90°, 135° mean it: on diagonals 1 and 2 round to the same."""
    angles = [k * np.pi / 4 for k in range(4)]
    return Counter((round(radius * np.sin(angle)), round(radius * np.cos(angle))) for radius in radii for angle in angles)


def _check_glcm(pixels: np.ndarray, patch: int, levels: int, radii: Sequence[int]) -> None:
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or pixels.ndim == 3 and pixels.shape[2] == 3):
        raise ValueError(f"GLCM needs uint8 pixels, (H, W, 3) or gray (H, W), got {pixels.dtype} {pixels.shape}")
    if not 2 <= levels <= 256:
        raise ValueError(f"levels: 2 to 256, got {levels}")
    if not radii or any(radius != int(radius) or not 1 <= radius < patch for radius in radii):
        raise ValueError(f"radii: whole numbers from 1 to {patch - 1}, below the patch, got {tuple(radii)}")
    if min(pixels.shape[:2]) < patch:
        raise ValueError(f"{pixels.shape[1]}x{pixels.shape[0]} pixels: smaller than one patch of {patch}x{patch}")


def _by_band(function: Callable[[np.ndarray], np.ndarray], pixels: np.ndarray, patch: int, levels: int, threads: int | None) -> np.ndarray:
    """Call with the gray levels of each row of whole patches, (C, patch, patch) uint16; NumPy lets threads run side by side."""
    columns = pixels.shape[1] // patch

    def of_band(top: int) -> np.ndarray:
        band = gray_levels(pixels[top : top + patch, : columns * patch], levels)
        return function(np.ascontiguousarray(band.reshape(patch, columns, patch).transpose(1, 0, 2)))

    if threads is None:
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    tops = range(0, pixels.shape[0] - patch + 1, patch)
    if threads == 1 or len(tops) == 1:
        return np.stack([of_band(top) for top in tops])
    with ThreadPoolExecutor(threads) as pool:
        return np.stack(list(pool.map(of_band, tops)))


def _pairs(a: np.ndarray, down: int, across: int) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of pixels of each patch at an offset; across may be negative."""
    height, width = a.shape[1:]
    left, right = max(0, -across), max(0, across)
    return a[:, : height - down, left : width - right], a[:, down:, right : width - left]


@lru_cache(1)
def _sort_kind() -> str:
    """The faster sort of 16-bit integers here: NumPy's default where the processor has instructions for it, else radix."""
    codes = np.random.default_rng(0).integers(0, 4096, (8, 4032), dtype=np.uint16)
    def seconds(kind: str) -> float:
        began = time.perf_counter()
        np.sort(codes, axis=1, kind=kind)
        return time.perf_counter() - began
    return min(("quicksort", "stable"), key=lambda kind: min(seconds(kind) for _ in range(3)))


def _counts(a: np.ndarray, down: int, across: int, levels: int) -> tuple[np.ndarray, np.ndarray, int]:
    """The entries of the matrix that are not zero, patch after patch, without ever making the matrix.

    returns  counts, (M,); how many entries each patch has, (C,); the pairs of a patch
    """
    first, second = _pairs(a, down, across)
    total = first[0].size
    codes = (first * np.uint16(levels) + second).reshape(len(a), total)
    codes.sort(axis=1, kind=_sort_kind())
    new = np.empty(codes.shape, dtype=bool)
    new[:, 0] = True
    np.not_equal(codes[:, 1:], codes[:, :-1], out=new[:, 1:])
    starts = np.flatnonzero(new)
    return np.diff(starts, append=new.size), np.diff(np.searchsorted(starts, np.arange(len(a) + 1) * total)), total


@lru_cache(8)
def _value_ids(totals: tuple[int, ...]) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """All values count / total in order, and for each total the place of count / total among them.

    Equal floats share a place: the release's histogram tells values apart by them.
    """
    values, places = np.unique(np.concatenate([np.arange(total + 1) / total for total in totals]), return_inverse=True)
    return values, dict(zip(totals, np.split(places, np.cumsum([total + 1 for total in totals])[:-1]), strict=True))


def _release_entropy(a: np.ndarray, levels: int, radii: Sequence[int]) -> np.ndarray:
    """(C,) bits: entropy of how often each value occurs in all matrices of a patch, the zeros among them."""
    offsets, patches = _offsets(radii), len(a)
    values, places = _value_ids(tuple(sorted({_pairs(a, *offset)[0][0].size for offset in offsets})))
    few = int(np.searchsorted(values, RARE))  # places below it are counted in a table, the others by sorting
    firsts = np.arange(patches) * few
    table, large = np.zeros((patches, few), dtype=np.int64), []
    for offset, times in offsets.items():
        counts, entries, total = _counts(a, *offset, levels)
        place = places[total]
        cut = int(np.searchsorted(place, few))  # the first count that is not rare
        rare = np.append(place[:cut], np.zeros(len(place) - cut, dtype=place.dtype))
        found = np.bincount(rare[counts] + np.repeat(firsts, entries), minlength=table.size).reshape(table.shape)
        found[:, 0] = levels**2 - entries  # place 0 is the value 0
        table += times * found
        often = np.flatnonzero(counts >= cut)
        owner = np.searchsorted(np.cumsum(entries), often, side="right")
        large += [owner * len(values) + place[counts[often]]] * times
    kinds, number = np.unique(np.concatenate(large), return_counts=True)
    bits = (table * np.log2(np.maximum(table, 1))).sum(1)
    bits += np.bincount(kinds // len(values), weights=number * np.log2(number), minlength=patches)
    size = levels**2 * 4 * len(radii)
    return np.log2(size) - bits / size


def _matrix_entropy(a: np.ndarray, levels: int, radii: Sequence[int]) -> np.ndarray:
    """(C,) bits: mean of -Σ p log2 p over the matrices."""
    bits = np.zeros(len(a))
    for offset, times in _offsets(radii).items():
        counts, entries, total = _counts(a, *offset, levels)
        p = np.arange(1, total + 1) / total
        terms = (-p * np.log2(p))[counts - 1]
        bits += times * np.add.reduceat(terms, np.cumsum(entries) - entries)
    return bits / (4 * len(radii))


def glcm_map(pixels: np.ndarray, definition: str = "release", patch: int = PATCH, levels: int = LEVELS,
             radii: Sequence[int] = RADII, threads: int | None = None) -> np.ndarray:
    """GLCM Score of every whole patch.

    pixels      (H, W, 3) or gray (H, W), uint8, at least one patch
    definition  "release" or "entropy", see Metrics above
    patch       side in pixels
    levels      of gray, 2 to 256
    radii       of the pairs, in pixels, below `patch`; the angles are 0°, 45°, 90° and 135°
    threads     None: as many as there are cores
    returns     (R, C) bits
    raises      ValueError on anything else
    """
    if definition not in DEFINITIONS:
        raise ValueError(f"definition {definition!r}: there are {', '.join(DEFINITIONS)}")
    _check_glcm(pixels, patch, levels, radii)
    entropy = _release_entropy if definition == "release" else _matrix_entropy
    return _by_band(lambda a: entropy(a, levels, radii), pixels, patch, levels, threads)


def glcm_score(rgb: np.ndarray, definition: str = "release", patch: int = PATCH, levels: int = LEVELS,
               radii: Sequence[int] = RADII, threads: int | None = None) -> float:
    """Mean of `glcm_map` over the patches, in bits."""
    return float(glcm_map(rgb, definition, patch, levels, radii, threads).mean())


def glcm_properties(pixels: np.ndarray, patch: int = PATCH, levels: int = LEVELS, radii: Sequence[int] = RADII,
                    threads: int | None = None) -> dict[str, np.ndarray]:
    """Contrast, dissimilarity, homogeneity, energy, correlation and ASM of every patch, means over its matrices.

    returns  name -> (R, C); the release rounds each number to four places, this does not
    source   skimage's graycoprops, which counts the correlation of a side without variance as 1
    """
    _check_glcm(pixels, patch, levels, radii)

    def of_patches(a: np.ndarray) -> np.ndarray:
        found = np.zeros((len(PROPERTIES), len(a)))
        for offset, times in _offsets(radii).items():
            counts, entries, total = _counts(a, *offset, levels)
            i, j = (side.reshape(len(a), total).astype(np.int64) for side in _pairs(a, *offset))
            square = (i - j) ** 2
            asm = np.add.reduceat((counts / total) ** 2, np.cumsum(entries) - entries)
            covariance, of_i, of_j = (total * (x * y).sum(1) - x.sum(1) * y.sum(1) for x, y in ((i, j), (i, i), (j, j)))  # exact
            flat = (of_i == 0) | (of_j == 0)
            correlation = np.where(flat, 1.0, covariance / np.sqrt(np.where(flat, 1.0, of_i.astype(np.float64) * of_j)))
            found += times * np.stack([square.mean(1), np.abs(i - j).mean(1), (1 / (1 + square)).mean(1), np.sqrt(asm), correlation, asm])
        return found / (4 * len(radii))

    return dict(zip(PROPERTIES, _by_band(of_patches, pixels, patch, levels, threads).transpose(1, 0, 2), strict=True))
