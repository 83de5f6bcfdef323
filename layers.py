"""What both transformers share: timestep embedding, attention, norms, GELU before a linear layer, initialisation.

Mirrors   sd3-ref `mmdit` and flux `modules.layers`; formulas and gradients are tested by tests/test_layers.py
Shapes    B batch · N tokens · H heads · D hidden_size
Memory    as two operations, a modulated LayerNorm also saves the normalised tokens for backward, and a GELU before a
          linear layer stores the widest activation of a block twice, in inference too: both are one operation here
Check     python -m pytest tests/test_layers.py
"""

import math
import re
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

M = TypeVar("M", bound=nn.Module)
FREQUENCIES = 256    # width of the timestep embedding before its MLP
NORM_EPS = 1e-6      # of every norm in both transformers
LARGE_MAP = 1 << 21  # elements: above this, backward computes the GELU again instead of storing its result


def patch_grid(height: int, width: int, patch: int) -> tuple[int, int]:
    """Rows and columns of patches of a latent; ValueError if the patch does not divide a side."""
    if height % patch or width % patch:
        raise ValueError(f"latent {height}x{width}: both sides must be multiples of the patch, {patch}")
    return height // patch, width // patch


def dtype_of(model: nn.Module) -> torch.dtype:
    """Dtype of the arithmetic: that of the first floating-point parameter, whichever module holds it."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def timestep_embedding(timestep: Tensor, width: int = FREQUENCIES, max_period: float = 10_000) -> Tensor:
    """1000·sigma (B,) -> (B, width): cosines, then sines, of geometrically spaced frequencies, in fp32."""
    index = torch.arange(width // 2, dtype=torch.float32, device=timestep.device)
    angles = timestep.float()[:, None] * torch.exp(-math.log(max_period) / (width // 2) * index)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention without a mask, (B, tokens, H, head_dim) each -> (B, tokens, H·head_dim)."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2).flatten(2)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm over the last axis, in the dtype of x, under autocast too."""
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), NORM_EPS)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """layer_norm(x)·(1 + scale) + shift for x (B, N, D): an affine LayerNorm per image; saves only x for backward."""
    weight, bias = (1 + scale).squeeze(1).to(x.dtype), shift.squeeze(1).to(x.dtype)        # (B, D)
    if len(x) == 1:
        return F.layer_norm(x, x.shape[-1:], weight[0], bias[0], NORM_EPS)
    return AffineNorm.apply(x, weight, bias)


class AffineNorm(torch.autograd.Function):
    """LayerNorm of each image with its own weight and bias, both (B, D)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out, stats = None, []
        for b in range(len(x)):
            y, *stat = torch.native_layer_norm(x[b], x.shape[-1:], weight[b], bias[b], NORM_EPS)
            out = y.new_empty(x.shape) if out is None else out
            out[b].copy_(y)
            stats += stat
        ctx.save_for_backward(x, weight, bias, *stats)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, bias, *stats = ctx.saved_tensors
        grads = tuple(torch.empty_like(t) for t in (x, weight, bias))
        for b in range(len(x)):
            x_b, weight_b, bias_b = (t[b].to(grad.dtype) for t in (x, weight, bias))
            parts = torch.ops.aten.native_layer_norm_backward(
                grad[b].contiguous(), x_b, x.shape[-1:], *stats[2 * b:2 * b + 2], weight_b, bias_b, [True] * 3)
            for complete, part in zip(grads, parts, strict=True):
                complete[b].copy_(part)
        return grads


def is_plain(*linears: nn.Module) -> bool:
    """Whether these linears have no hook, wrapper, own forward or quantised weight; else they must be called."""
    return not _has_any_global_hook() and all(
        type(m) is nn.Linear and "forward" not in vars(m) and not is_traceable_wrapper_subclass(m.weight)
        and not any((m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks))
        for m in linears)


def gelu_mlp(x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
    """second(gelu(first(x)))."""
    if is_plain(first, second):
        return gelu_linear(first(x), second.weight, second.bias)
    return second(F.gelu(first(x), approximate="tanh"))


def gelu_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """linear(gelu(hidden)), gelu in its tanh form; without gradients the gelu is written over `hidden`."""
    if not torch.is_grad_enabled():
        return F.linear(torch.ops.aten.gelu_(hidden, approximate="tanh"), weight, bias)
    return GELULinear.apply(hidden, weight, bias)


class GELULinear(torch.autograd.Function):
    """Where the result of the GELU is large, backward computes it again instead of storing it."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        active = F.gelu(hidden, approximate="tanh")
        ctx.save_for_backward(hidden, weight, active if hidden.numel() < LARGE_MAP else None)
        ctx.biased = bias is not None
        return F.linear(active, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        hidden, weight, active = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        for_hidden = torch.ops.aten.gelu_backward(grad @ weight.to(grad.dtype), hidden, approximate="tanh")
        if active is None or torch.is_grad_enabled():  # double backward needs the GELU in the graph
            active = F.gelu(hidden, approximate="tanh")
        for_weight = rows.T @ active.flatten(0, -2)
        return for_hidden, for_weight.to(weight.dtype), rows.sum(0).to(weight.dtype) if ctx.biased else None


def modulation(hidden_size: int, chunks: int) -> nn.Sequential:
    """adaLN's linear layer; SiLU(cond) is computed once outside, and Identity keeps the checkpoint's index 1."""
    return nn.Sequential(nn.Identity(), nn.Linear(hidden_size, chunks * hidden_size))


def add_mlp(x: Tensor, mlp: nn.Module, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
    return torch.addcmul(x, gate, mlp(modulated_norm(x, shift, scale)))


class FinalLayer(nn.Module):
    def __init__(self, hidden_size: int, outputs: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, outputs)
        self.adaLN_modulation = modulation(hidden_size, 2)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(cond)[:, None].chunk(2, dim=-1)
        return self.linear(modulated_norm(x, shift, scale))


def initialised(make: Callable[[], M], zeros: str, ones: str, normal: str, generator: torch.Generator) -> M:
    """The model that `make` builds, to train from scratch, initialised as DiT (appendix A) and SD3 are.

    zeros, ones, normal   patterns of parameter names; all others are Xavier-uniform, convolutions as linear layers
    """
    with torch.device("meta"):
        model = make()
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        if re.search(zeros, name):
            nn.init.zeros_(parameter)
        elif re.search(ones, name):
            nn.init.ones_(parameter)
        elif re.search(normal, name):
            nn.init.normal_(parameter, std=0.02, generator=generator)
        else:
            nn.init.xavier_uniform_(parameter.view(len(parameter), -1), generator=generator)
    return model
