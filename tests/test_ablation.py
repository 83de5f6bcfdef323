"""bench/ablation.py: intervals, sentences and tables on made scores; what is there is not run again; one small run."""

import json
import math
import re

import numpy as np
import pytest
from PIL import Image

from bench import ablation
from bench.ablation_page import LOSSES, SIGMAS, T, clear, difference, follows, page, strip, t_interval, table
from training.settings import parse

COLUMNS = {"a": ("score a", ".2f"), "b": ("score b", ".1f")}


def test_interval_is_students():
    stats = pytest.importorskip("scipy.stats")
    assert T == tuple(round(float(stats.t.ppf(0.975, freedom)), 3) for freedom in range(1, 10))
    values = [1.0, 2.0, 4.0, 4.5]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    mean, half = t_interval(values)
    assert math.isclose(mean - half, low, abs_tol=1e-3) and math.isclose(mean + half, high, abs_tol=1e-3)


def test_a_difference_is_paired_and_clear_only_in_printed_digits():
    runs = {"x": [{"a": 1.0}, {"a": 5.0}, {"a": 9.0}], "y": [{"a": 1.5}, {"a": 5.4}, {"a": 9.6}]}
    paired = difference(runs, "y", "x", "a")
    assert math.isclose(paired[0], 0.5) and clear(paired, ".2f")
    assert difference(runs, "y", "x", "b") is None and not clear(None, ".2f")
    assert not clear((1e-6, 1e-9), ".2f") and not clear((0.4, 0.5), ".2f") and clear((-0.5, 0.4), ".2f")


def test_sentences_claim_what_is_clear_and_count_the_rest():
    runs = {"velocity": [{"a": 1.0, "b": 2.0}, {"a": 2.0, "b": 2.0}], "wlf": [{"a": 0.0, "b": 0.0}] * 2,
            "mask": [{"a": 1.5, "b": 2.0}, {"a": 2.5, "b": 9.0}], "huber": [{"a": 1.1, "b": 3.0}, {"a": 1.8, "b": 1.0}]}
    text = follows(runs, LOSSES, COLUMNS, "velocity", ["wlf"])
    assert "- wavelet mask: score a +0.50 ± 0.00." in text and "- pseudo-Huber bands, 0.1: nothing." in text
    assert "These are 1 of 4 differences" in text and "WLF" not in text


def test_table_has_means_intervals_and_the_photographs():
    lines = table({"mask": [{"a": 1.0}, {"a": 3.0}]}, LOSSES, COLUMNS, {"a": 2.5}).splitlines()
    assert lines == ["|  | score a |", "| --- | --- |", "| the photographs | 2.50 |", "| wavelet mask | 2.00 ± 12.71 |"]


def test_page_says_no_more_than_the_scores():
    keys = ["glcm_release", "ratio", "held_out", *SIGMAS]
    runs = {name: [dict.fromkeys(keys, 1.0), dict.fromkeys(keys, 2.0)] for name in LOSSES}
    pair = {"equal": 0.5, "share": 2e-6, "most": 1e-7}
    vaes = {name: [{"psnr": 30.0}, {"psnr": 31.0}] for name in ("photographs", *ablation.VAES)}
    text = page(runs, {"ratio": 3.0}, dict.fromkeys("abcde", pair), vaes, "made so")
    assert text.count(": nothing.") == len(LOSSES) - 2 + len(vaes) - 2 and "**" not in text.replace("**bold**", "")
    assert all(title in text for title in LOSSES.values()) and "2e-06" in text


def test_energies_add_up_and_a_set_is_0_from_itself():
    pixels = np.random.default_rng(0).integers(0, 256, (128, 192, 3), dtype=np.uint8)
    energies, features = ablation.simple_features(pixels)
    assert energies.shape == (6, 7) and features.shape == (6, 9)
    level_1, level_2 = energies[:, :3].sum(1) / 4, energies[:, 3:].sum(1) / 16  # 1/4 and 1/16 of the coefficients
    assert math.isclose((level_1 + level_2).mean(), np.square(pixels / 255).mean())
    assert ablation.frechet_distance(features, features) < 1e-9


