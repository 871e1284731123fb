"""Check the services inside Prefect's server: scheduler, late runs, automations, foreman, clean-up.

Each service is a loop inside the server. A loop that fails reports this only in the server's log, and the server still
counts as healthy.
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter, WorkPoolFilter
from prefect.client.schemas.objects import State, StateType
from prefect.client.schemas.schedules import IntervalSchedule, RRuleSchedule
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound
from prefect.states import Pending, Scheduled

from flows.execution.labels import machine_of
from flows.net import without_password
from flows.platform.config import POOLS
from flows.platform.deployment_file import all_deployments
from flows.platform.provision import ZOMBIE_SECONDS

PROBE = "vectorclm-doctor"  # the name of the probe's flow, deployment and automation
AGAIN_SECONDS = 10  # between two events for the probe's automation
PROBE_SECONDS = 60  # the slowest of the probed loops takes 5 s on an idle machine
LATE_SECONDS = 60  # a worker asks for runs every 5 s
CLEAN_SECONDS = 120  # the clean-up loops every 20 s
SILENT_SECONDS = 120  # a worker is offline after three missed heartbeats of 30 s, and the foreman loops every 15 s
PLAN_SECONDS = 60  # the slower of the scheduler's loops takes 10 s
FAILURES = 3  # errors of a loop after which the probe stops waiting for its effect
MESSAGE_LETTERS = 300
ROUND_SECONDS = 20  # of the slowest loop that matters; a repaired loop logs no error for two rounds
RECENT_SECONDS = 180  # three rounds of the slowest loop
RESTART = "restart the platform (`vectorclm down`, then `vectorclm up`)"
SILENT_RUN = (
    f"shows Running, but sends no heartbeat: if its machine is gone, it counts as crashed after {ZOMBIE_SECONDS} s and "
    "starts again by itself; if it does not, cancel it on its page in Prefect, then press Retry"
)
RELIED = {  # Prefect's name of a service, the consequence of its failure, the names of its loops
    "scheduler": ("schedules start no runs", ("schedule_deployments", "schedule_recent_deployments")),
    "late_runs": ("a run that no worker takes is not shown as late", ("monitor_late_runs", "mark_flow_run_late")),
    "triggers": (
        "automations do not fire, so crashed runs are not started again",
        ("evaluate_proactive_triggers_periodic", "prefect.server.events.triggers"),
    ),
    "foreman": ("a worker that died is shown as online", ("monitor_worker_health",)),
    "cancellation_cleanup": (
        "tasks of a cancelled run are shown as running",
        ("monitor_cancelled_flow_runs", "monitor_subflow_runs", "cancel_child_task_runs", "cancel_subflow_run"),
    ),
    "event_persister": ("events are not kept", ()),
    "task_run_recorder": ("the states of stages are not shown", ()),
}
ERROR = re.compile(r"^(\d\d:\d\d:\d\d)\.\d+ \| (?:ERROR|CRITICAL) *\| (\S+) - (.*)")
LOOPS = ("docket.", "prefect.server.services", "prefect.server.events", "prefect.server.utilities.messaging")
CALL = re.compile(r"\] (\w+)\(")


@dataclass(frozen=True)
class LoopError:
    """An error that a loop of the server logged."""

    loop: str  # the name of its function or logger
    clock: str  # HH:MM:SS
    message: str


def loop_errors(log: str) -> list[LoopError]:
    """Parse the errors of the server's loops from its log, oldest first, each with the last line of its traceback."""
    found: list[LoopError] = []
    lines = log.splitlines()
    for number, line in enumerate(lines):
        match = ERROR.match(line)
        if match is None or not match[2].startswith(LOOPS):
            continue
        call = CALL.search(match[3])
        message, inside = match[3], False
        for below in lines[number + 1 :]:
            if re.match(r"\d\d:\d\d:\d\d\.\d", below):
                break
            inside = inside or below.startswith("Traceback ")
            if inside and re.match(r"[\w.]+(Error|Exception|Failure|Exit|Interrupt|Timeout|Group)\b", below):
                message = below
        message = without_password(message)[:MESSAGE_LETTERS]
        found.append(LoopError(call[1] if call else match[2], match[1], message))
    return found


