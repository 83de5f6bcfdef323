"""Similarity of two pictures, distance of two sets, agreement of numbers with ratings.

Paper     Diffusion-4K tables 1 to 3
Mirrors   skimage.metrics, scipy.linalg.sqrtm as FID uses it, scipy.stats; tested against them by tests/test_compare.py
Scores    name        range              better  definition
          PSNR        dB, inf for equal  higher  10 log10(255² / mean square difference)
          SSIM        -1 to 1            higher  Gaussian window, sigma 1.5, 11x11, population covariance; channel mean
          NMSE        from 0             lower   Σ (reference - image)² / Σ reference²; the paper defines none
          Fréchet     from 0             lower   |difference of means|² + tr(A + B - 2 (A B)^½), features as Gaussians
          SRCC, PLCC  -1 to 1            higher  Spearman's correlation of ranks, ties share one; Pearson's of values
Shapes    H and W pixels, N pictures or patches, D features; pictures are uint8
"""

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

SSIM_SIGMA, SSIM_RADIUS, SSIM_K1, SSIM_K2 = 1.5, 5, 0.01, 0.03
FID_PATCH = 299  # pixels, Inception's input: patches are not resized
CROPS, CROP_SEED = 20, 42  # of PixVerve's patch-FID


# ---- two pictures

def check_same_shape(reference: np.ndarray, image: np.ndarray) -> None:
    """ValueError unless both have the same size and channels."""
    if reference.shape != image.shape:
        sizes = [f"{x.shape[1]}x{x.shape[0]}" if x.ndim > 1 else str(x.shape) for x in (reference, image)]
        raise ValueError(f"the reference has {sizes[0]} pixels and the picture {sizes[1]}: give pictures of one size")


def _square_difference(reference: np.ndarray, image: np.ndarray) -> int:
    check_same_shape(reference, image)
    rows = zip(reference, image, strict=True)  # by row, to save memory
    return sum(int(np.square(np.subtract(a, b, dtype=np.int64)).sum()) for a, b in rows)


