"""Prompt to conditioning: CLIP-L, OpenCLIP bigG and T5-XXL, and how SD3 and Flux combine their outputs.

Paper     Diffusion-4K sections 4.1 and 9: the text encoders stay frozen; embeddings are computed once and cached
Mirrors   sd3-ref SDClipModel, SDXLClipG, T5XXLModel; flux HFEmbedder; transformers CLIPTextModel, T5EncoderModel
Check     python -m pytest tests/test_text.py: outputs beside theirs
Encoders  file     width  depth  heads  activation   length     pad     pooled   (official; sizes come from the file)
          clip_l   768    12     12     quick GELU   77         49407   unprojected in SD3 and Flux
          clip_g   1280   32     20     exact GELU   77         0       projected
          t5xxl    4096   24     64     gated GELU   77 … 512   0       none
Padding   is attended: CLIP has a causal mask only, T5 has none. The empty prompt is encoded like any other
Shapes    B prompts, L tokens, W width, P projected width; token ids are int64
"""

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from checkpoint import FLUX_DOWNLOAD, SD3_DOWNLOAD, Device, Filled, LazyTensor, Weights, filled, open_weights
from tokenizer import CLIPTokenizer, T5Tokenizer, check_prompts

DEPTHS = {768: 12, 1280: 32, 4096: 24}  # of the official encoders, by their width
EOS = 49407            # last id of CLIP's vocabulary
LEGACY_EOS = 2         # what old config.json files of CLIP record, wrongly
CLIP_UNUSED = ("text_model.embeddings.position_ids", "logit_scale")  # in re-exports: 0, 1, 2, … and a temperature
T5_LENGTH = 77         # tokens, SD3's in training and evaluation; a small T5's metadata may record another "length"
T5_MOST = 512          # tokens: Flux-dev's length, and the longest that T5 was trained on
T5_MAX_DISTANCE = 128  # relative positions beyond it share the last bucket
T5_UNUSED = "decoder.", "lm_head."  # of a complete T5
T5_OTHERS = (("encoder.block.0.layer.1.DenseReluDense.wi.weight", "a T5 v1.0, whose MLPs have no gate"),
             ("encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight", "a UMT5"))
MOST_PADDING = 1024    # embeddings without a word; T5 XXL has 28
T5_DOWNLOAD = f"SD3 and Flux take T5 v1.1 XXL, {SD3_DOWNLOAD} has it under text_encoders/"
T5_FILES = "t5xxl_fp16.safetensors", "t5xxl_bf16.safetensors"  # preferred to fp8, which has fewer digits


# ---- CLIP

class CLIPAttention(nn.Module):
    def __init__(self, width: int, num_heads: int, causal: bool):
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(project(x), "b l (h d) -> b h l d", h=self.num_heads)
                   for project in (self.q_proj, self.k_proj, self.v_proj))
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(rearrange(x, "b h l d -> b l (h d)"))


