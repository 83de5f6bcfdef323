"""GLCM Score: goldens, scikit-image patch by patch as the release calls it, refusals."""

import numpy as np
import pytest
from golden import DATA
from pictures import GOLDEN, golden_picture, random_picture
from PIL import Image

from scores.glcm import glcm_map, glcm_score, gray_levels

PICTURES = sorted(path.stem for path in (DATA / "pictures").glob("*.png"))


@pytest.mark.parametrize("name", GOLDEN["glcm"])
def test_glcm_equals_goldens(name):
    pixels, golden = golden_picture(name), GOLDEN["glcm"][name]
    assert np.bincount(gray_levels(pixels, 64).ravel(), minlength=64).tolist() == golden["gray_levels"]  # OpenCV's gray
    for definition, bound in (("release", 1e-9), ("entropy", 1e-12)):
        assert np.abs(glcm_map(pixels, definition).ravel() - golden[definition]).max() < bound
        assert abs(glcm_score(pixels, definition) - golden["means"][definition]) < bound


def skimage_glcm(grays: dict[str, np.ndarray], patch: int, n: int, radii) -> dict[str, np.ndarray]:
    """The slow twin, patch by patch as in the release; symmetric: as PixVerve calls it."""
    feature, measure = pytest.importorskip("skimage.feature"), pytest.importorskip("skimage.measure")
    rows, columns = (side // patch for side in grays["OpenCV"].shape)
    maps = {key: np.zeros((rows, columns)) for key in ("release", "entropy", "symmetric")}
    for r in range(rows):
        for c in range(columns):
            cut, other = (gray[r * patch : (r + 1) * patch, c * patch : (c + 1) * patch] for gray in grays.values())
            p = feature.graycomatrix(other, radii, np.arange(4) * np.pi / 4, levels=n, normed=True, symmetric=True)
            maps["symmetric"][r, c] = measure.shannon_entropy(p)
            p = feature.graycomatrix(cut, radii, np.arange(4) * np.pi / 4, levels=n, normed=True)
            maps["release"][r, c] = measure.shannon_entropy(p)
            maps["entropy"][r, c] = -np.sum(p * np.log2(np.where(p > 0, p, 1))) / (4 * len(radii))
    return maps


def check_against_skimage(pixels, patch=64, levels=64, radii=(1, 2, 3, 4)):
    pillow = np.asarray(Image.fromarray(pixels).convert("L"))
    grays = {"OpenCV": gray_levels(pixels, levels), "Pillow": gray_levels(pillow, levels)}
    twin = skimage_glcm(grays, patch, levels, radii)
    for definition, bound in (("release", 1e-9), ("entropy", 1e-12), ("symmetric", 1e-9)):
        assert np.abs(glcm_map(pixels, definition, patch, levels, radii, threads=1) - twin[definition]).max() < bound


@pytest.mark.parametrize("name", PICTURES)
def test_glcm_equals_skimage_on_all_nine_pictures(name):
    check_against_skimage(golden_picture(name))


def test_glcm_equals_skimage_on_random_shapes_contents_and_arguments():
    compared = 0
    for seed in range(330):
        pixels = random_picture(seed, most=160)
        pixels = pixels[..., 0] if seed % 3 == 0 else pixels
        cases = [(16, 64, (1, 2, 3, 4)), (8, 256, (1,)), (32, 8, (2, 5)), (11, 32, (1, 2, 3)), (16, 100, (15,))]
        patch, levels, radii = cases[seed % 5]
        pixels = pixels[: 3 * patch + 5, : 2 * patch + 7]  # six patches are enough for the slow twin
        if min(pixels.shape[:2]) >= patch:
            check_against_skimage(pixels, patch, levels, radii)
            compared += 1
        else:
            with pytest.raises(ValueError, match="smaller than one patch"):
                glcm_score(pixels, patch=patch, levels=levels, radii=radii)
    assert compared >= 200


def test_grays_are_those_of_opencv_and_pillow():
    levels = np.stack(np.meshgrid(*[np.arange(0, 256, 5, dtype=np.uint8)] * 3), -1).reshape(-1, 52, 3)
    assert np.array_equal(gray_levels(levels, gray="Pillow"), np.asarray(Image.fromarray(levels).convert("L")))
    assert (gray_levels(levels, gray="Pillow") != gray_levels(levels)).any()


def test_glcm_large_counts_are_distinguished_and_merged_as_floats_are():
    # two levels in stripes: few entries, all frequent, over totals that share values such as 1/62
    for pixels in (np.tile(np.repeat(np.uint8([0, 255]), 32), (64, 1)), np.zeros((64, 64), np.uint8),
                   np.kron(np.arange(4, dtype=np.uint8).reshape(2, 2) * 60, np.ones((32, 32), np.uint8))):
        check_against_skimage(pixels)


def test_glcm_score_does_not_depend_on_threads_or_the_border_that_fills_no_patch():
    pixels = golden_picture("coffee")
    assert np.array_equal(glcm_map(pixels, threads=1), glcm_map(pixels, threads=3))
    assert np.array_equal(glcm_map(pixels[:383, :500]), glcm_map(pixels)[:5, :7])
    assert glcm_map(pixels).shape == (6, 8)


@pytest.mark.parametrize("change, says", [
    ({"definition": "paper"}, "there are release, entropy, symmetric"),
    ({"patch": 300}, "256x256 pixels: smaller than one patch of 300x300"),
    ({"levels": 1}, "levels: 2 to 256, got 1"),
    ({"radii": ()}, "radii"),
    ({"radii": (0,)}, "radii"),
    ({"radii": (64,)}, "from 1 to 63"),
    ({"radii": (1.5,)}, "whole numbers"),
])
def test_glcm_refuses_other_arguments(change, says):
    with pytest.raises(ValueError, match=says):
        glcm_score(golden_picture("gradient"), **change)


@pytest.mark.parametrize("pixels", [np.zeros((64, 64, 4), np.uint8), np.zeros((64, 64, 3)), np.zeros(64, np.uint8)])
def test_glcm_refuses_other_pixels(pixels):
    with pytest.raises(ValueError, match="uint8 pixels"):
        glcm_score(pixels)
