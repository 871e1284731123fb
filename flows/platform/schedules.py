"""Schedules of the platform's deployments in Prefect: set one for evaluations; list, pause, resume and remove any."""

import asyncio
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID
from zoneinfo import ZoneInfo

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import DeploymentSchedule, FlowRun, State, StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import SCHEDULE_TYPES, CronSchedule, IntervalSchedule
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run
from prefect.server.schemas import schedules as server_schedules
from prefect.states import Cancelled
from pydantic import ValidationError

from flows.handle import SKIPPED
from flows.net import PROVISION
from flows.platform.deployment_file import all_deployments
from flows.tracking.lookup import named_model
from vectorclm.errors import ConfigError
from vectorclm.store.artifact import Store
from vectorclm.store.layout import STAGES
from vectorclm.store.model_names import REGISTERED, UnknownModelError, is_place, resolve_model
from vectorclm.store.model_ref import ADDRESS, CANDIDATE_DIGITS, find_model

EVALUATE = "evaluate/evaluate"
BY_NAME = re.compile(r"[\w.-]+(@[\w.-]+|/[0-9]+)")  # a registered model and its alias or version
EVERY_HOUR = re.compile(r"(\S+ +\* +\* +\* +\*|@hourly)")
SHOWN_RUNS = 3
NOT_BEGUN = ("Scheduled", "Late", "Queued", "AwaitingConcurrencySlot")  # not one that is retried or started again
ID_DIGITS = 4  # at least, of an id that is given by its beginning


class KnownSchedule(NamedTuple):
    """A schedule, the deployment that it runs, and the name by which a person finds it."""

    name: str
    schedule: DeploymentSchedule
    deployment: DeploymentResponse


def cron_times(cron: str, timezone: str) -> CronSchedule:
    """The times of a cron expression in a zone. Raises ConfigError where either is wrong, or no time ever comes.

    Prefect's cron leaves out the hour that repeats when clocks are set back, so a schedule for every hour is kept in
    UTC, where it has the same times and no hour repeats.
    """
    fields = 'write minute, hour, day, month and weekday, as in --cron "0 3 * * *"'
    if len(cron.split()) > 5:
        raise ConfigError(f"--cron {cron!r} has {len(cron.split())} fields: {fields}")
    if not timezone:
        raise ConfigError("--timezone is empty: name a zone such as Europe/Berlin, or leave it out for UTC")
    try:
        found = CronSchedule(cron=cron, timezone=timezone)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(reason if "timezone" in reason else f"{reason}: {fields}") from error
    zone = ZoneInfo(timezone)
    offsets = [datetime(2001, month, 1, tzinfo=zone).utcoffset() or timedelta() for month in (1, 7)]
    if EVERY_HOUR.fullmatch(cron.strip()) and not any(offset % timedelta(hours=1) for offset in offsets):
        found = CronSchedule(cron=cron, timezone="UTC" if offsets[0] != offsets[1] else timezone)
    try:
        asyncio.run(server_schedules.CronSchedule(cron=cron, timezone=timezone).get_dates(1))
    except ValueError as error:
        raise ConfigError(f"--cron {cron!r} names no day that ever comes: {fields}") from error
    return found


def schedulable_model(named: str, store: Store) -> str:
    """The address of a model as the form of `evaluate` takes it; an alias stays one, and is looked up by each run.

    Raises a VectorCLMError where the registry or the store does not have the model.
    """
    is_registered = named.startswith(REGISTERED)
    if not is_registered and not is_place(named) and BY_NAME.fullmatch(named) and named.split("/")[0] not in STAGES:
        named, is_registered = REGISTERED + named, True
    try:
        found = find_model(named_model(named, store) if is_registered else resolve_model(named, store.uri)).address
    except UnknownModelError as error:
        raise ConfigError(f"{error}; of a registered model, write the alias, too: NAME@ALIAS") from error
    return named if is_registered else found


