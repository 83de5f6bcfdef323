"""Checkpoints of a training run: sharded, complete or absent, found again by the same command.

Layout    OUT/checkpoints/step-00000500/   shard-*.safetensors, one or more per rank; run.json: step, identity, files
Format    torch.distributed.checkpoint with its safetensors storage. Tensors are split by rows over the ranks; any
          number of ranks, with any --shard, reads what any other wrote
Trust     nothing on disk is a pickle: names, shapes and offsets are JSON in each file's header (torch's default storage
          pickles its metadata and loads it unchecked)
Commit    everything is written and synced under .step-00000500.tmp, which is then renamed: a folder named step-... is
          complete. On several nodes, OUT must be on a shared file system
Names     model.<official name>, ema.<...>, exp_avg.<...>, exp_avg_sq.<...>
Memory    host: one file of FILE_BYTES per rank at a time
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
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from family import Family
from files import read_json
from flux import FluxConfig
from mmdit import MMDiTConfig
from training.adamw import MOMENTS, RoundedAdamW
from training.ranks import SharedError, rank, world
from training.settings import IDENTITY, Settings

FILE_BYTES = 1 << 31
ABOUT = "run.json"


def newest(out: Path) -> Path | None:
    """The newest complete checkpoint of a run, None without any. Incomplete folders are skipped with a message."""
    for folder in reversed(_committed(out)):
        if not (fault := _fault_of(folder)):
            return folder
        print(f"{folder}: {fault}; using the checkpoint before it", flush=True)
    return None


def _committed(out: Path) -> list[Path]:
    return sorted((f for f in (out / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", f.name)), key=step_of)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _fault_of(folder: Path) -> str:
    """What is wrong with a committed checkpoint; empty if nothing is."""
    try:
        files = read_json(folder / ABOUT)["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"no complete {ABOUT} ({error})"
    wrong = [name for name, size in files.items()
             if not (folder / name).is_file() or (folder / name).stat().st_size != size]
    return f"{len(wrong)} of {len(files)} files are missing or truncated, the first is {wrong[0]}" if wrong else ""


# ---- writing

def save_checkpoint(out: Path, step: int, tensors: Mapping[str, Tensor], about: Mapping[str, object],
                    keep: int) -> None:
    """Write a checkpoint, all ranks together, and remove the oldest ones.

    tensors  name -> tensor, a DTensor where it is sharded
    about    what run.json records beside the step and the files
    keep     how many checkpoints remain, the newest
    raises   OSError on the first rank, SharedError on the others, if one could not write; earlier ones are untouched
    """
    folder = out / "checkpoints" / f"step-{step:08d}"
    temporary = folder.with_name(f".{folder.name}.tmp")
    if not rank():
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed while it wrote
    try:
        writer = HuggingFaceStorageWriter(str(temporary), _files_of(tensors), save_distributed=True)
        with warnings.catch_warnings(action="ignore"):  # that a single process is one
            dcp.save(dict(tensors), storage_writer=writer, no_dist=not dist.is_initialized())
        error = "" if rank() else _commit(temporary, folder, {"step": step} | dict(about))
    except (CheckpointException, OSError) as failure:
        failures = getattr(failure, "failures", {0: (failure, None)})
        error = "; ".join(f"rank {k}: {wrapped[0]}" for k, wrapped in sorted(failures.items()))
    errors = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(errors, 0)
    if errors[0]:
        if not rank():
            shutil.rmtree(temporary, ignore_errors=True)
        raise (SharedError if rank() else OSError)(
            f"{folder}: could not be written ({errors[0].splitlines()[0]}); the checkpoints before it are untouched")
    if not rank():
        _remove_old(out, step, keep)


def _files_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Which numbered file each tensor goes to, so that a rank never holds more than FILE_BYTES of a file in memory."""
    files, total = {}, 0
    for name, tensor in tensors.items():
        files[name] = 1 + total // (FILE_BYTES * world())
        total += tensor.numel() * tensor.element_size()
    return files


