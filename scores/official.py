"""The official files that are not safetensors: which ones, where they are, how they are read without running code in them.

Mirrors   torch.load of pickled state dicts; torch.jit.load(path).state_dict() of TorchScript archives, of which only the tensors are
          read (held by tests/test_official.py)
Files     WEIGHTS lists what the metrics need; nothing is downloaded here
Trust     a pickle is a program: it may name any function and call it. torch.load(weights_only=True) and the reader of archives
          below know a handful of harmless names each and refuse the rest before anything is called.
Check     python -m pytest tests/test_official.py
"""

import hashlib
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import LazyTensor, Weights, open_weights


@dataclass(frozen=True)
class Download:
    """One official file: what needs it, where it is, its SHA-256, or the beginning of it where the file's name is all that says it."""

    use: str
    url: str
    sha256: str
    also: tuple[str, ...] = ()      # other names of the same weights


_CLIP_URL, _LPIPS_URL = "https://openaipublic.azureedge.net/clip/models", "https://github.com/richzhang/PerceptualSimilarity/raw/master"
WEIGHTS = {
    "weights-inception-2015-12-05-6726825d.pth": Download(
        "FID", "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "6726825d", ("pt_inception-2015-12-05-6726825d.pth",)),
    "ViT-B-16.pt": Download(
        "CLIPScore", f"{_CLIP_URL}/5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
        "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f", ("clip-vit-base-patch16",)),
    "ViT-L-14.pt": Download(
        "Aesthetics", f"{_CLIP_URL}/b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
        "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", ("clip-vit-large-patch14",)),
    "sac+logos+ava1-l14-linearMSE.pth": Download(
        "Aesthetics", "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac+logos+ava1-l14-linearMSE.pth",
        "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"),
    "vgg16-397923af.pth": Download("LPIPS (vgg)", "https://download.pytorch.org/models/vgg16-397923af.pth", "397923af"),
    "vgg.pth": Download("LPIPS (vgg)", f"{_LPIPS_URL}/lpips/weights/v0.1/vgg.pth",
                        "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"),
    "alexnet-owt-7be5be79.pth": Download("LPIPS (alex)", "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", "7be5be79"),
    "alex.pth": Download("LPIPS (alex)", f"{_LPIPS_URL}/lpips/weights/v0.1/alex.pth",
                         "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0"),
}


def find_weights(folder: str | os.PathLike, name: str, check: bool = False) -> Path:
    """Where a folder keeps one of WEIGHTS, under its name or another that the same weights go by.

    name    a key of WEIGHTS
    check   read the file and compare its SHA-256 with the published one; a folder of Hugging Face has none
    raises  FileNotFoundError that says what needs the file, where to get it and how it is checked; ValueError if the hash differs
    """
    download, folder = WEIGHTS[name], Path(folder)
    found = [folder / other for other in (name, *download.also) if (folder / other).exists()]
    if not found:
        other = f" (or {', '.join(download.also)})" if download.also else ""
        begins = "is" if len(download.sha256) == 64 else "begins with"
        raise FileNotFoundError(f"{folder}: no {name}{other}, which {download.use} needs: get it from {download.url}; "
                                f"its sha256 {begins} {download.sha256}")
    if check and found[0].is_file() and not (said := sha256(found[0])).startswith(download.sha256):
        raise ValueError(f"{found[0]}: its sha256 is {said}, the published one begins with {download.sha256}: "
                         f"download it again from {download.url}")
    return found[0]


def sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def open_official(path: str | os.PathLike) -> Weights:
    """Open any of the official files without running code in it.

    path     safetensors or a folder with them (see checkpoint.open_weights); a pickled state dict; a TorchScript archive
    returns  Weights under the names of the file
    raises   FileNotFoundError, or ValueError if the file is none of these or asks for anything but tensors
    """
    path = Path(path)
    if path.is_dir() and not any(path.glob("*.safetensors")) and (path / "pytorch_model.bin").is_file():
        path = path / "pytorch_model.bin"
    if path.is_dir() or not path.exists() or path.suffix == ".safetensors":
        return open_weights(path)
    zipped = zipfile.is_zipfile(path)
    if zipped and any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()):     # TorchScript's mark
        return Weights(_torchscript_tensors(path), {}, str(path))
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:      # torch raises a dozen classes on foreign bytes, with a page of advice
        asks = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"it asks for {asks[1]}, which is refused" if asks else f"{path.stat().st_size} bytes: download it again"
        raise ValueError(f"{path}: not safetensors, a pickled state dict or a TorchScript archive ({why})") from None
    if not isinstance(state, dict) or not state or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{path}: holds a {type(state).__name__} of something else than named tensors")
    return Weights({name: LazyTensor(tuple(t.shape), lambda t=t: t) for name, t in state.items()}, {}, str(path))


