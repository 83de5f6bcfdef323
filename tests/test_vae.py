"""The autoencoder: official numbers at both factors, the partition trick and its slow twin, constants, refusals."""

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import seeded
from diffusers import AutoencoderKL
from golden import BOUNDS, distance, published, read_case, weights_of, write_weights
from safetensors.torch import save_file
from torch import nn

import vae as vae_file
from checkpoint import LazyTensor, Weights, fill, save
from names import official_names
from train_vae import new_vae
from vae import (
    FLUX_SCALE,
    FLUX_SHIFT,
    SD3_SCALE,
    SD3_SHIFT,
    VAE,
    VAEConfig,
    enlarged_conv,
    partitioned_conv,
    read_config,
    to_image,
    to_pixels,
)

SD3, FLUX = (SD3_SCALE, SD3_SHIFT), (FLUX_SCALE, FLUX_SHIFT)
PARITY = 1e-5  # fp32, independent implementations agree to 5e-6; a group norm with eps 1e-5 would be 2.6e-5 away


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed))


def lazy(shapes: dict) -> Weights:
    """Weights that cost no memory: every tensor is one expanded zero."""
    zeros = {name: LazyTensor(tuple(shape), lambda shape=shape: torch.zeros(()).expand(shape))
             for name, shape in shapes.items()}
    return Weights(zeros, {}, "a file")


@pytest.fixture(scope="module")
def f16():
    return read_case("vae_f16")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Name of a case -> a file that holds its weights alone, and its inputs and outputs."""
    return lambda case, device="cpu": write_weights(case, tmp_path_factory.mktemp(case), device)


@pytest.fixture(scope="module")
def raw_vae(files):
    """The golden's autoencoder with two levels, so factor 8 is 2 and factor 16 is 4; latents raw."""
    return VAE.load(files("vae_f16")[0], scale_factor=1.0, shift_factor=0.0).requires_grad_(False)


def random_diffusers(norm_groups: int, scaling_factor: float = 1.5305, shift_factor: float | None = 0.0609,
                     **more) -> AutoencoderKL:
    torch.manual_seed(norm_groups)
    widths = (norm_groups, norm_groups, 2 * norm_groups, 2 * norm_groups)
    theirs = AutoencoderKL(block_out_channels=widths, down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=16,
                           up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, norm_num_groups=norm_groups,
                           scaling_factor=scaling_factor, shift_factor=shift_factor,
                           **dict(use_quant_conv=False, use_post_quant_conv=False) | more)
    for parameter in theirs.parameters():  # gains and biases other than 1 and 0
        parameter.data += 0.05 * torch.randn_like(parameter)
    return theirs.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def four_levels(tmp_path_factory):
    """A folder of a narrow autoencoder with the official four levels, and its model."""
    folder, theirs = tmp_path_factory.mktemp("four_levels"), random_diffusers(8)
    theirs.save_pretrained(folder)
    return folder, theirs


# ---- official numbers

def test_sd3_moments_latents_samples_and_pictures(files, monkeypatch):
    path, case = files("vae_sd3")
    vae = VAE.load(path, scale_factor=SD3_SCALE, shift_factor=SD3_SHIFT)
    with torch.no_grad():
        mean, logvar = vae.moments(case["in/image"], factor=8)
        assert distance(torch.cat((mean, logvar), dim=1), case["out/moments"]) < PARITY
        assert distance(vae.encode(case["in/image"], factor=8), case["out/scaled_mean"]) < PARITY
        assert distance(vae.decode(case["in/latent"], factor=8), case["out/decoded_from_model_space"]) < PARITY
        assert distance(vae.decode((case["in/latent"] - SD3_SHIFT) * SD3_SCALE, factor=8), case["out/decoded"]) < PARITY
        monkeypatch.setattr(vae_file.torch, "randn", lambda *shape, **more: case["in/eps"])
        sample = vae.encode(case["in/image"], factor=8, generator=torch.Generator())
    assert distance(sample / SD3_SCALE + SD3_SHIFT, case["out/sample_with_eps"]) < PARITY


def test_flux_moments_latents_and_pictures(files, device):
    path, case = files("vae_flux", device)
    vae, bound = VAE.load(path, device), BOUNDS[device]
    with torch.no_grad():
        assert distance(torch.cat(vae.moments(case["in/image"], factor=8), dim=1), case["out/moments"]) < bound
        assert distance(vae.encode(case["in/image"], factor=8), case["out/encoded_scaled_mean"]) < bound
        assert distance(vae.decode(case["in/latent"], factor=8), case["out/decoded"]) < bound
        assert distance(vae.decoder(case["in/latent"], 8, 2), case["out/decoder_raw"]) < bound


