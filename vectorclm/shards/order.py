"""The training order: which window of which source stands at place n is a pure function of (plan, seed, n).

So resuming costs the same at place 10 and at place 10 billion, nothing needs saving but a number, and ranks and
loader workers only take their share of the same order. It is made so that an object store can be read well:

- A source's windows are cut into *blocks* of `windows_per_block`, about a mebibyte of tokens and one request each.
  Block b holds the windows from b x windows_per_block on; the last block of a source may be short.
- An epoch of a source reads its blocks in a random order, GROUP_BLOCKS at a time: a *group*. Inside a group, the
  windows of all its blocks stand in a random order. Groups of a source never overlap in time, so a reader that keeps
  one group of each source in memory, and the next one on its way, fetches every block once an epoch and uses all of
  it. The short block is always the last of an epoch's order.
- Sources are mixed *mix blocks* of MIX_BLOCK windows at a time, in each of which their places are random. At the end
  of every mix block each source stands less than one window from its exact share of the phase.

A reader asks `TrainingOrder.groups(place)` for what will be needed from a place on, in that order.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vectorclm.errors import ConfigError
from vectorclm.settings import digest

ORDER = 2  # raised where new code puts the windows of an equal plan in another order
MIX_BLOCK = 1024  # windows at whose end the mix of a phase is exact
BLOCK_BYTES = 2**20  # of tokens in a block
GROUP_BLOCKS = 16  # whose windows are shuffled together
ROUNDS = np.array([[0], [16], [32], [48]], np.uint64)  # the bits from which on a key's rounds take theirs
PATTERN, BLOCKS, WINDOWS = range(3)  # what a random order is for, so that no two are the same

WhenExhausted = Literal["stop", "repeat", "renormalise"]


def windows_per_block(sequence_length: int, itemsize: int) -> int:
    """Windows of `sequence_length` tokens, `itemsize` bytes each, in a block; at least one."""
    return max(1, BLOCK_BYTES // (itemsize * sequence_length))


def format_epochs(epochs: Mapping[str, float]) -> str:
    """How often each source is read, as a person says it: "fineweb-edu 1.00 epochs, cosmopedia 0.83"."""
    first, *others = (f"{label} {value:.2f}" for label, value in epochs.items())
    return ", ".join([f"{first} epochs", *others])


def mix64(x: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A keyed hash of 64-bit integers (the finalizer of splitmix64, Steele et al., OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        x = x + key * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def key_of(*parts: int) -> NDArray[np.uint64]:
    """A key for what these numbers stand for."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = mix64(np.array([part], np.uint64), key)
    return key


