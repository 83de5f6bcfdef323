"""GLCM Score: how varied the texture of a picture is, from gray-level co-occurrence matrices of its patches.

Paper     Diffusion-4K section 3.1: patches of 64 pixels, 64 gray levels, radii 1 to 4, angles 0°, 45°, 90°, 135°
Mirrors   the released eval.py: OpenCV's gray, skimage's graycomatrix (not symmetric, normalised) and shannon_entropy;
          tested against both by tests/test_glcm.py
Scores    higher is better; means over patches
          release    0 to 16 bits: entropy of the histogram of values in all 16 matrices of a patch; the paper's tables
          entropy    0 to 12 bits: mean of -Σ p log2 p over the matrices; the paper's formula but for its sign
          symmetric  as release, of symmetric matrices and Pillow's gray: what PixVerve and tables after it print
Method    no matrix is made: pairs of levels are 16-bit codes; runs of equal codes, once sorted, are the nonzero entries
Shapes    H and W pixels, R and C patch rows and columns; a border that fills no patch is left out
Run       python bench/speed.py glcm
"""

import os
import timeit
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial

import numpy as np

DEFINITIONS = ("release", "entropy", "symmetric")
GRAYS = {"OpenCV": ((9798, 19235, 3735), 15), "Pillow": ((19595, 38470, 7471), 16)}  # weights, bits after the point
PATCH, LEVELS, RADII = 64, 64, (1, 2, 3, 4)
RARE = 1 / 64  # matrix entries below it are counted in a table; at most 64 entries of a matrix are larger


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gray_levels(pixels: np.ndarray, levels: int = 256, gray: str = "OpenCV") -> np.ndarray:
    """(H, W, 3) or gray (H, W) uint8 -> (H, W) uint16, 0 … levels-1; the gray is of GRAYS, in fixed point."""
    if pixels.ndim == 3:  # every sum is an integer below 2^24, which float32 holds exactly
        weights, bits = GRAYS[gray]
        weighted = pixels.astype(np.float32) @ np.float32(weights)
        pixels = ((weighted + 2 ** (bits - 1)) * np.float32(2**-bits)).astype(np.uint8)
    return pixels.astype(np.uint16) * np.uint16(levels) >> 8


def _offsets(radii: Sequence[int]) -> Counter:
    """(down, across) -> how many radii and angles round to it: on the diagonals, radii 1 and 2 share an offset."""
    angles = [k * np.pi / 4 for k in range(4)]
    return Counter((round(r * np.sin(angle)), round(r * np.cos(angle))) for r in radii for angle in angles)


def _pairs(a: np.ndarray, down: int, across: int) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of pixels of each patch at an offset; `across` may be negative."""
    height, width = a.shape[1:]
    left, right = max(0, -across), max(0, across)
    return a[:, : height - down, left : width - right], a[:, down:, right : width - left]


@lru_cache(1)
def _sort_kind() -> str:
    """The faster sort of 16-bit integers here: quicksort where NumPy has vector instructions for it, else radix."""
    codes = np.random.default_rng(0).integers(0, 4096, (8, 4032), dtype=np.uint16)
    kinds = "quicksort", "stable"
    return min(kinds, key=lambda kind: min(timeit.repeat(lambda: np.sort(codes, 1, kind), number=1, repeat=3)))


def _counts(a: np.ndarray, down: int, across: int, levels: int,
            symmetric: bool = False) -> tuple[np.ndarray, np.ndarray, int]:
    """Nonzero matrix entries at an offset: counts by patch (M,); entries per patch (C,); pairs per patch.

    symmetric  each pair is counted in both orders
    """
    first, second = _pairs(a, down, across)
    total = first[0].size
    if symmetric:
        first, second = np.minimum(first, second), np.maximum(first, second)
    codes = (first * np.uint16(levels) + second).reshape(len(a), total)
    codes.sort(axis=1, kind=_sort_kind())
    new = np.empty(codes.shape, dtype=bool)
    new[:, 0] = True
    np.not_equal(codes[:, 1:], codes[:, :-1], out=new[:, 1:])
    starts = np.flatnonzero(new)
    counts, ends = np.diff(starts, append=new.size), np.searchsorted(starts, np.arange(len(a) + 1) * total)
    if symmetric:  # n pairs of two levels are n entries on either side of the diagonal, of equal levels 2n on it
        equal = codes.ravel()[starts] % (levels + 1) == 0
        sides = 2 - equal
        counts, ends = np.repeat(counts * (1 + equal), sides), np.append(0, np.cumsum(sides))[ends]
        total *= 2
    return counts, np.diff(ends), total


@lru_cache(8)
def _value_ids(totals: tuple[int, ...]) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """All floats count / total in order, and the ids of each total's counts: positions; equal floats share one."""
    values, ids = np.unique(np.concatenate([np.arange(total + 1) / total for total in totals]), return_inverse=True)
    return values, dict(zip(totals, np.split(ids, np.cumsum([total + 1 for total in totals])[:-1]), strict=True))


