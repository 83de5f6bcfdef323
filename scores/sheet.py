"""A sheet of heat maps: the picture, then both GLCM Scores and the bits of its JPEG, cell by cell.

Scale  every colour is one of the bar under its map, and means the same in every sheet; a + marks larger numbers in it;
       gray: no complete cell
Run    python metrics.py detail PICTURES… --maps DIR
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from files import printable
from scores.glcm import PATCH, glcm_map
from scores.jpeg import compression_ratio, jpeg_bits, jpeg_size

# low to high, RGB
RAMP = np.array([[10, 8, 60], [110, 20, 130], [215, 60, 80], [250, 150, 40], [255, 250, 190]], dtype=np.float64)
PANELS = (("GLCM, release", 0.0, 3.0, "bits"), ("GLCM, entropy", 0.0, 12.0, "bits"),
          ("JPEG, quality 95", 0.0, 6.0, "bits/px"))  # name, range of the colours, unit
LINE_PX, BAR_PX = 24, 10
MOST_ASPECT = 4  # height / width of a panel; the map of a taller picture is narrower


def heat(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """(h, w) numbers -> (h, w, 3) uint8 colours, dark to light from `low` to `high`."""
    at = np.clip((values - low) / (high - low), 0, 1) * (len(RAMP) - 1)
    channels = [np.interp(at, np.arange(len(RAMP)), channel) for channel in RAMP.T]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def detail_sheet(pixels: np.ndarray, title: str, width: int = 480) -> Image.Image:
    """The picture, (H, W, 3) uint8, and its three maps in one row, `width` pixels each, with the scores above."""
    scale = min(width / pixels.shape[1], MOST_ASPECT * width / pixels.shape[0])
    height, across = (max(1, round(side * scale)) for side in pixels.shape[:2])
    maps = [(glcm_map(pixels, definition), PATCH) for definition in ("release", "entropy")]
    maps += [(jpeg_bits(pixels) / 64, 8)]
    scores = [*(values.mean() for values, _ in maps[:2]), jpeg_size(pixels) * 8 / pixels[..., 0].size]
    sheet = Image.new("RGB", (4 * width, LINE_PX + height + BAR_PX + LINE_PX), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    draw.text((4, 3), f"{printable(title)}: ratio {compression_ratio(pixels):.2f}", "black", font)
    sheet.paste(Image.fromarray(pixels).resize((across, height), Image.Resampling.LANCZOS), (0, LINE_PX))
    for k, ((values, cell), score, (name, low, high, unit)) in enumerate(zip(maps, scores, PANELS, strict=True), 1):
        left, bottom = k * width, LINE_PX + height
        draw.text((left + 4, 3), f"{name}: {score:.3f} {unit}", "black", font)
        sheet.paste("lightgray", (left, LINE_PX, left + across, bottom))
        size = [max(1, round(n * cell * scale)) for n in values.shape[::-1]]
        means = Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling.BOX)  # of numbers, not colours
        colours = heat(np.asarray(means)[:height, :across], low, high)
        sheet.paste(Image.fromarray(colours), (left, LINE_PX))
        bar = heat(np.linspace(low, high, width - 8)[None], low, high).repeat(BAR_PX - 2, axis=0)
        sheet.paste(Image.fromarray(bar), (left + 4, bottom + 2))
        numbers = f"{low:g}", f"{(low + high) / 2:g}", f"{high:g}" + "+" * bool((values > high).any())
        for at, number, anchor in zip((0, 0.5, 1), numbers, ("la", "ma", "ra"), strict=True):
            draw.text((left + 4 + at * (width - 8), bottom + BAR_PX + 3), number, "black", font, anchor)
    return sheet
