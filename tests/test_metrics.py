"""The command line: reports, caches, one line per error, and what it imports."""

import json
import os
import subprocess
import sys
import unicodedata
import warnings
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from golden import DATA
from pictures import golden_picture
from PIL import Image
from safetensors.torch import save_file

import metrics
from metrics import compression_ratio, glcm_score, jpeg_size
from scores import clip, detail, perceptual
from scores.compare import frechet_distance, patches_of
from scores.folder import find_pictures, pair_names
from scores.official import WEIGHTS
from scores.perceptual import resize_crop
from scores.sheet import detail_sheet, heat

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:.*not the official file")


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run `metrics.py` in this process: exit code (0 or 1), stdout, the lines on stderr that are no progress bar."""
    def run(*arguments, cache=True):
        flags = ["--cache", str(tmp_path / "cache")] if cache else []
        monkeypatch.setattr(sys, "argv", ["metrics.py", *map(str, arguments), *flags])
        with pytest.raises(SystemExit) as ended:
            metrics.main()
        out, err = capsys.readouterr()
        lines = [line for line in err.replace("\r", "\n").splitlines()
                 if line.strip() and not any(bar in line for bar in ("it/s", "s/it", "?it"))]
        if isinstance(ended.value.code, str):
            lines.append(ended.value.code)
        return 1 if ended.value.code else 0, out, lines
    return run


def write_mixed(folder: Path) -> None:
    """50 files: jpg, png, webp, odd sizes, gray, palette, alpha, CMYK, 16 bit, turned; one of them broken."""
    rng = np.random.default_rng(0)
    for k in range(43):
        height, width = rng.integers(64, 200, 2)
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        suffix = ("jpg", "png", "webp", "jpeg", "PNG")[k % 5]
        picture.resize((width + 31, height + 17)).save(folder / f"{k:02d}.{suffix}")
    picture = Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8))
    picture.convert("L").save(folder / "gray.png")
    picture.convert("P").save(folder / "palette.png")
    picture.convert("RGBA").save(folder / "alpha.png")
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(rng.integers(0, 65536, (90, 120)).astype(np.uint16)).save(folder / "sixteen.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "turned.jpg", exif=exif)
    (folder / "whole.jpg").write_bytes((folder / "00.jpg").read_bytes()[:-900])  # cut short
    (folder / "notes.txt").write_text("no picture, and not named like one")


def test_detail_scores_fifty_mixed_pictures_and_names_the_broken_one(tmp_path):
    write_mixed(tmp_path)
    arguments = ["metrics.py", "detail", tmp_path, "--workers", "2", "--cache", tmp_path / "cache"]
    shown = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 1
    assert [line for line in shown.stderr.splitlines() if line.startswith("error")] == [
        line for line in shown.stderr.splitlines() if f"{tmp_path}/whole.jpg: not a complete picture" in line]
    lines = shown.stdout.splitlines()
    assert len(lines) == 1 + 49 + 2 + 6 and lines[50].startswith("all 49: means, ratio of sums")
    assert lines[51].startswith("grid: dB over neighbouring frequencies") and lines[52].startswith("glcm_release: mean")
    row = next(line.split() for line in lines if "turned.jpg" in line)
    assert row[1:3] == ["90", "120"]


def test_detail_reports_the_means_and_the_ratio_of_sums(command):
    code, out, errors = command("detail", DATA / "pictures", "--json", "--workers", 1)
    report = json.loads(out)
    assert code == 0 and not errors and not report["errors"] and len(report["pictures"]) == 9
    for row in report["pictures"]:
        pixels = golden_picture(Path(row["picture"]).name)
        assert row["jpeg_bytes"] == jpeg_size(pixels) and row["ratio"] == compression_ratio(pixels)
        assert row["glcm_release"] == glcm_score(pixels) and row["glcm_entropy"] == glcm_score(pixels, "entropy")
    rows, whole = report["pictures"], report["all"]
    raw, jpeg = (sum(row[name] for row in rows) for name in ("raw_bytes", "jpeg_bytes"))
    assert whole["ratio"] == pytest.approx(raw / jpeg, rel=1e-15)
    assert whole["glcm_release"] == pytest.approx(np.mean([r["glcm_release"] for r in rows]), rel=1e-12)


def test_detail_resumes_and_sees_a_changed_picture(command, tmp_path, monkeypatch):
    for k, name in enumerate(("astronaut", "noise")):
        Image.fromarray(golden_picture(name)).save(tmp_path / f"{k}.png")
    first = command("detail", tmp_path, "--json")
    measured = []
    monkeypatch.setattr(detail, "jpeg_size", lambda pixels: measured.append(pixels.shape) or jpeg_size(pixels))
    assert command("detail", tmp_path, "--json") == first and not measured
    Image.fromarray(golden_picture("coffee")).save(tmp_path / "1.png")
    again = json.loads(command("detail", tmp_path, "--json")[1])
    assert measured == [(384, 512, 3)] and again["pictures"][1]["width"] == 512


@pytest.mark.parametrize("size", [0, 100, -1])
def test_detail_measures_again_where_a_stored_result_is_damaged(command, tmp_path, size):
    picture = DATA / "pictures" / "noise.png"
    first = command("detail", picture, "--json")
    stored, = (tmp_path / "cache").iterdir()
    stored.write_bytes(stored.read_bytes()[:size])
    code, out, lines = command("detail", picture, "--json")
    assert (code, out) == first[:2] and len(lines) == 1 and f"{stored}: damaged" in lines[0]
    assert command("detail", picture, "--json") == first


def test_detail_imports_neither_torch_nor_a_transformer(tmp_path):
    code = """import sys, metrics
