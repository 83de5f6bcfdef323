"""Pictures larger than their model was trained with: drawn at the trained size, then enlarged and redrawn in doublings.

Source    two-stage drawing as in CLEAR, I-Max and HiFlow; the paper draws at once, which is one stage here
Stage     z = (1 - start)·encode(enlarged picture) + start·noise, then the levels of the schedule below `start`
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


def sizes_of(size: tuple[int, int], first: int | None, step: int) -> list[tuple[int, int]]:
    """(width, height) of each stage, from about first x first pixels to `size`, at most doubled; multiples of step.

    first  None draws at once
    """
    ratio = math.sqrt(math.prod(size)) / first if first else 1.0
    count = math.ceil(math.log2(ratio) - 1e-9) if ratio > 1 else 0  # of enlargements
    scales = [ratio ** (k / count - 1) for k in range(count)]
    return [tuple(max(step, round(side * scale / step) * step) for side in size) for scale in scales] + [size]


def stages_of(size: tuple[int, int], first: int | None, start: float, step: int,
              schedule: Callable[[int], Tensor]) -> list[Stage]:
    """The stages of a picture; schedule: image tokens -> noise levels from 1 to 0."""
    stages = []
    for width, height in sizes_of(size, first, step):
        sigmas = schedule(width * height // step**2)
        if stages:
            sigmas = torch.cat((sigmas.new_tensor([start]), sigmas[sigmas < start]))
        stages.append(Stage(width, height, sigmas))
    return stages


def enlarged(image: Tensor, stage: Stage) -> Tensor:
    """An image (1, 3, H, W) in [-1, 1] at the size of a stage."""
    return F.interpolate(image, (stage.height, stage.width), mode="bicubic", align_corners=False).clamp(-1, 1)
