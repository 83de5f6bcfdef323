"""Train an autoencoder of the official shape on a folder of pictures, or the decoder of a given one at factor 16.

Objective  mean |decode(encode(image)) - image| + KL_WEIGHT * KL(posterior || N(0, 1)) at factor 8, means over elements;
           factor 16 needs no training: the partition trick uses the same weights (vae.py)
Start      a linear network (new_vae) that already draws a blurred picture; at the end equalize() evens out the latent
           channels
Decoder    --decoder-only: another objective, training/decoder.py; the encoder stays as it is
Run        python train_vae.py --data photos --out runs/vae     12 minutes on two cores; the same command resumes
           python train_vae.py --decoder-only --weights sd3 --data photos --lr 1e-5 --out runs/decoder
Writes     OUT/state.safetensors (to resume), OUT/vae.safetensors (official names), OUT/log.jsonl; --decoder-only writes
           OUT/vae_16.safetensors: in a model folder, sample.py draws with it at factor 16
Check      python -m pytest tests/test_train_vae.py tests/test_decoder.py
"""

if __name__ == "__main__":  # Ctrl-C during the import of torch ends in one line
    import files
    files.end_on_interrupt()

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from threading import Event

import torch
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import open_weights, save
from data import Pictures, read_folder
from files import flag, need, parse_json, read_flags, run_command, writable
from flow import SEEDS
from machine.memory import check_device
from scores.official import find_weights
from scores.perceptual import LPIPS
from training.adamw import MOMENTS
from training.batches import random_crop
from training.decoder import GRID, Redrawn, decoder_loss, given_vae, tensors_of
from training.ranks import stop_on_signals
from training.resume import digest_of, same_settings
from training.run import check_out, only_run
from training.seeds import seed_of
from vae import VAE, VAEConfig, to_image

NEW = ("widths", "blocks", "norm_groups")
DECODER = ("decoder_only", "weights", "factor", "offset", "teacher", "lpips", "redrawn")
# short side, side of the crop: attention and norms see the complete map, so they must meet several sizes
CROPS = ((1024, 128), (1024, 128), (1024, 256), (512, 128), (512, 256), (256, 128), (256, 256), (128, 64))
LATENT_CHANNELS = 16
KL_WEIGHT = 1e-6
FIRST_LOGVAR, PIN, RANDOM = -6.0, 4.0, 0.3  # see new_vae


def new_vae(config: VAEConfig, seed: int) -> VAE:
    """An untrained VAE that starts as a linear network, whose pictures are blurred copies of its input.

    Trunk     convolutions outside the residual branches carry each feature twice, as x and -x. Their mean is zero, so
              that one norm group removes no brightness, and silu(x) - silu(-x) = x: the last activation is linear too
    Pins      one channel of each half is constant, +PIN and -PIN. They carry most of the variance: a norm is nearly a
              fixed scale, which preserves the contrast
    Copies    the first channels are copied (averaged in downsampling), the others are small random filters
    Branches  residual branches and attention start at zero; the posterior at log-variance FIRST_LOGVAR
    Widths    all even; with several norm groups, a narrow network loses brightness and contrast
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
    """Make a trunk convolution act on (x, -x) as a copy plus small random filters, and set its pins."""
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
        one[:, -1] = 0   # nothing reads the pins
    if not last:
        one[-1] = 0
        conv.bias[[outputs - 1, 2 * outputs - 1]] = torch.tensor([PIN, -PIN])
    pair = one if first else torch.cat((one, -one), dim=1) / (1 if last else 2)
    conv.weight.copy_(pair if last else torch.cat((pair, -pair)))


def batch_of(pictures: Pictures, pixels: int, generator: torch.Generator) -> Tensor:
    """A training batch, (B, 3, side, side) in [-1, 1]: B = pixels / side^2 random crops of random pictures."""
    res, side = CROPS[int(torch.randint(len(CROPS), (1,), generator=generator))]
    indices = torch.randint(len(pictures), (max(1, pixels // side ** 2),), generator=generator).tolist()
    return torch.stack([to_image(random_crop(pictures.resized(i, res, res), side, side, generator)) for i in indices])


def vae_loss(vae: VAE, image: Tensor, draw: Tensor) -> Tensor:
    """The objective, from image (B, 3, H, W) and one posterior sample by draw (B, 16, h, w), standard normal."""
    mean, logvar = vae.moments(image, factor=8)
    raw = mean + torch.exp(0.5 * logvar) * draw
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return (vae.decoder(raw, 8, 2) - image).abs().mean() + KL_WEIGHT * kl


def central(pictures: Pictures, index: int, res: int) -> Tensor:
    """(1, 3, res, res) in [-1, 1]: the middle of a picture at short side `res`."""
    return to_image(pictures.central_crop(index, res, res))[None]


@torch.no_grad()
def reconstruction_psnr(vae: VAE, pictures: Pictures, factor: int = 8, res: int = 1024, side: int = 256) -> list[float]:
    """PSNR of each picture's central crop after encoding and decoding, in dB for a range of 255 levels."""
    values, first, weight = [], (res - side) // 2, next(vae.parameters())
    for index in range(len(pictures)):
        image = central(pictures, index, res)[..., first:first + side, first:first + side].to(weight)
        decoded = vae.decode(vae.encode(image, factor), factor).clamp(-1, 1)
        values.append(10 * math.log10(4 / float((decoded - image).square().mean())))
    return values