sys.argv = ["metrics.py", "detail", *sys.argv[1:]]
try:
    metrics.main()
except SystemExit as ended:
    assert not ended.code, ended.code
print("loaded:", sorted({"torch", "mmdit", "flux", "text", "vae", "checkpoint", "safetensors"} & set(sys.modules)))"""
    arguments = [DATA / "pictures" / "noise.png", "--maps", tmp_path, "--cache", tmp_path / "cache"]
    shown = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "noise.png" in shown.stdout and shown.stdout.endswith("loaded: []\n")
    assert (tmp_path / "noise_png.jpg").is_file()


def test_results_are_stored_in_the_home_folder_or_a_line_asks_for_another(command, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert command("detail", DATA / "pictures" / "noise.png", cache=False)[0] == 0
    assert len(list((tmp_path / "home" / ".cache" / "diffusion-4k").glob("*.npz"))) == 1

    def homeless():
        raise RuntimeError("Could not determine home directory.")
    monkeypatch.setattr(Path, "home", homeless)
    code, _, errors = command("detail", DATA / "pictures" / "noise.png", cache=False)
    assert code == 1 and len(errors) == 1 and "name a folder with --cache" in errors[0]
    assert command("detail", DATA / "pictures" / "noise.png")[0] == 0


@pytest.mark.parametrize("arguments, says", [(("--work", 1), "unrecognized arguments: --work"),
                                             (("--maps", ""), "--maps: an empty path"), (("",), "an empty path"),
                                             (("--device", "cpu"), "unrecognized arguments: --device")])
def test_flags_are_neither_abbreviated_nor_shared_by_all_commands(command, arguments, says):
    code, _, errors = command("detail", DATA / "pictures", *arguments)
    assert code == 1 and says in errors[-1]


def test_a_device_that_this_machine_lacks_is_one_line(command):
    a = DATA / "pictures" / "astronaut.png"
    code, out, errors = command("pair", a, a, "--device", "cuda:99", cache=False)
    assert code == 1 and not out and len(errors) == 1 and "--device cuda:99: this machine has cpu" in errors[0]


def test_detail_writes_maps_beside_the_picture(command, tmp_path):
    code, _, _ = command("detail", DATA / "pictures" / "coffee.png", "--maps", tmp_path / "maps")
    assert code == 0
    sheet = Image.open(tmp_path / "maps" / "coffee_png.jpg")
    assert sheet.size == (4 * 480, 360 + 58)
    colours = heat(np.array([[-1.0, 0, 1.5, 3, 9]]), 0, 3)[0].astype(int)
    assert (np.diff(colours.sum(1)) >= 0).all()
    assert (colours[0] == colours[1]).all() and (colours[3] == colours[4]).all()
    assert detail_sheet(golden_picture("gradient")[:65, :200], "odd").width == 4 * 480


@pytest.mark.parametrize("kind, right", [("alpha", True), ("sixteen", True), ("cmyk", True), ("float", False),
                                         ("small", False)])
def test_detail_reads_other_pictures_right_or_says_one_line(command, tmp_path, kind, right):
    pixels = golden_picture("astronaut")
    path = tmp_path / f"{kind}.{'tif' if kind in ('cmyk', 'float') else 'png'}"
    expected = pixels
    if kind == "alpha":  # half transparent counts as laid over white
        Image.fromarray(np.dstack([pixels, np.full(pixels.shape[:2], 128, np.uint8)])).save(path)
        white = Image.new("RGBA", (256, 256), "white")
        expected = np.asarray(Image.alpha_composite(white, Image.open(path)).convert("RGB"))
    elif kind == "sixteen":
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(path)
        expected = np.repeat(pixels[..., :1], 3, axis=2)
    elif kind == "cmyk":
        Image.fromarray(pixels).convert("CMYK").save(path)
        expected = np.asarray(Image.open(path).convert("RGB"))
    elif kind == "float":
        Image.fromarray(pixels[..., 0].astype(np.float32)).save(path)
    else:
        Image.fromarray(pixels[:40, :30]).save(path)
    code, out, errors = command("detail", path, "--json")
    rows = json.loads(out)["pictures"]
    if right:
        assert code == 0 and not errors and rows[0]["jpeg_bytes"] == jpeg_size(expected)
    else:
        says = {"float": "floating-point gray has no agreed white",
                "small": "30x40 pixels: smaller than one patch of 64x64"}[kind]
        assert code == 1 and not rows and len(errors) == 1 and str(path) in errors[0] and says in errors[0]


def test_wrong_paths_are_one_line(command, tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments, says in (((tmp_path / "empty",), "no picture in this folder"),
                            ((tmp_path / "nowhere",), "no such file or folder"),
                            ((DATA / "pictures", "--workers", 0), "give 1 or more")):
        code, out, errors = command("detail", *arguments)
        assert code == 1 and not out and len(errors) == 1 and says in errors[0]
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").write_text("a file where the folder should be")
    code, _, errors = command("detail", DATA / "pictures" / "noise.png")
    assert code == 1 and errors == [f"error: --cache: {tmp_path / 'cache'} is no folder that can be written "
                                    "(File exists); name another"]


def test_sheets_overwrite_neither_each_other_nor_pictures(command, tmp_path):
    noise = (DATA / "pictures" / "noise.png").read_bytes()
    for name in ("one/wall.png", "two/wall.PNG", "one/wall_png.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(noise)
    code, _, errors = command("detail", tmp_path / "one", tmp_path / "two", "--maps", tmp_path / "maps")
    assert code == 1 and len(errors) == 1 and "one/wall.png and " in errors[0] and "the same name" in errors[0]
    code, _, errors = command("detail", tmp_path / "one", "--maps", tmp_path / "one")
    assert code == 1 and len(errors) == 1 and "holds pictures that are scored" in errors[0]
    (tmp_path / "one" / f"{'x' * 240}.png").write_bytes(noise)
    code, _, errors = command("detail", tmp_path / "one", "--maps", tmp_path / "maps")
    assert code == 1 and len(errors) == 1 and "a name of over 230 bytes" in errors[0]
    assert (tmp_path / "one" / "wall_png.jpg").read_bytes() == noise and not (tmp_path / "maps").exists()


def test_a_sheet_that_cannot_be_written_names_the_folder(command, tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes((DATA / "pictures" / "noise.png").read_bytes())
    monkeypatch.setattr(Image.Image, "save", Mock(side_effect=OSError(28, "No space left on device")))
    code, _, errors = command("detail", tmp_path / "a.png", "--maps", tmp_path / "maps")
    assert code == 1 and errors == [f"error: --maps {tmp_path}/maps: a sheet can't be written there "
                                    "(No space left on device)"]
    assert not list((tmp_path / "maps").iterdir())


def test_folders_skip_hidden_files_and_name_what_is_no_picture(command, tmp_path):
    noise = (DATA / "pictures" / "noise.png").read_bytes()
    for name in (".noise.4711.tmp.png", "._noise.png"):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(noise)
    (tmp_path / "in" / "sub").mkdir()
    (tmp_path / "in" / "cache").mkdir()
    code, _, errors = command("detail", tmp_path / "in")
    assert code == 1 and len(errors) == 1
    assert "no picture in this folder" in errors[0] and "folders cache, sub" in errors[0]
    for name in ("noise.png", "a.heic", "b.heic", "c.raw", "metadata.jsonl", "sub/more.png"):
        (tmp_path / "in" / name).write_bytes(noise)
    code, out, lines = command("detail", tmp_path / "in", "--json")
    assert code == 0 and [Path(row["picture"]).name for row in json.loads(out)["pictures"]] == ["noise.png"]
    assert lines == [f"note: {tmp_path / 'in'}: pictures of folders in it are left out (sub); name these folders",
                     f"note: {tmp_path / 'in'}: 3 files are no pictures by name and left out (2 .heic, 1 .raw): "
                     "a.heic, …"]


def test_a_folder_that_cannot_be_read_is_none_of_pictures(command, tmp_path, monkeypatch):
    (tmp_path / "in" / "lost+found").mkdir(parents=True)
    (tmp_path / "in" / "noise.png").write_bytes((DATA / "pictures" / "noise.png").read_bytes())
    monkeypatch.setattr(os, "scandir", Mock(side_effect=PermissionError(13, "Permission denied")))
    assert [path.name for path in find_pictures([tmp_path / "in"])] == ["noise.png"]


def test_names_pair_in_either_unicode_form(tmp_path):
    for form in ("NFC", "NFD"):
        (tmp_path / form).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / form / f"{unicodedata.normalize(form, 'é')}.png")
    assert len(pair_names(tmp_path / "NFC", tmp_path / "NFD", notes := [])) == 1 and not notes


def test_reports_hold_no_control_characters(capsys):
    with pytest.raises(SystemExit):
        metrics.conclude(False, {}, "a table\nnote: \x1b[2J.png has no partner", ["\x1b.png"])
    assert capsys.readouterr() == ("a table\nnote: \\x1b[2J.png has no partner\n", "error: \\x1b.png\n")


def test_a_picture_given_twice_counts_once_and_names_may_hold_any_bytes(command, tmp_path, monkeypatch):
    noise, odd = (DATA / "pictures" / "noise.png").read_bytes(), os.fsdecode(b"caf\xe9\x1b[2J.png")
    for name in ("noise.png", odd):
        (tmp_path / name).write_bytes(noise)
    monkeypatch.chdir(tmp_path)
    code, out, errors = command("detail", "noise.png", tmp_path / "noise.png", ".", "--maps", "maps")
    assert code == 0 and not errors and "all 2: means" in out
    assert r"caf\udce9\x1b[2J.png" in out and "\x1b" not in out and len(list((tmp_path / "maps").iterdir())) == 2


def test_a_picture_that_is_gone_is_named_and_the_rest_is_scored(command, tmp_path):
    (tmp_path / "noise.png").write_bytes((DATA / "pictures" / "noise.png").read_bytes())
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    code, out, errors = command("detail", tmp_path, "--json")
    assert code == 1 and len(json.loads(out)["pictures"]) == 1
    assert len(errors) == 1 and "gone.png" in errors[0]


def test_pair_compares_two_pictures_and_names_the_weights_it_lacks(command, tmp_path):
    a, b = DATA / "pictures" / "astronaut.png", DATA / "pictures" / "astronaut__blur1.2.png"
    code, out, _ = command("pair", a, b, "--json", "--weights", tmp_path, cache=False)
    report = json.loads(out)
    assert code == 0 and report["psnr"] == pytest.approx(25.1274750134285)
    assert report["ssim"] == pytest.approx(0.8640477995981516)
    assert all(part in report["notes"][0] for part in ("LPIPS left out", "vgg16-397923af.pth", "https://"))
    assert json.loads(command("pair", a, a, "--json", cache=False)[1])["psnr"] is None  # infinite
    code, _, errors = command("pair", a, DATA / "pictures" / "coffee.png", cache=False)
    assert code == 1
    assert errors == [f"error: {a}, {DATA / 'pictures' / 'coffee.png'}: the reference has 256x256 pixels and the "
                      "picture 512x384: give pictures of one size"]


def test_pair_reports_the_scores_that_are_defined(command, tmp_path):
    for name, height, level in (("black", 20, 0), ("gray", 20, 9), ("low", 8, 9)):
        Image.new("RGB", (30, height), (level,) * 3).save(tmp_path / f"{name}.png")
    for a, b, lacks in (("black", "gray", "nmse"), ("low", "low", "ssim")):
        code, out, errors = command("pair", tmp_path / f"{a}.png", tmp_path / f"{b}.png", "--json", cache=False)
        assert code == 1 and {"psnr", "ssim", "nmse"} - json.loads(out).keys() == {lacks}
        assert len(errors) == 1 and errors[0].startswith(f"error: {lacks.upper()} left out: ")


def test_correlate_reports_the_columns_it_can_and_ends_with_1_if_one_is_left_out(command, tmp_path):
    table = tmp_path / "ratings.csv"
    table.write_text("picture,rating,glcm,flat\na,7,0.71,5\nb,3,0.30,5\nc,5,0.69,5\n")
    code, out, errors = command("correlate", table, cache=False)
    assert code == 1 and "glcm" in out and "3 ratings" in out and "columns without numbers: picture" in out
    assert errors == [f"error: {table}: flat: all numbers of one list are equal: there is no correlation; left out"]


class FakeInception:
    """Three coarse numbers per picture, in place of 2048 fine ones; counts the pictures it has seen."""

    seen = 0

    def __call__(self, images):
        type(self).seen += len(images)
        return images.float().mean((2, 3)).repeat(1, 2) / 255


@pytest.fixture
def fake_networks(monkeypatch, tmp_path):
    """A weights folder with empty files under the official names, and networks that need nothing of them."""
    (tmp_path / "weights").mkdir()
    for name in WEIGHTS:
        (tmp_path / "weights" / name).touch()

    class FakeCLIP:
        def score(self, images, captions):
            return torch.tensor([float(len(captions[0]))])

    class FakeImageTower:
        def embed(self, images, crop):
            return images[:, 0, 0, :1]

    monkeypatch.setattr(FakeInception, "seen", 0)
    monkeypatch.setattr(perceptual.Inception, "load", lambda *_: FakeInception())
    monkeypatch.setattr(clip.CLIP, "load", lambda *_: FakeCLIP())
    monkeypatch.setattr(clip.CLIPImage, "load", lambda *_: FakeImageTower())
    monkeypatch.setattr(perceptual.Aesthetics, "load", lambda *_: lambda embedding: embedding[:, 0].float() / 50)
    monkeypatch.setattr(perceptual.LPIPS, "load", lambda *_: lambda a, b: (a - b).abs().mean((1, 2, 3)))
    return tmp_path / "weights"


def two_sets(tmp_path, generated=5, reference=6, side=320):
    for name, count in (("generated", generated), ("reference", reference)):
        (tmp_path / name).mkdir()
        for k in range(count):
            rng = np.random.default_rng([k, len(name)])
            noise = rng.integers(0, 256 - 30 * k, (side, side + 8, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / name / f"{k}.png")
    rows = [{"file_name": f"{k}.png", "text": "x" * (k + 1)} for k in range(6)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "generated", tmp_path / "reference", tmp_path / "metadata.jsonl"


def test_set_measures_everything_keeps_the_reference_and_prints_n(command, fake_networks, tmp_path):
    generated, reference, listing = two_sets(tmp_path)
    arguments = ("set", generated, "--reference", reference, "--prompts", listing, "--weights", fake_networks,
                 "--device", "cpu", "--json")
    code, out, errors = command(*arguments)
    report = json.loads(out)
    assert code == 0 and not errors
    assert FakeInception.seen == (2 + 20) * (5 + 6)  # the picture, the one patch in it, the crops
    assert report["clip_score"] == 3.0 and report["generated"] == 5 and report["reference"] == 6
    assert report["fid"] > 0 and report["patch_fid"] > 0 and report["aesthetics"] > 0 and report["ratio"] > 1
    notes = "\n".join(report["notes"])
    assert "fid: N = 5 generated, 6 reference, 320 px; bias dominates it below 2049" in notes
    assert "1 of 6 prompts have no picture" in notes
    assert command(*arguments)[1] == out and FakeInception.seen == 22 * 11
    shown = command(*arguments[:-1])[1]
    assert shown.startswith("5 generated, 6 reference pictures") and "clip_score" in shown


def test_fid_and_patch_fid_are_distances_of_the_features_of_squares_and_patches(command, fake_networks, tmp_path):
    generated, reference, _ = two_sets(tmp_path, side=700)
    arguments = ("set", generated, "--reference", reference, "--weights", fake_networks, "--device", "cpu", "--json")
    report = json.loads(command(*arguments, "--res", 650)[1])
    network, whole, patches = FakeInception(), [], []
    for folder in (generated, reference):
        images = [torch.tensor(np.array(Image.open(path))).permute(2, 0, 1) for path in sorted(folder.iterdir())]
        squares = resize_crop(images, 650)
        cut = [patches_of(square.permute(1, 2, 0).numpy()) for square in squares]  # four in each
        whole.append(network(squares).numpy())
        patches.append(network(torch.tensor(np.concatenate(cut)).permute(0, 3, 1, 2)).numpy())
    assert len(patches[0]) == 4 * 5
    assert report["fid"] == pytest.approx(frechet_distance(*whole), rel=1e-5)  # the fake's means are float32
    assert report["patch_fid"] == pytest.approx(frechet_distance(*patches), rel=1e-5)
    assert report["patch_fid"] != pytest.approx(report["fid"], rel=1e-3)
    small = json.loads(command(*arguments, "--res", 200)[1])
    assert "fid" in small and "patch_fid" not in small
    assert "note: patch_fid left out: pictures of 200 px hold no patch of 299" in small["notes"]


def test_set_scores_the_rest_when_weights_are_missing(command, tmp_path):
    generated, reference, listing = two_sets(tmp_path)
    code, out, _ = command("set", generated, "--reference", reference, "--prompts", listing,
                           "--weights", tmp_path / "none", "--json")
    report = json.loads(out)
    notes = "\n".join(report["notes"])
    assert code == 0 and report["glcm_release"] > 0 and "fid" not in report
    for name in ("weights-inception-2015-12-05-6726825d.pth", "ViT-B-16.pt", "ViT-L-14.pt"):
        assert name in notes and WEIGHTS[name].url in notes and WEIGHTS[name].sha256 in notes
    report = json.loads(command("set", generated, "--weights", tmp_path / "none", "--json")[1])
    assert "FID left out: give --reference DIR" in "\n".join(report["notes"])


def test_set_names_a_broken_picture_and_scores_the_rest(command, fake_networks, tmp_path):
    generated, reference, listing = two_sets(tmp_path)
    for path in (generated / "3.png", reference / "1.png"):
        path.write_bytes(path.read_bytes()[:1000])
    code, out, errors = command("set", generated, "--reference", reference, "--weights", fake_networks, "--json")
    report = json.loads(out)
    assert code == 1 and len(errors) == 2 and "3.png" in errors[0] and "1.png" in errors[1]
    assert report["generated"] == 4 and "N = 4 generated, 5 reference" in "\n".join(report["notes"])


def test_set_says_one_line_for_one_picture_and_for_nan_features(command, fake_networks, tmp_path, monkeypatch):
    generated, reference, _ = two_sets(tmp_path, generated=1)
    code, out, errors = command("set", generated, "--reference", reference, "--weights", fake_networks, "--json")
    assert code == 1 and "fid" not in json.loads(out) and len(errors) == 1
    assert "FID left out" in errors[0] and "at least two pictures" in errors[0]
    monkeypatch.setattr(FakeInception, "__call__", lambda self, images: torch.full((len(images), 6), float("nan")))
    (generated / "more.png").write_bytes((generated / "0.png").read_bytes())
    code, out, errors = command("set", generated, "--reference", reference, "--weights", fake_networks, "--json",
                                "--res", 300)
    assert code == 1 and len(errors) == 1 and "hold NaN or Inf" in errors[0] and json.loads(out)["glcm_release"] > 0


def test_prompts_are_paired_by_number_or_refused(command, fake_networks, tmp_path):
    generated, _, listing = two_sets(tmp_path, generated=2)
    rows = [{"text": "one"}, {"text": "three letters more"}]
    listing.write_text("\n".join(map(json.dumps, rows)))
    arguments = ("set", generated, "--prompts", listing, "--weights", fake_networks, "--json")
    report = json.loads(command(*arguments)[1])
    assert report["clip_score"] == (3 + 18) / 2 and "prompts by number" in "\n".join(report["notes"])
    listing.write_text("\n".join(map(json.dumps, rows * 2)))
    code, out, errors = command(*arguments)
    assert code == 1 and not out and len(errors) == 1 and "4 prompts for 2 pictures" in errors[0]


def test_set_counts_the_captions_that_clip_cuts_also_from_stored_results(command, fake_networks, tmp_path, monkeypatch):
    generated, _, listing = two_sets(tmp_path, generated=4)

    class Cuts:
        def score(self, images, captions):
            if len(captions[0]) > 2:
                warnings.warn("a prompt of 99 tokens was cut to the limit of 75; lost: 'x'", stacklevel=2)
            return torch.tensor([1.0])
    monkeypatch.setattr(clip.CLIP, "load", lambda *_: Cuts())
    for _ in range(2):
        _, out, lines = command("set", generated, "--prompts", listing, "--weights", fake_networks, "--json")
        notes = [note for note in json.loads(out)["notes"] if "clip_score" in note]
        assert notes == ["note: clip_score: 2 of 4 captions are longer than CLIP reads; their ends are lost"]
        assert not any("was cut" in line for line in lines)


def test_set_says_which_pictures_are_enlarged_for_fid(command, fake_networks, tmp_path):
    generated, reference, _ = two_sets(tmp_path)
    Image.new("RGB", (700, 250), "blue").save(reference / "small.png")
    arguments = ("set", generated, "--reference", reference, "--weights", fake_networks, "--json")
    enlarged = [note for note in json.loads(command(*arguments)[1])["notes"] if "enlarged" in note]
    assert len(enlarged) == 1
    assert enlarged[0].startswith("note: 1 of 7 reference pictures are enlarged to 320 px, from 250 px on")
    enlarged = [note for note in json.loads(command(*arguments, "--res", 400)[1])["notes"] if "enlarged" in note]
    assert ["5 of 5 generated" in note for note in enlarged] == [True, False] and "7 of 7 reference" in enlarged[1]
    assert not any("enlarged" in note for note in json.loads(command(*arguments, "--res", 250)[1])["notes"])


def test_wrong_weights_under_the_right_name_are_one_line_and_the_rest_is_scored(command, tmp_path):
    generated, reference, listing = two_sets(tmp_path, generated=2, reference=2)
    weights = tmp_path / "weights"
    weights.mkdir()
    torch.save({"fc.weight": torch.ones(3, 3)}, weights / "weights-inception-2015-12-05-6726825d.pth")
    (weights / "ViT-B-16.pt").write_bytes(b"PK\x03\x04 cut")
    save_file({"visual.proj": torch.ones(2, 2)}, weights / "ViT-L-14.pt")
    (weights / "sac+logos+ava1-l14-linearMSE.pth").write_text("<html>404</html>")
    code, out, errors = command("set", generated, "--reference", reference, "--prompts", listing, "--weights", weights,
                                "--json")
    assert code == 1 and json.loads(out)["glcm_release"] > 0 and len(errors) == 3
    for what, error in zip(("FID", "CLIPScore", "Aesthetics"), errors, strict=True):
        assert error.startswith(f"error: {what} left out: {weights}") and "\n" not in error


def test_vae_report_of_the_embedded_autoencoder(command, fake_networks, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("astronaut", "coffee"):
        Image.fromarray(golden_picture(name)[:, :250]).save(folder / f"{name}.png")
    found = {}
    for factor in (8, 16):
        arguments = ("vae", folder, "--model", "tiny-sd3", "--factor", factor, "--weights", fake_networks,
                     "--device", "cpu")
        code, out, errors = command(*arguments, "--json")
        found[factor] = json.loads(out)
        assert code == 0 and not errors
    row = found[16]["pictures"][0]
    assert row["width"] % 128 == 0 or row["width"] % 16 == 0
    assert found[8]["mean"]["psnr"] > found[16]["mean"]["psnr"] > 15
    assert all(name in found[16]["mean"] for name in ("rfid", "nmse", "ssim", "lpips"))
    shown = command(*arguments)[1]
    assert "rFID" in shown and "mean of 2, factor 16" in shown
    code, _, errors = command("vae", folder, "--res", 100, "--weights", fake_networks)
    assert code == 1 and len(errors) == 1 and "must be a multiple of" in errors[0]
    code, _, errors = command("vae", folder, "--model", "none", "--weights", fake_networks)
    assert code == 1 and len(errors) == 1 and "no such folder" in errors[0]


def test_picture_too_narrow_to_be_enlarged_is_named(command, tmp_path):
    Image.new("RGB", (65_000, 8)).save(tmp_path / "line.png")
    code, _, errors = command("vae", tmp_path, "--model", "tiny-sd3", "--res", 256, "--weights", tmp_path / "none",
                              "--device", "cpu")
    assert code == 1 and "line.png: 65000x8 pixels are 532,480,000 once enlarged to 256 px" in errors[-1]


def test_vae_report_without_weights_names_them_and_scores_the_rest(command, tmp_path):
    Image.fromarray(golden_picture("astronaut")).save(tmp_path / "a.png")
    code, out, _ = command("vae", tmp_path, "--model", "tiny-sd3", "--res", 64, "--weights", tmp_path / "none",
                           "--device", "cpu", "--json")
    report = json.loads(out)
    assert code == 0 and report["pictures"][0]["width"] == 64 and report["mean"]["psnr"] > 10
    assert "weights-inception" in report["notes"][0] and "vgg16" in report["notes"][1]
