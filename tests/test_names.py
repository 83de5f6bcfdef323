"""Names: those of every published file, from diffusers to the official layout and back."""

from pathlib import Path

import pytest
import torch
from golden import diffusers_names, lazy, lazy_tensors, published, published_map, shapes_of

from names import Row, check, official_names

FAMILIES = {  # names in diffusers: official file, prefix in it
    "sd3_medium": ("sd3_medium", "model.diffusion_model."), "sd3.5_medium": ("sd3.5_medium", "model.diffusion_model."),
    "sd3.5_large": ("sd3.5_large", "model.diffusion_model."), "flux1-dev": ("flux1-dev", ""),
    "vae_sd3": ("sd3_medium", "first_stage_model."), "vae_flux": ("ae", "")}


def on_meta(shapes: dict) -> dict:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_names_and_shapes_become_exactly_the_official_ones_and_go_back(family):
    theirs, ours = published(f"{family}.diffusers"), published(*FAMILIES[family])
    assert shapes_of(lazy(theirs).with_official_names()) == ours
    assert shapes_of(diffusers_names(on_meta(ours))) == theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_lands_where_the_published_map_says(family):
    entries = published_map(family)
    rows = {name: torch.tensor([[2 * i], [2 * i + 1]]) for i, name in enumerate(entries)}  # two rows stand for a tensor
    expected = {}
    for name, (official, _, op) in sorted(entries.items(), key=lambda item: item[1][1] or [0]):
        piece = rows[name].flip(0) if op == "swap_halves" else rows[name]
        expected.setdefault(official.removeprefix(FAMILIES[family][1]), []).extend(piece.flatten().tolist())
    official = lazy_tensors(rows).with_official_names()
    assert {name: t.read().flatten().tolist() for name, t in official.items()} == expected


def test_transformer_without_guidance_goes_to_diffusers_and_back():
    ours = published("flux1-schnell")
    theirs = diffusers_names(on_meta(ours))
    guidance = {name for name in published("flux1-dev.diffusers") if "guidance" in name}
    assert guidance and theirs.keys() == published("flux1-dev.diffusers").keys() - guidance
    assert shapes_of(lazy_tensors(theirs).with_official_names()) == ours


def test_rows_name_the_parts_and_what_is_done_with_them():
    qkv = tuple(f"transformer_blocks.0.attn.to_{x}.weight" for x in "qkv")
    names = ["pos_embed.pos_embed", *qkv, "norm_out.linear.weight", "transformer_blocks.1.norm1_context.linear.bias",
             "transformer_blocks.0.norm1_context.linear.bias"]
    assert sorted(official_names(names, "a file"), key=lambda row: row.official) == [
        Row("final_layer.adaLN_modulation.1.weight", ("norm_out.linear.weight",), "swap_halves"),
        Row("joint_blocks.0.context_block.adaLN_modulation.1.bias", (names[-1],)),
        Row("joint_blocks.0.x_block.attn.qkv.weight", qkv),
        Row("joint_blocks.1.context_block.adaLN_modulation.1.bias", (names[-2],), "swap_halves"),  # the last block
        Row("pos_embed", ("pos_embed.pos_embed",))]


def test_decoder_levels_are_counted_from_the_other_end():
    levels = {f"decoder.up.{2 - i}.block.{j}.conv1.weight": f"decoder.up_blocks.{i}.resnets.{j}.conv1.weight"
              for i in range(3) for j in range(2)}
    rows = official_names(list(levels.values()), "a file")
    assert {row.official: row.parts for row in rows} == {official: (theirs,) for official, theirs in levels.items()}


def test_official_transformers_and_unknown_names_stay():
    for names in (["joint_blocks.0.x_block.attn.qkv.weight", "context_embedder.weight", "pos_embed"],
                  ["text_model.encoder.layers.0.mlp.fc1.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"]):
        assert official_names(names, "a file") == [Row(name, (name,)) for name in names]
    unknown = ["pos_embed.pos_embed", "transformer_blocks.0.attn.to_q.lora_A.weight"]
    assert [row.official for row in official_names(unknown, "a file")] == ["pos_embed", unknown[1]]


def test_incomplete_qkv_is_refused_by_name():
    names = ["pos_embed.pos_embed", *(f"transformer_blocks.7.attn.to_{x}.weight" for x in "qv")]
    with pytest.raises(ValueError, match="^a file: 1 missing: transformer_blocks.7.attn.to_k.weight; .*to_q.weight is"):
        official_names(names, "a file")


def test_names_do_not_decide_how_long_translation_takes():
    names = ["pos_embed.pos_embed", "transformer_blocks.99999999999.attn.to_out.0.weight"]
    assert official_names(names, "a file")[-1].official == "joint_blocks.99999999999.x_block.attn.proj.weight"


def test_absurdly_many_block_numbers_are_refused():
    """The rows of the table are multiplied by them."""
    with pytest.raises(ValueError, match="^a file: 129 different numbers in its tensors' names; at most 128 are read$"):
        official_names([f"decoder.up_blocks.{i}.x" for i in range(129)], "a file")


@pytest.mark.parametrize("stored, message", [
    ({"a\x1b]0;x\x07": "F32"}, r"a tensor's name has control characters .* \(a\\x1b\]0;x\\x07 ...\): download"),
    ({"a" * 301: "F32"}, "more than 300 letters"), ({"a.weight": "U8"}, "a.weight is stored as U8, which is no number"),
    ({"b.bias": "BOOL"}, "b.bias is stored as BOOL"),
    ({"a.scale": "I8"}, "a.scale is stored as I8"), ({"a.weight": "F8_E8M0"}, "a.weight is stored as F8_E8M0"),
    (dict.fromkeys(map(str, range(100_001)), "F32"), "100001 tensors; at most 100000 are read")])
def test_headers_that_no_published_file_has_are_refused(stored, message):
    with pytest.raises(ValueError, match=f"^a file: .*{message}"):
        check(Path("a file"), stored)


def test_integers_beside_weights_are_no_weights():
    check(Path("a file"), {"embeddings.position_ids": "I64", "bn.num_batches_tracked": "I64", "a.weight": "F16"})
