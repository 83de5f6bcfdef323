"""The machine's memory: what a module leaves behind is freed, peaks and limits are numbers of this process."""

import os
import sys
import weakref
from pathlib import Path

from torch import nn

from machine import memory


def test_free_memory_frees_a_module_that_a_reference_cycle_holds():
    module = nn.Linear(2, 2)
    module.itself, gone = [module], weakref.ref(module)
    del module
    memory.free_memory()
    assert gone() is None


def test_peak_memory_is_above_zero_here_and_zero_on_windows(monkeypatch):
    assert 0.01 < memory.peak_memory_gib("cpu") < 1000
    monkeypatch.setattr(sys, "platform", "win32")
    assert memory.peak_memory_gib("cpu") == 0


def test_the_peak_of_a_card_is_shown_with_what_is_reserved(monkeypatch):
    for name, gib in (("allocated", 5), ("reserved", 6.5)):
        monkeypatch.setattr(f"torch.cuda.max_memory_{name}", lambda device, gib=gib: gib * 2**30)
    assert memory.peak_shown("cuda:1") == "peak 5.0 GiB, 6.5 reserved"


def test_host_memory_is_the_smallest_limit_of_the_cgroups(monkeypatch, tmp_path):
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < memory.host_memory() <= physical
    (tmp_path / "groups").write_text("0::/job/task\n3:cpuset:/\n")
    for folder, limit in (("sys/job", "1000000\n"), ("sys/job/task", "max\n")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "memory.max").write_text(limit)
    places = {"/proc/self/cgroup": tmp_path / "groups", "/sys/fs/cgroup": tmp_path / "sys"}
    monkeypatch.setattr(memory, "Path", lambda first, *rest: Path(places.get(first, first), *rest))
    assert memory.host_memory() == 1_000_000
