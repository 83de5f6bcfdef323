"""Colours: profiles are converted as Pillow's ImageCms does it, or known to be sRGB; the oracle is ImageCms itself."""

import io
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from pictures import (
    ADOBE_PRIMARIES,
    D65,
    P3_PRIMARIES,
    PROPHOTO_PRIMARIES,
    SRGB_PRIMARIES,
    cmyk_profile,
    golden_picture,
    gray_profile,
    rgb_profile,
)
from PIL import Image, ImageCms, PngImagePlugin

from data import check, read_picture, upright_size

SRGB = ImageCms.createProfile("sRGB")
PROFILES = {"Adobe RGB": rgb_profile(ADOBE_PRIMARIES, 2.2), "Display P3": rgb_profile(P3_PRIMARIES, None),
            "ProPhoto": rgb_profile(PROPHOTO_PRIMARIES, 1.8, (0.3457, 0.3585)),
            "gamma 2.2": rgb_profile(SRGB_PRIMARIES, 2.2)}


def to_srgb(picture: Image.Image, profile: bytes) -> np.ndarray:
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return np.asarray(ImageCms.profileToProfile(picture, opened, SRGB, ImageCms.Intent.RELATIVE_COLORIMETRIC, "RGB"))


def pixels(path) -> np.ndarray:
    return np.asarray(read_picture(path))


@pytest.fixture(scope="module")
def photo():
    return Image.fromarray(golden_picture("coffee")[:96, :128])


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "avif"])
@pytest.mark.parametrize("name", PROFILES)
def test_profile_is_converted_as_imagecms_does(photo, tmp_path, name, suffix):
    file = tmp_path / f"a.{suffix}"
    photo.save(file, icc_profile=PROFILES[name])
    got = read_picture(file)
    assert np.array_equal(np.asarray(got), to_srgb(Image.open(file).convert("RGB"), PROFILES[name]))
    assert got.info == {"profile": "converted"} and not np.array_equal(np.asarray(got), np.asarray(Image.open(file)))


@pytest.mark.parametrize("name, most, mean", [("Adobe RGB", 1, 0.3), ("Display P3", 2, 0.3), ("ProPhoto", 3, 0.6)])
def test_picture_in_another_space_is_read_as_its_srgb_twin(photo, tmp_path, name, most, mean):
    """What is left is the rounding to 8 bits in the other space, of which ProPhoto has the widest steps."""
    opened = ImageCms.ImageCmsProfile(io.BytesIO(PROFILES[name]))
    other = ImageCms.profileToProfile(photo, SRGB, opened, ImageCms.Intent.RELATIVE_COLORIMETRIC)
    other.save(tmp_path / "a.png", icc_profile=PROFILES[name])
    apart = np.abs(pixels(tmp_path / "a.png").astype(int) - np.asarray(photo))
    assert apart.max() <= most and apart.mean() <= mean


def test_srgb_is_known_by_what_it_does(photo, tmp_path):
    named_adobe = rgb_profile(SRGB_PRIMARIES, None, name="Adobe RGB (1998)")
    for k, profile in enumerate((named_adobe, ImageCms.ImageCmsProfile(SRGB).tobytes(), gray_profile(None))):
        picture = photo.convert("L") if k == 2 else photo
        picture.save(tmp_path / "a.png", icc_profile=profile)
        got = read_picture(tmp_path / "a.png")
        assert np.array_equal(np.asarray(got), np.asarray(picture.convert("RGB"))) and not got.info
    photo.save(tmp_path / "b.png", icc_profile=rgb_profile(ADOBE_PRIMARIES, 2.2, D65, "sRGB IEC61966-2.1"))
    assert read_picture(tmp_path / "b.png").info == {"profile": "converted"}


