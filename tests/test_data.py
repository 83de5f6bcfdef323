"""Data folders: what a listing may say, pictures of every kind and the broken ones, squares, captions, the text cache, the script."""

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

import data
from checkpoint import save
from data import (
    Embeddings,
    Item,
    Latents,
    Pictures,
    aspect_sizes,
    batch_of_step,
    nearest_size,
    picture_size,
    read_folder,
    read_picture,
    resize_short_side,
    sizes_of,
    upright_size,
    vary_caption,
)
from mmdit import MMDiTConfig, new_mmdit
from models import make_tiny
from text import SD3Text
from train_vae import new_vae
from vae import VAEConfig, to_image, to_pixels

ROOT = Path(__file__).parents[1]
CAPTIONS = ["a red boat on a quiet lake at dawn", "two old oak trees in the fog", "a street in the rain, seen from above",
            "snow on the roofs of a small town", "a bowl of ripe lemons on a wooden table"]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def listing(folder: Path, *rows: object) -> Path:
    """Write metadata.jsonl; text goes in as it is, everything else as JSON."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for k in range(len(CAPTIONS)):
        Image.fromarray(noise(40, 56, k)).save(folder / f"{k}.png")
    return listing(folder, *({"file_name": f"{k}.png", "text": caption} for k, caption in enumerate(CAPTIONS)))


@pytest.fixture(scope="module")
def model(photos, tmp_path_factory):
    """A folder with text encoders and tokenizers, as models/make_tiny.py makes it."""
    folder = tmp_path_factory.mktemp("model")
    vae = new_vae(VAEConfig((8, 8, 16, 36), (8, 8, 16, 36), 1, 2, 16, 1), seed=0)
    save(folder / "vae.safetensors", vae.state_dict(), {"norm_groups": 1, "scale_factor": 1.0, "shift_factor": 0.0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_tiny.py", f"--data={photos}", f"--vae={folder}/vae.safetensors", f"--out={folder}/tiny"])
        make_tiny.main()
    return folder / "tiny"


@pytest.fixture
def own_model(model, tmp_path):
    """A copy of the encoders and tokenizers, to be tampered with."""
    for part in model.glob("t*"):
        shutil.copytree(part, tmp_path / "model" / part.name)
    return tmp_path / "model"


# ---- the listing

def test_listing_gives_pictures_and_captions_in_its_order(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "sub/a.jpg"):
        Image.fromarray(noise(4, 4)).save(tmp_path / name)
    listing(tmp_path, {"file_name": "sub/a.jpg", "text": " first ", "alt": ["another", "a third"], "width": 4}, "  ",
            {"file_name": "b.png", "text": "größer\u2028\x85 猫"})
    first, second = read_folder(str(tmp_path))
    assert (first.path, first.captions) == (tmp_path / "sub" / "a.jpg", (" first ", "another", "a third"))
    assert (second.path, second.captions) == (tmp_path / "b.png", ("größer\u2028\x85 猫",))


@pytest.mark.parametrize("start, end, separator", [("\ufeff", "\n", "\n"), ("", "\r\n", "\r\n"), ("", "", "\n\n")])
def test_listing_may_come_from_any_editor(photos, tmp_path, start, end, separator):
    rows = [json.dumps({"file_name": f"{k}.png", "text": "line\u2028separator"}, ensure_ascii=False) for k in range(2)]
    for k in range(2):
        shutil.copy(photos / f"{k}.png", tmp_path)
    (tmp_path / "metadata.jsonl").write_bytes((start + separator.join(rows) + end).encode())
    assert [item.captions for item in read_folder(tmp_path)] == [("line\u2028separator",)] * 2


GOOD = {"file_name": "0.png", "text": "fine"}


@pytest.mark.parametrize("row, says", [
    ('{"file_name": "1.png", "text": "no end', "JSONDecodeError"),
    ("plain words", "JSONDecodeError"),
    (["1.png", "a list"], "TypeError"),
    ("7", "TypeError"),
    ({"text": "no name"}, "KeyError: 'file_name'"),
    ({"file_name": "1.png"}, "KeyError: 'text'"),
    ({"file_name": "1.png", "text": ""}, "text that is not empty"),
    ({"file_name": "1.png", "text": " \t"}, "text that is not empty"),
    ({"file_name": "1.png", "text": None}, "text that is not empty"),
    ({"file_name": "1.png", "text": 5}, "text that is not empty"),
    ({"file_name": "1.png", "text": ["a", "b"]}, "text that is not empty"),
    ({"file_name": 1, "text": "a number as name"}, "text that is not empty"),
    ({"file_name": "", "text": "no name"}, "text that is not empty"),
    ({"file_name": "1.png", "text": "fine", "alt": ["fine", ""]}, '"alt" must be text that is not empty'),
    ({"file_name": "1.png", "text": "fine", "alt": "letters are no captions"}, 'the list "alt"'),
    ({"file_name": "1.png", "text": "fine", "alt": None}, 'the list "alt"'),
    ({"file_name": "gone.png", "text": "fine"}, "no picture 'gone.png'"),
    ({"file_name": ".", "text": "a folder"}, "no picture '.'"),
    ({"file_name": "0.png", "text": "again"}, "'0.png' stands twice"),
    ({"file_name": "./0.png", "text": "again"}, "'./0.png' stands twice"),
    ({"file_name": "../outside.png", "text": "fine"}, "'../outside.png' leads out of the folder"),
    ({"file_name": "sub/../../outside.png", "text": "fine"}, "leads out of the folder"),
    ({"file_name": "/etc/hostname", "text": "fine"}, "'/etc/hostname' leads out of the folder"),
])
def test_wrong_line_is_named_with_its_number(photos, tmp_path, row, says):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("pictures/0.png", "pictures/1.png", "outside.png"):
        shutil.copy(photos / "0.png", tmp_path / name)
    listing(folder, GOOD, "", row)
    with pytest.raises(ValueError) as refusal:
        read_folder(folder)
    message = str(refusal.value)
    assert message.startswith(f"{folder}/metadata.jsonl:3: ") and says in message and "\n" not in message


def test_listing_that_is_empty_absent_or_no_text_is_refused(tmp_path):
    for missing in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="metadata.jsonl: not found; a data folder holds"):
            read_folder(missing)
    for content in (b"", b"\n \n"):
        (tmp_path / "metadata.jsonl").write_bytes(content)
        with pytest.raises(ValueError, match="metadata.jsonl: empty"):
            read_folder(tmp_path)
    (tmp_path / "metadata.jsonl").write_bytes('{"file_name": "0.png", "text": "größer"}'.encode("latin-1"))
    with pytest.raises(ValueError, match="metadata.jsonl: not UTF-8"):
        read_folder(tmp_path)


# ---- pictures

def test_gray_and_bilevel_become_rgb(tmp_path):
    gray = noise(6, 9)[..., 0]
    Image.fromarray(gray).save(tmp_path / "gray.png")
    assert np.array_equal(np.array(read_picture(tmp_path / "gray.png")), np.repeat(gray[..., None], 3, 2))
    Image.fromarray(gray > 127).save(tmp_path / "bilevel.png")
    assert np.array_equal(np.array(read_picture(tmp_path / "bilevel.png"))[..., 1], np.where(gray > 127, 255, 0))


def test_transparency_is_laid_over_white(tmp_path):
    pixels = np.zeros((1, 3, 4), dtype=np.uint8)
    pixels[0, :, 0], pixels[0, :, 3] = 200, (0, 255, 102)
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    part = round(200 * 0.4 + 255 * 0.6), round(255 * 0.6), round(255 * 0.6)
    assert np.array(read_picture(tmp_path / "rgba.png")).tolist() == [[[255, 255, 255], [200, 0, 0], list(part)]]

    palette = Image.new("P", (3, 1))
    palette.putpalette([10, 20, 30, 200, 100, 0, 0, 0, 255])
    palette.putdata([0, 1, 2])
    palette.save(tmp_path / "palette.png")
    assert np.array(read_picture(tmp_path / "palette.png")).tolist() == [[[10, 20, 30], [200, 100, 0], [0, 0, 255]]]
    palette.save(tmp_path / "clear.png", transparency=1)
    assert np.array(read_picture(tmp_path / "clear.png")).tolist() == [[[10, 20, 30], [255, 255, 255], [0, 0, 255]]]

    Image.fromarray(np.array([[[90, 0], [90, 255]]], dtype=np.uint8), "LA").save(tmp_path / "la.png")
    assert np.array(read_picture(tmp_path / "la.png"))[0, :, 0].tolist() == [255, 90]
    Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8)).save(tmp_path / "key.png", transparency=(4, 5, 6))
    assert np.array(read_picture(tmp_path / "key.png")).tolist() == [[[1, 2, 3], [255, 255, 255]]]


def test_cmyk_becomes_rgb(tmp_path):
    for name, options in (("ink.tif", {}), ("ink.jpg", {"quality": 100})):
        Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / name, **options)
        picture = read_picture(tmp_path / name)
        assert picture.mode == "RGB" and np.abs(np.array(picture, dtype=int) - (255, 0, 0)).max() <= 4


def test_16_bit_gray_keeps_its_range(tmp_path):
    levels = np.array([[0, 257, 128, 129, 33000, 65535]], dtype=np.uint16)
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(levels).save(tmp_path / name)
        picture = read_picture(tmp_path / name)
        assert picture.mode == "RGB" and np.array(picture)[0].tolist() == [[v] * 3 for v in (0, 1, 0, 1, 128, 255)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_pictures_come_upright(tmp_path, orientation):
    upright = noise(8, 12)
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
              6: upright.transpose(1, 0, 2)[::-1], 7: upright.transpose(1, 0, 2)[::-1, ::-1], 8: upright.transpose(1, 0, 2)[:, ::-1]}
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored[orientation])).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.array(read_picture(tmp_path / "turned.png")), upright)
    assert picture_size(tmp_path / "turned.png") == ((12, 8) if orientation < 5 else (8, 12))  # as stored
    exif[0x0112] = 6
    Image.fromarray(noise(8, 12)[..., 0].astype(np.uint16)).save(tmp_path / "deep.png", exif=exif)
    assert read_picture(tmp_path / "deep.png").size == (8, 12)


def test_webp_and_animated_gif(tmp_path):
    pixels = noise(10, 14)
    Image.fromarray(pixels).save(tmp_path / "still.webp", lossless=True)
    assert np.array_equal(np.array(read_picture(tmp_path / "still.webp")), pixels)
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert np.array(read_picture(tmp_path / "moving.gif"))[0, 0].tolist() == [255, 0, 0]


def refusal_of(path: Path, function=read_picture) -> str:
    with pytest.raises(ValueError) as refusal:
        function(path)
    message = str(refusal.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


def test_what_is_no_picture_is_refused_by_name(tmp_path):
    (tmp_path / "text.jpg").write_text("this is no picture\n" * 9)
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    for name, size in (("text.jpg", 171), ("empty.png", 0)):
        for function in (read_picture, picture_size):
            assert f"not a whole picture ({size} bytes; cannot identify" in refusal_of(tmp_path / name, function)
    assert "directory" in refusal_of(tmp_path / "folder.png") and "No such file" in refusal_of(tmp_path / "gone.png")
    assert "No such file" in refusal_of(tmp_path / "gone.png", picture_size)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "tif"])
def test_truncated_pictures_are_refused_by_name(tmp_path, suffix):
    Image.fromarray(noise(64, 64)).save(tmp_path / f"whole.{suffix}")
    content, cut = (tmp_path / f"whole.{suffix}").read_bytes(), tmp_path / f"cut.{suffix}"
    for share in (0.1, 0.5, 0.9):
        cut.write_bytes(content[:int(len(content) * share)])
        assert "not a whole picture" in refusal_of(cut)


def test_gray_in_floating_point_is_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "float.tif")
    assert "8 or 16 bit" in refusal_of(tmp_path / "float.tif")


def header_only(file: Path, width: int, height: int) -> Path:
    """A PNG that claims a size and holds no pixel."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b""))
    return file


