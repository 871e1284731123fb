"""A schedule keeps its parameters when a page switches it, on a real server behind the middleware."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import DeploymentSchedule
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.exceptions import PrefectHTTPStatusError

SMALL = {"model": "models:/vectorclm-base@candidate", "suite": "small"}


@pytest.fixture
def deployment(prefect_client: SyncPrefectClient) -> Iterator[UUID]:
    flow_id = prefect_client.create_flow_from_name("updated")
    made = prefect_client.create_deployment(flow_id, "updated", parameters={"suite": "tiny"})
    prefect_client.create_deployment_schedules(
        made, [(IntervalSchedule(interval=timedelta(days=1)), False)], parameters=SMALL, slug="weekly"
    )
    yield made
    prefect_client.delete_deployment(made)


def schedule(client: SyncPrefectClient, deployment: UUID) -> DeploymentSchedule:
    (found,) = client.read_deployment(deployment).schedules
    return found


@pytest.mark.parametrize(
    ("update", "kept"),
    [
        ({"active": True}, SMALL),  # the switch of the page
        ({"active": True, "slug": "named anew"}, SMALL),
        ({"active": True, "parameters": {"suite": "base"}}, {"suite": "base"}),
        ({"active": True, "parameters": {}}, {}),  # a person removed them in the page
    ],
)
def test_an_update_changes_what_it_names(
    prefect_client: SyncPrefectClient, deployment: UUID, update: dict[str, Any], kept: dict[str, Any]
) -> None:
    place = {"id": deployment, "schedule": schedule(prefect_client, deployment).id}
    prefect_client.request("PATCH", "/deployments/{id}/schedules/{schedule}", path_params=place, json=update)
    found = schedule(prefect_client, deployment)
    assert (found.active, found.slug, found.parameters) == (True, update.get("slug", "weekly"), kept)


def test_a_wrong_update_gets_the_answer_of_the_server(prefect_client: SyncPrefectClient, deployment: UUID) -> None:
    path = "/deployments/{id}/schedules/{schedule}"
    place = {"id": deployment, "schedule": schedule(prefect_client, deployment).id}
    nowhere = {**place, "schedule": deployment}
    for where, update, status in ((nowhere, {"active": True}, 404), (place, [1], 422), (place, {"active": 3}, 422)):
        with pytest.raises((PrefectHTTPStatusError, Exception), match=str(status)):
            prefect_client.request("PATCH", path, path_params=where, json=update)
    assert schedule(prefect_client, deployment).parameters == SMALL
