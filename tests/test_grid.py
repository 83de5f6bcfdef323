"""The grid score: lines of known strength, what does not count as a grid, the table of a command."""

import json

import numpy as np
import pytest
from PIL import Image

import metrics
from scores.grid import PERIODS, PHOTOGRAPHS, grid_note, grid_score, grid_scores, spread_of


def noise(side: int = 512, seed: int = 0) -> np.ndarray:
    """Smooth noise, (side, side, 3) uint8."""
    coarse = np.random.default_rng(seed).integers(60, 190, (side // 4, side // 4, 3), np.uint8)
    return np.array(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


def gridded(rgb: np.ndarray, period: int, levels: int, axis: int = 1) -> np.ndarray:
    """The picture with every second tile brighter: steps at each multiple of `period`."""
    tile = np.arange(rgb.shape[axis]) // period % 2 * levels
    return (rgb + (tile[None, :, None] if axis else tile[:, None, None])).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("period", PERIODS)
@pytest.mark.parametrize("axis", [0, 1])
def test_a_grid_stands_out_at_its_period_on_either_axis_and_more_the_stronger(period, axis):
    scores = [grid_score(gridded(noise(), period, levels, axis), period) for levels in (0, 12, 40)]
    assert scores[0] < 8 and scores[0] + 5 < scores[1] < scores[2] - 5


def test_a_grid_of_half_the_period_does_not_count():
    assert grid_score(gridded(noise(), 16, 12), 32) < grid_score(gridded(noise(), 32, 12), 32) - 10


def test_score_does_not_depend_on_colour_or_sides_that_are_no_multiple():
    picture = gridded(noise(), 32, 12)
    gray = np.repeat((picture @ np.array([0.299, 0.587, 0.114]))[..., None].round().astype(np.uint8), 3, axis=2)
    assert grid_score(gray, 32) == pytest.approx(grid_score(picture, 32), abs=1)
    assert abs(grid_score(picture[:500, :505], 32) - grid_score(picture, 32)) < 4


def test_a_flat_picture_has_a_finite_score_and_a_small_one_none():
    assert np.isfinite(grid_score(np.full((512, 512, 3), 9, np.uint8), 32))
    assert grid_scores(noise(256)).keys() == {"grid_16"} and not grid_scores(noise(128))
    with pytest.raises(ValueError, match="256x256 pixels: a grid of 32 px needs sides above 256"):
        grid_score(noise(256), 32)


def test_spread_leaves_out_pictures_without_a_score():
    rows = [{"grid_16": 1.0}, {"grid_16": 3.0}, {}, {"grid_16": 11.0}]
    assert spread_of(rows) == {"grid_16": (3.0, pytest.approx(9.4))}
    assert "Of the 4 reference pictures: grid_16 3.0, a tenth of them over 9.4" in grid_note(rows)
    assert f"Of photographs: grid_16 {PHOTOGRAPHS['grid_16'][0]}" in grid_note()


def test_detail_and_set_show_it(tmp_path, capsys):
    for folder, levels in (("a", 12), ("b", 0)):
        (tmp_path / folder).mkdir()
        for seed in range(2):
            Image.fromarray(gridded(noise(seed=seed), 16, levels)).save(tmp_path / folder / f"{seed}.png")
    a, b, cache = (str(tmp_path / name) for name in ("a", "b", "cache"))
    with pytest.raises(SystemExit):
        metrics.main(["detail", a, "--cache", cache, "--json"])
    rows = json.loads(capsys.readouterr().out)
    expected = [grid_score(gridded(noise(seed=seed), 16, 12), 16) for seed in range(2)]
    assert [row["grid_16"] for row in rows["pictures"]] == pytest.approx(expected)
    assert rows["all"]["grid_16"] == pytest.approx(np.median(expected))
    with pytest.raises(SystemExit):
        metrics.main(["set", a, "--reference", b, "--cache", cache, "--weights", b])
    text = capsys.readouterr().out
    assert f"grid_16            {np.median(expected):10.4f}" in text and "Of the 2 reference pictures: grid_16" in text
