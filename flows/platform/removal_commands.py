"""`vectorclm store rm`: remove a model or an experiment from the store, MLflow and Prefect together.

Prefect and MLflow take seconds to import, so functions import them on demand.
"""

import json as json_format
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.markup import escape

from flows.platform.config import read_platform
from flows.platform.ownership import remembered
from flows.tracking.lookup import has_record, named_model
from vectorclm.command_line import Json, StoreOptions, print_table, table
from vectorclm.store.artifact import Store
from vectorclm.store.commands import readable_size
from vectorclm.store.model_names import REGISTERED, UnknownModelError, existing_store
from vectorclm.store.removal import Removal, plan_removal, remove

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient


def remove_from_store(
    name: Annotated[str, Parameter(help="An experiment, or a model as in other commands")],
    /,
    *,
    place: StoreOptions = StoreOptions(),
    yes: Annotated[bool, Parameter(help="Remove what is listed")] = False,
    json: Json = False,
) -> int:
    """List what goes with a model or an experiment, and what stays; with --yes, remove it and its records.

    With an artifact goes what was built from it; of an experiment stays what other experiments use.
    Exit code 1 where something stays that should go.
    """
    store = existing_store(place.store)
    removal = _plan(name, store)
    with _prefect(place) as client:
        left = [(folder, why) for folder, why in remove(store, removal) if why] if yes else []
        gone = set(removal.fingerprints) - {folder.fingerprint for folder, _ in left}
        experiment = removal.experiment if not left else None
        mlflow = _mlflow(store, gone, experiment, delete=yes)
        prefect = _runs(client, experiment, delete=yes)
    found = {**removal.as_json(), "mlflow": mlflow, "prefect_runs": prefect, "removed": yes}
    found["left"] = {folder.key: why for folder, why in left}
    if json:
        print(json_format.dumps(found))
    else:
        _show(found, removal)
    return 1 if left else 0


def _plan(name: str, store: Store) -> Removal:
    if name.startswith(REGISTERED):
        return plan_removal(named_model(name, store), store)
    try:
        return plan_removal(name, store)
    except UnknownModelError:
        return plan_removal(named_model(name, store), store)


def _mlflow(store: Store, gone: Collection[str], experiment: str | None, *, delete: bool) -> dict[str, Any] | str:
    """MLflow's records of the artifacts that go, which are deleted on demand; a text where MLflow does not answer."""
    if not has_record(store) or not gone:
        return {"versions": [], "models": 0, "runs": 0}
    from flows.tracking.registry import Registry, RegistryError
    from flows.tracking.removal import find_records, remove_records

    try:
        registry = Registry(store)
        records = find_records(registry, gone, experiment)
        if delete:
            remove_records(registry, records)
    except RegistryError as error:
        return f"{error}; its records stay"
    return records.as_json()


@contextmanager
def _prefect(place: StoreOptions) -> Iterator["SyncPrefectClient | None"]:
    """A client of the platform's server while it runs; None without one."""
    config = remembered(read_platform(place.env_file, vectorclm_store=place.store))
    server, _ = config.servers()
    if not server.holds_its_port():
        yield None
        return
    from prefect.client.orchestration import SyncPrefectClient

    with SyncPrefectClient(f"{config.prefect_url}/api", auth_string=config.prefect_password) as client:
        yield client


def _runs(client: "SyncPrefectClient | None", experiment: str | None, *, delete: bool) -> int | str:
    """The number of Prefect's ended runs of an experiment, which are deleted on demand; a text without a server."""
    if experiment is None:
        return 0
    if client is None:
        return "the platform does not run; its runs stay"
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.client.schemas.objects import TERMINAL_STATES

    from flows.execution.labels import TAGGED

    wanted = {"tags": {"all_": [f"{TAGGED}{experiment}"]}, "state": {"type": {"any_": list(TERMINAL_STATES)}}}
    count = 0
    while runs := client.read_flow_runs(
        flow_run_filter=FlowRunFilter.model_validate(wanted), limit=200, offset=0 if delete else count
    ):
        for run in runs if delete else ():
            client.delete_flow_run(run.id)
        count += len(runs)
    return count


def _show(found: dict[str, Any], removal: Removal) -> None:
    shown = table("artifact", "size >", "used by", "")
    for row in found["removes"]:
        state = found["left"].get(row["key"], "removed" if found["removed"] else "goes")
        shown.add_row(escape(row["key"]), readable_size(row["bytes"]), escape(", ".join(row["used_by"])), state)
    for row in found["keeps"]:
        shown.add_row(escape(row["key"]), readable_size(row["bytes"]), escape(", ".join(row["used_by"])), "stays")
    print_table(shown)
    print(f"{removal.what}: {len(removal.folders)} artifacts and checkpoints, {readable_size(found['bytes'])}")
    mlflow, prefect = found["mlflow"], found["prefect_runs"]
    if isinstance(mlflow, dict):
        versions = f", versions {', '.join(mlflow['versions'])}" if mlflow["versions"] else ""
        mlflow = f"{mlflow['runs']} runs, {mlflow['models']} models{versions}"
    print(f"MLflow: {mlflow}")
    print(f"Prefect: {prefect if isinstance(prefect, str) else f'{prefect} runs'}")
    if not found["removed"]:
        print("--yes removes them", file=sys.stderr)
