"""Pictures from outside: opened, read as upright 8-bit sRGB, and what sample.py recorded in them. No torch.

Formats   a closed list, from regular files of a bounded size; docs/formats.md has what is read, converted and refused
Colours   reading/colours.py
Check     python -m pytest tests/test_data.py tests/test_colours.py
"""

import io
import math
import os
import struct
import threading
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache

from PIL import Image, UnidentifiedImageError
from PIL import PngImagePlugin as Png
from PIL.Image import Transpose as T

from files import SOFTWARE, parse_json, regular
from reading.colours import DEVELOP, gray_of_16_bit, in_srgb, scale_key, unclear

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "PPM", "JPEG2000")  # none starts a program
MOST_PIXELS = 400_000_000   # 20,000 x 20,000: a larger picture is refused before it is decoded
MOST_TEXT = 64 << 20        # bytes of one text or profile in a PNG, unpacked; drawing programs write more than 1 MiB
TURNS = dict(zip(range(2, 9), (T.FLIP_LEFT_RIGHT, T.ROTATE_180, T.FLIP_TOP_BOTTOM, T.TRANSPOSE, T.ROTATE_270,
                               T.TRANSVERSE, T.ROTATE_90), strict=True))   # Exif orientation -> what turns it upright
SIDEWAYS = (T.TRANSPOSE, T.ROTATE_270, T.TRANSVERSE, T.ROTATE_90)
CONVERT = "convert it to PNG or JPEG"
VIDEO = "a video: save its frames as PNG or JPEG"
FOREIGN = (  # what a file that is not read looks like and what to do; where, with which bytes it begins
    (f"HEIC: {CONVERT}", 4, (b"ftyphe", b"ftypmif1", b"ftypmsf1")), (DEVELOP, 4, (b"ftypcrx",)),
    (DEVELOP, 0, (b"FUJIFILMCCD-RAW", b"IIU\0", b"IIR")), (VIDEO, 4, (b"ftyp",)), (VIDEO, 8, (b"AVI ",)),
    (VIDEO, 0, (b"\x1aE\xdf\xa3", b"\0\0\1\xba")), (f"JPEG XL: {CONVERT}", 0, (b"\xff\x0a", b"\0\0\0\x0cJXL ")),
    (f"a Photoshop document: {CONVERT}", 0, (b"8BPS",)), (f"OpenEXR or HDR: {CONVERT}", 0, (b"v/1\1", b"#?RA")),
    (f"PostScript, a program: {CONVERT}", 0, (b"%!PS", b"\xc5\xd0\xd3\xc6")), (f"PDF: {CONVERT}", 0, (b"%PDF",)),
    (f"SVG, a drawing: {CONVERT}", 0, (b"<svg", b"<?xml")), ("a web page: download it again", 0, (b"<",)),
    ("a pointer of Git LFS: run git lfs pull", 0, (b"version https://git-lfs",)), ("a zip: unpack it", 0, (b"PK",)),
    (f"an icon: {CONVERT}", 0, (b"\0\0\1\0",)),
    ("a damaged TIFF, or one of rare samples: save it as 8-bit RGB", 0, (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")))
LOCK, USUAL = threading.Lock(), []  # Pillow's own limits, once for each thread that reads


@cache
def suffixes() -> frozenset[str]:
    """Of the names of files in FORMATS, in lower case."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in (*FORMATS, "MPO"))


def upright_size(path: str | os.PathLike) -> tuple[int, int]:
    """(width, height) as read_picture returns them, from what the file declares; raises as read_picture does."""
    with open_picture(path) as (picture, info, size, _):
        _check_clear(picture, info, path)
        return size


def _check_clear(picture: Image.Image, info: Mapping[str, object], path: str | os.PathLike) -> None:
    if reason := unclear(picture, info):
        raise ValueError(f"{path}: {reason}")


def read_picture(path: str | os.PathLike) -> Image.Image:
    """Decode a picture, upright, as 8-bit sRGB.

    returns  PIL image, mode RGB, transparency laid over white. info["profile"] is "converted", or "broken" where the
             picture's colour profile cannot be used and sRGB is assumed; info["frames"] marks an animation
    raises   ValueError that names the file
    """
    with open_picture(path) as (picture, info, _, turn):
        _check_clear(picture, info, path)
        if picture.format == "PNG":
            scale_key(picture)
        frames = picture.format != "MPO" and getattr(picture, "is_animated", False)
        picture.filename = ""  # no memory map: Pillow maps a TIFF that lies on its side with width and height exchanged
        picture.load()
    if picture.mode.startswith("I"):
        picture = gray_of_16_bit(picture)
    if turn is not None:
        picture = picture.transpose(turn)
    if picture.mode in ("La", "RGBa"):
        picture = picture.convert(picture.mode.upper())
    alpha = "A" in picture.getbands() or "transparency" in picture.info
    rgb, note = in_srgb(picture, "RGBA" if alpha else "RGB", path)
    if alpha:
        rgb = Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb).convert("RGB")
    rgb.info = ({"profile": note} if note else {}) | ({"frames": True} if frames else {})
    return rgb


def recorded(path: str | os.PathLike) -> dict[str, str]:
    """What sample.py wrote into a picture: text entries of a PNG, else JSON in the EXIF description; {} if nothing."""
    try:
        with open_picture(path) as (picture, info, *_):
            if picture.format == "PNG":
                return {name: value for name, value in info.items() if isinstance(value, str)}
            records = parse_json(str(picture.getexif().get(0x010E, "")), str(path))
    except ValueError:  # no picture, or another program's
        return {}
    return {name: str(value) for name, value in records.items()} if isinstance(records, dict) else {}


def own_prompt(path: str | os.PathLike) -> str:
    """The prompt that sample.py recorded in a picture; "" for those of other programs, who keep other things there."""
    record = recorded(path)
    return record.get("prompt", "").strip() if record.get("software") == SOFTWARE else ""


@contextmanager
def open_picture(path: str | os.PathLike) -> Iterator[tuple[Image.Image, dict, tuple[int, int], T | None]]:
    """Open a picture of FORMATS; whatever goes wrong in the block becomes one ValueError with the file's name.

    yields  the picture, not decoded; what it declares, wherever that stands in the file; its (width, height) once it is
            upright; what turns it after decoding
    """
    try:
        regular(path)
    except OSError as error:
        raise ValueError(str(error)) from None
    with _limits_lifted():
        try:
            with Image.open(path, formats=FORMATS) as picture:
                header = _png_header(path) if picture.format == "PNG" else picture
                if math.prod(picture.size) > MOST_PIXELS:
                    size = f"{picture.width}x{picture.height} pixels"
                    raise ValueError(f"{path}: {size}; at most {MOST_PIXELS:,} are read, scale it down first")
                orientation = Image.Image.getexif(header).get(0x0112)  # of Exif, or else of XMP, wherever it stands
                turn, size = TURNS.get(orientation) if isinstance(orientation, int) else None, picture.size
                tiff = picture.format == "TIFF"  # Pillow turns it itself while decoding; its size is upright by tag
                if turn in SIDEWAYS and not (tiff and 0x0112 in picture.tag_v2):
                    size = size[::-1]
                yield picture, header.info, size, None if tiff else turn
        except MemoryError:
            raise
        except UnidentifiedImageError:
            raise ValueError(f"{path}: {_foreign(path)}") from None
        except Exception as error:  # on a damaged file a decoder raises what its author did not foresee
            if str(error).startswith(f"{path}: "):
                raise
            if isinstance(error, OSError) and error.errno:  # of the system; Pillow's have no number
                raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
            why = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{path}: not a complete picture ({os.path.getsize(path)} bytes; {why})") from None


@contextmanager
def _limits_lifted() -> Iterator[None]:
    """Lift Pillow's limits, which are global, until the last thread that reads is done."""
    with LOCK:
        USUAL.append(USUAL[0] if USUAL else (Image.MAX_IMAGE_PIXELS, Png.MAX_TEXT_CHUNK, Png.MAX_TEXT_MEMORY))
        Image.MAX_IMAGE_PIXELS, Png.MAX_TEXT_CHUNK, Png.MAX_TEXT_MEMORY = None, MOST_TEXT, 4 * MOST_TEXT
    try:
        yield
    finally:
        with LOCK:
            usual = USUAL.pop()
            if not USUAL:
                Image.MAX_IMAGE_PIXELS, Png.MAX_TEXT_CHUNK, Png.MAX_TEXT_MEMORY = usual


def _png_header(path: str | os.PathLike) -> Image.Image:
    """What a PNG declares, also behind its pixels, where Pillow would look only after decoding them."""
    kept, colours = [b"\x89PNG\r\n\x1a\n"], b""
    with open(path, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind in (b"IHDR", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"cICP", b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                content = file.read(length)
                if len(content) < length:
                    break
                kept.append(head + content + struct.pack(">I", zlib.crc32(kind + content)))
                colours = content if kind == b"cICP" else colours
                length = 0
            elif kind == b"IEND":
                break
            file.seek(length + 4, os.SEEK_CUR)
    end = struct.pack(">I4sI", 0, b"IEND", zlib.crc32(b"IEND"))
    header = Image.open(io.BytesIO(b"".join([*kept, end])), formats=["PNG"])
    header.info["cicp"] = colours[:2]
    return header


def _foreign(path: str | os.PathLike) -> str:
    """What a file that is no picture of FORMATS looks like."""
    with open(path, "rb") as file:
        start = file.read(1 << 10)
    for what, offset, begins in FOREIGN:
        if start[offset:].lstrip(b"\xef\xbb\xbf \r\n").startswith(begins):
            return f"not a picture that is read; it looks like {what}"
    return f"not a complete picture of the formats {', '.join(FORMATS)} ({os.path.getsize(path)} bytes)"
