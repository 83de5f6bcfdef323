"""Checkpoints of a training run: sharded, complete or absent, found again by the same command.

Layout    OUT/checkpoints/step-00000500/   shard-*.safetensors, one or more per rank; run.json: step, identity, and
          name, size and SHA-256 of each file: only these are read, and only if they are as they were written
Format    torch.distributed.checkpoint with its safetensors storage. Tensors are split by rows over the ranks; any
          number of ranks, with any --shard, reads what any other wrote. Nothing is a pickle, as torch's default
          storage has for its metadata
Commit    everything is written and synced under .step-00000500.tmp, which is then renamed: a folder named step-... is
          complete. On several nodes, OUT must be on a shared file system
Names     model.<official name>, ema.<...>, exp_avg.<...>, exp_avg_sq.<...>
Memory    host: one file of FILE_BYTES per rank at a time; sums are taken in chunks, each rank's of its own files
Check     python -m pytest tests/test_resume.py
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import zip_longest
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from checkpoint import LazyTensor, Weights, open_weights
from family import Family
from files import entry, read_json, sha256_of
from flux import FluxConfig
from layers import STOCK
from machine.ranks import gathered
from mmdit import MMDiTConfig
from training.adamw import MOMENTS, RoundedAdamW
from training.adapter import state_of, trained
from training.ranks import SharedError, on_all, on_first, rank, world
from training.settings import IDENTITY, SOURCE, Settings
from vae import read_config, read_scale

FILE_BYTES = 1 << 31
ABOUT = "run.json"
LATER = {"resize": "lanczos", "vae_dtype": "fp32", "levels": 1}  # what older checkpoints do not record, as it was


def newest(out: Path) -> Path | None:
    """The newest undamaged checkpoint of a run, None without any; all ranks together, each reads a share of its files.

    A damaged one is skipped with a line.
    raises  SharedError if all are damaged, or if one cannot be read for the moment: it may be good
    """
    folders = gathered(on_all(lambda: _committed(out)))[0][::-1]
    for folder, before in zip_longest(folders, folders[1:]):
        faults = gathered(on_all(partial(_fault_of, folder)))
        if not (fault := next(filter(None, faults), "")):
            return folder
        if not before:
            raise SharedError(f"{folder}: {fault}; no checkpoint before it is left: restore it, or move it away to "
                              "begin at step 0")
        if not rank():
            print(f"{folder}: {fault}; using the one before it, {before.name}", flush=True)
    return None


def _committed(out: Path) -> list[Path]:
    """All checkpoints, the oldest first. OSError if the folder cannot be read: glob would find nothing in it."""
    try:
        names = os.listdir(out / "checkpoints")
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        raise OSError(f"{out}/checkpoints: no folder; move it away, or give another --out") from None
    return sorted((out / "checkpoints" / name for name in names if re.fullmatch(r"step-\d+", name)), key=step_of)


def folder_of(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _fault_of(folder: Path) -> str:
    """What is proven wrong with this rank's share of a checkpoint, "" if nothing; OSError if that cannot be told."""
    try:
        os.stat(folder / ABOUT)
        for name, size, digest in _recorded(folder)[rank()::world()]:
            if (length := os.stat(folder / name).st_size) != size:
                return f"{name} has {length} bytes instead of {size}"
            if digest and sha256_of(folder / name) != digest:
                return f"{name} is not as it was written (SHA-256)"
    except (FileNotFoundError, NotADirectoryError) as error:
        return f"{Path(error.filename).name} is missing"
    except ValueError as error:
        return f"no complete {ABOUT} ({error})"
    except OSError as error:
        raise OSError(f"{folder}: cannot be read for the moment ({error.strerror}: {error.filename}); it is left as it "
                      "is: make it readable, or use another --out") from None
    return ""


