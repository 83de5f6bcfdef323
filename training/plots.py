"""OUT/loss.png: losses over the steps of a run, one figure, where matplotlib is installed.

Panels    loss of the objective · training beside held-out · by sigma bin · by band · learning rate
Lines     solid: training, means of BLOCKS parts of the log; dashed with points: held-out
Check     python -m pytest tests/test_plots.py
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from itertools import pairwise
from math import nan
from pathlib import Path
from typing import Any

from files import replacing
from training.logs import SIGMA_BINS, installed
from wavelet import BANDS

BLOCKS = 24
TITLES = {"loss": "training loss of --objective", "held-out": "velocity loss", "band": "by band",
          "sigma": "velocity loss by sigma (middles of bins)", "lr": "learning rate by step"}
Rows = Sequence[Mapping[str, Any]]


def means_of_blocks(values: Sequence[float | None]) -> list[float]:
    """The means of at most BLOCKS equal parts; None does not count, and where nothing does a mean is NaN."""
    parts, means = min(BLOCKS, len(values)), []
    for start, end in pairwise(len(values) * k // parts for k in range(parts + 1)):
        block = [value for value in values[start:end] if value is not None]
        means.append(sum(block) / len(block) if block else nan)
    return means


def write_figure(path: Path, rows: Rows, held_out: Rows) -> None:
    """Draw what log.jsonl and held_out.jsonl hold; a row is of one step."""
    if not rows or not installed("matplotlib"):
        return
    figure = import_module("matplotlib.figure").Figure(figsize=(10, 9), layout="constrained")
    axes = figure.subplot_mosaic([["loss", "held-out"], ["sigma", "sigma"], ["band", "lr"]], height_ratios=(3, 4, 3))
    steps, colours = [row["step"] for row in rows], import_module("matplotlib").colormaps
    middles, of_bands = means_of_blocks(steps), [f"v_{band}" for band in BANDS]

    def both(name: str, colour: object, label: str | None, training: Sequence[float | None],
             others: Sequence[float]) -> None:
        axes[name].plot(middles, means_of_blocks(training), color=colour, label=label)
        if held_out and others:
            axes[name].plot([row["step"] for row in held_out], others, "o--", color=colour, markersize=3)

    losses = [row["loss"] for row in rows]
    axes["loss"].plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8)
    both("loss", "tab:blue", None, losses, [])
    both("held-out", "tab:blue", "training",
         [sum(row[band] for band in of_bands) / 4 if "v_ll" in row else None for row in rows],
         [row["loss"] for row in held_out])
    for k in range(SIGMA_BINS):
        both("sigma", colours["viridis"](0.95 * k / (SIGMA_BINS - 1)), f"{(k + 0.5) / SIGMA_BINS:.2f}",
             [row["v_by_sigma"][k] if "v_by_sigma" in row else None for row in rows],
             [row["v_by_sigma"][k] for row in held_out])
    axes["sigma"].set_yscale("log", subs=())
    axes["sigma"].yaxis.set_major_locator(import_module("matplotlib.ticker").LogLocator(subs=(1, 2, 5)))
    axes["sigma"].yaxis.set_major_formatter("{x:g}")
    for k, band in enumerate(of_bands):
        both("band", colours["tab10"](k), band[2:].upper(), [row.get(band) for row in rows],
             [row[band] for row in held_out])
    axes["lr"].plot(steps, [row.get("lr", nan) for row in rows], color="tab:gray")
    axes["lr"].set_ylim(0, None)
    if held_out:
        axes["held-out"].plot([], [], "o--", color="tab:blue", markersize=3,
                              label=f"{held_out[-1]['pictures']} held-out")
    for name, title in TITLES.items():
        axes[name].set_title(title, loc="left")
        axes[name].grid(alpha=0.3)
        if labelled := [line for line in axes[name].lines if not line.get_label().startswith("_")]:
            axes[name].legend(handles=labelled, loc="lower right", bbox_to_anchor=(1, 1), ncols=SIGMA_BINS,
                              frameon=False, columnspacing=1, handlelength=1.5)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