@pytest.mark.parametrize("dilation, name", [(1, "moments"), (2, "moments_dilation2")])
def test_factor_16_moments_of_the_release_and_of_the_paper(files, dilation, name, device):
    path, case = files("vae_f16", device)
    vae = VAE.load(path, device, scale_factor=1.0, shift_factor=0.0).requires_grad_(False)
    assert distance(torch.cat(vae.moments(case["in/image"], 16, dilation), dim=1), case[f"out/{name}"]) < BOUNDS[device]


@pytest.mark.parametrize("factor, offset, name", [(16, 1, "decoded_partitioned"), (16, 2, "decoded_unpartitioned"),
                                                  (8, 2, "f8_decoded")])
def test_factor_16_pictures_of_the_release_and_exact_ones(files, factor, offset, name, device):
    path, case = files("vae_f16", device)
    vae = VAE.load(path, device, scale_factor=1.0, shift_factor=0.0).requires_grad_(False)
    assert distance(vae.decode(case["in/latent"], factor, offset), case[f"out/{name}"]) < BOUNDS[device]


def test_paper_and_exact_decode_are_the_defaults(f16, raw_vae):
    assert distance(raw_vae.encode(f16["in/image"]), f16["out/moments_dilation2"][:, :4]) < PARITY
    assert distance(raw_vae.decode(f16["in/latent"]), f16["out/decoded_unpartitioned"]) < PARITY


def test_bfloat16_is_near_float32(files, f16, raw_vae):
    half = VAE.load(files("vae_f16")[0], dtype=torch.bfloat16, scale_factor=1.0, shift_factor=0.0).requires_grad_(False)
    latent, image = half.encode(f16["in/image"].bfloat16()), half.decode(f16["in/latent"].bfloat16())
    assert latent.dtype == image.dtype == torch.bfloat16
    # 8 bits of mantissa over some twenty layers: 1 % of values around 1 on average, as diffusers has it too
    assert (latent - f16["out/moments_dilation2"][:, :4]).abs().mean() < 0.02
    assert (image - f16["out/decoded_unpartitioned"]).abs().mean() < 0.02
    draw = half.encode(f16["in/image"].bfloat16(), generator=seeded(0))
    exact = raw_vae.encode(f16["in/image"], generator=seeded(0))
    assert draw.dtype == torch.bfloat16 and (draw - exact).abs().mean() < 0.03


# ---- the partition trick

@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_dilation_2_is_factor_8_on_every_second_pixel(files, f16, dtype, tolerance):
    vae = VAE.load(files("vae_f16")[0], dtype=dtype).requires_grad_(False)
    for image in (f16["in/image"].to(dtype), normal(2, 3, 8, 20).to(dtype)):
        large, small = vae.moments(image, 16, dilation=2), vae.moments(image[:, :, ::2, ::2], 8)
        assert all(distance(a, b) < tolerance for a, b in zip(large, small, strict=True))


@pytest.mark.parametrize("shape", [(1, 5, 8, 8), (2, 3, 12, 4)])
@pytest.mark.parametrize("tiles", [2, 4])
def test_enlarged_partitioned_and_plain_convolutions_agree(shape, tiles):
    x, weight, bias = normal(*shape), normal(7, shape[1], 3, 3, seed=1), normal(7, seed=2)
    plain = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)
    assert distance(enlarged_conv(x, weight, bias), plain) < PARITY
    assert distance(partitioned_conv(x, weight, bias, tiles=tiles), plain) < PARITY


@pytest.mark.parametrize("shape", [(1, 5, 8, 8), (2, 3, 12, 4)])
@pytest.mark.parametrize("tiles", [1, 2, 4])
def test_released_shift_is_one_pixel_and_the_same_for_any_number_of_tiles(shape, tiles):
    x, weight, bias = normal(*shape), normal(7, shape[1], 3, 3, seed=1), normal(7, seed=2)
    released, exact = partitioned_conv(x, weight, bias, offset=1, tiles=tiles), enlarged_conv(x, weight, bias, offset=2)
    assert distance(enlarged_conv(x, weight, bias, offset=1), released) < PARITY
    assert distance(released[:, :, 1:, 1:], exact[:, :, :-1, :-1]) < PARITY
    assert distance(released[:, :, 0], exact[:, :, 0]) > 0.1


@pytest.mark.parametrize("offset", [1, 2])
def test_slow_twin_gives_the_released_and_the_exact_picture(f16, raw_vae, offset, monkeypatch):
    plain, twin = vae_file.enlarged_conv, partitioned_conv
    monkeypatch.setattr(vae_file, "enlarged_conv", lambda x, w, b, o=2: (twin if len(w) == 3 else plain)(x, w, b, o))
    name = "decoded_partitioned" if offset == 1 else "decoded_unpartitioned"
    assert distance(raw_vae.decode(f16["in/latent"], 16, offset), f16[f"out/{name}"]) < PARITY


