"""Questions about pictures for an OpenAI-compatible endpoint: one with retries, or many into a file of answers.

Protocol  POST {url}/chat/completions, as api.openai.com, vLLM, llama.cpp and Ollama serve it; pictures as data URLs
Again     after refused connections, timeouts, 408, 429, 5xx, and bodies that are no such answer: in 1 s, 2 s, 4 s …,
          and never before Retry-After. One clock for all threads: if one has to wait, all wait
Errors    OSError: the endpoint is of no use, the command ends. ValueError: this question has no answer, the next may
Key       from an environment variable: in no message, no record and no repr, and sent to no redirected address
Records   lines of JSON, one per answered question, on the disk before another question of that thread
Check     python -m pytest tests/test_endpoint.py
"""

import base64
import email.utils
import http.client
import io
import json
import math
import os
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import urlsplit, urlunsplit

from PIL.Image import Image, Resampling
from tqdm import tqdm

from files import naming, need, parse_json, printable, regular

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ATTEMPTS, PAUSE_S, MOST_PAUSE_S = 6, 1.0, 600.0
MOST_BYTES = 16 << 20    # of one answer
ASK_AGAIN = 3            # times that a question is asked whose answers are off the format
IN_A_ROW = 8             # questions without an answer, after which an endpoint that gave none is taken to be of no use
SECRET = 12              # letters of a key that answers must not repeat; shorter ones, "none", are no keys but words


# ---- the endpoint

@dataclass
class Endpoint:
    """Where questions go; `open_endpoint` checks it. Threads share its clock."""

    url: str
    model: str
    key: str = field(default="", repr=False)
    per_minute: float = 60.0
    timeout_s: float = 120.0
    clock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    next_start: float = field(default=0.0, repr=False)      # of a request, by time.monotonic()
    ended: threading.Event = field(default_factory=threading.Event, repr=False)


class Answer(NamedTuple):
    """A text, and its numbers of tokens as the endpoint counts them; 0 where it doesn't."""

    text: str
    tokens_in: int
    tokens_out: int


class _Again(Exception):
    """Why a request failed that may succeed later, and after how many seconds."""


def add_flags(add: Callable) -> None:
    """Flags of a command that asks an endpoint; add: the add_argument of its parser."""
    add("--endpoint", required=True, metavar="URL", help="OpenAI-compatible, such as https://api.openai.com/v1")
    add("--model", default="gpt-4o", metavar="NAME", help="as the endpoint calls it (default: %(default)s)")
    add("--key-variable", default="OPENAI_API_KEY", metavar="NAME",
        help="environment variable that holds the key; if it is not set, none is sent (default: %(default)s)")
    add("--side", type=int, default=2048, metavar="PX", help="long side of what is uploaded (default: %(default)s)")
    add("--per-minute", type=float, default=60.0, metavar="N", help="requests, at most (default: %(default)g)")
    add("--at-once", type=int, default=4, metavar="N", help="requests under way (default: %(default)s)")
    add("--timeout", type=float, default=120.0, metavar="S",
        help="seconds without a byte after which a request has failed (default: %(default)g)")
    add("--price", nargs=2, type=float, metavar=("IN", "OUT"),
        help="dollars per million tokens of input and output, to print the cost before anything is asked")
    add("--dry-run", action="store_true", help="print how many requests, tokens and dollars, and ask nothing")


def open_endpoint(url: str, model: str, key_variable: str = "OPENAI_API_KEY", per_minute: float = 60.0,
                  timeout_s: float = 120.0) -> Endpoint:
    """The endpoint of `add_flags`; no request is sent.

    raises  ValueError that names the flag or the variable
    """
    need(0.01 <= per_minute, "per-minute", per_minute, "0.01 or more")
    need(0 < timeout_s <= 86_400, "timeout", timeout_s, "seconds above 0, at most 86,400")
    accepted = "give one such as https://api.openai.com/v1 or http://localhost:8000/v1"
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and url.isascii()
    except ValueError:  # of brackets and of the port
        fits = False
    if not fits or " " in url:
        raise ValueError(f"--endpoint {printable(_shown(url))}: no address; {accepted}")
    if "@" in parts.netloc:
        raise ValueError(f"--endpoint: has a password in it; {accepted}, and the key in {key_variable}")
    key = os.environ.get(key_variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"{key_variable}: holds a letter that no key has; set it to the key alone")
    if key and parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        raise ValueError(f"--endpoint {_shown(url)}: http would send the key in {key_variable} in clear; "
                         "give an https address, or unset the variable")
    path = parts.path.rstrip("/")
    path += "" if path.endswith("/chat/completions") else "/chat/completions"
    return Endpoint(urlunsplit(parts._replace(path=path, fragment="")), model, key, per_minute, timeout_s)


