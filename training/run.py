"""The folder of a run, OUT: where it resumes, when it saves, logs and draws, and the file that it exports.

Writes    OUT/checkpoints (resume.py), OUT/log.jsonl and held_out.jsonl (logs.py), OUT/loss.png (plots.py), OUT/samples,
          OUT/settings.json
          OUT/sd3.safetensors    official names, transformer and VAE in one file
          OUT/flux.safetensors   official names, the transformer alone, as in flux1-dev.safetensors
Ranks     all ranks call every method together; the first one writes what is not sharded
Check     python -m pytest tests/test_train.py tests/test_resume.py
"""

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor, nn

from checkpoint import DTYPES, Weights, model_folder, save
from family import SAMPLING, Family, find, published_name
from files import SOFTWARE, entry, need, printable, read_json, read_text
from layers import STOCK, Positions
from lora import base_of
from machine.memory import peak_memory_gib
from training.adapter import exported
from training.heldout import HeldOut, held_out_row
from training.logs import Log, Tally, matmul_rate
from training.plan import flop_of_image
from training.plots import write_figure
from training.ranks import SharedError, on_all, on_first, rank, world
from training.resume import (
    ABOUT,
    digests_of,
    folder_of,
    load_checkpoint,
    newest,
    same_run,
    same_weights,
    save_checkpoint,
    step_of,
    tensors_of,
    weights_of,
)
from training.samples import SampleSettings, draw_samples, write_grid
from training.settings import SOURCE, Settings
from vae import VAE

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def only_run(out: Path) -> Iterator[None]:
    """Hold OUT/.lock while the block runs; the system releases it however the process ends.

    raises  ValueError that names the process which holds it
    """
    lock = on_all(lambda: None if rank() or not fcntl else _lock(out / ".lock"))
    try:
        yield
    finally:
        if lock:
            lock.close()


def _lock(path: Path) -> TextIO:
    try:
        file = open(path, "a+", encoding="utf-8")
    except OSError as error:
        raise OSError(f"{path}: {error.strerror}; move it away, or give another --out") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"--out {path.parent}: another run writes there, {printable(read_text(path, 1000))}: wait for "
                         "it, stop it, or give another --out") from None
    except OSError as error:
        print(f"{path.parent}: no locks on this file system ({error.strerror}); start no second run there", flush=True)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    file.flush()
    return file


def check_out(out: str | os.PathLike, *sources: str | os.PathLike | None) -> None:
    """ValueError if --out is, or lies in, a folder that the run reads, or holds a file that it reads."""
    whole = Path(out).resolve()
    for source in (Path(source).resolve() for source in sources if source):
        inside = source in (whole, *whole.parents) or source.is_file() and source.parent == whole
        need(not inside, "out", out, f"a folder outside of {source}, which is read and must stay as it is")


