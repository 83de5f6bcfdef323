"""The samples of a step: order of pictures, crops, captions. Each depends on seed and step alone."""

import sys
from collections import Counter
from dataclasses import replace
from threading import Event

import numpy as np
import pytest
import torch
from conftest import CAPTIONS, seeded
from PIL import Image

import train
from data import Pictures, read_folder
from flow import sample_sigma
from training.batches import batch_of_step, batches, draw_caption, random_crop, read_batch, uneven
from training.cache import Embeddings, Latents
from training.model import encode
from training.seeds import SAMPLES, seed_of
from training.settings import settle
from vae import VAE

# ---- crops

@pytest.fixture
def gradient(tmp_path):
    """One 40 x 64 picture whose red counts columns and green counts rows."""
    rows, columns = np.mgrid[:40, :64]
    Image.fromarray(np.stack((columns, rows, 0 * rows), 2).astype(np.uint8)).save(tmp_path / "gradient.png")
    return Pictures([tmp_path / "gradient.png"])


def test_random_square_depends_on_its_generator_alone_and_stays_inside(gradient):
    corners, mirrored, pixels = set(), 0, gradient.resized(0, 40, 40)
    for seed in range(200):
        torch.manual_seed(seed)
        square = random_crop(pixels, 32, 32, seeded(seed))
        assert square.shape == (32, 32, 3) and torch.equal(square, random_crop(pixels, 32, 32, seeded(seed)))
        red, green = (square[..., c].numpy().astype(int) for c in range(2))
        step = red[0, 1] - red[0, 0]
        assert abs(step) == 1 and (np.diff(red, axis=1) == step).all() and (np.diff(green, axis=0) == 1).all()
        mirrored += step < 0
        corners.add((green.min(), red.min()))
    tops, lefts = zip(*corners, strict=True)
    assert (min(tops), max(tops)) == (0, 8) and (min(lefts), max(lefts)) == (0, 32)  # edge to edge
    assert 70 < mirrored < 130


def test_crop_without_flip_is_at_the_same_place(gradient):
    pixels = gradient.resized(0, 40, 40)
    for seed in range(20):
        flipped, plain = (random_crop(pixels, 32, 32, seeded(seed), flip) for flip in (True, False))
        assert plain[0, 0, 0] < plain[0, 1, 0]
        assert torch.equal(flipped, plain) or torch.equal(flipped, plain.flip(1))


def test_random_crop_spans_a_picture_of_its_width_and_the_central_crop_is_the_middle(gradient):
    for seed in range(20):
        red = random_crop(gradient.resized(0, 20, 64), 20, 64, seeded(seed), flip=False)[..., 0].numpy()
        assert red.shape == (20, 64) and np.array_equal(red[0], np.arange(64))  # only its rows are drawn
    middle = gradient.central_crop(0, 20, 64)
    assert (middle[0, 0, 1], middle[-1, 0, 1]) == (10, 29)
    assert gradient.central_crop(0, 20, 32).shape == (20, 32, 3)  # scaled down by two


# ---- order

def test_every_epoch_shows_every_picture_in_an_order_that_the_seed_decides():
    def epoch_of(k: int, seed: int = 5) -> list[list[int]]:
        return [batch_of_step([(64, 64)] * 7, 3, seed, step) for step in range(3 * k, 3 * k + 3)]

    epochs = [epoch_of(k) for k in range(4)]
    for epoch in epochs:
        drawn = [index for batch in epoch for index in batch]
        assert len(drawn) == 9 and set(drawn) == set(range(7))
    assert len({str(epoch) for epoch in epochs}) == 4
    assert epochs[0] == epoch_of(0) != epoch_of(0, seed=6)


def test_batch_has_one_size_and_repeats_pictures_of_a_rare_size():
    sizes = [(64, 64), (32, 96), (64, 64), (96, 32), (64, 64)]
    several = [batch_of_step(sizes, 2, 0, step) for step in range(4)]
    assert all(len({sizes[k] for k in batch}) == 1 for batch in several)
    assert {k for batch in several for k in batch} == set(range(5)) and [1, 1] in several and [3, 3] in several
    assert batch_of_step([(64, 64)], 5, 0, 9) == [0] * 5


