"""Official weights: read lazily by name, assigned to a module without a second copy, written atomically.

Mirrors   the published files of SD3, SD3.5, Flux, their VAEs and text encoders, in the layouts of docs/formats.md
Storage   fp32, fp16, bf16, fp8, scaled or not; the compute dtype is chosen when a module is filled
Settings  from a file's own header. Of the config.json of a diffusers or transformers folder only the entries in CONFIG
Safety    only safetensors are opened; a pickle is refused before any of its bytes run
Check     python -m pytest tests/test_checkpoint.py tests/test_formats.py
"""

import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mode
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import names
from files import printable, read_json, replacing

K, M = TypeVar("K"), TypeVar("M", bound=nn.Module)
Device = str | torch.device
Filled = Callable[[Callable[[], M], "Weights", Device, torch.dtype | None], M]  # `filled`, or another way
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OFFICIAL_PREFIXES = ("model.diffusion_model.", "first_stage_model.")
MOST_SIZE, MOST_BLOCKS = 1 << 24, 512  # of a tensor, of a model: far above the published ones
CONFIG = ("_class_name", "model_type", "scaling_factor", "shift_factor", "latents_mean", "latents_std", "act_fn",
          "norm_num_groups", "axes_dims_rope", "num_attention_heads", "hidden_act", "eos_token_id", "feed_forward_proj",
          "relative_attention_max_distance")
MODELS = Path(__file__).parent / "models"
SD3_DOWNLOAD, FLUX_DOWNLOAD = "stabilityai/stable-diffusion-3-medium", "black-forest-labs/FLUX.1-dev"
FLUX_PARTS = "--exclude '*/diffusion_pytorch_model*'"  # the same weights under the names of diffusers
FLUX_SIZES = "34 GB: transformer 23.8, T5 9.5, VAE 0.3, CLIP-L 0.2"
DOWNLOADS = {  # --model NAME: arguments of hf download
    "sd3": f"{SD3_DOWNLOAD}-diffusers", "flux": f"{FLUX_DOWNLOAD} {FLUX_PARTS}",
    "flux-schnell": f"black-forest-labs/FLUX.1-schnell {FLUX_PARTS}"}


class Overflow(ValueError):
    """Finite weights that the compute dtype does not hold."""


# ---- tensors by name

