"""Weights: names of every published file, layouts, storage dtypes, refusals in one line, files written whole or not at all."""

import json
import os
import resource
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from golden import published, published_map
from safetensors.torch import load_file, save_file
from torch import nn

import checkpoint
from checkpoint import LazyTensor, Weights, _official_names, diffusers_names, fill, open_weights, save

FAMILIES = {  # names in diffusers: official file, prefix in it
    "sd3_medium": ("sd3_medium", "model.diffusion_model."), "sd3.5_medium": ("sd3.5_medium", "model.diffusion_model."),
    "sd3.5_large": ("sd3.5_large", "model.diffusion_model."), "flux1-dev": ("flux1-dev", ""),
    "vae_sd3": ("sd3_medium", "first_stage_model."), "vae_flux": ("ae", "")}


def lazy(tensors: dict) -> Weights:
    return Weights({name: LazyTensor(tuple(t.shape), lambda t=t: t) for name, t in tensors.items()}, {}, "a file")


def on_meta(shapes: dict) -> dict:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def shapes_of(tensors) -> dict:
    return {name: tuple(t.shape) for name, t in tensors.items()}


def tiny_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(32, 64, 96, 96), down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=16,
                         up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, use_quant_conv=False, use_post_quant_conv=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_names_and_shapes_become_exactly_the_official_ones_and_go_back(family):
    theirs, ours = published(f"{family}.diffusers"), published(*FAMILIES[family])
    assert shapes_of(_official_names(lazy(on_meta(theirs)), "a file")) == ours
    assert shapes_of(diffusers_names(on_meta(ours))) == theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_lands_where_the_published_map_says(family):
    entries = published_map(family)
    rows = {name: torch.tensor([[2 * i], [2 * i + 1]]) for i, name in enumerate(entries)}  # two rows stand for a tensor
    expected = {}
    for name, (official, _, op) in sorted(entries.items(), key=lambda item: item[1][1] or [0]):
        piece = rows[name].flip(0) if op == "swap_halves" else rows[name]
        expected.setdefault(official.removeprefix(FAMILIES[family][1]), []).extend(piece.flatten().tolist())
    assert {name: t.read().flatten().tolist() for name, t in _official_names(lazy(rows), "a file").items()} == expected


def test_transformer_without_guidance_goes_to_diffusers_and_back():
    ours = published("flux1-schnell")
    theirs = diffusers_names(on_meta(ours))
    guidance = {name for name in published("flux1-dev.diffusers") if "guidance" in name}
    assert guidance and theirs.keys() == published("flux1-dev.diffusers").keys() - guidance
    assert shapes_of(_official_names(lazy(theirs), "a file")) == ours


def test_random_vae_of_diffusers_has_official_names_and_goes_back(tmp_path):
    theirs = tiny_vae()
    theirs.save_pretrained(tmp_path)
    weights, state = open_weights(tmp_path), theirs.state_dict()
    assert weights.metadata["scaling_factor"] == "0.18215"
    assert len(weights) == len(state) == 244
    for ours, name in (("encoder.down.2.block.0.nin_shortcut.weight", "encoder.down_blocks.2.resnets.0.conv_shortcut.weight"),
                       ("encoder.mid.block_2.conv1.bias", "encoder.mid_block.resnets.1.conv1.bias"),
                       ("decoder.up.0.block.2.norm2.weight", "decoder.up_blocks.3.resnets.2.norm2.weight"),
                       ("decoder.up.3.upsample.conv.weight", "decoder.up_blocks.0.upsamplers.0.conv.weight"),
                       ("decoder.norm_out.bias", "decoder.conv_norm_out.bias")):
        assert torch.equal(weights[ours].read(), state[name])
    attention = weights["decoder.mid.attn_1.proj_out.weight"]
    assert attention.shape == attention.read().shape == (96, 96, 1, 1)
    assert torch.equal(attention.read()[:, :, 0, 0], state["decoder.mid_block.attentions.0.to_out.0.weight"])
    back = diffusers_names({name: t.read() for name, t in weights.items()})
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


