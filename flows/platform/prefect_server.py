"""A private Prefect server for one command, which ends with the command.

Prefect can start an ephemeral server by itself, but a `kill -9` of the command leaves it running. This server gets a
signal when its parent dies.
"""

import logging
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

import psutil
from filelock import FileLock

from flows.net import HEARTBEAT_SECONDS, QUIET, SAFE_PATH, answers, free_port, has_own_server, past_proxies
from flows.platform import password, private
from flows.platform.config import PlatformConfig
from flows.platform.ownership import check_listeners
from flows.platform.process import PREFECT, Service
from flows.platform.server_logs import why_not_started
from vectorclm.errors import ConfigError, VectorCLMError
from vectorclm.inference.guard import ALLOWED
from vectorclm.runtime.processes import dying_with_parent

logger = logging.getLogger(__name__)
START_SECONDS = 120  # a cold start migrates a new database
STOP_SECONDS = 5
# Services that a private server does not need: it has no schedules, deployments, pauses or automations.
IDLE = ("SCHEDULER", "LATE_RUNS", "FOREMAN", "CANCELLATION_CLEANUP", "PAUSE_EXPIRATIONS", "REPOSSESSOR", "TRIGGERS")
YIELDS = 10  # its niceness once it is up: trainings have priority


class ServerError(VectorCLMError):
    """The Prefect server did not start, or does not answer."""


