"""Note in each new run whether a page of Prefect or a program started it, and let dry runs pass the queue."""

import json
import re
from collections.abc import Mapping
from typing import Any

import httpx
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flows.handle import CURRICULA
from flows.run_names import API, FROM, UI

CREATES = re.compile(r"(/api/deployments/[0-9a-f-]{36})/create_flow_run/?")
LARGEST = 2**20  # bytes of a request that is read
UNQUEUED = "default"  # the work queue of a dry run, which builds nothing and need not wait


class RunOrigin:
    """ASGI middleware in front of Prefect's server: adds the tag `from: …` to requests that create a run."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        created = CREATES.fullmatch(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if created is None:
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        body, read = await buffered(receive)
        if body is not None and (asked := _noted(body, headers.get("user-agent", ""))) is not None:
            if _is_dry(asked) and await self._is_queued(created[1], headers.get("authorization")):
                asked["work_queue_name"] = UNQUEUED
            scope, read = rewritten(scope, asked)
        await self.app(scope, replayed(read, receive), send)

    async def _is_queued(self, deployment: str, authorization: str | None) -> bool:
        """Whether the runs of a deployment wait in the queue of curricula; asks the server as the request does."""
        found = await looked_up(self.app, deployment, authorization)
        return isinstance(found, Mapping) and found.get("work_queue_name") == CURRICULA


async def buffered(receive: Receive) -> tuple[bytes | None, list[Message]]:
    """Read the body of a request; None if it is larger than LARGEST. The messages read are to be replayed."""
    body, read, more = b"", list[Message](), True
    while more and len(body) <= LARGEST:
        message = await receive()
        read.append(message)
        body += message.get("body", b"")
        more = bool(message.get("more_body", False))
    return None if more else body, read


def rewritten(scope: Scope, asked: Mapping[str, Any]) -> tuple[Scope, list[Message]]:
    """The request with another JSON body."""
    noted = json.dumps(asked).encode()
    length = (b"content-length", str(len(noted)).encode())
    headers = [*(header for header in scope["headers"] if header[0] != b"content-length"), length]
    return {**scope, "headers": headers}, [{"type": "http.request", "body": noted, "more_body": False}]


def replayed(read: list[Message], receive: Receive) -> Receive:
    """A channel that hands out messages that were read already, and then those to come."""

    async def again() -> Message:
        return read.pop(0) if read else await receive()

    return again


async def looked_up(app: ASGIApp, path: str, authorization: str | None) -> Any:
    """What the server answers at a path to whoever sent the request; None if it refuses."""
    headers = {"Authorization": authorization} if authorization else {}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
        found = await client.get(path, headers=headers)
    return found.json() if found.is_success else None


def _is_dry(asked: Mapping[str, Any]) -> bool:
    parameters = asked.get("parameters")
    return isinstance(parameters, Mapping) and parameters.get("dry_run") is True


def _noted(body: bytes, agent: str) -> dict[str, Any] | None:
    """The request with its tag; None where it is not a run of a deployment."""
    try:
        asked: Any = json.loads(body)
        tags = list(asked.get("tags") or [])
        if not any(str(tag).startswith(FROM) for tag in tags):
            asked["tags"] = [*tags, FROM + (UI if "Mozilla" in agent else API)]
    except (ValueError, AttributeError, TypeError):
        return None  # the server says what is wrong
    return dict(asked)
