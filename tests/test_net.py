"""Addresses of servers: which of them answer."""

import socket
from concurrent.futures import ThreadPoolExecutor

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
