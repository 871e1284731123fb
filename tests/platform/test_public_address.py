"""The address at which a browser opened Prefect's pages is the one to which they send their requests."""

import json
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from flows.platform.config import PlatformConfig, read_platform
from flows.platform.public_address import UiAddress, host_of
from vectorclm.errors import ConfigError
from vectorclm.settings import validate

PUBLIC = "https://prefect.example.org"


def test_the_pages_of_a_real_server_use_the_tunnel_through_which_they_were_opened(
    shared_prefect: dict[str, str],
) -> None:
    url = shared_prefect["PREFECT_API_URL"].removesuffix("/api")
    port = url.rpartition(":")[2]
    for host, address in ((f"127.0.0.1:{port}", url), ("localhost:9000", "http://localhost:9000")):
        found = httpx.get(f"{url}/ui-settings", headers={"Host": host}).json()
        assert found["api_url"] == f"{address}/api" and found["csrf_enabled"] is not None


@pytest.mark.parametrize(
    ("host", "forwarded", "address"),
    [
        ("127.0.0.1:4200", None, "http://127.0.0.1:4200"),
        ("prefect.example.org", None, PUBLIC),  # a proxy that sends no X-Forwarded-Proto
        ("other.example.org", "https", "https://other.example.org"),
        ("other.example.org", "javascript", "http://other.example.org"),
    ],
)
def test_the_scheme_is_that_of_the_proxy(host: str, forwarded: str | None, address: str) -> None:
    def settings(request: Request) -> Response:
        return JSONResponse({"api_url": "http://127.0.0.1:4200/api", "auth": "BASIC"})

    app = Starlette(routes=[Route("/ui-settings", settings), Route("/other", settings)])
    client = TestClient(UiAddress(app, f"{PUBLIC}/"))
    headers = {"host": host, **({"x-forwarded-proto": forwarded} if forwarded else {})}
    answer = client.get("/ui-settings", headers=headers)
    assert answer.json() == {"api_url": f"{address}/api", "auth": "BASIC"}
    assert answer.headers["content-length"] == str(len(json.dumps(answer.json())))
    assert client.get("/other", headers=headers).json()["api_url"] == "http://127.0.0.1:4200/api"


def test_an_error_of_the_server_stays_an_error() -> None:
    def fails(request: Request) -> Response:
        return Response("no settings", 503)

    client = TestClient(UiAddress(Starlette(routes=[Route("/ui-settings", fails)]), None))
    assert (client.get("/ui-settings").status_code, client.get("/ui-settings").text) == (503, "no settings")


def test_a_public_address_is_allowed_and_stands_in_links() -> None:
    config = PlatformConfig(vectorclm_url=f"{PUBLIC}:8443/", vectorclm_mlflow_url="http://[::1]:9000")
    assert config.allowed_hosts == "prefect.example.org,[::1]"
    environment = config.client_environment()
    assert environment["PREFECT_UI_URL"] == environment["VECTORCLM_URL"] == f"{PUBLIC}:8443"
    assert environment["VECTORCLM_MLFLOW_URL"] == "http://[::1]:9000"
    assert environment["PREFECT_API_URL"] == "http://127.0.0.1:4200/api"  # programs of this machine go directly
    server, mlflow = config.servers()
    assert server.environment["VECTORCLM_ALLOWED_HOSTS"] == mlflow.environment["VECTORCLM_ALLOWED_HOSTS"]
    assert f"{PUBLIC}:8443" in server.environment["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"].split(",")
    assert PlatformConfig().client_environment()["PREFECT_UI_URL"] == "http://127.0.0.1:4200"


@pytest.mark.parametrize("public", [{}, {"VECTORCLM_URL": PUBLIC, "VECTORCLM_MLFLOW_URL": "http://[::1]:9000"}])
def test_a_command_with_the_environment_of_a_worker_reads_the_same_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, public: dict[str, str]
) -> None:
    """Else doctor would refuse the platform as one with other settings."""
    for name in ("VECTORCLM_URL", "VECTORCLM_MLFLOW_URL", "VECTORCLM_STORE", "VECTORCLM_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in public.items():
        monkeypatch.setenv(name, value)
    first = read_platform(None, vectorclm_store=str(tmp_path))
    for name, value in first.client_environment().items():
        monkeypatch.setenv(name, value)
    again = read_platform(None)
    assert [one.environment for one in again.servers()] == [one.environment for one in first.servers()]


@pytest.mark.parametrize(
    "url", ["prefect.example.org", "ftp://example.org", f"{PUBLIC}/prefect", "https://me:secret@example.org", "http://"]
)
def test_what_is_not_the_address_of_a_host_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"an address such as https://prefect\.example\.org"):
        host_of(url)
    with pytest.raises(ConfigError, match="address such as https") as refused:
        validate(PlatformConfig, {"vectorclm_url": url}, "platform settings")
    assert "secret" not in str(refused.value)
