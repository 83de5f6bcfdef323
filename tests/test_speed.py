"""All cases at tiny sizes: the sides agree and a table comes out. Times are never asserted."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.speed import FluxCase, MMDiTCase, VAECase, bench_detail, bench_transformer, bench_vae, worst_difference

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("case", [
    MMDiTCase(depth=2, width=128, side=8, context_tokens=3, context_width=32, pooled_width=16, table_side=6),
    FluxCase(width=128, side=8, context_tokens=3, context_width=32, pooled_width=16)], ids=["mmdit", "flux"])
def test_transformer_agrees_with_diffusers_and_prints_a_table(capsys, case):
    pytest.importorskip("diffusers")
    bench_transformer(case, rounds=1, matmul_side=64)
    table = capsys.readouterr().out
    assert "ours" in table and "diffusers" in table and "of matmul rate" in table and "largest difference" in table


def test_vae_case_agrees_and_prints_a_table(capsys):
    bench_vae(VAECase(channels=4, side=8), rounds=1)
    table = capsys.readouterr().out
    assert all(side in table for side in ("sub-pixel", "partition", "whole map"))


@pytest.mark.parametrize("case, other", [("glcm", "release"), ("jpeg", "Pillow")])
def test_detail_cases_agree_and_print_a_table(capsys, case, other):
    pytest.importorskip("skimage")
    bench_detail(case, str(ROOT / "examples" / "dandelion_meadow.jpg"), rounds=1, pixels=128)
    table = capsys.readouterr().out
    assert "dandelion_meadow.jpg at 128 x 128 px" in table and "ours" in table and f"time ours / {other}" in table


def test_flop_of_one_block_by_hand():
    case = MMDiTCase(depth=1, width=2, side=4, context_tokens=3, context_width=5)
    # 4 image tokens: 12·2² each; 3 context tokens: qkv 3·2² each; 7² scores twice, 2 wide; 64 in and out; context 5 -> 2
    assert case.flop == 2 * (4 * 48 + 3 * 12 + 2 * 49 * 2 + 2 * 4 * 64 * 2 + 3 * 5 * 2)


def test_flop_of_flux_by_hand():
    case = FluxCase(depth=1, depth_single=1, width=2, side=4, context_tokens=3, context_width=5)
    # 7 tokens in 2 blocks: 12·2² each; 7² scores twice, 2 wide, in 2 blocks; 64 in and out; context 5 -> 2
    assert case.flop == 2 * (2 * 7 * 48 + 2 * 2 * 49 * 2 + 2 * 4 * 64 * 2 + 3 * 5 * 2)


def test_sides_that_disagree_are_not_compared():
    with pytest.raises(RuntimeError, match="differ by"):
        worst_difference({"a": lambda: torch.zeros(2), "b": lambda: torch.ones(2)})
    with pytest.raises(RuntimeError, match="differ by"):
        worst_difference({"a": lambda: torch.zeros(2), "b": lambda: torch.full((2,), float("nan"))})


def test_help_names_all_cases():
    shown = subprocess.run([sys.executable, "bench/speed.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(case in shown.stdout for case in ("mmdit", "flux", "vae", "glcm", "jpeg"))
