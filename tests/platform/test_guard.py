"""Web pages that attack this machine's servers, in a real browser: nothing runs, and nothing is read.

Each script that fails from a page of another origin works from the server's own: that is what shows that it attacks.
"""

import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import SyncPrefectClient
from pydantic import SecretStr
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver

from flows.net import free_port
from flows.platform import password
from flows.platform.config import PlatformConfig
from flows.platform.prefect_server import PrivateServer
from flows.platform.process import Service
from tests.conftest import chromium, one_of
from tests.services.browser import says
from tests.services.platform import until
from vectorclm.inference import serve

EVIL = "evil.test"  # a name that the browser takes for this machine, as after DNS rebinding
KEY = "a-key-of-this-test-0123"

# Starts a program by each way that a page has, and reads by each; what came of it.
ATTACK_PREFECT = """
const [base, id, done] = arguments, api = base + "/api", out = {};
const start = api + "/deployments/" + id + "/create_flow_run", mine = Math.random().toString(36).slice(2);
const settle = (name, promise) => promise.then(value => out[name] = value, error => out[name] = "refused");
const text = response => response.type === "opaque" ? "refused" : response.ok ? response.text() : "refused";
const frame = document.body.appendChild(Object.assign(document.createElement("iframe"), { name: mine }));
const form = document.body.appendChild(Object.assign(document.createElement("form"),
  { action: start, method: "post", enctype: "text/plain", target: mine }));
form.append(Object.assign(document.createElement("input"),
  { name: '{"name": "form", "parameters": {"x": "', value: '"}}' }));
const socket = protocols => new Promise(heard => {
  const ws = new WebSocket(api.replace("http", "ws") + "/events/out", protocols);
  ws.onopen = () => ws.send(JSON.stringify({ type: "auth", token: null }));
  ws.onmessage = ({ data }) => {
    if (JSON.parse(data).type === "auth_success") ws.send(JSON.stringify({ type: "filter", filter: {} }));
    else { heard(data); ws.close(); }
  };
  ws.onclose = () => heard("refused");
});
(async () => {
  const json = { "Content-Type": "application/json" }, told = api + "/csrf-token?client=" + mine;
  const untyped = { method: "POST", mode: "no-cors", body: new Blob(['{"name": "blob"}']) };
  await settle("blob", fetch(start, untyped).then(text));
  form.submit();
  await new Promise(loaded => { frame.onload = loaded; setTimeout(loaded, 3000); });
  await settle("token", fetch(told).then(text));
  const token = out.token === "refused" ? "" : JSON.parse(out.token).token;
  const headers = { ...json, "Prefect-Csrf-Client": mine, "Prefect-Csrf-Token": token };
  await settle("json", fetch(start, { method: "POST", headers, body: '{"name": "json"}' }).then(text));
  await settle("runs", fetch(api + "/flow_runs/filter", { method: "POST", headers, body: "{}" }).then(text));
  await settle("page", fetch(base + "/ui-settings").then(text));
  await settle("events", socket(["prefect"]));
  done(out);
})();
"""
ATTACK_MLFLOW = """
const [base, _, done] = arguments, api = base + "/api/2.0/mlflow/experiments/", out = {};
const text = response => response.type === "opaque" ? "refused" : response.ok ? response.text() : "refused";
const settle = (name, promise) => promise.then(value => out[name] = value, error => out[name] = "refused");
const json = { "Content-Type": "application/json" }, credentials = "include";
(async () => {
  const untyped = { method: "POST", mode: "no-cors", body: new Blob(['{"name": "blob"}']) };
  await settle("blob", fetch(api + "create", untyped).then(text));
  const typed = { method: "POST", headers: json, credentials, body: '{"name": "json"}' };
  await settle("json", fetch(api + "create", typed).then(text));
  await settle("read", fetch(api + "search?max_results=9", { credentials }).then(text));
  done(out);
})();
"""
ATTACK_CHAT = """
const [base, key, done] = arguments, out = {};
const text = response => response.type === "opaque" ? "refused" : response.ok ? response.text() : "refused";
const settle = (name, promise) => promise.then(value => out[name] = value, error => out[name] = "refused");
(async () => {
  await settle("page", fetch(base + "/").then(text));
  await settle("models", fetch(base + "/v1/models", { headers: { Authorization: "Bearer " + key } }).then(text));
  done(out);
})();
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[WebDriver]:
    window = chromium(900, 700, arguments=[f"--host-resolver-rules=MAP {EVIL} 127.0.0.1"])
    window.set_script_timeout(60)
    yield window
    window.quit()


@pytest.fixture(scope="module")
def stranger() -> Iterator[int]:
    """The port of another program of this machine, which serves a page."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>another page</title><body>")

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()


