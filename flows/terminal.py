"""A run in a terminal: log lines above the progress bars, progress lines in a file, and Ctrl-C in good order."""

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
END_SECONDS = 25  # after Ctrl-C; a stage in the middle of a library's call cannot be asked to stop


def flush_logs() -> None:
    """Have Prefect's server store the last log lines."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        for handler in logging.getLogger(name).handlers:
            handler.flush()


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C end the block in good order, in END_SECONDS at the most; a second one ends it at once."""

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
    """Log records as lines, above the progress bars where there are any."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else "green"
        self.console.print(record.getMessage(), style=style, highlight=False, markup=False, soft_wrap=True)


class ProgressLines(logging.Handler):
    """Progress for a log file: a line a stage, and no more than one in REPORT_SECONDS."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console
        self._last: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        tick = getattr(record, "tick", None)
        now = time.monotonic()
        if isinstance(tick, Tick) and now - self._last.setdefault(tick.stage, now) > REPORT_SECONDS:
            self._last[tick.stage] = now
            line = f"{tick.stage} {tick.done:,} of {tick.total:,} {tick.unit}  {tick.note}"
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def attached(handler: logging.Handler, names: Mapping[str, int]) -> Iterator[None]:
    """Have the handler hear these loggers, from these levels up, while the block runs."""
    for name, level in names.items():
        logging.getLogger(name).setLevel(level)
        logging.getLogger(name).addHandler(handler)
    try:
        yield
    finally:
        for name in names:
            logging.getLogger(name).removeHandler(handler)