@dataclass(frozen=True)
class LazyTensor:
    """A tensor whose shape is known and whose values are read on demand."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    cut: Callable[[int, int], Tensor] | None = None  # reads rows [first, last) of a tensor assembled from several
    place: tuple[Path, str] | None = None            # of a tensor stored as it is: its file and its name there
    scaled: tuple["LazyTensor", "LazyTensor"] | None = None  # fp8 and its scale, of which read() gives the product

    def rows(self, first: int, last: int) -> Tensor:
        """Rows [first, last) of the first axis; no other bytes of a mapped tensor are touched."""
        return self.cut(first, last) if self.cut else self.read()[first:last]


class Weights(dict[str, LazyTensor]):
    """Tensor name -> LazyTensor."""

    def __init__(self, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str], source: str):
        super().__init__(tensors)
        self.metadata = dict(metadata)  # of the safetensors file, and the entries CONFIG of config.json
        self.source = source            # the path, for messages

    def part(self, prefix: str) -> "Weights":
        """The tensors under a prefix, which is removed; all of them if no name has an official prefix."""
        chosen = {name.removeprefix(prefix): t for name, t in self.items() if name.startswith(prefix)}
        if not chosen and not any(name.startswith(OFFICIAL_PREFIXES) for name in self):
            return self
        return Weights(chosen, self.metadata, self.source)

    def with_official_names(self) -> "Weights":
        """Translate names of diffusers, keep others. ValueError if part of a stacked tensor is missing or misshapen."""
        tensors = {}
        for row in names.official_names(self, self.source):
            shapes, cut = [self[part].shape for part in row.parts], len(row.parts) > 1 or row.how == "swap_halves"
            if len({shape[1:] for shape in shapes}) > 1 or cut and () in shapes:
                listed = "; ".join(f"{part} {self[part].shape}" for part in row.parts)
                raise ValueError(f"{self.source}: shapes do not fit: {listed}")
            if row.official in tensors:
                raise ValueError(f"{self.source}: {row.official} is there under two names")
            tensors[row.official] = _assembled([self[part] for part in row.parts], row.how)
        return Weights(tensors, self.metadata, self.source)

    def described(self) -> str:
        """What the file is, for messages."""
        listed = f"holds {len(self)} tensors: {', '.join(list(self)[:2])} ..." if self else "holds nothing of it"
        return f"is {known.partition(';')[0]}" if (known := names.recognised(self, names.OTHERS)) else listed

    def shape_of(self, name: str, axes: int, kind: str) -> tuple[int, ...]:
        """Shape of a tensor that every `kind`, e.g. "SD3 transformer", has; ValueError if absent or of other axes."""
        if name not in self:
            raise ValueError(f"{self.source}: 1 missing: {name}; without it this is no {kind} "
                             f"(the file {self.described()})")
        shape = self[name].shape
        if len(shape) != axes or not all(0 < size <= MOST_SIZE for size in shape):
            raise ValueError(f"{self.source}: {name} has the shape {shape}, expected {axes} axes of 1 to {MOST_SIZE}")
        return shape

    def need(self, fits: bool, name: str, size: int, rule: str) -> None:
        """ValueError if a tensor has an impossible size."""
        if not fits:
            raise ValueError(f"{self.source}: {name} has {size}, expected {rule}")

    def common_size(self, suffix: str, axis: int, otherwise: str, kind: str, axes: int = 2) -> int:
        """The most common size among tensors with this suffix; fill() reports the others. Without such tensors,
        ValueError that `otherwise` is missing."""
        sizes = [self.shape_of(name, axes, kind)[axis] for name, t in self.items()
                 if name.endswith(suffix) and len(t.shape) == axes]
        return mode(sizes) if sizes else self.shape_of(otherwise, axes, kind)[axis]

    def depth(self, prefix: str, published: int | None = None) -> int:
        """How many numbered blocks there are under a prefix such as "double_blocks."; ValueError if one is missing, or
        if there are not as many as in the published file."""
        depth = names.depth(self, prefix)
        there = {name.removeprefix(prefix).split(".")[0] for name in self if name.startswith(prefix)}
        if gap := next((number for number in map(str, range(depth)) if number not in there), ""):
            raise ValueError(f"{self.source}: holds {prefix}{depth - 1}, but {prefix}{gap} is missing")
        if depth > MOST_BLOCKS:
            raise ValueError(f"{self.source}: {depth} {prefix[:-1]}; at most {MOST_BLOCKS} are read")
        if published not in (None, depth):
            raise ValueError(f"{self.source}: {depth} {prefix[:-1]}, where the published file of its width has "
                             f"{published}: it is not complete, download it again")
        return depth

    def number(self, *keys: str, otherwise: float | None = None, integer: bool = False) -> float | None:
        """The value of the first of these keys in the metadata; ValueError naming the file if it is not a number."""
        key = next((key for key in keys if key in self.metadata), None)
        if key is None:
            return otherwise
        text, kind = self.metadata[key][:40], "integer" if integer else "number"
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or integer and value % 1:
            raise ValueError(f"{self.source}: its metadata records {key} {text!r}, which is no {kind}")
        return int(value) if integer else value


def _assembled(parts: list[LazyTensor], how: str) -> LazyTensor:
    first = parts[0]
    if how == "as_1x1_conv" and len(first.shape) == 2:
        return LazyTensor((*first.shape, 1, 1), lambda: first.read()[:, :, None, None])
    if how != "swap_halves" and len(parts) == 1:
        return first
    pieces = [(part, 0, part.shape[0]) for part in parts]
    if how == "swap_halves":
        half = first.shape[0] // 2
        pieces = [(first, half, first.shape[0]), (first, 0, half)]
    height, cut = sum(end - begin for _, begin, end in pieces), partial(_stacked_rows, pieces)
    return LazyTensor((height, *first.shape[1:]), partial(cut, 0, height), cut)


def _stacked_rows(pieces: list[tuple[LazyTensor, int, int]], first: int, last: int) -> Tensor:
    """Rows [first, last) of the stacked pieces (tensor, from, to); only the pieces they lie in are read."""
    rows, start = [], 0
    for tensor, begin, end in pieces:
        low, high = max(first - start, 0), min(last - start, end - begin)
        if low < high:
            rows.append(tensor.rows(begin + low, begin + high))
        start += end - begin
    return torch.cat(rows) if rows else pieces[0][0].rows(0, 0)


# ---- reading

def open_weights(path: str | os.PathLike) -> Weights:
    """Open a file or folder of weights, without reading the tensors, under official names; prefixes stay.

    raises  FileNotFoundError if `path` does not exist; ValueError on a pickle, a truncated, quantised or foreign file,
            a missing shard, a name in two shards, a folder with several candidates
    """
    if not (path := Path(path)).exists():
        raise FileNotFoundError(f"{path}: {'a broken link' if path.is_symlink() else 'no such file or folder'}")
    if path.is_file() and names.SHARD.search(path.name):
        raise ValueError(f"{path}: one of several shards; give their folder, with its index.json")
    files, indexed = names.files_of_folder(path) if path.is_dir() else ([path], {})
    metadata, tensors = _config(path, files[0]), {}
    for file in files:
        shard = _open_file(file)
        if repeated := tensors.keys() & shard.keys():
            raise ValueError(f"{file}: {min(repeated)} is in another shard too")
        tensors |= shard
        metadata |= shard.metadata
    if lost := sorted(indexed.keys() - tensors.keys()):
        raise ValueError(f"{path}: the index lists {len(lost)} tensors that no shard has, the first is "
                         f"{printable(lost[0])[:80]}: index and shards are not of one download")
    return Weights(_scaled(tensors, str(path)), metadata, str(path)).with_official_names()


def _config(path: Path, file: Path) -> dict[str, str]:
    """The entries CONFIG of config.json: of a folder that was given, or beside a file that diffusers or transformers
    named. Beside others it may be of a training run, whose settings are not these weights'."""
    config = file.parent / "config.json"
    if not config.is_file() or not (path.is_dir() or names.LIBRARY_NAME.fullmatch(file.name)):
        return {}
    return {key: str(v) for key, v in read_json(config).items() if key in CONFIG and v is not None}


