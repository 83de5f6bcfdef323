"""CLIP, image and text tower, from OpenAI's or Hugging Face's files; CLIPScore.

Paper    Diffusion-4K section 4.2: CLIPScore by ViT-B/16; Aesthetics rests on ViT-L/14
Mirrors  transformers CLIPModel, openai/CLIP, torchmetrics' CLIPScore; tested against them by tests/test_clip.py
Output   embeddings (B, P), not normalised; CLIPScore 0 to 100, higher is better
Shapes   B pictures, D tower width, L patches + 1, P embedding width; widths and depths are read from the tensors
"""

import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from checkpoint import LazyTensor, Weights, read_json
from scores.official import open_official
from scores.perceptual import Images, clip_pixels, filled
from text import CLIPAttention, CLIPLayer, CLIPText, CLIPTokenizer

UNUSED = re.compile(r"logit_scale|input_resolution|context_length|vocab_size|.*attn_mask|.*\.position_ids")
KIND = "CLIP with a vision transformer, such as openai/clip-vit-base-patch16 and openai/clip-vit-large-patch14"


# ---- the image tower; the text tower is text.CLIPText

class ViTAttention(CLIPAttention):
    """The text tower's attention without its mask."""

    def forward(self, x: Tensor) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (rearrange(project(x), "b l (h d) -> b h l d", h=self.num_heads) for project in projections)
        return self.out_proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h l d -> b l (h d)"))


class ViTEmbeddings(nn.Module):
    def __init__(self, width: int, patch: int, positions: int):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding(positions, width)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = rearrange(self.patch_embedding(pixels), "b d h w -> b (h w) d")
        first = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat((first, patches), 1) + self.position_embedding.weight


class CLIPImage(nn.Module):
    """CLIP's image tower and its projection; module names are transformers'. Made by `load`."""

    def __init__(self, width: int, mlp_width: int, depth: int, patch: int, side: int, num_heads: int, activation: str,
                 projection: int):
        super().__init__()
        self.size = patch * side
        layers = nn.ModuleList(CLIPLayer(width, mlp_width, num_heads, activation) for _ in range(depth))
        for layer in layers:
            layer.self_attn = ViTAttention(width, num_heads)
        self.vision_model = nn.ModuleDict({
            "embeddings": ViTEmbeddings(width, patch, side * side + 1), "encoder": nn.ModuleDict({"layers": layers}),
            "pre_layrnorm": nn.LayerNorm(width, eps=1e-5), "post_layernorm": nn.LayerNorm(width, eps=1e-5)})
        self.visual_projection = nn.Linear(width, projection, bias=False)

    @staticmethod
    def load(path: str | os.PathLike, device: str | torch.device = "cpu") -> "CLIPImage":
        """Read OpenAI's ViT-B-16.pt or ViT-L-14.pt, or a folder or file of Hugging Face's clip-vit-base-patch16."""
        return image_tower(read_towers(path), device)

    def forward(self, pixels: Tensor) -> Tensor:
        """Preprocessed pixels (B, 3, size, size) -> embeddings (B, P)."""
        vision = self.vision_model
        x = vision.pre_layrnorm(vision.embeddings(pixels))           # (B, L, D)
        for layer in vision.encoder.layers:
            x = layer(x)
        return self.visual_projection(vision.post_layernorm(x[:, 0]))

    @torch.no_grad()
    def embed(self, images: Images, crop: str = "transformers") -> Tensor:
        """uint8 pictures -> embeddings (B, P); `crop` as in clip_pixels."""
        return self(clip_pixels(images, self.size, crop).to(self.visual_projection.weight))


# ---- names and files: OpenAI's name -> transformers' name, of a tensor or of its module

BLOCKS = {"visual.transformer.resblocks": "vision_model.encoder.layers",
          "transformer.resblocks": "text_model.encoder.layers"}
IN_BLOCK = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
            "attn.in_proj": "self_attn.{}_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
OUTSIDE = {"visual.class_embedding": "vision_model.embeddings.class_embedding",
           "visual.conv1": "vision_model.embeddings.patch_embedding",
           "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
           "visual.ln_pre": "vision_model.pre_layrnorm",
           "visual.ln_post": "vision_model.post_layernorm",
           "token_embedding": "text_model.embeddings.token_embedding",
           "positional_embedding": "text_model.embeddings.position_embedding.weight",
           "ln_final": "text_model.final_layer_norm"}
TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}