def test_released_picture_is_the_exact_one_a_pixel_down_and_right(f16, raw_vae):
    released, exact = raw_vae.decode(f16["in/latent"], offset=1), raw_vae.decode(f16["in/latent"], offset=2)
    assert distance(released[:, :, 1:, 1:], exact[:, :, :-1, :-1]) < PARITY
    assert distance(released, exact) > 1


@pytest.mark.parametrize("offset", [1, 2])
def test_gradients_equal_those_of_the_slow_twin(offset):
    shapes, gradients = ((2, 3, 6, 4), (5, 3, 3, 3), (5,)), []
    target = normal(2, 5, 12, 8, seed=9).double()
    for conv in (enlarged_conv, partitioned_conv):
        leaves = [normal(*shape, seed=k).double().requires_grad_() for k, shape in enumerate(shapes)]
        (conv(*leaves, offset) - target).square().mean().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for fast, slow in zip(*gradients, strict=True):
        assert fast.abs().max() > 1e-3 and distance(fast, slow) < 1e-12


def test_gradient_reaches_latent_and_image(files, f16):
    vae = VAE.load(files("vae_f16")[0], scale_factor=1.0, shift_factor=0.0)
    image, latent = f16["in/image"].clone().requires_grad_(), f16["in/latent"].clone().requires_grad_()
    vae.decode(latent).square().mean().backward()
    torch.cat(vae.moments(image), dim=1).square().mean().backward()
    assert all(t.grad.isfinite().all() and t.grad.abs().max() > 0 for t in (image, latent, *vae.parameters()))
    assert image.grad[:, :, 1::2].abs().max() == 0  # factor 16 never looks at the other pixels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_convolutions_keep_the_dtype(dtype):
    x, weight, bias = (normal(*shape).to(dtype) for shape in ((1, 3, 4, 6), (2, 3, 3, 3), (2,)))
    fast, slow = enlarged_conv(x, weight, bias), partitioned_conv(x, weight, bias)
    assert fast.dtype == slow.dtype == dtype and fast.shape == (1, 2, 8, 12)
    tolerance = {torch.float32: PARITY, torch.bfloat16: 0.15, torch.float16: 0.02}[dtype]  # values up to 10
    assert distance(fast.float(), slow.float()) < tolerance


# ---- modules are called

@pytest.mark.parametrize("factor", [8, 16])
def test_hook_on_any_convolution_fires_once_and_changes_the_picture(four_levels, factor):
    vae, image = VAE.load(four_levels[0]).requires_grad_(False), normal(1, 3, 32, 16)
    plain = vae.decode(vae.encode(image, factor), factor)
    convolutions = {name: module for name, module in vae.named_modules() if isinstance(module, nn.Conv2d)}
    assert {f"{name}.weight" for name in convolutions} == {name for name, p in vae.named_parameters() if p.ndim == 4}
    for name, convolution in convolutions.items():
        calls = []
        handle = convolution.register_forward_hook(lambda _, inputs, output, calls=calls: calls.append(1) or 2 * output)
        hooked = vae.decode(vae.encode(image, factor), factor)
        handle.remove()
        assert len(calls) == 1 and not torch.equal(hooked, plain), name


# ---- large maps in bands of rows

OFFICIAL = VAEConfig((128, 256, 512, 512), (128, 256, 512, 512), 2, 3, 16, 32)
EMBEDDED = VAEConfig((16, 24, 48, 64), (16, 24, 48, 64), 1, 2, 16, 1)


def both_ways(vae: VAE, latent: torch.Tensor, image: torch.Tensor, factor: int, variant: int) -> list[torch.Tensor]:
    with torch.no_grad():
        return [vae.decode(latent, factor, variant), torch.cat(vae.moments(image, factor, variant), dim=1)]


@pytest.mark.parametrize("config, shape", [(OFFICIAL, (1, 16, 3, 5)), (OFFICIAL, (1, 16, 4, 4)),
                                           (EMBEDDED, (2, 16, 8, 8)), (EMBEDDED, (2, 16, 9, 4))])
