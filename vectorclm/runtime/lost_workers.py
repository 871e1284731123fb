"""The error of a training whose loader worker was killed."""

from collections.abc import Iterator
from contextlib import contextmanager

from vectorclm.errors import WorkerLostError

SAID = "DataLoader worker"  # how torch begins, also in a signal handler that interrupts any line of the block


@contextmanager
def lost_workers_explained() -> Iterator[None]:
    """Raise WorkerLostError where a process that reads batches ahead ends, while the block runs."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(SAID):
            raise
        raise WorkerLostError(
            f"{str(error).partition('. ')[0]}: run the same again, which resumes from the newest checkpoint; lower "
            "loader_workers if the system ended it because memory ran out"
        ) from error
