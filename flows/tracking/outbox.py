"""A queue of jobs for a server that may be away: one thread does them in order, and keeps each until it succeeds."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from contextvars import copy_context

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, REQUEST_LIMIT_EXCEEDED, TEMPORARILY_UNAVAILABLE, ErrorCode

from flows.tracking.database import DatabaseLockedError

logger = logging.getLogger(__name__)

POLL_SECONDS = 2.0  # between two calls of `idle`
AWAY_SECONDS = 5.0  # between two attempts while the server is away
ATTEMPTS = 3  # for a job that the server rejects although it answers

Job = Callable[[], None]
PASSING = {ErrorCode.Name(code) for code in (INTERNAL_ERROR, REQUEST_LIMIT_EXCEEDED, TEMPORARILY_UNAVAILABLE)}


class Outbox:
    """A thread and its queue of jobs.

    `idle` is called every few seconds between jobs. `failed` is called with the error of each attempt that fails.
    `answers` says whether the server accepts requests.
    """

    def __init__(self, idle: Job, failed: Callable[[Exception], None], answers: Callable[[], bool]) -> None:
        self._idle, self._failed, self._answers = idle, failed, answers
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._closing = threading.Event()
        self._ended = 0  # jobs that were done or rejected
        self.left = 0  # jobs that were given up, because the server was away to the end
        # In the context of its maker, so that warnings reach the log of the maker's run.
        self._thread = threading.Thread(target=copy_context().run, args=(self._work,), name="mlflow", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def put(self, job: Job) -> None:
        """Add a job to the end of the queue. A job that fails half-way may be repeated."""
        self._jobs.put(job)

    def close(self, seconds: float) -> bool:
        """Finish the queue and end the thread; False if one job takes longer. A server that is away is tried once more.

        A server under load that still does one job after the other is waited for, or its records would be lost.
        """
        self._jobs.put(None)
        self._closing.set()
        ended = -1
        while self._thread.is_alive() and ended != self._ended:
            ended = self._ended
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        polled = time.monotonic()
        while True:
            try:
                job = self._jobs.get(timeout=POLL_SECONDS)
            except queue.Empty:
                job = _nothing
            if job is None:
                return
            if not self._done(job):
                self.left = 1 + self._jobs.qsize()
                return
            self._ended += 1
            if time.monotonic() - polled > POLL_SECONDS:
                self._try(self._idle)
                polled = time.monotonic()

    def _done(self, job: Job) -> bool:
        """Do a job, however long the server is away; False if the outbox is closed first."""
        attempts = 0
        while (error := self._try(job)) is not None and _passes(error):
            if self._answers():
                attempts += 1
                if attempts == ATTEMPTS:
                    return True  # already reported: a rejected job must not block the queue
            elif self._closing.is_set():
                return False
            self._closing.wait(AWAY_SECONDS)
        return True

    def _try(self, job: Job) -> Exception | None:
        try:
            job()
        except Exception as error:
            self._failed(error)
            return error
        return None


def _passes(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    return isinstance(error, OSError | DatabaseLockedError) or (
        isinstance(error, MlflowException) and error.error_code in PASSING
    )


def _nothing() -> None:
    pass
