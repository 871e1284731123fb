"""Scheduled runs that are late: report those that no worker takes, and keep one of several that were missed.

The attendant beside the server and `vectorclm doctor` use it, and each run as it starts.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid5

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, WorkPoolFilter
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run
from prefect.states import Cancelled

from flows.handle import MISSED, SKIPPED
from flows.platform.config import POOLS
from flows.platform.events import emit
from flows.platform.schedules import has_not_begun, schedule_of
from vectorclm.errors import VectorCLMError

MISSED_AFTER = timedelta(minutes=2)
REPORTED = "vectorclm.missed"  # the label of a run that was reported
STOPPED = (StateType.CANCELLED, StateType.CANCELLING)
ACTIVE = (StateType.PENDING, StateType.RUNNING, StateType.CANCELLING)


class SkippedRunError(VectorCLMError):
    """A scheduled run does nothing, as a newer run of its schedule is due."""


def skip_older(client: SyncPrefectClient, runs: Sequence[FlowRun]) -> list[FlowRun]:
    """Cancel all but the newest of the due runs of each schedule that have not begun; returns the others of `runs`.

    A platform that was stopped, or busy for long, would else make up every run of that time with equal settings.
    """
    newest: dict[UUID, FlowRun] = {}
    for run in runs:
        if (schedule_id := _waits_since(run)) is not None:
            before = newest.get(schedule_id)
            newest[schedule_id] = run if before is None or _due(run) > _due(before) else before
    kept = []
    for run in runs:
        schedule_id = _waits_since(run)
        if schedule_id is None or newest[schedule_id].id == run.id:
            kept.append(run)
        else:
            state: State[Any] = Cancelled(name=SKIPPED, message=_reason(newest[schedule_id]))
            client.set_flow_run_state(run.id, state)
    return kept


def _reason(newer: FlowRun) -> str:
    return (
        f"did not begin in time, and the run of {_due(newer):%Y-%m-%d %H:%M} UTC of the same schedule is due: of "
        "several missed runs, only the newest is made up"
    )


def check_is_newest() -> None:
    """Raise SkippedRunError where a newer run of the present run's schedule was due when a worker took this one.

    A worker may take an old run before the attendant has looked at it.
    """
    if flow_run.id is None or flow_run.run_count > 1:
        return
    with get_client(sync_client=True) as client:
        mine = client.read_flow_run(UUID(flow_run.id))
        if not mine.auto_scheduled or mine.created_by is None or mine.deployment_id is None:
            return
        states = client.read_flow_run_states(mine.id)
        taken = min((state.timestamp for state in states if state.type == StateType.PENDING), default=_due(mine))
        wanted = {
            "deployment_id": {"any_": [mine.deployment_id]},
            "expected_start_time": {"after_": _due(mine), "before_": taken},
        }
        due = client.read_flow_runs(
            flow_run_filter=FlowRunFilter.model_validate(wanted), sort=FlowRunSort.EXPECTED_START_TIME_DESC
        )
    for run in due:  # another worker may have taken the newer run meanwhile, so its state says nothing
        is_of_mine = run.auto_scheduled and run.created_by is not None and run.created_by.id == mine.created_by.id
        if is_of_mine and run.state_type not in STOPPED and _due(run) > _due(mine):
            raise SkippedRunError(_reason(run))


def report_missed(client: SyncPrefectClient, runs: Sequence[FlowRun] | None = None) -> list[str]:
    """Emit one event for each scheduled run that no worker took within MISSED_AFTER; returns a line for each run.

    A run that waits for another one of its pool or queue is not missed. `runs` are those that are due, if known.
    """
    late = [run for run in (_due_runs(client) if runs is None else runs) if _is_late(run)]
    lines = []
    for run in late:
        if (why := _why_missed(client, run)) is None:
            continue
        schedule = schedule_of(client, run) or run.name
        title = f"no worker took the scheduled run {schedule}"
        since = f"due since {_due(run):%Y-%m-%d %H:%M} UTC: {why}"
        lines.append(f"{title}, {since}")
        if REPORTED not in run.labels:
            _report(client, run, [title, since])
            client.update_flow_run_labels(run.id, {REPORTED: datetime.now(UTC).isoformat()})
    return lines


def _waits_since(run: FlowRun) -> UUID | None:
    """The id of the schedule of a run that is due and has not begun; None for other runs."""
    if not run.auto_scheduled or run.created_by is None:
        return None
    return run.created_by.id if has_not_begun(run) and _due(run) <= datetime.now(UTC) else None


def _due(run: FlowRun) -> datetime:
    """The time at which a run was to start."""
    return run.expected_start_time or run.next_scheduled_start_time or datetime.max.replace(tzinfo=UTC)


def _is_late(run: FlowRun) -> bool:
    return _waits_since(run) is not None and datetime.now(UTC) - _due(run) > MISSED_AFTER


def _why_missed(client: SyncPrefectClient, run: FlowRun) -> str | None:
    """Why no worker takes a run; None where it waits its turn, so that a worker will take it."""
    pool_name, queue_name = run.work_pool_name or "", run.work_queue_name or "default"
    assert run.state is not None
    if run.state.name == "AwaitingConcurrencySlot":
        return None  # a worker took it, and put it back until its deployment's limit allows it
    try:
        pool = client.read_work_pool(pool_name)
        queue = client.read_work_queue_by_name(queue_name, work_pool_name=pool_name)
    except ObjectNotFound:
        return f"the work pool {pool_name} or its queue {queue_name} is gone; `vectorclm doctor` creates it again"
    if pool.is_paused:
        return f"the work pool {pool_name} is paused"
    if queue.is_paused:
        return f"the work queue {queue_name} of the pool {pool_name} is paused"
    active = client.read_flow_runs(
        flow_run_filter=FlowRunFilter.model_validate({"state": {"type": {"any_": list(ACTIVE)}}}),
        work_pool_filter=WorkPoolFilter.model_validate({"name": {"any_": [pool_name]}}),
    )
    in_queue = [other for other in active if other.work_queue_name == queue_name]
    if _is_full(queue.concurrency_limit, len(in_queue)) or _is_full(pool.concurrency_limit, len(active)):
        return None
    online = any(worker.status == "ONLINE" for worker in client.read_workers_for_work_pool(pool_name))
    if not online:
        return f"no worker of the pool {pool_name} is online; `vectorclm doctor` starts those of this machine"
    return None if active else f"the worker of the pool {pool_name} is online, and takes none; read its log"


def _is_full(limit: int | None, active: int) -> bool:
    """Whether a pool or queue waits for the end of an active run; with a limit of 0 it waits for nothing."""
    return limit is not None and 0 < limit <= active


def _due_runs(client: SyncPrefectClient) -> list[FlowRun]:
    wanted = {
        "state": {"type": {"any_": [StateType.SCHEDULED]}},
        "expected_start_time": {"before_": datetime.now(UTC) - MISSED_AFTER},
    }
    return client.read_flow_runs(
        flow_run_filter=FlowRunFilter.model_validate(wanted),
        work_pool_filter=WorkPoolFilter.model_validate({"name": {"any_": list(POOLS)}}),
    )


def _report(client: SyncPrefectClient, run: FlowRun, lines: Sequence[str]) -> None:
    """Emit the event of a missed run; its id follows from the run's, so that two observers emit the same event."""
    resource = {
        "prefect.resource.id": f"prefect.flow-run.{run.id}",
        "prefect.resource.name": run.name,
        "prefect.resource.role": "flow-run",
    }
    pool = {
        "prefect.resource.id": f"prefect.work-pool.{run.work_pool_id}",
        "prefect.resource.role": "work-pool",
        "prefect.resource.name": run.work_pool_name or "",
    }
    about = {"due": _due(run).isoformat(), "parameters": run.parameters}
    emit(client, MISSED, [resource, pool], lines, about, uuid5(run.id, MISSED))
