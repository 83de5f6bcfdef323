"""MMDiT, the transformer of SD3 and SD3.5: context and image tokens have their own weights and meet in every attention.

Paper     Diffusion-4K section 3.2 fine-tunes it on 256x256 latents; the architecture is SD3's (2403.03206), figure 2
Mirrors   sd3-ref `mmdit.MMDiT` and sd3.5 `mmditx.MMDiTX` (qk_norm, dual attention)
Shapes    B batch · h w latent sides · p patch · N image tokens, hw/p² · L context tokens · D hidden_size
          H heads of 64 · C context width · P pooled width
Inputs    latent (B,16,h,w), sigma (B,) in [0,1], context (B,L,C), pooled (B,P) -> velocity (B,16,h,w)
Check     python -m pytest tests/test_mmdit.py: outputs equal the official ones to 1e-5
              hidden_size   depth   table_side   qk_norm   dual_attention
SD3-medium           1536      24          192   no        none
SD3.5-medium         1536      24          384   yes       blocks 0-12
SD3.5-large          2432      38          192   yes       none
"""

import math
import os
import re
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import layers
from checkpoint import Device, Weights, filled, open_weights
from layers import STOCK, Attend, Positions

THETA = 10_000   # of the position table
CUBIC_A = -0.75  # the parameter a of Keys' cubic kernel, as in torch and OpenCV
HEAD_DIM = 64    # of every published MMDiT: num_heads = hidden_size / 64


@dataclass(frozen=True)
class MMDiTConfig:
    hidden_size: int = 1536
    depth: int = 24
    patch_size: int = 2
    in_channels: int = 16
    out_channels: int = 16
    context_dim: int = 4096
    pooled_dim: int = 2048
    table_side: int = 192
    mlp_hidden: int = 6144
    qk_norm: bool = False
    dual_attention: tuple[int, ...] = ()  # blocks with a second attention, among image tokens only
    positions: Positions = STOCK

    @property
    def num_heads(self) -> int:
        return self.hidden_size // HEAD_DIM


def sincos_table(hidden_size: int, side: int, base: float | None = None, offset: float = 0.0) -> Tensor:
    """Position table of a side x side grid for a new model; published models bring their own.

    base     positions run from 0 to base in `side` steps (SD3: base 64, side 192, steps of 1/3); None: base = side
    returns  (side², hidden_size), row by row; channels: column sines, column cosines, row sines, row cosines
    """
    quarter = hidden_size // 4
    omega = float(THETA) ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    position = torch.arange(side, dtype=torch.float64) * ((base or side) / side) + offset
    angles = torch.outer(position, omega)
    waves = torch.cat((angles.sin(), angles.cos()), dim=1)
    return torch.cat((waves.repeat(side, 1), waves.repeat_interleave(side, 0)), dim=1).float()


class QKNorm(nn.RMSNorm):  # with the eps of layers.NORM_EPS, not its own
    def forward(self, x: Tensor) -> Tensor:
        return layers.rms_norm(x, self.weight)


