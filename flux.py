"""Flux, the rectified-flow transformer: double blocks (two streams of weights, joint attention), then single blocks on one stream.

Paper     Diffusion-4K section 3.2 fine-tunes it, 12B parameters, on 256x256 latents
Mirrors   black-forest-labs/flux `model.Flux`, `modules.layers`, `math.rope`, held by tests/test_flux.py to 1e-5
Shapes    B batch · h w latent sides · N image tokens, hw/4 · L context tokens · T = L + N, text first · D hidden_size
          H heads of d = head_dim · M mlp_hidden · C context width · P pooled width
Inputs    latent (B,16,h,w), sigma (B,) in [0,1], context (B,L,C), pooled (B,P), guidance (B,) about 3.5 -> velocity (B,16,h,w)
Inside    timestep and guidance times 1000; patches of 2x2 as tokens of 64, channel slowest; rotary positions

                hidden_size  depth  depth_single  head_dim  axes_dim    guidance
flux1-dev              3072     19            38       128  16, 56, 56  embedded: the model is distilled on it
flux1-schnell          3072     19            38       128  16, 56, 56  none
Positions are (0, 0, 0) for text and (0, row, column) for a patch; there is no table, so no side is too long.

Check     python -m pytest tests/test_flux.py
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from checkpoint import LazyTensor, fill, open_weights
from layers import NORM_EPS, gelu_linear, modulated_norm
from mmdit import FREQUENCIES, FinalLayer, add_mlp, attend, shape_of, timestep_embedding, usual_size

PATCH = 2
THETA = 10_000
AXES = (16, 56, 56)  # of head_dim 128: text index, row, column; other widths are cut in proportion unless the file says axes_dim


@dataclass(frozen=True)
class FluxConfig:
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
    table_side: ClassVar[float] = math.inf  # positions are computed


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels by the angle of its position: a product of complex numbers, in fp32.

    x        (B, T, H, d)
    rope     (T, d/2), complex, of modulus 1
    returns  (B, T, H, d), fp32
    """
    return torch.view_as_real(torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * rope[:, None]).flatten(-2)


def axis_turns(length: int, dim: int, theta: float = THETA, device: str | torch.device | None = None) -> Tensor:
    """Rotations of the positions 0, 1, … along one axis: (length, dim/2), complex64.

    Angles are in fp64, which costs nothing for one axis: fp32 would be 5e-6 off at position 255, bf16 wrong from 257 on.
    """
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float64, device=device), frequencies)
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


class Scale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))


class QKNorm(nn.Module):
    def __init__(self, head_dim: int):
        super().__init__()
        self.query_norm, self.key_norm = Scale(head_dim), Scale(head_dim)

    def forward(self, qkv: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, 3D), thirds with the heads inside each, -> q, k, v (B, T, H, d); q and k normalised, scaled, turned."""
        q, k, v = qkv.unflatten(-1, (3, -1, len(self.query_norm.scale))).unbind(2)
        q, k = (rotate(F.rms_norm(t.float(), t.shape[-1:], norm.scale.float(), NORM_EPS), rope).to(v.dtype)
                for t, norm in ((q, self.query_norm), (k, self.key_norm)))
        return q, k, v


class SelfAttention(nn.Module):
    def __init__(self, config: FluxConfig):
        super().__init__()
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.norm = QKNorm(config.head_dim)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def heads(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.norm(self.qkv(x), rope)


class Modulation(nn.Module):
    def __init__(self, hidden_size: int, chunks: int):
        super().__init__()
        self.chunks = chunks
        self.lin = nn.Linear(hidden_size, chunks * hidden_size)

    def forward(self, cond: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale, gate (and again for the MLP), (B, 1, D) each; cond comes with its SiLU applied, once for all blocks."""
        return self.lin(cond)[:, None].chunk(self.chunks, dim=-1)


