"""What each loss does to the embedded model, and factor 16 to its autoencoder: OUT/ablation.md, OUT/ablation.jpg.

Trains     train.py from models/tiny-sd3/base_256.safetensors, every loss with equal steps and seeds: the same draws
Draws      sample.py: captions of trained photographs, with the seed of the run
Scores     metrics.py's; energies of Haar bands and a Fréchet distance of simple features are here
Intervals  95 %, Student's t over seeds: of each value, and of its difference from "velocity MSE" at the same seed
Resumes    the same command skips what is complete; more --seeds add runs
Takes      1.6 GB and, at the defaults, about an hour on two cores; the page records its own hours
Run        python bench/ablation.py --data photos --out runs/ablation
Check      python -m pytest tests/test_ablation.py
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train_vae  # noqa: E402
from bench.ablation_page import LOSSES as TITLES  # noqa: E402
from bench.ablation_page import SIGMAS, page, strip  # noqa: E402
from checkpoint import open_weights  # noqa: E402
from data import Pictures, read_folder  # noqa: E402
from files import need, read_json, replacing, run_command, writable  # noqa: E402
from scores.compare import frechet_distance, patches_of, psnr, ssim  # noqa: E402
from scores.detail import details, mean_of  # noqa: E402
from scores.folder import read_pixels  # noqa: E402
from scores.glcm import cores  # noqa: E402
from scores.grid import grid_scores  # noqa: E402
from scores.results import Results  # noqa: E402
from training.resume import same_settings  # noqa: E402
from vae import VAE, to_image, to_pixels  # noqa: E402
from wavelet import haar_pyramid  # noqa: E402

BASE = ROOT / "models" / "tiny-sd3" / "base_256.safetensors"
POSITIONS = ["--positions", "pi", "--trained-side", "8"]  # the base was trained at 8 x 8 tokens
LOSSES = {  # name of the folder -> flags of train.py; the base itself is "none"
    "velocity": "--objective velocity",
    "wlf": "--objective paper",
    "wlf_release": "--objective release",
    "bands_4": "--objective paper --bands 1,2,2,4",
    "bands_16": "--objective paper --bands 1,4,4,16",
    "huber": "--objective paper --huber 0.1",
    "snr_huber": "--objective snr_huber",
    "mask": "--objective velocity --mask lwd"}
REORDERED = "--objective velocity --accumulate 2"  # the same sums in another order: what rounding alone does
BATCH, LR, WARMUP = 4, 1e-3, 20
PATCH = 64  # pixels, of the simple features
VAES = {"f8": (8, 2, 2), "f16": (16, 2, 2), "f16_dilation_1": (16, 1, 2), "f16_offset_1": (16, 2, 1),
        "f16_both_1": (16, 1, 1), "f16_decoder": (16, 2, 2)}  # name -> factor, dilation, offset


@dataclass(frozen=True)
class Plan:
    """The command line; what follows `threads` is smaller with --small."""

    data: Path
    out: Path
    res: int
    steps: int
    seeds: int
    threads: int
    held_out: int = 6
    captions: int = 12
    drawing_steps: int = 28
    decoder_steps: int = 2000

    def decisive(self) -> dict[str, object]:
        """What must be equal to resume."""
        free = ("out", "seeds", "threads")
        chosen = {name: value for name, value in asdict(self).items() if name not in free}
        chosen |= {"batch": BATCH, "lr": LR, "warmup": WARMUP, "losses": LOSSES}
        return {name: str(value) for name, value in chosen.items()}


# ---- commands

def run(plan: Plan, *words: object) -> None:
    """Run a script and add its time to OUT/times.jsonl; ValueError if it fails."""
    command, began = [sys.executable, *map(str, (ROOT / words[0], *words[1:]))], time.time()
    print(f"$ python {' '.join(map(str, words))}", file=sys.stderr, flush=True)
    code = subprocess.run(command, stdout=subprocess.DEVNULL, cwd=ROOT,
                          env=os.environ | {"OMP_NUM_THREADS": str(plan.threads)}).returncode
    if code:
        raise ValueError(f"{words[0]} ended with {code}; the same command resumes there")
    with open(plan.out / "times.jsonl", "a") as times:
        times.write(json.dumps({"script": words[0], "seconds": round(time.time() - began, 1)}) + "\n")


def fine_tuned(plan: Plan, name: str, flags: str, seed: int, steps: int) -> Path:
    """The transformer that train.py exports, trained if it is not there."""
    place = plan.out / "runs" / f"{name}-{seed}"
    file = place / "sd3.safetensors"
    if not file.exists():
        run(plan, "train.py", "--data", plan.out / "train", "--validate", plan.out / "held_out", "--out", place,
            "--cache", plan.out / "cache", "--cache-latents", "--transformer", BASE, *POSITIONS, "--res", plan.res,
            "--batch", BATCH, "--lr", LR, "--warmup", WARMUP, "--steps", steps, "--save-every", steps,
            "--validate-every", steps, "--seed", seed, "--threads", plan.threads, "--save-dtype", "fp32",
            "--device", "cpu", *flags.split())
        shutil.rmtree(place / "checkpoints")
    return file


def drawn(plan: Plan, name: str, transformer: Path, seed: int) -> Path:
    """The folder of pictures of a run, named as the photographs; what is there is not drawn again."""
    place = plan.out / "pictures" / f"{name}-{seed}"
    run(plan, "sample.py", "--prompts", plan.out / "prompts.jsonl", "--transformer", transformer, "--res", plan.res,
        "--steps", plan.drawing_steps, "--first", "none", *POSITIONS, "--seed", seed, "--device", "cpu", "--out", place)
    return place


def decoder(plan: Plan) -> Path:
    """The autoencoder whose decoder is trained at factor 16, on all photographs but the held-out ones."""
    file = plan.out / "runs" / "decoder" / "vae_16.safetensors"
    if not file.exists():
        run(plan, "train_vae.py", "--decoder-only", "--weights", BASE, "--data", plan.data, "--lr", "3e-4", "--steps",
            plan.decoder_steps, "--holdout", plan.held_out, "--out", file.parent, "--threads", plan.threads,
            "--device", "cpu")
    return file


# ---- photographs

def prepare(plan: Plan) -> None:
    """Central squares of the photographs, as train.py would cut them, and the captions to draw.

    The held-out photographs are those that train_vae.py holds out: the autoencoder has not seen them, the base has
    """
    items = read_folder(plan.data)
    need(len(items) >= plan.held_out + plan.captions, "data", plan.data,
         f"{plan.held_out + plan.captions} photographs or more, it has {len(items)}")
    unseen = train_vae.split_pictures(train_vae.Settings(data=str(plan.data), holdout=plan.held_out))[1].paths
    pictures, captions = Pictures([item.path for item in items]), {}
    for folder in ("train", "held_out"):
        (plan.out / folder).mkdir(exist_ok=True)
        lines = []
        for k, item in enumerate(items):
            if (item.path in unseen) == (folder == "held_out"):
                name, (text, *alt) = f"{k:02}_{item.path.stem}.png", item.captions
                with replacing(plan.out / folder / name) as temporary:
                    Image.fromarray(pictures.central_crop(k, plan.res, plan.res)).save(temporary)
                lines.append({"file_name": name, "text": text, "alt": alt})
        write_lines(plan.out / folder / "metadata.jsonl", lines)
        captions[folder] = [{key: line[key] for key in ("file_name", "text")} for line in lines]
    chosen = [k * len(captions["train"]) // plan.captions for k in range(plan.captions)]
    write_lines(plan.out / "prompts.jsonl", [captions["train"][k] for k in chosen])


def write_lines(file: Path, rows: Sequence[dict]) -> None:
    with replacing(file) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# ---- scores

def simple_features(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each patch: energies of the bands, (P, 7), LH HL HH of level 1, LL LH HL HH of level 2; (P, 9) features.

    features  means of R, G, B; logarithms of the six energies without LL
    """
    patches = torch.from_numpy(patches_of(pixels, PATCH)).permute(0, 3, 1, 2).double() / 255      # (P, 3, 64, 64)
    energies = torch.cat([level.square().mean((2, 3, 4)) for level in haar_pyramid(patches, 2)], dim=1)
    high = energies[:, [0, 1, 2, 4, 5, 6]].clamp(min=1e-8).log10()
    return energies.numpy(), torch.cat((patches.mean((2, 3)), high), dim=1).numpy()