def failing_loops(log: Path) -> dict[str, LoopError]:
    """The loops that failed repeatedly and within the last rounds, each with its last error."""
    try:
        if time.time() - log.stat().st_mtime > RECENT_SECONDS:
            return {}
        text = log.read_text(errors="replace")
    except OSError:
        return {}
    now = datetime.now()
    recent = [error for error in loop_errors(text) if _age(error, now) < timedelta(seconds=RECENT_SECONDS)]
    times = Counter(error.loop for error in recent)
    last = {error.loop: error for error in recent if times[error.loop] > 1}
    return {loop: error for loop, error in last.items() if _age(error, now) < 2.5 * timedelta(seconds=ROUND_SECONDS)}


def _age(error: LoopError, now: datetime) -> timedelta:
    """The age of an error; the log has only the time of day."""
    logged = datetime.combine(now, datetime.strptime(error.clock, "%H:%M:%S").time())
    return (now - logged) % timedelta(days=1)


def findings(client: SyncPrefectClient, probe: "Probe", unplanned: list[str], log: Path) -> Iterator[tuple[bool, str]]:
    """The problems of the services that the platform relies on, with what to do; else a line that all work."""
    off = switched_off(client)
    idle = probe.failures(off)
    deadline = time.monotonic() + 2.5 * ROUND_SECONDS
    known = {loop for name in idle for loop in RELIED[name][1]}
    # Loops get time to recover, as after a restart of the database.
    while failing_loops(log).keys() - known and time.monotonic() < deadline:
        time.sleep(1)
    failing = failing_loops(log)
    found = []
    for name, (consequence, loops) in RELIED.items():
        errors = [failing.pop(loop).message for loop in loops if loop in failing]
        if name in off:
            switch = f"PREFECT_SERVER_SERVICES_{name.upper()}_ENABLED"
            fix = f"remove {switch} from the profile in PREFECT_HOME (`prefect config unset {switch}`), then {RESTART}"
            found.append(f"Prefect's {name} is switched off, so {consequence}: {fix}")
        elif errors or name in idle:
            why = f" ({errors[-1]})" if errors else f" (no effect in {PROBE_SECONDS} s)"
            found.append(f"Prefect's {name} fails{why}, so {consequence}: {RESTART}; if it fails again, read {log}")
    found += [f"{loop} of Prefect's server fails ({error.message}): read {log}" for loop, error in failing.items()]
    if unplanned:
        found.append(f"these schedules are on, but have no next run: {', '.join(unplanned)}: {RESTART}")
    if dead := unnoticed_deaths(client):
        found.append(
            f"workers without a heartbeat for {SILENT_SECONDS} s are shown as online: {', '.join(dead)}: {RESTART}"
        )
    if count := unended_tasks(client):
        found.append(f"{count} task(s) of cancelled runs are still shown as running: {RESTART}")
    yield from ((False, line) for line in found)
    if not found:
        yield True, "Prefect's scheduler plans runs, late runs are marked, automations fire, no service logs errors"


def switched_off(client: SyncPrefectClient) -> list[str]:
    """The services that the platform relies on, but the server's settings switch off."""
    answer = client.request("GET", "/admin/settings").json()
    services: Mapping[str, Any] = answer.get("server", {}).get("services", {})
    return [name for name in RELIED if services.get(name, {}).get("enabled") is False]


