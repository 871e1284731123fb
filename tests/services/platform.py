"""A real platform for tests: `vectorclm up` on ports of its own, in a temporary store; `down` after the block."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import psutil
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import ArtifactFilter, FlowRunFilter, LogFilter
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from flows.form import completed
from flows.net import free_port
from flows.platform.autostart import unit
from flows.platform.config import PlatformConfig, read_platform
from flows.platform.options import PlatformOptions
from flows.platform.server_services import LoopError, loop_errors
from tests.services import prefect_database

WAIT = 400  # seconds; a bound for a machine under load, nothing is measured by it

T = TypeVar("T")


def until(found: Callable[[], T], what: str, seconds: float = WAIT) -> T:
    """The first true value of `found`, asked twice a second."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.5)
    return value


def clean() -> dict[str, str]:
    """The environment without what names a platform."""
    named = ("PREFECT_", "MLFLOW_", "VECTORCLM_STORE", "VECTORCLM_HOME")
    return {key: value for key, value in os.environ.items() if not key.startswith(named)}


@dataclass
class Platform:
    """A running platform and how to talk to it."""

    config: PlatformConfig
    options: list[str]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)  # further settings of every command
    client: SyncPrefectClient = dataclasses.field(init=False)  # once it is up
    broken: bool = False

    @property
    def server_log(self) -> Path:
        return self.config.home / "platform" / "prefect-server.log"

    def check_log(self) -> None:
        """No loop of the server logged an error and no event was lost, before a test broke what the loops need."""
        if not self.broken:
            errors = [error for error in loop_errors(self.server_log.read_text()) if not is_repeated(error)]
            lost = [path.read_text() for path in (self.config.home / ".prefect" / "dlq").glob("*")]
            assert (errors, lost) == ([], [])

    def breaks(self) -> None:
        """From now on the loops may log errors: the test takes away what they need."""
        self.check_log()
        self.broken = True

    @contextmanager
    def addressed(self) -> Iterator[None]:
        """Have Prefect's functions talk to it while the block runs."""
        environment = self.config.client_environment()
        settings = {PREFECT_API_URL: environment["PREFECT_API_URL"]}
        with temporary_settings({**settings, PREFECT_API_AUTH_STRING: environment["PREFECT_API_AUTH_STRING"]}):
            yield

    def command(
        self, *arguments: str, environment: Mapping[str, str] | None = None
    ) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "flows.cli", *arguments, *self.options]
        known = clean() | dict(self.environment) | dict(environment or {})
        return subprocess.run(command, env=known, capture_output=True, text=True, timeout=280, check=False)

    def start(self, deployment_name: str = "curriculum/tiny", name: str | None = None, **parameters: Any) -> UUID:
        """Start a deployment as its form does, with these changes of the experiment's values."""
        deployment = self.client.read_deployment_by_name(deployment_name)
        wanted = completed(deployment.parameters, parameters)
        return self.client.create_flow_run_from_deployment(deployment.id, parameters=wanted, name=name).id

    def run(self, run_id: UUID) -> FlowRun:
        return self.client.read_flow_run(run_id)

    def ended(self, run_id: UUID) -> str:
        """The name of the state that the run ends in."""

        def final() -> str:
            state = self.run(run_id).state
            return state.name if state is not None and state.is_final() else ""

        return until(final, f"run {run_id} ends")

    def overview(self, run_id: UUID) -> str:
        """The text of the overview of a run."""
        mine = {"flow_run_id": {"any_": [run_id]}, "key": {"any_": ["overview"]}}
        found = self.client.read_artifacts(artifact_filter=ArtifactFilter.model_validate(mine))
        return str(max(found, key=lambda artifact: str(artifact.created)).data) if found else ""

    def log(self, run_id: UUID) -> list[str]:
        """The lines of the log of a run, oldest first."""
        mine = LogFilter.model_validate({"flow_run_id": {"any_": [run_id]}})
        lines = self.client.read_logs(log_filter=mine, limit=200)
        return [line.message for line in sorted(lines, key=lambda line: line.timestamp)]

    def resumptions(self, run_id: UUID) -> int:
        """How often the log of a run says that a training goes on."""
        return sum("goes on from step" in line for line in self.log(run_id))

    def tasks(self, run_id: UUID) -> dict[str, list[str]]:
        """State names of each stage's task runs, oldest first."""
        found: dict[str, list[str]] = {}
        runs = self.client.read_task_runs(flow_run_filter=FlowRunFilter.model_validate({"id": {"any_": [run_id]}}))
        for task in sorted(runs, key=lambda run: run.created or run.expected_start_time):
            found.setdefault(task.name, []).append(task.state_name or "")
        return found


