"""Listings of data folders: which pictures a folder holds, and their captions. No picture is opened.

Layout    DIR/metadata.jsonl   one JSON object per line: "file_name", "text" and, optionally, "alt": [more captions]
          DIR/metadata.csv     where there is no metadata.jsonl: columns file_name and text
Formats   docs/formats.md, "Data folders"
Check     python -m pytest tests/test_data.py tests/test_listings.py
"""

import csv
import io
import os
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from files import blank, entry, in_utf8, parse_json, read_text
from reading.pictures import suffixes

LISTINGS = ("metadata.jsonl", "metadata.csv")
ALMOST = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".xlsx")  # what else captions come in


@dataclass(frozen=True)
class Item:
    """One picture and its captions: `captions[0]` is "text", the others are "alt"."""

    path: Path
    captions: tuple[str, ...]


def read_folder(folder: str | os.PathLike, complete: bool = True) -> list[Item]:
    """Read and check the listing of a data folder; pictures are not opened.

    folder    see Layout above
    complete  False: the listing may be absent, and its rows may lack a caption; pictures by suffix that it does not
              name follow, without captions
    returns   one Item per row, in the listing's order
    raises    FileNotFoundError without a listing; ValueError that names the line: broken JSON or CSV, a file_name, text
              or "alt" that is missing, empty or no text, a path outside the folder, a picture missing or listed twice
    """
    folder = Path(folder)
    in_utf8(folder)
    listing = next((folder / name for name in LISTINGS if (folder / name).exists()), None)
    if not listing and (complete or not folder.is_dir() or _listings_below(folder)):
        raise FileNotFoundError(_no_listing(folder))
    items: dict[Path, Item] = {}
    lacking: dict[Path, ValueError] = {}  # rows without captions; a later row may bring them, of data.py caption
    broken: list[ValueError] = []
    for where, row in rows_of(listing) if listing else ():
        path = _find(folder, text_of(row, "file_name", where), where)
        if path in items and path not in lacking:
            raise ValueError(f"{where}: {row['file_name']!r} is listed twice")
        try:
            items[path] = Item(path, _captions(row, where))
            lacking.pop(path, None)
        except ValueError as error:
            items[path] = Item(path, ())
            lacking.setdefault(path, error)
            if row.get("text") or row.get("alt"):
                broken.append(error)
    if complete and lacking:
        raise next(iter(lacking.values()))
    if broken:
        print(f"note: {len(broken)} captions cannot be read and count as none: {broken[0]}", file=sys.stderr)
    if not complete:
        items |= {path: Item(path, ()) for path in _pictures_below(folder) if path not in items}
    if not items:
        raise ValueError(f"{listing}: empty" if listing else f"{folder}: no picture in this folder")
    return list(items.values())


def _captions(row: dict, where: str) -> tuple[str, ...]:
    alt = row.get("alt")
    alt = [] if alt is None or alt != alt else alt  # null; the NaN of pandas
    if not isinstance(alt, list):
        raise ValueError(f'{where}: "alt" is {alt!r}, expected a list of captions')
    return text_of(row, "text", where), *(text_of({"alt": caption}, "alt", where) for caption in alt)


def _pictures_below(folder: Path) -> list[Path]:
    """The files with the suffix of a picture in a folder and those below it, linked ones too, but for hidden ones."""
    found, seen = [], set()
    for where, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(where)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        folders.sort(key=lambda name, where=where: (os.path.islink(f"{where}/{name}"), name))  # a link after its target
        found += [Path(where, name) for name in files if not name.startswith(".")]
    found = sorted(path for path in found if path.suffix.lower() in suffixes())
    for path in found:
        in_utf8(path)
    return found


