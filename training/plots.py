"""OUT/loss.png: losses over the steps of a run, one figure, where matplotlib is installed.

Panels    loss of the objective · training beside held-out, on the sigma bins that training draws · by sigma bin · by
          band · learning rate. Solid: training, running means; dashed with points: held-out
Check     python -m pytest tests/test_plots.py
"""

import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from files import replacing
from training.logs import SIGMA_BINS, installed
from wavelet import BANDS

WINDOWS = 30  # running means are over a thirtieth of the lines
Rows = Sequence[Mapping[str, Any]]


def running_mean(values: Sequence[float | None], window: int) -> list[float]:
    """Of each value and those before it; None does not count, and where nothing does the mean is NaN."""
    means = []
    for end in range(1, len(values) + 1):
        seen = [value for value in values[max(0, end - window):end] if value is not None]
        means.append(sum(seen) / len(seen) if seen else math.nan)
    return means


def write_figure(path: Path, rows: Rows, held_out: Rows) -> None:
    """Draw what log.jsonl and held_out.jsonl hold; a row is of one step."""
    if not rows or not installed("matplotlib"):
        return
    figure = import_module("matplotlib.figure").Figure(figsize=(10, 9), layout="constrained")
    axes = figure.subplot_mosaic([["loss", "held-out"], ["sigma", "band"], ["lr", "lr"]], height_ratios=(4, 4, 1.6))
    steps, window = [row["step"] for row in rows], max(1, len(rows) // WINDOWS)
    colours = import_module("matplotlib").colormaps["viridis"]

    axes["loss"].plot(steps, [row["loss"] for row in rows], color="tab:blue", alpha=0.3, linewidth=0.8)
    axes["loss"].plot(steps, running_mean([row["loss"] for row in rows], window), color="tab:blue")
    axes["loss"].set_title("training loss, as --objective has it")

    bins = {k: running_mean([row.get("v_by_sigma", [None] * SIGMA_BINS)[k] for row in rows], window)
            for k in range(SIGMA_BINS)}
    drawn = {k: means for k, means in bins.items() if not all(map(math.isnan, means))}
    for k, means in drawn.items():
        label = f"{k / SIGMA_BINS:.2f} to {(k + 1) / SIGMA_BINS:.2f}"
        _both(axes["sigma"], colours(0.95 * k / (SIGMA_BINS - 1)), label, steps, means, held_out,
              [row["v_by_sigma"][k] for row in held_out])
    axes["sigma"].set_title("velocity loss by sigma")
    axes["sigma"].set_yscale("log")

    for band, colour in zip(BANDS, ("tab:blue", "tab:orange", "tab:green", "tab:red"), strict=True):
        means = running_mean([row.get(f"v_{band}") for row in rows], window)
        _both(axes["band"], colour, band.upper(), steps, means, held_out, [row[f"v_{band}"] for row in held_out])
    axes["band"].set_title("velocity loss by band" + (" (held-out: sigma even)" if held_out else ""))

    if drawn:  # a mean over bins, so that both have the same weight in each
        means = [sum(of_step) / len(drawn) for of_step in zip(*drawn.values(), strict=True)]
        others = [sum(row["v_by_sigma"][k] for k in drawn) / len(drawn) for row in held_out]
        _both(axes["held-out"], "tab:blue", "training", steps, means, held_out, others, "held-out")
    count = f", {held_out[-1]['pictures']} held-out pictures" if held_out else ""
    axes["held-out"].set_title(f"velocity loss, mean of the sigma bins{count}")

    axes["lr"].plot(steps, [row.get("lr", math.nan) for row in rows], color="tab:gray")
    axes["lr"].set(title="learning rate", xlabel="step")
    for panel in axes.values():
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=8, ncols=2 if panel is axes["sigma"] else 1)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


def _both(panel: Any, colour: object, label: str, steps: Sequence[int], training: Sequence[float], held_out: Rows,
          others: Sequence[float], second: str | None = None) -> None:
    """A curve of the training and one of the held-out pictures in one colour; second: the latter's label."""
    panel.plot(steps, training, color=colour, label=label)
    if held_out:
        panel.plot([row["step"] for row in held_out], others, "o--", color=colour, markersize=3, label=second)
