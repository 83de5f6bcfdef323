"""Haar wavelet split of a latent, and the wavelet fine-tuning (WLF) loss on its bands: equation 4 is `wlf_loss`.

Paper     Diffusion-4K section 3.2, equation 4
Mirrors   pytorch_wavelets.DWTForward(J=1, wave="haar", mode="zero") and the release; tests/test_wavelet.py
Shapes    B batch, C latent channels, h w latent height and width
Bands     of a 2x2 block [[a, b], [c, d]], in this order on the channel axis:
              LL = (a + b + c + d) / 2      LH = (a + b - c - d) / 2      (top minus bottom)
              HL = (a - b + c - d) / 2      HH = (a - b - c + d) / 2      (HL: left minus right)
          The paper's high-pass filter [-1, 1] gives LH and HL the other sign: no loss here depends on it.
Meaning   The transform is orthonormal: with equal bands, equation 4 is plain flow matching, w·|v̂ - v|² on velocities,
          σ²·w·|v̂ - v|² on denoised latents (the release). The wavelet changes training only through bands or huber.
Losses    docs/losses.md has them all: formula, source, what each equals when
New loss  add a branch to `objective` below and its name to OBJECTIVES: train.py offers it as --objective NAME
Check     python -m pytest tests/test_wavelet.py
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flow import SNR_HUBER, denoised, interpolate, snr_huber

BANDS = ("ll", "lh", "hl", "hh")
OBJECTIVES = ("paper", "release", "velocity", "noise", "snr_huber")
MASKS = ("lwd", "lwd_release")
KEPT_BELOW = 0.3  # LWD: up to this sigma every place is trained


def haar_split(z: Tensor) -> Tensor:
    """Split a latent into its four Haar bands, stacked on the channel axis.

    z        (B, C, h, w), float; h and w even
    returns  (B, 4C, h/2, w/2), order LL, LH, HL, HH, dtype of z; the sum of squares is unchanged
    raises   ValueError if h or w is odd: padding would break the energy identity
    """
    height, width = z.shape[-2:]
    if height % 2 or width % 2:
        raise ValueError(f"the Haar split needs even sides, got {height}x{width}: crop by one or change the size")
    top, bottom = z[..., 0::2, :], z[..., 1::2, :]
    low, high = top + bottom, top - bottom              # (B, C, h/2, w): vertical low-pass and high-pass
    ll, hl = low[..., 0::2] + low[..., 1::2], low[..., 0::2] - low[..., 1::2]          # (B, C, h/2, w/2)
    lh, hh = high[..., 0::2] + high[..., 1::2], high[..., 0::2] - high[..., 1::2]
    return torch.cat((ll, lh, hl, hh), dim=-3) * 0.5


def haar_join(bands: Tensor) -> Tensor:
    """Join four Haar bands, the inverse of `haar_split`: (B, 4C, h/2, w/2) -> (B, C, h, w), dtype of bands."""
    if bands.shape[-3] % 4:
        raise ValueError(f"four bands need a multiple of 4 channels, got {bands.shape[-3]}")
    ll, lh, hl, hh = (bands * 0.5).chunk(4, dim=-3)
    low = torch.stack((ll + hl, ll - hl), dim=-1).flatten(-2)               # (B, C, h/2, w): columns interleaved
    high = torch.stack((lh + hh, lh - hh), dim=-1).flatten(-2)
    return torch.stack((low + high, low - high), dim=-2).flatten(-3, -2)    # (B, C, h, w): rows interleaved


def haar_pyramid(z: Tensor, levels: int) -> list[Tensor]:
    """Split a latent, then its LL, and so on: an orthonormal transform of `levels` levels.

    z        (B, C, h, w); h and w multiples of 2^levels, else ValueError
    returns  level k, from 1: (B, 3, C, h/2^k, w/2^k), order LH, HL, HH; the last level begins with LL and has 4 bands
    """
    pyramid = []
    for level in range(1, levels + 1):
        bands = haar_split(z).unflatten(1, (len(BANDS), -1))
        pyramid.append(bands if level == levels else bands[:, 1:])
        z = bands[:, 0]
    return pyramid


def wlf_loss(prediction: Tensor, target: Tensor, weight: Tensor | None = None, bands: Sequence[float] = (1, 1, 1, 1),
             huber: float | Tensor = 0.0, levels: int = 1) -> Tensor:
    """Equation 4: the mean over images, bands and coefficients of weight · band weight · penalty(prediction - target).

    prediction  (B, C, h, w), a velocity (paper) or a denoised latent (release); `objective` below chooses
    target      (B, C, h, w), the same of the data
    weight      (B,), w_t of equation 4, from `flow.loss_weight`; None is 1
    bands       weights of LL, LH, HL, HH, each >= 0, not normalised: (1, 1, 1, 1) is the MSE
    huber       0: the square d². c > 0: pseudo-Huber 2c²(√(1 + d²/c²) - 1), which is d² for |d| << c and
                2c|d| for |d| >> c, so that single large coefficients pull less; unit of the latent. (B,): per image
    levels      of the transform; bands weighs LH, HL and HH of every level alike
    returns     scalar, fp32 (fp64 for fp64 inputs)
    raises      ValueError if a side is odd, shapes differ, bands are not four numbers >= 0, or huber < 0
    """
    if len(bands) != len(BANDS) or not all(0 <= band < math.inf for band in bands):
        raise ValueError(f"bands must be four numbers >= 0 for LL, LH, HL, HH, got {tuple(bands)}")
    if not isinstance(huber, Tensor) and huber < 0:
        raise ValueError(f"huber must be 0 (squared) or a positive width in units of the latent, got {huber}")
    per_image = 0
    for level, coefficients in enumerate(haar_pyramid(_difference(prediction, target), levels), start=1):
        per_band = _penalty(coefficients, huber).mean(dim=(2, 3, 4)).unbind(1)      # three or four of (B,)
        weighted = sum(band * loss for band, loss in zip(bands[-len(per_band):], per_band, strict=True))
        per_image = per_image + weighted / len(BANDS)**level    # a band of level k has 4^-k of the coefficients
    if weight is not None:
        if weight.shape != per_image.shape:
            raise ValueError(f"weight must be one number per image, ({len(per_image)},), got {tuple(weight.shape)}")
        per_image = per_image * weight
    return per_image.mean()


def band_losses(prediction: Tensor, target: Tensor) -> Tensor:
    """(B, 4): mean square difference of each image in LL, LH, HL and HH, fp32, for the log; a row's mean is the MSE."""
    (bands,) = haar_pyramid(_difference(prediction, target), 1)
    return bands.square().mean(dim=(2, 3, 4))


