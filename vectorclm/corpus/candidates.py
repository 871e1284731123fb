"""Candidate documents of a source, in a file with their keys in memory: read in slices, and brought together."""

import math
import mmap
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from vectorclm.corpus.file_formats import read_file_batches
from vectorclm.corpus.filters import Filter
from vectorclm.corpus.sources import TextSource
from vectorclm.runtime.workers import Shared

GROUP_BYTES = 16 * 1024 * 1024  # text in a row group of the sample, at most; its writer holds one in memory
COPIED_BYTES = 8 * 1024 * 1024
SPARE = 2  # times a source's share are kept in reserve, to replace contaminated documents
KEY = np.dtype([("rank", "<u8"), ("low", "<u8"), ("high", "<u8")])  # a document's place in the order, and its id
# A document's place in the reserve file, and its split.
PLACE = np.dtype([("offset", "<u8"), ("size", "<u4"), ("held_out", "?")])
TEXTS = "texts"  # the file of a slice

Index = NDArray[Any]


class Reserve:
    """The candidate documents of a source: texts in a temporary file, sort keys in memory.

    A document that comes after `SPARE` times the budget of other documents is discarded, so the reserve stays small.
    """

    def __init__(self, path: Path, seed: int, validation_share: float, budget: int, earlier: Index) -> None:
        """`earlier` are the keys of documents that were drawn from other sources."""
        self.path, self.seed, self.budget, self.earlier = path, seed, budget, earlier
        self.limit = int(validation_share * 2**64)
        self.last = 2**64  # the highest rank that is still a candidate
        self.keys, self.places = np.empty(0, KEY), np.empty(0, PLACE)
        self.bytes = self._end = 0
        self._added: list[tuple[Index, Index]] = []
        self._file = path.open("w+b")

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

    def append(self, path: Path, part: "Candidates") -> None:
        """Add the candidates of a slice, whose texts lie in the file at `path`."""
        with path.open("rb") as texts:
            shutil.copyfileobj(texts, self._file, COPIED_BYTES)
        kept = part.keys["rank"] <= np.uint64(min(self.last, 2**64 - 1))
        places = part.places[kept]
        places["offset"] += np.uint64(self._end)
        self._added.append((part.keys[kept], places))
        self._end += path.stat().st_size
        self.bytes += int(places["size"].sum())
        if self.bytes > (SPARE + 1) * self.budget:
            self._forget()

    def order(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Indices sorted by rank: of each text's first occurrence, and of repetitions (also of texts in `earlier`)."""
        self.collect()
        keys = np.concatenate([self.earlier, self.keys])
        order = np.lexsort((keys["high"], keys["low"], keys["rank"]))  # stable: texts of earlier sources come first
        keys = keys[order]
        again = np.zeros(len(keys), bool)
        again[1:] = keys[1:] == keys[:-1]
        number = order - len(self.earlier)
        return number[(number >= 0) & ~again], number[(number >= 0) & again]

    def collect(self) -> None:
        """Bring `keys` and `places` up to date with what was added."""
        self.keys = np.concatenate([self.keys, *(keys for keys, _ in self._added)])
        self.places = np.concatenate([self.places, *(places for _, places in self._added)])
        self._added = []

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

    def flush(self) -> None:
        """Bring all texts into the file."""
        self._file.flush()

    def texts(self, numbers: Index, size: int = GROUP_BYTES) -> Iterator[tuple[Index, list[bytes]]]:
        """Indices and texts of the given documents, about `size` bytes at a time."""
        self.flush()
        if not len(numbers):
            return
        parts = np.cumsum(self.places["size"][numbers], dtype=np.int64) // size
        with closing(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)) as file:
            for part in np.split(numbers, np.flatnonzero(np.diff(parts)) + 1):
                yield part, texts_at(file, self.places[part])


class Draw(NamedTuple):
    """What decides which documents of a source are candidates."""

    source: TextSource
    seed: int
    validation_share: float
    budget: int
    earlier: Index  # keys of documents drawn from earlier sources


class Candidates(NamedTuple):
    """The candidate documents of a slice, whose texts lie in its file."""

    read: int  # rows
    dropped: Counter[str]
    keys: Index
    places: Index


def read_candidates(out: Path, draw: Shared, path: Path, last: int) -> Candidates:
    """Read one file of a source: the texts of candidates, of the rank `last` at most, go to a file in `out`."""
    asked: Draw = draw.value()
    source, read, dropped = asked.source, 0, Counter[str]()
    condition = Filter(source.filter) if source.filter is not None else None
    with Reserve(out / TEXTS, asked.seed, asked.validation_share, asked.budget, asked.earlier) as reserve:
        reserve.last = last
        for batch in read_file_batches(path, source.text_column, condition):
            read += batch.rows
            dropped["filter"] += batch.rows - len(batch.texts)
            reserve.add(clean_texts(source, batch.texts, dropped))
        reserve.collect()
        return Candidates(read, dropped, reserve.keys, reserve.places)


def texts_at(file: "mmap.mmap", places: Index) -> list[bytes]:
    """The texts at places of a reserve's file."""
    ranges = zip(places["offset"].tolist(), places["size"].tolist(), strict=True)
    return [file[offset : offset + size] for offset, size in ranges]


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