def test_huge_pictures_are_refused_from_the_header(tmp_path, monkeypatch):
    def decoded(self):
        raise AssertionError("pixels were asked for")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)
    huge = header_only(tmp_path / "huge.png", 30_000, 30_000)
    for function in (read_picture, picture_size):
        assert "30000x30000 pixels; at most 400,000,000 are read" in refusal_of(huge, function)
    assert upright_size(header_only(tmp_path / "wide.png", 400, 300)) == (400, 300)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow would warn above 89 million pixels and refuse above 179 million
        assert picture_size(header_only(tmp_path / "large.png", 20_000, 20_000)) == (20_000, 20_000)


def test_long_and_narrow_is_fine(tmp_path):
    Image.new("1", (30_000, 200)).save(tmp_path / "long.png")
    assert read_picture(tmp_path / "long.png").size == picture_size(tmp_path / "long.png") == (30_000, 200)


def test_the_limit_of_pillow_is_left_as_it_was(tmp_path):
    said = subprocess.run([sys.executable, "-c", "from PIL import Image; a = Image.MAX_IMAGE_PIXELS; import data; "
                           "print(a == Image.MAX_IMAGE_PIXELS)"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert said.stdout == "True\n", said.stderr
    limit = Image.MAX_IMAGE_PIXELS
    Image.fromarray(noise(4, 4)).save(tmp_path / "good.png")
    read_picture(tmp_path / "good.png")
    refusal_of(header_only(tmp_path / "bad.png", 30_000, 30_000))
    refusal_of(tmp_path / "gone.png")
    assert Image.MAX_IMAGE_PIXELS == limit


# ---- from pixels to squares

@pytest.mark.parametrize("width, height", [(101, 67), (67, 101), (64, 64), (3, 1000), (1000, 3), (63, 64), (7, 5), (4099, 4098)])
def test_short_side_is_exact(width, height):
    for res in (32, 33, 64):
        resized = resize_short_side(Image.new("RGB", (width, height)), res)
        assert min(resized.size) == res and (resized.width >= resized.height) == (width >= height)
        assert abs(max(resized.size) - res * max(width, height) / min(width, height)) <= 0.5


def test_picture_of_the_right_size_is_not_changed():
    pixels = noise(32, 48)
    assert np.array_equal(np.array(resize_short_side(Image.fromarray(pixels), 32)), pixels)


def test_pixels_to_image_and_back_is_exact():
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    pixels[..., 1] = pixels[::-1, :, 1]
    image = to_image(pixels)
    assert image.shape == (3, 16, 16) and image.dtype == torch.float32 and (image.min(), image.max()) == (-1, 1)
    assert np.array_equal(to_pixels(image), pixels) and to_pixels(image).dtype == np.uint8
    assert to_pixels(torch.tensor([-3.0, -1 + 1.49 / 127.5, 7.0]).reshape(3, 1, 1)).tolist() == [[[0, 1, 255]]]  # clamped, rounded


@pytest.fixture
def gradient(tmp_path):
    """One 40 x 64 picture whose red counts columns and green counts rows."""
    rows, columns = np.mgrid[:40, :64]
    Image.fromarray(np.stack((columns, rows, 0 * rows), 2).astype(np.uint8)).save(tmp_path / "gradient.png")
    return Pictures([tmp_path / "gradient.png"])


def test_square_is_a_function_of_the_generator_and_stays_inside(gradient):
    corners, mirrored = set(), 0
    for seed in range(200):
        torch.manual_seed(seed)
        square = gradient.square(0, 40, 32, seeded(seed))
        assert square.shape == (3, 32, 32) and torch.equal(square, gradient.square(0, 40, 32, seeded(seed)))
        red, green = (to_pixels(square)[..., c].astype(int) for c in range(2))
        step = red[0, 1] - red[0, 0]
        assert abs(step) == 1 and (np.diff(red, axis=1) == step).all() and (np.diff(green, axis=0) == 1).all()
        mirrored += step < 0
        corners.add((green.min(), red.min()))
    tops, lefts = zip(*corners, strict=True)
    assert (min(tops), max(tops)) == (0, 8) and (min(lefts), max(lefts)) == (0, 32)  # the edges are reached, nothing beyond
    assert 70 < mirrored < 130


def test_square_without_flip_shows_the_same_place(gradient):
    for seed in range(20):
        flipped, plain = (gradient.square(0, 40, 32, seeded(seed), flip) for flip in (True, False))
        assert plain[0, 0, 0] < plain[0, 0, 1]
        assert torch.equal(flipped, plain) or torch.equal(flipped, plain.flip(2))


def test_central_square_and_the_only_square(gradient):
    middle = to_pixels(gradient.central_square(0, 40))
    assert middle.shape == (40, 40, 3) and (middle[0, 0, 0], middle[0, -1, 0]) == (12, 51)
    assert len(gradient) == 1 and gradient.square(0, 20, 20, seeded(0)).shape == (3, 20, 20)


def test_cache_is_bounded_and_keeps_what_was_used_last(photos, monkeypatch):
    size = 40 * 56 * 3
    monkeypatch.setattr(data, "CACHE_BYTES", 2 * size)
    reads, read = [], data.read_picture
    monkeypatch.setattr(data, "read_picture", lambda path: reads.append(path.stem) or read(path))
    pictures = Pictures([photos / f"{k}.png" for k in range(4)])
    for k in (0, 1, 0, 2, 0, 1, 3):  # when 2 comes, 1 goes: 0 was used since
        assert np.array_equal(pictures.resized(k, 40), noise(40, 56, k))
        assert pictures._bytes == sum(kept.nbytes for kept in pictures._kept.values()) <= 2 * size
    assert "".join(reads) == "01213"
    monkeypatch.setattr(data, "CACHE_BYTES", 1)
    pictures.resized(2, 40)
    assert list(pictures._kept) == [(2, 40, 40)] and pictures._bytes == size


# ---- sizes, order

def test_crop_covers_its_size_and_centre_is_the_middle(gradient):
    for seed in range(20):
        red = to_pixels(gradient.crop(0, 20, 64, seeded(seed), flip=False))[..., 0]
        assert red.shape == (20, 64) and np.array_equal(red[0], np.arange(64))  # as wide as the picture: only rows are chosen
    middle = to_pixels(gradient.central_crop(0, 20, 64))
    assert (middle[0, 0, 1], middle[-1, 0, 1]) == (10, 29)
    assert to_pixels(gradient.central_crop(0, 20, 32)).shape == (20, 32, 3)  # scaled down by two


def test_aspects_have_about_the_same_number_of_pixels_and_sides_that_divide():
    sizes = aspect_sizes(1024, 32)
    assert len(sizes) == 11 and (1024, 1024) in sizes
    for height, width in sizes:
        assert height % 32 == width % 32 == 0 and abs(height * width / 1024**2 - 1) < 0.05
        assert nearest_size(sizes, width, height) == (height, width)
    assert nearest_size(sizes, 5000, 1000) == max(sizes, key=lambda size: size[1] / size[0])
    assert max(map(max, aspect_sizes(1024, 32, most=1200))) <= 1200


def test_turned_picture_goes_by_its_upright_shape(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(40, 80)).save(tmp_path / "turned.png", exif=exif)
    assert upright_size(tmp_path / "turned.png") == read_picture(tmp_path / "turned.png").size == (40, 80)
    item = Item(tmp_path / "turned.png", ("a picture",))
    ((height, width),) = sizes_of([item], 32, 16, 1000, True)
    assert height > width
    with pytest.raises(ValueError, match="turned.png: its short side is 40 px, below --res 48"):
        sizes_of([item], 48, 16, 1000, False)
    with pytest.raises(ValueError, match="turned.png: 40x80 px do not cover"):
        sizes_of([item], 64, 16, 1000, True)


def test_every_epoch_shows_every_picture_and_is_a_function_of_the_seed():
    sizes = [(64, 64)] * 7
    epochs = [[batch_of_step(sizes, 3, 5, step) for step in range(3 * k, 3 * k + 3)] for k in range(4)]
    for epoch in epochs:
        drawn = [index for batch in epoch for index in batch]
        assert len(drawn) == 9 and set(drawn) == set(range(7))
    assert len({str(epoch) for epoch in epochs}) == 4
    assert epochs[0] == [batch_of_step(sizes, 3, 5, step) for step in range(3)] != [batch_of_step(sizes, 3, 6, step) for step in range(3)]


def test_batch_has_one_size_and_small_sizes_are_repeated():
    sizes = [(64, 64), (32, 96), (64, 64), (96, 32), (64, 64)]
    batches = [batch_of_step(sizes, 2, 0, step) for step in range(4)]
    assert all(len({sizes[k] for k in batch}) == 1 for batch in batches)
    assert {k for batch in batches for k in batch} == set(range(5)) and [1, 1] in batches and [3, 3] in batches
    assert batch_of_step([(64, 64)], 5, 0, 9) == [0] * 5


# ---- captions

def test_caption_is_a_function_of_the_generator():
    drawn = [vary_caption(CAPTIONS, seeded(seed), 0.3, 0.1) for seed in range(50)]
    torch.manual_seed(7)
    assert drawn == [vary_caption(CAPTIONS, seeded(seed), 0.3, 0.1) for seed in range(50)] and len(set(drawn)) > 25


def test_captions_are_drawn_evenly_and_dropped_as_asked():
    generator, several = seeded(0), ["one", "two", "three"]
    drawn = [vary_caption(several, generator, 0.0, 0.1) for _ in range(3000)]
    assert abs(drawn.count("") / 3000 - 0.1) < 0.02 and set(drawn) == {"", *several}
    assert all(abs(drawn.count(caption) / 3000 - 0.3) < 0.03 for caption in several)
    assert {vary_caption(several, generator) for _ in range(100)} == set(several)
    assert {vary_caption(several, generator, 0.5, 1.0) for _ in range(20)} == {""}


def test_words_are_dropped_from_every_second_caption():
    words = [f"w{k}" for k in range(40)]
    generator, caption = seeded(0), "  ".join(words)
    drawn = [vary_caption([caption], generator, drop_words=0.25) for _ in range(1000)]
    thinned = [text.split() for text in drawn if text != caption]
    assert abs(len(thinned) / 1000 - 0.5) < 0.05
    assert abs(sum(map(len, thinned)) / len(thinned) - 30) < 0.5
    assert all(text == sorted(text, key=words.index) and set(text) <= set(words) for text in thinned)


def test_one_word_always_stays():
    generator = seeded(0)
    drawn = [vary_caption(["alpha beta gamma"], generator, drop_words=1.0) for _ in range(400)]
    assert set(drawn) == {"alpha beta gamma", "alpha", "beta", "gamma"}
    assert {vary_caption(["alone"], generator, drop_words=0.9) for _ in range(50)} == {"alone"}


# ---- text embeddings

def test_cache_gives_what_the_encoders_give(model, tmp_path):
    embeddings, captions = Embeddings(tmp_path / "cache", model), ["", *CAPTIONS]
    assert embeddings.fill([*captions, CAPTIONS[0]], batch=6) == 6 and embeddings._encoders is None
    context, pooled = SD3Text.load(model).encode(captions)
    again = embeddings.read(captions)
    assert torch.equal(again[0], context) and torch.equal(again[1], pooled) and context.dtype == torch.float32
    order = [3, 0, 3]
    some = embeddings.read([captions[k] for k in order])
    assert torch.equal(some[0], context[order]) and torch.equal(some[1], pooled[order])
    assert len({hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in context}) == 6
    by_two = Embeddings(tmp_path / "other", model)
    by_two.fill(captions, batch=2)
    for one, other in zip(by_two.read(captions), again, strict=True):  # rounding differs with the batch
        assert torch.allclose(one, other, atol=1e-5)


def test_cache_of_another_t5_length_is_not_read(model, tmp_path):
    """Also where the length asked for is one that a family has by itself: an encoder's file may say another."""
    assert len({Embeddings(tmp_path, model, t5_length=length).cache for length in (None, 77, 256, 512)}) == 4


def test_second_fill_encodes_nothing(model, tmp_path, monkeypatch):
    Embeddings(tmp_path, model).fill(CAPTIONS)
    monkeypatch.setattr(SD3Text, "load", None)
    assert Embeddings(tmp_path, model).fill(CAPTIONS[::-1]) == 0


def test_broken_off_fill_goes_on_where_it_was(model, tmp_path, monkeypatch):
    encoded, encode = [], SD3Text.encode

    def broken_off(self, captions):
        if len(encoded) == 2:
            raise KeyboardInterrupt
        encoded.extend(captions)
        return encode(self, captions)

    monkeypatch.setattr(SD3Text, "encode", broken_off)
    with pytest.raises(KeyboardInterrupt):
        Embeddings(tmp_path, model).fill(CAPTIONS, batch=2)
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda source, target: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            Embeddings(tmp_path, model).fill(CAPTIONS, batch=2)
    embeddings = Embeddings(tmp_path, model)
    assert sorted(f.suffix for f in embeddings.cache.iterdir()) == [".safetensors"] * 2  # whole files, nothing temporary
    assert embeddings.fill(CAPTIONS, batch=2) == 3
    assert embeddings.read(CAPTIONS)[0].shape[0] == len(CAPTIONS)


@pytest.mark.parametrize("changed", ["text_encoders/clip_l.safetensors", "text_encoders/t5xxl_fp16.safetensors", "tokenizer_2/vocab.json",
                                     "tokenizer_3/spiece.model"])
def test_cache_of_other_encoders_is_not_read(own_model, tmp_path, changed):
    before = Embeddings(tmp_path / "cache", own_model)
    before.fill(CAPTIONS[:1])
    content = bytearray((own_model / changed).read_bytes())
    content[-9] ^= 1  # the size stays
    (own_model / changed).write_bytes(content)
    after = Embeddings(tmp_path / "cache", own_model)
    assert after.cache != before.cache
    with pytest.raises(FileNotFoundError):
        after.read(CAPTIONS[:1])


def test_cache_does_not_depend_on_transformer_or_place(own_model, tmp_path):
    before = Embeddings(tmp_path / "cache", own_model).cache
    (own_model / "transformer").mkdir()
    (own_model / "transformer" / "config.json").write_text("{}")
    (own_model / "sd3.safetensors").write_bytes(b"another")
    shutil.copytree(own_model, tmp_path / "elsewhere")
    assert before == Embeddings(tmp_path / "cache", own_model).cache == Embeddings(tmp_path / "cache", tmp_path / "elsewhere").cache


# ---- the latent cache

@pytest.fixture
def autoencoder():
    return new_vae(VAEConfig((8, 8, 16, 36), (8, 8, 16, 36), 1, 2, 16, 1), seed=0)


def test_latents_are_encoded_once_for_all_runs(photos, autoencoder, tmp_path, monkeypatch):
    pictures = Pictures([photos / f"{k}.png" for k in range(3)])
    first = Latents(pictures, autoencoder, 16, 2, tmp_path)
    found = [first.moments(k, 32, 32) for k in (0, 1, 0)]
    mean, logvar = autoencoder.moments(pictures.central_crop(0, 32, 32)[None], 16, 2)
    assert torch.equal(found[0][0], mean) and torch.equal(found[0][1], logvar) and torch.equal(found[2][0], mean)
    assert len(list(tmp_path.glob("*/*"))) == 2
    monkeypatch.setattr(autoencoder, "moments", None)
    again = Latents(pictures, autoencoder, 16, 2, tmp_path)
    assert all(torch.equal(a, b) for k in (0, 1) for a, b in zip(again.moments(k, 32, 32), found[k], strict=True))


@pytest.mark.parametrize("changed", ["picture", "weights", "factor", "dilation", "size"])
def test_latents_of_something_else_are_not_read(photos, autoencoder, tmp_path, monkeypatch, changed):
    shutil.copy(photos / "0.png", tmp_path / "0.png")
    Latents(Pictures([tmp_path / "0.png"]), autoencoder, 16, 2, tmp_path / "cache").moments(0, 32, 32)
    if changed == "picture":
        shutil.copy(photos / "1.png", tmp_path / "0.png")
    if changed == "weights":
        with torch.no_grad():
            autoencoder.encoder.conv_out.bias[0] += 1
    calls, moments = [], autoencoder.moments
    monkeypatch.setattr(autoencoder, "moments", lambda *inputs: calls.append(1) or moments(*inputs))
    factor, dilation, width = 8 if changed == "factor" else 16, 1 if changed == "dilation" else 2, 48 if changed == "size" else 32
    Latents(Pictures([tmp_path / "0.png"]), autoencoder, factor, dilation, tmp_path / "cache").moments(0, 32, width)
    assert calls


def test_latents_in_memory_are_bounded(photos, autoencoder, monkeypatch):
    monkeypatch.setattr(data, "CACHE_BYTES", 2 * 2 * 16 * 4 * 4)
    latents = Latents(Pictures([photos / f"{k}.png" for k in range(4)]), autoencoder, 16, 2)
    for k in (0, 1, 2, 3):
        latents.moments(k, 32, 32)
    assert list(latents._kept) == [(2, 32, 32), (3, 32, 32)]


# ---- the script

def test_script_encodes_shares_of_the_ranks_and_goes_on_where_it_was(photos, own_model, tmp_path):
    """Two ranks, one after the other: what the second lacks the first has written."""
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder, ignore=shutil.ignore_patterns(".*"))
    vae = new_vae(VAEConfig((8, 8, 16, 36), (8, 8, 16, 36), 1, 2, 16, 1), seed=0)
    transformer = new_mmdit(MMDiTConfig(64, 1, context_dim=192, pooled_dim=192, table_side=16, mlp_hidden=128), seeded(0))
    save(own_model / "sd3.safetensors", {f"model.diffusion_model.{k}": t for k, t in transformer.state_dict().items()}
         | {f"first_stage_model.{k}": t for k, t in vae.state_dict().items()}, {"norm_groups": 1, "scale_factor": 1, "shift_factor": 0})
    command = [sys.executable, str(ROOT / "data.py"), "encode", str(folder), "--weights", str(own_model), "--device", "cpu", "--latents",
               "--res", "32"]
    for rank, encoded in ((0, 3), (1, 3), (1, 0)):
        ranks = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=os.environ | ranks)
        assert done.returncode == 0, done.stderr
        first, second = done.stdout.splitlines()
        assert first.startswith(f"rank {rank} of 2: {encoded} captions encoded, 6 in ")
        assert second.startswith(f"rank {rank} of 2: {3 - rank} latents in ")
    assert len(list(folder.glob(".embeddings/*/*"))) == 6 and len(list(folder.glob(".latents/*/*"))) == 5


