"""Text to token ids: CLIP's byte-level BPE and T5's SentencePiece, with the special tokens of their folder.

Mirrors   transformers CLIPTokenizerFast, T5Tokenizer
Check     python -m pytest tests/test_text.py: real and tiny vocabularies
Folders   SD3: tokenizer/ and tokenizer_2/ of CLIP, tokenizer_3/ of T5. Flux: tokenizer/ of CLIP, tokenizer_2/ of T5
Units     ids are int64, (B, length)
Losses    a prompt that is too long loses its tail; T5, unlike CLIP, has no ids for most scripts: warnings quote both
"""

import base64
import json
import os
import re
import struct
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import sentencepiece
import torch
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor

from checkpoint import FLUX_DOWNLOAD, SD3_DOWNLOAD
from files import entry, read_json

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
CLIP_PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
SPACE = "\u2581"   # SentencePiece's sign for a space
MOST_EXTRA = 1000  # of T5's <extra_id_…>; official: 100


# ---- CLIP

class CLIPTokenizer:
    """Byte-level BPE; bos, eos and pad are ids, size is the largest id + 1. Created by `load`."""

    def __init__(self, backend: Tokenizer, bos: int, eos: int, pad: int):
        self.backend, self.bos, self.eos, self.pad = backend, bos, eos, pad
        self.size = max(backend.get_vocab().values()) + 1

    @classmethod
    def load(cls, folder: str | os.PathLike, pad: int | None = None) -> "CLIPTokenizer":
        """Read tokenizer.json, or vocab.json with merges.txt.

        pad     id; None takes the folder's pad_token ("!", id 0, for bigG), else the end token (CLIP-L)
        raises  FileNotFoundError if the folder has no vocabulary; ValueError if a file is malformed, or the vocabulary
                lacks a special token or a byte, without which text would be lost

        As in transformers, special tokens are recognised inside a prompt too: with tokenizer_2/, every "!" of a prompt
        becomes the padding id 0, whereas sd3-ref gives it its own id.
        """
        folder = Path(folder)
        backend, (roles, others) = _clip_backend(folder), _special_tokens(folder)
        added = [*others, *backend.get_added_tokens_decoder().values(), *roles.values(),
                 *map(_added_token, (CLIP_START, CLIP_END))]
        lost = [t.content for t in added if backend.token_to_id(t.content) is None]
        lost += [c + end for c in pre_tokenizers.ByteLevel.alphabet() for end in ("", "</w>")
                 if backend.token_to_id(c + end) is None]
        if lost:
            raise ValueError(f"{folder}: the vocabulary has no {lost[0]}: it has other settings, or is not CLIP's")
        backend.add_special_tokens(list({t.content: t for t in reversed(added)}.values()))  # the first of a token wins
        backend.no_padding()
        backend.no_truncation()
        if pad is None:
            pad = backend.token_to_id(roles["pad_token"].content if "pad_token" in roles else CLIP_END)
        return cls(backend, backend.token_to_id(CLIP_START), backend.token_to_id(CLIP_END), pad)

    def __call__(self, prompts: Iterable[str], length: int) -> Tensor:
        """Prompts -> ids (B, length): start, text, end, padding."""
        rows = []
        for prompt in check_prompts(prompts):
            encoded, room = self.backend.encode(prompt, add_special_tokens=False), length - 2
            if len(encoded.ids) > room:
                _warn_cut(prompt[encoded.offsets[room][0]:], len(encoded.ids), room)
            rows.append([self.bos, *encoded.ids[:room], self.eos])
        return _padded(rows, length, self.pad)


def _clip_backend(folder: Path) -> Tokenizer:
    single, pair = folder / "tokenizer.json", (folder / "vocab.json", folder / "merges.txt")
    if not single.is_file() and not all(file.is_file() for file in pair):
        raise FileNotFoundError(f"{folder}: no CLIP tokenizer: needs tokenizer.json, or vocab.json with merges.txt, as "
                                f"in tokenizer/ of {SD3_DOWNLOAD}-diffusers and {FLUX_DOWNLOAD}")
    if single.is_file():
        return _read_backend(single)
    for file in pair:
        _no_pointer(file)
    with _named(" or ".join(map(str, pair))):
        vocabulary, merges = BPE.read_file(*map(str, pair))
        bpe = BPE(vocabulary, merges, unk_token=CLIP_END, continuing_subword_prefix="", end_of_word_suffix="</w>")
    letters = re.compile(r".(</w>)?|<.*>", re.DOTALL)  # and special tokens: what needs no merge
    made = dict.fromkeys(first + second for first, second in merges)
    if (ids := [vocabulary[word] for word in made]) != sorted(ids):
        raise ValueError(f"{pair[1]}: its merges are not in the order of the ids in vocab.json: download both again")
    if lost := [word for word in vocabulary.keys() - made.keys() if not letters.fullmatch(word)]:
        raise ValueError(f"{pair[1]}: {len(lost)} words of vocab.json are not made by its merges, such as "
                         f"{min(lost)!r:.40}: download both again")
    backend, split = Tokenizer(bpe), pre_tokenizers.Split(Regex(CLIP_PATTERN), behavior="removed", invert=True)
    one_space = normalizers.Replace(Regex(r"\s+"), " ")
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), one_space, normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return backend


