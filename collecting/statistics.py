"""Statistics of data folders: sizes of pictures, lengths of captions, words.

Paper     Diffusion-4K section 8: table 9 (heights and widths), figure 13 (their histograms), figure 14 (words)
Sizes     pixels, of the upright picture, from what its file declares: no picture is decoded
Words     runs of letters, marks, digits and apostrophes, in lower case; COMMON ones are left out of the frequencies
Run       python data.py stats DIR… [--plot FILE]
Check     python -m pytest tests/test_statistics.py
"""

import importlib
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from collecting.listings import Item
from files import printable, replacing
from reading.pictures import upright_size

COMMON = frozenset("a about above across after against all also an and are around as at be behind below beneath beside "
                   "between both but by each for from has have her his in into is it its near of off on one or other "
                   "out over she he some that the their them there these they this through to towards under up upon "
                   "very was were which while who with within without".split())
WORDS, MOST_BINS = 20, 24


@dataclass(frozen=True)
class Statistics:
    """Of the pictures of one folder that can be read."""

    name: str
    sizes: np.ndarray      # (N, 2): height and width, pixels
    lengths: np.ndarray    # (C,) words of each caption
    words: Counter


def statistics(name: str, items: Sequence[Item], errors: list[str]) -> Statistics:
    """Of the items of a folder; `errors` gets a line per picture that cannot be read."""
    sizes, lengths, words = [], [], Counter()
    for item in tqdm(items, desc=printable(name), file=sys.stderr):
        try:
            sizes.append(upright_size(item.path)[::-1])
        except ValueError as error:
            errors.append(str(error))
            continue
        for caption in item.captions:
            found = words_of(caption)
            lengths.append(len(found))
            words.update(word for word in found if word not in COMMON)
    return Statistics(name, np.array(sizes).reshape(-1, 2), np.array(lengths), words)


def words_of(caption: str) -> list[str]:
    """The words of a caption; a vowel sign or an accent is part of its word, which it is not to Python's regexes."""
    letters = unicodedata.normalize("NFC", caption.lower())
    kept = "".join(c if unicodedata.category(c)[0] in "LMN" or c in "_'’" else " " for c in letters)
    return re.findall(r"[^\s'’]+(?:['’][^\s'’]+)*", kept)


def report(folders: Sequence[Statistics]) -> str:
    """Table 9 with one row per folder, then histograms and the most frequent words."""
    rows = [("", "pictures", "median height", "median width", "average height", "average width", "captions",
             "median words", "most words")]
    for of in folders:
        middle, mean = (f(of.sizes, axis=0) if len(of.sizes) else (np.nan, np.nan) for f in (np.median, np.mean))
        words = (f"{np.median(of.lengths):.0f}", str(of.lengths.max())) if len(of.lengths) else ("-", "-")
        rows.append((printable(of.name), f"{len(of.sizes):,}", *(f"{side:.0f}" for side in (*middle, *mean)),
                     f"{len(of.lengths):,}", *words))
    text = [_aligned(rows)]
    edges = bin_edges(np.concatenate([of.sizes for of in folders]))
    for of in folders:
        counts = [np.histogram(side, edges)[0] for side in of.sizes.T]
        rows = [(f"{printable(of.name)}, pixels", "heights", "widths")]
        rows += [(f"{low} to {high - 1}", *map(str, pair))
                 for low, high, *pair in zip(edges, edges[1:], *counts, strict=False) if any(pair)]
        words = ", ".join(f"{word} {count}" for word, count in of.words.most_common(WORDS))
        text += [_aligned(rows), f"{printable(of.name)}, frequent words: {printable(words) or '-'}"]
    return "\n\n".join(text)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of texts as columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) if k else cell.ljust(width)
                               for k, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in rows)


def bin_edges(numbers: np.ndarray) -> list[int]:
    """Edges of bins of one width, a power of 2, that hold all numbers: at most MOST_BINS from 0 to the largest."""
    largest, step = int(numbers.max(initial=1)), 1
    while largest // step >= MOST_BINS:
        step *= 2
    return list(range(int(numbers.min(initial=largest)) // step * step, largest + step + 1, step))


def plot(folders: Sequence[Statistics], file: Path) -> None:
    """Draw figure 13, a histogram of the captions' lengths, and the most frequent words, one row per folder."""
    figure = importlib.import_module("matplotlib.figure").Figure((9, 3.2 * len(folders)), layout="constrained")
    for row, of in zip(figure.subplots(len(folders), 3, squeeze=False), folders, strict=True):
        edges = bin_edges(of.sizes)
        for side, name in zip(of.sizes.T, ("height", "width"), strict=True):
            row[0].hist(side, edges, alpha=0.6, label=f"{name}, median {np.median(side) if len(side) else 0:.0f}")
        row[0].set(title=printable(of.name).replace("$", r"\$"), xlabel="pixels", ylabel="pictures")
        row[0].margins(y=0.35)  # room for the legend
        row[0].legend(fontsize=8)
        row[1].hist(of.lengths, bin_edges(of.lengths))
        row[1].set(xlabel="words per caption", ylabel="captions")
        frequent = of.words.most_common(WORDS)[::-1]
        row[2].barh([word for word, _ in frequent], [count for _, count in frequent])
        row[2].tick_params(axis="y", labelsize=7)
        row[2].set(xlabel="occurrences")
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=100)