@torch.no_grad()
def latent_statistics(vae: VAE, pictures: Pictures, res: int = 256, factor: int = 16) -> tuple[float, float]:
    """scale_factor and shift_factor that give the latents of these pictures mean 0 and deviation 1."""
    raw = torch.cat([vae.moments(central(pictures, i, res), factor)[0].flatten() for i in range(len(pictures))])
    return 1 / float(raw.std()), float(raw.mean())


@torch.no_grad()
def equalize(vae: VAE, pictures: Pictures, res: int = 256, factor: int = 16) -> None:
    """Bring the deviations of the latent channels closer together, in place; decoded pictures stay the same.

    One channel with nearly all the variance would hide the others from a flow loss. So the latent is rotated to its
    principal axes, and each is divided by the square root of its deviation. The encoder's last convolution absorbs
    this linear map, the decoder's first its inverse. The log-variances become one constant per channel.
    """
    moments = [vae.moments(central(pictures, i, res), factor) for i in range(len(pictures))]
    means, variances = (torch.cat([m.transpose(0, 1).flatten(1) for m in part], dim=1).double()  # (16, N)
                        for part in ([mean for mean, _ in moments], [logvar.exp() for _, logvar in moments]))
    variance, axes = torch.linalg.eigh(means.cov())
    # (16 new, 16 old): divides the variances by their square roots
    forth = axes.T / variance.clamp(min=1e-12 * variance.max())[:, None] ** 0.25
    last, first, channels = vae.encoder.conv_out, vae.decoder.conv_in, len(axes)
    last.weight[:channels] = torch.einsum("no,ochw->nchw", forth, last.weight[:channels].double()).float()
    last.bias[:channels] = (forth @ last.bias[:channels].double()).float()
    last.weight[channels:] = 0
    last.bias[channels:] = (forth.square() @ variances.mean(1)).log().float()
    first.weight.copy_(torch.einsum("fohw,on->fnhw", first.weight.double(), forth.inverse()))


def save_state(path: Path, vae: nn.Module, optimizer: torch.optim.Optimizer, step: int, decisive: Mapping) -> None:
    """Save weights, AdamW moments, step and decisive settings in one file, replaced completely or not at all."""
    tensors = {f"model.{name}": t for name, t in vae.state_dict().items()}
    tensors |= {f"{moment}.{name}": optimizer.state[p][moment] for name, p in vae.named_parameters()
                if p in optimizer.state for moment in MOMENTS}
    save(path, tensors, {"step": step, "settings": json.dumps(dict(decisive), sort_keys=True)})


