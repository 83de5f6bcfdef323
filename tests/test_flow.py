"""Rectified flow: path, densities, weights, official schedules, Euler, noise per image."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import seeded
from golden import distance

from flow import (
    ab2,
    denoised,
    draw_noise,
    euler,
    flux_mu,
    flux_sigmas,
    flux_time_shift,
    interpolate,
    loss_weight,
    sample_sigma,
    sd3_sigmas,
    snr_huber,
    time_shift,
    velocity_with_cfg,
)

SCHEDULES = json.loads((Path(__file__).parent / "data" / "schedules.json").read_text())
SD3_CASES = [name for name in SCHEDULES["sd3_official"] if "_steps" in name]
FLUX_CASES = list(SCHEDULES["flux_official"])


def distance_to(ours: torch.Tensor, numbers: list[float]) -> float:
    return distance(ours.double(), torch.tensor(numbers, dtype=torch.float64))


@pytest.mark.parametrize("name", SD3_CASES)
def test_sd3_schedule_is_the_official_one(name):
    shift, steps = name.removeprefix("shift").split("_steps")
    assert distance_to(sd3_sigmas(int(steps), float(shift)), SCHEDULES["sd3_official"][name]) < 1e-6


@pytest.mark.parametrize("name", FLUX_CASES)
def test_flux_schedule_is_the_official_one(name):
    kind, steps, *tokens = name.split("_")
    tokens = int(tokens[0].removeprefix("seq")) if tokens else 4096
    ours = flux_sigmas(int(steps.removeprefix("steps")), tokens, shift=kind == "dev")
    assert distance_to(ours, SCHEDULES["flux_official"][name]) < 1e-6


def test_schedules_equal_those_of_diffusers():
    golden = SCHEDULES["diffusers"]
    assert distance_to(sd3_sigmas(28), golden["sd3_shift3_steps28"]["sigmas"]) < 1e-6
    assert distance_to(flux_sigmas(50, 16384), golden["flux_dyn_steps50_seq16384"]["sigmas"]) < 1e-6


def test_flux_mu_extends_beyond_its_two_points():
    for tokens, mu in SCHEDULES["flux_mu"].items():
        assert abs(flux_mu(int(tokens)) - mu) < 1e-12


@pytest.mark.parametrize("sigmas", [sd3_sigmas(1), sd3_sigmas(28), flux_sigmas(1, 256), flux_sigmas(50, 65536),
                                    flux_sigmas(4, 256, shift=False)])
def test_schedules_fall_from_one_to_zero(sigmas):
    assert sigmas[0] == 1 and sigmas[-1] == 0 and sigmas.dtype == torch.float32
    assert (sigmas.diff() < 0).all()


def test_path_ends_and_denoised():
    latent, noise = draw_noise([1, 2], (3, 4, 6)).double(), draw_noise([3, 4], (3, 4, 6)).double()
    assert torch.equal(interpolate(latent, noise, torch.zeros(2)), latent)
    assert torch.equal(interpolate(latent, noise, torch.ones(2)), noise)
    sigma = torch.tensor([0.3, 0.8], dtype=torch.float64)
    z = interpolate(latent, noise, sigma)
    assert (denoised(z, noise - latent, sigma) - latent).abs().max() < 1e-12


@pytest.mark.parametrize("sigmas", [sd3_sigmas(1), sd3_sigmas(7), flux_sigmas(5, 16384)])
def test_euler_is_exact_on_a_straight_flow(sigmas):
    latent, noise = draw_noise([1, 2], (3, 4, 6)).double(), draw_noise([3, 4], (3, 4, 6)).double()
    seen = []

    def velocity(z, sigma):
        assert sigma.shape == (2,)
        assert (z - interpolate(latent, noise, sigma)).abs().max() < 1e-12
        seen.append(sigma[0].item())
        return noise - latent

    assert (euler(velocity, noise, sigmas) - latent).abs().max() < 1e-12
    assert seen == sigmas[:-1].tolist()


def test_euler_approaches_the_exact_flow_of_gaussian_data():
    # data N(0, 0.5²): the velocity is linear in z and noise ends at 0.5·noise; halving the step halves the error
    noise = torch.linspace(-2, 2, 16, dtype=torch.float64).reshape(1, 1, 4, 4)

    def velocity(z, sigma):
        s = sigma.reshape(-1, 1, 1, 1)
        return z * (s - (1 - s) * 0.25) / ((1 - s) ** 2 * 0.25 + s**2)

    errors = [distance(euler(velocity, noise, flux_sigmas(steps, 256)), 0.5 * noise) for steps in (50, 100, 200)]
    assert errors[2] < 0.01
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.15) and errors[1] / errors[2] == pytest.approx(2, rel=0.15)


def test_ab2_is_of_second_order_on_uneven_steps_and_begins_with_euler():
    noise = torch.ones(1, 1, 1, 1, dtype=torch.float64)

    def velocity(z: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return z * sigma.view(-1, 1, 1, 1).cos()  # dz/dsigma: z(0) = exp(-sin 1)

    def error(solver, steps: int) -> float:
        return abs(solver(velocity, noise, sd3_sigmas(steps).double()).item() - math.exp(-math.sin(1)))
    first, second = ([error(solver, steps) for steps in (40, 80, 160)] for solver in (euler, ab2))
    assert all(1.7 < a / b < 2.3 for a, b in pairwise(first)) and all(3.4 < a / b < 4.6 for a, b in pairwise(second))
    assert second[0] < first[2]
    one = torch.tensor([1.0, 0.0])
    assert torch.equal(ab2(velocity, noise, one), euler(velocity, noise, one))


def test_euler_keeps_an_fp32_path_around_a_bf16_model():
    noise = draw_noise([0], (2, 4, 4))
    latent = euler(lambda z, sigma: z.bfloat16() * 0.1, noise, sd3_sigmas(4))
    assert latent.dtype == torch.float32


def test_progress_bar_goes_to_stderr(capfd):
    euler(lambda z, sigma: z, draw_noise([0], (1, 2, 2)), sd3_sigmas(2), progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "2/2" in err


@pytest.mark.parametrize("guidance", [None, 3.5])
def test_cfg_moves_from_the_negative_prompt_past_the_prompt_and_1_is_a_pass_of_the_prompt_alone(guidance):
    calls = []

    def model(z, sigma, context, pooled, number):
        calls.append((len(z), sigma.tolist(), None if number is None else number.tolist()))
        return z * sigma[:, None, None, None] + (context.mean((1, 2)) + pooled.sum(1))[:, None, None, None]

    z, sigma = draw_noise([0], (3, 4, 6)), torch.tensor([0.5])
    context, pooled = torch.stack((torch.ones(5, 2), 3 * torch.ones(5, 2))), torch.tensor([[1.0, 1.0], [8.0, 8.0]])
    prompt, negative = 0.5 * z + 1 + 2, 0.5 * z + 3 + 16
    guided = velocity_with_cfg(model, context, pooled, 4.0, guidance)(z, sigma)
    assert distance(guided, negative + 4 * (prompt - negative)) < 1e-5
    assert distance(velocity_with_cfg(model, context, pooled, 1.0, guidance)(z, sigma), prompt) < 1e-6
    numbers = None if guidance is None else [guidance]
    assert calls == [(2, [0.5, 0.5], numbers and 2 * numbers), (1, [0.5], numbers)]


def test_a_time_shift_by_tokens_is_a_line_in_its_logarithm_and_never_overflows():
    assert math.isclose(flux_time_shift(1024), math.exp(0.63))
    line = ((100, 0.2), (300, 1.0))
    assert math.isclose(flux_time_shift(500, line), math.exp(1.8))
    assert math.isclose(flux_time_shift(500, line, linear=True), 1.8)
    assert math.isfinite(flux_time_shift(10**9))
    with pytest.raises(ValueError, match="a linear time shift of -0.2 for 0 image tokens"):
        flux_time_shift(0, line, linear=True)


@pytest.mark.parametrize("seed", [-1, 2**32, 7 + 2**40, 2**64])
def test_seeds_that_the_generator_does_not_distinguish_are_refused(seed):
    assert torch.randn(3, generator=seeded(7)).equal(torch.randn(3, generator=seeded(7 + 2**40)))
    with pytest.raises(ValueError, match=f"seed {seed}: give 0 to"):
        draw_noise([0, seed], (1, 2, 2))


def test_noise_of_an_image_does_not_depend_on_its_batch():
    together = draw_noise([5, 6, 7], (16, 4, 6))
    assert torch.equal(together[1:2], draw_noise([6], (16, 4, 6)))
    assert not torch.equal(together[0], together[1])
    assert torch.equal(together[1], torch.randn(16, 4, 6, generator=seeded(6)))


@pytest.mark.parametrize("density", ["uniform", "logit_normal", "mode", "beta"])
def test_drawn_sigmas_repeat_and_stay_inside(density):
    sigma = sample_sigma(20_000, density, shift=3.0, generator=seeded(0))
    assert torch.equal(sigma, sample_sigma(20_000, density, shift=3.0, generator=seeded(0)))
    assert sigma.shape == (20_000,) and sigma.dtype == torch.float32
    assert sigma.min() > 0 and sigma.max() <= 1


def test_uniform_density_has_the_moments_of_a_uniform():
    sigma = sample_sigma(100_000, generator=seeded(0))
    assert abs(sigma.mean() - 1 / 2) < 0.005 and abs(sigma.var() - 1 / 12) < 0.002


@pytest.mark.parametrize(("mean", "shift"), [(0.0, 1.0), (0.0, 3.0), (-0.5, 1.0), (0.5, 3.0)])
def test_logit_normal_median_is_the_shifted_sigmoid(mean, shift):
    sigma = sample_sigma(100_000, "logit_normal", shift=shift, mean=mean, generator=seeded(0))
    odds = shift * math.exp(mean)  # a time shift multiplies the odds: 3/4 for mean 0 and shift 3
    assert abs(sigma.median() - odds / (1 + odds)) < 0.005
    assert abs(torch.logit(sigma, eps=1e-6).std() - 1) < 0.02


def test_mode_density_has_the_moments_of_its_formula():
    sigma = sample_sigma(200_000, "mode", generator=seeded(0))
    # over u uniform: mean 1/2 by symmetry; second moment by quadrature of the formula
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    formula = 1 - u - 1.29 * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
    assert abs(sigma.mean() - 0.5) < 0.005 and abs(sigma.double().var() - formula.var()) < 0.002


@pytest.mark.parametrize("a, b", [(2, 4), (1, 1), (5, 2)])
def test_beta_density_has_the_moments_and_the_distribution_of_a_beta(a, b):
    sigma = sample_sigma(200_000, "beta", generator=seeded(0), beta=(a, b)).double()
    assert abs(sigma.mean() - a / (a + b)) < 0.002
    assert abs(sigma.var() - a * b / ((a + b) ** 2 * (a + b + 1))) < 0.001  # (2, 4): 1/3 and 2/63
    if (a, b) == (2, 4):  # the integral of 20 s (1 - s)^3
        for level in (0.1, 0.3, 0.5, 0.8):
            assert abs((sigma < level).double().mean() - (1 - (1 - level) ** 4 * (1 + 4 * level))) < 0.005


@pytest.mark.parametrize("density", ["uniform", "logit_normal", "mode", "beta"])
def test_range_of_sigma_is_the_density_restricted_to_it(density):
    drawn = sample_sigma(50_000, density, 3.0, generator=seeded(0))
    inside = sample_sigma(50_000, density, 3.0, generator=seeded(1), within=(0.3, 0.6))
    kept = drawn[(drawn >= 0.3) & (drawn <= 0.6)]
    assert inside.min() >= 0.3 and inside.max() <= 0.6
    for share in (0.25, 0.5, 0.75):
        assert abs(inside.quantile(share) - kept.quantile(share)) < 0.01
    assert torch.equal(sample_sigma(9, density, generator=seeded(2), within=(0.0, 1.0)),
                       sample_sigma(9, density, generator=seeded(2)))


def test_width_and_weight_of_snr_huber_by_hand():
    """At sigma 0.5, SNR is 1; towards 0 it stops at g; at 1 the weight is that of 0.999."""
    sigma = torch.tensor([0.5, 0.1, 0.999, 1.0], dtype=torch.float64)
    width, weight = snr_huber(sigma, 0.2, 1.0, 0.5, 4.0, 0.5)
    assert distance_to(width, [0.6, 1.0, 0.2 + 0.4 / 999, 0.2]) < 1e-12
    assert distance_to(weight, [1.0, 2 / 9, 1.0, 1.0]) < 1e-12
    assert distance_to(snr_huber(sigma, 0.2, 1.0, 0.5, 4.0, 0.0)[1], [1, 1 / 9, 999, 999]) < 1e-9


def test_mode_density_equals_diffusers():
    training_utils = pytest.importorskip("diffusers.training_utils")
    torch.manual_seed(3)
    theirs = training_utils.compute_density_for_timestep_sampling("mode", 1000, mode_scale=1.29)
    ours = sample_sigma(1000, "mode", generator=seeded(3))
    assert (ours - theirs).abs().max() < 1e-6


def test_time_shift_of_flux_is_that_of_sd3():
    sigma = torch.linspace(0.01, 1, 50, dtype=torch.float64)
    mu = 1.15
    assert (time_shift(sigma, math.exp(mu)) - math.exp(mu) / (math.exp(mu) + 1 / sigma - 1)).abs().max() < 1e-12
    assert torch.equal(time_shift(sigma, 1.0), sigma)


def test_loss_weights_by_hand():
    sigma = torch.tensor([0.5, 1.0], dtype=torch.float64)
    assert loss_weight(sigma).tolist() == [1, 1]
    assert loss_weight(sigma, "sigma_sqrt").tolist() == [4, 1]
    assert distance_to(loss_weight(sigma.new_tensor([1e-7, 1e-3, 2e-3]), "sigma_sqrt"), [1e6, 1e6, 2.5e5]) < 1e-6
    assert distance_to(loss_weight(sigma, "cosmap"), [4 / math.pi, 2 / math.pi]) < 1e-12


def test_wrong_arguments_are_refused():
    for call in (lambda: sd3_sigmas(0), lambda: flux_sigmas(0, 256), lambda: flux_sigmas(-1, 256, shift=False)):
        with pytest.raises(ValueError, match="at least 1 step"):
            call()
    with pytest.raises(ValueError, match="time shift"):
        sd3_sigmas(4, shift=0.0)
    with pytest.raises(ValueError, match="density"):
        sample_sigma(1, "normal")
    with pytest.raises(ValueError, match="batch"):
        sample_sigma(0)
    with pytest.raises(ValueError, match="std"):
        sample_sigma(1, "logit_normal", std=0.0)
    with pytest.raises(ValueError, match="loss weight"):
        loss_weight(torch.ones(1), "min_snr")
    for sigmas in (torch.tensor([1.0]), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0, 0.0])):
        with pytest.raises(ValueError, match="decreasing"):
            euler(lambda z, sigma: z, torch.zeros(1, 1, 2, 2), sigmas)