class Attention(nn.Module):
    def __init__(self, config: MMDiTConfig, proj: bool = True):
        super().__init__()
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        if proj:
            self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.ln_q, self.ln_k = (QKNorm(HEAD_DIM) for _ in range(2))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, N, H, 64) each; qkv has q, k, v as thirds of its rows and the heads inside each third."""
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, HEAD_DIM)).unbind(2)
        return (self.ln_q(q), self.ln_k(k), v) if self.qk_norm else (q, k, v)


class MLP(nn.Module):
    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.mlp_hidden)
        self.fc2 = nn.Linear(config.mlp_hidden, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return layers.gelu_mlp(x, self.fc1, self.fc2)


def embedder(width: int, hidden_size: int) -> nn.Sequential:
    mlp = nn.Sequential(nn.Linear(width, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
    return nn.Sequential(OrderedDict(mlp=mlp))


class PatchConv(nn.Conv2d):
    """Patch embedding, a convolution whose kernel is its stride, computed as a linear layer; channels-last."""

    def forward(self, latent: Tensor) -> Tensor:
        p = self.kernel_size[0]
        patches = rearrange(latent, "B c (h p) (w q) -> B h w (c p q)", p=p, q=p)
        return F.linear(patches, self.weight.flatten(1), self.bias).movedim(-1, 1)         # (B, D, h/p, w/p)


# Modulation of a stream in a block, (B, 1, D) each. Most streams have the first 6, the context of the last block the
# first 2, the image of a block with two attentions all 9
Chunks = namedtuple("Chunks", "shift scale gate shift_mlp scale_mlp gate_mlp shift_2 scale_2 gate_2", defaults=[None]*7)


class StreamBlock(nn.Module):
    """Weights of one stream, context or image; the last block reads the context but does not write it."""

    def __init__(self, config: MMDiTConfig, dual: bool = False, read_only: bool = False):
        super().__init__()
        self.adaLN_modulation = layers.Modulation(config.hidden_size, 9 if dual else 2 if read_only else 6, "1")
        self.attn = Attention(config, proj=not read_only)
        if dual:
            self.attn2 = Attention(config)
        if not read_only:
            self.mlp = MLP(config)


class JointBlock(nn.Module):
    def __init__(self, config: MMDiTConfig, index: int):
        super().__init__()
        self.read_only, self.dual = index == config.depth - 1, index in config.dual_attention
        self.context_block = StreamBlock(config, read_only=self.read_only)
        self.x_block = StreamBlock(config, dual=self.dual)

    def forward(self, context: Tensor, x: Tensor, cond: Tensor, attend: Attend) -> tuple[Tensor | None, Tensor]:
        """Joint attention of context and x, in dual blocks a second one of x alone, an MLP per stream.

        returns  context, None from the last block, and x
        """
        mod_c, mod_x = (Chunks(*stream.adaLN_modulation(cond)) for stream in (self.context_block, self.x_block))
        of_context = self.context_block.attn.heads(layers.modulated_norm(context, mod_c.shift, mod_c.scale))
        of_image = self.x_block.attn.heads(layers.modulated_norm(x, mod_x.shift, mod_x.scale))  # (B, N, H, 64) q, k, v
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(of_context, of_image, strict=True))
        del of_context, of_image  # they are as large as q, k, v
        lengths = context.shape[1], x.shape[1]
        out_c, out_x = attend(q, k, v).split(lengths, dim=1)                               # (B, L, D), (B, N, D)
        del q, k, v
        attended = torch.addcmul(x, mod_x.gate, self.x_block.attn.proj(out_x))             # (B, N, D)
        if self.dual:
            attn2 = self.x_block.attn2
            qkv = attn2.heads(layers.modulated_norm(x, mod_x.shift_2, mod_x.scale_2))
            attended = torch.addcmul(attended, mod_x.gate_2, attn2.proj(attend(*qkv)))
            del qkv
        x = layers.add_mlp(attended, self.x_block.mlp, mod_x.shift_mlp, mod_x.scale_mlp, mod_x.gate_mlp)
        if self.read_only:
            return None, x
        context = torch.addcmul(context, mod_c.gate, self.context_block.attn.proj(out_c))  # (B, L, D)
        return layers.add_mlp(context, self.context_block.mlp, mod_c.shift_mlp, mod_c.scale_mlp, mod_c.gate_mlp), x


class MMDiT(nn.Module):
    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.config = config
        self.sequence: dist.ProcessGroup | None = None  # ranks that share the tokens of each sample
        self.register_buffer("pos_embed", torch.zeros(1, config.table_side**2, config.hidden_size))
        self.axes: dict[tuple, Tensor] = {}  # what `resampled` gave
        conv = PatchConv(config.in_channels, config.hidden_size, config.patch_size, config.patch_size)
        self.x_embedder = nn.ModuleDict({"proj": conv})
        self.t_embedder = embedder(layers.FREQUENCIES, config.hidden_size)
        self.y_embedder = embedder(config.pooled_dim, config.hidden_size)
        self.context_embedder = nn.Linear(config.context_dim, config.hidden_size)
        self.joint_blocks = nn.ModuleList(JointBlock(config, index) for index in range(config.depth))
        self.final_layer = layers.FinalLayer(config.hidden_size, config.patch_size**2 * config.out_channels)

    @classmethod
    def load(cls, path: str | os.PathLike, device: Device = "cpu", dtype: torch.dtype | None = None) -> "MMDiT":
        """Read a transformer from the official file or the diffusers folder; dtype, errors as in checkpoint.fill."""
        weights = open_weights(path).part("model.diffusion_model.")
        return filled(lambda: cls(read_config(weights)), weights, device, dtype)

    def forward(self, latent: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor,
                guidance: Tensor | None = None) -> Tensor:
        """Predict the velocity, in the dtype of `latent`; the arithmetic is in the dtype of the weights.

        guidance  None: SD3 is guided by a second pass (cfg); only Flux takes the number
        raises    ValueError if guidance is given, the patch does not divide a side, or the latent exceeds the table
        """
        dtype, p = layers.dtype_of(self), self.config.patch_size
        position = self.position(*latent.shape[-2:])                                       # (h/p, w/p, D)
        x = self.x_embedder.proj(latent.to(dtype)).movedim(1, -1)                          # (B, h/p, w/p, D)
        x, length = (x + position.to(dtype)).flatten(1, 2), context.shape[1]               # (B, N, D)
        sharper = layers.sharpening(self.config.positions, x.shape[1], length)
        attend = layers.attention(self.sequence, length, x.shape[1], sharper)
        x = layers.own_part(x, self.sequence)
        context = self.context_embedder(layers.own_part(context.to(dtype), self.sequence)) # (B, L, D)
        cond = self.condition(sigma, pooled, guidance)                                     # (B, D)
        for block in self.joint_blocks:
            context, x = block(context, x, cond, attend)
        x = self.final_layer(x, cond)                                                      # (B, N, p²·16)
        h, w = position.shape[:2]
        x = layers.all_parts(x, self.sequence, h * w)
        return rearrange(x, "B (h w) (p q c) -> B c (h p) (w q)", h=h, w=w, p=p, q=p).to(latent.dtype)

    def condition(self, sigma: Tensor, pooled: Tensor, guidance: Tensor | None) -> Tensor:
        """What the modulations read, (B, D); ValueError if guidance is given."""
        if guidance is not None:
            raise ValueError("guidance is an input of Flux-dev; SD3 has none: use cfg (two passes), no guidance")
        dtype = layers.dtype_of(self)
        time = self.t_embedder(layers.timestep_embedding(1000 * sigma.float()).to(dtype))
        return F.silu(time + self.y_embedder(pooled.to(dtype)))

    def position(self, height: int, width: int) -> Tensor:
        """Position embeddings, (height/p, width/p, D): the centre of the table, a view; beyond the trained side, the
        table read at the places that config.positions gives."""
        side, p = self.config.table_side, self.config.patch_size
        h, w = layers.patch_grid(height, width, p)
        if max(self.config.positions.stretch(n) for n in (h, w)) > 1:
            rows, columns = (self.axis(n) for n in (h, w))
            return torch.cat((columns.expand(h, -1, -1), rows[:, None].expand(-1, w, -1)), dim=-1)
        if max(h, w) > side:
            raise ValueError(f"latent {height}x{width} exceeds this model's position table: a side can have "
                             f"{side * p}, which is {side * p * 8} px at factor 8 and {side * p * 16} px at factor 16")
        top, left = (side - h) // 2, (side - w) // 2
        return self.pos_embed.view(side, side, -1)[top:top + h, left:left + w]

    def axis(self, length: int) -> Tensor:
        """`resampled`, computed once, as it waits for the device; the table does not change after loading."""
        key = length, self.config.positions, self.pos_embed.device, self.pos_embed.dtype
        if key not in self.axes:
            self.axes[key] = self.resampled(length)
        return self.axes[key]

    def resampled(self, length: int) -> Tensor:
        """One axis of the table, (length, D/2), at the places that config.positions gives to each channel.

        The two axes of SD3's table are alike: sines, then cosines, of geometrically spaced frequencies. Each channel is
        read at its own places, around the centre, by cubic interpolation.
        """
        side, dim = self.config.table_side, self.config.hidden_size // 2
        if self.pos_embed.is_meta or isinstance(self.pos_embed, FakeTensor):               # memory is counted
            return self.pos_embed.new_empty(length, dim)
        table = self.pos_embed.view(side, side, -1)[0, :, :dim].double()                   # (side, D/2), along a row
        sine, cosine = table[side // 2 - 1:side // 2 + 1, [0, dim // 2]].T                 # of the first frequency, 1
        step = torch.atan2(sine[1] * cosine[0] - cosine[1] * sine[0], cosine[1] * cosine[0] + sine[1] * sine[0])
        stock, own = (layers.frequencies(dim, THETA, positions, length, float(step)) for positions
                      in (STOCK, self.config.positions))
        trained = self.config.positions.side
        centre = (side - trained) // 2 + trained / 2
        offsets = torch.arange(length, dtype=torch.float64) - length / 2
        places = centre + torch.outer(offsets, own / stock)                                # (length, D/4)
        places = places.repeat(1, 2).to(table.device)
        if places.min() < 0 or places.max() > side - 1:
            raise ValueError(f"positions {self.config.positions.rule}: {length} tokens reach beyond the position table "
                             f"of {side}; take pi")
        resampled = cubic(table, places) * layers.amplitude(self.config.positions, length)
        return resampled.to(self.pos_embed.dtype)


def cubic(table: Tensor, places: Tensor) -> Tensor:
    """Channel k of a table (side, K) at places[:, k], (n, K), by Keys' cubic interpolation; the ends are repeated."""
    low = places.floor()
    total, side = torch.zeros_like(places), len(table)
    for tap in (-1, 0, 1, 2):
        x = (places - low - tap).abs()                                                     # distance, in [0, 2]
        near, far = ((CUBIC_A + 2) * x - (CUBIC_A + 3)) * x**2 + 1, ((x - 5) * x + 8) * x - 4
        index = (low.long() + tap).clamp(0, side - 1)
        total += torch.where(x <= 1, near, CUBIC_A * far) * table.gather(0, index)
    return total


