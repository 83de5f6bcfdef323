"""SD3 and Flux through the same commands: who is who, Flux's defaults, drawing, training, and what each refuses of the other."""

import json
import math
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import CAPTIONS, seeded
from golden import diffusers_names, published
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import data
import sample
import train
from checkpoint import LazyTensor, Weights, locate, open_weights, save
from data import Embeddings, read_folder
from family import FLUX_DEV, FLUX_SCHNELL, SD3, family_of, find
from flow import flux_mu, flux_sigmas
from flux import Flux, FluxConfig, new_flux
from mmdit import MMDiTConfig, new_mmdit
from models import make_tiny
from text import FluxText, SD3Text
from vae import VAE

CONFIG = FluxConfig(hidden_size=64, depth=1, depth_single=1, head_dim=32, context_dim=192, pooled_dim=64, mlp_hidden=128,
                    axes_dim=(4, 14, 14))


def flux_tensors(config: FluxConfig = CONFIG, begun: bool = True) -> dict[str, torch.Tensor]:
    """A transformer in which every input matters: a fresh one begins as the identity and predicts 0."""
    model, generator = new_flux(config, seeded(0)), seeded(1)
    for name, parameter in model.named_parameters() if begun else ():
        if "_mod." in name or ".modulation." in name or name.startswith("final_layer"):
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
        elif name.startswith(("time_in", "vector_in", "guidance_in")):
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return model.state_dict()


@pytest.fixture(scope="module")
def made(folders, tmp_path_factory):
    """tiny-sd3 and tiny-flux as models/make_tiny.py makes them, with smaller transformers."""
    root = tmp_path_factory.mktemp("models") / "made"
    shutil.copytree(folders, root, symlinks=True)
    assert Flux.load(root / "tiny-flux" / "flux.safetensors").config.axes_dim == (8, 28, 28)
    vae = open_weights(root / "vae.safetensors")
    mmdit = new_mmdit(MMDiTConfig(64, 1, context_dim=192, pooled_dim=192, table_side=16, mlp_hidden=128), seeded(0))
    save(root / "tiny-sd3" / "sd3.safetensors", {f"model.diffusion_model.{name}": t for name, t in mmdit.state_dict().items()}
         | {f"first_stage_model.{name}": t.read() for name, t in vae.items()}, vae.metadata | {"steps": 2, "res": 64})
    save(root / "tiny-flux" / "flux.safetensors", flux_tensors(), {"steps": 2, "res": 64})
    return root


@pytest.fixture(scope="module")
def folder(made) -> Path:
    return made / "tiny-flux"


@pytest.fixture(scope="module")
def schnell(folder, tmp_path_factory) -> Path:
    """A transformer without guidance_in, for the same folder."""
    file = tmp_path_factory.mktemp("schnell") / "flux1-schnell.safetensors"
    save(file, {name: t for name, t in flux_tensors().items() if not name.startswith("guidance_in")}, {})
    return file


@pytest.fixture
def draw(folder, tmp_path, monkeypatch):
    def draw(*arguments, out="out", weights=None, prompt=CAPTIONS[0]) -> Path:
        told = ["--weights", weights or folder, "--device", "cpu", "--prompt", prompt, "--out", tmp_path / f"{out}.png"]
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, (*told, *arguments))])
        sample.main()
        return tmp_path / f"{out}.png"

    return draw


@pytest.fixture
def settled(draw, monkeypatch):
    """The settings and the schedule that a command line comes to, without drawing."""
    def settled(*arguments) -> dict:
        kept = {}

        def instead(pictures, args, encoded, model, vae, sigmas):
            kept.update(vars(args), sigmas=sigmas, context=encoded[CAPTIONS[0]][0])
            return iter(())

        with monkeypatch.context() as patch:
            patch.setattr(sample, "draw", instead)
            draw(*arguments)
        return kept

    return settled


@pytest.fixture
def refusal(draw):
    def refusal(*arguments, weights=None) -> str:
        with pytest.raises(SystemExit) as end:
            draw(*arguments, weights=weights)
        assert isinstance(end.value.code, str) and end.value.code.startswith("error: ") and "\n" not in end.value.code
        return end.value.code

    return refusal


