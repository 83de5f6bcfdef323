"""One run on one GPU: parity, attention, the paper's tables 5 and 10 on random weights, the commands, torch.compile.

Rows      most valuable first. A row that fails is reported by its error, and the next one runs
Writes    FILE: one JSON object per row, as soon as it is measured; bench/gpu_rows.py defines the figures
Run       python bench/gpu.py --out bench/results/h100.jsonl --seconds 330    one H100, under six minutes
          python bench/gpu.py --table bench/results/h100.jsonl                that file as a Markdown table
          python bench/gpu.py --small                                         the same code on a CPU, a minute
Check     python -m pytest tests/test_gpu.py
"""

import os

if __name__ == "__main__":  # before torch is imported
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from golden import distance, write_weights  # noqa: E402

from bench import gpu_rows  # noqa: E402
from bench.gpu_rows import FLUX_12B, SD3_2B, SMALL, Figures, Sizes, tf32  # noqa: E402
from files import run_command  # noqa: E402
from flux import Flux  # noqa: E402
from mmdit import MMDiT  # noqa: E402
from text import CLIPText, T5Encoder  # noqa: E402
from training.ranks import described  # noqa: E402
from training.run import commit  # noqa: E402
from vae import SD3_SCALE, SD3_SHIFT, VAE  # noqa: E402

SECONDS = 330
PARITY = 1e-4  # fp32 without TF32 from the official outputs, which lie around 1
TIMEOUT = 150  # seconds, of a command
ERROR = 200    # characters of a message
OFFLOADED = "--shard=zero2 --offload"


@dataclass(frozen=True)
class Row:
    name: str
    measure: Callable[[Sizes], Figures]
    paper: str = ""  # its figure


def machine(sizes: Sizes) -> Figures:
    """The card and its driver, what torch makes of them, and the rate that shares are of."""
    row = {"machine": described(torch.device(sizes.device)), "cores": os.cpu_count(), "commit": commit()[:10],
           "bf16_matmul_TFLOP/s": gpu_rows.rate(sizes.device) / 1e12}
    if sizes.device == "cuda":
        row |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
                "tf32_in_convolutions": torch.backends.cudnn.allow_tf32,
                "tf32_in_matmuls": torch.backends.cuda.matmul.allow_tf32}
    return row


# ---- parity with the official code, on the recorded outputs of tests/data

def run_mmdit(model: MMDiT, given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"model_output": model(given["x"], given["sigma"], given["context"], given["y"])}


def run_flux(model: Flux, given: dict[str, Tensor]) -> dict[str, Tensor]:
    inputs = (given.get(name) for name in ("latent", "timesteps", "txt", "vec", "guidance"))
    return {"pred_unpacked": model(*inputs)}


def run_vae(factor: int, moments: str, decoded: str, vae: VAE, given: dict[str, Tensor]) -> dict[str, Tensor]:
    weight = next(vae.parameters())
    image, latent = (given[name].to(weight.dtype) for name in ("image", "latent"))
    return {moments: torch.cat(vae.moments(image, factor), dim=1), decoded: vae.decode(latent, factor)}


def run_t5(model: T5Encoder, given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"last_hidden_{length}": model(given[f"input_ids_{length}"]) for length in (77, 256)}


def run_clip(model: CLIPText, given: dict[str, Tensor]) -> dict[str, Tensor]:
    last, penultimate, pooled = model(given["input_ids"])
    return {"last_hidden_state": last, "penultimate_no_final_ln": penultimate, "pooled_projected": pooled}


load_flux, load_raw = partial(Flux.load, axes_dim=(8, 12, 12)), partial(VAE.load, scale_factor=1.0, shift_factor=0.0)
GOLDENS = {  # case: how it is loaded and run
    "mmdit_sd3": (MMDiT.load, run_mmdit), "mmdit_sd35_medium": (MMDiT.load, run_mmdit),
    "flux_dev": (load_flux, run_flux), "flux_schnell": (load_flux, run_flux),
    "vae_sd3": (partial(VAE.load, scale_factor=SD3_SCALE, shift_factor=SD3_SHIFT),
                partial(run_vae, 8, "moments", "decoded_from_model_space")),
    "vae_flux": (VAE.load, partial(run_vae, 8, "moments", "decoded")),
    "vae_f16": (load_raw, partial(run_vae, 16, "moments_dilation2", "decoded_unpartitioned")),
    "t5_encoder": (T5Encoder.load, run_t5),
    "clip_l": (partial(CLIPText.load, activation="quick_gelu", num_heads=4), run_clip),
    "clip_g": (partial(CLIPText.load, activation="gelu", num_heads=5), run_clip)}


