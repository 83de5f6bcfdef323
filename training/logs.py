"""What a run says of itself: log.jsonl, TensorBoard and loss.png where their packages are installed, sample pictures in a grid.

Units     loss and bands are mean squares of latents, means since the line before; images/s over all ranks; peak memory in GiB, of the
          first rank; matmul_share is the model's matrix products (backward counted twice the forward, recomputation not counted) over
          what one large product reaches on this machine, measured as the run begins; eta_s in seconds
Check     python -m pytest tests/test_logs.py
"""

import argparse
import importlib
import json
import math
import os
import resource
import time
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from checkpoint import Weights
from family import Family
from flow import draw_noise, euler, flux_mu
from flux import Flux
from mmdit import MMDiT
from vae import VAE, to_pixels

MATMUL_SIDE = {"cpu": 1024, "cuda": 8192}
ROUNDS = 3


class Log:
    """OUT/log.jsonl, one line a row, and the same numbers for TensorBoard. Lines after the checkpoint that a run goes on from are cut."""

    def __init__(self, out: Path, start: int):
        self.file = out / "log.jsonl"
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        whole = [line for line in lines if line.endswith("}")]  # a killed process may leave half a line
        self.rows = [row for row in map(json.loads, whole) if row["step"] <= start]
        if len(self.rows) < len(lines):
            temporary = self.file.with_name(f".{self.file.name}.{os.getpid()}.tmp")
            temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
            os.replace(temporary, self.file)
        board = _installed("torch.utils.tensorboard")
        self.board = board and board.SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)

    def write(self, row: dict[str, object]) -> None:
        """Add a row; it has a "step", and lists become one curve a place."""
        self.rows.append(row)
        with open(self.file, "a") as f:
            f.write(json.dumps(row) + "\n")
        if self.board:
            for key, value in row.items():
                numbers = {f"{key}/{k}": number for k, number in enumerate(value)} if isinstance(value, list) else {key: value}
                for name, number in numbers.items():
                    if number is not None:
                        self.board.add_scalar(name, number, row["step"])
            self.board.flush()

    def plot(self) -> None:
        """OUT/loss.png, when matplotlib is there."""
        if self.rows and _installed("matplotlib"):
            figure = importlib.import_module("matplotlib.figure").Figure(figsize=(8, 4), layout="constrained")
            axes = figure.add_subplot()
            axes.plot([row["step"] for row in self.rows], [row["loss"] for row in self.rows])
            axes.set_xlabel("step")
            axes.set_ylabel("loss")
            figure.savefig(self.file.with_name("loss.png"))


def _installed(name: str):
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one large square product, the best of a few."""
    side = MATMUL_SIDE[device.type]
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times)


@torch.no_grad()
def draw_samples(model: MMDiT | Flux, vae: VAE, context: Tensor, pooled: Tensor, guidance: Tensor | None, sigmas: Tensor,
                 shape: tuple[int, int, int], cfg: float, factor: int, seed: int) -> list[Tensor]:
    """What the model under training draws: picture k from seed + k.

    context, pooled  (P + 1, L, W) and (P + 1, D): of the empty prompt, then of P prompts
    guidance         (1,), for the model that takes it
    shape            (16, h, w)
    returns          P images, (3, H, W) in [-1, 1], on the CPU
    """
    images = []
    for k in range(1, len(context)):
        def velocity(z: Tensor, sigma: Tensor, k: int = k) -> Tensor:
            towards = model(z, sigma, context[k:k + 1], pooled[k:k + 1], guidance)
            return towards if cfg == 1 else torch.lerp(model(z, sigma, context[:1], pooled[:1], guidance), towards, cfg)

        latent = euler(velocity, draw_noise([seed + k - 1], shape).to(context.device), sigmas)
        images.append(vae.decode(latent, factor)[0].float().cpu())
    return images


def write_grid(path: Path, images: list[Tensor]) -> None:
    """Images of one size side by side, two rows from four on, written whole or not at all."""
    rows = 2 if len(images) >= 4 else 1
    columns = -(-len(images) // rows)
    height, width = images[0].shape[1:]
    grid = Image.new("RGB", (columns * width, rows * height))
    for k, image in enumerate(images):
        grid.paste(Image.fromarray(to_pixels(image)), (k % columns * width, k // columns * height))
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    grid.save(temporary)
    os.replace(temporary, path)


def sampling_of(args: argparse.Namespace, family: Family, transformer: Weights, channels: int, device: torch.device) -> dict[str, object]:
    """How samples are drawn while training: as sample.py would, at --res."""
    side = args.res // args.factor
    steps, cfg, shift = (float(transformer.metadata.get(key, getattr(family, key) or 0)) for key in ("steps", "cfg", "time_shift"))
    given = None if args.guidance is None else torch.full((1,), args.guidance, device=device)
    return {"guidance": given, "sigmas": family.sigmas(int(steps), shift or math.exp(flux_mu((side // 2) ** 2))),
            "shape": (channels, side, side), "cfg": cfg, "factor": args.factor, "seed": args.seed}