@pytest.fixture
def training(photos, folder, tmp_path, monkeypatch):
    """training(steps=2, ...): run train.py on the four pictures; the folder it wrote."""
    def training(out="run", **changed) -> Path:
        usual = dict(weights=folder, data=photos, out=tmp_path / out, res=64, batch=4, steps=4, lr=1e-3, save_every=2, log_every=1,
                     threads=1, device="cpu", dtype="fp32", save_dtype="fp32")
        given = [(f"--{key.replace('_', '-')}", value) for key, value in (usual | changed).items()]
        monkeypatch.setattr(sys, "argv", ["train.py", *(flag if value is True else f"{flag}={value}" for flag, value in given)])
        train.main()
        return tmp_path / out

    return training


def pixels(path: Path) -> bytes:
    with Image.open(path) as picture:
        return picture.tobytes()


def metadata_of(file: Path) -> dict:
    with safe_open(file, framework="pt") as handle:
        return handle.metadata()


def named(names) -> Weights:
    return Weights({name: LazyTensor((1,), None) for name in names}, {}, "a file")


# ---- who is who

@pytest.mark.parametrize("file, family", [("sd3_medium", SD3), ("sd3.5_medium", SD3), ("sd3.5_large", SD3), ("flux1-dev", FLUX_DEV),
                                          ("flux1-schnell", FLUX_SCHNELL)])
def test_family_is_told_by_the_published_names(file, family):
    assert family_of(named(published(file))) is family


@pytest.mark.parametrize("file", ["ae", "clip_l", "t5xxl"])
def test_what_is_no_transformer_is_named(file):
    with pytest.raises(ValueError, match="a file: holds neither an SD3 nor a Flux transformer, but [0-9]+ tensors: "):
        family_of(named(published(file)))


@pytest.mark.parametrize("name", ["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",
                                  "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
                                  "double_blocks.0.processor.qkv_lora1.down.weight"])
def test_a_lora_is_refused_by_its_name(name, refusal, tmp_path):
    save(tmp_path / "style.safetensors", {name: torch.zeros(2, 2), "double_blocks.0.img_attn.norm.key_norm.scale": torch.ones(2)}, {})
    assert "style.safetensors: a LoRA" in (message := refusal("--transformer", tmp_path / "style.safetensors")) and "merge it" in message


def test_find_gives_family_weights_and_vae_of_a_folder(made, folder, schnell):
    family, weights, vae = find(folder)
    assert (family, weights.source, vae) == (FLUX_DEV, str(folder / "flux.safetensors"), folder / "ae.safetensors")
    assert find(folder, schnell)[0] is FLUX_SCHNELL
    family, _, vae = find(made / "tiny-sd3")
    assert (family, vae) == (SD3, made / "tiny-sd3" / "sd3.safetensors")


# ---- layouts of a Flux folder

def test_what_both_tiny_folders_share_is_stored_once(made, folder):
    shared = [folder / "text_encoder" / "model.safetensors", folder / "text_encoder_2" / "model.safetensors",
              folder / "tokenizer" / "vocab.json", folder / "tokenizer_2" / "spiece.model"]
    assert all(made / "tiny-sd3" in file.resolve().parents for file in shared)
    links = [path for path in folder.rglob("*") if path.is_symlink()]
    assert len(links) == 4 and all(not Path(link.readlink()).is_absolute() for link in links)


def test_autoencoder_of_the_folder_has_official_names_and_its_own_normalisation(folder, made):
    assert {name.split(".")[0] for name in load_file(folder / "ae.safetensors")} == {"encoder", "decoder"}
    ours, whole = VAE.load(folder / "ae.safetensors"), VAE.load(made / "tiny-sd3" / "sd3.safetensors")
    assert (ours.scale_factor, ours.shift_factor) == (whole.scale_factor, whole.shift_factor)


