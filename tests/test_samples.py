"""Sample pictures of a run: each depends on its prompt and seed alone; the grid holds all."""

from dataclasses import replace

import pytest
import torch
from conftest import seeded
from PIL import Image

from checkpoint import Weights
from family import FLUX_DEV, SD3
from mmdit import MMDiT
from training.samples import SampleSettings, draw_samples, sample_settings_of, write_grid
from training.settings import settle
from vae import VAE


def test_sample_picture_depends_on_its_prompt_and_seed_alone(model):
    transformer, vae = MMDiT.load(model / "sd3.safetensors"), VAE.load(model / "sd3.safetensors")
    with torch.no_grad():
        for p in transformer.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=seeded(p.numel())))
    generator = seeded(0)
    context, pooled = torch.randn(3, 5, 192, generator=generator), torch.randn(3, 192, generator=generator)
    drawing = SampleSettings(SD3.sigmas(3, 3.0), (16, 4, 4), cfg=2.0, guidance=None, factor=16, seed=7)
    two = draw_samples(transformer, vae, context, pooled, drawing)
    (second,) = draw_samples(transformer, vae, context[[0, 2]], pooled[[0, 2]], replace(drawing, seed=8))
    assert len(two) == 2 and two[0].shape == (3, 64, 64) and torch.allclose(two[1], second, atol=1e-5)
    assert not torch.allclose(two[0], two[1], atol=1e-2)


def test_a_schedule_that_cannot_be_drawn_is_refused_before_the_run(settings):
    about = Weights({}, {}, "flux")
    for res, every in ((4096, 10), (8704, 0)):
        sample_settings_of(settle(settings(res=res, sample_every=every), FLUX_DEV), FLUX_DEV, about, 16)
    with pytest.raises(ValueError, match="--sample-every at --res 8704: some of the 50 noise levels coincide"):
        sample_settings_of(settle(settings(res=8704, sample_every=10), FLUX_DEV), FLUX_DEV, about, 16)


def test_sample_pictures_are_decoded_in_the_dtype_of_the_vae_under_autocast(model):
    transformer, vae = MMDiT.load(model / "sd3.safetensors"), VAE.load(model / "sd3.safetensors")
    context, pooled = torch.randn(2, 5, 192, generator=seeded(0)), torch.randn(2, 192, generator=seeded(1))
    drawing = SampleSettings(SD3.sigmas(1, 3.0), (16, 4, 4), cfg=2.0, guidance=None, factor=16, seed=7)
    seen = []
    vae.decoder.conv_out.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        draw_samples(transformer, vae, context, pooled, drawing)
    assert seen == [torch.float32]


@pytest.mark.parametrize("count, size", [(1, (8, 4)), (3, (24, 4)), (4, (16, 8)), (5, (24, 8))])
def test_grid_holds_every_picture(tmp_path, count, size):
    images = [torch.full((3, 4, 8), -1 + 0.3 * k) for k in range(count)]
    write_grid(tmp_path / "samples" / "grid.png", images)
    grid = Image.open(tmp_path / "samples" / "grid.png")
    assert grid.size == size and [f.name for f in (tmp_path / "samples").iterdir()] == ["grid.png"]
    seen = {grid.getpixel((x, y))[0] for x in range(0, size[0], 8) for y in range(0, size[1], 4)}
    assert {round((0.3 * k) * 127.5) for k in range(count)} <= seen
