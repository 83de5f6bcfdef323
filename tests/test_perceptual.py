"""Inception, Aesthetics, LPIPS: the references' numbers with the same random weights, preprocessing, refusals.

Oracles   torch-fidelity (recorded in data/inception.safetensors; live where it is installed), torchmetrics, and plain
          stacks of torchvision's published layers, written here
data/inception.safetensors   torch-fidelity 0.4.0's features of pictures of SIZES; names and shapes in its metadata
"""

import importlib.util
import json
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import DATA
from pictures import PARITY, SIZES, apart, picture, random_state, refuses, uniform
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from scores import perceptual
from scores.clip import CLIPImage
from scores.perceptual import LPIPS, Aesthetics, Inception, clip_pixels

# ---- Inception

def inception_shapes():
    with safe_open(DATA / "inception.safetensors", framework="pt") as f:
        shapes = {name: tuple(shape) for name, shape in json.loads(f.metadata()["shapes"]).items()}
        return shapes, f.get_tensor("out/features")


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights-inception-2015-12-05-6726825d.pth"
    torch.save(random_state(inception_shapes()[0]), path)
    return path


@pytest.fixture(scope="module")
def inception(inception_file):
    return Inception.load(inception_file)


def test_inception_equals_torch_fidelity_as_recorded(inception):
    pictures = [picture(*size, seed) for seed, size in enumerate(SIZES)]
    features = inception(pictures)
    assert apart(features, inception_shapes()[1]) < PARITY
    assert apart(inception(pictures[1][None]), features[1:]) < 1e-5       # a picture does not depend on its batch


def torch_fidelity_inception():
    """torch-fidelity's class without its package's __init__, which imports torchvision; skips if not installed."""
    if "torch_fidelity" not in sys.modules:
        found = importlib.util.find_spec("torch_fidelity")
        if found is None:
            pytest.skip("torch-fidelity is not installed (pip install --no-deps torch-fidelity, for it asks for "
                        "torchvision); its recorded features are compared in any case")
        sys.modules["torch_fidelity"] = package = types.ModuleType("torch_fidelity")
        package.__path__, package.__spec__ = list(found.submodule_search_locations), found
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    return FeatureExtractorInceptionV3


def test_inception_equals_torch_fidelity_live(inception, inception_file):
    theirs = torch_fidelity_inception()("inception", ["2048"], feature_extractor_weights_path=inception_file)
    assert {name: tuple(t.shape) for name, t in theirs.state_dict().items()} == inception_shapes()[0]
    for seed, size in enumerate(SIZES):
        image = picture(*size, seed)[None]
        expected, = theirs(image)
        assert apart(inception(image), expected) < PARITY
        assert apart(inception_shapes()[1][seed:seed + 1], expected) < 1e-5


def test_tf1_resize_looks_at_multiples_of_the_scale():
    ramp = torch.arange(250, dtype=torch.uint8).expand(3, 200, 250)
    small = perceptual.tf1_resize(ramp, 100)
    assert torch.allclose(small[0, 0], torch.arange(100) * 2.5)  # no half-pixel shift
    assert torch.equal(small[:, 5], small[:, 99])
    large = perceptual.tf1_resize(ramp, 500)
    assert torch.allclose(large[0, 0], (torch.arange(500) * 0.5).clamp(max=249))  # the edge repeats
    same = picture(299, 299)
    assert torch.equal(perceptual.tf1_resize(same), same.float())


def test_resize_crop_takes_the_centre_at_the_short_side():
    wide = picture(2048, 1536)
    crop = perceptual.resize_crop([wide, wide.transpose(1, 2)], 512)
    assert crop.shape == (2, 3, 512, 512) and crop.dtype == torch.uint8
    pillow = Image.fromarray(wide.permute(1, 2, 0).numpy()).resize((682, 512), Image.Resampling.BILINEAR)
    pillow = torch.tensor(np.array(pillow.crop((85, 0, 597, 512)))).permute(2, 0, 1)
    assert (crop[0].int() - pillow).abs().max() <= 1  # Pillow rounds twice
    square = picture(300, 300)[None]
    assert torch.equal(perceptual.resize_crop(square, 300), square)


