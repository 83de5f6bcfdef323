"""SD3 and Flux: which file is of which family, what their folders hold, and what each family settles."""

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CAPTIONS
from golden import lazy, published
from safetensors.torch import load_file

from checkpoint import LazyTensor, Weights, locate, open_weights, save
from family import (
    EULER,
    FLUX_DEV,
    FLUX_SCHNELL,
    FLUX_UNDISTILLED,
    PUBLISHED,
    SCHEDULER,
    SD3,
    SD3_5_LARGE,
    SD3_5_MEDIUM,
    SD3_5_TURBO,
    Sampling,
    check_widths,
    describe,
    family_of,
    find,
    fingerprint,
    positioned,
    text_files,
    variant,
    with_scheduler,
)
from flux import FluxConfig
from layers import Positions
from mmdit import MMDiTConfig
from models import make_tiny
from text import FluxText
from vae import VAE, VAEConfig


@pytest.fixture(scope="module")
def folder(folders) -> Path:
    return folders / "tiny-flux"


@pytest.fixture(scope="module")
def schnell(folder, tmp_path_factory) -> Path:
    """A transformer without guidance_in, for the same folder."""
    file = tmp_path_factory.mktemp("schnell") / "flux1-schnell.safetensors"
    weights = open_weights(folder / "flux.safetensors")
    save(file, {name: t.read() for name, t in weights.items() if not name.startswith("guidance_in")}, {})
    return file


def named(names) -> Weights:
    return Weights({name: LazyTensor((1,), None) for name in names}, {}, "a file")


# ---- which family a file is of

@pytest.mark.parametrize("file, family, model", [
    ("sd3_medium", SD3, "sd3"), ("sd3.5_medium", SD3_5_MEDIUM, "sd3.5-medium"),
    ("sd3.5_large", SD3_5_LARGE, "sd3.5-large"), ("flux1-dev", FLUX_DEV, "flux"),
    ("flux1-schnell", FLUX_SCHNELL, "flux-schnell")])
def test_family_is_decided_by_the_published_names(file, family, model):
    weights = lazy(published(file))
    assert family_of(weights) is family
    assert PUBLISHED[model] == (family, family.config(weights.part("model.diffusion_model.")))


@pytest.mark.parametrize("names, message", [
    (published("ae"), "an autoencoder .*; give an SD3 or Flux transformer"),
    (published("clip_l"), "a CLIP text encoder .*; give an SD3"), (published("t5xxl"), "a T5 encoder .*; give an SD3"),
    (["a", "b", "c"], "holds neither an SD3 nor a Flux transformer, but 3 tensors: a, b ...")])
def test_a_file_without_a_transformer_is_refused_by_name(names, message):
    with pytest.raises(ValueError, match=f"^a file: {message}"):
        family_of(named(names))


@pytest.mark.parametrize("name", ["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",
                                  "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
                                  "double_blocks.0.processor.qkv_lora1.down.weight"])
def test_a_lora_is_refused_by_its_name_where_a_transformer_is_expected(name, folder, tmp_path):
    tensors = {name: torch.zeros(2, 2), "double_blocks.0.img_attn.norm.key_norm.scale": torch.ones(2)}
    save(tmp_path / "style.safetensors", tensors, {})
    do = "merge it" if "processor" in name else "sample.py takes it as --lora"
    with pytest.raises(ValueError, match=f"style.safetensors: a LoRA .*{do}"):
        find(folder, tmp_path / "style.safetensors")


def test_find_gives_family_weights_and_vae_of_a_folder(folders, folder, schnell):
    family, weights, vae = find(folder)
    assert (family, weights.source, vae) == (FLUX_DEV, str(folder / "flux.safetensors"), folder / "ae.safetensors")
    assert find(folder, schnell)[0] is FLUX_SCHNELL
    family, _, vae = find(folders / "tiny-sd3")
    assert (family, vae) == (SD3, folders / "tiny-sd3" / "sd3.safetensors")


