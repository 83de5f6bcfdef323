"""Prompts and pictures of a set: by record, by name, by number, and what is refused rather than guessed."""

import json
import os
import random
import unicodedata

import pytest
from PIL import Image, PngImagePlugin

from scores.pairing import natural, pair_captions


def listing_of(folder, rows):
    (folder / "listing.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder / "listing.jsonl"


def touched(folder, names):
    for name in names:
        (folder / name).touch()
    return [folder / name for name in names]


def drawn(path, prompt, **others):
    """A picture that records its prompt as sample.py does."""
    records, image = {"prompt": prompt, "software": "diffusion-4k"} | others, Image.new("RGB", (4, 4))
    if path.suffix == ".png":
        entries = PngImagePlugin.PngInfo()
        for name, value in records.items():
            entries.add_itxt(name, value)
        image.save(path, pnginfo=entries)
    else:
        exif = Image.Exif()
        exif[0x010E] = json.dumps(records)
        image.save(path, exif=exif)
    return path


# ---- by number

@pytest.mark.parametrize("number, first, seeds", [(2781, 0, 1), (1100, 0, 3), (12, 1, 1), (10_050, 0, 1)])
def test_pictures_pair_with_the_line_of_their_number_however_many_there_are(tmp_path, number, first, seeds):
    prompts = [f"prompt {k * 7919 % number}" for k in range(number)]
    expected = {tmp_path / f"{first + k:03d}-prompt-{seed}.png": prompt
                for k, prompt in enumerate(prompts) for seed in range(seeds)}
    found = pair_captions(listing_of(tmp_path, [{"text": p} for p in prompts]), sorted(expected), notes := [])
    assert found == expected and "by number" in notes[0] and len(notes) == 1


def test_names_without_a_leading_number_pair_in_natural_order(tmp_path):
    names = [f"img_{k}.png" for k in range(8, 13)]
    found = pair_captions(listing_of(tmp_path, [{"text": n} for n in names]), sorted(touched(tmp_path, names)), [])
    assert all(path.name == text for path, text in found.items())
    assert sorted(["b10", "b9", "a", "b9-2", "b9-10"], key=natural) == ["a", "b9", "b9-2", "b9-10", "b10"]


@pytest.mark.parametrize("names", [
    ["000-a.png", "001-b.png", "003-d.png"],                    # one was deleted
    ["000-a-0.png", "000-a-1.png", "001-b-0.png"],              # two pictures of one of two prompts
    ["000-a.png", "001-b.png", "grid.png"], ["a.png", "b.png"]])
def test_numbers_with_gaps_and_other_names_are_refused(tmp_path, names):
    listing = listing_of(tmp_path, [{"text": t} for t in "abc"])
    with pytest.raises(ValueError, match=f"3 prompts for {len(names)} pictures.*file_name of its picture"):
        pair_captions(listing, touched(tmp_path, names), [])


# ---- by name

def test_names_pair_whatever_their_order_suffix_and_folder_in_the_listing(tmp_path):
    names = ["x.y", "10", "2", "ä"]
    listing = listing_of(tmp_path, [{"file_name": f"train/{name}.jpg", "text": f"of {name}"} for name in names])
    pictures = touched(tmp_path, ["2.png", "x.y.webp", "10.jpg"])
    found = pair_captions(listing, pictures, notes := [])
    assert [found[picture] for picture in pictures] == ["of 2", "of x.y", "of 10"]
    assert "by file_name" in notes[0] and notes[1] == "note: 1 of 4 prompts have no picture"


def test_names_pair_in_either_unicode_form_and_with_backslashes(tmp_path):
    forms = [unicodedata.normalize(form, "é") for form in ("NFC", "NFD")]
    for name, other in (forms, forms[::-1]):
        listing = listing_of(tmp_path, [{"file_name": f"train\\{name}.jpg", "text": "one"}])
        assert list(pair_captions(listing, touched(tmp_path, [f"{other}.png"]), []).values()) == ["one"]


def test_a_csv_is_refused_with_what_to_give(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,one\n")
    with pytest.raises(ValueError, match="metadata.csv: a CSV; give lines of JSON"):
        pair_captions(tmp_path / "metadata.csv", touched(tmp_path, ["a.png"]), [])


def test_as_many_misnamed_pictures_as_lines_are_never_paired_in_order(tmp_path):
    listing = listing_of(tmp_path, [{"file_name": f"{c}.png", "text": c} for c in "dfe"])
    with pytest.raises(ValueError, match="e_.png: records no prompt, and its name is no file_name in .*listing.jsonl"):
        pair_captions(listing, touched(tmp_path, ["d.png", "e_.png", "f.png"]), [])


def test_one_entry_for_two_pictures_and_two_entries_for_one_are_refused(tmp_path):
    pictures = touched(tmp_path, ["a.png", "a.jpg"])
    with pytest.raises(ValueError, match=r"a\.jpg and .*a\.png: both have the file_name a\.tif"):
        pair_captions(listing_of(tmp_path, [{"file_name": "a.tif", "text": "one"}]), pictures, [])
    rows = [{"file_name": "a.png", "text": "one"}, {"file_name": "a.jpg", "text": "two"}]
    assert list(pair_captions(listing_of(tmp_path, rows), pictures, []).values()) == ["one", "two"]
    with pytest.raises(ValueError, match="could be one of 2 file_names"):
        pair_captions(listing_of(tmp_path, rows), touched(tmp_path, ["a.webp"]), [])


# ---- by record

def test_records_pair_pictures_of_any_name_and_order_with_several_seeds_per_prompt(tmp_path):
    prompts, draw = [f"a boat, number {k}, 一只红色的猫" for k in range(30)], random.Random(0)
    names = [f"{k}{suffix}" for k in range(90) for suffix in (".png", ".jpg", ".webp")][:90]
    draw.shuffle(names)
    expected = {drawn(tmp_path / name, prompts[k % 29], seed=str(k)): prompts[k % 29] for k, name in enumerate(names)}
    rows = [{"text": f" {p}\n", "file_name": f"{k}.png"} for k, p in enumerate(prompts)]
    found = pair_captions(listing_of(tmp_path, rows), sorted(expected), notes := [])
    assert {path: text.strip() for path, text in found.items()} == expected
    assert "90 pictures paired with their prompts by what they record" in notes[0]
    assert notes[1] == "note: 1 of 30 prompts have no picture"


def test_records_behind_the_pixels_of_a_png_count(tmp_path):
    data = drawn(tmp_path / "x.png", "a cup").read_bytes()
    start, pixels, end = data.index(b"iTXt") - 4, data.index(b"IDAT") - 4, len(data) - 12
    (tmp_path / "x.png").write_bytes(data[:start] + data[pixels:end] + data[start:pixels] + data[end:])
    assert "prompt" not in Image.open(tmp_path / "x.png").info
    listing = listing_of(tmp_path, [{"file_name": "y.png", "text": "a cup"}])
    assert pair_captions(listing, [tmp_path / "x.png"], []) == {tmp_path / "x.png": "a cup"}


def test_a_record_that_is_not_in_the_listing_is_refused_and_that_of_other_programs_is_none(tmp_path):
    listing = listing_of(tmp_path, [{"file_name": "a.png", "text": "a cup"}])
    assert pair_captions(listing, [drawn(tmp_path / "a.png", '{"3": {}}', software="ComfyUI")], [])
    with pytest.raises(ValueError, match="a.png: records the prompt 'a mug', which is not in"):
        pair_captions(listing, [drawn(tmp_path / "a.png", "a mug")], [])


def test_pictures_with_and_without_record_mix_only_where_names_decide(tmp_path):
    pictures = [drawn(tmp_path / "b.png", "a cup"), tmp_path / "1.png", tmp_path / "broken.png"]
    Image.new("RGB", (4, 4)).save(pictures[1])
    pictures[2].write_text("no picture")
    rows = [{"file_name": "1.jpg", "text": "a mug"}, {"file_name": "2.jpg", "text": "a cup"}]
    assert pair_captions(listing_of(tmp_path, rows), pictures, []) == {pictures[0]: "a cup", pictures[1]: "a mug"}
    with pytest.raises(ValueError, match="1.png: records no prompt, as 1 other pictures do"):
        pair_captions(listing_of(tmp_path, [{"text": row["text"]} for row in rows]), pictures, [])


# ---- the listing

@pytest.mark.parametrize("line, says", [
    ('{"text": null}', "text is null, expected a text"), ('{"text": 7}', "text is 7"), ('{"text": ["a"]}', "text is"),
    ('{"text": "  "}', "must not be empty"), ('{"file_name": "a.png"}', "text is missing"), ("words", "not JSON"),
    ('{"text": "a", "file_name": 3}', "file_name is 3"), ('{"text": "\\udc00"}', "half a surrogate pair"),
    ('["a"]', "each line is a JSON object"), ('{"text": "a", "file_name": ""}', "must not be empty")])
def test_a_line_that_is_no_prompt_is_refused_by_number(tmp_path, line, says):
    (tmp_path / "listing.jsonl").write_text('{"text": "first"}\n\n' + line)
    with pytest.raises(ValueError) as error:
        pair_captions(tmp_path / "listing.jsonl", touched(tmp_path, ["0.png", "1.png"]), [])
    assert str(error.value).startswith(f"{tmp_path / 'listing.jsonl'}:3: ") and says in str(error.value)


def test_names_listed_twice_or_on_some_lines_only_are_refused_and_utf_16_is_read(tmp_path):
    pictures = touched(tmp_path, ["a.png", "b.png"])
    rows = [{"file_name": f"{name}.png", "text": text} for name, text in ("a1", "b2", "a3")]
    with pytest.raises(ValueError, match=r"listing.jsonl:3: a.png is listed twice, in line 1 too"):
        pair_captions(listing_of(tmp_path, rows), pictures, [])
    with pytest.raises(ValueError, match="line 2 or line 1 has no file_name"):
        pair_captions(listing_of(tmp_path, [rows[0], {"text": "2"}]), pictures, [])
    (tmp_path / "wide.jsonl").write_bytes("\r\n".join(map(json.dumps, rows[:2])).encode("utf-16"))
    assert list(pair_captions(tmp_path / "wide.jsonl", pictures, []).values()) == ["1", "2"]
    os.truncate(tmp_path / "wide.jsonl", 0)
    with pytest.raises(ValueError, match="no prompt in it"):
        pair_captions(tmp_path / "wide.jsonl", pictures, [])
