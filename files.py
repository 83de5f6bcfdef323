"""The edges of the program: JSON from outside, files written complete or not at all, a command's flags and its end.

JSON      of at most MOST_JSON bytes and MOST_DEPTH levels; every error names the file
Writing   under a hidden temporary name beside the file, then renamed; leftovers of killed processes are removed
Commands  an error is one line, exit code 1; Ctrl-C is one line, exit code 130
Check     python -m pytest tests/test_files.py; no torch is imported
"""

import argparse
import hashlib
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import field, fields
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar, get_args

T = TypeVar("T")

MOST_JSON = 32 << 20        # bytes: the index of a sharded model and the tokenizers of large models are below it
MOST_DEPTH = 64             # levels of lists and objects
SOFTWARE = "diffusion-4k"  # what our pictures and adapters record
STALE_S = 3600              # a temporary file that was not written to for this long belongs to no living process
MOST_NAME, MOST_PATH = 220, 3500  # bytes; systems take 255 and 4096, and names of temporary files are longer
INTERRUPTED = 130           # exit code, as shells have it


# ---- JSON from outside

def parse_json(text: str, where: str) -> object:
    """The value of a JSON text; ValueError that begins with `where`, a file or a line of one, if it is none."""
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg}, line {error.lineno}, column {error.colno})") from None
    except KeyError as error:
        raise ValueError(f"{where}: {error} is given twice in one object; keep one") from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; brackets without end
        why = f"nested more than {MOST_DEPTH} deep" if isinstance(error, RecursionError) else "a number is too long"
        raise ValueError(f"{where}: not JSON that can be used ({why})") from None
    level, depth = [value], 0
    while level := [inner for v in level if isinstance(v, (dict, list)) for inner in _inner(v)]:
        depth += 1
        if depth > MOST_DEPTH:
            raise ValueError(f"{where}: not JSON that can be used (nested more than {MOST_DEPTH} deep)")
    return value


def _once(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object; KeyError with a name that it gives twice, of which programs take one or the other."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise KeyError(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return content


def _inner(value: dict | list) -> list:
    return list(value.values() if isinstance(value, dict) else value)


def read_json(file: str | os.PathLike) -> dict:
    """Read a JSON object; ValueError naming the file if it is none, or larger than MOST_JSON."""
    text = read_text(file, MOST_JSON)
    try:
        content = parse_json(text, str(file))
    except ValueError as error:
        raise ValueError(f"{error}: download it again, or restore it") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds a {type(content).__name__}, not an object: download it again, or restore it")
    return content


def entry(content: dict, key: str, kind: type, where: object, low: float = -2.0**63, high: float = 2.0**63) -> object:
    """content[key] if it is a `kind` and, as a number, between low and high; ValueError that begins with `where`.

    kind  int also takes 20.0; float also takes integers; bool is no number
    """
    value = content.get(key)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    kinds = (int, float) if kind is float else kind
    if not isinstance(value, kinds) or isinstance(value, bool) is not (kind is bool):
        shown = "is missing" if key not in content else f"is {_shown(value)}"
        raise ValueError(f"{where}: {key} {shown}, expected {NAMES[kind]}")
    if kind in (int, float) and not low <= value <= high:
        raise ValueError(f"{where}: {key} is {value}, expected {low:g} to {high:g}")
    return value


NAMES = {int: "an integer", float: "a number", str: "a text", bool: "true or false", list: "a list", dict: "an object"}


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:40] + "…"


