"""`vectorclm doctor`, for real: what it says and repairs, and that it touches no platform but its own."""

import os
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest
from prefect.client.schemas.actions import WorkPoolUpdate
from prefect.exceptions import ObjectNotFound

from flows.net import free_port
from flows.platform.process import listens
from flows.platform.server_services import PROBE, loop_errors
from tests.services.platform import WAIT, Platform, clean, platform_at, until

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "of-a-test", "AWS_SECRET_ACCESS_KEY": "secret-of-a-test-0123456789"}


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:  # of `up` alone, as a person's shell that is closed by now
            for name, value in CREDENTIALS.items():
                patch.setenv(name, value)
            made = stack.enter_context(platform_at(tmp_path_factory.mktemp("doctor") / "store"))
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
        assert f"no platform ran in {tmp_path / 'store'}\n" in done.stdout
        assert (
            f"a platform runs in {platform.config.home}: write the command as `vectorclm COMMAND --store "
            in done.stdout
        )
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


def test_a_worker_that_the_doctor_starts_again_has_the_credentials_of_up(platform: Platform) -> None:
    """They were in the environment of `up` only, and are in no file of the platform."""
    worker = platform.config.workers()[0]
    before = worker.process()
    assert before is not None
    before.kill()
    done = platform.command("doctor")
    assert done.returncode == 0 and "pool cpu has 1 worker(s) online, started again" in done.stdout
    again = worker.process()
    assert again is not None and again.pid != before.pid
    assert CREDENTIALS.items() <= again.environ().items()
    secret = CREDENTIALS["AWS_SECRET_ACCESS_KEY"]
    assert secret not in done.stdout + done.stderr
    files = [path for path in platform.config.home.rglob("*") if path.is_file()]
    assert len(files) > 10 and [path for path in files if secret.encode() in path.read_bytes()] == []
    page = f"{platform.config.prefect_url}/deployments/deployment/"
    off = "these schedules of evaluate are off: nightly-chat, weekly-base, so they start no run; the switch is on"
    assert any(off in line and page in line for line in done.stdout.splitlines()), done.stdout


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
            assert f"no platform ran in {environment.get('VECTORCLM_HOME', tmp_path / 'store')}" in done.stdout
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


def test_up_stops_what_it_started_where_another_server_does_not_start(tmp_path: Path) -> None:
    """MLflow refuses a database that a newer version of it has migrated."""
    (store := tmp_path / "store").mkdir()
    with sqlite3.connect(store / "mlflow.db") as database:
        database.execute("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
        database.execute("INSERT INTO alembic_version VALUES ('ffffffffffff')")
    ports = {"--prefect-port": free_port(), "--mlflow-port": free_port()}
    options = ["--store", str(store), *(str(word) for pair in ports.items() for word in pair)]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "flows.cli", "up", *options],
            env=clean(), capture_output=True, text=True, timeout=280, check=False,
        )  # fmt: skip
        assert done.returncode == 2 and "mlflow ended during its start" in done.stderr
        assert "prefect-server stopped again" in done.stdout
        lines = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
        assert [line for line in lines if str(store) in line or str(ports["--prefect-port"]) in line.split()] == []
    finally:
        subprocess.run([sys.executable, "-m", "flows.cli", "down", *options], env=clean(), timeout=280, check=False)
