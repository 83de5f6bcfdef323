"""The processes of one training run: their numbers and machine, failing together, stopping on signals.

Check     python -m pytest tests/test_ranks.py
"""

import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist

from files import INTERRUPTED
from machine.ranks import gathered

STOPS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")  # Windows has the first two
Result = TypeVar("Result")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def described(device: torch.device) -> str:
    """A line about the machine: cores, or card and driver; and the version of torch."""
    if device.type == "cpu":
        return f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} threads per rank; torch {torch.__version__}"
    card, about = torch.cuda.get_device_properties(device), Path("/proc/driver/nvidia/version")
    driver = re.search(r"\d+\.[\d.]+", about.read_text()) if about.exists() else None
    return (f"{device}: {card.name}, {card.total_memory / 1e9:.0f} GB; driver {driver[0] if driver else 'unknown'}; "
            f"torch {torch.__version__}")


class SharedError(ValueError):
    """An error that every rank knows: only the first one prints it."""


def together(work: Callable[[], Result], stop: bool = False) -> tuple[Result, bool]:
    """Run work() on every rank; if any rank raises, all raise its error.

    stop     this rank was asked to stop
    returns  this rank's result, and whether any rank was asked to stop
    """
    result, error = None, None
    try:
        result = work()
    except (ValueError, OSError) as failure:
        if not dist.is_initialized():
            raise
        error = str(failure)
    replies = gathered((error, stop))
    if errors := [f"{text} (rank {k})" if k else text for k, (text, _) in enumerate(replies) if text]:
        raise SharedError(errors[0])
    return result, any(asked for _, asked in replies)


def on_all(work: Callable[[], Result]) -> Result:
    """Run work() on every rank; if any rank raises, all raise its error."""
    return together(work)[0]


def on_first(work: Callable[[], object]) -> None:
    """Run work() on rank 0 only; if it raises, all ranks raise its error."""
    together(work if not rank() else lambda: None)


class Stop(Event):
    """Set by the first signal, whose number it keeps; a second Ctrl-C ends the process at once."""

    number = 0

    def ask(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGINT:
            os.write(2, b"\ninterrupted\n")
            os._exit(INTERRUPTED)
        if not self.number:
            self.number = number
            self.set()


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """An event that STOPS set while the block runs, so that the step is finished and saved.

    Before the block they end the process at once: there is nothing to save. One that is ignored, as SIGHUP is under
    nohup, stays ignored.
    """
    stop, before = Stop(), {}
    for number in (getattr(signal, name) for name in STOPS if hasattr(signal, name)):
        if signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, stop.ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
