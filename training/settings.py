"""The settings of a training run: the command line of train.py, resolved once into a frozen Settings.

Order     parse() reads the flags, check() refuses values out of range, settle() resolves what recipe and family decide
Recipes   "paper" and "release" set everything in which the two differ; single flags override them (docs/differences.md)
Resume    a run resumes only with equal IDENTITY and equal weights, wherever they lie; other settings may change
Check     python -m pytest tests/test_settings.py ; python train.py --help
"""

import argparse
import math
import operator
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from checkpoint import DTYPES
from family import Family
from files import flag, from_torchrun, need, read_flags
from flow import DENSITIES, SCHEMES, SEEDS, SNR_HUBER, sample_sigma
from layers import RULES
from machine.memory import GIB, UNKNOWN
from text import check_t5_length
from wavelet import MASKS, OBJECTIVES

RECOMPUTE_TOKENS = 16_384  # 4096 px at factor 16: from here on activations are recomputed unless told otherwise
MOST = {"batch": 2**16, "threads": 1024}
LEAST_SHARE = 0.001  # of drawn sigmas that --sigma-range must keep
RECIPES = {  # what --recipe sets; None: the family's default
    "paper": {"objective": "paper", "dilation": 2, "latent_shift": True, "weighting": "none", "t5_length": None,
              "flip": False, "drop_caption": 0.0, "resize": "lanczos", "small": "refuse"},
    "release": {"objective": "release", "dilation": 1, "latent_shift": False, "weighting": "none", "t5_length": 77,
                "flip": True, "drop_caption": 0.0, "resize": "bilinear", "small": "enlarge"}}
OURS = RECIPES["paper"] | {"flip": True, "drop_caption": 0.1}


@dataclass(frozen=True)
class Machine:
    """`ranks` processes, each with a card of `card` bytes (on CPUs: its share of the host's memory)."""

    ranks: int
    card: int
    host: int = UNKNOWN         # bytes that all ranks of a host share
    ranks_per_host: int = 8


def numbers(names: str, kind: type = float, fits: Callable[..., bool] = lambda *_: True,
            accepted: str = "") -> Callable[[str], tuple]:
    """A type for argparse: numbers from 0, joined by commas, one per name, that fit."""
    count = len(names.split(","))
    kinds = f"{ {2: 'two', 4: 'four', 5: 'five'}[count]} {'numbers' if kind is float else 'integers'}"

    def parsed(text: str) -> tuple:
        try:
            values = tuple(kind(v) for v in text.split(","))
        except ValueError:
            values = ()
        if len(values) != count or not all(0 <= value < math.inf for value in values) or not fits(*values):
            raise argparse.ArgumentTypeError(f"{text!r}: {kinds} from 0 for {names}{accepted and f', {accepted}'}")
        return values

    return parsed


def number_or_range(text: str) -> float | tuple[float, float]:
    try:
        return numbers("LOW,HIGH", float, operator.lt, "LOW < HIGH")(text) if "," in text else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: a number, or LOW,HIGH") from None


def shift_or_tokens(text: str) -> float | str:
    try:
        return text if text == "tokens" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r}: 0.001 to 1,000, or "tokens"') from None


def ranks_and_gigabytes(text: str) -> Machine:
    parts = re.fullmatch(r"([1-9]\d*)x(\d+\.?\d*)(?::(\d+\.?\d*))?", text)
    if not parts:
        raise argparse.ArgumentTypeError(f"{text!r}: RANKSxGB, such as 8x80, or RANKSxGB:HOSTGB, such as 8x80:512")
    ranks, card, host = parts.groups()
    return Machine(int(ranks), round(float(card) * GIB), round(float(host) * GIB) if host else UNKNOWN)


