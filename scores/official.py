"""Official files that are not safetensors: their list, and reading them without running code in them.

Mirrors   torch.load of pickled state dicts; torch.jit.load(path).state_dict() of TorchScript archives, of which only
          the tensors are read; tested against both by tests/test_official.py
Trust     a pickle is a program: it can name any function and call it. torch.load(weights_only=True) and the reader of
          archives below accept a few harmless names each and refuse all others before anything is called
"""

import os
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import LazyTensor, Weights, open_weights
from files import regular, sha256_of


@dataclass(frozen=True)
class Download:
    """One official file: the metric that needs it, its address, its SHA-256 or the prefix in its name, other names."""

    use: str
    url: str
    sha256: str
    also: tuple[str, ...] = ()


_TORCH, _CLIP = "https://download.pytorch.org/models", "https://openaipublic.azureedge.net/clip/models"
_LPIPS = "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1"
_B16 = "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"
_L14 = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"
WEIGHTS = {name: Download(use, f"{folder}/{name}", sha256, tuple(also)) for name, use, folder, sha256, *also in (
    ("weights-inception-2015-12-05-6726825d.pth", "FID",
     "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0", "6726825d",
     "pt_inception-2015-12-05-6726825d.pth"),
    ("ViT-B-16.pt", "CLIPScore", f"{_CLIP}/{_B16}", _B16, "clip-vit-base-patch16"),
    ("ViT-L-14.pt", "Aesthetics", f"{_CLIP}/{_L14}", _L14, "clip-vit-large-patch14"),
    ("sac+logos+ava1-l14-linearMSE.pth", "Aesthetics",
     "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main",
     "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"),
    ("vgg16-397923af.pth", "LPIPS (vgg)", _TORCH, "397923af"),
    ("vgg.pth", "LPIPS (vgg)", _LPIPS, "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"),
    ("alexnet-owt-7be5be79.pth", "LPIPS (alex)", _TORCH, "7be5be79"),
    ("alex.pth", "LPIPS (alex)", _LPIPS, "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0"))}


def find_weights(folder: str | os.PathLike, name: str) -> Path:
    """The path of one of WEIGHTS in a folder, under any of its names; a FileNotFoundError has address and SHA-256.

    A file of the official name with another SHA-256 is a warning: it may be converted, damaged or of other training.
    """
    download, folder = WEIGHTS[name], Path(folder)
    for path in (folder / other for other in (name, *download.also)):
        if path.exists():
            if path.name == name and path.is_file() and not sha256_of(path).startswith(download.sha256):
                warnings.warn(f"{path}: not the official file, whose sha256 begins with {download.sha256[:8]}: "
                              f"{download.use} is not comparable with published numbers", stacklevel=2)
            return path
    other = f" (or {', '.join(download.also)})" if download.also else ""
    begins = "is" if len(download.sha256) == 64 else "begins with"
    raise FileNotFoundError(f"{folder}: no {name}{other}, which {download.use} needs: get it from {download.url}; "
                            f"its sha256 {begins} {download.sha256}")


def open_official(path: str | os.PathLike) -> Weights:
    """Open any of the official files without running code in it.

    path    safetensors or a folder of them (see checkpoint.open_weights), a pickled state dict, a TorchScript archive
    raises  FileNotFoundError; ValueError if the file is none of these or holds anything but tensors
    """
    path = Path(path)
    if path.is_dir() and not any(path.glob("*.safetensors")) and (path / "pytorch_model.bin").is_file():
        path = path / "pytorch_model.bin"
    if path.is_dir() or not path.exists():
        return open_weights(path)
    regular(path)
    if path.suffix == ".safetensors":
        return open_weights(path)
    try:
        zipped = zipfile.is_zipfile(path)
        script = zipped and any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist())
        state = None if script else torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:      # both raise a dozen classes on foreign bytes, torch with a page of advice
        asks = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"it asks for {asks[1]}, which is refused" if asks else f"{path.stat().st_size} bytes: download it again"
        raise ValueError(f"{path}: not a .safetensors, a pickled state dict or a TorchScript archive ({why})") from None
    if script:
        return Weights(_torchscript_tensors(path), {}, str(path))
    if not isinstance(state, dict) or not state or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{path}: holds a {type(state).__name__}, which is no dict of named tensors")
    for name, t in state.items():
        if not isinstance(name, str) or t.layout is not torch.strided or t.is_meta or t.is_quantized:
            raise ValueError(f"{path}: {name} is no plain tensor with a name")
    return Weights({name: LazyTensor(tuple(t.shape), lambda t=t: t) for name, t in state.items()}, {}, str(path))