def test_strip_has_a_row_per_loss_and_middles_at_full_size():
    pixels = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    sheet = np.asarray(strip({"none": [pixels], "mask": [pixels]}, side=64, label=100))
    assert sheet.shape == (128, 228, 3) and np.array_equal(sheet[64:, 164:], pixels[118:182, 118:182])


def test_flags_of_every_loss_parse():
    assert all(parse(["--data=x", *flags.split()]) for flags in (*ablation.LOSSES.values(), ablation.REORDERED))
    assert set(LOSSES) == {"none", *ablation.LOSSES}


def test_what_is_there_is_not_run_again(tmp_path, monkeypatch):
    plan = ablation.Plan(tmp_path, tmp_path, 160, 2, 2, 1)
    for place in ("runs/huber-1/sd3.safetensors", "runs/decoder/vae_16.safetensors"):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).touch()
    (tmp_path / "scores").mkdir()
    for name in ("huber-1", "weights", "vae"):
        (tmp_path / "scores" / f"{name}.json").write_text('{"x": 1}')
    monkeypatch.setattr(ablation, "run", lambda *_: pytest.fail("a command was run"))
    assert ablation.fine_tuned(plan, "huber", "--huber 0.1", 1, 2).name == "sd3.safetensors" and ablation.decoder(plan)
    assert ablation.scores_of(plan, "huber", 1) == ablation.weights_apart(plan) == ablation.vae_scores(plan) == {"x": 1}


@pytest.mark.parametrize("flags, line", [
    (["--seeds=1"], "2 to 10"), (["--res=100"], "a multiple of 32"), (["--steps=3"], "steps 2 -> 3"),
    (["--data=absent"], "absent")])
def test_bad_input_gets_one_line(tmp_path, capsys, flags, line):
    plan = ablation.Plan(tmp_path, tmp_path, 160, 2, 2, 1, 2, 2, 2, 2)
    if "--data=absent" not in flags:
        (tmp_path / "settings.json").write_text(json.dumps(plan.decisive()))
    with pytest.raises(SystemExit) as end:
        ablation.main([f"--data={tmp_path}", f"--out={tmp_path}", "--small", *flags])
    assert line in str(end.value) and "\n" not in str(end.value)


@pytest.mark.slow
def test_small_ablation_runs_from_nothing_and_writes_its_page(tmp_path, monkeypatch):
    photos, rows = tmp_path / "photos", []
    photos.mkdir()
    for k in range(6):
        Image.effect_noise((72, 64 + 8 * k), 30 + 10 * k).convert("RGB").resize((576, 640)).save(photos / f"{k}.png")
        rows.append(json.dumps({"file_name": f"{k}.png", "text": f"noise of kind {k}"}))
    (photos / "metadata.jsonl").write_text("\n".join(rows))
    monkeypatch.setattr(ablation, "LOSSES", {name: ablation.LOSSES[name] for name in ("velocity", "wlf", "mask")})
    for _ in range(2):
        ablation.main([f"--data={photos}", f"--out={tmp_path / 'out'}", "--small", "--threads=1"])
        monkeypatch.setattr(ablation, "run", lambda *_: pytest.fail("the second time, nothing is left to run"))
    text = (tmp_path / "out" / "ablation.md").read_text()
    cells = dict(re.findall(r"^\| (.* MSE, after 2 steps) \| .*? \| (\S+) \|", text, re.M))
    wlf, reordered, seed = (float(cell) for cell in cells.values())
    assert wlf < 1e-3 and reordered < 1e-3 and seed > 0.1
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 120
    assert Image.open(tmp_path / "out" / "ablation.jpg").size == (170 + 2 * 2 * 128, 4 * 128)
