"""The folder of a training run: sharded checkpoints that are whole or absent, found again by the same command.

Layout    OUT/checkpoints/step-00000500/   shard-*.safetensors, one or more a rank, and run.json: step, settings, data, model, files
Format    torch.distributed.checkpoint with its safetensors storage. A tensor is cut along its rows among the ranks, or among all of
          them where each holds the whole; any number of ranks, with any --shard, reads what any other wrote.
Trust     nothing on disk is a pickle: names, shapes and offsets are JSON in each file's header. (torch's usual storage would write a
          pickled .metadata and load it without a check: hence this one.)
Commit    everything is written and synced under .step-00000500.tmp, which is then renamed: a folder called step-... is whole.
          The folder must be one that all ranks see: on several nodes, a shared file system
Names     model.<official name>, ema.<...>, exp_avg.<...>, exp_avg_sq.<...>
Memory    host: one file of FILE_BYTES a rank at a time
Check     python -m pytest tests/test_resume.py
"""

import argparse
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

from checkpoint import Weights, model_folder, read_json, save
from data import Item
from family import Family, find
from flux import Flux
from training.adamw import RoundedAdamW
from training.ranks import Agreed
from vae import VAE

FILE_BYTES = 1 << 31
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
ABOUT = "run.json"
NOT_SETTINGS = ("data", "out", "device", "threads", "steps", "recipe", "shard", "offload", "accumulate", "activations", "ema_on_host",
                "keep", "save_every", "log_every", "sample_every", "save_dtype", "cache_latents", "dry_run", "export", "plan", "card")
SAID = ("steps", "cfg", "guidance", "time_shift")  # of sampling, in the file that training begins with: passed on
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def newest(out: Path) -> Path | None:
    """The newest whole checkpoint of a run, None without any. A folder that has lost a file is passed over, and said so."""
    for folder in reversed(_committed(out)):
        if not (lost := _lost(folder)):
            return folder
        print(f"{folder}: {lost}; going back to the checkpoint before it", flush=True)
    return None


