"""PSNR, SSIM, NMSE, Fréchet distance, correlations: goldens, scikit-image and scipy, values by hand, refusals."""

import random

import numpy as np
import pytest
from pictures import GOLDEN, golden_picture
from PIL import Image

from scores.compare import (
    crop_places,
    crops_of,
    frechet_distance,
    nmse,
    patches_of,
    plcc,
    psnr,
    quick_frechet,
    srcc,
    ssim,
    statistics,
)
from scores.intervals import bootstrap


@pytest.mark.parametrize("row", GOLDEN["pairs"], ids=lambda row: row["b"])
def test_psnr_and_ssim_equal_goldens(row):
    a, b = golden_picture(row["a"]), golden_picture(row["b"])
    assert psnr(a, b) == float(row["psnr"]) or abs(psnr(a, b) - float(row["psnr"])) < 1e-10
    assert abs(ssim(a, b) - row["ssim"]) < 1e-10
    assert abs(nmse(a, b) - row["mse"] / np.square(a.astype(float)).mean()) < 1e-12


def test_ssim_equals_skimage_on_odd_shapes_gray_and_several_strips():
    skimage = pytest.importorskip("skimage.metrics")
    for height, width in ((11, 11), (12, 300), (313, 17), (200, 1500)):
        rng = np.random.default_rng(height)
        a = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        b = np.clip(a + rng.normal(0, 20, a.shape), 0, 255).astype(np.uint8)
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
        assert abs(ssim(a, b) - skimage.structural_similarity(a, b, channel_axis=-1, **options)) < 1e-10
        assert abs(ssim(a[..., 0], b[..., 0]) - skimage.structural_similarity(a[..., 0], b[..., 0], **options)) < 1e-10


def test_comparisons_refuse_what_has_no_answer():
    a = golden_picture("gradient")
    for measure in (psnr, ssim, nmse):
        with pytest.raises(ValueError, match="the reference has 256x256 pixels and the picture 255x256"):
            measure(a, a[:, 1:])
    with pytest.raises(ValueError, match="10x256 pixels: SSIM needs at least 11"):
        ssim(a[:, :10], a[:, :10])
    with pytest.raises(ValueError, match="the reference is black"):
        nmse(np.zeros_like(a), a)


# ---- two sets

def scipy_frechet(x: np.ndarray, y: np.ndarray) -> float:
    linalg = pytest.importorskip("scipy.linalg")
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    return np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a) + np.trace(b) - 2 * np.trace(linalg.sqrtm(a @ b)).real


