"""A proxy before an S3 endpoint that answers some requests with errors, cuts or delays them, or is away."""

import random
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal["errors", "cuts", "slow", "outage"]
SHARE = 0.5  # of the requests that meet a fault, but for an outage, which all meet
SLOW_SECONDS = 1.0
UPSTREAM_SECONDS = 60.0
HOP = ("content-length", "transfer-encoding", "connection", "date", "server")


class FaultProxy(ThreadingHTTPServer):
    """Hands each request on unchanged, so that its signature stays valid; `inject` begins a fault, `mend` ends it."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream)
        self._fault: Fault | None = None
        self._chance = random.Random(0)
        self._lock = threading.Lock()
        self.spoiled = 0  # requests that met a fault since `inject`

    @property
    def url(self) -> str:
        """The endpoint of the proxy."""
        return f"http://127.0.0.1:{self.server_port}"

    def inject(self, fault: Fault, seed: int) -> None:
        """Begin a fault."""
        with self._lock:
            self._fault, self._chance, self.spoiled = fault, random.Random(seed), 0

    def mend(self) -> None:
        """End the fault."""
        with self._lock:
            self._fault = None

    def meets(self) -> Fault | None:
        """The fault that the next request meets."""
        with self._lock:
            fault = self._fault
            if fault is None or (fault != "outage" and self._chance.random() >= SHARE):
                return None
            self.spoiled += 1
            return fault

    def status(self) -> int:
        """500 or 503."""
        with self._lock:
            return self._chance.choice((500, 503))

    def connect(self) -> HTTPConnection:
        """A connection to the real endpoint."""
        host = self.upstream.hostname or ""
        if self.upstream.scheme == "https":
            context = ssl.create_default_context()
            return HTTPSConnection(host, self.upstream.port, timeout=UPSTREAM_SECONDS, context=context)
        return HTTPConnection(host, self.upstream.port, timeout=UPSTREAM_SECONDS)

    def shutdown_request(self, request: object) -> None:
        """Close without the usual goodbye, which would come before a reset."""
        self.close_request(request)  # type: ignore[arg-type]

    def handle_error(self, *_: object) -> None:
        """Clients are killed on purpose."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultProxy
    _upstream: HTTPConnection | None = None

    def answer(self) -> None:
        """Hand the request on, or let it meet a fault."""
        fault = self.server.meets()
        if fault == "slow":
            time.sleep(SLOW_SECONDS)
        if fault == "outage":
            return self._hang_up()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fault == "errors":
            return self._refuse()
        if self._upstream is None:
            self._upstream = self.server.connect()
        try:
            self._upstream.request(self.command, self.path, body, dict(self.headers))
            found = self._upstream.getresponse()
            data = found.read()
        except (OSError, HTTPException):
            return self._hang_up()
        self.send_response(found.status)
        for name, value in found.getheaders():
            if name.lower() not in HOP:
                self.send_header(name, value)
        whole = found.getheader("Content-Length", "0") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", whole)
        self.end_headers()
        if fault == "cuts":  # the request was done, and its answer is lost
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            return self._hang_up()
        if self.command != "HEAD":
            self.wfile.write(data)
        return None

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer

    def _refuse(self) -> None:
        status = self.server.status()
        code = "InternalError" if status == 500 else "SlowDown"
        body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>injected</Message></Error>'.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _hang_up(self) -> None:
        """End the connection with a reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def fault_proxy(upstream: str) -> Iterator[FaultProxy]:
    """A proxy before the endpoint at `upstream`, while the block runs."""
    with FaultProxy(upstream) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True, name="fault proxy").start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
