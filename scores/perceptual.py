"""Networks that judge pictures: Inception-v3 for FID, CLIP for CLIPScore and Aesthetics, LPIPS. Only metrics need them.

Paper     Diffusion-4K sections 3.1 and 4.2: FID, CLIPScore, Aesthetics; rFID and LPIPS of the partitioned VAE
Mirrors   torch-fidelity FeatureExtractorInceptionV3 · transformers CLIPModel and its image processor, openai/CLIP ·
          improved-aesthetic-predictor MLP · richzhang/PerceptualSimilarity LPIPS 0.1; held by tests/test_perceptual.py
Networks  network           input                                      output                     better
          Inception         uint8, any size, to 299x299 as TF1 does    (B, 2048) features         FID: lower
          CLIP              uint8, any size, to 224x224 as Pillow      (B, P) embeddings          CLIPScore 0…100: higher
          Aesthetics        CLIP ViT-L/14 embedding (B, 768)           (B,), about 1…10           higher
          LPIPS             two images in [-1, 1], the same size       (B,), 0 for equal images   lower
          Widths and depths of CLIP are read from the tensors.
Images    uint8 (B, 3, H, W), or a list of (3, H, W) that may differ in size; resizing is part of each network
Shapes    B pictures, H and W their pixels, D tower width, L patches + 1, P width that both towers of CLIP are projected to
Weights   the official files, listed in WEIGHTS; official.py reads them without running code in them; nothing is downloaded
Check     python -m pytest tests/test_perceptual.py
"""

import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from checkpoint import LazyTensor, Weights, fill, read_json
from scores.official import WEIGHTS as WEIGHTS
from scores.official import find_weights as find_weights
from scores.official import open_official
from text import CLIPAttention, CLIPLayer, CLIPText, CLIPTokenizer

Images = Tensor | Sequence[Tensor]
INCEPTION_SIDE = 299
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP_UNUSED = re.compile(r"logit_scale|input_resolution|context_length|vocab_size|.*attn_mask|.*\.position_ids")
AESTHETICS_WIDTHS = (768, 1024, 128, 64, 16, 1)
LPIPS_SHIFT, LPIPS_SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


# Pictures

def _checked(images: Images) -> Images:
    for image in images:
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or min(image.shape) < 1:
            raise ValueError(f"a picture of shape {tuple(image.shape)} and {image.dtype}: give uint8 pictures, (B, 3, H, W) or a list of "
                             "(3, H, W)")
    if not len(images):
        raise ValueError("no pictures given")
    return images


def resize_crop(images: Images, size: int) -> Tensor:
    """What the release does to a picture before FID: short side to `size`, centre crop; the network then resizes to 299.

    images   uint8 pictures
    returns  uint8 (B, 3, size, size)
    source   torchvision.transforms.functional: resize (bilinear, antialias) and center_crop of uint8 tensors
    """
    made = []
    for image in _checked(images):
        height, width = image.shape[1:]
        to = (size, int(size * width / height)) if height <= width else (int(size * height / width), size)
        if to != (height, width):
            large = F.interpolate(image[None].float(), to, mode="bilinear", align_corners=False, antialias=True)
            image = large.round().to(torch.uint8)[0]
        top, left = (round((side - size) / 2) for side in to)      # halves go to the even side
        made.append(image[:, top:top + size, left:left + size])
    return torch.stack(made)


def tf1_resize(image: Tensor, size: int = INCEPTION_SIDE) -> Tensor:
    """Bilinear as TensorFlow 1 does it: output i looks at i * (side / size), no antialias. uint8 (3, H, W) -> float (3, size, size)."""
    def places(side):
        at = torch.arange(size, dtype=torch.float32, device=image.device) * torch.tensor(side / size, dtype=torch.float32)
        low = at.long()
        return low, (low + 1).clamp(max=side - 1), at - low.float()

    (top, bottom, dy), (left, right, dx) = places(image.shape[1]), places(image.shape[2])
    rows = []
    for row in (image[:, top], image[:, bottom]):       # (3, size, W), still uint8: a 4096x4096 picture is never made float
        a, b = row[:, :, left].float(), row[:, :, right].float()
        rows.append(a + (b - a) * dx)
    return rows[0] + (rows[1] - rows[0]) * dy[:, None]


