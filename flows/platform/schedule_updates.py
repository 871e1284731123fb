"""Keep the parameters of a schedule when Prefect's page or command switches it on or off.

Prefect's server takes an update without parameters as one that removes them, and its pages send such an update: the
schedule would then run with the values of the form.
"""

import json
import re
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from flows.platform.run_origin import buffered, looked_up, replayed, rewritten

UPDATES = re.compile(r"(/api/deployments/[0-9a-f-]{36}/schedules)/([0-9a-f-]{36})/?")


class ScheduleUpdates:
    """ASGI middleware in front of Prefect's server: adds the known parameters to updates that name none."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        updated = UPDATES.fullmatch(scope["path"]) if scope["type"] == "http" and scope["method"] == "PATCH" else None
        if updated is None:
            await self.app(scope, receive, send)
            return
        body, read = await buffered(receive)
        asked = _without_parameters(body)
        if asked is not None:
            every = await looked_up(self.app, updated[1], Headers(scope=scope).get("authorization"))
            known = [schedule for schedule in every or [] if schedule["id"] == updated[2]]
            if known:
                scope, read = rewritten(scope, {**asked, "parameters": known[0]["parameters"]})
        await self.app(scope, replayed(read, receive), send)


def _without_parameters(body: bytes | None) -> dict[str, Any] | None:
    """The update, if it names no parameters; else None."""
    try:
        asked: Any = json.loads(body or b"")
    except ValueError:
        return None  # the server says what is wrong
    return asked if isinstance(asked, dict) and asked.get("parameters") is None else None
