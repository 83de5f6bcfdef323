"""docs/paper.md: every command parses, every table and figure has a row, the laptop section runs and prints columns."""

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from PIL import Image
from test_readme import command_lines

import data
import drawing.settings
import metrics
import training.settings
from bench.paper import SET, VAE, commands

PAGE = (ROOT / "docs" / "paper.md").read_text()
PARSERS = {"metrics.py": lambda words: metrics.new_parser().parse_args(words),
           "data.py": lambda words: data.new_parser().parse_args(words),
           "sample.py": drawing.settings.parse, "train.py": training.settings.parse}


def of_page() -> list[tuple[str, list[str]]]:
    """(script, words) of the commands in the page's blocks."""
    blocks = "\n".join(f"```\n{block}```" for block in re.findall(r"^```\n(.*?)^```$", PAGE, re.M | re.S))
    lines = []
    for words in command_lines(blocks):
        place = next((k for k, word in enumerate(words) if word.endswith(".py")), None)
        if place is not None:
            after = words[place + 1:]
            lines.append((words[place], after[:after.index(">")] if ">" in after else after))
    return lines


def test_every_command_parses():
    seen = of_page()
    assert {script for script, _ in seen} == {*PARSERS, "models/fetch_photos.py", "bench/gpu.py"} and len(seen) >= 35
    for script, words in seen:
        if script in PARSERS:
            PARSERS[script](words)


def test_every_table_and_figure_has_a_row():
    rows = "\n".join(re.findall(r"^\| (?:tables?|figures?) .*$", PAGE, re.M))
    named = set()
    for kind, numbers in re.findall(r"(table|figure)s? (\d+(?:(?:, | and | to )\d+)*)", rows):
        named |= {(kind, int(number)) for number in re.findall(r"\d+", numbers)}
    assert named == {("table", k) for k in range(1, 12)} | {("figure", k) for k in range(1, 17)}


def test_laptop_commands_are_moved_to_the_folders_that_are_given(tmp_path):
    lines = commands(PAGE, tmp_path / "p", tmp_path / "o", tmp_path / "w")
    assert lines[0] == ["models/fetch_photos.py", "--out", str(tmp_path / "p")]
    assert not [word for words in lines for word in words if word.startswith(("photos", "runs/"))]
    assert all(str(tmp_path / "w") in words for words in lines if words[0] == "metrics.py")


@pytest.mark.slow
def test_one_script_runs_the_laptop_commands_and_prints_the_papers_columns(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for k in range(4):
        Image.effect_noise((288, 256 + 32 * k), 30 + 20 * k).convert("RGB").resize((576, 640)).save(photos / f"{k}.png")
    (photos / "metadata.jsonl").write_text("\n".join(
        json.dumps({"file_name": f"{k}.png", "text": f"noise of kind {k}"}) for k in range(4)))
    script = [sys.executable, ROOT / "bench" / "paper.py", "--photos", photos, "--out", tmp_path / "out", "--weights",
              tmp_path / "none"]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"| | {' | '.join(VAE)} |" in done.stdout and f"| | {' | '.join(SET)} |" in done.stdout
    for part in ("median height", "| factor 16 | – |", "| base-pictures | – |", "| wlf-pictures | – |", "s/step",
                 "glcm_release: ", "of what training changed"):
        assert part in done.stdout, part
    assert float(re.search(r"finetune: (\S+) of what", done.stdout)[1]) < 0.2
