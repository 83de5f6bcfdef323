"""Damaged files of every kind that is read: each must end in a right result or in one clear line.

Kinds     and their numbers of cases are in CASES; `--share` scales them
Case k    of a kind is a function of (seed, kind, k): `python tests/fuzz.py pictures --first 17 --count 1` repeats it
Fault     an exception that run_command would not turn into a line; a message of several lines or without the file's
          name; a wrong result; more than 20 s or 2 GiB; a temporary file left behind
Run       python tests/fuzz.py                 all kinds, about ten minutes on two cores
          python tests/fuzz.py --share 0.1     what tests/test_fuzz.py runs
"""

import argparse
import contextlib
import copy
import io
import json
import os
import queue
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
CASES = {"weights": 500, "pictures": 300, "listings": 200, "tables": 100, "json": 100, "caches": 100,
         "checkpoints": 100}
MOST_S, MOST_BYTES = 20, 2 << 30
SMALL_VAE = (8, 8, 8, 8), (8, 8, 8, 8), 1, 1, 16, 1   # a VAEConfig
Random = np.random.Generator
Consumer = Callable[[Path, Random], None]   # damages what it made in the folder and reads it; raises on a wrong result


class Wrong(Exception):
    """A result that is not right."""


def right(condition: bool, what: str) -> None:
    if not condition:
        raise Wrong(what)


# ---- damage

HOSTILE = (None, True, False, 0, -1, 1, 2.5, 1e308, -1e9, float("nan"), float("inf"), 10**30, "", " ", "0", "nan",
           "1e999", "\ud800", "a\0b", "\x1b[2J", "../../etc/passwd", "x" * 100_000, "一只红色的猫", [], {}, [[]],
           [None], {"": None})


def damaged_bytes(data: bytes, random: Random) -> bytes:
    """One to three changes of single bytes or spans, more often near the beginning, where headers are."""
    data = bytearray(data)
    for _ in range(random.integers(1, 4)):
        size = len(data) or 1
        at = int(random.integers(0, min(size, 300) if random.random() < 0.6 else size))
        span = int(random.integers(1, 1 + min(64, size)))
        choice = random.integers(0, 7)
        if choice == 0 and data:
            data[at] ^= 1 << int(random.integers(0, 8))
        elif choice == 1:
            data[at:at + span] = bytes(len(data[at:at + span]))
        elif choice == 2:
            data[at:at + span] = random.bytes(len(data[at:at + span]))
        elif choice == 3:
            data[at:at] = random.bytes(span)
        elif choice == 4:
            del data[at:at + span]
        elif choice == 5:
            del data[at:]
        else:
            data[at:at] = data[at:at + span]
    return bytes(data)


def damaged_json(value: object, random: Random) -> object:
    """A deep copy in which one to three entries are hostile, absent, doubled, nested or of another place."""
    value = copy.deepcopy(value)
    for _ in range(random.integers(1, 4)):
        places, level = [], [value]
        while level:
            node = level.pop()
            if isinstance(node, (dict, list)):
                keys = list(node) if isinstance(node, dict) else range(len(node))
                places += [(node, key) for key in keys]
                level += [node[key] for key in keys]
        if not places:
            return HOSTILE[random.integers(len(HOSTILE))]
        node, key = places[int(random.integers(len(places)))]
        choice = random.integers(0, 6)
        if choice < 3:
            node[key] = HOSTILE[random.integers(len(HOSTILE))]
        elif choice == 3:
            node[key] = [node[key]]
        elif choice == 4:
            del node[key]
        else:
            other, place = places[int(random.integers(len(places)))]
            node[key] = copy.deepcopy(other.get(place) if isinstance(other, dict) else next(iter(other), None))
    return value


def damaged_text(text: str, random: Random) -> bytes:
    """A JSON text with damaged entries or bytes; now and then nested without end."""
    if random.random() < 0.03:
        return b'{"a":' * 50_000
    if random.random() < 0.6:
        with contextlib.suppress(ValueError):
            return json.dumps(damaged_json(json.loads(text), random)).encode()
    return damaged_bytes(text.encode(), random)


# ---- weights