def _commit(temporary: Path, folder: Path, about: Mapping[str, object]) -> str:
    """Write run.json, sync, rename: now the checkpoint is complete. Returns an error's text, or an empty one."""
    try:
        sizes = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
        with open(temporary / ABOUT, "w", encoding="utf-8") as f:
            json.dump(dict(about) | {"files": sizes}, f, indent=1)
            f.flush()
            os.fsync(f.fileno())
        _sync(temporary)
        if folder.exists():  # a damaged one that newest() skipped
            shutil.rmtree(folder)
        os.rename(temporary, folder)
        _sync(folder.parent)
    except OSError as error:
        return str(error)
    return ""


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _remove_old(out: Path, step: int, keep: int) -> None:
    remaining = [f for f in _committed(out) if step_of(f) <= step][-keep:]  # newest() skipped a later, damaged one
    for old in set(_committed(out)).difference(remaining):
        os.rename(old, old.with_name(f".{old.name}.old"))  # a folder named step-... is complete until it is gone
    for left in (out / "checkpoints").glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)


# ---- reading

def load_checkpoint(folder: Path, tensors: Mapping[str, Tensor], alone: bool = False) -> None:
    """Read tensors in place; each rank reads only its own rows.

    tensors  name -> tensor of the saved shape; the dtype may differ
    alone    only this process reads, whether or not there are others
    raises   ValueError if a name or a shape differs from the saved one
    """
    saved = saved_shapes(folder)
    differ = [name for name in tensors if saved.get(name) != tuple(tensors[name].shape)]
    if differ:
        raise ValueError(f"{folder}: {len(differ)} tensors are missing or of another shape, the first is {differ[0]}: "
                         f"saved {saved.get(differ[0])}, here {tuple(tensors[differ[0]].shape)}; use another --out")
    with warnings.catch_warnings(action="ignore"):
        dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)),
                 no_dist=alone or not dist.is_initialized())


def saved_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a checkpoint, from the headers of its files."""
    metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
    return {name: tuple(entry.size) for name, entry in metadata.state_dict_metadata.items()}


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
    tensors = {f"model.{name}": t.detach() for name, t in model.state_dict().items()}
    tensors |= {f"ema.{name}": t for name, t in ema.items()}
    for name, p in model.named_parameters():
        if not optimizer.state[p]:
            zeros = {moment: torch.zeros_like(p, memory_format=torch.preserve_format) for moment in MOMENTS}
            count_on = "cpu" if isinstance(optimizer, RoundedAdamW) else p.device  # fused AdamW counts on the device
            optimizer.state[p] = {"step": torch.tensor(float(steps), device=count_on)} | zeros
        tensors |= {f"{moment}.{name}": optimizer.state[p][moment].detach() for moment in MOMENTS}
    return tensors


def identity_of(settings: Settings, family: Family, config: MMDiTConfig | FluxConfig,
                listing: Sequence[tuple[str, Sequence[str], tuple[int, int]]]) -> dict[str, object]:
    """Identity of the run, recorded in run.json. Resuming with different values is refused.

    listing  file name, captions and crop size of every picture: these decide the order; a picture may be repaired
    """
    digest = hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]
    return {"settings": {name: getattr(settings, name) for name in IDENTITY},
            "model": {"family": family.name} | asdict(config), "data": {"pictures": len(listing), "digest": digest}}


def same_settings(source: str | os.PathLike, then: Mapping[str, object], now: Mapping[str, object]) -> None:
    """ValueError that lists what differs between a run's recorded settings, read from JSON, and the present ones."""
    now = json.loads(json.dumps(dict(now)))
    names = sorted(then.keys() | now.keys())
    if differ := [f"{name} {then.get(name)} -> {now.get(name)}" for name in names if then.get(name) != now.get(name)]:
        raise ValueError(f"{source}: that run had other settings ({', '.join(differ)}); use them, or another --out")


def load_run(folder: Path, identity: Mapping[str, object], tensors: Mapping[str, Tensor], settings: Settings) -> int:
    """Load a checkpoint in place; returns its step. ValueError if it belongs to another run."""
    then, now = read_json(folder / ABOUT), json.loads(json.dumps(dict(identity)))
    if then["model"] != now["model"]:
        raise ValueError(f"{folder}: is of another model, {then['model']}; here it is {identity['model']}; "
                         "use another --out")
    same_settings(folder, then["settings"], now["settings"])
    if then["data"] != now["data"]:
        counts = f"{then['data']['pictures']} pictures, now {now['data']['pictures']}; names, shapes or captions differ"
        raise ValueError(f"{settings.data} has changed since that run began ({counts}), and with it the order of the "
                         "pictures: restore it, or use another --out, starting from what train.py --export "
                         f"--out {settings.out} writes")
    load_checkpoint(folder, tensors)
    return step_of(folder)
