"""Live progress of a stage in the Prefect UI: a progress artifact on the run graph, and lines in the log.

The log also says from which step a resumed training continues.

A thread sends only the newest tick to the server, so a slow or lost server never delays a stage.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import copy_context
from dataclasses import replace
from typing import Any, cast
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Running

from vectorclm.runtime.progress import Tick

CHIP_SECONDS = 5.0  # between two updates of the artifact, if a percent or more was done
LINE_SECONDS = 30.0  # between two lines in the log, and two updates of a slow stage

logger = logging.getLogger(__name__)


@contextmanager
def live(stage: str, log: Callable[[str], None]) -> Iterator[None]:
    """Show the progress of a stage while the block runs, inside a Prefect task."""
    handler = _Live(stage, log)
    ticks = logging.getLogger("vectorclm.runtime.progress")
    ticks.addHandler(handler)
    thread = threading.Thread(target=copy_context().run, args=(handler.work,), name=f"live {stage}", daemon=True)
    thread.start()
    try:
        yield
        handler.whole = True
    finally:
        ticks.removeHandler(handler)
        handler.ended.set()
        thread.join(CHIP_SECONDS)  # for the last update, and no longer


def show_waiting(holder: str | None) -> None:
    """Set the flow run to `Queued` while it waits for the run `holder` on this machine, else `Running`; log it."""
    message = f"waits for {holder}, which uses the devices of this machine" if holder else "the devices are free now"
    get_run_logger().info(message)
    if flow_run.id is None:
        return
    with suppress(Exception), get_client(sync_client=True) as client:  # a lost server stops no run
        now = client.read_flow_run(UUID(flow_run.id)).state
        if now is not None and now.is_running():  # not being cancelled
            state: State[Any] = Running(name="Queued" if holder else "Running", message=message)
            client.set_flow_run_state(UUID(flow_run.id), state, force=True)


class _Live(logging.Handler):
    def __init__(self, stage: str, log: Callable[[str], None]) -> None:
        super().__init__()
        self.stage, self.log = stage, log
        self.ended = threading.Event()
        self._tick: Tick | None = None
        self.whole = False  # the stage is done, however much its last tick had counted
        self._first: tuple[float, int] | None = None
        self._chip: UUID | None = None
        self._shown, self._share, self._when = -1, -100.0, 0.0  # the shown progress, and its time
        self._lined = time.monotonic()
        self._resumed = ""
        self._stack = ExitStack()
        self._client: SyncPrefectClient | None = None  # kept: creating one costs more than a request

    def emit(self, record: logging.LogRecord) -> None:
        tick = getattr(record, "tick", None)
        if isinstance(tick, Tick) and tick.stage == self.stage:
            if self._first is None:
                self._first = (time.monotonic(), tick.done)
            if tick.resumed and tick.resumed != self._resumed:
                self._resumed = tick.resumed
                self.log(tick.continues)
            self._tick = tick

    def work(self) -> None:
        """Send the newest tick to the server until the stage ends."""
        with self._stack:
            while not self.ended.wait(CHIP_SECONDS):
                self._show()
            if self.whole and self._tick is not None:
                self._tick = replace(self._tick, done=self._tick.total)
            self._show()

    def _show(self) -> None:
        if (tick := self._tick) is None or tick.done == self._shown:
            return
        share, now = min(100.0, 100.0 * tick.done / max(1, tick.total)), time.monotonic()
        if share < self._share + 1 and now < self._when + LINE_SECONDS and not self.ended.is_set():
            return
        self._shown, self._share, self._when = tick.done, share, now
        line = self._describe(tick)
        if now - self._lined > LINE_SECONDS:
            self._lined = now
            self.log(line)
        try:
            if self._chip is None:
                key = f"{self.stage.replace('_', '-')}-progress"
                self._chip = cast(UUID, create_progress_artifact(share, key=key, description=line))
            else:
                if self._client is None:
                    self._client = self._stack.enter_context(get_client(sync_client=True))
                self._client.update_artifact(self._chip, ArtifactUpdate(data=share, description=line))
        except Exception as error:  # of any kind: the training continues
            logger.debug("progress of %s was not shown: %s", self.stage, error)

    def _describe(self, tick: Tick) -> str:
        line = f"{tick.stage}: {tick.done:,} of {tick.total:,} {tick.unit}"
        if tick.note:
            line += f", {', '.join(tick.note.split('  '))}"
        since, done = self._first or (time.monotonic(), tick.done)
        if done < tick.done < tick.total:
            left = (time.monotonic() - since) * (tick.total - tick.done) / (tick.done - done)
            line += f", {left / 60:.0f} min left" if left > 90 else f", {left:.0f} s left"
        return line
