"""Flux-dev at its full size, without its weights and without the memory for them: one velocity, block by block.

Writes  FILE: every tensor of flux1-dev.safetensors by its published name and shape, random, bf16, 23.8 GB, streamed tensor by
        tensor; written once, kept for the next run unless --delete is given. Never committed
Runs    one velocity at 512x512 px, factor 16, 256 + 512 tokens. The file is mapped; a block's weights are turned to fp32 when the
        block begins and let go when it ends, and the mapping with them, so that neither memory nor page counts hold a second copy
Prints  seconds, peak resident memory beside the file's size; ends with 1 if the peak is over 8 GiB, or the velocity is no number
Skips   with the reason, if the disk has no room for FILE
Run     python tests/full_size_flux.py --file runs/flux1-dev-random.safetensors
"""

import argparse
import json
import os
import resource
import shutil
import struct
import sys
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from checkpoint import fill, open_weights  # noqa: E402
from flux import Flux, read_config  # noqa: E402
from tests.golden import published  # noqa: E402

GIB = 2**30
MOST_GIB, SPARE_BYTES = 8, 2 * 10**9


def write_random(path: Path, shapes: dict[str, tuple[int, ...]], seed: int = 0) -> None:
    """A safetensors file of random bf16 tensors, of which one at a time is in memory; whole, or not there."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator, temporary = torch.Generator().manual_seed(seed), path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name, shape in tqdm(shapes.items(), desc=f"writing {path.name}", file=sys.stderr):
                values = 0.02 * torch.randn(shape, generator=generator)
                if name.endswith(".scale"):
                    values += 1
                values.bfloat16().view(torch.uint8).numpy().tofile(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_block_by_block(path: Path) -> Flux:
    """A Flux whose blocks are empty but while they work; the arithmetic is fp32."""
    weights = open_weights(path)
    with torch.device("meta"):
        model = Flux(read_config(weights))
    for name, module in model.named_children():
        blocks = module.named_children() if isinstance(module, nn.ModuleList) else ()
        for index, block in blocks:
            prefix = f"{name}.{index}."
            block.register_forward_pre_hook(lambda block, _, prefix=prefix: fill(block, open_weights(path).part(prefix)))
            block.register_forward_hook(lambda block, *_: block.to("meta") and None)  # None: the output stays what it is
        if not blocks:
            fill(module, weights.part(name + "."))
    return model


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--file", default="runs/flux1-dev-random.safetensors", help="24 GB, written if it is not there")
    parser.add_argument("--delete", action="store_true", help="remove the file afterwards")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path, shapes = Path(args.file), published("flux1-dev")
    size = 2 * sum(torch.Size(shape).numel() for shape in shapes.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        free = shutil.disk_usage(path.parent).free
        if free < size + SPARE_BYTES:
            print(f"skipped: {path} needs {size / 1e9:.1f} GB and 2 to spare, the disk has {free / 1e9:.1f} GB")
            return
        write_random(path, shapes)
    print(f"{path}: {len(shapes)} tensors, {size / GIB:.2f} GiB in bf16; peak so far {peak_gib():.2f} GiB")

    generator = torch.Generator().manual_seed(1)
    latent, context, pooled = (torch.randn(shape, generator=generator) for shape in ((1, 16, 32, 32), (1, 512, 4096), (1, 768)))
    began = time.time()
    velocity = load_block_by_block(path)(latent, torch.tensor([0.7]), context, pooled, torch.tensor([3.5]))
    finite = bool(velocity.isfinite().all())
    print(f"one velocity {tuple(velocity.shape)}, standard deviation {velocity.std():.3f}, in {time.time() - began:.0f} s, fp32, "
          f"{args.threads} threads; peak {peak_gib():.2f} GiB resident, of a file of {size / GIB:.2f} GiB")
    if args.delete:
        path.unlink()
    raise SystemExit(0 if finite and peak_gib() <= MOST_GIB else 1)


if __name__ == "__main__":
    main()
