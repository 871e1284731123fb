"""SIGTERM handling: a training finishes its step, saves a checkpoint and ends; any other stage ends at once.

Schedulers, service managers, `docker stop` and torchrun send SIGTERM, and kill some seconds later. A training that has
saved a checkpoint ends with exit code 75 (EX_TEMPFAIL: run the same command again). A second SIGTERM ends any stage at
once. A SIGTERM within REPEATED seconds of the first counts as the same request: parent processes forward the signal,
and service managers signal all processes of a service.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

PREEMPTED = 75  # exit code of a training that SIGTERM ended
ENDED = 143  # exit code of any other process that SIGTERM ended: 128 + 15, as in a shell
REPEATED = 1.0  # seconds in which a second SIGTERM is the same request
GRACE = 10  # seconds after which a rank ends that does not reach the end of its step
FINISH = 30  # seconds to save the checkpoint or publish a finished artifact; torchrun kills after as many

Value = TypeVar("Value")


class _Abandoned(BaseException):
    """SIGTERM arrived: the current computation is abandoned."""


class Preemption:
    """Whether SIGTERM has asked this process to end."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.requested = False
        self._training = self._can_abandon = False
        self._limit = 0  # seconds from the first signal to the system's alarm, which ends the process; 0 = no alarm

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle SIGTERM while the block runs, in the main thread only; other threads change nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        handler = signal.signal(signal.SIGTERM, self._handle)
        descriptor = signal.set_wakeup_fd(writer)
        threading.Thread(target=self._watch, args=(reader, os.getppid()), daemon=True, name="SIGTERM").start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(descriptor)
            # The sender may repeat a request that was met, until the process ends.
            signal.signal(signal.SIGTERM, signal.SIG_IGN if self.requested else handler)
            os.close(writer)
            self._reset()

    def limit(self, seconds: int) -> None:
        """Limit the process's life after SIGTERM to `seconds`; after a SIGTERM, the count starts now."""
        self._limit = seconds
        if self.requested:
            signal.alarm(seconds)

    def begin_training(self) -> None:
        """From now on, have the first SIGTERM only set `requested`, which the training checks once a step."""
        self._training = True

    def unless_requested(self, work: Callable[[], Value]) -> Value | None:
        """Return the result of `work`; None where SIGTERM arrived before, or abandons `work` meanwhile."""
        try:
            self._can_abandon = True
            try:
                return None if self.requested else work()
            finally:
                self._can_abandon = False
        except _Abandoned:
            return None
        except Exception:
            if self.requested:  # such as the error of a data loader whose processes received the signal, too
                return None
            raise

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler. Python runs it between two bytecode instructions, so never during a library's call."""
        if not self._training:
            sys.exit(ENDED)
        if not self.requested:
            self.requested = True
            if self._can_abandon:
                raise _Abandoned

    def _watch(self, reader: int, parent: int) -> None:
        """Read each signal at once, also while the main thread is in a library's call, which only this thread ends."""
        first: float | None = None
        while numbers := os.read(reader, 64):
            for number in numbers:
                if number not in (signal.SIGTERM, signal.SIGINT):
                    continue
                if first is None:
                    first = time.monotonic()
                    if self._limit:
                        signal.alarm(self._limit)
                elif os.getppid() != parent:
                    # The parent process has ended, and the system reports that; this is not a second request.
                    signal.alarm(min(FINISH, signal.alarm(0) or FINISH))
                elif time.monotonic() - first > REPEATED:
                    os._exit(ENDED)
        os.close(reader)


preemption = Preemption()  # one for the process, as signals go to the process


def ignore_sigterm(worker: int) -> None:
    """Ignore SIGTERM in a data loader's process: the training still needs the process, which ends with the training."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
