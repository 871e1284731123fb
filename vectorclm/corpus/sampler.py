"""Samples training documents from each source: cleaned, deduplicated, decontaminated and split, by hashes of the text.

The choice of documents and their order in the sample depend only on the seed and the texts, not on the files or their
order. The order is a shuffle of the whole sample.
"""

import math
import mmap
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from vectorclm.corpus.decontamination import Benchmarks
from vectorclm.corpus.row_batches import RowBatch
from vectorclm.corpus.source_reader import SourceRoots, read_batches
from vectorclm.corpus.sources import CorpusConfig, TextSource, describe, is_remote
from vectorclm.corpus.summary import drop_counts
from vectorclm.errors import DataError
from vectorclm.runtime.progress import Progress

FILE_BYTES = 256 * 1024 * 1024  # text in one file of the sample
GROUP_BYTES = 16 * 1024 * 1024  # text in a row group, at most; the writer holds one in memory
GROUP_DOCUMENTS = 1000
SPARE = 2  # times a source's share are kept in reserve, to replace contaminated documents
SCHEMA = pa.schema([("text", pa.string()), ("id", pa.string())])
KEY = np.dtype([("rank", "<u8"), ("low", "<u8"), ("high", "<u8")])  # a document's place in the order, and its id
# A document's place in the reserve file, and its split.
PLACE = np.dtype([("offset", "<u8"), ("size", "<u4"), ("held_out", "?")])