def test_bands_give_the_numbers_of_complete_maps(config, shape, monkeypatch):
    vae, calls = new_vae(config, seed=0), []
    for parameter in vae.parameters():  # gains and biases other than 1 and 0
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=seeded(parameter.numel()))
    vae.decoder.up[0].block[0].conv2.register_forward_hook(lambda *_: calls.append(1))
    latent, image = normal(*shape), normal(shape[0], 3, 16 * shape[2], 16 * shape[3], seed=1)
    monkeypatch.setattr(vae_file, "BAND_ROWS", 7)  # the last band is smaller
    for factor, variant in ((8, 2), (16, 1), (16, 2)):
        monkeypatch.setattr(vae_file, "BANDED_PIXELS", 2**19)
        plain, before = both_ways(vae, latent, image, factor, variant), len(calls)
        monkeypatch.setattr(vae_file, "BANDED_PIXELS", 0)
        bands = both_ways(vae, latent, image, factor, variant)
        assert len(calls) - before == -(-8 * shape[2] // 7)
        assert all(distance(a, b) < PARITY for a, b in zip(plain, bands, strict=True))


def test_statistics_of_bands_are_in_float32():
    """Of bfloat16 maps far from 0, whose variance a sum of squares would lose."""
    norm, x = nn.GroupNorm(4, 8, vae_file.NORM_EPS).bfloat16(), (normal(2, 8, 16, 12) + 50).bfloat16()
    exact = F.silu(F.group_norm(x.double(), 4, eps=vae_file.NORM_EPS))
    with torch.no_grad():
        assert distance(vae_file.norm_silu(norm, x)(x).double(), exact) < 0.02  # one rounding of values up to 4, twice


@pytest.mark.parametrize("px, factor, expected", [(1024, 16, False), (1024, 8, True), (2048, 16, True)])
def test_maps_of_large_pictures_run_in_bands_without_gradients(px, factor, expected):
    side = 8 * px // factor  # of the first map at full resolution, the largest
    x = torch.empty(1, 256, side, side, device="meta")
    with torch.no_grad():
        assert vae_file.banded(x) == expected
    assert not vae_file.banded(x)


def test_with_gradients_no_layer_runs_in_bands(f16, raw_vae, monkeypatch):
    plain = raw_vae.decode(f16["in/latent"])
    monkeypatch.setattr(vae_file, "BANDED_PIXELS", 0)
    monkeypatch.setattr(vae_file, "in_bands", None)
    assert torch.equal(raw_vae.decode(f16["in/latent"]), plain)


def test_hook_on_a_convolution_norm_or_level_changes_large_maps_too(four_levels, monkeypatch):
    vae, latent = VAE.load(four_levels[0]).requires_grad_(False), normal(1, 16, 3, 2)
    monkeypatch.setattr(vae_file, "BAND_ROWS", 5)
    for name, module in vae.decoder.named_modules():
        if isinstance(module, (nn.Conv2d, nn.GroupNorm, vae_file.Level)):
            handle, pictures = module.register_forward_hook(lambda _, inputs, output: output.tanh()), []
            for pixels in (2**19, 0):
                monkeypatch.setattr(vae_file, "BANDED_PIXELS", pixels)
                with torch.no_grad():
                    pictures.append(vae.decode(latent))
            handle.remove()
            with torch.no_grad():
                assert distance(*pictures) < PARITY < distance(pictures[0], vae.decode(latent)), name


# ---- samples, batches, sizes

def test_sample_is_a_function_of_the_generator(f16, raw_vae):
    first, again, other = (raw_vae.encode(f16["in/image"], generator=seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    mean, logvar = raw_vae.moments(f16["in/image"])
    assert distance(first, mean + torch.exp(0.5 * logvar) * normal(*mean.shape, seed=3)) < 1e-6
    assert torch.equal(raw_vae.encode(f16["in/image"]), mean)


@pytest.mark.parametrize("logvar, clamped", [(1000.0, 20.0), (-1000.0, -30.0)])
def test_log_variance_is_clamped_in_the_sample(files, f16, logvar, clamped):
    vae = VAE.load(files("vae_f16")[0], scale_factor=1.0, shift_factor=0.0).requires_grad_(False)
    vae.encoder.conv_out.weight[4:], vae.encoder.conv_out.bias[4:] = 0, logvar
    sample, mean = vae.encode(f16["in/image"], generator=seeded(0)), vae.moments(f16["in/image"])[0]
    expected = mean + torch.exp(torch.tensor(0.5 * clamped)) * normal(*mean.shape)
    assert torch.allclose(sample, expected, rtol=1e-6, atol=1e-6)


def test_image_is_independent_of_its_batch(raw_vae):
    images, latents = normal(3, 3, 16, 8), normal(3, 4, 4, 6, seed=1)
    assert distance(raw_vae.encode(images)[1:2], raw_vae.encode(images[1:2])) < 1e-5
    assert distance(raw_vae.decode(latents)[1:2], raw_vae.decode(latents[1:2])) < 1e-5


def test_latent_sides_are_image_sides_over_the_factor(four_levels):
    vae = VAE.load(four_levels[0]).requires_grad_(False)
    image = normal(1, 3, 32, 48)
    for factor, shape in ((8, (1, 16, 4, 6)), (16, (1, 16, 2, 3))):
        latent = vae.encode(image, factor)
        assert latent.shape == shape and vae.decode(latent, factor).shape == image.shape
        assert [m.shape for m in vae.moments(image, factor)] == [shape, shape]


def test_pixels_survive_the_way_to_an_image_and_back():
    pixels = np.arange(256, dtype=np.uint8).reshape(8, 32, 1).repeat(3, axis=2)
    image = to_image(pixels[:, ::-1])  # a mirrored view, as a crop may be
    assert image.shape == (3, 8, 32) and (image.min(), image.max()) == (-1, 1) and image[0, 0, 0] == 31 / 127.5 - 1
    assert (to_pixels(image) == pixels[:, ::-1]).all()
    assert to_pixels(torch.tensor([-2.0, 2.0, 0.0]).reshape(3, 1, 1)).tolist() == [[[0, 255, 128]]]  # clamped, rounded


# ---- diffusers

@pytest.mark.parametrize("norm_groups", [8, 32])
@pytest.mark.parametrize("shard_size", ["1GB", "100KB"])
def test_random_autoencoder_of_diffusers_gives_the_same_numbers(norm_groups, shard_size, tmp_path):
    theirs = random_diffusers(norm_groups)
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "100KB")
    vae, image, latent = VAE.load(tmp_path).requires_grad_(False), normal(2, 3, 32, 16), normal(2, 16, 3, 2, seed=1)
    assert (vae.scale_factor, vae.shift_factor, vae.encoder.norm_out.num_groups) == (1.5305, 0.0609, norm_groups)
    moments = theirs.encode(image).latent_dist.parameters
    assert distance(torch.cat(vae.moments(image, 8), dim=1), moments) < PARITY
    assert distance(vae.encode(image, 8), (moments[:, :16] - 0.0609) * 1.5305) < PARITY
    assert distance(vae.decode(latent, 8), theirs.decode(latent / 1.5305 + 0.0609).sample) < PARITY


def test_config_without_a_shift_means_no_shift(tmp_path):
    random_diffusers(8, scaling_factor=0.18215, shift_factor=None).save_pretrained(tmp_path)
    vae = VAE.load(tmp_path)
    assert (vae.scale_factor, vae.shift_factor) == (0.18215, 0.0)


def test_autoencoder_with_quant_convolutions_is_refused_by_name(tmp_path):
    random_diffusers(8, use_quant_conv=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="2 unknown: quant_conv.bias, quant_conv.weight") as refusal:
        VAE.load(tmp_path)
    assert "\n" not in str(refusal.value)


def others() -> dict[str, nn.Module]:
    """Small autoencoders of other models."""
    sides = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                 block_out_channels=(32, 32))
    wan = dict(base_dim=8, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True], z_dim=4)
    tiny = dict(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
                num_decoder_blocks=(1, 1))
    return {
        "SDXL": diffusers.AutoencoderKL(**sides), "TAESD": diffusers.AutoencoderTiny(**tiny),
        "FLUX.2": diffusers.AutoencoderKLFlux2(**sides), "VQ": diffusers.VQModel(**sides),
        "Wan": diffusers.AutoencoderKLWan(**wan), "Qwen": diffusers.AutoencoderKLQwenImage(**wan),
        "Hunyuan": diffusers.AutoencoderKLHunyuanVideo(
            block_out_channels=(8, 8), down_block_types=("HunyuanVideoDownBlock3D",) * 2, layers_per_block=1,
            up_block_types=("HunyuanVideoUpBlock3D",) * 2, norm_num_groups=4)}


