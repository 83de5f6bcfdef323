"""All commands: Ctrl-C ends them in one line, they start under python -OO, the published data set goes through."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import CAPTIONS, ROOT, run_script
from PIL import Image

WORK = {  # command, and what it shows once it is at work
    "sample": ("sample.py --prompt cup --res 512 --steps 2000 --out {out}", b"sampling"),
    "data": ("data.py check {pictures}", b"pictures"),
    "detail": ("metrics.py detail {pictures} --cache {out} --workers 2", b"pictures"),
    "train": ("train.py --data examples --res 64 --batch 1 --steps 100000 --out {out} --threads 1", b"loss"),
    "train_vae": ("train_vae.py --data examples --pixels 4096 --threads 1 --steps 100000 --out {out}", b"loss")}


def descendants(pid: int) -> list[int]:
    """Processes that a process has started, and theirs."""
    children = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [grandchild for child in children for grandchild in descendants(child)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Sixty pictures of noise that take a while to score."""
    folder, rows = tmp_path_factory.mktemp("pictures"), []
    pixels = np.random.default_rng(0).integers(0, 256, (800, 800, 3), dtype=np.uint8)
    for k in range(60):
        Image.fromarray(np.roll(pixels, k, axis=1)).save(folder / f"{k}.png", compress_level=1)
        rows.append(json.dumps({"file_name": f"{k}.png", "text": f"noise {k}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize("name", WORK)
def test_ctrl_c_ends_a_command_in_one_line_and_leaves_no_process(name, pictures, tmp_path):
    text, sign = WORK[name]
    command = [sys.executable, *text.format(out=tmp_path / "out", pictures=pictures).split()]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    shown = b""
    while sign not in shown:  # the progress bar of the work has begun
        shown += (more := process.stderr.read1())
        assert more, shown
    started = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[1].replace(b"\r", b"\n").decode().splitlines()
    assert process.returncode == 130
    assert rest[-1].startswith(("interrupted", "stopped after step")) and "Traceback" not in "".join(rest)
    time.sleep(0.5)
    assert not [pid for pid in started if Path(f"/proc/{pid}/stat").is_file()
                and Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"]


@pytest.mark.parametrize("script", ["sample.py", "train.py", "train_vae.py", "metrics.py", "data.py"])
def test_commands_start_without_docstrings(script):
    command = [sys.executable, "-OO", script, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr


def test_published_data_set_goes_through_the_commands_of_the_readme(photos, model, tmp_path):
    """A small tree with the names of Aesthetic-4K: check, encode, train, sample, and scores paired by record."""
    tree = tmp_path / "Aesthetic-4K"
    for part in ("train", "eval/size_2048", "eval/size_4096"):
        shutil.copytree(photos, tree / part, ignore=shutil.ignore_patterns(".*"))
    prompts, out = tree / "eval" / "size_2048" / "metadata.jsonl", tmp_path / "out"
    done = run_script("data.py", "check", tree)
    assert done.returncode == 1 and all(str(tree / part) in done.stderr for part in ("train", "eval/size_2048"))
    for command in (
            f"data.py check {tree}/train --res 64", f"data.py encode {tree}/train --weights {model}",
            f"train.py --weights {model} --data {tree}/train --res 64 --batch 4 --steps 2 --out {tmp_path}/run",
            f"sample.py --weights {model} --transformer {tmp_path}/run/sd3.safetensors --prompts {prompts} --out {out} "
            "--res 64 --steps 2",
            f"metrics.py set {out} --reference {prompts.parent} --prompts {prompts} --cache {tmp_path}/cache --json"):
        done = run_script(*command.split())
        assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["generated"] == report["reference"] == len(CAPTIONS)
    assert any("by what they record" in note for note in report["notes"]), report["notes"]
