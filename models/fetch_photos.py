"""Fetch the photographs of the embedded models: wallpapers and puzzle pictures from Debian 12's own packages.

Packages are downloaded with `apt-get download`; nothing is installed. Each picture's sha256 is checked. Pictures that
are there and intact are not fetched again.
Writes    DIR/<file_name>      upright 8-bit RGB: a byte-for-byte copy, or else written again, without loss as .png
          DIR/metadata.jsonl   {"file_name", "text", "alt"}, one picture per line, as in Aesthetic-4K
          DIR/CREDITS.md       package, path, licence and author of every picture
Exit      0 all pictures are in place; 1 some are not, and metadata.jsonl lists only those that are; 2 bad usage
Run       python models/fetch_photos.py --out DIR [--list FILE] [--max-side 4096]    needs Debian 12
Check     python -m pytest tests/test_fetch_photos.py
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache, partial
from pathlib import Path, PurePosixPath

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from files import read_json, replacing  # noqa: E402
from reading.pictures import read_picture  # noqa: E402

STATE = ".fetch_photos.json"  # in DIR: record_of the pictures that were written again
REQUIRED = ("package", "version", "path", "width", "height", "sha256", "licence", "file_name", "text", "alt")
FORMATS = {".jpg": "JPEG", ".png": "PNG"}
CREDITS = """# Credits

The pictures in this folder come from Debian packages. Where a package and the picture's own
notice name different licences, both are given.

{}| file | author | licence | package | path in the package | note |
|---|---|---|---|---|---|
"""
REWRITTEN = ("Pictures marked * were written again (converted to RGB, turned upright or scaled down); "
             "the others are unchanged.\n\n")


def read_list(path: Path, max_side: int) -> list[dict]:
    """The rows, each with its own "max_side", 0 to keep every pixel; ValueError names the line of the first bad one."""
    rows: dict[str, dict] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON ({error})") from None
        if lacking := [key for key in REQUIRED if not isinstance(row, dict) or key not in row]:
            raise ValueError(f"{where}: lacks {', '.join(lacking)}")
        name, source = row["file_name"], PurePosixPath(row["path"])
        if name != os.path.basename(name) or name.startswith(".") or Path(name).suffix.lower() not in FORMATS:
            raise ValueError(f"{where}: file_name must be a plain .jpg or .png name: {name!r}")
        if source.is_absolute() or ".." in source.parts:
            raise ValueError(f"{where}: path must be relative and inside the package: {str(source)!r}")
        if name in rows:
            raise ValueError(f"{where}: file_name {name!r} comes twice")
        rows[name] = row | {"max_side": max_side if 0 < max_side < max(row["width"], row["height"]) else 0}
    if not rows:
        raise ValueError(f"{path}: the list is empty")
    return list(rows.values())


def run(*command: str, folder: Path | None = None) -> str:
    """Run a command; returns "" or, if it fails, its first error line."""
    env = os.environ | {"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    result = subprocess.run(command, cwd=folder, env=env, stdin=subprocess.DEVNULL, text=True, capture_output=True)
    lines = [line.strip() for line in (result.stderr or result.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("E:")]
    return (errors or lines or [f"exit status {result.returncode}"])[0] if result.returncode else ""


@cache
def update_lists() -> None:
    print("package lists are missing or old: running apt-get update", flush=True)
    if reason := run("apt-get", "-q", "update"):  # often only a third-party source fails: the download is tried again
        root = "" if os.geteuid() == 0 else " (it usually needs root)"
        print(f"warning: apt-get update: {reason}{root}", file=sys.stderr)


def fetch(package: str, version: str, folder: Path) -> Path:
    """Download a package, unpack it to folder/x and return the .deb; ValueError with the reason if that fails."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise ValueError(f"{tool} not found: this script needs Debian 12 (or a container of it)")
    # Sandbox::User=root: no warning when root downloads into a private folder
    download = partial(run, "apt-get", "-q", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=2", "download",
                       folder=folder)
    if reason := download(f"{package}={version}"):
        update_lists()
        reason = download(f"{package}={version}")
    if reason and (other := download(package)):
        raise ValueError(f"package {package} {version}: {reason}" + (f" / {other}" if other != reason else "")
                         + "; is Debian 12 (bookworm) 'main' in your apt sources?")
    deb = min(folder.glob("*.deb"))
    if reason:
        print(f"warning: {package} {version} is not available, using {deb.name} "
              "(each picture's sha256 is still checked)", file=sys.stderr)
    if reason := run("dpkg-deb", "-x", str(deb), str(folder / "x")):
        raise ValueError(f"dpkg-deb -x {deb.name}: {reason}")
    return deb


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def record_of(row: dict, path: Path) -> dict:
    return {"source": row["sha256"], "output": sha256(path), "max_side": row["max_side"]}


def in_place(row: dict, folder: Path, state: dict) -> bool:
    """Whether the picture is there, intact, and made with the same --max-side."""
    path, digest = folder / row["file_name"], row["sha256"]
    copied = {"source": digest, "output": digest, "max_side": 0}
    return path.is_file() and record_of(row, path) in (copied, state.get(path.name))


