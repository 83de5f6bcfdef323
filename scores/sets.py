"""The networks on pictures and sets: LPIPS, FID, patch-FID, CLIPScore, Aesthetics, an autoencoder's round trip.

Paper    Diffusion-4K tables 1 to 4
Mirrors  the released generate_and_eval_fid.py: Inception's features of square crops; tested by tests/test_metrics.py
FID      above 0, lower is better: Fréchet distance of the features of pictures; patch-FID: of their 299 px patches
Shapes   H and W pixels, N pictures; pictures are uint8, (H, W, 3)
Weights  a folder with the official files; a FileNotFoundError names a missing one
"""

import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from reading.pictures import MOST_PIXELS
from scores.clip import CLIP, CLIPImage
from scores.compare import (
    FID_PATCH,
    Statistics,
    check_same_shape,
    crop_places,
    crops_of,
    frechet,
    patches_of,
    quick_frechet,
    statistics,
)
from scores.intervals import Halves, of_halves
from scores.official import find_weights
from scores.perceptual import LPIPS, Aesthetics, Inception, resize_crop
from scores.results import Results, each, identity
from vae import VAE, to_image, to_pixels

FEATURES = 2048       # width of Inception's


def as_images(pictures: np.ndarray) -> Tensor:
    """(N, H, W, 3) -> (N, 3, H, W), as the networks take them."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2)


def square(pixels: np.ndarray, side: int) -> np.ndarray:
    """(side, side, 3): resized to the short side, cropped at the centre, as the release does."""
    scale = side / min(pixels.shape[:2])
    if scale > 1 and (enlarged := round(scale**2 * pixels.shape[0] * pixels.shape[1])) > MOST_PIXELS:
        raise ValueError(f"{pixels.shape[1]}x{pixels.shape[0]} pixels are {enlarged:,} once enlarged to {side} px; at "
                         f"most {MOST_PIXELS:,} are compared: give a smaller --res, or cut it into pieces")
    return resize_crop(as_images(pixels[None]), side)[0].permute(1, 2, 0).numpy()


def load_lpips(weights: Path, device: str) -> Callable[[np.ndarray, np.ndarray], float]:
    """The LPIPS distance of two pictures of the same size, on VGG-16."""
    network = LPIPS.load("vgg", *(find_weights(weights, name) for name in ("vgg16-397923af.pth", "vgg.pth")), device)

    @torch.inference_mode()
    def lpips(reference: np.ndarray, image: np.ndarray) -> float:
        check_same_shape(reference, image)
        return float(network(*(to_image(pixels)[None].to(device) for pixels in (reference, image))))
    return lpips


class Extractor:
    """Inception's features, (N, 2048) float32, of pictures (N, H, W, 3)."""

    def __init__(self, weights: Path, device: str):
        self.file, self.device = find_weights(weights, "weights-inception-2015-12-05-6726825d.pth"), device
        self.network = Inception.load(self.file, device)

    def __call__(self, pictures: np.ndarray, batch: int = 16) -> np.ndarray:
        images = (as_images(pictures[k : k + batch]).to(self.device) for k in range(0, len(pictures), batch))
        chunks = list(map(self.network, images))
        return torch.cat(chunks).float().cpu().numpy() if chunks else np.zeros((0, FEATURES), np.float32)


class Features(NamedTuple):
    """Of a set: part -> (N, P, D), P patches or crops of each picture; the pictures; their statistics."""

    of_part: dict[str, np.ndarray]
    pictures: list[Path]
    statistics: dict[str, Statistics]


