"""The page and the picture of bench/ablation.py: tables with 95 % intervals, sentences that follow from them alone.

Interval   mean ± t · deviation / √n, Student's t, of n seeds or photographs
Clear      a difference, which is paired, whose interval leaves out 0 in the digits that are printed
Check      python -m pytest tests/test_ablation.py
"""

import math
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 % quantiles for 1 to 9 degrees of freedom
SIGMAS = tuple(f"loss at σ {k / 8:g}–{(k + 1) / 8:g}" for k in range(8))
LOSSES = {
    "none": "none: the base", "velocity": "velocity MSE", "wlf": "WLF, paper: equal bands",
    "wlf_release": "WLF, released: σ² weight", "bands_4": "bands 1, 2, 2, 4", "bands_16": "bands 1, 4, 4, 16",
    "huber": "pseudo-Huber bands, 0.1", "snr_huber": "SNR-aware Huber", "mask": "wavelet mask"}
VAES = {"photographs": "the photographs", "f8": "factor 8", "f16": "factor 16: dilation 2, offset 2",
        "f16_dilation_1": "dilation 1, offset 2", "f16_offset_1": "dilation 2, offset 1",
        "f16_both_1": "dilation 1, offset 1", "f16_decoder": "decoder trained at factor 16"}
DETAIL = {"glcm_release": ("release GLCM", ".3f"), "glcm_entropy": ("entropy GLCM", ".3f"),
          "glcm_symmetric": ("symmetric GLCM", ".3f"), "ratio": ("compression ratio", ".2f"),
          "grid_16": ("grid 16, dB", ".1f"), "grid_32": ("grid 32, dB", ".1f"),
          "frechet": ("simple Fréchet", ".2f")}
BANDS = {name: (f"{name}, dB", ".2f") for name in ("LH 1", "HL 1", "HH 1", "LL 2", "LH 2", "HL 2", "HH 2")}
HELD_OUT = {"held_out": ("loss", ".4f")} | {name: (name, ".4f") for name in SIGMAS}
OF_VAE = {"psnr": ("PSNR, dB", ".2f"), "ssim": ("SSIM", ".4f"), "grid_16": ("grid 16, dB", ".1f"),
          "grid_32": ("grid 32, dB", ".1f")}
Columns = Mapping[str, tuple[str, str]]
Runs = Mapping[str, Sequence[Mapping[str, float]]]  # name -> scores of each seed or photograph


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of the 95 % interval, 2 to 10 values."""
    values = np.asarray(values, dtype=np.float64)
    return float(values.mean()), float(T[len(values) - 2] * values.std(ddof=1) / math.sqrt(len(values)))


def difference(runs: Runs, name: str, other: str, key: str) -> tuple[float, float] | None:
    """Mean and half width of name - other, paired; None where one of them lacks the score."""
    pairs = [(a[key], b[key]) for a, b in zip(runs[name], runs[other], strict=True) if key in a and key in b]
    return t_interval([a - b for a, b in pairs]) if pairs else None


def clear(interval: tuple[float, float] | None, form: str) -> bool:
    """Whether it leaves out 0, also once it is printed."""
    return interval is not None and float(f"{abs(interval[0]):{form}}") > float(f"{interval[1]:{form}}")


# ---- tables

def rows_of(head: str, rows: Sequence[Sequence[str]], columns: Sequence[str]) -> str:
    lines = [[head, *columns], ["---"] * (len(columns) + 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def table(runs: Runs, titles: Mapping[str, str], columns: Columns, first: Mapping[str, float] | None = None) -> str:
    """A row per name of runs; first: a row of the photographs, one number each."""
    columns = {key: column for key, column in columns.items() if any(key in row for of in runs.values() for row in of)}
    rows = [["the photographs", *(f"{first[key]:{form}}" if key in first else "" for key, (_, form) in
                                  columns.items())]] if first else []
    for name, scores in runs.items():
        cells = [t_interval([row[key] for row in scores]) if key in scores[0] else None for key in columns]
        rows.append([titles[name], *(shown(cell, form) for cell, (_, form) in zip(cells, columns.values(),
                                                                                    strict=True))])
    return rows_of("", rows, [title for title, _ in columns.values()])


def differences(runs: Runs, titles: Mapping[str, str], columns: Columns, other: str) -> str:
    """A row per name: its paired differences from `other`, bold where clear."""
    columns = {key: column for key, column in columns.items() if key in runs[other][0]}
    rows = [[titles[name], *(shown(cell := difference(runs, name, other, key), form, "+", clear(cell, form))
                             for key, (_, form) in columns.items())] for name in runs if name != other]
    return rows_of(f"minus {titles[other]}", rows, [title for title, _ in columns.values()])


def shown(interval: tuple[float, float] | None, form: str, sign: str = "", bold: bool = False) -> str:
    if interval is None:
        return ""
    mean, half = interval
    text = f"{mean:{sign}{form}} ± {half:{form}}".replace("-", "−")
    return f"**{text}**" if bold else text


# ---- sentences

def follows(runs: Runs, titles: Mapping[str, str], columns: Columns, other: str, skipped: Sequence[str] = ()) -> str:
    """What is clear, name by name, and how many differences are not; skipped: names that are no alternative."""
    lines, number, found = [], 0, 0
    for name in (name for name in runs if name not in (other, *skipped)):
        of_name = {key: cell for key in columns if (cell := difference(runs, name, other, key))}
        parts = [f"{columns[key][0]} {shown(cell, columns[key][1], '+')}" for key, cell in of_name.items()
                 if clear(cell, columns[key][1])]
        number, found = number + len(of_name), found + len(parts)
        lines.append(textwrap.fill(f"- {titles[name]}: {'; '.join(parts) or 'nothing'}.", 120, subsequent_indent="  "))
    chance = textwrap.fill(
        f"These are {found} of {number} differences, which are not independent. If none existed, about "
        f"{max(1, round(number / 20))} would be clear by chance. Of the others neither a difference nor its absence "
        "follows.", 120)
    return "\n".join([f"Clearly different from {titles[other]}, at 95 % each:\n", *lines, "", chance, ""])


def equality(weights: Mapping[str, Mapping[str, float]]) -> str:
    """The table of pairs of runs, and how far apart the last three are."""
    rows = [[pair, f"{row['equal']:.1%}", f"{row['share']:.1e}", f"{row['most']:.1e}"] for pair, row in weights.items()]
    wlf, reordered, seed = [f"{row['share']:.1g}" for row in weights.values()][-3:]
    return f"""Transformers of seed 0, weight by weight. The distance is L2, over the MSE's distance from the base.

