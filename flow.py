"""Rectified flow: the straight path from latent to noise, how σ is drawn and weighed, schedules, Euler.

Paper     Diffusion-4K section 3.2, equations 1 and 3; SD3 (arXiv 2403.03206) section 3.1 for the densities
Mirrors   sd3-ref ModelSamplingDiscreteFlow, flux get_schedule, the released trainers' loss weights;
          held by tests/test_flow.py
Shapes    B batch, C latent channels, h w latent height and width
Units     sigma in [0, 1]: 0 is the latent, 1 is pure noise; the models multiply it by 1000 themselves
Names     z = (1 - sigma)·latent + sigma·noise, velocity = noise - latent, denoised = z - sigma·velocity
          time shift s: sigma -> s·sigma / (1 + (s - 1)·sigma); Flux speaks of mu = log s
Check     python -m pytest tests/test_flow.py
"""

import math
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from tqdm import tqdm

DENSITIES = ("uniform", "logit_normal", "mode")
SCHEMES = ("none", "sigma_sqrt", "cosmap")
MODE_SCALE = 1.29  # SD3 section 3.1, the best "mode" run; also what diffusers defaults to
FLUX_MU = ((256, 0.5), (4096, 1.15))  # (tokens, mu): flux sampling.py, a line through both points
SD3_TIMESTEPS = 1000  # sd3-ref: the smallest sigma of its table is 1/1000, before the time shift


def _per_image(sigma: Tensor, z: Tensor) -> Tensor:
    return sigma.reshape(-1, *[1] * (z.ndim - 1))  # (B, 1, 1, 1)


