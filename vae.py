"""The 16-channel autoencoder of SD3 and Flux: factor 8 as published, factor 16 by the partition trick.

Paper     Diffusion-4K section 3.2, "Partitioned VAE"
Mirrors   sd3-ref VAEEncoder / VAEDecoder and Flux AutoEncoder, which share every tensor name
Shapes    B batch, H and W pixels, h = H/factor and w = W/factor, C feature channels
Units     images lie in [-1, 1]; the encoder gives moments, and latent = (raw - shift_factor) * scale_factor
Factor    16 uses the weights of 8: the encoder's first convolution takes every second pixel (stride 2, dilation 2), the
          decoder's last one runs on features enlarged twofold. 4096x4096 pixels become a 256x256 latent
Memory    without gradients, layers on large maps run in bands of rows; not tiling: the numbers are those of the whole
Check     python -m pytest tests/test_vae.py: names and outputs equal the official ones, to 1e-5
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

import names
from checkpoint import FLUX_DOWNLOAD, SD3_DOWNLOAD, Device, Weights, filled, open_weights
from layers import is_bare

SD3_SCALE, SD3_SHIFT = 1.5305, 0.0609
FLUX_SCALE, FLUX_SHIFT = 0.3611, 0.1159
NORM_GROUPS, NORM_EPS = 32, 1e-6
LOGVAR_RANGE = (-30.0, 20.0)
BANDED_PIXELS, BAND_ROWS = 2**19, 64  # maps of more pixels run in bands of so many rows
KIND = f"autoencoder, such as {SD3_DOWNLOAD} or the vae/ folder of its -diffusers version has"  # for messages
PUBLISHED = (f"SD3's are {SD3_SCALE} and {SD3_SHIFT}, Flux's {FLUX_SCALE} and {FLUX_SHIFT}: record yours in the "
             "metadata, or in a config.json as scaling_factor and shift_factor")
FAMILIES = (("model.diffusion_model.joint_blocks.", (SD3_SCALE, SD3_SHIFT), "SD3"),  # a transformer in the same file
            ("model.diffusion_model.double_blocks.", (FLUX_SCALE, FLUX_SHIFT), "Flux"))


@dataclass(frozen=True)
class VAEConfig:
    """Widths: feature channels per level, full resolution first. Blocks: resnets per level, one more in the decoder."""

    encoder_widths: tuple[int, ...]
    decoder_widths: tuple[int, ...]
    encoder_blocks: int
    decoder_blocks: int
    latent_channels: int
    norm_groups: int = NORM_GROUPS


def read_config(weights: Weights, norm_groups: int | None = None) -> VAEConfig:
    """Read the sizes of an autoencoder from its tensors, without prefix. Shapes do not determine norm_groups; None is
    the value of the metadata, else the official 32."""
    norm_groups = norm_groups or weights.number("norm_groups", "norm_num_groups", otherwise=NORM_GROUPS, integer=True)
    _refuse_others(weights)
    weights.shape_of("decoder.conv_out.weight", 4, KIND)
    channels = weights.shape_of("encoder.conv_out.weight", 4, KIND)[0] // 2

    def widths(prefix: str) -> tuple[int, ...]:
        levels = range(max(1, weights.depth(prefix)))  # without any, level 0 is reported missing
        return tuple(weights.shape_of(f"{prefix}{i}.block.0.conv1.weight", 4, KIND)[0] for i in levels)

    encoder, decoder = widths("encoder.down."), widths("decoder.up.")
    if norm_groups < 1 or any(width % norm_groups for width in encoder + decoder):
        raise ValueError(f"{weights.source}: widths {encoder} and {decoder} do not divide into {norm_groups} "
                         "norm groups; a narrow autoencoder records norm_groups in its metadata, or give norm_groups=")
    blocks = (weights.depth(f"{prefix}0.block.") for prefix in ("encoder.down.", "decoder.up."))
    return VAEConfig(encoder, decoder, *blocks, channels, norm_groups)


def _refuse_others(weights: Weights) -> None:
    """ValueError that names an autoencoder of another model, by its config.json or tensors."""
    said, act, quant = (weights.metadata.get("_class_name", "AutoencoderKL"), weights.metadata.get("act_fn", "silu"),
                        weights.get("quant_conv.weight"))
    other = names.recognised(weights, names.AUTOENCODERS).removesuffix("; ")
    if said != "AutoencoderKL":
        other = f"{said[:40]}, by its config.json"
    elif act not in ("silu", "swish"):
        other = f"with {act[:40]} instead of silu, by its config.json"
    elif key := next((key for key in ("latents_mean", "latents_std") if key in weights.metadata), ""):
        other = f"normalised per channel, by {key} in its config.json"
    elif not other and any(len(t.shape) == 5 for t in weights.values()):
        other = "the autoencoder of a video model"
    elif not other and quant is not None and quant.shape[0] == 8:
        other = "the autoencoder of SD1, SD2 or SDXL, with 4 latent channels"
    if other:
        raise ValueError(f"{weights.source}: is {other}; give SD3's or Flux's, as {SD3_DOWNLOAD}, the vae/ folder of "
                         f"its -diffusers version or {FLUX_DOWNLOAD} has it")


def read_scale(file: Weights, scale: float | None = None, shift: float | None = None,
               fallback: tuple[float, float] | None = None) -> tuple[float, float]:
    """Scale and shift of the latent: as given, else as recorded, else those of a family; see VAE.load."""
    scale = file.number("scale_factor", "scaling_factor") if scale is None else scale
    shift = file.number("shift_factor") if shift is None else shift
    if shift is None and "scaling_factor" in file.metadata:  # a config of diffusers: a scale of no family means shift 0
        shift = next((both[1] for _, both, _ in FAMILIES if both[0] == scale), 0.0)
    if None in (scale, shift):
        inside = (both for prefix, both, _ in FAMILIES if any(name.startswith(prefix) for name in file))
        known = next(inside, None) or fallback or _of_official_file(file.source)
        if known is None:
            lack = " and ".join(key for key, v in (("scale_factor", scale), ("shift_factor", shift)) if v is None)
            raise ValueError(f"{file.source}: records no {lack}, and nothing in it shows its family; {PUBLISHED}")
        scale, shift = (own if given is None else given for own, given in zip(known, (scale, shift), strict=True))
    if other := next((name for _, both, name in FAMILIES if fallback and (scale, shift) == both != fallback), ""):
        raise ValueError(f"{file.source}: has scale {scale} and shift {shift}, which are those of {other}'s "
                         "autoencoder, but the transformer is not of that family; put its own autoencoder there")
    if not 1e-3 <= scale <= 1e3 or abs(shift) > 1e3:
        raise ValueError(f"{file.source}: scale_factor {scale:g}, shift_factor {shift:g}: expected 0.001 to 1000 and "
                         f"-1000 to 1000; {PUBLISHED}")
    return scale, shift


def _of_official_file(path: str) -> tuple[float, float] | None:
    """Flux's scale and shift for official names without prefix, under which only its ae.safetensors is published."""
    if not os.path.isfile(path):
        return None
    with safe_open(path, framework="pt") as file:
        return (FLUX_SCALE, FLUX_SHIFT) if any(name.startswith("decoder.up.") for name in file.keys()) else None


