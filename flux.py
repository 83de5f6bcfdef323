"""Flux, the rectified-flow transformer: double blocks (two streams of weights, joint attention), then single blocks.

Paper     Diffusion-4K section 3.2 fine-tunes it, 12B parameters, on 256x256 latents
Mirrors   black-forest-labs/flux `model.Flux`, `modules.layers`, `math.rope`
Shapes    B batch · h w latent sides · N image tokens, hw/4 · L context tokens · T = L + N, text first
          D hidden_size · H heads of d = head_dim · C context width · P pooled width
Inputs    latent (B,16,h,w), sigma (B,) in [0,1], context (B,L,C), pooled (B,P), guidance (B,) about 3.5 -> (B,16,h,w)
Positions are computed, (0, 0, 0) for text and (0, row, column) for a patch. No table limits the size, but quality falls
          beyond the sizes trained at; layers.Positions has the rules for places there
Check     python -m pytest tests/test_flux.py: outputs equal the official ones to 1e-5
"""

import math
import os
import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import layers
from checkpoint import Device, Weights, filled, open_weights
from layers import STOCK, Attend, Positions

PATCH = 2
THETA = 10_000
AXES = (16, 56, 56)  # of head_dim 128: text index, row, column; other widths in proportion, unless recorded in the file


@dataclass(frozen=True)
class FluxConfig:
    """The default is flux1-dev, which is distilled on its guidance; flux1-schnell differs in having no such input."""

    hidden_size: int = 3072
    depth: int = 19
    depth_single: int = 38
    head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    context_dim: int = 4096
    pooled_dim: int = 768
    mlp_hidden: int = 12288
    guidance: bool = True
    axes_dim: tuple[int, ...] = AXES
    theta: float = THETA
    positions: Positions = STOCK
    table_side: ClassVar[float] = math.inf  # positions are computed

    @property
    def num_heads(self) -> int:
        return self.hidden_size // self.head_dim


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate adjacent channel pairs of x (B, T, H, d) by rope (T, d/2, 2), cosines and sines; product in fp32."""
    pairs, rope = x.float().unflatten(-1, (-1, 2)), rope[:, None]
    if torch.compiler.is_compiling():  # it fuses real products only; uncompiled they take nine times as long
        (a, b), (cos, sin) = pairs.unbind(-1), rope.unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope)).flatten(-2)


def axis_turns(length: int, dim: int, theta: float = THETA, device: Device | None = None,
               positions: Positions = STOCK) -> Tensor:
    """Rotations of the positions 0, 1, … along one axis: (length, dim/2, 2), cosines and sines, fp32."""
    # in fp64, cheap for one axis: fp32 would be 5e-6 off at position 255, bf16 wrong from 257 on
    frequencies = layers.frequencies(dim, theta, positions, length).to(device)
    angles = torch.outer(torch.arange(length, dtype=torch.float64, device=device), frequencies)
    modulus = torch.full_like(angles, layers.amplitude(positions, length))
    return torch.view_as_real(torch.polar(modulus, angles).to(torch.complex64))


class Scale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return layers.rms_norm(x.float(), self.scale)


class QKNorm(nn.Module):
    def __init__(self, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.query_norm, self.key_norm = Scale(head_dim), Scale(head_dim)

    def forward(self, qkv: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, 3D), thirds with the heads inside each -> q, k, v (B, T, H, d); q and k normalised and rotated."""
        q, k, v = qkv.unflatten(-1, (3, -1, self.head_dim)).unbind(2)
        return rotate(self.query_norm(q), rope).to(v.dtype), rotate(self.key_norm(k), rope).to(v.dtype), v