def test_inception_reads_both_published_files_and_refuses_one_wrong_name(inception, inception_file, tmp_path,
                                                                         monkeypatch):
    shapes = {name: shape for name, shape in inception_shapes()[0].items() if not name.endswith("num_batches_tracked")}
    assert 94 + len(shapes) == len(inception_shapes()[0])                  # 94 counters of training steps, not needed
    other = {name: t for name, t in torch.load(inception_file, weights_only=True).items() if name in shapes}
    torch.save(other, tmp_path / "pt_inception-2015-12-05-6726825d.pth", _use_new_zipfile_serialization=False)
    image = picture(64, 48)[None]
    assert torch.equal(Inception.load(tmp_path / "pt_inception-2015-12-05-6726825d.pth")(image), inception(image))
    for victim in ("Mixed_6c.branch7x7dbl_4.conv.weight", "Mixed_7b.branch3x3_2b.bn.running_mean", "fc.bias"):
        refuses(lambda: Inception.load("x"), perceptual, shapes, victim, monkeypatch)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 8, 8), (0, 3, 8, 8), (1, 3, 0, 8), None])
def test_pictures_must_be_uint8_rgb(shape, inception):
    images = torch.zeros(shape, dtype=torch.uint8) if shape else torch.zeros(1, 3, 8, 8)
    for network in (inception, clip_pixels):
        with pytest.raises(ValueError, match="uint8 pictures|no pictures"):
            network(images)


# ---- Aesthetics

def aesthetics_shapes():
    widths = (768, 1024, 128, 64, 16, 1)
    pairs = zip((0, 2, 4, 6, 7), widths[1:], widths[:-1], strict=True)
    return {f"layers.{i}.{leaf}": shape for i, out, into in pairs
            for leaf, shape in (("weight", (out, into)), ("bias", (out,)))}


def test_aesthetics_is_the_published_head_and_one_affine_map(tmp_path, monkeypatch):
    state, path = random_state(aesthetics_shapes()), tmp_path / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(state, path)
    head = Aesthetics.load(path)
    embedding = uniform("embedding", (5, 768), -3, 3)
    x = embedding.numpy() / np.linalg.norm(embedding.numpy(), axis=-1, keepdims=True)
    for i in (0, 2, 4, 6, 7):
        x = x @ state[f"layers.{i}.weight"].numpy().T + state[f"layers.{i}.bias"].numpy()
    assert apart(head(embedding), torch.from_numpy(x[:, 0])) < 1e-5
    unit = F.normalize(embedding, dim=1)
    inside = F.normalize(0.3 * unit[0] + 0.7 * unit[1], dim=0)
    length = (0.3 * unit[0] + 0.7 * unit[1]).norm()
    zero = head(torch.zeros(1, 768))                                        # the constant of the map
    affine = zero + (0.3 * (head(embedding[:1]) - zero) + 0.7 * (head(embedding[1:2]) - zero)) / length
    assert apart(head(inside[None]), affine) < 1e-4
    for victim in ("layers.4.weight", "layers.7.bias"):
        refuses(lambda: Aesthetics.load("x"), perceptual, aesthetics_shapes(), victim, monkeypatch)


# ---- LPIPS

