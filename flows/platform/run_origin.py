"""Note in each new run whether a page of Prefect or a program started it, and let dry runs pass the queue."""

import json
import re
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flows.run_names import API, FROM, UI

CREATES = re.compile(r"/api/deployments/[0-9a-f-]{36}/create_flow_run/?")
LARGEST = 2**20  # bytes of a request that is read
UNQUEUED = "default"  # the work queue of a dry run, which builds nothing and need not wait


class RunOrigin:
    """ASGI middleware in front of Prefect's server: adds the tag `from: …` to requests that create a run."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not CREATES.fullmatch(scope["path"]):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        body, read, more = b"", list[Message](), True
        while more and len(body) <= LARGEST:
            message = await receive()
            read.append(message)
            body += message.get("body", b"")
            more = bool(message.get("more_body", False))
        if not more and (noted := _noted(body, headers.get("user-agent", ""))) is not None:
            read = [{"type": "http.request", "body": noted, "more_body": False}]
            length = (b"content-length", str(len(noted)).encode())
            scope = {**scope, "headers": [*(h for h in scope["headers"] if h[0] != b"content-length"), length]}

        async def again() -> Message:
            return read.pop(0) if read else await receive()

        await self.app(scope, again, send)


def _noted(body: bytes, agent: str) -> bytes | None:
    """The request with its tag; None where it is not a run of a deployment."""
    try:
        asked: Any = json.loads(body)
        tags = list(asked.get("tags") or [])
        if not any(str(tag).startswith(FROM) for tag in tags):
            asked["tags"] = [*tags, FROM + (UI if "Mozilla" in agent else API)]
        if (asked.get("parameters") or {}).get("dry_run") is True:
            asked["work_queue_name"] = UNQUEUED
    except (ValueError, AttributeError, TypeError):
        return None  # the server says what is wrong
    return json.dumps(asked).encode()
