"""Rectified flow: the straight path from latent to noise, how σ is drawn and weighed, schedules, guidance, solvers.

Paper     Diffusion-4K section 3.2, equations 1 and 3; SD3 (arXiv 2403.03206) section 3.1 for the densities
Mirrors   sd3-ref ModelSamplingDiscreteFlow, flux get_schedule, the released trainers' loss weights; tests/test_flow.py
Shapes    B batch, C latent channels, h w latent height and width
Units     sigma in [0, 1]: 0 is the latent, 1 is pure noise; the models multiply it by 1000 themselves
Names     z = (1 - sigma)·latent + sigma·noise, velocity = noise - latent, denoised = z - sigma·velocity
          time shift s: sigma -> s·sigma / (1 + (s - 1)·sigma); Flux's mu is log s
          cfg: the scale of classifier-free guidance (two passes); guidance: the number that Flux-dev is given
Check     python -m pytest tests/test_flow.py
"""

import math
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from tqdm import tqdm

DENSITIES = ("uniform", "logit_normal", "mode", "beta")
SCHEMES = ("none", "sigma_sqrt", "cosmap")
MODE_SCALE = 1.29  # SD3 section 3.1, the best "mode" run; also the default of diffusers
SNR_HUBER = (0.2, 1.0, 0.5, 5.0, 0.5)  # c_min, c_max as UltraFlux published them; a, g, b it did not: these are ours
Line = tuple[tuple[float, float], tuple[float, float]]
FLUX_MU: Line = ((256, 0.5), (4096, 1.15))  # (tokens, mu): flux sampling.py, a line through both points
SEEDS = 2**32  # what torch's generator on the CPU distinguishes
SD3_TIMESTEPS = 1000  # sd3-ref: the smallest sigma of its table is 1/1000, before the time shift


# ---- the path

def _per_image(sigma: Tensor, z: Tensor) -> Tensor:
    return sigma.reshape(-1, *[1] * (z.ndim - 1))  # (B, 1, 1, 1)


