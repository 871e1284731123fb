"""`vectorclm store rm`: remove a model or an experiment from the store, MLflow and Prefect together.

Prefect and MLflow take seconds to import, so functions import them on demand.
"""

import json as json_format
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from cyclopts import Parameter
from rich.markup import escape

from flows.platform.config import read_platform
from flows.platform.ownership import ran_here, remembered
from flows.platform.prefect_server import ServerError
from flows.tracking.lookup import has_record, named_model
from vectorclm.command_line import Json, StoreOptions, print_table, table
from vectorclm.errors import StoreError, VectorCLMError
from vectorclm.store.artifact import Store
from vectorclm.store.commands import readable_size
from vectorclm.store.model_names import REGISTERED, UnknownModelError, existing_store
from vectorclm.store.removal import Removal, claimed, plan_removal, remove

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.filters import FlowRunFilter

    from flows.tracking.removal import Records

Answer = TypeVar("Answer")


def remove_from_store(
    name: Annotated[str, Parameter(help="An experiment, or a model as in other commands")],
    /,
    *,
    place: StoreOptions = StoreOptions(),
    yes: Annotated[bool, Parameter(help="Remove what is listed")] = False,
    json: Json = False,
) -> int:
    """List what goes with a model or an experiment, and what stays; with --yes, remove it and its records.

    What was built from an artifact goes with it; what other experiments use or build from stays.
    Nothing is removed where MLflow or Prefect does not answer.
    Exit code 1 if something stays that should go.
    """
    store = existing_store(place.store)
    removal = _plan(name, store)
    with claimed(store, removal) if yes else nullcontext(dict[str, str]()) as left:
        gone = set(removal.fingerprints) - {folder.fingerprint for folder in removal.folders if folder.key in left}
        experiment = removal.experiment if not left else None
        mlflow = _answer(partial(_mlflow, store, gone, experiment), required=yes)
        prefect = _answer(partial(_prefect_runs, place, experiment), required=yes)
        if yes:  # the records first, so that a second call still finds what they are of
            again = removal.experiment or removal.what
            with _explained(f"a part was removed: fix this and run `vectorclm store rm {again} --yes` again"):
                _remove_records(store, mlflow)
                _prefect_runs(place, experiment, delete=True)
                for _ in remove(store, removal, left):
                    pass
    found = {**removal.as_json(), "removed": yes, "left": left, **_as_json(mlflow, prefect)}
    if json:
        print(json_format.dumps(found))
    else:
        _show(found, removal)
    return 1 if yes and (left or found["unfinished"]) else 0


def _plan(name: str, store: Store) -> Removal:
    if name.startswith(REGISTERED):
        return plan_removal(named_model(name, store), store)
    try:
        return plan_removal(name, store)
    except UnknownModelError:
        return plan_removal(named_model(name, store), store)


@contextmanager
def _explained(advice: str) -> Iterator[None]:
    """Add what was removed and what to do to the errors of the block."""
    try:
        yield
    except VectorCLMError as error:
        raise StoreError(f"{error}; {advice}") from error


def _answer(ask: Callable[[], Answer], *, required: bool) -> Answer | str:
    """The answer of MLflow or Prefect; a text where there is none. Raises StoreError where it is required."""
    try:
        with _explained("nothing was removed") if required else nullcontext():
            return ask()
    except VectorCLMError as error:
        if required:
            raise
        return str(error)


def _mlflow(store: Store, gone: Collection[str], experiment: str | None) -> "Records | None":
    """MLflow's records of the artifacts that go; None without MLflow. Raises RegistryError where it does not answer."""
    if not has_record(store) or not gone:
        return None
    from flows.tracking.client import tracking_uri
    from flows.tracking.registry import Registry, check_server
    from flows.tracking.removal import find_records

    check_server(tracking_uri(store))
    return find_records(Registry(store), gone, experiment)


def _remove_records(store: Store, records: "Records | str | None") -> None:
    if records is not None and not isinstance(records, str):
        from flows.tracking.registry import Registry
        from flows.tracking.removal import remove_records

        remove_records(Registry(store), records)


def _prefect_runs(place: StoreOptions, experiment: str | None, *, delete: bool = False) -> tuple[int, int]:
    """The numbers of Prefect's ended runs of an experiment, which are deleted on demand, and of its unfinished runs.

    Raises ServerError where the platform of the store does not run, or does not answer.
    """
    if experiment is None:
        return 0, 0
    with _prefect(place) as client:
        return _runs(client, experiment, delete=delete), 0 if client is None else _unfinished(client, experiment)


