"""What `doctor --security` says of real small servers: a healthy one is well, each planted defect is named."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr
from rich.console import Console

from flows.net import answers, free_port
from flows.platform import security_checks
from flows.platform.config import PlatformConfig
from flows.platform.machine_checks import Finding
from flows.platform.process import PREFECT, Service

CANARY = "canary-0123456789"
# HOST PORT asks guarded: a server with a password or none, behind the guard of the platform or not.
SERVER = """
import sys, uvicorn
from starlette.responses import PlainTextResponse
from vectorclm.inference.guard import LOOPBACK, Guard
host, port, asks, guarded = sys.argv[1:5]
async def app(scope, receive, send):
    if scope["type"] == "http":
        needed = asks == "asks" and scope["path"] != "/health"
        await PlainTextResponse("x", 401 if needed else 200)(scope, receive, send)
uvicorn.run(Guard(app, LOOPBACK) if guarded == "guarded" else app, host=host, port=int(port), lifespan="off")
"""


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[Service]]:
    services: list[Service] = []
    yield services
    for service in services:
        service.stop()


def serve(
    started: list[Service], folder: Path, words: Iterable[str] = ("127.0.0.1", "asks", "guarded"), *more: str
) -> Service:
    port, (host, asks, guarded) = free_port(), words
    command = [sys.executable, "-c", SERVER, host, str(port), asks, guarded, *more]
    service = Service(PREFECT, command, {"MY_TOKEN": CANARY}, folder / "platform", port)
    started.append(service)
    service.start()
    while not answers(f"http://127.0.0.1:{port}/health"):
        assert service.process() is not None, service.log.read_text()
    return service


def said(findings: Iterable[Finding]) -> tuple[list[str], list[str]]:
    """What is well, and what is open."""
    found = list(findings)
    return [each.what for each in found if each.good], [each.what for each in found if not each.good]


def test_a_healthy_server_is_well(started: list[Service], tmp_path: Path) -> None:
    service, config = serve(started, tmp_path), PlatformConfig(vectorclm_store=str(tmp_path))
    secrets = security_checks.secrets_of(config, [service])
    assert secrets["MY_TOKEN"] == CANARY
    good, wrong = said(
        [
            *security_checks.addresses(service),
            *security_checks.requests(service),
            *security_checks.modes(tmp_path, None),
            *security_checks.arguments([service], secrets),
            *security_checks.links(security_checks.addresses_of(config, [service])),
        ]
    )
    assert wrong == []
    assert f"{PREFECT} listens on 127.0.0.1:{service.port}" in good
    assert [line.rpartition(" ")[2] for line in good if "refuses a request" in line] == ["password", "Host", "Origin"]
    assert any("1 folders and 2 files" in line for line in good)  # its log and its record


def test_each_planted_defect_of_a_server_is_named(started: list[Service], tmp_path: Path) -> None:
    service = serve(started, tmp_path, ("0.0.0.0", "open", "bare"), f"--password={CANARY}")
    secrets = security_checks.secrets_of(PlatformConfig(vectorclm_store=str(tmp_path)), [service])
    (wide,) = said(security_checks.addresses(service))[1]
    assert f"listens on 0.0.0.0:{service.port}" in wide and "`vectorclm up`" in wide
    tried = said(security_checks.requests(service))[1]
    assert len(tried) == 3 and "without a password (200)" in tried[0] and "PREFECT_AUTH=none" in tried[0]
    assert "foreign Host (200)" in tried[1] and "foreign Origin (200)" in tried[2]
    (visible,) = said(security_checks.arguments([service], secrets))[1]
    assert "MY_TOKEN" in visible and CANARY not in visible
    assert f"process {service.process().pid} " in visible  # type: ignore[union-attr]


def test_files_that_others_can_read_are_named_with_the_command_that_closes_them(tmp_path: Path) -> None:
    (tmp_path / "platform").mkdir(mode=0o700)
    secrets = [tmp_path / "platform" / "prefect.env", tmp_path / "mlflow.db", tmp_path / "settings.env"]
    for file in secrets:
        file.touch(mode=0o600)
        file.chmod(0o600)
    assert said(security_checks.modes(tmp_path, secrets[2]))[1] == []
    for path, planted, right in [*((file, 0o644, "600") for file in secrets), (tmp_path / "platform", 0o755, "700")]:
        before = path.stat().st_mode
        path.chmod(planted)
        (line,) = said(security_checks.modes(tmp_path, secrets[2]))[1]
        assert f"`chmod {right} {path}`" in line and f"mode {planted:o}" in line
        path.chmod(before)


def test_plain_http_to_another_machine_is_named_without_its_address(tmp_path: Path) -> None:
    known = {"vectorclm_store": str(tmp_path), "vectorclm_notify": SecretStr("webhook:http://chat.example.org/s3cr3t")}
    urls = security_checks.addresses_of(PlatformConfig.model_validate(known), [])
    (line,) = said(security_checks.links(urls))[1]
    assert line.startswith("VECTORCLM_NOTIFY") and "s3cr3t" not in line
    near = {"A": "http://127.0.0.1:9", "B": "http://[::1]:9", "C": "https://example.org", "D": "http://localhost"}
    assert said(security_checks.links(near))[1] == []
    assert len(said(security_checks.links({"A": "http://10.0.0.1", "B": "http://0.0.0.0:1"}))[1]) == 2


def test_where_no_platform_runs_the_command_says_so_and_is_not_well(tmp_path: Path) -> None:
    console = Console(record=True, width=200)
    assert not security_checks.security(PlatformConfig(vectorclm_store=str(tmp_path)), None, console)
    assert f"no platform ran in {tmp_path}" in console.export_text()
    assert list(tmp_path.iterdir()) == []
