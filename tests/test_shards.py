"""Parquet shards: pictures and captions as Hugging Face data sets store them become a data folder."""

import io
import json

import numpy as np
import pytest
from PIL import Image

import data
from data import read_folder

pytest.importorskip("pyarrow")
import pyarrow as pa  # noqa: E402
from pyarrow import parquet  # noqa: E402


def packed(seed: int, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 9, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


def shard(file, images: list, texts: list, column: str = "text"):
    """Write a shard; images are bytes, or structs of bytes and path."""
    parquet.write_table(pa.table({"id": list(range(len(texts))), "image": images, column: texts}), file,
                        row_group_size=2)
    return file


def unpack(*arguments) -> object:
    """The exit code of data.py unpack in this process."""
    try:
        data.main(["unpack", *map(str, arguments)])
    except SystemExit as end:
        return end.code
    return 0


def test_shards_become_a_folder_that_training_reads(tmp_path, capsys):
    first = shard(tmp_path / "train-0.parquet", [{"bytes": packed(k), "path": f"deep/{k}.jpg"} for k in range(5)],
                  [f"größer {k}" for k in range(5)])
    second = shard(tmp_path / "train-1.parquet", [{"bytes": packed(9, "PNG"), "path": None}], ["the last"])
    out = tmp_path / "out"
    for _ in range(2):  # the second time nothing is written
        assert unpack(first, second, "--out", out) == 0
        assert capsys.readouterr().out == f"6 pictures in {out}\n"
        items = read_folder(out)
        assert [(item.path.name, item.captions) for item in items] == \
            [*((f"{k}.jpg", (f"größer {k}",)) for k in range(5)), ("train-1_000000.png", ("the last",))]
        written = {item.path: item.path.stat().st_mtime_ns for item in items}
        assert all((out / f"{k}.jpg").read_bytes() == packed(k) for k in range(5))
    assert written == {path: path.stat().st_mtime_ns for path in written} and len(list(out.iterdir())) == 7
    assert data.check(str(out)) == 0


def test_shards_can_be_unpacked_one_after_the_other(tmp_path):
    for k in range(2):
        file = shard(tmp_path / f"part-{k}.parquet", [{"bytes": packed(k), "path": "same.jpg"}], [f"number {k}"])
        assert unpack(file, "--out", tmp_path / "out") == 0
    assert [item.path.name for item in read_folder(tmp_path / "out")] == ["same.jpg", "part-1_000000_same.jpg"]


def test_shards_of_one_name_in_two_folders_become_one_folder(tmp_path):
    files = []
    for k, split in enumerate(("train", "K1/data", "K2/data")):
        (tmp_path / split).mkdir(parents=True)
        files.append(shard(tmp_path / split / "0000.parquet", [{"bytes": packed(k), "path": None}], [f"number {k}"]))
    assert unpack(*files, "--out", tmp_path / "out") == 0
    assert [item.path.name for item in read_folder(tmp_path / "out")] == [
        "train_0000_000000.jpeg", "K1_data_0000_000000.jpeg", "K2_data_0000_000000.jpeg"]


def test_plain_bytes_another_column_and_missing_captions_are_read(tmp_path):
    file = shard(tmp_path / "a.parquet", [packed(0), packed(1, "WEBP")], ["one", None], "caption")
    assert unpack(file, "--text", "caption", "--out", tmp_path / "out") == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert rows == [{"file_name": "a_000000.jpeg", "text": "one"}, {"file_name": "a_000001.webp"}]
    assert [item.captions for item in read_folder(tmp_path / "out", complete=False)] == [("one",), ()]


@pytest.mark.parametrize("path", ["../../outside.jpg", "/etc/outside.jpg", "..\\outside.jpg", "..", ".hidden.jpg",
                                  "a\n.jpg", "x" * 300 + ".jpg", "metadata.jsonl", "metadata.csv", "~", "none"])
def test_no_path_leads_out_of_the_folder_or_to_anything_but_a_picture(tmp_path, path):
    file = shard(tmp_path / "a.parquet", [{"bytes": packed(0), "path": path}], ["one"])
    assert unpack(file, "--out", tmp_path / "out") == 0
    (item,) = read_folder(tmp_path / "out")
    assert item.path.name in ("outside.jpg", "a_000000.jpeg") and item.path.parent == tmp_path / "out"


def test_of_several_pictures_image_is_taken_and_captions_may_be_categories(tmp_path):
    texts = pa.array(["one", "two", "one"]).dictionary_encode()
    table = pa.table({"mask": [packed(7)] * 3, "image": [packed(k) for k in range(3)], "text": texts})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert unpack(tmp_path / "a.parquet", "--out", tmp_path / "out") == 0
    items = read_folder(tmp_path / "out")
    assert [item.captions for item in items] == [("one",), ("two",), ("one",)]
    assert [item.path.read_bytes() for item in items] == [packed(k) for k in range(3)]


@pytest.mark.parametrize("image", [{"bytes": packed(0), "path": 3}, {"bytes": packed(0)}])
def test_a_path_that_is_no_text_is_none(tmp_path, image):
    assert unpack(shard(tmp_path / "a.parquet", [image], ["one"]), "--out", tmp_path / "out") == 0
    assert read_folder(tmp_path / "out")[0].path.name == "a_000000.jpeg"


def test_a_listing_of_others_is_refused_rather_than_cut(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metadata.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    file = shard(tmp_path / "a.parquet", [packed(0)], ["one"])
    assert 'metadata.jsonl:1: no "file_name"' in unpack(file, "--out", tmp_path / "out")
    assert len((tmp_path / "out" / "metadata.jsonl").read_text().splitlines()) == 2


def test_rows_without_a_picture_are_named(tmp_path, capsys):
    file = shard(tmp_path / "a.parquet", [{"bytes": None, "path": "gone.jpg"}, {"bytes": packed(0), "path": "b.jpg"}],
                 ["one", "two"])
    assert unpack(file, "--out", tmp_path / "out") == 1
    assert f"error: {file}: row 0 has no bytes of a picture (gone.jpg)" in capsys.readouterr().out
    assert len(read_folder(tmp_path / "out")) == 1


def test_a_picture_that_is_there_is_never_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("b.jpg", "a_000000_b.jpg"):
        (tmp_path / "out" / name).write_bytes(b"mine")
    file = shard(tmp_path / "a.parquet", [{"bytes": packed(0), "path": "b.jpg"}], ["one"])
    assert "a_000000_b.jpg is there with other content" in unpack(file, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "b.jpg").read_bytes() == b"mine"


def test_a_damaged_shard_is_named_and_what_came_before_it_stays(tmp_path):
    pictures = [{"bytes": packed(k), "path": f"{k}.jpg"} for k in range(2)]
    good, bad = (shard(tmp_path / name, pictures, ["one", "two"]) for name in ("a.parquet", "b.parquet"))
    bad.write_bytes(b"PAR1" + bytes(600) + bad.read_bytes()[604:])
    assert f"{bad}: damaged" in unpack(good, bad, "--out", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.jpg", "1.jpg"]


def test_other_files_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    (tmp_path / "text.parquet").write_text("no table")
    numbers = tmp_path / "numbers.parquet"
    parquet.write_table(pa.table({"text": ["one"]}), numbers)
    for name, columns in (("two", {"jpg_0": [packed(0)], "jpg_1": [packed(1)], "text": ["one"]}),
                          ("list", {"image": [packed(0)], "text": [["one", "two"]]})):
        parquet.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    good = shard(tmp_path / "good.parquet", [packed(0)], ["one"])
    for file, says in (("text.parquet", "not a Parquet file"), ("gone.parquet", "not a Parquet file that can be read"),
                       ("numbers.parquet", "0 columns with bytes of pictures, none called image; it has text (string)"),
                       ("two.parquet", "2 columns with bytes of pictures"),
                       ("list.parquet", "no column 'text' of captions; it has image (binary), text (list<")):
        assert says in unpack(good, tmp_path / file, "--out", tmp_path / "out")
    says = "it has id (int64), image (binary), text (string): name one of strings with --text"
    assert says in unpack(good, "--text", "words", "--out", tmp_path / "out")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    assert "reading Parquet needs pyarrow" in unpack(good, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_picture_of_several_rows_has_several_captions_and_corrected_ones_stay(tmp_path):
    images = [{"bytes": packed(k), "path": f"{k}.jpg"} for k in (0, 0, 0, 1)]
    file, out = shard(tmp_path / "a.parquet", images, ["one", "two", "one", None]), tmp_path / "out"
    assert unpack(file, "--out", out) == 0
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert rows == [{"file_name": "0.jpg", "text": "one", "alt": ["two"]}, {"file_name": "1.jpg"}]
    corrected = [{"file_name": "0.jpg", "text": "mended"}, {"file_name": "1.jpg", "text": "added"}]
    (out / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corrected))
    assert unpack(file, "--out", out) == 0
    assert [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()] == corrected