@torch.no_grad()
def parity(case: str, sizes: Sizes) -> Figures:
    """The largest difference from the official outputs: fp32 without TF32, fp32 as torch comes, bf16."""
    load, run = GOLDENS[case]
    with tempfile.TemporaryDirectory() as folder:
        path, golden = write_weights(case, Path(folder))
        given = {name.removeprefix("in/"): t.to(sizes.device) for name, t in golden.items() if name.startswith("in/")}
        options = {"eos": int(given["input_ids"].max())} if case.startswith("clip") else {}

        def furthest(dtype: torch.dtype) -> float:
            outputs = run(load(path, device=sizes.device, dtype=dtype, **options), given)
            far = []
            for name, value in outputs.items():
                value, expected = value.float().cpu(), golden[f"out/{name}"]
                if "at" in golden and value.ndim == 3:  # hidden states are kept at some positions
                    value = value[:, golden["at"][golden["at"] < value.shape[1]]]
                far.append(distance(value, expected))
            return max(far)

        with tf32(False, False):
            exact = furthest(torch.float32)
        row = {"fp32_without_tf32": exact, "fp32": furthest(torch.float32), "bf16": furthest(torch.bfloat16)}
    if not exact <= PARITY:  # NaN too
        raise RuntimeError(f"fp32 without TF32 is {exact:.1e} from the official outputs, more than {PARITY:.0e}")
    return row


# ---- the commands, with the embedded model

