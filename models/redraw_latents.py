"""Latents that a model draws, each with the photograph that it should show: for train_vae.py --redrawn.

Why       a transformer's latents are not those of photographs: a decoder that learnt from photographs shows its tokens
Redraws   noise is added to the latent of a photograph, as far as a level of SIGMAS; the model removes it again with the
          photograph's caption. So picture and photograph agree, the more the lower the level
Writes    OUT/MODEL.safetensors: raw latents, as a decoder reads them, (16, res / 16, res / 16), by "PICTURE at LEVEL"
Run       python models/redraw_latents.py --data photos --model tiny-sd3 --out redrawn       20 minutes on one core
Check     python -m pytest tests/test_decoder.py
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from checkpoint import model_folder, save  # noqa: E402
from data import Pictures, read_folder  # noqa: E402
from family import find  # noqa: E402
from files import need, run_command, writable  # noqa: E402
from flow import draw_noise, euler, interpolate, velocity_with_cfg  # noqa: E402
from vae import VAE, to_image  # noqa: E402

SIGMAS = (0.5, 0.7, 0.85)
STEPS = 16  # of the complete schedule; a redrawing takes those below its level


@torch.inference_mode()
def redrawn(folder: Path, transformer: str | None, data: Path, res: int) -> dict[str, Tensor]:
    """The latents of every picture of `data`, its central square at res x res pixels, in fp16."""
    items, latents = read_folder(data), {}
    pictures = Pictures([item.path for item in items])
    family, weights, vae_path = find(folder, transformer)
    sampling, vae = family.sampling(weights), VAE.load(vae_path, fallback=family.latent_scale)
    model, text = family.model.load(weights.source), family.text.load(folder, t5_length=sampling.t5_length)
    levels = family.sigmas(STEPS, sampling.time_shift or family.by_tokens((res // 32) ** 2))
    for k, item in enumerate(tqdm(items, desc=folder.name, file=sys.stderr)):
        known = vae.encode(to_image(pictures.central_crop(k, res, res))[None])
        context, pooled = text.encode([item.captions[0], ""])
        velocity = velocity_with_cfg(model, context, pooled, sampling.cfg, sampling.guidance)
        for i, sigma in enumerate(SIGMAS):
            start = torch.tensor([sigma])
            noisy = interpolate(known, draw_noise([len(SIGMAS) * k + i], known.shape[1:]), start)
            latent = euler(velocity, noisy, torch.cat((start, levels[levels < sigma])))
            latents[f"{item.path.name} at {sigma}"] = (latent[0] / vae.scale_factor + vae.shift_factor).half()
    return latents


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Redraw photographs, for train_vae.py --redrawn.", allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, type=Path, metavar="DIR", help="pictures and metadata.jsonl")
    add("--model", default="tiny-sd3", help="folder of models/")
    add("--weights", metavar="DIR", help="another model folder")
    add("--transformer", metavar="FILE", help="this transformer instead of the folder's")
    add("--res", type=int, default=1024, help="pixels, a multiple of 32")
    add("--out", required=True, type=Path, metavar="DIR", help="folder for the latents of one or more models")
    args = parser.parse_args(argv)

    def command() -> None:
        need(args.res >= 32 and args.res % 32 == 0, "res", args.res, "a multiple of 32")
        folder = model_folder(args.model, args.weights)
        writable(args.out, f"--out {args.out}")
        latents = redrawn(folder, args.transformer, args.data, args.res)
        save(args.out / f"{folder.name}.safetensors", latents, {"factor": 16})

    run_command(command)


if __name__ == "__main__":
    main()
