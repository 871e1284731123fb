"""The error of a training whose loader worker was killed."""

from collections.abc import Iterator
from contextlib import contextmanager

from vectorclm.errors import StoreError, WorkerLostError

SAID = "DataLoader worker"  # how torch begins, also in a signal handler that interrupts any line of the block


@contextmanager
def lost_workers_explained(workers: int) -> Iterator[None]:
    """Raise WorkerLostError where one of so many processes that read batches ahead ends, while the block runs.

    Which error torch raises depends on the moment: its own, or that of the socket through which a batch comes.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        by_torch = isinstance(error, RuntimeError) and str(error).startswith(SAID)
        by_socket = workers > 0 and not isinstance(error, RuntimeError | StoreError)
        if not (by_torch or by_socket):
            raise
        reason = str(error).partition(". ")[0] if by_torch else f"{SAID}: {error or 'its pipe has ended'}"
        raise WorkerLostError(
            f"{reason}: run the same again, which resumes from the newest checkpoint; lower loader_workers if the "
            "system ended it because memory ran out"
        ) from error
