"""Which requests the guard lets through, at a real uvicorn, and where the password of Prefect is kept."""

import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from pydantic import SecretStr
from starlette.responses import PlainTextResponse
from starlette.routing import Router, WebSocketRoute
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from flows.execution.launch import Launcher
from flows.platform import doctor, password
from flows.platform.config import PlatformConfig
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


def test_the_password_stays_and_the_user_s_own_wins(tmp_path: Path) -> None:
    url = "http://127.0.0.1:4200/api"
    config = PlatformConfig(vectorclm_store=str(tmp_path))
    assert config.prefect_password is None and doctor._password(config, shown=True) == doctor.OPEN
    password.ensure(tmp_path, url)
    made = config.prefect_password
    assert made is not None and made.startswith("admin:") and made != password.make()
    password.ensure(tmp_path, url)
    password.settle(tmp_path, "http://127.0.0.1:4201/api", own=True)
    assert config.prefect_password == made == config.client_environment()["PREFECT_API_AUTH_STRING"]
    assert (password.read(tmp_path, url), password.read(tmp_path, "http://127.0.0.1:4201/api")) == (None, made)
    assert made in doctor._password(config, shown=True) and made not in doctor._password(config, shown=False)
    file = password.place(tmp_path)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and list(file.parent.iterdir()) == [file]
    command = ["sh", "-c", f"set -a; . '{file}'; echo $PREFECT_API_URL $PREFECT_API_AUTH_STRING"]
    read = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert read == f"http://127.0.0.1:4201/api {made}\n"
    own, off = (config.model_copy(update={"prefect_auth": SecretStr(text)}) for text in ("me:mine", "None"))
    assert (own.prefect_password, off.prefect_password) == ("me:mine", None)
    assert "PREFECT_API_AUTH_STRING" not in off.client_environment() and "mine" not in doctor._password(own, shown=True)
    password.settle(tmp_path, url, own=False)
    assert config.prefect_password is None
    for wrong in ("admin", "admin:", ":x"):
        with pytest.raises(ValueError, match="PREFECT_AUTH must be user:password, or none"):
            PlatformConfig(prefect_auth=SecretStr(wrong))


def test_a_stage_s_own_process_has_no_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PREFECT_API_AUTH_STRING", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "admin:secret-of-this-test")
    said: list[str] = []
    with Launcher(tmp_path) as launcher:
        launcher.run([sys.executable, "-c", "import os; print(dict(os.environ))"], said.append)
    assert "PATH" in said[0] and "secret-of-this-test" not in said[0]
