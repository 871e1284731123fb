"""Late scheduled runs on a real server: one of several is made up, and one that no worker takes is reported once."""

from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.exceptions import ObjectAlreadyExists
from prefect.flow_engine import run_flow
from prefect.states import Cancelled, Pending, Running, Scheduled

from flows.deployments import explained
from flows.handle import CURRICULA, MISSED
from flows.platform import attendant as attendant_module
from flows.platform import doctor
from flows.platform.attendant import Attendant
from flows.platform.config import PlatformConfig
from flows.platform.missed_runs import MISSED_AFTER, SkippedRunError, check_is_newest, report_missed
from tests.services.platform import until

HOURLY = IntervalSchedule(interval=timedelta(hours=1), anchor_date=datetime.now(UTC) - timedelta(minutes=30))
NAME = "of the tests of missed runs"  # other tests of the same server have schedules, too
PARAMETERS = {"model": "models:/vectorclm-chat@candidate", "suite": "tiny"}


@pytest.fixture
def deployment(prefect_client: SyncPrefectClient) -> Iterator[UUID]:
    """A deployment in the pool `gpu`, in which nothing else runs, with a schedule for every hour."""
    prefect_client.create_work_pool(WorkPoolCreate(name="gpu", type="process"), overwrite=True)
    made = prefect_client.create_deployment(
        prefect_client.create_flow_from_name("scheduled"), "scheduled", work_pool_name="gpu", parameters=PARAMETERS
    )
    prefect_client.create_deployment_schedules(made, [(HOURLY, True)], slug=NAME)
    yield made
    for run in runs(prefect_client, made):
        prefect_client.delete_flow_run(run.id)
    prefect_client.delete_deployment(made)
    prefect_client.delete_work_pool("gpu")  # with its workers


def runs(client: SyncPrefectClient, deployment: UUID) -> list[FlowRun]:
    """The runs of the deployment that were due, the oldest first."""
    mine = {"deployment_id": {"any_": [deployment]}, "expected_start_time": {"before_": datetime.now(UTC)}}
    found = client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(mine))
    return sorted(found, key=lambda run: str(run.expected_start_time))


def missed(client: SyncPrefectClient, deployment: UUID, hours: int) -> list[FlowRun]:
    """The runs that the server planned for so many past hours, while nothing ran."""
    now = datetime.now(UTC)
    window = {"start_time": (now - timedelta(hours=hours)).isoformat(), "end_time": now.isoformat(), "min_runs": hours}
    client.request("POST", "/deployments/{id}/schedule", path_params={"id": deployment}, json=window)
    found = runs(client, deployment)
    assert len(found) == hours
    return found


def events(client: SyncPrefectClient, run: FlowRun) -> list[dict[str, Any]]:
    wanted = {"event": {"name": [MISSED]}, "resource": {"id": [f"prefect.flow-run.{run.id}"]}}
    return list(client.request("POST", "/events/filter", json={"filter": wanted}).json()["events"])


def test_of_several_missed_runs_the_newest_is_made_up(prefect_client: SyncPrefectClient, deployment: UUID) -> None:
    *older, newest = missed(prefect_client, deployment, 5)
    by_hand = prefect_client.create_flow_run_from_deployment(
        deployment, state=Scheduled(scheduled_time=datetime.now(UTC) - timedelta(hours=9))
    )
    attendant = Attendant(prefect_client)
    attendant.look()
    for run in older:
        state = prefect_client.read_flow_run(run.id).state
        assert state is not None and state.name == "Skipped" and state.is_cancelled()
        assert f"the run of {newest.expected_start_time:%Y-%m-%d %H:%M} UTC of the same schedule is due" in str(
            state.message
        )
    kept = prefect_client.read_flow_run(newest.id)
    assert kept.state_name == "Scheduled" and kept.name.startswith("vectorclm-chat@candidate on tiny, ")
    assert prefect_client.read_flow_run(by_hand.id).state_name == "Scheduled"


def test_a_run_that_began_or_starts_again_is_no_older_one(prefect_client: SyncPrefectClient, deployment: UUID) -> None:
    began, retried, _ = missed(prefect_client, deployment, 3)
    prefect_client.set_flow_run_state(began.id, Running(), force=True)
    again: Any = Scheduled(name="Rescued")
    prefect_client.set_flow_run_state(retried.id, again, force=True)
    Attendant(prefect_client).look()
    states = [run.state_name for run in runs(prefect_client, deployment)]
    assert states == ["Running", "Rescued", "Scheduled"]