def test_a_transformer_of_the_other_family_is_refused(folders, folder):
    sd3 = folders / "tiny-sd3"
    with pytest.raises(ValueError, match="sd3.safetensors: is a transformer of SD3, but .* is a folder of Flux-dev, "
                                         "with other text encoders; give --weights a folder of SD3"):
        find(folder, sd3 / "sd3.safetensors")
    with pytest.raises(ValueError, match="flux.safetensors: is a transformer of Flux-dev, but "):
        find(sd3, folder / "flux.safetensors")


@pytest.mark.parametrize("own, file, other, message", [
    ("tiny-flux", "flux.safetensors", "tiny-sd3/sd3.safetensors",
     "flux.safetensors: is named like Flux but holds SD3 weights"),
    ("tiny-sd3", "sd3.safetensors", "tiny-flux/flux.safetensors",
     "sd3.safetensors: is named like SD3 but holds Flux-dev weights")])
def test_a_file_of_the_other_family_under_the_wrong_name_is_refused(folders, tmp_path, own, file, other, message):
    shutil.copytree(folders / own, tmp_path / own)
    shutil.copy(folders / other, tmp_path / own / file)
    with pytest.raises(ValueError, match=message):
        find(tmp_path / own)


# ---- what a family settles

def test_sampling_settings_are_the_arguments_else_the_metadata_else_the_family():
    plain, recorded = lazy({}), lazy({})
    recorded.metadata.update(steps="7", cfg="2", guidance="2.5", time_shift="3", res="96", factor="8", t5_length="20")
    assert SD3.sampling(plain) == Sampling(28, 7.0, None, 3.0, "1024", 16, None)
    assert SD3_5_LARGE.sampling(plain) == Sampling(40, 4.5, None, 3.0, "1024", 16, None)  # Stability's sd3_infer.py
    assert SD3_5_MEDIUM.sampling(plain) == Sampling(50, 5.0, None, 3.0, "1024", 16, None)
    assert SD3_5_TURBO.sampling(plain) == Sampling(4, 1.0, None, 3.0, "1024", 16, None)
    assert FLUX_DEV.sampling(plain) == Sampling(50, 1.0, 3.5, None, "1024", 16, None)
    assert FLUX_SCHNELL.sampling(plain) == Sampling(4, 1.0, None, 1.0, "1024", 16, 256)
    assert FLUX_DEV.sampling(recorded) == Sampling(7, 2.0, 2.5, 3.0, "96", 8, 20)
    assert SD3.sampling(recorded).guidance is FLUX_SCHNELL.sampling(recorded).guidance is None  # of another model
    given = 3, 1.0, 5.0, 6.0, "64x32", 16, 30
    assert FLUX_DEV.sampling(recorded, *given) == Sampling(*given)
    recorded.metadata["time_shift"] = "much"
    with pytest.raises(ValueError, match="time_shift 'much', which is no number; give --time-shift"):
        SD3.sampling(recorded)
    assert SD3.sampling(recorded, time_shift=2.0).time_shift == 2


@pytest.mark.parametrize("family, published, longer", [(SD3, 154, 333), (FLUX_DEV, 512, 256), (FLUX_SCHNELL, 256, 256)])
def test_context_has_the_tokens_of_clip_and_t5(family, published, longer):
    assert family.text_tokens(None) == published and family.text_tokens(256) == longer


def test_only_flux_records_its_axes(folders):
    flux, sd3 = (family.config(open_weights(folders / name).part("model.diffusion_model.")) for family, name in
                 ((FLUX_DEV, "tiny-flux/flux.safetensors"), (SD3, "tiny-sd3/sd3.safetensors")))
    assert FLUX_DEV.records(flux) == {"axes_dim": "8, 28, 28"} and SD3.records(sd3) == {}
    assert SD3.records(replace(sd3, positions=Positions("pi", 8))) == {"positions": "pi", "trained_side": 8}


