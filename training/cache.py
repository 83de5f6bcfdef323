"""Text embeddings and latents on disk, each computed once.

Paper     Diffusion-4K section 4.1: "text embeddings are pre-computed"
Layout    DATA/.embeddings/<encoders>-<T5 length>-<dtype>/<caption>.safetensors   context (L, C), pooled (P,)
          DATA/.latents/<autoencoder, factor, dilation>/<picture, crop>.safetensors   mean and logvar (1, 16, h, w)
Keys      every name is a hash of what decides the numbers; what other encoders or another VAE made is never read
Damage    fill() computes again what has other names, shapes, dtype, caption or key; read() verifies a checksum too
Check     python -m pytest tests/test_cache.py
"""

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from checkpoint import save
from family import SD3, Family, text_files
from files import in_utf8, printable, regular, sha256_of, writable
from machine.memory import free_memory
from vae import NORM_GROUPS, VAE, to_image

T = TypeVar("T")
STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # safetensors' names


class Embeddings:
    """Text embeddings of captions.

    The key: the caption, the encoders' files (names and content; metadata may give a T5 length), the T5 length asked
    for, the dtype (fp32 on CPU, bf16 on a GPU).
    """

    def __init__(self, folder: Path, model: str | os.PathLike, device: str | torch.device = "cpu", family: Family = SD3,
                 t5_length: int | None = None):
        """
        folder     where the cache lives; model: the folder with text encoders and tokenizers
        t5_length  tokens of T5; None: the family's
        """
        in_utf8(folder)
        self.model, self.device, self.family = Path(model), device, family
        self.t5_length = t5_length or family.t5_length
        self.dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        length, dtype = self.t5_length or "usual", str(self.dtype).removeprefix("torch.")
        self.cache = Path(folder) / f"{encoders_key(self.model)}-{length}-{dtype}"

    def fill(self, captions: Sequence[str], batch: int = 16, rank: int = 0, world: int = 1) -> int:
        """Encode the captions that the cache lacks, with a progress bar, and release the encoders.

        batch        captions encoded together
        rank, world  this process encodes every world-th caption, from the rank-th
        returns      how many were encoded
        """
        mine, shapes = list(dict.fromkeys(captions))[rank::world], {}
        files = {text: self._file(text) for text in mine}
        faults = _faults(files, lambda text: shapes.update({text: self._shapes(text)}))
        if len(set(shapes.values())) > 1:  # which of them are right is not known
            faults |= dict.fromkeys(shapes, f"{self.cache}: embeddings of different shapes")
        _say(faults.values(), self.cache)
        lacking = [text for text in mine if text in faults]
        if not lacking:
            return 0
        writable(self.cache, "--cache")  # before the encoders are read, which takes minutes
        encoders = self.family.text.load(self.model, self.device, self.dtype, self.t5_length)
        for start in tqdm(range(0, len(lacking), batch), desc="text embeddings", file=sys.stderr):
            texts = lacking[start:start + batch]
            for text, context, pooled in zip(texts, *encoders.encode(texts), strict=True):
                _save(self._file(text), {"context": context, "pooled": pooled}, {"caption": text})
        del encoders, context, pooled
        free_memory()
        return len(lacking)

    def read(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(B, L, C) context and (B, P) pooled from the cache; fill() must have seen the captions."""
        rows = [self._read(text) for text in captions]
        for text, row in zip(captions, rows, strict=True):
            if row["context"].shape != rows[0]["context"].shape or row["pooled"].shape != rows[0]["pooled"].shape:
                raise ValueError(f"{self._file(text)}: its shape is another than that of other captions; delete it")
        context, pooled = (torch.stack([row[name].float() for row in rows]) for name in ("context", "pooled"))
        return context.to(self.device), pooled.to(self.device)

    def _read(self, caption: str, device: str = "cpu") -> dict[str, Tensor]:
        return _verified(self._file(caption), {"context": 2, "pooled": 1}, self.dtype, {"caption": caption}, device)

    def _shapes(self, caption: str) -> tuple[torch.Size, ...]:
        return tuple(tensor.shape for tensor in self._read(caption, "meta").values())

    def _file(self, caption: str) -> Path:
        return self.cache / f"{hashlib.sha256(caption.encode()).hexdigest()[:32]}.safetensors"


class Latents:
    """Moments of central crops, which never change.

    The key: the picture's content, the crop, resampling, the encoder's weights and norm groups, factor and dilation.
    """

    def __init__(self, paths: Sequence[Path], central_crop: Callable[[int, int, int], np.ndarray], vae: VAE,
                 factor: int, dilation: int, folder: Path, resample: str = "lanczos"):
        """
        paths         of the pictures
        central_crop  (index, height, width) -> (height, width, 3) uint8: data.Pictures.central_crop
        folder        where the cache lives
        resample      how central_crop scales
        """
        in_utf8(folder)
        self.paths, self.central_crop = paths, central_crop
        self.vae, self.factor, self.dilation = vae, factor, dilation
        groups = "" if vae.config.norm_groups == NORM_GROUPS else f" {vae.config.norm_groups}"
        digest = hashlib.sha256(f"{factor} {dilation} {resample}{groups}".encode())
        for name, tensor in vae.encoder.state_dict().items():
            digest.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        self.folder, self._files = Path(folder) / digest.hexdigest()[:16], {}

    def fill(self, sizes: Sequence[tuple[int, int]], rank: int = 0, world: int = 1) -> int:
        """Encode the crops that the cache lacks, every world-th picture from the rank-th; returns how many were."""
        mine = range(rank, len(sizes), world)
        faults = _faults({k: self._file(k, *sizes[k]) for k in mine}, lambda k: self._read(k, *sizes[k], "meta"))
        _say(faults.values(), self.folder)
        if faults:
            writable(self.folder, "--cache")
        for index in tqdm(faults, desc="latents", file=sys.stderr, disable=not faults):
            self._encode(index, *sizes[index])
        return len(faults)

    def read(self, index: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """(mean, logvar), (1, 16, h, w) each, on the CPU, of the central crop that fill() has encoded."""
        moments = self._read(index, height, width)
        return moments["mean"], moments["logvar"]

    def _read(self, index: int, height: int, width: int, device: str = "cpu") -> dict[str, Tensor]:
        file, dtype = self._file(index, height, width), next(self.vae.parameters()).dtype
        moments = _verified(file, {"mean": 4, "logvar": 4}, dtype, {"key": file.stem}, device)
        shape = 1, self.vae.config.latent_channels, height // self.factor, width // self.factor
        if any(tensor.shape != shape for tensor in moments.values()):
            raise ValueError(f"{file}: its shape is not {shape}; delete it")
        return moments

    @torch.no_grad()
    def _encode(self, index: int, height: int, width: int) -> None:
        image = to_image(self.central_crop(index, height, width))[None].to(next(self.vae.parameters()))
        mean, logvar = self.vae.moments(image, self.factor, self.dilation)
        file = self._file(index, height, width)
        _save(file, {"mean": mean, "logvar": logvar}, {"picture": self.paths[index].name, "key": file.stem})

    def _file(self, *crop: int) -> Path:
        """Of (index, height, width); the picture is hashed once."""
        if crop not in self._files:
            index, height, width = crop
            self._files[crop] = self.folder / f"{_digest([self.paths[index]], f'{height} {width}')[:32]}.safetensors"
        return self._files[crop]


def _verified(file: Path, axes: Mapping[str, int], dtype: torch.dtype, records: Mapping[str, str],
              device: str = "cpu") -> dict[str, Tensor]:
    """The tensors of a file of a cache; on "meta" their shapes alone, from its header.

    axes     name -> number of axes of each tensor
    records  what the metadata must say
    raises   FileNotFoundError; ValueError that names a file which is damaged or holds something else
    """
    regular(file)
    try:
        with safe_open(file, framework="pt") as stored:
            heads = {name: stored.get_slice(name) for name in stored.keys()}
            if {name: len(head.get_shape()) for name, head in heads.items()} != axes:
                raise ValueError(f"{file}: holds other tensors than {', '.join(axes)}; delete it")
            if any(STORED.get(head.get_dtype()) != dtype for head in heads.values()):
                raise ValueError(f"{file}: is not of {dtype}; delete it")
            if any((stored.metadata() or {}).get(key) != value for key, value in records.items()):
                raise ValueError(f"{file}: was made of another {next(iter(records))}; delete it")
            if "sha256" not in stored.metadata():
                raise ValueError(f"{file}: of an older version, without a checksum; delete it")
            if device == "meta":
                return {name: torch.empty(heads[name].get_shape(), device="meta") for name in axes}
            tensors = {name: stored.get_tensor(name).clone() for name in axes}  # of a map, which others may cut short
            if _checksum(tensors) != stored.metadata()["sha256"]:
                raise ValueError(f"{file}: damaged (its checksum is another); delete it")
            return tensors
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged ({error}); delete it") from None


def _save(file: Path, tensors: Mapping[str, Tensor], records: Mapping[str, str]) -> None:
    save(file, tensors, {**records, "sha256": _checksum(tensors)})


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _faults(files: Mapping[T, Path], verify: Callable[[T], object]) -> dict[T, str]:
    """What is wrong with the files that must be computed, "" where one is absent."""
    faults = {}
    for key, file in files.items():
        try:
            if os.path.lexists(file):
                verify(key)
            else:
                faults[key] = ""
        except (ValueError, OSError) as error:
            faults[key] = str(error)
    return faults


def _say(faults: Iterable[str], folder: Path) -> None:
    if damaged := [fault for fault in faults if fault]:
        print(printable(f"{len(damaged)} files in {folder} are computed again; the first: "
                        f"{damaged[0].removesuffix('; delete it')}"), file=sys.stderr)


def _digest(files: Sequence[Path], more: str = "") -> str:
    """A hash of the files' content and of `more`."""
    digest = hashlib.sha256(more.encode())
    for file in files:
        about = file.stat()
        digest.update(_content(file, about.st_size, about.st_mtime_ns))
    return digest.hexdigest()


@cache
def _content(file: Path, size: int, changed_ns: int) -> bytes:
    """The hash of a file's bytes, read once by each process: T5 takes ten seconds."""
    return bytes.fromhex(sha256_of(file))


def encoders_key(model: Path) -> str:
    files = text_files(model)
    return _digest(files, " ".join(str(f.relative_to(model)) for f in files))[:16]
