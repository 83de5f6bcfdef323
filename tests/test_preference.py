"""Preference in both orders: the paper's prompts, strict parsing, verdicts, and the command against a local server."""

import base64
import io
import itertools
import json
import re
import sys

import numpy as np
import pytest
from answering import KEY, Server
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import metrics
from reading import endpoint as module
from scores.preference import ASKED, MOST_TOKENS, SYSTEM, parse, text_of, win_rates

NAMES = list(ASKED)


def answer(*choices, form="{k}. {name}: the {choice} image is better. The reason is so."):
    return "\n".join(form.format(k=k, name=name, choice=choice)
                     for k, (name, choice) in enumerate(zip(NAMES, choices, strict=True), 1))


@pytest.mark.parametrize("form", [
    "{k}. {name}: the {choice} image is better. The reason is so.",
    "**{k}. {name}:** (The {choice} image is better). The reason is (its edges).",
    "### {k}. {name}\n\n the {choice} image is better"])
def test_answers_in_the_format_are_read(form):
    choices = "first", "second", "first"
    text = "Sure!\n" + answer(*choices, form=form)
    assert parse(text) == {"answer": text} | dict(zip(NAMES, choices, strict=True))


@pytest.mark.parametrize("text", [
    "", "Both are nice.", answer("first", "first", "third"), answer("first", "first", "neither"),
    "\n".join(answer("first", "first", "first").splitlines()[:2]),                        # a line is missing
    "\n".join(answer("first", "second", "first").splitlines()[::-1]),                     # out of order
    answer("first", "first", "first") + "\n3. Fine Details: the second image is better",  # twice
    text_of("a cat"),                                                                     # the format itself
    answer("first", "first", "first", form="{k}. {name}: the {choice} image is better, or the second image is better")])
def test_answers_off_the_format_are_refused(text):
    with pytest.raises(ValueError, match="not the three lines"):
        parse(text)


def test_prompts_are_those_of_table_11():
    text = text_of("a red fox")
    assert SYSTEM.startswith("As an AI visual assistant, you are analyzing two specific images.")
    assert text.startswith("The caption for the two images is: a red fox. Please answer the following questions:\n1. ")
    assert len(re.findall(r"^[123]\. .*\?", text, re.M)) == 3 and "Ignore other aspects." in text
    assert len(re.findall(r"^[123]\. .*: \(the first image is better\) or \(the second", text, re.M)) == 3


def test_a_side_wins_only_in_both_orders():
    def record(*choices):
        return parse(answer(*choices)) | {"tokens": [1, 1]}
    records = {"x AB 1": record("first", "first", "second"), "x BA 1": record("second", "first", "first"),
               "y AB 2": record("second", "first", "second"), "y BA 2": record("first", "first", "second"),
               "z AB 3": record("first", "first", "first")}
    rows, complete = win_rates(records)
    assert complete == 2
    assert [(row["a_wins"], row["b_wins"], row["undecided"]) for row in rows] == [(1, 1, 0), (0, 0, 2), (0, 1, 1)]
    assert [row["rate"] for row in rows] == [0.5, None, 1.0] and [row["first_chosen"] for row in rows] == [0.5, 1, 0.25]
    assert win_rates({})[1] == 0


