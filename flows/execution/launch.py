"""Run a core stage as a child process: its progress, lines and errors come back, and it never outlives us.

A device-side assert ruins the CUDA context of its process, so a retry can only help in a new one.
"""

import builtins
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from flows.net import neutral
from vectorclm import errors
from vectorclm.errors import PreemptedError, VectorCLMError
from vectorclm.runtime.progress import parse_tick, say

TURN_SECONDS = 1  # between two looks whether the devices are free
KILL_AFTER = 6  # seconds between the second request to end, which asks for an end at once, and the kill
CANCEL_SECONDS = 2  # between the two where a person waits for the devices: enough for a small checkpoint
PREEMPT_SECONDS = 30  # between the two where this process is asked to end by a signal, as its machine may be
TAIL_LINES = 30  # log lines that an error message quotes

# What `setpriv --pdeathsig TERM` does, for systems without it: signal 15 when the parent is gone (prctl 1).
PDEATHSIG = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execvp(sys.argv[1], sys.argv[1:])"


class StageFailedError(VectorCLMError):
    """A stage ended badly; the message names it and says what to do."""


class StageInterruptedError(StageFailedError):
    """A stage was ended from outside, killed or after a checkpoint: another attempt carries on where it was."""


class StageCancelledError(StageFailedError):
    """A stage's process was ended by this one, which is itself ending."""


def device_names(dev: Path = Path("/dev")) -> list[str]:
    """The GPUs that this process may use, as file names, sorted: of CUDA_VISIBLE_DEVICES, else all; or `cpu`."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        names = {str(number) for number in range(len(list(dev.glob("nvidia[0-9]*"))))}
    else:
        names = {re.sub(r"[^\w.-]", "-", name.strip()) for name in visible.split(",")}
    return sorted(names - {"", "-1"}) or ["cpu"]


class Launcher:
    """The children of one curriculum; leaving the block ends those that still run.

    Once it took its turn a curriculum has, to its end, the devices of this machine (CUDA_VISIBLE_DEVICES of them, where
    that is set) to itself: two trainings on one GPU, or on the same cores, cost each other far more than their share.
    The claim is a file lock in `locks` for each, which the system frees when its holder dies, however that comes.
    """

    def __init__(self, locks: Path) -> None:
        self._lock = threading.Lock()
        locks.mkdir(parents=True, exist_ok=True)
        self._devices = [FileLock(locks / f"device-{name}.lock", thread_local=False) for name in device_names()]
        self._turn = threading.Lock()
        self._children: set[subprocess.Popen[str]] = set()
        self.closed = threading.Event()
        self.preempted = False  # whether the block ends by a signal: then trainings have time for their checkpoints

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self.closed.set()
            children = list(self._children)
        if children:
            patience = PREEMPT_SECONDS if self.preempted else CANCEL_SECONDS
            with _deaf_to_sigterm(), ThreadPoolExecutor(len(children)) as threads:
                list(threads.map(_end, children, [patience] * len(children)))
        for device in self._devices:
            device.release()

    def take_turn(self, waits: Callable[[bool], None]) -> None:
        """Return once no other curriculum uses this machine's devices, and keep them until the block ends.

        Calls `waits(True)` where it has to wait, and then `waits(False)` when its turn has come. Raises
        StageCancelledError where the block ends first.
        """
        with self._turn:
            if all(device.is_locked for device in self._devices):
                return
            told = False
            while not self._free():
                if not told:
                    waits(True)
                told = True
                if self.closed.wait(TURN_SECONDS):
                    raise StageCancelledError("ended with the curriculum")
            if told:
                waits(False)

    def _free(self) -> bool:
        """Whether all devices are ours now. Taken in one order by all, and kept, so that no two wait for each other."""
        for device in self._devices:
            if not device.is_locked:
                try:
                    device.acquire(timeout=0)
                except Timeout:
                    return False
        return True

    def run(self, command: Sequence[str], log: Callable[[str], None]) -> None:
        """Run `command` to its end; progress goes to `vectorclm.runtime.progress`, every other line to `log`.

        Raises the error the child reported, as the class it had there; StageInterruptedError where a signal
        ended it, also after a checkpoint; StageFailedError, with its last lines, where it ended otherwise.
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
        if self.closed.is_set():
            raise StageCancelledError("ended with the curriculum")
        if isinstance(reported, PreemptedError):
            raise StageInterruptedError(str(reported)) from reported
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
            if self.closed.is_set():
                raise StageCancelledError("not started: the curriculum is ending")
            child = subprocess.Popen(
                dying_with_parent(command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
                env={
                    **neutral(os.environ),
                    "PYTHONUNBUFFERED": "1",
                },  # the core asks neither server, nor may what it runs
                start_new_session=True,
            )
            self._children.add(child)
        try:
            with child:
                yield child
        except BaseException:
            _end(child, CANCEL_SECONDS)
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


def under_torchrun(command: Sequence[str], processes: int, threads: int) -> list[str]:
    """`command` as so many ranks of one machine, each with so many threads. The stage's retry restarts them all.

    Ranks are in sessions of their own, out of reach of a signal to torchrun's group: each ends with torchrun.
    """
    # The ranks' store apart from torchrun's: shared, a restart after a rank's death may hang.
    settings = ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", f"OMP_NUM_THREADS={threads}"]
    loopback = "lo" if platform.system() == "Linux" else "lo0"  # what they say reaches no other machine
    settings += [f"GLOO_SOCKET_IFNAME={loopback}", f"NCCL_SOCKET_IFNAME={loopback}"]
    torchrun = [sys.executable, "-m", "flows.execution.ranks", "--standalone", f"--nproc-per-node={processes}"]
    return ["env", *settings, *torchrun, "--max-restarts=0", "--no-python", *dying_with_parent(command)]


def _end(child: subprocess.Popen[str], patience: float) -> None:
    """Ask the child's whole process group to end, after `patience` seconds to end at once; then kill it."""
    for number, seconds in ((signal.SIGTERM, patience), (signal.SIGTERM, KILL_AFTER), (signal.SIGKILL, KILL_AFTER)):
        if child.poll() is not None:
            return
        try:
            os.killpg(child.pid, number)
            child.wait(seconds)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


@contextmanager
def _deaf_to_sigterm() -> Iterator[None]:
    """Ignore SIGTERM while the block runs: a request that is being met may be repeated."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


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
