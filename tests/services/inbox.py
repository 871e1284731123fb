"""A web server that keeps what it is sent: where notifications of tests arrive."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Inbox:
    """A web server that keeps what it is sent."""

    url: str
    messages: list[dict[str, Any]]
    is_full: bool = False  # refuses further messages


@contextmanager
def open_inbox() -> Iterator[Inbox]:
    """An inbox that is served while the block runs."""
    messages: list[dict[str, Any]] = []

    class Keep(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not kept.is_full:
                messages.append(message)
            self.send_response(507 if kept.is_full else 200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Keep)
    kept = Inbox(f"http://127.0.0.1:{server.server_port}", messages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield kept
    finally:
        server.shutdown()
