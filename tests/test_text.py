"""Text encoders, tokenizers, SD3's conditioning: numbers of the references, published names, real vocabularies."""

import json
import os
import random
import shutil
import warnings
from pathlib import Path

import pytest
import sentencepiece
import torch
from golden import BOUNDS, published, read_case, weights_of, write_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from checkpoint import LazyTensor, Weights
from text import CLIPText, CLIPTokenizer, SD3Text, T5Encoder, T5Tokenizer, each, sd3_context, t5_buckets

VOCABULARIES = Path(os.environ.get("D4K_TOKENIZERS", Path(__file__).parents[2] / "tokenizers"))
with_vocabularies = pytest.mark.skipif(not (VOCABULARIES / "sd3").is_dir(), reason=(
    f"no real vocabularies in {VOCABULARIES}: they have their own licences and are not in the repository; "
    "D4K_TOKENIZERS names a folder with the downloads' sd3/tokenizer, _2, _3 and flux/tokenizer, _2"))


def golden(case, tmp_path, device="cpu"):
    """Path of the weights, inputs, expected outputs of a case, and the positions that the outputs are kept at."""
    path, tensors = write_weights(case, tmp_path, device)
    inputs, expected = ({k.removeprefix(side): v for k, v in tensors.items() if k.startswith(side)}
                        for side in ("in/", "out/"))
    return path, inputs, expected, tensors.get("at")


def error(ours, expected):
    assert ours.shape == expected.shape
    return (ours - expected).abs().max().item()


def rows(x, at):
    return x[:, at[at < x.shape[1]]]


# ---- encoders against the reference

@pytest.mark.parametrize(("case", "activation", "heads"), [("clip_l", "quick_gelu", 4), ("clip_g", "gelu", 5)])
def test_clip_equals_the_reference(case, activation, heads, tmp_path, device):
    path, given, expected, at = golden(case, tmp_path, device)
    clip = CLIPText.load(path, activation, heads, eos=int(given["input_ids"].max()), device=device)
    last, penultimate, pooled = clip(given["input_ids"])
    assert error(rows(last, at), expected["last_hidden_state"]) < BOUNDS[device]
    assert error(rows(penultimate, at), expected["penultimate_no_final_ln"]) < BOUNDS[device]
    assert error(pooled, expected["pooled_projected"]) < BOUNDS[device]
    assert error(clip.at_eos(last, given["input_ids"]), expected["pooled_unprojected"]) < BOUNDS[device]


def test_t5_equals_the_reference_at_both_lengths(tmp_path, device):
    path, given, expected, at = golden("t5_encoder", tmp_path, device)
    t5 = T5Encoder.load(path, device)
    assert error(rows(t5(given["input_ids_77"]), at), expected["last_hidden_77"]) < BOUNDS[device]
    assert error(rows(t5(given["input_ids_256"]), at), expected["last_hidden_256"]) < BOUNDS[device]
    assert error(t5.position_bias(256)[:, :, :1], expected["position_bias"]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_t5_bias_has_the_stride_that_fused_cuda_attention_needs(tmp_path, dtype):
    t5 = T5Encoder.load(golden("t5_encoder", tmp_path)[0], dtype=dtype)
    assert t5.position_bias(77).stride() == (t5.position_bias(77).numel(), 77 * 77, 77, 1)


def test_t5_buckets_are_the_reference(tmp_path):
    expected = read_case("t5_encoder")["out/buckets_rel_-399_399"]
    assert torch.equal(t5_buckets(torch.arange(-399, 400)), expected.long())


def test_sd3_context_equals_the_reference(tmp_path):
    _, given, expected, _ = golden("sd3_cond", tmp_path)
    context = sd3_context(given["l_out"], given["g_out"], given["t5_out"])
    assert torch.equal(context[:, :2, :128], torch.cat((given["l_out"], given["g_out"]), -1)[:, :2])
    assert torch.equal(context[:, 76:79], expected["context_tokens_76_79"])
    assert error(context.sum(-1), expected["context_sum_per_token"]) < 1e-3      # a float32 sum of 4096 terms up to 166
    assert torch.equal(torch.cat((given["l_pooled"], given["g_pooled"]), -1), expected["pooled"])
    assert context[:, :77, 128:].abs().max() == 0


def test_sd3_context_refuses_a_t5_narrower_than_the_clips():
    with pytest.raises(ValueError, match="T5 is 8 wide, less than both CLIPs together \\(10\\)"):
        sd3_context(torch.zeros(1, 3, 4), torch.zeros(1, 3, 6), torch.zeros(1, 2, 8))


# ---- names and shapes of the published files

class Built(Exception):
    """The names and shapes fitted; nothing is allocated after that."""


def manifest(name, monkeypatch):
    """Weights with the shapes of a published file; reading the first of them ends the test of names."""
    def read():
        raise Built
    weights = Weights({k: LazyTensor(shape, read) for k, shape in published(name).items()}, {}, f"{name}.safetensors")
    monkeypatch.setattr("text.open_weights", lambda path: weights)
    return weights


PUBLISHED = [("clip_l", CLIPText), ("clip_g", CLIPText), ("t5xxl", T5Encoder)]


@pytest.mark.parametrize(("name", "encoder"), PUBLISHED)
def test_encoder_takes_exactly_the_published_names(name, encoder, monkeypatch):
    manifest(name, monkeypatch)
    with pytest.raises(Built):
        encoder.load(name)


@pytest.mark.parametrize(("name", "encoder"), PUBLISHED)
@pytest.mark.parametrize("damage", ["missing", "unknown", "misshapen"])
def test_encoder_refuses_and_names_one_wrong_tensor(name, encoder, damage, monkeypatch):
    weights = manifest(name, monkeypatch)
    victim = "text_model.encoder.layers.5.self_attn.k_proj.weight"
    if name == "t5xxl":
        victim = "encoder.block.5.layer.0.SelfAttention.k.weight"
    if damage == "missing":
        del weights[victim]
    elif damage == "unknown":
        victim = "lora.down.weight"
        weights[victim] = LazyTensor((4, 4), None)
    else:
        weights[victim] = LazyTensor((7, 7), None)
    with pytest.raises(ValueError, match=victim.replace(".", r"\.")):
        encoder.load(name)


@pytest.mark.parametrize(("name", "encoder"), PUBLISHED)
def test_encoder_without_its_last_block_is_refused(name, encoder, monkeypatch):
    weights, depth = manifest(name, monkeypatch), {"clip_l": 12, "clip_g": 32, "t5xxl": 24}[name]
    for victim in [k for k in weights if f".{depth - 1}." in k]:
        del weights[victim]
    with pytest.raises(ValueError, match=f"{name}.safetensors: {depth - 1} .*published file of its width has {depth}"):
        encoder.load(name)


@pytest.mark.parametrize(("name", "encoder"), [PUBLISHED[0], PUBLISHED[2]])
def test_encoder_names_whichever_tensor_is_missing(name, encoder, monkeypatch):
    weights = manifest(name, monkeypatch)
    optional = ("text_projection.weight",)
    first = [k for k in weights if ".0." in k or ".layers." not in k and ".block." not in k]
    for victim in [k for k in first if k not in optional]:
        lost = weights.pop(victim)
        with pytest.raises(ValueError, match=victim.replace(".", r"\.")):
            encoder.load(name)
        weights[victim] = lost


def test_clip_projection_and_leftovers_are_optional(monkeypatch):
    weights = manifest("clip_l", monkeypatch)
    del weights["text_projection.weight"]
    weights["text_model.embeddings.position_ids"] = LazyTensor((1, 77), None)
    weights["logit_scale"] = LazyTensor((), None)
    with pytest.raises(Built):
        CLIPText.load("clip_l")


@pytest.mark.parametrize("names", [("shared",), ("encoder.embed_tokens",), ("shared", "encoder.embed_tokens")])
def test_t5_embedding_has_either_name_or_both(names, monkeypatch):
    weights = manifest("t5xxl", monkeypatch)
    table = weights.pop("encoder.embed_tokens.weight")
    weights |= {f"{name}.weight": table for name in names}
    with pytest.raises(Built):
        T5Encoder.load("t5xxl")


# ---- encoders against transformers

def transformers_module():
    module = pytest.importorskip("transformers", reason="transformers is a development requirement")
    module.logging.set_verbosity_error()
    return module


def save_clip(folder, projected=True, act="gelu", shard="5GB", vocabulary=120, width=48):
    t = transformers_module()
    torch.manual_seed(3)
    config = t.CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=80, num_hidden_layers=3, num_attention_heads=3,
        max_position_embeddings=20, hidden_act=act, projection_dim=40, bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1, initializer_factor=4.0)
    model = (t.CLIPTextModelWithProjection if projected else t.CLIPTextModel)(config).eval()
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def save_t5(folder, shard="5GB", width=64, vocabulary=150):
    t = transformers_module()
    torch.manual_seed(4)
    config = t.T5Config(vocab_size=vocabulary, d_model=width, d_kv=12, d_ff=72, num_layers=3, num_heads=6,
                        feed_forward_proj="gated-gelu", initializer_factor=0.7)
    model = t.T5EncoderModel(config).eval()
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def clip_tokens(vocabulary=120, length=20):
    tokens = torch.randint(0, vocabulary - 2, (3, length), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = vocabulary - 2
    for row, end in enumerate((1, 9, length - 1)):      # the empty prompt, a short one padded with the end, a full one
        tokens[row, end:] = vocabulary - 1
    return tokens


@torch.no_grad()
@pytest.mark.parametrize("shard", ["5GB", "60KB"])
@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("projected", [True, False])
def test_clip_equals_transformers_from_its_own_folder(projected, act, shard, tmp_path):
    model, tokens = save_clip(tmp_path, projected, act, shard), clip_tokens()
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "60KB")
    expected = model(tokens, output_hidden_states=True)
    last, penultimate, pooled = CLIPText.load(tmp_path)(tokens)
    assert error(last, expected.last_hidden_state) < 1e-5
    assert error(penultimate, expected.hidden_states[-2]) < 1e-5
    assert error(pooled, expected.text_embeds if projected else expected.pooler_output) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("shard", ["5GB", "60KB"])
