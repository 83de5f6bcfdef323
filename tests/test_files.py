"""JSON from outside, files written whole, how a command ends."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from files import (
    MOST_DEPTH,
    STALE_S,
    clear_temporaries,
    entry,
    parse_json,
    printable,
    read_json,
    read_text,
    replacing,
    writable,
)


@pytest.mark.parametrize("text, why", [
    ("", "not JSON"), ("{", "not JSON"), ("[" * 100_000, "nested"), ("9" * 5000, "too long"),
    ('[{"text": "a", "alt": 1, "alt": 2}]', "'alt' is given twice"),
    ('{"a":' * MOST_DEPTH + "1" + "}" * MOST_DEPTH + "x", "not JSON"), ("[" * 100 + "]" * 100, "nested")])
def test_json_that_cannot_be_used_is_one_error_with_its_place(text, why):
    with pytest.raises(ValueError, match=f"^here:3: .*{why}"):
        parse_json(text, "here:3")


def test_json_at_the_depth_limit_is_read():
    assert parse_json("[" * MOST_DEPTH + "]" * MOST_DEPTH, "here") is not None


@pytest.mark.parametrize("content, why", [
    (b"[1]", "holds a list"), (b"\xff{}", "not UTF-8"), (b"\0" * 9, "not JSON")])
def test_a_file_that_holds_no_object_is_named(tmp_path, content, why):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"config.json: .*{why}"):
        read_json(file)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ValueError, match="pipe or device"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_is_read_as_windows_and_others_write_it(tmp_path, coding):
    (tmp_path / "a.txt").write_text("Täglich 红茶\n", encoding=coding)
    assert read_text(tmp_path / "a.txt") == "Täglich 红茶\n"


@pytest.mark.parametrize("value, kind", [(True, int), (1, bool), ("3", int), (2.5, int), (float("nan"), float),
                                         (None, str), ([], dict), (1e9, int), (-1, int)])
def test_an_entry_of_another_type_or_out_of_range_is_refused(value, kind):
    with pytest.raises(ValueError, match="^run.json: steps is .*, expected"):
        entry({"steps": value}, "steps", kind, "run.json", 0, 1e6)


def test_entries_keep_their_value():
    content = {"a": 20.0, "b": 3, "c": False, "d": "x"}
    assert [entry(content, key, kind, "f") for key, kind in zip("abcd", (int, float, bool, str), strict=True)] == \
        [20, 3, False, "x"]


def test_terminal_escapes_are_shown_not_sent():
    assert printable("a\x1b[2J\n€") == "a\\x1b[2J\\n€"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("old")
    with pytest.raises(OSError, match="full"), replacing(file) as temporary:
        temporary.write_text("ne")
        raise OSError("full")
    with pytest.raises(OSError, match="No space left on device: '.*a.csv'"), replacing(file):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert [f.name for f in tmp_path.iterdir()] == ["a.csv"] and file.read_text() == "old"


def test_folders_that_stand_in_the_way_or_are_not_utf_8_are_named(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(OSError, match="model.safetensors: a folder, where a file is to be written"), \
            replacing(tmp_path / "model.safetensors") as temporary:
        temporary.touch()
    with pytest.raises(ValueError, match="this path is not UTF-8"):
        writable(tmp_path / os.fsdecode(b"l\xe4ufe"), "--out")
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_leftovers_of_killed_processes_are_cleared_and_live_ones_kept(tmp_path):
    for name, age in ((".a.1.tmp.png", STALE_S + 9), (".b.2.tmp.png", 0), ("c.png", STALE_S + 9)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    clear_temporaries(tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == [".b.2.tmp.png", "c.png"]


@pytest.mark.parametrize("work, code, words", [
    ("time.sleep(60)", 130, "interrupted"), ("raise ValueError('a\\x1bb')", 1, "error: a\\x1bb"),
    ("import warnings; warnings.warn('a\\x1bb')", 0, "warning: a\\x1bb\n"),  # without file, line and code
    ("raise MemoryError", 1, "error: out of memory; give it less at once\n"),
    ("raise RuntimeError('DefaultCPUAllocator: x')", 1, "error: out")])
def test_a_command_ends_in_one_line(work, code, words):
    program = f"import time, files\ndef main():\n print('ready', flush=True); {work}\nfiles.run_command(main)"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stdout.readline()
    if code == 130:
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == code and errors.count("\n") == 1 and errors.startswith(words)


def test_ctrl_c_while_torch_is_imported_is_one_line():
    program = "import time, files; files.end_on_interrupt(); print('ready', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1] == "interrupted\n" and process.returncode == 130


@pytest.mark.parametrize("start, says", [
    ("import sys; sys.stdout = None; files.run_command(int)", ""),
    ("def main(): raise RuntimeError('unable to mmap 9 bytes from file <a>: Cannot allocate memory (12)')\n"
     "files.run_command(main, 'fewer --pixels')", "error: out of memory; give fewer --pixels\n")])
def test_a_closed_output_and_a_full_memory_end_without_a_traceback(start, says):
    done = subprocess.run([sys.executable, "-c", f"import files\n{start}"], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == says


def test_dotfiles_of_others_are_no_leftovers(tmp_path):
    others = [".env.tmpl", ".zshrc.tmpl", ".gitlab.tmpl.yml", ".a.tmp", ".a.x.tmp.json"]
    for name in (*others, ".model.123.tmp.safetensors", ".listing.9.tmp"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    writable(tmp_path, "--out")
    assert {path.name for path in tmp_path.iterdir()} == set(others)
