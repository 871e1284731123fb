"""A store that waits for its server: while a stage works, requests are repeated until the server answers again."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from vectorclm.errors import StoreError
from vectorclm.runtime.library_calls import ending
from vectorclm.store import s3
from vectorclm.store.artifact import Store
from vectorclm.store.lease import Lease

logger = logging.getLogger(__name__)
OUTAGE_SECONDS = 900.0  # for which a request is repeated
PAUSE_SECONDS = 1.0

Arguments = ParamSpec("Arguments")
Value = TypeVar("Value")


def _patient(
    request: Callable[Concatenate["PatientStore", Arguments], Value],
) -> Callable[Concatenate["PatientStore", Arguments], Value]:
    """The request, repeated while the server is away."""

    @wraps(request)
    def repeated(self: "PatientStore", /, *arguments: Arguments.args, **named: Arguments.kwargs) -> Value:
        began = time.monotonic()
        while True:
            try:
                found = request(self, *arguments, **named)
            except StoreError as error:
                if time.monotonic() - began > OUTAGE_SECONDS or not s3.is_outage(error) or ending.is_set():
                    raise
                self.note_outage(error)
                ending.wait(PAUSE_SECONDS)
            else:
                self.note_answer()
                return found

    return repeated


class PatientStore(Store):
    """A store for the work of a stage: an object store that is away for minutes delays it, and does not end it.

    Each request is repeated for at most OUTAGE_SECONDS. `is_away` says whether the last one had no answer.
    """

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self._since = 0.0
        if not self.is_local:
            self.fs = self._impatient()  # few attempts each, so that `is_away` is known within seconds

    def note_outage(self, error: StoreError) -> None:
        """Report once that the server is away."""
        if not self.is_away:
            self.is_away, self._since = True, time.monotonic()
            logger.warning("%s; tried again for %.0f minutes", error, OUTAGE_SECONDS / 60)

    def note_answer(self) -> None:
        """Report once that the server is back."""
        if self.is_away:
            self.is_away = False
            logger.warning("store %s answers again after %.0f s", self.uri, time.monotonic() - self._since)

    @contextmanager
    def lease(self, key: str, inputs: Iterable[str] | None = None) -> Iterator[Lease]:
        """See `Store.lease`. No renewal is repeated: the next comes soon."""
        hasty = Store(self.uri)
        hasty.fs = self.fs
        with hasty.lease(key, inputs) as lease:
            yield lease

    check_lease = _patient(Store.check_lease)
    delete = _patient(Store.delete)
    files = _patient(Store.files)
    get = _patient(Store.get)
    list = _patient(Store.list)
    put = _patient(Store.put)
    read = _patient(Store.read)
    remove = _patient(Store.remove)
    replace = _patient(Store.replace)
    sha256 = _patient(Store.sha256)
    withdraw = _patient(Store.withdraw)
    write = _patient(Store.write)