def test_line_about_rare_sizes_counts_how_often_their_pictures_are_drawn():
    sizes, batch = [(64, 64)] * 9 + [(32, 96)] * 2 + [(96, 32)], 4
    steps = 3 + 1 + 1  # of an epoch
    drawn = Counter(sum((batch_of_step(sizes, batch, 0, step) for step in range(steps)), []))
    common, rare, rarest = (sum(drawn[k] for k in chosen) / len(chosen) for chosen in (range(9), (9, 10), (11,)))
    assert (common, rare, rarest) == (12 / 9, 2, 4)
    line = uneven(sizes, batch)
    assert "1 of 32x96 px 4 times" in line and "others 1.33 times" in line and "96x32" not in line and "\n" not in line
    assert uneven([(64, 64)] * 3, 32) == uneven([(64, 64)] * 64 + [(32, 96)] * 32, 32) == ""


# ---- captions

def test_caption_depends_on_its_generator_alone():
    drawn = [draw_caption(CAPTIONS, seeded(seed), 0.1) for seed in range(50)]
    torch.manual_seed(7)
    assert drawn == [draw_caption(CAPTIONS, seeded(seed), 0.1) for seed in range(50)] and len(set(drawn)) == 5


def test_captions_are_drawn_evenly_and_dropped_with_the_given_probability():
    generator, several = seeded(0), ["one", "two", "three"]
    drawn = [draw_caption(several, generator, 0.1) for _ in range(3000)]
    assert abs(drawn.count("") / 3000 - 0.1) < 0.02 and set(drawn) == {"", *several}
    assert all(abs(drawn.count(caption) / 3000 - 0.3) < 0.03 for caption in several)
    assert {draw_caption(several, generator, 0.0) for _ in range(100)} == set(several)
    assert {draw_caption(several, generator, 1.0) for _ in range(20)} == {""}


# ---- a step

@pytest.fixture
def drawn(model):
    """drawn(settings, step): the parts of a step and their latents, in one process."""
    vae, family = VAE.load(model / "sd3.safetensors"), train.find(model)[0]

    def of(settings, step: int = 0):
        settings = settle(settings, family)
        items = read_folder(settings.data)
        sizes, pictures = [(settings.res, settings.res)] * len(items), Pictures([item.path for item in items])
        texts, latents = Embeddings(f"{settings.data}/.embeddings", model), None
        texts.fill(["", *CAPTIONS])
        if settings.cache_latents:
            latents = Latents(pictures.paths, pictures.central_crop, vae, settings.factor, settings.dilation,
                              settings.data + "/.latents")
            latents.fill(sizes)
        captions = [item.captions for item in items]
        parts = read_batch(step, settings, captions, sizes, pictures.resized, 16, texts, latents)
        return parts, [encode(vae, part, settings) for part in parts]

    return of


@pytest.mark.parametrize("changed", [{}, {"cache_latents": True}, {"factor": 8}])
def test_same_step_gives_the_same_batch_and_another_step_does_not(settings, drawn, changed):
    chosen = settings(batch=3, **changed)
    ((a,), (x,)), ((b,), (y,)), ((c,), (z,)) = (drawn(chosen, step) for step in (0, 0, 1))
    side = 64 // chosen.factor
    assert (a.pictures, a.captions) == (b.pictures, b.captions) and a.noise.shape == (3, 16, side, side)
    assert torch.equal(a.noise, b.noise) and torch.equal(a.sigma, b.sigma) and not torch.equal(a.noise, c.noise)
    assert torch.equal(x, y) and not torch.equal(x, z) and x.shape == (3, 16, side, side)


