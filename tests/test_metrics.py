"""Detail, similarity, sets, ratings: goldens, scikit-image, Pillow and scipy as oracles; the command line; bad input.

Oracles   tests/data/metrics.json (see golden.py); scikit-image, scipy, Pillow, of requirements-dev.txt
"""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import DATA
from PIL import Image

import metrics
from metrics import (
    bootstrap,
    compression_ratio,
    detail_sheet,
    frechet_distance,
    glcm_score,
    heat,
    jpeg_size,
    nmse,
    patches_of,
    plcc,
    psnr,
    srcc,
    ssim,
    statistics,
)
from scores import perceptual
from scores.compare import patch_fid
from scores.glcm import PROPERTIES, glcm_map, glcm_properties, gray_levels
from scores.jpeg import SUBSAMPLING, jpeg_bits, jpeg_encode

ROOT = Path(__file__).parents[1]
GOLDEN = json.loads((DATA / "metrics.json").read_text())
PICTURES = sorted(path.stem for path in (DATA / "pictures").glob("*.png"))


def golden_picture(name: str) -> np.ndarray:
    return np.asarray(Image.open(DATA / "pictures" / f"{name.removesuffix('.png')}.png").convert("RGB"))


def random_picture(seed: int, most: int = 400) -> np.ndarray:
    """(H, W, 3) uint8: noise, constant, saturated, checkerboard, waves with a little noise, one of two extremes, or soft; any shape."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, (most if seed % 2 else 40) + 1, 2)
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    down, across = np.indices((height, width))
    waves = np.stack([127 + 120 * np.sin(down / 7 + k) * np.cos(across / (5 + k)) for k in range(3)], axis=-1)
    return [noise, np.broadcast_to(noise[0, 0], noise.shape), (noise > 127) * 255, np.repeat((down + across)[..., None] % 2 * 255, 3, 2),
            np.clip(waves + rng.normal(0, 3, noise.shape), 0, 255), np.broadcast_to(rng.choice([0, 255], 3), noise.shape),
            waves][seed % 7].astype(np.uint8)


# ---- GLCM

@pytest.mark.parametrize("name", GOLDEN["glcm"])
def test_glcm_equals_goldens(name):
    pixels, golden = golden_picture(name), GOLDEN["glcm"][name]
    assert np.bincount(gray_levels(pixels, 64).ravel(), minlength=64).tolist() == golden["gray_levels"]  # OpenCV's gray
    for definition, bound in (("release", 1e-9), ("entropy", 1e-12)):
        assert np.abs(glcm_map(pixels, definition).ravel() - golden[definition]).max() < bound
        assert abs(glcm_score(pixels, definition) - golden["means"][definition]) < bound
    found = glcm_properties(pixels)
    assert list(found) == list(PROPERTIES)
    assert all(abs(found[p].mean() - golden["properties"][p]) < 1e-9 for p in PROPERTIES)


def skimage_glcm(levels: np.ndarray, patch: int, n: int, radii) -> dict[str, np.ndarray]:
    """The slow twin, patch by patch as the release does it."""
    feature, measure = pytest.importorskip("skimage.feature"), pytest.importorskip("skimage.measure")
    rows, columns = levels.shape[0] // patch, levels.shape[1] // patch
    found = {key: np.zeros((rows, columns)) for key in ("release", "entropy", *PROPERTIES)}
    for r in range(rows):
        for c in range(columns):
            cut = levels[r * patch : (r + 1) * patch, c * patch : (c + 1) * patch]
            p = feature.graycomatrix(cut, radii, np.arange(4) * np.pi / 4, levels=n, normed=True)
            found["release"][r, c] = measure.shannon_entropy(p)
            found["entropy"][r, c] = -np.sum(p * np.log2(np.where(p > 0, p, 1))) / (4 * len(radii))
            for name in PROPERTIES:
                found[name][r, c] = feature.graycoprops(p, name).mean()
    return found


def check_against_skimage(pixels, patch=64, levels=64, radii=(1, 2, 3, 4)):
    twin = skimage_glcm(gray_levels(pixels, levels), patch, levels, radii)
    for definition, bound in (("release", 1e-9), ("entropy", 1e-12)):
        assert np.abs(glcm_map(pixels, definition, patch, levels, radii, threads=1) - twin[definition]).max() < bound
    found = glcm_properties(pixels, patch, levels, radii, threads=1)
    for name in PROPERTIES:
        if name != "correlation":  # without variance on one side the reference divides rounding errors
            assert np.allclose(found[name], twin[name], rtol=1e-9, atol=1e-9), name
    return found, twin


@pytest.mark.parametrize("name", PICTURES)
def test_glcm_equals_skimage_on_all_nine_pictures(name):
    found, twin = check_against_skimage(golden_picture(name))
    assert np.abs(found["correlation"] - twin["correlation"]).max() < 1e-9


def test_glcm_equals_skimage_on_random_shapes_contents_and_arguments():
    compared = 0
    for seed in range(330):
        pixels = random_picture(seed, most=160)
        pixels = pixels[..., 0] if seed % 3 == 0 else pixels
        patch, levels, radii = [(16, 64, (1, 2, 3, 4)), (8, 256, (1,)), (32, 8, (2, 5)), (11, 32, (1, 2, 3)), (16, 100, (15,))][seed % 5]
        pixels = pixels[: 3 * patch + 5, : 2 * patch + 7]  # six patches are enough for the slow twin
        if min(pixels.shape[:2]) >= patch:
            check_against_skimage(pixels, patch, levels, radii)
            compared += 1
        else:
            with pytest.raises(ValueError, match="smaller than one patch"):
                glcm_score(pixels, patch=patch, levels=levels, radii=radii)
    assert compared >= 200


def test_glcm_large_counts_are_told_apart_and_merged_as_floats_are():
    # two levels in stripes: few entries, all of them frequent, across totals that share values such as 1/62
    for pixels in (np.tile(np.repeat(np.uint8([0, 255]), 32), (64, 1)), np.zeros((64, 64), np.uint8),
                   np.kron(np.arange(4, dtype=np.uint8).reshape(2, 2) * 60, np.ones((32, 32), np.uint8))):
        check_against_skimage(pixels)


def test_glcm_score_does_not_depend_on_threads_or_the_border_that_fills_no_patch():
    pixels = golden_picture("coffee")
    assert np.array_equal(glcm_map(pixels, threads=1), glcm_map(pixels, threads=3))
    assert np.array_equal(glcm_map(pixels[:383, :500]), glcm_map(pixels)[:5, :7])
    assert glcm_map(pixels).shape == (6, 8)


@pytest.mark.parametrize("change, says", [
    ({"definition": "paper"}, "there are release, entropy"),
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
def test_glcm_and_jpeg_refuse_other_pixels(pixels):
    for measure in (glcm_score, jpeg_size):
        with pytest.raises(ValueError, match="uint8 pixels"):
            measure(pixels)


# ---- JPEG

def pillow_jpeg(pixels: np.ndarray, quality: int, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, **options)
    return file.getvalue()


@pytest.mark.parametrize("name", GOLDEN["jpeg"])
def test_jpeg_size_equals_goldens(name):
    pixels, golden = golden_picture(name), dict(GOLDEN["jpeg"][name])
    gray = np.asarray(Image.fromarray(pixels).convert("L"))
    assert abs(compression_ratio(pixels) - golden.pop("compression_ratio_q95")) < 1e-12
    assert jpeg_size(pixels, 95, "4:4:4") == golden.pop("rgb_q95_444")
    assert len(golden) == 8
    for key, size in golden.items():
        kind, quality = key.split("_q")
        assert jpeg_size(gray if kind == "gray" else pixels, int(quality)) == size, key


def test_jpeg_file_equals_pillow_byte_for_byte_on_random_shapes_and_contents():
    for seed in range(280):
        pixels, quality = random_picture(seed), 1 + seed * 37 % 100
        for subsampling in SUBSAMPLING:
            expected = pillow_jpeg(pixels, quality, subsampling=subsampling)
            assert jpeg_encode(pixels, quality, subsampling) == expected, (seed, quality, subsampling)
        assert jpeg_encode(pixels[..., 0], quality) == pillow_jpeg(np.ascontiguousarray(pixels[..., 0]), quality), (seed, quality)


@pytest.mark.parametrize("height, width", [(1, 1), (1, 400), (400, 1), (8, 8), (9, 17), (16, 16), (17, 33), (7, 24), (24, 7)])
def test_jpeg_equals_pillow_at_every_quality_on_edge_shapes(height, width):
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    for quality in range(1, 101):
        assert jpeg_encode(pixels, quality) == pillow_jpeg(pixels, quality), quality
    assert jpeg_encode(pixels) == pillow_jpeg(pixels, 95)


def test_jpeg_chunks_join(monkeypatch):
    pixels = golden_picture("astronaut")
    monkeypatch.setattr("jpeg.CHUNK", 1)  # one row of MCUs at a time: levels and bits go over the seams
    assert jpeg_encode(pixels) == pillow_jpeg(pixels, 95)


@pytest.mark.parametrize("subsampling", SUBSAMPLING)
def test_jpeg_bits_of_blocks_add_up_to_the_scan(subsampling):
    pixels = golden_picture("coffee")[:250, :301]
    bits = jpeg_bits(pixels, 90, subsampling)
    across, down = SUBSAMPLING[subsampling]
    assert bits.shape == (-(-250 // (8 * down)) * down, -(-301 // (8 * across)) * across)
    file = jpeg_encode(pixels, 90, subsampling)
    scan = file[file.index(b"\xff\xda") + 14 : -2].replace(b"\xff\0", b"\xff")
    assert 0 <= 8 * len(scan) - bits.sum() < 8
    flat = np.concatenate([np.full((64, 64, 3), 90, np.uint8), pixels[:64, :64]], axis=1)
    assert jpeg_bits(flat)[:, 1:8].max() < jpeg_bits(flat)[:, 8:].mean()


@pytest.mark.parametrize("arguments, says", [((0,), "1 to 100"), ((101,), "1 to 100"), ((50.5,), "whole number"),
                                             ((95, "4:1:1"), "4:4:4, 4:2:2, 4:2:0")])
def test_jpeg_refuses_other_arguments(arguments, says):
    with pytest.raises(ValueError, match=says):
        jpeg_size(np.zeros((8, 8, 3), np.uint8), *arguments)


def test_jpeg_refuses_sides_that_no_jpeg_has():
    with pytest.raises(ValueError, match="sides of 1 to 65500 pixels, got 70000x1"):
        jpeg_size(np.zeros((1, 70_000, 3), np.uint8))
    with pytest.raises(ValueError, match="got 0x4"):
        jpeg_size(np.zeros((4, 0, 3), np.uint8))


# ---- two pictures

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
    assert frechet_distance(x, y) == pytest.approx(scipy_frechet(x, y), rel=1e-6)  # scipy takes roots of rounding errors here


def test_frechet_by_hand():
    x = np.array([[0.0, 0], [2, 0], [0, 4], [2, 4]])      # variances 4/3 and 16/3
    y = 3 * x + [5, -1]                                   # variances 12 and 48
    shift = np.square((3 * x + [5, -1]).mean(0) - x.mean(0)).sum()
    assert frechet_distance(x, y) == pytest.approx(shift + (np.sqrt(12) - np.sqrt(4 / 3)) ** 2 + (np.sqrt(48) - np.sqrt(16 / 3)) ** 2)
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


def test_patches_are_centred_squares_and_patch_fid_goes_through_the_features():
    pixels = golden_picture("coffee")  # 384 x 512
    patches = patches_of(pixels, 100)
    assert patches.shape == (15, 100, 100, 3) and np.array_equal(patches[6], pixels[142:242, 106:206])
    assert patches_of(pixels[:50], 100).shape == (0, 100, 100, 3)

    def means(batch):
        return batch.astype(np.float64).mean((1, 2))
    x, y = [pixels, pixels[:, :300]], [golden_picture("astronaut"), golden_picture("noise")]
    expected = frechet_distance(*(np.concatenate([means(patches_of(p, 64)) for p in side]) for side in (x, y)))
    assert patch_fid(x, y, means, 64) == expected > 0


# ---- ratings

@pytest.mark.parametrize("seed", range(20))
def test_correlations_equal_scipy_with_ties(seed):
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(seed)
    x = rng.integers(1, 11, 5 + 7 * seed) if seed % 2 else rng.normal(size=5 + 7 * seed)
    y = np.round(x + rng.normal(0, 3, len(x)), seed % 3)
    assert srcc(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert plcc(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)


def test_bootstrap_interval_holds_the_correlation_and_repeats():
    rng = np.random.default_rng(0)
    x = rng.normal(size=80)
    y = x + rng.normal(size=80)
    for statistic in (srcc, plcc):
        low, high = bootstrap(statistic, x, y, draws=500)
        assert low < statistic(x, y) < high and high - low < 0.5
        assert bootstrap(statistic, x, y, draws=500) == (low, high)
    assert bootstrap(plcc, x, x, draws=50) == pytest.approx((1, 1))


@pytest.mark.parametrize("x, y, says", [([1, 2], [1, 2, 3], "same length"), ([1], [1], "at least 2"), ([1, 1, 1], [1, 2, 3], "equal"),
                                        ([1, np.nan, 2], [1, 2, 3], "NaN"), ([1, 2, 3], [1, np.inf, 2], "Inf")])
def test_correlations_refuse_what_has_no_answer(x, y, says):
    for statistic in (srcc, plcc):
        with pytest.raises(ValueError, match=says):
            statistic(x, y)


# ---- the command line

@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run `metrics.py` in this process: exit code (0 or 1), stdout, the lines on stderr that are no progress bar."""
    def run(*arguments, cache=True):
        monkeypatch.setattr(sys, "argv", ["metrics.py", *map(str, arguments), *(["--cache", str(tmp_path / "cache")] if cache else [])])
        with pytest.raises(SystemExit) as ended:
            metrics.main()
        out, err = capsys.readouterr()
        lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip() and "it/s" not in line and "s/it" not in line
                 and "?it" not in line]
        if isinstance(ended.value.code, str):
            lines.append(ended.value.code)
        return 1 if ended.value.code else 0, out, lines
    return run


