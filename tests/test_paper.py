"""docs/paper.md: every command parses, every table and figure has a row, the laptop section runs and prints columns."""

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT, run_script
from PIL import Image
from test_readme import command_lines

import data
import drawing.settings
import metrics
import training.settings
from bench.paper import ENDPOINT, RATED, SET, VAE, commands

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
        settings = PARSERS[script](words) if script in PARSERS else None
        assert script != "sample.py" or settings.prompt or settings.prompts or settings.plan, words


def test_every_table_and_figure_has_a_row():
    rows = "\n".join(re.findall(r"^\| (?:tables?|figures?) .*$", PAGE, re.M))
    named = set()
    for kind, numbers in re.findall(r"(table|figure)s? (\d+(?:(?:, | and | to )\d+)*)", rows):
        named |= {(kind, int(number)) for number in re.findall(r"\d+", numbers)}
    assert named == {("table", k) for k in range(1, 12)} | {("figure", k) for k in range(1, 17)}


@pytest.mark.slow
def test_plans_print_the_memory_that_the_page_says():
    plans = [(script, words) for script, words in of_page() if "--plan" in words]
    assert len(plans) == 6
    for script, words in plans:
        printed = run_script(script, *words).stdout
        sizes = re.findall(r"(?:on one card|on a host, 8 ranks|blocks resident:) +([\d.]+) GiB", printed)
        assert sizes and all(size in PAGE for size in sizes), (words, sizes)


def test_laptop_section_has_every_command_of_the_page_but_the_one_for_a_gpu():
    def kinds(lines):
        return {(script, words[0] if script in ("data.py", "metrics.py") else "--from" in words)
                for script, words in lines}

    of_section = [(words[0], words[1:]) for _, words in commands(PAGE, {}, ROOT)]
    assert kinds(of_page()) - kinds(of_section) == {("bench/gpu.py", False)}


def test_laptop_commands_are_moved_to_the_folders_that_are_given(tmp_path):
    places = {"photos": tmp_path / "p", "runs/paper": tmp_path / "o", ENDPOINT: "http://127.0.0.1:1/v1"}
    lines = [words for _, words in commands(PAGE, places, tmp_path / "w")]
    assert lines[0] == ["models/fetch_photos.py", "--out", str(tmp_path / "p")]
    assert not [word for words in lines for word in words if word.startswith(("photos", "runs/", "http://local"))]
    assert sum(str(tmp_path / "w") in words for words in lines) == 8
    assert all(words[:2] == ["metrics.py", words[1]] for words in lines if str(tmp_path / "w") in words)


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
    for columns in (RATED, VAE, SET, ("memory, GiB", "s per step"), ("steps", "batch", "images/s"),
                    ("a", "b", "undecided", "b wins")):
        assert f"|  | {' | '.join(columns)} |" in done.stdout, columns
    for part in ("median height", "| tiny-sd3-F8 | – |", "| base-pictures | – |", "| captions-pictures | – |",
                 "| PLCC | ", "| b - a | – |", "| wlf | 10 | 4 | ", "figure_16.png", "4 requests"):
        assert part in done.stdout, part
    srcc = re.search(r"^\| SRCC \| (\S+) .* \| (\S+) \[", done.stdout, re.M).groups()
    assert min(map(float, srcc)) > 0.5                                          # metrics of detail follow blur
    decided = re.search(r"^\| Fine Details \| (\d) \| (\d) \| (\d) ", done.stdout, re.M).groups()
    assert sum(map(int, decided)) == 4 and decided[2] == "0"                    # the same choice in both orders
    assert float(re.search(r"finetune: (\S+) of what", done.stdout)[1]) < 0.2
