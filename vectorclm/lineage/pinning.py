"""Pins every source of an experiment to a revision before anything runs, with a lock file for hub commits.

A hub repository is pinned to a commit, which is kept in `<experiment>.lock.json` beside the experiment. Local files,
a mirror and the generated world are pinned to the SHA-256 of their content. Sources that a mirror lacks are left out,
with a note.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from vectorclm.config import ExperimentConfig, Suite
from vectorclm.corpus.file_formats import titles
from vectorclm.corpus.files import revision_of
from vectorclm.corpus.hub import hub_error
from vectorclm.corpus.sources import (
    GENERATED,
    BenchmarkSource,
    Source,
    TaskSource,
    TextSource,
    describe,
    left_out,
    local_files,
    local_place,
)
from vectorclm.corpus.synthetic_world import WorldConfig
from vectorclm.errors import ConfigError, DataError
from vectorclm.formats.json_files import read_table
from vectorclm.settings import digest
from vectorclm.shards.config import ChatSource
from vectorclm.store.durable import write_file
from vectorclm.train_config import Phase

UNRESOLVED = "unresolved"  # revision of a hub repository that a dry run does not look up
COMMIT = re.compile(r"[0-9a-f]{40}")

S = TypeVar("S", bound=Source)


def pin(
    experiment: ExperimentConfig, experiment_path: Path, data: Path | None, *, resolve: bool
) -> tuple[ExperimentConfig, list[str]]:
    """Pin every source of an experiment. Returns the pinned experiment, and notes on sources missing in the mirror.

    A set is all sources with one `path`. Sources that the mirror `data` lacks are left out, and the weights of the
    others in the set grow, in the sample and in each phase, so that the set keeps its share. Benchmarks are left out
    one by one. With `resolve=False`, nothing is looked up in the network or written, and a hub source that is neither
    pinned nor locked has the revision `unresolved`. Raises DataError where a whole set or all benchmarks are missing,
    and where content differs from a revision `sha256:…` in the experiment.
    """
    _check_mirror(data)
    pinner = _Pinner(experiment.world, Lock(experiment_path.with_suffix(".lock.json")), data, resolve)
    texts = pinner.pin(experiment.sample.sources)
    chats = pinner.pin(experiment.chat_sources)
    tasks = pinner.pin(experiment.evaluate.tasks, sets=False)
    others = pinner.pin(experiment.sample.decontaminate_with, sets=False)
    texts, phases = _reweighted(experiment.sample.sources, texts, experiment.pretrain.phases)
    pinned = experiment.model_copy(
        update={
            "sample": experiment.sample.model_copy(update={"sources": texts, "decontaminate_with": others}),
            "pretrain": experiment.pretrain.model_copy(update={"phases": phases}),
            **({"chat": experiment.chat.model_copy(update={"sources": chats})} if experiment.chat is not None else {}),
            "evaluate": experiment.evaluate.model_copy(update={"tasks": tasks}),
        }
    )
    pinner.lock.save()
    return pinned, pinner.notes


def pin_suite(suite: Suite, path: Path, data: Path | None) -> tuple[Suite, list[str]]:
    """Pin every source of an evaluation suite. Returns the pinned suite, and notes on missing sources; see `pin`."""
    if suite.experiment is not None:
        experiment, notes = pin(suite.experiment, path, data, resolve=True)
        return Suite.of(experiment), notes
    _check_mirror(data)
    pinner = _Pinner(suite.world, Lock(path.with_suffix(".lock.json")), data, True)
    pinned = suite.model_copy(update={"tasks": pinner.pin(suite.tasks, sets=False)})
    pinner.lock.save()
    return pinned, pinner.notes


def _check_mirror(data: Path | None) -> None:
    if data is not None and not data.is_dir():
        raise DataError(f"there is no folder {data}: --data takes the folder of a local mirror")


def check_sources(experiment: ExperimentConfig, data: Path | None, *, hub: bool) -> None:
    """Check that every source of a pinned experiment can be opened, without reading rows.

    Raises DataError for the first source that cannot be read, is empty, or lacks its column, and ConfigError for an
    undefined benchmark. With `hub=False`, only sources on this machine are opened.
    """
    from vectorclm.corpus.source_reader import check_source
    from vectorclm.evaluation.tasks import check_tasks

    check_tasks(experiment.evaluate.tasks)
    sample = [*experiment.sample.sources, *experiment.sample.decontaminate_with]
    for source in [*sample, *experiment.chat_sources, *experiment.evaluate.tasks]:
        if hub or (source.revision or "").startswith("sha256:"):
            check_source(source, data, experiment.world, _columns(source))


def _columns(source: Source) -> tuple[str, ...]:
    if isinstance(source, TaskSource):
        return source.text_columns
    if isinstance(source, ChatSource):
        return (source.column,)
    if isinstance(source, BenchmarkSource):
        return tuple(source.columns)
    return source.columns() if isinstance(source, TextSource) else ()


class Lock:
    """The commits of hub repositories, in a JSON file beside the experiment: `{"owner/name": "<commit>"}`.

    The key of a source with a branch or tag as its revision is `owner/name@branch`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.commits: dict[str, str] = {}
        if path.exists():
            try:
                self.commits = read_table(path, "a lock file", ConfigError)
            except ConfigError as error:
                raise ConfigError(f"{error}: delete the file to pin again") from error
        for key, commit in self.commits.items():
            if not (isinstance(commit, str) and COMMIT.fullmatch(commit)):
                raise ConfigError(f"{path}: {key} has {commit!r}, which is not a commit: delete the line to pin again")
        self._saved = dict(self.commits)

    def commit(self, source: Source, resolve: bool) -> str:
        """The commit of a hub source: from its settings, from the lock file, or else the hub's current commit."""
        asked = source.revision
        if asked is not None and COMMIT.fullmatch(asked):
            return asked
        key = source.path if asked is None else f"{source.path}@{asked}"
        if key not in self.commits:
            if not resolve:
                return UNRESOLVED
            from huggingface_hub import HfApi

            try:
                info = HfApi().dataset_info(source.path, revision=asked, timeout=60)
            except Exception as error:
                raise hub_error(source, error) from error
            if not COMMIT.fullmatch(info.sha or ""):
                raise DataError(f"{describe(source)}: the hub returned no commit for it (got {info.sha!r})")
            self.commits[key] = str(info.sha)
        return self.commits[key]

    def save(self) -> None:
        """Write the lock file if it has new commits. Raises ConfigError where the file cannot be written."""
        if self.commits == self._saved:
            return
        try:
            write_file(self.path, (json.dumps(self.commits, indent=2, sort_keys=True) + "\n").encode())
        except OSError as error:
            raise ConfigError(
                f"cannot write {self.path} ({error}): copy the experiment to a folder of your own, and run the copy"
            ) from error
        self._saved = dict(self.commits)