def read_text(file: str | os.PathLike, most: int = 1 << 30) -> str:
    """A text file in UTF-8, or in UTF-16 with a byte order mark; ValueError if it is none, or larger than `most`."""
    regular(file)
    if (size := os.path.getsize(file)) > most:
        raise ValueError(f"{file}: {size:,} bytes; at most {most:,} are read")
    content = Path(file).read_bytes()
    coding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return content.decode(coding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def regular(file: str | os.PathLike) -> None:
    """Refuse what is no regular file, such as a pipe, which could be waited for forever; OSError if it is absent."""
    if not os.path.exists(file):
        raise FileNotFoundError(f"{file}: no such file")
    if not os.path.isfile(file):
        raise ValueError(f"{file}: a {'folder' if os.path.isdir(file) else 'pipe or device'}, not a file")


def sha256_of(file: Path) -> str:
    """The checksum of a file, read in chunks."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def blank(text: str) -> bool:
    """Whether nothing of a text is seen: it holds white space and invisible letters, such as U+200B, alone."""
    return all(letter.isspace() or unicodedata.category(letter) in ("Cc", "Cf") for letter in text)


def printable(text: str) -> str:
    """A text from a file for a message: control characters, which could steer a terminal, are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# ---- writing

@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, with its suffix; renamed to `path` if the block succeeds, else deleted."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    if path.is_dir():
        raise OSError(f"{path}: a folder, where a file is to be written; remove or rename it")
    try:
        with naming(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name `path` in an error of the system that names no file, as of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise


def is_temporary(path: Path) -> bool:
    """Whether `replacing` made it."""
    return bool(re.fullmatch(r"\..*\.\d+\.tmp(\.[^.]*)?", path.name, re.DOTALL))


def clear_temporaries(folder: Path) -> None:
    """Remove the temporary files that killed processes left in a folder."""
    for file in filter(is_temporary, folder.glob(".*.tmp*")):
        try:
            if time.time() - file.stat().st_mtime > STALE_S:
                file.unlink()
        except OSError:  # another process was faster, or it is not ours
            pass


def in_utf8(path: str | os.PathLike) -> None:
    """ValueError if a path is not UTF-8: safetensors opens no file below it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{path}: this path is not UTF-8, as those of weights and caches must be; rename it") from None


def writable(folder: Path, given: str) -> None:
    """Create the folder and check that it is writable; the OSError starts with `given`, the flag that named it."""
    in_utf8(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{given}: {folder} is no folder that can be written ({error.strerror}); name another") from None
    clear_temporaries(folder)


# ---- a command

def flag(default: object, help: str, **options: object) -> Any:
    """A field that is a flag of the command line; options go to argparse, but for `flag`, another name than its own."""
    return field(default=default, metadata={"help": help} | options)


def read_flags(kind: type[T], about: str, groups: Mapping[str, str], argv: Sequence[str] | None) -> T:
    """Parse a command line into a dataclass whose fields are flags.

    groups  first flag -> title of each group in --help
    """
    group = parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    names = {f.name: f.metadata.get("flag", f.name.replace("_", "-")) for f in fields(kind)}
    for f in fields(kind):
        if f.name in groups:
            group = parser.add_argument_group(groups[f.name])
        value = (get_args(f.type) or (f.type,))[0]  # int of int | None
        options = {"type": value, "default": f.default} | {k: v for k, v in f.metadata.items() if k != "flag"}
        if value is bool:
            options["action"] = "store_true" if f.default is False else argparse.BooleanOptionalAction
            del options["type"]
        elif f.default not in (None, ""):
            options["help"] += " (default: %(default)s)"
        group.add_argument(f"--{names[f.name]}", dest=f.name, **options)
    values = vars(parser.parse_args(argv))
    for f in fields(kind):
        need(values[f.name] != "" or f.default == "", names[f.name], '""', "a value; a shell variable may be unset")
    return kind(**values)


def need(fits: bool, flag: str, value: object, accepted: str) -> None:
    """Refuse a flag out of range: ValueError that names it, its value and what is accepted."""
    if not fits:
        raise ValueError(f"--{flag} {value}: give {accepted}")


def check_path(flag: str, value: str) -> None:
    """Refuse what no file here can be called, or what the shell should have replaced; ValueError names the flag."""
    need(value != "", flag, '""', "a value; a shell variable may be unset")
    need("://" not in value, flag, value, "a path on this machine; download from or upload to an address yourself")
    need(not value.startswith("~"), flag, value, f"the path without ~, which a shell replaces only in --{flag} ~/…")
    longest = max(len(os.fsencode(part)) for part in Path(value).parts or [""])
    need(longest <= MOST_NAME and len(os.fsencode(value)) <= MOST_PATH, flag, f"{value[:40]}… of {len(value)} letters",
         f"names of at most {MOST_NAME} bytes, and {MOST_PATH:,} in all")


def launched() -> tuple[int, int]:
    """(rank, world) that torchrun gave this process, for work in which ranks need not meet; (0, 1) without torchrun."""
    rank, world = from_torchrun("RANK", 0), from_torchrun("WORLD_SIZE", 1)
    if ("RANK" in os.environ) != ("WORLD_SIZE" in os.environ) or not 0 <= rank < world:
        raise ValueError(f"RANK={os.environ.get('RANK')} and WORLD_SIZE={os.environ.get('WORLD_SIZE')}: torchrun sets "
                         "both, RANK from 0 and below WORLD_SIZE; unset them, or start with torchrun")
    return rank, world


def from_torchrun(name: str, least: int) -> int:
    """A number that torchrun sets in the environment; `least` without it, ValueError if it is none or below that."""
    text = os.environ.get(name, str(least))
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{name}={text}: torchrun sets it to a number from {least}; unset it, or start with torchrun")
    return int(text)


def end_on_interrupt() -> None:
    """Until run_command: Ctrl-C prints one line and ends the process. For the seconds in which torch is imported."""
    def end(number: int, frame: FrameType | None) -> None:
        os.write(2, b"interrupted\n")
        os._exit(INTERRUPTED)
    signal.signal(signal.SIGINT, end)


def run_command(main: Callable[[], None], less: str = "it less at once") -> None:
    """Run a command; an error of its input becomes one line and exit code 1, Ctrl-C one line and exit code 130.

    Other exceptions are errors of this code and keep their traceback. A warning is one line too, without code.

    less  what to give where the memory does not suffice
    """
    plain_warnings()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):             # a terminal without Unicode must not end a report
            stream.reconfigure(errors="backslashreplace")
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.default_int_handler)
        main()
        if sys.stdout:                                 # none if the shell closed it
            sys.stdout.flush()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would cut the line off
        print("interrupted", file=sys.stderr, flush=True)
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:                            # the output goes to a program that ended, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {printable(str(error))}") from None
    except (MemoryError, RuntimeError) as error:
        if not (reason := memory_error(error)):
            raise
        raise SystemExit(f"error: {reason}; give {less}") from None


def plain_warnings() -> None:
    """Show a warning as one line, without code, in this process."""
    warnings.formatwarning = lambda message, *_: f"warning: {printable(str(message))}\n"


def memory_error(error: MemoryError | RuntimeError) -> str:
    """What there is too little of, "" if it is another error. By name and text: torch is not imported here."""
    if type(error).__name__ == "OutOfMemoryError":
        return "out of GPU memory"
    if isinstance(error, MemoryError) or re.search("DefaultCPUAllocator|can(no|')t allocate memory", str(error), re.I):
        return "out of memory"
    return ""
