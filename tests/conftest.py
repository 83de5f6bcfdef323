"""What several test files share: four soft pictures, model folders as models/make_tiny.py makes them, the flags of a short run."""

import json
import sys
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import train
from checkpoint import open_weights, save
from data import Pictures
from mmdit import MMDiTConfig, new_mmdit
from models import make_tiny
from train_vae import latent_statistics, new_vae
from vae import VAEConfig, to_pixels

CAPTIONS = ["a red boat on a quiet lake at dawn", "two old oak trees in the fog", "a street in the rain, seen from above",
            "snow on the roofs of a small town"]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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
    """DIR/tiny-sd3 and DIR/tiny-flux as models/make_tiny.py makes them, their transformers shaken so that no gradient is exactly 0."""
    folder = tmp_path_factory.mktemp("models")
    vae = new_vae(VAEConfig((8, 8, 16, 36), (8, 8, 16, 36), 1, 2, 16, 1), seed=0)
    with torch.no_grad():
        scale, shift = latent_statistics(vae, Pictures(sorted(photos.glob("*.png"))), res=64)
    save(folder / "vae.safetensors", vae.state_dict(), {"norm_groups": 1, "scale_factor": scale, "shift_factor": shift})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_tiny.py", f"--data={photos}", f"--vae={folder}/vae.safetensors", f"--out={folder}/tiny-sd3",
                                    f"--flux={folder}/tiny-flux"])
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
    transformer = new_mmdit(MMDiTConfig(64, 1, context_dim=192, pooled_dim=192, table_side=16, mlp_hidden=128), seeded(0))
    tensors = {f"model.diffusion_model.{name}": t for name, t in transformer.state_dict().items()}
    tensors |= {name: t.read() for name, t in weights.items() if name.startswith("first_stage_model.")}
    save(folder / "sd3.safetensors", tensors, weights.metadata)
    return folder


@pytest.fixture
def settings(photos, model, tmp_path):
    """settings(lr=1e-3, ...): what the script would hand to train(), all defaults included."""
    def of(**changed: object) -> Namespace:
        caught = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "train", lambda args, listen: caught.append(args))
            patch.setattr(sys, "argv", ["train.py", *flags(**changed)])
            train.main()
        return caught[0]

    def flags(**changed: object) -> list[str]:
        usual = dict(weights=model, data=photos, out=tmp_path / "out", res=64, batch=4, steps=6, lr=1e-3, save_every=3, log_every=1,
                     threads=1, device="cpu", dtype="fp32", save_dtype="fp32")
        given = [(f"--{key.replace('_', '-')}", value) for key, value in (usual | changed).items() if value is not None]
        return [flag if value is True else f"{flag}={value}" for flag, value in given]

    of.flags = flags
    return of
