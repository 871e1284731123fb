"""Provision Prefect: create work pools, deployments, and automations that restart runs and notify the operator.

Provisioning is idempotent: what is correct stays untouched.
"""

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound

from flows.handle import CURRICULA, MAX_RESCUES, RESCUED
from flows.net import HEARTBEAT_SECONDS
from flows.platform.config import POOLS, PlatformConfig
from flows.platform.deployment_file import all_deployments, entries, fields_of, put
from flows.platform.experiment_forms import fill_forms
from flows.platform.notify import NOTIFICATION, notification

POOL_FILE = Path(__file__).parent / "pools" / "process.json"
ZOMBIE_SECONDS = 5 * HEARTBEAT_SECONDS  # longer than a short absence of the server
CANCEL_SECONDS = 120  # longer than a worker waits for a run to end
RESCUE_SECONDS = 20  # a worker reports a crash twice, seconds apart, and the second would undo an earlier rescue
RUNS = ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]})
ENDED = ("Completed", "Failed", "Cancelled", "Cancelling", "Crashed")

FALLEN_SCORE = "vectorclm: a score fell by more than its noise"  # an automation of earlier versions

Report = Callable[[str], None]


def provision(client: SyncPrefectClient, report: Report, config: PlatformConfig) -> str | None:
    """Create what is missing and repair what differs; `report` is called with a line for each change.

    Returns a message if the block that VECTORCLM_NOTIFY names is missing or unsuitable, as at the first start, or if an
    experiment's file is not offered. Raises DeploymentError.
    """
    for pool in POOLS:
        _pool(client, pool, report)
    for automation in automations():
        _automation(client, automation, report)
    _queue(client, report)
    _deploy(client, report)
    problems = fill_forms(client, report)
    if (problem := _notification(client, config, report)) is not None:
        problems.append(problem)
    return "\n".join(problems) or None


def automations() -> list[AutomationCore]:
    """The automations for runs of the pools: mark dead runs as crashed, restart crashed runs, end lost ones."""
    of_pools = ResourceSpecification({"prefect.resource.role": "work-pool", "prefect.resource.name": list(POOLS)})
    zombies = AutomationCore(
        name="vectorclm: a run without a heartbeat has crashed",
        description="Its machine or its worker is gone, and cannot report it.",
        trigger=EventTrigger(
            posture=Posture.Proactive,
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{state}" for state in ENDED)},
            match=RUNS,
            for_each={"prefect.resource.id"},
            threshold=1,
            within=timedelta(seconds=ZOMBIE_SECONDS),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                message=f"No heartbeat for {ZOMBIE_SECONDS} seconds: its worker or machine is gone.",
            )
        ],
    )
    rescue = AutomationCore(
        name="vectorclm: a crashed run starts again",
        description=f"Finished stages are reused. At most {MAX_RESCUES} times; then the run fails.",
        trigger=_silence("prefect.flow-run.Crashed", RESCUE_SECONDS, of_pools),
        actions=[
            ChangeFlowRunState(
                state=StateType.SCHEDULED,
                name=RESCUED,
                message="It crashed, and starts again: finished stages are reused.",
            )
        ],
    )
    hopeless = AutomationCore(
        name="vectorclm: a run that crashes again and again has failed",
        description="Also if it crashes before its flow, which counts the rescues, has begun.",
        trigger=EventTrigger(
            posture=Posture.Reactive,
            expect={f"prefect.flow-run.{RESCUED}"},
            match=RUNS,
            for_each={"prefect.resource.id"},
            threshold=MAX_RESCUES + 1,
            within=timedelta(hours=1),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.FAILED,
                message=f"It crashed {MAX_RESCUES + 1} times within an hour: read the worker's log, check the machine"
                " (memory, disk, installed packages), then press Retry; finished stages are kept.",
            )
        ],
    )
    cancelled = AutomationCore(
        name="vectorclm: a run without a process is cancelled",
        description="Its machine or its worker is gone, so no process is left.",
        trigger=_silence("prefect.flow-run.Cancelling", CANCEL_SECONDS),
        actions=[ChangeFlowRunState(state=StateType.CANCELLED, message="No process of it was left.")],
    )
    return [zombies, rescue, hopeless, cancelled]