def test_t5_equals_transformers_from_its_own_folder(shard, tmp_path):
    model = save_t5(tmp_path, shard)
    tokens = torch.randint(0, 150, (2, 300), generator=torch.Generator().manual_seed(0))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "60KB")
    expected = model(tokens).last_hidden_state
    assert error(T5Encoder.load(tmp_path)(tokens), expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("only", [False, True])
def test_half_precision_shards_are_read_only_where_there_are_no_others(only, tmp_path):
    model = save_t5(tmp_path, "60KB")
    tokens, expected = torch.arange(150)[None], model(torch.arange(150)[None]).last_hidden_state
    model.half().save_pretrained(tmp_path, max_shard_size="30KB", variant="fp16")
    for file in [file for file in tmp_path.glob("model*") if only and "fp16" not in file.name]:
        file.unlink()
    difference = error(T5Encoder.load(tmp_path)(tokens), expected)
    assert 1e-4 < difference < 1e-2 if only else difference < 1e-5


@torch.no_grad()
def test_complete_t5_gives_the_numbers_of_its_encoder(tmp_path):
    t = transformers_module()
    torch.manual_seed(5)
    whole = t.T5ForConditionalGeneration(t.T5Config(
        vocab_size=90, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False, initializer_factor=0.7)).eval()
    whole.save_pretrained(tmp_path)
    tokens = torch.randint(0, 90, (2, 40), generator=torch.Generator().manual_seed(0))
    assert error(T5Encoder.load(tmp_path)(tokens), whole.encoder(tokens).last_hidden_state) < 1e-5


def other_encoders(t):
    """Text encoders and others that are not SD3's or Flux's: name -> model, loader, words of the refusal."""
    small = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
    t5 = dict(vocab_size=90, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4)
    gated = t5 | {"feed_forward_proj": "gated-gelu"}
    text, image = t.CLIPTextConfig(vocab_size=90, **small), t.CLIPVisionConfig(image_size=32, patch_size=16, **small)
    both = t.CLIPConfig(text_config=text.to_dict(), vision_config=image.to_dict(), projection_dim=16)
    return {
        "t5 v1.0": (t.T5EncoderModel(t.T5Config(**t5)), T5Encoder, "feed_forward_proj 'relu'", "a T5 v1.0"),
        "umt5": (t.UMT5EncoderModel(t.UMT5Config(**gated)), T5Encoder, "model_type 'umt5'", "a UMT5"),
        "bert": (t.BertModel(t.BertConfig(vocab_size=90, **small)), T5Encoder, "model_type 'bert'", "no T5 encoder"),
        "clip": (t.CLIPModel(both), CLIPText, "holds CLIP's image encoder", "holds CLIP's image encoder"),
        "vision": (t.CLIPVisionModel(image), CLIPText, "image encoder|model_type 'clip_vision_model'",
                   "image encoder|no CLIP text encoder"),
        "t5 as clip": (t.T5EncoderModel(t.T5Config(**gated)), CLIPText, "model_type 't5'", "no CLIP text encoder")}


@pytest.mark.parametrize("name", ["t5 v1.0", "umt5", "bert", "clip", "vision", "t5 as clip"])
def test_other_encoders_are_named_by_their_config_or_without_it_by_their_tensors(name, tmp_path):
    model, encoder, by_config, by_tensors = other_encoders(transformers_module())[name]
    model.save_pretrained(tmp_path)
    for words in (by_config, by_tensors):
        with pytest.raises(ValueError, match=words) as refusal:
            encoder.load(tmp_path)
        assert str(refusal.value).startswith(str(tmp_path)) and "\n" not in str(refusal.value)
        (tmp_path / "config.json").unlink(missing_ok=True)


@torch.no_grad()
def test_bfloat16_encoders_run_and_stay_near_float32(tmp_path):
    for case, load, inputs in (("clip_l", CLIPText.load, "input_ids"), ("t5_encoder", T5Encoder.load, "input_ids_77")):
        path, given, _, _ = golden(case, tmp_path)
        keywords = {"num_heads": 4, "activation": "quick_gelu"} if case == "clip_l" else {}
        full, half = (load(path, dtype=dtype, **keywords)(given[inputs]) for dtype in (None, torch.bfloat16))
        full, half = (x[0] if isinstance(x, tuple) else x for x in (full, half))
        assert half.dtype is torch.bfloat16 and (half.float() - full).abs().mean() < 0.05


def test_t5_reads_fp8_storage_and_refuses_float16_compute(tmp_path):
    path, given, _, _ = golden("t5_encoder", tmp_path)
    stored = {k: v.to(torch.float8_e4m3fn) for k, v in load_file(path).items()}
    save_file(stored, path)
    t5 = T5Encoder.load(path)
    assert torch.equal(t5.encoder.final_layer_norm.weight, stored["encoder.final_layer_norm.weight"].float())
    assert torch.isfinite(t5(given["input_ids_77"])).all()
    with pytest.raises(ValueError, match="T5 overflows in float16"):
        T5Encoder.load(path, dtype=torch.float16)


# ---- what shapes do not tell

def clip_file(path, metadata):
    """A CLIP with this metadata."""
    save_file(weights_of(read_case("clip_l")), path, metadata)
    return path


def test_clip_keyword_wins_over_metadata_and_metadata_over_official(tmp_path):
    metadata = {"num_attention_heads": "2", "hidden_act": "quick_gelu", "eos_token_id": "5"}
    path = clip_file(tmp_path / "clip.safetensors", metadata)
    recorded, chosen = CLIPText.load(path), CLIPText.load(path, activation="gelu", num_heads=4, eos=6)
    for clip, heads, activation, eos in ((recorded, 2, "quick_gelu", 5), (chosen, 4, "gelu", 6)):
        layer = clip.text_model.encoder["layers"][0]
        assert (layer.self_attn.num_heads, layer.activation, clip.eos) == (heads, activation, eos)


def test_clip_official_values_hold_where_the_file_is_silent_or_legacy(tmp_path):
    clip = CLIPText.load(clip_file(tmp_path / "clip.safetensors", {"eos_token_id": "2"}))
    layer = clip.text_model.encoder["layers"][0]
    vocabulary = clip.text_model.embeddings.token_embedding.num_embeddings
    assert (layer.self_attn.num_heads, layer.activation, clip.eos) == (64 // 64, "gelu", vocabulary - 1)


def test_clip_refuses_heads_that_do_not_divide_and_foreign_activations(tmp_path):
    path = clip_file(tmp_path / "clip.safetensors", {"hidden_act": "relu"})
    with pytest.raises(ValueError, match="activation 'relu'"):
        CLIPText.load(path)
    with pytest.raises(ValueError, match="5 heads do not divide the width 64; give num_heads"):
        CLIPText.load(path, num_heads=5)


@torch.no_grad()
def test_projection_under_openclips_name_is_transposed(tmp_path):
    model, tokens = save_clip(tmp_path), clip_tokens()
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["text_projection"] = tensors.pop("text_projection.weight").T.contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    assert error(CLIPText.load(tmp_path)(tokens)[2], model(tokens).text_embeds) < 1e-5


@pytest.mark.parametrize(("case", "encoder", "key", "value", "message"), [
    ("clip_l", CLIPText, "eos_token_id", "60000", "eos_token_id has 60000, expected an id of its vocabulary"),
    ("clip_l", CLIPText, "num_attention_heads", "7", "7 heads do not divide the width 64"),
    ("t5_encoder", T5Encoder, "length", "0", "T5 length 0: give 1 to 512 tokens"),
    ("t5_encoder", T5Encoder, "length", "1e18", "T5 length 1000000000000000000: give 1 to 512"),
    ("t5_encoder", T5Encoder, "relative_attention_max_distance", "64", "max_distance '64', expected 128")])
def test_absurd_metadata_is_refused_with_its_file(case, encoder, key, value, message, tmp_path):
    save_file(weights_of(read_case(case)), tmp_path / "encoder.safetensors", {key: value})
    with pytest.raises(ValueError, match=f"encoder.safetensors: .*{message}"):
        encoder.load(tmp_path / "encoder.safetensors")


def test_t5_whose_buckets_have_no_logarithm_is_refused(tmp_path):
    tensors = weights_of(read_case("t5_encoder"))
    name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    save_file(tensors | {name: tensors[name][:2].clone()}, tmp_path / "t5.safetensors")
    with pytest.raises(ValueError, match="t5.safetensors: .*relative_attention_bias.weight has 2, expected 4 to 511"):
        T5Encoder.load(tmp_path / "t5.safetensors")


def test_clip_pools_at_the_first_end_and_ignores_what_follows(tmp_path):
    path, given, _, _ = golden("clip_g", tmp_path)
    tokens, eos = given["input_ids"][:1], int(given["input_ids"].max())
    clip, changed = CLIPText.load(path, num_heads=5), given["input_ids"][:1].clone()
    first = (tokens[0] == eos).nonzero()[0].item()
    changed[0, first + 1:] = eos
    assert error(clip(changed)[2], clip(tokens)[2]) < 1e-6
    assert (clip(changed)[0] - clip(tokens)[0]).abs().max() > 0.1


def test_clip_refuses_rows_without_end_and_too_many_tokens(tmp_path):
    path, given, _, _ = golden("clip_g", tmp_path)
    clip = CLIPText.load(path, num_heads=5)
    with pytest.raises(ValueError, match="holds no end token"):
        clip(torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="78 tokens: this CLIP has 77 positions"):
        clip(torch.zeros(1, 78, dtype=torch.long))


@pytest.mark.parametrize(("case", "encoder", "key"), [
    ("clip_l", CLIPText, "num_attention_heads"), ("clip_l", CLIPText, "eos_token_id"),
    ("t5_encoder", T5Encoder, "length")])
def test_metadata_that_is_no_integer_is_named_with_its_file(case, encoder, key, tmp_path):
    for value in ("x", "1.5"):
        save_file(weights_of(read_case(case)), tmp_path / "encoder.safetensors", {key: value})
        message = f"encoder.safetensors: its metadata records {key} '{value}', which is no integer"
        with pytest.raises(ValueError, match=message):
            encoder.load(tmp_path / "encoder.safetensors")


@pytest.mark.parametrize(("case", "encoder"), [("clip_l", CLIPText), ("t5_encoder", T5Encoder)])
def test_every_module_with_weights_is_called(case, encoder, tmp_path):
    """So that an adapter or a hook works on any of them."""
    path, inputs, _, _ = golden(case, tmp_path)
    model, called, tokens = encoder.load(path), set(), next(iter(inputs.values()))
    model.eos = int(tokens.max())
    owners = {name for name, module in model.named_modules() if module._parameters}
    for name in owners:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name))
    model(tokens)
    assert called == owners


