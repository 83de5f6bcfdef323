"""Statistics of data folders: table 9, histograms, words, the plot."""

import json
import unicodedata

import numpy as np
import pytest
from conftest import run_script
from PIL import Image

import data
from collecting.statistics import COMMON, bin_edges, words_of

SIZES = ((100, 40), (120, 60), (80, 50), (640, 300), (70, 90))  # width, height
TEXTS = ("A red boat on the quiet lake.", "The boat, again; a fisherman's boat!", "Two oak trees", "Über dem See", "x")


@pytest.fixture
def folder(tmp_path):
    rows = []
    for k, (size, text) in enumerate(zip(SIZES, TEXTS, strict=True)):
        turned = Image.Exif()
        turned[0x0112] = 6
        stored = size[::-1] if k == 1 else size
        Image.new("RGB", stored).save(tmp_path / f"{k}.jpg", exif=turned if k == 1 else Image.Exif())
        rows.append(json.dumps({"file_name": f"{k}.jpg", "text": text} | ({"alt": ["a boat"]} if k == 0 else {})))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows[:4]))
    return tmp_path


def stats(capsys, *arguments) -> tuple[object, str]:
    """The exit code of data.py stats in this process, and what it prints."""
    try:
        data.main(["stats", *map(str, arguments)])
        code = 0
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr().out


def test_table_has_the_papers_columns_of_upright_pictures(folder, capsys):
    code, text = stats(capsys, folder)
    header, row, *_ = text.splitlines()
    assert code == 0 and header.split("  ")[-1].strip() == "most words"
    heights, widths = [height for _, height in SIZES], [width for width, _ in SIZES]
    expected = [f"{f(side):.0f}" for f in (np.median, np.mean) for side in (heights, widths)]
    assert header.index("median height") < header.index("median width") < header.index("average height")
    assert row.split() == [str(folder), "5", *expected, "5", "3", "7"]  # captions, their median, the longest


def test_words_are_counted_without_the_common_ones(folder, capsys):
    _, text = stats(capsys, folder)
    words = text.splitlines()[-1].split("frequent words: ")[1].split(", ")
    assert words[0] == "boat 4" and {"fisherman's 1", "über 1", "oak 1"} <= set(words)
    assert not {word.split()[0] for word in words} & COMMON


def test_a_word_keeps_its_accents_and_vowel_signs():
    cafe = unicodedata.normalize("NFD", "Étude café")
    assert words_of(cafe) == ["étude", "café"] and words_of("हिन्दी में, 2 चित्र") == ["हिन्दी", "में", "2", "चित्र"]


def test_control_characters_and_dollars_of_a_folders_name_steer_nothing(folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = folder.rename(tmp_path.parent / "a $\\frac$ \x1b[2J")
    code, text = stats(capsys, folder, "--plot", folder / "plot.png")
    assert code == 0 and "\x1b" not in text and (folder / "plot.png").is_file()


def test_histograms_hold_every_picture(folder, capsys):
    _, text = stats(capsys, folder)
    lines = text.split("\n\n")[1].splitlines()[1:]
    assert sum(int(line.split()[-1]) for line in lines) == sum(int(line.split()[-2]) for line in lines) == len(SIZES)
    for numbers in ([0], [7], [64, 64], [1, 23, 24, 25], [4128, 20_000], range(1000)):
        edges = np.array(bin_edges(np.array(numbers)))
        assert edges[0] <= min(numbers) and edges[-1] > max(numbers) and len(edges) <= 26
        assert len(set(np.diff(edges))) <= 1


def test_several_folders_give_one_table_and_a_broken_picture_is_named(folder, tmp_path_factory, capsys):
    other = tmp_path_factory.mktemp("other")
    Image.new("RGB", (9, 8)).save(other / "good.png")
    (other / "bad.png").write_text("no picture")
    code, text = stats(capsys, folder, other)
    assert code == 1 and f"error: {other}/bad.png: not a complete picture" in text
    assert text.splitlines()[2].split()[:4] == [str(other), "1", "8", "9"]
    (other / "good.png").unlink()
    assert stats(capsys, other)[0] == 1


def test_plot_is_written_where_matplotlib_is_installed(folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    code, _ = stats(capsys, folder, folder, "--plot", tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as plot:
        assert code == 0 and plot.size == (900, 640)
    code, text = stats(capsys, folder, "--plot", tmp_path / "plot.unknown")
    assert "give a name that ends in .png, .svg, .pdf" in code and not text  # before any work


def test_plot_is_refused_without_matplotlib(folder, capsys, monkeypatch):
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    code, text = stats(capsys, folder, "--plot", "plot.png")
    assert code == "error: --plot plot.png: give it where matplotlib is installed" and not text


def test_script_prints_statistics_of_the_examples():
    done = run_script("data.py", "stats", "examples")
    assert done.returncode == 0 and done.stdout.splitlines()[1].startswith("examples"), done.stderr
