"""What tests share: the pictures of tests/data, random pictures, colour profiles, random weights, damaged weights."""

import json
import struct
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


# ---- colour profiles: ICC.1 version 2, by arithmetic

D50, D65 = (0.9642, 1.0, 0.8249), (0.3127, 0.329)
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
SRGB_PRIMARIES = (0.64, 0.33), (0.3, 0.6), (0.15, 0.06)
ADOBE_PRIMARIES = (0.64, 0.33), (0.21, 0.71), (0.15, 0.06)
PROPHOTO_PRIMARIES = (0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001)
P3_PRIMARIES = (0.68, 0.32), (0.265, 0.69), (0.15, 0.06)


def _fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def curve(gamma: float | None) -> bytes:
    """Of a profile: value ** gamma, or with None the curve of sRGB."""
    if gamma:
        return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    return b"para\0\0\0\0\0\3\0\0" + _fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)


def profile(space: bytes, name: str, **tags: bytes) -> bytes:
    text = name.encode() + b"\0"
    tags = {"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78), "cprt": b"text\0\0\0\0-\0",
            "wtpt": b"XYZ \0\0\0\0" + _fixed(*D50)} | tags
    start, table, content = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for key, value in tags.items():
        table += key.encode() + struct.pack(">II", start + len(content), len(value))
        content += value + bytes(-len(value) % 4)
    head = struct.pack(">I", start + len(content)) + b"none\2\x40\0\0mntr" + space + b"XYZ " + bytes(12) + b"acsp"
    return (head + bytes(28) + _fixed(*D50)).ljust(128, b"\0") + table + content


def gray_profile(gamma: float | None) -> bytes:
    return profile(b"GRAY", "gray", kTRC=curve(gamma))


def rgb_profile(primaries, gamma: float | None, white=D65, name: str = "a profile") -> bytes:
    """primaries: x, y of red, green, blue; their XYZ are adapted to D50 as Bradford does."""
    xyz = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    light = np.array([white[0] / white[1], 1, (1 - sum(white)) / white[1]])
    adapt = np.linalg.inv(BRADFORD) @ np.diag(BRADFORD @ D50 / (BRADFORD @ light)) @ BRADFORD
    columns = adapt @ (xyz * np.linalg.solve(xyz, light))
    tags = {f"{c}XYZ": b"XYZ \0\0\0\0" + _fixed(*columns[:, k]) for k, c in enumerate("rgb")}
    return profile(b"RGB ", name, **tags, **{f"{c}TRC": curve(gamma) for c in "rgb"})


def cmyk_profile() -> bytes:
    """Of a printer whose full inks darken and tint less than Pillow assumes: a table of two values of each ink."""
    inks = np.stack(np.meshgrid(*[[0, 1]] * 4, indexing="ij"), axis=-1).reshape(-1, 4)
    lab = np.array([250, 128, 128]) - inks @ np.array([[80, 60, 70], [75, -80, 10], [20, 10, -100], [140, 0, 0]])
    ramp = bytes(range(256))
    table = (b"mft1\0\0\0\0\4\3\2\0" + _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + ramp * 4
             + lab.clip(0, 255).astype(np.uint8).tobytes() + ramp * 3)
    return profile(b"CMYK", "ink", A2B0=table).replace(b"mntrCMYKXYZ ", b"prtrCMYKLab ")


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
