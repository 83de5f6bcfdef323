"""LoRA: names and alphas of others, merged as unmerged, diffusers' own classes, refusals; training on any ranks."""

import json
import re
import warnings
from pathlib import Path

import pytest
import test_flux
import test_mmdit
import torch
from conftest import assert_same_run, log_of, metadata_of, refusal_of, seeded, state_of
from golden import distance, lazy, published, published_map
from safetensors.torch import load_file, save_file
from test_ranks import difference, on_ranks
from torch import Tensor, nn

import sample
import train
from checkpoint import Weights, filled, open_weights
from flux import Flux
from lora import PREFIX, file_and_strength, places, with_lora
from mmdit import MMDiT, MMDiTConfig
from reading.pictures import recorded
from training.adapter import adapted, attach, exported, initialise, minor_components, trained
from training.adapter import state_of as adapter_of

SD3 = MMDiTConfig(128, 2, context_dim=24, pooled_dim=20, table_side=16, mlp_hidden=512, qk_norm=True,
                  dual_attention=(0,))
KINDS = {"sd3": (MMDiT, SD3, test_mmdit), "flux": (Flux, test_flux.TINY, test_flux)}
BOTH = pytest.mark.parametrize("kind", list(KINDS))
RANK = 4


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Weights]:
    """Weights of small models, as diffusers writes them."""
    folder, found = tmp_path_factory.mktemp("bases"), {}
    with torch.no_grad():
        for kind, (_, config, of) in KINDS.items():
            save_file(of.of_diffusers(config).state_dict(), folder / kind, {"axes_dim": "4, 14, 14"})
            found[kind] = open_weights(folder / kind)
    return found


def model_of(kind: str, weights: Weights) -> nn.Module:
    model, config, _ = KINDS[kind]
    return filled(lambda: model(config), weights, "cpu", None)


def adapted_model(kind: str, weights: Weights, minor: bool = False) -> nn.Module:
    """A model with an adapter that is no longer as it began."""
    model, generator = model_of(kind, weights), seeded(1)
    attach(model, RANK, minor, "cpu", torch.float32)
    initialise(model, weights, seed=0)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def written(file: Path, tensors: dict[str, Tensor], metadata: dict | None = None) -> str:
    file.parent.mkdir(exist_ok=True)
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, file, metadata)
    return str(file)


def in_style(style: str, tensors: dict[str, Tensor], weights: Weights, alpha: float = RANK) -> dict[str, Tensor]:
    """The tensors of an adapter in the names of others; B makes up for alpha."""
    if style == "PEFT":
        return {name: t * (RANK / alpha if "lora_B" in name else 1) for name, t in exported(tensors, weights).items()}
    file = {}
    for name in tensors:
        layer, _, part = name.rpartition(".")
        scaled = tensors[name] * (RANK / alpha if part == "lora_B" else 1)
        if style == "BFL":
            file[f"{layer}.{part}.weight"] = scaled
        else:
            layer = f"lora_unet_{layer.replace('.', '_')}"
            file[f"{layer}.{'lora_down' if part == 'lora_A' else 'lora_up'}.weight"] = scaled
            file[f"{layer}.alpha"] = torch.tensor(alpha)
    return file


def values(weights: Weights) -> dict[str, Tensor]:
    return {name: t.read().float() for name, t in weights.items()}


# ---- read and merged

@BOTH
def test_files_of_kohya_bfl_and_peft_of_one_adapter_give_equal_weights(kind, bases, tmp_path):
    base, tensors = bases[kind], adapter_of(adapted_model(kind, bases[kind]))
    kohya, bfl, peft = (
        values(with_lora(base, [written(tmp_path / style, in_style(style, tensors, base, alpha))]))
        for style, alpha in (("kohya", 2.0), ("BFL", RANK), ("PEFT", RANK)))
    before = values(base)
    for name in before:
        assert distance(kohya[name], bfl[name]) < 1e-6 and distance(peft[name], bfl[name]) < 1e-6
        layer = name.removesuffix(".weight")
        changed = distance(bfl[name], before[name]) > 0.01
        assert changed == (f"{layer}.lora_A" in tensors), name
        if changed:
            product = tensors[f"{layer}.lora_B"] @ tensors[f"{layer}.lora_A"]
            assert distance(bfl[name], before[name] + product) < 1e-6