# ---- the partition trick: factor 16 with the weights of factor 8

class HalvingConv(nn.Conv2d):
    """The encoder's first convolution: at factor 16 it has stride 2, with dilation 2 (paper) or 1 (released)."""

    def forward(self, image: Tensor, factor: int = 8, dilation: int = 2) -> Tensor:
        if factor == 8:
            return in_bands(super().forward, image) if banded(image) else super().forward(image)
        return F.conv2d(image, self.weight, self.bias, stride=2, padding=dilation, dilation=dilation)


class EnlargingConv(nn.Conv2d):
    """Nearest 2x upsampling fused with a 3x3 convolution: in every upsampling and, at factor 16, as the last layer."""

    def forward(self, x: Tensor, enlarge: bool = True, offset: int = 2) -> Tensor:
        if not enlarge:
            return in_bands(super().forward, x) if banded(x) else super().forward(x)
        if banded(x, times=4):
            return in_bands(lambda band: enlarged_conv(band, self.weight, self.bias, offset), x)
        return enlarged_conv(x, self.weight, self.bias, offset)


def enlarged_conv(x: Tensor, weight: Tensor, bias: Tensor, offset: int = 2) -> Tensor:
    """Nearest 2x upsampling, then a 3x3 convolution, without ever storing the enlarged map.

    A 3x3 window on the enlarged map covers only 2x2 distinct pixels. So each of the four output phases is a 2x2
    convolution of the small map, whose taps are sums of the 3x3 taps; a pixel shuffle interleaves the phases.

    x        (B, C, h, w); weight (O, C, 3, 3); bias (O,)
    offset   border pixels cut after the convolution: 2 is exact; 1 is the released partition, one pixel off
    returns  (B, O, 2h, 2w)
    """
    out_channels, channels = weight.shape[:2]
    # small pixels (i-1, i) give output rows 2i-1 and 2i; taps[phase, pixel, tap]: which 3x3 taps fall on which pixel
    taps = weight.new_tensor([[[1, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 1]]])
    phases = torch.einsum("par,qbs,ocrs->opqcab", taps, taps, weight).reshape(4 * out_channels, channels, 2, 2)
    interleaved = F.pixel_shuffle(F.conv2d(x, phases, bias.repeat_interleave(4), padding=1), 2)  # (B, O, 2h+2, 2w+2)
    first = offset - 1
    return interleaved[:, :, first:first + 2 * x.shape[2], first:first + 2 * x.shape[3]]


