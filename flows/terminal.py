"""Terminal output of a run: log lines above progress bars, progress lines in a file, and a clean end on Ctrl-C."""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

from rich.console import Console

from vectorclm.runtime.progress import Tick

REPORT_SECONDS = 30
END_SECONDS = 25  # after Ctrl-C; a stage inside a library call cannot be asked to stop


def flush_logs() -> None:
    """Send the last log lines to Prefect's server."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        for handler in logging.getLogger(name).handlers:
            handler.flush()


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C end the block cleanly within END_SECONDS; a second Ctrl-C ends the process at once."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # children end with this process
        timer = threading.Timer(END_SECONDS, os._exit, [130])
        timer.daemon = True
        timer.start()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class LogLines(logging.Handler):
    """A logging handler that prints records as lines, above progress bars if there are any."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else "green"
        self.console.print(record.getMessage(), style=style, highlight=False, markup=False, soft_wrap=True)


class ProgressLines(logging.Handler):
    """A logging handler that prints progress as lines, at most one for each stage in REPORT_SECONDS.

    The first line of a resumed stage says where it continues.
    """

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console
        self._last: dict[str, float] = {}
        self._resumed: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        tick = getattr(record, "tick", None)
        now = time.monotonic()
        if not isinstance(tick, Tick):
            return
        if tick.resumed and tick.stage not in self._resumed:
            self._resumed.add(tick.stage)
            self.console.print(tick.continues, highlight=False, markup=False)
        if now - self._last.setdefault(tick.stage, now) > REPORT_SECONDS:
            self._last[tick.stage] = now
            line = f"{tick.stage} {tick.done:,} of {tick.total:,} {tick.unit}  {tick.note}"
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def attached(handler: logging.Handler, names: Mapping[str, int]) -> Iterator[None]:
    """Attach a handler to loggers, each from its level up, while the block runs."""
    for name, level in names.items():
        logging.getLogger(name).setLevel(level)
        logging.getLogger(name).addHandler(handler)
    try:
        yield
    finally:
        for name in names:
            logging.getLogger(name).removeHandler(handler)
