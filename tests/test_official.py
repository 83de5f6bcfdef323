"""Official files: what is listed, what a message says, and that reading one never runs what is written in it."""

import os
import pickle
import random
import zipfile
from dataclasses import replace

import pytest
import torch
from torch import nn

from scores.official import WEIGHTS, find_weights, open_official

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc(self.norm(x))


class Tower(nn.Module):
    """What an archive of OpenAI holds: nested modules, bare parameters, a buffer, lists, half precision."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.resblocks = nn.Sequential(Block(width), Block(width))
        self.proj = nn.Parameter(torch.randn(width, 3))
        self.register_buffer("input_resolution", torch.tensor(224))
        self.sizes = [1, 2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.resblocks(x) @ self.proj * self.sizes[0]


@pytest.fixture
def archive(tmp_path):
    torch.manual_seed(0)
    tower = Tower()
    tower.resblocks.half()
    tower.proj = nn.Parameter(tower.resblocks[0].fc.weight.detach()[:3].float().T)      # not contiguous
    torch.jit.script(tower).save(str(tmp_path / "tower.pt"))
    return tmp_path / "tower.pt"


def rewritten(source, path, change):
    """A copy of a zip in which `change(name, bytes)` gives each entry's bytes."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return path


def test_archive_gives_the_tensors_that_torch_finds_and_its_code_is_never_read(archive, tmp_path, monkeypatch):
    expected = torch.jit.load(str(archive)).state_dict()
    broken = rewritten(archive, tmp_path / "broken.pt",
                       lambda name, data: b"not TorchScript at all" if "/code/" in name else data)
    with pytest.raises(RuntimeError):
        torch.jit.load(str(broken))
    monkeypatch.setattr(torch.jit, "load", None)
    monkeypatch.setattr(torch, "load", None)
    found = open_official(broken)
    assert found.keys() == expected.keys() and "resblocks.1.fc.weight" in found
    for name, tensor in expected.items():
        ours = found[name].read()
        assert ours.dtype == tensor.dtype and torch.equal(ours, tensor) and found[name].shape == tensor.shape


