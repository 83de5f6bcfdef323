"""Metrics beside ratings by people: a CSV of numbers, and how well each of its columns agrees with the ratings.

Table   a first line of column names, "rating" among them; cells separated by commas, semicolons or tabs
Number  as 1234.5 or 1.2345e3; anything else in a column of numbers is an error that names the line
Errors  concern a column or some lines: what is left is reported. Without ratings there is no report
"""

import csv
import io
import math
import os
import re
import sys

from tqdm import tqdm

from files import read_text
from scores.compare import plcc, srcc
from scores.intervals import bootstrap

NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)
MEANT = re.compile(r"[+-]?([.,]?[0-9][0-9.,'_%\s]*(e[+-]?[0-9]+)?|nan|inf|infinity)", re.IGNORECASE)  # as a number
MANY = 10_000  # ratings: more take seconds per column
RECIPROCAL = ("ratio", "compression_ratio")  # the paper correlates its reciprocal: lower means more detail

Row = tuple[int, list[str]]  # the number of its line, its cells


def correlate(path: str | os.PathLike) -> tuple[int, list[dict], list[str], list[str]]:
    """The number of ratings; per metric SRCC and PLCC with their intervals; notes; errors.

    raises  ValueError if the file is no such table, has no ratings, or no column can be compared with them
    """
    names, rows, errors, separator = read_table(path)
    columns, notes = {}, []
    for k, name in enumerate(names):
        try:
            if names.count(name) > 1:
                raise ValueError(f"{path}: {names.count(name)} columns have the name {name}")
            cells = [(line, row[k]) for line, row in rows]
            values = read_column(path, name, cells)
            if separator != "," and values:
                check_thousands(path, name, cells)
            columns[name] = values
        except ValueError as error:
            if name == "rating":
                raise
            errors.append(f"{error}; left out")
    if texts := [name for name, values in columns.items() if values is None]:
        notes.append(f"note: columns without numbers: {', '.join(texts)}")
    if (rating := columns.pop("rating")) is None:
        line, first = rows[0][0], rows[0][1][names.index("rating")]
        raise ValueError(f"{path}:{line}: column rating holds no number ({first[:40]!r}; write one as 1234.5)")
    if min(rating) == max(rating):
        lack = f"{path}: the only rating is {rating[0]:g}: a correlation needs at least 2 that differ"
        raise ValueError("; ".join([lack, *errors]))
    metrics = []
    for name, values in tqdm(columns.items(), desc="metrics", file=sys.stderr, disable=len(rating) < MANY):
        try:
            metrics += [agreement(name, values, rating)] if values else []
        except ValueError as error:
            errors.append(f"{path}: {name}: {error}; left out")
    if not metrics:
        raise ValueError("; ".join(dict.fromkeys(errors)) or f"{path}: no column of numbers beside rating")
    return len(rating), metrics, notes, list(dict.fromkeys(errors))


def agreement(name: str, values: list[float], rating: list[float]) -> dict:
    """SRCC and PLCC of a column, or of its reciprocal, with 95 % intervals; ValueError if there are none."""
    if name in RECIPROCAL:
        name = f"1/{name}"
        if not all(values):
            raise ValueError("0 has no reciprocal")
        values = [1 / value for value in values]
    row = {"metric": name}
    for title, statistic in (("srcc", srcc), ("plcc", plcc)):
        row[title] = statistic(values, rating)
        row[f"{title}_low"], row[f"{title}_high"] = bootstrap(statistic, values, rating)
    return row


# ---- reading

def read_table(path: str | os.PathLike) -> tuple[list[str], list[Row], list[str], str]:
    """Column names, rows, an error for the rows with more or fewer cells, which are left out, and the separator."""
    text = read_text(path)
    first = text.lstrip().partition("\n")[0]
    separator = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        rows = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: not a CSV ({error})") from None
    rows = [row for row in rows if any(row[1])]
    if rows and rows[0][1] == ["sep=", ""]:  # which Excel reads as the separator
        del rows[0]
    names = [name or f"number {k}" for k, name in enumerate(rows.pop(0)[1], 1)] if rows else []
    if "rating" not in names or not rows:
        raise ValueError(f'{path}: needs a first line of column names, among them "rating", and lines below it; '
                         f"it has the columns {', '.join(names)[:200] or 'none'} and {len(rows)} lines below them")
    odd, errors = [row for row in rows if len(row[1]) != len(names)], []
    if odd:
        line, cells = odd[0]
        errors = [f"{path}:{line}: {len(cells)} cells, expected {len(names)} as in the first line; "
                  f"{len(odd)} such lines of {len(rows)} left out"]
        rows = [row for row in rows if len(row[1]) == len(names)]
    if not rows:
        raise ValueError(errors[0])
    return names, rows, errors, separator


def read_column(path: str | os.PathLike, name: str, cells: list[tuple[int, str]]) -> list[float] | None:
    """The numbers of a column, None if it is one of text; ValueError names the first cell that is no number."""
    if not any(MEANT.fullmatch(cell) for _, cell in cells):
        return None
    numbers = []
    for line, cell in cells:
        try:
            numbers.append(read_number(cell))
        except ValueError as error:
            raise ValueError(f"{path}:{line}: column {name} holds no number ({error})") from None
    return numbers


def check_thousands(path: str | os.PathLike, name: str, cells: list[tuple[int, str]]) -> None:
    """ValueError if dots may stand between thousands, as in 1.234 beside 999. In all cells, they would be a factor."""
    dotted = [(line, cell) for line, cell in cells if re.fullmatch(r"[+-]?[1-9][0-9]{0,2}\.[0-9]{3}", cell)]
    short = [cell for _, cell in cells if re.fullmatch("[+-]?[0-9]{1,3}", cell)]
    if dotted and short and len(dotted) + len(short) == len(cells):
        line, cell = dotted[0]
        raise ValueError(f"{path}:{line}: column {name} may have dots between thousands, {cell} beside {short[0]}; "
                         f"write {cell.replace('.', '')}, or {cell}0 if the dot is a decimal point")


def read_number(cell: str) -> float:
    """ValueError if a cell is no finite number, or one that double precision can't hold."""
    if not NUMBER.fullmatch(cell):
        raise ValueError(f"{cell[:40]!r}; write one as 1234.5" if cell else "it is empty")
    value, digits = float(cell), cell.lower().partition("e")[0]
    if math.isinf(value) or abs(value) < sys.float_info.min and re.search("[1-9]", digits):
        raise ValueError(f"{cell[:40]} is beyond double precision")
    return value
