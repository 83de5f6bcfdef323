"""What a training step sees: which pictures, which crop, caption, noise and sigma; read one step ahead.

Paper     Diffusion-4K section 9 "Training Details": short side resized, random crop, values in [-1, 1]
Order     every epoch shuffles the pictures of each size, cuts them into batches and shuffles these
Sample k  of step s has its own generator for caption, crop, noise, sigma, guidance (of a range) and posterior, in this
          order: every split of the batch over ranks and --accumulate draws the same numbers
Shapes    B samples of one backward pass on one rank, H and W pixels, h and w latent sides
Check     python -m pytest tests/test_batches.py
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event

import numpy as np
import torch
from torch import Tensor

from flow import sample_sigma
from training.cache import Embeddings, Latents
from training.ranks import rank, together, world
from training.seeds import SAMPLES, seed_of
from training.settings import Settings

THREADS_PER_READER = 4


@dataclass(frozen=True)
class Part:
    """The samples of one backward pass on this rank."""

    pictures: list[int]                  # indices into the folder's items
    captions: list[str]
    images: list[Tensor] | None          # (H, W, 3) uint8 each; None where the moments come from the latent cache
    moments: list[tuple[Tensor, Tensor]] | None  # mean and logvar, (1, 16, h, w) each, from that cache
    context: Tensor                      # (B, L, C) and
    pooled: Tensor                       # (B, P), of the captions
    size: tuple[int, int]                # H, W
    noise: Tensor                        # (B, 16, h, w)
    sigma: Tensor                        # (B,)
    guidance: Tensor | None              # (B,), for Flux-dev
    generators: list[torch.Generator]    # of each sample, for the draw from the posterior


def random_crop(pixels: np.ndarray, height: int, width: int, generator: torch.Generator, flip: bool = True) -> Tensor:
    """(H, W, 3) uint8 -> (height, width, 3) uint8: a random place, mirrored with probability 1/2 if `flip`."""
    places = pixels.shape[0] - height + 1, pixels.shape[1] - width + 1, 2
    top, left, mirror = (int(torch.randint(n, (1,), generator=generator)) for n in places)
    crop = pixels[top:top + height, left:left + width]
    return torch.from_numpy(np.ascontiguousarray(crop[:, ::-1] if flip and mirror else crop))


def draw_caption(captions: Sequence[str], generator: torch.Generator, drop_caption: float) -> str:
    """One of a picture's captions, or with probability `drop_caption` the empty one, which cfg needs."""
    caption = captions[int(torch.randint(len(captions), (1,), generator=generator))]
    empty, _ = torch.rand(2, generator=generator).tolist()  # unused, the second keeps the draws of a seed
    return "" if empty < drop_caption else caption


def draw_guidance(guidance: float | tuple[float, float] | None, generator: torch.Generator) -> float | None:
    """A number of the range, evenly; any other setting as it is."""
    if not isinstance(guidance, tuple):
        return guidance
    low, high = guidance
    return low + (high - low) * torch.rand(1, generator=generator).item()


