"""Processes that build slices of a data set beside each other, and end with the process that started them.

A slice is a call that writes files into a folder of its own and returns a JSON-like result. Which process builds a
slice changes none of its bytes.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from vectorclm.errors import PreemptedError, WorkerLostError
from vectorclm.runtime.library_calls import LOOK_SECONDS, ending

WATCH_SECONDS = 0.5  # between two checks of a worker whether its parent lives


class Workers:
    """Builds slices in this process, when their results are wanted; the other kinds build them ahead."""

    ahead = 0  # slices that may be built or wait beside the one that is wanted

    def submit(self, work: Callable[..., Any], out: Path, *arguments: Any) -> Callable[[], Any]:
        """Have `work(out, *arguments)` called; returns a function that waits for its result."""
        return lambda: work(out, *arguments)


class ExecutorWorkers(Workers):
    """Builds slices by an executor, so that arguments and results are pickled."""

    def __init__(self, executor: Executor, ahead: int) -> None:
        self.executor, self.ahead = executor, ahead

    def submit(self, work: Callable[..., Any], out: Path, *arguments: Any) -> Callable[[], Any]:
        """Have `work(out, *arguments)` called; returns a function that waits for its result."""
        with _explained():
            found = self.executor.submit(work, out, *arguments)
        return lambda: _result(found)


IN_THIS_PROCESS = Workers()
_elsewhere: list[Workers] = []  # other machines, that an engine has joined


def use_workers(workers: Workers) -> None:
    """Have all stages of this process build their slices by these workers."""
    _elsewhere[:] = [workers]


@contextmanager
def open_workers(processes: int) -> Iterator[Workers]:
    """Workers for the block: those of `use_workers`, else so many processes of this machine; one = this process.

    Where an error ends the block, the processes end at once.
    """
    if _elsewhere or processes == 1:
        yield (*_elsewhere, IN_THIS_PROCESS)[0]
        return
    context = multiprocessing.get_context("spawn")  # forks of a process with threads may hang
    left = context.Event()
    with ProcessPoolExecutor(processes, context, _begin, (left, os.getpid())) as executor:
        try:
            yield ExecutorWorkers(executor, processes + 1)
        except BaseException:
            left.set()
            executor.shutdown(wait=False, cancel_futures=True)
            raise


def _begin(left: Event, parent: int) -> None:
    """Prepare a worker: its parent handles Ctrl-C, and the worker ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core each
    threading.Thread(target=_watch, args=(left, parent), daemon=True, name="parent").start()


def _watch(left: Event, parent: int) -> None:
    while os.getppid() == parent and not left.is_set():
        time.sleep(WATCH_SECONDS)
    os._exit(1)


def _result(found: "Future[Any]") -> Any:
    """The result of a call; signal handlers of this thread still run and may raise."""
    while not wait([found], LOOK_SECONDS).done:
        if ending.is_set():
            raise PreemptedError("ended while slices were built: run the same again")
    with _explained():
        return found.result()


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except BrokenExecutor as error:
        raise WorkerLostError(
            "a worker process ended: run the same again, which keeps finished files; lower data_workers if the system "
            "ended it because memory ran out"
        ) from error
