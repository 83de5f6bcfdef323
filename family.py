"""What sampling and training must know of a transformer's family to treat SD3 and Flux alike: the one place that tells them apart.

Source    sd3-ref and flux `sampling.py`, `util.py` for sampling; the released trainers of Diffusion-4K for sigma in training
Told by   the names of the tensors in the file, never by the name of a file, folder or --model

                 sampling: steps  cfg  guidance  time shift                 training: sigma               text: tokens of T5
SD3, SD3.5                    28  7.0      none  3                          logit-normal, shifted by 3    77, after both CLIPs
Flux-dev                      50    1       3.5  exp(mu), by token count    uniform                       512
Flux-schnell                   4    1      none  1                          uniform                       256

A small model's file may say others in its metadata, and the command line wins over both.
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
from flux import Flux
from mmdit import MMDiT
from text import FluxText, SD3Text

SAMPLING = ("steps", "cfg", "guidance", "time_shift", "res")  # what a transformer's metadata may say of sampling


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn where the command line leaves it open."""

    steps: int
    cfg: float
    guidance: float | None    # None: the model has no such input
    time_shift: float | None  # None: by the number of tokens, flow.flux_mu
    res: str                  # pixels: side, or WIDTHxHEIGHT


@dataclass(frozen=True)
class Family:
    name: str
    model: type[MMDiT] | type[Flux]
    config: Callable[[Weights], mmdit.MMDiTConfig | flux.FluxConfig]  # reads the sizes from the file
    text: type[SD3Text] | type[FluxText]
    sigmas: Callable[[int, float], Tensor]  # steps, time shift -> schedule
    file: str                               # what train.py writes, under official tensor names
    steps: int
    cfg: float
    guidance: float | None                  # None: the model has no such input
    time_shift: float | None                # None: by the number of tokens, flow.flux_mu
    density: str                            # of sigma in training
    training_shift: float
    t5_length: int | None = None            # None: what the T5 file says, else 77 for SD3, 512 for Flux
    res: int = 1024

    def sampling(self, transformer: Weights) -> Sampling:
        """What the metadata of a transformer records, else the defaults of the family; ValueError that names the file."""
        steps, cfg, guidance, shift = (transformer.number(name, otherwise=getattr(self, name)) for name in SAMPLING[:4])
        return Sampling(int(steps), cfg, guidance, shift, transformer.metadata.get("res", str(self.res)))

    def check_guidance(self, guidance: float | None) -> None:
        """ValueError if --guidance is given to a model that has no such input."""
        if guidance is not None and self.guidance is None:
            use = "SD3 is guided by a second pass, --cfg" if self.model is MMDiT else "Flux-schnell draws without"
            raise ValueError(f"--guidance {guidance:g}: this is {self.name}, which has no guidance input; {use}")


SD3 = Family("SD3", MMDiT, mmdit.read_config, SD3Text, sd3_sigmas, "sd3.safetensors", steps=28, cfg=7.0, guidance=None, time_shift=3.0,
             density="logit_normal", training_shift=3.0)
FLUX_DEV = Family("Flux-dev", Flux, flux.read_config, FluxText, even_sigmas, "flux.safetensors", steps=50, cfg=1.0, guidance=3.5,
                  time_shift=None, density="uniform", training_shift=1.0)
FLUX_SCHNELL = replace(FLUX_DEV, name="Flux-schnell", steps=4, guidance=None, time_shift=1.0, t5_length=256)


def family_of(weights: Weights) -> Family:
    """The family of a transformer, by the names of its tensors.

    raises  ValueError that says what the file holds instead
    """
    names = weights.part("model.diffusion_model.")
    if lora := next((name for name in names if re.search(r"lora(?:_|\d)|lokr_|hada_", name)), ""):
        raise ValueError(f"{weights.source}: a LoRA ({lora} ...), not a whole transformer; merge it into its model first")
    if any(name.startswith("joint_blocks.") for name in names):
        return SD3
    if any(name.startswith(("double_blocks.", "single_blocks.")) for name in names):
        return FLUX_DEV if any(name.startswith("guidance_in.") for name in names) else FLUX_SCHNELL
    raise ValueError(f"{weights.source}: holds neither an SD3 nor a Flux transformer, but {len(names)} tensors: "
                     f"{', '.join(list(names)[:2])} ...")


def find(folder: str | os.PathLike, transformer: str | os.PathLike | None = None) -> tuple[Family, Weights, Path]:
    """Open, without reading, what a model folder holds.

    folder       as downloaded, see checkpoint.locate
    transformer  another one of the same family, to be used with the folder's text encoders and VAE
    returns      family, the transformer's weights, the path of the VAE
    raises       ValueError if the transformer is of another family than the folder's own, or that one than its file name says
    """
    path, vae = locate(folder)
    weights = own = open_weights(path)
    if path.is_file() and path.name.startswith("flux") != (family_of(own).model is Flux):
        raise ValueError(f"{path}: holds {family_of(own).name} weights, which its name denies; rename it, or put the right file there")
    if transformer:
        weights = open_weights(transformer)
        if family_of(weights).model is not family_of(own).model:
            raise ValueError(f"{transformer}: is a transformer of {family_of(weights).name}, and {folder} is a folder of "
                             f"{family_of(own).name}, with other text encoders; give --weights a folder of {family_of(weights).name}")
    return family_of(weights), weights, vae
