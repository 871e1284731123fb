"""The deployments of the experiments: for each a curriculum with its own form, and its trainings and evaluations alone.

`python -m flows.platform.experiment_forms` fills the forms again, as after a change in the folder of experiments.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.client.schemas.responses import DeploymentResponse

from flows.experiments import clashes, known_files, load_known
from flows.form import form, parameters
from flows.paths import local_folder
from flows.reports.plan import plan_of
from vectorclm.config import ExperimentConfig
from vectorclm.errors import StoreError, VectorCLMError
from vectorclm.stages import BY_NAME, TABLE
from vectorclm.store.artifact import Store, default_store

ALONE = tuple(stage.name for stage in TABLE if stage.own_process)  # stages with a form of their own
BEFORE = ("curriculum", "curriculum")  # the one deployment of older versions
TEMPLATES = {"curriculum": "curriculum/tiny", "stage": "stage/finetune"}  # deployments with the schema of their flow

Report = Callable[[str], None]


@dataclass(frozen=True)
class _Wanted:
    """A deployment as it should be."""

    flow: str
    name: str
    pool: str
    description: str
    parameters: dict[str, Any]
    schema: dict[str, Any]


def fill_forms(client: SyncPrefectClient, report: Report) -> list[str]:
    """Create, fill and remove the deployments of the experiments; returns a line for each file that is not offered."""
    problems = list(clashes())
    templates = {flow: client.read_deployment_by_name(name) for flow, name in TEMPLATES.items()}
    flows = {found.flow_id: flow for flow, found in templates.items()}
    there = {(flows[found.flow_id], found.name): found for found in client.read_deployments() if found.flow_id in flows}
    kept = set[tuple[str, str]]()
    for name in known_files():
        try:
            experiment, path = load_known(name)
            every = list(_wanted(experiment, path, templates))
        except VectorCLMError as error:
            problems.append(str(error))
            continue
        for wanted in every:
            key = wanted.flow, wanted.name
            kept.add(key)
            _put(client, wanted, templates[wanted.flow], there.get(key))
            if key not in there:
                report(f"deployment {'/'.join(key)} created")
    for key, found in there.items():
        if key not in kept and (_is_filled(found) or key == BEFORE):
            client.delete_deployment(found.id)
            report(f"deployment {'/'.join(key)} removed: no experiment has its name")
    return problems


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


def _wanted(experiment: ExperimentConfig, path: Path, templates: Mapping[str, DeploymentResponse]) -> Iterator[_Wanted]:
    schema = form(templates["curriculum"].parameter_openapi_schema or {}, experiment)
    about = describe(experiment, path)
    yield _Wanted("curriculum", experiment.name, "cpu", about, parameters(schema, experiment), schema)
    for stage in (name for name in ALONE if BY_NAME[name].is_in(experiment)):
        schema = form(templates["stage"].parameter_openapi_schema or {}, experiment, stage)
        about = (
            f"The stage {stage} of {experiment.name} alone: {BY_NAME[stage].about}. The stages before it are reused."
        )
        yield _Wanted(
            "stage", f"{experiment.name}-{stage}", "gpu", about, parameters(schema, experiment, stage), schema
        )


def _is_filled(deployment: DeploymentResponse) -> bool:
    """Whether this module filled the form: it offers one experiment alone."""
    properties: Mapping[str, Any] = (deployment.parameter_openapi_schema or {}).get("properties", {})
    return "enum" in properties.get("experiment", {})


def _put(
    client: SyncPrefectClient, wanted: _Wanted, template: DeploymentResponse, found: DeploymentResponse | None
) -> None:
    filled: dict[str, Any] = {
        "parameters": wanted.parameters,
        "parameter_openapi_schema": wanted.schema,
        "description": wanted.description,
        "tags": ["vectorclm"],
    }
    if found is not None and all(getattr(found, name) == value for name, value in filled.items()):
        return
    if found is not None:
        client.update_deployment(found.id, DeploymentUpdate(**filled))
        return
    client.create_deployment(
        template.flow_id,
        wanted.name,
        entrypoint=template.entrypoint,
        path=template.path,
        pull_steps=template.pull_steps,
        work_pool_name=wanted.pool,
        work_queue_name=template.work_queue_name if wanted.flow == "curriculum" else None,
        enforce_parameter_schema=True,
        **filled,
    )


def main() -> int:
    """Fill the forms of the platform that the environment names; returns 1 if a file is not offered."""
    with get_client(sync_client=True) as client:
        problems = fill_forms(client, lambda line: print(line, flush=True))  # noqa: T201
    sys.stderr.writelines(f"{problem}\n" for problem in problems)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