class Probe:
    """A deployment with a schedule, a late run and a run with an automation, which working services must change."""

    def __init__(self, client: SyncPrefectClient, log: Path | None) -> None:
        self.client, self.log = client, log
        self._begin = log.stat().st_size if log is not None and log.exists() else 0
        every_day = IntervalSchedule(interval=timedelta(days=1), anchor_date=datetime.now(UTC))
        schedule = DeploymentScheduleCreate(schedule=every_day, active=True)
        flow_id = client.create_flow_from_name(PROBE)
        # The deployment has no pool, so no worker takes its runs.
        self.deployment_id = client.create_deployment(flow_id, PROBE, schedules=[schedule])
        past: State[Any] = Scheduled(scheduled_time=datetime.now(UTC) - timedelta(minutes=5))
        self.late_id = client.create_flow_run_from_deployment(self.deployment_id, state=past).id
        self.started_id = client.create_flow_run_from_deployment(self.deployment_id).id
        trigger = EventTrigger(
            posture=Posture.Reactive,
            expect={"prefect.flow-run.Pending"},
            match=ResourceSpecification({"prefect.resource.id": f"prefect.flow-run.{self.started_id}"}),
            threshold=1,
            within=timedelta(0),
        )
        action = ChangeFlowRunState(state=StateType.CANCELLED, message="by the automation of `vectorclm doctor`")
        client.create_automation(AutomationCore(name=PROBE, trigger=trigger, actions=[action]))

    def failures(self, off: Sequence[str] = ()) -> list[str]:
        """The services without effect on the probe within PROBE_SECONDS; those in `off` are skipped."""
        effects: dict[str, Callable[[], bool]] = {
            "scheduler": self._is_planned,
            "late_runs": lambda: self._state(self.late_id) == "Late",
            "triggers": lambda: self._state(self.started_id) == "Cancelled",
        }
        effects = {name: effect for name, effect in effects.items() if name not in off}
        begun, asked, failed = time.monotonic(), 0, list[str]()
        while effects and (passed := time.monotonic() - begun) < PROBE_SECONDS:
            if (
                "triggers" in effects and passed >= asked * AGAIN_SECONDS
            ):  # an automation sees only events after its creation
                asked += 1
                self.client.set_flow_run_state(self.started_id, Pending(), force=True)
            effects = {name: effect for name, effect in effects.items() if not effect()}
            failed += [name for name in effects if self._fails(name)]
            effects = {name: effect for name, effect in effects.items() if name not in failed}
            time.sleep(0.2)
        return [*failed, *effects]

    def _fails(self, name: str) -> bool:
        """Whether the loops of a service have failed FAILURES times since the probe began."""
        if self.log is None or not self.log.exists():
            return False
        with self.log.open("rb") as log:
            log.seek(self._begin)
            errors = loop_errors(log.read().decode(errors="replace"))
        return sum(error.loop in RELIED[name][1] for error in errors) >= FAILURES

    def _state(self, run_id: UUID) -> str | None:
        return self.client.read_flow_run(run_id).state_name

    def _is_planned(self) -> bool:
        return any(
            run.auto_scheduled for run in self.client.read_flow_runs(flow_run_filter=_runs_of(self.deployment_id))
        )


@contextmanager
def probe(client: SyncPrefectClient, log: Path | None = None) -> Iterator[Probe]:
    """Create a probe of the server's services, and remove it after the block; `log` is the server's log."""
    _remove_probe(client)  # left by a killed doctor
    try:
        yield Probe(client, log)
    finally:
        _remove_probe(client)


def _remove_probe(client: SyncPrefectClient) -> None:
    for automation in client.read_automations_by_name(PROBE):
        client.delete_automation(automation.id)
    with suppress(ObjectNotFound):
        deployment = client.read_deployment_by_name(f"{PROBE}/{PROBE}")
        for run in client.read_flow_runs(flow_run_filter=_runs_of(deployment.id)):
            with suppress(ObjectNotFound):
                client.delete_flow_run(run.id)
        client.delete_deployment(deployment.id)
        client.delete_flow(deployment.flow_id)


def _runs_of(deployment_id: UUID) -> FlowRunFilter:
    return FlowRunFilter.model_validate({"deployment_id": {"any_": [deployment_id]}})


def unplanned(client: SyncPrefectClient) -> list[str]:
    """Deployments with a schedule that is on, but without a next run although there was time to plan one."""
    found = []
    for deployment in all_deployments(client):
        runs = None
        for schedule in deployment.schedules:
            since = schedule.updated or schedule.created or datetime.now(UTC)
            fresh = datetime.now(UTC) - since < timedelta(seconds=PLAN_SECONDS)
            may_end = isinstance(schedule.schedule, RRuleSchedule) or schedule.max_scheduled_runs == 0
            if deployment.paused or not schedule.active or fresh or may_end:
                continue
            if runs is None:
                runs = client.read_flow_runs(flow_run_filter=_planned(deployment.id))
            if not any(run.created_by is not None and run.created_by.id == schedule.id for run in runs):
                found.append(f"{deployment.name} ({schedule.slug or schedule.id})")
    return found


