"""Add thinned wordings of every caption to a data folder: each word left out with a probability, one word always stays.

A model that trains on few photographs then learns which words matter, and follows prompts it has never seen.
Writes    DIR/metadata.jsonl: --copies more "alt" entries per caption, and their number as "thinned", atomically. A
          second run replaces them. The words that stay depend on (seed, copy, caption) alone
Run       python models/thin_captions.py photos           after fetch_photos.py, which writes metadata.jsonl anew
Check     python -m pytest tests/test_thin_captions.py
"""

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import read_folder  # noqa: E402
from files import need, replacing  # noqa: E402


def thinned(caption: str, drop: float, seed: int, copy: int) -> str:
    """The caption without the words that were drawn below `drop`; the highest draw stays in any case."""
    generator, words = random.Random(f"{seed} {copy} {caption}"), caption.split()
    draws = [generator.random() for _ in words]
    return " ".join(word for word, draw in zip(words, draws, strict=True) if draw >= min(drop, max(draws)))


def thin_folder(folder: Path, copies: int, drop: float, seed: int) -> tuple[int, int]:
    """Rewrite DIR/metadata.jsonl; returns the number of captions and of thinned wordings, none of them twice."""
    need(copies >= 0, "copies", copies, "0 or more")
    need(0 <= drop <= 1, "drop", f"{drop:g}", "a probability")
    read_folder(folder)  # ValueError that names the line that is broken
    listing, text, captions, wordings = folder / "metadata.jsonl", "", 0, 0
    for line in filter(str.strip, listing.read_text(encoding="utf-8-sig").split("\n")):
        row = json.loads(line)
        alt = row["alt"] if isinstance(row.get("alt"), list) else []  # null, or the NaN of pandas
        own = [row["text"], *alt[:len(alt) - row.get("thinned", 0)]]
        new = dict.fromkeys(thinned(caption, drop, seed, copy) for caption in own for copy in range(copies))
        new = [wording for wording in new if wording not in own]
        text += json.dumps(row | {"alt": own[1:] + new, "thinned": len(new)}, ensure_ascii=False) + "\n"
        captions, wordings = captions + len(own), wordings + len(new)
    with replacing(listing) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return captions, wordings


def main() -> None:
    parser = argparse.ArgumentParser(description="Add thinned wordings of every caption to a data folder.",
                                     allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("folder", metavar="DIR", type=Path, help="pictures and metadata.jsonl")
    parser.add_argument("--copies", type=int, default=3, help="thinned wordings per caption; 0 takes all out again")
    parser.add_argument("--drop", type=float, default=0.4, help="probability of each word to be left out")
    parser.add_argument("--seed", type=int, default=0, help="of the words that stay")
    args = parser.parse_args()
    try:
        captions, wordings = thin_folder(args.folder, args.copies, args.drop, args.seed)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{args.folder / 'metadata.jsonl'}: {captions} captions, {wordings} thinned wordings")


if __name__ == "__main__":
    main()