def _special_tokens(folder: Path) -> tuple[dict[str, AddedToken], list[AddedToken]]:
    """Special tokens by their role, and those added, of special_tokens_map.json and, first, tokenizer_config.json."""
    settings, source = {}, {}
    for file in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        content = _read_optional(file)
        settings |= content
        source |= dict.fromkeys(content, file)
    roles = {role: _added_token(settings[role], f"{source[role]}: {role}") for role in ROLES if settings.get(role)}
    key = "added_tokens_decoder"
    added = entry(settings, key, dict, source[key]) if key in settings else {}
    return roles, [_added_token(token, f"{source[key]}: {key} {i}") for i, token in added.items()]


def _added_token(token: str | dict, where: str = "") -> AddedToken:
    if isinstance(token, str):
        token = {"content": token, "normalized": False}
    if not isinstance(token, dict):
        raise ValueError(f"{where} is {token!r:.40}, expected a text or an object with a content")
    flags = {flag: entry(token, flag, bool, where) if flag in token else False for flag in FLAGS}
    content = entry(token, "content", str, where)
    with _named(where):  # half of a surrogate pair is no text
        return AddedToken(content, special=True, **flags)


def _read_backend(file: Path) -> Tokenizer:
    content = json.dumps(read_json(file))  # bounded, before the library sees it
    with _named(file):
        return Tokenizer.from_str(content)


def _no_pointer(file: Path) -> None:
    with open(file, "rb") as f:
        if f.read(32).startswith(b"version https://git-lfs"):
            raise ValueError(f"{file}: a pointer of Git LFS: git lfs pull fetches the file")


