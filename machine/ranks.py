"""The processes that torchrun started for one run: joining, agreeing, leaving.

Check     python -m pytest tests/test_ranks.py
"""

import gc
import os
from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist

from files import launched

PATIENCE = timedelta(hours=6)  # how long ranks wait for one that encodes its share, or writes 24 GB

Result = TypeVar("Result")


def join(device: torch.device, sharded: bool) -> None:
    """Initialise the process group under torchrun; without it, a group of one if FSDP is used."""
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    launched()  # refuses half of torchrun's environment
    if "RANK" in os.environ:
        try:
            store, number, size = next(dist.rendezvous("env://"))
            # torchrun restarts all ranks on the same store: those of an earlier attempt must not be taken for them
            store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group(backend, store=store, rank=number, world_size=size)
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            why = "another run uses this port" if "EADDRINUSE" in str(error) else "the first rank does not answer there"
            raise ValueError(f"ranks meet at {address}: {why}; give torchrun --standalone, or another "
                             "--master-port") from None
    elif sharded:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


@cache
def patient() -> dist.ProcessGroup:
    """All ranks, in a group that waits PATIENCE for the slowest; that of the gradients keeps its shorter time-out."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def gathered(value: Result) -> list[Result]:
    """The values of all ranks, in their order."""
    if not dist.is_initialized():
        return [value]
    everyone = [value] * dist.get_world_size()
    dist.all_gather_object(everyone, value, patient())
    return everyone


def leave() -> None:
    """Destroy the process group while Python still runs: the last line of whatever joined one.

    A thread of gloo may hold the last reference to a tensor of a finished collective. If it drops it while the
    interpreter ends, the process aborts, or waits for ever for a lock that nobody holds. The barrier lets all ranks
    finish before one closes its connections; destroy_process_group then joins the threads, once no model in a cycle
    of references (FSDP has them) keeps a group alive.
    """
    if dist.is_initialized():
        patient.cache_clear()
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()
        gc.collect()
