"""All cases at tiny sizes: the sides agree and a table comes out. Times are never asserted."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bench.autoencoder
import bench.loading
from bench.speed import (
    WARM_UP,
    Case,
    bench_detail,
    bench_transformer,
    bench_vae,
    diffusers_transformer,
    largest_difference,
    our_transformer,
    take_turns,
    write_transformer,
)
from flux import Flux
from vae import VAEConfig

ROOT = Path(__file__).parent.parent
SIZES = dict(width=128, side=8, context_tokens=3, context_width=32, pooled_width=16)


BOTH = pytest.mark.parametrize("case", [
    Case(depth=2, heads=2, table_side=6, **SIZES), Case(Flux, depth=1, depth_single=2, heads=1, **SIZES)],
    ids=["mmdit", "flux"])


@BOTH
def test_transformer_agrees_with_diffusers_and_prints_a_table(capsys, case):
    pytest.importorskip("diffusers")
    bench_transformer(case, rounds=1, matmul_side=64)
    table = capsys.readouterr().out
    assert "ours" in table and "diffusers" in table and "of matmul rate" in table and "largest difference" in table


@BOTH
def test_transformer_agrees_with_diffusers_in_bf16(tmp_path, case):
    pytest.importorskip("diffusers")
    case = replace(case, dtype="bf16")
    write_transformer(case, tmp_path)
    sides = {build.__name__: build(case, tmp_path, "cpu") for build in (our_transformer, diffusers_transformer)}
    with torch.inference_mode():
        assert {step().dtype for step in sides.values()} == {torch.bfloat16} and largest_difference(sides) > 0


def test_loading_agrees_with_diffusers_and_prints_a_table(capsys):
    pytest.importorskip("diffusers")
    bench.loading.bench(Case(depth=2, heads=2, table_side=6, dtype="bf16", **SIZES), None, threads=1, rounds=1)
    table = capsys.readouterr().out
    assert all(side in table for side in ("ours", "streamed", "diffusers")) and "largest difference" in table


def test_vae_case_agrees_and_prints_a_table(capsys):
    bench_vae("cpu", 1, rounds=1, channels=4, side=8)
    table = capsys.readouterr().out
    assert all(side in table for side in ("sub-pixel", "partition", "complete map"))


@pytest.mark.parametrize("part", bench.autoencoder.PARTS)
def test_autoencoder_agrees_with_diffusers_and_prints_a_table(part, capsys, monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.setattr("vae.BANDED_PIXELS", 2**12)
    monkeypatch.setattr(bench.autoencoder, "fresh", lambda function, *arguments: function(*arguments))
    bench.autoencoder.bench(part, 128, "fp32", "cpu", 1, 1, False, VAEConfig((8, 16), (8, 16), 1, 2, 4, 4))
    title, head, *rows = capsys.readouterr().out.strip().splitlines()
    assert "factor 8" in title and head.split()[:3] == ["ms/step", "counted", "GB"]
    assert all(any(row.startswith(side) for row in rows) for side in bench.autoencoder.SIDES)
    assert "largest difference of the first three" in rows[-1]


@pytest.mark.parametrize("case, other", [("glcm", "release"), ("jpeg", "Pillow")])
def test_detail_cases_agree_and_print_a_table(capsys, case, other):
    pytest.importorskip("skimage")
    bench_detail(case, str(ROOT / "examples" / "dandelion_meadow.jpg"), rounds=1, pixels=128)
    table = capsys.readouterr().out
    assert "dandelion_meadow.jpg at 128 x 128 px" in table and "ours" in table and f"time ours / {other}" in table


def test_sides_that_disagree_are_not_compared():
    with pytest.raises(RuntimeError, match="differ by"):
        largest_difference({"a": lambda: torch.zeros(2), "b": lambda: torch.ones(2)})
    with pytest.raises(RuntimeError, match="differ by"):
        largest_difference({"a": lambda: torch.zeros(2), "b": lambda: torch.full((2,), float("nan"))})


def test_outputs_are_compared_without_tf32_in_convolutions_and_timed_as_torch_comes(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    allowed = []
    steps = {side: lambda: torch.full((2,), allowed.append(torch.backends.cudnn.allow_tf32) or 1.0) for side in "ab"}
    largest_difference(steps)
    take_turns(steps, "cpu", rounds=1)
    assert allowed[:2] == [False, False] and allowed[2:] == [True] * 2 * (WARM_UP + 1)


def test_bf16_outputs_may_differ_by_their_rounding_and_no_more():
    sides = {"a": lambda: torch.ones(2).bfloat16(), "b": lambda: torch.full((2,), 1.03).bfloat16()}
    assert largest_difference(sides) > 0.01
    with pytest.raises(RuntimeError, match="more than 5e-02"):
        largest_difference(sides | {"b": lambda: torch.full((2,), 1.1).bfloat16()})


def test_sides_take_turns_and_the_warm_up_is_not_counted():
    calls = []
    times = take_turns({side: lambda side=side: calls.append(side) for side in "ab"}, "cpu", rounds=3)
    assert "".join(calls) == "ab" * (WARM_UP + 3)
    assert {side: len(values) for side, values in times.items()} == {"a": 3, "b": 3}


def test_help_names_all_cases_from_any_folder(tmp_path):
    script = [sys.executable, ROOT / "bench" / "speed.py", "--help"]
    shown = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert all(case in shown.stdout for case in ("mmdit", "flux", "vae", "glcm", "jpeg"))