def other_entries(text: str, random: Random) -> bytes:
    """A header that the safetensors library accepts: other names, dtypes of the same size, shapes, metadata."""
    header = json.loads(text)
    for _ in range(random.integers(1, 4)):
        names = [name for name in header if name != "__metadata__"]
        one, other = (names[int(k)] for k in random.integers(len(names), size=2))
        choice = random.integers(0, 6)
        if choice == 0:
            header[one]["dtype"] = str(random.choice(["I32", "U32", "F32"]))
        elif choice == 1:
            header[one], header[other] = header[other], header[one]
        elif choice == 2:
            name = str(random.choice(["", "a.b", "\x1b[2J", "x" * 1000, one + ".lora_A.weight", f"y.{one}"]))
            header[name] = header.pop(one)
        elif choice == 3:
            header[one]["shape"] = [int(np.prod(header[one]["shape"])), *[1] * int(random.integers(0, 4))]
        elif choice == 4:
            header[one]["shape"].reverse()
        else:
            value = str(HOSTILE[random.integers(len(HOSTILE))]).encode("ascii", "replace").decode()
            key = str(random.choice(["axes_dim", "norm_groups", "scale_factor", "steps", "format", "theta"]))
            header.setdefault("__metadata__", {})[key] = value
    return json.dumps(header).encode()


def weights(folder: Path, random: Random) -> None:
    """A transformer or an autoencoder whose header is damaged: what loads equals what the safetensors library reads."""
    import torch
    from safetensors import safe_open

    import family
    from checkpoint import open_weights, save
    from flux import FluxConfig, new_flux
    from mmdit import MMDiTConfig, new_mmdit
    from train_vae import new_vae
    from vae import VAE, VAEConfig

    source = folder.parent / "sources"
    if not source.is_dir():
        source.mkdir()
        flux = new_flux(FluxConfig(32, 1, 1, 16, context_dim=12, pooled_dim=10, mlp_hidden=32, axes_dim=(4, 6, 6)),
                        torch.Generator())
        save(source / "flux.safetensors", flux.state_dict(), {"axes_dim": "4, 6, 6"})
        save(source / "ae.safetensors", new_vae(VAEConfig(*SMALL_VAE), 0).state_dict(), {"norm_groups": 1})
        config = MMDiTConfig(64, 1, context_dim=12, pooled_dim=10, table_side=4, mlp_hidden=32)
        state = new_mmdit(config, torch.Generator()).state_dict()
        tensors = {f"model.diffusion_model.{name}": t for name, t in state.items()}
        save(source / "sd3.safetensors", tensors, {"steps": 4})
    original = sorted(source.iterdir())[int(random.integers(3))]
    data = original.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    text, body = data[8:8 + length].decode(), data[8 + length:]
    header = other_entries(text, random) if random.random() < 0.5 else damaged_text(text, random)
    stated = len(header) if random.random() < 0.95 else int(random.integers(0, 2**63))
    file = folder / original.name
    body = body if random.random() < 0.9 else damaged_bytes(body, random)
    file.write_bytes(struct.pack("<Q", stated) + header + body)
    opened = open_weights(file)
    module = VAE.load(file) if original.stem == "ae" else family.family_of(opened).model.load(file)
    prefix = "model.diffusion_model." if original.stem == "sd3" else ""
    with safe_open(file, framework="pt") as handle:
        stored = set(handle.keys())
        for name, tensor in module.state_dict().items():
            name = prefix + name if prefix + name in stored else name
            right(torch.equal(handle.get_tensor(name).float(), tensor), f"{name} differs from the file")


# ---- pictures and listings

FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "tif": "TIFF", "bmp": "BMP", "gif": "GIF", "ppm": "PPM",
           "jp2": "JPEG2000", "avif": "AVIF"}


def picture_bytes(random: Random, kind: str) -> bytes:
    """A picture of random size and mode in one of the formats that are read."""
    from PIL import Image, features

    height, width = (int(n) for n in random.integers(1, 90, 2))
    image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
    modes = {"png": ("RGB", "RGBA", "P", "L", "LA", "1", "I;16"), "jpg": ("RGB", "L", "CMYK"), "webp": ("RGB", "RGBA"),
             "tif": ("RGB", "RGBA", "L", "CMYK", "1", "P", "I;16"), "bmp": ("RGB", "P", "L", "1"), "gif": ("P", "L"),
             "ppm": ("RGB", "L"), "jp2": ("RGB", "L", "RGBA"), "avif": ("RGB", "RGBA")}[kind]
    if kind == "avif" and not features.check("avif"):
        kind, modes = "png", ("RGB",)
    mode, options, buffer = modes[random.integers(len(modes))], {}, io.BytesIO()
    image = image.convert("I").point(lambda v: v * 257).convert("I;16") if mode == "I;16" else image.convert(mode)
    if kind in ("png", "jpg", "webp", "tif") and random.random() < 0.3:
        exif = Image.Exif()
        exif[0x0112] = int(random.integers(0, 11))
        options["exif"] = exif
    if kind == "tif" and mode != "1" and not options:
        options["compression"] = (None, "tiff_lzw", "tiff_deflate")[random.integers(3)]
    image.save(buffer, FORMATS[kind], **options)
    return buffer.getvalue()


