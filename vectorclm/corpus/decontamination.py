"""Benchmark decontamination: finds training documents that share 13 words in a row with a benchmark, by hashes.

The criterion is that of Brown et al. ("Language Models are Few-Shot Learners", arXiv 2005.14165, appendix C). Words
are runs of letters and digits in lower case, so punctuation and line breaks do not matter. A benchmark text of 8 to 12
words counts as one run. A shorter text is ignored, because too many ordinary documents would contain it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vectorclm.corpus.source_reader import in_groups, read_source
from vectorclm.corpus.sources import BenchmarkSource
from vectorclm.corpus.synthetic_world import WorldConfig

GRAM = 13  # words
ANCHOR = 8  # words of the shortest benchmark text; the first 8 words of every run are looked up first
CHUNK = 256 * 1024  # bytes of text at a time: the arrays stay in the processor's cache
PRIME = 0x9E3779B97F4A7C15
FACTOR, SECOND, *POWERS = (np.uint64(pow(PRIME, n, 1 << 64)) for n in (1, 3, 1, 2, 4))
# Each byte in lower case, or 0 where it separates words. Bytes above 127 (other scripts in UTF-8) count as letters.
WORDS = bytes(c if c > 127 else ord(chr(c).lower()) if chr(c).isalnum() else 0 for c in range(256))
FIRST_BYTES = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)

Hashes = NDArray[np.uint64]


def read_benchmarks(sources: Sequence[BenchmarkSource], data: Path | None, world: WorldConfig | None) -> "Benchmarks":
    """Read all texts in the sources' columns. Raises DataError for a source that cannot be read."""
    return Benchmarks(
        {
            source.label: (text for row in read_source(source, data, world, source.columns) for text in strings(row))
            for source in sources
        }
    )


def strings(value: Any) -> Iterator[str]:
    """All strings in a row, those in lists and dictionaries included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from strings(inner)


class Benchmarks:
    """An index of the word runs of benchmarks, by label: `Benchmarks({"piqa": texts}).found(documents)`.

    The index takes 16 bytes of memory for each run and label, and about 30 more for fast lookup.
    """

    def __init__(self, texts: Mapping[str, Iterable[str]]) -> None:
        self.lengths: set[int] = set()
        self.runs = {label: self._runs(found) for label, found in texts.items()}
        anchors = [anchors for anchors, _ in self.runs.values()]
        self.anchors = _sorted([np.empty(0, np.uint64), *anchors])
        bits = min(27, max(10, (16 * len(self.anchors)).bit_length()))
        self.shift = np.uint64(64 - bits)
        # Indexed by an anchor's first bits: a bit set of the values of its next three bits. Most words fail this check.
        self.known = np.zeros(1 << bits, np.uint8)
        np.bitwise_or.at(self.known, (self.anchors >> self.shift).view(np.int64), self._next(self.anchors))

    def found(self, documents: Sequence[bytes]) -> dict[int, set[str]]:
        """Find documents that share a run with a benchmark. Returns the benchmarks' labels by document index."""
        shared: dict[int, set[str]] = {}
        first = 0
        for chunk in in_groups(documents, CHUNK):
            for number, label in self._found(chunk):
                shared.setdefault(first + number, set()).add(label)
            first += len(chunk)
        return shared

    def repeated(self, documents: Iterable[bytes]) -> Hashes:
        """The hashes of all benchmark runs that occur in any of the documents, sorted."""
        every = _sorted([np.empty(0, np.uint64), *(runs for _, runs in self.runs.values())])
        found = [np.empty(0, np.uint64)]
        for chunk in in_groups(documents, CHUNK):
            found += [np.unique(values[_members(values, every)]) for _, values in self._candidates(chunk)]
        return _sorted(found)

    def _found(self, documents: Sequence[bytes]) -> Iterator[tuple[int, str]]:
        for number, values in self._candidates(documents):
            for label, (_, runs) in self.runs.items():
                for hit in np.unique(number[_members(values, runs)]):
                    yield int(hit), label

    def _candidates(self, documents: Sequence[bytes]) -> Iterator[tuple[NDArray[np.int64], Hashes]]:
        """Runs whose first 8 words match a benchmark run, for each length: document indices and hashes."""
        words, ends = hashed_words(documents)
        eights = hashed_eights(words)
        known = self.known.take((eights >> self.shift).view(np.int64))
        at = np.flatnonzero(known)
        at = at[known[at] & self._next(eights[at]) != 0]
        at = at[_members(eights[at], self.anchors)]
        if not len(at):
            return
        number = np.searchsorted(ends, at, side="right")
        for length in self.lengths:
            inside = at + length <= ends[number]
            yield number[inside], hashed_runs(words, eights, at[inside], length)

    def _next(self, eights: Hashes) -> NDArray[np.uint8]:
        """A byte with one bit set for each hash: the three bits after the first ones select the bit."""
        three = (eights >> (self.shift - np.uint64(3))) & np.uint64(7)
        return (np.uint64(1) << three).astype(np.uint8)

    def _runs(self, texts: Iterable[str]) -> tuple[Hashes, Hashes]:
        """The hashes of the first eight words of each run, and of the whole runs, both sorted."""
        anchors, runs = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
        for length, _, of_first, of_all in text_runs(texts):
            self.lengths.add(length)
            anchors.append(of_first)
            runs.append(of_all)
        return _sorted(anchors), _sorted(runs)