STORAGES = {"HalfStorage": torch.float16, "FloatStorage": torch.float32, "DoubleStorage": torch.float64,
            "BFloat16Storage": torch.bfloat16, "ByteStorage": torch.uint8, "CharStorage": torch.int8,
            "ShortStorage": torch.int16, "IntStorage": torch.int32, "LongStorage": torch.int64,
            "BoolStorage": torch.bool}


def _torchscript_tensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a TorchScript archive by their dotted names, as state_dict would name them.

    torch.jit.load compiles code/ and can run it. Here only data.pkl, the tree of modules, is parsed, and bytes under
    data/ are read. A pickle acts only through the globals it names, and those resolve to four things: tensors known by
    shape, storage types as dtypes, an empty class for modules, the identity for typed lists. They are made anew per
    call, so that what a pickle does to them ends with it. A module's custom state is not read, only its attributes.
    """
    archive = zipfile.ZipFile(path)
    names = archive.namelist()
    root = next((name.removesuffix("data.pkl") for name in names if re.fullmatch(r"[^/]*/data\.pkl", name)), None)
    if root is None:
        raise ValueError(f"{path}: a zip without data.pkl: not a TorchScript archive")

    class Module:
        def __setstate__(self, state):
            vars(self).update(state if isinstance(state, dict) else {})

    def tensor(storage, offset, shape, stride, *unused):
        dtype, key = storage
        if root + key not in names:
            raise pickle.UnpicklingError(f"{key} is missing")
        return LazyTensor(tuple(shape), partial(_read_tensor, archive, root + key, dtype, offset, shape, stride))

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
                return lambda value, *unused: value
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")

        def persistent_load(self, saved):
            kind, dtype, key, *_ = saved
            if kind != "storage" or not isinstance(dtype, torch.dtype):
                raise pickle.UnpicklingError("a storage of an unknown type")
            return dtype, f"data/{key}"

    try:
        with archive.open(root + "data.pkl") as f:
            return dict(_walk(Reader(f).load(), Module))
    except Exception as error:      # a damaged pickle raises anything
        why = " ".join(str(error).split())
        raise ValueError(f"{path}: not an archive of tensors and modules ({why}); nothing in it was run") from None


def _read_tensor(archive: zipfile.ZipFile, key: str, dtype: torch.dtype, offset: int, shape: tuple,
                 stride: tuple) -> Tensor:
    try:
        return torch.frombuffer(bytearray(archive.read(key)), dtype=dtype).as_strided(shape, stride, offset)
    except Exception as error:      # as_strided checks the bounds; a damaged zip raises anything
        why = " ".join(str(error).split())
        raise ValueError(f"{archive.filename}: a tensor of shape {tuple(shape)} is not in {key.partition('/')[2]} "
                         f"({why}): download it again") from None


def _walk(module: object, kind: type, prefix: str = "") -> Iterator[tuple[str, LazyTensor]]:
    """Dotted names and tensors of a module, an instance of `kind`, and of the modules in it."""
    for name, value in vars(module).items():
        if isinstance(value, LazyTensor):
            yield prefix + name, value
        elif isinstance(value, kind):
            yield from _walk(value, kind, f"{prefix}{name}.")
