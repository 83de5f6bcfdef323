"""What tests/data holds: outputs of the references on tiny random weights, names and shapes of the published files.

Cases      CASE.safetensors: see read_case
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
BOUNDS = {"cpu": 1e-5, "cuda": 1e-4}  # absolute, fp32 without TF32; a GPU sums in another order


def read_case(name: str) -> dict:
    """All tensors of a case: the weights, and inputs and outputs of the official class that computed them.

    sd3-ref       mmdit_sd3 (MMDiT), pos_embed_sincos, vae_sd3 (SDVAE), clip_l (SDClipModel), clip_g (SDXLClipG),
                  t5_encoder (T5XXLModel), sd3_cond
    sd3.5         mmdit_sd35_medium (MMDiTX)
    flux          flux_dev, flux_schnell (Flux), flux_primitives (timestep_embedding, rope), vae_flux (AutoEncoder)
    diffusion-4k  vae_f16 (AutoencoderKL, stride 2)

    Weights under their official names are float16, exactly the values the reference ran with; in/..., mid/... and
    out/... are float32 (ids and buckets integers). Implementations agree to 5e-6; the tests' bounds are 1e-5.
    Text encoders lack the embedding rows that no prompt uses, with ids renumbered; hidden states are kept at the
    positions `at`.
    """
    return load_file(DATA / f"{name}.safetensors")


def weights_of(tensors: dict) -> dict:
    return {name: t for name, t in tensors.items() if "/" not in name and name != "at"}


def write_weights(case: str, folder: Path, device: str = "cpu") -> tuple[Path, dict]:
    """Write only the weights of a case to a file in `folder`; returns the file and, on the device, all its tensors."""
    tensors, path = read_case(case), folder / f"{case}.safetensors"
    save_file(weights_of(tensors), path)
    return path, {name: t.to(device) for name, t in tensors.items()}


@cache
def _manifests() -> dict:
    return json.loads(gzip.decompress((DATA / "manifests.json.gz").read_bytes()))


def published(file: str, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published file: those that begin with `prefix`, which is removed."""
    shapes = _manifests()["shapes"][file]
    return {name.removeprefix(prefix): tuple(shape) for name, shape in shapes.items() if name.startswith(prefix)}


def published_map(family: str) -> dict[str, list]:
    """Name in diffusers -> [official name, rows there, change].

    rows    [start, stop], or None for all
    change  None, "swap_halves" or "squeeze_1x1"
    """
    return _manifests()["maps"][family]


# ---- comparing and renaming tensors

def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest absolute difference of two tensors of one shape."""
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