def test_an_old_run_that_a_worker_takes_first_ends_as_skipped(
    prefect_client: SyncPrefectClient, deployment: UUID
) -> None:
    done: list[str] = []

    @flow(name="scheduled")
    def scheduled(model: str, suite: str) -> Any:
        def run() -> str:
            check_is_newest()
            done.append(f"{model} on {suite}")
            return "done"

        return explained(run)

    old, new = missed(prefect_client, deployment, 2)
    for run in (old, new):
        prefect_client.set_flow_run_state(run.id, Pending())  # a worker takes it
        run_flow(scheduled, flow_run=run, parameters=PARAMETERS, return_type="state")
    states = [prefect_client.read_flow_run(run.id).state for run in (old, new)]
    assert [state.name for state in states if state is not None] == ["Skipped", "Completed"]
    assert states[0] is not None and states[0].is_cancelled() and "the newest is made up" in str(states[0].message)
    assert done == ["models:/vectorclm-chat@candidate on tiny"]


@pytest.mark.parametrize(
    ("newer", "ends"),
    [("taken", "Skipped"), ("begun", "Skipped"), ("cancelled", "Completed")],
)
def test_an_old_run_is_skipped_also_where_another_worker_has_taken_the_newer_one(
    prefect_client: SyncPrefectClient, deployment: UUID, newer: str, ends: str
) -> None:
    @flow(name="scheduled")
    def scheduled(model: str, suite: str) -> Any:
        return explained(check_is_newest)

    old, new = missed(prefect_client, deployment, 2)
    states: dict[str, State[Any]] = {"taken": Pending(), "begun": Running(), "cancelled": Cancelled()}
    prefect_client.set_flow_run_state(new.id, states[newer], force=True)
    prefect_client.set_flow_run_state(old.id, Pending())
    assert run_flow(scheduled, flow_run=old, parameters=PARAMETERS, return_type="state").name == ends


def test_a_run_of_a_short_interval_whose_process_starts_slowly_is_not_skipped(
    prefect_client: SyncPrefectClient, deployment: UUID
) -> None:
    """Else none of its runs would ever be the newest."""

    @flow(name="scheduled")
    def scheduled(model: str, suite: str) -> Any:
        return explained(check_is_newest)

    for schedule in prefect_client.read_deployment(deployment).schedules:
        prefect_client.delete_deployment_schedule(deployment, schedule.id)
    often = IntervalSchedule(interval=timedelta(seconds=1), anchor_date=datetime.now(UTC))
    prefect_client.create_deployment_schedules(deployment, [(often, True)])
    soon = datetime.now(UTC) + timedelta(seconds=3)
    window = {"start_time": soon.isoformat(), "min_runs": 60, "min_time": 1.0}
    prefect_client.request("POST", "/deployments/{id}/schedule", path_params={"id": deployment}, json=window)
    mine = FlowRunFilter.model_validate({"deployment_id": {"any_": [deployment]}})
    planned = prefect_client.read_flow_runs(flow_run_filter=mine)
    times = {run.expected_start_time: run for run in planned if run.expected_start_time is not None}
    due = min(when for when in times if when > datetime.now(UTC) + timedelta(seconds=5))  # also where machines are slow
    first = times[due]
    prefect_client.set_flow_run_state(first.id, Pending())  # a worker takes runs some seconds before their time
    until(lambda: datetime.now(UTC) > due + timedelta(seconds=2), "newer ones are due, too", 60)
    state = run_flow(scheduled, flow_run=first, parameters=PARAMETERS, return_type="state")
    assert state.name == "Completed"


def test_a_run_that_no_worker_takes_is_one_event(prefect_client: SyncPrefectClient, deployment: UUID) -> None:
    (run,) = missed(prefect_client, deployment, 1)
    line = f"no worker took the scheduled run {NAME}, due since {run.expected_start_time:%Y-%m-%d %H:%M} UTC: "
    why = "no worker of the pool gpu is online; `vectorclm doctor` starts those of this machine"
    for _ in range(3):
        assert [found for found in report_missed(prefect_client) if NAME in found] == [line + why]
    (event,) = until(lambda: events(prefect_client, run), "the event is kept", 60)
    assert event["payload"]["title"] == f"no worker took the scheduled run {NAME}"
    assert event["payload"]["text"].splitlines()[1] == (line + why).removeprefix(f"{event['payload']['title']}, ")
    assert event["payload"]["parameters"] == PARAMETERS
    assert event["payload"]["links"][0].endswith(f"/runs/flow-run/{run.id}")


