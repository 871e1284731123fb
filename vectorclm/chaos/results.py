"""The results of trials: a file with a line each, the table of what they show, and the verdict."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vectorclm.chaos.trial import Outcome
from vectorclm.errors import DataError


@dataclass(frozen=True)
class Row:
    """What the trials of one kind of disturbance on one kind of store show."""

    store: str
    disturbance: str
    tried: int
    survived: int
    recomputed_steps: int  # at most
    mean_seconds: float  # to recover
    p95_seconds: float


def read_outcomes(file: Path) -> list[Outcome]:
    """The outcomes in a file of results; a last line that a kill cut off is left out, and removed from the file.

    Raises DataError for any other line that is not an outcome.
    """
    if not file.is_file():
        return []
    text = file.read_text(encoding="utf-8")
    if (whole := text[: text.rfind("\n") + 1]) != text:
        file.write_text(whole, encoding="utf-8")
    found = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            values = json.loads(line)
            found.append(Outcome(**{**values, "problems": tuple(values["problems"])}))
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{file}, line {number}, is not the result of a trial: name another file") from error
    return found


def add_outcome(file: Path, outcome: Outcome) -> None:
    """Add an outcome to a file of results."""
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(asdict(outcome)) + "\n")


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that so large a share of the values does not exceed (nearest rank); 0 without values."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else 0.0


def rows(outcomes: Sequence[Outcome], order: Sequence[str]) -> list[Row]:
    """A row for each store and kind, in this order; trials that met no running stage are left out."""
    met = [outcome for outcome in outcomes if outcome.struck]
    found = []
    for store in sorted({outcome.store for outcome in met}):
        for kind in order:
            group = [outcome for outcome in met if (outcome.store, outcome.kind) == (store, kind)]
            if group:
                seconds = [outcome.seconds for outcome in group]
                found.append(
                    Row(
                        store,
                        kind,
                        len(group),
                        sum(outcome.survived for outcome in group),
                        max(outcome.recomputed or 0 for outcome in group),
                        round(sum(seconds) / len(seconds), 1),
                        round(percentile(seconds, 0.95), 1),
                    )
                )
    return found


def problems(outcomes: Sequence[Outcome]) -> list[str]:
    """A line for each thing that was wrong."""
    return [
        f"trial {each.trial} ({each.store}, seed {each.seed}): {each.kind} in {each.stage} at {each.moment} s: {said}"
        for each in outcomes
        for said in each.problems
    ]


def verdict(outcomes: Sequence[Outcome], where: str) -> str:
    """The result in a sentence."""
    met = sum(outcome.struck for outcome in outcomes)
    bad = sum(not outcome.survived for outcome in outcomes)
    if bad:
        return (
            f"{where} does not hold: {bad} of {len(outcomes)} trials lost something or ended without a clear message."
        )
    if not met:
        return f"Nothing is known of {where}: no disturbance met a running stage. Give it more minutes."
    return f"{where} holds: {met} disturbances, nothing lost, the same bytes as undisturbed, no process left."


def as_json(
    outcomes: Sequence[Outcome], order: Sequence[str], where: str, untried: Mapping[str, str]
) -> dict[str, Any]:
    """Everything of the table and the verdict, for `--json`."""
    return {
        "trials": len(outcomes),
        "lost": sum(not outcome.survived for outcome in outcomes),
        "rows": [asdict(row) for row in rows(outcomes, order)],
        "problems": problems(outcomes),
        "not_tried": dict(untried),
        "verdict": verdict(outcomes, where),
    }