@pytest.mark.parametrize("spelled", [
    lambda layer, side: f"{layer}.lora.{'down' if side == 'A' else 'up'}.weight",  # diffusers, before PEFT
    lambda layer, side: f"{layer.replace('transformer.', 'unet.', 1)}.lora_{side}.weight",
    lambda layer, side: f"lycoris_{layer.removeprefix('transformer.').replace('.', '_')}"
    f".lora_{'down' if side == 'A' else 'up'}.weight"], ids=["older", "unet", "LyCORIS"])
def test_other_names_of_a_plain_lora_are_read(spelled, bases, tmp_path):
    file = in_style("PEFT", adapter_of(adapted_model("sd3", bases["sd3"])), bases["sd3"])
    other = {spelled(*re.fullmatch(r"(.*)\.lora_([AB])\.weight", name).groups()): t for name, t in file.items()}
    assert not other.keys() & file.keys()
    new, old = (values(with_lora(bases["sd3"], [written(tmp_path / "a", names)])) for names in (file, other))
    assert all(torch.equal(new[name], old[name]) for name in new)


@BOTH
def test_an_adapter_of_any_layer_of_diffusers_is_added_where_that_layer_is(kind, bases, tmp_path):
    _, config, of = KINDS[kind]
    with torch.no_grad():
        theirs, file, generator = of.of_diffusers(config).state_dict(), {}, seeded(1)
    for name, t in list(theirs.items()):
        if name.endswith(".weight") and t.ndim in (2, 4):
            down, up = torch.randn(3, *t.shape[1:], generator=generator), torch.randn(len(t), 3, generator=generator)
            theirs[name] = t + (up @ down.flatten(1)).view_as(t)
            layer = f"transformer.{name.removesuffix('.weight')}"
            file |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up.view(len(t), 3, *[1] * (t.ndim - 2))}
    save_file(theirs, tmp_path / "merged", {"axes_dim": "4, 14, 14"})
    expected, merged = (values(w) for w in (open_weights(tmp_path / "merged"),
                                            with_lora(bases[kind], [written(tmp_path / "a", file)])))
    assert len(file) > 60 and max(distance(merged[name], expected[name]) for name in expected) < 1e-5


@pytest.mark.parametrize("family", ["sd3_medium", "sd3.5_medium", "sd3.5_large", "flux1-dev"])
def test_every_layer_of_the_published_models_has_its_place(family):
    found = places(lazy(published(family)).part(PREFIX))
    matrices = {name.removesuffix(".weight"): place for name, place in published_map(family).items()
                if name.endswith(".weight") and ".norm_" not in name}
    assert len(matrices) > 200
    for layer, (official, rows, how) in matrices.items():
        place = found[layer]
        assert f"{place.layer}.weight" == official.removeprefix(PREFIX) and place.how == (how or "")
        assert rows is None or rows == [place.first, place.last], layer


@pytest.mark.parametrize("where", ["tensor", "metadata", "adapter_config.json", "pattern", "nowhere"])
def test_alpha_is_found_wherever_others_keep_it(where, bases, tmp_path):
    base, tensors = bases["flux"], adapter_of(adapted_model("flux", bases["flux"]))
    expected = values(with_lora(base, [written(tmp_path / "plain", in_style("PEFT", tensors, base))]))
    peft, config = in_style("PEFT", tensors, base, RANK if where == "nowhere" else 2.0), {"r": RANK, "lora_alpha": 2}
    metadata = {"ss_network_alpha": "99"}
    if where == "tensor":
        layers = {name.removesuffix(".lora_A.weight") for name in peft if "lora_A" in name}
        peft |= {f"{layer}.alpha": torch.tensor([2.0]) for layer in layers}
        config["lora_alpha"] = 77  # the tensor is nearer
    if where == "pattern":
        layers = {name.removesuffix(".lora_A.weight").removeprefix("transformer.") for name in peft if "lora_A" in name}
        config |= {"lora_alpha": 77, "alpha_pattern": {f"^{layer}": 2 for layer in layers}}
    if where in ("metadata", "pattern", "tensor"):
        metadata["lora_adapter_metadata"] = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    if where == "adapter_config.json":
        (tmp_path / where).write_text(json.dumps(config))
    written(tmp_path / "adapter_model.safetensors", peft, metadata)
    (tmp_path / "plain").unlink()
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        read = values(with_lora(base, [str(path)]))
        assert max(distance(read[name], expected[name]) for name in expected) < 1e-6