class PrivateServer:
    """A Prefect server in a child process, with its database in `home`: `start`, then `wait`."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.log = home / "server.log"
        self._lock = FileLock(home / "server.lock", thread_local=False)  # one migration of a new database at a time
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher = ThreadPoolExecutor(1)

    def start(self) -> None:
        """Start the server, and set the environment of this process to use it instead of the user's profile.

        Call it before Prefect is imported, which reads the environment once.
        """
        private.create_folder(self.home)  # keys of Prefect's blocks are in its database
        self._lock.acquire()
        for name in [name for name in os.environ if name.startswith("PREFECT_")]:
            if not name.startswith("PREFECT_LOGGING_"):
                del os.environ[name]
        port, auth = free_port(), password.make()
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
                env={**_without_store(), **settings, **SAFE_PATH},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C must not reach the server: it outlives the flow
            )
        self._up = self._watcher.submit(self._watch, self._process)

    def wait(self) -> None:
        """Wait until the server answers. Raises ServerError with the end of its log where it does not."""
        self._up.result()

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not answers(f"{self.url}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise ServerError(f"the private Prefect server did not start: {why_not_started(self.log)}")
            time.sleep(0.05)
        self._lock.release()
        with suppress(psutil.AccessDenied):  # this process runs with less priority than that
            psutil.Process(process.pid).nice(YIELDS)

    def stop(self) -> None:
        """Stop the server; may be called twice."""
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
def parameters_fit() -> Iterator[None]:
    """Raise ServerError where the Prefect server refuses a run because its parameters are too large."""
    from prefect.exceptions import PrefectHTTPStatusError

    try:
        yield
    except PrefectHTTPStatusError as error:
        if error.response.status_code != HTTPStatus.UNPROCESSABLE_ENTITY or "must be less than" not in str(error):
            raise
        raise ServerError(
            "the experiment is larger than the Prefect server at PREFECT_API_URL takes as a parameter: name files by a "
            "pattern such as texts/*.jsonl, or set PREFECT_SERVER_API_MAX_PARAMETER_SIZE=0 for the server"
        ) from error


def _without_store() -> dict[str, str]:
    """The environment of a private server, which attends no runs of a platform and shows no reports."""
    return {name: value for name, value in os.environ.items() if name != "VECTORCLM_STORE"}


@contextmanager
def prefect_server(home: Path) -> Iterator[PrivateServer | None]:
    """Start a private server while the block runs; yields None if PREFECT_API_URL names a server of the user.

    The password of the platform of this store is read from the file that `vectorclm up` wrote. Raises ConfigError where
    the URL contains a password or the password is missing, and ServerError where no server answers.
    """
    if has_own_server():
        if "@" in os.environ["PREFECT_API_URL"]:
            raise ConfigError(
                "PREFECT_API_URL contains a password, which logs would show: remove the part before the @, and set "
                f"{password.SETTING}=user:password"
            )
        os.environ |= QUIET
        os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", str(HEARTBEAT_SECONDS))
        url = os.environ["PREFECT_API_URL"].rstrip("/")
        if not answers(f"{url}/health"):
            raise ServerError(f"no Prefect server answers at {url}: start it, or unset PREFECT_API_URL")
        _find_password(home.parent, url)
        _check_password(url)
        yield None
        return
    server = PrivateServer(home)
    try:
        server.start()
        yield server
    finally:
        server.stop()


@contextmanager
def platform_server(config: PlatformConfig, *, is_named: bool) -> Iterator[str]:
    """Have Prefect in this process use the server of a platform while the block runs; yields the URL of its pages.

    Without an option that names the platform, PREFECT_API_URL does, as in a container, where the server is another
    machine. Raises what `prefect_server` and `check_listeners` raise. Call it before Prefect is imported.
    """
    if not is_named and has_own_server():
        with prefect_server(config.home / ".prefect"):
            yield os.environ["PREFECT_API_URL"].rstrip("/").removesuffix("/api")
        return
    check_listeners(config)
    os.environ |= config.client_environment()
    yield config.prefect_page


def _find_password(home: Path, url: str) -> None:
    """Set Prefect's own variable for the password: from PREFECT_AUTH, from itself, or from the file of `up`.

    Raises ConfigError where another program than the server that `up` started would get the password of the file.
    """
    if named := os.environ.get(password.SETTING):
        if named.lower() != password.OFF:
            os.environ[password.AUTH] = named
    elif found := os.environ.get(password.AUTH):
        kept = None
        with suppress(ConfigError):
            kept = password.read(home, url)
        if found != kept:  # else it was loaded from that file
            logger.warning("%s is read: %s is its name for vectorclm", password.AUTH, password.SETTING)
    elif (kept := password.read(home, url)) is not None:
        Service(PREFECT, [], {}, password.place(home).parent, urlsplit(url).port).check_listener()
        os.environ[password.AUTH] = kept


def _check_password(url: str) -> None:
    """Raise ConfigError where the user's server refuses the password of this process or of Prefect's profile."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError

    with get_client(sync_client=True) as client:
        try:
            client.request("GET", "/admin/version")
        except PrefectHTTPStatusError as error:
            if error.response.status_code == 401:
                raise ConfigError(
                    f"Prefect at {url} requires a password: give the --store of its platform, or set "
                    f"{password.SETTING}=user:password"
                ) from error


def accepts_writes(config: PlatformConfig, seconds: float) -> bool:
    """Whether the platform's server creates and deletes a variable within so many seconds; SQLite may refuse a try."""
    deadline = time.monotonic() + seconds
    while not _write(config, max(1.0, deadline - time.monotonic())):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def _write(config: PlatformConfig, seconds: float) -> bool:
    import httpx  # every command imports this module

    known = config.prefect_password
    auth = None if known is None else httpx.BasicAuth(*known.partition(":")[::2])
    name = f"doctor-{secrets.token_hex(4)}"
    api = f"{config.prefect_url}/api"
    try:
        with httpx.Client(auth=auth, timeout=seconds, trust_env=False) as client:
            given = client.get(f"{api}/csrf-token", params={"client": name}).raise_for_status().json()["token"]
            client.headers.update({"Prefect-Csrf-Client": name, "Prefect-Csrf-Token": given})
            client.post(f"{api}/variables/", json={"name": name, "value": "a write"}).raise_for_status()
            client.delete(f"{api}/variables/name/{name}").raise_for_status()
    except httpx.HTTPError:
        return False
    return True
