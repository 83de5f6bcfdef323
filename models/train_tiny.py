"""Make the embedded models from nothing: photographs, VAE, model folders, every training run, the decoder of factor 16.

Resumes   the same command skips what is done; a run that was interrupted continues at its last checkpoint
Takes     about eleven hours on two cores; runs train on cached latents, 21 MB at 1024 px
Writes    OUT/tiny-sd3 and OUT/tiny-flux, folders as in models/; OUT/photos, OUT/runs
Run       python models/train_tiny.py --out tiny                    all of it; photographs are fetched on Debian 12 only
          python models/train_tiny.py --out tiny --only flux        without the runs of SD3
          python models/train_tiny.py --out tiny --dry-run          prints the commands
Check     python -m pytest tests/test_train_tiny.py
"""

import argparse
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from files import run_command, writable  # noqa: E402

# of every run: the photographs are few, so which one to draw is decided near sigma 1, and sigma is shifted far to it
COMMON = "--cache-latents --density uniform --save-every 100 --device {device}"
SD3 = "--lr 2e-3 --warmup 100 --ema 0.998 --batch 16"
FLUX = "--drop-caption 0 --dtype bf16"


@dataclass(frozen=True)
class Run:
    name: str                # of its folder in OUT/runs
    start: str               # run whose transformer it starts from; "": the untrained one
    flags: str
    stretch: int = 1         # SD3's position table is stretched by this factor before the run


RUNS = {
    "sd3": (
        Run("base", "", f"--res 256 --time-shift 6 {SD3} --steps 4000"),
        Run("512", "base", f"--res 512 --time-shift 5 {SD3} --steps 1391", 2),
        Run("1", "512", "--res 1024 --time-shift 5 --batch 4 --lr 1e-3 --warmup 50 --ema 0.995 --steps 838", 2),
        Run("2", "1", "--res 1024 --time-shift 5 --batch 4 --lr 3e-4 --warmup 20 --ema 0.99 --seed 1 --steps 338"),
        Run("3", "2", "--res 1024 --time-shift 5 --batch 8 --lr 1.4e-3 --warmup 50 --ema 0.998 --steps 1002"),
        Run("4", "3", "--res 1024 --time-shift 5 --batch 8 --lr 7e-4 --warmup 10 --ema 0.98 --seed 2 --steps 263"),
        Run("5", "4", "--res 1024 --time-shift 5 --batch 8 --lr 5e-4 --warmup 10 --ema 0.99 --seed 3 --steps 1488"),
        Run("6", "5", "--res 1024 --time-shift 5 --batch 8 --lr 1.5e-4 --warmup 10 --ema 0.99 --seed 4 --steps 578")),
    "flux": (
        Run("base", "", "--drop-caption 0 --res 256 --time-shift 6 --batch 16 --lr 2e-3 --warmup 100 --ema 0.998 "
            "--steps 5126"),
        Run("512", "base", f"{FLUX} --res 512 --positions pi --trained-side 8 --time-shift 6 --batch 16 --lr 1.5e-3 "
            "--warmup 50 --ema 0.995 --steps 700"),
        Run("1", "512", f"{FLUX} --res 1024 --time-shift 5 --batch 8 --lr 1e-3 --warmup 30 --ema 0.99 --steps 320"),
        Run("2", "1", f"{FLUX} --res 1024 --time-shift 5 --batch 8 --lr 7e-4 --warmup 10 --ema 0.99 --seed 1 "
            "--steps 300"),
        Run("3", "2", f"{FLUX} --res 1024 --time-shift 4 --batch 8 --lr 2e-4 --warmup 10 --ema 0.99 --seed 2 "
            "--steps 140"))}
DECODER = "--decoder-only --lr 3e-4 --steps 24000"


def steps_of(out: Path, only: str | None, device: str) -> list[tuple[Path, list[str]]]:
    """(what it writes, arguments of python) of each step, in order; a step whose file exists is done."""
    photos, runs, vae = out / "photos", out / "runs", out / "runs" / "vae" / "vae.safetensors"
    folders = {family: out / f"tiny-{family}" for family in RUNS}
    steps = [
        (photos / "metadata.jsonl", ["models/fetch_photos.py", "--out", photos]),
        (vae, ["train_vae.py", "--data", photos, "--out", vae.parent, "--device", device]),
        (folders["flux"] / "flux.safetensors", ["models/make_tiny.py", "--data", photos, "--vae", vae, "--out",
                                                folders["sd3"], "--flux", folders["flux"]]),
        (out / "thinned", ["models/thin_captions.py", photos, "--drop", "0.4"])]  # make_tiny reads the captions first
    for family in [only] if only else RUNS:
        for run in RUNS[family]:
            place = runs / f"{family}-{run.name}"
            file = place / f"{family}.safetensors"
            start = runs / f"{family}-{run.start}" / file.name if run.start else folders[family] / file.name
            if run.stretch > 1:
                wide = start.with_stem(f"{start.stem}-{run.name}")
                steps.append((wide, ["models/stretch_positions.py", start, "--by", str(run.stretch), "--out", wide]))
                start = wide
            flags = COMMON.format(device=device).split() + run.flags.split()
            steps.append((file, ["train.py", "--weights", folders[family], "--transformer", start, "--data", photos,
                                 "--out", place, *flags]))
    redrawn, decoder = runs / "redrawn", runs / "decoder" / "vae_16.safetensors"
    for family in [only] if only else RUNS:
        drawing = runs / f"{family}-{RUNS[family][-1].name}" / f"{family}.safetensors"
        steps.append((redrawn / f"tiny-{family}.safetensors", [
            "models/redraw_latents.py", "--data", photos, "--weights", folders[family], "--transformer", drawing,
            "--out", redrawn]))
    steps.append((decoder, ["train_vae.py", "--weights", folders[only or "sd3"], "--data", photos, "--redrawn", redrawn,
                            "--out", decoder.parent, "--device", device, *DECODER.split()]))
    return steps


def make(out: Path, only: str | None, device: str) -> None:
    """Run what is left to do, then put the trained files into the model folders; ValueError names a step that fails."""
    for file, command in steps_of(out, only, device):
        if file.exists():
            continue
        print(f"$ python {shlex.join(map(str, command))}", flush=True)
        code = subprocess.run([sys.executable, ROOT / command[0], *map(str, command[1:])]).returncode
        if code:
            raise ValueError(f"{command[0]} ended with {code}; the same command resumes there")
        if file.name == "thinned":
            file.touch()
        if not file.exists():
            raise ValueError(f"{command[0]} was stopped before {file}; the same command resumes there")
    for family in [only] if only else RUNS:
        last, folder = RUNS[family][-1].name, out / f"tiny-{family}"
        if family == "sd3":  # of Flux, no base is kept
            shutil.copy(out / "runs" / "sd3-base" / "sd3.safetensors", folder / "base_256.safetensors")
        shutil.copy(out / "runs" / f"{family}-{last}" / f"{family}.safetensors", folder)
        shutil.copy(out / "runs" / "decoder" / "vae_16.safetensors", folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the embedded models from nothing.", allow_abbrev=False)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where all of it is written")
    parser.add_argument("--only", choices=tuple(RUNS), help="the runs of one family alone")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, exit")
    args = parser.parse_args()

    def command() -> None:
        if args.dry_run:
            for _, step in steps_of(args.out, args.only, args.device):
                print(f"python {shlex.join(map(str, step))}")
            return
        writable(args.out, f"--out {args.out}")
        make(args.out, args.only, args.device)
    run_command(command)


if __name__ == "__main__":
    main()