class Spy(nn.Module):
    """TorchScript runs __setstate__ when it opens an archive."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return x * self.weight

    @torch.jit.export
    def __getstate__(self):
        return self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]):
        print("the archive's code ran")
        self.weight = state[0]
        self.training = state[1]


class Holds(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain, self.spy = nn.Linear(2, 3), Spy()

    def forward(self, x):
        return self.plain(self.spy(x))


def test_archive_code_runs_in_torch_and_not_here(tmp_path, capfd):
    path = str(tmp_path / "spy.pt")
    torch.jit.script(Holds()).save(path)
    torch.jit.load(path)
    assert "the archive's code ran" in capfd.readouterr().out
    found = open_official(path)
    assert capfd.readouterr().out == "" and set(found) == {"plain.weight", "plain.bias"}


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("make", ["archive", "zip", "legacy"])
def test_malicious_pickles_are_refused_before_they_run(archive, make, tmp_path):
    proof, path = tmp_path / "proof", tmp_path / "evil.pt"
    data = pickle.dumps(Evil(proof), protocol=2)
    if make == "archive":
        rewritten(archive, path, lambda name, old: data if name.endswith("/data.pkl") else old)
    else:
        torch.save({"visual.proj": Evil(proof)}, path, _use_new_zipfile_serialization=make == "zip")
    with pytest.raises(ValueError, match="evil.pt: not .*it asks for (posix|nt).system"):
        open_official(path)
    assert not proof.exists()
    pickle.loads(data)                                                      # the same bytes do run where nobody looks
    assert proof.exists()


@pytest.mark.parametrize("name", ["builtins eval", "builtins getattr", "torch load", "torch._utils _rebuild_parameter",
                                  "torch.jit load", "scores.official find_weights"])
def test_archives_may_name_nothing_but_tensors_and_modules(archive, name, tmp_path):
    data = b"\x80\x02c" + name.replace(" ", "\n").encode() + b"\n(X\x05\x00\x00\x00printtR."
    path = rewritten(archive, tmp_path / "a.pt", lambda entry, old: data if entry.endswith("/data.pkl") else old)
    with pytest.raises(ValueError, match=f"it asks for {name.replace(' ', '.')}.*nothing in it was run"):
        open_official(path)


def test_archives_that_are_cut_or_circular_are_refused_in_one_line(archive, tmp_path):
    short = rewritten(archive, tmp_path / "short.pt", lambda name, old: old[:-4] if "/data/" in name else old)
    with pytest.raises(ValueError, match=r"short\.pt: a tensor of shape .* is not in data/.*download it again"):
        open_official(short)["resblocks.0.fc.weight"].read()
    lost = tmp_path / "lost.pt"
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(lost, "w") as new:
        for name in old.namelist():
            if not name.endswith("/data/0"):
                new.writestr(name, old.read(name))
    with pytest.raises(ValueError, match="data/0 is missing"):
        open_official(lost)
    circle = b"\x80\x02c__torch__ A\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb.".replace(b"__torch__ A", b"__torch__\nA")
    path = rewritten(archive, tmp_path / "circle.pt", lambda name, old: circle if name.endswith("/data.pkl") else old)
    with pytest.raises(ValueError, match="circle.pt: not an archive"):
        open_official(path)
    half = tmp_path / "half.pt"
    half.write_bytes(archive.read_bytes()[:-200])
    with pytest.raises(ValueError, match="half.pt: not a .safetensors.*bytes: download it again"):
        open_official(half)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_state_dicts_open_in_both_formats_and_other_things_do_not(zipped, tmp_path):
    state, path = {"a.weight": torch.randn(3, 2), "b": torch.tensor(1)}, tmp_path / "w.pth"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    found = open_official(path)
    assert len(found) == 2
    assert all(torch.equal(found[name].read(), t) and found[name].shape == t.shape for name, t in state.items())
    for other in ([1, 2], {}, {"state_dict": state}, torch.zeros(2)):
        torch.save(other, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=r"w\.pth: holds a \w+, which is no dict of named tensors"):
            open_official(path)


def test_a_missing_file_says_what_needs_it_from_where_and_its_hash(tmp_path):
    for name, download in WEIGHTS.items():
        with pytest.raises(FileNotFoundError) as error:
            find_weights(tmp_path, name)
        said = str(error.value)
        assert "\n" not in said and all(part in said for part in (name, download.use, download.url, download.sha256))
        assert download.url.startswith("https://") and set(download.sha256) <= set("0123456789abcdef")
        assert len(download.sha256) == 64 or len(download.sha256) == 8 and download.sha256 in name
    assert all(WEIGHTS[name].sha256 in WEIGHTS[name].url for name in ("ViT-B-16.pt", "ViT-L-14.pt"))


@pytest.mark.filterwarnings("ignore:.*not the official file")
def test_files_are_found_by_other_names(tmp_path):
    name, other = "weights-inception-2015-12-05-6726825d.pth", tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    other.touch()
    assert find_weights(tmp_path, name) == other
    (tmp_path / name).touch()
    assert find_weights(tmp_path, name) == tmp_path / name


def test_a_file_of_the_official_name_with_another_hash_is_a_warning(tmp_path, monkeypatch, recwarn):
    (tmp_path / "alex.pth").write_bytes(b"abc")
    with pytest.warns(UserWarning, match="alex.pth: not the official file, whose sha256 begins with df73285e"):
        find_weights(tmp_path, "alex.pth")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"    # of "abc", FIPS 180-2
    monkeypatch.setitem(WEIGHTS, "alex.pth", replace(WEIGHTS["alex.pth"], sha256=digest))
    recwarn.clear()
    assert find_weights(tmp_path, "alex.pth") == tmp_path / "alex.pth" and not recwarn


@pytest.mark.parametrize("seed", range(60))
def test_a_damaged_file_is_right_or_one_line(archive, tmp_path, seed):
    draw, path = random.Random(seed), tmp_path / "damaged.pt"
    if seed % 2:
        torch.save(torch.jit.load(str(archive)).state_dict(), archive)
    data = bytearray(archive.read_bytes())
    for _ in range(draw.randint(1, 3)):
        at = draw.choice([draw.randrange(len(data)), len(data) - 1 - draw.randrange(400)])
        data[at:at + draw.randint(0, 9)] = draw.randbytes(draw.randint(0, 9))
    path.write_bytes(data)
    try:
        assert all(tuple(t.read().shape) == t.shape for t in open_official(path).values())
    except ValueError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)


@pytest.mark.parametrize("change", [lambda t: t.to_sparse(), lambda t: t.to("meta")])
def test_tensors_without_plain_numbers_and_numbered_ones_are_refused(tmp_path, change):
    for name, tensor in (("a", change(torch.eye(3))), (1, torch.eye(3))):
        torch.save({name: tensor}, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=f"w.pth: {name} is no plain tensor with a name"):
            open_official(tmp_path / "w.pth")
