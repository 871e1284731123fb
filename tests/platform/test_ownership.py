"""Commands in the wrong folder or with other settings: they name the platform that runs, and change no file of it."""

import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.net import free_port
from flows.platform import credentials, machine_checks, password
from flows.platform.config import PlatformConfig
from flows.platform.machine_checks import MACHINE
from flows.platform.ownership import ABOUT, options_of, recall_credentials, remember
from flows.platform.process import PREFECT, Service
from tests.services.platform import clean

SECRET = "of-a-test-secret-0123456789"
SLEEPS = [sys.executable, "-c", "import time; time.sleep(600)"]


def vectorclm(*words: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "flows.cli", *map(str, words)]
    return subprocess.run(command, env=clean() | environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def config(tmp_path: Path) -> PlatformConfig:
    """The settings of a platform whose files are those that `up` leaves."""
    store = tmp_path / "store"
    made = PlatformConfig(vectorclm_store=str(store), prefect_port=free_port(), mlflow_port=free_port())
    password.ensure(store, f"{made.prefect_url}/api")
    remember(made)
    return made


@pytest.fixture
def service(config: PlatformConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """A process in the place of the platform's server for Prefect, started with credentials in the environment."""
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "of-a-test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        made = Service(PREFECT, SLEEPS, {}, config.home / "platform")
        made.start()
        remember(config)
    yield made
    made.stop()


def files(home: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in home.rglob("*") if path.is_file() and path.suffix != ".lock"}


def test_up_that_is_refused_changes_no_file_of_the_platform(config: PlatformConfig, service: Service) -> None:
    before = files(config.home)
    ports = ["--prefect-port", free_port(), "--mlflow-port", free_port()]
    for options in (ports, ["--prefect-port", config.prefect_port, *ports[2:]]):
        done = vectorclm("up", "--store", config.vectorclm_store, *options)
        assert done.returncode == 2 and "prefect-server runs with other settings" in done.stderr
        assert files(config.home) == before


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
    config: PlatformConfig, service: Service, tmp_path: Path
) -> None:
    options = f"--store {config.home} --prefect-port {config.prefect_port} --mlflow-port {config.mlflow_port}"
    assert options_of(config.home) == f"`{options}`"
    for command, code in (("doctor", 1), ("down", 0)):
        done = vectorclm(command, "--store", tmp_path / "elsewhere")
        assert done.returncode == code and "`vectorclm up` starts" not in done.stdout
        told = f"a platform runs in {config.home}: give the command its options, `{options}`"
        assert told in done.stdout and service.process() is not None
    assert not (tmp_path / "elsewhere").exists()
    found = vectorclm("doctor", *shlex.split(options))
    assert f"the platform of {config.home} was started with other settings" in found.stdout  # it looks at this one


def test_no_platform_anywhere_is_no_reason_to_make_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.platform.ownership.running_homes", list)
    from flows.platform.ownership import reasons_to_leave_alone

    made = PlatformConfig(vectorclm_store=str(tmp_path), prefect_port=free_port(), mlflow_port=free_port())
    (told,) = reasons_to_leave_alone(made)
    assert told.startswith(f"no platform ran in {tmp_path}, and none runs on this machine: run this in the folder")


def test_credentials_of_up_are_found_in_a_service_that_runs_and_are_in_no_file(
    config: PlatformConfig, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    with monkeypatch.context() as patch:
        patch.setenv("AWS_PROFILE", "mine")
        assert recall_credentials(config) == "" and "AWS_SECRET_ACCESS_KEY" not in os.environ  # one's own win
    with monkeypatch.context() as patch:
        patch.setenv("AWS_REGION", "of-this-command")
        assert recall_credentials(config) == ""
        assert os.environ["AWS_SECRET_ACCESS_KEY"] == SECRET and os.environ["AWS_REGION"] == "of-this-command"
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            os.environ.pop(name)
    assert [path for path, data in files(config.home).items() if SECRET.encode() in data] == []
    service.stop()
    lost = recall_credentials(config)
    assert "AWS_ACCESS_KEY_ID" in lost and "no service is left that has them" in lost and SECRET not in lost
    assert "AWS_SECRET_ACCESS_KEY" not in os.environ and credentials.names() == []


def test_every_disk_of_the_platform_is_looked_at_with_what_frees_it(
    config: PlatformConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disks = MACHINE[1]
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    everything = [f"store {config.home}", f"home {config.home}", f"work {config.home}/work", f"TMPDIR {tmp_path}/tmp"]
    (good,) = disks(config)  # one line, as all are on one disk
    assert all(place in good.what for place in everything)
    monkeypatch.setattr(machine_checks, "FREE_GIGABYTES", 10**9)
    (full,) = disks(config)
    assert not full.good and f"`vectorclm store gc --older-than 1h --delete --store {config.home}`" in full.what
    other = Path("/dev/shm")
    if other.is_dir() and other.stat().st_dev != tmp_path.stat().st_dev:
        monkeypatch.setenv("TMPDIR", str(other))
        store, temporary = disks(config)
        assert "TMPDIR" not in store.what and f"free for TMPDIR {other}" in temporary.what
        assert "set it to a folder elsewhere" in temporary.what and "store gc" not in temporary.what


def test_about_is_private(config: PlatformConfig) -> None:
    assert (config.home / "platform" / ABOUT).stat().st_mode & 0o777 == 0o600
