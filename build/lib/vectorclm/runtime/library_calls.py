"""Interruptible library calls: a long call runs in a thread, while the caller handles signals and shows progress."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from vectorclm.errors import PreemptedError

LOOK_SECONDS = 0.2  # between two checks for signals and progress
Value = TypeVar("Value")

ending = threading.Event()  # set by a caller that runs stages in threads, to end them: threads receive no signals


def interruptibly(
    work: Callable[[threading.Event], Value], meanwhile: Callable[[float], None] = lambda seconds: None
) -> Value:
    """Call `work` in a thread and return its result; signal handlers of the calling thread still run and may raise.

    `meanwhile` is called every 0.2 s with the seconds since the start. Where the caller leaves early, `work` continues
    in the library until the process ends, and the event that `work` received is set: Python code in `work` checks it
    and ends. Raises PreemptedError where `ending` is set.
    """
    found: Future[Value] = Future()
    left = threading.Event()

    def run() -> None:
        try:
            found.set_result(work(left))
        except BaseException as error:
            found.set_exception(error)

    began = time.monotonic()
    threading.Thread(target=run, daemon=True, name="library call").start()
    try:
        while not wait([found], LOOK_SECONDS).done:
            if ending.is_set():
                raise PreemptedError("ended in a library's call: run the same again")
            meanwhile(time.monotonic() - began)
        return found.result()
    finally:
        left.set()