def _committed(out: Path) -> list[Path]:
    return sorted((f for f in (out / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", f.name)), key=step_of)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _lost(folder: Path) -> str:
    """What is wrong with a committed checkpoint; empty if nothing is."""
    try:
        files = read_json(folder / ABOUT)["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"no whole {ABOUT} ({error})"
    wrong = [name for name, size in files.items() if not (folder / name).is_file() or (folder / name).stat().st_size != size]
    return f"{len(wrong)} of {len(files)} files are missing or cut short, the first is {wrong[0]}" if wrong else ""


def save_checkpoint(out: Path, step: int, tensors: Mapping[str, Tensor], about: Mapping[str, object], keep: int) -> None:
    """Write a checkpoint, all ranks together, and remove those that are no longer kept.

    tensors  name -> tensor, a DTensor where it is cut among the ranks
    about    what run.json says beside the step and the files
    keep     how many checkpoints stay, the newest
    raises   OSError on the first rank, Agreed on the others, if one could not write; the checkpoints before stay as they were
    """
    first, folder = not dist.is_initialized() or dist.get_rank() == 0, out / "checkpoints" / f"step-{step:08d}"
    temporary = folder.with_name(f".{folder.name}.tmp")
    if first:
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed while it wrote
    ranks, total, files = (dist.get_world_size() if dist.is_initialized() else 1), 0, {}
    for name, tensor in tensors.items():
        files[name] = 1 + total // (FILE_BYTES * ranks)
        total += tensor.numel() * tensor.element_size()
    try:
        writer = HuggingFaceStorageWriter(str(temporary), files, save_distributed=True)
        with warnings.catch_warnings(action="ignore"):  # that a single process is one
            dcp.save(dict(tensors), storage_writer=writer, no_dist=not dist.is_initialized())
        error = _commit(temporary, folder, {"step": step} | dict(about)) if first else ""
    except (CheckpointException, OSError) as failure:
        failures = getattr(failure, "failures", {0: (failure, None)})
        error = "; ".join(f"rank {rank}: {wrapped[0]}" for rank, wrapped in sorted(failures.items()))
    said = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(said, 0)
    if said[0]:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise (OSError if first else Agreed)(
            f"{folder}: could not be written ({said[0].splitlines()[0]}); the checkpoints before it are untouched")
    if first:
        kept = [f for f in _committed(out) if step_of(f) <= step][-keep:]  # a later one is damaged: newest() passed it over
        for old in set(_committed(out)).difference(kept):
            os.rename(old, old.with_name(f".{old.name}.old"))  # a folder called step-... is whole, also while it is removed
        for left in folder.parent.glob(".step-*"):
            shutil.rmtree(left, ignore_errors=True)


def _commit(temporary: Path, folder: Path, about: Mapping[str, object]) -> str:
    """Write run.json, sync, rename; the error's text, or an empty one."""
    try:
        sizes = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
        with open(temporary / ABOUT, "w", encoding="utf-8") as f:
            json.dump(dict(about) | {"files": sizes}, f, indent=1)
            f.flush()
            os.fsync(f.fileno())
        _sync(temporary)
        if folder.exists():  # a damaged one that newest() passed over
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


def load_checkpoint(folder: Path, tensors: Mapping[str, Tensor], alone: bool = False) -> None:
    """Read tensors in place; each rank reads what it holds.

    tensors  name -> tensor of the saved shape; the dtype may be another
    alone    this process only, whether or not there are others
    raises   ValueError if a name or a shape is not the saved one
    """
    saved = saved_shapes(folder)
    differ = [name for name in tensors if saved.get(name) != tuple(tensors[name].shape)]
    if differ:
        raise ValueError(f"{folder}: {len(differ)} tensors are missing or of another shape, the first is {differ[0]}: "
                         f"saved {saved.get(differ[0])}, here {tuple(tensors[differ[0]].shape)}; use another --out")
    with warnings.catch_warnings(action="ignore"):
        dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone or not dist.is_initialized())


def saved_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all that a checkpoint holds, from the headers of its files."""
    metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
    return {name: tuple(entry.size) for name, entry in metadata.state_dict_metadata.items()}


def weights_of(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights that a run would be judged by, under official names: the averaged ones where there are any."""
    shapes = saved_shapes(folder)
    chosen = {name.partition(".")[2]: name for name in shapes if name.startswith("model.")}
    chosen |= {name.partition(".")[2]: name for name in shapes if name.startswith("ema.")}
    tensors = {official: torch.empty(shapes[name], dtype=dtype) for official, name in chosen.items()}
    load_checkpoint(folder, {name: tensors[official] for official, name in chosen.items()}, alone=True)
    return tensors


# ---- what a checkpoint says and holds

def settings_of(args: argparse.Namespace) -> dict[str, object]:
    """What decides the numbers of a run; the rest may differ when it is resumed."""
    return {k: v for k, v in vars(args).items() if k not in NOT_SETTINGS}


def same_settings(where: str | os.PathLike, then: Mapping[str, object], now: Mapping[str, object]) -> None:
    """ValueError that lists what differs between the settings of a run, as JSON kept them, and those it would go on with."""
    now = json.loads(json.dumps(dict(now)))
    if differ := [f"{k} {then.get(k)} -> {now.get(k)}" for k in sorted(then.keys() | now.keys()) if then.get(k) != now.get(k)]:
        raise ValueError(f"{where}: that run had other settings ({', '.join(differ)}); use them, or another --out")


def about_run(args: argparse.Namespace, family: Family, weights: Weights, items: Sequence[Item], sizes: Sequence[tuple[int, int]]) -> dict:
    """What a checkpoint says of the run: with another of these it is not gone on with."""
    listed = [(str(item.path.relative_to(args.data)), item.captions, size)  # what the order hangs on: a picture may be repaired
              for item, size in zip(items, sizes, strict=True)]
    return {"settings": settings_of(args), "model": {"family": family.name} | asdict(family.config(weights)),
            "data": {"pictures": len(items), "digest": hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]}}


def tensors_of(model: nn.Module, ema: dict[str, Tensor], optimizer: torch.optim.Optimizer, steps: int) -> dict[str, Tensor]:
    """Every tensor that a checkpoint holds, by the name it has there; moments that are not there yet are made."""
    tensors = {f"model.{name}": t.detach() for name, t in model.state_dict().items()} | {f"ema.{name}": t for name, t in ema.items()}
    for name, p in model.named_parameters():
        if not optimizer.state[p]:
            zeros = {moment: torch.zeros_like(p, memory_format=torch.preserve_format) for moment in MOMENTS}
            where = "cpu" if isinstance(optimizer, RoundedAdamW) else p.device  # fused AdamW counts on the device, ours reads the number
            optimizer.state[p] = {"step": torch.tensor(float(steps), device=where)} | zeros
        tensors |= {f"{moment}.{name}": optimizer.state[p][moment].detach() for moment in MOMENTS}
    return tensors


def load_run(folder: Path, about: dict, tensors: dict[str, Tensor], args: argparse.Namespace) -> int:
    """Load a checkpoint in place; ValueError if it is of another run.

    returns  the step to go on from
    """
    then = read_json(folder / ABOUT)
    if then["model"] != json.loads(json.dumps(about["model"])):
        raise ValueError(f"{folder}: is of another model, {then['model']}; here it is {about['model']}; use another --out")
    same_settings(folder, then["settings"], about["settings"])
    if then["data"] != about["data"]:
        pictures = f"{then['data']['pictures']} pictures, now {about['data']['pictures']}; names, shapes or captions differ"
        raise ValueError(f"{args.data} has changed since that run began ({pictures}), and with it the order of the pictures: put it back, "
                         f"or use another --out, beginning with what train.py --export --out {args.out} writes")
    load_checkpoint(folder, tensors)
    return step_of(folder)


# ---- the written model

def export(folder: Path, args: argparse.Namespace, family: Family, transformer: Weights, vae_path: Path) -> Path:
    """Write one official file from a checkpoint, with what sample.py wants to know. SD3's holds the VAE, Flux's does not."""
    dtype, path, then = DTYPES[args.save_dtype], Path(args.out) / family.file, read_json(folder / ABOUT)
    tensors = weights_of(folder, dtype)
    if family.model is Flux:
        said = {"axes_dim": ", ".join(map(str, family.config(transformer.part("model.diffusion_model.")).axes_dim))}
    else:
        vae = VAE.load(vae_path)
        said = {"norm_groups": vae.config.norm_groups, "scale_factor": vae.scale_factor, "shift_factor": vae.shift_factor}
        tensors = {f"model.diffusion_model.{name}": t for name, t in tensors.items()}
        tensors |= {f"first_stage_model.{name}": t.to(dtype) for name, t in vae.state_dict().items()}
    if bad := next((name for name, t in tensors.items() if not torch.isfinite(torch.stack(t.aminmax())).all()), ""):
        raise ValueError(f"{bad} holds NaN or Inf in {args.save_dtype}: {path} is not written; try a smaller --lr, or a wider --save-dtype")
    save(path, tensors, {k: v for k, v in transformer.metadata.items() if k in SAID} | said | {
        "res": args.res, "factor": args.factor, "training": json.dumps({"steps": then["step"]} | then["settings"])})
    return path


def export_run(args: argparse.Namespace) -> None:
    """train.py --export: the newest checkpoint of --out as one official file."""
    if not (folder := newest(Path(args.out))):
        raise FileNotFoundError(f"{args.out}/checkpoints: no whole checkpoint there")
    then = read_json(folder / ABOUT)["settings"]
    args.res, args.factor = then["res"], then["factor"]
    for name in ("model", "weights", "transformer"):
        if getattr(args, name) is None:
            setattr(args, name, then[name])
    print(f"wrote {export(folder, args, *find(model_folder(args.model, args.weights), args.transformer))}, step {step_of(folder)}")
