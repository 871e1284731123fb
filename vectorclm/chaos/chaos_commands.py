"""`vectorclm chaos`: whether a store and this machine hold when something goes wrong.

The command imports what it runs: its help waits for neither torch nor Arrow.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from vectorclm.command_line import Json, StoreOptions, print_table, table
from vectorclm.errors import ConfigError

if TYPE_CHECKING:
    from vectorclm.chaos.results import Row


@Parameter(name="*")
@dataclass(frozen=True)
class ChaosOptions:
    """How long and what `vectorclm chaos` tries."""

    seed: Annotated[int, Parameter(help="Chooses disturbances and moments")] = 0
    minutes: Annotated[float, Parameter(help="Time of this call; at least 2")] = 10.0
    only: Annotated[
        tuple[str, ...],
        Parameter(show_default=False, help="Try this disturbance alone, such as kill; may be repeated"),
    ] = ()
    results: Annotated[Path | None, Parameter(help="Keep the results in this file, and add to those it has")] = None


def chaos(*, place: StoreOptions = StoreOptions(), options: ChaosOptions = ChaosOptions(), json_: Json = False) -> int:
    """Disturb a small experiment in a store, again and again, and report whether anything is lost.

    Kills, signals, storage faults and clock changes meet each stage at random moments.
    The same command then goes on; every file must be that of an undisturbed run.
    All happens in a folder of its own in the store, removed at the end.
    Interrupted, the same command continues. Exit code 1 if something was lost.
    """
    if not options.minutes > 0:
        raise ConfigError(f"minutes is {options.minutes:g}: give the minutes to try, such as 10")
    from vectorclm.chaos.campaign import Campaign, untried_lines
    from vectorclm.chaos.disturbances import BY_NAME
    from vectorclm.chaos.results import as_json, problems, rows, verdict
    from vectorclm.store.artifact import Store

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    campaign = Campaign(
        Store(place.store), options.seed, options.minutes, options.only, results=options.results, say=say
    )
    try:
        outcomes = [each for each in campaign.run() if each.store == campaign.store_kind]
    except KeyboardInterrupt:
        say(f"interrupted: the same command continues; until then {campaign.own.uri} stays")
        raise
    where = campaign.store.uri
    if json_:
        print(json.dumps(as_json(outcomes, list(BY_NAME), where, campaign.untried)))
    else:
        _show(rows(outcomes, list(BY_NAME)))
        for line in (*untried_lines(campaign.untried), *problems(outcomes), verdict(outcomes, where)):
            print(line)
    return 0 if all(outcome.survived for outcome in outcomes) else 1


def _show(found: "list[Row]") -> None:
    shown = table(
        "store", "disturbance", "tried >", "survived >", "steps done twice >", "seconds to recover >", "95 % >"
    )
    for row in found:
        shown.add_row(
            row.store,
            row.disturbance,
            str(row.tried),
            str(row.survived),
            f"at most {row.recomputed_steps}",
            f"{row.mean_seconds:.1f}",
            f"{row.p95_seconds:.1f}",
        )
    print_table(shown)
