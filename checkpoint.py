"""Official weights: read by name, lazily; put into a module without a second copy; written whole or not at all.

Mirrors   the published safetensors of SD3, SD3.5, Flux, their VAEs and text encoders, and the diffusers
          folders of the same models, whose names are turned into official ones by the tables below
          (held by tests/test_checkpoint.py against the names and shapes of every published file)
Layouts   one file; a folder of shards with an index; a diffusers or transformers folder with config.json
Storage   fp32, fp16, bf16, fp8 (e4m3fn); the compute dtype is chosen when a module is filled
Check     python -m pytest tests/test_checkpoint.py

A file is mapped, never read whole: a tensor's bytes are touched when `LazyTensor.read` is called.
Only safetensors are trusted. Pickles are refused before a byte of them is executed.
"""

import json
import math
import os
import re
import resource
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mode

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OFFICIAL_PREFIXES = ("model.diffusion_model.", "first_stage_model.")
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
MODELS = Path(__file__).parent / "models"
SD3_DOWNLOAD, FLUX_DOWNLOAD = "stabilityai/stable-diffusion-3-medium", "black-forest-labs/FLUX.1-dev"
FLUX_PARTS = "--exclude '*/diffusion_pytorch_model*'"  # the same weights again, in the names of diffusers
FLUX_SIZES = "34 GB: transformer 23.8, T5 9.5, VAE 0.3, CLIP-L 0.2"
DOWNLOADS = {  # --model NAME: arguments of hf download, sizes
    "sd3": (f"{SD3_DOWNLOAD}-diffusers", ""),
    "flux": (f"{FLUX_DOWNLOAD} {FLUX_PARTS}", FLUX_SIZES),
    "flux-schnell": (f"black-forest-labs/FLUX.1-schnell {FLUX_PARTS}", FLUX_SIZES)}
PLAIN_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors")


