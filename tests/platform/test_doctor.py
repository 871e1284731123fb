"""`vectorclm doctor`, for real: what it sees inside Prefect's server, and that it touches no platform but its own."""

import os
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
from prefect import task
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Running, Scheduled

from flows.net import free_port
from flows.platform import server_services
from flows.platform.process import listens
from flows.platform.server_services import PROBE, RELIED, failing_loops, findings, loop_errors, probe, switched_off
from tests.services.platform import WAIT, Platform, clean, platform_at, until


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with platform_at(tmp_path_factory.mktemp("doctor") / "store") as made:
        yield made


def doctor_of(*options: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    """`vectorclm doctor` of other settings than those of the platform."""
    command = [sys.executable, "-m", "flows.cli", "doctor", *map(str, options)]
    return subprocess.run(command, env=clean() | environment, capture_output=True, text=True, timeout=WAIT, check=False)


def running(platform: Platform) -> set[int]:
    """The processes of a platform's services, whoever asks."""
    services = [*platform.config.servers(), *platform.config.workers()]
    return {process.pid for service in services if (process := service.process()) is not None}


def test_the_doctor_touches_no_server_of_another_home(platform: Platform, tmp_path: Path) -> None:
    """No platform ran in its own home, and its ports are those of another: nothing is started, made or mended."""
    before = running(platform)
    platform.client.update_work_pool("gpu", WorkPoolUpdate(is_paused=True))
    try:
        ports = ["--prefect-port", platform.config.prefect_port, "--mlflow-port", platform.config.mlflow_port]
        done = doctor_of("--store", tmp_path / "store", *ports)
        assert done.returncode == 1, done.stderr
        assert f"no platform ran in {tmp_path / 'store'}: `vectorclm up` starts one" in done.stdout
        for name, port in (("prefect-server", platform.config.prefect_port), ("mlflow", platform.config.mlflow_port)):
            told = f"port {port}, which {name} would take, is held by {name} of the platform of {platform.config.home}"
            assert told in done.stdout
        assert platform.client.read_work_pool("gpu").is_paused
        assert list(tmp_path.iterdir()) == [] and running(platform) == before
    finally:
        platform.client.update_work_pool("gpu", WorkPoolUpdate(is_paused=False))


def test_the_doctor_touches_no_platform_of_another_store_or_of_other_ports(platform: Platform, tmp_path: Path) -> None:
    """The home is the platform's, by VECTORCLM_HOME, and the rest is not."""
    before = running(platform)
    home, store = str(platform.config.home), platform.config.vectorclm_store
    ports = ["--prefect-port", platform.config.prefect_port, "--mlflow-port", platform.config.mlflow_port]
    (tmp_path / "other").mkdir()
    for options, difference in (
        (["--store", tmp_path / "other", *ports], f"(store {store}, not {tmp_path / 'other'})"),
        (["--store", store, *ports[:2], "--mlflow-port", free_port()], f"(mlflow_port {ports[3]}, not "),
    ):
        done = doctor_of(*options, VECTORCLM_HOME=home)
        assert done.returncode == 1, done.stderr
        assert f"the platform of {home} was started with other settings {difference}" in done.stdout
        assert "started again" not in done.stdout
    assert list((tmp_path / "other").iterdir()) == [] and running(platform) == before


def test_the_doctor_ends_no_foreign_program_at_its_port(platform: Platform) -> None:
    """The platform's MLflow died, and a program of somebody else has its port by now."""
    mlflow = platform.config.servers()[1]
    leader = mlflow.process()
    assert leader is not None
    for process in [leader, *leader.children(recursive=True)]:
        process.kill()
    until(lambda: not listens(platform.config.mlflow_port), "its port is free", 60)
    with socket.socket() as foreign:
        foreign.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        foreign.bind(("127.0.0.1", platform.config.mlflow_port))
        foreign.listen(64)
        done = platform.command("doctor")
        assert done.returncode == 1, done.stdout + done.stderr
        held = f"port {platform.config.mlflow_port} is taken by {psutil.Process().name()} (process {os.getpid()})"
        assert held in done.stdout
        assert "pool cpu has 1 worker(s) online" in done.stdout  # what is its own is looked at all the same
        assert foreign.fileno() != -1 and mlflow.process() is None
    done = platform.command("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"mlflow answers at port {platform.config.mlflow_port}, started again" in done.stdout


FAILS = """
CREATE TRIGGER no_planned_runs BEFORE INSERT ON flow_run WHEN NEW.auto_scheduled
BEGIN SELECT RAISE(ABORT, 'no run is planned here'); END
"""


def test_the_doctor_says_that_the_scheduler_fails(platform: Platform) -> None:
    """Its loop raises at each insertion of a run, as with a SQLAlchemy that Prefect does not work with."""
    assert loop_errors(platform.server_log.read_text()) == []
    platform.breaks()
    with sqlite3.connect(platform.config.home / ".prefect" / "prefect.db", timeout=60) as database:
        database.execute(FAILS)
    try:
        done = platform.command("doctor")
    finally:
        with sqlite3.connect(platform.config.home / ".prefect" / "prefect.db", timeout=60) as database:
            database.execute("DROP TRIGGER no_planned_runs")
    assert done.returncode == 1, done.stdout + done.stderr
    (told,) = [line for line in done.stdout.splitlines() if line.startswith("!!")]
    assert "Prefect's scheduler fails (" in told and "no run is planned here" in told
    assert "schedules start no runs: restart the platform (`vectorclm down`, then `vectorclm up`)" in told
    with suppress(ObjectNotFound):
        platform.client.read_deployment_by_name(f"{PROBE}/{PROBE}")
        raise AssertionError("the doctor's deployment is left behind")
    assert platform.client.read_automations_by_name(PROBE) == []


def test_the_doctor_starts_nothing_that_was_stopped(platform: Platform) -> None:
    assert platform.command("down").returncode == 0
    done = platform.command("doctor")
    assert done.returncode == 1
    assert f"the platform of {platform.config.home} is stopped: `vectorclm up` starts it" in done.stdout
    assert running(platform) == set()


def test_the_doctor_makes_nothing_where_no_platform_ran(tmp_path: Path) -> None:
    """As on a fresh machine, whichever home follows from the settings; the ports' foreign holder is named."""
    (tmp_path / "user").mkdir()
    with socket.socket() as foreign:
        foreign.bind(("127.0.0.1", 0))
        foreign.listen(8)
        port = foreign.getsockname()[1]
        ports = ["--prefect-port", port, "--mlflow-port", free_port()]
        for options, environment in (
            (["--store", tmp_path / "store"], {}),
            (["--store", tmp_path / "store"], {"VECTORCLM_HOME": str(tmp_path / "home")}),
        ):
            done = doctor_of(*options, *ports, **environment, HOME=str(tmp_path / "user"))
            assert done.returncode == 1, done.stderr
            assert (
                f"no platform ran in {environment.get('VECTORCLM_HOME', tmp_path / 'store')}: `vectorclm up`"
                in done.stdout
            )
            holder = f"{psutil.Process().name()} (process {os.getpid()})"
            assert f"port {port}, which prefect-server would take, is held by {holder}" in done.stdout
            stopped = subprocess.run(
                [sys.executable, "-m", "flows.cli", "down", *map(str, options)],
                env=clean() | environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert stopped.returncode == 0 and "was running" in stopped.stdout
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*")] == [Path("user")]


@pytest.fixture
def idle_server(prefect_api: dict[str, str]) -> Iterator[SyncPrefectClient]:
    """A real server on which the services are off that the platform relies on."""
    auth = prefect_api.get("PREFECT_API_AUTH_STRING")
    with SyncPrefectClient(prefect_api["PREFECT_API_URL"], auth_string=auth) as client:
        yield client


def test_services_that_are_off_are_told_with_what_does_not_happen(
    idle_server: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    off = ["scheduler", "late_runs", "triggers", "foreman", "cancellation_cleanup"]
    assert switched_off(idle_server) == off
    with probe(idle_server) as made:
        told = list(findings(idle_server, made, [], tmp_path / "none.log"))
    assert [good for good, _ in told] == [False] * len(off)
    for name, (_, line) in zip(off, told, strict=True):
        assert line.startswith(f"Prefect's {name} is switched off, so {RELIED[name][0]}: remove PREFECT_SERVER_")
    monkeypatch.setattr(server_services, "PROBE_SECONDS", 3)
    with probe(idle_server) as made:
        assert made.failures() == ["scheduler", "late_runs", "triggers"]
    with pytest.raises(ObjectNotFound):
        idle_server.read_deployment_by_name(f"{PROBE}/{PROBE}")


def test_what_idle_services_leave_undone_is_seen(
    idle_server: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A schedule without next runs, a late run, a worker that is silent, a task of a cancelled run."""
    for name in ("PLAN_SECONDS", "SILENT_SECONDS", "CLEAN_SECONDS"):
        monkeypatch.setattr(server_services, name, 0)
    assert server_services.late_runs(idle_server) == server_services.unplanned(idle_server) == []
    assert server_services.unnoticed_deaths(idle_server) == [] and server_services.unended_tasks(idle_server) == 0
    idle_server.create_work_pool(WorkPoolCreate(name="cpu", type="process"))
    idle_server.send_worker_heartbeat("cpu", "a worker", heartbeat_interval_seconds=1)
    daily = IntervalSchedule(interval=timedelta(days=1), anchor_date=datetime.now(UTC))
    schedules = [DeploymentScheduleCreate(schedule=daily, active=True, slug="daily")]
    flow_id = idle_server.create_flow_from_name("a flow")
    made = idle_server.create_deployment(flow_id, "planned", work_pool_name="cpu", schedules=schedules)
    assert server_services.unplanned(idle_server) == ["planned (daily)"]
    past = Scheduled(scheduled_time=datetime.now(UTC) - timedelta(hours=1))
    idle_server.create_flow_run_from_deployment(made, state=past)
    assert server_services.late_runs(idle_server)[0].startswith("1 run(s) of pool cpu are late, the first since ")
    running = idle_server.create_flow_run_from_deployment(made, state=Running())
    assert server_services.late_runs(idle_server) == []  # it waits for one that runs
    idle_server.create_task_run(a_task, running.id, "0", state=Running())
    idle_server.set_flow_run_state(running.id, Cancelled(), force=True)
    assert server_services.unended_tasks(idle_server) == 1
    assert server_services.unnoticed_deaths(idle_server) == ["a worker"]


@task
def a_task() -> None:
    """Never called: a run of it is made on the server."""


LOG = """
11:00:01.000 | ERROR   | docket.dependencies - ↩ [    22ms] schedule_deployments(){schedule_deployments}
Traceback (most recent call last):
  File "worker.py", line 1134, in _execute
ValueError: the first
    of several lines

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
sqlalchemy.exc.InvalidRequestError: Can't evaluate bulk DML statement of postgresql://me:secret@host/prefect
11:00:02.000 | WARNING | docket.worker - slow
11:00:03.000 | ERROR   | uvicorn.error - Exception in ASGI application
11:00:04.000 | ERROR   | prefect.server.services.taskrunrecorder - could not record
"""


def test_errors_of_loops_are_read_from_the_log() -> None:
    first, second = loop_errors(LOG)
    assert (first.loop, first.clock) == ("schedule_deployments", "11:00:01")
    assert first.message.startswith("sqlalchemy.exc.InvalidRequestError: Can't evaluate bulk DML statement")
    assert "secret" not in first.message
    assert second.loop == "prefect.server.services.taskrunrecorder" and second.message == "could not record"


def test_a_loop_that_failed_once_or_fails_no_more_is_not_told(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    line = "{:%H:%M:%S}.000 | ERROR   | docket.worker - ↩ [    22ms] {}(){{key}}\n"
    now = datetime.now()
    times = {"once": [5], "long_ago": [150, 120, 90], "still": [45, 25, 5]}
    log.write_text("".join(line.format(now - timedelta(seconds=s), name) for name, all in times.items() for s in all))
    assert list(failing_loops(log)) == ["still"]
    os.utime(log, (0, 0))
    assert failing_loops(log) == {} == failing_loops(tmp_path / "none.log")
