"""A sheet of heat maps: the picture, then over its gray both GLCM Scores and the bits of its JPEG.

Scale  the colours mean the same in every sheet; the strip under a map shows them
Run    python metrics.py detail PICTURES… --maps DIR
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from scores.glcm import DEFINITIONS, PATCH, glcm_map
from scores.jpeg import compression_ratio, jpeg_bits, jpeg_size

# low to high, RGB
RAMP = np.array([[10, 8, 60], [110, 20, 130], [215, 60, 80], [250, 150, 40], [255, 250, 190]], dtype=np.float64)
PANELS = (("GLCM, release", 0.0, 3.0, "bits"), ("GLCM, entropy", 0.0, 12.0, "bits"),
          ("JPEG, quality 95", 0.0, 6.0, "bits/px"))  # name, range of the colours, unit
LINE_PX, BAR_PX = 24, 10


def heat(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """(h, w) numbers -> (h, w, 3) uint8 colours, dark to light from `low` to `high`."""
    at = np.clip((values - low) / (high - low), 0, 1) * (len(RAMP) - 1)
    channels = [np.interp(at, np.arange(len(RAMP)), channel) for channel in RAMP.T]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def detail_sheet(pixels: np.ndarray, title: str, width: int = 480) -> Image.Image:
    """The picture, (H, W, 3) uint8, and its three maps in one row, `width` pixels each, with the scores above."""
    scale = width / pixels.shape[1]
    height = round(pixels.shape[0] * scale)
    small = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
    gray = small.convert("L").convert("RGB")
    maps = [(glcm_map(pixels, definition), PATCH) for definition in DEFINITIONS] + [(jpeg_bits(pixels) / 64, 8)]
    scores = [*(values.mean() for values, _ in maps[:2]), jpeg_size(pixels) * 8 / pixels[..., 0].size]
    sheet = Image.new("RGB", (4 * width, height + LINE_PX + BAR_PX), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    draw.text((4, 3), f"{title}: ratio {compression_ratio(pixels):.2f}", "black", font)
    sheet.paste(small, (0, LINE_PX))
    for k, ((values, cell), score, (name, low, high, unit)) in enumerate(zip(maps, scores, PANELS, strict=True), 1):
        size = [max(1, round(side * cell * scale)) for side in values.shape[::-1]]
        colours = Image.fromarray(heat(values, low, high)).resize(size, Image.Resampling.BOX)
        colours = colours.crop((0, 0, min(colours.width, width), min(colours.height, height)))
        panel = gray.copy()
        panel.paste(Image.blend(panel.crop((0, 0, *colours.size)), colours, 0.7))
        sheet.paste(panel, (k * width, LINE_PX))
        bar = heat(np.linspace(low, high, width - 8)[None], low, high).repeat(BAR_PX - 2, axis=0)
        sheet.paste(Image.fromarray(bar), (k * width + 4, LINE_PX + height + 2))
        draw.text((k * width + 4, 3), f"{name}: {score:.3f} {unit}   (scale {low:g} to {high:g})", "black", font)
    return sheet
