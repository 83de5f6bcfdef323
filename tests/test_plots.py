"""The figure of a run: what it shows, where matplotlib is installed."""

import math

import pytest
from PIL import Image

from training.plots import means_of_blocks, write_figure


def row(step: int, loss: float, **more: object) -> dict[str, object]:
    bands = {f"v_{band}": loss for band in ("ll", "lh", "hl", "hh")}
    return {"step": step, "loss": loss, "lr": 1e-4, "v_by_sigma": [None] * 4 + [loss] * 4} | bands | more


def test_means_of_blocks_are_over_those_that_there_are():
    assert means_of_blocks([1.0, 3.0, 5.0]) == [1, 3, 5]
    values = [float(k) for k in range(48)]
    values[0], values[2], values[3] = None, None, None
    means = means_of_blocks(values)
    assert means[0] == 1 and math.isnan(means[1]) and means[2:] == [2 * k + 0.5 for k in range(2, 24)]
    assert len(means_of_blocks(values[:47])) == 24


def test_figure_shows_training_beside_held_out_losses(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [row(k, 1 / k) for k in range(1, 40)]
    held_out = [row(k, 1.5 / (k + 1), v_by_sigma=[1.0] * 8, pictures=5) for k in (0, 20, 39)]
    for name, others in (("plain.png", []), ("held.png", held_out)):
        write_figure(tmp_path / name, rows, others)
        assert Image.open(tmp_path / name).width == 1000
    write_figure(tmp_path / "old.png", [{"step": 1, "loss": 2.0}], [])  # lines of an older run
    write_figure(tmp_path / "none.png", [], [])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["held.png", "old.png", "plain.png"]
