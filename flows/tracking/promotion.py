"""`vectorclm promote`: move the alias `champion` to a model that is better by more than the noise."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table

from flows.tracking.client import CHAMPION, tracking_uri
from flows.tracking.database import sqlite_path
from flows.tracking.lookup import opened
from flows.tracking.registry import Registry
from vectorclm.comparison.compare import METHOD, OWN_SUITE, has_items, paired
from vectorclm.errors import ConfigError
from vectorclm.evaluation.item_scores import read_scored
from vectorclm.evaluation.statistics import NOISE, Change, Figure, changes, figures
from vectorclm.lineage.chain import Lineage
from vectorclm.stages import EVALUATED
from vectorclm.store.artifact import Artifact, Store
from vectorclm.store.layout import MEASURE
from vectorclm.store.model_names import REGISTERED

UNPAIRED = f"{NOISE:.0f} standard errors of the difference"


def compared(candidate: Lineage, champion: Lineage | None) -> tuple[str, list[Change]]:
    """Compare all scores of the first suite that both models have with equal settings; without a champion, with chance.

    Returns the suite and its changes. Scores are paired if both results have the score of each item. Raises ConfigError
    where no suite measured both models with equal settings, or, without a champion, where no task was measured.
    """
    for item in sorted(candidate.scores, key=lambda item: item.stage != MEASURE):
        suite = str(item.manifest["config"].get("suite", OWN_SUITE))
        after = _figures(item)
        if champion is None:
            chance = {f"acc.{label}": Figure(task["chance"], 0.0) for label, task in item.summary["tasks"].items()}
            if chance:
                return suite, changes(chance, after)
            continue
        for other in champion.scores:
            if other.stage == item.stage and _asked(other) == _asked(item):
                return suite, _paired(changes(_figures(other), after), other, item)
    if champion is None:
        raise ConfigError(
            "there is no champion, and no multiple choice was measured, whose chance could take its place: run "
            "`vectorclm evaluate MODEL --suite NAME` with a suite that has tasks"
        )
    raise ConfigError(
        "no suite has measured both models with equal settings: run `vectorclm evaluate MODEL --suite NAME` for each"
    )


def _paired(found: Sequence[Change], before: Artifact, after: Artifact) -> list[Change]:
    """The same changes, with the paired interval of each score that both results have by item."""
    if not (has_items(before) and has_items(after)):
        return list(found)
    a, b = (read_scored(scores.local("*.parquet")) for scores in (before, after))
    names = [change.name for change in found if change.name in a and change.name in b]
    pairs = paired({name: a[name] for name in names}, {name: b[name] for name in names})
    by_name = {change.name: change.paired for change in pairs}
    return [change._replace(paired=by_name.get(change.name)) for change in found]


def _asked(scores: Artifact) -> dict[str, Any]:
    """The settings and texts of an evaluation: scores are comparable if these are equal."""
    config = scores.manifest["config"]
    scored = EVALUATED.get(scores.stage)
    inputs = {key: value for key, value in scores.manifest["inputs"].items() if key != scored}
    return {**config, "measured on": {} if scores.stage == MEASURE else inputs}


def _figures(scores: Artifact) -> dict[str, Figure]:
    """The scores of an evaluation; older ones have no scores of text."""
    return figures({"text": {}, **scores.summary})


def decided(tasks: Sequence[str], found: Sequence[Change]) -> tuple[bool, list[str]]:
    """Decide whether the candidate is promoted, and list the reasons against it.

    It must be better beyond noise on each task named, and worse beyond noise on no score. A task is named by its label
    or by its score: `hellaswag`, `acc.hellaswag`, `bits_per_byte.stories`. Raises ConfigError where no task is named,
    or one that was not measured.
    """
    if not tasks:
        known = ", ".join(change.name for change in found)
        raise ConfigError(f"no multiple choice was measured: name what must be better by --task; there are {known}")
    by_name = {change.name: change for change in found}
    named = [name if name in by_name else f"acc.{name}" for name in tasks]
    if unknown := [name for name in named if name not in by_name]:
        raise ConfigError(f"not measured on both: {', '.join(unknown)}; there are {', '.join(by_name)}")
    why = [f"{name} is not better by more than the noise" for name in named if not _better(by_name[name])]
    why += [f"{change.name} is worse by more than the noise" for change in found if change.fell]
    return not why, why


def _better(change: Change) -> bool:
    return change.beyond_noise and not change.fell


def promote(address: str, tasks: Sequence[str], store: Store, console: Console) -> int:
    """Move `champion` to a registered model if it is better; exit code 1 if not. Both decisions are recorded."""
    if sqlite_path(tracking_uri(store)) is not None:  # both the decision and the alias are written there
        store.check_writable()
    registry = Registry(store)
    version = (
        registry.version(address)
        if address.startswith(REGISTERED)
        else registry.version_of(opened(address, store).root)
    )
    champion = registry.champion(version.name)
    if champion is not None and champion.version == version.version:
        console.print(f"{version.name} {version.version} is the champion already")
        return 0
    found = opened(f"models:/{version.name}/{version.version}", store)
    if found.root.artifact is not None:
        found.root.artifact.verify()
    other = opened(f"models:/{version.name}/{champion.version}", store) if champion is not None else None
    suite, scores = compared(found, other)
    over = f"{version.name} {champion.version}" if champion is not None else "chance"
    named = tasks or [change.name for change in scores if change.name.startswith("acc.")]
    good, why = decided(named, scores)
    rows = [_row(change) for change in scores]
    about = {
        "over": over,
        "suite": suite,
        "tasks": ", ".join(named),
        "method": METHOD if any(change.paired for change in scores) else UNPAIRED,
        "decision": "promoted" if good else "refused",
        "why": "; ".join(why),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "comparison": json.dumps([[change.name, change.before.value, change.after.value] for change in scores]),
    }
    page = registry.decide(version, about, rows, good)
    table = Table(*rows[0], title=f"{version.name} {version.version} against {over} on {suite}")
    for row in rows:
        table.add_row(*row.values())
    console.print(table)
    for line in why:
        console.print(line, style="red", highlight=False)
    outcome = f"now @{CHAMPION}" if good else f"not promoted; @{CHAMPION} stays"
    console.print(f"{version.name} {version.version}: {outcome}. {page}", highlight=False, soft_wrap=True)
    return 0 if good else 1


def _row(change: Change) -> Mapping[str, str]:
    interval = change.paired
    noise = f"{change.noise:.4f}" if interval is None else f"[{interval.low:+.4f}, {interval.high:+.4f}] paired"
    return {
        "score": change.name,
        "champion": f"{change.before.value:.4f} ± {change.before.stderr:.4f}",
        "candidate": f"{change.after.value:.4f} ± {change.after.stderr:.4f}",
        "difference": f"{change.difference:+.4f}",
        "noise": noise,
        "verdict": change.verdict,
    }
