"""Two sets of the same prompts: names, paired differences, wins, and the command that prints them."""

import json

import numpy as np
import pytest
from PIL import Image
from test_metrics import command, fake_networks  # noqa: F401

from scores.folder import pair_names
from scores.versus import versus

pytestmark = pytest.mark.filterwarnings("ignore:.*not the official file")


def write(folder, names, seed=0, side=320, noise=40):
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    for name in names:
        smooth = np.linspace(60, 160, side * side * 3).reshape(side, side, 3)
        Image.fromarray(np.clip(smooth + rng.normal(0, noise, smooth.shape), 0, 255).astype(np.uint8)).save(
            folder / name)
    return folder


def test_pictures_are_paired_by_name_and_others_are_named(tmp_path):
    a, b = write(tmp_path / "a", ["0.png", "1.png", "2.png"], side=64), tmp_path / "b"
    write(b, ["1.jpg", "2.png"], side=64)
    assert pair_names(a, b, notes := []) == {a / "1.png": b / "1.jpg", a / "2.png": b / "2.png"}
    assert notes == [f"note: {a}: 1 pictures without a partner are left out: 0.png"]
    write(b, ["2.webp"], side=64)
    with pytest.raises(ValueError, match="2.png and .*2.webp: the same name but for the suffix"):
        pair_names(a, b, [])
    with pytest.raises(ValueError, match="no picture has the same name in both, as 0.png and x.png; draw the same"):
        pair_names(a, write(tmp_path / "c", ["x.png"], side=64), [])


def test_wins_and_differences_by_hand():
    row = versus("ratio", "lower", [4, 5, 6, 7, 8], [3, 5, 5, 8, 2])
    assert (row["b_wins"], row["of"], row["rate"]) == (3, 4, 0.75) and row["b_minus_a"] == pytest.approx(4.6 - 6)
    assert row["low"] <= row["b_minus_a"] <= row["high"] and row["rate_low"] < 0.75 < row["rate_high"]
    assert versus("x", "higher", [1, 2], [1, 2])["of"] == 0 and np.isnan(versus("x", "higher", [1, 2], [1, 2])["rate"])


def test_a_paired_interval_is_narrower_than_that_of_two_sets():
    rng = np.random.default_rng(0)
    a = rng.normal(0, 5, 50)
    b = a + rng.normal(1, 0.2, 50)
    paired, shuffled = (versus("x", "higher", a, side) for side in (b, rng.permutation(b)))
    assert paired["low"] > 0.9 and paired["high"] < 1.1
    assert shuffled["high"] - shuffled["low"] > 10 * (paired["high"] - paired["low"])


def test_compare_prints_every_metric_with_its_protocol(command, fake_networks, tmp_path):  # noqa: F811
    names = [f"{k}.png" for k in range(5)]
    a, b = write(tmp_path / "a", names), write(tmp_path / "b", names, seed=1, noise=60)
    reference = write(tmp_path / "reference", names, seed=2, noise=61)
    listing = tmp_path / "metadata.jsonl"
    listing.write_text("\n".join(json.dumps({"file_name": name, "text": name}) for name in names))
    arguments = ("compare", a, b, "--reference", reference, "--prompts", listing, "--weights", fake_networks,
                 "--device", "cpu")
    code, out, errors = command(*arguments, "--json")
    report = json.loads(out)
    rows = {row["metric"]: row for row in report["metrics"]}
    assert code == 0 and not errors and report["pairs"] == 5
    assert list(rows) == ["glcm_release", "glcm_entropy", "glcm_symmetric", "ratio", "grid_16", "grid_32", "clip_score",
                          "aesthetics", "fid", "patch_fid", "patch_fid_crops"]
    assert rows["glcm_entropy"]["b_wins"] == 5 and rows["ratio"]["b_wins"] == 5   # more noise has more detail
    assert rows["fid"]["b"] < rows["fid"]["a"] and rows["fid"]["low"] <= rows["fid"]["b_minus_a"]
    assert rows["clip_score"]["of"] == 0                                          # the fake reads captions alone
    assert rows.keys() < report["protocol"].keys() and {"bootstrap", "halves", "wilson"} < report["protocol"].keys()
    shown = command(*arguments)[1].splitlines()
    assert shown[0].startswith("5 pairs") and sum(line.startswith("fid: Fréchet") for line in shown) == 1


def test_compare_names_a_missing_listing_or_reference_before_it_measures(command, tmp_path, monkeypatch):  # noqa: F811
    a = write(tmp_path / "a", ["0.png"])
    monkeypatch.setattr("metrics.details", None)
    for flag in ("--prompts", "--reference"):
        assert f"{tmp_path}/nowhere: no such file" in command("compare", a, a, flag, tmp_path / "nowhere")[2][0]


def test_every_figure_of_set_has_an_interval_and_a_protocol(command, fake_networks, tmp_path):  # noqa: F811
    names = [f"{k}.png" for k in range(8)]
    a, b = write(tmp_path / "a", names), write(tmp_path / "b", names, seed=1, noise=60)
    report = json.loads(command("set", a, "--reference", b, "--weights", fake_networks, "--device", "cpu", "--json")[1])
    figures = {name for name, value in report.items() if isinstance(value, float)}
    assert {"fid", "patch_fid", "patch_fid_crops", "glcm_symmetric", "aesthetics", "fid_unbiased"} < figures
    assert figures == report["intervals"].keys()
    assert {name.removesuffix("_unbiased") for name in figures} <= report["protocol"].keys()
    assert all(low <= report[name] <= high for name, (low, high) in report["intervals"].items())
    few = json.loads(command("set", a, "--reference", write(tmp_path / "few", names[:3]), "--weights", fake_networks,
                             "--device", "cpu", "--json")[1])
    assert "fid" in few and "fid" not in few["intervals"] and "fid_unbiased" not in few
