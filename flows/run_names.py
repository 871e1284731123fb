"""Names and tags of flow runs: the experiment, what was changed, when, and from where the run was started."""

import getpass
import os
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from functools import cache
from typing import Any

NAMED_CHANGES = 2  # in a run's name; the others are counted
VALUE_LETTERS = 24
TAGGED_CHANGES = 8
GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau upsilon phi chi "
    "psi omega"
).replace(" ", "|")
PROPOSED_V1 = re.compile(rf"({GREEK})\d*-[a-z]+(-[a-z]+)*")  # as Prefect's page proposes it: `beta3-canis-majoris`
PROPOSED_V2 = re.compile(
    r"(Awesome|Rustic|Small|Gorgeous|Fantastic|Sleek|Intelligent|Unbranded|Refined|Licensed|Generic|Practical|Ergonomic"
    r"|Handcrafted|Tasty|Handmade|Incredible)-\w+"
)  # as its new page does: `Rustic-Otter`
FINGERPRINT = re.compile(r"([0-9a-f]{12})[0-9a-f]{52}")
FROM = "from: "  # the tag that says from where a run was started
UI, API, SCHEDULE, COMMAND_LINE = "UI", "API", "schedule", "command line"


def is_generated(name: str) -> bool:
    """Whether Prefect made the name up, so that it may be replaced; a name that a person typed stays."""
    if PROPOSED_V1.fullmatch(name) or PROPOSED_V2.fullmatch(name):
        return True
    return len(words := name.split("-")) == 2 and set(words) <= _words()


@cache
def _words() -> frozenset[str]:
    from coolname import data as word_lists  # the words of Prefect's own names, as `brave-otter`

    lists = word_lists.config.values()
    return frozenset(word for each in lists if isinstance(each, Mapping) for word in each.get("words", ()))


def differences(usual: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's parameters change of the deployment's, by dotted names of the experiment's settings."""
    found = dict(_differing(usual.get("changes") or {}, given.get("changes") or {}))
    return found | dict((given.get("changes") or {}).get("settings") or {}) | dict(given.get("settings") or {})


def _differing(usual: Mapping[str, Any], given: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in given.items():
        if isinstance(value, Mapping) and (prefix or key != "settings"):
            yield from _differing(usual.get(key) or {}, value, f"{prefix}{key}.")
        elif value is not None and key != "settings" and usual.get(key) != value:
            yield f"{prefix}{key}", value


def run_name(usual: Mapping[str, Any], given: Mapping[str, Any], when: datetime, run_id: object) -> str:
    """The name of a run with the parameters `given`, of a deployment whose parameters are `usual`."""
    experiment = given.get("experiment", "")
    experiment = experiment.get("name", "") if isinstance(experiment, Mapping) else str(experiment)
    stage = given.get("stage")
    parts = [f"{stage} of {experiment}" if stage else experiment]
    changes = differences(usual, given)
    parts += [f"{name}={_short(value)}" for name, value in list(changes.items())[:NAMED_CHANGES]]
    if len(changes) > NAMED_CHANGES:
        parts.append(f"and {len(changes) - NAMED_CHANGES} more")
    if given.get("again_from", "nothing") not in ("nothing", None):
        parts.append(f"rebuilt from {given['again_from']}")
    if given.get("again"):
        parts.append("rebuilt")
    if given.get("dry_run"):
        parts.append("dry run")
    return f"{' '.join(parts)}, {when:%d %b %H:%M} ({str(run_id)[:4]})"


def evaluation_name(given: Mapping[str, Any], when: datetime, run_id: object) -> str:
    """The name of a run of the deployment `evaluate`: its model, its suite, when, and the beginning of its id."""
    model = str(given["model"]).removeprefix("models:/")
    parts = [FINGERPRINT.sub(r"\1", part) for part in model.split("/")]
    return f"{'/'.join(parts[-2:])} on {given['suite']}, {when:%d %b %H:%M} ({str(run_id)[:4]})"


def run_tags(
    usual: Mapping[str, Any], given: Mapping[str, Any], tags: list[str], *, scheduled: bool = False
) -> list[str]:
    """The tags of a run: those it has, its experiment, what it changes, and from where it was started."""
    names = list(differences(usual, given))
    found = [*tags, *(f"{name}: {given[name]}" for name in ("experiment", "suite") if name in given)]
    found += [f"setting: {name}" for name in names[:TAGGED_CHANGES]]
    if not any(tag.startswith(FROM) for tag in tags):
        found.append(FROM + (SCHEDULE if scheduled else API))
    return list(dict.fromkeys(found))


def command_line_tags() -> list[str]:
    """The tags of a run that a command started: the command line, and its user."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        user = str(os.getuid())
    return [FROM + COMMAND_LINE, f"user: {user}"]


def of_the_command_line(experiment: str, settings: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Name and tags of a run of `vectorclm run` with these changed settings."""
    given = {"experiment": experiment, "settings": settings}
    now = datetime.now().astimezone()
    return run_name({}, given, now, f"{now:%S%f}"), run_tags({}, given, command_line_tags())


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= VALUE_LETTERS else f"{text[: VALUE_LETTERS - 1]}…"