@dataclass
class Target:
    """A server, a script that attacks it, and what the script did there."""

    url: str
    script: str
    known: str  # what the attacker knows already
    done: Callable[[], list[str]]


def prefect_target(url: str, auth: str | None) -> Target:
    """A Prefect server with a deployment, whose id is known."""
    with SyncPrefectClient(f"{url}/api", auth_string=auth) as client:
        flow_id = client.create_flow_from_name("curriculum")
        deployment_id = client.create_deployment(flow_id, "curriculum")

    def names() -> list[str]:
        with SyncPrefectClient(f"{url}/api", auth_string=auth) as client:
            return sorted(run.name for run in client.read_flow_runs())

    return Target(url, ATTACK_PREFECT, str(deployment_id), names)


@dataclass
class Servers:
    """All of them, as the product starts them."""

    targets: Mapping[str, Target]
    services: list[Service]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, chat_folder: Path) -> Iterator[Servers]:
    folder, before = tmp_path_factory.mktemp("guard"), dict(os.environ)
    places = {"prefect_port": free_port(), "mlflow_port": free_port()}
    config = PlatformConfig(vectorclm_store=str(folder / "on"), **places)
    password.ensure(config.home, f"{config.prefect_url}/api")
    off = PlatformConfig(
        vectorclm_store=str(folder / "off"), prefect_port=free_port(), prefect_auth=SecretStr(password.OFF)
    )
    services = [*config.servers(), off.servers()[0]]
    private, port = PrivateServer(folder / "private"), free_port()
    command = [sys.executable, "-m", "vectorclm", "serve", str(chat_folder), "--port", str(port)]
    chat = subprocess.Popen(command, env={**os.environ, serve.KEY: KEY}, stdout=subprocess.PIPE, text=True)
    try:
        for service in services:
            service.start()
        private.start()
        private.wait()
        auth = os.environ["PREFECT_API_AUTH_STRING"]
        os.environ.clear()
        os.environ.update(before)
        for service in services:
            service.wait()
        assert chat.stdout is not None and "http://127.0.0.1" in chat.stdout.readline()
        mlflow = MlflowClient(config.mlflow_url)
        experiments = lambda: sorted(one.name for one in mlflow.search_experiments())  # noqa: E731
        targets = {
            "prefect": prefect_target(config.prefect_url, config.prefect_password),
            "prefect without a password": prefect_target(off.prefect_url, None),
            "private prefect": prefect_target(private.url.removesuffix("/api"), auth),
            "mlflow": Target(config.mlflow_url, ATTACK_MLFLOW, "", experiments),
            "chat": Target(f"http://127.0.0.1:{port}", ATTACK_CHAT, KEY, list),
        }
        yield Servers(targets, services)
    finally:
        os.environ.clear()
        os.environ.update(before)
        private.stop()
        chat.terminate()
        chat.wait()
        for service in services:
            service.stop()


def _password(servers: Servers) -> str:
    """User and password of Prefect, as its file has them."""
    lines = (servers.services[0].folder / "prefect.env").read_text().splitlines()
    return next(line.partition("=")[2].strip("\"'") for line in lines if "AUTH_STRING=" in line)


NAMES = ("prefect", "prefect without a password", "private prefect", "mlflow", "chat")