@contextmanager
def _prefect(place: StoreOptions) -> Iterator["SyncPrefectClient | None"]:
    """A client of the platform's server; None where no platform ever ran with the store.

    Raises ServerError where it does not run, and in place of the client's errors.
    """
    config = remembered(read_platform(place.env_file, vectorclm_store=place.store))
    server, _ = config.servers()
    if not server.holds_its_port():
        if ran_here(config):
            raise ServerError(
                f"the platform of {config.home} does not run, so Prefect's runs stay: start it with `vectorclm up`"
            )
        yield None
        return
    from httpx import HTTPError
    from prefect.client.orchestration import SyncPrefectClient

    try:
        with SyncPrefectClient(f"{config.prefect_url}/api", auth_string=config.prefect_password) as client:
            yield client
    except HTTPError as error:
        first = str(error).partition("\n")[0] or type(error).__name__
        raise ServerError(f"Prefect at {config.prefect_url} does not answer: {first}") from error


def _runs(client: "SyncPrefectClient | None", experiment: str | None, *, delete: bool) -> int:
    """The number of Prefect's ended runs of an experiment, which are deleted on demand; 0 without a platform."""
    if client is None or experiment is None:
        return 0
    from prefect.client.schemas.objects import TERMINAL_STATES
    from prefect.exceptions import ObjectNotFound

    wanted, count = _filter(experiment, any_=list(TERMINAL_STATES)), 0
    while runs := client.read_flow_runs(flow_run_filter=wanted, limit=200, offset=0 if delete else count):
        for run in runs if delete else ():
            with suppress(ObjectNotFound):  # another process deleted it
                client.delete_flow_run(run.id)
        count += len(runs)
    return count


def _unfinished(client: "SyncPrefectClient", experiment: str) -> int:
    from prefect.client.schemas.objects import TERMINAL_STATES

    return len(client.read_flow_runs(flow_run_filter=_filter(experiment, not_any_=list(TERMINAL_STATES)), limit=200))


def _filter(experiment: str, **states: Any) -> "FlowRunFilter":
    """Prefect's filter for the runs of an experiment in these states."""
    from prefect.client.schemas.filters import FlowRunFilter

    from flows.execution.labels import TAGGED

    return FlowRunFilter.model_validate({"tags": {"all_": [f"{TAGGED}{experiment}"]}, "state": {"type": states}})


def _as_json(mlflow: "Records | str | None", prefect: tuple[int, int] | str) -> dict[str, Any]:
    ended, unfinished = (prefect, 0) if isinstance(prefect, str) else prefect
    if mlflow is None or isinstance(mlflow, str):
        none = {"versions": [], "models": 0, "runs": 0}
        return {"mlflow": none if mlflow is None else mlflow, "prefect_runs": ended, "unfinished": unfinished}
    unfinished += len(mlflow.unfinished)
    return {"mlflow": mlflow.as_json(), "prefect_runs": ended, "unfinished": unfinished}


def _show(found: dict[str, Any], removal: Removal) -> None:
    shown = table("artifact", "size >", "used by", "")
    for row in found["removes"]:
        state = found["left"].get(row["key"], "removed" if found["removed"] else "goes")
        shown.add_row(escape(row["key"]), readable_size(row["bytes"]), escape(", ".join(row["used_by"])), state)
    for row in found["keeps"]:
        state = f"stays: {row['why']}"
        shown.add_row(escape(row["key"]), readable_size(row["bytes"]), escape(", ".join(row["used_by"])), state)
    print_table(shown)
    print(f"{removal.what}: {len(removal.folders)} artifacts and checkpoints, {readable_size(found['bytes'])}")
    mlflow, prefect = found["mlflow"], found["prefect_runs"]
    if isinstance(mlflow, dict):
        versions = f", versions {', '.join(mlflow['versions'])}" if mlflow["versions"] else ""
        mlflow = f"{mlflow['runs']} runs, {mlflow['models']} models{versions}"
    print(f"MLflow: {mlflow}")
    print(f"Prefect: {prefect if isinstance(prefect, str) else f'{prefect} runs'}")
    if found["unfinished"]:
        print(f"{found['unfinished']} unfinished runs stay: end them, then delete them in MLflow and Prefect")
    if not found["removed"]:
        print("--yes removes them", file=sys.stderr)
