"""Detail before and after fine-tuning at 1024 px: the same prompts and seeds drawn by the base and by the fine-tuned model.

More is not better by itself: noise has the most detail. Look at the pictures beside the figures.

Prints  the mean absolute Laplacian (levels of 255, gray) and the bytes of the JPEG at quality 95, before and after
Writes  OUT/before_after.jpg: base above, fine-tuned below
Run     python tests/detail_gained.py --data photos --base models/tiny-sd3/base_256.safetensors --out out
"""

import argparse
import io
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from checkpoint import locate, model_folder, open_weights  # noqa: E402
from data import read_folder, to_pixels  # noqa: E402
from flow import draw_noise, euler, sd3_sigmas  # noqa: E402
from mmdit import MMDiT  # noqa: E402
from sample import velocity_with_cfg  # noqa: E402
from text import SD3Text  # noqa: E402
from vae import VAE  # noqa: E402


def laplacian(pixels: np.ndarray) -> float:
    """Mean absolute 4-neighbour Laplacian of the gray picture, in levels of 255."""
    gray = pixels.astype(np.float64) @ (0.299, 0.587, 0.114)
    around = gray[:-2, 1:-1] + gray[2:, 1:-1] + gray[1:-1, :-2] + gray[1:-1, 2:]
    return float(np.abs(around - 4 * gray[1:-1, 1:-1]).mean())


def jpeg_bytes(pixels: np.ndarray) -> int:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.tell()


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
    tuned, vae_path = locate(folder)
    said = open_weights(tuned).metadata
    steps, cfg, shift = int(said["steps"]), float(said["cfg"]), float(said["time_shift"])
    text, vae = SD3Text.load(folder), VAE.load(vae_path)
    items = read_folder(args.data)
    captions = [item.captions[0] for item in items[:: max(1, len(items) // args.prompts)]][: args.prompts]

    noise = draw_noise([args.seed], (16, args.res // 16, args.res // 16))
    rows = []
    for name, path in (("base", args.base), ("fine-tuned", tuned)):
        model, drawn = MMDiT.load(path), []
        for caption in tqdm(captions, desc=name, file=sys.stderr):
            latent = euler(velocity_with_cfg(model, *text.encode([caption, ""]), cfg), noise, sd3_sigmas(steps, shift))
            drawn.append(to_pixels(vae.decode(latent)[0]))
        rows.append(np.concatenate(drawn, axis=1))
        print(f"{name:10}  Laplacian {np.mean([laplacian(p) for p in drawn]):5.2f}   "
              f"JPEG {np.mean([jpeg_bytes(p) for p in drawn]):9,.0f} bytes   ({len(drawn)} pictures of {args.res} px)")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    sheet = Image.fromarray(np.concatenate(rows))
    sheet.resize((sheet.width * 384 // args.res, sheet.height * 384 // args.res), Image.Resampling.LANCZOS).save(
        out / "before_after.jpg", quality=90)


if __name__ == "__main__":
    main()
