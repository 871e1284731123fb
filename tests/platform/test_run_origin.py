"""A run that a page or a program starts gets its origin as a tag; a dry run passes the queue."""

import json
from collections.abc import AsyncIterator
from typing import Any

import anyio
import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from flows.platform.run_origin import LARGEST, RunOrigin

QUEUED, FREE = (f"/api/deployments/00000000-0000-4000-8000-00000000000{end}" for end in "ab")
PLACE = f"{QUEUED}/create_flow_run"
BROWSER = {"User-Agent": "Mozilla/5.0 (X11; Linux x86_64)"}


async def echo(request: Request) -> JSONResponse:
    """The server behind it: what it gets, and the length that the request claims."""
    body = await request.body()
    return JSONResponse({"body": body.decode(), "length": int(request.headers["content-length"])})


async def queue(request: Request) -> JSONResponse:
    """The deployment, for those who know the password."""
    allowed = request.headers.get("authorization") == "Basic secret"
    name = "curricula" if request.url.path == QUEUED else None
    return JSONResponse({"work_queue_name": name} if allowed else "no", status_code=200 if allowed else 401)


@pytest.fixture(scope="module")
def client() -> TestClient:
    places = (PLACE, PLACE + "/", f"{FREE}/create_flow_run", "/api/flow_runs/")
    routes = [Route(place, echo, methods=["POST", "PATCH"]) for place in places]
    return TestClient(RunOrigin(Starlette(routes=[*routes, Route(QUEUED, queue), Route(FREE, queue)])))


def got(client: TestClient, body: Any, place: str = PLACE, **headers: str) -> Any:
    answer = client.post(place, content=json.dumps(body), headers=headers).json()
    assert answer["length"] == len(answer["body"].encode())
    return json.loads(answer["body"])


def test_a_page_and_a_program_are_told_apart(client: TestClient) -> None:
    assert got(client, {}, **BROWSER) == {"tags": ["from: UI"]}
    assert got(client, {"tags": None, "name": "übung"}) == {"tags": ["from: API"], "name": "übung"}
    assert got(client, {"tags": ["a"]}, PLACE + "/", **BROWSER) == {"tags": ["a", "from: UI"]}
    assert got(client, {"tags": ["from: command line"]}, **BROWSER) == {"tags": ["from: command line"]}


def test_a_dry_run_waits_in_no_queue(client: TestClient) -> None:
    asked = {"tags": ["from: UI"], "parameters": {"dry_run": True}}
    known = {"Authorization": "Basic secret"}
    assert got(client, asked, **known) == {**asked, "work_queue_name": "default"}
    assert got(client, asked) == asked  # the server refuses it itself
    assert got(client, asked, f"{FREE}/create_flow_run", **known) == asked  # a deployment of the user's own
    for parameters in ({"dry_run": False}, {"dry_run": "yes"}, {}, None):
        assert got(client, {"tags": ["from: UI"], "parameters": parameters}, **known) == {
            "tags": ["from: UI"],
            "parameters": parameters,
        }


def test_other_and_odd_requests_pass_as_they_are(client: TestClient) -> None:
    assert got(client, {"x": 1}, "/api/flow_runs/", **BROWSER) == {"x": 1}
    for odd in ([1], "text", 3, {"tags": 3}):
        assert got(client, odd, **BROWSER) == odd
    assert got(client, {"parameters": [1]}, **BROWSER) == {"parameters": [1], "tags": ["from: UI"]}
    assert client.post(PLACE, content=b"{not json").json()["body"] == "{not json"
    assert client.patch(PLACE, json={"x": 1}).json()["body"] == '{"x":1}'


async def passed_on(request: Request) -> JSONResponse:
    """The start of the body, whether its first part is the whole, and the number of its bytes."""
    first = await request.receive()
    parts = [first["body"]]
    while first.get("more_body") and (message := await request.receive()):
        parts.append(message.get("body", b""))
        first = message
    return JSONResponse([b"".join(parts)[:40].decode(), len(parts), sum(map(len, parts))])


def sent_in_parts(*parts: bytes) -> Any:
    async def body() -> AsyncIterator[bytes]:
        for part in parts:
            yield part

    async def asked() -> httpx.Response:
        transport = httpx.ASGITransport(RunOrigin(Starlette(routes=[Route(PLACE, passed_on, methods=["POST"])])))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(PLACE, content=body(), headers=BROWSER)

    return anyio.run(asked).json()


def test_a_body_in_parts_is_put_together_up_to_a_limit() -> None:
    noted = json.dumps({"tags": ["a", "from: UI"]})
    assert sent_in_parts(b'{"tags"', b": [", b'"a"]}') == [noted, 1, len(noted)]
    large = [b'{"tags": [], "name": "', *(b"y" * LARGEST,) * 3, b'"}']
    start, count, length = sent_in_parts(*large)
    assert start == '{"tags": [], "name": "' + 18 * "y" and count > 1 and length == sum(map(len, large))
