"""Text to token ids: CLIP's byte-level BPE and T5's SentencePiece, with the special tokens of their folder.

Mirrors   transformers CLIPTokenizerFast, T5Tokenizer
Check     python -m pytest tests/test_text.py: real and tiny vocabularies
Folders   SD3: tokenizer/ and tokenizer_2/ of CLIP, tokenizer_3/ of T5. Flux: tokenizer/ of CLIP, tokenizer_2/ of T5
Units     ids are int64, (B, length); a prompt that is too long loses its tail, with a warning that quotes it
"""

import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
import torch
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor

from checkpoint import FLUX_DOWNLOAD, SD3_DOWNLOAD
from files import read_json

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
CLIP_PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class CLIPTokenizer:
    """Byte-level BPE; bos, eos and pad are ids, size counts the words. Created by `load`."""

    def __init__(self, backend: Tokenizer, bos: int, eos: int, pad: int):
        self.backend, self.bos, self.eos, self.pad = backend, bos, eos, pad
        self.size = backend.get_vocab_size()

    @classmethod
    def load(cls, folder: str | os.PathLike, pad: int | None = None) -> "CLIPTokenizer":
        """Read tokenizer.json, or vocab.json with merges.txt.

        pad     id; None takes the folder's pad_token ("!", id 0, for bigG), else the end token (CLIP-L)
        raises  FileNotFoundError if the folder has no vocabulary; ValueError if the vocabulary lacks a special token

        As in transformers, special tokens are recognised inside a prompt too: with tokenizer_2/, every "!" of a prompt
        becomes the padding id 0, whereas sd3-ref gives it its own id.
        """
        folder = Path(folder)
        settings = _read_optional(folder / "special_tokens_map.json") | _read_optional(folder / "tokenizer_config.json")
        backend = _clip_backend(folder)
        roles = [settings[role] for role in ("bos_token", "eos_token", "unk_token", "pad_token") if settings.get(role)]
        added = [*map(_added_token, settings.get("added_tokens_decoder", {}).values()),
                 *backend.get_added_tokens_decoder().values(), *map(_added_token, (*roles, CLIP_START, CLIP_END))]
        if missing := [t.content for t in added if backend.token_to_id(t.content) is None]:
            raise ValueError(f"{folder}: the vocabulary has no {missing[0]}: it has other settings, or is not CLIP's")
        backend.add_special_tokens(list({t.content: t for t in reversed(added)}.values()))  # the first of a token wins
        backend.no_padding()
        backend.no_truncation()
        if pad is None:
            pad = backend.token_to_id(_added_token(settings.get("pad_token") or CLIP_END).content)
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
    try:
        if single.is_file():
            return Tokenizer.from_file(str(single))
        vocabulary, merges = BPE.read_file(*map(str, pair))
        bpe = BPE(vocabulary, merges, unk_token=CLIP_END, continuing_subword_prefix="", end_of_word_suffix="</w>")
    except Exception as error:  # the library has no narrower class
        raise ValueError(f"{folder}: its vocabulary cannot be read ({error}): download it again") from None
    backend, split = Tokenizer(bpe), pre_tokenizers.Split(Regex(CLIP_PATTERN), behavior="removed", invert=True)
    one_space = normalizers.Replace(Regex(r"\s+"), " ")
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), one_space, normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return backend


def _added_token(token: str | dict) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True, normalized=False)
    flags = {flag: token.get(flag, False) for flag in ("single_word", "lstrip", "rstrip", "normalized")}
    return AddedToken(token["content"], special=True, **flags)


class T5Tokenizer:
    """SentencePiece with T5's special tokens; eos and pad are ids, size counts the words. Created by `load`."""

    def __init__(self, pieces: sentencepiece.SentencePieceProcessor, extra_ids: int):
        self.pieces, self.eos, self.pad = pieces, pieces.eos_id(), pieces.pad_id()
        self.size = pieces.vocab_size() + extra_ids
        self.special = {pieces.id_to_piece(i): i for i in (self.pad, self.eos, pieces.unk_id())}
        # SentencePiece does not know these; <extra_id_0> is the last id
        self.special |= {f"<extra_id_{i}>": self.size - 1 - i for i in range(extra_ids)}
        self.split = re.compile("(" + "|".join(map(re.escape, self.special)) + ")")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "T5Tokenizer":
        """Read spiece.model; FileNotFoundError if there is none, ValueError if it has no padding or end token."""
        file = Path(folder) / "spiece.model"
        if not file.is_file():
            raise FileNotFoundError(f"{folder}: no T5 tokenizer: needs spiece.model (tokenizer.json is not read), as "
                                    f"in tokenizer_3/ of {SD3_DOWNLOAD}-diffusers or tokenizer_2/ of {FLUX_DOWNLOAD}")
        try:
            pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{file}: cannot be read ({error}): download it again") from None
        if min(pieces.pad_id(), pieces.eos_id(), pieces.unk_id()) < 0:
            raise ValueError(f"{file}: has no padding, end or unknown token: not a T5 vocabulary")
        return cls(pieces, _read_optional(file.with_name("tokenizer_config.json")).get("extra_ids", 100))

    def __call__(self, prompts: Iterable[str], length: int) -> Tensor:
        """Prompts -> ids (B, length): text, end, padding."""
        rows = []
        for prompt in check_prompts(prompts):
            ids, room = self.encode(prompt), length - 1
            if len(ids) > room:
                _warn_cut(self.pieces.decode([i for i in ids[room:] if i < self.pieces.vocab_size()]), len(ids), room)
            rows.append([*ids[:room], self.eos])
        return _padded(rows, length, self.pad)

    def encode(self, prompt: str) -> list[int]:
        """Ids without end or padding. A special token in the prompt becomes its id; the text after it starts a word."""
        ids = []
        for part in self.split.split(prompt):
            ids += [self.special[part]] if part in self.special else self.pieces.encode(part)
        return ids


def check_prompts(prompts: Iterable[str]) -> list[str]:
    """A list; ValueError on a bare string, which would be split into letters."""
    if isinstance(prompts, str):
        raise ValueError(f"a single text {prompts[:20]!r}: give a list of prompts")
    return list(prompts)


def _padded(rows: list[list[int]], length: int, pad: int) -> Tensor:
    rows = [row + [pad] * (length - len(row)) for row in rows]
    return torch.tensor(rows, dtype=torch.long).reshape(len(rows), length)


def _warn_cut(tail: str, tokens: int, room: int) -> None:
    tail = tail.strip()
    tail = tail if len(tail) <= 80 else tail[:80] + "…"
    warnings.warn(f"a prompt of {tokens} tokens was cut to the limit of {room}; lost: {tail!r}", stacklevel=3)


def _read_optional(file: Path) -> dict:
    return read_json(file) if file.is_file() else {}
