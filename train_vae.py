"""Train an autoencoder of the official shape on a folder of pictures.

Objective  mean |decode(encode(image)) - image| + KL_WEIGHT * KL(posterior || N(0, 1)), both a mean per number, at factor 8.
           Factor 16 needs no training: the partition trick uses the same weights (vae.py).
Start      a linear network (new_vae), which on smooth photographs is most of the way; one norm group, since many let
           neither brightness nor contrast through a narrow network.
End        the latent channels are evened out (equalize), which changes no picture and makes the flow easier to learn.
Crops      each step takes one of CROPS (short side, crop side): several sizes, so that attention and norms, which see the
           whole map, meet more than one map size. The number of pixels a step is constant.
Run        python train_vae.py --data photos --out runs/vae     12 minutes of two cores; the same command again resumes
Writes     OUT/state.safetensors (to resume), OUT/vae.safetensors (official names), OUT/log.jsonl
Units      lr per step of AdamW; PSNR in dB of a range of 255 levels, mean over held-out 256-pixel crops
Check      python -m pytest tests/test_train_vae.py
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import open_weights, save, writable
from data import Pictures, read_folder
from training.resume import MOMENTS, same_settings
from vae import VAE, VAEConfig

CROPS = ((1024, 128), (1024, 128), (1024, 256), (512, 128), (512, 256), (256, 128), (256, 256), (128, 64))
LATENT_CHANNELS = 16
KL_WEIGHT = 1e-6
FIRST_LOGVAR = -6.0
PIN, RANDOM = 4.0, 0.3   # see new_vae


def new_vae(config: VAEConfig, seed: int) -> VAE:
    """A VAE with fresh weights that starts as a linear network, close to a blurred thumbnail.

    Trunk    every convolution outside the residual branches carries each feature twice, as x and as -x, in the two halves of
             the channels. Means over a norm group are then zero, so no norm takes the brightness away, and
             silu(x) - silu(-x) = x makes the last activation linear too.
    Pins     one channel of each half is held at +PIN and -PIN: they carry most of the variance, so a norm is nearly a
             fixed scale and contrast survives as well.
    Copies   the first channels are copied (downsampling averages them), the others are small random filters.
    Branches residual branches and attention begin at zero.

    config   shapes, all widths even; with more than one norm group the halves are normed apart and the start is not linear
    seed     of the weights
    returns  VAE with scale_factor 1 and shift_factor 0, until latent_statistics says better
    """
    generator = torch.Generator().manual_seed(seed)
    vae = VAE(config)
    with torch.no_grad():
        for name, module in vae.named_modules():
            if isinstance(module, nn.GroupNorm):
                module.weight.fill_(PIN * (2 / module.num_channels) ** 0.5)
            elif isinstance(module, nn.Conv2d):
                module.weight.normal_(std=module.weight[0].numel() ** -0.5, generator=generator)
                module.bias.zero_()
                if name.endswith(("conv2", "proj_out")):
                    module.weight.zero_()
                elif name.endswith(("conv_in", "downsample.conv", "upsample.conv", "nin_shortcut", "conv_out")):
                    start_linear(name, module)
        vae.encoder.conv_out.weight[config.latent_channels:] = 0
        vae.encoder.conv_out.bias[config.latent_channels:] = FIRST_LOGVAR
    return vae


def start_linear(name: str, conv: nn.Conv2d) -> None:
    """Make a trunk convolution act on (x, -x) as a copy plus small random filters, and set the pins it writes."""
    outputs, inputs, side, _ = conv.weight.shape
    first, last = name.endswith("conv_in"), name.endswith("conv_out")
    outputs, inputs = outputs if last else outputs // 2, inputs if first else inputs // 2
    one = RANDOM * conv.weight[:outputs, :inputs]
    copied = torch.arange(min(outputs, inputs))
    if name.endswith("downsample.conv"):
        one[copied, copied, :2, :2] += 0.25
    else:
        one[copied, copied, side // 2, side // 2] += 1
    if not first:
        one[:, -1] = 0                                       # nothing reads the pins
    if not last:
        one[-1] = 0
        conv.bias[[outputs - 1, 2 * outputs - 1]] = torch.tensor([PIN, -PIN])
    pair = one if first else torch.cat((one, -one), dim=1) / (1 if last else 2)
    conv.weight.copy_(pair if last else torch.cat((pair, -pair)))


def batch_of(pictures: Pictures, pixels: int, generator: torch.Generator) -> Tensor:
    """A training batch.

    pixels   a step, all crops together
    returns  (B, 3, side, side) in [-1, 1], B = pixels / side^2
    """
    res, side = CROPS[int(torch.randint(len(CROPS), (1,), generator=generator))]
    chosen = torch.randint(len(pictures), (max(1, pixels // side ** 2),), generator=generator).tolist()
    return torch.stack([pictures.square(i, res, side, generator) for i in chosen])


def vae_loss(vae: VAE, image: Tensor, draw: Tensor) -> Tensor:
    """Reconstruction plus KL, from one posterior sample.

    image    (B, 3, H, W) in [-1, 1]
    draw     (B, 16, h, w), standard normal
    returns  scalar
    """
    mean, logvar = vae.moments(image, factor=8)
    raw = mean + torch.exp(0.5 * logvar) * draw
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return (vae.decoder(raw, 8, 2) - image).abs().mean() + KL_WEIGHT * kl


@torch.no_grad()
def reconstruction_psnr(vae: VAE, pictures: Pictures, factor: int = 8, res: int = 1024, side: int = 256) -> list[float]:
    """PSNR of each picture's central crop after encoding and decoding.

    returns  dB, one a picture
    """
    values = []
    for index in range(len(pictures)):
        middle = (res - side) // 2
        image = pictures.central_square(index, res)[None, :, middle : middle + side, middle : middle + side]
        again = vae.decode(vae.encode(image, factor), factor).clamp(-1, 1)
        values.append(10 * math.log10(4 / float((again - image).square().mean())))
    return values


@torch.no_grad()
def latent_statistics(vae: VAE, pictures: Pictures, res: int = 256, factor: int = 16) -> tuple[float, float]:
    """scale_factor and shift_factor that make the latents of these pictures zero-mean with unit deviation."""
    raw = torch.cat([vae.moments(pictures.central_square(i, res)[None], factor)[0].flatten() for i in range(len(pictures))])
    return 1 / float(raw.std()), float(raw.mean())


@torch.no_grad()
def equalize(vae: VAE, pictures: Pictures, res: int = 256, factor: int = 16) -> None:
    """Bring the deviations of the latent channels closer together; the decoded pictures stay what they are.

    One channel that holds nearly all the variance hides the others from a flow loss. The channels are turned to their
    principal axes, and each is divided by the square root of its deviation: a linear map of the latent, which the encoder's
    last convolution takes in, and its inverse the decoder's first. The posterior's log-variances, which such a map would mix,
    become one number a channel, their mean.
    """
    moments = [vae.moments(pictures.central_square(i, res)[None], factor) for i in range(len(pictures))]
    means, variances = (torch.cat([m.transpose(0, 1).flatten(1) for m in part], dim=1).double()  # (16, N)
                        for part in ([mean for mean, _ in moments], [logvar.exp() for _, logvar in moments]))
    spread, axes = torch.linalg.eigh(means.cov())
    there = axes.T / spread.clamp(min=1e-12 * spread.max())[:, None] ** 0.25  # (16 new, 16 old); the variances become their square roots
    last, first, channels = vae.encoder.conv_out, vae.decoder.conv_in, len(axes)
    last.weight[:channels] = torch.einsum("no,ochw->nchw", there, last.weight[:channels].double()).float()
    last.bias[:channels] = (there @ last.bias[:channels].double()).float()
    last.weight[channels:] = 0
    last.bias[channels:] = (there.square() @ variances.mean(1)).log().float()
    first.weight.copy_(torch.einsum("fohw,on->fnhw", first.weight.double(), there.inverse()))


def write_vae(path: Path, vae: VAE, config: VAEConfig, pictures: Pictures, settings: dict) -> None:
    """Save official names, with the numbers that shapes cannot say in the metadata."""
    equalize(vae, pictures)
    scale, shift = latent_statistics(vae, pictures)
    save(path, vae.state_dict(), {"norm_groups": config.norm_groups, "scale_factor": scale, "shift_factor": shift,
                                  "training": json.dumps(settings)})


def save_state(path: Path, vae: nn.Module, optimizer: torch.optim.Optimizer, step: int, settings: Mapping[str, object]) -> None:
    """Save what the run needs to go on: weights, AdamW moments, the step, its settings; one file, replaced whole or not at all."""
    tensors = {f"model.{name}": t for name, t in vae.state_dict().items()}
    for name, parameter in vae.named_parameters():
        for moment in MOMENTS:
            if parameter in optimizer.state:
                tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    save(path, tensors, {"step": step, "settings": json.dumps(dict(settings), sort_keys=True)})


def resume_state(path: Path, vae: nn.Module, optimizer: torch.optim.Optimizer, settings: Mapping[str, object]) -> int:
    """Load what save_state wrote, in place.

    returns  the step to go on from; 0 if there is no such file
    raises   ValueError if the settings differ
    """
    if not path.is_file():
        return 0
    saved = open_weights(path)
    if "settings" not in saved.metadata:
        raise ValueError(f"{path}: not the state of a run; use another --out")
    same_settings(path, json.loads(saved.metadata["settings"]), settings)
    step = int(saved.metadata["step"])
    with torch.no_grad():
        for name, tensor in vae.state_dict().items():
            tensor.copy_(saved[f"model.{name}"].read())
        for name, parameter in vae.named_parameters():
            if f"{MOMENTS[0]}.{name}" in saved:
                optimizer.state[parameter] = {"step": torch.tensor(float(step))} | {
                    moment: saved[f"{moment}.{name}"].read().to(parameter, copy=True) for moment in MOMENTS}
    return step


def train(args: argparse.Namespace) -> None:
    """The whole run, from checks to the written autoencoder; continues from OUT/state.safetensors where there is one."""
    items = read_folder(args.data)
    every = max(1, len(items) // args.holdout) if args.holdout else 1
    held_out = [item.path for item in items[args.holdout // 2 :: every]][: args.holdout]
    pictures, unseen = Pictures([item.path for item in items if item.path not in held_out]), Pictures(held_out)
    widths = tuple(int(w) for w in args.widths.split(",") if w.strip().isdigit())
    if len(widths) != 4 or any(width % 2 for width in widths) or widths[-1] < 2 * LATENT_CHANNELS + 2:
        raise ValueError(f"--widths {args.widths}: four even numbers, the last at least {2 * LATENT_CHANNELS + 2}")
    for name in ("norm_groups", "blocks", "save_every", "steps", "pixels"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: give 1 or more")
    for name in ("lr", "clip"):
        if not 0 < getattr(args, name) < math.inf:
            raise ValueError(f"--{name} {getattr(args, name)}: give a number above 0")
    for name in ("warmup", "holdout"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name} {getattr(args, name)}: give 0 or more")
    if not len(pictures):
        raise ValueError(f"{args.data}: --holdout {args.holdout} leaves no picture to train on")
    config = VAEConfig(widths, widths, args.blocks, args.blocks + 1, LATENT_CHANNELS, args.norm_groups)
    settings = {k: v for k, v in vars(args).items() if k not in ("data", "out", "threads", "save_every")}
    out = Path(args.out)
    writable(out, f"--out {out}")

    vae = new_vae(config, args.seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    start = resume_state(out / "state.safetensors", vae, optimizer, settings)
    print(f"{sum(p.numel() for p in vae.parameters()):,} parameters, {len(pictures)} pictures, "
          f"held out: {', '.join(p.name for p in held_out)}; step {start} of {args.steps}")

    bar, began, window = tqdm(range(start, args.steps), initial=start, total=args.steps, file=sys.stderr), time.time(), []
    for step in bar:
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)  # every draw is a function of (seed, step)
        image = batch_of(pictures, args.pixels, generator)
        draw = torch.randn(len(image), LATENT_CHANNELS, image.shape[2] // 8, image.shape[3] // 8, generator=generator)
        lr = args.lr * min((step + 1) / max(1, args.warmup), 0.5 + 0.5 * math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = vae_loss(vae, image, draw)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(vae.parameters(), args.clip)
        if not torch.isfinite(norm):
            raise SystemExit(f"step {step}: gradient is {float(norm)}, loss {loss.item()}; "
                             f"{out}/state.safetensors holds the last good state")
        optimizer.step()
        window.append(loss.item())
        bar.set_postfix_str(f"loss {sum(window[-50:]) / len(window[-50:]):.4f}")
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save_state(out / "state.safetensors", vae, optimizer, step + 1, settings)
            row = {"step": step + 1, "loss": round(sum(window) / len(window), 5), "lr": lr,
                   "s_per_step": round((time.time() - began) / len(window), 3)}
            if held_out:
                row |= {f"psnr_f{factor}_db": round(sum(p) / len(p), 2)
                        for factor in (8, 16) for p in [reconstruction_psnr(vae, unseen, factor)]}
            window, began = [], time.time()
            with open(out / "log.jsonl", "a") as log:
                log.write(json.dumps(row) + "\n")
            tqdm.write(json.dumps(row))
    write_vae(out / "vae.safetensors", vae, config, pictures, settings)
    print(f"wrote {out / 'vae.safetensors'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="folder with pictures and metadata.jsonl")
    add("--out", default="runs/vae", help="folder of the run; an unfinished run there is resumed")
    add("--widths", default="16,24,48,64", help="channels of the four levels, full resolution first")
    add("--blocks", type=int, default=1, help="resnets a level in the encoder; the decoder has one more")
    add("--norm-groups", type=int, default=1, help="groups of every GroupNorm; official 32")
    add("--steps", type=int, default=5000, help="optimizer steps of the whole run")
    add("--pixels", type=int, default=65536, help="pixels a step: 4 crops of 128 or 1 of 256")
    add("--lr", type=float, default=5e-4, help="peak learning rate; warm-up, then cosine to 0")
    add("--warmup", type=int, default=200, help="steps")
    add("--clip", type=float, default=1.0, help="gradient norm")
    add("--holdout", type=int, default=6, help="pictures never trained on, for the PSNR in the log")
    add("--save-every", type=int, default=250, help="steps between states and log lines")
    add("--seed", type=int, default=0, help="of weights and draws")
    add("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    args = parser.parse_args()
    try:
        if args.threads < 1:
            raise ValueError(f"--threads {args.threads}: give 1 or more")
        torch.set_num_threads(args.threads)
        train(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