@pytest.fixture
def sets(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        for k in range(3):
            level = 60 + 50 * k + (20 if folder == "b" else 0)
            Image.new("RGB", (400, 300), (level, level, level)).save(tmp_path / folder / f"{k} x.png")
    rows = [{"file_name": f"{k} x.png", "text": f"gray number {k}"} for k in range(3)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(module, "PAUSE_S", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "*")
    server = Server(prefers_brighter)
    yield server
    server.shutdown()
    server.server_close()


def prefers_brighter(body):
    """The brighter picture, but the first one for prompt adherence."""
    packed = [part["image_url"]["url"].partition(",")[2] for part in body["messages"][1]["content"][1:]]
    levels = [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).mean() for data in packed]
    brighter = ("first", "second")[int(np.argmax(levels))]
    return answer(brighter, "first", brighter)


@pytest.fixture
def prefer(monkeypatch, capfd, sets, server):
    def run(*flags):
        monkeypatch.setattr(sys, "argv", [
            "metrics.py", "prefer", *(str(sets / name) for name in "ab"), "--endpoint", server.url, "--out",
            str(sets / "answers.jsonl"), "--per-minute", "60000", *map(str, flags)])
        try:
            metrics.main()
            code = 0
        except SystemExit as ended:
            code = ended.code
        out, err = capfd.readouterr()
        assert KEY not in out + err + str(code)
        return code, out, err
    return run


def test_prefer_asks_both_orders_counts_and_resumes(prefer, server, sets):
    listing = ("--prompts", sets / "metadata.jsonl")
    code, out, err = prefer(*listing, "--dry-run", "--price", 2.5, 10, "--side", 200)
    assert code is None or code == 0
    assert out.startswith("6 requests, about ") and "$" in out and not server.bodies
    code, out, err = prefer(*listing, "--json", "--side", 200)
    report = json.loads(out)
    assert not code and len(server.bodies) == 6 and "6 requests" in err
    assert [row["rate"] for row in report["questions"]] == [1.0, None, 1.0]
    assert [row["undecided"] for row in report["questions"]] == [0, 3, 0]
    assert report["questions"][1]["first_chosen"] == 1
    body = server.bodies[0]
    assert body["messages"][0] == {"role": "system", "content": SYSTEM} and body["max_tokens"] == MOST_TOKENS
    assert body["messages"][1]["content"][0]["text"].startswith("The caption for the two images is: gray number")
    assert not prefer(*listing, "--side", 200)[0] and len(server.bodies) == 6      # nothing is asked twice
    lines = (sets / "answers.jsonl").read_text().splitlines()
    (sets / "answers.jsonl").write_text("\n".join(lines[:4]) + "\n" + lines[4][:50])
    again = json.loads(prefer(*listing, "--json", "--side", 200)[1])
    assert again["questions"] == report["questions"] and len(server.bodies) == 8   # half a line, and the one after it
    Image.new("RGB", (400, 300), "black").save(sets / "b" / "2 x.png")
    other = json.loads(prefer(*listing, "--json", "--side", 200)[1])["questions"]
    assert len(server.bodies) == 10 and (other[0]["a_wins"], other[0]["b_wins"]) == (1, 2)  # a new picture


def test_prefer_survives_a_bad_server_and_names_what_has_no_answer(prefer, server, sets):
    listing = ("--prompts", sets / "metadata.jsonl", "--at-once", 1, "--json")
    server.plan[:] = [500, (429, {"Retry-After": "0"}, b""), (200, {}, b"{"), None, "I can't say."]
    code, out, err = prefer(*listing)
    assert not code and len(server.bodies) == 5 + 6
    (sets / "answers.jsonl").unlink()
    server.plan[:] = ["no", "no", "no"]
    code, out, err = prefer(*listing)
    assert code == 1 and "2 of 3 pairs are answered in both orders" in "".join(json.loads(out)["notes"])
    assert len(json.loads(out)["errors"]) == 1 and "3 answers off the format" in err
    code, out, err = prefer(*listing)
    assert not code and json.loads(out)["questions"][0]["b_wins"] == 3
    server.plan[:] = [401]
    (sets / "answers.jsonl").unlink()
    code, out, err = prefer(*listing)
    assert "401, the key is refused" in str(code) and "\n" not in str(code)


def test_prefer_names_a_broken_picture_and_asks_about_the_others(prefer, server, sets):
    (sets / "a" / "1 x.png").write_bytes(b"half a picture")
    for flags, asked in ((("--dry-run",), 0), ((), 4)):
        code, out, err = prefer("--prompts", sets / "metadata.jsonl", *flags)
        assert code == 1 and "2 pairs" in out and f"error: {sets}/a/1 x.png: not a" in err
        assert len(server.bodies) == asked


@pytest.mark.parametrize("flags, says", [
    (("--side", 8), "--side 8: give 64"), (("--at-once", 0), "--at-once 0: give 1"),
    (("--per-minute", 0), "--per-minute 0.0: give"), ((), "records no prompt; give --prompts")])
def test_prefer_refuses_bad_flags_in_a_line_before_asking(prefer, server, sets, flags, says):
    code, out, err = prefer(*(("--prompts", sets / "metadata.jsonl") if flags else ()), *flags)
    assert says in str(code) and "\n" not in str(code) and not server.bodies


def test_prompts_are_taken_from_pictures_of_this_program_alone(prefer, server, sets):
    for software, says in (("ComfyUI", "0 x.png: records no prompt; give --prompts"), ("diffusion-4k", "")):
        for k, folder in itertools.product(range(3), "ab"):
            about = PngInfo()
            about.add_itxt("prompt", f"gray {k}")
            about.add_itxt("software", software)
            Image.new("RGB", (64, 64), (80 * k,) * 3).save(sets / folder / f"{k} x.png", pnginfo=about)
        code, *_ = prefer()
        assert says in str(code) and bool(server.bodies) == (not says)
    about = PngInfo()
    about.add_itxt("prompt", "a hill")
    about.add_itxt("software", "diffusion-4k")
    Image.new("RGB", (64, 64)).save(sets / "b" / "1 x.png", pnginfo=about)
    assert "1 x.png: the same name, but not of one prompt: 'gray 1', 'a hill'" in str(prefer()[0])
