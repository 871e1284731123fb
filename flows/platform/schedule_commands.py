"""`vectorclm schedule evaluate|list|pause|resume|remove`: the schedules of a platform from the command line.

Prefect and MLflow take seconds to import, so each command imports what it needs.
"""

import json as json_format
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from cyclopts import Parameter
from rich.markup import escape

from flows.form import SuiteName
from flows.platform.options import PlatformOptions
from flows.platform.ownership import remembered
from flows.platform.prefect_server import platform_server
from vectorclm.command_line import Json, new_app, print_table, table
from vectorclm.comparison.config import Limits
from vectorclm.store.artifact import Store

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

schedule_app = new_app("schedule", "Evaluate a model by a schedule of the platform; list, pause, remove schedules.")

Name = Annotated[str, Parameter(help="The name that `schedule list` shows, or the schedule's id")]


@Parameter(name="*")
@dataclass(frozen=True)
class When:
    """When a schedule starts a run, and what it is called."""

    cron: Annotated[
        str, Parameter(show_default=False, help='Minute, hour, day, month and weekday, such as "0 3 * * *"')
    ]
    timezone: Annotated[str, Parameter(help="The zone of these times, such as Europe/Berlin")] = "UTC"
    name: Annotated[str | None, Parameter(help="A name for the schedule [default: MODEL on SUITE]")] = None


class _Connection(NamedTuple):
    client: "SyncPrefectClient"
    page: str
    store: Store


@schedule_app.command(
    name="evaluate",
    help_epilogue='Example: vectorclm schedule evaluate vectorclm-chat@candidate --suite small --cron "0 3 * * *"',
)
def schedule_evaluation(
    model: Annotated[str, Parameter(help="NAME@ALIAS of the registry, or the address of a model in the store")],
    /,
    *,
    suite: Annotated[SuiteName, Parameter(help="What the model is scored on")],
    when: When,
    limits: Annotated[Limits, Parameter(name="*", group="Limits of the suite")] = Limits(),
    data: Annotated[Path | None, Parameter(help="Read benchmarks from this mirror on the worker")] = None,
    platform: PlatformOptions = PlatformOptions(),
) -> None:
    """Evaluate a model on a suite at the times of a cron expression."""
    from flows.platform import schedules

    times = schedules.cron_times(when.cron, when.timezone)
    with _connected(platform) as (client, page, store):
        address = schedules.schedulable_model(model, store)
        parameters: dict[str, Any] = {"model": address, "suite": suite}
        if changed := limits.model_dump(exclude_defaults=True):
            parameters["limits"] = changed
        if data is not None:
            parameters["data"] = str(data.expanduser().absolute())
        made = schedules.add_evaluation(client, parameters, times, when.name)
        print(f"{made.name}: {schedules.next_runs(client, made)}")
        if times.timezone != when.timezone:
            print(f"its times are kept in {times.timezone}, where no hour is left out when the clocks change")
        print(f"{page}/deployments/deployment/{made.deployment.id}")


@schedule_app.command(name="list", help_epilogue="Example: vectorclm schedule list --json")
def list_schedules(*, platform: PlatformOptions = PlatformOptions(), json: Json = False) -> None:
    """List every schedule of the platform: what it runs, when, its next and its last run."""
    from flows.platform import schedules

    with _connected(platform) as (client, _, _):
        rows = schedules.overview(client)
    if json:
        print(json_format.dumps(rows))
        return
    if not rows:
        print("there is no schedule: `vectorclm schedule evaluate` sets one")
        return
    shown = table("name", "runs", "when", "state", "next run", "last run", "id")
    for row in rows:
        cells = [row["name"], row["runs"], row["when"], row["state"], row["next"] or "", row["last"] or ""]
        shown.add_row(*map(escape, cells), row["id"][:8])
    print_table(shown)


@schedule_app.command(help_epilogue='Example: vectorclm schedule pause "vectorclm-chat@candidate on small"')
def pause(name: Name, /, *, platform: PlatformOptions = PlatformOptions()) -> None:
    """Pause a schedule: it starts no run until it is resumed."""
    _switch(name, platform, active=False)


@schedule_app.command(help_epilogue='Example: vectorclm schedule resume "vectorclm-chat@candidate on small"')
def resume(name: Name, /, *, platform: PlatformOptions = PlatformOptions()) -> None:
    """Resume a paused schedule, also one that was never on."""
    _switch(name, platform, active=True)


@schedule_app.command(help_epilogue='Example: vectorclm schedule remove "vectorclm-chat@candidate on small"')
def remove(name: Name, /, *, platform: PlatformOptions = PlatformOptions()) -> None:
    """Remove a schedule and its runs that have not begun; results and finished runs stay."""
    from flows.platform import schedules

    with _connected(platform) as (client, _, _):
        print(f"{schedules.remove(client, name).name} is removed")


def _switch(name: str, platform: PlatformOptions, *, active: bool) -> None:
    from flows.platform import schedules

    with _connected(platform) as (client, page, _):
        found = schedules.switch(client, name, active=active)
        print(f"{found.name}: {schedules.next_runs(client, found) if active else 'paused'}")
        if active and found.deployment.paused:
            place = f"{page}/deployments/deployment/{found.deployment.id}"
            print(f"the deployment {found.deployment.name} itself is paused: switch it on at {place}")


@contextmanager
def _connected(platform: PlatformOptions) -> Iterator[_Connection]:
    """Connect to the Prefect server of a platform, found as `vectorclm retry` finds it."""
    config = platform.config()
    if platform.prefect_port is None and platform.mlflow_port is None:
        config = remembered(config)
    with platform_server(config, is_named=platform.is_given) as page:
        from prefect.client.orchestration import get_client

        from flows.platform.retry import translate_errors

        with get_client(sync_client=True) as client, translate_errors(client, "the schedule"):
            yield _Connection(client, page, Store(config.vectorclm_store))