def _recorded(folder: Path) -> list[tuple[str, int, str]]:
    """Name, size and SHA-256 of each file of a checkpoint, by run.json; older ones have no SHA-256, "" here."""
    where = folder / ABOUT
    about = read_json(where)
    if (step := entry(about, "step", int, where)) != step_of(folder):
        raise ValueError(f"{where}: is of step {step}")
    sizes = entry(about, "files", dict, where)
    digests = entry({"sha256": dict.fromkeys(sizes, "")} | about, "sha256", dict, where)
    if not sizes or any(Path(name).name != name for name in sizes):
        raise ValueError(f"{where}: files are not names of files in this folder")
    return [(name, entry(sizes, name, int, where, 0), entry(digests, name, str, where)) for name in sorted(sizes)]


# ---- writing

def save_checkpoint(out: Path, step: int, tensors: Mapping[str, Tensor], about: Mapping[str, object],
                    keep: int) -> None:
    """Write a checkpoint, all ranks together, and remove the oldest ones.

    tensors  name -> tensor, a DTensor where it is sharded
    about    what run.json records beside the step and the files
    keep     how many checkpoints remain, the newest
    raises   SharedError if one rank could not write; earlier checkpoints are untouched
    """
    folder = folder_of(out, step)
    temporary = folder.with_name(f".{folder.name}.tmp")
    if not rank():
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed while it wrote
    try:
        digests = {}
        for part in gathered(on_all(lambda: _write(temporary, tensors))):
            digests |= part
        on_first(lambda: _commit(temporary, folder, {"step": step} | dict(about), digests))
    except (ValueError, OSError) as error:
        if not rank():
            shutil.rmtree(temporary, ignore_errors=True)
        raise SharedError(f"{folder}: could not be written ({str(error).splitlines()[0]}); the checkpoints before it "
                          "are untouched") from None
    if not rank():
        _remove_old(out, step, keep)


