"""Thinned wordings: which words stay, what the file holds, that running again changes nothing."""

import json
import shutil
import sys

import pytest

from data import read_folder
from models import thin_captions
from models.thin_captions import thin_folder, thinned

CAPTION = "two old oak trees in the fog beside a quiet road"


@pytest.fixture
def folder(photos, tmp_path):
    return shutil.copytree(photos, tmp_path / "photos")


def captions_of(folder):
    return [item.captions for item in read_folder(folder)]


def test_words_stay_in_order_and_about_as_many_as_asked():
    kept = 0
    for copy in range(300):
        words = thinned(CAPTION, 0.4, 0, copy).split()
        kept += len(words)
        rest = iter(CAPTION.split())
        assert words and all(word in rest for word in words)
    assert abs(kept / (300 * len(CAPTION.split())) - 0.6) < 0.03


def test_one_word_always_stays():
    assert all(len(thinned(CAPTION, 1.0, 0, copy).split()) == 1 for copy in range(50))
    assert thinned("alone", 1.0, 0, 0) == "alone" and thinned(CAPTION, 0.0, 0, 0) == CAPTION


def test_draws_depend_on_seed_copy_and_caption():
    usual = thinned(CAPTION, 0.5, 0, 0)
    assert thinned(CAPTION, 0.5, 0, 0) == usual
    assert len({usual, thinned(CAPTION, 0.5, 1, 0), thinned(CAPTION, 0.5, 0, 1)}) == 3


def test_thinned_wordings_follow_the_captions_as_alt(folder):
    before = captions_of(folder)
    captions, wordings = thin_folder(folder, copies=3, drop=0.4, seed=0)
    after = captions_of(folder)
    assert captions == len(before) and wordings == sum(map(len, after)) - len(before) > 2 * captions
    for old, new in zip(before, after, strict=True):
        assert new[:len(old)] == old and len(set(new)) == len(new)
        assert set(new[len(old):]) <= {thinned(caption, 0.4, 0, copy) for caption in old for copy in range(3)}


def test_same_run_again_writes_the_same_bytes_and_others_start_from_the_captions(folder, photos):
    listing = folder / "metadata.jsonl"
    thin_folder(folder, 2, 0.4, 0)
    first = listing.read_bytes()
    thin_folder(folder, 2, 0.4, 0)
    assert listing.read_bytes() == first
    thin_folder(folder, 5, 0.7, 1)
    assert listing.read_bytes() != first
    thin_folder(folder, 2, 0.4, 0)
    assert listing.read_bytes() == first
    thin_folder(folder, 0, 0.4, 0)
    assert captions_of(folder) == [item.captions for item in read_folder(photos)]


def test_other_entries_of_a_line_stay(folder):
    listing = folder / "metadata.jsonl"
    rows = [json.loads(line) | {"author": "Ö"} for line in listing.read_text().splitlines()]
    listing.write_text("\n".join(map(json.dumps, rows)))
    thin_folder(folder, 2, 0.4, 0)
    assert all(json.loads(line)["author"] == "Ö" for line in listing.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("flags, message", [(["--copies=-1"], "--copies -1"), (["--drop=1.5"], "--drop 1.5")])
def test_settings_out_of_range_are_refused_and_nothing_is_written(folder, monkeypatch, flags, message):
    before = (folder / "metadata.jsonl").read_bytes()
    monkeypatch.setattr(sys, "argv", ["thin_captions.py", str(folder), *flags])
    with pytest.raises(SystemExit, match=f"error: {message}"):
        thin_captions.main()
    assert (folder / "metadata.jsonl").read_bytes() == before
