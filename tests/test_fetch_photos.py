"""fetch_photos.py against packages that stand-ins of apt-get and dpkg-deb deliver."""

import hashlib
import json
import os
import sys
from pathlib import Path

import pytest
from PIL import Image

from models import fetch_photos

APT = """#!/bin/sh
echo "$@" >> "{log}"
case "$*" in *download*) ;; *) exit 0;; esac
for last; do :; done
[ -d "{packages}/${{last%%=*}}" ] || {{ echo "E: no package $last" >&2; exit 100; }}
touch "${{last%%=*}}.deb"
"""
DPKG = """#!/bin/sh
cp -r "{packages}/$(basename "$2" .deb)" "$3"
"""


class Packages:
    """A folder of packages, the list of their pictures, and the script run on it in this process."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
        self.packages, self.tools, self.rows = folder / "packages", folder / "bin", []
        self.out, self.list, self.log = folder / "out", folder / "list.jsonl", folder / "log"
        self.monkeypatch, self.capsys = monkeypatch, capsys
        self.tools.mkdir()
        for name, script in (("apt-get", APT), ("dpkg-deb", DPKG)):
            (self.tools / name).write_text(script.format(log=self.log, packages=self.packages))
            (self.tools / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(self.tools), prepend=os.pathsep)

    def add(self, name: str, picture: Image.Image, package: str = "wallpapers", **changed: object) -> Path:
        path = self.packages / package / "usr" / f"source-{name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        row = {"package": package, "version": "1", "path": f"usr/source-{name}", "width": picture.width,
               "height": picture.height, "sha256": digest, "licence": "CC0|1", "author": "A", "file_name": name,
               "text": "a caption", "alt": ["ä wording"]}
        self.rows.append(row | changed)
        return path

    def run(self, *flags: str) -> tuple[int, str, str]:
        """Exit status, stdout, stderr."""
        self.list.write_text("\n".join(json.dumps(row) for row in self.rows))
        fetch_photos.update_lists.cache_clear()
        self.monkeypatch.setattr(sys, "argv", ["fetch_photos.py", f"--out={self.out}", f"--list={self.list}", *flags])
        status = fetch_photos.main()
        return status, *self.capsys.readouterr()


@pytest.fixture
def fake(tmp_path, monkeypatch, capsys):
    return Packages(tmp_path, monkeypatch, capsys)


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    return Image.frombytes(mode, (width, height), bytes(range(256)) * (width * height * len(mode) // 256))


def test_pictures_are_copied_or_written_again_and_listed(fake):
    plain, gray = fake.add("plain.png", noise(32, 16)), fake.add("gray.png", noise(32, 16, "L"))
    status, out, _ = fake.run()
    assert status == 0 and "ok: 2 of 2 pictures" in out and "(2 fetched, 0 already there, 0 failed" in out
    assert (fake.out / "plain.png").read_bytes() == plain.read_bytes()
    with Image.open(fake.out / "gray.png") as picture:
        assert picture.mode == "RGB" and picture.convert("L").tobytes() == Image.open(gray).tobytes()
    lines = (fake.out / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"file_name": name, "text": "a caption", "alt": ["ä wording"]} for name in ("plain.png", "gray.png")]
    credits = (fake.out / "CREDITS.md").read_text()
    assert "| plain.png | A | CC0\\|1 | wallpapers 1 | usr/source-plain.png |  |" in credits
    assert "| gray.png * |" in credits


def test_second_run_fetches_nothing_and_a_damaged_picture_is_fetched_again(fake):
    fake.add("plain.png", noise(32, 16))
    fake.add("gray.png", noise(32, 16, "L"))
    fake.run()
    fake.log.unlink()
    assert "(0 fetched, 2 already there, 0 failed" in fake.run()[1] and not fake.log.exists()
    (fake.out / "gray.png").write_bytes(b"broken")
    assert "(1 fetched, 1 already there, 0 failed" in fake.run()[1]


def test_max_side_scales_down_and_back(fake):
    plain = fake.add("plain.png", noise(32, 16))
    assert fake.run("--max-side=16")[0] == 0
    assert Image.open(fake.out / "plain.png").size == (16, 8)
    assert "(0 fetched, 1 already" in fake.run("--max-side=16")[1]
    assert fake.run()[0] == 0 and (fake.out / "plain.png").read_bytes() == plain.read_bytes()


def test_what_is_wrong_is_named_and_the_rest_is_listed(fake):
    fake.add("plain.png", noise(32, 16))
    fake.add("changed.png", noise(32, 16), sha256="0" * 64)
    fake.add("absent.png", noise(32, 16), package="absent")
    (fake.packages / "absent").rename(fake.packages / "elsewhere")
    status, out, errors = fake.run()
    assert status == 1 and "INCOMPLETE: 1 of 3 pictures" in out
    assert "changed.png: checksum mismatch" in errors and "package absent 1: E: no package absent=1" in errors
    assert "absent.png" in errors and fake.log.read_text().count("-q update") == 1
    assert len((fake.out / "metadata.jsonl").read_text().splitlines()) == 1
    assert not [file for file in fake.out.iterdir() if ".tmp" in file.name]


@pytest.mark.parametrize("changed, message", [
    ({"file_name": "../x.png"}, "plain .jpg or .png name"), ({"path": "/etc/x.png"}, "inside the package"),
    ({"file_name": "plain.png"}, "comes twice")])
def test_bad_list_is_refused_with_its_line(fake, changed, message):
    fake.add("plain.png", noise(32, 16))
    fake.add("other.png", noise(32, 16), **changed)
    status, _, errors = fake.run()
    assert status == 2 and f"{fake.list}:2: " in errors and message in errors and not fake.out.exists()


def test_pictures_that_are_not_listed_are_mentioned(fake):
    fake.add("plain.png", noise(32, 16))
    fake.run()
    noise(16, 16).save(fake.out / "stranger.jpg")
    assert "1 picture(s) that metadata.jsonl does not list: stranger.jpg" in fake.run()[2]