def test_vae_attention_names_of_before_2023_are_read():
    modern = tiny_vae().state_dict()
    old = modern.copy()
    for now, then in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        old = {name.replace(f"attentions.0.{now}.", f"attentions.0.{then}."): t for name, t in old.items()}
    assert old.keys() != modern.keys()
    assert shapes_of(_official_names(lazy(old), "a file")) == shapes_of(_official_names(lazy(modern), "a file"))


def test_names_are_translated_without_reading():
    def never():
        raise AssertionError("a tensor was read")

    names = ["pos_embed.pos_embed", *(f"transformer_blocks.0.attn.to_{x}.weight" for x in "qkv"), "norm_out.linear.weight"]
    ours = _official_names({name: LazyTensor((4, 2), never) for name in names}, "a file")
    assert shapes_of(ours) == {"pos_embed": (4, 2), "joint_blocks.0.x_block.attn.qkv.weight": (12, 2),
                               "final_layer.adaLN_modulation.1.weight": (4, 2)}


def test_official_transformers_and_unknown_names_stay():
    official = lazy(on_meta({"joint_blocks.0.x_block.attn.qkv.weight": (3, 1), "context_embedder.weight": (1, 1), "pos_embed": (1, 4, 1)}))
    assert _official_names(official, "a file") == official
    text = lazy(on_meta({"text_model.encoder.layers.0.mlp.fc1.weight": (1, 1), "encoder.block.0.layer.0.SelfAttention.q.weight": (1, 1)}))
    assert _official_names(text, "a file") == text
    unknown = lazy(on_meta({"pos_embed.pos_embed": (1, 4, 1), "transformer_blocks.0.attn.to_q.lora_A.weight": (1, 1)}))
    assert _official_names(unknown, "a file").keys() == {"pos_embed", "transformer_blocks.0.attn.to_q.lora_A.weight"}
    with pytest.raises(ValueError, match="joint_blocks.0.novel.weight has no name in diffusers"):
        diffusers_names(on_meta({"joint_blocks.0.novel.weight": (1, 1)}))


def test_incomplete_and_unequal_qkv_are_refused_by_name():
    shapes = {"pos_embed.pos_embed": (1, 4, 2)} | {f"transformer_blocks.7.attn.to_{x}.weight": (2, 2) for x in "qkv"}
    with pytest.raises(ValueError, match="transformer_blocks.7.attn.to_k.weight;"):
        _official_names(lazy(on_meta({name: s for name, s in shapes.items() if "to_k" not in name})), "a file")
    with pytest.raises(ValueError, match=r"shapes do not fit: .*7.attn.to_v.weight \(2, 3\)"):
        _official_names(lazy(on_meta(shapes | {"transformer_blocks.7.attn.to_v.weight": (2, 3)})), "a file")


