"""Sheets of heat maps: every colour is one of the scale, whatever the picture looks like, and any shape has a sheet."""

import numpy as np
import pytest
from PIL import Image

from scores.glcm import glcm_map
from scores.sheet import LINE_PX, PANELS, RAMP, detail_sheet, heat


def from_ramp(colours: np.ndarray) -> float:
    """The largest distance of colours (N, 3) from the scale, in levels."""
    scale = np.stack([np.interp(np.linspace(0, 4, 4001), np.arange(5), channel) for channel in RAMP.T], axis=-1)
    return max(np.abs(scale - colour).max(axis=1).min() for colour in np.unique(colours, axis=0))


@pytest.mark.parametrize("shade", [0, 128, 255])
def test_maps_show_the_colours_of_the_scale_whatever_is_under_them(shade):
    pixels = np.full((320, 480, 3), shade, np.uint8)  # a sky, and noise in its lower half
    pixels[160:] = np.random.default_rng(0).integers(0, 256, (160, 480, 3))
    sheet = np.asarray(detail_sheet(pixels, "sky"))
    for k in range(1, 1 + len(PANELS)):
        panel = sheet[LINE_PX:LINE_PX + 320, k * 480:k * 480 + 448]  # seven patches across
        assert from_ramp(panel.reshape(-1, 3)) <= 1
        bar = sheet[LINE_PX + 320 + 3, k * 480 + 4:k * 480 + 476].astype(int)
        assert (bar[0] == RAMP[0]).all() and (bar[-1] == RAMP[-1]).all() and from_ramp(bar) <= 1
        assert np.abs(panel[40, 100] - RAMP[0]).max() <= (0 if k < 3 else 8)  # no detail: the lowest colour


def test_a_cell_has_the_colour_of_its_number():
    pixels = np.random.default_rng(1).integers(0, 256, (128, 192, 3), dtype=np.uint8)
    pixels[:64, :64] //= 8
    sheet, values = np.asarray(detail_sheet(pixels, "noise", width=192)), glcm_map(pixels, "entropy")
    for (row, column), value in np.ndenumerate(values):
        shown = sheet[LINE_PX + row * 64 + 32, 2 * 192 + column * 64 + 32]
        assert (shown == heat(np.array([[value]]), 0, 12)[0, 0]).all()


@pytest.mark.parametrize("height, width", [(64, 64), (64, 4000), (4000, 64), (65, 200), (1000, 70)])
def test_any_shape_has_a_sheet_of_bounded_size(height, width):
    pixels = np.random.default_rng(2).integers(0, 256, (height, width, 3), dtype=np.uint8)
    sheet = detail_sheet(pixels, "a\nname")
    assert sheet.width == 1920 and sheet.height <= 4 * 480 + 2 * LINE_PX + 10 and isinstance(sheet, Image.Image)