def test_sample_draws_caption_crop_noise_and_sigma_from_its_own_generator(settings, drawn):
    chosen = settings(seed=3, flip=True)
    (part,), _ = drawn(chosen, 5)
    generator = seeded(seed_of(3, 5 * 4 + 2, SAMPLES))
    items = read_folder(chosen.data)
    assert part.captions[2] == draw_caption(items[part.pictures[2]].captions, generator, 0.1)
    pixels = Pictures([items[part.pictures[2]].path]).resized(0, 64, 64)
    assert torch.equal(part.images[2], random_crop(pixels, 64, 64, generator))
    assert torch.equal(part.noise[2], torch.randn(16, 4, 4, generator=generator))
    assert torch.equal(part.sigma[2:3], sample_sigma(1, "logit_normal", 3.0, generator=generator))


def test_range_of_guidance_is_drawn_per_picture_and_changes_no_other_draw(settings, drawn, monkeypatch):
    of_family = settle

    def with_guidance(s, family):  # SD3 has no such input, but its samples can be drawn with it
        return replace(of_family(replace(s, guidance=None), family), guidance=s.guidance)

    monkeypatch.setattr(sys.modules[__name__], "settle", with_guidance)
    plain = settings(batch=4, accumulate=2)
    ranged = replace(plain, guidance=(1.0, 5.0))
    (a, b), _ = drawn(plain)
    (c, d), latents = drawn(ranged)
    guidance = torch.cat((c.guidance, d.guidance))
    assert a.guidance is None and len(set(guidance.tolist())) == 4 and guidance.min() >= 1 and guidance.max() <= 5
    (number,), _ = drawn(replace(plain, accumulate=1, guidance=3.5))
    assert torch.equal(number.guidance, torch.full((4,), 3.5))
    assert torch.equal(a.noise, c.noise) and torch.equal(b.sigma, d.sigma)
    (whole,), (latent,) = drawn(replace(ranged, accumulate=1))
    assert torch.equal(whole.guidance, guidance) and torch.equal(latent, torch.cat(latents))


def test_sigma_of_a_range_is_drawn_per_picture(settings, drawn):
    (part,), _ = drawn(settings(batch=4, sigma_range="0.5,0.7", density="beta", time_shift=1.0))
    assert (part.sigma >= 0.5).all() and (part.sigma <= 0.7).all() and len(set(part.sigma.tolist())) == 4


def test_any_number_of_readers_gives_the_same_batch(settings, drawn):
    (one,), (latent,) = drawn(settings(flip=True))
    (four,), (other,) = drawn(settings(flip=True, threads=16))
    assert all(torch.equal(a, b) for a, b in zip(one.images, four.images, strict=True))
    assert one.captions == four.captions and torch.equal(latent, other)
    assert torch.equal(one.noise, four.noise) and torch.equal(one.sigma, four.sigma)
    assert {image.dtype for image in one.images} == {torch.uint8}


def test_accumulation_divides_the_batch_without_changing_it(settings, drawn):
    (one,), (latent,) = drawn(settings(batch=4))
    two, halves = drawn(settings(batch=4, accumulate=2))
    assert len(two) == 2 and one.pictures == [picture for part in two for picture in part.pictures]
    assert torch.equal(latent, torch.cat(halves))


def test_latents_of_cached_moments_differ_from_step_to_step(settings, drawn):
    ((a,), (x,)), ((b,), (y,)) = (drawn(settings(cache_latents=True), step) for step in (0, 1))
    assert sorted(a.pictures) == sorted(b.pictures) == [0, 1, 2, 3] and a.images is None
    assert not torch.equal(x[a.pictures.index(0)], y[b.pictures.index(0)])


# ---- reading ahead

def test_batches_end_after_the_last_step_or_when_asked_to_stop_and_save_before_an_error():
    stop, saved = Event(), []

    def read(step: int) -> list[int]:
        if step == 7:
            raise ValueError("a broken picture")
        return [step]

    assert list(batches(read, 2, 5, stop, saved.append)) == [(2, [2]), (3, [3]), (4, [4])]
    steps = []
    for step, _ in batches(read, 0, 100, stop, saved.append):
        steps.append(step)
        if step == 3:
            stop.set()
    assert steps == [0, 1, 2, 3] and saved == []
    with pytest.raises(ValueError, match="a broken picture"):
        list(batches(read, 5, 9, Event(), saved.append))
    assert saved == [7]  # steps 0 to 6 are complete
