"""The caches of training: each embedding and latent is computed once; one made from other inputs is never read."""

import hashlib
import os
import shutil

import pytest
import torch
from conftest import CAPTIONS

from data import Pictures
from family import FLUX_DEV, FLUX_SCHNELL, SD3
from models import make_tiny
from text import FluxText, SD3Text
from train_vae import new_vae
from training.cache import Embeddings, Latents
from vae import VAEConfig, to_image


@pytest.fixture
def own_model(model, tmp_path):
    """A copy of the encoders and tokenizers, which a test may change."""
    for part in model.glob("t*"):
        shutil.copytree(part, tmp_path / "model" / part.name)
    return tmp_path / "model"


# ---- text embeddings

def test_cached_embeddings_equal_those_of_the_encoders(model, tmp_path):
    embeddings, captions = Embeddings(tmp_path / "cache", model), ["", *CAPTIONS]
    assert embeddings.fill([*captions, CAPTIONS[0]], batch=6) == 5
    context, pooled = SD3Text.load(model).encode(captions)
    again = embeddings.read(captions)
    assert torch.equal(again[0], context) and torch.equal(again[1], pooled) and context.dtype == torch.float32
    order = [3, 0, 3]
    some = embeddings.read([captions[k] for k in order])
    assert torch.equal(some[0], context[order]) and torch.equal(some[1], pooled[order])
    assert len({hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in context}) == 5
    by_two = Embeddings(tmp_path / "other", model)
    by_two.fill(captions, batch=2)
    for one, other in zip(by_two.read(captions), again, strict=True):  # rounding differs with the batch
        assert torch.allclose(one, other, atol=1e-5)


def test_embeddings_of_flux_are_those_of_its_encoders_and_apart_from_those_of_schnell(folders, tmp_path):
    flux = folders / "tiny-flux"
    embeddings = Embeddings(tmp_path, flux, family=FLUX_DEV)
    embeddings.fill(CAPTIONS)
    context, pooled = embeddings.read(CAPTIONS)
    assert context.shape == (4, make_tiny.T5_LENGTH, 192) and pooled.shape == (4, 64)
    expected = FluxText.load(flux).encode(CAPTIONS)
    assert torch.allclose(context, expected[0], atol=1e-5) and torch.allclose(pooled, expected[1], atol=1e-5)
    caches = {Embeddings(tmp_path, model, family=family).cache
              for model, family in ((flux, FLUX_DEV), (flux, FLUX_SCHNELL), (folders / "tiny-sd3", SD3))}
    assert len(caches) == 3


def test_cache_of_another_t5_length_is_not_read(model, tmp_path):
    """Also where the length is the family's default: an encoder's file may record another."""
    assert len({Embeddings(tmp_path, model, t5_length=length).cache for length in (None, 77, 256, 512)}) == 4


def test_second_fill_encodes_nothing(model, tmp_path, monkeypatch):
    Embeddings(tmp_path, model).fill(CAPTIONS)
    monkeypatch.setattr(SD3Text, "load", None)
    assert Embeddings(tmp_path, model).fill(CAPTIONS[::-1]) == 0


def test_interrupted_fill_resumes(model, tmp_path, monkeypatch):
    encoded, encode = [], SD3Text.encode

    def broken_off(self, captions):
        if len(encoded) == 2:
            raise KeyboardInterrupt
        encoded.extend(captions)
        return encode(self, captions)

    monkeypatch.setattr(SD3Text, "encode", broken_off)
    with pytest.raises(KeyboardInterrupt):
        Embeddings(tmp_path, model).fill(CAPTIONS, batch=2)
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda source, target: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            Embeddings(tmp_path, model).fill(CAPTIONS, batch=2)
    embeddings = Embeddings(tmp_path, model)
    assert [f.suffix for f in embeddings.cache.iterdir()] == [".safetensors"] * 2  # complete files, nothing temporary
    assert embeddings.fill(CAPTIONS, batch=2) == 2
    assert embeddings.read(CAPTIONS)[0].shape[0] == len(CAPTIONS)


@pytest.mark.parametrize("changed", ["text_encoders/clip_l.safetensors", "text_encoders/t5xxl_fp16.safetensors",
                                     "tokenizer_2/vocab.json", "tokenizer_3/spiece.model"])
def test_cache_of_other_encoders_is_not_read(own_model, tmp_path, changed):
    before = Embeddings(tmp_path / "cache", own_model)
    before.fill(CAPTIONS[:1])
    content = bytearray((own_model / changed).read_bytes())
    content[-9] ^= 1  # the size stays
    (own_model / changed).write_bytes(content)
    after = Embeddings(tmp_path / "cache", own_model)
    assert after.cache != before.cache
    with pytest.raises(FileNotFoundError):
        after.read(CAPTIONS[:1])


def test_cache_depends_on_neither_the_transformer_nor_the_folder_of_the_model(own_model, tmp_path):
    before = Embeddings(tmp_path / "cache", own_model).cache
    (own_model / "transformer").mkdir()
    (own_model / "transformer" / "config.json").write_text("{}")
    (own_model / "sd3.safetensors").write_bytes(b"another")
    shutil.copytree(own_model, tmp_path / "elsewhere")
    for model in (own_model, tmp_path / "elsewhere"):
        assert Embeddings(tmp_path / "cache", model).cache == before


# ---- the latent cache

@pytest.fixture
def autoencoder():
    return new_vae(VAEConfig((8, 8, 16, 36), (8, 8, 16, 36), 1, 2, 16, 1), seed=0)


def test_latents_are_encoded_once_for_all_runs(photos, autoencoder, tmp_path, monkeypatch):
    pictures, sizes = Pictures([photos / f"{k}.png" for k in range(3)]), [(32, 32)] * 3
    first = Latents(pictures.paths, pictures.central_crop, autoencoder, 16, 2, tmp_path)
    assert first.fill(sizes, rank=0, world=2) == 2 and len(list(tmp_path.glob("*/*"))) == 2  # pictures 0 and 2
    assert first.fill(sizes, rank=1, world=2) == 1 and len(list(tmp_path.glob("*/*"))) == 3
    mean, logvar = autoencoder.moments(to_image(pictures.central_crop(0, 32, 32))[None], 16, 2)
    assert all(torch.equal(a, b) for a, b in zip(first.read(0, 32, 32), (mean, logvar), strict=True))
    monkeypatch.setattr(autoencoder, "moments", None)
    again = Latents(pictures.paths, pictures.central_crop, autoencoder, 16, 2, tmp_path)
    assert again.fill(sizes) == 3 and torch.equal(again.read(0, 32, 32)[0], mean)


@pytest.mark.parametrize("changed", ["picture", "weights", "factor", "dilation", "size"])
def test_latents_of_another_picture_encoder_or_size_are_not_read(photos, autoencoder, tmp_path, changed):
    shutil.copy(photos / "0.png", tmp_path / "0.png")
    pictures = Pictures([tmp_path / "0.png"])
    Latents(pictures.paths, pictures.central_crop, autoencoder, 16, 2, tmp_path / "cache").fill([(32, 32)])
    if changed == "picture":
        shutil.copy(photos / "1.png", tmp_path / "0.png")
    if changed == "weights":
        with torch.no_grad():
            autoencoder.encoder.conv_out.bias[0] += 1
    factor, dilation = 8 if changed == "factor" else 16, 1 if changed == "dilation" else 2
    width = 48 if changed == "size" else 32
    other = Latents(pictures.paths, pictures.central_crop, autoencoder, factor, dilation, tmp_path / "cache")
    with pytest.raises(FileNotFoundError):
        other.read(0, 32, width)