@dataclass(frozen=True)
class LazyTensor:
    """A tensor known by its shape until `read()` maps it."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    cut: Callable[[int, int], Tensor] | None = None  # where read() puts it together: the same for some rows
    again: Callable[[], Tensor] | None = None        # where read() maps it: through another mapping, which goes with the tensor

    def rows(self, first: int, last: int) -> Tensor:
        """Rows first to last, excluded, of the first axis. Of a mapped tensor no other byte is touched."""
        return self.cut(first, last) if self.cut else self.read()[first:last]


class Weights(dict[str, LazyTensor]):
    """Official name -> LazyTensor, with what the file or folder says about itself.

    metadata  safetensors metadata, or the entries of config.json; all values are text
    source    the path, for messages
    """

    def __init__(self, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str], source: str):
        super().__init__(tensors)
        self.metadata = dict(metadata)
        self.source = source

    def part(self, prefix: str) -> "Weights":
        """The tensors under `prefix`, which is cut off; all of them where no name has an official prefix.

        prefix   one of OFFICIAL_PREFIXES, or the name of a part such as "text_encoders.clip_l.transformer."
        returns  Weights
        """
        chosen = {name.removeprefix(prefix): t for name, t in self.items() if name.startswith(prefix)}
        if not chosen and not any(name.startswith(OFFICIAL_PREFIXES) for name in self):
            return self
        return Weights(chosen, self.metadata, self.source)

    def shape_of(self, name: str, axes: int, kind: str) -> tuple[int, ...]:
        """Shape of a tensor that every `kind` has, such as "SD3 transformer"; ValueError if it is missing or has other axes."""
        if name not in self:
            raise ValueError(f"{self.source}: 1 missing: {name}; without it this is no {kind} "
                             f"(the file holds {len(self)} tensors: {', '.join(list(self)[:2])} ...)")
        if len(self[name].shape) != axes:
            raise ValueError(f"{self.source}: {name} has the shape {self[name].shape}, expected {axes} axes")
        return self[name].shape

    def common_size(self, suffix: str, axis: int, otherwise: str, kind: str, axes: int = 2) -> int:
        """The most common size among tensors with this suffix, so that fill() reports the odd one out.

        If there are none, `otherwise` is reported missing.
        """
        sizes = [t.shape[axis] for name, t in self.items() if name.endswith(suffix) and len(t.shape) == axes]
        return mode(sizes) if sizes else self.shape_of(otherwise, axes, kind)[axis]

    def depth(self, prefix: str) -> int:
        """How many numbered blocks there are under a prefix such as "double_blocks."."""
        found = (re.match(re.escape(prefix) + r"(\d+)\.", name) for name in self)
        return 1 + max((int(match[1]) for match in found if match), default=-1)

    def number(self, *names: str, otherwise: float | None = None) -> float | None:
        """The number that the metadata gives under the first of these names; ValueError that names the file if it is none."""
        for name in names:
            if name in self.metadata:
                try:
                    value = float(self.metadata[name])
                except ValueError:
                    value = math.nan
                if not math.isfinite(value):
                    raise ValueError(f"{self.source}: its metadata says {name} {self.metadata[name]!r}, which is no number")
                return value
        return otherwise


def open_weights(path: str | os.PathLike) -> Weights:
    """Open a file or folder of weights without reading them.

    path     a .safetensors file, a folder with an index and its shards, or a diffusers / transformers folder
    returns  Weights under official names (prefixes are kept: see Weights.part)
    raises   FileNotFoundError if there is nothing at `path`; ValueError on a pickle, a truncated or foreign file,
             a shard that is missing or lists a name twice, a folder in which the choice is not clear
    """
    path = Path(path)
    if path.is_dir():
        files, metadata = _files_of_folder(path), _config_of_folder(path)
    elif path.is_file():
        files, metadata = [path], _config_of_folder(path.parent)
    else:
        raise FileNotFoundError(f"{path}: no such file or folder")
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        found, said = _open_file(file)
        metadata |= said
        if twice := tensors.keys() & found.keys():
            raise ValueError(f"{file}: {sorted(twice)[0]} stands in another shard too")
        tensors |= found
    return Weights(_official_names(tensors, str(path)), metadata, str(path))


def _files_of_folder(folder: Path) -> list[Path]:
    indexes = sorted(folder.glob("*.safetensors.index.json"), key=lambda f: len(f.name))
    if indexes:
        try:
            names = sorted(set(map(str, read_json(indexes[0])["weight_map"].values())))
        except (KeyError, AttributeError, TypeError):
            raise ValueError(f"{indexes[0]}: no index, which has \"weight_map\": {{name: file}}; download it again") from None
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder}: {len(missing)} of {len(names)} shards are missing, the first is {missing[0]}")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    plain = [f for f in files if f.name in PLAIN_NAMES]
    if len(files) == 1 or len(plain) == 1:
        return plain or files
    pickles = [f.name for f in folder.iterdir() if f.suffix in PICKLE_SUFFIXES]
    if pickles and not files:
        raise ValueError(f"{folder}: holds pickles only ({pickles[0]}); download the .safetensors, pickles are not opened")
    what = f"several safetensors ({', '.join(f.name for f in files[:4])}): name one" if files else "no .safetensors file"
    raise ValueError(f"{folder}: {what}")


def _config_of_folder(folder: Path) -> dict[str, str]:
    config = folder / "config.json"
    if not config.is_file():
        return {}
    return {k: str(v) for k, v in read_json(config).items() if v is not None}


def read_json(file: Path) -> dict:
    """A JSON object; ValueError that names the file if it is none."""
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not JSON ({error}): download it again") from None
    if not isinstance(said, dict):
        raise ValueError(f"{file}: holds a {type(said).__name__}, not an object: download it again")
    return said


def _open_file(file: Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    if file.suffix in PICKLE_SUFFIXES:
        raise ValueError(f"{file}: a pickle can run code when it is opened; give the .safetensors of the same weights")
    try:
        handle = safe_open(file, framework="pt")
        names = list(handle.keys())
        shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in names}
    except SafetensorError as error:
        what, another = _what_it_is(file)
        do = "give the .safetensors of the same weights" if another else "download it again"
        raise ValueError(f"{file}: not a whole safetensors file ({what}; {error}): {do}") from None

    def again(name: str) -> Tensor:
        return safe_open(file, framework="pt").get_tensor(name)

    lazy = {name: LazyTensor(shapes[name], partial(handle.get_tensor, name), again=partial(again, name)) for name in names}
    return lazy, handle.metadata() or {}


def _what_it_is(file: Path) -> tuple[str, bool]:
    """What a file looks like, for a message, and whether it is whole but of another kind."""
    with open(file, "rb") as f:
        head = f.read(8)
    size = file.stat().st_size
    for start, kind, another in ((b"PK", "a zip archive or pickle", True), (b"\x80", "a pickle", True), (b"GGUF", "a GGUF file", True),
                                 (b"<", "a web page", False)):
        if head.startswith(start):
            return f"{size} bytes, looks like {kind}", another
    return f"{size} bytes", False


def fill(module: nn.Module, weights: Mapping[str, LazyTensor], device: str | torch.device = "cpu",
         dtype: torch.dtype | None = None) -> None:
    """Give a module built on the meta device its weights, by assignment.

    module   every parameter and persistent buffer must be on meta
    weights  exactly the names and shapes of module.state_dict()
    device   where the tensors go, one by one
    dtype    compute dtype; None is float32
    raises   ValueError that lists the names or shapes that differ, or the first tensor with NaN or Inf

    A parameter that FSDP has cut into rows (a DTensor, already on its device) takes its own rows of the file, and no others are read.
    """
    wanted, source = module.state_dict(), getattr(weights, "source", "weights")
    missing, extra = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    if missing or extra:
        says = [f"{len(names)} {what}: {', '.join(names[:4])}" for what, names in (("missing", missing), ("unknown", extra)) if names]
        raise ValueError(f"{source}: names differ from a {type(module).__name__}: " + "; ".join(says))
    differ = [(k, tuple(weights[k].shape), tuple(wanted[k].shape)) for k in wanted if tuple(weights[k].shape) != tuple(wanted[k].shape)]
    if differ:
        raise ValueError(f"{source}: {len(differ)} shapes differ: " + "; ".join(f"{k}: file {a}, model {b}" for k, a, b in differ[:4]))
    for name, place in _places(module):
        shard = wanted[name].to_local() if hasattr(wanted[name], "to_local") else None
        stored = weights[name].read() if shard is None else weights[name].rows(*_own_rows(wanted[name]))
        tensor = stored.to(device=device, dtype=dtype or torch.float32)
        # A mapped tensor is checked through another mapping: what the model never reads, most of SD3's position table, then takes no memory
        again = weights[name].again if tensor is stored and shard is None else None
        if not _finite(again() if again else tensor):
            raise ValueError(f"{source}: {name} holds NaN or Inf: the file is damaged or a training run diverged")
        owner, kind = place
        leaf = name.rpartition(".")[2]
        if shard is not None:
            shard.copy_(tensor)
        elif kind == "parameter":
            owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=owner._parameters[leaf].requires_grad))
        else:
            owner.register_buffer(leaf, tensor)
    assert not any(t.is_meta for t in (*module.parameters(), *module.buffers())), "a tensor stayed on meta"


def _finite(tensor: Tensor) -> bool:
    return not tensor.numel() or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())  # no mask of the tensor's size


def _own_rows(tensor: Tensor) -> tuple[int, int]:
    """First and last row (excluded) of this rank's part of a DTensor that is cut along its first axis, as torch.chunk cuts."""
    mesh = tensor.device_mesh
    size = -(-tensor.shape[0] // mesh.size())
    return tuple(min(k * size, tensor.shape[0]) for k in (mesh.get_local_rank(), mesh.get_local_rank() + 1))


def _places(module: nn.Module) -> Iterable[tuple[str, tuple[nn.Module, str]]]:
    for prefix, owner in list(module.named_modules()):
        dot = prefix and prefix + "."
        for leaf in list(owner._parameters):
            if owner._parameters[leaf] is not None:
                yield dot + leaf, (owner, "parameter")
        for leaf in list(owner._buffers):
            if leaf not in owner._non_persistent_buffers_set:
                yield dot + leaf, (owner, "buffer")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, with its suffix, that becomes `path` if the block ends well and vanishes if it does not."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, object]) -> None:
    """Write a safetensors file under a temporary name and rename it, so that it is whole or absent.

    path      the folder must exist
    tensors   official name -> tensor
    metadata  values are written as text
    raises    OSError if the disk is full or the folder is not writable; the previous file then stays as it was
    """
    path = Path(path)
    try:
        with replacing(path) as temporary:
            temporary.touch()  # an unwritable folder fails here
            permissions = temporary.stat().st_mode
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, {k: str(v) for k, v in metadata.items()})
            os.chmod(temporary, permissions)  # save_file makes files that only their owner reads
            with open(temporary, "rb+") as f:
                os.fsync(f.fileno())
    except SafetensorError as error:
        raise OSError(f"{path}: could not be written ({error}); the previous file, if any, is untouched") from None