def test_strengths_add_up_and_a_colon_in_a_path_is_no_strength(bases, tmp_path):
    base = bases["sd3"]
    file = written(tmp_path / "a", in_style("BFL", adapter_of(adapted_model("sd3", base)), base))
    twice, once, none = (values(with_lora(base, given)) for given in ([f"{file}:1.5", f"{file}:-0.5"], [file], []))
    assert max(distance(twice[name], once[name]) for name in once) < 1e-6
    assert max(distance(once[name], none[name]) for name in once) > 0.01
    assert file_and_strength("a/b.safetensors:0.5") == ("a/b.safetensors", 0.5)
    assert file_and_strength("C:\\a") == ("C:\\a", 1.0)
    (tmp_path / "x:2").touch()
    assert file_and_strength(str(tmp_path / "x:2")) == (str(tmp_path / "x:2"), 1.0)
    (tmp_path / "b").touch()
    for given, says in (("a:nan", "a finite number"), (f"{tmp_path / 'b'}:0,8", "a number such as 0.8")):
        with pytest.raises(ValueError, match=f"--lora {given}: give FILE:STRENGTH with {says}"):
            file_and_strength(given)


@BOTH
@pytest.mark.parametrize("style, zero", [("PEFT", "lora_B"), ("PEFT", "lora_A"), ("kohya", "alpha")])
def test_an_adapter_that_adds_nothing_leaves_the_model_as_it_is_bit_for_bit_and_is_reported(
        kind, style, zero, bases, tmp_path):
    base, tensors = bases[kind], adapter_of(adapted_model(kind, bases[kind]))
    file = written(tmp_path / "a", {name: t * (zero not in name) for name, t in in_style(style, tensors, base).items()})
    with pytest.warns(UserWarning, match="a: adds nothing: in each layer, lora_A, lora_B or alpha is 0$"):
        added = with_lora(base, [file])
    merged, before = (model_of(kind, weights).state_dict() for weights in (added, base))
    assert all(torch.equal(merged[name], before[name]) for name in before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with_lora(base, [f"{file}:0"])  # as it was asked for


@BOTH
def test_rows_of_a_merged_weight_are_those_of_all(kind, bases, tmp_path):
    base = bases[kind]
    merged = with_lora(base, [written(tmp_path / "a", in_style("PEFT", adapter_of(adapted_model(kind, base)), base))])
    for tensor in merged.values():
        height = tensor.shape[0]
        parts = torch.cat([tensor.rows(k, min(k + 5, height)) for k in range(0, height, 5)]) if height > 1 else None
        assert parts is None or distance(parts.float(), tensor.read().float()) < 1e-6


@BOTH
@pytest.mark.parametrize("minor", [False, True], ids=["normal", "minor"])
def test_merged_equals_unmerged_and_diffusers_own_class(kind, minor, bases, tmp_path):
    """Our file is opened by load_lora_adapter of diffusers, and draws the same there."""
    pytest.importorskip("peft")
    (_, config, of), base = KINDS[kind], bases[kind]
    model, inputs = adapted_model(kind, base, minor), of.random_inputs(config)
    file = exported(adapter_of(model), base)
    assert len(file) == 2 * len([name for name in file if name.endswith("lora_B.weight")])
    merged = model_of(kind, with_lora(base, [written(tmp_path / "lora.safetensors", file, {"software": "x"})]))
    with torch.no_grad():
        theirs = of.of_diffusers(config)
        before, unmerged = of.run_diffusers(theirs, *inputs), model(*inputs)
        theirs.load_lora_adapter(str(tmp_path), weight_name="lora.safetensors")
        scale = unmerged.abs().max()
        assert distance(before, unmerged) > 0.01 * scale
        assert distance(merged(*inputs), unmerged) <= 1e-6 * max(scale, 1)
        assert distance(of.run_diffusers(theirs, *inputs), unmerged) < 1e-5 * max(scale, 1)


def test_what_our_files_record_replaces_what_the_transformer_records(bases, tmp_path):
    file = in_style("BFL", adapter_of(adapted_model("flux", bases["flux"])), bases["flux"])
    about = {"res": "4096", "positions": "pi", "trained_side": "64", "steps": "3"}
    ours, others = (written(tmp_path / name, file, about | {"software": name}) for name in ("diffusion-4k", "other"))
    before = bases["flux"].metadata
    assert with_lora(bases["flux"], [others]).metadata == before
    del about["steps"]  # of training
    assert with_lora(bases["flux"], [ours]).metadata == before | about
    ours = written(tmp_path / "ours", file, {"software": "diffusion-4k", "base": "flux1-dev.safetensors 0123456789ab"})
    with pytest.warns(match="ours: was trained on flux1-dev.safetensors 0123456789ab, and is added to flux [0-9a-f]"):
        with_lora(bases["flux"], [ours])


# ---- refused

def less(tensors: dict, ending: str) -> dict:
    left_out = next(name for name in tensors if name.endswith(ending))
    return {name: t for name, t in tensors.items() if name != left_out}


QKV = "double_blocks.0.img_attn.qkv"
WRONG = {  # what is changed: words of the message
    "unknown layer": (lambda f: f | {"double_blocks.9.img_attn.qkv.lora_A.weight": torch.ones(4, 64)},
                      "1 of .* tensors belong to no LoRA of .*double_blocks.9.img_attn.qkv.lora_A.weight; give an "),
    "unknown part": (lambda f: f | {f"{QKV}.lora_C.weight": torch.ones(4, 64)}, f"1 of .*{QKV}.lora_C.weight"),
    "without A": (lambda f: less(f, "lora_A.weight"), r"lacks lora_A \(lora_down"),
    "without B": (lambda f: less(f, "lora_B.weight"), r"lacks lora_B \(lora_down"),
    "two names": (lambda f: f | {f"lora_unet_{QKV.replace('.', '_')}.lora_down.weight": torch.ones(4, 64)},
                  "is there under two names"),
    "rows": (lambda f: f | {f"{QKV}.lora_B.weight": torch.ones(191, 4)}, r"lora_B \(191, 4\), but .* has \(192, 64\)"),
    "columns": (lambda f: f | {f"{QKV}.lora_A.weight": torch.ones(4, 63)}, r"lora_A \(4, 63\) and"),
    "ranks": (lambda f: f | {f"{QKV}.lora_A.weight": torch.ones(3, 64)}, r"lora_A \(3, 64\) and lora_B \(192, 4\)"),
    "no rank": (lambda f: f | {f"{QKV}.lora_A.weight": torch.ones(0, 64), f"{QKV}.lora_B.weight": torch.ones(192, 0)},
                r"lora_A \(0, 64\)"),
    "alpha": (lambda f: f | {f"{QKV}.alpha": torch.tensor(torch.nan)}, f"alpha of {QKV} is no finite number"),
    "DoRA": (lambda f: f | {f"{QKV}.dora_scale": torch.ones(192)}, "a DoRA, .*; give a plain LoRA"),
    "LoKr": (lambda f: {f"lora_unet_{QKV.replace('.', '_')}.lokr_w1": torch.ones(2, 2)}, "LyCORIS adapter.*plain LoRA"),
    "XLabs": (lambda f: {"double_blocks.0.processor.qkv_lora1.down.weight": torch.ones(4, 64)}, "XLabs.*plain LoRA"),
    "control": (lambda f: f | {"double_blocks.0.img_attn.norm.key_norm.scale": torch.ones(32)}, "replaces norms"),
    "biases": (lambda f: f | {f"{QKV}.lora_B.bias": torch.ones(192)}, "adds biases"),
    "text": (lambda f: f | {"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(())}, "text encoders"),
    "foreign": (lambda f: {"a": torch.ones(2)}, "1 of 1 tensors belong to no LoRA"),
    "empty": (lambda f: {}, "holds no tensors"),
    "transformer": (lambda f: {"img_in.weight": torch.ones(2, 2), "double_blocks.0.img_attn.norm.key_norm.scale":
                               torch.ones(2)}, "a model, no adapter .*--transformer"),
    "VAE": (lambda f: {"decoder.mid.attn_1.norm.weight": torch.ones(2)}, "a model, no adapter .*--vae")}


@pytest.mark.parametrize("what", list(WRONG))
def test_what_is_no_plain_adapter_of_this_model_is_refused_in_one_line(what, bases, tmp_path):
    change, words = WRONG[what]
    tensors = in_style("BFL", adapter_of(adapted_model("flux", bases["flux"])), bases["flux"])
    file = written(tmp_path / "style.safetensors", change(tensors))
    with pytest.raises(ValueError, match=f"^{re.escape(file)}: .*{words}") as refusal:
        with_lora(bases["flux"], [file])
    assert "\n" not in str(refusal.value)


def test_adapters_of_the_other_family_and_damaged_ones_are_refused(bases, tmp_path):
    tensors = adapter_of(adapted_model("flux", bases["flux"]))
    file = written(tmp_path / "style", in_style("PEFT", tensors, bases["flux"]))
    with pytest.raises(ValueError, match="style: .*give an adapter"):
        with_lora(bases["sd3"], [file])
    tensors = load_file(file)
    tensors["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"][0, 0] = torch.inf
    with pytest.raises(ValueError, match="damaged: lora_A or lora_B of .*attn.to_q holds NaN or Inf: the file"):
        with_lora(bases["flux"], [written(tmp_path / "damaged", tensors)])
    merged = with_lora(bases["flux"], [f"{file}:1e300"])
    with pytest.raises(ValueError, match="style: .* at a scale of 1e.300 holds NaN or Inf: .*strength is too large"):
        model_of("flux", merged)


@pytest.mark.parametrize("key, value, says", [
    ("use_rslora", True, "was trained with use_rslora, which is not read"),
    ("init_lora_weights", "pissa_niter_4", "was trained with pissa_niter_4, which is not read"),
    ("alpha_pattern", {r"blocks\.\d+\.attn": 2}, "alpha_pattern has .*, and only names of layers are read")])
def test_an_adapter_that_peft_would_apply_otherwise_is_refused(key, value, says, bases, tmp_path):
    tensors = in_style("PEFT", adapter_of(adapted_model("flux", bases["flux"])), bases["flux"])
    config = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value})}
    with pytest.raises(ValueError, match=f"style: {says}"):
        with_lora(bases["flux"], [written(tmp_path / "style", tensors, config)])