def run_script(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / "data.py"), *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)


def test_script_checks_a_good_folder(photos):
    done = run_script("check", photos)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "5 pictures, 5 captions; median 56x40 px, short sides from 40 px\n"


def test_script_names_every_bad_picture(photos, tmp_path):
    for k in range(3):
        shutil.copy(photos / f"{k}.png", tmp_path)
    (tmp_path / "0.png").write_bytes((photos / "0.png").read_bytes()[:400])
    (tmp_path / "2.png").write_text("no picture")
    listing(tmp_path, *({"file_name": f"{k}.png", "text": "a picture"} for k in range(3)))
    done = run_script("check", tmp_path)
    assert done.returncode == 1
    first, second, summary = done.stdout.splitlines()
    assert first.startswith(f"error: {tmp_path}/0.png: not a whole picture (400 bytes")
    assert second.startswith(f"error: {tmp_path}/2.png: not a whole picture (10 bytes")
    assert summary.startswith("1 pictures, 3 captions")


def test_script_names_a_bad_line(tmp_path):
    done = run_script("check", listing(tmp_path, '{"file_name": '))
    assert done.returncode == 1 and done.stderr.startswith(f"error: {tmp_path}/metadata.jsonl:1: ") and len(done.stderr.splitlines()) == 1


def test_script_encodes_once(photos, model, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    for encoded in (6, 0):
        done = run_script("encode", folder, "--weights", model, "--device", "cpu")
        assert done.returncode == 0, done.stderr
        cache = Embeddings(folder / ".embeddings", model).cache
        assert done.stdout == f"{encoded} captions encoded, 6 in {cache}\n" and len(list(cache.iterdir())) == 6


@pytest.mark.parametrize("flags, says", [(["--batch=0"], "--batch 0: give 1 or more"), (["--t5-length=0"], "T5 length 0: give 1 to 512"),
                                         (["--t5-length=513"], "T5 length 513: give 1 to 512"),
                                         (["--latents", "--res=100"], "--res 100: give a multiple of 32 at --factor 16")])
def test_script_refuses_wrong_numbers_before_it_encodes(photos, model, monkeypatch, flags, says):
    monkeypatch.setattr(sys, "argv", ["data.py", "encode", str(photos), f"--weights={model}", *flags])
    monkeypatch.setattr(SD3Text, "load", None)
    with pytest.raises(SystemExit, match=f"^error: {says}"):
        data.main()


def test_script_ends_with_one_line_without_a_model(photos, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    done = run_script("encode", folder, "--weights", tmp_path / "nowhere", "--device", "cpu")
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and line.startswith("error: ") and "nowhere" in line and "Traceback" not in done.stderr
    assert not (folder / ".embeddings").exists()