@pytest.mark.parametrize("name, by_config, by_tensors", [
    ("SDXL", "SD1, SD2 or SDXL", "SD1, SD2 or SDXL"), ("TAESD", "is AutoencoderTiny", "TAESD"),
    ("FLUX.2", "is AutoencoderKLFlux2", "FLUX.2"), ("VQ", "is VQModel", "a VQ model"),
    ("Wan", "is AutoencoderKLWan", "a video model"), ("Qwen", "is AutoencoderKLQwenImage", "a video model"),
    ("Hunyuan", "is AutoencoderKLHunyuanVideo", "a video model")])
def test_other_autoencoders_are_named_by_their_config_or_without_it_by_their_tensors(name, by_config, by_tensors,
                                                                                     tmp_path):
    others()[name].save_pretrained(tmp_path)
    for words in (by_config, by_tensors):
        with pytest.raises(ValueError, match=f"{words}.*; give SD3's or Flux's") as refusal:
            VAE.load(tmp_path, fallback=(1.0, 0.0))
        assert str(refusal.value).startswith(str(tmp_path)) and "\n" not in str(refusal.value)
        (tmp_path / "config.json").unlink(missing_ok=True)


@pytest.mark.parametrize("more, words", [({"latents_mean": [0.1] * 16}, "normalised per channel, by latents_mean"),
                                         ({"act_fn": "relu"}, "with relu instead of silu")])
