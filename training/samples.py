"""Sample pictures of a run: drawn as sample.py would, from the first captions of the data, one grid per time.

Shift     with --no-latent-shift the VAE decodes without it too, while sample.py adds what the written file records
Check     python -m pytest tests/test_samples.py
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from checkpoint import Weights
from family import Family
from files import replacing
from flow import SEEDS, draw_noise, euler, velocity_with_cfg
from flux import Flux
from mmdit import MMDiT
from training.settings import Settings
from vae import VAE, to_pixels

SHOWN = 4  # captions that sample pictures are drawn from


@dataclass(frozen=True)
class SampleSettings:
    """How sample pictures are drawn during training."""

    sigmas: Tensor             # the schedule, (steps + 1,)
    shape: tuple[int, int, int]  # of a latent, (16, h, w)
    cfg: float
    guidance: float | None     # for Flux-dev
    factor: int
    seed: int                  # picture k is drawn from seed + k


def sample_settings_of(settings: Settings, family: Family, transformer: Weights, channels: int) -> SampleSettings:
    """How sample pictures are drawn: as sample.py would, at --res; ValueError if the schedule has coinciding levels.

    channels  of the latent
    """
    sampling, side = family.sampling(transformer), settings.res // settings.factor
    shift = sampling.time_shift or family.by_tokens(settings.tokens)
    if settings.sample_every:
        family.check_schedule(sampling.steps, shift, f"--sample-every at --res {settings.res}")
    sigmas = family.sigmas(sampling.steps, shift)
    return SampleSettings(sigmas, (channels, side, side), sampling.cfg, settings.guidance_shown,
                          settings.factor, settings.seed)


@torch.no_grad()
def draw_samples(model: MMDiT | Flux, vae: VAE, context: Tensor, pooled: Tensor, how: SampleSettings) -> list[Tensor]:
    """One picture per prompt from the model under training.

    context, pooled  (P + 1, L, C) and (P + 1, D): of the empty prompt, then of P prompts
    returns          P images, (3, H, W) in [-1, 1], on the CPU
    """
    images = []
    for k in range(1, len(context)):
        velocity = velocity_with_cfg(model, context[[k, 0]], pooled[[k, 0]], how.cfg, how.guidance)
        noise = draw_noise([(how.seed + k - 1) % SEEDS], how.shape).to(context.device)
        latent = euler(velocity, noise, how.sigmas)
        weight = next(vae.parameters())
        with torch.autocast(weight.device.type, enabled=False):  # the VAE computes in the dtype it is stored in
            images.append(vae.decode(latent.to(weight.dtype), how.factor)[0].float().cpu())
    return images


def write_grid(path: Path, images: list[Tensor]) -> None:
    """Images of one size side by side, in two rows from four on."""
    rows = 2 if len(images) >= 4 else 1
    columns = -(-len(images) // rows)
    height, width = images[0].shape[1:]
    grid = Image.new("RGB", (columns * width, rows * height))
    for k, image in enumerate(images):
        grid.paste(Image.fromarray(to_pixels(image)), (k % columns * width, k // columns * height))
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as temporary:
        grid.save(temporary)
