"""LoRA adapters, merged into the weights of a transformer while these are read.

Paper     LoRA (2106.09685): W + strength·(alpha / r)·B A, with B (out, r) and A (r, in)
Names     kohya: lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight, .lora_up.weight, .alpha; LyCORIS: lycoris_…
          BFL:   double_blocks.0.img_attn.qkv.lora_A.weight, .lora_B.weight
          PEFT:  transformer.transformer_blocks.0.attn.to_q.lora_A.weight, as diffusers writes; ComfyUI reads it too
Alpha     a tensor beside the layer; else "lora_adapter_metadata" of diffusers, or adapter_config.json of PEFT; else r.
          What kohya's metadata repeat of it is not read: converted files keep it, their tensors are scaled already
Rounding  W is merged as it is computed with: of an update of 0.3 % of W, bf16 keeps 93 %, of 0.1 % half; fp32 keeps all
Training  training/adapter.py
Check     python -m pytest tests/test_lora.py
"""

import math
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from checkpoint import LazyTensor, Weights, open_weights
from family import fingerprint, published_name
from files import SOFTWARE, entry, need, parse_json, read_json
from names import FLUX_NAMES, SD3_NAMES, VARIANTS, plain_rows, recognised

PREFIX = "model.diffusion_model."
NAME = re.compile(r"(?:base_model\.model\.|(?:model\.)?diffusion_model\.|transformer\.|unet\.|lora_unet_|"
                  r"lora_transformer_|lycoris_)*"
                  r"(?P<layer>.+?)\.(?P<part>lora_A|lora_B|lora[._](?:down|up)|alpha)(?:\.default)?(?:\.weight)?")
PARTS = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up", "alpha": "alpha"}
UNREAD = ("use_dora", "use_rslora", "fan_in_fan_out", "lora_bias", "modules_to_save")  # of PEFT's configuration
BASE_CHANGED = re.compile("pissa|olora|loftq|corda", re.IGNORECASE)  # ways to begin that subtract from the model
RECORDED = ("res", "factor", "t5_length", "positions", "trained_side")  # of our own files, instead of the transformer's


# ---- where an adapter's layers are in the official weights

class Place(NamedTuple):
    """Rows of an official weight: those of one layer, in its official form or in that of diffusers."""

    layer: str
    first: int
    last: int
    how: str = ""  # see names.Row


def places(weights: Weights) -> dict[str, Place]:
    """Name of a layer, officially and in diffusers -> its place in official weights."""
    shapes = {name.removesuffix(".weight"): t.shape for name, t in weights.items()
              if name.endswith(".weight") and len(t.shape) > 1}
    found = {layer: Place(layer, 0, shape[0]) for layer, shape in shapes.items()}
    for row in plain_rows((*SD3_NAMES, *FLUX_NAMES), weights):
        rows, columns = shapes.get(row.official, (0, 0))[:2]
        for k, part in enumerate(row.parts if rows else ()):  # q, k, v are square, the MLP takes the remaining rows
            last = rows if part is row.parts[-1] else (k + 1) * columns
            found.setdefault(part, Place(row.official, k * columns, last, row.how))
    return found


# ---- reading

