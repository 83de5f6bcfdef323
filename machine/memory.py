"""What this machine has, and how much memory a computation takes.

Devices    --device, and the peak of what was held on it
Counted    peak_bytes runs code on tensors without storage (torch's FakeTensorMode) while live bytes are counted: so
           the plans of train.py and sample.py know activations before there is a weight or a GPU
Units      bytes, GiB where the name says so
Check      python -m pytest tests/test_memory.py
"""

import ctypes
import gc
import os
import sys
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from checkpoint import Device
from files import from_torchrun
from vae import VAE, VAEConfig

GIB = 1 << 30
UNKNOWN = 1 << 60  # bytes of a machine that does not tell
SMALL_MODEL = 100_000_000  # parameters: on a CPU, smaller ones run without a plan
T5_WIDTH = 4096            # of T5-XXL; the text encoders of narrower models are small


# ---- devices and their memory

def check_device(name: str | None) -> str:
    """The name of a --device, None being cuda where there is one; ValueError lists what this machine has instead."""
    cuda = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))] if torch.cuda.is_available() else []
    name = (cuda or ["cpu"])[0] if name is None else name
    if name not in (here := ["cpu", *cuda]):
        raise ValueError(f"--device {name}: this machine has {', '.join(here)}; "
                         "cuda needs an NVIDIA GPU and a torch built for it")
    return name


def device_of(name: str) -> torch.device:
    """The device that --device means on this rank: "cuda" is the card with this rank's number on its host.

    raises  ValueError if there is no such card
    """
    device = torch.device(name)
    if device.type == "cuda":
        index, cards = device.index, torch.cuda.device_count()
        if index is None:
            index = from_torchrun("LOCAL_RANK", 0)
        if index >= cards:
            raise ValueError(f"--device {name}: card {index} of {cards}, counted from 0; "
                             "give torchrun a smaller --nproc-per-node")
        device = torch.device("cuda", index)
    return device


def peak_memory_gib(device: Device) -> float:
    """Peak memory of this process, GiB: torch's allocations on a CUDA device, else the resident set; 0 on Windows."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    if sys.platform == "win32":
        return 0.0
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIB


def peak_shown(device: Device) -> str:
    """The peak in words; of a card also what torch's allocator reserved, which the card must have."""
    shown = f"peak {peak_memory_gib(device):.1f} GiB"
    if torch.device(device).type == "cuda":
        shown += f", {torch.cuda.max_memory_reserved(device) / GIB:.1f} reserved"
    return shown


def free_memory() -> None:
    """Return what deleted modules held: reference cycles keep some alive, and CUDA keeps freed blocks in a cache."""
    gc.collect()
    torch.cuda.empty_cache()


def return_freed_memory() -> None:
    """Make glibc return freed blocks from 1 MiB on to the system: of a decode at 4096 px it kept a third."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD


def host_memory() -> int:
    """Bytes that processes of this host may use: its memory, or less if a container or Slurm limits their cgroup."""
    if not hasattr(os, "sysconf"):  # Windows
        return UNKNOWN
    limits, groups = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")], Path("/proc/self/cgroup")
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, kind, path = line.split(":", 2)
        if kind in ("", "memory"):  # cgroups of version 2 and 1
            root, name = ("", "memory.max") if not kind else ("memory", "memory.limit_in_bytes")
            inner = Path("/sys/fs/cgroup", root, path.lstrip("/"))
            files = [folder / name for folder in (inner, *inner.parents) if (folder / name).is_file()]
            limits += [int(text) for text in (file.read_text().strip() for file in files) if text.isdigit()]
    return min(limits)


# ---- counting without memory

class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live storages other than parameters and gradients; `peak` is the most at one time."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            self.add(tensor.untyped_storage(), 0)
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.register_post_accumulate_grad_hook(self.forget)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if operator is torch.ops.aten.convolution.default:
            self.peak = max(self.peak, self.now + args[0].nbytes + 2 * result.nbytes)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        return result

    def add(self, storage: torch.UntypedStorage, size: int) -> None:
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.gone, storage._cdata)

    def gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def forget(self, parameter: nn.Parameter) -> None:
        key = parameter.grad.untyped_storage()._cdata
        self.now -= self.sizes[key]
        self.sizes[key] = 0


def peak_bytes(build: Callable[[], nn.Module], run: Callable[[nn.Module], object],
               dtype: torch.dtype = torch.float32) -> int:
    """Most live bytes, beside parameters and gradients, while run(build()) works on tensors without storage.

    dtype   of the parameters
    """
    before = torch.get_default_dtype()
    with FakeTensorMode():
        try:
            torch.set_default_dtype(dtype)
            model = build()
        finally:
            torch.set_default_dtype(before)
        with LiveBytes(model) as live:
            run(model)
    return live.peak


@cache
def vae_parameters(config: VAEConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in VAE(config).parameters())


@cache
def encoding_bytes(config: VAEConfig, dtype: torch.dtype, width: int, height: int, factor: int, dilation: int) -> int:
    """Of one picture, without gradients; width and height in pixels."""
    def run(vae: VAE) -> None:
        with torch.no_grad():
            vae.moments(torch.empty(1, 3, height, width, dtype=dtype), factor, dilation)

    return peak_bytes(lambda: VAE(config), run, dtype)


@cache
def decoding_bytes(config: VAEConfig, dtype: torch.dtype, width: int, height: int, factor: int) -> int:
    def run(vae: VAE) -> None:
        with torch.no_grad():
            latent = torch.empty(1, config.latent_channels, height // factor, width // factor, dtype=dtype)
            vae.decode(latent, factor)

    return peak_bytes(lambda: VAE(config), run, dtype)
