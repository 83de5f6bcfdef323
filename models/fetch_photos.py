"""Fetch the photographs of the embedded models: wallpapers and puzzle pictures from Debian 12's own packages.

Packages are downloaded with `apt-get download`; nothing is installed. Each picture's sha256 is checked.
Writes    DIR/<file_name>      upright 8-bit RGB: a byte-for-byte copy, or else written again, without loss as .png
          DIR/metadata.jsonl   {"file_name", "text", "alt"}, one picture per line, as in Aesthetic-4K
          DIR/CREDITS.md       package, path, licence and author of every picture
Needs     Debian 12 (apt-get, dpkg-deb). Pictures that are there and intact are not fetched again
Exit      0 all pictures are in place; 1 some are not, and metadata.jsonl lists only those that are; 2 bad usage
Run       python models/fetch_photos.py --out DIR [--list FILE] [--max-side 4096]
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
from functools import cache
from pathlib import Path, PurePosixPath

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from checkpoint import read_json, replacing  # noqa: E402
from data import read_picture  # noqa: E402

STATE = ".fetch_photos.json"  # in DIR: sha256 of the pictures that were written again
REQUIRED = ("package", "version", "path", "width", "height", "sha256", "licence", "file_name", "text", "alt")
PICTURES = (".jpg", ".png")


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_list(path: Path) -> list[dict]:
    """The rows of the list; ValueError that names the file and line of the first bad one."""
    rows: dict[str, dict] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"cannot read the list {path}: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
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
        if name != os.path.basename(name) or name.startswith(".") or not name.lower().endswith(PICTURES):
            raise ValueError(f"{where}: file_name must be a plain .jpg or .png name: {name!r}")
        if source.is_absolute() or ".." in source.parts:
            raise ValueError(f"{where}: path must be relative and inside the package: {str(source)!r}")
        if name in rows:
            raise ValueError(f"{where}: file_name {name!r} comes twice")
        rows[name] = row
    if not rows:
        raise ValueError(f"{path}: the list is empty")
    return list(rows.values())


# ---- packages

def run(*command: str, cwd: Path | None = None) -> tuple[bool, str]:
    """Whether the command succeeded, and its first error line."""
    env = os.environ | {"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    result = subprocess.run(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, text=True, capture_output=True)
    lines = [line.strip() for line in (result.stderr or result.stdout or "").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("E:")]
    return result.returncode == 0, (errors or lines or [f"exit status {result.returncode}"])[0]


def download(what: str, folder: Path) -> tuple[Path | None, str]:
    # Sandbox::User=root: no warning when root downloads into a private folder
    good, reason = run("apt-get", "-q", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=2", "download", what,
                       cwd=folder)
    debs = sorted(folder.glob("*.deb"))
    return (debs[0] if good and len(debs) == 1 else None), reason


@cache
def update_lists() -> None:
    print("package lists are missing or old: running apt-get update", flush=True)
    good, reason = run("apt-get", "-q", "update")
    if not good:  # often only a third-party source is at fault, so the download is tried again all the same
        root = "" if os.geteuid() == 0 else " (it usually needs root)"
        print(f"warning: apt-get update: {reason}{root}", file=sys.stderr)


def fetch(package: str, version: str, folder: Path) -> Path:
    """Download a package, unpack it to folder/x and return the .deb; RuntimeError with the reason if that fails."""
    if lacking := [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]:
        raise RuntimeError(f"{lacking[0]} not found: this script needs Debian 12 (or a container of it)")
    deb, reason = download(f"{package}={version}", folder)
    if deb is None:
        update_lists()
        deb, reason = download(f"{package}={version}", folder)
    if deb is None:
        deb, other = download(package, folder)
        if deb is None:
            raise RuntimeError(f"package {package} {version}: {reason}" + (f" / {other}" if other != reason else "")
                               + "; is Debian 12 (bookworm) 'main' in your apt sources?")
        print(f"warning: {package} {version} is not available, using {deb.name} "
              "(each picture's sha256 is still checked)", file=sys.stderr)
    good, reason = run("dpkg-deb", "-x", str(deb), str(folder / "x"))
    if not good:
        raise RuntimeError(f"dpkg-deb -x {deb.name}: {reason}")
    return deb


# ---- pictures

def make_picture(source: Path, target: Path, max_side: int) -> bool:
    """Write `source` to `target` as an upright RGB picture; True if it was copied byte for byte."""
    with Image.open(source) as picture, replacing(target) as temporary:
        upright = picture.getexif().get(0x0112, 1) in (0, 1)
        too_large = bool(max_side) and max(picture.size) > max_side
        same_format = {"JPEG": ".jpg", "PNG": ".png"}.get(picture.format) == target.suffix.lower()
        if picture.mode == "RGB" and same_format and upright and not too_large and "transparency" not in picture.info:
            shutil.copyfile(source, temporary)
            return True
        profile = picture.info.get("icc_profile") if picture.mode.startswith("RGB") else None
        out = read_picture(source)
        if too_large:
            scale = max_side / max(out.size)
            out = out.resize([max(1, round(side * scale)) for side in out.size], Image.Resampling.LANCZOS)
        if target.suffix.lower() == ".jpg":
            out.save(temporary, "JPEG", quality=95, subsampling=0, icc_profile=profile)
        else:
            out.save(temporary, "PNG", icc_profile=profile)
    return False


def in_place(row: dict, folder: Path, state: dict, max_side: int) -> bool:
    """Whether the picture is there, intact, and made with the same --max-side."""
    path, longest = folder / row["file_name"], max(row["width"], row["height"])
    if not path.is_file():
        return False
    digest, record = sha256(path), state.get(row["file_name"])
    if digest == row["sha256"]:  # a byte-for-byte copy: right unless it must be scaled down now
        return not max_side or longest <= max_side
    if not isinstance(record, dict) or (record.get("source"), record.get("output")) != (row["sha256"], digest):
        return False
    limit, former = (side if side and longest > side else 0 for side in (max_side, record.get("max_side")))
    return limit == former


def place(row: dict, deb: Path, folder: Path, state: dict, max_side: int) -> None:
    """Check one picture of an unpacked package and write it; RuntimeError, OSError or ValueError if that fails."""
    source, target, name = deb.parent / "x" / row["path"], folder / row["file_name"], row["file_name"]
    if not source.is_file():
        raise RuntimeError(f"not in {deb.name}: {row['path']}")
    digest = sha256(source)
    if digest != row["sha256"]:
        raise RuntimeError(f"checksum mismatch for {row['path']} in {deb.name}: expected {row['sha256']}, got {digest}")
    if make_picture(source, target, max_side):
        state.pop(name, None)
    else:
        state[name] = {"source": row["sha256"], "output": sha256(target), "max_side": max_side}


def fetch_all(rows: list[dict], folder: Path, state: dict, max_side: int) -> list[str]:
    """Fetch the packages of the rows one after the other and place their pictures; the errors, one line each."""
    errors, packages = [], {}
    for row in rows:
        packages.setdefault((row["package"], row["version"]), []).append(row)
    for (package, version), members in packages.items():
        with tempfile.TemporaryDirectory(prefix="fetch_photos-") as temporary:
            print(f"{package} {version}: {len(members)} picture(s)", flush=True)
            try:
                deb = fetch(package, version, Path(temporary))
            except (RuntimeError, OSError) as error:
                names = ", ".join(row["file_name"] for row in members)
                errors.append(f"{error} ({len(members)} picture(s) left out: {names})")
                continue
            for row in members:
                try:
                    place(row, deb, folder, state, max_side)
                except (RuntimeError, OSError, ValueError) as error:
                    errors.append(f"{row['file_name']}: {error}")
    return errors


# ---- the folder

def credits(rows: list[dict], state: dict) -> str:
    """CREDITS.md: one table row per picture."""
    def cells(*values: object) -> str:
        return "| " + " | ".join(str(value).replace("|", "\\|").replace("\n", " ") for value in values) + " |"

    out = ["# Credits", "",
           "The pictures in this folder come from Debian packages. Where a package and the picture's own",
           "notice name different licences, both are given.", ""]
    if any(row["file_name"] in state for row in rows):
        out += ["Pictures marked * were written again (converted to RGB, turned upright or scaled down); "
                "the others are unchanged.", ""]
    out += ["| file | author | licence | package | path in the package | note |", "|---|---|---|---|---|---|"]
    for row in rows:
        name = row["file_name"] + (" *" if row["file_name"] in state else "")
        out.append(cells(name, row.get("author", "not named"), row["licence"], f"{row['package']} {row['version']}",
                         row["path"], row.get("note", "")))
    return "\n".join(out) + "\n"


def write_listings(rows: list[dict], folder: Path, state: dict) -> None:
    entries = [{key: row[key] for key in ("file_name", "text", "alt")} for row in rows]
    listing = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    for name, text in (("metadata.jsonl", listing), ("CREDITS.md", credits(rows, state)),
                       (STATE, json.dumps(state, indent=1, sort_keys=True) + "\n")):
        with replacing(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def warn_of_strangers(rows: list[dict], folder: Path) -> None:
    """Name pictures of the folder that are not listed: data.py does not read them."""
    names = {row["file_name"] for row in rows}
    strangers = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in (*PICTURES, ".jpeg")
                       and not file.name.startswith(".") and file.name not in names)
    if strangers:
        print(f"warning: {folder} also holds {len(strangers)} picture(s) that metadata.jsonl does not list: "
              f"{', '.join(strangers[:5])}{', ...' if len(strangers) > 5 else ''}", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--out", required=True, type=Path, metavar="DIR", help="folder to fill")
    add("--list", type=Path, metavar="FILE", default=Path(__file__).resolve().parent / "photos_train.jsonl",
        help="list of pictures (default: photos_train.jsonl beside this script)")
    add("--max-side", type=int, default=0, metavar="N",
        help="scale pictures down whose longer side is over N pixels (default: keep every pixel)")
    args = parser.parse_args()
    if args.max_side < 0:
        parser.error("--max-side must not be negative")
    folder = args.out
    try:
        rows = read_list(args.list)
        folder.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        state = read_json(folder / STATE)
    except (OSError, ValueError):
        state = {}

    missing = [row for row in rows if not in_place(row, folder, state, args.max_side)]
    errors = fetch_all(missing, folder, state, args.max_side)
    good = [row for row in rows if in_place(row, folder, state, args.max_side)]
    write_listings(good, folder, state)
    warn_of_strangers(good, folder)
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    failed, size = len(rows) - len(good), sum((folder / row["file_name"]).stat().st_size for row in good) / 1e6
    print(f"{'INCOMPLETE' if failed else 'ok'}: {len(good)} of {len(rows)} pictures in {folder} "
          f"({len(missing) - failed} fetched, {len(rows) - len(missing)} already there, "
          f"{failed} failed, {size:.1f} MB)")
    return 1 if failed or errors else 0


if __name__ == "__main__":
    sys.exit(main())