def picture_scores(plan: Plan, folder: Path) -> dict[str, float]:
    """Scores of a folder of pictures beside the photographs of the same captions."""
    names = [line["file_name"] for line in lines_of(plan.out / "prompts.jsonl")]
    errors, results = [], Results(plan.out / "cache", read_pixels)
    rows = details([folder / name for name in names], results, plan.threads, errors)
    if errors:
        raise ValueError(errors[0])
    of = {side: [np.concatenate(part) for part in zip(*(simple_features(read_pixels(side / name)) for name in names),
                                                     strict=True)] for side in (folder, plan.out / "train")}
    (energies, features), (known, originals) = of[folder], of[plan.out / "train"]
    decibels = 10 * np.log10(energies.mean(0) / known.mean(0))
    deviation = originals.std(0)
    bands = ("LH 1", "HL 1", "HH 1", "LL 2", "LH 2", "HL 2", "HH 2")
    return {name: value for name, value in mean_of(rows.values()).items() if not name.endswith("_bytes")} | {
        "frechet": frechet_distance(features / deviation, originals / deviation)} | dict(
            zip(bands, decibels.tolist(), strict=True))


def held_out_scores(row: dict) -> dict[str, float]:
    return {"held_out": row["loss"]} | dict(zip(SIGMAS, row["v_by_sigma"], strict=True))