@pytest.mark.parametrize("shape", [5, {"shape": [2], "dtype": "F16"}, ["2"], [True]])
def test_a_manifest_with_a_shape_that_is_none_is_refused(tmp_path, shape):
    (tmp_path / "m.json").write_text(json.dumps({"tensors": {"joint_blocks.0.x": shape}}))
    with pytest.raises(ValueError, match="m.json: joint_blocks.0.x has the shape .*expected a list of integers"):
        describe(None, str(tmp_path / "m.json"), None)


def test_a_trained_side_beyond_the_position_table_is_refused():
    with pytest.raises(ValueError, match="trained side 200: the position table has 192 tokens per side"):
        positioned(MMDiTConfig(), "pi", 200)
    assert positioned(FluxConfig(), "pi", 200).positions == Positions("pi", 200)


@pytest.mark.parametrize("config", [MMDiTConfig(), FluxConfig()])
def test_widths_that_do_not_match_are_refused(config):
    context, pooled = torch.empty(1, 2, config.context_dim), torch.empty(1, config.pooled_dim)
    four, three = (8,) * 4, (8,) * 3
    vae = VAEConfig(four, four, 1, 1, 16)
    check_widths(config, context, pooled, vae)
    for wrong, message in (((context[..., 1:], pooled, vae), "context of width 4095, but the transformer takes 4096"),
                           ((context, pooled[:, 1:], vae), "pooled vector of width"),
                           ((context, pooled, VAEConfig(four, four, 1, 1, 4)), "latents of width 4"),
                           ((context, pooled, VAEConfig(three, four, 1, 1, 16)), "VAE has 3 levels in its encoder, 4"),
                           ((context, pooled, VAEConfig(four, (8,) * 5, 1, 1, 16)), "5 in its decoder")):
        with pytest.raises(ValueError, match=message):
            check_widths(config, *wrong)


@pytest.mark.parametrize("name, value, says", [
    ("steps", "1e9", "--steps 1000000000 .recorded by a file.: give 1 to 10,000"), ("steps", "2.5", "no integer"),
    ("factor", "4", "--factor 4 .recorded by a file.: give 8 or 16"), ("factor", "12", "give 8 or 16"),
    ("t5_length", "0", "--t5-length 0 .recorded"), ("time_shift", "-1", "above 0"), ("cfg", "nan", "no number"),
    ("cfg", "0", "--cfg 0.0 .recorded by a file.: give a finite number but 0"),
    ("res", "1000000", "a file: its metadata records res"), ("res", "", "give --res")])
def test_recorded_settings_that_cannot_be_used_are_refused_with_file_and_flag(name, value, says):
    with pytest.raises(ValueError, match=says):
        FLUX_DEV.sampling(Weights({}, {name: value}, "a file"))


# ---- what tensors do not show

@pytest.mark.parametrize("name, of, family", [
    ("sd3.5_large_turbo.safetensors", SD3_5_LARGE, SD3_5_TURBO), ("SD3.5-Turbo/transformer", SD3_5_LARGE, SD3_5_TURBO),
    ("SD3.5-Turbo/transformer/diffusion_pytorch_model-00001-of-00002.safetensors", SD3_5_LARGE, SD3_5_TURBO),
    ("models--a--sd3.5-turbo/snapshots/0f3/transformer", SD3_5_LARGE, SD3_5_TURBO),
    ("models--turbodev--sd3.5/snapshots/0f3/transformer", SD3_5_LARGE, SD3_5_LARGE),
    ("x/model-turbo.safetensors", SD3_5_LARGE, SD3_5_TURBO), ("turbo/sd3.5.safetensors", SD3_5_LARGE, SD3_5_LARGE),
    ("sd3.5_large.safetensors", SD3_5_LARGE, SD3_5_LARGE), ("sd3_turbo.safetensors", SD3, SD3),
    ("flux1-dev-de-distill.safetensors", FLUX_SCHNELL, FLUX_UNDISTILLED), ("flux", FLUX_SCHNELL, FLUX_SCHNELL),
    ("fluxDev2/transformer", FLUX_SCHNELL, FLUX_UNDISTILLED), ("schnell-dev.safetensors", FLUX_SCHNELL, FLUX_SCHNELL),
    ("flux1-dev.safetensors", FLUX_DEV, FLUX_DEV), ("on-device.safetensors", FLUX_SCHNELL, FLUX_SCHNELL)])