def test_gray_palette_and_transparent_pictures_are_converted_too(photo, tmp_path):
    adobe, linear, file = PROFILES["Adobe RGB"], gray_profile(1.0), tmp_path / "a.png"
    photo.convert("L").save(file, icc_profile=linear)
    expected = to_srgb(photo.convert("L"), linear)
    assert np.array_equal(pixels(file), expected) and expected.mean() > np.asarray(photo.convert("L")).mean() + 20
    photo.convert("L").save(file, icc_profile=adobe)  # gray values of an RGB profile
    assert np.array_equal(pixels(file), to_srgb(photo.convert("L").convert("RGB"), adobe))
    palette = photo.quantize(50)
    palette.save(file, icc_profile=adobe)
    assert np.array_equal(pixels(file), to_srgb(palette.convert("RGB"), adobe))
    clear = photo.copy()
    clear.putalpha(Image.linear_gradient("L").resize(photo.size))
    clear.save(file, icc_profile=adobe)
    colours = Image.fromarray(to_srgb(photo, adobe))
    colours.putalpha(clear.getchannel("A"))
    white = Image.new("RGBA", photo.size, "white")
    assert np.array_equal(pixels(file), np.asarray(Image.alpha_composite(white, colours).convert("RGB")))
    deep = np.linspace(0, 65535, 4096).reshape(64, 64).astype(np.uint16)
    Image.fromarray(deep).save(file, icc_profile=linear)
    light = deep[..., None] / 65535
    exact = 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    bright = np.broadcast_to(deep[..., None] > 6000, (64, 64, 3))  # 8 bits of linear light are too few in the shadows
    assert np.abs(pixels(file) - exact)[bright].max() <= 1.6


@pytest.mark.parametrize("suffix", ["tif", "jpg"])
def test_inks_are_converted_by_their_profile(photo, tmp_path, suffix):
    file, inks = tmp_path / f"a.{suffix}", photo.convert("CMYK")
    inks.save(file, icc_profile=cmyk_profile())
    got = read_picture(file)
    assert np.array_equal(np.asarray(got), to_srgb(Image.open(file), cmyk_profile())) and got.info
    assert np.abs(np.asarray(got, dtype=int) - np.asarray(inks.convert("RGB"))).mean() > 10


def test_lab_is_converted(photo, tmp_path):
    lab = ImageCms.buildTransform(SRGB, ImageCms.createProfile("LAB"), "RGB", "LAB")
    ImageCms.applyTransform(photo, lab).save(tmp_path / "a.tif")
    apart = np.abs(pixels(tmp_path / "a.tif").astype(int) - np.asarray(photo))
    assert apart.mean() < 1.5 and apart.max() < 12


@pytest.mark.parametrize("kind", ["no profile", "cut", "header", "zeros", "HSV", "gray in RGB", "RGB in CMYK"])
def test_unusable_profile_is_said_and_the_picture_read_as_srgb(photo, tmp_path, capsys, kind):
    adobe = PROFILES["Adobe RGB"]
    profile = {"no profile": b"no profile", "cut": adobe[:-200], "header": adobe[:128], "zeros": bytes(600),
               "HSV": adobe.replace(b"RGB ", b"HSV "), "gray in RGB": gray_profile(1.0)}.get(kind, adobe)
    picture = photo.convert("CMYK") if kind == "RGB in CMYK" else photo
    picture.save(tmp_path / f"{kind}.tif", icc_profile=profile)
    for _ in range(2):
        got = read_picture(tmp_path / f"{kind}.tif")
    assert np.array_equal(np.asarray(got), np.asarray(picture.convert("RGB"))) and got.info == {"profile": "broken"}
    (line,) = capsys.readouterr().err.splitlines()  # once
    assert line.startswith(f"note: {tmp_path}/{kind}.tif: its colour profile cannot be used (")


def test_check_counts_conversions(photo, tmp_path, capsys):
    for k, profile in enumerate((PROFILES["ProPhoto"], PROFILES["Display P3"], b"broken", None)):
        photo.save(tmp_path / f"{k}.png", icc_profile=profile)
    photo.save(tmp_path / "4.gif", save_all=True, append_images=[photo.rotate(180)])
    rows = (f'{{"file_name": "{k}.{"gif" if k == 4 else "png"}", "text": "a"}}\n' for k in range(5))
    (tmp_path / "metadata.jsonl").write_text("".join(rows))
    assert check(str(tmp_path)) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "2 converted to sRGB from other colours", "1 with a broken colour profile, read as sRGB",
        "1 animations, of which the first frame is read"]


def test_threads_read_together_and_leave_the_limits_of_pillow(photo, tmp_path):
    """A text above Pillow's limit in every picture: a reader that restores the limit early stops the others."""
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * (3 << 20), zip=True)
    photo.save(tmp_path / "a.png", pnginfo=info, icc_profile=PROFILES["ProPhoto"])
    photo.save(tmp_path / "b.png", pnginfo=info)
    limits = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(6) as pool:
            read = list(pool.map(lambda k: pixels(tmp_path / f"{'ab'[k % 2]}.png"), range(60)))
    finally:
        sys.setswitchinterval(interval)
    assert all(np.array_equal(got, read[k % 2]) for k, got in enumerate(read))
    assert limits == (Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)
    assert upright_size(tmp_path / "a.png") == photo.size
