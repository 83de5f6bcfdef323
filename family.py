"""What differs between SD3 and Flux: classes and defaults. Nothing else in the code branches on the family.

Source    sd3-ref and flux `sampling.py`, `util.py` for sampling; the released trainers of Diffusion-4K for training
Decided   by the names of the tensors in a file. Turbo models and models without distillation have the tensors of
          another one: there, as in sd3-ref, the name of the file or folder decides, and sample.py says so
Defaults  the families below; scheduler_config.json overrides the time shift, the metadata of a file override both, the
          command line overrides all
Check     python -m pytest tests/test_family.py
"""

import hashlib
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

import flux
import mmdit
from checkpoint import OFFICIAL_PREFIXES, LazyTensor, Weights, locate, model_folder, open_weights
from files import entry, need, read_json
from flow import FLUX_MU, even_sigmas, flux_time_shift, sd3_sigmas
from flux import Flux, FluxConfig
from layers import STOCK, Positions, check_positions, reach
from mmdit import MMDiT, MMDiTConfig
from names import ADAPTERS, OTHERS, recognised
from text import T5_MOST, FluxText, SD3Text
from vae import FLUX_SCALE, FLUX_SHIFT, SD3_SCALE, SD3_SHIFT, VAEConfig, read_config

# what a transformer's metadata may record
SAMPLING = ("steps", "cfg", "guidance", "time_shift", "res", "factor", "t5_length")
RES = re.compile(r"([1-9]\d{0,4})(?:[xX]([1-9]\d{0,4}))?")  # pixels: side, or WIDTHxHEIGHT
RANGES = {  # what is accepted, in words too
    "steps": (lambda value: 1 <= value <= 10_000, "1 to 10,000"),
    "cfg": (lambda value: math.isfinite(value) and value, "a finite number but 0, which leaves the prompt out; 1 "
            "is no guidance, as 0 and 1 are in diffusers"),
    "guidance": (lambda value: 0 <= value <= 1000, "a number from 0 to 1,000"),
    "time_shift": (lambda value: 0 < value < math.inf, "a number above 0"),
    "factor": (lambda value: value in (8, 16), "8 or 16"),
    "t5_length": (lambda value: 1 <= value <= T5_MOST, f"1 to {T5_MOST} tokens")}
