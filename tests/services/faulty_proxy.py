"""A proxy between an S3 client and its server that spoils answers to ranged GETs as it is told."""

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

# What becomes of the n-th answer to a ranged GET: one of `Handler.FAULTS`, or "" for nothing.
Rule = Callable[[int], str]
REFUSALS = {
    "500": (500, "InternalError"),
    "503": (503, "SlowDown"),
    "expired": (400, "ExpiredToken"),
}


class Proxy(ThreadingHTTPServer):
    """`proxy.rule` says what is spoiled; `proxy.ranges` counts the ranged GETs, `proxy.faults` those spoiled."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream = urlsplit(upstream)
        self.rule: Rule = lambda number: ""
        self.lock = threading.Lock()
        self.ranges = self.faults = 0

    @property
    def url(self) -> str:
        """Its endpoint."""
        return f"http://127.0.0.1:{self.server_port}"

    def reset(self, rule: Rule) -> None:
        """Count anew, and spoil by this rule."""
        with self.lock:
            self.rule, self.ranges, self.faults = rule, 0, 0

    def fault(self) -> str:
        """What becomes of the next answer."""
        with self.lock:
            found = self.rule(self.ranges)
            self.ranges += 1
            self.faults += bool(found)
            return found

    def shutdown_request(self, request: object) -> None:
        """Close without the usual goodbye, which would come before a reset."""
        self.close_request(request)  # type: ignore[arg-type]

    def handle_error(self, *_: object) -> None:
        """A client that hung up is none of ours."""


class Handler(BaseHTTPRequestHandler):
    """Hands a request on as it is, signature and all."""

    protocol_version = "HTTP/1.1"
    server: Proxy
    upstream: HTTPConnection | None = None

    def answer(self) -> None:
        """Hand it on, and spoil the answer where it is the turn."""
        fault = self.server.fault() if self.command == "GET" and "Range" in self.headers else ""
        if fault == "latency":
            time.sleep(0.3)
        if fault == "reset":
            return self._hang_up()
        if fault in REFUSALS:
            return self._refuse(*REFUSALS[fault])
        if self.upstream is None:
            self.upstream = HTTPConnection(self.server.upstream.hostname or "", self.server.upstream.port)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.upstream.request(self.command, self.path, body, dict(self.headers))
        found = self.upstream.getresponse()
        data = found.read()
        if fault == "short":
            data = data[: len(data) // 2]
        if fault == "flip":
            data = data[:99] + bytes([data[99] ^ 1]) + data[100:]
        self.send_response(found.status)
        for name, value in found.getheaders():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        length = found.getheader("Content-Length", "0") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command == "HEAD":
            return None
        if fault in ("cut", "truncate", "stall"):
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            if fault == "stall":
                time.sleep(5)
            self.close_connection = True
            return self._hang_up() if fault == "cut" else None
        self.wfile.write(data)
        return None

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer

    def _refuse(self, status: int, code: str) -> None:
        body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>as told</Message></Error>'.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _hang_up(self) -> None:
        """End the connection with a reset, not with the usual goodbye."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def faulty_proxy(upstream: str) -> Iterator[Proxy]:
    """A proxy before the server at `upstream`, while the block runs."""
    with Proxy(upstream) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