def set_features(paths: Sequence[Path], res: int, results: Results, inception: Extractor,
                 errors: list[str]) -> Features:
    """Features of "whole" pictures, square at `res` px, and of their "patches" and "crops" if these fit in.

    errors  gets a line per picture that can't be read; fewer than two, NaN or Inf raise a ValueError
    """
    key = 1, res, identity(inception.file)
    places = dict(zip(paths, crop_places(len(paths), res) if res >= FID_PATCH else [()] * len(paths), strict=True))

    def measure(pixels: np.ndarray) -> dict:
        pixels = square(pixels, res)
        return {"whole": inception(pixels[None]), "patches": inception(patches_of(pixels))}

    def of_crops(at: list[tuple[int, int]], pixels: np.ndarray) -> dict:
        return {"crops": inception(crops_of(pixels, res, at))}

    def features_of(path: Path) -> dict:
        row, at = results.of_picture(("features", key), path, measure), places[path]
        return row | (results.of_picture(("crops", key, at), path, partial(of_crops, at)) if at else {})

    def of_part(part: str) -> dict:
        features = [row[part] for row in rows.values()] or [np.zeros((0, FEATURES))]
        return statistics(np.concatenate(features), f"{paths[0].parent}, {part}")._asdict()

    rows = each(features_of, paths, f"Inception, {paths[0].parent.name}", errors)
    parts = ["whole", "patches", "crops"] if sum(len(row["patches"]) for row in rows.values()) > 1 else ["whole"]
    files = tuple(map(identity, rows))
    keys = {part: ("statistics", part, key, files, *(places.values() if part == "crops" else ())) for part in parts}
    found = {part: Statistics(**results.get(keys[part], partial(of_part, part))) for part in parts}
    return Features({part: np.stack([row[part] for row in rows.values()]) for part in parts}, list(rows), found)


def number_note(name: str, least: int, numbers: str = "") -> str:
    """The note on the number of pictures or patches under a Fréchet distance."""
    bias = "" if least > FEATURES else f"; bias dominates it below {FEATURES + 1}, compare it at equal N only"
    return f"note: {name}: N = {numbers or least}{bias}"


PARTS = {"fid": "whole", "patch_fid": "patches", "patch_fid_crops": "crops"}


def fid_scores(generated: Features, reference: Features, res: int, results: Results,
               notes: list[str]) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """FID and patch-FID, and their intervals; `notes` gets their N.

    Each has a second value, name_unbiased, where both sets have more pictures than features.
    """
    scores, intervals = {}, {}
    for name, part in PARTS.items():
        if part not in generated.statistics or part not in reference.statistics:
            notes.append(f"note: {name} left out: pictures of {res} px hold no patch of {FID_PATCH}")
            continue
        a, b = generated.statistics[part], reference.statistics[part]
        scores[name] = frechet(a, b)
        notes.append(number_note(name, min(a.n, b.n), f"{a.n} generated, {b.n} reference, {res} px"))
        if half := halves_of(quick_frechet_of_sets, [generated, reference], part, scores[name], results):
            intervals[name] = (max(0.0, scores[name] - half.reach), scores[name] + half.reach)
            if min(len(generated.pictures), len(reference.pictures)) > len(a.mean):
                scores[f"{name}_unbiased"] = half.unbiased
                intervals[f"{name}_unbiased"] = (half.unbiased - half.reach, half.unbiased + half.reach)
    return scores, intervals


def quick_frechet_of_sets(x: np.ndarray, y: np.ndarray) -> float:
    return quick_frechet(*(side.reshape(-1, side.shape[-1]) for side in (x, y)))


def paired_frechet(features: np.ndarray) -> float:
    """The Fréchet distance of (N, 2, D): pictures and their reconstructions."""
    return quick_frechet(features[:, 0], features[:, 1])


def halves_of(statistic: Callable[..., float], sets: Sequence[Features], part: str, whole: float,
              results: Results) -> Halves | None:
    """`of_halves` of a part of sets, stored; None of fewer than four pictures."""
    if min(len(one.pictures) for one in sets) < 4:
        return None
    key = "halves", 1, statistic.__name__, part, whole, *(tuple(map(identity, one.pictures)) for one in sets)
    features = [one.of_part[part] for one in sets]
    return Halves(**results.get(key, lambda: of_halves(statistic, features, whole)._asdict()))


def fid_differences(a: Features, b: Features, reference: Features, results: Results) -> list[dict]:
    """FID and patch-FID of two sets of the same prompts, and the interval of their difference.

    The halves are of the same prompts in both, and of the same references.
    """
    def difference(both: np.ndarray, originals: np.ndarray) -> float:
        x, y = np.split(both, 2, axis=1)
        return quick_frechet_of_sets(y, originals) - quick_frechet_of_sets(x, originals)

    if len(a.pictures) != len(b.pictures):
        raise ValueError("pictures that can't be read are in one set only; leave their partners out too")
    rows = []
    for name, part in PARTS.items():
        if all(part in one.statistics for one in (a, b, reference)):
            scores = [frechet(one.statistics[part], reference.statistics[part]) for one in (a, b)]
            both = Features({part: np.concatenate([a.of_part[part], b.of_part[part]], axis=1)},
                            a.pictures + b.pictures, {})
            gain = scores[1] - scores[0]
            half = halves_of(difference, [both, reference], part, gain, results)
            reach = half.reach if half else np.nan
            rows.append({"metric": name, "better": "lower", "a": scores[0], "b": scores[1], "b_minus_a": gain,
                         "low": gain - reach, "high": gain + reach})
    return rows


