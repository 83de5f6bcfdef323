"""Gradients averaged over the ranks: by hand (DDP), or by FSDP2 where the model is sharded; their norm.

Check     python -m pytest tests/test_ranks.py
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from checkpoint import DTYPES
from layers import blocks_of
from training.adapter import trained
from training.ranks import world
from training.settings import Settings

BUCKET_BYTES = 25 << 20
ALIGNMENT = 64             # elements: gradients begin at multiples of it in their bucket


@dataclass
class Bucket:
    gradients: Tensor             # flat; every p.grad is a view of it
    used: Tensor                  # its last len(parameters) entries; > 0 after all-reduce if any rank had a gradient
    parameters: list[nn.Parameter]
    arrived: set[int]             # parameters with a gradient on this rank
    waiting: int = 0              # parameters still without one in the last backward


class DDP:
    """Gradients averaged over the ranks while backward is still running.

    Buckets  parameters in reverse order, as backward reaches them, about BUCKET_BYTES each
    Launch   a bucket is reduced once its last gradient is ready, in bucket order: all ranks issue the same sequence
    Unused   a parameter without a gradient on this rank counts as 0; one unused on every rank keeps grad None, as on
             one process. The usage flags travel at the end of each bucket
    """

    def __init__(self, model: nn.Module):
        for tensor in (*trained(model).values(), *model.buffers()):
            dist.broadcast(tensor.detach(), 0)
        self.last_backward, self.buckets, self.launched, self.works = True, [], 0, []
        group: list[nn.Parameter] = []
        for parameter in reversed(trained(model).values()):
            if group and sum(p.nbytes for p in group) + parameter.nbytes > BUCKET_BYTES:
                self.buckets.append(self.bucket(group))
                group = []
            group.append(parameter)
        self.buckets.append(self.bucket(group))

    def bucket(self, parameters: list[nn.Parameter]) -> Bucket:
        length = sum(-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in parameters)
        flat = parameters[0].new_zeros(length + len(parameters))
        bucket = Bucket(flat, flat[length:], parameters, set())
        for k, parameter in enumerate(parameters):
            parameter.register_post_accumulate_grad_hook(partial(self.arrive, bucket, k))
        return bucket

    def zero(self) -> None:
        """Before the first backward of a step."""
        self.launched = 0
        for bucket in self.buckets:
            bucket.gradients.zero_()
            bucket.arrived.clear()
            bucket.waiting, start = len(bucket.parameters), 0
            for parameter in bucket.parameters:
                parameter.grad = bucket.gradients[start:start + parameter.numel()].view_as(parameter)
                start += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT

    def arrive(self, bucket: Bucket, k: int, parameter: nn.Parameter) -> None:
        bucket.arrived.add(k)
        if self.last_backward:  # of a step with --accumulate
            bucket.waiting -= 1
            self.launch()

    def launch(self, incomplete: bool = False) -> None:
        """Send off the buckets that are next in order and ready; with `incomplete`, all that are left."""
        while self.launched < len(self.buckets) and (incomplete or not self.buckets[self.launched].waiting):
            bucket = self.buckets[self.launched]
            if len(bucket.arrived) == len(bucket.parameters):
                bucket.used.fill_(1)
            else:
                bucket.used[list(bucket.arrived)] = 1
            self.works.append(dist.all_reduce(bucket.gradients.div_(world()), async_op=True))
            self.launched += 1

    def wait(self) -> None:
        """After the last backward of a step: from here on every p.grad is the average."""
        self.launch(incomplete=True)
        while self.works:
            self.works.pop(0).wait()
        for bucket in self.buckets:
            if len(bucket.arrived) < len(bucket.parameters):
                for parameter, used in zip(bucket.parameters, bucket.used.tolist(), strict=True):
                    if not used:
                        parameter.grad = None


class Sync:
    """One interface to DDP, to FSDP, which averages by its own hooks, and to a single process."""

    def __init__(self, model: nn.Module, sharded: bool):
        self.model = model
        self.ddp = DDP(model) if dist.is_initialized() and not sharded else None

    def zero(self) -> None:
        """Before the first backward of a step."""
        if self.ddp:
            self.ddp.zero()
        else:
            self.model.zero_grad(set_to_none=True)

    def set_last(self, last: bool) -> None:
        """Before each backward: DDP sends gradients with the last one of a step only."""
        if self.ddp:
            self.ddp.last_backward = last

    def wait(self) -> None:
        """After the last backward: from here on every p.grad is the average over the ranks."""
        if self.ddp:
            self.ddp.wait()


def shard(model: nn.Module, settings: Settings, mesh: DeviceMesh) -> None:
    """Split every block, then the rest, into rows, one part per rank: FSDP2. Gradients are reduced in fp32."""
    compute = torch.bfloat16 if settings.state == "bf16" else DTYPES[settings.dtype]
    policy = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy() if settings.offload else OffloadPolicy()}
    for block in blocks_of(model):
        fully_shard(block, reshard_after_forward=settings.shard == "zero3", **policy)
    fully_shard(model, reshard_after_forward=False, **policy)


def clip(model: nn.Module, limit: float) -> Tensor:
    """Scale the gradients down to a norm of `limit`; returns their norm before that, over all ranks."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
