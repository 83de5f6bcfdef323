"""The documents against the code: lengths, links, named files and functions, commands and flags, the Python example.

Commands are read from code blocks and code spans; each flag must be listed by the --help of its script. Scripts run in
this process (runpy), because importing torch once per script would take a minute.
"""

import contextlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml  # of huggingface_hub, which tokenizers needs
from torch.distributed.run import get_args_parser as torchrun_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = sorted(path for room in (".", "docs", "bench", "models", "examples") for path in ROOT.glob(f"{room}/*.md"))
COMMANDS = ("sample.py", "train.py", "train_vae.py", "metrics.py", "data.py")
FIRST_SCREEN = 45  # lines
FLAG = re.compile(r"(?<![\w-])--?[a-zA-Z][\w-]*")

documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def blocks(text: str, language: str = "") -> list[str]:
    """The fenced code blocks of a language; "" is shell."""
    return [code for name, code in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S) if name == language]


def prose(text: str) -> str:
    """All but code blocks, tables and headings; of an image the caption, of a link the text."""
    text = re.sub(r"^```.*?^```$", "\n", text, flags=re.M | re.S)
    text = re.sub(r"^(?:\||#).*$", "\n", text, flags=re.M)
    return re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)


def code_spans(text: str) -> list[str]:
    without_blocks = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", without_blocks)]


def command_lines(text: str) -> list[list[str]]:
    """The words of each shell command in blocks and spans, shell variables replaced by their values."""
    lines, variables = [*code_spans(text)], {}
    for block in blocks(text):
        for line in block.replace("\\\n", " ").splitlines():
            for name, value in variables.items():
                line = re.sub(rf"\$(?:{name}\b|{{{name}}})", lambda _, value=value: value, line)
            if assignment := re.fullmatch(r'(\w+)="(.*)"', line):
                variables[assignment[1]] = assignment[2]
            else:
                lines.append(line)
    parts = []
    for line in lines:
        words = shlex.split(line, comments=True) if ".py" in line else []
        while "&&" in words:
            parts.append(words[:words.index("&&")])
            words = words[words.index("&&") + 1:]
        parts.append(words)
    return parts


class Start(NamedTuple):
    """One command that starts a script of this project."""

    script: str
    subcommand: str       # or ""
    flags: set[str]
    launcher: set[str]    # flags of torchrun, before the script


def starts(text: str) -> list[Start]:
    result = []
    for words in command_lines(text):
        place = next((k for k, word in enumerate(words) if re.fullmatch(r"[\w./-]+\.py", word)), None)
        if place is not None and "pytest" not in words:
            before, after = words[:place], words[place + 1:]
            subcommand = after[0] if after and re.fullmatch(r"[a-z]\w*", after[0]) else ""
            launcher = set(filter(None, map(option, before))) if "torchrun" in before else set()
            result.append(Start(words[place], subcommand, set(filter(None, map(option, after))), launcher))
    return result


def option(word: str) -> str:
    """--flag of "--flag" or "--flag=value"; "" for other words, negative numbers among them."""
    match = FLAG.match(word)
    return match[0] if match else ""


@lru_cache
def help_of(script: str, subcommand: str = "") -> str:
    """What `python script subcommand --help` prints."""
    printed, before = io.StringIO(), (sys.argv, list(sys.path), os.environ.get("COLUMNS"))
    sys.argv = [script, *([subcommand] if subcommand else []), "--help"]
    os.environ["COLUMNS"] = "200"
    try:
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as leaving:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = before[0], before[1]
        os.environ.pop("COLUMNS") if before[2] is None else os.environ.update(COLUMNS=before[2])
    assert not leaving.value.code, f"{script} {subcommand} --help: {leaving.value.code}"
    return printed.getvalue()


@lru_cache
def torchrun_flags() -> set[str]:
    return set(FLAG.findall(torchrun_parser().format_help()))


@lru_cache
def flags_of_commands() -> set[str]:
    """Every flag of the commands on the first floor, subcommands included."""
    flags = set()
    for script in COMMANDS:
        for subcommand in ("", *re.findall(r"^    ([a-z]\w*)(?:  .*)?$", help_of(script), re.M)):
            flags |= set(FLAG.findall(help_of(script, subcommand)))
    return flags


def test_readme_is_short_and_its_lines_can_be_read():
    lines = README.splitlines()
    assert len(lines) <= 160
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|")]


def test_first_screen_has_no_sentence_above_thirty_words():
    screen = "\n".join(README.splitlines()[:FIRST_SCREEN])
    screen += "\n```" if screen.count("```") % 2 else ""
    sentences = [s for s in re.split(r"\n\s*\n|(?<=[.!?])\s+", prose(screen)) if s.strip()]
    assert len(sentences) > 10
    assert not [sentence for sentence in sentences if len(sentence.split()) > 30]