def add_evaluation(
    client: SyncPrefectClient, parameters: Mapping[str, Any], times: CronSchedule, name: str | None
) -> KnownSchedule:
    """Add a schedule for evaluations with these parameters of the form, named after what it does unless named.

    Raises ConfigError where the name is taken, or Prefect has no such deployment.
    """
    try:
        deployment = client.read_deployment_by_name(EVALUATE)
    except ObjectNotFound as error:
        raise ConfigError(f"Prefect has no deployment {EVALUATE}: {PROVISION}") from error
    slug = name or _subject(parameters)
    if any(known.name == slug for known in known_schedules(client)):
        raise ConfigError(
            f"there is a schedule {slug!r} already: give another --name, or remove it with "
            f"`vectorclm schedule remove '{slug}'`"
        )
    wanted = DeploymentScheduleCreate(schedule=times, slug=slug, parameters=dict(parameters))
    (made,) = client.create_deployment_schedules(deployment.id, [wanted])
    _plan(client, deployment.id)
    return KnownSchedule(slug, made, deployment)


def known_schedules(client: SyncPrefectClient) -> list[KnownSchedule]:
    """Every schedule of the platform, with those that were set in Prefect's page, by name."""
    found = [
        KnownSchedule(schedule.slug or _title(schedule, deployment), schedule, deployment)
        for deployment in all_deployments(client)
        for schedule in deployment.schedules
    ]
    return sorted(found, key=lambda known: known.name)


def overview(client: SyncPrefectClient) -> list[dict[str, Any]]:
    """What each schedule runs, when, whether it is on, and its next and last run."""
    begun = [kind for kind in StateType if kind != StateType.SCHEDULED]
    rows = []
    for known in known_schedules(client):
        name, schedule, deployment = known
        here = next(iter(_waiting(client, known)), None)
        last = _runs(client, known, begun, FlowRunSort.EXPECTED_START_TIME_DESC, limit=1)
        before = next(iter(last), None)
        is_on = schedule.active and not deployment.paused
        off = "paused with its deployment" if schedule.active else "paused"
        rows.append(
            {
                "id": str(schedule.id),
                "name": name,
                "runs": _title(schedule, deployment),
                "when": _when(schedule.schedule),
                "state": "on" if is_on else off,
                "next": _time(here) if here is not None else None,
                "last": f"{before.state_name}, {_time(before)}" if before is not None else None,
            }
        )
    return rows


def find(client: SyncPrefectClient, name: str) -> KnownSchedule:
    """The schedule of this name or id, or beginning of an id. Raises ConfigError unless there is exactly one."""
    every = known_schedules(client)
    found = [known for known in every if known.name == name]
    if not found and len(name) >= ID_DIGITS:
        found = [known for known in every if str(known.schedule.id).startswith(name.lower())]
    if len(found) == 1:
        return found[0]
    if found:
        ids = ", ".join(str(known.schedule.id) for known in found)
        raise ConfigError(f"{len(found)} schedules are called {name!r}: give the id of one ({ids})")
    names = ", ".join(repr(known.name) for known in every)
    raise ConfigError(f"there is no schedule {name!r}: " + (f"there are {names}" if every else "there is none at all"))


def switch(client: SyncPrefectClient, name: str, *, active: bool) -> KnownSchedule:
    """Pause or resume a schedule. Pausing skips its runs that are due and have not begun."""
    known = find(client, name)
    kept = known.schedule.parameters  # which Prefect's server removes where an update names none
    client.update_deployment_schedule(known.deployment.id, known.schedule.id, active=active, parameters=kept)
    if not active:
        skipped: State[Any] = Cancelled(name=SKIPPED, message=f"the schedule {known.name} was paused")
        for run in _waiting(client, known):
            client.set_flow_run_state(run.id, skipped)
    _plan(client, known.deployment.id)
    return known


def remove(client: SyncPrefectClient, name: str) -> KnownSchedule:
    """Remove a schedule and its runs that have not begun."""
    known = find(client, name)
    client.delete_deployment_schedule(known.deployment.id, known.schedule.id)
    for run in _waiting(client, known):
        client.delete_flow_run(run.id)
    _plan(client, known.deployment.id)
    return known


