#!/usr/bin/env python3
"""Fetch a small set of real photographs from Debian 12 packages.

The pictures are wallpapers and puzzle pictures that Debian ships in its own
packages. This script downloads the packages with ``apt-get download`` (nothing
is installed), unpacks them in a temporary folder, checks each picture's sha256
against the list, and lays the pictures out like the Aesthetic-4K data set:

    DIR/<file_name>       the pictures, RGB
    DIR/metadata.jsonl    {"file_name", "text", "alt"}, one picture a line
    DIR/CREDITS.md        package, path, licence and author of every picture

Pictures that are already 8-bit RGB and upright are copied byte for byte. Others
(grey, with alpha, or turned by EXIF) are decoded and written again without loss
where the name ends in .png. Only with --max-side are large pictures scaled down.

    python fetch_photos.py --out DIR [--list photos_train.jsonl] [--max-side 4096]

Running it again does nothing for pictures that are already there and intact.
Needs Debian 12 (apt-get, dpkg-deb) and Pillow. Exit status: 0 all pictures are in
place, 1 some are not (metadata.jsonl then lists only those that are), 2 bad usage.
"""
import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path, PurePosixPath

try:
    from PIL import Image, ImageOps
except ImportError:
    sys.exit("error: Pillow is needed (pip install pillow)")

STATE = ".fetch_photos.json"  # in DIR: sha256 of the pictures that were written again
REQUIRED = ("package", "version", "path", "width", "height", "sha256", "licence", "file_name", "text", "alt")


