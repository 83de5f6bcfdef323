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
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from collecting.listings import rows_of
from files import MOST_NAME, printable, replacing, writable

AT_ONCE = 8  # rows in memory


def unpack(shards: Sequence[Path], out: Path, caption: str, errors: list[str]) -> int:
    """Write the pictures of shards and OUT/metadata.jsonl, beside what it lists already; returns how many it lists.

    caption  name of a column
    errors   gets a line per row without a picture
    raises   ValueError before anything is written: pyarrow is missing, a file is no Parquet, a column is missing
    """
    tables = [_opened(shard, caption) for shard in shards]
    writable(out, "--out")
    listing = out / "metadata.jsonl"
    rows = {row.get("file_name"): row for _, row in rows_of(listing)} if listing.exists() else {}
    with tqdm(total=sum(table.metadata.num_rows for table, _ in tables), desc="pictures", file=sys.stderr) as bar:
        for shard, (table, image) in zip(shards, tables, strict=True):
            for number, (content, path, text) in enumerate(_rows(shard, table, image, caption)):
                bar.update()
                if content:
                    name = _written(out, content, path, f"{shard.stem}_{number:06d}")
                    rows[name] = {"file_name": name} | ({"text": text} if text else {})
                else:
                    errors.append(f"{shard}: row {number} has no bytes of a picture ({path or 'no path'})")
    with replacing(listing) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values()), "utf-8")
    return len(rows)


def _opened(shard: Path, caption: str) -> tuple[Any, str]:
    """The table, and the name of its column of pictures."""
    try:
        parquet, types = (importlib.import_module(f"pyarrow.{name}") for name in ("parquet", "types"))
    except ImportError:
        raise ValueError(f"{shard}: reading Parquet needs pyarrow; pip install pyarrow") from None
    try:
        table = parquet.ParquetFile(shard)
    except (OSError, ValueError) as error:  # pyarrow's errors are among them
        raise ValueError(f"{shard}: not a Parquet file that can be read ({error})") from None
    kinds = {column.name: column.type for column in table.schema_arrow}
    images = [name for name, kind in kinds.items() if types.is_binary(kind) or types.is_large_binary(kind)
              or types.is_struct(kind) and kind.get_field_index("bytes") >= 0]
    if not images:
        raise ValueError(f"{shard}: no column with bytes of pictures; it has {', '.join(kinds)}")
    if caption not in kinds or not (types.is_string(kinds[caption]) or types.is_large_string(kinds[caption])):
        raise ValueError(f"{shard}: no column {caption!r} of captions; it has {', '.join(kinds)}: name one with --text")
    return table, images[0]


def _rows(shard: Path, table: Any, image: str, caption: str) -> Iterator[tuple[bytes | None, str, str]]:
    """(content, path, caption) of every row."""
    try:
        for batch in table.iter_batches(AT_ONCE, columns=[image, caption], use_threads=False):
            for row in batch.to_pylist():
                stored = row[image] if isinstance(row[image], dict) else {"bytes": row[image]}
                yield stored["bytes"], stored.get("path") or "", row[caption] or ""
    except (OSError, ValueError) as error:
        raise ValueError(f"{shard}: damaged ({error}); download it again, and run the same command") from None


def _written(out: Path, content: bytes, path: str, number: str) -> str:
    """Write a picture and return its name: that of `path`, or else, if another file has it, one with `number`."""
    given = path.replace("\\", "/").rpartition("/")[2]
    if not given.isprintable() or given.startswith(".") or len(given.encode()) > MOST_NAME - len(number):
        given = ""
    for name in (given, f"{number}_{given}") if given else (f"{number}{_suffix(content)}",):
        if not (out / name).exists():
            with replacing(out / name) as temporary:
                temporary.write_bytes(content)
            return name
        if (out / name).read_bytes() == content:
            return name
    raise ValueError(f"--out {out}: {printable(name)} is there with other content; name an empty folder")


def _suffix(content: bytes) -> str:
    try:
        with Image.open(io.BytesIO(content)) as picture:
            return f".{picture.format.lower()}"
    except OSError:
        return ".unknown"
