"""Run logging: log.jsonl, held_out.jsonl, and TensorBoard where it is installed.

Units     loss; v_ll … v_by_sigma, the velocity's mean square error by band and by sigma; kept_by_sigma, the share of
          places that --mask trains: averages since the last line
          images/s over all ranks, without the time of saving and sampling; peak GiB of the first rank; eta_s in seconds
          matmul_share: the model's matrix products (backward counted as twice forward, recomputation not counted) over
          what one large product reaches on this machine, measured as the run begins
Check     python -m pytest tests/test_logs.py
"""

import importlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from files import entry, parse_json, read_text, replacing
from machine.ranks import gathered
from training.batches import Part
from training.ranks import world
from training.settings import Settings
from wavelet import BANDS, band_losses

SIGMA_BINS = 8
MATMUL_SIDE = {"cpu": 1024, "cuda": 8192}
ROUNDS = 3


class Tally:
    """Losses summed since the last log line. The sums stay on the device: adding never synchronises with it."""

    def __init__(self, device: torch.device):
        # layout: loss | 4 bands | by sigma bin: loss | samples | kept by --mask
        self.sums = torch.zeros(1 + len(BANDS) + 3 * SIGMA_BINS, device=device)
        self.passes, self.masked = 0, False

    @torch.no_grad()
    def add(self, loss: Tensor, velocity: Tensor, target: Tensor, sigma: Tensor, mask: Tensor | None = None) -> Tensor:
        """Add the losses of one backward pass; returns the velocity loss of each sample, (B,), masked or not."""
        bands = band_losses(velocity, target)  # (B, 4)
        of_sample = bands.mean(1)
        bins = (sigma * SIGMA_BINS).long().clamp(max=SIGMA_BINS - 1)
        self.sums[:1 + len(BANDS)] += torch.cat((loss.detach()[None], bands.mean(0)))
        kept = torch.ones_like(sigma) if mask is None else mask.float().mean((1, 2, 3))
        by_bin = torch.stack((of_sample, torch.ones_like(sigma), kept))
        self.sums[1 + len(BANDS):].view(3, -1).index_add_(1, bins, by_bin)
        self.passes, self.masked = self.passes + 1, mask is not None
        return of_sample

    def row(self) -> dict[str, object]:
        """The means over all ranks, after which the sums begin anew; a sigma bin without a sample is None."""
        if dist.is_initialized():
            dist.all_reduce(self.sums)
        sums, passes = self.sums.to("cpu", copy=True), self.passes * world()
        loss, bands = sums[0], sums[1:1 + len(BANDS)] / passes
        in_bins, counts, kept = sums[1 + len(BANDS):].view(3, -1).tolist()
        self.sums.zero_()
        self.passes = 0
        by_sigma = {"v_by_sigma": in_bins} | ({"kept_by_sigma": kept} if self.masked else {})
        return {"loss": loss.item() / passes,
                **{f"v_{name}": round(band, 5) for name, band in zip(BANDS, bands.tolist(), strict=True)},
                **{name: [round(total / n, 5) if n else None for total, n in zip(totals, counts, strict=True)]
                   for name, totals in by_sigma.items()}}


class Log:
    """OUT/NAME.jsonl, one line per row, and TensorBoard. On resume, lines past the checkpoint are dropped."""

    def __init__(self, out: Path, start: int, name: str = "log"):
        self.file, board_of = out / f"{name}.jsonl", "tensorboard" if name == "log" else f"tensorboard/{name}"
        lines = read_text(self.file).splitlines() if self.file.exists() else []
        complete = [line for line in lines if line.endswith("}")]  # a killed process may leave half a line
        self.rows = [row for row in map(self.parsed, complete) if row["step"] <= start]
        if len(self.rows) < len(lines):
            with replacing(self.file) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        board = installed("torch.utils.tensorboard")
        self.board = board.SummaryWriter(str(out / board_of), purge_step=start + 1) if board else None

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


def installed(name: str) -> ModuleType | None:
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


def what_diverged(step: int, norm: Tensor, parts: Sequence[Part], losses: Sequence[Tensor], names: Sequence[str],
                  settings: Settings) -> str:
    """Error text for a non-finite gradient: the samples whose loss is non-finite, or else the complete batch.

    losses  of each part's samples
    names   of all pictures
    """
    mine = [(names[picture], sigma, loss) for part, of_part in zip(parts, losses, strict=True)
            for picture, sigma, loss in zip(part.pictures, part.sigma.tolist(), of_part.tolist(), strict=True)]
    batch = sum(gathered(mine)[::settings.sequence], [])
    bad = [row for row in batch if not math.isfinite(row[2])] or batch
    saved = any((Path(settings.out) / "checkpoints").glob("step-*"))
    return (f"step {step}: gradient norm {norm.item()}, velocity loss {sum(row[2] for row in batch) / len(batch):.4g}; "
            f"picture, sigma, loss: {', '.join(f'{name} {sigma:.3f} {loss:.3g}' for name, sigma, loss in bad[:8])}; "
            f"{f'the last good checkpoint is in {settings.out}/checkpoints; ' * saved}try a smaller --lr")