def partitioned_conv(x: Tensor, weight: Tensor, bias: Tensor, offset: int = 2, tiles: int = 2) -> Tensor:
    """`enlarged_conv` as the paper describes it, to be read: upsample and convolve tile by tile. Same numbers, slower.

    offset   a tile carries one pixel of its neighbours, which upsampling turns into 2; the release cuts 1
    tiles    per side, a divisor of h and w
    """
    th, tw, padded = x.shape[2] // tiles, x.shape[3] // tiles, F.pad(x, (1, 1, 1, 1))

    def tile(i: int, j: int) -> Tensor:
        small = padded[:, :, i * th:(i + 1) * th + 2, j * tw:(j + 1) * tw + 2]
        large = F.conv2d(F.interpolate(small, scale_factor=2, mode="nearest"), weight, bias, padding=1)
        return large[:, :, offset:offset + 2 * th, offset:offset + 2 * tw]

    return torch.cat([torch.cat([tile(i, j) for j in range(tiles)], dim=3) for i in range(tiles)], dim=2)


# ---- large maps in bands of rows

def banded(x: Tensor, times: int = 1) -> bool:
    """Whether a layer that makes x so many times larger runs in bands; not with gradients, as backward reads all."""
    return times * x.shape[2] * x.shape[3] > BANDED_PIXELS and not torch.is_grad_enabled()


def in_bands(conv: Callable[[Tensor], Tensor], x: Tensor, out: Tensor | None = None) -> Tensor:
    """A convolution of the complete map, from bands that carry one row of each neighbour.

    conv  maps (B, C, rows, w) to (B, O, k * rows, k * w), from rows at most one away. Its zero padding is right at the
          map's border; elsewhere it reaches only the neighbours' rows, which are cut
    out   where the result is written; may be x
    """
    height, above = x.shape[2], x[:, :, :0]
    for top in range(0, height, BAND_ROWS):
        bottom = min(top + BAND_ROWS, height)
        band = torch.cat((above, x[:, :, top:bottom + 1]), dim=2)
        above = x[:, :, bottom - 1:bottom].clone()  # the next band reads it, and out may be x
        y = conv(band)
        k, cut = y.shape[2] // band.shape[2], top > 0
        out = y.new_empty(*y.shape[:2], k * height, y.shape[3]) if out is None else out
        out[:, :, k * top:k * bottom] = y[:, :, k * cut:k * (cut + bottom - top)]
    return out


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Callable[[Tensor], Tensor]:
    """`F.silu(norm(band))` for bands of x with the statistics of the complete x, in fp32 as group norm has them."""
    # a group's variance is the mean of its channels' variances plus the variance of their means: all are equally large
    mean = torch.stack([channel.float().mean((1, 2)) for channel in x.unbind(1)], dim=1)  # (B, C)
    var = torch.stack([(channel.float() - m[:, None, None]).square_().mean((1, 2))  # torch.var_mean is slow on CPUs
                       for channel, m in zip(x.unbind(1), mean.unbind(1), strict=True)], dim=1)
    var, mean = (t.unflatten(1, (norm.num_groups, -1)) for t in (var, mean))
    var, mean = var.mean(2, True) + mean.var(2, correction=0, keepdim=True), mean.mean(2, True)  # (B, groups, 1)
    scale = norm.weight.float().view(norm.num_groups, -1) * (var + norm.eps).rsqrt()
    shift = norm.bias.float().view(norm.num_groups, -1) - mean * scale
    scale, shift = (t.flatten(1)[:, :, None, None] for t in (scale, shift))
    return lambda band: F.silu(torch.addcmul(shift, band, scale).to(x.dtype), inplace=True)


# ---- networks

