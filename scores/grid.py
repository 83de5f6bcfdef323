"""The grid that a decoder or a transformer leaves: how far a period stands out of the spectrum of brightness steps.

Source   a decoder at factor 16 repeats its artefacts every 16 pixels, the tokens of a transformer at factor 16 theirs
         every 32. Not in the paper
Score    decibels, lower is better: power at the period's frequency and its odd multiples below the half of it, over the
         median of their neighbours. JPEG leaves lines of 8 pixels, so that 8 is not scored
Resized  by a ratio of small integers, a picture has a grid too: 1600 to 1024 pixels repeats every 16
Shapes   pictures are uint8, (H, W, 3)
Check    python -m pytest tests/test_grid.py
"""

from collections.abc import Collection

import numpy as np

PERIODS = (16, 32)  # pixels
PHOTOGRAPHS = {"grid_16": (2.6, 4.3), "grid_32": (2.3, 4.5)}  # spread_of those of models/CREDITS.md, 1000 x 1000 px
NEAR = 4  # frequencies beside a line that its window widens it to


def grid_score(rgb: np.ndarray, period: int) -> float:
    """How far a grid of `period` pixels stands out, dB, on the axis where it does so more.

    raises  ValueError if a side is not longer than eight periods
    """
    if min(rgb.shape[:2]) <= 8 * period:
        raise ValueError(f"{rgb.shape[1]}x{rgb.shape[0]} pixels: a grid of {period} px needs sides above {8 * period}")
    luminance = rgb @ np.array([0.299, 0.587, 0.114])
    return max(_of_axis(luminance, period), _of_axis(luminance.T, period))


def _of_axis(luminance: np.ndarray, period: int) -> float:
    """The score of steps from column to column."""
    steps = np.log1p(np.abs(np.diff(luminance, axis=1))).mean(0)
    n = len(steps) // period * period                   # multiples of 1 / period are then frequencies of the FFT
    steps, box = steps[:n], np.ones(2 * period + 1)
    smooth = np.convolve(steps, box, "same") / np.convolve(np.ones(n), box, "same")
    power = np.abs(np.fft.rfft((steps - smooth) * np.hanning(n))) ** 2
    ratios = []
    for k in range(1, (period + 1) // 2, 2):
        line, reach = k * n // period, max(NEAR + 1, n // (2 * period))
        beside = [f for f in range(line - reach, line + reach + 1) if abs(f - line) >= NEAR and 0 <= f < len(power)]
        ratios.append(power[line] / max(np.median(power[beside]), 1e-12))
    return float(10 * np.log10(max(np.mean(ratios), 1e-12)))


def grid_scores(rgb: np.ndarray) -> dict[str, float]:
    """grid_16 and grid_32 of a picture, without those that it is too small for."""
    return {f"grid_{period}": grid_score(rgb, period) for period in PERIODS if min(rgb.shape[:2]) > 8 * period}


def spread_of(rows: Collection[dict]) -> dict[str, tuple[float, float]]:
    """Median and 90th percentile of a set; a score that no picture has is left out."""
    scores = {name: [row[name] for row in rows if name in row] for name in PHOTOGRAPHS}
    return {name: tuple(np.percentile(values, (50, 90)).tolist()) for name, values in scores.items() if values}


def grid_note(reference: Collection[dict] = ()) -> str:
    """One line: what the score is, and what a reference has, else photographs."""
    spread = spread_of(reference)
    whose = f"the {len(reference)} reference pictures" if spread else "photographs"
    has = ", ".join(f"{name} {median:.1f}, a tenth of them over {most:.1f}"
                    for name, (median, most) in (spread or PHOTOGRAPHS).items())
    return f"grid: dB over neighbouring frequencies, lower is better; of a set, the median. Of {whose}: {has}"
