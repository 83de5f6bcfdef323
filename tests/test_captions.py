"""data.py caption against a local endpoint that answers well, slowly, wrongly or not at all, and after a kill."""

import json
import signal
import subprocess
import sys
import time

import pytest
from answering import KEY, Server
from conftest import ROOT
from PIL import Image

import data
from collecting.captions import MOST_TOKENS, PROMPT, caption_of
from reading import endpoint

NAMES = [f"{k}.png" for k in range(6)]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(endpoint, "PAUSE_S", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def server():
    server = Server(lambda body: f'"A wall of   colour\n{len(server.bodies)}."')
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path):
    for k, name in enumerate(NAMES):
        Image.new("RGB", (120 + k, 80), (40 * k, 0, 0)).save(tmp_path / name)
    return tmp_path


def caption(capsys, url: str, folder, *flags) -> tuple[object, str]:
    """The exit code of data.py caption in this process, and all that it prints and returns."""
    arguments = ["caption", folder, "--endpoint", url, "--per-minute", "60000", *flags]
    try:
        data.main(list(map(str, arguments)))
        code = 0
    except SystemExit as end:
        code = end.code
    shown = "".join(capsys.readouterr())
    assert KEY not in shown + str(code) and "Traceback" not in shown
    return code, shown


def answers(folder) -> dict[str, str]:
    lines = (folder / "captions.jsonl").read_text().splitlines()
    assert KEY not in "".join(lines) and len({json.loads(line)["file_name"] for line in lines}) == len(lines)
    return {row["file_name"]: row["text"] for row in map(json.loads, lines)}


def test_captions_become_a_listing_and_nothing_is_asked_twice(folder, server, capsys):
    code, shown = caption(capsys, server.url, folder, "--side", "64")
    assert code == 0 and "6 pictures, 0 answered in" in shown and "6 requests, about" in shown
    assert sorted(answers(folder)) == NAMES and answers(folder)["0.png"].startswith("A wall of colour ")
    for body in server.bodies:
        text, picture = body["messages"][-1]["content"]
        assert text["text"] == PROMPT and body["max_tokens"] == MOST_TOKENS
        assert picture["image_url"]["url"].startswith("data:image/jpeg;base64,")
    code, shown = caption(capsys, server.url, folder)
    assert code == 0 and "6 answered" in shown and len(server.bodies) == 6
    (folder / "captions.jsonl").rename(folder / "metadata.jsonl")
    assert len(data.read_folder(folder)) == 6
    assert "0 pictures, 0 answered" in caption(capsys, server.url, folder)[1]
    assert "6 pictures, 0 answered" in caption(capsys, server.url, folder, "--all", "--dry-run")[1]
    assert len(server.bodies) == 6 and not (folder / "captions.jsonl").exists()


def test_only_pictures_without_a_caption_are_asked_about(folder, server, capsys):
    (folder / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "red"}\n{"file_name": "2.png", "text": ""}')
    before = (folder / "metadata.jsonl").read_bytes()
    assert caption(capsys, server.url, folder)[0] == 0
    assert sorted(answers(folder)) == [name for name in NAMES if name != "1.png"]
    assert (folder / "metadata.jsonl").read_bytes() == before