def _write(temporary: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Write this rank's files; returns their checksums. OSError on all ranks if one cannot."""
    writer = HuggingFaceStorageWriter(str(temporary), _files_of(tensors), save_distributed=True)
    try:
        with warnings.catch_warnings(action="ignore"):  # that a single process is one
            dcp.save(dict(tensors), storage_writer=writer, no_dist=not dist.is_initialized())
    except CheckpointException as failure:
        raise OSError(_reasons(failure)) from None
    return {file.name: sha256_of(file) for file in temporary.glob(f"shard-{rank() + 1:05d}-*")}


def _reasons(failure: CheckpointException) -> str:
    return "; ".join(f"rank {k}: {wrapped[0]}" for k, wrapped in sorted(failure.failures.items()))


def _files_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Which numbered file each tensor goes to, so that a rank never holds more than FILE_BYTES of a file in memory."""
    files, total = {}, 0
    for name, tensor in tensors.items():
        files[name] = 1 + total // (FILE_BYTES * world())
        total += tensor.numel() * tensor.element_size()
    return files


def _commit(temporary: Path, folder: Path, about: Mapping[str, object], digests: Mapping[str, str]) -> None:
    """Write run.json, sync, rename: now the checkpoint is complete."""
    sizes = {name: (temporary / name).stat().st_size for name in sorted(digests)}
    with open(temporary / ABOUT, "w", encoding="utf-8") as f:
        json.dump(dict(about) | {"files": sizes, "sha256": digests}, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    _sync(temporary)
    if folder.exists():  # newest() proved it damaged
        shutil.rmtree(folder)
    os.rename(temporary, folder)
    _sync(folder.parent)


def _sync(folder: Path) -> None:
    if os.name != "nt":  # Windows opens no folders
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def _remove_old(out: Path, step: int, keep: int) -> None:
    remaining = [f for f in _committed(out) if step_of(f) <= step][-keep:]  # newest() proved the later ones damaged
    for old in set(_committed(out)).difference(remaining):
        try:
            os.rename(old, old.with_name(f".{old.name}.old"))  # a folder named step-... is complete until it is gone
        except OSError as error:
            print(f"{old}: could not be removed ({error.strerror}); remove it by hand", flush=True)
    for left in (out / "checkpoints").glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)


# ---- reading

def load_checkpoint(folder: Path, tensors: Mapping[str, Tensor], alone: bool = False) -> None:
    """Read tensors in place; each rank reads only its own rows.

    tensors  name -> tensor of the saved shape; the dtype may differ
    alone    only this process reads, whether or not there are others
    raises   ValueError if a name or a shape differs from the saved one, or a file cannot be read
    """
    check = partial(_same_shapes, folder, tensors)
    check() if alone else on_all(check)
    try:
        with warnings.catch_warnings(action="ignore"):
            dcp.load(dict(tensors), storage_reader=_reader(folder), no_dist=alone or not dist.is_initialized())
    except CheckpointException as failure:
        raise SharedError(f"{folder}: could not be read ({_reasons(failure).splitlines()[0]}); "
                          "it is left as it is") from None


def _same_shapes(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    saved = saved_shapes(folder)
    differ = [name for name in tensors if saved.get(name) != tuple(tensors[name].shape)]
    if differ:
        raise ValueError(f"{folder}: {len(differ)} tensors are missing or of another shape, the first is {differ[0]}: "
                         f"saved {saved.get(differ[0])}, here {tuple(tensors[differ[0]].shape)}; use another --out")


def saved_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a checkpoint, from the headers of its files."""
    try:
        metadata = _reader(folder).read_metadata()
    except (SafetensorError, KeyError, TypeError) as error:  # only in checkpoints without checksums
        raise ValueError(f"{folder}: its files are damaged ({error}); move it away to use the one before it") from None
    return {name: tuple(tensor.size) for name, tensor in metadata.state_dict_metadata.items()}


def _reader(folder: Path) -> HuggingFaceStorageReader:
    """A reader of the files that run.json names; others in the folder are not the run's."""
    reader, names = HuggingFaceStorageReader(str(folder)), [name for name, _, _ in _recorded(folder)]
    reader.fs.ls = lambda _: [str(folder / name) for name in names]
    return reader


def weights_of(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """EMA weights if present, else the raw ones, under official names."""
    shapes = saved_shapes(folder)
    chosen = {name.partition(".")[2]: name for name in shapes if name.startswith("model.")}
    chosen |= {name.partition(".")[2]: name for name in shapes if name.startswith("ema.")}
    tensors = {official: torch.empty(shapes[name], dtype=dtype) for official, name in chosen.items()}
    load_checkpoint(folder, {name: tensors[official] for official, name in chosen.items()}, alone=True)
    return tensors


# ---- what a checkpoint holds

def tensors_of(model: nn.Module, ema: Mapping[str, Tensor], optimizer: torch.optim.Optimizer,
               steps: int) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its name there; moments that do not exist yet are created as zeros."""
    tensors = {f"model.{name}": t.detach() for name, t in state_of(model).items()}
    tensors |= {f"ema.{name}": t for name, t in ema.items()}
    for name, p in trained(model).items():
        if not optimizer.state[p]:
            zeros = {moment: torch.zeros_like(p, memory_format=torch.preserve_format) for moment in MOMENTS}
            count_on = "cpu" if isinstance(optimizer, RoundedAdamW) else p.device  # fused AdamW counts on the device
            optimizer.state[p] = {"step": torch.tensor(float(steps), device=count_on)} | zeros
        tensors |= {f"{moment}.{name}": optimizer.state[p][moment].detach() for moment in MOMENTS}
    return tensors


def identity_of(settings: Settings, family: Family, config: MMDiTConfig | FluxConfig, weights: Mapping[str, str],
                listing: Sequence[tuple[str, Sequence[str], tuple[int, int]]]) -> dict[str, object]:
    """Identity of the run, recorded in run.json. Resuming with different values is refused, but for SOURCE.

    weights  hashes of what the run began from: they tell whether weights at another place are the same
    listing  file name, captions and crop size of every picture: these decide the order; a picture may be repaired
    """
    digest, model = hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16], asdict(config)
    if config.positions == STOCK:  # as in checkpoints of before there were others
        del model["positions"]
    return {"settings": {name: getattr(settings, name) for name in SOURCE + IDENTITY}, "weights": dict(weights),
            "model": {"family": family.name} | model, "data": {"pictures": len(listing), "digest": digest}}


def digest_of(weights: Mapping[str, LazyTensor]) -> str:
    """A hash of names, shapes and three rows of each tensor: equal wherever and however the weights are stored."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        height = tensor.shape[0] if tensor.shape else 0
        for row in sorted({0, height // 2, height - 1} if height else ()):
            digest.update(tensor.rows(row, row + 1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def digests_of(family: Family, transformer: Weights, vae_path: Path) -> dict[str, str]:
    """What distinguishes the weights that a run begins with, and the VAE's numbers, which its tensors do not show."""
    file = open_weights(vae_path)
    vae = file.part("first_stage_model.")
    numbers = *read_scale(file, fallback=family.latent_scale), read_config(vae).norm_groups
    return {"transformer": digest_of(transformer.part("model.diffusion_model.")), "VAE": digest_of(vae),
            "scale, shift and norm groups of the VAE": " ".join(f"{number:.6g}" for number in numbers)}


def same_weights(folder: Path, then: Mapping[str, object], now: Mapping[str, str]) -> None:
    """ValueError if a checkpoint records other weights than these; what it does not record is not compared."""
    if other := [part for part, digest in now.items() if then.get(part, digest) != digest]:
        raise ValueError(f"{folder}: that run began from other weights ({', '.join(other)}); give the same ones, "
                         "or another --out")


def same_settings(source: str | os.PathLike, then: Mapping[str, object], now: Mapping[str, object]) -> None:
    """ValueError that lists what differs between a run's recorded settings, read from JSON, and the present ones."""
    now = json.loads(json.dumps(dict(now)))
    names = sorted(then.keys() | now.keys())
    if differ := [f"{name} {then.get(name)} -> {now.get(name)}" for name in names if then.get(name) != now.get(name)]:
        raise ValueError(f"{source}: that run had other settings ({', '.join(differ)}); use them, or another --out")


def same_run(folder: Path, identity: Mapping[str, object], settings: Settings) -> None:
    """ValueError if a checkpoint belongs to another run."""
    about, now = read_json(folder / ABOUT), json.loads(json.dumps(dict(identity)))
    parts = ("model", "settings", "data", *(["weights"] if "weights" in about else []))
    then = {part: entry(about, part, dict, folder / ABOUT) for part in parts}
    stock = {"positions": asdict(STOCK)}  # which is not recorded
    was, model = stock | then["model"], stock | now["model"]
    other = {key: value for key, value in was.items() if model.get(key) != value}
    if other.keys() - {"family"}:
        shown = ", ".join(f"{key} {value} -> {model.get(key)}" for key, value in other.items())
        raise ValueError(f"{folder}: is of another model ({shown}); use another --out")
    weights = then.get("weights")  # older checkpoints know them by their place only
    compared = IDENTITY + (SOURCE if weights is None else ())
    if then["settings"].get("state") == "bf16":  # older checkpoints may record fp32, but it computed in bf16
        then["settings"]["dtype"] = "bf16"
    same_settings(folder, {name: then["settings"].get(name, LATER.get(name)) for name in compared},
                  {name: now["settings"][name] for name in compared})
    same_weights(folder, weights or {}, now["weights"])
    if then["data"] != now["data"]:
        counts = (f"{then['data'].get('pictures')} pictures, now {now['data']['pictures']}; "
                  "names, shapes or captions differ")
        raise ValueError(f"{settings.data} has changed since that run began ({counts}), and with it the order of the "
                         "pictures: restore it, or use another --out, starting from what train.py --export "
                         f"--out {settings.out} writes")