def _open_file(file: Path) -> Weights:
    names.check_path(file)
    open(file, "rb").close()  # safetensors would call a file that may not be read a missing one
    try:
        handle = safe_open(file, framework="pt")
        slices = {name: handle.get_slice(name) for name in handle.keys()}
    except SafetensorError as error:
        with open(file, "rb") as f:
            start = f.read(32)
        kind, advice = next((guess for prefix, *guess in names.FOREIGN if start.startswith(prefix)),
                            ("", "download it again"))
        why = f"{file.stat().st_size} bytes{kind}; {printable(str(error))[:120]}"
        raise ValueError(f"{file}: not a complete safetensors file ({why}): {advice}") from None
    names.check(file, {name: part.get_dtype() for name, part in slices.items()})
    tensors = {name: LazyTensor(tuple(part.get_shape()), partial(handle.get_tensor, name), place=(file, name))
               for name, part in slices.items()}
    return Weights(tensors, handle.metadata() or {}, str(file))


def _scaled(tensors: dict[str, LazyTensor], source: str) -> dict[str, LazyTensor]:
    """Scaled fp8: each weight times its scale, when it is read; what else describes the scaling is left out."""
    scaled = {name: t for name, t in tensors.items() if not names.BESIDE_SCALES.search(name)}
    if len(scaled) < len(tensors) and not any(name.endswith(names.SCALES) for name in tensors):
        raise ValueError(f"{source}: {min(tensors.keys() - scaled.keys())} shows scaled fp8, but there are no scales; "
                         f"{names.FULL}")
    for name in [name for name in scaled if name.endswith(".comfy_quant")]:
        text = bytes(scaled.pop(name).read().flatten()[:1000].byte().tolist()).decode("utf-8", "replace")  # JSON
        if not any(f'"{known}"' in text for known in names.FP8_FORMATS) or "convrot" in text:
            raise ValueError(f"{source}: {name} records {text[:60]!r}, which is not read; {names.FULL}")
    for name in [name for name in scaled if name.endswith(names.SCALES)]:
        scale, weight = scaled.pop(name), name.rpartition(".")[0] + ".weight"
        rows = (*scaled[weight].shape, 1)[0] if weight in scaled else 0
        if not rows or scale.shape not in ((), (1,), (1, 1), (rows,), (rows, 1)) or scaled[weight].cut:
            raise ValueError(f"{source}: {name} {scale.shape} is neither one scale of {weight} nor one per row, or is "
                             f"its second; {names.FULL}")
        cut = partial(_times_scale, scaled[weight], scale)
        scaled[weight] = LazyTensor(scaled[weight].shape, partial(cut, 0, rows), cut, scaled=(scaled[weight], scale))
    return scaled


def _times_scale(weight: LazyTensor, scale: LazyTensor, first: int, last: int) -> Tensor:
    factor = scale.read().float().flatten().expand(weight.shape[0])[first:last]
    return weight.rows(first, last).float() * factor.view(-1, *[1] * (len(weight.shape) - 1))


