"""Which prompt each generated picture belongs to: by what it records, else by its name, else by its number.

Listing  lines of JSON with "text" and, on all lines or on none, "file_name"
Record   the prompt that sample.py writes into each picture
Name     the picture is called as file_name, whatever its suffix
Number   without any file_name: pictures begin with the number of their line, as sample.py's do, or are as many as the
         lines, in the order of their names; 2 comes before 10
"""

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from files import SOFTWARE, entry, parse_json, read_text
from reading.pictures import open_picture, recorded


def pair_captions(listing: str | Path, pictures: Sequence[Path], notes: list[str]) -> dict[Path, str]:
    """Picture -> caption; `notes` gets which way they were paired, and how many prompts have no picture.

    A picture that can't be opened is left out where others are paired by their records.
    raises  ValueError that names the line, or the picture whose prompt is not known
    """
    prompts = read_prompts(listing)
    rows, unknown = by_record(listing, prompts, pictures)
    if rows:
        notes.append(f"note: {len(rows)} pictures paired with their prompts by what they record")
    if unknown and any(name for name, _ in prompts):
        rows |= by_name(listing, prompts, unknown)
        notes.append(f"note: {len(unknown)} pictures paired with their prompts by file_name")
    elif unknown and rows:
        raise ValueError(f"{unknown[0]}: records no prompt, as {len(rows)} other pictures do, and {listing} has no "
                         "file_name: leave the picture out, or name it in a file_name")
    elif unknown:
        rows = by_number(listing, prompts, unknown)
        notes.append(f"note: {len(unknown)} pictures paired with their prompts by number, in the order of the lines")
    drawn = {prompts[row][1] for row in rows.values()}
    if unused := sum(text not in drawn for _, text in prompts):
        notes.append(f"note: {unused} of {len(prompts)} prompts have no picture")
    return {picture: prompts[rows[picture]][1] for picture in pictures if picture in rows}


def read_prompts(listing: str | Path) -> list[tuple[str, str]]:
    """(file_name or "", text) of each line."""
    if str(listing).lower().endswith(".csv"):
        raise ValueError(f'{listing}: a CSV; give lines of JSON with "text" and "file_name", as pandas writes them '
                         'with to_json(FILE, orient="records", lines=True)')
    prompts, numbers = [], []
    for number, line in enumerate(read_text(listing).split("\n"), 1):
        if line.strip():
            prompts.append(_read_line(line, f"{listing}:{number}"))
            numbers.append(number)
    if not prompts:
        raise ValueError(f"{listing}: no prompt in it")
    lines: dict[str, int] = {}
    for number, (name, _) in zip(numbers, prompts, strict=True):
        if bool(name) is not bool(prompts[0][0]):
            raise ValueError(f"{listing}: line {number} or line {numbers[0]} has no file_name: give it on all or none")
        if name and lines.setdefault(name, number) != number:
            raise ValueError(f"{listing}:{number}: {name} is listed twice, in line {lines[name]} too")
    return prompts


def _read_line(line: str, where: str) -> tuple[str, str]:
    accepted = 'each line is a JSON object with "text" and, if pictures are named, "file_name"'
    try:
        row = parse_json(line, where)
    except ValueError as error:
        raise ValueError(f"{error}; {accepted}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: {accepted}")
    name, text = entry(row, "file_name", str, where) if "file_name" in row else None, entry(row, "text", str, where)
    if not text.strip() or name == "":
        raise ValueError(f"{where}: text and file_name must not be empty")
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(f"{where}: text holds half a surrogate pair, which is no character")
    return _one_spelling(name or "").replace("\\", "/"), text


def _one_spelling(name: str) -> str:
    """A name in NFC: some systems write those of files in NFD."""
    return unicodedata.normalize("NFC", name)


# ---- three ways

def by_record(listing: str | Path, prompts: list[tuple[str, str]],
              pictures: Sequence[Path]) -> tuple[dict[Path, int], list[Path]]:
    """Picture -> index of the prompt it records, and the pictures that record none of this listing's."""
    of_text = {text.strip(): row for row, (_, text) in enumerate(prompts)}
    rows, without = {}, []
    for picture in pictures:
        record = recorded(picture)
        prompt = record.get("prompt", "").strip()
        if prompt in of_text:
            rows[picture] = of_text[prompt]
        elif prompt and record.get("software") == SOFTWARE:
            raise ValueError(f"{picture}: records the prompt {prompt[:60]!r}, which is not in {listing}")
        else:
            without.append(picture)
    return rows, [picture for picture in without if not rows or can_be_opened(picture)]


def can_be_opened(picture: Path) -> bool:
    try:
        with open_picture(picture):
            return True
    except ValueError:
        return False


def by_name(listing: str | Path, prompts: list[tuple[str, str]], pictures: Sequence[Path]) -> dict[Path, int]:
    """Picture -> index of the prompt whose file_name it has, with any suffix; ValueError names one without."""
    names: dict[str, list[int]] = {}
    for row, (name, _) in enumerate(prompts):
        path = PurePosixPath(name)
        for key in {path.name, path.stem}:
            names.setdefault(key, []).append(row)
    rows: dict[Path, int] = {}
    taken: dict[int, Path] = {}
    for picture in pictures:
        found = names.get(_one_spelling(picture.name)) or names.get(_one_spelling(picture.stem), [])
        if len(found) != 1:
            why = "is no file_name" if not found else f"could be one of {len(found)} file_names"
            raise ValueError(f"{picture}: records no prompt, and its name {why} in {listing}: name the pictures as "
                             "file_name does, or give a listing without file_name, in the order of the pictures")
        if (other := taken.setdefault(found[0], picture)) is not picture:
            raise ValueError(f"{picture} and {other}: both have the file_name {prompts[found[0]][0]} of {listing}")
        rows[picture] = found[0]
    return rows


def by_number(listing: str | Path, prompts: list[tuple[str, str]], pictures: Sequence[Path]) -> dict[Path, int]:
    """Picture -> index of the prompt in its place; ValueError if the numbers have gaps or do not match."""
    ordered = sorted(pictures, key=lambda picture: natural(picture.name))
    numbers = [int(match[0]) for picture in ordered if (match := re.match("[0-9]+", picture.name))]
    first = min(numbers, default=0)
    if numbers and set(numbers) == set(range(first, first + len(prompts))) and len(numbers) == len(ordered):
        return {picture: number - first for picture, number in zip(ordered, numbers, strict=True)}
    if not numbers and len(ordered) == len(prompts):
        return {picture: row for row, picture in enumerate(ordered)}
    have = f", which begin with {len(set(numbers))} different numbers up to {max(numbers)}" if numbers else ""
    raise ValueError(f"{listing}: {len(prompts)} prompts for {len(pictures)} pictures{have}: "
                     "give each line the file_name of its picture")


def natural(name: str) -> list[str | int]:
    """A key that sorts names by the numbers in them: 2 before 10."""
    return [int(part) if k % 2 else part for k, part in enumerate(re.split("([0-9]+)", name))]
