"""Whose files and whose servers are trusted: the password's file and folders, and who listens where it is sent."""

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from flows.net import free_port
from flows.platform import password, private
from flows.platform.config import PlatformConfig
from flows.platform.ownership import check_folders
from flows.platform.process import HOST
from tests.services.platform import clean
from vectorclm.errors import ConfigError
from vectorclm.runtime.processes import process_identity

NOBODY = 65534
URL = "http://127.0.0.1:4200/api"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A shared store, in which anybody may create and rename, with the password of its platform."""
    store = tmp_path / "store"
    store.mkdir()
    store.chmod(0o777)
    password.ensure(store, URL)
    return store


def refused(home: Path) -> str:
    """The message by which every use of the password is refused; nothing is written."""
    before = sorted(home.rglob("*"))
    for use in (
        lambda: password.read(home),
        lambda: PlatformConfig(vectorclm_store=str(home)).client_environment(),
        lambda: password.ensure(home, URL),
    ):
        with pytest.raises(ConfigError) as told:
            use()
    assert sorted(home.rglob("*")) == before and "\n" not in str(told.value)
    return str(told.value)


def test_a_password_of_ones_own_is_read_in_a_shared_store(home: Path) -> None:
    assert str(password.read(home)).startswith("admin:")
    assert (home / "platform").stat().st_mode & 0o777 == 0o700


@as_root
@pytest.mark.parametrize("part", ["platform", "platform/prefect.env"])
def test_a_password_of_another_user_is_refused(home: Path, part: str) -> None:
    os.chown(home / part, NOBODY, NOBODY)
    assert f"{home / part} belongs to the user nobody" in refused(home)


@pytest.mark.parametrize("part", ["platform", "platform/prefect.env"])
@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_a_password_that_others_can_change_is_refused(home: Path, part: str, mode: int) -> None:
    (home / part).chmod(mode)
    assert f"other users can write to {home / part}" in refused(home)


@pytest.mark.parametrize("part", ["platform", "platform/prefect.env"])
def test_a_link_in_place_of_the_password_is_refused(home: Path, part: str, tmp_path: Path) -> None:
    (home / part).rename(tmp_path / "elsewhere")
    (home / part).symlink_to(tmp_path / "elsewhere")
    assert f"{home / part} is a symbolic link" in refused(home)


def test_a_pipe_in_place_of_the_password_is_refused(home: Path) -> None:
    password.place(home).unlink()
    os.mkfifo(password.place(home), 0o600)
    assert f"{password.place(home)} is not a file" in refused(home)


@as_root
@pytest.mark.parametrize("part", ["platform", ".prefect"])
def test_no_command_uses_folders_of_another_user(home: Path, part: str) -> None:
    """Records name processes to end, and Prefect's home has settings that name code to run."""
    (home / part).mkdir(exist_ok=True)
    os.chown(home / part, NOBODY, NOBODY)
    with pytest.raises(ConfigError, match="belongs to the user nobody"):
        check_folders(PlatformConfig(vectorclm_store=str(home)))
    with pytest.raises(ConfigError, match="belongs to the user nobody"):
        private.create_folder(home / part)
    ports = ["--prefect-port", str(free_port()), "--mlflow-port", str(free_port())]
    for command in (["down"], ["up", *ports]):
        done = subprocess.run(
            [sys.executable, "-m", "flows.cli", *command, "--store", str(home)],
            env=clean(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert f"{home / part} belongs to the user nobody" in done.stderr


class Stranger(http.server.ThreadingHTTPServer):
    """A program of somebody else that answers 200 to every request, and keeps what it is sent."""

    def __init__(self) -> None:
        super().__init__((HOST, 0), Answer)
        self.passwords: list[str] = []


class Answer(http.server.BaseHTTPRequestHandler):
    server: Stranger

    def do_GET(self) -> None:
        self.server.passwords += self.headers.get_all("Authorization", [])
        self.send_response(200)
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"true")

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def stranger() -> Iterator[Stranger]:
    with Stranger() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("recorded", [False, True], ids=["no record", "a record of a process that is gone"])
@pytest.mark.parametrize("command", [["retry", "a run"], ["run", "tiny"]], ids=["retry", "run"])
def test_the_password_is_sent_to_no_stranger(
    home: Path, stranger: Stranger, command: list[str], recorded: bool
) -> None:
    """As after a restart of the machine: the password is kept, and somebody's program took the port."""
    port = stranger.server_port
    password.settle(home, f"http://{HOST}:{port}/api", own=True)
    if recorded:  # the pid of the stranger, from another boot
        record = {**process_identity(psutil.Process()), "started": 1.0, "salt": "", "settings": ""}
        (home / "platform" / "prefect-server.json").write_text(json.dumps(record))
    environment = clean() | {"PREFECT_API_URL": f"http://{HOST}:{port}/api"}
    options = ["--store", str(home), *(["--prefect-port", str(port)] if command[0] == "retry" else [])]
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", *command, *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert stranger.passwords == []
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "`vectorclm up` started" in done.stderr, (
        done.stderr
    )
