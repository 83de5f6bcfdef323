"""Folders read before they are complete: without a listing, with rows and pictures that lack a caption."""

import json
import os

import pytest
from PIL import Image

from collecting.listings import read_folder


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("b.png", "a.JPG", "sub/c.webp", ".d.png", ".hidden/e.png", "f.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def captions(folder) -> dict[str, tuple]:
    return {item.path.relative_to(folder).as_posix(): item.captions for item in read_folder(folder, complete=False)}


def test_pictures_without_a_listing_have_no_captions(folder):
    assert captions(folder) == {"a.JPG": (), "b.png": (), "f.png": (), "sub/c.webp": ()}


def test_listed_pictures_come_first_and_a_row_may_lack_its_caption(folder):
    rows = [{"file_name": "f.png", "text": "one", "alt": ["two"]}, {"file_name": "sub/c.webp", "text": " "},
            {"file_name": "b.png", "text": "three", "alt": 3}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert list(captions(folder).items()) == [("f.png", ("one", "two")), ("sub/c.webp", ()), ("b.png", ()),
                                              ("a.JPG", ())]
    with pytest.raises(ValueError, match="metadata.jsonl:2: text is empty"):
        read_folder(folder)


def test_a_picture_that_a_link_does_not_lead_to_is_kept_and_one_whose_name_no_listing_can_hold_refused(folder):
    (folder / "gone.png").symlink_to("nowhere.png")
    assert "gone.png" in captions(folder)
    open(os.path.join(os.fsencode(folder), b"\xff.png"), "wb").close()
    with pytest.raises(ValueError, match="this path is not UTF-8"):
        read_folder(folder, complete=False)


def test_linked_folders_are_followed_once_each_picture_under_its_own_folder_first(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    Image.new("RGB", (4, 4)).save(outside / "g.png")
    (outside / "back").symlink_to(folder)
    (folder / "elsewhere").symlink_to(outside)
    (folder / "a link").symlink_to(folder / "sub")
    assert list(captions(folder)) == ["a.JPG", "b.png", "elsewhere/g.png", "f.png", "sub/c.webp"]


def test_a_csv_of_excel_names_its_lines_and_a_cell_of_alt_is_one_caption(folder):
    file = folder / "metadata.csv"
    file.write_text("\r\nsep=;\r\nfile_name;text;alt\r\nb.png;one;two, three\r\nf.png;four;\r\n;;\r\n")
    assert [item.captions for item in read_folder(folder)] == [("one", "two, three"), ("four",)]
    file.write_text("sep=,\nfile_name,text,alt\nb.png,one,['two']\n")
    with pytest.raises(ValueError, match="metadata.csv:3: \"alt\" is .*expected a list of captions"):
        read_folder(folder)


def test_a_listing_in_error_is_refused_all_the_same(folder, tmp_path):
    (folder / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "one"}')
    with pytest.raises(ValueError, match="no picture 'gone.png'"):
        read_folder(folder, complete=False)


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no picture in this folder"):
        read_folder(tmp_path, complete=False)
    with pytest.raises(FileNotFoundError):
        read_folder(tmp_path / "nowhere", complete=False)


def test_a_folder_of_data_folders_is_none(folder):
    (folder / "sub" / "metadata.jsonl").write_text('{"file_name": "c.webp", "text": "one"}')
    with pytest.raises(FileNotFoundError, match="give one of the folders below that have one: .*sub"):
        read_folder(folder, complete=False)


def test_shards_beside_no_listing_are_to_be_unpacked(tmp_path):
    (tmp_path / "train-00000-of-00002.parquet").write_bytes(b"PAR1")
    with pytest.raises(FileNotFoundError, match="unpack the shards: python data.py unpack .*parquet --out NEW"):
        read_folder(tmp_path)


def test_a_later_row_brings_the_caption_that_an_earlier_one_lacks(folder, capsys):
    rows = [{"file_name": "b.png"}, {"file_name": "f.png", "text": "one", "alt": 3},
            {"file_name": "b.png", "text": "x"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert captions(folder)["b.png"] == ("x",)
    assert "note: 1 captions cannot be read and count as none: " in capsys.readouterr().err
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, [rows[0], rows[2]])))
    assert [item.captions for item in read_folder(folder)] == [("x",)]