def place(row: dict, deb: Path, folder: Path, state: dict) -> None:
    """Check one picture of an unpacked package and write it; OSError or ValueError if that fails."""
    source, target, max_side = deb.parent / "x" / row["path"], folder / row["file_name"], row["max_side"]
    if not source.is_file():
        raise ValueError(f"not in {deb.name}: {row['path']}")
    if (digest := sha256(source)) != row["sha256"]:
        raise ValueError(f"checksum mismatch for {row['path']} in {deb.name}: expected {row['sha256']}, got {digest}")
    with Image.open(source) as picture, replacing(target) as temporary:
        format, upright = FORMATS[target.suffix.lower()], picture.getexif().get(0x0112, 1) in (0, 1)
        plain = picture.mode == "RGB" and "transparency" not in picture.info and picture.format == format
        state.pop(target.name, None)
        if plain and upright and not max_side:
            shutil.copyfile(source, temporary)
            return
        profile = picture.info.get("icc_profile") if picture.mode.startswith("RGB") else None
        out = read_picture(source)
        if max_side:
            size = [max(1, round(side * max_side / max(out.size))) for side in out.size]
            out = out.resize(size, Image.Resampling.LANCZOS)
        out.save(temporary, format, quality=95, subsampling=0, icc_profile=profile)  # both: of JPEG
        state[target.name] = record_of(row, temporary)


def fetch_all(rows: list[dict], folder: Path, state: dict) -> list[str]:
    """Fetch the packages of the rows one after the other and place their pictures; the errors, one line each."""
    errors = []
    for package, version in dict.fromkeys((row["package"], row["version"]) for row in rows):
        members = [row for row in rows if (row["package"], row["version"]) == (package, version)]
        with tempfile.TemporaryDirectory(prefix="fetch_photos-") as temporary:
            print(f"{package} {version}: {len(members)} picture(s)", flush=True)
            try:
                deb = fetch(package, version, Path(temporary))
            except (OSError, ValueError) as error:
                names = ", ".join(row["file_name"] for row in members)
                errors.append(f"{error} ({len(members)} picture(s) left out: {names})")
                continue
            for row in members:
                try:
                    place(row, deb, folder, state)
                except (OSError, ValueError) as error:
                    errors.append(f"{row['file_name']}: {error}")
    return errors


def write_listings(rows: list[dict], folder: Path, state: dict) -> None:
    """Write metadata.jsonl, CREDITS.md and STATE; a picture that was written again is marked."""
    listing, credits = "", CREDITS.format(REWRITTEN if any(row["file_name"] in state for row in rows) else "")
    for row in rows:
        listing += json.dumps({key: row[key] for key in ("file_name", "text", "alt")}, ensure_ascii=False) + "\n"
        name = row["file_name"] + (" *" if row["file_name"] in state else "")
        cells = (name, row.get("author", "not named"), row["licence"], f"{row['package']} {row['version']}",
                 row["path"], row.get("note", ""))
        cells = [str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells]
        credits += f"| {' | '.join(cells)} |\n"
    for name, text in (("metadata.jsonl", listing), ("CREDITS.md", credits),
                       (STATE, json.dumps(state, indent=1, sort_keys=True) + "\n")):
        with replacing(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="Fetch the photographs of the embedded models.", allow_abbrev=False)
    add = parser.add_argument
    add("--out", required=True, type=Path, metavar="DIR", help="folder to fill")
    add("--list", type=Path, metavar="FILE", default=Path(__file__).with_name("photos_train.jsonl"),
        help="list of pictures (default: photos_train.jsonl beside this script)")
    add("--max-side", type=int, default=0, metavar="N",
        help="scale pictures down whose longer side is over N pixels (default: keep every pixel)")
    args = parser.parse_args()
    if args.max_side < 0:
        parser.error("--max-side must not be negative")
    folder, state = args.out, {}
    try:
        rows = read_list(args.list, args.max_side)
        folder.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with suppress(OSError, ValueError):
        state = read_json(folder / STATE)

    missing = [row for row in rows if not in_place(row, folder, state)]
    errors = fetch_all(missing, folder, state)
    good = [row for row in rows if in_place(row, folder, state)]
    write_listings(good, folder, state)
    pictures = {file.name for file in folder.glob("[!.]*") if file.suffix.lower() in (*FORMATS, ".jpeg")}
    if strangers := sorted(pictures - {row["file_name"] for row in good}):  # data.py does not read them
        print(f"warning: {folder} also holds {len(strangers)} picture(s) that metadata.jsonl does not list: "
              f"{', '.join(strangers[:5])}{', ...' if len(strangers) > 5 else ''}", file=sys.stderr)
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    failed, there = len(rows) - len(good), len(rows) - len(missing)
    size = sum((folder / row["file_name"]).stat().st_size for row in good) / 1e6
    print(f"{'INCOMPLETE' if failed else 'ok'}: {len(good)} of {len(rows)} pictures in {folder} "
          f"({len(missing) - failed} fetched, {there} already there, {failed} failed, {size:.1f} MB)")
    return 1 if failed or errors else 0


if __name__ == "__main__":
    sys.exit(main())
