"""What both transformers share: timestep embedding, attention, positions, norms, GELU before a linear, initialisation.

Mirrors   sd3-ref `mmdit` and flux `modules.layers`; formulas and gradients are tested by tests/test_layers.py
Shapes    B batch · N tokens · H heads · D hidden_size
Memory    as two operations, a modulated LayerNorm would keep the normalised tokens for backward, and a GELU before a
          linear layer would store the widest activation twice, in inference too. Here each pair is one operation
Sequence  the tokens of a sample may be divided among ranks, as in DeepSpeed Ulysses (arXiv 2309.14509), unevenly too
Check     python -m pytest tests/test_layers.py tests/test_sequence.py
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from checkpoint import Weights

M = TypeVar("M", bound=nn.Module)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v (B, tokens, H, head_dim) -> (B, tokens, H·head_dim)
FREQUENCIES = 256    # width of the timestep embedding before its MLP
NORM_EPS = 1e-6      # of every norm in both transformers
MOST_TRAINED = 1 << 16  # tokens of a trained side
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


def attend(q: Tensor, k: Tensor, v: Tensor, sharper: float = 1.0) -> Tensor:
    """Scaled dot-product attention without a mask, (B, tokens, H, head_dim) each -> (B, tokens, H·head_dim).

    sharper  factor of the logits, see `sharpening`
    """
    scale = None if sharper == 1 else sharper / q.shape[-1]**0.5
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)
    return out.transpose(1, 2).flatten(2)


# ---- sequence parallel: ranks of a group hold parts of the tokens, and attend over all of them in parts of the heads

def shares(count: int, ranks: int) -> list[int]:
    """`count` tokens or heads divided among ranks; the first ones have one more where it does not divide."""
    return [count // ranks + (rank < count % ranks) for rank in range(ranks)]


def check_ranks(ranks: int, heads: int, context: int, tokens: int) -> None:
    """ValueError if a rank would be without a head, or a token of text (context) or image (tokens)."""
    if ranks > (most := min(heads, context, tokens)):
        raise ValueError(f"{ranks} ranks for one picture: at most {most} can share {heads} heads, {context} tokens of "
                         f"text and {tokens} of the picture")


class Exchange(torch.autograd.Function):
    """Every rank sends part j of `axis` to rank j, and joins what it receives along `other`. Backward: axes swapped.

    parts    lengths into which `axis` is cut, one per rank
    lengths  of `other` on each rank, before the exchange
    """

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup, axis: int, parts: list[int], other: int, lengths: list[int],
                ) -> Tensor:
        ctx.back = group, other, lengths, axis, parts
        sent, shape = [part.flatten() for part in x.split(parts, axis)], list(x.shape)
        shape[axis], shape[other] = parts[group.rank()], 1
        sizes = [math.prod(shape) * length for length in lengths]
        received, shape[other] = x.new_empty(sum(sizes)), -1
        dist.all_to_all_single(received, torch.cat(sent), sizes, [len(part) for part in sent], group)
        return torch.cat([part.view(shape) for part in received.split(sizes)], other)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return Exchange.apply(grad, *ctx.back), *[None] * 5


def own_part(x: Tensor, group: dist.ProcessGroup | None, axis: int = 1) -> Tensor:
    """This rank's part of the tokens; all of them without a group."""
    return x.split(shares(x.shape[axis], group.size()), axis)[group.rank()] if group else x


def all_parts(x: Tensor, group: dist.ProcessGroup | None, count: int) -> Tensor:
    """All `count` tokens from each rank's part of them, (B, own, D) -> (B, count, D). Backward sums over the ranks."""
    if not group:
        return x
    ranks = group.size()
    return Exchange.apply(x.expand(ranks, *x.shape), group, 0, [1] * ranks, 2, shares(count, ranks))[0]


def attention(group: dist.ProcessGroup | None, context: int, tokens: int, sharper: float = 1.0) -> Attend:
    """The attention of a forward pass, with a group for ranks that hold parts of text and image.

    context, tokens  of the text and of the image, over all ranks
    """
    if not group:
        return partial(attend, sharper=sharper)
    of_text, of_image = shares(context, group.size()), shares(tokens, group.size())
    of_both = [sum(pair) for pair in zip(of_text, of_image, strict=True)]
    return partial(attend_in_group, group=group, lengths=(of_both, of_image), sharper=sharper)


def attend_in_group(q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup, lengths: Sequence[list[int]],
                    sharper: float) -> Tensor:
    """`attend` where q, k, v are of this rank's tokens: it gets all tokens of a part of the heads, and gives them back.

    lengths  tokens on each rank, of text and image and of the image alone; q decides
    """
    heads, tokens = shares(q.shape[2], group.size()), next(n for n in lengths if n[group.rank()] == q.shape[1])
    q, k, v = (Exchange.apply(x, group, 2, heads, 1, tokens) for x in (q, k, v))            # (B, all tokens, h, d)
    out = attend(q, k, v, sharper).unflatten(2, (-1, q.shape[3]))
    return Exchange.apply(out, group, 1, tokens, 2, heads).flatten(2)                       # (B, own tokens, H·d)


# ---- positions beyond the side that a model was trained with

@dataclass(frozen=True)
class Positions:
    """How places of a larger picture are described to a model that has seen smaller ones.

    rule  stock      as trained: places beyond the trained side are new to the model
          pi         interpolation: all places lie within the trained side
          ntk        high frequencies as trained, the lowest interpolated, the others between (a larger theta)
          yarn       as trained, ntk, or pi, by how many turns a frequency makes within the trained side
          resonance  yarn, with these turns rounded to whole ones first
    side  trained side, tokens; up to it every rule is stock
    Source  Diffusion-4K has no rule. ntk as in URAE and HiFlow, yarn as in the static form of DyPE's code, resonance as
            in UltraFlux's code, in which its paper's equation 8 does not occur
    """

    rule: str = "stock"
    side: int = 0

    def stretch(self, length: int) -> float:
        """How many times more tokens there are on an axis than in training; 1 within the trained side."""
        return 1.0 if self.rule == "stock" else max(1.0, length / self.side)


