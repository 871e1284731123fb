"""The deployments of the experiments: for each a curriculum with its own form, and its trainings and evaluations alone.

`python -m flows.platform.experiment_forms` fills the forms again, as after a change in the folder of experiments.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import TERMINAL_STATES, StateType
from prefect.client.schemas.responses import DeploymentResponse

from flows.experiments import clashes, known_files, load_known, unreadable_folder
from flows.form import form, parameters
from flows.paths import local_folder
from flows.platform.deployment_file import all_deployments, definition, fields_of, put
from flows.reports.plan import plan_of
from vectorclm.config import ExperimentConfig
from vectorclm.errors import StoreError, VectorCLMError
from vectorclm.stages import BY_NAME, TABLE
from vectorclm.store.artifact import Store, default_store

ALONE = tuple(stage.name for stage in TABLE if stage.own_process)  # stages with a form of their own
BEFORE = ("curriculum", "curriculum")  # the one deployment of older versions
FLOWS = ("curriculum", "stage")
UNENDED = [state for state in StateType if state not in TERMINAL_STATES]

Report = Callable[[str], None]


def fill_forms(client: SyncPrefectClient, report: Report) -> list[str]:
    """Create, fill and remove the deployments of the experiments; returns a line for each file that is not offered.

    What cannot be read for now, such as a file that is being edited, keeps its deployments as they are.
    """
    problems = list(clashes())
    common = {flow: _common(client, flow) for flow in FLOWS}
    flows = {flow_id: flow for flow, (flow_id, _) in common.items()}
    there = {(flows[found.flow_id], found.name): found for found in all_deployments(client) if found.flow_id in flows}
    kept = set[tuple[str, str]]()
    for name in known_files():
        try:
            experiment, path = load_known(name)
            every = list(_wanted(experiment, path, {flow: fields for flow, (_, fields) in common.items()}))
        except (VectorCLMError, OSError) as error:
            problems.append(str(error))
            kept |= {("curriculum", name), *(("stage", f"{name}-{stage}") for stage in ALONE)}
            continue
        for flow, deployment, fields in every:
            kept.add((flow, deployment))
            if put(client, common[flow][0], deployment, fields, there.get((flow, deployment))):
                report(f"deployment {flow}/{deployment} created")
    if (unreadable := unreadable_folder()) is not None:  # asked after the files were listed
        return [*problems, unreadable]
    for key, found in there.items():
        if key not in kept and (_is_filled(found) or key == BEFORE):
            problems += _remove(client, "/".join(key), found, report)
    return problems


def _common(client: SyncPrefectClient, flow: str) -> tuple[UUID, dict[str, Any]]:
    """The flow on the server, and what all its deployments have in common."""
    return fields_of(client, {"work_pool": {"name": "gpu"}, **definition(flow)})


def _remove(client: SyncPrefectClient, name: str, found: DeploymentResponse, report: Report) -> list[str]:
    """Remove the deployment of an experiment that is gone; returns a line where a schedule or a run still needs it.

    With a deployment, Prefect deletes its schedules and its waiting runs, also those that a person set.
    """
    if found.schedules:
        return [
            f"the deployment {name} has a schedule, but no experiment has its name: set the schedule on another "
            "deployment, and delete this one"
        ]
    wanted = {"deployment_id": {"any_": [found.id]}, "state": {"type": {"any_": UNENDED}}}
    if runs := client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(wanted), limit=1):
        return [
            f"the deployment {name} has the run {runs[0].name}, which has not ended, but no experiment has its name: "
            "wait for the run or cancel it, then run `vectorclm doctor`"
        ]
    client.delete_deployment(found.id)
    report(f"deployment {name} removed: no experiment has its name")
    return []


def describe(experiment: ExperimentConfig, path: Path) -> str:
    """The description of the deployment of an experiment: what it is, and what its values would reuse and build."""
    store = Store(default_store())
    try:
        plan = plan_of(experiment, local_folder(store) / "locks" / path.name, None, store)
    except (StoreError, OSError) as error:  # a form needs no store
        plan = f"It is not known what would be reused: the store does not answer ({error})."
    return f"{_about(path)}\n\nA run with the values of the form does this; for other values, tick *Dry run*.\n\n{plan}"


def refresh_description(name: str) -> None:
    """Write the description of an experiment's deployment anew, after a run has built what the next one reuses."""
    with suppress(Exception), get_client(sync_client=True) as client:  # the run is done whatever the server says
        deployment = client.read_deployment_by_name(f"curriculum/{name}")
        client.update_deployment(deployment.id, DeploymentUpdate(description=describe(*load_known(name))))


def _about(path: Path) -> str:
    """The comment in the first line of an experiment's file."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else f"The experiment {path.stem}."


def _wanted(
    experiment: ExperimentConfig, path: Path, common: Mapping[str, dict[str, Any]]
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The flow, the name and the fields of each deployment of an experiment."""
    shape = form(common["curriculum"]["parameter_openapi_schema"], experiment)
    usual = parameters(shape, experiment)
    about = describe(experiment, path)
    own = {"description": about, "parameters": usual, "parameter_openapi_schema": shape}
    yield "curriculum", experiment.name, {**common["curriculum"], **own}
    for stage in (name for name in ALONE if BY_NAME[name].is_in(experiment)):
        shape = form(common["stage"]["parameter_openapi_schema"], experiment, stage)
        usual = parameters(shape, experiment, stage)
        about = (
            f"The stage {stage} of {experiment.name} alone: {BY_NAME[stage].about}. The stages before it are reused."
        )
        own = {"description": about, "parameters": usual, "parameter_openapi_schema": shape}
        yield "stage", f"{experiment.name}-{stage}", {**common["stage"], **own}


def _is_filled(deployment: DeploymentResponse) -> bool:
    """Whether this module filled the form: it offers one experiment alone."""
    properties: Mapping[str, Any] = (deployment.parameter_openapi_schema or {}).get("properties", {})
    return "enum" in properties.get("experiment", {})


def main() -> int:
    """Fill the forms of the platform that the environment names; returns 1 if a file is not offered."""
    with get_client(sync_client=True) as client:
        problems = fill_forms(client, lambda line: print(line, flush=True))  # noqa: T201
    sys.stderr.writelines(f"{problem}\n" for problem in problems)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
