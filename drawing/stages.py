"""Pictures larger than their model was trained with: drawn at the trained size, then enlarged and redrawn in doublings.

Source    two-stage drawing as in CLEAR, I-Max and HiFlow; the paper draws at once, which is one stage here
Stage     z = (1 - s)·encode(resized picture) + s·noise, then the levels of the schedule below s. s is `start` in the
          first redrawing, start² in the second, …: each adds smaller details to a picture that holds more
From      a given picture takes the place of the first stage
Limits    start 1 is drawing at once, start 0 the autoencoder's round trip of the enlarged picture
Check     python -m pytest tests/test_stages.py
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Stage:
    width: int      # pixels
    height: int
    sigmas: Tensor  # noise levels, decreasing to 0; a single 0 draws nothing


def sizes_of(size: tuple[int, int], first: float | None, step: int) -> list[tuple[int, int]]:
    """(width, height) of each stage, from about first x first pixels to `size`, at most doubled; multiples of step.

    first  None draws at once
    """
    ratio = math.sqrt(math.prod(size)) / first if first else 1.0
    count = math.ceil(math.log2(ratio) - 1e-9) if ratio > 1 else 0  # of enlargements
    scales = [ratio ** (k / count - 1) for k in range(count)]
    return [tuple(max(step, round(side * scale / step) * step) for side in size) for scale in scales] + [size]


def stages_of(size: tuple[int, int], first: float | None, start: float, step: int, schedule: Callable[[int], Tensor],
              given: bool = False) -> list[Stage]:
    """The stages of a picture.

    schedule  image tokens -> noise levels from 1 to 0
    given     the picture of the first stage is there already: all stages redraw, at least one
    """
    stages, sizes = [], sizes_of(size, first, step)
    for width, height in (sizes[1:] or sizes) if given else sizes:
        sigmas = schedule(width * height // step**2)
        if redrawings := len(stages) + given:
            level = start**redrawings
            sigmas = torch.cat((sigmas.new_tensor([level]), sigmas[sigmas < level]))
        stages.append(Stage(width, height, sigmas))
    return stages


def resized(image: Tensor, stage: Stage) -> Tensor:
    """An image (1, 3, H, W) in [-1, 1] at the size of a stage."""
    shrinks = image.shape[2] > stage.height
    resized = F.interpolate(image, (stage.height, stage.width), mode="bicubic", align_corners=False, antialias=shrinks)
    return resized.clamp(-1, 1)