def test_settings_that_change_the_latent_or_the_network_are_refused(more, words, tmp_path):
    random_diffusers(8, **more).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=words):
        VAE.load(tmp_path)


# ---- names and shapes

@pytest.mark.parametrize("name", ["ae", "sd3_medium", "vae_flux.diffusers", "vae_sd3.diffusers"])
def test_published_names_and_shapes_are_exactly_accepted(name):
    shapes = {key: shape for key, shape in published(name).items() if not key.startswith("model.diffusion_model.")}
    official = {row.official: shapes[row.parts[0]] for row in official_names(shapes, "a file")}
    squeezed = {key: (*shape, 1, 1) for key, shape in official.items() if len(shape) == 2}  # 1x1 convolutions
    weights = lazy(official | squeezed).part("first_stage_model.")
    config = read_config(weights)
    assert config == VAEConfig((128, 256, 512, 512), (128, 256, 512, 512), 2, 3, 16, 32)
    with torch.device("meta"):
        vae = VAE(config)
    assert {key: tuple(t.shape) for key, t in vae.state_dict().items()} == {key: t.shape for key, t in weights.items()}
    assert len(shapes) == len(vae.state_dict()) == 244
    if name == "ae":
        fill(vae, weights)


def load_shapes(shapes: dict, monkeypatch) -> VAE:
    monkeypatch.setattr(vae_file, "open_weights", lambda path: lazy(shapes))
    return VAE.load("a file", fallback=(1.0, 0.0))


def test_each_missing_tensor_is_named(f16, monkeypatch):
    shapes = {name: tuple(t.shape) for name, t in weights_of(f16).items()}
    load_shapes(shapes, monkeypatch)
    for name in shapes:
        with pytest.raises(ValueError, match=name.replace(".", "[.]")) as refusal:
            load_shapes({other: shape for other, shape in shapes.items() if other != name}, monkeypatch)
        assert "\n" not in str(refusal.value), name


def test_each_misshapen_tensor_is_refused(f16, monkeypatch):
    shapes = {name: tuple(t.shape) for name, t in weights_of(f16).items()}
    first_of_level = {name for name in shapes if name.endswith("block.0.conv1.weight") and ".mid." not in name}
    configuring = first_of_level | {"encoder.conv_out.weight"}
    for name, shape in shapes.items():
        wrong = (shape[0] * 2, *shape[1:])
        # the configuration is read from these: then it is their neighbours that do not fit
        named = "differ" if name in configuring else name.replace(".", "[.]")
        with pytest.raises(ValueError, match=named) as refusal:
            load_shapes(shapes | {name: wrong}, monkeypatch)
        assert "\n" not in str(refusal.value), name


@pytest.mark.parametrize("extra", [
    "encoder.conv_in.lora", "loss.logvar", "quant_conv.weight", "encoder.down.1.downsample.conv.weight",
    "decoder.up.0.attn.0.q.weight", "encoder.mid.block_3.conv1.bias"])
def test_unknown_tensor_is_named(f16, extra, monkeypatch):
    shapes = {name: tuple(t.shape) for name, t in weights_of(f16).items()}
    with pytest.raises(ValueError, match=f"1 unknown: {extra}"):
        load_shapes(shapes | {extra: (32,)}, monkeypatch)


@pytest.mark.parametrize("extra, named", [
    ("encoder.down.2.block.0.norm1.weight", "encoder.down.2.block.0.conv1.weight"),
    ("decoder.up.3.upsample.conv.bias", "decoder.up.2"),
    ("encoder.down.0.block.3.conv1.bias", "encoder.down.0.block.1")])
def test_tensor_of_an_incomplete_level_or_resnet_names_what_it_lacks(f16, extra, named, monkeypatch):
    shapes = {name: tuple(t.shape) for name, t in weights_of(f16).items()}
    with pytest.raises(ValueError, match=f"missing: .*{named}|{named} is missing") as refusal:
        load_shapes(shapes | {extra: (32,)}, monkeypatch)
    assert "\n" not in str(refusal.value)


def test_weights_without_an_autoencoder_are_refused(tmp_path):
    name = "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"
    save_file({name: torch.zeros(1)}, tmp_path / "sd3.safetensors")
    with pytest.raises(ValueError, match="sd3.safetensors: .*decoder.conv_out.weight.* no autoencoder, such as"):
        VAE.load(tmp_path / "sd3.safetensors")
    ends = {f"{part}.conv_out.weight": torch.zeros(32, 32, 3, 3) for part in ("encoder", "decoder")}
    save_file(ends, tmp_path / "ends.safetensors")
    with pytest.raises(ValueError, match="ends.safetensors: .*missing"):
        VAE.load(tmp_path / "ends.safetensors")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        VAE.load(tmp_path / "nowhere")