# ---- training

def test_an_adapter_of_full_rank_trains_a_matrix_as_full_fine_tuning_does():
    """With A the identity, a step of gradient descent on B is the one on W."""
    layer, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(7, 6, generator=seeded(0))
    plain = nn.Linear(6, 5)
    plain.load_state_dict(layer[0].state_dict())
    full = nn.ModuleDict({"single_blocks": nn.ModuleList([nn.ModuleDict({"linear1": layer[0]})])})
    attach(full, 6, False, "cpu", torch.float32)
    with torch.no_grad():
        layer[0].lora_A.copy_(torch.eye(6))
        layer[0].lora_B.zero_()
    for module, parameter in ((layer[0], layer[0].lora_B), (plain, plain.weight)):
        module(x).square().sum().backward()
        with torch.no_grad():
            parameter -= 0.01 * parameter.grad
    assert distance(layer[0](x), plain(x)) < 1e-5 and distance(plain(x), nn.functional.linear(x, layer[0].weight)) > 0.1


@BOTH
def test_every_attention_and_mlp_layer_of_both_streams_is_adapted_and_nothing_else(kind, bases):
    model = adapted_model(kind, bases[kind])
    linears = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) and "_blocks." in name}
    assert adapted(model).keys() == {name for name in linears if not re.search(r"mod(ulation)?\b", name)}
    assert trained(model).keys() == {f"{name}.lora_{side}" for name in adapted(model) for side in "AB"}
    config = KINDS[kind][1]
    model(*KINDS[kind][2].random_inputs(config)).square().mean().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert all(p.grad.abs().max() > 0 for p in trained(model).values())


