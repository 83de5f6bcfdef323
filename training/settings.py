"""The settings of a training run: the command line of train.py, resolved once into a frozen Settings.

Order     parse() reads the flags, settle() resolves what recipe and family decide, check() refuses values out of range
Recipes   "paper" and "release" set everything in which the two differ; single flags override them (docs/differences.md)
Resume    a run resumes only with equal IDENTITY; all other settings may change
Check     python -m pytest tests/test_settings.py ; python train.py --help
"""

import argparse
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from checkpoint import DTYPES
from family import Family
from flow import DENSITIES, SCHEMES, flux_mu
from text import check_t5_length
from wavelet import OBJECTIVES

GIB = 1 << 30
RECOMPUTE_TOKENS = 16_384  # 4096 px at factor 16: from here on activations are recomputed unless told otherwise
RECIPES = {  # settings in which paper and release differ; None = family default
    "paper": {"objective": "paper", "dilation": 2, "latent_shift": True, "weighting": "none", "t5_length": None,
              "flip": False},
    "release": {"objective": "release", "dilation": 1, "latent_shift": False, "weighting": "none", "t5_length": 77,
                "flip": False}}
OURS = RECIPES["paper"] | {"flip": True}


@dataclass(frozen=True)
class Machine:
    """`ranks` processes, each with a card of `card` bytes (on CPUs: its share of the host's memory)."""

    ranks: int
    card: int


