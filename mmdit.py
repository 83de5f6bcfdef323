"""MMDiT, the transformer of SD3 and SD3.5: context and image tokens in two streams of weights, joined in every attention.

Paper     Diffusion-4K section 3.2 fine-tunes it on 256x256 latents; the architecture is that of SD3 (2403.03206), figure 2
Mirrors   sd3-ref `mmdit.MMDiT` and sd3.5 `mmditx.MMDiTX` (qk_norm and dual attention), held by tests/test_mmdit.py to 1e-5
Shapes    B batch · h w latent sides · N image tokens, hw/p² · L context tokens · D hidden_size · H heads of 64
          C context width · P pooled width
Inputs    latent (B,16,h,w), sigma (B,) in [0,1], context (B,L,C), pooled (B,P) -> velocity (B,16,h,w)

              hidden_size   depth   table_side   qk_norm   dual_attention
SD3-medium           1536      24          192   no        none
SD3.5-medium         1536      24          384   yes       blocks 0-12
SD3.5-large          2432      38          192   yes       none
The side of the position table bounds the image: 192 patches are 3072 px at factor 8 and 6144 px at factor 16.

Check     python -m pytest tests/test_mmdit.py
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from statistics import mode

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from checkpoint import LazyTensor, fill, open_weights
from layers import NORM_EPS, gelu_linear, modulated_norm

HEAD_DIM = 64  # of every published MMDiT: num_heads = hidden_size / 64
FREQUENCIES = 256  # width of the timestep embedding before its MLP


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


def timestep_embedding(timestep: Tensor, width: int = FREQUENCIES, max_period: float = 10_000) -> Tensor:
    """Cosines, then sines, of geometrically spaced frequencies, in fp32.

    timestep  (B,), 1000·sigma
    returns   (B, width)
    """
    frequencies = torch.exp(-math.log(max_period) / (width // 2) * torch.arange(width // 2, dtype=torch.float32, device=timestep.device))
    angles = timestep.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention without a mask, (B, tokens, H, head_dim) each -> (B, tokens, H·head_dim)."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2).flatten(2)


def sincos_table(hidden_size: int, side: int, base: float | None = None, offset: float = 0.0) -> Tensor:
    """Position table of a side x side grid, to create models with; published ones bring theirs.

    base     positions are divided by side/base: 64 with side 192 gives SD3's, whose steps are a third; None leaves 0, 1, 2 …
    offset   added to the positions after that
    returns  (side², hidden_size), row by row; channels: column sines, column cosines, row sines, row cosines
    """
    quarter = hidden_size // 4
    omega = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    position = torch.arange(side, dtype=torch.float64) * ((base or side) / side) + offset
    angles = torch.outer(position, omega)
    waves = torch.cat((angles.sin(), angles.cos()), dim=1)
    return torch.cat((waves.repeat(side, 1), waves.repeat_interleave(side, 0)), dim=1).float()


def stretched(table: Tensor, scale: float) -> Tensor:
    """A position table whose places lie `scale` times closer together, so that a model trained at one size begins at another
    with the layout that it knows.

    table    (1, side², hidden_size), row by row
    scale    4 to go from 256 to 1024 px; the places around the centre stay there
    returns  like `table`, between its places by cubic interpolation
    source   SD3 section 5.3.2, "extended and interpolated position grids"
    """
    side = math.isqrt(table.shape[1])
    places = torch.linspace(-1, 1, side, device=table.device) / scale                     # of the new table in the old one
    grid = torch.stack(torch.meshgrid(places, places, indexing="xy"), dim=-1)             # (side, side, 2): column, row
    old = rearrange(table.float(), "b (h w) d -> b d h w", h=side)
    new = F.grid_sample(old, grid[None], mode="bicubic", align_corners=True)
    return rearrange(new, "b d h w -> b (h w) d").to(table.dtype)


class Attention(nn.Module):
    def __init__(self, config: MMDiTConfig, proj: bool = True):
        super().__init__()
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        if proj:
            self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        if config.qk_norm:
            self.ln_q = nn.RMSNorm(HEAD_DIM, eps=NORM_EPS)
            self.ln_k = nn.RMSNorm(HEAD_DIM, eps=NORM_EPS)
        self.qk_norm = config.qk_norm

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, HEAD_DIM)).unbind(2)  # thirds of the rows, heads inside each third
        if self.qk_norm:  # in the dtype of q and k, under autocast too
            q, k = (F.rms_norm(t, (HEAD_DIM,), norm.weight.to(t.dtype), NORM_EPS) for t, norm in ((q, self.ln_q), (k, self.ln_k)))
        return q, k, v


class MLP(nn.Module):
    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.mlp_hidden)
        self.fc2 = nn.Linear(config.mlp_hidden, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return gelu_linear(self.fc1(x), self.fc2.weight, self.fc2.bias)


class Embedder(nn.Module):
    def __init__(self, width: int, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class Patches(nn.Module):
    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, config.patch_size, config.patch_size)

    def forward(self, latent: Tensor) -> Tensor:
        """The convolution as the linear that it is: its result is (B, h/p, w/p, D) in this very memory order."""
        p = self.proj.kernel_size[0]
        return F.linear(rearrange(latent, "B c (h p) (w q) -> B h w (c p q)", p=p, q=p), self.proj.weight.flatten(1), self.proj.bias)


def modulation(hidden_size: int, chunks: int) -> nn.Sequential:
    # cond comes with its SiLU applied, once for all blocks; index 1 is the place the checkpoint gives the linear
    return nn.Sequential(nn.Identity(), nn.Linear(hidden_size, chunks * hidden_size))


class StreamBlock(nn.Module):
    """The weights of one stream, context or image; the last block reads the context but does not write it."""

    def __init__(self, config: MMDiTConfig, dual: bool = False, read_only: bool = False):
        super().__init__()
        self.chunks = 9 if dual else 2 if read_only else 6
        self.adaLN_modulation = modulation(config.hidden_size, self.chunks)
        self.attn = Attention(config, proj=not read_only)
        if dual:
            self.attn2 = Attention(config)
        if not read_only:
            self.mlp = MLP(config)

    def chunks_of(self, cond: Tensor) -> tuple[Tensor, ...]:
        return self.adaLN_modulation(cond)[:, None].chunk(self.chunks, dim=-1)  # (B, 1, D) each


class JointBlock(nn.Module):
    def __init__(self, config: MMDiTConfig, index: int):
        super().__init__()
        self.context_block = StreamBlock(config, read_only=index == config.depth - 1)
        self.x_block = StreamBlock(config, dual=index in config.dual_attention)

    def forward(self, context: Tensor, x: Tensor, cond: Tensor) -> tuple[Tensor | None, Tensor]:
        """Joint attention, then (dual blocks) attention among the image alone, then the MLPs; chunks of cond are (B, 1, D)."""
        shift_c, scale_c, *of_writer = self.context_block.chunks_of(cond)                  # empty in the last block
        shift_x, scale_x, gate_x, *mlp_x = self.x_block.chunks_of(cond)
        mlp_x, dual = mlp_x[:3], mlp_x[3:]                                                 # shift, scale, gate each
        of_context = self.context_block.attn.heads(modulated_norm(context, shift_c, scale_c))
        of_image = self.x_block.attn.heads(modulated_norm(x, shift_x, scale_x))            # (B, N, H, 64) q, k, v
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(of_context, of_image, strict=True))
        del of_context, of_image                                                           # they are as large as q, k, v
        out_c, out_x = attend(q, k, v).split((context.shape[1], x.shape[1]), dim=1)        # (B, L, D), (B, N, D)
        del q, k, v
        attended = torch.addcmul(x, gate_x, self.x_block.attn.proj(out_x))                 # (B, N, D)
        if dual:
            shift, scale, gate = dual
            attn2 = self.x_block.attn2
            attended = torch.addcmul(attended, gate, attn2.proj(attend(*attn2.heads(modulated_norm(x, shift, scale)))))
        x = add_mlp(attended, self.x_block.mlp, *mlp_x)                                    # (B, N, D)
        if not of_writer:
            return None, x
        gate_c, *mlp_c = of_writer
        context = torch.addcmul(context, gate_c, self.context_block.attn.proj(out_c))      # (B, L, D)
        return add_mlp(context, self.context_block.mlp, *mlp_c), x


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


class MMDiT(nn.Module):
    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.config = config
        self.register_buffer("pos_embed", torch.zeros(1, config.table_side**2, config.hidden_size))
        self.x_embedder = Patches(config)
        self.t_embedder = Embedder(FREQUENCIES, config.hidden_size)
        self.y_embedder = Embedder(config.pooled_dim, config.hidden_size)
        self.context_embedder = nn.Linear(config.context_dim, config.hidden_size)
        self.joint_blocks = nn.ModuleList(JointBlock(config, index) for index in range(config.depth))
        self.final_layer = FinalLayer(config.hidden_size, config.patch_size**2 * config.out_channels)

    @classmethod
    def load(cls, path: str | os.PathLike, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> "MMDiT":
        """Read a transformer: the official file, with or without the VAE in it, or the diffusers folder.

        dtype   compute dtype, whatever the storage; None is float32
        raises  ValueError that names the tensors which are missing, unknown or misshapen
        """
        weights = open_weights(path).part("model.diffusion_model.")
        with torch.device("meta"):
            model = cls(read_config(weights))
        fill(model, weights, device, dtype)
        return model

    def forward(self, latent: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor, guidance: Tensor | None = None) -> Tensor:
        """Predict the velocity of the flow; the arithmetic is in the dtype of the weights, the result in that of `latent`.

        guidance  None: SD3 is guided by a second pass (cfg); only Flux takes the number
        raises    ValueError on guidance, on sides that patches do not divide, on a latent larger than the position table
        """
        if guidance is not None:
            raise ValueError("guidance is an input of Flux-dev; SD3 has none: use cfg, two passes, and leave guidance None")
        dtype, p = self.x_embedder.proj.weight.dtype, self.config.patch_size
        h, w = latent.shape[-2] // p, latent.shape[-1] // p
        position = self.position(*latent.shape[-2:])                                       # (h/p, w/p, D)
        x = (self.x_embedder(latent.to(dtype)) + position.to(dtype)).flatten(1, 2)         # (B, N, D)
        context = self.context_embedder(context.to(dtype))                                 # (B, L, D)
        time = self.t_embedder(timestep_embedding(1000 * sigma.float()).to(dtype))         # (B, D)
        cond = F.silu(time + self.y_embedder(pooled.to(dtype)))                            # (B, D)
        for block in self.joint_blocks:
            context, x = block(context, x, cond)
        x = self.final_layer(x, cond)                                                      # (B, N, p²·16)
        return rearrange(x, "B (h w) (p q c) -> B c (h p) (w q)", h=h, w=w, p=p, q=p).to(latent.dtype)

    def position(self, height: int, width: int) -> Tensor:
        """The centre of the position table, (height/p, width/p, D): a view."""
        side, p = self.config.table_side, self.config.patch_size
        if height % p or width % p:
            raise ValueError(f"latent {height}x{width}: both sides must be multiples of the patch, {p}")
        h, w = height // p, width // p
        if max(h, w) > side:
            limits = " and ".join(f"{side * p * factor} px at factor {factor}" for factor in (8, 16))
            raise ValueError(f"latent {height}x{width} is larger than this model's position table: "
                             f"a side can have {side * p}, which is {limits}")
        top, left = (side - h) // 2, (side - w) // 2
        return self.pos_embed.view(side, side, -1)[top:top + h, left:left + w]


def shape_of(weights: Mapping[str, LazyTensor], family: str, name: str, axes: int) -> tuple[int, ...]:
    """Shape of a tensor without which this is no transformer of the family; ValueError that names it."""
    source = getattr(weights, "source", "weights")
    if name not in weights:
        raise ValueError(f"{source}: 1 missing: {name}; without it this is no {family} transformer (the file holds {len(weights)} tensors: "
                         f"{', '.join(list(weights)[:2])} ...)")
    if len(weights[name].shape) != axes:
        raise ValueError(f"{source}: {name} has the shape {weights[name].shape}, expected {axes} axes")
    return weights[name].shape


def usual_size(weights: Mapping[str, LazyTensor], family: str, ending: str, axis: int, otherwise: str, axes: int = 2) -> int:
    """What most tensors with this ending say, so that fill() can name the one that differs; without any, `otherwise` is missed."""
    sizes = [t.shape[axis] for name, t in weights.items() if name.endswith(ending) and len(t.shape) == axes]
    return mode(sizes) if sizes else shape_of(weights, family, otherwise, axes)[axis]


def read_config(weights: Mapping[str, LazyTensor]) -> MMDiTConfig:
    """Read the sizes of an MMDiT from the shapes of its tensors.

    raises  ValueError that names the tensor if one which carries a size is missing or cannot be
    """
    source = getattr(weights, "source", "weights")
    shape, usual = partial(shape_of, weights, "SD3"), partial(usual_size, weights, "SD3")
    hidden_size = usual(".attn.qkv.weight", 1, "joint_blocks.0.x_block.attn.qkv.weight")
    _, in_channels, patch_size, _ = shape("x_embedder.proj.weight", 4)
    outputs, cells = shape("final_layer.linear.weight", 2)[0], shape("pos_embed", 3)[1]
    for name, size, fits, rule in (
            ("joint_blocks.0.x_block.attn.qkv.weight", hidden_size, hidden_size % HEAD_DIM == 0, f"a multiple of {HEAD_DIM} columns"),
            ("final_layer.linear.weight", outputs, outputs % patch_size**2 == 0, f"a multiple of {patch_size**2} rows"),
            ("pos_embed", cells, math.isqrt(cells)**2 == cells, "a square of places")):
        if not fits:
            raise ValueError(f"{source}: {name} has {size}, expected {rule}")
    blocks = [match for name in weights if (match := re.match(r"joint_blocks\.(\d+)\.(x_block\.attn2)?", name))]
    return MMDiTConfig(
        hidden_size=hidden_size, depth=1 + max((int(block[1]) for block in blocks), default=-1), patch_size=patch_size,
        in_channels=in_channels, out_channels=outputs // patch_size**2, context_dim=shape("context_embedder.weight", 2)[1],
        pooled_dim=shape("y_embedder.mlp.0.weight", 2)[1], table_side=math.isqrt(cells),
        mlp_hidden=usual(".mlp.fc1.weight", 0, "joint_blocks.0.x_block.mlp.fc1.weight"),
        qk_norm=any(".attn.ln_q." in name for name in weights),
        dual_attention=tuple(sorted({int(block[1]) for block in blocks if block[2]})))


def check_set(config: MMDiTConfig, context: Tensor, pooled: Tensor, latent_channels: int) -> None:
    """Refuse text encoders or a VAE that this transformer was not trained with.

    context, pooled  of any prompt
    raises           ValueError that says what is how wide
    """
    for what, here, wanted in (("text encoders give a context", context.shape[-1], config.context_dim),
                               ("text encoders give a pooled vector", pooled.shape[-1], config.pooled_dim),
                               ("VAE has latents", latent_channels, config.in_channels)):
        if here != wanted:
            raise ValueError(f"the folder's {what} {here} wide, and the transformer wants {wanted}: they do not belong together; "
                             "give --weights the folder that the transformer was trained from")


def new_mmdit(config: MMDiTConfig, generator: torch.Generator, base: float | None = None) -> MMDiT:
    """A model to train from the start, initialised as DiT and SD3 are: every block begins as the identity.

    base    of the position table, see sincos_table; SD3's is 64 with table_side 192
    source  DiT appendix A, `initialize_weights`
    """
    with torch.device("meta"):
        model = MMDiT(config)
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "adaLN_modulation" in name or name.startswith("final_layer"):
            nn.init.zeros_(parameter)
        elif ".ln_" in name:
            nn.init.ones_(parameter)
        elif name.startswith(("t_embedder", "y_embedder")):
            nn.init.normal_(parameter, std=0.02, generator=generator)
        else:
            nn.init.xavier_uniform_(parameter.view(len(parameter), -1), generator=generator)  # the patch convolution is a linear
    model.pos_embed.copy_(sincos_table(config.hidden_size, config.table_side, base))
    return model
