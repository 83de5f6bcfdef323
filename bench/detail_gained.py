"""Detail before and after fine-tuning at 1024 px: the same prompts and seeds drawn by the base and by the fine-tuned model.

The base is drawn twice: at the size it was trained at, enlarged, and at 1024 px, where it repeats the texture of small pictures.
More is not better by itself: noise has the most detail, and a photograph has less per pixel the larger it is. Look at the
pictures beside the figures; the last line is of what both models learnt from.

Prints  the mean absolute Laplacian (levels of 255, gray) and the bytes of the JPEG at quality 95
Writes  OUT/before_after.jpg, from top to bottom: base enlarged, base at 1024 px, fine-tuned; the middle of the first and of the
        third at full size
Run     python tests/detail_gained.py --data photos --base models/tiny-sd3/base_256.safetensors --out out
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from checkpoint import Weights, model_folder, open_weights  # noqa: E402
from data import Pictures, read_folder  # noqa: E402
from family import find  # noqa: E402
from flow import draw_noise, euler  # noqa: E402
from sample import settle, velocity_with_cfg  # noqa: E402
from scores.jpeg import jpeg_size  # noqa: E402
from vae import VAE, to_pixels  # noqa: E402

SHEET = 256  # pixels a picture on the sheet


def laplacian(pixels: np.ndarray) -> float:
    """Mean absolute 4-neighbour Laplacian of the gray picture, in levels of 255."""
    gray = pixels.astype(np.float64) @ (0.299, 0.587, 0.114)
    around = gray[:-2, 1:-1] + gray[2:, 1:-1] + gray[1:-1, :-2] + gray[1:-1, 2:]
    return float(np.abs(around - 4 * gray[1:-1, 1:-1]).mean())


def enlarged(pixels: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", required=True, metavar="DIR", help="its captions are the prompts")
    parser.add_argument("--base", required=True, metavar="FILE", help="the transformer before fine-tuning")
    parser.add_argument("--model", default="tiny-sd3", help="the fine-tuned one")
    parser.add_argument("--weights", metavar="DIR")
    parser.add_argument("--prompts", type=int, default=6, help="how many, evenly chosen")
    parser.add_argument("--res", type=int, default=1024, help="pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="out", metavar="DIR")
    args = parser.parse_args()

    folder = model_folder(args.model, args.weights)
    family, tuned, vae_path = find(folder)
    base = open_weights(args.base)
    text, vae = family.text.load(folder, t5_length=family.t5_length), VAE.load(vae_path)
    items = read_folder(args.data)
    items = items[:: max(1, len(items) // args.prompts)][: args.prompts]

    def drawn_by(transformer: Weights, res: int) -> Iterator[np.ndarray]:
        settings = argparse.Namespace(res=str(res), seed=args.seed, steps=None, cfg=None, guidance=None, time_shift=None, mu=None,
                                      device="cpu", dtype="fp32", factor=16, count=1)
        settle(settings, family, tuned)
        model, sigmas = family.model.load(transformer.source), family.sigmas(settings.steps, settings.time_shift)
        noise = draw_noise([args.seed], (16, res // 16, res // 16))
        for item in tqdm(items, desc=f"{Path(transformer.source).name}, {res} px", file=sys.stderr):
            velocity = velocity_with_cfg(model, *text.encode([item.captions[0], ""]), settings.cfg, settings.guidance)
            yield to_pixels(vae.decode(euler(velocity, noise, sigmas))[0])

    own = int(base.metadata["res"])  # the size that the base was trained at
    photographs, whole, middle = Pictures([item.path for item in items]), [], []
    crop = slice((args.res - SHEET) // 2, (args.res + SHEET) // 2)
    for name, pictures in (
            (f"base at {own} px, enlarged", (enlarged(pixels, args.res) for pixels in drawn_by(base, own))),
            (f"base at {args.res} px", drawn_by(base, args.res)),
            (f"fine-tuned at {args.res} px", drawn_by(tuned, args.res)),
            ("the photographs", (to_pixels(photographs.central_square(i, args.res)) for i in range(len(items))))):
        pictures = list(pictures)
        whole.append(np.concatenate([enlarged(pixels, SHEET) for pixels in pictures], axis=1))
        middle.append(np.concatenate([pixels[crop, crop] for pixels in pictures], axis=1))
        print(f"{name:25}  Laplacian {np.mean([laplacian(p) for p in pictures]):5.2f}   "
              f"JPEG {np.mean([jpeg_size(p) for p in pictures]):9,.0f} bytes   ({len(pictures)} pictures)")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    sheet = np.concatenate((*whole[:3], middle[0], middle[2]))  # the photographs have licences of their own
    Image.fromarray(sheet).save(out / "before_after.jpg", quality=85)


if __name__ == "__main__":
    main()
