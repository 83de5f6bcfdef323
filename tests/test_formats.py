"""docs/formats.md: a small file of every row of its tables of weights, opened as the commands do, ends as they say."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from diffusers import FluxTransformer2DModel
from golden import diffusers_names, distance, lazy, published, read_case, weights_of
from safetensors.torch import save_file
from torch import Tensor

import names
from checkpoint import MODELS, filled, locate, open_weights
from family import family_of, find
from files import printable
from text import CLIPText, T5Encoder
from vae import VAE

TEXT = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
ROWS = {}  # layout -> what happens
for line in TEXT.partition("\n## Data folders")[0].splitlines():
    if line.startswith("| ") and not line.startswith("| layout "):
        layout, _, happens = re.split(r" \| ", line.strip("| "))
        ROWS[layout] = happens
FLUX, SD3, SD35 = (weights_of(read_case(case)) for case in ("flux_dev", "mmdit_sd3", "mmdit_sd35_medium"))
VAE_TENSORS, T5 = weights_of(read_case("vae_sd3")), weights_of(read_case("t5_encoder"))
AXES = {"axes_dim": "4, 14, 14"}
ALL_IN_ONE = ({f"model.diffusion_model.{k}": t for k, t in SD3.items()}
              | {f"first_stage_model.{k}": t for k, t in VAE_TENSORS.items()})
Tensors = dict[str, Tensor]


def write(file: Path, tensors: Tensors, metadata: dict | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, file, metadata)
    return file


def opened(path: Path, folder: str = "tiny-flux") -> Tensors:
    """What --transformer PATH reads."""
    family, weights, _ = find(MODELS / folder, path)
    part = weights.part("model.diffusion_model.")
    config = family.config(part)
    return filled(lambda: family.model(config), part, "cpu", None).state_dict()


# ---- refused

BLOCK = "double_blocks.0.img_attn.qkv"
QUANTISED = {  # layout: tensors beside those of a Flux
    "bitsandbytes nf4, fp4": f"{BLOCK}.weight.quant_state.bitsandbytes__nf4", "bitsandbytes int8": f"{BLOCK}.SCB",
    "torchao": "double_blocks.0.img_attn.qkv._weight_qdata", "optimum-quanto": f"{BLOCK}.weight._data",
    "nunchaku": "single_transformer_blocks.0.mlp_fc1.smooth_factor", "GPTQ": f"{BLOCK}.g_idx",
    "AWQ": f"{BLOCK}.qzeros", "SDNQ": f"{BLOCK}.zero_point", "HQQ": f"{BLOCK}.W_q",
    "compressed-tensors": f"{BLOCK}.weight_packed", "NVFP4": f"{BLOCK}.weight_scale_2",
    "fp8 scaled in blocks": f"{BLOCK}.weight_scale_inv"}
OTHERS = {  # layout: tensor names that a file of it holds
    "LoRA of kohya's sd-scripts": ["lora_unet_double_blocks_0_img_attn_proj.lora_down.weight", "lora_te1_x.alpha"],
    "LoRA of LyCORIS, with algo=lora": ["lycoris_transformer_blocks_0_attn_to_q.lora_up.weight"],
    "LoRA of Black Forest Labs": ["img_in.lora_A.weight", f"{BLOCK}.lora_B.weight", "single_blocks.0.norm.x.scale"],
    "LoRA of PEFT, diffusers, ai-toolkit": ["diffusion_model.double_blocks.0.img_attn.proj.lora_A.weight"],
    "LoRA of XLabs": ["double_blocks.3.processor.proj_lora2.up.weight"],
    "LyCORIS": ["lora_unet_single_blocks_0_linear1.hada_w1_a", "lora_unet_single_blocks_0_linear1.alpha"],
    "adapter that is not merged": [f"{BLOCK}.base_layer.weight", f"{BLOCK}.lora_A.default.weight"],
    "difference of models": [f"diffusion_model.{BLOCK}.diff"],
    "textual inversion": ["clip_l", "clip_g"], "ControlNet": [*FLUX, "controlnet_blocks.0.weight"],
    "Flux Redux": ["redux_up.weight", "redux_down.weight"],
    "IP-Adapter": ["double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight"],
    "PuLID": ["pulid_ca.0.norm1.weight"], "transformer in a wrapper": [f"_orig_mod.{name}" for name in FLUX],
    "Chroma": [*FLUX, "distilled_guidance_layer.in_proj.weight"],
    "FLUX.2": [*FLUX, "double_stream_modulation_img.lin.weight"],
    "HunyuanVideo": ["double_blocks.0.img_attn_qkv.weight", "img_in.proj.weight"],
    "AuraFlow": ["double_layers.0.attn.w1k.weight"], "Qwen-Image": ["transformer_blocks.0.img_mod.1.weight"],
    "Lumina, Z-Image": ["noise_refiner.0.attention.qkv.weight"],
    "Stable Diffusion 1, 2, XL": ["model.diffusion_model.input_blocks.0.0.weight"],
    "autoencoder": list(VAE_TENSORS), "TAESD": ["decoder.layers.1.weight"],
    "CLIP text encoder": list(weights_of(read_case("clip_l"))),
    "complete CLIP": ["text_model.x", "vision_model.post_layernorm.weight"],
    "OpenCLIP": ["transformer.resblocks.0.attn.in_proj_weight"], "T5 encoder": list(T5),
    "complete T5": [*T5, "decoder.block.0.layer.0.SelfAttention.k.weight"],
    "language model": ["model.layers.0.self_attn.q_proj.weight"], "anything else": ["a", "b", "c"]}
OTHER_CHANNELS = {"Flux Fill": ("img_in.weight", 384), "Flux Canny, Flux Depth": ("img_in.weight", 128),
                  "SD3 for inpainting or editing": ("x_embedder.proj.weight", 33)}
BYTES = {  # layout: name and content of a file
    "pickle": ("flux.ckpt", b""), "pickle with another suffix": ("flux.safetensors", b"PK\3\4" + bytes(90)),
    "GGUF": ("flux1-dev-Q4_K_S.gguf", b"GGUF"), "ONNX": ("model.onnx", b"\x08"), "Flax": ("flux.msgpack", b""),
    "TensorFlow": ("tf_model.h5", b""), "TensorRT": ("unet.plan", b""), "MLX, NumPy": ("flux.npz", b"PK"),
    "part of a download": ("flux1-dev.safetensors.part", bytes(9)), "web page": ("f.safetensors", b"<html>" * 9),
    "pointer of Git LFS": ("f.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2\n"),
    "index instead of its folder": ("model.safetensors.index.json", b'{"weight_map": {}}'),
    "incomplete download": ("f.safetensors", (len(b'{}' * 400)).to_bytes(8, "little") + b"{")}


def index(folder: Path, shards: dict[str, Tensors], name: str = "model.safetensors.index.json") -> Path:
    for file, tensors in shards.items():
        write(folder / file, tensors)
    (folder / name).write_text(json.dumps({"weight_map": {k: file for file, ts in shards.items() for k in ts}}))
    return folder


def halves(tensors: Tensors) -> tuple[Tensors, Tensors]:
    keys = sorted(tensors)
    return tuple({k: tensors[k] for k in part} for part in (keys[:len(keys) // 2], keys[len(keys) // 2:]))


def refused_file(layout: str, folder: Path) -> Path:
    """Write a file or folder of this layout."""
    file, one = folder / "own.safetensors", {"a": torch.ones(2)}
    if layout in QUANTISED:
        return write(file, FLUX | {QUANTISED[layout]: torch.ones(2, dtype=torch.uint8)})
    if layout in OTHERS:
        return write(file, {name: FLUX.get(name, torch.ones(2)) for name in OTHERS[layout]})
    if layout in BYTES:
        name, content = BYTES[layout]
        (folder / name).write_bytes(content)
        return folder / name
    if layout in OTHER_CHANNELS:
        name, columns = OTHER_CHANNELS[layout]
        tensors = SD3 if "SD3" in layout else FLUX
        shape = list(tensors[name].shape)
        return write(file, tensors | {name: torch.ones(shape[0], columns, *shape[2:])}, AXES)
    if layout == "mxfp8, int8 with rotations":
        about = torch.tensor(list(b'{"format": "mxfp8"}'), dtype=torch.uint8)
        return write(file, FLUX | {f"{BLOCK}.comfy_quant": about})
    if layout == "integers or truth values as weights":
        return write(file, FLUX | {f"{BLOCK}.weight": (100 * FLUX[f"{BLOCK}.weight"]).to(torch.int8)})
    if layout == "LoRA or LyCORIS beside a complete model":
        more = {f"diffusion_model.{BLOCK}.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
        return write(file, ALL_IN_ONE | more)
    if layout == "transformer twice in one file":
        return write(file, ALL_IN_ONE | SD3)
    if layout == "file that aria2 has not finished":
        file.with_name(f"{file.name}.aria2").write_bytes(bytes(9))
        return write(file, FLUX, AXES)
    if layout == "path that is not UTF-8":
        return write(file, FLUX, AXES).rename(folder / os.fsdecode(b"Mod\xe8le.safetensors"))
    if layout == "hostile names":
        return write(file, FLUX | {"a\x1b[2J\n": torch.ones(1)})
    if layout == "one shard of several":
        return write(folder / "diffusion_pytorch_model-00001-of-00003.safetensors", one)
    if layout == "shards without index":
        return write(folder / "model-00001-of-00002.safetensors", one).parent
    if layout == "shards of two downloads":
        index(folder, {"1.safetensors": one, "2.safetensors": {"b": torch.ones(1)}})
        return write(folder / "2.safetensors", {"c": torch.ones(1)}).parent
    if layout == "two variants in one folder":
        return write(write(folder / "m.fp16.safetensors", one).with_name("m.bf16.safetensors"), one).parent
    raise KeyError(layout)


REFUSED = {layout for layout, happens in ROWS.items() if happens.startswith("refused")}


FOLDERS = {  # layouts of whole model folders: each has its own test
    "two models in one folder": "here", "several T5 in `text_encoders/`, none fp16 or bf16": "test_text.py",
    "tokenizers exchanged, or one twice": "test_text.py",
    "vocabulary without all of its merges, or in another order": "test_text.py",
    "autoencoder of another factor": "test_family.py",
    "autoencoder of the other family": "test_vae.py"}


@pytest.mark.parametrize("layout", sorted(REFUSED - FOLDERS.keys()))
def test_a_layout_is_refused_with_the_words_of_its_row(layout, tmp_path):
    path = refused_file(layout, tmp_path)
    with pytest.raises(ValueError) as refusal:
        opened(path, "tiny-sd3" if layout.startswith(("SD3", "transformer twice")) else "tiny-flux")
    message = str(refusal.value)
    assert message.startswith(f"{path}") and printable(message.removeprefix(f"{path}")).isprintable()
    words = re.findall(r'"([^"]+)"', ROWS[layout])
    assert words and not [part for part in words if part not in message], message
    if layout in QUANTISED or "comfy_quant" in layout:
        assert message.endswith(names.FULL)


@pytest.mark.parametrize("present", [
    ("sd3.5_large.safetensors", "sd3.5_large_turbo.safetensors"),
    ("flux1-dev.safetensors", "flux1-dev-fp8.safetensors"), ("sd3_medium.safetensors", "flux1-dev.safetensors"),
    ("flux1-dev.safetensors", "transformer/"),
    ("sd3_medium_incl_clips.safetensors", "sd3_medium_incl_clips_t5xxlfp8.safetensors")])
def test_two_models_in_one_folder_are_refused_and_listed(present, tmp_path):
    for name in present:
        write(tmp_path / (name + "model.safetensors" if name.endswith("/") else name), {"a": torch.ones(1)})
    with pytest.raises(ValueError) as refusal:
        locate(tmp_path)
    words = re.findall(r'"([^"]+)"', ROWS["two models in one folder"])
    assert all(part in str(refusal.value) for part in (*words, *present))


# ---- read

def scaled(tensors: Tensors, spelling: str, per_row: bool = False) -> tuple[Tensors, Tensors]:
    """Matrices as fp8 with a scale, and the values that they stand for."""
    stored, values = {}, {}
    for name, t in tensors.items():
        stored[name], values[name] = t, t.float()
        if t.ndim == 2 and name.endswith(".weight"):
            most = t.float().abs().amax(dim=1, keepdim=True) if per_row else t.float().abs().max()
            scale = most.clamp(min=1e-6) / 448
            stored[name] = (t.float() / scale).to(torch.float8_e4m3fn)
            stored[name.removesuffix("weight") + spelling] = scale
            values[name] = stored[name].float() * scale
            assert ((values[name] - t.float()).abs() <= t.float().abs() / 16 + 2**-9 * scale).all()
    return stored, values


def comfy(tensors: Tensors) -> Tensors:
    about = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    beside = ((f"{name.removesuffix('.weight')}", t) for name, t in tensors.items() if t.dtype == torch.float8_e4m3fn)
    return tensors | {f"{name}{end}": value for name, _ in beside
                      for end, value in ((".comfy_quant", about), (".input_scale", torch.ones(())))}


def zeros(tensors: Tensors) -> Tensors:
    return tensors | {f"{BLOCK}.weight": torch.zeros_like(tensors[f"{BLOCK}.weight"])}


def read_file(layout: str, folder: Path) -> tuple[Tensors, Tensors]:
    """Write a file of this layout; what is read from it, and what its tensors stand for."""
    file, own = folder / "own.safetensors", {name: t.float() for name, t in FLUX.items()}
    if layout == "SD3 and its autoencoder in one file":
        return opened(write(file, ALL_IN_ONE), "tiny-sd3"), SD3
    if layout == "all-in-one file of Flux":
        inside = {f"model.diffusion_model.{k}": t for k, t in FLUX.items()} | {f"vae.{k}": t for k, t in
                                                                               VAE_TENSORS.items()}
        file = write(folder / "flux1-dev-fp8.safetensors", inside, AXES)
        assert locate(folder) == (file, file)
        return opened(file) | VAE.load(file).state_dict(), FLUX | VAE_TENSORS
    if layout == "all-in-one file of SD3":
        clip = {"text_encoders.clip_l.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
        return VAE.load(write(file, ALL_IN_ONE | clip)).state_dict(), VAE_TENSORS
    if layout == "SD3.5 medium, SD3.5 large":
        assert family_of(lazy(published("sd3.5_large"))).model is family_of(lazy(SD35)).model
        return opened(write(file, SD35), "tiny-sd3"), SD35
    if layout in ("Flux-dev, Flux-schnell", "Flux Kontext, Flux Krea"):
        return opened(write(file, FLUX, AXES)), FLUX
    if layout == "Flux without distillation":
        own = {name: t for name, t in FLUX.items() if not name.startswith("guidance_in.")}
        return opened(write(folder / "flux1-dev-de-distill.safetensors", own, AXES)), own
    if layout == "Flux with fewer blocks":
        last = max(name.split(".")[1] for name in FLUX if name.startswith("single_blocks."))
        fewer = {name: t for name, t in FLUX.items() if not name.startswith(f"single_blocks.{last}.")}
        first = {name: t for name, t in FLUX.items() if not name.startswith("double_blocks.0.")}
        with pytest.raises(ValueError, match=r"double_blocks.0 is missing"):
            opened(write(file, first, AXES))
        return opened(write(file, fewer, AXES)), fewer
    if layout == "`NAME_incl_clips*.safetensors`":
        for clips in ("_incl_clips", "_incl_clips_t5xxlfp8"):
            write(folder / f"sd3_medium{clips}.safetensors", {"a": torch.ones(1)})
        plain = write(folder / "sd3_medium.safetensors", ALL_IN_ONE)
        assert locate(folder) == (plain, plain)
        return opened(locate(folder)[0], "tiny-sd3"), SD3
    if layout == "diffusers folder":
        vae = write(folder / "vae" / "diffusion_pytorch_model.safetensors", diffusers_names(VAE_TENSORS)).parent
        write(folder / "transformer" / "diffusion_pytorch_model.safetensors", diffusers_names(SD3))
        assert locate(folder) == (folder / "transformer", vae)
        assert family_of(open_weights(folder / "transformer")).name == "SD3"
        return opened(folder / "transformer", "tiny-sd3"), SD3
    if layout == "single file with the names of diffusers":
        return opened(write(file, diffusers_names(FLUX), AXES)), FLUX
    if layout == "shards":
        first, second = halves(diffusers_names(SD3))
        return opened(index(folder, {"a-00001-of-00002.safetensors": first, "a-00002-of-00002.safetensors": second}),
                      "tiny-sd3"), SD3
    if layout == "shards of a variant":
        first, second = halves(SD3)
        shards = {f"model.fp16-0000{k}-of-00002.safetensors": tensors for k, tensors in ((1, first), (2, second))}
        both = [opened(index(folder / name[-9:], shards, name), "tiny-sd3") for name in (
            "model.safetensors.index.fp16.json", "model.fp16.safetensors.index.json")]
        assert all(torch.equal(both[0][name], both[1][name]) for name in SD3)
        return both[0], SD3
    if layout == "a variant beside the plain file":
        write(folder / "model.fp16.safetensors", {"a": torch.ones(1)})
        return opened(write(folder / "model.safetensors", SD3).parent, "tiny-sd3"), SD3
    if layout == "fp32, fp16, bf16, fp64":
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            stored = {name: t.to(dtype) for name, t in FLUX.items()}
            assert all(torch.equal(t, stored[name].float()) for name, t in opened(write(file, stored, AXES)).items())
        return opened(write(file, FLUX, AXES)), FLUX
    if layout == "weights that are zeros alone":
        with pytest.warns(UserWarning, match="1 matrices hold zeros alone"):
            return opened(write(file, zeros(FLUX), AXES)), zeros(FLUX)
    if layout == "fp8 without scales":
        e5m2 = {name: t.to(torch.float8_e5m2) for name, t in FLUX.items()}
        assert all(torch.equal(t, e5m2[name].float()) for name, t in opened(write(file, e5m2, AXES)).items())
        own = {name: t.to(torch.float8_e4m3fn) for name, t in FLUX.items()}
        return opened(write(file, own, AXES)), own
    if layout == "scaled fp8, one scale per tensor":
        stored, own = scaled(diffusers_names(FLUX), "scale_weight")
        beside = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn), "proj_out.scale_input": torch.ones(())}
        values = opened(write(file, stored | beside, AXES))
        return {k: v.float() for k, v in diffusers_names(values).items()}, own
    if layout == "scaled fp8, one scale per row":
        stored, own = scaled(SD3, "weight_scale", per_row=True)
        return opened(write(file, {f"model.diffusion_model.{k}": t for k, t in comfy(stored).items()}), "tiny-sd3"), own
    if layout == "scaled fp8 T5":
        stored, own = scaled(T5, "scale_weight")
        own["encoder.embed_tokens.weight"] = own.pop("shared.weight", own.get("encoder.embed_tokens.weight"))
        return T5Encoder.load(write(file, stored | {"scaled_fp8": torch.ones(2)})).state_dict(), own
    if layout == "`.sft`":
        write(folder / "flux1-dev.sft", FLUX, AXES)
        with pytest.raises(ValueError, match=re.search('"(.*)"', ROWS[layout])[1]):
            locate(folder)
        return opened(folder / "flux1-dev.sft"), FLUX
    raise KeyError(layout)


@pytest.mark.parametrize("layout", [layout for layout in ROWS if layout not in REFUSED])
def test_a_layout_is_read_with_the_values_that_it_stores(layout, tmp_path):
    read, expected = read_file(layout, tmp_path)
    assert read.keys() == expected.keys()
    assert not [name for name in read if distance(read[name].float(), expected[name].float().view_as(read[name])) > 0]


# ---- the table and the code

def test_every_layout_that_the_code_names_has_its_row():
    words = {part for happens in ROWS.values() for part in re.findall(r'"([^"]+)"', happens)}
    named = {what for _, what, _ in (*names.QUANTISED, *names.OTHERS)} | set(names.OTHER_SUFFIXES.values())
    assert named <= words and names.FULL in " ".join(TEXT.split())


def test_published_and_golden_files_are_recognised_as_nothing_else():
    for case in ("sd3_medium", "sd3.5_medium", "sd3.5_large", "flux1-dev", "flux1-schnell", "flux1-dev.diffusers"):
        tensors = lazy(published(case)).with_official_names().part("model.diffusion_model.")
        for found, table in ((published(case), names.QUANTISED), (tensors, names.OTHERS)):
            assert names.recognised(found, table) == ""


def test_rows_of_a_scaled_weight_are_those_of_all(tmp_path):
    stored, values = scaled({f"{x}.weight": torch.randn(6, 4) for x in "ab"}, "scale_weight", per_row=True)
    weights = open_weights(write(tmp_path / "m.safetensors", stored))
    for name, value in values.items():
        assert torch.equal(weights[name].rows(2, 5), value[2:5]) and weights[name].shape == value.shape


@pytest.mark.parametrize("marker", ["scaled_fp8", "model.diffusion_model.scaled_fp8", "a.input_scale", "a.scale_input"])
def test_scaled_weights_without_their_scales_are_refused(marker, tmp_path):
    tensors = {"a.weight": torch.ones(6, 4).to(torch.float8_e4m3fn), marker: torch.ones(1)}
    with pytest.raises(ValueError, match=f"{marker} shows scaled fp8, but there are no scales; give the fp16"):
        open_weights(write(tmp_path / "m.safetensors", tensors))


def test_variants_and_shards_as_diffusers_writes_them(tmp_path):
    model = FluxTransformer2DModel(num_layers=1, num_single_layers=2, attention_head_dim=32, num_attention_heads=2,
                                   joint_attention_dim=48, pooled_projection_dim=24, axes_dims_rope=(4, 14, 14))
    model.half().save_pretrained(tmp_path / "variant", variant="fp16", max_shard_size="300KB")
    model.float().save_pretrained(tmp_path / "plain", max_shard_size="300KB")
    assert len(list((tmp_path / "variant").glob("*.safetensors"))) > 1
    read, expected = opened(tmp_path / "variant"), opened(tmp_path / "plain")
    assert all(torch.equal(read[name], expected[name]) for name in expected)
    assert diffusers_names(read).keys() == model.state_dict().keys()


@pytest.mark.parametrize("shape, name", [((3,), "a.scale_weight"), ((2, 2), "a.weight_scale"), ((), "b.weight_scale"),
                                         ((1,), "c.weight_scale")])
def test_a_scale_that_fits_no_weight_is_refused(shape, name, tmp_path):
    tensors = {"a.weight": torch.ones(6, 4), "c.weight": torch.ones(6, 4), "c.scale_weight": torch.ones(())}
    file = write(tmp_path / "m.safetensors", tensors | {name: torch.ones(shape)})
    with pytest.raises(ValueError, match=f"{name} .* is neither one scale of {name[0]}.weight nor one per row"):
        open_weights(file)


def test_integers_that_are_no_weights_stay(tmp_path):
    """position_ids of transformers are counted, not learned."""
    own = weights_of(read_case("clip_l"))
    file = write(tmp_path / "m.safetensors", own | {"text_model.embeddings.position_ids": torch.arange(77)[None]})
    assert CLIPText.load(file, num_heads=1).state_dict().keys() == own.keys()
