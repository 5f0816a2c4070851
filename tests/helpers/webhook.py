"""A webhook on this host that answers as a test asks it to."""

import json
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any


class Webhook(socketserver.ThreadingTCPServer):
    """The server; `answer` is called with the handler of each request, and decides what follows."""

    daemon_threads, allow_reuse_address = True, True
    block_on_close = False  # some answers never end

    def __init__(self, answer: Callable[[BaseHTTPRequestHandler], None]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.received, self.released = answer, list[dict[str, Any]](), threading.Event()
        self.num_released = 0  # answers that did not come until the end of the test, or for a minute

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/services/SECRET"


class _Handler(BaseHTTPRequestHandler):
    server: Webhook

    def do_POST(self) -> None:  # name of the base class
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append(json.loads(body) | {"path": self.path, "type": self.headers["Content-Type"]})
        self.server.answer(self)

    def log_message(self, format: str, *args: object) -> None:  # name of the base class
        pass


def status(code: int) -> Callable[[BaseHTTPRequestHandler], None]:
    """Answer with a status, and an empty body."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def hang(handler: BaseHTTPRequestHandler) -> None:
    """Answer nothing until the end of the test."""
    assert isinstance(handler.server, Webhook)
    handler.server.released.wait(60)
    handler.server.num_released += 1


def slow_body(handler: BaseHTTPRequestHandler) -> None:
    """Announce a body that does not come until the end of the test."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    hang(handler)


@contextmanager
def webhook(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[Webhook]:
    """Serve until the end of the block."""
    with Webhook(answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()