def writable(folder: Path, given: str) -> None:
    """Make a folder, and try it: OSError, that begins with the flag which named it, where nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{given}: {folder} is no folder that can be written ({error.strerror}); name another") from None


def model_folder(name: str, weights: str | None = None) -> Path:
    """The folder that --model NAME or --weights DIR means."""
    return Path(weights) if weights else MODELS / name


def check_device(name: str) -> None:
    """Refuse a --device that this machine lacks: ValueError lists those it has."""
    here = ["cpu", *(["cuda"] if torch.cuda.is_available() else []), *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name not in here:
        raise ValueError(f"--device {name}: this machine has {', '.join(here)}; cuda needs an NVIDIA GPU and a torch built for it")


def peak_memory_gib(device: str | torch.device) -> float:
    """Most memory that this process has held so far, GiB: of a CUDA device by torch's allocator, else resident on the host."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)  # macOS counts bytes


def locate(folder: str | os.PathLike) -> tuple[Path, Path]:
    """Where a model folder keeps its transformer and its autoencoder.

    folder   as downloaded: sd3*.safetensors with both, or flux*.safetensors and ae.safetensors, or the diffusers layout with
             transformer/ and vae/
    returns  (transformer, vae), paths for open_weights
    raises   FileNotFoundError with the download command if there is no such folder or no layout is in it;
             ValueError if several files could be meant
    """
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"{folder}: a file; --weights takes the folder that holds text encoders and VAE too, --transformer one file")
    files = sorted([*folder.glob("sd3*.safetensors"), *folder.glob("flux*.safetensors")])
    if (folder / "transformer").is_dir() and (folder / "vae").is_dir() and (any(folder.glob("transformer/*.safetensors")) or not files):
        return folder / "transformer", folder / "vae"
    if not files:
        if others := [f.name for f in folder.glob("*") if f.suffix in (".gguf", *PICKLE_SUFFIXES)]:
            raise ValueError(f"{folder}: holds {others[0]}, which is not opened; put the .safetensors of the same weights there")
        raise FileNotFoundError(_nothing_there(folder))
    # sd3_medium_incl_clips*.safetensors are sd3_medium.safetensors with text encoders added
    files = [f for f in files if not any(f.stem.startswith(g.stem + "_") for g in files)]
    if len(files) > 1:
        raise ValueError(f"{folder}: several files could be the model ({', '.join(f.name for f in files)}): keep one there")
    if files[0].name.startswith("sd3"):
        return files[0], files[0]
    if not (folder / "ae.safetensors").is_file():
        raise FileNotFoundError(f"{folder / 'ae.safetensors'}: not found; it is Flux's autoencoder, {FLUX_DOWNLOAD} has it")
    return files[0], folder / "ae.safetensors"