{rows_of("", rows, ["equal bit for bit", "distance", "largest difference"])}
In exact arithmetic the two losses are one, see [losses.md](losses.md). Here they end {wlf} apart;
the MSE, its sums taken in another order, {reordered}; another seed, {seed}.
"""


def page(runs: Runs, photographs: Mapping[str, float], weights: Mapping[str, Mapping[str, float]], vaes: Runs,
         about: str) -> str:
    """The text of the page; about: how it was made."""
    every = DETAIL | BANDS | HELD_OUT
    rebuilt = {name: rows for name, rows in vaes.items() if name != "photographs"}
    return f"""# Ablation

Made by `bench/ablation.py`; every sentence below the tables is written from their intervals.

{about}

"a ± b" is the mean and Student's 95 % interval. A difference is of runs with the same seed; **bold**: its interval
leaves out 0. What GLCM, compression ratio and grid score are: [differences.md](differences.md).

## Is WLF with equal bands the MSE?

{equality(weights)}
## Pictures

{table(runs, LOSSES, DETAIL, photographs)}
{differences(runs, LOSSES, DETAIL, "velocity")}
More detail is not better by itself: noise has the most. The Fréchet distance is of nine numbers per patch of 64 px,
means of R, G, B and logarithms of the energies of LH, HL, HH at two levels, each over its deviation in the
photographs. It is no FID.

## Energy of the Haar bands, beside the photographs

Of the pixels, level 1 and 2, in decibels over the photographs of the same captions: 0 is as they have.

{table(runs, LOSSES, BANDS)}
{differences(runs, LOSSES, BANDS, "velocity")}
## Held-out loss

|v̂ − v|² of photographs that no run trained on; the base has seen them at 256 px. By eighths of σ.

{table(runs, LOSSES, HELD_OUT)}
{differences(runs, LOSSES, HELD_OUT, "velocity")}
## The same captions and seed

![Three captions, each scaled down and its middle at full size; a row per loss](ablation.jpg)

## What follows

{follows(runs, LOSSES, every, "velocity", ["wlf"])}
The model has 9 million parameters, the photographs are few, the runs short, the learning rate is the same in all: a
loss that another rate would suit better is not given it. Nothing follows about SD3, Flux or 4096 px.

## The autoencoder

The embedded autoencoder on the held-out photographs. The trained decoder has not seen them; nor has the autoencoder, if
they are the six that `train_vae.py` holds out of those of `models/fetch_photos.py`. Intervals are over photographs.

{table(vaes, VAES, OF_VAE)}
{differences(rebuilt, VAES, OF_VAE, "f16")}
{follows(rebuilt, VAES, OF_VAE, "f16")}"""


# ---- the picture

def strip(pictures: Mapping[str, Sequence[np.ndarray]], side: int = 128, label: int = 170) -> Image.Image:
    """A row per loss: its name, then each picture scaled down and its middle at full size."""
    sheet = Image.new("RGB", (label + 2 * side * len(next(iter(pictures.values()))), side * len(pictures)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (name, of_name) in enumerate(pictures.items()):
        draw.text((4, row * side + side // 2 - 8), LOSSES[name].partition(":")[0], "black", font_size=13)
        for k, pixels in enumerate(map(Image.fromarray, of_name)):
            left, top = ((length - side) // 2 for length in pixels.size)
            sheet.paste(pixels.resize((side, side), Image.Resampling.LANCZOS), (label + 2 * k * side, row * side))
            sheet.paste(pixels.crop((left, top, left + side, top + side)), (label + (2 * k + 1) * side, row * side))
    return sheet