def test_encoders_are_frozen(tmp_path):
    clip, t5 = (golden(case, tmp_path)[0] for case in ("clip_l", "t5_encoder"))
    for module in (CLIPText.load(clip), T5Encoder.load(t5)):
        assert not module.training and not any(p.requires_grad for p in module.parameters())


# ---- tokenizers

PROMPTS = [
    "", " ", "   ", "\n", "\t\n ", "The house is wonderful.", "  leading", "trailing  ", "two  spaces   three",
    "a\nb\n\nc", "tab\there\r\nand there", "a\u00a0nbsp", "ideographic\u3000space", "line\u2028separator",
    "zero\u200bwidth", "soft\xadhyphen", "nul\x00inside", "\x07bell", "next\x0bline",
    "It's a dog's life, isn't it? I'll've we're they'd I'm", "IT'S A DOG'S LIFE", "don’t “quote” ‘this’ — or–that…",
    "!", "!!", "hello!!", "hello! !", "wow!!!?!?!", "...", "?!.,;:", "-----", "####", "@user #tag $5 %", "a_b-c+d=e",
    "C:\\path\\file.txt", "https://example.com/a?b=c&d=e#f", "1", "42", "3.14159", "1,234,567.89",
    "2024-01-31T12:34:56Z", "x²+y³=½", "①②③", "Ⅻ", "٣٤٥", "\uff10\uff11\uff12\uff21\uff22\uff23", "ﬁnance ﬂow", "café",
    "cafe\u0301", "naïve", "Ångström", "A\u030a", "a\u0323\u0308", "I\u0307stanbul İSTANBUL", "ǅ ß ẞ", "STRASSE straße",
    "Привет, мир!", "Ελληνικά Σίσυφος", "שלום עולם", "مرحبا بالعالم", "नमस\u094dत\u0947 द\u0941न\u093fय\u093e",
    "สว\u0e31สด\u0e35ชาวโลก", "\uc548\ub155\ud558\uc138\uc694 \uc138\uacc4", "\ud55c\uae00",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8", "\u3053\u3093\u306b\u3061\u306f\u3001\u4e16\u754c\u3002",
    "\u30ab\u30bf\u30ab\u30ca ﾊﾝｶｸ", "\u4e2d\u6587\u6ca1\u6709\u7a7a\u683c\u7684\u53e5\u5b50",
    "\u6f22\u5b57 with English", "\U00020bb7\u91ce\u5bb6", "\U0001f642", "\U0001f642\U0001f642",
    "ok \U0001f44d\U0001f3fd fine", "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 family", "🇩🇪 flag",
    "❤\ufe0f heart", "a\U0001f642b", "™ © ®", "€100 £5 ¥7", "→ ⇒ ∀x∈ℝ", "\ufeffbom", "�", "\ue000private",
    "x\u0300\u0301\u0302", "<|endoftext|>", "<|startoftext|>", "a<|endoftext|>b", "a <|endoftext|> b",
    "<|startoftext|>a photo<|endoftext|>", "<|ENDOFTEXT|>", "<|StartOfText|> x", "</s>", "a </s> b", "a</s>b",
    " </s> a", "</S>", "<s>", "<pad>", "<pad> x", "x <unk> y", "<extra_id_0>", "a <extra_id_0> b", "a<extra_id_5>b",
    "<extra_id_99>", "<extra_id_100>", "<extra_id_0><extra_id_1>", "<extra_id_0> ", "  a <extra_id_0>   b",
    "a </s>\n<extra_id_3>\tb", "<extra_id_", "▁under▁", "a ▁ b", "</w>", "Ġspace", "<0x0A>", "[CLS] [SEP] [MASK]",
    "{[}~", "''''", "'s", "' s", "''re", "snake_case camelCase PascalCase", "UPPER lower MiXeD",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "antidisestablishmentarianism", "qwrtpsdfg zxcvbnm",
    "Lorem ipsum dolor sit amet, consectetur adipiscing elit.",
    "a photograph of a red fox in the snow, 4k, highly detailed, sharp focus, golden hour",
    "(masterpiece:1.2), ((best quality)), [blurry]", "portrait of Frida Kahlo by Gustav Klimt",
    "8K UHD DSLR f/1.8 85mm ISO100", "co-operative re-entry e-mail", "50% off!", "rock'n'roll", "O'Reilly & Sons",
]


