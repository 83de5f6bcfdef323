"""Models that never hold all of their weights: modulations computed before the loop, blocks read while others compute.

Modulation  depends on the noise level, the pooled text and the guidance alone. `hoist` computes it for all levels of a
            picture, so that its weights, 27 % of Flux's, are not there while the blocks run
Streamed    the blocks after the first `resident` ones: each is read from its file into one of two buffers while the
            block before it computes, by a thread; on a GPU through pinned memory, on a stream of its own
fp8         matrices of blocks as float8_e4m3fn, one scale per row; cast in the same buffers just before use. A file of
            scaled fp8 is kept as it comes. Embedders, norms, biases and the final layer keep the compute dtype
Equal       to a plain model, bit for bit, but for fp8
Check       python -m pytest tests/test_streaming.py
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from functools import partial
from itertools import chain, islice
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from checkpoint import Device, LazyTensor, Weights, anew, assign, check_names, range_of
from flux import Flux
from layers import Modulation, blocks_of
from mmdit import MMDiT

M = TypeVar("M", bound=nn.Module)
FP8, LARGEST = torch.float8_e4m3fn, 448.0
ROWS = 1024    # of a matrix, that are in fp32 at a time while it is turned to fp8
ALIGNED = 256  # bytes


class InFP8(NamedTuple):
    weight: Tensor  # (rows, columns) float8_e4m3fn
    scale: Tensor   # (rows, 1) or less, fp32


def streamed(make: Callable[[], M], weights: Weights, device: Device, dtype: torch.dtype | None,
             resident: int | None = None, fp8: bool = False) -> M:
    """The module that `make` builds, as checkpoint.filled makes it, but with modulations and blocks read when needed.

    resident  blocks that keep their weights; None: all
    fp8       keep the matrices of these in fp8
    """
    with torch.device("meta"):
        module = make()
    check_names(module, weights)
    dtype, device = dtype or torch.float32, torch.device(device)
    for name, modulation in list(module.named_modules()):
        if isinstance(modulation, Modulation):
            module.set_submodule(name, Hoisted(partial(_rows, modulation, weights.part(f"{name}."), device, dtype)))
    blocks, paths = blocks_of(module), {block: name for name, block in module.named_modules()}
    parts = [Weights({name: weights[f"{paths[block]}.{name}"] for name in block.state_dict()}, {},
                     f"{weights.source}: {paths[block]}") for block in blocks]
    resident = len(blocks) if resident is None else resident
    first = 0 if fp8 else resident  # from this block on, weights are read or cast just before use
    away = tuple(f"{paths[block]}." for block in blocks[first:])
    there = [name for name in module.state_dict() if not name.startswith(away)]
    assign(module, Weights(anew(weights), {}, weights.source), there, device, dtype)  # the maps go with the module
    if blocks[first:]:
        kept = [{name: _stored((t.read() for t in _in_file(tensor)), device, fp8) for name, tensor in part.items()}
                for part in parts[first:resident]]
        module.reading = Buffers(blocks[first:], parts[first:], kept, device, dtype, fp8)
    return module.eval()


def finish(module: nn.Module) -> None:
    """Wait for the block that is being read ahead, whose thread would keep the memory of a module that is let go."""
    if (reading := getattr(module, "reading", None)) and reading.coming[1]:
        wait([reading.coming[1]])


# ---- modulations before the loop

class Hoisted(nn.Module):
    """Stands for a Modulation: gives the rows that `hoist` computed, for row numbers (B,) instead of cond (B, D)."""

    def __init__(self, compute: Callable[[list[Tensor]], Tensor]):
        super().__init__()
        self.compute, self.rows = compute, None

    def forward(self, numbers: Tensor) -> tuple[Tensor, ...]:
        return self.rows.index_select(0, numbers).unbind(1)


def _rows(modulation: Modulation, weights: Weights, device: torch.device, dtype: torch.dtype,
          conds: list[Tensor]) -> Tensor:
    """(rows, chunks, 1, D); the weights are read for this, and let go."""
    assign(modulation, Weights(anew(weights), {}, weights.source), list(weights), device, dtype)
    rows = torch.cat([torch.stack(modulation(cond), dim=1) for cond in conds])  # level by level, as the plain model
    modulation.to("meta")
    return rows


@torch.inference_mode()
def hoist(model: MMDiT | Flux, sigmas: Tensor, pooled: Tensor, guidance: Tensor | None) -> Tensor:
    """Compute what the modulations of a streamed model give at these noise levels, and only at these.

    sigmas    (S,), the levels at which the model will be called
    pooled    (B, P), guidance (B,) or None: of the pictures it will be called for
    returns   (B, 1): their numbers, which the model then takes in the place of pooled
    """
    count, sigmas = len(pooled), sigmas.to(pooled.device)
    conds = [type(model).condition(model, sigma.expand(count), pooled, guidance) for sigma in sigmas]
    for module in model.modules():
        if isinstance(module, Hoisted):
            module.rows = module.compute(conds)

    def condition(sigma: Tensor, numbers: Tensor, guidance: Tensor | None) -> Tensor:
        same = sigmas[:, None] == sigma
        torch._assert_async(same.any(0).all(), "a noise level without modulations: hoist() it too")  # does not wait
        return same.int().argmax(0) * count + numbers[:, 0]

    model.condition = condition
    return torch.arange(count, device=pooled.device)[:, None]


# ---- blocks while others compute

def in_fp8(weight: Tensor) -> InFP8:
    """A matrix in fp8, its largest value in each row at the end of the range."""
    held = InFP8(torch.empty_like(weight, dtype=FP8), weight.new_empty(len(weight), 1, dtype=torch.float32))
    for rows, numbers, scale in zip(*(t.split(ROWS) for t in (weight, *held)), strict=True):
        rows = rows.float()
        scale.copy_(rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / LARGEST)
        numbers.copy_((rows / scale).clamp(-LARGEST, LARGEST))
    return held


def _in_file(tensor: LazyTensor) -> tuple[LazyTensor, ...]:
    """What a file holds of a tensor: itself, or numbers in fp8 and their scale."""
    return tensor.scaled or (tensor,)


def _stored(read: Iterable[Tensor], device: torch.device, fp8: bool) -> Tensor | InFP8:
    """A tensor on the device, from what its file holds; in fp8 if it is there, or if it is a matrix and fp8 is kept."""
    values, *scale = (part.to(device, non_blocking=True) for part in read)
    if scale:
        return InFP8(values, scale[0].float().view(-1, 1))
    if not fp8 or values.ndim != 2:
        return values
    return InFP8(values, torch.ones(1, 1, device=device)) if values.dtype == FP8 else in_fp8(values)


def _views(buffer: Tensor, shapes: dict[str, tuple[torch.Size, torch.dtype]]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor of that shape and dtype) in a buffer of bytes, one after the other."""
    start = 0
    for name, (shape, dtype) in shapes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        yield name, buffer[start:start + size].view(dtype).view(shape)
        start += -(-size // ALIGNED) * ALIGNED


def _bytes(shapes: dict[str, tuple[torch.Size, torch.dtype]]) -> int:
    return sum(-(-torch.Size(shape).numel() * dtype.itemsize // ALIGNED) * ALIGNED for shape, dtype in shapes.values())


class Buffers:
    """Two buffers in turn: one holds the block that computes, the other receives the next one.

    blocks, parts  in the order in which they run, again and again; a block may run several times in a row
    kept           those of the first blocks that are on the device, in fp8; the others are read from the file
    """

    def __init__(self, blocks: list[nn.Module], parts: list[Weights], kept: list[dict[str, Tensor | InFP8]],
                 device: torch.device, dtype: torch.dtype, fp8: bool):
        self.blocks, self.parts, self.kept, self.device, self.dtype, self.fp8 = blocks, parts, kept, device, dtype, fp8
        self.shapes = [{name: (tensor.shape, dtype) for name, tensor in part.items()} for part in parts]
        self.buffers = [torch.empty(max(map(_bytes, self.shapes)), dtype=torch.uint8, device=device) for _ in range(2)]
        self.now, self.turn, self.coming = -1, 0, (-1, None)  # the block that computes, its buffer, (block, its future)
        self.checked: set[int] = set()  # blocks without NaN and Inf
        self.warned = False             # of zeros: once, as an incomplete file may have many blocks of them
        self.thread = ThreadPoolExecutor(1)
        self.pinned = self.stream = None
        if device.type == "cuda":
            self.stream, self.sent = torch.cuda.Stream(device), torch.cuda.Event()
            self.free = [torch.cuda.Event(), torch.cuda.Event()]  # of each buffer: the block that read it has ended
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self.begin, number))

    def begin(self, number: int, block: nn.Module, inputs: object) -> None:
        """Before a block: its weights are taken, and the next one's are sent for."""
        if number == self.now:
            return
        if self.now >= 0:
            self.blocks[self.now].to("meta")
            if self.stream:
                self.free[self.turn].record(torch.cuda.current_stream(self.device))  # which may not be the current card
        coming, future = self.coming
        self.turn = 1 - self.turn
        if coming != number:  # the first one; or the run began anew
            if future:
                future.result()
            future = self.send(number, self.turn)
        tensors, ready = future.result()
        if ready:
            torch.cuda.current_stream(self.device).wait_event(ready)
        for name, tensor in tensors.items():
            owner, _, leaf = name.rpartition(".")
            block.get_submodule(owner).register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
        self.now, following = number, (number + 1) % len(self.blocks)
        self.coming = (-1, None) if following == number else (following, self.send(following, 1 - self.turn))

    def send(self, number: int, turn: int) -> Future:
        return self.thread.submit(self.read, number, turn)

    @torch.inference_mode()
    def read(self, number: int, turn: int) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
        """The weights of a block in one of the buffers, and the event after which they are there."""
        ready = None
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            if self.stream:
                self.stream.wait_event(self.free[turn])
            tensors = dict(_views(self.buffers[turn], self.shapes[number]))
            for name, stored in self.kept[number].items() if number < len(self.kept) else self.from_file(number):
                if isinstance(stored, InFP8):  # in place: a GPU multiplies in fp32 without a copy in fp32
                    tensors[name].copy_(stored.weight).mul_(stored.scale)
                else:
                    tensors[name].copy_(stored, non_blocking=True)
            if number not in self.checked:
                self.check(number, tensors)
            if self.stream:
                ready = torch.cuda.Event()
                ready.record()
        return tensors, ready

    def check(self, number: int, tensors: dict[str, Tensor]) -> None:
        """ValueError that names the first tensor with NaN or Inf; a warning at the first block with zeros alone."""
        source, blank = self.parts[number].source, []
        for name, tensor in tensors.items():
            low, high = range_of(tensor)
            if not math.isfinite(high - low):
                raise ValueError(f"{source}.{name} holds NaN or Inf: the file is damaged, its training diverged, or "
                                 f"its values exceed {self.dtype}")
            if low == high == 0 and tensor.ndim > 1:
                blank.append(name)
        if blank and not self.warned:
            warnings.warn(f"{source}: {len(blank)} matrices hold zeros alone, such as {blank[0]}: not trained, or "
                          "its download did not end", stacklevel=2)
            self.warned = True
        self.checked.add(number)

    def from_file(self, number: int) -> Iterator[tuple[str, Tensor | InFP8]]:
        """(name, tensor) on the device, as it is stored."""
        part = {name: _in_file(tensor) for name, tensor in self.parts[number].items()}
        read = [tensor.read() for tensor in anew(dict(enumerate(chain(*part.values())))).values()]
        if self.stream:
            shapes = {k: (tensor.shape, tensor.dtype) for k, tensor in enumerate(read)}
            self.sent.synchronize()  # the pinned buffer is free again
            if self.pinned is None or self.pinned.numel() < _bytes(shapes):
                self.pinned = torch.empty(_bytes(shapes), dtype=torch.uint8, pin_memory=True)
            read = [view.copy_(read[k]) for k, view in _views(self.pinned, shapes)]
        rest = iter(read)
        for name, held in part.items():
            yield name, _stored(islice(rest, len(held)), self.device, self.fp8)
        if self.stream:
            self.sent.record()
