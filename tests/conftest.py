"""What several test files share.

Fixtures  the devices, four soft pictures with captions, tiny model folders, the settings of a short run
Helpers   what a run wrote (log, checkpoint, metadata), whether two runs are equal, scripts in their own processes,
          the message of a refused run, damaged copies of the pictures
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import train
from checkpoint import open_weights, save
from data import Pictures
from flux import FluxConfig, new_flux
from mmdit import MMDiTConfig, new_mmdit
from models import make_tiny
from train_vae import latent_statistics, new_vae
from training.resume import newest
from training.settings import Settings, parse
from vae import VAEConfig, to_pixels

torch.backends.cudnn.allow_tf32 = False  # True by default: fp32 on a GPU means true fp32 in every test
ROOT = Path(__file__).parents[1]
# One thread here and in scripts: tests run in two processes, and sums depend on the threads in their last bits.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
CAPTIONS = ["a red boat on a quiet lake at dawn", "two old oak trees in the fog",
            "a street in the rain, seen from above", "snow on the roofs of a small town"]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device"))])
def device(request) -> str:
    """Parity with the references and a training step hold on either."""
    return request.param


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Four soft pictures, short side 64, with captions."""
    folder, rows = tmp_path_factory.mktemp("photos"), []
    for k, caption in enumerate(CAPTIONS):
        coarse = torch.randn(1, 3, 6, 6, generator=seeded(k))
        image = F.interpolate(coarse, ((64, 80), (80, 64))[k % 2], mode="bicubic")[0].clamp(-2, 2) / 2
        Image.fromarray(to_pixels(image)).save(folder / f"{k}.png")
        rows.append(json.dumps({"file_name": f"{k}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="session")
def folders(photos, tmp_path_factory):
    """DIR/tiny-sd3 and DIR/tiny-flux as models/make_tiny.py writes them, with noise on the transformers' weights.

    Without the noise many gradients of these untrained transformers are exactly 0.
    """
    folder = tmp_path_factory.mktemp("models")
    vae = new_vae(VAEConfig((8, 8, 16, 36), (8, 8, 16, 36), 1, 2, 16, 1), seed=0)
    with torch.no_grad():
        scale, shift = latent_statistics(vae, Pictures(sorted(photos.glob("*.png"))), res=64)
    save(folder / "vae.safetensors", vae.state_dict(), {"norm_groups": 1, "scale_factor": scale, "shift_factor": shift})
    flags = [f"--data={photos}", f"--vae={folder}/vae.safetensors", f"--out={folder}/tiny-sd3",
             f"--flux={folder}/tiny-flux"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_tiny.py", *flags])
        make_tiny.main()
    for file in (folder / "tiny-sd3" / "sd3.safetensors", folder / "tiny-flux" / "flux.safetensors"):
        weights = open_weights(file)
        tensors, generator = {name: t.read().float() for name, t in weights.items()}, seeded(0)
        for name, t in tensors.items():
            if not name.startswith("first_stage_model.") and not name.endswith("pos_embed"):
                t += 0.05 * torch.randn(t.shape, generator=generator)
        save(file, tensors, weights.metadata)
    return folder


@pytest.fixture(scope="session")
def model(folders, tmp_path_factory):
    """tiny-sd3 with a transformer of one block, untrained."""
    folder, weights = tmp_path_factory.mktemp("model"), open_weights(folders / "tiny-sd3" / "sd3.safetensors")
    for part in folders.glob("tiny-sd3/t*"):
        (folder / part.name).symlink_to(part)
    config = MMDiTConfig(64, 1, context_dim=192, pooled_dim=192, table_side=16, mlp_hidden=128)
    transformer = new_mmdit(config, seeded(0))
    tensors = {f"model.diffusion_model.{name}": t for name, t in transformer.state_dict().items()}
    tensors |= {name: t.read() for name, t in weights.items() if name.startswith("first_stage_model.")}
    save(folder / "sd3.safetensors", tensors, weights.metadata)
    return folder


@pytest.fixture
def settings(photos, model, tmp_path):
    """settings(lr=1e-3, ...): the Settings that train.py parses; settings.flags(...): the flags themselves."""
    def of(**changed: object) -> Settings:
        return parse(flags(**changed))

    def flags(**changed: object) -> list[str]:
        usual = dict(weights=model, data=photos, out=tmp_path / "out", res=64, batch=4, steps=6, lr=1e-3, save_every=3,
                     log_every=1, threads=1, device="cpu", dtype=changed.get("state", "fp32"), save_dtype="fp32")
        pairs = [(f"--{key.replace('_', '-')}", value) for key, value in (usual | changed).items() if value is not None]
        return [flag if value is True else f"{flag}={value}" for flag, value in pairs]

    of.flags = flags
    return of


def flux_tensors(config: FluxConfig) -> dict[str, torch.Tensor]:
    """Weights of a small Flux in which every part changes the velocity."""
    generator = torch.Generator().manual_seed(1)
    model = new_flux(config, torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if "_mod." in name or ".modulation." in name or name.startswith("final_layer"):
            nn.init.normal_(parameter, std=0.2, generator=generator)
        elif name.startswith(("time_in", "vector_in", "guidance_in")):
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return model.state_dict()


# ---- what a run wrote

def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as handle:
        return handle.metadata()


def log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def state_of(out: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's newest checkpoint, written by one process."""
    (file,) = newest(out).glob("*.safetensors")
    return load_file(file)


def steps_of(out: Path) -> int:
    """The number of steps taken before a run's newest checkpoint."""
    return json.loads((newest(out) / "run.json").read_text())["step"]


def assert_same_run(one: Path, other: Path) -> None:
    """Checkpoints, exported files and their metadata are equal bit for bit."""
    (a,), (b,) = one.glob("*.safetensors"), other.glob("*.safetensors")
    for x, y in ((state_of(one), state_of(other)), (load_file(a), load_file(b))):
        assert x.keys() == y.keys() and not [name for name in x if not torch.equal(x[name], y[name])]
    assert metadata_of(a) == metadata_of(b)


# ---- scripts and refusals

def run_script(*command: object, ranks: int = 1, restarts: int = 0, timeout: int = 600,
               **environment: str) -> subprocess.CompletedProcess:
    """Run a script in its own process, or under torchrun on several ranks."""
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
                   f"--max-restarts={restarts}", "--monitor-interval=0.1"]
    return subprocess.run([*launch, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=timeout,
                          env=os.environ | environment)


def refusal_of(settings, **changed: object) -> str:
    """The message with which train.py refuses its flags or stops; asserts that it is one line."""
    with pytest.raises(SystemExit) as end:
        train.main(settings.flags(**changed))
    message = str(end.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


def copy_of(photos: Path, folder: Path) -> Path:
    """A copy of the pictures and their listing, without caches."""
    return Path(shutil.copytree(photos, folder, ignore=shutil.ignore_patterns(".*")))


def broken_folder(photos: Path, folder: Path, kind: str) -> Path:
    """A copy of the pictures in which the third picture, or (kind "line") a line of the listing, is wrong."""
    third = copy_of(photos, folder) / "2.png"
    if kind == "small":
        Image.new("RGB", (90, 63)).save(third)
    elif kind == "text":
        third.write_text("no picture")
    elif kind == "truncated":
        third.write_bytes(third.read_bytes()[:-400])
    elif kind == "missing":
        third.unlink()
    elif kind == "line":
        with open(folder / "metadata.jsonl", "a") as listing:
            listing.write("\n{")
    else:
        raise ValueError(kind)
    return folder
