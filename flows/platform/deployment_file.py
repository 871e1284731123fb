"""The deployments of `prefect.yaml`: what each consists of by the file and by its flow, created or updated on a server.

Prefect's own `deploy` creates each anew, which deletes the schedules that a person set in the UI, and imports all of
Prefect in a process of its own.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from uuid import UUID

import yaml
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate, DeploymentUpdate
from prefect.client.schemas.filters import DeploymentFilter, FlowFilter
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import PrefectHTTPStatusError
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema

from flows.execution.placement import deployment_of
from flows.form import defaults, described
from vectorclm.errors import VectorCLMError
from vectorclm.stages import TABLE

PAGE = 200
PREFECT_FILE = Path(__file__).parent / "prefect.yaml"


class DeploymentError(VectorCLMError):
    """Prefect rejected a deployment."""


def definition(name: str) -> dict[str, Any]:
    """What all deployments of a flow have in common: `curriculum` or `stage`."""
    found: dict[str, Any] = _content()["definitions"][name]
    return found


def entries() -> list[dict[str, Any]]:
    """The deployments of the file, and one for each stage: those of experiments are made from their files.

    The pool `gpu` runs the stages that run torch, `cpu` the rest.
    """
    content = _content()
    found: list[dict[str, Any]] = content["deployments"]
    for stage in TABLE:
        pool = {"name": "gpu" if stage.own_process else "cpu"}
        named = {"name": deployment_of(stage.name), "parameters": {"stage": stage.name}, "work_pool": pool}
        found.append({**content["definitions"]["stage"], **named})
    return found


def fields_of(client: SyncPrefectClient, entry: Mapping[str, Any]) -> tuple[UUID, dict[str, Any]]:
    """The flow of an entry on the server, and the fields of its deployment but for its name and schedules."""
    flow, schema = _flow(entry["entrypoint"])
    return client.create_flow_from_name(flow.name), {
        "version": flow.version,
        "parameters": {**defaults(schema), **entry.get("parameters", {})},
        "description": (flow.description or "").partition("\nArgs:")[0].strip(),
        "work_pool_name": entry["work_pool"]["name"],
        "work_queue_name": entry["work_pool"].get("work_queue_name", "default"),
        "tags": entry["tags"],
        "entrypoint": entry["entrypoint"],
        "path": None,
        "pull_steps": [],
        "parameter_openapi_schema": schema,
        "enforce_parameter_schema": entry["enforce_parameter_schema"],
    }


@cache
def _flow(entrypoint: str) -> tuple[Flow[..., Any], dict[str, Any]]:
    """The flow at an entrypoint and the schema of its parameters, which many deployments share."""
    flow: Flow[..., Any] = load_flow_from_entrypoint(entrypoint)
    return flow, described(parameter_schema(flow).model_dump(exclude_unset=True))


def all_deployments(client: SyncPrefectClient) -> list[DeploymentResponse]:
    """Every deployment of the server, which returns PAGE of them at once."""
    found: list[DeploymentResponse] = []
    while len(page := client.read_deployments(limit=PAGE, offset=len(found))) == PAGE:
        found += page
    return found + page


def put(
    client: SyncPrefectClient,
    flow_id: UUID,
    name: str,
    fields: dict[str, Any],
    found: DeploymentResponse | None,
    schedules: Sequence[Mapping[str, Any]] = (),
) -> bool:
    """Create a deployment with its schedules, or update what differs of the one that is there, but not its schedules.

    From then on the schedules are the user's. `found` is the deployment as it was read before. Returns whether it
    is new. Raises DeploymentError with Prefect's reason.
    """
    try:
        # Another command may have created it meanwhile, and to create it again would delete its schedules and runs.
        found = found or _read(client, flow_id, name)
        if found is None:
            made = [_schedule(schedule) for schedule in schedules]
            client.create_deployment(flow_id, name, schedules=made, **fields)
        elif any(getattr(found, field) != value for field, value in fields.items()):
            client.update_deployment(found.id, DeploymentUpdate(**fields))
    except PrefectHTTPStatusError as error:
        raise DeploymentError(
            f"Prefect rejected the deployment {name} of {fields['entrypoint']}: {error.response.text}"
        ) from error
    return found is None


def _read(client: SyncPrefectClient, flow_id: UUID, name: str) -> DeploymentResponse | None:
    of_flow = FlowFilter.model_validate({"id": {"any_": [flow_id]}})
    named = DeploymentFilter.model_validate({"name": {"any_": [name]}})
    return next(iter(client.read_deployments(flow_filter=of_flow, deployment_filter=named)), None)


def _schedule(wanted: Mapping[str, Any]) -> DeploymentScheduleCreate:
    when = CronSchedule(cron=wanted["cron"], timezone=wanted["timezone"])
    return DeploymentScheduleCreate(
        slug=wanted["slug"], schedule=when, active=wanted["active"], parameters=wanted["parameters"]
    )


def _content() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(PREFECT_FILE.read_text(encoding="utf-8"))
    return content
