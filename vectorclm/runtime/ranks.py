"""The life of a process under torchrun: it joins the group of ranks, and ends with it; one process has no overhead.

The first rank holds the lease, writes files and reports; the others compute their share. A rank ends when its launcher
or another rank ends, whatever the rank is doing at that moment.
"""

import ctypes
import logging
import os
import platform
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, NoReturn

from vectorclm.errors import ConfigError, RankLostError, VectorCLMError
from vectorclm.runtime.group import ALONE, Group, PeerLostError
from vectorclm.runtime.preemption import ENDED, GRACE, preemption

logger = logging.getLogger(__name__)
# The number of processes that a cluster's launcher has started, by its environment variable.
LAUNCHERS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}


@contextmanager
def joined(relay: bool = False) -> Iterator[Group]:
    """Join the group that torchrun's environment variables describe, while the block runs; without them, ALONE.

    The other ranks wait in `call` until the first rank calls, or releases them because it needs no help. Where several
    ranks fail, the first to fail raises its VectorCLMError, and the others end with exit code 2. Each rank writes its
    error into the file that torchrun names. Ranks that worked together and succeeded end the process at the end of the
    block. Where a rank or its node is lost, the watchdogs of the others report that, with `relay` as JSON lines.
    """
    if "RANK" in os.environ:
        _end_with_launcher()
    else:
        refuse_without_torchrun()
    several = "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
    try:
        with preemption.listening(), _together(relay) if several else nullcontext(ALONE) as group:
            yield group
    except PeerLostError as error:
        cause = str(error).partition("\n")[0]
        logger.error("rank %s ends because another has ended (%s)", os.environ["RANK"], cause)
        sys.exit(ENDED)  # the exit code of SIGTERM, which torchrun is about to send
    except Exception as error:
        record(error)
        raise


def refuse_without_torchrun() -> None:
    """Raise ConfigError where a cluster's launcher started several processes that know nothing of one another."""
    for variable, launcher in LAUNCHERS.items():
        if (count := os.environ.get(variable, "1")) not in ("", "1"):
            raise ConfigError(
                f"{launcher} started {count} processes, of which one is on {socket.gethostname()}, without torchrun: "
                f"start one torchrun a node, as in `{launcher} … torchrun --nnodes=… -m vectorclm …`"
            )


@contextmanager
def _together(relay: bool) -> Iterator[Group]:
    """The group of several ranks, while the block runs."""
    from vectorclm.runtime.distributed import connect, disconnect  # with torch, which a process alone may not need

    preemption.limit(GRACE)  # a rank may wait in a collective for ranks that do not answer
    try:
        group, store = connect(relay)
    except VectorCLMError as error:  # all ranks raise the same
        if os.environ["LOCAL_RANK"] == "0":
            raise
        record(error)
        _end_after_the_first()
    silent = False
    try:
        yield group
        if group.at_work:
            group.total(0)  # no rank leaves before all have succeeded
            _leave(group, 0)
    except Exception as error:
        if group.rank or group.at_work:
            kind = RankLostError if isinstance(error, PeerLostError) else type(error)
            group.leave(kind.__name__, str(error).partition("\n")[0])
        if isinstance(error, VectorCLMError) and not _is_first(store):
            record(error)
            silent = True
        else:
            raise
    finally:
        released = group.rank == 0 and not group.at_work and not silent
        if silent:
            signal.alarm(GRACE)
        if released or (silent and group.rank and not group.at_work):  # the release ends only where all take part
            with suppress(PeerLostError):
                group.call(None)
        if released or sys.exc_info()[0] is None:
            group.leave()
        signal.alarm(GRACE)  # whatever the other ranks do
        disconnect()
        signal.alarm(0)
    if silent:
        _end_after_the_first()


def record(error: Exception) -> None:
    """Write an error into the file that torchrun names for this rank; torchrun prints the error.

    The environment variable TORCHELASTIC_ERROR_FILE holds the file's name; without the variable nothing is written.
    """
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def end_together(group: Group, code: int) -> NoReturn:
    """End this process and all ranks with an exit code, once all ranks have called this function."""
    with suppress(PeerLostError):
        group.total(0)
    if group.world_size == 1:
        sys.exit(code)
    _leave(group, code)


def _leave(group: Group, code: int) -> NoReturn:
    """End this process without destroying the group: gloo may abort where another rank ended a moment earlier."""
    group.leave()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end_after_the_first() -> NoReturn:
    """End with exit code 2, after the rank that reports the error: torchrun ends all ranks as soon as one has ended.

    torchrun's SIGTERM says that the other has ended. A rank on another node is not waited for longer than GRACE.
    """
    deadline = time.monotonic() + GRACE
    while not preemption.requested and time.monotonic() < deadline:
        time.sleep(0.1)
    sys.exit(2)


def _is_first(store: Any) -> bool:
    """Whether no other rank has failed before. Without the rendezvous store, the first rank, its host, has failed."""
    with suppress(RuntimeError):
        return int(store.add("failed", 1)) == 1
    return False


def _end_with_launcher() -> None:
    """Have Linux send SIGTERM when the parent process ends, even by `kill -9` (prctl PR_SET_PDEATHSIG)."""
    if platform.system() == "Linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