class Run:
    """Resume, save, log, sample and export of one run."""

    def __init__(self, settings: Settings, identity: Mapping[str, object], model: nn.Module, ema: Mapping[str, Tensor],
                 optimizer: torch.optim.Optimizer):
        """
        identity  what must be equal for a checkpoint to be resumed, see resume.identity_of
        ema       name -> averaged weight; empty without --ema
        """
        self.settings, self.out, self.identity = settings, Path(settings.out), identity
        self.model, self.ema, self.optimizer = model, ema, optimizer
        self.saved_step = self.logged_step = 0
        self.began, self.excluded_s = 0.0, 0.0  # start of the log interval; seconds of it spent saving and sampling
        self.matmul_s_per_image = 0.0           # at the rate of one large product

    def resume(self) -> int:
        """Load the newest complete checkpoint; returns its step, 0 without any. ValueError if it is of another run."""
        if folder := newest(self.out):
            on_all(lambda: same_run(folder, self.identity, self.settings))
            load_checkpoint(folder, tensors_of(self.model, self.ema, self.optimizer, step_of(folder)))
            self.saved_step = step_of(folder)
            if not rank():
                print(f"resumes after step {self.saved_step}, from {folder}", flush=True)
        return self.saved_step

    def begin(self, step: int, device: torch.device, latent_side: int, context_tokens: int) -> None:
        """Open the log, save the settings, measure the machine."""
        def open_log() -> None:
            text = json.dumps({"commit": commit(), "ranks": world()} | asdict(self.settings), indent=1)
            (self.out / "settings.json").write_text(text)
            self.log_file = Log(self.out, step)
            self.held_out_file = Log(self.out, step or -1, "held_out") if self.settings.validate else None
            adapter = self.settings.lora is not None
            flop = flop_of_image(type(self.model), self.model.config, latent_side, context_tokens, adapter)
            self.matmul_s_per_image = flop / matmul_rate(device, DTYPES[self.settings.dtype])

        on_first(open_log)
        self.device, self.logged_step, self.began, self.excluded_s = device, step, time.perf_counter(), 0.0

    def due(self, every: int, done: int) -> bool:
        """True every `every` steps and after the last one; never if `every` is 0."""
        return every > 0 and (done % every == 0 or done == self.settings.steps)

    def log(self, done: int, tally: Tally, norm: Tensor, lr: float) -> str:
        """Write one line about the steps since the last one; returns the loss as text."""
        row = tally.row()
        seconds = time.perf_counter() - self.began - self.excluded_s
        images_per_s = (done - self.logged_step) * self.settings.batch / seconds
        row = {"step": done} | row | {
            "grad_norm": norm.item(), "lr": lr, "peak_gib": round(peak_memory_gib(self.device), 2),
            "images_per_s": round(images_per_s, 3),
            "matmul_share": round(self.matmul_s_per_image * images_per_s / world(), 3),
            "eta_s": round((self.settings.steps - done) * self.settings.batch / images_per_s)}
        on_first(lambda: self.log_file.write(row))
        self.logged_step, self.began, self.excluded_s = done, time.perf_counter(), 0.0
        return f"loss {row['loss']:.4f}"

    def save(self, done: int) -> None:
        """Write a checkpoint of the state after `done` steps, unless they are saved already."""
        start = time.perf_counter()
        if self.saved_step < done:
            tensors = tensors_of(self.model, self.ema, self.optimizer, done)
            save_checkpoint(self.out, done, tensors, self.identity, self.settings.keep)
            self.saved_step = done
            on_first(self.plot)
        self.excluded_s += time.perf_counter() - start

    @contextmanager
    def saved_on_error(self, done: int) -> Iterator[None]:
        """Save the state after `done` steps if what runs in the block fails, and all ranks know it."""
        try:
            yield
        except (ValueError, OSError, RuntimeError) as error:
            if world() == 1 or isinstance(error, SharedError):
                self.save(done)
            raise

    def plot(self) -> None:
        write_figure(self.out / "loss.png", self.log_file.rows, self.held_out_file.rows if self.held_out_file else [])

    def validate(self, done: int, held_out: HeldOut) -> None:
        """Log the loss of held-out pictures after `done` steps."""
        def write() -> None:
            self.held_out_file.write({"step": done} | row)
            print(f"step {done}: held-out loss {row['loss']:.4f} of {row['pictures']} pictures", flush=True)

        start, row = time.perf_counter(), held_out_row(self.model, held_out, self.settings)
        on_first(write)
        self.excluded_s += time.perf_counter() - start

    def draw(self, done: int, vae: VAE, context: Tensor, pooled: Tensor, how: SampleSettings) -> None:
        """Write a grid of sample pictures. Every rank draws, since each may hold a part of the model."""
        start = time.perf_counter()
        images = draw_samples(self.model, vae, context, pooled, how)
        on_first(lambda: write_grid(self.out / "samples" / f"step-{done:08d}.png", images))
        self.excluded_s += time.perf_counter() - start

    def finish(self, done: int, family: Family, transformer: Weights, vae_path: Path) -> None:
        """Export the complete run, or save the stopped one."""
        complete = done >= self.settings.steps
        if not complete:
            self.save(done)

        def end() -> None:
            text = f"stopped after step {done}; the same command resumes there"
            if complete:
                folder = folder_of(self.out, self.saved_step)
                text = f"wrote {export(folder, self.settings, family, transformer, vae_path)}"
            self.plot()  # with the last held-out loss
            print(text)

        on_first(end)


