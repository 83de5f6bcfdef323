"""Text to token ids: CLIP's byte-level BPE and T5's SentencePiece, with the special tokens of the folder they come from.

Mirrors   transformers CLIPTokenizerFast, T5Tokenizer; held by tests/test_text.py on real and on tiny vocabularies
Folders   tokenizer/ and tokenizer_2/ of SD3 are CLIP's, tokenizer_3/ is T5's; of Flux tokenizer/ is CLIP's, tokenizer_2/ is T5's
Units     ids are int64, (B, length); a prompt that is too long loses its tail, with a warning that quotes it
Check     python -m pytest tests/test_text.py
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

from checkpoint import FLUX_DOWNLOAD, SD3_DOWNLOAD, read_json

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
CLIP_PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class CLIPTokenizer:
    """Byte-level BPE as in transformers' CLIPTokenizerFast. Made by `load`.

    bos, eos, pad   ids
    """

    def __init__(self, backend: Tokenizer, bos: int, eos: int, pad: int):
        self.backend, self.bos, self.eos, self.pad = backend, bos, eos, pad
        self.size = backend.get_vocab_size()

    @staticmethod
    def load(folder: str | os.PathLike, pad: int | None = None) -> "CLIPTokenizer":
        """Read tokenizer.json, or vocab.json with merges.txt.

        folder  tokenizer/ (CLIP-L, pads with the end token) or tokenizer_2/ (bigG, pads with "!", id 0)
        pad     id; None takes the folder's pad_token, or the end token where it names none
        raises  FileNotFoundError if the folder has no vocabulary; ValueError if that lacks a special token

        The folder's special tokens are found inside a prompt too, as transformers does: in tokenizer_2/ every "!" of a
        prompt becomes the padding id 0. sd3-ref gives it its own id there.
        """
        folder = Path(folder)
        said = _said(folder / "special_tokens_map.json") | _said(folder / "tokenizer_config.json")
        whole = (folder / "tokenizer.json").is_file()
        if not whole and not ((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()):
            raise FileNotFoundError(f"{folder}: no CLIP tokenizer: needs tokenizer.json, or vocab.json with merges.txt, as in tokenizer/ "
                                    f"of {SD3_DOWNLOAD}-diffusers and {FLUX_DOWNLOAD}")
        try:
            backend = Tokenizer.from_file(str(folder / "tokenizer.json")) if whole else _clip_backend(folder)
        except Exception as error:  # the library has no narrower class
            raise ValueError(f"{folder}: its vocabulary cannot be read ({error}): download it again") from None
        named = [said[role] for role in ("bos_token", "eos_token", "unk_token", "pad_token") if said.get(role)]
        added = [*map(_added_token, said.get("added_tokens_decoder", {}).values()), *backend.get_added_tokens_decoder().values(),
                 *map(_added_token, (*named, CLIP_START, CLIP_END))]
        if missing := [t.content for t in added if backend.token_to_id(t.content) is None]:
            raise ValueError(f"{folder}: the vocabulary has no {missing[0]}: not the vocabulary of these settings, or not CLIP's")
        backend.add_special_tokens(list({t.content: t for t in reversed(added)}.values()))   # the first that speaks of a token decides
        backend.no_padding()
        backend.no_truncation()
        if pad is None:
            pad = backend.token_to_id(_added_token(said.get("pad_token") or CLIP_END).content)
        return CLIPTokenizer(backend, backend.token_to_id(CLIP_START), backend.token_to_id(CLIP_END), pad)

    def __call__(self, prompts: Iterable[str], length: int) -> Tensor:
        """Prompts -> ids (B, length): start, text, end, padding. A prompt that is too long loses its tail, with a warning."""
        rows = []
        for prompt in check_prompts(prompts):
            encoded, room = self.backend.encode(prompt, add_special_tokens=False), length - 2
            if len(encoded.ids) > room:
                _warn_cut(prompt[encoded.offsets[room][0]:], len(encoded.ids), room)
            ids = [self.bos, *encoded.ids[:room], self.eos]
            rows.append(ids + [self.pad] * (length - len(ids)))
        return torch.tensor(rows, dtype=torch.long).reshape(len(rows), length)


def _clip_backend(folder: Path) -> Tokenizer:
    vocabulary, merges = BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    backend = Tokenizer(BPE(vocabulary, merges, unk_token=CLIP_END, continuing_subword_prefix="", end_of_word_suffix="</w>"))
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(CLIP_PATTERN), behavior="removed", invert=True),
                                                     pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return backend


def _added_token(token: str | dict) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True, normalized=False)
    flags = {flag: token.get(flag, False) for flag in ("single_word", "lstrip", "rstrip", "normalized")}
    return AddedToken(token["content"], special=True, **flags)


class T5Tokenizer:
    """SentencePiece with T5's special tokens, as in transformers' T5Tokenizer. Made by `load`.

    eos, pad   ids, 1 and 0 officially
    """

    def __init__(self, pieces: sentencepiece.SentencePieceProcessor, extra_ids: int):
        self.pieces, self.eos, self.pad = pieces, pieces.eos_id(), pieces.pad_id()
        self.special = {pieces.id_to_piece(i): i for i in (self.pad, self.eos, pieces.unk_id())}
        # <extra_id_0> is the last id; SentencePiece does not know these
        self.special |= {f"<extra_id_{i}>": pieces.vocab_size() + extra_ids - 1 - i for i in range(extra_ids)}
        self.size = pieces.vocab_size() + extra_ids
        self.split = re.compile("(" + "|".join(map(re.escape, self.special)) + ")")

    @staticmethod
    def load(folder: str | os.PathLike) -> "T5Tokenizer":
        """Read spiece.model.

        folder  tokenizer_3/ of SD3, tokenizer_2/ of Flux
        raises  FileNotFoundError if spiece.model is missing; ValueError if it has no padding or end token
        """
        file = Path(folder) / "spiece.model"
        if not file.is_file():
            raise FileNotFoundError(f"{folder}: no T5 tokenizer: needs spiece.model (tokenizer.json is not read), as in tokenizer_3/ of "
                                    f"{SD3_DOWNLOAD}-diffusers or tokenizer_2/ of {FLUX_DOWNLOAD}")
        try:
            pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{file}: cannot be read ({error}): download it again") from None
        if min(pieces.pad_id(), pieces.eos_id(), pieces.unk_id()) < 0:
            raise ValueError(f"{file}: has no padding, end or unknown token: not a T5 vocabulary")
        return T5Tokenizer(pieces, _said(file.with_name("tokenizer_config.json")).get("extra_ids", 100))

    def __call__(self, prompts: Iterable[str], length: int) -> Tensor:
        """Prompts -> ids (B, length): text, end, padding. A prompt that is too long loses its tail, with a warning."""
        rows = []
        for prompt in check_prompts(prompts):
            ids, room = self.encode(prompt), length - 1
            if len(ids) > room:
                _warn_cut(self.pieces.decode([i for i in ids[room:] if i < self.pieces.vocab_size()]), len(ids), room)
            ids = [*ids[:room], self.eos]
            rows.append(ids + [self.pad] * (length - len(ids)))
        return torch.tensor(rows, dtype=torch.long).reshape(len(rows), length)

    def encode(self, prompt: str) -> list[int]:
        """Ids of a prompt without end or padding; a special token written in it becomes its id, and the text after it starts a word."""
        ids = []
        for part in self.split.split(prompt):
            ids += [self.special[part]] if part in self.special else self.pieces.encode(part)
        return ids


def check_prompts(prompts: Iterable[str]) -> list[str]:
    """A list; ValueError on a bare text, which would be taken letter by letter."""
    if isinstance(prompts, str):
        raise ValueError(f"a single text {prompts[:20]!r}: give a list of prompts")
    return list(prompts)


def _warn_cut(tail: str, tokens: int, room: int) -> None:
    tail = tail.strip()
    tail = tail if len(tail) <= 80 else tail[:80] + "…"
    warnings.warn(f"a prompt of {tokens} tokens was cut to the limit of {room}; lost: {tail!r}", stacklevel=3)


def _said(file: Path) -> dict:
    return read_json(file) if file.is_file() else {}
