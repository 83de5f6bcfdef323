"""Does a model draw what its captions say? Top-1 accuracy among the training photographs.

Each caption is drawn once; the picture and the central squares of all photographs are area-averaged to 16 x 16 pixels; the
nearest photograph by RMSE should be the caption's own.

Run   python tests/prompt_following.py --data photos --res 256 --transformer models/tiny-sd3/base_256.safetensors
      python tests/prompt_following.py --data photos --captions text --limit 20
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from checkpoint import model_folder  # noqa: E402
from data import Pictures, read_folder  # noqa: E402
from family import find  # noqa: E402
from flow import draw_noise, euler  # noqa: E402
from sample import settle, velocity_with_cfg  # noqa: E402
from vae import VAE  # noqa: E402

ALTS = 3  # the photographs came with three; the others were written for training


def thumbnail(image: Tensor) -> Tensor:
    """(B, 3, res, res) in [-1, 1] to (B, 768): 16 x 16 area averages."""
    return F.adaptive_avg_pool2d(image, 16).flatten(1)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", required=True, metavar="DIR", help="pictures and metadata.jsonl")
    parser.add_argument("--model", default="tiny-sd3")
    parser.add_argument("--weights", metavar="DIR")
    parser.add_argument("--transformer", metavar="FILE")
    parser.add_argument("--captions", default="both", choices=("text", "alt", "both"), help=f"alt: the first {ALTS} of each photograph")
    parser.add_argument("--prompts", metavar="FILE", help="reworded captions instead: lines of file_name, tab, caption")
    parser.add_argument("--res", type=int, default=1024, help="pixels")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--cfg", type=float)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--time-shift", type=float)
    parser.add_argument("--limit", type=int, default=0, help="photographs, evenly chosen; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    folder = model_folder(args.model, args.weights)
    family, transformer, vae_path = find(folder, args.transformer)
    settings = argparse.Namespace(**vars(args) | {"res": str(args.res)}, mu=None, device="cpu", dtype="fp32", factor=16, count=1)
    settle(settings, family, transformer)
    text, model, vae = family.text.load(folder, t5_length=family.t5_length), family.model.load(transformer.source), VAE.load(vae_path)
    sigmas = family.sigmas(settings.steps, settings.time_shift)
    items = read_folder(args.data)
    pictures = Pictures([item.path for item in items])
    known = torch.cat([thumbnail(pictures.central_square(i, 256)[None]) for i in range(len(items))])

    number = {item.path.name: i for i, item in enumerate(items)}
    if args.prompts:
        rows = [line.split("\t") for line in Path(args.prompts).read_text().splitlines() if line]
        tasks = [("reworded", number[name], caption) for name, caption in rows]
    else:
        chosen = range(0, len(items), max(1, len(items) // args.limit) if args.limit else 1)
        tasks = [("alt" if k else "text", i, c) for i in chosen for k, c in enumerate(items[i].captions[: 1 + ALTS])
                 if args.captions == "both" or args.captions == ("alt" if k else "text")]
    hits: dict[str, list[bool]] = {}
    for kind, index, caption in tqdm(tasks, file=sys.stderr):
        velocity = velocity_with_cfg(model, *text.encode([caption, ""]), settings.cfg, settings.guidance)
        latent = euler(velocity, draw_noise([args.seed], (16, args.res // 16, args.res // 16)), sigmas)
        found = int((known - thumbnail(vae.decode(latent).clamp(-1, 1))).square().mean(1).argmin())
        hits.setdefault(kind, []).append(found == index)
        if found != index:
            tqdm.write(f"{kind}: {items[index].path.name} drawn as {items[found].path.name}: {caption}")
    for kind, right in hits.items():
        print(f"{kind}: top-1 {sum(right)} of {len(right)} = {100 * sum(right) / len(right):.1f} %  "
              f"({args.res} px, {settings.steps} steps, cfg {settings.cfg}, {Path(transformer.source).name})")


if __name__ == "__main__":
    main()