@BOTH
@pytest.mark.parametrize("minor", [False, True], ids=["normal", "minor"])
def test_a_run_begins_from_the_model_as_it_is(kind, minor, bases):
    model, inputs = model_of(kind, bases[kind]), KINDS[kind][2].random_inputs(KINDS[kind][1])
    with torch.no_grad():
        before = model(*inputs)
        attach(model, RANK, minor, "cpu", torch.float32)
        initialise(model, bases[kind], seed=0)
        assert distance(model(*inputs), before) <= 1e-6 * max(before.abs().max(), 1)
    if not minor:
        deviation = torch.cat([layer.lora_A.flatten() for layer in adapted(model).values()]).std()
        assert abs(deviation * RANK - 1) < 0.05


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6)])
def test_minor_components_are_the_smallest_of_the_singular_value_decomposition(shape):
    weight = torch.randn(shape, generator=seeded(0))
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    down, up = minor_components(weight, 2)
    assert distance(up @ down, (u[:, -2:] * s[-2:]) @ v[-2:]) < 1e-12


@pytest.mark.parametrize("changed", [{"ema": 0.9, "activations": "recompute"},
                                     {"lora_init": "minor", "dtype": "bf16", "state": "bf16"}])
def test_a_resumed_adapter_run_equals_the_uninterrupted_one_bit_for_bit(settings, folders, tmp_path, changed):
    flags = {"weights": folders / "tiny-sd3", "lora": 2, "steps": 4} | changed
    train.train(settings(out=tmp_path / "one", **flags))
    train.train(settings(out=tmp_path / "parts", **flags | {"steps": 2}))
    train.train(settings(out=tmp_path / "parts", **flags))
    assert_same_run(tmp_path / "one", tmp_path / "parts")
    state = state_of(tmp_path / "one")
    assert all(re.search(r"\.(lora|minor)_[AB]$", name) for name in state)
    assert {name.partition(".")[0] for name in state} == {"model", "exp_avg", "exp_avg_sq"} | ({"ema"} & changed.keys())
    file, rank = tmp_path / "one" / "lora.safetensors", 4 if "lora_init" in changed else 2
    about = metadata_of(file)
    assert about["base"].startswith("sd3.safetensors ") and about["rank"] == str(rank)
    assert (about["software"], about["res"], about["positions"]) == ("diffusion-4k", "64", "stock")
    assert {len(t) for name, t in load_file(file).items() if "lora_A" in name} == {rank}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it belongs to this model
        before, after = (values(with_lora(open_weights(folders / "tiny-sd3" / "sd3.safetensors"), files))
                         for files in ([], [str(file)]))
    assert len([name for name in before if not torch.equal(before[name], after[name])]) == 8 * 4 - 3  # of four blocks
    assert "lora 2 -> 3" in refusal_of(settings, out=tmp_path / "one", **flags | {"lora": 3})