def prompts():
    """The list above, and sentences and noise from a fixed seed: more than 300."""
    draw = random.Random(0)
    words = ("the a fox snow 4K sharp, Ünï \u6f22\u5b57 \U0001f642 12 don't - golden; (soft) light. rock! "
             "of\nhill\ttree  x").split(" ")
    mixed = [" ".join(draw.choices(words, k=draw.randint(1, 60))) for _ in range(80)]
    ranges = ((32, 127), (0xA0, 0x250), (0x300, 0x370), (0x2000, 0x2070), (0x3040, 0x30FF), (0x1F300, 0x1F350))
    alphabet = [chr(c) for first, end in ranges for c in range(first, end)]
    noise = ["".join(draw.choices(alphabet, k=draw.randint(1, 40))) for _ in range(80)]
    return PROMPTS + mixed + noise + [" ".join(draw.choices(words, k=500))]


def quiet(tokenizer, texts, length):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tokenizer(texts, length)


def differences(ours, theirs, texts, length):
    expected = [theirs(t, padding="max_length", truncation=True, max_length=length).input_ids for t in texts]
    got = quiet(ours, texts, length).tolist()
    return [(t, a, b) for t, a, b in zip(texts, got, expected, strict=True) if a != b]


@with_vocabularies
@pytest.mark.parametrize("length", [77, 12])
@pytest.mark.parametrize("folder", ["sd3/tokenizer", "sd3/tokenizer_2", "flux/tokenizer"])
def test_clip_tokenizer_equals_transformers_on_real_vocabularies(folder, length):
    theirs = transformers_module().CLIPTokenizer.from_pretrained(VOCABULARIES / folder)
    ours = CLIPTokenizer.load(VOCABULARIES / folder)
    assert (ours.bos, ours.eos, ours.pad) == (49406, 49407, 0 if folder.endswith("_2") else 49407)
    assert len(prompts()) > 200 and not differences(ours, theirs, prompts(), length)


@with_vocabularies
@pytest.mark.parametrize("length", [77, 256, 12])
@pytest.mark.parametrize("folder", ["sd3/tokenizer_3", "flux/tokenizer_2"])
def test_t5_tokenizer_equals_transformers_on_real_vocabularies(folder, length):
    theirs = transformers_module().T5Tokenizer.from_pretrained(VOCABULARIES / folder)
    ours = T5Tokenizer.load(VOCABULARIES / folder)
    assert (ours.eos, ours.pad) == (1, 0)
    assert not differences(ours, theirs, prompts(), length)


