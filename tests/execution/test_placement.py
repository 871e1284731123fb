"""A stage in a pool: its run on a real server is started once, waited for, and cancelled with its curriculum.

The tests play the worker: they set the states of the run.
"""

import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Cancelled, Completed, Crashed, Failed, Running

from flows.execution import placement
from flows.execution.launch import StageCancelledError, StageFailedError, StageInterruptedError
from flows.execution.placement import deployment_of, run_in_pool
from flows.platform.deployment_file import entries
from tests.services.platform import until
from vectorclm.errors import ConfigError
from vectorclm.stages import TABLE

PARAMETERS = {"stage": "sample", "experiment": "tiny"}


def test_the_page_names_every_stage_with_its_deployment_and_pool() -> None:
    page = Path(__file__).parents[2].joinpath("flows", "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)`[^|]* \| `stage/(\w+)`[^|]* \| `(\w+)` \|$", page, re.MULTILINE)
    pools = {found["name"]: found["work_pool"]["name"] for found in entries()}
    assert rows == [(row.name, deployment_of(row.name), pools[deployment_of(row.name)]) for row in TABLE]


class Placed:
    """A stage that a curriculum placed in a pool, and its run on the server."""

    def __init__(self, client: SyncPrefectClient, parent: UUID, thread: ThreadPoolExecutor) -> None:
        self.client, self.tags, self._thread = client, [f"part of {parent}", "stage sample"], thread
        self.deployment_id = client.create_deployment(client.create_flow_from_name("stage"), "sample")
        self.closed, self.lines = Event(), list[str]()

    def start(self) -> "Future[None]":
        return self._thread.submit(run_in_pool, "sample", PARAMETERS, self.closed, self.lines.append)

    def create(self, state: State[Any]) -> UUID:
        """A run of an earlier attempt of the curriculum."""
        made = self.client.create_flow_run_from_deployment(self.deployment_id, tags=self.tags, state=state)
        return made.id

    def runs(self) -> list[FlowRun]:
        return self.client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate({"tags": {"all_": self.tags}}))

    def started(self) -> FlowRun:
        (run,) = until(self.runs, "the stage has a run", 60)
        return run

    def set(self, run_id: UUID, state: State[Any]) -> None:
        self.client.set_flow_run_state(run_id, state, force=True)
        until(lambda: f"sample: {state.name}" in self.lines, "the state is seen", 60)


@pytest.fixture
def placed(prefect_client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch) -> Iterator[Placed]:
    monkeypatch.setattr(placement, "POLL_SECONDS", 0.05)
    parent = uuid4()
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", str(parent))
    with ThreadPoolExecutor(1) as thread:
        made = Placed(prefect_client, parent, thread)
        yield made
        made.closed.set()


def test_a_stage_is_done_when_its_run_is_also_if_the_server_was_away(
    placed: Placed, monkeypatch: pytest.MonkeyPatch
) -> None:
    away, read = [True], SyncPrefectClient.read_flow_run

    def read_later(client: SyncPrefectClient, run_id: UUID) -> FlowRun:
        if away:
            away.clear()
            raise httpx.ConnectError("away")
        return read(client, run_id)

    monkeypatch.setattr(SyncPrefectClient, "read_flow_run", read_later)
    done = placed.start()
    run = placed.started()
    assert (run.name, run.deployment_id) == ("sample of tiny", placed.deployment_id)
    assert dict(run.parameters) == PARAMETERS
    placed.set(run.id, Running())
    placed.client.set_flow_run_state(run.id, Completed(), force=True)
    done.result(60)
    assert placed.lines[0] == f"sample is the run sample of tiny ({run.id})" and not away
    assert placed.lines[-2:] == ["sample: Running", "sample: Completed"] and len(placed.runs()) == 1


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (lambda: Failed(message="the disk is full"), StageFailedError, "^the disk is full$"),
        (Cancelled, StageCancelledError, "its run runs/flow-run/.* was cancelled"),
        (lambda: Crashed(message="out of memory"), StageInterruptedError, "its run .* crashed: out of memory"),
    ],
    ids=["failed", "cancelled", "crashed"],
)
def test_the_end_of_a_run_is_the_end_of_its_stage(
    placed: Placed,
    monkeypatch: pytest.MonkeyPatch,
    state: Callable[[], State[Any]],
    error: type[Exception],
    message: str,
) -> None:
    done = placed.start()
    run = placed.started()
    placed.set(run.id, state())
    monkeypatch.setattr(placement, "CRASH_SECONDS", -60)  # nobody started a crashed run again
    with pytest.raises(error, match=message):
        done.result(60)


def test_a_run_of_an_earlier_attempt_is_waited_for_unless_it_is_lost(
    placed: Placed, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = placed.create(Crashed())  # the platform is about to start it again
    done = placed.start()
    until(lambda: placed.lines, "it is found", 60)
    placed.set(earlier, Completed())
    done.result(60)
    assert len(placed.runs()) == 1
    lost = placed.create(Crashed())
    monkeypatch.setattr(placement, "CRASH_SECONDS", -60)
    done = placed.start()
    until(lambda: len(placed.runs()) == 3, "another run is started", 60)
    (new,) = (run.id for run in placed.runs() if run.id not in (earlier, lost))
    placed.client.set_flow_run_state(new, Completed(), force=True)
    done.result(60)


@pytest.mark.parametrize(("before", "after"), [(Running, "Cancelling"), (Crashed, "Cancelled")])
def test_a_run_is_cancelled_with_its_curriculum(placed: Placed, before: Callable[[], State[Any]], after: str) -> None:
    """A crashed one for good, so that the platform does not start it again."""
    done = placed.start()
    run = placed.started()
    placed.set(run.id, before())
    placed.closed.set()
    with pytest.raises(StageCancelledError, match="ended with the curriculum"):
        done.result(60)
    assert placed.client.read_flow_run(run.id).state_name == after


def test_a_server_without_the_deployment_is_told_of(placed: Placed) -> None:
    message = "Prefect has no deployment stage/evaluate_chat: run `vectorclm up`, or, .* or set placement to inline"
    with pytest.raises(ConfigError, match=message):
        run_in_pool("evaluate", {"experiment": "tiny"}, placed.closed, placed.lines.append)
