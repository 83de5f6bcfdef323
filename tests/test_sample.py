"""Drawing: a picture is its prompt, seed and settings alone; defaults; metadata; one-line refusals before the work."""

import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import flux_tensors
from golden import diffusers_names
from PIL import Image
from safetensors.torch import load, load_file
from torch import nn

import sample
from checkpoint import locate, open_weights, save
from drawing import pictures
from drawing.settings import settle
from family import find, fingerprint, text_files
from flow import flux_mu, flux_sigmas
from flux import Flux, FluxConfig
from mmdit import MMDiT, MMDiTConfig, new_mmdit
from models.make_tiny import seeded, write_clip_vocabulary, write_t5_vocabulary
from text import CLIPText, FluxText, SD3Text, T5Encoder
from tokenizer import CLIP_END
from train_vae import new_vae
from vae import VAE, VAEConfig

ROOT = Path(__file__).parents[1]
CLIP_WIDTH, T5_WIDTH, HEADS, GROUPS = 16, 32, 2, 4
TABLE_SIDE = 32  # 1024 px at factor 16
TRANSFORMER = MMDiTConfig(hidden_size=64, depth=1, context_dim=T5_WIDTH, pooled_dim=2 * CLIP_WIDTH,
                          table_side=TABLE_SIDE, mlp_hidden=64)
FLUX = FluxConfig(hidden_size=64, depth=1, depth_single=1, head_dim=32, context_dim=T5_WIDTH, pooled_dim=CLIP_WIDTH,
                  mlp_hidden=64, axes_dim=(4, 14, 14))
AUTOENCODER = VAEConfig((8, 8, 16, 16), (8, 8, 16, 16), 1, 2, 16, GROUPS)
RECORDED = {"steps": 2, "cfg": 3.0, "time_shift": 2.0, "res": 64}  # in the metadata of the SD3 transformer
FLUX_RECORDED = {"steps": 2, "res": 64}
LATENT = {"tiny-sd3": (1.5305, 0.0609), "tiny-flux": (1.2, 0.1)}  # scale and shift of the VAE
T5_TOKENS = 40  # that the T5 file of the Flux folder records
BOTH = pytest.mark.parametrize("name", ["tiny-sd3", "tiny-flux"])
CAPTIONS = ["a red panda on a branch", "a blue bay seen from a hill", "snow on a small house",
            "a dandelion at sunset"] * 4


