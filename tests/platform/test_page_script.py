"""A script stands first in the pages at some paths, once; all else passes as it is."""

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from flows.platform.page_script import PageScript, asks_first

PAGE = "<!doctype html><html><head><title>MLflow</title></head><body>no <head> here</body></html>"
SCRIPT = "<script>try{later()}catch(error){}</script>"
seen: list[dict[str, str]] = []


async def first(request: Request) -> Response:
    seen.append(dict(request.headers))
    if "if-none-match" in request.headers:
        return Response(status_code=304)
    headers = {"etag": "x", "last-modified": "yesterday", "x-kept": "yes"}
    if "parts" in request.query_params:
        return StreamingResponse((part async for part in parts()), headers=headers, media_type="text/html")
    return HTMLResponse(PAGE, headers=headers)


async def parts():  # type: ignore[no-untyped-def]
    yield PAGE[:20]
    yield PAGE[20:]


async def echo(request: Request) -> Response:
    return PlainTextResponse(PAGE, headers={"etag": "y"})


@pytest.fixture
def pages() -> TestClient:
    routes = [Route("/", first), Route("/", echo, methods=["POST"]), Route("/other", echo), Route("/plain", echo)]
    return TestClient(
        PageScript(Starlette(routes=routes), "later()", lambda path: path in ("/", "/plain")),
        base_url="http://localhost",
    )


@pytest.mark.parametrize("address", ["/", "/?parts"])
def test_the_first_page_has_the_script_once_and_its_own_length(pages: TestClient, address: str) -> None:
    found: httpx.Response = pages.get(address)
    assert found.text == PAGE.replace("<head>", f"<head>{SCRIPT}", 1)
    assert found.headers["content-length"] == str(len(found.content)) and found.headers["x-kept"] == "yes"
    assert not {"etag", "last-modified"} & set(found.headers)


def test_a_page_that_the_browser_knows_is_sent_again(pages: TestClient) -> None:
    """Else a browser that kept the page of an earlier version would show that."""
    found = pages.get("/", headers={"If-None-Match": "x", "Range": "bytes=0-9"})
    assert found.status_code == 200 and SCRIPT in found.text
    assert not {"if-none-match", "range"} & set(seen[-1])


def test_other_answers_pass_as_they_are(pages: TestClient) -> None:
    for found in (pages.get("/other"), pages.get("/plain"), pages.post("/")):
        assert (found.text, found.headers["etag"]) == (PAGE, "y")


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/", True),
        ("/runs/flow-run/0e5a", True),
        ("/login", True),  # where the script does nothing
        ("/v2/runs", False),
        ("/api/health", False),
        ("/assets/index.js", False),
        ("/favicon.ico", False),
        ("/ui-settings", True),  # JSON, which passes as it is
    ],
)
def test_the_paths_of_the_old_page_of_prefect(path: str, found: bool) -> None:
    assert asks_first(path) is found
