"""Networks that judge pictures: Inception-v3 for FID, the aesthetics head on CLIP, LPIPS; CLIP itself is in clip.py.

Paper     Diffusion-4K sections 3.1 and 4.2: FID, Aesthetics; rFID and LPIPS of the partitioned VAE
Mirrors   torch-fidelity FeatureExtractorInceptionV3, improved-aesthetic-predictor MLP, richzhang/PerceptualSimilarity
          LPIPS 0.1; tested against them by tests/test_perceptual.py
Scores    FID: lower is better; Aesthetics: about 1 to 10, higher is better; LPIPS: 0 for equal images, lower is better
Images    uint8 (B, 3, H, W), or a list of (3, H, W) whose sizes may differ; each network resizes them
"""

import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from checkpoint import Weights, fill
from scores.official import open_official

Images = Tensor | Sequence[Tensor]
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LPIPS_SHIFT, LPIPS_SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def filled(build: Callable[[], nn.Module], weights: Weights, device: str | torch.device) -> nn.Module:
    """A frozen network, built without storage, with these weights; ValueError if names or shapes differ."""
    with torch.device("meta"):
        network = build()
    fill(network.requires_grad_(False).eval(), weights, device)
    return network


# ---- pictures

def checked(images: Images) -> Images:
    """ValueError unless they are uint8 pictures, one or more."""
    if not len(images):
        raise ValueError("no pictures given")
    for image in images:
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or min(image.shape) < 1:
            raise ValueError(f"a picture of shape {tuple(image.shape)} and {image.dtype}: give uint8 pictures, "
                             "(B, 3, H, W) or a list of (3, H, W)")
    return images


