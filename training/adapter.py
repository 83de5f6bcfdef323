"""A LoRA adapter under training: low-rank products beside linear layers whose weights are frozen.

Paper     LoRA (2106.09685): W x + B A x; alpha is r, so that nothing is scaled. A begins normal with deviation 1/r as
          PEFT's "gaussian", B at 0: a run begins from the model as it is. Minor components: URAE (2503.16322)
Layers    q, k, v, their output and the MLP of every block, in both streams; a stacked layer has one adapter
Ranks     every rank holds the adapter; the hand-written DDP averages its gradients, whether or not W is sharded
Check     python -m pytest tests/test_lora.py
"""

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import Device, Weights
from files import need
from lora import places

TENSORS = ("lora_A", "lora_B", "minor_A", "minor_B")
ADAPTED = re.compile(r"(joint|double|single)_blocks\.\d+\.(.*attn2?\.(qkv|proj)|.*mlp\.(fc1|fc2|0|2)|linear[12])")


class LoRALinear(nn.Linear):
    """W x + B A x in place of a linear layer; W stays as it is, under its official name.

    With minor components, W x + B A x - B_0 A_0 x: A and B begin as A_0 and B_0, the part of W that matters least.
    """

    def forward(self, x: Tensor) -> Tensor:
        added = F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        if self.minor_A is not None:
            added = added - F.linear(F.linear(x, self.minor_A.to(x.dtype)), self.minor_B.to(x.dtype))
        return super().forward(x) + added


def adapted(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that train.py adapts: q, k, v, their output and the MLP of every block, in both streams."""
    return {name: module for name, module in model.named_modules() if ADAPTED.fullmatch(name)}


def attach(model: nn.Module, rank: int, minor: bool, device: Device, dtype: torch.dtype) -> None:
    """Freeze a model and give its layers adapters, whose values are arbitrary yet."""
    model.requires_grad_(False)
    for layer in adapted(model).values():
        layer.__class__ = LoRALinear  # in place: parameters that FSDP has split stay where they are
        for side, shape in (("A", (rank, layer.in_features)), ("B", (layer.out_features, rank))):
            setattr(layer, f"lora_{side}", nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
            kept = torch.empty(shape, device=device, dtype=dtype) if minor else None
            layer.register_buffer(f"minor_{side}", kept)


@torch.no_grad()
def initialise(model: nn.Module, weights: Weights, seed: int) -> None:
    """Fill the adapters: A normal with deviation 1/r and B zero, as PEFT's "gaussian"; or minor components."""
    generator = torch.Generator().manual_seed(seed)
    for name, layer in adapted(model).items():
        down, up = torch.randn(layer.lora_A.shape, generator=generator) / len(layer.lora_A), torch.zeros(())
        if layer.minor_A is not None:
            most = min(layer.in_features, layer.out_features)
            need(len(down) <= most, "lora", len(down), f"a rank of at most {most}: {name} has no more minor components")
            down, up = minor_components(weights[f"{name}.weight"].read().to(layer.lora_A.device), len(down))
            layer.minor_A.copy_(down)
            layer.minor_B.copy_(up)
        layer.lora_A.copy_(down)
        layer.lora_B.copy_(up)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained: all, or those of an adapter."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model that a checkpoint holds: all, or those of an adapter."""
    state = model.state_dict()
    return {name: t for name, t in state.items() if name.endswith(TENSORS)} or state


def minor_components(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A, B of the product that the smallest singular directions of a matrix make up.

    From the eigenvectors of the smaller Gram matrix, in fp64: a complete SVD takes six times as long.
    """
    matrix = weight.double()
    if len(matrix) < matrix.shape[1]:
        minor = torch.linalg.eigh(matrix @ matrix.T)[1][:, :rank]  # in ascending order
        return minor.T @ matrix, minor
    minor = torch.linalg.eigh(matrix.T @ matrix)[1][:, :rank]
    return minor.T, matrix @ minor


def exported(tensors: Mapping[str, Tensor], weights: Weights) -> dict[str, Tensor]:
    """A trained adapter in the names of diffusers: a stacked layer becomes its parts, which share A.

    Minor components become one adapter of rank 2r, which adds B A - B_0 A_0 to the model as it is.
    """
    file = {}
    for name, (layer, first, last, _) in places(weights).items():
        if name == layer or f"{layer}.lora_A" not in tensors:
            continue
        down, up = tensors[f"{layer}.lora_A"], tensors[f"{layer}.lora_B"]
        if f"{layer}.minor_A" in tensors:
            down = torch.cat((down, tensors[f"{layer}.minor_A"]))
            up = torch.cat((up, -tensors[f"{layer}.minor_B"]), dim=1)
        file[f"transformer.{name}.lora_A.weight"] = down.clone()  # safetensors refuses shared memory
        file[f"transformer.{name}.lora_B.weight"] = up[first:last].clone()
    return file
