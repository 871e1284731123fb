"""What of the benchmarks no document for training may repeat: runs of 13 words, known by their hashes.

The measure of Brown et al. ("Language Models are Few-Shot Learners", arXiv 2005.14165, appendix C). Words are runs of
letters and digits in lower case, so neither punctuation nor line breaks matter. A text of 8 to 12 words is looked for
as a whole, a shorter one not at all: too much of what people write would have it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vectorclm.corpus.source_reader import in_groups, read_source
from vectorclm.corpus.sources import BenchmarkSource, CorpusConfig, Source, TaskSource, check_labels
from vectorclm.corpus.synthetic_world import WorldConfig

GRAM = 13  # words
ANCHOR = 8  # words of the shortest text that is looked for, and what every run is first recognised by
CHUNK = 256 * 1024  # bytes of text at a time: its arrays stay in the processor's cache
PRIME = 0x9E3779B97F4A7C15
FACTOR, SECOND, *POWERS = (np.uint64(pow(PRIME, n, 1 << 64)) for n in (1, 3, 1, 2, 4))
# Every byte in lower case, and 0 between words. Bytes of other scripts are letters, as UTF-8 has them above 127.
WORDS = bytes(c if c > 127 else ord(chr(c).lower()) if chr(c).isalnum() else 0 for c in range(256))
FIRST_BYTES = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)

Hashes = NDArray[np.uint64]


def benchmark_sources(config: CorpusConfig, tasks: Sequence[TaskSource]) -> list[BenchmarkSource]:
    """The benchmarks that the sample must not repeat: all items of `tasks`, whatever their limit, and further ones.

    Raises ValueError where two share a label.
    """
    if not config.decontaminate:
        return []
    of_tasks = [
        BenchmarkSource(**task.model_dump(include=set(Source.model_fields)), columns=list(task.text_columns))
        for task in tasks
    ]
    sources = [*of_tasks, *config.decontaminate_with]
    check_labels(sources)
    return sources


def read_benchmarks(sources: Sequence[BenchmarkSource], data: Path | None, world: WorldConfig | None) -> "Benchmarks":
    """All texts in the columns of the sources. Raises DataError for one that cannot be read."""
    return Benchmarks(
        {
            source.label: (text for row in read_source(source, data, world, source.columns) for text in strings(row))
            for source in sources
        }
    )


def strings(value: Any) -> Iterator[str]:
    """The strings in a row, wherever they are."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from strings(inner)


class Benchmarks:
    """The runs of words of some benchmarks, by label: `Benchmarks({"piqa": texts}).found(documents)`.

    Memory is 16 bytes a run for each label, and some 30 more for finding them fast.
    """

    def __init__(self, texts: Mapping[str, Iterable[str]]) -> None:
        self.lengths: set[int] = set()
        self.runs = {label: self._runs(found) for label, found in texts.items()}
        anchors = [anchors for anchors, _ in self.runs.values()]
        self.anchors = _sorted([np.empty(0, np.uint64), *anchors])
        bits = min(27, max(10, (16 * len(self.anchors)).bit_length()))
        self.shift = np.uint64(64 - bits)
        # By an anchor's first bits, which of the eight values its next three have: most places fail by these two looks.
        self.known = np.zeros(1 << bits, np.uint8)
        np.bitwise_or.at(self.known, (self.anchors >> self.shift).view(np.int64), self._next(self.anchors))

    def found(self, documents: Sequence[bytes]) -> dict[int, set[str]]:
        """The numbers of the documents that share a run with a benchmark, and the labels of all these benchmarks."""
        shared: dict[int, set[str]] = {}
        first = 0
        for chunk in in_groups(documents, CHUNK):
            for number, label in self._found(chunk):
                shared.setdefault(first + number, set()).add(label)
            first += len(chunk)
        return shared

    def repeated(self, documents: Iterable[bytes]) -> Hashes:
        """The runs of any benchmark that any of the documents has, sorted."""
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
        """The runs that begin as one of a benchmark does, of each length: their documents' numbers and their hashes."""
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
        """One of eight bits set, by the three bits of each hash after the first ones."""
        three = (eights >> (self.shift - np.uint64(3))) & np.uint64(7)
        return (np.uint64(1) << three).astype(np.uint8)

    def _runs(self, texts: Iterable[str]) -> tuple[Hashes, Hashes]:
        """The hashes of the first eight words of each run, and of all its words, sorted."""
        anchors, runs = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
        for length, _, of_first, of_all in text_runs(texts):
            self.lengths.add(length)
            anchors.append(of_first)
            runs.append(of_all)
        return _sorted(anchors), _sorted(runs)