def transformer_tensors(config: MMDiTConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """A transformer in which every input matters: a fresh one begins as the identity and predicts 0."""
    generator = torch.Generator().manual_seed(seed)
    model = new_mmdit(config, generator)
    for name, parameter in model.named_parameters():
        if "adaLN_modulation" in name or name.startswith("final_layer"):
            nn.init.normal_(parameter, std=0.2, generator=generator)
        elif name.startswith(("t_embedder", "y_embedder")):
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return model.state_dict()


@pytest.fixture(scope="module")
def sd3(tmp_path_factory) -> Path:
    """A model folder as the official download, a few hundred KiB."""
    folder, generator = tmp_path_factory.mktemp("model"), torch.Generator().manual_seed(0)
    vocabulary = write_clip_vocabulary(folder / "tokenizer", CAPTIONS, CLIP_END)
    write_clip_vocabulary(folder / "tokenizer_2", CAPTIONS, "!")
    pieces = write_t5_vocabulary(folder / "tokenizer_3", CAPTIONS)
    (folder / "text_encoders").mkdir()
    for name, projection in (("clip_l", None), ("clip_g", CLIP_WIDTH)):
        clip = CLIPText(vocabulary, 77, CLIP_WIDTH, CLIP_WIDTH, 2, HEADS, "gelu", vocabulary - 1, projection)
        save(folder / "text_encoders" / f"{name}.safetensors", seeded(clip, generator),
             {"num_attention_heads": HEADS, "hidden_act": "gelu"})
    t5 = T5Encoder(pieces, T5_WIDTH, T5_WIDTH, T5_WIDTH, 1, (32, HEADS))
    save(folder / "text_encoders" / "t5xxl_fp16.safetensors", seeded(t5, generator), {})
    tensors = {f"model.diffusion_model.{name}": t for name, t in transformer_tensors(TRANSFORMER).items()}
    tensors |= {f"first_stage_model.{name}": t for name, t in new_vae(AUTOENCODER, seed=0).state_dict().items()}
    tensors["first_stage_model.decoder.conv_out.weight"] *= 0.3  # an untrained decoder saturates
    save(folder / "sd3.safetensors", tensors, RECORDED | {"norm_groups": GROUPS})
    return folder


@pytest.fixture(scope="module")
def flux(sd3, tmp_path_factory) -> Path:
    """A Flux folder as the official download, with the encoders and the VAE of the SD3 folder."""
    folder = tmp_path_factory.mktemp("flux")
    for part in ("text_encoder", "text_encoder_2"):
        (folder / part).mkdir()
    shutil.copy(sd3 / "text_encoders" / "clip_l.safetensors", folder / "text_encoder" / "model.safetensors")
    t5 = load_file(sd3 / "text_encoders" / "t5xxl_fp16.safetensors")
    save(folder / "text_encoder_2" / "model.safetensors", t5, {"length": T5_TOKENS})
    shutil.copytree(sd3 / "tokenizer", folder / "tokenizer")
    shutil.copytree(sd3 / "tokenizer_3", folder / "tokenizer_2")
    vae = open_weights(sd3 / "sd3.safetensors").part("first_stage_model.")
    save(folder / "ae.safetensors", {name: t.read() for name, t in vae.items()},
         dict(zip(("norm_groups", "scale_factor", "shift_factor"), (GROUPS, *LATENT["tiny-flux"]), strict=True)))
    save(folder / "flux.safetensors", flux_tensors(FLUX), FLUX_RECORDED)
    return folder


@pytest.fixture(scope="module")
def schnell(tmp_path_factory) -> Path:
    """A transformer without guidance_in, for the Flux folder."""
    file = tmp_path_factory.mktemp("schnell") / "flux1-schnell.safetensors"
    save(file, {name: t for name, t in flux_tensors(FLUX).items() if not name.startswith("guidance_in")}, {})
    return file


@pytest.fixture
def name() -> str:
    return "tiny-sd3"  # where a test is not for both


@pytest.fixture
def folder(name, sd3, flux) -> Path:
    return {"tiny-sd3": sd3, "tiny-flux": flux}[name]


@pytest.fixture
def diffusers_folder(name, folder, tmp_path_factory) -> Path:
    """The same weights in the layout of diffusers."""
    other, transformer, vae = tmp_path_factory.mktemp("diffusers"), *(open_weights(file) for file in locate(folder))
    sizes = {"axes_dims_rope": [4, 14, 14]} if name == "tiny-flux" else {"sample_size": 128}
    for part, weights, config in (
            ("transformer", transformer.part("model.diffusion_model."), sizes),
            ("vae", vae.part("first_stage_model."),
             {"norm_num_groups": GROUPS, "scaling_factor": LATENT[name][0], "shift_factor": LATENT[name][1]})):
        (other / part).mkdir()
        (other / part / "config.json").write_text(json.dumps(config))
        tensors = diffusers_names({name: t.read() for name, t in weights.items()})
        tensors = {name: t.contiguous() for name, t in tensors.items()}
        save(other / part / "diffusion_pytorch_model.safetensors", tensors, {"format": "pt"})
    if name == "tiny-flux":
        for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
            shutil.copytree(folder / part, other / part)
        return other
    config = {"num_attention_heads": HEADS, "hidden_act": "gelu", "eos_token_id": 2}
    for part, name in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g"), ("text_encoder_3", "t5xxl_fp16")):
        (other / part).mkdir()
        (other / part / "config.json").write_text(json.dumps(config))
        save(other / part / "model.safetensors", load_file(folder / "text_encoders" / f"{name}.safetensors"),
             {"format": "pt"})
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        shutil.copytree(folder / name, other / name)
    return other


@pytest.fixture
def broken(folder, tmp_path) -> Path:
    """A copy of the model folder, to damage."""
    return Path(shutil.copytree(folder, tmp_path / "model"))


@pytest.fixture
def draw(folder, tmp_path):
    """Call sample.py's main; the pictures in --out, by name."""
    def draw(*arguments, out="out", weights=None) -> list[Path]:
        flags = ["--weights", weights or folder, "--device", "cpu", "--out", tmp_path / out]
        sample.main([*map(str, (*flags, *arguments))])
        return [tmp_path / out] if (tmp_path / out).is_file() else sorted((tmp_path / out).iterdir())

    return draw


@pytest.fixture
def refusal(draw, tmp_path):
    """The one line that sample.py ends with; it has written nothing, but finished latents if they are `kept`."""
    def refusal(*arguments, out="out", weights=None, kept=False) -> str:
        def files() -> set[Path]:
            return {path for path in tmp_path.rglob("*") if path.is_file() and not (kept and ".latent." in path.name)}

        before = files()
        with pytest.raises(SystemExit) as end:
            draw(*arguments, out=out, weights=weights)
        message = end.value.code
        assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
        assert len(message.replace(str(tmp_path), "")) < 500
        assert files() == before
        return message

    return refusal


@pytest.fixture
def says(draw, capsys):
    """The line that sample.py prints before it draws, and what it wrote to stderr."""
    def says(*arguments, **more) -> tuple[str, str]:
        draw(*arguments, **more)
        printed = capsys.readouterr()
        return printed.out.splitlines()[0], printed.err

    return says


@pytest.fixture
def no_loading(monkeypatch):
    """Fails where weights would be loaded."""
    def loaded(*_, **__):
        raise AssertionError("weights were loaded")

    for module in (SD3Text, FluxText, MMDiT, Flux, VAE):
        monkeypatch.setattr(module, "load", loaded)


@pytest.fixture
def settled(folder):
    """The settings that a command line comes to, without drawing."""
    def settled(*arguments, weights=None) -> sample.Settings:
        settings = sample.parse(["--weights", str(weights or folder), "--device", "cpu", *map(str, arguments)])
        family, transformer, _ = find(settings.weights, settings.transformer)
        return settle(settings, family, transformer, family.config(transformer.part("model.diffusion_model.")))

    return settled


def values(settings: sample.Settings, *names: str) -> dict[str, object]:
    return {name: getattr(settings, name) for name in names}


def pixels(path: Path) -> bytes:
    with Image.open(path) as picture:
        return picture.tobytes()


# ---- a picture is its prompt, seed and settings

@BOTH
def test_same_seed_gives_the_same_bytes_and_another_seed_another_picture(draw):
    seeds = ((5, "a"), (5, "b"), (6, "c"))
    [first], [again], [other] = (draw("--prompt", "a hill", "--seed", seed, out=out) for seed, out in seeds)
    assert first.name == "000-a-hill-5.png" and other.name == "000-a-hill-6.png"
    assert first.read_bytes() == again.read_bytes()
    assert pixels(first) != pixels(other)


def test_picture_k_of_count_equals_the_picture_of_its_seed(draw):
    together = draw("--prompt", "a hill", "--seed", 3, "--count", 3, out="together")
    assert len({pixels(path) for path in together}) == 3
    for k, path in enumerate(together):
        assert draw("--prompt", "a hill", "--seed", 3 + k, out=f"alone{k}")[0].read_bytes() == path.read_bytes()


def test_each_of_several_prompts_draws_its_solo_picture(draw, tmp_path):
    (tmp_path / "prompts.txt").write_text("\ufeff a red panda on a branch, seen from far below\n\n  snow \n",
                                          encoding="utf-8")
    prompts = ["a hill", "a red panda on a branch, seen from far below", "snow"]
    together = draw("--prompt", "a hill", "--prompts", tmp_path / "prompts.txt", "--count", 2, out="together")
    assert [path.name for path in together] == [
        "000-a-hill-0.png", "000-a-hill-1.png", "001-a-red-panda-on-a-branch-seen-from-far-below-0.png",
        "001-a-red-panda-on-a-branch-seen-from-far-below-1.png", "002-snow-0.png", "002-snow-1.png"]
    assert len({pixels(path) for path in together}) == 6
    for i, prompt in enumerate(prompts):
        assert draw("--prompt", prompt, out=f"alone{i}")[0].read_bytes() == together[2 * i].read_bytes()


def test_prompts_are_encoded_once(draw, monkeypatch):
    given, encode = [], SD3Text.encode
    monkeypatch.setattr(SD3Text, "encode", lambda text, prompts: given.append(prompts) or encode(text, prompts))
    draw("--prompt", "a hill", "--prompt", "snow", "--prompt", "a hill")
    assert given == [["", "a hill", "snow"]]


@BOTH
def test_both_layouts_of_the_same_weights_draw_the_same_picture(draw, diffusers_folder):
    settings = ("--prompt", "a hill", "--res", 64, "--steps", 2, "--cfg", 3, "--time-shift", 2)
    [official], [diffusers] = draw(*settings, out="a"), draw(*settings, out="b", weights=diffusers_folder)
    assert pixels(official) == pixels(diffusers)


@pytest.mark.parametrize("name, changed", [
    *(("tiny-sd3", changed) for changed in (("--prompt", "snow"), ("--cfg", 1), ("--cfg", 5), ("--negative", "snow"),
                                            ("--steps", 3), ("--time-shift", 6), ("--factor", 8))),
    *(("tiny-flux", changed) for changed in (("--prompt", "snow"), ("--guidance", 6), ("--mu", 2), ("--steps", 3),
                                             ("--seed", 1), ("--factor", 8), ("--cfg", 1)))])
def test_every_setting_matters(draw, changed):
    usual = {"--prompt": "a hill", "--cfg": 3}
    [one], [other] = (draw(*(word for pair in settings.items() for word in pair), out=out)
                      for settings, out in ((usual, "a"), (usual | dict([changed]), "b")))
    assert pixels(one) != pixels(other)
    assert Image.open(other).size == (64, 64)


def test_cfg_is_away_plus_cfg_times_the_difference_and_1_is_one_pass_of_the_prompt(folder, monkeypatch):
    model, generator = MMDiT.load(folder / "sd3.safetensors"), torch.Generator().manual_seed(0)
    shapes = ((1, 16, 4, 6), (2, 9, T5_WIDTH), (2, 2 * CLIP_WIDTH))
    z, context, pooled = (torch.randn(shape, generator=generator) for shape in shapes)
    sigma = torch.tensor([0.7])
    with torch.no_grad():
        towards, away = (model(z, sigma, context[i:i + 1], pooled[i:i + 1]) for i in (0, 1))
        guided = sample.velocity_with_cfg(model, context, pooled, 3.0)(z, sigma)
        difference = guided - (away + 3 * (towards - away))
        assert difference.abs().max() < 1e-5 * guided.abs().max()  # fp32, another batch size
        assert (towards - away).abs().max() > 1e-3 * towards.abs().max()
        passes = []
        forward = MMDiT.forward
        monkeypatch.setattr(MMDiT, "forward",
                            lambda self, latent, *rest: passes.append(len(latent)) or forward(self, latent, *rest))
        assert torch.equal(sample.velocity_with_cfg(model, context, pooled, 1.0)(z, sigma), towards)
    assert passes == [1]


def test_res_is_width_times_height(draw):
    [path] = draw("--prompt", "a hill", "--res", "96x64")
    assert Image.open(path).size == (96, 64)
    assert Image.open(path).text["res"] == "96x64"
    [path] = draw("--prompt", "a hill", "--res", "48X32", "--factor", 8, out="eight")
    assert Image.open(path).size == (48, 32)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_16_bit_arithmetic_draws_nearly_the_same_picture(draw, dtype):
    [full], [half] = draw("--prompt", "a hill", out="a"), draw("--prompt", "a hill", "--dtype", dtype, out="b")
    full, half = (torch.frombuffer(bytearray(pixels(path)), dtype=torch.uint8).float() for path in (full, half))
    assert (full - half).abs().mean() < 2  # of 255; bf16 keeps 8 bits
    assert full.std() > 20


# ---- what it says and writes

@pytest.mark.parametrize("file, kind", [("picture.png", "PNG"), ("picture.jpg", "JPEG"), ("picture.jpeg", "JPEG"),
                                        ("picture.webp", "WEBP"), ("PICTURE.PNG", "PNG")])
@BOTH
def test_metadata_record_prompt_seed_settings_and_model(draw, folder, tmp_path, name, file, kind):
    prompt = 'Blüten "im Schnee", 雪'
    [path] = draw("--prompt", prompt, "--negative", "blur", "--seed", 4, "--cfg", 2.5, "--time-shift", 1.5,
                  out=f"new/{file}")
    with Image.open(path) as picture:
        records = picture.text if kind == "PNG" else json.loads(picture.getexif()[0x010E])
        assert picture.format == kind
    guidance = {"guidance": "3.5"} if name == "tiny-flux" else {}
    assert {key: str(value) for key, value in records.items()} == guidance | {
        "prompt": prompt, "negative": "blur", "seed": "4", "model": locate(folder)[0].name,
        "weights": fingerprint(locate(folder)[0]), "vae": fingerprint(locate(folder)[1]),
        "text_encoders": fingerprint(*text_files(folder)),
        "res": "64x64", "factor": "16",
        "steps": "2", "cfg": "2.5", "time_shift": "1.5", "dtype": "fp32", "software": "diffusion-4k"}
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == [file]


def test_one_line_a_picture_with_path_time_and_memory(draw, capsys):
    paths = draw("--prompt", "a hill", "--count", 2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("SD3; transformer ")
    for path, line in zip(paths, lines[1:], strict=True):
        assert re.fullmatch(re.escape(str(path)) + r"  \d+\.\d\d s/step  peak \d+\.\d GiB", line)


def test_the_line_before_drawing_tells_where_each_setting_comes_from(says, diffusers_folder, folder, tmp_path):
    line, _ = says("--prompt", "a hill", "--cfg", 4)
    assert line == (f"SD3; transformer {folder}/sd3.safetensors, VAE {folder}/sd3.safetensors; cpu, fp32; "
                    "res 64 (recorded), factor 16, steps 2 (recorded), cfg 4 (given), time shift 2 (recorded)")
    (diffusers_folder / "scheduler").mkdir()
    (diffusers_folder / "scheduler" / "scheduler_config.json").write_text('{"shift": 4.5}')
    line, _ = says("--prompt", "a hill", "--res", 64, "--steps", 1, "--t5-length", 9, weights=diffusers_folder, out="b")
    assert line.endswith("steps 1 (given), cfg 7, time shift 4.5 (scheduler), t5 length 9 (given)")
    assert f"VAE {diffusers_folder}/vae, {diffusers_folder}/scheduler/scheduler_config.json; " in line


@pytest.mark.parametrize("name", ["tiny-flux"])
def test_a_model_taken_for_schnell_is_called_so_with_the_flags_of_the_other(says, schnell, tmp_path):
    line, _ = says("--prompt", "a hill", "--res", 64, "--transformer", schnell)
    assert line.startswith("Flux-schnell (it has no guidance_in, nor has a Flux-dev without distillation, which takes "
                           "--steps 50 --cfg 3.5 --t5-length 512 and, at 1024 px, --mu 0.63)")
    assert "steps 4, cfg 1, time shift 1," in line
    shutil.copy(schnell, tmp_path / "my-dev.safetensors")
    line, _ = says("--prompt", "a hill", "--res", 64, "--transformer", tmp_path / "my-dev.safetensors", "--steps", 2,
                   "--mu", 1, out="b")
    assert line.startswith("Flux-dev without distillation (by its name") and "steps 2 (given), cfg 3.5" in line
    assert "time shift 2.718 (given)" in line


def test_a_folder_may_be_called_like_a_picture(draw, tmp_path):
    (tmp_path / "all.png").mkdir()
    paths = draw("--prompt", "a hill", "--prompt", "", out="all.png")
    assert [path.name for path in paths] == ["000-a-hill-0.png", "001-empty-0.png"]


@pytest.mark.parametrize("out", ["out", "picture.png", "picture.jpg"])
def test_a_full_disk_leaves_nothing_half_written(refusal, monkeypatch, out):
    def full(self, path, **_):
        Path(path).write_bytes(b"the first half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    message = refusal("--prompt", "a hill", out=out, kept=True)
    assert "No space left" in message and ("picture" in message or "000-a-hill-0.png" in message)


def test_a_picture_that_cannot_be_written_leaves_the_one_before(draw, tmp_path, monkeypatch):
    [path] = draw("--prompt", "a hill")
    before = path.read_bytes()
    monkeypatch.setattr(Image.Image, "save", lambda *_, **__: (_ for _ in ()).throw(OSError("encoder error")))
    with pytest.raises(SystemExit, match="a-hill-0.png: could not be written .encoder error"):
        draw("--prompt", "a hill")
    assert [entry.read_bytes() for entry in (tmp_path / "out").glob("*.png")] == [before]


@pytest.mark.parametrize("changed, how", [
    (("--cfg", "5"), "cfg '3.0', not '5.0'"), (("--dtype", "bf16"), "dtype 'fp32', not 'bf16'"),
    (("--res", "96"), "res '64x64', not '96x96'"), (("--negative", "snow"), "negative '', not 'snow'")])
def test_a_picture_of_other_settings_is_not_replaced(draw, refusal, tmp_path, changed, how):
    [path] = draw("--prompt", "a hill")
    before = path.read_bytes()
    assert draw("--prompt", "a hill") == [path]  # its own picture is
    both = [path.with_name("000-a-hill-0-2.png"), path]
    assert draw("--prompt", "a hill", *changed) == draw("--prompt", "a hill", *changed) == both
    assert path.read_bytes() == before
    given = tmp_path / "given.png"
    path.rename(given)
    assert f"given.png: exists and was drawn with {how}; give another --out" in refusal(
        "--prompt", "a hill", *changed, out=given.name)


@BOTH
def test_a_picture_of_other_text_encoders_is_not_replaced(draw, broken):
    draw("--prompt", "a hill", weights=broken)
    encoder = open_weights(next(broken.glob("text_encoder*/*.safetensors")))
    save(encoder.source, {name: 1.1 * t.read() for name, t in encoder.items()}, encoder.metadata)
    second, first = draw("--prompt", "a hill", weights=broken)
    assert second.name == "000-a-hill-0-2.png" and pixels(first) != pixels(second)


@pytest.mark.parametrize("flags", [("--solver", "ab2"), ("--store", "fp8"), ("--vae-dtype", "bf16")])
def test_a_picture_of_a_setting_that_is_no_longer_given_is_drawn_anew(draw, tmp_path, flags):
    (tmp_path / "prompts.txt").write_text("a hill")
    [first] = draw("--prompts", tmp_path / "prompts.txt", *flags)
    second, first = draw("--prompts", tmp_path / "prompts.txt")
    assert second.name == "000-a-hill-0-2.png" and pixels(first) != pixels(second)


@pytest.mark.parametrize("out", ["picture.png", "picture.jpg", "picture.webp"])
def test_a_picture_of_another_prompt_or_program_is_not_replaced(draw, refusal, out):
    [path] = draw("--prompt", "a hill", out=out)
    assert "was drawn with prompt 'a hill', not 'snow'" in refusal("--prompt", "snow", out=out)
    Image.new("RGB", (64, 64)).save(path)
    assert f"{path.name}: exists and records nothing of this program" in refusal("--prompt", "a hill", out=out)
    path.write_text("notes")
    assert "records nothing of this program" in refusal("--prompt", "a hill", out=out)


# ---- names of pictures

@pytest.mark.parametrize("prompt, name", [
    ("A hill, at dawn!", "a-hill-at-dawn"), ("Красная чашка", "красная-чашка"), 
    ("ธงชาติ नमस्ते", "ธงชาติ-नमस्ते"), ("cafe\u0301", "café"), ("", "empty"), ("snake_case", "snake-case"), ("1+1", "1-1")])
def test_a_slug_keeps_the_letters_of_every_script(prompt, name):
    assert pictures.slug_of(prompt) == name


@pytest.mark.parametrize("one, other", [("🐼", "🦊"), ("a 🐼", "a 🦊"), ("?", "!"), (49 * "a", 49 * "a" + "b"),
                                        ("é" * 60, "é" * 61), ("x" * 48 + " y", "x" * 48 + " z")])
def test_a_slug_that_loses_letters_has_a_hash(one, other):
    slugs = [pictures.slug_of(prompt) for prompt in (one, other)]
    assert slugs[0] != slugs[1] and all(re.search("-[0-9a-f]{8}$", slug) for slug in slugs)


def named(settled, tmp_path, prompts, *flags) -> list[str]:
    settings = settled("--out", tmp_path / "out", *flags)
    return [picture.path.name for picture in sample.name_pictures(prompts, settings)]


def test_names_sorted_are_in_the_order_of_the_prompts_and_seeds(settled, tmp_path):
    names = named(settled, tmp_path, [(f"cup {k}", "") for k in range(1001)], "--count", 3, "--seed", 8)
    assert names == sorted(names) and len(set(names)) == 3003
    assert names[:3] == ["0000-cup-0-08.png", "0000-cup-0-09.png", "0000-cup-0-10.png"]
    assert all(len(os.fsencode(f".{name}.12345678.tmp.latent.safetensors")) < 256 for name in named(
        settled, tmp_path, [(60 * "𐍈", "")]))


# ---- lists of prompts

def test_json_lines_give_prompts_and_names(draw, settled, tmp_path):
    rows = [{"file_name": "b/2.jpg", "text": " a hill \u2028 in fog", "alt": ["x"]},
            {"file_name": "1.tif", "text": "snow"}]
    (tmp_path / "prompts.txt").write_text("\n".join(json.dumps(row) for row in rows) + "\r\n\r\n")
    paths = draw("--prompt", "a hill", "--prompts", tmp_path / "prompts.txt")
    assert [path.name for path in paths] == ["000-a-hill-0.png", "1.png", "2.png"]
    assert Image.open(paths[2]).text["prompt"] == "a hill \u2028 in fog"
    assert named(settled, tmp_path, [("a", "x"), ("b", "")], "--count", 2) == [
        "x-0.png", "x-1.png", "001-b-0.png", "001-b-1.png"]


@pytest.mark.parametrize("name", ["list", "list.txt", "list.jsonl", "list.json"])
def test_the_content_of_a_list_decides_and_not_its_name(name, tmp_path):
    (tmp_path / name).write_text('{"text": "a cup"}\n{"text": "snow", "file_name": "2.png"}\n')
    assert pictures.read_list(str(tmp_path / name)) == [("a cup", ""), ("snow", "2")]
    (tmp_path / name).write_text(json.dumps({"text": "a cup", "file_name": "train\\1.png"}))  # written on Windows
    assert pictures.read_list(str(tmp_path / name)) == [("a cup", "1")]
    if name != "list.json":
        prompts = ["{red, blue} cup", "[two] 红茶", '"a cup"', "42, 43", "#1 cup", "a cup -- blue --very blue-- of tea"]
        (tmp_path / name).write_bytes("{}\r\n{}\r{}\n{}\n\u200b\n{}\n{}".format(*prompts).encode("utf-16"))
        assert [prompt for prompt, _ in pictures.read_list(str(tmp_path / name))] == prompts


@pytest.mark.parametrize("file, content, says", [
    ("a.csv", "a cup", "a table or JSON"), ("a.json", '{"a": 1,\n"b": 2}', "a table or JSON"),
    ("a.txt", '[{"text": "a cup"}]', "a table or JSON"), ("a.txt", '{\n"text": "a cup"\n}', "a table or JSON"),
    ("a.txt", "file_name,text\n1.png,a cup", "a table or JSON"), ("a.txt", "id\tcaption\n1\ta cup", "a table or JSON"),
    ("a.txt", '{"text": "a cup"}\nsnow', "a.txt:2: not JSON"), ("a.txt", 'snow\n{"text": "a"}', "a.txt:1: not JSON"),
    ("a.jsonl", '{"text": null}', "a.jsonl:1: text is null"), ("a.jsonl", '{"prompt": "a"}', ":1: text is missing"),
    ("a.jsonl", '{"text": " "}', "text must not be empty"), ("a.jsonl", '{"text": "\\ud800"}', "not UTF-8"),
    ("a.jsonl", '{"text": "a", "file_name": 3}', ":1: file_name is 3, expected a text"),
    ("a.jsonl", '{"text": "a", "file_name": ".a.png"}', "file_name a file's name"),
    ("a.jsonl", '{"text": "a", "file_name": "a\\u001b[2J.png"}', "file_name a file's name"),
    ("a.jsonl", json.dumps({"text": "a", "file_name": 300 * "a"}), "at most 180 bytes"),
    ("a.jsonl", 2 * '{"text": "a", "file_name": "1.png"}\n', "two lines have one file_name"),
    ("a.txt", "Prompt\tCategory\tNote\na cup\tArtifacts\t1", "a table or JSON"),
    ("a.txt", '"file_name","text"\n"1.png","a cup"', "a table or JSON"),
    ("a.txt", "a cup\nNegative prompt: tea\nSteps: 20, Sampler: Euler a", "a.txt:2: 'Negative prompt: tea' holds a pi"),
    ("a.txt", "# prompt 1\n\na cup --n low quality --w 1024 --d 1", "a.txt:1: '# prompt 1' is a comment"),
    ("a.txt", "a cup\na cup --n low quality --d 1", "a.txt:2: 'a cup --n low quality --d 1' has flags"),
    ("a.txt", '--prompt "a cup" --steps 30', "has flags"), ("a.txt", "a cup --ar 16:9 --v 6", "has flags"),
    ("a.txt", "<!DOCTYPE html>\n<p>a cup", "is HTML or RTF"), ("a.txt", "{\\rtf1\\ansi a cup}", "is HTML or RTF"),
    ("a.jsonl", '{"text": "\u200b \u2060"}', "text must not be empty"),
    ("a.parquet", "PAR1", "a table or JSON"), ("a.txt", "a\0 \0c\0u\0p\0", "zero bytes, no text")])
def test_a_list_that_is_neither_lines_nor_json_lines_is_refused(refusal, no_loading, tmp_path, file, content, says):
    (tmp_path / file).write_text(content)
    message = refusal("--prompts", tmp_path / file)
    assert says in message and (f"--prompts {tmp_path / file}" in message or "UTF-8" in message)


# ---- only the decode fails

def test_where_the_vae_overflows_a_wider_dtype_decodes(draw, monkeypatch, capsys):
    [plain] = draw("--prompt", "a hill", "--dtype", "bf16", out="a")
    decode = VAE.decode
    monkeypatch.setattr(VAE, "decode", lambda vae, latent, factor: decode(vae, latent, factor) * (
        math.inf if latent.dtype is not torch.float32 else 1))
    [wider] = draw("--prompt", "a hill", "--dtype", "bf16", out="b")
    assert "note: the VAE overflowed in bf16; fp32 was taken" in capsys.readouterr().err
    difference = torch.frombuffer(bytearray(pixels(plain)), dtype=torch.uint8).float() - torch.frombuffer(
        bytearray(pixels(wider)), dtype=torch.uint8).float()
    assert 0 < difference.abs().mean() < 2  # the same latent, in another dtype


def test_where_weights_of_the_vae_overflow_a_wider_dtype_decodes(draw, broken, capsys):
    tensors = load((broken / "sd3.safetensors").read_bytes())
    tensors["first_stage_model.encoder.conv_in.bias"][0] = 1e5  # beyond fp16
    save(broken / "sd3.safetensors", tensors, RECORDED | {"norm_groups": GROUPS})
    [wider] = draw("--prompt", "a hill", "--vae-dtype", "fp16", weights=broken)
    assert "note: the VAE overflowed in fp16; bf16 was taken" in capsys.readouterr().err
    assert pixels(wider) == pixels(draw("--prompt", "a hill", "--vae-dtype", "bf16", out="b", weights=broken)[0])


@pytest.mark.parametrize("fault, says", [
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "ran out of memory"),
    (torch.OutOfMemoryError("CUDA out of memory"), "ran out of memory"), (None, "the VAE overflowed in fp32")])
def test_a_latent_whose_decode_fails_is_kept_and_the_other_pictures_are_drawn(draw, tmp_path, monkeypatch, fault, says):
    whole = draw("--prompt", "a hill", "--count", 3, out="whole")
    decode, calls = VAE.decode, []

    def second_fails(vae, latent, factor):
        calls.append(latent.clone())
        if len(calls) == 2 and fault:
            raise fault
        return decode(vae, latent, factor) * (math.nan if len(calls) == 2 else 1)

    monkeypatch.setattr(VAE, "decode", second_fails)
    with pytest.raises(SystemExit) as end:
        draw("--prompt", "a hill", "--count", 3)
    assert says in end.value.code and "--cfg" not in end.value.code and "\n" not in end.value.code
    kept = tmp_path / "out" / "000-a-hill-1.latent.safetensors"
    assert str(kept) in end.value.code and torch.equal(load_file(kept)["latent"], calls[1])
    assert sorted(path.name for path in kept.parent.iterdir()) == ["000-a-hill-0.png", kept.name, "000-a-hill-2.png"]
    assert [pixels(path) for path in sorted(kept.parent.glob("*.png"))] == [pixels(whole[0]), pixels(whole[2])]

    monkeypatch.setattr(VAE, "decode", decode)
    assert [pixels(path) for path in draw("--prompt", "a hill", "--count", 3)] == [pixels(path) for path in whole]
    assert not kept.exists()


def test_a_decode_that_is_killed_goes_on_from_its_latent(draw, tmp_path, monkeypatch):
    [whole] = draw("--prompt", "a hill", out="whole")
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(VAE, "decode", lambda *_: {}["killed"])
        draw("--prompt", "a hill")
    [kept] = (tmp_path / "out").iterdir()
    assert kept.name == "000-a-hill-0.latent.safetensors"
    monkeypatch.setattr(sample, "streamed", None)  # neither text encoders nor transformer are read
    assert pixels(draw("--prompt", "a hill")[0]) == pixels(whole) and not kept.exists()


@pytest.mark.parametrize("flags, seed", [((), "0"), (("--first", 32), "0-2"), (("--from", "a.png"), "0-2")])
def test_another_vae_dtype_decodes_a_finished_latent_unless_the_vae_shaped_it(draw, tmp_path, monkeypatch, flags, seed):
    def killed(latent, *rest):
        return {}["killed"] if latent.shape[2] == 4 else decode(latent, *rest)  # of the last stage

    Image.effect_noise((64, 64), 50).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    decode = sample.decode
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(sample, "decode", killed)
        draw("--prompt", "a hill", *flags)
    [whole] = draw("--prompt", "a hill", *flags, "--vae-dtype", "bf16", out="whole")
    drawn = draw("--prompt", "a hill", *flags, "--vae-dtype", "bf16")
    assert drawn[0].name == f"000-a-hill-{seed}.png" and pixels(drawn[0]) == pixels(whole)


def test_a_given_picture_is_encoded_once_for_all_pictures(draw, tmp_path, monkeypatch):
    calls, encode = [], VAE.encode
    Image.effect_noise((64, 64), 50).save(tmp_path / "a.png")
    monkeypatch.setattr(VAE, "encode", lambda *given: calls.append(1) or encode(*given))
    assert len(draw("--prompt", "a hill", "--from", tmp_path / "a.png", "--count", 3)) == 3 and calls == [1]


@pytest.mark.parametrize("tensors", [{"latent": torch.full((1, 16, 4, 4), math.nan)}, {"z": torch.zeros(1, 16, 4, 4)},
                                     {"latent": torch.zeros(1, 16, 2, 2)}, {"latent": torch.zeros(16, 4, 4)},
                                     {"latent": torch.zeros(1, 8, 4, 4)}])
def test_a_damaged_latent_is_drawn_again(draw, tmp_path, monkeypatch, tensors):
    [whole] = draw("--prompt", "a hill", out="whole")
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(VAE, "decode", lambda *_: {}["killed"])
        draw("--prompt", "a hill")
    [kept] = (tmp_path / "out").iterdir()
    save(kept, tensors, open_weights(kept).metadata)
    assert pixels(draw("--prompt", "a hill")[0]) == pixels(whole) and not kept.exists()


def test_texts_of_finished_latents_are_not_encoded(draw, tmp_path, monkeypatch):
    prompts = "--prompt", "a hill", "--prompt", "a bay", "--prompt", "snow"
    monkeypatch.setattr(sample, "MOST_AT_ONCE", 2)
    whole = draw(*prompts, out="whole")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(VAE, "decode", lambda *_: (_ for _ in ()).throw(MemoryError()))
        draw(*prompts)
    (tmp_path / "out" / "002-snow-0.latent.safetensors").unlink()
    given, encode = [], SD3Text.encode
    monkeypatch.setattr(SD3Text, "encode", lambda text, prompts: given.append(prompts) or encode(text, prompts))
    assert [pixels(path) for path in draw(*prompts)] == [pixels(path) for path in whole] and given == [["", "snow"]]


def test_a_latent_of_other_settings_is_never_taken_and_never_replaced(draw, tmp_path):
    file = tmp_path / "out" / "000-a-hill-0.latent.safetensors"
    file.parent.mkdir()
    save(file, {"latent": torch.zeros(1, 16, 4, 4)}, {"software": "diffusion-4k", "prompt": "a hill", "seed": 1})
    before = file.read_bytes()
    assert [path.name for path in draw("--prompt", "a hill") if path != file] == ["000-a-hill-0-2.png"]
    assert file.read_bytes() == before


def test_pictures_of_a_list_that_are_there_are_not_drawn_again(draw, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a hill\nsnow\n")
    first, second = draw("--prompts", tmp_path / "prompts.txt")
    first.unlink()
    written = second.stat().st_mtime_ns
    draw("--prompts", tmp_path / "prompts.txt")
    assert second.stat().st_mtime_ns == written
    assert "1 of 2 pictures are there already" in capsys.readouterr().out and first.exists()


def test_every_picture_that_fails_has_its_line(draw, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(VAE, "decode", lambda *_: torch.full((1, 3, 64, 64), math.inf))
    with pytest.raises(SystemExit) as end:
        draw("--prompt", "a hill", "--prompt", "snow")
    assert "error: " + str(tmp_path / "out" / "000-a-hill-0.png") in capsys.readouterr().err
    assert str(tmp_path / "out" / "001-snow-0.png") in end.value.code and len(list((tmp_path / "out").iterdir())) == 2


def test_a_damaged_picture_to_redraw_is_refused_before_loading(refusal, no_loading, tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    assert "half.png" in refusal("--prompt", "a hill", "--from", tmp_path / "half.png")


def test_compiled_blocks_must_all_be_in_memory(refusal, no_loading):
    assert "--compile: needs all blocks in memory" in refusal("--prompt", "a hill", "--compile", "--store", "fp8")


def test_metadata_too_long_for_jpeg_are_refused_before_drawing(refusal, no_loading, draw):
    assert "picture.jpg: prompts and settings take 70," in refusal("--prompt", 70_000 * "a", out="picture.jpg")


# ---- defaults

def test_defaults_come_from_the_metadata_of_the_file(settled):
    settings = settled()
    assert values(settings, *RECORDED) == RECORDED | {"res": "64"} and settings.size == (64, 64)
    assert isinstance(settings.steps, int)
    assert values(settings, "factor", "dtype", "count") == {"factor": 16, "dtype": "fp32", "count": 1}


def test_defaults_are_those_of_sd3_where_the_file_records_none(settled, diffusers_folder):
    settings = settled(weights=diffusers_folder)
    assert values(settings, "steps", "cfg", "guidance", "time_shift", "size") == {
        "steps": 28, "cfg": 7.0, "guidance": None, "time_shift": 3.0, "size": (1024, 1024)}


@pytest.mark.parametrize("name", ["tiny-flux"])
def test_defaults_are_those_of_flux_dev_where_the_file_records_none(settled, tmp_path):
    save(tmp_path / "plain.safetensors", flux_tensors(FLUX), {})
    settings = settled("--transformer", tmp_path / "plain.safetensors", "--res", "128x64")
    assert values(settings, "steps", "cfg", "guidance", "size", "time_shift") == {
        "steps": 50, "cfg": 1, "guidance": 3.5, "size": (128, 64), "time_shift": math.exp(flux_mu(8))}
    sigmas = find(settings.weights)[0].sigmas(settings.steps, settings.time_shift)
    assert torch.allclose(sigmas, flux_sigmas(50, tokens=8))
    assert settled("--transformer", tmp_path / "plain.safetensors").size == (1024, 1024)


@pytest.mark.parametrize("name", ["tiny-flux"])
def test_defaults_are_those_of_schnell_and_its_256_tokens(settled, draw, schnell, monkeypatch):
    settings = settled("--transformer", schnell)
    assert values(settings, "steps", "cfg", "guidance", "time_shift") == {
        "steps": 4, "cfg": 1, "guidance": None, "time_shift": 1}
    calls, forward = [], Flux.forward
    monkeypatch.setattr(Flux, "forward", lambda self, *inputs: calls.append(inputs) or forward(self, *inputs))
    draw("--prompt", "a hill", "--res", 64, "--transformer", schnell)
    assert [sigma.item() for _, sigma, *_ in calls] == [1, 0.75, 0.5, 0.25]
    assert {context.shape[1] for _, _, context, *_ in calls} == {256}
    calls.clear()
    draw("--prompt", "a hill", out="dev")
    assert {context.shape[1] for _, _, context, *_ in calls} == {T5_TOKENS}


@pytest.mark.parametrize("name, recorded", [
    ("tiny-sd3", {"steps": 7, "time_shift": 3, "res": 96, "cfg": 2}),
    ("tiny-flux", {"steps": 7, "time_shift": 3, "res": 96, "cfg": 2, "guidance": 2})])
def test_metadata_override_the_family_and_the_command_line_overrides_both(settled, name, recorded, tmp_path):
    tensors = flux_tensors(FLUX) if name == "tiny-flux" else transformer_tensors(TRANSFORMER)
    save(tmp_path / "small.safetensors", tensors, recorded)
    settings = settled("--transformer", tmp_path / "small.safetensors")
    assert values(settings, *recorded) == recorded | {"res": "96"}
    flags = {"steps": 3, "cfg": 1.0, "res": "64x96"} | ({"guidance": 5.0} if name == "tiny-flux" else {})
    words = [word for flag, value in flags.items() for word in (f"--{flag}", value)]
    settings = settled("--transformer", tmp_path / "small.safetensors", *words, "--mu", 0.5)
    assert values(settings, *flags) == flags and settings.size == (64, 96) and settings.time_shift == math.exp(0.5)
    assert settled("--transformer", tmp_path / "small.safetensors", "--time-shift", 4).time_shift == 4


def test_metadata_that_are_no_number_do_not_matter_where_the_flag_is_given(settled, tmp_path):
    save(tmp_path / "many.safetensors", transformer_tensors(TRANSFORMER), {"steps": "many"})
    assert settled("--transformer", tmp_path / "many.safetensors", "--steps", 3).steps == 3


def test_another_transformer_brings_its_own_defaults_and_shape(settled, draw, tmp_path):
    config = MMDiTConfig(**vars(TRANSFORMER) | {"hidden_size": 128, "depth": 2, "table_side": 4, "qk_norm": True})
    save(tmp_path / "larger.safetensors", transformer_tensors(config), {"steps": 1, "res": 96})
    [path] = draw("--prompt", "a hill", "--transformer", tmp_path / "larger.safetensors")
    records = Image.open(path).text
    assert [records[key] for key in ("steps", "cfg", "res", "model")] == [
        "1", "7.0", "96x96", "larger.safetensors"]
    assert Image.open(path).size == (96, 96)


def test_dtype_follows_the_device_that_is_asked_for(settled, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert settled().dtype == "fp32"  # --device cpu on a machine with a GPU


# ---- refusals

@pytest.mark.parametrize("arguments, says", [
    (("--res", "100"), "100x100: both sides must be multiples of 32 at --factor 16"),
    (("--res", "64x100"), "64x100: both sides must be multiples of 32"),
    (("--res", "40"), "multiples of 32"),
    (("--res", "24", "--factor", "8"), "multiples of 16 at --factor 8"),
    *((("--res", res), "pixels") for res in ("0", "64x0", "-64", "big", "64x", "64.5", "64,64")),
    (("--res", "1056", "--first", "none"), "ends at 1024 px per side at --factor 16"),
    (("--res", "64x2048", "--first", "none"), "ends at 1024 px"),
    (("--res", "528", "--factor", "8", "--first", "none"),
     "ends at 512 px per side at --factor 8; --factor 16 reaches twice as far")])
def test_a_resolution_that_cannot_be_drawn_is_refused(refusal, no_loading, tmp_path, arguments, says):
    message = refusal("--prompt", "a hill", *arguments)
    assert "--res" in message and says in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments, says", [
    (("--steps", "0"), "--steps 0: give 1 to 10,000"), (("--steps", "1000000000"), "--steps 1000000000: give 1 to"),
    (("--count", "0"), "--count 0"), (("--count", "-1"), "--count -1"), (("--count", "1000000000"), "1 to 100,000"),
    (("--count", "60000", "--prompt", "snow"), "120,000 pictures of 2 prompts: give at most 100,000"),
    (("--seed", "-1"), "--seed -1"), (("--seed", str(2**32)), "--seed 4294967296: give 0 to 2^32 - count"),
    (("--seed", str(2**32 - 1), "--count", "2"), "--seed"), (("--t5-length", "513"), "--t5-length 513: give 1 to 512"),
    (("--prompt", 100_001 * "a"), "a prompt of 100,001 letters"),
    (("--cfg", "0"), "--cfg 0.0: give a finite number but 0, which leaves the prompt out; 1 is no guidance"),
    (("--cfg", "nan"), "--cfg nan"), (("--cfg", "inf"), "--cfg inf"),
    (("--time-shift", "0"), "--time-shift 0"), (("--time-shift", "-3"), "above 0"),
    (("--time-shift", "nan"), "above 0"),
    (("--device", "foo"), "--device foo: this machine has cpu"),
    (("--device", "meta"), "this machine has cpu"), (("--device", "cuda:99"), "this machine has cpu"),
    (("--cfg", "1", "--negative", "snow"),
     "--negative needs --cfg above 1, and --cfg is 1: give a larger --cfg, or leave"),
    (("--time-shift", "1e10"), "--time-shift 1e+10: some of the 2 noise levels coincide"),
    (("--mu", "60"), "--mu 60: some of the 2 noise levels coincide"),
    (("--mu", "nan"), "--mu nan: give the logarithm of a time shift"),
    (("--offset", "1", "--factor", "8"), "--offset 1: give it with --factor 16"),
    (("--negative", "\udcff"), "not UTF-8")])
def test_a_setting_out_of_range_is_refused(refusal, no_loading, tmp_path, arguments, says):
    assert says in refusal("--prompt", "a hill", *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key, value, says", [
    ("res", "1000", "--res 1000x1000 (recorded by {}): both sides must be multiples of 32"),
    ("res", "2048x64", "--res 2048x64 (recorded by {}): this model's position table ends at 1024"),
    ("time_shift", "1e12", "--time-shift 1e+12 (recorded by {}): some of the 2 noise levels coincide")])
def test_a_recorded_setting_that_is_refused_names_its_file(refusal, no_loading, folder, tmp_path, key, value, says):
    file, weights = tmp_path / "tuned.safetensors", open_weights(folder / "sd3.safetensors")
    save(file, {name: t.read() for name, t in weights.items()}, RECORDED | {key: value})
    assert says.format(file) in refusal("--prompt", "a hill", "--transformer", file)


def test_cuda_where_there_is_none_is_refused(refusal, no_loading, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    message = refusal("--prompt", "a hill", "--device", "cuda")
    assert "--device cuda: this machine has cpu; cuda needs an NVIDIA GPU" in message


def test_prompts_that_are_not_there_are_refused(refusal, no_loading, tmp_path):
    assert "nothing to draw" in refusal()
    assert "nowhere.txt: no such file; give a text file" in refusal("--prompts", "nowhere.txt")
    (tmp_path / "empty.txt").write_text(" \n\n")
    assert "no prompt in it" in refusal("--prompts", tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes("Blüte".encode("latin-1"))
    assert "latin.txt: not UTF-8" in refusal("--prompts", tmp_path / "latin.txt")
    assert "a folder, not a file" in refusal("--prompts", tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [("--count", "2"), ("--prompt", "snow")])
def test_several_pictures_with_one_file_name_are_refused(refusal, no_loading, more):
    message = refusal("--prompt", "a hill", *more, out="picture.png")
    assert "picture.png names one file, but there are 2 pictures to draw: name a folder" in message


@pytest.mark.parametrize("out", ["picture.gif", "picture.TIFF", "picture.bmp"])
def test_a_format_that_is_not_written_is_refused(refusal, no_loading, tmp_path, out):
    assert "the formats are .png, .jpg, .jpeg, .webp" in refusal("--prompt", "a hill", out=out)
    assert not (tmp_path / out).exists()


@pytest.mark.parametrize("out", ["file", "file/deeper", "file/picture.png"])
def test_a_place_that_cannot_be_written_is_refused_before_weights_are_loaded(refusal, no_loading, tmp_path, out):
    (tmp_path / "file").write_text("in the way")
    message = refusal("--prompt", "a hill", out=out)
    assert "--out" in message and "no folder that can be written" in message


def test_a_model_that_is_not_there_is_refused_with_the_download_command(refusal, tmp_path):
    message = refusal("--prompt", "a hill", weights=tmp_path / "nowhere")
    assert "nowhere: no such folder" in message and "hf download stabilityai/stable-diffusion-3-medium" in message
    (tmp_path / "hollow").mkdir()
    assert "hf download" in refusal("--prompt", "a hill", weights=tmp_path / "hollow")
    with pytest.raises(SystemExit, match="models/nobody: no such folder.*hf download"):
        sample.main(["--prompt", "a hill", "--model", "nobody"])


@pytest.mark.parametrize("name", ["tiny-flux"])
def test_large_sides_of_flux_are_drawn_with_a_note_that_the_schedule_blurs(settled, capsys, monkeypatch):
    assert settled("--res", "8192x4096").size == (8192, 4096)  # 32,768 tokens: mu = 0.5 + 0.65 * 32,512 / 3840
    assert "note: time shift 404.8, mu 6.00: the last noise level before 0 is 0.998" in capsys.readouterr().err
    for name, number in (("RANK", "1"), ("WORLD_SIZE", "2")):  # the first rank tells it
        monkeypatch.setenv(name, number)
    settled("--res", "8192x4096")
    assert not capsys.readouterr().err
    for flags in (("--res", "4096", "--steps", 28), ("--res", "8192", "--mu", "1.15"), ("--res", "8192", "--steps", 1)):
        settled(*flags)
        assert not capsys.readouterr().err


@pytest.mark.parametrize("name", ["tiny-flux"])
@pytest.mark.parametrize("res, says", [
    ("65536", "--res 65536: some of the 2 noise levels coincide; give --mu 1.15, or a smaller --res (by tokens, mu is"),
    ("16384x65536", "--res 16384x65536: some of the 2"), ("65568", "at most 65,536 px per side"),
    ("1000000", "--res '1000000': give pixels up to 65,536")])
def test_sides_for_which_flux_has_no_schedule_are_refused(refusal, no_loading, res, says):
    assert says in refusal("--prompt", "a hill", "--res", res)


@pytest.mark.parametrize("flag", ["--weights", "--model", "--transformer", "--prompts", "--out", "--from", "--res",
                                  "--device"])
def test_an_empty_name_as_of_an_unset_shell_variable_is_refused(no_loading, flag):
    with pytest.raises(SystemExit, match=f'^error: {flag} "": give a value; a shell variable may be unset'):
        sample.main(["--prompt", "a hill", "--device", "cpu", flag, ""])


@pytest.mark.parametrize("flag", ["--weights", "--transformer", "--prompts", "--out"])
@pytest.mark.parametrize("value, says", [
    ("s3://bucket/a", "s3://bucket/a: give a path on this machine"), ("~/a", "~/a: give the path without ~"),
    ("b/" + 221 * "a" + "/c", "of 225 letters: give names of at most 220 bytes"), (74 * "雪", "at most 220 bytes"),
    (2000 * "a/", "and 3,500 in all")])
def test_a_name_that_no_file_here_can_have_is_refused(no_loading, flag, value, says):
    with pytest.raises(SystemExit, match=f"^error: {flag} .*{re.escape(says)}"):
        sample.main(["--prompt", "a hill", "--device", "cpu", flag, value])


def test_the_longest_name_that_is_accepted_is_written_and_its_latent_too(draw, tmp_path, monkeypatch):
    draw("--prompt", "a hill", out=216 * "a" + ".png")
    monkeypatch.setattr(VAE, "decode", lambda vae, latent, factor: torch.full((1, 3, 8, 8), float("nan")))
    with pytest.raises(SystemExit, match="the finished latent is kept"):
        draw("--prompt", "a hill", out=216 * "b" + ".png")
    assert {path.name for path in tmp_path.iterdir()} == {216 * "a" + ".png", 216 * "b" + ".latent.safetensors"}


def test_lists_and_empty_texts_may_be_given():
    given = sample.parse(["--prompt", "", "--prompt", "a hill", "--negative", "", "--lora", "a.safetensors:0.5"])
    assert (given.prompt, given.negative, given.lora) == (["", "a hill"], "", ["a.safetensors:0.5"])
    assert (sample.parse([]).prompt, sample.parse([]).lora, sample.parse([]).model) == ([], [], "tiny-sd3")


def test_two_model_folders_are_refused(folder):
    with pytest.raises(SystemExit, match="--model tiny-flux --weights .*: give one of them"):
        sample.main(["--prompt", "a hill", "--model", "tiny-flux", "--weights", str(folder)])


def test_a_picture_that_another_run_drew_meanwhile_is_not_replaced(draw, tmp_path, monkeypatch):
    def slow(*arguments):
        shutil.copy(tmp_path / "other.png", tmp_path / "a.png")  # by the other run
        return decode(*arguments)

    draw("--prompt", "snow", out="other.png")
    decode = sample.decode
    monkeypatch.setattr(sample, "decode", slow)
    with pytest.raises(SystemExit, match="not 'a hill'; the finished latent is kept in .*a.latent.safetensors$"):
        draw("--prompt", "a hill", out="a.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "other.png").read_bytes()
    assert (tmp_path / "a.latent.safetensors").exists()


def test_the_latent_that_another_run_keeps_meanwhile_stays(draw, tmp_path, monkeypatch):
    def slow(*arguments):
        drawn = draw_latent(*arguments)
        (tmp_path / "out" / "000-a-hill-0.latent.safetensors").write_bytes(latent)  # by the other run
        return drawn

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(VAE, "decode", lambda *_: (_ for _ in ()).throw(MemoryError()))
        draw("--prompt", "a hill", "--cfg", 5, out="other")
    latent = next((tmp_path / "other").iterdir()).read_bytes()
    draw_latent = sample.sample
    monkeypatch.setattr(sample, "sample", slow)
    with pytest.raises(SystemExit, match="a-hill-0.latent.safetensors exists and was drawn with cfg '5.0', not '3.0'$"):
        draw("--prompt", "a hill")
    assert [path.read_bytes() for path in (tmp_path / "out").iterdir()] == [latent]


@BOTH
def test_without_guidance_by_a_second_pass_the_negative_prompt_is_not_encoded(draw, name, monkeypatch):
    text, given = {"tiny-sd3": SD3Text, "tiny-flux": FluxText}[name], []
    encode = text.encode
    monkeypatch.setattr(text, "encode", lambda text, prompts: given.append(prompts) or encode(text, prompts))
    draw("--prompt", "a hill", "--cfg", 1)
    assert given == [["a hill"]]


def test_recorded_factor_and_t5_length_are_used(says, folder, tmp_path):
    weights = open_weights(folder / "sd3.safetensors")
    save(tmp_path / "tuned.safetensors", {name: t.read() for name, t in weights.items()},
         RECORDED | {"factor": 8, "t5_length": 20})
    line, _ = says("--prompt", "a hill", "--transformer", tmp_path / "tuned.safetensors")
    assert "factor 8 (recorded)" in line and line.endswith("t5 length 20 (recorded)")
    line, _ = says("--prompt", "a hill", "--transformer", tmp_path / "tuned.safetensors", "--factor", 16, out="b")
    assert "factor 16 (given)" in line


@pytest.mark.parametrize("name", ["tiny-flux"])
@pytest.mark.parametrize("length", [1, 30])
def test_t5_length_is_that_of_the_context(draw, monkeypatch, length):
    lengths, forward = set(), Flux.forward
    monkeypatch.setattr(Flux, "forward", lambda self, z, sigma, context, *rest: lengths.add(context.shape[1]) or
                        forward(self, z, sigma, context, *rest))
    draw("--prompt", "a hill", "--t5-length", length)
    assert lengths == {length}


@pytest.mark.parametrize("name", ["tiny-flux"])
def test_a_vae_that_records_no_scale_takes_that_of_its_family(flux, tmp_path, monkeypatch, draw):
    shutil.copytree(flux, tmp_path / "model")
    tensors = {f"first_stage_model.{name}": t for name, t in load_file(flux / "ae.safetensors").items()}
    save(tmp_path / "model" / "ae.safetensors", tensors, {"norm_groups": GROUPS})
    used, decode = [], VAE.decode
    monkeypatch.setattr(VAE, "decode", lambda vae, *inputs: used.append((vae.scale_factor, vae.shift_factor)) or
                        decode(vae, *inputs))
    draw("--prompt", "a hill", weights=tmp_path / "model")
    assert used == [(0.3611, 0.1159)]


@pytest.mark.parametrize("name", ["tiny-flux"])
def test_each_side_of_flux_is_a_multiple_of_32(refusal):
    assert "--res 8192x4100: both sides must be multiples of 32" in refusal("--prompt", "a hill", "--res", "8192x4100")


@pytest.mark.parametrize("name", ["tiny-flux"])
@pytest.mark.parametrize("arguments, says", [
    (("--guidance", "nan"), "--guidance nan: give a number from 0"), (("--guidance", "-1"), "--guidance -1.0"),
    (("--guidance", "1001"), "--guidance 1001.0: give a number from 0 to 1,000"),
    (("--mu", "1", "--time-shift", "2"), "--mu 1 --time-shift 2: mu is the logarithm"),
    (("--mu", "nan"), "--mu nan: give the logarithm"), (("--mu", "1e9"), "--mu 1e+09: give the logarithm")])
def test_a_setting_out_of_range_is_refused_for_flux(refusal, no_loading, arguments, says):
    assert says in refusal("--prompt", "a hill", *arguments)


def test_guidance_is_refused_where_there_is_no_input_for_it(refusal, no_loading, flux, schnell):
    assert "--guidance 4: this is SD3, which has no guidance input; SD3 is guided by a second pass, --cfg" in refusal(
        "--prompt", "a hill", "--guidance", 4)
    assert "--guidance 3.5: this is Flux-schnell, which has no guidance input; Flux-schnell draws without" in refusal(
        "--prompt", "a hill", "--transformer", schnell, "--guidance", 3.5, weights=flux)


@pytest.mark.parametrize("model, repository", [("flux", "FLUX.1-dev"), ("flux-schnell", "FLUX.1-schnell")])
def test_flux_without_weights_is_refused_with_the_download_and_its_size(no_loading, model, repository):
    with pytest.raises(SystemExit) as end:
        sample.main(["--prompt", "a hill", "--model", model, "--device", "cpu"])
    assert f"hf download black-forest-labs/{repository} --exclude" in end.value.code and "\n" not in end.value.code
    assert f"models/{model} (34 GB: " in end.value.code


@pytest.mark.parametrize("file, content, says", [
    ("flux1-dev-Q4.gguf", b"GGUF\x03\0\0\0" + bytes(64), "a GGUF file"),
    ("flux.safetensors", b"GGUF\x03\0\0\0" + bytes(64), "looks like a GGUF file"),
    ("flux.safetensors", b"PK\x03\x04" + bytes(64), "looks like a zip archive or pickle"),
    ("flux.pt", b"PK\x03\x04" + bytes(64), "a pickle can run code")])
@pytest.mark.parametrize("name", ["tiny-flux"])
def test_gguf_and_pickles_are_refused_in_one_line(refusal, tmp_path, file, content, says):
    (tmp_path / file).write_bytes(content)
    message = refusal("--prompt", "a hill", "--transformer", tmp_path / file)
    assert file in message and says in message and "give the .safetensors of the same weights" in message


@pytest.mark.parametrize("name", ["tiny-flux"])
@pytest.mark.parametrize("gone", ["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
def test_a_missing_part_of_flux_is_named_with_the_download_that_has_it(refusal, broken, gone):
    shutil.rmtree(broken / gone)
    message = refusal("--prompt", "a hill", weights=broken)
    assert f"model/{gone}: " in message and "black-forest-labs/FLUX.1-dev" in message


@pytest.mark.parametrize("gone, says", [
    ("tokenizer", "tokenizer: no CLIP tokenizer"), ("tokenizer_2", "tokenizer_2: no CLIP tokenizer"),
    ("tokenizer_3", "no T5 tokenizer"),
    ("text_encoders/clip_l.safetensors", "clip_l.safetensors: not found"),
    ("text_encoders/clip_g.safetensors", "clip_g"),
    ("text_encoders/t5xxl_fp16.safetensors", "t5xxl_fp16.safetensors: not found"),
    ("text_encoders", "text_encoder: not found")])
def test_a_missing_part_is_named_with_the_download_that_has_it(refusal, broken, gone, says):
    shutil.rmtree(broken / gone) if (broken / gone).is_dir() else (broken / gone).unlink()
    message = refusal("--prompt", "a hill", weights=broken)
    assert says in message and "stabilityai/stable-diffusion-3-medium" in message


def damaged(how: str, file: Path) -> None:
    whole = file.read_bytes()
    tensors = load(whole)  # not mapped: the file is written over
    if how == "truncated":
        file.write_bytes(whole[:len(whole) * 2 // 3])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "web page":
        file.write_text("<!DOCTYPE html><html>Access to this model is restricted.</html>")
    elif how == "pickle":
        torch.save(tensors, file)
    elif how == "foreign":
        save(file, {"encoder.weight": torch.zeros(3, 3)}, {})
    elif how == "NaN":
        tensors["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"][3, 4] = float("nan")
        save(file, tensors, {"norm_groups": GROUPS})
    elif how == "one missing":
        del tensors["model.diffusion_model.t_embedder.mlp.2.bias"]
        save(file, tensors, {"norm_groups": GROUPS})
    elif how == "one unknown":
        save(file, tensors | {"model.diffusion_model.lora": torch.zeros(2)}, {"norm_groups": GROUPS})
    elif how == "one misshapen":
        save(file, tensors | {"model.diffusion_model.x_embedder.proj.bias": torch.zeros(2)}, {"norm_groups": GROUPS})
    elif how == "no VAE":
        save(file, {name: t for name, t in tensors.items() if name.startswith("model.")}, {})
    else:
        save(file, tensors, {"norm_groups": GROUPS, "steps": how})


@pytest.mark.parametrize("how, says", [
    ("truncated", "not a complete safetensors file"), ("empty", "not a complete safetensors file"),
    ("web page", "looks like a web page"),
    ("pickle", "looks like a zip archive or pickle"), ("foreign", "neither an SD3 nor a Flux transformer"),
    ("NaN", "qkv.weight holds NaN or Inf"), ("one missing", "t_embedder.mlp.2.bias"),
    ("one unknown", "1 unknown: lora"),
    ("one misshapen", "1 shapes differ: x_embedder.proj.bias"), ("no VAE", "1 missing: decoder.conv_"),
    ("many", "steps 'many', which is no integer; give --steps"), ("inf", "steps 'inf'")])
def test_a_damaged_model_file_is_refused_by_name(refusal, broken, how, says):
    damaged(how, broken / "sd3.safetensors")
    message = refusal("--prompt", "a hill", "--res", "64", weights=broken)
    assert "sd3.safetensors" in message and says in message


@pytest.mark.parametrize("prefix, lost", [("model.diffusion_model.", "t_embedder.mlp.2.bias"),
                                          ("first_stage_model.", "decoder.norm_out.bias")])
def test_a_tensor_that_is_missing_is_named_before_weights_are_loaded(refusal, no_loading, broken, prefix, lost):
    tensors = load((broken / "sd3.safetensors").read_bytes())
    del tensors[prefix + lost]
    save(broken / "sd3.safetensors", tensors, {"norm_groups": GROUPS})
    assert f"1 missing: {lost}" in refusal("--prompt", "a hill", weights=broken)


@pytest.mark.parametrize("name", ["tiny-flux"])
def test_a_vae_of_another_family_is_refused_before_weights_are_loaded(refusal, no_loading, broken):
    weights = open_weights(broken / "ae.safetensors")
    save(broken / "ae.safetensors", {name: t.read().clone() for name, t in weights.items()},
         {"norm_groups": GROUPS, "scale_factor": 1.5305, "shift_factor": 0.0609})
    assert "which are those of SD3's autoencoder" in refusal("--prompt", "a hill", weights=broken)


@pytest.mark.parametrize("part", ["clip_l", "clip_g", "t5xxl_fp16"])
def test_a_damaged_text_encoder_is_refused_by_name(refusal, broken, part):
    file = broken / "text_encoders" / f"{part}.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    assert f"{part}.safetensors: not a complete safetensors file" in refusal("--prompt", "a hill", weights=broken)


def test_a_pickle_is_never_opened_as_transformer(refusal, folder, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    for name in ("model.ckpt", "model.pt", "renamed.safetensors"):
        torch.save({"joint_blocks": Trap()}, tmp_path / name)
        message = refusal("--prompt", "a hill", "--transformer", tmp_path / name)
        assert f"{name}: " in message and "pickle" in message
    assert not (tmp_path / "sprung").exists()
    message = refusal("--prompt", "a hill", "--transformer", tmp_path / "nowhere.safetensors")
    assert "nowhere.safetensors: no such file" in message


@pytest.mark.parametrize("other, says", [({"context_dim": 48}, "context of width 32, but the transformer takes 48"),
                                         ({"pooled_dim": 24},
                                          "pooled vector of width 32, but the transformer takes 24"),
                                         ({"in_channels": 4, "out_channels": 4},
                                          "latents of width 16, but the transformer takes 4")])
def test_a_transformer_of_other_encoders_or_another_vae_is_refused(refusal, tmp_path, other, says):
    save(tmp_path / "other.safetensors", transformer_tensors(MMDiTConfig(**vars(TRANSFORMER) | other)), RECORDED)
    assert says in refusal("--prompt", "a hill", "--transformer", tmp_path / "other.safetensors")


def test_a_picture_that_overflows_is_refused(refusal):
    assert "became NaN or Inf" in refusal("--prompt", "a hill", "--cfg", "1e38")


def test_a_full_gpu_is_one_line(refusal, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n2 GiB")

    monkeypatch.setattr(sample, "draw", full)
    assert "out of GPU memory; give a smaller --memory, --store fp8 or a" in refusal("--prompt", "a hill")


def test_a_full_memory_is_one_line(refusal, monkeypatch):
    def full(*_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0.\nDefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(sample, "draw", full)
    assert refusal("--prompt", "a hill").startswith("error: out of memory; give a smaller --memory, --")


def test_what_a_killed_process_left_is_removed_and_never_a_picture(draw, tmp_path):
    draw("--prompt", "a hill")
    left = [tmp_path / "out" / name for name in (".000-a-hill-0.1.tmp.png", ".000-a-hill-0.latent.1.tmp.safetensors")]
    for file in left:
        file.write_bytes(b"half")
        os.utime(file, (0, 0))
    assert [path.name for path in draw("--prompt", "a hill")] == ["000-a-hill-0.png"]


# ---- the script

def test_it_starts_without_the_module_resource_and_without_docstrings(folder, tmp_path):
    flags = ["--prompt", "a hill", "--weights", str(folder), "--device", "cpu", "--out", str(tmp_path / "out")]
    start = ("import sys, types; sys.modules['resource'] = None; import machine.memory, sample; "
             f"machine.memory.sys = types.SimpleNamespace(platform='win32'); sample.main({flags!r})")
    done = subprocess.run([sys.executable, "-OO", "-c", start], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "peak 0.0 GiB" in done.stdout, done.stderr


def script(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "sample.py", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"COLUMNS": "200"})


def test_help_gives_units_and_defaults():
    shown = script("--help")
    assert shown.returncode == 0
    words = " ".join(shown.stdout.split())
    assert all(word in words for word in (
        "pixels", "PX", "WIDTHxHEIGHT", "else 1024)", "(SD3: 28,", "(SD3: 7.0,", "else SD3: 3.0,", "Flux-dev: 50,",
        "(default: tiny-sd3)", "partition trick (16)", "(default: 0)", "(default: 1)", "(default: out)", "fp32 on cpu",
        "--negative", "--transformer", "--prompts"))


def test_the_script_draws_with_a_progress_bar_and_refuses_without_a_traceback(folder, tmp_path):
    done = script("--prompt", "a hill", "--weights", folder, "--device", "cpu", "--out", tmp_path / "picture.png")
    assert done.returncode == 0, done.stderr
    settings, picture = done.stdout.splitlines()
    assert settings.startswith("SD3; ") and "res 64 (recorded)" in settings
    assert picture.startswith(f"{tmp_path / 'picture.png'}  ") and "s/step" in picture and "2/2" in done.stderr
    assert Image.open(tmp_path / "picture.png").size == (64, 64)
    failed = script("--prompt", "a hill", "--weights", folder, "--res", "100")
    assert failed.returncode == 1 and failed.stdout == ""
    assert failed.stderr.startswith("error: --res") and failed.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "models" / "tiny-sd3").is_dir(), reason="models/tiny-sd3 is not here")
def test_the_embedded_model_draws_1024_px(tmp_path):
    done = script("--prompt", "a red panda", "--res", "1024", "--steps", "2", "--device", "cpu", "--out",
                  tmp_path / "panda.png")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "panda.png") as picture:
        assert picture.size == (1024, 1024) and picture.text["steps"] == "2"
        assert max(high - low for low, high in picture.convert("RGB").getextrema()) > 20


# ---- several processes, dtypes, compilation

def test_ranks_share_the_pictures_and_draw_what_one_process_draws(draw, monkeypatch, tmp_path, capsys):
    alone = [path.read_bytes() for path in draw("--prompt", "a hill", "--count", 3)]
    shares = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        capsys.readouterr()
        draw("--prompt", "a hill", "--count", 3, out="shared")
        shares.append(capsys.readouterr().out.splitlines())
    assert [line.count("; transformer ") for lines in shares for line in lines[:1]] == [1, 0]  # the first rank says it
    assert [len(lines) for lines in shares] == [1 + 2, 1]
    assert [path.read_bytes() for path in sorted((tmp_path / "shared").iterdir())] == alone


def test_vae_dtype_changes_the_decoder_alone_and_is_recorded(draw):
    [fp32], [bf16] = draw("--prompt", "a hill"), draw("--prompt", "a hill", "--vae-dtype", "bf16", out="other")
    with Image.open(fp32) as first, Image.open(bf16) as second:
        difference = np.abs(np.array(first, int) - np.array(second, int))
        assert "vae_dtype" not in first.text and second.text["vae_dtype"] == "bf16" and second.text["dtype"] == "fp32"
    assert 0 < difference.max() <= 8


def test_compiled_blocks_draw_the_same_picture(draw, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    [plain], [compiled] = draw("--prompt", "a hill"), draw("--prompt", "a hill", "--compile", out="compiled")
    with Image.open(plain) as first, Image.open(compiled) as second:
        assert np.abs(np.array(first, int) - np.array(second, int)).max() <= 1


def test_ab2_draws_another_picture_and_is_recorded(draw, capsys):
    [euler], [ab2] = draw("--prompt", "a hill"), draw("--prompt", "a hill", "--solver", "ab2", out="other")
    assert "solver ab2" in capsys.readouterr().out
    with Image.open(euler) as first, Image.open(ab2) as second:
        assert "solver" not in first.text and second.text["solver"] == "ab2"
        assert not np.array_equal(np.array(first), np.array(second))
