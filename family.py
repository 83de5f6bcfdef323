"""What differs between SD3 and Flux: classes and defaults. Nothing else in the code branches on the family.

Source    sd3-ref and flux `sampling.py`, `util.py` for sampling; the released trainers of Diffusion-4K for training
Decided   by the names of the tensors in a file, never by the name of a file, folder or --model
Defaults  the three families below; the metadata of a file override them, and the command line overrides both
Check     python -m pytest tests/test_family.py
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

import flux
import mmdit
from checkpoint import Weights, locate, open_weights
from flow import even_sigmas, sd3_sigmas
from flux import Flux, FluxConfig
from mmdit import MMDiT, MMDiTConfig
from text import FluxText, SD3Text

SAMPLING = ("steps", "cfg", "guidance", "time_shift", "res")  # what a transformer's metadata may record


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn; Family describes the numbers."""

    steps: int
    cfg: float
    guidance: float | None
    time_shift: float | None
    res: str  # pixels: side, or WIDTHxHEIGHT


@dataclass(frozen=True)
class Family:
    name: str
    model: type[MMDiT] | type[Flux]
    config: Callable[[Weights], MMDiTConfig | FluxConfig]  # reads the sizes from the file
    text: type[SD3Text] | type[FluxText]
    sigmas: Callable[[int, float], Tensor]  # steps, time shift -> schedule
    file: str                               # what train.py writes, under official tensor names
    vae_inside: bool                        # that file holds the VAE, and prefixes tell the two
    steps: int
    cfg: float
    guidance: float | None                  # None: the model has no such input
    time_shift: float | None                # None: by the number of tokens, flow.flux_mu
    density: str                            # of sigma in training
    training_shift: float
    release_drops_latent_shift: bool        # the released trainer: latents are raw * scale, not (raw - shift) * scale
    clip_tokens: int                        # of the context, before those of T5
    t5_tokens: int
    t5_length: int | None = None            # None: from the metadata of the T5 file, else t5_tokens
    without_guidance: str = ""              # what there is instead of a guidance input
    res: int = 1024

    def sampling(self, transformer: Weights, steps: int | None = None, cfg: float | None = None,
                 guidance: float | None = None, time_shift: float | None = None, res: str | None = None) -> Sampling:
        """The arguments; None: from the transformer's metadata (ValueError if no number), else the family's default."""
        def number(name: str, value: float | None) -> float | None:
            try:
                return transformer.number(name, otherwise=getattr(self, name)) if value is None else value
            except ValueError as error:
                raise ValueError(f"{error}; give --{name.replace('_', '-')}") from None

        res = transformer.metadata.get("res", str(self.res)) if res is None else res
        return Sampling(int(number("steps", steps)), number("cfg", cfg), number("guidance", guidance),
                        number("time_shift", time_shift), res)

    def check_guidance(self, guidance: float | None) -> None:
        """ValueError if --guidance is given to a model that has no such input."""
        if guidance is not None and self.guidance is None:
            no_input = f"this is {self.name}, which has no guidance input; {self.without_guidance}"
            raise ValueError(f"--guidance {guidance:g}: {no_input}")

    def text_tokens(self, t5_length: int | None) -> int:
        """Length of the context for a T5 length; None: as published."""
        return self.clip_tokens + (t5_length or self.t5_length or self.t5_tokens)

    def records(self, transformer: Weights) -> dict[str, str]:
        """Metadata that a written transformer needs beside its shapes."""
        if self.model is not Flux:
            return {}
        return {"axes_dim": ", ".join(map(str, self.config(transformer.part("model.diffusion_model.")).axes_dim))}


SD3 = Family(
    "SD3", MMDiT, mmdit.read_config, SD3Text, sd3_sigmas, "sd3.safetensors", vae_inside=True, steps=28, cfg=7.0,
    guidance=None, time_shift=3.0, density="logit_normal", training_shift=3.0, release_drops_latent_shift=True,
    clip_tokens=77, t5_tokens=77, without_guidance="SD3 is guided by a second pass, --cfg")
FLUX_DEV = Family(
    "Flux-dev", Flux, flux.read_config, FluxText, even_sigmas, "flux.safetensors", vae_inside=False, steps=50, cfg=1.0,
    guidance=3.5, time_shift=None, density="uniform", training_shift=1.0, release_drops_latent_shift=False,
    clip_tokens=0, t5_tokens=512)
FLUX_SCHNELL = replace(FLUX_DEV, name="Flux-schnell", steps=4, guidance=None, time_shift=1.0, t5_length=256,
                       without_guidance="Flux-schnell draws without")


def check_widths(config: MMDiTConfig | FluxConfig, context: Tensor, pooled: Tensor, latent_channels: int) -> None:
    """ValueError if text encoders (context, pooled of any prompt) or VAE are not of the transformer's widths."""
    for part, width, expected in (("text encoders give a context", context.shape[-1], config.context_dim),
                                  ("text encoders give a pooled vector", pooled.shape[-1], config.pooled_dim),
                                  ("VAE has latents", latent_channels, config.in_channels)):
        if width != expected:
            raise ValueError(f"the folder's {part} of width {width}, but the transformer takes {expected}: they do not "
                             "match; give --weights the folder that the transformer was trained from")


def family_of(weights: Weights) -> Family:
    """The family of a transformer, by the names of its tensors; ValueError that lists what the file holds instead."""
    names = weights.part("model.diffusion_model.")
    if lora := next((name for name in names if re.search(r"lora(?:_|\d)|lokr_|hada_", name)), ""):
        raise ValueError(f"{weights.source}: a LoRA ({lora} ...), not a complete transformer; merge it into its model")
    if any(name.startswith("joint_blocks.") for name in names):
        return SD3
    if any(name.startswith(("double_blocks.", "single_blocks.")) for name in names):
        return FLUX_DEV if any(name.startswith("guidance_in.") for name in names) else FLUX_SCHNELL
    raise ValueError(f"{weights.source}: holds neither an SD3 nor a Flux transformer, but {len(names)} tensors: "
                     f"{', '.join(list(names)[:2])} ...")


def find(folder: str | os.PathLike, transformer: str | os.PathLike | None = None) -> tuple[Family, Weights, Path]:
    """Open, without reading, what a model folder holds: family, the transformer's weights, the path of the VAE.

    transformer  another one of the same family, to use with the folder's text encoders and VAE
    raises       ValueError if the transformer is of another family, or the folder's file contradicts its name
    """
    path, vae = locate(folder)
    own = family_of(weights := open_weights(path))
    if path.is_file() and path.name.startswith("flux") != (own.model is Flux):
        raise ValueError(f"{path}: is named like {'SD3' if own.model is Flux else 'Flux'} but holds {own.name} weights;"
                         " rename it, or put the right file there")
    if not transformer:
        return own, weights, vae
    family = family_of(weights := open_weights(transformer))
    if family.model is not own.model:
        raise ValueError(f"{transformer}: is a transformer of {family.name}, but {folder} is a folder of {own.name}, "
                         f"with other text encoders; give --weights a folder of {family.name}")
    return family, weights, vae