@dataclass(frozen=True)
class Settings:
    """Every setting of a run, each a flag of train.py. None and "tokens" stand where settle() has yet to decide."""

    # what
    model: str | None = flag(None, "name of a folder in models/ (default: tiny-sd3)")
    weights: str | None = flag(None, "another model folder, as downloaded", metavar="DIR")
    transformer: str | None = flag(None, "start from this transformer instead of the folder's", metavar="FILE")
    data: str | None = flag(None, "pictures and metadata.jsonl", metavar="DIR")
    out: str = flag("runs/train", "folder of the run; an unfinished run there resumes", metavar="DIR")
    export: bool = flag(False, "write the newest checkpoint of --out as one official file, then exit")
    plan: Machine | None = flag(
        None, "print the memory the run takes on such cards and hosts, 8x80 or 8x80:512 for example, then exit; needs "
        "no weights and no GPU", type=ranks_and_gigabytes, metavar="RANKSxGB[:HOSTGB]")
    dry_run: bool = flag(False, "check settings, metadata.jsonl and the headers of all files, print the settings, exit")
    # pictures
    res: int = flag(1024, "side of the training squares, pixels")
    aspect: bool = flag(False, "aspect-ratio buckets instead of squares: eleven, each of about RES x RES pixels")
    factor: int = flag(16, "pixels per latent position: 8, or 16 by the partition trick", choices=(8, 16))
    dilation: int | None = flag(None, "of the VAE's first convolution at factor 16; 1: as released (default: 2)",
                                choices=(1, 2))
    latent_shift: bool | None = flag(None, "latent = (raw - shift) * scale; without it raw * scale (default: with)")
    vae_dtype: str = flag("fp32", "compute dtype of the VAE; bf16 encodes faster on GPUs, its latents are 1 %% off",
                          choices=("fp32", "bf16"))
    positions: str | None = flag(
        None, "rule for places beyond --trained-side (default: as the file records, else stock)", choices=RULES)
    trained_side: int | None = flag(
        None, "tokens per side that the model was trained with: 64 as published (default: as the file records)",
        metavar="N")
    flip: bool | None = flag(None, "mirror each crop with probability 1/2 (default: yes)")
    resize: str | None = flag(None, "interpolation of pictures to the crop's size (default: lanczos)",
                              choices=("lanczos", "bilinear"))
    small: str | None = flag(None, "pictures below --res: refuse the run, skip or enlarge them (default: refuse)",
                             choices=("refuse", "skip", "enlarge"))
    cache: str | None = flag(None, "where .embeddings and .latents are kept (default: the data folder)", metavar="DIR")
    cache_latents: bool = flag(False, "train on central crops, encoded once into .latents; nothing is mirrored")
    drop_caption: float | None = flag(None, "probability of the empty caption, which cfg needs (default: 0.1)")
    t5_length: int | None = flag(None, "tokens of T5 (default: SD3 77, Flux-dev 512, Flux-schnell 256)")
    # objective
    recipe: str | None = flag(None, "all settings in which paper and released trainer differ; single flags override it",
                              choices=tuple(RECIPES))
    objective: str | None = flag(
        None, "paper: bands of the velocity; release: of the denoised latent; velocity: no bands; noise: bands of the "
        "noise; snr_huber: UltraFlux's (default: paper)", choices=OBJECTIVES)
    bands: tuple[float, ...] = flag("1,1,1,1", "weights of LL,LH,HL,HH", type=numbers("LL,LH,HL,HH"))
    levels: int = flag(1, "levels of the Haar transform: LL is split again", metavar="N")
    huber: float = flag(0.0, "width of the pseudo-Huber penalty in latent units; 0: squared error")
    huber_snr: tuple[float, ...] | None = flag(
        None, "constants of snr_huber; a, g and b are ours, since the authors published none (default: "
        f"{','.join(f'{value:g}' for value in SNR_HUBER)})", metavar="CMIN,CMAX,A,G,B",
        type=numbers("c_min,c_max,a,g,b", float, lambda low, high, a, g, b: 0 < low <= high and g > 0,
                     "0 < c_min <= c_max, g > 0"))
    mask: str | None = flag(
        None, "above sigma 0.3, train only places with detail. lwd: detail of the clean latent; lwd_release: of z, in "
        "the released code's channels (default: all places)", choices=MASKS)
    density: str | None = flag(None, "density of sigma (default: SD3 logit_normal, Flux uniform)", choices=DENSITIES)
    beta: tuple[int, ...] | None = flag(None, "parameters of --density beta, integers from 1 (default: 2,4)",
                                        type=numbers("A,B", int, lambda a, b: 1 <= min(a, b) and a + b <= 1000,
                                                     "at least 1, together at most 1000"), metavar="A,B")
    sigma_range: tuple[float, ...] | None = flag(None, "draw sigma again until it is in this range (default: 0,1)",
                                                 type=numbers("LOW,HIGH", float, lambda low, high: low < high <= 1,
                                                              "LOW < HIGH <= 1"), metavar="LOW,HIGH")
    time_shift: float | str | None = flag(
        None, 'shift of sigma; above 1 is noisier; "tokens": as Flux-dev samples at --res (default: SD3 3, Flux 1)',
        type=shift_or_tokens, metavar="S")
    guidance: float | tuple[float, ...] | None = flag(
        None, "guidance fed to Flux-dev: a number, or a range drawn from per picture. 3.5 is the paper's; users of its "
        "release and URAE report better results with 1. Other models have no such input (default: 3.5)",
        type=number_or_range, metavar="G|LOW,HIGH")
    weighting: str | None = flag(None, "w(sigma) of the loss (default: none)", choices=SCHEMES)
    # optimizer
    steps: int = flag(20_000, "optimizer steps of the complete run")
    batch: int = flag(32, "pictures per step, over all ranks")
    lr: float = flag(1e-6, "learning rate, constant after the warm-up")
    warmup: int = flag(0, "steps of linear warm-up")
    weight_decay: float = flag(1e-4, "weight decay of AdamW")
    clip: float = flag(1.0, "clip gradients to this norm")
    ema: float = flag(0.0, "decay per step of averaged weights, which are then exported; 0: none")
    state: str = flag("fp32", "weights and moments: fp32, 12 bytes per parameter, or bf16, 6, stochastically rounded",
                      choices=("fp32", "bf16"))
    lora: int | None = flag(None, "train an adapter of this rank beside frozen weights; 16 is usual, with --lr 1e-4",
                            metavar="RANK")
    lora_init: str | None = flag(None, "minor: the adapter begins as the smallest singular components of each matrix, "
                                 "as URAE (default: as zero)", choices=("minor",))
    # memory
    shard: str = flag("none", "split weights, gradients, moments over ranks; gathered weights stay until backward in "
                      "zero2 and are gathered again in zero3", choices=("none", "zero2", "zero3"))
    offload: bool = flag(False, "with --shard on GPUs: weights, gradients, moments and AdamW on the host")
    sequence: int = flag(1, "ranks that share the tokens of each picture, where one per rank does not fit",
                         metavar="N")
    accumulate: int = flag(1, "backward passes per step, each of batch / N / ranks pictures", metavar="N")
    activations: str | None = flag(
        None, "of the blocks: kept; recomputed in backward; or recomputed, with their inputs in host memory (default: "
        "recompute from 16,384 tokens)",
        choices=("keep", "recompute", "host"))
    ema_on_host: bool = flag(False, "averaged weights in host memory")
    compile: bool = flag(False, "torch.compile of the blocks: equal to rounding; its gain on GPUs was not measured")
    # machine, run
    device: str | None = flag(None, "cpu or cuda (default: cuda where there is one)")
    dtype: str | None = flag(None, "compute dtype (default: bf16 on cuda or with --state bf16, else fp32)",
                             choices=("fp32", "bf16"))
    save_dtype: str = flag("fp16", "dtype of the exported file", choices=tuple(DTYPES))
    save_every: int = flag(500, "steps between checkpoints")
    keep: int = flag(2, "newest checkpoints to keep", metavar="N")
    log_every: int = flag(10, "steps between log lines")
    sample_every: int = flag(0, "steps between sample pictures; 0: never")
    validate: str | None = flag(None, "held-out pictures and metadata.jsonl: their loss is logged and never trained on",
                                metavar="DIR")
    validate_every: int | None = flag(
        None, "steps between held-out losses (default: 120 * held-out pictures / --batch, which cost 3 %%)",
        metavar="N")
    seed: int = flag(0, "seed of every random draw")
    threads: int | None = flag(None, "CPU threads per rank (default: the cores, divided by the ranks of this host)")

    @property
    def sharded(self) -> bool:
        return self.shard != "none"

    @property
    def state_dtype(self) -> torch.dtype:
        """Of what is trained, and of its moments."""
        return torch.bfloat16 if self.state == "bf16" else torch.float32

    @property
    def weight_dtype(self) -> torch.dtype:
        """In which the transformer is stored: that of --state; below an adapter bf16, if --dtype or --state is."""
        return torch.bfloat16 if self.lora and self.dtype == "bf16" else self.state_dtype

    @property
    def guidance_shown(self) -> float | None:
        """Where one number is needed, in sample pictures and held-out losses: the middle of a range."""
        return sum(self.guidance) / 2 if isinstance(self.guidance, tuple) else self.guidance

    @property
    def tokens(self) -> int:
        """Image tokens of a training square."""
        return (self.res // (2 * self.factor)) ** 2


MOST_SHIFT = 1000.0  # time shift: at 8,192 px and factor 16, Flux's by tokens would leave noise alone
# What decides the numbers of a run. A run resumes only with equal values of these; the other settings may change.
IDENTITY = (
    "res", "aspect", "factor", "dilation", "latent_shift", "vae_dtype", "flip", "resize", "cache_latents",
    "drop_caption", "t5_length", "objective", "bands", "levels", "huber", "huber_snr", "mask", "density", "beta",
    "sigma_range", "time_shift", "guidance", "weighting", "batch", "lr", "warmup", "weight_decay", "clip", "ema",
    "state", "lora", "lora_init", "dtype", "seed")
SOURCE = ("model", "weights", "transformer")  # where the weights lie; a checkpoint also records what they are


def settle(settings: Settings, family: Family) -> Settings:
    """Resolve unset settings from the recipe, then the model family; ValueError if two settings contradict."""
    family.check_guidance(settings.guidance)
    recipe = RECIPES[settings.recipe] if settings.recipe else OURS
    if not family.release_drops_latent_shift:
        recipe = recipe | {"latent_shift": True}
    if settings.cache_latents and settings.flip:
        raise ValueError("--flip --cache-latents: cached latents are of central crops, never mirrored; give one")
    shift = settings.time_shift
    if shift == "tokens":
        shift = family.by_tokens(settings.tokens)
        need(shift <= MOST_SHIFT, "time-shift", f"tokens ({shift:.4g} at --res {settings.res})", "a number up to 1,000")
    offload = settings.offload and settings.device != "cpu"  # on a CPU everything is in host memory already
    settled = replace(
        settings, **{name: value for name, value in recipe.items() if getattr(settings, name) is None},
        density=settings.density or family.density, time_shift=shift or family.training_shift, offload=offload,
        guidance=family.guidance if settings.guidance is None else settings.guidance,
        activations=settings.activations or ("recompute" if settings.tokens >= RECOMPUTE_TOKENS else "keep"))
    if settled.objective == "snr_huber":
        settled = replace(settled, huber_snr=settled.huber_snr or SNR_HUBER)
    if settled.density == "beta":
        settled = replace(settled, beta=settled.beta or (2, 4))
    check_objective(settled)
    return settled


def check_objective(s: Settings) -> None:
    """ValueError if two settings of the objective contradict, or hardly a sigma is drawn in --sigma-range."""
    if s.objective == "velocity" and (s.huber or s.levels > 1 or set(s.bands) != {1.0}):
        raise ValueError("--objective velocity has no bands: give --objective paper, which is the same with equal ones")
    if s.objective == "snr_huber" and s.huber:
        raise ValueError(f"--huber {s.huber:g}: the width of --objective snr_huber follows sigma; give --huber-snr")
    for name, of in (("huber_snr", s.objective == "snr_huber"), ("beta", s.density == "beta")):
        if getattr(s, name) and not of:
            owner = "--objective snr_huber" if name == "huber_snr" else "--density beta"
            raise ValueError(f"--{name.replace('_', '-')} is a setting of {owner}; give both or neither")
    if s.sigma_range:
        drawn = sample_sigma(100_000, s.density, s.time_shift, generator=torch.Generator().manual_seed(0), beta=s.beta)
        share = ((drawn >= s.sigma_range[0]) & (drawn <= s.sigma_range[1])).double().mean().item()
        need(share >= LEAST_SHARE, "sigma-range", ",".join(f"{value:g}" for value in s.sigma_range),
             f"a range with {LEAST_SHARE:.1%} of the sigmas of --density {s.density} or more; this one has {share:.2%}")


def check(s: Settings, ranks: int) -> None:
    """Refuse a setting out of range: ValueError that names the flag, its value and what is accepted."""
    check_t5_length(s.t5_length)
    need(s.sequence > 0 and ranks % s.sequence == 0, "sequence", s.sequence, f"a divisor of {ranks}, the ranks")
    need(1 <= s.levels <= 8, "levels", s.levels, "1 to 8")
    step, groups = 2**s.levels * s.factor, ranks // s.sequence
    need(0 < s.res <= 2**16 and s.res % step == 0, "res", s.res,
         f"a multiple of {step} at --factor {s.factor}{f' --levels {s.levels}' if s.levels > 1 else ''}, "
         f"at most {2**16:,}")
    for name in ("steps", "batch", "accumulate", "save-every", "log-every", "keep", "threads"):
        value, most = getattr(s, name.replace("-", "_")), MOST.get(name, 10**9)
        need(1 <= value <= most, name, value, f"1 or more, at most {most:,}")
    for name in ("lr", "huber", "warmup", "weight-decay", "seed", "sample-every"):
        value = getattr(s, name.replace("-", "_"))
        need(0 <= value < math.inf, name, value, "0 or more")
    need(s.drop_caption is None or 0 <= s.drop_caption <= 1, "drop-caption", s.drop_caption, "a probability")
    need(s.batch % (groups * s.accumulate) == 0, "batch", s.batch, f"a multiple of {groups * s.accumulate}, {groups} "
         f"{'ranks' if s.sequence == 1 else 'groups of ranks'} times --accumulate {s.accumulate}")
    need(0 < s.clip < math.inf, "clip", s.clip, "a number above 0")
    need(s.time_shift in (None, "tokens") or 1e-3 <= s.time_shift <= MOST_SHIFT, "time-shift", s.time_shift,
         '0.001 to 1,000, or "tokens"')
    need(s.seed < SEEDS, "seed", s.seed, "0 to 2^32 - 1")
    need(s.guidance is None or 0 <= s.guidance_shown < math.inf, "guidance", s.guidance, "a number from 0")
    need(s.validate_every is None or s.validate_every >= 1, "validate-every", s.validate_every, "1 or more")
    if s.validate_every and not s.validate:
        raise ValueError("--validate-every: give --validate DIR, the held-out pictures")
    need(not s.offload or s.sharded, "offload", s.offload, "it with --shard zero2 or zero3")
    if s.offload and s.state == "bf16":
        raise ValueError("--offload --state bf16: random rounding takes a CPU as long as 20 steps; give one of them")
    if s.dtype == "fp32" and s.state == "bf16":
        raise ValueError("--dtype fp32 --state bf16: bf16 weights compute in bf16; give one of them")
    need(0 < max(s.bands) <= 1e6, "bands", ",".join(f"{weight:g}" for weight in s.bands),
         "weights of at most 1,000,000, at least one above 0")
    need(not s.huber or 1e-4 <= s.huber <= 1e4, "huber", s.huber, "0 for the squared error, or 0.0001 to 10,000")
    need(s.lora is None or 1 <= s.lora <= 4096, "lora", s.lora, "a rank, 1 to 4,096")
    need(s.lora or not s.lora_init, "lora-init", s.lora_init, "it with --lora RANK")
    need(0 <= s.ema < 1, "ema", s.ema, "0 for none, or a decay below 1")


# ---- the command line

GROUPS = {"model": "input and output", "res": "pictures", "recipe": "objective", "steps": "optimizer",
          "shard": "memory", "device": "machine", "save_dtype": "run"}  # the first flag of each


def parse(argv: Sequence[str] | None = None) -> Settings:
    """The command line of train.py; what the model family decides is still open."""
    s = read_flags(Settings, "Fine-tune the transformer of a model folder on captioned pictures.", GROUPS, argv)
    # plans are made for cards, wherever we are
    device = s.device or ("cuda" if torch.cuda.is_available() or s.plan is not None else "cpu")
    cores_per_rank = (os.cpu_count() or 1) // from_torchrun("LOCAL_WORLD_SIZE", 1)
    return replace(s, device=device, dtype=s.dtype or ("fp32" if device == "cpu" and s.state == "fp32" else "bf16"),
                   threads=max(1, cores_per_rank) if s.threads is None else s.threads,
                   model=s.model or (None if s.weights or s.export else "tiny-sd3"))