def _nothing_there(folder: Path) -> str:
    """What a folder without a model lacks, and the command that fills it: of the model that it is named after, else of all."""
    what = "holds no model: no sd3*.safetensors, flux*.safetensors, transformer/ with vae/" if folder.is_dir() else "no such folder"
    if folder.parent == MODELS:
        what += f", there is {', '.join(sorted(f.parent.name for f in MODELS.glob('*/tokenizer'))) or 'none'}"
    if folder.parent == MODELS and folder.name in DOWNLOADS:
        arguments, sizes = DOWNLOADS[folder.name]
        command = f"hf download {arguments} --local-dir {folder}" + (f" ({sizes})" if sizes else "")
    else:
        first, *others = (arguments for arguments, _ in DOWNLOADS.values())
        command = f"hf download {first} --local-dir {folder}; or {', or '.join(name.split()[0] for name in others)}"
    return f"{folder}: {what}; accept the model's licence on its page at huggingface.co, then: {command}"


def _official_names(tensors: dict[str, LazyTensor], source: str) -> dict[str, LazyTensor]:
    """Turn diffusers names into official ones; official, transformers and unknown names stay as they are.

    raises   ValueError if a part of a fused tensor is missing or does not fit its neighbours
    """
    table = next((table for mark, _, table in TABLES if any(name.startswith(mark) for name in tensors)), "")
    rows, official, fused = list(_rows(table)), {}, {}
    for name, tensor in tensors.items():
        for stem, how, pieces in rows:
            found = [(piece, new) for piece in pieces if (new := _rename(name, piece, stem, tensors))]
            if found:
                piece, new = found[0]
                fused.setdefault(new, (stem, how, pieces, {}))[3][piece] = name
                break
        else:
            official[name] = tensor
    for new, (stem, how, pieces, parts) in fused.items():
        if absent := [_rename(new, stem, piece, ()) for piece in pieces if piece not in parts]:
            raise ValueError(f"{source}: {len(absent)} missing: {', '.join(absent)}; {next(iter(parts.values()))} is there")
        names = [parts[piece] for piece in pieces]
        if len({tensors[name].shape[1:] for name in names}) > 1:
            raise ValueError(f"{source}: shapes do not fit: " + "; ".join(f"{name} {tensors[name].shape}" for name in names))
        official[new] = _joined(how, [tensors[name] for name in names])
    return official


