"""Data folders: listings, pictures of every kind, broken pictures, sizes of crops, the picture cache, the script."""

import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import tifffile
from conftest import CAPTIONS, ROOT, copy_of, run_script
from pictures import ADOBE_PRIMARIES, SRGB_PRIMARIES, gray_profile, rgb_profile
from PIL import Image, ImageFile

import data
from checkpoint import open_weights, save
from data import Item, Pictures, read_folder, read_picture, resize_to_cover, sizes_of, upright_size
from text import SD3Text
from training.cache import Embeddings


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def listing(folder: Path, *rows: object) -> Path:
    """Write metadata.jsonl and return its folder; a string is one raw line, anything else is written as JSON."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("noisy")
    for k in range(len(CAPTIONS)):
        Image.fromarray(noise(40, 56, k)).save(folder / f"{k}.png")
    return listing(folder, *({"file_name": f"{k}.png", "text": caption} for k, caption in enumerate(CAPTIONS)))


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
def test_listing_with_any_line_ends_or_byte_order_mark_is_read(noisy, tmp_path, start, end, separator):
    rows = [json.dumps({"file_name": f"{k}.png", "text": "line\u2028separator"}, ensure_ascii=False) for k in range(2)]
    for k in range(2):
        shutil.copy(noisy / f"{k}.png", tmp_path)
    (tmp_path / "metadata.jsonl").write_bytes((start + separator.join(rows) + end).encode())
    assert [item.captions for item in read_folder(tmp_path)] == [("line\u2028separator",)] * 2


GOOD = {"file_name": "0.png", "text": "fine"}


@pytest.mark.parametrize("row, reason", [
    ('{"file_name": "1.png", "text": "no end', "not JSON"),
    ("plain words", "not JSON"),
    (["1.png", "a list"], "each line is a JSON object"),
    ("7", "each line is a JSON object"),
    ({"text": "no name"}, 'no "file_name"; the row has text'),
    ({"file_name": "1.png"}, 'no "text"; the row has file_name'),
    ({"file_name": "1.png", "text": ""}, "text is empty"),
    ({"file_name": "1.png", "text": " \t"}, "text is empty"),
    ({"file_name": "1.png", "text": " \u200b\ufeff\n"}, "text is empty but for invisible letters"),
    ({"file_name": "1.png", "text": None}, "text is null, expected a text"),
    ({"file_name": "1.png", "text": 5}, "text is 5, expected a text"),
    ({"file_name": "1.png", "text": ["a", "b"]}, 'text is ["a", "b"], expected a text'),
    ({"file_name": 1, "text": "a number as name"}, "file_name is 1, expected a text"),
    ({"file_name": "", "text": "no name"}, "file_name is empty"),
    ({"file_name": "1.png", "text": "fine", "alt": ["fine", ""]}, "alt is empty"),
    ({"file_name": "1.png", "text": "fine", "alt": "letters are no captions"},
     '"alt" is \'letters are no captions\', expected a list'),
    ({"file_name": "1.png", "text": "fine", "alt": ["fine", None]}, "alt is null, expected a text"),
    ({"file_name": "1.png", "text": "half \ud83d"}, "text holds U+D83D, half of a character"),
    ({"file_name": "1.png", "text": "fine", "alt": ["\udc00"]}, "alt holds U+DC00"),
    ({"file_name": "1\ud83d.png", "text": "fine"}, "file_name holds U+D83D"),
    ({"file_name": "1.PNG", "text": "fine"}, "no picture '1.PNG' in"),
    ({"file_name": "1.PNG", "text": "fine"}, "there is '1.png'"),
    ({"file_name": "1.png ", "text": "fine"}, "there is '1.png'"),
    ({"file_name": "..\\\\outside.png", "text": "fine"}, "leads out of the folder"),
    ({"file_name": "gone.png", "text": "fine"}, "no picture 'gone.png'"),
    ({"file_name": "x" * 9999, "text": "fine"}, f"no picture '{'x' * 255}…'"),
    ({"file_name": ".", "text": "a folder"}, "no picture '.'"),
    ({"file_name": "0.png", "text": "again"}, "'0.png' is listed twice"),
    ({"file_name": "./0.png", "text": "again"}, "'./0.png' is listed twice"),
    ({"file_name": "../outside.png", "text": "fine"}, "'../outside.png' leads out of the folder"),
    ({"file_name": "sub/../../outside.png", "text": "fine"}, "leads out of the folder"),
    ({"file_name": "/etc/hostname", "text": "fine"}, "'/etc/hostname' leads out of the folder"),
])
def test_wrong_line_is_named_with_its_number(noisy, tmp_path, row, reason):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("pictures/0.png", "pictures/1.png", "outside.png"):
        shutil.copy(noisy / "0.png", tmp_path / name)
    listing(folder, GOOD, "", row)
    with pytest.raises(ValueError) as refusal:
        read_folder(folder)
    message = str(refusal.value)
    assert message.startswith(f"{folder}/metadata.jsonl:3: ") and reason in message and "\n" not in message


def test_listing_that_is_empty_absent_or_no_text_is_refused(tmp_path):
    for missing in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="metadata.jsonl: not found; a data folder holds"):
            read_folder(missing)
    for content in (b"", b"\n \n"):
        (tmp_path / "metadata.jsonl").write_bytes(content)
        with pytest.raises(ValueError, match="metadata.jsonl: empty"):
            read_folder(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    os.mkfifo(tmp_path / "metadata.jsonl")
    with pytest.raises(ValueError, match="metadata.jsonl: a pipe or device, not a file"):
        read_folder(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
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


def test_transparent_pixels_are_blended_with_white(tmp_path):
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
    pixels = np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "key.png", transparency=(4, 5, 6))
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
def test_turned_pictures_are_read_upright(tmp_path, orientation):
    upright = noise(8, 12)
    turned = upright.transpose(1, 0, 2)
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
              5: turned, 6: turned[::-1], 7: turned[::-1, ::-1], 8: turned[:, ::-1]}
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored[orientation])).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.array(read_picture(tmp_path / "turned.png")), upright)
    assert upright_size(tmp_path / "turned.png") == (12, 8)
    exif[0x0112] = 6
    Image.fromarray(noise(8, 12)[..., 0].astype(np.uint16)).save(tmp_path / "deep.png", exif=exif)
    assert read_picture(tmp_path / "deep.png").size == (8, 12)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_turned_tiff_of_every_mode_is_read_upright(tmp_path, mode, compression):
    """Pillow turns a TIFF itself, and misreads one that it maps into memory."""
    levels = Image.fromarray(noise(8, 12)[..., 0])
    deep = Image.fromarray(np.array(levels, dtype=np.uint16) * 257)
    picture = deep if mode == "I;16" else levels.convert("RGB").convert(mode)
    picture.save(tmp_path / "flat.tif", compression=compression)
    upright = np.array(read_picture(tmp_path / "flat.tif"))
    for orientation, expected in ((3, upright[::-1, ::-1]), (6, np.rot90(upright, -1)), (8, np.rot90(upright)),
                                  (5, upright.transpose(1, 0, 2))):
        picture.save(tmp_path / "turned.tif", tiffinfo={0x0112: orientation}, compression=compression)
        assert np.array_equal(np.array(read_picture(tmp_path / "turned.tif")), expected)
        assert upright_size(tmp_path / "turned.tif") == expected.shape[1::-1]


def test_webp_is_read_exactly_and_an_animated_gif_by_its_first_frame(tmp_path):
    pixels = noise(10, 14)
    Image.fromarray(pixels).save(tmp_path / "still.webp", lossless=True)
    assert np.array_equal(np.array(read_picture(tmp_path / "still.webp")), pixels)
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert np.array(read_picture(tmp_path / "moving.gif"))[0, 0].tolist() == [255, 0, 0]


def complaint(path: Path, function=read_picture) -> str:
    """The one line with which a picture is refused; asserts that it begins with the path."""
    with pytest.raises(ValueError) as refusal:
        function(path)
    message = str(refusal.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


def test_file_that_is_no_picture_is_refused_by_name(tmp_path):
    (tmp_path / "text.jpg").write_text("this is no picture\n" * 9)
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    for function in (read_picture, upright_size):
        for name, size in (("text.jpg", 171), ("empty.png", 0)):
            message = complaint(tmp_path / name, function)
            assert "not a complete picture of the formats PNG, " in message and f"({size} bytes)" in message
        assert "a folder, not a file" in complaint(tmp_path / "folder.png", function)
        assert "no such file" in complaint(tmp_path / "gone.png", function)


def test_file_that_the_system_does_not_read_is_not_called_incomplete(tmp_path, monkeypatch):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "open", Mock(side_effect=PermissionError(13, "Permission denied")))
    assert complaint(tmp_path / "a.png").endswith("a.png: cannot be read (Permission denied)")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "tif"])
def test_truncated_pictures_are_refused_by_name(tmp_path, suffix):
    Image.fromarray(noise(64, 64)).save(tmp_path / f"complete.{suffix}")
    content, cut = (tmp_path / f"complete.{suffix}").read_bytes(), tmp_path / f"cut.{suffix}"
    for share in (0.1, 0.5, 0.9):
        cut.write_bytes(content[:int(len(content) * share)])
        assert "not a complete picture" in complaint(cut)


def test_gray_in_floating_point_is_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "float.tif")
    assert "8 or 16 bit" in complaint(tmp_path / "float.tif")


def header_only(file: Path, width: int, height: int) -> Path:
    """A PNG whose header declares a size, without pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b""))
    return file