class ShrinkingConv(nn.Conv2d):
    """A convolution of stride 2 with zeros on the right and at the bottom only: in every downsampling."""

    def forward(self, x: Tensor) -> Tensor:
        rows = 2 * BAND_ROWS if banded(x) else x.shape[2]
        bands = (x[:, :, top:top + rows + 1] for top in range(0, x.shape[2], rows))  # all but the last have odd heights
        parts = [super(ShrinkingConv, self).forward(F.pad(b, (0, 1, 0, 1 - b.shape[2] % 2))) for b in bands]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, norm_groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, in_channels, NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(norm_groups, out_channels, NORM_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        if banded(x) and all(is_bare(norm, nn.GroupNorm) for norm in (self.norm1, self.norm2)):
            return self.forward_in_bands(x)
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (x if self.nin_shortcut is None else self.nin_shortcut(x))

    def forward_in_bands(self, x: Tensor) -> Tensor:
        """`forward` with no complete map besides x and the result."""
        norm_silu1 = norm_silu(self.norm1, x)
        y = in_bands(lambda band: self.conv1(norm_silu1(band)), x)
        norm_silu2 = norm_silu(self.norm2, y)
        in_bands(lambda band: self.conv2(norm_silu2(band)), y, out=y)
        for rows, band in zip(y.split(BAND_ROWS, dim=2), x.split(BAND_ROWS, dim=2), strict=True):
            rows += band if self.nin_shortcut is None else self.nin_shortcut(band)
        return y


class AttnBlock(nn.Module):
    def __init__(self, channels: int, norm_groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels, NORM_EPS)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)                                # (B, C, h, w)
        q, k, v = (f(y).flatten(2).transpose(1, 2)[:, None].contiguous() for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)     # (B, 1, hw, C); contiguous for the memory-efficient kernel
        return x + self.proj_out(y[:, 0].transpose(1, 2).reshape(x.shape))


def mid_blocks(channels: int, norm_groups: int) -> nn.Module:
    before, after = (ResnetBlock(channels, channels, norm_groups) for _ in range(2))
    return nn.Sequential(OrderedDict(block_1=before, attn_1=AttnBlock(channels, norm_groups), block_2=after))


class Level(nn.Module):
    """Resnets at one resolution and, except at the last level, the step to the next."""

    def __init__(self, in_channels: int, width: int, blocks: int, norm_groups: int, step: str | None):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(width if j else in_channels, width, norm_groups) for j in range(blocks))
        self.downsample = self.upsample = None
        if step == "down":
            self.downsample = nn.Sequential(OrderedDict(conv=ShrinkingConv(width, width, 3, stride=2)))
        elif step == "up":
            self.upsample = nn.Sequential(OrderedDict(conv=EnlargingConv(width, width, 3, padding=1)))

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps():
            x = step(x)
        return x

    def steps(self) -> list[nn.Module]:
        return [*self.block, *(step for step in (self.downsample, self.upsample) if step is not None)]


def run_levels(levels: Iterable[Level], x: Tensor) -> Tensor:
    """The levels in turn. Those without hooks by their steps, as a call would hold its input until it returns."""
    for step in (step for level in levels for step in (level.steps() if is_bare(level, Level) else [level])):
        x = step(x)
    return x


class Encoder(nn.Module):
    def __init__(self, c: VAEConfig):
        super().__init__()
        widths, last = c.encoder_widths, len(c.encoder_widths) - 1
        self.conv_in = HalvingConv(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            Level(widths[max(i - 1, 0)], width, c.encoder_blocks, c.norm_groups, "down" if i < last else None)
            for i, width in enumerate(widths))
        self.mid = mid_blocks(widths[-1], c.norm_groups)
        self.norm_out = nn.GroupNorm(c.norm_groups, widths[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * c.latent_channels, 3, padding=1)

    def forward(self, image: Tensor, factor: int, dilation: int) -> Tensor:
        x = run_levels(self.down, self.conv_in(image, factor, dilation))
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, c: VAEConfig):
        super().__init__()
        widths, last = c.decoder_widths, len(c.decoder_widths) - 1
        self.conv_in = nn.Conv2d(c.latent_channels, widths[-1], 3, padding=1)
        self.mid = mid_blocks(widths[-1], c.norm_groups)
        self.up = nn.ModuleList(  # up[0] is full resolution and runs last
            Level(widths[min(i + 1, last)], width, c.decoder_blocks, c.norm_groups, "up" if i > 0 else None)
            for i, width in enumerate(widths))
        self.norm_out = nn.GroupNorm(c.norm_groups, widths[0], NORM_EPS)
        self.conv_out = EnlargingConv(widths[0], 3, 3, padding=1)

    def forward(self, raw: Tensor, factor: int, offset: int) -> Tensor:
        return self.conv_out(self.features(raw), factor == 16, offset)

    def features(self, raw: Tensor) -> Tensor:
        """What the last convolution reads: (B, widths[0], 8h, 8w)."""
        x = run_levels(reversed(self.up), self.mid(self.conv_in(raw)))
        if banded(x) and is_bare(self.norm_out, nn.GroupNorm):
            return in_bands(norm_silu(self.norm_out, x), x)
        return F.silu(self.norm_out(x))


