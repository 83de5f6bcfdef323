"""The caches of training: each embedding and latent is computed once; one made from other inputs is never read."""

import hashlib
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import CAPTIONS, metadata_of
from PIL import Image
from safetensors.torch import load_file

from data import Pictures
from family import FLUX_DEV, FLUX_SCHNELL, SD3
from models import make_tiny
from text import FluxText, SD3Text
from train_vae import new_vae
from training.cache import Embeddings, Latents, encoders_key
from vae import VAEConfig, to_image


@pytest.fixture
def own_model(model, tmp_path):
    """A copy of the encoders and tokenizers, which a test may change."""
    for part in model.glob("t*"):
        shutil.copytree(part, tmp_path / "model" / part.name)
    return tmp_path / "model"


@pytest.fixture
def autoencoder():
    return new_vae(VAEConfig((8, 8, 16, 36), (8, 8, 16, 36), 1, 2, 16, 1), seed=0)


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


def test_encoders_inside_the_file_of_the_transformer_are_known_by_it(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    keys = set()
    for content in (b"one", b"another"):
        (tmp_path / "sd3_medium_incl_clips_t5xxlfp16.safetensors").write_bytes(content)
        keys.add(encoders_key(tmp_path))
    assert len(keys) == 2


DAMAGE = {  # name of the damage -> what it makes of a file's tensors, records and bytes
    "empty": lambda tensors, records, content: b"",
    "half": lambda tensors, records, content: content[:len(content) // 2],
    "a byte short": lambda tensors, records, content: content[:-1],
    "no safetensors": lambda tensors, records, content: b"PK" * 200,
    "another name": lambda tensors, records, content: saved({f"{name}_": t for name, t in tensors.items()}, records),
    "one more": lambda tensors, records, content: saved(tensors | {"more": torch.zeros(1)}, records),
    "one axis less": lambda tensors, records, content: saved({name: t[0] for name, t in tensors.items()}, records),
    "other shape": lambda tensors, records, content: saved({name: t[..., :-1] for name, t in tensors.items()}, records),
    "other dtype": lambda tensors, records, content: saved({name: t.half() for name, t in tensors.items()}, records),
    "no records": lambda tensors, records, content: saved(tensors, None),
    "no checksum": lambda tensors, records, content: saved(  # as older versions wrote it
        tensors, {name: text for name, text in records.items() if name != "sha256"}),
    "records of another": lambda tensors, records, content: saved(tensors, dict.fromkeys(records, "another")),
}


def saved(tensors: dict, records: dict | None) -> bytes:
    return safetensors.torch.save({name: t.contiguous() for name, t in tensors.items()}, records)


def damage(file: Path, kind: str) -> None:
    file.write_bytes(DAMAGE[kind](load_file(file), metadata_of(file), file.read_bytes()))


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_embedding_is_refused_on_reading_and_computed_again_by_the_next_fill(model, tmp_path, capsys, kind):
    embeddings = Embeddings(tmp_path, model)
    embeddings.fill(CAPTIONS)
    before, file = embeddings.read(CAPTIONS), embeddings._file(CAPTIONS[2])
    damage(file, kind)
    with pytest.raises(ValueError, match=f"^{file}: [^\n]*; delete it$"):
        embeddings.read(CAPTIONS)
    capsys.readouterr()
    assert Embeddings(tmp_path, model).fill(CAPTIONS) == (4 if kind == "other shape" else 1)
    assert "computed again; the first: " in capsys.readouterr().err
    for a, b in zip(before, embeddings.read(CAPTIONS), strict=True):  # rounding differs with the batch
        assert torch.allclose(a, b, atol=1e-5)


def test_flipped_bit_is_refused_on_reading(model, photos, autoencoder, tmp_path):
    embeddings, pictures = Embeddings(tmp_path, model), Pictures([photos / "0.png"])
    latents = Latents(pictures.paths, pictures.central_crop, autoencoder, 16, 2, tmp_path)
    embeddings.fill(CAPTIONS), latents.fill([(32, 32)])
    for file, read in ((embeddings._file(CAPTIONS[1]), lambda: embeddings.read(CAPTIONS)),
                       (latents._file(0, 32, 32), lambda: latents.read(0, 32, 32))):
        content = bytearray(file.read_bytes())
        content[-6] ^= 4
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{file}: damaged .its checksum is another.; delete it$"):
            read()


def test_cache_whose_path_is_not_utf_8_is_refused(model, photos, autoencoder, tmp_path):
    folder, pictures = tmp_path / os.fsdecode(b"caf\xe9"), Pictures([photos / "0.png"])
    for make in (lambda: Embeddings(folder, model),
                 lambda: Latents(pictures.paths, pictures.central_crop, autoencoder, 16, 2, folder)):
        with pytest.raises(ValueError, match="this path is not UTF-8"):
            make()


def test_swapped_embeddings_are_seen_by_their_captions(model, tmp_path):
    embeddings = Embeddings(tmp_path, model)
    embeddings.fill(CAPTIONS)
    one, other = (embeddings._file(text) for text in CAPTIONS[:2])
    one.rename(tmp_path / "x"), other.rename(one), (tmp_path / "x").rename(other)
    with pytest.raises(ValueError, match="was made of another caption"):
        embeddings.read(CAPTIONS)
    assert embeddings.fill(CAPTIONS) == 2


def test_complete_cache_in_a_folder_that_cannot_be_written_is_read(model, tmp_path, monkeypatch):
    Embeddings(tmp_path, model).fill(CAPTIONS)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: (_ for _ in ()).throw(PermissionError(13, "read-only")))
    monkeypatch.setattr("text.SD3Text.load", None)  # neither here nor before the refusal
    assert Embeddings(tmp_path, model).fill(CAPTIONS) == 0
    with pytest.raises(OSError, match="^--cache: .* is no folder that can be written .*name another$"):
        Embeddings(tmp_path, model).fill(["a new caption"])


def test_leftovers_of_a_killed_encoder_are_cleared(model, tmp_path):
    embeddings = Embeddings(tmp_path, model)
    embeddings.fill(CAPTIONS[:1])
    left = embeddings.cache / ".half.1.tmp.safetensors"
    left.touch()
    os.utime(left, (1, 1))
    embeddings.fill(CAPTIONS)
    assert not left.exists()


# ---- the latent cache

def test_latents_are_encoded_once_for_all_runs(photos, autoencoder, tmp_path, monkeypatch):
    pictures, sizes = Pictures([photos / f"{k}.png" for k in range(3)]), [(32, 32)] * 3
    first = Latents(pictures.paths, pictures.central_crop, autoencoder, 16, 2, tmp_path)
    assert first.fill(sizes, rank=0, world=2) == 2 and len(list(tmp_path.glob("*/*"))) == 2  # pictures 0 and 2
    assert first.fill(sizes, rank=1, world=2) == 1 and len(list(tmp_path.glob("*/*"))) == 3
    mean, logvar = autoencoder.moments(to_image(pictures.central_crop(0, 32, 32))[None], 16, 2)
    assert all(torch.equal(a, b) for a, b in zip(first.read(0, 32, 32), (mean, logvar), strict=True))
    monkeypatch.setattr(autoencoder, "moments", None)
    again = Latents(pictures.paths, pictures.central_crop, autoencoder, 16, 2, tmp_path)
    assert again.fill(sizes) == 0 and torch.equal(again.read(0, 32, 32)[0], mean)


@pytest.mark.parametrize("changed", ["picture", "weights", "norm_groups", "factor", "dilation", "size",
                                     "resample"])
def test_latents_of_another_picture_encoder_or_size_are_not_read(photos, autoencoder, tmp_path, changed):
    shutil.copy(photos / "0.png", tmp_path / "0.png")
    pictures = Pictures([tmp_path / "0.png"])
    Latents(pictures.paths, pictures.central_crop, autoencoder, 16, 2, tmp_path / "cache").fill([(32, 32)])
    if changed == "picture":
        shutil.copy(photos / "1.png", tmp_path / "0.png")
    if changed == "weights":
        with torch.no_grad():
            autoencoder.encoder.conv_out.bias[0] += 1
    if changed == "norm_groups":
        autoencoder.config = replace(autoencoder.config, norm_groups=autoencoder.config.norm_groups + 1)
    factor, dilation = 8 if changed == "factor" else 16, 1 if changed == "dilation" else 2
    width = 48 if changed == "size" else 32
    resample = "bilinear" if changed == "resample" else "lanczos"
    other = Latents(pictures.paths, pictures.central_crop, autoencoder, factor, dilation, tmp_path / "cache", resample)
    with pytest.raises(FileNotFoundError):
        other.read(0, 32, width)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_latent_is_refused_on_reading_and_computed_again_by_the_next_fill(
        photos, autoencoder, tmp_path, capsys, kind):
    pictures, sizes = Pictures([photos / f"{k}.png" for k in range(2)]), [(32, 48)] * 2
    latents = Latents(pictures.paths, pictures.central_crop, autoencoder, 16, 2, tmp_path)
    latents.fill(sizes)
    before, file = latents.read(1, 32, 48)[0], latents._file(1, 32, 48)
    damage(file, kind)
    with pytest.raises(ValueError, match=f"^{file}: [^\n]*; delete it$"):
        latents.read(1, 32, 48)
    assert latents.fill(sizes) == 1 and f"1 files in {latents.folder} are computed again" in capsys.readouterr().err
    assert torch.equal(latents.read(1, 32, 48)[0], before)


@pytest.mark.parametrize("suffix", ["bmp", "tif"])
def test_latent_of_a_picture_edited_in_the_middle_is_not_read(autoencoder, tmp_path, suffix):
    """Size, first and last megabyte, and the time of change stay."""
    file = tmp_path / f"large.{suffix}"
    Image.new("RGB", (1100, 1000), "gray").save(file)
    pictures, before = Pictures([file]), file.stat()
    Latents(pictures.paths, pictures.central_crop, autoencoder, 16, 2, tmp_path / "cache").fill([(32, 32)])
    content = bytearray(file.read_bytes())
    content[1_600_000:1_700_000] = bytes(100_000)
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(FileNotFoundError):
        Latents(pictures.paths, pictures.central_crop, autoencoder, 16, 2, tmp_path / "cache").read(0, 32, 32)