def sha256(path):
    h = hashlib.sha256()
    with open(path, "rb") as f:
        for block in iter(lambda: f.read(1 << 20), b""):
            h.update(block)
    return h.hexdigest()


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path in the same folder; move it to `path` if all went well."""
    fd, name = tempfile.mkstemp(dir=str(path.parent), prefix=".tmp-", suffix=path.suffix)
    os.close(fd)
    tmp = Path(name)
    try:
        yield tmp
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, str(path))
    finally:
        with contextlib.suppress(FileNotFoundError):
            tmp.unlink()


def read_list(path):
    rows, seen = [], set()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as e:
        raise ValueError(f"cannot read the list {path}: {e.strerror}") from None
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as e:
            raise ValueError(f"{path}:{n}: not JSON ({e})") from None
        lacking = [k for k in REQUIRED if not isinstance(row, dict) or k not in row]
        if lacking:
            raise ValueError(f"{path}:{n}: lacks {', '.join(lacking)}")
        name, src = row["file_name"], PurePosixPath(row["path"])
        if name != os.path.basename(name) or name.startswith(".") or not name.lower().endswith((".jpg", ".png")):
            raise ValueError(f"{path}:{n}: file_name must be a plain .jpg or .png name: {name!r}")
        if src.is_absolute() or ".." in src.parts:
            raise ValueError(f"{path}:{n}: path must be relative and inside the package: {str(src)!r}")
        if name in seen:
            raise ValueError(f"{path}:{n}: file_name {name!r} comes twice")
        seen.add(name)
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: the list is empty")
    return rows


class Apt:
    """Downloads packages; runs `apt-get update` at most once, when a download fails."""

    def __init__(self):
        for tool in ("apt-get", "dpkg-deb"):
            if shutil.which(tool) is None:
                raise RuntimeError(f"{tool} not found: this script needs Debian 12 (or a container of it)")
        self.updated = False

    @staticmethod
    def _run(args, cwd=None):
        env = dict(os.environ, LC_ALL="C", DEBIAN_FRONTEND="noninteractive")
        return subprocess.run(args, cwd=cwd, env=env, stdin=subprocess.DEVNULL, text=True, capture_output=True)

    @staticmethod
    def _reason(result):
        lines = [x.strip() for x in (result.stderr or result.stdout or "").splitlines() if x.strip()]
        errors = [x for x in lines if x.startswith("E:")]
        return (errors or lines or [f"exit status {result.returncode}"])[0]

    def _try(self, what, folder):
        # Sandbox::User=root: no warning when root downloads into a private folder
        r = self._run(["apt-get", "-q", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=2",
                       "download", what], cwd=str(folder))
        debs = sorted(Path(folder).glob("*.deb"))
        return (debs[0] if r.returncode == 0 and len(debs) == 1 else None), self._reason(r)

    def download(self, package, version, folder):
        deb, why = self._try(f"{package}={version}", folder)
        if deb is None and not self.updated:
            self.updated = True
            print("package lists are missing or old: running apt-get update", flush=True)
            r = self._run(["apt-get", "-q", "update"])
            if r.returncode:  # often only a third-party source is at fault: go on and see
                print(f"warning: apt-get update: {self._reason(r)}"
                      + ("" if os.geteuid() == 0 else " (it usually needs root)"), file=sys.stderr)
            deb, why = self._try(f"{package}={version}", folder)
        if deb is None:
            deb, other = self._try(package, folder)
            if deb is not None:
                print(f"warning: {package} {version} is not to be had, using {deb.name} "
                      "(each picture's sha256 is still checked)", file=sys.stderr)
            else:
                raise RuntimeError(f"package {package} {version}: {why}"
                                   + (f" / {other}" if other != why else "")
                                   + "; is Debian 12 (bookworm) 'main' in your apt sources?")
        return deb

    def unpack(self, deb, folder):
        r = self._run(["dpkg-deb", "-x", str(deb), str(folder)])
        if r.returncode:
            raise RuntimeError(f"dpkg-deb -x {deb.name}: {self._reason(r)}")


def make_picture(src, dst, max_side):
    """Write `src` to `dst` as an upright RGB picture. True if it was copied byte for byte."""
    with Image.open(src) as im:
        turned = im.getexif().get(0x0112, 1) not in (0, 1)
        too_big = bool(max_side) and max(im.size) > max_side
        same_kind = {"JPEG": ".jpg", "PNG": ".png"}.get(im.format) == dst.suffix.lower()
        if im.mode == "RGB" and same_kind and not turned and not too_big and "transparency" not in im.info:
            with replacing(dst) as tmp:
                shutil.copyfile(str(src), str(tmp))
            return True
        icc = im.info.get("icc_profile") if im.mode.startswith("RGB") else None
        out = ImageOps.exif_transpose(im)
        if out.mode in ("RGBA", "LA", "PA") or "transparency" in out.info:
            rgba = out.convert("RGBA")
            out = Image.new("RGB", rgba.size, "white")
            out.paste(rgba, mask=rgba.getchannel("A"))
        else:
            out = out.convert("RGB")
        if too_big:
            scale = max_side / max(out.size)
            out = out.resize(tuple(max(1, round(s * scale)) for s in out.size), Image.LANCZOS)
        with replacing(dst) as tmp:
            if dst.suffix.lower() == ".jpg":
                out.save(str(tmp), "JPEG", quality=95, subsampling=0, icc_profile=icc)
            else:
                out.save(str(tmp), "PNG", icc_profile=icc)
    return False


def load_state(out):
    try:
        state = json.loads((out / STATE).read_text(encoding="utf-8"))
        return state if isinstance(state, dict) else {}
    except (OSError, ValueError):
        return {}


def in_place(row, out, state, max_side):
    """Is the picture there, intact, and made with the same --max-side?"""
    path = out / row["file_name"]
    if not path.is_file():
        return False
    have = sha256(path)
    if have == row["sha256"]:  # a byte-for-byte copy: right unless it has to be scaled down now
        return not max_side or max(row["width"], row["height"]) <= max_side
    s = state.get(row["file_name"])
    if not isinstance(s, dict) or s.get("source") != row["sha256"] or s.get("output") != have:
        return False
    longest = max(row["width"], row["height"])
    effective = lambda m: m if m and longest > m else 0  # noqa: E731
    return effective(s.get("max_side")) == effective(max_side)


def write_text(path, text):
    with replacing(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


def credits(rows, state):
    out = ["# Credits", "",
           "The pictures in this folder come from Debian packages. Where a package and the picture's own",
           "notice name different licences, both are given.", ""]
    if any(r["file_name"] in state for r in rows):
        out += ["Pictures marked * were written again (converted to RGB, turned upright or scaled down); "
                "the others are unchanged.", ""]
    out += ["| file | author | licence | package | path in the package | note |", "|---|---|---|---|---|---|"]
    cell = lambda s: str(s).replace("|", "\\|").replace("\n", " ")  # noqa: E731
    for r in rows:
        star = " *" if r["file_name"] in state else ""
        out.append("| " + " | ".join(cell(x) for x in (
            r["file_name"] + star, r.get("author", "not named"), r["licence"],
            f"{r['package']} {r['version']}", r["path"], r.get("note", ""))) + " |")
    return "\n".join(out) + "\n"


def main(argv=None):
    p = argparse.ArgumentParser(description="Fetch real photographs from Debian 12 packages, laid out like Aesthetic-4K.")
    p.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to fill")
    p.add_argument("--list", type=Path, default=Path(__file__).resolve().parent / "photos_train.jsonl",
                   metavar="FILE", help="list of pictures (default: photos_train.jsonl beside this script)")
    p.add_argument("--max-side", type=int, default=0, metavar="N",
                   help="scale pictures down whose longer side is over N pixels (default: keep every pixel)")
    a = p.parse_args(argv)
    if a.max_side < 0:
        p.error("--max-side must not be negative")
    try:
        rows = read_list(a.list)
        a.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2

    errors, made, kept = [], 0, 0
    state = load_state(a.out)
    todo = {}
    for row in rows:
        if in_place(row, a.out, state, a.max_side):
            kept += 1
        else:
            todo.setdefault((row["package"], row["version"]), []).append(row)

    apt = None
    for (package, version), wanted in todo.items():
        with tempfile.TemporaryDirectory(prefix="fetch_photos-") as tmp:
            try:
                apt = apt or Apt()
                print(f"{package} {version}: {len(wanted)} picture(s)", flush=True)
                deb = apt.download(package, version, Path(tmp))
                tree = Path(tmp) / "x"
                apt.unpack(deb, tree)
            except (RuntimeError, OSError) as e:
                errors.append(f"{e} ({len(wanted)} picture(s) left out: "
                              f"{', '.join(r['file_name'] for r in wanted)})")
                continue
            for row in wanted:
                src, dst = tree / row["path"], a.out / row["file_name"]
                try:
                    if not src.is_file():
                        raise RuntimeError(f"not in {deb.name}: {row['path']}")
                    got = sha256(src)
                    if got != row["sha256"]:
                        raise RuntimeError(f"checksum mismatch for {row['path']} in {deb.name}: "
                                           f"expected {row['sha256']}, got {got}")
                    if make_picture(src, dst, a.max_side):
                        state.pop(row["file_name"], None)
                    else:
                        state[row["file_name"]] = {"source": row["sha256"], "output": sha256(dst),
                                                   "max_side": a.max_side}
                    made += 1
                except (RuntimeError, OSError, ValueError) as e:
                    errors.append(f"{row['file_name']}: {e}")

    failed = [r for r in rows if not in_place(r, a.out, state, a.max_side)]
    good = [r for r in rows if r not in failed]
    write_text(a.out / "metadata.jsonl", "".join(
        json.dumps({"file_name": r["file_name"], "text": r["text"], "alt": r["alt"]}, ensure_ascii=False) + "\n"
        for r in good))
    write_text(a.out / "CREDITS.md", credits(good, state))
    write_text(a.out / STATE, json.dumps(state, indent=1, sort_keys=True) + "\n")

    names = {r["file_name"] for r in good}
    strangers = sorted(f.name for f in a.out.iterdir() if f.suffix.lower() in (".jpg", ".jpeg", ".png")
                       and not f.name.startswith(".") and f.name not in names)
    if strangers:
        print(f"warning: {a.out} also holds {len(strangers)} picture(s) that metadata.jsonl does not list: "
              f"{', '.join(strangers[:5])}{', ...' if len(strangers) > 5 else ''}", file=sys.stderr)
    for e in errors:
        print(f"error: {e}", file=sys.stderr)
    size = sum((a.out / r["file_name"]).stat().st_size for r in good) / 1e6
    print(f"{'INCOMPLETE' if failed else 'ok'}: {len(good)} of {len(rows)} pictures in {a.out} "
          f"({made} fetched, {kept} already there, {len(failed)} failed, {size:.1f} MB)")
    return 1 if failed or errors else 0


if __name__ == "__main__":
    sys.exit(main())
