"""Haar bands, the WLF loss, masks and objectives: identities, the official numbers, NumPy twins, refusals."""

import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, seeded
from golden import distance
from safetensors.torch import load_file

from flow import SNR_HUBER, denoised, interpolate, loss_weight
from wavelet import (
    MASKS,
    OBJECTIVES,
    band_losses,
    detail_mask,
    haar_join,
    haar_pyramid,
    haar_split,
    objective,
    wlf_loss,
)

DATA = Path(__file__).parent / "data"
EVEN_SHAPES = ["1x4x8x12", "2x16x10x6"]  # the golden's other two cases have an odd side


def pair(*shape: int, dtype=torch.float64):
    generator = seeded(7)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))


@pytest.fixture(scope="module")
def step():
    return load_file(DATA / "wlf_step.safetensors")


def test_join_inverts_split():
    z, _ = pair(2, 3, 6, 10)
    assert distance(haar_join(haar_split(z)), z) < 1e-12
    bands, _ = pair(2, 8, 3, 5)
    assert (haar_split(haar_join(bands)) - bands).abs().max() < 1e-12


def test_split_keeps_the_sum_of_squares():
    z, _ = pair(2, 3, 6, 10)
    assert abs(haar_split(z).square().sum() / z.square().sum() - 1) < 1e-12


