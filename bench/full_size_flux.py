"""Flux-dev at its full size, without its weights and without the memory for them: one velocity, block by block.

Writes  FILE: every tensor of flux1-dev.safetensors by its published name and shape, random, bf16, 23.8 GB; kept for the
        next run unless --delete is given. Never committed; the run is skipped if the disk has no room for it
Runs    one velocity at 512x512 px, factor 16, 256 + 512 tokens. The file is mapped; a block's weights become fp32 when
        the block begins. They and the mapping are let go when it ends, so that no second copy stays in memory
Prints  seconds, peak resident memory; exit status 1 if the peak is over 8 GiB or the velocity is not finite
Run     python bench/full_size_flux.py --file runs/flux1-dev-random.safetensors
"""

import argparse
import gzip
import json
import os
import shutil
import struct
import sys
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from checkpoint import fill, open_weights  # noqa: E402
from files import replacing  # noqa: E402
from flux import Flux, read_config  # noqa: E402
from machine.memory import peak_memory_gib  # noqa: E402

MANIFESTS = ROOT / "tests" / "data" / "manifests.json.gz"  # names and shapes of the published files
GIB = 2**30
MOST_GIB, SPARE_BYTES = 8, 2 * 10**9


def write_random(path: Path, shapes: dict[str, list[int]]) -> None:
    """Write a safetensors file of random bf16 tensors, of which one at a time is in memory; complete or absent."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in tqdm(shapes.items(), desc=f"writing {path.name}", file=sys.stderr):
            values = 0.02 * torch.randn(shape, generator=generator) + (1 if name.endswith(".scale") else 0)
            values.bfloat16().view(torch.uint8).numpy().tofile(file)


def load_block_by_block(path: Path) -> Flux:
    """A Flux whose blocks hold weights only while they run; the arithmetic is fp32."""
    weights = open_weights(path)
    with torch.device("meta"):
        model = Flux(read_config(weights))
    for name, module in model.named_children():
        if not isinstance(module, nn.ModuleList):
            fill(module, weights.part(name + "."))
            continue
        for index, block in module.named_children():
            part = f"{name}.{index}."
            block.register_forward_pre_hook(lambda block, _, part=part: fill(block, open_weights(path).part(part)))
            block.register_forward_hook(lambda block, *_: block.to("meta") and None)  # None leaves the output as it is
    return model


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description="Flux-dev at its full size: one velocity, block by block.",
                                     allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--file", type=Path, default="runs/flux1-dev-random.safetensors", help="24 GB, written if it is absent")
    add("--delete", action="store_true", help="remove the file afterwards")
    add("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path, shapes = args.file, json.loads(gzip.decompress(MANIFESTS.read_bytes()))["shapes"]["flux1-dev"]
    size = 2 * sum(torch.Size(shape).numel() for shape in shapes.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        if (free := shutil.disk_usage(path.parent).free) < size + SPARE_BYTES:
            print(f"skipped: {path} needs {size / 1e9:.1f} GB and 2 to spare, the disk has {free / 1e9:.1f} GB")
            return
        write_random(path, shapes)
    print(f"{path}: {len(shapes)} tensors, {size / GIB:.2f} GiB in bf16; peak so far {peak_memory_gib('cpu'):.2f} GiB")

    generator, sizes = torch.Generator().manual_seed(1), ((1, 16, 32, 32), (1, 512, 4096), (1, 768))
    latent, context, pooled = (torch.randn(shape, generator=generator) for shape in sizes)
    start = time.time()
    velocity = load_block_by_block(path)(latent, torch.tensor([0.7]), context, pooled, torch.tensor([3.5]))
    finite, peak = bool(velocity.isfinite().all()), peak_memory_gib("cpu")
    print(f"one velocity {tuple(velocity.shape)}, deviation {velocity.std():.3f}, in {time.time() - start:.0f} s, "
          f"fp32, {args.threads} threads; peak {peak:.2f} GiB resident, of a file of {size / GIB:.2f} GiB")
    if args.delete:
        path.unlink()
    raise SystemExit(0 if finite and peak <= MOST_GIB else 1)


if __name__ == "__main__":
    main()