def transformers_names(weights: Weights) -> dict[str, LazyTensor]:
    """Tensors under transformers' names, whichever the file has; in_proj is q, k and v stacked on dimension 0."""
    renamed = {}
    for name, tensor in weights.items():
        stem, _, leaf = name.rpartition(".")
        if block := re.fullmatch(r"(.*resblocks)\.(\d+)\.(.+?)[._](weight|bias)", name):
            tower, number, part, leaf = block.groups()
            new = f"{BLOCKS.get(tower, tower)}.{number}.{IN_BLOCK.get(part, part)}.{leaf}"
            if part != "attn.in_proj":
                renamed[new] = tensor
                continue
            for i, letter in enumerate("qkv"):
                shape = (tensor.shape[0] // 3, *tensor.shape[1:])
                renamed[new.format(letter)] = LazyTensor(shape, lambda t=tensor, i=i: t.read().chunk(3)[i])
        elif name in TRANSPOSED:
            renamed[TRANSPOSED[name]] = LazyTensor(tensor.shape[::-1], lambda t=tensor: t.read().T)
        elif stem in OUTSIDE:
            renamed[f"{OUTSIDE[stem]}.{leaf}"] = tensor
        else:
            renamed[OUTSIDE.get(name, name)] = tensor
    return renamed


class Towers(NamedTuple):
    """The tensors of each tower under transformers' names, and config.json, empty if there is none."""

    image: Weights
    text: Weights
    config: dict


def read_towers(path: str | os.PathLike) -> Towers:
    """Open a CLIP; ValueError if it holds other tensors, or the towers' embeddings differ in width."""
    path = Path(path)
    file = (path if path.is_dir() else path.parent) / "config.json"
    config = read_json(file) if file.is_file() and path.suffix != ".pt" else {}
    weights = open_official(path)
    tensors = {name: t for name, t in transformers_names(weights).items() if not UNUSED.fullmatch(name)}
    image = {name: t for name, t in tensors.items() if name.startswith(("vision_model.", "visual_projection."))}
    text = {name: t for name, t in tensors.items() if name.startswith(("text_model.", "text_projection."))}
    if unknown := sorted(tensors.keys() - image.keys() - text.keys()):
        raise ValueError(f"{weights.source}: {len(unknown)} unknown: {', '.join(unknown[:4])}: not a {KIND}")
    rows = [tensors[name].shape[0] for name in TRANSPOSED.values() if name in tensors]
    if len(set(rows)) > 1:
        raise ValueError(f"{weights.source}: visual_projection.weight has {rows[0]} rows, text_projection.weight "
                         f"{rows[1]}: not one CLIP")
    return Towers(*(Weights(tower, weights.metadata, weights.source) for tower in (image, text)), config)


def _blocks(weights: Weights, prefix: str, width: int, config: dict) -> tuple[int, int, int, str]:
    """MLP width, depth, heads and activation; width / 64 heads and quick GELU unless config.json has others."""
    mlp_width, _ = weights.shape_of(f"{prefix}0.mlp.fc1.weight", 2, KIND)
    heads, activation = int(config.get("num_attention_heads", width // 64)), config.get("hidden_act", "quick_gelu")
    if heads < 1 or width % heads or activation not in ("quick_gelu", "gelu"):
        raise ValueError(f"{weights.source}: {heads} heads of width {width} with {activation}: not a CLIP")
    return mlp_width, weights.depth(prefix), heads, activation


def image_tower(towers: Towers, device: str | torch.device) -> CLIPImage:
    weights, config = towers.image, towers.config.get("vision_config") or towers.config
    width, _, patch, _ = weights.shape_of("vision_model.embeddings.patch_embedding.weight", 4, KIND)
    positions, _ = weights.shape_of("vision_model.embeddings.position_embedding.weight", 2, KIND)
    projection, _ = weights.shape_of("visual_projection.weight", 2, KIND)
    mlp_width, depth, heads, activation = _blocks(weights, "vision_model.encoder.layers.", width, config)
    sizes = width, mlp_width, depth, patch, math.isqrt(positions - 1)
    return filled(lambda: CLIPImage(*sizes, heads, activation, projection), weights, device)


def text_tower(towers: Towers, eos: int, device: str | torch.device) -> CLIPText:
    weights, config = towers.text, towers.config.get("text_config") or {}
    vocabulary, width = weights.shape_of("text_model.embeddings.token_embedding.weight", 2, KIND)
    positions, _ = weights.shape_of("text_model.embeddings.position_embedding.weight", 2, KIND)
    projection, _ = weights.shape_of("text_projection.weight", 2, KIND)
    blocks = _blocks(weights, "text_model.encoder.layers.", width, config)
    return filled(lambda: CLIPText(vocabulary, positions, width, *blocks, eos, projection), weights, device)


# ---- the score

def clip_score(image: Tensor, text: Tensor) -> Tensor:
    """CLIPScore of pairs: max(0, 100 · cosine of the embeddings). (B, P) and (B, P) -> (B,)."""
    return (100 * F.cosine_similarity(image, text)).clamp(min=0)


class CLIP:
    """Both towers and the tokenizer of one CLIP. Made by `load`."""

    def __init__(self, image: CLIPImage, text: CLIPText, tokenizer: CLIPTokenizer):
        self.image, self.text, self.tokenizer = image, text, tokenizer

    @staticmethod
    def load(path: str | os.PathLike, tokenizer: str | os.PathLike | None = None,
             device: str | torch.device = "cpu") -> "CLIP":
        """Read a complete CLIP; `path` as in CLIPImage.load.

        tokenizer  folder of CLIP's vocabulary, by default that of `path`; tokenizer/ of SD3 or Flux has the same
        """
        path, towers = Path(path), read_towers(path)
        tokenizer = CLIPTokenizer.load(tokenizer or (path if path.is_dir() else path.parent))
        rows, _ = towers.text.shape_of("text_model.embeddings.token_embedding.weight", 2, KIND)
        if tokenizer.size > rows:
            raise ValueError(f"{path}: the tokenizer has {tokenizer.size} words, the text tower {rows}: not one CLIP")
        return CLIP(image_tower(towers, device), text_tower(towers, tokenizer.eos, device), tokenizer)

    @torch.no_grad()
    def embed(self, captions: Iterable[str]) -> Tensor:
        """Captions -> embeddings (B, P). A caption over 77 tokens is cut, with a warning, and keeps its end token."""
        tokens = self.tokenizer(captions, self.text.length)
        return self.text(tokens.to(self.text.text_projection.weight.device))[2]

    def score(self, images: Images, captions: Sequence[str]) -> Tensor:
        """CLIPScore of each picture with its caption, (B,)."""
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} pictures and {len(captions)} captions: CLIPScore needs one per picture")
        return clip_score(self.image.embed(images).float(), self.embed(captions).float())
