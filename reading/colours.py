"""What the values of a decoded picture mean: which are refused, how others become 8-bit sRGB. No torch.

Mirrors   Pillow's ImageCms (Little CMS), relative colorimetric; tested by tests/test_colours.py
Table     docs/formats.md, "Data folders"
Profiles  are known by what they do, not by their name: one that changes no level by more than 1 is sRGB
Check     python -m pytest tests/test_colours.py
"""

import io
import os
import sys
from collections.abc import Mapping
from functools import cache, lru_cache

import numpy as np
from PIL import Image, ImageCms

from files import printable

DEVELOP = "a camera's raw file: develop it and save it as PNG or 16-bit TIFF"
RAW = (".3fr", ".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".pef", ".raf", ".rw2", ".srw")
SRGB = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)      # x and y of white, red, green, blue, as in a PNG
ADOBE_RGB_MARKS = (b"\1\0\2\0\4\0\0\0R03\0", b"\0\1\0\2\0\0\0\4R03\0")  # InteropIndex in both byte orders
SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}  # colours of a profile -> mode it takes


def unclear(picture: Image.Image, info: Mapping[str, object]) -> str:
    """Why the values of a picture do not say which colours they are, "" if they do.

    picture, info  as reading.pictures.open_picture yields them
    """
    if picture.format == "TIFF" and (reason := _tiff_unclear(picture)):
        return reason
    if picture.mode == "F":
        return "floating-point gray has no agreed white; save it as 8 or 16 bit"
    if picture.mode == "I" and picture.format != "PPM":
        return "32-bit gray has no agreed white; save it as 8 or 16 bit"
    if "icc_profile" in info:
        return ""
    if any(mark in info.get("exif", b"") for mark in ADOBE_RGB_MARKS):
        return "its Exif names Adobe RGB, but there is no profile; embed the profile, or save it as sRGB"
    start = _start(picture) if picture.format in ("AVIF", "JPEG2000") else b""
    if b"colr\2" in start and picture.format == "JPEG2000":
        return "JPEG 2000 with a colour profile, which is not read; save it as PNG or JPEG with the profile"
    cicp = info.get("cicp") or start.partition(b"colrnclx")[2][1:4:2]
    if cicp and not (cicp[0] in (1, 2) and cicp[1] in (1, 2, 6, 13)):
        return f"its colours are of primaries {cicp[0]}, transfer {cicp[1]} (H.273), such as HDR; save it as sRGB"
    gamma, primaries = info.get("gamma"), info.get("chromaticity")
    if "srgb" not in info and (gamma and abs(gamma * 2.2 - 1) > 0.02 or
                               primaries and max(abs(a - b) for a, b in zip(primaries, SRGB, strict=True)) > 0.005):
        return f"its gAMA {gamma or '-'} and cHRM {primaries or '-'} are not those of sRGB; save it as sRGB"
    return ""


def _tiff_unclear(picture: Image.Image) -> str:
    tags, suffix = picture.tag_v2, os.path.splitext(picture.filename)[1].lower()
    if suffix in RAW or 50706 in tags or tags.get(254, 0) & 1:  # DNGVersion; a reduced picture before the real one
        return DEVELOP
    if picture.n_frames > 1:
        return f"TIFF of {picture.n_frames} pages; save the one that is meant"
    if set(tags.get(339, (1,))) - {1, 3}:
        return f"TIFF of signed samples, {tags.get(258, '?')} bits, without an agreed black; save it as unsigned"
    deep = set(tags.get(258, (1,))) != {8} and tags.get(259, 1) == 1       # BitsPerSample, Compression
    if tags.get(284) == 2 and tags.get(277, 1) > 1 and (picture.mode == "LA" or deep):
        return "TIFF with one plane behind the other, which is not read at this depth; save it interleaved"
    if picture.mode == "YCbCr" and tags.get(259, 1) != 7 and tuple(tags.get(530, (2, 2))) != (1, 1):
        return "TIFF in YCbCr with subsampled colours; save it as RGB"
    return ""