def _shown(url: str) -> str:
    """An address without its query, in which some services expect a key."""
    return url.partition("?")[0].partition("#")[0]


# ---- questions

def data_url(picture: Image, side: int) -> str:
    """A picture as JPEG at quality 90, its long side at most `side` px."""
    picture, packed = picture.copy(), io.BytesIO()
    picture.thumbnail((side, side), Resampling.LANCZOS)
    picture.save(packed, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(packed.getvalue()).decode()}"


def question(text: str, pictures: Sequence[str] = (), system: str = "") -> list[dict]:
    """Messages that ask `text` about pictures, data URLs, in their order."""
    content = [{"type": "text", "text": text}]
    content += [{"type": "image_url", "image_url": {"url": picture}} for picture in pictures]
    return ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": content}]


def tokens_of(text: str, sizes: Sequence[tuple[int, int]], side: int) -> int:
    """About how many tokens GPT-4o counts: 4 letters each; a picture 85, and 170 per 512 px tile at 768 px or less."""
    tokens = -(-len(text) // 4)
    for size in sizes:
        shrink = min(1.0, side / max(size), 2048 / max(size), 768 / min(size))
        width, height = (-(-max(1, round(length * shrink)) // 512) for length in size)
        tokens += 85 + 170 * width * height
    return tokens


def estimate(requests: int, tokens_in: int, tokens_out: int, price: Sequence[float] | None = None) -> str:
    """One line to print before anything is asked.

    price  US dollars per million tokens of input and of output
    """
    line = f"{requests:,} requests, about {tokens_in:,} tokens of input and at most {tokens_out:,} of output"
    if price:
        need(all(0 <= dollars < math.inf for dollars in price), "price", f"{price[0]:g} {price[1]:g}", "numbers from 0")
        line += f": about ${(tokens_in * price[0] + tokens_out * price[1]) / 1e6:,.2f} at most"
    return line


# ---- one question

def ask(endpoint: Endpoint, messages: Sequence[dict], most_tokens: int = 300) -> Answer:
    """The answer to messages of `question`.

    most_tokens  of the answer
    raises       OSError if the endpoint is of no use; ValueError if it answers others, but not this, or is cut off
    """
    body = {"model": endpoint.model, "messages": messages, "max_tokens": most_tokens}
    packed = json.dumps(body).encode()
    for attempt in range(ATTEMPTS):
        _wait_turn(endpoint)
        try:
            return _answer(_post(endpoint, packed))
        except _Again as again:
            why, wait = again.args
        wait = max(wait, PAUSE_S * 2**attempt)
        if wait > MOST_PAUSE_S:
            raise OSError(f"{_shown(endpoint.url)}: {why}, and asks to wait {wait:.0f} s; start the command again then")
        if attempt + 1 < ATTEMPTS:
            tqdm.write(printable(f"note: {_shown(endpoint.url)}: {why}; again in {wait:.0f} s"), file=sys.stderr)
            with endpoint.clock:
                endpoint.next_start = max(endpoint.next_start, time.monotonic() + wait)
    raise OSError(f"{_shown(endpoint.url)}: {why}, {ATTEMPTS} times; start the command again later")


def _wait_turn(endpoint: Endpoint) -> None:
    """Wait for the next start on the clock that threads share, and move it on."""
    wait = 1.0
    while wait > 0:
        with endpoint.clock:
            wait = endpoint.next_start - time.monotonic()
            if wait <= 0:
                endpoint.next_start = time.monotonic() + 60 / endpoint.per_minute
        if endpoint.ended.wait(max(wait, 0)):
            raise InterruptedError("the command has ended")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:  # would take the key to another address
        return None


def _post(endpoint: Endpoint, body: bytes) -> bytes:
    headers = {"Content-Type": "application/json"}
    if endpoint.key:
        headers["Authorization"] = f"Bearer {endpoint.key}"
    request = urllib.request.Request(endpoint.url, body, headers, method="POST")
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=endpoint.timeout_s) as response:
            content = response.read(MOST_BYTES)
    except urllib.error.HTTPError as error:
        with error:
            raise _refusal(endpoint, error) from None
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        reason = getattr(error, "reason", error)
        why = f"no byte in {endpoint.timeout_s:g} s" if isinstance(reason, TimeoutError) else str(reason)
        raise _Again(f"no answer ({_without_key(endpoint, why)})", 0.0) from None
    return content.replace(endpoint.key.encode(), b"[key]") if len(endpoint.key) >= SECRET else content


def _without_key(endpoint: Endpoint, text: str) -> str:
    return text.replace(endpoint.key, "[key]") if len(endpoint.key) >= SECRET else text


def _refusal(endpoint: Endpoint, error: urllib.error.HTTPError) -> Exception:
    """What to raise for a status that is not 200."""
    where, code = _shown(endpoint.url), error.code
    try:
        said = error.read(2000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        said = ""
    said = " ".join(_without_key(endpoint, said).split())[:200]
    if code in (401, 403):  # such bodies may repeat parts of the key
        return OSError(f"{where}: {code}, the key is {'refused' if endpoint.key else 'missing'}: set the variable that "
                       "--key-variable names")
    if code == 404:
        return OSError(f"{where}: 404, no such address or no model {endpoint.model} ({said})")
    if 300 <= code < 400:
        return OSError(f"{where}: {code}, the address redirects; give --endpoint the one it leads to")
    if code in (408, 429) or code >= 500:
        return _Again(f"{code} ({said})", _seconds(error.headers.get("Retry-After", "")))
    return ValueError(f"the endpoint answers {code} ({said})")


def _seconds(retry_after: str) -> float:
    """Seconds until what a Retry-After header says, a number or a date; 0 if it says neither."""
    try:
        if retry_after.strip().isdecimal():
            return float(retry_after)
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _answer(content: bytes) -> Answer:
    """The answer in the body of a response."""
    try:
        body = parse_json(content.decode(), "body")
        choice = body["choices"][0]
        text, finish = choice["message"].get("content"), choice.get("finish_reason")
        if isinstance(text, list):  # of parts, as some services have it
            text = "".join(part["text"] for part in text if part.get("type") == "text")
        text = (text or "").rpartition("</think>")[2]  # what comes before it is thinking aloud
        usage = body.get("usage") if isinstance(body.get("usage"), dict) else {}
        counts = [usage.get(f"{kind}_tokens") for kind in ("prompt", "completion")]
        tokens = [int(number) if isinstance(number, int | float) else 0 for number in counts]
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError):
        shown = " ".join(content[:200].decode("utf-8", "replace").split())
        raise _Again(f"no chat completion ({shown})", 0.0) from None
    if finish in ("length", "content_filter") or not text.strip():
        raise ValueError(f"the answer is empty or cut off (finish_reason {finish})")
    return Answer(text, *tokens)


# ---- many questions, and the file of their answers

def ask_all(endpoint: Endpoint, questions: Mapping[str, Callable[[], list[dict]]], file: Path,
            parse: Callable[[str], dict], errors: list[str], name: str = "id", at_once: int = 4,
            most_tokens: int = 300) -> dict[str, dict]:
    """Ask what `file` holds no answer to, and append the answers; Ctrl-C records those that are on their way.

    questions  id -> a function that makes the messages, called just before they are sent; a ValueError leaves it out
    file       lines of JSON, {name: id, **parse(text), "model": …, "tokens": [in, out]}
    parse      a ValueError asks again, ASK_AGAIN times in all
    errors     gets a line per question without an answer; these are asked when the command runs again
    at_once    threads
    returns    id -> record of all questions that have an answer
    raises     OSError if the endpoint is of no use, or another process writes to `file`; what was answered is kept
    """
    def answer(key: str) -> dict | str:
        try:
            messages = questions[key]()
        except ValueError as error:
            return str(error)
        record = {name: key, **_parsed(endpoint, messages, parse, most_tokens)}
        with writing:  # half a surrogate pair, which is no UTF-8, becomes \ud800, which JSON reads again
            out.write(f"{json.dumps(record, ensure_ascii=False)}\n".encode("utf-8", "backslashreplace"))
            out.flush()
            os.fsync(out.fileno())
        return record

    with _appending(file, name) as (out, records), tqdm(desc="answers", file=sys.stderr) as bar:
        writing, pool, failed = threading.Lock(), ThreadPoolExecutor(at_once), 0
        try:
            asked = {pool.submit(answer, key): key for key in questions if key not in records}
            bar.reset(len(asked))
            for future in as_completed(asked):
                bar.update()
                try:
                    record, failed = future.result(), 0
                except ValueError as error:
                    record, failed = f"{asked[future]}: {error}", failed + 1
                if isinstance(record, dict):
                    records[asked[future]] = record
                else:
                    errors.append(record)
                if failed == IN_A_ROW and not any(r.get("model") == endpoint.model for r in records.values()):
                    raise OSError(f"{_shown(endpoint.url)}: {failed} questions in a row have no answer: {errors[-1]}")
        except KeyboardInterrupt:
            bar.write("note: the answers on their way are awaited and recorded", file=sys.stderr)
            raise
        finally:
            endpoint.ended.set()
            pool.shutdown(cancel_futures=True)
            endpoint.ended.clear()
    return {key: records[key] for key in questions if key in records}


def _parsed(endpoint: Endpoint, messages: list[dict], parse: Callable[[str], dict], most_tokens: int) -> dict:
    """What `parse` makes of the first answer in its format; ValueError if ASK_AGAIN answers are not."""
    for _ in range(ASK_AGAIN):
        given = ask(endpoint, messages, most_tokens)
        try:
            return {**parse(given.text), "model": endpoint.model, "tokens": [*given[1:]]}
        except ValueError as error:
            why = error
    raise ValueError(f"{ASK_AGAIN} answers off the format: {why}")


def read_records(file: Path, name: str = "id") -> dict[str, dict]:
    """id -> record of a file of answers, {} if it is absent; ValueError names a line that is none."""
    if not file.exists():
        return {}
    regular(file)
    return _records(file.read_bytes(), file, name)[0]


def _records(content: bytes, file: Path, name: str) -> tuple[dict[str, dict], int]:
    """The records, and the bytes they take: less than all if the last line is half a line, as a kill leaves it."""
    records, place, begin = {}, 0, json.dumps({name: ""})[:-2].encode()  # of each of our lines: {"id": "
    lines = content.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            record = parse_json(line.decode(), f"{file}:{number}") if line.strip() else None
        except ValueError:
            if line is lines[-1] and not line.endswith(b"\n") and line.startswith(begin[:len(line)]):
                break
            raise ValueError(f"{file}:{number}: not JSON in UTF-8; restore the file, or name another") from None
        if record is not None:
            if not isinstance(record, dict) or not isinstance(record.get(name), str):
                raise ValueError(f'{file}:{number}: no record with "{name}"; restore the file, or name another')
            records[record[name]] = record
        place += len(line)
    return records, place


@contextmanager
def _appending(file: Path, name: str) -> Iterator[tuple[BinaryIO, dict[str, dict]]]:
    """A file of answers, open at the end of its last record and for this process alone, and its records."""
    try:
        out = open(file, "a+b")
    except OSError as error:
        raise OSError(f"{file}: cannot be written ({error.strerror}); name another with --out") from None
    with out, naming(file):
        try:
            if fcntl:
                fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"{file}: another process is writing to it; wait for it, or name another file") from None
        out.seek(0)
        content = out.read()
        records, place = _records(content, file, name)
        out.truncate(place)
        if place and content[place - 1] != ord("\n"):
            out.write(b"\n")
        yield out, records