MOST_SIDE = 65_536  # pixels
VAE_16 = "vae_16.safetensors"
BLURRED = 0.9       # a schedule whose last noise level before 0 is above it draws a picture in one jump, blurred
SCHEDULER = Path("scheduler", "scheduler_config.json")     # in a diffusers folder
EULER = "FlowMatchEulerDiscreteScheduler"
UNREAD = ("invert_sigmas", "shift_terminal", "stochastic_sampling", "use_beta_sigmas", "use_exponential_sigmas",
          "use_karras_sigmas")  # of EULER: other schedules than those of SD3 and Flux


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn; Family describes the numbers."""

    steps: int
    cfg: float
    guidance: float | None
    time_shift: float | None
    res: str
    factor: int
    t5_length: int | None


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
    time_shift: float | None                # None: by_tokens
    density: str                            # of sigma in training
    training_shift: float
    latent_scale: tuple[float, float]       # scale and shift factor of a VAE whose files do not record them
    release_drops_latent_shift: bool        # the released trainer: latents are raw * scale, not (raw - shift) * scale
    clip_tokens: int                        # of the context, before those of T5
    t5_tokens: int
    t5_length: int | None = None            # None: from the metadata of the T5 file, else t5_tokens
    without_guidance: str = ""              # what there is instead of a guidance input
    same_tensors: str = ""                  # other models with the same tensors, and the flags that draw them
    by_tokens: Callable[[int], float] = flux_time_shift  # image tokens -> time shift
    scheduler: str = ""                     # the file that time_shift or by_tokens was read from
    res: int = 1024
    factor: int = 16

    def sampling(self, transformer: Weights, steps: int | None = None, cfg: float | None = None,
                 guidance: float | None = None, time_shift: float | None = None, res: str | None = None,
                 factor: int | None = None, t5_length: int | None = None) -> Sampling:
        """The arguments; None: from the transformer's metadata, else the family's default.

        ValueError that names the flag and, if it recorded the value, the file: no number, or none of RANGES
        """
        def number(name: str, value: float | None, integer: bool = False) -> float | None:
            flag, (fits, accepted) = name.replace("_", "-"), RANGES[name]
            by = f" (recorded by {transformer.source})" if value is None and name in transformer.metadata else ""
            try:
                value = transformer.number(name, otherwise=getattr(self, name), integer=integer) if by else value
            except ValueError as error:
                raise ValueError(f"{error}; give --{flag}") from None
            value = getattr(self, name) if value is None else value
            need(value is None or fits(value), flag, f"{value}{by}", accepted)
            return value

        if res is None and not RES.fullmatch(res := transformer.metadata.get("res", str(self.res))):
            raise ValueError(f"{transformer.source}: its metadata records res {res!r}, which are no pixels; give --res")
        guidance = None if self.guidance is None else number("guidance", guidance)  # recorded or not
        return Sampling(number("steps", steps, True), number("cfg", cfg), guidance,
                        number("time_shift", time_shift), res, number("factor", factor, True),
                        number("t5_length", t5_length, True))

    def trained_side(self, transformer: Weights) -> float:
        """Tokens per side, geometric mean, of the pictures that a transformer which records "res" was trained on.

        ValueError that names the file if res or factor cannot be
        """
        res, factor = transformer.metadata["res"], transformer.number("factor", otherwise=self.factor)
        if not RES.fullmatch(res) or factor not in (8, 16):
            raise ValueError(f"{transformer.source}: its metadata records res {res[:40]!r} and factor {factor:g}, no "
                             "size that it can be trained at; correct them")
        return math.sqrt(math.prod(size_of(res))) / (2 * factor)

    def check_guidance(self, guidance: float | tuple[float, float] | None) -> None:
        """ValueError if --guidance, a number or in training a range, is given to a model that has no such input."""
        if guidance is not None and self.guidance is None:
            given = ",".join(f"{number:g}" for number in (guidance if isinstance(guidance, tuple) else (guidance,)))
            no_input = f"this is {self.name}, which has no guidance input; {self.without_guidance}"
            raise ValueError(f"--guidance {given}: {no_input}")

    def check_schedule(self, steps: int, time_shift: float, given: str) -> str:
        """ValueError if noise levels coincide; a note if one step takes nearly all noise away. given: the flag."""
        sigmas, mu = self.sigmas(steps, time_shift), math.log(time_shift)
        if not (sigmas.diff() < 0).all() or abs(sigmas[0] - 1) > 1e-6:  # where a tiny shift loses its digits
            advice = {"--mu": "a value nearer to 0", "--time-shift": "a value nearer to 1"}.get(
                given.split()[0], f"--mu 1.15, or a smaller --res (by tokens, mu is {mu:.0f})")
            raise ValueError(f"{given}: some of the {steps} noise levels coincide; give {advice}")
        if steps > 2 and (second := sigmas[1].item()) < 1 - BLURRED:
            return (f"note: time shift {time_shift:.4g}, mu {mu:.2f}: the second noise level is {second:.3g}, below "
                    f"{1 - BLURRED:.1f}, so that pictures are blurred; --mu 0 spreads the levels evenly")
        if steps == 1 or (last := sigmas[-2].item()) <= BLURRED:
            return ""
        return (f"note: time shift {time_shift:.4g}, mu {mu:.2f}: the last noise level before 0 is {last:.3f}, above "
                f"{BLURRED}, so that pictures are blurred; --mu 1.15 caps it")

    def text_tokens(self, t5_length: int | None) -> int:
        """Length of the context for a T5 length; None: as published."""
        return self.clip_tokens + (t5_length or self.t5_length or self.t5_tokens)

    def records(self, config: MMDiTConfig | FluxConfig) -> dict[str, object]:
        """Metadata that a written transformer needs beside its shapes."""
        records = {"axes_dim": ", ".join(map(str, config.axes_dim))} if self.model is Flux else {}
        if config.positions != STOCK:
            records |= {"positions": config.positions.rule, "trained_side": config.positions.side}
        return records


SD3 = Family(
    "SD3", MMDiT, mmdit.read_config, SD3Text, sd3_sigmas, "sd3.safetensors", vae_inside=True, steps=28, cfg=7.0,
    guidance=None, time_shift=3.0, density="logit_normal", training_shift=3.0, latent_scale=(SD3_SCALE, SD3_SHIFT),
    release_drops_latent_shift=True, clip_tokens=77, t5_tokens=77,
    without_guidance="SD3 is guided by a second pass, --cfg")
SD3_5_MEDIUM = replace(SD3, name="SD3.5-medium", steps=50, cfg=5.0,
                       same_tensors="TensorArt's turbo has the same tensors and takes --steps 8 --cfg 1 to 1.5")
SD3_5_LARGE = replace(SD3, name="SD3.5-large", steps=40, cfg=4.5,
                      same_tensors="its turbo has the same tensors and takes --steps 4 --cfg 1")
SD3_5_TURBO = replace(SD3_5_LARGE, name="SD3.5-large-turbo", steps=4, cfg=1.0,
                      same_tensors="by its name; SD3.5-large has the same tensors and takes --steps 40 --cfg 4.5")
FLUX_DEV = Family(
    "Flux-dev", Flux, flux.read_config, FluxText, even_sigmas, "flux.safetensors", vae_inside=False, steps=50, cfg=1.0,
    guidance=3.5, time_shift=None, density="uniform", training_shift=1.0, latent_scale=(FLUX_SCALE, FLUX_SHIFT),
    release_drops_latent_shift=False, clip_tokens=0, t5_tokens=512)
FLUX_SCHNELL = replace(
    FLUX_DEV, name="Flux-schnell", steps=4, guidance=None, time_shift=1.0, t5_length=256,
    without_guidance="Flux-schnell draws without", same_tensors="it has no guidance_in, nor has a Flux-dev without "
    "distillation, which takes --steps 50 --cfg 3.5 --t5-length 512 and, at 1024 px, --mu 0.63")
FLUX_UNDISTILLED = replace(
    FLUX_DEV, name="Flux-dev without distillation", cfg=3.5, guidance=None,
    without_guidance="it is guided by a second pass, --cfg",
    same_tensors="by its name or scheduler; Flux-schnell has the same tensors and takes --steps 4 --cfg 1 --mu 0")


OFFICIAL_VAE = VAEConfig((128, 256, 512, 512), (128, 256, 512, 512), 2, 3, 16)
PUBLISHED = {  # --model NAME without its folder: family and configuration
    "sd3": (SD3, MMDiTConfig()),
    "sd3.5-medium": (SD3_5_MEDIUM, MMDiTConfig(table_side=384, qk_norm=True, dual_attention=tuple(range(13)))),
    "sd3.5-large": (SD3_5_LARGE, MMDiTConfig(hidden_size=2432, depth=38, mlp_hidden=9728, qk_norm=True)),
    "flux": (FLUX_DEV, FluxConfig()),
    "flux-schnell": (FLUX_SCHNELL, FluxConfig(guidance=False))}


def positioned(config: MMDiTConfig | FluxConfig, rule: str | None, side: int | None) -> MMDiTConfig | FluxConfig:
    """The configuration with other positions; None: as the file records. ValueError as of check_positions."""
    recorded = config.positions
    positions = Positions(rule or recorded.rule, recorded.side if side is None else side)
    need(side is None or positions.rule != "stock", "trained-side", side, "it with --positions, and none for stock")
    if positions.rule != "stock" and isinstance(config, MMDiTConfig) and positions.side > config.table_side:
        raise ValueError(f"trained side {positions.side}: the position table has {config.table_side} tokens per side; "
                         "give that of the pictures the model was trained with")
    return replace(config, positions=check_positions(positions))


def size_of(res: str) -> tuple[int, int]:
    """Width and height in pixels of a --res; ValueError if it is none."""
    if not (match := RES.fullmatch(res)):
        raise ValueError(f"--res {res!r}: give pixels up to {MOST_SIDE:,}, as 1024 or, width x height, 3072x4096")
    return int(match[1]), int(match[2] or match[1])


def check_size(size: tuple[int, int], factor: int, config: MMDiTConfig | FluxConfig, by: str = "") -> int:
    """The number of image tokens; ValueError if a side is no multiple of a patch, or beyond the position table.
    by: who asks for this size, if it is not the command line."""
    (width, height), step = size, 2 * factor
    most = reach(config.table_side, config.positions) * step
    given = f"--res {width}x{height}{by}"
    if width % step or height % step:
        raise ValueError(f"{given}: both sides must be multiples of {step} at --factor {factor}")
    if max(size) > most:
        advice = "--factor 16 reaches twice as far" if factor == 8 else "--positions pi has no end"
        raise ValueError(f"{given}: this model's position table ends at {most} px per side at --factor "
                         f"{factor}; {advice}")
    need(max(size) <= MOST_SIDE, "res", f"{width}x{height}", f"at most {MOST_SIDE:,} px per side")
    return width * height // step**2


def check_widths(config: MMDiTConfig | FluxConfig, context: Tensor, pooled: Tensor, vae: VAEConfig) -> None:
    """ValueError if text encoders (context, pooled of any prompt) or VAE are not of the transformer's widths, or the
    VAE is not of factor 8."""
    for part, width, expected in (("text encoders give a context", context.shape[-1], config.context_dim),
                                  ("text encoders give a pooled vector", pooled.shape[-1], config.pooled_dim),
                                  ("VAE has latents", vae.latent_channels, config.in_channels)):
        if width != expected:
            raise ValueError(f"the folder's {part} of width {width}, but the transformer takes {expected}: they do not "
                             "match; give --weights the folder that the transformer was trained from")
    if (levels := (len(vae.encoder_widths), len(vae.decoder_widths))) != (4, 4):
        raise ValueError(f"the folder's VAE has {levels[0]} levels in its encoder, {levels[1]} in its decoder; those "
                         "of SD3 and Flux have 4, for 8 pixels per latent position: put one of these there")


def family_of(weights: Weights) -> Family:
    """The family of a transformer, by the names of its tensors; ValueError that lists what the file holds instead."""
    part = weights.part("model.diffusion_model.")
    beside = [name for name in weights if len(part) < len(weights) and not name.startswith(OFFICIAL_PREFIXES)]
    if other := recognised(part, OTHERS) or recognised(beside, ADAPTERS):
        raise ValueError(f"{weights.source}: {other}")
    if twice := next((name for name in beside if name in part), ""):
        raise ValueError(f"{weights.source}: {twice} is there with and without the prefix model.diffusion_model.")
    if any(name.startswith("joint_blocks.") for name in part):
        if any(".attn2." in name for name in part):
            return SD3_5_MEDIUM
        return SD3_5_LARGE if part.depth("joint_blocks.") == 38 else SD3
    if any(name.startswith(("double_blocks.", "single_blocks.")) for name in part):
        return FLUX_DEV if any(name.startswith("guidance_in.") for name in part) else FLUX_SCHNELL
    raise ValueError(f"{weights.source}: holds neither an SD3 nor a Flux transformer, but {len(weights)} tensors: "
                     f"{', '.join(list(weights)[:2])} ...")


def with_scheduler(family: Family, file: Path) -> Family:
    """The family with the time shift of a diffusers folder; ValueError if the file asks for another schedule."""
    config = read_json(file)

    def number(key: str, otherwise: float, low: float, high: float) -> float:
        return entry({key: otherwise} | config, key, float, file, low, high)

    kind, other = config.get("_class_name", EULER), next((key for key in UNREAD if config.get(key)), "")
    dynamic = entry({"use_dynamic_shifting": False} | config, "use_dynamic_shifting", bool, file)
    if kind != EULER or other or (dynamic and family.model is MMDiT):
        what = f"a {kind}" if kind != EULER else f"sets {other or 'use_dynamic_shifting'}"
        raise ValueError(f"{file}: {what}, which {family.name} is not drawn with here; remove the file, and give "
                         "--time-shift")
    number("num_train_timesteps", 1000, 1000, 1000)
    if not dynamic:
        return replace(family, time_shift=number("shift", 1.0, 1e-3, 1e3), scheduler=str(file))
    (x0, y0), (x1, y1) = FLUX_MU
    line = ((number("base_image_seq_len", x0, 1, 1e9), number("base_shift", y0, -100, 100)),
            (number("max_image_seq_len", x1, 1, 1e9), number("max_shift", y1, -100, 100)))
    if line[0][0] >= line[1][0]:
        raise ValueError(f"{file}: base_image_seq_len {line[0][0]:g} is not below max_image_seq_len {line[1][0]:g}")
    how = {"time_shift_type": "exponential"} | config
    if how["time_shift_type"] not in ("exponential", "linear"):
        raise ValueError(f"{file}: time_shift_type {how['time_shift_type']!r}, expected exponential or linear")
    linear = how["time_shift_type"] == "linear"
    return replace(family, time_shift=None, by_tokens=partial(flux_time_shift, line=line, linear=linear),
                   scheduler=str(file))


def variant(family: Family, weights: Weights, scheduler: Path | None) -> Family:
    """What the tensors do not show: a turbo or undistilled model, by its name, else by its scheduler's file."""
    name = published_name(weights.source).lower()
    config = read_json(scheduler) if scheduler and scheduler.exists() else {}
    if family is SD3_5_LARGE and "turbo" in name:
        return SD3_5_TURBO
    shown = re.search(r"dev(?!ice|el)|distill", name) or config.get("use_dynamic_shifting") is True
    return FLUX_UNDISTILLED if family is FLUX_SCHNELL and shown and "schnell" not in name else family