STOCK = Positions()
RULES = ("stock", "pi", "ntk", "yarn", "resonance")
# turns within the trained side between which a frequency goes from interpolated to ntk, and from that to as trained
TO_NTK, TO_TRAINED = (0.75, 1.25), (2, 16)


def reach(table_side: float, positions: Positions) -> float:
    """Most tokens on a side for which a table of positions suffices: interpolated places never leave it."""
    return math.inf if positions.rule == "pi" else table_side


def positions_of(weights: Weights) -> Positions:
    """What a transformer's metadata record; ValueError that names the file if it cannot be."""
    side = weights.number("trained_side", otherwise=0, integer=True)
    try:
        return check_positions(Positions(weights.metadata.get("positions", "stock")[:40], side))
    except ValueError as error:
        raise ValueError(f"{weights.source}: its metadata records {error}") from None


def check_positions(positions: Positions) -> Positions:
    """These positions, unchanged; ValueError if there is no such rule, or a rule lacks the trained side."""
    if positions.rule not in RULES:
        raise ValueError(f"positions {positions.rule!r}: the rules are {', '.join(RULES)}")
    if positions.rule != "stock" and not 1 <= positions.side <= MOST_TRAINED:
        raise ValueError(f"positions {positions.rule}: need the trained side, 1 to {MOST_TRAINED} tokens, not "
                         f"{positions.side}; 64 for Flux and SD3 as published (1024 px at factor 8)")
    return positions


def frequencies(dim: int, theta: float, positions: Positions, length: int, step: float = 1.0) -> Tensor:
    """Angle between neighbouring places for every channel pair of one axis, (dim/2,) fp64.

    theta   base of the frequencies: theta^(-2i/dim)
    length  tokens on this axis
    step    distance of neighbouring places as trained; SD3's table has 1/3
    """
    exponent = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    trained, stretch = theta**-exponent, positions.stretch(length)
    if stretch == 1:
        return step * trained
    span = positions.side * step                         # of the trained side
    if positions.rule == "resonance":
        turns = span * trained / math.tau
        trained = torch.where(turns >= 1, math.tau / span * turns.round(), trained)
        exponent = -trained.log() / math.log(theta)
    if positions.rule == "pi":
        return step * trained / stretch
    ntk = (theta * stretch**(dim / max(dim - 2, 1)))**-exponent
    if positions.rule == "ntk":
        return step * ntk

    def above(turns: tuple[float, float]) -> Tensor:
        """1 for the frequencies of more turns, 0 for those of fewer, a ramp between."""
        last, first = (dim * math.log(span / (n * math.tau)) / (2 * math.log(theta)) for n in turns)
        first, last = max(math.floor(first), 0), min(math.ceil(last), dim // 2)
        if last <= 0:  # no frequency turns so often
            return torch.zeros(dim // 2, dtype=torch.float64)
        width = last - first or 0.001
        return 1 - ((torch.arange(dim // 2, dtype=torch.float64) - first) / width).clamp(0, 1)

    mixed = torch.lerp(trained / stretch, ntk, above(TO_NTK))
    return step * torch.lerp(mixed, trained, above(TO_TRAINED))


def amplitude(positions: Positions, length: int) -> float:
    """Factor of the cosines and sines of an axis: yarn's remedy for attention that thins out over more tokens."""
    return 1 + 0.1 * math.log(positions.stretch(length)) if positions.rule in ("yarn", "resonance") else 1.0


def sharpening(positions: Positions, tokens: int, context: int) -> float:
    """Factor of the attention's logits: the remedy of the other rules, (ln N / ln N_trained)^½, at least 1.

    tokens, context  of the image and of the text; N is their sum
    """
    if positions.rule not in ("pi", "ntk") or tokens <= positions.side**2:
        return 1.0
    return (math.log(tokens + context) / math.log(positions.side**2 + context))**0.5


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm over the last axis, in the dtype of x; CUDA's autocast makes it fp32."""
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
    return all(is_bare(m, nn.Linear) and not is_traceable_wrapper_subclass(m.weight) for m in linears)


def is_bare(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of exactly this class, without hooks and a forward of its own."""
    return type(module) is kind and "forward" not in vars(module) and not _has_any_global_hook() and not any(
        (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


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


class Modulation(nn.Module):
    """adaLN's linear layer: shifts, scales and gates of a stream of tokens, from cond (B, D) after its SiLU.

    name  of the linear layer in the checkpoint
    """

    def __init__(self, hidden_size: int, chunks: int, name: str):
        super().__init__()
        self.chunks, self.name = chunks, name
        self.add_module(name, nn.Linear(hidden_size, chunks * hidden_size))

    def forward(self, cond: Tensor) -> tuple[Tensor, ...]:
        """`chunks` tensors (B, 1, D)."""
        return getattr(self, self.name)(cond)[:, None].chunk(self.chunks, dim=-1)


def add_mlp(x: Tensor, mlp: nn.Module, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
    return torch.addcmul(x, gate, mlp(modulated_norm(x, shift, scale)))


class FinalLayer(nn.Module):
    def __init__(self, hidden_size: int, outputs: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, outputs)
        self.adaLN_modulation = Modulation(hidden_size, 2, "1")

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        return self.linear(modulated_norm(x, *self.adaLN_modulation(cond)))


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


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer or of T5, in order."""
    return [block for child in model.children()
            for block in (child if isinstance(child, nn.ModuleList) else blocks_of(child))]
