"""Say in Prefect's refusals (401, and 403 for a missing CSRF token) what a program such as curl has to send."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

UNAUTHORIZED, FORBIDDEN = 401, 403
PASSWORD = (
    'this server asks for its user and password: curl --user "$PREFECT_API_AUTH_STRING"; that of a platform is in '
    "platform/prefect.env of its home, which `set -a; . FILE; set +a` loads into a shell"
)
TOKEN = (
    "a POST, PUT, PATCH or DELETE needs a token: `prefect api POST PATH --data JSON` sends one by itself; for curl, "
    "GET /api/csrf-token?client=NAME has one, to be sent as the header Prefect-Csrf-Token beside "
    "Prefect-Csrf-Client: NAME"
)
OF_TOKENS = ("Missing CSRF token", "Missing client identifier", "Invalid CSRF token")


class Refusals:
    """ASGI middleware in front of Prefect's server: adds to the detail of a refusal what to do."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused: Message = {}
        body = b""

        async def send_explained(message: Message) -> None:
            nonlocal refused, body
            if message["type"] == "http.response.start" and message["status"] in (UNAUTHORIZED, FORBIDDEN):
                refused = message
            elif not refused or message["type"] != "http.response.body":
                await send(message)
            else:
                body += message.get("body", b"")
                if not message.get("more_body", False):
                    await _send_whole(refused, explained(refused["status"], body), send)

        await self.app(scope, receive, send_explained if scope["type"] == "http" else send)


async def _send_whole(start: Message, body: bytes, send: Send) -> None:
    headers = MutableHeaders(raw=list(start.get("headers", [])))
    headers["content-length"] = str(len(body))
    await send({**start, "headers": headers.raw})
    await send({"type": "http.response.body", "body": body})


def explained(status: int, body: bytes) -> bytes:
    """The JSON body of a refusal, with what to do in its detail; any other body as it is."""
    try:
        answer: Any = json.loads(body)
    except ValueError:
        return body
    if not isinstance(answer, Mapping):
        return body
    detail = str(answer.get("detail", ""))
    if status == UNAUTHORIZED and answer.get("exception_message") == "Unauthorized":
        return json.dumps({**answer, "detail": PASSWORD}).encode()
    if status == FORBIDDEN and detail.startswith(OF_TOKENS):
        return json.dumps({**answer, "detail": f"{detail.rstrip('.')}: {TOKEN}"}).encode()
    return body
