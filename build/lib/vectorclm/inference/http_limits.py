"""HTTP limits for uvicorn: a request's head has 10 seconds, and connections stay below the file descriptors."""

import asyncio
import resource
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10  # for the head of a request, after the connection or the answer before
CONNECTIONS = 512  # at most
BACKLOG = 32  # connections accepted at once
DESCRIPTORS = 64 + 4 * BACKLOG  # kept free for files, and for connections that begin or end


class LimitedHTTP(H11Protocol):
    """One connection; of too many, the one that has waited longest for a head is closed.

    h11 also limits the size of a head, before the key is checked; httptools does not.
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
    """The most connections that a server may have open: fewer than this process may have open files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return CONNECTIONS if soft == resource.RLIM_INFINITY else max(1, min(CONNECTIONS, soft - DESCRIPTORS))