def _release_entropy(a: np.ndarray, levels: int, radii: Sequence[int], symmetric: bool = False) -> np.ndarray:
    """(C,) bits: entropy of how often each value occurs in all matrices of a patch, zeros included."""
    # An entry is a float count / total. Patch 64, radius 1: 64·63 = 4032 pairs at 0°, 63·63 = 3969 at 45°. 64 / 4032
    # and 63 / 3969 are the same float 1/63, so count 64 at 0° and count 63 at 45° have the same id.
    # Ids below `rare_ids`, values below 1/64, are nearly all entries: bincount adds them up in table[patch, id].
    # The few frequent ones, such as 1/63, become codes patch * len(values) + id, which np.unique counts.
    # Where id i occurs k_i times among n entries, the entropy is log2 n - Σ k_i log2 k_i / n.
    offsets, patches = _offsets(radii), len(a)
    totals = {_pairs(a, *offset)[0][0].size * (1 + symmetric) for offset in offsets}
    values, ids_of_total = _value_ids(tuple(sorted(totals)))
    rare_ids = int(np.searchsorted(values, RARE))
    row_starts = np.arange(patches) * rare_ids
    table, frequent = np.zeros((patches, rare_ids), dtype=np.int64), []
    for offset, times in offsets.items():
        counts, entries, total = _counts(a, *offset, levels, symmetric)
        ids = ids_of_total[total]  # by count
        limit = int(np.searchsorted(ids, rare_ids))  # the first count that is not rare
        rare_or_zero = np.append(ids[:limit], np.zeros(len(ids) - limit, dtype=ids.dtype))
        cells = rare_or_zero[counts] + np.repeat(row_starts, entries)
        histogram = np.bincount(cells, minlength=table.size).reshape(table.shape)
        histogram[:, 0] = levels**2 - entries  # id 0 is the value 0
        table += times * histogram
        places = np.flatnonzero(counts >= limit)
        patch = np.searchsorted(np.cumsum(entries), places, side="right")
        frequent += [patch * len(values) + ids[counts[places]]] * times
    codes, occurrences = np.unique(np.concatenate(frequent), return_counts=True)
    bits = (table * np.log2(np.maximum(table, 1))).sum(1)
    bits += np.bincount(codes // len(values), weights=occurrences * np.log2(occurrences), minlength=patches)
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
    """GLCM Score of every patch: (R, C) bits; ValueError on other arguments.

    pixels      (H, W, 3) or gray (H, W), uint8, at least one patch
    definition  one of DEFINITIONS, see Scores above
    patch       side, pixels
    levels      gray levels, 2 to 256
    radii       distances of the pairs, pixels, below `patch`
    threads     None is one per core
    """
    if definition not in DEFINITIONS:
        raise ValueError(f"definition {definition!r}: there are {', '.join(DEFINITIONS)}")
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or pixels.ndim == 3 and pixels.shape[2] == 3):
        raise ValueError(f"GLCM needs uint8 pixels, (H, W, 3) or gray (H, W), got {pixels.dtype} {pixels.shape}")
    if not 2 <= levels <= 256:
        raise ValueError(f"levels: 2 to 256, got {levels}")
    if not radii or any(radius != int(radius) or not 1 <= radius < patch for radius in radii):
        raise ValueError(f"radii: whole numbers from 1 to {patch - 1}, below the patch, got {tuple(radii)}")
    if min(pixels.shape[:2]) < patch:
        raise ValueError(f"{pixels.shape[1]}x{pixels.shape[0]} pixels: smaller than one patch of {patch}x{patch}")
    gray_of, columns = "Pillow" if definition == "symmetric" else "OpenCV", pixels.shape[1] // patch
    entropy = {"release": _release_entropy, "entropy": _matrix_entropy,
               "symmetric": partial(_release_entropy, symmetric=True)}[definition]

    def of_row(top: int) -> np.ndarray:
        gray = gray_levels(pixels[top : top + patch, : columns * patch], levels, gray_of)
        patches = gray.reshape(patch, columns, patch).transpose(1, 0, 2)
        return entropy(np.ascontiguousarray(patches), levels, radii)

    tops = range(0, pixels.shape[0] - patch + 1, patch)
    threads = cores() if threads is None else threads
    if threads == 1 or len(tops) == 1:
        return np.stack([of_row(top) for top in tops])
    with ThreadPoolExecutor(threads) as pool:
        return np.stack(list(pool.map(of_row, tops)))


def glcm_score(rgb: np.ndarray, definition: str = "release", patch: int = PATCH, levels: int = LEVELS,
               radii: Sequence[int] = RADII, threads: int | None = None) -> float:
    """Mean of `glcm_map` over the patches, in bits."""
    return float(glcm_map(rgb, definition, patch, levels, radii, threads).mean())
