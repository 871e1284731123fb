"""The deployments of the file on a real server: created, updated where they differ, and their schedules left alone."""

from datetime import timedelta
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolCreate
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule

from flows.deployments import curriculum_run, stage_run
from flows.execution.placement import deployment_of
from flows.platform import deployment_file
from flows.platform.deployment_file import DeploymentError, all_deployments, definition, entries, fields_of, put
from vectorclm.stages import TABLE


@pytest.fixture(autouse=True)
def pools(prefect_client: SyncPrefectClient) -> None:
    """The pools of the file, and no deployment of another test."""
    for pool in ("cpu", "gpu"):
        prefect_client.create_work_pool(WorkPoolCreate(name=pool, type="process"), overwrite=True)
    for found in prefect_client.read_deployments():
        prefect_client.delete_deployment(found.id)


def deployed(client: SyncPrefectClient, **changes: Any) -> DeploymentResponse:
    """The deployment `evaluate` after its entry was put on the server."""
    (entry,) = (entry for entry in entries() if entry["name"] == "evaluate")
    flow_id, fields = fields_of(client, entry)
    found = [found for found in client.read_deployments() if (found.flow_id, found.name) == (flow_id, "evaluate")]
    put(client, flow_id, "evaluate", {**fields, **changes}, found[0] if found else None, entry["schedules"])
    return client.read_deployment_by_name("evaluate/evaluate")


def test_the_schedules_that_a_person_set_added_or_removed_stay(prefect_client: SyncPrefectClient) -> None:
    made = deployed(prefect_client)
    kept = {schedule.slug: schedule for schedule in made.schedules}
    assert {slug: schedule.active for slug, schedule in kept.items()} == {"nightly-chat": False, "weekly-base": False}
    own = IntervalSchedule(interval=timedelta(hours=1))
    prefect_client.create_deployment_schedules(made.id, [(own, True)])  # as the page does: without a name
    late = CronSchedule(cron="0 4 * * *", timezone="Europe/Paris")
    prefect_client.update_deployment_schedule(made.id, kept["nightly-chat"].id, active=True, schedule=late)
    prefect_client.delete_deployment_schedule(made.id, kept["weekly-base"].id)

    for changes in ({}, {"description": "of another version"}, {}):
        again = deployed(prefect_client, **changes)
        assert again.id == made.id
        found = {schedule.slug: (schedule.schedule, schedule.active) for schedule in again.schedules}
        assert found[None][0].interval == own.interval and found[None][1]
        assert found["nightly-chat"] == (late, True) and len(found) == 2


def test_what_another_command_created_meanwhile_is_updated_and_keeps_its_schedules(
    prefect_client: SyncPrefectClient,
) -> None:
    made = deployed(prefect_client)
    hourly = IntervalSchedule(interval=timedelta(hours=1))
    prefect_client.create_deployment_schedules(made.id, [(hourly, True)])
    (entry,) = (entry for entry in entries() if entry["name"] == "evaluate")
    flow_id, fields = fields_of(prefect_client, entry)
    changed = {**fields, "description": "of the slower command"}
    put(prefect_client, flow_id, "evaluate", changed, None, entry["schedules"])  # it saw no deployment when it began
    again = prefect_client.read_deployment_by_name("evaluate/evaluate")
    assert (again.id, again.description) == (made.id, "of the slower command")
    assert {schedule.slug for schedule in again.schedules} == {None, "nightly-chat", "weekly-base"}


@pytest.mark.parametrize("page", [1, 2, 3, 4])
def test_every_deployment_is_read_whatever_the_size_of_a_page(
    prefect_client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch, page: int
) -> None:
    flow_id = prefect_client.create_flow_from_name("curriculum")
    made = [prefect_client.create_deployment(flow_id, f"number-{number}") for number in range(3)]
    monkeypatch.setattr(deployment_file, "PAGE", page)
    found = [deployment.id for deployment in all_deployments(prefect_client)]
    assert sorted(found) == sorted(made)


def test_what_differs_is_updated_and_what_does_not_is_left_alone(prefect_client: SyncPrefectClient) -> None:
    made = deployed(prefect_client)
    assert made.entrypoint == "flows.evaluations.evaluate_run" and made.work_pool_name == "gpu"
    assert deployed(prefect_client).updated == made.updated
    changed = DeploymentUpdate(entrypoint="gone.module", work_pool_name="cpu", enforce_parameter_schema=False)
    prefect_client.update_deployment(made.id, changed)
    mended = deployed(prefect_client)
    fields = ("entrypoint", "work_pool_name", "work_queue_name", "enforce_parameter_schema", "parameter_openapi_schema")
    assert [getattr(mended, field) for field in fields] == [getattr(made, field) for field in fields]


@pytest.mark.parametrize("name", ["evaluate", "finetune"])
def test_a_form_has_titles_its_values_and_no_optional_field(prefect_client: SyncPrefectClient, name: str) -> None:
    """A run takes the values of the deployment for what its request leaves out."""
    (entry,) = (entry for entry in entries() if entry["name"] == name)
    flow_id, fields = fields_of(prefect_client, {**entry, "work_pool": {"name": "gpu"}})
    put(prefect_client, flow_id, f"{name} of a form", fields, None)
    flow = {"evaluate": "evaluate", "finetune": "stage"}[name]
    made = prefect_client.read_deployment_by_name(f"{flow}/{name} of a form")
    shapes = (made.parameter_openapi_schema or {})["properties"]
    assert {*made.parameters} == {*shapes} == {"stage" if name == "finetune" else "model", *fields["parameters"]}
    required = (made.parameter_openapi_schema or {})["required"]
    assert {key for key, shape in shapes.items() if "default" in shape} == {*required}  # Prefect calls others optional
    assert all(shape["title"][0].isupper() and shape["description"] for shape in shapes.values())
    assert made.description and "Args" not in made.description
    run = prefect_client.create_flow_run_from_deployment(made.id, parameters={"runtime": {"threads": 1}})
    assert run.parameters == {**made.parameters, "runtime": {"threads": 1}}


def test_a_deployment_that_prefect_rejects_is_named(prefect_client: SyncPrefectClient) -> None:
    with pytest.raises(DeploymentError, match=r"Prefect rejected the deployment evaluate of flows\.evaluations"):
        deployed(prefect_client, work_pool_name="no-such-pool")


def test_every_stage_has_its_deployment_in_the_pool_of_its_kind() -> None:
    assert definition("curriculum")["entrypoint"] == f"{curriculum_run.fn.__module__}.{curriculum_run.fn.__name__}"
    entrypoint = f"{stage_run.fn.__module__}.{stage_run.fn.__name__}"
    found = [entry for entry in entries() if entry["entrypoint"] == entrypoint]
    assert [
        (entry["name"], entry["parameters"], entry["work_pool"]["name"], entry["enforce_parameter_schema"])
        for entry in found
    ] == [(deployment_of(row.name), {"stage": row.name}, "gpu" if row.own_process else "cpu", True) for row in TABLE]
    names = [entry["name"] for entry in entries()]
    assert len({*names}) == len(names) == len(TABLE) + 1  # one address in the UI and in `prefect deployment run`