@pytest.mark.parametrize("storage", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("compute", [None, torch.bfloat16])
def test_storage_and_compute_dtypes_are_apart(storage, compute, tmp_path):
    stored = {"weight": torch.randn(3, 5).to(storage), "bias": torch.randn(3).to(storage)}
    save(tmp_path / "model.safetensors", stored, {})
    linear = nn.Linear(5, 3, device="meta")
    fill(linear, open_weights(tmp_path / "model.safetensors"), dtype=compute)
    assert linear.weight.dtype == (compute or torch.float32)
    assert torch.equal(linear.weight, stored["weight"].to(compute or torch.float32)) and linear.weight.requires_grad


def test_fp8_shards_of_diffusers_are_joined(tmp_path):
    tensors = {"pos_embed.pos_embed": torch.randn(1, 4, 2)} | {f"transformer_blocks.0.attn.to_{x}.weight": torch.randn(2, 2) for x in "qkv"}
    tensors = {name: t.to(torch.float8_e4m3fn) for name, t in tensors.items()} | {"norm_out.linear.bias": torch.arange(4.0)}
    save_file(tensors, tmp_path / "model.safetensors")
    weights = open_weights(tmp_path)
    thirds = [tensors[f"transformer_blocks.0.attn.to_{x}.weight"].float() for x in "qkv"]
    assert torch.equal(weights["joint_blocks.0.x_block.attn.qkv.weight"].read().float(), torch.cat(thirds))
    assert weights["final_layer.adaLN_modulation.1.bias"].read().tolist() == [2, 3, 0, 1]


def test_fp32_weights_are_the_mapped_file_not_a_copy(tmp_path):
    save(tmp_path / "model.safetensors", {"weight": torch.randn(3, 5), "bias": torch.randn(3)}, {})
    weights, linear = open_weights(tmp_path), nn.Linear(5, 3, device="meta")
    fill(linear, weights)
    assert linear.weight.data_ptr() == weights["weight"].read().data_ptr()


def test_part_cuts_the_prefix_and_takes_all_where_there_is_none():
    both = lazy(on_meta({"model.diffusion_model.a": (1,), "first_stage_model.b": (2,), "text_encoders.clip_l.transformer.c": (3,)}))
    assert shapes_of(both.part("model.diffusion_model.")) == {"a": (1,)}
    assert shapes_of(both.part("first_stage_model.")) == {"b": (2,)}
    assert shapes_of(both.part("text_encoders.clip_l.transformer.")) == {"c": (3,)}
    plain = lazy(on_meta({"a": (1,)}))
    assert plain.part("model.diffusion_model.") is plain


@pytest.mark.parametrize("change, message", [
    (lambda t: t | {"extra": torch.ones(1)}, "1 unknown: extra"),
    (lambda t: {"weight": t["weight"]}, "1 missing: bias"),
    (lambda t: t | {"bias": torch.ones(4)}, r"bias: file \(4,\), model \(3,\)"),
    (lambda t: t | {"weight": t["weight"] * torch.nan}, "weight holds NaN"),
    (lambda t: t | {"bias": t["bias"] / 0}, "bias holds NaN or Inf")], ids=["extra", "missing", "misshapen", "NaN", "Inf"])
def test_fill_refuses_by_name_in_one_line(change, message, tmp_path):
    save_file(change({"weight": torch.randn(3, 5), "bias": torch.ones(3)}), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message) as refusal:
        fill(nn.Linear(5, 3, device="meta"), open_weights(tmp_path))
    assert "\n" not in str(refusal.value) and str(tmp_path) in str(refusal.value)


def whole_file(path: Path) -> bytes:
    save(path, {"weight": torch.randn(50, 50)}, {})
    return path.read_bytes()


@pytest.mark.parametrize("content, message", [
    (b"", "0 bytes"),
    (b"<!doctype html><html>not found</html>" * 50, "web page"),
    (b"GGUF\x03\x00\x00\x00" + bytes(100), "GGUF"),
    ("pickle", "pickle"), ("zip pickle", "zip archive or pickle"),
    ("truncated", "not fully covered"), ("header only", "header")], ids=str)
@pytest.mark.parametrize("where", ["file", "folder"])
def test_what_is_no_safetensors_is_refused_in_one_line(content, message, where, tmp_path):
    path = tmp_path / "model.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif "pickle" in content:
        torch.save({"weight": torch.ones(3)}, path, _use_new_zipfile_serialization=content.startswith("zip"))
    else:
        path.write_bytes(whole_file(path)[:-100 if content == "truncated" else 20])
    with pytest.raises(ValueError, match=message) as refusal:
        open_weights(path if where == "file" else tmp_path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "pytorch_model.bin"])
