"""Whose platform runs in a home: what another command must leave alone, and to whom no password is sent."""

import http.server
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import psutil
import pytest
from pydantic import SecretStr

from flows.net import free_port
from flows.platform import credentials, ownership, password
from flows.platform.config import PlatformConfig
from flows.platform.ownership import (
    ABOUT,
    before,
    check_folders,
    check_listeners,
    command_for,
    ran_here,
    reasons_to_leave_alone,
    remember,
)
from flows.platform.process import HOST, PREFECT, Service
from tests.services.platform import clean
from vectorclm.errors import ConfigError
from vectorclm.runtime.processes import process_identity


def me() -> str:
    """This process as messages name it; torch renames a process when it loads data."""
    return f"{psutil.Process().name()} (process {os.getpid()})"


@pytest.fixture
def config(tmp_path: Path) -> PlatformConfig:
    return PlatformConfig(
        vectorclm_store=str(tmp_path / "store"),
        prefect_port=free_port(),
        mlflow_port=free_port(),
        prefect_auth=SecretStr("me:s3cr3t-of-prefect"),
        mlflow_admin_password=SecretStr("s3cr3t-of-mlflow"),
        mlflow_secret_key=SecretStr("s3cr3t-of-cookies"),
    )


def record(service: Service) -> None:
    """The record that `up` leaves of a service, here of this process."""
    identity = process_identity(psutil.Process())
    service.record.write_text(json.dumps({**identity, "salt": "x", "settings": service._settings("x")}))


def started(config: PlatformConfig) -> PlatformConfig:
    remember(config)
    for service in (*config.servers(), *config.workers()):
        record(service)
    return config


def test_a_platform_that_never_ran_is_told_from_one_that_is_stopped(
    config: PlatformConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "running_homes", list)
    (reason,) = reasons_to_leave_alone(config)
    assert reason.startswith(f"no platform ran in {config.home}, and none runs on this machine: run this in the folder")
    assert not ran_here(config) and not config.home.exists()
    remember(config)
    assert ran_here(config)
    assert reasons_to_leave_alone(config) == [f"the platform of {config.home} is stopped: `vectorclm up` starts it"]


def test_a_stranger_at_a_port_of_a_stopped_platform_is_named(config: PlatformConfig) -> None:
    with socket.create_server((HOST, config.mlflow_port)):
        *_, port = reasons_to_leave_alone(config)
    assert port == f"port {config.mlflow_port}, which mlflow would take, is held by {me()}"


def test_a_platform_is_left_alone_by_a_command_with_other_settings(config: PlatformConfig, tmp_path: Path) -> None:
    assert reasons_to_leave_alone(started(config)) == []
    told = "prefect-server, worker-cpu, worker-gpu"
    moved = {"vectorclm_home": str(config.home), "vectorclm_store": str(tmp_path / "other")}
    for changes, difference, services in (
        (
            {"prefect_port": 1},
            f" (prefect_port {config.prefect_port}, not 1)",
            told,
        ),
        (moved, f" (store {config.vectorclm_store}, not {tmp_path / 'other'})", told),
        ({"prefect_auth": SecretStr("me:another")}, "", told),
    ):
        (reason,) = reasons_to_leave_alone(config.model_copy(update=changes))
        assert reason.startswith(f"the platform of {config.home} was started with other settings{difference}: give")
        assert reason.endswith(f"({services})") and "s3cr3t" not in reason


def test_what_is_remembered_of_a_platform_has_no_secret_and_is_the_owners(config: PlatformConfig) -> None:
    started(config)
    file = config.home / "platform" / ABOUT
    assert json.loads(file.read_text()) == {
        "store": config.vectorclm_store, "prefect_port": config.prefect_port, "mlflow_port": config.mlflow_port,
        "variables": credentials.names(), "home": str(config.home),
        "prefect_page": config.prefect_page, "mlflow_page": config.mlflow_page,
    }  # fmt: skip
    assert before(config.home) == json.loads(file.read_text()) and before(config.home / "other") == {}
    assert file.stat().st_mode & 0o077 == 0
    file.write_text("not JSON")
    (reason,) = reasons_to_leave_alone(config.model_copy(update={"prefect_port": 1}))
    assert "was started with other settings: give" in reason  # the difference is not known
    (config.home / "platform").chmod(0o777)
    with pytest.raises(ConfigError, match="other users can write to"):
        check_folders(config)


@pytest.fixture
def listening(config: PlatformConfig) -> Iterator[None]:
    with socket.create_server((HOST, config.prefect_port)), socket.create_server((HOST, config.mlflow_port)):
        yield


@pytest.mark.usefixtures("listening")
def test_a_password_is_sent_only_to_what_up_started(config: PlatformConfig) -> None:
    remember(config)
    servers = config.servers()
    for server in servers:  # as each of them is told of until it is known
        message = f"port {server.port} is held by {me()}, not by the {server.name} that `vectorclm up` started"
        with pytest.raises(ConfigError, match=re.escape(message)):
            check_listeners(config)
        record(server)
    check_listeners(config)


