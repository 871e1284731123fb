"""SIGTERM: a training finishes its step, keeps a checkpoint and ends; anything else ends at once.

Schedulers, service managers, `docker stop` and torchrun ask by SIGTERM, and kill some seconds later. A training that
has kept a checkpoint ends with exit code 75 (EX_TEMPFAIL: run the same again). A second SIGTERM ends any stage at once;
one within REPEATED seconds of the first is the same request, as whoever starts a process passes on what it gets, and
service managers signal all processes of a service.
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
ENDED = 143  # exit code of what SIGTERM ended otherwise: 128 + 15, as a shell has it
REPEATED = 1.0  # seconds
GRACE = 10  # seconds until a rank of a training ends that does not come to the end of its step
FINISH = 30  # seconds for what follows: the checkpoint, or publishing what is finished; torchrun kills after as many

Value = TypeVar("Value")


class _Abandoned(BaseException):
    """SIGTERM came: what is being computed is given up."""


class Preemption:
    """Whether SIGTERM has asked this process to end."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.requested = False
        self._training = self._can_abandon = False
        self._limit = 0  # seconds from the first signal to an end by the system's alarm; 0 for no such end

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM while the block runs, in the main thread; in any other nothing changes."""
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
            # A request that is met may be repeated, up to the very end of the process.
            signal.signal(signal.SIGTERM, signal.SIG_IGN if self.requested else handler)
            os.close(writer)
            self._reset()

    def limit(self, seconds: int) -> None:
        """From the signal on the process may live so long, whatever it is doing; counted anew where it came already."""
        self._limit = seconds
        if self.requested:
            signal.alarm(seconds)

    def begin_training(self) -> None:
        """From now on the first SIGTERM only sets `requested`: the training looks at it once a step."""
        self._training = True

    def unless_requested(self, work: Callable[[], Value]) -> Value | None:
        """What `work` returns; None where SIGTERM came before, or comes meanwhile, and the work is given up."""
        try:
            self._can_abandon = True
            try:
                return None if self.requested else work()
            finally:
                self._can_abandon = False
        except _Abandoned:
            return None
        except Exception:
            if self.requested:  # a data loader whose processes got the signal, too, for one
                return None
            raise

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Python calls this between two of its instructions: at once, but never inside a library's call."""
        if not self._training:
            sys.exit(ENDED)
        if not self.requested:
            self.requested = True
            if self._can_abandon:
                raise _Abandoned

    def _watch(self, reader: int, parent: int) -> None:
        """See each signal at once, also while the main thread is in a library's call: only this can end it there."""
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
                    # No second request, but the news that whoever started this process is gone.
                    signal.alarm(min(FINISH, signal.alarm(0) or FINISH))
                elif time.monotonic() - first > REPEATED:
                    os._exit(ENDED)
        os.close(reader)


preemption = Preemption()  # of this process, as signals are


def ignore_sigterm(worker: int) -> None:
    """Have a data loader's process outlive SIGTERM, as the training still needs it; it ends with the training."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
