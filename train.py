"""Fine-tune the transformer of a model folder on a folder of captioned pictures.

Paper      Diffusion-4K section 3.2 and 9: AdamW, constant lr 1e-6, weight decay 1e-4; VAE and text encoders stay frozen
Objective  z = (1 - sigma) * latent + sigma * noise;  v = noise - latent;  haar() gives the bands LL, LH, HL, HH
             --objective paper     w(sigma) * |haar(v_hat) - haar(v)|^2                             equation 4
             --objective release   w(sigma) * |haar(z - sigma * v_hat) - haar(latent)|^2            the released trainer
           With --bands 1,1,1,1 the first is exactly the plain velocity loss and the second sigma^2 times it
           (tests/test_wavelet.py): the wavelet changes the gradient only with other band weights, or with --huber.
Run        python train.py --data examples --res 256 --steps 10 --batch 4 --lr 1e-4                  CPU, half a minute
           python train.py --weights sd3 --data aesthetic-4k --res 1024 --batch 4                    one GPU
Restart    the same command: a run continues from OUT/state.safetensors, bit for bit on CPU
Writes     OUT/sd3.safetensors   official names, transformer and VAE in one file: sample.py --transformer OUT/sd3.safetensors
           OUT/state.safetensors, OUT/log.jsonl, OUT/settings.json
Units      lr per step; loss and bands are mean squares of latents; images/s; peak memory in GiB
Check      python -m pytest tests/test_train.py
"""

import argparse
import copy
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import check_device, locate, model_folder, open_weights, resume_run, save, save_run
from data import Embeddings, Pictures, picture_size, read_folder, vary_caption
from flow import DENSITIES, SCHEMES, denoised, interpolate, loss_weight, sample_sigma
from mmdit import MMDiT, check_set
from vae import VAE
from wavelet import BANDS, band_losses, wlf_loss

MODEL_FILE = "sd3.safetensors"
NOT_SETTINGS = ("data", "out", "device", "threads", "save_every", "log_every", "save_dtype", "dry_run", "steps")
SAVE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def latents_of(chosen: list[int], args: argparse.Namespace, pictures: Pictures, vae: VAE, known: dict[int, tuple[Tensor, Tensor]],
               generator: torch.Generator) -> Tensor:
    """Latents of the chosen pictures, drawn from their posteriors.

    known    moments of central squares, which never change: filled here, empty with random squares
    returns  (B, 16, h, w)
    """
    device = next(vae.parameters()).device
    moments = []
    for i in chosen:
        if i not in known:
            square = pictures.central_square(i, args.res) if args.center_crop else pictures.square(i, args.res, args.res, generator)
            found = vae.moments(square[None].to(device), args.factor)
            if args.center_crop:
                known[i] = found
        moments.append(known[i] if args.center_crop else found)
    mean, logvar = (torch.cat(part) for part in zip(*moments, strict=True))
    return vae.draw(mean, logvar, generator)


def objective(name: str, velocity: Tensor, latent: Tensor, noise: Tensor, sigma: Tensor, weight: Tensor,
              bands: tuple[float, ...], huber: float) -> Tensor:
    """Equation 4 of the paper, or what the released trainer computes in its place.

    name      "paper" or "release"
    velocity  the network's, (B, 16, h, w), as are latent and noise
    sigma     (B,), as is weight
    returns   scalar
    """
    if name == "paper":
        return wlf_loss(velocity, noise - latent, weight, bands, huber)
    return wlf_loss(denoised(interpolate(latent, noise, sigma), velocity, sigma), latent, weight, bands, huber)


def settings_of(args: argparse.Namespace) -> dict[str, object]:
    """What decides the numbers of a run; the rest may differ when it is resumed."""
    return {k: v for k, v in vars(args).items() if k not in NOT_SETTINGS}


def peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def commit() -> str:
    """The commit of this code, for settings.json; "unknown" outside a checkout."""
    git = subprocess.run(["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True)
    return git.stdout.strip() or "unknown"


def check_settings(args: argparse.Namespace) -> None:
    """Refuse a flag out of range: ValueError that says what was given and what is accepted."""
    check_device(args.device)
    step = 2 * args.factor
    for name, fits, accepted in (
            ("res", args.res > 0 and args.res % step == 0, f"a multiple of {step} at --factor {args.factor}"),
            *((name, getattr(args, name) >= 1, "1 or more") for name in ("steps", "batch", "save_every", "log_every", "threads")),
            *((name, 0 <= getattr(args, name) <= 1, "a probability") for name in ("drop_words", "drop_caption")),
            *((name, getattr(args, name) >= 0, "0 or more") for name in ("lr", "huber", "warmup", "weight_decay", "seed")),
            *((name, getattr(args, name) > 0, "a number above 0") for name in ("clip", "time_shift")),
            ("ema", 0 <= args.ema < 1, "0 for none, or a decay below 1")):
        if not fits:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: give {accepted}")


def write_model(path: Path, model: MMDiT, vae: VAE, sampling: dict[str, str], step: int, args: argparse.Namespace) -> None:
    """One official file: the transformer, and the VAE its latents came from, with what sample.py wants to know."""
    dtype = SAVE_DTYPES[args.save_dtype]
    tensors = {f"model.diffusion_model.{name}": t.to("cpu", dtype) for name, t in model.state_dict().items()}
    tensors |= {f"first_stage_model.{name}": t.to("cpu", dtype) for name, t in vae.state_dict().items()}
    if bad := next((name for name, t in tensors.items() if not torch.isfinite(torch.stack(t.aminmax())).all()), ""):
        raise ValueError(f"{bad} holds NaN or Inf in {args.save_dtype}: {path} is not written; try a smaller --lr, or a wider --save-dtype")
    save(path, tensors, sampling | {
        "res": args.res, "factor": args.factor, "norm_groups": vae.config.norm_groups, "scale_factor": vae.scale_factor,
        "shift_factor": vae.shift_factor, "training": json.dumps({"steps": step} | settings_of(args))})


def train(args: argparse.Namespace) -> None:
    """The whole run, from checks to the written model; continues from OUT/state.safetensors where there is one."""
    device = torch.device(args.device)
    folder, out = model_folder(args.model, args.weights), Path(args.out)
    transformer_path, vae_path = locate(folder)
    transformer_path = Path(args.transformer or transformer_path)
    items = read_folder(args.data)
    for item in items:
        if (short := min(picture_size(item.path))) < args.res:
            raise ValueError(f"{item.path}: its short side is {short} px, below --res {args.res}: enlarging adds no detail; leave it out")
    sampling = {k: v for k, v in open_weights(transformer_path).metadata.items() if k in ("steps", "cfg", "time_shift")}
    settings = settings_of(args)
    print(json.dumps(vars(args), indent=1))
    if args.dry_run:
        return

    model, vae = MMDiT.load(transformer_path, device), VAE.load(vae_path, device).requires_grad_(False)
    model.position(args.res // args.factor, args.res // args.factor)  # refuses what its table cannot hold
    ema = copy.deepcopy(model).requires_grad_(False) if args.ema else None
    embeddings = Embeddings(Path(args.data) / ".embeddings", folder, device)
    captions, pictures = [item.captions for item in items], Pictures([item.path for item in items])
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=args.weight_decay, fused=True)
    kept = {"model": model} | ({"ema": ema} if ema else {})
    start = resume_run(out / "state.safetensors", kept, optimizer, settings)
    out.mkdir(parents=True, exist_ok=True)
    (out / "settings.json").write_text(json.dumps({"commit": commit()} | vars(args), indent=1))
    embeddings.fill([""] if args.drop_words else ["", *(caption for several in captions for caption in several)])
    check_set(model.config, *embeddings.read([""]), vae.config.latent_channels)

    known: dict[int, tuple[Tensor, Tensor]] = {}
    began, since = time.time(), start
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, file=sys.stderr)
    for step in bar:
        # data
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)  # every draw is a function of (seed, step)
        chosen = torch.randint(len(items), (args.batch,), generator=generator).tolist()
        texts = [vary_caption(captions[i], generator, args.drop_words, args.drop_caption) for i in chosen]
        with torch.no_grad():
            latent = latents_of(chosen, args, pictures, vae, known, generator)
            context, pooled = (embeddings.encode if args.drop_words else embeddings.read)(texts)
        # noise
        noise = torch.randn(latent.shape, generator=generator).to(device)
        sigma = sample_sigma(args.batch, args.density, args.time_shift, generator=generator).to(device)
        weight = loss_weight(sigma, args.weighting)
        z = interpolate(latent, noise, sigma)
        # predict, loss, backward
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16"):
            velocity = model(z, sigma, context, pooled)
        loss = objective(args.objective, velocity, latent, noise, sigma, weight, args.bands, args.huber)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        # step
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / max(1, args.warmup))
        if not torch.isfinite(norm):
            raise ValueError(f"step {step}: gradient norm {norm.item()}, loss {loss.item()}, "
                             f"sigma {[round(s, 3) for s in sigma.tolist()]}; the last good state is in {out}; try a smaller --lr")
        optimizer.step()
        if ema:
            rate = min(args.ema, (step + 1) / (step + 10))
            with torch.no_grad():  # else the average drags the graph of all its steps along
                torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - rate)
        # log, save
        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            bands = band_losses(velocity.detach().float(), noise - latent).tolist()
            row = {"step": step + 1, "loss": loss.item(),
                   **{f"v_{name}": round(band, 5) for name, band in zip(BANDS, bands, strict=True)},
                   "grad_norm": norm.item(), "lr": optimizer.param_groups[0]["lr"],
                   "peak_gib": round(peak_memory_gib(device), 2),
                   "images_per_s": round((step + 1 - since) * args.batch / (time.time() - began), 3)}
            began, since = time.time(), step + 1
            with open(out / "log.jsonl", "a") as log:
                log.write(json.dumps(row) + "\n")
            bar.set_postfix_str(f"loss {row['loss']:.4f}")
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            write_model(out / MODEL_FILE, ema or model, vae, sampling, step + 1, args)  # first: it refuses weights that are no numbers
            save_run(out / "state.safetensors", kept, optimizer, step + 1, settings)
    if start >= args.steps:  # nothing was left to do but to write
        write_model(out / MODEL_FILE, ema or model, vae, sampling, start, args)
    print(f"wrote {out / MODEL_FILE}")


