"""A private Prefect server for one command: nothing to install or start, and nothing left behind.

Prefect can start an ephemeral server by itself, but a `kill -9` of the command leaves that one running. This
one is told to end with its parent.
"""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from flows.launch import dying_with_parent
from vectorclm.errors import VectorCLMError

START_SECONDS = 120  # a cold start migrates a new database
STOP_SECONDS = 5
QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class ServerError(VectorCLMError):
    """The private Prefect server did not start."""


def has_own_server() -> bool:
    """Whether the user named a Prefect server."""
    return bool(os.environ.get("PREFECT_API_URL"))


class PrivateServer:
    """A Prefect server in a child process, its database in `home`; `start`, then `wait` for it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.log = home / "server.log"
        self._lock = FileLock(home / "server.lock")  # one migration of a new database at a time
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server and point this process at it, and away from the user's own profile.

        Call it before Prefect is imported, which reads the environment once.
        """
        self.home.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        for name in [name for name in os.environ if name.startswith("PREFECT_")]:
            if not name.startswith("PREFECT_LOGGING_"):
                del os.environ[name]
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}/api"
        os.environ |= {**QUIET, "PREFECT_HOME": str(self.home), "PREFECT_API_URL": self.url}
        command = [
            sys.executable,
            "-m",
            "prefect",
            "server",
            "start",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ]
        command += ["--no-ui", "--no-scheduler", "--no-late-runs", "--analytics-off", "--log-level", "ERROR"]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                dying_with_parent(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is ours to handle: the server must outlive the flow
            )

    def wait(self) -> None:
        """Return once the server answers. Raises ServerError, with its last words, where it does not."""
        deadline = time.monotonic() + START_SECONDS
        while not _answers(f"{self.url}/health"):
            ended = self._process is None or self._process.poll() is not None
            if ended or time.monotonic() > deadline:
                words = "\n".join(self.log.read_text(errors="replace").strip().splitlines()[-15:])
                raise ServerError(f"the private Prefect server did not start; {self.log} ends with:\n{words}")
            time.sleep(0.05)
        self._lock.release()

    def stop(self) -> None:
        """End the server; safe to call twice."""
        self._lock.release()
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def prefect_server(home: Path) -> Iterator[PrivateServer | None]:
    """A private server, starting up; None where PREFECT_API_URL names the user's own."""
    if has_own_server():
        os.environ |= QUIET
        yield None
        return
    server = PrivateServer(home)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False
