"""Public addresses of Prefect and MLflow: behind a proxy or a tunnel, their pages and links name the address in use."""

import json
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SETTINGS = "/ui-settings"  # ends the path of the settings that Prefect's pages read first


def host_of(url: str) -> str:
    """The name of the host in a public address. Raises ValueError for an address with more than scheme, name and port.

    A path is refused, because the pages of both servers are built for the root of a host.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
        raise ValueError(f"{url} is not an address such as https://prefect.example.org")
    if "@" in parts.netloc or parts.path.strip("/") or parts.query or parts.fragment:
        raise ValueError(
            f"an address such as https://prefect.example.org has no user and no path: {url.rpartition('@')[2]}"
        )
    return f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname


class UiAddress:
    """ASGI middleware in front of Prefect's server: its pages send their requests to the address they were opened at.

    Prefect names one fixed address, which a browser behind a proxy or a tunnel does not reach. A proxy that ends TLS
    sends the header X-Forwarded-Proto, or its address is `public`.
    """

    def __init__(self, app: ASGIApp, public: str | None) -> None:
        self.app, self.public = app, public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].endswith(SETTINGS):
            await self.app(scope, receive, send)
            return
        api = f"{self._opened_at(Headers(scope=scope))}/api"
        changed = _replaced(send, lambda body: json.dumps({**json.loads(body), "api_url": api}))
        plain = [header for header in scope["headers"] if header[0] != b"accept-encoding"]  # a body that can be read
        await self.app({**scope, "headers": plain}, receive, changed)

    def _opened_at(self, headers: Headers) -> str:
        host = headers["host"]
        if self.public is not None and urlsplit(self.public).netloc.lower() == host.lower():
            return self.public.rstrip("/")
        scheme = headers.get("x-forwarded-proto", "http").lower()
        return f"{scheme if scheme in ('http', 'https') else 'http'}://{host}"


def _replaced(send: Send, change: Callable[[bytes], str]) -> Send:
    """Send the whole body of a response after a change, if it is a success."""
    start: Message = {}
    body = b""

    async def collect(message: Message) -> None:
        nonlocal start, body
        if message["type"] == "http.response.start":
            start = message
            return
        body += message.get("body", b"")
        if message.get("more_body", False):
            return
        found = change(body).encode() if start["status"] == 200 else body
        headers = MutableHeaders(raw=list(start.get("headers", [])))
        headers["content-length"] = str(len(found))
        await send({**start, "headers": headers.raw})
        await send({"type": "http.response.body", "body": found})

    return collect