def interpolate(latent: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(B, C, h, w): the point z on the path, equation 1 with alpha = 1 - sigma; sigma (B,)."""
    sigma = _per_image(sigma, latent)
    return (1 - sigma) * latent + sigma * noise


def denoised(z: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """(B, C, h, w): the latent where the path through z ends at constant velocity; sigma (B,)."""
    return z - _per_image(sigma, z) * velocity


def time_shift(sigma: Tensor, shift: float) -> Tensor:
    """Move sigma towards noise (shift > 1) or towards the latent (shift < 1); 0 and 1 are fixed points."""
    if shift <= 0:
        raise ValueError(f"the time shift must be positive (1 leaves sigma as it is), got {shift}")
    return shift * sigma / (1 + (shift - 1) * sigma)


# ---- training: how σ is drawn, how its loss is weighed

def sample_sigma(batch: int, density: str = "uniform", shift: float = 1.0, mean: float = 0.0, std: float = 1.0,
                 generator: torch.Generator | None = None, device: torch.device | str | None = None,
                 beta: tuple[int, int] = (2, 4), within: tuple[float, float] | None = None) -> Tensor:
    """Draw one noise level σ per image for training.

    density    uniform       the release's for Flux
               logit_normal  sigmoid(mean + std·normal), the release's for SD3 (shift 3)
               mode          1 - u - 1.29·(cos²(πu/2) - 1 + u), u uniform
               beta          Beta(beta); (2, 4) is UltraHR-100K's towards the latent, 20·sigma·(1 - sigma)³
    shift      time shift applied after the draw
    mean, std  of the logit. mean > 0 draws noisier levels (SD3's convention; the sign in diffusers is opposite)
    generator  it draws on its own device: a CPU generator gives the same levels on every device
    within     lowest and highest sigma: others are drawn again, after the shift
    returns    (B,) fp32 in (0, 1], continuous (the release rounds to 1000 levels)
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    if std <= 0:
        raise ValueError(f"std must be positive, got {std}")
    draw_device = device if generator is None else generator.device
    if density == "uniform":
        sigma = 1 - torch.rand(batch, generator=generator, device=draw_device)  # in (0, 1]
    elif density == "logit_normal":
        sigma = torch.sigmoid(mean + std * torch.randn(batch, generator=generator, device=draw_device))
    elif density == "mode":
        u = torch.rand(batch, generator=generator, device=draw_device)
        sigma = 1 - u - MODE_SCALE * (torch.cos(math.pi / 2 * u).square() - 1 + u)
    elif density == "beta":  # Beta(a, b) is the a-th smallest of a + b - 1 uniform numbers
        sigma = torch.rand(batch, sum(beta) - 1, generator=generator, device=draw_device).kthvalue(beta[0]).values
    else:
        raise ValueError(f"unknown density {density!r}, choose one of {', '.join(DENSITIES)}")
    sigma = sigma.clamp(torch.finfo(sigma.dtype).eps, 1)  # rounding must not leave the interval
    sigma = time_shift(sigma, shift).clamp(max=1)
    while within and (outside := (sigma < within[0]) | (sigma > within[1])).any():
        sigma[outside] = sample_sigma(int(outside.sum()), density, shift, mean, std, generator, draw_device, beta)
    return sigma.to(device)


def loss_weight(sigma: Tensor, scheme: str = "none") -> Tensor:
    """The weight w_t of equation 4, (B,), for `wavelet.wlf_loss`.

    sigma    (B,) in (0, 1]
    scheme   none        1
             sigma_sqrt  sigma^-2, the release's name: cancels the sigma² of the loss on denoised latents. Capped at
                         10^6, its value at sigma 0.001, the smallest of the release's levels
             cosmap      2 / (π(1 - 2·sigma + 2·sigma²)), SD3 section 3.1
    """
    if scheme == "none":
        return torch.ones_like(sigma)
    if scheme == "sigma_sqrt":
        return sigma.clamp(min=1 / 1000)**-2
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    raise ValueError(f"unknown loss weight {scheme!r}, choose one of {', '.join(SCHEMES)}")


def snr_huber(sigma: Tensor, c_min: float, c_max: float, a: float, g: float, b: float) -> tuple[Tensor, Tensor]:
    """Width c and weight u of UltraFlux's loss, for `wavelet.objective`.

    sigma    (B,) in (0, 1]. SNR = ((1 - sigma) / sigma)², m = min(SNR, g)
    returns  c = c_min + (c_max - c_min)·(m / g)^a, (B,), in units of the latent
             u = sigma / (1 - sigma)·m^b, (B,); beyond sigma 0.999 as there, since it grows without bound for b < 1/2
    """
    def m(sigma: Tensor) -> Tensor:
        return ((1 - sigma) / sigma).square().clamp(max=g)

    below_one = sigma.clamp(max=1 - 1 / 1000)
    return c_min + (c_max - c_min) * (m(sigma) / g)**a, below_one / (1 - below_one) * m(below_one)**b


# ---- schedules

def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"sampling needs at least 1 step, got {steps}")


def sd3_sigmas(steps: int, shift: float = 3.0) -> Tensor:
    """SD3's schedule, (steps + 1,) fp32 on the CPU from 1 to 0; the shift is 3 for SD3 and SD3.5, also at 4K.

    The reference shifts twice: it shifts the lowest level, builds the linspace to it, then shifts all of it. The last
    level before 0 is therefore higher than one shift makes it, as in all published results.
    """
    _check_steps(steps)
    lowest = time_shift(torch.tensor(1 / SD3_TIMESTEPS, dtype=torch.float64), shift).item()
    line = torch.linspace(1, lowest, steps, dtype=torch.float64)
    return torch.cat((time_shift(line, shift), line.new_zeros(1))).float()


def flux_mu(tokens: int, line: Line = FLUX_MU) -> float:
    """Log of Flux's time shift, linear in the number of image tokens, extrapolated beyond both points of the line."""
    (x0, y0), (x1, y1) = line
    return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)


def flux_time_shift(tokens: int, line: Line = FLUX_MU, linear: bool = False) -> float:
    """exp(mu); where a scheduler's time_shift_type is linear, mu itself. ValueError if it is not above 0.

    With 50 steps and 33,300 tokens or more, the last noise level before 0 is above 0.9. mu is capped at 700, as exp
    would overflow.
    """
    mu = flux_mu(tokens, line)
    if linear and mu <= 0:
        raise ValueError(f"a linear time shift of {mu:g} for {tokens:,} image tokens; give --time-shift")
    return mu if linear else math.exp(min(mu, 700))


def even_sigmas(steps: int, shift: float = 1.0) -> Tensor:
    """(steps + 1,) fp32 on the CPU: even levels from 1 to 0, shifted once; Flux's schedule if the shift is exp(mu)."""
    _check_steps(steps)
    return time_shift(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).float()