Index = NDArray[Any]


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

    Memory use is 37 bytes for each document in reserve (three times as much while they are sorted), 24 bytes for each
    document of the sources before, and one batch. An unnamed file in `out`'s parent folder holds the texts in reserve:
    at first three times the source's share, and more where the source is far larger. `finished` is called with the
    path of each complete file, and may move the file elsewhere.

    Returns `{"documents", "bytes", "sources": {label: {"documents", "bytes", "validation_documents",
    "validation_bytes", "read", "dropped": {reason: count}, "contaminated": {benchmark: count}, "exhausted"}}}`.
    `documents` and `bytes` count training documents, `read` counts all rows read, and `exhausted` says that the source
    ended before its share was drawn. Raises DataError for a source that cannot be read, or that yields no document for
    training or none for validation.
    """
    total = sum(source.weight for source in config.sources)
    earlier = np.empty(0, KEY)
    drawn: dict[str, _Counts] = {}
    with Progress("sample", config.bytes, "bytes") as progress:
        for source in config.sources:
            budget = max(1, round(config.bytes * source.weight / total))
            found = drawn[source.label] = _Counts()
            draw = _SourceDraw(source, benchmarks, found, progress)
            batches = read_batches(source, roots.data, roots.world, seed)
            with _Reserve(out.parent, seed, config.validation_share, budget, earlier) as reserve:
                chosen = draw.choose(reserve, batches, is_remote(source, roots.data))
                draw.write(out / source.label, reserve, chosen, finished)
                earlier = np.concatenate([earlier, reserve.keys[chosen]])
                _check_split(source, found, config, partial(reserve.least_share, chosen))
    return {
        "documents": sum(item.documents for item in drawn.values()),
        "bytes": sum(item.bytes for item in drawn.values()),
        "sources": {label: item.summary() for label, item in drawn.items()},
    }


class _Reserve:
    """The candidate documents of a source: texts in a temporary file, sort keys in memory.

    A document that comes after `SPARE` times the budget of other documents is discarded, so the reserve stays small.
    """

    def __init__(self, folder: Path, seed: int, validation_share: float, budget: int, earlier: Index) -> None:
        self.seed, self.budget, self.earlier = seed, budget, earlier
        self.limit = int(validation_share * 2**64)
        self.last = 2**64  # the highest rank that is still a candidate
        self.keys, self.places = np.empty(0, KEY), np.empty(0, PLACE)
        self.bytes = self._end = 0
        self._added: list[tuple[Index, Index]] = []
        self._file: BinaryIO = cast(BinaryIO, tempfile.TemporaryFile(dir=folder))  # noqa: SIM115

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, texts: Iterable[bytes]) -> None:
        """Add texts, except those whose rank is too high to be chosen."""
        keys, places, kept = [], [], []
        for text in texts:
            keyed = xxhash.xxh3_128_intdigest(text, seed=self.seed)
            rank = keyed >> 64
            if rank > self.last:
                continue
            name = xxhash.xxh3_128_intdigest(text)
            keys.append((rank, name & 0xFFFFFFFFFFFFFFFF, name >> 64))
            places.append((self._end, len(text), keyed & 0xFFFFFFFFFFFFFFFF < self.limit))
            kept.append(text)
            self._end += len(text)
            self.bytes += len(text)
        self._file.write(b"".join(kept))
        self._added.append((np.array(keys, KEY), np.array(places, PLACE)))
        if self.bytes > (SPARE + 1) * self.budget:
            self._forget()

    def order(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Indices sorted by rank: of each text's first occurrence, and of repetitions (also of texts in `earlier`)."""
        self.keys = np.concatenate([self.keys, *(keys for keys, _ in self._added)])
        self.places = np.concatenate([self.places, *(places for _, places in self._added)])
        self._added = []
        keys = np.concatenate([self.earlier, self.keys])
        order = np.lexsort((keys["high"], keys["low"], keys["rank"]))  # stable: texts of earlier sources come first
        keys = keys[order]
        again = np.zeros(len(keys), bool)
        again[1:] = keys[1:] == keys[:-1]
        number = order - len(self.earlier)
        return number[(number >= 0) & ~again], number[(number >= 0) & again]

    def least_share(self, numbers: Index) -> float | None:
        """The smallest validation share that holds out one of some documents; None where none below a half does."""
        ranks = [
            xxhash.xxh3_128_intdigest(text, seed=self.seed) & 0xFFFFFFFFFFFFFFFF
            for _, texts in self.texts(numbers)
            for text in texts
        ]
        least = math.ceil((min(ranks, default=2**64) + 1) / 2**64 * 1e6 + 1e-6) / 1e6
        return least if least < 0.5 and len(ranks) > 1 else None

    def _forget(self) -> None:
        first, _ = self.order()
        spare = np.searchsorted(np.cumsum(self.places["size"][first]), SPARE * self.budget)
        if spare < len(first):
            self.last = int(self.keys["rank"][first[spare]])
            kept = self.keys["rank"] <= self.last
            self.keys, self.places = self.keys[kept], self.places[kept]
            self.bytes = int(self.places["size"].sum())

    def texts(self, numbers: Index) -> Iterator[tuple[Index, list[bytes]]]:
        """Indices and texts of the given documents, about 16 MiB at a time."""
        self._file.flush()
        if not len(numbers):
            return
        parts = np.cumsum(self.places["size"][numbers], dtype=np.int64) // GROUP_BYTES
        with closing(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)) as file:
            for part in np.split(numbers, np.flatnonzero(np.diff(parts)) + 1):
                ranges = zip(self.places["offset"][part].tolist(), self.places["size"][part].tolist(), strict=True)
                yield part, [file[offset : offset + size] for offset, size in ranges]


def clean_texts(source: TextSource, texts: Sequence[Any], dropped: Counter[str]) -> Iterator[bytes]:
    """The texts that are valid documents, in UTF-8; the others are counted as dropped."""
    for text in texts:
        try:
            data = text if isinstance(text, bytes) else text.encode()
            reason = _fault(source, data)
        except AttributeError:
            reason = "not_text"
        except UnicodeError:
            reason = "invalid_utf8"
        if reason is None:
            yield data
        else:
            dropped[reason] += 1


def _fault(source: TextSource, text: bytes) -> str | None:
    """The reason to drop a text, or None for a valid document. Raises UnicodeDecodeError where it is not UTF-8."""
    if len(text) > source.max_bytes:
        return "too_long"
    if b"\0" in text:
        return "nul"
    decoded = text.decode()
    if not decoded or decoded.isspace():
        return "empty"
    return "too_short" if len(text) < source.min_bytes else None