def anew(tensors: Mapping[K, LazyTensor]) -> dict[K, LazyTensor]:
    """The same tensors through new memory maps, gone with the last of them; assembled ones as they are."""
    maps = {file: safe_open(file, framework="pt") for file in {t.place[0] for t in tensors.values() if t.place}}
    return {name: replace(t, read=partial(maps[t.place[0]].get_tensor, t.place[1])) if t.place else t
            for name, t in tensors.items()}


# ---- filling a module

def filled(make: Callable[[], M], weights: Weights, device: Device, dtype: torch.dtype | None) -> M:
    """The module that `make` builds, on meta, filled with weights."""
    with torch.device("meta"):
        module = make()
    fill(module, weights, device, dtype)
    return module


def fill(module: nn.Module, weights: Weights, device: Device = "cpu", dtype: torch.dtype | None = None) -> None:
    """Assign weights to a module that was built on the meta device.

    module   all parameters and persistent buffers on meta; one that FSDP has cut (a DTensor) receives its own rows
    weights  exactly the names and shapes of module.state_dict()
    device   where the tensors go, one at a time, as they are stored
    dtype    compute dtype, converted to on the device; None is float32
    raises   ValueError that lists the names or shapes that differ, or names the first tensor with NaN or Inf
    """
    check_names(module, weights)
    assign(module, weights, module.state_dict(), device, dtype)
    assert not any(t.is_meta for t in (*module.parameters(), *module.buffers())), "a tensor stayed on meta"


def check_names(module: nn.Module, weights: Weights) -> None:
    """ValueError that lists the names or shapes in which weights differ from a module."""
    state = module.state_dict()
    sides = ("missing", state.keys() - weights.keys()), ("unknown", weights.keys() - state.keys())
    if lists := [f"{len(some)} {what}: {', '.join(sorted(some)[:4])}" for what, some in sides if some]:
        raise ValueError(f"{weights.source}: names differ from a {type(module).__name__}: {'; '.join(lists)}")
    if differ := [f"{name}: file {tuple(weights[name].shape)}, model {tuple(t.shape)}" for name, t in state.items()
                  if tuple(weights[name].shape) != tuple(t.shape)]:
        raise ValueError(f"{weights.source}: {len(differ)} shapes differ: " + "; ".join(differ[:4]))


def assign(module: nn.Module, weights: Weights, which: Iterable[str], device: Device,
           dtype: torch.dtype | None) -> None:
    """`fill` for the tensors `which` alone."""
    state, blank = module.state_dict(), []
    for name in which:
        prefix, _, leaf = name.rpartition(".")
        owner = module.get_submodule(prefix)
        shard = state[name].to_local() if hasattr(state[name], "to_local") else None
        stored = weights[name].read() if shard is None else weights[name].rows(*_own_rows(state[name]))
        if state[name].is_floating_point() and not stored.is_floating_point():
            raise ValueError(f"{weights.source}: {name} is stored as {stored.dtype}, which is no number by itself; "
                             f"{names.FULL}")
        tensor = stored.to(device).to(dtype or torch.float32)
        # checked through a second map: rows that are never read, most of SD3's position table, then take no memory
        low, high = range_of(anew({name: weights[name]})[name].read() if tensor is stored and shard is None else tensor)
        if low == high == 0 and tensor.ndim > 1 and shard is None:
            blank.append(name)
        if not math.isfinite(high - low):
            low, high = range_of(stored.float())
            kind, why = ((Overflow, f"its values exceed {tensor.dtype}; choose bf16 or fp32")
                         if math.isfinite(high - low) else (ValueError, "the file is damaged or its training diverged"))
            raise kind(f"{weights.source}: {name} holds NaN or Inf: {why}")
        if shard is not None:
            shard.copy_(tensor)
        elif leaf in owner._parameters:
            owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=owner._parameters[leaf].requires_grad))
        else:
            owner.register_buffer(leaf, tensor)
    if blank:
        warnings.warn(f"{weights.source}: {len(blank)} matrices hold zeros alone, such as {blank[0]}: not trained, or "
                      "its download did not end", stacklevel=3)