class SelfAttention(nn.Module):
    def __init__(self, config: FluxConfig):
        super().__init__()
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.norm = QKNorm(config.head_dim)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def heads(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.norm(self.qkv(x), rope)


class MLP(nn.Sequential):
    def __init__(self, config: FluxConfig):
        super().__init__(nn.Linear(config.hidden_size, config.mlp_hidden), nn.Identity(),
                         nn.Linear(config.mlp_hidden, config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return layers.gelu_mlp(x, self[0], self[2])


class DoubleBlock(nn.Module):
    def __init__(self, config: FluxConfig):
        super().__init__()
        self.img_mod, self.txt_mod = (layers.Modulation(config.hidden_size, 6, "lin") for _ in range(2))
        self.img_attn, self.txt_attn = SelfAttention(config), SelfAttention(config)
        self.img_mlp, self.txt_mlp = MLP(config), MLP(config)

    def forward(self, context: Tensor, x: Tensor, cond: Tensor, rope: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        length = context.shape[1]
        shift_c, scale_c, gate_c, *mlp_c = self.txt_mod(cond)
        shift_x, scale_x, gate_x, *mlp_x = self.img_mod(cond)
        of_context = self.txt_attn.heads(layers.modulated_norm(context, shift_c, scale_c), rope[:length])
        of_image = self.img_attn.heads(layers.modulated_norm(x, shift_x, scale_x), rope[length:])
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(of_context, of_image, strict=True))  # (B, T, H, d)
        del of_context, of_image  # they are as large as q, k, v
        out_c, out_x = attend(q, k, v).split((length, x.shape[1]), dim=1)                      # (B, L, D), (B, N, D)
        del q, k, v
        context = torch.addcmul(context, gate_c, self.txt_attn.proj(out_c))
        x = torch.addcmul(x, gate_x, self.img_attn.proj(out_x))
        return layers.add_mlp(context, self.txt_mlp, *mlp_c), layers.add_mlp(x, self.img_mlp, *mlp_x)


class SingleBlock(nn.Module):
    """Attention and MLP in parallel: linear1 stacks qkv and the MLP's first layer, linear2 takes their outputs."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.modulation = layers.Modulation(config.hidden_size, 3, "lin")
        self.linear1 = nn.Linear(config.hidden_size, 3 * config.hidden_size + config.mlp_hidden)
        self.linear2 = nn.Linear(config.hidden_size + config.mlp_hidden, config.hidden_size)
        self.norm = QKNorm(config.head_dim)
        self.parts = (3 * config.hidden_size, config.mlp_hidden), (config.hidden_size, config.mlp_hidden)

    def forward(self, x: Tensor, cond: Tensor, rope: Tensor, attend: Attend) -> Tensor:
        shift, scale, gate = self.modulation(cond)
        normed = layers.modulated_norm(x, shift, scale)                                        # (B, T, D)
        if layers.is_plain(self.linear1, self.linear2):
            return torch.addcmul(x, gate, self.in_parts(normed, rope, attend))
        qkv, mlp = self.linear1(normed).split(self.parts[0], dim=-1)
        both = torch.cat((attend(*self.norm(qkv, rope)), F.gelu(mlp, approximate="tanh")), dim=-1)
        return torch.addcmul(x, gate, self.linear2(both))

    def in_parts(self, normed: Tensor, rope: Tensor, attend: Attend) -> Tensor:
        """linear2(cat(attention, gelu(mlp))) by parts of the weights: no activation of width 7D or 5D is stored."""
        (qkv, mlp), (qkv_bias, mlp_bias) = (t.split(self.parts[0]) for t in (self.linear1.weight, self.linear1.bias))
        of_attention, of_mlp = self.linear2.weight.split(self.parts[1], dim=1)
        attention = attend(*self.norm(F.linear(normed, qkv, qkv_bias), rope))
        out = F.linear(attention, of_attention, self.linear2.bias)
        del attention
        return out + layers.gelu_linear(F.linear(normed, mlp, mlp_bias), of_mlp, None)


def embedder(width: int, hidden_size: int) -> nn.Sequential:
    first, second = nn.Linear(width, hidden_size), nn.Linear(hidden_size, hidden_size)
    return nn.Sequential(OrderedDict(in_layer=first, silu=nn.SiLU(), out_layer=second))


class Flux(nn.Module):
    def __init__(self, config: FluxConfig):
        super().__init__()
        self.config = config
        self.sequence: dist.ProcessGroup | None = None  # ranks that share the tokens of each sample
        self.img_in = nn.Linear(PATCH**2 * config.in_channels, config.hidden_size)
        self.txt_in = nn.Linear(config.context_dim, config.hidden_size)
        self.time_in = embedder(layers.FREQUENCIES, config.hidden_size)
        self.vector_in = embedder(config.pooled_dim, config.hidden_size)
        self.guidance_in = embedder(layers.FREQUENCIES, config.hidden_size) if config.guidance else None
        self.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.depth_single))
        self.final_layer = layers.FinalLayer(config.hidden_size, PATCH**2 * config.out_channels)

    @classmethod
    def load(cls, path: str | os.PathLike, device: Device = "cpu", dtype: torch.dtype | None = None,
             axes_dim: tuple[int, ...] | None = None, theta: float = THETA) -> "Flux":
        """Read a transformer from the official file or the diffusers folder; dtype, errors as in checkpoint.fill.

        axes_dim  channels of a head for text index, row, column; None: from the metadata, else 1/8, 7/16, 7/16
        """
        weights = open_weights(path).part("model.diffusion_model.")
        return filled(lambda: cls(read_config(weights, axes_dim, theta)), weights, device, dtype)

    def forward(self, latent: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor,
                guidance: Tensor | None = None) -> Tensor:
        """Predict the velocity, in the dtype of `latent`; the arithmetic is in the dtype of the weights.

        guidance  (B,), where the model is distilled on it (dev); None where it is not (schnell)
        raises    ValueError if guidance is missing or superfluous, or a side is odd
        """
        dtype, length = layers.dtype_of(self), context.shape[1]
        position = self.position(*latent.shape[-2:], latent.device)                            # (h/2, w/2, d/2, 2)
        of_text, of_image = position[0, :1].expand(length, -1, -1), position.flatten(0, 1)     # text at 0
        rope = torch.cat([layers.own_part(part, self.sequence, 0) for part in (of_text, of_image)])  # (T, d/2, 2)
        attend = layers.attention(self.sequence, length, len(of_image))
        sharper = layers.sharpening(self.config.positions, len(of_image), length)
        if sharper != 1:
            rope = rope * sharper**0.5                                                         # of q and of k
        x = rearrange(latent.to(dtype), "B c (h p) (w q) -> B (h w) (c p q)", p=PATCH, q=PATCH)
        x = self.img_in(layers.own_part(x, self.sequence))                                     # (B, N, D)
        context = self.txt_in(layers.own_part(context.to(dtype), self.sequence))               # (B, L, D)
        cond = self.condition(sigma, pooled, guidance)                                         # (B, D)
        for block in self.double_blocks:
            context, x = block(context, x, cond, rope, attend)
        length = context.shape[1]                                                              # of this rank
        x = torch.cat((context, x), dim=1)                                                     # (B, T, D)
        del context
        for block in self.single_blocks:
            x = block(x, cond, rope, attend)
        x = self.final_layer(x[:, length:], cond)                                              # (B, N, 4·16)
        h, w = position.shape[:2]
        x = layers.all_parts(x, self.sequence, h * w)
        return rearrange(x, "B (h w) (c p q) -> B c (h p) (w q)", h=h, w=w, p=PATCH, q=PATCH).to(latent.dtype)

    def condition(self, sigma: Tensor, pooled: Tensor, guidance: Tensor | None) -> Tensor:
        """What the modulations read, (B, D); ValueError if guidance is missing or superfluous."""
        if (guidance is None) == self.config.guidance:
            raise ValueError("this Flux is distilled on its guidance: give a number per image, about 3.5"
                             if guidance is None else "this Flux has no guidance_in (schnell): leave guidance None")
        dtype = layers.dtype_of(self)
        cond = self.time_in(layers.timestep_embedding(1000 * sigma.float()).to(dtype))
        cond = cond + self.vector_in(pooled.to(dtype))
        if guidance is not None:
            cond = cond + self.guidance_in(layers.timestep_embedding(1000 * guidance.float()).to(dtype))
        return F.silu(cond)

    def position(self, height: int, width: int, device: Device | None = None) -> Tensor:
        """Rotations of the patches of a latent, (height/2, width/2, d/2, 2); the text axis stays at 0."""
        h, w = layers.patch_grid(height, width, PATCH)
        none, rows, columns = (axis_turns(n, dim, self.config.theta, device, self.config.positions)
                               for n, dim in zip((1, h, w), self.config.axes_dim, strict=True))
        return torch.cat((none.expand(h, w, -1, -1), rows[:, None].expand(-1, w, -1, -1),
                          columns.expand(h, -1, -1, -1)), dim=-2)


def read_config(weights: Weights, axes_dim: tuple[int, ...] | None = None, theta: float = THETA) -> FluxConfig:
    """Read the sizes of a Flux from its tensors; ValueError that names one which is missing or impossible."""
    kind, linear1 = "Flux transformer", "single_blocks.0.linear1.weight"
    hidden_size = weights.common_size(".linear1.weight", 1, linear1, kind)
    mlp_hidden = weights.common_size(".linear1.weight", 0, linear1, kind) - 3 * hidden_size
    head_dim = weights.common_size(".query_norm.scale", 0, "single_blocks.0.norm.query_norm.scale", kind, axes=1)
    _, inputs = weights.shape_of("img_in.weight", 2, kind)
    outputs, _ = weights.shape_of("final_layer.linear.weight", 2, kind)
    weights.need(hidden_size % head_dim == 0, linear1, hidden_size, f"a multiple of {head_dim} columns")
    weights.need(inputs % PATCH**2 == 0, "img_in.weight", inputs, f"a multiple of {PATCH**2} columns")
    weights.need(outputs % PATCH**2 == 0, "final_layer.linear.weight", outputs, f"a multiple of {PATCH**2} rows")
    weights.need(mlp_hidden > 0, linear1, mlp_hidden + 3 * hidden_size, f"more than {3 * hidden_size} rows")
    weights.need(inputs == outputs, "img_in.weight", inputs, f"{outputs} columns: this model also takes a picture "
                 "(Fill 384, Canny and Depth 128 columns); give the plain one")
    return FluxConfig(
        hidden_size=hidden_size, depth=weights.depth("double_blocks."), depth_single=weights.depth("single_blocks."),
        head_dim=head_dim, in_channels=inputs // PATCH**2, out_channels=outputs // PATCH**2,
        context_dim=weights.shape_of("txt_in.weight", 2, kind)[1], mlp_hidden=mlp_hidden, theta=theta,
        pooled_dim=weights.shape_of("vector_in.in_layer.weight", 2, kind)[1],
        guidance=any(name.startswith("guidance_in.") for name in weights),
        axes_dim=axes_dim or read_axes(weights, head_dim), positions=layers.positions_of(weights))


def read_axes(weights: Weights, head_dim: int) -> tuple[int, ...]:
    """Channels of a head for text index, row and column: from the metadata, else AXES in proportion."""
    text = weights.metadata.get("axes_dim", weights.metadata.get("axes_dims_rope"))  # ours, or diffusers' config.json
    if text is None:
        axes = tuple(axis * head_dim // sum(AXES) for axis in AXES)
    else:
        three = re.fullmatch(r"[\[(]?(\d{1,6}), ?(\d{1,6}), ?(\d{1,6})[\])]?", text)
        axes = tuple(map(int, three.groups())) if three else ()
    if sum(axes) != head_dim or not all(axis > 0 and axis % 2 == 0 for axis in axes):
        shown = repr(text[:40]) if text else axes
        raise ValueError(f"{weights.source}: RoPE axes {shown} do not divide a head of {head_dim} into three even "
                         'parts; correct "axes_dim" in its metadata, or give axes_dim=')
    return axes


def new_flux(config: FluxConfig, generator: torch.Generator) -> Flux:
    """A model to train from scratch; every block begins as the identity."""
    return layers.initialised(lambda: Flux(config), zeros=r"bias$|_mod\.|\.modulation\.|^final_layer",
                              ones=r"\.scale$", normal="^(time|vector|guidance)_in", generator=generator)