def test_one_and_two_ranks_and_fsdp_train_the_same_adapter(settings, folders, tmp_path):
    def flags(name: str, **changed: object) -> list[str]:
        return settings.flags(weights=folders / "tiny-flux", steps=3, lora=2, out=tmp_path / name, **changed)

    cases = {"ours": {}, "zero2": {"shard": "zero2", "activations": "recompute"},
             "zero3": {"shard": "zero3", "sequence": 2}}
    train.main(flags("one"))
    on_ranks(2, [{"flags": flags(name, **changed)} for name, changed in cases.items()], tmp_path)
    for name in cases:
        losses, adapters = difference(tmp_path / "one", tmp_path / name)
        assert losses <= 1e-6 and adapters <= 1e-3, name  # AdamW enlarges gradients that are rounding alone, of k
    assert len(log_of(tmp_path / "one")) == 3


@pytest.mark.parametrize("changed, says", [
    ({"lora": 0}, "--lora 0: give a rank, 1 to 4,096"), ({"lora_init": "minor"}, "--lora-init minor: give it with"),
    ({"lora": 65, "lora_init": "minor"}, "--lora 65: give a rank of at most 64: joint_blocks.0")])
def test_ranks_that_cannot_be_are_refused(settings, changed, says):
    assert says in refusal_of(settings, **changed)


# ---- sample.py

def test_pictures_are_drawn_with_adapters_and_record_them(settings, folders, tmp_path, capsys):
    folder, file = folders / "tiny-sd3", tmp_path / "out" / "lora.safetensors"
    train.train(settings(weights=folder, lora=2, steps=2, lr=0.1))
    shared = ["--prompt=a", f"--weights={folder}", "--steps=2", "--res=64"]
    pictures = {}
    for name, flags in {"without": [], "zero": [f"--lora={file}:0"], "with": [f"--lora={file}"]}.items():
        sample.main([*shared, *flags, f"--out={tmp_path / name}.png"])
        pictures[name] = (tmp_path / f"{name}.png").read_bytes()[-2000:], recorded(tmp_path / f"{name}.png").get("lora")
    assert pictures["without"][0] == pictures["zero"][0] != pictures["with"][0]
    assert pictures["without"][1] is None
    assert re.fullmatch(r"lora.safetensors:0 [0-9a-f]{12}", pictures["zero"][1])
    assert f"with {file}:0," in capsys.readouterr().out
    with pytest.raises(SystemExit, match="nowhere: no such file"):
        sample.main([*shared, f"--lora={tmp_path}/nowhere"])