def _own_rows(tensor: Tensor) -> tuple[int, int]:
    """Rows [first, last) that this rank holds of a DTensor, cut along its first axis as torch.chunk cuts."""
    rank, height = tensor.device_mesh.get_local_rank(), tensor.shape[0]
    size = -(-height // tensor.device_mesh.size())
    return min(rank * size, height), min((rank + 1) * size, height)


def range_of(tensor: Tensor) -> list[float]:
    """Smallest and largest value, without a mask of the tensor's size; NaN where one is NaN."""
    return torch.stack(tensor.aminmax()).tolist() if tensor.numel() else [0.0, 0.0]


# ---- writing

def save(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, object]) -> None:
    """Write a safetensors file, complete or not at all: after an OSError the previous file is as it was."""
    try:
        with replacing(Path(path)) as temporary:
            temporary.touch()  # an unwritable folder fails here
            permissions = temporary.stat().st_mode
            stored = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
            save_file(stored, temporary, {key: str(value) for key, value in metadata.items()})
            os.chmod(temporary, permissions)  # save_file makes files that only their owner can read
            with open(temporary, "rb+") as f:  # save_file orders the metadata at random; equal contents are equal bytes
                header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
                header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
                f.seek(8)
                f.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
                os.fsync(f.fileno())
    except SafetensorError as error:
        raise OSError(f"{path}: could not be written ({error}); the previous file, if any, is untouched") from None


# ---- model folders

def model_folder(name: str, weights: str | None = None) -> Path:
    """The folder that --model NAME or --weights DIR means."""
    return Path(weights) if weights else MODELS / name


def locate(folder: str | os.PathLike) -> tuple[Path, Path]:
    """Find the transformer and the autoencoder of a model folder: two paths for open_weights.

    folder  sd3*.safetensors or flux*.safetensors with both; flux*.safetensors, ae.safetensors; transformer/, vae/
    raises  FileNotFoundError with the download command if the folder has none of these; ValueError if it has several
    """
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"{folder}: a file; --weights takes the folder that also holds text encoders and VAE, "
                         "--transformer a file")
    files = sorted([*folder.glob("sd3*.safetensors"), *folder.glob("flux*.safetensors")])
    # sd3_medium_incl_clips*.safetensors are sd3_medium.safetensors with text encoders added
    files = [f for f in files if not any(f.stem.startswith(f"{g.stem}_incl_clips") for g in files)]
    transformer, vae = folder / "transformer", folder / "vae"
    models = [f.name for f in files] + ["transformer/"] * any(transformer.glob("*.safetensors"))
    if len(models) > 1:
        raise ValueError(f"{folder}: several could be the model ({', '.join(models)}): keep one, move the others away")
    if not files and transformer.is_dir() and vae.is_dir():
        return transformer, vae
    if not files:
        if others := sorted(f.name for f in folder.glob("*") if f.suffix in (*names.OTHER_SUFFIXES, ".sft")):
            do = "rename it to .safetensors" if others[0].endswith(".sft") else "put the .safetensors there"
            raise ValueError(f"{folder}: holds {others[0]}, which is not opened; {do}")
        raise FileNotFoundError(_no_model(folder))
    sd3, vae = files[0].name.startswith("sd3"), folder / "ae.safetensors"
    if sd3 or not vae.is_file() and any(name.startswith("first_stage_model.") for name in open_weights(files[0])):
        return files[0], files[0]
    if not vae.is_file():
        raise FileNotFoundError(f"{vae}: not found; it is Flux's autoencoder, {FLUX_DOWNLOAD} has it")
    return files[0], vae


def _no_model(folder: Path) -> str:
    """The message for a folder without a model, with the command that downloads the model of its name, or any model."""
    lack = "no such folder"
    if folder.is_dir():
        lack = "holds no model: no sd3*.safetensors, flux*.safetensors, transformer/ with vae/"
        if others := sorted(f.name for f in folder.glob("[!.]*.safetensors")):
            lack += f", but {', '.join(others[:4])}"
    if folder.parent == MODELS:
        lack += f", models/ has {', '.join(sorted(f.parent.name for f in MODELS.glob('*/tokenizer'))) or 'none'}"
    if inside := names.model_inside(folder):
        return f"{folder}: {lack}; {inside} has one: give it"
    name = folder.name.lower()
    like = "flux-schnell" if "schnell" in name else "flux" if "flux" in name else "sd3" if "sd3" in name else None
    commands = [f"hf download {DOWNLOADS[key]} --local-dir {folder}" for key in ([like] if like else DOWNLOADS)]
    sizes = f" ({FLUX_SIZES})" if like and "flux" in like else ""
    return (f"{folder}: {lack}; accept the model's licence on its page at huggingface.co, then: "
            f"{'; or '.join(commands)}{sizes}")
