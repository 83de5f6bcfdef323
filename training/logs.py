"""Run logging: log.jsonl, TensorBoard and loss.png where their packages are installed, grids of sample pictures.

Units     loss; v_ll … v_by_sigma, the velocity's mean square error by band and by sigma: averages since the last line
          images/s over all ranks, without the time of saving and sampling; peak GiB of the first rank; eta_s in seconds
          matmul_share: the model's matrix products (backward counted as twice forward, recomputation not counted) over
          what one large product reaches on this machine, measured as the run begins
Check     python -m pytest tests/test_logs.py
"""

import importlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from files import entry, parse_json, read_text, replacing
from flow import SEEDS, draw_noise, euler, velocity_with_cfg
from flux import Flux
from mmdit import MMDiT
from training.ranks import world
from vae import VAE, to_pixels
from wavelet import BANDS, band_losses

SIGMA_BINS = 8
MATMUL_SIDE = {"cpu": 1024, "cuda": 8192}
ROUNDS = 3


class Tally:
    """Losses summed since the last log line. The sums stay on the device: adding never synchronises with it."""

    def __init__(self, device: torch.device):
        # layout: loss | 4 bands | loss by sigma bin | samples by sigma bin
        self.sums = torch.zeros(1 + len(BANDS) + 2 * SIGMA_BINS, device=device)
        self.passes = 0

    @torch.no_grad()
    def add(self, loss: Tensor, velocity: Tensor, target: Tensor, sigma: Tensor) -> Tensor:
        """Add the losses of one backward pass; returns the velocity loss of each sample, (B,)."""
        bands = band_losses(velocity, target)  # (B, 4)
        of_sample = bands.mean(1)
        bins = (sigma * SIGMA_BINS).long().clamp(max=SIGMA_BINS - 1)
        self.sums[:1 + len(BANDS)] += torch.cat((loss.detach()[None], bands.mean(0)))
        self.sums[1 + len(BANDS):].view(2, -1).index_add_(1, bins, torch.stack((of_sample, torch.ones_like(sigma))))
        self.passes += 1
        return of_sample

    def row(self) -> dict[str, object]:
        """The means over all ranks, after which the sums begin anew; a sigma bin without a sample is None."""
        if dist.is_initialized():
            dist.all_reduce(self.sums)
        sums, passes = self.sums.to("cpu", copy=True), self.passes * world()
        loss, bands = sums[0], sums[1:1 + len(BANDS)] / passes
        in_bins, counts = sums[1 + len(BANDS):].view(2, -1).tolist()
        self.sums.zero_()
        self.passes = 0
        return {"loss": loss.item() / passes,
                **{f"v_{name}": round(band, 5) for name, band in zip(BANDS, bands.tolist(), strict=True)},
                "v_by_sigma": [round(total / n, 5) if n else None for total, n in zip(in_bins, counts, strict=True)]}


class Log:
    """OUT/log.jsonl, one line per row, and TensorBoard. On resume, lines past the checkpoint are dropped."""

    def __init__(self, out: Path, start: int):
        self.file = out / "log.jsonl"
        lines = read_text(self.file).splitlines() if self.file.exists() else []
        complete = [line for line in lines if line.endswith("}")]  # a killed process may leave half a line
        self.rows = [row for row in map(self.parsed, complete) if row["step"] <= start]
        if len(self.rows) < len(lines):
            with replacing(self.file) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        board = _installed("torch.utils.tensorboard")
        self.board = board.SummaryWriter(str(out / "tensorboard"), purge_step=start + 1) if board else None

    def parsed(self, line: str) -> dict[str, object]:
        where = f"{self.file}: {line[:40]}"
        row = entry({"line": parse_json(line, where)}, "line", dict, where)
        return row | {"step": entry(row, "step", int, where), "loss": entry(row, "loss", float, where)}

    def write(self, row: dict[str, object]) -> None:
        """Append a row, which has a "step"; a list becomes one curve per entry."""
        self.rows.append(row)
        with open(self.file, "a") as f:
            f.write(json.dumps(row) + "\n")
        if self.board:
            for key, value in row.items():
                for k, number in enumerate(value if isinstance(value, list) else [value]):
                    if number is not None:
                        self.board.add_scalar(f"{key}/{k}" if isinstance(value, list) else key, number, row["step"])
            self.board.flush()

    def plot(self) -> None:
        """Write OUT/loss.png if matplotlib is installed."""
        if self.rows and _installed("matplotlib"):
            figure = importlib.import_module("matplotlib.figure").Figure(figsize=(8, 4), layout="constrained")
            axes = figure.add_subplot()
            axes.plot([row["step"] for row in self.rows], [row["loss"] for row in self.rows])
            axes.set_xlabel("step")
            axes.set_ylabel("loss")
            figure.savefig(self.file.with_name("loss.png"))


def _installed(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one large square product, the best of ROUNDS."""
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


@dataclass(frozen=True)
class SampleSettings:
    """How sample pictures are drawn during training."""

    sigmas: Tensor             # the schedule, (steps + 1,)
    shape: tuple[int, int, int]  # of a latent, (16, h, w)
    cfg: float
    guidance: float | None     # for Flux-dev
    factor: int
    seed: int                  # picture k is drawn from seed + k


@torch.no_grad()
def draw_samples(model: MMDiT | Flux, vae: VAE, context: Tensor, pooled: Tensor, how: SampleSettings) -> list[Tensor]:
    """One picture per prompt from the model under training.

    context, pooled  (P + 1, L, C) and (P + 1, D): of the empty prompt, then of P prompts
    returns          P images, (3, H, W) in [-1, 1], on the CPU
    """
    images = []
    for k in range(1, len(context)):
        velocity = velocity_with_cfg(model, context[[k, 0]], pooled[[k, 0]], how.cfg, how.guidance)
        noise = draw_noise([(how.seed + k - 1) % SEEDS], how.shape).to(context.device)
        latent = euler(velocity, noise, how.sigmas)
        images.append(vae.decode(latent.to(next(vae.parameters()).dtype), how.factor)[0].float().cpu())
    return images


def write_grid(path: Path, images: list[Tensor]) -> None:
    """Images of one size side by side, in two rows from four on."""
    rows = 2 if len(images) >= 4 else 1
    columns = -(-len(images) // rows)
    height, width = images[0].shape[1:]
    grid = Image.new("RGB", (columns * width, rows * height))
    for k, image in enumerate(images):
        grid.paste(Image.fromarray(to_pixels(image)), (k % columns * width, k // columns * height))
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as temporary:
        grid.save(temporary)
