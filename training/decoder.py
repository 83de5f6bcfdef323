"""Post-training of a VAE's decoder at factor 16, for train_vae.py --decoder-only.

Why       the partition trick decodes at factor 16 with weights that were trained at 8: it leaves a grid of 16 pixels
Encoder   stays as it is, to the byte: latents keep their meaning, and every transformer fits
Redrawn   half of the steps may decode what a transformer drew (models/redraw_latents.py): its tokens show less
Source    UltraFlux: squared error, HAAR on the high bands, PERCEPTUAL on LPIPS; SC-VAE: the teacher. Neither paper's
          discriminator is here. GRID is ours: steps from pixel to pixel at the borders of latents and tokens stand
          out no more than in the original
Check     python -m pytest tests/test_decoder.py
"""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoint import Weights, open_weights
from family import find
from training.resume import digest_of
from vae import VAE, Decoder, to_image
from wavelet import haar_split

HAAR, GRID, PERCEPTUAL = 0.2, 1.0, 0.1  # weights of their terms
PERIOD = 32                             # pixels of a token at factor 16; latents of 16 pixels repeat with it


def given_vae(path: str | os.PathLike) -> tuple[VAE, Weights]:
    """The VAE of a model folder or file, in fp32, its encoder frozen; and its tensors as they are stored."""
    file, fallback = path, None
    if Path(path).is_dir() and not (Path(path) / "config.json").exists():  # a model folder, not a vae/ folder
        family, _, file = find(path)
        fallback = family.latent_scale
    vae = VAE.load(file, dtype=torch.float32, fallback=fallback)
    vae.encoder.requires_grad_(False)
    return vae, open_weights(file).part("first_stage_model.")


class Redrawn:
    """Raw latents that a transformer drew, each with the picture that it should show.

    folder        its *.safetensors name latents (16, h, w) "PICTURE at LEVEL", of central crops of 16h x 16w pixels
    paths         pictures to train on; latents of others are left out
    central_crop  (index, height, width) -> (height, width, 3) uint8: data.Pictures.central_crop
    raises        ValueError if no latent is of these pictures
    """

    def __init__(self, folder: str | os.PathLike, paths: Sequence[Path], central_crop: Callable[..., np.ndarray]):
        number = {path.name: k for k, path in enumerate(paths)}
        self.central_crop = central_crop
        self.latents = [  # (index of its picture, latent)
            (number[shows], tensor) for file in sorted(Path(folder).glob("*.safetensors"))
            for name, tensor in open_weights(file).items() if (shows := name.rpartition(" at ")[0]) in number]
        if not self.latents:
            raise ValueError(f"--redrawn {folder}: has no latents of the pictures to train on; make them with "
                             "models/redraw_latents.py")
        self.digest = digest_of({str(k): tensor for k, (_, tensor) in enumerate(self.latents)})

    def window(self, pixels: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A random square of at most about `pixels` pixels: raw latent (1, 16, n, n) and picture (1, 3, 16n, 16n)."""
        index, tensor = self.latents[int(torch.randint(len(self.latents), (1,), generator=generator))]
        raw = tensor.read().float()
        side = min(*raw.shape[1:], max(1, math.isqrt(pixels) // 16))
        top, left = (int(torch.randint(length - side + 1, (1,), generator=generator)) for length in raw.shape[1:])
        image = to_image(self.central_crop(index, *(16 * length for length in raw.shape[1:])))
        return (raw[None, :, top:top + side, left:left + side],
                image[None, :, 16 * top:16 * (top + side), 16 * left:16 * (left + side)])


def decoder_loss(vae: VAE, image: Tensor, factor: int, offset: int, teacher: tuple[float, Decoder] | None = None,
                 lpips: Callable[[Tensor, Tensor], Tensor] | None = None, raw: Tensor | None = None) -> Tensor:
    """Squared error + HAAR * |high bands of the error| + GRID * grid_error + PERCEPTUAL * LPIPS + the teacher's term.

    image    (B, 3, H, W) in [-1, 1]
    raw      latent (B, 16, h, w) to decode; None: the mean of the image's posterior
    teacher  weight, and the decoder before training. At factor 8 that one draws the picture better; its term is the
             mean squared distance between its last features and those of the student, enlarged to their size
    lpips    distances (B,) of two batches; None leaves the term out
    """
    if raw is None:
        with torch.no_grad():
            raw, _ = vae.moments(image, factor)
    features = vae.decoder.features(raw)
    decoded = vae.decoder.conv_out(features, factor == 16, offset)
    error = decoded - image
    loss = error.square().mean() + HAAR * haar_split(error)[:, 3:].abs().mean() + GRID * grid_error(decoded, image)
    if lpips:
        loss = loss + PERCEPTUAL * lpips(decoded, image).mean()
    if teacher:
        weight, decoder = teacher
        with torch.no_grad():
            known = decoder.features(vae.moments(image, 8)[0])
        loss = loss + weight * (F.interpolate(features, known.shape[2:]) - known).square().mean()
    return loss


def grid_error(decoded: Tensor, image: Tensor) -> Tensor:
    """How far the step_profile of decoded pictures is from that of the originals, apart from its mean."""
    error = step_profile(decoded) - step_profile(image)
    return (error - error.mean(1, keepdim=True)).square().mean(1).sum()


def step_profile(image: Tensor) -> Tensor:
    """Mean log(1 + |step|) of brightness from pixel to pixel, by its place in PERIOD: across columns, rows (2, PERIOD).

    image  (B, 3, H, W) in [-1, 1]; steps are counted in levels of 255
    """
    brightness = 127.5 * torch.einsum("bchw,c->bhw", image, image.new_tensor([0.299, 0.587, 0.114]))
    profile = []
    for axis in (2, 1):
        steps = brightness.diff(dim=axis).abs().log1p().mean((0, 3 - axis))
        place = torch.arange(len(steps), device=steps.device) % PERIOD
        count = torch.bincount(place, minlength=PERIOD).clamp(min=1)
        profile.append(steps.new_zeros(PERIOD).index_add(0, place, steps) / count)
    return torch.stack(profile)


def tensors_of(vae: VAE, stored: Weights) -> dict[str, Tensor]:
    """What is written: the encoder as it was stored, the decoder in the dtypes that it was stored in."""
    trained = vae.state_dict()
    return {name: trained[name].to(tensor.read().dtype) if name.startswith("decoder.") else tensor.read()
            for name, tensor in stored.items() if name in trained}
