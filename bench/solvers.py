"""How far the latents of Euler and of ab2 are from those of many steps: the table of docs/running.md.

Prints  relative distance, mean over captions, for both embedded models at 512 px
Run     python bench/solvers.py --data photos
"""

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from checkpoint import model_folder  # noqa: E402
from data import read_folder  # noqa: E402
from family import find  # noqa: E402
from flow import SOLVERS, draw_noise, velocity_with_cfg  # noqa: E402

SIDE, EXACT = 32, 84                                            # of the latent at factor 16; steps
RUNS = (("euler", 28), ("ab2", 28), ("ab2", 20), ("ab2", 14))


@torch.inference_mode()
def distances(name: str, captions: list[str]) -> dict[tuple[str, int], float]:
    """(solver, steps) -> relative distance of its latents from those of EXACT steps."""
    folder = model_folder(name)
    family, transformer, _ = find(folder)
    sampling, model = family.sampling(transformer), family.model.load(transformer.source)
    text = family.text.load(folder, t5_length=family.t5_length)
    shift, total = sampling.time_shift or family.by_tokens((SIDE // 2) ** 2), dict.fromkeys(RUNS, 0.0)
    for seed, caption in enumerate(tqdm(captions, desc=name, file=sys.stderr)):
        context, pooled = text.encode([caption, ""])
        velocity = velocity_with_cfg(model, context, pooled, sampling.cfg, sampling.guidance)
        noise = draw_noise([seed], (model.config.in_channels, SIDE, SIDE))
        exact = SOLVERS["ab2"](velocity, noise, family.sigmas(EXACT, shift))
        for solver, steps in RUNS:
            latent = SOLVERS[solver](velocity, noise, family.sigmas(steps, shift))
            total[solver, steps] += ((latent - exact).norm() / exact.norm()).item() / len(captions)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of captioned pictures, of which the captions are taken")
    parser.add_argument("--captions", type=int, default=3, help="how many, evenly spread")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    items = read_folder(args.data)
    captions = [item.captions[0] for item in items[::max(1, len(items) // args.captions)][:args.captions]]
    for name in ("tiny-sd3", "tiny-flux"):
        far = distances(name, captions)
        print(name, ", ".join(f"{solver} {steps} {distance:.4f}" for (solver, steps), distance in far.items()))


if __name__ == "__main__":
    main()