def test_a_name_decides_only_between_models_of_the_same_tensors(name, of, family):
    assert variant(of, Weights({}, {}, f"weights/{name}"), None) is family


@pytest.mark.parametrize("family, second", [(SD3, 8 / 9), (FLUX_DEV, 9 / 10)])
def test_a_time_shift_that_leaves_no_schedule_is_refused_and_one_that_blurs_is_noted(family, second):
    for mu in (-40, -30, 40):
        with pytest.raises(ValueError, match="some of the 28 noise levels coincide; give a value nearer to 0"):
            family.check_schedule(28, math.exp(mu), f"--mu {mu}")
    level = 1 / (1 + math.exp(8) * (1 / second - 1))
    note = family.check_schedule(10, math.exp(-8), "--mu -8")
    assert f"time shift 0.0003355, mu -8.00: the second noise level is {level:.3g}, below 0.1" in note
    assert not [mu for mu in (-2, 0, 1.15, 3) if family.check_schedule(28, math.exp(mu), f"--mu {mu}")]


@pytest.mark.parametrize("more, says", [
    ("lora_unet_double_blocks_0_img_mlp_0.lora_up.weight", "a LoRA in kohya's names"),
    ("double_blocks.0.img_mod.lin.weight", "with and without the prefix"), ("cond_stage_model.x.weight", "")])
def test_what_stands_beside_a_complete_transformer_is_not_passed_over(more, says):
    file = named([f"model.diffusion_model.{name}" for name in published("flux1-dev")] + [more])
    if not says:
        assert family_of(file) is FLUX_DEV
        return
    with pytest.raises(ValueError, match=f"^a file: .*{says}"):
        family_of(file)


def scheduler(folder: Path, **config: object) -> Path:
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / SCHEDULER).write_text(json.dumps(config))
    return folder / SCHEDULER


@pytest.mark.parametrize("config", [
    {"shift": 1.7}, {}, {"use_dynamic_shifting": True, "shift": 3.0},
    {"use_dynamic_shifting": True, "base_shift": 0.3, "max_shift": 2.1, "base_image_seq_len": 64,
     "max_image_seq_len": 900}, {"use_dynamic_shifting": True, "time_shift_type": "linear", "base_shift": 0.9}])
def test_schedule_of_a_scheduler_file_is_that_of_diffusers(config, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    family, tokens, c = with_scheduler(FLUX_DEV, scheduler(tmp_path, **config)), 300, theirs.config
    mu = c.base_shift + (c.max_shift - c.base_shift) * (tokens - c.base_image_seq_len) / (
        c.max_image_seq_len - c.base_image_seq_len)  # calculate_shift of diffusers' pipeline_flux.py
    theirs.set_timesteps(sigmas=torch.linspace(1, 1 / 7, 7).tolist(), mu=mu)
    shift = family.by_tokens(tokens) if family.time_shift is None else family.time_shift
    assert (family.sigmas(7, shift) - theirs.sigmas).abs().max() < 1e-6


@pytest.mark.parametrize("steps", [4, 28])
def test_schedule_of_sd3_with_a_scheduler_file_is_that_of_diffusers(steps, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.5)
    theirs.set_timesteps(steps)
    family = with_scheduler(SD3, scheduler(tmp_path, _class_name=EULER, shift=5.5))
    assert (family.sigmas(steps, family.time_shift) - theirs.sigmas).abs().max() < 1e-6


@pytest.mark.parametrize("config, says", [
    ({"shift": "3"}, 'shift is "3", expected a number'), ({"shift": 0}, "shift is 0, expected 0.001 to 1000"),
    ({"shift": None}, "shift is null"), ({"shift": float("nan")}, "shift is nan"),
    ({"use_dynamic_shifting": 1}, "use_dynamic_shifting is 1, expected true or false"),
    ({"_class_name": "DPMSolverMultistepScheduler"}, "a DPMSolverMultistepScheduler, .* give --time-shift"),
    ({"use_karras_sigmas": True}, "sets use_karras_sigmas, .* give --time-shift"),
    ({"shift_terminal": 0.1}, "sets shift_terminal"), ({"num_train_timesteps": 500}, "num_train_timesteps is 500"),
    ({"use_dynamic_shifting": True, "max_shift": 1e9}, "max_shift is 1000000000.0, expected -100 to 100"),
    ({"use_dynamic_shifting": True, "base_image_seq_len": 4096}, "base_image_seq_len 4096 is not below"),
    ({"use_dynamic_shifting": True, "time_shift_type": "cosine"}, "time_shift_type 'cosine', expected exponential")])
def test_a_scheduler_file_that_cannot_be_followed_is_refused_by_name(config, says, tmp_path):
    with pytest.raises(ValueError, match=f"scheduler_config.json: {says}"):
        with_scheduler(FLUX_DEV, scheduler(tmp_path, **config))


def test_a_scheduler_file_that_is_a_pipe_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "flux")
    (tmp_path / "flux" / "scheduler").mkdir()
    os.mkfifo(tmp_path / "flux" / SCHEDULER)
    with pytest.raises(ValueError, match="scheduler_config.json: a pipe or device"):
        find(tmp_path / "flux")


