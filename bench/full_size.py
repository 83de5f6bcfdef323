"""SD3-medium and Flux-dev at their full size, without their weights and without the memory for them.

Writes  FILE: every tensor of the published files, VAE included, by its name and shape, random, bf16: 4.3 GB for SD3,
        24 for Flux; kept for the next run unless --delete is given. Never committed; skipped if the disk has no room
Runs    as sample.py draws with --memory: modulations first, blocks read while others compute, then the VAE. The text is
        random. What it draws is noise; the picture is written
Prints  the plan, seconds per step and of the decode, and the peak of resident memory after each; exit status 1 if it is
        above --memory, what Python took before and the pages of one block being read, or a number is not finite
Run     python bench/full_size.py --model sd3 --res 4096 --steps 1 --memory 7 --dtype bf16
        python bench/full_size.py --model flux --res 1024 --steps 1 --memory 3 --dtype bf16
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
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from checkpoint import DTYPES, open_weights  # noqa: E402
from drawing.plan import choose  # noqa: E402
from drawing.settings import parse, settle  # noqa: E402
from drawing.stages import stages_of  # noqa: E402
from drawing.streaming import hoist, streamed  # noqa: E402
from family import family_of  # noqa: E402
from files import replacing  # noqa: E402
from flow import draw_noise, euler, velocity_with_cfg  # noqa: E402
from machine.memory import GIB, free_memory, peak_memory_gib, return_freed_memory  # noqa: E402
from vae import VAE, read_config, to_pixels  # noqa: E402

MANIFESTS = ROOT / "tests" / "data" / "manifests.json.gz"  # names and shapes of the published files
FILES = {"sd3": ("sd3_medium",), "flux": ("flux1-dev", "ae")}
SPARE_BYTES = 2 * 10**9


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


def written(model: str, folder: Path) -> tuple[Path, Path] | None:
    """The files of the transformer and of the VAE, written if they are absent; None if the disk has no room."""
    shapes = json.loads(gzip.decompress(MANIFESTS.read_bytes()))["shapes"]
    paths = [folder / f"random_{name}.safetensors" for name in FILES[model]]
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in zip(FILES[model], paths, strict=True):
        size = 2 * sum(torch.Size(shape).numel() for shape in shapes[name].values())
        if not path.is_file() and (free := shutil.disk_usage(folder).free) < size + SPARE_BYTES:
            print(f"skipped: {path} needs {size / 1e9:.1f} GB and 2 to spare, the disk has {free / 1e9:.1f} GB")
            return None
        if not path.is_file():
            write_random(path, shapes[name])
    return paths[0], paths[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description="SD3 and Flux at their full size, in little memory.",
                                     allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", choices=tuple(FILES), default="sd3", help="which one")
    add("--folder", type=Path, default="runs", help="of the random weights, written if they are absent")
    add("--res", default="1024", help="pixels, side or WIDTHxHEIGHT")
    add("--steps", type=int, default=1, help="steps of Euler's solver")
    add("--memory", default="4", help="GiB for weights and activations")
    add("--dtype", choices=tuple(DTYPES), default="fp32", help="of the arithmetic")
    add("--store", choices=("fp8",), help="keep the matrices of blocks in fp8")
    add("--out", type=Path, default="runs/random.png", help="the picture")
    add("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    add("--no-decode", action="store_true", help="end after the steps")
    add("--delete", action="store_true", help="remove the weights afterwards")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return_freed_memory()  # as sample.py does
    if not (files := written(args.model, args.folder)):
        return
    fits = draw(*files, args.res, args.steps, args.memory, args.dtype, args.store, args.out, not args.no_decode)
    if args.delete:
        for file in set(files):
            file.unlink()
    raise SystemExit(0 if fits else 1)


@torch.inference_mode()
def draw(transformer: Path, vae: Path, res: str, steps: int, memory: str, dtype: str, store: str | None, out: Path,
         decoded: bool) -> bool:
    """Draw with random weights as sample.py draws; whether all was finite and within the memory."""
    flags = ["--prompt", "noise", "--res", res, "--steps", str(steps), "--memory", memory, "--dtype", dtype, "--device",
             "cpu", "--first", "none", *(("--store", store) if store else ())]
    opened = open_weights(transformer)
    family, weights = family_of(opened), opened.part("model.diffusion_model.")
    config, vae_config = family.config(weights), read_config(open_weights(vae).part("first_stage_model."))
    settings = settle(parse(flags), family, opened, config)
    stages = stages_of(settings.size, None, 0.6, 32, lambda tokens: family.sigmas(steps, settings.time_shift))
    plan = choose(settings, family, config, vae_config, stages)
    before = peak_memory_gib("cpu")
    print(f"{plan.table()}\nPython and torch take {before:.2f} GiB")

    model = streamed(lambda: family.model(config), weights, "cpu", DTYPES[dtype], plan.resident, store == "fp8")
    generator, passes = torch.Generator().manual_seed(1), 1 if settings.cfg == 1 else 2
    context, pooled = (torch.randn(shape, generator=generator).to(DTYPES[dtype]) for shape in (
        (passes, family.text_tokens(None), config.context_dim), (passes, config.pooled_dim)))
    start = time.perf_counter()
    guidance = None if settings.guidance is None else torch.full((passes,), settings.guidance)
    numbers = hoist(model, stages[0].sigmas[:-1], pooled, guidance)
    velocity = velocity_with_cfg(model, context, numbers, settings.cfg, settings.guidance, plan.batched)
    noise = draw_noise([0], (16, settings.size[1] // 16, settings.size[0] // 16))
    print(f"modulations of all steps: {time.perf_counter() - start:.1f} s, peak {peak_memory_gib('cpu'):.2f} GiB")
    start = time.perf_counter()
    latent = euler(velocity, noise, stages[0].sigmas, progress=True)
    seconds = (time.perf_counter() - start) / steps
    print(f"{seconds:.1f} s/step, {dtype}, {torch.get_num_threads()} threads: peak {peak_memory_gib('cpu'):.2f} GiB")
    finite = bool(latent.isfinite().all())
    if decoded:
        del model, velocity
        free_memory()
        start = time.perf_counter()
        image = VAE.load(vae, dtype=DTYPES[dtype], fallback=family.latent_scale).decode(latent.to(DTYPES[dtype]))[0]
        finite &= bool(image.isfinite().all())
        with replacing(out) as temporary:
            Image.fromarray(to_pixels(image.float())).save(temporary)
        print(f"decode {time.perf_counter() - start:.1f} s: peak {peak_memory_gib('cpu'):.2f} GiB; {out}")
    pages = dict(plan.rows).get("latent: buffers of two blocks", 0) / 2
    return finite and peak_memory_gib("cpu") <= (plan.memory + pages) / GIB + before


if __name__ == "__main__":
    main()
