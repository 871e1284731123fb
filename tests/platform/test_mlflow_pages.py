"""MLflow's first page sets what a user has not chosen, such as the view for training."""

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from flows.platform.mlflow_pages import CHOICES, training_pages


async def page(request: Request) -> Response:
    return HTMLResponse("<html><head></head></html>")


def test_the_first_page_alone_sets_the_choices() -> None:
    app = training_pages(Starlette(routes=[Route("/", page), Route("/other", page)]))
    client = TestClient(app, base_url="http://localhost")
    assert all(key in client.get("/").text for key in CHOICES)
    assert "script" not in client.get("/other").text