def start(*words: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def end(*processes: subprocess.Popen) -> None:
    """Wait for all; RuntimeError with the error, else the last line, of each that failed."""
    failures = []
    for process in processes:
        try:
            _, errors = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            errors = f"{process.communicate()[1]}\nno end after {TIMEOUT} s"
        if process.returncode:
            lines = errors.strip().splitlines() or ["no message"]
            why = next((line for line in reversed(lines) if "rror: " in line), lines[-1])  # torchrun adds a report
            failures.append(f"{' '.join(process.args[1:3])[:40]}: {why}")
    if failures:
        raise RuntimeError("; ".join(failures))


def command(line: str, sizes: Sizes) -> Figures:
    """Seconds of a command, the start of Python included."""
    with tempfile.TemporaryDirectory() as out:
        began = time.perf_counter()
        end(start(*line.format(out=out, sizes=sizes).split()))
        return {"s": time.perf_counter() - began}


def resume(sizes: Sizes) -> Figures:
    """Four steps under torchrun; two steps, then two resumed ones, without it: the exported weights are equal."""
    with tempfile.TemporaryDirectory() as folder:
        whole, parts = Path(folder) / "whole", Path(folder) / "parts"

        def train(out: Path, steps: int, *launcher: str) -> subprocess.Popen:
            return start(*launcher, "train.py", "--data=examples", f"--res={sizes.trained_px}", "--batch=4",
                         f"--device={sizes.device}", "--shard=zero2", "--offload", "--ema=0.9", "--lr=1e-4",
                         "--save-dtype=fp32", f"--threads={torch.get_num_threads()}", f"--steps={steps}",
                         f"--cache={out}", f"--out={out}")

        end(train(whole, 4, "-m", "torch.distributed.run", "--standalone"), train(parts, 2))
        end(train(parts, 4))
        a, b = (load_file(out / "sd3.safetensors") for out in (whole, parts))
    if differ := {name: distance(a[name], b[name]) for name in a if not torch.equal(a[name], b[name])}:
        raise RuntimeError(f"{len(differ)} of {len(a)} tensors differ after resuming, by {max(differ.values()):.1e}")
    return {"equal_tensors": len(a)}


# ---- all rows

def rows_of(device: str) -> list[Row]:
    """Most valuable first: what --seconds cuts off is at the end."""
    kernels = ("flash", "math") if device == "cpu" else ("cudnn", "flash", "efficient", "math")
    sample = "sample.py --prompt dandelion --steps 4 --res {sizes.drawn_px} --device {sizes.device} --out {out}/a.png"
    encode = "data.py encode examples --latents --res {sizes.trained_px} --device {sizes.device} --cache {out}"
    return [
        Row("machine", machine),
        *(Row(f"parity of {case}", partial(parity, case)) for case in GOLDENS),
        *(Row(f"attention of {name}, {kernel}", partial(gpu_rows.attention, which, head_dim, kernel))
          for name, which, head_dim in (("SD3", SD3_2B, 64), ("Flux", FLUX_12B, 128)) for kernel in kernels),
        Row("table 5: SD3-2B", partial(gpu_rows.sampling, SD3_2B),
            "A100: 1.16 s per step, 31.3 GB; offloaded 1.22 s, 16.1 GB"),
        Row("table 5: Flux-12B", partial(gpu_rows.sampling, FLUX_12B),
            "A100: 2.42 s per step, 50.4 GB; offloaded 3.16 s, 26.9 GB"),
        Row("Flux-12B, modulations before the loop", partial(gpu_rows.lean_sampling, FLUX_12B, None, False)),
        Row("Flux-12B, blocks streamed", partial(gpu_rows.lean_sampling, FLUX_12B, 0, False)),
        Row("Flux-12B, blocks in fp8", partial(gpu_rows.lean_sampling, FLUX_12B, None, True)),
        Row("table 10: SD3-2B, fp32 state", partial(gpu_rows.training, SD3_2B, ""), "2 A800: 0.59 images per s"),
        Row("table 10: SD3-2B, bf16 state", partial(gpu_rows.training, SD3_2B, "--state=bf16")),
        Row("table 10: SD3-2B, compiled", partial(gpu_rows.training, SD3_2B, "--compile")),
        Row("table 10: SD3-2B, offloaded", partial(gpu_rows.training, SD3_2B, OFFLOADED)),
        Row("sample.py", partial(command, sample)),
        Row("data.py encode", partial(command, encode)),
        Row("train.py resumes", resume),
        Row("table 10: Flux-12B, the blocks that fit, offloaded", partial(gpu_rows.training, FLUX_12B, OFFLOADED),
            "8 A100: 1.39 images per s, all 57 blocks"),
        Row("torch.compile: SD3-2B", partial(gpu_rows.compiled, SD3_2B)),
        Row("diffusers: SD3-2B", partial(gpu_rows.beside_diffusers, SD3_2B)),
        Row("diffusers: Flux-12B", partial(gpu_rows.beside_diffusers, FLUX_12B)),
        Row("VAE in fp32", partial(gpu_rows.autoencoder, torch.float32)),
        Row("VAE in bf16", partial(gpu_rows.autoencoder, torch.bfloat16)),
        Row("T5-XXL", gpu_rows.t5),
        Row("torch.compile: Flux-12B", partial(gpu_rows.compiled, FLUX_12B))]


def measured(rows: Iterable[Row], sizes: Sizes, seconds: float) -> Iterator[dict[str, object]]:
    """One record per row; no row begins after `seconds`."""
    began = time.perf_counter()
    for row in rows:
        record, start = {"row": row.name, "paper": row.paper}, time.perf_counter()
        if start - began > seconds:
            yield record | {"left_out": f"after {seconds:g} s no row begins"}
            continue
        try:
            record |= row.measure(sizes)
        except Exception as error:  # of any kind: the next row may run
            record["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:ERROR]}"
        gpu_rows.forget_peaks(sizes.device)
        yield record | {"took_s": time.perf_counter() - start}


def figures(record: Figures) -> str:
    """What a row measured, as the cell of a table."""
    parts = [f"{name.replace('_', ' ')} {f'{value:.3g}' if isinstance(value, float) else value}"
             for name, value in record.items() if name not in ("row", "paper", "took_s")]
    return ", ".join(parts).replace("|", "/")


def table(path: Path) -> str:
    """The Markdown table of a file that --out wrote."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [f"| {record['row']} | {figures(record)} | {record['paper']} |" for record in records]
    return "\n".join(["| row | measured | paper |", "|---|---|---|", *lines])


def run(out: Path | None, seconds: float, small: bool) -> int:
    """Measure, print and write all rows; the number of those that failed."""
    if small:  # several threads would only wait for each other
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"
    elif not torch.cuda.is_available():
        raise ValueError("no CUDA device here: --small runs the same rows on the CPU, at tiny sizes")
    sizes, failed = SMALL if small else Sizes(), 0
    with open(out or os.devnull, "w") as file:
        for record in measured(rows_of(sizes.device), sizes, seconds):
            print(f"{record['row']}: {figures(record)} ({record.get('took_s', 0):.1f} s)", flush=True)
            print(json.dumps(record), file=file, flush=True)
            failed += "failed" in record
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    add("--out", type=Path, metavar="FILE", help="JSON lines, one per row (default: rows are only printed)")
    add("--seconds", type=float, default=SECONDS, help="no row begins after this long (default: %(default)s)")
    add("--small", action="store_true", help="tiny sizes on the CPU: tries the rows, measures nothing of use")
    add("--table", type=Path, metavar="FILE", help="print FILE, written by --out, as a Markdown table, then exit")
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
    elif failed := run(args.out, args.seconds, args.small):
        raise SystemExit(f"{failed} rows failed")


if __name__ == "__main__":
    run_command(main)