@dataclass(frozen=True)
class Settings:
    """Every setting of a run, as --help describes it; None and "tokens" stand where settle() has yet to decide."""

    model: str | None            # the folder models/MODEL
    weights: str | None          # another model folder
    transformer: str | None      # trained instead of the folder's
    data: str | None
    out: str
    res: int                     # pixels
    aspect: bool
    factor: int                  # 8 or 16
    dilation: int | None
    latent_shift: bool | None
    flip: bool | None
    cache_latents: bool
    drop_caption: float          # probability
    t5_length: int | None        # tokens
    recipe: str | None
    objective: str | None        # one of OBJECTIVES
    bands: tuple[float, ...]     # weights of LL, LH, HL, HH
    huber: float                 # 0: squared
    density: str | None
    time_shift: float | str | None
    guidance: float | None
    weighting: str | None
    steps: int
    batch: int                   # pictures per step, over all ranks
    lr: float
    warmup: int                  # steps
    weight_decay: float
    clip: float                  # gradient norm
    ema: float                   # decay per step; 0: none
    state: str                   # fp32 or bf16
    shard: str                   # none, zero2 or zero3
    offload: bool
    accumulate: int              # backward passes per step
    activations: str | None      # keep, recompute or host
    ema_on_host: bool
    device: str
    dtype: str
    save_dtype: str
    save_every: int              # steps
    keep: int                    # checkpoints
    log_every: int               # steps
    sample_every: int            # steps; 0: never
    seed: int
    threads: int
    export: bool
    plan: Machine | None
    dry_run: bool

    @property
    def sharded(self) -> bool:
        return self.shard != "none"

    @property
    def state_dtype(self) -> torch.dtype:
        """Of stored weights and moments."""
        return torch.bfloat16 if self.state == "bf16" else torch.float32

    @property
    def tokens(self) -> int:
        """Image tokens of a training square."""
        return (self.res // (2 * self.factor)) ** 2


# What decides the numbers of a run. A run resumes only with equal values of these; the other settings may change.
IDENTITY = (
    "model", "weights", "transformer", "res", "aspect", "factor", "dilation", "latent_shift", "flip", "cache_latents",
    "drop_caption", "t5_length", "objective", "bands", "huber", "density", "time_shift", "guidance", "weighting",
    "batch", "lr", "warmup", "weight_decay", "clip", "ema", "state", "dtype", "seed")


def settle(settings: Settings, family: Family) -> Settings:
    """Resolve unset settings from the recipe, then the model family; ValueError if two settings contradict."""
    family.check_guidance(settings.guidance)
    recipe = RECIPES[settings.recipe] if settings.recipe else OURS
    if not family.release_drops_latent_shift:
        recipe = recipe | {"latent_shift": True}
    shift = math.exp(flux_mu(settings.tokens)) if settings.time_shift == "tokens" else settings.time_shift
    offload = settings.offload and settings.device != "cpu"  # on a CPU everything is in host memory already
    settled = replace(
        settings, **{name: value for name, value in recipe.items() if getattr(settings, name) is None},
        density=settings.density or family.density, time_shift=shift or family.training_shift, offload=offload,
        guidance=family.guidance if settings.guidance is None else settings.guidance,
        activations=settings.activations or ("recompute" if settings.tokens >= RECOMPUTE_TOKENS else "keep"))
    if settled.objective == "velocity" and (settled.huber or set(settled.bands) != {1.0}):
        raise ValueError("--objective velocity has no bands: give --objective paper, which is the same with equal ones")
    return settled


def check(s: Settings, ranks: int) -> None:
    """Refuse a setting out of range: ValueError that names the flag, its value and what is accepted."""
    def need(fits: bool, flag: str, value: object, accepted: str) -> None:
        if not fits:
            raise ValueError(f"--{flag} {value}: give {accepted}")

    check_t5_length(s.t5_length)
    step, share = 2 * s.factor, ranks * s.accumulate
    need(s.res > 0 and s.res % step == 0, "res", s.res, f"a multiple of {step} at --factor {s.factor}")
    for flag in ("steps", "batch", "accumulate", "save-every", "log-every", "keep", "threads"):
        need(getattr(s, flag.replace("-", "_")) >= 1, flag, getattr(s, flag.replace("-", "_")), "1 or more")
    for flag in ("lr", "huber", "warmup", "weight-decay", "seed", "sample-every"):
        need(getattr(s, flag.replace("-", "_")) >= 0, flag, getattr(s, flag.replace("-", "_")), "0 or more")
    need(0 <= s.drop_caption <= 1, "drop-caption", s.drop_caption, "a probability")
    need(s.batch % share == 0, "batch", s.batch,
         f"a multiple of {share}, {ranks} ranks times --accumulate {s.accumulate}")
    need(0 < s.clip < math.inf, "clip", s.clip, "a number above 0")
    need(s.time_shift in (None, "tokens") or 0 < s.time_shift < math.inf, "time-shift", s.time_shift,
         'a number above 0, or "tokens"')
    need(s.guidance is None or 0 <= s.guidance < math.inf, "guidance", s.guidance, "a number from 0")
    need(not s.offload or s.sharded, "offload", s.offload, "it with --shard zero2 or zero3")
    need(0 <= s.ema < 1, "ema", s.ema, "0 for none, or a decay below 1")


# ---- the command line

def parse(argv: Sequence[str] | None = None) -> Settings:
    """Read the flags; what the model family decides is still open."""
    options = vars(_parser().parse_args(argv))
    on_gpu = torch.cuda.is_available() or options["plan"] is not None  # plans are made for cards, wherever we are
    options["device"] = options["device"] or ("cuda" if on_gpu else "cpu")
    options["dtype"] = options["dtype"] or ("bf16" if on_gpu else "fp32")
    if not (options["model"] or options["weights"] or options["export"]):
        options["model"] = "tiny-sd3"
    return Settings(**options)


def four_numbers(text: str) -> tuple[float, ...]:
    values = tuple(float(v) for v in text.split(","))
    if len(values) != 4 or not all(0 <= value < math.inf for value in values):
        raise argparse.ArgumentTypeError(f"{text!r}: four numbers from 0 for LL,LH,HL,HH")
    return values


def shift_or_tokens(text: str) -> float | str:
    return text if text == "tokens" else float(text)


def ranks_and_gigabytes(text: str) -> Machine:
    ranks, _, gib = text.partition("x")
    if not ranks.isdigit() or not int(ranks) or not gib.replace(".", "", 1).isdigit():
        raise argparse.ArgumentTypeError(f"{text!r}: RANKSxGB, such as 8x80")
    return Machine(int(ranks), round(float(gib) * GIB))


Add = Callable[..., argparse.Action]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Fine-tune the transformer of a model folder on a folder of captioned pictures.", allow_abbrev=False)
    for title, flags in (("what", _what), ("pictures", _pictures), ("objective", _objective),
                         ("optimizer", _optimizer), ("memory", _memory), ("machine", _machine)):
        flags(parser.add_argument_group(title).add_argument)
    return parser


def _what(add: Add) -> None:
    add("--model", help="name of a folder in models/ (default: tiny-sd3)")
    add("--weights", metavar="DIR", help="another model folder, as downloaded")
    add("--transformer", metavar="FILE", help="start from this transformer instead of the folder's")
    add("--data", metavar="DIR", help="pictures and metadata.jsonl")
    add("--out", metavar="DIR", default="runs/train",
        help="folder of the run; an unfinished run there resumes (default: %(default)s)")
    add("--export", action="store_true", help="write the newest checkpoint of --out as one official file, then exit")
    add("--plan", type=ranks_and_gigabytes, metavar="RANKSxGB",
        help="print the memory the run takes on such cards, 8x80 for example, then exit; needs no weights and no GPU")
    add("--dry-run", action="store_true",
        help="check settings, listing and the headers of all files, print the settings, then exit")


def _pictures(add: Add) -> None:
    add("--res", type=int, default=1024, help="side of the training squares, pixels (default: %(default)s)")
    add("--aspect", action="store_true", help="not squares: the nearest of eleven aspects, about RES x RES pixels")
    add("--factor", type=int, default=16, choices=(8, 16), help="down-sampling of the VAE (default: %(default)s)")
    add("--dilation", type=int, choices=(1, 2),
        help="of the VAE's first convolution at factor 16; the release has 1 (default: 2)")
    add("--latent-shift", action=argparse.BooleanOptionalAction,
        help="latent = (raw - shift) * scale; without it raw * scale (default: with)")
    add("--flip", action=argparse.BooleanOptionalAction, help="mirror each crop with probability 1/2 (default: yes)")
    add("--cache-latents", action="store_true",
        help="train on central crops, encoded once into DATA/.latents; nothing is mirrored")
    add("--drop-caption", type=float, default=0.1,
        help="probability of the empty caption, which cfg needs (default: %(default)s)")
    add("--t5-length", type=int, help="tokens of T5 (default: SD3 77, Flux-dev 512, Flux-schnell 256)")


def _objective(add: Add) -> None:
    add("--recipe", choices=tuple(RECIPES),
        help="everything in which paper and released trainer differ; single flags override it")
    add("--objective", choices=OBJECTIVES, help="paper: bands of the velocity; release: bands of the denoised latent; "
        "velocity: no bands; noise: bands of the noise (default: paper)")
    add("--bands", type=four_numbers, default=(1.0, 1.0, 1.0, 1.0), help="weights of LL,LH,HL,HH (default: 1,1,1,1)")
    add("--huber", type=float, default=0.0,
        help="width of the pseudo-Huber penalty in latent units; 0: squared error (default: 0)")
    add("--density", choices=DENSITIES, help="distribution of sigma (default: SD3 logit_normal, Flux uniform)")
    add("--time-shift", type=shift_or_tokens, metavar="S",
        help='shift of sigma; above 1 is noisier; "tokens": as Flux-dev samples at --res (default: SD3 3, Flux 1)')
    add("--guidance", type=float, help="guidance fed to Flux-dev; other models have no such input (default: 3.5)")
    add("--weighting", choices=SCHEMES, help="w(sigma) of the loss (default: none)")


def _optimizer(add: Add) -> None:
    add("--steps", type=int, default=20_000, help="optimizer steps of the complete run (default: %(default)s)")
    add("--batch", type=int, default=32, help="pictures per step, over all ranks (default: %(default)s)")
    add("--lr", type=float, default=1e-6, help="learning rate, constant after the warm-up (default: %(default)s)")
    add("--warmup", type=int, default=0, help="steps of linear warm-up (default: %(default)s)")
    add("--weight-decay", type=float, default=1e-4, help="of AdamW (default: %(default)s)")
    add("--clip", type=float, default=1.0, help="largest gradient norm (default: %(default)s)")
    add("--ema", type=float, default=0.0,
        help="decay per step of averaged weights, which are then exported; 0: none (default: 0)")
    add("--state", default="fp32", choices=("fp32", "bf16"),
        help="weights and Adam moments: fp32, 12 bytes per parameter, or bf16, 6, stochastically rounded (default: fp32)")


def _memory(add: Add) -> None:
    add("--shard", default="none", choices=("none", "zero2", "zero3"),
        help="split weights, gradients, moments over ranks; zero2 keeps gathered weights until backward (default: none)")
    add("--offload", action="store_true", help="with --shard on GPUs: weights, gradients, moments and AdamW on the host")
    add("--accumulate", type=int, default=1, metavar="N",
        help="backward passes per step, each of batch / N / ranks pictures (default: 1)")
    add("--activations", choices=("keep", "recompute", "host"),
        help="recompute each block in backward; host: its inputs wait on the host (default: recompute from 16,384 tokens)")
    add("--ema-on-host", action="store_true", help="averaged weights in host memory")


def _machine(add: Add) -> None:
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--dtype", choices=("fp32", "bf16"), help="of the arithmetic (default: bf16 on cuda, fp32 on cpu)")
    add("--save-dtype", default="fp16", choices=tuple(DTYPES), help="of the exported file (default: %(default)s)")
    add("--save-every", type=int, default=500, help="steps between checkpoints (default: %(default)s)")
    add("--keep", type=int, default=2, metavar="N", help="newest checkpoints to keep (default: %(default)s)")
    add("--log-every", type=int, default=10, help="steps between log lines (default: %(default)s)")
    add("--sample-every", type=int, default=0, help="steps between sample pictures; 0: never (default: %(default)s)")
    add("--seed", type=int, default=0, help="of every random draw (default: %(default)s)")
    add("--threads", type=int, default=max(1, (os.cpu_count() or 1) // local_ranks),
        help="CPU threads per rank (default: %(default)s)")
