"""Tensor names of diffusers to official names, for SD3, Flux and their autoencoders.

Mirrors   SD3Transformer2DModel, FluxTransformer2DModel and AutoencoderKL of diffusers; the official checkpoints
Check     python -m pytest tests/test_names.py: names and shapes of every published file
Tables    {i}, {j}   any number, the same on both sides       {last}     the highest number in its place
          {coder}    encoder, decoder                         {last-i}   counted from the other end
          {attn}     attn, attn2                              {q}        q, k, v
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class Row:
    """One tensor, or one module with its tensors, in both layouts.

    how  swap_halves  exchange the halves of dimension 0: (scale, shift) in diffusers, (shift, scale) officially
         as_1x1_conv  a linear weight (C, C) is officially a convolution (C, C, 1, 1)
    """

    official: str
    parts: tuple[str, ...]  # names in diffusers; several are stacked along dimension 0 in the official file
    how: str = ""


def official_names(names: Collection[str], file: str) -> list[Row]:
    """What each official tensor of a file is made of; names that are official already, or unknown, stay as they are.
    ValueError if a part of a stacked tensor is missing."""
    table = next((table for prefix, table in TABLES if any(name.startswith(prefix) for name in names)), ())
    rest, rows = dict.fromkeys(names), []
    for row in plain_rows(table, names):
        for tail in TAILS:
            parts = tuple(part + tail for part in row.parts)
            missing = [part for part in parts if part not in rest]
            if len(missing) == len(parts):
                continue
            if missing:
                raise ValueError(f"{file}: {len(missing)} missing: {', '.join(missing)}; "
                                 f"{next(part for part in parts if part in rest)} is there")
            rows.append(Row(row.official + tail, parts, row.how))
            for part in parts:
                del rest[part]
    return rows + [Row(name, (name,)) for name in rest]


def plain_rows(rows: Iterable[Row], names: Collection[str]) -> Iterator[Row]:
    """The rows with all numbers filled in: those that occur in `names`, which are official or of diffusers."""
    numbers = sorted({int(part) for name in names for part in name.split(".") if part.isdecimal()})
    choices = {"coder": ("encoder", "decoder"), "attn": ("attn", "attn2"), "q": "qkv", "i": numbers, "j": numbers}
    for row in rows:
        last = max(depth(names, side.partition("{")[0]) for side in (row.official, row.parts[0])) - 1
        keys = [key for key in choices if "{" + key + "}" in row.parts[0]]
        for values in product(*(choices[key] for key in keys)):
            fields = dict(zip(keys, values, strict=True)) | {"last": last}
            fields["last-i"] = last - fields.get("i", 0)
            yield Row(row.official.format_map(fields), tuple(part.format_map(fields) for part in row.parts), row.how)


def depth(names: Iterable[str], prefix: str) -> int:
    """How many numbered blocks there are under a prefix such as "double_blocks."."""
    numbers = (name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix))
    return 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)


def _row(official: str, diffusers: str, parts: tuple[str, ...] = ("",), how: str = "") -> Row:
    return Row(official, tuple(diffusers + part for part in parts), how)


# A row stands for its name with each of these endings; the first row that fits is taken.
TAILS = ("", ".weight", ".bias", ".norm1.weight", ".norm1.bias", ".conv1.weight", ".conv1.bias",
         ".norm2.weight", ".norm2.bias", ".conv2.weight", ".conv2.bias")
QKV, ADDED_QKV = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")

SD3_NAMES = (
    _row("pos_embed",                                            "pos_embed.pos_embed"),
    _row("x_embedder.proj",                                      "pos_embed.proj"),
    _row("t_embedder.mlp.0",                                     "time_text_embed.timestep_embedder.linear_1"),
    _row("t_embedder.mlp.2",                                     "time_text_embed.timestep_embedder.linear_2"),
    _row("y_embedder.mlp.0",                                     "time_text_embed.text_embedder.linear_1"),
    _row("y_embedder.mlp.2",                                     "time_text_embed.text_embedder.linear_2"),
    _row("context_embedder",                                     "context_embedder"),
    _row("joint_blocks.{i}.x_block.adaLN_modulation.1",          "transformer_blocks.{i}.norm1.linear"),
    _row("joint_blocks.{i}.x_block.{attn}.qkv",                  "transformer_blocks.{i}.{attn}.", QKV),
    _row("joint_blocks.{i}.x_block.{attn}.ln_{q}",               "transformer_blocks.{i}.{attn}.norm_{q}"),
    _row("joint_blocks.{i}.x_block.{attn}.proj",                 "transformer_blocks.{i}.{attn}.to_out.0"),
    _row("joint_blocks.{i}.x_block.mlp.fc1",                     "transformer_blocks.{i}.ff.net.0.proj"),
    _row("joint_blocks.{i}.x_block.mlp.fc2",                     "transformer_blocks.{i}.ff.net.2"),
    _row("joint_blocks.{last}.context_block.adaLN_modulation.1",
         "transformer_blocks.{last}.norm1_context.linear", how="swap_halves"),
    _row("joint_blocks.{i}.context_block.adaLN_modulation.1",    "transformer_blocks.{i}.norm1_context.linear"),
    _row("joint_blocks.{i}.context_block.attn.qkv",              "transformer_blocks.{i}.attn.", ADDED_QKV),
    _row("joint_blocks.{i}.context_block.attn.ln_{q}",           "transformer_blocks.{i}.attn.norm_added_{q}"),
    _row("joint_blocks.{i}.context_block.attn.proj",             "transformer_blocks.{i}.attn.to_add_out"),
    _row("joint_blocks.{i}.context_block.mlp.fc1",               "transformer_blocks.{i}.ff_context.net.0.proj"),
    _row("joint_blocks.{i}.context_block.mlp.fc2",               "transformer_blocks.{i}.ff_context.net.2"),
    _row("final_layer.adaLN_modulation.1",                       "norm_out.linear", how="swap_halves"),
    _row("final_layer.linear",                                   "proj_out"))

FLUX_NAMES = (
    _row("img_in",                                           "x_embedder"),
    _row("txt_in",                                           "context_embedder"),
    _row("time_in.in_layer",                                 "time_text_embed.timestep_embedder.linear_1"),
    _row("time_in.out_layer",                                "time_text_embed.timestep_embedder.linear_2"),
    _row("vector_in.in_layer",                               "time_text_embed.text_embedder.linear_1"),
    _row("vector_in.out_layer",                              "time_text_embed.text_embedder.linear_2"),
    _row("guidance_in.in_layer",                             "time_text_embed.guidance_embedder.linear_1"),
    _row("guidance_in.out_layer",                            "time_text_embed.guidance_embedder.linear_2"),
    _row("double_blocks.{i}.img_mod.lin",                    "transformer_blocks.{i}.norm1.linear"),
    _row("double_blocks.{i}.img_attn.qkv",                   "transformer_blocks.{i}.attn.", QKV),
    _row("double_blocks.{i}.img_attn.norm.query_norm.scale", "transformer_blocks.{i}.attn.norm_q.weight"),
    _row("double_blocks.{i}.img_attn.norm.key_norm.scale",   "transformer_blocks.{i}.attn.norm_k.weight"),
    _row("double_blocks.{i}.img_attn.proj",                  "transformer_blocks.{i}.attn.to_out.0"),
    _row("double_blocks.{i}.img_mlp.0",                      "transformer_blocks.{i}.ff.net.0.proj"),
    _row("double_blocks.{i}.img_mlp.2",                      "transformer_blocks.{i}.ff.net.2"),
    _row("double_blocks.{i}.txt_mod.lin",                    "transformer_blocks.{i}.norm1_context.linear"),
    _row("double_blocks.{i}.txt_attn.qkv",                   "transformer_blocks.{i}.attn.", ADDED_QKV),
    _row("double_blocks.{i}.txt_attn.norm.query_norm.scale", "transformer_blocks.{i}.attn.norm_added_q.weight"),
    _row("double_blocks.{i}.txt_attn.norm.key_norm.scale",   "transformer_blocks.{i}.attn.norm_added_k.weight"),
    _row("double_blocks.{i}.txt_attn.proj",                  "transformer_blocks.{i}.attn.to_add_out"),
    _row("double_blocks.{i}.txt_mlp.0",                      "transformer_blocks.{i}.ff_context.net.0.proj"),
    _row("double_blocks.{i}.txt_mlp.2",                      "transformer_blocks.{i}.ff_context.net.2"),
    _row("single_blocks.{i}.modulation.lin",                 "single_transformer_blocks.{i}.norm.linear"),
    _row("single_blocks.{i}.linear1",
         "single_transformer_blocks.{i}.", (*(f"attn.{part}" for part in QKV), "proj_mlp")),
    _row("single_blocks.{i}.linear2",                        "single_transformer_blocks.{i}.proj_out"),
    _row("single_blocks.{i}.norm.query_norm.scale",          "single_transformer_blocks.{i}.attn.norm_q.weight"),
    _row("single_blocks.{i}.norm.key_norm.scale",            "single_transformer_blocks.{i}.attn.norm_k.weight"),
    _row("final_layer.adaLN_modulation.1",                   "norm_out.linear", how="swap_halves"),
    _row("final_layer.linear",                               "proj_out"))

VAE_NAMES = (
    _row("{coder}.conv_in",                            "{coder}.conv_in"),
    _row("{coder}.norm_out",                           "{coder}.conv_norm_out"),
    _row("{coder}.conv_out",                           "{coder}.conv_out"),
    _row("{coder}.mid.block_1",                        "{coder}.mid_block.resnets.0"),
    _row("{coder}.mid.block_2",                        "{coder}.mid_block.resnets.1"),
    _row("{coder}.mid.attn_1.norm",                    "{coder}.mid_block.attentions.0.group_norm"),
    _row("{coder}.mid.attn_1.{q}",                     "{coder}.mid_block.attentions.0.to_{q}", how="as_1x1_conv"),
    _row("{coder}.mid.attn_1.proj_out",                "{coder}.mid_block.attentions.0.to_out.0", how="as_1x1_conv"),
    _row("encoder.down.{i}.block.{j}",                 "encoder.down_blocks.{i}.resnets.{j}"),
    _row("encoder.down.{i}.block.{j}.nin_shortcut",    "encoder.down_blocks.{i}.resnets.{j}.conv_shortcut"),
    _row("encoder.down.{i}.downsample.conv",           "encoder.down_blocks.{i}.downsamplers.0.conv"),
    _row("decoder.up.{last-i}.block.{j}",              "decoder.up_blocks.{i}.resnets.{j}"),
    _row("decoder.up.{last-i}.block.{j}.nin_shortcut", "decoder.up_blocks.{i}.resnets.{j}.conv_shortcut"),
    _row("decoder.up.{last-i}.upsample.conv",          "decoder.up_blocks.{i}.upsamplers.0.conv"))

# how names of diffusers begin, table
TABLES = (("pos_embed.", SD3_NAMES), ("single_transformer_blocks.", FLUX_NAMES),
          (("decoder.up_blocks.", "encoder.down_blocks."), VAE_NAMES))