def rows_of(listing: Path) -> Iterator[tuple[str, dict]]:
    """("FILE:LINE", row) of every row of a .jsonl or .csv listing; ValueError that names the first line in error."""
    text = read_text(listing)
    if listing.suffix.lower() == ".csv":
        yield from _csv_rows(listing, text)
        return
    if text.lstrip().startswith("["):
        raise ValueError(f'{listing}: a list; each line is one JSON object with "file_name" and "text", as pandas '
                         'writes it with to_json(FILE, orient="records", lines=True)')
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would also cut captions at U+2028 and the like
        if line.strip():
            row = parse_json(line, f"{listing}:{number}")
            if not isinstance(row, dict):
                raise ValueError(f'{listing}:{number}: each line is a JSON object with "file_name" and "text"')
            yield f"{listing}:{number}", row


def _csv_rows(listing: Path, text: str) -> Iterator[tuple[str, dict]]:
    first = text.lstrip().partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count), strict=True)
    lines = filter(any, reader)
    try:
        names = next(lines, [])
        if names == ["sep=", ""]:  # which Excel reads as the separator
            names = next(lines, [])
        if len(set(names)) < len(names):
            raise ValueError(f"{listing}:{reader.line_num}: two columns have one name")
        for cells in lines:
            if len(cells) > len(names):
                raise ValueError(f"{listing}:{reader.line_num}: more fields than the first line has names")
            row = {name: cell or None for name, cell in zip_longest(names, cells)}
            if (alt := row.get("alt")) and not alt.startswith("["):  # but for a list as Python prints it
                row["alt"] = [alt]
            yield f"{listing}:{reader.line_num}", row
    except csv.Error as error:
        raise ValueError(f"{listing}:{reader.line_num}: not CSV ({error})") from None


def text_of(row: dict, key: str, where: str) -> str:
    """row[key] if it is a text that can be written and is not empty; ValueError that begins with `where`."""
    if key not in row:
        raise ValueError(f'{where}: no "{key}"; the row has {", ".join(map(str, row)) or "nothing"}')
    text = entry(row, key, str, where)
    if blank(text):
        raise ValueError(f"{where}: {key} is empty" + (" but for invisible letters" if text.strip() else ""))
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise ValueError(f"{where}: {key} holds {half}, half of a character; write the character itself") from None
    return text


def _find(folder: Path, name: str, where: str) -> Path:
    """The picture of this name; where there is none, of its spelling with / or in another Unicode form."""
    plain = name.replace("\\", "/")
    if Path(plain).is_absolute() or ".." in Path(plain).parts:
        raise ValueError(f"{where}: {name!r} leads out of the folder")
    for spelling in (name, plain, unicodedata.normalize("NFC", plain), unicodedata.normalize("NFD", plain)):
        if os.path.isfile(folder / spelling):
            return folder / spelling
    beside = (folder / plain).parent
    near = [file for file in (os.listdir(beside) if os.path.isdir(beside) else ())
            if file.strip().casefold() == Path(plain).name.strip().casefold()]
    shown = name if len(name) <= 255 else name[:255] + "…"
    raise ValueError(f"{where}: no picture {shown!r} in {folder}" + (f"; there is {near[0]!r}" if near else ""))


def _listings_below(folder: Path) -> list[str]:
    return sorted({str(file.parent) for name in LISTINGS for file in folder.glob(f"**/{name}")})


def _no_listing(folder: Path) -> str:
    """Why a folder is no data folder and what to give instead."""
    if folder.is_file():
        return f"{folder}: a file; give the folder, {folder.parent}"
    start = f"{folder / LISTINGS[0]}: not found; "
    if below := _listings_below(folder):
        return f"{start}give one of the folders below that have one: {', '.join(below[:6])}"
    if tables := sorted(folder.glob("*.parquet")):
        if tables[0].name != "metadata.parquet":
            return f"{start}unpack the shards: python data.py unpack {folder}/*.parquet --out NEW"
        return f'{start}write it from {tables[0].name} with pandas, to_json(FILE, orient="records", lines=True)'
    if near := sorted(file.name for file in folder.glob("*") if file.suffix.lower() in ALMOST):
        start += f"{near[0]!r} is not read; "
    return f"{start}a data folder holds pictures and a {LISTINGS[0]} or {LISTINGS[1]} with file_name and text"
