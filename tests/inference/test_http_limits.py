"""The limits of `vectorclm serve`: heads that do not arrive, and connections without end."""

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from tests.inference.conftest import SECRET, Served, check_log, serve_while
from vectorclm.inference import http_limits, serve
from vectorclm.inference.http_limits import DESCRIPTORS, BodyLimit, LimitedHTTP

HALF = b"GET /v1/models HTTP/1.1\r\nHost: loc"


def test_connections_that_owe_their_head_keep_nobody_out(chat_folder: Path) -> None:
    """Three hundred of them, where the server may have fewer files open; whoever sends a whole request is answered."""
    command = [sys.executable, "-m", "vectorclm", "serve", str(chat_folder), "--port", "0"]
    limited = ["sh", "-c", f'ulimit -n {DESCRIPTORS + 36}; exec "$@"', "sh", *command]
    environment = {**os.environ, serve.KEY: SECRET}
    with ExitStack() as stack:
        process = subprocess.Popen(limited, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        stack.callback(process.kill)
        assert process.stdout is not None and process.stderr is not None
        url = process.stdout.readline().split()[2].rstrip("/")
        port = int(url.rpartition(":")[2])
        halves = [socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(300)]
        for one in halves:
            with suppress(OSError):  # it may be closed already
                one.sendall(HALF)
        headers = {"Authorization": f"Bearer {SECRET}"}
        for _ in range(3):
            assert httpx.get(f"{url}/v1/models", headers=headers, timeout=20).status_code == 200
        left = socket.create_connection(("127.0.0.1", port), timeout=60)
        left.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n")
        left.sendall(f"Authorization: Bearer {SECRET}\r\n\r\n".encode() + b"{")
        for one in [*halves, left]:
            one.close()
        assert httpx.get(f"{url}/v1/models", headers=headers, timeout=20).status_code == 200
        process.terminate()
        check_log(process.stderr.read())


def test_a_head_has_to_arrive_in_time_and_a_body_may_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_limits, "HEAD_SECONDS", 0.3)

    async def whole(scope: Scope, receive: Receive, send: Send) -> None:
        body = await Request(scope, receive).body()
        await PlainTextResponse(body)(scope, receive, send)

    def client(address: tuple[str, int]) -> None:
        with socket.create_connection(address, timeout=60) as slow:
            slow.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nsl")
            with socket.create_connection(address, timeout=60) as half, suppress(ConnectionResetError):
                half.sendall(HALF)
                assert half.recv(1024) == b""  # closed
            slow.sendall(b"owPOST / HTTP/1.1\r\nHost: x\r\n")  # and half of another head
            received = b""
            with suppress(ConnectionResetError):
                while part := slow.recv(1024):
                    received += part
            assert received.endswith(b"\r\n\r\nslow")

    serve_while(whole, client, http=LimitedHTTP)


@pytest.mark.parametrize(("sent", "status"), [(b"sl", 408), (b"x" * 2000, 413)])
def test_a_body_is_bounded_in_time_and_in_size_before_the_application_sees_it(
    monkeypatch: pytest.MonkeyPatch, sent: bytes, status: int
) -> None:
    monkeypatch.setattr(http_limits, "BODY_SECONDS", 0.3)
    monkeypatch.setattr(http_limits, "BODY_BYTES", 200)

    async def never(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("the application was called")

    def client(address: tuple[str, int]) -> None:
        with socket.create_connection(address, timeout=60) as slow:
            slow.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2000\r\n\r\n" + sent)
            response = slow.makefile("rb").read()  # to the end of the connection
            assert int(response.split()[1]) == status
            assert set(json.loads(response.partition(b"\r\n\r\n")[2])["error"]) == {
                "message",
                "type",
                "param",
                "code",
            }

    serve_while(BodyLimit(never), client, http=LimitedHTTP)


def test_a_head_that_is_too_large_is_refused_before_the_key_is_checked(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])), timeout=60) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * (2 * http_limits.HEAD_BYTES))
        assert connection.makefile("rb").readline().split()[1] == b"400"


def test_small_writes_are_sent_at_once() -> None:
    """A connection inherits the option from the socket that listens; an event of a stream waits for no other."""
    with serve.listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        connection, _ = listening.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
