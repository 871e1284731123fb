"""Run a core stage as a child process: its progress, lines and errors come back, and it never outlives us.

A device-side assert ruins the CUDA context of its process, so a retry can only help in a new one.
"""

import builtins
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from vectorclm import errors
from vectorclm.errors import VectorCLMError
from vectorclm.progress import parse_tick, say

KILL_AFTER = 10  # seconds between the request to end and the kill
TAIL_LINES = 30  # log lines that an error message quotes

# What `setpriv --pdeathsig TERM` does, for systems without it: signal 15 when the parent is gone (prctl 1).
PDEATHSIG = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execvp(sys.argv[1], sys.argv[1:])"


class StageFailedError(VectorCLMError):
    """A stage ended badly; the message names it and says what to do."""


class StageInterruptedError(StageFailedError):
    """A stage's process was killed from outside: another attempt carries on where it was."""


class StageCancelledError(StageFailedError):
    """A stage's process was ended by this one, which is itself ending."""


class Launcher:
    """The children of one curriculum; leaving the block ends those that still run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._children: set[subprocess.Popen[str]] = set()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._closed = True
            children = list(self._children)
        for child in children:
            _end(child)

    def run(self, command: Sequence[str], log: Callable[[str], None]) -> None:
        """Run `command` to its end; progress goes to `vectorclm.progress`, every other line to `log`.

        Raises the error the child reported, as the class it had there; StageInterruptedError where a signal
        ended it; StageFailedError, with its last lines, where it ended otherwise.
        """
        tail: deque[str] = deque(maxlen=TAIL_LINES)
        reported: Exception | None = None
        with self._started(command) as child:
            assert child.stdout is not None
            for line in child.stdout:
                if _relay_tick(line):
                    continue
                if (found := _parse_error(line)) is not None:
                    reported = found
                elif line := line.rstrip():
                    tail.append(line)
                    log(line)
            code = child.wait()
        if code == 0:
            return
        if self._closed:
            raise StageCancelledError("ended with the curriculum")
        if reported is not None:
            raise reported
        last = "\n".join(tail) or "(it said nothing)"
        if (name := _signal_name(code)) is not None:
            memory = ", which is also what the system does when memory runs out" if name == "SIGKILL" else ""
            raise StageInterruptedError(f"its process was ended by {name}{memory}; its last lines:\n{last}")
        raise StageFailedError(f"its process ended with exit code {code}; its last lines:\n{last}")

    @contextmanager
    def _started(self, command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
        with self._lock:
            if self._closed:
                raise StageCancelledError("not started: the curriculum is ending")
            child = subprocess.Popen(
                dying_with_parent(command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
            self._children.add(child)
        try:
            with child:
                yield child
        except BaseException:
            _end(child)
            raise
        finally:
            with self._lock:
                self._children.discard(child)


def dying_with_parent(command: Sequence[str]) -> list[str]:
    """`command`, made to get SIGTERM when the thread that starts it is gone, even by `kill -9` (on Linux)."""
    if shutil.which("setpriv"):
        return ["setpriv", "--pdeathsig", "TERM", *command]
    if platform.system() == "Linux":
        return [sys.executable, "-c", PDEATHSIG, *command]
    return list(command)


def _end(child: subprocess.Popen[str]) -> None:
    """Ask the child's whole process group to end, then kill it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if child.poll() is not None:
            return
        try:
            os.killpg(child.pid, number)
            child.wait(KILL_AFTER)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _relay_tick(line: str) -> bool:
    try:
        tick = parse_tick(line)
    except (ValueError, TypeError):
        return False  # a line that a kill cut short
    if tick is not None:
        say(tick)
    return tick is not None


def _parse_error(line: str) -> Exception | None:
    """The exception in a line `{"error": {"type", "message"}}`, as the class it had in the child."""
    if not line.startswith('{"error"'):
        return None
    try:
        said: dict[str, Any] = json.loads(line)["error"]
        name, message = str(said["type"]), str(said["message"])
    except (ValueError, KeyError, TypeError):
        return None
    for module in (errors, builtins):
        found = getattr(module, name, None)
        if isinstance(found, type) and issubclass(found, VectorCLMError | OSError):
            return found(message)
    return StageFailedError(f"{name}: {message}")


def _signal_name(code: int) -> str | None:
    """The signal that ended a process: -n, or 128 + n from a handler that exits, and from a shell."""
    number = -code if code < 0 else code - 128
    return signal.Signals(number).name if number in set(signal.Signals) else None
