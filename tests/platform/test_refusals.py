"""A program that Prefect refuses reads what it has to send: from Prefect's own server and its own check of tokens."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prefect.server.api.middleware import CsrfMiddleware
from prefect.settings import PREFECT_SERVER_CSRF_PROTECTION_ENABLED, temporary_settings
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket

from flows.platform.refusals import PASSWORD, TOKEN, Refusals, explained


def test_who_sends_no_password_or_a_wrong_one_reads_where_it_is(shared_prefect: dict[str, str]) -> None:
    url = f"{shared_prefect['PREFECT_API_URL']}/flow_runs/filter"
    for auth in (None, ("admin", "wrong")):
        answer = httpx.post(url, json={}, auth=auth)
        assert answer.status_code == 401
        assert answer.json() == {"exception_message": "Unauthorized", "detail": PASSWORD}
    user, _, password = shared_prefect["PREFECT_API_AUTH_STRING"].partition(":")
    assert httpx.post(url, json={"limit": 0}, auth=(user, password)).status_code == 200


async def answer(request: Request) -> Response:
    kinds: dict[str, Response] = {
        "text": PlainTextResponse("no", 403),
        "list": JSONResponse(["no"], 401),
        "other": JSONResponse({"detail": "not yours"}, 403),
        "parts": StreamingResponse(iter((b'{"exception_message": ', b'"Unauthorized"}')), 401),
    }
    return kinds.get(request.path_params["kind"], PlainTextResponse("done"))


async def echo(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.send_text("heard")
    await websocket.close()


@pytest.fixture
def client() -> Iterator[TestClient]:
    """A server with Prefect's check of tokens, behind the middleware."""
    routes = [Route("/{kind}", answer, methods=["GET", "POST"]), WebSocketRoute("/ws", echo)]
    checked = Starlette(routes=routes, middleware=[Middleware(CsrfMiddleware)])
    with temporary_settings({PREFECT_SERVER_CSRF_PROTECTION_ENABLED: True}):
        yield TestClient(Refusals(checked))


def test_a_change_without_a_token_is_told_how_to_get_one(client: TestClient) -> None:
    for headers, begins in (({}, "Missing CSRF token"), ({"Prefect-Csrf-Token": "x"}, "Missing client identifier")):
        refused = client.post("/x", headers=headers)
        assert refused.status_code == 403 and refused.json() == {"detail": f"{begins}: {TOKEN}"}
    assert explained(403, b'{"detail": "Invalid CSRF token or client identifier."}').endswith(f'{TOKEN}"}}'.encode())


@pytest.mark.parametrize(
    ("kind", "status", "text"),
    [("text", 403, "no"), ("list", 401, '["no"]'), ("other", 403, '{"detail":"not yours"}'), ("x", 200, "done")],
)
def test_other_answers_stay_as_they_are(client: TestClient, kind: str, status: int, text: str) -> None:
    found = client.get(f"/{kind}")
    assert (found.status_code, found.text) == (status, text)
    assert int(found.headers["content-length"]) == len(text)


def test_a_refusal_in_parts_is_explained_and_a_websocket_passes(client: TestClient) -> None:
    found: Any = client.get("/parts").json()
    assert found == {"exception_message": "Unauthorized", "detail": PASSWORD}
    with client.websocket_connect("/ws") as socket:
        assert socket.receive_text() == "heard"
