"""Selection: verdicts against a slow reference, limits, near-duplicates, the folder of links, the page, resumption."""

import json
import re
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter
from scipy.fft import dctn
from scipy.ndimage import laplace, sobel
from skimage.feature import graycomatrix
from skimage.measure import shannon_entropy

import data
from collecting import selection
from collecting.page import page
from collecting.selection import FLAT, duplicates, patch_variances, perceptual_hash, write_selection
from scores import folder as folder_of_scores

LIMITS = {"short": 96.0, "entropy": 6.5, "sharpness": 10.0, "glcm": 4.0, "flat": 0.5}
FLAGS = [flag for name, value in LIMITS.items() for flag in (f"--{name}", str(value))]
PATCH, DISTANCE = 60, 6


def picture(random: np.random.Generator, kind: int) -> Image.Image:
    """Noise over soft shapes, of some size, blurred, flattened or darkened by kind."""
    height, width = (int(side) for side in random.integers(75, 150, 2) + 30 * (kind > 0))
    shapes = Image.fromarray(random.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((width, height), 3)
    noise = random.normal(0, random.uniform(5, 90), (height, width, 3))
    made = Image.fromarray((np.asarray(shapes) + noise).clip(0, 255).astype(np.uint8))
    if kind == 1:
        return made.filter(ImageFilter.GaussianBlur(random.uniform(0.5, 4)))
    if kind == 2:
        return ImageEnhance.Contrast(made).enhance(random.uniform(0.05, 0.6))
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """200 pictures: sharp, blurred and faint ones, copies of some, some without a caption, one that is broken."""
    folder, random, lines = tmp_path_factory.mktemp("collected"), np.random.default_rng(0), []
    (folder / "sub").mkdir()
    made: list[Image.Image] = []
    for k in range(200):
        if k % 5 == 4:
            copy = made[3 * int(random.integers(-(-k // 3)))]  # often of kind 0
            scale = random.uniform(0.8, 1.2)
            copy = copy.resize((round(copy.width * scale), round(copy.height * scale)), Image.Resampling.LANCZOS)
            made.append(ImageEnhance.Brightness(copy).enhance(random.uniform(0.9, 1.1)))
        else:
            made.append(picture(random, k % 3))
        name = f"{'sub/' * (k % 7 == 0)}{k:03d}.{'jpg' if k % 2 else 'png'}"
        made[-1].save(folder / name)
        if k % 11:
            lines.append({"file_name": name, "text": f"picture {k}", "alt": ["another text"] * (k % 3)})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "broken.jpg").write_bytes((folder / "001.jpg").read_bytes()[:900])
    return folder


def select(folder, out, cache, *flags) -> int:
    """The exit code of data.py select in this process."""
    try:
        data.main(["select", str(folder), "--out", str(out), "--cache", str(cache), "--workers", "1", *FLAGS, *flags])
    except SystemExit as end:
        return end.code
    return 0


def rows_in(out) -> dict[str, dict]:
    return {row["file_name"]: row for row in map(json.loads, (out / "select.jsonl").read_text().splitlines())}


@pytest.fixture(scope="module")
def selected(folder, tmp_path_factory):
    """The selection from the folder, and the cache of its numbers."""
    out, cache = tmp_path_factory.mktemp("out") / "new", tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "PATCH", PATCH)
        assert select(folder, out, cache) == 1  # one is broken
    return out, cache


# ---- the slow reference

def shannon_entropy_of(matrix: np.ndarray) -> float:
    p = matrix[matrix > 0]
    return -(p * np.log2(p)).sum()


def slow_numbers(rgb: Image.Image) -> dict:
    if min(rgb.size) < 64:
        return {"short": min(rgb.size), "entropy": 8, "sharpness": 1e9, "glcm": 12, "flat": 0}
    gray = np.asarray(rgb.convert("L"), dtype=float)
    inner = np.s_[1:-1, 1:-1]
    gradient = np.sqrt(sobel(gray, 0) ** 2 + sobel(gray, 1) ** 2)[inner]
    curvature, side = laplace(gray)[inner], min(PATCH, rgb.width - 2, rgb.height - 2)
    flat, sharp = [], []
    for top in range(0, gradient.shape[0] - side + 1, side):
        for left in range(0, gradient.shape[1] - side + 1, side):
            patch = np.s_[top:top + side, left:left + side]
            flat.append(np.var(gradient[patch]) < FLAT)
            sharp.append(np.var(curvature[patch]))
    red, green, blue = (np.asarray(rgb, dtype=int)[..., k] for k in range(3))
    levels, bits = ((9798 * red + 19235 * green + 3735 * blue + 16384) >> 15) // 4, []
    for top in range(0, rgb.height - 63, 64):
        for left in range(0, rgb.width - 63, 64):
            patch = levels[top:top + 64, left:left + 64].astype(np.uint8)
            matrices = graycomatrix(patch, [1, 2, 3, 4], [k * np.pi / 4 for k in range(4)], 64, normed=True)
            bits.append(np.mean([shannon_entropy_of(one) for one in matrices.reshape(-1, 16).T]))
    small = np.asarray(rgb.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=float)
    lowest = dctn(small, norm=None)[:8, :8]
    return {"short": min(rgb.size), "entropy": shannon_entropy(gray), "sharpness": max(sharp), "glcm": np.mean(bits),
            "flat": np.mean(flat), "area": rgb.width * rgb.height,
            "hash": "".join("01"[int(value > np.median(lowest))] for value in lowest.ravel())}


def slow_verdicts(folder, names: list[str], captioned: set[str]) -> dict[str, tuple]:
    numbers = {name: slow_numbers(Image.open(folder / name).convert("RGB")) for name in names}
    verdicts = {}
    for name, row in numbers.items():
        verdicts[name] = [] if name in captioned else ["caption"]
        verdicts[name] += [limit for limit in ("short", "entropy", "sharpness", "glcm") if row[limit] < LIMITS[limit]]
        verdicts[name] += ["flat"] if row["flat"] > LIMITS["flat"] else []
    kept, twins = [], {}
    for name in sorted((name for name in names if not verdicts[name]), key=lambda name: -numbers[name]["area"]):
        for larger in kept:
            bits = zip(numbers[name]["hash"], numbers[larger]["hash"], strict=True)
            if sum(a != b for a, b in bits) <= DISTANCE:
                verdicts[name], twins[name] = ["duplicate"], larger
                break
        else:
            kept.append(name)
    return {name: (reasons, twins.get(name)) for name, reasons in verdicts.items()}


def test_verdicts_equal_a_slow_reference_on_200_pictures(folder, selected):
    rows = rows_in(selected[0])
    captioned = {json.loads(line)["file_name"] for line in (folder / "metadata.jsonl").read_text().splitlines()}
    expected = slow_verdicts(folder, list(rows), captioned)
    assert len(rows) == 200
    assert {name: (row["reasons"], row.get("duplicate_of")) for name, row in rows.items()} == expected
    counts = {name: sum(name in reasons for reasons, _ in expected.values())
              for name in ("caption", *LIMITS, "duplicate")}
    assert min(counts.values()) >= 5 and sum(not reasons for reasons, _ in expected.values()) >= 30, counts


def test_selection_is_a_data_folder_of_links(folder, selected):
    out, _ = selected
    kept = {name for name, row in rows_in(out).items() if not row["reasons"]}
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_symlink()} == kept
    items = data.read_folder(out)
    original = {item.path.name: item.captions for item in data.read_folder(folder)}
    assert {item.path.relative_to(out).as_posix() for item in items} == kept
    assert all(item.captions == original[item.path.name] for item in items)
    assert all(path.resolve().is_relative_to(folder) for path in out.rglob("*.png"))


def test_page_shows_each_dropped_picture_and_names_the_broken_one(folder, selected):
    text, rows = (selected[0] / "dropped.html").read_text(), rows_in(selected[0])
    dropped = [row for row in rows.values() if row["reasons"]]
    assert text.count("<figure") == len(dropped) and all(row["file_name"] in text for row in dropped)
    pairs = sum("duplicate" in row["reasons"] for row in dropped)
    assert text.count("data:image/jpeg;base64,") == len(dropped) + pairs
    assert "broken.jpg: not a complete picture" in text and f"<p>{len(rows) - len(dropped)} of 201 pictures" in text
    assert not re.search(r'(src|href)="(?!data:)', text)


def test_page_escapes_names_and_shows_a_limited_number():
    row = {"width": 9, "height": 9, "short": 9, "reasons": ["short"], "thumbnail": b"jpeg"}
    text = page("<T>", [row | {"file_name": f"<b>{k}"} for k in range(201)], ["<i>: broken"], {"short": 10})
    assert "<b>" not in text and "<i>" not in text and "&lt;b&gt;7" in text
    assert text.count("<figure") == 200 and ": 201; the first 200 are shown" in text


def test_selection_is_repeated_without_reading_and_follows_new_limits(folder, selected, tmp_path, monkeypatch, capsys):
    _, cache = selected
    reads, faint = [], Image.new("RGB", (80, 80))
    monkeypatch.setattr(folder_of_scores, "read_picture", lambda path: reads.append(path.name) or faint)
    (tmp_path / "new").mkdir()
    for least in ("6.5", "0"):
        assert select(folder, tmp_path / "new", cache, "--entropy", least) == 0
    assert reads == ["broken.jpg"]
    first, second = (int(line.split()[0]) for line in capsys.readouterr().out.splitlines())
    links = [path for path in (tmp_path / "new").rglob("*") if path.is_symlink()]
    assert first < second == len(links) == len(data.read_folder(tmp_path / "new"))


def test_selection_never_writes_into_another_folder(folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "picture.png").write_bytes(b"mine")
    for out, says in ((tmp_path / "mine", "a new folder, or one that select wrote"), (folder, "a folder outside"),
                      (folder / "below", "a folder outside")):
        assert says in select(folder, out, tmp_path / "cache")
    for flag, value, says in (("short", "9", "give 64 or more pixels"), ("flat", "nan", "--flat nan: give a number"),
                              ("distance", "65", "give 0 to 64 bits"), ("workers", "0", "give 1 or more")):
        assert says in select(folder, tmp_path / "new", tmp_path / "cache", f"--{flag}", value)
    assert not (tmp_path / "new").exists() and not (tmp_path / "cache").exists() and not (folder / "below").exists()


def test_a_selection_cut_off_is_repeated_and_a_file_of_others_in_its_place_is_named(tmp_path, monkeypatch):
    names = [f"{k}.png" for k in range(3)]
    items = {name: data.Item(tmp_path / name, ("text",)) for name in names}
    rows = [{"file_name": name, "reasons": [], "hash": 0} for name in names]
    out = tmp_path / "out"
    out.mkdir()
    with monkeypatch.context() as full, pytest.raises(OSError, match="full"):
        full.setattr(Path, "symlink_to", Mock(side_effect=OSError("full")))
        write_selection(out, items, rows)
    assert [path.name for path in out.iterdir()] == ["select.jsonl"]  # by which the command knows its own folder
    (out / ".latents").symlink_to(tmp_path)  # a cache on another disk
    (out / "old.png").symlink_to(tmp_path)
    assert write_selection(out, items, rows) == 3
    assert (out / ".latents").is_symlink() and not (out / "old.png").is_symlink()
    (out / "2.png").unlink()
    (out / "2.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match="2.png: a file, where a link of this selection is to be"):
        write_selection(out, items, rows)
    assert (out / "0.png").is_symlink() and (out / "2.png").read_bytes() == b"mine"


def test_processes_give_the_same_numbers(folder, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(folder.glob("*.png"))[:16]:
        shutil.copy(path, few)
    for workers in ("1", "2"):
        assert select(few, tmp_path / workers, tmp_path / f"cache{workers}", "--workers", workers) == 0
    assert rows_in(tmp_path / "1") == rows_in(tmp_path / "2")


# ---- near-duplicates, patches

def test_hash_survives_scale_and_quality_but_not_another_picture(tmp_path):
    random = np.random.default_rng(1)
    one, other = (picture(random, 0) for _ in range(2))
    one.resize((300, 200)).save(tmp_path / "one.jpg", quality=50)
    distance = [(perceptual_hash(one) ^ perceptual_hash(rgb)).bit_count()
                for rgb in (Image.open(tmp_path / "one.jpg"), other)]
    assert distance[0] <= DISTANCE < 15 < distance[1]


def test_of_near_duplicates_the_largest_is_kept():
    rows = [{"hash": bits, "width": side, "height": side} for bits, side in
            ((0b0, 10), (0b1, 30), (0b11, 20), (0xFF << 56, 40), (0xFFFF << 48, 5), (0b0, 30))]
    assert duplicates(rows, 1) == {0: 1, 2: 1, 5: 1} and duplicates(rows, 0) == {0: 5}
    assert duplicates([], 1) == {}


def test_variances_do_not_see_a_border_that_fills_no_patch(monkeypatch):
    monkeypatch.setattr(selection, "PATCH", 32)
    gray = np.random.default_rng(2).integers(0, 256, (70, 101), dtype=np.uint8)
    for variances, cut in zip(patch_variances(gray), patch_variances(gray[:66, :98]), strict=True):
        assert len(variances) == 6 and np.array_equal(variances, cut)
