"""The processes of one run: meeting those that torchrun started, and failing together.

Check     python -m pytest tests/test_ranks.py
"""

import argparse
import os
from collections.abc import Callable

import torch
import torch.distributed as dist


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def join(args: argparse.Namespace) -> None:
    """Meet the ranks that torchrun started; alone, there is nobody to meet, but FSDP wants a group of one."""
    if args.device.startswith("cuda"):
        index, cards = torch.device(args.device).index, torch.cuda.device_count()
        index = int(os.environ.get("LOCAL_RANK", 0)) if index is None else index
        if index >= cards:
            raise ValueError(f"--device {args.device}: card {index} of {cards}, counted from 0; give torchrun a smaller --nproc-per-node")
        torch.cuda.set_device(index)
    backend = "cpu:gloo,cuda:nccl" if args.device.startswith("cuda") else "gloo"
    if "RANK" in os.environ:
        try:
            dist.init_process_group(backend)
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            why = "another run uses this port" if "EADDRINUSE" in str(error) else "the first rank does not answer there"
            raise ValueError(f"ranks meet at {where}: {why}; give torchrun --standalone, or another --master-port") from None
    elif args.shard != "none":
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


class Agreed(ValueError):
    """An error that every rank knows of: the first one prints it."""


def together(work: Callable[[], object], stop: bool = False) -> tuple[object, bool]:
    """Do what may fail on one rank alone; if it does, all of them stop with its error instead of waiting for it.

    stop     this rank was asked to stop
    returns  what the work gave, and whether any rank was asked to stop
    """
    result, error = None, None
    try:
        result = work()
    except (ValueError, OSError) as failure:
        if not dist.is_initialized():
            raise
        error = str(failure)
    replies = [(error, stop)]
    if dist.is_initialized():
        replies *= world()
        dist.all_gather_object(replies, (error, stop))
    if said := [f"{text} (rank {k})" if k else text for k, (text, _) in enumerate(replies) if text]:
        raise Agreed(said[0])
    return result, any(asked for _, asked in replies)


def by_first(work: Callable[[], object]) -> object:
    """Have the first rank alone do what may fail; None on the others."""
    return together(work if not rank() else lambda: None)[0]
