"""What the tests of scores/ share: the pictures of tests/data, random pictures, random weights, damaged weights."""

import json
import zlib
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from golden import DATA
from PIL import Image

from checkpoint import LazyTensor, Weights

GOLDEN = json.loads((DATA / "metrics.json").read_text())
PARITY = 1e-4                           # relative to the largest value; 1e-6 is measured
SIZES = ((2048, 1536), (333, 517))      # width and height


def golden_picture(name: str) -> np.ndarray:
    return np.asarray(Image.open(DATA / "pictures" / f"{name.removesuffix('.png')}.png").convert("RGB"))


def random_picture(seed: int, most: int = 400) -> np.ndarray:
    """(H, W, 3) uint8, any shape: noise, constant, saturated, checkerboard, noisy waves, black or white, or waves."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, (most if seed % 2 else 40) + 1, 2)
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    down, across = np.indices((height, width))
    waves = np.stack([127 + 120 * np.sin(down / 7 + k) * np.cos(across / (5 + k)) for k in range(3)], axis=-1)
    kinds = [noise, np.broadcast_to(noise[0, 0], noise.shape), (noise > 127) * 255,
             np.repeat((down + across)[..., None] % 2 * 255, 3, 2),
             np.clip(waves + rng.normal(0, 3, noise.shape), 0, 255),
             np.broadcast_to(rng.choice([0, 255], 3), noise.shape), waves]
    return kinds[seed % 7].astype(np.uint8)


def apart(ours, expected):
    """Largest difference, relative to the largest expected value."""
    assert ours.shape == expected.shape and ours.dtype == expected.dtype == torch.float32
    return ((ours - expected).abs().max() / expected.abs().max()).item()


def uniform(name, shape, low=-1.0, high=1.0):
    """Random values that are a function of the name alone."""
    drawn = np.random.RandomState(zlib.crc32(name.encode())).uniform(low, high, shape)
    return torch.from_numpy(np.asarray(drawn, dtype=np.float32))


def picture(width, height, seed=0):
    """uint8 (3, height, width): patches of colour, edges off the grid of any resampling, noise."""
    draw = np.random.RandomState(seed)
    patches = draw.randint(0, 200, (3, height // 37 + 1, width // 53 + 1)).repeat(37, 1).repeat(53, 2)
    return torch.from_numpy((patches[:, :height, :width] + draw.randint(0, 56, (3, height, width))).astype(np.uint8))


def random_state(shapes):
    """A state dict whose activations stay in range however deep the stack."""
    state = {}
    for name, shape in shapes.items():
        fan_in = max(1, int(np.prod(shape[1:])))
        norm = ".bn." in name or "norm" in name or ".ln_" in name or name.startswith("ln_")
        if name.endswith("running_var") or (norm and name.endswith("weight")):
            state[name] = uniform(name, shape, 0.5, 1.5)
        elif norm or name.endswith("bias"):
            state[name] = uniform(name, shape, -0.1, 0.1)
        else:
            state[name] = uniform(name, shape) * (6 / fan_in) ** 0.5
    return state


def lazy(shapes, source="a file"):
    """Weights that cost no memory: every tensor is one expanded zero."""
    tensors = {name: LazyTensor(tuple(shape), lambda shape=shape: torch.zeros(()).expand(shape))
               for name, shape in shapes.items()}
    return Weights(tensors, {}, source)


def refuses(load: Callable, module: ModuleType, shapes: dict, victim: str, monkeypatch) -> None:
    """`load`, a function of `module`, names `victim` when it is missing, misshapen, or has an unknown neighbour."""
    for damage in ("missing", "misshapen", "unknown"):
        wrong = dict(shapes)
        shape = wrong.pop(victim)
        name = victim
        if damage == "misshapen":
            wrong[victim] = (shape[0] + 7, *shape[1:])
        elif damage == "unknown":
            wrong[victim], name = shape, "some.other.weight"
            wrong[name] = (3, 3)
        monkeypatch.setattr(module, "open_official", lambda path, wrong=wrong: lazy(wrong))
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            load()
