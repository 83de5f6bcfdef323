"""Weights: layouts, storage dtypes, stacked tensors, metadata, refusals in one line, files written atomically."""

import json
import os
import resource
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from diffusers import AutoencoderKL
from golden import diffusers_names, lazy, lazy_tensors, shapes_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import checkpoint
from checkpoint import LazyTensor, Overflow, Weights, fill, filled, locate, open_weights, save
from files import replacing


def tiny_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(32, 64, 96, 96), down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=16,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, use_quant_conv=False, use_post_quant_conv=False)


def test_random_vae_of_diffusers_has_official_names_and_goes_back(tmp_path):
    theirs = tiny_vae()
    theirs.save_pretrained(tmp_path)
    weights, state = open_weights(tmp_path), theirs.state_dict()
    assert weights.metadata["scaling_factor"] == "0.18215"
    assert len(weights) == len(state) == 244
    shortcut = "encoder.down_blocks.2.resnets.0.conv_shortcut.weight"
    for ours, name in (("encoder.down.2.block.0.nin_shortcut.weight", shortcut),
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


@pytest.mark.parametrize("first, last", [(0, 7), (2, 3), (3, 6), (0, 0), (6, 6)])
def test_rows_of_a_stacked_tensor_are_those_of_all_and_other_parts_are_not_read(first, last):
    thirds, read = {f"transformer_blocks.0.attn.to_{x}.weight": torch.randn(2, 2) for x in "qkv"}, []
    tensors = {name: LazyTensor((2, 2), lambda name=name: read.append(name) or thirds[name]) for name in thirds}
    tensors |= lazy_tensors({"pos_embed.pos_embed": torch.ones(1)})
    stacked = Weights(tensors, {}, "a file").with_official_names()["joint_blocks.0.x_block.attn.qkv.weight"]
    assert torch.equal(stacked.rows(first, last), torch.cat(list(thirds.values()))[first:last])
    needed = [name for k, name in enumerate(thirds) if first < 2 * k + 2 and last > 2 * k]
    assert read == (needed if first < last else list(thirds)[:1])


@pytest.mark.parametrize("first, last", [(0, 6), (1, 2), (2, 4), (0, 0)])
def test_rows_of_exchanged_halves_are_those_of_the_official_order(first, last):
    tensor = torch.randn(6, 2)
    weights = lazy_tensors({"pos_embed.pos_embed": torch.ones(1), "norm_out.linear.weight": tensor})
    exchanged = weights.with_official_names()["final_layer.adaLN_modulation.1.weight"]
    assert torch.equal(exchanged.read(), torch.cat(tensor.chunk(2)[::-1]))
    assert torch.equal(exchanged.rows(first, last), torch.cat(tensor.chunk(2)[::-1])[first:last])


def test_parts_that_do_not_fit_are_refused_by_name_and_shape():
    shapes = {"pos_embed.pos_embed": (1, 4, 2)} | {f"transformer_blocks.7.attn.to_{x}.weight": (2, 2) for x in "qkv"}
    with pytest.raises(ValueError, match=r"^a file: shapes do not fit: .*7.attn.to_v.weight \(2, 3\)$"):
        lazy(shapes | {"transformer_blocks.7.attn.to_v.weight": (2, 3)}).with_official_names()


@pytest.mark.parametrize("name", ["norm_out.linear.weight", *(f"transformer_blocks.0.attn.to_{x}.bias" for x in "qv")])
def test_a_tensor_without_axes_is_no_part(name):
    shapes = {f"transformer_blocks.0.attn.to_{x}.bias": (2,) for x in "qkv"} | {"pos_embed.pos_embed": (1,), name: ()}
    with pytest.raises(ValueError, match=f"^a file: shapes do not fit: .*{name}"):
        lazy(shapes).with_official_names()


def test_tensors_without_axes_keep_their_place():
    weights = lazy({"logit_scale": (), "pos_embed.pos_embed": (1, 4, 2)}).with_official_names()
    assert shapes_of(weights) == {"logit_scale": (), "pos_embed": (1, 4, 2)}


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
    tensors = {f"transformer_blocks.0.attn.to_{x}.weight": torch.randn(2, 2).to(torch.float8_e4m3fn) for x in "qkv"}
    tensors |= {"pos_embed.pos_embed": torch.ones(1, 4, 2), "norm_out.linear.bias": torch.arange(4.0)}
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
    clip = "text_encoders.clip_l.transformer."
    both = lazy({"model.diffusion_model.a": (1,), "first_stage_model.b": (2,), f"{clip}c": (3,)})
    assert shapes_of(both.part("model.diffusion_model.")) == {"a": (1,)}
    assert shapes_of(both.part("first_stage_model.")) == {"b": (2,)}
    assert shapes_of(both.part(clip)) == {"c": (3,)}
    plain = lazy({"a": (1,)})
    assert plain.part("model.diffusion_model.") is plain


@pytest.mark.parametrize("change, message", [
    (lambda t: t | {"extra": torch.ones(1)}, "1 unknown: extra"),
    (lambda t: {"weight": t["weight"]}, "1 missing: bias"),
    (lambda t: t | {"bias": torch.ones(4)}, r"bias: file \(4,\), model \(3,\)"),
    (lambda t: t | {"weight": t["weight"] * torch.nan}, "weight holds NaN"),
    (lambda t: t | {"bias": t["bias"] / 0}, "bias holds NaN or Inf")],
    ids=["extra", "missing", "misshapen", "NaN", "Inf"])
def test_fill_refuses_by_name_in_one_line(change, message, tmp_path):
    save_file(change({"weight": torch.randn(3, 5), "bias": torch.ones(3)}), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message) as refusal:
        fill(nn.Linear(5, 3, device="meta"), open_weights(tmp_path))
    assert "\n" not in str(refusal.value) and str(tmp_path) in str(refusal.value)


def complete_file(path: Path) -> bytes:
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
        path.write_bytes(complete_file(path)[:-100 if content == "truncated" else 20])
    with pytest.raises(ValueError, match=message) as refusal:
        open_weights(path if where == "file" else tmp_path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_file_that_may_not_be_read_is_not_called_missing(tmp_path, monkeypatch):
    save(tmp_path / "a.safetensors", {"a": torch.ones(1)}, {})
    with monkeypatch.context() as denied, pytest.raises(PermissionError, match="a.safetensors"):
        denied.setattr("builtins.open", Mock(side_effect=PermissionError(13, "Permission denied", "a.safetensors")))
        open_weights(tmp_path / "a.safetensors")


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
    first, second = {"weight": torch.ones(3, 5)}, {"bias": torch.ones(3)}
    write_shards(tmp_path, {"1-of-2.safetensors": first, "2-of-2.safetensors": second})
    fill(nn.Linear(5, 3, device="meta"), open_weights(tmp_path))
    (tmp_path / "2-of-2.safetensors").unlink()
    with pytest.raises(ValueError, match="1 of 2 shards are missing, the first is 2-of-2.safetensors"):
        open_weights(tmp_path)


def test_name_in_two_shards_is_refused(tmp_path):
    first, second = ({"weight": torch.ones(3), other: torch.ones(3)} for other in ("scale", "bias"))
    write_shards(tmp_path, {"1.safetensors": first, "2.safetensors": second})
    with pytest.raises(ValueError, match="weight is in another shard too"):
        open_weights(tmp_path)


@pytest.mark.parametrize("name, of_file", [
    ("model.safetensors", True), ("diffusion_pytorch_model.fp16.safetensors", True),
    ("ae.safetensors", False), ("my_model.safetensors", False)])
def test_config_json_gives_sizes_of_a_folder_or_of_a_file_that_a_library_named(name, of_file, tmp_path):
    """Never how to sample: a training run's settings lie in a file of the same name."""
    config = {"scaling_factor": 1.5, "norm_num_groups": None, "steps": 300, "res": "256", "eos_token_id": 9}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save(tmp_path / name, {"a": torch.ones(1)}, {"steps": 7, "eos_token_id": 5})
    header = {"steps": "7", "eos_token_id": "5"}
    assert open_weights(tmp_path).metadata == {"scaling_factor": "1.5"} | header
    assert open_weights(tmp_path / name).metadata == ({"scaling_factor": "1.5"} if of_file else {}) | header


def test_numbers_of_the_metadata_are_read_or_named_with_their_file():
    weights = Weights({}, {"heads": "12", "scale": "1.5", "word": "x", "bound": "inf"}, "a file")
    assert weights.number("heads", integer=True) == 12 and weights.number("none", "scale") == 1.5
    assert weights.number("none") is None and weights.number("none", otherwise=3) == 3
    for key in ("word", "bound"):
        with pytest.raises(ValueError, match=f"^a file: its metadata records {key} '.*', which is no number"):
            weights.number(key)
    with pytest.raises(ValueError, match="records scale '1.5', which is no integer"):
        weights.number("scale", integer=True)


def test_shapes_and_depths_are_read_or_named_with_their_file():
    weights = lazy({"blocks.0.a": (2, 3), "blocks.1.a": (2, 3), "blocks.1.b": (5, 7), "blocks.x.a": (1,)})
    assert weights.shape_of("blocks.0.a", 2, "model") == (2, 3)
    assert weights.depth("blocks.") == 2 and weights.depth("none.") == 0
    assert weights.common_size(".a", 1, "blocks.0.a", "model") == 3
    with pytest.raises(ValueError, match="a file: 1 missing: none; without it this is no model .*4 tensors: blocks.0"):
        weights.shape_of("none", 2, "model")
    with pytest.raises(ValueError, match=r"a file: blocks.0.a has the shape \(2, 3\), expected 4 axes"):
        weights.shape_of("blocks.0.a", 4, "model")
    with pytest.raises(ValueError, match="1 missing: none"):
        weights.common_size(".none", 0, "none", "model")


def test_a_tensor_under_two_names_is_refused():
    with pytest.raises(ValueError, match="^a file: pos_embed is there under two names$"):
        lazy({"pos_embed": (1, 4, 2), "pos_embed.pos_embed": (1, 4, 2)}).with_official_names()


@pytest.mark.parametrize("stored", [torch.bool, torch.int64, torch.complex64])
def test_a_parameter_that_is_stored_as_no_floating_number_is_refused_by_name(stored, tmp_path):
    """Names that end in .weight or .bias on opening, others before they are used."""
    with torch.device("meta"):
        module = nn.ParameterDict({"pos_embed": nn.Parameter(torch.ones(2))})
    save_file({"pos_embed": torch.ones(2).to(stored)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"a.safetensors: pos_embed is stored as {stored}, .*give the fp16"):
        fill(module, open_weights(tmp_path / "a.safetensors"))
    save_file({"norm.bias": torch.ones(2).to(stored)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="a.safetensors: norm.bias is stored as [A-Z0-9]+, which is no number"):
        open_weights(tmp_path / "a.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_of_zeros_alone_are_reported(dtype, tmp_path):
    tensors = {"0.weight": torch.ones(3, 3), "0.bias": torch.zeros(3), "1.weight": torch.zeros(3, 3),
               "1.bias": torch.ones(3)}
    save(tmp_path / "m.safetensors", tensors, {})
    with pytest.warns(UserWarning, match="m.safetensors: 1 matrices hold zeros alone, such as 1.weight: not trained"):
        filled(lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), open_weights(tmp_path / "m.safetensors"), "cpu",
               dtype)


@pytest.mark.parametrize("below", ["snapshots/0f3/transformer/a.safetensors", "inner/flux1-dev.safetensors"])
def test_a_model_further_down_is_named_and_not_downloaded_again(below, tmp_path):
    (tmp_path / below).parent.mkdir(parents=True)
    save(tmp_path / below, {"a": torch.ones(1)}, {})
    with pytest.raises(FileNotFoundError) as refusal:
        locate(tmp_path)
    expected = tmp_path / ("snapshots/0f3" if "snapshots" in below else "inner")
    assert str(refusal.value).endswith(f"; {expected} has one: give it")


def test_values_beyond_the_compute_dtype_are_no_damage(tmp_path):
    save_file({"weight": torch.full((3, 5), 1e5), "bias": torch.ones(3)}, tmp_path / "a.safetensors")
    with pytest.raises(Overflow, match="weight holds NaN or Inf: its values exceed torch.float16; choose bf16"):
        fill(nn.Linear(5, 3, device="meta"), open_weights(tmp_path / "a.safetensors"), dtype=torch.float16)


@pytest.mark.parametrize("name, repository, others", [
    ("my-flux", "black-forest-labs/FLUX.1-dev", 0), ("FLUX.1-schnell", "black-forest-labs/FLUX.1-schnell", 0),
    ("sd3", "stabilityai/stable-diffusion-3-medium-diffusers", 0),
    ("unnamed", "stabilityai/stable-diffusion-3-medium-diffusers", 2)])
def test_a_missing_folder_is_told_the_download_of_its_name_or_all(name, repository, others, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{name}: no such folder; .*hf download {repository} ") as refusal:
        checkpoint.locate(tmp_path / name)
    assert str(refusal.value).count("hf download") == 1 + others


@pytest.mark.parametrize("blocks, message", [
    ((0, 1, 3), "holds blocks.3, but blocks.2 is missing"), ((10**15,), "but blocks.0 is missing"),
    (range(600), "600 blocks; at most 512 are read")])
def test_blocks_are_numbered_from_0_without_gaps(blocks, message):
    with pytest.raises(ValueError, match=f"^a file: .*{message}$"):
        lazy({f"blocks.{i}.a": (1,) for i in blocks}).depth("blocks.")


@pytest.mark.parametrize("shape", [(0, 2**40), (2**40, 1)])
def test_sides_that_no_model_has_are_refused(shape):
    with pytest.raises(ValueError, match="^a file: a has the shape .*, expected . axes of 1 to 16777216$"):
        lazy({"a": shape}).shape_of("a", 2, "model")


def test_save_to_a_full_disk_leaves_the_previous_file(tmp_path):
    path = tmp_path / "model.safetensors"
    before = complete_file(path)
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
    before = complete_file(path)

    def interrupted(tensors, file, metadata):
        Path(file).write_bytes(before[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(path, {"weight": torch.zeros(50, 50)}, {})
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("listing, message", [
    ('{"weight_map": ["a"]}', r'weight_map is \["a"\], expected an object'),
    ('{}', "weight_map is missing, expected an object"), ('{"weight_map": {}}', "lists 'nothing', which is no shard"),
    ('{"weight_map": {"a": 3}}', "lists '3', which is no shard"),
    ('{"weight_map": {"a": "../a.safetensors"}}', "lists '../a.safetensors', which is no shard"),
    ('{"weight_map": {"a": "a\\u001b[2J.safetensors"}}', r"lists 'a.x1b\[2J.safetensors', which is no shard"),
    ('[' * 9999, "not JSON")])
def test_what_is_no_index_is_refused(tmp_path, listing, message):
    (tmp_path / "model.safetensors.index.json").write_text(listing)
    with pytest.raises(ValueError, match=message) as refusal:
        open_weights(tmp_path)
    assert str(refusal.value).startswith(f"{tmp_path}/model.safetensors.index.json: ")


def test_an_index_of_another_download_is_refused(tmp_path):
    write_shards(tmp_path, {"1.safetensors": {"a": torch.ones(1)}, "2.safetensors": {"b": torch.ones(1)}})
    save(tmp_path / "2.safetensors", {"c": torch.ones(1)}, {})
    with pytest.raises(ValueError, match="index lists 1 tensors that no shard has, the first is b: "):
        open_weights(tmp_path)


def test_a_file_is_no_model_folder_and_a_gguf_is_named(tmp_path):
    (tmp_path / "flux1-dev-Q4.gguf").touch()
    with pytest.raises(ValueError, match="flux1-dev-Q4.gguf, which is not opened; put the .safetensors"):
        checkpoint.locate(tmp_path)
    with pytest.raises(ValueError, match="flux1-dev-Q4.gguf: a file; --weights takes the folder"):
        checkpoint.locate(tmp_path / "flux1-dev-Q4.gguf")


def test_a_mapped_tensor_stays_untouched_by_its_check(tmp_path):
    """It is checked through another mapping; a converted one is a copy already and is checked itself."""
    good, place = torch.ones(3, 5), (tmp_path / "damaged.safetensors", "weight")
    save(place[0], {"weight": torch.full((3, 5), torch.nan)}, {})
    weights = Weights({"weight": LazyTensor((3, 5), lambda: good, place=place)}, {}, "a file")
    with torch.device("meta"):
        linear, other = nn.Linear(5, 3, bias=False), nn.Linear(5, 3, bias=False)
    with pytest.raises(ValueError, match="weight holds NaN"):
        fill(linear, weights)
    fill(other, weights, dtype=torch.bfloat16)
    assert other.weight.dtype == torch.bfloat16


def test_reading_again_gives_the_same_values_in_other_memory(tmp_path):
    save(tmp_path / "model.safetensors", {"weight": torch.arange(6.0)}, {})
    lazy = open_weights(tmp_path / "model.safetensors")["weight"]
    again = checkpoint.anew({"mapped": lazy, "assembled": LazyTensor((2,), lambda: torch.ones(2))})
    first, second = lazy.read(), again["mapped"].read()
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr() and again["assembled"].read().sum() == 2


def test_save_takes_views_gradients_and_numbers(tmp_path):
    matrix = torch.randn(4, 6, requires_grad=True)
    save(tmp_path / "model.safetensors", {"turned": matrix.T, "slice": matrix[:2]}, {"steps": 3})
    read = load_file(tmp_path / "model.safetensors")
    assert torch.equal(read["turned"], matrix.T) and torch.equal(read["slice"], matrix[:2])


def test_files_of_equal_contents_are_equal_in_every_byte(tmp_path):
    records = {f"ö{k}": '{"a": "\\n\x01"}' for k in range(12)}
    files = [tmp_path / f"{k}.safetensors" for k in range(4)]
    for file in files:
        save(file, {"b": torch.arange(3.0), "a": torch.ones(2)}, records)
        records = dict(reversed(records.items()))
    assert len({file.read_bytes() for file in files}) == 1
    with safe_open(files[0], "pt") as read:
        assert read.metadata() == records and torch.equal(read.get_tensor("b"), torch.arange(3.0))


@pytest.mark.parametrize("succeeds", [True, False])
def test_replacing_renames_on_success_and_leaves_the_old_file_on_failure(tmp_path, succeeds):
    path = tmp_path / "table.csv"
    path.write_text("old")
    try:
        with replacing(path) as temporary:
            temporary.write_text("new")
            assert path.read_text() == "old" and temporary.suffix == ".csv"
            if not succeeds:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert path.read_text() == ("new" if succeeds else "old") and os.listdir(tmp_path) == ["table.csv"]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float32])
def test_a_tensor_goes_to_the_device_as_it_is_stored_and_is_converted_there(storage, dtype, device, monkeypatch):
    linear, sent, to = nn.Linear(3, 2, device="meta"), [], torch.Tensor.to
    stored = {"weight": torch.randn(2, 3).to(storage), "bias": torch.randn(2).to(storage)}
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *to_what: sent.append(t.dtype) or to(t, *to_what))
    fill(linear, lazy_tensors(stored), device, dtype)
    assert sent == [storage, storage] * 2 and linear.weight.device.type == device
    assert torch.equal(linear.weight.cpu(), to(stored["weight"], dtype or torch.float32))