def _resized_crop(images: Images, size: int, resize: Callable[[Tensor, tuple], Tensor], half_down: bool) -> Tensor:
    """uint8 (B, 3, size, size): short sides resized to `size`, centres; half of odd margins rounds down or to even."""
    crops = []
    for image in checked(images):
        height, width = image.shape[1:]
        shape = (size, int(size * width / height)) if height <= width else (int(size * height / width), size)
        image = resize(image, shape)
        top, left = ((side - size) // 2 if half_down else round((side - size) / 2) for side in shape)
        crops.append(image[:, top:top + size, left:left + size])
    return torch.stack(crops)


def resize_crop(images: Images, size: int) -> Tensor:
    """uint8 pictures -> uint8 (B, 3, size, size): torchvision's antialiased resize of the short side, center_crop."""
    def bilinear(image: Tensor, shape: tuple) -> Tensor:
        if shape == image.shape[1:]:
            return image
        resized = F.interpolate(image[None].float(), shape, mode="bilinear", align_corners=False, antialias=True)
        return resized.round().to(torch.uint8)[0]
    return _resized_crop(images, size, bilinear, half_down=False)


def tf1_resize(image: Tensor, size: int = 299) -> Tensor:
    """uint8 (3, H, W) -> float (3, size, size), bilinear as in TensorFlow 1: output i samples i * (side / size)."""
    def places(side: int) -> tuple[Tensor, Tensor, Tensor]:
        scale = torch.tensor(side / size, dtype=torch.float32)
        at = torch.arange(size, dtype=torch.float32, device=image.device) * scale
        low = at.long()
        return low, (low + 1).clamp(max=side - 1), at - low.float()

    (top, bottom, dy), (left, right, dx) = places(image.shape[1]), places(image.shape[2])
    rows = []
    for row in (image[:, top], image[:, bottom]):       # (3, size, W), still uint8: saves memory at 4096x4096
        a, b = row[:, :, left].float(), row[:, :, right].float()
        rows.append(a + (b - a) * dx)
    return rows[0] + (rows[1] - rows[0]) * dy[:, None]


def clip_pixels(images: Images, size: int = 224, crop: str = "transformers") -> Tensor:
    """CLIP's preprocessing: uint8 pictures -> float (B, 3, size, size) on the CPU, by Pillow's bicubic, centre crop.

    crop  half of an odd margin is rounded down by "transformers" (and torchmetrics), to even by "openai" (Aesthetics)
    """
    def bicubic(image: Tensor, shape: tuple) -> Tensor:
        picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
        return torch.tensor(np.asarray(picture.resize(shape[::-1], Image.Resampling.BICUBIC))).permute(2, 0, 1)

    if crop not in ("transformers", "openai"):
        raise ValueError(f'crop {crop!r}: give "transformers" or "openai"')
    pixels = _resized_crop(images, size, bicubic, half_down=crop == "transformers").float() / 255
    mean, deviation = (torch.tensor(rgb)[:, None, None] for rgb in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / deviation


# ---- Inception-v3

class BasicConv2d(nn.Module):
    def __init__(self, channels: int, width: int, kernel: int | tuple[int, int], stride: int = 1, pad: bool = True):
        super().__init__()
        padding = "same" if pad and stride == 1 else 0
        self.conv = nn.Conv2d(channels, width, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=1e-3)
        del self.bn.num_batches_tracked      # unused; not in every copy of the file

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Parallel branches, concatenated in the order given, then the pooled branch.

    branches  official name -> consecutive convolutions, (width, kernel) each: `name` if it is one, `name_1`, `name_2`,
              … if several; a pair in the last place, `_3a` and `_3b`, shares its input
    pool      "avg" or "max"; pool_width is the width of the 1x1 convolution after it, 0 for none
    stride    of the pool and of the last convolution of every branch
    """

    def __init__(self, channels: int, branches: dict[str, list], pool: str, pool_width: int = 0, stride: int = 1):
        super().__init__()
        self.pool, self.stride, self.rows = pool, stride, []
        for name, layers in branches.items():
            width, row = channels, []
            for i, layer in enumerate(layers, 1):
                full = name if len(layers) == 1 else f"{name}_{i}"
                parts = {full + "a": layer[0], full + "b": layer[1]} if isinstance(layer[0], tuple) else {full: layer}
                for part, (out, kernel) in parts.items():
                    self.add_module(part, BasicConv2d(width, out, kernel, stride if i == len(layers) else 1))
                width, row = layer[0], [*row, list(parts)]
            self.rows.append(row)
        self.branch_pool = BasicConv2d(channels, pool_width, 1) if pool_width else None

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for row in self.rows:
            y = x
            for names in row:
                y = torch.cat([self.get_submodule(name)(y) for name in names], 1)
            outputs.append(y)
        if self.pool == "avg":
            y = F.avg_pool2d(x, 3, 1, padding=1, count_include_pad=False)      # TensorFlow's mean excludes the padding
        else:
            y = F.max_pool2d(x, 3, self.stride, padding=1 if self.stride == 1 else 0)
        return torch.cat((*outputs, y if self.branch_pool is None else self.branch_pool(y)), 1)


def _mixed_a(channels: int, pool_width: int) -> Mixed:
    return Mixed(channels, {"branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)],
                            "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}, "avg", pool_width)


def _mixed_c(w: int) -> Mixed:
    wide, tall = (1, 7), (7, 1)
    return Mixed(768, {"branch1x1": [(192, 1)], "branch7x7": [(w, 1), (w, wide), (192, tall)],
                       "branch7x7dbl": [(w, 1), (w, tall), (w, wide), (w, tall), (192, wide)]}, "avg", 192)


def _mixed_e(channels: int, pool: str) -> Mixed:
    fork = ((384, (1, 3)), (384, (3, 1)))
    return Mixed(channels, {"branch1x1": [(320, 1)], "branch3x3": [(384, 1), fork],
                            "branch3x3dbl": [(448, 1), (384, 3), fork]}, pool, 192)


class Inception(nn.Module):
    """Inception-v3 of TensorFlow's 2015-12-05 graph, on which FID is defined; made by `load`."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3, pad=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _mixed_a(192, 32), _mixed_a(256, 64), _mixed_a(288, 64)
        double = [(64, 1), (96, 3), (96, 3)]
        self.Mixed_6a = Mixed(288, {"branch3x3": [(384, 3)], "branch3x3dbl": double}, "max", stride=2)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = map(_mixed_c, (128, 160, 160, 192))
        seven = [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)]
        self.Mixed_7a = Mixed(768, {"branch3x3": [(192, 1), (320, 3)], "branch7x7x3": seven}, "max", stride=2)
        self.Mixed_7b, self.Mixed_7c = _mixed_e(1280, "avg"), _mixed_e(2048, "max")  # "max": a slip of TensorFlow's
        self.fc = nn.Linear(2048, 1008)      # the classifier, in the file but unused

    @staticmethod
    def load(path: str | os.PathLike, device: str | torch.device = "cpu") -> "Inception":
        """Read weights-inception-2015-12-05-6726825d.pth or pytorch-fid's pt_inception-2015-12-05-6726825d.pth."""
        weights = open_official(path)
        named = {name: t for name, t in weights.items() if not name.endswith(".num_batches_tracked")}
        return filled(Inception, Weights(named, {}, weights.source), device)

    @torch.no_grad()
    def forward(self, images: Images) -> Tensor:
        """uint8 pictures -> (B, 2048), float32; resized as in TensorFlow 1 (torchmetrics from 1.8 on antialiases)."""
        weight = self.fc.weight
        x = torch.stack([tf1_resize(image.to(weight.device)) for image in checked(images)])
        x = ((x - 128) / 128).to(weight.dtype)                                          # (B, 3, 299, 299)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))               # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))               # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))          # (B, 288, 35, 35)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))  # (B, 768, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))                              # (B, 2048, 8, 8)
        return x.mean((2, 3)).float()


class Aesthetics(nn.Module):
    """The aesthetics head: five linear layers without activations, one affine map in effect; made by `load`."""

    def __init__(self):
        super().__init__()
        skip = nn.Identity()       # dropout, 1, 3 and 5 in the official names
        first = (nn.Linear(768, 1024), skip, nn.Linear(1024, 128), skip, nn.Linear(128, 64), skip)
        self.layers = nn.Sequential(*first, nn.Linear(64, 16), nn.Linear(16, 1))

    @staticmethod
    def load(path: str | os.PathLike, device: str | torch.device = "cpu") -> "Aesthetics":
        """Read sac+logos+ava1-l14-linearMSE.pth."""
        return filled(Aesthetics, open_official(path), device)

    def forward(self, embedding: Tensor) -> Tensor:
        """Embeddings of ViT-L/14 with crop "openai", (B, 768), normalised here -> scores (B,)."""
        return self.layers(F.normalize(embedding.float(), dim=1))[:, 0]


# Convolutions as (width, kernel, stride, padding), a ReLU after each, and pools as their kernel; the entries of
# torchvision's `features` after which features are compared; the least side, pixels, below which a pool is empty.
LPIPS_NETS = {
    "vgg": ([(64, 3, 1, 1)] * 2 + [2] + [(128, 3, 1, 1)] * 2 + [2] + [(256, 3, 1, 1)] * 3 + [2] + [(512, 3, 1, 1)] * 3
            + [2] + [(512, 3, 1, 1)] * 3, (3, 8, 15, 22, 29), 16),
    "alex": ([(64, 11, 4, 2), 3, (192, 5, 1, 2), 3, (384, 3, 1, 1), *[(256, 3, 1, 1)] * 2], (1, 4, 7, 9, 11), 31)}


class LPIPS(nn.Module):
    """Learned perceptual distance, version 0.1, on VGG-16 or AlexNet, differentiable; made by `load`."""

    def __init__(self, net: str):
        super().__init__()
        rows, self.taps, self.least = LPIPS_NETS[net]
        layers, channels = [], 3
        for row in rows:
            if isinstance(row, int):
                layers.append(nn.MaxPool2d(row, 2))
            else:
                layers += [nn.Conv2d(channels, *row), nn.ReLU(inplace=True)]
                channels = row[0]
        self.features = nn.Sequential(*layers)
        for i, tap in enumerate(self.taps):         # official name lin0.model.1.weight; model.0 is dropout
            lin = nn.Sequential(nn.Identity(), nn.Conv2d(layers[tap - 1].out_channels, 1, 1, bias=False))
            self.add_module(f"lin{i}", nn.ModuleDict({"model": lin}))

    @staticmethod
    def load(net: str, backbone_path: str | os.PathLike, lin_path: str | os.PathLike,
             device: str | torch.device = "cpu") -> "LPIPS":
        """Read torchvision's backbone, such as vgg16-397923af.pth for net "vgg", and lpips' weights, here vgg.pth."""
        if net not in LPIPS_NETS:
            raise ValueError(f"LPIPS on {net!r}: give one of {', '.join(LPIPS_NETS)}")
        backbone, lin = open_official(backbone_path), open_official(lin_path)
        weights = {name: t for name, t in backbone.items() if not name.startswith("classifier.")} | lin
        return filled(lambda: LPIPS(net), Weights(weights, {}, f"{backbone.source} and {lin.source}"), device)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Two batches of pictures (B, 3, H, W) in [-1, 1] -> distances (B,)."""
        if a.shape != b.shape or a.ndim != 4 or a.shape[1] != 3 or min(a.shape[2:]) < self.least:
            raise ValueError(f"pictures of shape {tuple(a.shape)} and {tuple(b.shape)}: LPIPS compares (B, 3, H, W) of "
                             f"the same size, sides of at least {self.least} pixels")
        shift, scale = (torch.tensor(rgb, device=a.device)[:, None, None] for rgb in (LPIPS_SHIFT, LPIPS_SCALE))
        a, b, distances = (a - shift) / scale, (b - shift) / scale, []
        for i, layer in enumerate(self.features):
            a = layer(a)        # one by one: three of the largest maps are in memory at a time, not four
            b = layer(b)
            if i in self.taps:
                weight = self.get_submodule(f"lin{len(distances)}").model[1].weight
                distances.append(_weighted_distance(a, b, weight))
        return sum(distances)


def _weighted_distance(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Squared difference of channel-normalised features (B, C, h, w), weighted by channel, spatial mean -> (B,)."""
    sums = []
    for x, y in zip(a.split(128, 2), b.split(128, 2), strict=True):     # strips of rows: no second copy of a large map
        difference = F.normalize(x, dim=1, eps=1e-10) - F.normalize(y, dim=1, eps=1e-10)
        sums.append((difference.square_() * weight.view(1, -1, 1, 1)).sum((1, 2, 3)))
    return sum(sums) / (a.shape[2] * a.shape[3])
