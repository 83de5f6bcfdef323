"""Text embeddings and latents on disk, each computed once.

Paper     Diffusion-4K section 4.1: "text embeddings are pre-computed"
Layout    DATA/.embeddings/<encoders>-<T5 length>-<dtype>/<caption>.safetensors   context (L, C), pooled (P,)
          DATA/.latents/<autoencoder, factor, dilation>/<picture, crop>.safetensors   mean and logvar (1, 16, h, w)
Keys      every name is a hash of what decides the numbers; what other encoders or another VAE made is never read
Check     python -m pytest tests/test_cache.py
"""

import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import open_weights, save
from family import SD3, Family
from vae import VAE, to_image


class Embeddings:
    """Text embeddings of captions.

    The key: the caption, the encoders' files (name, size, first and last bytes; metadata may give a T5 length), the T5
    length asked for, the dtype (fp32 on CPU, bf16 on a GPU).
    """

    def __init__(self, folder: Path, model: str | os.PathLike, device: str | torch.device = "cpu", family: Family = SD3,
                 t5_length: int | None = None):
        """
        folder     where the cache lives; model: the folder with text encoders and tokenizers
        t5_length  tokens of T5; None: the family's
        """
        self.model, self.device, self.family = Path(model), device, family
        self.t5_length = t5_length or family.t5_length
        self.dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        length, dtype = self.t5_length or "usual", str(self.dtype).removeprefix("torch.")
        self.cache = Path(folder) / f"{_encoders_key(self.model)}-{length}-{dtype}"

    def fill(self, captions: Sequence[str], batch: int = 16, rank: int = 0, world: int = 1) -> int:
        """Encode the captions that the cache lacks, with a progress bar, and release the encoders.

        batch        captions encoded together
        rank, world  this process encodes every world-th caption, from the rank-th
        returns      how many were encoded
        """
        lacking = [text for text in list(dict.fromkeys(captions))[rank::world] if not self._file(text).is_file()]
        if not lacking:
            return 0
        encoders = self.family.text.load(self.model, self.device, self.dtype, self.t5_length)
        self.cache.mkdir(parents=True, exist_ok=True)
        for start in tqdm(range(0, len(lacking), batch), desc="text embeddings", file=sys.stderr):
            texts = lacking[start:start + batch]
            for text, context, pooled in zip(texts, *encoders.encode(texts), strict=True):
                save(self._file(text), {"context": context, "pooled": pooled}, {"caption": text})
        return len(lacking)

    def read(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(B, L, C) context and (B, P) pooled from the cache; fill() must have seen the captions."""
        files = [open_weights(self._file(text)) for text in captions]
        context, pooled = (torch.stack([file[name].read().float() for file in files]) for name in ("context", "pooled"))
        return context.to(self.device), pooled.to(self.device)

    def _file(self, caption: str) -> Path:
        return self.cache / f"{hashlib.sha256(caption.encode()).hexdigest()[:32]}.safetensors"


class Latents:
    """Moments of central crops, which never change.

    The key: the picture (size, first and last bytes), the crop, the encoder's weights, factor and dilation.
    """

    def __init__(self, paths: Sequence[Path], central_crop: Callable[[int, int, int], np.ndarray], vae: VAE,
                 factor: int, dilation: int, folder: Path):
        """
        paths         of the pictures
        central_crop  (index, height, width) -> (height, width, 3) uint8: data.Pictures.central_crop
        folder        where the cache lives
        """
        self.paths, self.central_crop = paths, central_crop
        self.vae, self.factor, self.dilation = vae, factor, dilation
        digest = hashlib.sha256(f"{factor} {dilation}".encode())
        for name, tensor in vae.encoder.state_dict().items():
            digest.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        self.folder, self._files = Path(folder) / digest.hexdigest()[:16], {}

    def fill(self, sizes: Sequence[tuple[int, int]], rank: int = 0, world: int = 1) -> int:
        """Encode the crops that the cache lacks, every world-th picture from the rank-th; returns this share's size."""
        mine = range(rank, len(sizes), world)
        lacking = [index for index in mine if not self._file(index, *sizes[index]).is_file()]
        for index in tqdm(lacking, desc="latents", file=sys.stderr, disable=not lacking):
            self._encode(index, *sizes[index])
        return len(mine)

    def read(self, index: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """(mean, logvar), (1, 16, h, w) each, on the CPU, of the central crop that fill() has encoded."""
        file = open_weights(self._file(index, height, width))
        return file["mean"].read(), file["logvar"].read()

    @torch.no_grad()
    def _encode(self, index: int, height: int, width: int) -> None:
        image = to_image(self.central_crop(index, height, width))[None].to(next(self.vae.parameters()))
        mean, logvar = self.vae.moments(image, self.factor, self.dilation)
        self.folder.mkdir(parents=True, exist_ok=True)
        save(self._file(index, height, width), {"mean": mean, "logvar": logvar}, {"picture": self.paths[index].name})

    def _file(self, *crop: int) -> Path:
        """Of (index, height, width); the picture is hashed once."""
        if crop not in self._files:
            index, height, width = crop
            self._files[crop] = self.folder / f"{_digest([self.paths[index]], f'{height} {width}')[:32]}.safetensors"
        return self._files[crop]


def _digest(files: Sequence[Path], more: str = "") -> str:
    """A hash of sizes, first and last bytes: as much of the files' content as can be had without reading all of it."""
    digest = hashlib.sha256(more.encode())
    for file in files:
        digest.update(f" {file.stat().st_size}".encode())
        with open(file, "rb") as f:
            digest.update(f.read(1 << 16))
            f.seek(-min(1 << 20, file.stat().st_size), os.SEEK_END)
            digest.update(f.read())
    return digest.hexdigest()


def _encoders_key(model: Path) -> str:
    files = sorted(f for f in model.glob("t[eo]*/*") if f.is_file())  # text_encoder*/, text_encoders/, tokenizer*/
    return _digest(files, " ".join(str(f.relative_to(model)) for f in files))[:16]
