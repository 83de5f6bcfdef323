"""A local server in the place of an OpenAI-compatible endpoint, which answers as a test tells it to."""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-never-shown-4711"


def completion(text: str, finish: str = "stop") -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return json.dumps({"choices": [choice], "usage": {"prompt_tokens": 11, "completion_tokens": 7}}).encode()


class Server(ThreadingHTTPServer):
    """`plan` holds what the next requests get, then `usual(body)` answers: a text, or (status, headers, body).

    A number in the plan is a status; a float is slept, seconds, before the usual answer. `bodies` and `headers` are
    those of all requests.
    """

    daemon_threads = True

    def __init__(self, usual: Callable[[dict], object]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.usual, self.plan, self.bodies, self.headers, self.times = usual, [], [], [], []
        self.lock, self.url = threading.Lock(), f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def handle_error(self, *_: object) -> None:
        pass  # a client that gave up


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.bodies.append(body)
            server.headers.append(dict(self.headers))
            server.times.append(time.monotonic())
            reply = server.plan.pop(0) if server.plan else server.usual(body)
        if isinstance(reply, float):
            time.sleep(reply)
            reply = server.usual(body)
        if isinstance(reply, int):
            reply = reply, {}, json.dumps({"error": f"as told, {self.headers.get('Authorization')}"}).encode()
        if isinstance(reply, str):
            reply = 200, {}, completion(reply)
        if reply is None:
            return self.connection.close()
        status, headers, content = reply
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass
