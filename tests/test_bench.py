"""Both cases at tiny sizes: the sides agree and a table comes out. Times are never asserted."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import MMDiTCase, VAECase, bench_mmdit, bench_vae, worst_difference

ROOT = Path(__file__).parent.parent


def test_mmdit_case_agrees_with_diffusers_and_prints_a_table(capsys):
    pytest.importorskip("diffusers")
    case = MMDiTCase(depth=2, width=128, side=8, context_tokens=3, context_width=32, pooled_width=16, table_side=6)
    bench_mmdit(case, rounds=1, matmul_side=64)
    table = capsys.readouterr().out
    assert "ours" in table and "diffusers" in table and "of matmul rate" in table and "largest difference" in table


def test_vae_case_agrees_and_prints_a_table(capsys):
    bench_vae(VAECase(channels=4, side=8), rounds=1)
    table = capsys.readouterr().out
    assert all(side in table for side in ("sub-pixel", "partition", "whole map"))


def test_flop_of_one_block_by_hand():
    case = MMDiTCase(depth=1, width=2, side=4, context_tokens=3, context_width=5)
    # 4 image tokens: 12·2² each; 3 context tokens: qkv 3·2² each; 7² scores twice, 2 wide; 64 in and out; context 5 -> 2
    assert case.flop == 2 * (4 * 48 + 3 * 12 + 2 * 49 * 2 + 2 * 4 * 64 * 2 + 3 * 5 * 2)


def test_sides_that_disagree_are_not_compared():
    with pytest.raises(RuntimeError, match="differ by"):
        worst_difference({"a": lambda: torch.zeros(2), "b": lambda: torch.ones(2)})
    with pytest.raises(RuntimeError, match="differ by"):
        worst_difference({"a": lambda: torch.zeros(2), "b": lambda: torch.full((2,), float("nan"))})


def test_help_names_both_cases():
    shown = subprocess.run([sys.executable, "bench.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "mmdit" in shown.stdout and "vae" in shown.stdout
