"""Processes that build slices of a stage beside each other, and end with the process that started them.

A slice is a call that may write files into a folder of its own, and returns a result. Which process builds a slice
changes none of its bytes.
"""

import multiprocessing
import os
import pickle
import secrets
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from vectorclm.errors import PreemptedError, WorkerLostError
from vectorclm.runtime.library_calls import LOOK_SECONDS, ending
from vectorclm.runtime.temporary import temporary_folder

WATCH_SECONDS = 0.5  # between two checks of a worker whether its parent lives
KEPT = 4  # shared values that a worker keeps in memory


class Shared:
    """A value that many slices need, which travels to each worker once."""

    def __init__(self, load: Callable[[], Any]) -> None:
        """`load` is called once by each worker, and can be pickled."""
        self.key, self.load = secrets.token_hex(8), load

    def value(self) -> Any:
        """The value, which the worker keeps for its next slices."""
        if self.key not in _values:
            while len(_values) >= KEPT:
                del _values[next(iter(_values))]
            _values[self.key] = self.load()
        return _values[self.key]


class _Here(Shared):
    """A value of this process."""

    def value(self) -> Any:
        return self.load()


class Workers:
    """Builds slices in this process, when their results are wanted; the other kinds build them ahead."""

    ahead = 0  # slices that may be built or wait beside the one that is wanted
    local = True  # whether they read and write this machine's files

    def share(self, value: Any) -> Shared:
        """A handle on a value, to be an argument of many slices; share a large value once."""
        return _Here(lambda: value)

    def each(
        self, work: Callable[..., Any], calls: Iterable[tuple[Any, ...]], *, with_files: bool = False
    ) -> Iterator[Any]:
        """The results of `work(*arguments)` for each call, in order.

        With files, the first argument is a folder for them, as in `submit`; without, `work` returns a result alone.
        Calls are taken as far ahead as slices are built. An error of `calls` is raised after the results before it.
        """
        source, ended = iter(calls), list[Exception]()
        waiting: deque[Callable[[], Any]] = deque()
        while True:
            while not ended and len(waiting) <= self.ahead:
                try:
                    call = next(source)
                    waiting.append(
                        self.submit(*((work, *call) if with_files else (_without_files, Path(), work, *call)))
                    )
                except Exception as error:  # also the end of the calls
                    ended.append(error)
            if not waiting:
                break
            yield waiting.popleft()()
        if not isinstance(ended[0], StopIteration):
            raise ended[0]

    def submit(self, work: Callable[..., Any], out: Path, *arguments: Any) -> Callable[[], Any]:
        """Have `work(out, *arguments)` called; returns a function that waits for its result."""
        return lambda: work(out, *arguments)


class ExecutorWorkers(Workers):
    """Builds slices by an executor, so that arguments and results are pickled."""

    def __init__(self, executor: Executor, ahead: int, folder: Path | None = None) -> None:
        """`folder` is for shared values; a pool of threads needs none."""
        self.executor, self.ahead, self.folder = executor, ahead, folder

    def share(self, value: Any) -> Shared:
        """A handle on a value, which each worker loads once, from a file."""
        if self.folder is None:
            return super().share(value)
        path = self.folder / f"shared-{secrets.token_hex(8)}"
        path.write_bytes(pickle.dumps(value, pickle.HIGHEST_PROTOCOL))
        return Shared(partial(_unpickled, path))

    def submit(self, work: Callable[..., Any], out: Path, *arguments: Any) -> Callable[[], Any]:
        """Have `work(out, *arguments)` called; returns a function that waits for its result."""
        with _explained():
            found = self.executor.submit(work, out, *arguments)
        return lambda: _result(found)


IN_THIS_PROCESS = Workers()
_elsewhere: list[Workers] = []  # other machines, that an engine has joined
_values: dict[str, Any] = {}  # in a worker: shared values by key
_current: ContextVar[Workers] = ContextVar("workers", default=IN_THIS_PROCESS)


def current_workers() -> Workers:
    """The workers of the `open_workers` block around the caller; without one, this process."""
    return _current.get()


def use_workers(workers: Workers) -> None:
    """Have all stages of this process build their slices by these workers."""
    _elsewhere[:] = [workers]


@contextmanager
def open_workers(processes: int) -> Iterator[Workers]:
    """Workers for the block: those of `use_workers`, else so many processes of this machine; one = this process.

    In the block they are the `current_workers`. Where an error ends the block, the processes end at once.
    """
    if _elsewhere or processes == 1:
        with _made_current((*_elsewhere, IN_THIS_PROCESS)[0]) as workers:
            yield workers
        return
    context = multiprocessing.get_context("spawn")  # forks of a process with threads may hang
    left = context.Event()
    with (
        temporary_folder() as folder,
        ProcessPoolExecutor(processes, context, _begin, (left, os.getpid())) as executor,
        _made_current(ExecutorWorkers(executor, processes + 1, folder)) as workers,
    ):
        try:
            yield workers
        except BaseException:
            left.set()
            executor.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _made_current(workers: Workers) -> Iterator[Workers]:
    before = _current.set(workers)
    try:
        yield workers
    finally:
        _current.reset(before)


def build_slice(work: Callable[..., Any], *arguments: Any) -> tuple[Any, dict[str, bytes]]:
    """Build a slice on another machine: its result, and its files by name."""
    with temporary_folder() as out:
        return work(out, *arguments), {path.name: path.read_bytes() for path in out.iterdir()}


def _without_files(out: Path, work: Callable[..., Any], *arguments: Any) -> Any:
    return work(*arguments)


def _unpickled(path: Path) -> Any:
    return pickle.loads(path.read_bytes())


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