def idle_schedules(client: SyncPrefectClient) -> list[tuple[str, UUID]]:
    """The deployments whose schedules start no runs, because they are off or the deployment is paused, with its id."""
    found = []
    for deployment in all_deployments(client):
        off = sorted(schedule.slug or str(schedule.id) for schedule in deployment.schedules if not schedule.active)
        if deployment.paused and deployment.schedules:
            found.append((f"the schedules of {deployment.name} are paused", deployment.id))
        elif off:
            found.append((f"these schedules of {deployment.name} are off: {', '.join(off)}", deployment.id))
    return found


def _planned(deployment_id: UUID) -> FlowRunFilter:
    states = {"type": {"any_": [StateType.SCHEDULED]}}
    return FlowRunFilter.model_validate({"deployment_id": {"any_": [deployment_id]}, "state": states})


def late_runs(client: SyncPrefectClient) -> list[str]:
    """A line for each pool in which runs are late although no other run occupies its worker."""
    found = []
    before = datetime.now(UTC) - timedelta(seconds=LATE_SECONDS)
    due = {"state": {"type": {"any_": [StateType.SCHEDULED]}}, "expected_start_time": {"before_": before}}
    busy = {"state": {"type": {"any_": [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]}}}
    for pool in POOLS:
        late, at_work = (
            client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(which), work_pool_filter=_pool(pool))
            for which in (due, busy)
        )
        times = [run.next_scheduled_start_time or run.expected_start_time for run in late]
        late_since = [when for when in times if when is not None and when < before]
        if late_since and not at_work:
            since = f"{min(late_since):%Y-%m-%d %H:%M} UTC"
            found.append(
                f"{len(late_since)} run(s) of pool {pool} are late, the first since {since}, and no run of it is active"
            )
    return found


def silent_runs(client: SyncPrefectClient, since: datetime) -> list[str]:
    """A line for each run of the pools that is shown as running, and has sent no heartbeat since this time."""
    found = []
    running = FlowRunFilter.model_validate({"state": {"type": {"any_": [StateType.RUNNING]}}})
    for pool in POOLS:
        for run in client.read_flow_runs(flow_run_filter=running, work_pool_filter=_pool(pool)):
            if run.state is None or run.state.timestamp > since:
                continue
            wanted = {
                "occurred": {"since": since.isoformat(), "until": (since + timedelta(days=1)).isoformat()},
                "event": {"name": ["prefect.flow-run.heartbeat"]},
                "resource": {"id": [f"prefect.flow-run.{run.id}"]},
            }
            heard = client.request("POST", "/events/filter", json={"filter": wanted, "limit": 1}).json()["events"]
            if not heard:
                found.append(f"{run.name} on {machine_of(run)} {SILENT_RUN}")
    return found


def _pool(name: str) -> WorkPoolFilter:
    return WorkPoolFilter.model_validate({"name": {"any_": [name]}})


def unnoticed_deaths(client: SyncPrefectClient) -> list[str]:
    """Workers that are shown as online SILENT_SECONDS after their last heartbeat."""
    limit = datetime.now(UTC) - timedelta(seconds=SILENT_SECONDS)
    return [
        worker.name
        for pool in client.read_work_pools()
        for worker in client.read_workers_for_work_pool(pool.name)
        if worker.status == "ONLINE" and worker.last_heartbeat_time is not None and worker.last_heartbeat_time < limit
    ]


def unended_tasks(client: SyncPrefectClient) -> int:
    """The number of tasks shown as running although their run was cancelled CLEAN_SECONDS ago or earlier."""
    now = datetime.now(UTC)
    long_ago = {"before_": now - timedelta(seconds=CLEAN_SECONDS), "after_": now - timedelta(hours=23)}
    runs = FlowRunFilter.model_validate({"state": {"type": {"any_": ["CANCELLED"]}}, "end_time": long_ago})
    tasks = TaskRunFilter.model_validate({"state": {"type": {"any_": ["RUNNING", "PENDING"]}}})
    return len(client.read_task_runs(flow_run_filter=runs, task_run_filter=tasks))