@contextmanager
def _named(files: object) -> Iterator[None]:
    """An error of the libraries, which have no narrower class and panic as well, becomes a ValueError with the file."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ValueError(f"{files}: cannot be read ({error}): download it again") from None


# ---- T5

class T5Tokenizer:
    """SentencePiece with T5's special tokens; eos and pad are ids, size is the largest id + 1. Created by `load`.

    special  token -> id of the tokens that are recognised inside a prompt
    """

    def __init__(self, model: sentencepiece.SentencePieceProcessor, special: dict[str, int]):
        self.model, self.eos, self.pad, self.unknown = model, model.eos_id(), model.pad_id(), model.unk_id()
        self.special = {model.id_to_piece(i): i for i in (self.pad, self.eos, self.unknown)} | special
        self.size = max(model.vocab_size(), 1 + max(self.special.values()))
        self.split = re.compile("(" + "|".join(map(re.escape, self.special)) + ")")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "T5Tokenizer":
        """Read spiece.model, or the tokenizer.json that transformers writes from it.

        raises  FileNotFoundError if there is neither; ValueError if a file is malformed, or not of a T5
        """
        file, settings = Path(folder) / "spiece.model", Path(folder) / "tokenizer_config.json"
        if file.is_file():
            _no_pointer(file)
            content, config = file.read_bytes(), _read_optional(settings)
            extra_ids = entry(config, "extra_ids", int, settings, 0, MOST_EXTRA) if "extra_ids" in config else 100
        elif (file := file.with_name("tokenizer.json")).is_file():
            content, special = _sentencepiece_model(file)
        else:
            raise FileNotFoundError(f"{folder}: no T5 tokenizer: needs spiece.model or tokenizer.json, as in "
                                    f"tokenizer_3/ of {SD3_DOWNLOAD}-diffusers or tokenizer_2/ of {FLUX_DOWNLOAD}")
        with _named(file):
            model = sentencepiece.SentencePieceProcessor(model_proto=content)
        if min(model.pad_id(), model.eos_id(), model.unk_id()) < 0:
            raise ValueError(f"{file}: has no padding, end or unknown token: not a T5 vocabulary")
        if file.suffix == ".model":  # which does not hold these; <extra_id_0> is the last id
            special = {f"<extra_id_{i}>": model.vocab_size() + extra_ids - 1 - i for i in range(extra_ids)}
        return cls(model, special)

    def __call__(self, prompts: Iterable[str], length: int) -> Tensor:
        """Prompts -> ids (B, length): text, end, padding."""
        rows = []
        for prompt in check_prompts(prompts):
            pieces, ids = self.pieces(prompt)
            room = length - 1
            if len(ids) > room:
                _warn_cut("".join(pieces[room:]).replace(SPACE, " "), len(ids), room)
            words = [(p.replace(SPACE, ""), i) for p, i in zip(pieces, ids, strict=True) if p not in self.special]
            if lost := "".join(word for word, i in words if i == self.unknown):
                letters = "".join(word for word, _ in words)
                warnings.warn(f"{len(lost)} of {len(letters)} letters of a prompt are unknown to T5's vocabulary; "
                              f"lost: {_shortened(lost)!r}", stacklevel=2)
            rows.append([*ids[:room], self.eos])
        return _padded(rows, length, self.pad)

    def encode(self, prompt: str) -> list[int]:
        """Ids without end or padding. A special token in the prompt becomes its id; the text after it starts a word."""
        return self.pieces(prompt)[1]

    def pieces(self, prompt: str) -> tuple[list[str], list[int]]:
        """The pieces of a prompt, and their ids, as `encode`."""
        pieces, ids = [], []
        for part in self.split.split(prompt):
            special = part in self.special
            pieces += [part] if special else self.model.encode(part, out_type=str)
            ids += [self.special[part]] if special else self.model.encode(part)
        return pieces, ids


def _sentencepiece_model(file: Path) -> tuple[bytes, dict[str, int]]:
    """The spiece.model that a tokenizer.json was written from, and the special tokens.

    The `tokenizers` library reads tokenizer.json itself, but loses accents of some letters that SentencePiece keeps.
    """
    content = read_json(file)
    model, added = entry(content, "model", dict, file), entry(content, "added_tokens", list, file)
    unknown, scores = entry(model, "unk_id", int, file), entry(model, "vocab", list, file)
    first = content.get("normalizer") or {}
    with _named(file):
        special = {token["content"]: int(token["id"]) for token in added}
        (charsmap,) = (step["precompiled_charsmap"] for step in (first, *first.get("normalizers", ()))
                       if step["type"] == "Precompiled")
        kinds = (2 if i == unknown else 3 if piece in special else 1 for i, (piece, _) in enumerate(scores))
        pieces = (_field(1, piece.encode()) + struct.pack("<BfBB", 2 << 3 | 5, score, 3 << 3, kind)
                  for (piece, score), kind in zip(scores, kinds, strict=True))
        normalizer = _field(1, b"nmt_nfkc") + _field(2, base64.b64decode(charsmap))
        return b"".join(_field(1, piece) for piece in pieces) + _field(3, normalizer), special


def _field(number: int, content: bytes) -> bytes:
    """Bytes or a message in a protocol buffer; numbers and types are those of sentencepiece_model.proto."""
    size, length = [], len(content)
    while length > 127:
        size.append(length & 127 | 128)
        length >>= 7
    return bytes((number << 3 | 2, *size, length)) + content


def check_prompts(prompts: Iterable[str]) -> list[str]:
    """A list; ValueError on a bare string, which would be split into letters, and on what is no text."""
    if isinstance(prompts, str):
        raise ValueError(f"a single text {prompts[:20]!r}: give a list of prompts")
    prompts = list(prompts)
    for prompt in prompts:
        if not isinstance(prompt, str) or any("\ud800" <= c <= "\udfff" for c in prompt):
            raise ValueError(f"a prompt is not text, or not in UTF-8: {_shortened(repr(prompt))}")
    return prompts


def _padded(rows: list[list[int]], length: int, pad: int) -> Tensor:
    rows = [row + [pad] * (length - len(row)) for row in rows]
    return torch.tensor(rows, dtype=torch.long).reshape(len(rows), length)


def _warn_cut(tail: str, tokens: int, room: int) -> None:
    lost = _shortened(tail.strip())
    warnings.warn(f"a prompt of {tokens} tokens was cut to the limit of {room}; lost: {lost!r}", stacklevel=3)


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else text[:80] + "…"


def _read_optional(file: Path) -> dict:
    return read_json(file) if file.exists() else {}
