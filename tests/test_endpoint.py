"""An endpoint that answers well, slowly, wrongly or not at all; records survive a kill; a key stays secret."""

import base64
import email.utils
import io
import json
import signal
import socket
import subprocess
import sys
import time

import pytest
from answering import KEY, Server, completion
from conftest import ROOT
from PIL import Image

from reading import endpoint as module
from reading.endpoint import ask, ask_all, data_url, estimate, open_endpoint, question, read_records, tokens_of


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "PAUSE_S", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def server():
    server = Server(lambda body: f"seen: {body['messages'][-1]['content'][0]['text']}")
    yield server
    server.shutdown()
    server.server_close()


def connect(server, **settings):
    return open_endpoint(server.url, "gpt-4o", **{"per_minute": 60_000, **settings})


def test_a_question_arrives_as_the_protocol_has_it(server):
    picture = data_url(Image.new("RGB", (300, 200), "red"), 100)
    answer = ask(connect(server), question("What is this?", [picture], "You look at pictures."), 50)
    assert answer == ("seen: What is this?", 11, 7)
    (body,), (headers,) = server.bodies, server.headers
    assert headers["Authorization"] == f"Bearer {KEY}" and headers["Content-Type"] == "application/json"
    assert body["model"] == "gpt-4o" and body["max_tokens"] == 50
    system, user = body["messages"]
    assert system == {"role": "system", "content": "You look at pictures."} and user["role"] == "user"
    assert [part["type"] for part in user["content"]] == ["text", "image_url"]
    head, _, packed = user["content"][1]["image_url"]["url"].partition(",")
    assert head == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(packed))).size == (100, 67)


@pytest.mark.parametrize("failures", [[500, 503], [429], [408], [None], [(200, {}, b'{"choices": [')],
                                      [(200, {}, b"[]")], [(200, {}, b"\xff\xfe")],
                                      [(200, {}, b'{"choices": [{"message": null}]}')]])
def test_what_may_pass_is_asked_again(server, failures, capsys):
    server.plan[:] = failures
    assert ask(connect(server), question("a")).text == "seen: a"
    assert len(server.bodies) == len(failures) + 1
    shown = capsys.readouterr().err
    assert shown.count("note: ") == len(failures) and KEY not in shown


@pytest.mark.parametrize("message, usage", [
    ({"content": [{"type": "text", "text": "seen: a"}]}, {}),
    ({"content": "<think>it may be b\n</think>seen: a"}, None), ({"content": "or c</think>seen: a"}, [1]),
    ({"content": "seen: a"}, {"prompt_tokens": None, "completion_tokens": 7.0})])
def test_answers_in_parts_after_thinking_or_without_counts_are_read(server, message, usage):
    server.plan[:] = [(200, {}, json.dumps({"choices": [{"message": message}], "usage": usage}).encode())]
    answer = ask(connect(server), question("a"))
    assert answer.text == "seen: a" and answer.tokens_in == 0 and len(server.bodies) == 1


def test_waits_double_and_are_never_shorter_than_retry_after(server, monkeypatch):
    monkeypatch.setattr(module, "PAUSE_S", 0.1)
    later = email.utils.format_datetime(email.utils.localtime(), usegmt=False)  # a date that has passed
    server.plan[:] = [500, (429, {"Retry-After": "1"}, b""), (429, {"Retry-After": later}, b"")]
    ask(connect(server), question("a"))
    waits = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    assert all(wait >= least for wait, least in zip(waits, (0.1, 1.0, 0.4), strict=True)) and sum(waits) < 3


def test_a_long_retry_after_ends_with_a_line(server):
    server.plan[:] = [(429, {"Retry-After": "3600"}, b"")]
    with pytest.raises(OSError, match="429 .*asks to wait 3600 s; start the command again then"):
        ask(connect(server), question("a"))
    assert len(server.bodies) == 1


def test_a_slow_endpoint_is_asked_again_and_then_given_up(server):
    server.plan[:] = [0.3]
    assert ask(connect(server, timeout_s=0.1), question("a")).text == "seen: a" and len(server.bodies) == 2
    server.plan[:] = [0.3] * 10
    with pytest.raises(OSError, match=r"no answer \(no byte in 0.1 s\), 6 times"):
        ask(connect(server, timeout_s=0.1), question("a"))


def test_a_refused_connection_ends_with_a_line():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1?api-key={KEY}"
        with pytest.raises(OSError, match="v1/chat/completions: no answer .*refused.*, 6 times") as caught:
            ask(open_endpoint(url, "gpt-4o", per_minute=60_000), question("a"))
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("reply, kind, says", [
    (401, OSError, "401, the key is refused"), (403, OSError, "403"), (404, OSError, "no model gpt-4o"),
    ((302, {"Location": "http://127.0.0.1:9/"}, b""), OSError, "302, the address redirects"),
    (400, ValueError, "answers 400"), ((200, {}, completion("half an", "length")), ValueError, "cut off"),
    ((200, {}, completion("")), ValueError, "empty")])
