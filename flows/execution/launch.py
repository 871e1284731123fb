"""Run a stage as a child process that relays its progress, log lines and errors, and dies with its parent.

A device-side assert ruins the CUDA context of its process, so only a retry in a new process can help.
"""

import builtins
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from flows.handle import StageCancelledError as StageCancelledError
from flows.handle import StageFailedError as StageFailedError
from flows.handle import StageInterruptedError as StageInterruptedError
from flows.net import SAFE_PATH, neutral
from vectorclm import errors
from vectorclm.errors import PreemptedError, RankLostError, VectorCLMError
from vectorclm.runtime.processes import dying_with_parent
from vectorclm.runtime.progress import parse_tick, say

TURN_SECONDS = 1  # between two checks whether the devices are free
KILL_AFTER = 6  # seconds between the second SIGTERM, which asks for an end at once, and SIGKILL
CANCEL_SECONDS = 2  # between the two SIGTERMs if a person cancels: enough for a small checkpoint
PREEMPT_SECONDS = 30  # between the two SIGTERMs if a signal ends this process, as when its machine shuts down
TAIL_LINES = 30  # log lines that an error message quotes


def device_names(dev: Path = Path("/dev")) -> list[str]:
    """The sorted names of the GPUs that this process may use: CUDA_VISIBLE_DEVICES, else all; `cpu` without a GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        names = {str(number) for number in range(len(list(dev.glob("nvidia[0-9]*"))))}
    else:
        names = {re.sub(r"[^\w.-]", "-", name.strip()) for name in visible.split(",")}
    return sorted(names - {"", "-1"}) or ["cpu"]


class Launcher:
    """The child processes of one curriculum; leaving the block ends those that still run.

    After `take_turn` the curriculum has the devices of this machine (CUDA_VISIBLE_DEVICES of them, if set) to itself
    until its end: two trainings that share a GPU or cores both run at far less than half speed. Each device is
    claimed by a file lock in `locks`, which the system frees when its holder dies.
    """

    def __init__(self, locks: Path, name: str = "another run") -> None:
        self.name = name  # for runs that wait for this one
        self._lock = threading.Lock()
        locks.mkdir(parents=True, exist_ok=True)
        self._devices = [FileLock(locks / f"device-{name}.lock", thread_local=False) for name in device_names()]
        self._turn = threading.Lock()
        self._children: set[subprocess.Popen[str]] = set()
        self.closed = threading.Event()
        self.preempted = False  # a signal ends the block: trainings get time for their checkpoints

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
        with self._lock:
            for device in self._devices:
                device.release()

    def take_turn(self, waits: Callable[[str | None], None]) -> None:
        """Wait until no other curriculum uses the devices of this machine, and claim them until the block ends.

        Calls `waits` with the name of the run that has them if it has to wait, and with None when they are free. Raises
        StageCancelledError where the block ends first.
        """
        with self._turn:
            if all(device.is_locked for device in self._devices):
                return
            reported = False
            while not self._claimed():
                if not reported:
                    waits(self._holder())
                reported = True
                if self.closed.wait(TURN_SECONDS):
                    raise StageCancelledError("ended with the curriculum")
            if reported:
                waits(None)

    def _claimed(self) -> bool:
        """Try to lock all devices. All processes lock in the same order and keep their locks: no deadlock."""
        with self._lock:  # the end of the block releases the locks, and none may be taken after it
            if self.closed.is_set():
                raise StageCancelledError("ended with the curriculum")
            for device in self._devices:
                if not device.is_locked:
                    try:
                        device.acquire(timeout=0)
                    except Timeout:
                        return False
                    Path(device.lock_file).with_suffix(".txt").write_text(self.name, encoding="utf-8")
            return True

    def _holder(self) -> str:
        """The name of the run that holds the first device which is not ours."""
        for device in self._devices:
            if not device.is_locked:
                with suppress(OSError):
                    return Path(device.lock_file).with_suffix(".txt").read_text(encoding="utf-8")
        return "another run"

    def run(self, command: Sequence[str], log: Callable[[str], None]) -> None:
        """Run `command` to its end; progress goes to `vectorclm.runtime.progress`, every other line to `log`.

        Raises the error that the child reported, as the same class; StageInterruptedError where a signal ended the
        child, also after a checkpoint; StageFailedError with its last lines where it failed otherwise.
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
        if isinstance(reported, PreemptedError | RankLostError):
            raise StageInterruptedError(str(reported)) from reported
        if reported is not None:
            raise reported
        last = "\n".join(tail) or "(no output)"
        if (name := _signal_name(code)) is not None:
            memory = " (the system also sends it when memory runs out)" if name == "SIGKILL" else ""
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
                # The core uses neither Prefect nor MLflow.
                env={**neutral(os.environ), **SAFE_PATH, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
            self._children.add(child)
        try:
            with child:  # which waits for the child, so an error ends the child first
                try:
                    yield child
                except BaseException:
                    _end(child, CANCEL_SECONDS)
                    raise
        finally:
            with self._lock:
                self._children.discard(child)


def under_torchrun(command: Sequence[str], processes: int, threads: int) -> list[str]:
    """Wrap `command` in torchrun: `processes` ranks on this machine, each with `threads` threads.

    Ranks are in sessions of their own, which a signal to torchrun's group does not reach; each rank dies with torchrun.
    If a rank fails, all end; the retry of the stage restarts them.
    """
    # The ranks do not share torchrun's store: a restart after a rank's death may hang with a shared one.
    settings = ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", f"OMP_NUM_THREADS={threads}"]
    loopback = "lo" if platform.system() == "Linux" else "lo0"  # the ranks talk on this machine only
    settings += [f"GLOO_SOCKET_IFNAME={loopback}", f"NCCL_SOCKET_IFNAME={loopback}"]
    torchrun = [sys.executable, "-m", "flows.execution.ranks", "--standalone", f"--nproc-per-node={processes}"]
    return ["env", *settings, *torchrun, "--max-restarts=0", "--no-python", *dying_with_parent(command)]


def _end(child: subprocess.Popen[str], patience: float) -> None:
    """Send SIGTERM to the child's process group, again after `patience` seconds, then SIGKILL."""
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
    """Ignore SIGTERM while the block runs: this process is ending already, and the signal may be repeated."""
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
        return False  # a line that was cut off by a kill
    if tick is not None:
        say(tick)
    return tick is not None


def _parse_error(line: str) -> Exception | None:
    """The exception in a line `{"error": {"type", "message"}}`, as the class it had in the child."""
    if not line.startswith('{"error"'):
        return None
    try:
        fields: dict[str, Any] = json.loads(line)["error"]
        name, message = str(fields["type"]), str(fields["message"])
    except (ValueError, KeyError, TypeError):
        return None
    for module in (errors, builtins):
        found = getattr(module, name, None)
        if isinstance(found, type) and issubclass(found, VectorCLMError | OSError):
            return found(message)
    return StageFailedError(f"{name}: {message}")


def _signal_name(code: int) -> str | None:
    """The name of the signal in an exit code: -n, or 128 + n from a shell or a handler that exits."""
    number = -code if code < 0 else code - 128
    return signal.Signals(number).name if number in set(signal.Signals) else None
