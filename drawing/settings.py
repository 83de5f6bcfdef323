"""What sample.py draws and how: its command line, completed by the transformer's metadata and the family.

Order     parse() reads the flags, settle() fills in what was not given, summary() says where each setting comes from
Check     python -m pytest tests/test_sample.py ; python sample.py --help
"""

import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from checkpoint import DTYPES, Weights
from family import Family, check_size, positioned, size_of
from files import flag, launched, need, printable, read_flags
from flow import SEEDS, SOLVERS
from flux import FluxConfig
from layers import RULES, STOCK, Positions, check_ranks
from machine.memory import check_device, device_of
from mmdit import MMDiTConfig
from reading.pictures import upright_size

MOST_PICTURES = 100_000
START = 0.6     # noise level of the first redrawing
BEYOND = 1.001  # times the trained side: sides that were rounded are not larger


@dataclass(frozen=True)
class Settings:
    """What is drawn and how, each a flag of sample.py. None means not given; settle() fills in what the model decides.

    guidance  None after settle(): the model has no such input
    mu        None after settle(): each stage has its own, by its tokens
    offset    None after settle(): as the VAE's file records
    """

    # input and output
    prompt: list[str] | None = flag(None, "text prompt; may be given several times", type=str, action="append",
                                    metavar="TEXT")
    prompts: str | None = flag(None, "text file with one prompt per line, or JSON lines with text, file_name",
                               metavar="FILE")
    negative: str = flag("", "negative prompt (default: the empty prompt)", metavar="TEXT")
    res: str | None = flag(None, "side in pixels, or WIDTHxHEIGHT; multiples of 32 (default: recorded, else 1024)",
                           metavar="PX")
    seed: int = flag(0, "seed of the first picture of each prompt")
    count: int = flag(1, "pictures per prompt, with seeds SEED, SEED+1 ...")
    out: str = flag("out", "folder, or the name of one .png, .jpg or .webp; a file is replaced only by the same "
                    "picture; in a folder, others get a free name", metavar="PATH")
    # model
    model: str | None = flag(None, "folder in models/ (default: tiny-sd3)", metavar="NAME")
    weights: str | None = flag(None, "another model folder, as downloaded", metavar="DIR")
    transformer: str | None = flag(None, "use this transformer: a file of train.py, or a diffusers folder",
                                   metavar="PATH")
    lora: list[str] | None = flag(
        None, "add a LoRA adapter, in the names of kohya, Black Forest Labs, PEFT or diffusers; may be given several "
        "times (default strength: 1)", type=str, action="append", metavar="FILE[:STRENGTH]")
    vae: str | None = flag(None, "use this VAE: a file, or a diffusers folder (default: the folder's; at factor 16 its "
                           "vae_16.safetensors, if there is one)", metavar="PATH")
    # sampling
    steps: int | None = flag(None, "steps of the solver (SD3: 28, SD3.5: 40 or 50, Flux-dev: 50, Flux-schnell: 4)")
    solver: str = flag("euler", "euler is as published; ab2 is of second order at the same price per step, so fewer "
                       "are needed", choices=tuple(SOLVERS))
    cfg: float | None = flag(None, "classifier-free guidance; 1 is none, and fast (SD3: 7.0, SD3.5: 4.5 or 5, Flux: 1)")
    guidance: float | None = flag(None, "the guidance input of Flux-dev (3.5); other models have no such input")
    time_shift: float | None = flag(
        None, "time shift of the schedule; above 1 spends more steps on noise (the folder's scheduler/, else SD3: 3.0, "
        "Flux-dev: by the number of tokens, Flux-schnell: 1)")
    mu: float | None = flag(None, "logarithm of the time shift, Flux's name for it")
    factor: int | None = flag(None, "pixels per latent position: 8 as published, 16 by the partition trick (16)",
                              choices=(8, 16))
    offset: int | None = flag(
        None, "pixels that the VAE's last convolution cuts at factor 16: 2 is exact, SC-VAE and UltraFlux were trained "
        "with 1 (default: recorded by the VAE, else 2)", choices=(1, 2))
    t5_length: int | None = flag(None, "tokens of T5 (SD3: 77, Flux-dev: 512, Flux-schnell: 256)", metavar="TOKENS")
    # larger than trained
    first: str | None = flag(
        None, "draw at this side first, then enlarge and redraw in doublings; none: at once (default: the trained size "
        "if the file records it, else none)", metavar="PX")
    redraw: str | None = flag(None, "redraw this picture at --res, in place of a first stage", flag="from",
                              metavar="PICTURE")
    start: float | None = flag(
        None, "noise level at which a picture is redrawn, its square in the next doubling; below "
        f"{START} it stays blurred, 0 only encodes and decodes it (default: {START})")
    positions: str | None = flag(
        None, "rule for places beyond the trained side (default: recorded, else pi in stages, stock at once)",
        choices=RULES)
    trained_side: int | None = flag(None, "tokens per side that the model was trained with (default: recorded, else "
                                    "those of --first)", metavar="N")
    # machine
    device: str | None = flag(None, "cpu, cuda or cuda:1 (default: cuda if there is one)")
    dtype: str | None = flag(None, "compute dtype (default: bf16 on cuda, fp32 on cpu)", choices=tuple(DTYPES))
    vae_dtype: str | None = flag(
        None, "compute dtype of the VAE; bf16 adds 2 %% to the bytes of a JPEG (default: that of --dtype)",
        choices=tuple(DTYPES))
    memory: str | None = flag(
        None, "GiB for weights and activations, such as 8GiB: what does not fit is read when it is needed (default: "
        "what the card has free; on a CPU, what this process may have)", metavar="GIB")
    store: str | None = flag(
        None, "keep the matrices of the transformer's blocks as float8_e4m3fn, one scale per row: half the memory of "
        "bf16, a relative error of 3 %% per weight", choices=("fp8",))
    plan: bool = flag(False, "print how much memory each phase takes, in bf16, and draw nothing; --model sd3, "
                      "sd3.5-medium, sd3.5-large, flux and flux-schnell need no files for it")
    compile: bool = flag(False, "compile the transformer's blocks; the first step then takes minutes; the gain on a "
                         "GPU has not been measured")
    together: bool = flag(False, "under torchrun: all ranks draw each picture, each a part of its tokens (default: "
                          "each rank draws its own pictures)")

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return size_of(self.res)

    @property
    def token_px(self) -> int:
        """Pixels per side of an image token: sides are multiples of it."""
        return 2 * self.factor

    @property
    def follows(self) -> bool:
        """Whether this rank draws with the first one, which alone writes and tells."""
        return self.together and launched()[0] > 0


