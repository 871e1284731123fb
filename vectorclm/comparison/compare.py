"""`vectorclm compare A B`: compare two models on the same items, with confidence intervals of the differences."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.markup import escape

from vectorclm.command_line import print_table, table
from vectorclm.errors import DataError
from vectorclm.evaluation.instruction_checks import PARTS
from vectorclm.evaluation.item_scores import ITEMS, TEXTS, read_scored
from vectorclm.evaluation.statistics import (
    DRAWS,
    SEED,
    Change,
    Figure,
    Scored,
    interval,
    mean_figure,
    ratio,
    resampled,
    share_error,
)
from vectorclm.lineage.chain import training_of
from vectorclm.stages import EVALUATED
from vectorclm.store.artifact import Artifact, Store
from vectorclm.store.layout import MEASURE
from vectorclm.store.model_ref import content_of, find_model

OWN_SUITE = "its own evaluation"
METHOD = f"paired bootstrap over items, {DRAWS:,} resamples, 95 % percentile interval, seed {SEED}"


def results_of(address: str, store: Store) -> list[Artifact]:
    """The results of a model that `store` has, from any suite and from the model's own evaluation.

    The model may lie anywhere. Raises DataError where there are no results, with the command that measures.
    """
    model = find_model(address)
    model.verify(store)
    training = training_of(model, store)  # of an export, whose files say more to other programs
    contents = {model.content, *([content_of(training)] if training is not None else [])}
    found = [item for item in store.finished(MEASURE) if item.manifest["inputs"].get("model") in contents]
    for stage, source in EVALUATED.items():
        same = {model.fingerprint for model in store.finished(source) if content_of(model) in contents}
        found += [item for item in store.finished(stage) if item.manifest["inputs"].get(source) in same]
    kept = [item for item in found if has_items(item)]
    if not kept:
        why = "was measured before its items were kept" if found else "is not measured yet"
        raise DataError(f"{address} {why} in {store.uri}: run `{_command(address, 'NAME', store)}`")
    return kept


def _command(address: str, suite: str, store: Store) -> str:
    return f"vectorclm evaluate {address} --suite {suite} --store {store.uri}"


def has_items(scores: Artifact) -> bool:
    """Whether the result has the scores of each item."""
    return {ITEMS, TEXTS} <= set(scores.manifest["files"])


def suite_of(scores: Artifact) -> str:
    """The name of the questions for a person."""
    return str(scores.manifest["config"].get("suite", OWN_SUITE))


def _asked(scores: Artifact) -> tuple[bool, Any, Any]:
    """What was measured: equal where the items are the same, for base and chat models alike."""
    config, inputs = scores.manifest["config"], scores.manifest["inputs"]
    if scores.stage == MEASURE:
        return True, {key: value for key, value in config.items() if key != "data"}, inputs.get("sample")
    return False, config, inputs["shards"]


def common_results(before: str, after: str, store: Store, suite: str | None = None) -> tuple[Artifact, Artifact]:
    """Results of two models from the same suite and limits.

    Of several, a suite comes before the models' own evaluation, then most questions decide. Raises DataError where a
    model is not measured, or the two have no suite in common.
    """
    sides = [results_of(address, store) for address in (before, after)]
    wanted = [[item for item in side if suite in (None, suite_of(item))] for side in sides]
    pairs = [(a, b) for a in wanted[0] for b in wanted[1] if _asked(a) == _asked(b)]
    if not pairs:
        have = [", ".join(sorted({suite_of(item) for item in side})) for side in sides]
        name = suite or "NAME"
        raise DataError(
            f"no {'suite' if suite is None else suite} has measured both by the same questions, text and limits: "
            f"{before} has {have[0]}; {after} has {have[1]}. Run `{_command(before, name, store)}` and "
            f"`{_command(after, name, store)}`"
        )
    return max(pairs, key=lambda pair: (pair[0].stage == MEASURE, _questions(pair[0]), pair[0].fingerprint))


def _questions(scores: Artifact) -> int:
    return sum(task["items"] for task in scores.summary["tasks"].values())


def paired(before: Mapping[str, Scored], after: Mapping[str, Scored]) -> list[Change]:
    """Each score of two models with its paired interval, and the average of each kind with several scores.

    An average (`acc`, `acc_norm`, `bits_per_byte`) weighs all tasks or sources alike, and resamples each by itself.
    Raises DataError that names the score whose items differ.
    """
    if before.keys() != after.keys():
        raise DataError(f"measured of one model only: {', '.join(sorted(before.keys() ^ after.keys()))}")
    by_kind: dict[str, list[tuple[Change, Any]]] = {}
    for name in before:
        a, b = before[name], after[name]
        if a.ids != b.ids or not np.array_equal(a.sizes, b.sizes):
            raise DataError(
                f"{name}: the models were not scored on the same items, so they cannot be paired: the tokenizers "
                "differ, or the data changed; measure both on one suite with `vectorclm evaluate MODEL --suite NAME`"
            )
        draws = resampled(name, a, b)
        found = interval(draws, len(a.ids), int(np.count_nonzero(a.parts != b.parts)))
        by_kind.setdefault(name.partition(".")[0], []).append((Change(name, _figure(a), _figure(b), found), draws))
    changes = [change for group in by_kind.values() for change, _ in group]
    return changes + [_average(kind, group) for kind, group in by_kind.items() if len(group) > 1]


def _figure(scored: Scored) -> Figure:
    parts, sizes = scored.parts.tolist(), scored.sizes.tolist()
    value, stderr = ratio(parts, sizes)
    if set(sizes) == {1.0} and set(parts) <= {0.0, 1.0}:
        stderr = share_error(value, len(parts))
    return Figure(value, stderr, len(parts))


def _average(kind: str, group: list[tuple[Change, Any]]) -> Change:
    before = mean_figure([change.before for change, _ in group])
    after = mean_figure([change.after for change, _ in group])
    parts = [change.paired for change, _ in group if change.paired is not None]
    draws = np.mean([draws for _, draws in group], axis=0)
    items, differing = sum(part.items for part in parts), sum(part.differing for part in parts)
    return Change(kind, before, after, interval(draws, items, differing))


def compare(before: Artifact, after: Artifact) -> list[Change]:
    """Compare two results of `common_results` score by score."""
    return paired(*(read_scored(scores.local("*.parquet")) for scores in (before, after)))


def followed(before: Artifact, after: Artifact) -> list[Change]:
    """Compare how two models follow the same instructions: `followed_content`, `followed_form` and `followed`.

    Empty where a model was not asked any. Raises DataError where the instructions differ.
    """
    sides = [read_scored(scores.local("*.parquet")) for scores in (before, after)]
    both = [{name: side[name] for name in PARTS if name in side} for side in sides]
    return paired(*both) if all(both) else []


def as_object(before: Artifact, after: Artifact, changes: list[Change]) -> dict[str, Any]:
    """The JSON object of a comparison that `--json` prints."""
    scores = []
    for change in changes:
        assert change.paired is not None
        about = {"before": change.before._asdict(), "after": change.after._asdict(), "difference": change.difference}
        scores.append({"score": change.name, **about, **change.paired._asdict(), "verdict": change.verdict})
    return {"suite": suite_of(before), "before": before.uri, "after": after.uri, "method": METHOD, "scores": scores}


def print_comparison(before: str, after: str, store: Store, suite: str | None, *, as_json: bool) -> None:
    """Print the differences between the models `before` and `after`, score by score."""
    pair = common_results(before, after, store, suite)
    found = compare(*pair)
    if as_json:
        print(json.dumps(as_object(*pair, found)))
        return
    print(f"B, {after}, against A, {before}, on {suite_of(pair[0])}: {METHOD}")
    shown = table("score", "A >", "B >", "B - A >", "95 % interval >", "verdict", "items that differ >")
    for change in found:
        assert change.paired is not None
        low, high, items, differing = change.paired
        sides = [f"{side.value:.4f} ± {side.stderr:.4f}" for side in (change.before, change.after)]
        difference = (f"{change.difference:+.4f}", f"{low:+.4f} to {high:+.4f}")
        shown.add_row(escape(change.name), *sides, *difference, change.verdict, f"{differing:,} of {items:,}")
    print_table(shown)
