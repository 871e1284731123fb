"""A private Prefect server for one command: nothing to install or start, and nothing left behind.

Prefect can start an ephemeral server by itself, but a `kill -9` of the command leaves that one running. This
one is told to end with its parent.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
from filelock import FileLock

from flows.execution.launch import dying_with_parent
from flows.net import HEARTBEAT_SECONDS, QUIET, answers, has_own_server, past_proxies
from flows.platform import password
from vectorclm.errors import ConfigError, VectorCLMError
from vectorclm.inference.guard import ALLOWED

START_SECONDS = 120  # a cold start migrates a new database
STOP_SECONDS = 5


# What a server of one command has no use for: nothing is scheduled, paused or deployed on it, and no automation waits.
IDLE = ("SCHEDULER", "LATE_RUNS", "FOREMAN", "CANCELLATION_CLEANUP", "PAUSE_EXPIRATIONS", "REPOSSESSOR", "TRIGGERS")
YIELDS = 10  # its niceness once it is up: the training beside it goes first


class ServerError(VectorCLMError):
    """The Prefect server did not start, or does not answer."""


class PrivateServer:
    """A Prefect server in a child process, its database in `home`; `start`, then `wait` for it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.log = home / "server.log"
        self._lock = FileLock(home / "server.lock", thread_local=False)  # one migration of a new database at a time
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher = ThreadPoolExecutor(1)

    def start(self) -> None:
        """Start the server and point this process at it, and away from the user's own profile.

        Call it before Prefect is imported, which reads the environment once.
        """
        self.home.mkdir(parents=True, exist_ok=True, mode=0o700)  # keys of Prefect's blocks are in its database
        self._lock.acquire()
        for name in [name for name in os.environ if name.startswith("PREFECT_")]:
            if not name.startswith("PREFECT_LOGGING_"):
                del os.environ[name]
        port, auth = _free_port(), password.make()
        self.url = f"http://127.0.0.1:{port}/api"
        os.environ |= {**QUIET, **past_proxies(), "PREFECT_HOME": str(self.home), "PREFECT_API_URL": self.url}
        os.environ["PREFECT_API_AUTH_STRING"] = auth
        settings = {f"PREFECT_SERVER_SERVICES_{name}_ENABLED": "false" for name in IDLE}
        settings |= {"PREFECT_SERVER_API_AUTH_STRING": auth, "PREFECT_SERVER_UI_ENABLED": "false"}
        settings |= {"PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://127.0.0.1:{port}"}
        settings |= {"PREFECT_SERVER_LOGGING_LEVEL": "ERROR", ALLOWED: ""}
        command = [sys.executable, "-m", "flows.platform.guard", "prefect", "--port", str(port)]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                dying_with_parent(command),
                env={**os.environ, **settings},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is ours to handle: the server must outlive the flow
            )
        self._up = self._watcher.submit(self._watch, self._process)

    def wait(self) -> None:
        """Return once the server answers. Raises ServerError, with its last words, where it does not."""
        self._up.result()

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not answers(f"{self.url}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                words = "\n".join(self.log.read_text(errors="replace").strip().splitlines()[-15:])
                raise ServerError(f"the private Prefect server did not start; {self.log} ends with:\n{words}")
            time.sleep(0.05)
        self._lock.release()
        psutil.Process(process.pid).nice(YIELDS)

    def stop(self) -> None:
        """End the server; safe to call twice."""
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._watcher.shutdown()
        self._lock.release()


@contextmanager
def prefect_server(home: Path) -> Iterator[PrivateServer | None]:
    """A private server, starting up; None where PREFECT_API_URL names the user's own.

    The password that `vectorclm up` made for the platform of this store is found without the user's doing.

    Raises ConfigError where a password is in that, or is missing, and ServerError where no server answers.
    """
    if has_own_server():
        if "@" in os.environ["PREFECT_API_URL"]:
            raise ConfigError(
                "PREFECT_API_URL holds a password, which logs would show: leave out what is before the @, and set "
                "PREFECT_API_AUTH_STRING=user:password"
            )
        os.environ |= QUIET
        os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", str(HEARTBEAT_SECONDS))
        url = os.environ["PREFECT_API_URL"].rstrip("/")
        if not answers(f"{url}/health"):
            raise ServerError(f"no Prefect server answers at {url}: start it, or unset PREFECT_API_URL")
        if "PREFECT_API_AUTH_STRING" not in os.environ and (auth := password.read(home.parent, url)) is not None:
            os.environ["PREFECT_API_AUTH_STRING"] = auth
        _check_password(url)
        yield None
        return
    server = PrivateServer(home)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def _check_password(url: str) -> None:
    """Raise ConfigError where the user's own server refuses what this process knows, a profile of Prefect included."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError

    with get_client(sync_client=True) as client:
        try:
            client.request("GET", "/admin/version")
        except PrefectHTTPStatusError as error:
            if error.response.status_code == 401:
                raise ConfigError(
                    f"Prefect at {url} wants a password: give the --store of its platform, or set "
                    "PREFECT_API_AUTH_STRING=user:password"
                ) from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