def _silence(after: str, seconds: int, related: ResourceSpecification | None = None) -> EventTrigger:
    """A trigger that fires if a run sends no event, not even a heartbeat, for so long after the event `after`."""
    return EventTrigger(
        posture=Posture.Proactive,
        after={after},
        expect={"prefect.flow-run.*"},
        match=RUNS,
        match_related=related or ResourceSpecification({}),
        for_each={"prefect.resource.id"},
        threshold=1,
        within=timedelta(seconds=seconds),
    )


def _notification(client: SyncPrefectClient, config: PlatformConfig, report: Report) -> str | None:
    """Create or remove what notifies the operator; returns a message if the receiver is missing or unsuitable."""
    wanted, problem = notification(client, config, report)
    keeps = wanted is not None or problem is not None or not config.names_receiver
    unwanted = [FALLEN_SCORE] if keeps else [FALLEN_SCORE, NOTIFICATION]
    for found in (found for name in unwanted for found in client.read_automations_by_name(name)):
        client.delete_automation(found.id)
        report(f"automation removed: {found.name}")
    if wanted is not None:
        _automation(client, wanted, report)
    return problem


def _pool(client: SyncPrefectClient, name: str, report: Report) -> None:
    template = json.loads(POOL_FILE.read_text(encoding="utf-8"))
    try:
        found = client.read_work_pool(name)
    except ObjectNotFound:
        about = {"cpu": "Curricula, and stages without torch.", "gpu": "Stages that train or score a model."}
        client.create_work_pool(
            WorkPoolCreate(
                name=name,
                type="process",
                description=about[name],
                base_job_template=template,
            )
        )
        report(f"work pool {name} created")
        return
    if found.type != "process":
        return  # it was created for a cluster, with its own template and workers
    changes = []
    if found.is_paused:
        changes.append("was paused: resumed")
    if found.concurrency_limit == 0:
        changes.append("took no runs: limit removed")
    if found.base_job_template != template:
        changes.append("had another job template: restored")
    if changes:
        limit = found.concurrency_limit or None
        wanted = WorkPoolUpdate(is_paused=False, concurrency_limit=limit, base_job_template=template)
        client.update_work_pool(name, wanted)
        report(f"work pool {name} {', '.join(changes)}")


def _queue(client: SyncPrefectClient, report: Report) -> None:
    """Create the queue in which curricula wait for the one before them; a limit that a person set stays."""
    try:
        found = client.read_work_queue_by_name(CURRICULA, work_pool_name="cpu")
    except ObjectNotFound:
        client.create_work_queue(CURRICULA, concurrency_limit=1, work_pool_name="cpu")
        report(f"work queue {CURRICULA} created")
        return
    if found.is_paused:
        client.update_work_queue(found.id, is_paused=False)
        report(f"work queue {CURRICULA} was paused: resumed")


def _automation(client: SyncPrefectClient, wanted: AutomationCore, report: Report) -> None:
    found = client.read_automations_by_name(wanted.name)
    for extra in found[1:]:
        client.delete_automation(extra.id)
    if not found:
        client.create_automation(wanted)
        report(f"automation created: {wanted.name}")
        return
    current = AutomationCore.model_validate(found[0].model_dump(include=set(AutomationCore.model_fields)))
    if _essence(current) != _essence(wanted):
        client.update_automation(found[0].id, wanted)
        report(f"automation repaired: {wanted.name}")


def _essence(automation: AutomationCore) -> object:
    """The parts of an automation that are compared: whether it is on, its trigger and its actions."""
    return automation.model_dump(include={"enabled", "trigger", "actions"})


def _deploy(client: SyncPrefectClient, report: Report) -> None:
    """Create or update the deployments of `prefect.yaml` and of all stages. Raises DeploymentError."""
    there = {(found.flow_id, found.name): found for found in all_deployments(client)}
    created = list[str]()
    for entry in entries():
        flow_id, fields = fields_of(client, entry)
        found = there.get((flow_id, entry["name"]))
        if put(client, flow_id, entry["name"], fields, found, entry.get("schedules", [])):
            created.append(entry["name"])
    if created:
        report(f"{len(created)} deployments created: {', '.join(sorted(created))}")
