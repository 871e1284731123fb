"""Samples training documents from each source: cleaned, deduplicated, decontaminated and split, by hashes of the text.

The choice of documents and their order in the sample depend only on the seed and the texts, not on the files or their
order. The order is a shuffle of the whole sample.
"""

import math
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vectorclm.corpus.candidates import (
    KEY,
    SPARE,
    TEXTS,
    Candidates,
    Draw,
    Index,
    Reserve,
    clean_texts,
    read_candidates,
)
from vectorclm.corpus.decontamination import Benchmarks
from vectorclm.corpus.sample_writer import divided, write_file
from vectorclm.corpus.source_reader import SourceRoots, checked_files, read_batches
from vectorclm.corpus.sources import CorpusConfig, TextSource, describe, is_remote
from vectorclm.corpus.summary import drop_counts
from vectorclm.errors import DataError
from vectorclm.runtime.progress import Progress
from vectorclm.runtime.workers import IN_THIS_PROCESS, Shared, current_workers
from vectorclm.store.durable import TEMPORARY

CHECKED_BYTES = 2 * 1024 * 1024  # text that a worker looks for in the benchmarks at a time


@dataclass
class _Counts:
    """Counts of the documents drawn from one source."""

    documents: int = 0
    bytes: int = 0
    validation_documents: int = 0
    validation_bytes: int = 0
    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    contaminated: Counter[str] = field(default_factory=Counter)
    exhausted: bool = False

    def summary(self) -> dict[str, Any]:
        """The counts as the manifest records them."""
        counts = {name: dict(sorted(getattr(self, name).items())) for name in ("dropped", "contaminated")}
        return {**vars(self), **counts}


def write_sample(
    config: CorpusConfig,
    seed: int,
    out: Path,
    roots: SourceRoots,
    *,
    benchmarks: Benchmarks | None = None,
    finished: Callable[[Path], None] | None = None,
) -> dict[str, Any]:
    """Draw each source's share of `config.bytes` into `out/{label}/{train,validation}-00000.parquet`.

    A source's documents are ordered by a hash of their text, keyed by the seed, and taken in this order until the
    share is reached. Local files and the generated world are read completely, so the choice depends only on the seed
    and the texts. A hub repository is read only as far as needed, from several files in turn in a seeded order, so the
    choice also depends on the files of that commit.

    Dropped documents are counted by reason: `filter` (the source's filter is false), `not_text` (null, or of another
    type), `invalid_utf8`, `nul` (contains the character NUL), `empty` (or only white space), `too_short`, `too_long`;
    and among the documents that would be taken `duplicate` (the text occurred before, in this source or an earlier
    one) and `contaminated` (shares words with `benchmarks`). A hash of the text decides whether a document is held out
    for validation. As each text occurs once, no text is in both splits.

    The `current_workers` read the files of a source, look for the benchmarks and write the files of the sample.
    Memory use is 37 bytes for each document in reserve (three times as much while they are sorted), 24 bytes for each
    document of the sources before (also in each worker), and one batch. A folder beside `out` holds the texts in
    reserve: at first three times the source's share, and more where the source is far larger; and as much for each file
    that is being read. `finished` is called with the path of each complete file, and may move the file elsewhere.

    Returns `{"documents", "bytes", "sources": {label: {"documents", "bytes", "validation_documents",
    "validation_bytes", "read", "dropped": {reason: count}, "contaminated": {benchmark: count}, "exhausted"}}}`.
    `documents` and `bytes` count training documents, `read` counts all rows read, and `exhausted` says that the source
    ended before its share was drawn. Raises DataError for a source that cannot be read, or that yields no document for
    training or none for validation.
    """
    total = sum(source.weight for source in config.sources)
    earlier = np.empty(0, KEY)
    drawn: dict[str, _Counts] = {}
    index = current_workers().share(benchmarks)
    with (
        Progress("sample", config.bytes, "bytes") as progress,
        tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=out.parent) as folder,
    ):
        for source in config.sources:
            budget = max(1, round(config.bytes * source.weight / total))
            found = drawn[source.label] = _Counts()
            draw = _SourceDraw(source, index, found, progress)
            asked = Draw(source, seed, config.validation_share, budget, earlier)
            with Reserve(Path(folder, "reserve"), *asked[1:]) as reserve:
                chosen = draw.choose(
                    reserve, _parts(asked, reserve, roots, Path(folder)), is_remote(source, roots.data)
                )
                draw.write(out / source.label, reserve, chosen, finished)
                earlier = np.concatenate([earlier, reserve.keys[chosen]])
                _check_split(source, found, config, partial(reserve.least_share, chosen))
    return {
        "documents": sum(item.documents for item in drawn.values()),
        "bytes": sum(item.bytes for item in drawn.values()),
        "sources": {label: item.summary() for label, item in drawn.items()},
    }