def test_bands_of_one_block_by_hand():
    bands = haar_split(torch.tensor([[1.0, 2.0], [3.0, 5.0]]).reshape(1, 1, 2, 2))
    assert bands.flatten().tolist() == [5.5, -2.5, -1.5, 0.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_split_and_join_preserve_the_dtype(dtype):
    z, _ = pair(1, 2, 4, 4, dtype=dtype)
    assert haar_split(z).dtype == dtype and haar_join(haar_split(z)).dtype == dtype
    assert wlf_loss(z, z).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("shape", EVEN_SHAPES)
@pytest.mark.parametrize("side", ["pred", "target"])
def test_split_equals_official_bands(shape, side):
    golden = load_file(DATA / "wlf.safetensors")
    expected = torch.cat([golden[f"out/{band}_{side}_{shape}"] for band in ("ll", "lh", "hl", "hh")], dim=1)
    assert (haar_split(golden[f"in/{side}_{shape}"]) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("shape", EVEN_SHAPES)
def test_loss_equals_official_loss_per_image(shape):
    golden = load_file(DATA / "wlf.safetensors")
    per_image = golden[f"out/loss_per_sample_{shape}"]
    for k, expected in enumerate(per_image):
        loss = wlf_loss(golden[f"in/pred_{shape}"][k : k + 1], golden[f"in/target_{shape}"][k : k + 1])
        assert abs(loss - expected) < 1e-6
    assert abs(wlf_loss(golden[f"in/pred_{shape}"], golden[f"in/target_{shape}"]) - per_image.mean()) < 1e-6


def test_split_equals_pytorch_wavelets():
    wavelets = pytest.importorskip("pytorch_wavelets")
    z, _ = pair(2, 3, 6, 10, dtype=torch.float32)
    low, (high,) = wavelets.DWTForward(J=1, wave="haar", mode="zero")(z)  # high (B, C, 3, h/2, w/2)
    expected = torch.cat((low, *high.unbind(2)), dim=1)
    assert (haar_split(z) - expected).abs().max() < 1e-6


def test_velocity_loss_is_the_mse():
    prediction, target = pair(2, 3, 6, 10)
    assert abs(wlf_loss(prediction, target) - (prediction - target).square().mean()) < 1e-12


def test_denoised_loss_is_sigma_squared_times_the_velocity_mse():
    latent, noise = pair(2, 3, 6, 10)
    predicted = pair(2, 3, 6, 10)[0].flip(0)
    sigma = torch.tensor([0.2, 0.7], dtype=torch.float64)
    estimate = denoised(interpolate(latent, noise, sigma), predicted, sigma)
    per_image = (predicted - (noise - latent)).square().mean(dim=(1, 2, 3))
    assert abs(wlf_loss(estimate, latent) - (sigma**2 * per_image).mean()) < 1e-12
    assert abs(wlf_loss(estimate, latent, loss_weight(sigma, "sigma_sqrt")) - per_image.mean()) < 1e-12


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap"])
def test_released_training_step(step, scheme):
    latent, noise, sigma = step["in/x0"], step["in/eps"], step["in/sigma"]
    velocity = step["in/v_pred"].clone().requires_grad_()
    noisy = interpolate(latent, noise, sigma)
    estimate = denoised(noisy, velocity, sigma)
    weight = loss_weight(sigma, scheme)
    loss = wlf_loss(estimate, latent, weight)
    (gradient,) = torch.autograd.grad(loss, velocity)
    assert (noisy - step["out/noisy"]).abs().max() < 1e-6
    assert (estimate - step["out/x0_hat"]).abs().max() < 1e-6
    assert (weight / step[f"out/weight_{scheme}"] - 1).abs().max() < 1e-6
    assert abs(loss - step[f"out/loss_{scheme}"]) < 1e-6
    if f"out/grad_v_{scheme}" in step:
        assert (gradient - step[f"out/grad_v_{scheme}"]).abs().max() < 1e-7  # gradients are below 4e-3


def test_paper_form_of_the_same_step(step):
    target = step["in/eps"] - step["in/x0"]
    assert abs(wlf_loss(step["in/v_pred"], target) - step["out/wavelet_velocity_mse"]) < 1e-6


def test_band_losses_of_an_image_average_to_its_mse_and_weights_pick_them():
    prediction, target = pair(2, 3, 6, 10)
    losses = band_losses(prediction, target)
    assert losses.shape == (2, 4)
    assert distance(losses.mean(1), (prediction - target).square().mean((1, 2, 3))) < 1e-12
    for k in range(4):
        only = [float(k == other) for other in range(4)]
        assert abs(wlf_loss(prediction, target, bands=only) - losses[:, k].mean() / 4) < 1e-12
    assert wlf_loss(prediction, target, bands=(1, 2, 2, 4)) > wlf_loss(prediction, target)


@pytest.mark.parametrize("shape", [(1, 16, 32, 32), (3, 16, 8, 6), (2, 4, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_band_losses_are_the_squares_of_the_split_difference_bit_for_bit(shape, dtype):
    prediction, target = pair(*shape, dtype=torch.float32)
    prediction = prediction.to(dtype)  # what autocast predicts; the target is fp32
    squares = haar_split((prediction - target).float()).unflatten(1, (4, -1)).square()
    assert torch.equal(band_losses(prediction, target), squares.mean((2, 3, 4)))


def test_image_weights_are_linear():
    prediction, target = pair(2, 3, 6, 10)
    first, second = (wlf_loss(prediction[k : k + 1], target[k : k + 1]) for k in range(2))
    weighted = wlf_loss(prediction, target, torch.tensor([3.0, 0.5], dtype=torch.float64))
    assert abs(weighted - (3 * first + 0.5 * second) / 2) < 1e-12


def test_huber_is_the_square_for_small_and_linear_for_large_differences():
    target = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    small, large = target + 1e-6, target + 1e6
    assert abs(wlf_loss(small, target, huber=0.1) / wlf_loss(small, target) - 1) < 1e-6
    # a constant d has all its energy in LL, which is 2d: 2c·|2d| over four bands
    assert abs(wlf_loss(large, target, huber=0.1) / (2 * 0.1 * 2e6 / 4) - 1) < 1e-6
    prediction, target = pair(2, 3, 6, 10)
    assert wlf_loss(prediction, target, huber=0.3) < wlf_loss(prediction, target)
    difference = haar_split(prediction - target)
    formula = 2 * 0.3**2 * ((1 + difference**2 / 0.3**2).sqrt() - 1)
    assert abs(wlf_loss(prediction, target, huber=0.3) - formula.mean()) < 1e-12


def test_huber_is_smooth_where_prediction_is_right():
    z = torch.zeros(1, 1, 2, 2, requires_grad=True)
    wlf_loss(z, torch.zeros_like(z), huber=0.1).backward()
    assert z.grad.abs().max() == 0


def test_half_precision_inputs_are_compared_in_fp32():
    prediction, target = pair(1, 4, 8, 8, dtype=torch.bfloat16)
    assert wlf_loss(prediction, target) == wlf_loss(prediction.float(), target.float())


@pytest.mark.parametrize("shape", [(1, 3, 7, 8), (1, 3, 8, 5)])
def test_odd_sides_are_refused(shape):
    with pytest.raises(ValueError, match="even sides"):
        haar_split(torch.zeros(shape))
    with pytest.raises(ValueError, match="even sides"):
        wlf_loss(torch.zeros(shape), torch.zeros(shape))


def test_wrong_arguments_are_refused():
    z = torch.zeros(2, 4, 4, 4)
    for bands in [(1, 1, 1), (1, 1, 1, 1, 1), (1, 1, -1, 1)]:
        with pytest.raises(ValueError, match="bands"):
            wlf_loss(z, z, bands=bands)
    with pytest.raises(ValueError, match="huber"):
        wlf_loss(z, z, huber=-1.0)
    with pytest.raises(ValueError, match="weight"):
        wlf_loss(z, z, weight=torch.ones(3))
    with pytest.raises(ValueError, match="agree"):
        wlf_loss(z, z[:1])
    with pytest.raises(ValueError, match="multiple of 4"):
        haar_join(torch.zeros(1, 6, 2, 2))


# ---- the objectives

EQUAL = (1.0, 1.0, 1.0, 1.0)


def inputs_of_a_step() -> tuple[torch.Tensor, ...]:
    """Velocity, latent and noise, (3, 16, 8, 4); sigma and weight, (3,)."""
    generator = seeded(0)
    velocity, latent, noise = torch.randn(3, 3, 16, 8, 4, generator=generator, dtype=torch.float64)
    sigma, weight = torch.rand(2, 3, generator=generator, dtype=torch.float64)
    return velocity, latent, noise, sigma, weight


@pytest.mark.parametrize("name, factor", [
    ("paper", lambda sigma: 1), ("velocity", lambda sigma: 1), ("release", lambda sigma: sigma**2),
    ("noise", lambda sigma: (1 - sigma) ** 2)])
@pytest.mark.parametrize("levels", [1, 2])
def test_objective_with_equal_bands_is_the_velocity_loss_times_its_factor(name, factor, levels):
    velocity, latent, noise, sigma, weight = inputs_of_a_step()
    error = (velocity - (noise - latent)).square().mean((1, 2, 3))
    expected = (weight * factor(sigma) * error).mean()
    loss = objective(name, velocity, latent, noise, sigma, weight, EQUAL, 0.0, levels)
    assert abs(loss - expected) < 1e-12


@pytest.mark.parametrize("name", ["paper", "release"])
def test_gradients_differ_from_the_velocity_loss_only_with_bands_or_huber(name):
    _, latent, noise, sigma, weight = inputs_of_a_step()

    def gradient(bands: tuple[float, ...] | None, huber: float) -> torch.Tensor:
        velocity = inputs_of_a_step()[0].requires_grad_()
        if bands is None:
            error = (velocity - (noise - latent)).square().mean((1, 2, 3))
            loss = (weight * error * (sigma**2 if name == "release" else 1)).mean()
        else:
            loss = objective(name, velocity, latent, noise, sigma, weight, bands, huber)
        return torch.autograd.grad(loss, velocity)[0]

    plain = gradient(None, 0.0)
    assert distance(gradient(EQUAL, 0.0), plain) < 1e-12
    for bands, huber in (((1.0, 2.0, 2.0, 4.0), 0.0), (EQUAL, 0.1)):
        other = gradient(bands, huber)
        assert 1 - F.cosine_similarity(other.flatten(), plain.flatten(), dim=0) > 0.01


def test_band_of_weight_zero_does_not_count():
    _, latent, noise, sigma, weight = inputs_of_a_step()
    velocity = noise - latent + 0.5  # the error is in LL alone: 0.5 everywhere is 1 in LL
    only_ll = objective("paper", velocity, latent, noise, sigma, torch.ones_like(sigma), (1, 0, 0, 0), 0.0)
    assert abs(only_ll - 0.25) < 1e-12
    assert objective("paper", velocity, latent, noise, sigma, weight, (0, 1, 1, 1), 0.0) < 1e-24


# ---- levels, SNR-Huber, masks: limits, and a twin of each that goes number by number

def blocks_of_two(z: np.ndarray) -> dict[str, np.ndarray]:
    """The four bands of one channel, one 2x2 block after another."""
    bands = {name: np.zeros((z.shape[0] // 2, z.shape[1] // 2)) for name in ("ll", "lh", "hl", "hh")}
    for i, j in product(*map(range, bands["ll"].shape)):
        a, b, c, d = z[2 * i, 2 * j], z[2 * i, 2 * j + 1], z[2 * i + 1, 2 * j], z[2 * i + 1, 2 * j + 1]
        for name, value in zip(bands, (a + b + c + d, a + b - c - d, a - b + c - d, a - b - c + d), strict=True):
            bands[name][i, j] = value / 2
    return bands


def slow_objective(name: str, velocity, latent, noise, sigma, weight, bands, huber, levels, constants, mask) -> float:
    """The formulas of docs/losses.md, one coefficient after another."""
    total, (count, channels, height, width) = 0.0, latent.shape
    for k in range(count):
        s, v = sigma[k], noise[k] - latent[k]
        z = (1 - s) * latent[k] + s * noise[k]
        predicted = velocity[k] if mask is None else np.where(mask[k], velocity[k], v)
        scale, rho = weight[k], np.square
        if name in ("paper", "velocity"):
            error = predicted - v
        elif name == "noise":
            error = z + (1 - s) * predicted - noise[k]
        else:
            error = z - s * predicted - latent[k]
        if huber:
            def rho(d):
                return 2 * huber**2 * (np.sqrt(1 + d**2 / huber**2) - 1)
        if name == "snr_huber":
            c_min, c_max, a, g, b = constants
            m = min(((1 - s) / s) ** 2, g)
            c = c_min + (c_max - c_min) * (m / g) ** a
            scale *= s / (1 - s) * m**b

            def rho(d, c=c):
                return c**2 * (np.sqrt(1 + (d / c) ** 2) - 1)
        of_picture = 0.0
        for channel in range(channels):
            left = error[channel]
            for _ in range(levels):
                split = blocks_of_two(left)
                left = split["ll"]
                for band, of_band in zip(("lh", "hl", "hh"), bands[1:], strict=True):
                    of_picture += of_band * rho(split[band]).sum()
            of_picture += bands[0] * rho(left).sum()
        total += scale * of_picture / (channels * height * width)
    return total / count


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("levels, huber, bands, masked", [
    (1, 0.0, EQUAL, False), (2, 0.0, (1.0, 2.0, 3.0, 4.0), False), (1, 0.3, EQUAL, True), (2, 0.0, EQUAL, True)])
def test_objective_equals_its_twin_in_numpy(name, levels, huber, bands, masked):
    velocity, latent, noise, sigma, weight = inputs_of_a_step()
    constants, mask = (0.1, 0.7, 0.4, 3.0, 0.2), None
    if name == "velocity":
        levels, huber, bands = 1, 0.0, EQUAL
    if masked:
        mask = torch.rand(3, 1, 8, 4, generator=seeded(1)) < 0.6
    huber = 0.0 if name == "snr_huber" else huber
    inputs = [t if t is None else t.numpy() for t in (velocity, latent, noise, sigma, weight)]
    twin = slow_objective(name, *inputs, bands, huber, levels, constants, None if mask is None else mask.numpy())
    loss = objective(name, velocity, latent, noise, sigma, weight, bands, huber, levels, constants, mask)
    assert abs(loss - twin) < 1e-12


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_pyramid_is_orthonormal_and_its_first_level_is_the_split(levels):
    """The transform of every unit vector: the matrix times its transpose is the identity."""
    units = torch.eye(64, dtype=torch.float64).reshape(64, 1, 8, 8)
    matrix = torch.cat([level.flatten(1) for level in haar_pyramid(units, levels)], dim=1)
    assert matrix.shape == (64, 64) and distance(matrix @ matrix.T, torch.eye(64, dtype=torch.float64)) < 1e-12
    z, _ = pair(2, 3, 8, 16)
    assert torch.equal(haar_pyramid(z, levels)[0].flatten(1, 2), haar_split(z)[:, 0 if levels == 1 else 3:])


def test_pyramid_equals_pytorch_wavelets():
    wavelets = pytest.importorskip("pytorch_wavelets")
    z, _ = pair(2, 3, 8, 16, dtype=torch.float32)
    low, high = wavelets.DWTForward(J=2, wave="haar", mode="zero")(z)  # high: (B, C, 3, h, w) of each level
    first, second = haar_pyramid(z, 2)
    assert distance(first.transpose(1, 2), high[0]) < 1e-6 and distance(second[:, 0], low) < 1e-6
    assert distance(second[:, 1:].transpose(1, 2), high[1]) < 1e-6


@pytest.mark.parametrize("b, expected", [
    (0.0, lambda s: s**3 / (2 * (1 - s))), (0.5, lambda s: s**2 / 2)])
def test_snr_huber_of_infinite_width_is_no_flow_matching(b, expected):
    """Against UltraFlux's "c to infinity and b = 0 recover flow matching": sigma³/(2(1 - sigma)) remains."""
    velocity, latent, noise, sigma, weight = inputs_of_a_step()
    sigma = 0.5 + sigma / 2.1  # SNR below g
    error = (velocity - (noise - latent)).square().mean((1, 2, 3))
    loss = objective("snr_huber", velocity, latent, noise, sigma, weight, EQUAL, 0.0, 1, (1e9, 1e9, 0.5, 5.0, b))
    assert abs(loss - (weight * expected(sigma) * error).mean()) < 1e-12
    if b:  # half the released form
        release = objective("release", velocity, latent, noise, sigma, weight, EQUAL, 0.0)
        assert abs(loss - release / 2) < 1e-12


def test_snr_huber_of_small_width_is_the_absolute_error_times_it():
    velocity, latent, noise, sigma, weight = inputs_of_a_step()
    bands = haar_split(sigma.reshape(-1, 1, 1, 1) * (velocity - (noise - latent))).abs().mean((1, 2, 3))
    c = 1e-15
    loss = objective("snr_huber", velocity, latent, noise, sigma, weight, EQUAL, 0.0, 1, (c, c, 0.5, 5.0, 0.0))
    assert abs(loss / c - (weight * sigma / (1 - sigma) * bands).mean()) < 1e-12


def test_snr_huber_is_finite_at_both_ends_and_exact_at_small_differences():
    velocity, latent, noise, _, weight = inputs_of_a_step()
    for b in (0.0, 0.5):
        sigma = torch.tensor([torch.finfo(torch.float32).eps, 0.5, 1.0])
        inputs = [t.float() for t in (velocity, latent, noise)]
        inputs[0].requires_grad_()
        loss = objective("snr_huber", *inputs, sigma, weight.float(), EQUAL, 0.0, 1, (0.2, 1.0, 0.5, 5.0, b))
        loss.backward()
        assert loss.isfinite() and inputs[0].grad.isfinite().all()
    close = (noise - latent + 1e-9).requires_grad_()  # where the formula as written loses all digits
    half = torch.full_like(weight, 0.5)
    loss = objective("snr_huber", close, latent, noise, half, torch.ones_like(weight), EQUAL, 0.0, 1, SNR_HUBER)
    assert abs(loss / (0.5 * (0.5e-9) ** 2) - 1) < 1e-5


def slow_mask(detail: np.ndarray, sigma: float) -> np.ndarray:
    """LWD's mask of the energy (h/2, w/2) of one picture: bilinear by hand, half-pixel centres, edges repeated."""
    height, width = 2 * detail.shape[0], 2 * detail.shape[1]
    large = np.zeros((height, width))
    for i, j in product(range(height), range(width)):
        y, x = max((i + 0.5) / 2 - 0.5, 0), max((j + 0.5) / 2 - 0.5, 0)
        top, left = int(y), int(x)
        bottom, right = min(top + 1, detail.shape[0] - 1), min(left + 1, detail.shape[1] - 1)
        upper = (1 - x + left) * detail[top, left] + (x - left) * detail[top, right]
        lower = (1 - x + left) * detail[bottom, left] + (x - left) * detail[bottom, right]
        large[i, j] = (1 - y + top) * upper + (y - top) * lower
    return (large - large.min()) / (large.max() - large.min() + 1e-8) + 0.3 >= sigma


@pytest.mark.parametrize("name", ["lwd", "lwd_release"])
def test_mask_equals_its_twin_in_numpy(name):
    _, latent, noise, _, _ = inputs_of_a_step()
    sigma = torch.tensor([0.4, 0.6, 0.9], dtype=torch.float64)
    z = interpolate(latent, noise, sigma)
    mask = detail_mask(name, latent, z, sigma)
    assert mask.shape == (3, 1, 8, 4) and 0 < mask.double().mean() < 1
    for k in range(3):
        channels = [blocks_of_two(channel) for channel in (latent if name == "lwd" else z)[k].numpy()]
        if name == "lwd":  # the mean over channels of the sum over bands
            detail = np.mean([c["lh"] ** 2 + c["hl"] ** 2 + c["hh"] ** 2 for c in channels], axis=0)
        else:  # the released index takes channels 0, 1, 2 for bands, and bands for channels
            detail = sum(np.mean([channels[k][band] ** 2 for band in ("lh", "hl", "hh")], axis=0) for k in range(3))
        assert (mask[k, 0].numpy() == slow_mask(detail, sigma[k].item())).all()


def test_mask_keeps_all_up_to_sigma_of_a_third_and_less_and_less_above():
    latent, noise = torch.randn(2, 1, 16, 16, 16, generator=seeded(2))
    kept = []
    for level in (0.0, 0.3, 0.5, 0.7, 0.9, 1.0, 1.29):
        sigma = torch.tensor([level])
        kept.append(detail_mask("lwd", latent, interpolate(latent, noise, sigma), sigma).double().mean().item())
    assert kept[:2] == [1, 1] and kept == sorted(kept, reverse=True) and kept[-1] < 0.01
    assert detail_mask(None, latent, noise, torch.ones(1)) is None
    flat = torch.ones(1, 16, 4, 4)  # without any detail: A is 0
    assert not detail_mask("lwd", flat, flat, torch.tensor([0.31])).any()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_complete_mask_changes_no_bit_and_masked_places_have_no_gradient(name):
    velocity, latent, noise, sigma, weight = inputs_of_a_step()
    velocity.requires_grad_()
    everywhere = torch.ones(3, 1, 8, 4, dtype=torch.bool)
    plain = objective(name, velocity, latent, noise, sigma, weight, EQUAL, 0.0)
    assert torch.equal(plain, objective(name, velocity, latent, noise, sigma, weight, EQUAL, 0.0, mask=everywhere))
    left = everywhere.clone()
    left[..., 2:] = False
    loss = objective(name, velocity, latent, noise, sigma, weight, EQUAL, 0.0, mask=left)
    (gradient,) = torch.autograd.grad(loss, velocity)
    assert not gradient[..., 2:].any() and gradient[..., :2].abs().min() > 0


def test_every_line_of_the_page_about_losses_runs_and_its_losses_are_finite():
    first, *blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "losses.md").read_text(), re.S)
    names = {}
    exec(first, names)
    results = []
    for line in "".join(blocks).splitlines():
        if re.match(r"[\w, ]+ = ", line):
            exec(line, names)
        else:
            results.append(eval(line, names))
    assert len(results) == 13 and all(result.isfinite().all() for result in results)
    text = (ROOT / "docs" / "losses.md").read_text()
    assert all(f"`{name}`" in text for name in (*OBJECTIVES, *MASKS))
    assert ", ".join(f"{value:g}" for value in SNR_HUBER[2:]) in text
