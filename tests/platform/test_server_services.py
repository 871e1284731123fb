"""The services inside Prefect's server: which are off, what they leave undone, and which errors their log has."""

import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from prefect import task
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.events import Event
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Running, Scheduled

from flows.execution.labels import PROCESS
from flows.platform import server_services
from flows.platform.server_services import (
    PROBE,
    RELIED,
    failing_loops,
    findings,
    idle_schedules,
    loop_errors,
    probe,
    switched_off,
)
from tests.services.platform import until


@pytest.fixture
def idle_server(prefect_api: dict[str, str]) -> Iterator[SyncPrefectClient]:
    """A real server on which the services are off that the platform relies on."""
    auth = prefect_api.get("PREFECT_API_AUTH_STRING")
    with SyncPrefectClient(prefect_api["PREFECT_API_URL"], auth_string=auth) as client:
        yield client


def test_services_that_are_off_are_told_with_what_does_not_happen(
    idle_server: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    off = ["scheduler", "late_runs", "triggers", "foreman", "cancellation_cleanup"]
    assert switched_off(idle_server) == off
    with probe(idle_server) as made:
        told = list(findings(idle_server, made, [], tmp_path / "none.log"))
    assert [good for good, _ in told] == [False] * len(off)
    for name, (_, line) in zip(off, told, strict=True):
        assert line.startswith(f"Prefect's {name} is switched off, so {RELIED[name][0]}: remove PREFECT_SERVER_")
    monkeypatch.setattr(server_services, "PROBE_SECONDS", 3)
    with probe(idle_server) as made:
        assert made.failures() == ["scheduler", "late_runs", "triggers"]
    with pytest.raises(ObjectNotFound):
        idle_server.read_deployment_by_name(f"{PROBE}/{PROBE}")


def test_what_idle_services_leave_undone_is_seen(
    idle_server: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A schedule without next runs, a late run, a worker that is silent, a task of a cancelled run."""
    for name in ("PLAN_SECONDS", "SILENT_SECONDS", "CLEAN_SECONDS"):
        monkeypatch.setattr(server_services, name, 0)
    assert server_services.late_runs(idle_server) == server_services.unplanned(idle_server) == []
    assert server_services.unnoticed_deaths(idle_server) == [] and server_services.unended_tasks(idle_server) == 0
    idle_server.create_work_pool(WorkPoolCreate(name="cpu", type="process"))
    idle_server.send_worker_heartbeat("cpu", "a worker", heartbeat_interval_seconds=1)
    daily = IntervalSchedule(interval=timedelta(days=1), anchor_date=datetime.now(UTC))
    schedules = [DeploymentScheduleCreate(schedule=daily, active=True, slug="daily")]
    flow_id = idle_server.create_flow_from_name("a flow")
    made = idle_server.create_deployment(flow_id, "planned", work_pool_name="cpu", schedules=schedules)
    assert server_services.unplanned(idle_server) == ["planned (daily)"] and idle_schedules(idle_server) == []
    (daily_one,) = idle_server.read_deployment(made).schedules
    idle_server.update_deployment_schedule(made, daily_one.id, active=False)
    assert idle_schedules(idle_server) == [("these schedules of planned are off: daily", made)]
    idle_server.request("POST", "/deployments/{id}/pause_deployment", path_params={"id": made})
    assert idle_schedules(idle_server) == [("the schedules of planned are paused", made)]
    idle_server.request("POST", "/deployments/{id}/resume_deployment", path_params={"id": made})
    idle_server.update_deployment_schedule(made, daily_one.id, active=True)
    past = Scheduled(scheduled_time=datetime.now(UTC) - timedelta(hours=1))
    idle_server.create_flow_run_from_deployment(made, state=past)
    assert server_services.late_runs(idle_server)[0].startswith("1 run(s) of pool cpu are late, the first since ")
    running = idle_server.create_flow_run_from_deployment(made, state=Running())
    assert server_services.late_runs(idle_server) == []  # it waits for one that runs
    idle_server.create_task_run(a_task, running.id, "0", state=Running())
    idle_server.set_flow_run_state(running.id, Cancelled(), force=True)
    assert server_services.unended_tasks(idle_server) == 1
    assert server_services.unnoticed_deaths(idle_server) == ["a worker"]


def test_a_run_without_heartbeats_is_named_with_its_machine(idle_server: SyncPrefectClient) -> None:
    idle_server.create_work_pool(WorkPoolCreate(name="gpu", type="process"), overwrite=True)
    flow_id = idle_server.create_flow_from_name("a flow")
    made = idle_server.create_deployment(flow_id, "heard", work_pool_name="gpu")

    def start(name: str) -> UUID:
        run_id = idle_server.create_flow_run_from_deployment(made, name=name, state=Running()).id
        idle_server.update_flow_run_labels(run_id, {PROCESS: json.dumps({"machine": "far-away 0123"})})
        return run_id

    begun = datetime.now(UTC)
    dead, alive = start("dead"), start("alive")
    since = datetime.now(UTC)
    fresh = start("fresh")
    assert server_services.silent_runs(idle_server, begun) == []
    assert len(server_services.silent_runs(idle_server, since)) == 2  # and not the fresh one

    def silent() -> list[str]:
        return [line.partition(" shows Running, but sends no heartbeat: ")[0] for line in lines()]

    def lines() -> list[str]:
        for run_id, when in ((alive, datetime.now(UTC)), (dead, begun)):  # the last one of the dead was earlier
            resource = {"prefect.resource.id": f"prefect.flow-run.{run_id}"}
            event = Event(event="prefect.flow-run.heartbeat", occurred=when, resource=resource, id=uuid4())
            idle_server.request("POST", "/events", json=[event.model_dump(mode="json")])
        return server_services.silent_runs(idle_server, since)

    until(lambda: silent() == ["dead on far-away"], "the heartbeat is heard", 60)
    for run_id in (dead, alive, fresh):
        idle_server.set_flow_run_state(run_id, Cancelled(), force=True)
    assert server_services.silent_runs(idle_server, datetime.now(UTC)) == []


@task
def a_task() -> None:
    """Never called: a run of it is made on the server."""


LOG = """
11:00:01.000 | ERROR   | docket.dependencies - ↩ [    22ms] schedule_deployments(){schedule_deployments}
Traceback (most recent call last):
  File "worker.py", line 1134, in _execute
ValueError: the first
    of several lines

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
sqlalchemy.exc.InvalidRequestError: Can't evaluate bulk DML statement of postgresql://me:secret@host/prefect
11:00:02.000 | WARNING | docket.worker - slow
11:00:03.000 | ERROR   | uvicorn.error - Exception in ASGI application
11:00:04.000 | ERROR   | prefect.server.services.taskrunrecorder - could not record
"""


def test_errors_of_loops_are_read_from_the_log() -> None:
    first, second = loop_errors(LOG)
    assert (first.loop, first.clock) == ("schedule_deployments", "11:00:01")
    assert first.message.startswith("sqlalchemy.exc.InvalidRequestError: Can't evaluate bulk DML statement")
    assert "secret" not in first.message
    assert second.loop == "prefect.server.services.taskrunrecorder" and second.message == "could not record"


def test_a_loop_that_failed_once_or_fails_no_more_is_not_told(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    line = "{:%H:%M:%S}.000 | ERROR   | docket.worker - ↩ [    22ms] {}(){{key}}\n"
    now = datetime.now()
    times = {"once": [5], "long_ago": [150, 120, 90], "still": [45, 25, 5]}
    log.write_text("".join(line.format(now - timedelta(seconds=s), name) for name, all in times.items() for s in all))
    assert list(failing_loops(log)) == ["still"]
    os.utime(log, (0, 0))
    assert failing_loops(log) == {} == failing_loops(tmp_path / "none.log")
