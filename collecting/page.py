"""The page of a selection: which pictures were left out and why, with thumbnails; one HTML file without links.

Run       python data.py select DIR --out NEW    writes NEW/dropped.html
Check     python -m pytest tests/test_selection.py
"""

import base64
from collections.abc import Mapping, Sequence
from html import escape

from collecting.selection import LEAST, MOST

MOST_SHOWN = 200  # pictures per reason, by name; all are in select.jsonl
TITLES = {"unreadable": "Cannot be read", "caption": "No caption", "short": "Short side, pixels",
          "entropy": "Entropy of gray levels, bits", "sharpness": "Sharpness: blurred everywhere",
          "glcm": "Detail by GLCM, bits", "flat": "Share of flat patches",
          "duplicate": "Near-duplicate of a kept picture"}
STYLE = """body { font: 15px/1.4 sans-serif; margin: 1.5em auto; max-width: 60em; padding: 0 1em }
td, th { padding: .15em 1em .15em 0; text-align: right } td:first-child, th:first-child { text-align: left }
section { display: flex; flex-wrap: wrap; gap: 14px } figure { margin: 0; width: 166px; font-size: 12px }
figcaption { overflow-wrap: anywhere } figure.pair { width: 332px } img { max-width: 160px }"""


def page(title: str, rows: Sequence[Mapping], errors: Sequence[str], limits: Mapping[str, float]) -> str:
    """The page, HTML.

    rows    of select.jsonl: numbers, "file_name", "reasons", and the bytes of a "thumbnail"
    errors  a line per picture that cannot be read
    limits  of the numbers, and "duplicate", in bits
    """
    thumbnails = {row["file_name"]: row["thumbnail"] for row in rows}
    groups = {name: [row for row in rows if row["reasons"][:1] == [name]] for name in TITLES}
    kept = sum(not row["reasons"] for row in rows)
    lines = [f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>',
             f"<style>{STYLE}</style><h1>{escape(title)}</h1>",
             f"<p>{kept:,} of {len(rows) + len(errors):,} pictures are kept. A picture stands below the first reason "
             "that holds; the table counts each reason.</p>",
             "<table><tr><th>left out<th>limit<th>pictures"]
    for name, about in TITLES.items():
        count = len(errors) if name == "unreadable" else sum(name in row["reasons"] for row in rows)
        lines.append(f"<tr><td>{about}<td>{_limit(name, limits)}<td>{count:,}")
    lines.append("</table>")
    if errors:
        lines += [f"<h2>{TITLES['unreadable']}: {len(errors):,}</h2>", *(f"<p>{escape(error)}" for error in errors)]
    for name, group in groups.items():
        if group:
            more = f"; the first {MOST_SHOWN} are shown" if len(group) > MOST_SHOWN else ""
            lines.append(f"<h2>{TITLES[name]}: {len(group):,}{more}</h2><section>")
            lines += [_figure(row, thumbnails) for row in group[:MOST_SHOWN]]
            lines.append("</section>")
    return "\n".join(lines) + "\n"


def _limit(name: str, limits: Mapping[str, float]) -> str:
    if name not in limits:
        return ""
    return f"below {limits[name]:g}" if name in LEAST else f"above {limits[name]:g}" if name in MOST else \
        f"at most {limits[name]:g} bits differ"


def _figure(row: Mapping, thumbnails: Mapping[str, bytes]) -> str:
    numbers = [f"{name} {row[name]:.4g}" for name in row["reasons"] if name in row]
    text = ", ".join([f"{row['width']}×{row['height']}", *numbers])
    pictures, about = [row["thumbnail"]], escape(row["file_name"])
    if twin := row.get("duplicate_of"):
        pictures, about = [*pictures, thumbnails[twin]], f"{about}, left; right: {escape(twin)}"
    shown = " ".join(f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(picture).decode()}">'
                     for picture in pictures)
    return f'<figure{" class=pair" * (len(pictures) > 1)}>{shown}<figcaption>{about}<br>{text}</figcaption></figure>'