def published_name(path: str | os.PathLike) -> str:
    """The name of the file of a transformer; of a diffusers folder, also in a cache, the name of the model."""
    path = Path(os.path.abspath(path))
    path = path.parent if path.name.startswith(("diffusion_pytorch_model", "model.safetensors")) else path
    path = path.parent if path.name == "transformer" else path
    if path.parent.name == "snapshots":  # models--black-forest-labs--FLUX.1-dev/snapshots/HASH of Hugging Face
        return path.parent.parent.name.split("--")[-1]
    return path.name


def fingerprint(*paths: str | os.PathLike) -> str:
    """Twelve digits that distinguish weights: of each file's first MiB and of 64 bytes at 1024 places, not of 24 GB."""
    digest = hashlib.sha256()
    for file in chain(*(sorted(Path(p).glob("*.safetensors")) if os.path.isdir(p) else [p] for p in paths)):
        with open(file, "rb") as f:
            digest.update(f.read(1 << 20))
            size = f.seek(0, os.SEEK_END)
            for start in range(1 << 20, size, max(size // 1024, 64)):
                f.seek(start)
                digest.update(f.read(64))
    return digest.hexdigest()[:12]


def text_files(folder: str | os.PathLike) -> list[Path]:
    """The files of a model folder's text encoders and tokenizers: text_encoder*/, text_encoders/, tokenizer*/.

    An encoder that is not there is inside the transformer's file, which then stands for it.
    """
    encoders = {file.name[:6] if file.parent.name == "text_encoders" else file.parent.name  # clip_l, clip_g, t5xxl_
                for file in Path(folder).glob("text_encoder*/*.safetensors")}
    patterns = ["text_encoder*/*", "tokenizer*/*"]
    patterns += [file for file, count in (("sd3*.safetensors", 3), ("flux*.safetensors", 2)) if len(encoders) < count]
    return sorted(file for pattern in patterns for file in Path(folder).glob(pattern) if file.is_file())


def vae_for(folder: str | os.PathLike, vae: Path, factor: int) -> Path:
    """The VAE that draws at a factor: at 16 the folder's VAE_16, which train_vae.py --decoder-only writes, else `vae`.

    raises  ValueError if it does not have the encoder of `vae`: latents would mean something else to it
    """
    if factor != 16 or not (other := Path(folder) / VAE_16).exists():
        return vae
    first, second = (open_weights(path).part("first_stage_model.") for path in (vae, other))
    for name in ("encoder.conv_in.weight", "encoder.conv_out.weight"):
        if name in first and (name not in second or not torch.equal(first[name].read(), second[name].read())):
            raise ValueError(f"{other}: its encoder is not that of {vae}, so that it is the decoder of other latents; "
                             f"move it away, or train one from {vae.name}")
    return other


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
    scheduler = Path(folder) / SCHEDULER
    family = own = variant(own, weights, scheduler)
    if transformer:
        family = family_of(weights := open_weights(transformer))
        if family.model is not own.model:
            raise ValueError(f"{transformer}: is a transformer of {family.name}, but {folder} is a folder of "
                             f"{own.name}, with other text encoders; give --weights a folder of {family.name}")
        beside = Path(transformer).parent / SCHEDULER
        if Path(transformer).name == "transformer" and beside.exists():  # of the same download
            scheduler = beside
        elif variant(family, weights, scheduler) is not own:  # the folder's scheduler is another model's
            scheduler = None
        family = variant(family, weights, scheduler)
    return with_scheduler(family, scheduler) if scheduler and scheduler.exists() else family, weights, vae


def published(model: str | None, weights: str | None) -> tuple[Family, MMDiTConfig | FluxConfig] | None:
    """Family and configuration of a published --model whose folder is not here."""
    return None if weights or model_folder(model).is_dir() else PUBLISHED.get(model)


def describe(model: str | None, weights: str | None, transformer: str | None) -> tuple[
        Family, MMDiTConfig | FluxConfig, VAEConfig]:
    """Family and configurations of --model or --weights.

    weights  a folder, or a manifest: {"tensors": {name: shape}} as JSON
    model    a folder of models/, or one of PUBLISHED
    """
    if weights and weights.endswith(".json"):
        shapes = read_json(Path(weights)).get("tensors")
        if not isinstance(shapes, dict):
            raise ValueError(f'{weights}: no manifest, which has "tensors": {{name: shape}}; '
                             "give the folder or file of the weights")
        for name, shape in shapes.items():
            if not isinstance(shape, list) or any(type(size) is not int for size in shape):
                raise ValueError(f"{weights}: {name} has the shape {shape!r:.40}, expected a list of integers")
        tensors = {name: LazyTensor(tuple(shape), lambda: None) for name, shape in shapes.items()}
        manifest = Weights(tensors, {}, weights)
        family = family_of(manifest)
        return family, family.config(manifest.part("model.diffusion_model.")), OFFICIAL_VAE
    if known := published(model, weights):
        return *known, OFFICIAL_VAE
    family, source, vae_path = find(model_folder(model, weights), transformer)
    return (family, family.config(source.part("model.diffusion_model.")),
            read_config(open_weights(vae_path).part("first_stage_model.")))