def interpolate(latent: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(B, C, h, w): the point z on the path, equation 1 with alpha = 1 - sigma; sigma (B,)."""
    sigma = _per_image(sigma, latent)
    return (1 - sigma) * latent + sigma * noise


def denoised(z: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """(B, C, h, w): where the path through z ends if the velocity stays as it is; sigma (B,)."""
    return z - _per_image(sigma, z) * velocity


def time_shift(sigma: Tensor, shift: float) -> Tensor:
    """Move sigma towards noise (shift > 1) or towards the latent (shift < 1); 0 and 1 stay."""
    if shift <= 0:
        raise ValueError(f"a time shift is positive (1 leaves sigma as it is), got {shift}")
    return shift * sigma / (1 + (shift - 1) * sigma)


def sample_sigma(
    batch: int,
    density: str = "uniform",
    shift: float = 1.0,
    mean: float = 0.0,
    std: float = 1.0,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw one noise level per image for training.

    density    uniform       what the release trains Flux with
               logit_normal  sigmoid(mean + std·normal), what the release trains SD3 with (shift 3)
               mode          1 - u - 1.29·(cos²(πu/2) - 1 + u), u uniform
    shift      time shift applied after the draw
    mean, std  of the logit; a mean above 0 draws noisier levels, as in the SD3 paper. diffusers draws an
               index into a falling table instead, so there a mean has the opposite sign
    generator  draws happen on its device, so a CPU generator gives the same levels on every device
    returns    (B,) fp32 in (0, 1], continuous (the release rounds to 1000 levels)
    raises     ValueError for an unknown density, batch < 1, std <= 0 or shift <= 0
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    if std <= 0:
        raise ValueError(f"std must be positive, got {std}")
    drawn_on = device if generator is None else generator.device
    if density == "uniform":
        sigma = 1 - torch.rand(batch, generator=generator, device=drawn_on)  # never 0, where sigma_sqrt is infinite
    elif density == "logit_normal":
        sigma = torch.sigmoid(mean + std * torch.randn(batch, generator=generator, device=drawn_on))
    elif density == "mode":
        u = torch.rand(batch, generator=generator, device=drawn_on)
        sigma = 1 - u - MODE_SCALE * (torch.cos(math.pi / 2 * u).square() - 1 + u)
    else:
        raise ValueError(f"unknown density {density!r}, choose one of {', '.join(DENSITIES)}")
    sigma = sigma.clamp(torch.finfo(sigma.dtype).eps, 1)  # rounding must not leave the interval
    return time_shift(sigma, shift).clamp(max=1).to(device)


def loss_weight(sigma: Tensor, scheme: str = "none") -> Tensor:
    """The weight w_t of equation 4.

    sigma    (B,) in (0, 1]
    scheme   none        1
             sigma_sqrt  sigma^-2 (the release's name for it): undoes the sigma² of the denoised loss
             cosmap      2 / (π(1 - 2·sigma + 2·sigma²)), SD3 section 3.1
    returns  (B,)
    raises   ValueError for an unknown scheme
    """
    if scheme == "none":
        return torch.ones_like(sigma)
    if scheme == "sigma_sqrt":
        return sigma**-2
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    raise ValueError(f"unknown loss weight {scheme!r}, choose one of {', '.join(SCHEMES)}")


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"sampling needs at least 1 step, got {steps}")


def sd3_sigmas(steps: int, shift: float = 3.0) -> Tensor:
    """SD3's schedule, as the reference draws it.

    The lowest level of the reference's table is already shifted, becomes the end point of the line and is
    then shifted again with all others: the last level before 0 is higher than one shift would make it.
    Kept, because published images and weights were made so.

    steps    sampling steps, >= 1
    shift    time shift, 3 for SD3 and SD3.5 (4K fine-tuning included)
    returns  (steps + 1,) fp32 on the CPU, from 1 down to 0
    """
    _check_steps(steps)
    lowest = time_shift(torch.tensor(1 / SD3_TIMESTEPS, dtype=torch.float64), shift).item()
    line = torch.linspace(1, lowest, steps, dtype=torch.float64)
    return torch.cat((time_shift(line, shift), line.new_zeros(1))).float()


def flux_mu(tokens: int) -> float:
    """log of Flux's time shift for this many image tokens; the line goes on beyond its two points."""
    (x0, y0), (x1, y1) = FLUX_MU
    return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)


def even_sigmas(steps: int, shift: float = 1.0) -> Tensor:
    """Evenly spaced, then shifted once: Flux's schedule, whose time shift is exp(mu).

    steps    sampling steps, >= 1
    returns  (steps + 1,) fp32 on the CPU, from 1 down to 0
    """
    _check_steps(steps)
    return time_shift(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).float()


def flux_sigmas(steps: int, tokens: int, shift: bool = True) -> Tensor:
    """Flux's schedule for an image: the larger it is, the further it is shifted.

    steps    sampling steps, >= 1
    tokens   image tokens, (h/2)·(w/2): 16,384 for 4096 x 4096 at factor 16
    shift    False for schnell
    returns  (steps + 1,) fp32 on the CPU, from 1 down to 0
    """
    return even_sigmas(steps, math.exp(flux_mu(tokens)) if shift else 1.0)


def draw_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """Starting noise in which image k depends on seeds[k] alone, never on the batch it is in.

    seeds    one an image
    shape    (C, h, w)
    returns  (B, C, h, w) fp32 on the CPU, each image from a generator of its own
    """
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def euler(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, sigmas: Tensor, progress: bool = False) -> Tensor:
    """Follow the flow from noise to latent in straight steps.

    velocity  (z (B, C, h, w), sigma (B,)) -> (B, C, h, w); called once a step. cfg happens inside it
    noise     (B, C, h, w). z keeps its dtype: fp32 noise makes an fp32 path around a bf16 model
    sigmas    (steps + 1,), falling
    progress  a bar on stderr
    returns   (B, C, h, w), the latent where sigmas end at 0
    raises    ValueError if sigmas hold fewer than two levels or do not fall
    """
    levels = sigmas.tolist()  # the only point that waits for the device; free for a CPU schedule
    steps = list(pairwise(levels))
    if not steps or any(low >= high for high, low in steps):
        raise ValueError(f"sigmas must be two or more falling levels, got {levels}")
    z = noise
    sigma_dtype = torch.promote_types(noise.dtype, torch.float32)
    for sigma, next_sigma in tqdm(steps, desc="sampling", unit="step", file=sys.stderr, disable=not progress):
        v = velocity(z, torch.full((len(z),), sigma, dtype=sigma_dtype, device=z.device))
        z = z + (next_sigma - sigma) * v.to(z.dtype)
    return z


def velocity_with_cfg(model: Callable[..., Tensor], context: Tensor, pooled: Tensor, cfg: float,
                      guidance: float | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """The velocity that Euler follows, with classifier-free guidance: v_negative + cfg·(v_prompt - v_negative).

    model     an MMDiT or a Flux
    context   (2, L, C), of the prompt and of the negative prompt; pooled (2, P)
    cfg       1 follows the prompt alone, in one pass instead of two
    guidance  the number that Flux-dev is given; None for models that take none
    returns   function of z (1, 16, h, w) and sigma (1,)
    """
    given = None if guidance is None else torch.full((2,), guidance, device=context.device)

    def velocity(z: Tensor, sigma: Tensor) -> Tensor:
        if cfg == 1:
            return model(z, sigma, context[:1], pooled[:1], None if given is None else given[:1])
        prompt, negative = model(z.expand(2, -1, -1, -1), sigma.expand(2), context, pooled, given).chunk(2)
        return negative + cfg * (prompt - negative)

    return velocity