def torchvision_features(net, *unused):
    """`features` of torchvision's vgg16 and alexnet, layer by layer."""
    relu = nn.ReLU
    if net == "alexnet":
        return nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2), relu(), nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2), relu(), nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1), relu(), nn.Conv2d(384, 256, 3, padding=1), relu(),
            nn.Conv2d(256, 256, 3, padding=1), relu(), nn.MaxPool2d(3, 2))
    layers, channels = [], 3
    for width in (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"):
        layers += [nn.MaxPool2d(2, 2)] if width == "M" else [nn.Conv2d(channels, width, 3, padding=1), relu()]
        channels = channels if width == "M" else width
    return nn.Sequential(*layers)


LIN_WIDTHS = {"vgg": (64, 128, 256, 512, 512), "alex": (64, 192, 384, 256, 256)}
BACKBONES = {"vgg": ("vgg16", "vgg16-397923af.pth"), "alex": ("alexnet", "alexnet-owt-7be5be79.pth")}


@pytest.fixture(scope="module", params=["vgg", "alex"])
def lpips_files(request, tmp_path_factory):
    net, folder = request.param, tmp_path_factory.mktemp(request.param)
    name, file = BACKBONES[net]
    with torch.device("meta"):
        shapes = {f"features.{key}": tuple(t.shape) for key, t in torchvision_features(name).state_dict().items()}
    classifier = {"classifier.6.weight": torch.zeros(1000, 16), "classifier.6.bias": torch.zeros(1000)}
    backbone = random_state(shapes) | classifier
    torch.save(backbone, folder / file, _use_new_zipfile_serialization=False)      # as old as the published files
    lin = {f"lin{i}.model.1.weight": uniform(f"lin{i}", (1, width, 1, 1), 0, 1)
           for i, width in enumerate(LIN_WIDTHS[net])}
    torch.save(lin, folder / f"{net}.pth")
    return net, folder / file, folder / f"{net}.pth", backbone, lin


def image_pair(width, height):
    a, b = (picture(width, height, seed).float()[None] / 127.5 - 1 for seed in (3, 4))
    return torch.cat((a, a)), torch.cat((b, 0.9 * a + 0.1 * b))


def test_lpips_equals_a_plain_stack(lpips_files):
    net, file, lin_file, backbone, lin = lpips_files
    ours, (a, b) = LPIPS.load(net, file, lin_file), image_pair(211, 157)
    features = torchvision_features(BACKBONES[net][0])
    features.load_state_dict({key.removeprefix("features."): t for key, t in backbone.items() if "class" not in key})
    shift, scale = (torch.tensor(rgb)[:, None, None] for rgb in ([-.030, -.088, -.188], [.458, .448, .450]))
    expected, (x, y), level = torch.zeros(2), ((2 * ((p + 1) / 2) - 1 - shift) / scale for p in (a, b)), 0
    pools = [i for i, layer in enumerate(features) if isinstance(layer, nn.MaxPool2d)]
    relus = [i for i, layer in enumerate(features) if isinstance(layer, nn.ReLU)]
    taps = [i - 1 for i in pools] if net == "vgg" else relus
    with torch.no_grad():
        for i, layer in enumerate(features):
            x, y = layer(x), layer(y)
            if i in taps:
                unit = [z / (z.square().sum(1, keepdim=True).sqrt() + 1e-10) for z in (x, y)]
                expected += F.conv2d((unit[0] - unit[1]) ** 2, lin[f"lin{level}.model.1.weight"]).mean((1, 2, 3))
                level += 1
    assert level == 5 and apart(ours(a, b), expected) < PARITY
    assert torch.equal(ours(a, a), torch.zeros(2)) and ours(a, b)[1] < ours(a, b)[0]


def test_lpips_equals_torchmetrics(lpips_files, monkeypatch):
    theirs = pytest.importorskip("torchmetrics.functional.image.lpips", reason="torchmetrics is not installed")
    net, file, lin_file, backbone, _ = lpips_files
    monkeypatch.setattr(theirs, "_get_tv_model_features", torchvision_features)
    model = theirs._LPIPS(net=net, pnet_rand=True, model_path=lin_file)
    own = model.net.state_dict()
    model.net.load_state_dict({key: backbone["features." + key.partition(".")[2]] for key in own})
    ours, (a, b) = LPIPS.load(net, file, lin_file), image_pair(160, 150)
    assert apart(ours(a, b), model(a, b).flatten()) < PARITY


def test_lpips_has_a_gradient_even_where_features_are_dead(lpips_files):
    ours = LPIPS.load(*lpips_files[:3])
    a = torch.zeros(1, 3, 64, 64, requires_grad=True)
    ours(a, image_pair(64, 64)[0][:1]).sum().backward()
    assert torch.isfinite(a.grad).all() and a.grad.abs().max() > 0
    assert not any(p.requires_grad for p in ours.parameters())


def test_lpips_refuses_one_wrong_name_other_networks_and_other_shapes(lpips_files, monkeypatch):
    net, file, lin_file, backbone, lin = lpips_files
    ours = LPIPS.load(net, file, lin_file)
    with pytest.raises(ValueError, match="the same size"):
        ours(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 65))
    with pytest.raises(ValueError, match="at least"):
        ours(torch.zeros(1, 3, 15, 64), torch.zeros(1, 3, 15, 64))
    with pytest.raises(ValueError, match="vgg, alex"):
        LPIPS.load("squeeze", file, lin_file)
    with pytest.raises(ValueError, match="lin0.model.1.weight"):
        LPIPS.load(net, file, file)
    shapes = {name: tuple(t.shape) for name, t in (backbone | lin).items() if "classifier" not in name}
    for victim in ("features.0.weight", "lin3.model.1.weight"):
        refuses(lambda: LPIPS.load(net, "x", "y"), perceptual, shapes, victim, monkeypatch)


@pytest.mark.parametrize("load", [Inception.load, CLIPImage.load, Aesthetics.load,
                                  lambda path: LPIPS.load("vgg", path, path)])
def test_a_wrong_kind_of_file_gets_one_clear_line(load, tmp_path):
    page, listed, folder = tmp_path / "page.pth", tmp_path / "list.pth", tmp_path / "folder"
    page.write_text("<html>404</html>")
    torch.save([1, 2], listed)
    folder.mkdir()
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as z:
        z.writestr("a.txt", "x")
    save_file({"foreign": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    cases = {path: ValueError for path in (page, listed, folder, tmp_path / "zip.pt", tmp_path / "foreign.safetensors")}
    for path, error in (cases | {tmp_path / "nothing.pth": FileNotFoundError}).items():
        with pytest.raises(error) as refused:
            load(path)
        assert path.name in str(refused.value) and "\n" not in str(refused.value)