def write_mixed(folder: Path) -> None:
    """50 files: jpg, png, webp, odd sizes, gray, palette, alpha, CMYK, 16 bit, turned; one of them broken."""
    rng = np.random.default_rng(0)
    for k in range(43):
        height, width = rng.integers(64, 200, 2)
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).resize((width + 31, height + 17))
        picture.save(folder / f"{k:02d}.{('jpg', 'png', 'webp', 'jpeg', 'PNG')[k % 5]}")
    picture = Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8))
    picture.convert("L").save(folder / "gray.png")
    picture.convert("P").save(folder / "palette.png")
    picture.convert("RGBA").save(folder / "alpha.png")
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(rng.integers(0, 65536, (90, 120)).astype(np.uint16)).save(folder / "sixteen.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "turned.jpg", exif=exif)
    (folder / "whole.jpg").write_bytes((folder / "00.jpg").read_bytes()[:-900])  # cut short
    (folder / "notes.txt").write_text("no picture, and not named like one")


def test_detail_scores_fifty_mixed_pictures_and_names_the_broken_one(tmp_path):
    write_mixed(tmp_path)
    shown = subprocess.run([sys.executable, "metrics.py", "detail", tmp_path, "--workers", "2", "--cache", tmp_path / "cache"],
                           cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 1
    assert [line for line in shown.stderr.splitlines() if line.startswith("error")] == [
        line for line in shown.stderr.splitlines() if f"{tmp_path}/whole.jpg: not a whole picture" in line]
    lines = shown.stdout.splitlines()
    assert len(lines) == 1 + 49 + 1 and lines[-1].startswith("all 49: means, ratio of sums")
    row = next(line.split() for line in lines if "turned.jpg" in line)
    assert row[1:3] == ["90", "120"]


def test_detail_reports_the_means_and_the_ratio_of_sums(command):
    code, out, errors = command("detail", DATA / "pictures", "--json", "--workers", 1)
    report = json.loads(out)
    assert code == 0 and not errors and not report["errors"] and len(report["pictures"]) == 9
    for row in report["pictures"]:
        pixels = golden_picture(Path(row["picture"]).name)
        assert row["jpeg_bytes"] == jpeg_size(pixels) and row["ratio"] == compression_ratio(pixels)
        assert row["glcm_release"] == glcm_score(pixels) and row["glcm_entropy"] == glcm_score(pixels, "entropy")
    rows, whole = report["pictures"], report["all"]
    assert whole["ratio"] == pytest.approx(sum(r["raw_bytes"] for r in rows) / sum(r["jpeg_bytes"] for r in rows), rel=1e-15)
    assert whole["glcm_release"] == pytest.approx(np.mean([r["glcm_release"] for r in rows]), rel=1e-12)


def test_detail_resumes_and_sees_a_changed_picture(command, tmp_path, monkeypatch):
    for k, name in enumerate(("astronaut", "noise")):
        Image.fromarray(golden_picture(name)).save(tmp_path / f"{k}.png")
    first = command("detail", tmp_path, "--json")
    measured = []
    monkeypatch.setattr(metrics, "jpeg_size", lambda pixels: measured.append(pixels.shape) or jpeg_size(pixels))
    assert command("detail", tmp_path, "--json") == first and not measured
    Image.fromarray(golden_picture("coffee")).save(tmp_path / "1.png")
    again = json.loads(command("detail", tmp_path, "--json")[1])
    assert measured == [(384, 512, 3)] and again["pictures"][1]["width"] == 512


def test_detail_writes_maps_over_the_picture(command, tmp_path):
    code, _, _ = command("detail", DATA / "pictures" / "coffee.png", "--maps", tmp_path / "maps")
    assert code == 0
    sheet = Image.open(tmp_path / "maps" / "coffee_png.jpg")
    assert sheet.size == (4 * 480, 360 + 34)
    colours = heat(np.array([[-1.0, 0, 1.5, 3, 9]]), 0, 3)[0].astype(int)
    assert (np.diff(colours.sum(1)) >= 0).all() and (colours[0] == colours[1]).all() and (colours[3] == colours[4]).all()
    assert detail_sheet(golden_picture("gradient")[:65, :200], "odd").width == 4 * 480


@pytest.mark.parametrize("kind, right", [("alpha", True), ("sixteen", True), ("cmyk", True), ("float", False), ("small", False)])
def test_detail_reads_other_pictures_right_or_says_one_line(command, tmp_path, kind, right):
    pixels = golden_picture("astronaut")
    path = tmp_path / f"{kind}.{'tif' if kind in ('cmyk', 'float') else 'png'}"
    expected = pixels
    if kind == "alpha":  # half transparent counts as laid over white
        Image.fromarray(np.dstack([pixels, np.full(pixels.shape[:2], 128, np.uint8)])).save(path)
        expected = np.asarray(Image.alpha_composite(Image.new("RGBA", (256, 256), "white"), Image.open(path)).convert("RGB"))
    elif kind == "sixteen":
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(path)
        expected = np.repeat(pixels[..., :1], 3, axis=2)
    elif kind == "cmyk":
        Image.fromarray(pixels).convert("CMYK").save(path)
        expected = np.asarray(Image.open(path).convert("RGB"))
    elif kind == "float":
        Image.fromarray(pixels[..., 0].astype(np.float32)).save(path)
    else:
        Image.fromarray(pixels[:40, :30]).save(path)
    code, out, errors = command("detail", path, "--json")
    rows = json.loads(out)["pictures"]
    if right:
        assert code == 0 and not errors and rows[0]["jpeg_bytes"] == jpeg_size(expected)
    else:
        says = {"float": "floating-point gray has no agreed white", "small": "30x40 pixels: smaller than one patch of 64x64"}[kind]
        assert code == 1 and not rows and len(errors) == 1 and str(path) in errors[0] and says in errors[0]


def test_wrong_paths_are_one_line(command, tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments, says in (((tmp_path / "empty",), "no picture in this folder"), ((tmp_path / "nowhere",), "no such file or folder"),
                            ((DATA / "pictures", "--workers", 0), "at least 1")):
        code, out, errors = command("detail", *arguments)
        assert code == 1 and not out and len(errors) == 1 and says in errors[0]
    (tmp_path / "noise.png").write_bytes((DATA / "pictures" / "noise.png").read_bytes())
    code, _, errors = command("detail", DATA / "pictures", tmp_path / "noise.png", "--maps", tmp_path / "maps")
    assert code == 1 and len(errors) == 1 and "the same name" in errors[0]
    (tmp_path / "cache").write_text("a file where the folder should be")
    code, _, errors = command("detail", DATA / "pictures" / "noise.png")
    assert code == 1 and len(errors) == 1 and "name another folder with --cache" in errors[0]


def test_pair_compares_two_pictures_and_names_the_weights_it_lacks(command, tmp_path):
    a, b = DATA / "pictures" / "astronaut.png", DATA / "pictures" / "astronaut__blur1.2.png"
    code, out, _ = command("pair", a, b, "--json", "--weights", tmp_path, cache=False)
    report = json.loads(out)
    assert code == 0 and report["psnr"] == pytest.approx(25.1274750134285) and report["ssim"] == pytest.approx(0.8640477995981516)
    assert "LPIPS left out" in report["notes"][0] and "vgg16-397923af.pth" in report["notes"][0] and "https://" in report["notes"][0]
    assert json.loads(command("pair", a, a, "--json", cache=False)[1])["psnr"] is None  # infinite
    code, _, errors = command("pair", a, DATA / "pictures" / "coffee.png", cache=False)
    assert code == 1 and errors == ["error: the reference has 256x256 pixels and the picture 512x384: they are compared pixel by pixel"]


def test_correlate_reproduces_scipy_and_takes_the_reciprocal_of_the_ratio(command, tmp_path):
    stats = pytest.importorskip("scipy.stats")
    table = tmp_path / "ratings.csv"
    table.write_text("picture,rating,glcm,ratio\na,7,0.71,9\nb,3,0.30,31\nc,7,0.69,12\nd,9,0.80,8\ne,2,0.33,31\nf,5,0.5,15\n")
    code, out, _ = command("correlate", table, "--json", cache=False)
    glcm, ratio = json.loads(out)["metrics"]
    rating = [7, 3, 7, 9, 2, 5]
    assert code == 0 and ratio["metric"] == "1/ratio"
    for row, values in ((glcm, [0.71, 0.30, 0.69, 0.80, 0.33, 0.5]), (ratio, [1 / v for v in (9, 31, 12, 8, 31, 15)])):
        assert row["srcc"] == pytest.approx(stats.spearmanr(values, rating).statistic, abs=1e-12)
        assert row["plcc"] == pytest.approx(stats.pearsonr(values, rating).statistic, abs=1e-12)
        assert row["plcc_low"] <= row["plcc"] <= row["plcc_high"]
    shown = command("correlate", table, cache=False)[1]
    assert "1/ratio" in shown and "6 ratings" in shown


@pytest.mark.parametrize("text, says", [
    ("", 'among them "rating"'),
    ("score,glcm\n1,2\n", 'among them "rating"'),
    ("rating,glcm\n", 'among them "rating"'),
    ("rating,picture\n1,a\n2,b\n", "no column of numbers beside rating"),
    ("rating,glcm\n1,2\n2,\n3,4\n", ":3: column glcm holds no number"),
    ("rating,glcm\n1,2\n2,3\nx,4\n", ":4: column rating holds no number"),
    ("rating,glcm\n1,2,3\n2,3\n", ":2: column without a name"),
    ("rating,glcm\n1,2\n2,2\n", "glcm: all numbers of one list are equal"),
    ("rating,ratio\n1,2\n2,0\n", "1/ratio"),
    ("rating,glcm\n1,2\n", "at least 2"),
    (b"\xff\xfe\x00", "not a CSV in UTF-8"),
])
def test_wrong_ratings_are_one_line(command, tmp_path, text, says):
    table = tmp_path / "ratings.csv"
    table.write_bytes(text if isinstance(text, bytes) else text.encode())
    code, out, errors = command("correlate", table, cache=False)
    assert code == 1 and not out and len(errors) == 1 and str(table) in errors[0] and says in errors[0]


class FakeInception:
    """Three coarse numbers a picture, in place of 2048 fine ones; counts the pictures it has seen."""

    seen = 0

    def __call__(self, images):
        type(self).seen += len(images)
        return images.float().mean((2, 3)).repeat(1, 2) / 255


@pytest.fixture
def fake_networks(monkeypatch, tmp_path):
    """A weights folder with empty files under the official names, and networks that need nothing of them."""
    (tmp_path / "weights").mkdir()
    for name in perceptual.WEIGHTS:
        (tmp_path / "weights" / name).touch()

    class FakeCLIP:
        def score(self, images, captions):
            return torch.tensor([float(len(captions[0]))])

    monkeypatch.setattr(FakeInception, "seen", 0)
    monkeypatch.setattr(perceptual.Inception, "load", lambda *_: FakeInception())
    monkeypatch.setattr(perceptual.CLIP, "load", lambda *_: FakeCLIP())
    monkeypatch.setattr(perceptual.CLIPImage, "load", lambda *_: type("", (), {"embed": lambda self, images, crop: images[:, 0, 0, :1]})())
    monkeypatch.setattr(perceptual.Aesthetics, "load", lambda *_: lambda embedding: embedding[:, 0].float() / 50)
    monkeypatch.setattr(perceptual.LPIPS, "load", lambda *_: lambda a, b: (a - b).abs().mean((1, 2, 3)))
    return tmp_path / "weights"


def two_sets(tmp_path, generated=5, reference=6, side=320):
    for name, count in (("generated", generated), ("reference", reference)):
        (tmp_path / name).mkdir()
        for k in range(count):
            rng = np.random.default_rng([k, len(name)])
            noise = rng.integers(0, 256 - 30 * k, (side, side + 8, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / name / f"{k}.png")
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": f"{k}.png", "text": "x" * (k + 1)}) for k in range(6)))
    return tmp_path / "generated", tmp_path / "reference", tmp_path / "metadata.jsonl"


def test_set_measures_everything_keeps_the_reference_and_prints_n(command, fake_networks, tmp_path):
    generated, reference, listing = two_sets(tmp_path)
    arguments = ("set", generated, "--reference", reference, "--prompts", listing, "--weights", fake_networks, "--device", "cpu", "--json")
    code, out, errors = command(*arguments)
    report = json.loads(out)
    assert code == 0 and not errors
    assert FakeInception.seen == 2 * (5 + 6)  # the picture and the one patch in it
    assert report["clip_score"] == 3.0 and report["generated"] == 5 and report["reference"] == 6
    assert report["fid"] > 0 and report["patch_fid"] > 0 and report["aesthetics"] > 0 and report["ratio"] > 1
    notes = "\n".join(report["notes"])
    assert "fid: N = 5 generated, 6 reference, 320 px; bias dominates it below 2049" in notes and "1 of 6 prompts have no picture" in notes
    assert command(*arguments)[1] == out and FakeInception.seen == 22
    shown = command(*arguments[:-1])[1]
    assert shown.startswith("5 generated, 6 reference pictures") and "clip_score" in shown


def test_set_scores_the_rest_when_weights_are_missing(command, tmp_path):
    generated, reference, listing = two_sets(tmp_path)
    code, out, _ = command("set", generated, "--reference", reference, "--prompts", listing, "--weights", tmp_path / "none", "--json")
    report = json.loads(out)
    notes = "\n".join(report["notes"])
    assert code == 0 and report["glcm_release"] > 0 and "fid" not in report
    for name in ("weights-inception-2015-12-05-6726825d.pth", "ViT-B-16.pt", "ViT-L-14.pt"):
        assert name in notes and perceptual.WEIGHTS[name].url in notes and perceptual.WEIGHTS[name].sha256 in notes
    report = json.loads(command("set", generated, "--weights", tmp_path / "none", "--json")[1])
    assert "FID left out: give --reference DIR" in "\n".join(report["notes"])


def test_set_names_a_broken_picture_and_scores_the_rest(command, fake_networks, tmp_path):
    generated, reference, listing = two_sets(tmp_path)
    for path in (generated / "3.png", reference / "1.png"):
        path.write_bytes(path.read_bytes()[:1000])
    code, out, errors = command("set", generated, "--reference", reference, "--weights", fake_networks, "--json")
    report = json.loads(out)
    assert code == 1 and len(errors) == 2 and "3.png" in errors[0] and "1.png" in errors[1]
    assert report["generated"] == 4 and "N = 4 generated, 5 reference" in "\n".join(report["notes"])


def test_set_says_one_line_for_one_picture_and_for_nan_features(command, fake_networks, tmp_path, monkeypatch):
    generated, reference, _ = two_sets(tmp_path, generated=1)
    code, out, errors = command("set", generated, "--reference", reference, "--weights", fake_networks, "--json")
    assert code == 1 and "fid" not in json.loads(out) and len(errors) == 1
    assert "FID left out" in errors[0] and "at least two pictures" in errors[0]
    monkeypatch.setattr(FakeInception, "__call__", lambda self, images: torch.full((len(images), 6), float("nan")))
    (generated / "more.png").write_bytes((generated / "0.png").read_bytes())
    code, out, errors = command("set", generated, "--reference", reference, "--weights", fake_networks, "--json", "--res", 300)
    assert code == 1 and len(errors) == 1 and "hold NaN or Inf" in errors[0] and json.loads(out)["glcm_release"] > 0


def test_prompts_are_paired_by_name_or_in_order_or_refused(command, fake_networks, tmp_path):
    generated, _, listing = two_sets(tmp_path, generated=2)
    rows = [{"text": "one"}, {"text": "three letters more"}]
    listing.write_text("\n".join(map(json.dumps, rows)))
    arguments = ("set", generated, "--prompts", listing, "--weights", fake_networks, "--json")
    report = json.loads(command(*arguments)[1])
    assert report["clip_score"] == (3 + 18) / 2 and "paired in order" in "\n".join(report["notes"])
    for text, says in (("\n".join(map(json.dumps, rows * 2)), "4 prompts for 2 pictures"), ('{"file_name": "0.png"}', ":1: each line is"),
                       ("plain words", ":1: each line is"), ("[1]", ":1: each line is")):
        listing.write_text(text)
        code, out, errors = command(*arguments)
        assert code == 1 and not out and len(errors) == 1 and says in errors[0] and str(listing) in errors[0]


def test_vae_report_of_the_embedded_autoencoder(command, fake_networks, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("astronaut", "coffee"):
        Image.fromarray(golden_picture(name)[:, :250]).save(folder / f"{name}.png")
    found = {}
    for factor in (8, 16):
        arguments = ("vae", folder, "--model", "tiny-sd3", "--factor", factor, "--weights", fake_networks, "--device", "cpu")
        code, out, errors = command(*arguments, "--json")
        found[factor] = json.loads(out)
        assert code == 0 and not errors
    row = found[16]["pictures"][0]
    assert row["width"] % 128 == 0 or row["width"] % 16 == 0
    assert found[8]["mean"]["psnr"] > found[16]["mean"]["psnr"] > 15
    assert all(name in found[16]["mean"] for name in ("rfid", "nmse", "ssim", "lpips"))
    shown = command(*arguments)[1]
    assert "rFID" in shown and "mean of 2, factor 16" in shown
    code, _, errors = command("vae", folder, "--res", 100, "--weights", fake_networks)
    assert code == 1 and len(errors) == 1 and "must be a multiple of" in errors[0]
    code, _, errors = command("vae", folder, "--model", "none", "--weights", fake_networks)
    assert code == 1 and len(errors) == 1 and "no such folder" in errors[0]


def test_vae_report_without_weights_names_them_and_goes_on(command, tmp_path):
    Image.fromarray(golden_picture("astronaut")).save(tmp_path / "a.png")
    code, out, _ = command("vae", tmp_path, "--model", "tiny-sd3", "--res", 64, "--weights", tmp_path / "none", "--device", "cpu", "--json")
    report = json.loads(out)
    assert code == 0 and report["pictures"][0]["width"] == 64 and report["mean"]["psnr"] > 10
    assert "weights-inception" in report["notes"][0] and "vgg16" in report["notes"][1]