def _parts(draw: Draw, reserve: Reserve, roots: SourceRoots, folder: Path) -> Iterator[tuple[int, Counter[str]]]:
    """Read a source into its reserve: the number of rows of each part, and the dropped ones by reason.

    Workers read local files; other sources are read here, as a part of them may be enough.
    """
    source, workers = draw.source, current_workers()
    if source.is_generated or is_remote(source, roots.data):
        for batch in read_batches(source, roots.data, roots.world, draw.seed):
            dropped = Counter(filter=batch.rows - len(batch.texts))
            reserve.add(clean_texts(source, batch.texts, dropped))
            yield batch.rows, dropped
        return
    shared, outs = workers.share(draw), deque[Path]()

    def calls() -> Iterator[tuple[Path, Shared, Path, int]]:
        for number, path in enumerate(checked_files(source, roots.data)):
            outs.append(folder / f"{source.label}-{number}")
            outs[-1].mkdir()
            yield outs[-1], shared, path, reserve.last

    for part in workers.each(read_candidates, calls(), with_files=True):
        found: Candidates = part
        texts = outs.popleft() / TEXTS
        reserve.append(texts, found)
        texts.unlink()
        yield found.read, found.dropped


def _labels(benchmarks: Shared, texts: list[bytes]) -> dict[int, set[str]]:
    """The labels of the benchmarks that share words with each text, by its number."""
    index: Benchmarks | None = benchmarks.value()
    return {} if index is None else index.found(texts)


