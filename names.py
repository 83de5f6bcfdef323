"""Names: tensors of diffusers to official names, for SD3, Flux and their VAEs; files of a folder; layouts of others.

Mirrors   SD3Transformer2DModel, FluxTransformer2DModel and AutoencoderKL of diffusers; the official checkpoints
Check     python -m pytest tests/test_names.py: names and shapes of every published file; tests/test_formats.py
Tables    {i}, {j}   any number, the same on both sides       {last}     the highest number in its place
          {coder}    encoder, decoder                         {last-i}   counted from the other end
          {attn}     attn, attn2                              {q}        q, k, v
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from files import entry, printable, read_json, regular

MOST_NUMBERS = 128  # different block numbers of one file; SD3.5 large has 38, Flux 57
MOST_TENSORS, MOST_LETTERS = 100_000, 300  # of a file, of a name


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
    ValueError if a part of a stacked tensor is missing, or the blocks have absurdly many numbers."""
    table = next((table for prefix, table in TABLES if any(name.startswith(prefix) for name in names)), ())
    if table and (count := len(_numbers(names))) > MOST_NUMBERS:
        raise ValueError(f"{file}: {count} different numbers in its tensors' names; at most {MOST_NUMBERS} are read")
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
    inside = any(name.startswith("model.diffusion_model.") for name in rest)  # ComfyUI's Flux in one file has "vae."
    return rows + [Row(re.sub(r"^vae\.", "first_stage_model.", name) if inside else name, (name,)) for name in rest]


def plain_rows(rows: Iterable[Row], names: Collection[str]) -> Iterator[Row]:
    """The rows with all numbers filled in: those that occur in `names`, which are official or of diffusers."""
    numbers = _numbers(names)
    choices = {"coder": ("encoder", "decoder"), "attn": ("attn", "attn2"), "q": "qkv", "i": numbers, "j": numbers}
    for row in rows:
        last = max(depth(names, side.partition("{")[0]) for side in (row.official, row.parts[0])) - 1
        keys = [key for key in choices if "{" + key + "}" in row.parts[0]]
        for values in product(*(choices[key] for key in keys)):
            fields = dict(zip(keys, values, strict=True)) | {"last": last}
            fields["last-i"] = last - fields.get("i", 0)
            yield Row(row.official.format_map(fields), tuple(part.format_map(fields) for part in row.parts), row.how)


def _numbers(names: Collection[str]) -> list[int]:
    return sorted({int(part) for name in names for part in name.split(".") if part.isdecimal()})


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


# ---- files

SHARD = re.compile(r"-\d{5}-of-(?!00001)\d{5}(\.\w+)?\.safetensors$")  # of several
LIBRARY_NAME = re.compile(r"(model|diffusion_pytorch_model)([.-].*)?\.safetensors(\.index\..*)?")
PLAIN_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors")


