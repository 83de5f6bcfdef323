"""What the measuring scripts draw, and which captions they ask for."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench import stages
from bench.prompt_following import painter, tasks_of, token_borders
from data import Item, Pictures
from family import find
from vae import VAE, to_pixels

ROOT = Path(__file__).parent.parent
ITEMS = [Item(Path(f"{k}.png"), (f"text {k}", *(f"alt {k} {i}" for i in range(5)))) for k in range(3)]


@pytest.mark.parametrize("name", ["tiny-sd3", "tiny-flux"])
def test_painter_draws_what_sample_draws(folders, tmp_path, name):
    out, prompt = tmp_path / "x.png", "a red boat at dawn"
    subprocess.run([sys.executable, ROOT / "sample.py", f"--weights={folders / name}", "--res=64", "--seed=3",
                    f"--out={out}", "--device=cpu", f"--prompt={prompt}"], check=True, capture_output=True)
    family, transformer, vae_path = find(folders / name)
    text = family.text.load(folders / name, t5_length=family.t5_length)
    paint = painter(family, transformer, text, VAE.load(vae_path), family.sampling(transformer), res=64, seed=3)
    drawn, sampled = to_pixels(paint(prompt)[0]).astype(int), np.asarray(Image.open(out)).astype(int)
    assert drawn.std() > 1 and np.abs(drawn - sampled).max() <= 1  # threads may round differently


def test_painter_refuses_sides_that_tokens_do_not_divide(folders):
    family, transformer, vae_path = find(folders / "tiny-sd3")
    with pytest.raises(ValueError, match="multiple of 32"):
        painter(family, transformer, None, None, family.sampling(transformer), res=48)


def test_tasks_are_the_text_and_three_alternatives_of_evenly_chosen_photographs():
    kinds = ("text", "alt", "alt", "alt")
    assert [task[:2] for task in tasks_of(ITEMS, "both", 0, None)] == [(kind, k) for k in range(3) for kind in kinds]
    assert tasks_of(ITEMS, "text", 2, None) == [("text", k, f"text {k}") for k in range(3)]
    assert tasks_of(ITEMS, "alt", 1, None) == [("alt", 0, f"alt 0 {i}") for i in range(3)]


def test_reworded_captions_name_their_photograph(tmp_path):
    (tmp_path / "reworded.tsv").write_text("2.png\tanother wording\n")
    assert tasks_of(ITEMS, "both", 0, str(tmp_path / "reworded.tsv")) == [("reworded", 2, "another wording")]


def test_photographs_are_their_own_nearest_with_their_own_detail(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "FIRST", 64)
    pictures = Pictures(sorted(photos.glob("*.png")))
    squares = [tmp_path / path.name for path in pictures.paths]
    for k, path in enumerate(squares):
        Image.fromarray(pictures.central_crop(k, 64, 64)).save(path)
    assert stages.scores(squares, range(4), pictures) == (4, pytest.approx(1))
    assert stages.scores([squares[1], squares[0]], [0, 1], pictures)[0] == 0


@pytest.mark.parametrize("period, expected", [(32, 3), (2, 1), (16, 3 / (17 / 15))])
def test_token_borders_compare_the_steps_at_multiples_of_32_with_other_even_places(period, expected):
    """Steps of 1 onto even places, of 3 onto multiples of the period."""
    places = torch.arange(1024)
    line = ((places % 2 == 0).float() + 2 * (places % period == 0)).cumsum(0)
    image = (line[:, None] + line).expand(1, 3, 1024, 1024)
    assert token_borders(image) == pytest.approx(expected, rel=1e-3)
