"""The model under training: its weights, recomputed activations, optimizer, moving average; latents of a batch.

Check     python -m pytest tests/test_train.py tests/test_plan.py
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

from checkpoint import Weights, fill
from family import Family
from flux import Flux, FluxConfig
from layers import blocks_of
from mmdit import MMDiT, MMDiTConfig
from training.adamw import RoundedAdamW
from training.adapter import attach, initialise, trained
from training.batches import Part
from training.ranks import rank, world
from training.settings import Settings
from vae import VAE, to_image

BETAS = (0.9, 0.999)


def recomputed(forward: Callable[..., Tensor], on_host: bool, *inputs: Tensor) -> Tensor:
    """A block whose activations are computed again in backward; its inputs stay, on the device or on the host."""
    with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()) if on_host else nullcontext():
        return checkpoint(forward, *inputs, use_reentrant=False)


def make(family: Family, config: MMDiTConfig | FluxConfig, activations: str, compiled: bool = False) -> MMDiT | Flux:
    """A transformer without weights; activations: "keep", "recompute" or "host"."""
    model = family.model(config)
    for block in blocks_of(model):  # on the instance, so that parameters keep their official names
        if compiled:
            block.forward = torch.compile(block.forward)
        if activations != "keep":
            block.forward = partial(recomputed, block.forward, activations == "host")
    return model


def build(settings: Settings, family: Family, config: MMDiTConfig | FluxConfig, weights: Weights, device: torch.device,
          shard: Callable[[nn.Module], None]) -> MMDiT | Flux:
    """The transformer with its weights, read after `shard` has split it: each rank then reads its own rows only."""
    with torch.device("meta"):
        model = make(family, config, settings.activations, settings.compile).to(settings.weight_dtype)
    home = torch.device("cpu") if settings.offload else device
    if settings.sharded:
        shard(model)
        model.to_empty(device=home)
    fill(model, weights, home, settings.weight_dtype)
    for module in model.modules():  # only the parameters of an offloaded model stay on the host
        module._buffers.update({name: buffer.to(device) for name, buffer in module._buffers.items()})
    if settings.lora:
        attach(model, settings.lora, settings.lora_init == "minor", device, settings.state_dtype)
        initialise(model, weights, settings.seed)
    return model


def new_optimizer(settings: Settings, model: nn.Module) -> torch.optim.Optimizer:
    parameters = trained(model).values()
    if settings.state == "bf16":
        seed = settings.seed + (rank() if settings.sharded and not settings.lora else 0)
        return RoundedAdamW(parameters, settings.lr, BETAS, settings.weight_decay, seed)
    return torch.optim.AdamW(parameters, settings.lr, BETAS, weight_decay=settings.weight_decay, fused=True)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class EMA:
    """Moving average of the weights in fp32; each rank averages its own rows. Empty where `decay` is 0."""

    def __init__(self, model: nn.Module, decay: float, on_host: bool):
        self.decay, self.model, self.copies = decay, model, {}
        if not decay:
            return
        mesh = init_device_mesh("cpu", (world(),)) if on_host and dist.is_initialized() else None
        for name, p in trained(model).items():
            if not on_host:
                copy = p.detach().to(torch.float32, copy=True)
            else:
                copy = local(p.detach()).to("cpu", torch.float32, copy=True)
                if isinstance(p, DTensor):
                    copy = DTensor.from_local(copy, mesh, [Shard(0)], run_check=False, shape=p.shape, stride=p.stride())
            self.copies[name] = copy

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step `step`, from 0; the decay rises from 0.1 to its value: the start is forgotten."""
        decay = min(self.decay, (step + 1) / (step + 10))
        if self.copies:
            for copy, p in zip(self.copies.values(), trained(self.model).values(), strict=True):  # no second fp32 model
                local(copy).lerp_(local(p).to(local(copy)), 1 - decay)


def autocast(settings: Settings) -> torch.autocast:
    """bf16 products of fp32 weights, for --dtype bf16; FSDP casts the weights by itself, and bf16 weights decide."""
    enabled = settings.dtype == "bf16" and not settings.sharded and settings.weight_dtype == torch.float32
    return torch.autocast(settings.device.partition(":")[0], torch.bfloat16, enabled=enabled)


@torch.no_grad()
def encode(vae: VAE, part: Part, settings: Settings) -> Tensor:
    """(B, 16, h, w), drawn from the posterior; one picture at a time: no latent depends on the split of the batch."""
    weight, drawn = next(vae.parameters()), []
    for k, generator in enumerate(part.generators):
        if part.moments:
            mean, logvar = (moment.to(weight.device) for moment in part.moments[k])
        else:  # bytes become numbers on the device
            image = to_image(part.images[k].to(weight.device))[None]
            mean, logvar = vae.moments(image.to(weight.dtype), settings.factor, settings.dilation)
        drawn.append(vae.draw(mean.float(), logvar.float(), generator))
    return torch.cat(drawn)
