"""Start curricula on the platform from the command line: `vectorclm run --on-platform`, and `vectorclm retry`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound

from flows.experiments import FOLDER, known_files
from flows.form import Changes, chosen, completed
from flows.net import PROVISION, without_password
from flows.platform.ownership import running_elsewhere
from flows.platform.password import SETTING
from flows.run_names import command_line_tags
from vectorclm.config import assignments
from vectorclm.errors import ConfigError, VectorCLMError
from vectorclm.settings import validate


class Again(NamedTuple):
    """A run that was started again."""

    before: str  # its name, id, state and time
    run_id: str  # of the new run


def retry(run: str, again_from: str | None, changes: Sequence[str]) -> Again:
    """Start the curriculum of `run` (an id, or a name for its newest run) again, as a new run.

    A change without a value, `KEY=`, leaves out a setting that `run` had. Raises ConfigError where the run is missing,
    is not a curriculum of the platform, or a setting is refused, and VectorCLMError where the platform does not run.
    """
    with get_client(sync_client=True) as client, translate_errors(client):
        before = _find(client, run)
        parameters: dict[str, Any] = {key: value for key, value in before.parameters.items() if key != "dry_run"}
        form = dict(parameters.get("changes") or {})
        kept = {
            **(form.pop("settings", None) or {}),
            **(parameters.get("settings") or {}),
        }  # older forms had them inside
        if changes:
            parameters |= {"changes": form, "settings": _changed(kept, assignments(changes))}
        if again_from is not None:
            parameters["again_from"] = again_from
        try:
            run_id = _create(client, str(parameters["experiment"]), parameters)
        except ConfigError as error:
            if not kept:
                raise
            raise ConfigError(f"{error}; `--set KEY=` leaves out a setting that the run had") from error
    state, ended = before.state_name or "", before.end_time or before.expected_start_time
    when = f"{ended.astimezone():%Y-%m-%d %H:%M}" if ended is not None else "not ended"
    return Again(f"{before.name} ({before.id}, {state}, {when})", run_id)


def _changed(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with these changes; an empty text leaves a setting out. Raises ConfigError where it is not there."""
    for key, value in changes.items():
        if value == "" and key not in settings:
            there = f"it has {', '.join(settings)}" if settings else "it has none"
            raise ConfigError(f"{key}=: the run has no such setting that could be left out; {there}")
    return {key: value for key, value in {**settings, **changes}.items() if value != ""}


def start(experiment: str, parameters: Mapping[str, Any]) -> str:
    """Start a curriculum on the platform as its form does; returns the id of the run.

    Raises ConfigError where the platform has no such experiment or refuses a setting, and VectorCLMError where the
    platform does not run.
    """
    with get_client(sync_client=True) as client, translate_errors(client):
        return _create(client, experiment, parameters)


def _create(client: SyncPrefectClient, experiment: str, parameters: Mapping[str, Any]) -> str:
    try:
        deployment = client.read_deployment_by_name(f"curriculum/{experiment}")
    except ObjectNotFound as error:
        raise ConfigError(
            f"Prefect has no deployment curriculum/{experiment}: {PROVISION}; its setting {FOLDER} names the folder of "
            "experiments of your own"
        ) from error
    wanted = completed(deployment.parameters, {**parameters, "experiment": experiment})
    changes = validate(Changes, wanted["changes"], "changes")
    if experiment in known_files():  # else only the platform has the file, and the run itself checks the settings
        chosen(experiment, changes, wanted.get("settings"))
    return str(client.create_flow_run_from_deployment(deployment.id, parameters=wanted, tags=command_line_tags()).id)


@contextmanager
def translate_errors(client: SyncPrefectClient, refused: str = "the run") -> Iterator[None]:
    """Translate errors of the platform into messages that say what to do; `refused` is what Prefect may refuse."""
    try:
        yield
    except httpx.TransportError as error:
        url = without_password(str(client.api_url))
        todo = "; ".join(running_elsewhere(None)) or PROVISION
        raise VectorCLMError(f"no platform answers at {url}: {todo}") from error
    except httpx.HTTPStatusError as error:
        if error.response.status_code == httpx.codes.UNAUTHORIZED:
            raise ConfigError(
                f"Prefect requires a password: give the --store or --env-file of `up`, or set {SETTING}=user:password"
            ) from error
        raise ConfigError(f"Prefect refuses {refused}: {_detail(error.response)}") from error


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
