"""Both cases at tiny sizes: the sides agree and a table comes out. Times are never asserted."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.speed import Case, largest_difference
from bench.train_step import bench_step

ROOT = Path(__file__).parent.parent
SIZES = dict(depth=2, width=128, heads=2, side=8, context_tokens=3, context_width=32, pooled_width=16, table_side=6)


def test_step_agrees_with_the_release_on_diffusers_model_and_prints_a_table(capsys):
    pytest.importorskip("diffusers")
    pytest.importorskip("pytorch_wavelets")
    bench_step("tiny", Case(**SIZES), 2, threads=1, rounds=1)
    table = capsys.readouterr().out
    assert "time ours / diffusers" in table and "peak ours / diffusers" in table and "batch 2" in table


def test_ddp_agrees_with_torchs_and_prints_a_table(tmp_path):
    script = ("from bench.speed import Case\nfrom bench.train_step import bench_ddp\n"
              f"if __name__ == '__main__':\n    bench_ddp(Case(**{SIZES!r}), 1, 1, 1)\n")
    (tmp_path / "run.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{script}")
    script = [sys.executable, str(tmp_path / "run.py")]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "time ours / torch's" in done.stdout and "2 gloo ranks" in done.stdout


def test_sides_that_disagree_relatively_are_not_compared():
    small = {"a": lambda: torch.full((2,), 1e-6), "b": lambda: torch.full((2,), 1.001e-6)}
    assert largest_difference(small) < 1e-8
    with pytest.raises(RuntimeError, match="differ by"):
        largest_difference(small, relative=True)
    with pytest.raises(RuntimeError, match="differ by"):
        largest_difference({"a": lambda: torch.ones(2), "b": lambda: torch.full((2,), float("nan"))}, relative=True)