def flux_sigmas(steps: int, tokens: int, shift: bool = True) -> Tensor:
    """Flux's schedule, (steps + 1,) fp32 on the CPU from 1 to 0: the more tokens, the larger the time shift.

    tokens   image tokens, (h/2)·(w/2): 16,384 for 4096 x 4096 at factor 16
    shift    False for schnell
    """
    return even_sigmas(steps, math.exp(flux_mu(tokens)) if shift else 1.0)


# ---- sampling

def draw_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """Initial noise (B, C, h, w), fp32 on the CPU, of one generator per image: image k depends on seeds[k] alone.

    ValueError unless seeds are 0 to 2^32 - 1: the generator ignores higher bits, and 7 + 2^32 would repeat 7.
    """
    if wide := [seed for seed in seeds if not 0 <= seed < SEEDS]:
        raise ValueError(f"seed {wide[0]}: give 0 to 2^32 - 1")
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def velocity_with_cfg(model: Callable[..., Tensor], context: Tensor, pooled: Tensor, cfg: float,
                      guidance: float | None = None, batched: bool = True) -> Callable[[Tensor, Tensor], Tensor]:
    """The velocity that `euler` integrates, with classifier-free guidance: negative + cfg·(prompt - negative).

    model            an MMDiT or a Flux
    context, pooled  (2, L, C) and (2, P), of the prompt and of the negative prompt
    cfg              1 uses the prompt alone, in one pass with a batch of 1 instead of 2
    guidance         the number that Flux-dev is given; None for models that take none
    batched          False: two passes one after the other, which take half the activations
    returns          function of z (1, C, h, w) and sigma (1,)
    """
    def of(z: Tensor, sigma: Tensor, which: slice) -> Tensor:
        numbers = None if guidance is None else torch.full_like(sigma, guidance)
        return model(z, sigma, context[which], pooled[which], numbers)

    def velocity(z: Tensor, sigma: Tensor) -> Tensor:
        if cfg == 1:
            return of(z, sigma, slice(1))
        if batched:
            prompt, negative = of(z.expand(2, -1, -1, -1), sigma.expand(2), slice(2)).chunk(2)
        else:
            prompt, negative = of(z, sigma, slice(1)), of(z, sigma, slice(1, 2))
        return negative + cfg * (prompt - negative)

    return velocity


def euler(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, sigmas: Tensor,
          progress: bool = False) -> Tensor:
    """Integrate the flow from noise to latent in Euler steps.

    velocity  (z (B, C, h, w), sigma (B,)) -> (B, C, h, w), called once per step; cfg happens inside it
    noise     (B, C, h, w). z keeps its dtype: fp32 noise makes an fp32 path around a bf16 model
    sigmas    (steps + 1,), decreasing, else ValueError
    progress  show a bar on stderr
    returns   (B, C, h, w), the latent if sigmas end at 0
    """
    return _integrate(velocity, noise, sigmas, progress, second_order=False)


def ab2(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, sigmas: Tensor, progress: bool = False) -> Tensor:
    """Adams-Bashforth of order 2 with steps of any size, as euler: half the step, a quarter of the error.

    The velocity of a step is extrapolated to its middle from this and the last evaluation; the first step is Euler's.
    """
    return _integrate(velocity, noise, sigmas, progress, second_order=True)


SOLVERS = {"euler": euler, "ab2": ab2}


def _integrate(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, sigmas: Tensor, progress: bool,
               second_order: bool) -> Tensor:
    levels = sigmas.tolist()  # synchronises once; no cost if sigmas are on the CPU
    steps = list(pairwise(levels))
    if not steps or any(low >= high for high, low in steps):
        raise ValueError(f"sigmas must be two or more decreasing levels, got {levels}")
    z, sigma_dtype, before = noise, torch.promote_types(noise.dtype, torch.float32), None
    for sigma, next_sigma in tqdm(steps, desc="sampling", unit="step", file=sys.stderr, disable=not progress):
        v = velocity(z, torch.full((len(z),), sigma, dtype=sigma_dtype, device=z.device)).to(z.dtype)
        h = next_sigma - sigma
        z = z + h * (v if before is None else v + h / (2 * before[0]) * (v - before[1]))
        before = (h, v) if second_order else None
    return z
