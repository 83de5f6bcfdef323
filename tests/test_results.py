"""Stored results: a key gives what was computed, whatever happened to the file."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from scores.results import Results, each, identity

ROOT = Path(__file__).parents[1]


def counted(results: Results, key: tuple) -> tuple[dict, list]:
    """`get` with a computation that counts its calls."""
    calls = []
    return results.get(key, lambda: calls.append(key) or {"a": np.arange(300), "score": 0.1}), calls


def test_results_are_computed_once_per_key_and_come_back_exactly(tmp_path):
    results = Results(tmp_path / "cache", None)
    first, calls = counted(results, ("x", 1))
    assert len(calls) == 1
    again, calls = counted(results, ("x", 1))
    assert not calls and again.keys() == first.keys()
    assert all(np.array_equal(again[name], first[name]) for name in first)
    assert again["score"] == first["score"] == 0.1 and type(again["score"]) is float
    assert len(counted(results, ("x", 2))[1]) == 1


def test_damaged_files_count_as_absent_and_are_replaced(tmp_path, capsys):
    results = Results(tmp_path, None)
    expected, _ = counted(results, ("x",))
    file, = tmp_path.iterdir()
    intact = file.read_bytes()
    damaged = [b"", b"no zip", b"PK\x03\x04", intact[:100], intact[: len(intact) // 2], intact[:-1]]
    entry = intact.index(b"PK\x01\x02")  # of the zip's directory
    for place, change in ((len(intact) // 2, 0xFF), (entry + 8, 0x01), (entry + 10, 0x03)):  # data, encryption, method
        content = bytearray(intact)
        content[place] ^= change
        damaged.append(bytes(content))
    for content in damaged:
        file.write_bytes(content)
        arrays, calls = counted(results, ("x",))
        err = capsys.readouterr().err
        assert len(calls) == 1 and err.startswith(f"{file}: damaged") and err.count("\n") == 1
        assert all(np.array_equal(arrays[name], expected[name]) for name in expected) and file.read_bytes() == intact
    assert not counted(results, ("x",))[1] and list(tmp_path.iterdir()) == [file]


def test_a_file_of_another_key_shape_or_kind_is_computed_again(tmp_path, capsys):
    results = Results(tmp_path, None)
    expected, _ = counted(results, ("x",))
    file, = tmp_path.iterdir()
    with np.load(file) as stored:
        arrays = dict(stored)
    counted(results, ("y",))
    other = next(path for path in tmp_path.iterdir() if path != file).read_bytes()
    changes = [{"a": np.arange(299)}, {"a": np.arange(300.0)}, {"a": np.array([None] * 300)}, {"b": np.ones(1)},
               {"sha256": np.arange(3)}]
    for wrong in (other, {}, {"a": arrays["a"]}, *(arrays | change for change in changes)):
        if isinstance(wrong, bytes):
            file.write_bytes(wrong)
        else:
            np.savez(file, **wrong)
        found, calls = counted(results, ("x",))
        err = capsys.readouterr().err
        assert len(calls) == 1 and err.startswith(f"{file}: damaged") and err.count("\n") == 1
        assert found.keys() == expected.keys() and np.array_equal(found["a"], expected["a"])
    assert not counted(results, ("x",))[1] and not list(tmp_path.glob(".*"))


def test_two_commands_at_once_share_a_folder(tmp_path):
    """One stores a result while the other computes it: both get it, and no half of a file is left."""
    one, two = Results(tmp_path, None), Results(tmp_path, None)
    found = one.get(("x",), lambda: counted(two, ("x",))[0])
    assert np.array_equal(found["a"], np.arange(300)) and not counted(one, ("x",))[1]
    assert len(list(tmp_path.iterdir())) == 1


# ---- processes

def killed(path):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_one_line(tmp_path):
    with pytest.raises(OSError, match="a worker process died, probably out of memory; give fewer --workers"):
        each(killed, [tmp_path] * 3, "pictures", [], processes=2)


ORPHANS = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, os.getcwd())
from scores.results import each
def work(path):
    (path / str(os.getpid())).touch()
    time.sleep(600)
if __name__ == "__main__":
    each(work, [Path(sys.argv[1])] * 9, "pictures", [], processes=2)
"""


def alive(pid: str) -> bool:
    file = Path(f"/proc/{pid}/stat")
    return file.is_file() and file.read_text().split(") ")[1][0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="looks for processes in /proc")
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_worker_outlives_the_command(tmp_path, end):
    script, pids = tmp_path / "orphans.py", tmp_path / "pids"
    script.write_text(ORPHANS)
    pids.mkdir()
    command = [sys.executable, script, pids]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    while len(list(pids.iterdir())) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, end) if end == signal.SIGINT else process.send_signal(end)
    process.wait(timeout=20)
    until = time.monotonic() + 20
    while any(alive(path.name) for path in pids.iterdir()):
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_picture_is_read_only_where_nothing_is_stored_and_errors_name_it(tmp_path):
    path, reads = tmp_path / "picture.png", []
    path.write_bytes(b"one")
    results = Results(tmp_path / "cache", lambda path: reads.append(path) or np.zeros((2, 3, 3), np.uint8))
    for _ in range(2):
        assert results.of_picture(("mean",), path, lambda pixels: {"mean": pixels.mean()})["mean"] == 0
    assert reads == [path]
    path.write_bytes(b"another")
    results.of_picture(("mean",), path, lambda pixels: {"mean": pixels.mean()})
    assert len(reads) == 2

    def fails(pixels):
        raise ValueError("too small")
    with pytest.raises(ValueError, match="picture.png: too small"):
        results.of_picture(("other",), path, fails)


def test_identity_sees_another_content_of_the_same_size_and_time(tmp_path):
    file = tmp_path / "a.bmp"
    file.write_bytes(b"one")
    before, stat = identity(file), file.stat()
    time.sleep(0.02)
    file.write_bytes(b"two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_mtime_ns == stat.st_mtime_ns and identity(file) != before


def test_identity_of_a_folder_changes_with_its_files(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    before = identity(tmp_path)
    assert before == identity(tmp_path)
    (tmp_path / "b").write_bytes(b"2")
    assert identity(tmp_path) != before
