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

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from checkpoint import LazyTensor, Weights
from files import entry, read_json
from scores.official import open_official
from scores.perceptual import Images, clip_pixels, filled
from text import CLIPLayer, CLIPText, CLIPTokenizer

UNUSED = re.compile(r"logit_scale|input_resolution|context_length|vocab_size|.*attn_mask|.*\.position_ids")
KIND = "CLIP with a vision transformer, such as openai/clip-vit-base-patch16 and openai/clip-vit-large-patch14"


# ---- the image tower; the text tower is text.CLIPText

class CLIPImage(nn.Module):
    """CLIP's image tower and its projection; module names are transformers'. Made by `load`."""

    def __init__(self, width: int, mlp_width: int, depth: int, patch: int, side: int, num_heads: int, activation: str,
                 projection: int):
        super().__init__()
        self.size = patch * side
        layers = nn.ModuleList(CLIPLayer(width, mlp_width, num_heads, activation, causal=False) for _ in range(depth))
        embeddings = nn.ModuleDict({"patch_embedding": nn.Conv2d(3, width, patch, stride=patch, bias=False),
                                    "position_embedding": nn.Embedding(side * side + 1, width)})
        embeddings.class_embedding = nn.Parameter(torch.empty(width))
        self.vision_model = nn.ModuleDict({
            "embeddings": embeddings, "encoder": nn.ModuleDict({"layers": layers}),
            "pre_layrnorm": nn.LayerNorm(width, eps=1e-5), "post_layernorm": nn.LayerNorm(width, eps=1e-5)})
        self.visual_projection = nn.Linear(width, projection, bias=False)

    @staticmethod
    def load(path: str | os.PathLike, device: str | torch.device = "cpu") -> "CLIPImage":
        """Read OpenAI's ViT-B-16.pt or ViT-L-14.pt, or a folder or file of Hugging Face's clip-vit-base-patch16."""
        return CLIPImage.of(read_towers(path)[0], device)

    @staticmethod
    def of(weights: Weights, device: str | torch.device) -> "CLIPImage":
        """The tower with these tensors; width / 64 heads unless the metadata has others."""
        layers = "vision_model.encoder.layers."
        width, _, patch, _ = weights.shape_of("vision_model.embeddings.patch_embedding.weight", 4, KIND)
        positions, _ = weights.shape_of("vision_model.embeddings.position_embedding.weight", 2, KIND)
        projection, _ = weights.shape_of("visual_projection.weight", 2, KIND)
        mlp_width, _ = weights.shape_of(f"{layers}0.mlp.fc1.weight", 2, KIND)
        heads = weights.number("num_attention_heads", otherwise=width // 64, integer=True)
        activation = weights.metadata["hidden_act"]
        if heads < 1 or width % heads or activation not in ("quick_gelu", "gelu"):
            raise ValueError(f"{weights.source}: {heads} heads of width {width} with {activation}: not a CLIP")
        sizes = width, mlp_width, weights.depth(layers), patch, math.isqrt(positions - 1)
        return filled(lambda: CLIPImage(*sizes, heads, activation, projection), weights, device)

    def forward(self, pixels: Tensor) -> Tensor:
        """Preprocessed pixels (B, 3, size, size) -> embeddings (B, P)."""
        vision, embeddings = self.vision_model, self.vision_model.embeddings
        patches = rearrange(embeddings.patch_embedding(pixels), "b d h w -> b (h w) d")
        x = torch.cat((embeddings.class_embedding.expand(len(pixels), 1, -1), patches), 1)
        x = vision.pre_layrnorm(x + embeddings.position_embedding.weight)  # (B, L, D)
        for layer in vision.encoder.layers:
            x = layer(x)
        return self.visual_projection(vision.post_layernorm(x[:, 0]))

    @torch.no_grad()
    def embed(self, images: Images, crop: str = "transformers") -> Tensor:
        """uint8 pictures -> embeddings (B, P); `crop` as in clip_pixels."""
        return self(clip_pixels(images, self.size, crop).to(self.visual_projection.weight))


# ---- names and files

NAMES = (  # OpenAI's -> transformers', as regular expressions
    (r"^visual\.transformer\.resblocks", "vision_model.encoder.layers"),
    (r"^transformer\.resblocks", "text_model.encoder.layers"),
    (r"\.ln_(1|2)\.", r".layer_norm\1."), (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.attn\.in_proj_", ".self_attn.{}_proj."), (r"\.mlp\.c_fc\.", ".mlp.fc1."), (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."), (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."))
TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}


def transformers_names(weights: Weights) -> dict[str, LazyTensor]:
    """Tensors under transformers' names, whichever the file has; in_proj is q, k and v stacked on dimension 0."""
    renamed = {}
    for name, tensor in weights.items():
        new = name
        for pattern, replacement in NAMES:
            new = re.sub(pattern, replacement, new)
        if name in TRANSPOSED:
            renamed[TRANSPOSED[name]] = LazyTensor(tensor.shape[::-1], lambda t=tensor: t.read().T)
        elif "{}" in new:
            shape = (tensor.shape[0] // 3, *tensor.shape[1:])
            for i, letter in enumerate("qkv"):
                renamed[new.format(letter)] = LazyTensor(shape, lambda t=tensor, i=i: t.read().chunk(3)[i])
        else:
            renamed[new] = tensor
    return renamed


def read_towers(path: str | os.PathLike) -> list[Weights]:
    """The image and the text tower, under transformers' names; ValueError if they are not of one such CLIP.

    The metadata of each has its heads and its activation: quick GELU unless config.json has another.
    """
    path = Path(path)
    file = (path if path.is_dir() else path.parent) / "config.json"
    config = read_json(file) if file.is_file() and path.suffix != ".pt" else {}
    weights = open_official(path)
    tensors = {name: t for name, t in transformers_names(weights).items() if not UNUSED.fullmatch(name)}
    towers = []
    for key, prefixes in (("vision_config", ("vision_model.", "visual_projection.")),
                          ("text_config", ("text_model.", "text_projection."))):
        records = {"hidden_act": "quick_gelu"} | (entry(config, key, dict, file) if config.get(key) else config)
        metadata = {name: str(records[name]) for name in ("hidden_act", "num_attention_heads") if name in records}
        own = {name: t for name, t in tensors.items() if name.startswith(prefixes)}
        towers.append(Weights(own, metadata, weights.source))
    if unknown := sorted(tensors.keys() - towers[0].keys() - towers[1].keys()):
        raise ValueError(f"{weights.source}: {len(unknown)} unknown: {', '.join(unknown[:4])}: not a {KIND}")
    rows = [tensors[name].shape[0] for name in TRANSPOSED.values() if name in tensors]
    if len(set(rows)) > 1:
        raise ValueError(f"{weights.source}: {' and '.join(TRANSPOSED.values())} have {rows} rows: not one CLIP")
    return towers


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
        path, (image, text) = Path(path), read_towers(path)
        text.shape_of("text_projection.weight", 2, KIND)  # other text encoders may lack it
        tokenizer = CLIPTokenizer.load(tokenizer or (path if path.is_dir() else path.parent))
        clip = CLIP(CLIPImage.of(image, device), CLIPText.load(text, eos=tokenizer.eos, device=device), tokenizer)
        if tokenizer.size > (rows := clip.text.vocabulary):
            raise ValueError(f"{path}: the tokenizer has {tokenizer.size} words, the text tower {rows}: not one CLIP")
        return clip

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