def files_of_folder(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The one file of a folder, or the shards and the weight_map of its index. Variants such as .fp16 are the second
    choice; ValueError if there are several of one rank."""
    found = sorted([*folder.glob("[!.]*.safetensors"), *folder.glob("[!.]*.safetensors.index*.json")])
    if any(file.suffix == ".json" for file in found):
        found = [file for file in found if not SHARD.search(file.name)]
    elif shards := [file for file in found if SHARD.search(file.name)]:
        raise ValueError(f"{folder}: {shards[0].name} and other shards without their index.json: download it too")
    plain = [f for f in found if f.name.removesuffix(".index.json") in PLAIN_NAMES]
    chosen = plain or found
    if len(chosen) == 1:
        return _shards(chosen[0]) if chosen[0].suffix == ".json" else (chosen, {})
    others = [f.name for f in folder.iterdir() if f.suffix in OTHER_SUFFIXES]
    if others and not found:
        raise ValueError(f"{folder}: only {others[0]}, {OTHER_SUFFIXES[Path(others[0]).suffix]}; "
                         "download the .safetensors")
    inside = "; it is a model folder: give its transformer/ or a file" if (folder / "transformer").is_dir() else ""
    several = f"several models or variants ({', '.join(f.name for f in chosen[:4])}): name one file, or keep one"
    raise ValueError(f"{folder}: {several if found else 'no .safetensors file'}{inside}")


def check_path(file: Path) -> None:
    """Refuse a file by its suffix, by what is beside it, or by a path that safetensors cannot open."""
    if what := OTHER_SUFFIXES.get(file.suffix.lower()):
        raise ValueError(f"{file}: {what}; {CONVERT}")
    regular(file)
    if file.with_name(f"{file.name}.aria2").exists():  # the whole file is there from the start, filled with zeros
        raise ValueError(f"{file}: its download did not end, {file.name}.aria2 is still beside it; continue it")
    if any("\ud800" <= letter <= "\udfff" for letter in str(file)):
        raise ValueError(f"{file}: safetensors only open paths in UTF-8; rename the file or its folder")


def model_inside(folder: Path) -> Path | None:
    """The first model folder one or two levels below, as in a download's own folder or a cache of Hugging Face."""
    parts = (part for level in ("*/", "*/*/") for name in ("transformer", "sd3*.safetensors", "flux*.safetensors")
             for part in sorted(folder.glob(level + name)))
    return next((part.parent for part in parts), None)


def _shards(index: Path) -> tuple[list[Path], dict[str, str]]:
    listed = entry(read_json(index), "weight_map", dict, index)  # tensor name: file
    shards = sorted({str(file) for file in listed.values()})
    ours = re.compile(r"[\w.-]{1,240}\.safetensors")
    if not shards or not all(map(ours.fullmatch, shards)):
        foreign = next((shard for shard in shards if not ours.fullmatch(shard)), "nothing")
        raise ValueError(f"{index}: lists {foreign[:80]!r}, which is no shard of this folder: download it again")
    if missing := [shard for shard in shards if not (index.parent / shard).is_file()]:
        raise ValueError(f"{index.parent}: {len(missing)} of {len(shards)} shards are missing, "
                         f"the first is {missing[0]}")
    return [index.parent / shard for shard in shards], listed


# ---- layouts of others

def recognised(names: Collection[str], table: tuple[tuple[str, str, str], ...]) -> str:
    """What a table's first row that fits says of a file, with the name that shows it; "" if none fits."""
    for shows, what, do in table:
        if name := next(filter(re.compile(shows).search, names), ""):
            return f"{what} ({name} ...); {do}"
    return ""


def check(file: Path, stored: Mapping[str, str]) -> None:
    """Refuse a file by the names and storage dtypes, as its header spells them, of its tensors: ValueError."""
    if len(stored) > MOST_TENSORS:
        raise ValueError(f"{file}: {len(stored)} tensors; at most {MOST_TENSORS} are read")
    if bad := next((name for name in stored if not name.isprintable() or len(name) > MOST_LETTERS), ""):
        raise ValueError(f"{file}: a tensor's name has control characters or more than {MOST_LETTERS} letters "
                         f"({printable(bad)[:40]} ...): download it again")
    if quantised := recognised(stored, QUANTISED):
        raise ValueError(f"{file}: {quantised}")
    weights = (name for name in stored if name.endswith((".weight", ".bias", ".scale")))
    if odd := next((name for name in weights if stored[name] not in FLOATING), ""):
        raise ValueError(f"{file}: {odd} is stored as {stored[odd]}, which is no number by itself; {FULL}")


FULL = "give the fp16, bf16 or fp8 file of the same model"
MERGE = "merge it into its model and give the complete file"
AS_LORA = "sample.py takes it as --lora, beside its model"
PLAIN_LORA = "give a plain LoRA of the transformer, or the complete model that it is merged into"
PLAIN = "give the plain text-to-image model"
TRANSFORMER = "give an SD3 or Flux transformer"

# part of a tensor's name (a regular expression), what the file is, what to do: refused wherever it is met
QUANTISED = (
    (r"\.quant_state\.bitsandbytes__|\.weight\.(nested_)?(absmax|quant_map)$", "bitsandbytes 4-bit weights, nf4 or fp4",
     FULL),
    (r"\.SCB$|\.weight_format$",                       "bitsandbytes int8 weights", FULL),
    (r"\._weight_qdata$|\.weight:|\.tensor_impl\b",    "torchao weights", FULL),
    (r"\.weight\._data\b",                             "optimum-quanto weights", FULL),
    (r"\.(wscales|wtscale|wcscales|smooth_factor)$",   "SVDQuant weights for nunchaku", FULL),
    (r"\.g_idx$",                                      "GPTQ weights", FULL),
    (r"\.qzeros$|\.qweight$",                          "AWQ or GPTQ weights", FULL),
    (r"\.zero_point$",                                 "SDNQ weights", FULL),
    (r"\.W_q$",                                        "HQQ weights", FULL),
    (r"\.weight_packed$",                              "packed weights of compressed-tensors", FULL),
    (r"\.weight_scale_2$",                             "NVFP4 weights", FULL),
    (r"\.weight_scale_inv$",                           "fp8 weights scaled in blocks", FULL))

# as above: refused where a transformer is expected
OTHERS = (
    (r"\.base_layer\.",                                "a model whose adapter is not merged", MERGE),
    (r"\b(hada|lokr)_(w|t)|\.oft_|_glora\b|\.(a|b)[12]\.weight$", "a LyCORIS adapter: LoHa, LoKr, OFT or GLoRA", MERGE),
    (r"ip_adapter|\.to_[kv]_ip\.|^image_proj\.",       "an IP-Adapter, for prompts that are pictures", PLAIN),
    (r"^pulid_",                                       "PuLID, for portraits", PLAIN),
    (r"^redux_(up|down)\.",                            "Flux Redux, for prompts that are pictures", PLAIN),
    (r"^controlnet_|^control_model\.|^input_hint_block\.|^pos_embed_input\.", "a ControlNet", PLAIN),
    (r"\.processor\..*lora",                           "a LoRA in XLabs' names", MERGE),
    (r"^(lora_(unet|transformer|te\d?|prior)|lycoris)_", "a LoRA in kohya's names", AS_LORA),
    (r"^((double|single)_blocks|img_in|txt_in)\b.*\.lora_[AB]\.", "a LoRA in Black Forest Labs' names", AS_LORA),
    (r"lora(_|\d)",                                    "a LoRA in the names of PEFT or diffusers", AS_LORA),
    (r"\.diff(_b)?$",                                  "the difference of two models", MERGE),
    (r"^(emb_params$|string_to_param|<|(clip_[lg]|t5xxl)$)", "a textual inversion, which stands for a word",
     "write the words out; " + TRANSFORMER),
    (r"^(module|_orig_mod|diffusion_model|transformer|net)\.(joint|double|single|transformer)_blocks\.",
     "a transformer with a prefix in front of its names", "save its tensors without the prefix"),
    (r"^distilled_guidance_layer\.",                   "the transformer of Chroma", TRANSFORMER),
    (r"^double_stream_modulation_img\.",               "the transformer of FLUX.2", TRANSFORMER),
    (r"^double_blocks\.\d+\.img_attn_qkv\.",           "the transformer of HunyuanVideo", TRANSFORMER),
    (r"^double_layers\.|^joint_transformer_blocks\.",  "the transformer of AuraFlow", TRANSFORMER),
    (r"^transformer_blocks\.\d+\.img_mod\.",           "the transformer of Qwen-Image", TRANSFORMER),
    (r"^(noise|context)_refiner\.",                    "the transformer of Lumina or Z-Image", TRANSFORMER),
    (r"^(input|output|down|up)_blocks\.",              "the UNet of Stable Diffusion 1, 2 or XL", TRANSFORMER),
    (r"^((encoder|decoder)\.(conv_in|conv_out|mid|up|down)|(post_)?quant_conv)\b", "an autoencoder", TRANSFORMER),
    (r"^((encoder|decoder)\.)?layers\.\d+\.(conv|weight)", "a tiny autoencoder (TAESD)", TRANSFORMER),
    (r"^vision_model\.|^visual\.",                     "a CLIP with its image encoder", TRANSFORMER),
    (r"^text_model\.|^embeddings\.token_embedding",    "a CLIP text encoder", TRANSFORMER),
    (r"^transformer\.resblocks\.",                     "an OpenCLIP text encoder", TRANSFORMER),
    (r"^decoder\.block\.",                             "a complete T5, with its decoder", TRANSFORMER),
    (r"^(shared\.weight$|encoder\.block\.\d+\.layer\.)", "a T5 encoder", TRANSFORMER),
    (r"^(model\.)?(language_model\.)?layers\.\d+\.self_attn\.", "a language model", TRANSFORMER))

# as above: refused where the autoencoder of SD3 or Flux is expected
AUTOENCODERS = tuple((shows, f"the autoencoder of {what}", "") for shows, what in (
    (r"^bn\.running_mean$",                                "FLUX.2"),
    (r"^quantize\.",                                       "a VQ model"),
    (r"^((en|de)coder\.)?(layers\.)?\d+\.(conv\.|weight)", "TAESD, which is a preview"),
    (r"^(en|de)coder\.(conv1|(down|up)samples|middle)\.",  "Wan or Qwen-Image"),
    (r"\.conv_in\.conv\.|\.time_conv\.",                   "a video model"),
    (r"^(en|de)coder\.(stages|patchify)\b",                "Sana or another deep-compression model")))

# refused beside a complete transformer too
ADAPTERS = tuple((shows, what, MERGE) for shows, what, do in OTHERS if do in (MERGE, AS_LORA))

# as above: refused where a LoRA is expected
VARIANTS = (
    (r"(^|\.)(x_embedder|img_in|pos_embed)(\.proj)?\.weight$|^(text_model|encoder|decoder|shared)\.",
     "a model, no adapter", "give a transformer as --transformer, an autoencoder as --vae"),
    (r"\.dora_scale$|\.lora_magnitude_vector\b",       "a DoRA, whose matrices also have norms", PLAIN_LORA),
    (r"\.lora_mid\.",                                  "a LoCon with three factors", PLAIN_LORA),
    (r"\.lora_(B|up)\.(default\.)?bias$",              "a LoRA that also adds biases", PLAIN_LORA),
    (r"^lora_te\d?_|^text_encoder",                    "a LoRA that also adapts text encoders", PLAIN_LORA),
    (r"norm\w*\.(scale|weight)$|\.set_weight$",        "a LoRA that also replaces norms, for control", PLAIN_LORA),
    *((shows, what, PLAIN_LORA) for shows, what, do in OTHERS if do == MERGE))

# scaled fp8, as ComfyUI and others write it: weight = fp8 * scale
SCALES = (".scale_weight", ".weight_scale")            # of the ".weight" beside it
BESIDE_SCALES = re.compile(r"(^|\.)(scale_input|input_scale|scaled_fp8)$")  # for fp8 arithmetic, which is not used
FP8_FORMATS = ("float8_e4m3fn", "float8_e5m2")         # that ".comfy_quant" may record
FLOATING = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # how weights are stored, as headers spell it

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
CONVERT = "give the .safetensors of the same weights"
OTHER_SUFFIXES = dict.fromkeys(PICKLE_SUFFIXES, "a pickle can run code when it is opened") | {
    ".gguf": "a GGUF file, which is quantised", ".onnx": "an ONNX graph", ".msgpack": "weights for Flax",
    ".h5": "weights for TensorFlow",
    **dict.fromkeys((".engine", ".plan", ".trt"), "a TensorRT engine"), ".npz": "weights for NumPy or MLX",
    **dict.fromkeys((".part", ".incomplete", ".crdownload", ".aria2"), "a download that did not end")}
FOREIGN = (  # first bytes of other files, what they look like, what to do
    (b"PK", ", looks like a zip archive or pickle", CONVERT), (b"\x80", ", looks like a pickle", CONVERT),
    (b"GGUF", ", looks like a GGUF file", CONVERT), (b"<", ", looks like a web page", "download it again"),
    (b"version https://git-lfs", ", a pointer of Git LFS", "git lfs pull fetches the file"),
    (b"{", ", looks like JSON", "give the folder of an index.json, or download it again"))
