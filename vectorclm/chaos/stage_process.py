"""A stage in a process of its own, whose progress and errors are read while it runs."""

import json
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil

from vectorclm.runtime.processes import dying_with_parent
from vectorclm.runtime.progress import Tick, parse_tick

MARK = "VECTORCLM_CHAOS"  # in the environment of every process that a trial starts
TAIL_LINES = 40
GONE_SECONDS = 10.0  # in which the processes of an ended stage must be gone
SPAWNED, FORKED = "spawn_main", "multiprocessing.forkserver"  # in the command lines of Python's worker processes


@dataclass(frozen=True)
class Ended:
    """How a stage's process ended."""

    code: int  # negative: the signal that ended it
    error: str  # the message that it reported; empty without one
    output: str  # its last lines

    @property
    def is_clear(self) -> bool:
        """Whether the process succeeded, or said in one or two lines why not."""
        return self.code == 0 or (bool(self.error) and self.error.count("\n") < 2 and "Traceback" not in self.output)

    @property
    def in_words(self) -> str:
        """The end in one line."""
        said = self.error or next((line for line in reversed(self.output.splitlines()) if line.strip()), "no output")
        lines = self.output.splitlines()
        places = [line.strip() for line in lines if line.startswith("  File ") or "Error" in line]
        trace = f"; traceback: {' '.join(places[-3:])}" if "Traceback" in self.output else ""
        return f"exit code {self.code}: {said[:400]}{trace}"


class StageProcess:
    """The process of a stage command, the leader of a session of its own; SIGTERM ends it if this process dies."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], mark: str, prefix: Sequence[str] = ()
    ) -> None:
        self.began = self.ended = time.monotonic()
        self._popen = subprocess.Popen(
            [*prefix, *dying_with_parent(command)],  # a prefix changes namespaces, which clears the signal
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, **environment, MARK: mark, "PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"},
            start_new_session=True,
        )
        self.pid = self._popen.pid
        self.ticks: list[tuple[float, Tick]] = []
        self._error = ""
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._reader = threading.Thread(target=self._read, daemon=True, name="chaos output")
        self._reader.start()

    def _read(self) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            with suppress(ValueError, TypeError, KeyError):  # a line that a kill has cut off
                if (tick := parse_tick(line)) is not None:
                    self.ticks.append((time.monotonic(), tick))
                    continue
                if line.startswith('{"error"'):
                    self._error = str(json.loads(line)["error"]["message"])
                    continue
            self._tail.append(line)
        self.ended = time.monotonic()

    @property
    def seconds(self) -> float:
        """From the start to the end of its output."""
        return self.ended - self.began

    @property
    def done(self) -> int:
        """The units of work that are done by its last report."""
        return self.ticks[-1][1].done if self.ticks else 0

    def reached(self, done: int) -> float | None:
        """When so many units were done; None before."""
        return next((when for when, tick in list(self.ticks) if tick.done >= done), None)

    def is_alive(self) -> bool:
        """Whether the process runs, or is stopped."""
        return self._popen.poll() is None

    def send(self, number: signal.Signals, *, group: bool = False) -> None:
        """Send a signal to the process, or to every process of its group."""
        with suppress(ProcessLookupError):
            if self.is_alive():
                os.killpg(self.pid, number) if group else os.kill(self.pid, number)

    def workers(self) -> list[psutil.Process]:
        """Its worker processes: those that it spawned, and those that Python's fork server forked for it."""
        found = []
        with suppress(psutil.Error):
            for child in psutil.Process(self.pid).children(recursive=True):
                with suppress(psutil.Error):
                    line = " ".join(child.cmdline())
                    if SPAWNED in line or (FORKED in line and child.ppid() != self.pid):  # its child is the server
                        found.append(child)
        return found

    def wait(self, seconds: float) -> Ended | None:
        """Wait for the end; None where the process still runs after so many seconds."""
        try:
            code = self._popen.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        self._reader.join(GONE_SECONDS)  # a worker may keep the pipe open
        return Ended(code, self._error, "".join(self._tail))

    def end(self) -> None:
        """Kill the process and its group, if the process still runs."""
        self.send(signal.SIGKILL, group=True)
        self._popen.wait()


def marked(mark: str) -> list[psutil.Process]:
    """The live processes that trials with this mark have started."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def orphans(mark: str, seconds: float = GONE_SECONDS) -> list[str]:
    """The command lines of processes that outlive their stage by so many seconds; those are killed."""
    _, left = psutil.wait_procs(marked(mark), timeout=seconds)
    names = []
    for process in left:
        with suppress(psutil.Error):
            names.append(" ".join(process.cmdline())[:200])
            process.kill()
    psutil.wait_procs(left, timeout=seconds)
    return names