@with_vocabularies
@pytest.mark.parametrize("folder", ["sd3/tokenizer_3", "flux/tokenizer_2"])
def test_t5_tokenizer_equals_the_published_pipeline_character_by_character(folder):
    """transformers 5 builds its own pipeline, which takes U+0085 for a space; the published tokenizer.json does not."""
    folder = VOCABULARIES / folder
    pipeline, ours = Tokenizer.from_file(str(folder / "tokenizer.json")), T5Tokenizer.load(folder)
    characters = map(chr, (*range(1, 0x3100), *range(0xFE00, 0x10000), 0x1F642))
    for text in [*prompts(), *(f"ab{c}cd {c} e" for c in characters)]:
        assert [*ours.encode(text), 1] == pipeline.encode(text).ids, repr(text)


@with_vocabularies
def test_real_vocabularies_give_the_published_ids():
    clip, t5 = CLIPTokenizer.load(VOCABULARIES / "sd3/tokenizer"), T5Tokenizer.load(VOCABULARIES / "sd3/tokenizer_3")
    assert clip(["The house is wonderful."], 7).tolist() == [[49406, 518, 1212, 533, 2582, 269, 49407]]
    assert t5(["The house is wonderful."], 6).tolist() == [[37, 629, 19, 1627, 5, 1]]
    assert t5([""], 3).tolist() == [[1, 0, 0]] and clip([""], 4).tolist() == [[49406, 49407, 49407, 49407]]


CORPUS = ["a red fox in the snow", "the house is wonderful", "golden light on the hill, sharp focus",
          "it's the fox's house! 42 hills"] * 20


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with tokenizer/, tokenizer_2/, tokenizer_3/ of tiny vocabularies, in the layout of the downloads."""
    folder = tmp_path_factory.mktemp("tiny")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    blank = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    blank.pre_tokenizer = pre_tokenizers.Whitespace()
    blank.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=300, end_of_word_suffix="</w>", show_progress=False, initial_alphabet=alphabet))
    trained = json.loads(blank.to_str())["model"]
    vocabulary = dict(trained["vocab"])
    for token in (*(f"{c}</w>" for c in alphabet), "<|startoftext|>", "<|endoftext|>"):
        vocabulary.setdefault(token, len(vocabulary))
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        (folder / name).mkdir()
        (folder / name / "vocab.json").write_text(json.dumps(vocabulary))
        merges = [m if isinstance(m, str) else " ".join(m) for m in trained["merges"]]
        (folder / name / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
        named = {"bos_token": {"content": "<|startoftext|>", "normalized": True}, "eos_token": "<|endoftext|>",
                 "unk_token": "<|endoftext|>", "pad_token": pad}
        (folder / name / "special_tokens_map.json").write_text(json.dumps(named))
    (folder / "tokenizer_3").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(folder / "tokenizer_3" / "spiece"), vocab_size=90,
        hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    return folder


def test_clip_tokenizer_brackets_and_pads_with_the_ids_of_its_folder(tiny):
    first, second = CLIPTokenizer.load(tiny / "tokenizer"), CLIPTokenizer.load(tiny / "tokenizer_2")
    vocabulary = json.loads((tiny / "tokenizer" / "vocab.json").read_text())
    start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    assert (first.bos, first.eos, first.pad) == (start, end, end)
    assert second.pad == vocabulary["!"] and CLIPTokenizer.load(tiny / "tokenizer_2", pad=3).pad == 3
    tokens = second(["", "a red fox"], 12)
    assert tokens.dtype == torch.int64 and tokens.shape == (2, 12)
    assert tokens[0].tolist() == [second.bos, second.eos] + [second.pad] * 10
    assert tokens[1, 0] == second.bos and (tokens[1] == second.eos).sum() == 1


def test_clip_tokenizer_from_one_file_equals_vocabulary_and_merges(tiny, tmp_path):
    ours = CLIPTokenizer.load(tiny / "tokenizer")
    ours.backend.enable_padding(length=5)  # settings that a published file may hold and that must not matter
    ours.backend.enable_truncation(3)
    ours.backend.save(str(tmp_path / "tokenizer.json"))
    ours, other = CLIPTokenizer.load(tiny / "tokenizer"), CLIPTokenizer.load(tmp_path)
    assert (other.bos, other.eos, other.pad) == (ours.bos, ours.eos, ours.pad)
    assert torch.equal(quiet(other, prompts(), 40), quiet(ours, prompts(), 40))


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_clip_tokenizer_equals_transformers_on_a_tiny_vocabulary(tiny, name):
    theirs = transformers_module().CLIPTokenizer.from_pretrained(tiny / name)
    assert not differences(CLIPTokenizer.load(tiny / name), theirs, prompts(), 30)


def test_t5_tokenizer_equals_sentencepiece_and_knows_special_tokens(tiny):
    ours = T5Tokenizer.load(tiny / "tokenizer_3")
    pieces = sentencepiece.SentencePieceProcessor(str(tiny / "tokenizer_3" / "spiece.model"))
    fox = pieces.encode("the red fox")
    assert ours(["the red fox"], 20).tolist() == [fox + [1] + [0] * (19 - len(fox))]
    last = pieces.vocab_size() + 99
    assert ours.encode("the red fox<extra_id_0>the red fox </s><extra_id_99>") == [*fox, last, *fox, 1, last - 99]
    (tiny / "tokenizer_3" / "tokenizer_config.json").write_text('{"extra_ids": 4}')
    assert T5Tokenizer.load(tiny / "tokenizer_3").encode("<extra_id_0>") == [pieces.vocab_size() + 3]
    (tiny / "tokenizer_3" / "tokenizer_config.json").unlink()


def multilingual(count):
    """Words of many scripts from a fixed seed, between spaces of many kinds and T5's special tokens."""
    draw = random.Random(7)
    blocks = ((0x21, 0x7F), (0xA0, 0x250), (0x300, 0x370), (0x400, 0x500), (0x5D0, 0x5EB), (0x620, 0x650),
              (0x900, 0x970), (0xE01, 0xE50), (0x1100, 0x1200), (0x2000, 0x2070), (0x3000, 0x3100), (0x4E00, 0x9FFF),
              (0xAC00, 0xD7A3), (0xFE00, 0xFF60), (0x1F300, 0x1F700))

    def word():
        return "".join(chr(draw.randrange(*draw.choice(blocks))) for _ in range(draw.randint(1, 6)))

    gaps = (" ", "  ", "\u3000", "\t", "\x85", "\u2581", "<extra_id_3>", "</s> ")
    return [draw.choice(gaps).join(word() for _ in range(draw.randint(1, 9))) for _ in range(count)]


