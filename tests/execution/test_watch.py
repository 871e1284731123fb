"""A run's own process corrects its state on a real server, and ends itself once it was cancelled without a worker."""

import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.states import Cancelling, Crashed, Running

from flows.execution import watch
from flows.execution.watch import is_cancelled, watched
from tests.services.platform import until


@pytest.fixture
def run_id(prefect_client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch) -> UUID:
    """A running flow run of this process, which looks at its state all the time."""
    flow_id = prefect_client.create_flow_from_name("of the watch")
    deployment_id = prefect_client.create_deployment(flow_id, "watched")
    made = prefect_client.create_flow_run_from_deployment(deployment_id, state=Running()).id
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", str(made))
    monkeypatch.setattr(watch, "LOOK_SECONDS", 0.05)
    return made


def state_of(client: SyncPrefectClient, run_id: UUID) -> str | None:
    return client.read_flow_run(run_id).state_name


def test_a_run_that_only_was_not_heard_is_running_again(prefect_client: SyncPrefectClient, run_id: UUID) -> None:
    with watched():
        for _ in range(2):
            prefect_client.set_flow_run_state(run_id, Crashed(), force=True)
            until(lambda: state_of(prefect_client, run_id) == "Running", "it is running again", 30)
    state = prefect_client.read_flow_run(run_id).state
    assert state is not None and state.message == "its process is alive: only its heartbeats were lost"
    prefect_client.set_flow_run_state(run_id, Crashed(), force=True)
    assert state_of(prefect_client, run_id) == "Crashed"  # nobody corrects it after the block


@pytest.fixture
def signals() -> Iterator[list[int]]:
    """The SIGTERMs that this process gets."""
    found: list[int] = []

    def keep(number: int, frame: FrameType | None) -> None:
        found.append(number)

    before = signal.signal(signal.SIGTERM, keep)
    yield found
    signal.signal(signal.SIGTERM, before)


def test_a_run_without_its_worker_ends_itself_when_it_is_cancelled(
    prefect_client: SyncPrefectClient, run_id: UUID, signals: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, orphaned = os.getppid(), threading.Event()
    monkeypatch.setattr(os, "getppid", lambda: 1 if orphaned.is_set() else parent)
    with watched():
        prefect_client.set_flow_run_state(run_id, Cancelling())
        assert is_cancelled() and state_of(prefect_client, run_id) == "Cancelling" and signals == []  # its worker's job
        orphaned.set()
        until(lambda: signals, "it ends", 30)
    state = prefect_client.read_flow_run(run_id).state
    assert state is not None and state.is_cancelled() and "because its worker is gone" in str(state.message)
    assert set(signals) == {signal.SIGTERM} and is_cancelled()


def test_a_server_that_is_away_is_asked_again(
    prefect_client: SyncPrefectClient, run_id: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    away, tried, get_client = threading.Event(), threading.Event(), watch.get_client

    def client(**options: bool) -> SyncPrefectClient:
        if away.is_set():
            tried.set()
            raise ConnectionError("away")
        return get_client(**options)

    away.set()
    monkeypatch.setattr(watch, "get_client", client)
    with watched():
        assert tried.wait(60) and not is_cancelled()
        prefect_client.set_flow_run_state(run_id, Crashed(), force=True)
        away.clear()
        until(lambda: state_of(prefect_client, run_id) == "Running", "it is running again", 30)


def test_outside_of_a_run_nothing_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT__FLOW_RUN_ID", raising=False)
    before = set(threading.enumerate())
    with watched():
        assert not is_cancelled() and set(threading.enumerate()) <= before