class VAE(nn.Module):
    """Encoder and decoder, with the normalisation of the latent between them."""

    def __init__(self, config: VAEConfig, scale_factor: float = 1.0, shift_factor: float = 0.0, offset: int = 2):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.scale_factor, self.shift_factor, self.offset = scale_factor, shift_factor, offset

    @classmethod
    def load(cls, path: str | os.PathLike, device: Device = "cpu", dtype: torch.dtype | None = None,
             norm_groups: int | None = None, scale_factor: float | None = None, shift_factor: float | None = None,
             fallback: tuple[float, float] | None = None, offset: int | None = None) -> "VAE":
        """Read ae.safetensors, sd3_medium.safetensors or the vae/ folder of diffusers; dtype, errors: checkpoint.fill.

        others    None is the value that metadata or config.json record
        fallback  the family's scale and shift factor, where neither metadata nor a transformer inside the file show
                  them. None: from the tensor names of Flux's ae.safetensors
        offset    of decode; None: 2 if nothing is recorded
        raises    ValueError if the file is of another model or family, or its scale and shift cannot be known
        """
        file = open_weights(path)
        weights = file.part("first_stage_model.")  # the file itself if it has no prefixes
        config, constants = read_config(weights, norm_groups), read_scale(file, scale_factor, shift_factor, fallback)
        offset = file.number("offset", otherwise=2, integer=True) if offset is None else offset
        if offset not in (1, 2):
            raise ValueError(f"{file.source}: records offset {offset}; it is 1 or 2")
        return filled(lambda: cls(config, *constants, offset), weights, device, dtype).eval()

    def moments(self, image: Tensor, factor: int = 16, dilation: int = 2) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior, raw, (B, 16, h, w) each.

        image     (B, 3, H, W) in [-1, 1]; ValueError unless H and W are multiples of 8 (at factor 16: of 16)
        dilation  at factor 16: 1 is the release's, 2 the paper's, which equals factor 8 on image[:, :, ::2, ::2]
        """
        if factor not in (8, 16) or dilation not in (1, 2):
            raise ValueError(f"factor {factor} with dilation {dilation}: factor is 8 or 16, dilation 1 or 2")
        step = 2 ** (len(self.config.encoder_widths) - 1) * (factor // 8)
        if image.shape[-2] % step or image.shape[-1] % step:
            raise ValueError(f"image of {image.shape[-1]}x{image.shape[-2]} pixels: sides must be multiples of {step}")
        return self.encoder(image, factor, dilation).chunk(2, dim=1)

    def encode(self, image: Tensor, factor: int = 16, dilation: int = 2,
               generator: torch.Generator | None = None) -> Tensor:
        """Image to normalised latent (B, 16, h, w): `draw` from the `moments`."""
        return self.draw(*self.moments(image, factor, dilation), generator)

    def draw(self, mean: Tensor, logvar: Tensor, generator: torch.Generator | None) -> Tensor:
        """(raw - shift_factor) * scale_factor; raw is a sample of the posterior, without a generator its mode."""
        raw = mean
        if generator is not None:
            normal = torch.randn(mean.shape, generator=generator, device=generator.device).to(mean)
            raw = mean + torch.exp(0.5 * logvar.clamp(*LOGVAR_RANGE)) * normal
        return (raw - self.shift_factor) * self.scale_factor

    def decode(self, latent: Tensor, factor: int = 16, offset: int | None = None) -> Tensor:
        """Normalised latent (B, 16, h, w) to image (B, 3, h*factor, w*factor), about [-1, 1], not clamped.

        offset  at factor 16: 2 is exact, 1 the release's shift by one pixel, with which the decoders of SC-VAE and
                UltraFlux were trained; None: what the file records, else 2
        """
        offset = self.offset if offset is None else offset
        if factor not in (8, 16) or offset not in (1, 2):
            raise ValueError(f"factor {factor} with offset {offset}: factor is 8 or 16, offset 1 or 2")
        return self.decoder(latent / self.scale_factor + self.shift_factor, factor, offset)


def to_image(pixels: np.ndarray | Tensor) -> Tensor:
    """(H, W, 3) uint8 to (3, H, W) float in [-1, 1]; a tensor's on its device."""
    pixels = pixels if isinstance(pixels, Tensor) else torch.from_numpy(np.ascontiguousarray(pixels))
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def to_pixels(image: Tensor) -> np.ndarray:
    """(3, H, W) in [-1, 1] to (H, W, 3) uint8, rounded."""
    return ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
