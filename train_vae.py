"""Train an autoencoder of the official shape on a folder of pictures.

Objective  mean |decode(encode(image)) - image| + KL_WEIGHT * KL(posterior || N(0, 1)), at factor 8.
           Factor 16 needs no training: the partition trick uses the same weights (vae.py).
Start      every residual branch begins at zero, so the first steps train an almost linear autoencoder, which on
           smooth photographs is most of the way; few norm groups let brightness and contrast through.
Crops      each step takes one of CROPS (short side, crop side): several sizes, so that attention and norms, which see the
           whole map, meet more than one map size. The number of pixels a step is constant.
Run        python train_vae.py --data photos --out runs/vae                        CPU, two cores: about an hour
           python train_vae.py --data photos --out runs/vae --steps 6000           the same command again resumes
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
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import resume_run, save, save_run
from data import Pictures, read_folder
from vae import VAE, ResnetBlock, AttnBlock, VAEConfig

CROPS = ((1024, 128), (1024, 128), (1024, 256), (512, 128), (512, 256), (256, 128), (256, 256), (128, 64))
KL_WEIGHT = 1e-6
FIRST_LOGVAR = -6.0
PIN, LINEAR = 2.0, 2.0   # see new_vae


def new_vae(config: VAEConfig, seed: int) -> VAE:
    """A VAE with fresh weights that starts as a blurred thumbnail: nearly the identity on three colours.

    Trunk      every convolution outside a residual branch copies its first channels (downsampling averages them) and adds
               small random filters; residual branches begin at zero.
    Norms      a group norm would take away brightness and contrast. One channel a group is therefore held at PIN: it carries
               most of the group's variance, so the norm is nearly a fixed scale, and what the norm subtracts can be read from it.
    Last SiLU  its inputs are moved to LINEAR, where SiLU is nearly straight; gray in, gray out.

    config   shapes
    seed     of the weights
    returns  VAE with scale_factor 1 and shift_factor 0, until latent_statistics says better
    """
    generator = torch.Generator().manual_seed(seed)
    vae = VAE(config)
    for name, module in vae.named_modules():
        if isinstance(module, nn.GroupNorm):
            share = config.norm_groups / module.num_channels
            nn.init.constant_(module.weight, PIN * (share * (1 - share)) ** 0.5)
        if not isinstance(module, nn.Conv2d):
            continue
        nn.init.normal_(module.weight, std=0.3 * module.weight[0].numel() ** -0.5, generator=generator)
        nn.init.zeros_(module.bias)
        if "block" in name and "nin_shortcut" not in name or "attn_1" in name:
            if name.endswith(("conv2", "proj_out")):
                nn.init.zeros_(module.weight)
            continue
        copied = torch.arange(min(module.weight.shape[:2]))
        with torch.no_grad():
            if "downsample" in name:
                module.weight[copied, copied, :2, :2] += 0.25
            else:
                middle = module.kernel_size[0] // 2
                module.weight[copied, copied, middle, middle] += 1
            if not name.endswith("conv_out"):
                module.weight[pinned(config, len(module.weight))] = 0
                module.bias[pinned(config, len(module.weight))] = PIN
    with torch.no_grad():
        for part, outputs in ((vae.encoder, config.latent_channels), (vae.decoder, 3)):
            channels, pins = part.norm_out.num_channels, pinned(config, part.norm_out.num_channels)
            part.norm_out.bias.fill_(PIN * len(pins) / channels + LINEAR)
            weight = part.conv_out.weight.mul_(0.1)
            weight[:, pins] = 0
            for o in range(outputs):
                weight[o, o], weight[o, o, 1, 1] = 0, 1
                weight[o, pins[o * len(pins) // channels], 1, 1] = -1
        gray = torch.zeros(1, 3, 64, 64)
        vae.encoder.conv_out.bias -= torch.cat(vae.moments(gray, factor=8), dim=1).mean((0, 2, 3))
        vae.encoder.conv_out.bias[config.latent_channels:] += FIRST_LOGVAR
        vae.decoder.conv_out.bias -= vae.decode(vae.encode(gray, factor=8), factor=8).mean((0, 2, 3))
    return vae


def pinned(config: VAEConfig, channels: int) -> Tensor:
    """The last channel of every norm group."""
    a_group = channels // config.norm_groups
    return torch.arange(a_group - 1, channels, a_group)


def batch_of(pictures: Pictures, pixels: int, seed: int, step: int) -> Tensor:
    """The training batch of a step, a function of (seed, step) alone.

    pixels   a step, all crops together
    returns  (B, 3, side, side) in [-1, 1], B = pixels / side^2
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    res, side = CROPS[int(torch.randint(len(CROPS), (1,), generator=generator))]
    chosen = torch.randint(len(pictures), (max(1, pixels // side ** 2),), generator=generator).tolist()
    return torch.stack([pictures.square(i, res, side, generator) for i in chosen])


def vae_loss(vae: VAE, image: Tensor, draw: Tensor | None = None) -> Tensor:
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


def write_vae(path: Path, vae: VAE, config: VAEConfig, pictures: Pictures, settings: dict) -> None:
    """Save official names, with the numbers that shapes cannot say in the metadata."""
    scale, shift = latent_statistics(vae, pictures)
    save(path, vae.state_dict(), {"norm_groups": config.norm_groups, "scale_factor": scale, "shift_factor": shift,
                                  "training": json.dumps(settings)})


def train(args: argparse.Namespace) -> None:
    items = read_folder(args.data)
    held_out = [item.path for item in items[args.holdout // 2 :: max(1, len(items) // args.holdout)]][: args.holdout] if args.holdout else []
    pictures, unseen = Pictures([item.path for item in items if item.path not in held_out]), Pictures(held_out)
    widths = tuple(int(w) for w in args.widths.split(","))
    config = VAEConfig(widths, widths, args.blocks, args.blocks + 1, 16, args.norm_groups)
    settings = {k: v for k, v in vars(args).items() if k not in ("data", "out", "threads", "save_every")}
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    vae = new_vae(config, args.seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    start = resume_run(out / "state.safetensors", vae, optimizer, settings)
    print(f"{sum(p.numel() for p in vae.parameters()):,} parameters, {len(pictures)} pictures, "
          f"held out: {', '.join(p.name for p in held_out)}; step {start} of {args.steps}")

    bar, began, window = tqdm(range(start, args.steps), initial=start, total=args.steps, file=sys.stderr), time.time(), []
    for step in bar:
        image = batch_of(pictures, args.pixels, args.seed, step)
        draw = torch.randn(len(image), 16, image.shape[2] // 8, image.shape[3] // 8,
                           generator=torch.Generator().manual_seed(args.seed * 1_000_003 + step))
        lr = args.lr * min((step + 1) / args.warmup, 0.5 + 0.5 * math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = vae_loss(vae, image, draw)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(vae.parameters(), args.clip)
        if not torch.isfinite(norm):
            raise SystemExit(f"step {step}: gradient is {float(norm)}, loss {loss.item()}; {out}/state.safetensors holds the last good state")
        optimizer.step()
        window.append(loss.item())
        bar.set_postfix_str(f"loss {sum(window[-50:]) / len(window[-50:]):.4f}")
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save_run(out / "state.safetensors", vae, optimizer, step + 1, settings)
            row = {"step": step + 1, "loss": round(sum(window) / len(window), 5), "lr": lr, "s_per_step": round((time.time() - began) / len(window), 3)}
            if held_out:
                row |= {f"psnr_f{factor}_db": round(sum(p) / len(p), 2) for factor in (8, 16) for p in [reconstruction_psnr(vae, unseen, factor)]}
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
    add("--widths", default="16,32,64,64", help="channels of the four levels, full resolution first")
    add("--blocks", type=int, default=1, help="resnets a level in the encoder; the decoder has one more")
    add("--norm-groups", type=int, default=4, help="groups of every GroupNorm; official 32")
    add("--steps", type=int, default=6000, help="optimizer steps of the whole run")
    add("--pixels", type=int, default=131072, help="pixels a step: 8 crops of 128 or 2 of 256")
    add("--lr", type=float, default=2e-3, help="peak learning rate; warm-up, then cosine to 0")
    add("--warmup", type=int, default=100, help="steps")
    add("--clip", type=float, default=1.0, help="gradient norm")
    add("--holdout", type=int, default=6, help="pictures never trained on, for the PSNR in the log")
    add("--save-every", type=int, default=250, help="steps between states and log lines")
    add("--seed", type=int, default=0, help="of weights and draws")
    add("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        train(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