def test_norm_groups_that_do_not_divide_are_refused(files):
    message = r"\(32, 64\) do not divide into 24 norm groups; .*give norm_groups="
    with pytest.raises(ValueError, match=message) as refusal:
        VAE.load(files("vae_f16")[0], norm_groups=24)
    assert "\n" not in str(refusal.value)


# ---- arguments

def test_image_sides_must_be_multiples(four_levels):
    vae = VAE.load(four_levels[0]).requires_grad_(False)
    vae.encode(torch.zeros(1, 3, 16, 24), factor=8)
    for shape, factor, message in (((1, 3, 16, 24), 16, "24x16 pixels: sides must be multiples of 16"),
                                   ((1, 3, 24, 16), 16, "16x24 pixels: sides must be multiples of 16"),
                                   ((1, 3, 16, 20), 8, "20x16 pixels: sides must be multiples of 8")):
        with pytest.raises(ValueError, match=message):
            vae.encode(torch.zeros(shape), factor)


def test_other_factors_dilations_and_offsets_are_refused(raw_vae):
    image, latent = torch.zeros(1, 3, 24, 24), torch.zeros(1, 4, 2, 2)
    for factor in (12, 0, 32):
        with pytest.raises(ValueError, match=f"factor {factor} .*8 or 16"):
            raw_vae.encode(image, factor)
        with pytest.raises(ValueError, match=f"factor {factor} .*8 or 16"):
            raw_vae.decode(latent, factor)
    with pytest.raises(ValueError, match="dilation 3.*1 or 2"):
        raw_vae.moments(image, 16, dilation=3)
    with pytest.raises(ValueError, match="offset 0.*1 or 2"):
        raw_vae.decode(latent, 16, offset=0)


# ---- constants

@pytest.mark.parametrize("prefix, expected", [("", FLUX), ("first_stage_model.", SD3)])
def test_constants_come_from_the_family_then_the_metadata_then_the_keyword(f16, prefix, expected, tmp_path):
    file = tmp_path / "weights.safetensors"
    tensors = {prefix + name: t for name, t in weights_of(f16).items()}
    if prefix:
        tensors["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"] = torch.zeros(1)

    def constants(**keywords) -> tuple[float, float, int]:
        vae = VAE.load(file, **keywords)
        return vae.scale_factor, vae.shift_factor, vae.decoder.norm_out.num_groups

    save_file(tensors, file)
    assert constants() == (*expected, 32)
    save_file(tensors, file, {"scale_factor": "0.5", "shift_factor": "-0.25", "norm_groups": "16"})
    assert constants() == (0.5, -0.25, 16)
    assert constants(scale_factor=2.0, shift_factor=0.0, norm_groups=8) == (2.0, 0.0, 8)


