"""Post-training of a VAE's decoder at factor 16, for train_vae.py --decoder-only.

Why       the partition trick decodes at factor 16 with weights that were trained at 8: it leaves a grid of 16 pixels
Encoder   stays as it is, to the byte: latents keep their meaning, and every transformer fits
Source    UltraFlux: squared error, HAAR on the high bands, PERCEPTUAL on LPIPS; SC-VAE: the teacher. Neither paper's
          discriminator is here
Check     python -m pytest tests/test_decoder.py
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoint import Weights, open_weights
from family import find
from vae import VAE, Decoder
from wavelet import haar_split

HAAR, PERCEPTUAL = 0.2, 0.1  # weights of their terms


def given_vae(path: str | os.PathLike) -> tuple[VAE, Weights]:
    """The VAE of a model folder or file, in fp32, its encoder frozen; and its tensors as they are stored."""
    file, fallback = path, None
    if Path(path).is_dir() and not (Path(path) / "config.json").exists():  # a model folder, not a vae/ folder
        family, _, file = find(path)
        fallback = family.latent_scale
    vae = VAE.load(file, dtype=torch.float32, fallback=fallback)
    vae.encoder.requires_grad_(False)
    return vae, open_weights(file).part("first_stage_model.")


def decoder_loss(vae: VAE, image: Tensor, factor: int, offset: int, teacher: tuple[float, Decoder] | None = None,
                 lpips: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
    """Squared error + HAAR * |high bands of the error| + PERCEPTUAL * LPIPS + the teacher's term.

    image    (B, 3, H, W) in [-1, 1]; decoded from the mean of its posterior
    teacher  weight, and the decoder before training. At factor 8 that one draws the picture better; its term is the
             mean squared distance between its last features and those of the student, enlarged to their size
    lpips    distances (B,) of two batches; None leaves the term out
    """
    with torch.no_grad():
        raw, _ = vae.moments(image, factor)
    features = vae.decoder.features(raw)
    decoded = vae.decoder.conv_out(features, factor == 16, offset)
    error = decoded - image
    loss = error.square().mean() + HAAR * haar_split(error)[:, 3:].abs().mean()
    if lpips:
        loss = loss + PERCEPTUAL * lpips(decoded, image).mean()
    if teacher:
        weight, decoder = teacher
        with torch.no_grad():
            known = decoder.features(vae.moments(image, 8)[0])
        loss = loss + weight * (F.interpolate(features, known.shape[2:]) - known).square().mean()
    return loss


def tensors_of(vae: VAE, stored: Weights) -> dict[str, Tensor]:
    """What is written: the encoder as it was stored, the decoder in the dtypes that it was stored in."""
    trained = vae.state_dict()
    return {name: trained[name].to(tensor.read().dtype) if name.startswith("decoder.") else tensor.read()
            for name, tensor in stored.items() if name in trained}
