"""Held-out loss: the same number on any number of ranks and after a restart; no training number changes by it."""

import json
import zlib

import pytest
import torch
from conftest import CAPTIONS, assert_same_run, copy_of, log_of, refusal_of, run_script, seeded
from PIL import Image

import train
from data import Pictures
from flow import sample_sigma
from mmdit import MMDiT
from training import heldout
from training.heldout import default_interval
from training.seeds import seed_of
from vae import VAE, to_image


@pytest.fixture
def held(photos, tmp_path):
    """Three of the four pictures under other names and without caches, mirrored: they are not the training ones."""
    folder = copy_of(photos, tmp_path / "held")
    rows = [{"file_name": f"held-{k}.png", "text": CAPTIONS[k]} for k in range(3)]
    for k in range(4):
        Image.open(folder / f"{k}.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / f"held-{k}.png")
        (folder / f"{k}.png").unlink()
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def held_out_of(out) -> list[dict]:
    return [json.loads(line) for line in (out / "held_out.jsonl").read_text().splitlines()]


def test_held_out_loss_is_logged_by_band_and_sigma_and_changes_nothing(settings, held, tmp_path):
    train.train(settings(out=tmp_path / "plain"))
    train.train(settings(out=tmp_path / "held-run", validate=held, validate_every=2))
    assert_same_weights(tmp_path / "plain", tmp_path / "held-run")
    rows = held_out_of(tmp_path / "held-run")
    assert [row["step"] for row in rows] == [0, 2, 4, 6] and {row["pictures"] for row in rows} == {3}
    for row in rows:
        assert sum(row[f"v_{band}"] for band in ("ll", "lh", "hl", "hh")) / 4 == pytest.approx(row["loss"], abs=2e-5)
        assert len(row["v_by_sigma"]) == 8 and min(row["v_by_sigma"]) <= row["loss"] <= max(row["v_by_sigma"])
    assert len({row["loss"] for row in rows}) == 4


def assert_same_weights(one, other):
    """As assert_same_run, but for the settings that the files record."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("conftest.metadata_of", lambda file: None)
        assert_same_run(one, other)


def test_held_out_loss_of_a_model_without_velocity_is_the_mean_square_of_the_data(settings, held, model, tmp_path,
                                                                                  monkeypatch):
    monkeypatch.setattr(MMDiT, "forward", lambda self, z, *_: 0 * z + 0 * self.y_embedder.mlp[0].bias.sum())
    for objective in ("paper", "snr_huber"):
        train.train(settings(validate=held, steps=1, lr=0.0, seed=3, objective=objective, out=tmp_path / objective))
    vae, squares = VAE.load(model / "sd3.safetensors"), []
    bins = (sample_sigma(100_000, "logit_normal", 3.0, generator=seeded(0)) * 8).long().clamp(max=7)
    shares = [(bins == k).double().mean().item() for k in range(8)]
    pictures = Pictures([held / f"held-{k}.png" for k in range(3)])
    for k in range(3):
        generator = torch.Generator().manual_seed(seed_of(3, zlib.crc32(f"held-{k}.png".encode())))
        image = to_image(torch.from_numpy(pictures.central_crop(k, 64, 64).copy()))[None]
        with torch.no_grad():
            latent = vae.draw(*vae.moments(image, 16, 2), generator)
        for share in shares:
            torch.rand(1, generator=generator)  # of sigma
            square = (torch.randn(latent.shape, generator=generator) - latent).square().mean().item()
            squares.append(share * square / 3)
    for objective in ("paper", "snr_huber"):
        rows = held_out_of(tmp_path / objective)
        assert [row["step"] for row in rows] == [0, 1]
        assert all(row["loss"] == pytest.approx(sum(squares), rel=1e-5) for row in rows)


def test_sigmas_of_a_picture_are_one_in_each_bin(settings, held, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(heldout, "interpolate", lambda latent, noise, sigma: seen.append(sigma) or latent)
    train.train(settings(validate=held, steps=1, validate_every=9))
    sigmas, bins = torch.cat(seen[:24]).reshape(3, 8), torch.arange(8)
    assert (sigmas >= bins / 8).all() and (sigmas <= (bins + 1) / 8).all() and len(set(sigmas.flatten().tolist())) == 24


def test_held_out_loss_is_the_same_on_two_ranks(settings, held, tmp_path):
    usual = dict(validate=held, steps=1, lr=0.0)
    train.train(settings(out=tmp_path / "one", **usual))
    done = run_script("train.py", *settings.flags(out=tmp_path / "two", **usual), ranks=2)
    assert done.returncode == 0, done.stderr
    assert held_out_of(tmp_path / "one") == held_out_of(tmp_path / "two")


def test_held_out_loss_of_trained_weights_is_the_same_after_a_restart(settings, held, tmp_path):
    usual = dict(validate=held, validate_every=1, save_every=2, lr=1e-2)
    train.train(settings(out=tmp_path / "one", steps=4, **usual))
    train.train(settings(out=tmp_path / "parts", steps=2, **usual))
    train.train(settings(out=tmp_path / "parts", steps=4, **usual))
    assert held_out_of(tmp_path / "one") == held_out_of(tmp_path / "parts")
    assert log_of(tmp_path / "one")[0]["step"] == 1


def test_default_interval_bounds_the_passes_per_trained_picture():
    for pictures, batch in ((3, 4), (195, 32), (8, 4)):
        steps = default_interval(pictures, batch)
        assert 8 * pictures / (steps * batch) == pytest.approx(1 / 15, rel=0.02)
    assert default_interval(1, 1000) == 1


def test_training_pictures_and_missing_folders_are_refused(settings, photos, tmp_path):
    for folder in (photos, copy_of(photos, tmp_path / "copied")):
        assert f"--validate {folder}: {folder}/0.png is in --data too" in refusal_of(settings, validate=folder)
    assert "nowhere/metadata.jsonl: not found" in refusal_of(settings, validate="nowhere")
    assert not (tmp_path / "out").exists()