def pictures(folder: Path, random: Random) -> None:
    """A damaged picture: what is read is upright 8-bit RGB of the size that the header announces."""
    from data import read_picture, upright_size

    kind = list(FORMATS)[random.integers(len(FORMATS))]
    file = folder / f"picture.{kind}"
    data = picture_bytes(random, kind)
    file.write_bytes(damaged_bytes(data, random) if random.random() < 0.9 else data)
    picture = read_picture(file)
    right(picture.mode == "RGB", f"mode {picture.mode}")
    right(picture.size == upright_size(file), f"read {picture.size}, announced {upright_size(file)}")


def listings(folder: Path, random: Random) -> None:
    """A damaged metadata.jsonl: what is read names pictures that are there and captions that can be encoded."""
    from data import read_folder, read_picture

    names = [f"{k}.png" for k in range(4)]
    for name in names:
        (folder / name).write_bytes(picture_bytes(random, "png"))
    rows = [json.dumps({"file_name": name, "text": f"a boat {name}", "alt": ["a ship", "红船"]}) for name in names]
    at = int(random.integers(4))
    lines = [row.encode() for row in rows]
    lines[at] = damaged_text(rows[at], random)
    data = (b"\n", b"\r\n", b"\n\n")[random.integers(3)].join(lines)
    if random.random() < 0.2:
        data = data.decode("utf-8", "replace").encode(("utf-16", "utf-8-sig", "latin-1")[random.integers(3)], "replace")
    (folder / "metadata.jsonl").write_bytes(damaged_bytes(data, random) if random.random() < 0.2 else data)
    for item in read_folder(folder):
        right(item.path.is_relative_to(folder) and ".." not in item.path.parts, f"{item.path} is outside")
        right(all(caption.strip() and caption.encode() for caption in item.captions), "an empty caption")
        read_picture(item.path)


# ---- tables of ratings

def tables(folder: Path, random: Random) -> None:
    """A damaged CSV of ratings: the report has finite numbers, for the columns that have them."""
    import metrics

    cells = [["picture", "rating", "glcm", "ratio"]]
    for k, (rating, glcm, ratio) in enumerate(random.normal(size=(9, 3))):
        cells.append([f"p{k}.png", f"{rating:.3f}", f"{glcm:.4f}", f"{1 + abs(ratio):.4f}"])
    for _ in range(random.integers(0, 3)):
        row = cells[int(random.integers(len(cells)))]
        if random.random() < 0.6 and row:
            row[int(random.integers(len(row)))] = str(HOSTILE[random.integers(len(HOSTILE))])
        elif random.random() < 0.5:
            row.append("1")
        elif row:
            row.pop()
    between = (",", ";", "\t")[random.integers(3)]
    text = "\n".join(between.join(row) for row in cells)
    data = text.encode("utf-8", "surrogatepass")
    file = folder / "ratings.csv"
    file.write_bytes(damaged_bytes(data, random) if random.random() < 0.3 else data)
    command(metrics.main, ["metrics.py", "correlate", str(file), "--json"], file)


