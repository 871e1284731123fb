"""Limits on HTTP requests that uvicorn lacks: the time and size of heads and bodies, and the number of connections."""

import asyncio
import resource
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from vectorclm.inference.openai_errors import Refusal

BODY_BYTES = 1 << 20  # of a request, at most; a context is some thousand tokens
BODY_SECONDS = 30  # for a body to arrive
HEAD_BYTES = 1 << 14  # of a request's head that has not arrived as a whole, at most
HEAD_SECONDS = 10  # for the head of a request, after the connection or the response before
CONNECTIONS = 512  # at most
BACKLOG = 32  # connections accepted at once
DESCRIPTORS = 64 + 4 * BACKLOG  # kept free for files, and for connections that begin or end


class LimitedHTTP(H11Protocol):
    """One HTTP connection. Beyond the limit, the server closes the connection that has waited longest for a head.

    The parser is h11, which limits the size of a head; httptools does not.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()
        if len(self.connections) > most_connections():
            waiting = [one for one in self.connections if isinstance(one, LimitedHTTP) and one._head is not None]
            min(waiting, key=LimitedHTTP._deadline)._close()

    def connection_lost(self, error: Exception | None) -> None:
        self._forget_head()
        super().connection_lost(error)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget_head()

    def on_response_complete(self) -> None:
        self._await_head()
        super().on_response_complete()  # which may go on with the next request at once
        if not self.cycle.response_complete:
            self._forget_head()

    def _deadline(self) -> float:
        return float("inf") if self._head is None else self._head.when()

    def _await_head(self) -> None:
        self._forget_head()
        self._head = self.loop.call_later(HEAD_SECONDS, self._close)

    def _forget_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _close(self) -> None:
        self._forget_head()
        self.connections.discard(self)
        self.transport.abort()


def most_connections() -> int:
    """The limit of open connections: CONNECTIONS, or fewer where this process may open few files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return CONNECTIONS if soft == resource.RLIM_INFINITY else max(1, min(CONNECTIONS, soft - DESCRIPTORS))


class BodyLimit:
    """ASGI middleware that reads the whole body of a request before the application, within a size and a time."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            body = await read_body(Request(scope, receive))
        except Refusal as refusal:
            await refusal.response()(scope, receive, send)
            return
        except ClientDisconnect:
            await Response(status_code=499)(scope, receive, send)  # nginx's number; no client is left to read it
            return
        whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_whole() -> Message:
            return whole.pop() if whole else await receive()

        await self.app(scope, receive_whole, send)


async def read_body(request: Request) -> bytes:
    """Read a request's body. Raises Refusal where it is too large or too slow, ClientDisconnect without a client."""
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size <= BODY_BYTES:
                    body += part
                elif size > 8 * BODY_BYTES:  # up to here the rest is dropped: a client reads no response while it sends
                    break
    except TimeoutError as error:
        raise Refusal(f"the body did not arrive within {BODY_SECONDS} s", 408, code="timeout") from error
    if size > BODY_BYTES:
        raise Refusal(f"the body has more than {BODY_BYTES:,} bytes", 413, code="request_too_large")
    return bytes(body)