@pytest.fixture(scope="module")
def diffusers_folder(folder, tmp_path_factory) -> Path:
    """The same weights in the layout of diffusers."""
    other = tmp_path_factory.mktemp("diffusers")
    for part, file, config in (("transformer", "flux.safetensors", {"axes_dims_rope": [4, 14, 14], "guidance_embeds": True}),
                               ("vae", "ae.safetensors", {})):
        (other / part).mkdir()
        weights = open_weights(folder / file)
        if part == "vae":
            said = weights.metadata
            config = {"norm_num_groups": 1, "scaling_factor": float(said["scale_factor"]), "shift_factor": float(said["shift_factor"])}
        (other / part / "config.json").write_text(json.dumps(config))
        tensors = {name: t.contiguous() for name, t in diffusers_names({name: t.read() for name, t in weights.items()}).items()}
        save(other / part / "diffusion_pytorch_model.safetensors", tensors, {"format": "pt"})
    for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.copytree(folder / part, other / part)
    return other


def test_both_layouts_of_the_same_weights_draw_the_same_picture(draw, diffusers_folder):
    settings = ("--res", 64, "--steps", 2)
    assert pixels(draw(*settings, out="a")) == pixels(draw(*settings, out="b", weights=diffusers_folder))


def test_download_without_the_parts_for_diffusers_keeps_their_empty_folders(folder, diffusers_folder, tmp_path):
    """hf download --exclude '*/diffusion_pytorch_model*' leaves transformer/config.json and vae/config.json."""
    shutil.copytree(folder, tmp_path / "flux")
    for part in ("transformer", "vae"):
        (tmp_path / "flux" / part).mkdir()
        shutil.copy(diffusers_folder / part / "config.json", tmp_path / "flux" / part)
    assert locate(tmp_path / "flux") == (tmp_path / "flux" / "flux.safetensors", tmp_path / "flux" / "ae.safetensors")
    for part in ("transformer", "vae"):
        shutil.copytree(diffusers_folder / part, tmp_path / "flux" / part, dirs_exist_ok=True)
    assert locate(tmp_path / "flux") == (tmp_path / "flux" / "transformer", tmp_path / "flux" / "vae")