def text_runs(texts: Iterable[str]) -> Iterator[tuple[int, NDArray[np.int64], Hashes, Hashes]]:
    """What is looked for of some texts: the runs of each length, as the numbers of their texts and hashes of their
    first eight words and of all.
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
    """Of which items a text shares a run of words with any document [N]."""
    texts = [text for item in items for text in item]
    owners = np.repeat(np.arange(len(items)), [len(item) for item in items])
    repeated = Benchmarks({"": texts}).repeated(documents)
    found = np.zeros(len(items), bool)
    for _, numbers, _, runs in text_runs(texts):
        found[owners[numbers[_members(runs, repeated)]]] = True
    return found


def hashed_words(documents: Sequence[bytes]) -> tuple[Hashes, NDArray[np.int64]]:
    """A hash of every word [W], and for each document the number of words up to its end [D].

    It is made from the word's first and last eight bytes, so what a longer word has between them makes no difference.
    """
    data = bytearray(b" " + b" ".join(documents) + b" " * 8).translate(WORDS)
    text = np.frombuffer(data, np.uint8)
    # Punctuation outside of ASCII, such as quotes and dashes: U+2000 to U+207F, and Latin-1's (all that begins in C2).
    beyond = np.flatnonzero(text > 0x7F)
    wide, narrow = beyond[text[beyond] == 0xE2], beyond[text[beyond] == 0xC2]
    wide = wide[(text[wide + 1] & 0xFE) == 0x80]
    for place in (wide, wide + 1, wide + 2, narrow, narrow + 1):
        text[place] = 0
    letters = text != 0
    edges = np.flatnonzero(letters[1:] != letters[:-1]) + 1
    begins, stops = edges[::2], edges[1::2]
    # The eight bytes from every place on; copied, as `take` is fast on aligned numbers only.
    eight = np.ascontiguousarray(np.ndarray(len(data) - 7, "<u8", data, strides=(1,)))
    mask = FIRST_BYTES.take(stops - begins, mode="clip")
    head, tail = eight.take(begins) & mask, eight.take(np.maximum(begins, stops - 8)) & mask
    words: NDArray[Any] = (head ^ head >> np.uint64(29)) * FACTOR + (tail ^ tail >> np.uint64(31)) * SECOND
    sizes = np.array([len(document) + 1 for document in documents], np.int64)
    return words, np.searchsorted(begins, np.cumsum(sizes) + 1)


def hashed_eights(words: Hashes) -> Hashes:
    """A polynomial hash of the eight words from each place on [W]; of fewer at the end."""
    found = words.copy()
    for step, power in zip((1, 2, 4), POWERS, strict=True):
        found[:-step] = found[:-step] * power + found[step:]
    return found


def hashed_runs(words: Hashes, eights: Hashes, at: NDArray[np.int64], length: int) -> Hashes:
    """The same of `length` words, eight or more, from the places `at` on."""
    found = eights[at]
    for step in range(ANCHOR, length):
        found = found * FACTOR + words[at + step]
    return found


def _sorted(parts: Sequence[Hashes]) -> Hashes:
    """All values, each once. NumPy's `unique` is ten times slower on hashes."""
    values: Hashes = np.sort(np.concatenate(parts))
    first = np.ones(len(values), bool)
    first[1:] = values[1:] != values[:-1]
    return values[first]


def _members(values: Hashes, known: Hashes) -> NDArray[np.bool_]:
    """Which of `values` are among `known`, which is sorted."""
    if not len(known):
        return np.zeros(len(values), bool)
    found: NDArray[np.bool_] = known[np.minimum(np.searchsorted(known, values), len(known) - 1)] == values
    return found
