"""Run logging: sums on the device, lines dropped on resume, TensorBoard where installed."""

import json
import sys
import types

import pytest
import torch
from conftest import log_of, seeded

from training import logs
from training.logs import Log, Tally, matmul_rate
from training.plots import write_figure


def test_lines_after_the_checkpoint_and_a_truncated_line_are_dropped_on_resume(tmp_path):
    rows = [{"step": k, "loss": 1.0 / k} for k in range(1, 6)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 6, "lo')
    log = Log(tmp_path, 3)
    assert log.rows == rows[:3]
    log.write({"step": 4, "loss": 9.0})
    assert log_of(tmp_path) == [*rows[:3], {"step": 4, "loss": 9.0}]
    assert [f.name for f in tmp_path.iterdir()] == ["log.jsonl"]


def test_without_the_optional_packages_only_the_log_file_is_written(tmp_path, monkeypatch):
    for name in ("torch.utils.tensorboard", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    log = Log(tmp_path, 0)
    log.write({"step": 1, "loss": 2.0})
    write_figure(tmp_path / "loss.png", log.rows, [])
    assert [f.name for f in tmp_path.iterdir()] == ["log.jsonl"]


def test_tensorboard_gets_every_number_where_it_is_installed(tmp_path, monkeypatch):
    calls = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            calls.append((folder, purge_step))

        def add_scalar(self, *scalar):
            calls.append(scalar)

        def flush(self):
            calls.append("flush")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    Log(tmp_path, 4).write({"step": 5, "loss": 2.0, "v_by_sigma": [None, 1.5]})
    assert calls == [(str(tmp_path / "tensorboard"), 5), ("step", 5, 5), ("loss", 2.0, 5), ("v_by_sigma/1", 1.5, 5),
                     "flush"]


def test_row_of_the_tally_holds_means_of_loss_bands_and_sigma_bins_and_clears_the_sums():
    generator = seeded(0)
    tally, passes = Tally(torch.device("cpu")), []
    for _ in range(3):
        velocity, target = torch.randn(2, 4, 16, 6, 6, generator=generator)
        sigma = torch.tensor([0.0, 0.3, 0.99, 1.0])
        losses = tally.add(velocity.mean(), velocity, target, sigma)
        assert torch.allclose(losses, (velocity - target).square().mean((1, 2, 3)), rtol=1e-5)
        passes.append((velocity.mean(), losses))
    row, each = tally.row(), torch.stack([losses for _, losses in passes])
    assert row["loss"] == pytest.approx(torch.stack([loss for loss, _ in passes]).mean().item(), rel=1e-5)
    assert sum(row[f"v_{band}"] for band in ("ll", "lh", "hl", "hh")) / 4 == pytest.approx(each.mean().item(), abs=2e-5)
    bins = row["v_by_sigma"]
    assert bins[0] == pytest.approx(each[:, 0].mean().item(), abs=1e-5) and bins[1] is None
    assert bins[2] == pytest.approx(each[:, 1].mean().item(), abs=1e-5)
    assert bins[7] == pytest.approx(each[:, 2:].mean().item(), abs=1e-5)
    assert tally.passes == 0 and not tally.sums.any()


def test_matmul_rate_is_that_of_the_fastest_product(monkeypatch):
    clock = iter([0.0, 3.0, 10.0, 12.0, 20.0, 24.0])  # products of 3, 2 and 4 seconds
    monkeypatch.setattr(logs, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    assert matmul_rate(torch.device("cpu"), torch.float32) == 2 * logs.MATMUL_SIDE["cpu"] ** 3 / 2.0
