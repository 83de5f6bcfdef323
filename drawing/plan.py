"""How much memory a picture takes, phase by phase, before a weight is read; and what is done so that it suffices.

Phases      the text encoders, then the transformer, then the VAE. In a large memory the transformer stays while the VAE
            works, so that each picture is complete before the next; in a smaller one all pictures of a phase are made,
            and its weights go before the next one's come
Chosen      the fastest that fits: guidance as one batch of two or as two passes; all blocks resident, or the others
            streamed (drawing/streaming.py)
Counted     weights by their shapes; activations by running the code on tensors without storage
Not in it   RESERVE of a card for the CUDA context and fragmentation, PROCESS of a host for Python and torch; pages of
            the file while a block is read, which the system counts to the process but can take back
Check       python -m pytest tests/test_drawing_plan.py ; python sample.py --plan --model flux --memory 24 --res 4096
"""

import re
from dataclasses import dataclass
from functools import cache

import torch

from checkpoint import DTYPES
from drawing.settings import Settings
from drawing.stages import Stage
from family import FLUX_DEV, SD3, Family
from files import from_torchrun, launched, need
from flux import Flux, FluxConfig
from layers import Modulation, blocks_of
from machine.memory import (
    GIB,
    SMALL_MODEL,
    T5_WIDTH,
    UNKNOWN,
    decoding_bytes,
    encoding_bytes,
    host_memory,
    peak_bytes,
    vae_parameters,
)
from mmdit import MMDiT, MMDiTConfig
from vae import VAEConfig

RESERVE, PROCESS = GIB, GIB
T5_BLOCK, T5_EMBEDDINGS = 193_000_000, 132_000_000  # parameters of T5-XXL, which is streamed
CLIPS = {SD3.text: 818_000_000, FLUX_DEV.text: 123_000_000}
MOST_AT_ONCE = 256         # pictures whose texts and latents are held together


@dataclass(frozen=True)
class Plan:
    batched: bool = True         # classifier-free guidance as one batch of two, not as two passes
    resident: int | None = None  # blocks whose weights stay; None: all
    stays: bool = True           # the transformer, while the VAE works
    rows: tuple[tuple[str, int], ...] = ()  # what each phase takes, bytes
    memory: int = UNKNOWN        # what there is, bytes
    blocks: int = 0

    @property
    def most(self) -> int:
        """Bytes of the largest phase; where the transformer stays, with what it and the VAE keep in each other's."""
        text, latents, pixels = (sum(size for name, size in self.rows if name.startswith(phase)) for phase in PHASES)
        transformer, vae = (sum(size for name, size in self.rows if name in kept and self.stays) for kept in KEPT)
        return max(text, latents + vae, pixels + transformer)

    def described(self) -> str:
        """What is done, and whether it suffices."""
        there = self.blocks if self.resident is None else self.resident
        parts = [f"{there} of {self.blocks} blocks resident" if there < self.blocks else f"{there} blocks resident"]
        parts += [] if self.batched else ["guidance in two passes"]
        parts += [] if self.stays else ["the transformer goes before the VAE comes"]
        fits = "fit into" if self.most <= self.memory else "do not fit into"
        return f"memory: {', '.join(parts)}: {self.most / GIB:.2f} GiB {fits} {self.memory / GIB:.2f} GiB"

    def table(self) -> str:
        return "\n".join([*(f"{size / GIB:8.2f} GiB  {name}" for name, size in self.rows), self.described()])


PHASES = "text", "latent", "picture"
KEPT = ({"latent: resident weights", "latent: buffers of two blocks", "latent: modulations of all steps"},
        {"picture: VAE weights"})  # while the other one works


def memory_of(given: str | None, device: str) -> int:
    """Bytes for weights and activations: --memory, or what the card has free, or what the process may have."""
    if given is not None:
        size = re.fullmatch(r"(\d{1,5}(?:\.\d+)?) ?(?:GiB|G|GB)?", given, re.I)
        need(bool(size) and float(size[1]) > 0, "memory", given, "GiB, such as 8 or 8GiB")
        return round(float(size[1]) * GIB)
    if device == "cpu":
        return host_memory() // from_torchrun("LOCAL_WORLD_SIZE", 1) - PROCESS
    return torch.cuda.mem_get_info(device)[0] - RESERVE


def choose(settings: Settings, family: Family, config: MMDiTConfig | FluxConfig, vae_config: VAEConfig,
           stages: list[Stage]) -> Plan:
    """The fastest plan that fits into the memory there is; ValueError if none fits into the one that was given."""
    outside, of_blocks, _ = parameters_of(family, config)
    small, blocks = outside + sum(every for _, every in of_blocks) < SMALL_MODEL, len(of_blocks)
    if small and settings.device == "cpu" and settings.memory is None and not settings.plan:
        return Plan()
    memory = memory_of(settings.memory, settings.device)
    batches = (True, False) if settings.cfg != 1 else (True,)
    plans = [(batched, None, stays) for stays in (True, False) for batched in batches]
    plans += [(batched, resident, False) for batched in batches for resident in range(blocks - 1, -1, -1)]
    for batched, resident, stays in plans:
        plan = Plan(batched, resident, stays, rows_of(settings, family, config, vae_config, stages, batched, resident),
                    memory, blocks)
        if plan.most <= memory:
            return plan
    if settings.memory is not None and not settings.plan:
        raise ValueError(f"--memory {settings.memory}: --res {settings.res} takes at least {plan.most / GIB:.2f} GiB; "
                         "--plan shows for what")
    return plan


