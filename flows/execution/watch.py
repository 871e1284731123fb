"""A flow run and its state in Prefect, kept in step by the run's own process where nobody else would."""

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
from prefect.runtime import flow_run
from prefect.states import Cancelled, Running

ANSWER_SECONDS = 2  # for a server, where the machine may soon be taken away
LOOK_SECONDS = 5  # well below what a crashed run is given before it starts again

logger = logging.getLogger(__name__)


@contextmanager
def watched() -> Iterator[None]:
    """Look at this run's state now and then while the block runs.

    A run that counts as crashed, because the server was away for longer than heartbeats may be, is `Running` again. A
    run that is to be cancelled, but has lost the worker that would end it, ends itself.
    """
    if flow_run.id is None:
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(UUID(flow_run.id), os.getppid(), ended), daemon=True, name="watch")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(LOOK_SECONDS)  # so that no state is set after the end's


def is_cancelled() -> bool:
    """Whether a person has cancelled this run, as far as the server answers soon."""
    if flow_run.id is None:
        return False
    with suppress(Exception), get_client(sync_client=True, httpx_settings={"timeout": ANSWER_SECONDS}) as client:
        state = client.read_flow_run(UUID(flow_run.id)).state
        return state is not None and (state.is_cancelling() or state.is_cancelled())
    return False


def _watch(run_id: UUID, worker: int, ended: threading.Event) -> None:
    while not ended.wait(LOOK_SECONDS):
        try:
            with get_client(sync_client=True) as client:  # kept: to make one takes more than to ask
                _look(client, run_id, os.getppid() != worker, ended)
                while not ended.wait(LOOK_SECONDS):
                    _look(client, run_id, os.getppid() != worker, ended)
        except Exception as error:  # a server that is away, whatever it says
            logger.debug("the state of run %s was not seen: %s", run_id, error)


def _look(client: SyncPrefectClient, run_id: UUID, orphaned: bool, ended: threading.Event) -> None:
    state = client.read_flow_run(run_id).state
    if state is None or ended.is_set():
        return
    if state.is_crashed():
        alive: State[Any] = Running(message="its process lives: only its heartbeats were not heard")
        client.set_flow_run_state(run_id, alive, force=True)
    elif state.is_cancelling() and orphaned:
        gone: State[Any] = Cancelled(message="cancelled by its own process, as its worker is gone")
        client.set_flow_run_state(run_id, gone, force=True)
        os.kill(os.getpid(), signal.SIGTERM)
