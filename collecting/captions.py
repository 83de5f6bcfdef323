"""Captions of pictures from an OpenAI-compatible endpoint, as Aesthetic-4K has them from GPT-4o.

Paper     Diffusion-4K table 11, "Image Caption": PROMPT, word for word
File      lines of JSON: "file_name" and "text", as in metadata.jsonl, beside "model" and "tokens"
Resumes   the same command asks only what the file has no answer to: reading/endpoint.py
Run       python data.py caption DIR --endpoint URL --model NAME
Check     python -m pytest tests/test_captions.py
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from collecting.listings import text_of
from reading.endpoint import Endpoint, ask_all, data_url, estimate, question, read_records, tokens_of
from reading.pictures import read_picture, upright_size

PROMPT = ("Directly describe with brevity and as brief as possible the scene or characters without any introductory "
          "phrase like 'This image shows', 'In the scene', 'This image depicts' or similar phrases. Just start "
          "describing the scene please.")
MOST_TOKENS = 200  # of an answer; one that is cut off there is refused
INTRODUCED = re.compile(r"(this|the) (image|picture|photo(graph)?|scene) (shows|depicts|features|captures)\b|"
                        r"in (this|the) (image|picture|photo(graph)?|scene)(?![-\w])|"
                        r"(i['’]m|i am) (sorry|unable|not able)\b|as an ai\b|(sorry|sure)(?![-\w])|"
                        r"i (can(no|['’])t|won['’]t|will not|do not|don['’]t|apologi[sz]e)\b|"
                        r"unable to (assist|help|process|view|see|describe|identify|provide)\b|"
                        r"unfortunately(,| i\b| (the|this) (image|picture)\b)|"
                        r"no (image|picture) (was|is|has been|provided|attached)\b|here(['’]s| is)\b.*?:|"
                        r"an? (image|picture) (of|showing)\b|\W*(image )?(caption|description)\W*:", re.IGNORECASE)


def to_ask(pictures: Mapping[str, Path], model: str, file: Path, side: int, price: Sequence[float] | None,
           errors: list[str]) -> tuple[dict[str, Path], str]:
    """The pictures that `file` has no caption of, and one line: how many, how many tokens, how much at most.

    pictures  file_name -> path
    model     asked now: the line says how many captions are another one's
    side      of the pictures that are sent, pixels, at most
    price     US dollars per million tokens of input and of output
    errors    gets a line per picture that cannot be read, which is not asked about
    raises    ValueError if an answer in `file` has no text
    """
    answered, asked, tokens = read_records(file, "file_name"), {}, 0
    for name in pictures:
        if name in answered:
            text_of(answered[name], "text", f"{file}: remove the line of {name}, or give another --out")
    for name, path in pictures.items():
        if name not in answered:
            try:
                tokens += tokens_of(PROMPT, [upright_size(path)], side)
                asked[name] = path
            except ValueError as error:
                errors.append(str(error))
    line = estimate(len(asked), tokens, len(asked) * MOST_TOKENS, price)
    if others := sum(answered[name].get("model", model) != model for name in pictures if name in answered):
        line += f"; {others} of the answers are another model's: give another --out to ask again"
    return asked, line


def captions(pictures: Mapping[str, Path], endpoint: Endpoint, file: Path, side: int, at_once: int,
             errors: list[str]) -> dict[str, dict]:
    """Ask for captions and append them to `file`; returns file_name -> record."""
    def messages(path: Path) -> list[dict]:
        return question(PROMPT, [data_url(read_picture(path), side)])

    questions = {name: partial(messages, path) for name, path in pictures.items()}
    return ask_all(endpoint, questions, file, caption_of, errors, "file_name", at_once, MOST_TOKENS)


def caption_of(answer: str) -> dict[str, str]:
    """{"text": caption}; ValueError if the answer begins as the prompt forbids, or declines."""
    text = " ".join(answer.split())
    text = whole[1] if (whole := re.fullmatch(r'["“]([^"“”]*)["”]', text)) else text
    if INTRODUCED.match(text):
        raise ValueError(f"it begins with {text[:40]!r}")
    return {"text": text_of({"text": text}, "text", "the answer")}