def test_dynamic_shifting_is_refused_for_sd3(tmp_path):
    with pytest.raises(ValueError, match="sets use_dynamic_shifting, which SD3 is not drawn with"):
        with_scheduler(SD3, scheduler(tmp_path, use_dynamic_shifting=True))


def test_the_scheduler_of_a_folder_is_read_and_not_that_of_another_model(folder, schnell, tmp_path):
    shutil.copytree(folder, tmp_path / "flux")
    scheduler(tmp_path / "flux", shift=2.5)
    assert find(tmp_path / "flux")[0].time_shift == 2.5
    assert find(tmp_path / "flux", folder / "flux.safetensors")[0].time_shift == 2.5     # the same family
    assert find(tmp_path / "flux", schnell)[0] is FLUX_SCHNELL                           # another one
    shutil.copytree(folder, tmp_path / "tuned" / "transformer", ignore=shutil.ignore_patterns("[!f]*"))
    scheduler(tmp_path / "tuned", shift=4.5)
    assert find(tmp_path / "flux", tmp_path / "tuned" / "transformer")[0].time_shift == 4.5
    assert find(tmp_path / "flux", tmp_path / "tuned" / "transformer" / "flux.safetensors")[0].time_shift == 2.5


@pytest.mark.parametrize("own, dynamic, given, family, steps, time_shift", [  # time shift None: by tokens
    ("flux1-schnell", False, "flux1-dev-dedistilled", FLUX_UNDISTILLED, 50, None),  # a scheduler of schnell
    ("flux1-schnell", False, "tuned", FLUX_SCHNELL, 4, 2.0), ("flux1-schnell", True, None, FLUX_SCHNELL, 4, None),
    ("flux", True, "tuned", FLUX_UNDISTILLED, 50, None), ("flux", True, "my-schnell", FLUX_SCHNELL, 4, 1.0)])