def scores_of(plan: Plan, name: str, seed: int) -> dict[str, float]:
    """All scores of a loss at a seed, from OUT/scores if they are there."""
    file = plan.out / "scores" / f"{name}-{seed}.json"
    if not file.exists():
        trained = fine_tuned(plan, *(("velocity", LOSSES["velocity"]) if name == "none" else (name, LOSSES[name])),
                             seed, plan.steps)
        held_out = lines_of(trained.with_name("held_out.jsonl"))[0 if name == "none" else -1]  # the first: untrained
        folder = drawn(plan, name, BASE if name == "none" else trained, seed)
        write_lines(file, [picture_scores(plan, folder) | held_out_scores(held_out)])
    return read_json(file)


def apart(a: Path, b: Path) -> dict[str, float]:
    """How far two transformers are from each other, and how far the second is from the base."""
    first, second, base = ({name: tensor.read().double() for name, tensor in
                            open_weights(path).part("model.diffusion_model.").items()} for path in (a, b, BASE))
    pairs = [(first[name], second[name], base[name]) for name in first]
    squares = [sum(float((x - y).square().sum()) for x, y in side) for side in
               ([(x, y) for x, y, _ in pairs], [(y, z) for _, y, z in pairs])]
    equal, all_of_them = sum(int((x == y).sum()) for x, y, _ in pairs), sum(x.numel() for x, _, _ in pairs)
    return {"equal": equal / all_of_them, "share": math.sqrt(squares[0] / squares[1]),
            "most": max(float((x - y).abs().max()) for x, y, _ in pairs)}


def weights_apart(plan: Plan) -> dict[str, dict[str, float]]:
    """Pairs of runs whose weights are compared, at seed 0: after one step and after all."""
    file = plan.out / "scores" / "weights.json"
    if not file.exists():
        found = {}
        for prefix, steps, when in (("one_", 1, "after 1 step"), ("", plan.steps, f"after {plan.steps} steps")):
            mse, wlf, reordered = (fine_tuned(plan, prefix + name, flags, 0, steps) for name, flags in
                                   (("velocity", LOSSES["velocity"]), ("wlf", LOSSES["wlf"]), ("reordered", REORDERED)))
            found[f"WLF with equal bands and MSE, {when}"] = apart(wlf, mse)
            found[f"MSE summed in another order and MSE, {when}"] = apart(reordered, mse)
        other = fine_tuned(plan, "velocity", LOSSES["velocity"], 1, plan.steps)
        found[f"MSE of another seed and MSE, after {plan.steps} steps"] = apart(other, mse)
        write_lines(file, [found])
    return read_json(file)


@torch.inference_mode()
def vae_scores(plan: Plan) -> dict[str, list[dict[str, float]]]:
    """PSNR, SSIM and grid scores of each held-out photograph: as it is, and through each autoencoder."""
    file = plan.out / "scores" / "vae.json"
    if not file.exists():
        trained, plain = VAE.load(decoder(plan)), VAE.load(BASE)
        photographs = [read_pixels(path) for path in sorted((plan.out / "held_out").glob("*.png"))]
        found = {"photographs": [grid_scores(pixels) for pixels in photographs]}
        for name, (factor, dilation, offset) in VAES.items():
            vae, found[name] = trained if name == "f16_decoder" else plain, []
            for pixels in photographs:
                latent = vae.encode(to_image(pixels)[None], factor, dilation)
                again = to_pixels(vae.decode(latent, factor, offset)[0])
                found[name].append({"psnr": psnr(pixels, again), "ssim": ssim(pixels, again), **grid_scores(again)})
        write_lines(file, [found])
    return read_json(file)


