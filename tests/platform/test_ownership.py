"""Whose platform runs in a home: what another command must leave alone, and to whom no password is sent."""

import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from pydantic import SecretStr

from flows.net import free_port
from flows.platform.config import PlatformConfig
from flows.platform.ownership import ABOUT, check_folders, check_listeners, ran_here, reasons_to_leave_alone, remember
from flows.platform.process import HOST, Service
from vectorclm.errors import ConfigError
from vectorclm.runtime.processes import process_identity

ME = f"{psutil.Process().name()} (process {os.getpid()})"


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


def test_a_platform_that_never_ran_is_told_from_one_that_is_stopped(config: PlatformConfig) -> None:
    assert reasons_to_leave_alone(config) == [f"no platform ran in {config.home}: `vectorclm up` starts one"]
    assert not ran_here(config) and not config.home.exists()
    remember(config)
    assert ran_here(config)
    assert reasons_to_leave_alone(config) == [f"the platform of {config.home} is stopped: `vectorclm up` starts it"]


def test_a_stranger_at_a_port_of_a_stopped_platform_is_named(config: PlatformConfig) -> None:
    with socket.create_server((HOST, config.mlflow_port)):
        _, port = reasons_to_leave_alone(config)
    assert port == f"port {config.mlflow_port}, which mlflow would take, is held by {ME}"


def test_a_platform_is_left_alone_by_a_command_with_other_settings(config: PlatformConfig, tmp_path: Path) -> None:
    assert reasons_to_leave_alone(started(config)) == []
    told = "prefect-server, worker-cpu, worker-gpu"
    moved = {"vectorclm_home": str(config.home), "vectorclm_store": str(tmp_path / "other")}
    for changes, difference, services in (
        (
            {"prefect_port": 1},
            f" (prefect_port {config.prefect_port}, not 1)",
            "prefect-server, worker-cpu, worker-gpu",
        ),
        (moved, f" (store {config.vectorclm_store}, not {tmp_path / 'other'})", "worker-cpu, worker-gpu"),
        ({"prefect_auth": SecretStr("me:another")}, "", told),
    ):
        (reason,) = reasons_to_leave_alone(config.model_copy(update=changes))
        assert reason.startswith(f"the platform of {config.home} was started with other settings{difference}: give")
        assert reason.endswith(f"({services})") and "s3cr3t" not in reason


def test_what_is_remembered_of_a_platform_has_no_secret_and_is_the_owners(config: PlatformConfig) -> None:
    started(config)
    file = config.home / "platform" / ABOUT
    assert json.loads(file.read_text()) == {
        "store": config.vectorclm_store, "prefect_port": config.prefect_port, "mlflow_port": config.mlflow_port
    }  # fmt: skip
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
        message = f"port {server.port} is held by {ME}, not by the {server.name} that `vectorclm up` started"
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
