"""Jobs for a server that may be away: done in their order by one thread, each kept until the server took it."""

import logging
import queue
import threading
import time
from collections.abc import Callable

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, REQUEST_LIMIT_EXCEEDED, TEMPORARILY_UNAVAILABLE, ErrorCode

logger = logging.getLogger(__name__)

POLL_SECONDS = 2.0  # between two calls of `idle`
AWAY_SECONDS = 5.0  # between two attempts while the server is away
ATTEMPTS = 3  # at a job that a server which answers does not take

Job = Callable[[], None]
PASSING = {ErrorCode.Name(code) for code in (INTERNAL_ERROR, REQUEST_LIMIT_EXCEEDED, TEMPORARILY_UNAVAILABLE)}


class Outbox:
    """The thread and its jobs.

    `idle` is called now and then between jobs; `failed` is told of what cannot be done, and of a server that is away,
    each time it fails. `answers` says whether the server takes requests at all.
    """

    def __init__(self, idle: Job, failed: Callable[[Exception], None], answers: Callable[[], bool]) -> None:
        self._idle, self._failed, self._answers = idle, failed, answers
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._closing = threading.Event()
        self.left = 0  # jobs that were given up, as the server was away to the end
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def put(self, job: Job) -> None:
        """Have the thread do `job` after those before it. It may be done again where it failed half-way."""
        self._jobs.put(job)

    def close(self, seconds: float) -> bool:
        """Do what is left and end; False where that takes longer. A server that is away is asked once more only."""
        self._jobs.put(None)
        self._closing.set()
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
            if time.monotonic() - polled > POLL_SECONDS:
                self._try(self._idle)
                polled = time.monotonic()

    def _done(self, job: Job) -> bool:
        """Do a job, however long the server is away; False where this ends first."""
        attempts = 0
        while (error := self._try(job)) is not None and _passes(error):
            if self._answers():
                attempts += 1
                if attempts == ATTEMPTS:
                    return True  # it was told of: what the server does not take must not keep the rest
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
    return isinstance(error, OSError) or (isinstance(error, MlflowException) and error.error_code in PASSING)


def _nothing() -> None:
    pass
