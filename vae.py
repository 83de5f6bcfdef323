"""The 16-channel autoencoder of SD3 and Flux, at factor 8 as published and at factor 16 by the partition trick.

Paper     Diffusion-4K section 3.2, "Partitioned VAE"
Mirrors   sd3-ref VAEEncoder / VAEDecoder and Flux AutoEncoder, which share every tensor name;
          held by tests/test_vae.py on weights and outputs of both, at 1e-5
Shapes    B batch, H and W pixels, h = H/factor and w = W/factor, C feature channels; images lie in [-1, 1]
Factor    the same weights serve both:
            8   as published
            16  the encoder's first convolution takes every second pixel (stride 2, dilation 2), and the decoder's last
                one runs on features enlarged twofold. 4096x4096 pixels become 256x256 latents.
Moments   the encoder gives mean and log-variance; latent = (raw - shift_factor) * scale_factor
Check     python -m pytest tests/test_vae.py
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import SD3_DOWNLOAD, Weights, fill, open_weights

SD3_SCALE, SD3_SHIFT = 1.5305, 0.0609
FLUX_SCALE, FLUX_SHIFT = 0.3611, 0.1159
NORM_GROUPS, NORM_EPS = 32, 1e-6
LOGVAR_RANGE = (-30.0, 20.0)
FACTORS = (8, 16)


@dataclass(frozen=True)
class VAEConfig:
    """What the tensor shapes say: `widths[0]` is at full resolution; one resnet more a level in the decoder."""

    encoder_widths: tuple[int, ...]
    decoder_widths: tuple[int, ...]
    encoder_blocks: int
    decoder_blocks: int
    latent_channels: int
    norm_groups: int = NORM_GROUPS

    @classmethod
    def of(cls, weights: Weights, norm_groups: int) -> "VAEConfig":
        """Read the configuration from official names and shapes.

        weights      an autoencoder's, prefix cut off
        norm_groups  the one number that shapes do not say
        raises       ValueError if these are not the weights of an autoencoder, or widths do not divide into the groups
        """
        for name in ("decoder.conv_out.weight", "encoder.conv_out.weight"):
            if name not in weights:
                some = ", ".join(sorted(weights)[:3]) or "nothing"
                raise ValueError(f"{weights.source}: no autoencoder in it: {name} is missing; it holds {some} …; "
                                 f"{SD3_DOWNLOAD} and its -diffusers/vae have one")

        def levels(stem: str) -> tuple[tuple[int, ...], int]:
            count = len({name.split(".")[2] for name in weights if name.startswith(stem)})
            blocks = len({name.split(".")[4] for name in weights if name.startswith(f"{stem}0.block.")})
            first = [f"{stem}{i}.block.0.conv1.weight" for i in range(max(count, 1))]
            if absent := [name for name in first if name not in weights]:
                raise ValueError(f"{weights.source}: {len(absent)} missing: {', '.join(absent[:4])}")
            return tuple(weights[name].shape[0] for name in first), blocks

        (encoder, encoder_blocks), (decoder, decoder_blocks) = levels("encoder.down."), levels("decoder.up.")
        if norm_groups < 1 or any(width % norm_groups for width in encoder + decoder):
            raise ValueError(f"{weights.source}: widths {encoder} and {decoder} do not divide into {norm_groups} norm groups; "
                             "a narrow autoencoder says norm_groups in its metadata, or give norm_groups=")
        channels = weights["encoder.conv_out.weight"].shape[0] // 2
        return cls(encoder, decoder, encoder_blocks, decoder_blocks, channels, norm_groups)


def _said(weights: Weights, names: Sequence[str], otherwise: float) -> float:
    """The number that a file says under one of these names; ValueError if it is none."""
    for name in names:
        if name in weights.metadata:
            try:
                value = float(weights.metadata[name])
            except ValueError:
                value = math.nan
            if not math.isfinite(value):
                raise ValueError(f"{weights.source}: its metadata says {name} {weights.metadata[name]!r}, which is no number")
            return value
    return otherwise


def enlarged_conv(x: Tensor, weight: Tensor, bias: Tensor, offset: int = 2) -> Tensor:
    """Nearest twofold enlargement, then a 3x3 convolution, without ever making the enlarged map.

    A 3x3 window on the enlarged map sees only 2x2 different pixels. So each of the four output phases is a 2x2
    convolution of the small map, whose taps are sums of the 3x3 taps; a pixel shuffle puts the phases together.

    x        (B, C, h, w)
    weight   (O, C, 3, 3)
    bias     (O,)
    offset   2 is exact; 1 is the released partition, whose picture comes one pixel too far down and right (README)
    returns  (B, O, 2h, 2w)
    """
    out_channels, channels = weight.shape[:2]
    # window (i-1, i) gives output rows 2i-1 and 2i: which of the three taps fall on which of its two pixels
    taps = weight.new_tensor([[[1, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 1]]])
    phases = torch.einsum("par,qbs,ocrs->opqcab", taps, taps, weight).reshape(4 * out_channels, channels, 2, 2)
    both = F.pixel_shuffle(F.conv2d(x, phases, bias.repeat_interleave(4), padding=1), 2)  # (B, O, 2h+2, 2w+2)
    first = offset - 1
    return both[:, :, first : first + 2 * x.shape[2], first : first + 2 * x.shape[3]]


def partitioned_conv(x: Tensor, weight: Tensor, bias: Tensor, offset: int = 2, tiles: int = 2) -> Tensor:
    """The same, as the paper describes it: tile by tile, each enlarged twofold and convolved, then put together.

    It is kept to be read, and as the slow twin of `enlarged_conv`, which gives the same numbers faster.

    x        (B, C, h, w), h and w multiples of `tiles`
    weight   (O, C, 3, 3)
    bias     (O,)
    offset   pixels cut from the border after the convolution: each tile carries one pixel of its neighbours, which is two
             after the enlargement. The release cuts 1.
    tiles    tiles a side
    returns  (B, O, 2h, 2w)
    """
    th, tw = x.shape[2] // tiles, x.shape[3] // tiles
    padded = F.pad(x, (1, 1, 1, 1))
    rows = []
    for i in range(tiles):
        row = []
        for j in range(tiles):
            tile = padded[:, :, i * th : (i + 1) * th + 2, j * tw : (j + 1) * tw + 2]
            large = F.conv2d(F.interpolate(tile, scale_factor=2, mode="nearest"), weight, bias, padding=1)
            row.append(large[:, :, offset : offset + 2 * th, offset : offset + 2 * tw])
        rows.append(torch.cat(row, dim=3))
    return torch.cat(rows, dim=2)


def to_image(pixels: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 to (3, H, W) float in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float() / 127.5 - 1


def to_pixels(image: Tensor) -> np.ndarray:
    """(3, H, W) in [-1, 1] to (H, W, 3) uint8, rounded."""
    return ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, norm_groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, in_channels, NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(norm_groups, out_channels, NORM_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttnBlock(nn.Module):
    def __init__(self, channels: int, norm_groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels, NORM_EPS)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)                              # (B, C, h, w)
        q, k, v = (f(y).flatten(2).transpose(1, 2)[:, None].contiguous() for f in (self.q, self.k, self.v))  # (B, 1, hw, C)
        y = F.scaled_dot_product_attention(q, k, v)   # scale C^-1/2; only contiguous heads take the kernel without a (hw, hw) matrix
        return x + self.proj_out(y[:, 0].transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # zeros to the right and below only


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return enlarged_conv(x, self.conv.weight, self.conv.bias)


class Mid(nn.Module):
    def __init__(self, channels: int, norm_groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, norm_groups)
        self.attn_1 = AttnBlock(channels, norm_groups)
        self.block_2 = ResnetBlock(channels, channels, norm_groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """Resnets at one resolution, and the step to the next one where there is one."""

    def __init__(self, in_channels: int, width: int, blocks: int, norm_groups: int, step: str | None):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(width if j else in_channels, width, norm_groups) for j in range(blocks))
        self.downsample = Downsample(width) if step == "down" else None
        self.upsample = Upsample(width) if step == "up" else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        step = self.downsample or self.upsample
        return step(x) if step is not None else x


class Encoder(nn.Module):
    def __init__(self, c: VAEConfig):
        super().__init__()
        widths, last = c.encoder_widths, len(c.encoder_widths) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            Level(widths[max(i - 1, 0)], width, c.encoder_blocks, c.norm_groups, "down" if i < last else None)
            for i, width in enumerate(widths))
        self.mid = Mid(widths[-1], c.norm_groups)
        self.norm_out = nn.GroupNorm(c.norm_groups, widths[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * c.latent_channels, 3, padding=1)

    def forward(self, image: Tensor, factor: int, dilation: int) -> Tensor:
        if factor == 8:
            x = self.conv_in(image)
        else:
            x = F.conv2d(image, self.conv_in.weight, self.conv_in.bias, stride=2, padding=dilation, dilation=dilation)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, c: VAEConfig):
        super().__init__()
        widths, last = c.decoder_widths, len(c.decoder_widths) - 1
        self.conv_in = nn.Conv2d(c.latent_channels, widths[-1], 3, padding=1)
        self.mid = Mid(widths[-1], c.norm_groups)
        self.up = nn.ModuleList(  # up[0] is full resolution and runs last
            Level(widths[min(i + 1, last)], width, c.decoder_blocks, c.norm_groups, "up" if i > 0 else None)
            for i, width in enumerate(widths))
        self.norm_out = nn.GroupNorm(c.norm_groups, widths[0], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, raw: Tensor, factor: int, offset: int) -> Tensor:
        x = self.mid(self.conv_in(raw))
        for level in reversed(self.up):
            x = level(x)
        x = F.silu(self.norm_out(x))
        return self.conv_out(x) if factor == 8 else enlarged_conv(x, self.conv_out.weight, self.conv_out.bias, offset)


class VAE(nn.Module):
    """Encoder and decoder with the normalisation of the latent between them."""

    def __init__(self, config: VAEConfig, scale_factor: float = 1.0, shift_factor: float = 0.0):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.scale_factor, self.shift_factor = scale_factor, shift_factor

    @classmethod
    def load(cls, path: str | os.PathLike, device: str | torch.device = "cpu", dtype: torch.dtype | None = None,
             norm_groups: int | None = None, scale_factor: float | None = None, shift_factor: float | None = None) -> "VAE":
        """Build the autoencoder that a file or folder holds.

        path          ae.safetensors, sd3_medium.safetensors, a diffusers `vae/` folder …
        dtype         compute dtype; None is float32
        norm_groups, scale_factor, shift_factor
                      None: what the metadata or config.json says, else the official value of the family
        returns       VAE
        raises        FileNotFoundError, ValueError (see checkpoint.open_weights and fill)
        """
        whole = open_weights(path)
        weights, said = whole.part("first_stage_model."), whole.metadata
        family = (FLUX_SCALE, FLUX_SHIFT) if weights is whole else (SD3_SCALE, SD3_SHIFT)
        groups = norm_groups or int(_said(whole, ("norm_groups", "norm_num_groups"), NORM_GROUPS))
        if scale_factor is None:
            scale_factor = _said(whole, ("scale_factor", "scaling_factor"), family[0])
        if shift_factor is None:
            shift_factor = _said(whole, ("shift_factor",), 0.0 if "scaling_factor" in said else family[1])
        with torch.device("meta"):
            vae = cls(VAEConfig.of(weights, groups), scale_factor, shift_factor)
        fill(vae, weights, device, dtype)
        return vae.eval()

    def moments(self, image: Tensor, factor: int = 16, dilation: int = 2) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior.

        image     (B, 3, H, W) in [-1, 1], H and W multiples of `factor`
        factor    8 or 16
        dilation  of the first convolution at factor 16: 2 is the paper's and equals factor 8 on image[:, :, ::2, ::2];
                  1 is the released code's
        returns   (mean, logvar), raw, (B, 16, h, w) each
        raises    ValueError on another factor or dilation, or sides that are no multiple
        """
        if factor not in FACTORS or dilation not in (1, 2):
            raise ValueError(f"factor {factor} with dilation {dilation}: factor is 8 or 16, dilation 1 or 2")
        step = 2 ** (len(self.config.encoder_widths) - 1) * (factor // 8)
        if image.shape[-2] % step or image.shape[-1] % step:
            raise ValueError(f"an image of {image.shape[-1]}x{image.shape[-2]} pixels: both sides must be multiples of {step}")
        return self.encoder(image, factor, dilation).chunk(2, dim=1)

    def encode(self, image: Tensor, factor: int = 16, dilation: int = 2, generator: torch.Generator | None = None) -> Tensor:
        """Image to normalised latent.

        image      (B, 3, H, W) in [-1, 1]
        generator  draws from the posterior; None takes its mode
        returns    (B, 16, h, w), (raw - shift_factor) * scale_factor
        """
        return self.draw(*self.moments(image, factor, dilation), generator)

    def draw(self, mean: Tensor, logvar: Tensor, generator: torch.Generator | None) -> Tensor:
        """Normalised latent from moments: a sample of the posterior, or its mode without a generator."""
        raw = mean
        if generator is not None:
            normal = torch.randn(mean.shape, generator=generator, device=generator.device).to(mean)
            raw = mean + torch.exp(0.5 * logvar.clamp(*LOGVAR_RANGE)) * normal
        return (raw - self.shift_factor) * self.scale_factor

    def decode(self, latent: Tensor, factor: int = 16, offset: int = 2) -> Tensor:
        """Normalised latent to image.

        latent   (B, 16, h, w)
        factor   8 or 16
        offset   at factor 16: 2 is exact, 1 reproduces the released code's shift by one pixel
        returns  (B, 3, h*factor, w*factor), about [-1, 1], not clamped
        raises   ValueError on another factor or offset
        """
        if factor not in FACTORS or offset not in (1, 2):
            raise ValueError(f"factor {factor} with offset {offset}: factor is 8 or 16, offset 1 or 2")
        return self.decoder(latent / self.scale_factor + self.shift_factor, factor, offset)