def test_python_example_runs_as_written():
    (example,) = blocks(README, "python")
    check = "assert velocity.shape == latent.shape == (1, 16, 64, 64) and image.shape == (1, 3, 1024, 1024)"
    done = subprocess.run([sys.executable, "-c", f"{example}\n{check}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@documents
def test_links_lead_to_files_and_headings(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if not re.match(r"https?://|mailto:", target):
            file, _, heading = target.partition("#")
            path = document.parent / file if file else document
            assert path.exists(), target
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M) if heading else []
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings]
            assert not heading or heading in slugs, target


@documents
def test_named_files_exist(document):
    named = {word for span in code_spans(document.read_text()) for word in span.split()
             if re.fullmatch(r"[\w./-]+\.(?:py|md|cff|toml|yml)", word)}
    assert not {name for name in named if not (ROOT / name).is_file() and not (document.parent / name).is_file()}


@documents
def test_table_rows_have_as_many_cells_as_their_heading(document):
    for table in re.findall(r"(?:^\|.*\n)+", document.read_text(), re.M):
        cells = [len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()]
        assert len(set(cells)) == 1, table.splitlines()[0]


@documents
def test_commands_name_scripts_and_flags_that_exist(document):
    text = document.read_text()
    known = set(torchrun_flags())
    for start in starts(text):
        assert (ROOT / start.script).is_file() or (document.parent / start.script).is_file(), start.script
        if start.subcommand or start.flags or start.launcher:
            flags = set(FLAG.findall(help_of(start.script, start.subcommand)))
            assert start.flags <= flags, f"{start.script} {start.subcommand}: no flag {', '.join(start.flags - flags)}"
            assert start.launcher <= torchrun_flags(), f"torchrun: {', '.join(start.launcher)}"
            known |= flags
    alone = {option(span) for span in code_spans(text) if span.startswith("--")}  # `--batch` without its script
    unknown = alone - known
    unknown = unknown and unknown - flags_of_commands()
    assert not unknown, f"no command has {', '.join(sorted(unknown))}"


@documents
def test_training_on_several_cards_leaves_time_to_save(document):
    """torchrun kills its ranks 30 s after SIGTERM; a step at 4096 px and its checkpoint take longer."""
    lines = [line for line in document.read_text().splitlines() if re.search(r"torchrun.* train\.py .*4096", line)]
    assert all("--shutdown-timeout" in line for line in lines)


def test_commands_of_the_readme_are_seen_by_the_test_above():
    seen = starts(README)
    assert {start.script for start in seen} >= set(COMMANDS) and len([start for start in seen if start.flags]) >= 15
    assert {start.subcommand for start in seen} >= {"check", "encode", "detail", "pair", "vae", "set", "correlate"}
    nodes = starts((ROOT / "docs" / "running.md").read_text())
    assert any("--rdzv-endpoint" in start.launcher and "--shard" in start.flags for start in nodes)
    (start,) = starts('```\nrun="train.py --lr 1"\npython $run \\\n    --res 64 && echo --steps\n```\n')
    assert start == ("train.py", "", {"--lr", "--res"}, set())


def test_map_names_every_file_of_the_first_floor_and_every_room():
    table = re.search(r"^\| file or room .*\n(?:\|.*\n)+", README, re.M)[0]
    named = re.findall(r"^\| `([^`]+)` \|", table, re.M)
    assert sorted(name for name in named if name.endswith(".py")) == sorted(path.name for path in ROOT.glob("*.py"))
    rooms = {f"{path.parent.name}/" for path in ROOT.glob("[a-z]*/*.py")}
    assert rooms <= {name for name in named if name.endswith("/")} and all((ROOT / name).exists() for name in named)


def test_what_a_reader_looks_for_is_defined_where_the_readme_says():
    table = re.search(r"^\| to find .*\n\|.*\n((?:\|.*\n)+)", README, re.M)[1]
    for row in table.splitlines():
        source, names = "", 0
        for span in re.findall(r"`([^`]+)`", row):
            if span.endswith(".py"):
                source = (ROOT / span).read_text()
            elif not span.startswith("--"):
                names += 1
                assert re.search(rf"^\s*(?:def|class) {span}\b|^{span} = ", source, re.M), f"{span}: {row}"
        assert names, row


def test_licence_and_citation_agree_with_the_readme():
    assert (ROOT / "LICENSE").read_text().startswith("MIT License\n\nCopyright (c) 2026 the diffusion-4k authors\n")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["license"] == "MIT"
    assert {"message", "title", "authors"} <= set(citation)
    paper, (bibtex,) = citation["preferred-citation"], blocks((ROOT / "docs" / "paper.md").read_text(), "bibtex")
    authors = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    for value in (paper["title"], authors, str(paper["year"])):
        assert f"{{{value}}}" in bibtex
    flat = re.sub(r"\s+", " ", README)
    assert paper["title"] in flat and all(f"{a['given-names']} {a['family-names']}" in flat for a in paper["authors"])


def test_contributing_fits_on_a_screen():
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 45
