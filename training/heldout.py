"""Held-out loss: the velocity's mean square error on pictures that are never trained on, by sigma bin and by band.

Fixed     a picture's latent, noise and sigmas follow from its name and --seed: equal weights give equal numbers on any
          number of ranks, after any restart, and with any --objective, --weighting and --mask
Sigma     one in each bin of the log: every bin has as many samples as there are pictures. The loss and its bands weigh
          the bins by how often training draws them, as the log does; by bin, runs of any --density compare
Passes    of one picture and one sigma, forward only: no number depends on a batch, and no pass needs more than training
Weights   those under training, not the average of --ema
Check     python -m pytest tests/test_heldout.py
"""

import filecmp
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flow import interpolate, sample_sigma
from flux import Flux
from machine.ranks import gathered
from mmdit import MMDiT
from training.cache import Embeddings, Latents
from training.logs import SIGMA_BINS
from training.model import autocast
from training.ranks import on_all, rank, world
from training.seeds import seed_of
from training.settings import Settings
from vae import VAE
from wavelet import BANDS, band_losses

DRAWS = 100_000
PASSES_PER_IMAGE = 1 / 15  # forward passes per trained picture; one takes 0.18 to 0.46 of that picture's training


def default_interval(pictures: int, batch: int) -> int:
    """Steps between held-out losses, so that they cost about 3 % of a run, or less."""
    return max(1, round(pictures * SIGMA_BINS / (PASSES_PER_IMAGE * batch)))


def first_shared(trained: Sequence[Path], held_out: Sequence[Path]) -> Path | None:
    """The first held-out file with the content of a trained one; contents are read where the sizes are equal."""
    of_size: dict[int, list[Path]] = {}
    for path in trained:
        of_size.setdefault(path.stat().st_size, []).append(path)
    return next((path for path in held_out for other in of_size.get(path.stat().st_size, ())
                 if filecmp.cmp(path, other, shallow=False)), None)


@dataclass(frozen=True)
class HeldOut:
    """Held-out pictures: names, first captions, (height, width) of the central crops, what was cached of both."""

    names: Sequence[str]
    captions: Sequence[str]
    sizes: Sequence[tuple[int, int]]
    texts: Embeddings
    latents: Latents
    vae: VAE

    def read(self, index: int, seed: int) -> tuple[Tensor, Tensor, Tensor, torch.Generator]:
        """Latent (1, 16, h, w), context and pooled of one picture; the generator that drew the latent."""
        generator = torch.Generator().manual_seed(seed_of(seed, zlib.crc32(self.names[index].encode())))
        moments = (m.to(self.texts.device).float() for m in self.latents.read(index, *self.sizes[index]))
        return self.vae.draw(*moments, generator), *self.texts.read([self.captions[index]]), generator


@torch.no_grad()
def held_out_row(model: MMDiT | Flux, held_out: HeldOut, settings: Settings) -> dict[str, object]:
    """The means over all pictures, for the log; all ranks together, since each may hold a part of the model."""
    count, mine = len(held_out.names), {}
    group, groups = rank() // settings.sequence, world() // settings.sequence  # of ranks that share a picture
    for first in range(0, count, groups):
        index = (first + group) % count
        mine[index] = _errors(model, *on_all(partial(held_out.read, index, settings.seed)), settings)
    of_picture = {index: errors for part in gathered(mine) for index, errors in part.items()}
    errors = torch.tensor([of_picture[index] for index in range(count)], dtype=torch.float64)  # (pictures, bins, bands)
    by_bin = errors.mean(0)                                                                     # (bins, bands)
    bands = (_shares_of_bins(settings)[:, None] * by_bin).sum(0)
    return {"loss": bands.mean().item(),
            **{f"v_{name}": round(loss, 5) for name, loss in zip(BANDS, bands.tolist(), strict=True)},
            "v_by_sigma": [round(loss, 5) for loss in by_bin.mean(1).tolist()], "pictures": count}


def _shares_of_bins(settings: Settings) -> Tensor:
    """(bins,): how often training draws a sigma of each, counted in draws."""
    drawn = sample_sigma(DRAWS, settings.density, settings.time_shift, generator=torch.Generator().manual_seed(0),
                         beta=settings.beta, within=settings.sigma_range)
    return torch.bincount((drawn * SIGMA_BINS).long().clamp(max=SIGMA_BINS - 1), minlength=SIGMA_BINS) / DRAWS


def _errors(model: MMDiT | Flux, latent: Tensor, context: Tensor, pooled: Tensor, generator: torch.Generator,
            settings: Settings) -> list[list[float]]:
    """Of one picture: for each sigma bin, the loss of each band."""
    errors, guidance = [], settings.guidance_shown
    guidance = None if guidance is None else torch.full((1,), guidance, device=latent.device)
    for k in range(SIGMA_BINS):
        sigma = ((k + torch.rand(1, generator=generator)) / SIGMA_BINS).to(latent.device)
        noise = torch.randn(latent.shape, generator=generator).to(latent.device)
        with autocast(settings):
            velocity = model(interpolate(latent, noise, sigma), sigma, context, pooled, guidance)
        errors.append(band_losses(velocity, noise - latent)[0].tolist())
    return errors