@dataclass(frozen=True)
class _SourceDraw:
    """Chooses and writes the documents of one source."""

    source: TextSource
    benchmarks: Benchmarks | None
    found: _Counts
    progress: Progress

    def choose(self, reserve: _Reserve, batches: Iterator[RowBatch], remote: bool) -> Index:
        """Indices of the documents to take, in order. Reads as many batches as the choice needs."""
        found, wanted = self.found, float(reserve.budget) if remote else np.inf
        while True:
            ended = True
            for batch in batches:
                found.read += batch.rows
                found.dropped["filter"] += batch.rows - len(batch.texts)
                reserve.add(clean_texts(self.source, batch.texts, found.dropped))
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

    def _first(self, reserve: _Reserve) -> tuple[Index, int]:
        """The first documents in order that fill the budget, and the number of bytes still missing."""
        found = self.found
        first, again = reserve.order()
        sizes = reserve.places["size"]
        ends = np.cumsum(sizes[first], dtype=np.int64)
        spare = int(np.searchsorted(ends, SPARE * reserve.budget)) + 1
        taken: list[Index] = [np.empty(0, np.int64)]
        missing = reserve.budget
        for numbers, texts in reserve.texts(first[:spare]):
            shared = self.benchmarks.found(texts) if self.benchmarks is not None else {}
            clean = np.array([number not in shared for number in range(len(texts))])
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

    def write(self, folder: Path, reserve: _Reserve, chosen: Index, finished: Callable[[Path], None] | None) -> None:
        """Write the chosen documents to the files of their splits."""
        folder.mkdir(parents=True)
        with _Writer(folder, "train", finished) as train, _Writer(folder, "validation", finished) as validation:
            for numbers, texts in reserve.texts(chosen):
                keys, sides = reserve.keys[numbers], reserve.places["held_out"][numbers].tolist()
                names = zip(keys["high"].tolist(), keys["low"].tolist(), strict=True)
                for text, (high, low), held_out in zip(texts, names, sides, strict=True):
                    (validation if held_out else train).add(text, f"{high:016x}{low:016x}")
                self.progress.advance(sum(map(len, texts)), folder.name)
        found = self.found
        found.documents, found.bytes = train.documents, train.bytes
        found.validation_documents, found.validation_bytes = validation.documents, validation.bytes


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


class _Writer:
    """Writes the documents of one split as zstd Parquet, with a new file after every FILE_BYTES of text."""

    def __init__(self, folder: Path, split: str, finished: Callable[[Path], None] | None) -> None:
        self.folder, self.split, self.finished = folder, split, finished
        self.documents = self.bytes = 0
        self._files = self._in_file = self._in_group = 0
        self._file: pq.ParquetWriter | None = None
        self._texts: list[bytes] = []
        self._ids: list[str] = []

    def __enter__(self) -> Self:
        return self

    def add(self, text: bytes, identifier: str) -> None:
        """Add a document in UTF-8."""
        self._texts.append(text)
        self._ids.append(identifier)
        self.documents += 1
        self.bytes += len(text)
        self._in_group += len(text)
        if len(self._texts) >= GROUP_DOCUMENTS or self._in_group >= GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._texts:
            return
        if self._file is None:
            path = self.folder / f"{self.split}-{self._files:05d}.parquet"
            self._file = pq.ParquetWriter(path, SCHEMA, compression="zstd")
            self._files += 1
        self._file.write_table(pa.table([self._texts, self._ids], schema=SCHEMA))
        self._in_file += self._in_group
        self._texts, self._ids, self._in_group = [], [], 0
        if self._in_file >= FILE_BYTES:
            self._close()

    def _close(self, complete: bool = True) -> None:
        if self._file is not None:
            self._file.close()
            self._file, self._in_file = None, 0
            if complete and self.finished is not None:
                self.finished(self.folder / f"{self.split}-{self._files - 1:05d}.parquet")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._flush()
        self._close(complete=error is None)