def text_runs(texts: Iterable[str]) -> Iterator[tuple[int, NDArray[np.int64], Hashes, Hashes]]:
    """The word runs of some texts, for each length: text indices, hashes of the first eight words, and hashes of
    the whole runs.
    """
    first = 0
    for chunk in in_groups((text.encode(errors="replace") for text in texts), CHUNK):
        words, ends = hashed_words(chunk)
        eights = hashed_eights(words)
        starts = np.concatenate([[0], ends[:-1]])
        sizes = ends - starts
        place = np.arange(len(words))
        whole = place + GRAM <= np.repeat(ends, sizes)
        at = {length: starts[sizes == length] for length in range(ANCHOR, GRAM)} | {GRAM: place[whole]}
        for length, places in at.items():
            if len(places):
                numbers = first + np.searchsorted(ends, places, side="right")
                yield length, numbers, eights[places], hashed_runs(words, eights, places, length)
        first += len(chunk)


def contaminated(items: Sequence[Sequence[str]], documents: Iterable[bytes]) -> NDArray[np.bool_]:
    """Whether each item has a text that shares a run of words with any document [N]."""
    texts = [text for item in items for text in item]
    owners = np.repeat(np.arange(len(items)), [len(item) for item in items])
    repeated = Benchmarks({"": texts}).repeated(documents)
    found = np.zeros(len(items), bool)
    for _, numbers, _, runs in text_runs(texts):
        found[owners[numbers[_members(runs, repeated)]]] = True
    return found


def hashed_words(documents: Sequence[bytes]) -> tuple[Hashes, NDArray[np.int64]]:
    """Hashes of all words [W], and for each document the number of words up to its end [D].

    A hash covers the first and last eight bytes of a word; the bytes between them in a longer word do not count.
    """
    data = bytearray(b" " + b" ".join(documents) + b" " * 8).translate(WORDS)
    text = np.frombuffer(data, np.uint8)
    # Punctuation outside ASCII, such as quotes and dashes: U+2000 to U+207F, and Latin-1's (first byte C2).
    beyond = np.flatnonzero(text > 0x7F)
    wide, narrow = beyond[text[beyond] == 0xE2], beyond[text[beyond] == 0xC2]
    wide = wide[(text[wide + 1] & 0xFE) == 0x80]
    for place in (wide, wide + 1, wide + 2, narrow, narrow + 1):
        text[place] = 0
    letters = text != 0
    edges = np.flatnonzero(letters[1:] != letters[:-1]) + 1
    begins, stops = edges[::2], edges[1::2]
    # The eight bytes from each position on. The copy is aligned, which `take` needs to be fast.
    eight = np.ascontiguousarray(np.ndarray(len(data) - 7, "<u8", data, strides=(1,)))
    mask = FIRST_BYTES.take(stops - begins, mode="clip")
    head, tail = eight.take(begins) & mask, eight.take(np.maximum(begins, stops - 8)) & mask
    words: NDArray[Any] = (head ^ head >> np.uint64(29)) * FACTOR + (tail ^ tail >> np.uint64(31)) * SECOND
    sizes = np.array([len(document) + 1 for document in documents], np.int64)
    return words, np.searchsorted(begins, np.cumsum(sizes) + 1)


def hashed_eights(words: Hashes) -> Hashes:
    """Polynomial hashes of the eight words from each position on [W]; of fewer words at the end."""
    found = words.copy()
    for step, power in zip((1, 2, 4), POWERS, strict=True):
        found[:-step] = found[:-step] * power + found[step:]
    return found


def hashed_runs(words: Hashes, eights: Hashes, at: NDArray[np.int64], length: int) -> Hashes:
    """Polynomial hashes of the `length` (8 or more) words from the positions `at` on."""
    found = eights[at]
    for step in range(ANCHOR, length):
        found = found * FACTOR + words[at + step]
    return found


def _sorted(parts: Sequence[Hashes]) -> Hashes:
    """The distinct values, sorted. NumPy's `unique` is ten times slower on hashes."""
    values: Hashes = np.sort(np.concatenate(parts))
    first = np.ones(len(values), bool)
    first[1:] = values[1:] != values[:-1]
    return values[first]


def _members(values: Hashes, known: Hashes) -> NDArray[np.bool_]:
    """Whether each of `values` is in the sorted array `known`."""
    if not len(known):
        return np.zeros(len(values), bool)
    found: NDArray[np.bool_] = known[np.minimum(np.searchsorted(known, values), len(known) - 1)] == values
    return found