# ---- the command

def about(plan: Plan, hours: float) -> str:
    """How the numbers were made."""
    rows = "\n".join(f"| {TITLES[name]} | `{flags}` |" for name, flags in LOSSES.items())
    text = (f"Every loss fine-tunes `models/tiny-sd3/base_256.safetensors` at {plan.res} px: {plan.steps} steps of "
            f"{BATCH} photographs, AdamW, learning rate {LR:g} after {WARMUP} steps of warm-up, {plan.seeds} seeds. "
            "The learning rate is that of two trials with velocity MSE alone, which may favour it. At a seed, "
            "all losses see the same photographs, captions, noise and σ. Each run then draws "
            f"{plan.captions} captions of trained photographs with its seed, {plan.drawing_steps} steps, and is scored "
            f"beside these photographs. {len(read_folder(plan.out / 'train'))} photographs are trained on, "
            f"{plan.held_out} are held out. "
            "`sample.py` draws with the embedded autoencoder. The decoder of the last section had "
            f"{plan.decoder_steps} steps and one seed. All commands took {hours:.2f} hours with --threads "
            f"{plan.threads}, torch {torch.__version__}.")
    return f"{textwrap.fill(text, 120)}\n\n| | flags of `train.py` |\n|---|---|\n{rows}"


def ablate(plan: Plan) -> None:
    """Everything that is not there yet, then the page and its picture."""
    writable(plan.out, f"--out {plan.out}")
    (plan.out / "scores").mkdir(exist_ok=True)
    settings = plan.out / "settings.json"
    if settings.exists():
        same_settings(settings, read_json(settings), plan.decisive())
    else:
        prepare(plan)
        write_lines(settings, [plan.decisive()])
    torch.set_num_threads(plan.threads)
    runs = {name: [scores_of(plan, name, seed) for seed in range(plan.seeds)] for name in ("none", *LOSSES)}
    photographs = picture_scores(plan, plan.out / "train")
    weights, autoencoders = weights_apart(plan), vae_scores(plan)
    hours = sum(line["seconds"] for line in lines_of(plan.out / "times.jsonl")) / 3600
    names = [line["file_name"] for line in lines_of(plan.out / "prompts.jsonl")]
    with replacing(plan.out / "ablation.jpg") as temporary:
        strip({name: [read_pixels(plan.out / "pictures" / f"{name}-0" / file) for file in names[:3]]
               for name in runs}).save(temporary, quality=85)
    text = page(runs, photographs, weights, autoencoders, about(plan, hours))
    with replacing(plan.out / "ablation.md") as temporary:
        temporary.write_text(text)
    print(f"wrote {plan.out / 'ablation.md'}, ablation.jpg; {hours:.2f} hours of commands")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--data", required=True, type=Path, metavar="DIR", help="photographs and metadata.jsonl, of fetch_photos.py")
    add("--out", type=Path, default=Path("runs/ablation"), metavar="DIR", help="an unfinished ablation there resumes "
        "(default: %(default)s)")
    add("--res", type=int, help="side of the squares, pixels; a multiple of 32 above 128 (default: 512)")
    add("--steps", type=int, help="optimizer steps of each run (default: 240)")
    add("--seeds", type=int, help="runs of each loss, 2 to 10 (default: 3)")
    add("--threads", type=int, default=cores(), help="CPU threads (default: %(default)s)")
    add("--small", action="store_true", help="everything at a tiny size, to see that it runs: 160 px, 2 steps, 2 seeds")
    args = parser.parse_args(argv)

    def command() -> None:
        res, steps, seeds = (small if given is None and args.small else usual if given is None else given
                             for given, usual, small in ((args.res, 512, 160), (args.steps, 240, 2),
                                                         (args.seeds, 3, 2)))
        need(res % 32 == 0 and 128 < res <= 4096, "res", res, "a multiple of 32, 160 to 4096")
        need(steps >= 2, "steps", steps, "2 or more")
        need(2 <= seeds <= 10, "seeds", seeds, "2 to 10: an interval needs two")
        need(args.threads >= 1, "threads", args.threads, "1 or more")
        less = dict(held_out=2, captions=2, drawing_steps=2, decoder_steps=2) if args.small else {}
        ablate(Plan(args.data.resolve(), args.out.resolve(), res, steps, seeds, args.threads, **less))
    run_command(command)


if __name__ == "__main__":
    main()