def permute(index: NDArray[np.int64], size: NDArray[np.int64] | int, key: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where each of `index` stands in a random order of range(size), without making that order.

    `size`, up to 2**32, and `key` are one for all, or one for each, so that many orders are asked at once. A
    four-round Feistel network over the next power of two, walked until the value falls below the size (Black &
    Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, method 2).
    """
    value, sizes = index.astype(np.uint32), np.broadcast_to(size, index.shape)
    bits = np.broadcast_to(np.frexp(np.subtract(size, 1))[1].astype(np.uint32), index.shape)  # of the largest value
    keys = np.broadcast_to((key >> ROUNDS).astype(np.uint32), (4, *index.shape))
    value = _feistel(value, bits, keys)
    outside = np.flatnonzero(value >= sizes)
    while len(outside):
        value[outside] = _feistel(value[outside], bits[outside], keys[:, outside])
        outside = outside[value[outside] >= sizes[outside]]
    return value.astype(np.int64)


def _feistel(value: NDArray[np.uint32], bits: NDArray[np.uint32], keys: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """A permutation of the numbers of `bits` bits; of an odd number, the halves change their widths in each round.

    The `keys` [4, n] are those of the rounds. A round takes the upper bits of a hash with the factors of MurmurHash3
    (Appleby, 2011): products of 32 bits are several times as fast as mix64's.
    """
    low: NDArray[np.uint32] = bits >> np.uint32(1)
    left: NDArray[np.uint32] = value >> low
    right: NDArray[np.uint32] = value ^ left << low
    drop, next_drop = np.uint32(32) - bits + low, np.uint32(32) - low
    for key in keys:
        x = (right ^ key) * np.uint32(0x85EBCA6B)
        x = (x ^ x >> np.uint32(15)) * np.uint32(0xC2B2AE35)
        left, right = right, left ^ x >> drop
        drop, next_drop = next_drop, drop
    return left << low | right


class MixturePhase(NamedTuple):
    """A phase of the curriculum, in windows: its length, its mix, and what to do where a source has no more."""

    windows: int
    weights: Mapping[str, float]  # of some sources, each at least 1/MIX_BLOCK of their sum; the others have no part
    when_exhausted: WhenExhausted = "repeat"


class BlockGroup(NamedTuple):
    """Blocks of one source whose windows are read, and shuffled, together."""

    source: int  # index into the plan's labels
    epoch: int
    number: int  # within the epoch
    place: int  # in the plan, of the first window that needs it (from the place on that was asked)
    blocks: NDArray[np.int64]  # numbers of the blocks within the source, up to GROUP_BLOCKS


@dataclass(frozen=True)
class Segment:
    """A part of the plan with one mix: a phase, or what lies between two sources' ends where others take over."""

    first: int  # the place of its first window
    windows: int
    shares: NDArray[np.float64]  # [sources], their sum is 1
    used: NDArray[np.int64]  # [sources], windows read before
    deficit: NDArray[np.float64]  # [sources], what the exact shares of all before exceed `used` by

    def counts(self, windows: int) -> NDArray[np.int64]:
        """Windows [sources] of each source among the first of this segment: the exact shares, rounded to fit.

        Each count is its share rounded down or up. Up go those to which most is deficit. As a share is at least one
        window of a mix block, counts never fall from the end of one to the next.
        """
        exact = self.shares * windows
        counts = np.floor(exact + 1e-9).astype(np.int64)
        fraction = exact - counts
        deficit = np.where(fraction > 1e-9, self.deficit + fraction, -np.inf)
        counts[np.argsort(-deficit, kind="stable")[: windows - counts.sum()]] += 1
        return counts


class TrainingOrder:
    """Which window of which source stands at each place of the training order.

    `phases` follow each other; `sizes` are the windows that each source has. Counters go on across phases: no source
    repeats a window before all its windows were read, and then it has a new order. Raises ConfigError for a weight of
    no source or too small to count, and where a source runs out in a phase that forbids it.
    """

    def __init__(
        self, phases: Sequence[MixturePhase], sizes: Mapping[str, int], seed: int, *, windows_per_block: int
    ) -> None:
        self.phases = phases
        self.labels = sorted(sizes)
        self.sizes = [sizes[label] for label in self.labels]
        self.seed = seed
        self.windows_per_block = windows_per_block
        self._keys = [key_of(seed, purpose) for purpose in (PATTERN, BLOCKS, WINDOWS)]
        self.segments: list[Segment] = []
        self.windows = 0
        self._used, self._owed = np.zeros(len(sizes), np.int64), np.zeros(len(sizes))
        for number, phase in enumerate(phases, 1):
            self._add_phase(f"phase {number}", phase)
        self._ends = np.array([segment.first + segment.windows for segment in self.segments])

    def _add_phase(self, name: str, phase: MixturePhase) -> None:
        """Add the segments of a phase: one, or where the others take over from exhausted sources, one after another."""
        sizes, weights = np.array(self.sizes), self._weights(name, phase)
        before, left = self._used, phase.windows
        while left:
            windows = left
            if phase.when_exhausted == "renormalise":  # until the next source runs out
                weights[self._used >= sizes] = 0
                if not weights.any():
                    raise ConfigError(
                        f"{name} takes {phase.windows:,} windows, but its sources have only {phase.windows - left:,} "
                        'left: sample more, shorten the phase, or set its when_exhausted to "repeat"'
                    )
                shares = weights / weights.sum()
                windows = min(left, int(((sizes - self._used)[weights > 0] / shares[weights > 0]).min()))
            self._add_segment(windows, weights / weights.sum())
            left -= windows
        if phase.when_exhausted == "stop":
            self._refuse_repeats(name, self._used - before, before)

    def _refuse_repeats(self, name: str, wanted: NDArray[np.int64], before: NDArray[np.int64]) -> None:
        """Raise ConfigError where a phase wants more windows of a source than are unread."""
        left = np.maximum(np.array(self.sizes) - before, 0)
        lines = [
            f"{wanted[s]:,} windows of {self.labels[s]}, which has {left[s]:,} left of {self.sizes[s]:,}"
            for s in np.flatnonzero(wanted > left)
        ]
        if lines:
            raise ConfigError(
                f"{name} takes {', and '.join(lines)}: sample more of it, give it less weight, shorten the phase, or "
                'set its when_exhausted to "repeat" or "renormalise"'
            )

    def _weights(self, name: str, phase: MixturePhase) -> NDArray[np.float64]:
        """The phase's weight of each source, checked."""
        if unknown := set(phase.weights) - set(self.labels):
            raise ConfigError(
                f"{name} weighs {', '.join(sorted(unknown))}, but the sources are {', '.join(self.labels)}"
            )
        weights = np.array([phase.weights.get(label, 0.0) for label in self.labels])
        if lost := [self.labels[s] for s in np.flatnonzero((weights > 0) & (weights * MIX_BLOCK < weights.sum()))]:
            raise ConfigError(f"{name}: {', '.join(lost)} has less than 1/{MIX_BLOCK} of it: give it more, or 0")
        return weights

    def _add_segment(self, windows: int, shares: NDArray[np.float64]) -> None:
        segment = Segment(self.windows, windows, shares, self._used, self._owed)
        counts = segment.counts(windows)
        self.segments.append(segment)
        self.windows += windows
        self._used, self._owed = self._used + counts, self._owed + shares * windows - counts

    def locate(self, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source (index into `labels`) and window (index within the source) at each of `places`."""
        source, counter = self._read(places)
        epoch, index = np.divmod(counter, np.array(self.sizes)[source])
        return source, self._window(source, epoch, index)

    def blocks(self, source: int, epoch: int, group: int) -> NDArray[np.int64]:
        """Numbers of the blocks that a group of an epoch of a source reads, in its order: up to GROUP_BLOCKS.

        Every window of them is read in this group, and nowhere else in this epoch.
        """
        first = group * GROUP_BLOCKS
        order = np.arange(first, min(first + GROUP_BLOCKS, -(-self.sizes[source] // self.windows_per_block)))
        same = np.zeros(len(order), np.int64)
        return self._block(same + source, same + epoch, order)

    def block_windows(self, source: int, block: int) -> range:
        """The windows of a source that lie in one of its blocks. A block may cross from one shard into the next."""
        first = block * self.windows_per_block
        return range(first, min(first + self.windows_per_block, self.sizes[source]))

    def groups(self, place: int = 0) -> Iterator[BlockGroup]:
        """Every group that the places from `place` on need, in the order in which they need it first.

        What a reader fetches ahead. A group of a source is needed no more once the next one of that source is; the
        groups that `place` finds half read come first in their turn, whole. Lazy: takes no time for what is not asked.
        """
        in_group = GROUP_BLOCKS * self.windows_per_block
        sizes = np.array(self.sizes)
        in_epoch = -(-sizes // in_group)
        last = np.full(len(sizes), -1)  # the number of each source's last group, counted over its epochs
        while place < self.windows:
            segment, end = (int(found[0]) for found in self._mix_blocks(np.array([place])))
            newest = self.segments[segment].used + self.segments[segment].counts(end - self.segments[segment].first) - 1
            if (newest // sizes * in_epoch + newest % sizes // in_group > last).any():  # mostly, none is new
                source, counter = self._read(np.arange(place, end))
                epoch, index = np.divmod(counter, sizes[source])
                number = epoch * in_epoch[source] + index // in_group
                # One integer for each group, as numpy finds the first of each fast.
                _, first = np.unique(source << 40 | number, return_index=True)
                for at in np.sort(first):
                    s, e, g = int(source[at]), int(epoch[at]), int(index[at] // in_group)
                    if number[at] > last[s]:
                        last[s] = number[at]
                        yield BlockGroup(s, e, g, place + int(at), self.blocks(s, e, g))
            place = end

    def boundaries(self) -> NDArray[np.int64]:
        """The place after each mix block: there the mix is exact. At most MIX_BLOCK lie between two of them."""
        ends = [np.arange(s.first + s.windows, s.first, -MIX_BLOCK)[::-1] for s in self.segments]
        return np.concatenate(ends)

    def read_before(self, place: int) -> dict[str, int]:
        """Windows of each source among those before `place`, each reading counted."""
        counts = np.zeros(len(self.labels), np.int64)
        if place:
            number, end = (int(found[0]) for found in self._mix_blocks(np.array([place - 1])))
            segment = self.segments[number]
            start = max(segment.first, end - MIX_BLOCK)
            sources, _ = self._read(np.arange(start, place))
            counts = segment.used + segment.counts(start - segment.first)
            counts = counts + np.bincount(sources, minlength=len(self.labels))
        return {label: int(count) for label, count in zip(self.labels, counts, strict=True)}

    def epochs(self, place: int | None = None) -> dict[str, float]:
        """How often the places before `place`, or the whole plan, read each source."""
        used = self.read_before(self.windows if place is None else place)
        return {label: used[label] / size for label, size in zip(self.labels, self.sizes, strict=True)}

    def digest(self, batch_size: int) -> str:
        """SHA-256 (hex) of all that defines which windows make up a step of `batch_size`."""
        phases: list[Any] = [[phase.windows, dict(phase.weights), phase.when_exhausted] for phase in self.phases]
        sizes = dict(zip(self.labels, self.sizes, strict=True))
        rest = {"seed": self.seed, "windows_per_block": self.windows_per_block, "batch_size": batch_size}
        return digest({"order": ORDER, "phases": phases, "sizes": sizes, **rest})

    def _mix_blocks(self, places: NDArray[np.int64]) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
        """Number of the segment, and place after the mix block, that each of `places` lies in.

        Of a segment, the first mix block is the short one: a short last one might need less than none of a source.
        """
        number = np.searchsorted(self._ends, places, side="right")
        return number, places + (self._ends[number] - places - 1) % MIX_BLOCK + 1

    def _read(self, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source at each place, and how many windows of that source were read before it."""
        number, ends = self._mix_blocks(places)
        mixed, first, which = np.unique(ends, return_index=True, return_inverse=True)
        sources = np.empty((len(mixed), MIX_BLOCK), np.int64)
        counters = np.empty_like(sources)
        for row, (one, end) in enumerate(zip(number[first], mixed, strict=True)):
            self._mix(self.segments[one], int(end), sources[row], counters[row])
        within = MIX_BLOCK - (ends - places)
        return sources[which, within], counters[which, within]

    def _mix(self, segment: Segment, end: int, sources: NDArray[np.int64], counters: NDArray[np.int64]) -> None:
        """Put the mix block before place `end` into `sources` and `counters` [MIX_BLOCK], a short one at their end."""
        size = min(end - segment.first, MIX_BLOCK)
        before = segment.counts(end - size - segment.first)
        counts = segment.counts(end - segment.first) - before
        order = permute(np.arange(size), size, self._key(PATTERN, end))
        mixed = np.repeat(np.arange(len(counts), dtype=np.int16), counts)[order]  # in 16 bits, which sort in no time
        sources[-size:] = mixed
        first = np.repeat(segment.used + before - np.cumsum(counts) + counts, counts)
        counters[-size:][np.argsort(mixed, kind="stable")] = first + np.arange(size)

    def _key(self, purpose: int, what: NDArray[np.int64] | int) -> NDArray[np.uint64]:
        return mix64(np.atleast_1d(what).astype(np.uint64), self._keys[purpose])

    def _window(
        self, source: NDArray[np.int64], epoch: NDArray[np.int64], index: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """The window that an epoch of a source reads after `index` others."""
        in_group = GROUP_BLOCKS * self.windows_per_block
        group, place = np.divmod(index, in_group)
        size = np.minimum(np.array(self.sizes)[source] - group * in_group, in_group)
        place = permute(place, size, self._key(WINDOWS, source << 56 | epoch << 32 | group))
        turn, row = np.divmod(place, self.windows_per_block)
        return self._block(source, epoch, group * GROUP_BLOCKS + turn) * self.windows_per_block + row

    def _block(self, source: NDArray[np.int64], epoch: NDArray[np.int64], turn: NDArray[np.int64]) -> NDArray[np.int64]:
        """The block that an epoch of a source reads after `turn` others; the short one stays the last."""
        whole = np.array(self.sizes)[source] // self.windows_per_block
        block, key = turn.copy(), self._key(BLOCKS, source << 32 | epoch)
        shuffled = turn < whole
        block[shuffled] = permute(turn[shuffled], whole[shuffled], key[shuffled])
        return block