def test_constants_of_the_family_stand_where_the_files_record_none(four_levels, tmp_path):
    """The official names of a file without prefix are Flux's; a folder without config.json shows no family."""
    folder, _ = four_levels

    def constants(path: Path, **keywords: object) -> tuple[float, float]:
        vae = VAE.load(path, norm_groups=8, **keywords)
        return vae.scale_factor, vae.shift_factor

    def vae_of(config: dict) -> Path:
        (tmp_path / "vae").mkdir(exist_ok=True)
        shutil.copy(folder / "diffusion_pytorch_model.safetensors", tmp_path / "vae")
        (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
        return tmp_path / "vae"

    family = {"fallback": (0.7, 0.2)}
    assert constants(vae_of({}), **family) == (0.7, 0.2)
    assert constants(vae_of({"scaling_factor": 0.5}), **family) == (0.5, 0.0)  # as diffusers reads it
    assert constants(vae_of({"scaling_factor": 0.5, "shift_factor": None}), **family) == (0.5, 0.0)
    assert constants(vae_of({"shift_factor": 0.25}), **family) == (0.7, 0.25)
    for both, other in ((SD3, FLUX), (FLUX, SD3)):  # the scale shows the family, and its shift
        for more in ({}, {"shift_factor": None}):
            config = vae_of({"scaling_factor": both[0]} | more)
            assert constants(config, fallback=both) == constants(config) == both
            with pytest.raises(ValueError, match=f"scale {both[0]} and shift {both[1]}, which are those of"):
                constants(config, fallback=other)
    assert constants(vae_of({"scaling_factor": 0.5}), scale_factor=2.0, **family) == (2.0, 0.0)
    assert constants(vae_of({}), scale_factor=2.0, shift_factor=1.0) == (2.0, 1.0)
    for path in (vae_of({}), tmp_path / "vae" / "diffusion_pytorch_model.safetensors"):
        with pytest.raises(ValueError, match="no scale_factor and shift_factor.*1.5305 and 0.0609.*0.3611 and 0.1159"):
            constants(path)
    with pytest.raises(ValueError, match="records no shift_factor, and nothing"):
        constants(vae_of({}), scale_factor=2.0)


@pytest.mark.parametrize("beside, expected", [
    ("joint_blocks.0.x_block.attn.qkv.weight", SD3),
    ("double_blocks.0.img_attn.qkv.weight", FLUX), ("input_blocks.0.0.weight", None)])
def test_transformer_beside_a_prefixed_autoencoder_decides_its_constants(f16, beside, expected, tmp_path):
    file = tmp_path / "model.safetensors"
    tensors = {f"first_stage_model.{name}": t for name, t in weights_of(f16).items()}
    save_file(tensors | {f"model.diffusion_model.{beside}": torch.zeros(1)}, file)
    if expected:
        vae = VAE.load(file)
        assert (vae.scale_factor, vae.shift_factor) == expected
    else:
        with pytest.raises(ValueError, match="model.safetensors: records no .* nothing in it shows its family"):
            VAE.load(file)


@pytest.mark.parametrize("own, other, name, beside", [(FLUX, SD3, "SD3", "joint_blocks.0.x_block.attn.qkv.weight"),
                                                      (SD3, FLUX, "Flux", "double_blocks.0.img_attn.qkv.weight")])
@pytest.mark.parametrize("recorded", [("scale_factor", "shift_factor"), ("shift_factor",), ()])
def test_the_autoencoder_of_the_other_family_is_refused_by_its_constants(f16, own, other, name, beside, recorded,
                                                                         tmp_path):
    """Recorded ones, else those of the transformer in the same file."""
    file, metadata = tmp_path / "vae.safetensors", {"scale_factor": f"{other[0]}", "shift_factor": f"{other[1]}"}
    tensors = {f"first_stage_model.{name}": t for name, t in weights_of(f16).items()}
    save_file(tensors | {f"model.diffusion_model.{beside}": torch.zeros(1)}, file, {k: metadata[k] for k in recorded})
    with pytest.raises(ValueError, match=f"vae.safetensors: has scale {other[0]} .* are those of {name}'s autoencoder"):
        VAE.load(file, fallback=own)
    assert VAE.load(file, fallback=other).scale_factor == VAE.load(file).scale_factor == other[0]


@pytest.mark.parametrize("scale, shift", [(0.0, 0.0), (-1.0, 0.0), (5000.0, 0.0), (1.0, 5000.0)])
def test_constants_no_latent_can_have_are_refused(files, scale, shift):
    with pytest.raises(ValueError, match=f"scale_factor {scale:g}, shift_factor {shift:g}: expected 0.001 to 1000"):
        VAE.load(files("vae_f16")[0], scale_factor=scale, shift_factor=shift)


def test_encode_and_decode_apply_the_constants(files, f16, raw_vae):
    vae = VAE.load(files("vae_f16")[0], scale_factor=2.0, shift_factor=0.5).requires_grad_(False)
    assert distance(vae.encode(f16["in/image"]), (raw_vae.encode(f16["in/image"]) - 0.5) * 2) < 1e-6
    assert distance(vae.decode((f16["in/latent"] - 0.5) * 2), raw_vae.decode(f16["in/latent"])) < 1e-5


@pytest.mark.parametrize("storage", [torch.float32, torch.float16, torch.bfloat16])
def test_compute_dtype_is_float32_unless_asked(f16, storage, tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file({name: t.to(storage) for name, t in weights_of(f16).items()}, file)
    assert {p.dtype for p in VAE.load(file).parameters()} == {torch.float32}
    assert {p.dtype for p in VAE.load(file, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("changed, message", [({"norm_groups": "x"}, "norm_groups 'x', which is no integer"),
                                           ({"scale_factor": "nan"}, "scale_factor 'nan', which is no number"),
                                           ({"shift_factor": "inf"}, "shift_factor 'inf', which is no number"),
                                           ({"norm_groups": "0"}, "0 norm groups")])
def test_metadata_that_is_no_number_is_refused_by_name(tmp_path, changed, message):
    vae = new_vae(VAEConfig((8, 8, 16, 36), (8, 8, 16, 36), 1, 2, 16, 1), seed=0)
    save(tmp_path / "vae.safetensors", vae.state_dict(), {"norm_groups": 1} | changed)
    with pytest.raises(ValueError, match=f"vae.safetensors: .*{message}"):
        VAE.load(tmp_path / "vae.safetensors")
