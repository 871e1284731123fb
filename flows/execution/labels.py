"""Name and tag a flow run of the platform, and record its process, so that its end is noticed from outside."""

import json
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any
from uuid import UUID

import psutil
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run

from flows.run_names import evaluation_name, is_generated, run_name, run_tags
from vectorclm.runtime.processes import has_ended, machine, process_identity

PROCESS = "vectorclm.process"  # the label with the identity of a run's process, as JSON
TAGGED = ("experiment: ", "suite: ")  # the tag of a run that was named already
EVALUATES = {"model", "suite"}  # the parameters of an evaluation, among others


def name_of_this_run() -> str:
    """The name of the present flow run: as a person typed it, else one that says what it runs."""
    known = str(flow_run.name)
    if flow_run.id is None or not is_generated(known):
        return known
    with get_client(sync_client=True) as client:
        return label(client, client.read_flow_run(UUID(flow_run.id)))


def label(client: SyncPrefectClient, run: FlowRun) -> str:
    """Give a run of a deployment its name, unless a person typed one, and its tags; returns the name."""
    usual: Mapping[str, Any] = {}
    if run.deployment_id is not None:
        with suppress(ObjectNotFound):
            usual = client.read_deployment(run.deployment_id).parameters
    due = run.expected_start_time if run.auto_scheduled else run.created
    when, name = (due or datetime.now(UTC)).astimezone(), run.name
    if is_generated(name):
        made = evaluation_name if run.parameters.keys() >= EVALUATES else partial(run_name, usual)
        name = made(run.parameters, when, run.id)
    tags = run_tags(usual, run.parameters, run.tags, scheduled=run.auto_scheduled)
    client.update_flow_run(run.id, name=name, tags=tags)
    return name


def record_process() -> None:
    """Record the identity of the process of the present flow run as a label of the run."""
    if flow_run.id is None:
        return
    with get_client(sync_client=True) as client:
        pid = client.read_flow_run(UUID(flow_run.id)).infrastructure_pid
        known = {**process_identity(psutil.Process()), "infrastructure_pid": pid, "machine": machine()}
        client.update_flow_run_labels(UUID(flow_run.id), {PROCESS: json.dumps(known)})


def machine_of(run: FlowRun) -> str:
    """The name of the machine on which a run's process was recorded; "an unknown machine" where it was not."""
    with suppress(ValueError, TypeError, KeyError):
        return str(json.loads(str(run.labels.get(PROCESS, "")))["machine"]).partition(" ")[0]
    return "an unknown machine"


def is_dead(run: FlowRun) -> bool:
    """Whether the recorded process of a run was on this machine and has ended; False where that is not known."""
    with suppress(ValueError, TypeError, KeyError):
        known = json.loads(str(run.labels.get(PROCESS, "")))
        # Otherwise a newer process is starting.
        return bool(known["infrastructure_pid"] == run.infrastructure_pid and has_ended(known))
    return False