STORAGES = {"HalfStorage": torch.float16, "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "BFloat16Storage": torch.bfloat16,
            "ByteStorage": torch.uint8, "CharStorage": torch.int8, "ShortStorage": torch.int16, "IntStorage": torch.int32,
            "LongStorage": torch.int64, "BoolStorage": torch.bool}


def _torchscript_tensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a TorchScript archive by their dotted names, as state_dict would name them.

    torch.jit.load compiles and can run what is under code/; here only data.pkl is parsed, the tree of modules, and the raw bytes
    under data/. A pickle acts solely through the globals it names. Ours resolve to four things: tensors known by shape, storage
    types as dtypes, an empty class for every module (`__torch__.…`), the identity for typed lists. Any other name ends the parse,
    and the classes and functions handed out are made anew each time, so that nothing a pickle does to them outlives it. A module
    that saves a state of its own making keeps it: only plain attributes are looked at.
    """
    archive = zipfile.ZipFile(path)
    names = archive.namelist()
    root = next((name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl") and name.count("/") == 1), None)
    if root is None:
        raise ValueError(f"{path}: a zip without data.pkl: not a TorchScript archive")

    class Module:
        def __setstate__(self, state):
            vars(self).update(state if isinstance(state, dict) else {})

    def tensor(storage, offset, shape, stride, *unused):
        dtype, key = storage
        if root + key not in names:
            raise pickle.UnpicklingError(f"{key} is missing")

        def read():
            try:
                return torch.frombuffer(bytearray(archive.read(root + key)), dtype=dtype).as_strided(shape, stride, offset)
            except (RuntimeError, ValueError, TypeError, zipfile.BadZipFile) as error:    # as_strided looks at the bounds
                raise ValueError(f"{path}: a tensor of shape {tuple(shape)} is not in {key} ({error}): download it again") from None
        return LazyTensor(tuple(shape), read)

    def same(value, *unused):
        return value

    class Reader(pickle.Unpickler):
        def find_class(self, module, name):
            if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor"):
                return tensor
            if module == "torch" and name in STORAGES:
                return STORAGES[name]
            if module.split(".")[0] == "__torch__":
                return Module
            if (module, name) == ("collections", "OrderedDict"):
                return OrderedDict
            if module == "torch.jit._pickle" and (name == "restore_type_tag" or name.startswith("build_")):
                return same
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")

        def persistent_load(self, saved):
            kind, dtype, key, *_ = saved
            if kind != "storage" or not isinstance(dtype, torch.dtype):
                raise pickle.UnpicklingError("a storage of an unknown type")
            return dtype, f"data/{key}"

    def walk(module: Module, prefix: str) -> Iterator[tuple[str, LazyTensor]]:
        for name, value in vars(module).items():
            if isinstance(value, LazyTensor):
                yield prefix + name, value
            elif isinstance(value, Module):
                yield from walk(value, f"{prefix}{name}.")

    try:
        with archive.open(root + "data.pkl") as f:
            return dict(walk(Reader(f).load(), ""))
    except Exception as error:      # a damaged pickle raises anything
        raise ValueError(f"{path}: not an archive of tensors and modules alone ({error}); nothing in it was run") from None
