"""Addresses of servers: which of them answer."""

import socket
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from flows.net import answers


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