def test_huge_pictures_are_refused_from_the_header_alone(tmp_path, monkeypatch):
    def load(self):
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    huge = header_only(tmp_path / "huge.png", 30_000, 30_000)
    for function in (read_picture, upright_size):
        assert "30000x30000 pixels; at most 400,000,000 are read" in complaint(huge, function)
    assert upright_size(header_only(tmp_path / "wide.png", 400, 300)) == (400, 300)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow would warn above 89 million pixels and refuse above 179 million
        assert upright_size(header_only(tmp_path / "large.png", 20_000, 20_000)) == (20_000, 20_000)


def test_long_and_narrow_picture_is_read(tmp_path):
    Image.new("1", (30_000, 200)).save(tmp_path / "long.png")
    assert read_picture(tmp_path / "long.png").size == upright_size(tmp_path / "long.png") == (30_000, 200)


def test_pixel_limit_of_pillow_is_unchanged_by_import_and_reading(tmp_path):
    code = "from PIL import Image; a = Image.MAX_IMAGE_PIXELS; import data; print(a == Image.MAX_IMAGE_PIXELS)"
    done = run_script("-c", code)
    assert done.stdout == "True\n", done.stderr
    limit = Image.MAX_IMAGE_PIXELS
    Image.fromarray(noise(4, 4)).save(tmp_path / "good.png")
    read_picture(tmp_path / "good.png")
    complaint(header_only(tmp_path / "bad.png", 30_000, 30_000))
    complaint(tmp_path / "gone.png")
    assert Image.MAX_IMAGE_PIXELS == limit