def write_tokenizer_json(spiece, folder, extra_ids):
    """tokenizer.json as transformers writes it from a spiece.model; sentencepiece_model.proto has the field numbers."""
    def fields(message):
        while message:
            tag, message = message[0], message[1:]
            value = shift = 0
            while tag & 7 != 5:  # 5: four bytes; 0 and 2: a number, or the length of what follows
                byte, message = message[0], message[1:]
                value, shift = value | (byte & 127) << shift, shift + 7
                if byte < 128:
                    break
            size = {0: 0, 2: value, 5: 4}[tag & 7]
            yield tag >> 3, message[:size]
            message = message[size:]

    model = sentencepiece.SentencePieceProcessor(str(spiece))
    normalizer = dict(fields(dict(fields(spiece.read_bytes()))[3]))
    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.vocab_size())]
    backend = Tokenizer(models.Unigram(pieces, unk_id=2))
    backend.normalizer = normalizers.Precompiled(normalizer[2])
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    backend.add_special_tokens(["<pad>", "</s>", "<unk>", *(f"<extra_id_{i}>" for i in reversed(range(extra_ids)))])
    backend.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("extra_ids", [0, 4, 100])
def test_t5_tokenizer_from_tokenizer_json_equals_spiece_model(tiny, extra_ids, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    shutil.copy(tiny / "tokenizer_3" / "spiece.model", tmp_path / "a")
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps({"extra_ids": extra_ids}))
    write_tokenizer_json(tmp_path / "a" / "spiece.model", tmp_path / "b", extra_ids)
    ours, other = T5Tokenizer.load(tmp_path / "a"), T5Tokenizer.load(tmp_path / "b")
    assert (ours.size, ours.pad, ours.eos, ours.special) == (other.size, other.pad, other.eos, other.special)
    for text in [*prompts(), *multilingual(1000)]:
        assert ours.encode(text) == other.encode(text), text


def test_t5_reports_the_letters_that_its_vocabulary_lacks(tiny):
    tokenizer = T5Tokenizer.load(tiny / "tokenizer_3")
    with pytest.warns(UserWarning, match="^4 of 13 letters of a prompt are unknown to T5's .*; lost: '日本語♞'$"):
        tokenizer(["a red fox 日本語  at ♞", "the fox"], 30)
    with pytest.warns(UserWarning, match="^4 of 4 letters .* '株式会社'$"):  # the one sign stands for four
        tokenizer(["㍿"], 30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer(["the red fox", "", "<unk> the fox", "the fox</s>"], 30)


def test_clip_vocabulary_without_a_byte_is_refused(tiny, tmp_path):
    shutil.copytree(tiny / "tokenizer", tmp_path, dirs_exist_ok=True)
    words = json.loads((tmp_path / "vocab.json").read_text())
    words["<another>"] = words.pop("Ł</w>")
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    with pytest.raises(ValueError, match="the vocabulary has no Ł</w>"):
        CLIPTokenizer.load(tmp_path)


DEEP = "[" * 100_000


SETTINGS = "tokenizer_config.json"


@pytest.mark.parametrize(("part", "file", "content", "message"), [
    ("tokenizer", SETTINGS, DEEP, f"{SETTINGS}: not JSON"),
    ("tokenizer", SETTINGS, '{"pad_token": 7}', ": pad_token is 7, expected a text"),
    ("tokenizer", SETTINGS, '{"pad_token": {"content": ["!"]}}', ": pad_token: content"),
    ("tokenizer", SETTINGS, '{"added_tokens_decoder": [1]}', ": added_tokens_decoder"),
    ("tokenizer", SETTINGS, '{"added_tokens_decoder": {"1": {"content": "!", "lstrip": 3}}}', "1: lstrip is 3"),
    ("tokenizer", "special_tokens_map.json", '{"bos_token": "\\ud800"}', "special_tokens_map.json: bos_token"),
    ("tokenizer", "special_tokens_map.json", "[]", "special_tokens_map.json: holds a list"),
    ("tokenizer", "vocab.json", DEEP, "vocab.json .*cannot be read"),
    ("tokenizer", "vocab.json", '{"a": -1}', "vocab.json .*cannot be read"),
    ("tokenizer", "merges.txt", "#version\nfox fox", "merges.txt: cannot be read"),
    ("tokenizer", "tokenizer.json", DEEP, "tokenizer.json: not JSON"),
    ("tokenizer", "tokenizer.json", '{"model": 3}', "tokenizer.json: cannot be read"),
    ("tokenizer_3", SETTINGS, '{"extra_ids": 100000000}', ": extra_ids is 100000000"),
    ("tokenizer_3", SETTINGS, '{"extra_ids": "x"}', ': extra_ids is "x"'),
    ("tokenizer_3", "spiece.model", "", "spiece.model: (cannot be read|has no padding)"),
    ("tokenizer_3", "spiece.model", "<!DOCTYPE html>", "spiece.model: cannot be read")])
def test_malformed_tokenizer_file_is_one_line_that_names_it(tiny, part, file, content, message, tmp_path):
    shutil.copytree(tiny / part, tmp_path, dirs_exist_ok=True)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message) as refusal:
        (T5Tokenizer if part == "tokenizer_3" else CLIPTokenizer).load(tmp_path)
    assert str(tmp_path / file) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(("changed", "message"), [
    ({"model": {"type": "WordPiece"}}, "unk_id is missing"), ({"added_tokens": 5}, "added_tokens is 5"),
    ({"normalizer": None}, "cannot be read"),
    ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "cannot be read"),
    ({"model": {"unk_id": 2, "vocab": [["a", "b"]]}}, "cannot be read"),
    ({"model": {"unk_id": 2, "vocab": [["<unk>", 0.0]] * 3}}, "")])
