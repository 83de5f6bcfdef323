"""Parquet shards with pictures inside, as Hugging Face data sets store them, become a data folder.

Columns   an image: bytes, or a struct of "bytes" and "path"; a caption: a string
Pictures  are written as their bytes, never encoded again, under the name of their path, else of shard and row
Why       training draws pictures in random order, and a shard gives no picture without the row group around it; caches
          know a picture by its file
Needs     pyarrow
Run       python data.py unpack SHARD.parquet… --out NEW    again: what is there is not written twice
Check     python -m pytest tests/test_shards.py
"""

import importlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from collecting.listings import rows_of, text_of
from files import MOST_NAME, printable, replacing, writable
from reading.pictures import suffixes

AT_ONCE = 8  # rows in memory
PICTURES = r"(large_)?binary|struct<(.*, )?bytes: (large_)?binary"  # types as pyarrow spells them
TEXTS = r"(large_)?string|dictionary<values=(large_)?string"
SUFFIXES = {".png": rb"\x89PNG", ".jpeg": rb"\xff\xd8\xff", ".webp": rb"RIFF....WEBP", ".avif": rb"....ftypavi",
            ".gif": rb"GIF8", ".tiff": rb"II\*\0|MM\0\*", ".bmp": rb"BM"}  # of contents that begin so


def unpack(shards: Sequence[Path], out: Path, caption: str, errors: list[str]) -> int:
    """Write the pictures of shards and OUT/metadata.jsonl, beside what it lists already; returns how many it lists.

    caption  name of a column
    errors   gets a line per row without a picture
    raises   ValueError before anything is written: pyarrow is missing, a file is no Parquet, a column is missing
    """
    tables = [_opened(shard, caption) for shard in shards]
    writable(out, "--out")
    listing = out / "metadata.jsonl"
    rows = {text_of(row, "file_name", at): row for at, row in rows_of(listing)} if listing.exists() else {}
    complete = {name for name, row in rows.items() if row.get("text")}  # stays as it is
    stems = _stems(shards)
    with tqdm(total=sum(table.metadata.num_rows for table, _ in tables), desc="pictures", file=sys.stderr) as bar:
        for shard, (table, image) in zip(shards, tables, strict=True):
            for number, (content, path, text) in enumerate(_rows(shard, table, image, caption)):
                bar.update()
                if content:
                    name = _written(out, content, path, f"{stems[shard]}_{number:06d}")
                    row = rows.setdefault(name, {"file_name": name})
                    if text and name not in complete:  # a picture of several rows has several captions
                        add_caption(row, text)
                else:
                    errors.append(f"{shard}: row {number} has no bytes of a picture ({path or 'no path'})")
    with replacing(listing) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values()), "utf-8")
    return len(rows)


def _stems(shards: Sequence[Path]) -> dict[Path, str]:
    """The stem of each shard, behind the names of as many of its folders as make it differ from the others'."""
    parts = {shard: shard.absolute().with_suffix("").parts[1:] for shard in shards}
    stems = {shard: own[-1] for shard, own in parts.items()}
    for length in range(2, 1 + max(map(len, parts.values()))):
        count = Counter(stems.values())
        stems = {shard: "_".join(parts[shard][-length:]) if count[stem] > 1 else stem for shard, stem in stems.items()}
    return stems


def add_caption(row: dict, text: str) -> None:
    """Add a caption to a row of metadata.jsonl: its text, or else one of its alt."""
    if not row.get("text"):
        row["text"] = text
    elif text != row["text"] and text not in row.setdefault("alt", []):
        row["alt"].append(text)


def _opened(shard: Path, caption: str) -> tuple[Any, str]:
    """The table, and the name of its column of pictures."""
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ValueError(f"{shard}: reading Parquet needs pyarrow; pip install pyarrow") from None
    try:
        table = parquet.ParquetFile(shard)
    except (OSError, ValueError) as error:  # pyarrow's errors are among them
        raise ValueError(f"{shard}: not a Parquet file that can be read ({error})") from None
    kinds = {column.name: str(column.type) for column in table.schema_arrow}
    images = [name for name, kind in kinds.items() if re.match(PICTURES, kind)]
    has = printable(", ".join(f"{name} ({kind})" for name, kind in kinds.items()))
    if len(images) != 1 and "image" not in images:
        raise ValueError(f"{shard}: {len(images)} columns with bytes of pictures, none called image; it has {has}")
    if not re.match(TEXTS, kinds.get(caption, "")):
        raise ValueError(f"{shard}: no column {caption!r} of captions; it has {has}: name one of strings with --text")
    return table, "image" if "image" in images else images[0]


def _rows(shard: Path, table: Any, image: str, caption: str) -> Iterator[tuple[bytes | None, str, str]]:
    """(content, path, caption) of every row."""
    try:
        for batch in table.iter_batches(AT_ONCE, columns=[image, caption], use_threads=False):
            for row in batch.to_pylist():
                stored = row[image] if isinstance(row[image], dict) else {"bytes": row[image]}
                path = stored.get("path")
                yield stored["bytes"], path if isinstance(path, str) else "", row[caption] or ""
    except (OSError, ValueError) as error:
        raise ValueError(f"{shard}: damaged ({error}); download it again, and run the same command") from None


def _written(out: Path, content: bytes, path: str, number: str) -> str:
    """Write a picture and return its name: that of `path`, or else, if another file has it, one with `number`."""
    given = path.replace("\\", "/").rpartition("/")[2]
    if (not given.isprintable() or given.startswith(".") or len(given.encode()) > MOST_NAME - len(number)
            or Path(given).suffix.lower() not in suffixes()):  # such as that of the listing
        given = ""
    begins = next((suffix for suffix, starts in SUFFIXES.items() if re.match(starts, content, re.DOTALL)), ".unknown")
    for name in (given, f"{number}_{given}") if given else (f"{number}{begins}",):
        if not (out / name).exists():
            with replacing(out / name) as temporary:
                temporary.write_bytes(content)
            return name
        if (out / name).read_bytes() == content:
            return name
    raise ValueError(f"--out {out}: {printable(name)} is there with other content; name an empty folder")
