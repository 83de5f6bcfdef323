"""The published autoencoder at factor 8 beside diffusers', on the same random weights, in one run.

Sides    bands          ours, as it runs: large maps in bands of rows
         complete maps  ours without bands
         diffusers      AutoencoderKL
         tiled          the same with enable_tiling(): another picture, with seams; its difference is printed
Counted  GB of live tensors beside the weights, from the shapes, without computing; not of tiles: that is slow
Others   time, peak and forward memory: as in speed.py
Run      python bench/autoencoder.py decode --res 1024
         python bench/autoencoder.py encode --res 4096 --dtype bf16 --count
Check    python -m pytest tests/test_speed.py
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import vae as vae_file  # noqa: E402
from bench.speed import ROUNDS, Step, fresh, largest_difference, memory, report, take_turns, where  # noqa: E402
from checkpoint import DTYPES  # noqa: E402
from family import OFFICIAL_VAE  # noqa: E402
from machine.memory import peak_bytes  # noqa: E402
from vae import VAE, VAEConfig  # noqa: E402

SIDES = ("bands", "complete maps", "diffusers", "tiled")
PARTS = ("decode", "encode")


def peer(config: VAEConfig) -> nn.Module:
    from diffusers import AutoencoderKL  # a package of requirements-dev.txt

    levels = len(config.decoder_widths)
    vae = AutoencoderKL(3, 3, ("DownEncoderBlock2D",) * levels, ("UpDecoderBlock2D",) * levels, config.decoder_widths,
                        config.encoder_blocks, latent_channels=config.latent_channels,
                        norm_num_groups=config.norm_groups, use_quant_conv=False, use_post_quant_conv=False)
    return vae.eval()


def write_weights(config: VAEConfig, folder: str) -> None:
    torch.manual_seed(0)
    peer(config).save_pretrained(folder)


def result(vae: nn.Module, side: str, part: str, x: Tensor) -> Tensor:
    """The picture of a raw latent, or the mean of an encoded picture."""
    if not isinstance(vae, VAE):
        return vae.decode(x).sample if part == "decode" else vae.encode(x).latent_dist.mean
    usual = vae_file.BANDED_PIXELS
    try:
        if side == "complete maps":
            vae_file.BANDED_PIXELS = x.shape[2] * x.shape[3] * 64
        return vae.decode(x, factor=8) if part == "decode" else vae.moments(x, factor=8)[0]
    finally:
        vae_file.BANDED_PIXELS = usual


def shape_of_input(part: str, pixels: int, config: VAEConfig) -> tuple[int, ...]:
    return (1, config.latent_channels, pixels // 8, pixels // 8) if part == "decode" else (1, 3, pixels, pixels)


def step_of(side: str, part: str, pixels: int, dtype: str, folder: str, config: VAEConfig, device: str) -> Step:
    """The call that is timed, of weights in the folder."""
    if side in ("bands", "complete maps"):
        vae = VAE.load(folder, device, DTYPES[dtype], config.norm_groups, scale_factor=1.0, shift_factor=0.0)
    else:
        from diffusers import AutoencoderKL

        vae = AutoencoderKL.from_pretrained(folder, torch_dtype=DTYPES[dtype]).to(device).eval()
        if side == "tiled":
            vae.enable_tiling()
    x = torch.randn(shape_of_input(part, pixels, config), generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    x = x.to(device, DTYPES[dtype])
    return lambda: result(vae, side, part, x)


def counted(side: str, part: str, pixels: int, dtype: str, config: VAEConfig) -> str:
    """GB of live tensors beside the weights."""
    def build() -> nn.Module:
        return peer(config) if side == "diffusers" else VAE(config)

    @torch.no_grad()
    def run(vae: nn.Module) -> None:
        result(vae, side, part, torch.empty(shape_of_input(part, pixels, config), dtype=DTYPES[dtype]))

    return f"{peak_bytes(build, run, DTYPES[dtype]) / 1e9:.2f}"


def bench(part: str, pixels: int, dtype: str, device: str, threads: int, rounds: int, count: bool,
          config: VAEConfig = OFFICIAL_VAE) -> None:
    """Print a row per side: counted bytes and, unless `count`, time and memory."""
    columns = {"counted GB": {side: counted(side, part, pixels, dtype, config) for side in SIDES[:3]} | {"tiled": "–"}}
    title = f"{part}, widths {config.decoder_widths}, {pixels} px, factor 8, {dtype}, batch 1"
    if count:
        print(title, *(f"{side:16}{gb:>8} GB" for side, gb in columns["counted GB"].items()), sep="\n", flush=True)
        return
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        fresh(write_weights, config, folder)
        sides = {side: partial(step_of, side, part, pixels, dtype, folder, config, device) for side in SIDES}
        for side, build in sides.items():
            peak, forward = fresh(memory, build, device, threads)
            columns.setdefault("peak MiB", {})[side] = f"{peak:.0f}"
            columns.setdefault("forward MiB", {})[side] = f"{forward:.0f}"
        steps = {side: build() for side, build in sides.items()}
        equal = largest_difference({side: steps[side] for side in SIDES[:3]})
        seams = (steps["diffusers"]() - steps["tiled"]()).abs().max()
        report(f"{title}, {where(device)}", take_turns(steps, device, rounds), columns,
               f"largest difference of the first three: {equal:.1e}; of tiled: {seams:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    add("part", choices=PARTS)
    add("--res", type=int, default=1024, help="side of the picture, px, a multiple of 8 (default: %(default)s)")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="of weights and maps (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: %(default)s)")
    add("--rounds", type=int, default=ROUNDS, help="timed calls per side (default: %(default)s)")
    add("--count", action="store_true", help="only count bytes from the shapes")
    args = parser.parse_args()
    if args.res % 8 or args.res < 8:
        parser.error(f"--res {args.res}: give a multiple of 8")
    bench(args.part, args.res, args.dtype, args.device, args.threads, args.rounds, args.count)


if __name__ == "__main__":
    main()
