"""Post-training of a decoder: its terms, an unchanged encoder, what is written and who draws with it."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import log_of, metadata_of, seeded
from PIL import Image
from safetensors.torch import load_file, save_file

import sample
import train_vae
from checkpoint import locate
from data import Pictures
from family import find, vae_for
from models import redraw_latents
from training.decoder import GRID, HAAR, PERCEPTUAL, Redrawn, decoder_loss, given_vae, grid_error, step_profile
from vae import VAE, VAEConfig, to_image
from wavelet import haar_split

TINY = VAEConfig((8, 8, 16, 36), (8, 8, 16, 36), 1, 2, 16, 1)


@pytest.fixture
def vae() -> VAE:
    return train_vae.new_vae(TINY, seed=0).requires_grad_(False)


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 3, 64, 96, generator=seeded(0)).clamp(-1, 1)


@pytest.fixture
def post_train(folders, photos, tmp_path, monkeypatch):
    """post_train(flags): two steps on the decoder of tiny-sd3; the written file."""
    monkeypatch.setattr(train_vae, "CROPS", ((64, 32), (64, 64)))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)

    def run(*flags: object, out: str = "decoder", file: str = "vae_16.safetensors"):
        usual = ("--decoder-only", "--weights", folders / "tiny-sd3", "--data", photos, "--out", tmp_path / out,
                 "--steps", 2, "--warmup", 0, "--lr", 1e-3, "--pixels", 4096, "--holdout", 0, "--device", "cpu")
        train_vae.main([*map(str, (*usual, *flags))])
        return tmp_path / out / file
    return run


# ---- the loss

@pytest.mark.parametrize("factor, offset", [(16, 2), (16, 1), (8, 2)])
def test_loss_is_squared_error_high_bands_and_grid_of_the_decoded_mean(vae, image, factor, offset):
    error = (decoded := vae.decode(vae.encode(image, factor), factor, offset)) - image
    ll, *high = haar_split(error).split(3, dim=1)
    expected = error.square().mean() + HAAR * torch.cat(high, dim=1).abs().mean() + GRID * grid_error(decoded, image)
    assert decoder_loss(vae, image, factor, offset).item() == pytest.approx(expected.item(), rel=1e-5)
    with_lpips = decoder_loss(vae, image, factor, offset, lpips=lambda a, b: (a - b).abs().mean((1, 2, 3)))
    assert with_lpips.item() == pytest.approx((expected + PERCEPTUAL * error.abs().mean()).item(), rel=1e-5)


def test_profile_is_the_mean_log_step_by_place():
    image, expected = torch.rand(2, 3, 48, 80, generator=seeded(0)) * 2 - 1, np.zeros((2, 32))
    gray = 127.5 * (image.double().numpy().transpose(0, 2, 3, 1) @ [0.299, 0.587, 0.114])
    for row, steps in enumerate((np.diff(gray, axis=2), np.diff(gray, axis=1).transpose(0, 2, 1))):
        steps = np.log1p(np.abs(steps))
        expected[row] = [steps[..., place::32].mean((0, 1)).mean() for place in range(32)]
    np.testing.assert_allclose(step_profile(image).numpy(), expected, rtol=1e-5)
    assert torch.isfinite(step_profile(image[..., :16, :16])).all()


def test_a_grid_is_an_error_and_blur_alone_is_none():
    image = torch.rand(1, 3, 512, 512, generator=seeded(0)) * 0.2
    assert grid_error(image, image) == 0
    grid = image.clone()
    grid[..., ::16] += 0.05
    assert grid_error(grid, image) > 20 * grid_error(0.8 * image, image)


def test_teacher_of_the_same_weights_adds_nothing_at_factor_8_and_its_distance_at_16(vae, image):
    assert decoder_loss(vae, image, 8, 2, (1.0, vae.decoder)) == decoder_loss(vae, image, 8, 2)
    student, known = (vae.decoder.features(vae.moments(image, factor)[0]) for factor in (16, 8))
    nearest = student.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    more = decoder_loss(vae, image, 16, 2, (0.5, vae.decoder)) - decoder_loss(vae, image, 16, 2)
    assert more.item() == pytest.approx(0.5 * F.mse_loss(nearest, known).item(), rel=1e-4)


# ---- the run

def test_encoder_keeps_its_bytes_and_the_decoder_learns(post_train, folders):
    before = {name.removeprefix("first_stage_model."): tensor
              for name, tensor in load_file(locate(folders / "tiny-sd3")[1]).items() if "first_stage" in name}
    after, records = load_file(file := post_train()), metadata_of(file)
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name]) == name.startswith("encoder.") or not before[name].any()
    own = VAE.load(locate(folders / "tiny-sd3")[1])
    assert records["factor"] == "16" and records["offset"] == "2" and records["norm_groups"] == "1"
    assert (float(records["scale_factor"]), float(records["shift_factor"])) == (own.scale_factor, own.shift_factor)


def test_post_training_lowers_the_error_on_its_pictures(post_train, photos, tmp_path):
    post_train("--steps", 30, "--holdout", 1, "--save-every", 15, "--teacher", 0.1)
    first, last = log_of(tmp_path / "decoder")
    assert last["loss"] < first["loss"] and "psnr_f16_db" in last and "psnr_f8_db" not in last


def test_every_second_step_decodes_what_a_model_drew(post_train, folders, photos, tmp_path, monkeypatch):
    redraw_latents.main(["--data", str(photos), "--weights", str(folders / "tiny-sd3"), "--res", "64", "--out",
                         str(tmp_path / "redrawn")])
    latents = load_file(tmp_path / "redrawn" / "tiny-sd3.safetensors")
    assert len(latents) == 4 * len(redraw_latents.SIGMAS) and latents["0.png at 0.5"].shape == (16, 4, 4)
    original, decoded = train_vae.decoder_loss, []
    monkeypatch.setattr(train_vae, "decoder_loss",
                        lambda *args: decoded.append(args[-1]) or original(*args))
    post_train("--redrawn", tmp_path / "redrawn", "--steps", 4, "--pixels", 1024)
    assert [raw is None for raw in decoded] == [True, False, True, False] and decoded[1].shape == (1, 16, 2, 2)
    moved = (tmp_path / "redrawn").rename(tmp_path / "moved")
    post_train("--redrawn", moved, "--steps", 4, "--pixels", 1024)
    save_file({name: latent + 1 for name, latent in latents.items()}, moved / "tiny-sd3.safetensors")
    with pytest.raises(SystemExit, match=r"other settings \(latents "):
        post_train("--redrawn", moved, "--steps", 4, "--pixels", 1024)
    with pytest.raises(SystemExit, match="has no latents of the pictures to train on"):
        post_train("--redrawn", photos, out="other")


def test_a_window_of_a_redrawn_latent_shows_its_part_of_the_picture(vae, photos, tmp_path):
    """Latents that were not redrawn at all: those of the pictures themselves, encoded at factor 16."""
    pictures = Pictures(sorted(photos.glob("*.png"))[1:])
    known = [to_image(pictures.central_crop(k, 64, 32)) for k in range(3)]
    save_file({f"{path.name} at 0": vae.moments(image[None])[0][0] for path, image in zip(
        pictures.paths, known, strict=True)} | {"0.png at 0": torch.zeros(16, 4, 2)}, tmp_path / "a.safetensors")
    redrawn, places = Redrawn(tmp_path, pictures.paths, pictures.central_crop), set()
    for seed in range(40):
        raw, image = redrawn.window(16 * 16, seeded(seed))
        assert raw.shape == (1, 16, 1, 1) and image.shape == (1, 3, 16, 16)
        k, y, x = next((k, y, x) for k in range(3) for y in range(4) for x in range(2)
                       if torch.equal(image[0], known[k][:, 16 * y:16 * y + 16, 16 * x:16 * x + 16]))
        assert torch.equal(raw[0, :, 0, 0], vae.moments(known[k][None])[0][0, :, y, x])
        places.add((k, y, x))
    assert len(places) > 12


def test_interrupted_post_training_resumes_bit_for_bit(post_train, tmp_path, monkeypatch):
    whole = load_file(post_train("--steps", 4, "--save-every", 2, out="whole"))
    original = train_vae.save_state

    def die_after_two(path, vae, optimizer, step, decisive):
        original(path, vae, optimizer, step, decisive)
        if step == 2:
            raise KeyboardInterrupt
    monkeypatch.setattr(train_vae, "save_state", die_after_two)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        post_train("--steps", 4, "--save-every", 2)
    monkeypatch.setattr(train_vae, "save_state", original)
    again = load_file(post_train("--steps", 4, "--save-every", 2))
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("flags, says", [
    (("--widths", "8,8,16,36"), "--widths 8,8,16,36: give it without --decoder-only"),
    (("--teacher", "-1"), "--teacher -1.0: give 0 or more"),
    (("--redrawn", "redrawn", "--factor", "8"), "--redrawn redrawn: give it with --factor 16"),
    (("--lpips", "nowhere"), "vgg16")])
def test_what_does_not_fit_post_training_is_refused(post_train, flags, says):
    with pytest.raises(SystemExit, match=says):
        post_train(*flags)


def test_a_run_inside_the_folder_of_its_weights_is_refused(post_train, folders):
    with pytest.raises(SystemExit, match="give a folder outside of"):
        post_train("--out", folders / "tiny-sd3" / "run")


@pytest.mark.parametrize("flags, says", [
    (("--factor", "8"), "--factor 8: give it with --decoder-only"),
    (("--decoder-only",), "--decoder-only alone: give --weights too")])
def test_flags_of_post_training_need_it_and_it_needs_weights(photos, tmp_path, flags, says):
    with pytest.raises(SystemExit, match=says):
        train_vae.main(["--data", str(photos), "--out", str(tmp_path / "out"), *flags])


# ---- who draws with it

@pytest.mark.parametrize("factor", [8, 16])
def test_a_model_folder_draws_with_it_at_factor_16_only(post_train, folders, tmp_path, factor, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    for entry in (folders / "tiny-sd3").iterdir():
        (folder / entry.name).symlink_to(entry)
    own = find(folder)[2]
    assert vae_for(folder, own, factor) == own
    (folder / "vae_16.safetensors").symlink_to(post_train())
    assert vae_for(folder, own, factor).name == ("vae_16.safetensors" if factor == 16 else own.name)
    capsys.readouterr()
    sample.main(["--weights", str(folder), "--prompt", "snow", "--res", "64", "--steps", "1", "--device", "cpu",
                 "--factor", str(factor), "--out", str(tmp_path / "a.png")])
    assert ("vae_16" in capsys.readouterr().out) == (factor == 16)


def test_a_decoder_of_other_latents_is_refused(post_train, folders, tmp_path):
    tensors, records = load_file(file := post_train()), metadata_of(file)
    tensors["encoder.conv_out.weight"] *= 1.01
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(tensors, folder / "vae_16.safetensors", records)
    with pytest.raises(ValueError, match="its encoder is not that of"):
        vae_for(folder, locate(folders / "tiny-sd3")[1], 16)


def test_recorded_offset_is_that_of_decode_and_a_flag_overrides_it(post_train, folders, tmp_path):
    file = post_train("--offset", 1)
    loaded = VAE.load(file)
    latent = torch.randn(1, 16, 4, 4, generator=seeded(1))
    with torch.no_grad():
        assert torch.equal(loaded.decode(latent), loaded.decode(latent, offset=1))
        assert torch.equal(VAE.load(file, offset=2).decode(latent), loaded.decode(latent, offset=2))
    pictures = []
    for flags in ((), ("--offset", "1"), ("--offset", "2")):
        out = tmp_path / f"{len(pictures)}.png"
        sample.main(["--weights", str(folders / "tiny-sd3"), "--vae", str(file), "--prompt", "snow", "--res", "64",
                     "--steps", "1", "--device", "cpu", "--out", str(out), *flags])
        with Image.open(out) as picture:
            pictures.append(np.array(picture))
    assert np.array_equal(pictures[0], pictures[1]) and not np.array_equal(pictures[0], pictures[2])
    save_file(load_file(file), tmp_path / "odd.safetensors", metadata_of(file) | {"offset": "3"})
    with pytest.raises(ValueError, match="records offset 3; it is 1 or 2"):
        VAE.load(tmp_path / "odd.safetensors")


@pytest.mark.parametrize("name", ["tiny-sd3", "tiny-flux"])
def test_given_vae_is_that_of_a_folder_or_of_a_file(folders, name):
    of_folder, stored = given_vae(folders / name)
    of_file, _ = given_vae(locate(folders / name)[1])
    assert of_folder.scale_factor == of_file.scale_factor and json.dumps(sorted(stored)) == json.dumps(
        sorted(of_file.state_dict()))
    assert not any(p.requires_grad for p in of_folder.encoder.parameters())