def test_pickles_are_never_opened(name, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save(Trap(), tmp_path / name)
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(ValueError, match="pickle"):
            open_weights(path)
    assert not (tmp_path / "executed").exists()


def test_folders_without_a_clear_choice_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_weights(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no .safetensors file"):
        open_weights(tmp_path)
    for name in ("a", "b"):
        save(tmp_path / f"{name}.safetensors", {name: torch.ones(1)}, {})
    with pytest.raises(ValueError, match="a.safetensors, b.safetensors.*name one"):
        open_weights(tmp_path)


def write_shards(folder: Path, shards: dict) -> None:
    for file, tensors in shards.items():
        save(folder / file, tensors, {})
    index = {"weight_map": {name: file for file, tensors in shards.items() for name in tensors}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_are_one_and_a_missing_one_is_named(tmp_path):
    write_shards(tmp_path, {"1-of-2.safetensors": {"weight": torch.ones(3, 5)}, "2-of-2.safetensors": {"bias": torch.ones(3)}})
    fill(nn.Linear(5, 3, device="meta"), open_weights(tmp_path))
    (tmp_path / "2-of-2.safetensors").unlink()
    with pytest.raises(ValueError, match="1 of 2 shards are missing, the first is 2-of-2.safetensors"):
        open_weights(tmp_path)


def test_name_in_two_shards_is_refused(tmp_path):
    twice = {"weight": torch.ones(3)}
    write_shards(tmp_path, {"1.safetensors": twice | {"scale": torch.ones(3)}, "2.safetensors": twice | {"bias": torch.ones(3)}})
    with pytest.raises(ValueError, match="weight stands in another shard too"):
        open_weights(tmp_path)


def test_metadata_comes_from_the_file_and_from_config_json(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"scaling_factor": 1.5, "norm": None, "said_twice": "folder"}))
    save(tmp_path / "model.safetensors", {"a": torch.ones(1)}, {"steps": 7, "said_twice": "file"})
    assert open_weights(tmp_path).metadata == {"scaling_factor": "1.5", "steps": "7", "said_twice": "file"}


def test_save_to_a_full_disk_leaves_the_previous_file(tmp_path):
    path = tmp_path / "model.safetensors"
    before = whole_file(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # a write beyond 4 KiB fails, as on a full disk
    try:
        with pytest.raises(OSError, match="could not be written"):
            save(path, {"weight": torch.zeros(50, 50)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_interrupted_save_leaves_the_previous_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    before = whole_file(path)

    def interrupted(tensors, file, metadata):
        Path(file).write_bytes(before[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(path, {"weight": torch.zeros(50, 50)}, {})
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("listing", ['{"weight_map": ["a"]}', '{"weight_map": {"a": 3}}', '{}'])
def test_what_is_no_index_is_refused(tmp_path, listing):
    (tmp_path / "model.safetensors.index.json").write_text(listing)
    with pytest.raises(ValueError, match="model.safetensors.index.json: no index" if "3" not in listing else "1 of 1 shards are missing"):
        open_weights(tmp_path)


def test_a_file_is_no_model_folder_and_a_gguf_is_named(tmp_path):
    (tmp_path / "flux1-dev-Q4.gguf").touch()
    with pytest.raises(ValueError, match="flux1-dev-Q4.gguf, which is not opened; put the .safetensors"):
        checkpoint.locate(tmp_path)
    with pytest.raises(ValueError, match="flux1-dev-Q4.gguf: a file; --weights takes the folder"):
        checkpoint.locate(tmp_path / "flux1-dev-Q4.gguf")


def test_a_mapped_tensor_stays_untouched_by_its_check():
    """It is checked through another mapping; a converted one is a copy already and is checked itself."""
    good, damaged = torch.ones(3, 5), torch.full((3, 5), torch.nan)
    weights = {"weight": LazyTensor((3, 5), lambda: good, again=lambda: damaged)}
    with torch.device("meta"):
        linear, other = nn.Linear(5, 3, bias=False), nn.Linear(5, 3, bias=False)
    with pytest.raises(ValueError, match="weight holds NaN"):
        fill(linear, weights)
    fill(other, weights, dtype=torch.bfloat16)
    assert other.weight.dtype == torch.bfloat16


def test_reading_again_gives_the_same_values_in_other_memory(tmp_path):
    save(tmp_path / "model.safetensors", {"weight": torch.arange(6.0)}, {})
    lazy = open_weights(tmp_path / "model.safetensors")["weight"]
    first, second = lazy.read(), lazy.again()
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()


def test_save_takes_views_gradients_and_numbers(tmp_path):
    matrix = torch.randn(4, 6, requires_grad=True)
    save(tmp_path / "model.safetensors", {"turned": matrix.T, "slice": matrix[:2]}, {"steps": 3})
    read = load_file(tmp_path / "model.safetensors")
    assert torch.equal(read["turned"], matrix.T) and torch.equal(read["slice"], matrix[:2])