def test_other_refusals_are_not_asked_again(server, reply, kind, says):
    server.plan[:] = [reply]
    with pytest.raises(kind, match=says) as caught:
        ask(connect(server), question("a"))
    assert len(server.bodies) == 1 and KEY not in str(caught.value)


def test_requests_keep_to_the_rate(server, tmp_path):
    endpoint = connect(server, per_minute=600)
    ask_all(endpoint, questions("abcde"), tmp_path / "answers.jsonl", dict_of, [], at_once=4)
    assert min(b - a for a, b in zip(server.times, server.times[1:], strict=False)) > 0.08


@pytest.mark.parametrize("url, key, says", [
    ("api.openai.com/v1", KEY, "no address"), ("ftp://host/v1", KEY, "no address"), ("http://", KEY, "no address"),
    ("http://[::1/v1", KEY, "--endpoint .*no address"), ("http://host:a/v1?key=" + KEY, KEY, "no address"),
    ("https://me:word@host/v1", KEY, "a password in it"), ("http://host/v1", KEY, "would send the key .* in clear"),
    ("https://host/v1", "sk-\n1", "no key has"), ("https://host/v1", "ключ", "no key has")])
def test_addresses_and_keys_are_checked_before_anything_is_sent(monkeypatch, url, key, says):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match=says) as caught:
        open_endpoint(url, "gpt-4o")
    assert key.strip() not in str(caught.value) and "word" not in str(caught.value).replace("password", "")


def test_addresses_are_completed(monkeypatch):
    for given in ("https://host/v1", "https://host/v1/", "https://host/v1/chat/completions"):
        assert open_endpoint(given, "m").url == "https://host/v1/chat/completions"
    assert open_endpoint("https://host/v1?version=2", "m").url == "https://host/v1/chat/completions?version=2"
    assert KEY not in repr(open_endpoint("https://host/v1", "m"))
    monkeypatch.delenv("OPENAI_API_KEY")
    assert open_endpoint("http://host/v1", "m").key == ""


def questions(names):
    return {name: (lambda name=name: question(name)) for name in names}


def dict_of(text):
    if not text.startswith("seen: "):
        raise ValueError(f"not as asked: {text}")
    return {"text": text}


def test_answers_are_recorded_once_and_what_failed_is_asked_the_next_time(server, tmp_path):
    file, errors = tmp_path / "answers.jsonl", []

    def unreadable():
        raise ValueError("c.png: not a picture")
    broken = questions("abcd") | {"c": unreadable}
    usual = server.usual
    server.usual = lambda body: "I would rather not" if "d" in str(body["messages"]) else usual(body)
    records = ask_all(connect(server), broken, file, dict_of, errors)
    assert list(records) == ["a", "b"] and records["a"] == {"id": "a", "text": "seen: a", "model": "gpt-4o",
                                                            "tokens": [11, 7]}
    assert sorted(errors) == ["c.png: not a picture", "d: 3 answers off the format: not as asked: I would rather not"]
    server.usual, before = usual, len(server.bodies)
    assert list(ask_all(connect(server), questions("abcd"), file, dict_of, [])) == list("abcd")
    assert len(server.bodies) == before + 2 and sorted(read_records(file)) == list("abcd")


def test_an_endpoint_that_answers_nothing_right_is_left_early(server, tmp_path):
    server.usual = lambda body: 400
    with pytest.raises(OSError, match="8 questions in a row have no answer"):
        ask_all(connect(server), questions("abcdefghijklmnopqrst"), tmp_path / "answers.jsonl", dict_of, [], at_once=1)
    assert len(server.bodies) <= 10


def test_an_endpoint_that_has_answered_is_asked_on_past_what_it_refuses(server, tmp_path):
    usual, refused = server.usual, "abcdefgh"
    server.usual = lambda body: 400 if body["messages"][-1]["content"][0]["text"] in refused else usual(body)
    (tmp_path / "answers.jsonl").write_text('{"id": "z", "text": "seen: z", "model": "gpt-4o"}\n')
    records = ask_all(connect(server), questions("abcdefghijklz"), tmp_path / "answers.jsonl", dict_of, [], at_once=1)
    assert sorted(records) == list("ijklz")


