"""A service process of the platform: start it, wait for it, find it again, stop it.

The process outlives the command that starts it; its folder keeps its log and a record of the process.
"""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from flows.net import SAFE_PATH, neutral
from flows.platform import private
from vectorclm.errors import ConfigError, VectorCLMError
from vectorclm.runtime.processes import find_process, process_identity, process_space
from vectorclm.settings import digest

HOST = "127.0.0.1"
PREFECT = "prefect-server"  # the name of the service
START_SECONDS = 180  # a cold start migrates a new database
STOP_SECONDS = 20
LOG_BYTES = 10_000_000  # of a service, beside which as much of its past is kept


class ServiceError(VectorCLMError):
    """A service of the platform did not start; the message ends with the last lines of its log."""


@dataclass(frozen=True)
class Service:
    """A process of the platform: its command, environment, folder and checks."""

    name: str
    command: list[str]
    environment: Mapping[str, str]
    folder: Path  # of its log and its record
    port: int | None = None
    ready: Callable[[], bool] | None = None  # whether it answers
    prepare: Callable[[], None] | None = None  # runs before its start
    umask: int = 0o077  # only the owner can read its files

    @property
    def log(self) -> Path:
        """The file of its output."""
        return self.folder / f"{self.name}.log"

    @property
    def record(self) -> Path:
        """The file that identifies its process."""
        return self.folder / f"{self.name}.json"

    def process(self) -> psutil.Process | None:
        """The running process, or None."""
        known, deadline = self._known(), time.monotonic() + STOP_SECONDS
        with suppress(psutil.Error):
            while (process := find_process(known)) is not None and time.monotonic() < deadline:
                if process.cmdline():
                    return process
                time.sleep(0.01)  # it is just starting, or was killed and still holds its files
        return None

    def holds_its_port(self) -> bool:
        """Whether the program that listens on its port is the recorded process or a child, and not a stranger."""
        process = self.process()
        with suppress(psutil.Error):
            if process is not None:
                return any(_listens(each, self.port) for each in (process, *process.children(recursive=True)))
        return False

    def _known(self) -> dict[str, Any]:
        known = self._read()
        return {} if self._is_copied(known) else known

    def _read(self) -> dict[str, Any]:
        with suppress(OSError, ValueError):
            return dict(json.loads(self.record.read_text(encoding="utf-8")))
        return {}

    def was_started(self) -> bool:
        """Whether it was started and not stopped since, be it running or dead; a record from another home is none."""
        return self.record.exists() and not self._is_copied(self._read())

    def _is_copied(self, known: Mapping[str, Any]) -> bool:
        """Whether a record came with a copy of its home."""
        return bool(known.get("folder", str(self.folder)) != str(self.folder))

    def _settings(self, salt: str) -> str:
        """A digest of command and environment; salted, because passwords are part of it."""
        environment = {name: value for name, value in self.environment.items() if name.lower() != "no_proxy"}
        return digest({"salt": salt, "command": self.command, "environment": environment})

    def has_these_settings(self) -> bool:
        """Whether the recorded process, running or dead, was started with these settings."""
        known = self._known()
        return self._settings(known.get("salt", "")) == known.get("settings")

    def check_listener(self) -> None:
        """Raise ConfigError where another program listens at its port: it must not get the password of this service.

        After a restart of the machine any user's program can listen there.
        """
        if self.port is None or self.holds_its_port() or (held := holder(self.port)) is None:
            return
        raise ConfigError(
            f"port {self.port} is held by {held}, not by the {self.name} that `vectorclm up` started in "
            f"{self.folder.parent}, so no password is sent there: end it and run `vectorclm up`, or give the options "
            "that `up` had"
        )

    def check(self) -> bool:
        """Whether it runs; starts and changes nothing.

        Raises ServiceError where its port is taken, or where it runs with other settings.
        """
        if self.process() is not None:
            if not self.has_these_settings():
                raise ServiceError(
                    f"{self.name} runs with other settings: run `vectorclm down` with those settings first"
                )
            return True
        if not _of_session(self._known()):  # children of a killed process, which `start` ends, may hold the port
            self._check_port()
        return False

    def _check_port(self) -> None:
        if self.port is not None and (held := holder(self.port)) is not None:
            raise ServiceError(f"port {self.port} is taken by {held}: end it, or give {self.name} another port")

    def start(self) -> bool:
        """Start the process unless it runs; returns False if it ran.

        Raises ServiceError where its port is taken, or where it runs with other settings.
        """
        if self.check():
            return False
        if self.port is not None:
            _end(_of_session(self._known()))
            self._check_port()
        private.create_folder(self.folder)
        if self.prepare is not None:
            self.prepare()
        self.log.touch(mode=0o600)
        limit_log(self.log)
        with self.log.open("ab") as log:
            child = subprocess.Popen(
                self.command,
                env={**neutral(os.environ), **self.environment, **SAFE_PATH},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                umask=self.umask,
            )
        salt = secrets.token_hex(16)
        about = {"folder": str(self.folder), "salt": salt, "settings": self._settings(salt)}
        record = {**process_identity(psutil.Process(child.pid)), **about}
        self.record.touch(mode=0o600)
        self.record.write_text(json.dumps(record), encoding="utf-8")
        return True

    def wait(self) -> None:
        """Wait until it answers. Raises ServiceError with the last lines of its log where it ends or takes too long."""
        deadline = time.monotonic() + START_SECONDS
        while self.ready is not None and not (self.ready() and (self.port is None or self.holds_its_port())):
            ended = self.process() is None
            if ended or time.monotonic() > deadline:
                what = "ended during its start" if ended else f"does not answer after {START_SECONDS} s"
                words = "\n".join(self.log.read_text(errors="replace").strip().splitlines()[-15:])
                raise ServiceError(f"{self.name} {what}; {self.log} ends with:\n{words}")
            time.sleep(0.2)

    def stop(self) -> bool:
        """End the process and all its descendants; returns False if it did not run."""
        process, known = self.process(), self._known()
        if process is not None:
            family = [process, *process.children(recursive=True)]
            _end([process])
            _end(family)
        _end(_of_session(known))
        self.record.unlink(missing_ok=True)
        return process is not None