@cache
def parameters_of(family: Family, config: MMDiTConfig | FluxConfig) -> tuple[int, tuple[tuple[int, int], ...], int]:
    """Parameters without those of modulations: outside the blocks, and (in matrices, all) of each block; then how many
    numbers all modulations give."""
    with torch.device("meta"):
        model = family.model(config)
    modulations = [m for m in model.modules() if isinstance(m, Modulation)]
    hoisted = {id(p) for m in modulations for p in m.parameters()}
    blocks = [[p for p in block.parameters() if id(p) not in hoisted] for block in blocks_of(model)]
    inside = hoisted | {id(p) for block in blocks for p in block}
    outside = sum(p.numel() for p in (*model.parameters(), *model.buffers()) if id(p) not in inside)
    of_blocks = tuple((sum(p.numel() for p in block if p.ndim == 2), sum(p.numel() for p in block)) for block in blocks)
    return outside, of_blocks, sum(m.chunks * config.hidden_size for m in modulations)


def rows_of(settings: Settings, family: Family, config: MMDiTConfig | FluxConfig, vae_config: VAEConfig,
            stages: list[Stage], batched: bool, resident: int | None) -> tuple[tuple[str, int], ...]:
    """(phase: what, bytes) for one way of drawing."""
    dtype, vae_dtype = DTYPES[settings.dtype], DTYPES[settings.vae_dtype]
    outside, blocks, outputs = parameters_of(family, config)
    there, matrix_bytes = blocks[:resident], 1 if settings.store else dtype.itemsize  # per number of a matrix
    weights = dtype.itemsize * outside + sum(matrix_bytes * matrices + dtype.itemsize * (every - matrices)
                                             for matrices, every in there)
    in_turn = blocks if settings.store else blocks[len(there):]  # all are cast in the buffers, or those that are read
    passes, levels = 1 if settings.cfg == 1 else 2, max(len(stage.sigmas) for stage in stages)
    ranks = launched()[1] if settings.together else 1  # which share the tokens
    text = 0
    if config.context_dim == T5_WIDTH:  # embeddings, the first block and two buffers; CLIP; texts
        text = T5_EMBEDDINGS + 3 * T5_BLOCK + CLIPS[family.text]
        prompts = passes - 1 + (MOST_AT_ONCE if settings.prompts else min(MOST_AT_ONCE, len(settings.prompt)))
        text += 2 * prompts * family.text_tokens(settings.t5_length) * T5_WIDTH  # of one block and of the next
    rows = {"text: encoders": text * (4 if settings.dtype == "fp32" else 2),
            "latent: resident weights": weights,
            "latent: buffers of two blocks": 2 * dtype.itemsize * max((every for _, every in in_turn), default=0),
            "latent: modulations of all steps": dtype.itemsize * passes * levels * outputs,
            "latent: activations": max(activation_bytes(
                family, config, dtype, stage.height // settings.factor,
                2 * -(-stage.width // (settings.token_px * ranks)), passes if batched else 1,
                -(-family.text_tokens(settings.t5_length) // ranks)) for stage in stages),
            "picture: VAE weights": vae_dtype.itemsize * vae_parameters(vae_config),
            "picture: decoding": max(decoding_bytes(vae_config, vae_dtype, stage.width, stage.height, settings.factor)
                                     for stage in stages)}
    redrawn = stages if settings.redraw else stages[1:]
    if encoded := [encoding_bytes(vae_config, vae_dtype, stage.width, stage.height, settings.factor, 2)
                   for stage in redrawn]:
        rows["picture: decoding"] = max(rows["picture: decoding"], *encoded)
    return tuple((name, size) for name, size in rows.items() if size)


@cache
def activation_bytes(family: Family, config: MMDiTConfig | FluxConfig, dtype: torch.dtype, height: int, width: int,
                     batch: int, context: int) -> int:
    """Of one velocity, for a latent of this size."""
    def run(model: MMDiT | Flux) -> None:
        with torch.no_grad():
            latent, sigma = torch.empty(batch, config.in_channels, height, width), torch.empty(batch)
            text = torch.empty(batch, context, config.context_dim, dtype=dtype)
            pooled = torch.empty(batch, config.pooled_dim, dtype=dtype)
            model(latent, sigma, text, pooled, sigma if getattr(config, "guidance", False) else None)

    return peak_bytes(lambda: family.model(config), run, dtype)