class _Pinner:
    """Determines the revision of each source, and collects notes on missing sources."""

    def __init__(self, world: WorldConfig | None, lock: Lock, data: Path | None, resolve: bool) -> None:
        self.world, self.lock, self.data, self.resolve = world, lock, data, resolve
        self.notes: list[str] = []

    def pin(self, sources: Sequence[S], *, sets: bool = True) -> list[S]:
        """Pin the sources that exist. Raises DataError where a set is missing, or with `sets=False` all sources."""
        kept, missing = [], []
        for source in sources:
            revision = self._revision(source)
            if revision is None:
                missing.append(source)
            else:
                kept.append(source.model_copy(update={"revision": revision}))
        for path in dict.fromkeys(source.path for source in missing):
            lost = [source for source in missing if source.path == path]
            if not (left := [source for source in kept if source.path == path] if sets else kept):
                places = ", ".join(str(local_place(source, self.data)) for source in (lost if sets else missing))
                raise DataError(
                    f"{path if sets else 'the benchmarks'}: the mirror {self.data} has no files of it; "
                    f"expected {titles()} files at {places}"
                )
            self.notes.append(_note(path, lost, left, sets))
        return kept

    def _revision(self, source: Source) -> str | None:
        """The revision of a source; None where the mirror lacks it."""
        if source.is_generated:
            if self.world is None:
                raise ConfigError(f"{describe(source)} reads the generated world, but there is no [world]")
            found = f"sha256:{digest(GENERATED[source.path](self.world, source.name or ''))}"
        elif (place := local_place(source, self.data)) is not None:
            files = local_files(source, self.data)
            if not files:
                if self.data is not None and Path(place).is_relative_to(self.data):
                    return None
                instead = _instead(source, self.data)
                raise DataError(f"{describe(source)}: no {titles()} files of this split at {place}{instead}")
            if (note := left_out(source, self.data)) is not None:
                self.notes.append(note)
            found = revision_of(files)
        else:
            if (asked := source.revision or "").startswith("sha256:"):
                if self.resolve:
                    raise DataError(f"{describe(source)} is pinned to local content: give its folder with --data DIR")
                return asked
            return self.lock.commit(source, self.resolve)
        asked = source.revision or ""
        if asked.startswith("sha256:") and asked != found:
            raise DataError(f"{describe(source)} is pinned to {asked}, but the content is {found}")
        return found


def _instead(source: Source, data: Path | None) -> str:
    note = left_out(source, data)
    return f"; it {note.removeprefix(describe(source)).strip()}" if note is not None else ""


def _note(path: str, lost: Sequence[Source], left: Sequence[Source], sets: bool) -> str:
    names = ", ".join(source.name or source.label for source in lost)
    share = ""
    if sets and all(isinstance(source, TextSource) for source in left):
        share = f"; {', '.join(source.label for source in left)} get its share"
    return f"{path}: the mirror has no {names}{share}"


def _reweighted(
    before: Sequence[TextSource], after: Sequence[TextSource], phases: Sequence[Phase]
) -> tuple[list[TextSource], list[Phase]]:
    """Reweight the remaining sources, and the phases, so that every set keeps its total weight."""
    if len(before) == len(after):
        return list(after), list(phases)
    weights = {source.label: source.weight for source in before}
    shared = _keep_totals(weights, weights, before, after)
    sources = [source.model_copy(update={"weight": shared[source.label]}) for source in after]
    return sources, [
        phase.model_copy(update={"weights": _keep_totals(phase.weights, weights, before, after)}) for phase in phases
    ]


def _keep_totals(
    weights: dict[str, float],
    default: dict[str, float],
    before: Iterable[TextSource],
    after: Iterable[TextSource],
) -> dict[str, float]:
    """Distribute `weights` over the sources `after`; each set (one `path`) keeps the total it had over `before`.

    Where no remaining source of a set had a weight, the set's total is divided in proportion to `default`.
    """
    kept = {}
    for path in dict.fromkeys(source.path for source in before):
        of_set = {source.label: weights.get(source.label, 0.0) for source in before if source.path == path}
        left = [source.label for source in after if source.path == path]
        total = sum(of_set.values())
        own = {label: of_set[label] for label in left if of_set[label] > 0}
        base = own or {label: default[label] for label in left}
        if len(left) == len(of_set):
            kept.update({label: weights[label] for label in left if label in weights})
        elif total > 0:
            kept.update({label: weight * total / sum(base.values()) for label, weight in base.items()})
    return kept
