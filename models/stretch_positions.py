"""Stretch SD3's position table: a transformer trained at one size starts at a larger one with the layout it knows.

Paper     SD3 (arXiv 2403.03206) section 5.3.2, "extended and interpolated position grids"
Writes    the tensors and metadata of FILE; only pos_embed differs. Flux computes its positions and needs no such step
Run       python models/stretch_positions.py runs/base/sd3.safetensors --by 2 --out runs/base/sd3-512.safetensors
Check     python -m pytest tests/test_stretch_positions.py
"""

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from checkpoint import open_weights, save  # noqa: E402
from files import need  # noqa: E402


def stretched(table: Tensor, scale: float) -> Tensor:
    """A (1, side², hidden_size) table with its places `scale` times closer together, by cubic interpolation."""
    side = math.isqrt(table.shape[1])
    places = torch.linspace(-1, 1, side, device=table.device) / scale          # of the new table in the old one
    grid = torch.stack(torch.meshgrid(places, places, indexing="xy"), dim=-1)  # (side, side, 2): column, row
    old = rearrange(table.float(), "b (h w) d -> b d h w", h=side)
    new = F.grid_sample(old, grid[None], mode="bicubic", align_corners=True)
    return rearrange(new, "b d h w -> b (h w) d").to(table.dtype)


def write_stretched(file: str, scale: float, out: str) -> None:
    """Write `file` to `out` with its position table stretched; ValueError if it has none or scale is not above 0."""
    need(0 < scale < math.inf, "by", f"{scale:g}", "a number above 0")
    weights = open_weights(file)
    table = next((name for name in weights if name.removeprefix("model.diffusion_model.") == "pos_embed"), None)
    if not table:
        flux = any("double_blocks." in name for name in weights)
        kind = "a Flux transformer, which computes its positions" if flux else "no SD3 transformer"
        raise ValueError(f"{file}: holds {kind}; there is no pos_embed to stretch")
    tensors = {name: t.read() for name, t in weights.items()}
    save(out, tensors | {table: stretched(tensors[table], scale)}, weights.metadata)


def main() -> None:
    parser = argparse.ArgumentParser(description="Stretch SD3's position table.", allow_abbrev=False)
    parser.add_argument("file", metavar="FILE", help="SD3 transformer, as train.py wrote it")
    parser.add_argument("--by", required=True, type=float, metavar="S", help="new size / old size")
    parser.add_argument("--out", required=True, metavar="FILE", help="file to write")
    args = parser.parse_args()
    try:
        write_stretched(args.file, args.by, args.out)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