def test_where_nobody_listens_or_no_password_is_set_nothing_is_refused(config: PlatformConfig) -> None:
    check_listeners(config)
    open_ = config.model_copy(update={"prefect_auth": SecretStr("none"), "mlflow_admin_password": None})
    with socket.create_server((HOST, config.prefect_port)):
        check_listeners(open_)
        with pytest.raises(ConfigError, match="no password is sent there"):
            check_listeners(config)


SLEEPS = [sys.executable, "-c", "import time; time.sleep(600)"]


def vectorclm(*words: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "flows.cli", *map(str, words)]
    return subprocess.run(command, env=clean() | environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def left(tmp_path: Path) -> PlatformConfig:
    """The settings of a platform whose files are those that `up` leaves."""
    store = tmp_path / "store"
    made = PlatformConfig(vectorclm_store=str(store), prefect_port=free_port(), mlflow_port=free_port())
    password.ensure(store, f"{made.prefect_url}/api")
    remember(made)
    return made


@pytest.fixture
def service(left: PlatformConfig) -> Iterator[Service]:
    """A process in the place of the platform's server for Prefect."""
    made = Service(PREFECT, SLEEPS, {}, left.home / "platform")
    made.start()
    yield made
    made.stop()


def files(home: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in home.rglob("*") if path.is_file() and path.suffix != ".lock"}


def test_up_that_is_refused_changes_no_file_of_the_platform(left: PlatformConfig, service: Service) -> None:
    before = files(left.home)
    ports = ["--prefect-port", free_port(), "--mlflow-port", free_port()]
    for options in (ports, ["--prefect-port", left.prefect_port, *ports[2:]]):
        done = vectorclm("up", "--store", left.vectorclm_store, *options)
        assert done.returncode == 2 and "prefect-server runs with other settings" in done.stderr
        assert files(left.home) == before


def test_up_that_is_refused_leaves_no_file_of_a_new_platform(tmp_path: Path) -> None:
    """A port is taken; the store cannot be written."""
    (tmp_path / "file").write_text("")
    with socket.create_server(("127.0.0.1", 0)) as foreign:
        ports = ["--prefect-port", foreign.getsockname()[1], "--mlflow-port", free_port()]
        done = vectorclm("up", "--store", tmp_path / "store", *ports)
        assert done.returncode == 2 and f"port {ports[1]} is taken by" in done.stderr
    ports = ["--prefect-port", free_port(), "--mlflow-port", free_port()]
    refused = vectorclm("up", "--store", tmp_path / "file" / "store", *ports, VECTORCLM_HOME=str(tmp_path / "home"))
    assert refused.returncode == 2 and refused.stderr.startswith("error: store ") and refused.stderr.count("\n") == 1
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} <= {"file", "platform.lock"}


def test_a_command_in_the_wrong_place_names_the_platform_that_runs(
    left: PlatformConfig, service: Service, tmp_path: Path
) -> None:
    options = f"--store {left.home} --prefect-port {left.prefect_port} --mlflow-port {left.mlflow_port}"
    assert command_for(left.home) == f"`vectorclm COMMAND {options}`"
    for command, code in (("doctor", 1), ("down", 0)):
        done = vectorclm(command, "--store", tmp_path / "elsewhere")
        assert done.returncode == code and "`vectorclm up` starts" not in done.stdout
        told = f"a platform runs in {left.home}: write the command as `vectorclm COMMAND {options}`"
        assert told in done.stdout and service.process() is not None
    lost = vectorclm("retry", "any", "--store", tmp_path / "elsewhere", "--prefect-port", free_port())
    assert lost.returncode == 2 and told in lost.stderr and "run `vectorclm up`" not in lost.stderr
    assert not (tmp_path / "elsewhere").exists()
    found = vectorclm("doctor", *shlex.split(options))
    assert f"the platform of {left.home} was started with other settings" in found.stdout  # it looks at this one


class NoKey(http.server.BaseHTTPRequestHandler):
    """An S3 server that keeps who asks, and knows no key."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.headers.get("Authorization", ""))
        body = b"<Error><Code>InvalidAccessKeyId</Code><Message>unknown</Message></Error>"
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_PUT = do_GET

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def test_up_checks_a_store_with_the_keys_of_its_settings(tmp_path: Path) -> None:
    with http.server.ThreadingHTTPServer((HOST, 0), NoKey) as server, ThreadPoolExecutor(1) as thread:
        thread.submit(server.serve_forever)
        (file := tmp_path / "platform.env").touch(0o600)
        keys = f"S3_ACCESS_KEY=of-a-test\nS3_SECRET_KEY=secret\nAWS_ENDPOINT_URL=http://{HOST}:{server.server_port}\n"
        file.write_text(f"VECTORCLM_STORE=s3://bucket/store\nVECTORCLM_HOME={tmp_path / 'home'}\n{keys}")
        ports = ["--prefect-port", free_port(), "--mlflow-port", free_port()]
        try:
            done = vectorclm("up", "--env-file", file, *ports)
        finally:
            server.shutdown()
    assert done.returncode == 2 and done.stderr.startswith("error: store s3://bucket/store: "), done.stderr
    assert NoKey.asked and all("Credential=of-a-test/" in line for line in NoKey.asked)
    assert not (tmp_path / "home" / "platform").exists()
