"""The JPEG encoder: goldens, Pillow's bytes on random and edge shapes at every quality, the map of bits, refusals."""

import io

import numpy as np
import pytest
from pictures import GOLDEN, golden_picture, random_picture
from PIL import Image

from scores.jpeg import SUBSAMPLING, compression_ratio, jpeg_bits, jpeg_encode, jpeg_size


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
        gray = np.ascontiguousarray(pixels[..., 0])
        assert jpeg_encode(pixels[..., 0], quality) == pillow_jpeg(gray, quality), (seed, quality)


@pytest.mark.parametrize("height, width", [(1, 1), (1, 400), (400, 1), (8, 8), (9, 17), (16, 16), (17, 33), (7, 24),
                                           (24, 7)])
def test_jpeg_equals_pillow_at_every_quality_on_edge_shapes(height, width):
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    for quality in range(1, 101):
        assert jpeg_encode(pixels, quality) == pillow_jpeg(pixels, quality), quality
    assert jpeg_encode(pixels) == pillow_jpeg(pixels, 95)


def test_jpeg_chunks_join(monkeypatch):
    pixels = golden_picture("astronaut")
    monkeypatch.setattr("scores.jpeg.CHUNK", 1)  # one row of MCUs at a time: levels and bits go over the seams
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


@pytest.mark.parametrize("pixels", [np.zeros((64, 64, 4), np.uint8), np.zeros((64, 64, 3)), np.zeros(64, np.uint8)])
def test_jpeg_refuses_other_pixels(pixels):
    with pytest.raises(ValueError, match="uint8 pixels"):
        jpeg_size(pixels)