def four_numbers(text: str) -> tuple[float, ...]:
    values = tuple(float(v) for v in text.split(","))
    if len(values) != 4 or min(values) < 0:
        raise argparse.ArgumentTypeError(f"{text!r}: four numbers >= 0 for LL,LH,HL,HH")
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    cuda = torch.cuda.is_available()
    add = parser.add_argument_group("what").add_argument
    add("--model", default="tiny-sd3", help="name of a folder in models/")
    add("--weights", metavar="DIR", help="another model folder, as downloaded")
    add("--transformer", metavar="FILE", help="begin with this transformer instead of the folder's")
    add("--data", metavar="DIR", required=True, help="pictures and metadata.jsonl")
    add("--out", metavar="DIR", default="runs/train", help="folder of the run; an unfinished run there goes on")
    add = parser.add_argument_group("pictures").add_argument
    add("--res", type=int, default=1024, help="side of the training squares, pixels")
    add("--factor", type=int, default=16, choices=(8, 16), help="down-sampling of the VAE")
    add("--center-crop", action="store_true", help="central squares, not mirrored: to learn a few pictures by heart")
    add("--drop-words", type=float, default=0.0,
        help="probability of each word, in every second caption; those are encoded as they come")
    add("--drop-caption", type=float, default=0.1, help="probability of the empty caption, for classifier-free guidance")
    add = parser.add_argument_group("objective").add_argument
    add("--objective", default="paper", choices=("paper", "release"), help="bands of the velocity, or of the denoised latent")
    add("--bands", type=four_numbers, default=(1.0, 1.0, 1.0, 1.0), help="weights of LL,LH,HL,HH")
    add("--huber", type=float, default=0.0, help="0: squared; above: width of the pseudo-Huber penalty, in units of the latent")
    add("--density", default="logit_normal", choices=DENSITIES, help="how sigma is drawn")
    add("--time-shift", type=float, default=3.0, help="of the drawn sigma; above 1 is noisier")
    add("--weighting", default="none", choices=SCHEMES, help="w(sigma)")
    add = parser.add_argument_group("optimizer").add_argument
    add("--steps", type=int, default=20_000, help="of the whole run")
    add("--batch", type=int, default=32, help="pictures a step")
    add("--lr", type=float, default=1e-6, help="constant after the warm-up")
    add("--warmup", type=int, default=0, help="steps")
    add("--weight-decay", type=float, default=1e-4, help="of AdamW")
    add("--clip", type=float, default=1.0, help="gradient norm")
    add("--ema", type=float, default=0.0, help="0: none; else decay a step of the averaged weights, which are then the ones written")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="cuda" if cuda else "cpu", help="cpu or cuda")
    add("--dtype", default="bf16" if cuda else "fp32", choices=("fp32", "bf16"), help="of the arithmetic; weights and moments are fp32")
    add("--save-dtype", default="fp16", choices=tuple(SAVE_DTYPES), help="of the written model")
    add("--save-every", type=int, default=500, help="steps between states")
    add("--log-every", type=int, default=10, help="steps between log lines")
    add("--seed", type=int, default=0, help="of every draw")
    add("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    add("--dry-run", action="store_true", help="check everything, print the settings, stop")
    args = parser.parse_args()
    try:
        check_settings(args)
        torch.set_num_threads(args.threads)
        train(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except torch.OutOfMemoryError:
        raise SystemExit("error: the GPU's memory is too small for this; give a smaller --res or --batch") from None


if __name__ == "__main__":
    main()
