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
        body, read, more = b"", list[Message](), True
        while more and len(body) <= LARGEST:
            message = await receive()
            read.append(message)
            body += message.get("body", b"")
            more = bool(message.get("more_body", False))
        if not more and (asked := _noted(body, headers.get("user-agent", ""))) is not None:
            if _is_dry(asked) and await self._is_queued(created[1], headers.get("authorization")):
                asked["work_queue_name"] = UNQUEUED
            noted = json.dumps(asked).encode()
            read = [{"type": "http.request", "body": noted, "more_body": False}]
            length = (b"content-length", str(len(noted)).encode())
            scope = {**scope, "headers": [*(h for h in scope["headers"] if h[0] != b"content-length"), length]}

        async def again() -> Message:
            return read.pop(0) if read else await receive()

        await self.app(scope, again, send)

    async def _is_queued(self, deployment: str, authorization: str | None) -> bool:
        """Whether the runs of a deployment wait in the queue of curricula; asks the server as the request does."""
        headers = {"Authorization": authorization} if authorization else {}
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            found = await client.get(deployment, headers=headers)
        return found.is_success and found.json().get("work_queue_name") == CURRICULA


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
