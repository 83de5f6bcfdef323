"""Does a model draw what its captions ask for? Top-1 accuracy among the training photographs.

Each caption is drawn once, on the CPU in fp32 at factor 16. The picture and the central squares of all photographs are
area-averaged to 16 x 16 pixels; the nearest photograph by RMSE should be the caption's own. Where a model shows its
tokens, steps between pixels are larger across their borders: token_borders, of which the median is printed.
Run     python bench/prompt_following.py --data photos --res 256 --transformer models/tiny-sd3/base_256.safetensors
        python bench/prompt_following.py --data photos --captions text --limit 20
Check   python -m pytest tests/test_prompt_following.py    painter() draws what sample.py draws
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from checkpoint import Weights, model_folder  # noqa: E402
from data import Item, Pictures, read_folder  # noqa: E402
from family import Family, Sampling, find, positioned, vae_for  # noqa: E402
from files import need  # noqa: E402
from flow import draw_noise, euler, flux_mu, velocity_with_cfg  # noqa: E402
from layers import RULES  # noqa: E402
from text import FluxText, SD3Text  # noqa: E402
from vae import VAE, to_image  # noqa: E402

ALTS = 3  # "alt" captions that describe a photograph; the others were added for training


def painter(family: Family, transformer: Weights, text: SD3Text | FluxText, vae: VAE, sampling: Sampling, res: int,
            seed: int = 0, positions: str | None = None, trained_side: int | None = None) -> Callable[[str], Tensor]:
    """A function that draws a prompt as (1, 3, res, res) in about [-1, 1], at once, always from the same noise."""
    need(res >= 32 and res % 32 == 0, "res", res, "a multiple of 32")
    model, shift = family.model.load(transformer.source), sampling.time_shift
    model.config = positioned(model.config, positions, trained_side)
    sigmas = family.sigmas(sampling.steps, math.exp(flux_mu((res // 32) ** 2)) if shift is None else shift)
    noise = draw_noise([seed], (model.config.in_channels, res // 16, res // 16))

    @torch.inference_mode()
    def paint(prompt: str) -> Tensor:
        context, pooled = (torch.cat(pair) for pair in zip(text.encode([prompt]), text.encode([""]), strict=True))
        velocity = velocity_with_cfg(model, context, pooled, sampling.cfg, sampling.guidance)
        return vae.decode(euler(velocity, noise, sigmas))

    return paint


def thumbnail(image: Tensor) -> Tensor:
    """(B, 3, res, res) in [-1, 1] to (B, 768): 16 x 16 area averages."""
    return F.adaptive_avg_pool2d(image, 16).flatten(1)


def token_borders(image: Tensor, token: int = 32) -> float:
    """Mean step between neighbouring pixels across borders of tokens, over that at other even places, of gray.

    image  (1, 3, H, W); even places alone, as factor 16 makes pairs of pixels
    """
    gray, ratios = image[0].permute(1, 2, 0) @ image.new_tensor([0.299, 0.587, 0.114]), []
    for lines in (gray, gray.T):
        steps = lines.diff(dim=1).abs().mean(0)[1::2]  # the step onto column 2, 4, ...
        border = torch.arange(2, lines.shape[1], 2) % token == 0
        ratios.append(float(steps[border].mean() / steps[~border].mean()))
    return sum(ratios) / 2


def tasks_of(items: Sequence[Item], captions: str, limit: int, prompts: str | None) -> list[tuple[str, int, str]]:
    """What to draw: kind of caption, number of its photograph, caption."""
    if prompts:
        number = {item.path.name: i for i, item in enumerate(items)}
        rows = [line.split("\t") for line in Path(prompts).read_text().splitlines() if line]
        return [("reworded", number[name], caption) for name, caption in rows]
    return [(kind, i, caption) for i in range(0, len(items), max(1, len(items) // limit) if limit else 1)
            for kind, caption in zip(["text"] + ALTS * ["alt"], items[i].captions, strict=False)
            if captions in ("both", kind)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Does a model draw what its captions ask for?", allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="pictures and metadata.jsonl")
    add("--model", default="tiny-sd3", help="folder of models/")
    add("--weights", metavar="DIR", help="another model folder")
    add("--transformer", metavar="FILE", help="this transformer instead of the folder's")
    add("--captions", default="both", choices=("text", "alt", "both"), help=f"alt: the first {ALTS} of each photograph")
    add("--prompts", metavar="FILE", help="reworded captions instead: lines of file_name, tab, caption")
    add("--res", type=int, default=1024, help="pixels")
    for name, kind in (("steps", int), ("cfg", float), ("guidance", float), ("time-shift", float)):
        add(f"--{name}", type=kind, help="as in sample.py; left out: as the model's file records")
    add("--positions", choices=RULES, help="rule for places beyond --trained-side; left out: as the file records")
    add("--trained-side", type=int, metavar="N", help="tokens")
    add("--limit", type=int, default=0, help="number of photographs, evenly chosen; 0: all")
    add("--seed", type=int, default=0, help="of the noise")
    args = parser.parse_args()

    folder = model_folder(args.model, args.weights)
    family, transformer, vae_path = find(folder, args.transformer)
    family.check_guidance(args.guidance)
    sampling = family.sampling(transformer, args.steps, args.cfg, args.guidance, args.time_shift)
    text = family.text.load(folder, t5_length=family.t5_length)
    vae = VAE.load(vae_for(folder, vae_path, 16), fallback=family.latent_scale)
    paint = painter(family, transformer, text, vae, sampling, args.res, args.seed, args.positions, args.trained_side)
    items = read_folder(args.data)
    photographs = Pictures([item.path for item in items])
    known = torch.cat([thumbnail(to_image(photographs.central_crop(i, 256, 256))[None]) for i in range(len(items))])
    hits, borders = dict[str, list[bool]](), dict[str, list[float]]()
    for kind, index, caption in tqdm(tasks_of(items, args.captions, args.limit, args.prompts), file=sys.stderr):
        picture = paint(caption).clamp(-1, 1)
        nearest = int((known - thumbnail(picture)).square().mean(1).argmin())
        hits.setdefault(kind, []).append(nearest == index)
        borders.setdefault(kind, []).append(token_borders(picture))
        if nearest != index:
            tqdm.write(f"{kind}: {items[index].path.name} drawn as {items[nearest].path.name}: {caption}")
    for kind, right in hits.items():
        print(f"{kind}: top-1 {sum(right)} of {len(right)} = {100 * sum(right) / len(right):.1f} %  "
              f"token borders {statistics.median(borders[kind]):.2f}  "
              f"({args.res} px, {sampling.steps} steps, cfg {sampling.cfg}, {Path(transformer.source).name}"
              f"{f', positions {args.positions}' if args.positions else ''})")


if __name__ == "__main__":
    main()