def listening(platform: Platform) -> dict[str, set[str]]:
    """The addresses on which each service and its processes wait for others."""
    found: dict[str, set[str]] = {}
    for service in [*platform.config.servers(), *platform.config.workers()]:
        main = service.process()
        assert main is not None
        for process in (main, *main.children(recursive=True)):
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    found.setdefault(service.name, set()).add(connection.laddr.ip)
    return found


def is_repeated(error: LoopError) -> bool:
    """Whether Prefect hands the message of this error to its loop again; what is lost even so is kept in `dlq`.

    Transactions of Prefect begin DEFERRED. If one reads, another one writes, and the first writes then, SQLite refuses
    that at once, whatever the busy timeout. Prefect has no setting that begins them IMMEDIATE. Events that come again
    and are all written already make an empty INSERT, which fails and loses nothing.
    """
    if error.loop == "prefect.server.events.services.event_persister":
        return "NOT NULL constraint failed: events.occurred" in error.message
    return error.loop == "prefect.server.utilities.messaging.memory" and "database is locked" in error.message


def unit_command(text: str, key: str) -> list[str]:
    """The words of a command in a systemd unit, read as systemd reads them."""
    (line,) = re.findall(rf"^{key}=(.*)$", text, re.MULTILINE)
    return [word.replace("$$", "$").replace("%%", "%") for word in shlex.split(line)]


def run_of_unit(config: PlatformConfig, key: str) -> "subprocess.CompletedProcess[str]":
    """Run a command of the unit of a platform as written, in the environment that systemd gives to a user's units."""
    options = PlatformOptions(config.vectorclm_store, None, config.prefect_port, config.mlflow_port)
    text = unit(config, options)
    (folder,) = re.findall("^WorkingDirectory=(.*)$", text, re.MULTILINE)
    known = {name: os.environ[name] for name in ("HOME", "PATH", "TMPDIR") if name in os.environ}
    command = unit_command(text, key)
    return subprocess.run(command, env=known, cwd=folder, capture_output=True, text=True, timeout=280, check=False)


@contextmanager
def platform_at(place: Path, by_unit: bool = False, new_database: bool = False, **settings: str) -> Iterator[Platform]:
    """A platform, up while the block runs; then nothing of it is left. `place`: its settings file, or its store.

    `by_unit`: it is started and stopped by the commands of its systemd unit. `new_database`: Prefect makes its own.
    """
    if place.suffix == ".env":
        config, options = read_platform(place), ["--env-file", str(place)]
    else:
        config = PlatformConfig(
            vectorclm_store=str(place), prefect_port=free_port(), mlflow_port=free_port(), **settings
        )
        options = ["--store", str(place), "--prefect-port", str(config.prefect_port)]
        options += ["--mlflow-port", str(config.mlflow_port)]
        if not new_database:
            prefect_database.prepare(config.home / ".prefect")
    made = Platform(config, options, {name.upper(): value for name, value in settings.items()})
    try:
        done = run_of_unit(config, "ExecStart") if by_unit else made.command("up")
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{config.prefect_url}/deployments/deployment/" in done.stdout
        assert config.prefect_password is not None and config.prefect_password not in done.stdout  # a log, as here
        with SyncPrefectClient(f"{config.prefect_url}/api", auth_string=config.prefect_password) as client:
            made.client = client
            yield made
        made.check_log()
    finally:
        done = run_of_unit(config, "ExecStop") if by_unit else made.command("down")
    assert not by_unit or done.returncode == 0, done.stdout + done.stderr
    lines = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert [line for line in lines if str(config.home) in line] == []
