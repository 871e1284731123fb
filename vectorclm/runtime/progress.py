"""Progress reports as log records, shown as progress bars or as JSON lines.

`Progress` logs to the logger `vectorclm.runtime.progress`. A terminal shows the records as bars (`bars()`), a parent
process reads them as JSON lines (`json_lines()`), and without a handler nothing is shown.
"""

import json
import logging
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

WIDE, NARROW = 120, 64  # columns of a terminal: from WIDE bars have their counts, below NARROW there is no bar

logger = logging.getLogger("vectorclm.runtime.progress")
logger.setLevel(logging.INFO)
logger.propagate = False


@dataclass(frozen=True)
class Tick:
    """One progress report of a stage: `done` of `total` `unit`s, and a short note such as the loss."""

    stage: str
    done: int
    total: int
    unit: str
    note: str = ""
    resumed: str = ""  # such as "step 120 of 244"; empty where the work began at its beginning

    @property
    def continues(self) -> str:
        """The line that says from where resumed work continues."""
        return f"{self.stage} continues from {self.resumed}"


class Progress:
    """Reporter of one stage's progress, at most five times a second: `with Progress("shards", n, "documents") as p`."""

    def __init__(self, stage: str, total: int, unit: str) -> None:
        self.tick = Tick(stage, 0, total, unit)
        self._last = 0.0
        self._stopped = False

    def __enter__(self) -> "Progress":
        self._say(self.tick)
        return self

    def advance(self, count: int, note: str = "") -> None:
        """Report that `count` more units are done."""
        self.at(self.tick.done + count, note)

    def at(self, done: int, note: str = "") -> None:
        """Report that `done` units are done in total."""
        self.tick = replace(self.tick, done=done, note=note or self.tick.note)
        if time.monotonic() - self._last > 0.2:
            self._say(self.tick)

    def resume(self, done: int, where: str) -> None:
        """Report that an earlier process did `done` units, and that the work continues from `where`."""
        self.tick = replace(self.tick, done=done, resumed=where)
        self._say(self.tick)

    def stop(self) -> None:
        """Leave the work unfinished: the block ends without an error, and the progress stays where it is."""
        self._stopped = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and not self._stopped:  # finished: the total was an estimate
            end = self.tick.done or self.tick.total
            self.tick = replace(self.tick, done=end, total=end)
        self._say(self.tick)

    def _say(self, tick: Tick) -> None:
        self._last = time.monotonic()
        logger.info("%s %d/%d %s", tick.stage, tick.done, tick.total, tick.unit, extra={"tick": tick})


def say(tick: Tick) -> None:
    """Log a tick that another process reported."""
    logger.info("%s %d/%d %s", tick.stage, tick.done, tick.total, tick.unit, extra={"tick": tick})


class _Handler(logging.Handler, ABC):
    def emit(self, record: logging.LogRecord) -> None:
        tick = getattr(record, "tick", None)
        if isinstance(tick, Tick):
            self.show(tick)

    @abstractmethod
    def show(self, tick: Tick) -> None:
        """Show the tick."""


class JsonLines(_Handler):
    """Handler that writes each tick as a line `{"tick": {...}}`, for the parent process of this stage."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.stream = stream

    def show(self, tick: Tick) -> None:
        self.stream.write(json.dumps({"tick": asdict(tick)}) + "\n")
        self.stream.flush()


def parse_tick(line: str) -> Tick | None:
    """Parse the tick in a line that `JsonLines` wrote; None for any other line."""
    if not line.startswith('{"tick"'):
        return None
    values: dict[str, Any] = json.loads(line)["tick"]
    return Tick(**values)


class Bars(_Handler):
    """Handler that shows one progress bar for each stage."""

    def __init__(self, live: RichProgress) -> None:
        super().__init__()
        self.live = live
        self.tasks: dict[str, TaskID] = {}
        self.resumed: set[str] = set()

    def show(self, tick: Tick) -> None:
        task = self.tasks.get(tick.stage)
        if task is None:
            task = self.tasks[tick.stage] = self.live.add_task(tick.stage, total=tick.total, unit=tick.unit, note="")
        if tick.resumed and tick.stage not in self.resumed:
            self.resumed.add(tick.stage)
            self.live.console.print(tick.continues, style="green", highlight=False)
        self.live.update(task, completed=tick.done, total=tick.total, unit=tick.unit, note=tick.note)


class _Note(ProgressColumn):
    """The note of a tick, cut where the terminal ends."""

    def __init__(self) -> None:
        super().__init__(Column(no_wrap=False))  # the only column that shrinks

    def render(self, task: Task) -> Text:
        return Text(task.fields["note"], no_wrap=True, overflow="ellipsis")


def _columns(width: int) -> list[ProgressColumn]:
    """The columns of a stage's line that fit a terminal of this width."""
    fixed = Column(no_wrap=True)
    count = [MofNCompleteColumn(table_column=fixed), TextColumn("{task.fields[unit]}")]
    share = [TaskProgressColumn(table_column=fixed)]
    bar = BarColumn(28 if width >= WIDE else 10, table_column=fixed)
    return [
        TextColumn("{task.description:<14}"),
        *([bar] if width >= NARROW else []),
        *(count if width >= WIDE else share),
        TimeRemainingColumn(compact=width < WIDE, elapsed_when_finished=True, table_column=fixed),
        _Note(),
    ]


@contextmanager
def bars(console: Console | None = None) -> Iterator[None]:
    """Show progress as bars on standard error while the block runs."""
    console = console or Console(stderr=True)
    with RichProgress(*_columns(console.width), console=console) as live, _attached(Bars(live)):
        yield


@contextmanager
def json_lines() -> Iterator[None]:
    """Write progress as JSON lines to standard output while the block runs."""
    with _attached(JsonLines(sys.stdout)):
        yield


@contextmanager
def _attached(handler: logging.Handler) -> Iterator[None]:
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
