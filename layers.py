"""Two steps of a transformer block, written so that less is kept for backward: modulated LayerNorm, and GELU before a linear layer.

Both      are a formula each, said in its docstring; values and gradients are held to it by tests/test_lean.py
Why       a modulated LayerNorm as two operations keeps the normalised tokens beside the tokens; a GELU before a linear layer keeps
          the widest map of a block twice, which is felt without gradients too
Used by   mmdit.py and flux.py
Check     python -m pytest tests/test_lean.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-6      # of every norm in both transformers
LARGE_MAP = 1 << 21  # elements, from which memory counts more than a gelu


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """layer_norm(x)·(1 + scale) + shift for x (B, N, D): an affine LayerNorm for each image; of the maps, backward needs x alone."""
    weight, bias = (1 + scale).squeeze(1).to(x.dtype), shift.squeeze(1).to(x.dtype)        # (B, D)
    return F.layer_norm(x, x.shape[-1:], weight[0], bias[0], NORM_EPS) if len(x) == 1 else AffineNorm.apply(x, weight, bias)


class AffineNorm(torch.autograd.Function):
    """LayerNorm of every image with a weight and bias of its own."""

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
        for_x, for_weight, for_bias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
        for b in range(len(x)):
            given = [t[b].to(grad.dtype) for t in (x, weight, bias)]
            parts = torch.ops.aten.native_layer_norm_backward(
                grad[b].contiguous(), given[0], x.shape[-1:], *stats[2 * b:2 * b + 2], *given[1:], [True] * 3)
            for whole, part in zip((for_x, for_weight, for_bias), parts, strict=True):
                whole[b].copy_(part)
        return for_x, for_weight, for_bias


def gelu_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """linear(gelu(hidden)), gelu in its tanh form; without gradients the gelu is written over `hidden`."""
    if not torch.is_grad_enabled():
        return F.linear(torch.ops.aten.gelu_(hidden, approximate="tanh"), weight, bias)
    return GELULinear.apply(hidden, weight, bias)


class GELULinear(torch.autograd.Function):
    """The result of gelu is the widest map of a block: a large one is not kept for backward, but computed again."""

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
        active = F.gelu(hidden, approximate="tanh") if active is None else active
        for_weight = rows.T @ active.flatten(0, -2)
        return for_hidden, for_weight.to(weight.dtype), rows.sum(0).to(weight.dtype) if ctx.biased else None