def _joined(how: str, parts: list[LazyTensor]) -> LazyTensor:
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    if how == "conv" and len(shape) == 2:
        return LazyTensor((*shape, 1, 1), lambda: parts[0].read()[:, :, None, None])
    if how != "swap" and len(parts) == 1:
        return parts[0]
    half = shape[0] // 2
    halves = [(parts[0], half, shape[0]), (parts[0], 0, half)]
    cut = partial(_stacked_rows, halves if how == "swap" else [(part, 0, part.shape[0]) for part in parts])
    return LazyTensor(shape, partial(cut, 0, shape[0]), cut)


def _stacked_rows(pieces: list[tuple[LazyTensor, int, int]], first: int, last: int) -> Tensor:
    """Rows of what the pieces (tensor, from, to) make when they are stacked; only the pieces in question are read."""
    found, start = [], 0
    for tensor, begin, end in pieces:
        low, high = max(first - start, 0), min(last - start, end - begin)
        if low < high:
            found.append(tensor.rows(begin + low, begin + high))
        start += end - begin
    return torch.cat(found) if found else pieces[0][0].rows(0, 0)


def diffusers_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The other way: official names, without prefix, to those of diffusers; tensors are views where they can be.

    tensors  a state dict of MMDiT, Flux or VAE
    raises   ValueError on a name that the tables do not have
    """
    table = next((table for _, mark, table in TABLES if any(name.startswith(mark) for name in tensors)), "")
    rows, renamed = list(_rows(table)), {}
    for name, tensor in tensors.items():
        fits = ((how, [_rename(name, stem, piece, tensors) for piece in pieces]) for stem, how, pieces in rows)
        how, names = next(((how, names) for how, names in fits if names[0]), ("", []))
        if not names:
            raise ValueError(f"{name} has no name in diffusers")
        parts = [tensor]
        if len(names) > 1:  # every part but the last is as tall as the matrix is wide
            tall = tensors[name.rpartition(".")[0] + ".weight"].shape[1]
            parts = tensor.split([tall] * (len(names) - 1) + [len(tensor) - tall * (len(names) - 1)])
        elif how == "swap":
            parts = [torch.cat(tensor.chunk(2)[::-1])]
        elif how == "conv" and tensor.ndim == 4:
            parts = [tensor[:, :, 0, 0]]
        renamed |= zip(names, parts, strict=True)
    return renamed


def _rows(table: str) -> Iterable[tuple[str, str, list[str]]]:
    for row in table.splitlines():
        official, *how, diffusers = row.split()
        head, _, tails = diffusers.rstrip("}").partition("{")
        yield official, "".join(how), [head + tail for tail in tails.split(",")]


def _rename(name: str, old: str, new: str, names: Collection[str]) -> str | None:
    """`name` after its pattern `old` is replaced by `new`; None if it does not fit.

    With four levels in `names`, up.~ -> up_blocks.~ turns up.3.weight into up_blocks.0.weight; with blocks 0 to 23,
    joint_blocks.$ fits joint_blocks.23 alone.
    """
    found = re.fullmatch(re.sub("[#~$]", r"(\\d+)", old.replace(".", r"\.")) + TAIL, name)
    if not found:
        return None
    *numbers, tail = found.groups()
    for symbol, number in zip(re.findall("[#~$]", old), map(int, numbers), strict=True):
        if symbol != "#":
            prefix = old[:old.index(symbol)]
            last = max(int(other.removeprefix(prefix).split(".")[0]) for other in names if other.startswith(prefix))
            if symbol == "$" and number != last:
                return None
            number = last - number if symbol == "~" else number
        new = new.replace(symbol, str(number), 1)
    return new + tail


# One row a module or tensor: official name, how (if not as it is), diffusers name; the first row that fits is taken.
#   #      a number, the same on both sides         swap   the halves of dimension 0 are exchanged
#   ~      a number, counted from the other end     conv   a linear weight (C, C) is a 1x1 convolution (C, C, 1, 1)
#   $      the number of the last block             {a,b}  several tensors, stacked on dimension 0 in the official file
TAIL = r"((?:\.(?:norm|conv)[12])?\.(?:weight|bias)|)"

SD3 = """\
pos_embed                                             pos_embed.pos_embed
x_embedder.proj                                       pos_embed.proj
t_embedder.mlp.0                                      time_text_embed.timestep_embedder.linear_1
t_embedder.mlp.2                                      time_text_embed.timestep_embedder.linear_2
y_embedder.mlp.0                                      time_text_embed.text_embedder.linear_1
y_embedder.mlp.2                                      time_text_embed.text_embedder.linear_2
context_embedder                                      context_embedder
joint_blocks.#.x_block.adaLN_modulation.1             transformer_blocks.#.norm1.linear
joint_blocks.#.x_block.attn.qkv                       transformer_blocks.#.attn.{to_q,to_k,to_v}
joint_blocks.#.x_block.attn.ln_q                      transformer_blocks.#.attn.norm_q
joint_blocks.#.x_block.attn.ln_k                      transformer_blocks.#.attn.norm_k
joint_blocks.#.x_block.attn.proj                      transformer_blocks.#.attn.to_out.0
joint_blocks.#.x_block.attn2.qkv                      transformer_blocks.#.attn2.{to_q,to_k,to_v}
joint_blocks.#.x_block.attn2.ln_q                     transformer_blocks.#.attn2.norm_q
joint_blocks.#.x_block.attn2.ln_k                     transformer_blocks.#.attn2.norm_k
joint_blocks.#.x_block.attn2.proj                     transformer_blocks.#.attn2.to_out.0
joint_blocks.#.x_block.mlp.fc1                        transformer_blocks.#.ff.net.0.proj
joint_blocks.#.x_block.mlp.fc2                        transformer_blocks.#.ff.net.2
joint_blocks.$.context_block.adaLN_modulation.1 swap  transformer_blocks.$.norm1_context.linear
joint_blocks.#.context_block.adaLN_modulation.1       transformer_blocks.#.norm1_context.linear
joint_blocks.#.context_block.attn.qkv                 transformer_blocks.#.attn.{add_q_proj,add_k_proj,add_v_proj}
joint_blocks.#.context_block.attn.ln_q                transformer_blocks.#.attn.norm_added_q
joint_blocks.#.context_block.attn.ln_k                transformer_blocks.#.attn.norm_added_k
joint_blocks.#.context_block.attn.proj                transformer_blocks.#.attn.to_add_out
joint_blocks.#.context_block.mlp.fc1                  transformer_blocks.#.ff_context.net.0.proj
joint_blocks.#.context_block.mlp.fc2                  transformer_blocks.#.ff_context.net.2
final_layer.adaLN_modulation.1                  swap  norm_out.linear
final_layer.linear                                    proj_out"""

FLUX = """\
img_in                                                x_embedder
txt_in                                                context_embedder
time_in.in_layer                                      time_text_embed.timestep_embedder.linear_1
time_in.out_layer                                     time_text_embed.timestep_embedder.linear_2
vector_in.in_layer                                    time_text_embed.text_embedder.linear_1
vector_in.out_layer                                   time_text_embed.text_embedder.linear_2
guidance_in.in_layer                                  time_text_embed.guidance_embedder.linear_1
guidance_in.out_layer                                 time_text_embed.guidance_embedder.linear_2
double_blocks.#.img_mod.lin                           transformer_blocks.#.norm1.linear
double_blocks.#.img_attn.qkv                          transformer_blocks.#.attn.{to_q,to_k,to_v}
double_blocks.#.img_attn.norm.query_norm.scale        transformer_blocks.#.attn.norm_q.weight
double_blocks.#.img_attn.norm.key_norm.scale          transformer_blocks.#.attn.norm_k.weight
double_blocks.#.img_attn.proj                         transformer_blocks.#.attn.to_out.0
double_blocks.#.img_mlp.0                             transformer_blocks.#.ff.net.0.proj
double_blocks.#.img_mlp.2                             transformer_blocks.#.ff.net.2
double_blocks.#.txt_mod.lin                           transformer_blocks.#.norm1_context.linear
double_blocks.#.txt_attn.qkv                          transformer_blocks.#.attn.{add_q_proj,add_k_proj,add_v_proj}
double_blocks.#.txt_attn.norm.query_norm.scale        transformer_blocks.#.attn.norm_added_q.weight
double_blocks.#.txt_attn.norm.key_norm.scale          transformer_blocks.#.attn.norm_added_k.weight
double_blocks.#.txt_attn.proj                         transformer_blocks.#.attn.to_add_out
double_blocks.#.txt_mlp.0                             transformer_blocks.#.ff_context.net.0.proj
double_blocks.#.txt_mlp.2                             transformer_blocks.#.ff_context.net.2
single_blocks.#.modulation.lin                        single_transformer_blocks.#.norm.linear
single_blocks.#.linear1                               single_transformer_blocks.#.{attn.to_q,attn.to_k,attn.to_v,proj_mlp}
single_blocks.#.linear2                               single_transformer_blocks.#.proj_out
single_blocks.#.norm.query_norm.scale                 single_transformer_blocks.#.attn.norm_q.weight
single_blocks.#.norm.key_norm.scale                   single_transformer_blocks.#.attn.norm_k.weight
final_layer.adaLN_modulation.1                  swap  norm_out.linear
final_layer.linear                                    proj_out"""

VAE_ENDS = """\
encoder.conv_in                                       encoder.conv_in
encoder.norm_out                                      encoder.conv_norm_out
encoder.conv_out                                      encoder.conv_out
encoder.down.#.block.#                                encoder.down_blocks.#.resnets.#
encoder.down.#.block.#.nin_shortcut                   encoder.down_blocks.#.resnets.#.conv_shortcut
encoder.down.#.downsample.conv                        encoder.down_blocks.#.downsamplers.0.conv
decoder.conv_in                                       decoder.conv_in
decoder.norm_out                                      decoder.conv_norm_out
decoder.conv_out                                      decoder.conv_out
decoder.up.~.block.#                                  decoder.up_blocks.~.resnets.#
decoder.up.~.block.#.nin_shortcut                     decoder.up_blocks.~.resnets.#.conv_shortcut
decoder.up.~.upsample.conv                            decoder.up_blocks.~.upsamplers.0.conv"""

# The middle of the encoder and of the decoder; the last four rows are the names of diffusers before 2023.
VAE_MIDDLE = """\
coder.mid.block_1                                     coder.mid_block.resnets.0
coder.mid.block_2                                     coder.mid_block.resnets.1
coder.mid.attn_1.norm                                 coder.mid_block.attentions.0.group_norm
coder.mid.attn_1.q                              conv  coder.mid_block.attentions.0.to_q
coder.mid.attn_1.k                              conv  coder.mid_block.attentions.0.to_k
coder.mid.attn_1.v                              conv  coder.mid_block.attentions.0.to_v
coder.mid.attn_1.proj_out                       conv  coder.mid_block.attentions.0.to_out.0
coder.mid.attn_1.q                              conv  coder.mid_block.attentions.0.query
coder.mid.attn_1.k                              conv  coder.mid_block.attentions.0.key
coder.mid.attn_1.v                              conv  coder.mid_block.attentions.0.value
coder.mid.attn_1.proj_out                       conv  coder.mid_block.attentions.0.proj_attn"""

VAE = "\n".join((VAE_ENDS, VAE_MIDDLE.replace("coder", "encoder"), VAE_MIDDLE.replace("coder", "decoder")))

# how a name begins in diffusers, in the official file, and the table
TABLES = (("pos_embed.", "joint_blocks.", SD3),
          ("single_transformer_blocks.", "single_blocks.", FLUX),
          ("decoder.up_blocks.", "decoder.up.", VAE),
          ("encoder.down_blocks.", "encoder.down.", VAE))