def test_malformed_tokenizer_json_of_t5_is_one_line_that_names_it(tiny, changed, message, tmp_path):
    write_tokenizer_json(tiny / "tokenizer_3" / "spiece.model", tmp_path, 4)
    content = json.loads((tmp_path / "tokenizer.json").read_text()) | changed
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"tokenizer.json: .*{message}") as refusal:
        T5Tokenizer.load(tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("prompt", [None, 5, b"a fox", "half \ud83d"])
def test_what_is_no_text_is_refused_as_a_prompt(tiny, prompt):
    for tokenizer in (CLIPTokenizer.load(tiny / "tokenizer"), T5Tokenizer.load(tiny / "tokenizer_3")):
        with pytest.raises(ValueError, match="a prompt is not text, or not in UTF-8"):
            tokenizer(["a fox", prompt], 20)


def test_long_prompts_keep_the_end_and_say_what_was_cut(tiny):
    prompt = "the house is wonderful " * 20 + "with a golden fox"
    for tokenizer, room in ((CLIPTokenizer.load(tiny / "tokenizer"), 18), (T5Tokenizer.load(tiny / "tokenizer_3"), 19)):
        with pytest.warns(UserWarning, match=f"cut to the limit of {room}; lost: '.*house is wonderful.*…'"):
            tokens = tokenizer([prompt], 20)
        whole = tokenizer([prompt], 2000)[0]
        assert tokens[0, -1] == tokenizer.eos and torch.equal(tokens[0, :-1], whole[:19])
        length = int((whole == tokenizer.eos).nonzero()[0]) + 1
        with pytest.warns(UserWarning, match="lost: '.*x'"):             # one token less than it needs
            tokenizer([prompt], length - 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tokenizer([prompt], length)


def test_tokenizers_refuse_empty_folders_and_a_bare_text(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match="needs tokenizer.json, or vocab.json with merges.txt"):
        CLIPTokenizer.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="needs spiece.model"):
        T5Tokenizer.load(tmp_path)
    for tokenizer in (CLIPTokenizer.load(tiny / "tokenizer"), T5Tokenizer.load(tiny / "tokenizer_3")):
        with pytest.raises(ValueError, match="give a list of prompts"):
            tokenizer("a fox", 20)
        assert tokenizer([], 20).shape == (0, 20)


# ---- SD3

def sd3_folder(tiny, folder, official):
    """A model folder of tiny encoders, in the official or the diffusers layout."""
    for tokenizer in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        (folder / tokenizer).symlink_to(tiny / tokenizer)
    size = len(json.loads((tiny / "tokenizer" / "vocab.json").read_text()))
    save_clip(folder / "text_encoder", act="quick_gelu", vocabulary=size)
    save_clip(folder / "text_encoder_2", vocabulary=size)
    save_t5(folder / "text_encoder_3", width=100, vocabulary=300)
    if official:
        (folder / "text_encoders").mkdir()
        for part, name in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g"), ("text_encoder_3", "t5xxl_fp16")):
            tensors = load_file(folder / part / "model.safetensors")
            metadata = {"num_attention_heads": "3", "hidden_act": "quick_gelu" if name == "clip_l" else "gelu"}
            metadata = None if name == "t5xxl_fp16" else metadata
            save_file(tensors, folder / "text_encoders" / f"{name}.safetensors", metadata)
            (folder / part / "model.safetensors").unlink()
        (folder / "text_encoders" / "t5xxl_fp8_e4m3fn.safetensors").write_text("not to be opened")
    return folder


@pytest.mark.parametrize("official", [True, False])
def test_sd3_text_joins_its_three_encoders(tiny, official, tmp_path):
    folder = sd3_folder(tiny, tmp_path, official)
    text = SD3Text.load(folder, t5_length=11)
    context, pooled = text.encode(["a red fox", ""])
    assert context.shape == (2, 20 + 11, 100) and pooled.shape == (2, 48 + 40)      # L unprojected, G projected
    assert not context.requires_grad and not context.is_inference()
    tokens = text.tokenizers[0](["a red fox", ""], 20)
    last, penultimate, _ = each(text.clip_l, tokens)
    assert torch.equal(context[:, :20, :48], penultimate)
    assert torch.equal(pooled[:, :48], text.clip_l.at_eos(last, tokens))
    _, penultimate, projected = each(text.clip_g, text.tokenizers[1](["a red fox", ""], 20))
    assert torch.equal(context[:, :20, 48:96], penultimate) and torch.equal(pooled[:, 48:], projected)
    assert context[:, :20, 96:].abs().max() == 0
    assert error(context[:, 20:], text.t5(text.tokenizers[2](["a red fox", ""], 11))) < 1e-6
    alone = text.encode([""])  # does not depend on the other prompts
    assert torch.equal(alone[0], context[1:]) and torch.equal(alone[1], pooled[1:])


def test_sd3_text_is_the_same_in_both_layouts_and_runs_in_bfloat16(tiny, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    official = SD3Text.load(sd3_folder(tiny, tmp_path / "a", True))
    diffusers = SD3Text.load(sd3_folder(tiny, tmp_path / "b", False))
    for ours, other in zip(official.encode(["a fox"]), diffusers.encode(["a fox"]), strict=True):
        assert torch.equal(ours, other)
    assert SD3Text.load(tmp_path / "a", dtype=torch.bfloat16).encode(["a fox"])[0].dtype is torch.bfloat16


@pytest.mark.parametrize(("official", "lost"), [
    (True, "clip_g.safetensors"), (True, "t5xxl_fp16.safetensors"), (False, "text_encoder_3")])
def test_sd3_text_names_the_missing_encoder_and_its_download(tiny, official, lost, tmp_path):
    folder = sd3_folder(tiny, tmp_path, official)
    if official:
        (folder / "text_encoders" / lost).unlink()
        (folder / "text_encoders" / "t5xxl_fp8_e4m3fn.safetensors").unlink()
    else:
        (folder / lost).rename(folder / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"{lost}: not found; stabilityai/stable-diffusion-3-medium.* has it"):
        SD3Text.load(folder)


def replaced(file, change):
    """Write a file again with other tensors, and its metadata."""
    with safe_open(file, framework="pt") as handle:
        metadata = handle.metadata()
    save_file(change(load_file(file)), file, metadata)


def test_sd3_text_is_read_from_an_all_in_one_file(tiny, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    folder, other = sd3_folder(tiny, tmp_path / "a", False), tmp_path / "b"
    for part in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        (other / part).symlink_to(tiny / part)
    inside = {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": torch.zeros(1)}
    for part, name in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g"), ("text_encoder_3", "t5xxl")):
        if name == "t5xxl":
            save_file(inside, other / "sd3_medium_incl_clips.safetensors", {"num_attention_heads": "3"})
            with pytest.raises(FileNotFoundError, match="text_encoder_3: not found, nor inside sd3_medium_incl"):
                SD3Text.load(other)
            (other / "text_encoders").mkdir()  # the usual pair of ComfyUI
            shutil.copy(folder / part / "model.safetensors", other / "text_encoders" / "t5xxl_fp16.safetensors")
            pair = SD3Text.load(other).encode(["a fox"])
            shutil.rmtree(other / "text_encoders")
        tensors = load_file(folder / part / "model.safetensors")
        inside |= {f"text_encoders.{name}.transformer.{key}": t for key, t in tensors.items()}
    save_file(inside, other / "sd3_medium_incl_clips_t5xxlfp16.safetensors", {"num_attention_heads": "3"})
    config = folder / "text_encoder" / "config.json"  # the file does not record that this tiny one has quick GELU
    config.write_text(config.read_text().replace("quick_gelu", "gelu"))
    ours, expected = (SD3Text.load(of).encode(["a fox"]) for of in (other, folder))
    for read in (ours, pair):  # tensors lie at other addresses
        assert error(read[0], expected[0]) < 1e-5 and error(read[1], expected[1]) < 1e-5


def test_sd3_text_names_the_first_encoder_that_is_neither_there_nor_inside(tiny, tmp_path):
    folder = sd3_folder(tiny, tmp_path, True)
    for name in ("clip_l", "clip_g"):
        (folder / "text_encoders" / f"{name}.safetensors").unlink()
    save_file({"model.diffusion_model.x": torch.zeros(1), "text_encoders.clip_l.transformer.x": torch.zeros(1)},
              folder / "sd3_medium.safetensors")
    with pytest.raises(FileNotFoundError, match="clip_g.safetensors: not found, nor inside sd3_medium.safetensors; "):
        SD3Text.load(folder)


def test_sd3_text_refuses_clips_that_are_not_of_one_set(tiny, tmp_path):
    folder = sd3_folder(tiny, tmp_path, True)
    clip_l, clip_g = (folder / "text_encoders" / f"{name}.safetensors" for name in ("clip_l", "clip_g"))
    position, projection = "text_model.embeddings.position_embedding.weight", "text_projection.weight"
    short = "embeddings.position_embedding.weight"
    original = clip_l.read_bytes()

    def longer(tensors):
        name = position if position in tensors else short
        return tensors | {name: torch.cat([tensors[name]] * 3)}

    replaced(clip_l, longer)
    with pytest.raises(ValueError, match="clip_l takes 60 tokens, its clip_g 20: .*LongCLIP"):
        SD3Text.load(folder)
    clip_l.write_bytes(original)
    replaced(clip_g, lambda tensors: {name: t for name, t in tensors.items() if name != projection})
    with pytest.raises(ValueError, match="clip_g has no text_projection.weight; stabilityai"):
        SD3Text.load(folder)


def test_sd3_text_refuses_exchanged_clips(tiny, tmp_path):
    folder = sd3_folder(tiny, tmp_path, False)
    size = len(json.loads((tiny / "tokenizer" / "vocab.json").read_text()))
    save_clip(folder / "text_encoder", vocabulary=size, width=72)
    with pytest.raises(ValueError, match="its clip_l is 72 wide, its clip_g 48: they are exchanged"):
        SD3Text.load(folder)


@pytest.mark.parametrize("how", ["exchanged", "one twice", "without settings"])
def test_sd3_text_refuses_tokenizers_that_do_not_pad_as_its_two(tiny, how, tmp_path):
    folder = sd3_folder(tiny, tmp_path, False)
    first, second = folder / "tokenizer", folder / "tokenizer_2"
    for link in (first, second):
        link.unlink()
    shutil.copytree(tiny / ("tokenizer_2" if how == "exchanged" else "tokenizer"), first)
    shutil.copytree(tiny / "tokenizer", second)
    if how == "without settings":
        (second / "special_tokens_map.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer/ pads with id [0-9]+, tokenizer_2/ .*exchanged, or not complete"):
        SD3Text.load(folder)


def test_sd3_text_refuses_several_t5_of_one_rank(tiny, tmp_path):
    folder = sd3_folder(tiny, tmp_path, True)
    encoders = folder / "text_encoders"
    (encoders / "t5xxl_fp16.safetensors").rename(encoders / "t5xxl_fp8_e5m2.safetensors")
    with pytest.raises(ValueError, match="several could be T5 .t5xxl_fp8_e4m3fn.safetensors, t5xxl_fp8_e5m2.safe"):
        SD3Text.load(folder)


@pytest.mark.parametrize("lines", [0, 1, -1])
def test_clip_vocabulary_without_all_of_its_merges_is_refused(tiny, lines, tmp_path):
    shutil.copytree(tiny / "tokenizer", tmp_path, dirs_exist_ok=True)
    whole = (tmp_path / "merges.txt").read_text().splitlines(keepends=True)
    (tmp_path / "merges.txt").write_text("".join(whole[:lines]))
    lost = 1 if lines < 0 else len(whole) - 1
    with pytest.raises(ValueError, match=f"merges.txt: {lost} words of vocab.json are not made by its merges"):
        CLIPTokenizer.load(tmp_path)


@pytest.mark.parametrize("file", ["merges.txt", "vocab.json"])
def test_merges_in_another_order_than_the_vocabulary_are_refused(tiny, file, tmp_path):
    shutil.copytree(tiny / "tokenizer", tmp_path, dirs_exist_ok=True)
    first, *merges = (tmp_path / "merges.txt").read_text().splitlines()
    if file == "merges.txt":
        (tmp_path / file).write_text("\n".join([first, *sorted(merges)]))
    else:
        words = json.loads((tmp_path / file).read_text())
        one, other = (merge.replace(" ", "") for merge in merges[-2:])
        (tmp_path / file).write_text(json.dumps(words | {one: words[other], other: words[one]}))
    with pytest.raises(ValueError, match="merges.txt: its merges are not in the order of the ids in vocab.json"):
        CLIPTokenizer.load(tmp_path)


@pytest.mark.parametrize("part, file", [("tokenizer", "vocab.json"), ("tokenizer", "merges.txt"),
                                        ("tokenizer_3", "spiece.model")])
def test_a_pointer_of_git_lfs_is_named(tiny, part, file, tmp_path):
    shutil.copytree(tiny / part, tmp_path, dirs_exist_ok=True)
    (tmp_path / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 791656\n")
    with pytest.raises(ValueError, match=f"{file}: a pointer of Git LFS: git lfs pull fetches the file"):
        (T5Tokenizer if part == "tokenizer_3" else CLIPTokenizer).load(tmp_path)


@pytest.mark.parametrize(("part", "token"), [("tokenizer", "<fox>"), ("tokenizer_3", "<extra_id_0>")])
def test_sd3_text_refuses_ids_beyond_the_embeddings(tiny, part, token, tmp_path):
    folder = sd3_folder(tiny, tmp_path, False)
    (folder / part).unlink()
    shutil.copytree(tiny / part, folder / part)
    if part == "tokenizer":
        words = json.loads((folder / part / "vocab.json").read_text())
        (folder / part / "vocab.json").write_text(json.dumps(words | {token: 70_000}))
    else:
        write_tokenizer_json(folder / part / "spiece.model", folder / part, 0)
        (folder / part / "spiece.model").unlink()
        content = json.loads((folder / part / "tokenizer.json").read_text())
        content["added_tokens"].append(content["added_tokens"][0] | {"content": token, "id": 70_000})
        (folder / part / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="has [0-9]+ embeddings, its tokenizer 70001 words"):
        SD3Text.load(folder)


@pytest.mark.parametrize("rows", [100, 5000])  # 5000: the embeddings of a multilingual T5 with the tokenizer of T5
def test_sd3_text_refuses_an_encoder_of_another_vocabulary(tiny, rows, tmp_path):
    folder = sd3_folder(tiny, tmp_path, False)
    save_t5(folder / "text_encoder_3", width=100, vocabulary=rows)
    with pytest.raises(ValueError, match=f"text_encoder_3: has {rows} embeddings, its tokenizer 1[0-9]+ words"):
        SD3Text.load(folder)