def clip_pixels(images: Images, size: int = 224, crop: str = "transformers") -> Tensor:
    """CLIP's preprocessing: Pillow's bicubic on uint8, short side to `size`, centre crop, CLIP's mean and deviation.

    images   uint8 pictures
    crop     half of an odd margin: "transformers" (torchmetrics' CLIPScore) rounds it down, "openai" (the aesthetics predictor)
             to even; one pixel apart, if at all
    returns  float (B, 3, size, size), on the CPU
    """
    if crop not in ("transformers", "openai"):
        raise ValueError(f'crop {crop!r}: "transformers" or "openai"')
    made = []
    for image in _checked(images):
        height, width = image.shape[1:]
        to = (size, int(size * width / height)) if height <= width else (int(size * height / width), size)
        small = np.asarray(Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).resize(to[::-1], Image.Resampling.BICUBIC))
        top, left = ((side - size) // 2 if crop == "transformers" else round((side - size) / 2) for side in to)
        made.append(torch.tensor(small[top:top + size, left:left + size]).permute(2, 0, 1))
    pixels = torch.stack(made).float() / 255
    mean, deviation = (torch.tensor(three)[:, None, None] for three in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / deviation


# Inception-v3

class BasicConv2d(nn.Module):
    def __init__(self, channels: int, width: int, kernel: int | tuple[int, int], stride: int = 1, pad: bool = True):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = tuple(k // 2 for k in kernel) if pad and stride == 1 else 0
        self.conv = nn.Conv2d(channels, width, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=1e-3)
        del self.bn.num_batches_tracked      # counts training steps; some copies of the file have it, some do not

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side, concatenated in the order given, the pooled one last.

    branches  name -> convolutions run in a row, (width, kernel) each; official names are `name`, or `name_1`, `name_2`, … if there
              are several; in the last place a pair of them, `name_3a` and `name_3b`, both see the same input
    pool      "avg" or "max"; pool_width is the width of its 1x1 convolution, none if 0
    stride    2 halves the map: the last convolution of every branch and the pool
    """

    def __init__(self, channels: int, branches: dict[str, list], pool: str, pool_width: int = 0, stride: int = 1):
        super().__init__()
        self.pool, self.stride, self.rows = pool, stride, []
        for name, layers in branches.items():
            width, row = channels, []
            for i, layer in enumerate(layers):
                step = stride if i == len(layers) - 1 else 1
                names = [name if len(layers) == 1 else f"{name}_{i + 1}"]
                if isinstance(layer[0], tuple):
                    names = [names[0] + "a", names[0] + "b"]
                for full, (out, kernel) in zip(names, layer if len(names) == 2 else [layer], strict=True):
                    self.add_module(full, BasicConv2d(width, out, kernel, step))
                width, row = layer[0], [*row, names]
            self.rows.append(row)
        self.branch_pool = BasicConv2d(channels, pool_width, 1) if pool_width else None

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for row in self.rows:
            y = x
            for names in row:
                y = torch.cat([self.get_submodule(name)(y) for name in names], 1)
            found.append(y)
        if self.pool == "avg":
            y = F.avg_pool2d(x, 3, 1, padding=1, count_include_pad=False)      # TensorFlow leaves the padding out of the mean
        else:
            y = F.max_pool2d(x, 3, self.stride, padding=1 if self.stride == 1 else 0)
        return torch.cat((*found, y if self.branch_pool is None else self.branch_pool(y)), 1)


def _mixed_a(channels: int, pool_width: int) -> Mixed:
    return Mixed(channels, {"branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]},
                 "avg", pool_width)


def _mixed_c(w: int) -> Mixed:
    wide, tall = (1, 7), (7, 1)
    return Mixed(768, {"branch1x1": [(192, 1)], "branch7x7": [(w, 1), (w, wide), (192, tall)],
                       "branch7x7dbl": [(w, 1), (w, tall), (w, wide), (w, tall), (192, wide)]}, "avg", 192)


def _mixed_e(channels: int, pool: str) -> Mixed:
    fork = ((384, (1, 3)), (384, (3, 1)))
    return Mixed(channels, {"branch1x1": [(320, 1)], "branch3x3": [(384, 1), fork], "branch3x3dbl": [(448, 1), (384, 3), fork]}, pool, 192)


class Inception(nn.Module):
    """Inception-v3 as TensorFlow's 2015-12-05 graph has it, which FID is defined on. Made by `load`."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3, pad=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _mixed_a(192, 32), _mixed_a(256, 64), _mixed_a(288, 64)
        self.Mixed_6a = Mixed(288, {"branch3x3": [(384, 3)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}, "max", stride=2)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = _mixed_c(128), _mixed_c(160), _mixed_c(160), _mixed_c(192)
        self.Mixed_7a = Mixed(768, {"branch3x3": [(192, 1), (320, 3)], "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)]},
                              "max", stride=2)
        self.Mixed_7b = _mixed_e(1280, "avg")
        self.Mixed_7c = _mixed_e(2048, "max")       # the graph's own slip: max where every other block has the mean
        self.fc = nn.Linear(2048, 1008)             # of the classifier; the file has it, features stop before it

    @staticmethod
    def load(path: str | os.PathLike, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> "Inception":
        """Read weights-inception-2015-12-05-6726825d.pth or pytorch-fid's pt_inception-2015-12-05-6726825d.pth.

        raises  ValueError if names or shapes differ, torchvision's ImageNet weights included
        """
        weights = open_official(path)
        for name in [name for name in weights if name.endswith(".num_batches_tracked")]:
            del weights[name]
        with torch.device("meta"):
            inception = Inception()
        fill(inception.requires_grad_(False).eval(), weights, device, dtype)
        return inception

    @torch.no_grad()
    def forward(self, images: Images) -> Tensor:
        """uint8 pictures -> (B, 2048), float32; resized as TensorFlow 1 does (torchmetrics from 1.8 on antialiases instead)."""
        weight = self.fc.weight
        x = torch.stack([tf1_resize(image.to(weight.device)) for image in _checked(images)])
        x = ((x - 128) / 128).to(weight.dtype)                                          # (B, 3, 299, 299)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))               # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))               # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))          # (B, 288, 35, 35)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))    # (B, 768, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))                              # (B, 2048, 8, 8)
        return x.mean((2, 3)).float()


# CLIP

class ViTAttention(CLIPAttention):
    """The text tower's, without its mask: every patch sees all."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(p(x), "b l (h d) -> b h l d", h=self.num_heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h l d -> b l (h d)"))


class ViTLayer(CLIPLayer):
    def __init__(self, width: int, mlp_width: int, num_heads: int, activation: str):
        super().__init__(width, mlp_width, num_heads, activation)
        self.self_attn = ViTAttention(width, num_heads)


class ViTEmbeddings(nn.Module):
    def __init__(self, width: int, patch: int, positions: int):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding(positions, width)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = rearrange(self.patch_embedding(pixels), "b d h w -> b (h w) d")
        return torch.cat((self.class_embedding.expand(len(pixels), 1, -1), patches), 1) + self.position_embedding.weight


class CLIPImage(nn.Module):
    """CLIP's image tower with its projection, ViT-B/16 or ViT-L/14; module names are transformers'. Made by `load`."""

    def __init__(self, width: int, mlp_width: int, depth: int, patch: int, side: int, num_heads: int, activation: str, projection: int):
        super().__init__()
        self.size = patch * side
        layers = nn.ModuleList(ViTLayer(width, mlp_width, num_heads, activation) for _ in range(depth))
        self.vision_model = nn.ModuleDict({
            "embeddings": ViTEmbeddings(width, patch, side * side + 1), "pre_layrnorm": nn.LayerNorm(width, eps=1e-5),
            "encoder": nn.ModuleDict({"layers": layers}), "post_layernorm": nn.LayerNorm(width, eps=1e-5)})
        self.visual_projection = nn.Linear(width, projection, bias=False)

    @staticmethod
    def load(path: str | os.PathLike, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> "CLIPImage":
        """Read the image tower of a CLIP.

        path    OpenAI's ViT-B-16.pt or ViT-L-14.pt, or clip-vit-base-patch16/, clip-vit-large-patch14/ of Hugging Face
                (folder or file)
        dtype   None is float32, in which torchmetrics computes; OpenAI's archives hold float16
        raises  ValueError if names or shapes differ from CLIP's
        """
        return _image_tower(*_clip_weights(path)[::2], device, dtype)

    def forward(self, pixels: Tensor) -> Tensor:
        """Preprocessed pixels (B, 3, size, size) -> embeddings (B, P), not normalised."""
        vision = self.vision_model
        x = vision.pre_layrnorm(vision.embeddings(pixels))           # (B, L, D)
        for layer in vision.encoder.layers:
            x = layer(x)
        return self.visual_projection(vision.post_layernorm(x[:, 0]))

    @torch.no_grad()
    def embed(self, images: Images, crop: str = "transformers") -> Tensor:
        """uint8 pictures -> embeddings (B, P), not normalised; `crop` as in clip_pixels."""
        return self(clip_pixels(images, self.size, crop).to(self.visual_projection.weight))


# One row a tensor or module: OpenAI's name, how (if not as it is), transformers' name.
#   #      a number          @   weight or bias          T   transposed          {q,k,v}   thirds of dimension 0
CLIP_NAMES = """\
visual.class_embedding                              vision_model.embeddings.class_embedding
visual.conv1.weight                                 vision_model.embeddings.patch_embedding.weight
visual.positional_embedding                         vision_model.embeddings.position_embedding.weight
visual.ln_pre.@                                     vision_model.pre_layrnorm.@
visual.transformer.resblocks.#.ln_1.@               vision_model.encoder.layers.#.layer_norm1.@
visual.transformer.resblocks.#.attn.in_proj_@       vision_model.encoder.layers.#.self_attn.{q,k,v}_proj.@
visual.transformer.resblocks.#.attn.out_proj.@      vision_model.encoder.layers.#.self_attn.out_proj.@
visual.transformer.resblocks.#.ln_2.@               vision_model.encoder.layers.#.layer_norm2.@
visual.transformer.resblocks.#.mlp.c_fc.@           vision_model.encoder.layers.#.mlp.fc1.@
visual.transformer.resblocks.#.mlp.c_proj.@         vision_model.encoder.layers.#.mlp.fc2.@
visual.ln_post.@                                    vision_model.post_layernorm.@
visual.proj                                     T   visual_projection.weight
token_embedding.weight                              text_model.embeddings.token_embedding.weight
positional_embedding                                text_model.embeddings.position_embedding.weight
transformer.resblocks.#.ln_1.@                      text_model.encoder.layers.#.layer_norm1.@
transformer.resblocks.#.attn.in_proj_@              text_model.encoder.layers.#.self_attn.{q,k,v}_proj.@
transformer.resblocks.#.attn.out_proj.@             text_model.encoder.layers.#.self_attn.out_proj.@
transformer.resblocks.#.ln_2.@                      text_model.encoder.layers.#.layer_norm2.@
transformer.resblocks.#.mlp.c_fc.@                  text_model.encoder.layers.#.mlp.fc1.@
transformer.resblocks.#.mlp.c_proj.@                text_model.encoder.layers.#.mlp.fc2.@
ln_final.@                                          text_model.final_layer_norm.@
text_projection                                 T   text_projection.weight"""


def _transformers_names(weights: Weights) -> Weights:
    """OpenAI's names to transformers'; others stay as they are."""
    rows = []
    for row in CLIP_NAMES.splitlines():
        ours, *how, theirs = row.split()
        pattern = re.escape(ours).replace(r"\#", r"(\d+)").replace("@", "(weight|bias)")
        rows.append((re.compile(pattern), how, theirs))
    renamed = {}
    for name, tensor in weights.items():
        found, how, theirs = next(((m, how, new) for old, how, new in rows if (m := old.fullmatch(name))), (None, [], name))
        for part in found.groups() if found else ():
            theirs = re.sub("[#@]", part, theirs, count=1)
        if how:
            renamed[theirs] = LazyTensor(tensor.shape[::-1], lambda t=tensor: t.read().T)
        elif "{" in theirs:
            for i, letter in enumerate("qkv"):
                shape = (tensor.shape[0] // 3, *tensor.shape[1:])
                renamed[theirs.replace("{q,k,v}", letter)] = LazyTensor(shape, lambda t=tensor, i=i: t.read().chunk(3)[i])
        else:
            renamed[theirs] = tensor
    return Weights(renamed, weights.metadata, weights.source)


def _clip_weights(path: str | os.PathLike) -> tuple[Weights, Weights, dict]:
    """Image tower and text tower under transformers' names, and what config.json says, if there is one."""
    path = Path(path)
    config = (path if path.is_dir() else path.parent) / "config.json"
    said = read_json(config) if config.is_file() and path.suffix != ".pt" else {}
    weights, sides = _transformers_names(open_official(path)), {"vi": {}, "te": {}}
    unknown = []
    for name, tensor in weights.items():
        if CLIP_UNUSED.fullmatch(name):
            continue
        if name.startswith(("vision_model.", "visual_projection.", "text_model.", "text_projection.")):
            sides[name[:2]][name] = tensor
        else:
            unknown.append(name)
    image, text = (Weights(side, weights.metadata, weights.source) for side in sides.values())
    if unknown:
        raise ValueError(f"{weights.source}: {len(unknown)} unknown: {', '.join(sorted(unknown)[:4])}: not a CLIP with a "
                         "vision transformer; openai/clip-vit-base-patch16 and openai/clip-vit-large-patch14 are")
    ends = [weights[name].shape[0] for name in ("visual_projection.weight", "text_projection.weight") if name in weights]
    if len(set(ends)) > 1:
        raise ValueError(f"{weights.source}: visual_projection.weight has {ends[0]} rows, text_projection.weight {ends[1]}: not one CLIP")
    return image, text, said


def _size(weights: Weights, name: str, dims: int) -> tuple[int, ...]:
    shape = weights[name].shape if name in weights else ()
    if len(shape) != dims:
        found = f"has shape {tuple(shape)}, expected {dims} dimensions" if name in weights else "is missing"
        raise ValueError(f"{weights.source}: {name} {found}: not a CLIP with a vision transformer, or a damaged file")
    return tuple(shape)


def _tower(weights: Weights, prefix: str, width: int, said: dict) -> tuple[int, int, str]:
    """Depth, heads and activation of a tower; heads are width / 64 and the activation quick GELU unless config.json says otherwise."""
    numbers = [int(name.removeprefix(prefix).split(".")[0]) for name in weights if name.startswith(prefix)]
    heads, activation = int(said.get("num_attention_heads", width // 64)), said.get("hidden_act", "quick_gelu")
    if heads < 1 or width % heads or activation not in ("quick_gelu", "gelu"):
        raise ValueError(f"{weights.source}: {heads} heads of width {width} with {activation}: not a CLIP")
    return 1 + max(numbers, default=-1), heads, activation


def _image_tower(weights: Weights, said: dict, device: str | torch.device, dtype: torch.dtype | None) -> CLIPImage:
    said = said.get("vision_config") or said
    width, _, patch, _ = _size(weights, "vision_model.embeddings.patch_embedding.weight", 4)
    positions, _ = _size(weights, "vision_model.embeddings.position_embedding.weight", 2)
    mlp_width, _ = _size(weights, "vision_model.encoder.layers.0.mlp.fc1.weight", 2)
    projection, _ = _size(weights, "visual_projection.weight", 2)
    depth, heads, activation = _tower(weights, "vision_model.encoder.layers.", width, said)
    with torch.device("meta"):
        tower = CLIPImage(width, mlp_width, depth, patch, math.isqrt(positions - 1), heads, activation, projection)
    fill(tower.requires_grad_(False).eval(), weights, device, dtype)
    return tower


def _text_tower(weights: Weights, said: dict, eos: int, device: str | torch.device, dtype: torch.dtype | None) -> CLIPText:
    vocabulary, width = _size(weights, "text_model.embeddings.token_embedding.weight", 2)
    positions, _ = _size(weights, "text_model.embeddings.position_embedding.weight", 2)
    mlp_width, _ = _size(weights, "text_model.encoder.layers.0.mlp.fc1.weight", 2)
    projection, _ = _size(weights, "text_projection.weight", 2)
    depth, heads, activation = _tower(weights, "text_model.encoder.layers.", width, said.get("text_config") or {})
    with torch.device("meta"):
        tower = CLIPText(vocabulary, positions, width, mlp_width, depth, heads, activation, eos, projection)
    fill(tower.requires_grad_(False).eval(), weights, device, dtype)
    return tower


def clip_score(image: Tensor, text: Tensor) -> Tensor:
    """CLIPScore of pairs: 100 times the cosine of embeddings, at least 0. (B, P) and (B, P) -> (B,)."""
    return (100 * F.cosine_similarity(image, text)).clamp(min=0)


class CLIP:
    """Both towers and the tokenizer of one CLIP. Made by `load`."""

    def __init__(self, image: CLIPImage, text: CLIPText, tokenizer: CLIPTokenizer):
        self.image, self.text, self.tokenizer = image, text, tokenizer

    @staticmethod
    def load(path: str | os.PathLike, tokenizer: str | os.PathLike | None = None, device: str | torch.device = "cpu",
             dtype: torch.dtype | None = None) -> "CLIP":
        """Read a whole CLIP.

        path       as in CLIPImage.load
        tokenizer  folder with CLIP's vocabulary; None takes the folder of `path`. OpenAI's archives have none: the tokenizer/
                   of SD3 or Flux is the same vocabulary
        """
        path = Path(path)
        image, text, said = _clip_weights(path)
        tokenizer = CLIPTokenizer.load(tokenizer or (path if path.is_dir() else path.parent))
        rows, _ = _size(text, "text_model.embeddings.token_embedding.weight", 2)
        if tokenizer.size > rows:
            raise ValueError(f"{path}: {tokenizer.size} words in the vocabulary, {rows} in the text tower: they do not belong together")
        return CLIP(_image_tower(image, said, device, dtype), _text_tower(text, said, tokenizer.eos, device, dtype), tokenizer)

    @torch.no_grad()
    def embed(self, captions: Iterable[str]) -> Tensor:
        """Captions -> embeddings (B, P). One of more than 77 tokens loses its tail, with a warning, and keeps its end token."""
        tokens = self.tokenizer(captions, self.text.length)
        return self.text(tokens.to(self.text.text_projection.weight.device))[2]

    def score(self, images: Images, captions: Sequence[str]) -> Tensor:
        """CLIPScore of each picture with its caption, (B,)."""
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} pictures and {len(captions)} captions: CLIPScore needs one for each")
        return clip_score(self.image.embed(images).float(), self.embed(captions).float())


# Aesthetics

class Aesthetics(nn.Module):
    """The linear aesthetics head; five layers without anything between them, one affine map in effect. Made by `load`."""

    def __init__(self):
        super().__init__()
        a, b, c, d, e, f = AESTHETICS_WIDTHS       # dropout takes numbers 1, 3 and 5 in the official names, and does nothing here
        self.layers = nn.Sequential(nn.Linear(a, b), nn.Identity(), nn.Linear(b, c), nn.Identity(), nn.Linear(c, d), nn.Identity(),
                                    nn.Linear(d, e), nn.Linear(e, f))

    @staticmethod
    def load(path: str | os.PathLike, device: str | torch.device = "cpu") -> "Aesthetics":
        """Read sac+logos+ava1-l14-linearMSE.pth; ValueError if names or shapes differ."""
        with torch.device("meta"):
            head = Aesthetics()
        fill(head.requires_grad_(False).eval(), open_official(path), device)
        return head

    def forward(self, embedding: Tensor) -> Tensor:
        """Embeddings of ViT-L/14, `embed(images, crop="openai")` (B, 768), normalised here -> scores (B,)."""
        return self.layers(F.normalize(embedding.float(), dim=1))[:, 0]


# LPIPS

# convolutions as (width, kernel, stride, padding), a pool as its kernel; a ReLU follows each convolution. The features that
# are compared: after these entries of torchvision's `features`.
LPIPS_NETS = {
    "vgg": ([(64, 3, 1, 1)] * 2 + [2] + [(128, 3, 1, 1)] * 2 + [2] + [(256, 3, 1, 1)] * 3 + [2] + [(512, 3, 1, 1)] * 3 + [2]
            + [(512, 3, 1, 1)] * 3, (3, 8, 15, 22, 29)),
    "alex": ([(64, 11, 4, 2), 3, (192, 5, 1, 2), 3, (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1)], (1, 4, 7, 9, 11)),
}
LPIPS_SIDES = {"vgg": 16, "alex": 31}       # smaller pictures vanish in the pools


class LPIPS(nn.Module):
    """Learned perceptual distance, version 0.1, on VGG-16 or AlexNet. Made by `load`. Differentiable in both pictures."""

    def __init__(self, net: str):
        super().__init__()
        rows, self.taps = LPIPS_NETS[net]
        self.net, layers, channels, widths = net, [], 3, []
        for row in rows:
            if isinstance(row, int):
                layers.append(nn.MaxPool2d(row, 2))
                continue
            width, kernel, stride, padding = row
            layers += [nn.Conv2d(channels, width, kernel, stride, padding), nn.ReLU(inplace=True)]
            if len(layers) - 1 in self.taps:
                widths.append(width)
            channels = width
        self.features = nn.Sequential(*layers)
        for i, width in enumerate(widths):          # official name lin0.model.1.weight; model.0 is dropout
            self.add_module(f"lin{i}", nn.ModuleDict({"model": nn.Sequential(nn.Identity(), nn.Conv2d(width, 1, 1, bias=False))}))

    @staticmethod
    def load(net: str, backbone_path: str | os.PathLike, lin_path: str | os.PathLike, device: str | torch.device = "cpu") -> "LPIPS":
        """Read a backbone of torchvision and the weights of lpips for it.

        net            "vgg" or "alex"
        backbone_path  vgg16-397923af.pth or alexnet-owt-7be5be79.pth; its classifier is left out
        lin_path       lpips' vgg.pth or alex.pth, v0.1
        raises         ValueError if names or shapes differ
        """
        if net not in LPIPS_NETS:
            raise ValueError(f"LPIPS on {net!r}: there are {', '.join(LPIPS_NETS)}")
        backbone, lin = open_official(backbone_path), open_official(lin_path)
        weights = {name: t for name, t in backbone.items() if not name.startswith("classifier.")} | lin
        with torch.device("meta"):
            lpips = LPIPS(net)
        fill(lpips.requires_grad_(False).eval(), Weights(weights, {}, f"{backbone.source} and {lin.source}"), device)
        return lpips

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Two batches of pictures (B, 3, H, W) in [-1, 1] -> distances (B,)."""
        least = LPIPS_SIDES[self.net]
        if a.shape != b.shape or a.ndim != 4 or a.shape[1] != 3 or min(a.shape[2:]) < least:
            raise ValueError(f"pictures of shape {tuple(a.shape)} and {tuple(b.shape)}: LPIPS compares (B, 3, H, W) of the same size, "
                             f"at least {least} pixels a side")
        shift, scale = (torch.tensor(three, device=a.device)[:, None, None] for three in (LPIPS_SHIFT, LPIPS_SCALE))
        a, b, total, level = (a - shift) / scale, (b - shift) / scale, 0, 0
        for i, layer in enumerate(self.features):
            a = layer(a)        # one after the other: of the largest maps three are alive at a time, not four
            b = layer(b)
            if i in self.taps:
                weight = self.get_submodule(f"lin{level}").model[1].weight
                total, level = total + _weighted_distance(a, b, weight), level + 1
        return total


def _weighted_distance(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Squared difference of channel-normalised features (B, C, h, w), weighed by channel, mean over places -> (B,)."""
    total = 0
    for x, y in zip(a.split(128, 2), b.split(128, 2), strict=True):     # strips of rows: no second copy of a large map
        difference = F.normalize(x, dim=1, eps=1e-10) - F.normalize(y, dim=1, eps=1e-10)
        total = total + (difference.square_() * weight.view(1, -1, 1, 1)).sum((1, 2, 3))
    return total / (a.shape[2] * a.shape[3])
