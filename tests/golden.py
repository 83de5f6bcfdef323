"""What tests/data holds: outputs of the references on tiny random weights, names and shapes of the published files.

Mirrors    mmdit_sd3, vae_sd3, pos_embed_sincos: sd3-ref (MMDiT, SDVAE) · mmdit_sd35_medium: sd3.5 (MMDiTX) ·
           vae_flux: flux (AutoEncoder) · vae_f16: diffusion-4k (AutoencoderKL, stride 2) ·
           clip_l, clip_g, t5_encoder, sd3_cond: sd3-ref (SDClipModel, SDXLClipG, T5XXLModel) ·
           flux_dev, flux_schnell, flux_primitives: flux (Flux, timestep_embedding, rope)
Cases      CASE.safetensors: weights under their official names, float16, exactly the values the reference ran with;
           in/…, mid/…, out/… float32 (ids and buckets integers): implementations agree to 5e-6, the bounds are 1e-5.
           Text encoders: embedding rows that no prompt uses are dropped and the ids renumbered; hidden states are kept
           at the positions `at`.
Pictures   pictures/*.png with metrics.json: GLCM of scikit-image 0.26 as the release computes it, JPEG bytes of
           Pillow 13, PSNR and SSIM of scikit-image
Published  manifests.json.gz: {"shapes": {file: {name: shape}},
                              "maps": {family: {diffusers name: [official name, rows, op]}}}
"""

import gzip
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from checkpoint import LazyTensor, Weights
from names import FLUX_NAMES, SD3_NAMES, TAILS, VAE_NAMES, plain_rows

DATA = Path(__file__).parent / "data"


def read_case(name: str) -> dict:
    return load_file(DATA / f"{name}.safetensors")


def weights_of(tensors: dict) -> dict:
    return {name: t for name, t in tensors.items() if "/" not in name and name != "at"}


def write_weights(case: str, folder: Path) -> tuple[Path, dict]:
    """A file in `folder` with the weights of a case alone, and all tensors of the case."""
    tensors, path = read_case(case), folder / f"{case}.safetensors"
    save_file(weights_of(tensors), path)
    return path, tensors


@cache
def _manifests() -> dict:
    return json.loads(gzip.decompress((DATA / "manifests.json.gz").read_bytes()))


def published(file: str, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Names and shapes in a published file; of those that begin with `prefix`, without it."""
    shapes = _manifests()["shapes"][file]
    return {name.removeprefix(prefix): tuple(shape) for name, shape in shapes.items() if name.startswith(prefix)}


def published_map(family: str) -> dict[str, list]:
    """Name in diffusers -> official name, its rows there [start, stop] or None for all, and None or how it is changed:
    "swap_halves", "squeeze_1x1"."""
    return _manifests()["maps"][family]


# ---- what tests of both transformers compare with

def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def lazy(shapes: dict) -> Weights:
    return Weights({name: LazyTensor(tuple(shape), lambda: None) for name, shape in shapes.items()}, {}, "a file")


def lazy_tensors(tensors: dict) -> Weights:
    return Weights({name: LazyTensor(tuple(t.shape), lambda t=t: t) for name, t in tensors.items()}, {}, "a file")


def shapes_of(weights) -> dict:
    return {name: tuple(t.shape) for name, t in weights.items()}


def diffusers_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of MMDiT, Flux or VAE under the names of diffusers; ValueError on a name that is in no table."""
    tables = (("joint_blocks.", SD3_NAMES), ("single_blocks.", FLUX_NAMES),
              (("decoder.up.", "encoder.down."), VAE_NAMES))
    table = next((table for prefix, table in tables if any(name.startswith(prefix) for name in tensors)), ())
    rest, renamed = dict(tensors), {}
    for row in plain_rows(table, tensors):
        for tail in TAILS:
            tensor = rest.pop(row.official + tail, None)
            if tensor is not None:
                if row.how == "swap_halves":
                    tensor = torch.cat(tensor.chunk(2)[::-1])
                elif row.how == "as_1x1_conv" and tensor.ndim == 4:
                    tensor = tensor[:, :, 0, 0]
                pieces = (tensor,)
                if len(row.parts) > 1:  # every part but the last is as tall as the matrix is wide
                    tall = tensors[row.official + ".weight"].shape[1]
                    pieces = tensor.tensor_split([tall * k for k in range(1, len(row.parts))])
                renamed |= zip((part + tail for part in row.parts), pieces, strict=True)
    if rest:
        raise ValueError(f"{next(iter(rest))} has no name in diffusers")
    return renamed