def settle(given: Settings, family: Family, transformer: Weights, config: MMDiTConfig | FluxConfig) -> Settings:
    """Fill in what was not given: from the file's metadata, then the family; ValueError if it cannot be drawn."""
    mu, shift = given.mu, given.time_shift
    family.check_guidance(given.guidance)
    need(1 <= given.count <= MOST_PICTURES, "count", given.count, f"1 to {MOST_PICTURES:,}")
    need(0 <= given.seed <= SEEDS - given.count, "seed", given.seed, "0 to 2^32 - count")
    if mu is not None:
        need(-700 < mu < 700, "mu", f"{mu:g}", "the logarithm of a time shift; Flux-dev takes 0.5 to 3")
        if shift is not None:
            raise ValueError(f"--mu {mu:g} --time-shift {shift:g}: mu is the logarithm of the time shift; give one")
        shift = math.exp(mu)
    sampling = family.sampling(transformer, given.steps, given.cfg, given.guidance, shift, given.res, given.factor,
                               given.t5_length)
    device = check_device(given.device)
    if "LOCAL_RANK" in os.environ:
        device = str(device_of(device))
    dtype = given.dtype or ("fp32" if device == "cpu" and not given.plan else "bf16")
    settings = replace(given, device=device, dtype=dtype, vae_dtype=given.vae_dtype or dtype, **asdict(sampling))
    need(settings.offset is None or settings.factor == 16, "offset", settings.offset, "it with --factor 16")
    settings = staged(settings, family, transformer, config.positions)
    config = positioned(config, settings.positions, settings.trained_side)
    recorded = f" (recorded by {transformer.source})"
    by = recorded if given.res is None and "res" in transformer.metadata else ""
    tokens = check_size(settings.size, settings.factor, config, by)
    if sampling.time_shift is None:
        settings, flag = replace(settings, time_shift=family.by_tokens(tokens)), f"--res {settings.res}"
    elif mu is not None:
        flag = f"--mu {mu:g}"
    else:
        settings = replace(settings, mu=math.log(settings.time_shift))
        flag = f"--time-shift {settings.time_shift:g}" + (recorded if shift is None else "")
    first = tokens if settings.first == "none" else (int(settings.first) // settings.token_px)**2
    if given.together:
        check_ranks(launched()[1], config.num_heads, family.text_tokens(settings.t5_length), first)
    if note := family.check_schedule(settings.steps, settings.time_shift, flag):
        remark(note)
    return settings


def remark(note: str) -> None:
    """Print a note once for all ranks."""
    if not launched()[0]:
        print(note, file=sys.stderr)


def staged(settings: Settings, family: Family, transformer: Weights, recorded: Positions) -> Settings:
    """Settings with first, start, positions and trained_side, each as given, else by the size that the file records.

    Stages draw with the recorded rule of positions, else with interpolated ones.
    """
    token_px, start = settings.token_px, START if settings.start is None else settings.start
    need(0 <= start <= 1, "start", f"{start:g}", "0 to 1")
    # in pixels: the trained side at this factor, the side of a square of the picture's area
    trained = family.trained_side(transformer) * token_px if "res" in transformer.metadata else None
    side = math.sqrt(math.prod(settings.size))
    larger = side > BEYOND * (trained or family.res)
    first = first_stage(settings, family, side, trained if larger else None, larger)
    rule, trained_side = settings.positions, settings.trained_side
    if rule is None and (first != "none" or settings.redraw and larger):
        rule = recorded.rule if recorded != STOCK else "pi"
    if trained_side is None and rule not in (None, "stock"):
        pixels = trained or (int(first) if first != "none" else family.res if settings.redraw else 0)
        trained_side = recorded.side or round(pixels / token_px)
    return replace(settings, first=first, start=start, positions=rule, trained_side=trained_side)


def first_stage(settings: Settings, family: Family, side: float, trained: float | None, larger: bool) -> str:
    """Side of the first stage in pixels: --first, else the trained side if --res is larger; "none": there is no such.

    side     pixels, of a square of the picture's area; trained: of the trained size if that is recorded and smaller
    larger   whether the picture is larger than the model was trained with
    """
    first, token_px = settings.first, settings.token_px
    need(not settings.redraw or first is None, "first", first, "it without --from, whose picture is the first stage")
    if settings.redraw:
        check_proportions(settings)
        return "none"
    if first is None and larger and not trained:
        remark(f"note: the file does not record its trained size: {settings.res} px are drawn at once; if the "
               f"contents repeat, give --first {family.res}")
    if first is None:
        first = str(max(1, round(trained / token_px)) * token_px) if trained else "none"
    if first != "none" and side > pixels_of(first, token_px):
        return first
    for name, given in (("first", settings.first), ("start", settings.start)):
        if given not in (None, "none"):
            remark(f"note: --{name} {given} does nothing: {settings.res} px are drawn at once")
    return "none"


def check_proportions(settings: Settings) -> None:
    """ValueError if --res would distort the picture of --from; it names the size of equal area that does not."""
    token_px = settings.token_px
    width, height = upright_size(settings.redraw)
    scale = math.sqrt(math.prod(settings.size) / (width * height))
    fits = [max(token_px, round(side * scale / token_px) * token_px) for side in (width, height)]
    if abs(math.log(settings.size[0] * height / (settings.size[1] * width))) > 0.02 and settings.size != tuple(fits):
        raise ValueError(f"--from {settings.redraw}: {width}x{height} px have not the proportions of --res "
                         f"{settings.res}; give --res {fits[0]}x{fits[1]}")


def pixels_of(first: str, token_px: int) -> int:
    """--first in pixels; ValueError if it is none."""
    fits = re.fullmatch(r"\d{1,5}", first) and int(first) >= token_px and int(first) % token_px == 0
    need(bool(fits), "first", first, f"pixels, a multiple of {token_px}, or none")
    return int(first)


def summary(given: Settings, settings: Settings, family: Family, transformer: Weights, vae: Path | None) -> str:
    """One line: the family, its files, the device, and each setting with where it comes from, if not the family's."""
    scheduled = "scheduler" if family.scheduler else "by tokens" if family.time_shift is None else ""
    numbers = []
    for name in ("res", "factor", "steps", "cfg", "guidance", "time_shift", "t5_length"):
        value, where = getattr(settings, name), scheduled if name == "time_shift" else ""
        if getattr(given, name) is not None or (name == "time_shift" and given.mu is not None):
            where = "given"
        elif name in transformer.metadata:
            where = "recorded"
        if value is not None:
            shown = f"{value:.4g}" if isinstance(value, float) else value
            numbers.append(f"{name.replace('_', ' ')} {shown}" + (f" ({where})" if where else ""))
    if settings.solver != "euler":
        numbers.append(f"solver {settings.solver}")
    if settings.first != "none":
        where = "given" if given.first else "the trained size"
        numbers.append(f"in stages from {settings.first} px ({where}) at noise level {settings.start:g}")
    if settings.redraw:
        size = "x".join(map(str, upright_size(settings.redraw)))
        numbers.append(f"redrawn from {settings.redraw} ({size} px) at noise level {settings.start:g}")
    if settings.positions:
        trained = f" from {settings.trained_side} tokens" if settings.trained_side else ""
        numbers.append(f"positions {settings.positions}{trained}")
    device = settings.device
    if device != "cpu":
        device += f" {torch.cuda.get_device_name(device)}"
    if settings.together:
        device += f", {launched()[1]} ranks together"
    kind = f"{family.name} ({family.same_tensors})" if family.same_tensors else family.name
    dtypes = settings.dtype + (f", VAE {settings.vae_dtype}" if settings.vae_dtype != settings.dtype else "")
    drawn_with = " with ".join([transformer.source, *settings.lora])
    sources = f"transformer {drawn_with}, VAE {vae or 'as published'}"
    sources += f", {family.scheduler}" if family.scheduler else ""
    return printable(f"{kind}; {sources}; {device}, {dtypes}; {', '.join(numbers)}")


GROUPS = {"prompt": "input and output", "model": "model",
          "steps": "sampling (default: the file's metadata, else in brackets)", "first": "larger than trained",
          "device": "machine"}  # the first flag of each


def parse(argv: Sequence[str] | None = None) -> Settings:
    """The command line of sample.py; what the file and the family decide is still open."""
    s = read_flags(Settings, "Draw pictures from prompts.", GROUPS, argv)
    need(not (s.model and s.weights), "model", f"{s.model} --weights {s.weights}", "one of them")
    return replace(s, model=s.model or "tiny-sd3", prompt=s.prompt or [], lora=s.lora or [])