def resume_state(path: Path, vae: nn.Module, optimizer: torch.optim.Optimizer, decisive: Mapping) -> int:
    """Load a file of save_state in place; returns its step, 0 without a file, ValueError if the settings differ."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return 0
    state = open_weights(path)
    then, step = parse_json(state.metadata.get("settings", "null"), str(path)), state.number("step", integer=True)
    if not isinstance(then, dict) or step is None:
        raise ValueError(f"{path}: not the state of a run; use another --out")
    then |= {"grid": 0.0} if "grid" in decisive and "grid" not in then else {}  # a term that older runs lack
    same_settings(path, then, {name: decisive.get(name) for name in then})
    trained = {name: p for name, p in vae.named_parameters() if p.requires_grad}
    shapes = {f"model.{name}": tuple(t.shape) for name, t in vae.state_dict().items()}
    if len(state) > len(shapes):
        shapes |= {f"{moment}.{name}": tuple(p.shape) for moment in MOMENTS for name, p in trained.items()}
    if {name: tuple(t.shape) for name, t in state.items()} != shapes:
        raise ValueError(f"{path}: not the tensors of such an autoencoder; use another --out")
    vae.load_state_dict({name: state[f"model.{name}"].read() for name in vae.state_dict()})
    for name, p in trained.items():
        if f"{MOMENTS[0]}.{name}" in state:
            moments = {moment: state[f"{moment}.{name}"].read().to(p, copy=True) for moment in MOMENTS}
            optimizer.state[p] = {"step": torch.tensor(float(step), device=p.device)} | moments
    return step


# ---- the run

@dataclass(frozen=True)
class Settings:
    """The flags of train_vae.py."""

    data: str = flag(None, "folder with pictures and metadata.jsonl", required=True, metavar="DIR")
    out: str = flag("runs/vae", "folder of the run; an unfinished run there resumes", metavar="DIR")
    widths: str = flag("16,24,48,64", "channels of the four levels, full resolution first")
    blocks: int = flag(1, "resnets per level of the encoder; the decoder has one more")
    norm_groups: int = flag(1, "groups of every GroupNorm; official 32")
    decoder_only: bool = flag(False, "train the decoder of --weights, and leave its encoder as it is")
    weights: str | None = flag(None, "the VAE: a model folder, its vae/ folder, or a file", metavar="PATH")
    factor: int = flag(16, "pixels per latent position that the decoder learns", choices=(8, 16))
    offset: int = flag(2, "pixels that the last convolution cuts at factor 16: 2 exact, 1 as released", choices=(1, 2))
    teacher: float = flag(0.0, "weight of the distance to the old decoder's features at factor 8, which is slow; "
                          "SC-VAE: 1")
    lpips: str | None = flag(None, "folder with vgg16-397923af.pth and vgg.pth: adds LPIPS", metavar="DIR")
    redrawn: str | None = flag(None, "folder of latents by models/redraw_latents.py, decoded in every second step; "
                               "factor 16", metavar="DIR")
    steps: int = flag(5000, "optimizer steps of the complete run")
    pixels: int = flag(65536, "pixels per step: 4 crops of 128 or 1 of 256")
    lr: float = flag(5e-4, "peak learning rate; warm-up, then cosine to 0")
    warmup: int = flag(200, "steps of linear warm-up")
    clip: float = flag(1.0, "largest gradient norm")
    holdout: int = flag(6, "pictures that are not trained on, for the PSNR in the log")
    save_every: int = flag(250, "steps between states and log lines")
    seed: int = flag(0, "of weights and draws")
    threads: int = flag(os.cpu_count(), "CPU threads")
    device: str | None = flag(None, "cpu or cuda (default: cuda where there is one)")

    def decisive(self) -> dict[str, object]:
        """What decides the numbers of the run. A run resumes only with equal values; the other settings may change."""
        free = ("data", "out", "threads", "save_every", "device", "weights", "lpips", "redrawn",
                *(NEW if self.decoder_only else DECODER))
        return {k: v for k, v in asdict(self).items() if k not in free}


def check_settings(s: Settings) -> None:
    """Refuse a setting out of range: ValueError that names the flag, its value and what is accepted."""
    widths, least = s.widths.split(","), 2 * LATENT_CHANNELS + 2
    even = len(widths) == 4 and all(w.strip().isdecimal() and int(w) % 2 == 0 < int(w) for w in widths)
    need(even and int(widths[-1]) >= least, "widths", s.widths, f"four even numbers, the last at least {least}")
    for name in ("norm-groups", "blocks", "save-every", "steps", "pixels", "threads", "warmup", "holdout"):
        value, low = getattr(s, name.replace("-", "_")), 0 if name in ("warmup", "holdout") else 1
        need(value >= low, name, value, f"{low} or more")
    need(0 <= s.seed < SEEDS, "seed", s.seed, "0 to 2^32 - 1")
    need(0 < s.lr < math.inf, "lr", s.lr, "a number above 0")
    need(0 < s.clip < math.inf, "clip", s.clip, "a number above 0")
    need(0 <= s.teacher < math.inf, "teacher", s.teacher, "0 or more")
    need(bool(s.weights) or not s.decoder_only, "decoder-only", "alone", "--weights too, whose decoder is trained")
    need(not s.redrawn or s.factor == 16, "redrawn", s.redrawn, "it with --factor 16")
    for f in fields(s):  # a flag of the other kind of run would have no effect
        if f.name in (NEW if s.decoder_only else DECODER) and (value := getattr(s, f.name)) != f.default:
            need(False, f.name.replace("_", "-"), value, f"it {'without' if s.decoder_only else 'with'} --decoder-only")


def split_pictures(settings: Settings) -> tuple[Pictures, Pictures]:
    """The pictures to train on, and --holdout others, evenly chosen; fewer where there are no more than these."""
    paths = [item.path for item in read_folder(settings.data)]
    every = max(1, len(paths) // max(1, settings.holdout))
    first = settings.holdout // 2
    if len(paths) > settings.holdout:
        first = min(first, len(paths) - every * (settings.holdout - 1) - 1)
    held_out = paths[first::every][:settings.holdout]
    if len(held_out) == len(paths):
        raise ValueError(f"{settings.data}: --holdout {settings.holdout} leaves no picture to train on")
    return Pictures([path for path in paths if path not in held_out]), Pictures(held_out)


def train(settings: Settings) -> int:
    """Train, then write the autoencoder; resumes from OUT/state.safetensors if there is one.

    returns  the number of the signal that stopped it, 0 if none did
    """
    check_out(settings.out, settings.data, settings.weights)
    pictures, unseen = split_pictures(settings)
    out, decisive, widths = Path(settings.out), settings.decisive(), tuple(map(int, settings.widths.split(",")))
    decisive["held_out"] = [path.name for path in unseen.paths]
    writable(out, f"--out {out}")
    if settings.decoder_only:
        vae, stored = given_vae(settings.weights)
        vae.offset = settings.offset
        decisive["VAE"] = digest_of(stored)
    else:
        config = VAEConfig(widths, widths, settings.blocks, settings.blocks + 1, LATENT_CHANNELS, settings.norm_groups)
        vae = new_vae(config, settings.seed)
    vae.to(check_device(settings.device))
    trained = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    loss_of = objective(settings, vae)
    redrawn = Redrawn(settings.redrawn, pictures.paths, pictures.central_crop) if settings.redrawn else None
    if settings.decoder_only:
        decisive |= {"LPIPS": bool(settings.lpips), "latents": redrawn and redrawn.digest, "grid": GRID}
    with only_run(out):
        start = resume_state(out / "state.safetensors", vae, optimizer, decisive)
        print(f"{sum(p.numel() for p in trained):,} parameters, {len(pictures)} pictures, "
              f"held out: {', '.join(decisive['held_out'])}; step {start} of {settings.steps}", flush=True)
        with stop_on_signals() as stop:
            done = take_steps(settings, decisive, vae, loss_of, optimizer, pictures, redrawn, unseen, start, stop)
        if done < settings.steps:
            print(f"stopped after step {done}; the same command resumes there")
            return stop.number
        vae.cpu()
        if settings.decoder_only:
            file, tensors = out / f"vae_{settings.factor}.safetensors", tensors_of(vae, stored)
        else:
            equalize(vae, pictures)
            vae.scale_factor, vae.shift_factor = latent_statistics(vae, pictures)
            file, tensors = out / "vae.safetensors", vae.state_dict()
        records = {"norm_groups": vae.config.norm_groups, "scale_factor": vae.scale_factor,
                   "shift_factor": vae.shift_factor, "training": json.dumps(decisive)}
        if settings.decoder_only:
            records |= {"factor": settings.factor, "offset": settings.offset}
        save(file, tensors, records)
    print(f"wrote {file}")
    return 0


def objective(settings: Settings, vae: VAE) -> Callable[[Tensor, Tensor | None, torch.Generator], Tensor]:
    """The loss of images (B, 3, H, W), and of latents that a transformer drew of them; a generator for draws."""
    if not settings.decoder_only:
        def whole(image: Tensor, _: None, generator: torch.Generator) -> Tensor:
            draw = torch.randn(len(image), LATENT_CHANNELS, image.shape[2] // 8, image.shape[3] // 8,
                               generator=generator)
            return vae_loss(vae, image, draw.to(image))
        return whole
    teacher = (settings.teacher, deepcopy(vae.decoder).requires_grad_(False)) if settings.teacher else None
    files = [find_weights(settings.lpips, name) for name in ("vgg16-397923af.pth", "vgg.pth")] if settings.lpips else ()
    lpips = LPIPS.load("vgg", *files, next(vae.parameters()).device) if files else None
    return lambda image, raw, _: decoder_loss(vae, image, settings.factor, settings.offset, teacher, lpips, raw)


def take_steps(settings: Settings, decisive: Mapping, vae: VAE, loss_of: Callable[..., Tensor],
               optimizer: torch.optim.Optimizer, pictures: Pictures, redrawn: Redrawn | None, unseen: Pictures,
               start: int, stop: Event) -> int:
    """The steps from `start` on, until `stop` is set; saves states and log lines. Returns the complete steps."""
    bar = tqdm(range(start, settings.steps), initial=start, total=settings.steps, file=sys.stderr)
    began, losses, out, done = time.time(), [], Path(settings.out), start
    device = next(vae.parameters()).device
    for step in bar:
        generator = torch.Generator().manual_seed(seed_of(settings.seed, step))  # of every draw of the step
        try:
            if redrawn and step % 2:
                raw, image = redrawn.window(settings.pixels, generator)
            else:
                raw, image = None, batch_of(pictures, settings.pixels, generator)
        except (ValueError, OSError):  # a picture is broken: the run resumes here once it is repaired
            save_state(out / "state.safetensors", vae, optimizer, done, decisive)
            raise

        loss = loss_of(image.to(device), None if raw is None else raw.to(device), generator)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(vae.parameters(), settings.clip)
        if not torch.isfinite(norm):
            saved = (out / "state.safetensors").exists()
            raise ValueError(f"step {step}: gradient is {float(norm)}, loss {loss.item()}; "
                             f"{f'{out}/state.safetensors holds the last good state; ' * saved}try a smaller --lr")
        warmup = (step + 1) / max(1, settings.warmup)
        lr = settings.lr * min(warmup, 0.5 + 0.5 * math.cos(math.pi * step / settings.steps))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()

        losses.append(loss.item())
        bar.set_postfix_str(f"loss {sum(losses[-50:]) / len(losses[-50:]):.4f}")
        done = step + 1
        due = done % settings.save_every == 0 or done == settings.steps
        if due or stop.is_set():
            save_state(out / "state.safetensors", vae, optimizer, done, decisive)
        if due:
            row = {"step": done, "loss": round(sum(losses) / len(losses), 5), "lr": lr,
                   "s_per_step": round((time.time() - began) / len(losses), 3)}
            for factor in () if not len(unseen) else (settings.factor,) if settings.decoder_only else (8, 16):
                row[f"psnr_f{factor}_db"] = round(sum(reconstruction_psnr(vae, unseen, factor)) / len(unseen), 2)
            began, losses = time.time(), []
            with open(out / "log.jsonl", "a") as log:
                log.write(json.dumps(row) + "\n")
            tqdm.write(json.dumps(row))
        if stop.is_set():
            break
    return done


def command(settings: Settings) -> None:
    check_settings(settings)
    torch.set_num_threads(settings.threads)
    if train(settings) == signal.SIGINT:
        raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> None:
    about = "Train an autoencoder of the official shape on a folder of pictures, or the decoder of a given one."
    run_command(lambda: command(read_flags(Settings, about, {}, argv)), less="fewer --pixels")


if __name__ == "__main__":
    main()
