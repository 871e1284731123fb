"""Long calls into libraries that know neither signals nor progress: they run in a thread, and the caller waits."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from vectorclm.errors import PreemptedError

LOOK_SECONDS = 0.2  # between two looks at what happens meanwhile
Value = TypeVar("Value")

ending = threading.Event()  # set by whoever runs stages in threads of its own, to end them: these get no signals


def interruptibly(
    work: Callable[[threading.Event], Value], meanwhile: Callable[[float], None] = lambda seconds: None
) -> Value:
    """What `work` returns, called in a thread of its own, so that this one hears signals and raises what they raise.

    `meanwhile` is told every now and then for how many seconds it runs. Where the caller leaves early, `work` goes on
    in the library to the end of the process, and its argument is set: Python code in it ends itself then. Raises
    PreemptedError where `ending` is set.
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