def command(main: Callable[[], None], argv: list[str], file: Path) -> None:
    """Run a command in this process. A refusal becomes the ValueError that it prints; a good report is finite."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv, code = argv, 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = before
    if code not in (0, None):
        lines = [*err.getvalue().splitlines(), *(str(code).splitlines() if isinstance(code, str) else [])]
        errors = [line for line in lines if line.startswith("error: ")]
        right(bool(errors) and "Traceback" not in err.getvalue(), f"exit {code} without a line")
        raise ValueError(next((line for line in errors if file.name in line), errors[0]))
    for row in json.loads(out.getvalue())["metrics"]:
        right(all(np.isfinite(v) and abs(v) <= 1 for name, v in row.items() if name != "metric"), f"{row}")


# ---- JSON beside weights

def json_files(folder: Path, random: Random) -> None:
    """A damaged configuration: what loads still encodes a prompt, or a picture, to finite numbers."""
    import torch
    from safetensors.torch import save_file

    from checkpoint import open_weights
    from text import CLIPTokenizer, T5Tokenizer
    from train_vae import new_vae
    from vae import VAE, VAEConfig

    def damage(file: Path) -> None:
        file.write_bytes(damaged_text(file.read_text(), random))

    choice, sd3 = random.integers(4), ROOT / "models" / "tiny-sd3"
    if choice == 0:
        save_file(new_vae(VAEConfig(*SMALL_VAE), 0).state_dict(), folder / "model.safetensors")
        about = {"norm_num_groups": 1, "scaling_factor": 1.5, "shift_factor": 0.06, "latent_channels": 16}
        (folder / "config.json").write_text(json.dumps(about))
        damage(folder / "config.json")
        vae = VAE.load(folder)
        right(bool(np.isfinite([vae.scale_factor, vae.shift_factor]).all()) and vae.scale_factor != 0, "scale or shift")
        return
    if choice == 1:
        shards = {f"{k}.safetensors": {f"a.{k}": torch.ones(2)} for k in range(2)}
        for name, tensors in shards.items():
            save_file(tensors, folder / name)
        index = {"metadata": {"total_size": 16}, "weight_map": {f"a.{k}": f"{k}.safetensors" for k in range(2)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        damage(folder / "model.safetensors.index.json")
        right(all(t.read().eq(1).all() for t in open_weights(folder).values()), "another tensor")
        return
    source = sd3 / ("tokenizer" if choice == 2 else "tokenizer_3")
    for file in source.iterdir():
        shutil.copy(file, folder)
    targets = sorted(folder.glob("*.json"))
    damage(targets[int(random.integers(len(targets)))] if targets else folder / "tokenizer_config.json")
    tokenizer = (CLIPTokenizer if choice == 2 else T5Tokenizer).load(folder)
    ids = tokenizer(["a red boat on the sea"], 77 if choice == 2 else 32)
    right(0 <= int(ids.min()) and int(ids.max()) < tokenizer.size, "an id beyond the vocabulary")


# ---- what runs write

def caches(folder: Path, random: Random) -> None:
    """A damaged embedding: it is computed again, up to the rounding of another batch, or refused by its checksum."""
    import torch

    from training.cache import Embeddings

    source, captions = folder.parent / "embeddings", ["a red boat", ""]
    if not source.is_dir():
        Embeddings(source, ROOT / "models" / "tiny-sd3").fill(captions)
    shutil.copytree(source, folder / "cache")
    files = sorted((folder / "cache").rglob("*.safetensors"))
    victim = files[int(random.integers(len(files)))]
    if random.random() < 0.2:
        shutil.copy(files[0], files[1])  # two captions exchanged
    else:
        victim.write_bytes(damaged_bytes(victim.read_bytes(), random))
    embeddings = Embeddings(folder / "cache", ROOT / "models" / "tiny-sd3")
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        embeddings.fill(captions)
    expected = Embeddings(source, ROOT / "models" / "tiny-sd3").read(captions)
    for ours, theirs in zip(embeddings.read(captions), expected, strict=True):
        right(torch.allclose(ours, theirs, atol=1e-5), "another embedding")


def checkpoints(folder: Path, random: Random) -> None:
    """A damaged checkpoint: it is refused, or the one before it is used; what is read is what was written."""
    import torch

    from training.resume import load_checkpoint, newest, save_checkpoint

    def tensors(step: int) -> dict[str, torch.Tensor]:
        return {f"model.{k}": torch.arange(6.0).reshape(2, 3) + 10 * k + step for k in range(3)}

    for step in (1, 2):
        save_checkpoint(folder, step, tensors(step), {"settings": {}}, keep=2)
    files = sorted(f for f in (folder / "checkpoints" / "step-00000002").iterdir())
    victim = files[int(random.integers(len(files)))]
    data = victim.read_bytes()
    victim.write_bytes(damaged_text(data.decode(), random) if victim.suffix == ".json" else damaged_bytes(data, random))
    with contextlib.redirect_stdout(io.StringIO()):
        found = newest(folder)
    right(found is not None, "no checkpoint is left")
    into = {name: torch.zeros(2, 3) for name in tensors(0)}
    load_checkpoint(found, into)
    step = int(found.name.removeprefix("step-"))
    right(all(torch.equal(into[name], t) for name, t in tensors(step).items()), f"{found.name} holds other numbers")


# ---- the run

CONSUMERS: dict[str, Consumer] = {"weights": weights, "pictures": pictures, "listings": listings, "tables": tables,
                                  "json": json_files, "caches": caches, "checkpoints": checkpoints}


def outcome(kind: str, folder: Path, seed: int, k: int) -> str:
    """"right", "refused: message" or "FAULT: what"."""
    try:
        CONSUMERS[kind](folder, np.random.default_rng([seed, list(CASES).index(kind), k]))
    except (ValueError, OSError) as error:
        message = str(error)
        if "\n" in message.strip() or not any(part in message for part in (folder.name, *map(str, folder.rglob("*")))):
            return f"FAULT: a message of several lines, or without the file: {message!r}"
        return f"refused: {message}"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"FAULT: {type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})".replace("\n", " ")
    if left := [file for file in folder.rglob(".*") if ".tmp" in file.name]:
        return f"FAULT: left behind: {left[0].name}"
    return "right"


def work(kind: str, seed: int, first: int, count: int) -> None:
    """The child: prints "k outcome" after each case."""
    with tempfile.TemporaryDirectory() as base:
        for k in range(first, first + count):
            folder = Path(base) / f"case-{k}"
            folder.mkdir()
            result = outcome(kind, folder, seed, k)
            if (peak := resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) > MOST_BYTES:
                result = f"FAULT: {peak / 2**30:.1f} GiB"
            print(k, result.encode("ascii", "backslashreplace").decode().replace("\n", "\\n"), flush=True)
            shutil.rmtree(folder)


def forward(child: subprocess.Popen, lines: queue.Queue) -> None:
    """The child's lines, then an empty one."""
    for line in child.stdout:
        lines.put(line)
    lines.put("")


