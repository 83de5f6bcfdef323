"""Stored results: a key gives what was computed, whatever happened to the file."""

import numpy as np
import pytest

from scores.results import Results, identity


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


def test_identity_of_a_folder_changes_with_its_files(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    before = identity(tmp_path)
    assert before == identity(tmp_path)
    (tmp_path / "b").write_bytes(b"2")
    assert identity(tmp_path) != before