def batch_of_step(sizes: Sequence[object], batch: int, seed: int, step: int) -> list[int]:
    """Which pictures a training step sees, a function of its arguments alone.

    sizes    of every picture; all of a batch are equal. Where `batch` does not divide the number of pictures of a size,
             the last batch of that size repeats its first pictures
    batch    pictures per step, over all ranks
    returns  `batch` indices; epoch = step // (batches per epoch), in which every picture comes at least once
    """
    members: dict[object, list[int]] = {}
    for index, size in enumerate(sizes):
        members.setdefault(size, []).append(index)
    count = sum(-(-len(each) // batch) for each in members.values())
    generator = torch.Generator().manual_seed(seed_of(seed, step // count))
    batches = []
    for each in members.values():
        shuffled = [each[k] for k in torch.randperm(len(each), generator=generator).tolist()]
        for start in range(0, len(each), batch):
            batches.append([shuffled[k % len(each)] for k in range(start, start + batch)])
    return batches[int(torch.randperm(count, generator=generator)[step % count])]


def uneven(sizes: Sequence[tuple[int, int]], batch: int) -> str:
    """A line about sizes whose pictures are drawn at least twice as often as others; "" if there are none.

    A batch has one size and is always full, so that few pictures of a size repeat: n of them come
    batch * ceil(n / batch) / n times per epoch.
    """
    counts = Counter(sizes)
    times = {size: batch * -(-n // batch) / n for size, n in counts.items()}
    often = sorted((size for size in counts if times[size] >= 2 * min(times.values())), key=times.get, reverse=True)
    shown = ", ".join(f"{counts[height, width]} of {width}x{height} px {times[height, width]:.3g} times"
                      for height, width in often[:4])
    return (f"--batch {batch} repeats pictures of {len(often)} rare sizes; each is drawn per epoch: {shown}; others "
            f"{min(times.values()):.3g} times; a smaller --batch evens it out") if often else ""


def read_batch(step: int, settings: Settings, captions: Sequence[Sequence[str]], sizes: Sequence[tuple[int, int]],
               resized: Callable[[int, int, int], np.ndarray], channels: int, texts: Embeddings,
               latents: Latents | None) -> list[Part]:
    """This rank's share of a step, one Part per backward pass; pictures are read by a quarter of --threads readers.

    captions  of every picture
    sizes     (height, width) of every picture's crop
    resized   (index, height, width) -> uint8 pixels that cover the crop: data.Pictures.resized
    channels  of the latent
    latents   the cache of --cache-latents
    """
    chosen = batch_of_step(sizes, settings.batch, settings.seed, step)
    group, groups = rank() // settings.sequence, world() // settings.sequence  # of ranks that share samples
    share, parts = settings.batch // (groups * settings.accumulate), []
    height, width = sizes[chosen[0]]

    def sample(place: int) -> tuple[str, Tensor | tuple[Tensor, Tensor], Tensor, Tensor, float | None, torch.Generator]:
        generator = torch.Generator().manual_seed(seed_of(settings.seed, step * settings.batch + place, SAMPLES))
        caption = draw_caption(captions[chosen[place]], generator, settings.drop_caption)
        if latents:
            picture = latents.read(chosen[place], height, width)
        else:
            pixels = resized(chosen[place], height, width)
            picture = random_crop(pixels, height, width, generator, settings.flip)
        noise = torch.randn(channels, height // settings.factor, width // settings.factor, generator=generator)
        sigma = sample_sigma(1, settings.density, settings.time_shift, generator=generator, beta=settings.beta,
                             within=settings.sigma_range)
        return caption, picture, noise, sigma, draw_guidance(settings.guidance, generator), generator

    with ThreadPoolExecutor(max(1, settings.threads // THREADS_PER_READER)) as readers:
        for k in range(settings.accumulate):
            first = (k * groups + group) * share
            samples = readers.map(sample, range(first, first + share))
            drawn, pictures, noises, sigmas, guidances, generators = zip(*samples, strict=True)
            images, moments = (None, list(pictures)) if latents else (list(pictures), None)
            guidance = None if settings.guidance is None else torch.tensor(guidances)
            parts.append(Part(chosen[first:first + share], list(drawn), images, moments, *texts.read(drawn),
                              (height, width), torch.stack(noises), torch.cat(sigmas), guidance, list(generators)))
    return parts


def batches(read: Callable[[int], list[Part]], start: int, steps: int, stop: Event,
            on_error: Callable[[int], None]) -> Iterator[tuple[int, list[Part]]]:
    """Yield (step, parts) from `start` up to `steps`, reading one step ahead in a thread.

    stop      set on any rank, it ends the batches
    on_error  saves the run: called with the number of complete steps before an unreadable file ends it
    """
    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(read, start)
        for step in range(start, steps):
            try:
                parts, stopped = together(coming.result, stop.is_set())
            except (ValueError, OSError):
                on_error(step)
                raise
            if stopped:
                return
            coming = ahead.submit(read, min(step + 1, steps - 1))
            yield step, parts
