"""Show the reports of finished curricula at `/reports/…` of Prefect's server, behind the same password."""

import base64
import re
import secrets

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from vectorclm.errors import StoreError
from vectorclm.store.artifact import Store

PAGE = re.compile(r"/(reports/[0-9a-f]{64}\.html)")
HEADERS = {
    "Content-Security-Policy": "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class ReportPages:
    """ASGI middleware: answers GET `/reports/<fingerprint>.html` from the store, all else from `app`."""

    def __init__(self, app: ASGIApp, store: Store, password: str | None) -> None:
        self.app, self.store, self.password = app, store, password

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/reports/"):
            await self.app(scope, receive, send)
            return
        response = await self._answer(scope["method"], scope["path"], Headers(scope=scope))
        await response(scope, receive, send)

    async def _answer(self, method: str, path: str, headers: Headers) -> Response:
        if method not in ("GET", "HEAD"):
            return PlainTextResponse("reports are read only\n", 405)
        if not self._knows(headers.get("authorization", "")):
            asked = {"WWW-Authenticate": 'Basic realm="VectorCLM: user and password of Prefect", charset="UTF-8"'}
            return PlainTextResponse("give the user and password of Prefect\n", 401, asked)
        if (match := PAGE.fullmatch(path)) is None:
            return PlainTextResponse("no such report\n", 404)
        try:
            page = await run_in_threadpool(self.store.read, match[1])
        except (StoreError, OSError) as error:
            return PlainTextResponse(f"the store does not answer: {error}\n", 503)
        return PlainTextResponse("no such report\n", 404) if page is None else HTMLResponse(page, headers=HEADERS)

    def _knows(self, authorization: str) -> bool:
        if self.password is None:
            return True
        kind, _, given = authorization.partition(" ")
        expected = base64.b64encode(self.password.encode())
        return kind.lower() == "basic" and secrets.compare_digest(given.strip().encode(), expected)
