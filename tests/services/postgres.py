"""A real Postgres for tests: Debian's package, with a cluster in a folder, on 127.0.0.1 only."""

import os
import pwd
import shutil
import signal
import subprocess
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil

from flows.platform.process import HOST, Service, ServiceError
from tests.services.tools import run_tool

INSTALLED = Path("/usr/lib/postgresql")  # one folder for each version
USER = "vectorclm"
DATABASES = ("prefect", "mlflow")


class Postgres:
    """A server and its databases. The first start creates its cluster at `data`, with this password for `vectorclm`."""

    def __init__(self, data: Path, logs: Path, port: int, password: str) -> None:
        programs = _programs(data)
        command = [*_unprivileged(), str(programs / "postgres"), "-D", str(data), "-p", str(port)]
        command += ["-c", f"listen_addresses={HOST}", "-c", "unix_socket_directories="]
        ready, prepare = partial(_accepts, programs, port), partial(_make_cluster, programs, data, password)
        self.service = Service("postgres", command, {}, logs, port, ready, prepare)
        self._make_databases = partial(_make_databases, programs, port, password)

    def start(self) -> None:
        """Start the server unless it runs, and create databases that are missing."""
        self.service.start()
        self.service.wait()
        self._make_databases()

    def stop(self) -> None:
        """Stop the server without waiting for its clients, as SIGTERM would."""
        if (process := self.service.process()) is not None:
            process.send_signal(signal.SIGINT)
            psutil.wait_procs([process], timeout=20)
        self.service.stop()


def _programs(data: Path) -> Path:
    """The programs of the version that created the cluster, else of the newest version."""
    with suppress(OSError):
        return INSTALLED / (data / "PG_VERSION").read_text(encoding="ascii").strip() / "bin"
    found = [path.parent for path in INSTALLED.glob("*/bin/postgres")]
    return max(found, key=lambda path: float(path.parent.name), default=INSTALLED / "bin")


def _unprivileged() -> list[str]:
    """The prefix that runs a command as the user postgres: Postgres refuses to run as root."""
    return ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"] if os.getuid() == 0 else []


def _make_cluster(programs: Path, data: Path, password: str) -> None:
    """Create the cluster atomically. Raises ServiceError where Postgres is missing or cannot reach `data`."""
    if not (programs / "postgres").exists():
        exists = data.exists() and (data / "PG_VERSION").exists()
        package = f"postgresql-{programs.parent.name}" if exists else "postgresql"
        raise ServiceError(f"Postgres is not installed: apt-get install --no-install-recommends {package}")
    target, part = data, data.with_name(f"{data.name}.part")
    if not target.exists():
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(mode=0o700, parents=True)
        _give(part)
        _check_reach(part)
        _initialise(programs, part, password)
        part.rename(target)
    _check_reach(target)


def _initialise(programs: Path, folder: Path, password: str) -> None:
    reading, writing = os.pipe()  # initdb reads the password from a file; a pipe leaves none on the disk
    with os.fdopen(reading, "rb") as pipe, os.fdopen(writing, "wb") as secret:
        if os.getuid() == 0:
            os.fchown(reading, pwd.getpwnam("postgres").pw_uid, -1)
        secret.write(password.encode() + b"\n")
        secret.close()
        command = [*_unprivileged(), str(programs / "initdb"), "-D", str(folder), "-U", USER, "--encoding=UTF8"]
        command += ["--locale=C.UTF-8", "--auth=scram-sha-256", "--pwfile=/dev/stdin"]
        done = subprocess.run(command, stdin=pipe, cwd="/", capture_output=True, text=True, check=False)
    if done.returncode:
        raise ServiceError(f"the database cluster at {folder} could not be created:\n{done.stderr.strip()}")


def _give(folder: Path) -> None:
    if os.getuid() == 0:
        user = pwd.getpwnam("postgres")
        os.chown(folder, user.pw_uid, user.pw_gid)


def _check_reach(folder: Path) -> None:
    if subprocess.run([*_unprivileged(), "test", "-w", str(folder)], cwd="/", check=False).returncode:
        raise ServiceError(
            f"Postgres does not run as root, and the user postgres cannot reach {folder}: a folder above it is closed "
            "to others"
        )


def _accepts(programs: Path, port: int) -> bool:
    command = [str(programs / "pg_isready"), "-q", "-h", HOST, "-p", str(port)]
    return subprocess.run(command, check=False).returncode == 0


def _make_databases(programs: Path, port: int, password: str) -> None:
    """Create missing databases. Raises ServiceError where the password is not that of the first start."""

    def sql(statement: str) -> str:
        command = [str(programs / "psql"), "-h", HOST, "-p", str(port), "-U", USER, "-qtAXc", statement, "postgres"]
        return run_tool(command, "asking Postgres for its databases", PGPASSWORD=password, PGCONNECT_TIMEOUT="10")

    there = sql("SELECT datname FROM pg_database").split()
    for name in DATABASES:
        if name not in there:
            sql(f"CREATE DATABASE {name}")
