"""Which of two pictures of a prompt a vision model prefers, asked in both orders; the win rates of figure 6.

Paper     Diffusion-4K sections 4.2 and 9, table 11: its prompts for GPT-4o. The printed table lost the format's second
          line, which is restored here; temperature and sizes are not published
Orders    models favour a place. Each pair is asked as (A, B) and as (B, A); where the answers differ, it is undecided
Parsing   three lines in the format that was asked for, in its order, and nothing else counts; others are asked again
Resumes   a question is its prompt, pictures, upload side and model: what has been answered is not asked again, and
          answers to other questions in the same file do not count
"""

import hashlib
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from reading.endpoint import Endpoint, ask_all, data_url, estimate, question, read_records, tokens_of
from reading.pictures import own_prompt, read_picture, upright_size
from scores.intervals import wilson
from scores.pairing import pair_captions

SYSTEM = ("As an AI visual assistant, you are analyzing two specific images. When presented with a specific caption, "
          "it is required to evaluate visual aesthetics, prompt coherence and fine details.")
ASKED = {
    "Visual Aesthetics": "Given the prompt, which image is of higher-quality and aesthetically more pleasing?",
    "Prompt Adherence": "Which image looks more representative to the text shown above and faithfully follows it?",
    "Fine Details": "Which image more accurately represents the fine visual details? Focus on clarity, sharpness, and "
                    "texture. Assess the fidelity of fine elements such as edges, patterns, and nuances in color. The "
                    "more precise representation of these details is preferred! Ignore other aspects."}
FORMAT = "(the first image is better) or (the second image is better). The reason is (give your reason here)."
MOST_TOKENS = 500  # of an answer


def text_of(prompt: str) -> str:
    """Table 11's text for a prompt."""
    questions = [f"{k}. {name}: {asked}" for k, (name, asked) in enumerate(ASKED.items(), 1)]
    form = [f"{k}. {name}: {FORMAT}" for k, name in enumerate(ASKED, 1)]
    return "\n".join([f"The caption for the two images is: {prompt}. Please answer the following questions:",
                      *questions, "Please respond me strictly in the following format:", *form])


def parse(answer: str) -> dict:
    """{"answer": text, name: "first" or "second" of each question}; ValueError if it is off the format."""
    found = re.findall(r"^\W*([1-9])\W+(" + "|".join(ASKED) + r")\W+the (first|second) image is better\b(.*)",
                       answer, re.MULTILINE | re.IGNORECASE)
    if [(int(number), name.lower()) for number, name, *_ in found] != [
            (k, name.lower()) for k, name in enumerate(ASKED, 1)] or any(
            re.search(r"\b(first|second) image is better", rest, re.IGNORECASE) for *_, rest in found):
        raise ValueError(f"not the three lines that were asked for ({' '.join(answer.split())[:80]!r})")
    return {"answer": answer} | {name: choice.lower() for name, (_, _, choice, _) in zip(ASKED, found, strict=True)}


def can_be_read(pictures: Sequence[Path], errors: list[str]) -> bool:
    """Whether all of these are pictures, by their headers; `errors` gets the line of the first that is none."""
    try:
        return bool(list(map(upright_size, pictures)))
    except ValueError as error:
        errors.append(str(error))
        return False


def captions_of(pictures: Sequence[Path], prompts: Path | None, notes: list[str]) -> dict[Path, str]:
    """Picture -> prompt, of a listing, or as sample.py records it; ValueError names a picture without."""
    if prompts:
        return pair_captions(prompts, pictures, notes)
    captions = {picture: own_prompt(picture) for picture in pictures}
    if without := [picture for picture, caption in captions.items() if not caption]:
        raise ValueError(f"{without[0]}: records no prompt; give --prompts metadata.jsonl")
    return captions


def preference(pairs: dict[Path, Path], captions: dict[Path, str], endpoint: Endpoint, out: Path, side: int,
               at_once: int, price: Sequence[float] | None, dry_run: bool, notes: list[str],
               errors: list[str], announce=print) -> list[dict]:
    """The rows of `win_rates`; none if `dry_run`.

    pairs     picture of A -> picture of B
    out       file of answers, resumed
    announce  is told how many requests, tokens and dollars, before the first one
    """
    questions, tokens = {}, {}
    for a, b in pairs.items():
        text = text_of(captions[a])
        content = hashlib.sha256(f"{SYSTEM}\n{text}\n{side} {endpoint.model}".encode())
        for path in (a, b):
            with open(path, "rb") as file:
                content.update(hashlib.file_digest(file, "sha256").digest())
        for order, pictures in (("AB", (a, b)), ("BA", (b, a))):
            key = f"{a.stem} {order} {content.hexdigest()[:12]}"
            questions[key] = partial(_messages, text, pictures, side)
            tokens[key] = tokens_of(SYSTEM + text, list(map(upright_size, pictures)), side)
    new = set(questions) - read_records(out).keys()
    announce(estimate(len(new), sum(tokens[key] for key in new), MOST_TOKENS * len(new), price))
    if dry_run:
        return []
    records = ask_all(endpoint, questions, out, parse, errors, at_once=at_once, most_tokens=MOST_TOKENS)
    rows, complete = win_rates(records)
    notes.append(f"note: {complete} of {len(pairs)} pairs are answered in both orders, by {endpoint.model}; "
                 f"{sum(sum(record['tokens']) for record in records.values()):,} tokens")
    return rows


def _messages(text: str, pictures: Sequence[Path], side: int) -> list[dict]:
    return question(text, [data_url(read_picture(path), side) for path in pictures], SYSTEM)


def win_rates(records: dict[str, dict]) -> tuple[list[dict], int]:
    """A row per question, and how many pairs are answered in both orders; records: of `preference`."""
    orders = {"AB": {}, "BA": {}}
    for key, record in records.items():
        name, order, content = key.rsplit(" ", 2)
        orders[order][name, content] = record
    both = [(orders["AB"][pair], orders["BA"][pair]) for pair in orders["AB"] if pair in orders["BA"]]
    rows = []
    for name in ASKED:
        verdicts = [(ab[name], ba[name]) for ab, ba in both]
        a, b = verdicts.count(("first", "second")), verdicts.count(("second", "first"))
        low, high = wilson(b, a + b)
        chosen = [choice for verdict in verdicts for choice in verdict]
        rows.append({"question": name, "a_wins": a, "b_wins": b, "undecided": len(both) - a - b,
                     "rate": b / (a + b) if a + b else None, "rate_low": low, "rate_high": high,
                     "first_chosen": chosen.count("first") / len(chosen) if chosen else None})
    return rows, len(both)


PREFER_COLUMNS = {"question": "", "a_wins": "d", "b_wins": "d", "undecided": "d", "rate": ".3f", "rate_low": ".3f",
                  "rate_high": ".3f", "first_chosen": ".3f"}