@pytest.mark.parametrize("name", NAMES)
def test_another_page_runs_nothing_and_reads_nothing(
    servers: Servers, browser: WebDriver, stranger: int, name: str
) -> None:
    target = servers.targets[name]
    before = target.done()
    port = target.url.rpartition(":")[2]
    places = [
        (f"http://127.0.0.1:{stranger}/", target.url),
        (f"http://localhost:{stranger}/", target.url),
        (f"http://localhost:{stranger}/", f"http://localhost:{port}"),
        (f"http://{EVIL}:{stranger}/", target.url),
        (f"http://{EVIL}:{port}/", f"http://{EVIL}:{port}"),  # its name means this machine by now
        ("data:text/html,<body>", target.url),
    ]
    for page, aim in places:
        browser.get(page)
        found = browser.execute_async_script(target.script, aim, target.known)
        assert found and set(found.values()) == {"refused"}, (page, aim, found)
    assert target.done() == before


@pytest.mark.parametrize("name", one_of(["mlflow", "chat", "prefect without a password"]))
def test_the_server_s_own_page_may(servers: Servers, browser: WebDriver, name: str) -> None:
    target = servers.targets[name]
    ways = {"prefect without a password": {"json", "runs", "events"}, "mlflow": {"read"}}
    expected = ways.get(name, {"page", "models"})
    for host in ("127.0.0.1", "localhost"):
        address = target.url.replace("127.0.0.1", host)
        browser.get(f"http://{host}:{target.url.rpartition(':')[2]}/")
        for _ in range(3):  # SQLite may be locked by the server's own loops for a moment
            found = browser.execute_async_script(target.script, address, target.known)
            if expected <= {way for way, what in found.items() if what != "refused"}:
                break
        else:
            pytest.fail(f"{name} at {host}: {found}")
    assert "json" in target.done() or name == "chat"


def test_a_link_to_a_run_asks_for_the_password_and_leads_to_the_run(servers: Servers, browser: WebDriver) -> None:
    """As a mail has it, in a browser that was never here."""
    url, secret = servers.targets["prefect"].url, _password(servers)
    with SyncPrefectClient(f"{url}/api", auth_string=secret) as client:
        deployment = client.read_deployment_by_name("curriculum/curriculum")
        run = client.create_flow_run_from_deployment(deployment.id, name="the run of the link")
    browser.get(f"{url}/runs/flow-run/{run.id}?tab=Logs")
    asked = until(lambda: browser.find_elements(By.CSS_SELECTOR, "input[type='password']"), "it asks", 60)[0]
    asked.send_keys(secret, Keys.ENTER)
    until(lambda: says(browser, run.name), "the page of the run", 60)
    assert browser.current_url == f"{url}/runs/flow-run/{run.id}?tab=Logs"


def test_the_password_is_in_no_command_line_and_in_no_log(servers: Servers) -> None:
    folder = servers.services[0].folder
    file = folder / "prefect.env"
    secret = _password(servers).rpartition(":")[2]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and len(secret) > 24
    for process in psutil.process_iter(["cmdline"]):
        assert not any(secret in word for word in process.info["cmdline"] or [])
    others = [path for path in folder.parent.rglob("*") if path.is_file() and path != file]
    assert len(others) > 3
    assert [path for path in others if secret.encode() in path.read_bytes()] == []


def test_a_program_that_is_refused_a_change_reads_what_to_send_and_succeeds_with_it(servers: Servers) -> None:
    url, auth = servers.targets["prefect"].url, _password(servers)
    place, user = f"{url}/api/flows/filter", httpx.BasicAuth(*auth.split(":", 1))
    refused = httpx.post(place, json={}, auth=user)
    assert refused.status_code == 403 and "Missing CSRF token: " in refused.text and "prefect api POST" in refused.text
    given = httpx.get(f"{url}/api/csrf-token?client=me", auth=user).json()["token"]
    headers = {"Prefect-Csrf-Client": "me", "Prefect-Csrf-Token": given}
    assert httpx.post(place, json={}, auth=user, headers=headers).status_code == 200
    wrong = httpx.post(place, json={}, auth=user, headers={**headers, "Prefect-Csrf-Token": "other"})
    assert wrong.status_code == 403 and "Prefect-Csrf-Client: NAME" in wrong.text
    command = [sys.executable, "-m", "prefect", "api", "POST", "/flows/filter", "--data", "{}"]
    known = {"PREFECT_API_URL": f"{url}/api", "PREFECT_API_AUTH_STRING": auth}
    done = subprocess.run(
        command, env={**os.environ, **known}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0 and '"name": "curriculum"' in done.stdout, done.stderr
