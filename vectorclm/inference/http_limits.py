"""uvicorn's HTTP/1.1 with limits: a request's head arrives within seconds, connections are fewer than descriptors."""

import asyncio
import resource
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10  # in which the head of a request has to arrive, from the connection or from the answer before
CONNECTIONS = 512  # at the most
BACKLOG = 32  # connections that are taken at once, before any is looked at
DESCRIPTORS = 64 + 4 * BACKLOG  # that are left for files, and for connections that are taken or ended this moment


class LimitedHTTP(H11Protocol):
    """One connection; where there are too many, the one that owes its head for longest has to go.

    h11 limits the size of a head as well, before any key is asked for; httptools does not."""

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
    """How many connections a server may have open: fewer than this process may have files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return CONNECTIONS if soft == resource.RLIM_INFINITY else max(1, min(CONNECTIONS, soft - DESCRIPTORS))
