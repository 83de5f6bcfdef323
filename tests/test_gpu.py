"""bench/gpu.py: failing rows, the end of its time, the table. All rows run in .ci/run, as bench/gpu.py --small."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from bench import gpu, gpu_rows
from bench.gpu import Row, end, measured, parity, rows_of, start, table
from bench.gpu_rows import FLUX_12B, SD3_2B, SMALL, attention, blocks_that_fit, random_model, sampling
from flux import FluxConfig
from mmdit import MMDiT


def fails(sizes):
    raise RuntimeError("the kernel is\n  not there | at all")


ROWS = [Row("first", fails), Row("second", lambda sizes: {"step_s": 0.123456, "blocks": 3}, "0.59 images per s")]


def test_failing_row_is_reported_in_one_line_and_the_next_one_runs():
    first, second = measured(ROWS, SMALL, 60)
    assert first["failed"] == "RuntimeError: the kernel is not there | at all" and first["took_s"] >= 0
    assert second["step_s"] == 0.123456 and "failed" not in second


def test_no_row_begins_after_the_given_seconds():
    assert all("left_out" in record and "took_s" not in record for record in measured(ROWS, SMALL, -1))


def test_file_holds_every_row_and_becomes_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "rows_of", lambda device: ROWS)
    monkeypatch.setattr(gpu.torch, "set_num_threads", lambda threads: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert gpu.run(tmp_path / "card.jsonl", 60, small=True) == 1
    lines = (tmp_path / "card.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == ["first", "second"]
    assert table(tmp_path / "card.jsonl").splitlines()[2:] == [
        "| first | failed RuntimeError: the kernel is not there / at all |  |",
        "| second | step s 0.123, blocks 3 | 0.59 images per s |"]


def test_failed_row_ends_the_command_with_an_error(monkeypatch):
    monkeypatch.setattr(gpu, "run", lambda *given: 2)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--small"])
    with pytest.raises(SystemExit, match="2 rows failed"):
        gpu.main()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_full_sizes_are_refused():
    with pytest.raises(ValueError, match="no CUDA device here: --small"):
        gpu.run(None, 60, small=False)


def test_small_rows_are_the_rows_of_a_gpu_but_for_the_kernels_that_a_cpu_lacks():
    on_gpu, on_cpu = ([row.name for row in rows_of(device)] for device in ("cuda", "cpu"))
    assert len(set(on_gpu)) == len(on_gpu)
    assert [name for name in on_gpu if not name.endswith((", cudnn", ", efficient"))] == on_cpu


@pytest.mark.parametrize("case", ["mmdit_sd3", "vae_f16", "clip_l"])
def test_parity_row_is_near_the_official_outputs_and_fails_beyond_its_bound(case, monkeypatch):
    row = parity(case, SMALL)
    assert row["fp32_without_tf32"] <= 1e-5 < row["bf16"]
    monkeypatch.setattr(gpu, "PARITY", 0.0)
    with pytest.raises(RuntimeError, match="from the official outputs"):
        parity(case, SMALL)


def test_wrong_kernel_is_noticed(monkeypatch):
    assert attention(SD3_2B, 64, "flash", SMALL)["error"] < 0.02
    monkeypatch.setattr(gpu_rows, "KERNEL_ERROR", 1e-6)
    with pytest.raises(RuntimeError, match="of the largest value from fp32"):
        attention(SD3_2B, 64, "flash", SMALL)


def test_velocity_that_is_not_finite_fails_its_row(monkeypatch):
    assert sampling(SD3_2B, SMALL)["s_per_step"] > 0
    infinite = torch.full((2, 3, 64), torch.inf), torch.ones(2, 64)
    monkeypatch.setattr(gpu_rows, "conditions", lambda *given: infinite)
    with pytest.raises(RuntimeError, match="NaN or Inf"):
        sampling(SD3_2B, SMALL)


def test_random_weights_keep_the_variance_of_what_they_multiply():
    model = random_model(lambda: MMDiT(SMALL.sd3), "cpu", torch.float32)
    block = model.joint_blocks[0].x_block
    assert block.mlp.fc1(torch.randn(500, 128)).var() == pytest.approx(1, abs=0.2)
    assert not block.mlp.fc1.bias.any()


@pytest.mark.parametrize("bytes_per_parameter, depth", [(1e-3, 19), (1e12, 1)])
def test_as_many_blocks_are_trained_as_the_host_holds(bytes_per_parameter, depth, monkeypatch):
    monkeypatch.setattr(gpu_rows, "OFFLOADED_BYTES", bytes_per_parameter)
    config = blocks_that_fit(FluxConfig())
    assert (config.depth, config.depth_single) == (depth, 2 * depth)
    assert replace(config, depth=19, depth_single=38) == FLUX_12B.of(gpu_rows.Sizes())


def test_failing_commands_are_named_with_their_error_or_last_line():
    end(start("-c", "pass"))
    report = "import sys; sys.exit('error: boom\\n=====')"
    with pytest.raises(RuntimeError, match="^-c import sys.*: error: boom; -c raise.*: no message$"):
        end(start("-c", report), start("-c", "raise SystemExit(3)"))