def psnr(reference: np.ndarray, image: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB; inf for equal pictures. Both uint8, of the same shape."""
    error = _square_difference(reference, image)
    return 10 * math.log10(255**2 * reference.size / error) if error else math.inf


def nmse(reference: np.ndarray, image: np.ndarray) -> float:
    """Sum of squared differences / sum of the reference's squares. Both uint8, of the same shape."""
    power = sum(int(np.square(row, dtype=np.int64).sum()) for row in reference)
    if not power:
        raise ValueError("the reference is black: NMSE divides by its sum of squares")
    return _square_difference(reference, image) / power


def ssim(reference: np.ndarray, image: np.ndarray) -> float:
    """Structural similarity, the mean over windows inside the picture; (H, W, 3) or (H, W), sides of at least 11."""
    check_same_shape(reference, image)
    size = 2 * SSIM_RADIUS + 1
    if min(reference.shape[:2]) < size:
        raise ValueError(f"{reference.shape[1]}x{reference.shape[0]} pixels: SSIM needs at least {size} per side")
    window = np.exp(-0.5 * (np.arange(-SSIM_RADIUS, SSIM_RADIUS + 1) / SSIM_SIGMA) ** 2)
    window /= window.sum()
    c1, c2 = (SSIM_K1 * 255) ** 2, (SSIM_K2 * 255) ** 2

    def blur(x: np.ndarray) -> np.ndarray:
        x = sum(weight * x[k : k + len(x) - size + 1] for k, weight in enumerate(window))
        return sum(weight * x[:, k : k + width] for k, weight in enumerate(window))

    total, step = 0.0, max(1, (1 << 17) // reference.shape[1])  # strips fit in the processor's cache
    height, width = reference.shape[0] - size + 1, reference.shape[1] - size + 1
    reference, image = (picture.reshape(*picture.shape[:2], -1) for picture in (reference, image))
    for top in range(0, height, step):
        rows = slice(top, min(top + step, height) + size - 1)
        for channel in range(reference.shape[2]):
            x, y = (picture[rows, :, channel].astype(np.float64) for picture in (reference, image))
            mx, my = blur(x), blur(y)
            product = mx * my
            squares = mx * mx + my * my
            total += ((2 * product + c1) * (2 * (blur(x * y) - product) + c2)
                      / ((squares + c1) * (blur(x * x + y * y) - squares + c2))).sum()
    return float(total / (height * width * reference.shape[2]))


# ---- two sets

class Statistics(NamedTuple):
    """Number, mean (D,) and covariance (D, D) of features, fp64; the covariance is divided by n - 1."""

    n: int
    mean: np.ndarray
    covariance: np.ndarray


def statistics(features: np.ndarray, what: str = "features") -> Statistics:
    """Mean and covariance of features (N, D); ValueError if N is below 2 or a feature is NaN or Inf."""
    features = np.asarray(features)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"{what}: a covariance needs at least two pictures, got features of shape {features.shape}")
    if broken := int((~np.isfinite(features).all(axis=1)).sum()):
        raise ValueError(f"{what}: the features of {broken} of {len(features)} hold NaN or Inf")
    mean = features.mean(axis=0, dtype=np.float64)
    scatter = np.zeros((len(mean), len(mean)))
    for start in range(0, len(features), 4096):
        centred = features[start : start + 4096] - mean
        scatter += centred.T @ centred
    return Statistics(len(features), mean, scatter / (len(features) - 1))


def _root(covariance: np.ndarray) -> np.ndarray:
    """(D, K) with root @ root.T = covariance; directions whose variance is rounding error are dropped."""
    values, vectors = np.linalg.eigh(covariance)
    large = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    return vectors[:, large] * np.sqrt(values[large])


def frechet(a: Statistics, b: Statistics) -> float:
    """|difference of means|² + tr(A) + tr(B) - 2 tr (A B)^½."""
    # the last trace: singular values of Aroot.T @ Broot, which unlike a root of A B is never complex
    shared = np.linalg.svd(_root(a.covariance).T @ _root(b.covariance), compute_uv=False).sum()
    distance = np.square(a.mean - b.mean).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * shared
    return max(float(distance), 0.0)


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Fréchet distance of features (N, D) and (M, D) as Gaussians; ValueError as of `statistics` or if D differs."""
    if np.shape(x)[1:] != np.shape(y)[1:]:
        raise ValueError(f"features of shapes {np.shape(x)} and {np.shape(y)}: the width must be the same")
    return frechet(statistics(x, "first set"), statistics(y, "second set"))


def quick_frechet(x: np.ndarray, y: np.ndarray) -> float:
    """`frechet_distance` to rounding, in less time where N and M are at most D: without a covariance."""
    if max(len(x), len(y)) > x.shape[1]:
        return frechet_distance(x, y)
    means = x.mean(axis=0, dtype=np.float64), y.mean(axis=0, dtype=np.float64)
    x, y = ((side - mean) / math.sqrt(len(side) - 1) for side, mean in zip((x, y), means, strict=True))
    shared = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return float(np.square(means[0] - means[1]).sum() + np.square(x).sum() + np.square(y).sum() - 2 * shared)


def crop_places(pictures: int, side: int) -> list[list[tuple[int, int]]]:
    """(top, left) of the crops of each picture, drawn one after the other as PixVerve's evaluation does."""
    draw = random.Random(CROP_SEED)
    return [[(draw.randint(0, side - FID_PATCH), draw.randint(0, side - FID_PATCH)) for _ in range(CROPS)]
            for _ in range(pictures)]


def crops_of(pixels: np.ndarray, side: int, places: Sequence[tuple[int, int]]) -> np.ndarray:
    """(N, 299, 299, 3) of the picture stretched to a square of `side` px."""
    pixels = np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS))
    return np.stack([pixels[top : top + FID_PATCH, left : left + FID_PATCH] for top, left in places])


def patches_of(pixels: np.ndarray, side: int = FID_PATCH) -> np.ndarray:
    """Adjacent squares (N, side, side, 3) from the centre; a border that fills no square is left out."""
    rows, columns = pixels.shape[0] // side, pixels.shape[1] // side
    top, left = (pixels.shape[0] - rows * side) // 2, (pixels.shape[1] - columns * side) // 2
    pixels = pixels[top : top + rows * side, left : left + columns * side]
    return pixels.reshape(rows, side, columns, side, 3).transpose(0, 2, 1, 3, 4).reshape(-1, side, side, 3)


# ---- agreement with ratings

def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share their mean rank."""
    _, place, count = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def plcc(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's linear correlation; ValueError on fewer than two, different lengths, NaN or Inf, or all equal."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape or len(x) < 2:
        raise ValueError(f"a correlation needs two lists of the same length, at least 2, got {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("a correlation needs finite numbers, got NaN or Inf")
    if x.min() == x.max() or y.min() == y.max():
        raise ValueError("all numbers of one list are equal: there is no correlation")
    x, y = (side - side.mean() for side in (_scaled(x), _scaled(y)))
    x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
    return float(np.clip(x @ y, -1, 1))


def _scaled(x: np.ndarray) -> np.ndarray:
    """x divided by a power of two, which is exact, so that its squares neither overflow nor vanish."""
    return np.ldexp(x, -np.frexp(np.abs(x).max())[1])


def srcc(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation: `plcc` of the ranks."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    return plcc(*(_ranks(side) if np.isfinite(side).all() and side.ndim == 1 else side for side in (x, y)))
