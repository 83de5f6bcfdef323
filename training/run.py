"""The folder of a run, OUT: where it resumes, when it saves, logs and draws, and the file that it exports.

Writes    OUT/checkpoints (resume.py), OUT/log.jsonl and loss.png (logs.py), OUT/samples, OUT/settings.json
          OUT/sd3.safetensors    official names, transformer and VAE in one file
          OUT/flux.safetensors   official names, the transformer alone, as in flux1-dev.safetensors
Ranks     all ranks call every method together; the first one writes what is not sharded
Check     python -m pytest tests/test_train.py tests/test_resume.py
"""

import json
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from checkpoint import DTYPES, Weights, model_folder, peak_memory_gib, save
from family import SAMPLING, Family, find
from files import read_json
from training.logs import Log, SampleSettings, Tally, draw_samples, matmul_rate, write_grid
from training.plan import flop_of_image
from training.ranks import on_all, on_first, rank, world
from training.resume import ABOUT, load_run, newest, save_checkpoint, step_of, tensors_of, weights_of
from training.settings import Settings
from vae import VAE


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
        newest_here = [None if rank() else newest(self.out)]
        if dist.is_initialized():
            dist.broadcast_object_list(newest_here, 0)
        if folder := newest_here[0]:
            tensors = tensors_of(self.model, self.ema, self.optimizer, step_of(folder))
            self.saved_step = on_all(lambda: load_run(folder, self.identity, tensors, self.settings))
        return self.saved_step

    def begin(self, step: int, device: torch.device, latent_side: int, context_tokens: int) -> None:
        """Open the log, save the settings, measure the machine."""
        def open_log() -> None:
            text = json.dumps({"commit": commit(), "ranks": world()} | asdict(self.settings), indent=1)
            (self.out / "settings.json").write_text(text)
            self.log_file = Log(self.out, step)
            flop = flop_of_image(type(self.model), self.model.config, latent_side, context_tokens)
            self.matmul_s_per_image = flop / matmul_rate(device, DTYPES[self.settings.dtype])

        on_first(open_log)
        self.device, self.logged_step, self.began, self.excluded_s = device, step, time.time(), 0.0

    def due(self, every: int, done: int) -> bool:
        """True every `every` steps and after the last one; never if `every` is 0."""
        return every > 0 and (done % every == 0 or done == self.settings.steps)

    def log(self, done: int, tally: Tally, norm: Tensor, lr: float) -> str:
        """Write one line about the steps since the last one; returns the loss as text."""
        row = tally.row()
        images_per_s = (done - self.logged_step) * self.settings.batch / (time.time() - self.began - self.excluded_s)
        row = {"step": done} | row | {
            "grad_norm": norm.item(), "lr": lr, "peak_gib": round(peak_memory_gib(self.device), 2),
            "images_per_s": round(images_per_s, 3),
            "matmul_share": round(self.matmul_s_per_image * images_per_s / world(), 3),
            "eta_s": round((self.settings.steps - done) * self.settings.batch / images_per_s)}
        on_first(lambda: self.log_file.write(row))
        self.logged_step, self.began, self.excluded_s = done, time.time(), 0.0
        return f"loss {row['loss']:.4f}"

    def save(self, done: int) -> None:
        """Write a checkpoint of the state after `done` steps, unless they are saved already."""
        start = time.time()
        if self.saved_step < done:
            tensors = tensors_of(self.model, self.ema, self.optimizer, done)
            save_checkpoint(self.out, done, tensors, self.identity, self.settings.keep)
            self.saved_step = done
            on_first(lambda: self.log_file.plot())
        self.excluded_s += time.time() - start

    def draw(self, done: int, vae: VAE, context: Tensor, pooled: Tensor, how: SampleSettings) -> None:
        """Write a grid of sample pictures. Every rank draws, since each may hold a part of the model."""
        start = time.time()
        images = draw_samples(self.model, vae, context, pooled, how)
        on_first(lambda: write_grid(self.out / "samples" / f"step-{done:08d}.png", images))
        self.excluded_s += time.time() - start

    def finish(self, done: int, family: Family, transformer: Weights, vae_path: Path) -> None:
        """Export the complete run, or save the stopped one."""
        if done < self.settings.steps:
            self.save(done)
            text = f"stopped after step {done}; the same command resumes there"
        elif not rank():
            text = f"wrote {export(newest(self.out), self.settings, family, transformer, vae_path)}"
        if not rank():
            print(text)


def commit() -> str:
    """The commit of this code, for settings.json; "unknown" outside a checkout or without git."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def export(folder: Path, settings: Settings, family: Family, transformer: Weights, vae_path: Path) -> Path:
    """Write one official file from a checkpoint.

    folder       of the checkpoint
    settings     out, save_dtype, res, factor
    transformer  the file that training began with; what it records about sampling is passed on
    returns      the path of the file
    raises       ValueError if a weight is NaN or Inf in that dtype
    """
    dtype, path, then = DTYPES[settings.save_dtype], Path(settings.out) / family.file, read_json(folder / ABOUT)
    tensors = weights_of(folder, dtype)
    records = {name: value for name, value in transformer.metadata.items() if name in SAMPLING}
    if family.vae_inside:
        vae = VAE.load(vae_path)
        records |= {"norm_groups": vae.config.norm_groups, "scale_factor": vae.scale_factor,
                    "shift_factor": vae.shift_factor}
        tensors = {f"model.diffusion_model.{name}": t for name, t in tensors.items()}
        tensors |= {f"first_stage_model.{name}": t.to(dtype) for name, t in vae.state_dict().items()}
    else:
        records |= family.records(transformer)
    if bad := next((name for name, t in tensors.items() if not torch.isfinite(torch.stack(t.aminmax())).all()), ""):
        raise ValueError(f"{bad} holds NaN or Inf in {settings.save_dtype}: {path} is not written; "
                         "try a smaller --lr, or a wider --save-dtype")
    training = json.dumps({"steps": then["step"]} | then["settings"])
    save(path, tensors, records | {"res": settings.res, "factor": settings.factor, "training": training})
    return path


def export_newest(settings: Settings) -> str:
    """train.py --export: the newest checkpoint of --out as one official file; returns a line about it."""
    folder = newest(Path(settings.out))
    if not folder:
        raise FileNotFoundError(f"{settings.out}/checkpoints: no complete checkpoint there")
    then = read_json(folder / ABOUT)["settings"]
    named = {name: getattr(settings, name) or then[name] for name in ("model", "weights", "transformer")}
    settings = replace(settings, res=then["res"], factor=then["factor"], **named)
    source = find(model_folder(settings.model, settings.weights), settings.transformer)
    return f"wrote {export(folder, settings, *source)}, step {step_of(folder)}"