@pytest.mark.parametrize("key", ["none", "x", "1234"])
def test_a_key_that_is_a_word_stays_in_answers(server, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    assert ask(connect(server), question("a fox, none other, 1234"), 50).text == "seen: a fox, none other, 1234"


def test_half_a_line_is_removed_and_a_whole_one_without_its_end_is_kept(server, tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_bytes('{"id": "a", "text": "é"}\n{"id": "b", "te'.encode())
    assert ask_all(connect(server), questions("ab"), file, dict_of, [])["a"]["text"] == "é"
    assert [json.loads(line)["id"] for line in file.read_text().splitlines()] == ["a", "b"] and len(server.bodies) == 1
    file.write_bytes(b'{"id": "a", "text": "x"}')
    ask_all(connect(server), questions("ab"), file, dict_of, [])
    assert [json.loads(line)["id"] for line in file.read_text().splitlines()] == ["a", "b"] and len(server.bodies) == 2


@pytest.mark.parametrize("content", [b"a picture\nor so\n", b'{"file_name": "a"}\n', b'{"id": "a"\n{"id": "b"}\n'])
def test_a_file_of_anything_else_is_left_as_it_is(server, tmp_path, content):
    file = tmp_path / "notes.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="notes.txt:1: .*name another"):
        ask_all(connect(server), questions("ab"), file, dict_of, [])
    assert file.read_bytes() == content and not server.bodies
    with pytest.raises(ValueError, match="a folder, not a file"):
        read_records(tmp_path)


def test_odd_letters_are_recorded_and_read_again(server, tmp_path):
    server.plan[:] = [(200, {}, completion("seen: \ud800 \u2028 é\n")), "seen: b"]
    file = tmp_path / "answers.jsonl"
    first = ask_all(connect(server), questions("ab"), file, dict_of, [], at_once=1)
    assert read_records(file) == first and "é" in file.read_text() and first["a"]["text"] == "seen: \ud800 \u2028 é\n"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_command_asks_nothing_answered_again_and_loses_nothing(server, tmp_path, how):
    file, names = tmp_path / "answers.jsonl", "abcdefghijklmnop"
    code = f"""
from files import run_command
from reading.endpoint import *
asked = {{name: (lambda name=name: question(name)) for name in {names!r}}}
endpoint = open_endpoint({server.url!r}, "gpt-4o", per_minute=60_000)
from pathlib import Path
run_command(lambda: ask_all(endpoint, asked, Path({str(file)!r}), lambda text: {{"text": text}}, [], at_once=2))"""
    usual = server.usual
    server.usual = lambda body: time.sleep(0.05) or usual(body)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while len(server.bodies) < 5:
        time.sleep(0.005)
    with pytest.raises(OSError, match="another process is writing to it"):
        ask_all(connect(server), questions(names), file, dict_of, [])
    process.send_signal(how)
    _, shown = process.communicate(timeout=30)
    assert KEY not in shown and KEY not in file.read_text()
    time.sleep(0.2)  # until the server has seen what was on its way
    kept, before = set(read_records(file)), len(server.bodies)
    if how == signal.SIGINT:
        assert process.returncode == 130 and shown.rstrip().endswith("interrupted") and len(kept) == before
    assert before - 2 <= len(kept) <= before < len(names)  # two were on their way
    assert set(ask_all(connect(server), questions(names), file, dict_of, [])) == set(names)
    asked_again = {body["messages"][0]["content"][0]["text"] for body in server.bodies[before:]}
    assert asked_again == set(names) - kept and len(server.bodies) == before + len(names) - len(kept)


def test_tokens_are_counted_by_gpt_4os_rule():
    assert tokens_of("", [(512, 512)], 4096) == 85 + 170            # the three examples of its documentation
    assert tokens_of("", [(1024, 1024)], 4096) == 765
    assert tokens_of("", [(2048, 4096)], 8192) == 1105
    assert tokens_of("abcde", [], 512) == 2
    assert estimate(2, 3_000_000, 1_000_000, (2.5, 10)).endswith("at most 1,000,000 of output: about $17.50 at most")


@pytest.mark.parametrize("last, kept", [('{"id": "b", "te', False), ('{"i', False), ("a red fox in the snow", True)])
def test_half_a_line_of_ours_is_cut_off_and_a_foreign_file_is_left_alone(server, tmp_path, last, kept):
    file, whole = tmp_path / "answers.jsonl", "" if kept else '{"id": "a", "text": "x"}\n'
    file.write_text(whole + last)
    if kept:
        with pytest.raises(ValueError, match="answers.jsonl:1: not JSON in UTF-8; restore the file"):
            ask_all(connect(server), {}, file, lambda text: {"text": text}, [])
    else:
        ask_all(connect(server), {}, file, lambda text: {"text": text}, [])
    assert file.read_text() == whole + last * kept
