"""Tables of ratings: right columns give scipy's numbers, wrong ones are named, and nothing is guessed."""

import numpy as np
import pytest

from scores.ratings import correlate


def table_of(folder, text):
    (folder / "ratings.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / "ratings.csv"


def test_correlations_equal_scipy_and_the_ratio_is_taken_as_its_reciprocal(tmp_path):
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(5)
    rating, glcm, ratio = rng.integers(1, 6, 25), rng.normal(size=25), 1 + rng.random(25)
    lines = ["picture,rating,glcm,ratio", *(f"{k}.png,{r},{g!r},{q!r}" for k, (r, g, q) in
                                            enumerate(zip(rating, glcm.tolist(), ratio.tolist(), strict=True)))]
    number, rows, notes, errors = correlate(table_of(tmp_path, "\n".join(lines)))
    assert number == 25 and notes == ["note: columns without numbers: picture"] and not errors
    for row, name, values in zip(rows, ("glcm", "1/ratio"), (glcm, 1 / ratio), strict=True):
        assert row["metric"] == name
        assert row["srcc"] == pytest.approx(stats.spearmanr(values, rating).statistic, abs=1e-12)
        assert row["plcc"] == pytest.approx(stats.pearsonr(values, rating).statistic, abs=1e-12)
        assert row["srcc_low"] <= row["srcc"] <= row["srcc_high"] and row["plcc_low"] <= row["plcc"] <= row["plcc_high"]


ROWS = "rating,a,b\n1,2,3\n2,4,1\n4,4,4\n3,1,3\n"


@pytest.mark.parametrize("text", [
    ROWS.replace(",", ";"), "sep=;\r\n" + ROWS.replace(",", ";"), "\n\n" + ROWS, ROWS.replace(",", "\t"),
    ROWS.replace("\n", "\r\n"), ROWS.encode("utf-16"),
    ROWS.encode("utf-8-sig"), ROWS.replace(",", " , "), ROWS.replace("\n", "\n\n"), ROWS + ",,\n",
    '"rating","a","b"\n' + ROWS.partition("\n")[2].replace("2,4", '"2","4"'), ROWS.replace("4", "+4.0e0")],
    ids=["semicolons", "sep of Excel", "blank first lines", "tabs", "Windows", "UTF-16", "mark", "spaces",
         "blank lines", "Excel", "quotes", "exponents"])
def test_tables_as_other_programs_write_them_give_the_same_numbers(tmp_path, text):
    expected = correlate(table_of(tmp_path, ROWS))
    assert correlate(table_of(tmp_path, text)) == expected and len(expected[1]) == 2


@pytest.mark.parametrize("text, says", [
    (ROWS.replace("2,4,1", "2,nan,1"), ":3: column a holds no number ('nan'"),
    (ROWS.replace("2,4,1", "2,-inf,1"), ":3: column a holds no number ('-inf'"),
    (ROWS.replace("2,4,1", "2,,1"), ":3: column a holds no number (it is empty)"),
    (ROWS.replace("2,4,1", "2,1e999,1"), ":3: column a holds no number (1e999 is beyond double precision"),
    (ROWS.replace("2,4,1", "2,3e-330,1"), ":3: column a holds no number (3e-330 is beyond double precision"),
    ("rating;a;b\n1;999;3\n2;1.234;1\n4;12.345;4\n", ":3: column a may have dots between thousands, 1.234 beside 999"),
    ("rating\ta\tb\n1\t-999\t3\n2\t-1.234\t1\n4\t+5\t4\n", ":3: column a may have dots between thousands, -1.234"),
    (ROWS.replace("2,4,1", '2,"4,096",1'), ":3: column a holds no number ('4,096'; write one as 1234.5"),
    (ROWS.replace("2,4,1", "2,4_096,1"), ":3: column a holds no number ('4_096'"),
    (ROWS.replace("2,4,1", "2,４,1"), ":3: column a holds no number ('４'"),
    ("rating,a,b\n1,\"7,1\",3\n2,\"8,3\",1\n4,\"9,0\",4\n", ":2: column a holds no number ('7,1'"),
    ("rating,a,b\n1,nan,3\n2,nan,1\n4,nan,4\n", ":2: column a holds no number ('nan'"),
    ("rating,a,b\n1,5,3\n2,5,1\n4,5,4\n", ": a: all numbers of one list are equal"),
    ("rating,a,b,a\n1,5,3,1\n2,6,1,2\n4,2,4,2\n", ": 2 columns have the name a"),
    ("rating,ratio,b\n1,5,3\n2,0,1\n4,2,4\n", ": ratio: 0 has no reciprocal"),
    (ROWS + "5,6\n", ":6: 2 cells, expected 3 as in the first line; 1 such lines of 5 left out"),
    (ROWS + "5,6,7,\n1,2,3,4\n", ":6: 4 cells, expected 3 as in the first line; 2 such lines of 6 left out")])
def test_what_is_wrong_is_named_and_the_other_column_is_reported(tmp_path, text, says):
    file = table_of(tmp_path, text)
    _, rows, _, errors = correlate(file)
    assert [row["metric"] for row in rows] == (["a", "b"] if "cells, expected" in says else ["b"])
    assert all(np.isfinite(rows[-1][key]) for key in ("srcc", "plcc"))
    assert len(errors) == 1 and errors[0].startswith(str(file)) and says in errors[0] and "left out" in errors[0]


@pytest.mark.parametrize("text, says", [
    ("", 'among them "rating"'), ("score,a\n1,2\n", "it has the columns score, a"), ("rating,a\n", "0 lines below"),
    ("Rating,a\n1,2\n", 'among them "rating"'), ("rating,picture\n1,a\n2,b\n", "no column of numbers beside rating"),
    ("rating,a\n1,2\n2,3\nx,4\n", ":4: column rating holds no number ('x'"),
    ("rating,a\n5,2\n5,3\n", "the only rating is 5"), ("rating,a,rating\n1,2,3\n", "2 columns have the name"),
    ("rating,a\nx,1\ny,2\n", ":2: column rating holds no number ('x'"), ("rating,a\n1,2\n", "at least 2"),
    ("rating,a\n1,2,3\n4,5,6\n", ":2: 3 cells, expected 2"), ('rating,a\n1,"2\n3,4\n', ": not a CSV"),
    (b"\xff\xfe\x00", "not UTF-8 text"), (b"rating,a\n1,\xe9\n", "not UTF-8 text")])
def test_tables_without_an_answer_are_refused_in_one_line(tmp_path, text, says):
    file = table_of(tmp_path, text)
    with pytest.raises(ValueError) as error:
        correlate(file)
    assert str(error.value).startswith(str(file)) and says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("cells, separator", [("1.234 12.345 9.001", ";"), ("4 3.667 4.5", ";"), ("4 3.667 5", ",")])
def test_dots_that_are_decimal_points_or_a_factor_are_read(tmp_path, cells, separator):
    rows = "".join(f"{k}{separator}{cell}\n" for k, cell in enumerate(cells.split()))
    _, (metric,), _, errors = correlate(table_of(tmp_path, f"rating{separator}a\n{rows}"))
    assert metric["plcc"] == pytest.approx(np.corrcoef(range(3), list(map(float, cells.split())))[0, 1])
    assert not errors


def test_a_cell_of_a_hundred_thousand_digits_takes_no_time(tmp_path):
    with pytest.raises(ValueError, match="column a holds no number"):
        correlate(table_of(tmp_path, f"rating,a\n1,{'1' * 100_000}x\n2,3\n"))
