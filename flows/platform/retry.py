"""`vectorclm retry`: run a curriculum again, with other settings, or with finished stages rebuilt and compared."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound

from flows.form import Changes, chosen
from flows.net import PROVISION, without_password
from flows.platform.password import SETTING
from vectorclm.config import assignments
from vectorclm.errors import ConfigError, VectorCLMError
from vectorclm.settings import validate

CURRICULUM = "curriculum/curriculum"


def retry(run: str, again_from: str | None, changes: Sequence[str]) -> str:
    """Start the curriculum of `run` again (an id, or a name for its newest run); returns the id of the new run.

    Raises ConfigError where the run is missing, is not a curriculum of the platform, or a setting is refused, and
    VectorCLMError where the platform does not run.
    """
    with get_client(sync_client=True) as client, _explained(client):
        before = _find(client, run)
        parameters: dict[str, Any] = dict(before.parameters)
        if changes:
            form = dict(parameters.get("changes") or {})
            form["settings"] = {**(form.get("settings") or {}), **assignments(changes)}
            chosen(parameters["experiment"], validate(Changes, form, "changes"))
            parameters["changes"] = form
        if again_from is not None:
            parameters["again_from"] = again_from
        deployment = client.read_deployment_by_name(CURRICULUM)
        return str(client.create_flow_run_from_deployment(deployment.id, parameters=parameters).id)


@contextmanager
def _explained(client: SyncPrefectClient) -> Iterator[None]:
    """Translate errors of the platform into messages that say what to do."""
    try:
        yield
    except httpx.TransportError as error:
        url = without_password(str(client.api_url))
        raise VectorCLMError(f"no platform answers at {url}: {PROVISION}") from error
    except ObjectNotFound as error:
        raise ConfigError(f"Prefect has no deployment {CURRICULUM}: {PROVISION}") from error
    except httpx.HTTPStatusError as error:
        if error.response.status_code == httpx.codes.UNAUTHORIZED:
            raise ConfigError(
                f"Prefect requires a password: give the --store or --env-file of `up`, or set {SETTING}=user:password"
            ) from error
        raise ConfigError(f"Prefect refuses the run: {_detail(error.response)}") from error


def _detail(response: httpx.Response) -> str:
    try:
        return str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return f"{response.status_code} {response.reason_phrase}"


def _find(client: SyncPrefectClient, run: str) -> FlowRun:
    try:
        wanted = FlowRunFilter.model_validate({"id": {"any_": [UUID(run)]}})
    except ValueError:
        wanted = FlowRunFilter.model_validate({"name": {"any_": [run]}})
    found = client.read_flow_runs(flow_run_filter=wanted, sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=1)
    if not found:
        raise ConfigError(f"no run {run!r}: give the id or the name that Prefect shows")
    if "experiment" not in found[0].parameters or "stage" in found[0].parameters:
        raise ConfigError(f"run {run!r} is not a curriculum: start its deployment again from the UI")
    if not isinstance(found[0].parameters["experiment"], str):
        raise ConfigError(
            f"run {run!r} was started by `vectorclm run`, not by the platform: start it again with `vectorclm run`"
        )
    return found[0]