def read_config(weights: Weights) -> MMDiTConfig:
    """Read the sizes of an MMDiT from its tensors; ValueError that names one which is missing or impossible."""
    kind, qkv = "SD3 transformer", "joint_blocks.0.x_block.attn.qkv.weight"
    hidden_size = weights.common_size(".attn.qkv.weight", 1, qkv, kind)
    _, in_channels, patch, _ = weights.shape_of("x_embedder.proj.weight", 4, kind)
    outputs, _ = weights.shape_of("final_layer.linear.weight", 2, kind)
    _, cells, _ = weights.shape_of("pos_embed", 3, kind)
    weights.need(hidden_size % HEAD_DIM == 0, qkv, hidden_size, f"a multiple of {HEAD_DIM} columns")
    weights.need(outputs % patch**2 == 0, "final_layer.linear.weight", outputs, f"a multiple of {patch**2} rows")
    weights.need(math.isqrt(cells)**2 == cells, "pos_embed", cells, "a square number of positions")
    weights.need(in_channels * patch**2 == outputs, "x_embedder.proj.weight", in_channels, f"{outputs // patch**2} "
                 "channels: this model also takes a picture (inpainting, editing); give the plain one")
    dual = (re.match(r"joint_blocks\.(\d+)\.x_block\.attn2\.", name) for name in weights)
    return MMDiTConfig(
        hidden_size=hidden_size, depth=weights.depth("joint_blocks."), patch_size=patch, in_channels=in_channels,
        out_channels=outputs // patch**2, context_dim=weights.shape_of("context_embedder.weight", 2, kind)[1],
        pooled_dim=weights.shape_of("y_embedder.mlp.0.weight", 2, kind)[1], table_side=math.isqrt(cells),
        mlp_hidden=weights.common_size(".mlp.fc1.weight", 0, "joint_blocks.0.x_block.mlp.fc1.weight", kind),
        qk_norm=any(".attn.ln_q." in name for name in weights),
        dual_attention=tuple(sorted({int(block[1]) for block in dual if block})),
        positions=layers.positions_of(weights))


def new_mmdit(config: MMDiTConfig, generator: torch.Generator, base: float | None = None) -> MMDiT:
    """A model to train from scratch; every block begins as the identity. `base` is that of sincos_table."""
    model = layers.initialised(lambda: MMDiT(config), zeros=r"bias$|adaLN_modulation|^final_layer", ones=r"\.ln_",
                               normal="^[ty]_embedder", generator=generator)
    model.pos_embed.copy_(sincos_table(config.hidden_size, config.table_side, base))
    return model