def test_the_doctor_reports_it_and_emits_the_same_event(
    prefect_client: SyncPrefectClient, deployment: UUID, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run,) = missed(prefect_client, deployment, 1)
    monkeypatch.setattr(doctor, "TAKE_SECONDS", 0)
    found = list(doctor._waiting(PlatformConfig(vectorclm_store=str(tmp_path))))
    assert any(finding.what.startswith(f"no worker took the scheduled run {NAME}, due since ") for finding in found)
    assert "no run is late without a reason" not in [finding.what for finding in found]
    report_missed(prefect_client)
    assert len(until(lambda: events(prefect_client, run), "the event is kept", 60)) == 1


def test_the_attendant_gives_workers_time_after_a_start_and_after_a_suspension(
    prefect_client: SyncPrefectClient, deployment: UUID
) -> None:
    (run,) = missed(prefect_client, deployment, 1)
    attendant = Attendant(prefect_client)
    attendant.look()
    attendant._awake_since -= MISSED_AFTER
    attendant._last_look -= 2 * attendant_module.ASLEEP
    attendant.look()
    assert "vectorclm.missed" not in prefect_client.read_flow_run(run.id).labels
    attendant._awake_since -= MISSED_AFTER
    attendant.look()
    assert "vectorclm.missed" in prefect_client.read_flow_run(run.id).labels
    until(lambda: events(prefect_client, run), "the event is kept", 60)


def lines(client: SyncPrefectClient) -> list[str]:
    return [line for line in report_missed(client) if NAME in line]


def test_what_waits_its_turn_is_not_missed(prefect_client: SyncPrefectClient, deployment: UUID) -> None:
    """A worker that is busy takes the run later; a pool that is paused or without a worker does not."""
    missed(prefect_client, deployment, 1)
    busy = prefect_client.create_flow_run_from_deployment(deployment, state=Running())
    prefect_client.update_work_pool("gpu", WorkPoolUpdate(concurrency_limit=1))
    assert lines(prefect_client) == []  # the limit is reached
    prefect_client.update_work_pool("gpu", WorkPoolUpdate(concurrency_limit=2))
    assert "no worker of the pool gpu is online" in lines(prefect_client)[0]
    prefect_client.send_worker_heartbeat("gpu", "a worker of this test", heartbeat_interval_seconds=600)
    assert lines(prefect_client) == []  # its own limit may be reached
    prefect_client.update_work_pool("gpu", WorkPoolUpdate(is_paused=True))
    assert lines(prefect_client)[0].endswith("the work pool gpu is paused")
    prefect_client.update_work_pool("gpu", WorkPoolUpdate(is_paused=False))
    queue = prefect_client.read_work_queue_by_name("default", work_pool_name="gpu")
    prefect_client.update_work_queue(queue.id, is_paused=True)
    assert lines(prefect_client)[0].endswith("the work queue default of the pool gpu is paused")
    prefect_client.update_work_queue(queue.id, is_paused=False)
    prefect_client.delete_flow_run(busy.id)
    assert "is online, and takes none; read its log" in lines(prefect_client)[0]


def test_a_scheduled_curriculum_that_waits_in_its_queue_is_not_missed(prefect_client: SyncPrefectClient) -> None:
    prefect_client.create_work_pool(WorkPoolCreate(name="cpu", type="process"), overwrite=True)
    with suppress(ObjectAlreadyExists):
        prefect_client.create_work_queue(CURRICULA, concurrency_limit=1, work_pool_name="cpu")
    made = prefect_client.create_deployment(
        prefect_client.create_flow_from_name("curriculum"), "nightly", work_pool_name="cpu", work_queue_name=CURRICULA
    )
    prefect_client.create_deployment_schedules(made, [(HOURLY, True)], slug=NAME)
    missed(prefect_client, made, 1)
    other = prefect_client.create_flow_run_from_deployment(made, state=Running())
    assert lines(prefect_client) == []
    prefect_client.delete_flow_run(other.id)
    assert len(lines(prefect_client)) == 1
    for run in runs(prefect_client, made):
        prefect_client.delete_flow_run(run.id)
    prefect_client.delete_deployment(made)


@flow
def alone() -> None:
    check_is_newest()


@pytest.mark.usefixtures("prefect_client")
def test_a_run_without_a_schedule_is_never_skipped() -> None:
    alone()
    check_is_newest()  # outside of a run
    assert issubclass(SkippedRunError, Exception)