def _difference(prediction: Tensor, target: Tensor) -> Tensor:
    """prediction - target in fp32 or better; the transform is linear, so one of the difference does."""
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)}: shapes must agree")
    wide = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    return prediction.to(wide) - target.to(wide)


def _penalty(difference: Tensor, huber: float | Tensor) -> Tensor:
    """d² or pseudo-Huber, see wlf_loss; the latter rewritten to avoid cancellation at small d."""
    square = difference.square()
    if isinstance(huber, Tensor):
        huber = huber.reshape(-1, *[1] * (difference.ndim - 1))
    elif huber == 0:
        return square
    return 2 * square / ((1 + square / huber**2).sqrt() + 1)


def detail_mask(name: str | None, latent: Tensor, z: Tensor, sigma: Tensor) -> Tensor | None:
    """Where Latent Wavelet Diffusion (arXiv 2506.00433) trains: at high sigma only places with detail count.

    name     lwd          detail of the clean latent
             lwd_release  of z, as released. It takes channels 0, 1, 2 for LH, HL, HH, and these for channels; and z
                          is mostly noise where the mask acts
             None         no mask
    returns  (B, 1, h, w), bool: A + 0.3 >= sigma. A is the energy of LH, HL and HH, the mean over channels, enlarged
             bilinearly, scaled to 0..1 per picture
    """
    if name is None:
        return None
    high = haar_split(latent if name == "lwd" else z).unflatten(1, (len(BANDS), -1))[:, 1:]    # (B, 3, C, h/2, w/2)
    if name == "lwd_release":
        high = high[:, :, :3].transpose(1, 2)
    energy = high.square().sum(1).mean(1, keepdim=True)                                         # (B, 1, h/2, w/2)
    energy = F.interpolate(energy, z.shape[-2:], mode="bilinear", align_corners=False)
    low, most = (extreme.reshape(-1, 1, 1, 1) for extreme in energy.flatten(1).aminmax(dim=1))
    return (energy - low) / (most - low + 1e-8) + KEPT_BELOW >= sigma.reshape(-1, 1, 1, 1)


def objective(name: str, velocity: Tensor, latent: Tensor, noise: Tensor, sigma: Tensor, weight: Tensor,
              bands: tuple[float, ...], huber: float, levels: int = 1, constants: Sequence[float] | None = None,
              mask: Tensor | None = None) -> Tensor:
    """The training loss: equation 4 of the paper, or one of its alternatives.

    name      one of OBJECTIVES; with v = noise - latent, z = (1 - sigma)·latent + sigma·noise and w the weight
                paper     w·|haar(velocity) - haar(v)|²                               equation 4
                release   w·|haar(z - sigma·velocity) - haar(latent)|²                the released trainer
                velocity  w·|velocity - v|²                                           plain flow matching
                noise     w·|haar(z + (1 - sigma)·velocity) - haar(noise)|²           noise prediction
                snr_huber w·u·ρ(haar(z - sigma·velocity) - haar(latent)), ρ = c²(√(1 + d²/c²) - 1); c and u depend on
                          sigma, see flow.snr_huber                                   UltraFlux, arXiv 2511.18050
    velocity  predicted, (B, 16, h, w), as are latent and noise
    sigma     (B,), as is weight, from flow.loss_weight
    bands     weights of LL, LH, HL, HH, and huber, levels: see wlf_loss
    constants c_min, c_max, a, g, b of snr_huber; None: flow.SNR_HUBER
    mask      of detail_mask: elsewhere the prediction counts as right
    returns   scalar
    """
    if mask is not None:
        velocity = torch.where(mask, velocity, noise - latent)
    if name == "velocity":
        return (weight * _difference(velocity, noise - latent).square().mean((1, 2, 3))).mean()
    if name == "paper":
        return wlf_loss(velocity, noise - latent, weight, bands, huber, levels)
    z = interpolate(latent, noise, sigma)
    if name == "release":
        return wlf_loss(denoised(z, velocity, sigma), latent, weight, bands, huber, levels)
    if name == "noise":                                                                 # z + (1 - sigma)·velocity
        return wlf_loss(denoised(z, velocity, sigma - 1), noise, weight, bands, huber, levels)
    if name == "snr_huber":
        width, of_snr = snr_huber(sigma, *(constants or SNR_HUBER))                     # wlf_loss has 2ρ
        return wlf_loss(denoised(z, velocity, sigma), latent, weight * of_snr / 2, bands, width, levels)
    raise ValueError(f"no objective {name!r}: there are {', '.join(OBJECTIVES)}")