class CLIPLayer(nn.Module):
    """A layer of CLIP's text tower; without the causal mask, of its image tower."""

    def __init__(self, width: int, mlp_width: int, num_heads: int, activation: str, causal: bool = True):
        super().__init__()
        self.activation = activation
        self.layer_norm1 = nn.LayerNorm(width, eps=1e-5)
        self.self_attn = CLIPAttention(width, num_heads, causal)
        self.layer_norm2 = nn.LayerNorm(width, eps=1e-5)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, mlp_width), "fc2": nn.Linear(mlp_width, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        h = self.mlp.fc1(self.layer_norm2(x))
        h = h * torch.sigmoid(1.702 * h) if self.activation == "quick_gelu" else F.gelu(h)
        return x + self.mlp.fc2(h)


class CLIPText(nn.Module):
    """CLIP's text tower under its official module names; created by `load`."""

    def __init__(self, vocabulary: int, positions: int, width: int, mlp_width: int, depth: int, num_heads: int,
                 activation: str, eos: int, projection: int | None):
        super().__init__()
        self.eos, self.length, self.vocabulary = eos, positions, vocabulary
        embeddings = nn.ModuleDict({"token_embedding": nn.Embedding(vocabulary, width),
                                    "position_embedding": nn.Embedding(positions, width)})
        layers = nn.ModuleList(CLIPLayer(width, mlp_width, num_heads, activation) for _ in range(depth))
        self.text_model = nn.ModuleDict({"embeddings": embeddings, "encoder": nn.ModuleDict({"layers": layers}),
                                         "final_layer_norm": nn.LayerNorm(width, eps=1e-5)})
        self.text_projection = None if projection is None else nn.Linear(width, projection, bias=False)

    @classmethod
    def load(cls, path: str | os.PathLike | Weights, activation: str | None = None, num_heads: int | None = None,
             eos: int | None = None, device: Device = "cpu", dtype: torch.dtype | None = None) -> "CLIPText":
        """Read a CLIP text encoder. None takes the value that the file records, else the official one.

        path        clip_l.safetensors, clip_g.safetensors, a transformers folder, or opened Weights of one
        activation  "quick_gelu" or "gelu" (exact); official: quick_gelu at width 768, gelu otherwise
        num_heads   official: width / 64
        eos         id of the end token; official: 49407, the last id of the vocabulary
        raises      ValueError if names, shapes, heads or activation are not those of a CLIP text encoder
        """
        weights, kind = path if isinstance(path, Weights) else open_weights(path), "CLIP text encoder"
        if "embeddings.token_embedding.weight" in weights:  # transformers 5 saves CLIPTextModel without the prefix
            weights = Weights({f"text_model.{k}": t for k, t in weights.items()}, weights.metadata, weights.source)
        for name in CLIP_UNUSED:
            weights.pop(name, None)
        if any(name.startswith("vision_model.") for name in weights):
            raise ValueError(f"{weights.source}: holds CLIP's image encoder; give the text encoder alone")
        _expect(weights, "model_type", "clip_text_model", "clip")
        end = "text_projection.weight"
        if (matrix := weights.get("text_projection")) and end not in weights:  # OpenCLIP's, from width to projection
            del weights["text_projection"]
            weights[end] = LazyTensor(matrix.shape[::-1], lambda: matrix.read().T.contiguous())
        vocabulary, _ = weights.shape_of("text_model.embeddings.token_embedding.weight", 2, kind)
        width, = weights.shape_of("text_model.final_layer_norm.weight", 1, kind)
        positions, _ = weights.shape_of("text_model.embeddings.position_embedding.weight", 2, kind)
        mlp_width, _ = weights.shape_of("text_model.encoder.layers.0.mlp.fc1.weight", 2, kind)
        projection = weights.shape_of(end, 2, kind)[0] if end in weights else None
        num_heads = num_heads or weights.number("num_attention_heads", otherwise=width // 64, integer=True)
        if num_heads < 1 or width % num_heads:
            raise ValueError(f"{weights.source}: {num_heads} heads do not divide the width {width}; give num_heads")
        activation = activation or weights.metadata.get("hidden_act", "quick_gelu" if width == 768 else "gelu")
        if activation not in ("quick_gelu", "gelu"):
            raise ValueError(f'{weights.source}: activation {activation!r:.40}: a {kind} has "quick_gelu" or "gelu"')
        if eos is None:
            eos = weights.number("eos_token_id", otherwise=LEGACY_EOS, integer=True)
            eos = min(EOS, vocabulary - 1) if eos == LEGACY_EOS else eos
        weights.need(0 <= eos < vocabulary, "eos_token_id", eos, f"an id of its vocabulary, 0 to {vocabulary - 1}")
        depth = weights.depth("text_model.encoder.layers.", DEPTHS.get(width))
        sizes = vocabulary, positions, width, mlp_width, depth, num_heads, activation, eos, projection
        clip = filled(lambda: cls(*sizes), weights, device, dtype)
        return clip.requires_grad_(False).eval()

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode tokens (B, L); ValueError if L is above `self.length` or a row has no end token.

        returns  last (B, L, W), after the final norm; penultimate (B, L, W), before the last layer, not normed;
                 pooled (B, W), from the first end token, or (B, P) if the file has a text_projection
        """
        length = tokens.shape[1]
        if length > self.length:
            raise ValueError(f"{length} tokens: this CLIP has {self.length} positions; tokenize to {self.length}")
        embeddings, position = self.text_model.embeddings, torch.arange(length, device=tokens.device)
        penultimate = x = embeddings.token_embedding(tokens) + embeddings.position_embedding(position)
        for layer in self.text_model.encoder.layers:
            penultimate, x = x, layer(x)
        last = self.text_model.final_layer_norm(x)
        pooled = self.at_eos(last, tokens)
        return last, penultimate, pooled if self.text_projection is None else self.text_projection(pooled)

    def at_eos(self, last: Tensor, tokens: Tensor) -> Tensor:
        """The pooled vector (B, W) before projection: `last` at the first end token of each row."""
        is_eos = tokens == self.eos
        if not is_eos.any(dim=1).all():  # waits for the device: once per batch, and every prompt is encoded once
            raise ValueError(f"a row of tokens holds no end token {self.eos}; use its own tokenizer, or give eos")
        return last[torch.arange(len(tokens), device=last.device), is_eos.int().argmax(dim=1)]


# ---- T5

def t5_buckets(relative: Tensor, buckets: int = 32) -> Tensor:
    """Bucket of a relative position, key minus query: exact below buckets/4, then logarithmic; half for keys ahead."""
    half, exact = buckets // 2, buckets // 4
    distance = relative.abs()
    far = torch.log(distance.clamp(min=1).float() / exact) / math.log(T5_MAX_DISTANCE / exact) * (half - exact)
    far = (exact + far.long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, far) + (relative > 0) * half


class T5Attention(nn.Module):
    def __init__(self, width: int, inner: int, table: tuple[int, int] | None, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, width, bias=False)
        if table is not None:  # block 0 holds the table of all blocks
            self.relative_attention_bias = nn.Embedding(*table)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (rearrange(p(x), "b l (h d) -> b h l d", h=self.num_heads) for p in (self.q, self.k, self.v))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)  # T5 trained without 1/sqrt(head_dim)
        return self.o(rearrange(x, "b h l d -> b l (h d)"))


class T5Block(nn.Module):
    def __init__(self, width: int, inner: int, mlp_width: int, table: tuple[int, int] | None, num_heads: int):
        super().__init__()
        mlp = nn.ModuleDict({name: nn.Linear(width, mlp_width, bias=False) for name in ("wi_0", "wi_1")})
        mlp["wo"] = nn.Linear(mlp_width, width, bias=False)
        parts = {"SelfAttention": T5Attention(width, inner, table, num_heads)}, {"DenseReluDense": mlp}
        self.layer = nn.ModuleList(nn.ModuleDict(part | {"layer_norm": nn.RMSNorm(width, eps=1e-6)}) for part in parts)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        attention, feed_forward = self.layer
        x = x + attention.SelfAttention(attention.layer_norm(x), bias)
        h, mlp = feed_forward.layer_norm(x), feed_forward.DenseReluDense
        return x + mlp.wo(F.gelu(mlp.wi_0(h), approximate="tanh") * mlp.wi_1(h))


class T5Encoder(nn.Module):
    """T5 v1.1's encoder under its official module names; created by `load`."""

    def __init__(self, vocabulary: int, width: int, inner: int, mlp_width: int, depth: int, table: tuple[int, int],
                 length: int | None = None):
        super().__init__()
        self.width, self.length, self.vocabulary = width, length, vocabulary
        block = nn.ModuleList(T5Block(width, inner, mlp_width, None if i else table, table[1]) for i in range(depth))
        self.encoder = nn.ModuleDict({"embed_tokens": nn.Embedding(vocabulary, width), "block": block,
                                      "final_layer_norm": nn.RMSNorm(width, eps=1e-6)})

    @classmethod
    def load(cls, path: str | os.PathLike | Weights, device: Device = "cpu", dtype: torch.dtype | None = None,
             filled: Filled = filled) -> "T5Encoder":
        """Read the encoder of a T5 v1.1: t5xxl_*.safetensors, a transformers folder, or opened Weights of one.

        filled  how the module gets its weights
        raises  ValueError if names or shapes are not those of T5, or dtype is float16, in which it overflows
        """
        if dtype is torch.float16:
            raise ValueError("T5 overflows in float16; compute in bfloat16 or float32 (either reads a float16 file)")
        weights, kind = path if isinstance(path, Weights) else open_weights(path), "T5 encoder"
        for name in [name for name in weights if name.startswith(T5_UNUSED)]:
            del weights[name]
        _refuse_other_t5(weights)
        if shared := weights.pop("shared.weight", None):  # files hold the embedding under one name, the other, or both
            embedding = weights.setdefault("encoder.embed_tokens.weight", shared)
            if shared.shape != embedding.shape:
                raise ValueError(f"{weights.source}: shared.weight {shared.shape}, embed_tokens {embedding.shape}")
        first = "encoder.block.0.layer."
        vocabulary, _ = weights.shape_of("encoder.embed_tokens.weight", 2, kind)
        width, = weights.shape_of("encoder.final_layer_norm.weight", 1, kind)
        inner, _ = weights.shape_of(first + "0.SelfAttention.q.weight", 2, kind)
        mlp_width, _ = weights.shape_of(first + "1.DenseReluDense.wi_0.weight", 2, kind)
        table = weights.shape_of(first + "0.SelfAttention.relative_attention_bias.weight", 2, kind)
        weights.need(inner % table[1] == 0, f"{first}0.SelfAttention.q.weight", inner, f"a multiple of {table[1]} rows")
        weights.need(4 <= table[0] < 4 * T5_MAX_DISTANCE, f"{first}0.SelfAttention.relative_attention_bias.weight",
                     table[0], f"4 to {4 * T5_MAX_DISTANCE - 1} buckets")
        length = weights.number("length", integer=True)
        check_t5_length(length, f"{weights.source}: ")
        sizes = vocabulary, width, inner, mlp_width, weights.depth("encoder.block.", DEPTHS.get(width)), table
        return filled(lambda: cls(*sizes, length), weights, device, dtype).requires_grad_(False).eval()

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (B, L), of any L -> hidden (B, L, W) after the final norm. Padding is attended like any token."""
        rows, bias = self.encoder.embed_tokens(tokens).split(1), self.position_bias(tokens.shape[1])
        for block in self.encoder.block:  # its weights may be read just now; batched, a row's rounding would change
            rows = [block(x, bias) for x in rows]
        return self.encoder.final_layer_norm(torch.cat(rows))

    def position_bias(self, length: int) -> Tensor:
        """Relative position bias of the attention logits of every block: (1, heads, L queries, L keys)."""
        table = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        relative = torch.arange(length) - torch.arange(length)[:, None]  # on the CPU: a GPU rounds log() otherwise
        bias = table(t5_buckets(relative, table.num_embeddings).to(table.weight.device))
        return rearrange(bias, "q k h -> 1 h q k").contiguous()  # CUDA's fused attention needs a last stride of 1


def _refuse_other_t5(weights: Weights) -> None:
    """ValueError that names a relative of T5 v1.1, by its config.json or tensors."""
    _expect(weights, "model_type", "t5")
    _expect(weights, "feed_forward_proj", "gated-gelu")
    _expect(weights, "relative_attention_max_distance", str(T5_MAX_DISTANCE))
    if what := next((what for shows, what in T5_OTHERS if shows in weights), ""):
        raise ValueError(f"{weights.source}: is {what}; {T5_DOWNLOAD}")


def _expect(weights: Weights, key: str, *accepted: str) -> None:
    """ValueError if config.json or metadata record another value; none is fine."""
    if (value := weights.metadata.get(key, accepted[0])) not in accepted:
        raise ValueError(f"{weights.source}: records {key} {value!r:.40}, expected {' or '.join(accepted)}")


# ---- SD3 and Flux

def _load(encoder: type[CLIPText] | type[T5Encoder], source: Path | Weights, tokenizer: CLIPTokenizer | T5Tokenizer,
          **more: object) -> CLIPText | T5Encoder:
    """An encoder; ValueError if it has fewer embeddings than its tokenizer has words, or far more."""
    model, name = encoder.load(source, **more), source.source if isinstance(source, Weights) else source
    if not tokenizer.size <= model.vocabulary <= tokenizer.size + MOST_PADDING:
        raise ValueError(f"{name}: has {model.vocabulary} embeddings, its tokenizer {tokenizer.size} words")
    return model


def each(clip: CLIPText, tokens: Tensor) -> Iterable[Tensor]:
    """clip(tokens), one row at a time: batched, the rounding of a row would depend on the others."""
    return (torch.cat(parts) for parts in zip(*map(clip, tokens.split(1)), strict=True))


def check_t5_length(t5_length: int | None, source: str = "") -> None:
    """ValueError if a T5 length, from the command line or a file's metadata, is not 1 to 512 tokens; None passes."""
    if t5_length is not None and not 1 <= t5_length <= T5_MOST:
        raise ValueError(f"{source}T5 length {t5_length}: give 1 to {T5_MOST} tokens (SD3 {T5_LENGTH}, Flux-dev "
                         f"{T5_MOST}, Flux-schnell 256)")


def sd3_context(clip_l: Tensor, clip_g: Tensor, t5: Tensor) -> Tensor:
    """Join the tokens of the three encoders: channels of L and G, zero-padded to T5's width, then T5's tokens.

    clip_l, clip_g  penultimate, (B, L_clip, W_l) and (B, L_clip, W_g)
    t5              (B, L_t5, W), W at least W_l + W_g
    returns         (B, L_clip + L_t5, W)
    """
    clip = torch.cat((clip_l, clip_g), dim=-1)
    if clip.shape[-1] > t5.shape[-1]:
        raise ValueError(f"T5 is {t5.shape[-1]} wide, less than both CLIPs together ({clip.shape[-1]}): no SD3 set")
    return torch.cat((F.pad(clip, (0, t5.shape[-1] - clip.shape[-1])), t5), dim=1)


class SD3Text:
    """The three encoders and tokenizers of SD3; created by `load`."""

    def __init__(self, clip_l: CLIPText, clip_g: CLIPText, t5: T5Encoder, device: Device, t5_length: int,
                 tokenizers: tuple[CLIPTokenizer, CLIPTokenizer, T5Tokenizer]):
        self.clip_l, self.clip_g, self.t5, self.tokenizers = clip_l, clip_g, t5, tokenizers
        self.device, self.t5_length = device, t5_length

    @classmethod
    def load(cls, folder: str | os.PathLike, device: Device = "cpu", dtype: torch.dtype | None = None,
             t5_length: int | None = None, filled: Filled = filled) -> "SD3Text":
        """Read the encoders of a model folder.

        folder     text_encoders/{clip_l,clip_g,t5xxl*}.safetensors, or text_encoder/, text_encoder_2/, text_encoder_3/,
                   else inside sd3*.safetensors; and tokenizer/, tokenizer_2/, tokenizer_3/
        t5_length  T5 tokens, 1 to 512; None takes the "length" in the T5 file's metadata, else 77
        filled     how T5 gets its weights
        raises     FileNotFoundError that names the missing part and its download; ValueError on another t5_length
        """
        check_t5_length(t5_length)
        folder = Path(folder)
        to_l, to_g = CLIPTokenizer.load(folder / "tokenizer"), CLIPTokenizer.load(folder / "tokenizer_2")
        to_t5, sources = T5Tokenizer.load(folder / "tokenizer_3"), _sd3_encoders(folder)
        if to_l.pad != to_l.eos or to_g.pad == to_g.eos:  # all else in the two folders is the same
            raise ValueError(f"{folder}: tokenizer/ pads with id {to_l.pad}, tokenizer_2/ with {to_g.pad}, SD3's with "
                             f"{to_l.eos} and '!': exchanged, or not complete; {SD3_DOWNLOAD}-diffusers has both")
        clip_l, clip_g = (_load(CLIPText, source, to, eos=to.eos, device=device, dtype=dtype)
                          for source, to in zip(sources[:2], (to_l, to_g), strict=True))
        _check_clips(clip_l, clip_g, folder)
        t5 = _load(T5Encoder, sources[2], to_t5, device=device, dtype=dtype, filled=filled)
        return cls(clip_l, clip_g, t5, device, t5_length or t5.length or T5_LENGTH, (to_l, to_g, to_t5))

    @torch.no_grad()
    def encode(self, prompts: Iterable[str]) -> tuple[Tensor, Tensor]:
        """Prompts -> context (B, L_clip + t5_length, W), pooled (B, W_l + P_g); the empty string is a prompt."""
        prompts, (to_l, to_g, to_t5) = check_prompts(prompts), self.tokenizers
        tokens_l = to_l(prompts, self.clip_l.length).to(self.device)
        last, context_l, _ = each(self.clip_l, tokens_l)
        pooled_l = self.clip_l.at_eos(last, tokens_l)  # SD3 takes it unprojected, even if the file has a projection
        _, context_g, pooled_g = each(self.clip_g, to_g(prompts, self.clip_g.length).to(self.device))
        context_t5 = self.t5(to_t5(prompts, self.t5_length).to(self.device))
        return sd3_context(context_l, context_g, context_t5), torch.cat((pooled_l, pooled_g), dim=-1)


def _check_clips(clip_l: CLIPText, clip_g: CLIPText, folder: Path) -> None:
    """ValueError if the two are not SD3's: what one alone does not show."""
    widths = [clip.text_model.final_layer_norm.weight.shape[0] for clip in (clip_l, clip_g)]
    if widths[0] > widths[1]:
        raise ValueError(f"{folder}: its clip_l is {widths[0]} wide, its clip_g {widths[1]}: they are exchanged")
    if clip_l.length != clip_g.length:
        raise ValueError(f"{folder}: its clip_l takes {clip_l.length} tokens, its clip_g {clip_g.length}: SD3 joins "
                         "the two token by token, LongCLIP (248) is no part of it")
    if clip_g.text_projection is None:
        raise ValueError(f"{folder}: its clip_g has no text_projection.weight; {SD3_DOWNLOAD} has it in text_encoders/")


def _sd3_encoders(folder: Path) -> list[Path | Weights]:
    if (official := folder / "text_encoders").is_dir():
        t5 = [official / name for name in T5_FILES if (official / name).is_file()]
        t5 = t5 or sorted(official.glob("t5xxl*.safetensors")) or [official / T5_FILES[0]]
        if len(t5) > 1 and t5[0].name not in T5_FILES:
            raise ValueError(f"{official}: several could be T5 ({', '.join(f.name for f in t5)}): keep one")
        paths = official / "clip_l.safetensors", official / "clip_g.safetensors", t5[0]
        where = f"{SD3_DOWNLOAD} has it under text_encoders/"
    else:
        paths = folder / "text_encoder", folder / "text_encoder_2", folder / "text_encoder_3"
        where = f"{SD3_DOWNLOAD}-diffusers has it; or give {SD3_DOWNLOAD} with its text_encoders/"
    return _or_inside(paths, ("clip_l", "clip_g", "t5xxl"), sorted(folder.glob("sd3*.safetensors")), where)


def _or_inside(paths: Sequence[Path], parts: Sequence[str], files: list[Path], where: str) -> list[Path | Weights]:
    """The encoders at these paths; those that are not there, from inside the transformer's file, if it has them."""
    sources = [path if path.is_file() or any(path.glob("*.safetensors")) else None for path in paths]
    for weights in map(open_weights, files if None in sources else ()):
        for k, prefix in enumerate(f"text_encoders.{part}.transformer." for part in parts):
            if sources[k] is None and any(name.startswith(prefix) for name in weights):
                sources[k] = weights.part(prefix)
    if None in sources:
        nor = "".join(f", nor inside {file.name}" for file in files)
        raise FileNotFoundError(f"{paths[sources.index(None)]}: not found{nor}; {where}")
    return sources


class FluxText:
    """CLIP-L for the pooled vector, T5 for the tokens; created by `load`."""

    def __init__(self, clip: CLIPText, t5: T5Encoder, device: Device, t5_length: int,
                 tokenizers: tuple[CLIPTokenizer, T5Tokenizer]):
        self.clip, self.t5, self.tokenizers = clip, t5, tokenizers
        self.device, self.t5_length = device, t5_length

    @classmethod
    def load(cls, folder: str | os.PathLike, device: Device = "cpu", dtype: torch.dtype | None = None,
             t5_length: int | None = None, filled: Filled = filled) -> "FluxText":
        """Read text_encoder/ (CLIP-L), text_encoder_2/ (T5), else inside flux*.safetensors; tokenizer/, tokenizer_2/.

        t5_length, filled, errors as in SD3Text.load; its default is 512 (dev), while schnell has 256
        """
        folder = Path(folder)
        check_t5_length(t5_length)
        sources = _or_inside((folder / "text_encoder", folder / "text_encoder_2"), ("clip_l", "t5xxl"),
                             sorted(folder.glob("flux*.safetensors")), f"{FLUX_DOWNLOAD} has it")
        to_clip, to_t5 = CLIPTokenizer.load(folder / "tokenizer"), T5Tokenizer.load(folder / "tokenizer_2")
        clip = _load(CLIPText, sources[0], to_clip, eos=to_clip.eos, device=device, dtype=dtype)
        t5 = _load(T5Encoder, sources[1], to_t5, device=device, dtype=dtype, filled=filled)
        return cls(clip, t5, device, t5_length or t5.length or T5_MOST, (to_clip, to_t5))

    @torch.no_grad()
    def encode(self, prompts: Iterable[str]) -> tuple[Tensor, Tensor]:
        """Prompts -> context (B, t5_length, W), pooled (B, W_l), unprojected; the empty string is a prompt."""
        prompts, (to_clip, to_t5) = check_prompts(prompts), self.tokenizers
        tokens = to_clip(prompts, self.clip.length).to(self.device)
        last, *_ = each(self.clip, tokens)
        return self.t5(to_t5(prompts, self.t5_length).to(self.device)), self.clip.at_eos(last, tokens)