@dataclass(frozen=True)
class Update:
    """What one adapter adds to one place: scale·B A."""

    place: Place
    up: LazyTensor    # B
    down: LazyTensor  # A
    scale: float
    source: str       # the file, for messages

    def rows(self, first: int, last: int) -> Tensor:
        """Rows [first, last) of the weight, within the place, in fp32."""
        up, down = (part.read().float().flatten(1) for part in (self.up, self.down))
        if self.place.how == "swap_halves":
            up = up.roll(len(up) // 2, 0)
        added = self.scale * (up[first - self.place.first:last - self.place.first] @ down)
        if not added.isfinite().all():
            raise ValueError(f"{self.source}: what it adds to {self.place.layer} at a scale of {self.scale:g} holds "
                             "NaN or Inf: its strength is too large")
        return added


def with_lora(weights: Weights, given: Sequence[str]) -> Weights:
    """Official weights of a transformer to which adapters are added, in fp32, whenever a tensor is read.

    given   FILE or FILE:STRENGTH each; several are added
    raises  ValueError in one line if a tensor of a file has no place, no partner or another shape
    """
    part, added, records = weights.part(PREFIX), defaultdict(list), {}
    prefix = "" if part is weights else PREFIX
    for file, strength in map(file_and_strength, given):
        adapter = open_weights(file)
        for update in updates_of(adapter, strength, part):
            added[f"{update.place.layer}.weight"].append(update)
        if adapter.metadata.get("software") == SOFTWARE:
            records |= {name: adapter.metadata[name] for name in RECORDED if name in adapter.metadata}
            trained, base = adapter.metadata.get("base", ""), base_of(weights)
            if trained and trained.split()[-1] != base.split()[-1]:
                warnings.warn(f"{file}: was trained on {trained}, and is added to {base}", stacklevel=2)
    merged = {prefix + name: _merged(part[name], updates) for name, updates in added.items()}
    return Weights(weights | merged, weights.metadata | records, weights.source)


def base_of(weights: Weights) -> str:
    """What our files record of the transformer they were trained on: its name and fingerprint."""
    return f"{published_name(weights.source)} {fingerprint(weights.source)}"


def file_and_strength(given: str) -> tuple[str, float]:
    """The two parts of a --lora FILE[:STRENGTH]; ValueError if the strength is not finite."""
    file, colon, number = given.rpartition(":")
    if not colon or os.path.exists(given):
        return given, 1.0
    try:
        strength = float(number)
    except ValueError:  # the colon is part of a path
        need(not os.path.isfile(file), "lora", given, "FILE:STRENGTH with a number such as 0.8")
        return given, 1.0
    need(math.isfinite(strength), "lora", given, "FILE:STRENGTH with a finite number")
    return file, strength


def updates_of(adapter: Weights, strength: float, weights: Weights) -> list[Update]:
    """What an adapter adds to official weights; ValueError that names the first tensors which do not fit."""
    if what := recognised(adapter, VARIANTS):
        raise ValueError(f"{adapter.source}: {what}")
    where = {name.replace(".", "_"): place for name, place in places(weights).items()}  # kohya has no other letters
    layers, names, unknown = defaultdict(dict), {}, []
    for name, tensor in adapter.items():
        match = NAME.fullmatch(name)
        if not match or not (place := where.get(match["layer"].replace(".", "_"))):
            unknown.append(name)
            continue
        part = PARTS[match["part"].replace(".", "_")]
        if part in layers[place]:
            raise ValueError(f"{adapter.source}: {name} is there under two names")
        layers[place][part], names[place] = tensor, match["layer"]
    if not adapter:
        raise ValueError(f"{adapter.source}: holds no tensors: download it again")
    if unknown:
        raise ValueError(f"{adapter.source}: {len(unknown)} of {len(adapter)} tensors belong to no LoRA of "
                         f"{weights.source}: {', '.join(unknown[:3])}; give an adapter that was trained on this model")
    config = _config(adapter)
    updates = [_update(adapter.source, place, names[place], parts, config, strength, weights)
               for place, parts in layers.items()]
    if strength and not any(update.scale and update.up.read().any() and update.down.read().any() for update in updates):
        warnings.warn(f"{adapter.source}: adds nothing: in each layer, lora_A, lora_B or alpha is 0", stacklevel=3)
    return updates


def _update(source: str, place: Place, name: str, parts: dict[str, LazyTensor], config: dict, strength: float,
            weights: Weights) -> Update:
    if missing := [part for part in ("lora_A", "lora_B") if PARTS[part] not in parts]:
        raise ValueError(f"{source}: {name} lacks {' and '.join(missing)} (lora_down, lora_up): the file is not "
                         "complete, download it again")
    up, down, shape = parts["up"], parts["down"], weights[f"{place.layer}.weight"].shape
    rank = down.shape[0] if down.shape else 0
    if (up.shape[:1], math.prod(up.shape[1:]), math.prod(down.shape[1:])) != (
            (place.last - place.first,), rank, math.prod(shape[1:])) or not rank:
        raise ValueError(f"{source}: {name} has lora_A {down.shape} and lora_B {up.shape}, but {weights.source} has "
                         f"{(place.last - place.first, *shape[1:])} there; give an adapter of this model")
    patterns = entry({"alpha_pattern": {}} | config, "alpha_pattern", dict, source)
    if odd := next((key for key in patterns if not re.fullmatch(r"\^?[\w.]+", key)), ""):
        raise ValueError(f"{source}: alpha_pattern has {odd!r}, and only names of layers are read; give a plain LoRA")
    alpha = next((entry(patterns, key, float, source) for key in patterns
                  if f".{name}".endswith(f".{key.removeprefix('^')}")), None)
    if "alpha" in parts:
        alpha = float(parts["alpha"].read()) if math.prod(parts["alpha"].shape) == 1 else math.nan
    elif alpha is None:
        alpha = entry({"lora_alpha": rank} | config, "lora_alpha", float, source)
    if not math.isfinite(alpha):
        raise ValueError(f"{source}: alpha of {name} is no finite number: download it again")
    if not all(part.read().float().isfinite().all() for part in (up, down)):  # small: before the text encoders are read
        raise ValueError(f"{source}: lora_A or lora_B of {name} holds NaN or Inf: the file is damaged, or its training "
                         "diverged")
    return Update(place, up, down, strength * alpha / rank, source)


def _config(adapter: Weights) -> dict:
    """PEFT's configuration of an adapter, if there is one: inside the file, or beside it."""
    file = Path(adapter.source)
    beside = (file if file.is_dir() else file.parent) / "adapter_config.json"
    if text := adapter.metadata.get("lora_adapter_metadata"):
        where = f"{file}: lora_adapter_metadata"
        config = entry({"all": parse_json(text, where)}, "all", dict, where)
        config = {key.removeprefix("transformer."): value for key, value in config.items()}
    elif beside.is_file() and (file.is_dir() or file.name == "adapter_model.safetensors"):
        config = read_json(beside)
    else:
        config = {}
    began = str(config.get("init_lora_weights"))
    if other := next((key for key in UNREAD if config.get(key)), began if BASE_CHANGED.match(began) else ""):
        raise ValueError(f"{file}: was trained with {other}, which is not read; give a plain LoRA")
    return config


def _merged(base: LazyTensor, updates: list[Update]) -> LazyTensor:
    def cut(first: int, last: int) -> Tensor:
        total = base.rows(first, last).to(torch.float32, copy=True)
        for update in updates:
            low, high = max(first, update.place.first), min(last, update.place.last)
            if low < high:
                rows = total[low - first:high - first]
                rows += update.rows(low, high).view_as(rows)
        return total

    return LazyTensor(base.shape, partial(cut, 0, base.shape[0]), cut)