def clip_scores(captions: dict[Path, str], weights: Path, device: str, results: Results,
                notes: list[str]) -> list[float]:
    """CLIPScore of each picture with its caption, by ViT-B/16; `notes` gets how many captions are too long for it."""
    file, vocabulary = find_weights(weights, "ViT-B-16.pt"), weights / "tokenizer"
    clip = CLIP.load(file, vocabulary if vocabulary.is_dir() else None, device)

    def measure(caption: str, pixels: np.ndarray) -> dict:
        with warnings.catch_warnings(record=True, action="always") as caught:
            score = float(clip.score(as_images(pixels[None]), [caption])[0])
        return {"score": score, "cut": any("was cut" in str(warning.message) for warning in caught)}

    place = vocabulary if vocabulary.is_dir() else file.parent
    words = [identity(place / name) for name in ("vocab.json", "merges.txt", "tokenizer.json")
             if (place / name).exists()]

    rows = [results.of_picture(("clip", 3, identity(file), words, caption), path, partial(measure, caption))
            for path, caption in tqdm(captions.items(), desc="CLIPScore", file=sys.stderr)]
    if cut := sum(row["cut"] for row in rows):
        notes.append(f"note: clip_score: {cut} of {len(rows)} captions are longer than CLIP reads; their ends are lost")
    return [row["score"] for row in rows]


def aesthetics_scores(paths: Sequence[Path], weights: Path, device: str, results: Results) -> list[float]:
    """Aesthetics of each picture, by ViT-L/14 and the linear head."""
    files = [find_weights(weights, name) for name in ("ViT-L-14.pt", "sac+logos+ava1-l14-linearMSE.pth")]
    tower, head = CLIPImage.load(files[0], device), Aesthetics.load(files[1], device)

    def measure(pixels: np.ndarray) -> dict:
        return {"score": float(head(tower.embed(as_images(pixels[None]), "openai"))[0])}
    key = ("aesthetics", 1, *map(identity, files))
    pictures = tqdm(paths, desc="Aesthetics", file=sys.stderr)
    return [results.of_picture(key, path, measure)["score"] for path in pictures]


def picture_scores(paths: Sequence[Path], captions: dict[Path, str], weights: Path, device: str, results: Results,
                   notes: list[str], left_out: Callable) -> dict[str, list[float]]:
    """clip_score, if there are captions, and aesthetics of each picture, without those whose weights are missing."""
    captions = {path: captions[path] for path in paths} if captions else {}
    clip = captions and left_out("CLIPScore", compute=lambda: clip_scores(captions, weights, device, results, notes))
    aesthetics = left_out("Aesthetics", compute=lambda: aesthetics_scores(paths, weights, device, results))
    return {name: scores for name, scores in (("clip_score", clip), ("aesthetics", aesthetics)) if scores}


def side_step(vae: VAE, factor: int) -> int:
    """Sides that the autoencoder takes are multiples of it, pixels."""
    return 2 ** (len(vae.config.encoder_widths) - 1) * (factor // 8)


@torch.inference_mode()
def round_trip(vae: VAE, pixels: np.ndarray, factor: int, res: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture, its centre cut to sides the autoencoder takes, and its reconstruction, without tiles.

    res  a square to resize and crop to first, pixels; 0 for none
    """
    pixels, step = square(pixels, res) if res else pixels, side_step(vae, factor)
    height, width = (side // step * step for side in pixels.shape[:2])
    if not height * width:
        raise ValueError(f"{pixels.shape[1]}x{pixels.shape[0]} pixels: the autoencoder needs sides of {step} or more")
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    pixels = np.ascontiguousarray(pixels[top : top + height, left : left + width])
    latent = vae.encode(to_image(pixels)[None].to(next(vae.parameters()).device), factor)
    return pixels, to_pixels(vae.decode(latent, factor)[0])
