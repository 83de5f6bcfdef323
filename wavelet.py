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
New loss  add a branch to `objective` below and its name to OBJECTIVES: train.py offers it as --objective NAME
Check     python -m pytest tests/test_wavelet.py
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flow import denoised, interpolate

BANDS = ("ll", "lh", "hl", "hh")
OBJECTIVES = ("paper", "release", "velocity", "noise")


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


def wlf_loss(prediction: Tensor, target: Tensor, weight: Tensor | None = None, bands: Sequence[float] = (1, 1, 1, 1),
             huber: float = 0.0) -> Tensor:
    """Equation 4: the mean over images, bands and coefficients of weight · band weight · penalty(prediction - target).

    prediction  (B, C, h, w), a velocity (paper) or a denoised latent (release); `objective` below chooses
    target      (B, C, h, w), the same of the data
    weight      (B,), w_t of equation 4, from `flow.loss_weight`; None is 1
    bands       weights of LL, LH, HL, HH, each >= 0, not normalised: (1, 1, 1, 1) is the MSE
    huber       0: the square d². c > 0: pseudo-Huber 2c²(√(1 + d²/c²) - 1), which is d² for |d| << c and
                2c|d| for |d| >> c, so that single large coefficients pull less; unit of the latent
    returns     scalar, fp32 (fp64 for fp64 inputs)
    raises      ValueError if a side is odd, shapes differ, bands are not four numbers >= 0, or huber < 0
    """
    if len(bands) != len(BANDS) or not all(0 <= band < math.inf for band in bands):
        raise ValueError(f"bands must be four numbers >= 0 for LL, LH, HL, HH, got {tuple(bands)}")
    if huber < 0:
        raise ValueError(f"huber must be 0 (squared) or a positive width in units of the latent, got {huber}")
    penalty = _band_differences(prediction, target).square()
    if huber > 0:  # the formula above, rewritten to avoid cancellation at small d
        penalty = 2 * penalty / ((1 + penalty / huber**2).sqrt() + 1)
    per_band = penalty.mean(dim=(2, 3, 4)).unbind(1)    # four of (B,)
    per_image = sum(band * loss for band, loss in zip(bands, per_band, strict=True)) / len(BANDS)
    if weight is not None:
        if weight.shape != per_image.shape:
            raise ValueError(f"weight must be one number per image, ({len(per_image)},), got {tuple(weight.shape)}")
        per_image = per_image * weight
    return per_image.mean()


def band_losses(prediction: Tensor, target: Tensor) -> Tensor:
    """(B, 4): mean square difference of each image in LL, LH, HL and HH, fp32, for the log; a row's mean is the MSE."""
    return _band_differences(prediction, target).square().mean(dim=(2, 3, 4))


def _band_differences(prediction: Tensor, target: Tensor) -> Tensor:
    """(B, 4, C, h/2, w/2): bands of prediction - target in fp32 or better; linear, so one split does."""
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)}: shapes must agree")
    wide = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    return haar_split(prediction.to(wide) - target.to(wide)).unflatten(1, (len(BANDS), -1))


def objective(name: str, velocity: Tensor, latent: Tensor, noise: Tensor, sigma: Tensor, weight: Tensor,
              bands: tuple[float, ...], huber: float) -> Tensor:
    """The training loss: equation 4 of the paper, or one of its alternatives.

    name      one of OBJECTIVES; with v = noise - latent, z = (1 - sigma)·latent + sigma·noise and w the weight
                paper     w·|haar(velocity) - haar(v)|²                               equation 4
                release   w·|haar(z - sigma·velocity) - haar(latent)|²                the released trainer
                velocity  w·|velocity - v|²                                           plain flow matching
                noise     w·|haar(z + (1 - sigma)·velocity) - haar(noise)|²           noise prediction
    velocity  predicted, (B, 16, h, w), as are latent and noise
    sigma     (B,), as is weight, from flow.loss_weight
    bands     weights of LL, LH, HL, HH, and huber: see wlf_loss
    returns   scalar
    """
    if name == "velocity":
        return (weight * (velocity - (noise - latent)).float().square().mean((1, 2, 3))).mean()
    if name == "paper":
        return wlf_loss(velocity, noise - latent, weight, bands, huber)
    z = interpolate(latent, noise, sigma)
    if name == "release":
        return wlf_loss(denoised(z, velocity, sigma), latent, weight, bands, huber)
    if name == "noise":
        return wlf_loss(denoised(z, velocity, sigma - 1), noise, weight, bands, huber)  # z + (1 - sigma)·velocity
    raise ValueError(f"no objective {name!r}: there are {', '.join(OBJECTIVES)}")
