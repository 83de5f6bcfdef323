"""Haar wavelet split of a latent, and the wavelet fine-tuning (WLF) loss on its bands.

Paper     Diffusion-4K section 3.2, equation 4
Mirrors   pytorch_wavelets.DWTForward(J=1, wave="haar", mode="zero") and the released training step;
          held by tests/test_wavelet.py
Shapes    B batch, C latent channels, h w latent height and width
Bands     for a 2x2 block [[a, b], [c, d]], in this order on the channel axis:
              LL = (a + b + c + d) / 2      LH = (a + b - c - d) / 2      (top minus bottom)
              HL = (a - b + c - d) / 2      HH = (a - b - c + d) / 2      (HL: left minus right)
          The paper's high-pass filter [-1, 1] gives LH and HL the other sign: no loss can tell.
Check     python -m pytest tests/test_wavelet.py

The transform is orthonormal, so the mean square over the bands is the mean square over the latent.
Equation 4 with equal bands is therefore plain flow matching: on velocities it is w·|v̂ - v|², on
denoised latents (what the release compares) σ²·w·|v̂ - v|². The wavelet changes training only where
the bands are told apart (`bands`) or where the loss is not a square (`huber`).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BANDS = ("ll", "lh", "hl", "hh")


def haar_split(z: Tensor) -> Tensor:
    """Split a latent into its four Haar bands, stacked on the channel axis.

    z        (B, C, h, w), float; h and w even
    returns  (B, 4C, h/2, w/2), order LL, LH, HL, HH, dtype of z; the sum of squares is unchanged
    raises   ValueError if h or w is odd: padding would break the energy identity
    """
    if z.shape[-2] % 2 or z.shape[-1] % 2:
        raise ValueError(f"the Haar split needs even sides, got {z.shape[-2]}x{z.shape[-1]}: crop by one, or choose another image size")
    top, bottom = z[..., 0::2, :], z[..., 1::2, :]
    low, high = top + bottom, top - bottom  # (B, C, h/2, w): vertical low-pass and high-pass
    bands = torch.cat(
        (
            low[..., 0::2] + low[..., 1::2],
            high[..., 0::2] + high[..., 1::2],
            low[..., 0::2] - low[..., 1::2],
            high[..., 0::2] - high[..., 1::2],
        ),
        dim=-3,
    )
    return bands * 0.5


def haar_join(bands: Tensor) -> Tensor:
    """Put four Haar bands together again: the inverse of `haar_split`.

    bands    (B, 4C, h/2, w/2), order LL, LH, HL, HH
    returns  (B, C, h, w), dtype of bands
    raises   ValueError if the channels are not a multiple of four
    """
    if bands.shape[-3] % 4:
        raise ValueError(f"four bands need a multiple of 4 channels, got {bands.shape[-3]}")
    ll, lh, hl, hh = (bands * 0.5).chunk(4, dim=-3)
    low = torch.stack((ll + hl, ll - hl), dim=-1).flatten(-2)  # (B, C, h/2, w): columns interleaved
    high = torch.stack((lh + hh, lh - hh), dim=-1).flatten(-2)
    return torch.stack((low + high, low - high), dim=-2).flatten(-3, -2)  # (B, C, h, w): rows interleaved


def _band_differences(prediction: Tensor, target: Tensor) -> Tensor:
    """(4, B, C, h/2, w/2): the bands of prediction - target, in fp32 or better.

    The transform is linear, so the difference is split once instead of splitting both.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction is {tuple(prediction.shape)} and target is {tuple(target.shape)}: they must agree")
    wide = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    return torch.stack(haar_split(prediction.to(wide) - target.to(wide)).chunk(4, dim=-3))


def wlf_loss(
    prediction: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    bands: Sequence[float] = (1, 1, 1, 1),
    huber: float = 0.0,
) -> Tensor:
    """Wavelet fine-tuning loss: the mean over images, bands and coefficients of weight · band weight · penalty(difference).

    prediction  (B, C, h, w), a velocity (paper) or a denoised latent (release)
    target      (B, C, h, w), the same of the data
    weight      (B,), w_t of equation 4, from `flow.loss_weight`; None is 1
    bands       weights of LL, LH, HL, HH, none negative, not normalised: (1, 1, 1, 1) is the MSE
    huber       0: the square d². c > 0: pseudo-Huber 2c²(√(1 + d²/c²) - 1), which is d² for |d| << c and
                2c|d| for |d| >> c, so that single large coefficients pull less; unit of the latent
    returns     scalar, fp32 (fp64 for fp64 inputs)
    raises      ValueError if a side is odd, shapes differ, bands are not four numbers >= 0, or huber < 0
    """
    if len(bands) != len(BANDS) or not all(0 <= band < math.inf for band in bands):
        raise ValueError(f"bands must be four numbers >= 0 for LL, LH, HL, HH, got {tuple(bands)}")
    if huber < 0:
        raise ValueError(f"huber must be 0 (squared) or a positive width in units of the latent, got {huber}")
    square = _band_differences(prediction, target).square()
    if huber > 0:  # the same formula without its cancellation at small d
        square = 2 * square / ((1 + square / huber**2).sqrt() + 1)
    per_image = square.mean(dim=(2, 3, 4))  # (4, B)
    per_image = sum(band_weight * losses for band_weight, losses in zip(bands, per_image, strict=True)) / len(BANDS)
    if weight is not None:
        if weight.shape != per_image.shape:
            raise ValueError(f"weight must be one number an image, ({per_image.shape[0]},), got {tuple(weight.shape)}")
        per_image = per_image * weight
    return per_image.mean()


def band_losses(prediction: Tensor, target: Tensor) -> Tensor:
    """(4,): mean square difference in LL, LH, HL and HH, as training logs it; their mean is the MSE."""
    return _band_differences(prediction, target).square().mean(dim=(1, 2, 3, 4))
