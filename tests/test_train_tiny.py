"""The recipe of the embedded models: its steps are commands that exist, it resumes, it ends with complete folders."""

import sys
from pathlib import Path

import pytest
from conftest import run_script

import train
import train_vae
from training.settings import parse

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))
import train_tiny  # noqa: E402


def test_every_run_is_accepted_by_train_py_and_starts_from_the_one_before(tmp_path):
    steps = train_tiny.steps_of(tmp_path, None, "cpu")
    written = {file for file, _ in steps}
    runs = [command for _, command in steps if command[0] == "train.py"]
    assert len(runs) == sum(map(len, train_tiny.RUNS.values()))
    for command in runs:
        settings = parse([str(part) for part in command[1:]])
        train.check(settings, 1)
        start = Path(settings.transformer)
        assert start in written or start.parent.name in ("tiny-sd3", "tiny-flux")
    assert [parse([str(part) for part in command[1:]]).res for command in runs[-4:]] == [512, 1024, 1024, 1024]


def test_it_resumes_where_a_step_failed_and_fills_the_folders(tmp_path, monkeypatch, capsys):
    ran, fail = [], ["sd3-3"]

    class Done:
        def __init__(self, code: int):
            self.returncode = code

    def run(command: list[str]) -> Done:
        script, arguments = Path(command[1]).name, command[2:]
        out = Path(arguments[arguments.index("--out") + 1]) if "--out" in arguments else Path(arguments[0])
        ran.append(out.name)
        if out.name in fail:
            fail.clear()
            return Done(1)
        file = next(file for file, step in train_tiny.steps_of(tmp_path, None, "cpu")
                    if list(map(str, step[1:])) == arguments and step[0].endswith(script))
        if script != "thin_captions.py":
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(out.name)
        if script == "make_tiny.py":
            (tmp_path / "tiny-sd3").mkdir()
        return Done(0)
    monkeypatch.setattr(train_tiny.subprocess, "run", run)
    with pytest.raises(ValueError, match="train.py ended with 1; the same command resumes there"):
        train_tiny.make(tmp_path, None, "cpu")
    done = len(ran) - 1
    train_tiny.make(tmp_path, None, "cpu")
    assert ran[done] == ran[done + 1] == "sd3-3" and ran.count("vae") == ran.count("sd3-base") == 1
    for family, last in (("sd3", "sd3-6"), ("flux", "flux-3")):
        folder = tmp_path / f"tiny-{family}"
        assert (folder / f"{family}.safetensors").read_text() == last
        assert (folder / "base_256.safetensors").exists() == (family == "sd3")
        assert (folder / "vae_16.safetensors").read_text() == "decoder"


def test_dry_run_prints_the_commands_and_writes_nothing(tmp_path):
    shown = run_script("models/train_tiny.py", "--out", tmp_path / "tiny", "--only", "flux", "--dry-run")
    lines = shown.stdout.splitlines()
    assert lines[0].startswith("python models/fetch_photos.py") and "--decoder-only" in lines[-1]
    assert not any("tiny-sd3/sd3" in line for line in lines if "train.py" in line) and not list(tmp_path.iterdir())
    train_vae.check_settings(train_vae.read_flags(train_vae.Settings, "", {}, lines[-1].split()[2:]))
