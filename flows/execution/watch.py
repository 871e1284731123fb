"""Correct the state of a flow run in Prefect from the run's own process, after crashes of server or worker."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import State
from prefect.exceptions import TerminationSignal
from prefect.runtime import flow_run
from prefect.states import Cancelled, Running

from flows.terminal import flush_logs

ANSWER_SECONDS = 2  # timeout of a request, as the machine may soon be taken away
LOOK_SECONDS = 5  # well below the delay before a crashed run starts again

logger = logging.getLogger(__name__)


@contextmanager
def watched() -> Iterator[None]:
    """Check the state of this run every LOOK_SECONDS while the block runs.

    A run that counts as crashed because its heartbeats did not reach the server is set to `Running` again. A run that
    is being cancelled but has lost its worker ends itself.
    """
    if flow_run.id is None:
        yield
        return
    ended, cancelled = threading.Event(), threading.Event()
    known = (UUID(flow_run.id), os.getppid(), ended, cancelled)
    thread = threading.Thread(target=_watch, args=known, daemon=True, name="watch")
    thread.start()
    try:
        yield
    except TerminationSignal:
        if cancelled.is_set():
            flush_logs()
            os._exit(128 + signal.SIGTERM)  # Prefect would report a crash after this, and the run would start again
        raise
    finally:
        ended.set()
        thread.join(LOOK_SECONDS)  # so that no state is set after the final one


def is_cancelled() -> bool:
    """Whether a person has cancelled this run; False if the server does not answer within ANSWER_SECONDS."""
    if flow_run.id is None:
        return False
    with suppress(Exception), get_client(sync_client=True, httpx_settings={"timeout": ANSWER_SECONDS}) as client:
        state = client.read_flow_run(UUID(flow_run.id)).state
        return state is not None and (state.is_cancelling() or state.is_cancelled())
    return False


def _watch(run_id: UUID, worker: int, ended: threading.Event, cancelled: threading.Event) -> None:
    while not ended.wait(LOOK_SECONDS):
        try:
            with get_client(sync_client=True) as client:  # kept: creating one costs more than a request
                while not ended.is_set():
                    if _look(client, run_id, os.getppid() != worker, ended):
                        cancelled.set()
                        os.kill(os.getpid(), signal.SIGTERM)
                    ended.wait(LOOK_SECONDS)
        except Exception as error:  # of any kind: the server is away
            logger.debug("the state of run %s was not read: %s", run_id, error)


def _look(client: SyncPrefectClient, run_id: UUID, orphaned: bool, ended: threading.Event) -> bool:
    """Correct the state of the run; True if it has to end, because it is cancelled and no worker ends it."""
    state = client.read_flow_run(run_id).state
    if state is None or ended.is_set():
        return False
    if state.is_crashed():
        alive: State[Any] = Running(message="its process is alive: only its heartbeats were lost")
        client.set_flow_run_state(run_id, alive, force=True)
    elif state.is_cancelling() and orphaned:
        gone: State[Any] = Cancelled(message="cancelled by its own process, because its worker is gone")
        client.set_flow_run_state(run_id, gone, force=True)
        return True
    return False
