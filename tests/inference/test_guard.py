"""Which requests the guard lets through, at a real uvicorn."""

import socket
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.responses import PlainTextResponse
from starlette.routing import Router, WebSocketRoute
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from vectorclm.errors import ConfigError
from vectorclm.inference import serve
from vectorclm.inference.guard import Guard, allowed_hosts

EVIL = "evil.test"


async def echo(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.send_text("heard")
    await websocket.close()


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    routes = Router([WebSocketRoute("/ws", echo)])
    await (PlainTextResponse("read") if scope["type"] == "http" else routes)(scope, receive, send)


@pytest.fixture(scope="module")
def guarded() -> Iterator[int]:
    """The port of a real uvicorn whose application stands behind the guard."""
    names = allowed_hosts({"VECTORCLM_ALLOWED_HOSTS": "prefect-server, MLflow.Example.com"})
    with serve.listen("127.0.0.1", 0) as listening:
        config = uvicorn.Config(Guard(app, names), log_config=None, lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=partial(server.run, sockets=[listening]))
        thread.start()
        yield int(listening.getsockname()[1])
        server.should_exit = True
        thread.join()


def answer(port: int, *lines: str, method: str = "POST") -> int:
    """The status of a request with these header lines, as they stand."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        head = "\r\n".join([f"{method} /api/x HTTP/1.1", *lines, "Content-Length: 0", "Connection: close", "", ""])
        connection.sendall(head.replace("PORT", str(port)).encode())
        return int(connection.makefile("rb").readline().split()[1])


FETCHED = ("Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: no-cors", "Sec-Fetch-Dest: script")
FRAMED = ("Sec-Fetch-Site: same-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: iframe")
LINKED = ("Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document")


@pytest.mark.parametrize(
    "lines",
    [
        ("Host: 127.0.0.1:PORT",),
        ("Host: localhost:PORT",),
        ("Host: LocalHost.:PORT",),
        ("host: localhost",),
        ("Host: [::1]:PORT",),
        ("Host: [0:0:0:0:0:0:0:1]:PORT",),
        ("Host: prefect-server:4200",),
        ("Host: mlflow.example.com", "Origin: https://mlflow.example.com"),
        ("Host: mlflow.example.com:443", "Origin: https://MLflow.Example.com"),
        ("Host: 127.0.0.1:PORT", "Origin: http://127.0.0.1:PORT"),
        ("Host: 127.0.0.1:PORT", "Origin: http://localhost:PORT"),  # a page of this server: its UI names 127.0.0.1
        ("Host: [::1]:PORT", "Origin: http://[::1]:PORT"),
    ],
)
def test_a_request_of_its_own_passes(guarded: int, lines: tuple[str, ...]) -> None:
    assert answer(guarded, *lines) == 200


@pytest.mark.parametrize(
    "lines",
    [
        ("Host: evil.test:PORT",),
        ("Host: evil.localhost:PORT",),
        ("Host: localhost.evil.test:PORT",),
        ("Host: 127.0.0.1.evil.test:PORT",),
        ("Host: localhost..:PORT",),
        ("Host: [::2]:PORT",),
        ("Host: [::1",),
        ("Host: ",),
        ("Host: user@localhost:PORT",),
        ("Host: localhost:PORT/x",),
        ("Host: localhost:x",),
        ("Host: loc\u0430lhost:PORT",),  # its a is Cyrillic
        ("Host: localhost:PORT", "Origin: null"),
        ("Host: localhost:PORT", "Origin: "),
        ("Host: localhost:PORT", "Origin: http://localhost:1"),
        ("Host: localhost:PORT", "Origin: http://localhost"),
        ("Host: localhost:PORT", "Origin: http://evil.test:PORT"),
        ("Host: localhost:PORT", "Origin: http://evil.test@localhost:PORT"),
        ("Host: localhost:PORT", "Origin: chrome-extension://localhost:PORT"),
        ("Host: localhost:PORT", "Origin: http://prefect-server:4200"),
        ("Host: localhost:PORT", "Origin: http://localhost:PORT", "Origin: http://evil.test"),
        ("Host: mlflow.example.com", "Origin: https://prefect-server"),
        ("Host: localhost:PORT", *LINKED),  # a form that is sent; a link is followed by GET
    ],
)
def test_a_foreign_request_is_refused(guarded: int, lines: tuple[str, ...]) -> None:
    assert answer(guarded, *lines) in (400, 403)


def test_hosts_that_are_missing_or_several_are_refused(guarded: int) -> None:
    assert answer(guarded) in (400, 403)
    assert answer(guarded, "Host: localhost:PORT", "Host: evil.test") in (400, 403)


def test_a_link_is_followed_and_other_sites_embed_nothing(guarded: int) -> None:
    host = "Host: localhost:PORT"
    assert answer(guarded, host, *LINKED, method="GET") == 200
    assert answer(guarded, host, "Sec-Fetch-Site: none", method="GET") == 200
    assert answer(guarded, host, *FETCHED, method="GET") == 403
    assert answer(guarded, host, *FRAMED, method="GET") == 403
    assert httpx.get(f"http://127.0.0.1:{guarded}").headers["x-frame-options"] == "SAMEORIGIN"


def test_a_websocket_is_refused_before_it_opens(guarded: int) -> None:
    url = f"ws://127.0.0.1:{guarded}/ws"
    own: list[Any] = [None, f"http://127.0.0.1:{guarded}", f"http://localhost:{guarded}"]
    for origin in own:
        with connect(url, origin=origin) as socket_:
            assert socket_.recv() == "heard"
    foreign: list[Any] = ["null", "http://evil.test", f"http://evil.test:{guarded}", "http://127.0.0.1:1"]
    for origin in foreign:
        with pytest.raises(InvalidStatus, match="403"), connect(url, origin=origin):
            pass
    with socket.create_connection(("127.0.0.1", guarded)) as connection:
        rebound = f"ws://{EVIL}:{guarded}/ws"
        with pytest.raises(InvalidStatus, match="403"), connect(rebound, sock=connection, proxy=None):
            pass


@pytest.mark.parametrize("names", ["*", "a b", "http://x", "x:80", "x/y"])
def test_a_name_that_is_none_is_refused(names: str) -> None:
    with pytest.raises(ConfigError, match="VECTORCLM_ALLOWED_HOSTS"):
        allowed_hosts({"VECTORCLM_ALLOWED_HOSTS": names})


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("192.0.2.7:80", 200),
        ("[2001:db8::1]", 200),
        (socket.gethostname(), 200),
        ("localhost:80", 200),
        ("evil.test", 403),
        ("192.0.2.7.evil.test", 403),
        ("[192.0.2.7]", 403),
        ("1.2.3", 403),
        ("0x7f000001", 403),
        ("2130706433", 403),
    ],
)
def test_a_server_that_others_reach_answers_to_addresses_and_its_own_names_alone(host: str, status: int) -> None:
    names, by_address = serve.host_names({}, "0.0.0.0")
    client = TestClient(Guard(app, names, by_address=by_address))
    assert client.get("/", headers={"Host": host}).status_code == status


def test_names_that_are_set_are_the_only_ones() -> None:
    assert serve.host_names({"VECTORCLM_ALLOWED_HOSTS": "a.example"}, "0.0.0.0") == (
        ["localhost", "127.0.0.1", "[::1]", "a.example"],
        False,
    )
    assert serve.host_names({}, "127.0.0.1") == (["localhost", "127.0.0.1", "[::1]"], False)