def next_runs(client: SyncPrefectClient, known: KnownSchedule) -> str:
    """The next times of a schedule, in its zone."""
    runs = _waiting(client, known)
    zone = ZoneInfo(getattr(known.schedule.schedule, "timezone", None) or "UTC")
    times = sorted(run.expected_start_time for run in runs if run.expected_start_time is not None)
    if not times:
        return "no run is planned"
    return (
        "next runs " + ", ".join(f"{when.astimezone(zone):%Y-%m-%d %H:%M}" for when in times[:SHOWN_RUNS]) + f" {zone}"
    )


def has_not_begun(run: FlowRun) -> bool:
    """Whether a run waits for its first attempt; one that is retried or was rescued waits, too, and has begun."""
    return not run.run_count and run.state_type == StateType.SCHEDULED and run.state_name in NOT_BEGUN


def schedule_of(client: SyncPrefectClient, run: FlowRun) -> str | None:
    """The name of the schedule that started a run; None if a person or a program did, or it is gone."""
    if not run.auto_scheduled or run.created_by is None or run.deployment_id is None:
        return None
    try:
        deployment = client.read_deployment(run.deployment_id)
    except ObjectNotFound:
        return None
    found = [schedule for schedule in deployment.schedules if schedule.id == run.created_by.id]
    return (found[0].slug or _title(found[0], deployment)) if found else None


def schedule_of_this_run() -> str | None:
    """The name of the schedule that started the present run; None if a person or a program did."""
    if flow_run.id is None:
        return None
    with get_client(sync_client=True) as client:
        return schedule_of(client, client.read_flow_run(UUID(flow_run.id)))


def _plan(client: SyncPrefectClient, deployment_id: UUID) -> None:
    """Have the server plan the runs of a deployment now.

    Prefect drops the planned runs of every schedule of a deployment when one of them changes, and its own loop plans
    them again only seconds later, without those that were due meanwhile.
    """
    client.request("POST", "/deployments/{id}/schedule", path_params={"id": deployment_id}, json={})


def _waiting(client: SyncPrefectClient, known: KnownSchedule) -> list[FlowRun]:
    """The runs of a schedule that have not begun, the next one first."""
    runs = _runs(client, known, [StateType.SCHEDULED], FlowRunSort.EXPECTED_START_TIME_ASC)
    return [run for run in runs if has_not_begun(run)]


def _runs(
    client: SyncPrefectClient,
    known: KnownSchedule,
    states: Sequence[StateType],
    sort: FlowRunSort,
    limit: int | None = None,
) -> list[FlowRun]:
    """The runs that a schedule started: its deployment may have any number of others."""
    wanted = {
        "deployment_id": {"any_": [known.deployment.id]},
        "created_by": {"id_": [known.schedule.id]},
        "state": {"type": {"any_": list(states)}},
    }
    return client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(wanted), sort=sort, limit=limit)


def _title(schedule: DeploymentSchedule, deployment: DeploymentResponse) -> str:
    """What a schedule runs: a model on a suite, or a deployment."""
    form = (deployment.parameter_openapi_schema or {}).get("properties", {})
    usual = {name: field["default"] for name, field in form.items() if "default" in field}
    parameters = {**usual, **deployment.parameters, **schedule.parameters}
    return _subject(parameters) if {"model", "suite"} <= set(parameters) else f"the deployment {deployment.name}"


def _subject(parameters: Mapping[str, Any]) -> str:
    model = str(parameters["model"]).removeprefix(REGISTERED)
    if (match := ADDRESS.fullmatch(model)) is not None:
        model = f"{match['stage']}/{match['fingerprint'][:CANDIDATE_DIGITS]}"
    return f"{model} on {parameters['suite']}"


def _when(times: SCHEDULE_TYPES) -> str:
    if isinstance(times, CronSchedule):
        return f"{times.cron} {times.timezone or 'UTC'}"
    if isinstance(times, IntervalSchedule):
        return f"every {times.interval}"
    return str(getattr(times, "rrule", times))


def _time(run: FlowRun) -> str:
    when = run.start_time or run.expected_start_time
    return f"{when.astimezone(UTC):%Y-%m-%d %H:%M} UTC" if when is not None else ""