def test_folder_without_its_autoencoder_or_with_two_models_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "flux")
    (tmp_path / "flux" / "ae.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="ae.safetensors: not found; .*black-forest-labs/FLUX.1-dev has it"):
        locate(tmp_path / "flux")
    (tmp_path / "flux" / "sd3_medium.safetensors").touch()
    with pytest.raises(ValueError, match="several files could be the model .flux.safetensors, sd3_medium.safetensors"):
        locate(tmp_path / "flux")


# ---- text

def test_flux_text_is_t5_and_the_unprojected_vector_of_clip(folder):
    text = FluxText.load(folder)
    context, pooled = text.encode([CAPTIONS[0], ""])
    assert context.shape == (2, make_tiny.T5_LENGTH, 192) and pooled.shape == (2, 64)  # the length is what the T5 file says
    tokens = text.tokenizers[0]([CAPTIONS[0], ""], text.clip.length)
    assert torch.equal(pooled, text.clip.at_eos(text.clip(tokens)[0], tokens))
    assert torch.equal(context, text.t5(text.tokenizers[1]([CAPTIONS[0], ""], make_tiny.T5_LENGTH)))
    assert FluxText.load(folder, t5_length=256).encode(["x"])[0].shape[1] == 256
    assert FluxText.load(folder, t5_length=512, dtype=torch.bfloat16).encode(["x"])[0].dtype is torch.bfloat16


@pytest.mark.parametrize("length", [513, -1])
def test_t5_lengths_that_flux_does_not_take_are_refused(folder, length):
    with pytest.raises(ValueError, match=f"T5 length {length}: give 1 to 512 tokens"):
        FluxText.load(folder, t5_length=length)


def test_t5_length_over_512_in_the_file_is_refused(folder, refusal, tmp_path):
    shutil.copytree(folder, tmp_path / "flux")
    t5 = open_weights(folder / "text_encoder_2")
    save(tmp_path / "flux" / "text_encoder_2" / "model.safetensors", {name: t.read() for name, t in t5.items()},
         t5.metadata | {"length": 600})
    assert "T5 length 600: give 1 to 512 tokens" in refusal(weights=tmp_path / "flux")


def test_folders_of_transformers_give_their_numbers(folder, tmp_path):
    """CLIP and a sharded T5 as save_pretrained writes them."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel
    vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    words, eos = len(vocabulary), vocabulary["<|endoftext|>"]
    torch.manual_seed(0)
    clip = CLIPTextModel(CLIPTextConfig(vocab_size=words, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3,
                                        max_position_embeddings=20, hidden_act="quick_gelu", eos_token_id=eos, bos_token_id=eos - 1)).eval()
    t5 = T5EncoderModel(T5Config(vocab_size=1400, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4,
                                 feed_forward_proj="gated-gelu")).eval()
    clip.save_pretrained(tmp_path / "text_encoder")
    t5.save_pretrained(tmp_path / "text_encoder_2", max_shard_size="200KB")
    assert len(list((tmp_path / "text_encoder_2").glob("*.safetensors"))) > 1
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(folder / name, tmp_path / name)
    text = FluxText.load(tmp_path, t5_length=30)
    context, pooled = text.encode(CAPTIONS[:2])
    with torch.no_grad():
        expected = t5(input_ids=text.tokenizers[1](CAPTIONS[:2], 30)).last_hidden_state
        vector = clip(input_ids=text.tokenizers[0](CAPTIONS[:2], 20)).pooler_output
    assert (context - expected).abs().max() < 1e-5 and (pooled - vector).abs().max() < 1e-5


@pytest.mark.parametrize("lost", ["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
def test_missing_part_is_named_with_the_download_that_has_it(folder, refusal, tmp_path, lost):
    shutil.copytree(folder, tmp_path / "flux")
    shutil.rmtree(tmp_path / "flux" / lost)
    message = refusal(weights=tmp_path / "flux")
    assert f"flux/{lost}: " in message and "black-forest-labs/FLUX.1-dev" in message


# ---- drawing

def test_defaults_of_dev(settled, folder, tmp_path):
    save(tmp_path / "plain.safetensors", flux_tensors(), {})
    args = settled("--transformer", tmp_path / "plain.safetensors", "--res", "128x64")
    assert {name: args[name] for name in ("steps", "cfg", "guidance", "res")} == {"steps": 50, "cfg": 1, "guidance": 3.5, "res": (128, 64)}
    assert torch.allclose(args["sigmas"], flux_sigmas(50, tokens=8)) and args["time_shift"] == math.exp(flux_mu(8))
    assert settled("--transformer", tmp_path / "plain.safetensors")["res"] == (1024, 1024)


def test_defaults_of_schnell(settled, schnell):
    args = settled("--transformer", schnell)
    assert {name: args[name] for name in ("steps", "cfg", "guidance", "time_shift")} == {
        "steps": 4, "cfg": 1, "guidance": None, "time_shift": 1}
    assert args["sigmas"].tolist() == [1, 0.75, 0.5, 0.25, 0] and args["context"].shape[1] == 256


def test_metadata_wins_over_the_family_and_the_command_line_over_both(settled, tmp_path):
    save(tmp_path / "small.safetensors", flux_tensors(), {"steps": 7, "guidance": 2, "time_shift": 3, "res": 96, "cfg": 2})
    args = settled("--transformer", tmp_path / "small.safetensors")
    assert [args[name] for name in ("steps", "guidance", "time_shift", "res", "cfg")] == [7, 2, 3, (96, 96), 2]
    args = settled("--transformer", tmp_path / "small.safetensors", "--steps", 3, "--guidance", 5, "--mu", 0.5, "--res", 64, "--cfg", 1)
    assert [args[name] for name in ("steps", "guidance", "time_shift", "res", "cfg")] == [3, 5, math.exp(0.5), (64, 64), 1]


@pytest.mark.parametrize("changed", [("--guidance", 6), ("--mu", 2), ("--steps", 3), ("--seed", 1), ("--factor", 8), ("--cfg", 3)])
def test_every_setting_matters(draw, changed):
    assert pixels(draw(out="a")) != pixels(draw(*changed, out="b"))


def test_the_prompt_matters(draw):
    assert pixels(draw(out="a")) != pixels(draw(out="b", prompt=CAPTIONS[1]))


def test_same_seed_gives_the_same_bytes_and_the_metadata_says_the_guidance(draw):
    one, again = draw("--res", "96x64", out="a"), draw("--res", "96x64", out="b")
    assert one.read_bytes() == again.read_bytes() and Image.open(one).size == (96, 64)
    assert Image.open(one).text["guidance"] == "3.5" and Image.open(one).text["model"].endswith("flux.safetensors")


def test_no_side_is_too_long_but_each_is_a_multiple_of_32(settled, refusal):
    assert settled("--res", "8192x4096")["res"] == (8192, 4096)
    assert "--res 8192x4100: both sides must be multiples of 32" in refusal("--res", "8192x4100")


# ---- refusals

def test_flux_without_weights_answers_at_once_with_the_download_and_the_sizes(monkeypatch):
    for name, repository in (("flux", "FLUX.1-dev"), ("flux-schnell", "FLUX.1-schnell")):
        for script, arguments in ((sample, ["--prompt", "a hill"]), (train, ["--data", "nowhere"])):
            monkeypatch.setattr(sys, "argv", ["x", "--model", name, "--device", "cpu", *arguments])
            began = time.time()
            with pytest.raises(SystemExit) as end:
                script.main()
            assert f"hf download black-forest-labs/{repository} --exclude" in end.value.code and f"models/{name} (34 GB: " in end.value.code
            assert "\n" not in end.value.code and time.time() - began < 1


@pytest.mark.parametrize("arguments, says", [
    (("--guidance", "nan"), "--guidance nan: give a number from 0"), (("--guidance", "-1"), "--guidance -1.0"),
    (("--mu", "1", "--time-shift", "2"), "--mu 1 --time-shift 2: mu is the logarithm"), (("--mu", "nan"), "--mu nan: give the logarithm"),
    (("--mu", "1e9"), "--mu 1e+09: give the logarithm")])
def test_settings_out_of_range_are_refused(refusal, arguments, says):
    assert says in refusal(*arguments)


def test_guidance_is_refused_where_there_is_no_input_for_it(refusal, made, schnell, training):
    assert "--guidance 3.5: this is Flux-schnell, which has no guidance input" in refusal("--transformer", schnell, "--guidance", 3.5)
    assert "--guidance 4: this is SD3, which has no guidance input; SD3 is guided by a second pass, --cfg" in refusal(
        "--guidance", 4, weights=made / "tiny-sd3")
    with pytest.raises(SystemExit, match="--guidance 3.5: this is Flux-schnell"):
        training(transformer=schnell, guidance=3.5)


def test_a_transformer_of_the_other_family_is_refused(refusal, made, folder, training):
    sd3 = made / "tiny-sd3"
    assert "sd3.safetensors: is a transformer of SD3, and " in (message := refusal("--transformer", sd3 / "sd3.safetensors"))
    assert "is a folder of Flux-dev, with other text encoders; give --weights a folder of SD3" in message
    assert "flux.safetensors: is a transformer of Flux-dev, and " in refusal("--transformer", folder / "flux.safetensors", weights=sd3)
    with pytest.raises(SystemExit, match="is a transformer of SD3"):
        training(transformer=sd3 / "sd3.safetensors")


def test_a_file_of_the_other_family_under_the_wrong_name_is_refused(refusal, made, folder, tmp_path):
    for own, file, other in (("tiny-flux", "flux.safetensors", "tiny-sd3/sd3.safetensors"),
                             ("tiny-sd3", "sd3.safetensors", "tiny-flux/flux.safetensors")):
        shutil.copytree(made / own, tmp_path / own)
        shutil.copy(made / other, tmp_path / own / file)
    for own, held in (("tiny-flux", "SD3"), ("tiny-sd3", "Flux-dev")):
        assert f"holds {held} weights, which its name denies" in refusal(weights=tmp_path / own)


@pytest.mark.parametrize("name, content, says", [
    ("flux1-dev-Q4.gguf", b"GGUF\x03\0\0\0" + bytes(64), "looks like a GGUF file"),
    ("flux.safetensors", b"GGUF\x03\0\0\0" + bytes(64), "looks like a GGUF file"),
    ("flux.safetensors", b"PK\x03\x04" + bytes(64), "looks like a zip archive or pickle"),
    ("flux.pt", b"PK\x03\x04" + bytes(64), "a pickle can run code")])
def test_gguf_and_pickles_are_refused_in_one_line(refusal, tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    message = refusal("--transformer", tmp_path / name)
    assert name in message and says in message and "give the .safetensors of the same weights" in message


# ---- training

def test_written_file_has_official_names_alone_and_says_how_to_draw(training, folder):
    run = training(steps=2)
    written, before = run / "flux.safetensors", load_file(folder / "flux.safetensors")
    assert {name: t.shape for name, t in load_file(written).items()} == {name: t.shape for name, t in before.items()}
    said = metadata_of(written)
    assert {key: said[key] for key in ("steps", "res", "factor", "axes_dim")} == {
        "steps": "2", "res": "64", "factor": "16", "axes_dim": "4, 14, 14"}
    assert "scale_factor" not in said
    settings = json.loads(said["training"])
    assert (settings["density"], settings["time_shift"], settings["guidance"]) == ("uniform", 1.0, 3.5)


def test_written_file_draws(training, draw):
    run = training(steps=2)
    assert Image.open(draw("--transformer", run / "flux.safetensors", "--steps", 1)).size == (64, 64)


def test_sigma_in_training_may_be_drawn_otherwise(training):
    settings = json.loads((training(steps=1, density="logit_normal", time_shift="tokens") / "settings.json").read_text())
    assert settings["density"] == "logit_normal" and settings["time_shift"] == math.exp(flux_mu(4))
    assert json.loads((training("b", steps=1, time_shift=6) / "settings.json").read_text())["time_shift"] == 6


def test_guidance_is_fed_as_a_number_an_image_and_not_to_schnell(training, schnell, monkeypatch):
    fed, forward = [], Flux.forward

    def heard(self, *inputs):
        if not inputs[0].is_meta:  # train.py counts its operations on meta
            fed.append(inputs[4])
        return forward(self, *inputs)

    monkeypatch.setattr(Flux, "forward", heard)
    training(steps=1)
    training("five", steps=1, guidance=5)
    training("none", steps=1, transformer=schnell)
    assert fed[0].tolist() == [3.5] * 4 and fed[1].tolist() == [5] * 4 and fed[2] is None


def test_run_broken_off_and_resumed_equals_an_uninterrupted_one(training, monkeypatch):
    whole, calls, formula = training("whole", ema=0.9), [], train.objective

    def broken_off(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError
        return formula(*arguments)

    monkeypatch.setattr(train, "objective", broken_off)
    with pytest.raises(RuntimeError):
        training("parts", ema=0.9)
    parts = training("parts", ema=0.9)
    a, b = load_file(whole / "flux.safetensors"), load_file(parts / "flux.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert metadata_of(whole / "flux.safetensors") == metadata_of(parts / "flux.safetensors")


def test_one_batch_of_four_pictures_is_learnt_by_heart(training, folder, tmp_path, monkeypatch):
    class SameDraws(torch.Generator):
        def manual_seed(self, seed: int) -> torch.Generator:
            return super().manual_seed(3)  # draws all four pictures

    save(tmp_path / "new.safetensors", flux_tensors(begun=False), {})
    monkeypatch.setattr(torch, "Generator", SameDraws)
    run = training(steps=80, lr=4e-3, save_every=80, transformer=tmp_path / "new.safetensors", bands="1,2,2,4")
    loss = [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]
    print(f"loss {loss[0]:.2f} -> {loss[-1]:.4f}")
    assert loss[0] > 1.5 and max(loss[-5:]) < 0.02


def test_data_encodes_with_the_encoders_of_flux(photos, folder, made, monkeypatch, capsys, tmp_path):
    shutil.copytree(photos, tmp_path / "photos", ignore=shutil.ignore_patterns(".embeddings"))
    monkeypatch.setattr(sys, "argv", ["data.py", "encode", str(tmp_path / "photos"), "--weights", str(folder), "--device", "cpu"])
    data.main()
    assert capsys.readouterr().out.startswith("5 captions encoded")
    monkeypatch.setattr(FluxText, "load", None)
    embeddings = Embeddings(tmp_path / "photos" / ".embeddings", folder, family=FLUX_DEV)
    context, pooled = embeddings.read([item.captions[0] for item in read_folder(photos)])
    assert context.shape == (4, make_tiny.T5_LENGTH, 192) and pooled.shape == (4, 64)
    caches = {Embeddings(tmp_path, model, family=family).cache
              for model, family in ((folder, FLUX_DEV), (folder, FLUX_SCHNELL), (made / "tiny-sd3", SD3))}
    assert len(caches) == 3 and SD3.text is SD3Text