# ---- docs/formats.md: every row of the tables of data folders, made and read

def rows_of_docs() -> dict[str, str]:
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8").partition("\n## Data folders\n")[2]
    rows = (line.strip("| ").rsplit(" | ", 1) for line in text.splitlines() if line.startswith("| "))
    return {what: happens for what, happens in rows if happens != "what happens"}


ROWS = rows_of_docs()
LISTED = {"file_name": "0.png", "text": "fine"}
LISTING_CASES = {  # row -> name of the listing and its content
    "`metadata.jsonl`, one": ("metadata.jsonl", json.dumps(LISTED)),
    "`metadata.csv` with": ("metadata.csv", "text,width,file_name\r\n\"fi\nne, two\",7,0.png\r\n"),
    "CSV with semi": ("metadata.csv", '\r\nsep=;\r\nfile_name;text\r\n0.png;"fine; rot, grün"\r\n'.encode("utf-8-sig")),
    "UTF-8 with or": ("metadata.jsonl", ("\ufeff" + json.dumps(LISTED) + "\r\n").encode("utf-16-le")),
    '`"alt"` that is': ("metadata.jsonl", '{"file_name": "0.png", "text": "fine", "alt": NaN, "width": null}'),
    "file_name with backslashes": ("metadata.jsonl", json.dumps(LISTED | {"file_name": "sub\\a\u0308.png"})),
    "links to": ("metadata.jsonl", json.dumps(LISTED | {"file_name": "link.png"})),
    "a JSON list": ("metadata.jsonl", json.dumps([LISTED], indent=1)),
    "`metadata.parquet`": ("metadata.parquet", "PAR1"),
    "shards, `*.parq": ("train-00000-of-00002.parquet", "PAR1"),
    "other tables": ("Metadata.JSON", json.dumps([LISTED])),
    "`train/metadata": ("eval/size_2048/metadata.jsonl", json.dumps(LISTED)),
    "text that is": ("metadata.jsonl", '{"file_name": "0.png", "text": NaN}'),
    "a JSON object": ("metadata.jsonl", '{"file_name": "0.png", "text": "fine", "text": "fin"}'),
    "half of a": ("metadata.jsonl", json.dumps(LISTED | {"text": "\ud83d"})),
    "file_name in": ("metadata.jsonl", json.dumps(LISTED | {"file_name": "0.PNG"})),
    "file_name that": ("metadata.jsonl", json.dumps(LISTED | {"file_name": "..\\0.png"})),
    "CSV with two": ("metadata.csv", "file_name,text,text\n0.png,a,b\n"),
    "CSV with more": ("metadata.csv", "file_name,text\n0.png,a, b\n"),
}