class MLP(nn.Sequential):
    def __init__(self, config: FluxConfig):
        super().__init__(nn.Linear(config.hidden_size, config.mlp_hidden), nn.Identity(), nn.Linear(config.mlp_hidden, config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return gelu_linear(self[0](x), self[2].weight, self[2].bias)


class DoubleBlock(nn.Module):
    def __init__(self, config: FluxConfig):
        super().__init__()
        self.img_mod, self.txt_mod = Modulation(config.hidden_size, 6), Modulation(config.hidden_size, 6)
        self.img_attn, self.txt_attn = SelfAttention(config), SelfAttention(config)
        self.img_mlp, self.txt_mlp = MLP(config), MLP(config)

    def forward(self, context: Tensor, x: Tensor, cond: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        length = context.shape[1]
        shift_c, scale_c, gate_c, *mlp_c = self.txt_mod(cond)
        shift_x, scale_x, gate_x, *mlp_x = self.img_mod(cond)
        of_context = self.txt_attn.heads(modulated_norm(context, shift_c, scale_c), rope[:length])
        of_image = self.img_attn.heads(modulated_norm(x, shift_x, scale_x), rope[length:])
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(of_context, of_image, strict=True))   # (B, T, H, d)
        del of_context, of_image                                                                # they are as large as q, k, v
        out_c, out_x = attend(q, k, v).split((length, x.shape[1]), dim=1)                       # (B, L, D), (B, N, D)
        del q, k, v
        context = torch.addcmul(context, gate_c, self.txt_attn.proj(out_c))
        x = torch.addcmul(x, gate_x, self.img_attn.proj(out_x))
        return add_mlp(context, self.txt_mlp, *mlp_c), add_mlp(x, self.img_mlp, *mlp_x)


class SingleBlock(nn.Module):
    """Attention and MLP side by side: linear1 is qkv over the MLP's first layer, linear2 takes cat(attention, MLP).

    Both are used in their two parts, so that neither the 7D-wide nor the 5D-wide map is ever made.
    """

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.modulation = Modulation(config.hidden_size, 3)
        self.linear1 = nn.Linear(config.hidden_size, 3 * config.hidden_size + config.mlp_hidden)
        self.linear2 = nn.Linear(config.hidden_size + config.mlp_hidden, config.hidden_size)
        self.norm = QKNorm(config.head_dim)
        self.parts = (3 * config.hidden_size, config.mlp_hidden), (config.hidden_size, config.mlp_hidden)

    def forward(self, x: Tensor, cond: Tensor, rope: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(cond)
        normed = modulated_norm(x, shift, scale)                                                # (B, T, D)
        (qkv, mlp), (qkv_bias, mlp_bias) = self.linear1.weight.split(self.parts[0]), self.linear1.bias.split(self.parts[0])
        of_attention, of_mlp = self.linear2.weight.split(self.parts[1], dim=1)
        out = F.linear(attend(*self.norm(F.linear(normed, qkv, qkv_bias), rope)), of_attention, self.linear2.bias)
        out = out + gelu_linear(F.linear(normed, mlp, mlp_bias), of_mlp, None)
        return torch.addcmul(x, gate, out)


class Embedder(nn.Module):
    def __init__(self, width: int, hidden_size: int):
        super().__init__()
        self.in_layer, self.out_layer = nn.Linear(width, hidden_size), nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class Flux(nn.Module):
    def __init__(self, config: FluxConfig):
        super().__init__()
        self.config = config
        self.img_in = nn.Linear(PATCH**2 * config.in_channels, config.hidden_size)
        self.txt_in = nn.Linear(config.context_dim, config.hidden_size)
        self.time_in = Embedder(FREQUENCIES, config.hidden_size)
        self.vector_in = Embedder(config.pooled_dim, config.hidden_size)
        self.guidance_in = Embedder(FREQUENCIES, config.hidden_size) if config.guidance else None
        self.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.depth_single))
        self.final_layer = FinalLayer(config.hidden_size, PATCH**2 * config.out_channels)

    @classmethod
    def load(cls, path: str | os.PathLike, device: str | torch.device = "cpu", dtype: torch.dtype | None = None,
             axes_dim: tuple[int, ...] | None = None, theta: float = THETA) -> "Flux":
        """Read a transformer: the official file or the diffusers folder.

        dtype     compute dtype, whatever the storage; None is float32
        axes_dim  channels of a head for text index, row, column; None: what the metadata or config.json says, else 1/8, 7/16, 7/16
        raises    ValueError that names the tensors which are missing, unknown or misshapen
        """
        weights = open_weights(path).part("model.diffusion_model.")
        with torch.device("meta"):
            model = cls(read_config(weights, axes_dim, theta))
        fill(model, weights, device, dtype)
        return model

    def forward(self, latent: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor, guidance: Tensor | None = None) -> Tensor:
        """Predict the velocity of the flow; the arithmetic is in the dtype of the weights, the result in that of `latent`.

        guidance  (B,), where the model is distilled on it (dev); None where it is not (schnell)
        raises    ValueError on guidance too much or too little, on odd sides
        """
        if (guidance is None) == self.config.guidance:
            raise ValueError("this Flux is distilled on its guidance: give a number an image, about 3.5" if guidance is None else
                             "this Flux has no guidance_in (schnell): leave guidance None")
        dtype, length = self.img_in.weight.dtype, context.shape[1]
        position = self.position(*latent.shape[-2:])                                            # (h/2, w/2, d/2)
        rope = torch.cat((position.new_ones(length, position.shape[-1]), position.flatten(0, 1)))  # (T, d/2); text is not turned
        x = self.img_in(rearrange(latent.to(dtype), "B c (h p) (w q) -> B (h w) (c p q)", p=PATCH, q=PATCH))     # (B, N, D)
        context = self.txt_in(context.to(dtype))                                                # (B, L, D)
        cond = self.time_in(timestep_embedding(1000 * sigma.float()).to(dtype)) + self.vector_in(pooled.to(dtype))
        if guidance is not None:
            cond = cond + self.guidance_in(timestep_embedding(1000 * guidance.float()).to(dtype))
        cond = F.silu(cond)                                                                     # (B, D)
        for block in self.double_blocks:
            context, x = block(context, x, cond, rope)
        x = torch.cat((context, x), dim=1)                                                      # (B, T, D)
        del context
        for block in self.single_blocks:
            x = block(x, cond, rope)
        x = self.final_layer(x[:, length:], cond)                                               # (B, N, 4·16)
        h, w = position.shape[:2]
        return rearrange(x, "B (h w) (c p q) -> B c (h p) (w q)", h=h, w=w, p=PATCH, q=PATCH).to(latent.dtype)

    def position(self, height: int, width: int) -> Tensor:
        """What turns the patches of a latent: (height/2, width/2, d/2), complex; the text axis stays at 0, where nothing turns."""
        if height % PATCH or width % PATCH:
            raise ValueError(f"latent {height}x{width}: both sides must be multiples of the patch, {PATCH}")
        h, w = height // PATCH, width // PATCH
        none, rows, columns = (axis_turns(n, dim, self.config.theta, self.img_in.weight.device)
                               for n, dim in zip((1, h, w), self.config.axes_dim, strict=True))
        return torch.cat((none.expand(h, w, -1), rows[:, None].expand(-1, w, -1), columns.expand(h, -1, -1)), dim=-1)


def read_config(weights: Mapping[str, LazyTensor], axes_dim: tuple[int, ...] | None = None, theta: float = THETA) -> FluxConfig:
    """Read the sizes of a Flux from the shapes of its tensors, what shapes cannot say from the metadata.

    raises  ValueError that names the tensor if one which carries a size is missing or cannot be
    """
    source = getattr(weights, "source", "weights")
    shape, usual = partial(shape_of, weights, "Flux"), partial(usual_size, weights, "Flux")
    hidden_size = usual(".linear1.weight", 1, "single_blocks.0.linear1.weight")
    mlp_hidden = usual(".linear1.weight", 0, "single_blocks.0.linear1.weight") - 3 * hidden_size
    head_dim = usual(".query_norm.scale", 0, "single_blocks.0.norm.query_norm.scale", axes=1)
    inputs, outputs = shape("img_in.weight", 2)[1], shape("final_layer.linear.weight", 2)[0]
    for name, size, fits, rule in (
            ("single_blocks.0.linear1.weight", hidden_size, hidden_size % head_dim == 0, f"a multiple of {head_dim} columns"),
            ("img_in.weight", inputs, inputs % PATCH**2 == 0, f"a multiple of {PATCH**2} columns"),
            ("final_layer.linear.weight", outputs, outputs % PATCH**2 == 0, f"a multiple of {PATCH**2} rows")):
        if not fits:
            raise ValueError(f"{source}: {name} has {size}, expected {rule}")

    def depth(kind: str) -> int:
        return 1 + max((int(match[1]) for name in weights if (match := re.match(kind + r"\.(\d+)\.", name))), default=-1)

    return FluxConfig(
        hidden_size=hidden_size, depth=depth("double_blocks"), depth_single=depth("single_blocks"), head_dim=head_dim,
        in_channels=inputs // PATCH**2, out_channels=outputs // PATCH**2, context_dim=shape("txt_in.weight", 2)[1],
        pooled_dim=shape("vector_in.in_layer.weight", 2)[1], mlp_hidden=mlp_hidden, theta=theta,
        guidance=any(name.startswith("guidance_in.") for name in weights),
        axes_dim=axes_dim or read_axes(getattr(weights, "metadata", {}), head_dim, source))


def read_axes(said: Mapping[str, str], head_dim: int, source: str) -> tuple[int, ...]:
    """Channels of a head for text index, row and column: what the file says, else AXES in proportion."""
    text = said.get("axes_dim", said.get("axes_dims_rope", ""))  # ours, or of a diffusers config.json
    axes = tuple(map(int, re.findall(r"\d+", text))) or tuple(axis * head_dim // sum(AXES) for axis in AXES)
    if len(axes) != 3 or sum(axes) != head_dim or any(axis % 2 for axis in axes):
        raise ValueError(f"{source}: RoPE axes {axes} do not cut a head of {head_dim} into three even parts; "
                         'its metadata should say "axes_dim", or give axes_dim=')
    return axes


def new_flux(config: FluxConfig, generator: torch.Generator) -> Flux:
    """A model to train from the start, initialised as DiT and SD3 are: every block begins as the identity.

    source  DiT appendix A, `initialize_weights`
    """
    with torch.device("meta"):
        model = Flux(config)
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "_mod." in name or ".modulation." in name or name.startswith("final_layer"):
            nn.init.zeros_(parameter)
        elif name.endswith(".scale"):
            nn.init.ones_(parameter)
        elif name.startswith(("time_in", "vector_in", "guidance_in")):
            nn.init.normal_(parameter, std=0.02, generator=generator)
        else:
            nn.init.xavier_uniform_(parameter, generator=generator)
    return model