@dataclass(frozen=True)
class _SourceDraw:
    """Chooses and writes the documents of one source."""

    source: TextSource
    benchmarks: Shared  # None, or `Benchmarks`
    found: _Counts
    progress: Progress

    def choose(self, reserve: Reserve, parts: Iterator[tuple[int, Counter[str]]], remote: bool) -> Index:
        """Indices of the documents to take, in order. Reads as many parts as the choice needs."""
        found, wanted = self.found, float(reserve.budget) if remote else np.inf
        while True:
            ended = True
            for rows, dropped in parts:
                found.read += rows
                found.dropped.update(dropped)
                self.progress.at(self.progress.tick.done, f"{self.source.label}: {found.read:,} documents read")
                if reserve.bytes >= wanted:
                    ended = False
                    break
            before = found.dropped.copy()
            chosen, missing = self._first(reserve)
            if ended or missing <= 0:
                found.exhausted = missing > 0
                found.dropped = +found.dropped
                return chosen
            found.dropped, wanted = before, reserve.bytes + missing
            found.contaminated.clear()

    def _first(self, reserve: Reserve) -> tuple[Index, int]:
        """The first documents in order that fill the budget, and the number of bytes still missing."""
        found = self.found
        first, again = reserve.order()
        sizes = reserve.places["size"]
        ends = np.cumsum(sizes[first], dtype=np.int64)
        spare = int(np.searchsorted(ends, SPARE * reserve.budget)) + 1
        taken: list[Index] = [np.empty(0, np.int64)]
        missing = reserve.budget
        groups = deque[Index]()

        def calls() -> Iterator[tuple[Shared, list[bytes]]]:
            for numbers, texts in reserve.texts(first[:spare], CHECKED_BYTES):
                groups.append(numbers)
                yield self.benchmarks, texts

        for shared in current_workers().each(_labels, calls()):
            numbers = groups.popleft()
            clean = np.array([number not in shared for number in range(len(numbers))])
            enough = int(np.searchsorted(np.cumsum(sizes[numbers] * clean, dtype=np.int64), missing)) + 1
            for labels in (labels for number, labels in shared.items() if number < enough):
                found.dropped["contaminated"] += 1
                found.contaminated.update(labels)
            taken.append(numbers[:enough][clean[:enough]])
            missing -= int(sizes[taken[-1]].sum())
            if missing <= 0:
                break
        if missing > 0 and spare <= len(first):
            lost = drop_counts(found.dropped, found.contaminated)
            raise DataError(
                f"{describe(self.source)}: most of it is in the benchmarks ({lost}), so it cannot be trained on. "
                "Remove the source, or set sample.decontaminate to false"
            )
        chosen = np.concatenate(taken)
        last = reserve.keys["rank"][chosen[-1]] if missing <= 0 else np.uint64(2**64 - 1)
        found.dropped["duplicate"] += int((reserve.keys["rank"][again] <= last).sum())
        return chosen, missing

    def write(self, folder: Path, reserve: Reserve, chosen: Index, finished: Callable[[Path], None] | None) -> None:
        """Write the chosen documents to the files of their splits."""
        folder.mkdir(parents=True)
        held_out = reserve.places["held_out"][chosen]
        sides = {"train": chosen[~held_out], "validation": chosen[held_out]}
        workers = current_workers() if current_workers().local else IN_THIS_PROCESS  # the texts are here
        files = [
            (folder / f"{side}-{number:05d}.parquet", numbers[groups[0].start : groups[-1].stop], groups)
            for side, numbers in sides.items()
            for number, groups in enumerate(divided(reserve.places["size"][numbers]))
        ]
        calls = (
            (path, reserve.path, reserve.keys[numbers], reserve.places[numbers], groups)
            for path, numbers, groups in files
        )
        reserve.flush()
        for (path, numbers, _), _ in zip(files, workers.each(write_file, calls), strict=True):
            self.progress.advance(int(reserve.places["size"][numbers].sum()), folder.name)
            if finished is not None:
                finished(path)
        found, sizes = self.found, reserve.places["size"]
        found.documents, found.validation_documents = (len(numbers) for numbers in sides.values())
        found.bytes, found.validation_bytes = (int(sizes[numbers].sum()) for numbers in sides.values())


def _check_split(
    source: TextSource, found: _Counts, config: CorpusConfig, least_share: Callable[[], float | None]
) -> None:
    """Raise DataError where a split has no document, with the setting and the value that work."""
    if found.documents and found.validation_documents:
        return
    side = "validation" if found.documents else "training"
    count = found.documents + found.validation_documents
    share = f"sample.validation_share ({config.validation_share:g})"
    if not count:
        todo = (
            f"no row of column {source.text_column!r} is a document: set text_column to the column with the text"
            if found.read
            else "the source is empty"
        )
    elif count == 1 and found.exhausted:
        todo = "training and validation need different documents: split it into more files, rows or parts"
    elif not found.exhausted:
        needed = config.bytes * max(2.0, 3 / (config.validation_share * count))
        todo = f"raise sample.bytes ({config.bytes:,}) to {math.ceil(needed):,}, or raise {share}"
    elif found.documents and (least := least_share()) is not None:
        todo = f"the source has no more, so set {share} to {least:g} at least"
    else:
        todo = f"the source has no more, so add text, or change {share}"
    raise DataError(
        f"{describe(source)} yields {found.documents:,} documents for training and {found.validation_documents:,} "
        f"for validation (dropped: {drop_counts(found.dropped, found.contaminated)}); {side} needs at least one: {todo}"
    )