def test_a_scheduler_counts_for_the_variant_it_lies_beside_and_names_count_more(
        folder, schnell, tmp_path, own, dynamic, given, family, steps, time_shift):
    shutil.copy(folder / "ae.safetensors", tmp_path)
    scheduler(tmp_path, use_dynamic_shifting=dynamic, shift=2.0)
    for name in filter(None, (f"{own}.safetensors", given and f"{given}/{given}.safetensors")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(schnell, tmp_path / name)
    found, _, _ = find(tmp_path, given and tmp_path / given / f"{given}.safetensors")
    assert (found.name, found.steps, found.time_shift) == (family.name, steps, time_shift)


def test_flux_without_guidance_input_but_with_dynamic_shifting_is_undistilled(tmp_path):
    file = scheduler(tmp_path, use_dynamic_shifting=True, shift=3.0)
    assert variant(FLUX_SCHNELL, Weights({}, {}, str(tmp_path / "transformer")), file) is FLUX_UNDISTILLED
    assert variant(FLUX_SCHNELL, Weights({}, {}, "flux1-schnell.safetensors"), file) is FLUX_SCHNELL


@pytest.mark.parametrize("place", [0, 5000, 3 << 20, -70])
def test_a_fingerprint_sees_the_header_and_samples_the_rest(place, tmp_path):
    content = bytearray(torch.arange(4 << 20, dtype=torch.int32).numpy().tobytes()[:(4 << 20) + 1])
    (tmp_path / "a").write_bytes(content)
    content[place] ^= 1
    (tmp_path / "b").write_bytes(content)
    assert (fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")) == (place in (0, 5000, 3 << 20))


# ---- layouts of a Flux folder

def test_what_both_tiny_folders_share_is_stored_once(folders, folder):
    shared = [folder / "text_encoder" / "model.safetensors", folder / "text_encoder_2" / "model.safetensors",
              folder / "tokenizer" / "vocab.json", folder / "tokenizer_2" / "spiece.model"]
    assert all(folders / "tiny-sd3" in file.resolve().parents for file in shared)
    links = [path for path in folder.rglob("*") if path.is_symlink()]
    assert len(links) == 4 and all(not Path(link.readlink()).is_absolute() for link in links)


def test_autoencoder_of_the_folder_has_official_names_and_its_own_normalisation(folder, folders):
    assert {name.split(".")[0] for name in load_file(folder / "ae.safetensors")} == {"encoder", "decoder"}
    ours, shared = VAE.load(folder / "ae.safetensors"), VAE.load(folders / "tiny-sd3" / "sd3.safetensors")
    assert (ours.scale_factor, ours.shift_factor) == (shared.scale_factor, shared.shift_factor)


def test_download_without_the_parts_for_diffusers_keeps_their_empty_folders(folder, tmp_path):
    """hf download --exclude '*/diffusion_pytorch_model*' leaves transformer/config.json and vae/config.json."""
    shutil.copytree(folder, tmp_path / "flux")
    for part in ("transformer", "vae"):
        (tmp_path / "flux" / part).mkdir()
        (tmp_path / "flux" / part / "config.json").write_text("{}")
    assert locate(tmp_path / "flux") == (tmp_path / "flux" / "flux.safetensors", tmp_path / "flux" / "ae.safetensors")
    for part in ("transformer", "vae"):
        save(tmp_path / "flux" / part / "diffusion_pytorch_model.safetensors", {"x": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match=r"several could be the model .flux.safetensors, transformer/.: keep one"):
        locate(tmp_path / "flux")
    (tmp_path / "flux" / "flux.safetensors").unlink()
    assert locate(tmp_path / "flux") == (tmp_path / "flux" / "transformer", tmp_path / "flux" / "vae")


def test_flux_is_read_from_an_all_in_one_file_of_comfyui(folder, tmp_path):
    inside, metadata = {}, {}
    for prefix, part in (("model.diffusion_model.", "flux.safetensors"), ("vae.", "ae.safetensors"),
                         ("text_encoders.clip_l.transformer.", "text_encoder"),
                         ("text_encoders.t5xxl.transformer.", "text_encoder_2")):
        weights = open_weights(folder / part)
        inside |= {prefix + name: t.read().clone() for name, t in weights.items()}
        metadata |= weights.metadata
    save(file := tmp_path / "flux1-dev-fp8.safetensors", inside, metadata)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(folder / name, tmp_path / name)
    family, weights, vae = find(tmp_path)
    assert (family, vae) == (FLUX_DEV, file) and file in text_files(tmp_path)
    assert weights.part("model.diffusion_model.").keys() == open_weights(folder / "flux.safetensors").keys()
    ours, expected = VAE.load(vae, fallback=family.latent_scale), VAE.load(folder / "ae.safetensors")
    assert (ours.scale_factor, ours.config) == (expected.scale_factor, expected.config)
    for one, other in zip(FluxText.load(tmp_path).encode(CAPTIONS[:1]), FluxText.load(folder).encode(CAPTIONS[:1]),
                          strict=True):
        assert (one - other).abs().max() < 1e-5
    (tmp_path / "text_encoder_2").symlink_to(folder / "text_encoder_2")
    assert FluxText.load(tmp_path).t5.width == 192 and file in text_files(tmp_path)
    (tmp_path / "text_encoder").symlink_to(folder / "text_encoder")
    assert file not in text_files(tmp_path)  # which now holds both


def test_folder_without_its_autoencoder_or_with_two_models_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "flux")
    (tmp_path / "flux" / "ae.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="ae.safetensors: not found; .*black-forest-labs/FLUX.1-dev has it"):
        locate(tmp_path / "flux")
    (tmp_path / "flux" / "sd3_medium.safetensors").touch()
    with pytest.raises(ValueError, match="several could be the model .flux.safetensors, sd3_medium.safetensors"):
        locate(tmp_path / "flux")


# ---- text

def test_flux_text_is_t5_and_the_unprojected_vector_of_clip(folder):
    text = FluxText.load(folder)
    context, pooled = text.encode([CAPTIONS[0], ""])
    assert context.shape == (2, make_tiny.T5_LENGTH, 192)  # the length that the T5 file records
    assert pooled.shape == (2, 64)
    tokens = text.tokenizers[0]([CAPTIONS[0], ""], text.clip.length)
    assert torch.equal(pooled, text.clip.at_eos(text.clip(tokens)[0], tokens))
    assert torch.equal(context, text.t5(text.tokenizers[1]([CAPTIONS[0], ""], make_tiny.T5_LENGTH)))
    assert FluxText.load(folder, t5_length=256).encode(["x"])[0].shape[1] == 256
    assert FluxText.load(folder, t5_length=512, dtype=torch.bfloat16).encode(["x"])[0].dtype is torch.bfloat16


@pytest.mark.parametrize("length", [513, -1])
def test_t5_lengths_that_flux_does_not_take_are_refused(folder, length):
    with pytest.raises(ValueError, match=f"T5 length {length}: give 1 to 512 tokens"):
        FluxText.load(folder, t5_length=length)


def test_t5_length_over_512_in_the_file_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "flux")
    t5 = open_weights(folder / "text_encoder_2")
    save(tmp_path / "flux" / "text_encoder_2" / "model.safetensors", {name: t.read() for name, t in t5.items()},
         t5.metadata | {"length": 600})
    with pytest.raises(ValueError, match="T5 length 600: give 1 to 512 tokens"):
        FluxText.load(tmp_path / "flux")


def test_folders_of_transformers_give_their_numbers(folder, tmp_path):
    """CLIP and a sharded T5 as save_pretrained writes them."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel
    vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    words, eos = len(vocabulary), vocabulary["<|endoftext|>"]
    torch.manual_seed(0)
    clip = CLIPTextModel(CLIPTextConfig(
        vocab_size=words, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3,
        max_position_embeddings=20, hidden_act="quick_gelu", eos_token_id=eos, bos_token_id=eos - 1)).eval()
    t5 = T5EncoderModel(T5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4,
                                 feed_forward_proj="gated-gelu")).eval()
    clip.save_pretrained(tmp_path / "text_encoder")
    t5.save_pretrained(tmp_path / "text_encoder_2", max_shard_size="100KB")
    assert len(list((tmp_path / "text_encoder_2").glob("*.safetensors"))) > 1
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(folder / name, tmp_path / name)
    text = FluxText.load(tmp_path, t5_length=30)
    context, pooled = text.encode(CAPTIONS[:2])
    with torch.no_grad():
        expected = t5(input_ids=text.tokenizers[1](CAPTIONS[:2], 30)).last_hidden_state
        vector = clip(input_ids=text.tokenizers[0](CAPTIONS[:2], 20)).pooler_output
    assert (context - expected).abs().max() < 1e-5 and (pooled - vector).abs().max() < 1e-5