def commit() -> str:
    """The commit of this code, for settings.json; "unknown" outside a checkout or without git."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def export(folder: Path, settings: Settings, family: Family, transformer: Weights, vae_path: Path) -> Path:
    """Write one official file, or the adapter that was trained, from a checkpoint.

    folder       of the checkpoint
    settings     out, save_dtype, res, factor
    transformer  the file that training began with; what it records about sampling is passed on
    returns      the path of the file
    raises       ValueError if a weight is NaN or Inf in that dtype
    """
    dtype, path, then = DTYPES[settings.save_dtype], Path(settings.out) / family.file, _settings_of(folder)
    adapter, part = then.get("lora"), transformer.part("model.diffusion_model.")
    tensors = weights_of(folder, torch.float32 if adapter else dtype)  # an adapter's numbers are too small for fp16
    positions = _positions_of(folder)
    records = {name: value for name, value in transformer.metadata.items() if name in SAMPLING}
    if adapter:
        path, tensors = path.with_name("lora.safetensors"), exported(tensors, part)
        records = {"software": SOFTWARE, "base": base_of(transformer), "rank": len(next(iter(tensors.values()))),
                   "positions": positions.rule, "trained_side": positions.side}
    elif family.vae_inside:
        vae = VAE.load(vae_path, fallback=family.latent_scale)
        records |= {"norm_groups": vae.config.norm_groups, "scale_factor": vae.scale_factor,
                    "shift_factor": vae.shift_factor}
        tensors = {f"model.diffusion_model.{name}": t for name, t in tensors.items()}
        tensors |= {f"first_stage_model.{name}": t.to(dtype) for name, t in vae.state_dict().items()}
    if not adapter:
        records |= family.records(replace(family.config(part), positions=positions))
    if bad := next((name for name, t in tensors.items() if not torch.isfinite(torch.stack(t.aminmax())).all()), ""):
        raise ValueError(f"{bad} holds NaN or Inf in {settings.save_dtype}: {path} is not written; "
                         "try a smaller --lr, or a wider --save-dtype")
    records |= {"res": settings.res, "factor": settings.factor}
    records |= {"t5_length": settings.t5_length} if settings.t5_length else {}
    named = {name: published_name(then[name]) for name in SOURCE if then.get(name)}  # not the places on this machine
    save(path, tensors, records | {"training": json.dumps({"steps": step_of(folder)} | then | named)})
    return path


def _settings_of(folder: Path) -> dict[str, object]:
    """The settings that a checkpoint records."""
    return entry(read_json(folder / ABOUT), "settings", dict, folder / ABOUT)


def _positions_of(folder: Path) -> Positions:
    """The positions that a checkpoint was trained with; it records them if they are not stock."""
    where = folder / ABOUT
    model = entry(read_json(where), "model", dict, where)
    positions = entry({"positions": asdict(STOCK)} | model, "positions", dict, where)
    return Positions(entry(positions, "rule", str, where), entry(positions, "side", int, where))


def export_newest(settings: Settings) -> str:
    """train.py --export: the newest checkpoint of --out as one official file; returns a line about it."""
    folder = newest(Path(settings.out))
    if not folder:
        raise FileNotFoundError(f"{settings.out}/checkpoints: no complete checkpoint there")
    then, where = _settings_of(folder), folder / ABOUT
    named = {name: getattr(settings, name) or then.get(name) and entry(then, name, str, where) for name in SOURCE}
    length = entry(then, "t5_length", int, where, 1) if then.get("t5_length") else None
    settings = replace(settings, res=entry(then, "res", int, where, 1), factor=entry(then, "factor", int, where, 8, 16),
                       t5_length=length, **named)
    model = model_folder(settings.model, settings.weights)
    check_out(settings.out, model, settings.transformer)
    source = find(model, settings.transformer)
    same_weights(folder, entry({"weights": {}} | read_json(where), "weights", dict, where), digests_of(*source))
    return f"wrote {export(folder, settings, *source)}, step {step_of(folder)}"
