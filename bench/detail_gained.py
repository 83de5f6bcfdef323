"""Detail before and after fine-tuning at 1024 px: the same prompts and seed drawn by the base and the fine-tuned model.

The base is drawn twice: at its training size, enlarged, and at 1024 px, where it repeats the texture of small pictures.
More detail is not better by itself: noise has the most. The last line is of the photographs that both were trained on.
Prints  mean absolute Laplacian (levels of 255, gray) and bytes of the JPEG at quality 95
Writes  OUT/before_after.jpg, from top to bottom: base enlarged, base at 1024 px, fine-tuned; the middle of the first
        and of the third at full size
Run     python bench/detail_gained.py --data photos --base models/tiny-sd3/base_256.safetensors --out out
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.prompt_following import painter  # noqa: E402
from checkpoint import Weights, model_folder, open_weights  # noqa: E402
from data import Pictures, read_folder  # noqa: E402
from family import find, vae_for  # noqa: E402
from scores.jpeg import jpeg_size  # noqa: E402
from vae import VAE, to_pixels  # noqa: E402

SHEET = 256  # pixels per picture on the sheet


def laplacian(pixels: np.ndarray) -> float:
    """Mean absolute 4-neighbour Laplacian of the gray picture, in levels of 255."""
    gray = pixels.astype(np.float64) @ (0.299, 0.587, 0.114)
    neighbours = gray[:-2, 1:-1] + gray[2:, 1:-1] + gray[1:-1, :-2] + gray[1:-1, 2:]
    return float(np.abs(neighbours - 4 * gray[1:-1, 1:-1]).mean())


def resized(pixels: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS))


def main() -> None:
    parser = argparse.ArgumentParser(description="Detail before and after fine-tuning at 1024 px.", allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="its captions are the prompts")
    add("--base", required=True, metavar="FILE", help="the transformer before fine-tuning")
    add("--model", default="tiny-sd3", help="folder of models/ with the fine-tuned one")
    add("--weights", metavar="DIR", help="another model folder")
    add("--prompts", type=int, default=6, help="how many, evenly chosen")
    add("--res", type=int, default=1024, help="pixels")
    add("--seed", type=int, default=0, help="of the noise")
    add("--out", default="out", metavar="DIR", type=Path, help="folder of before_after.jpg")
    args = parser.parse_args()

    folder, res, base = model_folder(args.model, args.weights), args.res, open_weights(args.base)
    family, tuned, vae_path = find(folder)
    sampling, vae = family.sampling(tuned), VAE.load(vae_for(folder, vae_path, 16), fallback=family.latent_scale)
    text = family.text.load(folder, t5_length=family.t5_length)
    items = read_folder(args.data)
    items = items[::max(1, len(items) // args.prompts)][:args.prompts]

    def drawn_by(transformer: Weights, side: int) -> list[np.ndarray]:
        paint = painter(family, transformer, text, vae, sampling, side, args.seed)
        return [to_pixels(paint(item.captions[0])[0]) for item in tqdm(items, desc=f"{side} px", file=sys.stderr)]

    own, photographs = int(base.metadata["res"]), Pictures([item.path for item in items])  # training size of the base
    rows = {f"base at {own} px, enlarged": [resized(pixels, res) for pixels in drawn_by(base, own)],
            f"base at {res} px": drawn_by(base, res), f"fine-tuned at {res} px": drawn_by(tuned, res),
            "the photographs": [photographs.central_crop(i, res, res) for i in range(len(items))]}
    for name, row in rows.items():
        print(f"{name:25}  Laplacian {np.mean([laplacian(pixels) for pixels in row]):5.2f}   "
              f"JPEG {np.mean([jpeg_size(pixels) for pixels in row]):9,.0f} bytes   ({len(row)} pictures)")
    first, second, third, _ = rows.values()  # the photographs have their own licences
    crop = slice((res - SHEET) // 2, (res + SHEET) // 2)
    parts = [[resized(pixels, SHEET) for pixels in row] for row in (first, second, third)]
    parts += [[pixels[crop, crop] for pixels in row] for row in (first, third)]
    args.out.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate([np.hstack(row) for row in parts])).save(args.out / "before_after.jpg", quality=85)


if __name__ == "__main__":
    main()