def run(kind: str, seed: int, first: int, count: int) -> list[str]:
    """Outcomes of the cases; a child that hangs or dies is a fault, and the next child begins behind it."""
    outcomes: list[str] = []
    while len(outcomes) < count:
        begin = first + len(outcomes)
        command = [sys.executable, __file__, kind, "--seed", str(seed), "--first", str(begin), "--count",
                   str(first + count - begin), "--child"]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT,
                                 env=os.environ | {"OMP_NUM_THREADS": "1"})
        lines: queue.Queue[str] = queue.Queue()
        reader = threading.Thread(target=forward, args=(child, lines))
        reader.start()
        patience = MOST_S + 30  # the child first imports torch
        while len(outcomes) < count:
            try:
                line = lines.get(timeout=patience)
            except queue.Empty:
                outcomes.append(f"FAULT: more than {MOST_S} s")
                break
            if not line:
                outcomes.append(f"FAULT: the process died with {child.wait()}")
                break
            outcomes.append(line.rstrip().partition(" ")[2])
            patience = MOST_S
        child.kill()
        child.wait()
        reader.join()
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description="Damage files of every kind and read them.", allow_abbrev=False)
    parser.add_argument("kind", nargs="?", choices=CASES, help="one kind (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the damage (default: 0)")
    parser.add_argument("--share", type=float, default=1.0, help="of the cases of each kind (default: 1)")
    parser.add_argument("--first", type=int, default=0, help="first case (default: 0)")
    parser.add_argument("--count", type=int, help="cases (default: all)")
    parser.add_argument("--verbose", action="store_true", help="print every outcome")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return work(args.kind, args.seed, args.first, args.count)
    faults = 0
    for kind in [args.kind] if args.kind else CASES:
        count = args.count or max(1, round(CASES[kind] * args.share))
        outcomes = run(kind, args.seed, args.first, count)
        total = Counter(text.partition(":")[0] for text in outcomes)
        faults += total["FAULT"]
        print(f"{kind:12} {count:4} cases: {total['right']} right, {total['refused']} refused, {total['FAULT']} faults",
              flush=True)
        for k, text in enumerate(outcomes, args.first):
            if args.verbose or text.startswith("FAULT"):
                print(f"  {k}: {text[:300]}", flush=True)
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    main()
