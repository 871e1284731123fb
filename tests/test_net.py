"""Addresses of servers: which of them answer, which ports are free, and what a child is told of them."""

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from flows.net import answers, free_port, has_own_server, neutral, past_proxies, without_password


def test_what_is_no_address_and_what_speaks_no_http_does_not_answer() -> None:
    assert not any(answers(url) for url in ("nowhere", "http://[x/api", "http://a:b@127.0.0.1:c/api"))
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as other:

        def serve() -> None:
            with server.accept()[0] as caller:
                caller.recv(1024)
                caller.sendall(b"220 mail is served here\r\n")

        other.submit(serve)
        assert not answers(f"http://127.0.0.1:{server.getsockname()[1]}/health")


def test_a_server_of_this_machine_is_asked_past_any_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """And counts as answering by 200 alone, also behind a redirection."""
    with HTTPServer(("127.0.0.1", 0), Answers) as server, ThreadPoolExecutor(1) as other:
        other.submit(server.serve_forever)
        try:
            for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
                monkeypatch.setenv(name, "http://127.0.0.1:9")
            address = f"http://127.0.0.1:{server.server_port}"
            found = [answers(f"{address}/{path}") for path in ("200", "301", "401", "503")]
        finally:
            server.shutdown()
    assert found == [True, True, False, False]


class Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(int(self.path.strip("/")))
        self.send_header("Location", "/200")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def test_a_proxy_of_the_user_is_kept_beside_the_addresses_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert past_proxies() == dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost")
    monkeypatch.setenv("no_proxy", "intra.net,localhost")
    assert past_proxies() == dict.fromkeys(("NO_PROXY", "no_proxy"), "intra.net,localhost,127.0.0.1")


def test_a_password_leaves_every_address_of_a_text() -> None:
    text = "no http://bob:s3cr3t@a:1/x and no postgresql+asyncpg://me:mine@b/c, but me@mail.net"
    assert without_password(text) == "no http://a:1/x and no postgresql+asyncpg://b/c, but me@mail.net"


def test_a_free_port_can_be_listened_on() -> None:
    with socket.create_server(("127.0.0.1", port := free_port())) as server:
        assert server.getsockname()[1] == port != free_port()


def test_servers_of_the_user_are_hidden_from_what_must_not_use_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://somewhere/api")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somewhere")
    assert has_own_server()
    found = neutral(os.environ)
    assert found["PATH"] == os.environ["PATH"]
    assert not any(name.startswith(("PREFECT_", "MLFLOW_")) for name in found)
    monkeypatch.setenv("PREFECT_API_URL", "")
    assert not has_own_server()