def only(starts: str, rows: dict[str, str] = ROWS) -> str:
    """What happens in the one row that begins so."""
    (happens,) = (happens for what, happens in rows.items() if what.startswith(starts))
    return happens


@pytest.mark.parametrize("row", LISTING_CASES)
def test_listing_of_every_row_of_the_table_ends_as_it_says(tmp_path, row):
    (tmp_path / "sub").mkdir()
    for name in ("0.png", "sub/\u00e4.png"):
        Image.fromarray(noise(4, 4)).save(tmp_path / name)
    (tmp_path / "link.png").symlink_to(tmp_path / "0.png")
    name, content = LISTING_CASES[row]
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    happens = only(row)
    if happens.startswith("read"):
        (item,) = read_folder(tmp_path)
        assert item.path.is_file() and len(item.captions) == 1 and item.captions[0].startswith("fi")
    else:
        with pytest.raises((ValueError, OSError), match=re.escape(happens.split('"')[1])) as refusal:
            read_folder(tmp_path)
        assert "\n" not in str(refusal.value) and str(refusal.value).startswith(str(tmp_path))


RGB = noise(6, 9)
GRAY = RGB[..., 0]
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def exif(orientation: int) -> Image.Exif:
    about = Image.Exif()
    about[0x0112] = orientation
    return about


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(*front: bytes, behind: bytes = b"", pixels: np.ndarray = RGB) -> bytes:
    """With chunks in front of and behind the pixels."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    content = file.getvalue()
    return content[:33] + b"".join(front) + content[33:-12] + behind + content[-12:]


def as_bytes(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def tiff(array: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def stored(kind: str, **options: object) -> bytes:
    return as_bytes(Image.fromarray(RGB), kind, **options)


BOX = b"\0\0\0\x18ftyp"
DEEP = (GRAY.astype(np.uint16) * 257)
MOVING = {"save_all": True, "append_images": [Image.new("RGB", (9, 6))], "lossless": True}
TRUECOLOUR = {"photometric": "rgb"}
LONG = chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * (2 << 20)))
ADOBE = rgb_profile(ADOBE_PRIMARIES, 2.2)
HDR_AVIF = stored("AVIF").replace(b"colrnclx\0\1", b"colrnclx\0\x09").replace(b"\x09\0\x0d", b"\x09\0\x10")
TWELVE = b"II*\0\x08\0\0\0\x08\0" + b"".join(struct.pack("<HHII", *entry) for entry in (
    (256, 3, 1, 2), (257, 3, 1, 1), (258, 3, 1, 12), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 110), (278, 3, 1, 1),
    (279, 4, 1, 3))) + bytes(4) + b"\xff\xf0\0"
PICTURE_CASES = {  # row -> files; where it is read, each with its pixels, None where other tests have them
    "PNG, JPEG, WebP": [(stored("PNG"), RGB), (stored("JPEG"), None), (stored("WEBP", lossless=True), RGB),
                        (stored("AVIF"), None), (stored("TIFF"), RGB), (stored("BMP"), RGB), (stored("GIF"), None),
                        (stored("PPM"), RGB), (stored("JPEG2000"), RGB)],
    "PNG with texts": [(png(LONG), RGB), (png(behind=LONG), RGB)],
    "MPO": [(stored("MPO", save_all=True, append_images=[Image.new("RGB", (9, 6))]), None)],
    "animated": [(stored("PNG", **MOVING), RGB), (stored("WEBP", **MOVING), RGB), (stored("GIF", **MOVING), None),
                 (stored("AVIF", **MOVING), None)],
    "TIFF of several": [tiff(np.stack([RGB, RGB]), **TRUECOLOUR)],
    "HEIC": [BOX + b"heic", BOX + b"mif1heic", b"\xff\x0a", b"\0\0\0\x0cJXL ", b"8BPS", b"<svg>", b"\n<?xml ?><svg>",
             b"%PDF-1.4", b"v/1\1", b"\0\0\1\0"],
    "EPS": [b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\xc5\xd0\xd3\xc6"],
    "a camera's": [stored("TIFF", tiffinfo={254: 1}), stored("TIFF", tiffinfo={50706: b"\1\4\0\0"}), BOX + b"crx "],
    "video": [BOX + b"isom", b"\x1aE\xdf\xa3", b"RIFF\0\0\0\0AVI LIST"],
    "pointer": [b"version https://git-lfs.github.com/spec/v1\n"],
    "JPEG with damage": [(stored("JPEG")[:-70] + b"\xff\xd9", None)],
    "truncated": [stored("PNG")[:-30], b"", b"words", stored("BMP")[:-9]],
    "no profile": [(stored("PNG"), RGB)],
    "a profile that": [(stored("PNG", icc_profile=rgb_profile(SRGB_PRIMARIES, None, name="Adobe RGB")), RGB)],
    "RGB, gray or": [(stored("PNG", icc_profile=ADOBE), None)],
    "broken profile": [(stored("PNG", icc_profile=wrong), RGB) for wrong in (b"broken", gray_profile(1.0))],
    "CMYK without": [(as_bytes(Image.fromarray(RGB).convert("CMYK"), "TIFF"), RGB)],
    "L\\*a": [(as_bytes(Image.merge("LAB", [Image.new("L", (9, 6), v) for v in (255, 128, 128)]), "TIFF"), RGB | 255)],
    "YCbCr": [as_bytes(Image.fromarray(RGB).convert("YCbCr"), "TIFF", tiffinfo={530: (2, 2)})],
    "transparency": [(as_bytes(Image.fromarray(GRAY), "PNG", transparency=int(GRAY[0, 0])), None)],
    "PNG with sRGB": [(png(chunk(b"sRGB", b"\0"), chunk(b"gAMA", struct.pack(">I", 100_000))), RGB),
                      (png(chunk(b"gAMA", struct.pack(">I", 45455))), RGB)],
    "PNG with other": [png(chunk(b"gAMA", struct.pack(">I", 100_000))),
                       png(chunk(b"cHRM", struct.pack(">8I", 31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000)))],
    "PNG or AVIF": [png(chunk(b"cICP", bytes([9, 16, 0, 1]))), HDR_AVIF],
    "Exif of Adobe": [stored("JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\1\0\1\0\2\0\4\0\0\0R03\0\0\0\0\0")],
    "JPEG 2000 with": [stored("JPEG2000").replace(b"colr\1", b"colr\2")],
    "1 to 8 in Exif": [(stored(kind, exif=exif(6), **options), np.rot90(RGB, -1)) for kind, options in (
        ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}))] + [
            (png(behind=chunk(b"eXIf", exif(8).tobytes()[6:])), np.rot90(RGB)), (stored("JPEG", exif=exif(5)), None)],
    "1 to 8 in XMP": [(stored("TIFF", tiffinfo={700: XMP}), np.rot90(RGB, -1)),
                      (png(behind=chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)), np.rot90(RGB, -1)),
                      (stored("WEBP", lossless=True, xmp=XMP), np.rot90(RGB, -1))],
    "0, 9 and": [(stored("PNG", exif=exif(value)), RGB) for value in (0, 9, 300)],
    "gray of 1,": [(tiff(GRAY > 99, photometric="miniswhite"), np.where(GRAY > 99, 0, 255)),
                  (tiff(GRAY, photometric="miniswhite"), 255 - GRAY),
                  (as_bytes(Image.fromarray(GRAY > 99), "PNG"), np.where(GRAY > 99, 255, 0))],
    "gray of 12": [(tiff(DEEP, byteorder=order), GRAY) for order in "<>"] + [
        (tiff(DEEP, photometric="miniswhite"), 255 - GRAY), (png(pixels=DEEP), GRAY),
        (TWELVE, np.array([[255, 0]]))],
    "PGM": [(b"P5 2 1 1000\n" + struct.pack(">HH", 1000, 500), np.array([[255, 128]])),
            (b"P2 2 1 3 3 0", np.array([[255, 0]]))],
    "RGB of 16": [(tiff(RGB.astype(np.uint16) * 256 + 99, **TRUECOLOUR), RGB), (
        tiff(RGB.transpose(2, 0, 1).astype(np.uint16) * 257, planarconfig="separate", compression="zlib",
             **TRUECOLOUR), RGB)],
    "TIFF with one": [tiff(np.stack([GRAY.astype(np.uint16) * 257] * bands), planarconfig="separate", **options)
                      for bands, options in ((3, TRUECOLOUR), (4, {"photometric": "separated"}))] + [
                          tiff(np.stack([GRAY, GRAY]), planarconfig="separate", photometric="minisblack",
                               extrasamples=["unassalpha"], compression="zlib")],
    "gray of 32": [tiff(GRAY.astype(np.uint32))], "signed": [tiff(GRAY.astype(kind)) for kind in ("i1", "i2", "i4")],
    "floating": [tiff(GRAY.astype(np.float32)), b"Pf 1 1 -1.0\n\0\0\0\0"],
}


@pytest.mark.parametrize("row", PICTURE_CASES)
def test_picture_of_every_row_of_the_table_ends_as_it_says(tmp_path, row):
    happens = only(row)
    for k, case in enumerate(PICTURE_CASES[row]):
        content, expected = case if isinstance(case, tuple) else (case, None)
        file = tmp_path / f"{k}.png"
        file.write_bytes(content)
        if isinstance(case, tuple):
            picture = read_picture(file)
            assert upright_size(file) == picture.size and picture.mode == "RGB"
            if expected is not None:
                expected = np.repeat(expected[..., None], 3, 2) if expected.ndim == 2 else expected
                assert np.abs(np.asarray(picture, dtype=int) - expected).max() <= happens.startswith("converted")
        else:
            for function in (read_picture, upright_size) if row != "truncated" else (read_picture,):
                assert happens.split('"')[1] in complaint(file, function)


def test_every_row_of_the_tables_has_a_case(tmp_path):
    elsewhere = {"pipe, device", "more than 400 million pixels", "a folder whose path is not UTF-8"}
    starts = (*LISTING_CASES, *PICTURE_CASES)
    assert {what for what in ROWS if not what.startswith(starts)} == elsewhere
    os.mkfifo(tmp_path / "pipe.png")
    assert only("pipe").split('"')[1] in complaint(tmp_path / "pipe.png")
    assert only("more than").split('"')[1] in complaint(header_only(tmp_path / "huge.png", 30_000, 30_000))


# ---- resizing and the picture cache

@pytest.mark.parametrize("width, height", [
    (101, 67), (67, 101), (64, 64), (3, 1000), (1000, 3), (63, 64), (7, 5), (4099, 4098)])
def test_short_side_is_exact_after_resizing(width, height):
    for res in (32, 33, 64):
        resized = resize_to_cover(Image.new("RGB", (width, height)), res, res)
        assert min(resized.size) == res and (resized.width >= resized.height) == (width >= height)
        assert abs(max(resized.size) - res * max(width, height) / min(width, height)) <= 0.5


def test_picture_of_the_right_size_is_unchanged():
    pixels = noise(32, 48)
    assert np.array_equal(np.array(resize_to_cover(Image.fromarray(pixels), 32, 32)), pixels)


def test_picture_cache_is_bounded_and_drops_the_least_recently_used(noisy, monkeypatch):
    size = 40 * 56 * 3
    monkeypatch.setattr(data, "CACHE_BYTES", 2 * size)
    reads, read = [], data.read_picture
    monkeypatch.setattr(data, "read_picture", lambda path: reads.append(path.stem) or read(path))
    pictures = Pictures([noisy / f"{k}.png" for k in range(4)])
    for k in (0, 1, 0, 2, 0, 1, 3):  # 2 displaces 1, because 0 was used since
        assert np.array_equal(pictures.resized(k, 40, 40), noise(40, 56, k))
        assert sum(pixels.nbytes for pixels in pictures._recent.values()) <= 2 * size
    assert "".join(reads) == "01213"
    monkeypatch.setattr(data, "CACHE_BYTES", 1)
    pictures.resized(2, 40, 40)
    assert list(pictures._recent) == [(2, 40, 40)]


# ---- sizes of crops

def test_aspect_sizes_have_similar_areas_and_sides_that_divide():
    sizes = data.aspect_sizes(1024, 32)
    assert len(sizes) == 11 and (1024, 1024) in sizes
    for height, width in sizes:
        assert height % 32 == width % 32 == 0 and abs(height * width / 1024**2 - 1) < 0.05
        assert data.nearest_size(sizes, width, height) == (height, width)
    assert data.nearest_size(sizes, 5000, 1000) == max(sizes, key=lambda size: size[1] / size[0])
    assert max(map(max, data.aspect_sizes(1024, 32, most=1200))) <= 1200


def test_turned_picture_is_cropped_by_its_upright_size(tmp_path):
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


def test_small_pictures_are_refused_together_skipped_or_enlarged(tmp_path):
    items = []
    for k, (width, height) in enumerate([(64, 80), (90, 63), (100, 20), (64, 64)]):
        Image.new("RGB", (width, height)).save(tmp_path / f"{k}.png")
        items.append(Item(tmp_path / f"{k}.png", ("a picture",)))
    with pytest.raises(ValueError) as refusal:
        sizes_of(items, 64, 16, 1000, False)
    assert str(refusal.value) == (
        f"{tmp_path}/2.png: its short side is 20 px, below --res 64; so are 2 of 4 pictures: list them with data.py "
        "check DIR --res 64, leave them out with --small skip, or --small enlarge")
    assert sizes_of(items, 64, 16, 1000, False, "skip") == [(64, 64), None, None, (64, 64)]
    assert sizes_of(items, 64, 16, 1000, False, "enlarge") == [(64, 64)] * 4
    assert np.array(Pictures([items[2].path]).central_crop(0, 64, 64)).shape == (64, 64, 3)
    with pytest.raises(ValueError, match="so are 1 of 4 pictures.*--aspect"):
        sizes_of(items, 64, 16, 1000, True)
    with pytest.raises(ValueError, match="so are 1 of 1"):
        sizes_of(items[1:2], 64, 16, 1000, False, "skip")


def test_picture_too_narrow_to_be_enlarged_is_refused(tmp_path):
    Image.new("1", (30_000, 4)).save(tmp_path / "line.png")
    items = [Item(tmp_path / "line.png", ("a line",))]
    for read in (lambda: sizes_of(items, 512, 32, 1000, False, "enlarge"),
                 lambda: Pictures([items[0].path]).resized(0, 512, 512)):
        with pytest.raises(ValueError, match="line.png: 30000x4 px become 1,966,080,000 pixels that cover 512x512; "):
            read()
    assert sizes_of(items, 64, 32, 1000, False, "enlarge") == [(64, 64)]


def test_check_lists_every_picture_that_training_would_refuse(tmp_path, capsys):
    for k, (width, height) in enumerate([(96, 64), (95, 96), (96, 96)]):
        Image.new("RGB", (width, height)).save(tmp_path / f"{k}.png")
    listing(tmp_path, *({"file_name": f"{k}.png", "text": "a picture"} for k in range(3)))
    assert data.check(str(tmp_path), 96) == 1
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"error: {tmp_path}/0.png: its short side is 64 px, below --res 96",
        f"error: {tmp_path}/1.png: its short side is 95 px, below --res 96"]
    assert data.check(str(tmp_path), 64) == 0 and data.check(str(tmp_path), 96, aspect=True) == 1
    assert f"error: {tmp_path}/1.png: 95x96 px do not cover 96x96" in capsys.readouterr().out


def test_bilinear_resizing_is_that_of_pillow():
    picture = Image.fromarray(noise(40, 56))
    for name, method in (("lanczos", Image.Resampling.LANCZOS), ("bilinear", Image.Resampling.BILINEAR)):
        assert resize_to_cover(picture, 20, 20, name).tobytes() == picture.resize((28, 20), method).tobytes()


# ---- the script

def test_script_checks_a_good_folder(noisy):
    done = run_script("data.py", "check", noisy)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "4 pictures, 4 captions; median 56x40 px, short sides from 40 px",
        "4 too small or too large for metrics.py, which takes sides of 64 to 65,500 px"]


def test_script_names_every_bad_picture(noisy, tmp_path):
    for k in range(3):
        shutil.copy(noisy / f"{k}.png", tmp_path)
    (tmp_path / "0.png").write_bytes((noisy / "0.png").read_bytes()[:400])
    (tmp_path / "2.png").write_text("no picture")
    listing(tmp_path, *({"file_name": f"{k}.png", "text": "a picture"} for k in range(3)))
    done = run_script("data.py", "check", tmp_path)
    assert done.returncode == 1
    first, second, summary, _ = done.stdout.splitlines()
    assert first.startswith(f"error: {tmp_path}/0.png: not a complete picture (400 bytes")
    assert second.startswith(f"error: {tmp_path}/2.png: not a complete picture of the formats PNG")
    assert summary.startswith("1 pictures, 3 captions")


@pytest.mark.parametrize("flags, says", [
    (["check", ""], "empty folder or name"), (["encode", ".", "--weights", ""], "empty folder or name"),
    (["encode", ".", "--cache", ""], "empty folder or name"),
    (["check", "FOLDER", "--aspect"], "--aspect: sizes depend"),
    (["check", os.fsdecode(b"caf\xe9")], "this path is not UTF-8")])
def test_script_refuses_what_would_be_taken_for_something_else(noisy, capsys, flags, says):
    with pytest.raises(SystemExit) as end:
        data.main([str(noisy) if flag == "FOLDER" else flag for flag in flags])
    assert says in str(end.value) + capsys.readouterr().err


def test_script_names_a_bad_line(tmp_path):
    done = run_script("data.py", "check", listing(tmp_path, '{"file_name": '))
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith(f"error: {tmp_path}/metadata.jsonl:1: ")


def test_script_encodes_each_caption_once(photos, model, tmp_path):
    folder = copy_of(photos, tmp_path / "photos")
    for encoded in (5, 0):
        done = run_script("data.py", "encode", folder, "--weights", model, "--device", "cpu")
        assert done.returncode == 0, done.stderr
        cache = Embeddings(folder / ".embeddings", model).cache
        assert done.stdout == f"{encoded} captions encoded, 5 in {cache}\n" and len(list(cache.iterdir())) == 5


@pytest.mark.parametrize("flags, reason", [
    (["--batch=0"], "--batch 0: give 1 or more"), (["--t5-length=0"], "T5 length 0: give 1 to 512"),
    (["--t5-length=513"], "T5 length 513: give 1 to 512"),
    (["--latents", "--res=100"], "--res 100: give a multiple of 32 at --factor 16")])
def test_script_refuses_wrong_numbers_before_it_encodes(photos, model, monkeypatch, flags, reason):
    monkeypatch.setattr(sys, "argv", ["data.py", "encode", str(photos), f"--weights={model}", *flags])
    monkeypatch.setattr(SD3Text, "load", None)
    with pytest.raises(SystemExit, match=f"^error: {reason}"):
        data.main()


def test_encode_takes_the_length_of_t5_that_a_trained_transformer_records(photos, model, tmp_path):
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    weights = open_weights(folder / "sd3.safetensors")
    save(tmp_path / "new.safetensors", {name: tensor.read() for name, tensor in weights.items()},
         weights.metadata | {"t5_length": "20"})
    os.replace(tmp_path / "new.safetensors", folder / "sd3.safetensors")
    data.main(["encode", str(photos), f"--weights={folder}", "--device=cpu", f"--cache={tmp_path}/cache"])
    assert [cache.name.split("-")[1] for cache in (tmp_path / "cache" / ".embeddings").iterdir()] == ["20"]


def test_script_encodes_into_another_folder_and_skips_small_pictures(photos, model, tmp_path):
    folder = copy_of(photos, tmp_path / "photos")
    Image.new("RGB", (60, 60)).save(folder / "1.png")
    flags = ["data.py", "encode", folder, "--weights", model, "--device", "cpu", "--cache", tmp_path / "caches",
             "--latents", "--res", "64"]
    done = run_script(*flags)
    assert done.returncode == 1 and "1.png: its short side is 60 px" in done.stderr.splitlines()[-1]
    assert not list((tmp_path / "caches").rglob("*.safetensors"))  # refused before the captions are encoded
    done = run_script(*flags, "--small", "skip")
    assert done.returncode == 0 and done.stdout.splitlines()[1].startswith("3 latents encoded, 3 in "), done.stderr
    assert {file.name for file in folder.iterdir()} == {file.name for file in photos.iterdir() if file.name[0] != "."}
    assert sorted(file.name for file in (tmp_path / "caches").iterdir()) == [".embeddings", ".latents"]


@pytest.mark.parametrize("command", [["check"], ["encode", "--device=cpu"]])
def test_script_ends_at_ctrl_c_in_one_line(photos, model, tmp_path, command):
    folder = copy_of(photos, tmp_path / "photos")
    rows = "".join(json.dumps({"file_name": f"{k % 4}{k}.png", "text": f"number {k}"}) + "\n" for k in range(2000))
    for k in range(2000):
        (folder / f"{k % 4}{k}.png").hardlink_to(folder / f"{k % 4}.png")
    (folder / "metadata.jsonl").write_text(rows)
    flags = [*command[:1], str(folder), *command[1:], *([f"--weights={model}"] if command[0] == "encode" else [])]
    process = subprocess.Popen([sys.executable, ROOT / "data.py", *flags], stderr=subprocess.PIPE, text=True)
    next(line for line in process.stderr if re.search(r" \d+/\d+ ", line))  # the progress bar
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and errors.rstrip().endswith("interrupted") and "Traceback" not in errors


def test_script_ends_with_one_line_without_a_model(photos, tmp_path):
    folder = copy_of(photos, tmp_path / "photos")
    done = run_script("data.py", "encode", folder, "--weights", tmp_path / "nowhere", "--device", "cpu")
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and line.startswith("error: ") and "nowhere" in line and "Traceback" not in done.stderr
    assert not (folder / ".embeddings").exists()


@pytest.mark.parametrize("aspect", [False, True])
def test_a_size_beyond_the_position_table_is_refused(photos, aspect):
    with pytest.raises(ValueError, match="--res 4096: the model's position table ends at 3072 px .*give less$"):
        sizes_of(read_folder(photos), 4096, 16, 3072, aspect)