def test_count_and_cost_come_before_anything_is_asked(folder, server, capsys):
    code, shown = caption(capsys, server.url, folder, "--dry-run", "--price", "1e6", "0")
    tokens = 6 * (85 + 170 - -len(PROMPT) // 4)
    assert code == 0 and f"6 requests, about {tokens:,} tokens" in shown and f"${tokens:,}.00 at most" in shown
    assert not server.bodies and not (folder / "captions.jsonl").exists()


def test_trouble_that_passes_costs_no_caption(folder, server, capsys):
    server.plan[:] = [(429, {"Retry-After": "0"}, b"{}"), 500, (200, {}, b'{"choices": ['), None,
                      "This image shows red", "I'm sorry, no", 0.3]
    code, shown = caption(capsys, server.url, folder, "--timeout", "5")
    assert code == 0 and sorted(answers(folder)) == NAMES and len(server.bodies) == 6 + 6
    assert not any("image" in text or "sorry" in text for text in answers(folder).values())


def test_an_endpoint_that_is_slow_or_absent_ends_in_one_line(folder, server, capsys):
    server.usual = lambda body: time.sleep(0.6) or "late"
    code, _ = caption(capsys, server.url, folder, "--timeout", "0.1", "--at-once", "1")
    assert code.startswith("error: ") and "no byte in 0.1 s" in code and "\n" not in code
    server.server_close()
    code, _ = caption(capsys, server.url, folder)
    assert code.startswith("error: ") and not answers(folder)


def test_a_wrong_answer_and_a_broken_picture_leave_the_others(folder, server, capsys):
    (folder / "3.png").write_text("no picture")
    (folder / "4.png").write_bytes((folder / "4.png").read_bytes()[:90])  # its header is fine
    server.plan[:] = ["In this image, red"] * 3
    code, shown = caption(capsys, server.url, folder, "--at-once", "1")
    assert code == 1 and sorted(answers(folder)) == ["1.png", "2.png", "5.png"]
    assert "error: 0.png: 3 answers off the format: it begins with 'In this image" in shown
    assert f"error: {folder}/3.png: not a complete picture" in shown and f"error: {folder}/4.png: not a c" in shown


def test_a_kill_loses_nothing_and_nothing_is_asked_twice(folder, server, capsys):
    usual = server.usual
    server.usual = lambda body: time.sleep(0.1) or usual(body)
    command = [sys.executable, ROOT / "data.py", "caption", folder, "--endpoint", server.url, "--at-once", "1",
               "--per-minute", "60000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while len(server.bodies) < 3:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert KEY not in process.communicate(timeout=30)[0]
    kept, before = answers(folder), len(server.bodies)
    assert before - 1 <= len(kept) <= before < len(NAMES)  # one was on its way
    with open(folder / "captions.jsonl", "a") as file:
        file.write('{"file_name": "5.png", "te')  # as a crash of the machine leaves it
    assert caption(capsys, server.url, folder)[0] == 0
    assert sorted(answers(folder)) == NAMES and kept.items() <= answers(folder).items()
    assert len(server.bodies) == before + len(NAMES) - len(kept)


@pytest.mark.parametrize("flags, says", [
    (["--side", "9"], "--side 9: give 64"), (["--at-once", "0"], "--at-once 0: give 1 to 256"),
    (["--timeout", "inf"], "--timeout inf: give seconds"), (["--price", "nan", "1"], "--price nan 1: give numbers"),
    (["--per-minute", "0"], "--per-minute 0"), (["--endpoint", "ftp://x"], "--endpoint ftp://x: no address"),
    (["--endpoint", "http://example.org/v1"], "would send the key in OPENAI_API_KEY in clear"),
    (["--out", "https://example.org/a.jsonl"], "--out https")])
def test_wrong_flags_are_refused_before_anything_is_asked(folder, server, capsys, flags, says):
    code, _ = caption(capsys, server.url, folder, *flags)
    assert says in code and not server.bodies and not (folder / "captions.jsonl").exists()


@pytest.mark.parametrize("answer", ["This image shows a cat", "in the scene, a cat", "I'm sorry, but no",
                                    "The photograph depicts it", '""', "\u200b", "**Caption:** a cat",
                                    "Here's a description of the scene: a cat", "An image of a cat",
                                    "I'm not able to identify people", "I apologize, but I cannot see it",
                                    "As an AI language model, I see no images", "Unable to process the image",
                                    "I won't describe that", "Unfortunately, it is blank", "No image was provided",
                                    "Unfortunately the image is blank", "Sure! A cat", "In this photograph a cat sits",
                                    "Sorry, no", "The photo captures a cat"])
def test_answers_off_the_format_are_refused(answer):
    with pytest.raises(ValueError):
        caption_of(answer)


def test_a_caption_is_one_line_without_quotation_marks():
    assert caption_of(' “A cat sits\non  a sofa.” ') == {"text": "A cat sits on a sofa."}
    for text in ("The scenery is red", "Icicles hang from a roof", "No people walk on an empty street",
                 "The photographer captures a gull in flight.", "Sure-footed goats cross a rocky ridge.",
                 "In the picture-perfect valley, sheep graze.", "Unable to fly, a penguin stands on ice.",
                 "No picture hangs on the white wall.", "Unfortunately placed pots lie broken on the steps."):
        assert caption_of(text) == {"text": text}


@pytest.mark.parametrize("answer, text", [
    ('"A red door."', "A red door."), ("“A red door.”", "A red door."), ('A sign that says "OPEN"',) * 2,
    ('"STOP" sign at a crossroads.',) * 2, ('"Exit" and "Entry"',) * 2])
def test_quotation_marks_go_only_where_they_hold_all_of_a_caption(answer, text):
    assert caption_of(answer) == {"text": text}


def test_captions_of_another_model_texts_beside_pictures_and_listings_are_named(folder, server, capsys):
    (folder / "0.txt").write_text("a red wall")
    code, shown = caption(capsys, server.url, folder, "--model", "a")
    assert code == 0 and "note: 1 of these pictures have a .txt beside them, which is not read" in shown
    asked = len(server.bodies)
    code, shown = caption(capsys, server.url, folder, "--model", "b")
    assert code == 0 and "6 of the answers are another model's" in shown and len(server.bodies) == asked
    code, _ = caption(capsys, server.url, folder, "--out", folder / "metadata.jsonl")
    assert "metadata.jsonl: give a new file" in code and not (folder / "metadata.jsonl").exists()


@pytest.mark.parametrize("text", ['"caption": "a red wall"', '"text": " "', '"text": null'])
def test_a_file_of_answers_without_text_is_refused_before_anything_is_asked(folder, server, capsys, text):
    (folder / "captions.jsonl").write_text(f'{{"file_name": "1.png", {text}}}\n')
    code, _ = caption(capsys, server.url, folder)
    assert f"{folder}/captions.jsonl: remove the line of 1.png, or give another --out: " in code and not server.bodies