def features(n: int, d: int, condition: float, seed: int) -> np.ndarray:
    """(n, d) with covariance eigenvalues from 1 to 1 / condition, in random directions."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.normal(size=(d, d)))[0]
    return rng.normal(size=(n, d)) * np.geomspace(1, condition**-0.5, d) @ turn + 0.1 * rng.normal(size=d)


@pytest.mark.parametrize("condition", [1, 1e2, 1e4, 1e6, 1e8, 1e12])
def test_frechet_equals_scipy_at_every_condition(condition):
    x, y = features(500, 64, condition, 1), features(400, 64, condition, 2)
    assert frechet_distance(x, y) == pytest.approx(scipy_frechet(x, y), rel=1e-8)


@pytest.mark.parametrize("n, m, d", [(20, 30, 64), (2, 3, 64), (100, 1000, 256)])
def test_frechet_of_fewer_pictures_than_features_is_exact(n, m, d):
    x, y = features(n, d, 1e3, 1), features(m, d, 1e3, 2)
    # tr (AB)^½ is the sum of singular values of the product of the centred features: no covariance, no root
    a, b = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y))
    shared = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    exact = np.square(x.mean(0) - y.mean(0)).sum() + np.square(a).sum() + np.square(b).sum() - 2 * shared
    assert frechet_distance(x, y) == pytest.approx(exact, rel=1e-8)
    assert frechet_distance(x, y) == pytest.approx(scipy_frechet(x, y), rel=1e-6)  # scipy's roots of rounding errors


def test_frechet_by_hand():
    x = np.array([[0.0, 0], [2, 0], [0, 4], [2, 4]])      # variances 4/3 and 16/3
    y = 3 * x + [5, -1]                                   # variances 12 and 48
    shift = np.square((3 * x + [5, -1]).mean(0) - x.mean(0)).sum()
    spread = (np.sqrt(12) - np.sqrt(4 / 3)) ** 2 + (np.sqrt(48) - np.sqrt(16 / 3)) ** 2
    assert frechet_distance(x, y) == pytest.approx(shift + spread)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-12)
    assert statistics(x.astype(np.float32)).covariance.dtype == np.float64


def test_frechet_refuses_one_picture_nan_and_other_widths():
    x = features(10, 4, 1, 0)
    with pytest.raises(ValueError, match="second set: a covariance needs at least two pictures"):
        frechet_distance(x, x[:1])
    with pytest.raises(ValueError, match="the width must be the same"):
        frechet_distance(x, x[:, :3])
    x[3, 2] = np.nan
    with pytest.raises(ValueError, match="first set: the features of 1 of 10 hold NaN or Inf"):
        frechet_distance(x, x)


def test_patches_are_centred_squares():
    pixels = golden_picture("coffee")  # 384 x 512
    patches = patches_of(pixels, 100)
    assert patches.shape == (15, 100, 100, 3) and np.array_equal(patches[6], pixels[142:242, 106:206])
    assert patches_of(pixels[:50], 100).shape == (0, 100, 100, 3)


def test_crops_lie_where_pixverves_evaluation_puts_them():
    # its class seeds Python's generator with 42, then draws top and left of 20 crops per picture, both ends included
    draw, side = random.Random(42), 320
    expected = [[(draw.randint(0, 21), draw.randint(0, 21)) for _ in range(20)] for _ in range(3)]
    assert crop_places(3, side) == expected and crop_places(2, side) == expected[:2]
    pixels = golden_picture("coffee")                     # 384 x 512, stretched to a square
    stretched = np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS))
    crops, (top, left) = crops_of(pixels, side, expected[1]), expected[1][7]
    assert crops.shape == (20, 299, 299, 3)
    assert np.array_equal(crops[7], stretched[top : top + 299, left : left + 299])


@pytest.mark.parametrize("n, m", [(20, 30), (64, 64), (65, 30), (500, 400)])
def test_quick_frechet_is_frechet(n, m):
    x, y = features(n, 64, 1e3, 1), features(m, 64, 1e3, 2)
    assert quick_frechet(x.astype(np.float32), y.astype(np.float32)) == pytest.approx(frechet_distance(x, y), rel=1e-5)
    assert quick_frechet(x, y) == pytest.approx(frechet_distance(x, y), rel=1e-8)


# ---- ratings

@pytest.mark.parametrize("seed", range(20))
def test_correlations_equal_scipy_with_ties(seed):
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(seed)
    x = rng.integers(1, 11, 5 + 7 * seed) if seed % 2 else rng.normal(size=5 + 7 * seed)
    y = np.round(x + rng.normal(0, 3, len(x)), seed % 3)
    assert srcc(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert plcc(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)


@pytest.mark.parametrize("scale", [1e-290, 1e-160, 1e160, 1e300])
def test_correlations_do_not_depend_on_the_scale(scale):
    x, y = np.random.default_rng(1).normal(size=(2, 40))
    for statistic in (srcc, plcc):
        assert statistic(x * scale, y) == pytest.approx(statistic(x, y), rel=1e-12)
        assert bootstrap(statistic, x * scale, y, 50) == pytest.approx(bootstrap(statistic, x, y, 50), rel=1e-12)
    assert plcc([1e308, -1e308, 0], [2, 1, 1.5]) == pytest.approx(1)


def test_bootstrap_interval_holds_the_correlation_and_repeats():
    rng = np.random.default_rng(0)
    x = rng.normal(size=80)
    y = x + rng.normal(size=80)
    for statistic in (srcc, plcc):
        low, high = bootstrap(statistic, x, y, draws=500)
        assert low < statistic(x, y) < high and high - low < 0.5
        assert bootstrap(statistic, x, y, draws=500) == (low, high)
    assert bootstrap(plcc, x, x, draws=50) == pytest.approx((1, 1))


@pytest.mark.parametrize("x, y, says", [
    ([1, 2], [1, 2, 3], "same length"), ([1], [1], "at least 2"), ([1, 1, 1], [1, 2, 3], "equal"),
    ([1, np.nan, 2], [1, 2, 3], "NaN"), ([1, 2, 3], [1, np.inf, 2], "Inf")])
def test_correlations_refuse_what_has_no_answer(x, y, says):
    for statistic in (srcc, plcc):
        with pytest.raises(ValueError, match=says):
            statistic(x, y)