def limit_log(log: Path) -> None:
    """Move the content of a log that has grown beyond LOG_BYTES into a file beside it, in place of an earlier one.

    A process that appends to the log goes on; a line that it writes between the copy and the cut is lost.
    """
    with suppress(FileNotFoundError):
        if log.stat().st_size > LOG_BYTES:
            before = log.with_name(f"{log.name}.1")
            before.touch(mode=0o600)
            shutil.copyfile(log, before)
            os.truncate(log, 0)


def listens(port: int) -> bool:
    """Whether a program listens on a port of this machine."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((HOST, port)) == 0


def _listens(process: psutil.Process, port: int | None) -> bool:
    with suppress(psutil.Error):
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr == (HOST, port):
                return True
    return False


def holder(port: int) -> str | None:
    """A description of the program that listens on a port of this machine; None if the port is free."""
    if not listens(port):
        return None
    with suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status != psutil.CONN_LISTEN or connection.pid is None or not connection.laddr:
                continue
            if connection.laddr.port == port:
                process = psutil.Process(connection.pid)
                return _service_of([process, *process.parents()]) or f"{process.name()} (process {process.pid})"
    return "another program"


def _service_of(processes: Iterable[psutil.Process]) -> str | None:
    """The platform's service among these processes, with the platform's home; None without one."""
    for process in processes:
        if (record := _record_of(process)) is not None:
            return f"{record.stem} of the platform of {record.parent.parent} (process {process.pid})"
    return None


def _record_of(process: psutil.Process) -> Path | None:
    """The record of a process that is a service of a platform; None for another process."""
    with suppress(psutil.Error, OSError):
        folder = Path(process.cwd())
        for record in folder.glob("*.json") if folder.name == "platform" else ():
            with suppress(ValueError, TypeError):
                if find_process(json.loads(record.read_text(encoding="utf-8"))) == process:
                    return record
    return None


def running_homes() -> list[Path]:
    """The homes of the platforms of which a service runs on this machine, as far as this user may see."""
    records = [_record_of(process) for process in psutil.process_iter()]
    return sorted({record.parent.parent for record in records if record is not None})


def _of_session(known: Mapping[str, Any]) -> list[psutil.Process]:
    """Processes in the session of a recorded process that is gone."""
    if known.get("pids") != process_space() or psutil.pid_exists(known["pid"]):
        return []
    found = []
    for process in psutil.process_iter():
        with suppress(OSError):
            if os.getsid(process.pid) == known["pid"]:
                found.append(process)
    return found


def _end(processes: Iterable[psutil.Process]) -> None:
    """Send SIGTERM to the processes, then kill those that do not end."""
    left = list(processes)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        _, left = psutil.wait_procs(left, timeout=STOP_SECONDS)