def _start(picture: Image.Image) -> bytes:
    """The boxes of a file before its pixels; Pillow does not give what they declare about colours."""
    with open(picture.filename, "rb") as file:
        return file.read(1 << 16)


def scale_key(picture: Image.Image) -> None:
    """Bring the transparent colour of a PNG, not decoded yet, to the 8 bits that Pillow decodes its samples to."""
    key, stored = picture.info.get("transparency"), picture.tile[0].args if picture.tile else ""
    if stored in ("L;2", "L;4") and key is not None:
        picture.info["transparency"] = key * (85 if stored == "L;2" else 17)
    elif stored == "RGB;16B" and key is not None:
        picture.info["transparency"] = tuple(level >> 8 for level in key)


def gray_of_16_bit(picture: Image.Image) -> Image.Image:
    """Gray of 12 or 16 bits as 8: mode L, or LA if one level is transparent."""
    tags = getattr(picture, "tag_v2", {})
    white = 4095 if tags.get(258) == (12,) else 65535  # BitsPerSample
    table = (np.arange(65536) / (white / 255)).round().clip(0, 255).astype(np.uint8)
    if tags.get(262) == 0:                             # PhotometricInterpretation: 0 is white
        table = table[::-1]
    levels, clear = np.asarray(picture), picture.info.get("transparency")
    gray = Image.fromarray(table[levels])
    if clear is not None:
        gray.putalpha(Image.fromarray(np.where(levels == clear, 0, 255).astype(np.uint8)))
    if "icc_profile" in picture.info:
        gray.info["icc_profile"] = picture.info["icc_profile"]
    return gray


def in_srgb(picture: Image.Image, mode: str, path: str | os.PathLike) -> tuple[Image.Image, str]:
    """The picture as `mode`, RGB or RGBA, its colours in sRGB; and "converted", "broken" or ""."""
    lab, profile = picture.mode == "LAB", picture.info.get("icc_profile")
    if not profile and not lab:
        return picture.convert(mode), ""
    takes, transform, reason = _to_srgb(None if lab else profile)
    fits = {"L": picture.mode in ("1", "L", "LA"), "CMYK": picture.mode == "CMYK", "LAB": lab,
            "RGB": picture.mode not in ("CMYK", "LAB")}
    if not reason and not fits[takes]:
        reason = f"it is for {takes}, the picture is {picture.mode}"
    if reason:
        _say_once(f"note: {path}: its colour profile cannot be used ({reason}); read as sRGB")
        return picture.convert(mode), "broken"
    if not transform:
        return picture.convert(mode), ""
    converted = transform.apply(picture.convert(takes))
    if mode == "RGBA":
        converted.putalpha(picture.convert("RGBA").getchannel("A"))
    return converted, "converted"


@lru_cache(32)
def _to_srgb(profile: bytes | None) -> tuple[str, ImageCms.ImageCmsTransform | None, str]:
    """What a profile does; None is CIE L*a*b* of white D50.

    returns  the mode it takes; the transform to sRGB, relative colorimetric, None if it changes no level by more than
             1; why it cannot be used, "" if it can
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile) if profile else ImageCms.createProfile("LAB"))
        space = source.profile.xcolor_space.strip()
        if space not in SPACES:
            return "", None, f"its colours are {printable(space)}"
        takes, srgb = SPACES[space], ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, srgb, takes, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC)
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        return "", None, " ".join(str(error).split())
    if takes in ("L", "RGB"):
        levels = np.arange(0, 256, 15, dtype=np.uint8)
        probe = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(18, -1, 3)
        probe = Image.fromarray(probe).convert(takes)
        change = np.asarray(probe.convert("RGB"), dtype=int) - np.asarray(transform.apply(probe))
        transform = transform if np.abs(change).max() > 1 else None
    return takes, transform, ""


@cache
def _say_once(line: str) -> None:
    print(printable(line), file=sys.stderr)
