"""The layout of the code: imports go one way, sample.py needs no room but its own, files and functions stay short."""

import ast
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT, run_script

METHOD = {"wavelet", "flow", "vae", "mmdit", "flux", "layers", "text", "tokenizer", "checkpoint", "names", "family",
          "files", "lora"}
COMMANDS = {"sample", "train", "train_vae", "metrics", "data"}
BELOW = {"reading", "machine"}   # rooms below the others
ROOMS = BELOW | {"drawing", "training", "scores", "collecting"}
SCRIPTS = {"bench", "models"}  # folders of commands
FILES = sorted(path for folder in (".", *ROOMS, *SCRIPTS) for path in (ROOT / folder).glob("*.py"))


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


OURS = {name_of(file): file for file in FILES}


@cache
def imports_of(name: str) -> frozenset[str]:
    """Our own modules that a module imports, inside functions too."""
    modules = set()
    for node in ast.walk(ast.parse(OURS[name].read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(modules & OURS.keys())


def reached_from(name: str) -> set[str]:
    """Everything of ours that importing a module can load."""
    reached, waiting = set(), [name]
    while waiting:
        new = imports_of(waiting.pop()) - reached
        reached |= new
        waiting += new
    return reached


def test_first_floor_is_the_method_and_the_commands():
    assert {file.stem for file in ROOT.glob("*.py")} == METHOD | COMMANDS
    assert not list(ROOT.glob("*/__init__.py"))


@pytest.mark.parametrize("name", sorted(OURS))
def test_imports_go_one_way_from_method_to_rooms_to_commands(name):
    room = name.partition(".")[0]
    if name in METHOD:
        assert imports_of(name) <= METHOD
    elif room in ROOMS:
        assert all(other in METHOD or other.partition(".")[0] in BELOW | {room} for other in imports_of(name))


@pytest.mark.parametrize("name", sorted(OURS))
def test_no_import_leads_back(name):
    assert name not in reached_from(name)


def test_sample_needs_no_room_but_its_own_and_no_other_command():
    assert {name.partition(".")[0] for name in reached_from("sample")} <= METHOD | BELOW | {"drawing"}


@pytest.mark.parametrize("module", ["data", "metrics"])
def test_pictures_and_their_metrics_load_no_torch(module):
    loaded = f"import sys, {module}; sys.exit('torch' in sys.modules or 'mmdit' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, timeout=60).returncode == 0


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_and_functions_stay_short(file):
    text = file.read_text()
    assert text.count("\n") <= 420
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            most = 100 if (file.stem, node.name) == ("train", "train") else 60
            assert node.end_lineno - node.lineno < most, node.name


def test_namespaces_stay_in_the_parsers():
    """No function but the one that parses sees an argparse.Namespace, and nothing reads sys.argv."""
    for file in FILES:
        text = file.read_text()
        assert "Namespace" not in text and "sys.argv" not in text, file


def test_commands_run_from_anywhere(tmp_path):
    for script in ("sample.py", "train.py", "data.py"):
        command = [sys.executable, ROOT / script, "--help"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr
    assert not os.listdir(tmp_path)


def test_importing_has_no_effect(tmp_path):
    """No folder is made, nothing is printed, no seed is set."""
    lines = "; ".join(f"import {name}" for name in sorted(OURS))
    command = f"{lines}; import torch; print(torch.rand(1).item())"
    first, second = (run_script("-c", command, HOME=str(tmp_path)) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert len(first.stdout.splitlines()) == 1 and first.stdout != second.stdout  # two processes draw different numbers
    assert not os.listdir(tmp_path)
