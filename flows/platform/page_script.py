"""Put a script in front of those of a server's own pages, which have no setting for what it does."""

from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEAD = b"<head>"
OF_CONTENT = (b"content-length", b"etag", b"last-modified")  # headers that a changed page makes wrong
OF_KNOWN = (b"if-none-match", b"if-modified-since", b"range", b"accept-encoding")  # of requests: the page must be whole
# Prefect's page asks for the password too late: the refused request of a run's page shows "not found" before.
LOGIN = (
    'if(location.pathname!=="/login"&&localStorage.getItem("prefect-password")===null)'
    'location.replace("/login?redirect="+encodeURIComponent(location.pathname+location.search))'
)


def asks_first(path: str) -> bool:
    """Whether Prefect answers a path with its page whose script LOGIN is; the new page, below /v2, asks in time."""
    first, last = path.split("/")[1], path.rpartition("/")[2]
    return first not in ("api", "v2", "assets", "reports") and "." not in last


class PageScript:
    """ASGI middleware that puts a script first into the pages at some paths; all else passes as it is."""

    def __init__(self, app: ASGIApp, script: str, pages: Callable[[str], bool]) -> None:
        self.app, self.pages = app, pages
        self.script = f"<script>try{{{script}}}catch(error){{}}</script>".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "GET" or not self.pages(scope["path"]):
            await self.app(scope, receive, send)
            return
        fresh = [item for item in scope["headers"] if item[0] not in OF_KNOWN]
        start: Message = {}
        page = bytearray()

        async def collect(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                return
            page.extend(message.get("body", b""))
            if message.get("more_body", False):
                return
            body, headers = bytes(page), list(start["headers"])
            if Headers(raw=headers).get("content-type", "").startswith("text/html"):
                body = body.replace(HEAD, HEAD + self.script, 1)
                headers = [item for item in headers if item[0].lower() not in OF_CONTENT]
                headers.append((b"content-length", str(len(body)).encode()))
            await send({**start, "headers": headers})
            await send({"type": "http.response.body", "body": body})

        await self.app({**scope, "headers": fresh}, receive, collect)
